"""What every registered criterion promises."""

import inspect
from collections.abc import Mapping
from functools import reduce

import pytest
import torch
from torch import Tensor

from pruning import (
    CRITERIA,
    CalibrationBatch,
    Network,
    Statistics,
    collect,
    collect_gradients,
    moments_for,
    prune,
    removed_count,
    score,
)
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 12) for name, width in NERF_WIDTHS.items()}


@pytest.fixture(params=sorted(CRITERIA))
def criterion(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def network() -> Network:
    return random_network(nerf_graph(), WIDTHS, seed=0, dtype=torch.float32)


def statistics_for(network: Network, criterion: str) -> Statistics | None:
    if not CRITERIA[criterion].needs_statistics:
        return None
    inputs = random_inputs(network, 40, seed=1, dtype=torch.float32)
    batch = CalibrationBatch(inputs)
    moments = moments_for([criterion])
    passes = [collect(network, [batch], moments).subset()] if moments else []
    if CRITERIA[criterion].gradients:
        passes.append(collect_gradients(network, [batch], energy).subset())
    return reduce(Statistics.joined, passes)


def energy(outputs: Mapping[str, Tensor], batch: CalibrationBatch) -> Tensor:
    return sum((a.square().sum() for a in outputs.values()), torch.zeros(()))


def seed_for(criterion: str) -> int | None:
    return 0 if CRITERIA[criterion].needs_seed else None


def test_one_finite_score_a_channel(criterion: str, network: Network) -> None:
    scores = score(network, criterion, statistics_for(network, criterion), seed_for(criterion))
    assert list(scores) == list(network.graph.prunable())
    for name, values in scores.items():
        assert values.shape == (network.width(name),)
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
        assert torch.isfinite(values).all()


def test_scores_repeat_exactly_and_leave_the_network_alone(
    criterion: str, network: Network
) -> None:
    before = {name: W.clone() for name, W in network.weights.items()}
    statistics = statistics_for(network, criterion)
    one, two = (score(network, criterion, statistics, seed_for(criterion)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(before[name], network.weights[name]) for name in before)


@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.95])
def test_the_exact_number_of_channels_goes(criterion: str, network: Network, ratio: float) -> None:
    pruned = prune(
        network, [ratio] * 8, criterion, statistics_for(network, criterion), seed_for(criterion)
    )
    for name in network.graph.prunable():
        removed = network.width(name) - pruned.network.width(name)
        assert removed == removed_count(ratio, network.width(name))


def test_a_network_whose_channels_all_tie_is_pruned_exactly(
    criterion: str, network: Network
) -> None:
    flat = Network(
        network.graph,
        {name: torch.full_like(W, 0.01) for name, W in network.weights.items()},
        {name: torch.zeros_like(b) for name, b in network.biases.items()},
    )
    pruned = prune(flat, [0.5] * 8, criterion, statistics_for(flat, criterion), seed_for(criterion))
    assert set(pruned.achieved.values()) == {0.5}


def test_it_says_where_it_comes_from(criterion: str) -> None:
    assert inspect.getdoc(CRITERIA[criterion].score)
