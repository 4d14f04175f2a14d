"""2,000 mutated sweep files, checkpoints and scenes, and files that mean harm.

Each is refused with one of our errors or is valid; nothing hangs, nothing runs, nothing is written
outside of the sweep's folder. What is mutated, and how, follows from a seed.
"""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nerf.checkpoints import load_model, save_model
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.scenes import SceneSettings, load_scene
from orchestrator.cli import main
from orchestrator.errors import PrunefieldError, SpecError, StoreError
from orchestrator.plan import make_plan
from orchestrator.spec import Sweep, read_text
from orchestrator.store import Store
from orchestrator.store.objects import ObjectBackend, _checked
from tests.unit.sweep_builder import mapping, text, with_scene
from tests.unit.test_scenes_llff import HEIGHT, VIEWS, WIDTH, some_photo, some_table

SWEEPS, CHECKPOINTS, SCENES = 1200, 500, 300
# What stands at the borders of what is allowed, and beyond them.
WORDS = (
    *(b"null", b"~", b"-1", b"0", b"1e999", b".nan", b"[]", b"{}", b"true", b"9" * 400, b"''"),
    *(b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"*a", b"../../etc", b"/etc/passwd"),
    *(b"\x00", b"\xff\xfe", b"\t", b": ", b"- ", b"\n", b"$(id)", b"`id`", b"; id", b"s3://", b"%"),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, removed, repeated or replaced by words."""
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(data) + 1), draw.randint(1, 12)
        how = draw.randrange(6)
        if how == 0:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif how == 1:
            data = data[:at] + data[at + size :]
        elif how == 2:
            data = data[:at] + data[at : at + 4 * size] + data[at:]
        elif how == 3:
            data = data[:at] + draw.choice(WORDS) + data[at:]
        elif how == 4:
            data = data[:at] + draw.choice(WORDS) + data[at + size :]
        else:
            data = data[: draw.randrange(len(data) + 1)]
    return data


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_mutated_sweep_files_are_refused_or_planned(tmp_path: Path) -> None:
    scene = tmp_path / "scene"
    valid = text(mapping(storage=str(tmp_path / "out"), scene={"format": "demo"})).encode()
    make_plan(with_scene(read_text(valid.decode(), Path("x.yaml")), scene), Store(tmp_path / "out"))
    path, before = tmp_path / "sweep.yaml", tree(tmp_path) | {tmp_path / "sweep.yaml"}
    draw, planned = random.Random(5), 0
    for _ in range(SWEEPS):
        data = mutated(valid, draw)
        path.write_bytes(data)
        try:
            sweep: Sweep = read_text(data.decode("utf-8"), path)
        except UnicodeDecodeError:
            assert main(["validate", str(path)]) == 2
            continue
        except SpecError:
            continue
        assert "/" not in sweep.name
        assert sweep.name not in (".", "..")
        if sweep.scene.format == "demo" and sweep.scene.path is None:
            try:
                make_plan(with_scene(sweep, scene), Store(tmp_path / "out"))
            except PrunefieldError:
                continue
            planned += 1
    assert planned > 20
    assert tree(tmp_path) == before


def test_mutated_checkpoints_are_refused_or_are_the_model(tmp_path: Path) -> None:
    shape = FieldShape((8,) * 3, 1, 8, 4, 2, 1)
    model = NerfModel.create(shape, SampleCounts(4, 4), 0)
    path = tmp_path / "model.safetensors"
    save_model(path, model, {"scene": {"name": "x"}})
    valid, draw, whole = path.read_bytes(), random.Random(6), 0
    unnamed = 0
    (head,) = struct.unpack("<Q", valid[:8])
    for number in range(CHECKPOINTS):
        if number % 2:  # half of them in the header, which is a small part of the file
            data = valid[:8] + mutated(valid[8 : 8 + head], draw) + valid[8 + head :]
        else:
            data = mutated(valid, draw)
        path.write_bytes(data)
        try:
            loaded, _ = load_model(path)
        except PrunefieldError as error:
            unnamed += str(path) not in str(error)
            continue
        whole += 1
        for name, field in model.networks().items():
            ours = loaded.networks()[name].state_dict()
            assert all(torch.equal(ours[n], value) for n, value in field.state_dict().items())
    assert whole < CHECKPOINTS / 10
    assert unnamed == 0


def test_mutated_scenes_are_refused_or_loaded(tmp_path: Path) -> None:
    original = tmp_path / "original"
    (original / "images").mkdir(parents=True)
    np.save(original / "poses_bounds.npy", some_table())
    for view in range(VIEWS):
        some_photo(view, WIDTH, HEIGHT).save(original / "images" / f"photo_{view:02d}.png")
    files = sorted(path for path in original.rglob("*") if path.is_file())
    draw, loaded = random.Random(7), 0
    refused = 0
    copy = tmp_path / "copy"
    for _ in range(SCENES):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(original, copy)
        victim = copy / draw.choice(files).relative_to(original)
        if draw.random() < 0.1:
            victim.unlink()
        else:
            victim.write_bytes(mutated(victim.read_bytes(), draw))
        before = tree(copy)
        try:
            scene = load_scene(SceneSettings(path=copy, format="llff", factor=1))
        except PrunefieldError:
            refused += 1
        else:
            loaded += 1
            assert torch.isfinite(torch.as_tensor(scene.images)).all()
        assert tree(copy) == before
    assert loaded + refused == SCENES
    assert refused > SCENES / 2


# --- what means harm -----------------------------------------------------------------------------


class Harm:
    """What unpickling this does must not happen."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.witness),))


@pytest.mark.parametrize("name", ["model.tar", "model.safetensors", "model.pt"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_in_a_checkpoint_does_not_run(tmp_path: Path, name: str, how: str) -> None:
    witness, path = tmp_path / "witness", tmp_path / name
    content = {"global_step": 1, "network_fn_state_dict": Harm(witness)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(PrunefieldError) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert not witness.exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [WITNESS]",
        "!!python/object/new:os.mkdir [WITNESS]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!custom {a: 1}",
    ],
)
def test_a_tag_in_a_sweep_file_builds_nothing(tmp_path: Path, value: str) -> None:
    witness = tmp_path / "witness"
    with pytest.raises(SpecError, match="line 1"):
        read_text(f"name: {value.replace('WITNESS', str(witness))}\n", tmp_path / "x.yaml")
    assert not witness.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/etc",
        "a/b",
        "..",
        ".hidden",
        "",
        "a b",
        "$(id)",
        "a;id",
        "a\nb",
        "`id`",
        "a" * 65,
    ],
)
def test_a_name_that_is_a_path_or_a_command_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="name"):
        read_text(text(mapping(name=name)), Path("x.yaml"))


@pytest.mark.parametrize(
    "storage",
    [
        *("s3://", "s3://UPPER/x", "s3://b/../c", "s3://bucket/a/../b", "s3://bucket/$(id)"),
        *("gs://b/x", "s3://bucket/a b", "http://host/x", "s3://user:secret@bucket/x", "\0"),
    ],
)
def test_an_address_of_storage_that_is_none_is_refused(storage: str) -> None:
    with pytest.raises(SpecError, match="storage"):
        read_text(text(mapping(storage=storage)), Path("x.yaml"))


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "", ".", "a\0b"])
def test_a_bucket_cannot_make_us_write_elsewhere(tmp_path: Path, name: str) -> None:
    manifest = {"record": "{}", "files": {name: {"sha256": "0" * 64, "size": 1}}}
    with pytest.raises(ValueError, match="not a manifest"):
        _checked(json.loads(json.dumps(manifest)))


def test_an_address_that_is_no_bucket_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="write s3://BUCKET"):
        ObjectBackend("s3://-/x", tmp_path)
