"""Live progress: a panel that updates itself in a terminal, plain or JSON lines without one.

`Progress` counts; `orchestrator.panel` says how a count looks, here and in ``prunefield status``.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live

from orchestrator.panel import line, panel
from orchestrator.pareto import Rays, front, points
from orchestrator.plan import Training
from orchestrator.results import Record, method_of
from orchestrator.units import show_bytes

LINE_SECONDS = 5.0
GPU_SECONDS = 2.0
REPORTED = ("iteration", "loss", "train_psnr", "rate")
"""What a training says of itself; Ray Tune adds ids, addresses and times of its own."""


class Progress:
    """What a person sees while a sweep runs: done/total, rate, time left, best points so far.

    A listener of the scheduler; use it as a context manager. Any thread may ask for `state`.

    Args:
        console: where to write; standard error by default.
        as_json: one JSON object a line instead, for programs.
    """

    def __init__(self, console: Console | None = None, as_json: bool = False) -> None:
        self._json = as_json
        self._gpus: tuple[float, list[GpuUse]] = (float("-inf"), [])
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._lock = threading.RLock()
        self._total = 0
        self._done = 0
        self._failed = 0
        self._running = 0
        self._started = time.monotonic()
        self._pruning_since = self._started
        self._last_trial = 0.0
        self._trials = 0
        self._prepared = False
        self._closed = False
        self._training: dict[str, Mapping[str, Any]] = {}
        self._iterations: dict[str, int] = {}
        self._fronts: dict[Rays, list[Record]] = {"held-out": [], "validation": []}
        self._searching = False
        self._last_line = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._json:
            self._live = Live(self, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed = True
        if kind is None:
            self._total = self._done  # of a search, only about how many was known
        if self._live is not None:
            self._live.stop()
        if self._total and kind is None:
            self._print_line()

    # --- what the scheduler tells ----------------------------------------------------------

    def known(self, records: Iterable[Record]) -> None:
        """These have a result already: the front begins with them."""
        with self._lock:
            self._add_to_fronts([record for record in records if record.kind != "control"])

    def started(self, total: int) -> None:
        """So many nodes are about to run."""
        with self._lock:
            self._total = total
            self._started = self._pruning_since = time.monotonic()
        if total == 0 and not self._json:
            self._console.print("nothing to run: every result is in the store", highlight=False)

    def running(self, nodes: int) -> None:
        """So many are under way."""
        with self._lock:
            if nodes and not (self._running or self._done):
                self._pruning_since = time.monotonic()
            self._running = nodes

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:
        """A training reports where it stands."""
        with self._lock:
            self._training[training.key] = {k: report[k] for k in REPORTED if k in report}
            self._iterations[training.key] = training.recipe.iterations
        self._tell()

    def ended(self, record: Record | None) -> None:
        """A node ended."""
        with self._lock:
            self._count(record)
        self._tell(now=self._done == self._total)

    def _count(self, record: Record | None) -> None:
        self._done += 1
        self._total = max(self._total, self._done)  # a search knows only about how many
        trial = record is not None and record.kind != "training"
        if not trial:
            self._prepared = True
            if not self._trials:
                self._pruning_since = time.monotonic()  # no trial could end before
        if record is not None and record.failure is not None:
            self._failed += 1
        elif record is not None:
            if trial:
                self._last_trial = time.monotonic()
                self._trials += 1
            else:
                self._training.pop(record.training, None)
            if record.kind != "control":
                self._add_to_fronts([record])

    def _add_to_fronts(self, records: list[Record]) -> None:
        self._searching |= any(r.failure is None and "psnr" not in r.metrics for r in records)
        for rays, best in self._fronts.items():
            both = {record.key: record for record in (*best, *records)}
            # The final front of a search measures its models again: the same points, shown once.
            found = front(points(both.values(), rays))
            self._fronts[rays] = [
                both[key] for key in {(p.size_bytes, p.psnr): p.key for p in found}.values()
            ]

    # --- what is shown ---------------------------------------------------------------------

    def _tell(self, now: bool = False) -> None:
        if self._live is not None:
            return
        if now or time.monotonic() - self._last_line > LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print_line()

    def _print_line(self) -> None:
        if self._json:
            self._console.file.write(json.dumps(self.state()) + "\n")
            self._console.file.flush()
        else:
            self._console.print(line(self.state()), highlight=False, soft_wrap=True)

    def state(self) -> dict[str, Any]:
        """Where the sweep stands, as plain data: what the JSON lines and `status --json` hold."""
        gpus = [vars(gpu) for gpu in self._gpu_use()]  # may take a second: not under the lock
        with self._lock:
            # A search measures its trials on validation rays alone.
            rays: Rays = "validation" if self._searching else "held-out"
            quality = "validation_psnr" if self._searching else "psnr"
            return {
                "stage": self._stage(),
                "done": self._done,
                "total": self._total,
                "failed": self._failed,
                "running": self._running if self._done < self._total else 0,
                "elapsed_seconds": round(time.monotonic() - self._started, 1),
                "left_seconds": self._seconds_left(),
                "trials_per_minute": 60 * self._rate(),
                "trainings": {
                    key: {**dict(report), "iterations": self._iterations[key]}
                    for key, report in self._training.items()
                },
                "gpus": gpus,
                "front_rays": rays,
                "front": [
                    {
                        "id": record.key,
                        "size_bytes": record.metrics["size_bytes"],
                        "psnr": record.metrics[quality],
                        "model": describe(record),
                    }
                    for record in self._fronts[rays]
                ],
            }

    def _stage(self) -> str:
        """What is under way, in a word or two."""
        if self._total and self._done >= self._total:
            return "finished" if self._closed else "writing the report"
        if self._trials:
            return "training and pruning" if self._training else "pruning"
        if self._training:
            ended = all(r["iteration"] >= self._iterations[k] for k, r in self._training.items())
            return "evaluating the dense model" if ended else "training"
        return "pruning" if self._prepared else "starting"

    def _gpu_use(self) -> "list[GpuUse]":
        """Of this machine's GPUs, asked for every few seconds at most."""
        at, known = self._gpus
        if time.monotonic() - at > GPU_SECONDS:
            known = gpu_use()
            self._gpus = (time.monotonic(), known)
        return known

    def _rate(self) -> float:
        """Trials a second, from when the first of them could begin until now, or the last's end.

        Counted from the first trial's end, several that end at once would make any rate.
        """
        if not self._trials:
            return 0.0
        until = time.monotonic() if self._done < self._total else self._last_trial
        return self._trials / max(until - self._pruning_since, 1e-6)

    def _seconds_left(self) -> float | None:
        """Until all has ended; None while no trial has shown how long one takes."""
        rate = self._rate()
        return (self._total - self._done) / rate if rate > 0 else None

    def __rich__(self) -> Group:
        return panel(self.state())


def describe(record: Record) -> str:
    """A record in a few words."""
    if record.kind == "training":
        return "dense"
    config = record.config
    size = config.get("size")
    amount = f"{config.get('ratio') or 0:.0%}" if size is None else show_bytes(size)
    return f"{method_of(config)} {config.get('networks')} {amount} {config.get('schedule')}"


@dataclass(frozen=True)
class GpuUse:
    """How busy a GPU is: percent of time, and memory in MiB."""

    percent: float
    memory_mib: float
    total_mib: float


def gpu_use() -> list[GpuUse]:
    """Of the GPUs of this machine, by NVIDIA's own tool; empty where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=utilization.gpu,memory.used,memory.total"
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=2,
            check=True,
        )
        rows = [[float(v) for v in line.split(",")] for line in answer.stdout.splitlines()]
        return [GpuUse(*row) for row in rows]
    except (OSError, subprocess.SubprocessError, ValueError, TypeError):
        return []
