"""Two sweeps, or two trials, side by side: what changed, which is ahead, by how much.

A front is read as a staircase: at a size s its quality is the best PSNR of any model of at most s
bytes. Between two sweeps, "dB at equal size" is the difference of the staircases over the sizes
that both cover, averaged over log s; the hypervolumes of both are taken from one reference point
(the larger dense model, the lower reference PSNR), so that they can be compared.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from orchestrator import pareto
from orchestrator.pareto import Point, Reference
from orchestrator.report.data import ReportData
from orchestrator.report.tables import align
from orchestrator.results import Record
from orchestrator.units import show_bytes

METRICS = (
    ("size_bytes", "bytes", 0),
    ("psnr", "dB", 3),
    ("mse", "", 6),
    ("ssim", "", 4),
    ("validation_psnr", "dB", 3),
    ("render_seconds", "s", 3),
    ("flops_per_ray", "FLOPs a ray", 0),
    ("params", "parameters", 0),
    ("achieved_ratio", "", 4),
)
SHOWN_SIZES = 9

Change = tuple[Any, Any]


@dataclass(frozen=True)
class SweepComparison:
    """Two sweeps compared.

    Attributes:
        names: what the two are called.
        changes: settings that differ, by their place in the file: the first's and the second's.
        trials: trials with a result, of each.
        reference: the common reference point; None without a dense model.
        hypervolumes: of each from it.
        equal_size: size in bytes, best PSNR of each within it, over the sizes both cover.
        mean_difference: second less first in dB, averaged over the logarithm of those sizes; None
            where the two cover no size together.
    """

    names: tuple[str, str]
    changes: Mapping[str, Change]
    trials: tuple[int, int]
    reference: Reference | None
    hypervolumes: tuple[float, float] | None
    equal_size: tuple[tuple[float, float, float], ...]
    mean_difference: float | None

    @property
    def sentence(self) -> str:
        """Which front is ahead, and by how much."""
        first, second = self.names
        if self.mean_difference is None:
            return f"{first} and {second} cover no size together, so neither front is ahead."
        ahead, behind = (second, first) if self.mean_difference > 0 else (first, second)
        small, large = self.equal_size[0][0], self.equal_size[-1][0]
        text = (
            f"{first} and {second} have the same quality at equal size"
            if self.mean_difference == 0
            else f"{ahead} is ahead of {behind} by {abs(self.mean_difference):.3f} dB on average "
            "at equal size"
        )
        text += f" ({show_bytes(int(small))} to {show_bytes(int(large))})"
        if self.hypervolumes and min(self.hypervolumes) > 0:
            share = self.hypervolumes[1] / self.hypervolumes[0] - 1
            text += (
                f"; the hypervolume of {second} is {100 * abs(share):.2f} % "
                f"{'larger' if share > 0 else 'smaller'} than that of {first}"
                if share
                else "; their hypervolumes are the same"
            )
        differences = [b - a for _, a, b in self.equal_size]
        if min(differences) < 0 < max(differences):
            text += "; the fronts cross"
        return text + "."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        corner = self.reference
        return {
            "sweeps": list(self.names),
            "sentence": self.sentence,
            "changes": {place: list(pair) for place, pair in self.changes.items()},
            "trials": list(self.trials),
            "hypervolume": None
            if corner is None or self.hypervolumes is None
            else {
                "values": list(self.hypervolumes),
                "unit": "bytes·dB",
                "reference": {"size_bytes": corner.size_bytes, "psnr": corner.psnr},
            },
            "equal_size": [
                {"size_bytes": size, "psnr": [a, b], "difference": b - a}
                for size, a, b in self.equal_size
            ],
            "mean_difference": self.mean_difference,
        }

    def table(self) -> str:
        """For a terminal."""
        first, second = self.names
        lines = [self.sentence, ""]
        lines += _changes(self.changes, self.names)
        head = ["size", first, second, "difference"]
        rows = [
            [show_bytes(int(size)), f"{a:.2f} dB", f"{b:.2f} dB", f"{b - a:+.2f} dB"]
            for size, a, b in _thinned(self.equal_size)
        ]
        if rows:
            lines += ["", "best PSNR within a size:", *align([head, *rows], right={0, 1, 2, 3})]
        if self.hypervolumes and self.reference:
            lines.append("")
            lines.append(
                f"hypervolume {self.hypervolumes[0]:.4g} and {self.hypervolumes[1]:.4g} bytes·dB "
                f"(reference {self.reference.size_bytes:,.0f} bytes, {self.reference.psnr:g} dB); "
                f"{self.trials[0]} and {self.trials[1]} trials"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class TrialComparison:
    """Two trials (or dense models) compared.

    Attributes:
        names: their ids.
        changes: settings that differ.
        metrics: name, unit, digits, the two values.
        widths: channels of each hidden layer, by network, of each.
        dominates: id of the one that is no worse in size and PSNR and better in one, if any.
    """

    names: tuple[str, str]
    changes: Mapping[str, Change]
    metrics: tuple[tuple[str, str, int, float, float], ...]
    widths: tuple[Mapping[str, Sequence[int]], Mapping[str, Sequence[int]]]
    dominates: str | None

    @property
    def sentence(self) -> str:
        """Which is better, and by how much."""
        values = {name: (a, b) for name, _, _, a, b in self.metrics}
        first, second = self.names
        quality = "psnr" if "psnr" in values else "validation_psnr"
        if quality not in values or "size_bytes" not in values:
            return f"{first} and {second} lack a size or a PSNR to compare."
        gain = values[quality][1] - values[quality][0]
        where = "" if quality == "psnr" else " on the validation rays (one has no held-out views)"
        sizes = values["size_bytes"]
        grown = sizes[1] - sizes[0]
        better = f"{abs(gain):.3f} dB {_more(gain)}" if gain else "the same PSNR"
        share = f"{100 * abs(grown) / sizes[0]:.1f} %" if sizes[0] else ""
        smaller = f"{abs(grown):,.0f} bytes ({share}) {_more(grown)}" if grown else "the same size"
        text = f"Against {first}, {second} has {better}{where} and {smaller}"
        if not self.dominates:
            same = "they are level" if not gain and not grown else "neither is better in both"
            return f"{text}: {same}."
        both = "in both" if gain and grown else "in one and level in the other"
        return f"{text}: {self.dominates} is better {both}."

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "trials": list(self.names),
            "sentence": self.sentence,
            "changes": {name: list(pair) for name, pair in self.changes.items()},
            "metrics": {
                name: {"values": [a, b], "difference": b - a} for name, _, _, a, b in self.metrics
            },
            "widths": [{k: list(v) for k, v in widths.items()} for widths in self.widths],
            "dominates": self.dominates,
        }

    def table(self) -> str:
        """For a terminal."""
        lines = [self.sentence, "", *_changes(self.changes, self.names), ""]
        head = ["", *self.names, "difference", ""]
        rows = [
            [name, f"{a:,.{digits}f}", f"{b:,.{digits}f}", f"{b - a:+,.{digits}f}", unit]
            for name, unit, digits, a, b in self.metrics
        ]
        lines += align([head, *rows], right={1, 2, 3})
        for network in dict.fromkeys([*self.widths[0], *self.widths[1]]):
            both = [widths.get(network) for widths in self.widths]
            lines.append(f"channels of {network}: {_channels(both[0])} and {_channels(both[1])}")
        return "\n".join(lines)


def compare_sweeps(
    first: ReportData,
    second: ReportData,
    settings: tuple[Mapping[str, Any], Mapping[str, Any]] = ({}, {}),
) -> SweepComparison:
    """Compare two sweeps' fronts.

    Args:
        first: one.
        second: the other.
        settings: the canonical settings of each, for what changed.
    """
    names = _names(first, second)
    fronts = (first.front(), second.front())
    corners = [data.corner for data in (first, second) if data.corner is not None]
    corner = None
    volumes = None
    if corners:
        corner = Reference(max(c.size_bytes for c in corners), min(c.psnr for c in corners))
        volumes = (
            pareto.hypervolume(first.points, corner),
            pareto.hypervolume(second.points, corner),
        )
    shared = equal_size(*fronts)
    return SweepComparison(
        names=names,
        changes=differences(*settings),
        trials=(len(first.done), len(second.done)),
        reference=corner,
        hypervolumes=volumes,
        equal_size=shared,
        mean_difference=mean_difference(shared),
    )


def compare_trials(first: Record, second: Record) -> TrialComparison:
    """Compare two records, trials or dense models.

    How a dense model was trained says nothing about a trial: beside one it has no settings.
    """
    both = [pareto.points([record]) for record in (first, second)]
    if not all(both):
        both = [pareto.points([record], "validation") for record in (first, second)]
    better = None
    if all(both):
        a, b = both[0][0], both[1][0]
        better = a.key if pareto.dominates(a, b) else b.key if pareto.dominates(b, a) else None
    return TrialComparison(
        names=(first.key, second.key),
        changes=differences(
            *(
                {} if r.kind == "training" and first.kind != second.kind else r.config
                for r in (first, second)
            )
        ),
        metrics=tuple(
            (name, unit, digits, first.metrics[name], second.metrics[name])
            for name, unit, digits in METRICS
            if name in first.metrics and name in second.metrics
        ),
        widths=(first.widths, second.widths),
        dominates=better,
    )


def equal_size(
    first: Sequence[Point], second: Sequence[Point]
) -> tuple[tuple[float, float, float], ...]:
    """Size and best PSNR of each front within it, wherever a step of either is.

    Args:
        first: a front, smallest first.
        second: another one.

    Returns:
        Sizes from the larger of the two smallest models on, up to the larger of the two largest.
    """
    if not first or not second:
        return ()
    start = max(first[0].size_bytes, second[0].size_bytes)
    sizes = sorted({p.size_bytes for p in (*first, *second) if p.size_bytes >= start} | {start})
    return tuple((size, _within(first, size), _within(second, size)) for size in sizes)


def mean_difference(shared: Sequence[tuple[float, float, float]]) -> float | None:
    """Second less first in dB, averaged over the logarithm of the size."""
    if not shared:
        return None
    if len(shared) == 1:
        return shared[0][2] - shared[0][1]
    total = sum((b - a) * math.log(after[0] / size) for (size, a, b), after in pairwise(shared))
    return total / math.log(shared[-1][0] / shared[0][0])


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Change]:
    """Leaves that differ between two nested settings, by their place; None for what is absent."""
    flat = [dict(_leaves(settings, "")) for settings in (first, second)]
    places = dict.fromkeys([*flat[0], *flat[1]])
    return {
        place: (flat[0].get(place), flat[1].get(place))
        for place in places
        if flat[0].get(place) != flat[1].get(place)
    }


def _leaves(settings: Any, place: str) -> list[tuple[str, Any]]:
    if isinstance(settings, Mapping):
        return [
            leaf
            for name, value in settings.items()
            for leaf in _leaves(value, f"{place}.{name}" if place else str(name))
        ]
    if isinstance(settings, list) and any(isinstance(v, Mapping) for v in settings):
        return [leaf for i, v in enumerate(settings) for leaf in _leaves(v, f"{place}[{i}]")]
    return [(place, settings)]


def _within(front: Sequence[Point], size: float) -> float:
    return max(point.psnr for point in front if point.size_bytes <= size)


def _names(first: ReportData, second: ReportData) -> tuple[str, str]:
    if first.name != second.name:
        return first.name, second.name
    if first.hash != second.hash:
        return f"{first.name} {first.hash[:8]}", f"{second.name} {second.hash[:8]}"
    return f"{first.name} (first)", f"{second.name} (second)"  # of two storages


def _changes(changes: Mapping[str, Change], names: tuple[str, str]) -> list[str]:
    if not changes:
        return ["no setting differs"]
    rows = [[place, _shown(a), _shown(b)] for place, (a, b) in changes.items()]
    return ["what changed:", *align([["", *names], *rows], right=set())]


def _more(difference: float) -> str:
    return "more" if difference > 0 else "less"


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _thinned(rows: Sequence[Any]) -> list[Any]:
    if len(rows) <= SHOWN_SIZES:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (SHOWN_SIZES - 1))] for i in range(SHOWN_SIZES)]


def _channels(widths: Sequence[int] | None) -> str:
    return "–" if widths is None else " ".join(map(str, widths))
