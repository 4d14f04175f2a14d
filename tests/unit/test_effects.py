"""What the parameters of a sweep did, and what stands beside it: against closed forms."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report import ReportData
from orchestrator.report.effects import (
    below_front,
    explained,
    importance,
    layer_ratios,
    quantiles,
)
from orchestrator.report.payload import quality_of
from orchestrator.results import Record
from orchestrator.store import Store
from orchestrator.sweep import report_data, results_of
from tests.unit.record_builder import training_record, trial_record


def searched(count: int = 60) -> tuple[Record, ...]:
    """Trials of a search whose validation PSNR is set by one layer's ratio alone."""
    dense, draw = training_record(), random.Random(0)
    trials = []
    for seed in range(count):
        ratios = {f"fine_layer_{i}_ratio": draw.random() for i in range(3)}
        trial = trial_record(dense, 0.5, schedule="searched", seed=seed, **ratios)
        psnr = 25 - 10 * ratios["fine_layer_1_ratio"]
        size = 1e6 * (3.1 - sum(ratios.values()))
        trials.append(replace(trial, metrics={"size_bytes": size, "validation_psnr": psnr}))
    return tuple(trials)


def test_the_layer_that_decides_a_search_is_told_from_the_others() -> None:
    trials = searched()
    shares = dict(importance(trials, lambda r: r.metrics["validation_psnr"]))
    assert layer_ratios(trials) == tuple(f"fine_layer_{i}_ratio" for i in range(3))
    assert shares["fine layer 1"] > 0.95  # eight quantiles of it leave 1/64 of the variance
    assert max(shares["fine layer 0"], shares["fine layer 2"]) < 0.3
    assert max(shares, key=lambda name: shares[name]) == "fine layer 1"
    assert "ratio or size" not in shares  # one value for all
    uniform = [trial_record(training_record(), r, layer_0_ratio=r) for r in (0.1, 0.2, 0.3)]
    assert layer_ratios(uniform) == ()


def test_a_search_is_judged_by_what_it_measured() -> None:
    trials = searched(9)
    data = ReportData("s", "ab12" * 4, (training_record(),), trials, Store("/nowhere"))
    assert quality_of(data) == "validation_psnr"
    gap = below_front(data, "validation_psnr")
    found = {
        t.key: max(
            o.metrics["validation_psnr"]
            for o in trials
            if o.metrics["size_bytes"] <= t.metrics["size_bytes"]
        )
        - t.metrics["validation_psnr"]
        for t in trials
    }
    assert {t.key: gap(t) for t in trials} == pytest.approx(found)
    assert below_front(data)(trials[0]) is None
    assert quality_of(replace(data, trials=(trial_record(data.dense[0], 0.3),))) == "psnr"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.integers(1, 8))
def test_quantiles_are_few_in_order_and_alike_for_equals(values: list[float], groups: int) -> None:
    names = quantiles(values, groups)
    assert len(set(names)) <= groups
    pairs = sorted(zip(values, map(int, names), strict=True))
    assert all(a[1] <= b[1] for a, b in itertools.pairwise(pairs))
    assert all(a[1] == b[1] for a, b in itertools.pairwise(pairs) if a[0] == b[0])


def test_the_share_explained_has_a_closed_form() -> None:
    # Two groups of two: within 4 · 1/4 = 1 over n − k = 2, in all 1 + 4 · 9/4 = 10 over n − 1 = 3.
    assert explained(["a", "a", "b", "b"], [0.5, 1.5, 3.5, 4.5]) == pytest.approx(
        1 - 0.5 / (10 / 3)
    )


def test_unpruned_models_of_another_sweep_stand_beside_this_one(
    write_results: Callable[..., Path],
) -> None:
    grid = {"ratios": 0, "criteria": "magnitude", "networks": ["both", "shared"]}
    own = report_data(*results_of(write_results("own")))
    assert own.baselines == ()
    other = write_results("other", prune=[{**grid, "bits": ["fp32", "int8"]}], evaluate__renders=0)
    own = report_data(*results_of(other.with_name("own.yaml")))
    what = [(r.config["networks"], r.config.get("bits", "fp32")) for r in own.baselines]
    assert sorted(what) == [("both", "int8"), ("shared", "fp32"), ("shared", "int8")]
    assert not {r.key for r in own.baselines} & {r.key for r in own.trials}
    assert report_data(*results_of(other)).baselines == ()  # they are its own trials
    longer = write_results("longer", evaluate__max_rays=7)
    assert report_data(*results_of(longer)).baselines == ()  # measured in another way
