"""Taking channels out of a network without changing what it computes.

Masking zeroes row j of a layer's W and leaves its bias. The channel then emits the constant
relu(b_j) (b_j where no ReLU follows), which its readers go on using. Removing it for good means
giving each reader that constant in its bias:

    b_reader += Σ_j W_reader[:, j] · relu(b_j)      over the removed channels j

and dropping row j here and column j in every reader. The result is smaller and equal to the
masked network. A reader may join several inputs, and a layer may have several readers.

Letters: W, b a layer's weight (out × in) and bias; j a removed channel.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.errors import PruningError
from pruning.network import Network


def mask(network: Network, keep: Mapping[str, Bool[Tensor, " _channels"]]) -> Network:
    """Zero the incoming weights of the removed channels; biases and shapes stay.

    Args:
        network: the dense network.
        keep: which channels stay, by layer; a layer left out keeps them all.

    Returns:
        A new network of the same shape.

    Raises:
        PruningError: a mask is for a layer that is not prunable, or of the wrong length, or keeps
            nothing.
    """
    check_keep(network, keep)
    weights = {
        name: W * keep[name].to(W.device)[:, None] if name in keep else W.clone()
        for name, W in network.weights.items()
    }
    return Network(network.graph, weights, {name: b.clone() for name, b in network.biases.items()})


def remove(
    network: Network,
    keep: Mapping[str, Bool[Tensor, " _channels"]],
    constants: Mapping[str, Float[Tensor, " _channels"]] | None = None,
) -> Network:
    """Take the channels out physically; the result computes what the masked network does.

    Args:
        network: the dense network.
        keep: which channels stay, by layer; a layer left out keeps them all.
        constants: what the readers read in place of each channel, by layer, where that is not
            the constant that a masked channel emits.

    Returns:
        A new network of the same graph with narrower layers.

    Raises:
        PruningError: a mask is for a layer that is not prunable, or of the wrong length, or keeps
            nothing.
    """
    check_keep(network, keep)
    weights, biases = {}, {}
    for layer in network.graph.layers:
        W, b = network.weights[layer.name], network.biases[layer.name]
        columns = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
        folded = b.double()
        for name, columns_of_input in network.input_slices(layer).items():
            if name not in keep:
                continue
            kept = keep[name].to(W.device)
            columns[columns_of_input] = kept
            read = emitted(network, name)
            if constants is not None and name in constants:
                read = constants[name].to(read)
            folded = folded + W[:, columns_of_input][:, ~kept].double() @ read[~kept]
        rows = keep[layer.name].to(W.device) if layer.name in keep else slice(None)
        weights[layer.name] = W[rows][:, columns].clone()
        biases[layer.name] = folded.to(b.dtype)[rows].clone()
    return Network(network.graph, weights, biases)


def emitted(network: Network, name: str) -> Float[Tensor, " channels"]:
    """The constant that each channel emits once its incoming weights are zero (float64)."""
    b = network.biases[name].double()
    return b.relu() if network.graph[name].relu else b


def check_keep(network: Network, keep: Mapping[str, Tensor]) -> None:
    """Raise unless every mask fits a prunable layer and keeps a channel of it."""
    prunable = network.graph.prunable()
    for name, kept in keep.items():
        if name not in prunable:
            raise PruningError(
                f"layer {name!r} cannot lose channels; the prunable layers are {list(prunable)}"
            )
        if kept.shape != (network.width(name),):
            raise PruningError(
                f"the keep mask of layer {name!r} has shape {tuple(kept.shape)}, "
                f"the layer has {network.width(name)} channels"
            )
        if not bool(kept.any()):
            raise PruningError(
                f"the keep mask of layer {name!r} keeps no channel; keep at least one"
            )
