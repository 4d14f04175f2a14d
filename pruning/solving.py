"""Least squares on a Gram matrix: what a layer's weights become when some inputs are taken away.

A layer computes z = W x + b = V [x; 1], V = [W | b]. Without the inputs R (removed), the inputs S
and the constant have to do:

    minimise over U   E‖V [x; 1] − U [x; 1]_S‖²  +  λ ‖[V]_S∖c − [U]_S∖c‖² + λ ‖V_R‖²
    U = V_S + V_R H_RS H_SS⁻¹,     H = E[[x; 1][x; 1]ᵀ] + λ·diag(1, …, 1, 0)

so the penalty pulls towards the weights that are there, and leaves the bias alone. λ is a small
multiple of the mean power of the inputs; between 1e-3 and 1e-7 it hardly matters, and it is what
keeps H invertible when inputs are dead, constant or fewer samples than inputs were seen.

Letters: V = [W | b] (out × in+1), H the damped Gram matrix with the constant last, S inputs kept,
R inputs removed, U the weights on S. In shapes n1 is n + 1, the inputs and the constant.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.calibration import Statistics
from pruning.errors import PruningError, StatisticsError
from pruning.network import Layer, Network

DAMPING = 1e-4
"""λ as a fraction of the mean power of the inputs."""


def damped(gram: Float[Tensor, "n1 n1"], damping: float = DAMPING) -> Float[Tensor, "n1 n1"]:
    """H: the Gram matrix with λ = damping · mean E[x_j²] added for each input but the constant.

    If every input is dead, λ = damping.

    Raises:
        PruningError: damping is not a number from 0 up.
    """
    if not 0 <= damping < float("inf"):
        raise PruningError(f"damping must be 0 or more (1e-4 is usual), got {damping!r}")
    power = gram.diagonal()[:-1]
    scale = power.mean() if bool((power > 0).any()) else power.new_ones(())
    ridge = torch.full_like(gram.diagonal(), damping) * scale
    ridge[-1] = 0
    return gram + torch.diag(ridge)


def inverse(
    H: Float[Tensor, "n n"],
) -> Float[Tensor, "n n"]:
    """H⁻¹ of a symmetric positive matrix; the pseudo-inverse where it is singular in float64."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if int(failed) == 0:
        return torch.cholesky_inverse(factor)
    return torch.linalg.pinv(H, hermitian=True)


def solve_kept(
    V: Float[Tensor, "out n1"],
    H: Float[Tensor, "n1 n1"],
    kept: Bool[Tensor, " n1"],
) -> Float[Tensor, "out kept"]:
    """U = V_S + V_R H_RS H_SS⁻¹: the best weights on the kept inputs.

    Args:
        V: the weights and, as last column, the bias.
        H: the damped Gram matrix.
        kept: S (True = kept); its last entry, the constant, is True.

    Source: the normal equations; He et al. 2017 (equation 4) and Luo et al. 2017 (equation 7) use
    the same least squares. Exact to the bit when nothing is removed.
    """
    if bool(kept.all()):
        return V.clone()
    target = V[:, ~kept] @ H[~kept][:, kept]
    H_kept = H[kept][:, kept]
    factor, failed = torch.linalg.cholesky_ex(H_kept)
    if int(failed) == 0:
        return V[:, kept] + torch.cholesky_solve(target.T, factor).T
    return V[:, kept] + target @ torch.linalg.pinv(H_kept, hermitian=True)


def obs_update(
    V: Float[Tensor, "out n1"],
    H: Float[Tensor, "n1 n1"],
    kept: Bool[Tensor, " n1"],
) -> Float[Tensor, "out kept"]:
    """U = V_S − V_R ([H⁻¹]_RR)⁻¹ [H⁻¹]_RS: where eliminating R one input at a time ends.

    Equal to `solve_kept` in exact arithmetic; this is the form that the elimination path takes.

    Source: Kurtić et al. 2023 (ZipLM), equation 3, after Hassibi and Stork 1993.
    """
    if bool(kept.all()):
        return V.clone()
    inverted = inverse(H)
    removed = ~kept
    return V[:, kept] - V[:, removed] @ torch.linalg.solve(
        inverted[removed][:, removed], inverted[removed][:, kept]
    )


def input_gram(
    network: Network, layer: Layer, statistics: Statistics | None
) -> Float[Tensor, "n1 n1"]:
    """E[[x; 1][x; 1]ᵀ] of a layer's input, on the layer's device.

    Raises:
        StatisticsError: it was not collected, or on another network.
    """
    if statistics is None:
        raise StatisticsError(
            f"the Gram matrix of what layer {layer.name!r} reads is needed; collect the moment "
            "'gram' first"
        )
    gram = statistics.average(layer.name, "gram")
    W = network.weights[layer.name]
    if len(gram) != W.shape[1] + 1:
        raise StatisticsError(
            f"the statistics of layer {layer.name!r} describe {len(gram) - 1} inputs and the layer "
            f"has {W.shape[1]}; they were collected on another network"
        )
    return gram.to(W.device)


def with_bias(network: Network, name: str) -> Float[Tensor, "out n1"]:
    """V = [W | b] of a layer in float64."""
    W, b = network.weights[name].double(), network.biases[name].double()
    return torch.cat((W, b[:, None]), dim=1)
