"""The scene formats there are: one line each. `auto` takes the first that recognises a folder."""

import difflib

from nerf.errors import SceneError
from nerf.scenes import blender, colmap, demo, llff
from nerf.scenes.format import SceneFormat
from nerf.scenes.scene import Scene
from nerf.scenes.settings import AUTO, SceneSettings

SCENE_FORMATS: dict[str, SceneFormat] = {
    "demo": demo.FORMAT,
    "llff": llff.FORMAT,
    "colmap": colmap.FORMAT,
    "blender": blender.FORMAT,
}


def load_scene(settings: SceneSettings) -> Scene:
    """Load a scene.

    Raises:
        SceneError: the folder or a file in it is missing, damaged or inconsistent; the message
            names it and says what to do.
    """
    return _format_of(settings).load(settings)


def scene_fingerprint(settings: SceneSettings) -> str:
    """The fingerprint the loaded scene would have, 16 hex digits.

    Reads the bytes of the files that matter but decodes no photo; for the demo scene it reads and
    renders nothing.

    Raises:
        SceneError: as for `load_scene`, as far as it shows without decoding photos.
    """
    return _format_of(settings).fingerprint(settings)


def _format_of(settings: SceneSettings) -> SceneFormat:
    if settings.format == AUTO:
        folder = settings.folder()
        for scene_format in SCENE_FORMATS.values():
            if scene_format.recognises(folder):
                return scene_format
        hallmarks = ", ".join(f"{f.hallmark} ({f.name})" for f in SCENE_FORMATS.values())
        raise SceneError(
            f"{folder} holds no scene that prunefield knows: none of {hallmarks} is in it; "
            "give the folder that holds one of them"
        )
    if settings.format not in SCENE_FORMATS:
        allowed = [AUTO, *SCENE_FORMATS]
        near = difflib.get_close_matches(settings.format, allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SceneError(
            f"scene.format is {settings.format!r}; allowed are {', '.join(allowed)}{hint}"
        )
    return SCENE_FORMATS[settings.format]


def training_view_count(settings: SceneSettings) -> int:
    """How many training views the scene has, without decoding photos.

    Raises:
        SceneError: as for `scene_fingerprint`.
    """
    return _format_of(settings).training_views(settings)
