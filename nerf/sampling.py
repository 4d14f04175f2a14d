"""Where along a ray the field is evaluated.

Letters: t sample distances along a ray (in units of the ray direction's length), ascending;
u random numbers in [0, 1); w render weights Tᵢαᵢ.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class ShareOfDraws:
    """Random numbers for some rays of a batch.

    They are drawn for the whole batch and then cut, so that a ray has the same numbers however the
    batch is shared out among processes.

    Attributes:
        generator: their source, in the same state in every process.
        total: rays in the whole batch.
        first: place in it of the first ray at hand.
    """

    generator: torch.Generator
    total: int
    first: int


Draws = torch.Generator | ShareOfDraws
"""Where random numbers come from."""


def uniform(
    draws: Draws, n_rays: int, n_samples: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "rays samples"]:
    """Numbers in [0, 1), one row a ray."""
    if isinstance(draws, torch.Generator):
        return torch.rand(n_rays, n_samples, generator=draws, device=device, dtype=dtype)
    whole = torch.rand(
        draws.total, n_samples, generator=draws.generator, device=device, dtype=dtype
    )
    return whole[draws.first : draws.first + n_rays]


def normal(
    draws: Draws, n_rays: int, n_samples: int, device: torch.device
) -> Float[Tensor, "rays samples"]:
    """Standard normal numbers, one row a ray."""
    if isinstance(draws, torch.Generator):
        return torch.randn(n_rays, n_samples, generator=draws, device=device)
    whole = torch.randn(draws.total, n_samples, generator=draws.generator, device=device)
    return whole[draws.first : draws.first + n_rays]


def stratified(
    n_rays: int,
    n_samples: int,
    near: float,
    far: float,
    generator: Draws | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rays samples"]:
    """Samples evenly spaced in t, jittered within their strata when a generator is given.

    Args:
        n_rays: number of rays.
        n_samples: samples a ray.
        near: nearest t.
        far: farthest t.
        generator: source of the jitter; None for the same places every time.
        device: where to put them.
        dtype: their precision.

    Source: Mildenhall et al. 2020, eq. 2; strata bounded by the mid-points, as in its code.
    """
    if generator is None:
        t = torch.linspace(near, far, n_samples, device=device, dtype=dtype)
        return t.expand(n_rays, n_samples)
    lower, upper = strata(n_samples, near, far, device, dtype)
    return lower + (upper - lower) * uniform(generator, n_rays, n_samples, device, dtype)


def strata(
    n_samples: int,
    near: float,
    far: float,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, " samples"], Float[Tensor, " samples"]]:
    """Ends of the intervals that jittered samples lie in: lower, upper."""
    t = torch.linspace(near, far, n_samples, device=device, dtype=dtype)
    mid = 0.5 * (t[1:] + t[:-1])
    return torch.cat((t[:1], mid)), torch.cat((mid, t[-1:]))


def importance(
    t: Float[Tensor, "rays coarse"],
    render_weights: Float[Tensor, "rays coarse"],
    n_samples: int,
    generator: Draws | None,
) -> Float[Tensor, "rays fine"]:
    """Samples drawn where the coarse pass found something: the inverse CDF of its weights.

    The weights of the inner samples, plus 1e-5, are a piecewise-constant density between the
    mid-points of t. Without a generator u is evenly spaced, ends included.

    Args:
        t: distances of the coarse samples.
        render_weights: their render weights; no gradient flows through them.
        n_samples: samples to draw a ray.
        generator: source of u; None for the same places every time.

    Source: Mildenhall et al. 2020, section 5.2.
    """
    if generator is None:
        u = torch.linspace(0.0, 1.0, n_samples, device=t.device, dtype=t.dtype)
        u = u.expand(len(t), n_samples)
    else:
        u = uniform(generator, len(t), n_samples, t.device, t.dtype)
    return inverse_cdf(t, render_weights, u)


def inverse_cdf(
    t: Float[Tensor, "rays coarse"],
    render_weights: Float[Tensor, "rays coarse"],
    u: Float[Tensor, "rays fine"],
) -> Float[Tensor, "rays fine"]:
    """Samples at given places u of the CDF, see `importance`."""
    bins = 0.5 * (t[:, 1:] + t[:, :-1])
    density = render_weights[:, 1:-1].detach() + 1e-5
    density = density / density.sum(dim=-1, keepdim=True)
    cdf = torch.cat((torch.zeros_like(render_weights[:, :1]), density.cumsum(dim=-1)), dim=-1)
    above = torch.searchsorted(cdf, u.contiguous(), right=True)
    below = (above - 1).clamp(min=0)
    above = above.clamp(max=cdf.shape[-1] - 1)
    cdf_below, cdf_above = cdf.gather(-1, below), cdf.gather(-1, above)
    bin_below, bin_above = bins.gather(-1, below), bins.gather(-1, above)
    span = cdf_above - cdf_below
    span = torch.where(span < 1e-5, torch.ones_like(span), span)
    return bin_below + (u - cdf_below) / span * (bin_above - bin_below)
