"""MSE, PSNR and SSIM against closed forms and scikit-image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import structural_similarity

from nerf.metrics import mse, pixels_by_detail, psnr, psnr_by_detail, ssim


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


@given(st.integers(1, 12), st.integers(2, 12), st.integers(0, 99))
def test_pixels_by_detail_go_from_flat_to_steep(height, width, seed):
    photo = torch.as_tensor(np.random.default_rng(seed).uniform(size=(height, width, 3)))
    luminance = photo.numpy() @ np.array([0.2126, 0.7152, 0.0722])
    slopes = [np.gradient(luminance, axis=a) for a in (0, 1) if luminance.shape[a] > 1]
    steepness = np.sqrt(sum(s**2 for s in slopes)).ravel()
    order = pixels_by_detail(photo).numpy()
    assert sorted(order) == list(range(height * width))
    assert (np.diff(steepness[order]) >= -1e-12).all()


def test_psnr_by_detail_in_closed_form():
    # Flat on the left, stripes on the right; an error of 0.1 there and of 0.01 elsewhere.
    photo = torch.zeros(8, 10, 3)
    photo[:, 5:] = torch.linspace(0, 1, 5)[None, :, None] ** 2
    wrong = torch.where(torch.arange(10)[None, :, None] >= 6, 0.1, 0.01).expand(8, 10, 3)
    order = pixels_by_detail(photo)
    found = psnr_by_detail(photo + wrong, photo, order)
    assert found[0] == pytest.approx(40, abs=1e-4)
    assert found[-1] == pytest.approx(20, abs=1e-4)
    assert list(found) == sorted(found, reverse=True)


@given(st.integers(0, 99), st.integers(1, 6))
def test_the_groups_together_are_the_whole_picture(seed, groups):
    photo, render = (t.float() for t in pictures(12, 20, seed))
    parts = psnr_by_detail(render, photo, pixels_by_detail(photo), groups)
    share = [len(p) / 240 for p in torch.arange(240).tensor_split(groups)]
    total = sum(w * 10 ** (-p / 10) for w, p in zip(share, parts, strict=True))
    assert total == pytest.approx(mse(render, photo), rel=1e-9)
