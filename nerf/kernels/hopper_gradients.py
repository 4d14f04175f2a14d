"""Weight gradients for Hopper GPUs (compute capability 9.0), in Gluon.

The work list is that of `nerf.kernels.gradients`. A multiprocessor runs two warp groups and a
producer warp. The producer brings 64 rows of up to two delta chunks and four activation chunks
into a slot of a ring; each group multiplies one delta chunk, transposed into registers, with all
the activation chunks, and adds its rows up for the bias gradients while the tensor cores work.

Bytes from L2 for 64 rows of a full block: 48 KiB for 2 · 64 · 128 · 256 operations. Over all blocks
of the original network and 196,608 rows that is 2.8 GB, 1.8 GB of them from device memory.
"""

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

if TYPE_CHECKING:
    from nerf.kernels.mlp import FusedField

CHUNK = gl.constexpr(64)
WORK = gl.constexpr(8)
OUT = gl.constexpr(128)
IN = gl.constexpr(256)
SLOT = gl.constexpr(128 * 257)
TILE_BYTES = gl.constexpr(64 * 64 * 2)
TILE_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))


@gluon.jit
def _producer(
    deltas, activations, items, first_item, ring_d, ring_h, full, empty, chunk_rows,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Stream rows of the delta and activation chunks of every item of this program."""
    slot = 0
    phase = 1
    pid = gl.program_id(0)
    for index in range(gl.load(first_item + pid), gl.load(first_item + pid + 1)):
        item = items + index * WORK
        delta = gl.load(item)
        n_deltas = gl.load(item + 1)
        source = gl.load(item + 2)
        sources = gl.load(item + 3)
        for row in range(gl.load(item + 4), gl.load(item + 5), CHUNK):
            mbarrier.wait(empty.index(slot), phase)
            for n in gl.static_range(2, 7):
                mbarrier.expect(full.index(slot), TILE_BYTES * n, pred=n_deltas + sources == n)
            for n in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    deltas,
                    [(delta + n) * chunk_rows + row, 0],
                    full.index(slot),
                    ring_d.index(slot * 2 + n),
                    pred=n < n_deltas,
                )
            for n in gl.static_range(4):
                tma.async_copy_global_to_shared(
                    activations,
                    [(source + n) * chunk_rows + row, 0],
                    full.index(slot),
                    ring_h.index(slot * 4 + n),
                    pred=n < sources,
                )
            slot += 1
            phase = gl.where(slot == STAGES, phase ^ 1, phase)
            slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def _sum_item(
    item, partials, ring_d, ring_h, full, empty, group, slot, phase, N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One item of work with at most N columns of activations."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    SPAN: gl.constexpr = 256 // N
    columns = ring_h._reinterpret(gl.bfloat16, [STAGES * SPAN, CHUNK, N], TILE_LAYOUT)
    acc = gl.zeros([CHUNK, N], gl.float32, layout)
    bias = gl.zeros([CHUNK], gl.float32, gl.SliceLayout(1, operand))
    for _ in range(gl.load(item + 4), gl.load(item + 5), CHUNK):
        mbarrier.wait(full.index(slot), phase)
        d = ring_d.index(slot * 2 + group).permute((1, 0)).load(operand)
        acc = warpgroup_mma(d, columns.index(slot * SPAN), acc, is_async=True)
        bias += gl.sum(d.to(gl.float32), 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        fence_async_shared()  # the deltas were read by ordinary loads
        mbarrier.arrive(empty.index(slot), count=1)
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    if group < gl.load(item + 1):
        base = partials + gl.load(item + 6).to(gl.int64) * SLOT
        out = group * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
        column = gl.arange(0, N, gl.SliceLayout(0, layout))
        gl.store(base + (out * IN)[:, None] + column[None, :], acc)
        out = group * CHUNK + gl.arange(0, CHUNK, gl.SliceLayout(1, operand))
        gl.store(base + OUT * IN + out, bias)
    return slot, phase


@gluon.jit
def _sum_group(
    items, first_item, partials, ring_d, ring_h, full, empty, group: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group: one of the two delta chunks of every item of this program."""
    slot = 0
    phase = 0
    pid = gl.program_id(0)
    for index in range(gl.load(first_item + pid), gl.load(first_item + pid + 1)):
        item = items + index * WORK
        sources = gl.load(item + 3)
        if sources > 2:
            slot, phase = _sum_item(
                item, partials, ring_d, ring_h, full, empty, group, slot, phase, 256, STAGES
            )
        elif sources == 2:
            slot, phase = _sum_item(
                item, partials, ring_d, ring_h, full, empty, group, slot, phase, 128, STAGES
            )
        else:
            slot, phase = _sum_item(
                item, partials, ring_d, ring_h, full, empty, group, slot, phase, 64, STAGES
            )


@gluon.jit
def _partial_gradients(
    deltas, activations, items, first_item, partials, chunk_rows, STAGES: gl.constexpr
):
    """Partial sums of the weight gradients, as `gradients.partial_gradients` leaves them.

    Args:
        deltas: descriptor of the delta chunks, (chunks · chunk_rows, 64), blocks of 64 × 64.
        activations: of the activation chunks, likewise.
        items: work items, (items, 8) int32, of `Plan.work`.
        first_item: first item of each program, (programs + 1,) int32.
        partials: (items, SLOT) fp32, written.
        chunk_rows: padded rows.
        STAGES: slots of the ring.
    """
    ring_d = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, CHUNK, CHUNK], TILE_LAYOUT)
    ring_h = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, CHUNK, CHUNK], TILE_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_sum_group, (items, first_item, partials, ring_d, ring_h, full, empty, zero, STAGES)),
            (_sum_group, (items, first_item, partials, ring_d, ring_h, full, empty, one, STAGES)),
            (_producer, (
                deltas, activations, items, first_item, ring_d, ring_h, full, empty, chunk_rows,
                STAGES,
            )),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


def partial_gradients(field: "FusedField") -> None:
    """Partial sums of the weight gradients of a `FusedField`; writes its `partials`."""
    _partial_gradients[(field.programs,)](
        field.hopper.deltas, field.hopper.activations, field.items, field.first_item,
        field.partials, field.padded, field.launch.gradient_stages, num_warps=4, maxnreg=168,
    )  # fmt: skip
