"""The sweep that the cases of `benchmarks.chaos` disturb, and what must hold of it afterwards."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import psutil
import yaml

from tests.services import environment_of

ROOT = Path(__file__).resolve().parents[2]
MARK = "PRUNEFIELD_CHAOS_RUN"
RATIOS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
SWEEP: dict[str, Any] = {
    "name": "chaos",
    "scene": {"format": "demo"},
    "train": {
        "iterations": 3000,
        "rays": 32,
        "learning_rate": 4e-3,
        "network": {"depth": 3, "width": 16, "skip": 1, "point_octaves": 4},
        "samples": {"coarse": 8, "fine": 8},
    },
    "prune": {
        "criteria": ["activation", "magnitude"],
        "ratios": RATIOS,
        "calibration": {"views": 4, "rays": 16},
    },
    "evaluate": {"max_rays": 256},
    "resources": {"checkpoint_seconds": 0.2},
}


class DoesNotHoldError(Exception):
    """Something that must hold does not."""


def demand(holds: bool, what: str) -> None:
    """Stop if something does not hold."""
    if not holds:
        raise DoesNotHoldError(what)


def write(folder: Path, name: str, **changes: Any) -> Path:
    """A sweep file whose storage is a folder beside it."""
    sweep = SWEEP | {"storage": str(folder / name)} | changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def start(
    path: Path, log: Path, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """``prunefield run`` in a process group of its own."""
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "run", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RAY_ADDRESS": "local",
                MARK: str(path),
                **(environment or {}),
            },
            cwd=ROOT,
        )


def left_running(path: Path) -> list[str]:
    """Processes that a driver of this file has left behind, its cluster's included."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and environment_of(process).get(MARK) == str(path):
                found.append(process.name())
    return found


def results(storage: Path) -> dict[str, dict[str, float]]:
    """Every metric of every record that is not a time."""
    timed = ("render_seconds", "train_seconds")
    found = {}
    for path in sorted(storage.glob("tr*/*/record.json")):
        record = json.loads(path.read_text())
        found[record["key"]] = {n: v for n, v in record["metrics"].items() if n not in timed}
    return found


def runs(uri: str) -> Counter[tuple[str, str]]:
    """Runs in MLflow by key (of the sweep's own: its hash) and status."""
    from mlflow import MlflowClient  # noqa: PLC0415  takes two seconds

    client = MlflowClient(uri)
    found = client.get_experiment_by_name("prunefield")
    every = client.search_runs([found.experiment_id], max_results=1000) if found else []
    return Counter((r.data.tags.get("prunefield.key", "sweep"), r.info.status) for r in every)


def check(storage: Path, wanted: Mapping[str, dict[str, float]], uri: str) -> None:
    """All of the undisturbed sweep's results, the same numbers, each logged once and ended."""
    demand_same(results(storage), wanted)
    demand(not list(storage.glob("failures/*.json")), "there are failures")
    demand_logged(wanted, uri)
    demand(not list(storage.glob("leases/*.json")), "a lease is left")
    demand(not list(storage.glob("running/*")), "the state of a training is left")
    demand(not list(storage.glob("tmp/*")), "a temporary folder is left")


def demand_same(have: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """The results of the undisturbed sweep, and no others."""
    demand(set(have) == set(wanted), f"{len(have)} results instead of {len(wanted)}")
    demand(have == wanted, "other numbers than the undisturbed sweep's")


def demand_logged(keys: Mapping[str, Any], uri: str) -> None:
    """Each in MLflow once, and FINISHED; nothing else."""
    logged = runs(uri)
    expected = Counter({(key, "FINISHED"): 1 for key in [*keys, "sweep"]})
    demand(logged == expected, f"MLflow holds {dict(logged - expected)} instead")


def demand_alone(path: Path, seconds: float = 30.0) -> None:
    """No process of a driver of this file is left after so many seconds."""
    end = time.monotonic() + seconds
    while (left := left_running(path)) and time.monotonic() < end:
        time.sleep(0.5)
    demand(not left, f"processes are left: {left}")


def said(log: Path) -> str:
    """What a driver has printed."""
    return log.read_text(errors="replace")


def sqlite(storage: Path) -> str:
    """The tracking store in a storage folder."""
    return f"sqlite:///{storage / 'mlflow.db'}"


@cache
def undisturbed() -> tuple[dict[str, dict[str, float]], float, Path]:
    """The results of a sweep that nothing happens to, its seconds, and where it is."""
    folder = Path(mkdtemp(prefix="chaos-undisturbed."))
    path = write(folder, "undisturbed")
    started = time.monotonic()
    status = start(path, folder / "undisturbed.log").wait()
    demand(status == 0, f"the undisturbed sweep ended with {status}")
    return results(folder / "undisturbed"), time.monotonic() - started, folder / "undisturbed"
