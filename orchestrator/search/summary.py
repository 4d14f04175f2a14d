"""What a search leaves in the store for whoever reports on it; needs no Optuna."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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


def wanted(plan: SearchPlan) -> list[float | None]:
    """How far a search is to go: trials, points of the front to render, seconds, audit."""
    of = plan.settings
    return [of.trials, of.final, of.seconds, of.audit]


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
        saved: see `goals.saved`.
        audit: what came of measuring stopped trials in full.
    """

    trials: tuple[str, ...] = ()
    final: tuple[str, ...] = ()
    stopped: int = 0
    failed: tuple[str, ...] = ()
    saved: Mapping[str, float] = field(default_factory=dict)
    audit: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """How the search chose, for the report."""
        return (
            f"Search: {len(self.trials)} trials compared on validation rays of the training views "
            f"({self.stopped} stopped after the first look, {len(self.failed)} failed); the "
            f"held-out views were rendered for the {len(self.final)} models of the final front "
            "alone." + self._looks
        )

    @property
    def _looks(self) -> str:
        """What the first look saved, and whether it cost the front anything."""
        found = ""
        whole = self.saved.get("spent", 0.0) + self.saved.get("saved", 0.0)
        if self.stopped and whole:
            found += (
                f" The first look saved {self.saved['saved'] / whole:.1%} of the workers' time "
                f"({self.saved['saved']:.1f} s; the looks took {self.saved['looks']:.1f} s)."
            )
        if checked := self.audit.get("trials", 0):
            joined, left = len(self.audit["joined"]), len(self.audit["left"])
            found += f" {checked} of the stopped trials were measured in full afterwards: " + (
                f"{joined} belong on the front, in the place of {left} of its points."
                if joined
                else "the front is the same."
            )
        return found


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
        saved=summary.get("saved", {}),
        audit=summary.get("audit", {}),
    )


def _name(plan: SearchPlan) -> str:
    return f"searches/{plan.name}.json"
