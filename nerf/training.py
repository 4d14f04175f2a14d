"""Training: the original recipe, in a loop that can stop and go on anywhere.

The same scene, shape, recipe and seed give the same run, interrupted or not: what rays an iteration
sees follows from the seed and its number, and the state that is saved holds the random generator.
"""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nerf.cameras import Rays, view_rays
from nerf.devices import PRECISIONS, Precision, arithmetic
from nerf.errors import CheckpointError, TrainingError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.files import read_tensors, write_tensors
from nerf.graphs import StepGraph
from nerf.metrics import psnr
from nerf.rendering import RenderSettings, render_rays
from nerf.sampling import Draws, ShareOfDraws
from nerf.scenes.scene import Scene
from nerf.shares import Share
from nerf.validation import training_pixels

log = logging.getLogger(__name__)

Backend = Literal["auto", "eager"]
# Steps that run eagerly before one is captured: libraries load and memory pools fill meanwhile.
STEPS_BEFORE_CAPTURE = 5


@dataclass(frozen=True)
class Recipe:
    """How a NeRF is trained.

    Attributes:
        iterations: optimiser steps.
        rays: rays an iteration, drawn from all training views, each at most once an epoch.
        learning_rate: of Adam, at the start.
        decay: factor by which the learning rate falls every `decay_iterations`, exponentially.
        decay_iterations: see `decay`.
        density_noise: standard deviation of the noise added to the raw density.
        precision: arithmetic of the linear layers.
        validation: fraction of the pixels of each training view that is never drawn, see
            `nerf.validation`.

    Source: Mildenhall et al. 2020, section 5.3, with the numbers of its fern configuration.
    """

    iterations: int = 200_000
    rays: int = 1024
    learning_rate: float = 5e-4
    decay: float = 0.1
    decay_iterations: int = 250_000
    density_noise: float = 1.0
    precision: Precision = "float32"
    validation: float = 0.0

    def __post_init__(self) -> None:
        for name in ("iterations", "rays", "learning_rate", "decay", "decay_iterations"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if not self.density_noise >= 0:
            raise ValueError(f"density_noise must not be negative, got {self.density_noise!r}")
        if not 0.0 <= self.validation < 1.0:
            raise ValueError(f"validation must be a fraction in [0, 1), got {self.validation!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")


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


class RayPool:
    """All training rays of a scene with their colours, on one device.

    An epoch is a seeded permutation of them, cut into whole batches; the few rays that are left
    over sit that epoch out. Iteration i takes the i-th batch.

    Args:
        scene: the scene.
        device: where the rays are kept.
        validation: fraction of the pixels of each view that is left out.
    """

    def __init__(self, scene: Scene, device: torch.device, validation: float = 0.0) -> None:
        views = []
        for view in scene.train:
            pose = torch.as_tensor(scene.poses[view], dtype=torch.float32)
            views.append(view_rays(scene.camera, pose.to(device)))
        self.rays = Rays.concatenate(views)
        photos = torch.as_tensor(scene.images[list(scene.train)], dtype=torch.float32)
        self.colors = photos.reshape(-1, 3).to(device)
        if validation > 0.0:
            free = torch.cat([training_pixels(scene, validation, view) for view in scene.train])
            left = free.nonzero().flatten().to(device)
            self.rays, self.colors = self.rays[left], self.colors[left]
        self._order: tuple[tuple[int, int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.rays)

    def batch(self, seed: int, iteration: int, size: int) -> tuple[Rays, Float[Tensor, "rays 3"]]:
        """The rays and colours of one iteration."""
        picked = self.pick(seed, iteration, size)
        return self.rays[picked], self.colors[picked]

    def pick(self, seed: int, iteration: int, size: int) -> Int[Tensor, " rays"]:
        """The numbers of the rays of one iteration."""
        size = min(size, len(self))
        epoch, place = divmod(iteration, len(self) // size)
        if self._order is None or self._order[0] != (seed, epoch):
            generator = torch.Generator().manual_seed(_mix(seed, epoch))
            order = torch.randperm(len(self), generator=generator)
            self._order = ((seed, epoch), order.to(self.colors.device))
        return self._order[1][place * size : (place + 1) * size]


def _mix(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number * 7_919 + 1) % 2**63


class Trainer:
    """A training that can be advanced, saved and continued.

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
        self._share = share
        self.seed = seed
        self.device = device or torch.device("cpu")
        self.settings = RenderSettings(scene.near, scene.far, scene.white_background)
        self._on_gpu = self.device.type == "cuda"
        self.model = NerfModel.create(shape, samples, seed).to(self.device)
        self.pool = RayPool(scene, self.device, recipe.validation)
        self.iteration = 0
        self._parameters = [
            (f"{network}.{name}", parameter)
            for network, field in self.model.networks().items()
            for name, parameter in field.named_parameters()
        ]
        self._optimizer = torch.optim.Adam(
            [parameter for _, parameter in self._parameters],
            # In a tensor of the device, a captured step reads it anew each time.
            lr=torch.tensor(recipe.learning_rate, device=self.device)
            if self._on_gpu
            else recipe.learning_rate,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
            capturable=self._on_gpu,
        )
        self._may_capture = self._on_gpu and backend == "auto"
        self._reset_capture()
        self._generator = torch.Generator(self.device).manual_seed(_mix(seed, 2**31))

    @property
    def done(self) -> bool:
        """Whether the recipe's iterations are through."""
        return self.iteration >= self.recipe.iterations

    def learning_rate(self) -> float:
        """The learning rate of the next iteration."""
        recipe = self.recipe
        return recipe.learning_rate * recipe.decay ** (self.iteration / recipe.decay_iterations)

    def step(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One iteration; gives the coarse and the fine MSE without waiting for the device."""
        picked = self.pool.pick(self.seed, self.iteration, self.recipe.rays)
        if self._share is not None:
            picked = self._share.part(picked)
        for group in self._optimizer.param_groups:
            if self._on_gpu:
                group["lr"].fill_(self.learning_rate())
            else:
                group["lr"] = self.learning_rate()
        if self._eager_steps_left == 0:
            self._capture(picked)
        self._eager_steps_left -= 1
        losses = self._update(picked) if self._graph is None else self._graph(picked)
        self.iteration += 1
        return losses

    def _reset_capture(self) -> None:
        self._graph: StepGraph | None = None
        self._eager_steps_left = STEPS_BEFORE_CAPTURE if self._may_capture else -1

    def _capture(self, picked: Int[Tensor, " rays"]) -> None:
        torch.cuda.synchronize(self.device)
        random_state = self._generator.get_state()
        try:
            self._graph = StepGraph(
                self._update, picked, self._generator, alone=self._share is None
            )
        except RuntimeError as error:
            # A failed capture leaves its generator unusable.
            self._generator = torch.Generator(self.device)
            self._generator.set_state(random_state)
            log.warning("training without a CUDA graph, which is slower: %s", error)

    def _update(self, picked: Int[Tensor, " rays"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        rays, colors = self.pool.rays[picked], self.pool.colors[picked]
        draws: Draws = self._generator
        total = min(self.recipe.rays, len(self.pool))
        if self._share is not None:
            draws = ShareOfDraws(self._generator, total, self._share.bounds(total)[0])
        coarse, fine = render_rays(
            self.model, rays, self.settings, draws, self.recipe.density_noise
        )
        coarse_mse = (coarse.rgb - colors).square().mean()
        fine_mse = (fine.rgb - colors).square().mean()
        self._optimizer.zero_grad(set_to_none=True)
        if self._share is None:
            (coarse_mse + fine_mse).backward()
            self._optimizer.step()
            return coarse_mse.detach(), fine_mse.detach()
        # The mean over the whole batch is the sum of the parts' means, each by its rays.
        part = len(rays) / total
        coarse_mse, fine_mse = coarse_mse * part, fine_mse * part
        (coarse_mse + fine_mse).backward()
        coarse_mse, fine_mse = self._share.sum_up(
            [parameter for _, parameter in self._parameters],
            (coarse_mse.detach(), fine_mse.detach()),
        )
        self._optimizer.step()
        return coarse_mse, fine_mse

    def advance(self, iterations: int) -> Progress:
        """Run some iterations (fewer when the recipe ends before).

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        count = min(iterations, self.recipe.iterations - self.iteration)
        coarse_sum = torch.zeros((), device=self.device)
        fine_sum = torch.zeros((), device=self.device)
        with arithmetic(self.recipe.precision, self.device):
            for _ in range(count):
                coarse_mse, fine_mse = self.step()
                coarse_sum += coarse_mse
                fine_sum += fine_mse
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
        """Write everything needed to go on: weights, Adam's moments, random state, iteration.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {"generator": self._generator.get_state()}
        for name, parameter in self._parameters:
            tensors[f"weights.{name}"] = parameter.detach()
            moments = self._optimizer.state.get(parameter)
            if moments:
                tensors[f"first.{name}"] = moments["exp_avg"]
                tensors[f"second.{name}"] = moments["exp_avg_sq"]
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
        kinds = ("weights", "first", "second") if iteration > 0 else ("weights",)
        wanted = {f"{kind}.{name}": p.shape for kind in kinds for name, p in self._parameters}
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
        self._generator.set_state(tensors["generator"])
        state = {}
        for index, (name, parameter) in enumerate(self._parameters):
            with torch.no_grad():
                parameter.copy_(tensors[f"weights.{name}"])
            if iteration > 0:
                state[index] = {
                    "step": torch.tensor(float(iteration)),
                    "exp_avg": tensors[f"first.{name}"],
                    "exp_avg_sq": tensors[f"second.{name}"],
                }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._reset_capture()
        self.iteration = iteration
