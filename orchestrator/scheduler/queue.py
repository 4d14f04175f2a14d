"""What may run next: a search algorithm of Ray Tune that follows a plan.

A Tune trial is either one training or one *lane*: a worker that takes calibrations and prunings
from the dispatcher, one after another, until there are none. Trainings are handed out first; one
that lacks its evaluation alone needs no whole GPU, and goes to a lane. A model's calibrations and
prunings go to the dispatcher as soon as that model is ready, while other models still train; a
pruning that needs statistics waits for them, but the lane that will do it starts meanwhile. Tune
asks for one configuration after another and is told "none yet" while everything left has to wait.

Why lanes: see docs/decisions/0002-lanes.md.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from ray.tune.search import Searcher

from orchestrator.plan import Calibration, Plan, Training, Trial
from orchestrator.results import Failure
from orchestrator.scheduler.table import Item, Loss, Work

Node = Training | Calibration | Trial
KIND = {Training: "train", Calibration: "calibrate", Trial: "prune"}
LANE = "lane"
# So many workers may die in a row before everything is given up.
MIN_DEAD_LANES = 4


def item_of(node: Node) -> Item:
    """The kind and key of a node."""
    return KIND[type(node)], node.key


class Dispatch(Protocol):
    """Where lanes get their work, see `orchestrator.scheduler.dispatch`."""

    def offer(self, work: Iterable[Work], nodes: Mapping[Item, Node] | None = None) -> None:
        """Add items, each with the key of the model it works on, and nodes that workers lack."""

    def expect(self, more: bool) -> None:
        """Say whether more work will come, so that lanes without any wait for it."""

    def limit(self, lanes: int | None) -> None:
        """Lanes beyond so many end after the item they are at; None: no limit."""

    def drop_lane(self, lane: str) -> tuple[Loss, ...]:
        """Take back what a dead lane held; gives what must not be tried again."""


class Feed(Protocol):
    """Where trials come from that the plan cannot know: a search, see `scheduler.seeking`."""

    needs: frozenset[str]
    """Keys of what must be there before it begins."""

    left: int
    """How many trials it will still give, about."""

    finished: bool
    """Whether it gives nothing more, and all that it gave has ended."""

    def begin(self) -> None:
        """What it needs is there."""

    def fail(self, reason: str) -> None:
        """What it needs will never be there."""

    def poll(self) -> Sequence[Trial]:
        """Trials to run, as soon as it has some; does not wait."""

    def ended(self, trial: Trial, failure: Failure | None) -> None:
        """One of its trials ended."""


class PlanQueue(Searcher):  # type: ignore[misc]  # Ray has no types
    """Hands out the nodes of a plan that the store does not hold yet.

    Args:
        plan: what to run.
        on_progress: called with a training's key and what it reports while it runs.
        on_end: called with a node and its failure, None if it succeeded.
        feeds: where more trials come from.
        on_running: called with the number of nodes under way, when it changes.
        elsewhere: whether another sweep does a training at the moment; it is begun when no longer.
    """

    def __init__(
        self,
        plan: Plan,
        on_progress: Callable[[Training, dict[str, Any]], None],
        on_end: Callable[[Node, Failure | None], None],
        feeds: Iterable[Feed] = (),
        on_running: Callable[[int], None] = lambda _: None,
        elsewhere: Callable[[Training], bool] = lambda _training: False,
    ) -> None:
        super().__init__(metric="done", mode="max")
        self._elsewhere = elsewhere
        self._on_progress = on_progress
        self._on_end = on_end
        self._on_running = on_running
        self._running = 0  # as last told
        self._dispatch: Dispatch | None = None
        self._max_lanes = 1
        self._max_trainings: int | None = None  # at once; None: Ray's business
        self._sweeps: Callable[[], int] = lambda: 1
        self._limit: int | None = None  # of lanes, as last told to the dispatcher
        self._dead_lanes = 0  # since a node last succeeded
        self._trainings: deque[Training] = deque()
        self._to_offer: list[Node] = []
        self._waiting: dict[str, list[Node]] = {}
        self._open: dict[Item, Node] = {}
        self._trials: dict[str, Training | None] = {}  # Tune's id → training, None for a lane
        self._idle_feeds = list(feeds)
        self._feeds: list[Feed] = []
        self._fed: dict[Item, Feed] = {}
        self._awaited: set[str] = set()
        self._coming: set[str] = set()  # statistics that a lane collects, or is about to
        self._expected = False
        self._arrange(plan)

    def _arrange(self, plan: Plan) -> None:
        """Sort what is missing into ready and waiting-for-a-key."""
        untrained = {t.key for t in plan.trainings if not t.trained}
        wanted = {t.statistics for t in plan.trials if not t.cached}
        wanted |= {key for feed in self._idle_feeds for key in feed.needs}
        missing: set[str] = set()
        for training in plan.trainings:
            if not training.cached:
                self._awaited.add(training.key)
                if not training.trained:
                    self._open[item_of(training)] = training
                    self._trainings.append(training)
        for calibration in plan.calibrations:
            keys = set(calibration.sets.values())
            if not calibration.cached and keys & wanted:
                missing |= keys
                self._place(calibration, {calibration.training} & untrained)
        for training in plan.trainings:
            if training.trained and not training.cached:
                self._place(training, set())
        for trial in plan.trials:
            if not trial.cached:
                needs = {trial.statistics} & missing or {trial.training} & untrained
                self._place(trial, {key for key in needs if key is not None})
        self._awaited |= missing

    def _place(self, node: Node, waits_for: set[str]) -> None:
        self._open[item_of(node)] = node
        if waits_for:
            self._waiting.setdefault(waits_for.pop(), []).append(node)
        else:
            self._make_ready(node)

    def _make_ready(self, node: Node) -> None:
        self._to_offer.append(node)
        if isinstance(node, Calibration):
            self._coming |= set(provided(node))

    @property
    def total(self) -> int:
        """Nodes that are neither done nor failed yet; of a search about as many as are left."""
        feeds = (*self._idle_feeds, *self._feeds)
        return len(self._open) + sum(feed.left for feed in feeds if not feed.finished)

    @property
    def running(self) -> int:
        """Nodes under way: every lane is at one, as long as there is one for it."""
        trainings = sum(training is not None for training in self._trials.values())
        waiting = sum(len(nodes) for nodes in self._waiting.values())
        ready = len(self._open) - waiting - trainings - len(self._trainings)
        return trainings + min(len(self._trials) - trainings, max(ready, 0))

    def _tell_running(self) -> None:
        if self.running != self._running:
            self._running = self.running
            self._on_running(self._running)

    def take_ready(self) -> list[Work]:
        """What needs nothing, each with the key of its model: for a dispatcher to start with."""
        ready = [(_model_of(node), item_of(node)) for node in self._to_offer]
        self._to_offer.clear()
        return ready

    def connect(self, dispatch: Dispatch, max_lanes: int, expecting: bool = False) -> None:
        """Say where lanes get their work and how many the cluster can hold.

        Args:
            dispatch: where.
            max_lanes: how many.
            expecting: whether the dispatcher knows already that more work will come.
        """
        self._dispatch = dispatch
        self._max_lanes = max_lanes
        self._expected = expecting
        self._offer()

    def share(self, sweeps: Callable[[], int], max_trainings: int) -> None:
        """Take but a share of the cluster while there are other sweeps.

        Args:
            sweeps: how many there are at the moment, this one included.
            max_trainings: how many trainings the cluster can hold at once.
        """
        self._sweeps = sweeps
        self._max_trainings = max_trainings

    def _share(self, whole: int) -> int:
        return max(1, -(-whole // self._sweeps()))

    def _share_out(self) -> int:
        """How many lanes this sweep may have now; those beyond it are told to end."""
        lanes = self._share(self._max_lanes)
        limit = lanes if lanes < self._max_lanes else None
        if limit != self._limit and self._dispatch is not None:
            self._limit = limit
            self._dispatch.limit(limit)
        return lanes

    def disconnect(self) -> None:
        """Forget where lanes get their work: the run is over."""
        self._dispatch = None

    def _offer(self) -> None:
        if self._dispatch is not None and self._to_offer:
            items = [(item_of(node), node) for node in self._to_offer]
            new = {item: node for item, node in items if item in self._fed}
            self._dispatch.offer([(_model_of(node), item) for item, node in items], new)
            self._to_offer.clear()

    def _pull(self) -> None:
        """Take up what the searches have thought of meanwhile."""
        for feed in [f for f in self._idle_feeds if not f.needs & self._awaited]:
            self._idle_feeds.remove(feed)
            self._feeds.append(feed)
            feed.begin()
        for feed in self._feeds:
            for trial in feed.poll():
                item = item_of(trial)
                if item in self._open:  # the plan has it too
                    self._fed[item] = feed
                    continue
                self._open[item] = trial
                self._fed[item] = feed
                self._to_offer.append(trial)
        self._offer()
        self._tell_expected()

    def _soon(self) -> int:
        """How many prunings wait for nothing but statistics that a lane is at."""
        return sum(len(self._waiting.get(key, ())) for key in self._coming)

    @property
    def expecting(self) -> bool:
        """Whether more work will come, so that lanes without any wait for it."""
        return any(not feed.finished for feed in self._feeds) or self._soon() > 0

    def _tell_expected(self) -> None:
        expecting = self.expecting
        if expecting != self._expected and self._dispatch is not None:
            self._dispatch.expect(expecting)
            self._expected = expecting

    # --- what Tune asks --------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next training, another lane, None to wait, or FINISHED."""
        self._pull()
        self._tell_running()
        most = self._share_out()
        lanes = sum(training is None for training in self._trials.values())
        training_now = len(self._trials) - lanes
        room = self._max_trainings is None or training_now < self._share(self._max_trainings)
        if room and (training := self._next_training()):
            self._trials[trial_id] = training
            return {"kind": "train", "key": training.key}
        if not self._open:
            return None if self.total else Searcher.FINISHED
        waiting = sum(len(nodes) for nodes in self._waiting.values())
        ready = len(self._open) - waiting - training_now - len(self._trainings)
        # Statistics take about as long as a worker to start.
        if lanes < min(most, ready + self._soon()):
            self._trials[trial_id] = None
            return {"kind": LANE, "key": trial_id}
        return None

    def _next_training(self) -> Training | None:
        """The first that no other sweep does."""
        for training in self._trainings:
            if not self._elsewhere(training):
                self._trainings.remove(training)
                return training
        return None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Take in what a training or a lane reports."""
        training = self._trials.get(trial_id)
        if training is not None and "iteration" in result:
            self._on_progress(training, result)
        for ended in result.get("ended", ()):
            self._end(ended)
        self._pull()
        self._tell_running()
        self._share_out()

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """A training or a lane is over, or has died more often than it may."""
        if trial_id not in self._trials:
            return
        for ended in (result or {}).get("ended", ()):
            self._end(ended)
        self._tell_expected()
        training = self._trials.pop(trial_id)
        if not error:
            if training is not None and (result or {}).get("elsewhere"):
                self._trainings.append(training)  # another sweep was first: wait, without a worker
            return
        if training is not None:
            reason = "its worker died more often than `resources.retries` allows"
            self._close(training, Failure("train", reason))
            return
        losses = self._dispatch.drop_lane(trial_id) if self._dispatch is not None else ()
        for loss in losses:
            self._end(lost(loss))
        self._tell_expected()
        self._dead_lanes += not losses  # those that give something up come to an end
        if self._dead_lanes > max(self._max_lanes, MIN_DEAD_LANES):
            for node in list(self._open.values()):
                reason = "workers die one after another without finishing anything"
                self._close(node, Failure("start", reason))

    def _end(self, ended: dict[str, Any]) -> None:
        node = self._open.get((ended["kind"], ended["key"]))
        if node is not None:
            failure = ended.get("failure")
            if failure is None:
                self._dead_lanes = 0
            self._close(node, Failure(**failure) if failure else None)

    def _close(self, node: Node, failure: Failure | None) -> None:
        """A node is over: free what waited for it, or fail it too."""
        if self._open.pop(item_of(node), None) is None:
            return
        self._on_end(node, failure)
        if (feed := self._fed.get(item_of(node))) is not None and isinstance(node, Trial):
            feed.ended(node, failure)
        if failure is None:
            self._awaited -= set(provided(node))
        else:
            self._fail_feeds(node, failure)
        for key in provided(node):
            self._coming.discard(key)
            for dependent in self._waiting.pop(key, []):
                if failure is None:
                    self._make_ready(dependent)
                else:
                    reason = f"it needs {KIND[type(node)]} {node.key}, which failed: "
                    self._close(dependent, Failure(failure.stage, reason + failure.reason))
        self._offer()

    def _fail_feeds(self, node: Node, failure: Failure) -> None:
        for feed in [f for f in self._idle_feeds if f.needs & set(provided(node))]:
            self._idle_feeds.remove(feed)
            feed.fail(f"it needs {KIND[type(node)]} {node.key}, which failed: {failure.reason}")

    def __getstate__(self) -> dict[str, Any]:
        """Empty: Tune pickles its searcher for a restore that never comes, see `save`."""
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "PlanQueue":
        return self

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store is the truth, a plan made anew knows what is missing."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore, see `save`."""


def provided(node: Node) -> tuple[str, ...]:
    """The keys that other nodes wait for and this one provides."""
    if isinstance(node, Training):
        return (node.key,)
    if isinstance(node, Calibration):
        return tuple(node.sets.values())
    return ()


def lost(loss: Loss) -> dict[str, Any]:
    """How an item ended that is not tried again, as lanes report it."""
    kind, key = loss.item
    reason = "its worker died each time it was tried, more often than `resources.retries` allows"
    failure = loss.failure or Failure(kind, reason)
    return {"kind": kind, "key": key, "failure": asdict(failure)}


def _model_of(node: Node) -> str:
    return node.key if isinstance(node, Training) else node.training
