"""What happens between the networks, one launch each: rays of a step, compositing, sampling.

Letters as in `nerf.rendering`: σ density, δ distance between samples, d = relu(σ)·δ·|direction|,
T = exp(−Σ d before), w = (1 − exp(−d))·T; G the gradient of the loss with respect to a ray's
colour.

The gradients of compositing, with q = G·(c − background), are

    ∂L/∂c = G·w,   ∂L/∂d_j = q_j·T_j·exp(−d_j) − Σ_{i>j} q_i·w_i.

A program works on one ray (`composite`) or a few (`begin_step`). Sample counts are padded to powers
of two in registers only. Places of the inverse CDF are found by bisection; a new sample lies
between the middles of two gaps, so the only old sample that it must be compared with is the one
between them, and where u ascends nothing is sorted.
"""

import triton
import triton.language as tl

from nerf.kernels.encode import encode_chunk

CHUNK = tl.constexpr(64)
LAST_DISTANCE = tl.constexpr(1e10)  # as nerf.rendering.LAST_DISTANCE
MIN_DENSITY = tl.constexpr(1e-5)  # as nerf.sampling.importance
MIN_SPAN = tl.constexpr(1e-5)
INFINITY = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["batches", "rays", "samples", "octaves"])
def begin_step(
    order,
    counter,
    pool_origins,
    pool_directions,
    pool_views,
    pool_colors,
    jitter,
    strata,
    origins,
    directions,
    lengths,
    colors,
    encoded,
    t,
    constants,
    schedule,
    batches,
    rays,
    samples,
    octaves,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gather the rays of an iteration, place its coarse samples, work out its learning rate.

    Args:
        order: (≥ batches · R,) int32, an epoch's permutation of the pool.
        counter: (1,) int64, the iteration; its batch is number counter mod batches.
        pool_origins: (pool, 3) fp32; `pool_directions`, `pool_views` (unit) likewise.
        pool_colors: (pool, 3) fp32.
        jitter: (R, S) fp32, random numbers in [0, 1).
        strata: (2, S) fp32, lower ends and widths of the strata.
        origins: (R, 3) fp32, written; `directions`, `colors` likewise.
        lengths: (R,) fp32, written: |direction|.
        encoded: (R, 3 + 6 · octaves) fp32, written: γ of the unit directions.
        t: (R, S) fp32, written.
        constants: (6,) fp64: learning rate at the start, natural logarithm of what an iteration
            multiplies it by, natural logarithms of Adam's β₁ and β₂, iterations in which the rate
            rises (1 for none), angle that an iteration goes along a cosine (0 for none).
        schedule: (5,) fp32, of which s and r (see `nerf.kernels.adam`) and, last, the learning
            rate are written.
        batches: batches of an epoch.
        rays: R.
        samples: S.
        octaves: of the direction encoding.
        PADDED: a power of two, at least S.
        BLOCK: rays a program takes.
    """
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = ray < rays
    iteration = tl.load(counter)
    if tl.program_id(0) == 0:
        done = iteration.to(tl.float64)
        rate = tl.load(constants) * tl.exp(tl.load(constants + 1) * done)
        rate *= tl.minimum(1.0, (done + 1.0) / tl.load(constants + 4))
        rate *= 0.5 + 0.5 * tl.cos(tl.load(constants + 5) * done)
        first_bias = 1.0 - tl.exp(tl.load(constants + 2) * (done + 1.0))
        second_bias = 1.0 - tl.exp(tl.load(constants + 3) * (done + 1.0))
        tl.store(schedule, (rate / first_bias).to(tl.float32))
        tl.store(schedule + 1, (1.0 / tl.sqrt(second_bias)).to(tl.float32))
        tl.store(schedule + 4, rate.to(tl.float32))
    first = (iteration % batches) * rays
    picked = tl.load(order + first + ray, mask=valid, other=0).to(tl.int64) * 3
    place = ray * 3
    square = tl.zeros((BLOCK,), tl.float32)
    for axis in tl.static_range(3):
        tl.store(origins + place + axis, tl.load(pool_origins + picked + axis), mask=valid)
        tl.store(colors + place + axis, tl.load(pool_colors + picked + axis), mask=valid)
        direction = tl.load(pool_directions + picked + axis)
        tl.store(directions + place + axis, direction, mask=valid)
        square += direction * direction
    tl.store(lengths + ray, tl.sqrt(square), mask=valid)
    features = 3 + 6 * octaves
    column = tl.arange(0, CHUNK)
    gamma = encode_chunk(
        tl.load(pool_views + picked),
        tl.load(pool_views + picked + 1),
        tl.load(pool_views + picked + 2),
        column,
        octaves,
    )
    inside = valid[:, None] & (column < features)[None, :]
    tl.store(encoded + ray[:, None] * features + column[None, :], gamma, mask=inside)
    sample = tl.arange(0, PADDED)
    exists = sample < samples
    lower = tl.load(strata + sample, mask=exists, other=0.0)
    width = tl.load(strata + samples + sample, mask=exists, other=0.0)
    at = ray[:, None] * samples + sample[None, :]
    inside = valid[:, None] & exists[None, :]
    u = tl.load(jitter + at, mask=inside, other=0.0)
    tl.store(t + at, lower[None, :] + width[None, :] * u, mask=inside)


@triton.jit
def _sigmoid(x):
    # Of the negative size, so that the exponential cannot overflow.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _weights(sigma, delta, exists, inner):
    """Of raw densities: exp(−d), T and w."""
    depth = tl.where(exists, tl.maximum(sigma, 0.0) * delta, 0.0)
    # The last depth is not part of any sum: it is 1e10 times the others.
    counted = tl.where(inner, depth, 0.0)
    before = tl.cumsum(counted, 0) - counted
    before = tl.where(inner, before, tl.sum(counted, 0))
    through = tl.exp(-depth)
    transmittance = tl.exp(-before)
    return through, transmittance, tl.where(exists, (1.0 - through) * transmittance, 0.0)


@triton.jit
def _color(w, red, green, blue, WHITE: tl.constexpr):
    ray_red, ray_green = tl.sum(w * red, 0), tl.sum(w * green, 0)
    ray_blue = tl.sum(w * blue, 0)
    if WHITE:
        rest = 1.0 - tl.sum(w, 0)
        ray_red += rest
        ray_green += rest
        ray_blue += rest
    return ray_red, ray_green, ray_blue


@triton.jit
def _gradients(
    sigma, delta, exists, through, transmittance, w, red, green, blue, target, scale,
    WHITE: tl.constexpr,
):  # fmt: skip
    """Of a ray with the true colour at `target`: its error, the gradients of σ and raw colour."""
    ray_red, ray_green, ray_blue = _color(w, red, green, blue, WHITE)
    off_red = ray_red - tl.load(target)
    off_green = ray_green - tl.load(target + 1)
    off_blue = ray_blue - tl.load(target + 2)
    error = off_red * off_red + off_green * off_green + off_blue * off_blue
    g_red, g_green, g_blue = 2.0 * scale * off_red, 2.0 * scale * off_green, 2.0 * scale * off_blue
    q = g_red * red + g_green * green + g_blue * blue
    if WHITE:
        q -= g_red + g_green + g_blue
    share = tl.where(exists, q * w, 0.0)
    behind = tl.cumsum(share, 0, reverse=True) - share
    g_sigma = tl.where(sigma > 0, (q * transmittance * through - behind) * delta, 0.0)
    return (
        error,
        g_sigma,
        g_red * w * red * (1.0 - red),
        g_green * w * green * (1.0 - green),
        g_blue * w * blue * (1.0 - blue),
    )


@triton.jit
def _at_most(row, x, LENGTH: tl.constexpr):
    """How many of an ascending row of `LENGTH` (a power of two) numbers are at most x."""
    count = tl.zeros_like(x).to(tl.int32)
    for halved in tl.static_range(1, 16):
        if (LENGTH >> halved) > 0:
            further = count + (LENGTH >> halved)
            count = tl.where(tl.gather(row, further - 1, 0) <= x, further, count)
    return count + (tl.gather(row, count, 0) <= x).to(tl.int32)


@triton.jit
def _merge_importance(
    place, w, u_of, merged, added, source, ray, samples, drawn, u_stride,
    ASCENDING: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """Draw from the inverse CDF of a ray's weights and write old and new samples in order."""
    sample = tl.arange(0, PADDED)
    new = tl.arange(0, DRAWN)
    exists, wanted = sample < samples, new < drawn
    known = sample + 1 < samples
    density = tl.where((sample > 0) & known, w + MIN_DENSITY, 0.0)
    density = density / tl.maximum(tl.sum(density, 0), MIN_DENSITY)  # of two samples none is inner
    cdf = tl.where(known, tl.cumsum(density, 0), INFINITY)
    u = tl.load(u_of + ray * u_stride + new, mask=wanted, other=1.0)
    above = _at_most(cdf, u, PADDED)
    inside = above + 1 < samples
    # A bin reaches from the middle between two samples to the next one.
    first = tl.load(place + above - 1)
    second = tl.load(place + above)
    third = tl.load(place + above + 1, mask=inside, other=0.0)
    bin_below = 0.5 * (first + second)
    bin_above = tl.where(inside, 0.5 * (second + third), bin_below)
    cdf_below = tl.gather(cdf, above - 1, 0)
    span = tl.where(inside, tl.gather(cdf, above, 0) - cdf_below, 0.0)
    span = tl.where(span < MIN_SPAN, 1.0, span)
    t = bin_below + (u - cdf_below) / span * (bin_above - bin_below)
    t = tl.minimum(t, bin_above)
    # Ranks: how many come before. Old samples come before new ones at the same place.
    old_before = above + (second <= t).to(tl.int32)
    old_before = tl.where(wanted, old_before, PADDED)
    if ASCENDING:
        new_rank = old_before + new
        old_rank = sample + _at_most(old_before, sample, DRAWN)
    else:
        mine, other = new[:, None], new[None, :]
        earlier = (u[None, :] < u[:, None]) | ((u[None, :] == u[:, None]) & (other < mine))
        new_rank = old_before + tl.sum((earlier & wanted[None, :]).to(tl.int32), 1)
        behind = (old_before[None, :] <= sample[:, None]) & wanted[None, :]
        old_rank = sample + tl.sum(behind.to(tl.int32), 1)
    here = tl.load(place + sample, mask=exists, other=0.0)
    row = merged + ray * (samples + drawn)
    tl.store(row + old_rank, here, mask=exists)
    tl.store(row + new_rank, t, mask=wanted)
    if SPLIT:
        tl.store(added + ray * drawn + new, t, mask=wanted)
        origin = source + ray * (samples + drawn)
        tl.store(origin + old_rank, sample, mask=exists)
        tl.store(origin + new_rank, samples + new, mask=wanted)


@triton.jit(do_not_specialize=["samples", "drawn", "u_stride", "noise_std", "scale"])
def composite(
    density,
    rgb,
    t,
    lengths,
    noise,
    u,
    colors,
    result,
    g_density,
    g_rgb,
    merged,
    added,
    source,
    samples,
    drawn,
    t_stride,
    u_stride,
    noise_std,
    scale,
    TRAIN: tl.constexpr,
    COLOR: tl.constexpr,
    WHITE: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    ASCENDING: tl.constexpr,
    SPLIT: tl.constexpr,
    PADDED: tl.constexpr,
    DRAWN: tl.constexpr,
):
    """Composite one ray; in training its error and the gradients too; draw the fine samples.

    Args:
        density: (R, S) fp32, raw.
        rgb: (R, S, 3) fp32, raw.
        t: (R, S) fp32, ascending; with `t_stride` 0 one row for all rays.
        lengths: (R,) fp32, |direction|.
        noise: (R, S) fp32, standard normal (TRAIN).
        u: (R, N) fp32, where in the CDF to draw (IMPORTANCE); with `u_stride` 0 one row for all.
        colors: (R, 3) fp32, true colours (TRAIN).
        result: written: (R,) fp32, summed squared error of the colours (TRAIN), or (R, 3) fp32,
            the colours, clamped to [0, 1] (COLOR).
        g_density: (R, S) fp32, gradient of the loss, written (TRAIN); `g_rgb` (R, S, 3) likewise.
        merged: (R, S + N) fp32, t and the new samples in order, written (IMPORTANCE).
        added: (R, N) fp32, the new samples in the order of u, written (SPLIT).
        source: (R, S + N) int32, which of t and `added`, one behind the other, each of `merged`
            is, written (SPLIT).
        samples: S.
        drawn: N.
        t_stride: S, or 0.
        u_stride: N, or 0.
        noise_std: what the noise is multiplied by.
        scale: the loss is `scale` times the sum of the squared errors.
        TRAIN: whether errors and gradients are wanted.
        COLOR: whether colours are.
        WHITE: whether the background is white.
        IMPORTANCE: whether new samples are drawn.
        ASCENDING: whether every row of u is ascending.
        SPLIT: whether they are wanted by themselves, too.
        PADDED: a power of two, at least S.
        DRAWN: a power of two, at least N.
    """
    ray = tl.program_id(0).to(tl.int64)
    sample = tl.arange(0, PADDED)
    exists = sample < samples
    at = ray * samples + sample
    place = t + ray * t_stride
    here = tl.load(place + sample, mask=exists, other=0.0)
    after = tl.load(place + sample + 1, mask=sample + 1 < samples, other=0.0)
    delta = tl.where(sample + 1 < samples, after - here, LAST_DISTANCE) * tl.load(lengths + ray)
    sigma = tl.load(density + at, mask=exists, other=0.0)
    if TRAIN:
        sigma += noise_std * tl.load(noise + at, mask=exists, other=0.0)
    through, transmittance, w = _weights(sigma, delta, exists, sample + 1 < samples)
    if TRAIN or COLOR:
        red = _sigmoid(tl.load(rgb + at * 3, mask=exists, other=0.0))
        green = _sigmoid(tl.load(rgb + at * 3 + 1, mask=exists, other=0.0))
        blue = _sigmoid(tl.load(rgb + at * 3 + 2, mask=exists, other=0.0))
    if COLOR:
        ray_red, ray_green, ray_blue = _color(w, red, green, blue, WHITE)
        tl.store(result + ray * 3, tl.minimum(tl.maximum(ray_red, 0.0), 1.0))
        tl.store(result + ray * 3 + 1, tl.minimum(tl.maximum(ray_green, 0.0), 1.0))
        tl.store(result + ray * 3 + 2, tl.minimum(tl.maximum(ray_blue, 0.0), 1.0))
    if TRAIN:
        error, g_sigma, g_red, g_green, g_blue = _gradients(
            sigma, delta, exists, through, transmittance, w, red, green, blue, colors + ray * 3,
            scale, WHITE,
        )  # fmt: skip
        tl.store(result + ray, error)
        tl.store(g_rgb + at * 3, g_red, mask=exists)
        tl.store(g_rgb + at * 3 + 1, g_green, mask=exists)
        tl.store(g_rgb + at * 3 + 2, g_blue, mask=exists)
        tl.store(g_density + at, g_sigma, mask=exists)
    if IMPORTANCE:
        _merge_importance(
            place, w, u, merged, added, source, ray, samples, drawn, u_stride, ASCENDING, SPLIT,
            PADDED, DRAWN,
        )  # fmt: skip


@triton.jit
def _either(first, second, row, column, S, N, exists, PARTS: tl.constexpr, part: tl.constexpr):
    """What a ray has at `column` of its S + N samples, which lie in two tensors."""
    old = exists & (column < S)
    new = exists & (column >= S)
    here = tl.load(first + (row * S + column) * PARTS + part, mask=old, other=0.0)
    return here + tl.load(second + (row * N + column - S) * PARTS + part, mask=new, other=0.0)


@triton.jit
def _add_either(
    first, second, row, column, S, N, exists, PARTS: tl.constexpr, part: tl.constexpr, values
):
    """Add to the former, overwrite the latter."""
    old = exists & (column < S)
    new = exists & (column >= S)
    place = first + (row * S + column) * PARTS + part
    tl.store(place, tl.load(place, mask=old, other=0.0) + values, mask=old)
    tl.store(second + (row * N + column - S) * PARTS + part, values, mask=new)


@triton.jit(do_not_specialize=["samples", "drawn", "noise_std", "scale"])
def composite_joined(
    density,
    more_density,
    rgb,
    more_rgb,
    t,
    source,
    lengths,
    noise,
    colors,
    errors,
    g_density,
    g_more_density,
    g_rgb,
    g_more_rgb,
    samples,
    drawn,
    noise_std,
    scale,
    WHITE: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Error and gradients of a ray whose samples were evaluated in two parts by one network.

    Args:
        density: (R, S) fp32, raw, of the first part; `rgb` (R, S, 3).
        more_density: (R, N) fp32, raw, of the second part; `more_rgb` (R, N, 3).
        t: (R, S + N) fp32, all of them, ascending.
        source: (R, S + N) int32, which of both parts, one behind the other, each one is.
        lengths: (R,) fp32, |direction|.
        noise: (R, S + N) fp32, standard normal, in the order of t.
        colors: (R, 3) fp32, true colours.
        errors: (R,) fp32, written: summed squared errors.
        g_density: (R, S) fp32, gradient of the loss, **added to**; `g_rgb` (R, S, 3) likewise.
        g_more_density: (R, N) fp32, written; `g_more_rgb` (R, N, 3) likewise.
        samples: S.
        drawn: N.
        noise_std: what the noise is multiplied by.
        scale: the loss is `scale` times the sum of the squared errors.
        WHITE: whether the background is white.
        PADDED: a power of two, at least S + N.
    """
    ray = tl.program_id(0).to(tl.int64)
    sample = tl.arange(0, PADDED)
    count = samples + drawn
    exists = sample < count
    inner = sample + 1 < count
    at = ray * count + sample
    here = tl.load(t + at, mask=exists, other=0.0)
    after = tl.load(t + at + 1, mask=inner, other=0.0)
    delta = tl.where(inner, after - here, LAST_DISTANCE) * tl.load(lengths + ray)
    place = tl.load(source + at, mask=exists, other=0)
    sigma = _either(density, more_density, ray, place, samples, drawn, exists, 1, 0)
    sigma += noise_std * tl.load(noise + at, mask=exists, other=0.0)
    through, transmittance, w = _weights(sigma, delta, exists, inner)
    red = _sigmoid(_either(rgb, more_rgb, ray, place, samples, drawn, exists, 3, 0))
    green = _sigmoid(_either(rgb, more_rgb, ray, place, samples, drawn, exists, 3, 1))
    blue = _sigmoid(_either(rgb, more_rgb, ray, place, samples, drawn, exists, 3, 2))
    error, g_sigma, g_red, g_green, g_blue = _gradients(
        sigma, delta, exists, through, transmittance, w, red, green, blue, colors + ray * 3, scale,
        WHITE,
    )  # fmt: skip
    tl.store(errors + ray, error)
    _add_either(g_density, g_more_density, ray, place, samples, drawn, exists, 1, 0, g_sigma)
    _add_either(g_rgb, g_more_rgb, ray, place, samples, drawn, exists, 3, 0, g_red)
    _add_either(g_rgb, g_more_rgb, ray, place, samples, drawn, exists, 3, 1, g_green)
    _add_either(g_rgb, g_more_rgb, ray, place, samples, drawn, exists, 3, 2, g_blue)


@triton.jit(do_not_specialize=["rays"])
def end_step(counter, coarse_errors, fine_errors, sums, rays, PADDED: tl.constexpr):
    """Count an iteration and add up its errors. One program.

    Args:
        counter: (1,) int64, iterations done, increased.
        coarse_errors: (R,) fp32, summed squared errors of each ray; `fine_errors` likewise.
        sums: (2,) fp32: the coarse and the fine MSE of this iteration are added.
        rays: R.
        PADDED: a power of two.
    """
    coarse = tl.zeros((PADDED,), tl.float32)
    fine = tl.zeros((PADDED,), tl.float32)
    for first in range(0, rays, PADDED):
        ray = first + tl.arange(0, PADDED)
        coarse += tl.load(coarse_errors + ray, mask=ray < rays, other=0.0)
        fine += tl.load(fine_errors + ray, mask=ray < rays, other=0.0)
    count = 3.0 * rays
    tl.store(sums, tl.load(sums) + tl.sum(coarse, 0) / count)
    tl.store(sums + 1, tl.load(sums + 1) + tl.sum(fine, 0) / count)
    tl.store(counter, tl.load(counter) + 1)
