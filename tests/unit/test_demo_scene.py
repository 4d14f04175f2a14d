"""The scene that prunefield renders itself."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest

from nerf.errors import SceneError
from nerf.scenes import SceneSettings, demo, load_scene, scene_fingerprint, write_demo_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_demo_scene(tmp_path_factory.mktemp("scenes") / "demo")


def no_rendering(*args):
    raise AssertionError("the demo scene was rendered although it was there or not needed")


def test_it_is_a_forward_facing_scene_of_twenty_views(folder):
    scene = load_scene(SceneSettings(folder, "demo"))
    assert scene.images.shape == (20, 72, 96, 3)
    assert scene.test == (0, 8, 16)
    assert (scene.near, scene.far, scene.camera.ndc, scene.name) == (0.0, 1.0, True, "demo")
    assert 0.05 < scene.images.std() < 0.4
    assert scene.images.min() >= 0
    assert scene.images.max() <= 1


def test_held_out_views_stand_among_the_training_views(folder):
    scene = load_scene(SceneSettings(folder, "demo"))
    train, held_out = scene.poses[list(scene.train), :2, 3], scene.poses[list(scene.test), :2, 3]
    assert (held_out > train.min(axis=0)).all()
    assert (held_out < train.max(axis=0)).all()


def test_rendering_is_repeatable(folder):
    picture, depths = demo.render_view(demo.demo_poses()[3])
    again, _ = demo.render_view(demo.demo_poses()[3])
    assert np.array_equal(picture, again)
    scene = load_scene(SceneSettings(folder, "demo"))
    assert np.abs(scene.images[3] - picture).max() <= 0.5 / 255 + 1e-6
    assert 1 < depths[0] < depths[1] < 10


def test_the_views_agree_with_their_poses():
    """A thing's middle projects where the picture shows it, so poses and pixels belong together."""
    blue = np.array([0.15, 0.72, -5.6])  # the striped sphere that hangs before the wall
    for pose in demo.demo_poses()[[0, 5, 14]]:
        x, y, z = pose[:, :3].T @ (blue - pose[:, 3])
        column = demo.WIDTH / 2 + demo.FOCAL * x / -z
        row = demo.HEIGHT / 2 - demo.FOCAL * y / -z
        origins = np.broadcast_to(pose[:, 3], (1, 3))
        in_camera = np.array([[(column - 48) / demo.FOCAL, -(row - 36) / demo.FOCAL, -1.0]])
        hits = demo._CASTERS[3].meet(origins, in_camera @ pose[:, :3].T)
        assert hits.t[0] == pytest.approx(-z - 0.42 * -z / np.linalg.norm([x, y, z]), rel=1e-9)


def test_a_whole_scene_is_reused(folder, monkeypatch):
    monkeypatch.setattr(demo, "render_view", no_rendering)
    assert write_demo_scene(folder) == folder
    load_scene(SceneSettings(folder, "demo"))


def test_planning_renders_nothing(tmp_path, monkeypatch, folder):
    loaded = load_scene(SceneSettings(folder, "demo")).fingerprint
    monkeypatch.setattr(demo, "render_view", no_rendering)
    assert scene_fingerprint(SceneSettings(tmp_path / "absent", "demo")) == loaded
    assert scene_fingerprint(SceneSettings(None, "demo")) == loaded
    assert not (tmp_path / "absent").exists()


def test_auto_recognises_it(folder):
    by_name, by_files = (load_scene(SceneSettings(folder, f)) for f in ("demo", "auto"))
    assert by_name.fingerprint == by_files.fingerprint


def test_settings_and_version_change_the_fingerprint(folder, monkeypatch):
    settings = SceneSettings(folder, "demo")
    prints = {
        scene_fingerprint(settings),
        scene_fingerprint(replace(settings, holdout=4)),
        scene_fingerprint(replace(settings, factor=2)),
        scene_fingerprint(replace(settings, ndc=False)),
    }
    monkeypatch.setattr(demo, "DEMO_VERSION", "demo-of-tomorrow")
    prints.add(scene_fingerprint(settings))
    assert len(prints) == 5


@pytest.fixture
def quick(monkeypatch):
    """Flat grey pictures instead of rendered ones, for tests of the files alone."""
    grey = np.full((demo.HEIGHT, demo.WIDTH, 3), 0.5)
    monkeypatch.setattr(demo, "render_view", lambda _: (grey, (2.0, 9.0)))


def test_a_damaged_scene_is_rendered_again(tmp_path, quick):
    folder = write_demo_scene(tmp_path / "demo")
    whole = (folder / "images" / "view05.png").read_bytes()
    (folder / "images" / "view05.png").write_bytes(whole[:50])
    write_demo_scene(folder)
    assert (folder / "images" / "view05.png").read_bytes() == whole
    (folder / "images" / "view06.png").unlink()
    write_demo_scene(folder)
    assert len(list((folder / "images").iterdir())) == 20
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_an_older_version_is_replaced(tmp_path, quick):
    folder = write_demo_scene(tmp_path / "demo")
    marker = folder / "prunefield-demo.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "version": "demo-0"}))
    write_demo_scene(folder)
    assert json.loads(marker.read_text())["version"] == demo.DEMO_VERSION


def test_an_interrupted_rendering_leaves_nothing(tmp_path, monkeypatch):
    def stop(pose):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "render_view", stop)
    with pytest.raises(KeyboardInterrupt):
        write_demo_scene(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []


def test_two_writers_at_once_both_find_it_whole(tmp_path, monkeypatch):
    grey = np.full((demo.HEIGHT, demo.WIDTH, 3), 0.5)
    meeting = threading.Barrier(2, timeout=20)
    views = iter(range(10**6))

    def render(pose):
        if next(views) < 2:
            meeting.wait()
        return grey, (2.0, 9.0)

    monkeypatch.setattr(demo, "render_view", render)
    failures = []

    def write():
        try:
            write_demo_scene(tmp_path / "demo")
        except Exception as error:
            failures.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert failures == []
    assert demo._is_whole(tmp_path / "demo")
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]


def test_someone_elses_folder_is_left_alone(tmp_path, quick):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SceneError, match="holds no demo scene"):
        write_demo_scene(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_filled(tmp_path, quick):
    (tmp_path / "demo").mkdir()
    assert load_scene(SceneSettings(tmp_path / "demo", "demo")).name == "demo"


def test_without_a_path_it_leaves_nothing_behind(quick):
    assert len(load_scene(SceneSettings(None, "demo")).images) == 20


def test_an_unwritable_place_is_named(tmp_path, quick):
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match=r"cannot write the demo scene to .*file/demo"):
        write_demo_scene(tmp_path / "file" / "demo")


def test_a_file_in_its_place_is_named(tmp_path, quick):
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match="cannot write the demo scene"):
        write_demo_scene(tmp_path / "file")
