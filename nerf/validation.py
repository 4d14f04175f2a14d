"""Validation rays: pixels of the training views that neither training nor calibration draws.

Choices (which method, which ratio, which trial) are made on them, so that the held-out views judge
only what was chosen. Which pixels they are follows from the scene and the fraction alone: trainings
of any seed leave out the same ones. The first n of a scene's validation rays are a fixed subset of
all of them, spread evenly over the views: a cheap first look.

::

    pool = RayPool(scene, device, validation=0.01)                # what is left to train on
    score = ValidationRays(scene, 0.01, device).score(model)      # score.psnr, score.mse
    first = ValidationRays(scene, 0.01, device).score(model, stop=2048)
"""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nerf.backends import Backend
from nerf.cameras import Rays, view_rays
from nerf.devices import Precision
from nerf.field import NerfModel
from nerf.metrics import mse, psnr
from nerf.renderer import Renderer
from nerf.rendering import RenderSettings
from nerf.scenes.scene import Scene

# Scenes of many large photos: more rays than this say nothing more about a model.
MAX_RAYS = 65_536
_SEED = 20_260


def validation_pixels(scene: Scene, fraction: float, view: int) -> Int[Tensor, " pixels"]:
    """The numbers of the pixels of a training view that are left out, in a seeded order.

    Args:
        scene: the scene.
        fraction: of the pixels of each training view, in [0, 1), rounded to whole pixels (never to
            all of them).
        view: index in the scene.

    Raises:
        ValueError: the fraction is out of range.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"a fraction in [0, 1) belongs here, got {fraction!r}")
    pixels = scene.camera.height * scene.camera.width
    count = min(round(fraction * pixels), pixels - 1)
    generator = torch.Generator().manual_seed(_SEED * 1_000_003 + view)
    return torch.randperm(pixels, generator=generator)[:count]


def training_pixels(scene: Scene, fraction: float, view: int) -> Bool[Tensor, " pixels"]:
    """True for the pixels of a training view that may be drawn: not a validation ray."""
    free = torch.ones(scene.camera.height * scene.camera.width, dtype=torch.bool)
    free[validation_pixels(scene, fraction, view)] = False
    return free


@dataclass(frozen=True)
class ValidationScore:
    """How good a model is on some validation rays.

    Attributes:
        mse: mean squared error over all of them in linear [0, 1] RGB, colours clamped.
        psnr: −10·log10(mse), in dB: of all rays together, not a mean over views.
        rays: how many there were.
        seconds: wall time of the rendering.
    """

    mse: float
    psnr: float
    rays: int
    seconds: float

    def __add__(self, other: "ValidationScore") -> "ValidationScore":
        """The score on both (disjoint) sets of rays together."""
        rays = self.rays + other.rays
        mse = (self.mse * self.rays + other.mse * other.rays) / rays
        return ValidationScore(mse, psnr(mse), rays, self.seconds + other.seconds)


class ValidationRays:
    """The validation rays of a scene and their colours, on one device.

    Args:
        scene: the scene.
        fraction: that the model was trained with (`Recipe.validation`).
        device: where to render.
        max_rays: the most that are kept.
    """

    def __init__(
        self, scene: Scene, fraction: float, device: torch.device, max_rays: int = MAX_RAYS
    ) -> None:
        self.settings = RenderSettings(scene.near, scene.far, scene.white_background)
        self.pixels_per_view = scene.camera.height * scene.camera.width
        per_view = -(-max_rays // len(scene.train))
        rays, colors = [], []
        for view in scene.train:
            picked = validation_pixels(scene, fraction, view)[:per_view]
            pose = torch.as_tensor(scene.poses[view], dtype=torch.float32)
            rays.append(view_rays(scene.camera, pose, picked))
            photo = torch.as_tensor(scene.images[view], dtype=torch.float32).reshape(-1, 3)
            colors.append(photo[picked])
        # One ray of each view after another, so that the first n are spread over all views.
        count = len(colors[0])
        order = torch.arange(len(colors) * count).view(len(colors), count).T.flatten()[:max_rays]
        self.rays = Rays.concatenate(rays)[order].to(device)
        self.colors = torch.cat(colors)[order].to(device)

    def __len__(self) -> int:
        return len(self.colors)

    def score(
        self,
        model: NerfModel,
        precision: Precision = "float32",
        start: int = 0,
        stop: int | None = None,
        backend: Backend = "auto",
    ) -> ValidationScore:
        """Render the rays ``start`` to ``stop`` (all by default), without jitter or noise.

        Args:
            model: on the same device.
            precision: arithmetic of the linear layers.
            start: first ray.
            stop: the ray after the last one.
            backend: how the networks are run, see `nerf.backends`.

        Raises:
            ValueError: there are no such rays.
        """
        part = slice(*slice(start, stop).indices(len(self)))
        if part.stop <= part.start:
            raise ValueError(f"no rays from {start} to {stop}: there are {len(self)}")
        photo = self.colors[part]
        begun = time.perf_counter()
        renderer = Renderer(model, self.settings, precision, backend)
        colors = renderer.colors(self.rays[part])
        error = mse(colors, photo)  # waits for the device
        return ValidationScore(error, psnr(error), len(photo), time.perf_counter() - begun)
