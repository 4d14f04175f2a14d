"""What every registered budgeted allocation promises."""

import inspect
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import (
    BUDGETED,
    PRICES,
    Budget,
    BudgetError,
    CalibrationBatch,
    PruningError,
    Sizing,
    collect,
    cost_of,
    elimination_paths,
    score,
    widths_within,
)
from tests.pruning_networks import NERF_WIDTHS, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 14) for name, width in NERF_WIDTHS.items()}
NETWORKS = {
    "coarse": random_network(nerf_graph(), WIDTHS, seed=0),
    "fine": random_network(nerf_graph(branch=True), WIDTHS, seed=1),
}
STATISTICS = {
    name: collect(n, [CalibrationBatch(random_inputs(n, 60, 2))], ("gram", "square")).subset()
    for name, n in NETWORKS.items()
}
SCORES = {name: score(n, "wanda", STATISTICS[name]) for name, n in NETWORKS.items()}
PATHS = elimination_paths(NETWORKS, STATISTICS)
DENSE = {
    name: {layer: n.width(layer) for layer in n.graph.prunable()} for name, n in NETWORKS.items()
}
NAMES = sorted(BUDGETED)
# Tied to a shape, these cannot narrow every layer to one channel; they say so.
CANNOT_REACH_ALL = {"aap", "aap-iterative", "back-loaded", "front-loaded", "owl"}


@pytest.mark.parametrize("name", NAMES)
@given(unit=st.sampled_from(sorted(PRICES)), part=st.floats(0.0, 1.2))
@settings(deadline=None, max_examples=8)
def test_the_budget_is_kept_and_a_channel_stays(name: str, unit: str, part: float) -> None:
    budget = Budget.of(unit, 0, {"coarse": 64, "fine": 128})
    least = cost_of(NETWORKS, budget, {n: dict.fromkeys(w, 1) for n, w in DENSE.items()})
    dense = cost_of(NETWORKS, budget, DENSE)
    budget = Budget(least + part * (dense - least), budget.price, budget.uses)
    sizing = Sizing(NETWORKS, budget, SCORES, PATHS)
    if name in CANNOT_REACH_ALL and part < 0.5:
        with suppress(PruningError):
            widths_within(name, sizing)
        return
    widths = widths_within(name, sizing)
    assert cost_of(NETWORKS, budget, widths) <= budget.amount * (1 + 1e-12)
    for network, layers in widths.items():
        assert layers.keys() == DENSE[network].keys()
        assert all(1 <= w <= DENSE[network][layer] for layer, w in layers.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_budget_removes_nothing_that_matters(name: str) -> None:
    budget = Budget.of("params", cost_of(NETWORKS, Budget(0), DENSE))
    widths = widths_within(name, Sizing(NETWORKS, budget, SCORES, PATHS))
    assert cost_of(NETWORKS, budget, widths) <= budget.amount
    for network, layers in widths.items():
        if name in ("owl", "pfp"):
            continue  # their ratios spread around p
        for layer, w in layers.items():
            assert float(PATHS[network][layer].errors[w]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_below_one_channel_a_layer_is_refused(name: str) -> None:
    for amount in (10, float("nan")):
        with pytest.raises(BudgetError, match="with one channel a layer"):
            widths_within(name, Sizing(NETWORKS, Budget(amount), SCORES, PATHS))


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_it_needs(name: str) -> None:
    assert inspect.getdoc(BUDGETED[name].of)
    budget = Budget.of("params", 3000)
    if BUDGETED[name].needs_scores:
        with pytest.raises(PruningError, match="has no scores"):
            widths_within(name, Sizing(NETWORKS, budget))
    elif BUDGETED[name].needs_paths:
        with pytest.raises(PruningError, match="no elimination path"):
            widths_within(name, Sizing(NETWORKS, budget))
    else:
        widths_within(name, Sizing(NETWORKS, budget))


def test_flat_scores_are_ranked() -> None:
    flat = {n: {layer: torch.ones(w) for layer, w in of.items()} for n, of in DENSE.items()}
    for name in ("global", "lamp", "owl"):
        budget = Budget.of("channels", 150)
        widths = widths_within(name, Sizing(NETWORKS, budget, flat))
        assert cost_of(NETWORKS, budget, widths) <= 150
