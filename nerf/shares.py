"""One process's part of a training that several share: its rays, and the sum of all gradients."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, distributed


@dataclass(frozen=True)
class Share:
    """Which part of every batch is this process's.

    Every process holds all weights and takes the same step: the gradients of the parts are summed
    over the process group, each part having been weighed by its rays.

    Attributes:
        rank: number of this process, from 0.
        count: how many processes there are.
    """

    rank: int
    count: int

    def bounds(self, total: int) -> tuple[int, int]:
        """Where this process's rays begin and end in a batch; parts differ by one ray at most."""
        return self.rank * total // self.count, (self.rank + 1) * total // self.count

    def part(self, picked: Int[Tensor, " batch"]) -> Int[Tensor, " rays"]:
        """This process's rays of a batch."""
        start, stop = self.bounds(len(picked))
        return picked[start:stop]

    def sum_up(
        self, parameters: Sequence[Tensor], losses: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sum the gradients of all processes, and the losses with them, in one message.

        Args:
            parameters: whose ``grad`` is replaced by the sum.
            losses: two scalars.

        Returns:
            The sums of the two scalars.
        """
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([g.reshape(-1) for g in gradients] + [loss.reshape(1) for loss in losses])
        distributed.all_reduce(flat)
        place = 0
        for parameter in parameters:
            size = parameter.numel()
            parameter.grad = flat[place : place + size].view_as(parameter)
            place += size
        return flat[-2], flat[-1]
