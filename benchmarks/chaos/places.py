"""Places that go away, hang or fill up in the middle of a sweep: servers, a bucket, a disk."""

import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.chaos.sweeps import (
    check,
    demand,
    demand_logged,
    demand_same,
    results,
    runs,
    said,
    sqlite,
    start,
    undisturbed,
    write,
)
from orchestrator.store import Store
from orchestrator.store.objects import READ_SECONDS
from orchestrator.tracking.ui import free_port, serve
from tests.services import KEYS, Postgres, make_bucket, postgres_tools, s3_server

Driver = subprocess.Popen[bytes]


def wait_for_a_trial(driver: Driver, storage: Path) -> None:
    """Until the first trial of a sweep has its record."""
    seconds_until(driver, lambda: bool(list(storage.glob("trials/*/record.json"))))


def seconds_until(driver: Driver, what: Callable[[], bool]) -> float:
    """Wait for something while a sweep runs; the monotonic time when it was so."""
    while not what():
        demand(driver.poll() is None, "the sweep ended before that")
        time.sleep(0.05)
    return time.monotonic()


def server_away(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The MLflow server ends in the middle of a sweep, and comes back."""
    wanted, *_ = undisturbed()
    database, port = sqlite(folder / "server"), free_port()
    (folder / "server").mkdir()
    storage = folder / "away"
    uri = f"http://127.0.0.1:{port}"
    path = write(folder, "away", tracking={"uri": uri, "patience": 2 * seconds})
    with serve(database, port):
        driver = start(path, folder / "away.log")
        wait_for_a_trial(driver, storage)
    gone = time.monotonic()
    done = seconds_until(driver, lambda: len(results(storage)) == len(wanted)) - gone
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
        wait_for_a_trial(driver, storage)
    demand(driver.wait(600) == 0, "the sweep failed for a server that was away: see gone.log")
    logged = sum(runs(database).values())
    with serve(database, port):
        demand(start(path, folder / "gone.log").wait(600) == 0, "`run` again failed")
    check(storage, wanted, database)
    yield {"away": "for good", "runs_when_it_ended": logged, "after_running_again": len(wanted) + 1}


def server_hangs(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The MLflow server is stopped in the middle of a sweep: it takes connections, says nothing."""
    wanted, *_ = undisturbed()
    (folder / "server").mkdir()
    for name, patience, comes_back in (("hangs", 2 * seconds, True), ("hangs-for-good", 5, False)):
        database, storage = sqlite(folder / "server").replace("mlflow", name), folder / name
        with serve(database) as (address, server):
            assert server is not None
            path = write(folder, name, tracking={"uri": address, "patience": patience})
            driver = start(path, folder / f"{name}.log")
            wait_for_a_trial(driver, storage)
            os.killpg(server.pid, signal.SIGSTOP)
            gone = time.monotonic()
            try:
                done = seconds_until(driver, lambda s=storage: len(results(s)) == len(wanted))
                if comes_back:
                    time.sleep(max(0.0, seconds - (time.monotonic() - gone)))
                else:
                    demand(driver.wait(240) == 0, f"it failed for the server: see {name}.log")
                ended = time.monotonic()
            finally:
                os.killpg(server.pid, signal.SIGCONT)
            demand(driver.wait(600) == 0, f"it failed for the server: see {name}.log")
            if not comes_back:
                text = said(folder / f"{name}.log")
                demand(
                    "Nothing is lost" in text, f"it does not say what is missing: see {name}.log"
                )
                demand(start(path, folder / f"{name}.log").wait(600) == 0, "`run` again failed")
            demand("Traceback" not in said(folder / f"{name}.log"), f"a traceback: see {name}.log")
        check(storage, wanted, database)
        yield {
            "silent_s": seconds if comes_back else "for good",
            "results_after_s": round(done - gone, 1),
            **({} if comes_back else {"ended_s_after_its_results": round(ended - done, 1)}),
        }


@contextmanager
def postgres() -> Iterator[Postgres | None]:
    """A PostgreSQL of its own; None where it is not installed."""
    tools = postgres_tools()
    if tools is None:
        yield None
        return
    # Not under a folder that only its owner may enter: PostgreSQL refuses to run as root.
    place = Path(tempfile.mkdtemp(prefix="pg.", dir="/tmp"))
    database = Postgres(place, tools)
    os.environ["PGPASSWORD"] = database.password
    try:
        yield database
    finally:
        with suppress(RuntimeError):
            database.stop()
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def stopped(database: Postgres) -> Iterator[None]:
    """The server is ended at once, and started again afterwards."""
    database.stop()
    yield
    database.start()


def postgres_away(folder: Path, seconds: float, fault: str) -> Iterator[dict[str, Any]]:
    """PostgreSQL, which holds the runs, is away in mid-sweep.

    Args:
        folder: of the sweep.
        seconds: that it is away.
        fault: ``restart``: it is ended at once and started again; ``silence``: it takes
            connections and says nothing; ``sessions``: of the server all answer but those who
            spoke with this sweep.
    """
    wanted, *_ = undisturbed()
    with postgres() as database:
        if database is None:
            yield {"skipped": "PostgreSQL is not installed"}
            return
        storage, log = folder / fault, folder / f"{fault}.log"
        path = write(folder, fault, tracking={"uri": database.uri, "patience": 2 * seconds})
        driver = start(path, log)
        wait_for_a_trial(driver, storage)
        away = {
            "restart": lambda: stopped(database),
            "silence": database.silent,
            "sessions": lambda: database.silent(sessions_only=True),
        }[fault]
        with away():
            gone = time.monotonic()
            done = seconds_until(driver, lambda: len(results(storage)) == len(wanted))
            while driver.poll() is None and time.monotonic() < gone + seconds:
                time.sleep(0.05)
        demand(driver.wait(600) == 0, f"it failed for the database: see {log}")
        ended = time.monotonic()
        demand("Traceback" not in said(log), f"a traceback: see {log}")
        check(storage, wanted, database.uri)
        yield {
            "fault": fault,
            "away_s": seconds,
            "results_after_s": round(done - gone, 1),
            "ended_after_s": round(ended - gone, 1),
        }


def postgres_silent_for_good(folder: Path) -> Iterator[dict[str, Any]]:
    """It says nothing until the sweep has ended; before a run; then it speaks, and `run` again."""
    wanted, *_ = undisturbed()
    with postgres() as database:
        if database is None:
            yield {"skipped": "PostgreSQL is not installed"}
            return
        storage, log = folder / "for-good", folder / "for-good.log"
        path = write(folder, "for-good", tracking={"uri": database.uri, "patience": 5})
        driver = start(path, log)
        wait_for_a_trial(driver, storage)
        with database.silent():
            gone = seconds_until(driver, lambda: len(results(storage)) == len(wanted))
            demand(driver.wait(240) == 0, f"it failed for the database: see {log}")
            ended = time.monotonic()
            demand("Nothing is lost" in said(log), f"it does not say what is missing: see {log}")
            begun = time.monotonic()
            demand(start(path, log).wait(240) == 1, "`run` began without its tracking store")
            refused = time.monotonic() - begun
            demand("does not answer: no answer within" in said(log), f"it says not why: see {log}")
        demand(start(path, log).wait(600) == 0, "`run` again failed")
        demand("Traceback" not in said(log), f"a traceback: see {log}")
        check(storage, wanted, database.uri)
        yield {
            "silent": "for good",
            "ended_s_after_its_results": round(ended - gone, 1),
            "run_refused_after_s": round(refused, 1),
        }


class Way:
    """The way to a server on this machine: a port whose connections can be cut, or fall silent.

    Attributes:
        silent: while it is set, connections are taken and nothing comes through.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self.silent = threading.Event()
        self.port = free_port()
        self._listening: socket.socket | None = None
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self.open()

    def open(self) -> None:
        """Take connections."""
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._take, args=(self._listening,), daemon=True).start()

    def cut(self) -> None:
        """End the connections and refuse more."""
        if self._listening is not None:
            with suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
        for pair in tuple(self._pairs):
            for end in pair:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _take(self, listening: socket.socket) -> None:
        while True:
            try:
                near, _ = listening.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:
                return
            threading.Thread(target=self._carry, args=(near, far), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket) -> None:
        pair = (near, far)
        self._pairs.add(pair)
        with suppress(OSError), near, far:
            while True:
                for end in select.select(pair, (), ())[0]:
                    while self.silent.is_set():
                        time.sleep(0.05)
                    data = end.recv(1 << 16)
                    if not data:
                        self._pairs.discard(pair)
                        return
                    (far if end is near else near).sendall(data)
        self._pairs.discard(pair)


def bucket_away(folder: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """The bucket that holds the results cannot be reached for a while; then `run` again.

    Or it takes connections and says nothing, for longer than a request waits for an answer.
    """
    wanted, *_ = undisturbed()
    port = free_port()
    with s3_server(port) as direct:
        os.environ.update(KEYS | {"AWS_ENDPOINT_URL": direct})
        make_bucket(direct, "sweeps")
        for stage, fault in (("training", "cut"), ("pruning", "cut"), ("pruning", "silent")):
            way, name = Way(port), f"bucket-{stage}-{fault}"
            log, database = folder / f"{name}.log", sqlite(folder).replace("mlflow", name)
            storage, tracking = f"s3://sweeps/{name}", {"uri": database}
            path = write(folder, name, storage=storage, tracking=tracking)
            os.environ["PRUNEFIELD_CACHE"] = str(folder / f"{name}-looks")
            store = Store(storage)
            there = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{way.port}",
                "PRUNEFIELD_CACHE": str(folder / name),
            }
            driver = start(path, log, there)
            watched = "running" if stage == "training" else "trials"
            seconds_until(driver, lambda w=watched, s=store: bool(s._backend.names(w)))
            if fault == "cut":
                way.cut()
                time.sleep(seconds)
                way.open()
            else:
                way.silent.set()
                time.sleep(seconds + READ_SECONDS)
                way.silent.clear()
            status = driver.wait(600)
            text, before = said(log), len(store.keys("trial"))
            demand(status in (0, 1), f"it ended with {status}: see {log}")
            demand("Traceback" not in text, f"a traceback: see {log}")
            if status:
                demand(storage in text, f"it does not name the bucket: see {log}")
            states = Counter(state for _, state in runs(database).elements())
            demand("RUNNING" not in states, "a run is left RUNNING")
            starts = 1
            while status and starts < 3:  # what holds a lease for 30 s may have to be waited for
                status, starts = start(path, log, there).wait(600), starts + 1
            demand(status == 0, f"`run` again failed: see {log}")
            records = [
                store.read_record(kind, key)
                for kind in ("training", "trial")
                for key in store.keys(kind)
            ]
            timed = ("render_seconds", "train_seconds")
            demand_same(
                {r.key: {n: v for n, v in r.metrics.items() if n not in timed} for r in records},
                wanted,
            )
            for key in store.keys("trial"):
                store.verified_file("trial", key, "model.safetensors")
            demand_logged(wanted, database)
            demand(not store._backend.names("failures"), "there are failures")
            away = seconds + READ_SECONDS * (fault == "silent")
            yield {"fault": fault, "away_in": stage, "away_s": away, "trials_then": before,
                   "starts": starts}  # fmt: skip
            way.cut()


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
    wanted, _, whole = undisturbed()
    entries = [p for p in whole.glob("*/*/**/*") if p.is_file() and "scenes" not in p.parts]
    used = sum(4 * -(-p.stat().st_size // 4096) for p in entries if "mlartifacts" not in p.parts)
    database = sqlite(folder / "runs")
    (folder / "runs").mkdir()
    scene = {"format": "demo", "path": str(whole / "scenes" / "demo")}
    path = write(folder, "full", tracking={"uri": database}, scene=scene)
    with small_disk(folder / "full", used // 2):
        status = start(path, folder / "full.log").wait(600)
        have = results(folder / "full")
        text = said(folder / "full.log")
        demand(status == 1, f"`run` ended with {status} on a full disk")
        demand("No space left on device" in text, "it does not say that the disk is full")
        demand("Traceback" not in text, "a traceback: see full.log")
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
