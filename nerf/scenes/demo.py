"""A small forward-facing scene that prunefield ray-traces itself, in LLFF's format.

Striped and glossy spheres and boxes stand on a checkered floor before a striped wall. The world's
letters: x right, y up, z towards the cameras, which stand around the origin and look along −z.
Everything is a closed formula, so every machine renders the same scene; `DEMO_VERSION` stands for
its content in fingerprints, and must change when a pixel does.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from nerf.camera_paths import look_matrix
from nerf.errors import SceneError
from nerf.scenes import llff
from nerf.scenes.format import SceneFormat
from nerf.scenes.photos import fingerprint
from nerf.scenes.scene import Scene
from nerf.scenes.settings import SceneSettings

DEMO_VERSION = "demo-1"
WIDTH, HEIGHT, FOCAL = 96, 72, 100.0

_MARKER = "prunefield-demo.json"
_SUPERSAMPLES = 3  # a side, for each pixel
_LOOK_AT = np.array([0.0, -0.2, -5.2])
_LIGHT = np.array([-2.6, 4.2, 0.4])
_LIGHT_RADIUS = 0.7
_AMBIENT = 0.42
_FLOOR, _WALL = -1.2, -7.5
_GAMMA = 2.2
# Columns and rows of a 5×4 grid of cameras, in the order of the photos: those that a holdout of 8
# keeps back (0, 8, 16) stand inside the grid, so that no held-out view is an extrapolation.
_GRID = (
    (2, 1), (0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (0, 1), (1, 1), (3, 2), (4, 1),
    (0, 2), (2, 2), (3, 1), (4, 2), (0, 3), (1, 3), (1, 2), (2, 3), (3, 3), (4, 3),
)  # fmt: skip
_SPACING = np.array([0.26, 0.22])
_JITTER = 0.05

_log = logging.getLogger(__name__)

_Points = Float[np.ndarray, "points 3"]
_Texture = Callable[[_Points], Float[np.ndarray, "points 3"]]


@dataclass(frozen=True)
class _Hits:
    """Where rays meet one thing.

    Attributes:
        t: distance in units of |d|; infinity where they miss.
        normals: unit vectors, outwards; arbitrary where they miss.
    """

    t: Float[np.ndarray, " rays"]
    normals: Float[np.ndarray, "rays 3"]


@dataclass(frozen=True)
class _Thing:
    """A surface: how rays meet it, its colour at a point (linear RGB), and its gloss."""

    meet: Callable[[_Points, _Points], _Hits]
    texture: _Texture
    gloss: float = 0.0


def training_view_count(settings: SceneSettings) -> int:
    """The scene's number of training views; nothing is read or rendered."""
    return len(_GRID) - len(range(0, len(_GRID), settings.holdout))


def write_demo_scene(folder: Path) -> Path:
    """Render the demo scene into a folder, unless it is there already, whole and current.

    The folder appears at once and complete: it is rendered beside its place and then renamed. An
    older or damaged demo scene is replaced.

    Args:
        folder: where to put it; its parents are made.

    Returns:
        `folder`.

    Raises:
        SceneError: the folder holds something else, or cannot be written.
    """
    if _is_whole(folder):
        return folder
    try:
        if folder.exists() and not (folder / _MARKER).is_file() and any(folder.iterdir()):
            raise SceneError(
                f"{folder} is not empty and holds no demo scene; choose another folder for it, or "
                "move its contents away"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place, so that the rename stays on one disk.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as workshop:
            rendered = Path(workshop) / "rendered"
            _render_into(rendered)
            _put_in_place(rendered, folder, Path(workshop) / "replaced")
    except OSError as error:
        raise SceneError(
            f"cannot write the demo scene to {folder}: {error}; choose a folder you may write to"
        ) from error
    _log.info("rendered the demo scene into %s", folder)
    return folder


def load(settings: SceneSettings) -> Scene:
    """Load the demo scene, rendering it first if need be.

    Without a path it is rendered into a temporary folder, which is gone afterwards.

    Raises:
        SceneError: the folder holds something else, or cannot be written.
    """
    if settings.path is None:
        with tempfile.TemporaryDirectory() as folder:
            return load(replace(settings, path=Path(folder) / "demo"))
    scene = llff.load(replace(settings, path=write_demo_scene(settings.path)))
    return replace(scene, name="demo", fingerprint=scene_fingerprint(settings))


def scene_fingerprint(settings: SceneSettings) -> str:
    """The demo scene's fingerprint: its version and the settings; nothing is rendered or read."""
    shaping = llff.shaping_settings(settings, settings.factor or 1)
    return fingerprint({"format": "demo", "version": DEMO_VERSION, **shaping}, [])


def render_view(
    pose: Float[np.ndarray, "3 4"],
) -> tuple[Float[np.ndarray, "height width 3"], tuple[float, float]]:
    """Ray-trace one view.

    Args:
        pose: camera-to-world matrix (right, up, backwards, position).

    Returns:
        The picture, display-encoded RGB in [0, 1], and the nearest and farthest depth seen along
        the line of sight, in scene units.
    """
    n = _SUPERSAMPLES
    # NeRF takes pixel (column, row) to lie at its integer coordinates: sample boxes around them.
    steps = (np.arange(n) + 0.5) / n - 0.5
    rows = (np.arange(HEIGHT)[:, None] + steps).ravel()
    columns = (np.arange(WIDTH)[:, None] + steps).ravel()
    y, x = np.meshgrid(rows, columns, indexing="ij")
    in_camera = np.stack(
        ((x - WIDTH / 2) / FOCAL, -(y - HEIGHT / 2) / FOCAL, -np.ones_like(x)), axis=-1
    ).reshape(-1, 3)
    directions = in_camera @ pose[:, :3].T
    origins = np.broadcast_to(pose[:, 3], directions.shape)
    # Each sample of a pixel sees another point of the lamp: their mean has soft shadows.
    sample = (np.arange(HEIGHT * n)[:, None] % n) * n + np.arange(WIDTH * n)[None, :] % n
    colours, depths = _trace(origins, directions, _lamp_points()[sample.ravel()])
    linear = colours.reshape(HEIGHT, n, WIDTH, n, 3).mean(axis=(1, 3))
    picture = np.clip(linear, 0.0, 1.0) ** (1 / _GAMMA)
    return picture, (float(depths.min()), float(depths.max()))


def demo_poses() -> Float[np.ndarray, "views 3 4"]:
    """The poses of the photos: a slightly jittered grid that faces the scene."""
    poses = []
    for number, (column, row) in enumerate(_GRID):
        # The golden ratio's multiples are an even jitter without a random generator.
        jitter = (np.array([0.618034, 0.754878, 0.569840]) * (number + 1)) % 1.0 - 0.5
        position = np.array([*((np.array([column, row]) - (2.0, 1.5)) * _SPACING), 0.0])
        position += 2 * _JITTER * jitter
        poses.append(look_matrix(position - _LOOK_AT, np.array([0.0, 1.0, 0.0]), position))
    return np.stack(poses)


def _trace(
    origins: _Points, directions: _Points, lamps: _Points
) -> tuple[Float[np.ndarray, "points 3"], Float[np.ndarray, " points"]]:
    """Colour and distance of what rays meet first, lit from one point of the lamp each."""
    nearest = np.full(len(origins), np.inf)
    normals = np.zeros_like(directions)
    albedo = np.zeros_like(directions)
    gloss = np.zeros(len(origins))
    for thing in _THINGS:
        hits = thing.meet(origins, directions)
        closer = hits.t < nearest
        nearest[closer] = hits.t[closer]
        normals[closer] = hits.normals[closer]
        gloss[closer] = thing.gloss
        points = origins[closer] + hits.t[closer, None] * directions[closer]
        albedo[closer] = thing.texture(points)
    points = origins + nearest[:, None] * directions
    to_lamp = lamps - points
    lit = ~_in_shadow(points + 1e-4 * normals, to_lamp)
    to_lamp /= np.linalg.norm(to_lamp, axis=1, keepdims=True)
    facing = np.clip(np.einsum("ij,ij->i", normals, to_lamp), 0.0, None)
    view = -directions / np.linalg.norm(directions, axis=1, keepdims=True)
    halfway = to_lamp + view
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
    shine = gloss * np.clip(np.einsum("ij,ij->i", normals, halfway), 0.0, None) ** 40
    sky = 0.85 + 0.15 * normals[:, 1]
    light = _AMBIENT * sky + (1.0 - _AMBIENT) * 1.25 * facing * lit
    return albedo * light[:, None] + (shine * lit)[:, None], nearest


def _in_shadow(points: _Points, to_lamp: _Points) -> Bool[np.ndarray, " points"]:
    dark = np.zeros(len(points), dtype=bool)
    for thing in _CASTERS:
        dark |= thing.meet(points, to_lamp).t < 1.0
    return dark


def _lamp_points() -> _Points:
    """Points spread over the lamp's disc, as many as a pixel has samples (a sunflower's seeds)."""
    count = _SUPERSAMPLES**2
    order = (np.arange(count) * 7) % count  # neighbours in a pixel see distant parts of the lamp
    radius = _LIGHT_RADIUS * np.sqrt((order + 0.5) / count)
    angle = order * np.pi * (3.0 - np.sqrt(5.0))
    flat = np.stack((radius * np.cos(angle), np.zeros(count), radius * np.sin(angle)), axis=1)
    return _LIGHT + flat


def _sphere(
    centre: tuple[float, float, float], radius: float
) -> Callable[[_Points, _Points], _Hits]:
    middle = np.array(centre)

    def meet(origins: _Points, directions: _Points) -> _Hits:
        from_middle = origins - middle
        a = np.einsum("ij,ij->i", directions, directions)
        b = np.einsum("ij,ij->i", directions, from_middle)
        c = np.einsum("ij,ij->i", from_middle, from_middle) - radius**2
        root = b * b - a * c
        t = (-b - np.sqrt(np.clip(root, 0.0, None))) / a
        t = np.where((root > 0) & (t > 0), t, np.inf)
        reach = np.where(np.isfinite(t), t, 0.0)
        return _Hits(t, (from_middle + reach[:, None] * directions) / radius)

    return meet


def _box(
    centre: tuple[float, float, float], half: tuple[float, float, float], turn: float
) -> Callable[[_Points, _Points], _Hits]:
    """A box turned about the vertical by `turn` radians."""
    middle, extent, to_box = np.array(centre), np.array(half), _turned(turn)

    def meet(origins: _Points, directions: _Points) -> _Hits:
        o, d = (origins - middle) @ to_box.T, directions @ to_box.T
        d = np.where(np.abs(d) < 1e-12, 1e-12, d)
        enter = (-np.sign(d) * extent - o) / d
        leave = (np.sign(d) * extent - o) / d
        side = enter.argmax(axis=1)
        t = enter.max(axis=1)
        t = np.where((t < leave.min(axis=1)) & (t > 0), t, np.inf)
        rows = np.arange(len(d))
        in_box = np.zeros_like(d)
        in_box[rows, side] = -np.sign(d[rows, side])
        return _Hits(t, in_box @ to_box)

    return meet


def _plane(axis: int, level: float) -> Callable[[_Points, _Points], _Hits]:
    """The plane where coordinate `axis` is `level`, seen from its positive side."""

    def meet(origins: _Points, directions: _Points) -> _Hits:
        toward = directions[:, axis]
        heading = toward < -1e-9
        t = np.where(heading, (level - origins[:, axis]) / np.where(heading, toward, 1.0), np.inf)
        normals = np.zeros_like(directions)
        normals[:, axis] = 1.0
        return _Hits(t, normals)

    return meet


def _turned(angle: float) -> Float[np.ndarray, "3 3"]:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0.0, -s], [0.0, 1.0, 0.0], [s, 0.0, c]])


def _mixed(
    share: Float[np.ndarray, " points"],
    first: tuple[float, float, float],
    second: tuple[float, float, float],
) -> Float[np.ndarray, "points 3"]:
    """Blend two linear colours: share 0 is the first, 1 the second."""
    return np.array(first) + share[:, None] * (np.array(second) - np.array(first))


def _softened(wave: Float[np.ndarray, " points"], sharpness: float) -> Float[np.ndarray, " points"]:
    """Turn a wave in [−1, 1] into soft-edged bands in [0, 1]."""
    return 0.5 + 0.5 * np.tanh(sharpness * wave) / np.tanh(sharpness)


def _stripes(
    along: tuple[float, float, float],
    first: tuple[float, float, float],
    second: tuple[float, float, float],
    sharpness: float = 3.0,
) -> _Texture:
    """Soft bands across the direction `along`, whose length is their number in 2π scene units."""

    def texture(points: _Points) -> Float[np.ndarray, "points 3"]:
        return _mixed(_softened(np.sin(points @ np.array(along)), sharpness), first, second)

    return texture


def _checks(
    per_unit: float,
    turn: float,
    first: tuple[float, float, float],
    second: tuple[float, float, float],
    *,
    rise: float = 0.0,
    sharpness: float = 3.0,
) -> _Texture:
    """A soft checker pattern in all three directions, turned about the vertical.

    `rise` lifts the pattern (scene units), to keep level faces away from the zeros of its waves.
    """
    to_pattern, lift = _turned(turn), np.array([0.0, rise, 0.0])

    def texture(points: _Points) -> Float[np.ndarray, "points 3"]:
        waves = np.sin(np.pi * per_unit * (points @ to_pattern.T - lift))
        return _mixed(_softened(waves.prod(axis=1), sharpness), first, second)

    return texture


def _plain(colour: tuple[float, float, float]) -> _Texture:
    def texture(points: _Points) -> Float[np.ndarray, "points 3"]:
        return np.broadcast_to(np.array(colour), points.shape)

    return texture


def _wall(points: _Points) -> Float[np.ndarray, "points 3"]:
    """Dusk: broad slanted bands over a gradient that warms towards the floor."""
    height = np.clip((points[:, 1] - _FLOOR) / 4.5, 0.0, 1.0)
    base = _mixed(height, (0.86, 0.58, 0.36), (0.16, 0.30, 0.58))
    bands = _softened(np.sin(2.6 * points[:, 0] + 0.9 * points[:, 1]), 2.0)
    return base * (0.72 + 0.28 * bands)[:, None]


_CASTERS = (
    _Thing(
        _sphere((-1.05, -0.6, -4.7), 0.6),
        _stripes((4.0, 9.0, 0.0), (0.82, 0.16, 0.07), (0.92, 0.62, 0.22)),
        gloss=0.35,
    ),
    _Thing(_sphere((0.30, -0.82, -3.9), 0.38), _plain((0.05, 0.42, 0.40)), gloss=0.7),
    _Thing(
        _sphere((-0.42, -0.98, -3.75), 0.22),
        _stripes((12.0, 0.0, 0.0), (0.90, 0.70, 0.10), (0.85, 0.85, 0.75)),
        gloss=0.3,
    ),
    _Thing(
        _sphere((0.15, 0.72, -5.6), 0.42),
        _stripes((5.0, -9.0, 0.0), (0.80, 0.82, 0.86), (0.20, 0.35, 0.70)),
        gloss=0.5,
    ),
    _Thing(_sphere((2.15, -0.5, -6.3), 0.7), _plain((0.40, 0.14, 0.46)), gloss=0.6),
    _Thing(
        _box((1.15, -0.62, -5.1), (0.48, 0.58, 0.48), 0.6),
        _checks(2.2, 0.6, (0.50, 0.26, 0.10), (0.80, 0.60, 0.34), rise=-0.23),
    ),
    _Thing(
        _box((-2.15, 0.0, -6.4), (0.36, 1.2, 0.36), -0.5),
        _stripes((0.0, 7.0, 0.0), (0.16, 0.46, 0.20), (0.66, 0.78, 0.42)),
    ),
)
_THINGS = (
    _Thing(_plane(1, _FLOOR), _checks(1.0, 0.5, (0.74, 0.72, 0.68), (0.25, 0.28, 0.36), rise=-0.7)),
    _Thing(_plane(2, _WALL), _wall),
    *_CASTERS,
)


def _render_into(folder: Path) -> None:
    photos = folder / "images"
    photos.mkdir(parents=True)
    rows = []
    for number, pose in enumerate(demo_poses()):
        picture, depths = render_view(pose)
        _encode(picture).save(photos / f"view{number:02d}.png")
        right, up, backwards, position = pose.T
        matrix = np.stack((-up, right, backwards, position, (HEIGHT, WIDTH, FOCAL)), axis=1)
        rows.append(np.concatenate((matrix.ravel(), depths)))
    np.save(folder / llff.POSES_FILE, np.stack(rows))
    marker = {"version": DEMO_VERSION, "files": _hashes(folder)}
    (folder / _MARKER).write_text(json.dumps(marker, indent=1) + "\n")


def _encode(picture: Float[np.ndarray, "height width 3"]) -> Image.Image:
    eight_bit: UInt8[np.ndarray, "height width 3"] = np.rint(255.0 * picture).astype(np.uint8)
    return Image.fromarray(eight_bit)


def _hashes(folder: Path) -> dict[str, str]:
    files = [folder / llff.POSES_FILE, *sorted((folder / "images").iterdir())]
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def _is_whole(folder: Path) -> bool:
    """Whether the current demo scene is there and every file is as it was written."""
    try:
        marker = json.loads((folder / _MARKER).read_bytes())
        return bool(marker == {"version": DEMO_VERSION, "files": _hashes(folder)})
    except (OSError, ValueError):
        return False


def _put_in_place(rendered: Path, folder: Path, aside: Path) -> None:
    """Rename the rendered scene into place; a damaged or older one goes aside first."""
    try:
        if folder.exists() and not _is_whole(folder):
            folder.rename(aside)
        rendered.rename(folder)
    except OSError:
        # Another process was quicker; what it put there is as good if it is whole.
        if not _is_whole(folder):
            raise


def _recognises(folder: Path) -> bool:
    return (folder / _MARKER).is_file()


FORMAT = SceneFormat("demo", _MARKER, _recognises, load, scene_fingerprint, training_view_count)
