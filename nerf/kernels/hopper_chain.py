"""The layers of a network as one kernel, for Hopper GPUs (compute capability 9.0), in Gluon.

A multiprocessor runs one program of `GROUPS` warp groups and a producer warp. Each warp group
carries 64 rows through all layers: its activations lie in shared memory, are read from there by
wgmma, and are replaced in place by the layer's output once its product is complete; they never
leave the chip (training also writes a copy out with the copy engine). The producer streams weight
tiles through a ring of `STAGES` slots that all groups read; a slot is free when every group has
read it. While one group finishes a layer (bias, ReLU, bf16), the others keep the tensor cores busy.

Shared memory: a slot is 256 × 64 weights (32 KiB), a group holds 4 chunks of activations and the
encoded point (40 KiB). All widths are run-time counts of chunks; only the number of output chunks
selects code (1, 2, 3 or 4), since a product's width is part of the instruction.

The weights are read once from L2 for `GROUPS` · 64 rows: 2 bytes for 2 · 64 · `GROUPS`
floating-point operations, so at 600 TFLOP/s 4.7 TB/s for 2 groups and 3.1 TB/s for 3.
"""

from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nerf.kernels import encode
from nerf.kernels.plan import CHUNK as CHUNK_SIZE

if TYPE_CHECKING:
    from nerf.kernels.mlp import FusedField, PackedField

CHUNK = gl.constexpr(64)
TABLE = gl.constexpr(8)
TILE_BYTES = gl.constexpr(64 * 64 * 2)
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
ENCODE_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))

encode_chunk = gluon.jit(encode.encode_chunk.fn)


@gluon.constexpr_function
def accumulator_layout(width: int, groups: int) -> gl.NVMMADistributedLayout:
    """Registers of a 64 × width fp32 accumulator of one warp group.

    The compiler refuses instructions 256 wide where a thread has 128 registers at launch, which is
    what 3 groups and a producer leave.
    """
    return gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, min(width, 256 if groups < 3 else 128), 16]
    )


@gluon.jit
def _producer(weights, table, ring, full, empty, blocks, steps, STAGES: gl.constexpr):
    """Stream the weight tiles of every step, for every block of rows, through the ring."""
    slot = 0
    phase = 1
    for _ in range(gl.program_id(0), blocks, gl.num_programs(0)):
        row = 0
        for index in range(steps):
            outputs = gl.load(table + index * TABLE)
            count = gl.load(table + index * TABLE + 2) + gl.load(table + index * TABLE + 3)
            for _k in range(count):
                mbarrier.wait(empty.index(slot), phase)
                for n in gl.static_range(4):
                    mbarrier.expect(full.index(slot), TILE_BYTES * (n + 1), pred=outputs == n + 1)
                for n in gl.static_range(4):
                    tma.async_copy_global_to_shared(
                        weights,
                        [row + n * CHUNK, 0],
                        full.index(slot),
                        ring.index(slot * 4 + n),
                        pred=n < outputs,
                    )
                row += outputs * CHUNK
                slot += 1
                phase = gl.where(slot == STAGES, phase ^ 1, phase)
                slot = gl.where(slot == STAGES, 0, slot)


# Bundles that travel through the functions below:
#   pipe: (act, ring, full, empty, turns), shared memory and its barriers;
#   state: (slot, phase, turn), where this group is in the ring, and whose turn it is;
#   sizes: (n_rows, samples, chunk_rows);
#   outputs: (density, rgb, gates, buffer), what the forward chain writes;
#   heads: (vector, density_at, rgb_at, bias_at), where biases and heads lie;
#   gradients: (g_density, g_rgb, gates, deltas, buffer), what the backward chain reads and writes.


@gluon.jit
def _product(
    start, pipe, state, count, first, point, point_chunk, group, N: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Return start + Σ chunk × tiles over `count` chunks of inputs, and the state after it."""
    act, ring, full, empty, turns = pipe
    slot, phase, turn = state
    tiles = ring._reinterpret(gl.bfloat16, [STAGES, 4 * CHUNK, CHUNK], TILE_LAYOUT)
    acc = start
    before = slot
    for k in range(count):
        if TURNS:
            # A turn is two chunks: no longer than the ring, which frees a slot only when every
            # group has read it, and longer than what a group does between two layers.
            begins = k % 2 == 0
            mbarrier.wait(turns.index(group), turn, pred=begins)
            turn = gl.where(begins, turn ^ 1, turn)
        mbarrier.wait(full.index(slot), phase)
        a = act.index(gl.where(k < point, point_chunk, first + k - point))
        b = tiles.index(slot).slice(0, N, 0).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, is_async=True)
        if TURNS:
            ends = (k % 2 == 1) | (k + 1 == count)
            mbarrier.arrive(turns.index((group + 1) % GROUPS), count=1, pred=ends)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
        before = slot
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    return acc, (slot, phase, turn)


@gluon.jit
def _relu_bf16(x):
    """max(x, 0) rounded to bf16, two values an instruction."""
    return gl.inline_asm_elementwise(
        "cvt.rn.relu.bf16x2.f32 $0, $2, $1;",
        "=r,r,r",
        [x],
        dtype=gl.bfloat16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _replace(act, value, group, N: gl.constexpr, GROUPS: gl.constexpr, COPIED: gl.constexpr):
    """Put (64, N) bf16 in the place of a group's activations."""
    if COPIED:
        # The copy engine may still be reading what is overwritten here.
        tma.store_wait(0)
        gl.thread_barrier()
    SPAN: gl.constexpr = 256 // N
    act._reinterpret(gl.bfloat16, [GROUPS * SPAN, CHUNK, N], TILE_LAYOUT).index(group * SPAN).store(
        value
    )
    fence_async_shared()


@gluon.jit
def _copy_out(act, first, target, count, row, buffer, chunk_rows):
    """Copy chunks of shared memory to a buffer of chunks with the copy engine."""
    for n in range(count):
        tma.async_copy_shared_to_global(
            buffer, [(target + n) * chunk_rows + row, 0], act.index(first + n)
        )


@gluon.jit
def _gate_words(value, N: gl.constexpr):
    """One bit a channel: bit j of word c tells whether channel 8·j + c is not zero.

    In the accumulator's registers a thread holds the same two columns of every group of 8, so the
    words are made without any exchange between threads.
    """
    WORDS: gl.constexpr = N // 8
    bits = gl.reshape(value.to(gl.int16, bitcast=True), [CHUNK, WORDS, 8])
    index = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, bits.type.layout)))
    mark = gl.expand_dims(gl.expand_dims(gl.to_tensor(1) << index, 0), 2)
    return gl.sum(gl.where(bits != 0, mark, 0), 1)


@gluon.jit
def _open_gates(gates, layer, row, chunk_rows, N: gl.constexpr, layout: gl.constexpr):
    """Read the words that `_gate_words` made of a layer, (64, 8)."""
    WORDS: gl.constexpr = N // 8
    like = gl.reshape(gl.zeros([CHUNK, N], gl.int32, layout), [CHUNK, WORDS, 8])
    words: gl.constexpr = gl.SliceLayout(1, like.type.layout)
    at_row = gl.arange(0, CHUNK, gl.SliceLayout(1, words))
    at_column = gl.arange(0, 8, gl.SliceLayout(0, words))
    place = (layer * chunk_rows + row + at_row)[:, None] * 8 + at_column[None, :]
    return gl.load(gates + place)


@gluon.jit
def _gated(value, words, N: gl.constexpr, layout: gl.constexpr):
    """`value` (64, N) where the gate is open, zero elsewhere."""
    WORDS: gl.constexpr = N // 8
    folded = gl.reshape(value, [CHUNK, WORDS, 8])
    index = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, folded.type.layout)))
    mark = gl.expand_dims(gl.expand_dims(gl.to_tensor(1) << index, 0), 2)
    kept = gl.where((gl.expand_dims(words, 1) & mark) != 0, folded, 0.0)
    return gl.convert_layout(gl.reshape(kept, [CHUNK, N]), layout, assert_trivial=True)


@gluon.jit
def _forward_step(
    step, pipe, state, share, outputs, sizes, heads, row, group, N: gl.constexpr,
    KIND: gl.constexpr, KEEP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """One layer of at most N outputs for one group's 64 rows."""
    act, _, _, _, _ = pipe
    density, rgb, gates, buffer = outputs
    n_rows, samples, chunk_rows = sizes
    vector, density_at, rgb_at, bias_at = heads
    layout: gl.constexpr = accumulator_layout(N, GROUPS)
    column = gl.arange(0, N, gl.SliceLayout(0, layout))
    local = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    width = gl.load(step) * CHUNK
    sources = gl.load(step + 2)
    point = gl.load(step + 3)
    used = column < width
    valid = row + local < n_rows
    if KIND == 2:
        ray = gl.where(valid, (row + local) // samples, 0)
        place = (ray * width)[:, None] + column[None, :]
        start = gl.load(share + place, mask=used[None, :], other=0.0)
    else:
        bias = gl.load(vector + gl.load(step + 5) * CHUNK + column)
        zero = gl.zeros([CHUNK, N], gl.float32, layout)
        start, _ = gl.broadcast(bias[None, :], zero)
    acc, state = _product(
        start, pipe, state, sources + point, group * 4, point, GROUPS * 4 + group, group, N,
        GROUPS, STAGES, TURNS,
    )  # fmt: skip
    if KIND == 1:
        h = gl.where(used[None, :], gl.maximum(acc, 0.0), 0.0)
        head = gl.load(vector + density_at * CHUNK + column, mask=used, other=0.0)
        sigma = gl.sum(h * head[None, :], 1) + gl.load(vector + bias_at * CHUNK)
        gl.store(density + row + local, sigma, mask=valid)
    if KIND == 2:
        h = gl.where(used[None, :], gl.maximum(acc, 0.0), 0.0)
        for c in gl.static_range(3):
            head = gl.load(vector + rgb_at * CHUNK + c * width + column, mask=used, other=0.0)
            value = gl.sum(h * head[None, :], 1) + gl.load(vector + bias_at * CHUNK + 1 + c)
            gl.store(rgb + (row + local) * 3 + c, value, mask=valid)
    if KIND != 2 or KEEP:
        out = _relu_bf16(acc)
        _replace(act, out, group, N, GROUPS, KEEP)
        if KEEP:
            _copy_out(act, group * 4, gl.load(step + 6), gl.load(step), row, buffer, chunk_rows)
            word = _gate_words(out, N)
            at_row = gl.arange(0, CHUNK, gl.SliceLayout(1, word.type.layout))
            at_column = gl.arange(0, 8, gl.SliceLayout(0, word.type.layout))
            layer = gl.load(step + 7)
            place = (layer * chunk_rows + row + at_row)[:, None] * 8 + at_column[None, :]
            gl.store(gates + place, word)
    return state


@gluon.jit
def _forward_any(
    step, pipe, state, share, outputs, sizes, heads, row, group, KIND: gl.constexpr,
    KEEP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One layer, at the smallest compiled width that holds it."""
    chunks = gl.load(step)
    if (KIND != 2) and (chunks > 2):
        state = _forward_step(
            step, pipe, state, share, outputs, sizes, heads, row, group, 256, KIND, KEEP, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
    elif chunks == 2:
        state = _forward_step(
            step, pipe, state, share, outputs, sizes, heads, row, group, 128, KIND, KEEP, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
    else:
        state = _forward_step(
            step, pipe, state, share, outputs, sizes, heads, row, group, 64, KIND, KEEP, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
    return state


@gluon.jit
def _forward_group(
    points, share, table, outputs, sizes, heads, pipe, blocks, steps, octaves,
    group: gl.constexpr, KEEP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of each block through all layers."""
    origins, directions, distances = points
    act, _, _, _, _ = pipe
    n_rows, samples, chunk_rows = sizes
    _, _, _, buffer = outputs
    # The first group's first turn comes at once, as if the last had just handed it on.
    FIRST: gl.constexpr = 1 if group == 0 else 0
    state = (gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(FIRST))
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        row = (block * GROUPS + group) * CHUNK
        if KEEP:
            # Groups beyond the buffers repeat the last rows: they write what is already there.
            row = gl.minimum(row, chunk_rows - CHUNK)
        column = gl.arange(0, CHUNK, gl.SliceLayout(0, ENCODE_LAYOUT))
        at = row + gl.arange(0, CHUNK, gl.SliceLayout(1, ENCODE_LAYOUT))
        valid = at < n_rows
        ray = gl.where(valid, at // samples, 0)
        distance = gl.load(distances + at, mask=valid, other=0.0)
        x = gl.load(origins + ray * 3) + distance * gl.load(directions + ray * 3)
        y = gl.load(origins + ray * 3 + 1) + distance * gl.load(directions + ray * 3 + 1)
        z = gl.load(origins + ray * 3 + 2) + distance * gl.load(directions + ray * 3 + 2)
        e = encode_chunk(x, y, z, column, octaves).to(gl.bfloat16)
        if KEEP:
            tma.store_wait(0)
            gl.thread_barrier()
        act.index(GROUPS * 4 + group).store(e)
        fence_async_shared()
        if KEEP:
            _copy_out(act, GROUPS * 4 + group, 0, 1, row, buffer, chunk_rows)
        for index in range(steps - 2):
            state = _forward_any(
                table + index * TABLE, pipe, state, share, outputs, sizes, heads, row, group, 0,
                KEEP, GROUPS, STAGES, TURNS,
            )  # fmt: skip
        state = _forward_any(
            table + (steps - 2) * TABLE, pipe, state, share, outputs, sizes, heads, row, group, 1,
            KEEP, GROUPS, STAGES, TURNS,
        )  # fmt: skip
        state = _forward_any(
            table + (steps - 1) * TABLE, pipe, state, share, outputs, sizes, heads, row, group, 2,
            KEEP, GROUPS, STAGES, TURNS,
        )  # fmt: skip
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _shared_memory(CHUNKS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Allocate and initialise a pipe with `CHUNKS` chunks of activations."""
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, CHUNK, CHUNK], TILE_LAYOUT)
    act = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, CHUNK, CHUNK], TILE_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    for group in gl.static_range(GROUPS):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    return act, ring, full, empty, turns


@gluon.jit(do_not_specialize=["blocks", "n_rows", "samples", "steps", "density_at", "rgb_at",
                              "bias_at", "octaves"])  # fmt: skip
def forward_chain(
    origins, directions, distances, share, table, weights, vector, buffer, gates, density, rgb,
    blocks, n_rows, samples, chunk_rows, steps, density_at, rgb_at, bias_at, octaves,
    KEEP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """Evaluate the merged network; the arguments are those of `chain.forward_chain`, and besides.

    Args:
        weights: descriptor of the forward weight tiles, (tiles · 64, 64), blocks of 64 × 64.
        buffer: descriptor of the activation chunks, (chunks · chunk_rows, 64), likewise.
        gates: int32 (layers, chunk_rows, 8), written if KEEP: bit j of word c is set where
            channel 8·j + c of a layer is active.
        blocks: blocks of 64 · GROUPS rows.
        GROUPS: warp groups, 2 or 3.
        STAGES: slots of the ring.
        TURNS: whether groups take turns at the tensor cores, two chunks of inputs each.
        REGISTERS: registers a thread of a warp group gets.
    """
    pipe = _shared_memory(GROUPS * 5, GROUPS, STAGES)
    _, ring, full, empty, _ = pipe
    points = (origins, directions, distances)
    outputs = (density, rgb, gates, buffer)
    sizes = (n_rows, samples, chunk_rows)
    heads = (vector, density_at, rgb_at, bias_at)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_forward_group, (points, share, table, outputs, sizes, heads, pipe, blocks, steps,
                                  octaves, zero, KEEP, GROUPS, STAGES, TURNS)),
                (_forward_group, (points, share, table, outputs, sizes, heads, pipe, blocks, steps,
                                  octaves, one, KEEP, GROUPS, STAGES, TURNS)),
                (_producer, (weights, table, ring, full, empty, blocks, steps, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_forward_group, (points, share, table, outputs, sizes, heads, pipe, blocks, steps,
                                  octaves, zero, KEEP, GROUPS, STAGES, TURNS)),
                (_forward_group, (points, share, table, outputs, sizes, heads, pipe, blocks, steps,
                                  octaves, one, KEEP, GROUPS, STAGES, TURNS)),
                (_forward_group, (points, share, table, outputs, sizes, heads, pipe, blocks, steps,
                                  octaves, two, KEEP, GROUPS, STAGES, TURNS)),
                (_producer, (weights, table, ring, full, empty, blocks, steps, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 32],
        )  # fmt: skip


@gluon.jit
def _backward_step(
    step, pipe, state, gradients, vector, sizes, row, layer, group, N: gl.constexpr,
    FIRST: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The deltas of one layer of at most N channels from those of the layer above."""
    act, _, _, _, _ = pipe
    g_density, _, gates, _, buffer = gradients
    n_rows, _, chunk_rows = sizes
    layout: gl.constexpr = accumulator_layout(N, GROUPS)
    outputs = gl.load(step)
    words = _open_gates(gates, layer, row, chunk_rows, N, layout)
    zero = gl.zeros([CHUNK, N], gl.float32, layout)
    acc, state = _product(
        zero, pipe, state, gl.load(step + 2), group * 4, 0, 0, group, N, GROUPS, STAGES, TURNS
    )
    if FIRST:
        column = gl.arange(0, N, gl.SliceLayout(0, layout))
        at = row + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        g_sigma = gl.load(g_density + at, mask=at < n_rows, other=0.0)
        head = vector + gl.load(step + 5) * CHUNK + column
        head = gl.load(head, mask=column < outputs * CHUNK, other=0.0)
        acc += g_sigma[:, None] * head[None, :]
    delta = _gated(acc, words, N, layout).to(gl.bfloat16)
    _replace(act, delta, group, N, GROUPS, True)
    _copy_out(act, group * 4, gl.load(step + 6), outputs, row, buffer, chunk_rows)
    return state


@gluon.jit
def _view_deltas(
    pipe, gradients, vector, sizes, row, layer, view_chunks, view_delta, rgb_at, group,
    N: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """The deltas of the view layer, and those of the heads, from the gradients of the outputs."""
    act, _, _, _, _ = pipe
    g_density, g_rgb, gates, deltas, buffer = gradients
    n_rows, _, chunk_rows = sizes
    layout: gl.constexpr = accumulator_layout(N, GROUPS)
    column = gl.arange(0, N, gl.SliceLayout(0, layout))
    at = row + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    inside = at < n_rows
    width = view_chunks * CHUNK
    used = column < width
    head = vector + rgb_at * CHUNK + column
    words = _open_gates(gates, layer, row, chunk_rows, N, layout)
    total = gl.zeros([CHUNK, N], gl.float32, layout)
    for c in gl.static_range(3):
        g = gl.load(g_rgb + at * 3 + c, mask=inside, other=0.0)
        total += g[:, None] * gl.load(head + c * width, mask=used, other=0.0)[None, :]
    delta = _gated(total, words, N, layout).to(gl.bfloat16)
    _replace(act, delta, group, N, GROUPS, True)
    _copy_out(act, group * 4, view_delta, view_chunks, row, buffer, chunk_rows)
    columns: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [4, 1], [1, 0])
    at = row + gl.arange(0, CHUNK, gl.SliceLayout(1, columns))
    which = gl.arange(0, 4, gl.SliceLayout(0, columns))
    inside = at < n_rows
    sigma = gl.load(g_density + at, mask=inside, other=0.0)
    colour = g_rgb + (at * 3)[:, None] + (gl.maximum(which, 1) - 1)[None, :]
    colour = gl.load(colour, mask=inside[:, None], other=0.0)
    value = gl.where((which == 0)[None, :], sigma[:, None], colour)
    chunk = deltas + (view_delta + view_chunks).to(gl.int64) * chunk_rows * CHUNK
    gl.store(chunk + (at * CHUNK)[:, None] + which[None, :], value.to(gl.bfloat16))


@gluon.jit
def _backward_any(
    step, pipe, state, gradients, vector, sizes, row, layer, group, FIRST: gl.constexpr,
    GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One layer, at the smallest compiled width that holds it."""
    chunks = gl.load(step)
    if chunks > 2:
        state = _backward_step(
            step, pipe, state, gradients, vector, sizes, row, layer, group, 256, FIRST, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
    elif chunks == 2:
        state = _backward_step(
            step, pipe, state, gradients, vector, sizes, row, layer, group, 128, FIRST, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
    else:
        state = _backward_step(
            step, pipe, state, gradients, vector, sizes, row, layer, group, 64, FIRST, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
    return state


@gluon.jit
def _backward_group(
    gradients, table, vector, sizes, pipe, blocks, steps, view_chunks, view_delta, rgb_at,
    group: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of each block through all layers, backward."""
    _, _, chunk_rows = sizes
    FIRST: gl.constexpr = 1 if group == 0 else 0
    state = (gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(FIRST))
    for block in range(gl.program_id(0), blocks, gl.num_programs(0)):
        # Groups beyond the buffers repeat the last rows: they write what is already there.
        row = gl.minimum((block * GROUPS + group) * CHUNK, chunk_rows - CHUNK)
        if view_chunks == 2:
            _view_deltas(
                pipe, gradients, vector, sizes, row, steps, view_chunks, view_delta, rgb_at,
                group, 128, GROUPS,
            )  # fmt: skip
        else:
            _view_deltas(
                pipe, gradients, vector, sizes, row, steps, view_chunks, view_delta, rgb_at,
                group, 64, GROUPS,
            )  # fmt: skip
        state = _backward_any(
            table, pipe, state, gradients, vector, sizes, row, steps - 1, group, True, GROUPS,
            STAGES, TURNS,
        )  # fmt: skip
        for index in range(1, steps):
            state = _backward_any(
                table + index * TABLE, pipe, state, gradients, vector, sizes, row,
                steps - 1 - index, group, False, GROUPS, STAGES, TURNS,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["blocks", "n_rows", "steps", "view_chunks", "view_delta", "rgb_at"])
def backward_chain(
    g_density, g_rgb, table, weights, vector, gates, deltas, buffer, blocks, n_rows, chunk_rows,
    steps, view_chunks, view_delta, rgb_at, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Deltas of every layer; the arguments are those of `chain.backward_chain`, and besides.

    Args:
        weights: descriptor of the backward weight tiles, (tiles · 64, 64), blocks of 64 × 64.
        gates: what `forward_chain` wrote.
        deltas: delta chunks (columns 4 to 63 of the heads' chunk stay as they are: zero).
        buffer: descriptor of `deltas`, (chunks · chunk_rows, 64), blocks of 64 × 64.
        blocks: blocks of 64 · GROUPS rows.
        GROUPS: warp groups, 2 or 3.
        STAGES: slots of the ring.
        TURNS: whether groups take turns at the tensor cores, two chunks of inputs each.
        REGISTERS: registers a thread of a warp group gets.
    """
    pipe = _shared_memory(GROUPS * 4, GROUPS, STAGES)
    _, ring, full, empty, _ = pipe
    gradients = (g_density, g_rgb, gates, deltas, buffer)
    sizes = (n_rows, n_rows, chunk_rows)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    two: gl.constexpr = 2
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_backward_group, (gradients, table, vector, sizes, pipe, blocks, steps,
                                   view_chunks, view_delta, rgb_at, zero, GROUPS, STAGES, TURNS)),
                (_backward_group, (gradients, table, vector, sizes, pipe, blocks, steps,
                                   view_chunks, view_delta, rgb_at, one, GROUPS, STAGES, TURNS)),
                (_producer, (weights, table, ring, full, empty, blocks, steps, STAGES)),
            ],
            [4, 1],
            [REGISTERS, 40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_backward_group, (gradients, table, vector, sizes, pipe, blocks, steps,
                                   view_chunks, view_delta, rgb_at, zero, GROUPS, STAGES, TURNS)),
                (_backward_group, (gradients, table, vector, sizes, pipe, blocks, steps,
                                   view_chunks, view_delta, rgb_at, one, GROUPS, STAGES, TURNS)),
                (_backward_group, (gradients, table, vector, sizes, pipe, blocks, steps,
                                   view_chunks, view_delta, rgb_at, two, GROUPS, STAGES, TURNS)),
                (_producer, (weights, table, ring, full, empty, blocks, steps, STAGES)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 32],
        )  # fmt: skip


# What launches them.


def _tiles(tensor: Tensor) -> TensorDescriptor:
    """Descriptor of a tensor of chunks or tiles, in blocks of 64 × 64."""
    rows = tensor.numel() // CHUNK_SIZE
    shape, block = [rows, CHUNK_SIZE], [CHUNK_SIZE, CHUNK_SIZE]
    layout = gl.NVMMASharedLayout(128, 16, rank=2)
    return TensorDescriptor(tensor, shape, [CHUNK_SIZE, 1], block, layout)


def _registers(groups: int) -> tuple[int, int]:
    """Registers a thread: in a warp group, and at launch."""
    return (232, 168) if groups == 2 else (160, 128)


def evaluate(
    packed: "PackedField",
    origins: Tensor,
    directions: Tensor,
    distances: Tensor,
    share: Tensor,
    density: Tensor,
    rgb: Tensor,
) -> None:
    """Evaluate without keeping activations; writes `density` and `rgb`."""
    plan, launch = packed.plan, packed.launch
    rows = distances.numel()
    blocks = triton.cdiv(rows, launch.groups * CHUNK_SIZE)
    tiles = _tiles(packed.tiles)
    group, start = _registers(launch.groups)
    forward_chain[(min(blocks, packed.programs),)](
        origins, directions, distances, share, packed.table, tiles, packed.vector,
        tiles, packed.table, density, rgb, blocks, rows, distances.shape[1], 0,
        len(plan.forward), plan.density_at, plan.rgb_at, plan.heads_bias_at,
        plan.shape.point_octaves, False, launch.groups, launch.stages, launch.turns, group,
        num_warps=4, maxnreg=start,
    )  # fmt: skip


class Buffers:
    """What the Hopper kernels need of a `FusedField` besides its tensors.

    Attributes:
        gates: activity of every channel, one bit each, int32 (layers + 1, rows, 8).
    """

    def __init__(self, field: "FusedField") -> None:
        plan = field.plan
        self.gates = torch.zeros(
            len(plan.forward), field.padded, 8, dtype=torch.int32, device=field.tiles.device
        )
        self.tiles = _tiles(field.tiles)
        self.backward_tiles = _tiles(field.backward_tiles)
        self.activations = _tiles(field.activations)
        self.deltas = _tiles(field.deltas)


def forward(field: "FusedField", origins: Tensor, directions: Tensor, distances: Tensor) -> None:
    """Evaluate and keep activations; writes `density` and `rgb` of the field."""
    plan, launch, buffers = field.plan, field.launch, field.hopper
    blocks = triton.cdiv(field.padded, launch.groups * CHUNK_SIZE)
    group, start = _registers(launch.groups)
    forward_chain[(min(blocks, field.programs),)](
        origins, directions, distances, field.share, field.table, buffers.tiles, field.vector,
        buffers.activations, buffers.gates, field.density, field.rgb, blocks, field.rows,
        field.samples, field.padded, len(plan.forward), plan.density_at, plan.rgb_at,
        plan.heads_bias_at, plan.shape.point_octaves, True, launch.groups, launch.stages,
        launch.turns, group, num_warps=4, maxnreg=start,
    )  # fmt: skip


def backward(field: "FusedField", g_density: Tensor, g_rgb: Tensor) -> None:
    """Deltas of every layer; writes `deltas` of the field."""
    plan, launch, buffers = field.plan, field.launch, field.hopper
    groups = launch.backward_groups
    blocks = triton.cdiv(field.padded, groups * CHUNK_SIZE)
    group, start = _registers(groups)
    backward_chain[(min(blocks, field.programs),)](
        g_density, g_rgb, field.backward_table, buffers.backward_tiles, field.vector,
        buffers.gates, field.deltas, buffers.deltas, blocks, field.rows, field.padded,
        len(plan.backward), plan.forward[-1].outputs, plan.delta_of["view"], plan.rgb_at,
        groups, launch.backward_stages, launch.turns, group, num_warps=4, maxnreg=start,
    )  # fmt: skip
