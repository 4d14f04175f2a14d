"""Scenes rendered with Blender, as NeRF's synthetic ones: all around an object, on white.

A folder holds `transforms_train.json` and `transforms_test.json` (and `transforms_val.json`, which
is not used here). Each gives `camera_angle_x`, the horizontal field of view in radians, and
`frames`: `file_path` without its `.png`, and `transform_matrix`, a 4×4 camera-to-world matrix
whose columns are right, up, backwards, position.

Source: Mildenhall et al. 2020 and the authors' released code: near 2, far 6, RGBA over white.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float, UInt8

from nerf.camera_paths import orbit_path
from nerf.cameras import Camera
from nerf.errors import SceneError
from nerf.scenes.format import SceneFormat
from nerf.scenes.photos import fingerprint, inside, read_bytes, read_photos
from nerf.scenes.scene import Scene
from nerf.scenes.settings import SceneSettings

NEAR = 2.0
FAR = 6.0

_HUGE = 1e30
_TRAIN_FILE = "transforms_train.json"
_TEST_FILE = "transforms_test.json"


@dataclass(frozen=True)
class _Split:
    """One transforms file.

    Attributes:
        file: where it lies.
        angle: horizontal field of view, radians.
        photos: image files.
        poses: camera-to-world matrices.
    """

    file: Path
    angle: float
    photos: list[Path]
    poses: Float[np.ndarray, "views 3 4"]


def load(settings: SceneSettings) -> Scene:
    """Load a Blender scene.

    Raises:
        SceneError: a file is missing, damaged, or inconsistent with the others.
    """
    folder = settings.folder()
    train, test = _splits(settings)
    photos = read_photos([*train.photos, *test.photos], transparent=True)
    white = _is_white(settings)
    images = _composite(photos, white=white, half=settings.half_resolution)
    height, width = images.shape[1:3]
    n_train, n_all = len(train.photos), len(photos)
    return Scene(
        name=folder.resolve().name,
        images=images,
        poses=np.concatenate((train.poses, test.poses)).astype(np.float32),
        camera=Camera(
            height, width, 0.5 * width / math.tan(0.5 * train.angle), _uses_ndc(settings)
        ),
        near=0.0 if _uses_ndc(settings) else NEAR,
        far=1.0 if _uses_ndc(settings) else FAR,
        train=tuple(range(n_train)),
        test=tuple(range(n_train, n_all)),
        white_background=white,
        fingerprint=_fingerprint_of(settings, train, test),
        spiral=orbit_path().astype(np.float32),
    )


def scene_fingerprint(settings: SceneSettings) -> str:
    """The loaded scene's fingerprint, from the bytes of the files alone."""
    return _fingerprint_of(settings, *_splits(settings))


def training_view_count(settings: SceneSettings) -> int:
    """The loaded scene's number of training views."""
    return len(_splits(settings)[0].photos)


def _splits(settings: SceneSettings) -> tuple[_Split, _Split]:
    folder = settings.folder()
    train = _read_split(folder / _TRAIN_FILE, skip=1)
    test = _read_split(folder / _TEST_FILE, skip=settings.test_skip)
    if not math.isclose(train.angle, test.angle, rel_tol=1e-6):
        raise SceneError(
            f"camera_angle_x is {train.angle} in {train.file} but {test.angle} in {test.file}; all "
            "views of a scene must share one camera"
        )
    return train, test


def _read_split(path: Path, skip: int) -> _Split:
    if not path.is_file():
        raise SceneError(
            f"{path} is missing; a Blender scene needs {_TRAIN_FILE} and {_TEST_FILE}: download "
            "the scene again"
        )
    content = _parse(path)
    angle = content.get("camera_angle_x")
    if not _is_number(angle) or not 0 < angle < math.pi:
        raise SceneError(
            f"{path}: camera_angle_x is {angle!r}; it must be the horizontal field of view in "
            "radians, between 0 and π"
        )
    frames = content.get("frames")
    if not isinstance(frames, list) or not frames:
        raise SceneError(
            f"{path} lists no frames; `frames` must be a list with a file_path and a "
            "transform_matrix for each view"
        )
    parsed = [_parse_frame(path, number, frame) for number, frame in enumerate(frames)][::skip]
    return _Split(
        path, float(angle), [photo for photo, _ in parsed], np.stack([pose for _, pose in parsed])
    )


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path, "camera file"))
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON and bad UTF-8
        raise SceneError(f"{path} is no valid JSON ({error}); download the scene again") from error
    if not isinstance(content, dict):
        raise SceneError(
            f"{path} holds a JSON {type(content).__name__}; it must be an object with "
            "camera_angle_x and frames"
        )
    return content


def _parse_frame(path: Path, number: int, frame: object) -> tuple[Path, Float[np.ndarray, "3 4"]]:
    where = f"{path}, frame {number}"
    if not isinstance(frame, dict) or not isinstance(frame.get("file_path"), str):
        raise SceneError(
            f"{where}: file_path is missing; each frame must name its photo, without .png"
        )
    matrix = frame.get("transform_matrix")
    shaped = (
        isinstance(matrix, list)
        and len(matrix) == 4
        and all(isinstance(row, list) and len(row) == 4 for row in matrix)
        and all(_is_number(value) for row in matrix for value in row)
    )
    if not shaped:
        raise SceneError(
            f"{where}: transform_matrix is {matrix!r}; it must be a 4×4 list of finite numbers"
        )
    name = frame["file_path"]
    name = name if name.lower().endswith(".png") else f"{name}.png"
    photo = inside(path.parent, name, where)
    if not photo.is_file():
        raise SceneError(
            f"{where}: its photo {photo} is missing; copy the scene whole, or download it again"
        )
    return photo, np.array(matrix, dtype=np.float64)[:3]


def _is_number(value: object) -> TypeGuard[float]:
    # A bound rather than math.isfinite: JSON integers can be too long for a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _composite(
    photos: UInt8[np.ndarray, "views height width 4"], *, white: bool, half: bool
) -> Float[np.ndarray, "views rows columns 3"]:
    """Lay photos over white or black, one at a time to save memory; first halve them if asked.

    Halving comes first, alpha and all, as in the authors' code.
    """
    views, height, width, _ = photos.shape
    if half and (height % 2 or width % 2):
        raise SceneError(
            f"scene.half_resolution needs photos with even sides, these are {width}×{height}; "
            "set it to false"
        )
    step = 2 if half else 1
    images = np.empty((views, height // step, width // step, 3), dtype=np.float32)
    for view, photo in enumerate(photos):
        rgba = photo.astype(np.float32) / np.float32(255)
        if half:
            rgba = rgba.reshape(height // 2, 2, width // 2, 2, 4).mean(axis=(1, 3))
        alpha = rgba[..., 3:]
        images[view] = rgba[..., :3] * alpha + (1.0 - alpha if white else 0.0)
    return images


def _is_white(settings: SceneSettings) -> bool:
    return True if settings.white_background is None else settings.white_background


def _uses_ndc(settings: SceneSettings) -> bool:
    return bool(settings.ndc)


def _fingerprint_of(settings: SceneSettings, train: _Split, test: _Split) -> str:
    shaping = {
        "format": "blender",
        "ndc": _uses_ndc(settings),
        "white_background": _is_white(settings),
        "half_resolution": settings.half_resolution,
        "test_skip": settings.test_skip,
    }
    return fingerprint(shaping, [train.file, test.file, *train.photos, *test.photos])


def _recognises(folder: Path) -> bool:
    return (folder / _TRAIN_FILE).is_file()


FORMAT = SceneFormat(
    "blender", _TRAIN_FILE, _recognises, load, scene_fingerprint, training_view_count
)
