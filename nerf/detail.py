"""Where a photo has detail, and rays drawn more often there.

Source: the report, "Future work": calibration rays where the photo has strong gradients, rich
texture or highlights. The three are put together with equal parts of them and of chance.

Letters: Y luminance in [0, 1].
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  PyTorch itself writes it so

LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Share of red, green and blue (ITU-R BT.709)."""

WINDOW = 7
"""Side of the neighbourhood that texture and highlights are judged in, in pixels."""


def detail(photo: Float[Tensor, "height width 3"]) -> Float[Tensor, "height width"]:
    """How often a pixel should be drawn, on average 1.

    A quarter each of chance (1), gradient |∇Y|, texture (standard deviation of Y in a window of
    7 × 7) and highlights (how far Y is above its window's mean, times Y), each divided by its mean
    over the photo; where a photo has none of one, chance takes its part. So no pixel is left out.
    """
    Y = photo.double() @ torch.tensor(LUMINANCE, dtype=torch.float64, device=photo.device)
    mean = _windowed(Y)
    dy, dx = torch.gradient(Y) if min(Y.shape) > 1 else (torch.zeros_like(Y),) * 2
    parts = (
        (dx.square() + dy.square()).sqrt(),
        (_windowed(Y.square()) - mean.square()).clamp(min=0).sqrt(),
        (Y - mean).clamp(min=0) * Y,
    )
    total = torch.ones_like(Y)
    for part in parts:
        average = part.mean()
        total += part / average if average > 1e-6 else torch.ones_like(Y)
    return (total / 4).to(photo.dtype)


def _windowed(Y: Float[Tensor, "height width"]) -> Float[Tensor, "height width"]:
    """The mean over the part of each pixel's window that lies in the photo."""
    pooled = F.avg_pool2d(Y[None, None], WINDOW, 1, WINDOW // 2, count_include_pad=False)
    return pooled[0, 0]


def weighted_order(
    weights: Float[Tensor, "*shape"], generator: torch.Generator
) -> Int[Tensor, " n"]:
    """All positions in a random order; one of twice the weight comes first twice as often.

    The first k of it are k draws without replacement, for every k at once: sets of growing size
    are nested.

    Args:
        weights: above 0.
        generator: draws the order.

    Source: Efraimidis and Spirakis 2006 (weighted random sampling with a reservoir).
    """
    keys = torch.empty(weights.numel(), dtype=torch.float64).exponential_(generator=generator)
    return torch.argsort(keys / weights.flatten().double().cpu(), stable=True)
