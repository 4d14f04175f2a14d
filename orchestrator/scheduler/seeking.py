"""A search beside the scheduler: an actor thinks out trials while lanes run others.

Thinking takes the driver no time: it asks whether a step is there, hands its trials to the queue
and tells what ended with the next step.
"""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.log import logger
from orchestrator.plan import SearchPlan, Trial
from orchestrator.results import Failure
from orchestrator.scheduler.actors import beside_driver
from orchestrator.search.summary import searched, write_summary
from orchestrator.spec import Sweep
from orchestrator.store import Store

if TYPE_CHECKING:  # Optuna is imported by the actor alone
    from orchestrator.search.lasting import LastingSearch
    from orchestrator.search.search import Ended, Step


class _Seeker:
    """The actor: a search, made with the first step."""

    def __init__(self, sweep: Sweep, plan: SearchPlan, store: Store) -> None:
        self._arguments = sweep, plan, store
        self._search: LastingSearch | None = None

    def advance(self, ended: "list[Ended]") -> "Step":
        if self._search is None:
            from orchestrator.search.lasting import LastingSearch  # noqa: PLC0415  see above

            self._search = LastingSearch(*self._arguments)
        step = self._search.advance(ended)
        _, plan, store = self._arguments
        write_summary(plan, store, self._search.summary())
        return step


class SearchFeed:
    """Trials of one search, for the queue. See `orchestrator.scheduler.queue.Feed`.

    Args:
        sweep: the sweep.
        plan: of the search.
        store: where results are.

    Attributes:
        error: why the search could not go on, or None.
        proposing: seconds that the sampler took.
    """

    def __init__(self, sweep: Sweep, plan: SearchPlan, store: Store) -> None:
        self.needs = frozenset({plan.training.key, *plan.statistics.values()})
        known = searched(plan, store)
        self.left = max(plan.settings.trials - len(known.trials) - len(known.failed), 1)
        self.finished = False
        self.error: Exception | None = None
        self.proposing = 0.0
        self._arguments = sweep, plan, store
        self._actor: Any = None
        self._step: Any = None
        self._told: list[Ended] = []
        self._running: set[str] = set()
        self._given: deque[Trial] = deque()
        self._last = False

    def begin(self) -> None:
        """What it needs is there: think of the first trials."""
        self._actor = beside_driver(_Seeker, *self._arguments)
        self._ask()

    def fail(self, reason: str) -> None:
        """What it needs will never be there."""
        logger.warning("the search %s cannot begin: %s", self._arguments[1].name, reason)
        self._end()

    def poll(self) -> Sequence[Trial]:
        """Trials of the step that is ready, if one is; then the next step is begun."""
        if self._step is not None:
            ready, _ = ray.wait([self._step], timeout=0)
            if ready:
                self._take()
        elif self._told:
            self._ask()
        if self._last and not self._running and self._step is None:
            self._end()
        return self._hand_out()

    def ended(self, trial: Trial, failure: Failure | None) -> None:
        """One of its trials ended: told with the next step."""
        self._running.discard(trial.key)
        if not self._last:
            reason = None if failure is None else f"{failure.stage}: {failure.reason}"
            self._told.append((trial.key, reason))
            self.left = max(self.left - 1, 1)

    def close(self) -> None:
        """End the actor."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None

    def _ask(self) -> None:
        self._step = self._actor.advance.remote(self._told)
        self._told = []

    def _take(self) -> None:
        try:
            step: Step = ray.get(self._step)
        except RayTaskError as error:
            cause = error.cause
            self.error = cause if isinstance(cause, Exception) else error
        except RayError as error:
            self.error = error
        self._step = None
        if self.error is not None:
            self._last = True
            return
        self.proposing += step.proposing
        self._given.extend(step.trials)
        self._running |= {trial.key for trial in step.trials}
        self._last = step.finished
        if step.finished:
            self.left = len(step.trials)

    def _hand_out(self) -> Sequence[Trial]:
        trials = list(self._given)
        self._given.clear()
        return trials

    def _end(self) -> None:
        self.finished = True
        self.left = 0
        self.close()
