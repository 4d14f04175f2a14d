"""Blender scenes: splits, camera, transparency, and what can be wrong with them."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nerf.camera_paths import orbit_path
from nerf.errors import SceneError
from nerf.scenes import SceneSettings, load_scene, scene_fingerprint

ANGLE = 0.6911112
SIDE = 16
COUNTS = {"train": 4, "val": 2, "test": 5}


def some_rgba(split, view):
    seed = 100 * list(COUNTS).index(split) + view
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    return Image.fromarray(pixels)


def some_matrix(split, view):
    matrix = np.eye(4)
    matrix[:3] = orbit_path()[7 * list(COUNTS).index(split) + view]
    return matrix


@pytest.fixture
def folder(tmp_path):
    scene = tmp_path / "bricks"
    for split, count in COUNTS.items():
        (scene / split).mkdir(parents=True)
        frames = []
        for view in range(count):
            some_rgba(split, view).save(scene / split / f"r_{view}.png")
            matrix = some_matrix(split, view).tolist()
            frames.append({"file_path": f"./{split}/r_{view}", "transform_matrix": matrix})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (scene / f"transforms_{split}.json").write_text(json.dumps(content))
    return scene


def edited(folder, change, split="train"):
    file = folder / f"transforms_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def slow_composite(rgba, background):
    out = np.empty((SIDE, SIDE, 3))
    for row, column, channel in np.ndindex(SIDE, SIDE, 3):
        alpha = rgba[row, column, 3] / 255
        out[row, column, channel] = rgba[row, column, channel] / 255 * alpha + background * (
            1 - alpha
        )
    return out


def test_splits_poses_and_camera(folder):
    scene = load_scene(SceneSettings(folder))
    assert (scene.train, scene.test) == ((0, 1, 2, 3), (4, 5, 6, 7, 8))
    for number, (split, view) in enumerate(
        [("train", v) for v in range(4)] + [("test", v) for v in range(5)]
    ):
        assert np.allclose(scene.poses[number], some_matrix(split, view)[:3], atol=1e-6)
    assert scene.camera.focal == pytest.approx(SIDE / 2 / math.tan(ANGLE / 2))
    assert (scene.camera.height, scene.camera.width, scene.camera.ndc) == (SIDE, SIDE, False)
    assert (scene.near, scene.far, scene.white_background) == (2.0, 6.0, True)
    assert (scene.name, scene.spiral.shape) == ("bricks", (40, 3, 4))
    assert scene.images.dtype == scene.poses.dtype == np.float32


@pytest.mark.parametrize(("white", "background"), [(None, 1.0), (True, 1.0), (False, 0.0)])
def test_transparency_is_laid_over_the_background(folder, white, background):
    scene = load_scene(SceneSettings(folder, white_background=white))
    expected = slow_composite(np.asarray(some_rgba("test", 2)), background)
    assert np.abs(scene.images[6] - expected).max() < 1e-6
    assert scene.white_background == bool(background)


def test_opaque_photos_need_no_alpha(folder):
    image = some_rgba("train", 0).convert("RGB")
    image.save(folder / "train" / "r_0.png")
    scene = load_scene(SceneSettings(folder))
    assert np.abs(scene.images[0] - np.asarray(image) / 255).max() < 1e-6


def test_half_resolution_averages_before_compositing(folder):
    scene = load_scene(SceneSettings(folder, half_resolution=True))
    whole = load_scene(SceneSettings(folder))
    assert scene.images.shape[1:] == (SIDE // 2, SIDE // 2, 3)
    assert scene.camera.focal == pytest.approx(whole.camera.focal / 2)
    rgba = np.asarray(some_rgba("train", 1))[4:6, 10:12].reshape(4, 4).mean(axis=0) / 255
    expected = rgba[:3] * rgba[3] + 1 - rgba[3]
    assert scene.images[1, 2, 5].tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def test_half_of_an_odd_side_is_refused(folder):
    for photo in folder.rglob("*.png"):
        Image.new("RGBA", (SIDE + 1, SIDE)).save(photo)
    with pytest.raises(SceneError, match=r"half_resolution needs photos with even sides.*17×16"):
        load_scene(SceneSettings(folder, half_resolution=True))


def test_test_skip_thins_the_held_out_views_only(folder):
    scene = load_scene(SceneSettings(folder, test_skip=2))
    assert (scene.train, scene.test) == ((0, 1, 2, 3), (4, 5, 6))
    assert np.allclose(scene.poses[5], some_matrix("test", 2)[:3], atol=1e-6)


def test_file_paths_may_carry_their_suffix(folder):
    before = load_scene(SceneSettings(folder)).images
    edited(folder, lambda c: c["frames"][0].update(file_path="train/r_0.png"))
    assert np.array_equal(load_scene(SceneSettings(folder)).images, before)


def test_validation_views_are_not_needed(folder):
    shutil.rmtree(folder / "val")
    (folder / "transforms_val.json").unlink()
    assert len(load_scene(SceneSettings(folder)).images) == 9


def test_the_fingerprint_needs_no_decoding_and_agrees(folder, monkeypatch, tmp_path):
    loaded = load_scene(SceneSettings(folder)).fingerprint

    def no_decoding(*args, **kwargs):
        raise AssertionError("a photo was decoded")

    monkeypatch.setattr(Image, "open", no_decoding)
    assert scene_fingerprint(SceneSettings(folder, "blender", white_background=True)) == loaded
    assert scene_fingerprint(SceneSettings(folder, holdout=5, bd_factor=0.5)) == loaded
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert scene_fingerprint(SceneSettings(moved)) == loaded
    edited(moved, lambda c: c.update(camera_angle_x=ANGLE * (1 + 1e-9)))
    assert scene_fingerprint(SceneSettings(moved)) != loaded


@pytest.mark.parametrize(
    "change", [{"half_resolution": True}, {"test_skip": 2}, {"white_background": False}], ids=str
)
def test_settings_that_change_the_scene_change_the_fingerprint(folder, change):
    settings = SceneSettings(folder)
    assert scene_fingerprint(settings) != scene_fingerprint(replace(settings, **change))


TRAIN, PHOTO = "transforms_train.json", "train/r_2.png"
DAMAGES = {
    "no transforms": (lambda f: (f / TRAIN).unlink(), r"transforms_train.json is missing"),
    "no test": (lambda f: (f / "transforms_test.json").unlink(), r"transforms_test.json is mis"),
    "bad JSON": (lambda f: (f / TRAIN).write_text('{"frames": ['), r"train.json is no valid JSON"),
    "no UTF-8": (lambda f: (f / TRAIN).write_bytes(b"\xff\xfe\xfa"), r"is no valid JSON"),
    "deep JSON": (lambda f: (f / TRAIN).write_text("[" * 10**6), r"is no valid JSON"),
    "a list": (lambda f: (f / TRAIN).write_text("[]"), r"holds a JSON list"),
    "no angle": (lambda f: edited(f, lambda c: c.pop("camera_angle_x")), r"angle_x is None"),
    "text angle": (lambda f: edited(f, lambda c: c.update(camera_angle_x="1")), r"_x is '1'"),
    "angle too wide": (lambda f: edited(f, lambda c: c.update(camera_angle_x=3.2)), r"_x is 3.2"),
    "NaN angle": (lambda f: edited(f, lambda c: c.update(camera_angle_x=math.nan)), r"_x is nan"),
    "huge angle": (lambda f: edited(f, lambda c: c.update(camera_angle_x=10**400)), r"_x is 1000"),
    "two cameras": (
        lambda f: edited(f, lambda c: c.update(camera_angle_x=0.5)),
        r"is 0.5 in .* but",
    ),
    "no frames": (lambda f: edited(f, lambda c: c.pop("frames")), r"lists no frames"),
    "empty frames": (lambda f: edited(f, lambda c: c.update(frames=[])), r"lists no frames"),
    "frame is text": (
        lambda f: edited(f, lambda c: c["frames"].insert(1, "x")),
        r"frame 1: file_path is missing",
    ),
    "no file_path": (
        lambda f: edited(f, lambda c: c["frames"][3].pop("file_path")),
        r"frame 3: file_path is missing",
    ),
    "no matrix": (
        lambda f: edited(f, lambda c: c["frames"][3].pop("transform_matrix")),
        r"frame 3: transform_matrix is None",
    ),
    "3×4 matrix": (
        lambda f: edited(f, lambda c: c["frames"][1]["transform_matrix"].pop()),
        r"frame 1: transform_matrix is .*4×4",
    ),
    "NaN matrix": (
        lambda f: edited(
            f, lambda c: c["frames"][1]["transform_matrix"][0].__setitem__(0, math.nan)
        ),
        r"frame 1: transform_matrix is .*finite",
    ),
    "missing photo": (lambda f: (f / PHOTO).unlink(), r"frame 2: its photo .*r_2.png is missing"),
    "truncated photo": (
        lambda f: (f / PHOTO).write_bytes((f / PHOTO).read_bytes()[:300]),
        r"cannot read photo .*r_2.png",
    ),
    "odd size": (
        lambda f: Image.new("RGBA", (8, SIDE)).save(f / PHOTO),
        r"r_2.png is 8×16 pixels but r_0.png is 16×16",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder, damage):
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(SceneError, match=message):
        load_scene(SceneSettings(folder, "blender"))
