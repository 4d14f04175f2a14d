import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning import (
    CalibrationBatch,
    PruningError,
    StatisticsError,
    collect,
    compensated_weights,
    elimination_path,
    elimination_paths,
    prune,
)
from tests.pruning_networks import (
    NERF_WIDTHS,
    draw_network,
    nerf_graph,
    random_inputs,
    random_network,
)


def samples(n: int, width: int, seed: int, rank: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(n, rank or width, generator=generator, dtype=torch.float64) @ mixing
    return x.relu() + 0.1


def gram_of(x: Tensor) -> Tensor:
    one = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    return one.T @ one / len(x)


def least_error(x: Tensor, W: Tensor, kept: list[int]) -> float:
    """E‖W x − (best linear map of the kept inputs and a constant)‖², on the samples themselves."""
    A = torch.cat((x[:, kept], torch.ones(len(x), 1, dtype=x.dtype)), dim=1).numpy()
    z = (x @ W.T).numpy()
    return float(((A @ np.linalg.lstsq(A, z, rcond=None)[0] - z) ** 2).sum() / len(x))


def test_the_path_is_that_of_brute_force_on_eight_channels() -> None:
    x, W = samples(200, 8, seed=0), samples(5, 8, seed=1) - 1
    path = elimination_path(gram_of(x), W, damping=1e-13)
    left = list(range(8))
    for step in range(8):
        errors = {j: least_error(x, W, [k for k in left if k != j]) for j in left}
        j = min(errors, key=errors.__getitem__)
        assert int(path.order[step]) == j
        left.remove(j)
        assert float(path.errors[len(left)]) == pytest.approx(errors[j], rel=1e-7)
    assert float(path.errors[8]) == 0


def test_greedy_is_never_better_than_the_best_subset_and_often_equal() -> None:
    x, W = samples(100, 6, seed=2), samples(4, 6, seed=3) - 1
    path = elimination_path(gram_of(x), W, damping=1e-13)
    for m in range(1, 7):
        best = min(least_error(x, W, list(kept)) for kept in itertools.combinations(range(6), m))
        assert float(path.errors[m]) >= best * (1 - 1e-9) - 1e-12
    assert float(path.errors[5]) == pytest.approx(
        min(least_error(x, W, [k for k in range(6) if k != j]) for j in range(6))
    )


def test_other_columns_stay_and_help() -> None:
    """Channels 2 … 5 of a reader that also reads two inputs that nobody removes."""
    x, W = samples(200, 6, seed=4), samples(3, 6, seed=5) - 1
    path = elimination_path(gram_of(x), W, channels=slice(2, 6), damping=1e-13)
    assert sorted(path.order.tolist()) == [0, 1, 2, 3]
    kept = [0, 1] + [2 + int(j) for j in path.order[2:]]
    assert float(path.errors[2]) == pytest.approx(least_error(x, W, kept), rel=1e-7)
    assert float(path.errors[0]) == pytest.approx(least_error(x, W, [0, 1]), rel=1e-7)


def test_compensated_weights_have_the_error_that_the_path_names() -> None:
    x, W = samples(300, 10, seed=6), samples(4, 10, seed=7) - 1
    V = torch.cat((W, torch.ones(4, 1, dtype=W.dtype)), dim=1)
    path = elimination_path(gram_of(x), W, damping=1e-13)
    for m in (1, 4, 9, 10):
        kept = path.keep(m)
        U = compensated_weights(gram_of(x), V, kept, damping=1e-13)
        one = torch.ones(300, 1, dtype=x.dtype)
        error = torch.cat((x[:, kept], one), 1) @ U.T - torch.cat((x, one), 1) @ V.T
        assert float(error.square().sum() / 300) == pytest.approx(float(path.errors[m]), abs=1e-8)


@given(
    n=st.integers(1, 12),
    width=st.integers(1, 10),
    rank=st.integers(1, 10),
    dead=st.sets(st.integers(0, 9)),
    constant=st.sets(st.integers(0, 9)),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=50)
def test_any_gram_matrix_gives_a_path(
    *, n: int, width: int, rank: int, dead: set[int], constant: set[int], seed: int
) -> None:
    """Fewer samples than channels, low rank, dead and constant channels."""
    x, W = samples(n, width, seed, rank), samples(3, width, seed + 1)
    for j in constant:
        x[:, j % width] = 0.5
    for j in dead:
        x[:, j % width] = 0
    path = elimination_path(gram_of(x), W)
    assert sorted(path.order.tolist()) == list(range(width))
    assert torch.isfinite(path.errors).all()
    assert (path.errors.diff() <= 0).all()
    assert all(int(path.keep(m).sum()) == m for m in range(1, width + 1))
    free = {j % width for j in dead | constant}
    energy = float(path.errors[0])
    assert float(path.errors[width - len(free)]) <= 1e-3 * max(energy, float(W.square().sum()))


def test_ties_go_in_order() -> None:
    path = elimination_path(torch.eye(5, dtype=torch.float64), torch.ones(2, 4))
    assert path.order.tolist() == [0, 1, 2, 3]


WIDTHS = {name: min(width, 9) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)
STATISTICS = collect(
    NETWORK, [CalibrationBatch(random_inputs(NETWORK, 200, seed=1))], ("gram",)
).subset()


def test_all_layers_at_once_equal_each_alone() -> None:
    other = random_network(nerf_graph(), {**WIDTHS, "trunk.3": 4}, seed=5)
    statistics = {
        "a": STATISTICS,
        "b": collect(
            other, [CalibrationBatch(random_inputs(other, 90, seed=2))], ("gram",)
        ).subset(),
    }
    together = elimination_paths({"a": NETWORK, "b": other}, statistics, balance="none")
    for name, network in (("a", NETWORK), ("b", other)):
        for layer in network.graph.prunable():
            readers = list(network.graph.readers(layer))
            W = torch.cat([network.weights[r.name] for r in readers])
            alone = elimination_path(
                statistics[name].average(readers[0].name, "gram"),
                W,
                network.input_slices(readers[0])[layer],
            )
            assert torch.equal(together[name][layer].order, alone.order)
            torch.testing.assert_close(together[name][layer].errors, alone.errors)


def test_relative_errors_run_from_one_to_zero() -> None:
    paths = elimination_paths({"": NETWORK}, {"": STATISTICS})[""]
    for layer, path in paths.items():
        limit = 1 if layer != "trunk.4" else 0.9  # its reader still has the point
        assert 0 < float(path.errors[0]) <= limit * (1 + 1e-2)
        assert float(path.errors[9]) == 0


def test_errors_can_be_relative_to_the_layer_s_own_part() -> None:
    own = elimination_paths({"": NETWORK}, {"": STATISTICS}, balance="layer")[""]
    assert all(float(path.errors[0]) == 1 for path in own.values())


def test_an_order_can_be_given() -> None:
    given = {"": {n: torch.arange(9.0).flip(0) for n in NETWORK.graph.prunable()}}
    paths = elimination_paths(
        {"": NETWORK}, {"": STATISTICS}, scores=given, balance="none", damping=1e-13
    )
    path = paths[""]["trunk.2"]
    assert path.order.tolist() == list(range(8, -1, -1))
    x = next(
        x
        for layer, x, _ in NETWORK.activations(random_inputs(NETWORK, 200, seed=1))
        if layer.name == "trunk.3"
    )
    for m in (2, 5, 8):
        error = least_error(x, NETWORK.weights["trunk.3"], list(range(m)))
        assert float(path.errors[m]) == pytest.approx(error, rel=1e-4, abs=1e-9)


def test_readers_can_count_alike() -> None:
    """The density head with its one output against the feature layer with nine."""
    alike = elimination_paths({"": NETWORK}, {"": STATISTICS}, balance="readers")[""]["trunk.7"]
    gram = STATISTICS.average("density", "gram")
    covariance = gram[:-1, :-1] - torch.outer(gram[:-1, -1], gram[:-1, -1])
    scaled = []
    for reader in ("density", "feature"):
        W = NETWORK.weights[reader]
        scaled.append(W / torch.trace(W @ covariance @ W.T).sqrt())
    expected = elimination_path(gram, torch.cat(scaled))
    assert torch.equal(alike.order, expected.order)
    torch.testing.assert_close(alike.errors, expected.errors / 2)


def test_outputs_can_count_differently() -> None:
    only = {"density": torch.ones(1), "feature": torch.zeros(9)}
    path = elimination_paths(
        {"": NETWORK}, {"": STATISTICS}, output_weights={"": only}, balance="none"
    )
    gram = STATISTICS.average("density", "gram")
    expected = elimination_path(gram, NETWORK.weights["density"])
    assert torch.equal(path[""]["trunk.7"].order, expected.order)
    with pytest.raises(PruningError, match="'density' must be 1 finite"):
        elimination_paths(
            {"": NETWORK}, {"": STATISTICS}, output_weights={"": {"density": -torch.ones(1)}}
        )


@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_any_graph_has_paths(data: st.DataObject) -> None:
    """Layers read by several others, with different companions."""
    network = draw_network(data, prunable=True)
    batch = CalibrationBatch(random_inputs(network, 20, seed=0))
    paths = elimination_paths({"": network}, {"": collect(network, [batch], ("gram",)).subset()})
    for name in network.graph.prunable():
        assert paths[""][name].width == network.width(name)
        assert torch.isfinite(paths[""][name].errors).all()


def test_pruning_by_obs_keeps_what_the_path_keeps() -> None:
    path = elimination_paths({"": NETWORK}, {"": STATISTICS})[""]["trunk.2"]
    pruned = prune(NETWORK, [4 / 9] * 8, "obs", STATISTICS, compensation="obs")
    assert torch.equal(pruned.keep["trunk.2"], path.keep(5))


def test_mistakes_are_named() -> None:
    path = elimination_path(torch.eye(4, dtype=torch.float64), torch.ones(2, 3))
    with pytest.raises(PruningError, match="cut to 1 … 3, not to 0"):
        path.keep(0)
    with pytest.raises(StatisticsError, match="no statistics of network 'fine'"):
        elimination_paths({"fine": NETWORK}, {"coarse": STATISTICS})
    with pytest.raises(PruningError, match="damping"):
        elimination_path(torch.eye(4, dtype=torch.float64), torch.ones(2, 3), damping=-1.0)
