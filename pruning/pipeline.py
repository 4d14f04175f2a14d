"""The story of one pruning: score, select, remove, compensate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor

from pruning.allocation import check_ratios
from pruning.calibration import Statistics
from pruning.compensation import compensate
from pruning.errors import PruningError
from pruning.network import Network
from pruning.scores import score
from pruning.selection import select
from pruning.size import nonzero_parameters


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
    def ratio(self) -> float:
        """Fraction removed of all channels of the prunable layers together."""
        channels = sum(kept.numel() for kept in self.keep.values())
        return sum(int((~kept).sum()) for kept in self.keep.values()) / channels


def prune(
    network: Network,
    ratios: Sequence[float],
    criterion: str = "activation",
    statistics: Statistics | None = None,
    seed: int | None = None,
    *,
    compensation: str = "none",
) -> Pruned:
    """Remove the channels that matter least.

    Args:
        network: the dense network; it is not changed.
        ratios: the fraction to remove from each prunable layer (see `allocation.allocate`).
        criterion: a name in `scores.CRITERIA`.
        statistics: calibration statistics of this network, if the criterion needs them.
        seed: if the criterion needs one.
        compensation: a name in `compensation.COMPENSATIONS`.

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
        network=compensate(network, keep, compensation, statistics),
        keep=keep,
        requested=requested,
        achieved={name: int((~kept).sum()) / kept.numel() for name, kept in keep.items()},
        nonzero_parameters=nonzero_parameters(network, keep),
    )
