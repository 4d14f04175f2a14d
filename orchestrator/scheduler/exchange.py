"""Calibration statistics, shared through Ray's object store.

They are put there once a model; every pruning worker reads the same memory of its node instead of
a file. An actor beside the driver owns them, so they outlive the worker that computed them and the
node that it was on. They are a short cut: what cannot be had here is in the store.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from orchestrator.scheduler.actors import beside_driver
from orchestrator.scheduler.desk import Board


class Exchange:
    """A handle on the shared statistics; it may be sent to workers.

    Arrays that come out of it are read-only.
    """

    def __init__(self, board: ActorHandle | None = None) -> None:
        self._board = board or beside_driver(Board)

    def __reduce__(self) -> tuple[type["Exchange"], tuple[ActorHandle]]:
        return (Exchange, (self._board,))

    def publish(self, key: str, tensors: Mapping[str, Any]) -> None:
        """Share numpy arrays under a key; the first to do so wins."""
        with suppress(RayError):
            ray.get(self._board.publish.remote(key, dict(tensors)))

    def find(self, key: str) -> Mapping[str, Any] | None:
        """The arrays of a key, or None if they are not to be had here."""
        with suppress(RayError):
            references = ray.get(self._board.find.remote(key))
            if references:
                return ray.get(references[0])
        return None

    def close(self) -> None:
        """Give the memory back."""
        ray.kill(self._board)
