"""What a sweep would run: trainings, calibrations, trials, each by its content address.

Making a plan runs nothing. A key follows from all that decides a result and from nothing else, so
two sweeps that want the same training share it, and what the store holds is never run again.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nerf.scenes import scene_fingerprint, training_view_count
from nerf.training import Recipe
from orchestrator.errors import Mistake, SpecError
from orchestrator.keys import content_key
from orchestrator.spec import PruneGrid, Sweep
from orchestrator.spec.sweep import NetworkScope, Schedule
from orchestrator.store import Store
from pruning import ALLOCATIONS, CRITERIA

# Part of every key: raised when a change of the code changes results.
RESULTS_VERSION = 1


@dataclass(frozen=True)
class Training:
    """One NeRF to train, and its dense model to evaluate.

    Attributes:
        key: content address of the trained model.
        result: content address of its evaluation, which depends on the protocol too.
        recipe: how.
        seed: of weights, ray order and jitter.
        trained: whether the store holds the model.
        evaluated: whether the store holds its evaluation.
    """

    key: str
    result: str
    recipe: Recipe
    seed: int
    trained: bool
    evaluated: bool

    @property
    def cached(self) -> bool:
        """Whether there is nothing left to do."""
        return self.trained and self.evaluated

    @property
    def config(self) -> dict[str, Any]:
        """Flat configuration for records and MLflow."""
        return {**asdict(self.recipe), "seed": self.seed}


@dataclass(frozen=True)
class CalibrationSet:
    """A calibration set: so many rays of so many training views, drawn by a seed.

    Sets of one seed are nested: a smaller one is the beginning of a larger one.
    """

    views: int
    rays: int
    seed: int


@dataclass(frozen=True)
class Calibration:
    """One pass over calibration rays: statistics for every set size of one model and seed.

    Attributes:
        training: key of the model.
        seed: of the sets.
        sets: the set sizes wanted, with the key of each one's statistics.
        cached: whether the store holds all of them.
    """

    training: str
    seed: int
    sets: Mapping[CalibrationSet, str]
    cached: bool

    @property
    def key(self) -> str:
        """Names this pass among the others of a plan."""
        return f"{self.training}-{self.seed}"


@dataclass(frozen=True)
class TrialConfig:
    """One pruning.

    Attributes:
        networks: which networks are pruned.
        criterion: scoring rule.
        ratio: requested fraction of channels removed, the mean over layers.
        schedule: name of the allocation, or "explicit".
        layer_ratios: requested fraction of each hidden layer.
        calibration: the calibration set; None where the criterion looks at no data.
        seed: of the criterion; None where it draws nothing.
    """

    networks: NetworkScope
    criterion: str
    ratio: float
    schedule: str
    layer_ratios: tuple[float, ...]
    calibration: CalibrationSet | None
    seed: int | None

    def flat(self) -> dict[str, Any]:
        """Flat configuration for records and MLflow; what does not apply is left out."""
        flat: dict[str, Any] = {
            "networks": self.networks,
            "criterion": self.criterion,
            "ratio": self.ratio,
            "schedule": self.schedule,
        }
        if self.calibration is not None:
            flat["calibration_views"] = self.calibration.views
            flat["calibration_rays"] = self.calibration.rays
            flat["seed"] = self.calibration.seed
        elif self.seed is not None:
            flat["seed"] = self.seed
        flat |= {f"layer_{i}_ratio": ratio for i, ratio in enumerate(self.layer_ratios)}
        return flat


@dataclass(frozen=True)
class Trial:
    """One trial: a pruning of one trained model, evaluated.

    Attributes:
        key: content address.
        training: key of the model.
        statistics: key of the statistics it needs, or None.
        config: what is pruned, and how.
        cached: whether the store holds its result.
    """

    key: str
    training: str
    statistics: str | None
    config: TrialConfig
    cached: bool


@dataclass(frozen=True)
class Plan:
    """Everything a sweep would run.

    Attributes:
        sweep: the sweep.
        scene: fingerprint of the scene.
        trainings: every NeRF.
        calibrations: every pass over calibration rays.
        trials: every pruning, without duplicates.
        combinations: how many combinations the grids name (duplicates included).
    """

    sweep: Sweep
    scene: str
    trainings: tuple[Training, ...]
    calibrations: tuple[Calibration, ...]
    trials: tuple[Trial, ...]
    combinations: int

    def summary(self) -> dict[str, Any]:
        """Counts and resources, ready for JSON."""

        def count(nodes: tuple[Any, ...]) -> dict[str, int]:
            return {"total": len(nodes), "cached": sum(node.cached for node in nodes)}

        return {
            "sweep": self.sweep.name,
            "sweep_hash": self.sweep.hash,
            "scene": self.scene,
            "trainings": count(self.trainings),
            "calibrations": count(self.calibrations),
            "trials": {**count(self.trials), "combinations": self.combinations},
            "resources": asdict(self.sweep.resources),
            "storage": str(self.sweep.storage),
        }


def make_plan(sweep: Sweep, store: Store) -> Plan:
    """Work out what a sweep would run and what of it the store already holds.

    Raises:
        SceneError: the scene is missing or inconsistent.
        SpecError: the sweep asks for more calibration views than the scene has.
    """
    fingerprint = scene_fingerprint(sweep.scene)
    view_count = training_view_count(sweep.scene)
    _check_views(sweep, view_count)
    have = {kind: store.keys(kind) for kind in ("checkpoint", "training", "statistics", "trial")}
    trainings, calibrations, trials = [], [], []
    combinations = 0
    configs: dict[TrialConfig, None] = {}  # an ordered set
    for grid in sweep.grids:
        for config in _configs(grid, len(sweep.shape.trunk), view_count):
            combinations += 1
            configs[config] = None
    for recipe, seed in itertools.product(sweep.recipes, sweep.train_seeds):
        key = _training_key(sweep, fingerprint, recipe, seed)
        result = _result_key(sweep, key)
        trainings.append(
            Training(
                key, result, recipe, seed, key in have["checkpoint"], result in have["training"]
            )
        )
        sets: dict[int, dict[CalibrationSet, str]] = {}
        for config in configs:
            statistics = None
            if config.calibration is not None:
                of_seed = sets.setdefault(config.calibration.seed, {})
                statistics = of_seed.get(config.calibration)
                if statistics is None:
                    statistics = _statistics_key(key, config.calibration)
                    of_seed[config.calibration] = statistics
            trial_key = _trial_key(sweep, key, config)
            trials.append(
                Trial(trial_key, key, statistics, config, cached=trial_key in have["trial"])
            )
        calibrations += [
            Calibration(key, seed, keys, all(k in have["statistics"] for k in keys.values()))
            for seed, keys in sets.items()
        ]
    return Plan(
        sweep,
        fingerprint,
        tuple(trainings),
        tuple(calibrations),
        tuple(trials),
        combinations * len(trainings),
    )


def _check_views(sweep: Sweep, view_count: int) -> None:
    mistakes = [
        Mistake(
            f"prune[{number}].calibration.views"
            if len(sweep.grids) > 1
            else "prune.calibration.views",
            views,
            f"the scene has {view_count} training views; allowed are 1 to {view_count}, or `all`",
        )
        for number, grid in enumerate(sweep.grids)
        for views in grid.calibration.views
        if views is not None and views > view_count
    ]
    if mistakes:
        raise SpecError(str(sweep.source), mistakes)


def _configs(grid: PruneGrid, depth: int, view_count: int) -> Iterator[TrialConfig]:
    """Every combination of a grid; axes that do not matter to a criterion are dropped from it."""
    spread: dict[tuple[Schedule, float], tuple[str, float, tuple[float, ...]]] = {}
    for schedule, ratio in itertools.product(grid.schedules, grid.ratios):
        if isinstance(schedule, tuple):
            mean = math.fsum(schedule) / depth
            spread[schedule, ratio] = ("explicit", mean, schedule)
        else:
            spread[schedule, ratio] = (schedule, ratio, ALLOCATIONS[schedule](ratio, depth))
    axes = grid.calibration
    for networks, criterion, (name, ratio, layer_ratios), views, rays, seed in itertools.product(
        grid.networks, grid.criteria, spread.values(), axes.views, axes.rays, axes.seeds
    ):
        rule = CRITERIA[criterion]
        yield TrialConfig(
            networks=networks,
            criterion=criterion,
            ratio=ratio,
            schedule=name,
            layer_ratios=layer_ratios,
            calibration=CalibrationSet(view_count if views is None else views, rays, seed)
            if rule.needs_statistics
            else None,
            seed=seed if rule.needs_seed else None,
        )


def _training_key(sweep: Sweep, fingerprint: str, recipe: Recipe, seed: int) -> str:
    return content_key(
        {
            "kind": "training",
            "version": RESULTS_VERSION,
            "scene": fingerprint,
            "shape": asdict(sweep.shape),
            "samples": asdict(sweep.samples),
            "recipe": asdict(recipe),
            "seed": seed,
        }
    )


def _result_key(sweep: Sweep, training: str) -> str:
    return content_key(
        {
            "kind": "dense",
            "version": RESULTS_VERSION,
            "training": training,
            "protocol": asdict(sweep.protocol),
        }
    )


def _statistics_key(training: str, wanted: CalibrationSet) -> str:
    return content_key(
        {
            "kind": "statistics",
            "version": RESULTS_VERSION,
            "training": training,
            "set": asdict(wanted),
        }
    )


def _trial_key(sweep: Sweep, training: str, config: TrialConfig) -> str:
    return content_key(
        {
            "kind": "trial",
            "version": RESULTS_VERSION,
            "training": training,
            "networks": config.networks,
            "criterion": config.criterion,
            "layer_ratios": config.layer_ratios,
            "schedule": config.schedule,
            "calibration": None if config.calibration is None else vars(config.calibration),
            "seed": config.seed,
            "protocol": vars(sweep.protocol),
        }
    )
