"""The three stages of a sweep, as one worker does them: train, calibrate, prune.

Each leaves its result in the store. Training is a generator that yields where it stands now and
then, so that whoever drives it can report and stop it. Nothing here knows about Ray.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nerf.checkpoints import load_model, save_model
from nerf.devices import resolve_device
from nerf.errors import CheckpointError
from nerf.evaluation import Evaluation, HeldOut, error_map, write_picture
from nerf.field import NerfModel
from nerf.files import read_tensors, write_tensors
from nerf.parallel import ParallelTrainer, train_devices
from nerf.scenes import Scene, load_scene
from nerf.training import Progress, RayPool, Recipe, Trainer
from nerf.validation import MAX_RAYS, ValidationRays
from orchestrator.bridge import CalibrationSamples, as_one, calibrate, from_one
from orchestrator.compress import Material, Reduced, compress, is_light
from orchestrator.errors import PrunefieldError, StoreError, SweepError
from orchestrator.log import logger
from orchestrator.plan import Calibration, CalibrationSet, Look, Training, Trial, TrialConfig
from orchestrator.provenance import Origin
from orchestrator.recovering import Ground, Recovered, recover_pruned, train_control
from orchestrator.results import Failure, Record, ViewScore
from orchestrator.scene_info import scene_info
from orchestrator.search.goals import hopeless
from orchestrator.spec import Sweep
from orchestrator.store import Held, Store
from pruning import Statistics, cells

MODEL = "model.safetensors"
STATE = "state.safetensors"
STATISTICS = "statistics.safetensors"
HISTORY = "history.json"
REPORT_SECONDS = 1.0
LAST_ITERATIONS = 50
"""What a training's own PSNR is the mean over: it must not depend on how fast the machine was."""
WAIT_SECONDS = 1.0
# A trained model that the storage does not take is offered again for so long.
WRITE_PATIENCE = 300.0
WRITE_DELAY = 5.0
BYTES_PER_PARAMETER = 4

AnyTrainer = Trainer | ParallelTrainer
Update = dict[str, Any]
Shared = Mapping[str, Any]


@dataclass
class Stopwatch:
    """Wall seconds by stage, and the stage under way."""

    stage: str = "start"
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Time a block as a stage; an error leaves `stage` at the one that failed."""
        self.stage = stage
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


class Workbench:
    """What a worker keeps between trials: the scene decoded, the models loaded, the device warm.

    Args:
        sweep: the sweep.
        store: where results go.
        origin: commit and versions of the code.
        find_shared: looks up calibration statistics in the cluster's shared memory.
        publish_shared: puts them there.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        origin: Origin,
        find_shared: Callable[[str], Shared | None] = lambda _key: None,
        publish_shared: Callable[[str, Shared], None] = lambda _key, _tensors: None,
        device: str = "auto",
    ) -> None:
        self.sweep = sweep
        self.store = store
        self.origin = origin
        self.device = resolve_device(device)
        self._find_shared = find_shared
        self._publish_shared = publish_shared
        self._scene: Scene | None = None
        self._held_out: HeldOut | None = None
        self._warm = False
        self._validation: tuple[float, ValidationRays] | None = None
        self._fractions: dict[str, float] = {}
        self._training_view: HeldOut | None = None
        self._model: tuple[str, NerfModel] | None = None
        self._host: tuple[str, NerfModel] | None = None
        self._statistics: tuple[str, dict[str, Statistics]] | None = None
        self._kept: tuple[str, dict[Any, Any]] = ("", {})
        self._pool: tuple[float, RayPool] | None = None

    # --- what stays loaded -----------------------------------------------------------------

    @property
    def loaded_model(self) -> str | None:
        """Key of the model that is loaded."""
        return None if self._model is None else self._model[0]

    def scene(self) -> Scene:
        """The scene, decoded once."""
        if self._scene is None:
            self._scene = load_scene(self.sweep.scene)
        return self._scene

    def held_out(self) -> HeldOut:
        """Rays and photos of the held-out views, on the device."""
        if self._held_out is None:
            self._held_out = HeldOut(self.scene(), self.device, self.sweep.protocol.max_rays)
        return self._held_out

    def warm(self) -> None:
        """Get ready for a pruning before there is one; if that fails, the pruning will say why."""
        if not self._warm:
            self._warm = True
            with suppress(Exception):
                self.held_out()

    def _evaluate(self, model: NerfModel) -> Evaluation:
        protocol, backend = self.sweep.protocol, self.sweep.resources.backend
        return self.held_out().evaluate(model, protocol.precision, backend=backend)

    def validation(self, training: str) -> ValidationRays | None:
        """The validation rays of a training, on the device; None if it has none."""
        fraction = self._validation_fraction(training)
        if fraction == 0.0:
            return None
        if self._validation is None or self._validation[0] != fraction:
            most = self.sweep.protocol.max_rays
            most = MAX_RAYS if most is None else min(MAX_RAYS, most * len(self.scene().train))
            rays = ValidationRays(self.scene(), fraction, self.device, most)
            self._validation = (fraction, rays)
        return self._validation[1]

    def _validation_fraction(self, training: str) -> float:
        """Which fraction of the pixels a training left out, as its record says."""
        if training not in self._fractions:
            config = self.store.read_record("checkpoint", training).config
            self._fractions[training] = float(config.get("validation", 0.0))
        return self._fractions[training]

    def _validated(self, training: str, model: NerfModel) -> dict[str, float]:
        """Metrics of a model on the validation rays of its training; none where there are none."""
        rays = self.validation(training)
        if rays is None or len(rays) == 0:
            return {}
        score = rays.score(
            model, self.sweep.protocol.precision, backend=self.sweep.resources.backend
        )
        return {"validation_mse": score.mse, "validation_psnr": score.psnr}

    def model(self, training: str) -> NerfModel:
        """A trained model, on the device."""
        if self._model is None or self._model[0] != training:
            path = self.store.verified_file("checkpoint", training, MODEL)
            self._model = (training, load_model(path)[0].to(self.device))
        return self._model[1]

    def _on_host(self, training: str) -> NerfModel:
        """A trained model in the host's memory, for what is done sooner there."""
        if self.device.type == "cpu":
            return self.model(training)
        if self._host is None or self._host[0] != training:
            self._host = (training, self.model(training).copied_to("cpu"))
        return self._host[1]

    def statistics(self, key: str) -> dict[str, Statistics]:
        """Calibration statistics by network: from memory, the cluster's memory, or the store."""
        if self._statistics is None or self._statistics[0] != key:
            tensors: Shared | None = self._find_shared(key)
            if tensors is None:
                tensors = read_tensors(self.store.file("statistics", key, STATISTICS))[0]
                self._publish_shared(key, {n: t.numpy() for n, t in tensors.items()})
            self._statistics = (key, from_one(tensors))
        return self._statistics[1]

    def material(self, trial: Trial) -> Material:
        """What a trial's pruning may look at."""
        if self._kept[0] != trial.training:
            self._kept = (trial.training, {})
        wanted, samples = trial.config.calibration, None
        if wanted is not None:
            samples = partial(
                calibration_samples,
                self.model(trial.training),
                self.scene(),
                wanted,
                self._validation_fraction(trial.training),
            )
        statistics = None if trial.statistics is None else self.statistics(trial.statistics)
        rays, precision = self.validation(trial.training), self.sweep.protocol.precision
        validate = None if rays is None else lambda small: rays.score(small, precision).psnr
        return Material(statistics, samples, self._kept[1], validate)

    # --- train -----------------------------------------------------------------------------

    def train(self, training: Training, watch: Stopwatch) -> Generator[Update, None, None]:
        """Train one NeRF (or go on where an earlier attempt stopped) and evaluate it, dense."""
        with watch.during("load"):
            scene = self.scene()
        while not self.store.has("checkpoint", training.key):
            what = f"training {training.key} of sweep {self.sweep.name}"
            lease = self.store.lease(lease_of_training(training.key), what)
            if isinstance(lease, Held):  # another sweep wants the same model and trains it already
                yield {"waiting": str(lease)}
                time.sleep(WAIT_SECONDS)
                continue
            with lease:
                if not self.store.has("checkpoint", training.key):
                    yield from self._train_model(training, scene, watch)
        with watch.during("evaluate"):
            model = self.model(training.key)
            evaluation = self._evaluate(model)
            validated = self._validated(training.key, model)
        checkpoint = self.store.read_record("checkpoint", training.key)
        record = Record(
            kind="training",
            key=training.result,
            training=training.key,
            config=training.config,
            metrics={
                **checkpoint.metrics,
                **_scores(evaluation),
                **validated,
                **sizes(model, {}),
                "size_bytes": self._file_size(training.key),
            },
            views=_views(evaluation),
            widths=_widths(model),
            provenance=self.origin.provenance(
                self.device, {**checkpoint.provenance.seconds, **watch.seconds}
            ),
        )
        with watch.during("write"), self.store.writing("training", training.result) as folder:
            self._write_renders(folder, evaluation, truth=True)
            self.store.write_record(folder, record)

    def _train_model(self, training: Training, scene: Scene, watch: Stopwatch) -> Iterator[Update]:
        with self._trainer(training, scene) as trainer:
            yield from self._advance(trainer, training, watch)

    @contextmanager
    def _trainer(self, training: Training, scene: Scene) -> Iterator[AnyTrainer]:
        """A trainer on this worker's GPU, or on all of them."""
        what = (scene, self.sweep.shape, self.sweep.samples, training.recipe, training.seed)
        gpus = int(self.sweep.resources.train.gpus or 1)
        backend = self.sweep.resources.backend
        if gpus > 1:
            with ParallelTrainer(*what, train_devices(gpus), backend) as trainer:
                yield trainer
        else:
            yield Trainer(*what, self.device, backend)

    def _advance(
        self, trainer: AnyTrainer, training: Training, watch: Stopwatch
    ) -> Iterator[Update]:
        running = self.store.running(training.key)
        state, history_file = running / STATE, running / HISTORY
        history: list[dict[str, float]] = []
        spent = 0.0
        if state.is_file():
            history, spent = self._go_on(trainer, state, history_file)

        def save() -> None:
            trainer.save(state)
            history_file.write_text(json.dumps({"seconds": spent, "points": history}))
            self._save_running(training.key)

        saved = time.monotonic()
        step = 10
        try:
            while not trainer.done:
                with watch.during("train"):
                    left = training.recipe.iterations - trainer.iteration
                    progress = trainer.advance(_stride(step, left))
                spent += progress.seconds
                history.append(_point(progress))
                step = max(1, round(progress.rate * REPORT_SECONDS))
                if time.monotonic() - saved > self.sweep.resources.checkpoint_seconds:
                    with watch.during("checkpoint"):
                        save()
                    saved = time.monotonic()
                yield {"total": training.recipe.iterations, **_point(progress)}
        except GeneratorExit:
            save()
            raise
        end = None
        while True:
            try:
                with watch.during("write"), self.store.writing("checkpoint", training.key) as made:
                    self._write_checkpoint(made, training, trainer, history, spent)
                break
            except StoreError as error:  # a storage that is away must not cost a long training
                if end is None:
                    end = time.monotonic() + WRITE_PATIENCE
                    save()
                if time.monotonic() > end:
                    raise
                logger.warning("model %s cannot be kept yet: %s", training.key, error)
                if history:
                    yield {"total": training.recipe.iterations, **history[-1]}
                time.sleep(WRITE_DELAY)
        self.store.remove_running(training.key)

    def _save_running(self, key: str) -> None:
        """Let other machines have a state; if the storage is away, training goes on without."""
        try:
            self.store.save_running(key)
        except StoreError as error:
            logger.warning("the state of %s is on this machine only: %s", key, error)

    def _go_on(
        self, trainer: AnyTrainer, state: Path, history_file: Path
    ) -> tuple[list[dict[str, float]], float]:
        try:
            trainer.load(state)
            kept = json.loads(history_file.read_text())
            points = [p for p in kept["points"] if p["iteration"] <= trainer.iteration]
            logger.info("going on with the training at iteration %d", trainer.iteration)
            return points, float(kept["seconds"])
        except (CheckpointError, OSError, ValueError, KeyError, TypeError) as error:
            if trainer.iteration == 0:
                logger.warning("cannot go on from %s (%s); training from the start", state, error)
            return [], 0.0

    def _write_checkpoint(
        self,
        folder: Path,
        training: Training,
        trainer: AnyTrainer,
        history: list[dict[str, float]],
        spent: float,
    ) -> None:
        scene = self.scene()
        model = trainer.model
        save_model(
            folder / MODEL,
            model,
            {
                "scene": scene_info(self.sweep.scene, scene),
                "training": training.config,
                "training_key": training.key,
            },
        )
        trainer.save(folder / STATE)
        (folder / HISTORY).write_text(json.dumps(history))
        record = Record(
            kind="checkpoint",
            key=training.key,
            training=training.key,
            config=training.config,
            metrics={
                "iterations": trainer.iteration,
                "train_seconds": spent,
                "train_psnr": history[-1]["train_psnr"] if history else float("nan"),
            },
            views=(),
            widths=_widths(model),
            provenance=self.origin.provenance(self.device, {"train": spent}),
        )
        self.store.write_record(folder, record)

    def _file_size(self, training: str) -> int:
        return self.store.file("checkpoint", training, MODEL).stat().st_size

    # --- calibrate -------------------------------------------------------------------------

    def calibrate(self, calibration: Calibration, watch: Stopwatch) -> None:
        """Collect the statistics of every set size of one model and seed, in one pass."""
        if all(self.store.has("statistics", key) for key in calibration.sets.values()):
            return
        with watch.during("load"):
            model, scene = self.model(calibration.training), self.scene()
        with watch.during("calibrate"):
            nested = calibrate(
                model,
                scene,
                [s.views for s in calibration.sets],
                [s.rays for s in calibration.sets],
                calibration.seed,
                calibration.needs.moments,
                calibration.needs.prunable,
                calibration.weighting,
                self._validation_fraction(calibration.training),
            )
        with watch.during("write"):
            for wanted, key in calibration.sets.items():
                tensors = as_one(
                    {name: n.subset((wanted.views, wanted.rays)) for name, n in nested.items()}
                )
                if not self.store.has("statistics", key):
                    with self.store.writing("statistics", key) as folder:
                        write_tensors(folder / STATISTICS, tensors, {"set": asdict(wanted)})
                self._publish_shared(key, {name: t.numpy() for name, t in tensors.items()})

    # --- prune -----------------------------------------------------------------------------

    def prune(self, trial: Trial, watch: Stopwatch) -> None:
        """Prune one model, train it again if that is wanted, and evaluate what is left.

        A control, which is trained beside the recoveries for comparison, takes the same way.
        """
        if self.store.has(trial.kind, trial.key):
            return
        if trial.look is not None:
            audited = trial.look.audit and self.store.has("trial", trial.look.first_key)
            search = self._audit if audited else self._search
            search(trial, trial.look, watch)
            return
        config = trial.config
        with watch.during("load"):
            light = is_light(config)
            dense = self._on_host(trial.training) if light else self.model(trial.training)
            self.held_out()
        with watch.during("calibrate"):
            material = self.material(trial)
        info = self._info(trial)
        with self.store.writing(trial.kind, trial.key) as folder:
            if config.recover is None:
                with watch.during("prune"):
                    small = compress(folder / MODEL, dense, config, material, info)
                    if dense.device.type != self.device.type:
                        # A copy: the network that was not pruned is the dense model's own.
                        small = replace(small, model=small.model.copied_to(self.device))
                recovered: Mapping[str, float] = {}
            else:
                done = self._recover(folder / MODEL, trial, material, info, watch)
                small, recovered = done.result, done.metrics
            with watch.during("evaluate"):
                evaluation = self._evaluate(small.model)
                validated = self._validated(trial.training, small.model)
            with watch.during("write"):
                self._write_renders(folder, evaluation, truth=False)
            record = Record(
                kind=trial.kind,
                key=trial.key,
                training=trial.training,
                config=config.flat(),
                metrics={
                    **_scores(evaluation),
                    **validated,
                    **recovered,
                    **sizes(small.model, small.pruned),
                    "size_bytes": small.size,
                    **({"achieved_ratio": achieved_ratio(small.pruned)} if small.pruned else {}),
                    **small.notes,
                },
                views=_views(evaluation),
                widths=_widths(small.model),
                provenance=self.origin.provenance(self.device, watch.seconds),
            )
            self.store.write_record(folder, record)
        if config.recover is not None:
            self.store.remove_running(trial.key)

    def _info(self, trial: Trial) -> dict[str, Any]:
        """What the file of a trial's model says of it."""
        return {
            "scene": scene_info(self.sweep.scene, self.scene()),
            "pruning": trial.config.flat(),
            "training_key": trial.training,
        }

    def _recover(
        self,
        path: Path,
        trial: Trial,
        material: Material,
        info: Mapping[str, Any],
        watch: Stopwatch,
    ) -> Recovered:
        """Prune and train again, or train a control; see `orchestrator.recovering`."""
        dense, config = self.model(trial.training), trial.config
        recipe = recipe_of(self.store.read_record("checkpoint", trial.training))
        if self._pool is None or self._pool[0] != recipe.validation:
            pool = RayPool(self.scene(), self.device, recipe.validation)
            self._pool = (recipe.validation, pool)
        ground = Ground(
            self.scene(),
            self._pool[1],
            recipe,
            self.store.running(trial.key),
            self.sweep.resources.checkpoint_seconds,
            lambda: self._save_running(trial.key),
            watch.during,
        )
        if config.control is not None:
            return train_control(path, dense, config, self.sweep.shape, info, ground)
        return recover_pruned(
            path,
            dense,
            config,
            material,
            info,
            partial(self._recalibrated, config, trial.training),
            ground,
        )

    def _recalibrated(self, config: TrialConfig, training: str, model: NerfModel) -> Material:
        """What a pruning of a model between two rounds of recovery may look at."""
        return material_of(model, self.scene(), config, self._validation_fraction(training))

    def _search(self, trial: Trial, look: Look, watch: Stopwatch) -> None:
        """Prune one model and score it on validation rays, after a first look at few of them.

        What the first look stops is an entry of its own, since it was not measured in full.
        """
        config = trial.config
        with watch.during("load"):
            dense = self.model(trial.training)
            rays = self.validation(trial.training)
            if rays is None or len(rays) == 0:
                raise SweepError(f"training {trial.training} has no validation rays to search on")
        with watch.during("calibrate"):
            material = self.material(trial)
        info = self._info(trial)
        precision, stopped = self.sweep.protocol.precision, False
        with self.store.scratch("search") as scratch:
            path = scratch / MODEL
            with watch.during("prune"):
                small = compress(path, dense, config, material, info)
            metrics = {
                **sizes(small.model, small.pruned),
                "size_bytes": small.size,
                "achieved_ratio": achieved_ratio(small.pruned),
            }
            score = None
            if 0 < look.first_rays < len(rays):
                with watch.during("first look"):
                    score = rays.score(small.model, precision, stop=look.first_rays)
                metrics |= {
                    "first_mse": score.mse,
                    "first_psnr": score.psnr,
                    "render_seconds": score.seconds * rays.pixels_per_view / score.rays,
                }
                stopped = not look.audit and hopeless(metrics, look) is not None
            if not stopped:
                with watch.during("validate"):
                    rest = rays.score(small.model, precision, start=score.rays if score else 0)
                score = rest if score is None else score + rest
                metrics |= {
                    "validation_mse": score.mse,
                    "validation_psnr": score.psnr,
                    "render_seconds": score.seconds * rays.pixels_per_view / score.rays,
                }
                if any("ssim" in names for names in (look.objectives, *look.bounds)):
                    with watch.during("validate"):
                        metrics["validation_ssim"] = self._training_ssim(small.model)
            key = look.first_key if stopped else trial.key
            with watch.during("write"), self.store.writing("trial", key) as folder:
                path.rename(folder / MODEL)
                record = Record(
                    kind="trial",
                    key=key,
                    training=trial.training,
                    config=config.flat(),
                    metrics=metrics,
                    views=(),
                    widths=_widths(small.model),
                    provenance=self.origin.provenance(self.device, watch.seconds),
                )
                self.store.write_record(folder, record)

    def _audit(self, trial: Trial, look: Look, watch: Stopwatch) -> None:
        """Measure in full what the first look stopped: the model that it left, not another."""
        with watch.during("load"):
            rays = self.validation(trial.training)
            assert rays is not None, "a trial that was stopped had rays to look at"
            stopped = self.store.read_record("trial", look.first_key)
            path = self.store.verified_file("trial", look.first_key, MODEL)
            model = load_model(path)[0].to(self.device)
        with watch.during("validate"):
            score = rays.score(model, self.sweep.protocol.precision)
        metrics = {
            **stopped.metrics,
            "validation_mse": score.mse,
            "validation_psnr": score.psnr,
            "render_seconds": score.seconds * rays.pixels_per_view / score.rays,
        }
        with watch.during("write"), self.store.writing("trial", trial.key) as folder:
            shutil.copy(path, folder / MODEL)
            provenance = self.origin.provenance(self.device, watch.seconds)
            audited = replace(stopped, key=trial.key, metrics=metrics, provenance=provenance)
            self.store.write_record(folder, audited)

    def _training_ssim(self, model: NerfModel) -> float:
        """SSIM of the first training view, whole: validation rays alone make no picture."""
        if self._training_view is None:
            scene = self.scene()
            only = replace(scene, test=scene.train[:1])
            self._training_view = HeldOut(only, self.device)
        found = self._training_view.evaluate(model, self.sweep.protocol.precision).ssim
        return math.nan if found is None else found

    def _write_renders(self, folder: Path, evaluation: Evaluation, truth: bool) -> None:
        held_out = self.held_out()
        for result in evaluation.views[: self.sweep.protocol.renders]:
            if result.picture is None:
                continue
            photo = held_out.photo(result.view)
            renders = folder / "renders"
            write_picture(renders / f"view_{result.view}.png", result.picture)
            write_picture(renders / f"error_{result.view}.png", error_map(result.picture, photo))
            if truth:
                write_picture(renders / f"truth_{result.view}.png", photo)


def lease_of_training(key: str) -> str:
    """Name of the lease that whoever trains a model holds."""
    return f"training-{key}"


def recipe_of(checkpoint: Record) -> Recipe:
    """The recipe that trained a model, as its record says."""
    names = {setting.name for setting in fields(Recipe)}
    return Recipe(**{name: v for name, v in checkpoint.config.items() if name in names})


def failure_of(error: BaseException, watch: Stopwatch) -> Failure:
    """A failure as it is recorded: the stage under way and the error in one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        reason = f"out of GPU memory: {_shortage(error)}"
    elif isinstance(error, PrunefieldError):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return Failure(watch.stage, " ".join(reason.split())[:2000])


def _shortage(error: torch.cuda.OutOfMemoryError) -> str:
    """What PyTorch says was wanted, and of how much; without its advice on its own settings."""
    wanted = str(error).split(" Including non-PyTorch memory")[0]
    return f"{wanted} Take fewer rays or samples, or give a worker more of a GPU (`resources`)"


def sizes(model: NerfModel, pruned: Mapping[str, Reduced]) -> dict[str, float]:
    """Sizes and cost of a model; `pruned` gives the report's count where a network was pruned.

    A network that both passes share counts once, as the fine one.
    """
    counts = {name: f.shape.parameters() for name, f in model.stored().items()}
    nonzero = {
        name: pruned[name].nonzero_parameters if name in pruned else count
        for name, count in counts.items()
    }
    return {
        "params": sum(counts.values()),
        **{f"params_{name}": count for name, count in counts.items()},
        "nonzero_bytes": BYTES_PER_PARAMETER * sum(nonzero.values()),
        **{f"nonzero_bytes_{name}": BYTES_PER_PARAMETER * n for name, n in nonzero.items()},
        "flops_per_ray": model.flops_per_ray(),
    }


def achieved_ratio(pruned: Mapping[str, Reduced]) -> float:
    """Fraction removed of the channels (with a mask, the weights) of the pruned networks."""
    return sum(p.removed for p in pruned.values()) / sum(p.total for p in pruned.values())


def material_of(model: NerfModel, scene: Scene, config: TrialConfig, validation: float) -> Material:
    """What a pruning of a model may look at, collected for it alone.

    Args:
        model: the model.
        scene: whose training views give the calibration set.
        config: the pruning; without a calibration set it looks at nothing.
        validation: the fraction of pixels that the model's training left out.
    """
    wanted = config.calibration
    if wanted is None:
        return Material()
    samples = partial(calibration_samples, model, scene, wanted, validation)
    if not config.needs.moments:
        return Material(None, samples)
    nested = calibrate(
        model,
        scene,
        [wanted.views],
        [wanted.rays],
        wanted.seed,
        config.needs.moments,
        config.needs.prunable,
        wanted.weighting,
        validation,
    )
    statistics = {name: of.subset((wanted.views, wanted.rays)) for name, of in nested.items()}
    return Material(statistics, samples)


def calibration_samples(
    model: NerfModel, scene: Scene, wanted: CalibrationSet, validation: float, network: str
) -> CalibrationSamples:
    """What one network sees on the rays of a calibration set (see `bridge.calibrate`)."""
    return CalibrationSamples(
        model,
        network,
        scene,
        cells([wanted.views], [wanted.rays]),
        wanted.seed,
        wanted.weighting,
        validation,
    )


def _scores(evaluation: Evaluation) -> dict[str, float]:
    scores = {
        "mse": evaluation.mse,
        "psnr": evaluation.psnr,
        "render_seconds": evaluation.render_seconds,
    }
    return scores if evaluation.ssim is None else {**scores, "ssim": evaluation.ssim}


def _views(evaluation: Evaluation) -> tuple[ViewScore, ...]:
    return tuple(ViewScore(v.view, v.mse, v.psnr, v.ssim, v.detail) for v in evaluation.views)


def _widths(model: NerfModel) -> dict[str, tuple[int, ...]]:
    return {name: f.shape.trunk for name, f in model.stored().items()}


def _stride(step: int, left: int) -> int:
    """How many iterations to go on: the last report of a training is of the same ones always."""
    return left if left <= LAST_ITERATIONS else min(step, left - LAST_ITERATIONS)


def _point(progress: Progress) -> dict[str, float]:
    return {
        "iteration": progress.iteration,
        "loss": progress.loss,
        "train_psnr": progress.train_psnr,
        "rate": progress.rate,
    }
