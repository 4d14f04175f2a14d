"""Rays that no photo was taken along, for a teacher to render: between the training cameras.

An invented pose lies on the line between a training camera and one of its nearest neighbours, or a
little beyond either; it looks where the two look, mixed alike.

Source: Wang et al. 2022 (R2L), section 3.3, for training a small network on rays that a teacher
renders; they draw poses at random within the bounds of the training cameras.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nerf.camera_paths import look_matrix
from nerf.cameras import Rays, view_rays
from nerf.errors import SceneError
from nerf.scenes.scene import Scene

NEIGHBOURS = 4
BEYOND = 0.2
"""How far beyond a camera a pose may lie, as a share of the way to its neighbour."""
POSES = 64
RAYS_A_POSE = 2048


def invented_poses(
    poses: Float[np.ndarray, "views 3 4"], count: int, seed: int
) -> Float[np.ndarray, "count 3 4"]:
    """Seeded poses around those of the photos (one lone photo gives its own pose).

    Args:
        poses: of the training views.
        count: how many.
        seed: draws them.
    """
    random = np.random.default_rng(seed)
    places = poses[:, :, 3].astype(np.float64)
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    made: list[np.ndarray] = []
    while len(made) < count:
        first = int(random.integers(len(poses)))
        near = np.argsort(apart[first], kind="stable")[1 : NEIGHBOURS + 1]
        second = int(random.choice(near)) if len(near) else first
        share = random.uniform(-BEYOND, 1 + BEYOND)
        mixed = (1 - share) * poses[first].astype(np.float64) + share * poses[second]
        try:
            made.append(look_matrix(mixed[:, 2], mixed[:, 1], mixed[:, 3]))
        except SceneError:  # two cameras that look against each other
            made.append(poses[first].astype(np.float64))
    return np.stack(made)


class InventedRays:
    """An endless supply of such rays, a block at a time, on one device.

    A block is `POSES` poses with `RAYS_A_POSE` pixels each, shuffled. Iteration i takes the i-th
    batch; when a block is used up the next one takes its place in the same memory, so that a
    captured step goes on reading it.

    Args:
        scene: whose training cameras and camera are used.
        seed: of poses, pixels and order.
        device: where the rays are kept.
        poses: of a block.
        rays_a_pose: of a block.
    """

    def __init__(
        self,
        scene: Scene,
        seed: int,
        device: torch.device,
        poses: int = POSES,
        rays_a_pose: int = RAYS_A_POSE,
    ) -> None:
        self._scene, self._seed, self._device = scene, seed, device
        self._poses, self._rays_a_pose = poses, rays_a_pose
        self._number = 0
        self.rays = self._block(0)

    def pick(self, iteration: int, size: int) -> Int[Tensor, " rays"]:
        """The numbers of the rays of one iteration within `rays`."""
        size = min(size, len(self.rays))
        if size == 0:
            return torch.zeros(0, dtype=torch.int64, device=self._device)
        number, place = divmod(iteration, len(self.rays) // size)
        if number != self._number:
            fresh = self._block(number)
            for name in ("origins", "directions", "view_directions"):
                getattr(self.rays, name).copy_(getattr(fresh, name))
            self._number = number
        return torch.arange(place * size, (place + 1) * size, device=self._device)

    def _block(self, number: int) -> Rays:
        seed = (self._seed * 1_000_003 + number * 104_729 + 17) % 2**63
        generator = torch.Generator().manual_seed(seed)
        camera = self._scene.camera
        poses = invented_poses(self._scene.poses[list(self._scene.train)], self._poses, seed)
        parts = []
        for pose in torch.as_tensor(poses, dtype=torch.float32).to(self._device):
            count = (self._rays_a_pose,)
            pixels = torch.randint(camera.height * camera.width, count, generator=generator)
            parts.append(view_rays(camera, pose, pixels.to(self._device)))
        rays = Rays.concatenate(parts)
        return rays[torch.randperm(len(rays), generator=generator).to(self._device)]
