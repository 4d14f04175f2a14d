"""How a network is laid out for the kernel of one width (`hopper_uniform.cu`), for rendering.

Every layer of the trunk is padded with zeros, in memory only, to the width of the widest, a
multiple of 16 channels. What the kernel reads are **panels** of 16 inputs × N outputs and
vectors whose columns are exchanged within 16; the words are those of `nerf.kernels.plan`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from nerf.field import FieldShape
from nerf.kernels.plan import CHUNK, Plan

POINT = 64  # columns of an encoded point
PANEL = 16  # inputs of a panel
TILE = 8192  # bytes of a tile of encoded points
SHARED_LIMIT = 232_448  # bytes of shared memory a program may have
REST = 256  # bytes of barriers
VECTOR_BYTES = 14_336  # that the ring leaves for the vector
LAYER_LIMIT = 31
WIDTHS = tuple(range(16, 256, 16))
RESIDENT = 96  # up to this width all weights lie in shared memory
# Milliseconds of a picture's evaluations on one H200 for a layer and for a thousand operations
# (padded), by a straight line through what was measured (docs/results/speed-notes.md).
UNIFORM_COST = (0.36, 0.0475)
CHAIN_COST = (1.23, 0.0389)
# Warp groups that multiply, by width (up to): the best measured of those that have the registers.
GROUPS = ((64, 6), (96, 4), (160, 3), (240, 2))


@dataclass(frozen=True)
class Width:
    """Compile-time constants of the kernel of one width.

    Attributes:
        width: channels of every layer.
        wanted: groups instead of those of `GROUPS`, to compare; 0 for these.
    """

    width: int
    wanted: int = 0

    @property
    def name(self) -> str:
        """Of the kernel and of its module."""
        return f"uniform_{self.width}_{self.groups}"

    @property
    def resident(self) -> bool:
        """Whether all weights lie in shared memory; else they are streamed."""
        return self.width <= RESIDENT

    @property
    def groups(self) -> int:
        """Warp groups that multiply."""
        return self.wanted or next(n for limit, n in GROUPS if self.width <= limit)

    @property
    def registers(self) -> int:
        """Registers of a thread that multiplies, where one more group streams weights."""
        return 240 if self.groups == 2 else 160

    @property
    def half(self) -> int:
        """Columns of a view layer that has at most half the channels."""
        return (self.width // 2 + 15) // 16 * 16

    @property
    def stages(self) -> int:
        """Slots of the ring of weights, 64 inputs each; 0 where there is none."""
        if self.resident:
            return 0
        left = SHARED_LIMIT - self.groups * TILE - REST - VECTOR_BYTES
        return min(12, left // (CHUNK * self.width * 2))

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 128 * (self.groups + (not self.resident))

    def constants(self) -> dict[str, int | str]:
        """What the source is compiled with."""
        return {
            "NAME": self.name,
            "WIDTH": self.width,
            "GROUPS": self.groups,
            "RESIDENT": int(self.resident),
            "STAGES": self.stages,
            "REGISTERS": self.registers,
        }


class Uniform:
    """The layout of one network shape at one width.

    Attributes:
        shape: the network.
        width: the kernel.
        view_columns: columns the view layer is padded to.
    """

    def __init__(self, shape: FieldShape, width: Width) -> None:
        self.shape, self.width = shape, width
        self.wide_view = shape.view > width.half
        self.view_columns = width.width if self.wide_view else width.half

    def reads_point(self, layer: int) -> bool:
        """Whether a layer of the trunk reads the encoded point."""
        return layer == 0 or (self.shape.skip is not None and layer == self.shape.skip + 1)

    @property
    def points(self) -> int:
        """One bit a layer that reads the encoded point."""
        return sum(1 << i for i in range(len(self.shape.trunk)) if self.reads_point(i))

    @property
    def vector_size(self) -> int:
        """Biases of the trunk, heads, and their four biases."""
        return (len(self.shape.trunk) + 1) * self.width.width + 3 * self.view_columns + 4

    @property
    def operations(self) -> int:
        """Floating-point operations of an evaluation, padding included."""
        width, layers = self.width.width, len(self.shape.trunk)
        inputs = sum(POINT for i in range(layers) if self.reads_point(i)) + width * (layers - 1)
        return 2 * (inputs * width + width * self.view_columns)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all panels."""
        return self.operations

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a program."""
        ring = self.width.stages * CHUNK * self.width.width * 2
        weights = self.weight_bytes if self.width.resident else ring
        return self.width.groups * TILE + weights + REST + 4 * self.vector_size

    def panels(self, weights: Mapping[str, Tensor]) -> Tensor:
        """All panels in the order in which the kernel reads them, flat.

        Args:
            weights: parameters by name, and "mix.weight".
        """
        found = []
        for index in range(len(self.shape.trunk)):
            matrix = weights[f"trunk.{index}.weight"]
            if self.reads_point(index):
                point = matrix[:, : self.shape.point_features]
                found.append(_panels(point, self.width.width, POINT))
                matrix = matrix[:, self.shape.point_features :]
            if index:
                found.append(_panels(matrix, self.width.width, self.width.width))
        found.append(_panels(weights["mix.weight"], self.view_columns, self.width.width))
        return torch.cat(found)

    def vector(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Biases of the trunk, weights and biases of the heads."""
        width = self.width.width
        parts = [
            exchanged(padded(weights[f"trunk.{i}.bias"], width))
            for i in range(len(self.shape.trunk))
        ]
        parts.append(exchanged(padded(weights["density.weight"][0], width)))
        parts += [exchanged(padded(row, self.view_columns)) for row in weights["rgb.weight"]]
        return torch.cat((*parts, weights["density.bias"], weights["rgb.bias"]))


def width_of(name: str) -> Width:
    """The width whose kernel and module have a name."""
    _, width, groups = name.split("_")
    return Width(int(width), int(groups))


def uniform_for(plan: Plan) -> Uniform | None:
    """The layout that renders a network in less time than `plan` would; None if there is none."""
    shape = plan.shape
    widest = max(*shape.trunk, shape.view)
    width = next((w for w in WIDTHS if w >= widest), None)
    if width is None or len(shape.trunk) > LAYER_LIMIT:
        return None
    found = Uniform(shape, Width(width))
    if found.shared_bytes > SHARED_LIMIT:
        return None
    ours, theirs = (
        cost(UNIFORM_COST, plan, found.operations),
        cost(CHAIN_COST, plan, plan.flops(True)),
    )
    return found if ours < theirs else None


def cost(line: tuple[float, float], plan: Plan, operations: int) -> float:
    """What evaluating a network costs, by one of the two lines."""
    return line[0] * len(plan.forward) + line[1] * operations / 1000


def exchanged(columns: Tensor) -> Tensor:
    """Columns (the first dimension) in the order in which a thread reads them.

    Of 16 columns a thread holds 2q, 2q + 1, 2q + 8 and 2q + 9: they lie side by side.
    """
    parts = columns.reshape(-1, 2, 4, 2, *columns.shape[1:])
    return parts.transpose(1, 2).reshape(columns.shape)


def padded(columns: Tensor, count: int) -> Tensor:
    """A vector with zeros behind it."""
    return pad(columns, (0, count - len(columns)))


def _panels(matrix: Tensor, outputs: int, inputs: int) -> Tensor:
    """Panels of a matrix (outputs, inputs), padded: 8 × 8 blocks, two of them along the inputs."""
    whole = pad(matrix, (0, inputs - matrix.shape[1], 0, outputs - matrix.shape[0]))
    blocks = whole.view(outputs // 8, 8, inputs // PANEL, 2, 8)
    return blocks.permute(2, 0, 3, 1, 4).reshape(-1)
