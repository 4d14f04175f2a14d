"""Optuna's samplers by the names of a sweep file; and what makes its Gaussian process quick here.

As it comes, `GPSampler` takes 1.2 s for a proposal among 190 trials of 20 ratios: half of it weighs
2,048 points that are spread over the whole space, nearly all of them far behind the front; more
than a quarter is spent on 128 draws of what running trials may give, each with a front of its own.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna._gp.acqf import BaseAcquisitionFunc
from optuna._gp.gp import GPRegressor, fit_kernel_params
from optuna._gp.search_space import SearchSpace
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study, StudyDirection
from optuna.study._multi_objective import _is_pareto_front
from optuna.trial import FrozenTrial

from orchestrator.search.gain import Gain, Process, factor
from orchestrator.spec.sweep import Sampler

Points = NDArray[np.float64]  # (points, parameters), each parameter in [0, 1]; choices by number

STARTUP = 10  # trials before which the Gaussian process leaves proposals to chance
SPREAD = 64
DRAWS = 32
NEAR = 256
STARTS = 4
TOLERANCE = 0.01  # where local searches end, as the square of a gradient; Optuna has 1e-4
# Steps from a point of the front are normal, of a width between these, log-uniform.
NARROWEST, WIDEST = 0.01, 0.3


class FrontSampler(GPSampler):
    """Optuna's Gaussian process, its acquisition function searched from the front on.

    Of `NEAR` points near the front (some parameters of one of its points moved) the best few
    are where the local searches start, beside points of the front itself and the best of `SPREAD`
    points of the whole space. The hypervolume's expected gain is a mean over `DRAWS` draws.

    For two objectives without constraints the gain and its gradient are `orchestrator.search.gain`
    in the place of Optuna's, and the processes are fitted once to the same measured trials, however
    many proposals follow: the same pruning always measures the same, so there is no noise to fit.

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
        self._tol = TOLERANCE
        self._front: Points | None = None
        self._learnt: _Learnt | None = None

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        constrained = any(trial.constraints for trial in completed_trials)
        if len(study.directions) != 2 or constrained:
            return super()._sample_relative_impl(
                study, completed_trials, running_trials, search_space
            )
        space = SearchSpace(search_space)
        points = space.get_normalized_params(completed_trials)
        signs = [-1.0 if d == StudyDirection.MINIMIZE else 1.0 for d in study.directions]
        values = np.array(signs) * np.array([trial.values for trial in completed_trials])
        running = [t for t in running_trials if search_space.keys() <= t.params.keys()]
        learnt = self._learn(space, points, values)
        seed = self._rng.rng.randint(1 << 30)
        quick = _QuickGain(learnt, space, space.get_normalized_params(running), seed)
        best = self._get_best_params_for_multi_objective(points, learnt.values)
        return space.get_unnormalized_param(self._optimize_acqf(quick, best))

    def _learn(self, space: SearchSpace, points: Points, values: Points) -> "_Learnt":
        """Fit both processes, unless these very trials are known."""
        before = self._learnt
        scaled = (values - values.mean(0)) / np.maximum(values.std(0), 1e-10)
        same = before is not None and np.array_equal(before.points, points)
        if before is not None and same and np.array_equal(before.values, scaled):
            return before
        begin: Sequence[GPRegressor | None] = (None, None)
        if before is not None and before.points.shape[1] == points.shape[1]:
            begin = before.fitted
        fitted = [
            fit_kernel_params(
                X=points,
                Y=scaled[:, i],
                is_categorical=space.is_categorical,
                log_prior=self._log_prior,
                minimum_noise=self._minimum_noise,
                gpr_cache=begin[i],
                deterministic_objective=True,
            )
            for i in range(2)
        ]
        self._learnt = _Learnt(points, scaled, fitted, space.is_categorical)
        return self._learnt

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


class _Learnt:
    """Both processes, fitted.

    Args:
        points: parameters of the measured trials.
        values: their objectives, to be large, of mean 0 and variance 1.
        fitted: Optuna's process for each objective.
        choice: which parameters are choices.
    """

    def __init__(
        self,
        points: Points,
        values: Points,
        fitted: Sequence[GPRegressor],
        choice: NDArray[np.bool_],
    ) -> None:
        self.points, self.values, self.fitted = points, values, fitted
        processes = [
            Process(
                weights=of.inverse_squared_lengthscales,
                scale=float(of.kernel_scale),
                noise=float(of.noise_var),
                points=torch.from_numpy(points),
                values=torch.from_numpy(values[:, i].copy()),
                choice=torch.from_numpy(choice),
            )
            for i, of in enumerate(fitted)
        ]
        self.processes = [(process, factor(process)) for process in processes]
        best = _is_pareto_front(-values, assume_unique_lexsorted=False)
        self.front = torch.from_numpy(values[best])
        worst = values.min(0)  # the reference point lies a tenth behind it, as Optuna has it
        self.reference = torch.from_numpy(worst - 0.1 * np.abs(worst))
        self.length_scales = np.mean([of.length_scales for of in fitted], axis=0)


class _QuickGain(BaseAcquisitionFunc):
    """`Gain` as Optuna's local searches want it."""

    def __init__(self, learnt: _Learnt, space: SearchSpace, running: Points, seed: int) -> None:
        super().__init__(learnt.length_scales, space)
        self._gain = Gain(
            learnt.processes,
            torch.from_numpy(running),
            learnt.front,
            learnt.reference,
            DRAWS,
            seed,
        )

    def eval_acqf(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _WithGradient.apply(x, self._gain)
        return found

    def eval_acqf_no_grad(self, x: Points) -> Points:
        found: Points = self._gain(torch.from_numpy(np.atleast_2d(x))).numpy()
        return found if x.ndim == 2 else found[0]


class _WithGradient(torch.autograd.Function):
    """A gain whose gradient is known beforehand."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gain: Gain) -> torch.Tensor:
        value, slope = gain.with_gradient(x)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: Any, by: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slope,) = ctx.saved_tensors
        return by[:, None] * slope, None


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
