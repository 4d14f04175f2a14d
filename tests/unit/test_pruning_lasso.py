"""The LASSO of channel gates: its optimality conditions, and a slow solver beside it."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import CalibrationBatch, collect, prune, score
from pruning.lasso import corners, opening_penalties
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_inputs, random_network


def gram(n: int, samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, n, generator=generator, dtype=torch.float64).relu()
    V = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return (V.T @ V) * (x.T @ x) / samples


def coordinate_descent(Q: np.ndarray, penalty: float, sweeps: int = 5000) -> np.ndarray:
    """β, one coordinate after the other until nothing moves."""
    q, beta = Q.sum(axis=1), np.zeros(len(Q))
    for _ in range(sweeps):
        moved = 0.0
        for j in range(len(Q)):
            if Q[j, j] == 0:
                continue
            c = q[j] - Q[j] @ beta + Q[j, j] * beta[j]
            new = np.sign(c) * max(abs(c) - penalty, 0.0) / Q[j, j]
            moved, beta[j] = max(moved, abs(new - beta[j])), new
        if moved < 1e-13:
            break
    return beta


@given(n=st.integers(1, 9), samples=st.integers(2, 60), seed=st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_every_corner_is_optimal(n: int, samples: int, seed: int) -> None:
    Q = gram(n, samples, seed)
    scale = float(Q.sum(dim=1).abs().max()) + 1e-300
    penalties = []
    for corner in corners(Q):
        c = Q.sum(dim=1) - Q @ corner.gates
        assert float(c.abs().max()) <= corner.penalty + 1e-6 * scale
        on = corner.gates.abs() > 1e-9
        torch.testing.assert_close(
            c[on], corner.penalty * corner.gates[on].sign(), rtol=0, atol=1e-6 * scale
        )
        penalties.append(corner.penalty)
    assert penalties == sorted(penalties, reverse=True)


def test_the_path_is_that_of_coordinate_descent() -> None:
    Q = gram(8, 200, seed=1)
    path = list(corners(Q))
    for left, right in itertools.pairwise(path):
        for share in (0.25, 0.75):
            penalty = share * left.penalty + (1 - share) * right.penalty
            expected = coordinate_descent(Q.numpy(), penalty)
            found = share * left.gates + (1 - share) * right.gates  # linear between corners
            np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_independent_channels_open_in_the_order_of_their_power() -> None:
    power = torch.tensor([3.0, 0.0, 5.0, 1.0], dtype=torch.float64)
    assert opening_penalties(torch.diag(power)).tolist() == pytest.approx(power.tolist(), abs=1e-6)


def test_of_two_copies_one_is_enough() -> None:
    """Contributions a, a and b: the penalty is least with one gate for both copies."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.stack((x[:, 0], 1.5 * x[:, 0], x[:, 1]), dim=1)
    opened = opening_penalties(x.T @ x / 500)
    assert opened.argmin() == 0
    assert opened[0] < 1e-6 * opened[1]


def test_as_a_criterion_it_removes_what_opens_last() -> None:
    widths = {name: min(width, 12) for name, width in NERF_WIDTHS.items()}
    network = random_network(nerf_graph(), widths, seed=0)
    inputs = random_inputs(network, 300, seed=1)
    statistics = collect(network, [CalibrationBatch(inputs)], ("gram",)).subset()
    scores = score(network, "lasso", statistics)["trunk.3"]
    pruned = prune(network, [0.5] * 8, "lasso", statistics, compensation="least_squares")
    kept = pruned.keep["trunk.3"]
    assert scores[kept].min() >= scores[~kept].max()
    # Against the definition: at a penalty between the two, the open gates are those that stay.
    from pruning.scores import ScoredLayer, contributions

    Q = contributions(ScoredLayer(network, "trunk.3", statistics)).numpy()
    penalty = float(scores[kept].min() + scores[~kept].max()) / 2
    gates = coordinate_descent(Q, penalty)
    assert (abs(gates) > 1e-8).sum() == pytest.approx(int(kept.sum()), abs=1)
