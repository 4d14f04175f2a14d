"""What may run next: a search algorithm of Ray Tune that follows a plan.

Trainings are handed out first. A model's calibrations and prunings follow as soon as that model is
ready, while other models still train; a pruning that needs statistics waits for them. Tune asks
for one configuration after another and is told "none yet" while everything left has to wait.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ray.tune.search import Searcher

from orchestrator.plan import Calibration, Plan, Training, Trial

Node = Training | Calibration | Trial
KIND = {Training: "train", Calibration: "calibrate", Trial: "prune"}


class PlanQueue(Searcher):
    """Hands out the nodes of a plan that the store does not hold yet.

    Args:
        plan: what to run.
        on_progress: called with a node's kind, key and what it reports while it runs.
        on_end: called with a node, whether it succeeded, and what it last reported.
    """

    def __init__(
        self,
        plan: Plan,
        on_progress: Callable[[str, str, dict[str, Any]], None],
        on_end: Callable[[Node, bool, dict[str, Any]], None],
    ) -> None:
        super().__init__(metric="done_units", mode="max")
        self._on_progress = on_progress
        self._on_end = on_end
        self._ready: deque[Node] = deque()
        self._running: dict[str, Node] = {}
        self._waiting: dict[str, list[Node]] = {}
        self._arrange(plan)
        self.total = len(self._ready) + sum(len(nodes) for nodes in self._waiting.values())

    def _arrange(self, plan: Plan) -> None:
        """Sort what is missing into ready and waiting-for-a-key."""
        trained = {t.key for t in plan.trainings if t.trained}
        wanted_statistics = {t.statistics for t in plan.trials if not t.cached}
        missing: set[str] = set()
        for training in plan.trainings:
            if not training.cached:
                self._ready.append(training)
        for calibration in plan.calibrations:
            keys = set(calibration.sets.values())
            if calibration.cached or not keys & wanted_statistics:
                continue
            missing |= keys
            self._place(
                calibration, None if calibration.training in trained else calibration.training
            )
        for trial in plan.trials:
            if trial.cached:
                continue
            if trial.statistics in missing:
                self._place(trial, trial.statistics)
            else:
                self._place(trial, None if trial.training in trained else trial.training)

    def _place(self, node: Node, waits_for: str | None) -> None:
        if waits_for is None:
            self._ready.append(node)
        else:
            self._waiting.setdefault(waits_for, []).append(node)

    # --- what Tune asks --------------------------------------------------------------------

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next node as a Tune configuration, None to wait, or FINISHED."""
        if self._ready:
            node = self._ready.popleft()
            self._running[trial_id] = node
            return {"kind": KIND[type(node)], "key": node.key}
        return None if self._running or self._waiting else Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on what a running node reports."""
        node = self._running.get(trial_id)
        if node is not None and not result.get("done"):
            self._on_progress(KIND[type(node)], node.key, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Free what waited for a node, or fail it with the node."""
        node = self._running.pop(trial_id, None)
        if node is None:
            return
        report = result or {}
        succeeded = not error and bool(report.get("succeeded"))
        self._on_end(node, succeeded, report)
        for key in provided(node):
            waiting = self._waiting.pop(key, [])
            if succeeded:
                self._ready.extend(waiting)
                continue
            for dependent in waiting:
                self._fail(dependent, node, report)

    def _fail(self, node: Node, cause: Node, report: dict[str, Any]) -> None:
        failure = report.get("failure") or {"reason": "its worker died"}
        reason = f"the {KIND[type(cause)]} stage it needs failed: {failure['reason']}"
        failed = {"failure": {"stage": KIND[type(cause)], "reason": reason}}
        self._on_end(node, False, failed)
        for key in provided(node):
            for dependent in self._waiting.pop(key, []):
                self._fail(dependent, cause, report)

    def unfinished(self) -> Iterator[Node]:
        """Nodes that were running when the sweep was interrupted."""
        return iter(self._running.values())

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
