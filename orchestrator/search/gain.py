"""What a proposal is expected to add to the hypervolume of two objectives, with its gradient.

Two Gaussian processes have seen n trials; r more run. What those will give is drawn S times from
the processes, and a proposal's gain is its mean over the draws, as in Optuna's ``qLogEHVI``. What
makes it cheap here: the running trials become data of the processes, and the region that a front
of two objectives leaves free is cut into strips by sorting.

Letters: X the trials of both kinds, k(x) = k(x, X), K = LLᵀ their covariance, u = L⁻¹y of those
that were measured, ε_s normal numbers of draw s for those that run, and ε'_s for the proposal::

    v(x)   = L⁻¹k(x)        y_s(x) = v(x)ᵀ·[u, ε_s] + ε'_s·√(k(x, x) − |v(x)|²)
    gain_s = Σ_i min(y_s⁰ − a_(i+1), a_i − a_(i+1))₊ · (y_s¹ − b_i)₊

for a front (a_i, b_i) of which a falls, with a_0 = ∞; b_0 and a_(m+1) are the reference point's.
Both objectives are to be large.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Added to the variance of what is drawn, so that trials close to each other can be told apart.
JITTER = 1e-9
# Least width and height of what a proposal adds: the logarithm of nothing has no gradient.
LEAST = 1e-12


@dataclass(frozen=True)
class Process:
    """A Gaussian process with a Matérn kernel (ν = 5/2) that was fitted to one objective.

    Attributes:
        weights: inverse squared length scale of each parameter.
        scale: variance before anything was measured.
        noise: variance of a measurement.
        points: parameters of the measured trials, in [0, 1]; choices by number.
        values: what they measured.
        choice: which parameters are choices: any two of theirs are equally far from each other.
    """

    weights: Float[Tensor, " parameters"]
    scale: float
    noise: float
    points: Float[Tensor, "trials parameters"]
    values: Float[Tensor, " trials"]
    choice: Bool[Tensor, " parameters"]

    def kernel(
        self, a: Float[Tensor, "a parameters"], b: Float[Tensor, "b parameters"]
    ) -> tuple[Float[Tensor, "a b"], Float[Tensor, "a b"]]:
        """Covariances, and their derivatives by the squared distance."""
        root = self.weights.sqrt() * ~self.choice
        scaled, other = a * root, b * root
        squared = scaled.square().sum(-1, keepdim=True) + other.square().sum(-1)
        squared = torch.addmm(squared, scaled, other.T, alpha=-2).clamp_min_(0.0)
        for place in self.choice.nonzero()[:, 0].tolist():
            squared += self.weights[place] * (a[:, place, None] != b[:, place])
        s = (5 * squared).sqrt_()
        e = self.scale * torch.exp(-s)
        return e * (5 / 3 * squared + s + 1), -5 / 6 * e * (s + 1)


class _Drawn:
    """A process whose running trials were drawn.

    Args:
        process: fitted to what was measured.
        chol: Cholesky factor of the measured trials' covariance.
        running: parameters of the running trials.
        normal: of each draw, a number for each running trial and one for a proposal.

    Attributes:
        drawn: what the running trials give in each draw.
    """

    def __init__(
        self,
        process: Process,
        chol: Float[Tensor, "trials trials"],
        running: Float[Tensor, "running parameters"],
        normal: Float[Tensor, "draws running+1"],
    ) -> None:
        n, r = len(chol), len(running)
        across = torch.linalg.solve_triangular(
            chol, process.kernel(process.points, running)[0], upper=False
        ).T
        left = process.kernel(running, running)[0] - across @ across.T
        left.diagonal().add_(JITTER)
        whole = torch.zeros(n + r, n + r, dtype=torch.float64)
        whole[:n, :n], whole[n:, :n] = chol, across
        whole[n:, n:] = torch.linalg.cholesky(left)
        known = torch.linalg.solve_triangular(chol, process.values[:, None], upper=False)
        own, self._normal = normal[:, :r], normal[:, r].contiguous()
        self.drawn = (across @ known).T + own @ whole[n:, n:].T
        self._white = torch.cat([known.expand(-1, len(normal)), own.T])
        self._process, self._points = process, torch.cat([process.points, running])
        unit = torch.eye(n + r, dtype=torch.float64)
        self._inverse = torch.linalg.solve_triangular(whole, unit, upper=False)

    def outcomes(
        self, x: Float[Tensor, "proposals parameters"]
    ) -> tuple[Float[Tensor, "proposals draws"], tuple[Tensor, ...]]:
        """What proposals give in each draw, and what `gradient` needs."""
        k, slope = self._process.kernel(x, self._points)
        v = k @ self._inverse.T
        variance = self._process.scale + JITTER - v.square().sum(-1, keepdim=True)
        deviation = variance.clamp_min_(JITTER).sqrt_()
        return v @ self._white + deviation * self._normal, (slope, v, deviation)

    def gradient(
        self,
        x: Float[Tensor, "proposals parameters"],
        kept: tuple[Tensor, ...],
        by: Float[Tensor, "proposals draws"],
    ) -> Float[Tensor, "proposals parameters"]:
        """Derivative by x, from that by the outcomes."""
        slope, v, deviation = kept
        by_v = by @ self._white.T - v * ((by @ self._normal)[:, None] / deviation)
        by_distance = (by_v @ self._inverse) * slope
        found = x * by_distance.sum(-1, keepdim=True) - by_distance @ self._points
        return 2 * found * (self._process.weights * ~self._process.choice)


class Gain:
    """The expected gain of a proposal, as its logarithm.

    Args:
        processes: of both objectives, with the Cholesky factor of each (see `factor`).
        running: parameters of the running trials.
        front: both objectives of the measured trials that nothing dominates.
        reference: the worst that counts of both.
        draws: how many.
        seed: of the draws.
    """

    def __init__(
        self,
        processes: Sequence[tuple[Process, Float[Tensor, "trials trials"]]],
        running: Float[Tensor, "running parameters"],
        front: Float[Tensor, "front 2"],
        reference: Float[Tensor, "2"],
        draws: int,
        seed: int,
    ) -> None:
        count = len(running) + 1
        self._of = [
            _Drawn(process, chol, running, _normal(draws, count, seed + i))
            for i, (process, chol) in enumerate(processes)
        ]
        drawn = torch.stack([of.drawn for of in self._of], -1)
        fronts = torch.cat([front.expand(draws, -1, -1), drawn], 1)
        self._strips = strips(fronts, reference)

    def __call__(self, x: Float[Tensor, "proposals parameters"]) -> Float[Tensor, " proposals"]:
        """The logarithm of the gain of each proposal."""
        (y0, _), (y1, _) = (of.outcomes(x) for of in self._of)
        sides = self._sides(y0, y1)
        return _log_mean(torch.linalg.vecdot(*sides))

    def with_gradient(
        self, x: Float[Tensor, "proposals parameters"]
    ) -> tuple[Float[Tensor, " proposals"], Float[Tensor, "proposals parameters"]]:
        """The same, and its derivative by the parameters (by choices: none)."""
        (y0, kept0), (y1, kept1) = (of.outcomes(x) for of in self._of)
        width, height = self._sides(y0, y1)
        gain = torch.linalg.vecdot(width, height)
        whole = gain.sum(-1, keepdim=True)
        by0 = (height * ((width > LEAST) & (width < self._strips[1]))).sum(-1) / whole
        by1 = (width * (height > LEAST)).sum(-1) / whole
        slope = self._of[0].gradient(x, kept0, by0) + self._of[1].gradient(x, kept1, by1)
        return _log_mean(gain), slope

    def _sides(
        self, y0: Float[Tensor, "proposals draws"], y1: Float[Tensor, "proposals draws"]
    ) -> tuple[Float[Tensor, "proposals draws strips"], Float[Tensor, "proposals draws strips"]]:
        low, width, floor = self._strips
        across = torch.minimum((y0[..., None] - low).clamp_min_(LEAST), width)
        return across, (y1[..., None] - floor).clamp_min_(LEAST)


def factor(process: Process) -> Float[Tensor, "trials trials"]:
    """Cholesky factor of the covariance of what was measured."""
    covariance = process.kernel(process.points, process.points)[0]
    covariance.diagonal().add_(process.noise)
    return torch.linalg.cholesky(covariance)


def strips(
    fronts: Float[Tensor, "draws points 2"], reference: Float[Tensor, "2"]
) -> tuple[
    Float[Tensor, "draws strips"], Float[Tensor, "draws strips"], Float[Tensor, "draws strips"]
]:
    """What points leave free of all that is better than a reference point.

    Returns:
        Of each strip where it begins in the first objective, how wide it is, and where it begins
        in the second; it has no end there. Dominated points make strips, too, which add nothing.
    """
    a, order = torch.maximum(fronts[..., 0], reference[0]).sort(
        dim=-1, descending=True, stable=True
    )
    b = torch.maximum(fronts[..., 1], reference[1]).gather(-1, order)
    end = reference.expand(len(fronts), 2)
    low = torch.cat([a, end[:, :1]], -1)
    high = torch.cat([torch.full_like(end[:, :1], math.inf), a], -1)
    # A point below the reference in the first objective covers nothing: its strip has no width.
    floor = torch.cat([end[:, 1:], b.cummax(-1).values], -1)
    return low, (high - low).clamp_min_(LEAST), floor


def _log_mean(gain: Float[Tensor, "proposals draws"]) -> Float[Tensor, " proposals"]:
    return gain.mean(-1).log()


def _normal(draws: int, count: int, seed: int) -> Float[Tensor, "draws count"]:
    """Normal numbers that fill the space evenly (a scrambled Sobol sequence)."""
    engine = torch.quasirandom.SobolEngine(count, scramble=True, seed=seed)
    return torch.erfinv(2 * engine.draw(draws, dtype=torch.float64) - 1) * math.sqrt(2)
