"""A bench on which given stages of given work go wrong, as often as asked.

Like the real one in all else. What is to go wrong is a list of `Fault`, as JSON in an environment
variable; that it has happened is a file, so that a new worker process knows it too.
"""

import errno
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from orchestrator.plan import Calibration, Training, Trial
from orchestrator.stages import Stopwatch, Update, Workbench

VARIABLE = "PRUNEFIELD_CHAOS"


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
        name: tells it from the others.
        work: ``train``, ``calibrate`` or ``prune``.
        stage: as it is begun: load, train, calibrate, prune, evaluate, write.
        what: ``kill`` (SIGKILL of the worker), ``hang``, ``memory`` (raises what a full GPU
            raises), ``cap`` (the worker gets no more GPU memory in that stage, so that it
            really runs out of it), ``disk`` (no space left), ``slow`` (a second more).
        times: how often.
        ratio: only prunings of this ratio.
        criterion: only prunings of this criterion.
        rays: only trainings of so many rays a step.
        after: so often the stage is begun before it goes wrong.
    """

    name: str
    work: str
    stage: str
    what: str
    times: int = 1
    ratio: float | None = None
    criterion: str | None = None
    rays: int | None = None
    after: int = 0


def environment(faults: list[Fault], folder: Path) -> dict[str, str]:
    """What a driver's environment must hold; its workers inherit it."""
    folder.mkdir(parents=True, exist_ok=True)
    return {VARIABLE: json.dumps({"folder": str(folder), "faults": [asdict(f) for f in faults]})}


def happened(folder: Path) -> list[str]:
    """Names of what went wrong, once for each time."""
    return sorted(path.name.rpartition(".")[0] for path in folder.glob("*.[0-9]*"))


class FaultyBench(Workbench):
    """A bench with the faults of the environment."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        given = json.loads(os.environ[VARIABLE])
        self.folder = Path(given["folder"])
        self.faults = [Fault(**fault) for fault in given["faults"]]

    def train(self, training: Training, watch: Stopwatch) -> Iterator[Update]:
        """As usual; the iterations that each worker reported are kept for those who check."""
        _sabotage(watch, self, "train", training)
        for update in super().train(training, watch):
            if "iteration" in update:
                line = f"{os.getpid()} {update['iteration']}\n"
                with (self.folder / f"iterations-{training.key}").open("a") as stream:
                    stream.write(line)
            yield update

    def calibrate(self, calibration: Calibration, watch: Stopwatch) -> None:
        """As usual."""
        _sabotage(watch, self, "calibrate", calibration)
        super().calibrate(calibration, watch)

    def prune(self, trial: Trial, watch: Stopwatch) -> None:
        """As usual."""
        _sabotage(watch, self, "prune", trial)
        super().prune(trial, watch)


class _Saboteur(Stopwatch):
    bench: FaultyBench
    work: str
    node: Any
    capped: bool = False
    held: list[torch.Tensor]

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        with super().during(stage):
            for fault in self.bench.faults:
                if fault.work == self.work and fault.stage == stage and self._fits(fault):
                    self._perhaps(fault)
            try:
                yield
            finally:
                if self.capped:
                    self.held.clear()
                    torch.cuda.set_per_process_memory_fraction(1.0)
                    self.capped = False

    def _fits(self, fault: Fault) -> bool:
        config = getattr(self.node, "config", None)
        ratio, criterion = getattr(config, "ratio", None), getattr(config, "criterion", None)
        rays = getattr(getattr(self.node, "recipe", None), "rays", None)
        pairs = ((fault.ratio, ratio), (fault.criterion, criterion), (fault.rays, rays))
        return all(wanted in (None, have) for wanted, have in pairs)

    def _perhaps(self, fault: Fault) -> None:
        if not _first(self.bench.folder, f"{fault.name}.before", fault.after):
            return
        if _first(self.bench.folder, fault.name, fault.times):
            return
        if fault.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.what == "hang":
            time.sleep(10_000)
        elif fault.what == "memory":
            raise torch.cuda.OutOfMemoryError("tried to allocate 2.00 GiB")
        elif fault.what == "cap":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1e-6)
            self.capped = True
            self.held = all_that_is_left(partial(torch.empty, dtype=torch.uint8, device="cuda"))
        elif fault.what == "disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        elif fault.what == "slow":
            time.sleep(1.0)


def all_that_is_left(
    allocate: Callable[[int], torch.Tensor], largest: int = 2**32, smallest: int = 2**9
) -> list[torch.Tensor]:
    """Allocate until nothing more is given: a process has room within what it holds already.

    Args:
        allocate: gives so many bytes, or raises ``torch.cuda.OutOfMemoryError``.
        largest: bytes tried first.
        smallest: bytes below which nothing is tried; an allocator rounds up to some size.
    """
    held, size = [], largest
    while size >= smallest:
        try:
            held.append(allocate(size))
        except torch.cuda.OutOfMemoryError:
            size //= 2
    return held


def _first(folder: Path, name: str, times: int) -> bool:
    """Whether something has happened so often already; if not, it has now once more."""
    for number in range(times):
        try:
            (folder / f"{name}.{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return False
    return True


def _sabotage(watch: Stopwatch, bench: FaultyBench, work: str, node: Any) -> None:
    watch.__class__ = _Saboteur  # the worker keeps this very watch, to name the stage that failed
    watch.bench, watch.work, watch.node = bench, work, node  # type: ignore[attr-defined]
