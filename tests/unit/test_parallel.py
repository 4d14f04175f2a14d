"""One training shared by two processes, against the same training in one: real processes, gloo."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nerf.errors import CheckpointError, TrainingError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.parallel import ParallelTrainer, train_devices
from nerf.sampling import ShareOfDraws, normal, uniform
from nerf.shares import Share
from nerf.training import Recipe, Trainer
from tests.tiny_scene import tiny_scene

SHAPE = FieldShape((8, 7, 6), skip=0, feature=6, view=5, point_octaves=2, direction_octaves=1)
SAMPLES = SampleCounts(5, 4)
# 9 rays do not divide by 2: the parts must be weighed. Noise, so that every draw matters.
RECIPE = Recipe(iterations=12, rays=9, learning_rate=5e-3, decay_iterations=20, density_noise=1.0)
CPU = torch.device("cpu")


def pair(recipe: Recipe = RECIPE) -> ParallelTrainer:
    return ParallelTrainer(tiny_scene(), SHAPE, SAMPLES, recipe, 0, [CPU, CPU])


def one(recipe: Recipe = RECIPE) -> Trainer:
    return Trainer(tiny_scene(), SHAPE, SAMPLES, recipe, 0)


def weights(model: NerfModel) -> torch.Tensor:
    return torch.cat(
        [p.detach().flatten() for f in model.networks().values() for p in f.parameters()]
    )


def assert_close(a: NerfModel, b: NerfModel) -> None:
    # Sums in another order, through Adam's division by a root: rounding, not another training.
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("total", "count"), [(9, 2), (1024, 3), (5, 5), (7, 1)])
def test_parts_are_disjoint_cover_the_batch_and_differ_by_one_at_most(
    total: int, count: int
) -> None:
    picked = torch.randperm(total)
    parts = [Share(rank, count).part(picked) for rank in range(count)]
    assert torch.equal(torch.cat(parts), picked)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    "draw", [lambda g, n: uniform(g, n, 3, CPU, torch.float32), lambda g, n: normal(g, n, 3, CPU)]
)
def test_a_ray_has_the_same_numbers_however_the_batch_is_shared(draw) -> None:
    whole = draw(torch.Generator().manual_seed(7), 9)
    for first, count in ((0, 4), (4, 5)):
        generator = torch.Generator().manual_seed(7)
        assert torch.equal(draw(ShareOfDraws(generator, 9, first), count), whole[first:][:count])


def test_two_processes_train_what_one_trains(tmp_path: Path) -> None:
    """The same losses, the same weights; and a state goes from two processes to one and back."""
    alone = one()
    early = alone.advance(5)
    with pair() as both:
        progress = both.advance(5)
        assert progress.iteration == both.iteration == 5
        assert progress.loss == pytest.approx(early.loss, rel=1e-5)
        assert_close(both.model, alone.model)
        both.save(tmp_path / "state")
        late = both.advance(100)
        assert both.done
        assert late.iteration == 12
        from_two = weights(both.model)
        both.load(tmp_path / "state")
        assert both.iteration == 5
        both.advance(7)
        assert torch.equal(weights(both.model), from_two)
        with pytest.raises(CheckpointError, match="missing"):
            both.load(tmp_path / "missing")
        assert_close(_continued(tmp_path / "state"), both.model)
    alone.advance(7)
    torch.testing.assert_close(from_two, weights(alone.model), rtol=1e-3, atol=2e-5)


def _continued(state: Path) -> NerfModel:
    alone = one()
    alone.load(state)
    alone.advance(7)
    return alone.model


def test_a_process_that_dies_ends_the_training_with_a_reason(
    unchecked_types: None,
) -> None:
    with pair(replace(RECIPE, iterations=100_000, rays=64)) as both:
        victim, witness = both._processes
        both._pipes[0].send(("advance", (50_000,)))
        both._pipes[1].send(("advance", (50_000,)))
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(TrainingError, match=r"process 0 of 2 .* status -9"):
            both._answers()
    assert witness.returncode is not None


def test_a_divergence_is_told_as_it_is() -> None:
    with (
        pair(replace(RECIPE, learning_rate=1e30)) as both,
        pytest.raises(TrainingError, match="diverged"),
    ):
        both.advance(12)


def test_more_devices_than_rays_or_gpus_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"9 rays .* 10 devices"):
        ParallelTrainer(tiny_scene(), SHAPE, SAMPLES, RECIPE, 0, [CPU] * 10)
    with pytest.raises(TrainingError, match=r"resources\.train\.gpus"):
        train_devices(10_000)
