"""How good a model is: held-out views, whole pictures, no jitter, no density noise.

MSE in linear [0, 1] RGB after clamping, PSNR = −10·log10(MSE) per view; then means over views.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nerf.backends import Backend
from nerf.cameras import Rays, view_rays
from nerf.devices import Precision
from nerf.field import NerfModel
from nerf.files import replacing
from nerf.metrics import (
    DETAIL_GROUPS,
    SSIM_WINDOW,
    mse,
    pixels_by_detail,
    psnr,
    psnr_by_detail,
    ssim,
)
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings
from nerf.scenes.scene import Scene

ERROR_MAP_FULL_SCALE = 0.25
PNG_LEVEL = 2  # a fifth of the time of zlib's usual 6, for files a tenth larger


@dataclass(frozen=True)
class ViewResult:
    """One held-out view.

    Attributes:
        view: its index in the scene.
        mse: mean squared error in linear [0, 1] RGB.
        psnr: in dB.
        ssim: None when only some of its rays were rendered, or the view is smaller than SSIM's
            window.
        seconds: wall time of the rendering.
        picture: the rendered view; None when only some of its rays were rendered.
        detail: PSNR in dB of each fifth of the pixels, from the flattest of the photo to the most
            detailed (by the gradient of its luminance); empty without a picture.
    """

    view: int
    mse: float
    psnr: float
    ssim: float | None
    seconds: float
    picture: Float[Tensor, "height width 3"] | None
    detail: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """All held-out views and their means.

    Attributes:
        views: view by view.
        rays_per_view: how many rays of each view were rendered.
        whole: whether that was all of them.
    """

    views: tuple[ViewResult, ...]
    rays_per_view: int
    whole: bool

    @property
    def mse(self) -> float:
        """Mean over views."""
        return sum(v.mse for v in self.views) / len(self.views)

    @property
    def psnr(self) -> float:
        """Mean over views, in dB."""
        return sum(v.psnr for v in self.views) / len(self.views)

    @property
    def ssim(self) -> float | None:
        """Mean over views; None where the views have none."""
        scores = [v.ssim for v in self.views if v.ssim is not None]
        return sum(scores) / len(scores) if len(scores) == len(self.views) else None

    @property
    def render_seconds(self) -> float:
        """Mean wall time of a view."""
        return sum(v.seconds for v in self.views) / len(self.views)


class HeldOut:
    """The held-out views of a scene, made ready once: rays and photos on the device.

    Args:
        scene: the scene.
        device: where to render.
        max_rays: render a seeded subset of so many rays a view instead of all.
        seed: of the subset.
    """

    def __init__(
        self, scene: Scene, device: torch.device, max_rays: int | None = None, seed: int = 0
    ) -> None:
        camera = scene.camera
        pixels = camera.height * camera.width
        self.views = scene.test
        self.shape = (camera.height, camera.width, 3)
        self.whole = max_rays is None or max_rays >= pixels
        self.rays_per_view = pixels if max_rays is None else min(max_rays, pixels)
        self.settings = RenderSettings(scene.near, scene.far, scene.white_background)
        self._rays: list[Rays] = []
        self._photos: list[Float[Tensor, "rays 3"]] = []
        self._by_detail: list[Int[Tensor, " pixels"]] = []
        for view in scene.test:
            pose = torch.as_tensor(scene.poses[view], dtype=torch.float32)
            photo = torch.as_tensor(scene.images[view], dtype=torch.float32).reshape(-1, 3)
            picked: Int[Tensor, " picked"] | None = None
            if not self.whole:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + view)
                picked = torch.randperm(pixels, generator=generator)[: self.rays_per_view]
                photo = photo[picked]
            self._rays.append(view_rays(camera, pose, picked).to(device))
            self._photos.append(photo.to(device))
            if self.whole and pixels >= DETAIL_GROUPS:
                self._by_detail.append(pixels_by_detail(self._photos[-1].view(self.shape)))

    def evaluate(
        self,
        model: NerfModel,
        precision: Precision = "float32",
        chunk: int | None = None,
        progress: Callable[[int], None] | None = None,
        backend: Backend = "auto",
    ) -> Evaluation:
        """Render every held-out view and compare it with its photo.

        Args:
            model: on the same device.
            precision: arithmetic of the linear layers.
            chunk: rays at once; chosen for the device when None.
            progress: called with the number of rays done in the view.
            backend: how the networks are run, see `nerf.backends`.
        """
        renderer = Renderer(model, self.settings, precision, backend)
        results = []
        for place, (view, rays, photo) in enumerate(
            zip(self.views, self._rays, self._photos, strict=True)
        ):
            started = time.perf_counter()
            colors = renderer.colors(rays, chunk, progress)
            if photo.is_cuda:
                torch.cuda.synchronize(photo.device)
            seconds = time.perf_counter() - started
            error = mse(colors, photo)
            picture = colors.view(self.shape) if self.whole else None
            similarity = None
            if picture is not None and min(self.shape[:2]) >= SSIM_WINDOW:
                similarity = ssim(picture, photo.view(self.shape))
            detail: tuple[float, ...] = ()
            if picture is not None and self._by_detail:
                detail = psnr_by_detail(picture, photo.view(self.shape), self._by_detail[place])
            results.append(
                ViewResult(view, error, psnr(error), similarity, seconds, picture, detail)
            )
        return Evaluation(tuple(results), self.rays_per_view, self.whole)

    def photo(self, view: int) -> Float[Tensor, "height width 3"]:
        """The photo of a held-out view (needs whole views)."""
        return self._photos[self.views.index(view)].view(self.shape)


def write_picture(path: Path, picture: Float[Tensor, "height width 3"]) -> None:
    """Write a picture in [0, 1] as an 8-bit PNG, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    pixels = (picture.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).cpu().numpy()
    data = iio.imwrite("<bytes>", pixels, extension=".png", compress_level=PNG_LEVEL)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def error_map(
    picture: Float[Tensor, "height width 3"], photo: Float[Tensor, "height width 3"]
) -> Float[Tensor, "height width 3"]:
    """Where a picture is wrong: mean absolute error over channels, black through red to white.

    White is an error of 0.25 or more.
    """
    error = (picture - photo).abs().mean(dim=-1) / ERROR_MAP_FULL_SCALE
    heat = torch.stack((error * 3.0, error * 3.0 - 1.0, error * 3.0 - 2.0), dim=-1)
    return heat.clamp(0.0, 1.0)


def write_video(
    path: Path, frames: list[Float[np.ndarray, "height width 3"]], frames_per_second: int
) -> None:
    """Write frames in [0, 1] as an mp4 (H.264), whole or not at all.

    H.264 needs even sides: an odd one gets its last row or column twice.

    Raises:
        CheckpointError: the file cannot be written.
    """
    stacked = np.stack([(f.clip(0.0, 1.0) * 255.0).round().astype(np.uint8) for f in frames])
    _, height, width, _ = stacked.shape
    stacked = np.pad(stacked, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    data = iio.imwrite(
        "<bytes>",
        stacked,
        extension=".mp4",
        fps=frames_per_second,
        codec="libx264",
        macro_block_size=1,
    )
    with replacing(path) as temporary:
        temporary.write_bytes(data)
