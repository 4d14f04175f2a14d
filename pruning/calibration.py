"""Streaming statistics of a network's activations, for every nested calibration set in one pass.

The calibration samples are ranked along one or more axes (views and rays, say), so that a smaller
set is the first ranks of a larger one. The rank space is cut at every size that is wanted; each
piece is a `Cell`, accumulated separately, and the statistics of a set are the sum of its cells:

::

    rays
    1024 ┌────┬───────────┐      cells((1, 17), (64, 1024)) has four cells;
         │    │           │      subset((17, 64)) is the sum of the lower two,
      64 ├────┼───────────┤      subset((1, 64)) is the lower left one.
         └────┴───────────┘
         0    1          17 views

What is kept of a layer is a set of *moments* (see `pruning.moments`): E[a], E[a²] and their like
of the outputs of the prunable layers, and the Gram matrix of the input of every layer.

Letters: x a layer's input, a its output after the activation, w a sample's weight (1 unless given).
How samples are weighted (all alike, by render weight, by detail) is the choice of whoever feeds
them. Sums are float64 whatever the network computes in, and are divided by Σ w, so a batch of n
rows counts n times as much as one row and the chunks that samples arrive in do not matter.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pruning.errors import StatisticsError
from pruning.moments import GRADIENT_MOMENTS, MOMENTS, Moment, Seen, is_maximum
from pruning.network import Layer, Network
from pruning.registry import lookup

# --------------------------------------------------------------------------------- nested sets


@dataclass(frozen=True, order=True)
class Cell:
    """A box of the rank space: along axis k the ranks start[k] ≤ rank < stop[k].

    Without axes (the default) it is the whole of a calibration set that is not nested.
    """

    start: tuple[int, ...] = ()
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.start) != len(self.stop) or any(
            not 0 <= low < high for low, high in zip(self.start, self.stop, strict=True)
        ):
            raise StatisticsError(f"a cell needs 0 ≤ start < stop along each axis, got {self}")

    def inside(self, size: tuple[int, ...]) -> bool:
        """Whether every rank of this cell belongs to the set of that size."""
        return all(high <= limit for high, limit in zip(self.stop, size, strict=True))

    def volume(self) -> int:
        """Number of rank tuples in the box."""
        return math.prod(high - low for low, high in zip(self.start, self.stop, strict=True))


def cells(*sizes: Sequence[int]) -> tuple[Cell, ...]:
    """The cells of a family of nested sets.

    Args:
        sizes: for each axis, the set sizes wanted along it, in any order.

    Returns:
        Every box between neighbouring sizes, innermost first: fed in this order, a stream
        completes the small sets first.

    Raises:
        StatisticsError: an axis without sizes, or a size below 1.

    >>> [(cell.start, cell.stop) for cell in cells((1, 4), (64,))]
    [((0, 0), (1, 64)), ((1, 0), (4, 64))]
    """
    if any(not axis or min(axis) < 1 for axis in sizes):
        raise StatisticsError(f"each axis needs at least one size, each 1 or more, got {sizes}")
    intervals = [list(itertools.pairwise([0, *sorted(set(axis))])) for axis in sizes]
    return tuple(
        Cell(tuple(low for low, _ in box), tuple(high for _, high in box))
        for box in itertools.product(*intervals)
    )


@dataclass(frozen=True)
class CalibrationBatch:
    """Some samples of one cell; a cell may come in any number of batches, in any order.

    Attributes:
        inputs: external inputs of the network, one row a sample. Those that only layers after the
            last prunable one read may be left out while no moment looks at inputs of layers.
        weights: how much each sample counts (≥ 0); None for 1 each.
        cell: where the samples lie in the rank space.
    """

    inputs: Mapping[str, Float[Tensor, "_samples _features"]]
    weights: Float[Tensor, " samples"] | None = None
    cell: Cell = Cell()


# ----------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Statistics:
    """Sums over one calibration set. Adding two gives the statistics of their union.

    Attributes:
        rows: samples seen.
        weight: Σ w over them (equal to `rows` when no weights were given).
        sums: layer → moment → sum (or maximum), float64 on the CPU.
    """

    rows: int
    weight: float
    sums: Mapping[str, Mapping[str, Float[Tensor, "..."]]]

    def __add__(self, other: "Statistics") -> "Statistics":
        mine, theirs = _signature(self), _signature(other)
        if mine != theirs:
            raise StatisticsError(
                f"these statistics do not describe the same layers and moments: {mine} and {theirs}"
            )
        return Statistics(
            self.rows + other.rows,
            self.weight + other.weight,
            {
                layer: {
                    name: _combined(name, total, other.sums[layer][name])
                    for name, total in moments.items()
                }
                for layer, moments in self.sums.items()
            },
        )

    def joined(self, other: "Statistics") -> "Statistics":
        """Other moments of the same samples beside these (those of a pass with gradients, say).

        Raises:
            StatisticsError: the two saw different numbers of samples, or have a moment in common.
        """
        if (self.rows, self.weight) != (other.rows, other.weight):
            raise StatisticsError(
                f"moments of {self.rows} samples (weight {self.weight}) cannot be put beside those "
                f"of {other.rows} (weight {other.weight}): they are of different calibration sets"
            )
        sums = {layer: dict(moments) for layer, moments in self.sums.items()}
        for layer, moments in other.sums.items():
            twice = sums.setdefault(layer, {}).keys() & moments.keys()
            if twice:
                raise StatisticsError(f"layer {layer!r} has {sorted(twice)} in both statistics")
            sums[layer] |= moments
        return Statistics(self.rows, self.weight, sums)

    def only(self, names: Mapping[str, str]) -> "Statistics":
        """Some of the moments, under other names: ``only({"fisher": "curvature"})``.

        Layers that have none of them are left out.
        """
        sums = {
            layer: {new: moments[old] for old, new in names.items() if old in moments}
            for layer, moments in self.sums.items()
        }
        return Statistics(self.rows, self.weight, {la: of for la, of in sums.items() if of})

    def average(self, layer: str, moment: str) -> Float[Tensor, "..."]:
        """A moment's weighted average over the samples, e.g. ``average("trunk.0", "mean")``.

        Raises:
            StatisticsError: it was not collected, or no sample had any weight.
        """
        if layer not in self.sums:
            raise StatisticsError(
                f"no statistics of layer {layer!r}; there are those of {list(self.sums)}"
            )
        if moment not in self.sums[layer]:
            how = (
                "it needs a loss: use collect_gradients()"
                if moment in GRADIENT_MOMENTS
                else f"pass moments=({moment!r}, …) to collect()"
            )
            raise StatisticsError(
                f"moment {moment!r} of layer {layer!r} was not collected, only "
                f"{list(self.sums[layer])}; {how}"
            )
        if not self.weight > 0:
            raise StatisticsError(
                f"the weights of the {self.rows} calibration samples sum to {self.weight}, "
                "so there is no average; give some sample a weight above 0"
            )
        total = self.sums[layer][moment]
        return total.clone() if is_maximum(moment) else total / self.weight

    def variance(self, layer: str) -> Float[Tensor, " channels"]:
        """E[a²] − E[a]² of a layer's outputs, from the moments "square" and "mean"; never below 0.

        Raises:
            StatisticsError: they were not collected.
        """
        spread = self.average(layer, "square") - self.average(layer, "mean").square()
        return spread.clamp(min=0)


@dataclass(frozen=True)
class NestedStatistics:
    """The statistics of each cell of a family of nested calibration sets.

    Adding two merges the work of two passes: cells that both have are summed.

    Attributes:
        cells: statistics by cell.
    """

    cells: Mapping[Cell, Statistics]

    def __add__(self, other: "NestedStatistics") -> "NestedStatistics":
        merged = dict(self.cells)
        for cell, statistics in other.cells.items():
            merged[cell] = merged[cell] + statistics if cell in merged else statistics
        return NestedStatistics(merged)

    def joined(self, other: "NestedStatistics") -> "NestedStatistics":
        """Other moments of the same samples beside these, cell by cell.

        Raises:
            StatisticsError: the two have other cells, or do not fit (see `Statistics.joined`).
        """
        if self.cells.keys() != other.cells.keys():
            raise StatisticsError(
                f"statistics of {len(self.cells)} and {len(other.cells)} cells are not those of "
                "the same calibration sets"
            )
        return NestedStatistics({c: of.joined(other.cells[c]) for c, of in self.cells.items()})

    def only(self, names: Mapping[str, str]) -> "NestedStatistics":
        """Some of the moments, under other names (see `Statistics.only`)."""
        return NestedStatistics({c: of.only(names) for c, of in self.cells.items()})

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The set sizes that can be handed out, in lexicographic order."""
        return tuple(size for size in sorted({cell.stop for cell in self.cells}) if self._has(size))

    def subset(self, size: tuple[int, ...] = ()) -> Statistics:
        """The statistics of the set of the first size[k] ranks along each axis k.

        Args:
            size: one number an axis; none for a set that is not nested.

        Raises:
            StatisticsError: the cells do not add up to that set; names the sizes that they do.
        """
        if not self._has(size):
            raise StatisticsError(
                f"no calibration set of size {size} was collected; "
                f"the sizes are {list(self.sizes())}"
            )
        members = sorted(cell for cell in self.cells if cell.inside(size))
        return reduce(add, (self.cells[cell] for cell in members))

    def _has(self, size: tuple[int, ...]) -> bool:
        """Whether the cells within a size fill it exactly."""
        if any(len(cell.stop) != len(size) for cell in self.cells):
            return False
        filled = sum(cell.volume() for cell in self.cells if cell.inside(size))
        return bool(self.cells) and filled == math.prod(size)

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dictionary that safetensors can write: keys ``cell/rows``, ``cell/layer/moment``.

        ``{k: t.numpy() for k, t in s.to_tensors().items()}`` is the same for an object store that
        shares numpy arrays between processes.
        """
        tensors: dict[str, Tensor] = {}
        for cell, statistics in self.cells.items():
            key = _cell_key(cell)
            tensors[f"{key}/rows"] = torch.tensor(statistics.rows, dtype=torch.int64)
            tensors[f"{key}/weight"] = torch.tensor(statistics.weight, dtype=torch.float64)
            for layer, moments in statistics.sums.items():
                for name, total in moments.items():
                    tensors[f"{key}/{layer}/{name}"] = total
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor | np.ndarray]) -> "NestedStatistics":
        """What `to_tensors` gave, as tensors or as numpy arrays (read-only ones too; copied).

        Raises:
            StatisticsError: a key or a value that `to_tensors` does not write.
        """
        rows: dict[Cell, int] = {}
        weight: dict[Cell, float] = {}
        sums: dict[Cell, dict[str, dict[str, Tensor]]] = {}
        for key, value in tensors.items():
            try:
                cell = _parse_cell(key.split("/", 1)[0])
                rest = key.split("/", 1)[1]
                if rest == "rows":
                    rows[cell] = int(value)
                elif rest == "weight":
                    weight[cell] = float(value)
                else:
                    layer, moment = rest.rsplit("/", 1)
                    total = torch.from_numpy(np.array(np.asarray(value), dtype=np.float64))
                    sums.setdefault(cell, {}).setdefault(layer, {})[moment] = total
            except (ValueError, TypeError, IndexError) as error:
                raise StatisticsError(
                    f"{key!r} is not an entry of calibration statistics; collect them again"
                ) from error
        if not rows.keys() == weight.keys() == sums.keys():
            raise StatisticsError(
                "these calibration statistics are incomplete: "
                f"{len(rows)} cells have row counts, {len(weight)} weights and {len(sums)} sums; "
                "collect them again"
            )
        return cls({cell: Statistics(rows[cell], weight[cell], sums[cell]) for cell in rows})


# ------------------------------------------------------------------------------------- the pass


@torch.no_grad()
def collect(
    network: Network,
    batches: Iterable[CalibrationBatch],
    moments: Sequence[str] = ("mean",),
) -> NestedStatistics:
    """Run the calibration samples through a network once and sum the moments of each cell.

    Args:
        network: computed in its own precision, on its own device.
        batches: consumed one at a time; memory does not grow with their number.
        moments: names in `MOMENTS`.

    Returns:
        The statistics of the outputs of each prunable layer, and of the inputs of every layer where
        a moment looks at inputs.

    Raises:
        StatisticsError: there are no samples, a batch does not fit the network, or a value is NaN
            or infinite (the message names the layer or the input).
        PruningError: a moment has no such name.
    """
    chosen = {name: lookup(MOMENTS, name, "moment") for name in moments}
    if not network.graph.prunable():
        raise StatisticsError(
            "no layer of this network is prunable, so there is nothing to observe"
        )
    last = _last_observed(network, chosen)
    check_weights(network)
    totals: dict[Cell, Statistics] = {}
    for batch in batches:
        inputs, w = checked_batch(network, batch, last)
        n_rows = len(next(iter(inputs.values())))
        if n_rows == 0:
            continue
        sums: dict[str, dict[str, Tensor]] = {}
        checks: dict[str, Tensor] = {}
        shared: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        for layer, x, a in network.activations(inputs):
            checks[layer.name] = a.sum(dtype=torch.float64)
            seen = Seen(x, a, network.weights[layer.name], w)
            of_layer = _contributions(layer, seen, chosen, shared)
            if of_layer:
                sums[layer.name] = of_layer
            if layer.name == last:
                break
        weight = float(n_rows) if w is None else float(w.sum())
        _check_finite(checks)
        seen_now = Statistics(n_rows, weight, finite_on_cpu(sums))
        totals[batch.cell] = totals[batch.cell] + seen_now if batch.cell in totals else seen_now
    if not totals:
        raise StatisticsError("the calibration set holds no samples; give at least one")
    return NestedStatistics({cell: totals[cell] for cell in sorted(totals)})


def _contributions(
    layer: Layer,
    seen: Seen,
    chosen: Mapping[str, Moment],
    shared: dict[tuple[str, tuple[str, ...]], Tensor],
) -> dict[str, Tensor]:
    """What one batch adds to each moment of one layer; `shared` holds what depends on x alone."""
    sums = {}
    for name, moment in chosen.items():
        if moment.side == "output":
            if layer.prunable:
                sums[name] = moment.of(seen)
        elif moment.reads_weights:
            sums[name] = moment.of(seen)
        else:
            key = (name, layer.inputs)
            if key not in shared:
                shared[key] = moment.of(seen)
            sums[name] = shared[key].clone()
    return sums


def _last_observed(network: Network, chosen: Mapping[str, Moment]) -> str:
    """The last layer that has to be computed."""
    if any(moment.side == "input" for moment in chosen.values()):
        return network.graph.layers[-1].name
    return network.graph.prunable()[-1]


def _combined(moment: str, one: Tensor, two: Tensor) -> Tensor:
    """Two sums or two maxima put together."""
    return torch.maximum(one, two) if is_maximum(moment) else one + two


def _needed_inputs(network: Network, last: str) -> tuple[str, ...]:
    """External inputs read by a layer up to `last`."""
    read: set[str] = set()
    for layer in network.graph.layers:
        read |= set(layer.inputs)
        if layer.name == last:
            break
    return tuple(name for name in network.graph.external if name in read)


def check_weights(network: Network) -> None:
    """Raise if a weight is not finite: behind a ReLU, −∞ would pass for a channel that is off."""
    for layer in network.graph.layers:
        for tensor in (network.weights[layer.name], network.biases[layer.name]):
            if not bool(torch.isfinite(tensor).all()):
                raise StatisticsError(
                    f"the weights of layer {layer.name!r} are NaN or infinite: the model has "
                    "diverged or its checkpoint is damaged; train it again or use another"
                )


def checked_batch(
    network: Network, batch: CalibrationBatch, last: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """A batch's inputs in the network's precision and its weights in float64, if they fit.

    Args:
        network: what the batch is for.
        batch: some samples.
        last: the last layer that will be computed; inputs that only later ones read may be missing.

    Raises:
        StatisticsError: something is missing, of the wrong shape, or not finite.
    """
    like = network.weights[network.graph.layers[0].name]
    inputs: dict[str, Tensor] = {}
    for name in _needed_inputs(network, last):
        if name not in batch.inputs:
            raise StatisticsError(
                f"a calibration batch lacks input {name!r}; it has {sorted(batch.inputs)}"
            )
        values = batch.inputs[name]
        if values.ndim != 2 or values.shape[1] != network.graph.external[name]:
            raise StatisticsError(
                f"calibration input {name!r} must have shape "
                f"(samples, {network.graph.external[name]}), got {tuple(values.shape)}"
            )
        inputs[name] = values.to(like)
    lengths = {name: len(values) for name, values in inputs.items()}
    if batch.weights is not None:
        lengths["weights"] = len(batch.weights)
    if len(set(lengths.values())) != 1:
        raise StatisticsError(f"a calibration batch needs one row a sample in each, got {lengths}")
    for name, values in inputs.items():
        if not bool(torch.isfinite(values).all()):
            raise StatisticsError(f"calibration input {name!r} holds NaN or infinite values")
    if batch.weights is None:
        return inputs, None
    w = batch.weights.to(device=like.device, dtype=torch.float64)
    if not bool((torch.isfinite(w) & (w >= 0)).all()):
        raise StatisticsError("sample weights must be finite and not negative")
    return inputs, w


def _check_finite(checks: Mapping[str, Tensor]) -> None:
    """Raise for the first layer whose activations do not sum to a finite number.

    The sum is checked instead of its terms: a NaN or an infinity among them does not cancel.
    """
    finite = torch.isfinite(torch.stack(list(checks.values()))).tolist()
    for layer, is_finite in zip(checks, finite, strict=True):
        if not is_finite:
            raise StatisticsError(_not_finite(layer))


def finite_on_cpu(sums: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The sums on the CPU, or an error that names the first layer where one is not finite."""
    on_cpu = {
        layer: {name: total.cpu() for name, total in moments.items()}
        for layer, moments in sums.items()
    }
    for layer, moments in on_cpu.items():
        if not all(bool(torch.isfinite(total).all()) for total in moments.values()):
            raise StatisticsError(_not_finite(layer))
    return on_cpu


def _not_finite(layer: str) -> str:
    return (
        f"the calibration activations of layer {layer!r} are NaN or infinite: the model "
        "has diverged or its checkpoint is damaged; train it again or use another"
    )


def _signature(statistics: Statistics) -> dict[str, dict[str, tuple[int, ...]]]:
    """Layers, moments and shapes: what two statistics must share to be added."""
    return {
        layer: {name: tuple(total.shape) for name, total in moments.items()}
        for layer, moments in statistics.sums.items()
    }


def _cell_key(cell: Cell) -> str:
    """A cell as text: ``0-1,64-1024``; ``all`` without axes."""
    pairs = zip(cell.start, cell.stop, strict=True)
    return ",".join(f"{low}-{high}" for low, high in pairs) or "all"


def _parse_cell(text: str) -> Cell:
    """The cell that `_cell_key` wrote."""
    if text == "all":
        return Cell()
    pairs = [part.split("-") for part in text.split(",")]
    return Cell(tuple(int(low) for low, _ in pairs), tuple(int(high) for _, high in pairs))
