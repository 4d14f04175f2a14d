"""A search whose database may be away for a while, as when PostgreSQL restarts."""

import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from orchestrator.errors import SearchError
from orchestrator.log import logger
from orchestrator.plan import SearchPlan
from orchestrator.search.search import Ended, Search, Step
from orchestrator.search.study import why_away
from orchestrator.spec import Sweep
from orchestrator.store import Store

AWAY_SECONDS = 120.0
RETRY_SECONDS = 2.0


class LastingSearch:
    """A `Search` that is opened anew, from what its database holds, when that was away.

    Args:
        sweep: the sweep.
        plan: of the search.
        store: where results are.
    """

    def __init__(self, sweep: Sweep, plan: SearchPlan, store: Store) -> None:
        self._arguments = sweep, plan, store
        self._search: Search | None = None
        self._under_way: set[str] = set()

    def advance(self, ended: Iterable[Ended]) -> Step:
        """As `Search.advance`; what is under way is not handed out again.

        Raises:
            SearchError: the database stays away.
        """
        told, end = list(ended), time.monotonic() + AWAY_SECONDS
        self._under_way -= {key for key, _ in told}
        while True:
            try:
                if self._search is None:
                    self._search = Search(*self._arguments)
                step = self._search.advance(told)
                break
            except Exception as error:
                why = why_away(error)
                if why is None:
                    raise
                self._drop()
                if time.monotonic() + RETRY_SECONDS > end:
                    raise SearchError(
                        f"the database of search {self._arguments[1].name} cannot be used for "
                        f"{AWAY_SECONDS:g} s now: {why}; run again when it can, the study goes on"
                    ) from error
                logger.info("the study's database is away (%s); trying again", why)
            time.sleep(RETRY_SECONDS)
        trials = tuple(trial for trial in step.trials if trial.key not in self._under_way)
        self._under_way |= {trial.key for trial in trials}
        return replace(step, trials=trials)

    def summary(self) -> dict[str, object]:
        """What the report says of the search; a step has to have been made before."""
        assert self._search is not None
        return self._search.summary()

    def _drop(self) -> None:
        """Forget what is known: it may be more than what was written."""
        if self._search is not None:
            with suppress(Exception):
                self._search.study.close()
        self._search = None
