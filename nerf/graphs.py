"""A training step as one CUDA graph: the GPU repeats it without waiting for Python."""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class StepGraph(Generic[Result]):
    """Captures one call of a function and replays it with other inputs.

    Capturing runs nothing: the function must have run a few times before, so that everything it
    allocates once is there.

    Args:
        function: what to capture; whatever else it reads (weights, learning rate) is read anew at
            each replay.
        generator: random numbers it draws; it goes on from replay to replay.
        inputs: what it is called with: their sizes are fixed.
        alone: whether no other thread may call CUDA meanwhile; NCCL's watchdog does.

    Raises:
        RuntimeError: the function does something that a graph cannot hold.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        generator: torch.Generator,
        *inputs: Tensor,
        alone: bool = True,
    ) -> None:
        self._inputs = tuple(value.clone() for value in inputs)
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(generator)
        mode = "global" if alone else "thread_local"
        with torch.cuda.graph(self._graph, capture_error_mode=mode):
            self._result = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Result:
        """Replay it on other inputs; the result is overwritten by the next replay."""
        for own, value in zip(self._inputs, inputs, strict=True):
            own.copy_(value)
        self._graph.replay()
        return self._result
