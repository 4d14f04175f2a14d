"""Models for other programs: what they compute there, and what cannot be written."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from nerf.checkpoints import load_model, save_model
from nerf.errors import CheckpointError
from nerf.field import FieldShape, NerfModel, SampleCounts
from orchestrator.cli import main
from orchestrator.export import FORMATS, export
from orchestrator.modelfile import packed
from orchestrator.sweep import results_of
from orchestrator.tracking import SweepInfo, TrackingLogger

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

SHAPE = FieldShape((9, 8, 7, 6), skip=1, feature=5, view=4, point_octaves=3, direction_octaves=2)
NAMES = ("coarse_density", "coarse_rgb", "fine_density", "fine_rgb")


def a_model(shape: FieldShape = SHAPE, shared: bool = False) -> NerfModel:
    model = NerfModel.create(shape, SampleCounts(6, 7), 0)
    with torch.no_grad():
        for field in model.networks().values():
            field.density.bias += 1.0
    return NerfModel(model.fine, model.fine, model.samples) if shared else model


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "shape",
    [SHAPE, FieldShape(), FieldShape((3,), None, 2, 1, 0, 0), replace(SHAPE, skip=None)],
    ids=["pruned", "original", "no encoding", "no skip"],
)
def test_onnx_computes_what_pytorch_does(tmp_path: Path, shape: FieldShape, shared: bool) -> None:
    model = a_model(shape, shared)
    path = tmp_path / "model.onnx"
    assert export(path, model, {"note": "σ"}, "onnx") == path.stat().st_size
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert {o.name for o in session.get_outputs()} == {*NAMES}
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(50, 3, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(50, 3, generator=generator), dim=-1)
    given = {"points": points.numpy(), "directions": directions.numpy()}
    for name, field in model.networks().items():
        with torch.no_grad():
            density, rgb = field(points[:, None], directions)
        found = session.run([f"{name}_density", f"{name}_rgb"], given)
        np.testing.assert_allclose(found[0], density[:, 0].relu().numpy(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[1], rgb[:, 0].sigmoid().numpy(), rtol=1e-4, atol=1e-5)
        assert found[0].max() > 0
    properties = session.get_modelmeta().custom_metadata_map
    assert json.loads(properties["samples"]) == {"coarse": 6, "fine": 7}
    assert json.loads(properties["info"]) == {"note": "σ"}


def test_a_shared_network_is_written_once(tmp_path: Path) -> None:
    sizes = [
        export(tmp_path / f"{shared}.onnx", a_model(FieldShape(), shared), {}, "onnx")
        for shared in (False, True)
    ]
    assert sizes[1] < 0.51 * sizes[0]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_the_command_exports_a_few_bit_file(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = FieldShape((8,) * 6, skip=4, feature=8, view=4)
    given, out = tmp_path / "small.safetensors", tmp_path / f"out.{form}"
    model = a_model(whole)
    save_model(given, model, {"training": {"iterations": 12}}, packed(model, "int8"))
    arguments = ["export", str(given), "--format", form, "-o", str(out), "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["size_bytes"] == out.stat().st_size
    if form == "onnx":
        return
    read, _ = load_model(given)
    again, info = load_model(out)
    for name, field in read.networks().items():
        for key, weight in field.state_dict().items():
            assert torch.equal(again.networks()[name].state_dict()[key], weight)
    assert info.get("iterations", 12) == 12


def test_a_shape_that_nerf_pytorch_cannot_hold_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = tmp_path / "small.safetensors", tmp_path / "out.tar"
    save_model(given, a_model(), {})
    assert main(["export", str(given), "--format", "tar", "-o", str(out)]) == 1
    assert "export safetensors instead" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(CheckpointError, match="cannot write"):
        export(tmp_path, a_model(), {}, "onnx")


def test_one_command_exports_the_model_of_a_sweep_and_registers_it(
    write_results: Callable[[], Path],
    fresh_database: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_results()
    out = tmp_path / "small.onnx"
    command = ["export", str(path), "--max-size", "3MB", "-o", str(out), "--json"]
    assert main(["pick", str(path), "--max-size", "3MB", "--json"]) == 0
    picked = json.loads(capsys.readouterr().out)
    save_model(Path(picked["model"]), a_model(), {})
    assert main([*command, "--no-register"]) == 0
    assert "registered" not in json.loads(capsys.readouterr().out)

    results, store = results_of(path)
    (store.root / "mlflow.db").write_bytes(fresh_database)
    sweep = results.plan.sweep
    info = SweepInfo(sweep.name, sweep.hash, "", None, "none", 0, "2026-01-02T03:04:05")
    where = sweep.tracking.experiment
    with TrackingLogger(None, where, info, store, system_metrics=False) as tracking:
        (trial,) = [r for r in results.trials if r.key == picked["id"]]
        tracking.record(trial)
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["id"], said["format"]) == (picked["id"], "onnx")
    assert said["size_bytes"] == out.stat().st_size
    assert said["registered"] == f"models:/{where}@{sweep.name}"
    client = MlflowClient(tracking.uri)
    version = client.get_model_version_by_alias(where, sweep.name)
    folder = mlflow.artifacts.download_artifacts(version.source, dst_path=str(tmp_path / "got"))
    assert {f.name for f in Path(folder).iterdir()} == {"model.safetensors", "small.onnx"}
    assert (Path(folder) / "small.onnx").read_bytes() == out.read_bytes()

    assert main(["export", picked["model"], "--knee", "-o", str(out)]) == 1
    assert "is a model" in capsys.readouterr().err
    assert main(["export", picked["model"], "-o", str(tmp_path / "small.zip")]) == 1
    assert "--format" in capsys.readouterr().err


def test_onnx_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(CheckpointError, match=r"pip install prunefield\[onnx\]"):
        export(tmp_path / "model.onnx", a_model(), {}, "onnx")
