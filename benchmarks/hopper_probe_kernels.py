"""The small Gluon kernels of `hopper_probe.py`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nerf.kernels import hopper_chain, hopper_gradients
from nerf.kernels.hopper_chain import (
    CHUNK,
    TILE_BYTES,
    TILE_LAYOUT,
    _forward_group,
    _producer,
    _shared_memory,
)

# As they are, before anything replaces them.
forward_chain = hopper_chain.forward_chain
backward_chain = hopper_chain.backward_chain
partial_gradients = hopper_gradients._partial_gradients

STAGES = gl.constexpr(4)
ROWS_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def barrier(trace):
    """Arrive at a barrier and wait for it, twice (phases 0 and 1)."""
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=1)
    fence_async_shared()
    mbarrier.arrive(bar.index(0), count=1)
    mbarrier.wait(bar.index(0), 0)
    gl.store(trace, 1)
    mbarrier.arrive(bar.index(0), count=1)
    mbarrier.wait(bar.index(0), 1)
    gl.store(trace + 1, 2)


@gluon.jit
def _mark(trace, at: gl.constexpr):
    gl.store(trace + at, at + 1)


@gluon.jit
def specialized_1(trace):
    """A warp group and a single warp, which do nothing."""
    a: gl.constexpr = 0
    b: gl.constexpr = 1
    gl.warp_specialize([(_mark, (trace, a)), (_mark, (trace, b))], [1], [40])


@gluon.jit
def specialized_2(trace):
    """Two warp groups and a single warp."""
    a: gl.constexpr = 0
    b: gl.constexpr = 1
    c: gl.constexpr = 2
    gl.warp_specialize(
        [(_mark, (trace, a)), (_mark, (trace, b)), (_mark, (trace, c))], [4, 1], [232, 40]
    )


@gluon.jit
def specialized_3(trace):
    """Three warp groups and a single warp."""
    a: gl.constexpr = 0
    b: gl.constexpr = 1
    c: gl.constexpr = 2
    d: gl.constexpr = 3
    gl.warp_specialize(
        [(_mark, (trace, a)), (_mark, (trace, b)), (_mark, (trace, c)), (_mark, (trace, d))],
        [4, 4, 1],
        [160, 160, 32],
    )


@gluon.jit
def _player(trace, full, empty, rounds, at: gl.constexpr):
    for i in range(rounds):
        mbarrier.wait(full.index(0), i & 1)
        mbarrier.arrive(empty.index(0), count=1)
        gl.store(trace + at, i + 1)


@gluon.jit
def _server(trace, full, empty, rounds, at: gl.constexpr):
    for i in range(rounds):
        mbarrier.wait(empty.index(0), (i & 1) ^ 1)
        mbarrier.arrive(full.index(0), count=1)
        gl.store(trace + at, i + 1)


@gluon.jit(do_not_specialize=["rounds"])
def rally(trace, rounds):
    """Two groups and a producer warp pass a slot to and fro, nothing in it."""
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(empty.index(0), count=2)
    fence_async_shared()
    a: gl.constexpr = 0
    b: gl.constexpr = 1
    c: gl.constexpr = 2
    gl.warp_specialize(
        [
            (_player, (trace, full, empty, rounds, a)),
            (_player, (trace, full, empty, rounds, b)),
            (_server, (trace, full, empty, rounds, c)),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit
def _offsets():
    row = gl.arange(0, 64, gl.SliceLayout(1, ROWS_LAYOUT))
    column = gl.arange(0, 64, gl.SliceLayout(0, ROWS_LAYOUT))
    return (row * 64)[:, None] + column[None, :]


@gluon.jit
def load(tiles, out, trace):
    """Load the second tile with the copy engine and write it out by ordinary stores."""
    tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], TILE_LAYOUT)
    bar = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bar.index(0), count=1)
    fence_async_shared()
    gl.store(trace, 1)
    mbarrier.expect(bar.index(0), TILE_BYTES)
    tma.async_copy_global_to_shared(tiles, [CHUNK, 0], bar.index(0), tile)
    gl.store(trace + 1, 1)
    mbarrier.wait(bar.index(0), 0)
    gl.store(trace + 2, 1)
    gl.store(out + _offsets(), tile.load(ROWS_LAYOUT))


@gluon.jit
def store(tiles, trace):
    """Write ones to the second tile with the copy engine."""
    tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], TILE_LAYOUT)
    tile.store(gl.full([64, 64], 1.0, gl.bfloat16, ROWS_LAYOUT))
    fence_async_shared()
    gl.store(trace, 1)
    tma.async_copy_shared_to_global(tiles, [CHUNK, 0], tile)
    tma.store_wait(0)
    gl.store(trace + 1, 1)


@gluon.jit
def _fill(tiles, ring, full, empty, trace, steps, at: gl.constexpr):
    slot = 0
    phase = 1
    for i in range(steps):
        mbarrier.wait(empty.index(slot), phase)
        mbarrier.expect(full.index(slot), TILE_BYTES * 4)
        for n in gl.static_range(4):
            tma.async_copy_global_to_shared(
                tiles, [(i * 4 + n) * CHUNK, 0], full.index(slot), ring.index(slot * 4 + n)
            )
        gl.store(trace + at, i + 1)
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)


@gluon.jit
def _drain(ring, full, empty, ones, out, trace, steps, group: gl.constexpr, PRODUCT: gl.constexpr):
    slot = 0
    phase = 0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    tiles = ring._reinterpret(gl.bfloat16, [STAGES, 256, CHUNK], TILE_LAYOUT)
    acc = gl.zeros([64, 256], gl.float32, layout)
    for i in range(steps):
        mbarrier.wait(full.index(slot), phase)
        if PRODUCT:
            acc = warpgroup_mma(ones, tiles.index(slot).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(slot), count=1)
        gl.store(trace + group, i + 1)
        slot += 1
        phase = gl.where(slot == STAGES, phase ^ 1, phase)
        slot = gl.where(slot == STAGES, 0, slot)
    if PRODUCT:
        row = group * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
        column = gl.arange(0, 256, gl.SliceLayout(0, layout))
        gl.store(out + (row * 256)[:, None] + column[None, :], acc)


@gluon.jit
def _ring(GROUPS: gl.constexpr):
    ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 4, CHUNK, CHUNK], TILE_LAYOUT)
    ones = gl.allocate_shared_memory(gl.bfloat16, [CHUNK, CHUNK], TILE_LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    ones.store(gl.full([64, 64], 1.0, gl.bfloat16, ROWS_LAYOUT))
    fence_async_shared()
    return ring, ones, full, empty


@gluon.jit(do_not_specialize=["steps"])
def ring_1(tiles, out, trace, steps, PRODUCT: gl.constexpr):
    """A producer warp fills a ring of four slots of four tiles; one group empties it."""
    ring, ones, full, empty = _ring(1)
    a: gl.constexpr = 0
    b: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_drain, (ring, full, empty, ones, out, trace, steps, a, PRODUCT)),
            (_fill, (tiles, ring, full, empty, trace, steps, b)),
        ],
        [1],
        [40],
    )


@gluon.jit(do_not_specialize=["steps"])
def ring_2(tiles, out, trace, steps, PRODUCT: gl.constexpr):
    """As `ring_1`; two groups read every slot."""
    ring, ones, full, empty = _ring(2)
    a: gl.constexpr = 0
    b: gl.constexpr = 1
    c: gl.constexpr = 2
    gl.warp_specialize(
        [
            (_drain, (ring, full, empty, ones, out, trace, steps, a, PRODUCT)),
            (_drain, (ring, full, empty, ones, out, trace, steps, b, PRODUCT)),
            (_fill, (tiles, ring, full, empty, trace, steps, c)),
        ],
        [4, 1],
        [232, 40],
    )


@gluon.jit(do_not_specialize=["blocks", "n_rows", "samples", "steps", "density_at", "rgb_at",
                              "bias_at", "octaves"])  # fmt: skip
def forward_one_group(
    origins, directions, distances, share, table, weights, vector, buffer, gates, density, rgb,
    blocks, n_rows, samples, chunk_rows, steps, density_at, rgb_at, bias_at, octaves,
    KEEP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    REGISTERS: gl.constexpr,  # noqa: ARG001  (the arguments are those of `forward_chain`)
):  # fmt: skip
    """`hopper_chain.forward_chain` with a single group."""
    pipe = _shared_memory(GROUPS * 5, GROUPS, STAGES)
    _, ring, full, empty, _ = pipe
    points = (origins, directions, distances)
    outputs = (density, rgb, gates, buffer)
    sizes = (n_rows, samples, chunk_rows)
    heads = (vector, density_at, rgb_at, bias_at)
    zero: gl.constexpr = 0
    gl.warp_specialize(
        [
            (_forward_group, (points, share, table, outputs, sizes, heads, pipe, blocks, steps,
                              octaves, zero, KEEP, GROUPS, STAGES, TURNS)),
            (_producer, (weights, table, ring, full, empty, blocks, steps, STAGES)),
        ],
        [1],
        [40],
    )  # fmt: skip
