"""Do many short trials keep the GPU busy? A sweep through Ray Tune against its own GPU time.

    prunefield run sweeps/fern.yaml                          # once: the trained model
    python benchmarks/fanout.py sweeps/fern.yaml --trials 500 --json fanout.json

A sweep is made of the file's scene, training and storage (so that the trained model is there) and a
grid of prunings that no other run has: both networks, activation and magnitude, ratios from 0.1 to
0.9. It runs as any sweep does: Ray, Tune, the store, MLflow and the report included. Its wall time
is given until everything is logged and reported, and until the last trial has ended; Ray's start is
part of both. What compiles once a machine (a training does it meanwhile) is compiled before.

What the trials themselves need is measured afterwards on the same GPU, on others of the same kind
spread over the same ratios (`--sample` of them; the sum for all is extrapolated), one after another
in this process, without Ray and with nothing else running, in two ways:

- `alone`: seconds of their stages calibrate, prune and evaluate (three whole views); loading,
  writing and logging are not counted. A trial that has a GPU to itself occupies it for so long.
- `kernels`: of that, the durations of the kernels and copies alone, by CUPTI through PyTorch's
  profiler (on a CPU: CPU seconds of the process). What several at a time could reach at best.

The wall time is compared with both sums.
"""

import argparse
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml

from nerf.cameras import Rays
from nerf.devices import describe_device, resolve_device
from nerf.field import FieldShape, NerfModel, SampleCounts
from nerf.kernels import available, hopper, uniform
from nerf.rendering import RenderSettings
from orchestrator.log import logger
from orchestrator.plan import Calibration, Training, Trial, make_plan
from orchestrator.progress import Progress
from orchestrator.provenance import Origin
from orchestrator.results import Record
from orchestrator.stages import Stopwatch, Update, Workbench
from orchestrator.sweep import Finished, open_sweep, run

CRITERIA = ("activation", "magnitude")
OWN = ("calibrate", "prune", "evaluate")  # stages that are a trial's own time


class Clock(Progress):
    """Progress that knows when the driver heard of what."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, float] = {}
        self.last = 0.0

    def started(self, total: int) -> None:
        """The plan is made."""
        self.heard.setdefault("plan made", time.time())
        super().started(total)

    def ended(self, record: Record | None) -> None:
        """A node ended."""
        what = "calibration" if record is None else record.kind
        self.last = time.time()
        self.heard.setdefault(f"first {what} reported", self.last)
        super().ended(record)


class Noting(logging.Handler):
    """Keeps when the project's log said what."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Note a message."""
        self.said.setdefault(record.getMessage(), record.created)


class TimedBench(Workbench):
    """A bench that notes when it was made, and when each stage began and ended."""

    def __init__(self, notes: Path, *arguments: Any) -> None:
        self._notes = notes / f"{os.getpid()}.txt"
        self._note("up")
        super().__init__(*arguments)

    def _note(self, what: str) -> None:
        with self._notes.open("a") as file:
            file.write(f"{time.time()} {what}\n")

    def train(self, training: Training, watch: Stopwatch) -> Generator[Update, None, None]:
        """The dense model's evaluation: it is trained already."""
        self._note("evaluation begun")
        yield from super().train(training, watch)
        self._note("evaluation ended")

    def calibrate(self, calibration: Calibration, watch: Stopwatch) -> None:
        """A calibration."""
        self._note("calibration begun")
        super().calibrate(calibration, watch)
        self._note("calibration ended")

    def prune(self, trial: Trial, watch: Stopwatch) -> None:
        """A trial."""
        self._note("trial begun")
        super().prune(trial, watch)
        self._note("trial ended")


def time_line(notes: Path, started: float, said: Mapping[str, float]) -> dict[str, Any]:
    """When what happened first (in any worker, and in each), in seconds after the start."""
    first = dict(said)
    workers = []
    for path in sorted(notes.glob("*.txt")):
        lines = [line.split(" ", 1) for line in path.read_text().splitlines()]
        events = [(float(at) - started, what) for at, what in lines]
        for at, what in events:
            name = f"worker {what}" if what == "up" else what
            first[name] = min(first.get(name, math.inf), at + started)
        trials = [at for at, what in events if what.startswith("trial")]
        busy = sum(end - begin for begin, end in zip(trials[::2], trials[1::2], strict=False))
        workers.append(
            {
                "up": events[0][0],
                "first_trial": trials[0] if trials else math.nan,
                "last_trial": trials[-1] if trials else math.nan,
                "trials": len(trials) // 2,
                "in_trials": busy / max(trials[-1] - trials[0], 1e-9) if trials else 0.0,
            }
        )
    events = {what: at - started for what, at in sorted(first.items(), key=lambda e: e[1])}
    return {"events": events, "workers": workers}


def sweep_of(options: argparse.Namespace, name: str, ratios: list[float], seed: int) -> Path:
    """Write a sweep file: the given one's scene, training and storage, and a grid of our own."""
    data = yaml.safe_load(options.sweep.read_text())
    data = data.get("metadata", {}).get("sweep", data)
    sweep = {key: data[key] for key in ("scene", "train", "storage", "resources") if key in data}
    if options.storage is not None:
        sweep["storage"] = options.storage
    sweep["name"] = name
    sweep["prune"] = {
        "networks": "both",
        "criteria": list(CRITERIA),
        "ratios": ratios,
        "calibration": {"views": "all", "rays": options.rays, "seeds": seed},
    }
    if options.gpus is not None:
        prune = {**sweep.get("resources", {}).get("prune", {}), "gpus": options.gpus}
        sweep["resources"] = {**sweep.get("resources", {}), "prune": prune}
    sweep["evaluate"] = {**data.get("evaluate", {}), "precision": options.precision}
    path = Path(options.folder) / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sweep))
    return path


def ratios_of(count: int, shift: float) -> list[float]:
    """Different ratios from 0.1 to 0.9, `shift` (in [0, 1)) of a step along."""
    return [round(0.1 + 0.8 * (i + shift) / count, 9) for i in range(count)]


def busy(work: Callable[[], Any]) -> float:
    """Seconds the GPU (or this process, on a CPU) works for a call."""
    if not torch.cuda.is_available():
        started = time.process_time()
        work()
        return time.process_time() - started
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def warm(device: torch.device) -> float:
    """Compile what renders networks of any width; gives seconds. Nothing to do without kernels."""
    if device.type != "cuda" or available(device) is not None:
        return 0.0
    from nerf.fused import FusedRenderer  # noqa: PLC0415  (needs Triton)

    started = time.perf_counter()
    if torch.cuda.get_device_capability(device) == (9, 0):
        names = [uniform.Width(width).name for width in uniform.WIDTHS]
        hopper.kernels(hopper.Build(), 0, *hopper.MODULES, *names)  # side by side
    ones = torch.ones(8, 3, device=device)
    for width in (*uniform.WIDTHS, 256):
        shape = FieldShape((width,) * 8, feature=width, view=max(1, width // 2))
        model = NerfModel.create(shape, SampleCounts(), 0).to(device)
        FusedRenderer(model, RenderSettings(0.0, 1.0, False))(Rays(ones, ones, ones))
    torch.cuda.synchronize()
    return time.perf_counter() - started


def alone(options: argparse.Namespace, seed: int) -> dict[str, float]:
    """Seconds of the calibration, and of a trial on average, with nothing else running."""
    ratios = ratios_of(max(2, options.sample // len(CRITERIA)), (seed % 997) / 997)
    sweep, store = open_sweep(sweep_of(options, f"fanout-alone-{seed}", ratios, seed))
    plan = make_plan(sweep, store)
    # As many threads as a worker has: small matrices on all cores of a large host take longer.
    torch.set_num_threads(max(1, int(sweep.resources.prune.cpus)))
    bench = Workbench(sweep, store, Origin.here())
    watch = Stopwatch()
    calibrations = sum(busy(lambda c=c: bench.calibrate(c, watch)) for c in plan.calibrations)
    calibrate = watch.seconds.get("calibrate", 0.0)
    bench.prune(plan.trials[0], Stopwatch())  # kernels compile
    # In turn, so that both see every ratio and criterion.
    timed, profiled = plan.trials[1:][::2], plan.trials[1:][1::2]
    watch, started = Stopwatch(), time.perf_counter()
    for trial in timed:
        bench.prune(trial, watch)
    wall = time.perf_counter() - started
    kernels = sum(busy(lambda t=t: bench.prune(t, Stopwatch())) for t in profiled)
    stages = {name: seconds / len(timed) for name, seconds in watch.seconds.items()}
    return {
        "timed": len(timed),
        "profiled": len(profiled),
        "calibration": calibrate,
        "calibration_kernels": calibrations,
        "trial": sum(stages.get(name, 0.0) for name in OWN),
        "trial_kernels": kernels / len(profiled),
        "trial_with_loading_and_writing": wall / len(timed),
        **{f"trial_{name}": seconds for name, seconds in stages.items()},
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path, help="file of a sweep whose model is trained already")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--sample", type=int, default=60, help="trials measured alone")
    parser.add_argument("--storage", help="instead of the file's")
    parser.add_argument("--rays", type=int, default=1024, help="calibration rays a view")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--folder", default="prunefield-out/fanout", help="for the sweep files")
    parser.add_argument("--seed", type=int, help="another seed runs anew (the time)")
    parser.add_argument("--gpus", type=float, help="share of a GPU of each worker (0.25)")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def timed(path: Path, clock: Clock) -> tuple[Finished, dict[str, Any]]:
    """Run a sweep; gives its time line too, printed already."""
    noting = Noting()
    logger.addHandler(noting)
    logger.setLevel(logging.DEBUG)
    with tempfile.TemporaryDirectory() as notes:
        started = time.time()
        finished = run(path, clock, partial(TimedBench, Path(notes)))
        heard = {**noting.said, **clock.heard, "last trial reported": clock.last}
        line = time_line(Path(notes), started, {**heard, "all": time.time()})
    for what, at in line["events"].items():
        print(f"{at:8.2f} s  {what}")
    for worker in line["workers"]:
        print("  worker: " + ", ".join(f"{name} {v:.2f}" for name, v in worker.items()))
    return finished, line


def main() -> None:
    """Run the sweep, then measure its trials alone, and compare."""
    options = arguments()
    # Ray's workers find the same code.
    paths = (sys.path[0], os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    seed = int(time.time()) % 1_000_000 if options.seed is None else options.seed
    ratios = ratios_of(-(-options.trials // len(CRITERIA)), (seed % 991) / 991)
    path = sweep_of(options, f"fanout-{seed}", ratios, seed)
    sweep, store = open_sweep(path)
    plan = make_plan(sweep, store)
    if not all(training.trained for training in plan.trainings):
        raise SystemExit(f"its model is not trained yet: prunefield run {options.sweep}")
    todo = sum(not trial.cached for trial in plan.trials)
    print(f"{todo} trials of {len(plan.trials)}, {len(plan.calibrations)} calibrations", flush=True)
    try:
        compiling = warm(resolve_device("auto"))
    except Exception as failure:  # then the workers fall back or say so
        print(f"compiling before: {type(failure).__name__}: {failure}")
        compiling = math.nan
    print(f"kernels compiled in {compiling:.1f} s, which is not counted", flush=True)
    finished, line = timed(path, Clock())
    events = line["events"]
    wall, until_last = events["all"], events["last trial reported"]
    until_first = events["first trial reported"]
    records = [store.read_record("trial", trial.key) for trial in plan.trials]
    stages: dict[str, float] = {}
    for record in records:
        for stage, seconds in record.provenance.seconds.items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    print(f"{todo} trials in {wall:.1f} s of wall time, the last after {until_last:.1f} s, the")
    print(f"first after {until_first:.1f} s; now some of them alone", flush=True)
    own = alone(options, seed + 1)
    total = own["calibration"] + todo * own["trial"]
    kernels = own["calibration_kernels"] + todo * own["trial_kernels"] or math.nan
    found = {
        "hardware": describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "commit": Origin.here().commit,
        "trials": todo,
        "failures": len(finished.outcome.failures),
        "compiling_before": compiling,
        "wall": wall,
        "wall_until_last_trial": until_last,
        "until_first_trial": until_first,
        "alone_seconds": total,
        "kernel_seconds": kernels,
        "ratio": wall / total,
        "ratio_until_last_trial": until_last / total,
        "ratio_to_kernels": wall / kernels,
        "ratio_to_kernels_until_last_trial": until_last / kernels,
        "overhead_per_trial": (wall - total) / todo,
        "trials_per_minute": 60 * todo / wall,
        "stage_seconds_of_all_workers": stages,
        "alone": own,
        "time_line": line,
    }
    for name, value in found.items():
        if isinstance(value, int | float):
            print(f"{name:34} {value:10.3f}")
    for name, value in own.items():
        print(f"  alone: {name:25} {value:10.4f}")
    for stage, seconds in stages.items():
        print(f"  {stage:32} {seconds:10.3f} s, all workers together")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
