"""How close two pictures are.

Letters: x, y pictures in linear [0, 1] RGB; μ, σ², σ_xy their local means, variances, covariance.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  PyTorch itself writes it so

LUMINANCE = (0.2126, 0.7152, 0.0722)
DETAIL_GROUPS = 5
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_K1 = 0.01
SSIM_K2 = 0.03


def mse(x: Float[Tensor, "*shape"], y: Float[Tensor, "*shape"]) -> float:
    """Mean squared error, summed in float64."""
    return float((x.double() - y.double()).square().mean())


def psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB for pictures in [0, 1]: −10·log10(MSE)."""
    return math.inf if mean_squared_error == 0.0 else -10.0 * math.log10(mean_squared_error)


def pixels_by_detail(photo: Float[Tensor, "height width 3"]) -> Int[Tensor, " pixels"]:
    """Row-major pixel numbers from the flattest spot of a photo to the most detailed.

    Detail is the gradient magnitude |∇Y| of the luminance Y (ITU-R BT.709), by central differences;
    equal ones stay in the order of the pixels.
    """
    luminance = photo.double() @ photo.new_tensor(LUMINANCE, dtype=torch.float64)
    gradients = [
        torch.gradient(luminance, dim=axis)[0]
        for axis in (0, 1)
        if luminance.shape[axis] > 1  # a single row has no slope across it
    ]
    steepness = sum((g.square() for g in gradients), torch.zeros_like(luminance))
    return torch.argsort(steepness.flatten(), stable=True)


def psnr_by_detail(
    x: Float[Tensor, "height width 3"],
    y: Float[Tensor, "height width 3"],
    order: Int[Tensor, " pixels"],
    groups: int = DETAIL_GROUPS,
) -> tuple[float, ...]:
    """PSNR in dB of each group of pixels, the flattest first.

    Args:
        x: a render.
        y: its photo.
        order: `pixels_by_detail` of the photo.
        groups: quantiles: so many groups of as many pixels (give or take one).
    """
    errors = (x.double() - y.double()).square().mean(dim=-1).flatten()[order]
    means = torch.stack([part.mean() for part in errors.tensor_split(groups)])
    return tuple(psnr(value) for value in means.tolist())


def ssim(
    x: Float[Tensor, "height width channels"], y: Float[Tensor, "height width channels"]
) -> float:
    """Structural similarity, mean over channels and over the positions of a whole window.

    Gaussian window of 11×11 pixels, σ = 1.5; constants K₁ = 0.01, K₂ = 0.03; range 1.

    Raises:
        ValueError: a picture is smaller than the window.

    Source: Wang et al. 2004, eq. 13.
    """
    if min(x.shape[:2]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels, "
            f"got {x.shape[1]}×{x.shape[0]}"
        )
    offsets = torch.arange(SSIM_WINDOW, device=x.device, dtype=torch.float64) - SSIM_WINDOW // 2
    gauss = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    gauss = gauss / gauss.sum()

    def smooth(picture: Tensor) -> Tensor:
        rows = F.conv2d(picture, gauss.view(1, 1, -1, 1))
        return F.conv2d(rows, gauss.view(1, 1, 1, -1))

    a = x.double().permute(2, 0, 1)[:, None]
    b = y.double().permute(2, 0, 1)[:, None]
    mean_a, mean_b = smooth(a), smooth(b)
    var_a = smooth(a * a) - mean_a.square()
    var_b = smooth(b * b) - mean_b.square()
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    )
    return float(similarity.mean())
