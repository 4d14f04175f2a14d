"""Several sweeps on one cluster: each takes its share of the workers, and none waits for another.

An actor on the head knows which drivers are there: each tells it so every few seconds, and one that
has been silent is forgotten. A driver takes the cluster's capacity divided by their number; its
lanes beyond that end after the item they are at, so that a sweep that comes later gets workers
within the time of one pruning. A training that another sweep does already is waited for without a
worker.
"""

import secrets
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.errors import StoreError
from orchestrator.log import logger
from orchestrator.plan import Training
from orchestrator.scheduler.actors import HEAD
from orchestrator.scheduler.desk import Register
from orchestrator.stages import lease_of_training
from orchestrator.store import Store

NAME, NAMESPACE = "prunefield-sweeps", "prunefield"
ASK_SECONDS = 2.0


class Shares:
    """This driver's side; never waits for an answer."""

    def __init__(self) -> None:
        self._me = secrets.token_hex(8)
        self._count = 1
        self._asked = -ASK_SECONDS
        self._answer: Any = None
        self._register: Any = None
        try:
            self._register = (
                ray.remote(num_cpus=0, resources=HEAD)(Register)
                .options(name=NAME, namespace=NAMESPACE, lifetime="detached", get_if_exists=True)
                .remote()
            )
        except (RayError, ValueError) as error:
            logger.debug("other sweeps on this cluster are not seen: %s", error)

    def sweeps(self) -> int:
        """How many sweeps share the cluster, as last heard; at least this one."""
        if self._register is None:
            return 1
        with suppress(RayError):
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                answer, self._answer = self._answer, None
                self._count = max(1, ray.get(answer))
            if self._answer is None and time.monotonic() - self._asked > ASK_SECONDS:
                self._asked = time.monotonic()
                self._answer = self._register.count.remote(self._me)
            return self._count
        self._answer = None  # the register is gone: this sweep counts itself alone
        self._count = 1
        return 1

    def leave(self) -> None:
        """This sweep is done; the others take its share."""
        if self._register is not None:
            with suppress(RayError):
                self._register.leave.remote(self._me)


class Elsewhere:
    """Whether another sweep does a training: it holds the lease, which is in the storage.

    Args:
        store: the storage; asked every few seconds at most.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, tuple[float, bool]] = {}

    def __call__(self, training: Training) -> bool:
        """Whether somebody holds its lease."""
        asked, held = self._known.get(training.key, (-ASK_SECONDS, False))
        if time.monotonic() - asked < ASK_SECONDS:
            return held
        try:
            holder = self._store.lease_holder(lease_of_training(training.key))
        except StoreError as error:  # whoever begins the training says so
            logger.debug("the lease of training %s cannot be read: %s", training.key, error)
            holder = None
        if holder is not None and not held:
            logger.info(
                "training %s is being done for %s, by %s: its model is waited for",
                training.key,
                holder.owner.what,
                holder,
            )
        self._known[training.key] = time.monotonic(), holder is not None
        return holder is not None
