"""Scenes: photos with their poses, whatever format they come in."""

from nerf.scenes.demo import DEMO_VERSION, write_demo_scene
from nerf.scenes.download import fetch_scene
from nerf.scenes.format import SceneFormat
from nerf.scenes.public import PUBLIC_SCENES, PublicScene
from nerf.scenes.registry import SCENE_FORMATS, load_scene, scene_fingerprint, training_view_count
from nerf.scenes.scene import Scene
from nerf.scenes.settings import SceneSettings
from nerf.scenes.transfer import Progress

__all__ = [
    "DEMO_VERSION",
    "PUBLIC_SCENES",
    "SCENE_FORMATS",
    "Progress",
    "PublicScene",
    "Scene",
    "SceneFormat",
    "SceneSettings",
    "fetch_scene",
    "load_scene",
    "scene_fingerprint",
    "training_view_count",
    "write_demo_scene",
]
