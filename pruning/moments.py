"""What can be accumulated of a layer while calibration samples pass through it.

A *moment* is a function of the samples seen that adds over them (Σ w·a and the like), or whose
maximum is taken. A new moment is one function and one line in `MOMENTS`.

Letters: x a layer's input, a its output after the activation, W its weight (out × in), w a sample's
weight (1 unless given). x and a are in the network's own precision; every product and sum of them
is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

GRAM_ROWS = 65_536
"""Rows of x turned to float64 at once: 128 MiB at 257 columns."""

SENSITIVITY_ELEMENTS = 2**24
"""Elements of one block of the samples × out × in shares, 128 MiB in float64."""


@dataclass(frozen=True)
class Seen:
    """Some samples at one layer.

    Attributes:
        x: what the layer read.
        a: its output after the activation.
        W: its weight.
        w: how much each sample counts (float64); None for 1 each.
    """

    x: Float[Tensor, "samples in"]
    a: Float[Tensor, "samples channels"]
    W: Float[Tensor, "channels in"]
    w: Float[Tensor, " samples"] | None = None


def _total(
    values: Float[Tensor, "samples channels"], w: Float[Tensor, " samples"] | None
) -> Float[Tensor, " channels"]:
    """Σ w·values in float64."""
    if w is None:
        return values.sum(dim=0, dtype=torch.float64)
    return w @ values.double()


def mean(seen: Seen) -> Float[Tensor, " channels"]:
    """Σ w·a for each channel; its average is the mean activation E[a]."""
    return _total(seen.a, seen.w)


def absolute(seen: Seen) -> Float[Tensor, " channels"]:
    """Σ w·|a|; its average is E|a|, the mean itself behind a ReLU."""
    return _total(seen.a.abs(), seen.w)


def square(seen: Seen) -> Float[Tensor, " channels"]:
    """Σ w·a²; its average is E[a²], and E[a²] − E[a]² the variance."""
    return _total(seen.a.double().square(), seen.w)


def firing(seen: Seen) -> Float[Tensor, " channels"]:
    """Σ w·[a > 0]; its average is the fraction of samples on which a channel is on."""
    return _total((seen.a > 0).double(), seen.w)


def gram(seen: Seen) -> Float[Tensor, "n1 n1"]:
    """Σ w·[x; 1][x; 1]ᵀ of the layer's input; its average is H with the constant as last column.

    The last column holds E[x] and the lower right corner 1. The sum is symmetric to the last bit.
    """
    n = seen.x.shape[1]
    total = seen.x.new_zeros(n + 1, n + 1, dtype=torch.float64)
    for start in range(0, len(seen.x), GRAM_ROWS):
        x = seen.x[start : start + GRAM_ROWS].double()
        x = torch.cat((x, x.new_ones(len(x), 1)), dim=1)
        if seen.w is not None:
            x *= seen.w[start : start + GRAM_ROWS].sqrt()[:, None]
        total += x.T @ x
    return (total + total.T) / 2


def sensitivity(seen: Seen) -> Float[Tensor, " in"]:
    """Max over samples and outputs i of the share of w_ij·x_j in what output i sums up.

    Positive and negative terms are shared out separately, and the larger share counts:

        s_j = max_{x, i, ±}  (±w_ij x_j)⁺ / Σ_k (±w_ik x_k)⁺

    It touches every (sample, output, input) triple, which a matrix product cannot do for it: feed
    it a small calibration set. Samples of weight 0 are left out, other weights do not matter.

    Source: Liebenwein et al. 2020, definition 1 and its extension to signed weights (appendix).
    """
    x = (seen.x if seen.w is None else seen.x[seen.w > 0]).double()
    W = seen.W.double()
    highest = x.new_zeros(x.shape[1])
    rows = max(1, SENSITIVITY_ELEMENTS // W.numel())
    for start in range(0, len(x), rows):
        terms = x[start : start + rows, None, :] * W
        for part in (terms.clamp(min=0), (-terms).clamp(min=0)):
            whole = part.sum(dim=2, keepdim=True)
            shares = torch.where(whole > 0, part / whole, torch.zeros_like(part))
            highest = torch.maximum(highest, shares.amax(dim=(0, 1)))
    return highest


@dataclass(frozen=True)
class Moment:
    """A registered moment.

    Attributes:
        of: what samples at a layer contribute.
        side: whether it looks at the outputs of the prunable layers, or at the inputs of all.
        combine: how contributions are put together. A maximum is not divided by Σ w.
        reads_weights: whether it depends on the layer itself, or only on what passes through (then
            layers that read the same inputs share the work).
    """

    of: Callable[[Seen], Tensor]
    side: Literal["output", "input"] = "output"
    combine: Literal["sum", "max"] = "sum"
    reads_weights: bool = False


MOMENTS: dict[str, Moment] = {
    "mean": Moment(mean),
    "absolute": Moment(absolute),
    "square": Moment(square),
    "firing": Moment(firing),
    "gram": Moment(gram, side="input"),
    "sensitivity": Moment(sensitivity, side="input", combine="max", reads_weights=True),
}
"""What can be accumulated, by the name of its average."""


GRADIENT_MOMENTS = ("taylor", "taylor_square", "fisher", "curvature")
"""What only `gradients.collect_gradients` collects: E[a·g] and E[(Σ_run a·g)²] of the outputs of
the prunable layers, and E[(∂L/∂z)²] of those of all, before the activation. ``curvature`` is the
``fisher`` of a loss that probes what the network is for with random signs (see
`gradients.probe`)."""


def is_maximum(moment: str) -> bool:
    """Whether contributions are combined by their maximum (moments not in `MOMENTS` are sums)."""
    return moment in MOMENTS and MOMENTS[moment].combine == "max"
