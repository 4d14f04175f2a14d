"""What the scripts of `benchmarks.chaos` stand on, where they can be tried without a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.chaos.sabotage import Fault, _sabotage, all_that_is_left
from orchestrator.stages import Stopwatch


class Room:
    """An allocator with so many free blocks of so many bytes each."""

    def __init__(self, *blocks: int) -> None:
        self.blocks = list(blocks)

    def __call__(self, size: int) -> torch.Tensor:
        for place, free in enumerate(self.blocks):
            if free >= size:
                self.blocks[place] -= size
                return torch.empty(size, dtype=torch.uint8)
        raise torch.cuda.OutOfMemoryError("no room")


def test_whatever_a_capped_worker_has_left_is_taken() -> None:
    room = Room(1_000_000, 70_000, 511)
    held = all_that_is_left(room, largest=2**24)
    assert all(free < 512 for free in room.blocks)
    assert sum(len(block) for block in held) == 1_000_000 + 70_000 + 511 - sum(room.blocks)
    assert len(held) < 40


def test_a_worker_that_has_nothing_left_gives_nothing() -> None:
    assert all_that_is_left(Room()) == []


def test_a_cap_begins_and_ends_with_its_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch, "empty", lambda size, **_: Room()(size))
    fault = Fault("short", "prune", "evaluate", "cap", times=2, ratio=0.5)
    bench = SimpleNamespace(folder=tmp_path, faults=[fault])

    def evaluate(ratio: float) -> None:
        watch = Stopwatch()
        trial = SimpleNamespace(config=SimpleNamespace(ratio=ratio, criterion="magnitude"))
        _sabotage(watch, bench, "prune", trial)  # type: ignore[arg-type]
        with watch.during("prune"):
            pass
        with watch.during("evaluate"):
            raise torch.cuda.OutOfMemoryError

    for ratio, seen in ((0.3, []), (0.5, [1e-6, 1.0]), (0.5, [1e-6, 1.0]), (0.5, [])):
        fractions.clear()
        with pytest.raises(torch.cuda.OutOfMemoryError):
            evaluate(ratio)
        assert fractions == seen
