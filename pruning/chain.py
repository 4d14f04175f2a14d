"""The chain dynamic programme: widths of least total error within a budget.

    minimise  Σ_l ω_l e_l(m_l)   subject to   cost(m) ≤ B

With a multiplier λ on the cost, what is minimised,

    Σ_l [ω_l e_l(m_l) + λ u_l m_l] + Σ_(k→l) λ v m_k m_l,

couples only neighbours, so along a chain of layers (or any forest of them) a Viterbi pass over the
widths finds the minimum exactly:

    f_k→l(m_l) = min over m_k of [unary_k(m_k) + λ v m_k m_l + Σ_i f_i→k(m_k)]

λ is bisected to the budget. What no λ can reach (the budgets between two corners of the convex
hull) is filled up with the widenings that gain most per cost. All networks share one λ, so the
budget is spread over all of them at once.

Letters: m_l width of layer l (n_l when dense), e_l(m) its error at that width, ω_l how much that
counts, u, v the cost's coefficients (see `pruning.budget`), B the budget, λ the multiplier.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from pruning.budget import Cost, Node, Number
from pruning.errors import PruningError

Curves = Mapping[Node, np.ndarray]
"""ω_l e_l(m) for m = 0 … n_l (float64); infinite where a width is not allowed."""

BISECTIONS = 60


class Chain:
    """The programme for one set of layers.

    Args:
        curves: the weighted errors.
        cost: what the widths cost.

    Raises:
        PruningError: the layers read each other in a circle (two ways from one prunable layer to
            another), where a Viterbi pass would not be exact.
    """

    def __init__(self, curves: Curves, cost: Cost) -> None:
        self.curves = {node: np.asarray(curve, dtype=np.float64) for node, curve in curves.items()}
        self.cost = cost
        self._order = parents_last(cost)
        self._m = {node: np.arange(len(curve), dtype=np.float64) for node, curve in curves.items()}
        # v m_k m_l of each layer k and its parent l in the forest: rows m_l, columns m_k.
        self._joint = {
            child: v * self._m[parent][:, None] * self._m[child][None, :]
            for child, (parent, v) in self._order.items()
            if parent is not None
        }

    def error(self, m: Mapping[Node, int]) -> float:
        """Σ_l ω_l e_l(m_l)."""
        return float(sum(self.curves[node][width] for node, width in m.items()))

    def widths(self, multiplier: float) -> dict[Node, int]:
        """The minimum of error + λ·cost; among equals the smaller widths.

        Args:
            multiplier: λ ≥ 0.
        """
        unary = {
            node: curve + multiplier * self.cost.linear[node] * self._m[node]
            for node, curve in self.curves.items()
        }
        choice: dict[Node, np.ndarray] = {}
        m: dict[Node, int] = {}
        for child, (parent, _) in self._order.items():
            if parent is None:
                m[child] = int(unary[child].argmin())
            else:
                table = multiplier * self._joint[child]
                table += unary[child]
                choice[child] = table.argmin(axis=1)
                unary[parent] = unary[parent] + table[np.arange(len(table)), choice[child]]
        for child, (parent, _) in reversed(self._order.items()):
            if parent is not None:
                m[child] = int(choice[child][m[parent]])
        return {node: m[node] for node in self.curves}

    def within(self, amount: Number) -> dict[Node, int]:
        """The widths of least error that a multiplier finds within a budget, then filled up.

        Args:
            amount: B.

        Raises:
            BudgetError: one channel a layer costs more.
        """
        self.cost.check(amount)
        best = self.widths(0.0)
        if self.cost(best) <= amount:
            return best
        low, high = 0.0, self._first_multiplier()
        best = self.widths(high)
        while self.cost(best) > amount:
            low, high = high, 4 * high
            best = self.widths(high)
            if not np.isfinite(high):
                raise PruningError("the allowed widths do not fit the budget; allow smaller ones")
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5 if low > 0 else high / 16
            m = self.widths(middle)
            if self.cost(m) <= amount:
                high = middle
                best = min((best, m), key=self.error)
            else:
                low = middle
            if high <= low * (1 + 1e-12) or middle < 1e-300:
                break
        return self._filled(best, amount)

    def _first_multiplier(self) -> float:
        """Error per cost of the whole networks: a scale to start from."""
        worst = sum(float(c[np.isfinite(c)].max(initial=0.0)) for c in self.curves.values())
        return max(worst, 1e-12) / max(self.cost(self.cost.dense), 1e-12)

    def _filled(self, m: dict[Node, int], amount: Number) -> dict[Node, int]:
        """Spend what is left: again and again the widening that gains most error per cost."""
        m, near = dict(m), self.cost.neighbours()
        left = amount - self.cost(m)
        while True:
            best: tuple[float, Node, int] | None = None
            for node, curve in self.curves.items():
                each = self.cost.linear[node] + sum(v * m[other] for other, v in near[node].items())
                wider = np.arange(m[node] + 1, len(curve))
                wider = wider[(wider - m[node]) * each <= left]
                gains = (curve[m[node]] - curve[wider]) / np.maximum(
                    (wider - m[node]) * each, 1e-300
                )
                if len(gains) and gains.max() > 0 and (best is None or gains.max() > best[0]):
                    best = float(gains.max()), node, int(wider[gains.argmax()])
            if best is None:
                return m
            m[best[1]] = best[2]
            left = amount - self.cost(m)


def parents_last(cost: Cost) -> dict[Node, tuple[Node | None, float]]:
    """Each layer's parent in the forest of neighbours (None for a root) and v; children first."""
    near = cost.neighbours()
    order: dict[Node, tuple[Node | None, float]] = {}
    for root in cost.dense:
        if root in order:
            continue
        order[root] = (None, 0.0)
        waiting = [root]
        while waiting:
            node = waiting.pop()
            for other, v in near[node].items():
                if other == order[node][0]:
                    continue
                if other in order:
                    raise PruningError(
                        f"layers {node[1]!r} and {other[1]!r} of network {node[0]!r} depend on "
                        "each other in two ways, so they are no chain (nor a tree) of layers; mark "
                        "one as prunable=False or use the allocation 'greedy'"
                    )
                order[other] = (node, v)
                waiting.append(other)
    return _reversed(list(order.items()))


def _reversed(
    items: Sequence[tuple[Node, tuple[Node | None, float]]],
) -> dict[Node, tuple[Node | None, float]]:
    return dict(reversed(items))
