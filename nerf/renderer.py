"""Whole pictures, on the backend that renders them fastest."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nerf.backends import Backend, choose, fall_back
from nerf.cameras import Camera, Rays, view_rays
from nerf.devices import Precision, arithmetic, keep_freed_memory
from nerf.field import NerfModel
from nerf.rendering import RenderSettings, memory_chunk, render_colors, render_rays

Painter = Callable[[Rays], Float[Tensor, "rays 3"]]


class Renderer:
    """Renders rays with one model: no jitter, no noise, clamped to [0, 1].

    Args:
        model: the networks; they may not change afterwards.
        settings: bounds and background.
        precision: arithmetic of the linear layers.
        backend: how the networks are run; `backend` then says what was chosen.

    Example:
        >>> picture = Renderer(model, settings, "bfloat16").view(camera, pose)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: NerfModel,
        settings: RenderSettings,
        precision: Precision = "float32",
        backend: Backend = "auto",
    ) -> None:
        self.model, self.settings, self.precision = model, settings, precision
        shapes = [field.shape for field in model.networks().values()]
        self.backend = choose(backend, model.device, precision, shapes, model.samples)
        keep_freed_memory(model.device)
        self._fused: Painter | None = None
        self._bytes_per_ray = 0
        self._compiled: Painter | None = None
        try:
            if self.backend == "fused":
                from nerf.fused import FusedRenderer  # noqa: PLC0415  (needs Triton)

                fused = FusedRenderer(model, settings)
                self._fused, self._bytes_per_ray = fused, fused.bytes_per_ray
            elif self.backend == "compiled":
                self._compiled = self._compile()
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler or a driver throws
            fall_back(self.backend, error)
            self.backend = "eager"

    def colors(
        self,
        rays: Rays,
        chunk: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Float[Tensor, "rays 3"]:
        """Colours of any number of rays, on the model's device.

        Args:
            rays: on any device.
            chunk: rays at once; chosen for the device and its free memory when None.
            progress: called with the number of rays done.
        """
        device = self.model.device
        if self._fused is not None:
            chunk = chunk or memory_chunk(device, self._bytes_per_ray)
            return in_chunks(self._fused, rays.to(device), chunk, progress)
        with arithmetic(self.precision, device):
            return render_colors(self.model, rays, self.settings, chunk, progress, self._compiled)

    def view(
        self, camera: Camera, pose: Float[Tensor, "3 4"], chunk: int | None = None
    ) -> Float[Tensor, "height width 3"]:
        """The whole picture seen from one pose."""
        rays = view_rays(camera, pose.to(self.model.device))
        return self.colors(rays, chunk).view(camera.height, camera.width, 3)

    def _compile(self) -> Painter:
        """The eager rendering through `torch.compile`, tried on two rays."""
        compiled = torch.compile(render_rays)

        def paint(rays: Rays) -> Float[Tensor, "rays 3"]:
            return compiled(self.model, rays, self.settings)[1].rgb.clamp(0.0, 1.0)

        ones = torch.ones(2, 3, device=self.model.device)
        with arithmetic(self.precision, self.model.device), torch.inference_mode():
            paint(Rays(ones, ones, ones))
        return paint


def in_chunks(
    paint: Painter, rays: Rays, chunk: int, progress: Callable[[int], None] | None
) -> Float[Tensor, "rays 3"]:
    """Paint rays in equal parts of at most `chunk` rays."""
    count = len(rays)
    parts = max(1, -(-count // chunk))
    size = max(1, -(-count // parts))
    painted = []
    for start in range(0, count, size):
        painted.append(paint(rays[start : start + size]))
        if progress is not None:
            progress(min(start + size, count))
    return torch.cat(painted) if painted else rays.origins.new_empty(0, 3)
