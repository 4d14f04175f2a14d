"""Own photos, placed by COLMAP: its sparse model, text or binary, read as a forward-facing scene.

A folder holds photos in `images/` (or, N times smaller, `images_N/`) and the model in `sparse/0/`,
`sparse/` or the folder itself: `cameras`, `images` and `points3D`, all `.bin` or all `.txt`. The
photos must be undistorted (`colmap image_undistorter`) and of one size.

Letters: R, t the rotation and translation of an image, from world to camera (x right, y down,
z forward); X a point in the world. NeRF's camera looks along −z with y up: its pose has the columns
Rᵀ(1, 0, 0), −Rᵀ(0, 1, 0), −Rᵀ(0, 0, 1) and the position −Rᵀt. A view's depth bounds are the 0.1 %
and 99.9 % quantiles of z = (RX + t)₃ over the points that it sees.

Source: COLMAP's documentation, "Output Format" (all binary data is little-endian); Mildenhall et
al. 2019 (LLFF) for the depth bounds.
"""

import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nerf.errors import SceneError
from nerf.scenes.format import SceneFormat
from nerf.scenes.llff import HUGE, as_scene, photo_factor, shaping_settings
from nerf.scenes.photos import fingerprint, inside, read_bytes, read_photos
from nerf.scenes.scene import Scene
from nerf.scenes.settings import SceneSettings

PLACES = ("sparse/0", "sparse", ".")
PARTS = ("cameras", "images", "points3D")
MODELS = {0: "SIMPLE_PINHOLE", 1: "PINHOLE", 2: "SIMPLE_RADIAL", 3: "RADIAL", 4: "OPENCV"}
"""COLMAP's numbers of the camera models that people meet; the first two have no distortion."""
PARAMETERS = {"SIMPLE_PINHOLE": 3, "PINHOLE": 4}
QUANTILES = (0.001, 0.999)
SQUARE = 0.01
"""How much the two focal lengths, or those of several cameras, may differ."""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelCamera:
    """Intrinsics of one camera: size and focal length, in pixels of the original photos."""

    width: int
    height: int
    focal: float


@dataclass(frozen=True)
class ModelImage:
    """One placed photo.

    Attributes:
        number: IMAGE_ID.
        name: its path below `images/`.
        camera: CAMERA_ID.
        rotation: R, world to camera.
        translation: t.
    """

    number: int
    name: str
    camera: int
    rotation: Float[np.ndarray, "3 3"]
    translation: Float[np.ndarray, "3"]

    def pose(self) -> Float[np.ndarray, "3 4"]:
        """As NeRF has it: columns right, up, backwards, position."""
        axes = self.rotation.T * np.array([1.0, -1.0, -1.0])
        return np.concatenate((axes, -self.rotation.T @ self.translation[:, None]), axis=1)


@dataclass(frozen=True)
class Model:
    """A sparse model.

    Attributes:
        cameras: by CAMERA_ID.
        images: by name.
        seen: by IMAGE_ID, the points that the image sees.
    """

    cameras: dict[int, ModelCamera]
    images: tuple[ModelImage, ...]
    seen: dict[int, Float[np.ndarray, "points 3"]]


def load(settings: SceneSettings) -> Scene:
    """Load a scene that COLMAP placed.

    Raises:
        SceneError: a file is missing, damaged, inconsistent with the others, or distorted.
    """
    folder = settings.folder()
    model = read_model(model_folder(folder))
    camera = _one_camera(folder, model)
    factor = photo_factor(folder, settings.factor)
    paths, shrink = _photos(folder, model, factor)
    photos = read_photos(paths, shrink=shrink)
    expected = camera.width / factor
    if abs(photos.shape[2] - expected) > 1 + 0.02 * expected:
        raise SceneError(
            f"the photos in {paths[0].parent} come out {photos.shape[2]} pixels wide, but the "
            f"model was made for {camera.width}, which is {expected:g} at factor {factor}: set "
            "scene.factor to match, or use the photos that COLMAP had"
        )
    return as_scene(
        settings,
        photos,
        np.stack([image.pose() for image in model.images]),
        np.stack([_bounds(folder, model, image) for image in model.images]),
        camera.focal * photos.shape[2] / camera.width,
        _fingerprint(settings),
    )


def model_folder(folder: Path) -> Path:
    """Where the sparse model of a scene is.

    Raises:
        SceneError: nowhere.
    """
    for place in PLACES:
        if _suffix(folder / place):
            return folder / place
    raise SceneError(
        f"{folder} holds no sparse model of COLMAP: none of {', '.join(PLACES)} in it holds "
        f"{', '.join(PARTS)} as .bin or .txt; run COLMAP's mapper, or point scene.path elsewhere"
    )


def read_model(folder: Path) -> Model:
    """Read a sparse model, binary or text.

    Raises:
        SceneError: a file is damaged, or a camera is distorted.
    """
    binary = _suffix(folder) == ".bin"
    files = _files(folder)
    cameras, images, points = (read_bytes(path, "COLMAP file") for path in files)
    try:
        if binary:
            found = _binary_cameras(cameras), _binary_images(images)
            seen = _by_image(_binary_points(points))
        else:
            found = _text_cameras(cameras.decode()), _text_images(images.decode())
            seen = _by_image(_text_points(points.decode()))
    except (struct.error, ValueError, IndexError) as error:
        raise SceneError(
            f"the sparse model in {folder} is damaged or no model of COLMAP ({error}); make it "
            "anew with COLMAP's mapper, or convert it with `colmap model_converter`"
        ) from error
    return Model(found[0], tuple(sorted(found[1], key=lambda image: image.name)), seen)


# --- text --------------------------------------------------------------------------------------


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if not line.startswith("#"))


def _text_cameras(text: str) -> dict[int, ModelCamera]:
    found = {}
    for line in _lines(text):
        if line.strip():
            number, name, width, height, *parameters = line.split()
            values = [float(p) for p in parameters]
            found[int(number)] = _camera(name, int(width), int(height), values)
    return found


def _text_images(text: str) -> list[ModelImage]:
    """Two lines an image, of which the second, its keypoints, may be empty."""
    found = []
    for line in list(_lines(text.strip("\n") + "\n"))[::2]:
        if line.strip():
            number, *values, camera, name = line.split(maxsplit=9)
            numbers = [float(v) for v in values]
            found.append(_image(int(number), numbers, int(camera), name.strip()))
    return found


def _text_points(text: str) -> Iterator[tuple[list[float], list[int]]]:
    for line in _lines(text):
        if line.strip():
            parts = line.split()
            yield [float(v) for v in parts[1:4]], [int(v) for v in parts[8::2]]


# --- binary ------------------------------------------------------------------------------------


class _Reader:
    """Little-endian values, one after another."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, layout: str) -> tuple[int | float, ...]:
        values = struct.unpack_from("<" + layout, self._data, self._at)
        self._at += struct.calcsize("<" + layout)
        return values

    def count(self, least_bytes: int) -> int:
        number = int(self.take("Q")[0])
        if number * least_bytes > len(self._data):
            raise ValueError(f"it says {number} entries, more than the file can hold")
        return number

    def text(self) -> str:
        end = self._data.index(b"\0", self._at)
        found = self._data[self._at : end].decode()
        self._at = end + 1
        return found

    def skip(self, size: int) -> None:
        self._at += size


def _binary_cameras(data: bytes) -> dict[int, ModelCamera]:
    reader, found = _Reader(data), {}
    for _ in range(reader.count(24)):
        number, kind, width, height = (int(v) for v in reader.take("iiQQ"))
        name = MODELS.get(kind, f"number {kind}")
        values = [float(v) for v in reader.take(f"{PARAMETERS.get(name, 0)}d")]
        found[number] = _camera(name, width, height, values)
    return found


def _binary_images(data: bytes) -> list[ModelImage]:
    reader, found = _Reader(data), []
    for _ in range(reader.count(64)):
        (number,) = reader.take("i")
        values = [float(v) for v in reader.take("7d")]
        (camera,) = reader.take("i")
        name = reader.text()
        reader.skip(24 * reader.count(24))
        found.append(_image(int(number), values, int(camera), name))
    return found


def _binary_points(data: bytes) -> Iterator[tuple[list[float], list[int]]]:
    reader = _Reader(data)
    for _ in range(reader.count(43)):
        reader.take("Q")
        position = [float(v) for v in reader.take("3d")]
        reader.take("3Bd")
        track = reader.take(f"{2 * reader.count(8)}i")
        yield position, [int(v) for v in track[::2]]


# --- what both share ---------------------------------------------------------------------------


def _camera(name: str, width: int, height: int, parameters: list[float]) -> ModelCamera:
    """A camera without distortion.

    Raises:
        SceneError: it has some, or is no plain pinhole.
    """
    if name not in PARAMETERS:
        raise SceneError(
            f"COLMAP's camera model {name} has distortion, which NeRF's pinhole camera cannot "
            "have; undistort photos and model together first: colmap image_undistorter "
            "--image_path images --input_path sparse/0 --output_path undistorted"
        )
    plain = all(abs(value) < HUGE for value in parameters)  # nor NaN
    if len(parameters) != PARAMETERS[name] or min(width, height) < 1 or not plain:
        raise ValueError(f"camera {name} of {width}×{height} with {len(parameters)} parameters")
    focals, centre = parameters[:-2], parameters[-2:]
    if min(focals) <= 0 or max(focals) > min(focals) * (1 + SQUARE):
        raise SceneError(
            f"COLMAP found the focal lengths {focals}; NeRF's camera has one, above 0: run COLMAP "
            "with --ImageReader.camera_model SIMPLE_PINHOLE"
        )
    off = max(abs(centre[0] - width / 2) / width, abs(centre[1] - height / 2) / height)
    if off > SQUARE:
        _log.warning(
            "the principal point lies %.1f %% off the middle of the photo; NeRF takes the middle",
            100 * off,
        )
    return ModelCamera(width, height, sum(focals) / len(focals))


def _image(number: int, values: list[float], camera: int, name: str) -> ModelImage:
    if len(values) != 7 or not all(abs(value) < HUGE for value in values):  # nor NaN
        raise ValueError(f"image {name} has no pose")
    quaternion, translation = np.array(values[:4]), np.array(values[4:])
    length = float(np.linalg.norm(quaternion))
    if length == 0:
        raise ValueError(f"image {name} has no pose")
    w, x, y, z = quaternion / length
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    return ModelImage(number, name, camera, rotation, translation)


def _by_image(
    points: Iterator[tuple[list[float], list[int]]],
) -> dict[int, Float[np.ndarray, "points 3"]]:
    seen: dict[int, list[list[float]]] = {}
    for position, images in points:
        if not all(abs(value) < HUGE for value in position):  # nor NaN
            raise ValueError(f"a point at {position}")
        for image in set(images):
            seen.setdefault(image, []).append(position)
    return {image: np.array(positions) for image, positions in seen.items()}


def _bounds(folder: Path, model: Model, image: ModelImage) -> Float[np.ndarray, "2"]:
    points = model.seen.get(image.number, np.zeros((0, 3)))
    depths = (points @ image.rotation.T + image.translation)[:, 2]
    depths = depths[depths > 0]
    if len(depths) == 0 or depths.min() == depths.max():
        raise SceneError(
            f"{folder}: the photo {image.name} sees {len(depths)} points of the model, too few to "
            "tell how far the scene is; take it out, or place it again with COLMAP"
        )
    return np.quantile(depths, QUANTILES)


def _one_camera(folder: Path, model: Model) -> ModelCamera:
    """The camera of all photos.

    Raises:
        SceneError: there is no photo, or there are cameras that differ.
    """
    if len(model.images) < 2:
        raise SceneError(f"{folder}: COLMAP placed {len(model.images)} photos; take more of them")
    unknown = sorted({i.camera for i in model.images} - set(model.cameras))
    if unknown:
        raise SceneError(f"{folder}: images name the cameras {unknown}, which the model lacks")
    cameras = [model.cameras[number] for number in sorted({i.camera for i in model.images})]
    first = cameras[0]
    for other in cameras[1:]:
        same_size = (other.width, other.height) == (first.width, first.height)
        if not same_size or abs(other.focal - first.focal) > SQUARE * first.focal:
            raise SceneError(
                f"{folder}: the photos come from cameras that differ ({first} and {other}); NeRF "
                "has one: run COLMAP with --ImageReader.single_camera 1"
            )
    return first


def _photos(folder: Path, model: Model, factor: int) -> tuple[list[Path], int]:
    """The photo of every image, and how many times smaller than its file it is to be."""
    ready = folder / ("images" if factor == 1 else f"images_{factor}")
    source, shrink = (ready, 1) if ready.is_dir() else (folder / "images", factor)
    found = []
    for image in model.images:
        exact = inside(source, image.name, str(folder))
        there = [exact, *(exact.with_suffix(suffix) for suffix in _SUFFIXES)]
        path = next((p for p in there if p.is_file()), None)
        if path is None:
            raise SceneError(
                f"{exact} is missing, though COLMAP placed it; copy the photos into {source}"
            )
        found.append(path)
    return found, shrink


def _suffix(folder: Path) -> str | None:
    return next(
        (s for s in (".bin", ".txt") if all((folder / f"{p}{s}").is_file() for p in PARTS)), None
    )


def _files(folder: Path) -> list[Path]:
    return [folder / f"{part}{_suffix(folder)}" for part in PARTS]


def _fingerprint(settings: SceneSettings) -> str:
    folder = settings.folder()
    place = model_folder(folder)
    factor = photo_factor(folder, settings.factor)
    photos, shrink = _photos(folder, read_model(place), factor)
    shaping = shaping_settings(settings, factor)
    return fingerprint({"format": "colmap", "shrink": shrink, **shaping}, [*_files(place), *photos])


def _training_views(settings: SceneSettings) -> int:
    views = len(read_model(model_folder(settings.folder())).images)
    return views - len(range(0, views, settings.holdout))


def _recognises(folder: Path) -> bool:
    return any(_suffix(folder / place) for place in PLACES)


FORMAT = SceneFormat(
    "colmap", "sparse/0/cameras.bin", _recognises, load, _fingerprint, _training_views
)
