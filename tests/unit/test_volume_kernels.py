"""The kernels between the networks against float64 references: on a GPU, or in the interpreter."""

import importlib.util
import math

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed: no fused kernels", allow_module_level=True)

import triton_interpreter

triton_interpreter.use_interpreter_without_gpu()  # before anything imports Triton

from nerf.encoding import encode
from nerf.rendering import render_weights
from nerf.sampling import importance

with triton_interpreter.unchecked_imports():
    from nerf.kernels import adam as adam_kernel
    from nerf.kernels import volume

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64 = torch.float64
COUNTS = [(6, 5, 4), (4, 64, 64), (3, 7, 33), (2, 40, 1)]


def batch(rays, samples, seed=0):
    """Rays with transparent, opaque and empty stretches, one of them entirely empty."""
    generator = torch.Generator().manual_seed(seed)
    density = 20 * torch.randn(rays, samples, generator=generator)
    density[0] = -1.0
    t = torch.rand(rays, samples, generator=generator).sort(dim=1).values
    rgb = 2 * torch.randn(rays, samples, 3, generator=generator)
    lengths = 0.3 + torch.rand(rays, generator=generator)
    noise = torch.randn(rays, samples, generator=generator)
    colors = torch.rand(rays, 3, generator=generator)
    return [x.to(DEVICE) for x in (density, rgb, t, lengths, noise, colors)]


def padded(count):
    return 1 << (count - 1).bit_length()


def composite(given, u, *, train, color, white, drawn, shared=False, ascending=False):
    density, rgb, t, lengths, noise, colors = given
    rays, samples = density.shape
    nan = float("nan")
    result = torch.full((rays, 3) if color else (rays,), nan, device=DEVICE)
    g_density, g_rgb = torch.full_like(density, nan), torch.full_like(rgb, nan)
    merged = torch.full((rays, samples + drawn), nan, device=DEVICE)
    volume.composite[(rays,)](
        density, rgb, t, lengths, noise, u, colors, result, g_density, g_rgb, merged, merged,
        merged, samples, drawn, 0 if shared else samples, 0 if shared else drawn, 0.5,
        1.0 / (3 * rays), TRAIN=train, COLOR=color, WHITE=white, IMPORTANCE=drawn > 0,
        ASCENDING=ascending, SPLIT=False, PADDED=padded(samples), DRAWN=padded(max(drawn, 1)),
    )  # fmt: skip
    return result, g_density, g_rgb, merged


def reference(given, white, noise_std):
    """Colours in float64, differentiable in density and raw colour; and the weights."""
    density, rgb, t, lengths, noise, _ = (x.to(F64) for x in given)
    density.requires_grad_()
    rgb.requires_grad_()
    weights = render_weights(density + noise_std * noise, t, lengths)
    color = (weights[..., None] * torch.sigmoid(rgb)).sum(-2)
    if white:
        color = color + (1 - weights.sum(-1, keepdim=True))
    return density, rgb, weights, color


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_compositing_and_its_gradients(count, white):
    rays, samples, drawn = count
    given = batch(rays, samples)
    u = torch.rand(rays, drawn).to(DEVICE)
    errors, g_density, g_rgb, _ = composite(
        given, u, train=True, color=False, white=white, drawn=drawn
    )
    density, rgb, _, color = reference(given, white, 0.5)
    off = (color - given[5].to(F64)).square()
    torch.testing.assert_close(errors.to(F64), off.sum(1).detach(), rtol=1e-4, atol=1e-6)
    off.mean().backward()
    for found, expected in ((g_density, density.grad), (g_rgb, rgb.grad)):
        assert float(expected.abs().max()) > 0
        error = (found.to(F64) - expected).abs().max() / expected.abs().max()
        assert float(error) < 1e-5


@pytest.mark.parametrize("white", [False, True])
def test_colours_of_a_rendering(white):
    given = batch(7, 24)
    colors, *_ = composite(given, given[0], train=False, color=True, white=white, drawn=0)
    _, _, _, expected = reference(given, white, 0.0)
    torch.testing.assert_close(colors.to(F64), expected.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("count", [*COUNTS, (3, 2, 6)], ids=str)
def test_fine_samples_are_those_of_the_reference_in_order(count, shared):
    rays, samples, drawn = count
    given = batch(rays, samples)
    if shared:  # as in a rendering: the same places for every ray
        given[2] = given[2][:1].contiguous()
        u = torch.linspace(0.0, 1.0, drawn, device=DEVICE)
    else:
        u = torch.rand(rays, drawn, device=DEVICE)
    *_, merged = composite(
        given, u, train=False, color=False, white=False, drawn=drawn, shared=shared,
        ascending=shared,
    )  # fmt: skip
    given[2] = given[2].expand(rays, samples)
    _, _, weights, _ = reference(given, False, 0.0)
    new = slow_importance(given[2].to(F64), weights.detach(), u.to(F64).expand(rays, drawn))
    expected = torch.cat((given[2].to(F64), new), 1).sort(1).values
    assert bool((merged.diff(dim=1) >= 0).all())
    # Where the CDF is steep as a wall, rounding moves a sample along the wall's foot: 1e-5 is the
    # least density, so an error of 1e-7 of the CDF is a hundredth of a bin.
    torch.testing.assert_close(merged.to(F64), expected, rtol=0, atol=2e-3)
    assert float((merged.to(F64) - expected).abs().mean()) < 2e-5


def slow_importance(t, weights, u):
    """The inverse CDF of the docstring of `nerf.sampling.importance`, with given u."""
    bins = 0.5 * (t[:, 1:] + t[:, :-1])
    density = weights[:, 1:-1] + 1e-5
    cdf = (density / density.sum(1, keepdim=True)).cumsum(1)
    out = torch.empty_like(u)
    for ray in range(len(t)):
        levels = [0.0, *cdf[ray].tolist()]
        for i, value in enumerate(u[ray].tolist()):
            k = max(j for j, level in enumerate(levels) if level <= value)
            if k + 1 == len(levels):
                out[ray, i] = bins[ray, k]
                continue
            span = levels[k + 1] - levels[k]
            part = (value - levels[k]) / (span if span >= 1e-5 else 1.0)
            out[ray, i] = bins[ray, k] + part * (bins[ray, k + 1] - bins[ray, k])
    return out


def test_the_reference_draws_as_the_library_does():
    given = batch(5, 9)
    _, _, weights, _ = reference(given, False, 0.0)
    t = given[2].to(F64)
    u = torch.linspace(0.0, 1.0, 13, dtype=F64, device=DEVICE)
    expected = importance(t, weights.detach(), 13, None)
    torch.testing.assert_close(
        slow_importance(t, weights.detach(), u.expand(5, 13)), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_new_samples_are_given_by_themselves_with_their_places_in_the_order(count):
    rays, samples, drawn = count
    density, rgb, t, lengths, noise, colors = batch(rays, samples)
    u = torch.rand(rays, drawn, device=DEVICE)
    merged = torch.full((rays, samples + drawn), float("nan"), device=DEVICE)
    added = torch.full((rays, drawn), float("nan"), device=DEVICE)
    source = torch.full((rays, samples + drawn), -1, dtype=torch.int32, device=DEVICE)
    volume.composite[(rays,)](
        density, rgb, t, lengths, noise, u, colors, lengths, density, rgb, merged, added, source,
        samples, drawn, samples, drawn, 0.0, 1.0, TRAIN=False, COLOR=False, WHITE=False,
        IMPORTANCE=True, ASCENDING=False, SPLIT=True, PADDED=padded(samples), DRAWN=padded(drawn),
    )  # fmt: skip
    everything = torch.arange(samples + drawn, device=DEVICE).expand(rays, -1)
    assert torch.equal(source.long().sort(dim=1).values, everything)
    assert torch.equal(torch.cat((t, added), 1).gather(1, source.long()), merged)
    assert bool((merged.diff(dim=1) >= 0).all())


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_samples_of_two_parts_are_composited_in_order(count, white):
    rays, samples, drawn = count
    every = samples + drawn
    density, rgb, t, lengths, noise, colors = given = batch(rays, every)
    generator = torch.Generator().manual_seed(3)
    source = torch.stack([torch.randperm(every, generator=generator) for _ in range(rays)])
    source = source.to(DEVICE)
    place = source.argsort(dim=1)  # where in the order each sample of both parts is
    parts = [x.split((samples, drawn), dim=1) for x in (
        density.gather(1, place), rgb.gather(1, place[..., None].expand(-1, -1, 3))
    )]  # fmt: skip
    (first, second), (rgb_first, rgb_second) = [[p.contiguous() for p in of] for of in parts]
    before = torch.randn(rays, samples, device=DEVICE), torch.randn(rays, samples, 3, device=DEVICE)
    g_first, g_rgb_first = before[0].clone(), before[1].clone()
    g_second, g_rgb_second = torch.full_like(second, 9.0), torch.full_like(rgb_second, 9.0)
    errors = torch.zeros(rays, device=DEVICE)
    volume.composite_joined[(rays,)](
        first, second, rgb_first, rgb_second, t, source.int(), lengths, noise, colors, errors,
        g_first, g_second, g_rgb_first, g_rgb_second, samples, drawn, 0.5, 1.0 / (3 * rays),
        WHITE=white, PADDED=padded(every),
    )  # fmt: skip
    exact_density, exact_rgb, _, color = reference(given, white, 0.5)
    off = (color - colors.to(F64)).square()
    torch.testing.assert_close(errors.to(F64), off.sum(1).detach(), rtol=1e-4, atol=1e-6)
    off.mean().backward()
    found = torch.cat((g_first - before[0], g_second), 1).gather(1, source)
    found_rgb = torch.cat((g_rgb_first - before[1], g_rgb_second), 1)
    found_rgb = found_rgb.gather(1, source[..., None].expand(-1, -1, 3))
    for mine, exact in ((found, exact_density.grad), (found_rgb, exact_rgb.grad)):
        # Added to numbers of about 1, of which 1e-7 is the precision.
        torch.testing.assert_close(
            mine.to(F64), exact, rtol=0, atol=1e-5 * float(exact.abs().max()) + 5e-7
        )


def test_equal_distances_keep_every_sample():
    """Ties between old and new samples lose none."""
    given = batch(3, 8)
    given[2] = torch.full_like(given[2], 0.25)
    *_, merged = composite(
        given, torch.rand(3, 6, device=DEVICE), train=False, color=False, white=False, drawn=6
    )
    assert bool((merged == 0.25).all())


@pytest.mark.parametrize("iteration", [0, 3, 4, 11])
@pytest.mark.parametrize(("rising", "angle"), [(1.0, 0.0), (5.0, math.pi / 20)])
def test_a_step_begins_with_its_rays_samples_and_rate(iteration, rising, angle):
    pool, rays, samples, octaves, batches = 50, 11, 6, 2, 4
    generator = torch.Generator().manual_seed(1)
    origins, directions, views, colors = (
        torch.randn(pool, 3, generator=generator).to(DEVICE) for _ in range(4)
    )
    order = torch.randperm(pool, generator=generator).to(DEVICE)
    jitter = torch.rand(rays, samples, generator=generator).to(DEVICE)
    strata = torch.rand(2, samples, generator=generator).to(DEVICE)
    counter = torch.tensor([iteration], device=DEVICE)
    constants = torch.tensor(
        [5e-4, math.log(0.1) / 7, math.log(0.9), math.log(0.999), rising, angle],
        dtype=F64, device=DEVICE,
    )  # fmt: skip
    width = 3 + 6 * octaves
    out = {n: torch.zeros(rays, 3, device=DEVICE) for n in ("origins", "directions", "colors")}
    lengths, schedule = torch.zeros(rays, device=DEVICE), torch.zeros(5, device=DEVICE)
    encoded = torch.zeros(rays, width, device=DEVICE)
    t = torch.zeros(rays, samples, device=DEVICE)
    volume.begin_step[(3,)](
        order.int(), counter, origins, directions, views, colors, jitter, strata, out["origins"],
        out["directions"], lengths, out["colors"], encoded, t, constants, schedule, batches, rays,
        samples, octaves, PADDED=8, BLOCK=4,
    )  # fmt: skip
    place = iteration % batches
    picked = order[place * rays : (place + 1) * rays]
    assert torch.equal(out["origins"], origins[picked])
    assert torch.equal(out["directions"], directions[picked])
    assert torch.equal(out["colors"], colors[picked])
    torch.testing.assert_close(lengths, directions[picked].norm(dim=1))
    expected = encode(views[picked].to(F64), octaves)
    torch.testing.assert_close(encoded.to(F64), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(t, strata[0] + strata[1] * jitter)
    rate = 5e-4 * 0.1 ** (iteration / 7) * min(1.0, (iteration + 1) / rising)
    rate *= 0.5 + 0.5 * math.cos(angle * iteration)
    assert float(schedule[4]) == pytest.approx(rate, rel=1e-6)
    assert float(schedule[0]) == pytest.approx(rate / (1 - 0.9 ** (iteration + 1)), rel=1e-6)
    assert float(schedule[1]) == pytest.approx((1 - 0.999 ** (iteration + 1)) ** -0.5, rel=1e-6)


def test_a_step_ends_with_its_errors_added():
    coarse, fine = torch.rand(13, device=DEVICE), torch.rand(13, device=DEVICE)
    counter = torch.tensor([41], device=DEVICE)
    sums = torch.tensor([1.0, 2.0], device=DEVICE)
    volume.end_step[(1,)](counter, coarse, fine, sums, 13, PADDED=8)
    assert int(counter) == 42
    assert sums.tolist() == pytest.approx(
        [1 + float(coarse.sum()) / 39, 2 + float(fine.sum()) / 39]
    )


def test_adam_is_adam():
    """Five steps in float64 from the definition; the gradients of some weights are zero."""
    generator = torch.Generator().manual_seed(0)
    count = 37
    weights = torch.randn(count, generator=generator).to(DEVICE)
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    expected = weights.to(F64).clone()
    m, v = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(1, 6):
        gradient = torch.randn(count, generator=generator).to(DEVICE)
        gradient[:4] = 0
        rate = 1e-2 / step
        schedule = torch.tensor([rate / (1 - 0.9**step), (1 - 0.999**step) ** -0.5], device=DEVICE)
        adam_kernel.adam[(2,)](
            weights, gradient, first, second, schedule, count, BETA_1=0.9, BETA_2=0.999,
            EPSILON=1e-8, BLOCK=32,
        )  # fmt: skip
        g = gradient.to(F64)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected -= rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weights.to(F64), expected, rtol=1e-5, atol=1e-7)
