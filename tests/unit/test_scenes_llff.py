"""LLFF scenes: against a slow float64 reference, on the real fern, and damaged in every way."""

import itertools
import logging
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nerf.cameras import view_rays
from nerf.errors import SceneError
from nerf.scenes import SceneSettings, load_scene, scene_fingerprint
from tests.scene_reference import cross, slow_ndc_ray, slow_poses, unit

VIEWS, HEIGHT, WIDTH, FOCAL = 10, 64, 96, 88.0


def some_table():
    """Rows of a plausible poses_bounds.npy."""
    random = np.random.default_rng(7)
    rows = []
    for _ in range(VIEWS):
        backwards = unit([*(0.2 * random.standard_normal(2)), 1.0])
        right = unit(cross([0.1, 1.0, 0.0], backwards))
        up = cross(backwards, right)
        position = (3 * random.standard_normal(3)).tolist()
        matrix = np.array([[-v for v in up], right, backwards, position, [HEIGHT, WIDTH, FOCAL]])
        rows.append([*matrix.T.ravel(), 8 + random.random(), 40 + random.random()])
    return np.array(rows)


def some_photo(view, width, height):
    pixels = np.random.default_rng(view).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """A scene with originals and photos at factor 4."""
    scene = tmp_path / "garden"
    for name, factor in (("images", 1), ("images_4", 4)):
        (scene / name).mkdir(parents=True)
        for view in range(VIEWS):
            photo = some_photo(view, WIDTH // factor, HEIGHT // factor)
            photo.save(scene / name / f"photo_{view:02d}.png")
    np.save(scene / "poses_bounds.npy", some_table())
    return scene


def resaved(folder, change):
    table = np.load(folder / "poses_bounds.npy")
    np.save(folder / "poses_bounds.npy", change(table))


def check_against_reference(scene, table):
    views, nearest, farthest = slow_poses(table)
    for view, pose in zip(views, scene.poses, strict=True):
        assert pose.T.ravel().tolist() == pytest.approx([*itertools.chain(*view)], abs=2e-6)
    return views, nearest, farthest


def test_it_agrees_with_the_slow_reference(folder):
    scene = load_scene(SceneSettings(folder))
    check_against_reference(scene, some_table())
    assert (scene.camera.height, scene.camera.width) == (16, 24)
    assert scene.camera.focal == FOCAL / 4
    assert (scene.near, scene.far, scene.camera.ndc) == (0.0, 1.0, True)
    assert (scene.test, scene.train) == ((0, 8), (1, 2, 3, 4, 5, 6, 7, 9))
    assert scene.spiral.shape == (120, 3, 4)
    assert not scene.white_background
    assert scene.name == "garden"
    assert scene.images.dtype == scene.poses.dtype == scene.spiral.dtype == np.float32
    photo = np.asarray(some_photo(3, 24, 16)) / 255
    assert np.array_equal(scene.images[3], photo.astype(np.float32))


def test_eight_bits_become_the_nearest_float():
    levels = np.arange(256)
    assert np.array_equal(
        levels.astype(np.float32) / np.float32(255), (levels / 255).astype(np.float32)
    )


def test_without_ndc_the_bounds_become_near_and_far(folder):
    scene = load_scene(SceneSettings(folder, ndc=False))
    _, nearest, farthest = slow_poses(some_table())
    assert scene.near == pytest.approx(0.9 * nearest)
    assert nearest == pytest.approx(1 / 0.75)
    assert scene.far == pytest.approx(farthest)
    assert not scene.camera.ndc


def test_another_bd_factor_scales_the_scene(folder):
    usual, twice = (load_scene(SceneSettings(folder, bd_factor=b)) for b in (0.75, 1.5))
    assert np.allclose(usual.poses[:, :, 3], 2 * twice.poses[:, :, 3], atol=1e-6)
    assert np.array_equal(usual.poses[:, :, :3], twice.poses[:, :, :3])


def test_another_holdout(folder):
    assert load_scene(SceneSettings(folder, holdout=3)).test == (0, 3, 6, 9)


def test_the_factor_is_found_by_the_folders(folder):
    assert load_scene(SceneSettings(folder)).camera.width == 24  # the only images_N
    assert load_scene(SceneSettings(folder, factor=1)).camera.width == 96
    shutil.copytree(folder / "images", folder / "images_2")
    with pytest.raises(SceneError, match=r"factors \[2, 4\].*set scene.factor"):
        load_scene(SceneSettings(folder))
    for path in sorted(folder.glob("images_*")):
        shutil.rmtree(path)
    assert load_scene(SceneSettings(folder)).camera.width == 96


def test_eight_is_preferred(folder):
    (folder / "images_8").mkdir()
    for view in range(VIEWS):
        some_photo(view, 12, 8).save(folder / "images_8" / f"{view}.png")
    assert load_scene(SceneSettings(folder)).camera.width == 12


def test_missing_small_photos_are_averaged_from_the_originals(folder, caplog):
    with caplog.at_level(logging.WARNING):
        scene = load_scene(SceneSettings(folder, factor=2))
    assert "images_2 is missing" in caplog.text
    assert "differs slightly" in caplog.text
    assert scene.camera.focal == FOCAL / 2
    original = np.asarray(some_photo(5, WIDTH, HEIGHT), dtype=float)
    means = original.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3)) / 255
    assert np.abs(scene.images[5] - means).max() <= 0.5 / 255 + 1e-6


def test_photos_are_taken_by_name(folder):
    before = load_scene(SceneSettings(folder)).images
    photos = folder / "images_4"
    for view in range(VIEWS):
        (photos / f"photo_{view:02d}.png").rename(photos / f"{9 - view}.png")
    after = load_scene(SceneSettings(folder)).images
    assert np.array_equal(before[::-1], after)


def test_other_files_beside_the_photos_do_not_count(folder):
    (folder / "images_4" / ".DS_Store").write_text("")
    (folder / "images_4" / "._photo_00.png").write_text("")
    (folder / "images_4" / "Thumbs.db").write_text("")
    assert len(load_scene(SceneSettings(folder)).images) == VIEWS


def test_alpha_is_dropped_and_grey_becomes_rgb(folder):
    expected = load_scene(SceneSettings(folder)).images[0]
    photo = folder / "images_4" / "photo_00.png"
    image = Image.open(photo).convert("RGB")
    image.putalpha(7)
    image.save(photo)
    image.convert("L").save(folder / "images_4" / "photo_01.png")
    scene = load_scene(SceneSettings(folder))
    assert np.array_equal(scene.images[0], expected)
    assert (scene.images[1][..., 0] == scene.images[1][..., 2]).all()


# Fingerprints


def test_the_fingerprint_needs_no_decoding_and_agrees(folder, monkeypatch):
    loaded = load_scene(SceneSettings(folder)).fingerprint
    assert len(loaded) == 16

    def no_decoding(*args, **kwargs):
        raise AssertionError("a photo was decoded")

    monkeypatch.setattr(Image, "open", no_decoding)
    assert scene_fingerprint(SceneSettings(folder)) == loaded
    assert scene_fingerprint(SceneSettings(folder, "llff", factor=4, ndc=True)) == loaded


def test_the_fingerprint_follows_the_contents_not_the_place(folder, tmp_path):
    before = scene_fingerprint(SceneSettings(folder))
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert scene_fingerprint(SceneSettings(moved)) == before
    some_photo(99, 24, 16).save(moved / "images_4" / "photo_09.png")
    changed = scene_fingerprint(SceneSettings(moved))
    resaved(moved, lambda table: table * 1.0001)
    again = scene_fingerprint(SceneSettings(moved))
    assert len({before, changed, again}) == 3


@pytest.mark.parametrize(
    "change",
    [{"factor": 1}, {"holdout": 4}, {"ndc": False}, {"bd_factor": 1.0}, {"white_background": True}],
    ids=str,
)
def test_settings_that_change_the_scene_change_the_fingerprint(folder, change):
    settings = SceneSettings(folder)
    assert scene_fingerprint(settings) != scene_fingerprint(replace(settings, **change))


# What can be wrong


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header_of_a_giant(path: Path) -> None:
    """A header that promises far more rows than there are."""
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"(10, 17)", b"(9999999999999, 17)".ljust(8))[: len(whole)])


POSES, PHOTO = "poses_bounds.npy", "images_4/photo_04.png"
DAMAGES = {
    "no poses": (lambda f: (f / POSES).unlink(), r"poses_bounds.npy is missing"),
    "truncated poses": (lambda f: truncate(f / POSES), r"cannot read .*poses_bounds.npy"),
    "empty poses": (lambda f: (f / POSES).write_bytes(b""), r"cannot read .*poses_bounds.npy"),
    "text for poses": (lambda f: (f / POSES).write_text("hello"), r"cannot read .*pickled"),
    "giant header": (lambda f: header_of_a_giant(f / POSES), r"cannot read .*poses_bounds.npy"),
    "pickled array": (
        lambda f: np.save(f / POSES, np.array([{}], dtype=object), allow_pickle=True),
        r"cannot read .*not pickled",
    ),
    "bare pickle": (
        lambda f: (f / POSES).write_bytes(pickle.dumps(some_table())),
        r"cannot read .*not pickled",
    ),
    "an archive": (
        lambda f: (np.savez(f / "x.npz", some_table()), (f / "x.npz").rename(f / POSES)),
        r"cannot read .*poses_bounds.npy",
    ),
    "bad zip": (lambda f: (f / POSES).write_bytes(b"PK\x03\x04 no zip"), r"cannot read .*poses"),
    "complex numbers": (
        lambda f: resaved(f, lambda t: t.astype(complex)),
        r"complex128; it must be one array of real numbers",
    ),
    "16 columns": (lambda f: resaved(f, lambda t: t[:, :16]), r"\(10, 16\).*must be \(views, 17\)"),
    "flat": (lambda f: resaved(f, lambda t: t.ravel()), r"\(170,\).*must be \(views, 17\)"),
    "no rows": (lambda f: resaved(f, lambda t: t[:0]), r"\(0, 17\).*must be \(views, 17\)"),
    "one pose less": (lambda f: resaved(f, lambda t: t[:9]), r"10 photos .* 9 poses"),
    "one photo less": (lambda f: (f / PHOTO).unlink(), r"9 photos .* 10 poses"),
    "truncated photo": (lambda f: truncate(f / PHOTO), r"cannot read photo .*photo_04.png"),
    "text for a photo": (lambda f: (f / PHOTO).write_text("hi"), r"cannot read .*photo_04.png"),
    "empty photo": (lambda f: (f / PHOTO).write_bytes(b""), r"cannot read photo .*photo_04.png"),
    "photo is a folder": (
        lambda f: ((f / PHOTO).unlink(), (f / PHOTO).mkdir()),
        r"cannot read photo .*photo_04.png",
    ),
    "dangling photo": (
        lambda f: ((f / PHOTO).unlink(), (f / PHOTO).symlink_to("nowhere.png")),
        r"photo .*photo_04.png is missing",
    ),
    "16-bit photo": (
        lambda f: Image.new("I;16", (24, 16)).save(f / PHOTO),
        r"photo_04.png is an image of mode I;16",
    ),
    "odd size": (
        lambda f: some_photo(4, 24, 18).save(f / PHOTO),
        r"photo_04.png is 24×18 pixels but photo_00.png is 24×16",
    ),
    "no photo": (
        lambda f: [photo.unlink() for photo in (f / "images_4").iterdir()],
        r"images_4 holds no .png or .jpg",
    ),
    "other photos": (
        lambda f: [some_photo(0, 16, 24).save(p) for p in (f / "images_4").iterdir()],
        r"16×24 pixels, but .* 96×64, another aspect ratio",
    ),
}


def with_value(row, column, value):
    def change(table):
        table[row, column] = value
        return table

    return lambda folder: resaved(folder, change)


DAMAGES |= {
    "NaN pose": (with_value(3, 2, np.nan), r"1e\+30 in the rows of views \[3\]"),
    "huge pose": (with_value(3, 2, -1e200), r"1e\+30 in the rows of views \[3\]"),
    "infinite bound": (with_value(3, 16, np.inf), r"1e\+30 in the rows of views \[3\]"),
    "zero bound": (with_value(5, 15, 0.0), r"bounds of views \[5\] are \[\[0.0"),
    "negative bound": (with_value(5, 15, -2.0), r"bounds of views \[5\] are \[\[-2.0"),
    "far before near": (with_value(6, 16, 1.0), r"bounds of views \[6\].*0 < near < far"),
    "no focal length": (with_value(0, 14, 0.0), r"focal length must be above 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(folder, damage):
    harm, message = DAMAGES[damage]
    harm(folder)
    with pytest.raises(SceneError, match=message):
        load_scene(SceneSettings(folder, "llff"))


def test_views_that_look_away_from_each_other_are_refused(folder):
    def face_away(table):
        table[::2, [0, 1, 2, 5, 6, 7, 10, 11, 12]] = np.array([-1.0, 0, 0, 0, 1, 0, 0, 0, 1])
        table[1::2, [0, 1, 2, 5, 6, 7, 10, 11, 12]] = np.array([-1.0, 0, 0, 0, 1, 0, 0, 0, -1])
        return table

    resaved(folder, face_away)
    with pytest.raises(SceneError, match="no common orientation"):
        load_scene(SceneSettings(folder))


def test_a_factor_without_photos_names_those_there_are(folder):
    shutil.rmtree(folder / "images")
    with pytest.raises(SceneError, match=r"no folder images_2.*there is images_4"):
        load_scene(SceneSettings(folder, factor=2))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(SceneError, match="nowhere does not exist"):
        load_scene(SceneSettings(tmp_path / "nowhere", "llff"))
    with pytest.raises(SceneError, match="nowhere does not exist"):
        scene_fingerprint(SceneSettings(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match="file is a file"):
        load_scene(SceneSettings(tmp_path / "file"))


def test_a_folder_without_a_scene_says_what_was_looked_for(tmp_path):
    looked_for = r"poses_bounds.npy \(llff\), sparse/0/cameras.bin \(colmap\), transforms_train"
    with pytest.raises(SceneError, match=looked_for):
        load_scene(SceneSettings(tmp_path))


def test_an_unknown_format_suggests_the_nearest(tmp_path):
    with pytest.raises(SceneError, match=r"'lff'; allowed are .*did you mean 'llff'"):
        load_scene(SceneSettings(tmp_path, "lff"))


def test_no_path_is_refused():
    with pytest.raises(SceneError, match="no scene folder was given"):
        load_scene(SceneSettings(None, "llff"))


@pytest.mark.parametrize(
    "values",
    [{"factor": 0}, {"holdout": 1}, {"test_skip": 0}, {"bd_factor": 0.0}, {"bd_factor": math.nan}],
    ids=str,
)
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(SceneError, match=f"scene.{next(iter(values))} is"):
        SceneSettings(**values)


def test_photos_of_another_size_than_the_factor_says_are_warned_about(folder, caplog):
    shutil.copytree(folder / "images", folder / "images_2")
    with caplog.at_level(logging.WARNING):
        scene = load_scene(SceneSettings(folder, factor=2))
    assert scene.camera.width == WIDTH
    assert "should be 48" in caplog.text


# The real thing


@pytest.mark.fern
def test_fern_has_its_known_sizes(fern_folder):
    scene = load_scene(SceneSettings(fern_folder))
    assert scene.images.shape == (20, 378, 504, 3)
    assert scene.camera.focal == pytest.approx(407.566, abs=1e-3)
    assert len(scene.train) == 17
    assert scene.test == (0, 8, 16)
    assert (scene.near, scene.far, scene.name) == (0.0, 1.0, "fern")


@pytest.mark.fern
def test_fern_poses_and_rays_agree_with_the_slow_reference(fern_folder):
    scene = load_scene(SceneSettings(fern_folder))
    table = np.load(fern_folder / "poses_bounds.npy")
    views, nearest, farthest = check_against_reference(scene, table)
    assert (nearest, farthest) == (pytest.approx(1 / 0.75), pytest.approx(6.2801, abs=1e-4))
    for view, row, column in ((0, 0, 0), (7, 189, 252), (13, 377, 503), (19, 40, 460)):
        pose = torch.from_numpy(scene.poses[view])
        ray = view_rays(scene.camera, pose, torch.tensor([row * 504 + column]))
        origin, direction = slow_ndc_ray(
            views[view], row, column, height=378, width=504, focal=3260.526333 / 8
        )
        assert ray.origins[0].tolist() == pytest.approx(origin, abs=1e-5)
        assert ray.directions[0].tolist() == pytest.approx(direction, abs=1e-5)


@pytest.mark.fern
def test_fern_without_ndc(fern_folder):
    scene = load_scene(SceneSettings(fern_folder, ndc=False))
    assert scene.near == pytest.approx(1.2)
    assert scene.far == pytest.approx(80.002 / 16.985 / 0.75, rel=1e-4)


@pytest.mark.fern
def test_fern_fingerprint_is_cheap_and_equal(fern_folder):
    settings = SceneSettings(fern_folder)
    assert scene_fingerprint(settings) == load_scene(settings).fingerprint
