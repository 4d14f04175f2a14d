"""The network: the original's size, its numbers from the same weights, and any widths."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from tests.nerf_reference import NaiveNerf, slow_network, their_names


def some_input(rays=4, samples=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(rays, samples, 3, generator=generator, dtype=dtype)
    directions = torch.randn(rays, 3, generator=generator, dtype=dtype)
    return points, directions / directions.norm(dim=-1, keepdim=True)


def test_the_original_has_595844_parameters():
    shape = FieldShape()
    assert shape.parameters() == 595_844
    assert sum(p.numel() for p in Field(shape).parameters()) == 595_844
    prunable = [layer for layer in shape.layers() if layer.name.startswith("trunk.")]
    assert sum(layer.in_width * layer.out_width for layer in prunable) == 491_008


def test_flops_of_the_original():
    """Twice its weights: a multiply and an add each; 64 coarse samples a ray and 128 fine ones."""
    weights = 63 * 256 + 256 * 256 * 6 + 319 * 256 + 256 + 256 * 256 + 283 * 128 + 128 * 3
    assert FieldShape().flops() == 2 * weights
    model = NerfModel(Field(FieldShape()), Field(FieldShape()), SampleCounts(64, 64))
    assert model.flops_per_ray() == 2 * weights * (64 + 128)
    assert model.parameters() == 2 * 595_844


def test_it_gives_the_numbers_of_the_original_network():
    torch.manual_seed(0)
    naive, field = NaiveNerf().double(), Field(FieldShape()).double()
    theirs = their_names(field)
    naive.load_state_dict({name: torch.from_numpy(array) for name, array in theirs.items()})
    points, directions = some_input(dtype=torch.float64)
    density, rgb = field(points, directions)
    expected = naive(points, directions[:, None].expand_as(points))
    torch.testing.assert_close(density, expected[..., 3], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(rgb, expected[..., :3], atol=1e-12, rtol=1e-10)


def test_its_gradients_are_those_of_the_original_network():
    torch.manual_seed(0)
    naive = NaiveNerf(depth=6, width=16, point_octaves=2, direction_octaves=1).double()
    shape = FieldShape((16,) * 6, 4, 16, 8, point_octaves=2, direction_octaves=1)
    field = Field(shape).double()
    theirs = their_names(field)
    naive.load_state_dict({name: torch.from_numpy(array) for name, array in theirs.items()})
    points, directions = some_input(dtype=torch.float64)
    density, rgb = field(points, directions)
    (density.sin().sum() + rgb.square().sum()).backward()
    out = naive(points, directions[:, None].expand_as(points))
    (out[..., 3].sin().sum() + out[..., :3].square().sum()).backward()
    torch.testing.assert_close(field.view.weight.grad, naive.views_linears[0].weight.grad)
    torch.testing.assert_close(field.trunk[5].weight.grad, naive.pts_linears[5].weight.grad)
    torch.testing.assert_close(field.trunk[0].bias.grad, naive.pts_linears[0].bias.grad)
    # `feature` is computed as part of `view`.
    torch.testing.assert_close(field.feature.weight.grad, naive.feature_linear.weight.grad)
    torch.testing.assert_close(field.feature.bias.grad, naive.feature_linear.bias.grad)


@pytest.mark.parametrize(
    "shape",
    [
        FieldShape((13, 1, 243, 7, 255, 31, 2, 129), 4, 17, 3),
        FieldShape((5, 3), 0, 1, 1, 0, 0),
        FieldShape((9,), None, 4, 2, 2, 1),
        FieldShape((4, 6, 8), None, 5, 7, 1, 3),
        FieldShape((4, 6, 8), 1, 5, 7, 1, 3),
        FieldShape((6, 16), None, 2, 16, 1, 2),  # feature so narrow that it stays a layer
    ],
)
def test_any_widths_agree_with_the_slow_reference(shape):
    torch.manual_seed(1)
    field = Field(shape).double()
    points, directions = some_input(2, 2, torch.float64)
    with torch.no_grad():
        density, rgb = field(points, directions)
    for ray in range(2):
        for sample in range(2):
            expected = slow_network(
                their_names(field),
                points[ray, sample].tolist(),
                directions[ray].tolist(),
                skip=shape.skip,
                point_octaves=shape.point_octaves,
                direction_octaves=shape.direction_octaves,
            )
            assert float(density[ray, sample]) == pytest.approx(expected[0], abs=1e-9)
            assert rgb[ray, sample].tolist() == pytest.approx(expected[1], abs=1e-9)


@given(st.data())
def test_counts_follow_the_modules_for_any_shape(data):
    widths = st.integers(1, 9)
    trunk = tuple(data.draw(st.lists(widths, min_size=1, max_size=5)))
    skips = st.none() if len(trunk) == 1 else st.none() | st.integers(0, len(trunk) - 2)
    shape = FieldShape(
        trunk,
        data.draw(skips),
        data.draw(widths),
        data.draw(widths),
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(0, 3)),
    )
    field = Field(shape)
    modules = dict(field.named_modules())
    assert shape.parameters() == sum(p.numel() for p in field.parameters())
    assert shape.flops() == sum(2 * p.numel() for p in field.parameters() if p.ndim == 2)
    for layer in shape.layers():
        assert modules[layer.name].weight.shape == (layer.out_width, layer.in_width)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"trunk": ()}, "at least one channel"),
        ({"trunk": (4, 0, 4), "skip": None}, "at least one channel"),
        ({"view": 0}, "at least one channel"),
        ({"skip": 7}, "skip must name a hidden layer before the last"),
        ({"skip": -1}, "got -1"),
    ],
)
def test_shapes_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        FieldShape(**wrong)


@pytest.mark.parametrize(("coarse", "fine"), [(1, 64), (64, 0), (-1, 1)])
def test_too_few_samples_are_refused(coarse, fine):
    with pytest.raises(ValueError, match="at least 2 coarse samples"):
        SampleCounts(coarse, fine)


def test_a_seed_gives_the_same_two_different_networks_and_leaves_the_global_generator():
    shape = FieldShape((8, 8), None, 8, 4, 1, 1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again = (NerfModel.create(shape, SampleCounts(), 3) for _ in range(2))
    other = NerfModel.create(shape, SampleCounts(), 4)
    assert torch.equal(before, torch.get_rng_state())
    weights = [m.rgb.weight for m in (first.coarse, again.coarse, other.coarse, first.fine)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert first.device == torch.device("cpu")
    assert list(first.networks()) == ["coarse", "fine"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_on_another_device_is_the_same_model_and_leaves_the_first(shared):
    shape = FieldShape(trunk=(7, 5, 11), skip=0, feature=3, view=2)
    model = NerfModel.create(shape, SampleCounts(4, 4), 3)
    if shared:
        model.coarse = model.fine
    copy = model.copied_to("cpu")
    assert copy.shared == shared
    for name, original in model.stored().items():
        weights = dict(copy.networks()[name].named_parameters())
        for which, weight in original.named_parameters():
            assert torch.equal(weights[which], weight)
            assert weights[which].is_contiguous()
            assert weights[which].requires_grad == weight.requires_grad
            assert weights[which].data_ptr() % 64 == 0
            weights[which].data.zero_()
            assert weight.abs().sum() > 0  # another memory
    away = model.copied_to("meta")
    assert {w.device.type for w in away.fine.parameters()} == {"meta"}
    assert model.device.type == "cpu"
