import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pruning import (
    SPARSE,
    CalibrationBatch,
    Network,
    PruningError,
    collect,
    removed_count,
    sparsify,
    stored_bits,
)
from pruning.sparsity import Pattern, Reads, magnitude, ria, sparsegpt, wanda
from tests.pruning_networks import NERF_WIDTHS, heads, nerf_graph, random_inputs, random_network

WIDTHS = {name: min(width, 16) for name, width in NERF_WIDTHS.items()}
NETWORK = random_network(nerf_graph(), WIDTHS, seed=0)
INPUTS = random_inputs(NETWORK, 200, seed=1)
STATISTICS = collect(NETWORK, [CalibrationBatch(INPUTS)], ("gram",)).subset()


def reads(x: Tensor) -> Reads:
    one = torch.cat((x, torch.ones(len(x), 1, dtype=x.dtype)), dim=1)
    return Reads(one.T @ one / len(x))


def with_norms(*norms: float) -> Reads:
    return Reads(torch.diag(torch.tensor([*(n**2 for n in norms), 1.0], dtype=torch.float64)))


W = torch.tensor([[4.0, 1.0, -2.0, 3.0], [-1.0, 5.0, 2.0, -1.0]], dtype=torch.float64)


def kept(keep: Tensor) -> list[list[int]]:
    return keep.int().tolist()


def test_magnitude_by_hand() -> None:
    keep, sparse = magnitude(W, Reads(None), Pattern.of(0.5))
    # The three ones go first, then the −2 of the first row: it comes before the 2 of the second.
    assert kept(keep) == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert sparse.tolist() == [[4, 0, 0, 3], [0, 5, 2, 0]]


def test_wanda_by_hand() -> None:
    keep, _ = wanda(W, with_norms(1, 2, 3, 1), Pattern.of(0.5))
    # Scores 4 2 6 3 and 1 10 6 1; two of each row go.
    assert kept(keep) == [[1, 0, 1, 0], [0, 1, 1, 0]]


def test_ria_by_hand() -> None:
    keep, _ = ria(W, with_norms(1, 1, 4, 1), Pattern.of(0.375))
    # |W|/column sum + |W|/row sum: 4/5+4/10  1/6+1/10  2/4+2/10  3/4+3/10 = 1.2 .267 .7 1.05
    #                                1/5+1/9  5/6+5/9  2/4+2/9  1/4+1/9 = .311 1.389 .722 .361
    # times √norm = 1 1 2 1:         1.2 .267 1.4 1.05 / .311 1.389 1.444 .361
    assert kept(keep) == [[1, 0, 1, 1], [0, 1, 1, 0]]
    keep, _ = ria(W, with_norms(1, 1, 4, 1), Pattern.of(0.75))
    assert kept(keep) == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_two_of_four_by_hand() -> None:
    for method in (magnitude, wanda):
        keep, _ = method(W, with_norms(1, 2, 3, 1), Pattern.of("2:4"))
        assert keep.sum(dim=1).tolist() == [2, 2]
    keep, _ = magnitude(W, Reads(None), Pattern.of("2:4"))
    assert kept(keep) == [[1, 0, 0, 1], [0, 1, 1, 0]]


def test_sparsegpt_by_hand() -> None:
    """Two inputs of power 1 and covariance ½: H⁻¹ = [[4/3, −2/3], [−2/3, 4/3]], so that
    U = [[2/√3, −1/√3], [0, 1]]. Scores of the row (1, 2): 1/(4/3) = ¾ and 4: the first goes, and
    the second becomes 2 − (1 / (2/√3)) (−1/√3) = 2½, least squares of z = x₁ + 2x₂ on x₂."""
    H = torch.tensor([[1, 0.5, 0], [0.5, 1, 0], [0, 0, 1]], dtype=torch.float64)
    row = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    keep, sparse = sparsegpt(row, Reads(H), Pattern.of(0.5), damping=0.0)
    assert kept(keep) == [[0, 1]]
    torch.testing.assert_close(sparse, torch.tensor([[0, 2.5]], dtype=torch.float64))


@pytest.mark.parametrize("block", [3, 100])
def test_sparsegpt_equals_a_slow_reference(block: int) -> None:
    """Column by column, what is lost is solved for on the inputs that are still to come."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 7, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(7, 7, generator=generator, dtype=torch.float64)
    V = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    keep, sparse = sparsegpt(V, reads(x), Pattern.of(0.5), block=block, damping=1e-12)
    H = np.cov(x.numpy().T, bias=True)
    left, gone = V.numpy().copy(), np.zeros((4, 7), dtype=bool)
    for start in range(0, 7, block):
        part = list(range(start, min(start + block, 7)))
        scores = np.stack([left[:, j] ** 2 / np.linalg.inv(H[j:, j:])[0, 0] for j in part], axis=1)
        for flat in np.argsort(scores.ravel(), kind="stable")[: scores.size // 2]:
            gone[flat // len(part), part[flat % len(part)]] = True
        for j in part:
            rest = list(range(j + 1, 7))
            lost = np.where(gone[:, j], left[:, j], 0)
            left[:, j] -= lost
            if rest:
                left[:, rest] += np.outer(lost, np.linalg.solve(H[np.ix_(rest, rest)], H[rest, j]))
    np.testing.assert_array_equal(keep.numpy(), ~gone)
    np.testing.assert_allclose(sparse.numpy(), left, rtol=1e-6, atol=1e-8)


@given(
    method=st.sampled_from(sorted(SPARSE)),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    ratio=st.floats(0, 0.99),
    ties=st.booleans(),
    n=st.integers(1, 12),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_exact_counts_under_ties_and_singular_statistics(
    *, method: str, shape: tuple[int, int], ratio: float, ties: bool, n: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(*shape, generator=generator, dtype=torch.float64)
    V = torch.ones_like(V) if ties else V
    x = torch.randn(n, shape[1], generator=generator, dtype=torch.float64).relu()
    keep, sparse = SPARSE[method].of(V, reads(x), Pattern.of(ratio))
    gone = (~keep).sum(dim=1)
    if method == "wanda":
        assert gone.tolist() == [removed_count(ratio, shape[1])] * shape[0]
    else:
        assert int(gone.sum()) == removed_count(ratio, V.numel())
    assert (sparse[~keep] == 0).all()
    assert torch.isfinite(sparse).all()
    keep, sparse = SPARSE[method].of(V, reads(x), Pattern.of("2:4"))
    groups = torch.nn.functional.pad(keep, (0, -shape[1] % 4)).view(shape[0], -1, 4)
    assert (groups.sum(dim=2) <= 2).all()
    if method != "sparsegpt":
        assert torch.equal(sparse, V * keep)


@pytest.mark.parametrize("method", sorted(SPARSE))
@pytest.mark.parametrize("pattern", [0.0, 0.3, 0.9, "2:4", "1:4"])
def test_a_network_is_sparsified(method: str, pattern: float | str) -> None:
    sparse = sparsify(NETWORK, pattern, method, STATISTICS)
    for name, keep in sparse.keep.items():
        assert (sparse.network.weights[name][~keep] == 0).all()
    assert sparse.ratio == pytest.approx(Pattern.of(pattern).ratio, abs=0.03)
    if pattern == 0.0:
        assert all(torch.equal(sparse.network.weights[n], V) for n, V in NETWORK.weights.items())
        assert sparse.n_bytes() == 4 * NETWORK.parameters()


def test_sparsegpt_is_closest() -> None:
    def error(network: Network) -> float:
        dense, small = heads(NETWORK, INPUTS), heads(network, INPUTS)
        return sum(float((small[h] - dense[h]).square().mean() / dense[h].var()) for h in dense)

    errors = {m: error(sparsify(NETWORK, 0.3, m, STATISTICS).network) for m in SPARSE}
    assert min(errors, key=errors.__getitem__) == "sparsegpt"


def test_sizes_count_the_index() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(256, 256, generator=generator)
    half = scores > 0.5
    kept_half = int(half.sum())
    # A bitmap costs one bit a weight, a relative index four a kept weight.
    assert stored_bits(half, 32) == kept_half * 32 + 65_536
    few = scores > 0.97
    assert stored_bits(few, 8) < int(few.sum()) * 8 + 65_536
    assert stored_bits(torch.ones(4, 4, dtype=torch.bool), 8) == 16 * 8
    two = torch.tensor([[1, 1, 0, 0] * 4]).bool()
    assert stored_bits(two, 32) == min(8 * 34, 8 * 32 + 16)
    assert stored_bits(torch.zeros(4, 8, dtype=torch.bool), 32) == 0


def test_relative_indices_by_hand() -> None:
    """Kept at 2, 3 and 40 of 1,000: gaps 2, 0 and 36, and 36 takes two zeros on the way."""
    keep = torch.zeros(1, 1000, dtype=torch.bool)
    keep[0, [2, 3, 40]] = True
    assert stored_bits(keep, 32) == (3 + 2) * 36


def test_mistakes_are_named() -> None:
    for bad in ("4:2", "2-4", "0:4", "two:four"):
        with pytest.raises(PruningError, match="N:M"):
            sparsify(NETWORK, bad)
    with pytest.raises(PruningError, match=r"\[0, 1\)"):
        sparsify(NETWORK, 1.0)
    with pytest.raises(PruningError, match="did you mean 'wanda'"):
        sparsify(NETWORK, 0.5, "wand")
    with pytest.raises(PruningError, match="Gram matrix"):
        sparsify(NETWORK, 0.5, "wanda")
    broken = Network(NETWORK.graph, {**NETWORK.weights}, {**NETWORK.biases})
    broken.weights["trunk.6"] = broken.weights["trunk.6"] * float("nan")
    with pytest.raises(PruningError, match=r"'trunk\.6'"):
        sparsify(broken, 0.5)
