"""What a report is made of, and the groupings that its plots, tables and pictures share."""

import bisect
import math
import shlex
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from orchestrator import pareto
from orchestrator.keys import content_key
from orchestrator.pareto import Point, Quality, Rays, Reference
from orchestrator.results import Record, method_of
from orchestrator.store import Store

MB = 2**20
"""Bytes of a "MB", as the report counts them."""
RATIO_TOLERANCE = 1e-6


@dataclass(frozen=True, order=True)
class Series:
    """Trials that belong together in a plot: one method on one choice of networks.

    Attributes:
        criterion: and what else makes the method, see `results.method_of`.
        networks: which were pruned.
    """

    criterion: str
    networks: str

    @property
    def label(self) -> str:
        """How the series is called in legends and tables."""
        return f"{self.criterion}, {self.networks}"


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    Attributes:
        name: the sweep's name.
        hash: its content hash.
        dense: records of the trainings, the dense models evaluated.
        trials: records of the trials, failed ones included.
        store: where the renders are.
        reference: the hypervolume's reference point; None for the largest dense model and 10 dB.
        ratios: ratios to show renders of; None for up to six of those that the sweep has.
        description: a sentence for people.
        commit: git commit of the code that writes the report.
        seed: the sweep's seed.
        scene: name of the scene's folder.
        scene_path: the scene's folder, for the commands that render.
        controls: records of what was trained beside the recoveries, failed ones included, and of
            unpruned models that other sweeps measured.
    """

    name: str
    hash: str
    dense: tuple[Record, ...]
    trials: tuple[Record, ...]
    store: Store
    reference: Reference | None = None
    ratios: tuple[float, ...] | None = None
    description: str = ""
    commit: str | None = None
    seed: int | None = None
    scene: str = ""
    scene_path: Path | None = None
    controls: tuple[Record, ...] = ()

    @cached_property
    def baselines(self) -> tuple[Record, ...]:
        """Controls with a result: shown beside the front, never part of it."""
        return tuple(control for control in self.controls if control.failure is None)

    @cached_property
    def measured(self) -> tuple[Record, ...]:
        """Trials with a result, on whichever rays."""
        return tuple(trial for trial in self.trials if trial.failure is None)

    @cached_property
    def done(self) -> tuple[Record, ...]:
        """The same, each model once.

        A search measures a model on validation rays; if it gets onto the final front, it is a
        trial of its own with held-out views, which then stands for both.
        """
        if all("psnr" in trial.metrics for trial in self.measured):
            return self.measured
        judged = {_same(trial) for trial in self.measured if "psnr" in trial.metrics}
        return tuple(t for t in self.measured if "psnr" in t.metrics or _same(t) not in judged)

    @cached_property
    def failed(self) -> tuple[Record, ...]:
        """Records without one, trainings first."""
        records = (*self.dense, *self.trials, *self.controls)
        return tuple(r for r in records if r.failure is not None)

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """The trials on the size-quality plane."""
        return pareto.points(self.done)

    def candidates(self, rays: Rays) -> tuple[Point, ...]:
        """What there is to ship: trials and dense models with held-out scores.

        Args:
            rays: the quality of the points; who was not measured on them is left out.
        """
        records = (*self.done, *(r for r in self.dense if r.failure is None))
        judged = {point.key for point in pareto.points(records)}
        return tuple(p for p in pareto.points(records, rays) if p.key in judged)

    @cached_property
    def chosen_by(self) -> Rays:
        """What a model to ship is chosen by: validation rays, where all were measured on them."""
        every = len(self.candidates("validation")) == len(self.candidates("held-out"))
        return "validation" if every else "held-out"

    def front(self, quality: Quality = "psnr") -> tuple[Point, ...]:
        """The non-dominated trials, smallest first."""
        return pareto.front(self.points, quality)

    @cached_property
    def front_keys(self) -> frozenset[str]:
        """Keys of the front of size and PSNR."""
        return frozenset(point.key for point in self.front())

    @cached_property
    def corner(self) -> Reference | None:
        """The reference point in use; None when there is no dense model to take it from."""
        return self.reference or pareto.default_reference(self.dense)

    @cached_property
    def hypervolume(self) -> float | None:
        """Of the front of size and PSNR, in bytes·dB."""
        return None if self.corner is None else pareto.hypervolume(self.points, self.corner)

    @cached_property
    def by_key(self) -> dict[str, Record]:
        """All records by key."""
        return {r.key: r for r in (*self.dense, *self.trials, *self.controls)}

    @cached_property
    def series(self) -> tuple[Series, ...]:
        """All series, in a fixed order: the report's own criterion and protocol first."""
        first = {"activation": 0, "magnitude": 1, "random": 3}
        networks = {"both": 0, "coarse": 1, "fine": 2}
        found = {series_of(trial) for trial in self.trials}
        return tuple(
            sorted(
                found,
                key=lambda s: (first.get(s.criterion, 2), networks.get(s.networks, 3), s),
            )
        )

    @cached_property
    def chosen_ratios(self) -> tuple[float, ...]:
        """Ratios whose renders are shown: those asked for, else up to six spread over all."""
        if self.ratios is not None:
            return tuple(sorted(set(self.ratios)))
        planned = (t for t in self.trials if t.config.get("schedule") != "searched")
        every = sorted({r for t in planned if (r := ratio_of(t)) is not None})
        if len(every) <= 6:
            return tuple(every)
        return tuple(every[round(i * (len(every) - 1) / 5)] for i in range(6))

    def at(self, series: Series, ratio: float, uniform: bool = True) -> tuple[Record, ...]:
        """Trials of a series at one requested ratio, over seeds, calibrations and trainings."""
        ordered = self._by_series.get(series, [])
        first = bisect.bisect_left(ordered, ratio - RATIO_TOLERANCE, key=_first)
        last = bisect.bisect_right(ordered, ratio + RATIO_TOLERANCE, key=_first)
        found = sorted(ordered[first:last], key=lambda entry: entry[1])
        return tuple(trial for _, _, trial in found if not uniform or is_uniform(trial))

    @cached_property
    def _by_series(self) -> dict[Series, list[tuple[float, int, Record]]]:
        """The trials of each series that have a ratio, by ratio, with their place among all."""
        found: dict[Series, list[tuple[float, int, Record]]] = {}
        for place, trial in enumerate(self.trials):
            if (ratio := ratio_of(trial)) is not None:
                found.setdefault(series_of(trial), []).append((ratio, place, trial))
        for entries in found.values():
            entries.sort(key=lambda entry: entry[:2])
        return found

    def dense_of(self, trial: Record) -> Record | None:
        """The dense model that a trial pruned, if it was evaluated."""
        return self._dense_by_training.get(trial.training)

    @cached_property
    def _dense_by_training(self) -> dict[str, Record]:
        return {record.training: record for record in self.dense if record.failure is None}


def render_command(model: Path, scene: Path | None, view: int) -> str:
    """What renders a held-out view of a model file, for a shell; SCENE where it is unknown."""
    words = ("prunefield", "render", str(model), "--scene", str(scene or "SCENE"))
    return shlex.join((*words, "--view", str(view), "-o", f"view_{view}.png"))


def _same(trial: Record) -> str:
    """What two trials of one configuration have in common."""
    return content_key({"training": trial.training, "config": dict(trial.config)})


def _first(entry: tuple[float, int, Record]) -> float:
    return entry[0]


def series_of(trial: Record) -> Series:
    """The series of a trial; "?" for what its configuration does not say."""
    return Series(method_of(trial.config) or "?", str(trial.config.get("networks", "?")))


def is_uniform(trial: Record) -> bool:
    """Whether every layer is pruned by the same ratio."""
    return "size" not in trial.config and trial.config.get("schedule", "uniform") == "uniform"


def ratio_of(trial: Record) -> float | None:
    """The requested ratio, if the configuration has one."""
    ratio = trial.config.get("ratio")
    return float(ratio) if isinstance(ratio, int | float) else None


def number(record: Record, name: str) -> float | None:
    """A metric that exists and is finite."""
    value = record.metrics.get(name)
    return float(value) if value is not None and math.isfinite(value) else None


def mean(records: Iterable[Record], name: str) -> float | None:
    """Mean of a metric over the records that have it; None if none has."""
    values = [v for r in records if r.failure is None and (v := number(r, name)) is not None]
    return statistics.fmean(values) if values else None


def representative(trials: Iterable[Record]) -> Record | None:
    """One trial to stand for several: with a result, the largest calibration, the lowest seed."""

    def rank(trial: Record) -> tuple[Any, ...]:
        views = trial.config.get("calibration_views") or 0
        rays = trial.config.get("calibration_rays") or 0
        seed = trial.config.get("seed")
        return (
            trial.failure is not None,
            trial.training,
            -views * rays,
            seed if isinstance(seed, int) else 0,
            trial.key,
        )

    return min(trials, key=rank, default=None)


def smallest_within(data: ReportData, loss: float) -> Record | None:
    """The smallest trial at most ``loss`` dB below the dense model that it pruned."""
    fits = []
    for trial in data.done:
        dense = data.dense_of(trial)
        psnr, size = number(trial, "psnr"), number(trial, "size_bytes")
        top = None if dense is None else number(dense, "psnr")
        if psnr is not None and size is not None and top is not None and psnr >= top - loss:
            fits.append((size, -psnr, trial.key))
    return data.by_key[min(fits)[2]] if fits else None
