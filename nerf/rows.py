"""The rows of a network's layers, as the kernels that update whole rows go through them.

A row is one output channel of a layer: its weights, its bias and, where weights are rounded, its
scale. See `nerf.kernels.rounded`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nerf.backends import power_of_two
from nerf.field import FieldShape
from nerf.kernels.plan import Plan
from nerf.muon import for_muon, step_factor


class Rows:
    """Where the rows of a network stand in its flat vectors, and which of them are Muon's.

    Args:
        name: of the network: ``coarse`` or ``fine``.
        shape: its layers.
        plan: of its flat vectors.
        muon: whether matrices are trained by Muon.
        first_matrix: number of its first matrix among those of all networks.
        device: where the table is wanted.

    Attributes:
        table: (rows, 6) int32, see `nerf.kernels.rounded.row_gradients`.
        factors: (rows,) fp32, see `nerf.kernels.rounded.update_rows`.
        matrices: names of those that Muon trains, as ``fine.trunk.0.weight``.
        count: how many rows.
        padded: a power of two, at least the longest row.
    """

    def __init__(
        self,
        name: str,
        shape: FieldShape,
        plan: Plan,
        muon: bool,
        device: torch.device,
        first_matrix: int = 0,
    ) -> None:
        sizes = {f"{name}.{parameter}": size for parameter, (_, size) in plan.parameters.items()}
        named = {parameter: torch.empty(size) for parameter, size in sizes.items()}
        self.matrices = for_muon(named) if muon else ()
        self.matrix_sizes = [sizes[parameter] for parameter in self.matrices]
        table, factors = [], []
        for number, layer in enumerate(shape.layers()):
            weight, bias = f"{layer.name}.weight", f"{layer.name}.bias"
            slot = -1
            if f"{name}.{weight}" in self.matrices:
                slot = first_matrix + self.matrices.index(f"{name}.{weight}")
            at, size = plan.parameters[weight]
            for row in range(size[0]):
                place = plan.parameters[bias][0] + row
                table.append((at + row * size[1], size[1], place, number, slot, row))
                factors.append(step_factor(size))
        self.table = torch.tensor(table, dtype=torch.int32, device=device)
        self.factors = torch.tensor(factors, device=device)
        self.count = len(table)
        self.padded = power_of_two(int(self.table[:, 1].max()))


def stack_of(sizes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Room for the steps of several matrices at once: (matrices, most rows, most columns), zero."""
    height = max((size[0] for size in sizes), default=0)
    width = max((size[1] for size in sizes), default=0)
    return torch.zeros(len(sizes), height, width, device=device)
