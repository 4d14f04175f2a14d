"""Where lanes get their work: an actor of no cost that hands out calibrations and prunings.

It prefers work on the model that a lane has loaded. It remembers what each lane holds, so that a
lane that died takes it up again, a given number of times.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle

from orchestrator.scheduler.queue import Item


@dataclass(frozen=True)
class Order:
    """What a lane is to do next.

    Attributes:
        item: the node to run, or None: there is nothing (now), the lane may end.
        lost: nodes that killed their worker too often; the lane reports them as failed.
    """

    item: Item | None
    lost: tuple[Item, ...] = ()


class WorkTable:
    """The dispatcher's state, without Ray.

    Args:
        retries: how often an item is begun again after its worker died.
    """

    def __init__(self, retries: int) -> None:
        self._retries = retries
        self._ready: OrderedDict[str, deque[Item]] = OrderedDict()
        self._held: dict[str, tuple[str, Item]] = {}
        self._begun: Counter[Item] = Counter()

    def offer(self, work: Iterable[tuple[str, Item]]) -> None:
        """Add items, each with the key of the model it works on."""
        for model, item in work:
            self._ready.setdefault(model, deque()).append(item)

    def next(self, lane: str, model: str | None) -> Order:
        """The next item for a lane that has finished what it held, or never held anything.

        Args:
            lane: which lane asks.
            model: the model it has loaded, if any.
        """
        self._held.pop(lane, None)
        for key in [model] if model in self._ready else list(self._ready):
            assert key is not None
            item = self._ready[key].popleft()
            if not self._ready[key]:
                del self._ready[key]
            self._held[lane] = (key, item)
            self._begun[item] += 1
            return Order(item)
        return Order(None)

    def resume(self, lane: str) -> Order:
        """What a lane held when its worker died: again, unless that happened too often."""
        if lane not in self._held:
            return Order(None)
        _, item = self._held[lane]
        if self._begun[item] > self._retries:
            del self._held[lane]
            return Order(None, lost=(item,))
        self._begun[item] += 1
        return Order(item)

    def drop_lane(self, lane: str) -> None:
        """A lane will not come back: what it held goes to another."""
        if lane in self._held:
            self.offer([self._held.pop(lane)])


class Dispatcher:
    """A handle on the work table of a sweep; it may be sent to workers.

    Args:
        retries: how often an item is begun again after its worker died.
    """

    def __init__(self, retries: int, table: ActorHandle | None = None) -> None:
        self._retries = retries
        self._table = table or ray.remote(num_cpus=0)(WorkTable).remote(retries)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Dispatcher, (self._retries, self._table))

    def offer(self, work: Iterable[tuple[str, Item]]) -> None:
        """Add items, each with the key of the model it works on."""
        ray.get(self._table.offer.remote(list(work)))

    def next(self, lane: str, model: str | None) -> Order:
        """The next item for a lane, see `WorkTable.next`."""
        return ray.get(self._table.next.remote(lane, model))

    def resume(self, lane: str) -> Order:
        """What a lane held when its worker died, see `WorkTable.resume`."""
        return ray.get(self._table.resume.remote(lane))

    def drop_lane(self, lane: str) -> None:
        """A lane will not come back: what it held goes to another."""
        ray.get(self._table.drop_lane.remote(lane))

    def close(self) -> None:
        """End the actor."""
        ray.kill(self._table)
