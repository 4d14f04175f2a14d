import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import (
    Budget,
    CalibrationBatch,
    Chain,
    Cost,
    Layer,
    LayerGraph,
    Network,
    Path,
    Price,
    PruningError,
    Sizing,
    collect,
    compensate,
    cost_of,
    moments_for_budget,
    remove,
    shrink,
    widths_within,
)
from pruning.sizing import lamp_scores
from tests.pruning_networks import (
    NERF_WIDTHS,
    draw_network,
    heads,
    nerf_graph,
    random_inputs,
    random_network,
)

NERF = random_network(nerf_graph(branch=True), NERF_WIDTHS, seed=0, dtype=torch.float32)


def chain_of(widths: list[int], n_in: int = 3) -> Network:
    """Hidden layers in a row, the input joined again before the last of them, one head."""
    layers, previous = [], "x"
    for i in range(len(widths)):
        inputs = ("x", previous) if i == len(widths) - 1 and i > 0 else (previous,)
        layers.append(Layer(f"h{i}", inputs, relu=True, prunable=True))
        previous = f"h{i}"
    layers.append(Layer("head", (previous,), relu=False, prunable=False))
    graph = LayerGraph({"x": n_in}, tuple(layers))
    return random_network(graph, {**{f"h{i}": w for i, w in enumerate(widths)}, "head": 2}, seed=0)


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_costs_are_those_of_the_networks_that_are_left(data: st.DataObject) -> None:
    network = draw_network(data, prunable=True)
    widths = {n: data.draw(st.integers(1, network.width(n))) for n in network.graph.prunable()}
    keep = {n: torch.arange(network.width(n)) < w for n, w in widths.items()}
    smaller = remove(network, keep)
    cost = {
        unit: cost_of({"": network}, Budget.of(unit, 0), {"": widths})
        for unit in ("params", "bytes", "flops", "channels")
    }
    assert cost["params"] == smaller.parameters()
    assert cost["bytes"] == 4 * smaller.parameters()
    assert cost["flops"] == 2 * sum(W.numel() for W in smaller.weights.values())
    assert cost["channels"] == sum(widths.values())


def test_uses_multiply_a_network() -> None:
    budget = Budget.of("flops", 0, {"coarse": 64.0, "fine": 128.0})
    dense = {n: NERF.width(n) for n in NERF.graph.prunable()}
    cost = cost_of({"coarse": NERF, "fine": NERF}, budget, {"coarse": dense, "fine": dense})
    assert cost == 2 * sum(W.numel() for W in NERF.weights.values()) * 192


def exhaustive(chain: Chain, cost: Cost) -> list[tuple[float, float, dict[tuple[str, str], int]]]:
    """(error, cost, widths) of every allocation."""
    nodes = list(cost.dense)
    rows = []
    for m in itertools.product(*(range(1, cost.dense[n] + 1) for n in nodes)):
        widths = dict(zip(nodes, m, strict=True))
        rows.append((chain.error(widths), cost(widths), widths))
    return rows


@given(
    widths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    multiplier=st.floats(1e-6, 1.0),
)
@settings(deadline=None, max_examples=25)
def test_a_multiplier_s_minimum_is_that_of_exhaustive_search(
    widths: list[int], seed: int, multiplier: float
) -> None:
    chain, cost = random_chain(widths, seed)
    m = chain.widths(multiplier)
    least = min(error + multiplier * price for error, price, _ in exhaustive(chain, cost))
    assert chain.error(m) + multiplier * cost(m) == pytest.approx(least, rel=1e-12)


@given(
    widths=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    part=st.floats(0, 1),
)
@settings(deadline=None, max_examples=25)
def test_within_a_budget_no_allocation_below_the_hull_is_missed(
    widths: list[int], seed: int, part: float
) -> None:
    """Feasible, maximal, and never below what Lagrange's bound allows."""
    chain, cost = random_chain(widths, seed)
    rows = exhaustive(chain, cost)
    least, dense = min(p for _, p, _ in rows), max(p for _, p, _ in rows)
    amount = least + part * (dense - least)
    m = chain.within(amount)
    assert cost(m) <= amount
    # Lagrange's bound: no allocation within the budget can be better than the hull there.
    hull = max(
        min(error + lam * price for error, price, _ in rows) - lam * amount
        for lam in np.geomspace(1e-7, 10, 400)
    )
    best = min(error for error, price, _ in rows if price <= amount)
    assert hull <= best + 1e-9
    assert chain.error(m) >= best - 1e-12
    # Nothing more fits that would help.
    for node in cost.dense:
        if m[node] < cost.dense[node]:
            wider = {**m, node: m[node] + 1}
            assert cost(wider) > amount or chain.error(wider) >= chain.error(m)


def test_at_the_corners_of_the_hull_the_budget_s_optimum_is_found() -> None:
    chain, cost = random_chain([5, 6, 4, 5], seed=3)
    rows = exhaustive(chain, cost)
    for lam in (1e-3, 3e-3, 1e-2, 3e-2):
        amount = cost(chain.widths(lam))
        best = min(error for error, price, _ in rows if price <= amount)
        assert chain.error(chain.within(amount)) == pytest.approx(best, rel=1e-12)


def random_chain(widths: list[int], seed: int) -> tuple[Chain, Cost]:
    network = chain_of(widths)
    generator = np.random.default_rng(seed)
    curves = {}
    for name in network.graph.prunable():
        drops = generator.exponential(size=network.width(name))
        curve = np.concatenate(([0.0], np.cumsum(drops)))[::-1]
        curves["", name] = np.where(np.arange(len(curve)) > 0, curve, np.inf)
    cost = Cost.of({"": network}, Budget(0))
    return Chain(curves, cost), cost


def test_two_networks_share_the_budget_by_their_error_weights() -> None:
    networks = {"coarse": chain_of([8, 8]), "fine": chain_of([8, 8])}
    errors = torch.linspace(1, 0, 9, dtype=torch.float64).square()
    paths = {
        name: {layer: Path(torch.arange(8), errors) for layer in ("h0", "h1")} for name in networks
    }
    sizing = Sizing(networks, Budget(180), paths=paths)
    alike = widths_within("chain", sizing)
    skewed = widths_within("chain", replace(sizing, error_weights={"coarse": 0.1}))
    assert sum(skewed["coarse"].values()) < sum(alike["coarse"].values())
    assert sum(skewed["fine"].values()) > sum(alike["fine"].values())


def test_branches_and_trees_are_exact_too() -> None:
    """h0 is read by two prunable layers."""
    graph = LayerGraph(
        {"x": 2},
        (
            Layer("h0", ("x",), relu=True, prunable=True),
            Layer("left", ("h0",), relu=True, prunable=True),
            Layer("right", ("h0", "x"), relu=True, prunable=True),
            Layer("head", ("left", "right"), relu=False, prunable=False),
        ),
    )
    network = random_network(graph, {"h0": 5, "left": 4, "right": 6, "head": 1}, seed=0)
    cost = Cost.of({"": network}, Budget(0))
    generator = np.random.default_rng(0)
    curves = {
        node: np.concatenate(([np.inf], np.sort(generator.random(n))[::-1]))
        for node, n in cost.dense.items()
    }
    chain = Chain(curves, cost)
    for lam in (1e-3, 1e-2, 1e-1):
        m = chain.widths(lam)
        least = min(error + lam * price for error, price, _ in exhaustive(chain, cost))
        assert chain.error(m) + lam * cost(m) == pytest.approx(least)


def test_circles_are_refused_and_greedy_takes_them() -> None:
    graph = LayerGraph(
        {"x": 2},
        (
            Layer("h0", ("x",), relu=True, prunable=True),
            Layer("h1", ("h0",), relu=True, prunable=True),
            Layer("h2", ("h0", "h1"), relu=True, prunable=True),
            Layer("head", ("h2",), relu=False, prunable=False),
        ),
    )
    network = random_network(graph, {"h0": 5, "h1": 4, "h2": 6, "head": 1}, seed=0)
    paths = {
        "": {
            layer: Path(
                torch.arange(network.width(layer)),
                torch.linspace(1, 0, network.width(layer) + 1, dtype=torch.float64),
            )
            for layer in ("h0", "h1", "h2")
        }
    }
    sizing = Sizing({"": network}, Budget(60), paths=paths)
    with pytest.raises(PruningError, match="no chain"):
        widths_within("chain", sizing)
    assert cost_of({"": network}, Budget(60), widths_within("greedy", sizing)) <= 60


def test_widths_can_be_multiples() -> None:
    paths = {
        "": {
            n: Path(
                torch.arange(NERF.width(n)),
                torch.linspace(1, 0, NERF.width(n) + 1, dtype=torch.float64),
            )
            for n in NERF.graph.prunable()
        }
    }
    for allocation in ("chain", "greedy"):
        widths = widths_within(
            allocation, Sizing({"": NERF}, Budget(200_000), paths=paths, multiple=16)
        )[""]
        assert all(w % 16 == 0 for w in widths.values())
    with pytest.raises(PruningError, match="multiple must be"):
        widths_within("chain", Sizing({"": NERF}, Budget(200_000), paths=paths, multiple=0))


def test_lamp_by_hand() -> None:
    scores = np.array([1.0, 2.0, 3.0, 2.0, 0.0])
    assert lamp_scores(scores).tolist() == [1 / 18, 4 / 17, 1.0, 4 / 17, 0.0]


def test_aap_by_hand() -> None:
    """Of 27 weights h0 has 9 and h1, where the input joins again, 18: shares ⅓ and ⅔."""
    networks = {"": chain_of([3, 3])}
    scores = {"": {"h0": torch.tensor([4.0, 1.0, 5.0]), "h1": torch.tensor([4.0, 3.0, 9.0])}}
    # s²/share: 48 3 75 and 24 13.5 121.5
    for channels, expected in ((5, (2, 3)), (4, (2, 2)), (3, (2, 1)), (2, (1, 1))):
        sizing = Sizing(networks, Budget.of("channels", channels), scores)
        assert tuple(widths_within("aap", sizing)[""].values()) == expected


def test_global_ranking_by_hand() -> None:
    networks = {"": chain_of([3, 3])}
    scores = {"": {"h0": torch.tensor([9.0, 1.0, 5.0]), "h1": torch.tensor([2.0, 3.0, 4.0])}}
    by_channels = Sizing(networks, Budget.of("channels", 3), scores)
    assert widths_within("global", by_channels) == {"": {"h0": 2, "h1": 1}}


def test_the_original_nerf_is_allocated_in_under_a_second() -> None:
    """Two networks, the view branch included; a wide margin for a busy machine."""
    generator = np.random.default_rng(0)
    networks = {"coarse": NERF, "fine": NERF}
    paths = {
        name: {
            layer: Path(
                torch.arange(n.width(layer)),
                torch.from_numpy(
                    np.concatenate((np.sort(generator.random(n.width(layer)))[::-1], [0.0]))
                ),
            )
            for layer in n.graph.prunable()
        }
        for name, n in networks.items()
    }
    sizing = Sizing(networks, Budget.of("params", 300_000), paths=paths)
    started = time.perf_counter()
    widths = widths_within("chain", sizing)
    assert time.perf_counter() - started < 5
    cost = cost_of(networks, sizing.budget, widths)
    assert 299_000 < cost <= 300_000


SMALL = {name: min(width, 16) for name, width in NERF_WIDTHS.items()}
NETWORKS = {
    name: random_network(nerf_graph(branch=True), SMALL, seed=i)
    for i, name in enumerate(("coarse", "fine"))
}
INPUTS = random_inputs(NETWORKS["fine"], 300, seed=5)
STATISTICS = {
    name: collect(n, [CalibrationBatch(INPUTS)], ("gram", "square", "mean")).subset()
    for name, n in NETWORKS.items()
}


def head_error(networks: dict[str, Network]) -> float:
    total = 0.0
    for name, network in networks.items():
        dense, small = heads(NETWORKS[name], INPUTS), heads(network, INPUTS)
        total += sum(float((small[h] - dense[h]).square().mean() / dense[h].var()) for h in dense)
    return total


def test_shrink_tells_the_story() -> None:
    budget = Budget.of("params", 3500)
    statistics = {
        name: collect(n, [CalibrationBatch(INPUTS)], moments_for_budget()).subset()
        for name, n in NETWORKS.items()
    }
    pruned = shrink(NETWORKS, statistics, budget, error_weights={"coarse": 0.1})
    assert sum(p.network.parameters() for p in pruned.values()) <= 3500
    assert sum(p.network.parameters() for p in pruned.values()) > 3300
    assert pruned["coarse"].network.parameters() < pruned["fine"].network.parameters()
    for name, p in pruned.items():
        again = compensate(NETWORKS[name], p.keep, "obs", statistics[name])
        assert all(torch.equal(again.weights[n], W) for n, W in p.network.weights.items())


def test_the_default_beats_every_part_of_it_taken_away() -> None:
    budget = Budget.of("params", 3500)

    def error(**names: str) -> float:
        pruned = shrink(NETWORKS, STATISTICS, budget, seed=0, **names)  # type: ignore[arg-type]
        return head_error({n: p.network for n, p in pruned.items()})

    default = error()
    assert default < error(allocation="uniform")
    assert default < error(compensation="none")
    assert default < error(criterion="random")


@pytest.mark.parametrize("criterion", ["wanda", "random", "obs", "thinet"])
@pytest.mark.parametrize("allocation", ["chain", "global", "uniform"])
def test_any_criterion_goes_with_any_allocation(criterion: str, allocation: str) -> None:
    pruned = shrink(
        NETWORKS,
        STATISTICS,
        Budget.of("params", 3500),
        criterion=criterion,
        allocation=allocation,
        compensation="least_squares",
        seed=0,
    )
    assert sum(p.network.parameters() for p in pruned.values()) <= 3500


def test_moments_that_a_budget_needs() -> None:
    assert moments_for_budget() == ("gram",)
    assert moments_for_budget("wanda", "uniform", "mean_fold") == ("mean", "square")
    assert moments_for_budget("magnitude", "chain", "none") == ("gram",)


def test_a_price_of_ones_own() -> None:
    budget = Budget(0, Price(weight=0.5, output=4))
    network = chain_of([3])
    assert cost_of({"": network}, budget, {"": {"h0": 2}}) == 0.5 * (3 * 2 + 2 * 2) + 4 * 4
