"""The Gaussian process that starts from the front: on a formula whose front is known."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from orchestrator.pareto import Point, Reference, hypervolume
from orchestrator.search import samplers
from orchestrator.search import study as studies
from orchestrator.search.samplers import make_sampler
from orchestrator.search.space import Range
from orchestrator.search.study import Entry, Study

SPACE: dict[str, BaseDistribution] = {f"x{i}": FloatDistribution(0.0, 0.9) for i in range(6)}
MIXED = SPACE | {"kind": CategoricalDistribution(["plain", "better", "worst"])}
GAIN = {"plain": 0.0, "better": 1.0, "worst": -3.0}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measure(parameters: dict[str, Any]) -> tuple[float, float]:
    """A size, and a quality that layers differ in: those at the end may be removed at no cost."""
    ratios = [parameters[f"x{i}"] for i in range(6)]
    loss = sum(r**2 * weight for r, weight in zip(ratios, (16, 9, 4, 1, 0, 0), strict=True))
    return 6.0 - sum(ratios), 20.0 - loss + GAIN[parameters.get("kind", "plain")]


def study(sampler: str, seed: int, space: dict[str, BaseDistribution], count: int) -> Any:
    found = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=make_sampler(sampler, seed),  # type: ignore[arg-type]
    )
    for ratio in (0.0, 0.3, 0.6):
        found.enqueue_trial({f"x{i}": ratio for i in range(6)})
    for _ in range(count):
        trial = found.ask(space)
        found.tell(trial, measure(trial.params))
    return found


def volume(found: Any) -> float:
    points = [Point("", *trial.values, 0.0) for trial in found.trials]
    return hypervolume(points, Reference(6.0, 0.0))


def test_it_finds_more_than_chance_and_about_as_much_as_optunas_own() -> None:
    mine, chance = study("gp", 0, SPACE, 24), study("random", 0, SPACE, 24)
    assert volume(mine) > 1.15 * volume(chance)
    theirs = optuna.create_study(
        directions=["minimize", "maximize"],
        sampler=optuna.samplers.GPSampler(seed=0, warn_independent_sampling=False),
    )
    theirs.add_trials(mine.trials[:10])  # the same beginning
    for _ in range(14):
        trial = theirs.ask(SPACE)
        theirs.tell(trial, measure(trial.params))
    assert volume(mine) > 0.98 * volume(theirs)


def test_of_many_trials_the_process_sees_the_front_and_others_of_all_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(studies, "GP_TRIALS", 40)
    of = Study(f"sqlite:///{tmp_path / 's.db'}", "s", ("size_bytes", "psnr"), {"x": Range(0, 1)})
    rng = np.random.default_rng(0)
    values = [(float(size), float(psnr)) for size, psnr in rng.uniform(0, 1, (300, 2))]
    ended = [
        Entry(i, i // 16, i % 16, str(i), "gp", {}, "done", pair) for i, pair in enumerate(values)
    ]
    front = {
        i
        for i, (size, psnr) in enumerate(values)
        if not any(s <= size and q >= psnr and (s, q) != (size, psnr) for s, q in values)
    }
    seen = [entry.number for entry in of._for_model(ended)]
    of.close()
    assert len(seen) == len(set(seen)) == 40
    assert front <= set(seen)
    assert seen == sorted(seen)
    others = [i for i in seen if i not in front]
    assert all(sum(first <= i < first + 75 for i in others) >= 5 for first in (0, 75, 150, 225))
    assert of._for_model(ended[:40]) == ended[:40]


def test_the_same_seed_proposes_the_same() -> None:
    one, two, other = (study("gp", seed, SPACE, 14) for seed in (3, 3, 4))
    assert [t.params for t in one.trials] == [t.params for t in two.trials]
    assert [t.params for t in one.trials] != [t.params for t in other.trials]


def test_trials_are_learnt_once_however_many_proposals_follow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = study("gp", 0, SPACE, 14)
    fits: list[int] = []
    real = samplers.fit_kernel_params

    def counted(*args: Any, **named: Any) -> Any:
        fits.append(len(named["X"]))
        return real(*args, **named)

    monkeypatch.setattr(samplers, "fit_kernel_params", counted)
    asked = [found.ask(SPACE) for _ in range(4)]
    assert fits == [14, 14]  # one for each objective
    found.tell(asked[0], measure(asked[0].params))
    found.ask(SPACE)
    assert fits == [14, 14, 15, 15]


def test_proposals_lie_in_the_space_and_choices_are_learnt() -> None:
    found = study("gp", 0, MIXED, 30)
    for trial in found.trials:
        assert all(0.0 <= trial.params[f"x{i}"] <= 0.9 for i in range(6))
    kinds = [trial.params["kind"] for trial in found.trials[15:]]
    assert kinds.count("better") > len(kinds) / 2


def test_running_trials_are_not_proposed_again() -> None:
    found = study("gp", 0, SPACE, 14)
    asked = [found.ask(SPACE).params for _ in range(4)]
    apart = [
        max(abs(a[name] - b[name]) for name in SPACE)
        for i, a in enumerate(asked)
        for b in asked[:i]
    ]
    assert min(apart) > 0.01


@pytest.mark.parametrize("least", [0.0, 100.0], ids=["some keep to it", "none keeps to it"])
def test_constraints(least: float) -> None:
    found = optuna.create_study(directions=["minimize", "maximize"], sampler=make_sampler("gp", 0))
    for _ in range(16):
        trial = found.ask(SPACE)
        values = measure(trial.params)
        trial.set_constraint("quality", least - values[1])
        found.tell(trial, values)
    assert len(found.trials) == 16


def test_one_objective() -> None:
    found = optuna.create_study(direction="maximize", sampler=make_sampler("gp", 0))
    for _ in range(20):
        trial = found.ask(SPACE)
        found.tell(trial, measure(trial.params)[1])
    assert found.best_value > 19.5
