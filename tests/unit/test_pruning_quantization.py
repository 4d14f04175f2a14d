import numpy as np
import pytest
import torch

from pruning import (
    SCHEMES,
    CalibrationBatch,
    Network,
    PruningError,
    Quantized,
    balance,
    collect,
    quantize,
)
from pruning.quantization import entropy, kmeans, uniform_grid
from tests.pruning_networks import NERF_WIDTHS, heads, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 24) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)
INPUTS = random_inputs(NETWORK, 400, seed=1)
STATISTICS = collect(NETWORK, [CalibrationBatch(INPUTS)], ("gram",)).subset()
ONES = torch.ones(3, dtype=torch.float64)


def error(network: Network) -> float:
    dense, small = heads(NETWORK, INPUTS), heads(network, INPUTS)
    return sum(
        float((small[h].double() - dense[h]).square().mean() / dense[h].var()) for h in dense
    )


def test_entropy_by_hand() -> None:
    assert entropy(torch.tensor([[0, 1], [2, 3]], dtype=torch.uint8)) == 2
    assert entropy(torch.tensor([7, 7, 7], dtype=torch.uint8)) == 0
    assert entropy(torch.tensor([0, 1, 1, 1], dtype=torch.uint8)) == pytest.approx(
        0.811278, abs=1e-6
    )


def test_a_symmetric_grid_by_hand() -> None:
    W = torch.tensor([[-7.0, 3.4, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    scale, offset = uniform_grid(W, SCHEMES["int4"], ONES)
    assert scale.tolist() == [1.0, 0.0]
    assert offset.tolist() == [0.0, 0.0]
    network = chain(W)
    quantized = quantize(network, {"hidden": "int4", "head": "fp32"})
    assert quantized.codes["hidden"].tolist() == [[0, 10, 7], [7, 7, 7]]
    assert quantized.network().weights["hidden"].tolist() == [[-7, 3, 0], [0, 0, 0]]


def test_an_asymmetric_grid_by_hand() -> None:
    W = torch.tensor([[1.0, 4.0, 2.0]], dtype=torch.float64)
    quantized = quantize(chain(W), {"hidden": "uint2", "head": "fp32"})
    assert quantized.codes["hidden"].tolist() == [[0, 3, 1]]
    assert quantized.network().weights["hidden"].tolist() == [[1, 4, 2]]


def chain(W: torch.Tensor) -> Network:
    from pruning import Layer, LayerGraph

    graph = LayerGraph(
        {"x": W.shape[1]},
        (
            Layer("hidden", ("x",), relu=True, prunable=True),
            Layer("head", ("hidden",), relu=False, prunable=False),
        ),
    )
    head = torch.ones(1, len(W), dtype=W.dtype)
    biases = {"hidden": torch.zeros(len(W), dtype=W.dtype), "head": torch.zeros(1, dtype=W.dtype)}
    return Network(graph, {"hidden": W, "head": head}, biases)


def test_a_grid_is_clipped_where_that_helps() -> None:
    W = torch.cat((torch.linspace(-1, 1, 200), torch.tensor([1.6])))[None].double()
    scale, _ = uniform_grid(W, SCHEMES["int3"], torch.ones(201, dtype=torch.float64))
    assert float(scale) < 1.6 / 3 * 0.99


def test_kmeans_is_lloyds_fixed_point() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(20, 15, generator=generator, dtype=torch.float64)
    h = torch.rand(15, generator=generator, dtype=torch.float64)
    centres = kmeans(W, 3, h).double()
    nearest = (W[..., None] - centres).abs().argmin(dim=-1)
    for k in range(8):
        inside = nearest == k
        weight = h.expand_as(W)[inside]
        assert float((weight * W[inside]).sum() / weight.sum()) == pytest.approx(
            float(centres[k]), abs=3e-3
        )


def test_few_values_are_kept_exactly_by_a_codebook() -> None:
    W = torch.tensor([[0.5, -1.0, 0.25], [0.25, 0.5, 2.0]], dtype=torch.float64)
    quantized = quantize(chain(W), {"hidden": "kmeans4", "head": "fp32"})
    assert torch.equal(quantized.network().weights["hidden"].double(), W)


def test_more_bits_are_closer() -> None:
    for family in ("int", "uint", "gptq", "kmeans"):
        errors = [
            error(quantize(NETWORK, f"{family}{b}", STATISTICS).network(torch.float64))
            for b in (3, 5, 8)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1e-2


def test_feedback_beats_rounding() -> None:
    assert error(quantize(NETWORK, "gptq4", STATISTICS).network(torch.float64)) < error(
        quantize(NETWORK, "int4", STATISTICS).network(torch.float64)
    )


def test_feedback_equals_a_slow_reference() -> None:
    """OBS on each row: after rounding column i, the rest is solved anew on what is left of H."""
    quantized = quantize(NETWORK, "gptq3", STATISTICS)
    gram = STATISTICS.average("trunk.3", "gram").numpy()
    W = NETWORK.weights["trunk.3"].numpy().copy()
    n = W.shape[1]
    ridge = 1e-4 * np.diag(gram)[:-1].mean()
    H = gram[:-1, :-1] - np.outer(gram[:-1, -1], gram[:-1, -1]) + ridge * np.eye(n)
    order = np.argsort(-np.diag(H), kind="stable")
    scale = quantized.tables["trunk.3"]["scale"].double().numpy()
    codes = np.zeros(W.shape, dtype=int)
    for i, j in enumerate(order):
        codes[:, j] = np.clip(np.round(W[:, j] / scale), -3, 3)
        lost = W[:, j] - codes[:, j] * scale
        rest = order[i + 1 :]
        if len(rest):
            W[:, rest] += np.outer(lost, np.linalg.solve(H[np.ix_(rest, rest)], H[rest, j]))
    np.testing.assert_array_equal(quantized.codes["trunk.3"].numpy().astype(int) - 3, codes)


def test_the_bias_takes_over_the_mean_of_the_rounding() -> None:
    quantized = quantize(NETWORK, "int3", STATISTICS).network(torch.float64)
    for layer, x, _ in NETWORK.activations(INPUTS):
        z = x @ NETWORK.weights[layer.name].T + NETWORK.biases[layer.name]
        rounded = x @ quantized.weights[layer.name].T + quantized.biases[layer.name]
        torch.testing.assert_close(rounded.mean(0), z.mean(0), rtol=0, atol=5e-3)


def test_balancing_changes_nothing_but_how_rounding_falls() -> None:
    network = random_network(nerf_graph(), WIDTHS, seed=4)
    network.weights["trunk.7"][3] *= 30  # a loud channel, as trained networks have
    network.biases["trunk.7"][3] += 30
    statistics = collect(network, [CalibrationBatch(INPUTS)], ("gram",)).subset()
    balanced, scaled = balance(network, statistics, bits=4)
    dense = heads(network, INPUTS)
    for head, values in heads(balanced, INPUTS).items():
        torch.testing.assert_close(values, dense[head], rtol=1e-8, atol=1e-8)
    again = collect(balanced, [CalibrationBatch(INPUTS)], ("gram",)).subset()
    for layer in network.weights:
        torch.testing.assert_close(
            scaled.average(layer, "gram"), again.average(layer, "gram"), rtol=1e-8, atol=1e-10
        )

    def lost(net: Network) -> float:
        out = heads(quantize(net, "int4").network(torch.float64), INPUTS)["density"]
        return float((out - dense["density"]).square().mean())

    # Both heads read trunk.7 and share its scales; the feature layer's rows have their own besides.
    shared = balanced.weights["density"] / network.weights["density"]
    of_feature = balanced.weights["feature"] / network.weights["feature"] / shared
    torch.testing.assert_close(of_feature, of_feature[:, :1].expand(24, 24))
    assert lost(balanced) <= lost(network)


def test_mixed_schemes() -> None:
    schemes = {name: "fp16" if name in ("density", "rgb") else "int6" for name in NETWORK.weights}
    quantized = quantize(NETWORK, schemes)
    assert quantized.tables["density"]["weight"].dtype == torch.float16
    assert "trunk.0" in quantized.codes
    with pytest.raises(PruningError, match="the schemes are for"):
        quantize(NETWORK, {"density": "fp16"})
    with pytest.raises(PruningError, match="did you mean 'int8'"):
        quantize(NETWORK, "int88")


def test_damaged_arrays_are_refused() -> None:
    quantized = quantize(NETWORK, "int6")
    good = quantized.tensors()
    for key, value, message in [
        ("trunk.2/scale", None, r"lacks \['scale'\]"),
        ("trunk.2/scale", good["trunk.2/scale"][:-1], "'scale' of the quantised layer 'trunk.2'"),
        ("trunk.2/bias", good["trunk.2/bias"] * float("nan"), "'bias'"),
        ("trunk.2/codes", good["trunk.2/codes"][:-1], "codes of 6 bits"),
        ("trunk.2/codes", good["trunk.2/codes"] | 64, "codes of 6 bits"),
    ]:
        bad = {k: v for k, v in good.items() if k != key} | ({} if value is None else {key: value})
        with pytest.raises(PruningError, match=message):
            Quantized.from_tensors(NETWORK.graph, quantized.schemes, bad)
