"""Training: the original recipe, in a loop that can stop and go on anywhere.

The same scene, shape, recipe and seed give the same run, interrupted or not: what rays an iteration
sees follows from the seed and its number, and the state that is saved holds the random generator.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from nerf.backends import Backend, choose, fall_back
from nerf.errors import CheckpointError, TrainingError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.files import read_tensors, write_tensors
from nerf.metrics import psnr
from nerf.pool import RayPool, mix
from nerf.recipe import Recipe
from nerf.rendering import RenderSettings
from nerf.scenes.scene import Scene
from nerf.shares import Share
from nerf.steps import EagerSteps, Job, Steps

__all__ = ["Backend", "Progress", "RayPool", "Recipe", "Trainer"]


@dataclass(frozen=True)
class Progress:
    """Where a training stands.

    Attributes:
        iteration: optimiser steps done.
        loss: coarse + fine MSE on training rays, mean over the steps since the last report.
        train_psnr: of the fine pass on the same rays, in dB.
        seconds: wall time of those steps.
        rate: iterations a second over them.
    """

    iteration: int
    loss: float
    train_psnr: float
    seconds: float
    rate: float


class Trainer:
    """A training that can be advanced, saved and continued.

    Args:
        scene: what to learn.
        shape: widths of both networks.
        samples: samples a ray.
        recipe: how.
        seed: of the weights, the order of the rays, and all random numbers.
        device: where; the CPU when None.
        backend: how the networks are run; `backend` then says what was chosen.
        share: this process's part of a training that several share.

    Example:
        >>> trainer = Trainer(scene, FieldShape(), SampleCounts(), Recipe(iterations=1000), seed=0)
        >>> trainer.advance(100).train_psnr  # doctest: +SKIP
    """

    def __init__(
        self,
        scene: Scene,
        shape: FieldShape,
        samples: SampleCounts,
        recipe: Recipe,
        seed: int,
        device: torch.device | None = None,
        backend: Backend = "auto",
        share: Share | None = None,
    ) -> None:
        self.recipe = recipe
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.settings = RenderSettings(scene.near, scene.far, scene.white_background)
        self.model = NerfModel.create(shape, samples, seed).to(self.device)
        self.pool = RayPool(scene, self.device, recipe.validation)
        self.iteration = 0
        self._job = Job(
            self.model,
            self.pool,
            self.settings,
            recipe,
            seed,
            self.device,
            torch.Generator(self.device).manual_seed(mix(seed, 2**31)),
            share,
        )
        self._steps = steps_for(self._job, backend)

    @property
    def backend(self) -> str:
        """How the networks are run: eager, compiled or fused."""
        return self._steps.name

    @property
    def done(self) -> bool:
        """Whether the recipe's iterations are through."""
        return self.iteration >= self.recipe.iterations

    def learning_rate(self) -> float:
        """The learning rate of the next iteration."""
        return self.recipe.rate(self.iteration)

    def step(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One iteration; gives the coarse and the fine MSE without waiting for the device."""
        return self._run(1)

    def _run(self, count: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        sums = self._steps.run(self.iteration, count)
        self.iteration += count
        return sums

    def advance(self, iterations: int) -> Progress:
        """Run some iterations (fewer when the recipe ends before).

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        count = min(iterations, self.recipe.iterations - self.iteration)
        coarse_sum, fine_sum = self._run(count)
        fine = float(fine_sum) / max(count, 1)
        loss = float(coarse_sum) / max(count, 1) + fine
        seconds = time.perf_counter() - started
        if not math.isfinite(loss):
            raise TrainingError(
                f"the training diverged: the loss is {loss} after iteration {self.iteration}; "
                f"lower the learning rate (now {self.recipe.learning_rate}) or try another seed"
            )
        return Progress(self.iteration, loss, psnr(fine), seconds, count / max(seconds, 1e-9))

    # --- state -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything needed to go on: weights, moments, random state, iteration.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {"generator": self._job.generator.get_state()}
        moments = self._steps.moments() if self.iteration > 0 else {}
        for name, parameter in self._job.parameters().items():
            tensors[f"weights.{name}"] = parameter.detach()
            if name in moments:
                first, second = moments[name]
                tensors[f"first.{name}"] = first
                if second is not None:
                    tensors[f"second.{name}"] = second
        write_tensors(path, tensors, {"iteration": self.iteration, "seed": self.seed})

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or of another training.
        """
        tensors, metadata = read_tensors(path)
        iteration = metadata.get("iteration")
        if metadata.get("seed") != self.seed or not isinstance(iteration, int):
            raise CheckpointError(f"{path} is not a state of this training (seed {self.seed})")
        # Everything is checked before anything is changed, so that a training whose state cannot
        # be used can still begin from the start.
        parameters = self._job.parameters()
        by_adam = parameters.keys() - self._job.matrices()
        kinds = {"weights": parameters, "first": parameters, "second": by_adam}
        wanted = {
            f"{kind}.{name}": parameters[name].shape
            for kind, names in kinds.items()
            if kind == "weights" or iteration > 0
            for name in names
        }
        found = {name: t.shape for name, t in tensors.items() if name != "generator"}
        wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        if wrong:
            raise CheckpointError(
                f"{path} is a state of networks of another shape: {', '.join(wrong[:3])}"
            )
        try:
            torch.Generator(self.device).set_state(tensors["generator"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(
                f"{path} holds the random state of another kind of device; it can only be "
                f"continued where it was begun, not on {self.device} ({error})"
            ) from error
        self._job.generator.set_state(tensors["generator"])
        for name, parameter in parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weights.{name}"])
        moments = {
            name: (tensors[f"first.{name}"], tensors.get(f"second.{name}"))
            for name in parameters
            if iteration > 0
        }
        self._steps.restore(iteration, moments)
        self.iteration = iteration


def steps_for(job: Job, backend: Backend) -> Steps:
    """The steps of a training on the backend that can run it, see `nerf.backends`."""
    model, recipe = job.model, job.recipe
    shapes = [field.shape for field in model.networks().values()]
    chosen = choose(backend, job.device, recipe.precision, shapes, model.samples)
    if chosen == "eager":
        return EagerSteps(job)
    random_state = job.generator.get_state()
    steps: Steps | None = None
    try:
        if chosen == "fused":
            from nerf.fused import FusedSteps  # noqa: PLC0415  (needs Triton)

            steps = FusedSteps(job)
        else:
            steps = EagerSteps(job, compiled=True).tried()
    except Exception as error:  # whatever a compiler or a driver throws
        fall_back(chosen, error)
    if job.share is not None and not job.share.all_can(steps is not None, job.device):
        if steps is not None:
            fall_back(chosen, "another process of this training cannot run it")
        steps = None
    if steps is None:
        job.generator.set_state(random_state)
        return EagerSteps(job)
    return steps
