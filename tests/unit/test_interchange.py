"""Checkpoints of nerf-pytorch: read as it writes them, written as it reads them, or refused."""

import pickle
import random
from dataclasses import replace

import pytest
import torch

from nerf.checkpoints import load_model
from nerf.errors import CheckpointError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.interchange import export_tar, import_tar
from tests.nerf_reference import NaiveNerf

SAMPLES = SampleCounts(8, 8)
SMALL = {"depth": 6, "width": 12, "point_octaves": 3, "direction_octaves": 2}
SHAPE = FieldShape((12,) * 6, 4, 12, 6, 3, 2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "200000.tar"


def naive_pair(seed=0, **options):
    torch.manual_seed(seed)
    return NaiveNerf(**options), NaiveNerf(**options)


def adam_of(*networks):
    return torch.optim.Adam(
        [p for network in networks for p in network.parameters()], lr=5e-4, betas=(0.9, 0.999)
    )


def save_as_nerf_pytorch(path, coarse, fine, step=200_000):
    """What its training loop does, after a step of its optimiser."""
    optimizer = adam_of(coarse, fine)
    for network in (coarse, fine):
        network(torch.ones(1, 3), torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "global_step": step,
            "network_fn_state_dict": coarse.state_dict(),
            "network_fine_state_dict": fine.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
        },
        path,
    )


def states(**options):
    coarse, fine = naive_pair(**options)
    return {
        "network_fn_state_dict": coarse.state_dict(),
        "network_fine_state_dict": fine.state_dict(),
    }


def refused(path, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        import_tar(path, SAMPLES)
    assert str(path) in str(caught.value)


def some_input():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(5, 4, 3, generator=generator)
    directions = torch.randn(5, 3, generator=generator)
    return points, directions / directions.norm(dim=-1, keepdim=True)


def assert_same_numbers(naive, field):
    points, directions = some_input()
    with torch.no_grad():
        expected = naive(points, directions[:, None].expand_as(points))
        density, rgb = field(points, directions)
    torch.testing.assert_close(density, expected[..., 3], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rgb, expected[..., :3], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, SMALL, {**SMALL, "depth": 3}, {**SMALL, "skip": 1}])
def test_an_imported_model_gives_the_original_numbers(path, options):
    coarse, fine = naive_pair(**options)
    save_as_nerf_pytorch(path, coarse, fine)
    model, info = load_model(path, SAMPLES)
    assert_same_numbers(coarse, model.coarse)
    assert_same_numbers(fine, model.fine)
    assert info == {"source": "nerf-pytorch", "iterations": 200_000}
    assert model.samples == SAMPLES
    assert load_model(path)[0].samples == SampleCounts(64, 64)
    if not options:
        assert model.coarse.shape == model.fine.shape == FieldShape()
        assert model.parameters() == 2 * 595_844


def test_without_a_fine_network_the_coarse_one_takes_its_place(path):
    content = states(**SMALL)
    for absent in ({}, {"network_fine_state_dict": None}):
        torch.save({"network_fn_state_dict": content["network_fn_state_dict"], **absent}, path)
        model, info = import_tar(path, SAMPLES)
        points, directions = some_input()
        assert torch.equal(model.coarse(points, directions)[1], model.fine(points, directions)[1])
        assert model.coarse is not model.fine
        assert info["iterations"] == 0


def test_half_precision_weights_are_read_as_float32(path):
    content = states(**SMALL)
    halved = {key: {name: t.half() for name, t in state.items()} for key, state in content.items()}
    torch.save(halved, path)
    model, _ = import_tar(path, SAMPLES)
    assert model.coarse.rgb.weight.dtype == torch.float32


@pytest.mark.parametrize("shape", [FieldShape(), SHAPE, replace(SHAPE, trunk=(12,) * 3, skip=None)])
def test_export_and_import_round_trip(path, shape):
    model = NerfModel.create(shape, SAMPLES, 0)
    export_tar(path, model, 1234)
    loaded, info = import_tar(path, SAMPLES)
    assert info["iterations"] == 1234
    for a, b in zip(model.networks().values(), loaded.networks().values(), strict=True):
        assert a.shape == b.shape
        assert all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nerf_pytorch_can_go_on_from_an_export(path):
    """As its create_nerf does: global step, optimiser state, then both networks, strictly."""
    model = NerfModel.create(FieldShape(), SAMPLES, 0)
    export_tar(path, model, 77)
    content = torch.load(path, weights_only=True)
    coarse, fine = naive_pair(1)
    optimizer = adam_of(coarse, fine)
    assert content["global_step"] == 77
    optimizer.load_state_dict(content["optimizer_state_dict"])
    coarse.load_state_dict(content["network_fn_state_dict"])
    fine.load_state_dict(content["network_fine_state_dict"])
    assert_same_numbers(coarse, model.coarse)
    assert_same_numbers(fine, model.fine)
    fine(*(torch.ones(1, 3),) * 2).sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"trunk": (12, 12, 12, 12, 12, 11)}, r"12, 11\).*one width W everywhere"),
        ({"feature": 11}, "11 feature"),
        ({"view": 7}, "7 view"),
        ({"skip": 2}, "again after layer 2; nerf-pytorch does so after layer 4"),
        ({"skip": None}, "after layer None; nerf-pytorch does so after layer 4"),
        ({"trunk": (12,) * 5, "skip": None}, "has 5 hidden layers"),
        ({"trunk": (12,) * 3, "skip": 1}, "not at all in those of up to 4"),
    ],
)
def test_shapes_that_nerf_pytorch_cannot_build_are_not_exported(path, change, said):
    shape = replace(SHAPE, **change)
    fine = NerfModel.create(shape, SAMPLES, 0).fine
    coarse = NerfModel.create(SHAPE, SAMPLES, 0).coarse
    with pytest.raises(CheckpointError, match=f"the fine network.*{said}.*export safetensors"):
        export_tar(path, NerfModel(coarse, fine, SAMPLES), 0)
    with pytest.raises(CheckpointError, match="the coarse network"):
        export_tar(path, NerfModel(fine, coarse, SAMPLES), 0)
    assert not path.exists()


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.tar"
    with pytest.raises(CheckpointError, match=f"cannot write {path}"):
        export_tar(path, NerfModel.create(SHAPE, SAMPLES, 0), 0)


# Files that are refused


class Malicious:
    """Its unpickling would create a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return (open, (str(self.victim), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(path, tmp_path, zipped):
    content = {**states(**SMALL), "payload": Malicious(tmp_path / "victim")}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, "was refused.*could run code")
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError):
        import_tar(path, SAMPLES)
    assert not (tmp_path / "victim").exists()


def test_truncated_files_are_refused(path):
    save_as_nerf_pytorch(path, *naive_pair(**SMALL))
    data = path.read_bytes()
    for length in (0, 1, 10, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"truncated|damaged") as caught:
            import_tar(path, SAMPLES)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:.*pickle protocol.*:UserWarning")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning")
def test_a_damaged_file_never_gives_another_error(path, zipped):
    content = states(**{**SMALL, "depth": 2, "width": 4})
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    bits = random.Random(0)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(data)
        damaged[bits.randrange(len(data))] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        try:
            import_tar(path, SAMPLES)
            outcomes.add("read")  # such a file has no checksum: a bit of a weight goes unnoticed
        except CheckpointError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_missing_files(tmp_path):
    for name in ("none.tar", "none.pt"):
        with pytest.raises(CheckpointError, match=f"no such checkpoint: {tmp_path / name}"):
            load_model(tmp_path / name)
    refused(tmp_path / "none.tar", "not a readable PyTorch checkpoint")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: {f"module.{n}": t for n, t in s.items()}, "has no pts_linears"),
        (lambda _: {"a": torch.zeros(2), "b": torch.ones(3, 3)}, "has no pts_linears"),
        (lambda _: {}, "has no pts_linears"),
        (lambda s: without(s, "alpha_linear.weight"), "alpha_linear.weight missing"),
        (lambda s: without(s, "pts_linears.2.bias"), "pts_linears.2.bias missing"),
        (lambda s: without(s, "feature_linear.weight"), "lacks a 2-D feature_linear.weight"),
        (lambda s: without(s, "views_linears.0.weight"), "use_viewdirs"),
        (lambda s: without(s, "pts_linears.3.weight"), "unknown pts_linears.3.bias"),
        (lambda s: {**s, "output_linear.weight": torch.zeros(4, 12)}, "unknown output_linear"),
        (lambda s: {**s, 5: torch.zeros(1)}, "unknown 5"),
        (lambda s: {**s, "rgb_linear.weight": torch.zeros(3, 7)}, r"rgb_linear.weight \(3, 7\)"),
        (lambda s: {**s, "rgb_linear.weight": torch.zeros(4, 6)}, r"instead of \(3, 6\)"),
        (lambda s: {**s, "rgb_linear.bias": 3.0}, "rgb_linear.bias missing"),
        (lambda s: {**s, "pts_linears.0.weight": torch.zeros(12)}, "lacks a 2-D pts_linears.0"),
        (lambda s: {**s, "pts_linears.0.weight": torch.zeros(0, 21)}, "lacks a 2-D pts_linears.0"),
        (lambda s: {**s, "pts_linears.0.weight": torch.zeros(12, 22)}, "22 point features are not"),
        (
            lambda s: {**s, "pts_linears.1.weight": torch.zeros(12, 13)},
            r"pts_linears.1.weight \(12",
        ),
        (lambda s: {**s, "pts_linears.1.weight": torch.zeros(12, 33)}, r"layers \[1, 5\]"),
        (lambda s: {**s, "views_linears.0.weight": torch.zeros(6, 26)}, "14 direction features"),
    ],
)
@pytest.mark.parametrize("network", ["network_fn_state_dict", "network_fine_state_dict"])
def test_other_shapes_and_names_are_refused(path, change, said, network):
    content = states(**SMALL)
    content[network] = change(content[network])
    torch.save(content, path)
    refused(path, f"{network}.*{said}")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {"a": torch.zeros(2)}}, "no network_fn_state_dict"),
        ({"network_fn_state_dict": 3}, "no network_fn_state_dict"),
        ([torch.zeros(2)], "no network_fn_state_dict"),
        (torch.zeros(2), "no network_fn_state_dict"),
        ({**states(**SMALL), "global_step": "many"}, "global_step must be a whole number"),
        ({**states(**SMALL), "global_step": None}, "global_step must be a whole number"),
    ],
)
def test_other_contents_are_refused(path, content, said):
    torch.save(content, path)
    refused(path, said)
