"""Where NeRF and pruning meet: fields as networks and back, and what a calibration sees."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.rendering import RenderSettings, render_rays
from nerf.training import RayPool
from orchestrator import bridge
from orchestrator.bridge import as_one, calibrate, field_of, from_one, network_of
from orchestrator.compress import prune_model
from orchestrator.stages import achieved_ratio, sizes
from pruning import prune
from pruning.surgery import mask, remove
from tests.tiny_scene import tiny_scene

SHAPE = FieldShape((9, 8, 7, 6), skip=1, feature=5, view=4, point_octaves=2, direction_octaves=1)
SAMPLES = SampleCounts(5, 4)


@pytest.fixture(scope="module")
def scene():
    return tiny_scene()  # 3 training views of 42 pixels


@pytest.fixture(scope="module")
def model():
    return NerfModel.create(SHAPE, SAMPLES, 0)


def outputs(field, rays=6, samples=3):
    generator = torch.Generator().manual_seed(0)
    like = field.rgb.weight
    points = torch.randn(rays, samples, 3, generator=generator).to(like)
    directions = torch.randn(rays, 3, generator=generator).to(like)
    with torch.no_grad():
        density, rgb = field(points, directions / directions.norm(dim=-1, keepdim=True))
    return torch.cat((density[..., None], rgb), dim=-1)


# Fields and networks


@pytest.mark.parametrize(
    "shape", [SHAPE, FieldShape(), FieldShape((3,), None, 2, 1), FieldShape((3, 4, 5), None, 2, 1)]
)
def test_a_field_survives_the_round_trip(shape):
    field = NerfModel.create(shape, SAMPLES, 1).fine
    network = network_of(field)
    assert network.parameters() == shape.parameters()
    assert network.graph.prunable() == tuple(f"trunk.{i}" for i in range(len(shape.trunk)))
    again = field_of(network, shape)
    assert again.shape == shape
    assert torch.equal(outputs(again), outputs(field))


def test_a_network_gives_the_same_numbers_as_its_field(model):
    """pruning computes layer by layer from the graph; the field splits its view layer."""
    from nerf.encoding import encode

    field = model.coarse
    generator = torch.Generator().manual_seed(0)
    points, directions = (torch.randn(7, 3, generator=generator) for _ in range(2))
    with torch.no_grad():
        density, rgb = field(points[:, None], directions)
    inputs = {"point": encode(points, 2), "direction": encode(directions, 1)}
    computed = {layer.name: a for layer, _, a in network_of(field).activations(inputs)}
    torch.testing.assert_close(computed["density"], density)
    torch.testing.assert_close(computed["rgb"], rgb[:, 0])


def test_a_network_shares_weights_and_a_new_field_does_not(model):
    network = network_of(model.coarse)
    assert network.weights["rgb"].data_ptr() == model.coarse.rgb.weight.data_ptr()
    again = field_of(network, SHAPE)
    assert again.rgb.weight.data_ptr() != model.coarse.rgb.weight.data_ptr()
    assert again.rgb.weight.requires_grad


@settings(max_examples=10)
@given(st.data())
def test_a_pruned_field_computes_what_the_masked_one_does(data):
    dense = NerfModel.create(SHAPE, SAMPLES, data.draw(st.integers(0, 9)))
    for field in dense.networks().values():
        keep = {}
        for i, width in enumerate(SHAPE.trunk):
            kept = data.draw(st.lists(st.booleans(), min_size=width, max_size=width))
            kept[data.draw(st.integers(0, width - 1))] = True
            keep[f"trunk.{i}"] = torch.tensor(kept)
        network = network_of(field.double())
        masked, small = field_of(mask(network, keep), SHAPE), field_of(remove(network, keep), SHAPE)
        assert small.shape.trunk == tuple(int(keep[f"trunk.{i}"].sum()) for i in range(4))
        assert (small.shape.skip, small.shape.feature, small.shape.view) == (1, 5, 4)
        torch.testing.assert_close(outputs(small), outputs(masked), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("ratio", [0.5, 0.999])
def test_both_networks_of_the_original_shape_pruned(ratio):
    dense = NerfModel.create(FieldShape(), SAMPLES, 0)
    small, pruned = prune_model(dense, "both", "magnitude", (ratio,) * 8, None, None)
    kept = 256 - int(ratio * 256)
    for name, field in small.networks().items():
        assert field.shape.trunk == (kept,) * 8
        masked = mask(network_of(dense.networks()[name]), pruned[name].keep)
        torch.testing.assert_close(
            outputs(field), outputs(field_of(masked, FieldShape())), atol=1e-5, rtol=1e-4
        )
    assert achieved_ratio(pruned) == pytest.approx(int(ratio * 256) / 256)


def test_a_scope_prunes_only_its_network_and_never_the_dense_model(model):
    before = outputs(model.coarse), outputs(model.fine)
    small, pruned = prune_model(model, "coarse", "magnitude", (0.5,) * 4, None, None)
    assert small.fine is model.fine
    assert pruned.keys() == {"coarse"}
    assert small.coarse.shape.trunk == (5, 4, 4, 3)
    assert torch.equal(before[0], outputs(model.coarse))
    assert torch.equal(before[1], outputs(model.fine))


def test_random_pruning_takes_different_channels_of_the_two_networks():
    dense = NerfModel.create(FieldShape((64,) * 3, None, 8, 4), SAMPLES, 0)
    _, pruned = prune_model(dense, "both", "random", (0.5,) * 3, None, 3)
    assert not torch.equal(pruned["coarse"].keep["trunk.0"], pruned["fine"].keep["trunk.0"])


@pytest.mark.parametrize(
    ("ratio", "column"),
    [
        (0.0, "2.273"),
        (0.15, "1.995"),
        (0.30, "1.717"),
        (0.50, "1.336"),
        (0.65, "1.058"),
        (0.80, "0.780"),
        (0.95, "0.495"),
    ],
)
def test_the_report_s_size_column(ratio, column):
    dense = NerfModel.create(FieldShape(), SAMPLES, 0)
    small, pruned = prune_model(dense, "coarse", "magnitude", (ratio,) * 8, None, None)
    counted = sizes(small, pruned)
    assert f"{counted['nonzero_bytes_coarse'] / 2**20:.3f}" == column
    assert f"{counted['nonzero_bytes_fine'] / 2**20:.3f}" == "2.273"
    assert counted["nonzero_bytes"] == (
        counted["nonzero_bytes_coarse"] + counted["nonzero_bytes_fine"]
    )
    assert counted["params_coarse"] == sum(p.numel() for p in small.coarse.parameters())
    assert counted["params"] == counted["params_coarse"] + 595_844
    assert counted["flops_per_ray"] == small.flops_per_ray()


# Calibration


def collected(model, scene, views, rays, seed=0):
    return calibrate(model, scene, views, rays, seed, ("mean",))


def assert_close(one, other, tolerance=1e-9):
    for name in ("coarse", "fine"):
        assert one[name].rows == other[name].rows
        for layer, moments in one[name].sums.items():
            torch.testing.assert_close(
                moments["mean"], other[name].sums[layer]["mean"], atol=tolerance, rtol=tolerance
            )


def subset(nested, size):
    return {name: n.subset(size) for name, n in nested.items()}


def test_statistics_are_the_mean_activations_of_rendering_the_training_rays(model, scene):
    """All rays of all training views: what hooks on the layers see when these are rendered."""
    seen = {}

    def watch(name, index):
        def hook(module, inputs, output):
            seen[name, index] = output.detach().relu().double().flatten(0, -2)

        return hook

    hooks = [
        layer.register_forward_hook(watch(name, i))
        for name, field in model.networks().items()
        for i, layer in enumerate(field.trunk)
    ]
    try:
        bounds = RenderSettings(scene.near, scene.far, False)
        with torch.no_grad():
            render_rays(model, RayPool(scene, torch.device("cpu")).rays, bounds)
    finally:
        for hook in hooks:
            hook.remove()
    statistics = subset(collected(model, scene, [3], [42]), (3, 42))
    for name, samples in (("coarse", 5), ("fine", 9)):
        assert statistics[name].rows == 3 * 42 * samples
        for i in range(4):
            torch.testing.assert_close(
                statistics[name].average(f"trunk.{i}", "mean"),
                seen[name, i].mean(dim=0),
                atol=1e-5,
                rtol=1e-4,
            )


@pytest.mark.parametrize("size", [(1, 5), (2, 17), (3, 42)])
def test_a_smaller_set_of_a_larger_pass_is_the_pass_over_that_set_alone(model, scene, size):
    nested = collected(model, scene, [1, 2, 3], [5, 17, 42], seed=4)
    alone = collected(model, scene, [size[0]], [size[1]], seed=4)
    assert_close(subset(nested, size), subset(alone, size), 1e-6)
    assert nested["coarse"].subset(size).rows == size[0] * size[1] * 5


@pytest.mark.parametrize("chunk", [3, 1000])
def test_statistics_do_not_depend_on_the_chunk(model, scene, monkeypatch, chunk):
    expected = subset(collected(model, scene, [1, 3], [20]), (3, 20))
    monkeypatch.setattr(bridge, "CPU_RAYS", chunk)
    assert_close(subset(collected(model, scene, [1, 3], [20]), (3, 20)), expected, 1e-6)


def test_seeds_draw_other_rays_and_repeat(model, scene):
    first, again, other = (
        subset(collected(model, scene, [2], [10], seed), (2, 10)) for seed in (1, 1, 2)
    )
    assert_close(first, again, 0)
    means = [s["coarse"].average("trunk.0", "mean") for s in (first, other)]
    assert not torch.allclose(means[0], means[1])


def test_held_out_views_are_never_touched(model, scene):
    """Other held-out poses, and other photos everywhere, change nothing."""
    poses = scene.poses.copy()
    poses[list(scene.test)] *= 1000
    strange = replace(scene, poses=poses, images=np.zeros_like(scene.images))
    one, other = (subset(collected(model, s, [3], [42]), (3, 42)) for s in (scene, strange))
    assert_close(one, other, 0)


def test_calibration_disturbs_no_random_numbers_and_no_weights(model, scene):
    before, weights = torch.get_rng_state(), outputs(model.fine)
    collected(model, scene, [1], [5])
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights, outputs(model.fine))
    assert all(p.grad is None for p in model.fine.parameters())


def test_the_fine_network_is_calibrated_where_the_coarse_one_puts_its_samples(model, scene):
    """Another coarse network moves the fine samples, and with them the fine statistics alone."""
    torch.manual_seed(9)
    dense = Field(SHAPE)
    with torch.no_grad():
        dense.density.weight.mul_(50)
    other = NerfModel(dense, model.fine, SAMPLES)
    one, two = (subset(collected(m, scene, [3], [42]), (3, 42))["fine"] for m in (model, other))
    assert one.rows == two.rows
    assert not torch.allclose(one.average("trunk.3", "mean"), two.average("trunk.3", "mean"))


def test_statistics_travel_as_one_dictionary(model, scene):
    statistics = subset(collected(model, scene, [2], [7]), (2, 7))
    tensors = as_one(statistics)
    arrays = {name: t.numpy().copy() for name, t in tensors.items()}
    for array in arrays.values():
        array.flags.writeable = False
    for read in (from_one(tensors), from_one(arrays)):
        assert_close(read, statistics, 0)
        assert read["fine"].weight == statistics["fine"].weight


def test_activation_pruning_removes_the_channels_with_the_lowest_means(model, scene):
    statistics = subset(collected(model, scene, [3], [42]), (3, 42))
    for name, field in model.networks().items():
        pruned = prune(network_of(field), (0.4,) * 4, "activation", statistics[name])
        for layer, kept in pruned.keep.items():
            means = statistics[name].average(layer, "mean")
            assert int((~kept).sum()) == int(0.4 * len(means))
            assert float(means[~kept].max()) <= float(means[kept].min())
