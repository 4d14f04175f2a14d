"""Budgeted allocations: how wide each layer of each network may stay.

An allocation is one pure function from a `Sizing` to widths that keep to its budget. A new one is
one function and one line in `BUDGETED`. The allocations of `pruning.allocation` (uniform and the
ramps) are here too, with their ratio bisected to the budget.

Letters: m_l width of layer l, n_l its dense width, e_l(m) its error at width m, p a ratio, s_j a
channel's score.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pruning.allocation import ALLOCATIONS
from pruning.budget import Budget, Cost, Node, Widths
from pruning.chain import Chain
from pruning.elimination import Path
from pruning.errors import PruningError
from pruning.network import Network
from pruning.registry import lookup
from pruning.selection import removed_count

ROUNDS = 4
"""Of an iterative allocation."""


@dataclass(frozen=True)
class Sizing:
    """Networks, a budget for all of them, and what an allocation may look at.

    Attributes:
        networks: the dense networks, by name.
        budget: what they may cost together.
        scores: by network and layer, one a channel, comparable between layers.
        paths: by network and layer, the error at every width.
        error_weights: ω, how much the errors of a network count; 1 where one is left out.
        multiple: widths are multiples of this (or the dense width), in the allocations that search
            over widths.
    """

    networks: Mapping[str, Network]
    budget: Budget
    scores: Mapping[str, Mapping[str, Tensor]] | None = None
    paths: Mapping[str, Mapping[str, Path]] | None = None
    error_weights: Mapping[str, float] = field(default_factory=dict)
    multiple: int = 1

    def cost(self) -> Cost:
        """The cost of any widths at the budget's prices."""
        return Cost.of(self.networks, self.budget)

    def score_of(self, node: Node) -> Float[np.ndarray, " channels"]:
        """s_j of one layer.

        Raises:
            PruningError: there are no scores of it.
        """
        if self.scores is None or node[1] not in self.scores.get(node[0], {}):
            raise PruningError(f"this allocation ranks channels, and layer {node} has no scores")
        return self.scores[node[0]][node[1]].double().cpu().numpy()

    def curves(self) -> dict[Node, Float[np.ndarray, " widths"]]:
        """ω e_l(m) for m = 0 … n_l; infinite at 0 and at widths that are not allowed.

        Raises:
            PruningError: there are no elimination paths.
        """
        curves = {}
        for name, layer in self.cost().dense:
            if self.paths is None or layer not in self.paths.get(name, {}):
                raise PruningError(
                    f"this allocation weighs errors, and layer {(name, layer)} has no elimination "
                    "path; give the paths of all networks"
                )
            errors = self.error_weights.get(name, 1.0) * self.paths[name][layer].errors.numpy()
            m = np.arange(len(errors))
            allowed = (m > 0) & ((m % self.multiple == 0) | (m == len(errors) - 1))
            curves[name, layer] = np.where(allowed, errors, np.inf)
        return curves


def chain(sizing: Sizing) -> Widths:
    """Least Σ ω e_l(m_l) within the budget, by Viterbi along the chain of layers.

    Source: Everett 1963 for the multiplier, Viterbi 1967 for the chain. See `pruning.chain`.
    """
    return _nested(Chain(sizing.curves(), sizing.cost()).within(sizing.budget.amount))


def greedy(sizing: Sizing) -> Widths:
    """From dense, again and again the channel whose removal adds least error per cost saved."""
    cost, curves, amount = sizing.cost(), sizing.curves(), sizing.budget.amount
    cost.check(amount)
    near, m = cost.neighbours(), dict(cost.dense)
    narrower = {
        node: [int(w) for w in np.flatnonzero(np.isfinite(curve))][::-1][1:]
        for node, curve in curves.items()
    }
    total = cost(m)
    while total > amount:
        best: tuple[float, Node] | None = None
        for node, steps in narrower.items():
            if steps:
                each = cost.linear[node] + sum(v * m[other] for other, v in near[node].items())
                saved = each * (m[node] - steps[0])
                added = curves[node][steps[0]] - curves[node][m[node]]
                if best is None or added / max(saved, 1e-300) < best[0]:
                    best = added / max(saved, 1e-300), node
        if best is None:
            raise PruningError("the allowed widths do not fit the budget; allow smaller ones")
        m[best[1]] = narrower[best[1]].pop(0)
        total = cost(m)
    return _nested(m)


def global_ranking(sizing: Sizing) -> Widths:
    """The lowest scores of all layers go first, until the budget is kept; one channel stays."""
    return _ranked(sizing, {node: sizing.score_of(node) for node in sizing.cost().dense})


def lamp(sizing: Sizing) -> Widths:
    """A global ranking of s_j² / Σ_{k: s_k ≥ s_j} s_k², which makes layers comparable.

    The best channel of each layer scores 1, so it goes last of all.

    Source: Lee et al. 2021 (LAMP), equation 3, with channel scores in place of weights.
    """
    return _ranked(
        sizing, {node: lamp_scores(sizing.score_of(node)) for node in sizing.cost().dense}
    )


def lamp_scores(scores: Float[np.ndarray, " channels"]) -> Float[np.ndarray, " channels"]:
    """s_j² / Σ_{k: s_k ≥ s_j} s_k² of one layer; 0 where s_j is 0. Ties share the whole sum."""
    squares = scores.astype(np.float64) ** 2
    whole = np.array([squares[scores >= s].sum() for s in scores])
    return np.divide(squares, whole, out=np.zeros_like(squares), where=whole > 0)


def owl(sizing: Sizing, threshold: float = 5.0, spread: float = 0.08) -> Widths:
    """Layers with more outliers keep more: ratios within p ± 0.08, p bisected to the budget.

    D_l is the fraction of a layer's scores above 5 times their mean; the fraction kept is
    1 − p + (D_l scaled to [0, 0.16], minus the layers' mean of it).

    Source: Yin et al. 2023 (OWL), section 3.3, with channel scores.
    """
    nodes = list(sizing.cost().dense)
    outliers = []
    for node in nodes:
        s = sizing.score_of(node)
        outliers.append(float((s > threshold * s.mean()).mean()))
    D = np.array(outliers)
    span = float(np.ptp(D))
    shift = 2 * spread * (D - D.min()) / span if span > 0 else np.zeros_like(D)
    shift = shift - shift.mean()

    def widths(p: float) -> dict[Node, int]:
        ratios = np.clip(p - shift, 0, math.nextafter(1, 0))
        return {
            node: _kept(float(r), sizing.cost().dense[node])
            for node, r in zip(nodes, ratios, strict=True)
        }

    return _bisected(sizing, widths)


def pfp(sizing: Sizing) -> Widths:
    """m_l(ε) = ⌈3 (6 + 2ε) S_l / ε²⌉ (at most n_l), S_l = Σ_j s_j, ε bisected to the budget.

    Source: Liebenwein et al. 2020 (PFP), section 4.2, with the constants of their theorem left out.
    """
    totals = {node: float(sizing.score_of(node).sum()) for node in sizing.cost().dense}

    def widths(t: float) -> dict[Node, int]:
        # t in [0, 1) runs over ε in [2⁻²⁰, 2²⁰): the larger ε, the narrower.
        eps = 2.0 ** (40 * t - 20)
        return {
            node: max(1, min(n, math.ceil(3 * (6 + 2 * eps) * totals[node] / eps**2)))
            for node, n in sizing.cost().dense.items()
        }

    return _bisected(sizing, widths)


def aap(sizing: Sizing, power: float = 2.0) -> Widths:
    """Channels with s_j^p ≤ T · (the layer's share of all parameters) go, T bisected to the budget.

    One round of the iterative method, to be given mean activations as scores. ``aap-iterative``
    goes in several, with activations measured anew on what is left. The paper retrains in each
    round and then rewinds the weights; without training they are where they were anyway.

    Source: Zhao et al. 2023 (adaptive activation-based pruning), sections 3.1 and 3.2.
    """
    cost = sizing.cost()
    powers = {node: np.abs(sizing.score_of(node)) ** power for node in cost.dense}
    counts = {
        (name, layer): network.weights[layer].numel()
        for name, network in sizing.networks.items()
        for layer in network.graph.prunable()
    }
    share = {node: count / sum(counts.values()) for node, count in counts.items()}
    highest = max(float(s.max(initial=0.0)) / share[node] for node, s in powers.items())

    def widths(t: float) -> dict[Node, int]:
        # t in [0, 1) runs over T from 0 to just under what removes all, finely near 0.
        T = highest * (2.0 ** (40 * t) - 1) / 2.0**40 * (1 + 1e-9)
        return {
            node: max(1, int((s > T * share[node]).sum()) if T else len(s))
            for node, s in powers.items()
        }

    return _bisected(sizing, widths)


def by_ratio(sizing: Sizing, allocation: str) -> Widths:
    """An allocation of ratios (uniform, a ramp), the same in each network, p bisected."""
    function = lookup(ALLOCATIONS, allocation, "allocation")

    def widths(p: float) -> dict[Node, int]:
        m = {}
        for name, network in sizing.networks.items():
            layers = network.graph.prunable()
            for layer, ratio in zip(layers, function(p, len(layers)), strict=True):
                m[name, layer] = _kept(ratio, network.width(layer))
        return m

    return _bisected(sizing, widths)


@dataclass(frozen=True)
class Budgeted:
    """A registered budgeted allocation and what it looks at.

    Attributes:
        of: widths for a sizing.
        needs_scores: whether it ranks channels.
        needs_paths: whether it weighs the errors of elimination paths.
        only_with: the criteria on whose scores it is defined; None for any.
        rounds: in how many steps `pipeline.shrink` goes to the budget, with scores of what is left
            before each.
    """

    of: Callable[[Sizing], Widths]
    needs_scores: bool = False
    needs_paths: bool = False
    only_with: tuple[str, ...] | None = None
    rounds: int = 1


BUDGETED: dict[str, Budgeted] = {
    "aap": Budgeted(aap, needs_scores=True, only_with=("activation",)),
    "aap-iterative": Budgeted(aap, needs_scores=True, only_with=("activation",), rounds=ROUNDS),
    "chain": Budgeted(chain, needs_paths=True),
    "global": Budgeted(global_ranking, needs_scores=True),
    "greedy": Budgeted(greedy, needs_paths=True),
    "lamp": Budgeted(lamp, needs_scores=True),
    "owl": Budgeted(owl, needs_scores=True),
    "pfp": Budgeted(pfp, needs_scores=True, only_with=("sensitivity",)),
    **{name: Budgeted(partial(by_ratio, allocation=name)) for name in ALLOCATIONS},
}
"""The budgeted allocations by the name that a sweep file uses."""


def widths_within(allocation: str, sizing: Sizing) -> Widths:
    """Widths that keep to a budget.

    Args:
        allocation: a name in `BUDGETED`.
        sizing: the networks, the budget, and what the allocation looks at.

    Raises:
        BudgetError: one channel a layer costs more than the budget.
        PruningError: no such allocation, or scores or paths are missing.
    """
    chosen = lookup(BUDGETED, allocation, "budgeted allocation")
    if not isinstance(sizing.multiple, int) or sizing.multiple < 1:
        raise PruningError(f"multiple must be a whole number from 1 up, got {sizing.multiple!r}")
    sizing.cost().check(sizing.budget.amount)
    return chosen.of(sizing)


def cost_of(networks: Mapping[str, Network], budget: Budget, widths: Widths) -> float:
    """What networks of these widths cost at a budget's prices."""
    m = {(name, layer): w for name, layers in widths.items() for layer, w in layers.items()}
    return Cost.of(networks, budget)(m)


def _kept(ratio: float, width: int) -> int:
    return width - removed_count(ratio, width)


def _nested(m: Mapping[Node, int]) -> Widths:
    widths: Widths = {}
    for (name, layer), width in m.items():
        widths.setdefault(name, {})[layer] = int(width)
    return widths


def _ranked(sizing: Sizing, scores: Mapping[Node, np.ndarray]) -> Widths:
    """Remove channels in the order of their scores (ties: earlier layers first)."""
    cost = sizing.cost()
    near, m = cost.neighbours(), dict(cost.dense)
    for node, s in scores.items():
        if len(s) != m[node]:
            raise PruningError(f"layer {node} has {m[node]} channels and {len(s)} scores")
    queue = sorted(
        (float(s), i) for i, values in enumerate(scores.values()) for s in np.sort(values)
    )
    nodes, total = list(scores), cost(m)
    for _, i in queue:
        if total <= sizing.budget.amount:
            break
        node = nodes[i]
        if m[node] > 1:
            total -= cost.linear[node] + sum(v * m[other] for other, v in near[node].items())
            m[node] -= 1
    while cost(m) > sizing.budget.amount:  # rounding of the running total
        widest = max(m, key=m.__getitem__)
        m[widest] -= 1
    return _nested(m)


def _bisected(sizing: Sizing, widths: Callable[[float], dict[Node, int]]) -> Widths:
    """The widest widths(t) within the budget, t in [0, 1); they must not grow with t."""
    cost, amount = sizing.cost(), sizing.budget.amount
    if cost(widths(0.0)) <= amount:
        return _nested(widths(0.0))
    low, high = 0.0, math.nextafter(1, 0)
    if cost(widths(high)) > amount:
        raise PruningError(
            "this allocation cannot be narrowed to the budget; allow more or use 'chain'"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(widths(middle)) <= amount else (middle, high)
    return _nested(widths(high))


def top(scores: Float[Tensor, " channels"], width: int) -> Tensor:
    """The keep mask of the `width` highest scores; among equals the lowest index goes first."""
    if not 1 <= width <= len(scores):
        raise PruningError(f"of {len(scores)} channels 1 … {len(scores)} can stay, not {width}")
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[torch.argsort(scores, stable=True)[: len(scores) - width]] = False
    return keep
