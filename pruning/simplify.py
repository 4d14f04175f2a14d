"""Exact simplification: fewer parameters, the same function.

Letters: W, b a layer's weight and bias; f a layer that no ReLU follows, r a layer that reads it.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from pruning.errors import PruningError
from pruning.network import Layer, LayerGraph, Network


def merge_linear(network: Network, layers: Collection[str] | None = None) -> Network:
    """Multiply layers that no ReLU follows into the layers that read them.

    W_r [W_f x + b_f] = (W_r W_f) x + W_r b_f, so f is not needed. In the original NeRF that is the
    feature layer, which the view branch reads: 65,792 of 595,844 parameters fewer. The
    result has another graph (no such layer), so it **cannot be written in nerf-pytorch's shape**,
    and a layer that is gone cannot be pruned any more: prune first.

    Args:
        network: its outputs stay the same up to rounding; it is not changed.
        layers: which layers to merge; None for all whose merging leaves fewer parameters.

    Returns:
        A network without those layers, in the dense one's precision (products in float64).

    Raises:
        PruningError: a layer that was named is followed by a ReLU, or is an output.
    """
    can_go = [layer.name for layer in network.graph.layers if _mergeable(network, layer.name)]
    for name in layers or ():
        if name not in can_go:
            raise PruningError(
                f"layer {name!r} cannot be merged into its readers: a ReLU follows it, or nothing "
                f"reads it; those that can are {can_go}"
            )
    for layer in network.graph.layers:
        if layers is None:
            if _mergeable(network, layer.name):
                merged = _merged(network, layer.name)
                network = merged if merged.parameters() < network.parameters() else network
        elif layer.name in layers:
            network = _merged(network, layer.name)
    return network


def narrow_linear(network: Network) -> Network:
    """Take layers that no ReLU follows down to the width of the one layer that reads them.

    W_r [W_f x + b_f] = I [(W_r W_f) x + W_r b_f]: f gets as many channels as r has, and r reads
    them through the identity. The graph stays. In the original NeRF the feature layer falls from
    256 to 128 channels: 49,152 of 595,844 parameters fewer, and 16,384 of the others nearly free
    where weights are coded.

    Args:
        network: its outputs stay the same up to rounding; it is not changed.

    Returns:
        A network in the dense one's precision (products in float64); a layer that would not get
        narrower stays as it is.
    """
    weights, biases = dict(network.weights), dict(network.biases)
    for f in network.graph.layers:
        readers = list(network.graph.readers(f.name))
        if f.relu or len(readers) != 1:
            continue
        r, W = readers[0], weights[readers[0].name]
        columns = network.input_slices(r)[f.name]
        if len(W) >= len(biases[f.name]):
            continue
        through = W[:, columns].double()
        like = weights[f.name]
        weights[f.name] = (through @ like.double()).to(like.dtype)
        biases[f.name] = (through @ biases[f.name].double()).to(like.dtype)
        eye = torch.eye(len(W), dtype=W.dtype, device=W.device)
        weights[r.name] = torch.cat((W[:, : columns.start], eye, W[:, columns.stop :]), dim=1)
        network = Network(network.graph, weights, biases)
    return network


def _mergeable(network: Network, name: str) -> bool:
    return not network.graph[name].relu and any(network.graph.readers(name))


def _merged(network: Network, name: str) -> Network:
    """The network with one layer multiplied into each of its readers."""
    f = network.graph[name]
    W_f, b_f = network.weights[name].double(), network.biases[name].double()
    columns_of_f = network.input_slices(f)
    layers: list[Layer] = []
    weights, biases = {}, {}
    for r in network.graph.layers:
        W, b = network.weights[r.name], network.biases[r.name]
        if r.name == name:
            continue
        if name in r.inputs:
            columns: dict[str, Tensor] = {}
            through = W[:, network.input_slices(r)[name]].double()
            for source in r.inputs:
                if source != name:
                    columns[source] = W[:, network.input_slices(r)[source]].double()
                    continue
                # What f reads takes f's place; what r reads already is added to.
                for of_f in f.inputs:
                    if of_f not in r.inputs:
                        columns[of_f] = through @ W_f[:, columns_of_f[of_f]]
            for of_f in f.inputs:
                if of_f in r.inputs:
                    columns[of_f] = columns[of_f] + through @ W_f[:, columns_of_f[of_f]]
            b = (b.double() + through @ b_f).to(b.dtype)
            W = torch.cat(list(columns.values()), dim=1).to(W.dtype)
            layers.append(Layer(r.name, tuple(columns), r.relu, r.prunable))
        else:
            layers.append(r)
        weights[r.name], biases[r.name] = W.clone(), b.clone()
    return Network(LayerGraph(network.graph.external, tuple(layers)), weights, biases)
