"""Live progress: a panel that updates itself in a terminal, plain or JSON lines without one."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.pareto import front, points
from orchestrator.plan import Training
from orchestrator.results import Record, method_of
from orchestrator.units import show_bytes

LINE_SECONDS = 5.0
GPU_SECONDS = 2.0
SHOWN_POINTS = 5


class Progress:
    """What a person sees while a sweep runs: done/total, rate, time left, best points so far.

    A listener of the scheduler; use it as a context manager.

    Args:
        console: where to write; standard error by default.
        as_json: one JSON object a line instead, for programs.
    """

    def __init__(self, console: Console | None = None, as_json: bool = False) -> None:
        self._json = as_json
        self._gpus: tuple[float, list[GpuUse]] = (float("-inf"), [])
        self._console = console or Console(file=sys.stderr)
        self._live: Live | None = None
        self._total = 0
        self._done = 0
        self._failed = 0
        self._started = time.monotonic()
        self._first_trial: float | None = None
        self._trials = 0
        self._training: dict[str, Mapping[str, Any]] = {}
        self._iterations: dict[str, int] = {}
        self._records: list[Record] = []
        self._front: list[Record] = []
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
        if self._live is not None:
            self._live.stop()
        if self._total and kind is None:
            self._print_line()

    # --- what the scheduler tells ----------------------------------------------------------

    def started(self, total: int) -> None:
        """So many nodes are about to run."""
        self._total = total
        self._started = time.monotonic()
        if total == 0 and not self._json:
            self._console.print("nothing to run: every result is in the store", highlight=False)

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:
        """A training reports where it stands."""
        self._training[training.key] = report
        self._iterations[training.key] = training.recipe.iterations
        self._tell()

    def ended(self, record: Record | None) -> None:
        """A node ended."""
        self._done += 1
        self._total = max(self._total, self._done)  # a search knows only about how many
        if record is not None and record.failure is not None:
            self._failed += 1
        elif record is not None:
            if record.kind == "training":
                self._training.pop(record.training, None)
            else:
                self._first_trial = self._first_trial or time.monotonic()
                self._trials += 1
            self._records.append(record)
            if record.kind != "control":
                on_front = {p.key for p in front(points([*self._front, record]))}
                self._front = [r for r in [*self._front, record] if r.key in on_front]
        self._tell(now=self._done == self._total)

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
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def state(self) -> dict[str, Any]:
        """Where the sweep stands, as plain data: what the JSON lines hold."""
        return {
            "stage": self._stage(),
            "done": self._done,
            "total": self._total,
            "failed": self._failed,
            "running": sorted(self._training),
            "elapsed_seconds": round(time.monotonic() - self._started, 1),
            "left_seconds": self._seconds_left(),
            "trials_per_minute": 60 * self._rate(),
            "trainings": {
                key: {**dict(report), "iterations": self._iterations[key]}
                for key, report in self._training.items()
            },
            "gpus": [vars(gpu) for gpu in self._gpu_use()],
            "front": [
                {
                    "id": record.key,
                    "size_bytes": record.metrics["size_bytes"],
                    "psnr": record.metrics["psnr"],
                    "model": describe(record),
                }
                for record in sorted(self._front, key=lambda r: r.metrics["size_bytes"])
            ],
        }

    def _stage(self) -> str:
        """What is under way, in a word or two."""
        if self._total and self._done >= self._total:
            return "finished"
        if self._training:
            return "training" if not self._trials else "training and pruning"
        return "pruning" if self._trials else "starting"

    def _gpu_use(self) -> "list[GpuUse]":
        """Of this machine's GPUs, asked for every few seconds at most."""
        at, known = self._gpus
        if time.monotonic() - at > GPU_SECONDS:
            known = gpu_use()
            self._gpus = (time.monotonic(), known)
        return known

    def _line(self) -> str:
        parts = [f"{self._done}/{self._total} done"]
        if self._failed:
            parts.append(f"{self._failed} failed")
        for key, report in self._training.items():
            parts.append(
                f"training {key[:8]}: {report['iteration']:,}/{self._iterations[key]:,} "
                f"iterations, {report['train_psnr']:.1f} dB, {report['rate']:.0f} it/s"
            )
        parts.append(self._pace())
        if best := self._best():
            record = best[-1]
            parts.append(
                f"front: {len(self._front)} points, best "
                f"{record.metrics['psnr']:.2f} dB at {record.metrics['size_bytes'] / 1e3:,.0f} kB"
            )
        return "; ".join(part for part in parts if part)

    def _pace(self) -> str:
        elapsed = time.monotonic() - self._started
        left = self._seconds_left()
        text = f"{_clock(elapsed)} elapsed"
        if self._rate() > 0:
            text += f", {self._rate() * 60:.0f} trials/min"
        return text if left is None else f"{text}, about {_clock(left)} left"

    def _rate(self) -> float:
        """Trials a second, from the first trial's end on."""
        if self._first_trial is None or self._trials < 2:
            return 0.0
        return (self._trials - 1) / max(time.monotonic() - self._first_trial, 1e-6)

    def _seconds_left(self) -> float | None:
        if self._training:
            return max(
                (self._iterations[key] - report["iteration"]) / max(report["rate"], 1e-9)
                for key, report in self._training.items()
            )
        rate = self._rate()
        return (self._total - self._done) / rate if rate > 0 else None

    def _best(self) -> list[Record]:
        """The front so far, smallest first, thinned to what fits."""
        ordered = sorted(self._front, key=lambda record: record.metrics["size_bytes"])
        if len(ordered) <= SHOWN_POINTS:
            return ordered
        picks = [round(i * (len(ordered) - 1) / (SHOWN_POINTS - 1)) for i in range(SHOWN_POINTS)]
        return [ordered[i] for i in picks]

    def __rich__(self) -> Group:
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"{self._done}/{self._total}", style="bold"),
            ProgressBar(total=max(self._total, 1), completed=self._done, width=40),
            self._pace(),
            Text(f"{self._failed} failed", style="red") if self._failed else "",
        )
        rows: list[Any] = [
            Text.assemble((self._stage(), "bold cyan"), ("  " + _gpus(self._gpu_use()), "dim")),
            head,
        ]
        for key, report in self._training.items():
            line = Table.grid(padding=(0, 1))
            line.add_row(
                f"training {key[:8]}",
                ProgressBar(total=self._iterations[key], completed=report["iteration"], width=30),
                f"{report['iteration']:,}/{self._iterations[key]:,}  {report['rate']:.0f} it/s  "
                f"loss {report['loss']:.4f}  {report['train_psnr']:.2f} dB",
            )
            rows.append(line)
        if best := self._best():
            table = Table("size", "PSNR", "model", box=None, padding=(0, 1), title="front so far")
            for record in best:
                table.add_row(
                    f"{record.metrics['size_bytes'] / 1e3:,.0f} kB",
                    f"{record.metrics['psnr']:.2f} dB",
                    describe(record),
                )
            rows.append(table)
        return Group(*rows)


def describe(record: Record) -> str:
    """A record in a few words."""
    if record.kind == "training":
        return "dense"
    config = record.config
    size = config.get("size")
    amount = f"{config.get('ratio', 0):.0%}" if size is None else show_bytes(size)
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


def _gpus(use: list[GpuUse]) -> str:
    return "  ".join(
        f"GPU {i}: {gpu.percent:.0f} %, {gpu.memory_mib / 1024:.1f} of "
        f"{gpu.total_mib / 1024:.0f} GiB"
        for i, gpu in enumerate(use)
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
