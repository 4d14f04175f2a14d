"""Criteria: how much each output channel of a layer matters.

A criterion is one pure function from a `ScoredLayer` to one number a channel; the channels with
the lowest numbers are removed first. A new criterion is one function and one line in `CRITERIA`.

Letters: W a layer's weight (out × in), a its output after the activation, j a channel, r an output
of a layer that reads it, V_rj the weight of r for channel j (the readers' columns, stacked), H the
Gram matrix of a reader's input, L the loss.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pruning.calibration import Statistics
from pruning.compensation import COMPENSATIONS
from pruning.elimination import elimination_paths
from pruning.errors import PruningError, StatisticsError
from pruning.lasso import opening_penalties
from pruning.network import Network
from pruning.registry import lookup
from pruning.solving import input_gram


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
    def outgoing(self) -> Float[Tensor, "rows channels"]:
        """V: the columns of every reader for this layer's channels, stacked (float64)."""
        columns = []
        for reader in self.network.graph.readers(self.name):
            part = self.network.input_slices(reader)[self.name]
            columns.append(self.network.weights[reader.name][:, part].double())
        return torch.cat(columns)

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
        return self.statistics.average(self.name, moment).to(self.incoming.device)

    def variance(self) -> Float[Tensor, " channels"]:
        """Var(a_j) over the calibration set (float64).

        Raises:
            StatisticsError: there are no statistics, or not the moments "mean" and "square".
        """
        return (self.average("square") - self.average("mean").square()).clamp(min=0)

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


def magnitude_l1(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """‖W_j,:‖₁, the sum of the absolute incoming weights; the bias is left out.

    Source: Li et al. 2017, section 3.1.
    """
    return torch.linalg.vector_norm(layer.incoming, ord=1, dim=1, dtype=torch.float64)


def outgoing(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """‖V_:,j‖₂, the norm of the weights with which the next layers read the channel.

    Source: He et al. 2014 (Reshaping deep neural network for fast decoding by node-pruning), the
    "output-weights norm".
    """
    return torch.linalg.vector_norm(layer.outgoing, dim=0)


def wanda(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """√E[a_j²] · ‖V_:,j‖₂: how much the channel moves what the next layers compute.

    Source: Sun et al. 2023 (Wanda), equation 1, summed in squares over a column.
    """
    return layer.average("square").sqrt() * outgoing(layer)


def fluctuation(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """Var(a_j) · Σ_r V_rj², standardised: how far from its mean the channel moves the next layers.

    Minus the layer's mean score, divided by the layer's standard deviation (0 for a layer whose
    channels all score the same), which is what makes layers comparable in a global ranking.

    Source: An et al. 2024 (FLAP), equations 4 and 5.
    """
    raw = layer.variance() * layer.outgoing.square().sum(dim=0)
    spread = raw.std(correction=0)
    return (raw - raw.mean()) / spread if spread > 0 else torch.zeros_like(raw)


def thinet(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """The order in which a greedy search removes channels: rank 0 goes first.

    The removed set T grows by the channel that adds least to the energy of what is missing:

        E‖Σ_{j∈T} V_:,j a_j‖² = Σ_{i,j∈T} Q_ij,   Q = (VᵀV) ∘ E[a aᵀ]

    Source: Luo et al. 2017 (ThiNet), equation 6 and algorithm 1.
    """
    Q = contributions(layer)
    added, ranks = Q.diagonal().clone(), torch.empty(layer.channels, dtype=torch.float64)
    for rank in range(layer.channels):
        j = int(added.argmin())
        ranks[j] = rank
        added += 2 * Q[:, j]
        added[j] = torch.inf
    return ranks


def contributions(layer: ScoredLayer) -> Float[Tensor, "channels channels"]:
    """Q = (VᵀV) ∘ E[a aᵀ]: E[(V_:,i a_i)ᵀ (V_:,j a_j)], what channels add to the next layers.

    Raises:
        StatisticsError: the moment "gram" was not collected.
    """
    Q = torch.zeros(layer.channels, layer.channels, dtype=torch.float64)
    for reader in layer.network.graph.readers(layer.name):
        part = layer.network.input_slices(reader)[layer.name]
        W = layer.network.weights[reader.name][:, part].double()
        H = input_gram(layer.network, reader, layer.statistics)[part, part]
        Q += ((W.T @ W) * H).cpu()
    return Q


def lasso(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """The strongest penalty λ under which the channel's gate stays open.

    Each channel gets a gate β_j, and what the next layers read of the layer is to stay the same:

        minimise over β   ½ E‖Σ_j (1 − β_j) V_:,j a_j‖² + λ ‖β‖₁

    λ falls until as many gates are open as channels stay. A gate that opens, shuts and opens again
    counts from the last time, so that what a larger ratio keeps a smaller one keeps too. One that
    never opens (a dead channel) scores 0.

    Source: He et al. 2017, equation 2, solved for all λ by following its path (see
    `pruning.lasso`); they search λ for one number of channels.
    """
    return opening_penalties(contributions(layer))


def obs(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """The order of the layer's elimination path: rank 0 goes first.

    At each step the channel with the lowest Σ_r V_rj² / [H⁻¹]_jj goes, and the others take over
    what they can of it (see `pruning.elimination`).

    Source: Hassibi and Stork 1993; Kurtić et al. 2023 (ZipLM), equation 2.
    """
    if layer.statistics is None:
        raise StatisticsError(f"layer {layer.name!r} cannot be scored without statistics")
    paths = elimination_paths({"": layer.network}, {"": layer.statistics}, layers=(layer.name,))
    return paths[""][layer.name].ranks()


def sensitivity(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """The largest share that the channel ever has in what an output of the next layers sums up.

    s_j = max over samples, outputs r and signs of (±V_rj a_j)⁺ / Σ_k (±V_rk x_k)⁺.

    Source: Liebenwein et al. 2020 (PFP), definition 1.
    """
    if layer.statistics is None:
        raise StatisticsError(f"layer {layer.name!r} cannot be scored without statistics")
    shares = [
        layer.statistics.average(reader.name, "sensitivity")[
            layer.network.input_slices(reader)[layer.name]
        ]
        for reader in layer.network.graph.readers(layer.name)
    ]
    return torch.stack(shares).amax(dim=0)


def taylor(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """|E[a_j ∂L/∂a_j]|: what the loss changes by when the channel is set to 0, to first order.

    Source: Molchanov et al. 2017, equation 8, the average over all samples inside the modulus.
    """
    return layer.average("taylor").abs()


def taylor_fo2(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """E[(Σ_run a_j ∂L/∂a_j)²]: the squared effect on the loss, run by run (a run is a ray, say).

    Behind a ReLU Σ a ∂L/∂a is W_j,: · ∂L/∂W_j,: + b_j ∂L/∂b_j, the sum in the paper's score.

    Source: Molchanov et al. 2019, equation 8 with every run as its own minibatch.
    """
    return layer.average("taylor_square")


def fisher(layer: ScoredLayer) -> Float[Tensor, " channels"]:
    """½ E[(∂L/∂z_j)²] E[a_j²]: the second-order cost of setting the channel to 0.

    The Fisher diagonal stands for the Hessian's; gradient and activation are taken as independent.

    Source: LeCun et al. 1990 (Optimal Brain Damage), equation 5; Theis et al. 2018 (Fisher
    pruning), equation 6, for the Fisher information in the Hessian's place.
    """
    return layer.average("fisher") * layer.average("square") / 2


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
        gradients: the moments that it reads and only `gradients.collect_gradients` collects.
    """

    score: ScoreFunction
    moments: tuple[str, ...] = ()
    needs_seed: bool = False
    gradients: tuple[str, ...] = ()

    @property
    def needs_statistics(self) -> bool:
        """Whether a calibration set has to be run through the network first."""
        return bool(self.moments or self.gradients)


CRITERIA: dict[str, Criterion] = {
    "activation": Criterion(activation, moments=("mean",)),
    "fisher": Criterion(fisher, moments=("square",), gradients=("fisher",)),
    "fluctuation": Criterion(fluctuation, moments=("mean", "square")),
    "lasso": Criterion(lasso, moments=("gram",)),
    "magnitude": Criterion(magnitude),
    "magnitude_l1": Criterion(magnitude_l1),
    "obs": Criterion(obs, moments=("gram",)),
    "outgoing": Criterion(outgoing),
    "random": Criterion(random, needs_seed=True),
    "sensitivity": Criterion(sensitivity, moments=("sensitivity",)),
    "taylor": Criterion(taylor, gradients=("taylor",)),
    "taylor_fo2": Criterion(taylor_fo2, gradients=("taylor_square",)),
    "thinet": Criterion(thinet, moments=("gram",)),
    "wanda": Criterion(wanda, moments=("square",)),
}
"""The criteria by the name that a sweep file uses."""


def moments_for(
    criteria: str | Iterable[str], compensations: str | Iterable[str] = ()
) -> tuple[str, ...]:
    """The moments that a calibration pass must collect to serve these criteria and compensations.

    A lone name stands for itself, not for its letters.
    Those that need gradients come from `collect_gradients` and are not among them.
    """
    needed = {m for name in _each(criteria) for m in lookup(CRITERIA, name, "criterion").moments}
    for name in _each(compensations):
        needed |= set(lookup(COMPENSATIONS, name, "compensation").moments)
    return tuple(sorted(needed))


def gradients_for(criteria: str | Iterable[str]) -> tuple[str, ...]:
    """The moments that these criteria read and only `collect_gradients` collects."""
    found = {m for name in _each(criteria) for m in lookup(CRITERIA, name, "criterion").gradients}
    return tuple(sorted(found))


def _each(names: str | Iterable[str]) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names


def needs_gradients(criteria: str | Iterable[str]) -> bool:
    """Whether one of these criteria reads what only `collect_gradients` collects."""
    return bool(gradients_for(criteria))


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
            f"({', '.join(chosen.moments + chosen.gradients)}); collect them first"
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
