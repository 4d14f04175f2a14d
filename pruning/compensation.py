"""Compensation: what the readers of removed channels do about it.

A compensation is one function (dense network, keep masks, statistics) → smaller network. A new one
is one function and one line in `COMPENSATIONS`. All take the same channels out; they differ in the
weights and biases that the readers are left with:

============== =========================== =====================================================
name           statistics                  the readers
============== =========================== =====================================================
none           –                           go on reading the constant relu(b_j) of each removed
                                           channel: equal to masking its weights (`surgery`)
mean_fold      "mean"                      read the channel's mean E[x_j] instead
least_squares  "gram"                      are solved anew on the kept inputs
obs            "gram"                      the same, in the form of the elimination path
sequential     –                           are solved layer after layer on what the pruned layers
                                           before really produce; needs the calibration batches
============== =========================== =====================================================

Letters: W, b a layer's weight and bias, V = [W | b], x what it reads, x̃ what it reads once the
layers before it are pruned, H = E[[x; 1][x; 1]ᵀ] (see `pruning.solving`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.calibration import (
    CalibrationBatch,
    Statistics,
    check_weights,
    checked_batch,
)
from pruning.errors import PruningError, StatisticsError
from pruning.network import Layer, Network
from pruning.registry import lookup
from pruning.selection import KeepMasks
from pruning.solving import DAMPING, damped, input_gram, obs_update, solve_kept, with_bias
from pruning.surgery import remove

CompensationFunction = Callable[[Network, KeepMasks, Statistics | None], Network]


def none(network: Network, keep: KeepMasks, statistics: Statistics | None = None) -> Network:
    """The constant fold: equal to masking the channels' weights, which leaves relu(b_j) behind.

    Where a channel emits nothing but its constant this loses nothing. `statistics` are not read.
    """
    del statistics
    return remove(network, keep)


def mean_fold(network: Network, keep: KeepMasks, statistics: Statistics | None) -> Network:
    """b_reader += Σ_j W_reader[:, j] E[x_j]: the best that the bias alone can do.

    Source: An et al. 2024 (FLAP), equation 6.

    Raises:
        StatisticsError: the moment "mean" was not collected.
    """
    means = {}
    for name in keep:
        if statistics is None:
            raise StatisticsError("mean_fold needs calibration statistics; collect 'mean' first")
        means[name] = statistics.average(name, "mean")
        if means[name].shape != (network.width(name),):
            raise StatisticsError(
                f"the statistics of layer {name!r} describe {len(means[name])} channels and the "
                f"network has {network.width(name)}; they were collected on another network"
            )
    return remove(network, keep, constants=means)


def least_squares(
    network: Network,
    keep: KeepMasks,
    statistics: Statistics | None,
    damping: float = DAMPING,
) -> Network:
    """U = V_S + V_R H_RS H_SS⁻¹ in every reader, on the dense network's Gram matrices.

    Source: He et al. 2017, equation 4; Luo et al. 2017, section 3.2.4. See `solving.solve_kept`.

    Raises:
        StatisticsError: the moment "gram" was not collected.
    """
    return _solved(network, keep, statistics, damping, solve_kept)


def obs(
    network: Network,
    keep: KeepMasks,
    statistics: Statistics | None,
    damping: float = DAMPING,
) -> Network:
    """U = V_S − V_R ([H⁻¹]_RR)⁻¹ [H⁻¹]_RS: the weights at the end of the elimination path.

    The optimum that `least_squares` finds, in the form of optimal brain surgeon: the two differ by
    rounding. It inverts H once a layer, least squares only the part that is kept.

    Source: Hassibi and Stork 1993; Kurtić et al. 2023 (ZipLM), equation 3.

    Raises:
        StatisticsError: the moment "gram" was not collected.
    """
    return _solved(network, keep, statistics, damping, obs_update)


@dataclass(frozen=True)
class Compensation:
    """A registered compensation and what it needs.

    Attributes:
        of: what it does, from statistics; None where it goes through the batches itself.
        moments: the calibration moments that it reads.
    """

    of: CompensationFunction | None
    moments: tuple[str, ...] = ()

    @property
    def needs_batches(self) -> bool:
        """Whether it goes through the calibration batches again, once the channels are chosen."""
        return self.of is None

    @property
    def needs_data(self) -> bool:
        """Whether there has to be a calibration set."""
        return self.needs_batches or bool(self.moments)


COMPENSATIONS: dict[str, Compensation] = {
    "none": Compensation(none),
    "mean_fold": Compensation(mean_fold, moments=("mean",)),
    "least_squares": Compensation(least_squares, moments=("gram",)),
    "obs": Compensation(obs, moments=("gram",)),
    "sequential": Compensation(None),
}
"""The compensations by the name that a sweep file uses."""


def compensate(
    network: Network,
    keep: KeepMasks,
    compensation: str,
    statistics: Statistics | None = None,
    batches: Iterable[CalibrationBatch] | None = None,
) -> Network:
    """Take channels out and make up for them.

    Args:
        network: the dense network; it is not changed.
        keep: which channels stay, by layer; a layer left out keeps them all.
        compensation: a name in `COMPENSATIONS`.
        statistics: of the dense network, if the compensation needs them.
        batches: calibration batches that can be gone through again and again, if it needs those.

    Raises:
        PruningError: no such compensation, a mask does not fit, or the weights that come out are
            not finite.
        StatisticsError: statistics or batches are missing or of another network.
    """
    chosen = lookup(COMPENSATIONS, compensation, "compensation")
    if chosen.of is not None:
        smaller = chosen.of(network, keep, statistics)
    elif batches is None:
        raise StatisticsError(
            f"compensation {compensation!r} goes through the calibration batches again; give them"
        )
    else:
        smaller = sequential(network, keep, batches)
    for name in smaller.weights:
        if not _all_finite(smaller.weights[name], smaller.biases[name]):
            raise PruningError(
                f"compensation {compensation!r} gives NaN or infinite weights in layer {name!r}; "
                "use more damping or check that the model's weights are finite"
            )
    return smaller


def sequential(
    network: Network,
    keep: KeepMasks,
    batches: Iterable[CalibrationBatch],
    damping: float = DAMPING,
) -> Network:
    """Solve each layer on what the already pruned layers before it really produce.

    With x̃ the kept inputs as the smaller network computes them and z = W x + b what the dense layer
    computes from its own inputs:

        minimise over U   E‖z − U [x̃; 1]‖²  +  λ ‖U − V_S‖²      (the bias is not held back)

    so that a layer also repairs what the layers before it could not. The data are run through once
    for each layer whose inputs changed.

    Args:
        network: the dense network; it is not changed.
        keep: which channels stay, by layer; a layer left out keeps them all.
        batches: calibration batches that can be gone through again and again: a list, or an object
            whose ``__iter__`` starts afresh. Cells do not matter.
        damping: λ as a fraction of the mean power of x̃.

    Source: He et al. 2017, section 3.2 ("whole model pruning"), with the dense outputs as target.

    Raises:
        PruningError: the batches can be read only once, or a mask does not fit.
        StatisticsError: a batch does not fit the network, or holds NaN or infinite values.
    """
    if isinstance(batches, Iterator):
        raise PruningError(
            "sequential solving goes through the calibration batches once for each layer; give a "
            "list, or an object that can be iterated over again, not a generator"
        )
    check_weights(network)
    smaller = remove(network, keep)
    keep = {name: kept for name, kept in keep.items() if not bool(kept.all())}
    changed: set[str] = set()
    for layer in network.graph.layers:
        if any(name in keep or name in changed for name in layer.inputs):
            changed.add(layer.name)
            cross, own = _cross_grams(network, smaller, layer, batches)
            V = with_bias(network, layer.name)
            rows = keep[layer.name].to(V.device) if layer.name in keep else slice(None)
            V = V[rows]
            kept = torch.cat((_kept_inputs(network, layer, keep), V.new_ones(1, dtype=torch.bool)))
            ridge = damped(own, damping)
            # λ only, so that the penalty pulls towards V_S.
            target = V @ cross + V[:, kept] @ (ridge - own)
            U = _solve_right(target, ridge)
            smaller = _with_layer(smaller, layer.name, U)
    return smaller


def _cross_grams(
    network: Network, smaller: Network, layer: Layer, batches: Iterable[CalibrationBatch]
) -> tuple[Float[Tensor, "n1 k1"], Float[Tensor, "k1 k1"]]:
    """E[[x; 1][x̃; 1]ᵀ] and E[[x̃; 1][x̃; 1]ᵀ] at one layer."""
    cross = own = torch.zeros(())
    weight = 0.0
    for batch in batches:
        inputs, w = checked_batch(network, batch, layer.name)
        x, x_pruned = (_input_of(net, layer.name, inputs) for net in (network, smaller))
        if w is None:
            w = x.new_ones(len(x))
        scaled = w[:, None] * x_pruned
        cross = cross + x.T @ scaled
        own = own + x_pruned.T @ scaled
        weight += float(w.sum())
    if not weight > 0:
        raise StatisticsError(
            "the calibration batches hold no sample of any weight; give at least one"
        )
    if not _all_finite(cross, own):
        raise StatisticsError(f"what layer {layer.name!r} reads is NaN or infinite")
    return cross / weight, (own + own.T) / (2 * weight)


def _input_of(
    network: Network, name: str, inputs: Mapping[str, Tensor]
) -> Float[Tensor, "samples n1"]:
    """[x; 1] of a layer, float64."""
    with torch.no_grad():
        for layer, x, _ in network.activations(inputs):
            if layer.name == name:
                return torch.cat((x.double(), x.new_ones(len(x), 1).double()), dim=1)
    raise PruningError(f"no layer {name!r}")


def _solve_right(B: Float[Tensor, "rows n"], H: Float[Tensor, "n n"]) -> Float[Tensor, "rows n"]:
    """B H⁻¹."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if int(failed) == 0:
        return torch.cholesky_solve(B.T, factor).T
    return B @ torch.linalg.pinv(H, hermitian=True)


def _solved(
    network: Network,
    keep: KeepMasks,
    statistics: Statistics | None,
    damping: float,
    solve: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Network:
    """Each reader solved on the Gram matrix of the dense network's inputs."""
    smaller = remove(network, keep)
    for layer in network.graph.layers:
        if not any(name in keep and not bool(keep[name].all()) for name in layer.inputs):
            continue
        H = damped(input_gram(network, layer, statistics), damping)
        kept = torch.cat((_kept_inputs(network, layer, keep), H.new_ones(1, dtype=torch.bool)))
        V = with_bias(network, layer.name)
        rows = keep[layer.name].to(V.device) if layer.name in keep else slice(None)
        smaller = _with_layer(smaller, layer.name, solve(V[rows], H, kept))
    return smaller


def _kept_inputs(network: Network, layer: Layer, keep: KeepMasks) -> Bool[Tensor, " n"]:
    """Which columns of a layer's weight stay."""
    W = network.weights[layer.name]
    kept = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
    for name, columns in network.input_slices(layer).items():
        if name in keep:
            kept[columns] = keep[name].to(W.device)
    return kept


def _with_layer(network: Network, name: str, V: Float[Tensor, "out n1"]) -> Network:
    """The network with one layer's weight and bias replaced by V = [W | b]."""
    W, b = network.weights[name], network.biases[name]
    return Network(
        network.graph,
        {**network.weights, name: V[:, :-1].to(W.dtype).contiguous()},
        {**network.biases, name: V[:, -1].to(b.dtype).contiguous()},
    )


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
