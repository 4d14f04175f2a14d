"""How large a network is: nonzero parameters, parameters kept, bytes.

Bytes of a file on disk are the business of whoever writes the file.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor

from pruning.network import Network

MEBIBYTE = 2**20
"""Bytes in the unit that the report calls MB."""


def nonzero_parameters(network: Network, keep: Mapping[str, Bool[Tensor, " _channels"]]) -> int:
    """Parameters that masking leaves nonzero: the report's count.

    params − Σ_layers (channels removed)·(input features of the dense layer). Biases stay, and so
    do the columns of the next layer that read nothing but a constant.

    Args:
        network: the dense network.
        keep: which channels stay, by layer; a layer left out keeps them all.

    Source: the report, Table 1's size column (this · 4 bytes / 2²⁰).
    """
    zeroed = sum(int((~kept).sum()) * network.weights[name].shape[1] for name, kept in keep.items())
    return network.parameters() - zeroed


def bytes_of(parameters: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that so many parameters take, without a file's header."""
    return parameters * dtype.itemsize


def mebibytes(n_bytes: int) -> float:
    """Bytes in units of 2²⁰, which the report calls MB."""
    return n_bytes / MEBIBYTE
