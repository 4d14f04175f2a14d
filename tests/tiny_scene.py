"""A scene small enough to train on within a test."""

import numpy as np

from nerf.cameras import Camera
from nerf.scenes import Scene


def tiny_scene(
    *, views=5, height=6, width=7, seed=0, ndc=False, white_background=False, holdout=4
) -> Scene:
    """Smooth, much alike photos from cameras that look down −z, every fourth view held out."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    phases = random.uniform(0, 6, 3) + random.uniform(0, 0.5, (views, 1, 1, 3))
    images = 0.5 + 0.4 * np.sin(3 * rows[..., None] + 4 * columns[..., None] + phases)
    poses = np.concatenate((np.eye(3), np.zeros((3, 1))), axis=1)[None].repeat(views, axis=0)
    poses[:, :, 3] = 0.3 * random.standard_normal((views, 3))
    return Scene(
        name="tiny",
        images=images.astype(np.float32),
        poses=poses.astype(np.float32),
        camera=Camera(height, width, focal=8.0, ndc=ndc),
        near=0.0 if ndc else 1.0,
        far=1.0 if ndc else 3.0,
        train=tuple(v for v in range(views) if v % holdout),
        test=tuple(v for v in range(views) if v % holdout == 0),
        white_background=white_background,
        fingerprint=f"tiny-{seed}",
        spiral=poses[:2].astype(np.float32),
    )
