"""What a proposal is expected to add: against conditioning and hypervolumes done the long way."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from optuna._gp.acqf import qLogEHVI
from optuna._gp.gp import GPRegressor
from optuna._gp.search_space import SearchSpace
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from orchestrator.search.gain import JITTER, Gain, Process, _normal, factor, strips

Array = NDArray[np.float64]
SPACE: dict[str, BaseDistribution] = {
    **{f"x{i}": FloatDistribution(0.0, 1.0) for i in range(5)},
    "kind": CategoricalDistribution(["a", "b", "c"]),
}
TRIALS, RUNNING, DRAWS, SEED = 30, 4, 8, 7


def some_points(rng: np.random.Generator, count: int) -> Array:
    return np.column_stack([rng.random((count, 5)), rng.integers(0, 3, count)])


class Scene:
    """Two fitted processes, running trials and points near the front, where something is gained."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.points, self.running = some_points(rng, TRIALS), some_points(rng, RUNNING)
        x = self.points[:, :5]
        values = np.stack([-x.sum(1), (x**2)[:, 2:].sum(1) + 0.1 * self.points[:, 5]], 1)
        self.values = (values - values.mean(0)) / values.std(0)
        self.weights = rng.uniform(0.2, 2.0, (2, 6))
        self.scales, self.noise = (1.3, 0.8), 1e-6
        self.reference = self.values.min(0) - 0.1 * np.abs(self.values.min(0))
        self.best = np.array([not any((v > w).all() for v in self.values) for w in self.values])
        near = self.points[self.best]
        steps = 0.03 * rng.standard_normal(near.shape) * (np.arange(6) < 5)
        self.x = np.clip(near + steps, 0.0, 2.0)

    def gain(self) -> Gain:
        processes = [
            Process(
                torch.from_numpy(self.weights[i]),
                self.scales[i],
                self.noise,
                torch.from_numpy(self.points),
                torch.from_numpy(self.values[:, i].copy()),
                torch.arange(6) == 5,
            )
            for i in range(2)
        ]
        return Gain(
            [(process, factor(process)) for process in processes],
            torch.from_numpy(self.running),
            torch.from_numpy(self.values[self.best]),
            torch.from_numpy(self.reference),
            DRAWS,
            SEED,
        )

    def kernel(self, i: int, a: Array, b: Array) -> Array:
        apart = (a[:, None] - b) ** 2
        apart[..., 5] = apart[..., 5] > 0
        s = np.sqrt(5 * apart @ self.weights[i])
        return self.scales[i] * (1 + s + s**2 / 3) * np.exp(-s)


def volume(points: Array, reference: Array) -> float:
    """What points dominate: cells of a grid through all of them, counted one by one."""
    xs, ys = (sorted({*points[:, i], reference[i]}) for i in range(2))
    return sum(
        (x1 - x0) * (y1 - y0)
        for x0, x1 in pairwise(xs)
        for y0, y1 in pairwise(ys)
        if x0 >= reference[0] and y0 >= reference[1] and any((p >= (x1, y1)).all() for p in points)
    )


def test_the_gain_is_what_conditioning_and_hypervolumes_give() -> None:
    scene = Scene()
    found = scene.gain()(torch.from_numpy(scene.x)).exp().numpy()
    for row, expected in zip(scene.x, found, strict=True):
        drawn = []  # of both objectives: (draws, running trials and this one)
        for i in range(2):
            others = np.vstack([scene.running, row])
            k, across = (scene.kernel(i, a, scene.points) for a in (scene.points, others))
            weighed = np.linalg.solve(k + scene.noise * np.eye(TRIALS), across.T).T
            left = scene.kernel(i, others, others) - weighed @ across.T
            root = np.linalg.cholesky(left + JITTER * np.eye(RUNNING + 1))
            normal = _normal(DRAWS, RUNNING + 1, SEED + i).numpy()
            drawn.append(weighed @ scene.values[:, i] + normal @ root.T)
        gains = []
        for outcomes in np.stack(drawn, -1):
            before = np.vstack([scene.values[scene.best], outcomes[:-1]])
            after = np.vstack([before, outcomes[-1]])
            gains.append(volume(after, scene.reference) - volume(before, scene.reference))
        assert expected == pytest.approx(np.mean(gains), rel=1e-5, abs=1e-8)
    assert found.max() > 1e-3


def test_the_gain_is_optunas() -> None:
    scene = Scene()
    space = SearchSpace(SPACE)
    fitted = [
        GPRegressor(
            torch.from_numpy(space.is_categorical),
            torch.from_numpy(scene.points),
            torch.from_numpy(scene.values[:, i].copy()),
            torch.from_numpy(scene.weights[i]),
            torch.tensor(scene.scales[i], dtype=torch.float64),
            torch.tensor(scene.noise, dtype=torch.float64),
        )
        for i in range(2)
    ]
    for process in fitted:
        process._cache_matrix()
    theirs = qLogEHVI(
        fitted, space, torch.from_numpy(scene.values), DRAWS, SEED, scene.running, JITTER
    )
    x = torch.from_numpy(scene.x).requires_grad_(True)
    expected = theirs.eval_acqf(x)
    expected.sum().backward()  # type: ignore[no-untyped-call]
    value, slope = scene.gain().with_gradient(torch.from_numpy(scene.x))
    some = value > math.log(1e-4)
    assert some.sum() >= 3
    assert torch.allclose(value[some], expected[some], rtol=1e-6, atol=1e-6)
    assert x.grad is not None
    assert torch.allclose(slope[some, :5], x.grad[some, :5], rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_differences() -> None:
    scene = Scene()
    gain, x = scene.gain(), torch.from_numpy(scene.x)
    value, slope = gain.with_gradient(x)
    assert torch.equal(value, gain(x))
    some = value > math.log(1e-4)
    for place in range(5):
        step = 1e-6 * (torch.arange(6) == place)
        expected = (gain(x + step) - gain(x - step)) / 2e-6
        assert torch.allclose(slope[some, place], expected[some], rtol=1e-4, atol=1e-4)
    assert (slope[:, 5] == 0).all()


points = st.lists(st.tuples(*[st.integers(-2, 6)] * 2), min_size=1, max_size=7)


@given(front=points, proposal=st.tuples(*[st.integers(-2, 7)] * 2))
def test_strips_cover_what_a_front_leaves_free(
    front: list[tuple[int, int]], proposal: tuple[int, int]
) -> None:
    reference = np.zeros(2)
    before = np.array(front, dtype=float)
    after = np.vstack([before, proposal])
    given = torch.from_numpy(before)[None], torch.from_numpy(reference)
    low, width, floor = (side[0].numpy() for side in strips(*given))
    sides = np.clip(proposal[0] - low, 0, width) * np.clip(proposal[1] - floor, 0, None)
    expected = volume(after, reference) - volume(before, reference)
    assert sides.sum() == pytest.approx(expected, abs=1e-9)
