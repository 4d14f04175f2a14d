"""A step of weights that are trained in the few bits of their file: rounding, gradients, update.

A program works on one row of a layer: its weights, its bias and its scale. Letters as in
`nerf.rounding`: W the float weights, Ŵ the rounded ones, s = s₀ exp(d) a row's scale (as float16
can say it), x = W / s, Q the highest multiple of it, k = round(clamp(x, −Q, Q)), Ŵ = s k; and as in
`nerf.muon` and `nerf.kernels.adam`.

    ∂L/∂W = ∂L/∂Ŵ where |x| ≤ Q, else 0;   ∂L/∂d = s₀ exp(d) Σ ∂L/∂Ŵ (k − x [|x| ≤ Q])

and where the codes are squeezed, with the price c of one more multiple in a layer, c sign(W) / s
and −c s₀ exp(d) Σ |x| / s more.

Source: as `nerf.rounding`: Bengio et al. 2013, Esser et al. 2020.
"""

import triton
import triton.language as tl

TABLE = 6  # integers a row takes in the table of rows
SMALLEST_SCALE = tl.constexpr(1e-6)  # as nerf.rounding.SMALLEST_SCALE
SMALLEST_MEAN = tl.constexpr(1e-4)  # as nerf.rounding.geometric_entropy
# Adding and taking away 1.5 · 2²³ leaves the nearest whole number, ties to even, as torch.round.
WHOLE = tl.constexpr(12582912.0)


@triton.jit
def _half(x):
    return x.to(tl.float16).to(tl.float32)


@triton.jit
def _codes(w, scale, top):
    """x, and the nearest multiple within the ends."""
    x = tl.div_rn(w, scale)
    within = tl.minimum(tl.maximum(x, -top), top)
    return x, (within + WHOLE) - WHOLE


@triton.jit(do_not_specialize=["rows_of_stack", "columns_of_stack"])
def row_gradients(
    table, values, gradients, more, start, tops, changes, g_changes, momentum, stack, costs,
    rows_of_stack, columns_of_stack,
    BETA: tl.constexpr, ROUND: tl.constexpr, SQUEEZE: tl.constexpr, MUON: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Gradients of the float weights and scales from those of the rounded weights.

    Args:
        table: (rows, TABLE) int32: place of the row in the flat vectors, its length, place of its
            bias, number of its layer, its matrix in `stack` (−1 for Adam), its row there.
        values: flat fp32, W and the biases.
        gradients: flat fp32, ∂L/∂Ŵ; `more` the same of other samples, added to it. Overwritten by
            those of W and the biases.
        start: (rows,) fp32, s₀; `tops` Q, `changes` d, `g_changes` ∂L/∂d, written (ROUND).
        momentum: flat fp32, M, updated; U is written to `stack` (MUON).
        costs: (layers,) fp32, c (SQUEEZE).
        rows_of_stack: of a matrix in it; `columns_of_stack` likewise.
        BETA: β of Muon.
        ROUND: whether weights are rounded.
        SQUEEZE: whether codes have a price.
        MUON: whether matrices are trained by Muon.
        PADDED: a power of two, at least the longest row.
    """
    row = tl.program_id(0)
    entry = table + row * 6
    at, width, bias_at = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.arange(0, PADDED)
    inside = column < width
    g = tl.load(gradients + at + column, mask=inside, other=0.0)
    g += tl.load(more + at + column, mask=inside, other=0.0)
    tl.store(gradients + bias_at, tl.load(gradients + bias_at) + tl.load(more + bias_at))
    if ROUND:
        w = tl.load(values + at + column, mask=inside, other=0.0)
        exact = tl.load(start + row) * tl.exp(tl.load(changes + row))
        scale = _half(tl.maximum(exact, SMALLEST_SCALE))
        top = tl.load(tops + row)
        x, k = _codes(w, scale, top)
        free = tl.abs(x) <= top
        g_scale = tl.sum(g * (k - tl.where(free, x, 0.0)), 0)
        g = tl.where(free, g, 0.0)
        if SQUEEZE:
            cost = tl.load(costs + tl.load(entry + 3)) / scale
            g += cost * tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, 0.0))
            g_scale -= cost * tl.sum(tl.where(inside, tl.abs(x), 0.0), 0)
        tl.store(g_changes + row, tl.where(exact > SMALLEST_SCALE, g_scale * exact, 0.0))
    tl.store(gradients + at + column, g, mask=inside)
    if MUON:
        slot = tl.load(entry + 4)
        ours = inside & (slot >= 0)
        m = tl.load(momentum + at + column, mask=ours, other=0.0)
        m += (1.0 - BETA) * (g - m)
        tl.store(momentum + at + column, m, mask=ours)
        place = (slot * rows_of_stack + tl.load(entry + 5)) * columns_of_stack
        tl.store(stack + place + column, g + BETA * (m - g), mask=ours)


@triton.jit
def _adam(w, g, first, second, at, mask, s, r, BETA_1, BETA_2, EPSILON):
    m = tl.load(first + at, mask=mask, other=0.0)
    v = tl.load(second + at, mask=mask, other=0.0)
    m = m + (1.0 - BETA_1) * (g - m)
    v = v * BETA_2 + (1.0 - BETA_2) * g * g
    tl.store(first + at, m, mask=mask)
    tl.store(second + at, v, mask=mask)
    return w - s * m / (tl.sqrt(v) * r + EPSILON)


@triton.jit(do_not_specialize=["rows_of_stack", "columns_of_stack", "count"])
def update_rows(
    table, factors, values, rounded, gradients, first, second, start, tops, changes, g_changes,
    stack, schedule, code_sums, rows_of_stack, columns_of_stack, count,
    BETA_1: tl.constexpr, BETA_2: tl.constexpr, EPSILON: tl.constexpr, UPDATE: tl.constexpr,
    ROUND: tl.constexpr, SQUEEZE: tl.constexpr, MUON: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Update a row by its gradient and round it anew.

    Args:
        table: as in `row_gradients`, and so are `values`, `gradients`, `start`, `tops`, `changes`,
            `g_changes`, `stack` (now orth(U)), `rows_of_stack` and `columns_of_stack`.
        factors: (rows,) fp32, what a step of Muon is multiplied by beside the learning rate.
        rounded: flat fp32, Ŵ and the rounded biases, written.
        first: (count + rows,) fp32: Adam's m of the flat vector (for Muon's matrices M), then of
            the changes; `second` (v) likewise.
        schedule: (5,) fp32: s and r of Adam for the flat vector, s and r for the changes (see
            `nerf.kernels.adam`), the learning rate.
        code_sums: (layers,) fp32, Σ |k| of each layer, added to (SQUEEZE).
        count: length of the flat vector.
        BETA_1: β₁ of Adam; `BETA_2`, `EPSILON` likewise.
        UPDATE: whether to update; else the row is only rounded.
        ROUND: whether weights are rounded; else they are copied.
        SQUEEZE: whether `code_sums` is wanted.
        MUON: whether matrices are trained by Muon.
        PADDED: a power of two, at least the longest row.
    """
    row = tl.program_id(0)
    entry = table + row * 6
    at, width, bias_at = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.arange(0, PADDED)
    inside = column < width
    w = tl.load(values + at + column, mask=inside, other=0.0)
    bias = tl.load(values + bias_at)
    if UPDATE:
        s, r = tl.load(schedule), tl.load(schedule + 1)
        g = tl.load(gradients + at + column, mask=inside, other=0.0)
        if MUON:
            slot = tl.load(entry + 4)
            place = (slot * rows_of_stack + tl.load(entry + 5)) * columns_of_stack
            ours = inside & (slot >= 0)
            step = tl.load(stack + place + column, mask=ours, other=0.0)
            by_muon = w - tl.load(schedule + 4) * tl.load(factors + row) * step
            by_adam = _adam(
                w, g, first, second, at + column, inside & (slot < 0), s, r, BETA_1, BETA_2, EPSILON
            )
            w = tl.where(slot >= 0, by_muon, by_adam)
        else:
            w = _adam(w, g, first, second, at + column, inside, s, r, BETA_1, BETA_2, EPSILON)
        tl.store(values + at + column, w, mask=inside)
        bias = _adam(
            bias, tl.load(gradients + bias_at), first, second, bias_at, width > 0, s, r,
            BETA_1, BETA_2, EPSILON,
        )  # fmt: skip
        tl.store(values + bias_at, bias)
    if ROUND:
        change = tl.load(changes + row)
        if UPDATE:
            change = _adam(
                change, tl.load(g_changes + row), first, second, count + row, width > 0,
                tl.load(schedule + 2), tl.load(schedule + 3), BETA_1, BETA_2, EPSILON,
            )  # fmt: skip
            tl.store(changes + row, change)
        scale = _half(tl.maximum(tl.load(start + row) * tl.exp(change), SMALLEST_SCALE))
        _, k = _codes(w, scale, tl.load(tops + row))
        w = k * scale
        bias = _half(bias)
        if SQUEEZE:
            total = tl.sum(tl.where(inside, tl.abs(k), 0.0), 0)
            # Whole numbers, so that the order in which they are added does not matter.
            tl.atomic_add(code_sums + tl.load(entry + 3), total)
    tl.store(rounded + at + column, w, mask=inside)
    tl.store(rounded + bias_at, bias)


@triton.jit(do_not_specialize=["layers", "first_iteration", "falling", "rate", "gain", "most"])
def price_codes(
    counter, code_sums, sizes, limits, price, costs, sums,
    layers, first_iteration, falling, rate, gain, most, PADDED: tl.constexpr,
):  # fmt: skip
    """What one more multiple costs in each layer; one program. See `nerf.recovery.squeeze`.

    The derivative of H(m) = log₂((1 + θ) / (1 − θ)) − m log₂ θ is −log₂ θ: of all distributions
    with that mean this one has the most entropy.

    Args:
        counter: (1,) int64, the iteration.
        code_sums: (layers,) fp32, Σ |k|, set to zero.
        sizes: (layers,) fp32, weights of each.
        limits: (2,) fp32, bits at first and in the end.
        price: (1,) fp32, λ, updated.
        costs: (layers,) fp32, written: c.
        sums: (1,) fp32, what the bits cost is added.
        layers: how many.
        first_iteration: at which the bits allowed begin to fall.
        falling: in how many iterations.
        rate: how fast the price follows.
        gain: how much of the excess it answers at once.
        most: no more of the excess is answered, up or down.
        PADDED: a power of two, at least `layers`.
    """
    layer = tl.arange(0, PADDED)
    exists = layer < layers
    size = tl.load(sizes + layer, mask=exists, other=0.0)
    total = tl.load(code_sums + layer, mask=exists, other=0.0)
    found = total / tl.where(exists, size, 1.0)
    m = tl.maximum(found, SMALLEST_MEAN)
    theta = m / (1.0 + tl.sqrt(1.0 + m * m))
    slope = -tl.log2(theta)
    bits = tl.sum(size * (tl.log2((1.0 + theta) / (1.0 - theta)) + m * slope), 0)
    begun = (tl.load(counter) - first_iteration).to(tl.float32) / falling
    share = tl.minimum(begun, 1.0)
    in_the_end = tl.load(limits + 1)
    at_first = tl.maximum(tl.load(limits), in_the_end)
    allowed = at_first * tl.exp(share * tl.log(in_the_end / at_first))
    excess = tl.minimum(tl.maximum(bits / allowed - 1.0, -most), most)
    slow = tl.load(price)
    now = slow * tl.exp(gain * excess)
    cost = tl.where(found >= SMALLEST_MEAN, now / allowed * slope, 0.0)
    tl.store(costs + layer, cost, mask=exists)
    tl.store(sums, tl.load(sums) + now * bits / allowed)
    tl.store(price, slow * tl.exp(rate * excess))
    tl.store(code_sums + layer, tl.zeros((PADDED,), tl.float32), mask=exists)
