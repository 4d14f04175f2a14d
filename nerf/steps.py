"""Training steps: what a `Trainer` repeats, in plain PyTorch or compiled.

`nerf.fused` has the same on the fused kernels. All of them see the same rays and draw the same
random numbers in the same order (jitter of the coarse samples, their density noise, places of the
fine samples, density noise of all), so that runs of different backends can be compared step by step
and a training may go on with another one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nerf.backends import Resolved
from nerf.cameras import Rays
from nerf.devices import arithmetic, keep_freed_memory
from nerf.field import NerfModel
from nerf.graphs import StepGraph, captured
from nerf.muon import Muon, for_muon
from nerf.pool import RayPool
from nerf.recipe import Recipe
from nerf.rendering import RandomNumbers, RenderSettings, render_rays
from nerf.sampling import Draws, ShareOfDraws
from nerf.shares import Share

BETAS = (0.9, 0.999)
EPSILON = 1e-8
# Steps that run eagerly before one is captured: libraries load and memory pools fill meanwhile.
STEPS_BEFORE_CAPTURE = 5
# Evaluations that a part of a batch has on a CPU: 256 channels of them in bf16 are 4 MiB, a cache.
CPU_ROWS = 8192

Losses = tuple[Float[Tensor, ""], Float[Tensor, ""]]
Moments = Mapping[str, tuple[Tensor, Tensor | None]]
"""Of each weight: Adam's first and second moment, or Muon's momentum and nothing."""


@dataclass
class Job:
    """What is to be trained, and on what.

    Attributes:
        model: the networks, on the device; a step changes their weights in place.
        pool: the training rays.
        settings: bounds and background.
        recipe: how.
        seed: of the order of the rays.
        device: where.
        generator: random numbers of the steps, on the device.
        share: which part of every batch is this process's; None for all of it.
    """

    model: NerfModel
    pool: RayPool
    settings: RenderSettings
    recipe: Recipe
    seed: int
    device: torch.device
    generator: torch.Generator
    share: Share | None = None

    @property
    def batch(self) -> int:
        """Rays of an iteration, in all processes together."""
        return min(self.recipe.rays, len(self.pool))

    def pick(self, iteration: int) -> Int[Tensor, " rays"]:
        """The numbers of this process's rays of an iteration."""
        picked = self.pool.pick(self.seed, iteration, self.recipe.rays)
        return picked if self.share is None else self.share.part(picked)

    def draws(self) -> Draws:
        """Where this process's random numbers come from."""
        if self.share is None:
            return self.generator
        return ShareOfDraws(self.generator, self.batch, self.share.bounds(self.batch)[0])

    def matrices(self) -> tuple[str, ...]:
        """The names of the weights that Muon trains; none if the recipe is Adam's."""
        return for_muon(self.parameters()) if self.recipe.optimizer == "muon" else ()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """All weights by name, e.g. ``fine.trunk.0.weight``."""
        return {
            f"{network}.{name}": parameter
            for network, field in self.model.networks().items()
            for name, parameter in field.named_parameters()
        }


@runtime_checkable
class Steps(Protocol):
    """Runs training steps."""

    name: Resolved

    def run(self, first: int, count: int) -> Losses:
        """Run `count` steps from iteration `first` on.

        Returns:
            The coarse and the fine MSE, each summed over the steps, on the device.
        """

    def moments(self) -> Moments:
        """Where the optimisers stand, by weight; empty before the first step."""

    def restore(self, iteration: int, moments: Moments) -> None:
        """Go on from other weights (already in place), moments and random state."""


class EagerSteps:
    """Steps in plain PyTorch; on a GPU replayed as one CUDA graph.

    Args:
        job: what to train.
        graph: whether a graph may be used.
        compiled: whether the losses go through `torch.compile`.
    """

    def __init__(self, job: Job, graph: bool = True, compiled: bool = False) -> None:
        self.name: Resolved = "compiled" if compiled else "eager"
        self.job = job
        self._on_gpu = job.device.type == "cuda"
        keep_freed_memory(job.device)
        self._parameters = job.parameters()
        rate = job.recipe.learning_rate
        matrices = job.matrices()
        self._muon = Muon({n: self._parameters[n] for n in matrices}) if matrices else None
        self._by_adam = {n: p for n, p in self._parameters.items() if n not in matrices}
        self._optimizer = torch.optim.Adam(
            list(self._by_adam.values()),
            # In a tensor of the device, a captured step reads it anew each time.
            lr=torch.tensor(rate, device=job.device) if self._on_gpu else rate,
            betas=BETAS,
            eps=EPSILON,
            fused=True,
            capturable=self._on_gpu,
        )
        self._losses: Callable[..., Losses] = losses
        if compiled:
            self._losses = torch.compile(losses, dynamic=False)
        self._may_capture = self._on_gpu and graph
        self._reset_capture()

    def tried(self) -> "EagerSteps":
        """The same, once it is known to work: what it compiles, it compiles now.

        Raises:
            Exception: whatever the compiler throws.
        """
        job = self.job
        picked = job.pick(0)
        random_state = job.generator.get_state()
        with arithmetic(job.recipe.precision, job.device):
            self._backward(picked)
        self._forget_gradients()
        job.generator.set_state(random_state)
        return self

    def run(self, first: int, count: int) -> Losses:
        """Run steps, see `Steps.run`."""
        coarse_sum = torch.zeros((), device=self.job.device)
        fine_sum = torch.zeros((), device=self.job.device)
        with arithmetic(self.job.recipe.precision, self.job.device):
            for iteration in range(first, first + count):
                coarse_mse, fine_mse = self._step(iteration)
                coarse_sum += coarse_mse
                fine_sum += fine_mse
        return coarse_sum, fine_sum

    def _step(self, iteration: int) -> Losses:
        job = self.job
        picked = job.pick(iteration)
        rate = job.recipe.rate(iteration)
        for group in self._optimizer.param_groups:
            if self._on_gpu:
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self._eager_steps_left == 0:
            self._capture(picked)
        self._eager_steps_left -= 1
        return self._update(picked) if self._graph is None else self._graph(picked)

    def _reset_capture(self) -> None:
        self._graph: StepGraph[Losses] | None = None
        self._eager_steps_left = STEPS_BEFORE_CAPTURE if self._may_capture else -1

    def _capture(self, picked: Int[Tensor, " rays"]) -> None:
        job = self.job
        self._graph, job.generator = captured(
            "training", self._update, job.generator, picked, alone=job.share is None
        )

    def _backward(self, picked: Int[Tensor, " rays"]) -> Losses:
        """Gradients of the losses; on a CPU part by part, so that activations stay in the cache."""
        job = self.job
        rays, colors = job.pool.rays[picked], job.pool.colors[picked]
        samples = job.model.samples
        drawn = RandomNumbers.draw(
            len(rays), samples, job.draws(), job.recipe.density_noise, job.device
        )
        size = len(rays)
        if not self._on_gpu:
            size = max(1, CPU_ROWS // (samples.coarse + samples.fine))
        sums: list[Tensor] = []
        for part in even_parts(len(rays), size):
            found = self._losses(job.model, rays[part], colors[part], job.settings, drawn[part])
            # The mean over the whole batch is the sum of the parts' means, each by its rays.
            share = (part.stop - part.start) / job.batch
            coarse_mse, fine_mse = found[0] * share, found[1] * share
            (coarse_mse + fine_mse).backward()
            both = [coarse_mse.detach(), fine_mse.detach()]
            sums = [a + b for a, b in zip(sums, both, strict=True)] if sums else both
        return sums[0], sums[1]

    def _forget_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _update(self, picked: Int[Tensor, " rays"]) -> Losses:
        self._forget_gradients()
        losses = self._backward(picked)
        if self.job.share is not None:
            losses = self.job.share.sum_up(list(self._parameters.values()), losses)
        if self._muon is not None:
            self._muon.step(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        return losses

    def moments(self) -> Moments:
        """Where the optimisers stand, see `Steps.moments`."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {
            name: (state["exp_avg"], state["exp_avg_sq"])
            for name, parameter in self._by_adam.items()
            if (state := self._optimizer.state.get(parameter))
        }
        if self._muon is not None and found:
            found |= {name: (of, None) for name, of in self._muon.momentum.items()}
        return found

    def restore(self, iteration: int, moments: Moments) -> None:
        """Go on from elsewhere, see `Steps.restore`."""
        state = {
            index: {
                "step": torch.tensor(float(iteration)),
                "exp_avg": moments[name][0],
                "exp_avg_sq": moments[name][1],
            }
            for index, name in enumerate(self._by_adam)
            if iteration > 0
        }
        if self._muon is not None:
            for name, momentum in self._muon.momentum.items():
                momentum.copy_(moments[name][0]) if iteration > 0 else momentum.zero_()
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._reset_capture()


def losses(
    model: NerfModel,
    rays: Rays,
    colors: Float[Tensor, "rays 3"],
    settings: RenderSettings,
    drawn: RandomNumbers,
) -> Losses:
    """MSE of the coarse and of the fine colours."""
    coarse, fine = render_rays(model, rays, settings, drawn=drawn)
    return (coarse.rgb - colors).square().mean(), (fine.rgb - colors).square().mean()


def even_parts(count: int, size: int) -> list[slice]:
    """Cut `count` things into parts of at most `size`, all of one size but for one thing."""
    parts = max(1, -(-count // size))
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
