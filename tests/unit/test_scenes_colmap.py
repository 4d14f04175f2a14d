"""COLMAP's models: written here by hand, text and binary, and read as the very same scene."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nerf.errors import SceneError
from nerf.scenes import SceneSettings, load_scene, scene_fingerprint, training_view_count
from nerf.scenes.colmap import _image

WIDTH, HEIGHT, FOCAL = 40, 24, 36.0
VIEWS = 9


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of a rotation, the slow way: the eigenvector to eigenvalue 1 of Bar-Itzhack."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    K = np.array(
        [
            [a - e - i, d + b, g + c, f - h],
            [d + b, e - a - i, h + f, g - c],
            [g + c, h + f, i - a - e, b - d],
            [f - h, g - c, b - d, a + e + i],
        ]
    )
    x, y, z, w = np.linalg.eigh(K / 3)[1][:, -1]
    return np.array([-w, x, y, z]) if w > 0 else np.array([w, -x, -y, -z]) * -1


def cameras() -> list[tuple[np.ndarray, np.ndarray]]:
    """World-to-camera R, t of views on a small arc that look along +z at points around z = 4."""
    found = []
    for number in range(VIEWS):
        angle = 0.05 * (number - VIEWS / 2)
        R = np.array(
            [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
        )
        position = np.array([0.3 * (number - VIEWS / 2), 0.1 * number, 0.05 * number])
        found.append((R, -R @ position))
    return found


POINTS = np.random.default_rng(0).uniform((-1, -1, 3), (1, 1, 6), size=(60, 3))


def write(folder: Path, binary: bool, camera: str = "SIMPLE_PINHOLE") -> Path:
    """A scene as COLMAP leaves it; every image sees every point."""
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    (folder / "images").mkdir()
    values = [FOCAL, WIDTH / 2, HEIGHT / 2]
    values = {"PINHOLE": [FOCAL, *values], "SIMPLE_RADIAL": [*values, 0.1]}.get(camera, values)
    kinds = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2}
    order = list(range(VIEWS))[::-1]  # COLMAP's order is none
    poses = [(quaternion(R), t) for R, t in cameras()]
    names = [f"photo {n:02}.png" for n in range(VIEWS)]  # with a blank
    for number, name in enumerate(names):
        Image.effect_noise((WIDTH, HEIGHT), 40 + number).convert("RGB").save(
            folder / "images" / name
        )
    if not binary:
        line = " ".join(map(str, [7, camera, WIDTH, HEIGHT, *values]))
        (sparse / "cameras.txt").write_text(f"# CAMERA_ID, MODEL\n{line}\n")
        text = "# Image list\n"
        for n in order:
            q, t = poses[n]
            text += (
                " ".join(map(repr, [n + 1, *map(float, q), *map(float, t), 7])) + f" {names[n]}\n"
            )
            text += "1.5 2.5 3 4.0 5.0 -1\n" if n % 2 else "\n"
        (sparse / "images.txt").write_text(text)
        track = " ".join(f"{n + 1} 0" for n in range(VIEWS))
        (sparse / "points3D.txt").write_text(
            "".join(
                f"{k} {x!r} {y!r} {z!r} 1 2 3 0.5 {track}\n"
                for k, (x, y, z) in enumerate(POINTS.tolist())
            )
        )
        return folder
    data = struct.pack("<QiiQQ", 1, 7, kinds[camera], WIDTH, HEIGHT)
    (sparse / "cameras.bin").write_bytes(data + struct.pack(f"<{len(values)}d", *values))
    data = struct.pack("<Q", VIEWS)
    for n in order:
        q, t = poses[n]
        data += struct.pack("<i7di", n + 1, *q, *t, 7) + names[n].encode() + b"\0"
        data += struct.pack("<Q", n) + struct.pack("<ddq", 1.0, 2.0, -1) * n
    (sparse / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(POINTS))
    for k, point in enumerate(POINTS):
        data += struct.pack("<Q3d3BdQ", k, *point, 1, 2, 3, 0.5, VIEWS)
        data += b"".join(struct.pack("<ii", n + 1, 0) for n in range(VIEWS))
    (sparse / "points3D.bin").write_bytes(data)
    return folder


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "text"])
def test_a_point_lands_on_the_pixel_that_colmap_saw_it_at(tmp_path: Path, binary: bool) -> None:
    scene = load_scene(SceneSettings(path=write(tmp_path / "mine", binary), ndc=False))
    assert scene.images.shape == (VIEWS, HEIGHT, WIDTH, 3)
    # Scaled and recentred is a similarity: find it from the cameras, then project every point.
    theirs = np.array([-R.T @ t for R, t in cameras()])
    ours = scene.poses[:, :, 3].astype(np.float64)
    scale = np.linalg.norm(ours[-1] - ours[0]) / np.linalg.norm(theirs[-1] - theirs[0])
    R0, _ = cameras()[0]
    turn = (scene.poses[0, :, :3] * [1, -1, -1]) @ R0
    for view, (R, t) in enumerate(cameras()):
        seen = POINTS @ R.T + t
        wanted = FOCAL * seen[:, :2] / seen[:, 2:]
        world = (POINTS - theirs[0]) @ turn.T * scale + ours[0]
        local = (world - ours[view]) @ scene.poses[view, :, :3]
        found = FOCAL * local[:, :2] / -local[:, 2:] * [1, -1]
        np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_text_and_binary_are_the_same_scene(tmp_path: Path) -> None:
    scenes = [
        load_scene(SceneSettings(path=write(tmp_path / str(binary), binary)))
        for binary in (True, False)
    ]
    np.testing.assert_allclose(scenes[0].poses, scenes[1].poses, atol=1e-6)
    assert scenes[0].camera == scenes[1].camera
    assert (scenes[0].train, scenes[0].test) == (tuple(range(1, 8)), (0, 8))


def test_depth_bounds_are_those_of_the_points_in_front(tmp_path: Path) -> None:
    scene = load_scene(SceneSettings(path=write(tmp_path, True), ndc=False))
    depths = [(POINTS @ R.T + t)[:, 2] for R, t in cameras()]
    near = min(np.quantile(d, 0.001) for d in depths)
    far = max(np.quantile(d, 0.999) for d in depths)
    assert scene.far / scene.near == pytest.approx(far / near / 0.9)


def test_what_needs_no_photo_agrees_with_what_does(tmp_path: Path) -> None:
    settings = SceneSettings(path=write(tmp_path, True), factor=2)
    scene = load_scene(settings)
    assert scene_fingerprint(settings) == scene.fingerprint
    assert training_view_count(settings) == len(scene.train)
    assert scene.images.shape[1:3] == (HEIGHT // 2, WIDTH // 2)
    assert scene.camera.focal == FOCAL / 2
    other = SceneSettings(path=tmp_path, factor=1)
    assert scene_fingerprint(other) != scene.fingerprint


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternions_become_rotations(q: list[float]) -> None:
    R = _image(1, [*q, 0.0, 0.0, 0.0], 1, "x").rotation
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(R) == pytest.approx(1)
    w, *v = np.array(q) / np.linalg.norm(q)
    probe = np.array([0.3, -0.2, 0.9])
    turned = probe + 2 * np.cross(v, np.cross(v, probe) + w * probe)
    np.testing.assert_allclose(R @ probe, turned, atol=1e-12)


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "text"])
def test_distortion_is_refused_with_the_command_that_removes_it(
    tmp_path: Path, binary: bool
) -> None:
    with pytest.raises(SceneError, match="image_undistorter"):
        load_scene(SceneSettings(path=write(tmp_path, binary, "SIMPLE_RADIAL")))


def test_a_missing_photo_and_a_truncated_model_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a", True)
    (tmp_path / "a" / "images" / "photo 03.png").unlink()
    with pytest.raises(SceneError, match=r"photo 03\.png is missing"):
        load_scene(SceneSettings(path=tmp_path / "a"))
    write(tmp_path / "b", True)
    part = tmp_path / "b" / "sparse" / "0" / "images.bin"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(SceneError, match="damaged"):
        load_scene(SceneSettings(path=tmp_path / "b"))
    part.write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(SceneError, match="more than the file can hold"):
        load_scene(SceneSettings(path=tmp_path / "b"))


def test_pinhole_with_two_equal_focal_lengths_is_fine(tmp_path: Path) -> None:
    assert load_scene(SceneSettings(path=write(tmp_path, False, "PINHOLE"))).camera.focal == FOCAL
