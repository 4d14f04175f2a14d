"""The story of a pruning: score, size, select, remove, compensate."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from jaxtyping import Bool
from torch import Tensor

from pruning.allocation import check_ratios
from pruning.budget import Budget, Cost, Widths
from pruning.calibration import CalibrationBatch, Statistics, collect
from pruning.compensation import compensate
from pruning.elimination import Balance, OutputWeights, Path, elimination_paths
from pruning.errors import PruningError, StatisticsError
from pruning.network import Network
from pruning.registry import lookup
from pruning.scores import moments_for, score
from pruning.selection import KeepMasks, select
from pruning.size import nonzero_parameters
from pruning.sizing import BUDGETED, Sizing, top, widths_within


@dataclass(frozen=True)
class Pruned:
    """A pruned network and how it came about.

    Attributes:
        network: physically smaller; `network.parameters()` are the parameters kept.
        keep: which channels of the dense network stayed, by layer.
        requested: sparsity ratio asked for, by layer.
        achieved: fraction of channels really removed, by layer (never above the requested one but
            for rounding; below it by less than one channel).
        nonzero_parameters: what masking instead of removing would leave nonzero, the report's
            count.
    """

    network: Network
    keep: Mapping[str, Bool[Tensor, " _channels"]]
    requested: Mapping[str, float]
    achieved: Mapping[str, float]
    nonzero_parameters: int

    @property
    def total(self) -> int:
        """Channels of the prunable layers of the dense network."""
        return sum(kept.numel() for kept in self.keep.values())

    @property
    def removed(self) -> int:
        """How many of them went."""
        return sum(int((~kept).sum()) for kept in self.keep.values())

    @property
    def ratio(self) -> float:
        """Fraction removed of all channels of the prunable layers together."""
        return self.removed / self.total


def prune(
    network: Network,
    ratios: Sequence[float],
    criterion: str = "activation",
    statistics: Statistics | None = None,
    seed: int | None = None,
    *,
    compensation: str = "none",
    batches: Iterable[CalibrationBatch] | None = None,
) -> Pruned:
    """Remove the channels that matter least.

    Args:
        network: the dense network; it is not changed.
        ratios: the fraction to remove from each prunable layer (see `allocation.allocate`).
        criterion: a name in `scores.CRITERIA`.
        statistics: calibration statistics of this network, if the criterion needs them.
        seed: if the criterion needs one.
        compensation: a name in `compensation.COMPENSATIONS`.
        batches: calibration batches that can be gone through again and again, if the compensation
            needs those.

    Returns:
        The smaller network, with the keep masks, ratios and sizes.

    Raises:
        RatioError: a ratio out of range, or not one for each prunable layer.
        StatisticsError: statistics are missing or of another network.
        PruningError: no layer is prunable, no such criterion or compensation, or a seed is
            missing.
    """
    layers = network.graph.prunable()
    if not layers:
        raise PruningError("no layer of this network is prunable, so there is nothing to remove")
    requested = dict(zip(layers, check_ratios(ratios, len(layers)), strict=True))
    keep = select(score(network, criterion, statistics, seed), requested)
    return Pruned(
        network=compensate(network, keep, compensation, statistics, batches),
        keep=keep,
        requested=requested,
        achieved={name: int((~kept).sum()) / kept.numel() for name, kept in keep.items()},
        nonzero_parameters=nonzero_parameters(network, keep),
    )


@dataclass(frozen=True)
class Ranking:
    """How channels rank: all that deciding about widths needs to know, for any budget.

    Attributes:
        scores: by network and layer, one a channel.
        paths: by network and layer, the error at every width; None where no one asked for them.
    """

    scores: Mapping[str, Mapping[str, Tensor]]
    paths: Mapping[str, Mapping[str, Path]] | None = None

    def keep(self, widths: Widths) -> dict[str, dict[str, Bool[Tensor, " _channels"]]]:
        """The channels that stay at these widths."""
        return {
            name: {
                layer: self.paths[name][layer].keep(width)
                if self.paths is not None
                else top(self.scores[name][layer], width)
                for layer, width in of_network.items()
            }
            for name, of_network in widths.items()
        }


def rank(
    networks: Mapping[str, Network],
    statistics: Mapping[str, Statistics],
    *,
    criterion: str = "obs",
    allocation: str = "chain",
    output_weights: Mapping[str, OutputWeights] | None = None,
    balance: Balance = "rows",
    seed: int | None = None,
) -> Ranking:
    """The part of `shrink` that does not depend on the budget.

    Args:
        networks: the dense networks, by name.
        statistics: of each, with the moments that `moments_for_budget` names.
        criterion: a name in `scores.CRITERIA`: the order in which a layer's channels go.
        allocation: a name in `sizing.BUDGETED`, which says whether errors are needed.
        output_weights: by network, how much each output of a layer counts in the errors.
        balance: how the errors of a layer's readers are put together (see `elimination.Balance`).
        seed: if the criterion needs one.

    Raises:
        StatisticsError: statistics are missing or of another network.
        PruningError: no such criterion or allocation.
    """
    for name, network in networks.items():
        if not network.graph.prunable():
            raise PruningError(f"no layer of network {name!r} is prunable")
    sized = lookup(BUDGETED, allocation, "budgeted allocation")
    if sized.only_with is not None and criterion not in sized.only_with:
        raise PruningError(
            f"allocation {allocation!r} is defined on the scores of criterion "
            f"{' or '.join(sized.only_with)}, not on those of {criterion!r}"
        )
    by_obs = criterion == "obs"
    scores = {
        name: score(network, criterion, statistics.get(name), seed)
        for name, network in networks.items()
        if not by_obs
    }
    if not by_obs and not sized.needs_paths:
        return Ranking(scores)
    paths = elimination_paths(
        networks,
        statistics,
        output_weights=output_weights,
        balance=balance,
        scores=None if by_obs else scores,
    )
    if by_obs:
        scores = {n: {la: p.scores() for la, p in of.items()} for n, of in paths.items()}
    return Ranking(scores, paths)


def shrink(
    networks: Mapping[str, Network],
    statistics: Mapping[str, Statistics],
    budget: Budget,
    *,
    criterion: str = "obs",
    allocation: str = "chain",
    compensation: str = "obs",
    error_weights: Mapping[str, float] | None = None,
    output_weights: Mapping[str, OutputWeights] | None = None,
    balance: Balance = "rows",
    multiple: int = 1,
    seed: int | None = None,
    ranking: Ranking | None = None,
    batches: Mapping[str, Iterable[CalibrationBatch]] | None = None,
) -> dict[str, Pruned]:
    """Prune several networks until together they keep to a budget.

    The default is the best that we know without retraining: structured OBS gives each layer's
    error at every width, the chain dynamic programme spends the budget where the errors are least,
    and what reads the removed channels is solved anew.

    Args:
        networks: the dense networks, by name; they are not changed.
        statistics: of each, with the moments that `moments_for_budget` names.
        budget: what they may cost together.
        criterion: a name in `scores.CRITERIA`: the order in which a layer's channels go.
        allocation: a name in `sizing.BUDGETED`: how wide each layer stays.
        compensation: a name in `compensation.COMPENSATIONS`.
        error_weights: how much the errors of each network count; 1 where one is left out.
        output_weights: by network, how much each output of a layer counts in the errors.
        balance: how the errors of a layer's readers are put together (see `elimination.Balance`).
        multiple: widths are multiples of this, in the allocations that search over widths.
        seed: if the criterion needs one.
        ranking: what `rank` gave for the same networks and settings, to save its time.
        batches: by network, calibration batches that can be gone through again and again, if the
            compensation needs those.

    Returns:
        By network. `requested` and `achieved` are the same: widths are whole channels.

    Raises:
        BudgetError: one channel a layer costs more than the budget.
        StatisticsError: statistics are missing or of another network; an iterative allocation has
            no batches.
        PruningError: no such criterion, allocation or compensation.
    """
    rounds = lookup(BUDGETED, allocation, "budgeted allocation").rounds
    if rounds > 1:
        return _in_rounds(
            networks, statistics, budget, rounds, criterion, allocation, compensation, batches
        )
    if ranking is None:
        ranking = rank(
            networks,
            statistics,
            criterion=criterion,
            allocation=allocation,
            output_weights=output_weights,
            balance=balance,
            seed=seed,
        )
    sizing = Sizing(networks, budget, ranking.scores, ranking.paths, error_weights or {}, multiple)
    widths = widths_within(allocation, sizing)
    return cut(networks, ranking.keep(widths), compensation, statistics, batches)


def _in_rounds(
    networks: Mapping[str, Network],
    statistics: Mapping[str, Statistics],
    budget: Budget,
    rounds: int,
    criterion: str,
    allocation: str,
    compensation: str,
    batches: Mapping[str, Iterable[CalibrationBatch]] | None,
) -> dict[str, Pruned]:
    """`shrink` in steps by the same factor, with statistics of what is left before each."""
    if not batches or networks.keys() - batches.keys():
        raise StatisticsError(
            f"allocation {allocation!r} looks at the pruned networks again; give their batches"
        )
    cost = Cost.of(networks, budget)
    dense = cost(cost.dense)
    cost.check(budget.amount)
    moments = moments_for([criterion], [compensation])
    left = dict(networks)
    keep = {
        name: {
            layer: torch.ones(network.width(layer), dtype=torch.bool)
            for layer in network.graph.prunable()
        }
        for name, network in networks.items()
    }
    for number in range(1, rounds + 1):
        if number > 1:
            statistics = {
                name: reduce(add, collect(network, batches[name], moments).cells.values())
                for name, network in left.items()
            }
        amount = budget.amount
        if number < rounds and budget.amount < dense:
            amount = dense * (budget.amount / dense) ** (number / rounds)
        scores = {name: score(n, criterion, statistics.get(name)) for name, n in left.items()}
        sizing = Sizing(left, replace(budget, amount=amount), scores)
        kept = Ranking(scores).keep(widths_within(allocation, sizing))
        step = cut(left, kept, compensation, statistics, batches)
        for name, of in step.items():
            left[name] = of.network
            for layer, mask in of.keep.items():
                keep[name][layer][keep[name][layer].clone()] = mask.cpu()
    return {name: _pruned(networks[name], left[name], keep[name]) for name in networks}


def cut(
    networks: Mapping[str, Network],
    keep: Mapping[str, KeepMasks],
    compensation: str = "obs",
    statistics: Mapping[str, Statistics] | None = None,
    batches: Mapping[str, Iterable[CalibrationBatch]] | None = None,
) -> dict[str, Pruned]:
    """Take the channels out of each network that its keep masks name, and make up for them.

    Args:
        networks: the dense networks, by name; they are not changed.
        keep: by network and layer.
        compensation: a name in `compensation.COMPENSATIONS`.
        statistics: of each, if the compensation needs them.
        batches: by network, if the compensation needs them.

    Raises:
        StatisticsError: statistics are missing or of another network.
        PruningError: no such compensation, or a mask does not fit.
    """
    pruned = {}
    for name, network in networks.items():
        of_network = (statistics or {}).get(name), (batches or {}).get(name)
        smaller = compensate(network, keep[name], compensation, *of_network)
        pruned[name] = _pruned(network, smaller, keep[name])
    return pruned


def _pruned(dense: Network, smaller: Network, keep: KeepMasks) -> Pruned:
    """What was done to a network; the widths are what was asked for."""
    achieved = {layer: int((~kept).sum()) / kept.numel() for layer, kept in keep.items()}
    return Pruned(
        network=smaller,
        keep=keep,
        requested=achieved,
        achieved=achieved,
        nonzero_parameters=nonzero_parameters(dense, keep),
    )


def moments_for_budget(
    criterion: str = "obs", allocation: str = "chain", compensation: str = "obs"
) -> tuple[str, ...]:
    """The moments that `shrink` reads of its statistics with these names."""
    needed = set(moments_for([criterion], [compensation]))
    if lookup(BUDGETED, allocation, "budgeted allocation").needs_paths:
        needed.add("gram")
    return tuple(sorted(needed))
