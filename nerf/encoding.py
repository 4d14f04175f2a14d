"""Positional encoding γ(x) = (x, sin 2⁰x, cos 2⁰x, …, sin 2^{L−1}x, cos 2^{L−1}x).

Source: Mildenhall et al. 2020, eq. 4, with the input itself kept and without the
factor π, as the authors' code and nerf-pytorch do; the order of the features is theirs too,
so that their checkpoints mean the same here.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def encoded_width(octaves: int, dims: int = 3) -> int:
    """Number of features γ gives for `dims` coordinates: dims · (1 + 2 · octaves)."""
    return dims * (1 + 2 * octaves)


def encode(x: Float[Tensor, "*batch dims"], octaves: int) -> Float[Tensor, "*batch features"]:
    """Encode coordinates.

    Args:
        x: coordinates in scene units (or NDC), any leading shape.
        octaves: number of frequencies L; 0 returns `x` itself.

    Returns:
        Features in the order x, sin(2⁰x), cos(2⁰x), sin(2¹x), …; each block has `dims` entries.
    """
    if octaves == 0:
        return x
    frequencies = 2.0 ** torch.arange(octaves, dtype=x.dtype, device=x.device)
    angles = x[..., None, :] * frequencies[:, None]
    waves = torch.stack((angles.sin(), angles.cos()), dim=-2)
    return torch.cat((x, waves.flatten(-3)), dim=-1)
