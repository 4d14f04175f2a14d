"""From scores to keep masks: exactly floor(p·width) channels go, also under ties.

A threshold on the score would remove every channel that ties with it; a rank removes the number
that was asked for. Among equal scores the lowest index goes first.

Letters: p a layer's requested ratio.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.allocation import check_ratio
from pruning.errors import PruningError, RatioError

KeepMasks = Mapping[str, Bool[Tensor, " _channels"]]
"""For each layer, which output channels stay (True = kept); a layer left out keeps them all."""

ROUNDING = 1e-9
"""How far below a whole number p·width may fall by floating-point rounding, in channels."""


def removed_count(ratio: float, width: int) -> int:
    """Channels to remove from a layer: floor(p·width), at least one stays.

    0.29·100 is 28.999999999999996 in floating point, and the ratios of an allocation carry a
    rounding error of their own; what lies within `ROUNDING` below a whole number counts as it.

    Source: the report, step 4.

    Raises:
        RatioError: the ratio is not in [0, 1).

    >>> removed_count(0.29, 100), removed_count(0.15, 256)
    (29, 38)
    """
    return min(math.floor(check_ratio(ratio) * width + ROUNDING), width - 1)


def keep_mask(scores: Float[Tensor, " channels"], ratio: float) -> Bool[Tensor, " channels"]:
    """Remove the floor(p·width) channels with the lowest scores.

    Args:
        scores: one a channel, finite.
        ratio: p, the fraction to remove.

    Returns:
        True where a channel stays, on the device of the scores.

    Raises:
        RatioError: the ratio is not in [0, 1).
        PruningError: a score is NaN, which has no rank.
    """
    if bool(torch.isnan(scores).any()):
        raise PruningError("a score is NaN, so the channels cannot be ranked")
    order = torch.argsort(scores, stable=True)
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[order[: removed_count(ratio, len(scores))]] = False
    return keep


def select(
    scores: Mapping[str, Float[Tensor, " _channels"]], ratios: Mapping[str, float]
) -> dict[str, Bool[Tensor, " _channels"]]:
    """Keep masks of all layers.

    Args:
        scores: by layer.
        ratios: p by layer, for the same layers.

    Raises:
        RatioError: a ratio is missing, superfluous or out of range.
        PruningError: a score is NaN.
    """
    if scores.keys() != ratios.keys():
        raise RatioError(
            f"the prunable layers are {list(scores)}, and the ratios are for {list(ratios)}"
        )
    return {name: keep_mask(values, ratios[name]) for name, values in scores.items()}
