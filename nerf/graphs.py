"""A training step as one CUDA graph: the GPU repeats it without waiting for Python."""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

Update = Callable[[Tensor], tuple[Tensor, Tensor]]


class StepGraph:
    """Captures one update and replays it with other rays.

    Capturing runs nothing: the update must have run a few times before, so that everything it
    allocates once is there.

    Args:
        update: takes the numbers of the rays to train on, gives the coarse and the fine MSE;
            whatever else it reads (weights, learning rate) is read anew at each replay.
        picked: numbers of some rays: their count is fixed.
        generator: random numbers the update draws; it goes on from replay to replay.
        alone: whether no other thread may call CUDA meanwhile; NCCL's watchdog does.

    Raises:
        RuntimeError: the update does something that a graph cannot hold.
    """

    def __init__(
        self,
        update: Update,
        picked: Int[Tensor, " rays"],
        generator: torch.Generator,
        alone: bool = True,
    ) -> None:
        self._picked = picked.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(generator)
        mode = "global" if alone else "thread_local"
        with torch.cuda.graph(self._graph, capture_error_mode=mode):
            self._result = update(self._picked)

    def __call__(self, picked: Int[Tensor, " rays"]) -> tuple[Tensor, Tensor]:
        """Replay the update on other rays; the result is overwritten by the next replay."""
        self._picked.copy_(picked)
        self._graph.replay()
        return self._result
