"""The front against a slow reference; the hypervolume against closed forms and a grid of cells."""

import math
import random
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pareto import (
    Point,
    Quality,
    Reference,
    default_reference,
    dominates,
    front,
    hypervolume,
    points,
)
from orchestrator.results import Failure
from tests.unit.record_builder import DENSE_BYTES, training_record, trial_record

REFERENCE = Reference(10.0, 10.0)


def point(key: str, size: float, psnr: float) -> Point:
    return Point(key, size, psnr, 10 ** (-psnr / 10))


grid_points = st.lists(
    st.builds(
        lambda key, size, psnr: point(str(key), float(size), float(psnr)),
        st.integers(0, 5),
        st.integers(0, 12),
        st.integers(8, 22),
    ),
    max_size=25,
)
qualities: st.SearchStrategy[Quality] = st.sampled_from(["psnr", "mse"])


@given(grid_points, qualities)
def test_front_is_what_nothing_dominates(sample: list[Point], quality: Quality) -> None:
    slow = {p for p in sample if not any(dominates(other, p, quality) for other in sample)}
    found = front(sample, quality)
    assert set(found) == slow
    assert len(found) == len(slow)
    assert list(found) == sorted(found, key=lambda p: p.size_bytes)


@given(grid_points, qualities, st.randoms(use_true_random=False))
def test_front_and_hypervolume_ignore_order_and_duplicates(
    sample: list[Point], quality: Quality, shuffler: random.Random
) -> None:
    shuffled = sample + sample[: len(sample) // 2]
    shuffler.shuffle(shuffled)
    assert front(shuffled, quality) == front(sample, quality)
    assert hypervolume(shuffled, REFERENCE, quality) == hypervolume(sample, REFERENCE, quality)


@given(grid_points)
def test_hypervolume_counts_the_dominated_unit_cells(sample: list[Point]) -> None:
    cells = sum(
        any(p.size_bytes <= x and p.psnr >= y + 1 for p in sample)
        for x in range(10)
        for y in range(10, 22)
    )
    assert hypervolume(sample, REFERENCE) == cells


@given(grid_points, grid_points, qualities)
def test_more_points_never_lower_the_hypervolume(
    sample: list[Point], more: list[Point], quality: Quality
) -> None:
    assert hypervolume(sample + more, REFERENCE, quality) >= hypervolume(sample, REFERENCE, quality)


def test_hypervolume_in_closed_form() -> None:
    assert hypervolume([], REFERENCE) == 0
    assert hypervolume([point("a", 4, 15)], REFERENCE) == 6 * 5
    assert hypervolume([point("a", 4, 15), point("b", 2, 12)], REFERENCE) == 2 * 2 + 6 * 5
    assert hypervolume([point("a", 10, 30), point("b", 1, 10)], REFERENCE) == 0
    assert hypervolume([point("a", 4, 20)], REFERENCE, "mse") == pytest.approx(6 * (0.1 - 0.01))


def test_hypervolume_of_a_fine_staircase_is_the_integral_under_its_curve() -> None:
    n = 10_000
    stairs = [point(str(i), i / n, 10 + i / n) for i in range(n + 1)]
    began = time.perf_counter()
    area = hypervolume(stairs, Reference(1.0))
    assert time.perf_counter() - began < 1
    assert area == pytest.approx(0.5, abs=1 / n)


def test_a_front_of_mse_may_differ_from_one_of_psnr() -> None:
    # PSNR is the mean over views of a logarithm, so the two means can order models differently.
    steady, uneven = Point("steady", 5, 20.0, 0.010), Point("uneven", 4, 20.5, 0.011)
    assert [p.key for p in front([steady, uneven])] == ["uneven"]
    assert [p.key for p in front([steady, uneven], "mse")] == ["uneven", "steady"]


def test_only_records_with_results_become_points() -> None:
    dense = training_record()
    trials = [trial_record(dense, r) for r in (0.2, 0.5)]
    failed = trial_record(dense, 0.9, failure=Failure("prune", "synthetic"))
    assert [p.key for p in points([*trials, failed])] == [t.key for t in trials]
    assert all(a.psnr > b.psnr for a, b in pairwise(points(trials)))


def test_default_reference_is_the_largest_dense_model_at_ten_decibels() -> None:
    reference = default_reference([training_record()])
    assert reference == Reference(DENSE_BYTES, 10.0)
    assert reference is not None
    assert math.isclose(reference.mse, 0.1)
    assert default_reference([]) is None
