"""Parts of a sweep die, hang or fail: only they suffer, and running again completes the rest."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.chaos.sabotage import Fault, FaultyBench, environment, happened
from orchestrator.plan import make_plan
from orchestrator.provenance import Origin
from orchestrator.stages import Stopwatch, Workbench
from orchestrator.store import Store
from orchestrator.sweep import open_sweep, run
from tests.e2e import marks
from tests.e2e.test_sweep import mlflow_runs, records

pytestmark = marks.SWEEP

WriteSweep = Callable[..., Path]
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


def measured(out: Path) -> dict[str, dict[str, float]]:
    """What must be the same in every run: all metrics but times."""
    timed = ("render_seconds", "train_seconds")
    return {
        record["key"]: {n: v for n, v in record["metrics"].items() if n not in timed}
        for kind in ("trainings", "trials")
        for record in records(out, kind)
    }


def undisturbed(path: Path, folder: Path) -> dict[str, dict[str, float]]:
    """What the sweep measures when this process does everything, one after another.

    On one thread, as workers do: how many there are decides the order of sums.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _one_after_another(path, folder)
    finally:
        torch.set_num_threads(threads)


def _one_after_another(path: Path, folder: Path) -> dict[str, dict[str, float]]:
    sweep, _ = open_sweep(path)
    store = Store(folder)
    plan, watch = make_plan(sweep, store), Stopwatch()
    bench = Workbench(sweep, store, Origin.here())
    for training in plan.trainings:
        list(bench.train(training, watch))
    for calibration in plan.calibrations:
        bench.calibrate(calibration, watch)
    for trial in plan.trials:
        bench.prune(trial, watch)
    return measured(folder)


@pytest.mark.slow
def test_only_what_fails_suffers(
    write_sweep: WriteSweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {
        "train": {"iterations": 2000},
        "prune": {"criteria": ["activation", "magnitude"], "ratios": RATIOS},
        "resources": {"retries": 1, "checkpoint_seconds": 0.2},
        "limits": {"prune": 4.0},
    }
    plan["prune"]["calibration"] = {"views": 4, "rays": 16}
    path, out = write_sweep(**plan), tmp_path / "out"
    faults = [
        Fault("training", "train", "train", "kill", after=3),
        Fault("calibration", "calibrate", "calibrate", "kill"),
        Fault("pruning", "prune", "prune", "kill", ratio=0.1, criterion="activation"),
        Fault("evaluation", "prune", "evaluate", "kill", ratio=0.2, criterion="activation"),
        Fault("writing", "prune", "write", "kill", ratio=0.3, criterion="activation"),
        Fault("always", "prune", "evaluate", "kill", times=9, ratio=0.4, criterion="activation"),
        Fault("hanging", "prune", "evaluate", "hang", ratio=0.5, criterion="activation"),
        Fault("memory", "prune", "prune", "memory", times=9, ratio=0.6, criterion="activation"),
        Fault("disk", "prune", "write", "disk", times=9, ratio=0.7, criterion="activation"),
    ]
    notes = tmp_path / "notes"
    with monkeypatch.context() as patch:
        for name, value in environment(faults, notes).items():
            patch.setenv(name, value)
        finished = run(path, bench=FaultyBench)
    counts = Counter(name for name in happened(notes) if not name.endswith(".before"))
    # An error whose lane dies before it could tell of it is met again.
    assert {name: min(n, 1) for name, n in counts.items()} == {fault.name: 1 for fault in faults}
    assert counts["always"] == 2

    # Only what went wrong for good has failed, each with its stage and reason.
    failed = {
        (r.config["criterion"], r.config["ratio"]): r.failure for r in finished.results.failed
    }
    assert set(failed) == {("activation", ratio) for ratio in (0.4, 0.5, 0.6, 0.7)}
    said = {ratio: failure for (_, ratio), failure in failed.items() if failure}
    assert said[0.4].stage == "prune"
    assert "resources.retries" in said[0.4].reason
    assert (said[0.5].stage, said[0.5].reason) == (
        "evaluate",
        "took longer than 4 s (`limits.prune`); its worker was ended",
    )
    assert said[0.6].stage == "prune"
    assert "out of GPU memory" in said[0.6].reason
    assert said[0.7].stage == "write"
    assert "No space left" in said[0.7].reason
    assert len(finished.results.trials) == 2 * len(RATIOS) - 4

    # The training went on from its checkpoint, not from the start.
    (log,) = notes.glob("iterations-*")
    seen: dict[str, list[int]] = {}
    for line in log.read_text().splitlines():
        pid, iteration = line.split()
        seen.setdefault(pid, []).append(int(iteration))
    first, second = seen.values()
    assert second[0] > first[0]
    assert second[-1] == 2000

    # MLflow: nothing left running, nothing twice.
    runs = mlflow_runs(out)
    assert Counter(r.info.status for r in runs) == {"FINISHED": 12, "FAILED": 4}
    assert max(Counter(r.data.tags.get("prunefield.key") for r in runs).values()) == 1

    # Running again, without faults, completes it, with the numbers of an undisturbed sweep.
    again = run(path)
    assert again.results.complete
    assert not again.results.failed
    runs = mlflow_runs(out)
    assert Counter(r.info.status for r in runs) == {"FINISHED": 2 + 2 * len(RATIOS)}
    assert not list((out / "failures").iterdir())
    assert measured(out) == undisturbed(path, tmp_path / "undisturbed")


def driver(path: Path, *more: str) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(path), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )


def wait_for(what: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_driver_that_is_interrupted_or_killed_goes_on_where_it_was(
    write_sweep: WriteSweep, tmp_path: Path
) -> None:
    path, out = (
        write_sweep(
            train={"iterations": 3000},
            prune={"criteria": ["magnitude"], "ratios": RATIOS},
            resources={"checkpoint_seconds": 0.2},
        ),
        tmp_path / "out",
    )

    # Ctrl-C once: it ends in order, and the training's state is kept.
    first = driver(path)
    wait_for(lambda: any(out.glob("running/*/state.safetensors")))
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=90)
    assert first.returncode == 130, said.decode()
    assert b"Traceback" not in said
    assert any(out.glob("running/*/state.safetensors"))
    assert not list(out.glob("leases/*.json"))
    assert {r.info.status for r in mlflow_runs(out)} == {"KILLED"}

    # SIGKILL, and again at once: no lease stands in the way, what is finished is not repeated.
    second = driver(path)
    wait_for(lambda: any(out.glob("trials/*/record.json")))
    second.kill()
    second.communicate()
    finished = {p: p.stat().st_mtime_ns for p in out.glob("*/*/record.json")}
    assert {r.info.status for r in mlflow_runs(out)} >= {"RUNNING"}
    third = run(path)
    assert third.results.complete
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    runs = mlflow_runs(out)
    assert Counter(r.info.status for r in runs) == {"FINISHED": 2 + len(RATIOS)}
    assert not list(out.glob("running/*"))
    assert not list(out.glob("leases/*.json"))
    assert json.loads((next(out.glob("sweeps/*/report/results.json"))).read_text())["trials"]
