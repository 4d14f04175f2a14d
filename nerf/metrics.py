"""How close two pictures are.

Letters: x, y pictures in linear [0, 1] RGB; μ, σ², σ_xy their local means, variances, covariance.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  PyTorch itself writes it so

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
