"""The viewer: rays of a viewpoint against the scene's own, and a picture in a real browser."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nerf.cameras import view_rays
from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.rendering import RenderSettings, render_view
from nerf.scenes import Scene, SceneSettings, load_scene
from orchestrator.tracking.ui import free_port
from orchestrator.viewer import SideBySide, Viewer, Viewpoint, focus, nerf_pose

SHAPE = FieldShape((8, 8), None, 8, 4, point_octaves=2, direction_octaves=1)


@pytest.fixture(scope="module", params=[True, False], ids=["ndc", "world"])
def scene(request: pytest.FixtureRequest, demo_folder: Path) -> Scene:
    return load_scene(SceneSettings(path=demo_folder, ndc=request.param))


def model(seed: int) -> NerfModel:
    torch.manual_seed(seed)
    return NerfModel(Field(SHAPE), Field(SHAPE), SampleCounts(6, 6))


def own_viewpoint(scene: Scene) -> Viewpoint:
    camera = scene.camera
    angle = 2 * np.arctan(0.5 * camera.height / camera.focal)
    return Viewpoint(scene.poses[0].astype(float), float(angle), camera.width / camera.height)


def test_from_a_photos_place_the_rays_are_the_photos(scene: Scene) -> None:
    camera = scene.camera
    rays = SideBySide([model(0)], scene).rays(own_viewpoint(scene), camera.height, camera.width)
    wanted = view_rays(camera, torch.as_tensor(scene.poses[0]))
    for name in ("origins", "directions", "view_directions"):
        torch.testing.assert_close(getattr(rays, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_frames_grow_to_the_full_picture_of_each_model(scene: Scene) -> None:
    models = [model(0), model(1)]
    view = own_viewpoint(scene)
    wide = dataclasses.replace(view, aspect=2 * view.aspect)  # two of them
    frames = list(SideBySide(models, scene).frames(wide, scene.camera.height))
    heights = [frame.picture.shape[0] for frame in frames]
    assert heights == sorted(set(heights))
    assert heights[-1] == scene.camera.height
    assert [frame.last for frame in frames] == [False] * (len(frames) - 1) + [True]
    settings = RenderSettings(scene.near, scene.far, scene.white_background)
    pictures = [
        render_view(m, scene.camera, torch.as_tensor(scene.poses[0]), settings).numpy()
        for m in models
    ]
    wanted = np.concatenate(pictures, axis=1)
    assert frames[-1].picture.shape == wanted.shape
    difference = np.abs(frames[-1].picture / 255 - wanted)
    assert difference.max() < 2 / 255


def test_a_frame_ends_when_nobody_looks_from_there_any_more(scene: Scene) -> None:
    asked = 0

    def wanted() -> bool:
        nonlocal asked
        asked += 1
        return asked < 8

    view = dataclasses.replace(own_viewpoint(scene), aspect=1.0)
    heights = [f.picture.shape[0] for f in SideBySide([model(0)], scene).frames(view, 90, wanted)]
    assert heights == [50]  # of 50 and 90 rows: 3 chunks of rays, and then 8
    assert asked == 8


def test_the_focus_is_what_the_cameras_look_at(scene: Scene) -> None:
    point = focus(scene)
    for pose in scene.spiral:
        towards = (point - pose[:, 3]) / np.linalg.norm(point - pose[:, 3])
        np.testing.assert_allclose(towards, -pose[:, 2], atol=1e-4)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_viser_cameras_become_nerfs(q: list[float]) -> None:
    w, *v = np.array(q) / np.linalg.norm(q)
    pose = nerf_pose([w, *v], [1, 2, 3])

    def turned(axis: list[float]) -> np.ndarray:
        return np.array(axis) + 2 * np.cross(v, np.cross(v, axis) + w * np.array(axis))

    np.testing.assert_allclose(pose[:, 0], turned([1, 0, 0]), atol=1e-12)  # right
    np.testing.assert_allclose(pose[:, 1], -turned([0, 1, 0]), atol=1e-12)  # up is not down
    np.testing.assert_allclose(pose[:, 2], -turned([0, 0, 1]), atol=1e-12)  # backwards
    assert list(pose[:, 3]) == [1, 2, 3]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore:Queued a .* on a closed connection:UserWarning")
def test_a_browser_shows_both_models(chromium: Any, demo_folder: Path) -> None:
    pytest.importorskip("viser", reason="viser is not installed: pip install 'prunefield[viewer]'")
    scene = load_scene(SceneSettings(path=demo_folder))
    viewer = Viewer(["dense", "small"], [model(0), model(1)], scene, port=free_port())
    try:
        assert viewer.address.startswith("http://127.0.0.1:")
        page = chromium.new_page(viewport={"width": 700, "height": 400})
        page.goto(viewer.address)
        page.get_by_text("left:").wait_for(timeout=60_000)
        assert "ms" in page.inner_text("body")
        page.wait_for_timeout(1500)
        picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), float)
        left, right = picture[250:390, 60:300], picture[250:390, 400:640]
        assert left.std() + right.std() > 0
        assert abs(left.mean((0, 1)) - right.mean((0, 1))).max() > 1  # two different models
        page.close()
    finally:
        viewer.stop()
