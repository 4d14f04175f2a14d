"""Several GPUs of one host: how much faster one training gets, and how a sweep spreads over them.

::

    python benchmarks/two_gpus.py training          # no Ray: it/s on one GPU and on all of them
    python benchmarks/two_gpus.py sweep             # Ray: a sweep on all GPUs, and on one
    python benchmarks/two_gpus.py sweep --gpus 2    # on the first two, and on one
    python benchmarks/two_gpus.py training --cpu    # two CPU processes, to try the script itself
    python benchmarks/two_gpus.py sweep --cpu       # GPUs that only Ray believes in, for the same

Both use the fern of ``$PRUNEFIELD_DATA`` where there is one, else the demo scene.

``training``: both numbers of GPUs train the same batches from the same seed; the last columns
compare the losses. Both sides run on the backend named; by default on the fused kernels where they
can.

``sweep``: four trainings (one a GPU, if there are more GPUs) and 36 prunings of each. Which GPU
did what is noted by the workers, who know it from Ray; how busy each was is sampled from nvidia-smi
while work was done on any. Wall time is that of all: Ray's start, MLflow and the report included;
"at work" is from the first stage of a worker to the last. What compiles once a machine is compiled
before. Ends with status 1 if something failed, or a GPU had no training or no pruning.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nerf.backends import Backend
from nerf.devices import describe_device
from nerf.field import FieldShape, SampleCounts
from nerf.parallel import ParallelTrainer
from nerf.scenes import Scene, SceneSettings, load_scene
from nerf.training import Recipe, Trainer
from orchestrator.plan import Calibration, Training, Trial
from orchestrator.provenance import git_commit
from orchestrator.stages import Stopwatch, Update, Workbench

SHAPE = FieldShape((256,) * 8, skip=4, feature=256, view=128)
SAMPLES = SampleCounts(64, 64)
TRAININGS = 4  # at least; one a GPU if there are more
SWEEP = """
name: several-gpus
scene: {scene}
storage: {storage}
train: {{iterations: {iterations}, seeds: {seeds}, precision: bfloat16{small}}}
prune:
  - criteria: [activation, magnitude, random]
    ratios: [0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9]
evaluate: {{precision: bfloat16{few}}}
resources:
  train: {{gpus: {train_gpus}, cpus: {train_cpus}}}
  prune: {{gpus: 0.25, cpus: {prune_cpus}}}
"""
# A sweep of seconds a stage on a CPU.
SMALL = (
    ", rays: 64, samples: {coarse: 8, fine: 8}, "
    "network: {depth: 3, width: 16, skip: 1, point_octaves: 4}"
)


def main() -> None:
    """Run one part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("training", "sweep"))
    parser.add_argument("--gpus", type=int, help="all that are visible")
    parser.add_argument("--rays", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--iterations",
        type=int,
        help="timed, three times over (1000); of each training of the sweep (4000)",
    )
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--backend", default="auto", choices=get_args(Backend))
    parser.add_argument("--train-gpus", type=int, default=1, help="of each training of the sweep")
    parser.add_argument("--only", action="store_true", help="the sweep: not on one GPU, too")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path, help="write what the sweep showed there")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU here: run it where there are some, or with --cpu to try it")
    visible = 2 if options.cpu else len(visible_gpus())
    options.gpus = options.gpus or visible
    if not options.cpu and not 1 <= options.gpus <= visible:
        raise SystemExit(f"--gpus {options.gpus}: {visible} are visible here")
    commit = git_commit(Path(__file__).parent)
    device = torch.device("cpu" if options.cpu else "cuda")
    print(f"commit {commit}, {describe_device(device)}, PyTorch {torch.__version__}, seed 0\n")
    if options.part == "training":
        training(options)
    else:
        sweep(options)


# --- one training ----------------------------------------------------------------------------


def training(options: argparse.Namespace) -> None:
    """Iterations a second with 1 device and with several, on the same batches."""
    count = max(2, options.gpus)
    scene, name = the_scene()
    print(f"{name}, {options.precision}, {options.backend}\n")
    print(f"| rays | 1 device, it/s | {count}, it/s | speed-up | loss, 1 | loss, {count} |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rays in options.rays:
        one, several = (measure(scene, rays, number, options) for number in (1, count))
        print(
            f"| {rays:,} | {one[0]:.1f} | {several[0]:.1f} | {several[0] / one[0]:.2f} "
            f"| {one[1]:.6f} | {several[1]:.6f} |",
            flush=True,
        )


def measure(
    scene: Scene, rays: int, count: int, options: argparse.Namespace
) -> tuple[float, float]:
    """The median rate of three stretches, and the loss of the last."""
    recipe = Recipe(iterations=10**9, rays=rays, precision=options.precision, density_noise=1.0)
    backend: Backend = options.backend
    kind = "cpu" if options.cpu else "cuda"
    with ExitStack() as stack:
        trainer: Trainer | ParallelTrainer
        if count == 1:
            trainer = Trainer(scene, SHAPE, SAMPLES, recipe, 0, torch.device(kind), backend)
        else:
            devices = [torch.device(f"cuda:{i}" if kind == "cuda" else kind) for i in range(count)]
            parallel = ParallelTrainer(scene, SHAPE, SAMPLES, recipe, 0, devices, backend)
            trainer = stack.enter_context(parallel)
        trainer.advance(options.warm_up)
        stretches = [trainer.advance(options.iterations or 1000) for _ in range(3)]
    return statistics.median(s.rate for s in stretches), stretches[-1].loss


def the_scene() -> tuple[Scene, str]:
    """The fern if it is at hand, else the scene that prunefield makes."""
    fern = Path(os.environ.get("PRUNEFIELD_DATA", "data")) / "nerf_llff_data" / "fern"
    if fern.is_dir():
        return load_scene(SceneSettings(path=fern, factor=8)), "LLFF fern at factor 8"
    folder = Path(tempfile.mkdtemp(prefix="prunefield-demo-"))
    return load_scene(SceneSettings(path=folder / "demo", format="demo")), "demo scene"


# --- a sweep ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """What a worker did.

    Attributes:
        what: train, calibrate or prune.
        gpus: those that Ray gave it.
        begun: seconds since the epoch.
        ended: the same.
        rate: iterations a second, the median of what a training reported.
    """

    what: str
    gpus: tuple[str, ...]
    begun: float
    ended: float
    rate: float | None


class NotingBench(Workbench):
    """A bench that notes where and when each stage was done."""

    def __init__(self, notes: Path, *arguments: Any) -> None:
        self._notes = notes
        super().__init__(*arguments)

    @contextmanager
    def _noted(self, what: str) -> Iterator[list[float]]:
        rates: list[float] = []
        begun = time.time()
        yield rates
        gpus = tuple(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
        rate = statistics.median(rates) if rates else None
        note = Note(what, gpus, begun, time.time(), rate)
        with (self._notes / f"{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(asdict(note)) + "\n")

    def train(self, training: Training, watch: Stopwatch) -> Generator[Update, None, None]:
        """A training, and the evaluation of its model."""
        with self._noted("train") as rates:
            for update in super().train(training, watch):
                if "rate" in update:
                    rates.append(update["rate"])
                yield update

    def calibrate(self, calibration: Calibration, watch: Stopwatch) -> None:
        """A calibration."""
        with self._noted("calibrate"):
            super().calibrate(calibration, watch)

    def prune(self, trial: Trial, watch: Stopwatch) -> None:
        """A trial."""
        with self._noted("prune"):
            super().prune(trial, watch)


def sweep(options: argparse.Namespace) -> None:
    """A sweep on all GPUs, and anew on one: what each did, and how long it took."""
    # Ray's workers find the same code.
    paths = (sys.path[0], os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ |= {"RAY_ADDRESS": "local", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    if options.cpu:
        print("GPUs that only Ray believes in, and no real one: the times say nothing of GPUs\n")
    else:
        print(f"compiled in {compile_all():.1f} s, which is not counted\n", flush=True)
    counts = [options.gpus]
    if not options.only and options.gpus > 1 and options.train_gpus == 1:
        counts.append(1)
    found = [run_on(count, options) for count in counts]
    print("\n| GPUs | wall time, s | at work, s | done | failed |\n|---:|---:|---:|---:|---:|")
    for of in found:
        print(f"| {of['gpus']} | {of['wall']:.1f} | {of['at_work']:.1f} ", end="")
        print(f"| {of['done']} | {of['failed']} |")
    if len(found) == 2:
        several, one = found
        wall, work = (one[name] / several[name] for name in ("wall", "at_work"))
        print(f"\n{several['gpus']} GPUs are {wall:.2f} times as fast as one, ", end="")
        print(f"{work:.2f} times at work")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    used = [gpu for gpu in found[0]["each"] if gpu["train"] and gpu["prune"]]
    if len(used) < found[0]["gpus"] or any(of["failed"] for of in found):
        raise SystemExit(f"{len(used)} of {found[0]['gpus']} GPUs had both trainings and prunings")


def run_on(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the sweep on so many GPUs and print what each of them did."""
    from orchestrator.scheduler.cluster import environment  # noqa: PLC0415  the other part
    from orchestrator.sweep import run  # noqa: PLC0415  does without Ray

    gpus = [str(n) for n in range(count)] if options.cpu else visible_gpus()[:count]
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        notes.mkdir()
        path = Path(folder) / "several-gpus.yaml"
        path.write_text(sweep_text(Path(folder) / "out", options))
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        if options.cpu:
            seen = {"RAY_OVERRIDE_RESOURCES": json.dumps({"GPU": count})}
        started = time.perf_counter()
        with environment(seen), watched_gpus() as samples:
            finished = run(path, bench=partial(NotingBench, notes))
        wall = time.perf_counter() - started
        lines = [line for file in notes.glob("*") for line in file.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"nothing was done: {finished.results.failed}")
    done = [Note(**json.loads(line)) for line in lines]
    each = [of_gpu(gpu, done, samples) for gpu in gpus]
    print(f"\non {count} GPU{'s' * (count > 1)}:\n")
    print("| GPU | trainings | it/s | calibrations | prunings | seconds at work | % utilised |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for of in each:
        numbers = (of["train"], rounded(of["rate"]), of["calibrate"], of["prune"])
        busy = f"{rounded(of['seconds'])} | {rounded(of['utilisation'])}"
        print("|", " | ".join(map(str, (of["gpu"], *numbers))), "|", busy, "|", flush=True)
    results = finished.results
    return {
        "gpus": count,
        "wall": wall,
        "at_work": max(n.ended for n in done) - min(n.begun for n in done),
        "done": len(results.trainings) + len(results.trials),
        "failed": len(results.failed),
        "each": each,
    }


def rounded(value: float | None) -> str:
    """A whole number; what was not measured is a dash."""
    return "–" if value is None else f"{value:.0f}"


def sweep_text(storage: Path, options: argparse.Namespace) -> str:
    """The sweep file."""
    fern = Path(os.environ.get("PRUNEFIELD_DATA", "data")) / "nerf_llff_data" / "fern"
    real = fern.is_dir() and not options.cpu
    return SWEEP.format(
        scene=f"{{path: {fern.resolve()}, factor: 8}}" if real else "{format: demo}",
        storage=storage,
        iterations=options.iterations or (1000 if options.cpu else 4000),
        seeds=list(range(max(TRAININGS, options.gpus))),
        small=SMALL if options.cpu else "",
        few=", max_rays: 256" if options.cpu else "",
        train_gpus=options.train_gpus,
        train_cpus=0.5 if options.cpu else 2,
        prune_cpus=0.25 if options.cpu else 1,
    )


def of_gpu(gpu: str, notes: list[Note], samples: list[tuple[float, str, float]]) -> dict[str, Any]:
    """What one GPU did: how often each stage, for how long in all, and how busy it was."""
    own = sorted((n for n in notes if gpu in n.gpus), key=lambda n: n.begun)
    counts = Counter(n.what for n in own)
    seconds, until = 0.0, 0.0
    for note in own:  # several at a time count once
        seconds += max(0.0, note.ended - max(note.begun, until))
        until = max(until, note.ended)
    begun, ended = min(n.begun for n in notes), max(n.ended for n in notes)
    busy = [percent for at, name, percent in samples if name == gpu and begun <= at <= ended]
    rates = [n.rate for n in own if n.rate is not None]
    return {
        "gpu": gpu,
        **{what: counts[what] for what in ("train", "calibrate", "prune")},
        "rate": statistics.mean(rates) if rates else None,
        "seconds": seconds,
        "utilisation": statistics.mean(busy) if busy else None,
    }


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def compile_all() -> float:
    """Compile what training and rendering need and keep it in the user's cache; gives seconds."""
    from benchmarks.fanout import warm  # noqa: PLC0415  the other part does without Ray

    started = time.perf_counter()
    device = torch.device("cuda")
    recipe = Recipe(iterations=100, rays=1024, precision="bfloat16")
    Trainer(the_scene()[0], SHAPE, SAMPLES, recipe, 0, device).advance(20)
    warm(device)
    torch.cuda.empty_cache()
    return time.perf_counter() - started


@contextmanager
def watched_gpus() -> Iterator[list[tuple[float, str, float]]]:
    """Sample nvidia-smi twice a second: when, which GPU (by number and by UUID), percent busy.

    Without nvidia-smi there are no samples.
    """
    samples: list[tuple[float, str, float]] = []
    ended = threading.Event()
    query = [
        "nvidia-smi",
        "--query-gpu=index,uuid,utilization.gpu",
        "--format=csv,noheader,nounits",
    ]

    def watch() -> None:
        while not ended.wait(0.5):
            try:
                done = subprocess.run(query, capture_output=True, text=True, check=False)
            except OSError:
                return
            for line in done.stdout.splitlines():
                number, uuid, busy = (field.strip() for field in line.split(","))
                if busy.isdigit():  # MIG says "[N/A]"
                    samples.extend((time.time(), name, float(busy)) for name in (number, uuid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
