"""Single weights set to zero: unstructured and N:M masks, and what they really take to store.

Channels stay where they are; only entries of the weight matrices go. The files get smaller only
after paying for the index that says which entries are left, and a plain matrix product gets no
faster, so these methods are here to be compared with the others honestly.

A method is one function (W, what the layer reads, pattern) → (keep mask, weights). A new one is one
function and one line in `SPARSE`. Exactly as many weights go as were asked for, also under ties
(the lowest index first); SparseGPT counts in each of its blocks.

Letters: W a layer's weight (out × in), i an output, j an input, x what the layer reads, p the ratio
of weights to remove, N:M at most N of M consecutive inputs kept.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pruning.allocation import check_ratio
from pruning.calibration import Statistics
from pruning.errors import PruningError
from pruning.network import Network
from pruning.registry import lookup
from pruning.selection import removed_count
from pruning.solving import DAMPING, damped, input_gram, inverse

# -------------------------------------------------------------------------------------- patterns


@dataclass(frozen=True)
class Pattern:
    """Which weights may go.

    Attributes:
        ratio: p, the fraction to remove; of an N:M pattern 1 − N/M.
        n: N, or 0 without a pattern.
        m: M, or 0 without a pattern.
    """

    ratio: float
    n: int = 0
    m: int = 0

    @classmethod
    def of(cls, wanted: float | str) -> "Pattern":
        """A ratio in [0, 1), or ``"2:4"``.

        Raises:
            PruningError: neither of them.
        """
        if not isinstance(wanted, str):
            return cls(check_ratio(wanted, "a ratio of weights to remove"))
        n, _, m = wanted.partition(":")
        if not (n.isdigit() and m.isdigit() and 0 < int(n) < int(m)):
            raise PruningError(
                "a pattern is a ratio in [0, 1), or N:M with 0 < N < M such as '2:4'; "
                f"got {wanted!r}"
            )
        return cls(1 - int(n) / int(m), int(n), int(m))


@dataclass(frozen=True)
class Reads:
    """What a layer reads, as far as methods look at it.

    Attributes:
        gram: E[[x; 1][x; 1]ᵀ]; None where no statistics were given.
    """

    gram: Float[Tensor, "n1 n1"] | None

    def norms(self) -> Float[Tensor, " in"]:
        """√E[x_j²], which ranks as ‖x_j‖₂ over the calibration set does.

        Raises:
            PruningError: there are no statistics.
        """
        return self.needed().diagonal()[:-1].clamp(min=0).sqrt()

    def needed(self) -> Float[Tensor, "n1 n1"]:
        """The Gram matrix.

        Raises:
            PruningError: there are no statistics.
        """
        if self.gram is None:
            raise PruningError("this method needs calibration statistics; collect 'gram' first")
        return self.gram


Sparse = tuple[Bool[Tensor, "out in"], Float[Tensor, "out in"]]
"""(keep mask, weights with the removed entries at 0)."""


def lowest(scores: Float[Tensor, "rows columns"], count: int) -> Bool[Tensor, "rows columns"]:
    """In each row, the `count` lowest scores; ties go from the left."""
    gone = torch.zeros_like(scores, dtype=torch.bool)
    return gone.scatter_(1, torch.argsort(scores, dim=1, stable=True)[:, :count], True)


def _keep(scores: Float[Tensor, "out in"], pattern: Pattern, by_row: bool) -> Tensor:
    """The keep mask of a pattern by scores, within rows or over the whole layer."""
    if pattern.m:
        return ~_lowest_of_groups(scores, pattern)
    if by_row:
        return ~lowest(scores, _count(pattern, scores.shape[1]))
    return ~lowest(scores.flatten()[None], _count(pattern, scores.numel())).view(scores.shape)


def _lowest_of_groups(scores: Float[Tensor, "out in"], pattern: Pattern) -> Tensor:
    """All but the N highest of each M; a shorter group at the end keeps up to N as well."""
    gone = [lowest(part, max(0, part.shape[1] - pattern.n)) for part in scores.split(pattern.m, 1)]
    return torch.cat(gone, dim=1)


def _count(pattern: Pattern, n: int) -> int:
    return removed_count(pattern.ratio, n) if n else 0


# --------------------------------------------------------------------------------------- methods


def magnitude(W: Float[Tensor, "out in"], reads: Reads, pattern: Pattern) -> Sparse:
    """|W_ij|, over the whole layer.

    Source: Han et al. 2015 (learning both weights and connections), section 3.
    """
    del reads
    keep = _keep(W.abs(), pattern, by_row=False)
    return keep, W * keep


def wanda(W: Float[Tensor, "out in"], reads: Reads, pattern: Pattern) -> Sparse:
    """|W_ij| ‖x_j‖₂, within each output.

    Source: Sun et al. 2023 (Wanda), equation 1 and section 3 (comparison group: an output).
    """
    keep = _keep(W.abs() * reads.norms(), pattern, by_row=True)
    return keep, W * keep


def ria(W: Float[Tensor, "out in"], reads: Reads, pattern: Pattern, power: float = 0.5) -> Sparse:
    """(|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) ‖x_j‖₂^½, over the whole layer.

    Source: Zhang et al. 2024 (RIA), equations 3 and 4, with their a = 0.5.
    """
    size = W.abs()
    columns, rows = size.sum(dim=0, keepdim=True), size.sum(dim=1, keepdim=True)
    relative = size / columns.clamp(min=1e-300) + size / rows.clamp(min=1e-300)
    keep = _keep(relative * reads.norms() ** power, pattern, by_row=False)
    return keep, W * keep


def sparsegpt(
    W: Float[Tensor, "out in"],
    reads: Reads,
    pattern: Pattern,
    block: int = 128,
    damping: float = DAMPING,
) -> Sparse:
    """W_ij² / U_jj² block by block, and later columns make up for what earlier ones lose.

    With U the upper Cholesky factor of H⁻¹ (UᵀU = H⁻¹, H damped, its constant taken out), columns
    go from left to right. When a block of 128 columns (or the next M of N:M) is reached, the lowest
    W_ij² / U_jj² within it are chosen as they stand by then. Each column j then passes on

        δ = W_:,j (1 − kept) / U_jj,    W_:,k ← W_:,k − δ U_jk  for the columns k after j

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1.
    """
    gram = reads.needed()
    mean = gram[:-1, -1]
    H = damped(gram, damping)[:-1, :-1] - torch.outer(mean, mean)
    upper = torch.linalg.cholesky(inverse(H), upper=True)
    left, keep = W.clone(), torch.ones_like(W, dtype=torch.bool)
    size = pattern.m or block
    for start in range(0, W.shape[1], size):
        part = slice(start, min(start + size, W.shape[1]))
        scores = left[:, part].square() / upper.diagonal()[part].square()
        keep[:, part] = _keep(scores, pattern, by_row=False)
        for j in range(part.start, part.stop):
            lost = left[:, j] * ~keep[:, j]
            left[:, j] -= lost
            left[:, j + 1 :] -= torch.outer(lost / upper[j, j], upper[j, j + 1 :])
    return keep, left


@dataclass(frozen=True)
class SparseMethod:
    """A registered method and whether it needs the Gram matrix."""

    of: Callable[[Tensor, Reads, Pattern], Sparse]
    moments: tuple[str, ...] = ()


SPARSE: dict[str, SparseMethod] = {
    "magnitude": SparseMethod(magnitude),
    "ria": SparseMethod(ria, moments=("gram",)),
    "sparsegpt": SparseMethod(sparsegpt, moments=("gram",)),
    "wanda": SparseMethod(wanda, moments=("gram",)),
}
"""The methods by the name that a sweep file uses."""


@dataclass(frozen=True)
class Sparsified:
    """A network with zeros in its weights.

    Attributes:
        network: of the dense shape.
        keep: which weights stay, by layer.
    """

    network: Network
    keep: Mapping[str, Bool[Tensor, "_out _in"]]

    @property
    def total(self) -> int:
        """Weights of the dense network."""
        return sum(keep.numel() for keep in self.keep.values())

    @property
    def removed(self) -> int:
        """How many of them went."""
        return sum(int((~keep).sum()) for keep in self.keep.values())

    @property
    def ratio(self) -> float:
        """Fraction removed of all weights."""
        return self.removed / self.total

    @property
    def nonzero_parameters(self) -> int:
        """Weights that are left, and all biases."""
        return self.network.parameters() - self.removed

    def n_bytes(self, bits: int = 32) -> int:
        """Bytes to store the network, the index included (see `stored_bits`).

        Args:
            bits: a weight or bias that is stored.
        """
        stored = sum(stored_bits(keep, bits) for keep in self.keep.values())
        return math.ceil((stored + bits * sum(b.numel() for b in self.network.biases.values())) / 8)


def stored_bits(keep: Bool[Tensor, "out in"], bits: int) -> int:
    """Bits that one sparse weight matrix takes, in the cheapest of four forms.

    Dense; a bitmap and the kept values; relative indices of 4 bits (a gap over 15 stores a zero, as
    in Deep Compression); and, where each 4 inputs keep at most 2, the 2:4 form: two values and two
    2-bit places a group.

    Args:
        keep: which weights stay.
        bits: a stored value.

    Source: Han et al. 2016 (Deep Compression), section 2, for the relative index.
    """
    kept = int(keep.sum())
    forms = [keep.numel() * bits, kept * bits + keep.numel()]
    at = torch.nonzero(keep.flatten())[:, 0]
    gaps = torch.diff(at, prepend=torch.tensor([-1], device=at.device)) - 1
    forms.append((kept + int((gaps // 16).sum())) * (bits + 4))
    if keep.shape[1] % 4 == 0 and bool((keep.view(len(keep), -1, 4).sum(dim=2) <= 2).all()):
        forms.append(keep.numel() // 4 * 2 * (bits + 2))
    return min(forms)


def sparsify(
    network: Network,
    pattern: float | str,
    method: str = "magnitude",
    statistics: Statistics | None = None,
) -> Sparsified:
    """Set single weights to zero, the same fraction in each layer.

    Args:
        network: it is not changed.
        pattern: the fraction of each layer's weights to remove, or ``"2:4"``.
        method: a name in `SPARSE`.
        statistics: of this network, with the moment "gram", if the method needs them.

    Raises:
        PruningError: no such method or pattern, statistics are missing, or a weight is NaN or
            infinite.
        StatisticsError: statistics are of another network.
    """
    chosen, wanted = lookup(SPARSE, method, "sparse method"), Pattern.of(pattern)
    weights, biases, keep = {}, {}, {}
    for layer in network.graph.layers:
        W, b = network.weights[layer.name], network.biases[layer.name]
        if not bool(torch.isfinite(W).all()):
            raise PruningError(f"the weights of layer {layer.name!r} are NaN or infinite")
        gram = input_gram(network, layer, statistics) if chosen.moments else None
        kept, sparse = chosen.of(W.double(), Reads(gram), wanted)
        if method == "sparsegpt" and gram is not None:
            # H is without the constant, so the bias takes over the mean of what is lost.
            b = (b.double() + (W.double() - sparse) @ gram[:-1, -1]).to(b.dtype)
        weights[layer.name], biases[layer.name] = sparse.to(W.dtype), b.clone()
        keep[layer.name] = kept
    return Sparsified(Network(network.graph, weights, biases), keep)
