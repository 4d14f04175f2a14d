"""What every registered compensation promises."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import (
    COMPENSATIONS,
    CalibrationBatch,
    Network,
    PruningError,
    Statistics,
    collect,
    compensate,
    remove,
    sequential,
)
from tests.pruning_networks import (
    NERF_WIDTHS,
    draw_keep_masks,
    draw_network,
    heads,
    nerf_graph,
    random_inputs,
    random_network,
)

WIDTHS = {name: min(width, 10) for name, width in NERF_WIDTHS.items()}
NAMES = sorted(COMPENSATIONS)


def statistics_of(network: Network, n_samples: int, seed: int = 1) -> Statistics:
    batch = CalibrationBatch(random_inputs(network, n_samples, seed))
    return collect(network, [batch], ("mean", "gram")).subset()


def batches_of(network: Network, n_samples: int, seed: int = 1) -> list[CalibrationBatch]:
    return [CalibrationBatch(random_inputs(network, n_samples, seed))]


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_changes_nothing(name: str) -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=0)
    keep = {n: torch.ones(10, dtype=torch.bool) for n in network.graph.prunable()}
    same = compensate(network, keep, name, statistics_of(network, 50), batches_of(network, 50))
    for layer in network.weights:
        assert torch.equal(same.weights[layer], network.weights[layer])
        assert torch.equal(same.biases[layer], network.biases[layer])


@given(data=st.data(), n_samples=st.integers(1, 30))
@settings(deadline=None, max_examples=25)
def test_shapes_are_those_of_removal_and_weights_are_finite(
    data: st.DataObject, n_samples: int
) -> None:
    """Any graph, any masks, and calibration sets far smaller than a layer is wide."""
    network = draw_network(data, prunable=True)
    keep = draw_keep_masks(data, network)
    statistics = statistics_of(network, n_samples)
    shapes = {name: W.shape for name, W in remove(network, keep).weights.items()}
    for name in NAMES:
        smaller = compensate(network, keep, name, statistics, batches_of(network, n_samples))
        assert {n: W.shape for n, W in smaller.weights.items()} == shapes
        assert all(torch.isfinite(W).all() for W in smaller.weights.values())


@pytest.mark.parametrize("name", NAMES)
def test_channels_that_emit_a_constant_are_removed_without_loss(name: str) -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=0)
    keep = {}
    for layer in network.graph.prunable():
        network.weights[layer][[1, 4]] = 0
        network.biases[layer][1] = -1.0  # off for good
        network.biases[layer][4] = 0.7  # on for good
        keep[layer] = torch.ones(10, dtype=torch.bool)
        keep[layer][[1, 4]] = False
    smaller = compensate(network, keep, name, statistics_of(network, 200), batches_of(network, 200))
    inputs = random_inputs(network, 30, seed=9)
    for head, expected in heads(network, inputs).items():
        torch.testing.assert_close(heads(smaller, inputs)[head], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_precision_stays_and_the_dense_network_too(name: str) -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=0, dtype=torch.float32)
    before = {n: W.clone() for n, W in network.weights.items()}
    batch = CalibrationBatch(random_inputs(network, 40, 1, torch.float32))
    statistics = collect(network, [batch], ("mean", "gram")).subset()
    keep = {n: torch.arange(10) % 2 == 0 for n in network.graph.prunable()}
    smaller = compensate(network, keep, name, statistics, [batch])
    assert {W.dtype for W in smaller.weights.values()} == {torch.float32}
    assert all(torch.equal(before[n], network.weights[n]) for n in before)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_another_network_are_refused(name: str) -> None:
    if not COMPENSATIONS[name].moments:
        pytest.skip("reads no statistics")
    network = random_network(nerf_graph(), WIDTHS, seed=0)
    other = random_network(nerf_graph(), {**WIDTHS, "trunk.2": 7}, seed=0)
    keep = {"trunk.2": torch.arange(10) > 3}
    with pytest.raises(PruningError, match="another network"):
        compensate(network, keep, name, statistics_of(other, 20))
    with pytest.raises(PruningError, match="collect"):
        compensate(network, keep, name, None)


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_does(name: str) -> None:
    assert inspect.getdoc(COMPENSATIONS[name].of or sequential)


def test_what_goes_through_the_batches_asks_for_them() -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=0)
    with pytest.raises(PruningError, match="'sequential' goes through the calibration batches"):
        compensate(network, {}, "sequential", statistics_of(network, 20))


def test_unknown_names_are_refused() -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=0)
    with pytest.raises(PruningError, match="did you mean 'mean_fold'"):
        compensate(network, {}, "meanfold")
