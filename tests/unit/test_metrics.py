"""MSE, PSNR and SSIM against closed forms and scikit-image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from nerf.metrics import mse, psnr, ssim


def pictures(height, width, seed, blend=0.5):
    random = np.random.default_rng(seed)
    x = random.random((height, width, 3))
    y = blend * x + (1 - blend) * random.random((height, width, 3))
    return torch.from_numpy(x), torch.from_numpy(y)


def skimage_ssim(x, y):
    return structural_similarity(
        x.numpy(),
        y.numpy(),
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1.0,
        channel_axis=2,
    )


def test_mse_and_psnr_in_closed_form():
    x = torch.zeros(4, 5, 3)
    assert mse(x, x) == 0
    assert mse(x + 0.5, x) == 0.25
    assert mse(x, x + 0.1) == pytest.approx(0.01, rel=1e-6)
    one = x.clone()
    one[0, 0, 0] = 1
    assert mse(one, x) == pytest.approx(1 / 60, rel=1e-12)
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(1.0) == 0
    assert psnr(0.0) == math.inf
    assert psnr(4.0) == pytest.approx(-20 * math.log10(2))
    assert math.isnan(psnr(math.nan))


def test_mse_sums_in_float64():
    """In float32 the running sum of so many small errors would lose some of them."""
    x = torch.full((1000, 3000), 1e-3)
    assert mse(x, torch.zeros_like(x)) == pytest.approx(float(x[0, 0].double()) ** 2, rel=1e-12)


@settings(max_examples=25)
@given(st.integers(11, 40), st.integers(11, 40), st.integers(0, 999), st.floats(0, 1))
def test_ssim_agrees_with_scikit_image(height, width, seed, blend):
    x, y = pictures(height, width, seed, blend)
    assert ssim(x, y) == pytest.approx(skimage_ssim(x, y), abs=1e-9)


def test_ssim_of_float32_pictures_agrees_too():
    x, y = pictures(30, 25, 0)
    assert ssim(x.float(), y.float()) == pytest.approx(skimage_ssim(x, y), abs=1e-6)


def test_ssim_of_known_pairs():
    x, y = pictures(16, 20, 1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-12)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-12)
    # Flat pictures differ in their means alone.
    black, grey = torch.zeros(12, 12, 3), torch.full((12, 12, 3), 0.5)
    assert ssim(black, grey) == pytest.approx(0.01**2 / (0.25 + 0.01**2), abs=1e-6)


def test_pictures_smaller_than_the_window_are_refused():
    x = torch.zeros(10, 30, 3)
    with pytest.raises(ValueError, match="at least 11×11 pixels, got 30×10"):
        ssim(x, x)
