"""Inputs that a stranger may hand to prunefield, and what must hold of every one of them.

Each is refused with one of our errors or is valid; nothing is written beside it. Whoever makes the
inputs (tests/unit/test_hostile.py: seeded mutations and Hypothesis; `benchmarks.chaos.fuzz`:
atheris, guided by coverage) feeds them to a `Kind`.
"""

import copy
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError

from nerf.checkpoints import load_model, save_model
from nerf.errors import NerfError
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.files import _digest
from nerf.interchange import export_tar
from nerf.scenes import SceneSettings, load_scene, scene_fingerprint
from orchestrator.errors import PrunefieldError, SpecError
from orchestrator.modelfile import packed
from orchestrator.plan import make_plan
from orchestrator.spec import load, read_text
from orchestrator.spec.schema import SweepFile
from orchestrator.store import Store
from tests.unit.sweep_builder import mapping, text
from tests.unit.test_scenes_blender import ANGLE, COUNTS, some_matrix, some_rgba
from tests.unit.test_scenes_colmap import write as write_colmap
from tests.unit.test_scenes_llff import HEIGHT, VIEWS, WIDTH, some_photo, some_table

# What stands at the borders of what is allowed, and beyond them.
WORDS = (
    *(b"null", b"~", b"-1", b"0", b"1e999", b".nan", b"[]", b"{}", b"true", b"9" * 400, b"''"),
    *(b"!!python/object/apply:os.system ['true']", b"&a [*a]", b"*a", b"../../etc", b"/etc/passwd"),
    *(b"\x00", b"\xff\xfe", b"\t", b": ", b"- ", b"\n", b"$(id)", b"`id`", b"; id", b"s3://", b"%"),
)


class Kind(Protocol):
    """One kind of input."""

    seeds: list[bytes]
    words: Iterable[bytes]

    def feed(self, data: bytes) -> bool:
        """Take an input; gives whether it was valid. Anything but our errors is a fault."""


def tree(folder: Path) -> set[Path]:
    """All files and folders in a folder."""
    return set(folder.rglob("*"))


class SweepFiles:
    """Sweep files: validated, and planned where that is of the demo scene."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.store = folder, folder / "sweep.yaml", Store(folder / "out")
        storage, scene = str(folder / "out"), {"format": "demo"}
        rich = mapping(storage=storage, scene=scene, report={"ratios": [0.25]})
        rich["prune"].append({"sizes": ["60kB"], "bits": ["fp32", "int8"]})
        rich["search"] = {"trials": 6, "objectives": ["size_bytes", "psnr"], "criteria": "obs"}
        self.seeds = [text(mapping(storage=storage, scene=scene)).encode(), text(rich).encode()]
        self.words = [*WORDS, *(name.encode() for name in _names(SweepFile))]
        self.path.touch()
        for seed in self.seeds:
            valid = read_text(seed.decode(), self.path)
            make_plan(self._with_scene(valid), self.store)  # makes the scene
        self._before = tree(folder)

    def _with_scene(self, sweep):  # type: ignore[no-untyped-def]
        return replace(sweep, scene=replace(sweep.scene, path=self.folder / "scene"))

    def feed(self, data: bytes) -> bool:
        """One sweep file."""
        self.path.write_bytes(data)
        try:
            sweep = load(self.path)
        except SpecError:
            return False
        assert "/" not in sweep.name
        assert sweep.name not in (".", "..")
        if sweep.scene.format == "demo" and sweep.scene.path is None:
            try:
                make_plan(self._with_scene(sweep), self.store)
            except PrunefieldError:
                return False
        assert tree(self.folder) == self._before
        return True


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 0.5, 1e-300, 1e300, float("nan"), float("inf"), 10**12, [], {}),
    *("", "..", "a/b", "$(id)", "\0", "9" * 400, "s3://x", "auto", "all", [[]], [0.5, 0.5], "1kB"),
)


class SweepValues:
    """Sweep files of valid YAML whose values, keys and lists are others: an input says which."""

    def __init__(self, folder: Path) -> None:
        self._files = SweepFiles(folder)
        self.folder, self.words = folder, ()
        self._valid = yaml.safe_load(self._files.seeds[1])
        self._names = sorted(name.removesuffix(": ") for name in _names(SweepFile))
        draw = random.Random(0)
        tried = [b"", *(draw.randbytes(4) for _ in range(200))]
        self.seeds = [data for data in tried if self.feed(data)]

    def feed(self, data: bytes) -> bool:
        """Four bytes an edit: where (two), how, with what."""
        sweep = copy.deepcopy(self._valid)
        for at in range(0, min(len(data), 32) - 3, 4):
            places = list(_places(sweep))
            if not places:
                break
            holder, key = places[(256 * data[at] + data[at + 1]) % len(places)]
            how, what = data[at + 2] % 6, data[at + 3]
            other, its = places[what % len(places)]
            if how == 0:
                del holder[key]
            elif how == 1:
                holder[key] = copy.deepcopy(VALUES[what % len(VALUES)])
            elif how == 2:
                holder[key] = copy.deepcopy(other[its])
            elif how == 3:
                holder[key] = [copy.deepcopy(holder[key])] * (what % 4)
            elif how == 4 and isinstance(holder[key], int | float):
                holder[key] = holder[key] * (what - 128) / 16
            elif isinstance(holder, dict):
                name = self._names[what % len(self._names)]
                holder[name] = copy.deepcopy(holder[key])
        return self._files.feed(yaml.safe_dump(sweep).encode())


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of a mapping and every number in a list, with what holds it."""
    keys: Iterable[Any] = ()
    if isinstance(node, dict):
        keys = list(node)
    elif isinstance(node, list):
        keys = range(len(node))
    for key in keys:
        yield node, key
        yield from _places(node[key])


class Models:
    """Model files; re-signed, since a stranger can compute a checksum as well as we.

    Args:
        folder: where they lie.
        bits: how the weights of the first one are stored.
        signed: whether the checksum of each is made right before it is read.
    """

    def __init__(self, folder: Path, bits: str = "fp32", signed: bool = True) -> None:
        self.path, self.signed = folder / "model.safetensors", signed
        model = NerfModel.create(FieldShape((8,) * 3, 1, 8, 4, 2, 1), SampleCounts(4, 4), 0)
        save_model(self.path, model, {"scene": {"name": "x"}}, packed(model, bits))
        self.seeds = [self.path.read_bytes()]
        self.words = [*WORDS, b'"schemes"', b'"fine"', b'"trunk"', b'"int8"', b'"sparse16"']
        self.folder, self._before, self._model = folder, tree(folder), model

    def feed(self, data: bytes) -> bool:
        """One model file; unless it was signed anew, it is the one that was written."""
        self.path.write_bytes(signed(data) if self.signed else data)
        model = _load(self.path, self.folder, self._before)
        if model is not None and not self.signed:
            for name, field in self._model.networks().items():
                ours = model.networks()[name].state_dict()
                assert all(torch.equal(ours[n], value) for n, value in field.state_dict().items())
        return model is not None


def _load(path: Path, folder: Path, before: set[Path]) -> NerfModel | None:
    """The model in a file; if it is none, the error names the file."""
    refused, model = None, None
    try:
        model, _ = load_model(path)
    except PrunefieldError as error:
        refused = str(error)
    assert tree(folder) == before
    assert refused is None or str(path) in refused
    assert model is None or all(next(f.parameters()).numel() for f in model.networks().values())
    return model


def signed(data: bytes) -> bytes:
    """A model file with the right checksum, if it is one at all."""
    try:
        (head,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + head])["__metadata__"]
        tensors = safetensors.torch.load(data)
        header = {str(k): str(v) for k, v in header.items() if k != "sha256"}
        return safetensors.torch.save(tensors, {**header, "sha256": _digest(tensors, header)})
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        return data


class Tars:
    """Checkpoints of nerf-pytorch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "model.tar"
        shape = FieldShape((8,) * 2, None, 8, 4, 2, 1)
        export_tar(self.path, NerfModel.create(shape, SampleCounts(4, 4), 0), 7)
        self.seeds, self.words = [self.path.read_bytes()], WORDS
        self._before = tree(folder)

    def feed(self, data: bytes) -> bool:
        """One checkpoint."""
        self.path.write_bytes(data)
        return _load(self.path, self.folder, self._before) is not None


class Scenes:
    """Scene folders of one format. The first byte of an input names the file, the rest is it.

    Args:
        folder: where the scene is made.
        name: of the format.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        SCENES[name](self.folder)
        self.settings = SceneSettings(path=self.folder, format=name.partition("-")[0], factor=1)
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        photos = [path for path in files if path.suffix == ".png"]
        self.files = [path for path in files if path not in photos] + photos[:2]
        self.contents = [path.read_bytes() for path in self.files]
        self.seeds = [bytes([i]) + data for i, data in enumerate(self.contents)]
        self.words = [*WORDS, b'"file_path"', b'"../../x"', b"inf", b"-nan", b"\0" * 8, b"\xff" * 8]
        assert load_scene(self.settings).train
        self._before = tree(folder)
        self._all = folder

    def feed(self, data: bytes) -> bool:
        """One scene, all of whose files but one are whole."""
        number = data[0] % len(self.files) if data else 0
        self.files[number].write_bytes(data[1:])
        try:
            scene = load_scene(self.settings)
            assert np.isfinite(scene.images).all()
            assert torch.isfinite(torch.as_tensor(scene.poses)).all()
            assert scene.fingerprint == scene_fingerprint(self.settings)
            return True
        except NerfError:
            return False
        finally:
            self.files[number].write_bytes(self.contents[number])
            assert tree(self._all) == self._before


def _llff(folder: Path) -> None:
    (folder / "images").mkdir()
    np.save(folder / "poses_bounds.npy", some_table())
    for view in range(VIEWS):
        some_photo(view, WIDTH // 4, HEIGHT // 4).save(folder / "images" / f"photo_{view:02d}.png")


def _blender(folder: Path) -> None:
    for split, count in COUNTS.items():
        (folder / split).mkdir()
        frames = []
        for view in range(count):
            some_rgba(split, view).save(folder / split / f"r_{view}.png")
            matrix = some_matrix(split, view).tolist()
            frames.append({"file_path": f"./{split}/r_{view}", "transform_matrix": matrix})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(content))


SCENES: dict[str, Callable[[Path], object]] = {
    "llff": _llff,
    "blender": _blender,
    "colmap": lambda folder: write_colmap(folder, binary=True),
    "colmap-text": lambda folder: write_colmap(folder, binary=False),
}

KINDS: dict[str, Callable[[Path], Kind]] = {
    "sweep": SweepFiles,
    "sweep-values": SweepValues,
    "damaged": lambda folder: Models(folder, signed=False),
    "model": Models,
    "packed": lambda folder: Models(folder, "int4"),
    "tar": Tars,
    "llff": lambda folder: Scenes(folder, "llff"),
    "blender": lambda folder: Scenes(folder, "blender"),
    "colmap": lambda folder: Scenes(folder, "colmap"),
    "colmap-text": lambda folder: Scenes(folder, "colmap-text"),
}


def make(name: str) -> Kind:
    """A kind of input, in a folder of its own."""
    return KINDS[name](Path(tempfile.mkdtemp(prefix=f"fuzz-{name}.")).resolve())


def _names(model: type) -> set[str]:
    """Every key of a schema, with its colon."""
    schema, found = json.dumps(model.model_json_schema()), set()  # type: ignore[attr-defined]

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.update(f"{name}: " for name in node.get("properties", {}))
            found.update(str(value) for value in node.get("enum", ()))
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(json.loads(schema))
    return found
