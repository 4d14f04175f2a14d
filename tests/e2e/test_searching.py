"""A search on a real Ray, in a real database, with a driver that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from orchestrator.sweep import run
from tests.e2e import marks

pytestmark = [
    *marks.SWEEP,
    pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning"),
]

SEARCH = {
    "trials": 24,
    "batch": 4,
    "sampler": "tpe",
    "calibration": {"views": 2, "rays": 16},
    "start": {"uniform": [0.0, 0.3, 0.6], "sizes": ["12kB"]},
    "fidelity": {"rays": 32, "margin": 0.05, "audit": 2},
    "constraints": ["size_bytes <= dense"],
    "final": 3,
}


def trials_of(database: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of the only study of a database; none while it is being made."""
    url = f"sqlite:///{database}"
    try:
        (name,) = optuna.get_all_study_names(url)
        return optuna.load_study(study_name=name, storage=url).trials
    except ValueError:
        return []


def test_a_killed_search_goes_on_and_ends_whole(
    write_sweep: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_sweep(name="search", prune={"criteria": ["obs"], "ratios": [0.5]}, search=SEARCH)
    out = tmp_path / "out"
    driver = subprocess.Popen(
        [sys.executable, "-m", "orchestrator", "run", str(path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 400
        while time.monotonic() < end and driver.poll() is None:
            done = list(out.glob("trials/*/record.json"))
            if len(done) >= 5 and (out / "studies.db").is_file():
                break
            time.sleep(0.05)
        assert driver.poll() is None
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    time.sleep(2)  # what a worker was just writing is there or not
    before = {p: p.stat().st_mtime_ns for p in out.glob("trials/*/record.json")}

    finished = run(path)
    after = {p: p.stat().st_mtime_ns for p in out.glob("trials/*/record.json")}
    assert {p: after[p] for p in before} == before  # nothing that finished ran again
    trials = trials_of(out / "studies.db")
    assert Counter(t.state.name for t in trials) == {"COMPLETE": 24}
    keys = [t.user_attrs["prunefield"]["key"] for t in trials]
    assert len(set(keys)) == 24
    slots = [
        (t.user_attrs["prunefield"]["round"], t.user_attrs["prunefield"]["slot"]) for t in trials
    ]
    assert sorted(slots) == [(r, s) for r in range(6) for s in range(4)]

    # Held-out views were rendered for the dense model, the grid and the final front alone.
    records = [json.loads(p.read_text()) for p in after]
    held_out = [r for r in records if "psnr" in r["metrics"]]
    searched = [r for r in held_out if r["config"]["schedule"] == "searched"]
    assert 1 <= len(searched) <= 3
    grid = [r for r in held_out if r["config"]["schedule"] == "uniform"]
    assert len(held_out) == len(searched) + len(grid)
    assert len(grid) == len(finished.results.trials) == 2
    assert all("validation_psnr" in r["metrics"] for r in searched)
    (summary,) = [json.loads(p.read_text()) for p in out.glob("searches/*.json")]
    stopped = [t for t in summary["trials"] if t["stopped"] == "dominated"]
    audited = set(summary["audit"]["records"])
    assert len(audited) == min(2, len(stopped))
    assert audited <= {t["key"] for t in stopped}
    assert len(records) == len(held_out) + 24 + len(audited)
    assert "held-out views were rendered for the" in finished.report.html.read_text()
    known = {r.key for r in (*finished.results.searched, *finished.results.trials)}
    assert known == {r["key"] for r in records} - audited

    # Again: nothing is left to do.
    again = run(path)
    assert not again.outcome.failures
    assert {p: p.stat().st_mtime_ns for p in out.glob("trials/*/record.json")} == after
