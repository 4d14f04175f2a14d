"""Which scene to load, and how."""

import math
from dataclasses import dataclass
from pathlib import Path

from nerf.errors import SceneError

AUTO = "auto"
WANTED = "the folder of an LLFF, COLMAP or Blender scene (`prunefield fetch fern` downloads one)"


@dataclass(frozen=True)
class SceneSettings:
    """Everything that decides what a loaded scene holds.

    Attributes:
        path: the scene's folder. None only for the demo scene, which is then rendered afresh.
        format: a name in `nerf.scenes.SCENE_FORMATS`, or "auto" to tell by the folder's files.
        factor: how many times smaller than the originals the photos are (LLFF: folder
            `images_<factor>`). None: 8 if `images_8` is there, else the only `images_N`, else 1.
        holdout: every how-manieth view is held out, the first included (LLFF and demo).
        ndc: whether rays are warped to normalised device coordinates. None: yes for the
            forward-facing formats (LLFF, demo), no for Blender.
        bd_factor: the scene is scaled so that the nearest depth bound is 1 / bd_factor (LLFF).
        white_background: whether rays that hit nothing are white. None: yes for Blender only.
        half_resolution: halve the photos' sides (Blender).
        test_skip: use every how-manieth held-out view (Blender).
    """

    path: Path | None = None
    format: str = AUTO
    factor: int | None = None
    holdout: int = 8
    ndc: bool | None = None
    bd_factor: float = 0.75
    white_background: bool | None = None
    half_resolution: bool = False
    test_skip: int = 1

    def __post_init__(self) -> None:
        for name, value, least in (
            ("factor", self.factor, 1),
            ("holdout", self.holdout, 2),
            ("test_skip", self.test_skip, 1),
        ):
            if value is not None and value < least:
                raise SceneError(
                    f"scene.{name} is {value}; it must be a whole number of at least {least}"
                )
        if not (math.isfinite(self.bd_factor) and self.bd_factor > 0):
            raise SceneError(
                f"scene.bd_factor is {self.bd_factor}; it must be a number above 0 (NeRF uses 0.75)"
            )

    def folder(self) -> Path:
        """The scene's folder.

        Raises:
            SceneError: no path was given, or there is no folder there.
        """
        if self.path is None:
            raise SceneError(
                f"no scene folder was given for format {self.format!r}; set scene.path to {WANTED}"
            )
        if not self.path.is_dir():
            what = "is a file" if self.path.exists() else "does not exist"
            raise SceneError(f"scene folder {self.path} {what}; give {WANTED}")
        return self.path
