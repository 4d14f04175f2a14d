"""Criteria: how much each output channel of a layer matters.

A criterion is one pure function from a `ScoredLayer` to one number a channel; the channels with
the lowest numbers are removed first. A new criterion is one function and one line in `CRITERIA`.

Letters: W a layer's weight (out × in), a its output after the activation, j a channel.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.calibration import Statistics
from pruning.errors import PruningError, StatisticsError
from pruning.network import Network
from pruning.registry import lookup


@dataclass(frozen=True)
class ScoredLayer:
    """One prunable layer and all that a criterion may look at.

    Attributes:
        network: the dense network.
        name: the layer.
        statistics: calibration statistics, when the criterion asks for moments.
        seed: when the criterion asks for one.
    """

    network: Network
    name: str
    statistics: Statistics | None = None
    seed: int | None = None

    @property
    def incoming(self) -> Float[Tensor, "channels in"]:
        """W: row j makes channel j."""
        return self.network.weights[self.name]

    @property
    def channels(self) -> int:
        """Output channels of the layer."""
        return self.network.width(self.name)

    def average(self, moment: str) -> Float[Tensor, "..."]:
        """A moment's average over the calibration set (float64).

        Raises:
            StatisticsError: there are no statistics, or not this moment.
        """
        if self.statistics is None:
            raise StatisticsError(f"layer {self.name!r} cannot be scored without statistics")
        return self.statistics.average(self.name, moment)

    def generator(self) -> torch.Generator:
        """Random numbers that depend on the seed and the layer's name and on nothing else.

        Raises:
            PruningError: no seed was given.
        """
        if self.seed is None:
            raise PruningError(f"layer {self.name!r} cannot be scored at random without a seed")
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


ScoreFunction = Callable[[ScoredLayer], Tensor]


def activation(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """E[a_j], the mean activation over the calibration set.

    Source: the report, step 4.
    """
    return layer.average("mean")


def magnitude(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """‖W_j,:‖₂, the norm of the incoming weights; the bias is left out.

    Source: Li et al. 2017, section 3.1, with the ℓ₂ norm (their section 3.4 finds it to rank
    channels much as the ℓ₁ norm does).
    """
    return torch.linalg.vector_norm(layer.incoming, dim=1, dtype=torch.float64)


def random(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """U(0, 1), seeded: the control that every other criterion has to beat.

    A larger ratio removes what a smaller one did and more, for the same seed.
    """
    return torch.rand(layer.channels, generator=layer.generator(), dtype=torch.float64)


@dataclass(frozen=True)
class Criterion:
    """A registered criterion and what it needs.

    Attributes:
        score: one number a channel; the lowest are removed first.
        moments: the calibration moments that it reads (names in `calibration.MOMENTS`).
        needs_seed: whether it draws random numbers.
    """

    score: ScoreFunction
    moments: tuple[str, ...] = ()
    needs_seed: bool = False

    @property
    def needs_statistics(self) -> bool:
        """Whether a calibration set has to be run through the network first."""
        return bool(self.moments)


CRITERIA: dict[str, Criterion] = {
    "activation": Criterion(activation, moments=("mean",)),
    "magnitude": Criterion(magnitude),
    "random": Criterion(random, needs_seed=True),
}
"""The criteria by the name that a sweep file uses."""


def moments_for(criteria: Iterable[str]) -> tuple[str, ...]:
    """The moments that a calibration pass must collect to serve all these criteria."""
    needed = {m for name in criteria for m in lookup(CRITERIA, name, "criterion").moments}
    return tuple(sorted(needed))


def score(
    network: Network,
    criterion: str,
    statistics: Statistics | None = None,
    seed: int | None = None,
) -> dict[str, Float[Tensor, " _channels"]]:
    """Score each channel of each prunable layer.

    Args:
        network: the dense network.
        criterion: a name in `CRITERIA`.
        statistics: calibration statistics of this network, if the criterion needs them.
        seed: if the criterion needs one.

    Returns:
        Scores by layer, float64 on the CPU.

    Raises:
        PruningError: no such criterion, a seed is missing, or a score is NaN or infinite.
        StatisticsError: statistics are missing or of another network.
    """
    chosen = lookup(CRITERIA, criterion, "criterion")
    if chosen.needs_statistics and statistics is None:
        raise StatisticsError(
            f"criterion {criterion!r} needs calibration statistics "
            f"({', '.join(chosen.moments)}); collect them first"
        )
    if chosen.needs_seed and seed is None:
        raise PruningError(f"criterion {criterion!r} draws random numbers; give it a seed")
    by_layer = {}
    for name in network.graph.prunable():
        values = chosen.score(ScoredLayer(network, name, statistics, seed)).cpu()
        if values.shape != (network.width(name),):
            raise StatisticsError(
                f"the statistics of layer {name!r} describe {len(values)} channels and the network "
                f"has {network.width(name)}; they were collected on another network"
            )
        if not bool(torch.isfinite(values).all()):
            raise PruningError(
                f"criterion {criterion!r} gives NaN or infinite scores in layer {name!r}; "
                "its weights are damaged"
            )
        by_layer[name] = values
    return by_layer
