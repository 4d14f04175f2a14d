"""What a sweep would run: trainings, calibrations, trials, each by its content address.

Making a plan runs nothing. A key follows from all that decides a result and from nothing else, so
two sweeps that want the same training share it, and what the store holds is never run again.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, reduce
from operator import or_
from typing import Any, Literal

from nerf.field import FieldShape
from nerf.scenes import scene_fingerprint, training_view_count
from nerf.training import Recipe
from orchestrator.bridge import Prunable
from orchestrator.errors import Mistake, SpecError
from orchestrator.keys import content_key
from orchestrator.modelfile import RATE, looks_at_samples, networks_for
from orchestrator.results import method_of
from orchestrator.spec import PruneGrid, Sweep, check_scene_folder, place_of
from orchestrator.spec.recover import ControlName, Recover
from orchestrator.spec.sweep import (
    LATER_OF_TRAINING,
    Errors,
    NetworkScope,
    Objective,
    Schedule,
    SearchSettings,
    Weighting,
)
from orchestrator.store import Store
from pruning import (
    ALLOCATIONS,
    BUDGETED,
    COMPENSATIONS,
    CRITERIA,
    GRADIENT_MOMENTS,
    SPARSE,
    gradients_for,
    moments_for,
    moments_for_budget,
)

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

    Sets of one seed are nested: a smaller one is the beginning of a larger one. Their samples count
    alike (``uniform``) or by their render weights (``render``); or more rays are drawn where the
    photos have detail (``detail``).
    """

    views: int
    rays: int
    seed: int
    weighting: Weighting = "uniform"

    def identity(self) -> dict[str, Any]:
        """What goes into keys; settings at their default are left out."""
        return _without(vars(self), weighting="uniform")


@dataclass(frozen=True)
class Needs:
    """What a calibration pass must collect.

    Attributes:
        moments: names of `pruning.MOMENTS`.
        prunable: of which layers: the hidden ones, or ``all`` (feature and view branch too).
    """

    moments: tuple[str, ...] = ("mean",)
    prunable: Prunable = "trunk"

    def __or__(self, other: "Needs") -> "Needs":
        prunable: Prunable = "all" if "all" in (self.prunable, other.prunable) else "trunk"
        return Needs(tuple(sorted({*self.moments, *other.moments})), prunable)

    @property
    def group(self) -> str:
        """What costs more than a pass forward has a pass of its own: it stays with those trials."""
        if {*self.moments} & {*GRADIENT_MOMENTS}:
            return "gradients"
        return "sensitivity" if "sensitivity" in self.moments else ""

    def identity(self) -> dict[str, Any]:
        """What goes into keys; settings at their default are left out."""
        return _without(vars(self), moments=("mean",), prunable="trunk")


@dataclass(frozen=True)
class Calibration:
    """One pass over calibration rays: statistics for every set size of one model and seed.

    Attributes:
        training: key of the model.
        seed: of the sets.
        sets: the set sizes wanted, with the key of each one's statistics.
        cached: whether the store holds all of them.
        weighting: of the samples.
        needs: what is collected.
        group: tells apart passes of one seed and weighting, see `Needs.group`.
    """

    training: str
    seed: int
    sets: Mapping[CalibrationSet, str]
    cached: bool
    weighting: Weighting = "uniform"
    needs: Needs = Needs()
    group: str = ""

    @property
    def key(self) -> str:
        """Names this pass among the others of a plan."""
        suffix = "" if self.weighting == "uniform" else f"-{self.weighting}"
        return f"{self.training}-{self.seed}{suffix}{self.group and '-'}{self.group}"


@cache
def _needs_of(
    criterion: str,
    schedule: str,
    compensation: str,
    errors: Errors,
    masks: bool,
    to_size: bool,
    by_layer: bool,
    by_rate: bool,
) -> Needs:
    """What the statistics of a pruning must hold; a sweep asks for few, and many times."""
    if masks:
        return Needs(SPARSE[criterion].moments)
    gradients = {*gradients_for([criterion])}
    if errors == "pixel" or by_rate:
        gradients.add("curvature")
    if to_size:
        moments = moments_for_budget(criterion, schedule, compensation)
    else:
        moments = moments_for([criterion], [compensation])
    if by_rate:
        moments = (*moments, "gram")
    prunable: Prunable = "all" if to_size or by_layer else "trunk"
    return Needs(tuple(sorted({*moments, *gradients})), prunable)


@dataclass(frozen=True)
class TrialConfig:
    """One pruning: by ratios, to a size, or of single weights.

    Attributes:
        networks: which networks are pruned.
        criterion: scoring rule; with a mask, of single weights.
        ratio: requested fraction of channels removed, the mean over layers; None otherwise.
        schedule: name of the allocation, of a ratio or of a size, or "explicit", or "mask".
        layer_ratios: requested fraction of each hidden layer; empty with a size or a mask.
        calibration: the calibration set; None where nothing looks at data.
        seed: of the criterion; None where it draws nothing.
        compensation: what the readers of removed channels do.
        size: the most bytes that the model file may have, or None.
        coarse_weight: how much the errors of the coarse network count, or ``auto``: chosen on
            validation rays; None where they are not weighed against those of the fine one.
        bits: how the file stores its weights.
        mask: fraction of the single weights of each layer to set to 0, or a pattern such as 2:4;
            None where whole channels are removed.
        errors: whether the errors that are weighed are those of a layer's readers or the pixel's.
        recover: how it is trained after that, or None.
        control: which control it is, in place of a pruning; a control has no criterion.
        layers: what the ratios belong to, ``network/layer`` each; empty: to the hidden layers, the
            same in each network.
    """

    networks: NetworkScope
    criterion: str
    ratio: float | None
    schedule: str
    layer_ratios: tuple[float, ...]
    calibration: CalibrationSet | None
    seed: int | None
    compensation: str = "none"
    size: int | None = None
    coarse_weight: float | Literal["auto"] | None = None
    bits: str = "fp32"
    mask: float | str | None = None
    errors: Errors = "layer"
    recover: Recover | None = None
    control: ControlName | None = None
    layers: tuple[str, ...] = ()

    @property
    def needs(self) -> Needs:
        """What its statistics must hold."""
        return _needs_of(
            self.criterion,
            self.schedule,
            self.compensation,
            self.errors,
            self.mask is not None,
            self.size is not None,
            bool(self.layers),
            self.bits == RATE,
        )

    @property
    def needs_data(self) -> bool:
        """Whether it looks at a calibration set: its statistics, or its samples themselves."""
        return (
            bool(self.needs.moments)
            or COMPENSATIONS[self.compensation].needs_batches
            or looks_at_samples(self.bits)
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that came later, as they go into keys: those at their default are not."""
        later = {
            "compensation": self.compensation,
            "size": self.size,
            "coarse_weight": self.coarse_weight,
            "bits": self.bits,
            "mask": self.mask,
            "errors": self.errors,
            "recover": None if self.recover is None else self.recover.identity(),
            "control": self.control,
            "layers": self.layers,
        }
        return _without(
            later,
            compensation="none",
            size=None,
            coarse_weight=None,
            bits="fp32",
            mask=None,
            errors="layer",
            recover=None,
            control=None,
            layers=(),
        )

    def flat(self) -> dict[str, Any]:
        """Flat configuration for records and MLflow; what does not apply is left out."""
        flat: dict[str, Any] = {
            "networks": self.networks,
            "criterion": self.criterion,
            "ratio": self.ratio,
            "schedule": self.schedule,
            "compensation": self.compensation,
            "bits": self.bits,
        }
        if self.size is not None:
            del flat["ratio"]
            flat |= {"size": self.size, "allocation": self.schedule}
        if self.mask is not None:
            del flat["ratio"]
            flat["mask"] = self.mask
        if self.coarse_weight is not None:
            flat["coarse_weight"] = self.coarse_weight
        if self.errors != "layer":
            flat["errors"] = self.errors
        if self.calibration is not None:
            flat["calibration_views"] = self.calibration.views
            flat["calibration_rays"] = self.calibration.rays
            flat["calibration_weighting"] = self.calibration.weighting
            flat["seed"] = self.calibration.seed
        elif self.seed is not None:
            flat["seed"] = self.seed
        if self.layers:
            names = [name.replace("trunk.", "layer_").replace("/", "_") for name in self.layers]
        else:
            names = [f"layer_{i}" for i in range(len(self.layer_ratios))]
        flat |= {f"{n}_ratio": r for n, r in zip(names, self.layer_ratios, strict=True)}
        if self.recover is not None:
            flat |= self.recover.flat()
        if self.control is not None:
            not_pruned = ("criterion", "ratio", "schedule", "allocation", "compensation")
            flat = {"control": self.control} | {
                name: value for name, value in flat.items() if name not in not_pruned
            }
        return flat


@dataclass(frozen=True)
class Look:
    """How a searched trial is measured: on validation rays, with a first look that may stop it.

    Attributes:
        first_key: content address of the result if the first look stops it.
        objectives: what is compared.
        bounds: of the constraints: metric, ``<=`` or ``>=``, value.
        bar: objectives of earlier trials at their first look, to be beaten.
        first_rays: of the first look; 0 for none.
        margin: dB by which a trial must be worse to be stopped.
        audit: whether this is a trial that the first look stopped, now measured in full.
    """

    first_key: str
    objectives: tuple[Objective, ...]
    bounds: tuple[tuple[Objective, str, float], ...] = ()
    bar: tuple[tuple[float, ...], ...] = ()
    first_rays: int = 0
    margin: float = 0.0
    audit: bool = False


@dataclass(frozen=True)
class Trial:
    """One trial: a pruning of one trained model, evaluated.

    Attributes:
        key: content address.
        training: key of the model.
        statistics: key of the statistics it needs, or None.
        config: what is pruned, and how.
        cached: whether the store holds its result.
        look: how it is measured in a search; None: on the held-out views.
    """

    key: str
    training: str
    statistics: str | None
    config: TrialConfig
    cached: bool
    look: Look | None = None

    @property
    def kind(self) -> Literal["trial", "control"]:
        """Where the store keeps its result."""
        return kind_of(self.config)


def kind_of(config: TrialConfig) -> Literal["trial", "control"]:
    """A pruning is a trial; what is trained beside for comparison is a control."""
    return "trial" if config.control is None else "control"


@dataclass(frozen=True)
class SearchPlan:
    """The search on one trained model.

    Attributes:
        settings: what is searched.
        training: the model.
        sets: the calibration sets to choose among.
        statistics: keys of their statistics, by set and `Needs.group`.
        name: of the study.
        planned: keys of the trials of the sweep's own grids on this model: whether they have ended
            when the search begins is chance, so it does not start from them.
    """

    settings: SearchSettings
    training: Training
    sets: tuple[CalibrationSet, ...]
    statistics: Mapping[tuple[CalibrationSet, str], str]
    name: str
    planned: frozenset[str] = frozenset()


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
        searches: one a training where the sweep has a search.
    """

    sweep: Sweep
    scene: str
    trainings: tuple[Training, ...]
    calibrations: tuple[Calibration, ...]
    trials: tuple[Trial, ...]
    combinations: int
    searches: tuple[SearchPlan, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Counts and resources, ready for JSON; controls are counted among the trials, too."""

        def count(nodes: Sequence[Any]) -> dict[str, int]:
            return {"total": len(nodes), "cached": sum(node.cached for node in nodes)}

        controls: dict[str, list[Trial]] = {}
        for trial in self.trials:
            if trial.kind == "control":
                controls.setdefault(method_of(trial.config.flat()), []).append(trial)
        return {
            "sweep": self.sweep.name,
            "sweep_hash": self.sweep.hash,
            "scene": self.scene,
            "trainings": count(self.trainings),
            "calibrations": count(self.calibrations),
            "trials": {**count(self.trials), "combinations": self.combinations},
            "controls": {name: count(of_name) for name, of_name in controls.items()},
            "search": {"trials": sum(s.settings.trials for s in self.searches)},
            "resources": asdict(self.sweep.resources),
            "storage": self.sweep.storage,
        }


def make_plan(sweep: Sweep, store: Store) -> Plan:
    """Work out what a sweep would run and what of it the store already holds.

    Raises:
        SceneError: the scene is missing or inconsistent.
        SpecError: the sweep asks for more calibration views than the scene has.
    """
    check_scene_folder(sweep)
    fingerprint = scene_fingerprint(sweep.scene)
    view_count = training_view_count(sweep.scene)
    _check_views(sweep, view_count)
    kinds = ("checkpoint", "training", "statistics", "trial", "control")
    have = {kind: store.keys(kind) for kind in kinds}
    trainings, calibrations, trials = [], [], []
    combinations = 0
    configs: dict[TrialConfig, None] = {}  # an ordered set
    for grid in sweep.grids:
        for config in _configs(grid, sweep.shape, view_count):
            combinations += 1
            configs[config] = None
    by_search = _search_configs(sweep.search, view_count)
    needs = _needs_of_passes((*configs, *by_search))
    searches = []
    for recipe, seed in itertools.product(sweep.recipes, sweep.train_seeds):
        key = _training_key(sweep, fingerprint, recipe, seed)
        result = _result_key(sweep, key)
        training = Training(
            key, result, recipe, seed, key in have["checkpoint"], result in have["training"]
        )
        trainings.append(training)
        sets: dict[Pass, dict[CalibrationSet, str]] = {}
        for config in configs:
            statistics = None
            if config.calibration is not None:
                if not config.needs.moments:
                    trials.append(_trial(sweep, key, None, config, have[kind_of(config)]))
                    continue
                which = _pass_of(config)
                of_pass = sets.setdefault(which, {})
                statistics = of_pass.get(config.calibration)
                if statistics is None:
                    statistics = _statistics_key(key, config.calibration, needs[which])
                    of_pass[config.calibration] = statistics
            trials.append(_trial(sweep, key, statistics, config, have[kind_of(config)]))
        if sweep.search is not None:
            statistics_of = {}
            for config in by_search:
                if config.calibration is not None and config.needs.moments:
                    which, wanted = _pass_of(config), config.calibration
                    statistics = _statistics_key(key, wanted, needs[which])
                    sets.setdefault(which, {})[wanted] = statistics
                    statistics_of[wanted, config.needs.group] = statistics
            own = frozenset(trial.key for trial in trials if trial.training == key)
            # The more trials are asked for, the longer the same study goes on.
            identity = {"search": sweep.identity["search"], "training": key}
            searches.append(
                SearchPlan(
                    sweep.search,
                    training,
                    _search_sets(sweep.search, view_count),
                    statistics_of,
                    f"{sweep.name}-{content_key(identity)}",
                    own,
                )
            )
        calibrations += [
            Calibration(
                key,
                which[0],
                keys,
                all(k in have["statistics"] for k in keys.values()),
                which[1],
                needs[which],
                which[2],
            )
            for which, keys in sets.items()
        ]
    return Plan(
        sweep,
        fingerprint,
        tuple(trainings),
        tuple(calibrations),
        tuple(trials),
        combinations * len(trainings),
        tuple(searches),
    )


def _check_views(sweep: Sweep, view_count: int) -> None:
    mistakes = [
        Mistake(
            place_of(sweep, "prune", number, "calibration", "views", place),
            views,
            f"the scene has {view_count} training views; allowed are 1 to {view_count}, or `all`",
        )
        for number, grid in enumerate(sweep.grids)
        for place, views in enumerate(grid.calibration.views)
        if views is not None and views > view_count
    ]
    if sweep.search is not None:
        mistakes += [
            Mistake(
                place_of(sweep, "search", "calibration", "views", place),
                views,
                f"the scene has {view_count} training views",
            )
            for place, views in enumerate(sweep.search.calibration.views)
            if views is not None and views > view_count
        ]
    if mistakes:
        raise SpecError(str(sweep.source), mistakes)


Pass = tuple[int, Weighting, str]
"""What calibration sets share one pass: the seed that draws them, how samples count, and a group
of moments."""


def _pass_of(config: TrialConfig) -> Pass:
    if config.calibration is None:
        raise ValueError("a trial without a calibration set belongs to no pass")
    return config.calibration.seed, config.calibration.weighting, config.needs.group


def _trial(
    sweep: Sweep,
    training: str,
    statistics: str | None,
    config: TrialConfig,
    have: Collection[str],
) -> Trial:
    key = _trial_key(sweep, training, config)
    return Trial(key, training, statistics, config, cached=key in have)


def _search_sets(settings: SearchSettings, view_count: int) -> tuple[CalibrationSet, ...]:
    """The calibration sets that a search chooses among."""
    axes = settings.calibration
    return tuple(
        CalibrationSet(view_count if views is None else views, rays, seed, weighting)
        for views, rays, seed, weighting in itertools.product(
            axes.views, axes.rays, axes.seeds, axes.weightings
        )
    )


def _search_configs(settings: SearchSettings | None, view_count: int) -> tuple[TrialConfig, ...]:
    """One pruning of each kind that a search may try or start from: what they read is collected."""
    if settings is None:
        return ()
    found = []
    for criterion, compensation, bits, wanted in itertools.product(
        settings.criteria,
        settings.compensations,
        settings.bits,
        _search_sets(settings, view_count),
    ):
        by_layer = TrialConfig(
            networks=settings.networks,
            criterion=criterion,
            ratio=0.0,
            schedule="searched",
            layer_ratios=(0.0,),
            calibration=wanted,
            seed=wanted.seed,
            compensation=compensation,
            bits=bits,
            errors=settings.errors if criterion == "obs" else "layer",
            layers=("any",),
        )
        found.append(by_layer)
        found += [
            replace(by_layer, ratio=None, schedule=allocation, layer_ratios=(), layers=(), size=1)
            for allocation in settings.start_allocations
            if settings.start_sizes
        ]
    return tuple(found)


def _needs_of_passes(configs: Iterable[TrialConfig]) -> dict[Pass, Needs]:
    """What each pass must collect to serve every trial that uses it."""
    needs: dict[Pass, list[Needs]] = {}
    for config in configs:
        if config.calibration is not None and config.needs.moments:
            needs.setdefault(_pass_of(config), []).append(config.needs)
    return {which: reduce(or_, wanted) for which, wanted in needs.items()}


@dataclass(frozen=True)
class _Target:
    """How much is to go, and from where: the part of a grid that ratios and sizes do not share."""

    schedule: str
    ratio: float | None = None
    layer_ratios: tuple[float, ...] = ()
    size: int | None = None
    coarse_weight: float | Literal["auto"] | None = None
    mask: float | str | None = None


def _configs(grid: PruneGrid, shape: FieldShape, view_count: int) -> Iterator[TrialConfig]:
    """Every combination of a grid; axes that do not matter to a trial are dropped from it."""
    axes, depth = grid.calibration, len(shape.trunk)
    for (
        scope,
        criterion,
        target,
        views,
        rays,
        seed,
        weighting,
        compensation,
        bits,
        errors,
    ) in itertools.product(
        grid.networks,
        grid.criteria,
        [*_ratio_targets(grid, depth), *_size_targets(grid), *_mask_targets(grid)],
        axes.views,
        axes.rays,
        axes.seeds,
        axes.weightings,
        grid.compensations,
        grid.bits,
        grid.errors,
    ):
        masked = target.mask is not None
        networks = _networks(scope, target.size, bits, shape)
        weighs = target.size is not None and BUDGETED[target.schedule].needs_paths
        config = TrialConfig(
            networks=networks,
            criterion=criterion,
            ratio=target.ratio,
            schedule=target.schedule,
            layer_ratios=target.layer_ratios,
            calibration=CalibrationSet(
                view_count if views is None else views, rays, seed, weighting
            ),
            seed=seed if not masked and CRITERIA[criterion].needs_seed else None,
            compensation=compensation,
            size=target.size,
            coarse_weight=target.coarse_weight if weighs and networks == "both" else None,
            bits=bits,
            mask=target.mask,
            errors=errors if weighs or criterion == "obs" else "layer",
        )
        if not config.needs_data:
            config = replace(config, calibration=None)
        for recover in grid.recover.recoveries():
            yield replace(config, recover=recover and recover.at(bits))
    yield from _controls(grid, shape)


def _networks(
    scope: NetworkScope | Literal["auto"], size: int | None, bits: str, shape: FieldShape
) -> NetworkScope:
    """A scope, where `auto` is one by the size of the file."""
    return networks_for(size or 0, bits, shape.parameters()) if scope == "auto" else scope


def _controls(grid: PruneGrid, shape: FieldShape) -> Iterator[TrialConfig]:
    """What is trained beside a grid's recoveries, for comparison."""
    names = grid.recover.controls
    for recover in grid.recover.beside():
        control = TrialConfig(
            networks="both",
            criterion="",
            ratio=None,
            schedule="",
            layer_ratios=(),
            calibration=None,
            seed=grid.calibration.seeds[0],
        )
        if "dense_longer" in names:
            yield replace(control, control="dense_longer", recover=recover.at("fp32"))
        if "narrow" in names:
            for size, scope, bits in itertools.product(grid.sizes, grid.networks, grid.bits):
                yield replace(
                    control,
                    recover=recover.at(bits),
                    control="narrow",
                    networks="shared"
                    if _networks(scope, size, bits, shape) == "shared"
                    else "both",
                    size=size,
                    bits=bits,
                )


def _ratio_targets(grid: PruneGrid, depth: int) -> Iterator[_Target]:
    seen: set[tuple[Schedule, float]] = set()
    for schedule, ratio in itertools.product(grid.schedules, grid.ratios):
        if (schedule, ratio) in seen:
            continue
        seen.add((schedule, ratio))
        if isinstance(schedule, tuple):
            yield _Target("explicit", math.fsum(schedule) / depth, schedule)
        else:
            yield _Target(schedule, ratio, ALLOCATIONS[schedule](ratio, depth))


def _size_targets(grid: PruneGrid) -> Iterator[_Target]:
    for allocation, size, weight in itertools.product(
        grid.allocations, grid.sizes, grid.coarse_weights
    ):
        yield _Target(allocation, size=size, coarse_weight=weight)


def _mask_targets(grid: PruneGrid) -> Iterator[_Target]:
    for mask in grid.masks:
        yield _Target("mask", mask=mask)


def _without(data: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The data less what is at its default."""
    return {n: v for n, v in data.items() if n not in defaults or v != defaults[n]}


def searched_trial(
    sweep: Sweep, search: SearchPlan, config: TrialConfig, look: Look | None = None
) -> Trial:
    """A trial of a search: measured on validation rays as `look` says, or on the held-out views.

    Args:
        sweep: the sweep.
        search: the search.
        config: what is pruned, and how.
        look: all but its `first_key`, which is filled in; None for the held-out views.
    """
    training = search.training.key
    statistics = None
    if config.calibration is not None and config.needs.moments:
        statistics = search.statistics[config.calibration, config.needs.group]
    if look is None:
        key = _trial_key(sweep, training, config)
    else:
        protocol = {
            "validation": search.training.recipe.validation,
            "max_rays": sweep.protocol.max_rays,
            "precision": sweep.protocol.precision,
        }
        if "ssim" in {*look.objectives, *(metric for metric, _, _ in look.bounds)}:
            protocol["ssim"] = True
        key = _trial_key(sweep, training, config, protocol)
        first = {**protocol, "first_rays": look.first_rays}
        look = replace(look, first_key=_trial_key(sweep, training, config, first))
    return Trial(key, training, statistics, config, cached=False, look=look)


def _training_key(sweep: Sweep, fingerprint: str, recipe: Recipe, seed: int) -> str:
    return content_key(
        {
            "kind": "training",
            "version": RESULTS_VERSION,
            "scene": fingerprint,
            "shape": asdict(sweep.shape),
            "samples": asdict(sweep.samples),
            "recipe": _recipe_identity(recipe),
            "seed": seed,
        }
    )


def _recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """What goes into keys; what makes no difference is left out."""
    settings = _without(asdict(recipe), **LATER_OF_TRAINING)
    if recipe.anneal == "cosine":
        del settings["decay"], settings["decay_iterations"]
    return settings


def _result_key(sweep: Sweep, training: str) -> str:
    return content_key(
        {
            "kind": "dense",
            "version": RESULTS_VERSION,
            "training": training,
            "protocol": asdict(sweep.protocol),
        }
    )


def _statistics_key(training: str, wanted: CalibrationSet, needs: Needs) -> str:
    return content_key(
        {
            "kind": "statistics",
            "version": RESULTS_VERSION,
            "training": training,
            "set": wanted.identity(),
            **needs.identity(),
        }
    )


def _trial_key(
    sweep: Sweep,
    training: str,
    config: TrialConfig,
    protocol: Mapping[str, Any] | None = None,
) -> str:
    return content_key(
        {
            "kind": "trial",
            "version": RESULTS_VERSION,
            "training": training,
            "networks": config.networks,
            "criterion": config.criterion,
            "layer_ratios": config.layer_ratios,
            "schedule": config.schedule,
            "calibration": None if config.calibration is None else config.calibration.identity(),
            "seed": config.seed,
            "protocol": protocol or vars(sweep.protocol),
            **config.identity,
        }
    )
