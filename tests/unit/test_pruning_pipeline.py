import pytest
import torch

from pruning import (
    Budget,
    CalibrationBatch,
    Cost,
    Layer,
    LayerGraph,
    Network,
    PruningError,
    RatioError,
    StatisticsError,
    allocate,
    collect,
    mask,
    moments_for,
    prune,
    shrink,
)
from tests.pruning_networks import NERF_WIDTHS, heads, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 20) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)


def test_the_reports_rule_end_to_end() -> None:
    inputs = random_inputs(NETWORK, 50, seed=1)
    statistics = collect(NETWORK, [CalibrationBatch(inputs)]).subset()
    pruned = prune(NETWORK, allocate("uniform", 8, 0.3), "activation", statistics)
    for layer, _, a in NETWORK.activations(inputs):
        if layer.prunable:
            lowest = a.mean(dim=0).argsort(stable=True)[:6]
            assert set(lowest.tolist()) == set(
                torch.nonzero(~pruned.keep[layer.name])[:, 0].tolist()
            )
    masked = heads(mask(NETWORK, pruned.keep), inputs)
    small = heads(pruned.network, inputs)
    for name in masked:
        torch.testing.assert_close(small[name], masked[name], rtol=1e-10, atol=1e-10)


def test_achieved_ratios_are_reported_beside_the_requested() -> None:
    pruned = prune(NETWORK, [0.0, 0.33, 0.5, 0.04, 0.05, 0.95, 0.99, 0.15], "magnitude")
    assert list(pruned.requested.values()) == [0.0, 0.33, 0.5, 0.04, 0.05, 0.95, 0.99, 0.15]
    assert list(pruned.achieved.values()) == [0.0, 0.3, 0.5, 0.0, 0.05, 0.95, 0.95, 0.15]
    assert pruned.ratio == pytest.approx(sum(pruned.achieved.values()) / 8)


def test_ratio_zero_gives_the_dense_network_back() -> None:
    pruned = prune(NETWORK, [0.0] * 8, "magnitude")
    assert pruned.network.parameters() == pruned.nonzero_parameters == NETWORK.parameters()
    assert all(torch.equal(pruned.network.weights[n], NETWORK.weights[n]) for n in NETWORK.weights)
    assert all(torch.equal(pruned.network.biases[n], NETWORK.biases[n]) for n in NETWORK.biases)


def test_random_depends_on_the_seed_and_on_nothing_else() -> None:
    def kept(ratio: float, seed: int) -> list[bool]:
        return prune(NETWORK, [ratio] * 8, "random", seed=seed).keep["trunk.3"].tolist()

    assert kept(0.5, 7) == kept(0.5, 7) != kept(0.5, 8)
    # Nested: what stays at 0.8 also stays at 0.5.
    assert all(small <= large for small, large in zip(kept(0.8, 7), kept(0.5, 7), strict=True))
    masks = prune(NETWORK, [0.5] * 8, "random", seed=7).keep
    assert masks["trunk.3"].tolist() != masks["trunk.4"].tolist()


def test_magnitude_by_hand() -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=2)
    network.weights["trunk.2"][11] = 1e-3
    network.biases["trunk.2"][11] = 1e3
    pruned = prune(network, [0.05] * 8, "magnitude")
    assert torch.nonzero(~pruned.keep["trunk.2"]).tolist() == [[11]]


def test_what_is_missing_is_asked_for() -> None:
    half = allocate("uniform", 8, 0.5)
    with pytest.raises(StatisticsError, match="needs calibration statistics"):
        prune(NETWORK, half, "activation")
    with pytest.raises(PruningError, match="give it a seed"):
        prune(NETWORK, half, "random")
    with pytest.raises(PruningError, match="did you mean 'activation'"):
        prune(NETWORK, half, "activations")
    with pytest.raises(RatioError, match="8 prunable layers and 7 ratios"):
        prune(NETWORK, half[1:], "magnitude")


def test_a_network_without_prunable_layers_is_refused() -> None:
    graph = LayerGraph({"x": 1}, (Layer("head", ("x",), relu=False, prunable=False),))
    network = Network(graph, {"head": torch.ones(1, 1)}, {"head": torch.ones(1)})
    with pytest.raises(PruningError, match="nothing to remove"):
        prune(network, [], "magnitude")
    with pytest.raises(StatisticsError, match="nothing to observe"):
        collect(network, [CalibrationBatch({"x": torch.ones(1, 1)})])


def test_statistics_of_another_network_are_refused() -> None:
    other = random_network(nerf_graph(), {**WIDTHS, "trunk.1": 19}, seed=0)
    statistics = collect(other, [CalibrationBatch(random_inputs(other, 4, seed=0))]).subset()
    with pytest.raises(StatisticsError, match=r"'trunk\.1' describe 19 channels.*has 20"):
        prune(NETWORK, [0.5] * 8, "activation", statistics)


def test_moments_for_names_what_the_criteria_read() -> None:
    assert moments_for(["random", "magnitude"]) == ()
    assert moments_for(["activation", "random"]) == ("mean",)


def test_an_iterative_allocation_looks_again_at_what_is_left() -> None:
    """By hand: each round prunes the network of the round before on its own activations."""
    widths = {name: min(width, 16) for name, width in NERF_WIDTHS.items()}
    network = random_network(nerf_graph(), widths, seed=0)
    batches = [CalibrationBatch(random_inputs(network, 200, seed=1))]
    dense = Cost.of({"": network}, Budget.of("params", 0))
    whole = dense(dense.dense)
    amount = 0.4 * whole
    left = network
    for number in range(1, 5):
        statistics = {"": collect(left, batches, ("mean",)).subset()}
        budget = Budget.of("params", whole * 0.4 ** (number / 4))
        method = {"criterion": "activation", "allocation": "aap", "compensation": "none"}
        left = shrink({"": left}, statistics, budget, **method)[""].network
    statistics = {"": collect(network, batches, ("mean",)).subset()}
    method = {"criterion": "activation", "compensation": "none"}
    budget = Budget.of("params", amount)
    found = shrink(
        {"": network},
        statistics,
        budget,
        allocation="aap-iterative",
        batches={"": batches},
        **method,
    )[""]
    for name, W in left.weights.items():
        torch.testing.assert_close(found.network.weights[name], W)
    assert found.network.parameters() <= amount
    for layer, kept in found.keep.items():
        assert int(kept.sum()) == left.width(layer)
    # The weights that are left are those that were there: nothing to rewind.
    rows, columns = found.keep["trunk.1"], found.keep["trunk.0"]
    assert torch.equal(
        found.network.weights["trunk.1"], network.weights["trunk.1"][rows][:, columns]
    )
    with pytest.raises(StatisticsError, match="looks at the pruned networks again"):
        shrink({"": network}, statistics, budget, allocation="aap-iterative", **method)
