"""A network as pruning sees it: linear layers, what each reads, and their weights.

Nothing here knows what the network is for. Any chain of Linear + ReLU layers with skips, branches
and several heads is described by a `LayerGraph` (plain data) and the tensors that go with it.

Letters: x a layer's input, W its weight (out × in), b its bias, a its output after the activation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, relu

from pruning.errors import PruningError


@dataclass(frozen=True)
class Layer:
    """One linear layer of a graph.

    Attributes:
        name: key of its weight and bias.
        inputs: what it reads, in order of concatenation: names of earlier layers or of external
            inputs.
        relu: whether a ReLU follows.
        prunable: whether its output channels may be removed.
    """

    name: str
    inputs: tuple[str, ...]
    relu: bool
    prunable: bool


@dataclass(frozen=True)
class LayerGraph:
    """Linear layers in an order in which they can be computed.

    Attributes:
        external: width of each external input, by name.
        layers: the layers; each reads only external inputs and layers before it.
    """

    external: Mapping[str, int]
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        known = set(self.external)
        for layer in self.layers:
            missing = [name for name in layer.inputs if name not in known]
            if missing or layer.name in known:
                raise PruningError(
                    f"layer {layer.name!r} reads {missing or 'its own name'}, "
                    f"which is not defined before it; known there: {sorted(known)}"
                )
            if not layer.inputs or len(set(layer.inputs)) < len(layer.inputs):
                raise PruningError(
                    f"layer {layer.name!r} must read one or more things, each once; "
                    f"got {list(layer.inputs)}"
                )
            known.add(layer.name)
        for name in self.prunable():
            if not any(self.readers(name)):
                raise PruningError(
                    f"layer {name!r} is an output of the network: nothing reads it, so removing "
                    "its channels would change the outputs' shape; mark it prunable=False"
                )

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise PruningError(
            f"no layer {name!r}; the layers are {[layer.name for layer in self.layers]}"
        )

    def prunable(self) -> tuple[str, ...]:
        """Names of the layers whose channels may be removed, in order."""
        return tuple(layer.name for layer in self.layers if layer.prunable)

    def readers(self, name: str) -> Iterator[Layer]:
        """Layers that read the output of `name`."""
        return (layer for layer in self.layers if name in layer.inputs)


@dataclass(frozen=True)
class Network:
    """A graph and its weights.

    Attributes:
        graph: who reads what.
        weights: W of each layer.
        biases: b of each layer.
    """

    graph: LayerGraph
    weights: Mapping[str, Float[Tensor, "_out _in"]]
    biases: Mapping[str, Float[Tensor, " _out"]]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.graph.layers]
        if not set(names) == self.weights.keys() == self.biases.keys():
            raise PruningError(
                f"the graph has layers {names}, there are weights of {sorted(self.weights)} "
                f"and biases of {sorted(self.biases)}; each layer needs both"
            )
        for layer in self.graph.layers:
            in_width = sum(self.width(name) for name in layer.inputs)
            expected, found = (self.width(layer.name), in_width), self.weights[layer.name].shape
            if expected != tuple(found) or not expected[0]:
                raise PruningError(
                    f"layer {layer.name!r} has a weight of shape {tuple(found)}; its bias and what "
                    f"it reads make it {expected}"
                )

    def width(self, name: str) -> int:
        """Channels of a layer, or features of an external input."""
        if name in self.graph.external:
            return self.graph.external[name]
        return len(self.biases[name])

    def input_slices(self, layer: Layer) -> dict[str, slice]:
        """Where each thing a layer reads sits among the columns of its weight."""
        slices, start = {}, 0
        for name in layer.inputs:
            slices[name] = slice(start, start + self.width(name))
            start = slices[name].stop
        return slices

    def activations(
        self, inputs: Mapping[str, Float[Tensor, "_samples _features"]]
    ) -> Iterator[tuple[Layer, Float[Tensor, "samples in"], Float[Tensor, "samples out"]]]:
        """Compute the network layer by layer.

        Args:
            inputs: each external input, one row a sample. Layers are computed as they are asked
                for, so an input that only later layers read may be missing if the caller stops.

        Yields:
            (layer, x, a): the layer, what it read, and its output after the activation.
        """
        computed: dict[str, Tensor] = dict(inputs)
        for layer in self.graph.layers:
            parts = [computed[name] for name in layer.inputs]
            x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
            a = linear(x, self.weights[layer.name], self.biases[layer.name])
            if layer.relu:
                a = relu(a)
            computed[layer.name] = a
            yield layer, x, a

    def parameters(self) -> int:
        """Number of weights and biases."""
        return sum(w.numel() for w in self.weights.values()) + sum(
            b.numel() for b in self.biases.values()
        )
