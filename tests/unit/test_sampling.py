"""Sample placement against slow references, and what must hold for any weights."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerf.encoding import encode, encoded_width
from nerf.sampling import importance, stratified
from tests.nerf_reference import slow_encoding, slow_importance, slow_stratified

CPU = torch.device("cpu")
F64 = torch.float64


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("octaves", [0, 1, 4, 10])
def test_encoding_agrees_with_the_slow_reference(octaves):
    x = torch.randn(5, 2, 3, generator=generator(1), dtype=F64)
    encoded = encode(x, octaves)
    assert encoded.shape == (5, 2, encoded_width(octaves))
    for point, features in zip(x.reshape(-1, 3), encoded.reshape(10, -1), strict=True):
        assert features.tolist() == pytest.approx(slow_encoding(point.tolist(), octaves), abs=1e-9)


def test_encoded_widths_of_the_original():
    assert (encoded_width(10), encoded_width(4), encoded_width(2, dims=2)) == (63, 27, 10)


def test_even_samples_agree_with_the_slow_reference():
    t = stratified(3, 7, 0.5, 4.0, None, CPU, F64)
    for ray in t.tolist():
        assert ray == pytest.approx(slow_stratified(7, 0.5, 4.0), abs=1e-12)


def test_jittered_samples_agree_with_the_slow_reference():
    t = stratified(4, 6, 2.0, 6.0, generator(3), CPU, F64)
    u = torch.rand(4, 6, generator=generator(3), dtype=F64)
    for ray, us in zip(t.tolist(), u.tolist(), strict=True):
        assert ray == pytest.approx(slow_stratified(6, 2.0, 6.0, us), abs=1e-12)


@given(
    st.integers(2, 70),
    st.floats(0, 5, width=32),
    st.floats(0.125, 100, width=32),
    st.integers(0, 99),
    st.booleans(),
)
def test_samples_are_sorted_between_near_and_far(n, near, depth, seed, jitter):
    far = near + depth
    t = stratified(3, n, near, far, generator(seed) if jitter else None, CPU)
    slack = 1e-6 * far
    assert float(t.min()) >= near - slack
    assert float(t.max()) <= far + slack
    assert bool((t.diff(dim=1) >= 0).all())


def test_jitter_stays_within_its_stratum_and_fills_it():
    t = stratified(4000, 5, 0.0, 4.0, generator(0), CPU, F64)
    low, high = t.min(dim=0).values.tolist(), t.max(dim=0).values.tolist()
    assert low == pytest.approx([0, 0.5, 1.5, 2.5, 3.5], abs=0.01)
    assert high == pytest.approx([0.5, 1.5, 2.5, 3.5, 4], abs=0.01)


some_weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1.0)), min_size=2, max_size=20)


@given(some_weights, st.integers(1, 30), st.integers(0, 99), st.booleans())
def test_importance_agrees_with_the_slow_reference(weights, n, seed, random):
    t = torch.rand(1, len(weights), generator=generator(seed), dtype=F64).sort(dim=1).values
    w = torch.tensor([weights], dtype=F64)
    drawn = importance(t, w, n, generator(seed + 1) if random else None)
    u = (
        torch.rand(1, n, generator=generator(seed + 1), dtype=F64)[0].tolist()
        if random
        else np.linspace(0, 1, n).tolist()
    )
    # At u = 0.5 and the like, rounding decides which of two bins is taken: both ends agree unless
    # the bin is empty, so nearly every sample is compared, and all of them for continuity.
    expected = slow_importance(t[0].tolist(), weights, u)
    spacing = float(t.diff(dim=1).max()) * 2
    close = [abs(a - b) < 1e-6 for a, b in zip(drawn[0].tolist(), expected, strict=True)]
    assert sum(close) >= len(close) - 2
    assert drawn[0].tolist() == pytest.approx(expected, abs=spacing)


@given(some_weights, st.integers(1, 40), st.integers(0, 99))
def test_importance_samples_lie_between_the_outer_midpoints(weights, n, seed):
    t = torch.rand(1, len(weights), generator=generator(seed)).sort(dim=1).values
    drawn = importance(t, torch.tensor([weights]), n, None)
    middles = 0.5 * (t[:, 1:] + t[:, :-1])
    assert float(drawn.min()) >= float(middles.min()) - 1e-6
    assert float(drawn.max()) <= float(middles.max()) + 1e-6
    assert bool((drawn.diff(dim=1) >= -1e-6).all())


def test_importance_samples_follow_the_weights():
    """Of many samples, each bin gets its share of the weight of the sample in it."""
    t = torch.linspace(0, 5, 6, dtype=F64)[None]
    weights = torch.tensor([[9.0, 0.1, 0.0, 0.3, 0.6, 9.0]], dtype=F64)
    drawn = importance(t, weights, 20_000, generator(0))
    counts = torch.histogram(drawn[0], torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5], dtype=F64)).hist
    assert (counts / 20_000).tolist() == pytest.approx([0.1, 0.0, 0.3, 0.6], abs=0.01)


def test_importance_passes_no_gradient():
    t = torch.linspace(0, 1, 5)[None]
    weights = torch.rand(1, 5, requires_grad=True)
    assert not importance(t, weights, 4, None).requires_grad
