"""Kill, drown and starve a sweep, then see that nothing is lost, doubled or wrong.

    python -m benchmarks.chaos                      everything, a quarter of an hour on 2 idle cores
    python -m benchmarks.chaos driver --times 20    SIGKILL of the driver at random moments
    python -m benchmarks.chaos server --seconds 60  the MLflow server is away for a minute
    python -m benchmarks.chaos disk                 the storage is a disk that fills up (needs root)

Each prints one line of JSON a case and ends with status 1 if something does not hold. What holds is
in docs/results/reliability.md. Killed workers, nodes, databases and damaged files are tests:
tests/e2e/test_faults.py, tests/e2e/test_nodes.py, tests/unit/test_tracking_servers.py.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml

from orchestrator.tracking.ui import free_port, serve

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


def start(path: Path, log: Path) -> subprocess.Popen[bytes]:
    """``prunefield run`` in a process of its own."""
    with log.open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "orchestrator", "run", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local", MARK: str(path)},
            cwd=ROOT,
        )


def left_running(path: Path) -> list[str]:
    """Processes that a driver of this file has left behind, its cluster's included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == str(path):
                found.append(process.name())
        except psutil.Error:
            continue
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


def check(storage: Path, wanted: dict[str, dict[str, float]], uri: str) -> None:
    """All of the undisturbed sweep's results, the same numbers, each logged once and ended."""
    have = results(storage)
    demand(set(have) == set(wanted), f"{len(have)} results instead of {len(wanted)}")
    demand(have == wanted, "other numbers than the undisturbed sweep's")
    demand(not list(storage.glob("failures/*.json")), "there are failures")
    logged = runs(uri)
    expected = Counter({(key, "FINISHED"): 1 for key in [*wanted, "sweep"]})
    demand(logged == expected, f"MLflow holds {dict(logged - expected)} instead")
    demand(not list(storage.glob("leases/*.json")), "a lease is left")
    demand(not list(storage.glob("running/*")), "the state of a training is left")


def sqlite(storage: Path) -> str:
    """The tracking store in a storage folder."""
    return f"sqlite:///{storage / 'mlflow.db'}"


def undisturbed(folder: Path) -> tuple[dict[str, dict[str, float]], float]:
    """The results of a sweep that nothing happens to, and its seconds."""
    path = write(folder, "undisturbed")
    started = time.monotonic()
    status = start(path, folder / "undisturbed.log").wait()
    demand(status == 0, f"the undisturbed sweep ended with {status}")
    return results(folder / "undisturbed"), time.monotonic() - started


# --- the cases -------------------------------------------------------------------------------


def kill_drivers(folder: Path, times: int, seed: int) -> Iterator[dict[str, Any]]:
    """SIGKILL at random moments of a run; `run` again, until a sweep is whole; and anew."""
    wanted, seconds = undisturbed(folder)
    draw, kills, sweeps = random.Random(seed), 0, 0
    while kills < times:
        name, moments, starts = f"killed-{sweeps}", [], 0
        path, storage = write(folder, name), folder / name
        finished: dict[Path, int] = {}
        while True:
            starts += 1
            driver = start(path, folder / f"{name}.log")
            moment = draw.uniform(0.1, 1.1) * seconds if kills < times else 600.0
            try:
                status = driver.wait(moment)
            except subprocess.TimeoutExpired:
                os.kill(driver.pid, signal.SIGKILL)
                driver.wait()
                kills += 1
                moments.append(round(moment, 1))
                status = None
            now = {p: p.stat().st_mtime_ns for p in storage.glob("*/*/record.json")}
            repeated = [p for p, at in finished.items() if now.get(p) != at]
            demand(not repeated, f"finished work was repeated: {repeated}")
            finished = now
            if status is not None:
                demand(status == 0, f"`run` ended with {status}: see {name}.log")
                break
        check(storage, wanted, sqlite(storage))
        end = time.monotonic() + 30
        while (left := left_running(path)) and time.monotonic() < end:
            time.sleep(0.5)
        demand(not left, f"processes are left: {left}")
        sweeps += 1
        yield {"sweep": sweeps, "starts": starts, "killed_after_s": moments, "kills": kills}


def server_away(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The MLflow server ends in the middle of a sweep, and comes back."""
    wanted, _ = undisturbed(folder)
    database, port = sqlite(folder / "server"), free_port()
    (folder / "server").mkdir()
    storage = folder / "away"
    uri = f"http://127.0.0.1:{port}"
    path = write(folder, "away", tracking={"uri": uri, "patience": 2 * seconds})
    with serve(database, port):
        driver = start(path, folder / "away.log")
        while not list(storage.glob("trials/*/record.json")):
            demand(driver.poll() is None, "the sweep ended before a trial did")
            time.sleep(0.05)
    gone = time.monotonic()
    while len(results(storage)) < len(wanted):
        demand(driver.poll() is None, "the sweep ended without its results")
        time.sleep(0.05)
    done = time.monotonic() - gone
    time.sleep(max(0.0, seconds - done))
    with serve(database, port):
        status = driver.wait(600)
    demand(status == 0, f"`run` ended with {status}: see away.log")
    check(storage, wanted, database)
    yield {"away_s": seconds, "sweep_went_on": done < seconds}

    # It never comes back during the sweep: the next run logs what is missing.
    storage, database = folder / "gone", sqlite(folder / "server-2")
    (folder / "server-2").mkdir()
    path = write(folder, "gone", tracking={"uri": uri, "patience": 2})
    with serve(database, port):
        driver = start(path, folder / "gone.log")
        while not list(storage.glob("trials/*/record.json")):
            time.sleep(0.05)
    demand(driver.wait(600) == 0, "the sweep failed for a server that was away: see gone.log")
    logged = sum(runs(database).values())
    with serve(database, port):
        demand(start(path, folder / "gone.log").wait(600) == 0, "`run` again failed")
    check(storage, wanted, database)
    yield {"away": "for good", "runs_when_it_ended": logged, "after_running_again": len(wanted) + 1}


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """A disk in memory, so large."""
    place.mkdir()
    options = f"size={kilobytes}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def disk_full(folder: Path) -> Iterator[dict[str, Any]]:
    """The storage is a disk that has room for some of the trials; then there is more room."""
    if os.getuid() != 0:
        yield {"skipped": "only root may mount a small disk"}
        return
    wanted, _ = undisturbed(folder)
    whole = folder / "undisturbed"
    entries = [p for p in whole.glob("*/*/**/*") if p.is_file() and "scenes" not in p.parts]
    used = sum(4 * -(-p.stat().st_size // 4096) for p in entries if "mlartifacts" not in p.parts)
    database = sqlite(folder / "runs")
    (folder / "runs").mkdir()
    scene = {"format": "demo", "path": str(folder / "undisturbed" / "scenes" / "demo")}
    path = write(folder, "full", tracking={"uri": database}, scene=scene)
    with small_disk(folder / "full", used // 2):
        status = start(path, folder / "full.log").wait(600)
        have = results(folder / "full")
        said = (folder / "full.log").read_text()
        demand(status == 1, f"`run` ended with {status} on a full disk")
        demand("No space left on device" in said, "it does not say that the disk is full")
        demand("Traceback" not in said, "a traceback: see full.log")
        demand(all(wanted[key] == have[key] for key in have), "a wrong result")
        statuses = Counter(status for _, status in runs(database).elements())
        demand("RUNNING" not in statuses, "a run is left RUNNING")
        resize = ["mount", "-o", "remount,size=64m", str(folder / "full")]
        subprocess.run(resize, check=True)
        demand(start(path, folder / "full.log").wait(600) == 0, "`run` again failed")
        check(folder / "full", wanted, database)
    yield {
        "needs_kB": used,
        "disk_kB": used // 2,
        "results_on_the_full_disk": len(have),
        "of": len(wanted),
    }


CASES: dict[str, Callable[[Path, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "driver": lambda folder, o: kill_drivers(folder, o.times, o.seed),
    "server": lambda folder, o: server_away(folder, o.seconds),
    "disk": lambda folder, _: disk_full(folder),
}


def main() -> int:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all")
    parser.add_argument("--times", type=int, default=20, help="kills of the driver (20)")
    parser.add_argument("--seconds", type=float, default=60, help="that the server is away (60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    broken = 0
    for name in options.cases or CASES:
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}."))
        try:
            for measured in CASES[name](folder, options):
                print(name, json.dumps(measured), flush=True)
        except DoesNotHoldError as error:
            print(name, f"DOES NOT HOLD: {error} (kept: {folder})", flush=True)
            broken += 1
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
