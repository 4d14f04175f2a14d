"""The layers of a network as one kernel: forward and backward chains in plain Triton.

A program carries a block of rows through all layers. Activations go through a buffer of chunks
(see `nerf.kernels.plan`) that stays in the L2 cache when it is only a scratch, and that is what the
weight gradients read when it is kept. The kernels are generic in every width: a table of steps
says what to multiply with what. They run on any GPU that Triton supports, and in its interpreter;
`hopper_chain.cu` is the version for Hopper GPUs.
"""

import triton
import triton.language as tl

from nerf.kernels.encode import encode_chunk

CHUNK = tl.constexpr(64)
TILE = tl.constexpr(64 * 64)
TABLE = tl.constexpr(8)


@triton.jit
def _load_chunks(buffer, chunk, count, rows, chunk_rows, WIDTH: tl.constexpr):
    """Load `count` chunks from `chunk` on as (rows, WIDTH), zeros behind them."""
    column = tl.arange(0, WIDTH)
    at = (chunk + column // CHUNK).to(tl.int64) * chunk_rows * CHUNK + column % CHUNK
    inside = column // CHUNK < count
    return tl.load(
        buffer + at[None, :] + rows[:, None] * CHUNK,
        mask=inside[None, :],
        other=0.0,
    )


@triton.jit
def _load_tiles(weights, tile, stride, count, WIDTH: tl.constexpr):
    """Load `count` weight tiles, `stride` tiles apart, as (WIDTH inputs, 64 outputs)."""
    column = tl.arange(0, WIDTH)
    output = tl.arange(0, CHUNK)
    at = (tile + (column // CHUNK) * stride) * TILE + column % CHUNK
    inside = column // CHUNK < count
    return tl.load(weights + at[:, None] + output[None, :] * CHUNK, mask=inside[:, None], other=0.0)


@triton.jit
def _forward_step(
    step,
    buffer,
    weights,
    vector,
    share,
    rows,
    rays,
    chunk_rows,
    density_at,
    rgb_at,
    LAST: tl.constexpr,
    VIEW: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One layer; returns the sums that the density head (or red, green, blue) reads."""
    outputs = tl.load(step)
    source = tl.load(step + 1)
    sources = tl.load(step + 2)
    point = tl.load(step + 3)
    tile = tl.load(step + 4)
    bias = tl.load(step + 5) * CHUNK
    target = tl.load(step + 6)
    h = _load_chunks(buffer, source, sources, rows, chunk_rows, WIDTH)
    e = _load_chunks(buffer, 0, point, rows, chunk_rows, CHUNK)
    column = tl.arange(0, CHUNK)
    sum_0 = tl.zeros((BLOCK,), tl.float32)
    sum_1 = tl.zeros((BLOCK,), tl.float32)
    sum_2 = tl.zeros((BLOCK,), tl.float32)
    for n in range(outputs):
        w = _load_tiles(weights, tile + point * outputs + n, outputs, sources, WIDTH)
        out = tl.dot(h, w, input_precision="ieee")
        if point > 0:
            w_point = _load_tiles(weights, tile + n, 0, 1, CHUNK)
            out = tl.dot(e, w_point, out, input_precision="ieee")
        place = n * CHUNK + column
        if VIEW:
            out += tl.load(share + rays[:, None] * (outputs * CHUNK) + place[None, :])
        else:
            out += tl.load(vector + bias + place)[None, :]
        out = tl.maximum(out, 0.0)
        if LAST:
            sum_0 += tl.sum(out * tl.load(vector + density_at * CHUNK + place)[None, :], 1)
        if VIEW:
            padded = outputs * CHUNK
            sum_0 += tl.sum(out * tl.load(vector + rgb_at * CHUNK + place)[None, :], 1)
            sum_1 += tl.sum(out * tl.load(vector + rgb_at * CHUNK + padded + place)[None, :], 1)
            sum_2 += tl.sum(out * tl.load(vector + rgb_at * CHUNK + 2 * padded + place)[None, :], 1)
        at = (target + n).to(tl.int64) * chunk_rows * CHUNK
        tl.store(
            buffer + at + rows[:, None] * CHUNK + column[None, :], out.to(buffer.dtype.element_ty)
        )
    return sum_0, sum_1, sum_2


@triton.jit
def _forward_any(
    step,
    buffer,
    weights,
    vector,
    share,
    rows,
    rays,
    chunk_rows,
    density_at,
    rgb_at,
    LAST: tl.constexpr,
    VIEW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One layer, at the smallest compiled input width that holds it."""
    sources = tl.load(step + 2)
    if sources <= 1:
        a, b, c = _forward_step(
            step, buffer, weights, vector, share, rows, rays, chunk_rows, density_at, rgb_at,
            LAST, VIEW, 64, BLOCK,
        )  # fmt: skip
    elif sources == 2:
        a, b, c = _forward_step(
            step, buffer, weights, vector, share, rows, rays, chunk_rows, density_at, rgb_at,
            LAST, VIEW, 128, BLOCK,
        )  # fmt: skip
    else:
        a, b, c = _forward_step(
            step, buffer, weights, vector, share, rows, rays, chunk_rows, density_at, rgb_at,
            LAST, VIEW, 256, BLOCK,
        )  # fmt: skip
    return a, b, c


@triton.jit(
    do_not_specialize=[
        "n_rows", "samples", "steps", "density_at", "rgb_at", "bias_at", "octaves",
    ]
)  # fmt: skip
def forward_chain(
    origins,
    directions,
    distances,
    share,
    table,
    weights,
    vector,
    buffer,
    density,
    rgb,
    n_rows,
    samples,
    chunk_rows,
    steps,
    density_at,
    rgb_at,
    bias_at,
    octaves,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Evaluate the merged network at origin + distance · direction.

    Args:
        origins: (R, 3) fp32; `directions` the same, not normalised.
        distances: (R, S) fp32.
        share: (R, view columns) fp32, what the view layer adds for a ray, padded to chunks.
        table: (steps, 8) int32.
        weights: forward weight tiles, bf16.
        vector: biases and heads, fp32.
        buffer: activation chunks, bf16, (chunks, chunk_rows, 64).
        density: (R, S) fp32, written; `rgb` (R, S, 3) likewise.
        n_rows: R · S.
        samples: S.
        chunk_rows: rows of the buffer: all (padded) if KEEP, else BLOCK a program.
        steps: steps of the table.
        density_at: first chunk of the density weights in `vector`; `rgb_at`, `bias_at` likewise.
        octaves: of the point encoding.
        KEEP: whether the buffer keeps every row (training) or is a program's scratch.
        BLOCK: rows a program carries.
    """
    pid = tl.program_id(0)
    column = tl.arange(0, CHUNK)
    last = n_rows
    if KEEP:
        last = chunk_rows  # the weight gradients read the padding too
    for block in range(pid, tl.cdiv(last, BLOCK), tl.num_programs(0)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        valid = row < n_rows
        ray = tl.where(valid, row // samples, 0)
        distance = tl.load(distances + row, mask=valid, other=0.0)
        x = tl.load(origins + ray * 3) + distance * tl.load(directions + ray * 3)
        y = tl.load(origins + ray * 3 + 1) + distance * tl.load(directions + ray * 3 + 1)
        z = tl.load(origins + ray * 3 + 2) + distance * tl.load(directions + ray * 3 + 2)
        e = encode_chunk(x, y, z, column, octaves)
        if KEEP:
            place = row
        else:
            place = pid * BLOCK + tl.arange(0, BLOCK)
        place = place.to(tl.int64)
        tl.store(buffer + place[:, None] * CHUNK + column[None, :], e.to(buffer.dtype.element_ty))
        ray = ray.to(tl.int64)
        for index in range(steps - 2):
            tl.debug_barrier()
            _forward_any(
                table + index * TABLE, buffer, weights, vector, share, place, ray, chunk_rows,
                density_at, rgb_at, False, False, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()
        sigma, _, _ = _forward_any(
            table + (steps - 2) * TABLE, buffer, weights, vector, share, place, ray, chunk_rows,
            density_at, rgb_at, True, False, BLOCK,
        )  # fmt: skip
        tl.store(density + row, sigma + tl.load(vector + bias_at * CHUNK), mask=valid)
        tl.debug_barrier()
        red, green, blue = _forward_any(
            table + (steps - 1) * TABLE, buffer, weights, vector, share, place, ray, chunk_rows,
            density_at, rgb_at, False, True, BLOCK,
        )  # fmt: skip
        colour = rgb + row.to(tl.int64) * 3
        tl.store(colour, red + tl.load(vector + bias_at * CHUNK + 1), mask=valid)
        tl.store(colour + 1, green + tl.load(vector + bias_at * CHUNK + 2), mask=valid)
        tl.store(colour + 2, blue + tl.load(vector + bias_at * CHUNK + 3), mask=valid)
        tl.debug_barrier()


@triton.jit
def _backward_step(
    step,
    deltas,
    activations,
    weights,
    vector,
    rows,
    g_density,
    chunk_rows,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The deltas of one layer from those of the layer above."""
    outputs = tl.load(step)
    source = tl.load(step + 1)
    sources = tl.load(step + 2)
    tile = tl.load(step + 4)
    heads = tl.load(step + 5)
    target = tl.load(step + 6)
    gate = tl.load(step + 7)
    above = _load_chunks(deltas, source, sources, rows, chunk_rows, WIDTH)
    column = tl.arange(0, CHUNK)
    for n in range(outputs):
        w = _load_tiles(weights, tile + n, outputs, sources, WIDTH)
        out = tl.dot(above, w, input_precision="ieee")
        if FIRST:
            head = tl.load(vector + (heads + n) * CHUNK + column)
            out += g_density[:, None] * head[None, :]
        inside = rows[:, None] * CHUNK + column[None, :]
        at = (gate + n).to(tl.int64) * chunk_rows * CHUNK
        out = tl.where(tl.load(activations + at + inside) > 0, out, 0.0)
        at = (target + n).to(tl.int64) * chunk_rows * CHUNK
        tl.store(deltas + at + inside, out.to(deltas.dtype.element_ty))


@triton.jit
def _backward_any(
    step,
    deltas,
    activations,
    weights,
    vector,
    rows,
    g_density,
    chunk_rows,
    FIRST: tl.constexpr,
):
    """One layer backward, at the smallest compiled input width that holds it."""
    sources = tl.load(step + 2)
    if sources <= 1:
        _backward_step(
            step, deltas, activations, weights, vector, rows, g_density, chunk_rows, FIRST, 64
        )
    elif sources == 2:
        _backward_step(
            step, deltas, activations, weights, vector, rows, g_density, chunk_rows, FIRST, 128
        )
    else:
        _backward_step(
            step, deltas, activations, weights, vector, rows, g_density, chunk_rows, FIRST, 256
        )


@triton.jit(
    do_not_specialize=[
        "n_rows", "steps", "view_chunks", "view_activation", "view_delta", "rgb_at",
    ]
)  # fmt: skip
def backward_chain(
    g_density,
    g_rgb,
    table,
    weights,
    vector,
    activations,
    deltas,
    n_rows,
    chunk_rows,
    steps,
    view_chunks,
    view_activation,
    view_delta,
    rgb_at,
    BLOCK: tl.constexpr,
):
    """Deltas (gradients before each ReLU) of every layer, from those of density and colour.

    Args:
        g_density: (N,) fp32, gradient with respect to the raw density.
        g_rgb: (N, 3) fp32, with respect to the raw colour.
        table: (steps, 8) int32, backward.
        weights: backward weight tiles, bf16.
        vector: biases and heads, fp32.
        activations: what `forward_chain` kept.
        deltas: delta chunks, bf16, (chunks, chunk_rows, 64), written (zero in padded rows).
        n_rows: N.
        chunk_rows: padded rows.
        steps: steps of the table.
        view_chunks: chunks of the view layer.
        view_activation: its first activation chunk; `view_delta` its first delta chunk.
        rgb_at: first chunk of the colour weights in `vector`.
        BLOCK: rows a program carries.
    """
    pid = tl.program_id(0)
    column = tl.arange(0, CHUNK)
    for block in range(pid, tl.cdiv(chunk_rows, BLOCK), tl.num_programs(0)):
        row = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        valid = row < n_rows
        g_sigma = tl.load(g_density + row, mask=valid, other=0.0)
        g_red = tl.load(g_rgb + row * 3, mask=valid, other=0.0)
        g_green = tl.load(g_rgb + row * 3 + 1, mask=valid, other=0.0)
        g_blue = tl.load(g_rgb + row * 3 + 2, mask=valid, other=0.0)
        inside = row[:, None] * CHUNK + column[None, :]
        padded = view_chunks * CHUNK
        for n in range(view_chunks):
            head = vector + (rgb_at + n) * CHUNK + column
            out = g_red[:, None] * tl.load(head)[None, :]
            out += g_green[:, None] * tl.load(head + padded)[None, :]
            out += g_blue[:, None] * tl.load(head + 2 * padded)[None, :]
            at = (view_activation + n).to(tl.int64) * chunk_rows * CHUNK
            out = tl.where(tl.load(activations + at + inside) > 0, out, 0.0)
            at = (view_delta + n).to(tl.int64) * chunk_rows * CHUNK
            tl.store(deltas + at + inside, out.to(deltas.dtype.element_ty))
        which = column[None, :]
        heads = tl.where(which == 0, g_sigma[:, None], 0.0)
        heads = tl.where(which == 1, g_red[:, None], heads)
        heads = tl.where(which == 2, g_green[:, None], heads)
        heads = tl.where(which == 3, g_blue[:, None], heads)
        at = (view_delta + view_chunks).to(tl.int64) * chunk_rows * CHUNK
        tl.store(deltas + at + inside, heads.to(deltas.dtype.element_ty))
        tl.debug_barrier()
        _backward_any(table, deltas, activations, weights, vector, row, g_sigma, chunk_rows, True)
        for index in range(1, steps):
            tl.debug_barrier()
            _backward_any(
                table + index * TABLE, deltas, activations, weights, vector, row, g_sigma,
                chunk_rows, False,
            )  # fmt: skip
        tl.debug_barrier()
