"""Weight gradients of all layers in one kernel, and their reduction, in plain Triton.

A weight gradient is (deltas)ᵀ × (activations) summed over rows, a product with a small result
and a very long sum. The blocks of all layers are cut into pieces of equal cost, one list a program
(`Plan.work`), so that no multiprocessor waits for another; each piece leaves its partial sum in a
slot of its own and a second kernel adds the slots of a block in a fixed order. No atomics: the same
inputs give the same gradients, bit for bit.

Bias gradients are one more product, deltasᵀ × 1, of the tiles that are in shared memory anyway. A
sum over registers (`tl.sum`) in the loop would be a reduction across warps at every step, and the
compiler would give the deltas one buffer fewer than a product that is still running needs.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
WORK = tl.constexpr(8)
OUT = tl.constexpr(128)  # rows of a block: 2 chunks of outputs
IN = tl.constexpr(256)  # columns of a block: 4 chunks of inputs
SLOT = tl.constexpr(128 * 257)
BIAS = tl.constexpr(16)  # columns of ones, the fewest that a product takes


@triton.jit
def _partial(
    deltas, activations, slot, delta, n_deltas, source, sources, begin, end, chunk_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    out = tl.arange(0, OUT)
    column = tl.arange(0, WIDTH)
    row = tl.arange(0, ROWS)
    delta_at = (delta + out // CHUNK).to(tl.int64) * chunk_rows * CHUNK + out % CHUNK
    source_at = (source + column // CHUNK).to(tl.int64) * chunk_rows * CHUNK + column % CHUNK
    total = tl.zeros((OUT, WIDTH), tl.float32)
    bias = tl.zeros((OUT, BIAS), tl.float32)
    ones = tl.full((ROWS, BIAS), 1.0, tl.float32).to(deltas.dtype.element_ty)
    for first in range(begin, end, ROWS):
        rows = (first + row).to(tl.int64) * CHUNK
        d = tl.load(
            deltas + delta_at[None, :] + rows[:, None],
            mask=(out // CHUNK < n_deltas)[None, :],
            other=0.0,
        )
        h = tl.load(
            activations + source_at[None, :] + rows[:, None],
            mask=(column // CHUNK < sources)[None, :],
            other=0.0,
        )
        turned = tl.trans(d)
        total = tl.dot(turned, h, total, input_precision="ieee")
        bias = tl.dot(turned, ones, bias, input_precision="ieee")
    tl.store(slot + out[:, None] * IN + column[None, :], total)
    tl.store(slot + OUT * IN + out, tl.max(bias, 1))  # all its columns are the same


@triton.jit
def partial_gradients(
    deltas,
    activations,
    items,
    first_item,
    partials,
    chunk_rows,
    ROWS: tl.constexpr,
):
    """Partial sums of the weight gradients.

    Args:
        deltas: delta chunks, bf16, (chunks, chunk_rows, 64).
        activations: activation chunks, bf16, likewise.
        items: work items, (items, 8) int32, of `Plan.work`.
        first_item: first item of each program, (programs + 1,) int32.
        partials: (items, SLOT) fp32, written.
        chunk_rows: padded rows.
        ROWS: rows a step of the sum takes; 64 divides every item.
    """
    pid = tl.program_id(0)
    for index in range(tl.load(first_item + pid), tl.load(first_item + pid + 1)):
        item = items + index * WORK
        delta = tl.load(item)
        n_deltas = tl.load(item + 1)
        source = tl.load(item + 2)
        sources = tl.load(item + 3)
        begin = tl.load(item + 4)
        end = tl.load(item + 5)
        slot = partials + tl.load(item + 6).to(tl.int64) * SLOT
        if sources == 1:
            _partial(
                deltas, activations, slot, delta, n_deltas, source, sources, begin, end,
                chunk_rows, 64, ROWS,
            )  # fmt: skip
        elif sources == 2:
            _partial(
                deltas, activations, slot, delta, n_deltas, source, sources, begin, end,
                chunk_rows, 128, ROWS,
            )  # fmt: skip
        else:
            _partial(
                deltas, activations, slot, delta, n_deltas, source, sources, begin, end,
                chunk_rows, 256, ROWS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def reduce_gradients(partials, index, first_slot, gradients, count, BLOCK: tl.constexpr):
    """Add the slots of each block: gradients[i] = Σ partials[slot, place(i)].

    Args:
        partials: (items, SLOT) fp32.
        index: (count, 2) int32, block (or −1) and place of each gradient.
        first_slot: first slot of each block, (blocks + 1,) int32.
        gradients: (count,) fp32, written where the block is not −1.
        count: gradients.
        BLOCK: gradients a program adds.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    block = tl.load(index + 2 * i, mask=inside, other=-1)
    place = tl.load(index + 2 * i + 1, mask=inside, other=0)
    known = block >= 0
    slot = tl.load(first_slot + block, mask=known, other=0)
    slots = tl.load(first_slot + block + 1, mask=known, other=0) - slot
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(tl.max(slots, 0)):
        total += tl.load(
            partials + (slot + k).to(tl.int64) * SLOT + place, mask=k < slots, other=0.0
        )
    tl.store(gradients + i, total, mask=known)


@triton.jit(do_not_specialize=["count"])
def gather(source, index, target, count, BLOCK: tl.constexpr):
    """target[i] = source[index[i]], cast to the target's type: weights into tiles.

    Args:
        source: the extended vector, fp32.
        index: (count,) int32.
        target: (count,), written.
        count: elements.
        BLOCK: elements a program copies.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    value = tl.load(source + tl.load(index + i, mask=inside, other=0), mask=inside, other=0.0)
    tl.store(target + i, value.to(target.dtype.element_ty), mask=inside)
