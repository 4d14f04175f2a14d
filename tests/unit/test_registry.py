"""The model registry, on a real SQLite store: what is shipped is found again by its alias."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from orchestrator.errors import OrchestratorError, TrackingError
from orchestrator.pick import write_model
from orchestrator.store import Store
from orchestrator.tracking import SweepInfo, TrackingLogger
from orchestrator.tracking.registry import register
from tests.unit.record_builder import SYNTHETIC, save, training_record, trial_record


def test_the_alias_of_a_sweep_points_at_the_model_that_was_shipped_last(
    tmp_path: Path, fresh_database: bytes
) -> None:
    store = Store(tmp_path / "out")
    store.prepare()
    (store.root / "mlflow.db").write_bytes(fresh_database)
    dense = save(store, training_record())
    trials = [save(store, trial_record(dense, ratio)) for ratio in (0.3, 0.5)]
    info = SweepInfo("fern.v2", "ab12" * 4, "name: x", None, "none", 0, "2026-01-02T03:04:05")
    with TrackingLogger(None, "small", info, store, system_metrics=False) as tracking:
        for record in (dense, *trials):
            tracking.record(record)
        uri = tracking.uri
    found = [register(uri, "small", "fern.v2", t.key, f"ship {t.key}") for t in trials]
    assert [f.version for f in found] == ["1", "2"]
    assert found[1].uri == "models:/small@fern-v2"
    client = MlflowClient(uri)
    version = client.get_model_version_by_alias("small", "fern-v2")
    assert (str(version.version), version.description) == ("2", f"ship {trials[1].key}")
    folder = mlflow.artifacts.download_artifacts(version.source, dst_path=str(tmp_path / "got"))
    assert (Path(folder) / "model.safetensors").read_text() == SYNTHETIC
    # Shipping the first again makes no third version.
    assert register(uri, "small", "fern.v2", trials[0].key, "again").version == "1"
    assert str(client.get_model_version_by_alias("small", "fern-v2").version) == "1"
    with pytest.raises(TrackingError, match="holds no model of feed"):
        register(uri, "small", "fern.v2", "feed", "")
    assert not Path("mlflow.db").exists()  # nothing was written elsewhere


def test_a_pick_is_written_whole_or_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_text(SYNTHETIC)
    write_model(model, tmp_path / "mine.safetensors")
    assert (tmp_path / "mine.safetensors").read_text() == SYNTHETIC
    with pytest.raises(OrchestratorError, match=r"\.safetensors, \.tar, \.onnx"):
        write_model(model, tmp_path / "mine.zip")
