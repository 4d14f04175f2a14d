"""Who may do what: one driver a sweep, one worker a training."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import stages
from orchestrator.cli import main
from orchestrator.errors import StoreError
from orchestrator.plan import make_plan
from orchestrator.provenance import Origin
from orchestrator.stages import Stopwatch, Workbench
from orchestrator.store import Held, Lease, Store
from orchestrator.store.backends import LocalBackend
from orchestrator.store.leases import Owner
from orchestrator.sweep import open_sweep
from orchestrator.tracking.names import lease_of
from tests.unit.sweep_builder import mapping, sweep, text, with_scene


def test_the_second_driver_of_a_sweep_is_told_of_the_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(text(mapping(storage=str(tmp_path / "out"))))
    made, store = open_sweep(path)
    owner = replace(Owner.here("x", 30.0), user="ada", host="far", machine="other", pid=4711)
    name = lease_of(made.name, made.hash)
    store._backend.write(f"leases/{name}.json", json.dumps({"owner": asdict(owner)}).encode())
    assert main(["run", str(path)]) == 1
    said = capsys.readouterr().err
    assert "is being run already, by ada on far (process 4711) since" in said
    assert "run again" in said
    assert "Traceback" not in said
    assert store.keys("trial") == set()
    # It changed nothing: the first goes on.
    assert isinstance(store.lease(name, "x"), Held)


def test_a_training_that_another_sweep_does_is_waited_for_and_used(
    tmp_path: Path, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "WAIT_SECONDS", 0.01)
    made = with_scene(sweep(evaluate__max_rays=16), demo_folder)
    here, there = Store(tmp_path / "store"), Store(tmp_path / "store")
    plan = make_plan(made, here)
    training = plan.trainings[0]
    theirs = there.lease(f"training-{training.key}", "theirs")
    assert isinstance(theirs, Lease)
    bench = Workbench(made, here, Origin(None, {}), device="cpu")
    work = bench.train(training, Stopwatch())
    for _ in range(3):
        assert "waiting" in next(work)
    # The other sweep ends its training; ours takes the model as it is.
    other = Workbench(made, there, Origin("theirs", {}), device="cpu")
    theirs.release()
    list(other.train(training, Stopwatch()))
    assert [update for update in work if "iteration" in update] == []
    assert here.read_record("checkpoint", training.key).provenance.commit == "theirs"
    assert here.read_record("training", training.result).provenance.commit == "theirs"


def test_a_training_whose_worker_died_elsewhere_is_taken_over(
    tmp_path: Path, demo_folder: Path
) -> None:
    made = with_scene(sweep(evaluate__max_rays=16), demo_folder)
    store = Store(tmp_path / "store")
    training = make_plan(made, store).trainings[0]
    bench = Workbench(made, store, Origin(None, {}), device="cpu")
    bench.scene()  # made on the first call, which takes its time
    owner = replace(Owner.here("x", 1.0), host="far", machine="other")
    name = f"leases/training-{training.key}.json"
    store._backend.write(name, json.dumps({"owner": asdict(owner)}).encode())
    updates = list(bench.train(training, Stopwatch()))
    assert "waiting" in updates[0]
    assert updates[-1]["iteration"] == training.recipe.iterations
    assert store.has("checkpoint", training.key)
    assert store.lease_holder(f"training-{training.key}") is None


def test_a_lease_outlives_a_storage_that_is_away_for_longer_than_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, away = Store(tmp_path / "store"), threading.Event()
    swap = LocalBackend.swap

    def unsteady(*arguments: Any) -> str | None:
        if away.is_set():
            raise StoreError("synthetic: the storage is away")
        return swap(*arguments)

    monkeypatch.setattr(LocalBackend, "swap", unsteady)
    lease = store.lease("x", "a test", seconds=0.3)
    assert isinstance(lease, Lease)
    away.set()
    wait_until(lambda: lease.lost)
    away.clear()
    wait_until(lambda: not lease.lost)
    assert json.loads(store.read_text("leases/x.json") or "")["owner"]["nonce"] == lease.owner.nonce
    # Had somebody taken it meanwhile, it would be theirs.
    away.set()
    wait_until(lambda: lease.lost)
    theirs = replace(lease.owner, nonce="theirs")
    store._backend.write("leases/x.json", json.dumps({"owner": asdict(theirs)}).encode())
    away.clear()
    lease._thread.join(10)
    assert not lease._thread.is_alive()
    assert lease.lost
    lease.release()
    assert store.read_text("leases/x.json") == json.dumps({"owner": asdict(theirs)})


def wait_until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
