"""Validation rays: seen by nobody but the one who chooses."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.rendering import render_view
from nerf.training import RayPool, Recipe, Trainer
from nerf.validation import ValidationRays, training_pixels, validation_pixels
from orchestrator import bridge
from pruning import Cell
from tests.tiny_scene import tiny_scene

CPU = torch.device("cpu")
SHAPE = FieldShape((9, 8), skip=None, feature=5, view=4, point_octaves=2, direction_octaves=1)


def numbered_scene(**changes):
    """A scene whose colours tell which view, row and column they are from."""
    scene = tiny_scene(views=5, height=6, width=7, **changes)
    views, rows, columns = np.mgrid[0:5, 0:6, 0:7].astype(np.float32) / 10
    return replace(scene, images=np.stack((views, rows, columns), axis=-1))


def held_back(scene, fraction):
    """(view, row, column) of every validation ray."""
    width = scene.camera.width
    return {
        (view, *divmod(pixel, width))
        for view in scene.train
        for pixel in validation_pixels(scene, fraction, view).tolist()
    }


def named(colors):
    return [tuple(round(10 * c) for c in color) for color in colors.tolist()]


@given(fraction=st.floats(0, 1, exclude_max=True))
def test_validation_and_training_pixels_share_out_a_view(fraction):
    scene = tiny_scene()
    for view in scene.train:
        validation = validation_pixels(scene, fraction, view).tolist()
        training = training_pixels(scene, fraction, view).nonzero().flatten().tolist()
        assert sorted(validation + training) == list(range(42))
        assert len(validation) == min(round(fraction * 42), 41)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, math.nan])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction"):
        validation_pixels(tiny_scene(), fraction, 1)


def test_a_larger_fraction_leaves_out_more_of_the_same():
    scene = tiny_scene()
    for view in scene.train:
        few, many = (validation_pixels(scene, f, view).tolist() for f in (0.1, 0.4))
        assert many[: len(few)] == few


def test_training_draws_every_ray_but_the_validation_rays():
    scene = numbered_scene()
    hidden = held_back(scene, 0.2)
    pool = RayPool(scene, CPU, validation=0.2)
    assert len(pool) == 3 * (42 - 8)
    drawn = [pixel for i in range(17) for pixel in named(pool.batch(0, i, 6)[1])]
    assert len(drawn) == len(set(drawn)) == 102  # an epoch: each ray once
    assert len(hidden) == 24
    assert not hidden & set(drawn)


def test_a_trainer_leaves_out_what_its_recipe_says_whatever_the_seed():
    scene = numbered_scene()
    for seed in (0, 1):
        trainer = Trainer(scene, SHAPE, SampleCounts(4, 4), Recipe(validation=0.2), seed)
        assert not held_back(scene, 0.2) & set(named(trainer.pool.colors))
        whole = Trainer(scene, SHAPE, SampleCounts(4, 4), Recipe(), seed)
        assert len(whole.pool) == 126


def test_calibration_draws_every_ray_but_the_validation_rays():
    scene = numbered_scene()

    def drawn(validation):
        wanted = [Cell((0, 0), (3, 42))]
        chunks = [
            rays for _, rays, _ in bridge._ray_chunks(scene, wanted, 0, CPU, validation=validation)
        ]
        return {(tuple(o), tuple(d)) for r in chunks for o, d in zip(*map_lists(r), strict=True)}

    def map_lists(rays):
        return rays.origins.tolist(), rays.directions.tolist()

    every, left = drawn(0.0), drawn(0.2)
    assert len(every) == 126
    validation = ValidationRays(scene, 0.2, CPU).rays
    hidden = {(tuple(o), tuple(d)) for o, d in zip(*map_lists(validation), strict=True)}
    assert len(hidden) == 24
    assert left == every - hidden


def test_each_ray_is_scored_against_its_own_pixel_of_the_whole_view():
    scene = tiny_scene()
    model = NerfModel.create(SHAPE, SampleCounts(5, 4), 0)
    rays = ValidationRays(scene, 0.2, CPU)
    errors = []
    for view in scene.train:
        with torch.no_grad():
            picture = render_view(
                model, scene.camera, torch.as_tensor(scene.poses[view]), rays.settings
            )
        difference = picture.reshape(-1, 3).numpy() - scene.images[view].reshape(-1, 3)
        errors += [
            float((difference[p].astype(np.float64) ** 2).mean())
            for p in validation_pixels(scene, 0.2, view).tolist()
        ]
    score = rays.score(model)
    assert score.rays == len(rays) == len(errors) == 24
    assert score.mse == pytest.approx(np.mean(errors), rel=1e-5)
    assert score.psnr == pytest.approx(-10 * math.log10(np.mean(errors)), rel=1e-5)


def test_the_first_rays_are_spread_over_the_views_and_parts_add_up():
    scene = numbered_scene()
    rays = ValidationRays(scene, 0.2, CPU)
    assert [pixel[0] for pixel in named(rays.colors[:6])] == [*scene.train] * 2
    model = NerfModel.create(SHAPE, SampleCounts(5, 4), 0)
    parts = rays.score(model, stop=7) + rays.score(model, start=7)
    whole = rays.score(model)
    assert (parts.rays, parts.mse, parts.psnr) == (
        24,
        pytest.approx(whole.mse, rel=1e-5),
        pytest.approx(whole.psnr, rel=1e-5),
    )


def test_a_subset_of_many_rays_is_the_beginning_of_all_of_them():
    scene = numbered_scene()
    every, few = ValidationRays(scene, 0.3, CPU), ValidationRays(scene, 0.3, CPU, max_rays=10)
    assert len(few) == 10
    assert torch.equal(few.colors, every.colors[:10])


def test_no_rays_are_no_score():
    scene = tiny_scene()
    rays = ValidationRays(scene, 0.0, CPU)
    assert len(rays) == 0
    with pytest.raises(ValueError, match="there are 0"):
        rays.score(NerfModel.create(SHAPE, SampleCounts(5, 4), 0))
