"""A worker that shares its GPU: a stage that finds no memory is tried once more, then fails."""

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.plan import Trial
from orchestrator.scheduler import worker
from orchestrator.scheduler.worker import StageTrainable
from orchestrator.spec.sweep import Limits
from orchestrator.stages import Stopwatch


def worker_whose_memory_is_taken(times: int) -> tuple[StageTrainable, list[str]]:
    """A worker, and what its bench was asked for; it has no room the first `times` times."""
    asked: list[str] = []

    def prune(trial: Trial, watch: Stopwatch) -> None:
        asked.append(trial.key)
        with watch.during("prune"):
            if len(asked) <= times:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    made = StageTrainable.__new__(StageTrainable)
    made._nodes = {}
    made._dispatcher = SimpleNamespace(overdue=lambda *_: None)
    made._bench = SimpleNamespace(prune=prune, sweep=SimpleNamespace(limits=Limits()))
    return made, asked


@pytest.mark.parametrize("times", [0, 1, 2])
def test_a_stage_without_memory_is_tried_once_more(
    times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(worker.time, "sleep", slept.append)
    made, asked = worker_whose_memory_is_taken(times)
    node: Any = SimpleNamespace(key="t0")
    ended = made._run(("trial", "t0"), pickle.dumps(node))
    assert asked == ["t0"] * min(times + 1, 2)
    assert slept == [worker.MEMORY_WAIT] * (times > 0)
    if times < 2:
        assert ended["failure"] is None
    else:
        assert ended["failure"]["stage"] == "prune"
        assert "out of GPU memory" in ended["failure"]["reason"]


@pytest.mark.parametrize(("kind", "share"), [("lane", 0.25), ("train", 1.0)])
def test_a_worker_knows_its_part_of_a_gpu(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float] = []
    monkeypatch.setattr(worker, "share_memory", told.append)
    made, _ = worker_whose_memory_is_taken(0)
    made._gpus = {"lane": 0.25, "train": 2.0}
    made._begin({"kind": kind, "key": "t0"})
    assert told == [share]
