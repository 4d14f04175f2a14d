"""What lanes are to do next: the dispatcher's state.

It prefers work on the model that a lane has loaded. It remembers what each lane holds and what it
has ended without reporting it yet, so that nothing is forgotten when a lane dies: what killed its
worker is begun again a given number of times, the rest is handed out anew (what is in the store
already costs nothing).

It has a process of its own, which imports what this module does: see `orchestrator.scheduler.desk`.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.results import Failure

Item = tuple[str, str]  # kind and key: enough for a worker to find the node
Work = tuple[str, Item]  # the key of the model, and what to do with it


@dataclass(frozen=True)
class Loss:
    """An item that must not be tried again.

    Attributes:
        item: which.
        failure: why; None: it killed its worker too often.
    """

    item: Item
    failure: Failure | None = None


@dataclass(frozen=True)
class Order:
    """What a lane is to do next.

    Attributes:
        item: the node to run, or None: there is nothing (now), the lane may end.
        lost: nodes that killed their worker too often or took too long; the lane reports them as
            failed.
        node: the node itself, pickled, where it is none that the plan knew from the start.
        wait: whether more will come: the lane asks again in a moment.
    """

    item: Item | None
    lost: tuple[Loss, ...] = ()
    node: bytes | None = None
    wait: bool = False


class WorkTable:
    """The dispatcher's state, without Ray and without the nodes themselves.

    Args:
        retries: how often an item is begun again after its worker died.
        work: what there is to do from the start, see `offer`.
        expecting: whether more will come, see `expect`.
    """

    def __init__(self, retries: int, work: Iterable[Work] = (), expecting: bool = False) -> None:
        self._retries = retries
        self._limit: int | None = None
        self._ready: OrderedDict[str, deque[Item]] = OrderedDict()
        self._held: dict[str, Work] = {}
        self._unreported: dict[str, list[Work]] = {}
        self._lost: dict[str, list[Loss]] = {}
        self._overdue: dict[Item, Failure] = {}
        self._begun: Counter[Item] = Counter()
        self._nodes: dict[Item, bytes] = {}
        self._expecting = expecting
        self.offer(work)

    def expect(self, more: bool) -> None:
        """Say whether more work will come, so that lanes without any wait for it."""
        self._expecting = more

    def limit(self, lanes: int | None) -> None:
        """Lanes beyond so many get nothing more, and so end."""
        self._limit = lanes

    def offer(self, work: Iterable[Work], nodes: Mapping[Item, bytes] | None = None) -> None:
        """Add items, each with the key of its model, and (pickled) nodes that workers lack."""
        self._nodes.update(nodes or {})
        for model, item in work:
            self._ready.setdefault(model, deque()).append(item)

    def next(self, lane: str, model: str | None, reported: bool = False) -> Order:
        """The next item for a lane that has finished what it held, or never held anything.

        Args:
            lane: which lane asks.
            model: the model it has loaded, if any.
            reported: whether it has reported all that it ended so far.
        """
        held = self._held.pop(lane, None)
        if reported:
            self._unreported.pop(lane, None)
            self._lost.pop(lane, None)
        elif held is not None:
            self._unreported.setdefault(lane, []).append(held)
        surplus = self._limit is not None and len(self._held) >= self._limit
        if not self._ready or surplus:
            return Order(None, wait=self._expecting and not surplus)
        key = model if model is not None and model in self._ready else next(iter(self._ready))
        item = self._ready[key].popleft()
        if not self._ready[key]:
            del self._ready[key]
        self._held[lane] = (key, item)
        self._begun[item] += 1
        return Order(item, node=self._nodes.get(item))

    def resume(self, lane: str) -> Order:
        """What a lane held when its worker died: again, unless that happened too often."""
        self._offer_unreported(lane)
        item = None
        if lane in self._held:
            _, item = self._held[lane]
            if self._is_lost(item):
                del self._held[lane]
                self._lost.setdefault(lane, []).append(Loss(item, self._overdue.get(item)))
                item = None
            else:
                self._begun[item] += 1
        node = None if item is None else self._nodes.get(item)
        return Order(item, tuple(self._lost.get(lane, ())), node, item is None and self._expecting)

    def _is_lost(self, item: Item) -> bool:
        return item in self._overdue or self._begun[item] > self._retries

    def overdue(self, item: Item, failure: Failure) -> None:
        """An item takes longer than it may: its worker is about to be ended for it."""
        self._overdue[item] = failure

    def why_overdue(self, item: Item) -> Failure | None:
        """Why an item was given up, if it took too long."""
        return self._overdue.get(item)

    def drop_lane(self, lane: str) -> tuple[Loss, ...]:
        """A lane will not come back: what it held goes to another, unless it is lost.

        Returns:
            Items that killed their worker too often or took too long.
        """
        self._offer_unreported(lane)
        lost = self._lost.pop(lane, [])
        if lane in self._held:
            model, item = self._held.pop(lane)
            if self._is_lost(item):
                lost.append(Loss(item, self._overdue.get(item)))
            else:
                self.offer([(model, item)])
        return tuple(lost)

    def _offer_unreported(self, lane: str) -> None:
        """Nobody has heard how these ended: they are handed out anew, and not held against them."""
        again = self._unreported.pop(lane, [])
        for _, item in again:
            self._begun[item] -= 1
        self.offer(again)
