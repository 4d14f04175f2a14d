"""The same sweep with its results in a bucket, and its runs in PostgreSQL."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli import main
from orchestrator.store import Store
from tests.e2e import marks
from tests.services import KEYS, make_bucket, postgres, s3_server, speak_to

pytestmark = marks.SWEEP

WriteSweep = Callable[..., Path]


def test_a_sweep_whose_results_are_in_a_bucket(
    write_sweep: WriteSweep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with s3_server() as endpoint:
        make_bucket(endpoint, "sweeps")
        speak_to(endpoint, monkeypatch)
        monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path / "first"))
        path = write_sweep(storage="s3://sweeps/tiny")
        assert main(["run", str(path)]) == 0
        assert KEYS["AWS_SECRET_ACCESS_KEY"] not in capsys.readouterr().out

        # Another machine, with nothing of its own: everything is in the bucket, nothing runs.
        monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path / "second"))
        assert main(["plan", str(path), "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["trials"] == {"total": 6, "cached": 6, "combinations": 8}
        assert plan["trainings"] == {"total": 1, "cached": 1}
        assert main(["front", str(path), "--json"]) == 0
        front = json.loads(capsys.readouterr().out)["front"]
        store = Store("s3://sweeps/tiny")
        assert {row["id"] for row in front} <= store.keys("trial")
        for key in store.keys("trial"):
            store.verified_file("trial", key, "model.safetensors")
        assert store._backend.names("running") == set()
        assert store._backend.names("leases") == set()

        # The secret is in no file that the run left behind.
        secret = KEYS["AWS_SECRET_ACCESS_KEY"].encode()
        written = [p for p in tmp_path.rglob("*") if p.is_file()]
        assert written
        assert not [p for p in written if secret in p.read_bytes()]

    # The bucket cannot be reached: a clear error.
    assert main(["run", str(path)]) == 1
    said = capsys.readouterr().err
    assert "cannot reach the storage s3://sweeps/tiny" in said
    assert "Traceback" not in said
    assert Counter(p.name for p in tmp_path.iterdir())["prunefield-out"] == 0


def test_a_sweep_whose_runs_are_in_postgresql(
    write_sweep: WriteSweep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    with postgres() as database:
        monkeypatch.setenv("PGPASSWORD", database.password)
        path = write_sweep(tracking={"uri": database.uri})
        assert main(["run", str(path)]) == 0
        assert main(["run", str(path)]) == 0  # nothing is logged twice
        client = MlflowClient(database.uri)
        experiment = client.get_experiment_by_name("prunefield")
        runs = list(client.search_runs([experiment.experiment_id]))
        assert Counter(r.info.status for r in runs) == {"FINISHED": 8}
        logged = {r.data.tags.get("prunefield.key") for r in runs}
        assert logged == {None, *(p.parent.name for p in tmp_path.glob("out/tr*/*/record.json"))}
        models = list(tmp_path.glob("out/mlartifacts/**/model.safetensors"))
        assert len(models) == 7
    assert not (tmp_path / "out" / "mlflow.db").exists()
    assert database.password not in "".join(capsys.readouterr())
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not [p for p in written if database.password.encode() in p.read_bytes()]
