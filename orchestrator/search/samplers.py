"""Optuna's samplers by the names of a sweep file; and what makes its Gaussian process quick here.

As it comes, `GPSampler` takes 1.2 s for a proposal among 190 trials of 20 ratios: half of it weighs
2,048 points that are spread over the whole space, nearly all of them far behind the front; more
than a quarter is spent on 128 draws of what running trials may give, each with a front of its own.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study._multi_objective import _is_pareto_front

from orchestrator.spec.sweep import Sampler

if TYPE_CHECKING:
    from optuna._gp.acqf import BaseAcquisitionFunc

Points = NDArray[np.float64]  # (points, parameters), each parameter in [0, 1]; choices by number

STARTUP = 10  # trials before which the Gaussian process leaves proposals to chance
SPREAD = 64
DRAWS = 16
NEAR = 256
STARTS = 4
LOCAL = 6  # local searches: the starts, a point of the front, the best of `SPREAD`
TOLERANCE = 0.1  # of the gradient where they end; Optuna's is 1e-4
# Steps from a point of the front are normal, of a width between these, log-uniform.
NARROWEST, WIDEST = 0.01, 0.3


class FrontSampler(GPSampler):
    """Optuna's Gaussian process, its acquisition function searched from the front on.

    Of `NEAR` points near the front (some parameters of one of its points moved) the best few
    are where the local searches start, beside points of the front itself and the best of `SPREAD`
    points of the whole space; they end early, since what they gain in the end is less than the
    process knows. The hypervolume's expected gain is a mean over `DRAWS` draws. Without
    noise (the same pruning always measures the same) a batch's later proposals need no fit anew:
    it begins where the last one ended and ends there.

    Args:
        seed: of its random numbers.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(
            seed=seed,
            n_startup_trials=STARTUP,
            deterministic_objective=True,
            warn_independent_sampling=False,
        )
        self._whole_space = self._n_preliminary_samples
        self._n_qmc_samples_ehvi = DRAWS
        self._n_local_search = LOCAL
        self._tol = TOLERANCE
        self._front: Points | None = None

    def _get_best_params_for_multi_objective(
        self, normalized_params: Points, standardized_score_vals: Points
    ) -> Points:
        best = _is_pareto_front(-standardized_score_vals, assume_unique_lexsorted=False)
        self._front = normalized_params[best]
        return super()._get_best_params_for_multi_objective(
            normalized_params, standardized_score_vals
        )

    def _optimize_acqf(self, acqf: "BaseAcquisitionFunc", best_params: Points | None) -> Points:
        front, self._front = self._front, None
        if front is None:
            front = best_params
        if best_params is None or front is None:  # no trial keeps to the constraints yet
            self._n_preliminary_samples = self._whole_space
            return super()._optimize_acqf(acqf, best_params)
        self._n_preliminary_samples = SPREAD
        near = self._near(front, acqf)
        gains = acqf.eval_acqf_no_grad(near)
        starts = near[np.argsort(-gains, kind="stable")[:STARTS]]
        kept = best_params[: self._n_local_search - 1 - len(starts)]
        return super()._optimize_acqf(acqf, np.vstack([kept, starts]))

    def _near(self, front: Points, acqf: "BaseAcquisitionFunc") -> Points:
        """Points of the front with some parameters moved: 1 in 2, 4, …, 32 of them, or all."""
        rng = self._rng.rng
        base = front[rng.randint(len(front), size=NEAR)]
        moved = rng.random_sample(base.shape) < 0.5 ** rng.randint(0, 6, size=(NEAR, 1))
        width = NARROWEST * (WIDEST / NARROWEST) ** rng.random_sample((NEAR, 1))
        stepped = np.clip(base + width * rng.standard_normal(base.shape), 0.0, 1.0)
        anew = acqf.search_space.sample_normalized_params(NEAR, rng=rng)
        number = np.isin(np.arange(base.shape[1]), acqf.search_space.continuous_indices)
        return np.where(moved, np.where(number, stepped, anew), base)


def make_sampler(name: Sampler, seed: int) -> BaseSampler:
    """One of Optuna's samplers, seeded.

    Args:
        name: as a sweep file writes it.
        seed: of its random numbers.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "gp":
            return FrontSampler(seed)
        if name == "tpe":
            return TPESampler(seed=seed, multivariate=True, constant_liar=True)
        if name == "nsga2":
            return NSGAIISampler(seed=seed, population_size=32)
        if name == "nsga3":
            return NSGAIIISampler(seed=seed, population_size=32)
        if name == "qmc":
            return QMCSampler(seed=seed, scramble=False, warn_independent_sampling=False)
        return RandomSampler(seed=seed)
