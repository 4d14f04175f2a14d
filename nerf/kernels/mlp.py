"""Networks on the fused kernels: `PackedField` evaluates one, `FusedField` trains one.

Matrix products read bf16 and sum in fp32; master weights and gradients are fp32. A `FusedField`
allocates everything when it is made: `pack`, `forward` and `backward` launch kernels only (no
allocation, no synchronisation), so that a training step can be one CUDA graph.

The gradients of the merged layer (see `nerf.kernels.plan`), with M = A·F, A the feature columns of
W_view, F = W_feature, b_f its bias, dM = Σ δ hᵀ and δ the deltas of view, are exactly

    dA = dM Fᵀ + (Σ δ) b_fᵀ,   dF = Aᵀ dM,   db_f = Aᵀ Σ δ,   db_view = Σ δ,
    dD = Σ_rays (Σ_samples δ) γ(d)ᵀ   for the direction columns D.

Importing this module needs Triton; `nerf.kernels.available` says whether that works here.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from nerf.encoding import encode
from nerf.field import Field, FieldShape
from nerf.kernels import chain, gradients, hopper
from nerf.kernels.plan import (
    CHUNK,
    SLOT,
    Plan,
    padded_rows,
    plan_for,
    swizzled,
)
from nerf.kernels.uniform import WIDTHS, Uniform, Width, exchanged, uniform_for

log = logging.getLogger(__name__)

GATHER_BLOCK = 1024  # elements a program packs
REDUCE_BLOCK = 512  # gradients a program sums up
PACK_BLOCK = 2048  # elements a program packs (`pack_weights`, hopper_merge.cu)
DEFAULT_BUILD = hopper.Build()
# What two kernels may differ by: bf16 explains 7e-3 of float64, and a wrong one gives about 1.
UNIFORM_TOLERANCE = 0.05
RAYS = 8  # rays a program of `ray_gradients` (hopper_merge.cu) takes


@dataclass(frozen=True)
class Launch:
    """How the kernels are launched; the defaults are the best measured (docs/results/speed.md).

    Attributes:
        kind: "triton" (any GPU) or "hopper" (compute capability 9.0; CUDA, `nerf.kernels.hopper`).
        block: rows a program carries ("triton").
        warps: warps a program has ("triton").
        stages: depth of the pipeline of weights ("triton").
        gradient_rows: rows a step of the weight gradients takes ("triton").
        gradient_stages: depth of the pipeline of the weight gradients ("triton").
        dtype: what the matrix products read; fp32 (for tests) needs "triton".
        build: compile-time constants ("hopper").
        uniform: whether the kernels of one width may evaluate ("hopper").
    """

    kind: str = "triton"
    block: int = 128
    warps: int = 8
    stages: int = 3
    gradient_rows: int = 64
    gradient_stages: int = 4
    dtype: torch.dtype = torch.bfloat16
    build: hopper.Build = DEFAULT_BUILD
    uniform: bool = True


HOPPER = Launch(kind="hopper")


def default_launch(device: torch.device, shape: FieldShape) -> Launch:
    """The fastest launch of a network on a device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        reason = hopper.unavailable() or hopper.unsupported(plan_for(shape))
        if reason is None:
            return HOPPER
        log.info("no Hopper kernels for this network: %s", reason)
    return Launch()


def programs(device: torch.device) -> int:
    """Programs that fill the device at one program a multiprocessor."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2


class PackedField:
    """One network packed for evaluation; nothing of it is trained.

    Args:
        field: the network, on the device.
        launch: how; the fastest that works here by default.
        layout: of the kernel of one width, which is then used unasked.

    Example:
        >>> density, rgb = PackedField(field)(origins, directions, distances, view_directions)
    """

    def __init__(
        self, field: Field, launch: Launch | None = None, layout: Uniform | None = None
    ) -> None:
        device = field.rgb.weight.device
        self.shape = field.shape
        self.launch = launch or default_launch(device, field.shape)
        self.plan = plan_for(field.shape)
        self.uniform = layout or uniform_layout(self.plan, self.launch, device)
        columns = self.plan.view_columns
        with torch.no_grad():
            weights = {name: value.detach().float() for name, value in field.named_parameters()}
            from_feature, from_direction = weights["view.weight"].split(
                (self.shape.feature, self.shape.direction_features), dim=1
            )
            # In float64: merging costs nothing and should not round.
            mix = from_feature.double() @ weights["feature.weight"].double()
            constant = from_feature.double() @ weights["feature.bias"].double()
            weights["mix.weight"] = mix.float()
            if self.uniform is not None:
                columns = self.uniform.view_columns
            # Padded to whole chunks, so that the kernels read aligned rows.
            padding = columns - self.shape.view
            self.direction = pad(from_direction, (0, 0, 0, padding))
            self.constant = pad((weights["view.bias"].double() + constant).float(), (0, padding))
            self._pack(weights)
        self.table = self.plan.table().to(device)
        self.programs = programs(device)
        self._scratch: Tensor | None = None

    def _pack(self, weights: Mapping[str, Tensor]) -> None:
        """Weights and vectors as the kernel reads them."""
        if self.uniform is not None:
            self.direction, self.constant = exchanged(self.direction), exchanged(self.constant)
            self.tiles = self.uniform.panels(weights).to(self.launch.dtype)
            self.vector = self.uniform.vector(weights)
            return
        self.tiles = self.plan.forward_tiles(weights).to(self.launch.dtype)
        if self.launch.kind == "hopper":
            self.tiles = swizzled(self.tiles)
        self.vector = self.plan.vector(weights)

    def share(self, view_directions: Float[Tensor, "rays 3"]) -> Float[Tensor, "rays columns"]:
        """What the view layer adds for a ray (its direction's share and biases), padded."""
        encoded = encode(view_directions, self.shape.direction_octaves)
        return torch.addmm(self.constant, encoded, self.direction.t())

    @torch.no_grad()
    def __call__(
        self,
        origins: Float[Tensor, "rays 3"],
        directions: Float[Tensor, "rays 3"],
        distances: Float[Tensor, "rays samples"],
        view_directions: Float[Tensor, "rays 3"],
    ) -> tuple[Float[Tensor, "rays samples"], Float[Tensor, "rays samples 3"]]:
        """Evaluate at origin + distance · direction.

        Args:
            origins: ray origins (scene units or NDC).
            directions: ray directions, of any length.
            distances: where on each ray, in lengths of `directions`.
            view_directions: unit directions the colour depends on.

        Returns:
            Raw density (before ReLU) and raw colour (before the sigmoid), fp32.
        """
        rays, samples = distances.shape
        density = torch.empty_like(distances)
        rgb = distances.new_empty(rays, samples, 3)
        if rays * samples:
            launch_forward(
                self,
                origins.contiguous(),
                directions.contiguous(),
                distances.contiguous(),
                self.share(view_directions),
                density,
                rgb,
            )
        return density, rgb


def launch_uniform(
    packed: PackedField,
    layout: Uniform,
    origins: Tensor,
    directions: Tensor,
    distances: Tensor,
    share: Tensor,
    density: Tensor,
    rgb: Tensor,
) -> None:
    """Launch the kernel of one width."""
    width = layout.width
    rows, samples = distances.numel(), distances.shape[1]
    tiles = triton.cdiv(rows, CHUNK)
    inverse = min(2**32 // samples, 2**32 - 1)  # ctypes takes the lower 32 bits
    arguments = hopper.structure(
        origins, directions, distances, share, packed.tiles, packed.vector, density, rgb, rows,
        samples, tiles, len(layout.shape.trunk), layout.points, layout.shape.point_octaves,
        layout.vector_size, int(layout.wide_view), inverse, layout.weight_bytes,
    )  # fmt: skip
    device = hopper.kernels(packed.launch.build, distances.device.index or 0, width.name)
    grid = min(packed.programs, triton.cdiv(tiles, width.groups))
    device.launch(width.name, (grid, 1), width.threads, layout.shared_bytes, arguments)


def compile_widths(device: torch.device, shape: FieldShape) -> None:
    """Begin to compile what evaluates the prunings of a network that is trained meanwhile."""
    launch = default_launch(device, shape)
    if launch.kind == "hopper" and launch.uniform:
        hopper.compile_ahead(launch.build, [Width(width).name for width in reversed(WIDTHS)])


def uniform_layout(plan: Plan, launch: Launch, device: torch.device) -> Uniform | None:
    """The layout for the kernel of one width, where that is faster and right; else None."""
    if launch.kind != "hopper" or not launch.uniform:
        return None
    layout = uniform_for(plan)
    if layout is None:
        return None
    fault = _uniform_fault(layout.width.width, launch.build, device)
    return layout if fault is None else None


@lru_cache(maxsize=64)
def _uniform_fault(width: int, build: hopper.Build, device: torch.device) -> str | None:
    """Why the kernel of a width cannot be trusted here; None if it can. Asked once a process.

    It is compared with `hopper_chain.cu` on a network with a skip, whose layers are not quite as
    wide, of rows that end within a tile.
    """
    shape = FieldShape(trunk=(width, width - 3, width), skip=0, feature=8, view=width // 2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        field = Field(shape)
        given = [torch.rand(n) for n in ((37, 3), (37, 3), (37, 43), (37, 3))]
    layout = Uniform(shape, Width(width))
    try:
        field.to(device)
        given = [value.to(device) for value in given]
        expected = PackedField(field, replace(HOPPER, build=build, uniform=False))(*given)
        found = PackedField(field, replace(HOPPER, build=build), layout)(*given)
        for one, other in zip(found, expected, strict=True):
            error = float((one - other).norm() / other.norm())
            if not error < UNIFORM_TOLERANCE:
                raise ValueError(f"its outputs are wrong here (error {error:.2g})")
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or a driver throws
        fault = f"{type(error).__name__}: {error}"
        log.warning("the kernel of width %d is not used: %s", width, fault)
        return fault
    return None


def chain_grid(tiles: int, programs: int) -> int:
    """Programs to launch of a chain over tiles of 64 rows."""
    return min(triton.cdiv(tiles, 2), programs)


def forward_arguments(
    plan: Plan,
    origins: Tensor,
    directions: Tensor,
    distances: Tensor,
    share: Tensor,
    table: Tensor,
    tiles: Tensor,
    vector: Tensor,
    activations: Tensor,
    gates: Tensor,
    density: Tensor,
    rgb: Tensor,
    rows: int,
    row_tiles: int,
) -> Any:
    """The structure `Forward` of `hopper_chain.cu`."""
    return hopper.structure(
        origins, directions, distances, share, table, tiles, vector, activations, gates, density,
        rgb, rows, distances.shape[1], row_tiles, plan.activations, len(plan.forward),
        plan.density_at, plan.rgb_at, plan.heads_bias_at, plan.shape.point_octaves,
        plan.vector_size,
    )  # fmt: skip


def launch_forward(
    packed: PackedField,
    origins: Tensor,
    directions: Tensor,
    distances: Tensor,
    share: Tensor,
    density: Tensor,
    rgb: Tensor,
) -> None:
    """Launch the forward chain without keeping activations."""
    plan, launch = packed.plan, packed.launch
    rows = distances.numel()
    if packed.uniform is not None:
        launch_uniform(packed, packed.uniform, origins, directions, distances, share, density, rgb)
        return
    if launch.kind == "hopper":
        device = hopper.kernels(launch.build, distances.device.index or 0, "render")
        arguments = forward_arguments(
            plan, origins, directions, distances, share, packed.table, packed.tiles,
            packed.vector, packed.tiles, packed.tiles, density, rgb, rows, triton.cdiv(rows, CHUNK),
        )  # fmt: skip
        grid = chain_grid(triton.cdiv(rows, CHUNK), packed.programs)
        device.launch(
            "forward_render", (grid, 1), hopper.THREADS, launch.build.render_bytes, arguments
        )
        return
    count = min(triton.cdiv(rows, launch.block), packed.programs)
    if packed._scratch is None or packed._scratch.shape[1] < count * launch.block:
        packed._scratch = torch.empty(
            plan.activations,
            count * launch.block,
            CHUNK,
            dtype=launch.dtype,
            device=distances.device,
        )
    chain.forward_chain[(count,)](
        origins, directions, distances, share, packed.table, packed.tiles, packed.vector,
        packed._scratch, density, rgb, rows, distances.shape[1], packed._scratch.shape[1],
        len(plan.forward), plan.density_at, plan.rgb_at, plan.heads_bias_at,
        plan.shape.point_octaves, KEEP=False, BLOCK=launch.block, num_warps=launch.warps,
        num_stages=launch.stages,
    )  # fmt: skip


class FusedField:
    """One network that trains on the fused kernels, for a fixed number of rays and samples.

    Attributes:
        extended: fp32 master parameters, flat, in the order of `FieldShape.layers` (weight, then
            bias), then `mix` and one zero; `parameters` is the view of the former.
        gradients: their gradients, in the same order, overwritten by `backward`.
        density, rgb: raw outputs of the last `forward`, (R, S) and (R, S, 3).
    """

    def __init__(
        self,
        shape: FieldShape,
        rays: int,
        samples: int,
        device: str | torch.device,
        launch: Launch | None = None,
    ) -> None:
        device = torch.device(device)
        self.shape, self.rays, self.samples = shape, rays, samples
        self.plan = plan = plan_for(shape)
        self.launch = launch or default_launch(device, shape)
        self.programs = programs(device)
        dtype = self.launch.dtype
        self.rows = rays * samples
        self.padded = padded_rows(self.rows)

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.extended = empty(plan.extended)
        self.extended_gradients = empty(plan.extended)
        self.parameters = self.extended[: plan.count]
        self.gradients = self.extended_gradients[: plan.count]
        self._weights = plan.views(self.extended)
        self._grads = plan.views(self.extended_gradients)
        on_hopper = self.launch.kind == "hopper"

        def index(tiles: Tensor) -> Tensor:
            return (swizzled(tiles.view(-1, CHUNK, CHUNK)).view(-1) if on_hopper else tiles).to(
                device
            )

        self._forward_index = index(plan.forward_index)
        self._backward_index = index(plan.backward_index)
        self._vector_index = plan.vector_index.to(device)
        found = plan.gradient_index
        self._gradient_index = found.to(device)
        self.table = plan.table().to(device)
        self.backward_table = plan.table(backward=True).to(device)
        self.tiles = empty(len(plan.forward_index), dtype=dtype)
        self.backward_tiles = empty(len(plan.backward_index), dtype=dtype)
        self.vector = empty(plan.vector_size)
        split = plan.work_in_pairs if on_hopper else plan.work
        items, first, slots = split(self.padded, self.programs)
        self.items, self.first_item, self.slots = (t.to(device) for t in (items, first, slots))
        self.partials = empty(len(items), SLOT)
        self.activations = empty(plan.activations, self.padded, CHUNK, dtype=dtype)
        self.deltas = empty(plan.deltas, self.padded, CHUNK, dtype=dtype)
        self.share = empty(rays, plan.view_columns)
        self.constant = empty(shape.view)
        self.density = empty(rays, samples)
        self.rgb = empty(rays, samples, 3)
        if on_hopper:
            tiles = self.padded // CHUNK
            self.activations = self.activations.view(tiles, plan.activations, CHUNK, CHUNK)
            self.deltas = self.deltas.view(tiles, plan.deltas, CHUNK, CHUNK)
            self.gates = empty(len(plan.forward), tiles, 128, 4, dtype=torch.int32)
            self.ray_parts = empty(triton.cdiv(rays, RAYS), shape.view, shape.direction_features)
            self.hopper = hopper.kernels(self.launch.build, device.index or 0, *hopper.TRAINING)

    def compute_as(self, other: "FusedField") -> None:
        """Use what another of the same shape packs: one network at several sets of samples."""
        self.extended, self.parameters = other.extended, other.parameters
        self._weights, self.constant, self.vector = other._weights, other.constant, other.vector
        self.tiles, self.backward_tiles = other.tiles, other.backward_tiles

    def load(self, field: Field) -> None:
        """Copy the weights of a `Field` and pack them."""
        with torch.no_grad():
            for name, value in field.named_parameters():
                self._weights[name].copy_(value)
        self.pack()

    def store(self, field: Field) -> None:
        """Copy the weights into a `Field`."""
        with torch.no_grad():
            for name, value in field.named_parameters():
                value.copy_(self._weights[name])

    def _view_parts(self, views: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weight = views["view.weight"]
        return weight[:, : self.shape.feature], weight[:, self.shape.feature :]

    @torch.no_grad()
    def pack(self) -> None:
        """Refresh the bf16 copies after the master weights changed."""
        if self.launch.kind == "hopper":
            self.hopper.launch(
                "merge", (self.shape.view, 1), 1024, 0, self._merged(), self.extended, self.constant
            )
            counts = len(self._forward_index), len(self._backward_index), len(self._vector_index)
            arguments = hopper.structure(
                self.extended, self._forward_index, self._backward_index, self._vector_index,
                self.tiles, self.backward_tiles, self.vector, *counts,
            )  # fmt: skip
            self.hopper.launch(
                "pack_weights", (triton.cdiv(max(counts), PACK_BLOCK), 3), 256, 0, arguments
            )
            return
        from_feature, _ = self._view_parts(self._weights)
        torch.mm(from_feature, self._weights["feature.weight"], out=self._weights["mix.weight"])
        torch.addmv(
            self._weights["view.bias"],
            from_feature,
            self._weights["feature.bias"],
            out=self.constant,
        )
        for index, target in (
            (self._forward_index, self.tiles),
            (self._backward_index, self.backward_tiles),
            (self._vector_index, self.vector),
        ):
            count = len(index)
            gradients.gather[(triton.cdiv(count, GATHER_BLOCK),)](
                self.extended, index, target, count, BLOCK=GATHER_BLOCK, num_warps=4
            )

    @torch.no_grad()
    def forward(
        self,
        origins: Float[Tensor, "rays 3"],
        directions: Float[Tensor, "rays 3"],
        distances: Float[Tensor, "rays samples"],
        encoded_directions: Float[Tensor, "rays features"],
    ) -> tuple[Float[Tensor, "rays samples"], Float[Tensor, "rays samples 3"]]:
        """Evaluate at origin + distance · direction and keep what `backward` needs.

        Args:
            origins: ray origins, contiguous fp32, as the rest.
            directions: ray directions, of any length.
            distances: where on each ray, in lengths of `directions`.
            encoded_directions: γ of the unit view directions.

        Returns:
            `density` and `rgb` (raw; overwritten by the next call).
        """
        self._encoded_directions = encoded_directions
        _, from_direction = self._view_parts(self._weights)
        torch.addmm(
            self.constant,
            encoded_directions,
            from_direction.t(),
            out=self.share[:, : self.shape.view],
        )
        plan, launch = self.plan, self.launch
        if launch.kind == "hopper":
            tiles = self.padded // CHUNK
            arguments = forward_arguments(
                plan, origins, directions, distances, self.share, self.table, self.tiles,
                self.vector, self.activations, self.gates, self.density, self.rgb, self.rows, tiles,
            )  # fmt: skip
            self._chain("forward_train", arguments)
            return self.density, self.rgb
        grid = (triton.cdiv(self.padded, launch.block),)
        chain.forward_chain[grid](
            origins, directions, distances, self.share, self.table, self.tiles, self.vector,
            self.activations, self.density, self.rgb, self.rows, self.samples, self.padded,
            len(plan.forward), plan.density_at, plan.rgb_at, plan.heads_bias_at,
            self.shape.point_octaves, KEEP=True, BLOCK=launch.block, num_warps=launch.warps,
            num_stages=launch.stages,
        )  # fmt: skip
        return self.density, self.rgb

    @torch.no_grad()
    def backward(
        self,
        g_density: Float[Tensor, "rays samples"],
        g_rgb: Float[Tensor, "rays samples 3"],
    ) -> Float[Tensor, "parameters"]:
        """Gradients of every parameter, given those of the raw outputs of the last `forward`.

        Args:
            g_density: gradient with respect to the raw density, contiguous fp32.
            g_rgb: with respect to the raw colour.

        Returns:
            `gradients` (overwritten by the next call).
        """
        self.backward_deltas(g_density, g_rgb)
        self.backward_weights()
        return self.gradients

    def _chain(self, name: str, arguments: Any) -> None:
        build = self.launch.build
        grid = chain_grid(self.padded // CHUNK, self.programs)
        self.hopper.launch(name, (grid, 1), hopper.THREADS, build.train_bytes, arguments)

    def backward_deltas(self, g_density: Tensor, g_rgb: Tensor) -> None:
        """The backward chain alone: deltas of every layer."""
        plan, launch = self.plan, self.launch
        if launch.kind == "hopper":
            arguments = hopper.structure(
                g_density, g_rgb, self.backward_table, self.backward_tiles, self.vector,
                self.gates, self.deltas, self.rows, self.padded // CHUNK, plan.deltas,
                len(plan.backward), plan.forward[-1].outputs, plan.delta_of["view"],
                plan.density_at, plan.rgb_at, plan.vector_size,
            )  # fmt: skip
            self._chain("backward", arguments)
            return
        grid = (triton.cdiv(self.padded, launch.block),)
        chain.backward_chain[grid](
            g_density, g_rgb, self.backward_table, self.backward_tiles, self.vector,
            self.activations, self.deltas, self.rows, self.padded, len(plan.backward),
            plan.forward[-1].outputs, plan.activation_of["view"], plan.delta_of["view"],
            plan.rgb_at, BLOCK=launch.block, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def backward_weights(self) -> None:
        """Weight gradients from activations and deltas."""
        self.partial_sums()
        self.reduce()
        self.unmerge()

    def reduce(self) -> None:
        """Add up the partial sums of every gradient."""
        count = self.plan.extended
        gradients.reduce_gradients[(triton.cdiv(count, REDUCE_BLOCK),)](
            self.partials, self._gradient_index, self.slots, self.extended_gradients, count,
            BLOCK=REDUCE_BLOCK, num_warps=4,
        )  # fmt: skip

    def partial_sums(self) -> None:
        """The products of deltas and activations, before their reduction."""
        launch = self.launch
        if launch.kind == "hopper":
            arguments = hopper.structure(
                self.deltas, self.activations, self.items, self.first_item, self.partials,
                self.plan.deltas, self.plan.activations,
            )  # fmt: skip
            self.hopper.launch(
                "weight_gradients", (self.programs, 1), hopper.THREADS,
                launch.build.gradient_bytes, arguments,
            )  # fmt: skip
        else:
            gradients.partial_gradients[(self.programs,)](
                self.deltas, self.activations, self.items, self.first_item, self.partials,
                self.padded, ROWS=launch.gradient_rows, num_warps=8,
                num_stages=launch.gradient_stages,
            )  # fmt: skip

    def _merged(self) -> Any:
        """The structure `Merged` of `hopper_merge.cu`."""
        names = ("view.weight", "view.bias", "feature.weight", "feature.bias")
        shape, plan = self.shape, self.plan
        return hopper.structure(
            *(plan.parameters[name][0] for name in names), plan.count, shape.view, shape.feature,
            shape.trunk[-1], shape.direction_features,
        )  # fmt: skip

    def _unmerge_hopper(self) -> None:
        plan, shape = self.plan, self.shape
        parts = len(self.ray_parts)
        arguments = hopper.structure(
            self.deltas, self._encoded_directions, self.ray_parts, self.rays, self.samples,
            plan.deltas, plan.delta_of["view"], plan.forward[-1].outputs, shape.view,
            shape.direction_features,
        )  # fmt: skip
        self.hopper.launch("ray_gradients", (parts, 1), 512, 0, arguments)
        feature, last = triton.cdiv(shape.feature, 32), triton.cdiv(shape.trunk[-1], 32)
        tiles = triton.cdiv(shape.view, 16) * feature + triton.cdiv(shape.feature, 16) * last
        directions = triton.cdiv(shape.view * shape.direction_features, 64)
        grid = tiles + triton.cdiv(shape.feature, 64) + directions
        self.hopper.launch(
            "unmerge", (grid, 1), 256, 0, self._merged(), self.extended, self.extended_gradients,
            self.ray_parts, parts,
        )  # fmt: skip

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gradients of feature and view from those of `mix` and of each ray's share."""
        if self.launch.kind == "hopper":
            self._unmerge_hopper()
            return
        weights, grads = self._weights, self._grads
        first, chunks = self.plan.delta_of["view"], self.plan.forward[-1].outputs
        view = self.shape.view
        delta = self.deltas[first : first + chunks, : self.rows]
        per_ray = delta.view(chunks, self.rays, self.samples, CHUNK).sum(2, dtype=torch.float32)
        per_ray = per_ray.permute(1, 0, 2).reshape(self.rays, chunks * CHUNK)[:, :view]
        from_feature, _ = self._view_parts(weights)
        g_feature, g_direction = self._view_parts(grads)
        d_mix = grads["mix.weight"]
        total = per_ray.sum(0)
        grads["view.bias"].copy_(total)
        g_direction.copy_(per_ray.t() @ self._encoded_directions)
        g_feature.copy_(
            torch.addr(d_mix @ weights["feature.weight"].t(), total, weights["feature.bias"])
        )
        torch.mm(from_feature.t(), d_mix, out=grads["feature.weight"])
        torch.mv(from_feature.t(), total, out=grads["feature.bias"])


class _Evaluate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameters, field, origins, directions, distances, encoded):  # type: ignore[no-untyped-def]
        field.parameters.copy_(parameters)
        field.pack()
        density, rgb = field.forward(origins, directions, distances, encoded)
        ctx.field = field
        return density.clone(), rgb.clone()

    @staticmethod
    def backward(ctx, g_density, g_rgb):  # type: ignore[no-untyped-def]
        gradient = ctx.field.backward(g_density.contiguous(), g_rgb.contiguous())
        return gradient.clone(), None, None, None, None, None


def evaluate(
    parameters: Float[Tensor, "parameters"],
    field: FusedField,
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
    distances: Float[Tensor, "rays samples"],
    encoded_directions: Float[Tensor, "rays features"],
) -> tuple[Float[Tensor, "rays samples"], Float[Tensor, "rays samples 3"]]:
    """`FusedField` for autograd: differentiable in the flat `parameters` only.

    One forward of a `FusedField` must be followed by its backward before the next forward.
    """
    return _Evaluate.apply(parameters, field, origins, directions, distances, encoded_directions)
