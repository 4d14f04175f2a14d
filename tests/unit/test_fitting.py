"""Finding the pruning whose file just fits, where sizes answer in steps."""

from types import SimpleNamespace

import pytest

from nerf.field import FieldShape, NerfModel, SampleCounts
from orchestrator import compress
from pruning import BudgetError

SIZE = 500_000


def fit_with(monkeypatch: pytest.MonkeyPatch, size_of) -> int:
    """The size of what `_fit` finds where a budget's file takes `size_of(budget)` bytes."""
    asked: list[float] = []

    def attempt(budget: float):
        asked.append(budget)
        achieved = {"trunk.0": len(asked) / 100}
        return {"fine": SimpleNamespace(achieved=achieved, removed=True)}, "int8"

    monkeypatch.setattr(compress, "_attempts", lambda *_: (attempt, 0))
    monkeypatch.setattr(compress, "with_fields", lambda dense, *_: dense)
    monkeypatch.setattr(compress, "packed", lambda *_: None)
    monkeypatch.setattr(compress, "model_size", lambda *_: size_of(asked[-1]))
    shape = FieldShape((4, 4), skip=0, feature=4, view=4, point_octaves=1, direction_octaves=1)
    model = NerfModel.create(shape, SampleCounts(2, 2), 0)
    config = SimpleNamespace(size=SIZE, networks="shared", bits="int8")
    return compress._fit(model, config, SimpleNamespace(samples=None), {}).size  # type: ignore[arg-type]


def test_a_file_that_stays_a_few_bytes_too_large_gives_way(monkeypatch) -> None:
    """The same two bytes over, whatever is taken off, until it is a step's worth."""
    assert fit_with(monkeypatch, lambda budget: SIZE + 2 if budget > SIZE - 900 else 499_100) == (
        499_100
    )


def test_a_size_that_nothing_meets_is_refused(monkeypatch) -> None:
    with pytest.raises(BudgetError, match="500,001 bytes where 500,000"):
        fit_with(monkeypatch, lambda _: SIZE + 1)
