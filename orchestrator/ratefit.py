"""A file of a size whose weights share one step, `bits: rate`: see `pruning.rate`.

Channels are removed first where the size leaves few bits for each weight (`LEAST_BITS`). Then one
step D serves all weights, and it is sought until the file has its size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nerf.checkpoints import model_size
from nerf.field import NerfModel
from nerf.packing import Packed
from orchestrator.modelfile import RATE, Samples, seen
from pruning import (
    BudgetError,
    Network,
    Price,
    Pruned,
    PruningError,
    RateNetwork,
    Statistics,
    StatisticsError,
    coded_bytes,
    curvature_weights,
    narrow_linear,
)

LEAST_BITS = (3.0, 2.0, 2.5, 3.5)
"""Bits a weight below which channels are removed rather than steps made coarser. Which is best
depends on the size, so it is chosen on validation rays; the first where there are none."""

ATTEMPTS = 4
FULL = 0.997
"""A file that uses so much of its size is not searched for a better one."""
HEADER = 1200
"""Bytes of a file beside codes and tables, before one was measured."""
FIRST_STEP = 1e-4
COARSEST = 1e9
"""The largest step that is tried."""


def price_at(bits: float) -> Price:
    """What weights and outputs take at so many bits a weight, in bytes."""
    return Price(bits / 8, 4)


@dataclass(frozen=True)
class Stepped:
    """Networks on the grids of one step.

    Attributes:
        size: of the file, in bytes.
        model: the networks, not rounded, in the shape that the file has.
        few: what the file holds.
    """

    size: int
    model: NerfModel
    few: dict[str, Packed]

    def stored(self) -> NerfModel:
        """The model as the file holds it."""
        fields = {name: of.field() for name, of in self.few.items()}
        model = NerfModel(fields.get("coarse", fields["fine"]), fields["fine"], self.model.samples)
        return model.to(self.model.device)


def fit_rate(
    dense: Mapping[str, Network],
    pruned: Mapping[str, Pruned],
    statistics: Mapping[str, Statistics],
    samples: Samples | None,
    omega: Mapping[str, float],
    size: int,
    assemble: Callable[[Mapping[str, Network]], NerfModel],
    info: Mapping[str, Any],
) -> Stepped:
    """Round pruned networks so finely that their file has at most `size` bytes, and nearly so many.

    Args:
        dense: the networks before pruning, by name.
        pruned: what was done to each.
        statistics: of the dense networks, with the moments "gram" and "curvature".
        samples: calibration samples by network: what the pruned ones read is looked at anew.
        omega: how much the errors of each network count; 1 where one is left out.
        size: of the file.
        assemble: a model with these networks in their places.
        info: kept in the file.

    Raises:
        BudgetError: no step is coarse enough.
        StatisticsError: there are no samples.
    """
    narrow = {name: narrow_linear(of.network) for name, of in pruned.items()}
    rated = {
        name: RateNetwork(
            network,
            seen(network, name, RATE, samples),
            _weights(dense[name], pruned[name], network, statistics, name, omega.get(name, 1.0)),
        )
        for name, network in narrow.items()
    }
    model = assemble(narrow)
    shapes = {name: of.shape for name, of in model.stored().items()}
    if shapes.keys() != rated.keys():
        raise PruningError(f"bits {RATE!r} store all networks of a file, not {list(rated)} alone")

    def coded(step: float) -> float:
        return sum(coded_bytes(of.quantize(step)) for of in rated.values())

    best: Stepped | None = None
    header, step, stride = float(HEADER), FIRST_STEP, 4.0
    for _ in range(ATTEMPTS):
        step, stride = _finest(coded, size - header, step, stride), 1.02
        quantized = {name: of.quantize(step) for name, of in rated.items()}
        few = {n: Packed(shapes[n], "int8", q.tensors()) for n, q in quantized.items()}
        found = model_size(model, info, few)
        if found <= size and (best is None or found > best.size):
            best = Stepped(found, model, few)
        before, header = header, found - sum(coded_bytes(q) for q in quantized.values())
        if best is not None and (best.size >= FULL * size or header == before):
            break
    if best is None:
        raise BudgetError(f"no file of {size:,} bytes was found: the last one has {found:,}")
    return best


def _weights(
    dense: Network,
    pruned: Pruned,
    narrow: Network,
    statistics: Mapping[str, Statistics],
    name: str,
    omega: float,
) -> dict[str, Any]:
    """s_r of each output that is left; a layer that was narrowed is its reader now."""
    if name not in statistics:
        raise StatisticsError(f"bits {RATE!r} weigh errors by calibration statistics; give some")
    s = {
        layer: omega * (of[pruned.keep[layer].to(of.device)] if layer in pruned.keep else of)
        for layer, of in curvature_weights(dense, statistics[name]).items()
    }
    for layer in narrow.graph.layers:
        if len(s[layer.name]) != narrow.width(layer.name):
            s[layer.name] = s[next(narrow.graph.readers(layer.name)).name]
    return s


def _finest(coded: Callable[[float], float], allowed: float, step: float, stride: float) -> float:
    """The finest step at which codes and tables take at most so many bytes, or nearly.

    Args:
        coded: bytes at a step.
        allowed: how many there may be.
        step: where to begin.
        stride: by what factor to go on from there, squared each time.

    Raises:
        BudgetError: no step is coarse enough.
    """
    low = high = step
    taken = coded(step)
    if taken <= allowed:
        while taken <= allowed:
            high, low, before = low, low / stride, taken
            stride = min(stride * stride, 16.0)
            taken = coded(low)
            if taken == before:  # every row has all the levels that a code can say
                return low
    else:
        while True:
            low, high = high, high * stride
            stride = min(stride * stride, 16.0)
            if high > COARSEST:
                raise BudgetError(
                    f"the biases, scales and codes of these networks take more than {allowed:,.0f} "
                    "bytes at any step; allow a larger file"
                )
            if coded(high) <= allowed:
                break
    while high > low * 1.0005:
        middle = (low * high) ** 0.5
        taken = coded(middle)
        low, high = (low, middle) if taken <= allowed else (middle, high)
        if FULL * allowed <= taken <= allowed:
            break
    return high
