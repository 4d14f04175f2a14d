"""Recovery: a short training of a pruned model, on photos, on what its teacher says, or both.

The teacher is the dense model. Along the same rays, at the same samples, it says what density and
colour belong there and what colour the ray has; unlike photos it can be asked about rays that
nobody photographed. A network that both passes share is evaluated once at the coarse samples, and
what it says there serves both passes.

Letters: σ density, α = 1 − exp(−relu(σ) δ) the opacity of a sample, w its render weight, c its
colour, C a ray's colour; S the student (the pruned model), T the teacher.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from nerf import sampling
from nerf.backends import Backend, choose, fall_back
from nerf.cameras import Rays
from nerf.devices import PRECISIONS, Precision, arithmetic
from nerf.errors import CheckpointError, TrainingError
from nerf.field import Field, NerfModel
from nerf.files import read_tensors, write_tensors
from nerf.graphs import StepGraph
from nerf.invented import InventedRays
from nerf.metrics import psnr
from nerf.rendering import LAST_DISTANCE, Pass, RenderSettings, composite
from nerf.rounding import RoundedLayer, coded_bits, round_network
from nerf.scenes.scene import Scene
from nerf.steps import STEPS_BEFORE_CAPTURE
from nerf.training import Progress, RayPool

log = logging.getLogger(__name__)

Source = Literal["photos", "distill", "both"]
Schemes = Mapping[str, Mapping[str, str]]
Asked = Callable[..., tuple[Tensor, Tensor]]
"""A network on the fused kernels, see `nerf.fused_network`."""

SHARED_COARSE = 0.1
"""How much the coarse picture of a shared network counts: it only has to place samples."""
OPACITY_WEIGHT = 0.1
"""How much the error of opacities counts beside those of colours, see `distillation_loss`."""
SQUEEZED_BY = 0.6
"""The part of the rounded iterations after which codes are to take no more bits than allowed."""
FIRST_PRICE = 3e-4
"""What bits cost at first beside an MSE, see `Recovery.squeeze`."""
PRICE_RATE = 60.0
"""How fast the price follows the excess: by so much over all rounded iterations together."""
INVENTED_SHARE = 0.5
"""Share of an iteration's rays that are invented, where a teacher says what they look like."""


@dataclass(frozen=True)
class RecoveryRecipe:
    """How a pruned model is trained again.

    The learning rate rises linearly over the first `warmup` of all iterations and falls to 0 along
    a half cosine.

    Attributes:
        iterations: optimiser steps.
        source: what is learnt from: ``photos``, ``distill`` (the dense model) or ``both``.
        learning_rate: of Adam, at its highest.
        rays: rays an iteration.
        warmup: share of the iterations in which the learning rate rises.
        rounding_from: share of the iterations after which weights that the file stores in few
            bits are rounded while they are trained.
        density_noise: standard deviation of the noise added to raw densities, where photos are
            rendered.
        precision: arithmetic of the linear layers.

    Source: Loshchilov & Hutter 2017 (SGDR), eq. 5, for the cosine.
    """

    iterations: int
    source: Source = "photos"
    learning_rate: float = 5e-4
    rays: int = 1024
    warmup: float = 0.02
    rounding_from: float = 0.3
    density_noise: float = 0.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("iterations", "learning_rate", "rays"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("warmup", "rounding_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {getattr(self, name)!r}")
        if not self.density_noise >= 0:
            raise ValueError(f"density_noise must not be negative, got {self.density_noise!r}")
        if self.source not in ("photos", "distill", "both"):
            raise ValueError(f"source must be photos, distill or both, got {self.source!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")

    @property
    def rounding_at(self) -> int:
        """The iteration at which rounding begins."""
        return round(self.rounding_from * self.iterations)

    def rate_at(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        rising = max(1.0, self.warmup * self.iterations)
        cosine = 0.5 * (1.0 + math.cos(math.pi * iteration / self.iterations))
        return self.learning_rate * min(1.0, (iteration + 1) / rising) * cosine

    @property
    def photo_rays(self) -> int:
        """Rays of an iteration that were photographed."""
        return self.rays - self.invented_rays

    @property
    def invented_rays(self) -> int:
        """Rays of an iteration that nobody photographed."""
        return 0 if self.source == "photos" else round(INVENTED_SHARE * self.rays)


@dataclass(frozen=True)
class Answer:
    """What a network says at some samples.

    Attributes:
        density: raw density.
        raw_rgb: colour before its sigmoid.
    """

    density: Float[Tensor, "rays samples"]
    raw_rgb: Float[Tensor, "rays samples 3"]

    def at(self, order: Int[Tensor, "rays picked"]) -> "Answer":
        """The same samples in another order."""
        return Answer(
            self.density.gather(1, order),
            self.raw_rgb.gather(1, order[..., None].expand(*order.shape, 3)),
        )

    def joined(self, other: "Answer") -> "Answer":
        """These samples and others of the same rays."""
        return Answer(
            torch.cat((self.density, other.density), dim=1),
            torch.cat((self.raw_rgb, other.raw_rgb), dim=1),
        )


def distillation_loss(
    student: Answer,
    teacher: Answer,
    rays: Rays,
    t: Float[Tensor, "rays samples"],
    settings: RenderSettings,
) -> Float[Tensor, ""]:
    """How far a student is from its teacher on the same samples.

    The mean over rays of

        ‖C_S − C_T‖² / 3  +  Σ_i w_T,i ‖c_S,i − c_T,i‖² / 3  +  0.1 · mean_i (α_S,i − α_T,i)²

    Colours count where the teacher sees something; densities count as opacities, since raw ones
    below 0, and large ones, all mean the same.

    Args:
        student: what it says, with its gradient.
        teacher: what it says.
        rays: the rays.
        t: distances of the samples, ascending.
        settings: background.
    """
    rendered_s = composite(student.density, student.raw_rgb, rays, t, settings)
    rendered_t = composite(teacher.density, teacher.raw_rgb, rays, t, settings)
    rendered = (rendered_s.rgb - rendered_t.rgb).square().mean()
    difference = torch.sigmoid(student.raw_rgb.float()) - torch.sigmoid(teacher.raw_rgb.float())
    colors = (rendered_t.render_weights * difference.square().mean(dim=-1)).sum(dim=-1).mean()
    lengths = rays.directions.norm(dim=-1)
    gap = opacities(student.density, t, lengths) - opacities(teacher.density, t, lengths)
    return rendered + colors + OPACITY_WEIGHT * gap.square().mean()


def opacities(
    density: Float[Tensor, "rays samples"],
    t: Float[Tensor, "rays samples"],
    direction_lengths: Float[Tensor, " rays"],
) -> Float[Tensor, "rays samples"]:
    """α of each sample from its raw density; δ as in `nerf.rendering.render_weights`."""
    delta = torch.cat((t[:, 1:] - t[:, :-1], torch.full_like(t[:, :1], LAST_DISTANCE)), dim=-1)
    return 1.0 - torch.exp(-torch.relu(density.to(t.dtype)) * delta * direction_lengths[:, None])


class Recovery:
    """A recovery that can be advanced, saved and continued, as a `nerf.training.Trainer` can.

    Args:
        student: the pruned model; its trained networks are changed in place.
        teacher: the dense model, never changed; None to learn from photos alone.
        scene: the training views.
        recipe: how.
        seed: of ray order, jitter and invented poses.
        trained: names of the networks that are trained, of those that the student stores.
        pool: the scene's training rays, where they are made already.
        backend: how the networks are run (`compiled` counts as `eager` here); `backend` then says
            what was chosen.

    Example:
        >>> recovery = Recovery(pruned, dense, scene, RecoveryRecipe(2000, "both"), seed=0)
        >>> recovery.advance(100).train_psnr  # doctest: +SKIP
    """

    def __init__(
        self,
        student: NerfModel,
        teacher: NerfModel | None,
        scene: Scene,
        recipe: RecoveryRecipe,
        seed: int,
        trained: tuple[str, ...] | None = None,
        pool: RayPool | None = None,
        backend: Backend = "auto",
    ) -> None:
        if recipe.source != "photos" and teacher is None:
            raise ValueError(f"learning by {recipe.source!r} needs a teacher")
        self.student, self.recipe, self.seed = student, recipe, seed
        self.device = student.device
        self.settings = RenderSettings(scene.near, scene.far, scene.white_background)
        self.pool = pool or RayPool(scene, self.device)
        self.iteration = 0
        self.seconds = 0.0  # wall time of all iterations so far
        self.rounding: dict[str, dict[str, RoundedLayer]] = {}
        self._bits: tuple[float, float] | None = None  # of all codes: at first, and in the end
        self._allowed = torch.zeros((), device=self.device)
        self._price = torch.full((), FIRST_PRICE, device=self.device)
        self._teacher = None if recipe.source == "photos" else teacher
        self._invented = InventedRays(scene, seed, self.device) if recipe.invented_rays else None
        self._trained = tuple(student.stored()) if trained is None else trained
        self._on_gpu = self.device.type == "cuda"
        self._parameters: list[tuple[str, Tensor]] = [
            (f"{network}.{name}", parameter)
            for network in self._trained
            for name, parameter in student.stored()[network].named_parameters()
        ]
        self._optimizer = torch.optim.Adam(
            [parameter for _, parameter in self._parameters],
            # In a tensor of the device, a captured step reads it anew each time.
            lr=torch.tensor(recipe.learning_rate, device=self.device)
            if self._on_gpu
            else recipe.learning_rate,
            fused=True,
            capturable=self._on_gpu,
        )
        self._reset_capture()
        self._generator = torch.Generator(self.device).manual_seed((seed * 1_000_003 + 7) % 2**63)
        self._students: dict[str, Asked] = {}
        self._teachers: dict[str, Asked] = {}
        self.backend = self._choose_networks(backend)

    def _choose_networks(self, wanted: Backend) -> str:
        """Put both models on the fused kernels where they can be; gives the backend."""
        models = [model for model in (self.student, self._teacher) if model is not None]
        shapes = [field.shape for model in models for field in model.stored().values()]
        wanted = "eager" if wanted == "compiled" else wanted
        precision, samples = self.recipe.precision, self.student.samples
        if choose(wanted, self.device, precision, shapes, samples) != "fused":
            return "eager"
        try:
            self._use_kernels()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver throws
            fall_back("fused", error)
            self._students, self._teachers = {}, {}
            return "eager"
        return "fused"

    def _use_kernels(self) -> None:
        from nerf.fused_network import FrozenNetwork, FusedNetwork  # noqa: PLC0415  (needs Triton)

        student, samples = self.student, self.student.samples
        rays = min(self.recipe.photo_rays, len(self.pool)) + self.recipe.invented_rays
        counts = {"coarse": samples.coarse, "fine": samples.coarse + samples.fine}
        if student.shared:  # asked once more at the drawn samples alone
            counts["fine"] = samples.fine
        for which, count in counts.items():
            network = student.fine if student.shared or which == "fine" else student.coarse
            self._students[which] = FusedNetwork(network.shape, rays, count, self.device)
        if self._teacher is not None:
            for name, field in self._teacher.networks().items():
                self._teachers[name] = FrozenNetwork(field)

    @property
    def done(self) -> bool:
        """Whether the recipe's iterations are through."""
        return self.iteration >= self.recipe.iterations

    def round_weights(self, layers: Mapping[str, Mapping[str, RoundedLayer]]) -> None:
        """From now on, train the weights as their file will hold them.

        Args:
            layers: how each layer of each trained network is rounded.

        Raises:
            ValueError: not exactly the trained networks, or weights are rounded already.
        """
        if self.rounding or layers.keys() != set(self._trained):
            raise ValueError(f"rounding is for {self._trained}, once; got {tuple(layers)}")
        self.rounding = {network: dict(of) for network, of in layers.items()}
        tables = [
            (f"{network}.{layer}/{name}", table)
            for network, of in self.rounding.items()
            for layer, rounded in of.items()
            for name, table in rounded.parameters()
        ]
        self._parameters += tables
        if tables:
            self._optimizer.add_param_group({"params": [table for _, table in tables]})
        self._reset_capture()

    def bits(self) -> float:
        """About how many bits the codes take now, see `nerf.rounding.coded_bits`."""
        with torch.no_grad():
            return float(self._coded_bits())

    def _coded_bits(self) -> Float[Tensor, ""]:
        parts = []
        with torch.autocast(self.device.type, enabled=False):
            for network, layers in self.rounding.items():
                of = dict(self.student.stored()[network].named_parameters())
                parts.append(coded_bits(layers, of))
        return torch.stack(parts).sum()

    def squeeze(self, bits: float) -> None:
        """From now on, train the codes towards so many bits in the file.

        Bits get a price beside the error: the loss grows by λ max(R / R_a − 1, 0), R the bits that
        the codes take and R_a those allowed now, which fall evenly (by their logarithm) from what
        they are to `bits` over the first `SQUEEZED_BY` of the rounded iterations. λ follows:
        λ ← λ exp(60 / n (R / R_a − 1)) each step, n the number of rounded iterations.

        Source: the trade of rate for distortion by a multiplier is Everett's (1963); a penalty on
        the codes' entropy in training, Ballé et al. 2017, eq. 3.

        Raises:
            ValueError: weights are not rounded yet, or not on symmetric grids.
        """
        if not self.rounding:
            raise ValueError("only rounded weights have codes to squeeze: round them first")
        first = self.bits() if self._bits is None else self._bits[0]
        if self._bits is None:
            self._reset_capture()
        self._bits = (first, bits)

    def _bits_allowed(self) -> float:
        assert self._bits is not None
        first, last = self._bits
        recipe = self.recipe
        rounded = max(1.0, SQUEEZED_BY * (recipe.iterations - recipe.rounding_at))
        share = min(1.0, (self.iteration - recipe.rounding_at) / rounded)
        return float(first * (last / first) ** share)

    # --- a step ----------------------------------------------------------------------------

    def _reset_capture(self) -> None:
        self._graph: StepGraph[tuple[Tensor, Tensor]] | None = None
        self._eager_steps_left = STEPS_BEFORE_CAPTURE if self._on_gpu else -1

    def step(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """One iteration; gives the fine MSE on photographed rays and the whole loss."""
        recipe = self.recipe
        picked = self.pool.pick(self.seed, self.iteration, recipe.photo_rays)
        if self._invented is not None:
            invented = self._invented.pick(self.iteration, recipe.invented_rays)
            picked = torch.cat((picked, invented))
        for group in self._optimizer.param_groups:
            if self._on_gpu:
                group["lr"].fill_(recipe.rate_at(self.iteration))
            else:
                group["lr"] = recipe.rate_at(self.iteration)
        if self._bits is not None:
            self._allowed.fill_(self._bits_allowed())
        if self._eager_steps_left == 0:
            self._capture(picked)
        self._eager_steps_left -= 1
        losses = self._update(picked) if self._graph is None else self._graph(picked)
        self.iteration += 1
        return losses

    def _capture(self, picked: Int[Tensor, " rays"]) -> None:
        torch.cuda.synchronize(self.device)
        random_state = self._generator.get_state()
        try:
            self._graph = StepGraph(self._update, self._generator, picked)
        except RuntimeError as error:
            # A failed capture leaves its generator unusable.
            self._generator = torch.Generator(self.device)
            self._generator.set_state(random_state)
            log.warning("recovering without a CUDA graph, which is slower: %s", error)

    def _update(self, picked: Int[Tensor, " rays"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        count = min(self.recipe.photo_rays, len(self.pool))
        rays = self.pool.rays[picked[:count]]
        colors = self.pool.colors[picked[:count]]
        if self._invented is not None:
            rays = Rays.concatenate([rays, self._invented.rays[picked[count:]]])
        weights = self._weights()
        coarse, t_coarse, fine, t_fine = self._passes(weights, rays)
        shown_coarse, shown = self._rendered(coarse, t_coarse, fine, t_fine, rays)
        mse = (shown.rgb[:count] - colors).square().mean()
        coarse_mse = (shown_coarse.rgb[:count] - colors).square().mean()
        coarse_weight = SHARED_COARSE if self.student.shared else 1.0
        loss = torch.zeros((), device=self.device)
        if self.recipe.source in ("photos", "both"):
            loss = loss + mse + coarse_weight * coarse_mse
        if self._teacher is not None:
            loss = loss + self._taught(rays, coarse, t_coarse, fine, t_fine)
        if self._bits is not None:
            excess = self._coded_bits() / self._allowed - 1.0
            loss = loss + self._price * torch.relu(excess)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        if self._bits is not None:
            with torch.no_grad():
                rate = PRICE_RATE / (self.recipe.iterations - self.recipe.rounding_at)
                self._price.mul_((rate * excess.detach().clamp(-0.1, 0.5)).exp())
        return mse.detach(), loss.detach()

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """The weights to compute with, rounded where that has begun, by stored network."""
        weights = {}
        with torch.autocast(self.device.type, enabled=False):
            for network, field in self.student.stored().items():
                of: dict[str, Tensor] = dict(field.named_parameters())
                if network not in self._trained:
                    of = {name: parameter.detach() for name, parameter in of.items()}
                weights[network] = of | round_network(self.rounding.get(network, {}), of)
        return weights

    def _passes(
        self, weights: Mapping[str, Mapping[str, Tensor]], rays: Rays
    ) -> tuple[Answer, Tensor, Answer, Tensor]:
        """What the student says in both passes, jittered, and where."""
        model, settings = self.student, self.settings
        t_coarse = sampling.stratified(
            len(rays),
            model.samples.coarse,
            settings.near,
            settings.far,
            self._generator,
            self.device,
        )
        name = "fine" if model.shared else "coarse"
        coarse = self._ask("coarse", model.stored()[name], rays, t_coarse, weights[name])
        with torch.no_grad():
            seen = composite(coarse.density, coarse.raw_rgb, rays, t_coarse, settings)
            drawn = sampling.importance(
                t_coarse, seen.render_weights, model.samples.fine, self._generator
            )
            t_fine, order = torch.cat((t_coarse, drawn), dim=-1).sort(dim=-1)
        if model.shared:
            more = self._ask("fine", model.fine, rays, drawn, weights["fine"])
            return coarse, t_coarse, coarse.joined(more).at(order), t_fine
        fine = self._ask("fine", model.fine, rays, t_fine, weights["fine"])
        return coarse, t_coarse, fine, t_fine

    def _ask(
        self,
        which: str,
        field: Field,
        rays: Rays,
        t: Float[Tensor, "rays samples"],
        weights: Mapping[str, Tensor],
    ) -> Answer:
        """What the student says in a pass, on the backend."""
        if which in self._students:
            return Answer(*self._students[which](rays, t, weights))
        return ask(field, rays, t, weights)

    def _rendered(
        self, coarse: Answer, t_coarse: Tensor, fine: Answer, t_fine: Tensor, rays: Rays
    ) -> tuple[Pass, Pass]:
        """Both passes as colours, with noise on the densities where photos are learnt from."""
        shown = []
        for answer, t in ((coarse, t_coarse), (fine, t_fine)):
            density = answer.density
            if self.recipe.density_noise > 0 and self.recipe.source != "distill":
                noise = torch.randn(t.shape, generator=self._generator, device=self.device)
                density = density + noise * self.recipe.density_noise
            shown.append(composite(density, answer.raw_rgb, rays, t, self.settings))
        return shown[0], shown[1]

    def _taught(
        self, rays: Rays, coarse: Answer, t_coarse: Tensor, fine: Answer, t_fine: Tensor
    ) -> Float[Tensor, ""]:
        """The loss against the teacher; a shared student learns from its fine network alone."""
        assert self._teacher is not None
        pairs = [(fine, "fine", t_fine)]
        if not self.student.shared:
            pairs.append((coarse, "coarse", t_coarse))
        loss = torch.zeros((), device=self.device)
        for answer, name, t in pairs:
            with torch.no_grad():
                if name in self._teachers:
                    told = Answer(*self._teachers[name](rays, t))
                else:
                    told = ask(self._teacher.networks()[name], rays, t)
            loss = loss + distillation_loss(answer, told, rays, t, self.settings)
        return loss

    def advance(self, iterations: int) -> Progress:
        """Run some iterations; fewer when the recipe ends, or rounding is to begin, before.

        Raises:
            TrainingError: the loss became NaN or infinite.
        """
        if self._on_gpu:
            torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        recipe = self.recipe
        end = recipe.iterations
        if self.iteration < recipe.rounding_at and not self.rounding:
            end = recipe.rounding_at
        count = min(iterations, end - self.iteration)
        mse_sum = torch.zeros((), device=self.device)
        loss_sum = torch.zeros((), device=self.device)
        with arithmetic(recipe.precision, self.device):
            for _ in range(count):
                mse, loss = self.step()
                mse_sum += mse
                loss_sum += loss
        mean = float(mse_sum) / max(count, 1)
        whole = float(loss_sum) / max(count, 1)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        if not (math.isfinite(whole) and math.isfinite(mean)):
            raise TrainingError(
                f"the recovery diverged: the loss is {whole} after iteration {self.iteration}; "
                f"lower its learning rate (now {recipe.learning_rate}) or recover from another "
                "source"
            )
        return Progress(self.iteration, whole, psnr(mean), seconds, count / max(seconds, 1e-9))

    def release(self) -> None:
        """Give back the memory that a captured step holds, once there are no more."""
        self._graph = None
        if self._on_gpu:
            torch.cuda.empty_cache()

    # --- state -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything needed to go on.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {"generator": self._generator.get_state()}
        for name, parameter in self._parameters:
            tensors[f"weights.{name}"] = parameter.detach()
            moments = self._optimizer.state.get(parameter)
            if moments:
                tensors[f"step.{name}"] = torch.as_tensor(moments["step"])
                tensors[f"first.{name}"] = moments["exp_avg"]
                tensors[f"second.{name}"] = moments["exp_avg_sq"]
        tensors["price"] = self._price
        schemes: dict[str, dict[str, str]] = {}
        for network, of in self.rounding.items():
            schemes[network] = {layer: rounded.scheme for layer, rounded in of.items()}
            for layer, rounded in of.items():
                tensors[f"spread.{network}.{layer}"] = rounded.spread
                for name, table in rounded.start.items():
                    tensors[f"start.{network}.{layer}/{name}"] = table
        metadata = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "seed": self.seed,
            "rounding": schemes,
            "bits": None if self._bits is None else list(self._bits),
        }
        write_tensors(path, tensors, metadata)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote; to be called before anything else.

        Raises:
            CheckpointError: the file is missing, damaged, or of another recovery.
        """
        tensors, metadata = read_tensors(path)
        iteration, schemes = metadata.get("iteration"), metadata.get("rounding")
        seconds = metadata.get("seconds")
        ours = metadata.get("seed") == self.seed and not self.iteration and not self.rounding
        whole = isinstance(schemes, dict) and isinstance(seconds, float)
        if not ours or not whole or not isinstance(iteration, int):
            raise CheckpointError(f"{path} is not a state of this recovery (seed {self.seed})")
        for name, parameter in self._parameters:
            found = tensors.get(f"weights.{name}")
            if found is None or found.shape != parameter.shape:
                raise CheckpointError(f"{path} is a state of networks of another shape: {name}")
        try:
            self._generator.set_state(tensors["generator"])
            if schemes:
                self.round_weights(_rounding_of(cast(Schemes, schemes), tensors, self.device))
            bits = metadata.get("bits")
            if isinstance(bits, list):
                self._bits = float(bits[0]), float(bits[1])
            self._price.copy_(tensors["price"])
            for name, parameter in self._parameters:
                with torch.no_grad():
                    parameter.copy_(tensors[f"weights.{name}"])
                if f"step.{name}" in tensors:
                    on = self.device if self._on_gpu else torch.device("cpu")
                    self._optimizer.state[parameter] = {
                        "step": tensors[f"step.{name}"].to(on),
                        "exp_avg": tensors[f"first.{name}"].to(self.device),
                        "exp_avg_sq": tensors[f"second.{name}"].to(self.device),
                    }
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a whole state of this recovery: {error}") from (
                error
            )
        self._reset_capture()
        self.iteration, self.seconds = iteration, cast(float, seconds)


def ask(
    field: Field,
    rays: Rays,
    t: Float[Tensor, "rays samples"],
    weights: Mapping[str, Tensor] | None = None,
) -> Answer:
    """What a network says at samples along rays.

    Args:
        field: the network.
        rays: the rays.
        t: distances of the samples.
        weights: to compute with in place of the network's own, by the name of the parameter.
    """
    points = rays.origins[:, None, :] + rays.directions[:, None, :] * t[..., None]
    if weights is None:
        density, raw_rgb = field(points, rays.view_directions)
    else:
        density, raw_rgb = functional_call(field, dict(weights), (points, rays.view_directions))
    return Answer(density, raw_rgb)


def _rounding_of(
    schemes: Schemes, tensors: Mapping[str, Tensor], device: torch.device
) -> dict[str, dict[str, RoundedLayer]]:
    """The rounding that a saved state describes."""
    layers: dict[str, dict[str, RoundedLayer]] = {}
    for network, of in schemes.items():
        layers[network] = {}
        for layer, scheme in of.items():
            prefix = f"start.{network}.{layer}/"
            start = {
                name.removeprefix(prefix): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            change = {name: torch.zeros_like(t).requires_grad_() for name, t in start.items()}
            spread = tensors[f"spread.{network}.{layer}"].to(device)
            layers[network][layer] = RoundedLayer(scheme, start, spread, change)
    return layers
