"""Held-out evaluation: whole pictures or a seeded subset, and the pictures it writes."""

import math
import subprocess
from dataclasses import replace

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from nerf.cameras import view_rays
from nerf.evaluation import (
    Evaluation,
    HeldOut,
    ViewResult,
    error_map,
    write_picture,
    write_video,
)
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.rendering import RenderSettings, render_rays, render_view
from tests.tiny_scene import tiny_scene

CPU = torch.device("cpu")
SHAPE = FieldShape((8, 8), None, 8, 4, point_octaves=2, direction_octaves=1)


@pytest.fixture(scope="module")
def scene():
    return tiny_scene(views=9, height=12, width=14)


@pytest.fixture(scope="module")
def model():
    return NerfModel.create(SHAPE, SampleCounts(4, 3), 0)


def test_whole_views_against_their_own_photos(scene, model):
    held_out = HeldOut(scene, CPU)
    evaluation = held_out.evaluate(model)
    assert [v.view for v in evaluation.views] == [0, 4, 8]
    assert evaluation.whole
    assert evaluation.rays_per_view == 12 * 14
    for result in evaluation.views:
        pose = torch.from_numpy(scene.poses[result.view])
        settings = RenderSettings(scene.near, scene.far, scene.white_background)
        _, fine = render_rays(model, view_rays(scene.camera, pose), settings)
        picture = fine.rgb.detach().clamp(0, 1).view(12, 14, 3).double().numpy()
        photo = scene.images[result.view].astype(np.float64)
        error = np.mean((picture - photo) ** 2)
        assert result.mse == pytest.approx(error, rel=1e-4)
        assert result.psnr == pytest.approx(-10 * math.log10(error), abs=1e-3)
        assert result.ssim == pytest.approx(
            structural_similarity(
                picture,
                photo,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
                data_range=1.0,
                channel_axis=2,
            ),
            abs=1e-4,
        )
        assert result.seconds > 0
        np.testing.assert_allclose(result.picture, picture, atol=1e-5)
        assert torch.equal(held_out.photo(result.view), torch.from_numpy(scene.images[result.view]))


def test_a_model_that_shows_the_photo_is_perfect(scene, model):
    """The model's own renders as photos: pose and photo of a view belong together."""
    settings = RenderSettings(scene.near, scene.far, False)
    images = scene.images.copy()
    for view in scene.test:
        pose = torch.from_numpy(scene.poses[view])
        images[view] = render_view(model, scene.camera, pose, settings).numpy()
    evaluation = HeldOut(replace(scene, images=images), CPU).evaluate(model)
    assert evaluation.psnr > 100
    assert evaluation.ssim == pytest.approx(1, abs=1e-6)


def test_it_is_deterministic_and_draws_no_random_numbers(scene, model):
    held_out = HeldOut(scene, CPU)
    before = torch.get_rng_state()
    first, again = held_out.evaluate(model), held_out.evaluate(model, chunk=7)
    assert torch.equal(before, torch.get_rng_state())
    assert first.mse == pytest.approx(again.mse, rel=1e-5)
    assert held_out.evaluate(model).mse == first.mse


def test_a_subset_is_seeded_and_says_so(scene, model):
    def few(seed, max_rays=30):
        return HeldOut(scene, CPU, max_rays, seed).evaluate(model)

    evaluation = few(0)
    assert not evaluation.whole
    assert evaluation.rays_per_view == 30
    assert evaluation.ssim is None
    assert all(v.picture is None and v.ssim is None for v in evaluation.views)
    assert few(0).mse == evaluation.mse != few(1).mse
    assert few(0, 10_000).whole
    # Its rays and colours belong together: the mean over all seeds tends to the whole view's.
    whole = HeldOut(scene, CPU).evaluate(model)
    several = np.mean([few(seed, 100).mse for seed in range(8)])
    assert several == pytest.approx(whole.mse, rel=0.1)


def test_means_are_over_views_and_in_decibels_per_view():
    views = tuple(
        ViewResult(i, mse, -10 * math.log10(mse), ssim, seconds, None)
        for i, (mse, ssim, seconds) in enumerate([(0.1, 0.5, 1.0), (0.001, 0.9, 3.0)])
    )
    evaluation = Evaluation(views, 5, True)
    assert evaluation.mse == pytest.approx(0.0505)
    assert evaluation.psnr == pytest.approx(20)
    assert evaluation.ssim == pytest.approx(0.7)
    assert evaluation.render_seconds == 2
    assert Evaluation((replace(views[0], ssim=None), views[1]), 5, True).ssim is None


def test_precision_and_progress_are_passed_on(scene, model):
    held_out, done = HeldOut(scene, CPU), []
    exact = held_out.evaluate(model, "float32", 100, done.append)
    assert done == [100, 168] * 3
    rounded = held_out.evaluate(model, "bfloat16")
    assert rounded.mse != exact.mse
    assert rounded.mse == pytest.approx(exact.mse, rel=0.05)


def test_a_picture_is_written_as_it_is(tmp_path):
    picture = torch.rand(5, 6, 3)
    picture[0, 0] = torch.tensor([-1.0, 2.0, 0.5])
    write_picture(tmp_path / "new" / "a.png", picture)
    pixels = iio.imread(tmp_path / "new" / "a.png")
    assert pixels.shape == (5, 6, 3)
    assert pixels[0, 0].tolist() == [0, 255, 128]
    np.testing.assert_allclose(pixels / 255, picture.clamp(0, 1), atol=0.5 / 255 + 1e-6)


def test_the_error_map_goes_from_black_through_red_to_white():
    photo = torch.zeros(1, 5, 3)
    error = torch.tensor([0.0, 0.25 / 6, 0.25 / 3, 0.5 / 3, 0.25])
    heat = error_map(photo + error[None, :, None], photo)
    expected = [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    torch.testing.assert_close(heat[0], torch.tensor(expected, dtype=torch.float32))
    assert bool((error_map(photo + 1, photo) == 1).all())


@pytest.mark.parametrize(("height", "width"), [(32, 48), (37, 51)])
def test_a_video_keeps_its_size_and_frames(tmp_path, height, width):
    shade = np.linspace(0, 1, 6)
    frames = [np.full((height, width, 3), value) for value in shade]
    write_video(tmp_path / "new" / "a.mp4", frames, 10)
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    command = [ffmpeg, "-i", tmp_path / "new" / "a.mp4", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    height, width = height + height % 2, width + width % 2
    assert f" {width}x{height}" in done.stderr.decode()
    assert " 10 fps" in done.stderr.decode()
    decoded = np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3) / 255
    assert decoded.mean(axis=(1, 2, 3)) == pytest.approx(shade, abs=0.03)
