"""Mutated sweep files, checkpoints and scenes, and files that mean harm.

Each is refused with one of our errors or is valid; nothing hangs, nothing runs, nothing is written
outside of the sweep's folder. Hypothesis chooses what is mutated, and how; 2,000 of each kind with
--slow.
"""

import json
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.chaos.inputs import KINDS, WORDS
from nerf.checkpoints import load_model
from nerf.errors import SceneError
from nerf.scenes.photos import inside
from orchestrator.cli import main
from orchestrator.errors import PrunefieldError, SpecError, StoreError
from orchestrator.spec import read_text
from orchestrator.store.objects import ObjectBackend, _checked
from tests.unit.sweep_builder import mapping, text

EXAMPLES = {False: 150, True: 2000}  # of each kind; so many with --slow


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


@pytest.mark.parametrize("name", KINDS)
def test_mutated_inputs_are_refused_or_valid(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kind, seen = KINDS[name](tmp_path), Counter[bool]()

    @settings(
        max_examples=EXAMPLES[bool(request.config.getoption("--slow"))],
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.randoms(use_true_random=True))
    def feed(draw: random.Random) -> None:
        seed = draw.choice(kind.seeds)
        start = (
            len(seed) if not draw.randrange(4) else min(len(seed), 600)
        )  # what a file begins with says most
        data = mutated(seed[:start], draw) + seed[start:]
        seen[kind.feed(data)] += 1

    feed()
    assert all(kind.feed(seed) for seed in kind.seeds)
    assert seen[False] > seen.total() / 10


def test_a_sweep_file_of_other_bytes_than_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(b"name: \xff\xfe\n")
    assert main(["validate", str(path)]) == 2


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


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a" * 300, "a\0b", ".", "\ud800"])
def test_a_scene_cannot_make_us_read_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(SceneError, match="cannot be the name of a photo"):
        inside(tmp_path, name, "transforms_train.json, frame 0")
    assert inside(tmp_path, "./train/../r_0.png", "x") == tmp_path / "r_0.png"


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
