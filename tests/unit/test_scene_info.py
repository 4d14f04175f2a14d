"""What a model file says of its scene, and reading a scene by it."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from nerf.scenes import SceneSettings, load_scene
from orchestrator.scene_info import scene_info, settings_of

UNUSUAL = SceneSettings(
    path=None,
    format="demo",
    factor=4,
    holdout=3,
    ndc=False,
    bd_factor=0.5,
    white_background=True,
    half_resolution=True,
    test_skip=2,
)


@pytest.fixture
def unusual(demo_folder: Path) -> SceneSettings:
    return replace(UNUSUAL, path=demo_folder)


def test_every_setting_that_shapes_a_scene_is_told_and_read(unusual: SceneSettings) -> None:
    usual = SceneSettings()
    assert all(getattr(unusual, f.name) != getattr(usual, f.name) for f in fields(usual))
    scene = load_scene(unusual)
    again = settings_of({"scene": scene_info(unusual, scene)}, unusual.path)
    assert again == replace(unusual, format="auto")


def test_what_is_given_goes_before_what_the_file_says(unusual: SceneSettings) -> None:
    info = {"scene": scene_info(unusual, load_scene(unusual))}
    again = settings_of(info, unusual.path, factor=2, holdout=5, ndc=True)
    assert (again.factor, again.holdout, again.ndc) == (2, 5, True)


@pytest.mark.parametrize(
    "said", [None, "text", {}, {"holdout": "8", "factor": 0.5, "ndc": 3, "test_skip": True}]
)
def test_nonsense_is_as_usual(said: object, tmp_path: Path) -> None:
    assert settings_of({"scene": said}, tmp_path) == SceneSettings(tmp_path)
