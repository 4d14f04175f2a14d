"""Widths and bits together, against exhaustive search."""

import itertools

import numpy as np
import pytest
import torch

from pruning import (
    BudgetError,
    CalibrationBatch,
    Layer,
    LayerGraph,
    Network,
    PruningError,
    Sizing,
    collect,
    elimination_paths,
    quantize,
)
from pruning.budget import Budget
from pruning.joint import Choice, Joint, choices, jointly
from pruning.quantization import entropy
from tests.pruning_networks import random_inputs, random_network

GRAPH = LayerGraph(
    {"x": 3},
    (
        Layer("a", ("x",), relu=True, prunable=True),
        Layer("b", ("x", "a"), relu=True, prunable=True),
        Layer("head", ("b",), relu=False, prunable=False),
        Layer("side", ("a",), relu=False, prunable=False),
    ),
)
WIDTHS = {"a": 4, "b": 3, "head": 2, "side": 1}
NETWORKS = {name: random_network(GRAPH, WIDTHS, seed) for seed, name in enumerate(("one", "two"))}
OMEGA = {"one": 0.3}
STATISTICS = {
    name: collect(n, [CalibrationBatch(random_inputs(n, 40, 3))], ("gram",)).subset()
    for name, n in NETWORKS.items()
}
CURVES = Sizing(
    NETWORKS, Budget(0), paths=elimination_paths(NETWORKS, STATISTICS), error_weights=OMEGA
).curves()
OPTIONS = {
    name: {
        layer.name: [Choice("int2", 0.25, 4.0, 0.02 * (i + 1)), Choice("int8", 1.0, 4.0, 1e-5)]
        for i, layer in enumerate(GRAPH.layers)
    }
    for name in NETWORKS
}


def cost_and_error(name: str, widths: tuple[int, ...], schemes: tuple[int, ...]) -> np.ndarray:
    """Bytes and error of one network, written out."""
    a, b = widths
    sides = {"a": (3, a), "b": (3 + a, b), "head": (b, 2), "side": (a, 1)}
    n_bytes, error = 0.0, float(CURVES[name, "a"][a] + CURVES[name, "b"][b])
    for (layer, (inputs, outputs)), number in zip(sides.items(), schemes, strict=True):
        choice = OPTIONS[name][layer][number]
        n_bytes += (choice.weight * inputs + choice.output) * outputs
        error += OMEGA.get(name, 1.0) * choice.error
    return np.array([n_bytes, error])


EVERYTHING = {
    name: np.array(
        [
            cost_and_error(name, widths, schemes)
            for widths in itertools.product(range(1, 5), range(1, 4))
            for schemes in itertools.product(range(2), repeat=4)
        ]
    )
    for name in NETWORKS
}


@pytest.mark.parametrize("multiplier", [0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_a_multiplier_finds_the_minimum_that_exhaustive_search_finds(multiplier: float) -> None:
    joint = Joint(NETWORKS, CURVES, OPTIONS, OMEGA)
    m = joint.widths(multiplier)
    chosen = joint.schemes(multiplier, m)
    found = joint.error(m, chosen) + multiplier * joint.cost(m, chosen)
    least = sum(float((e[:, 1] + multiplier * e[:, 0]).min()) for e in EVERYTHING.values())
    assert found == pytest.approx(least, rel=1e-12, abs=1e-12)


def test_a_budget_is_kept_and_no_cheaper_point_of_the_hull_is_better() -> None:
    joint = Joint(NETWORKS, CURVES, OPTIONS, OMEGA)
    pairs = (EVERYTHING["one"][:, None] + EVERYTHING["two"][None, :]).reshape(-1, 2)
    least, most = pairs[:, 0].min(), pairs[:, 0].max()
    errors = []
    for amount in np.linspace(least, most, 12):
        m, chosen = joint.on_hull(float(amount))
        bytes_of, error = joint.cost(m, chosen), joint.error(m, chosen)
        assert bytes_of <= amount
        better = pairs[(pairs[:, 0] <= bytes_of) & (pairs[:, 1] < error - 1e-12)]
        assert len(better) == 0
        # What is left is spent, and no single change would gain more.
        m, chosen = joint.within(float(amount))
        assert joint.cost(m, chosen) <= amount
        assert joint.error(m, chosen) <= error
        error = joint.error(m, chosen)
        for wider, other in joint._changes(m, chosen):
            too_much = joint.cost(wider, other) > amount
            assert too_much or joint.error(wider, other) >= error
        errors.append(error)
    assert errors[0] > errors[-1]
    with pytest.raises(BudgetError, match="in the fewest bits"):
        joint.within(float(least) - 1)


def test_widths_and_schemes_come_by_name() -> None:
    widths, schemes = jointly(Joint(NETWORKS, CURVES, OPTIONS), 1e9)
    assert widths == {name: {"a": 4, "b": 3} for name in NETWORKS}
    assert schemes == {name: dict.fromkeys(WIDTHS, "int8") for name in NETWORKS}


def test_choices_are_measured_on_the_layers() -> None:
    network, statistics = NETWORKS["one"], STATISTICS["one"]
    found = choices(network, statistics, ("int3", "int8"))
    inputs = random_inputs(network, 40, 3)
    for number, scheme in enumerate(("int3", "int8")):
        quantized = quantize(network, scheme, statistics)
        for layer, x, _ in network.activations(inputs):
            W = network.weights[layer.name]
            z = x @ W.T
            lost = x @ (W - quantized.network(torch.float64).weights[layer.name]).T
            ratio = lost.var(dim=0, correction=0).sum() / z.var(dim=0, correction=0).sum()
            choice = found[layer.name][number]
            assert choice.scheme == scheme
            assert choice.error == pytest.approx(float(ratio), rel=1e-9)
            assert choice.weight == entropy(quantized.codes[layer.name]) / 8
    weights = {layer: torch.full((len(W),), 2.0) for layer, W in network.weights.items()}
    doubled = choices(network, statistics, ("int3",), weights)
    for layer, x, _ in network.activations(inputs):
        energy = (x @ network.weights[layer.name].T).var(dim=0, correction=0).sum()
        expected = 2 * found[layer.name][0].error * float(energy)
        assert doubled[layer.name][0].error == pytest.approx(expected, rel=1e-9)
    with pytest.raises(PruningError, match="stores floats"):
        choices(network, statistics, ("fp16",))


def test_a_layer_between_two_prunable_ones_is_refused() -> None:
    graph = LayerGraph(
        {"x": 2},
        (
            Layer("a", ("x",), relu=True, prunable=True),
            Layer("b", ("x",), relu=True, prunable=True),
            Layer("c", ("a", "b"), relu=True, prunable=False),
        ),
    )
    network = Network(
        graph,
        {"a": torch.ones(2, 2), "b": torch.ones(2, 2), "c": torch.ones(1, 4)},
        {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1)},
    )
    curves = {("n", "a"): np.zeros(3), ("n", "b"): np.zeros(3)}
    options = {"n": {layer: [Choice("int8", 1.0, 4.0, 0.0)] for layer in "abc"}}
    with pytest.raises(PruningError, match="one of them at most"):
        Joint({"n": network}, curves, options)
