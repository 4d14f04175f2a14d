"""From the field to a picture: volume rendering.

Letters: σ density (per scene unit), δ distance between samples (scene units), α opacity of a
sample, T transmittance before it, w = Tα its render weight, c its colour.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nerf import sampling
from nerf.cameras import Camera, Rays, view_rays
from nerf.devices import spare_memory
from nerf.field import Field, NerfModel, SampleCounts

LAST_DISTANCE = 1e10


@dataclass(frozen=True)
class Pass:
    """What one pass over a batch of rays gives.

    Attributes:
        rgb: colour of each ray in [0, 1] (before clamping).
        render_weights: w of each sample.
        t: distance of each sample.
    """

    rgb: Float[Tensor, "rays 3"]
    render_weights: Float[Tensor, "rays samples"]
    t: Float[Tensor, "rays samples"]


@dataclass(frozen=True)
class RenderSettings:
    """How rays are rendered, the networks aside.

    Attributes:
        near: nearest t.
        far: farthest t.
        white_background: whether rays that hit nothing are white.
    """

    near: float
    far: float
    white_background: bool


def render_weights(
    density: Float[Tensor, "rays samples"],
    t: Float[Tensor, "rays samples"],
    direction_lengths: Float[Tensor, " rays"],
) -> Float[Tensor, "rays samples"]:
    """Render weights w = Tα from densities.

    Args:
        density: raw density, before its ReLU.
        t: sample distances, ascending.
        direction_lengths: |d| of each ray, which turns t into scene units.

    Returns:
        Weights that are not negative and sum to at most 1 along a ray.

    Source: Mildenhall et al. 2020, eq. 3.
    """
    delta = torch.cat((t[:, 1:] - t[:, :-1], torch.full_like(t[:, :1], LAST_DISTANCE)), dim=-1)
    depth = torch.relu(density) * delta * direction_lengths[:, None]
    # T = exp(−Σ σδ), not the product of (1 − α): the gradient of a product makes the GPU wait for
    # Python to look for zeros.
    before = torch.cat((torch.zeros_like(depth[:, :1]), depth[:, :-1].cumsum(dim=-1)), dim=-1)
    return (1.0 - torch.exp(-depth)) * torch.exp(-before)


def evaluate_pass(
    field: Field,
    rays: Rays,
    t: Float[Tensor, "rays samples"],
    settings: RenderSettings,
    density_noise: Float[Tensor, "rays samples"] | None = None,
) -> Pass:
    """Evaluate one network at given samples and composite.

    Args:
        field: the network.
        rays: the rays.
        t: sample distances, ascending.
        settings: background.
        density_noise: added to the raw density (a regulariser of training).
    """
    points = rays.origins[:, None, :] + rays.directions[:, None, :] * t[..., None]
    density, raw_rgb = field(points, rays.view_directions)
    if density_noise is not None:
        density = density + density_noise
    return composite(density, raw_rgb, rays, t, settings)


def composite(
    density: Float[Tensor, "rays samples"],
    raw_rgb: Float[Tensor, "rays samples 3"],
    rays: Rays,
    t: Float[Tensor, "rays samples"],
    settings: RenderSettings,
) -> Pass:
    """The colour of each ray from what a network says at its samples.

    Args:
        density: raw density.
        raw_rgb: colour before its sigmoid.
        rays: the rays.
        t: sample distances, ascending.
        settings: background.

    Source: Mildenhall et al. 2020, eq. 3.
    """
    weights = render_weights(density.to(t.dtype), t, rays.directions.norm(dim=-1))
    rgb = (weights[..., None] * torch.sigmoid(raw_rgb.to(t.dtype))).sum(dim=-2)
    if settings.white_background:
        rgb = rgb + (1.0 - weights.sum(dim=-1, keepdim=True))
    return Pass(rgb, weights, t)


@dataclass(frozen=True)
class RandomNumbers:
    """The random numbers of one batch of rays in training.

    Attributes:
        jitter: where in their strata the coarse samples lie, in [0, 1).
        u: where in the CDF the fine samples are drawn, in [0, 1).
        coarse_noise: added to the raw density of the coarse pass; None for none.
        fine_noise: of the fine pass.
    """

    jitter: Float[Tensor, "rays coarse"]
    u: Float[Tensor, "rays fine"]
    coarse_noise: Float[Tensor, "rays coarse"] | None
    fine_noise: Float[Tensor, "rays all"] | None

    def __getitem__(self, part: slice) -> "RandomNumbers":
        """Those of some of the rays."""

        def of(noise: Tensor | None) -> Tensor | None:
            return None if noise is None else noise[part]

        return RandomNumbers(
            self.jitter[part], self.u[part], of(self.coarse_noise), of(self.fine_noise)
        )

    @classmethod
    def draw(
        cls,
        n_rays: int,
        samples: SampleCounts,
        source: sampling.Draws,
        noise_std: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> "RandomNumbers":
        """Draw them, in an order that never changes: jitter, coarse noise, u, fine noise."""

        def uniform(count: int) -> Tensor:
            return sampling.uniform(source, n_rays, count, device, dtype)

        def noise(count: int) -> Tensor | None:
            if noise_std == 0.0:
                return None
            return sampling.normal(source, n_rays, count, device) * noise_std

        jitter, coarse_noise = uniform(samples.coarse), noise(samples.coarse)
        u, fine_noise = uniform(samples.fine), noise(samples.coarse + samples.fine)
        return cls(jitter, u, coarse_noise, fine_noise)


def render_rays(
    model: NerfModel,
    rays: Rays,
    settings: RenderSettings,
    generator: sampling.Draws | None = None,
    noise_std: float = 0.0,
    drawn: RandomNumbers | None = None,
) -> tuple[Pass, Pass]:
    """Render rays with both networks.

    Args:
        model: the networks and their sample counts.
        rays: the rays.
        settings: bounds and background.
        generator: source of jitter and density noise in training; None renders the same picture
            every time.
        noise_std: standard deviation of the density noise; needs a generator.
        drawn: random numbers that were drawn already, instead of a generator.

    Returns:
        The coarse pass and the fine pass; the fine one is the picture.
    """
    device, dtype = rays.origins.device, rays.origins.dtype
    if drawn is None and generator is not None:
        drawn = RandomNumbers.draw(len(rays), model.samples, generator, noise_std, device, dtype)
    bounds = (model.samples.coarse, settings.near, settings.far)
    if drawn is None:
        t_coarse = sampling.stratified(len(rays), *bounds, None, device, dtype)
        coarse = evaluate_pass(model.coarse, rays, t_coarse, settings)
        return coarse, evaluate_pass(model.fine, rays, fine_samples(model, coarse), settings)
    lower, upper = sampling.strata(*bounds, device, dtype)
    t_coarse = lower + (upper - lower) * drawn.jitter
    coarse = evaluate_pass(model.coarse, rays, t_coarse, settings, drawn.coarse_noise)
    t_fine = merged(coarse.t, sampling.inverse_cdf(coarse.t, coarse.render_weights, drawn.u))
    return coarse, evaluate_pass(model.fine, rays, t_fine, settings, drawn.fine_noise)


def fine_samples(
    model: NerfModel, coarse: Pass, generator: sampling.Draws | None = None
) -> Float[Tensor, "rays samples"]:
    """Where the fine network is evaluated: the coarse samples and the importance samples."""
    return merged(
        coarse.t,
        sampling.importance(coarse.t, coarse.render_weights, model.samples.fine, generator),
    )


def merged(
    one: Float[Tensor, "rays some"], other: Float[Tensor, "rays more"]
) -> Float[Tensor, "rays all"]:
    """Samples of both in ascending order."""
    return torch.cat((one, other), dim=-1).sort(dim=-1).values


# Rays rendered at once. On a CPU the activations of a chunk should stay in the cache; on a GPU a
# chunk should fill the device, and the memory that is free.
CPU_CHUNK = 64
CUDA_CHUNK = 16_384
# Activations that are there at the same time while a layer is computed, fp32, and a little more.
LIVE_ACTIVATIONS = 4
PART_OF_SPARE_MEMORY = 0.3


def default_chunk(device: torch.device) -> int:
    """Rays to render at once on a device whose memory is not short."""
    return CUDA_CHUNK if device.type == "cuda" else CPU_CHUNK


def fitting_chunk(model: NerfModel) -> int:
    """Rays to render at once with plain PyTorch: what the device likes, if its memory holds it."""
    device, samples = model.device, model.samples
    widest = max(max(f.shape.trunk) + f.shape.point_features for f in model.networks().values())
    bytes_per_ray = 4 * LIVE_ACTIVATIONS * widest * (samples.coarse + samples.fine)
    return min(default_chunk(device), memory_chunk(device, bytes_per_ray))


def memory_chunk(device: torch.device, bytes_per_ray: int) -> int:
    """Rays that fit a part of the memory that this process may take; any number on a CPU."""
    if device.type != "cuda":
        return 2**31
    return max(64, int(PART_OF_SPARE_MEMORY * spare_memory(device)) // bytes_per_ray)


@torch.inference_mode()
def render_colors(
    model: NerfModel,
    rays: Rays,
    settings: RenderSettings,
    chunk: int | None = None,
    progress: Callable[[int], None] | None = None,
    paint: Callable[[Rays], Float[Tensor, "rays 3"]] | None = None,
) -> Float[Tensor, "rays 3"]:
    """Colours of rays by the fine pass: no jitter, no noise, clamped to [0, 1].

    Args:
        model: the networks.
        rays: any number of rays, on any device.
        settings: bounds and background.
        chunk: rays at once; chosen for the device when None. The result does not depend on it.
        progress: called with the number of rays done.
        paint: what renders a chunk, instead of `render_rays`.

    Returns:
        Colours on the model's device.
    """
    device = model.device
    chunk = chunk or fitting_chunk(model)
    parts = []
    for start in range(0, len(rays), chunk):
        part = rays[start : start + chunk].to(device)
        if paint is not None:
            parts.append(paint(part))
        else:
            _, fine = render_rays(model, part, settings)
            parts.append(fine.rgb.clamp(0.0, 1.0))
        if progress is not None:
            progress(min(start + chunk, len(rays)))
    return torch.cat(parts)


def render_view(
    model: NerfModel,
    camera: Camera,
    pose: Float[Tensor, "3 4"],
    settings: RenderSettings,
    chunk: int | None = None,
) -> Float[Tensor, "height width 3"]:
    """Render the whole picture seen from one pose, in [0, 1]."""
    rays = view_rays(camera, pose.to(model.device))
    return render_colors(model, rays, settings, chunk).view(camera.height, camera.width, 3)
