"""Rays and camera paths against slow references: one pixel at a time, plain floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerf.camera_paths import average_pose, look_matrix, orbit_path, recentre, spiral_path
from nerf.cameras import Camera, Rays, to_ndc, view_rays
from nerf.errors import SceneError


def slow_ray(camera, pose, row, column):
    """Origin, direction and unit world direction of one pixel's ray, by the definitions.

    In NDC the origin and direction are found from two world points that the ray passes, projected
    by the perspective matrix itself (near plane 1, far plane at infinity), not by the closed form.
    """
    x = (column - camera.width / 2) / camera.focal
    y = (camera.height / 2 - row) / camera.focal
    direction = [sum(pose[i][j] * v for j, v in enumerate((x, y, -1.0))) for i in range(3)]
    origin = [pose[i][3] for i in range(3)]
    length = math.sqrt(sum(v * v for v in direction))
    unit = [v / length for v in direction]
    if not camera.ndc:
        return origin, direction, unit
    to_plane = (-1.0 - origin[2]) / direction[2]
    start = [o + to_plane * d for o, d in zip(origin, direction, strict=True)]

    def project(point):
        px, py, pz = point
        right, top = camera.width / (2 * camera.focal), camera.height / (2 * camera.focal)
        # Clip coordinates for near 1 and far → ∞, divided by w = −z.
        return [(px / right) / -pz, (py / top) / -pz, (-pz - 2.0) / -pz]

    ndc_origin = project(start)
    # The ray's end at infinity is its vanishing point: z = 1 there, t = 1.
    right, top = camera.width / (2 * camera.focal), camera.height / (2 * camera.focal)
    end = [direction[0] / -direction[2] / right, direction[1] / -direction[2] / top, 1.0]
    return ndc_origin, [e - o for e, o in zip(end, ndc_origin, strict=True)], unit


def some_pose(seed=0):
    random = np.random.default_rng(seed)
    backwards = np.array([0.0, 0.0, 1.0]) + 0.3 * random.standard_normal(3)
    return look_matrix(backwards, np.array([0.1, 1.0, 0.0]), 0.4 * random.standard_normal(3))


@pytest.mark.parametrize("ndc", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rays_agree_with_the_slow_reference(ndc, seed):
    camera = Camera(height=5, width=7, focal=6.3, ndc=ndc)
    pose = some_pose(seed)
    rays = view_rays(camera, torch.from_numpy(pose))
    assert len(rays) == 35
    for pixel in range(35):
        origin, direction, unit = slow_ray(camera, pose.tolist(), *divmod(pixel, 7))
        assert rays.origins[pixel].tolist() == pytest.approx(origin, abs=1e-12)
        assert rays.directions[pixel].tolist() == pytest.approx(direction, abs=1e-12)
        assert rays.view_directions[pixel].tolist() == pytest.approx(unit, abs=1e-12)


def test_picked_pixels_are_those_of_the_whole_view():
    camera = Camera(height=4, width=6, focal=5.0, ndc=True)
    pose = torch.from_numpy(some_pose())
    picked = torch.tensor([23, 0, 7, 7])
    every, some = view_rays(camera, pose), view_rays(camera, pose, picked)
    assert torch.equal(some.origins, every[picked].origins)
    assert torch.equal(some.directions, every[picked].directions)
    assert torch.equal(some.view_directions, every[picked].view_directions)


def test_the_middle_pixel_looks_straight_ahead():
    camera = Camera(height=4, width=6, focal=5.0, ndc=False)
    rays = view_rays(camera, torch.eye(3, 4, dtype=torch.float64), torch.tensor([2 * 6 + 3]))
    assert rays.directions.tolist() == [[0.0, 0.0, -1.0]]


def test_left_and_top_of_the_picture_are_left_and_up_in_the_world():
    camera = Camera(height=4, width=6, focal=5.0, ndc=False)
    corner = view_rays(camera, torch.eye(3, 4), torch.tensor([0])).directions[0]
    assert corner[0] < 0 < corner[1]


def test_rays_keep_the_dtype_of_the_pose():
    camera = Camera(height=2, width=2, focal=2.0, ndc=True)
    assert view_rays(camera, torch.eye(3, 4)).origins.dtype == torch.float32


def test_ndc_starts_at_the_near_plane_and_ends_at_infinity():
    camera = Camera(height=30, width=40, focal=35.0, ndc=True)
    rays = view_rays(camera, torch.from_numpy(some_pose(4)))
    assert torch.allclose(rays.origins[:, 2], -torch.ones(1200, dtype=torch.float64))
    assert torch.allclose((rays.origins + rays.directions)[:, 2], torch.ones(1).double())


@given(
    depth=st.floats(1.0, 1e4),
    x=st.floats(-0.5, 0.5),
    y=st.floats(-0.5, 0.5),
    ahead=st.floats(-0.5, 0.5),
)
def test_ndc_keeps_points_of_a_ray_on_it(depth, x, y, ahead):
    """A world point on a ray projects to the point of the NDC ray at t = 1 − 1/depth."""
    camera = Camera(height=30, width=40, focal=35.0, ndc=True)
    origin = torch.tensor([[0.1, -0.2, ahead]], dtype=torch.float64)
    direction = torch.tensor([[x, y, -1.0]], dtype=torch.float64)
    point = (origin + (depth + ahead) * direction)[0].tolist()  # at z = −depth
    ndc_origin, ndc_direction = to_ndc(camera, origin, direction)
    on_ray = (ndc_origin + (1 - 1 / depth) * ndc_direction)[0].tolist()
    projected = [
        point[0] / depth * 2 * 35.0 / 40,
        point[1] / depth * 2 * 35.0 / 30,
        1 - 2 / depth,
    ]
    assert on_ray == pytest.approx(projected, abs=1e-9)


def test_joined_rays_keep_their_order():
    camera = Camera(height=2, width=3, focal=2.0, ndc=False)
    one, two = (view_rays(camera, torch.from_numpy(some_pose(s))) for s in (1, 2))
    both = Rays.concatenate([one, two])
    assert torch.equal(both.directions[:6], one.directions)
    assert torch.equal(both.origins[6:], two.origins)


def is_rotation(matrix):
    return np.allclose(matrix.T @ matrix, np.eye(3)) and np.isclose(np.linalg.det(matrix), 1)


def test_look_matrix_is_a_rotation_with_its_axes_where_they_were_asked():
    pose = look_matrix(np.array([0, 0, 2.0]), np.array([0, 3.0, 1.0]), np.array([1.0, 2, 3]))
    assert np.allclose(pose, [[1, 0, 0, 1], [0, 1, 0, 2], [0, 0, 1, 3]])


def test_views_without_a_common_direction_are_refused():
    facing = look_matrix(np.array([0, 0, 1.0]), np.array([0, 1.0, 0]), np.zeros(3))
    away = look_matrix(np.array([0, 0, -1.0]), np.array([0, 1.0, 0]), np.zeros(3))
    with pytest.raises(SceneError, match="no common orientation"):
        average_pose(np.stack((facing, away)))


def test_recentred_poses_have_the_identity_as_their_average():
    poses = np.stack([some_pose(seed) for seed in range(9)])
    moved = recentre(poses)
    assert np.allclose(average_pose(moved), np.eye(3, 4), atol=1e-12)
    # A rigid motion: what the views are to each other stays.
    for one in range(9):
        before = poses[0, :, :3].T @ poses[one, :, :3]
        assert np.allclose(moved[0, :, :3].T @ moved[one, :, :3], before)
        apart = np.linalg.norm(poses[0, :, 3] - poses[one, :, 3])
        assert np.linalg.norm(moved[0, :, 3] - moved[one, :, 3]) == pytest.approx(apart)


def slow_spiral(poses, nearest, farthest):
    """NeRF's spiral, one frame at a time, for poses whose average is the identity."""
    close, distant = 0.9 * nearest, 5 * farthest
    focus = 1 / (0.25 / close + 0.75 / distant)
    radii = []
    for axis in range(3):
        ordered = sorted(abs(pose[axis][3]) for pose in poses)
        place = 0.9 * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        radii.append(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
    up = [sum(pose[i][1] for pose in poses) for i in range(3)]
    frames = []
    for frame in range(120):
        angle = 4 * math.pi * frame / 120
        position = [
            radii[0] * math.cos(angle),
            -radii[1] * math.sin(angle),
            -radii[2] * math.sin(0.5 * angle),
        ]
        back = [position[0], position[1], position[2] + focus]
        size = math.sqrt(sum(v * v for v in back))
        back = [v / size for v in back]
        right = np.cross(up, back)
        right = right / math.sqrt(sum(v * v for v in right))
        frames.append(np.stack((right, np.cross(back, right), back, position), axis=1))
    return np.stack(frames)


def test_spiral_agrees_with_the_slow_reference():
    poses = recentre(np.stack([some_pose(seed) for seed in range(11)]))
    path = spiral_path(poses, 1.3, 6.0)
    assert np.allclose(path, slow_spiral(poses.tolist(), 1.3, 6.0), atol=1e-9)
    assert all(is_rotation(pose[:, :3]) for pose in path)


def test_orbit_agrees_with_the_composed_rotations():
    """The authors' path: out along z, tilt, turn, then Blender's axes swapped."""
    path = orbit_path()
    assert path.shape == (40, 3, 4)
    out = np.eye(4)
    out[2, 3] = 4.0
    tilt, swap = np.eye(4), np.eye(4)
    c, s = math.cos(math.radians(-30)), math.sin(math.radians(-30))
    tilt[1:3, 1:3] = [[c, -s], [s, c]]
    swap[:3, :3] = [[-1, 0, 0], [0, 0, 1], [0, 1, 0]]
    for frame, pose in enumerate(path):
        angle = math.radians(-180 + 9 * frame)
        turn = np.eye(4)
        turn[0, 0] = turn[2, 2] = math.cos(angle)
        turn[0, 2], turn[2, 0] = -math.sin(angle), math.sin(angle)
        assert np.allclose(pose, (swap @ turn @ tilt @ out)[:3], atol=1e-12)
