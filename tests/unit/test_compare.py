"""Comparing: closed forms of the staircase, antisymmetry, and what the commands say."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.compare import (
    compare_sweeps,
    compare_trials,
    differences,
    equal_size,
    mean_difference,
)
from orchestrator.pareto import Point, front
from tests.unit.record_builder import DENSE_BYTES, training_record, trial_record
from tests.unit.test_pick import MODELS, sweep


def points(*models: tuple[float, float]) -> tuple[Point, ...]:
    return front([Point(f"{s}-{q}", s, q, 10 ** (-q / 10)) for s, q in models])


def test_two_staircases_at_every_step() -> None:
    first, second = points((100, 20), (400, 24)), points((200, 21), (800, 25))
    # From 200 (where both have a model) on: at 200, 400 and 800 one of them steps.
    assert equal_size(first, second) == ((200, 20, 21), (400, 24, 21), (800, 24, 25))
    # Each difference counts for the octaves until the next step: +1 for one, −3 for one.
    assert mean_difference(equal_size(first, second)) == pytest.approx((1 - 3) / 2)


def test_a_front_better_by_a_constant_is_ahead_by_it() -> None:
    first = points(*MODELS)
    second = tuple(replace(p, psnr=p.psnr + 0.25) for p in first)
    assert mean_difference(equal_size(first, second)) == pytest.approx(0.25)


def test_a_model_of_half_the_size_is_ahead_where_only_it_fits() -> None:
    first, second = points((200, 20), (800, 26)), points((100, 20), (400, 26))
    # Equal from 200 to 400, 6 dB ahead from 400 to 800: half of the two octaves.
    assert mean_difference(equal_size(first, second)) == pytest.approx(3.0)


MODEL_LISTS = st.lists(
    st.tuples(st.integers(100, 10_000), st.floats(10, 40)), min_size=1, max_size=10
)


@given(MODEL_LISTS, MODEL_LISTS)
def test_comparing_the_other_way_round_changes_the_sign(
    one: list[tuple[int, float]], other: list[tuple[int, float]]
) -> None:
    first, second = points(*one), points(*other)
    forth, back = equal_size(first, second), equal_size(second, first)
    assert [(s, b, a) for s, a, b in forth] == list(back)
    assert mean_difference(forth) == pytest.approx(-mean_difference(back), abs=1e-9)
    for size, a, b in forth:
        assert a == max(q for s, q in one if s <= size)
        assert b == max(q for s, q in other if s <= size)


def test_sweeps_are_told_apart_and_the_better_is_named() -> None:
    better = sweep(*[(size, psnr + 0.5) for size, psnr in MODELS])
    found = compare_sweeps(sweep(*MODELS), replace(better, name="better"))
    assert found.sentence.startswith("better is ahead of picked by 0.500 dB")
    assert found.hypervolumes is not None
    assert found.hypervolumes[1] > found.hypervolumes[0]
    assert "cross" not in found.sentence
    same = compare_sweeps(sweep(*MODELS), replace(sweep(*MODELS), hash="cd34" * 4))
    assert "same quality at equal size" in same.sentence
    assert same.names == ("picked ab12ab12", "picked cd34cd34")
    alike = compare_sweeps(sweep(*MODELS), sweep(*MODELS))
    assert alike.names == ("picked (first)", "picked (second)")
    assert alike.sentence.endswith("their hypervolumes are the same.")


def test_fronts_without_a_common_size_are_not_ranked() -> None:
    nothing = replace(sweep(), name="nothing")
    assert "neither front is ahead" in compare_sweeps(sweep(*MODELS), nothing).sentence


def test_trials_are_compared_in_every_metric_that_both_have() -> None:
    dense = training_record()
    first, second = trial_record(dense, 0.3), trial_record(dense, 0.3, "random")
    found = compare_trials(first, second)
    assert found.dominates == first.key
    assert found.changes == {"criterion": ("activation", "random")}
    psnr = next(row for row in found.metrics if row[0] == "psnr")
    assert psnr[3:] == (first.metrics["psnr"], second.metrics["psnr"])
    assert compare_trials(trial_record(dense, 0.3), trial_record(dense, 0.5)).dominates is None
    level = compare_trials(first, replace(first, key="level")).sentence
    assert level.endswith("level has the same PSNR and the same size: they are level.")


def test_a_trial_is_told_in_words_from_its_dense_model() -> None:
    dense = training_record()
    trial = trial_record(dense, 0.5, "random")
    found = compare_trials(dense, trial)
    loss = dense.metrics["psnr"] - trial.metrics["psnr"]
    saved = dense.metrics["size_bytes"] - trial.metrics["size_bytes"]
    assert found.sentence == (
        f"Against {dense.key}, {trial.key} has {loss:.3f} dB less and {saved:,.0f} bytes "
        f"({100 * saved / DENSE_BYTES:.1f} %) less: neither is better in both."
    )
    assert found.changes["ratio"] == (None, 0.5)
    assert "iterations" not in found.changes  # of the training, which both have in common


def test_what_lacks_a_size_is_not_ranked() -> None:
    dense = training_record()
    first, second = trial_record(dense, 0.3), trial_record(dense, 0.3, "random")
    assert "lack" in compare_trials(first, replace(second, metrics={})).sentence


def test_what_only_one_has_of_held_out_views_is_compared_on_validation_rays() -> None:
    data = sweep((200_000, 23.0), (300_000, 24.0))
    one, other = (
        replace(t, metrics={**t.metrics, "validation_psnr": psnr, "validation_mse": 10**-psnr})
        for t, psnr in zip(data.trials, (2.5, 2.25), strict=True)
    )
    unseen = {name: v for name, v in other.metrics.items() if name not in ("psnr", "mse")}
    found = compare_trials(one, replace(other, metrics=unseen))
    assert found.dominates == one.key
    assert "0.250 dB less on the validation rays" in found.sentence
    assert "validation_psnr" in found.to_json()["metrics"]
    assert "lack a size" in compare_trials(data.trials[0], replace(other, metrics=unseen)).sentence


def test_differences_name_the_place() -> None:
    first = {"a": 1, "b": {"c": [1, 2], "d": 3}, "e": [{"f": 1}]}
    second = {"a": 1, "b": {"c": [1]}, "e": [{"f": 1}, {"f": 2}]}
    assert differences(first, second) == {
        "b.c": ([1, 2], [1]),
        "b.d": (3, None),
        "e[1].f": (None, 2),
    }


def test_the_command_compares_sweeps_and_trials(
    write_results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_results("one")
    other = write_results("other", prune__0__ratios=[0.25])
    assert main(["compare", str(one), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["changes"]["prune[0].ratios"] == [[0.25, 0.5], [0.25]]
    assert found["mean_difference"] <= 0
    assert math.isfinite(found["hypervolume"]["values"][0])
    assert main(["front", str(one), "--json"]) == 0
    ids = [trial["id"] for trial in json.loads(capsys.readouterr().out)["front"]]
    assert main(["compare", f"{one}:{ids[0]}", f"{one}:{ids[1][:10]}"]) == 0
    said = capsys.readouterr().out
    assert ids[1] in said
    assert "ratio" in said


def test_a_trial_that_is_not_there_is_a_clear_error(
    write_results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_results()
    assert main(["compare", f"{path}:zz", f"{path}:zz"]) == 1
    assert "no result" in capsys.readouterr().err
    assert main(["compare", str(path), f"{path}:"]) == 0
