"""Recovery: a short training of a pruned model, on photos, on what its teacher says, or both.

The teacher is the dense model. Along the same rays, at the same samples, it says what density and
colour belong there and what colour the ray has; unlike photos it can be asked about rays that
nobody photographed. A network that both passes share is evaluated once at the coarse samples, and
what it says there serves both passes.

Letters: σ density, α = 1 − exp(−relu(σ) δ) the opacity of a sample, w its render weight, c its
colour, C a ray's colour; S the student (the pruned model), T the teacher.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call

from nerf import sampling
from nerf.backends import Backend, choose, fall_back
from nerf.cameras import Rays
from nerf.devices import arithmetic, keep_freed_memory
from nerf.errors import CheckpointError, TrainingError
from nerf.field import Field, NerfModel
from nerf.files import read_tensors, write_tensors
from nerf.graphs import StepGraph, captured
from nerf.invented import InventedRays
from nerf.metrics import psnr
from nerf.muon import Muon, for_muon
from nerf.recipe import (
    MOST_EXCESS,
    PRICE_GAIN,
    SHARED_COARSE,
    RecoveryRecipe,
    Source,
    Squeeze,
)
from nerf.rendering import LAST_DISTANCE, Pass, RenderSettings, composite
from nerf.rounding import RoundedLayer, coded_bits, round_network
from nerf.scenes.scene import Scene
from nerf.steps import STEPS_BEFORE_CAPTURE
from nerf.training import Progress, RayPool

if TYPE_CHECKING:
    from nerf.fused_recovery import FusedRecovery

__all__ = ["Recovery", "RecoveryRecipe", "Source"]

Schemes = Mapping[str, Mapping[str, str]]
Asked = Callable[..., tuple[Tensor, Tensor]]
"""A network on the fused kernels, see `nerf.fused_network`."""
Moments = dict[str, tuple[int, Tensor, Tensor | None]]
"""Steps done, first and second moment of each trained tensor; Muon has no second."""

OPACITY_WEIGHT = 0.1
"""How much the error of opacities counts beside those of colours, see `distillation_loss`."""
FIRST_PRICE = 3e-4
"""What bits cost at first beside an MSE, see `Recovery.squeeze`."""


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
        keep_freed_memory(self.device)
        self._parameters: list[tuple[str, Tensor]] = [
            (f"{network}.{name}", parameter)
            for network in self._trained
            for name, parameter in student.stored()[network].named_parameters()
        ]
        matrices = for_muon(dict(self._parameters)) if recipe.optimizer == "muon" else ()
        self._muon = (
            Muon({n: p for n, p in self._parameters if n in matrices}) if matrices else None
        )
        self._optimizer = torch.optim.Adam(
            [parameter for name, parameter in self._parameters if name not in matrices],
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
        self._fused: FusedRecovery | None = None
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
            if self.student.shared and self.recipe.source == "photos" and self._trained:
                self._use_fused_steps()
            else:
                self._use_kernels()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver throws
            fall_back("fused", error)
            self._students, self._teachers = {}, {}
            return "eager"
        return "fused"

    def _use_fused_steps(self) -> None:
        from nerf.fused_recovery import FusedRecovery  # noqa: PLC0415  (needs Triton)

        self._fused = FusedRecovery(
            self.student, self.pool, self.settings, self.recipe, self.seed, self._generator
        )

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
        if self._fused is not None:
            from nerf.fused_recovery import can_round  # noqa: PLC0415  (needs Triton)

            layers_of = self.rounding["fine"]
            if can_round(layers_of):
                self._fused.round_weights(layers_of, self.iteration)
            else:
                self._leave_fused_steps()
        self._parameters += tables
        if tables:
            self._optimizer.add_param_group({"params": [table for _, table in tables]})
        self._reset_capture()

    def _leave_fused_steps(self) -> None:
        """Go on step by step in PyTorch: the fused steps cannot round weights so."""
        assert self._fused is not None
        moments = self._fused.moments(self.iteration)
        self._generator = self._fused.generator
        self._fused = None
        self._restore(self.iteration, moments)
        self._use_kernels()

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

        Bits get a price beside the error: the loss grows by λ e^{50 x} R / R_a with the excess
        x = R / R_a − 1, at most ±0.1; R the bits that the codes take and R_a those allowed now,
        which fall evenly (by their logarithm) from what they are to `bits` over the first
        `SQUEEZED_BY` of the rounded iterations, or stay `bits` where codes take less. λ follows:
        λ ← λ e^{300 x / n} each step, n the number of rounded iterations.

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
        if self._fused is not None:
            self._fused.squeeze(first, bits, self._price)

    def _bits_allowed(self) -> float:
        assert self._bits is not None
        first, last = max(self._bits), self._bits[1]
        return float(first * (last / first) ** Squeeze.of(self.recipe).share(self.iteration))

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
        self._graph, self._generator = captured("recovering", self._update, self._generator, picked)

    def _update(self, picked: Int[Tensor, " rays"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        count = min(self.recipe.photo_rays, len(self.pool))
        rays = self.pool.rays[picked[:count]]
        colors = self.pool.colors[picked[:count]]
        if self._invented is not None:
            rays = Rays.concatenate([rays, self._invented.rays[picked[count:]]])
        weights = self._weights()
        coarse, t_coarse, shown_coarse, fine, t_fine, shown = self._passes(weights, rays)
        mse = (shown.rgb[:count] - colors).square().mean()
        coarse_mse = (shown_coarse.rgb[:count] - colors).square().mean()
        coarse_weight = SHARED_COARSE if self.student.shared else 1.0
        loss = torch.zeros((), device=self.device)
        if self.recipe.source in ("photos", "both"):
            loss = loss + mse + coarse_weight * coarse_mse
        if self._teacher is not None:
            loss = loss + self._taught(rays, coarse, t_coarse, fine, t_fine)
        if self._bits is not None:
            share = self._coded_bits() / self._allowed
            excess = (share.detach() - 1.0).clamp(-MOST_EXCESS, MOST_EXCESS)
            loss = loss + self._price * (PRICE_GAIN * excess).exp() * share
        for _, parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        if self._muon is not None:
            self._muon.step(self._optimizer.param_groups[0]["lr"])
        self._optimizer.step()
        if self._bits is not None:
            with torch.no_grad():
                rate = Squeeze.of(self.recipe).rate
                self._price.mul_((rate * excess).exp())
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
    ) -> tuple[Answer, Tensor, Pass, Answer, Tensor, Pass]:
        """What the student says in both passes, jittered; where, and what is seen of it."""
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
        shown_coarse = self._rendered(coarse, t_coarse, rays)
        with torch.no_grad():
            drawn = sampling.importance(
                t_coarse,
                shown_coarse.render_weights.detach(),
                model.samples.fine,
                self._generator,
            )
            t_fine, order = torch.cat((t_coarse, drawn), dim=-1).sort(dim=-1)
        if model.shared:
            more = self._ask("fine", model.fine, rays, drawn, weights["fine"])
            fine = coarse.joined(more).at(order)
        else:
            fine = self._ask("fine", model.fine, rays, t_fine, weights["fine"])
        return coarse, t_coarse, shown_coarse, fine, t_fine, self._rendered(fine, t_fine, rays)

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

    def _rendered(self, answer: Answer, t: Tensor, rays: Rays) -> Pass:
        """A pass as colours, with noise on the densities where photos are learnt from."""
        density = answer.density
        if self.recipe.density_noise > 0 and self.recipe.source != "distill":
            noise = torch.randn(t.shape, generator=self._generator, device=self.device)
            density = density + noise * self.recipe.density_noise
        return composite(density, answer.raw_rgb, rays, t, self.settings)

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
        mse_sum, loss_sum = self._run(count)
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

    def _run(self, count: int) -> tuple[Tensor, Tensor]:
        """Some iterations; the sums of their fine MSE and of their whole loss."""
        if self._fused is not None:
            sums = self._fused.run(self.iteration, count)
            self.iteration += count
            return sums
        mse_sum = torch.zeros((), device=self.device)
        loss_sum = torch.zeros((), device=self.device)
        with arithmetic(self.recipe.precision, self.device):
            for _ in range(count):
                mse, loss = self.step()
                mse_sum += mse
                loss_sum += loss
        return mse_sum, loss_sum

    def release(self) -> None:
        """Give back the memory that a captured step holds, once there are no more."""
        self._graph, self._fused = None, None
        if self._on_gpu:
            torch.cuda.empty_cache()

    # --- state -----------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write everything needed to go on.

        Raises:
            CheckpointError: the file cannot be written.
        """
        generator = self._generator if self._fused is None else self._fused.generator
        tensors: dict[str, Tensor] = {"generator": generator.get_state()}
        for name, parameter in self._parameters:
            tensors[f"weights.{name}"] = parameter.detach()
        for name, (step, first, second) in self._moments().items():
            tensors[f"step.{name}"] = torch.tensor(float(step))
            tensors[f"first.{name}"] = first
            if second is not None:
                tensors[f"second.{name}"] = second
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

    def _moments(self) -> Moments:
        """Where the optimisers stand."""
        if self._fused is not None:
            return self._fused.moments(self.iteration)
        found: Moments = {}
        for name, parameter in self._parameters:
            state = self._optimizer.state.get(parameter)
            if self._muon is not None and name in self._muon.momentum:
                found[name] = self.iteration, self._muon.momentum[name], None
            elif state:
                found[name] = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        return found

    def _restore(self, iteration: int, moments: Moments) -> None:
        """The inverse of `_moments`, after so many iterations."""
        if self._fused is not None:
            self._fused.restore(iteration, moments)
            return
        on = self.device if self._on_gpu else torch.device("cpu")
        for name, parameter in self._parameters:
            if name not in moments:
                continue
            step, first, second = moments[name]
            if self._muon is not None and name in self._muon.momentum:
                self._muon.momentum[name].copy_(first)
            elif second is not None:
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step), device=on),
                    "exp_avg": first.to(self.device).clone(),
                    "exp_avg_sq": second.to(self.device).clone(),
                }

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
            moments = {
                name: (
                    int(tensors[f"step.{name}"]),
                    tensors[f"first.{name}"],
                    tensors.get(f"second.{name}"),
                )
                for name, _ in self._parameters
                if f"step.{name}" in tensors
            }
            self._restore(iteration, moments)
            if self._fused is not None and self._bits is not None:
                self._fused.squeeze(*self._bits, self._price)
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
