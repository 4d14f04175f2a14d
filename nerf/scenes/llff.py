"""Forward-facing scenes in LLFF's format, exactly as NeRF uses them.

A folder holds `poses_bounds.npy` and photos in `images/` or, N times smaller, in `images_N/`.
Each of the V rows of `poses_bounds.npy` is a 3×5 matrix, row by row, then the nearest and farthest
depth of the view. The matrix is [down, right, backwards, position, (height, width, focal)]: axes
and position in world units, the size and focal length in pixels of the original photos.

Source: Mildenhall et al. 2019 (LLFF) for the format; Mildenhall et al. 2020 and the authors'
released code for what is made of it: depth bounds scaled to 1 / bd_factor, poses recentred on
their average, every 8th view held out.
"""

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from nerf.camera_paths import recentre, spiral_path
from nerf.cameras import Camera
from nerf.errors import SceneError
from nerf.scenes.format import SceneFormat
from nerf.scenes.photos import fingerprint, list_photos, read_bytes, read_photos
from nerf.scenes.scene import Scene
from nerf.scenes.settings import SceneSettings

POSES_FILE = "poses_bounds.npy"

HUGE = 1e30
"""No number of a pose is so large, no depth below its inverse: products of them stay finite."""

_COLUMNS = 17
_USUAL_FACTOR = 8
_NEAR_MARGIN = 0.9
# Rounding a side to whole pixels moves the aspect ratio a little; a wrong folder moves it a lot.
_ASPECT_TOLERANCE = 0.02

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Files:
    """Which files of a folder are used, and how.

    Attributes:
        poses: `poses_bounds.npy`.
        photos: by name, one a view.
        factor: how many times smaller than the originals the photos will be.
        shrink: how many times smaller than their files the photos will be.
    """

    poses: Path
    photos: list[Path]
    factor: int
    shrink: int


def load(settings: SceneSettings) -> Scene:
    """Load an LLFF scene.

    Raises:
        SceneError: a file is missing, damaged, or inconsistent with the others.
    """
    files = _find_files(settings)
    poses, size, bounds = read_poses_bounds(files.poses)
    if len(files.photos) != len(poses):
        raise SceneError(
            f"{files.photos[0].parent} holds {len(files.photos)} photos but {files.poses} holds "
            f"{len(poses)} poses; every photo needs exactly one pose: remove the extra ones or "
            "download the scene again"
        )
    photos = read_photos(files.photos, shrink=files.shrink)
    _check_size(files, (photos.shape[1], photos.shape[2]), size)
    return as_scene(
        settings, photos, poses, bounds, size.focal / files.factor, _fingerprint_of(settings, files)
    )


def as_scene(
    settings: SceneSettings,
    photos: UInt8[np.ndarray, "views height width 3"],
    poses: Float[np.ndarray, "views 3 4"],
    bounds: Float[np.ndarray, "views 2"],
    focal: float,
    fingerprint: str,
) -> Scene:
    """A scene from photos with poses and depth bounds: scaled, recentred, split as NeRF does.

    Args:
        settings: how the scene is read.
        photos: 8-bit, one a view.
        poses: columns right, up, backwards, position, in any world units.
        bounds: nearest and farthest depth of each view, in the same units.
        focal: in pixels of these photos.
        fingerprint: of all that the scene is made of.
    """
    height, width = photos.shape[1:3]
    scale = 1.0 / (bounds.min() * settings.bd_factor)
    poses = np.concatenate((poses[:, :, :3], poses[:, :, 3:] * scale), axis=2)
    bounds = bounds * scale
    poses = recentre(poses)
    nearest, farthest = float(bounds.min()), float(bounds.max())
    ndc = _uses_ndc(settings)
    views = range(len(poses))
    return Scene(
        name=settings.folder().resolve().name,
        images=photos.astype(np.float32) / np.float32(255),
        poses=poses.astype(np.float32),
        camera=Camera(height, width, focal, ndc),
        near=0.0 if ndc else _NEAR_MARGIN * nearest,
        far=1.0 if ndc else farthest,
        train=tuple(view for view in views if view % settings.holdout != 0),
        test=tuple(views[:: settings.holdout]),
        white_background=bool(settings.white_background),
        fingerprint=fingerprint,
        spiral=spiral_path(poses, nearest, farthest).astype(np.float32),
    )


def scene_fingerprint(settings: SceneSettings) -> str:
    """The loaded scene's fingerprint, from the bytes of the files alone."""
    return _fingerprint_of(settings, _find_files(settings))


def training_view_count(settings: SceneSettings) -> int:
    """The loaded scene's number of training views."""
    views = len(read_poses_bounds(settings.folder() / POSES_FILE)[0])
    return views - len(range(0, views, settings.holdout))


@dataclass(frozen=True)
class OriginalSize:
    """Height, width and focal length of the original photos, in pixels."""

    height: float
    width: float
    focal: float


def read_poses_bounds(
    path: Path,
) -> tuple[Float[np.ndarray, "views 3 4"], OriginalSize, Float[np.ndarray, "views 2"]]:
    """Read and check `poses_bounds.npy`.

    Returns:
        Poses (columns right, up, backwards, position) and depth bounds, both in the file's world
        units, and the original photos' size, which is the first view's, as in NeRF.

    Raises:
        SceneError: the file is missing, damaged, pickled, of another shape, or holds values that
            no camera can have.
    """
    table = _read_table(path)
    if table.ndim != 2 or table.shape[1] != _COLUMNS or len(table) == 0:
        raise SceneError(
            f"{path} has shape {table.shape}; it must be (views, {_COLUMNS}): a 3×5 matrix and two "
            "depth bounds a view"
        )
    bad = np.flatnonzero(~(np.abs(table) < HUGE).all(axis=1)).tolist()
    if bad:
        raise SceneError(
            f"{path} holds NaN, infinity or numbers beyond {HUGE:g} in the rows of views {bad}; "
            "COLMAP failed to place them: remove these views and their photos, or make the poses "
            "again"
        )
    matrices, bounds = table[:, :15].reshape(-1, 3, 5), table[:, 15:]
    bad = np.flatnonzero((bounds[:, 0] <= 1 / HUGE) | (bounds[:, 1] <= bounds[:, 0])).tolist()
    if bad:
        raise SceneError(
            f"{path}: the depth bounds of views {bad} are {bounds[bad].tolist()}; each view needs "
            "0 < near < far: make the poses again"
        )
    if (matrices[:, :, 4] <= 0).any():
        raise SceneError(
            f"{path}: height, width and focal length must be above 0, the smallest value is "
            f"{matrices[:, :, 4].min()}; make the poses again"
        )
    if not np.allclose(matrices[:, :, 4], matrices[0, :, 4]):
        _log.warning(
            "%s: the views differ in size or focal length; the first view's %s is used for all, "
            "as NeRF does",
            path,
            matrices[0, :, 4].tolist(),
        )
    down, right, backwards, position = (matrices[:, :, column] for column in range(4))
    poses = np.stack((right, -down, backwards, position), axis=2)
    return poses, OriginalSize(*(float(value) for value in matrices[0, :, 4])), bounds


def _read_table(path: Path) -> np.ndarray:
    if not path.is_file():
        raise SceneError(
            f"{path} is missing; an LLFF scene needs it beside its photos: download the scene "
            "again, or make it with LLFF's imgs2poses.py"
        )
    content = io.BytesIO(read_bytes(path, "poses file"))
    try:
        table = np.lib.format.read_array(content, allow_pickle=False)
    # numpy raises whatever its parsers of headers raise, MemoryError for huge shapes included.
    except Exception as error:
        raise SceneError(
            f"cannot read {path}: {error}; it must be a plain numeric .npy file of shape "
            f"(views, {_COLUMNS}), not truncated and not pickled: download the scene again"
        ) from error
    if table.dtype.kind not in "fiu":
        raise SceneError(f"{path} holds {table.dtype}; it must be one array of real numbers")
    return table.astype(np.float64)


def _find_files(settings: SceneSettings) -> _Files:
    folder = settings.folder()
    poses = folder / POSES_FILE
    if not poses.is_file():
        _read_table(poses)  # says what is missing
    factor = photo_factor(folder, settings.factor)
    ready = folder / ("images" if factor == 1 else f"images_{factor}")
    originals = folder / "images"
    if ready.is_dir():
        source, shrink = ready, 1
    elif originals.is_dir():
        source, shrink = originals, factor
        _log.warning(
            "%s is missing: the photos in %s are averaged over boxes of %d×%d pixels instead, "
            "which differs slightly from what the authors of a public scene give out",
            ready,
            originals,
            factor,
            factor,
        )
    else:
        there = sorted(entry.name for entry in folder.glob("images*") if entry.is_dir())
        raise SceneError(
            f"{folder} has no folder {ready.name} with photos at factor {factor} and no images/ to "
            f"make them from; there is {', '.join(there) or 'no photo folder at all'}: set "
            "scene.factor to match, or download the scene again"
        )
    photos = list_photos(source)
    if not photos:
        raise SceneError(f"{source} holds no .png or .jpg photo; copy the scene whole")
    return _Files(poses, photos, factor, shrink)


def photo_factor(folder: Path, asked: int | None) -> int:
    """How many times smaller than the originals the photos are to be: asked for, or what is there.

    Raises:
        SceneError: there are several sizes, and none of them is the usual one.
    """
    if asked is not None:
        return asked
    there = sorted(
        int(suffix)
        for entry in folder.glob("images_*")
        if entry.is_dir()
        and (suffix := entry.name.removeprefix("images_")).isascii()
        and suffix.isdigit()
        and int(suffix) > 0
    )
    if not there or _USUAL_FACTOR in there:
        return _USUAL_FACTOR if there else 1
    if len(there) > 1:
        raise SceneError(
            f"{folder} holds photos at factors {there}, and none of them is the usual "
            f"{_USUAL_FACTOR}; set scene.factor to one of them"
        )
    return there[0]


def _check_size(files: _Files, actual: tuple[int, int], original: OriginalSize) -> None:
    """Refuse photos of another shape than the poses were made for; warn of another size.

    NeRF takes the photos' own size and the file's focal length, whatever they are.
    """
    height, width = actual
    as_wide = height * original.width / original.height
    if abs(width - as_wide) > 1 + _ASPECT_TOLERANCE * width:
        raise SceneError(
            f"the photos in {files.photos[0].parent} come out at {width}×{height} pixels, but "
            f"{files.poses} was made for {original.width:g}×{original.height:g}, another aspect "
            "ratio: these photos and poses do not belong together"
        )
    expected = original.width / files.factor
    if abs(width - expected) > 1 + _ASPECT_TOLERANCE * expected:
        _log.warning(
            "the photos in %s are %d pixels wide, but at factor %d they should be %g: the focal "
            "length is taken for factor %d, as NeRF does, and will be wrong if the factor is",
            files.photos[0].parent,
            width,
            files.factor,
            expected,
            files.factor,
        )


def _uses_ndc(settings: SceneSettings) -> bool:
    return True if settings.ndc is None else settings.ndc


def shaping_settings(settings: SceneSettings, factor: int) -> dict[str, object]:
    """The settings that change what is loaded, their defaults resolved, as plain JSON values."""
    return {
        "factor": factor,
        "holdout": settings.holdout,
        "ndc": _uses_ndc(settings),
        "bd_factor": settings.bd_factor,
        "white_background": bool(settings.white_background),
    }


def _fingerprint_of(settings: SceneSettings, files: _Files) -> str:
    shaping = shaping_settings(settings, files.factor)
    return fingerprint(
        {"format": "llff", "shrink": files.shrink, **shaping}, [files.poses, *files.photos]
    )


def _recognises(folder: Path) -> bool:
    return (folder / POSES_FILE).is_file()


FORMAT = SceneFormat("llff", POSES_FILE, _recognises, load, scene_fingerprint, training_view_count)
