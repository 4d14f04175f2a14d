import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import Layer, LayerGraph, Network, PruningError, mask, nonzero_parameters, remove
from tests.pruning_networks import (
    NERF_WIDTHS,
    draw_keep_masks,
    draw_network,
    heads,
    nerf_graph,
    random_inputs,
    random_network,
)


@given(st.data())
def test_removing_channels_equals_masking_them(data: st.DataObject) -> None:
    network = draw_network(data)
    keep = draw_keep_masks(data, network)
    inputs = random_inputs(network, 5, seed=data.draw(st.integers(0, 99)))
    masked, small = heads(mask(network, keep), inputs), heads(remove(network, keep), inputs)
    assert masked.keys() == small.keys()
    for name in masked:
        torch.testing.assert_close(small[name], masked[name], rtol=1e-10, atol=1e-10)


@given(st.data())
def test_removal_narrows_exactly_the_layers_asked_for(data: st.DataObject) -> None:
    network = draw_network(data)
    keep = draw_keep_masks(data, network)
    small = remove(network, keep)
    for layer in network.graph.layers:
        kept = keep.get(layer.name)
        assert small.width(layer.name) == (
            network.width(layer.name) if kept is None else int(kept.sum())
        )
    assert small.parameters() <= nonzero_parameters(network, keep)


@pytest.mark.parametrize("n_kept", [1, 13, 128])
def test_float32_nerf_survives_removal_through_skip_and_heads(n_kept: int) -> None:
    network = random_network(nerf_graph(), NERF_WIDTHS, seed=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(n_kept)
    keep = {}
    for name in network.graph.prunable():
        keep[name] = torch.zeros(256, dtype=torch.bool)
        keep[name][torch.randperm(256, generator=generator)[:n_kept]] = True
    inputs = random_inputs(network, 64, seed=2, dtype=torch.float32)
    masked, small = heads(mask(network, keep), inputs), heads(remove(network, keep), inputs)
    assert masked.keys() == {"density", "rgb"}
    for name in masked:
        torch.testing.assert_close(small[name], masked[name], rtol=1e-4, atol=1e-4)


def test_fold_of_one_channel_worked_by_hand() -> None:
    graph = LayerGraph(
        {"x": 1},
        (
            Layer("hidden", ("x",), relu=True, prunable=True),
            Layer("head", ("x", "hidden"), relu=False, prunable=False),
        ),
    )
    network = Network(
        graph,
        {"hidden": torch.tensor([[1.0], [2.0], [3.0]]), "head": torch.tensor([[9.0, 4, 5, 6]])},
        {"hidden": torch.tensor([0.0, 7.0, -7.0]), "head": torch.tensor([100.0])},
    )
    # Channel 1 emits relu(7), read with weight 5; channel 2 emits relu(−7) = 0.
    small = remove(network, {"hidden": torch.tensor([True, False, False])})
    assert small.weights["hidden"].tolist() == [[1.0]]
    assert small.weights["head"].tolist() == [[9.0, 4.0]]
    assert small.biases["head"].tolist() == [135.0]


def test_surgery_leaves_the_dense_network_alone() -> None:
    network = random_network(nerf_graph(), {**NERF_WIDTHS, "trunk.3": 4}, seed=0)
    before = {name: W.clone() for name, W in network.weights.items()}
    keep = {"trunk.3": torch.tensor([True, False, True, False])}
    for copy in (mask(network, keep), remove(network, keep)):
        for name in copy.weights:
            copy.weights[name].add_(1)
            copy.biases[name].add_(1)
    assert all(torch.equal(before[name], network.weights[name]) for name in before)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"density": torch.tensor([True])}, "'density' cannot lose channels"),
        ({"trunk.0": torch.tensor([True])}, r"shape \(1,\), the layer has 256"),
        ({"trunk.0": torch.zeros(256, dtype=torch.bool)}, "keeps no channel"),
    ],
)
def test_impossible_masks_are_refused(keep: dict[str, torch.Tensor], message: str) -> None:
    network = random_network(nerf_graph(), NERF_WIDTHS, seed=0, dtype=torch.float32)
    for operation in (mask, remove):
        with pytest.raises(PruningError, match=message):
            operation(network, keep)


def test_graphs_and_networks_that_do_not_fit_together_are_refused() -> None:
    hidden = Layer("hidden", ("x",), relu=True, prunable=True)
    head = Layer("head", ("hidden",), relu=False, prunable=False)
    with pytest.raises(PruningError, match="'hidden' is an output"):
        LayerGraph({"x": 1}, (hidden,))
    with pytest.raises(PruningError, match="each once"):
        LayerGraph({"x": 1}, (Layer("head", ("x", "x"), relu=False, prunable=False),))
    graph = LayerGraph({"x": 1}, (hidden, head))
    weights = {"hidden": torch.ones(2, 1), "head": torch.ones(1, 3)}
    biases = {"hidden": torch.ones(2), "head": torch.ones(1)}
    with pytest.raises(PruningError, match=r"'head' has a weight of shape \(1, 3\).*\(1, 2\)"):
        Network(graph, weights, biases)
    with pytest.raises(PruningError, match="each layer needs both"):
        Network(graph, weights, {"head": torch.ones(1)})
