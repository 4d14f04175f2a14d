"""What a sweep's parameters did: groupings for filters, their share of the variance, the history.

**Importance** of a parameter for a number q is the share of q's variance over the trials that its
value alone explains: the correlation ratio, corrected for the number k of values among n trials,

    ε² = 1 − (SS_within / (n − k)) / (SS_total / (n − 1)),  at least 0.

Numeric parameters of many values are cut into quantiles first. Parameters that vary together in a
sweep share their credit: it describes the sweep, and proves no cause.

Source: Kelley 1935, "An unbiased correlation ratio measure", for ε².
"""

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from orchestrator import pareto
from orchestrator.keys import content_key
from orchestrator.pareto import Rays
from orchestrator.report.data import ReportData, number
from orchestrator.results import Record
from orchestrator.units import show_bytes

MAX_GROUPS = 8
NONE = "none"


@dataclass(frozen=True)
class Facet:
    """A parameter as people look at it: what it is called and what a trial's value is.

    Attributes:
        key: short name.
        label: what a person reads.
        value: of a trial, as text.
    """

    key: str
    label: str
    value: Callable[[Record], str]


def _text(name: str, default: str) -> Callable[[Record], str]:
    return lambda record: str(record.config.get(name, default) or default)


def calibration_of(record: Record) -> str:
    """The calibration set without its seed: ``17 × 1024 rays, render``."""
    views, rays = record.config.get("calibration_views"), record.config.get("calibration_rays")
    if views is None:
        return NONE
    weighting = record.config.get("calibration_weighting", "uniform")
    return f"{views} × {rays} rays" + ("" if weighting == "uniform" else f", {weighting}")


def recovery_of(record: Record) -> str:
    """How a trial was trained after pruning: ``2000 steps, photos``."""
    steps = record.config.get("recover_iterations")
    return f"{steps} steps, {record.config.get('recover_from', '?')}" if steps else NONE


def allocation_of(record: Record) -> str:
    """How a ratio or a size was spread over the layers."""
    return str(record.config.get("allocation") or record.config.get("schedule") or "?")


FACETS = (
    Facet("criterion", "criterion", _text("criterion", "?")),
    Facet("compensation", "compensation", _text("compensation", NONE)),
    Facet("networks", "networks", _text("networks", "?")),
    Facet("allocation", "allocation", allocation_of),
    Facet("calibration", "calibration", calibration_of),
    Facet("bits", "bits", _text("bits", "fp32")),
    Facet("recovery", "recovery", recovery_of),
    Facet("training", "training", lambda record: record.training[:8]),
)


def amount_of(record: Record) -> str:
    """How much was to go: a ratio or a size."""
    size, ratio = record.config.get("size"), record.config.get("ratio")
    if isinstance(size, int):
        return show_bytes(size)
    return f"{100 * ratio:.4g} %" if isinstance(ratio, int | float) else NONE


AMOUNT = Facet("amount", "ratio or size", amount_of)
LAYER_RATIO = "_ratio"
"""How the keys of a search's ratios end, one a layer: ``fine_layer_3_ratio``."""


def layer_ratios(trials: Sequence[Record]) -> tuple[str, ...]:
    """The ratios by layer that vary among the trials of searches, in the order of the layers."""
    found: dict[str, set[float]] = {}
    for trial in searched(trials):
        for name, value in trial.config.items():
            if name.endswith(LAYER_RATIO) and isinstance(value, int | float):
                found.setdefault(name, set()).add(float(value))
    return tuple(name for name, values in found.items() if len(values) > 1)


def searched(trials: Iterable[Record]) -> tuple[Record, ...]:
    """The trials whose ratios a search chose."""
    return tuple(t for t in trials if t.config.get("schedule") == "searched")


def layer_name(key: str) -> str:
    """``fine_layer_3_ratio`` as people read it: ``fine layer 3``."""
    return key.removesuffix(LAYER_RATIO).replace("_", " ")


def quantiles(values: Sequence[float], groups: int = MAX_GROUPS) -> list[str]:
    """Names the quantile of each value; equal values share one."""
    ordered = sorted(values)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    return [str(first[v] * groups // len(ordered)) for v in values]


def varying(trials: Sequence[Record], facets: Sequence[Facet] = FACETS) -> tuple[Facet, ...]:
    """The facets that have more than one value among the trials."""
    return tuple(f for f in facets if len({f.value(t) for t in trials}) > 1)


def seedless_group(record: Record) -> str:
    """Names a trial's configuration without its calibration seed: the same over seeds."""
    config = {name: v for name, v in record.config.items() if name != "seed"}
    return content_key({"training": record.training, "config": config})


def importance(
    trials: Sequence[Record], value: Callable[[Record], float | None]
) -> list[tuple[str, float]]:
    """Parameters by the share of a number's variance that each alone explains, largest first."""
    measured = [(t, v) for t in trials if (v := value(t)) is not None and math.isfinite(v)]
    records = [trial for trial, _ in measured]
    numbers = [v for _, v in measured]
    shares = []
    for facet in (*varying(records), *varying(records, [AMOUNT])):
        groups = [facet.value(t) for t in records]
        if len(set(groups)) <= len(groups) / 2:  # a name a trial explains everything and nothing
            shares.append((facet.label, explained(groups, numbers)))
    seeds = [str(t.config.get("seed")) for t in records]
    if len(set(seeds)) > 1:
        shares.append(("seed", explained(seeds, numbers)))
    tried = set(map(id, searched(records)))
    for name in layer_ratios(records):
        chosen = [
            (float(t.config[name]), v) for t, v in measured if id(t) in tried and name in t.config
        ]
        groups = quantiles([r for r, _ in chosen], max(2, min(MAX_GROUPS, len(chosen) // 3)))
        shares.append((layer_name(name), explained(groups, [v for _, v in chosen])))
    return sorted(shares, key=lambda item: -item[1])


def explained(groups: Sequence[str], values: Sequence[float]) -> float:
    """ε² of values by group, in [0, 1]; 0 where nothing can be said."""
    n, k = len(values), len(set(groups))
    if not 1 < k < n:
        return 0.0
    mean = math.fsum(values) / n
    total = math.fsum((v - mean) ** 2 for v in values)
    if total <= 0:
        return 0.0
    by_group: dict[str, list[float]] = {}
    for group, v in zip(groups, values, strict=True):
        by_group.setdefault(group, []).append(v)
    within = 0.0
    for members in by_group.values():
        middle = math.fsum(members) / len(members)
        within += math.fsum((v - middle) ** 2 for v in members)
    return max(0.0, 1.0 - (within / (n - k)) / (total / (n - 1)))


def below_front(data: ReportData, quality: str = "psnr") -> Callable[[Record], float | None]:
    """How many dB a trial lies below the front at its size: what a better choice would bring.

    Args:
        data: the sweep.
        quality: the metric, in dB, that makes the front.
    """
    measured = sorted(
        (size, psnr)
        for trial in data.done
        if (size := number(trial, "size_bytes")) is not None
        and (psnr := number(trial, quality)) is not None
    )
    sizes = [size for size, _ in measured]
    best = list(accumulate((psnr for _, psnr in measured), max))  # of any size up to each

    def gap(record: Record) -> float | None:
        size, psnr = number(record, "size_bytes"), number(record, quality)
        if size is None or psnr is None:
            return None
        return best[bisect.bisect_right(sizes, size) - 1] - psnr

    return gap


def history(data: ReportData, rays: Rays = "held-out") -> list[float]:
    """The hypervolume after each trial measured on these rays, in the order in which they ended."""
    if data.corner is None:
        return []
    tried = data.measured if rays == "validation" else data.done
    known = {point.key for point in pareto.points(tried, rays)}
    ended = sorted((trial for trial in tried if trial.key in known), key=_ended)
    found: list[float] = []
    front: tuple[pareto.Point, ...] = ()
    for record in ended:
        front = pareto.front([*front, *pareto.points([record], rays)])
        found.append(pareto.hypervolume(front, data.corner))
    return found


def _ended(record: Record) -> tuple[str, float]:
    seconds: Mapping[str, Any] = record.provenance.seconds
    return record.provenance.started, math.fsum(s for s in seconds.values() if math.isfinite(s))
