"""Drivers that are killed, or interrupted, at random moments."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.sweeps import (
    check,
    demand,
    demand_alone,
    runs,
    said,
    sqlite,
    start,
    undisturbed,
    write,
)


def kill_drivers(folder: Path, times: int, seed: int) -> Iterator[dict[str, Any]]:
    """SIGKILL at random moments of a run; `run` again, until a sweep is whole; and anew."""
    wanted, seconds, _ = undisturbed()
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
        demand_alone(path)
        sweeps += 1
        yield {"sweep": sweeps, "starts": starts, "killed_after_s": moments, "kills": kills}


def interrupt(folder: Path, times: int, seed: int) -> Iterator[dict[str, Any]]:
    """Ctrl-C at random moments, once and twice in turn; then `run` completes the sweep."""
    wanted, seconds, _ = undisturbed()
    draw = random.Random(seed)
    for number in range(times):
        twice, moment = number % 2 == 1, draw.uniform(0.15, 1.0) * seconds
        name = f"interrupted-{number}"
        path, storage, log = write(folder, name), folder / name, folder / f"{name}.log"
        driver = start(path, log)
        try:
            driver.wait(moment)
        except subprocess.TimeoutExpired:
            os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: the driver and its own
        asked = time.monotonic()
        if twice:
            try:
                driver.wait(draw.uniform(0.1, 1.0))
            except subprocess.TimeoutExpired:
                os.killpg(driver.pid, signal.SIGINT)
        status = driver.wait(120)
        took = time.monotonic() - asked
        if status == -signal.SIGINT:  # a shell's 130 too: it was done, and Python about to end
            demand("report:" in said(log), f"it ended without a word: see {log}")
            status = 130
        demand(status in (0, 130), f"it ended with {status}: see {log}")
        demand("Traceback" not in said(log), f"a traceback: see {log}")
        demand_alone(path)
        left = Counter(state for _, state in runs(sqlite(storage)).elements())
        demand("RUNNING" not in left, "a run is left RUNNING")
        demand(not list(storage.glob("leases/*.json")), "a lease is left")
        demand(start(path, log).wait(600) == 0, f"`run` again failed: see {log}")
        check(storage, wanted, sqlite(storage))
        yield {
            "interrupted_after_s": round(moment, 1),
            "times": 1 + twice,
            "status": status,
            "ended_after_s": round(took, 1),
            "runs_then": dict(left),
        }
