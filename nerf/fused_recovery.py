"""A recovery's steps on the fused kernels (Triton; importing this module needs it).

For a network that both passes share, learning from photos, with weights that are not rounded yet or
on symmetric grids: the whole step is a few dozen launches of one CUDA graph, as `nerf.fused` is for
a plain training. The network is evaluated once at the coarse samples and once at the drawn ones;
`composite_joined` reads both parts in order. Rounding, its gradients, Adam and the price of codes
work on whole rows (`nerf.kernels.rounded`).
"""

from collections.abc import Iterator, Mapping
from copy import copy

import torch
import triton
from jaxtyping import Float, Int
from torch import Tensor

from nerf.backends import power_of_two
from nerf.devices import arithmetic
from nerf.errors import NerfError
from nerf.field import NerfModel
from nerf.fused import (
    ERRORS_A_STEP,
    RAYS_A_PROGRAM,
    STEPS_BEFORE_CAPTURE,
    check_kernels,
)
from nerf.graphs import StepGraph, captured
from nerf.kernels import rounded, volume
from nerf.kernels.mlp import FusedField
from nerf.muon import MOMENTUM, orthogonalized
from nerf.pool import Batches, RayPool
from nerf.recipe import MOST_EXCESS, PRICE_GAIN, SHARED_COARSE, RecoveryRecipe, Squeeze
from nerf.recovery import FIRST_PRICE, Moments
from nerf.rendering import RenderSettings
from nerf.rounding import RoundedLayer, levels, parse_scheme
from nerf.rows import Rows, stack_of
from nerf.sampling import strata
from nerf.steps import BETAS, EPSILON

SCHEDULE = 5  # numbers of an iteration, see `update_rows`
KINDS = ((False, False), (True, False), (True, True))
"""Whether weights are rounded, and whether their codes have a price: the kinds of steps."""
CHANGED = (
    "_values", "_first", "_second", "_start", "_tops", "_changes", "_g_changes", "_stack",
    "_costs", "_code_sums", "_sums",
)  # fmt: skip
"""What steps hand on to later ones, beside the counter and the price."""


def can_round(layers: Mapping[str, RoundedLayer]) -> bool:
    """Whether the kernels round weights so."""
    return all(parse_scheme(layer.scheme)[0] == "int" for layer in layers.values())


def corrections(steps: Int[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Adam's 1 / (1 − β₁ᵗ) and 1 / √(1 − β₂ᵗ) for t steps, float64; 0 where there were none."""
    begun, steps = steps > 0, steps.clamp(min=1).double()
    return begun / (1.0 - BETAS[0] ** steps), begun / (1.0 - BETAS[1] ** steps).sqrt()


class FusedRecovery:
    """Steps of a recovery of a shared network, from photos.

    Args:
        student: the model; its weights become views of this object's.
        pool: the rays.
        settings: bounds and background.
        recipe: how.
        seed: of the order of rays.
        generator: of all random numbers.

    Raises:
        NerfError: the kernels do not compute what they should here.
        Exception: whatever the compiler or the driver throws.
    """

    def __init__(
        self,
        student: NerfModel,
        pool: RayPool,
        settings: RenderSettings,
        recipe: RecoveryRecipe,
        seed: int,
        generator: torch.Generator,
    ) -> None:
        self.device = device = student.device
        check_kernels(device)
        self._pool, self._settings, self._recipe = pool, settings, recipe
        self.generator = generator
        shape, samples = student.fine.shape, student.samples
        self._rays = rays = min(recipe.rays, len(pool))
        self._batches = Batches(pool, seed, rays, device)
        self._field = FusedField(shape, rays, samples.coarse, device)
        self._more = FusedField(shape, rays, samples.fine, device)
        self._more.compute_as(self._field)
        self._plan = plan = self._field.plan
        self._muon = recipe.optimizer == "muon"
        self._rows = Rows("fine", shape, plan, self._muon, device)
        self._stack = stack_of(self._rows.matrix_sizes, device)

        def empty(*size: int) -> Tensor:
            return torch.zeros(*size, device=device)

        self._values = empty(plan.count)
        for name, parameter in student.fine.named_parameters():
            view = plan.view(self._values, name)
            view.copy_(parameter.data)
            parameter.data = view
        self._first, self._second = (empty(plan.count + self._rows.count) for _ in range(2))
        self._start, self._tops = empty(self._rows.count), empty(self._rows.count)
        self._changes, self._g_changes = empty(self._rows.count), empty(self._rows.count)
        self._rounds = False
        self._rounded_since = 0
        self._squeeze: Squeeze | None = None
        self._limits = torch.ones(2, device=device)
        self._layers = len(shape.layers())
        self._sizes = torch.tensor(
            [float(layer.in_width * layer.out_width) for layer in shape.layers()], device=device
        )
        self._code_sums, self._costs = empty(self._layers), empty(self._layers)
        self._allocate(samples.coarse, samples.fine)
        # `begin_step` makes the schedule of a plain training of it, which is not used.
        self._constants = torch.full((6,), -1.0, dtype=torch.float64, device=device)
        self._unused = empty(SCHEDULE)
        self._schedule = empty(1, SCHEDULE)
        rates = [recipe.rate_at(iteration) for iteration in range(recipe.iterations)]
        self._rates = torch.tensor(rates, dtype=torch.float64)
        self._schedules = self._planned()
        self._renew()
        self._try()

    def _allocate(self, coarse: int, drawn: int) -> None:
        """What a step works on."""
        device, rays, settings = self.device, self._rays, self._settings

        def empty(*size: int) -> Tensor:
            return torch.zeros(*size, device=device)

        self._n, self._drawn, every = coarse, drawn, coarse + drawn
        shape = self._field.shape
        self._octaves = shape.direction_octaves
        lower, upper = strata(self._n, settings.near, settings.far, device)
        self._strata = torch.stack((lower, upper - lower))
        self._jitter, self._u = empty(rays, self._n), empty(rays, self._drawn)
        self._noise, self._all_noise = empty(rays, self._n), empty(rays, every)
        self._origins, self._directions, self._colors = (empty(rays, 3) for _ in range(3))
        self._lengths, self._encoded = empty(rays), empty(rays, shape.direction_features)
        self._t, self._t_drawn, self._t_all = (
            empty(rays, self._n),
            empty(rays, self._drawn),
            empty(rays, every),
        )
        self._source = torch.zeros(rays, every, dtype=torch.int32, device=device)
        self._coarse_errors, self._errors = empty(rays), empty(rays)
        self._g = empty(rays, self._n), empty(rays, self._n, 3)
        self._g_more = empty(rays, self._drawn), empty(rays, self._drawn, 3)
        self._sums = empty(3)

    def _planned(self) -> Tensor:
        """The schedule of every iteration, see `nerf.kernels.rounded.update_rows`."""
        steps = torch.arange(1, len(self._rates) + 1)
        first, second = corrections(steps)
        of_m, of_v = corrections(steps - self._rounded_since)
        columns = self._rates * first, second, self._rates * of_m, of_v, self._rates
        return torch.stack(columns, dim=1).float().to(self.device)

    def _try(self) -> None:
        """Run a step of every kind once, on copies: what has to compile, compiles now.

        The copies lie in memory as the originals do, and all numbers are those of the steps to
        come: whatever Triton distinguishes them by, no later step needs another kernel.
        """
        trial = copy(self)
        for name in CHANGED:
            setattr(trial, name, getattr(self, name).clone())
        trial.generator = torch.Generator(self.device)
        trial._price = torch.full((), FIRST_PRICE, device=self.device)
        trial._tops.fill_(levels("int", 8)[1])
        trial._start.copy_(1.0 / trial._tops)
        batches = trial._batches = copy(self._batches)
        batches.order = torch.arange(len(batches.order), dtype=torch.int32, device=self.device)
        batches.counter = batches.counter.clone()
        errors = []
        with arithmetic("float32", self.device):
            for rounds, squeeze in KINDS:
                batches.counter.zero_()
                trial._rounds = rounds
                trial._squeeze = Squeeze.of(self._recipe) if squeeze else None
                trial._update(update=False)
                trial._step()
                errors += [trial._coarse_errors.clone(), trial._errors.clone()]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if not bool(torch.isfinite(torch.stack(errors)).all()):
            raise NerfError("the fused kernels gave errors of a recovery that are not finite")

    # --- rounding --------------------------------------------------------------------------

    def round_weights(self, layers: Mapping[str, RoundedLayer], since: int) -> None:
        """From now on, train the weights on grids; the changes of their scales become views.

        Args:
            layers: how each is rounded, see `can_round`.
            since: the iteration at which that began.
        """
        self._rounds, self._rounded_since = True, since
        at = 0
        for name in self._layer_names():
            layer = layers[name]
            kind, bits = parse_scheme(layer.scheme)
            assert bits is not None
            rows = len(layer.start["scale"])
            self._start[at : at + rows].copy_(layer.start["scale"])
            self._tops[at : at + rows].fill_(levels(kind, bits)[1])
            change = self._changes[at : at + rows]
            with torch.no_grad():
                change.copy_(layer.change["scale"])
                layer.change["scale"].data = change
            at += rows
        self._schedules = self._planned()
        self._renew()

    def _layer_names(self) -> list[str]:
        return [layer.name for layer in self._field.shape.layers()]

    def squeeze(self, first: float, last: float, price: Tensor) -> None:
        """Give the codes a price, see `nerf.recovery.Recovery.squeeze`.

        Args:
            first: bits that they took when rounding began.
            last: bits that they are to take.
            price: λ, a tensor that is updated in place.
        """
        if self._squeeze is None:
            self._squeeze = Squeeze.of(self._recipe)
            self._renew()
        self._price = price
        self._limits.copy_(torch.tensor([first, last]))

    # --- steps -----------------------------------------------------------------------------

    def _renew(self) -> None:
        """Capture anew: what a step does has changed; and round the weights as they are now."""
        self._graph: StepGraph[None] | None = None
        self._eager_steps_left = STEPS_BEFORE_CAPTURE
        self._stale = True

    def run(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Run steps; gives the sums of the fine MSE and of the whole loss."""
        self._sums.zero_()
        with arithmetic("float32", self.device):
            if self._stale:
                self._code_sums.zero_()
                self._update(update=False)
                self._stale = False
            for iteration in range(first, first + count):
                self._batches.prepare(iteration)
                if self._eager_steps_left == 0 and self.device.type == "cuda":
                    self._capture()
                self._eager_steps_left -= 1
                if self._graph is None:
                    self._step()
                else:
                    self._graph()
                self._batches.counted()
        coarse, fine, priced = self._sums.clone().unbind()
        return fine, fine + SHARED_COARSE * coarse + priced

    def _capture(self) -> None:
        self._graph, self.generator = captured("recovering", self._step, self.generator)

    def _step(self) -> None:
        recipe, rays = self._recipe, self._rays
        # In this order, as `nerf.recovery.Recovery` does.
        self._jitter.uniform_(generator=self.generator)
        if recipe.density_noise > 0:
            self._noise.normal_(generator=self.generator)
        self._u.uniform_(generator=self.generator)
        if recipe.density_noise > 0:
            self._all_noise.normal_(generator=self.generator)
        torch.index_select(self._schedules, 0, self._batches.counter, out=self._schedule)
        pool = self._pool.rays
        volume.begin_step[(triton.cdiv(rays, RAYS_A_PROGRAM),)](
            self._batches.order, self._batches.counter, pool.origins, pool.directions,
            pool.view_directions, self._pool.colors, self._jitter, self._strata, self._origins,
            self._directions, self._lengths, self._colors, self._encoded, self._t,
            self._constants, self._unused, self._batches.count, rays, self._n, self._octaves,
            PADDED=power_of_two(self._n), BLOCK=RAYS_A_PROGRAM, num_warps=4,
        )  # fmt: skip
        if self._squeeze is not None:
            rounded.price_codes[(1,)](
                self._batches.counter, self._code_sums, self._sizes, self._limits, self._price,
                self._costs, self._sums[2:], self._layers, self._squeeze.first_iteration,
                self._squeeze.falling, self._squeeze.rate, PRICE_GAIN, MOST_EXCESS,
                PADDED=power_of_two(self._layers), num_warps=1,
            )  # fmt: skip
        self._gradients()
        rounded.row_gradients[(self._rows.count,)](
            self._rows.table, self._values, self._field.gradients, self._more.gradients,
            self._start, self._tops, self._changes, self._g_changes, self._first, self._stack,
            self._costs,
            self._stack.shape[1], self._stack.shape[2], BETA=MOMENTUM, ROUND=self._rounds,
            SQUEEZE=self._squeeze is not None, MUON=self._muon, PADDED=self._rows.padded,
            num_warps=4,
        )  # fmt: skip
        if self._muon:
            self._stack.copy_(orthogonalized(self._stack))
        self._update(update=True)
        volume.end_step[(1,)](
            self._batches.counter, self._coarse_errors, self._errors, self._sums, rays,
            PADDED=ERRORS_A_STEP, num_warps=4,
        )  # fmt: skip

    def _update(self, update: bool) -> None:
        rounded.update_rows[(self._rows.count,)](
            self._rows.table, self._rows.factors, self._values, self._field.parameters,
            self._field.gradients, self._first, self._second, self._start, self._tops,
            self._changes, self._g_changes, self._stack, self._schedule, self._code_sums,
            self._stack.shape[1], self._stack.shape[2], self._plan.count, BETA_1=BETAS[0],
            BETA_2=BETAS[1], EPSILON=EPSILON, UPDATE=update, ROUND=self._rounds,
            SQUEEZE=self._squeeze is not None, MUON=self._muon, PADDED=self._rows.padded,
            num_warps=4,
        )  # fmt: skip

    def _gradients(self) -> None:
        """Both passes forward and backward."""
        recipe, rays = self._recipe, self._rays
        white = self._settings.white_background
        self._field.pack()
        density, rgb = self._field.forward(self._origins, self._directions, self._t, self._encoded)
        volume.composite[(rays,)](
            density, rgb, self._t, self._lengths, self._noise, self._u, self._colors,
            self._coarse_errors, *self._g, self._t_all, self._t_drawn, self._source, self._n,
            self._drawn, self._n, self._drawn, recipe.density_noise,
            SHARED_COARSE / (3 * rays), TRAIN=True, COLOR=False, WHITE=white,
            IMPORTANCE=True, ASCENDING=False, SPLIT=True, PADDED=power_of_two(self._n),
            DRAWN=power_of_two(self._drawn), num_warps=4,
        )  # fmt: skip
        more_density, more_rgb = self._more.forward(
            self._origins, self._directions, self._t_drawn, self._encoded
        )
        g_density, g_rgb = self._g
        g_more_density, g_more_rgb = self._g_more
        volume.composite_joined[(rays,)](
            density, more_density, rgb, more_rgb, self._t_all, self._source, self._lengths,
            self._all_noise, self._colors, self._errors, g_density, g_more_density, g_rgb,
            g_more_rgb, self._n, self._drawn, recipe.density_noise, 1.0 / (3 * rays), WHITE=white,
            PADDED=power_of_two(self._n + self._drawn), num_warps=1,
        )  # fmt: skip
        self._field.backward(g_density, g_rgb)
        self._more.backward(g_more_density, g_more_rgb)

    # --- state -----------------------------------------------------------------------------

    def _moments_of(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Views of both moments by the name of what is trained."""
        for name in self._plan.parameters:
            second = None if f"fine.{name}" in self._rows.matrices else self._second
            view = self._plan.view
            yield (
                f"fine.{name}",
                view(self._first, name),
                second if second is None else view(second, name),
            )
        at = self._plan.count
        for layer in self._field.shape.layers() if self._rounds else ():
            part = slice(at, at + layer.out_width)
            yield f"fine.{layer.name}/scale", self._first[part], self._second[part]
            at += layer.out_width

    def moments(self, iteration: int) -> Moments:
        """Where the optimisers stand after so many iterations."""
        return {
            name: (iteration - (self._rounded_since if "/" in name else 0), first, second)
            for name, first, second in self._moments_of()
        }

    def restore(self, iteration: int, moments: Moments) -> None:
        """Go on from elsewhere; weights and changes were copied into their views.

        Args:
            iteration: steps done.
            moments: where the optimisers stood then.
        """
        for name, first, second in self._moments_of():
            step, other, another = moments.get(name, (0, None, None))
            if "/" in name:
                self._rounded_since = iteration - step
            for mine, found in ((first, other), (second, another)):
                if mine is not None:
                    mine.zero_() if found is None else mine.copy_(found)
        self._schedules = self._planned()
        self._renew()
