"""Average poses, and the camera paths that videos fly along.

A pose is a camera-to-world matrix of shape (3, 4) whose columns are right, up, backwards (the
camera looks along −z) and position, in scene units. Everything here is float64: these numbers are
computed once a scene.

Source: Mildenhall et al. 2020 and the authors' released code; LLFF (Mildenhall et al. 2019) for
the average pose.
"""

import numpy as np
from jaxtyping import Float

from nerf.errors import SceneError

SPIRAL_FRAMES = 120
SPIRAL_ROTATIONS = 2
SPIRAL_Z_RATE = 0.5
ORBIT_FRAMES = 40
ORBIT_ELEVATION = -30.0
ORBIT_RADIUS = 4.0

# The spiral looks at the depth whose disparity lies a quarter of the way from the farthest
# disparity to the nearest.
_FAR_SHARE = 0.75
_NEAR_MARGIN = 0.9
_FAR_MARGIN = 5.0
_RADIUS_PERCENTILE = 90
_DEGENERATE = 1e-8


def normalised(vector: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3"]:
    """The unit vector along `vector`.

    Raises:
        SceneError: the vector has no direction (views that cancel out, or an up direction along
            the line of sight).
    """
    length = float(np.linalg.norm(vector))
    if not length > _DEGENERATE:
        raise SceneError(
            f"the poses have no common orientation: the vector {vector.tolist()} has no direction; "
            "a forward-facing scene needs views that look roughly the same way"
        )
    return vector / length


def look_matrix(
    backwards: Float[np.ndarray, "3"],
    up: Float[np.ndarray, "3"],
    position: Float[np.ndarray, "3"],
) -> Float[np.ndarray, "3 4"]:
    """The pose at `position` that looks against `backwards`, with `up` as upright as can be."""
    z = normalised(backwards)
    x = normalised(np.cross(up, z))
    y = normalised(np.cross(z, x))
    return np.stack((x, y, z, position), axis=1)


def average_pose(poses: Float[np.ndarray, "views 3 4"]) -> Float[np.ndarray, "3 4"]:
    """The pose at the mean position that looks the mean way."""
    return look_matrix(
        poses[:, :, 2].sum(axis=0), poses[:, :, 1].sum(axis=0), poses[:, :, 3].mean(axis=0)
    )


def recentre(poses: Float[np.ndarray, "views 3 4"]) -> Float[np.ndarray, "views 3 4"]:
    """Express poses in the frame of their average pose, which becomes the identity."""
    average = average_pose(poses)
    to_average = average[:, :3].T  # the inverse of a rotation
    moved = poses.copy()
    moved[:, :, 3] -= average[:, 3]
    return np.einsum("ij,vjk->vik", to_average, moved)


def spiral_path(
    poses: Float[np.ndarray, "views 3 4"],
    nearest: float,
    farthest: float,
    *,
    frames: int = SPIRAL_FRAMES,
    rotations: int = SPIRAL_ROTATIONS,
    z_rate: float = SPIRAL_Z_RATE,
) -> Float[np.ndarray, "frames 3 4"]:
    """A spiral around the average of forward-facing poses, always looking at one point.

    Args:
        poses: recentred poses of the photos.
        nearest: smallest depth bound of the scene, scene units.
        farthest: largest depth bound of the scene, scene units.
        frames: poses on the path.
        rotations: turns of the spiral.
        z_rate: forward and backward swings a turn.

    Returns:
        The poses of the path; sideways it covers the 90th percentile of the photos' positions.
    """
    close, distant = nearest * _NEAR_MARGIN, farthest * _FAR_MARGIN
    focus = 1.0 / ((1.0 - _FAR_SHARE) / close + _FAR_SHARE / distant)
    average = average_pose(poses)
    up = poses[:, :, 1].sum(axis=0)
    radii = np.percentile(np.abs(poses[:, :, 3]), _RADIUS_PERCENTILE, axis=0)
    target = average[:, :3] @ np.array([0.0, 0.0, -focus]) + average[:, 3]
    path = []
    for angle in np.linspace(0.0, 2.0 * np.pi * rotations, frames, endpoint=False):
        offset = radii * np.array([np.cos(angle), -np.sin(angle), -np.sin(angle * z_rate)])
        position = average[:, :3] @ offset + average[:, 3]
        path.append(look_matrix(position - target, up, position))
    return np.stack(path)


def orbit_path(
    *,
    frames: int = ORBIT_FRAMES,
    elevation: float = ORBIT_ELEVATION,
    radius: float = ORBIT_RADIUS,
) -> Float[np.ndarray, "frames 3 4"]:
    """A circle around the origin with z up, as the Blender scenes are filmed.

    Args:
        frames: poses on the path.
        elevation: degrees; negative looks down from above, as in the authors' code.
        radius: distance from the origin, scene units.

    Returns:
        Poses that look at the origin, starting where the authors' path starts (−180°).
    """
    pitch = np.radians(elevation)
    path = []
    for turn in np.radians(np.linspace(-180.0, 180.0, frames, endpoint=False)):
        backwards = np.array(
            [np.sin(turn) * np.cos(pitch), np.cos(turn) * np.cos(pitch), -np.sin(pitch)]
        )
        path.append(look_matrix(backwards, np.array([0.0, 0.0, 1.0]), radius * backwards))
    return np.stack(path)
