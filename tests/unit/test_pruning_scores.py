"""Each criterion against a slow reference: one channel, one reader, one sample at a time."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pruning import (
    CRITERIA,
    CalibrationBatch,
    PruningError,
    StatisticsError,
    collect,
    collect_gradients,
    gradients_for,
    moments_for,
    needs_gradients,
    score,
)
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 6) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)
INPUTS = random_inputs(NETWORK, 24, seed=1)
WEIGHTS = torch.rand(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
RUN = 4


class Photo(CalibrationBatch):
    """A batch whose loss needs nothing else; a real one would carry the photo's colours."""


def loss(outputs: Mapping[str, Tensor], batch: CalibrationBatch) -> Tensor:
    """Runs of four samples see each other: a product of their colours, and their densities."""
    assert isinstance(batch, Photo)
    colour = outputs["rgb"].unflatten(0, (-1, RUN)).sum(dim=1)
    return (colour.prod(dim=1) + outputs["density"].unflatten(0, (-1, RUN)).sum(1)[:, 0] ** 2).sum()


STATISTICS = (
    collect(NETWORK, [CalibrationBatch(INPUTS, WEIGHTS)], moments_for(CRITERIA))
    .subset()
    .joined(collect_gradients(NETWORK, [Photo(INPUTS, WEIGHTS)], loss, RUN).subset())
)
OUTPUT = {layer.name: a for layer, _, a in NETWORK.activations(INPUTS)}
SEEN = {layer.name: x for layer, x, _ in NETWORK.activations(INPUTS)}


def readers(name: str, j: int) -> list[tuple[str, int]]:
    """(reader, its column for channel j)."""
    return [
        (reader.name, NETWORK.input_slices(reader)[name].start + j)
        for reader in NETWORK.graph.readers(name)
    ]


def expect(values: Tensor) -> float:
    return float((WEIGHTS * values).sum() / WEIGHTS.sum())


def out_square(name: str, j: int) -> float:
    return sum(float((NETWORK.weights[r][:, c] ** 2).sum()) for r, c in readers(name, j))


def sensitivity(name: str, j: int) -> float:
    best = 0.0
    for reader, column in readers(name, j):
        for x in SEEN[reader]:
            for w in NETWORK.weights[reader]:
                terms = w * x
                for part in (terms.clamp(min=0), (-terms).clamp(min=0)):
                    if part[column] > 0:
                        best = max(best, float(part[column] / part.sum()))
    return best


def gradient_of_gate(name: str, j: int) -> Tensor:
    """∂L/∂gate of channel j, by run: central differences on a gate for each sample."""
    sums = []
    for run in range(24 // RUN):
        values = []
        for step in (1e-4, -1e-4):
            computed = dict(INPUTS)
            for layer in NETWORK.graph.layers:
                x = torch.cat([computed[n] for n in layer.inputs], dim=1)
                a = x @ NETWORK.weights[layer.name].T + NETWORK.biases[layer.name]
                a = a.relu() if layer.relu else a
                if layer.name == name:
                    a = a.clone()
                    a[run * RUN : (run + 1) * RUN, j] *= 1 + step
                computed[layer.name] = a
            values.append(loss(computed, Photo({})))
        sums.append((values[0] - values[1]) / 2e-4)
    return torch.stack(sums)


def gradient_of_output(name: str) -> Tensor:
    """∂L/∂z of a layer before its activation, by sample: central differences, one at a time."""
    found = torch.zeros(24, NETWORK.width(name), dtype=torch.float64)
    for sample, j in itertools.product(range(24), range(NETWORK.width(name))):
        values = []
        for step in (1e-5, -1e-5):
            computed = dict(INPUTS)
            for layer in NETWORK.graph.layers:
                x = torch.cat([computed[n] for n in layer.inputs], dim=1)
                z = x @ NETWORK.weights[layer.name].T + NETWORK.biases[layer.name]
                if layer.name == name:
                    z[sample, j] += step
                computed[layer.name] = z.relu() if layer.relu else z
            values.append(loss(computed, Photo({})))
        found[sample, j] = (values[0] - values[1]) / 2e-5
    return found


def thinet(name: str) -> list[float]:
    n = NETWORK.width(name)

    def energy(removed: list[int]) -> float:
        total = 0.0
        for reader in NETWORK.graph.readers(name):
            columns = NETWORK.input_slices(reader)[name]
            W = NETWORK.weights[reader.name][:, columns][:, removed]
            total += expect((OUTPUT[name][:, removed] @ W.T).square().sum(dim=1))
        return total

    gone: list[int] = []
    while len(gone) < n:
        gone.append(min((j for j in range(n) if j not in gone), key=lambda j: energy([*gone, j])))
    return [float(gone.index(j)) for j in range(n)]


def reference(criterion: str, name: str) -> list[float]:  # noqa: PLR0911 (one case a criterion)
    n, W, a = NETWORK.width(name), NETWORK.weights[name], OUTPUT[name]
    run_weight = WEIGHTS.unflatten(0, (-1, RUN)).mean(dim=1)
    match criterion:
        case "activation":
            return [expect(a[:, j]) for j in range(n)]
        case "magnitude":
            return [sum(float(v) ** 2 for v in W[j]) ** 0.5 for j in range(n)]
        case "magnitude_l1":
            return [sum(abs(float(v)) for v in W[j]) for j in range(n)]
        case "outgoing":
            return [out_square(name, j) ** 0.5 for j in range(n)]
        case "wanda":
            return [(expect(a[:, j] ** 2) * out_square(name, j)) ** 0.5 for j in range(n)]
        case "fluctuation":
            raw = [expect((a[:, j] - expect(a[:, j])) ** 2) * out_square(name, j) for j in range(n)]
            mean = sum(raw) / n
            spread = (sum((v - mean) ** 2 for v in raw) / n) ** 0.5
            return [(v - mean) / spread for v in raw]
        case "sensitivity":
            return [sensitivity(name, j) for j in range(n)]
        case "thinet":
            return thinet(name)
        case "taylor_fo2":
            return [
                float((run_weight * gradient_of_gate(name, j) ** 2).sum() / run_weight.sum())
                for j in range(n)
            ]
        case "fisher":
            g = gradient_of_output(name)
            return [expect(g[:, j] ** 2) * expect(a[:, j] ** 2) / 2 for j in range(n)]
    raise AssertionError(criterion)


# Tested by the contract, test_pruning_elimination, below, and test_pruning_lasso.
ELSEWHERE = {"random", "obs", "taylor", "lasso"}


@pytest.mark.parametrize("criterion", sorted(CRITERIA.keys() - ELSEWHERE))
def test_it_equals_a_slow_reference(criterion: str) -> None:
    scores = score(NETWORK, criterion, STATISTICS)
    for name in ("trunk.1", "trunk.4", "trunk.7"):
        torch.testing.assert_close(
            scores[name],
            torch.tensor(reference(criterion, name), dtype=torch.float64),
            rtol=1e-6,
            atol=1e-8,
        )


def test_first_order_taylor_equals_differences_of_the_loss() -> None:
    """Without sample weights, the mean of a·∂L/∂a is the loss's derivative with the gate."""
    statistics = collect_gradients(NETWORK, [Photo(INPUTS)], loss, RUN).subset()
    scores = score(NETWORK, "taylor", statistics)
    for name in ("trunk.2", "trunk.7"):
        expected = [abs(float(gradient_of_gate(name, j).sum()) / 24) for j in range(6)]
        torch.testing.assert_close(
            scores[name], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9
        )


def test_for_relu_layers_it_is_the_paper_s_weight_times_gradient() -> None:
    weights = {n: W.clone().requires_grad_() for n, W in NETWORK.weights.items()}
    biases = {n: b.clone().requires_grad_() for n, b in NETWORK.biases.items()}
    computed = dict(INPUTS)
    for layer in NETWORK.graph.layers:
        x = torch.cat([computed[n] for n in layer.inputs], dim=1)
        a = x @ weights[layer.name].T + biases[layer.name]
        computed[layer.name] = a.relu() if layer.relu else a
    loss(computed, Photo({})).backward()
    W, b = weights["trunk.3"], biases["trunk.3"]
    assert W.grad is not None
    assert b.grad is not None
    expected = ((W * W.grad).sum(dim=1) + b * b.grad).detach()
    statistics = collect_gradients(NETWORK, [Photo(INPUTS)], loss, RUN).subset()
    torch.testing.assert_close(statistics.sums["trunk.3"]["taylor"], expected)


def test_the_fisher_diagonal_is_that_of_the_outputs_before_the_activation() -> None:
    statistics = collect_gradients(NETWORK, [Photo(INPUTS)], loss, RUN).subset()
    colours = OUTPUT["rgb"].clone().requires_grad_()
    loss({"rgb": colours, "density": OUTPUT["density"]}, Photo({})).backward()
    assert colours.grad is not None
    torch.testing.assert_close(
        statistics.average("rgb", "fisher"), colours.grad.square().mean(dim=0)
    )


def test_gradients_do_not_depend_on_chunks_of_whole_runs() -> None:
    pieces = [slice(0, 4), slice(4, 16), slice(16, 24)]
    chunked = collect_gradients(
        NETWORK,
        [Photo({n: v[p] for n, v in INPUTS.items()}, WEIGHTS[p]) for p in pieces],
        loss,
        RUN,
    ).subset()
    for layer, moments in chunked.sums.items():
        for name, total in moments.items():
            torch.testing.assert_close(total, STATISTICS.sums[layer][name])


def test_gradients_leave_the_network_alone() -> None:
    assert not any(t.requires_grad for t in (*NETWORK.weights.values(), *NETWORK.biases.values()))


def test_bad_losses_are_refused() -> None:
    with pytest.raises(StatisticsError, match="whole runs of 5"):
        collect_gradients(NETWORK, [Photo(INPUTS)], loss, 5)
    with pytest.raises(StatisticsError, match="one finite number"):
        collect_gradients(NETWORK, [Photo(INPUTS)], lambda o, _: o["rgb"])
    with pytest.raises(StatisticsError, match="one finite number"):
        collect_gradients(NETWORK, [Photo(INPUTS)], lambda o, _: o["rgb"].sum() / 0)
    with pytest.raises(StatisticsError, match="no samples"):
        collect_gradients(NETWORK, [], loss)


def test_who_needs_gradients_says_so() -> None:
    assert needs_gradients(["taylor"])
    assert not needs_gradients(["wanda", "obs"])
    assert moments_for(["taylor"]) == ()
    assert moments_for(["wanda"], ["obs", "mean_fold"]) == ("gram", "mean", "square")
    assert moments_for("wanda", "obs") == moments_for(["wanda"], ["obs"])
    assert gradients_for("taylor") == gradients_for(["taylor"])
    with pytest.raises(StatisticsError, match="taylor"):
        score(NETWORK, "taylor")
    with pytest.raises(PruningError, match="no compensation"):
        moments_for([], ["nothing"])


@pytest.mark.parametrize(
    "criterion", ["wanda", "fluctuation", "taylor_fo2", "sensitivity", "obs", "thinet"]
)
def test_dead_channels_go_first(criterion: str) -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=3)
    network.biases["trunk.2"][4] = -100
    if needs_gradients([criterion]):
        statistics = collect_gradients(network, [Photo(INPUTS)], loss, RUN).subset()
    else:
        statistics = collect(network, [CalibrationBatch(INPUTS)], moments_for([criterion])).subset()
    a = next(a for layer, _, a in network.activations(INPUTS) if layer.name == "trunk.2")
    dead = a.amax(dim=0) == 0
    scores = score(network, criterion, statistics)["trunk.2"]
    assert dead[4]
    assert not dead.all()
    assert scores[dead].max() <= scores[~dead].min()
