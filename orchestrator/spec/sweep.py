"""A validated sweep, as plain frozen data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nerf.backends import Backend
from nerf.devices import Precision
from nerf.field import FieldShape, SampleCounts
from nerf.scenes import SceneSettings
from nerf.training import Recipe
from orchestrator.keys import content_key
from orchestrator.spec.recover import RecoverAxes

NetworkScope = Literal["coarse", "fine", "both", "shared"]
Weighting = Literal["uniform", "render", "detail"]
Errors = Literal["layer", "pixel"]
Schedule = str | tuple[float, ...]
LATER_OF_TRAINING = {"validation": 0.0, "optimizer": "adam", "anneal": "exponential"}
"""Settings of a training that came later: at these values they are not in hashes and keys."""


@dataclass(frozen=True)
class CalibrationAxes:
    """Calibration sets to compare.

    Attributes:
        views: numbers of training views; None stands for all of them.
        rays: numbers of rays a view.
        seeds: seeds that draw them.
        weightings: how much each sample counts: all alike, by its render weight, or with rays drawn
            more often where the photos have detail.
    """

    views: tuple[int | None, ...] = (None,)
    rays: tuple[int, ...] = (1024,)
    seeds: tuple[int, ...] = (0,)
    weightings: tuple[Weighting, ...] = ("uniform",)


@dataclass(frozen=True)
class PruneGrid:
    """One grid of prunings, by `ratios`, to `sizes` or by `masks`.

    Every combination of its axes is a trial.

    Attributes:
        networks: which networks are pruned; ``shared`` is the fine one, used for both passes, and
            ``auto`` with sizes one of the two.
        criteria: names of scoring rules.
        ratios: fractions of channels to remove, in [0, 1); empty in other grids.
        schedules: how a ratio is spread over the layers: a name, or one ratio a hidden layer
            (which stands for itself, whatever `ratios` says).
        calibration: the calibration sets.
        compensations: what the readers of removed channels do.
        sizes: of the model file in bytes; empty in other grids.
        allocations: how a size is shared out among the layers.
        coarse_weights: how much the errors of the coarse network count when a size is shared out.
        bits: how the file stores its weights.
        masks: fractions of single weights to set to 0, or patterns such as 2:4; empty in other
            grids.
        errors: whose errors are weighed: those of a layer's readers, or the pixel's.
        recover: the trainings after pruning.
    """

    networks: tuple[NetworkScope | Literal["auto"], ...]
    criteria: tuple[str, ...]
    ratios: tuple[float, ...]
    schedules: tuple[Schedule, ...]
    calibration: CalibrationAxes
    compensations: tuple[str, ...] = ("none",)
    sizes: tuple[int, ...] = ()
    allocations: tuple[str, ...] = ("chain",)
    coarse_weights: tuple[float | Literal["auto"], ...] = (0.001,)
    bits: tuple[str, ...] = ("fp32",)
    masks: tuple[float | str, ...] = ()
    errors: tuple[Errors, ...] = ("layer",)
    recover: RecoverAxes = field(default_factory=RecoverAxes)


@dataclass(frozen=True)
class Protocol:
    """How every model of the sweep is evaluated, on held-out views.

    Attributes:
        max_rays: rays a view (a seeded subset), or None for whole pictures.
        precision: arithmetic of the linear layers.
        renders: how many held-out views are kept as pictures, the first ones.
    """

    max_rays: int | None = None
    precision: Precision = "float32"
    renders: int = 1


@dataclass(frozen=True)
class StageResources:
    """What one training or one pruning worker takes.

    Attributes:
        cpus: CPU cores.
        gpus: GPUs, or a fraction of one; None takes one where the cluster has GPUs (a quarter for
            prunings) and none elsewhere. A training on several shares every batch out among them.
    """

    cpus: float
    gpus: float | None


@dataclass(frozen=True)
class Resources:
    """Where the work runs.

    Attributes:
        train: for each training.
        prune: for each calibration and pruning.
        backend: how networks are run: auto, eager, compiled or fused.
        retries: how often a trial is started again after its worker died.
        checkpoint_seconds: how often a training saves its state.
    """

    train: StageResources = StageResources(cpus=2.0, gpus=None)
    prune: StageResources = StageResources(cpus=1.0, gpus=None)
    backend: Backend = "auto"
    retries: int = 2
    checkpoint_seconds: float = 30.0


@dataclass(frozen=True)
class Limits:
    """How long work may take (s) before its worker is ended and it counts as failed.

    None sets no limit.

    Attributes:
        train: a whole training, from its (re)start.
        silence: between two signs of life of a training, its evaluation included.
        calibrate: one pass over calibration rays.
        prune: one pruning, with its recovery and its evaluation.
    """

    train: float | None = 604_800.0
    silence: float | None = 3600.0
    calibrate: float | None = 7200.0
    prune: float | None = 43_200.0


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are logged.

    Attributes:
        uri: an MLflow tracking URI; None for SQLite in the storage folder.
        experiment: MLflow experiment.
        patience: seconds to wait at the end for a tracking store that does not answer.
    """

    uri: str | None = None
    experiment: str = "prunefield"
    patience: float = 60.0


@dataclass(frozen=True)
class ReportSettings:
    """What the report shows.

    Attributes:
        ratios: ratios in the grid of renders; None for those of the first grid.
        reference_psnr: PSNR (dB) of the hypervolume's reference point.
    """

    ratios: tuple[float, ...] | None = None
    reference_psnr: float = 10.0


Objective = Literal["size_bytes", "psnr", "mse", "ssim", "render_seconds", "flops"]
Sampler = Literal["gp", "tpe", "nsga2", "nsga3", "qmc", "random"]


@dataclass(frozen=True)
class Constraint:
    """A bound on a metric, relative to the dense model or not.

    Attributes:
        text: as the file writes it.
        metric: what is bounded.
        sense: ``<=`` or ``>=``.
        dense: how often the dense model's value counts in the bound; 0: it does not.
        offset: what is added.
    """

    text: str
    metric: Objective
    sense: Literal["<=", ">="]
    dense: float
    offset: float


@dataclass(frozen=True)
class SearchSettings:
    """A search for ratios layer by layer.

    Attributes:
        trials: how many configurations are tried.
        seconds: after which nothing more is proposed; None for no end but `trials`.
        sampler: who proposes them.
        seed: of the sampler.
        batch: how many are proposed at once.
        objectives: one to three.
        constraints: what the front must keep to.
        networks: which are pruned.
        groups: layers that share a ratio (names without their network, e.g. ``trunk.0``).
        low: least fraction removed.
        high: greatest fraction removed.
        step: ratios are multiples of this; None for whole channels.
        criteria: to choose among, as are the next three.
        compensations: see `criteria`.
        bits: see `criteria`.
        errors: weighed by `obs` and by the allocations tried first: of a layer, or the pixel's.
        calibration: see `criteria`.
        start_uniform: ratios tried first in every layer.
        start_schedules: one ratio a hidden layer each, tried first in each network.
        start_allocations: whose solutions at `start_sizes` are tried first.
        start_sizes: bytes of the model file.
        coarse_weight: for those allocations, with both networks.
        start_store: whether trials of other sweeps on the same model are tried first.
        first_rays: validation rays of the first look; 0 for none.
        margin: dB by which a trial must be worse to be stopped after it.
        audit: how many of the stopped trials are measured in full in the end.
        final: the most points of the front whose held-out views are rendered.
        storage: SQLAlchemy URL of the study; None for SQLite in the storage folder.
    """

    trials: int
    seconds: float | None
    sampler: Sampler
    seed: int
    batch: int
    objectives: tuple[Objective, ...]
    constraints: tuple[Constraint, ...]
    networks: NetworkScope
    groups: tuple[tuple[str, ...], ...]
    low: float
    high: float
    step: float | None
    criteria: tuple[str, ...]
    compensations: tuple[str, ...]
    bits: tuple[str, ...]
    errors: Errors
    calibration: CalibrationAxes
    start_uniform: tuple[float, ...]
    start_schedules: tuple[tuple[float, ...], ...]
    start_allocations: tuple[str, ...]
    start_sizes: tuple[int, ...]
    coarse_weight: float
    start_store: bool
    first_rays: int
    margin: float
    audit: int
    final: int
    storage: str | None


@dataclass(frozen=True)
class Sweep:
    """A whole sweep file.

    Attributes:
        name: of the sweep, its report folder and its MLflow run.
        description: a sentence for people.
        source: the file it was read from.
        text: that file's text.
        scene: which scene, and how it is read.
        shape: widths of both networks.
        samples: samples a ray.
        recipes: the recipes to train with.
        train_seeds: the seeds of each.
        grids: what is pruned.
        protocol: how models are evaluated.
        resources: where the work runs.
        limits: how long it may take.
        tracking: where it is logged.
        storage: where results are kept: a folder, or ``s3://bucket/prefix``.
        report: what the report shows.
        identity: canonical data of all that decides the results.
        search: what is searched, or None.
    """

    name: str
    description: str
    source: Path
    text: str
    scene: SceneSettings
    shape: FieldShape
    samples: SampleCounts
    recipes: tuple[Recipe, ...]
    train_seeds: tuple[int, ...]
    grids: tuple[PruneGrid, ...]
    protocol: Protocol
    resources: Resources
    limits: Limits
    tracking: TrackingSettings
    storage: str
    report: ReportSettings
    identity: dict[str, Any]
    search: SearchSettings | None = None

    @property
    def hash(self) -> str:
        """A short hash of all that decides the results (not of resources, tracking, storage)."""
        return content_key(self.identity)
