"""A driver for tests: ``python -m tests.e2e.driving FILE NOTES``, with prunings of a second each.

It notes, one JSON object a line, what the scheduler tells: reports of trainings, and ends.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.plan import Training, Trial
from orchestrator.progress import Progress
from orchestrator.results import Record
from orchestrator.stages import Stopwatch, Workbench
from orchestrator.sweep import run


class SlowBench(Workbench):
    """Like the real one, and a second slower."""

    def prune(self, trial: Trial, watch: Stopwatch) -> None:
        """As usual, after a second."""
        time.sleep(1.0)
        super().prune(trial, watch)


class Noting(Progress):
    """Notes what it is told."""

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self._notes = notes

    def _note(self, **what: Any) -> None:
        with self._notes.open("a") as stream:
            stream.write(json.dumps({"time": time.time(), **what}) + "\n")

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:
        """A training reports."""
        self._note(training=training.key, iteration=report["iteration"])

    def ended(self, record: Record | None) -> None:
        """A node ended."""
        if record is not None:
            self._note(ended=record.key, kind=record.kind)


def notes_of(path: Path) -> list[dict[str, Any]]:
    """What was noted so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main(path: Path, notes: Path) -> int:
    """Run a sweep; gives the exit status."""
    return 0 if run(path, Noting(notes), SlowBench).results.complete else 1


if __name__ == "__main__":
    from tests.e2e import driving  # so that workers find the bench by its name

    sys.exit(driving.main(Path(sys.argv[1]), Path(sys.argv[2])))
