import numpy as np
import pytest
import torch

from pruning import (
    CalibrationBatch,
    Layer,
    LayerGraph,
    Network,
    PruningError,
    StatisticsError,
    collect,
    compensate,
    mask,
    sequential,
)
from pruning.compensation import least_squares, obs
from tests.pruning_networks import NERF_WIDTHS, heads, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 12) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)
INPUTS = random_inputs(NETWORK, 300, seed=1)
KEEP = {
    name: torch.rand(12, generator=torch.Generator().manual_seed(i)) > 0.4
    for i, name in enumerate(NETWORK.graph.prunable())
}
BATCH = CalibrationBatch(INPUTS)
STATISTICS = collect(NETWORK, [BATCH], ("mean", "gram")).subset()


def worst(network: Network, inputs: dict[str, torch.Tensor] = INPUTS) -> float:
    """Mean squared error of the heads against the dense network's, relative to their variance."""
    dense, small = heads(NETWORK, inputs), heads(network, inputs)
    return max(float((small[h] - dense[h]).square().mean() / dense[h].var()) for h in dense)


@pytest.mark.parametrize("layer", ["trunk.3", "trunk.5", "density", "feature", "view"])
def test_least_squares_equals_numpys(layer: str) -> None:
    """Against lstsq on the samples themselves, skip inputs and branches included."""
    smaller = least_squares(NETWORK, KEEP, STATISTICS, damping=1e-11)
    for spec, x, _ in NETWORK.activations(INPUTS):
        if spec.name != layer:
            continue
        columns = [
            x[:, part][:, KEEP[name]] if name in KEEP else x[:, part]
            for name, part in NETWORK.input_slices(spec).items()
        ]
        A = torch.cat([*columns, torch.ones(len(x), 1, dtype=x.dtype)], dim=1).numpy()
        z = x @ NETWORK.weights[layer].T + NETWORK.biases[layer]
        rows = KEEP.get(layer, torch.ones(len(z[0]), dtype=torch.bool))
        expected = np.linalg.lstsq(A, z[:, rows].numpy(), rcond=None)[0]
        got = np.concatenate((smaller.weights[layer].T, smaller.biases[layer][None]))
        # Where inputs are dead or dependent the weights are not unique; what they compute is.
        np.testing.assert_allclose(A @ got, A @ expected, rtol=1e-4, atol=1e-5)


def test_sample_weights_weight_the_least_squares() -> None:
    w = torch.rand(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    statistics = collect(NETWORK, [CalibrationBatch(INPUTS, w)], ("gram",)).subset()
    smaller = least_squares(NETWORK, KEEP, statistics, damping=1e-11)
    x = next(x for layer, x, _ in NETWORK.activations(INPUTS) if layer.name == "density")
    A = torch.cat((x[:, KEEP["trunk.7"]], torch.ones(300, 1, dtype=x.dtype)), dim=1)
    z = x @ NETWORK.weights["density"].T + NETWORK.biases["density"]
    root = w.sqrt()[:, None]
    expected = np.linalg.lstsq((root * A).numpy(), (root * z).numpy(), rcond=None)[0]
    got = np.concatenate((smaller.weights["density"].T, smaller.biases["density"][None]))
    np.testing.assert_allclose(A.numpy() @ got, A.numpy() @ expected, rtol=1e-4, atol=1e-5)


def test_obs_and_least_squares_are_the_same_optimum() -> None:
    one, two = (f(NETWORK, KEEP, STATISTICS) for f in (least_squares, obs))
    for name in one.weights:
        torch.testing.assert_close(one.weights[name], two.weights[name], rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(one.biases[name], two.biases[name], rtol=1e-8, atol=1e-9)


def test_none_equals_masking() -> None:
    smaller = compensate(NETWORK, KEEP, "none")
    masked = heads(mask(NETWORK, KEEP), INPUTS)
    for head, values in heads(smaller, INPUTS).items():
        torch.testing.assert_close(values, masked[head], rtol=1e-10, atol=1e-10)


def test_the_mean_fold_keeps_the_mean_of_what_the_readers_compute() -> None:
    keep = {"trunk.7": KEEP["trunk.7"]}
    smaller = compensate(NETWORK, keep, "mean_fold", STATISTICS)
    for head in ("density",):
        torch.testing.assert_close(
            heads(smaller, INPUTS)[head].mean(0), heads(NETWORK, INPUTS)[head].mean(0)
        )


def test_a_copy_of_a_channel_is_removed_without_loss() -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=0)
    network.weights["trunk.4"][2] = network.weights["trunk.4"][9]
    network.biases["trunk.4"][2] = network.biases["trunk.4"][9]
    statistics = collect(network, [BATCH], ("gram",)).subset()
    keep = {"trunk.4": torch.arange(12) != 2}
    for smaller in (
        least_squares(network, keep, statistics, damping=1e-10),
        obs(network, keep, statistics, damping=1e-10),
        sequential(network, keep, [BATCH], damping=1e-10),
    ):
        for head, values in heads(smaller, INPUTS).items():
            torch.testing.assert_close(values, heads(network, INPUTS)[head], rtol=1e-5, atol=1e-6)


def test_each_compensation_is_closer_than_the_one_before() -> None:
    errors = [
        worst(compensate(NETWORK, KEEP, name, STATISTICS))
        for name in ("none", "mean_fold", "least_squares")
    ]
    errors.append(worst(sequential(NETWORK, KEEP, [BATCH])))
    assert errors == sorted(errors, reverse=True)


def test_sequential_solves_each_layer_on_what_the_pruned_layers_before_produce() -> None:
    halves = [
        CalibrationBatch({n: v[s] for n, v in INPUTS.items()})
        for s in (slice(0, 100), slice(100, 300))
    ]
    smaller = sequential(NETWORK, KEEP, halves, damping=1e-13)
    dense = {spec.name: x for spec, x, _ in NETWORK.activations(INPUTS)}
    for spec, x, _ in smaller.activations(INPUTS):
        if spec.name == "trunk.0":
            continue
        A = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1).numpy()
        z = dense[spec.name] @ NETWORK.weights[spec.name].T + NETWORK.biases[spec.name]
        rows = KEEP.get(spec.name, torch.ones(len(z[0]), dtype=torch.bool))
        expected = np.linalg.lstsq(A, z[:, rows].numpy(), rcond=None)[0]
        got = np.concatenate((smaller.weights[spec.name].T, smaller.biases[spec.name][None]))
        np.testing.assert_allclose(A @ got, A @ expected, rtol=1e-4, atol=1e-4)


def test_sequential_leaves_layers_before_the_cut_alone() -> None:
    keep = {"trunk.6": KEEP["trunk.6"], "trunk.2": torch.ones(12, dtype=torch.bool)}
    smaller = sequential(NETWORK, keep, [BATCH])
    for name in ("trunk.0", "trunk.3", "trunk.5"):
        assert torch.equal(smaller.weights[name], NETWORK.weights[name])


def test_sequential_needs_batches_that_can_be_read_again() -> None:
    with pytest.raises(PruningError, match="not a generator"):
        sequential(NETWORK, KEEP, iter([BATCH]))
    with pytest.raises(StatisticsError, match="no sample"):
        sequential(NETWORK, KEEP, [CalibrationBatch(INPUTS, torch.zeros(300))])
    bad = {**INPUTS, "point": INPUTS["point"] * float("nan")}
    with pytest.raises(StatisticsError, match="'point'"):
        sequential(NETWORK, KEEP, [CalibrationBatch(bad)])


def test_a_layer_whose_inputs_are_all_dead_is_solved() -> None:
    graph = LayerGraph(
        {"x": 2},
        (
            Layer("hidden", ("x",), relu=True, prunable=True),
            Layer("head", ("hidden",), relu=False, prunable=False),
        ),
    )
    network = Network(
        graph,
        {"hidden": torch.zeros(3, 2), "head": torch.ones(1, 3)},
        {"hidden": -torch.ones(3), "head": torch.ones(1)},
    )
    batch = CalibrationBatch({"x": torch.ones(5, 2)})
    statistics = collect(network, [batch], ("gram",)).subset()
    keep = {"hidden": torch.tensor([True, False, False])}
    for smaller in (
        compensate(network, keep, "least_squares", statistics),
        compensate(network, keep, "obs", statistics),
        sequential(network, keep, [batch]),
    ):
        assert heads(smaller, dict(batch.inputs))["head"].tolist() == [[1.0]] * 5
