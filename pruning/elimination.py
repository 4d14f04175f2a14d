"""Elimination paths: a layer's channels removed one by one, the least harmful first.

Structured OBS. Channel j of a layer is column j of its readers' weights W. If the readers' other
columns (and biases) are free to make up for it, removing it costs

    Σ_r s_r W_rj² / [H⁻¹]_jj

more in E‖z − z_dense‖² (z what the readers compute before their activation). The cheapest channel
goes, the others take over its part, and H loses a row and a column:

    W   ← W   − W_:,j [H⁻¹]_j,: / [H⁻¹]_jj
    H⁻¹ ← H⁻¹ − [H⁻¹]_:,j [H⁻¹]_j,: / [H⁻¹]_jj

One pass gives the order of removal and the error at *every* width. All layers of all networks
take each step together, so a pass takes as many steps as the widest layer has channels.

Source: Hassibi and Stork 1993; for whole columns Kurtić et al. 2023 (ZipLM, equation 2) and Ling
et al. 2024 (SlimGPT).

Letters: j a channel, r an output of a reader, s_r how much it counts, W a reader's columns, H the
damped Gram matrix of a reader's input (see `pruning.solving`; all float64), m a width, e(m) the
error of the best m channels found.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pruning.calibration import Statistics
from pruning.errors import PruningError, StatisticsError
from pruning.network import Network
from pruning.solving import DAMPING, damped, input_gram, inverse, obs_update

OutputWeights = Mapping[str, Float[Tensor, " _out"]]
"""s_r ≥ 0 by layer: how much an error in each of its outputs counts (1 where a layer is left out).
E[(∂L/∂z_r)²], which `gradients.collect_gradients` measures, makes it an error in the loss."""


@dataclass(frozen=True)
class Path:
    """The order in which a layer's channels are removed, and what it costs.

    Attributes:
        order: channels, the first to go first.
        errors: e(m) for m = 0 … width; e(width) = 0, and it never rises with m. Relative to the
            variance of what the readers compute, unless the path was asked for otherwise.
    """

    order: Int[Tensor, " channels"]
    errors: Float[Tensor, " channels+1"]

    @property
    def width(self) -> int:
        """Channels of the dense layer."""
        return len(self.order)

    def keep(self, width: int) -> Bool[Tensor, " channels"]:
        """The keep mask of the `width` channels that go last.

        Raises:
            PruningError: the layer does not have that many channels, or none would stay.
        """
        if not 1 <= width <= self.width:
            raise PruningError(
                f"a layer of {self.width} channels can be cut to 1 … {self.width}, not to {width}"
            )
        keep = torch.ones(self.width, dtype=torch.bool)
        keep[self.order[: self.width - width]] = False
        return keep

    def scores(self) -> Float[Tensor, " channels"]:
        """For each channel, the error that its removal adds, made to rise along the path."""
        scores = torch.empty(self.width, dtype=torch.float64)
        scores[self.order] = (-self.errors.diff()).flip(0).cummax(0).values
        return scores

    def ranks(self) -> Float[Tensor, " channels"]:
        """For each channel, how many go before it."""
        ranks = torch.empty(self.width, dtype=torch.float64)
        ranks[self.order] = torch.arange(self.width, dtype=torch.float64)
        return ranks


@dataclass(frozen=True)
class Reading:
    """What one set of readers (those with the same inputs) has of a layer.

    Attributes:
        inverse: the part of H⁻¹ that belongs to the layer's channels.
        bound: 1/H_jj, below which [H⁻¹]_jj cannot fall.
        outgoing: √s_r W_rj, the readers' columns for the layer's channels.
        energy: Σ_r s_r Var(z_r).
    """

    inverse: Float[Tensor, "channels channels"]
    bound: Float[Tensor, " channels"]
    outgoing: Float[Tensor, "rows channels"]
    energy: float


Balance = Literal["rows", "readers", "layer", "none"]
"""How the errors of a layer's readers are put together: ``rows`` divides the sum of all their
errors by the sum of all their variances, ``readers`` does so for each reader and adds (a density
head with one output counts as much as a layer with 256), ``layer`` divides by e(0), so that every
layer counts 1 when all of it is gone (behind a skip the variance is partly the skip's), ``none``
only adds."""


def elimination_path(
    gram: Float[Tensor, "n1 n1"],
    outgoing: Float[Tensor, "rows n"],
    channels: slice = slice(None),
    damping: float = DAMPING,
) -> Path:
    """The elimination path of one layer with one reader.

    Args:
        gram: E[[x; 1][x; 1]ᵀ] of the reader's input.
        outgoing: the reader's weight W.
        channels: which of the reader's columns are the layer's channels; the others stay and help.
        damping: λ as a fraction of the mean power.

    Returns:
        The path; its errors are E‖z − z_dense‖² (damped), not relative.
    """
    return _eliminate([[_reading(gram, outgoing, channels, damping)]])[0]


def compensated_weights(
    gram: Float[Tensor, "n1 n1"],
    V: Float[Tensor, "rows n1"],
    kept: Bool[Tensor, " n"],
    damping: float = DAMPING,
) -> Float[Tensor, "rows k1"]:
    """A reader's weights and bias at the end of an elimination.

    Args:
        gram: E[[x; 1][x; 1]ᵀ] of its input.
        V: [W | b].
        kept: which inputs are left, whatever the order that they went in.
        damping: λ as a fraction of the mean power.
    """
    constant = torch.ones(1, dtype=torch.bool, device=kept.device)
    return obs_update(V.double(), damped(gram, damping), torch.cat((kept, constant)))


def elimination_paths(
    networks: Mapping[str, Network],
    statistics: Mapping[str, Statistics],
    *,
    output_weights: Mapping[str, OutputWeights] | None = None,
    balance: Balance = "rows",
    damping: float = DAMPING,
    layers: Collection[str] | None = None,
    scores: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, dict[str, Path]]:
    """The elimination path of each prunable layer of each network, in one pass over all.

    Each layer is eliminated as if the others stayed dense.

    Args:
        networks: the dense networks, by name.
        statistics: of each, with the moment "gram".
        output_weights: by network, how much each output of a layer counts.
        balance: how the errors of several readers are put together.
        damping: λ as a fraction of the mean power.
        layers: the prunable layers wanted; None for all.
        scores: by network and layer, another criterion's: channels then go in the order of their
            scores, and the errors are those that least squares leaves at each width.

    Returns:
        By network and layer. Errors are relative unless balance is "none".

    Raises:
        StatisticsError: statistics are missing or of another network.
    """
    readings: dict[tuple[str, str], list[Reading]] = {}
    for name, network in networks.items():
        if name not in statistics:
            raise StatisticsError(
                f"no statistics of network {name!r}; there are those of {list(statistics)}"
            )
        weights = (output_weights or {}).get(name, {})
        for layer in network.graph.prunable():
            if layers is not None and layer not in layers:
                continue
            readings[name, layer] = _readings(
                network,
                layer,
                statistics[name],
                output_weights=weights,
                balance=balance,
                damping=damping,
            )
    paths: dict[str, dict[str, Path]] = {name: {} for name in networks}
    orders = None
    if scores is not None:
        orders = [torch.argsort(scores[name][layer], stable=True) for name, layer in readings]
    found = _eliminate(list(readings.values()), orders)
    for (name, layer), path in zip(readings, found, strict=True):
        energy = sum(r.energy for r in readings[name, layer])
        energy = {"none": 1.0, "layer": float(path.errors[0])}.get(balance, energy)
        paths[name][layer] = Path(path.order, path.errors / energy if energy > 0 else path.errors)
    return paths


def _readings(
    network: Network,
    name: str,
    statistics: Statistics,
    *,
    output_weights: OutputWeights,
    balance: Balance,
    damping: float,
) -> list[Reading]:
    """One reading for each set of readers that share their inputs."""
    by_inputs: dict[tuple[str, ...], list[str]] = {}
    for reader in network.graph.readers(name):
        by_inputs.setdefault(reader.inputs, []).append(reader.name)
    readings = []
    for readers in by_inputs.values():
        first = network.graph[readers[0]]
        gram = input_gram(network, first, statistics)
        rows = []
        for read_by in readers:
            W = network.weights[read_by].double()
            s = output_weights.get(read_by, torch.ones(len(W))).to(W)
            if s.shape != (len(W),) or not bool((torch.isfinite(s) & (s >= 0)).all()):
                raise PruningError(
                    f"the output weights of layer {read_by!r} must be {len(W)} finite numbers "
                    "from 0 up"
                )
            rooted = s.sqrt()[:, None] * W
            if balance == "readers":
                energy = _energy(gram, rooted)
                rooted = rooted / energy**0.5 if energy > 0 else rooted * 0
            rows.append(rooted)
        channels = network.input_slices(first)[name]
        readings.append(_reading(gram, torch.cat(rows), channels, damping))
    return readings


def _energy(gram: Float[Tensor, "n1 n1"], outgoing: Float[Tensor, "rows n"]) -> float:
    """Σ_r Var(w_rᵀ x): what the readers compute, beside its mean."""
    covariance = gram[:-1, :-1] - torch.outer(gram[:-1, -1], gram[:-1, -1])
    return max(float(((outgoing @ covariance) * outgoing).sum()), 0.0)


def _reading(
    gram: Float[Tensor, "n1 n1"],
    outgoing: Float[Tensor, "rows n"],
    channels: slice,
    damping: float,
) -> Reading:
    gram, outgoing = gram.double(), outgoing.double()
    channels = slice(*channels.indices(outgoing.shape[1]))
    H = damped(gram, damping)
    return Reading(
        inverse(H)[channels, channels],
        1 / H.diagonal()[channels].clamp(min=torch.finfo(torch.float64).tiny),
        outgoing[:, channels],
        _energy(gram, outgoing),
    )


def _eliminate(
    problems: Sequence[Sequence[Reading]], orders: Sequence[Int[Tensor, " _channels"]] | None = None
) -> list[Path]:
    """The paths of several layers, each with one reading or more, all stepping together.

    With `orders` the channels go in those instead of the cheapest first.
    """
    if not problems:
        return []
    readings = [reading for problem in problems for reading in problem]
    like = readings[0].inverse
    owner = torch.tensor(
        [i for i, problem in enumerate(problems) for _ in problem], device=like.device
    )
    widths = [len(problem[0].inverse) for problem in problems]
    C, R = max(widths), max(len(reading.outgoing) for reading in readings)
    # H⁻¹ above, W below: both lose their column j by the same rank-1 step.
    M = like.new_zeros(len(readings), C + R, C)
    bound = like.new_ones(len(readings), C)
    for i, reading in enumerate(readings):
        n = len(reading.inverse)
        M[i, :n, :n] = reading.inverse
        M[i, C : C + len(reading.outgoing), :n] = reading.outgoing
        bound[i, :n] = reading.bound
    alive = torch.arange(C, device=like.device) < torch.tensor(widths, device=like.device)[:, None]
    order = torch.zeros(len(problems), C, dtype=torch.int64, device=like.device)
    for i, given in enumerate(orders or ()):
        order[i, : len(given)] = given.to(order)
    added = like.new_zeros(len(problems), C)
    for step in range(C):
        pivots = torch.maximum(M[:, :C].diagonal(dim1=1, dim2=2), bound)
        costs = M[:, C:].square().sum(dim=1) / pivots
        scores = torch.zeros_like(added).index_add_(0, owner, costs)
        scores.masked_fill_(~alive, torch.inf)
        if orders is None:
            added[:, step], order[:, step] = scores.min(dim=1)
        else:
            added[:, step] = scores.gather(1, order[:, step, None])[:, 0]
        alive.scatter_(1, order[:, step, None], False)
        j = order[owner, step][:, None, None]
        column = M.gather(2, j.expand(-1, C + R, 1)) / pivots.gather(1, j[:, :, 0])[:, :, None]
        row = M.gather(1, j.expand(-1, 1, C))
        # A layer that has run out of channels picks a dead entry; its step must change nothing.
        column.masked_fill_(added[owner, step].isinf()[:, None, None], 0)
        M.baddbmm_(column, row, alpha=-1)
    paths = []
    for i, n in enumerate(widths):
        removed = torch.cat((added.new_zeros(1), added[i, :n].cumsum(0)))
        paths.append(Path(order[i, :n].cpu(), removed.flip(0).cpu()))
    return paths
