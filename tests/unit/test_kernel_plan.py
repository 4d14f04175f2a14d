"""The layout of networks for the fused kernels (no Triton needed)."""

import itertools

import pytest
import torch

from nerf.field import Field, FieldShape
from nerf.kernels import hopper
from nerf.kernels.plan import (
    CHUNK,
    MAX_CHUNKS,
    SLOT,
    WORK,
    Plan,
    padded_rows,
    swizzled,
)

SHAPES = [
    FieldShape(),
    FieldShape(trunk=(243, 13, 1, 70, 256, 129, 33, 200), feature=100, view=77),
    FieldShape(trunk=(40,), skip=None, view=3, feature=2, point_octaves=3),
    FieldShape(trunk=(64, 64), skip=0, feature=8, view=256),
]


@pytest.fixture(params=SHAPES, ids=lambda s: f"{len(s.trunk)} layers")
def plan(request):
    return Plan(request.param)


def test_parameters_are_those_of_the_field(plan):
    field = Field(plan.shape)
    sizes = {name: tuple(p.shape) for name, p in field.named_parameters()}
    assert {name: size for name, (_, size) in plan.parameters.items()} == sizes
    assert plan.count == plan.shape.parameters()


def test_index_and_direct_packing_agree(plan):
    extended = torch.randn(plan.extended)
    extended[-1] = 0
    weights = plan.views(extended)
    for index, packed in (
        (plan.forward_index, plan.forward_tiles(weights)),
        (plan.backward_index, plan.backward_tiles(weights)),
        (plan.vector_index, plan.vector(weights)),
    ):
        assert torch.equal(extended[index.long()], packed.reshape(-1))


def test_every_merged_gradient_has_a_place_of_its_own(plan):
    index = plan.gradient_index
    found = plan.views(index[:, 0].contiguous())
    for name, block in found.items():
        computed = not name.startswith(("feature", "view.weight"))
        assert (block >= 0).all() == computed, name
    known = index[index[:, 0] >= 0]
    assert len(torch.unique(known, dim=0)) == len(known)
    assert known[:, 1].max() < SLOT


def test_gradient_places_match_a_direct_computation(plan):
    """Fill the slots with products of random deltas and activations and look the gradients up."""
    rows = 5
    deltas = torch.randn(plan.deltas, rows, CHUNK)
    activations = torch.randn(plan.activations, rows, CHUNK)
    slots = torch.zeros(len(plan.blocks), SLOT)
    width = MAX_CHUNKS * CHUNK
    for at, block in enumerate(plan.blocks):
        d = deltas[block.delta : block.delta + block.deltas].permute(1, 0, 2).reshape(rows, -1)
        h = activations[block.source : block.source + block.sources].permute(1, 0, 2)
        product = d.t() @ h.reshape(rows, -1)
        slots[at, : 2 * CHUNK * width].view(-1, width)[: len(product), : product.shape[1]] = product
        slots[at, 2 * CHUNK * width :][: len(product)] = d.sum(0)
    block, place = plan.gradient_index.long().unbind(1)
    views = plan.views(slots[block, place])

    def columns(chunks, first, width):
        return chunks[first : first + 4].permute(1, 0, 2).reshape(rows, -1)[:, :width]

    for index, width in enumerate(plan.shape.trunk):
        name = f"trunk.{index}"
        d = columns(deltas, plan.delta_of[name], width)
        parts = []
        if index == 0 or plan.shape.skip == index - 1:
            parts.append(columns(activations, 0, plan.shape.point_features))
        if index:
            above = f"trunk.{index - 1}"
            first = plan.activation_of[above]
            parts.append(columns(activations, first, plan.shape.trunk[index - 1]))
        torch.testing.assert_close(views[f"{name}.weight"], d.t() @ torch.cat(parts, 1))
        torch.testing.assert_close(views[f"{name}.bias"], d.sum(0))
    h = columns(activations, plan.activation_of[name], width)
    d = columns(deltas, plan.delta_of["view"], plan.shape.view)
    torch.testing.assert_close(views["mix.weight"], d.t() @ h)
    torch.testing.assert_close(views["view.bias"], d.sum(0))
    heads = deltas[plan.delta_of["heads"]]
    v = columns(activations, plan.activation_of["view"], plan.shape.view)
    torch.testing.assert_close(views["density.weight"], heads[:, :1].t() @ h)
    torch.testing.assert_close(views["rgb.weight"], heads[:, 1:4].t() @ v)
    torch.testing.assert_close(views["rgb.bias"], heads[:, 1:4].sum(0))


@pytest.mark.parametrize(("rows", "programs"), [(1, 132), (1000, 7), (131_072, 132)])
def test_work_covers_every_row_of_every_block_once_and_evenly(plan, rows, programs):
    rows = padded_rows(rows)
    items, first, slots = plan.work(rows, programs)
    assert items.shape[1] == WORK
    assert len(first) == programs + 1
    assert first[0] == 0
    assert first[-1] == len(items) == slots[-1]
    assert items[:, 6].tolist() == list(range(len(items)))
    for at, block in enumerate(plan.blocks):
        mine = items[slots[at] : slots[at + 1]].tolist()
        assert all(item[:4] == [block.delta, block.deltas, block.source, block.sources]
                   for item in mine)  # fmt: skip
        assert mine[0][4] == 0
        assert mine[-1][5] == rows
        assert all(a[5] == b[4] for a, b in itertools.pairwise(mine))
    cost = ((items[:, 5] - items[:, 4]) // CHUNK * (items[:, 1] + items[:, 3])).tolist()
    loads = [sum(cost[a:b]) for a, b in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)]
    assert max(loads) <= sum(cost) / programs + 12


def test_merged_flops():
    assert Plan(FieldShape()).flops() == 1_048_832
    assert Plan(FieldShape()).flops(padded=True) == 1_048_576  # 2^20: 128 tiles


def test_too_wide_a_layer_is_refused():
    with pytest.raises(ValueError, match="wider than 256"):
        Plan(FieldShape(trunk=(257,) * 8))


@pytest.mark.parametrize(("rows", "programs"), [(1, 132), (1000, 8), (131_072, 132)])
def test_work_in_pairs_keeps_both_programs_of_a_pair_in_step(plan, rows, programs):
    rows = padded_rows(rows)
    items, first, slots = plan.work_in_pairs(rows, programs)
    assert sorted(items[:, 6].tolist()) == list(range(int(slots[-1])))
    groups = (items[:, 5] - items[:, 4]) // CHUNK
    bounds = first.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(items)
    loads = []
    for pair in range(0, programs, 2):
        a, b = (slice(bounds[pair + i], bounds[pair + i + 1]) for i in (0, 1))
        assert torch.equal(groups[a], groups[b])
        assert torch.equal(items[a, 7], items[b, 7])
        together = items[a, 7] == 1
        assert torch.equal(items[a][together, 2:6], items[b][together, 2:6])
        loads.append(int((groups[a] * (items[a, 1] + items[a, 3])).sum()))
    assert max(loads) <= 1.02 * sum(loads) / len(loads) + 12
    by_slot = items[items[:, 6].argsort()]
    for at, block in enumerate(plan.blocks):
        mine = by_slot[slots[at] : slots[at + 1]].tolist()
        assert all(item[:4] == [block.delta, block.deltas, block.source, block.sources]
                   for item in mine)  # fmt: skip
        assert mine[0][4] == 0
        assert mine[-1][5] == rows
        assert all(a[5] == b[4] for a, b in itertools.pairwise(mine))


def test_swizzled_tiles_exchange_units_by_row():
    tile = torch.arange(64 * 64).view(1, 64, 64)
    found = swizzled(tile)[0].view(64, 8, 8)
    for row, unit in itertools.product(range(64), range(8)):
        start = row * 64 + (unit ^ (row % 8)) * 8
        assert found[row, unit].tolist() == list(range(start, start + 8))
    assert torch.equal(swizzled(swizzled(tile)), tile)


def test_shared_memory_of_the_hopper_kernels_fits():
    build = hopper.Build()
    assert build.render_bytes <= hopper.SHARED_LIMIT
    assert build.train_bytes <= hopper.SHARED_LIMIT
    assert build.gradient_bytes <= hopper.SHARED_LIMIT


def test_networks_that_the_hopper_kernels_cannot_run_are_told_why():
    assert hopper.unsupported(Plan(FieldShape())) is None
    deep = FieldShape(trunk=(256,) * 16, skip=None)
    assert "biases" in hopper.unsupported(Plan(deep))
    assert "feature" in hopper.unsupported(Plan(FieldShape(feature=300)))
