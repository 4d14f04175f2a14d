"""What a scene format has to offer; `nerf.scenes.registry` lists those there are."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nerf.scenes.scene import Scene
from nerf.scenes.settings import SceneSettings


@dataclass(frozen=True)
class SceneFormat:
    """One way in which scenes lie on disk.

    Attributes:
        name: what `SceneSettings.format` calls it.
        hallmark: the file that gives the format away, for messages.
        recognises: whether a folder holds such a scene.
        load: reads it whole.
        fingerprint: the loaded scene's fingerprint, without decoding a photo.
        training_views: the loaded scene's number of training views, without decoding a photo.
    """

    name: str
    hallmark: str
    recognises: Callable[[Path], bool]
    load: Callable[[SceneSettings], Scene]
    fingerprint: Callable[[SceneSettings], str]
    training_views: Callable[[SceneSettings], int]
