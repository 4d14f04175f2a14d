"""Two GPUs of one host: how much faster one training gets, and how a sweep spreads over both.

::

    python benchmarks/two_gpus.py training          # no Ray: iterations a second on 1 and 2 GPUs
    python benchmarks/two_gpus.py sweep             # Ray: a sweep on both, sampled by nvidia-smi
    python benchmarks/two_gpus.py training --cpu    # two CPU processes, to try the script itself

``training`` uses the fern of ``$PRUNEFIELD_DATA`` where there is one, else the demo scene. Both
numbers of GPUs train the same batches from the same seed; the last columns compare the losses. The
fused kernels train on one GPU only: both sides run on the backend named, compiled by default.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nerf.backends import Backend
from nerf.devices import describe_device
from nerf.field import FieldShape, SampleCounts
from nerf.parallel import ParallelTrainer
from nerf.scenes import Scene, SceneSettings, load_scene
from nerf.training import Recipe, Trainer
from orchestrator.provenance import git_commit

SHAPE = FieldShape((256,) * 8, skip=4, feature=256, view=128)
SAMPLES = SampleCounts(64, 64)
SWEEP = """
name: two-gpus
scene: {scene}
storage: {storage}
train: {{iterations: {iterations}, seeds: [0, 1, 2, 3], precision: bfloat16}}
prune:
  - criteria: [activation, magnitude, random]
    ratios: [0.15, 0.3, 0.5, 0.65, 0.8, 0.95]
evaluate: {{precision: tf32}}
resources:
  train: {{gpus: {train_gpus}, cpus: 2}}
  prune: {{gpus: 0.5, cpus: 1}}
"""


def main() -> None:
    """Run one part and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("training", "sweep"))
    parser.add_argument("--rays", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--iterations", type=int, default=1000, help="timed, three times over")
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--backend", default="compiled", choices=("eager", "compiled"))
    parser.add_argument("--train-gpus", type=int, default=1, help="of each training of the sweep")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    commit = git_commit(Path(__file__).parent)
    device = torch.device("cpu" if options.cpu else "cuda")
    print(f"commit {commit}, {describe_device(device)}, PyTorch {torch.__version__}, seed 0\n")
    if options.part == "training":
        training(options)
    else:
        sweep(options)


# --- one training ----------------------------------------------------------------------------


def training(options: argparse.Namespace) -> None:
    """Iterations a second with 1 and with 2 devices, on the same batches."""
    scene, name = the_scene()
    print(f"{name}, {options.precision}, {options.backend}\n")
    print("| rays | 1 device, it/s | 2 devices, it/s | speed-up | loss, 1 | loss, 2 |")
    print("|---:|---:|---:|---:|---:|---:|")
    for rays in options.rays:
        one, two = (measure(scene, rays, count, options) for count in (1, 2))
        print(
            f"| {rays:,} | {one[0]:.1f} | {two[0]:.1f} | {two[0] / one[0]:.2f} | {one[1]:.6f} "
            f"| {two[1]:.6f} |",
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
            devices = [torch.device(kind, i if kind == "cuda" else None) for i in range(count)]
            parallel = ParallelTrainer(scene, SHAPE, SAMPLES, recipe, 0, devices, backend)
            trainer = stack.enter_context(parallel)
        trainer.advance(options.warm_up)
        stretches = [trainer.advance(options.iterations) for _ in range(3)]
    return statistics.median(s.rate for s in stretches), stretches[-1].loss


def the_scene() -> tuple[Scene, str]:
    """The fern if it is at hand, else the scene that prunefield makes."""
    fern = Path(os.environ.get("PRUNEFIELD_DATA", "data")) / "nerf_llff_data" / "fern"
    if fern.is_dir():
        return load_scene(SceneSettings(path=fern, factor=8)), "LLFF fern at factor 8"
    folder = Path(tempfile.mkdtemp(prefix="prunefield-demo-"))
    return load_scene(SceneSettings(path=folder / "demo", format="demo")), "demo scene"


# --- a sweep ---------------------------------------------------------------------------------


def sweep(options: argparse.Namespace) -> None:
    """Four trainings and 72 prunings on whatever Ray finds, and how busy each GPU was."""
    from orchestrator.sweep import run  # noqa: PLC0415  the other part does without Ray

    fern = Path(os.environ.get("PRUNEFIELD_DATA", "data")) / "nerf_llff_data" / "fern"
    scene = f"{{path: {fern.resolve()}, factor: 8}}" if fern.is_dir() else "{format: demo}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "two-gpus.yaml"
        path.write_text(
            SWEEP.format(
                scene=scene,
                storage=Path(folder) / "out",
                iterations=2 * options.iterations,
                train_gpus=options.train_gpus,
            )
        )
        started = time.perf_counter()
        with watched_gpus() as summary:
            finished = run(path)
        seconds = time.perf_counter() - started
        results = finished.results
    print(f"{len(results.trainings)} trainings, {len(results.trials)} prunings in {seconds:.1f} s")
    print(f"failed: {len(results.failed)}\n")
    print(summary())


@contextmanager
def watched_gpus() -> Iterator[Callable[[], str]]:
    """Sample nvidia-smi twice a second; gives a function that makes the table."""
    samples: dict[str, list[float]] = {}
    processes: dict[str, set[str]] = {}
    ended = threading.Event()

    def query(what: str) -> list[list[str]]:
        command = ["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            return []
        return [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]

    def watch() -> None:
        while not ended.wait(0.5):
            for gpu, busy in query("gpu=uuid,utilization.gpu"):
                samples.setdefault(gpu, []).append(float(busy))
            for gpu, pid in query("compute-apps=gpu_uuid,pid"):
                processes.setdefault(gpu, set()).add(pid)

    def table() -> str:
        rows = ["| GPU | mean utilisation | seconds busy | processes |", "|---|---:|---:|---:|"]
        for number, (gpu, busy) in enumerate(sorted(samples.items())):
            rows.append(
                f"| {number} | {statistics.mean(busy):.0f} % | {sum(b > 0 for b in busy) / 2:.0f} "
                f"| {len(processes.get(gpu, ()))} |"
            )
        return "\n".join(rows if samples else ["no GPU was seen (nvidia-smi)"])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield table
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
