"""Sweeps on nodes that `ray start` made, which have nothing in common but a bucket."""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from orchestrator.plan import make_plan
from orchestrator.store import Store
from orchestrator.sweep import open_sweep
from tests.e2e.driving import notes_of
from tests.e2e.machines import Machines
from tests.e2e.test_faults import undisturbed
from tests.services import KEYS, make_bucket, s3_server

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    # Ray and its dependencies, not ours: sockets and processes that they leave to the collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

WriteSweep = Callable[..., Path]
TIMED = ("render_seconds", "train_seconds")


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What reaches the bucket `sweeps`."""
    with s3_server() as endpoint:
        make_bucket(endpoint, "sweeps")
        yield {**KEYS, "AWS_ENDPOINT_URL": endpoint}


@pytest.fixture(scope="module")
def machines(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machines]:
    """A head and the nodes `one` and `two`, of one CPU each."""
    made = None
    try:
        made = Machines(tmp_path_factory.mktemp("machines"), environment)
        made.add("one", 2)
        made.add("two", 3)
        yield made
    finally:
        if made is not None:
            made.lose()


@pytest.fixture
def here(environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lets this process look into the bucket, with a folder of its own for copies."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path / "cache"))
    return tmp_path


def measured(path: Path) -> dict[str, dict[str, Any]]:
    """All metrics but times, by key; every file is checked against its hash."""
    sweep, store = open_sweep(path)
    plan = make_plan(sweep, store)
    found = {}
    for kind, key in [("training", t.result) for t in plan.trainings] + [
        ("trial", t.key) for t in plan.trials
    ]:
        record = store.read_record(kind, key)
        for name in record.files:
            store.verified_file(kind, key, name)
        found[key] = {n: v for n, v in record.metrics.items() if n not in TIMED}
    return found


def wait_until(what: Callable[[], Any], seconds: float = 300.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


def test_two_sweeps_share_a_cluster_and_a_training(
    machines: Machines, here: Path, write_sweep: WriteSweep
) -> None:
    many = [i / 40 for i in range(1, 25)]
    shared: dict[str, Any] = {"storage": "s3://sweeps/shared", "train": {"iterations": 2000}}
    files = {
        name: write_sweep(**shared, name=name, prune={"criteria": ["magnitude"], "ratios": ratios})
        for name, ratios in (("large", many), ("small", [0.7, 0.8, 0.9]))
    }
    drivers = {
        name: machines.driver(
            *(sys.executable, "-m", "tests.e2e.driving", str(path), str(here / f"{name}.notes"))
        )
        for name, path in files.items()
    }
    for name, driver in drivers.items():
        _, said = driver.communicate(timeout=600)
        assert driver.returncode == 0, f"{name}: {said}"
    notes = {name: notes_of(here / f"{name}.notes") for name in files}

    # One of them trained, from start to end in one go; the other took the model as it was.
    iterations = {
        name: [note["iteration"] for note in of if "iteration" in note]
        for name, of in notes.items()
    }
    (trained,) = filter(None, iterations.values())
    assert trained == sorted(trained)
    assert trained[-1] == 2000
    assert len(Store("s3://sweeps/shared").keys("checkpoint")) == 1

    # Each result once, as one process alone would have it.
    for name, of in notes.items():
        ended = [note["ended"] for note in of if "ended" in note]
        assert sorted(ended) == sorted(measured(files[name]))
    assert measured(files["small"]) == undisturbed(files["small"], here / "alone")

    # The small one did not wait for the large one, nor the large one for the small one.
    last = {name: max(note["time"] for note in of) for name, of in notes.items()}
    assert last["small"] < last["large"]


def test_a_machine_is_lost_and_what_it_had_is_in_the_bucket(
    machines: Machines, here: Path, write_sweep: WriteSweep
) -> None:
    path = write_sweep(
        storage="s3://sweeps/lost",
        train={"iterations": 6000},
        prune={"criteria": ["activation"], "ratios": [0.2, 0.4, 0.6]},
        resources={"checkpoint_seconds": 0.5},
    )
    store = Store("s3://sweeps/lost")
    driver = machines.driver(
        *(sys.executable, "-m", "tests.e2e.driving", str(path), str(here / "notes"))
    )

    def trainer() -> str | None:
        """Name of the machine that trains and has saved its state."""
        assert driver.poll() is None, driver.communicate()
        leases = [n for n in store._backend.names("leases") if n.startswith("training-")]
        holder = store.lease_holder(leases[0].removesuffix(".json")) if leases else None
        saved = store._backend.names("running")
        return holder.owner.host if holder is not None and saved else None

    lost = wait_until(trainer)
    assert lost in ("one", "two")
    machines.lose(lost)
    assert not machines.of(lost)
    _, said = driver.communicate(timeout=600)
    assert driver.returncode == 0, said

    # The other went on from the state in the bucket, and nobody had the driver's folders.
    iterations = [note["iteration"] for note in notes_of(here / "notes") if "iteration" in note]
    falls = [b for a, b in pairwise(iterations) if b < a]
    assert len(falls) <= 1
    assert all(iteration > iterations[0] for iteration in falls)
    assert iterations[-1] == 6000
    assert len(measured(path)) == 7
