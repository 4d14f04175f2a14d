"""Volume rendering against slow references, and what must hold for any densities."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerf.cameras import Rays, view_rays
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.rendering import (
    RenderSettings,
    default_chunk,
    evaluate_pass,
    fine_samples,
    render_colors,
    render_rays,
    render_view,
    render_weights,
)
from tests.nerf_reference import (
    slow_importance,
    slow_pass,
    slow_render_weights,
    slow_stratified,
    their_names,
)
from tests.tiny_scene import tiny_scene

F64 = torch.float64
SHAPE = FieldShape((12, 11, 10, 9), skip=1, feature=8, view=7, point_octaves=3, direction_octaves=2)
SAMPLES = SampleCounts(6, 5)
OCTAVES = {"skip": 1, "point_octaves": 3, "direction_octaves": 2}


def a_model(seed=0, dtype=torch.float32, samples=SAMPLES):
    """Fresh networks whose densities are large enough to matter."""
    model = NerfModel.create(SHAPE, samples, seed)
    for field in model.networks().values():
        with torch.no_grad():
            field.density.weight.mul_(20)
        field.to(dtype)
    return model


def some_rays(n, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n, 3, generator=generator, dtype=dtype)
    return Rays(
        torch.randn(n, 3, generator=generator, dtype=dtype),
        directions,
        directions / directions.norm(dim=-1, keepdim=True),
    )


def plain(rays):
    return zip(
        rays.origins.tolist(), rays.directions.tolist(), rays.view_directions.tolist(), strict=True
    )


def test_render_weights_agree_with_the_slow_reference():
    generator = torch.Generator().manual_seed(0)
    density = 3 * torch.randn(8, 9, generator=generator, dtype=F64)
    t = torch.rand(8, 9, generator=generator, dtype=F64).sort(dim=1).values
    lengths = 0.1 + torch.rand(8, generator=generator, dtype=F64)
    weights = render_weights(density, t, lengths)
    for i in range(8):
        expected = slow_render_weights(density[i].tolist(), t[i].tolist(), float(lengths[i]))
        assert weights[i].tolist() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20), st.integers(0, 99))
def test_render_weights_are_never_negative_and_sum_to_one_at_most(density, seed):
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(1, len(density), generator=generator).sort(dim=1).values
    weights = render_weights(torch.tensor([density]), t, torch.tensor([1.7]))
    assert bool((weights >= 0).all())
    assert float(weights.sum()) <= 1 + 1e-5


def test_render_weights_in_closed_form():
    """Constant density σ over equal steps δ: w_i = e^{−σδi} (1 − e^{−σδ}); the last takes all."""
    t = torch.linspace(0, 1, 11, dtype=F64)[None]
    weights = render_weights(torch.full((1, 11), 4.0, dtype=F64), t, torch.tensor([2.0], dtype=F64))
    step = torch.exp(torch.tensor(-4.0 * 0.1 * 2.0, dtype=F64))
    expected = [float(step**i * (1 - step)) for i in range(10)] + [float(step**10)]
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-8)
    assert float(weights.sum()) == pytest.approx(1)


def test_empty_space_and_a_wall():
    t = torch.linspace(0, 1, 4)[None]
    one = torch.ones(1)
    assert not render_weights(torch.tensor([[-3.0, 0.0, -1.0, 0.0]]), t, one).any()
    wall = render_weights(torch.tensor([[0.0, 1e9, 5.0, 5.0]]), t, one)
    assert wall[0].tolist() == pytest.approx([0, 1, 0, 0], abs=1e-6)


def test_the_gradient_of_an_opaque_sample_is_finite():
    density = torch.tensor([[0.0, 1e9, 5.0, 5.0]], requires_grad=True)
    weights = render_weights(density, torch.linspace(0, 1, 4)[None], torch.ones(1))
    weights.square().sum().backward()
    assert bool(torch.isfinite(density.grad).all())


@pytest.mark.parametrize("white", [False, True])
def test_a_pass_agrees_with_the_slow_reference(white):
    model, rays = a_model(dtype=F64), some_rays(4, dtype=F64)
    generator = torch.Generator().manual_seed(2)
    t = torch.rand(4, 6, generator=generator, dtype=F64).sort(dim=1).values
    noise = torch.randn(4, 6, generator=generator, dtype=F64)
    done = evaluate_pass(model.coarse, rays, t, RenderSettings(0.0, 1.0, white), noise)
    for i, ray in enumerate(plain(rays)):
        color, weights = slow_pass(
            their_names(model.coarse),
            ray,
            t[i].tolist(),
            white=white,
            noise=noise[i].tolist(),
            **OCTAVES,
        )
        assert done.rgb[i].tolist() == pytest.approx(color, abs=1e-9)
        assert done.render_weights[i].tolist() == pytest.approx(weights, abs=1e-9)


@pytest.mark.parametrize("white", [False, True])
def test_rendering_agrees_with_the_slow_reference(white):
    """Both passes: even samples, importance samples by the coarse weights, all of them fine."""
    model, rays = a_model(dtype=F64), some_rays(5, dtype=F64)
    coarse, fine = render_rays(model, rays, RenderSettings(0.5, 3.0, white))
    us = [i / 4 for i in range(5)]
    for i, ray in enumerate(plain(rays)):
        t = slow_stratified(6, 0.5, 3.0)
        color, weights = slow_pass(their_names(model.coarse), ray, t, white=white, **OCTAVES)
        assert coarse.rgb[i].tolist() == pytest.approx(color, abs=1e-9)
        t_fine = sorted(t + slow_importance(t, weights, us))
        assert fine.t[i].tolist() == pytest.approx(t_fine, abs=1e-9)
        color, _ = slow_pass(their_names(model.fine), ray, t_fine, white=white, **OCTAVES)
        assert fine.rgb[i].tolist() == pytest.approx(color, abs=1e-8)


def test_rays_that_hit_nothing_are_white_on_white_and_black_on_black():
    model, rays = a_model(), some_rays(3)
    for field in model.networks().values():
        torch.nn.init.zeros_(field.density.weight)
        torch.nn.init.constant_(field.density.bias, -1.0)
    assert bool((render_colors(model, rays, RenderSettings(1.0, 2.0, True)) == 1).all())
    assert bool((render_colors(model, rays, RenderSettings(1.0, 2.0, False)) == 0).all())


def test_fine_samples_are_the_coarse_ones_and_more_in_order():
    model, rays = a_model(), some_rays(7)
    coarse, fine = render_rays(model, rays, RenderSettings(0.5, 3.0, False))
    assert fine.t.shape == (7, 11)
    assert bool((fine.t.diff(dim=1) >= 0).all())
    assert torch.equal(fine.t, fine_samples(model, coarse))
    for coarse_t, fine_t in zip(coarse.t.tolist(), fine.t.tolist(), strict=True):
        assert set(coarse_t) <= set(fine_t)


def test_without_a_generator_a_picture_is_always_the_same():
    model, rays = a_model(), some_rays(7)
    settings = RenderSettings(0.5, 3.0, False)
    first, again = (render_rays(model, rays, settings, None, 1.0)[1].rgb for _ in range(2))
    assert torch.equal(first, again)


def test_jitter_and_noise_follow_the_generator():
    model, rays = a_model(), some_rays(7)
    settings = RenderSettings(0.5, 3.0, False)

    def rendered(seed, noise):
        return render_rays(model, rays, settings, torch.Generator().manual_seed(seed), noise)[1].rgb

    assert torch.equal(rendered(1, 1.0), rendered(1, 1.0))
    assert not torch.equal(rendered(1, 1.0), rendered(2, 1.0))
    assert not torch.equal(rendered(1, 1.0), rendered(1, 0.0))


@settings(max_examples=12)
@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 5))
def test_the_picture_does_not_depend_on_the_chunk(n, chunk, seed):
    model, rays = a_model(seed), some_rays(n, seed)
    bounds = RenderSettings(0.5, 3.0, True)
    done = []
    colors = render_colors(model, rays, bounds, chunk, done.append)
    torch.testing.assert_close(colors, render_colors(model, rays, bounds), atol=2e-5, rtol=0)
    assert done[-1] == n
    assert len(done) == -(-n // chunk)
    assert float(colors.min()) >= 0
    assert float(colors.max()) <= 1


def test_the_least_sample_counts_render():
    model = a_model(samples=SampleCounts(2, 1))
    colors = render_colors(model, some_rays(3), RenderSettings(0.5, 3.0, False))
    assert bool(torch.isfinite(colors).all())


def test_a_view_is_its_rays_row_by_row():
    scene, model = tiny_scene(), a_model()
    pose = torch.from_numpy(scene.poses[0])
    settings = RenderSettings(scene.near, scene.far, False)
    picture = render_view(model, scene.camera, pose, settings, chunk=10)
    rays = view_rays(scene.camera, pose)
    assert picture.shape == (6, 7, 3)
    one = render_colors(model, rays[torch.tensor([2 * 7 + 5])], settings)
    torch.testing.assert_close(picture[2, 5], one[0], atol=1e-5, rtol=0)


def test_chunks_by_device():
    assert default_chunk(torch.device("cpu")) < default_chunk(torch.device("cuda"))
