"""Errors in units of what a network is for."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from pruning import (
    CalibrationBatch,
    StatisticsError,
    collect,
    collect_gradients,
    curvature_weights,
    elimination_paths,
    probe,
)
from tests.pruning_networks import heads, nerf_graph, random_inputs, random_network

WIDTHS = {**{f"trunk.{i}": 6 for i in range(8)}, "density": 1, "feature": 5, "view": 4, "rgb": 3}
NETWORK = random_network(nerf_graph(branch=True), WIDTHS, seed=0)
INPUTS = random_inputs(NETWORK, 40, seed=1)
RUN = 4


def ends(outputs: Mapping[str, Tensor]) -> Tensor:
    """What the network is for: by run, colours weighted by densities."""
    density = outputs["density"].unflatten(0, (-1, RUN)).sigmoid()
    return (density * outputs["rgb"].unflatten(0, (-1, RUN))).sum(dim=1)


def curvature(draws: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def loss(outputs: Mapping[str, Tensor], _: CalibrationBatch) -> Tensor:
        return probe(ends(outputs), generator)

    found = [
        collect_gradients(NETWORK, [CalibrationBatch(INPUTS)], loss, RUN).subset()
        for _ in range(draws)
    ]
    return {
        layer: torch.stack([s.average(layer, "fisher") for s in found]).mean(dim=0)
        for layer in NETWORK.weights
    }


def squared_jacobian(name: str) -> Tensor:
    """E over samples of Σ_k (∂f_k/∂z_r)², by autograd, one end at a time."""
    computed: dict[str, Tensor] = dict(INPUTS)
    z = torch.zeros(0)
    for layer in NETWORK.graph.layers:
        x = torch.cat([computed[n] for n in layer.inputs], dim=1)
        out = x @ NETWORK.weights[layer.name].T + NETWORK.biases[layer.name]
        if layer.name == name:
            z = out = out.detach().requires_grad_()
        computed[layer.name] = out.relu() if layer.relu else out
    total = torch.zeros(z.shape[1], dtype=torch.float64)
    for value in ends(computed).flatten():
        (g,) = torch.autograd.grad(value, z, retain_graph=True, allow_unused=True)
        total += torch.zeros_like(total) if g is None else g.square().sum(dim=0)
    return total / len(INPUTS["point"])


def test_probing_with_random_signs_measures_the_squared_jacobian() -> None:
    found = curvature(draws=400)
    for name in ("trunk.2", "trunk.7", "density", "view", "rgb"):
        torch.testing.assert_close(found[name], squared_jacobian(name), rtol=0.2, atol=1e-3)


def test_a_probe_is_a_sum_with_signs() -> None:
    values = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    seen = {float(probe(values, torch.Generator().manual_seed(seed))) for seed in range(200)}
    signs = [-1, 1]
    assert seen == {
        a + 10 * b + 100 * c + 1000 * d for a in signs for b in signs for c in signs for d in signs
    }


def statistics_with_curvature() -> object:
    def loss(outputs: Mapping[str, Tensor], _: CalibrationBatch) -> Tensor:
        return probe(ends(outputs), torch.Generator().manual_seed(5))

    batch = CalibrationBatch(INPUTS)
    gradients = collect_gradients(NETWORK, [batch], loss, RUN).only({"fisher": "curvature"})
    return collect(NETWORK, [batch], ("gram",)).joined(gradients).subset()


def test_losing_all_of_the_end_counts_one() -> None:
    statistics = statistics_with_curvature()
    weights = curvature_weights(NETWORK, statistics)  # type: ignore[arg-type]
    total = sum(
        float((weights[name] * out.var(dim=0, correction=0)).sum())
        for name, out in heads(NETWORK, INPUTS).items()
    )
    assert total == pytest.approx(1.0, rel=1e-9)
    # Outputs weighted so, an error of all layers is what the readers' errors do to the end.
    paths = elimination_paths(
        {"": NETWORK},
        {"": statistics},  # type: ignore[dict-item]
        output_weights={"": weights},
        balance="none",
        damping=0.0,
    )[""]
    gone = torch.linalg.vector_norm(torch.stack([p.errors[0] for p in paths.values()]))
    assert bool(torch.isfinite(gone))
    at_view = float(paths["view"].errors[0])  # all of the view branch gone: rgb is its mean
    rgb = heads(NETWORK, INPUTS)["rgb"].var(dim=0, correction=0)
    assert at_view == pytest.approx(float((weights["rgb"] * rgb).sum()), rel=1e-6)


def test_moments_are_renamed_and_cells_must_match() -> None:
    batch = CalibrationBatch(INPUTS)
    means = collect(NETWORK, [batch], ("mean", "square"))
    renamed = means.only({"square": "power"}).subset()
    assert set(renamed.sums["trunk.0"]) == {"power"}
    assert torch.equal(
        renamed.average("trunk.0", "power"), means.subset().average("trunk.0", "square")
    )
    assert means.subset().only({"gram": "gram"}).sums == {}
    with pytest.raises(StatisticsError, match="the same calibration sets"):
        means.joined(type(means)({}))
