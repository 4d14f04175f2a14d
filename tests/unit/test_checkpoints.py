"""Model files: what goes in comes out, and what is damaged is refused by name."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from nerf import files
from nerf.checkpoints import load_model, save_model
from nerf.errors import CheckpointError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.files import read_tensors, write_tensors

SHAPE = FieldShape((3, 1, 4), skip=0, feature=2, view=3, point_octaves=1, direction_octaves=0)


def a_model(seed=0):
    """Coarse and fine of different shapes, as after pruning."""
    coarse = NerfModel.create(SHAPE, SampleCounts(), seed).coarse
    smaller = FieldShape((2, 1, 1), skip=1, feature=2, view=1, point_octaves=2, direction_octaves=1)
    return NerfModel(coarse, NerfModel.create(smaller, SampleCounts(), seed).fine, SampleCounts(7))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def assert_same(one, other):
    assert one.samples == other.samples
    for a, b in zip(one.networks().values(), other.networks().values(), strict=True):
        assert a.shape == b.shape
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name])


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def refused(path, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(path)
    assert str(path) in str(caught.value)


def rewritten(path, change):
    """The same file with a changed description: whole, but not what it should be."""
    tensors, metadata = read_tensors(path)
    change(tensors, metadata)
    write_tensors(path, tensors, metadata)


def test_round_trip(path):
    model, info = a_model(), {"scene": {"name": "fern", "factor": 8}, "note": "σ", "list": [1, 2.5]}
    size = save_model(path, model, info)
    assert size == path.stat().st_size
    loaded, read = load_model(path)
    assert_same(loaded, model)
    assert read == info
    assert load_model(path, SampleCounts(9, 8))[0].samples == SampleCounts(9, 8)
    assert names_in(path.parent) == [path.name]


def test_files_have_the_permissions_of_any_other(path):
    save_model(path, a_model(), {"a": 1})
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_any_kind_of_tensor_round_trips(path):
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "half": torch.ones(2, 2, dtype=torch.bfloat16),
        "strided": torch.arange(6).view(2, 3).T,
    }
    assert write_tensors(path, tensors, {}) == path.stat().st_size
    read, metadata = read_tensors(path)
    assert metadata == {}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())


def test_every_truncation_is_refused(path):
    save_model(path, a_model(), {})
    data = path.read_bytes()
    for length in [0, 4, 8, 100, *range(200, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path, "truncated")


def test_a_flipped_bit_anywhere_is_refused(path):
    save_model(path, a_model(), {"scene": "fern"})
    data = path.read_bytes()
    bits = random.Random(0)
    for position in range(0, len(data), 2):
        damaged = bytearray(data)
        damaged[position] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        refused(path, "damaged|truncated|not one that prunefield wrote")


def test_a_changed_description_is_refused(path):
    """The sample counts lie in the header, outside the tensors."""
    save_model(path, a_model(), {})
    data = path.read_bytes()
    assert data.count(b'{\\"coarse\\":7,') == 1
    path.write_bytes(data.replace(b'{\\"coarse\\":7,', b'{\\"coarse\\":9,'))
    refused(path, "do not match their checksum")


def test_missing_files_and_folders(tmp_path):
    refused(tmp_path / "none.safetensors", "no such checkpoint")
    refused(tmp_path, "no such checkpoint")
    with pytest.raises(CheckpointError, match="no such file"):
        read_tensors(tmp_path / "none.safetensors")


def test_files_of_others_are_refused(path):
    save_file({"a": torch.zeros(2)}, path)
    refused(path, "not one that prunefield wrote")
    path.write_text("hello")
    refused(path, "not a readable safetensors file")
    write_tensors(path, {"a": torch.zeros(2)}, {"iteration": 3})
    refused(path, "holds None version None; this prunefield reads 'prunefield-nerf' version 1")


def test_a_file_of_another_program_is_told_what_models_are_read(tmp_path):
    path = tmp_path / "small.onnx"
    path.write_bytes(b"\x08\x08\x12\x0aprunefield" * 9)
    refused(path, "nerf-pytorch's .tar")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _, m: m.update(format="other"), "holds 'other' version 1"),
        (lambda _, m: m.update(version=2), "holds 'prunefield-nerf' version 2"),
        (lambda _, m: m.pop("coarse"), "do not fit the described networks .*coarse"),
        (lambda _, m: m.pop("samples"), "do not fit the described networks .*samples"),
        (lambda _, m: m["samples"].update(coarse=0), "at least 2 coarse samples"),
        (lambda _, m: m["samples"].update(more=1), "do not fit"),
        (lambda _, m: m["fine"].update(trunk=[2, 1, 2]), "do not fit the described networks"),
        (lambda _, m: m["fine"].update(trunk=[]), "at least one channel"),
        (lambda _, m: m["fine"].update(trunk=7), "do not fit"),
        (lambda _, m: m["fine"].update(trunk=["a"]), "do not fit"),
        (lambda _, m: m["fine"].update(width=7), "do not fit"),
        (lambda _, m: m.update(fine=None), "do not fit"),
        (lambda t, _: t.pop("fine.rgb.bias"), "do not fit the described networks"),
        (lambda t, _: t.update({"fine.more": torch.zeros(1)}), "do not fit"),
        (lambda t, _: t.update({"fine.rgb.bias": torch.zeros(4)}), "do not fit"),
    ],
)
def test_whole_files_of_another_content_are_refused(path, change, said, unchecked_types):
    save_model(path, a_model(), {})
    rewritten(path, change)
    refused(path, said)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    path = tmp_path / "file" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot write.*choose another folder") as caught:
        save_model(path, a_model(), {})
    assert str(path) in str(caught.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_in_the_place_of_the_file(path):
    path.mkdir()
    with pytest.raises(CheckpointError, match=f"cannot write {path}"):
        save_model(path, a_model(), {})
    assert names_in(path.parent) == [path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(path, monkeypatch, error):
    save_model(path, a_model(0), {})

    def fail(number):
        raise error

    monkeypatch.setattr(files.os, "fsync", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        save_model(path, a_model(1), {})
    monkeypatch.undo()
    assert names_in(path.parent) == [path.name]
    assert_same(load_model(path)[0], a_model(0))


def test_the_description_is_plain_json_in_the_header(path):
    save_model(path, a_model(), {})
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert json.loads(header["coarse"])["trunk"] == [3, 1, 4]
