"""Rounding at one step: against a slow reference, and what it promises of rate and distortion."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pruning import (
    CalibrationBatch,
    Layer,
    LayerGraph,
    Network,
    PruningError,
    RateNetwork,
    Statistics,
    coded_bytes,
    collect,
    narrow_linear,
)
from pruning.quantization import entropy
from pruning.rate import TOP
from pruning.solving import damped
from tests.pruning_networks import (
    NERF_WIDTHS,
    draw_network,
    heads,
    nerf_graph,
    random_inputs,
    random_network,
)

WIDTHS = {name: min(width, 24) for name, width in NERF_WIDTHS.items()} | {"view": 12}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)
INPUTS = random_inputs(NETWORK, 500, seed=1)


def statistics_of(network: Network, inputs: dict[str, torch.Tensor] = INPUTS) -> Statistics:
    return collect(network, [CalibrationBatch(inputs)], ("gram",)).subset()


def error(network: Network, of: Network = NETWORK) -> float:
    dense, small = heads(of, INPUTS), heads(network, INPUTS)
    return sum(
        float((small[h].double() - dense[h]).square().mean() / dense[h].var()) for h in dense
    )


def one_layer(W: torch.Tensor, x: torch.Tensor) -> tuple[Network, Statistics]:
    """A layer of external inputs alone, which nothing can be scaled in."""
    graph = LayerGraph({"x": W.shape[1]}, (Layer("head", ("x",), relu=False, prunable=False),))
    network = Network(graph, {"head": W}, {"head": torch.zeros(len(W), dtype=torch.float64)})
    gram = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
    sums = {"head": {"gram": gram.T @ gram}}
    return network, Statistics(len(x), float(len(x)), sums)


def brute_force(
    W: torch.Tensor, H: torch.Tensor, steps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round one column after the other, each time solving anew for all that are left."""
    order = torch.argsort(H.diagonal(), descending=True, stable=True).tolist()
    left, codes, power = W.clone(), torch.zeros_like(W), torch.zeros(len(H), dtype=W.dtype)
    for place, i in enumerate(order):
        codes[:, i] = (left[:, i] / steps).round()
        lost = left[:, i] - codes[:, i] * steps
        left[:, i] -= lost
        rest = order[place + 1 :]
        if rest:
            # argmin over δ of the error when column i is off by −lost and the rest by δ
            left[:, rest] += lost[:, None] * torch.linalg.solve(H[rest][:, rest], H[rest, i])
        behind = H[i, i]
        if rest:
            behind = behind - H[i, rest] @ torch.linalg.solve(H[rest][:, rest], H[rest, i])
        power[i] = behind**-0.5
    return codes, power


def test_codes_are_those_of_solving_anew_after_each_column() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 7, generator=generator, dtype=torch.float64) @ torch.randn(
        7, 7, generator=generator, dtype=torch.float64
    )
    W = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    network, statistics = one_layer(W, x)
    s = torch.tensor([1.0, 4.0, 1.0, 0.25], dtype=torch.float64)
    gram = statistics.average("head", "gram")
    H = damped(gram)[:-1, :-1] - torch.outer(gram[:-1, -1], gram[:-1, -1])
    quantized = RateNetwork(network, statistics, {"head": s}).quantize(0.2)
    _, power = brute_force(W, H, torch.ones(4, dtype=torch.float64))
    steps = (0.2 * power.log().mean().exp() / s.sqrt()).half()
    assert quantized.tables["head"]["scale"].tolist() == pytest.approx(steps.tolist(), rel=2e-3)
    used = quantized.tables["head"]["scale"].double()
    codes, _ = brute_force(W, H, used)
    assert (quantized.codes["head"].long() - TOP).tolist() == codes.long().tolist()
    # The bias takes over the mean of what is lost.
    lost = W - codes * used[:, None]
    assert quantized.tables["head"]["bias"].tolist() == pytest.approx(
        (lost @ gram[:-1, -1]).tolist(), abs=1e-4
    )


def test_channels_are_scaled_to_equal_losses() -> None:
    """One step for all: weights of a channel that is 16 times as strong get a 16th of its step."""
    graph = LayerGraph(
        {"x": 2},
        (
            Layer("hidden", ("x",), relu=True, prunable=True),
            Layer("head", ("hidden",), relu=False, prunable=False),
        ),
    )
    eye = torch.eye(2, dtype=torch.float64)
    network = Network(
        graph,
        {"hidden": eye * torch.tensor([16.0, 1.0], dtype=torch.float64), "head": eye + 0.5},
        {name: torch.zeros(2, dtype=torch.float64) for name in ("hidden", "head")},
    )
    x = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    statistics = collect(network, [CalibrationBatch({"x": x})], ("gram",)).subset()
    stored = RateNetwork(network, statistics).quantize(0.01)
    plain = stored.network(torch.float64)
    # In the file both columns of the head have one step; in the dense network's units they differ.
    strength = (plain.weights["hidden"].diagonal() / network.weights["hidden"].diagonal()).tolist()
    assert strength[1] / strength[0] == pytest.approx(16, rel=0.1)
    outputs = heads(plain, {"x": x})["head"]
    torch.testing.assert_close(outputs, heads(network, {"x": x})["head"], rtol=0, atol=0.1)


@pytest.mark.parametrize("narrow", [False, True])
def test_finer_steps_lose_less_and_take_more(narrow: bool) -> None:
    network = narrow_linear(NETWORK) if narrow else NETWORK
    rated = RateNetwork(network, statistics_of(network))
    losses, sizes = [], []
    for step in (3.0, 0.3, 0.03, 0.003):
        quantized = rated.quantize(step)
        losses.append(error(quantized.network(torch.float64)))
        sizes.append(coded_bytes(quantized))
    assert losses == sorted(losses, reverse=True)
    assert sizes == sorted(sizes)
    assert losses[-1] < 1e-3 < losses[0]


def test_one_step_beats_one_grid_at_the_same_bytes() -> None:
    """Against GPTQ on grids by the largest weight, where channels differ in strength."""
    from pruning import quantize

    generator = torch.Generator().manual_seed(5)
    weights, biases = dict(NETWORK.weights), dict(NETWORK.biases)
    for layer in NETWORK.graph.layers:
        if layer.relu:
            strength = torch.exp(torch.randn(len(biases[layer.name]), generator=generator))
            weights[layer.name] = weights[layer.name] * strength[:, None]
            biases[layer.name] = biases[layer.name] * strength
    network = Network(NETWORK.graph, weights, biases)
    statistics = statistics_of(network)
    plain = quantize(network, "gptq4", statistics)
    rated = RateNetwork(network, statistics)
    step = 1e-3
    while coded_bytes(rated.quantize(step)) > coded_bytes(plain):
        step *= 1.1
    assert error(rated.quantize(step).network(torch.float64), network) < 0.7 * error(
        plain.network(torch.float64), network
    )


def test_what_was_narrowed_keeps_its_identity_exactly() -> None:
    network = narrow_linear(NETWORK)
    rated = RateNetwork(network, statistics_of(network))
    for step in (1e-4, 0.02, 1.0):
        view = rated.quantize(step).network(torch.float64).weights["view"]
        square = view[:, network.input_slices(network.graph["view"])["feature"]]
        off_diagonal = square - torch.diag(square.diagonal())
        assert not off_diagonal.any()
        assert (square.diagonal() > 0).all()


@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_any_graph_can_be_rounded(data: st.DataObject) -> None:
    network = narrow_linear(draw_network(data))
    assume(network.graph.prunable())
    inputs = random_inputs(network, 40, seed=0)
    rated = RateNetwork(network, statistics_of(network, inputs))
    fine = rated.quantize(1e-6).network(torch.float64)
    for name, W in fine.weights.items():
        assert W.shape == network.weights[name].shape
        assert torch.isfinite(W).all()
    quantized = rated.quantize(data.draw(st.floats(1e-6, 1e3)))
    assert coded_bytes(quantized) <= quantized.n_bytes() + sum(
        int(codes.max()) - int(codes.min()) + 1 for codes in quantized.codes.values()
    )
    assert all(0 <= entropy(codes) <= 8 for codes in quantized.codes.values())


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_a_step_is_a_number_above_0(step: float) -> None:
    with pytest.raises(PruningError, match="step must be a number above 0"):
        RateNetwork(NETWORK, statistics_of(NETWORK)).quantize(step)


@pytest.mark.parametrize("weights", [torch.ones(2), -torch.ones(3), torch.full((3,), torch.nan)])
def test_output_weights_must_fit(weights: torch.Tensor) -> None:
    with pytest.raises(PruningError, match="output weights of layer 'rgb' must be 3 finite"):
        RateNetwork(NETWORK, statistics_of(NETWORK), {"rgb": weights})


def test_what_half_precision_cannot_hold_is_refused() -> None:
    biases = {name: b + 1e6 if name == "rgb" else b for name, b in NETWORK.biases.items()}
    network = Network(NETWORK.graph, NETWORK.weights, biases)
    with pytest.raises(PruningError, match="layer 'rgb' has a bias beyond what float16 can hold"):
        RateNetwork(network, statistics_of(network)).quantize(0.01)
