"""Training and rendering on the fused kernels (Triton; importing this module needs it).

A training step is a few dozen launches that never leave the device, captured as one CUDA graph:
rays of the iteration, coarse samples, coarse network, compositing with its gradients and the fine
samples, fine network, compositing, both networks backward, the optimisers, and the counting of the
step. The weights of the model are views of the kernels' flat vectors, so the model is always up to
date. Where several GPUs share a training, each works on its rays, and their gradients are summed
before the optimisers, within the graph.
"""

import math
from functools import lru_cache

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from nerf.backends import Resolved, power_of_two
from nerf.cameras import Rays
from nerf.devices import arithmetic
from nerf.encoding import encode
from nerf.errors import NerfError
from nerf.field import Field, FieldShape, NerfModel
from nerf.graphs import StepGraph, captured
from nerf.kernels import adam, rounded, volume
from nerf.kernels.mlp import FusedField, PackedField, compile_widths
from nerf.muon import MOMENTUM, orthogonalized
from nerf.pool import Batches
from nerf.recipe import WARMUP
from nerf.rendering import RenderSettings
from nerf.rows import Rows, stack_of
from nerf.sampling import strata
from nerf.steps import BETAS, EPSILON, Job, Losses, Moments

# Steps before one is captured: kernels compile and memory pools fill meanwhile.
STEPS_BEFORE_CAPTURE = 2
RAYS_A_PROGRAM = 16  # of `begin_step`
ERRORS_A_STEP = 1024  # of `end_step`
PARAMETERS_A_PROGRAM = 1024  # of `adam`
# What the kernels may differ from float32 on a fresh network, relative to its size: bf16 gives
# 4e-3 of its outputs and 1e-2 of its gradients; a kernel that is wrong gives about 1.
OUTPUT_TOLERANCE = 0.05
GRADIENT_TOLERANCE = 0.2


class FusedSteps:
    """Training steps on the fused kernels, see `nerf.steps.Steps`.

    Args:
        job: what to train; the weights of its model become views of this object's.

    Raises:
        NerfError: the kernels do not compute what they should here.
        Exception: whatever the compiler or the driver throws.
    """

    name: Resolved = "fused"

    def __init__(self, job: Job) -> None:
        model, recipe, pool, device = job.model, job.recipe, job.pool, job.device
        self.job = job
        check_kernels(device)
        self._batch = batch = job.batch
        first, stop = (0, batch) if job.share is None else job.share.bounds(batch)
        self._part, self._rays = slice(first, stop), stop - first
        rays = self._rays
        self._batches = Batches(pool, job.seed, batch, device, self._part)
        self._n_coarse, self._n_fine = model.samples.coarse, model.samples.fine
        n_all = self._n_coarse + self._n_fine
        self._coarse = FusedField(model.coarse.shape, rays, self._n_coarse, device)
        self._fine = FusedField(model.fine.shape, rays, n_all, device)
        self._fields = {"coarse": self._coarse, "fine": self._fine}

        def empty(*size: int) -> Tensor:
            return torch.zeros(*size, device=device)

        self._first = {name: empty(f.plan.count) for name, f in self._fields.items()}
        self._second = {name: empty(f.plan.count) for name, f in self._fields.items()}
        cosine = recipe.anneal == "cosine"
        self._constants = torch.tensor(
            [
                recipe.learning_rate,
                0.0 if cosine else math.log(recipe.decay) / recipe.decay_iterations,
                *(math.log(beta) for beta in BETAS),
                max(1.0, WARMUP * recipe.iterations) if cosine else 1.0,
                math.pi / recipe.iterations if cosine else 0.0,
            ],
            dtype=torch.float64,
            device=device,
        )
        self._schedule, self._sums = empty(5), empty(2)
        self._rows: dict[str, Rows] = {}
        if recipe.optimizer == "muon":
            self._lay_out_rows()
        settings = job.settings
        lower, upper = strata(self._n_coarse, settings.near, settings.far, device)
        self._strata = torch.stack((lower, upper - lower))
        # Drawn for the whole batch, whoever works on it.
        self._jitter, self._u = empty(batch, self._n_coarse), empty(batch, self._n_fine)
        self._coarse_noise, self._fine_noise = empty(batch, self._n_coarse), empty(batch, n_all)
        self._origins, self._directions, self._colors = (empty(rays, 3) for _ in range(3))
        self._lengths = empty(rays)
        # Both networks encode directions alike unless their shapes say otherwise.
        self._octaves = model.coarse.shape.direction_octaves
        if model.fine.shape.direction_octaves != self._octaves:
            raise NerfError("the networks encode directions differently")
        self._encoded = empty(rays, model.coarse.shape.direction_features)
        self._t_coarse, self._t_fine = empty(rays, self._n_coarse), empty(rays, n_all)
        self._coarse_errors, self._fine_errors = empty(rays), empty(rays)
        self._g = {name: (empty(*f.density.shape), empty(*f.rgb.shape))
                   for name, f in self._fields.items()}  # fmt: skip
        self._graph: StepGraph[None] | None = None
        self._eager_steps_left = STEPS_BEFORE_CAPTURE
        self._adopt()
        self._try()
        compile_widths(device, model.fine.shape)

    def _lay_out_rows(self) -> None:
        """What Muon needs: the rows of both networks, and room for all of their matrices."""
        matrices: list[tuple[int, ...]] = []
        for name, field in self._fields.items():
            rows = Rows(name, field.shape, field.plan, True, self.job.device, len(matrices))
            self._rows[name] = rows
            matrices += rows.matrix_sizes
        self._stack = stack_of(matrices, self.job.device)
        most = max(field.plan.count for field in self._fields.values())
        self._nothing = torch.zeros(most, device=self.job.device)

    def _adopt(self) -> None:
        """Make the model's weights views of the flat vectors."""
        for name, field in self.job.model.networks().items():
            fused = self._fields[name]
            fused.load(field)
            for parameter_name, parameter in field.named_parameters():
                parameter.data = fused.plan.view(fused.extended, parameter_name)

    def _try(self) -> None:
        """Run everything but the update once: what has to compile, compiles now."""
        job = self.job
        random_state = job.generator.get_state()
        with arithmetic("float32", job.device):
            order = self._batches.order
            order.copy_(torch.arange(len(order)))
            self._losses_and_gradients()
            if self._rows:
                self._by_rows(update=False)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        errors = torch.stack((self._coarse_errors, self._fine_errors))
        if not bool(torch.isfinite(errors).all()):
            raise NerfError("the fused kernels gave errors that are not finite")
        job.generator.set_state(random_state)

    # --- a step ----------------------------------------------------------------------------

    def run(self, first: int, count: int) -> Losses:
        """Run steps, see `nerf.steps.Steps.run`."""
        self._sums.zero_()
        with arithmetic("float32", self.job.device):
            for iteration in range(first, first + count):
                self._batches.prepare(iteration)
                if self._eager_steps_left == 0 and self.job.device.type == "cuda":
                    self._capture()
                self._eager_steps_left -= 1
                if self._graph is None:
                    self._step()
                else:
                    self._graph()
                self._batches.counted()
        sums = self._sums.clone()
        if self.job.share is not None:
            sums = self.job.share.total(sums * (self._rays / self._batch))
        coarse, fine = sums.unbind()
        return coarse, fine

    def _capture(self) -> None:
        self._graph, self.job.generator = captured(
            "training", self._step, self.job.generator, alone=self.job.share is None
        )

    def _step(self) -> None:
        self._losses_and_gradients()
        if self.job.share is not None:
            self.job.share.add_up([field.gradients for field in self._fields.values()])
        self._update()

    def _update(self) -> None:
        """What follows once the gradients of the whole batch are there."""
        if self._rows:
            self._by_rows(update=True)
        else:
            self._by_adam()
        volume.end_step[(1,)](
            self._batches.counter, self._coarse_errors, self._fine_errors, self._sums, self._rays,
            PADDED=ERRORS_A_STEP, num_warps=4,
        )  # fmt: skip

    def _by_adam(self) -> None:
        for name, field in self._fields.items():
            count = field.plan.count
            adam.adam[(triton.cdiv(count, PARAMETERS_A_PROGRAM),)](
                field.parameters, field.gradients, self._first[name], self._second[name],
                self._schedule, count, BETA_1=BETAS[0], BETA_2=BETAS[1], EPSILON=EPSILON,
                BLOCK=PARAMETERS_A_PROGRAM, num_warps=4,
            )  # fmt: skip

    def _by_rows(self, update: bool) -> None:
        """Muon for the matrices, Adam for the rest; without `update` nothing changes but gradients.

        The kernels are those of weights that are rounded in training; here none are.
        """
        unused = self._schedule
        height, width = self._stack.shape[1:]
        for name, field in self._fields.items():
            rows = self._rows[name]
            momentum = self._first[name] if update else self._nothing.clone()
            rounded.row_gradients[(rows.count,)](
                rows.table, field.parameters, field.gradients, self._nothing, unused, unused,
                unused, unused, momentum, self._stack, unused, height, width, BETA=MOMENTUM,
                ROUND=False, SQUEEZE=False, MUON=True, PADDED=rows.padded, num_warps=4,
            )  # fmt: skip
        self._stack.copy_(orthogonalized(self._stack))
        for name, field in self._fields.items():
            rows = self._rows[name]
            rounded.update_rows[(rows.count,)](
                rows.table, rows.factors, field.parameters, field.parameters, field.gradients,
                self._first[name], self._second[name], unused, unused, unused, unused,
                self._stack, self._schedule, unused, height, width, field.plan.count,
                BETA_1=BETAS[0], BETA_2=BETAS[1], EPSILON=EPSILON, UPDATE=update, ROUND=False,
                SQUEEZE=False, MUON=True, PADDED=rows.padded, num_warps=4,
            )  # fmt: skip

    def _losses_and_gradients(self) -> None:
        job = self.job
        noise_std = job.recipe.density_noise
        # In this order, as `nerf.rendering.RandomNumbers.draw` does.
        self._jitter.uniform_(generator=job.generator)
        if noise_std > 0:
            self._coarse_noise.normal_(generator=job.generator)
        self._u.uniform_(generator=job.generator)
        if noise_std > 0:
            self._fine_noise.normal_(generator=job.generator)
        rays = job.pool.rays
        volume.begin_step[(triton.cdiv(self._rays, RAYS_A_PROGRAM),)](
            self._batches.order, self._batches.counter, rays.origins, rays.directions,
            rays.view_directions, job.pool.colors, self._jitter[self._part], self._strata,
            self._origins, self._directions, self._lengths, self._colors, self._encoded,
            self._t_coarse, self._constants, self._schedule, self._batches.count, self._rays,
            self._n_coarse, self._octaves, PADDED=power_of_two(self._n_coarse),
            BLOCK=RAYS_A_PROGRAM, num_warps=4,
        )  # fmt: skip
        for field in self._fields.values():
            field.pack()
        self._coarse.forward(self._origins, self._directions, self._t_coarse, self._encoded)
        self._composite("coarse", self._t_coarse, self._coarse_noise, self._coarse_errors)
        self._fine.forward(self._origins, self._directions, self._t_fine, self._encoded)
        self._composite("fine", self._t_fine, self._fine_noise, self._fine_errors)
        for name, field in self._fields.items():
            field.backward(*self._g[name])

    def _composite(self, network: str, t: Tensor, noise: Tensor, errors: Tensor) -> None:
        """Errors and gradients of one pass; behind the coarse one, the samples of the fine one."""
        field, coarse = self._fields[network], network == "coarse"
        g_density, g_rgb = self._g[network]
        samples = t.shape[1]
        noise, u = noise[self._part], self._u[self._part]
        volume.composite[(self._rays,)](
            field.density, field.rgb, t, self._lengths, noise, u, self._colors, errors,
            g_density, g_rgb, self._t_fine, t, t, samples, self._n_fine, samples, self._n_fine,
            self.job.recipe.density_noise, 1.0 / (3 * self._batch), TRAIN=True, COLOR=False,
            WHITE=self.job.settings.white_background, IMPORTANCE=coarse,
            ASCENDING=False, SPLIT=False, PADDED=power_of_two(samples),
            DRAWN=power_of_two(self._n_fine) if coarse else 1, num_warps=4 if coarse else 1,
        )  # fmt: skip

    # --- state -----------------------------------------------------------------------------

    def moments(self) -> Moments:
        """Where the optimisers stand, see `nerf.steps.Steps.moments`."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        matrices = {name for rows in self._rows.values() for name in rows.matrices}
        for network, field in self._fields.items():
            for parameter in field.plan.parameters:
                name = f"{network}.{parameter}"
                first = field.plan.view(self._first[network], parameter)
                second = field.plan.view(self._second[network], parameter)
                found[name] = first, None if name in matrices else second
        return found

    def restore(self, iteration: int, moments: Moments) -> None:
        """Go on from elsewhere, see `nerf.steps.Steps.restore`."""
        self._batches.go_to(iteration)
        for name, own in self.moments().items():
            for mine, other in zip(own, moments.get(name, (None, None)), strict=True):
                if mine is None:
                    continue
                if other is None:
                    mine.zero_()
                else:
                    mine.copy_(other)
        self._graph = None
        self._eager_steps_left = STEPS_BEFORE_CAPTURE


class FusedRenderer:
    """Renders rays with a model packed for the kernels: no jitter, no noise, one picture.

    Args:
        model: the networks, on the device; later changes of their weights are not seen.
        settings: bounds and background.

    Raises:
        NerfError: the kernels do not compute what they should here.
        Exception: whatever the compiler or the driver throws.
    """

    def __init__(self, model: NerfModel, settings: RenderSettings) -> None:
        check_kernels(model.device)
        self._settings, self._samples, self._device = settings, model.samples, model.device
        self._coarse = PackedField(model.coarse)
        self._fine = self._coarse if model.shared else PackedField(model.fine)
        self._t = torch.linspace(
            settings.near, settings.far, model.samples.coarse, device=model.device
        )
        self._u = torch.linspace(0.0, 1.0, model.samples.fine, device=model.device)
        self._spread: Tensor | None = None

    @property
    def bytes_per_ray(self) -> int:
        """Memory that a ray takes while it is rendered."""
        n_coarse = self._samples.coarse
        n_all = n_coarse + self._samples.fine
        columns = self._fine.plan.view_columns + self._coarse.plan.view_columns
        features = self._fine.shape.direction_features + self._coarse.shape.direction_features
        # t, density and colour of both passes; rays, shares and encoded directions.
        return 4 * (5 * n_coarse + 5 * n_all + 2 * columns + 3 * features + 16)

    @torch.no_grad()
    def __call__(self, rays: Rays) -> Float[Tensor, "rays 3"]:
        """Colours by the fine pass, clamped to [0, 1].

        Args:
            rays: on the model's device.
        """
        count, samples = len(rays), self._samples
        origins, directions = rays.origins.contiguous(), rays.directions.contiguous()
        lengths = directions.norm(dim=-1)
        t_fine = torch.empty(count, samples.coarse + samples.fine, device=self._device)
        if self._spread is None or len(self._spread) < count:
            self._spread = self._t.repeat(count, 1)
        t_coarse = self._spread[:count]
        with arithmetic("float32", self._device):
            density, rgb = self._coarse(origins, directions, t_coarse, rays.view_directions)
            self._composite(density, rgb, t_coarse, lengths, t_fine, None)
            density, rgb = self._fine(origins, directions, t_fine, rays.view_directions)
        colors = torch.empty(count, 3, device=self._device)
        self._composite(density, rgb, t_fine, lengths, t_fine, colors)
        return colors

    def _composite(
        self,
        density: Tensor,
        rgb: Tensor,
        t: Tensor,
        lengths: Tensor,
        merged: Tensor,
        colors: Tensor | None,
    ) -> None:
        """The colours, or where there are none to write, the samples of the fine pass."""
        samples, drawn = t.shape[1], self._samples.fine
        unused = lengths
        volume.composite[(len(t),)](
            density, rgb, t, lengths, unused, self._u, unused,
            unused if colors is None else colors, unused, unused, merged, unused, unused, samples,
            drawn, samples, 0, 0.0, 0.0, TRAIN=False, COLOR=colors is not None,
            WHITE=self._settings.white_background, IMPORTANCE=colors is None, ASCENDING=True,
            SPLIT=False, PADDED=power_of_two(samples),
            DRAWN=power_of_two(drawn) if colors is None else 1, num_warps=1,
        )  # fmt: skip


# Layers of one to four chunks of columns, odd ones too: what the kernels distinguish.
CHECKED = FieldShape(trunk=(256, 170, 128, 40), skip=1, feature=60, view=128)


def check_kernels(device: torch.device) -> None:
    """Compare the kernels with PyTorch on a fresh network, once a process and device.

    Compilers and drivers differ from machine to machine; a network that trains on wrong gradients
    would show it only after hours.

    Raises:
        NerfError: they cannot be compiled, or differ by more than bfloat16 explains.
    """
    fault = _fault(device)
    if fault is not None:
        raise NerfError(fault)


@lru_cache(maxsize=8)
def _fault(device: torch.device, rays: int = 3, samples: int = 43) -> str | None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        field = Field(CHECKED)
        values = [torch.rand(rays, 3), torch.rand(rays, 3), torch.rand(rays, samples)]
        weights = [torch.rand(rays, samples), torch.rand(rays, samples, 3)]
    field.to(device)
    origins, directions, t = (value.to(device) for value in values)
    g_density, g_rgb = (value.to(device) for value in weights)
    unit = directions / directions.norm(dim=-1, keepdim=True)
    with arithmetic("float32", device):
        points = origins[:, None, :] + directions[:, None, :] * t[..., None]
        with torch.inference_mode(mode=False), torch.enable_grad():
            expected = field(points, unit)
            torch.autograd.backward(expected, (g_density, g_rgb))
        try:
            packed = PackedField(field)(origins, directions, t, unit)
            fused = FusedField(CHECKED, rays, samples, device)
            fused.load(field)
            trained = fused.forward(origins, directions, t, encode(unit, CHECKED.direction_octaves))
            fused.backward(g_density, g_rgb)
            for name, found in (("evaluation", packed), ("training", trained)):
                for one, other in zip(found, expected, strict=True):
                    _compare(f"outputs in {name}", one, other.detach(), OUTPUT_TOLERANCE)
            for name, parameter in field.named_parameters():
                assert parameter.grad is not None
                gradient = fused.plan.view(fused.extended_gradients, name)
                _compare(f"gradients of {name}", gradient, parameter.grad, GRADIENT_TOLERANCE)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver throws
            return f"{type(error).__name__}: {error}"
    return None


def _compare(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error < tolerance:
        raise NerfError(f"the fused kernels compute {what} wrongly here (error {error:.2g})")
