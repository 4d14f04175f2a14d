"""What a scene is once it is loaded, whatever format it came in."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from nerf.cameras import Camera
from nerf.errors import SceneError


@dataclass(frozen=True)
class Scene:
    """Photos, the poses they were taken from, and how they split.

    Attributes:
        name: what to call it in tables, e.g. the folder's name.
        images: photos in [0, 1], RGB; transparent ones already laid over white.
        poses: camera-to-world matrices: columns right, up, backwards, position.
        camera: pinhole intrinsics shared by all photos, and the ray space (NDC or world).
        near: nearest sample distance (NDC: 0).
        far: farthest sample distance (NDC: 1).
        train: indices of the training views.
        test: indices of the held-out views.
        white_background: whether rays that hit nothing are white.
        fingerprint: hash of everything above, so that results can name the data they rest on.
        spiral: poses of a camera path for a video.
    """

    name: str
    images: Float[np.ndarray, "views height width 3"]
    poses: Float[np.ndarray, "views 3 4"]
    camera: Camera
    near: float
    far: float
    train: tuple[int, ...]
    test: tuple[int, ...]
    white_background: bool
    fingerprint: str
    spiral: Float[np.ndarray, "frames 3 4"]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.poses):
            raise SceneError(
                f"{self.name}: {len(self.images)} images but {len(self.poses)} poses; "
                "every image needs exactly one pose"
            )
        if not np.isfinite(self.poses).all():
            bad = sorted({int(v) for v in np.argwhere(~np.isfinite(self.poses))[:, 0]})
            raise SceneError(f"{self.name}: the poses of views {bad} hold NaN or infinity")
        if not self.train or not self.test:
            raise SceneError(
                f"{self.name}: {len(self.train)} training and {len(self.test)} held-out views; "
                "each must be at least 1 (see `scene.holdout`)"
            )
