"""A training step as one CUDA graph: the GPU repeats it without waiting for Python."""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

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


def captured(
    what: str,
    function: Callable[..., Result],
    generator: torch.Generator,
    *inputs: Tensor,
    alone: bool = True,
) -> tuple[StepGraph[Result] | None, torch.Generator]:
    """A `StepGraph`, where one can be had; else a note, and steps go on without.

    Args:
        what: what is done in steps, for the note: "training".
        function: as of `StepGraph`, and so are the others.
        generator: random numbers that it draws, on the GPU.
        inputs: what it is called with.
        alone: whether no other thread may call CUDA meanwhile.

    Returns:
        The graph, and the generator to draw from: a failed capture leaves its own unusable.
    """
    torch.cuda.synchronize(generator.device)
    random_state = generator.get_state()
    try:
        return StepGraph(function, generator, *inputs, alone=alone), generator
    except RuntimeError as error:
        fresh = torch.Generator(generator.device)
        fresh.set_state(random_state)
        log.warning("%s without a CUDA graph, which is slower: %s", what, error)
        return None, fresh
