"""What a network costs as a function of its widths, and a budget to keep to.

Removing a channel drops a row of its layer and a column of each reader, so the cost of a network is

    cost(m) = c + Σ_l u_l m_l + Σ_(k→l) v m_k m_l

bilinear in the widths of layers that read each other: a channel is cheaper to keep beside a narrow
neighbour. What is not prunable (skip inputs, heads) goes into u and c.

Letters: m_l channels kept of prunable layer l, k→l where l reads k and both are prunable, n_l the
dense width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pruning.errors import BudgetError
from pruning.network import Network
from pruning.registry import lookup

Widths = dict[str, dict[str, int]]
"""Channels kept, by network and prunable layer."""

Number = float | int

Node = tuple[str, str]
"""A prunable layer: (network, layer)."""


@dataclass(frozen=True)
class Price:
    """What the parts of a network cost, in one unit.

    Attributes:
        weight: each weight of each layer.
        output: each output of each layer: its bias, and a scale when quantised.
        channel: each channel of a prunable layer, on top.
    """

    weight: Number
    output: Number
    channel: Number = 0


PRICES: dict[str, Price] = {
    "params": Price(1.0, 1.0),
    "bytes": Price(4.0, 4.0),
    "flops": Price(2.0, 0.0),
    "channels": Price(0.0, 0.0, 1.0),
}
"""Prices by unit. Bytes are those of float32; at b bits a weight with a 16-bit bias and scale they
are ``Price(b / 8, 4)``. FLOPs are those of one evaluation (a multiply and an add count as two)."""


@dataclass(frozen=True)
class Budget:
    """How much all networks together may cost.

    Attributes:
        amount: the most that is allowed, in the price's unit.
        price: what things cost.
        uses: how often each network counts: evaluations a ray when the budget is FLOPs a ray;
            1 where a network is left out.
    """

    amount: Number
    price: Price = PRICES["params"]
    uses: Mapping[str, Number] = field(default_factory=dict)

    @classmethod
    def of(cls, unit: str, amount: Number, uses: Mapping[str, Number] | None = None) -> "Budget":
        """A budget in a unit of `PRICES`, e.g. ``Budget.of("params", 300_000)``.

        Raises:
            PruningError: there is no such unit.
        """
        return cls(amount, lookup(PRICES, unit, "unit of a budget"), dict(uses or {}))


@dataclass(frozen=True)
class Cost:
    """cost(m) of some networks, as its coefficients.

    Attributes:
        constant: c.
        linear: u_l.
        pairs: v for each k→l.
        dense: n_l.
    """

    constant: float
    linear: Mapping[Node, float]
    pairs: Mapping[tuple[Node, Node], float]
    dense: Mapping[Node, int]

    @classmethod
    def of(cls, networks: Mapping[str, Network], budget: Budget) -> "Cost":
        """The cost of networks at a budget's prices, whatever its amount."""
        constant = 0.0
        linear: dict[Node, float] = {}
        pairs: dict[tuple[Node, Node], float] = {}
        dense: dict[Node, int] = {}
        for name, network in networks.items():
            uses, price = budget.uses.get(name, 1.0), budget.price
            prunable = set(network.graph.prunable())
            for layer in network.graph.layers:
                node = (name, layer.name)
                sources = [(name, source) for source in layer.inputs if source in prunable]
                fixed = sum(network.width(x) for x in layer.inputs if x not in prunable)
                if layer.name in prunable:
                    dense[node] = network.width(layer.name)
                    linear[node] = uses * (price.weight * fixed + price.output + price.channel)
                    pairs |= {(source, node): uses * price.weight for source in sources}
                else:
                    out = network.width(layer.name)
                    constant += uses * (price.weight * fixed + price.output) * out
                    for source in sources:
                        linear[source] += uses * price.weight * out
        return cls(constant, linear, pairs, dense)

    def __call__(self, m: Mapping[Node, int]) -> float:
        """cost(m)."""
        return (
            self.constant
            + sum(u * m[node] for node, u in self.linear.items())
            + sum(v * m[k] * m[layer] for (k, layer), v in self.pairs.items())
        )

    def neighbours(self) -> dict[Node, dict[Node, float]]:
        """For each layer, v by the layers that it shares a weight matrix with."""
        near: dict[Node, dict[Node, float]] = {node: {} for node in self.dense}
        for (k, layer), v in self.pairs.items():
            near[k][layer] = near[layer][k] = v
        return near

    def check(self, amount: Number) -> None:
        """Raise unless one channel a layer fits.

        Raises:
            BudgetError: it does not, or the amount is not a number.
        """
        least = self(dict.fromkeys(self.dense, 1))
        if not amount >= least:
            raise BudgetError(
                f"a budget of {amount:g} cannot be kept: with one channel a layer the networks "
                f"cost {least:g} (dense: {self(self.dense):g}); allow more or merge layers"
            )
