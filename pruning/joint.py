"""Widths and bits together: the least predicted error that fits a number of bytes.

    minimise  Σ_l ω e_l(m_l) + Σ_l ω q_l(b_l)
    subject to  Σ_l [r_l(b_l) (f_l + m_k) m_l + o_l(b_l) m_l] ≤ B

A layer's weights are a matrix of its own width m_l times what it reads (the width m_k of a prunable
layer k and f_l features that always stay), so b_l only touches two neighbours. With a multiplier λ
on the bytes, the best b_l for given widths is a minimum over a handful of choices,

    g_l(m_k, m_l) = min over b of [ω q_l(b) + λ (r_l(b) (f_l + m_k) + o_l(b)) m_l]

and what is left is the chain of `pruning.chain`, solved by the same Viterbi pass; λ is bisected.

Letters: m_l width of layer l, e_l(m) its error at that width, b a choice of bits, q_l(b) the error
that rounding to b makes in what layer l computes, r_l(b) bytes a weight, o_l(b) bytes an output,
ω how much the errors of a network count, B the budget, λ the multiplier.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from pruning.budget import Cost, Node, Number, Widths
from pruning.calibration import Statistics
from pruning.chain import parents_last
from pruning.elimination import OutputWeights
from pruning.errors import BudgetError, PruningError
from pruning.network import Layer, Network
from pruning.quantization import entropy, price_of, quantize
from pruning.solving import input_gram

BISECTIONS = 40

STEPS = (1, 2, 4, 8, 16, 32)
"""Channels by which a layer is widened to use what is left of a budget."""


@dataclass(frozen=True)
class Choice:
    """One way to store a layer.

    Attributes:
        scheme: a name in `quantization.SCHEMES`.
        weight: r, bytes a weight, as an ideal coder would take them.
        output: o, bytes an output: its bias and scales.
        error: q, in the unit of the layer's other errors.
    """

    scheme: str
    weight: float
    output: float
    error: float


Choices = Mapping[str, Sequence[Choice]]
"""By layer, prunable or not."""


def choices(
    network: Network,
    statistics: Statistics,
    schemes: Sequence[str],
    output_weights: OutputWeights | None = None,
    scale: float = 1.0,
) -> Choices:
    """What each scheme takes and what it costs, measured on the dense layers.

    Args:
        network: the dense network.
        statistics: of it, with the moment "gram".
        schemes: names in `quantization.SCHEMES`, of uniform grids or codebooks.
        output_weights: s_r, how much each output of a layer counts: errors are Σ_r s_r E[δz_r²].
            Without, they are relative to the variance of what the layer computes.
        scale: how much errors of rounding count beside those of removed channels.

    Raises:
        PruningError: a scheme does not exist or stores floats.
        StatisticsError: statistics are missing or of another network.
    """
    found: dict[str, list[Choice]] = {layer.name: [] for layer in network.graph.layers}
    for scheme in schemes:
        quantized = quantize(network, scheme, statistics)
        stored = quantized.network(torch.float64)
        for layer in network.graph.layers:
            if layer.name not in quantized.codes:
                raise PruningError(f"scheme {scheme!r} stores floats; there is nothing to choose")
            gram = input_gram(network, layer, statistics).cpu()
            W = network.weights[layer.name].detach().cpu().double()
            covariance = gram[:-1, :-1] - torch.outer(gram[:-1, -1], gram[:-1, -1])
            lost = W - stored.weights[layer.name]
            s = (output_weights or {}).get(layer.name, torch.ones(len(W))).cpu().double()
            error = float(((lost @ covariance) * lost).sum(dim=1).clamp(min=0) @ s)
            if output_weights is None:
                energy = float(((W @ covariance) * W).sum())
                error = error / energy if energy > 0 else error
            found[layer.name].append(
                Choice(
                    scheme,
                    entropy(quantized.codes[layer.name]) / 8,
                    float(price_of(scheme).output),
                    scale * error,
                )
            )
    return found


@dataclass(frozen=True)
class _Reading:
    """One layer: its choices, its fixed inputs, and the nodes (if prunable) at its two sides."""

    node: Node
    choices: Sequence[Choice]
    fixed: int
    source: Node | None
    out: int | None
    omega: float

    def cheapest(
        self, multiplier: float, inputs: Float[np.ndarray, "..."], outputs: Float[np.ndarray, "..."]
    ) -> Float[np.ndarray, "..."]:
        """g: the least of error + λ·bytes over the choices, for f + m_k inputs and m_l outputs."""
        costs = [
            self.omega * c.error + multiplier * (c.weight * inputs + c.output) * outputs
            for c in self.choices
        ]
        return np.asarray(np.minimum.reduce(costs))

    def chosen(self, multiplier: float, inputs: int, outputs: int) -> Choice:
        """The choice behind it."""
        return min(
            self.choices,
            key=lambda c: (
                self.omega * c.error + multiplier * (c.weight * inputs + c.output) * outputs
            ),
        )


class Joint:
    """The programme for some networks.

    Args:
        networks: the dense networks, by name.
        curves: ω e_l(m) for m = 0 … n_l, infinite where a width is not allowed (`Sizing.curves`).
        options: by network, what each layer may be stored as.
        error_weights: ω by network; 1 where one is left out.

    Raises:
        PruningError: a layer reads two prunable layers, so that its matrix has three free sides.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        curves: Mapping[Node, np.ndarray],
        options: Mapping[str, Choices],
        error_weights: Mapping[str, float] | None = None,
    ) -> None:
        self.curves = {node: np.asarray(curve, dtype=np.float64) for node, curve in curves.items()}
        self._readings = [
            self._reading(name, network, layer, options[name], (error_weights or {}).get(name, 1.0))
            for name, network in networks.items()
            for layer in network.graph.layers
        ]
        # The forest is that of the plain chain: what reads what.
        pairs = {(r.source, r.node): 1.0 for r in self._readings if r.source and r.out is None}
        dense = {node: len(curve) - 1 for node, curve in self.curves.items()}
        self._order = parents_last(Cost(0.0, dict.fromkeys(dense, 0.0), pairs, dense))
        self.dense = dense

    def _reading(
        self, name: str, network: Network, layer: Layer, of: Choices, omega: float
    ) -> _Reading:
        prunable = set(network.graph.prunable())
        sources = [source for source in layer.inputs if source in prunable]
        if len(sources) > 1:
            raise PruningError(
                f"layer {layer.name!r} of network {name!r} reads {sources}, which are all "
                "prunable; choosing widths and bits together needs one of them at most"
            )
        return _Reading(
            (name, layer.name),
            of[layer.name],
            sum(network.width(x) for x in layer.inputs if x not in prunable),
            (name, sources[0]) if sources else None,
            None if layer.name in prunable else network.width(layer.name),
            omega,
        )

    def widths(self, multiplier: float) -> dict[Node, int]:
        """The widths of least error + λ·bytes.

        Args:
            multiplier: λ ≥ 0.
        """
        m = {node: np.arange(n + 1, dtype=np.float64) for node, n in self.dense.items()}
        unary = {node: curve.copy() for node, curve in self.curves.items()}
        joint: dict[tuple[Node, Node], np.ndarray] = {}
        for r in self._readings:
            if r.source is None and r.out is None:
                fixed = np.asarray(float(r.fixed))
                unary[r.node] += r.cheapest(multiplier, fixed, m[r.node])
            elif r.source is not None and r.out is not None:
                outputs = np.asarray(float(r.out))
                unary[r.source] += r.cheapest(multiplier, r.fixed + m[r.source], outputs)
            elif r.source is not None:
                inputs, outputs = r.fixed + m[r.source], m[r.node]
                joint[r.source, r.node] = r.cheapest(
                    multiplier, inputs[None, :], outputs[:, None]
                )  # rows m_l, columns m_k
        choice: dict[Node, np.ndarray] = {}
        best: dict[Node, int] = {}
        for child, (parent, _) in self._order.items():
            if parent is None:
                best[child] = int(unary[child].argmin())
                continue
            table = joint[child, parent] if (child, parent) in joint else joint[parent, child].T
            table = table + unary[child]
            choice[child] = table.argmin(axis=1)
            unary[parent] = unary[parent] + table[np.arange(len(table)), choice[child]]
        for child, (parent, _) in reversed(self._order.items()):
            if parent is not None:
                best[child] = int(choice[child][best[parent]])
        return {node: best[node] for node in self.curves}

    def schemes(self, multiplier: float, m: Mapping[Node, int]) -> dict[Node, Choice]:
        """The choice of each layer at these widths."""
        return {r.node: r.chosen(multiplier, *self._sides(r, m)) for r in self._readings}

    def cost(self, m: Mapping[Node, int], chosen: Mapping[Node, Choice]) -> float:
        """Bytes of these widths and choices."""
        total = 0.0
        for r in self._readings:
            inputs, outputs = self._sides(r, m)
            total += (chosen[r.node].weight * inputs + chosen[r.node].output) * outputs
        return total

    def error(self, m: Mapping[Node, int], chosen: Mapping[Node, Choice]) -> float:
        """What is minimised."""
        rounding = sum(r.omega * chosen[r.node].error for r in self._readings)
        return float(rounding + sum(curve[m[node]] for node, curve in self.curves.items()))

    def within(self, amount: Number) -> tuple[dict[Node, int], dict[Node, Choice]]:
        """Widths and choices within a budget: what a multiplier finds, filled up.

        Args:
            amount: B, bytes.

        Raises:
            BudgetError: one channel a layer in the fewest bits takes more.
        """
        return self._filled(*self.on_hull(amount), amount)

    def _filled(
        self, m: dict[Node, int], chosen: dict[Node, Choice], amount: Number
    ) -> tuple[dict[Node, int], dict[Node, Choice]]:
        """Spend what is left: again and again the change that gains most error per byte."""
        while True:
            cost, error = self.cost(m, chosen), self.error(m, chosen)
            best: tuple[float, dict[Node, int], dict[Node, Choice]] | None = None
            for wider, other in self._changes(m, chosen):
                more, gain = self.cost(wider, other) - cost, error - self.error(wider, other)
                if gain > 0 and cost + more <= amount:
                    worth = gain / max(more, 1e-300)
                    if best is None or worth > best[0]:
                        best = worth, wider, other
            if best is None:
                return m, chosen
            m, chosen = best[1], best[2]

    def _changes(
        self, m: dict[Node, int], chosen: dict[Node, Choice]
    ) -> Iterator[tuple[dict[Node, int], dict[Node, Choice]]]:
        """One layer somewhat wider, or stored in another way."""
        for node, n in self.dense.items():
            for step in STEPS:
                if m[node] + step <= n:
                    yield {**m, node: m[node] + step}, chosen
        for r in self._readings:
            for choice in r.choices:
                if choice.error < chosen[r.node].error:
                    yield m, {**chosen, r.node: choice}

    def on_hull(self, amount: Number) -> tuple[dict[Node, int], dict[Node, Choice]]:
        """Widths and choices of least error that a multiplier finds within a budget.

        Args:
            amount: B, bytes.

        Raises:
            BudgetError: one channel a layer in the fewest bits takes more.
        """
        least_m = dict.fromkeys(self.dense, 1)
        least = self.cost(
            least_m,
            {r.node: min(r.choices, key=lambda c: (c.weight, c.output)) for r in self._readings},
        )
        if not amount >= least:
            raise BudgetError(
                f"a budget of {amount:g} bytes cannot be kept: with one channel a layer in the "
                f"fewest bits the networks take {least:g}; allow more"
            )

        def at(multiplier: float) -> tuple[dict[Node, int], dict[Node, Choice]]:
            m = self.widths(multiplier)
            return m, self.schemes(multiplier, m)

        best = at(0.0)
        if self.cost(*best) <= amount:
            return best
        low, high = 0.0, 1e-9
        while self.cost(*(best := at(high))) > amount:
            low, high = high, 8 * high
            if high > 1e30:
                raise PruningError("the allowed widths do not fit the budget; allow smaller ones")
        for _ in range(BISECTIONS):
            middle = (low * high) ** 0.5 if low > 0 else high / 16
            found = at(middle)
            if self.cost(*found) <= amount:
                high = middle
                best = min((best, found), key=lambda mc: self.error(*mc))
            else:
                low = middle
            if high <= low * (1 + 1e-9) or middle < 1e-30:
                break
        return best

    def _sides(self, r: _Reading, m: Mapping[Node, int]) -> tuple[int, int]:
        """Inputs and outputs of a layer at these widths."""
        inputs = r.fixed + (m[r.source] if r.source is not None else 0)
        return inputs, m[r.node] if r.out is None else r.out


Schemes = dict[str, dict[str, str]]
"""By network and layer, a name in `quantization.SCHEMES`."""


def jointly(joint: Joint, amount: Number) -> tuple[Widths, Schemes]:
    """`Joint.within`, by network and layer."""
    m, chosen = joint.within(amount)
    widths: Widths = {}
    schemes: Schemes = {}
    for (name, layer), width in m.items():
        widths.setdefault(name, {})[layer] = width
    for (name, layer), choice in chosen.items():
        schemes.setdefault(name, {})[layer] = choice.scheme
    return widths, schemes
