"""Allocations: how a sparsity ratio is shared out among the layers.

An allocation is one pure function (p, number of layers) → one ratio a layer, whose mean is p. A
new one is one function and one line in `ALLOCATIONS`. A list of ratios is an allocation too.

Letters: p the requested ratio, the fraction removed, in [0, 1).
"""

import math
from collections.abc import Callable, Sequence

from pruning.errors import RatioError
from pruning.registry import lookup

AllocationFunction = Callable[[float, int], tuple[float, ...]]


def uniform(ratio: float, n_layers: int) -> tuple[float, ...]:
    """Every layer loses the fraction p."""
    return (ratio,) * n_layers


def front_loaded(ratio: float, n_layers: int) -> tuple[float, ...]:
    """The first layers lose more: a line from p + d down to p − d, d = min(p, 1 − p) / 2."""
    return back_loaded(ratio, n_layers)[::-1]


def back_loaded(ratio: float, n_layers: int) -> tuple[float, ...]:
    """The last layers lose more: a line from p − d up to p + d, d = min(p, 1 − p) / 2.

    The mean is p, and half of the room to 0 or 1 is left on either side. One layer gets p.
    """
    if n_layers == 1:
        return (ratio,)
    d = 0.5 * min(ratio, 1 - ratio)
    # Counted in odd steps from the middle, so that the two halves mirror each other exactly.
    offsets = (d * (2 * i - (n_layers - 1)) / (n_layers - 1) for i in range(n_layers))
    # Next to 1, p + d rounds to 1, which would remove a whole layer.
    return tuple(min(ratio + offset, math.nextafter(1, 0)) for offset in offsets)


ALLOCATIONS: dict[str, AllocationFunction] = {
    "uniform": uniform,
    "front-loaded": front_loaded,
    "back-loaded": back_loaded,
}
"""The allocations by the name that a sweep file uses."""


def check_ratio(ratio: object, what: str = "a sparsity ratio") -> float:
    """The ratio, if it is a number in [0, 1).

    Args:
        ratio: the fraction of channels to remove.
        what: its name in the message.

    Raises:
        RatioError: it is not.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
        raise RatioError(
            f"{what} must be a number in [0, 1), the fraction of channels to remove; got {ratio!r}"
        )
    return float(ratio)


def check_ratios(ratios: Sequence[object] | float, n_layers: int) -> tuple[float, ...]:
    """The ratios, if there is one in [0, 1) for each layer.

    Raises:
        RatioError: one is not, or their number is wrong.
    """
    if isinstance(ratios, int | float):
        raise RatioError(
            f"there are {n_layers} prunable layers and {ratios!r} for all of them; give one ratio "
            f'a layer, such as allocate("uniform", {n_layers}, {ratios!r})'
        )
    if isinstance(ratios, str) or len(ratios) != n_layers:
        raise RatioError(
            f"there are {n_layers} prunable layers and {len(ratios)} ratios: {list(ratios)}; "
            "give one ratio a layer"
        )
    return tuple(check_ratio(r, f"ratio {i} of {n_layers}") for i, r in enumerate(ratios))


def allocate(
    allocation: str | Sequence[float], n_layers: int, ratio: float | None = None
) -> tuple[float, ...]:
    """One sparsity ratio for each prunable layer.

    Args:
        allocation: a name in `ALLOCATIONS`, or the ratios themselves.
        n_layers: prunable layers.
        ratio: p, for an allocation given by name. A list of ratios brings its own and takes none.

    Returns:
        Ratios in [0, 1), in the order of the layers.

    Raises:
        RatioError: a ratio out of range, missing, not wanted, or a list of the wrong length.
        PruningError: no allocation has that name.

    >>> allocate("front-loaded", 3, 0.5)
    (0.75, 0.5, 0.25)
    """
    if not isinstance(allocation, str):
        if ratio is not None:
            raise RatioError(
                f"the ratios {list(allocation)} are given layer by layer, so the overall ratio "
                f"{ratio!r} has no meaning; leave one of them out"
            )
        return check_ratios(allocation, n_layers)
    function = lookup(ALLOCATIONS, allocation, "allocation")
    if ratio is None:
        raise RatioError(f"allocation {allocation!r} needs a sparsity ratio in [0, 1)")
    return check_ratios(function(check_ratio(ratio), n_layers), n_layers)
