"""Networks to prune: one of the original NeRF's shape, small random ones, and a slow reference."""

from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from pruning import Layer, LayerGraph, Network

NERF_WIDTHS = {
    **{f"trunk.{i}": 256 for i in range(8)},
    "density": 1,
    "feature": 256,
    "view": 128,
    "rgb": 3,
}


def nerf_graph(branch: bool = False) -> LayerGraph:
    """The original NeRF: 8 layers, the point joined again after layer 4, two heads.

    With `branch`, the feature layer and the view branch are prunable too.
    """
    trunk = [
        Layer(
            f"trunk.{i}",
            ("point",) if i == 0 else ("point", "trunk.4") if i == 5 else (f"trunk.{i - 1}",),
            relu=True,
            prunable=True,
        )
        for i in range(8)
    ]
    return LayerGraph(
        {"point": 63, "direction": 27},
        (
            *trunk,
            Layer("density", ("trunk.7",), relu=False, prunable=False),
            Layer("feature", ("trunk.7",), relu=False, prunable=branch),
            Layer("view", ("feature", "direction"), relu=True, prunable=branch),
            Layer("rgb", ("view",), relu=False, prunable=False),
        ),
    )


def random_network(
    graph: LayerGraph, widths: Mapping[str, int], seed: int, dtype: torch.dtype = torch.float64
) -> Network:
    """Weights scaled by 1/√in, so that activations stay near 1 at any depth."""
    generator = torch.Generator().manual_seed(seed)
    known = {**graph.external, **widths}
    weights, biases = {}, {}
    for layer in graph.layers:
        n_in, n_out = sum(known[name] for name in layer.inputs), widths[layer.name]
        weights[layer.name] = torch.randn(n_out, n_in, generator=generator, dtype=dtype) / n_in**0.5
        biases[layer.name] = torch.randn(n_out, generator=generator, dtype=dtype)
    return Network(graph, weights, biases)


def random_inputs(
    network: Network, n_samples: int, seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(n_samples, width, generator=generator, dtype=dtype)
        for name, width in network.graph.external.items()
    }


def heads(network: Network, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that nothing reads."""
    return {
        layer.name: a
        for layer, _, a in network.activations(inputs)
        if not any(network.graph.readers(layer.name))
    }


def draw_network(data: st.DataObject, prunable: bool = False) -> Network:
    """Random graphs: skips, branches, several heads, layers with and without ReLU.

    With `prunable`, at least one layer is read by another.
    """
    draw = data.draw
    external = {f"in{i}": draw(st.integers(1, 3)) for i in range(draw(st.integers(1, 2)))}
    names = [f"layer{i}" for i in range(draw(st.integers(2, 7)))]
    known, reads = list(external), {}
    for name in names:
        reads[name] = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        known.append(name)
    if prunable and names[0] not in reads[names[-1]]:
        reads[names[-1]].append(names[0])
    read = {name for inputs in reads.values() for name in inputs}
    layers = tuple(
        Layer(name, tuple(reads[name]), relu=draw(st.booleans()), prunable=name in read)
        for name in names
    )
    widths = {name: draw(st.integers(1, 6)) for name in names}
    return random_network(LayerGraph(external, layers), widths, draw(st.integers(0, 2**16)))


def draw_keep_masks(data: st.DataObject, network: Network) -> dict[str, Tensor]:
    """Random masks that keep a channel or more; some layers get none, some keep just one."""
    masks = {}
    for name in network.graph.prunable():
        kind = data.draw(st.sampled_from(["all", "some", "one"]))
        width = network.width(name)
        kept = torch.zeros(width, dtype=torch.bool)
        kept[data.draw(st.integers(0, width - 1))] = True
        if kind == "some":
            flags = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
            kept |= torch.tensor(flags)
        if kind != "all":
            masks[name] = kept
    return masks
