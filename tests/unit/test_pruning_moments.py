import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning import (
    MOMENTS,
    CalibrationBatch,
    NestedStatistics,
    Network,
    Statistics,
    StatisticsError,
    collect,
    moments,
)
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_inputs, random_network

SMALL = {name: min(width, 6) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), SMALL, seed=0)
INPUTS = random_inputs(NETWORK, 25, seed=3)
WEIGHTS = torch.rand(25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def statistics(w: Tensor | None = WEIGHTS, network: Network = NETWORK) -> Statistics:
    return collect(network, [CalibrationBatch(INPUTS, w)], tuple(MOMENTS)).subset()


def slow(x: Tensor, a: Tensor, W: Tensor, w: list[float]) -> dict[str, Tensor]:
    """Every moment's average, one sample and one channel at a time."""
    n, channels, n_in = len(a), a.shape[1], x.shape[1]
    total = sum(w)

    def average(f: object) -> Tensor:
        return torch.tensor(
            [
                sum(w[s] * f(float(a[s, j])) for s in range(n)) / total  # type: ignore[operator]
                for j in range(channels)
            ],
            dtype=torch.float64,
        )

    one = torch.cat((x, torch.ones(n, 1, dtype=x.dtype)), dim=1)
    shares = torch.zeros(n_in, dtype=torch.float64)
    for s, i, sign in itertools.product(range(n), range(channels), (1, -1)):
        if w[s] > 0:
            terms = [max(0.0, sign * float(W[i, k]) * float(x[s, k])) for k in range(n_in)]
            for k in range(n_in):
                if terms[k] > 0:
                    shares[k] = max(float(shares[k]), terms[k] / sum(terms))
    return {
        "mean": average(lambda v: v),
        "absolute": average(abs),
        "square": average(lambda v: v * v),
        "firing": average(lambda v: float(v > 0)),
        "gram": sum(w[s] * torch.outer(one[s], one[s]) for s in range(n)) / total,  # type: ignore[dict-item]
        "sensitivity": shares,
    }


@pytest.mark.parametrize("weighted", [False, True])
def test_every_moment_equals_a_slow_one(weighted: bool) -> None:
    w = torch.cat((WEIGHTS[:-3], torch.zeros(3, dtype=torch.float64)))
    collected = statistics(w if weighted else None)
    for layer, x, a in NETWORK.activations(INPUTS):
        if layer.name not in ("trunk.0", "trunk.5", "trunk.7", "view", "rgb"):
            continue
        expected = slow(x, a, NETWORK.weights[layer.name], w.tolist() if weighted else [1.0] * 25)
        for name, moment in MOMENTS.items():
            if moment.side == "input" or layer.prunable:
                torch.testing.assert_close(
                    collected.average(layer.name, name), expected[name], rtol=1e-11, atol=1e-13
                )


def test_every_moment_is_covered_by_the_slow_reference() -> None:
    a = torch.ones(1, 1)
    assert slow(a, a, a, [1.0]).keys() == MOMENTS.keys()


@given(cuts=st.sets(st.integers(1, 24)))
@settings(deadline=None, max_examples=20)
def test_no_moment_depends_on_chunks(cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), 25]
    batches = [
        CalibrationBatch({name: v[i:j] for name, v in INPUTS.items()}, WEIGHTS[i:j])
        for i, j in itertools.pairwise(edges)
    ]
    whole, chunked = statistics(), collect(NETWORK, batches, tuple(MOMENTS)).subset()
    for layer, of_layer in whole.sums.items():
        for name in of_layer:
            torch.testing.assert_close(
                chunked.average(layer, name), whole.average(layer, name), rtol=1e-12, atol=1e-14
            )


def test_blocks_inside_a_moment_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics()
    monkeypatch.setattr(moments, "GRAM_ROWS", 7)
    monkeypatch.setattr(moments, "SENSITIVITY_ELEMENTS", 1)
    for layer, of_layer in statistics().sums.items():
        for name, total in of_layer.items():
            torch.testing.assert_close(total, whole.sums[layer][name], rtol=1e-12, atol=1e-14)


def test_the_gram_matrix_covers_the_input_of_every_layer() -> None:
    sums = statistics().sums
    assert list(sums) == [layer.name for layer in NETWORK.graph.layers]
    assert sums["trunk.5"]["gram"].shape == (63 + 6 + 1,) * 2
    assert sums["view"]["gram"].shape == (6 + 27 + 1,) * 2
    for of_layer in sums.values():
        assert torch.equal(of_layer["gram"], of_layer["gram"].T)
        assert of_layer["gram"].dtype == torch.float64
    assert "mean" not in sums["density"]


def test_the_variance_comes_from_two_moments() -> None:
    a = next(a for layer, _, a in NETWORK.activations(INPUTS) if layer.name == "trunk.2")
    torch.testing.assert_close(
        statistics(None).variance("trunk.2"), a.var(dim=0, correction=0), rtol=1e-10, atol=1e-14
    )


def test_a_constant_channel_has_no_variance() -> None:
    network = random_network(nerf_graph(), SMALL, seed=0)
    network.weights["trunk.1"][3] = 0
    network.biases["trunk.1"][3] = 0.1
    assert statistics(network=network).variance("trunk.1")[3] == pytest.approx(0, abs=1e-16)


def test_inputs_of_all_layers_are_needed_for_the_gram_matrix() -> None:
    with pytest.raises(StatisticsError, match="lacks input 'direction'"):
        collect(NETWORK, [CalibrationBatch({"point": INPUTS["point"]})], ("gram",))


def test_layers_that_share_inputs_share_no_memory() -> None:
    sums = statistics().sums
    assert torch.equal(sums["density"]["gram"], sums["feature"]["gram"])
    assert sums["density"]["gram"].data_ptr() != sums["feature"]["gram"].data_ptr()


@pytest.mark.parametrize("moment", sorted(MOMENTS))
def test_bad_activations_are_refused_by_layer_whatever_is_collected(moment: str) -> None:
    network = random_network(nerf_graph(), SMALL, seed=0, dtype=torch.float32)
    network.weights["trunk.1"].fill_(3e38)
    batch = CalibrationBatch(random_inputs(network, 4, seed=0, dtype=torch.float32))
    with pytest.raises(StatisticsError, match=r"layer 'trunk\.1' are NaN"):
        collect(network, [batch], (moment,))


def test_all_moments_survive_a_file() -> None:
    nested = collect(NETWORK, [CalibrationBatch(INPUTS, WEIGHTS)], tuple(MOMENTS))
    again = NestedStatistics.from_tensors(nested.to_tensors()).to_tensors()
    assert all(torch.equal(value, again[key]) for key, value in nested.to_tensors().items())


def test_moments_of_the_same_samples_are_joined() -> None:
    batch = CalibrationBatch(INPUTS, WEIGHTS)
    one = collect(NETWORK, [batch], ("mean",)).subset()
    two = collect(NETWORK, [batch], ("gram",)).subset()
    joined = one.joined(two)
    assert set(joined.sums["trunk.3"]) == {"mean", "gram"}
    with pytest.raises(StatisticsError, match="in both"):
        joined.joined(one)
    other = collect(NETWORK, [CalibrationBatch(INPUTS)], ("gram",)).subset()
    with pytest.raises(StatisticsError, match="different calibration sets"):
        one.joined(other)
