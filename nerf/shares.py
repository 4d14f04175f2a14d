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

    def add_up(self, vectors: Sequence[Tensor]) -> None:
        """Replace each vector by its sum over all processes, side by side."""
        works = [distributed.all_reduce(vector, async_op=True) for vector in vectors]
        for work in works:
            work.wait()

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        distributed.all_reduce(values)
        return values

    def all_can(self, can: bool, device: torch.device) -> bool:
        """Whether all processes can do something: they have to do the same."""
        failures = self.total(torch.tensor([0.0 if can else 1.0], device=device))
        return not failures.any()
