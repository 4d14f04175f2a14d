from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning import PruningError, RatioError, check_ratios, keep_mask, removed_count, select


@given(
    scores=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 3.0]), min_size=1, max_size=40),
    ratio=st.floats(0, 1, exclude_max=True),
)
def test_exact_count_under_ties(scores: list[float], ratio: float) -> None:
    values = torch.tensor(scores, dtype=torch.float64)
    keep = keep_mask(values, ratio)
    assert int((~keep).sum()) == removed_count(ratio, len(scores))
    if keep.all():
        return
    assert values[~keep].max() <= values[keep].min()
    # Among channels that tie at the border, those removed come first.
    border = values == values[~keep].max()
    assert not (keep & border)[: int(torch.nonzero(border & ~keep).max())].any()


@given(hundredths=st.integers(0, 99), width=st.integers(1, 4096))
def test_count_is_the_floor_that_a_person_computes(hundredths: int, width: int) -> None:
    exact = Fraction(hundredths, 100) * width
    assert removed_count(hundredths / 100, width) == exact.numerator // exact.denominator


def test_floating_point_traps() -> None:
    assert removed_count(0.29, 100) == 29  # 28.999999999999996
    assert removed_count(0.15, 20) == 3
    assert removed_count(0.57, 100) == 57  # 56.99999999999999
    assert removed_count(0.1 + 0.2, 10) == 3
    assert removed_count(0.289, 100) == 28


@given(ratio=st.floats(0, 1, exclude_max=True), width=st.integers(1, 10_000))
def test_one_channel_always_stays(ratio: float, width: int) -> None:
    assert 0 <= removed_count(ratio, width) < width


@given(
    scores=st.lists(st.floats(-1, 1), min_size=1, max_size=30),
    low=st.floats(0, 0.99),
    high=st.floats(0, 0.99),
)
def test_a_larger_ratio_removes_what_a_smaller_one_does(
    scores: list[float], low: float, high: float
) -> None:
    values = torch.tensor(scores)
    low, high = sorted((low, high))
    assert not (keep_mask(values, high) & ~keep_mask(values, low)).any()


def test_infinite_scores_rank_and_nan_is_refused() -> None:
    keep = keep_mask(torch.tensor([float("inf"), 1.0, float("-inf")]), 0.34)
    assert keep.tolist() == [True, True, False]
    with pytest.raises(PruningError, match="NaN"):
        keep_mask(torch.tensor([1.0, float("nan")]), 0.5)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan"), float("inf")])
def test_ratios_outside_are_refused(ratio: float) -> None:
    with pytest.raises(RatioError, match=r"\[0, 1\)"):
        removed_count(ratio, 256)


def test_every_layer_needs_its_ratio() -> None:
    scores = {"a": torch.arange(4.0), "b": torch.arange(2.0)}
    assert select(scores, {"a": 0.5, "b": 0.5})["a"].tolist() == [False, False, True, True]
    with pytest.raises(RatioError, match="'b'"):
        select(scores, {"a": 0.5})


def test_a_lone_ratio_for_all_layers_is_told_how_to_be_shared_out() -> None:
    with pytest.raises(RatioError, match=r'give one ratio a layer, such as allocate\("uniform", 3'):
        check_ratios(0.5, 3)
