"""Whole sweeps on a real local Ray, with real MLflow on SQLite."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.cli import main
from orchestrator.plan import make_plan
from orchestrator.progress import Progress
from orchestrator.spec import load
from orchestrator.store import Store
from orchestrator.sweep import open_sweep, run
from tests.e2e import marks

pytestmark = marks.SWEEP

WriteSweep = Callable[..., Path]


def records(store: Path, kind: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(store.glob(f"{kind}/*/record.json"))]


def mlflow_runs(store: Path) -> list:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{store / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("prunefield")
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Where the processes of a sweep listen while work is under way, by their names."""
    found: dict[str, set[str]] = {}

    def look(self: Progress, nodes: int) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                addresses = {
                    connection.laddr.ip.removeprefix("::ffff:")
                    for connection in process.net_connections("inet")
                    if connection.status == psutil.CONN_LISTEN
                }
                found.setdefault(process.name(), set()).update(addresses)
        return told(self, nodes)

    told = Progress.running
    monkeypatch.setattr(Progress, "running", look)
    return found


def test_a_sweep_runs_from_the_file_to_the_report(
    write_sweep: WriteSweep,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    listening: dict[str, set[str]],
) -> None:
    path, out, environment = write_sweep(), tmp_path / "out", dict(os.environ)
    assert main(["run", str(path)]) == 0
    # This machine alone can reach what a sweep starts on it.
    assert {"gcs_server", "raylet"} <= {name for name, where in listening.items() if where}
    assert set().union(*listening.values()) <= {"127.0.0.1", "::1"}
    printed = capsys.readouterr().out
    # It leaves no trace; Ray keeps a few variables of its own for the life of a process.
    assert not {name for name in environment if os.environ.get(name) != environment[name]}
    added = {n for n in set(os.environ) - set(environment) if not n.startswith("RAY_")}
    assert not {n for n in added if n.startswith(("TUNE_", "MLFLOW_RUN"))}
    assert "report.html" in printed
    assert "prunefield ui" in printed

    # 2 criteria × 2 ratios × 2 calibration sets; magnitude looks at no calibration set.
    trials = records(out, "trials")
    assert len(trials) == 6
    assert Counter(t["config"]["criterion"] for t in trials) == {"activation": 4, "magnitude": 2}
    dense = records(out, "trainings")[0]
    assert all(t["training"] == dense["training"] for t in trials)
    for trial in trials:
        size = (out / "trials" / trial["key"] / "model.safetensors").stat().st_size
        assert trial["metrics"]["size_bytes"] == size < dense["metrics"]["size_bytes"]

    # MLflow: the sweep, its training and its trials, all ended, none twice.
    runs = mlflow_runs(out)
    assert Counter(r.data.tags["prunefield.kind"] for r in runs) == {
        "sweep": 1,
        "training": 1,
        "trial": 6,
    }
    assert {r.info.status for r in runs} == {"FINISHED"}
    logged = {r.data.tags.get("prunefield.key"): r for r in runs}
    for trial in trials:
        run_of = logged[trial["key"]]
        assert run_of.data.metrics["psnr"] == pytest.approx(trial["metrics"]["psnr"])
        assert run_of.data.params["criterion"] == trial["config"]["criterion"]
        assert run_of.data.tags["prunefield.training"] == dense["training"]

    # Again: nothing runs, nothing is logged twice, the plan knows.
    sweep, store = open_sweep(path)
    plan = make_plan(sweep, store).summary()
    assert plan["trials"]["cached"] == plan["trials"]["total"] == 6
    before = {p: p.stat().st_mtime_ns for p in out.glob("tr*/*/record.json")}
    assert main(["run", str(path)]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("tr*/*/record.json")} == before
    assert len(mlflow_runs(out)) == len(runs)

    # And the front agrees with a brute-force look at the records.
    capsys.readouterr()
    assert main(["front", str(path), "--json"]) == 0
    front = json.loads(capsys.readouterr().out)
    beaten = {
        a["key"]
        for a in trials
        for b in trials
        if b["metrics"]["size_bytes"] <= a["metrics"]["size_bytes"]
        and b["metrics"]["psnr"] >= a["metrics"]["psnr"]
        and (b["metrics"]["size_bytes"], b["metrics"]["psnr"])
        != (a["metrics"]["size_bytes"], a["metrics"]["psnr"])
    }
    assert {row["id"] for row in front["front"]} == {t["key"] for t in trials} - beaten


def test_a_bigger_sweep_runs_only_what_is_new(write_sweep: WriteSweep, tmp_path: Path) -> None:
    run(write_sweep(prune={"criteria": ["magnitude"], "ratios": [0.5]}))
    out = tmp_path / "out"
    checkpoint = next(out.glob("checkpoints/*/model.safetensors"))
    trained = checkpoint.stat().st_mtime_ns
    finished = run(write_sweep(prune={"criteria": ["magnitude"], "ratios": [0.25, 0.5]}))
    assert checkpoint.stat().st_mtime_ns == trained
    assert len(finished.results.trials) == 2
    assert finished.results.complete


def test_prunings_start_while_other_models_still_train(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    # Ray keeps the mode of a process's first cluster: one process must not mix them.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    path = write_sweep(
        train={"iterations": [4, 400]},
        prune={"criteria": ["magnitude"], "ratios": [0.5]},
        resources={"train": {"cpus": 1}, "prune": {"cpus": 1}},
    )
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        finished = run(path)
    finally:
        ray.shutdown()
    assert finished.results.complete
    out = tmp_path / "out"
    long = next(t for t in finished.results.trainings if t.config["iterations"] == 400)
    short = next(t for t in finished.results.trainings if t.config["iterations"] == 4)
    early = next(t for t in finished.results.trials if t.training == short.training)
    ended = {
        "pruning": (out / "trials" / early.key / "record.json").stat().st_mtime_ns,
        "training": (out / "checkpoints" / long.training / "record.json").stat().st_mtime_ns,
    }
    assert ended["pruning"] < ended["training"]


def test_a_failing_stage_is_recorded_and_the_rest_goes_on(
    write_sweep: WriteSweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A learning rate that makes the loss NaN for one recipe; the other one must go on.
    path = write_sweep(
        train={"learning_rate": [4e-3, 1e30]}, prune={"criteria": ["magnitude"], "ratios": [0.5]}
    )
    assert main(["run", str(path)]) == 1
    out = tmp_path / "out"
    assert len(records(out, "trials")) == 1
    failures = [json.loads(p.read_text()) for p in out.glob("failures/*.json")]
    assert {f["kind"] for f in failures} == {"training", "trial"}
    assert all("diverged" in f["failure"]["reason"] for f in failures)
    status = Counter((r.data.tags["prunefield.kind"], r.info.status) for r in mlflow_runs(out))
    assert status == {
        ("sweep", "FINISHED"): 1,
        ("training", "FINISHED"): 1,
        ("training", "FAILED"): 1,
        ("trial", "FINISHED"): 1,
        ("trial", "FAILED"): 1,
    }
    assert "failed" in capsys.readouterr().out


def test_asking_for_a_gpu_without_one_says_so(
    write_sweep: WriteSweep, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    path = write_sweep(resources={"train": {"gpus": 1}})
    assert main(["run", str(path)]) == 1
    said = capsys.readouterr().err
    assert "resources.train.gpus" in said
    assert "Traceback" not in said


def test_the_demo_plan_needs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load(Path(__file__).parents[2] / "sweeps" / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    plan = make_plan(sweep, Store(tmp_path / "out")).summary()
    assert plan["trainings"] == {"total": 1, "cached": 0}
    assert plan["trials"]["total"] >= 20
