"""What every registered allocation promises."""

import inspect
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pruning import ALLOCATIONS, PruningError, RatioError, allocate, removed_count

RATIO = st.floats(0, 1, exclude_max=True)
LAYERS = st.integers(1, 40)
NAME = st.sampled_from(sorted(ALLOCATIONS))


@given(name=NAME, ratio=RATIO, n_layers=LAYERS)
@example(name="back-loaded", ratio=math.nextafter(1, 0), n_layers=2)
@example(name="front-loaded", ratio=5e-324, n_layers=8)
def test_ratios_are_inside_and_their_mean_is_the_one_asked_for(
    name: str, ratio: float, n_layers: int
) -> None:
    ratios = allocate(name, n_layers, ratio)
    assert len(ratios) == n_layers
    assert all(0 <= r < 1 for r in ratios)
    assert math.fsum(ratios) / n_layers == pytest.approx(ratio, abs=1e-15, rel=1e-14)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_nothing_asked_for_is_nothing_removed(name: str) -> None:
    assert allocate(name, 8, 0.0) == (0.0,) * 8


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_one_layer_gets_the_ratio_itself(name: str) -> None:
    assert allocate(name, 1, 0.3) == (0.3,)


@given(name=NAME, ratio=RATIO)
def test_a_channel_stays_in_every_layer(name: str, ratio: float) -> None:
    assert all(removed_count(r, 256) < 256 for r in allocate(name, 8, ratio))


@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_it_is_explained(name: str) -> None:
    assert inspect.getdoc(ALLOCATIONS[name])


@pytest.mark.parametrize("ratio", [-0.01, 1.0, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", sorted(ALLOCATIONS))
def test_ratios_outside_are_refused(name: str, ratio: float) -> None:
    with pytest.raises(RatioError, match=r"\[0, 1\).*got"):
        allocate(name, 8, ratio)


def test_the_ramps_run_the_way_their_names_say() -> None:
    assert allocate("front-loaded", 3, 0.5) == (0.75, 0.5, 0.25)
    assert allocate("back-loaded", 3, 0.5) == (0.25, 0.5, 0.75)
    assert allocate("back-loaded", 3, 0.8) == pytest.approx((0.7, 0.8, 0.9))
    assert allocate("front-loaded", 8, 0.3) == allocate("back-loaded", 8, 0.3)[::-1]


def test_ratios_given_layer_by_layer() -> None:
    assert allocate([0.0, 0.5, 0.25], 3) == (0.0, 0.5, 0.25)
    with pytest.raises(RatioError, match="8 prunable layers and 2 ratios"):
        allocate([0.1, 0.2], 8)
    with pytest.raises(RatioError, match="ratio 1 of 3"):
        allocate([0.1, 1.0, 0.2], 3)
    with pytest.raises(RatioError, match="leave one of them out"):
        allocate([0.1, 0.2], 2, 0.5)


def test_names_need_a_ratio_and_must_exist() -> None:
    with pytest.raises(RatioError, match="needs a sparsity ratio"):
        allocate("uniform", 8)
    with pytest.raises(PruningError, match="did you mean 'front-loaded'"):
        allocate("frontloaded", 8, 0.5)
