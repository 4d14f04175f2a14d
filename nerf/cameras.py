"""Cameras and the rays through their pixels.

Letters: H, W image height and width (pixels); f focal length (pixels); o ray origins, d ray
directions (scene units, not normalised); t distance along a ray in units of |d|.

The camera looks along −z, x points right, y up (the OpenGL convention NeRF uses). Pixel (row,
column) is sampled at its integer coordinates, as NeRF does.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NDC_NEAR_PLANE = 1.0


@dataclass(frozen=True)
class Camera:
    """Pinhole intrinsics and the space its rays are expressed in.

    Attributes:
        height: pixels.
        width: pixels.
        focal: focal length in pixels.
        ndc: whether rays are warped to normalised device coordinates (forward-facing scenes).
    """

    height: int
    width: int
    focal: float
    ndc: bool


@dataclass(frozen=True)
class Rays:
    """A batch of rays.

    Attributes:
        origins: o, in ray space (NDC or scene units).
        directions: d, in ray space, not normalised.
        view_directions: unit directions in world space: what the colour depends on.
    """

    origins: Float[Tensor, "rays 3"]
    directions: Float[Tensor, "rays 3"]
    view_directions: Float[Tensor, "rays 3"]

    def __len__(self) -> int:
        return len(self.origins)

    def __getitem__(self, index: slice | Int[Tensor, " picked"]) -> "Rays":
        return Rays(self.origins[index], self.directions[index], self.view_directions[index])

    def to(self, device: str | torch.device) -> "Rays":
        """Copy to a device."""
        return Rays(
            self.origins.to(device), self.directions.to(device), self.view_directions.to(device)
        )

    @staticmethod
    def concatenate(parts: "list[Rays]") -> "Rays":
        """Join batches along the ray axis."""
        return Rays(
            torch.cat([p.origins for p in parts]),
            torch.cat([p.directions for p in parts]),
            torch.cat([p.view_directions for p in parts]),
        )


def view_rays(
    camera: Camera, pose: Float[Tensor, "3 4"], pixels: Int[Tensor, " picked"] | None = None
) -> Rays:
    """Rays through the pixels of one view.

    Args:
        camera: intrinsics and ray space.
        pose: camera-to-world matrix.
        pixels: row-major pixel numbers (row · width + column); all of them when None.

    Returns:
        One ray a pixel, row by row, on the pose's device and in its dtype.
    """
    if pixels is None:
        pixels = torch.arange(camera.height * camera.width, device=pose.device)
    columns = (pixels % camera.width).to(pose.dtype)
    rows = torch.div(pixels, camera.width, rounding_mode="floor").to(pose.dtype)
    in_camera = torch.stack(
        (
            (columns - camera.width * 0.5) / camera.focal,
            -(rows - camera.height * 0.5) / camera.focal,
            -torch.ones_like(columns),
        ),
        dim=-1,
    )
    directions = in_camera @ pose[:, :3].T
    origins = pose[:, 3].expand_as(directions)
    view_directions = directions / directions.norm(dim=-1, keepdim=True)
    if camera.ndc:
        origins, directions = to_ndc(camera, origins, directions)
    return Rays(origins, directions, view_directions)


def to_ndc(
    camera: Camera, origins: Float[Tensor, "rays 3"], directions: Float[Tensor, "rays 3"]
) -> tuple[Float[Tensor, "rays 3"], Float[Tensor, "rays 3"]]:
    """Warp rays to normalised device coordinates, t ∈ [0, 1] from the near plane to infinity.

    Source: Mildenhall et al. 2020, appendix C, with the near plane at 1 scene unit.
    """
    t = -(NDC_NEAR_PLANE + origins[:, 2]) / directions[:, 2]
    origins = origins + t[:, None] * directions
    x_scale = -2.0 * camera.focal / camera.width
    y_scale = -2.0 * camera.focal / camera.height
    x_over_z, y_over_z = origins[:, 0] / origins[:, 2], origins[:, 1] / origins[:, 2]
    ndc_origins = torch.stack(
        (x_scale * x_over_z, y_scale * y_over_z, 1.0 + 2.0 * NDC_NEAR_PLANE / origins[:, 2]), dim=-1
    )
    ndc_directions = torch.stack(
        (
            x_scale * (directions[:, 0] / directions[:, 2] - x_over_z),
            y_scale * (directions[:, 1] / directions[:, 2] - y_over_z),
            -2.0 * NDC_NEAR_PLANE / origins[:, 2],
        ),
        dim=-1,
    )
    return ndc_origins, ndc_directions
