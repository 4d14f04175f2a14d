"""What a search leaves in the store for whoever reports on it; needs no Optuna."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.plan import SearchPlan
from orchestrator.store import Store

Summary = Mapping[str, Any]


def write_summary(plan: SearchPlan, store: Store, summary: Summary) -> None:
    """Leave in the store what the report needs, see `Search.summary`.

    Raises:
        StoreError: it cannot be written.
    """
    store.write_text(_name(plan), json.dumps(summary, indent=1))


def read_summary(plan: SearchPlan, store: Store) -> Summary | None:
    """What `write_summary` left; None where the search has not begun.

    Raises:
        StoreError: it cannot be read.
    """
    text = store.read_text(_name(plan))
    return None if text is None else json.loads(text)


def wanted(plan: SearchPlan) -> list[int]:
    """How far a search is to go: trials, and points of the front to render."""
    return [plan.settings.trials, plan.settings.final]


def is_finished(plan: SearchPlan, store: Store) -> bool:
    """Whether a search has tried all that it was asked for, and its final front is rendered.

    Raises:
        StoreError: the store cannot be read.
    """
    summary = read_summary(plan, store)
    return (
        summary is not None
        and summary["finished"] == wanted(plan)
        and all(store.has("trial", key) for key in summary["final"])
    )


@dataclass(frozen=True)
class Searched:
    """The records of a search.

    Attributes:
        trials: keys of the records of its trials, measured on validation rays.
        final: keys of the trials of the final front, measured on the held-out views.
        stopped: how many trials the first look stopped.
        failed: keys of trials that failed.
    """

    trials: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    stopped: int = 0
    failed: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """How the search chose, for the report."""
        return (
            f"Search: {len(self.trials)} trials compared on validation rays of the training views "
            f"({self.stopped} stopped after the first look, {len(self.failed)} failed); the "
            f"held-out views were rendered for the {len(self.final)} models of the final front "
            "alone."
        )


def searched(plan: SearchPlan, store: Store) -> Searched:
    """Which records belong to a search.

    Raises:
        StoreError: the store cannot be read.
    """
    summary = read_summary(plan, store)
    if summary is None:
        return Searched()
    return Searched(
        trials=tuple(t["record"] for t in summary["trials"] if t["record"]),
        final=tuple(summary["final"]),
        stopped=sum(t["stopped"] is not None for t in summary["trials"]),
        failed=tuple(t["key"] for t in summary["trials"] if t["state"] == "failed"),
    )


def _name(plan: SearchPlan) -> str:
    return f"searches/{plan.name}.json"
