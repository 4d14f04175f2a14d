"""Where lanes get calibrations and prunings: the work table, in an actor beside the driver."""

import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle

from orchestrator.results import Failure
from orchestrator.scheduler.actors import ask, beside_driver
from orchestrator.scheduler.desk import Desk
from orchestrator.scheduler.queue import Node
from orchestrator.scheduler.table import Item, Loss, Order, Work, WorkTable


class Dispatcher:
    """A handle on the work table of a sweep; it may be sent to workers.

    Making one does not wait for its actor: that takes as long to start as any worker, and they
    start side by side.

    Args:
        retries: how often an item is begun again after its worker died.
        work: what there is to do from the start, see `WorkTable.offer`.
        expecting: whether more will come, see `WorkTable.expect`.
    """

    def __init__(
        self,
        retries: int,
        work: Iterable[Work] = (),
        expecting: bool = False,
        table: ActorHandle | None = None,
    ) -> None:
        self._retries = retries
        self._table = table or beside_driver(Desk, WorkTable, retries, list(work), expecting)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Dispatcher, (self._retries, (), False, self._table))

    def expect(self, more: bool) -> None:
        """Say whether more work will come, see `WorkTable.expect`."""
        ask(self._table, "expect", more)

    def offer(self, work: Iterable[Work], nodes: Mapping[Item, Node] | None = None) -> None:
        """Add items, each with the key of the model it works on, and nodes that workers lack.

        The table would import what nodes are made of, to hand them on: it gets them pickled.
        """
        pickled = {item: pickle.dumps(node) for item, node in (nodes or {}).items()}
        ask(self._table, "offer", list(work), pickled)

    def limit(self, lanes: int | None) -> None:
        """Let surplus lanes end, see `WorkTable.limit`."""
        ask(self._table, "limit", lanes)

    def next(self, lane: str, model: str | None, reported: bool = False) -> Order:
        """The next item for a lane, see `WorkTable.next`."""
        return ask(self._table, "next", lane, model, reported)

    def resume(self, lane: str) -> Order:
        """What a lane held when its worker died, see `WorkTable.resume`."""
        return ask(self._table, "resume", lane)

    def overdue(self, item: Item, failure: Failure) -> None:
        """An item takes longer than it may, see `WorkTable.overdue`."""
        ask(self._table, "overdue", item, failure)

    def why_overdue(self, item: Item) -> Failure | None:
        """Why an item was given up, see `WorkTable.why_overdue`."""
        return ask(self._table, "why_overdue", item)

    def drop_lane(self, lane: str) -> tuple[Loss, ...]:
        """A lane will not come back, see `WorkTable.drop_lane`."""
        return ask(self._table, "drop_lane", lane)

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._table)
