"""The Pareto front of a sweep and the hypervolume behind it.

Letters: a point p = (s, q) is a size s in bytes, to be small, and a quality q: PSNR in dB, to be
large, or MSE, to be small. p dominates p′ when it is no worse in both and better in one. The
**front** is what nothing dominates; the **hypervolume** is the area that the front dominates
within the box that the reference point (s_ref, q_ref) closes, in bytes·dB (bytes·MSE).

Both take O(n log n): one sort by size and one pass that keeps the best quality so far.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from orchestrator.results import Record

Quality = Literal["psnr", "mse"]
Rays = Literal["held-out", "validation"]
REFERENCE_PSNR = 10.0
"""PSNR of the default reference point, in dB: below it a render no longer shows its scene."""


@dataclass(frozen=True)
class Point:
    """A model on the size-quality plane.

    Attributes:
        key: key of the record it stands for.
        size_bytes: bytes of the model's file.
        psnr: mean PSNR over the held-out views, or over the validation rays, in dB.
        mse: mean MSE over the same, linear [0, 1] RGB.
    """

    key: str
    size_bytes: float
    psnr: float
    mse: float


@dataclass(frozen=True)
class Reference:
    """The corner from which hypervolume is measured; recorded beside every hypervolume.

    Attributes:
        size_bytes: a model at least this large dominates nothing.
        psnr: a model at most this good dominates nothing, in dB.
    """

    size_bytes: float
    psnr: float = REFERENCE_PSNR

    @property
    def mse(self) -> float:
        """The same quality as an MSE: 10^(−psnr/10)."""
        return 10.0 ** (-self.psnr / 10.0)


def default_reference(dense: Iterable[Record]) -> Reference | None:
    """The size of the largest dense model and 10 dB; None when no dense model has a size."""
    sizes = [r.metrics["size_bytes"] for r in dense if "size_bytes" in r.metrics]
    return Reference(max(sizes)) if sizes else None


def points(records: Iterable[Record], rays: Rays = "held-out") -> tuple[Point, ...]:
    """The points of records that succeeded and hold size, PSNR and MSE; others have no place.

    Args:
        records: trials, trainings.
        rays: what quality was measured on.
    """
    prefix = "validation_" if rays == "validation" else ""
    names = ("size_bytes", f"{prefix}psnr", f"{prefix}mse")
    found = []
    for record in records:
        values = [record.metrics.get(name, math.nan) for name in names]
        if record.failure is None and not any(math.isnan(value) for value in values):
            found.append(Point(record.key, *map(float, values)))
    return tuple(found)


def dominates(a: Point, b: Point, quality: Quality = "psnr") -> bool:
    """Whether a is no worse than b in size and quality, and better in one of them."""
    a_cost, b_cost = _cost(a, quality), _cost(b, quality)
    return a_cost != b_cost and a_cost[0] <= b_cost[0] and a_cost[1] <= b_cost[1]


def front(points: Iterable[Point], quality: Quality = "psnr") -> tuple[Point, ...]:
    """The points that no other point dominates, smallest first.

    A repeated point counts once; different models at the very same place are all kept, since none
    dominates another. The result does not depend on the order of the input.

    Example:
        >>> small, large = Point("a", 10, 20.0, 0.01), Point("b", 20, 25.0, 0.003)
        >>> [p.key for p in front([large, small, Point("c", 20, 19.0, 0.012)])]
        ['a', 'b']
    """
    ordered = sorted(set(points), key=lambda p: (*_cost(p, quality), p.key))
    kept: list[Point] = []
    best = math.inf
    for point in ordered:
        cost = _cost(point, quality)
        if cost[1] < best:
            best = cost[1]
            kept.append(point)
        elif kept and cost == _cost(kept[-1], quality):
            kept.append(point)
    return tuple(kept)


def knee(front: tuple[Point, ...], up_to: float | None = None) -> Point:
    """The point of a front of size and PSNR where more bytes stop paying.

    The one highest above the chord from the front's smallest point to its end, sizes counted by
    their logarithm (from 100 kB to 200 kB is as far as from 1 MB to 2 MB), both axes scaled to
    [0, 1].

    Args:
        front: smallest first, at least one point.
        up_to: the size of the largest model there is, in bytes: the front goes on level up to it,
            so that its largest point may be the knee. None ends it at that point.

    Source: Satopää et al. 2011, "Finding a Kneedle in a Haystack".
    """
    sizes = [math.log(point.size_bytes) for point in front]
    end = sizes[-1] if up_to is None else max(sizes[-1], math.log(up_to))
    width, height = end - sizes[0], front[-1].psnr - front[0].psnr
    if width <= 0 or height <= 0:
        return front[0]
    above = [
        (point.psnr - front[0].psnr) / height - (size - sizes[0]) / width
        for point, size in zip(front, sizes, strict=True)
    ]
    return front[above.index(max(above))]


def hypervolume(points: Sequence[Point], reference: Reference, quality: Quality = "psnr") -> float:
    """The exact area that the points dominate within the reference point.

    The front is a staircase; each of its points adds the rectangle between its size and the next
    point's, down to the reference quality. Points outside the box add nothing. Zero without points.

    Returns:
        bytes·dB for ``psnr``, bytes·MSE for ``mse``.
    """
    worst = -reference.psnr if quality == "psnr" else reference.mse
    inside = [
        cost
        for cost in (_cost(point, quality) for point in front(points, quality))
        if cost[0] < reference.size_bytes and cost[1] < worst
    ]
    area = []
    for index, (size, cost) in enumerate(inside):
        end = inside[index + 1][0] if index + 1 < len(inside) else reference.size_bytes
        if end > size:  # else 0 · ∞ for a perfect render
            area.append((end - size) * (worst - cost))
    return math.fsum(area)


def _cost(point: Point, quality: Quality) -> tuple[float, float]:
    """Both objectives as something to minimise."""
    return point.size_bytes, -point.psnr if quality == "psnr" else point.mse
