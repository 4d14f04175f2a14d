"""How far a sweep goes: planning, a simulated large cluster, the report, and what they cost.

    python -m benchmarks.scale                  everything, as docs/results/reliability.md has it
    python -m benchmarks.scale cluster --trials 1000 --nodes 2 --mlflow
    python -m benchmarks.scale report --trials 400 --mlflow --pictures    what comes after the last
    python -m benchmarks.scale tail --trials 500    the same after many ratios, half of them a front

The cluster is simulated: so many logical Ray nodes on this machine, each with a GPU that does not
exist. The trials do nothing but write their records, so what is measured is the scheduler:
dispatcher, lanes, Tune, the store, the driver's listeners.
"""

import argparse
import io
import json
import os
import resource
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil

from orchestrator.plan import Calibration, Plan, Training, Trial, make_plan
from orchestrator.progress import Progress
from orchestrator.provenance import Origin
from orchestrator.report import write_report
from orchestrator.report.tables import front_json
from orchestrator.results import Provenance, Record, ViewScore
from orchestrator.scheduler.execute import execute
from orchestrator.showcase import gallery_of
from orchestrator.spec import Sweep, read_text
from orchestrator.stages import Stopwatch, Update
from orchestrator.store import Store
from orchestrator.sweep import collect, log_known, report_data, sweep_info
from orchestrator.tracking import TrackingLogger
from orchestrator.tracking.listener import TrackingListener

FILE = """
name: scale
scene: {{format: demo, path: {scene}}}
train:
  {{iterations: 10, network: {{depth: 4, width: 16, skip: 1}}, samples: {{coarse: 8, fine: 8}}}}
prune: {prune}
resources: {{train: {{cpus: 1}}, prune: {{cpus: 1, gpus: 0.25}}}}
storage: {storage}
"""
MANY_SETS = """
  networks: [both, coarse]
  criteria: [activation]
  ratios: [{ratios}]
  calibration: {{views: [1, 2], rays: [8, 16, 32, 64, 128], seeds: [{seeds}]}}
"""
MANY_RATIOS = """
  networks: both
  criteria: [activation, magnitude]
  ratios: [{ratios}]
  calibration: {{views: 2, rays: 8}}
"""
MADE_UP = "made up"


def sweep_of(trials: int, folder: Path) -> Sweep:
    """A sweep of so many trials (a multiple of 200), with a scene in a folder."""
    ratios = ", ".join(f"{i / (trials // 200 + 1):.5f}" for i in range(trials // 200))
    seeds = ", ".join(str(seed) for seed in range(10))
    return read_sweep(MANY_SETS.format(ratios=ratios, seeds=seeds), folder)


def fan_out(trials: int, folder: Path) -> Sweep:
    """A sweep of so many trials of two criteria, at half as many ratios."""
    ratios = ", ".join(f"{0.1 + 0.8 * (2 * i + 1) / trials:.5f}" for i in range(trials // 2))
    return read_sweep(MANY_RATIOS.format(ratios=ratios), folder)


def read_sweep(prune: str, folder: Path) -> Sweep:
    """A sweep of a grid, with a scene and storage in a folder."""
    text = FILE.format(scene=folder / "scene", storage=folder / "out", prune=prune)
    return read_text(text, Path("scale.yaml"))


def made_up(
    kind: Any, key: str, training: str, config: Mapping[str, Any], host: str, noise: float = 1.0
) -> Record:
    """A record as a trial would leave it, of numbers that mean nothing."""
    ratio = float(config.get("ratio") or 0.0)
    noise *= int(key[:6], 16) / 16**6
    worse = 1.0 if config.get("criterion") == "magnitude" else 0.0
    return Record(
        kind=kind,
        key=key,
        training=training,
        config=config,
        metrics={
            "mse": 0.002 + 0.01 * ratio + 0.002 * noise,
            "psnr": 27.0 - 9.0 * ratio - 2.0 * noise - worse,
            "ssim": 0.8 - 0.3 * ratio,
            "size_bytes": float(round(2e6 * (1 - ratio) ** 2 + 1000 * noise) + 5000),
            "params": 5e5 * (1 - ratio),
            "render_seconds": 0.1,
            "achieved_ratio": ratio,
        },
        views=tuple(ViewScore(v, 0.002, 27.0 - 9.0 * ratio, 0.8) for v in (0, 8, 16)),
        widths={"coarse": (16,) * 4, "fine": (16,) * 4},
        provenance=Provenance(None, MADE_UP, host, {}, "2026-01-01T00:00:00+00:00", {"prune": 0.0}),
    )


class NoWork:
    """A bench whose stages take no time: they write their records."""

    loaded_model: str | None = None
    pictures: Sequence[bytes] = ()  # of three views, as PNG
    noise = 1.0

    def __init__(self, sweep: Sweep, store: Store, origin: Origin, *_: Any) -> None:
        self.sweep, self.store, self.origin = sweep, store, origin

    def warm(self) -> None:
        """Nothing to get ready."""

    def _write(self, kind: Any, key: str, training: str, config: Mapping[str, Any]) -> None:
        with self.store.writing(kind, key) as folder:
            host = os.environ.get("RAY_NODE_ID", "") or str(os.getppid())
            for view, picture in enumerate(self.pictures if kind != "checkpoint" else ()):
                (folder / "renders").mkdir(exist_ok=True)
                for name in ("view", "error"):
                    (folder / "renders" / f"{name}_{view}.png").write_bytes(picture)
            made = made_up(kind, key, training, config, host, self.noise)
            self.store.write_record(folder, made)

    def train(self, training: Training, _: Stopwatch) -> Iterator[Update]:
        """No training."""
        self._write("checkpoint", training.key, training.key, training.config)
        self._write("training", training.result, training.key, training.config)
        yield {"iteration": 10, "loss": 0.1, "train_psnr": 20.0, "rate": 1.0, "total": 10}

    def calibrate(self, calibration: Calibration, _: Stopwatch) -> None:
        """No calibration."""
        for key in calibration.sets.values():
            with self.store.writing("statistics", key):
                pass

    def prune(self, trial: Trial, _: Stopwatch) -> None:
        """No pruning."""
        self._write("trial", trial.key, trial.training, trial.config.flat())


class MemoryOfDriver:
    """A listener that follows this process's memory as trials end."""

    def __init__(self) -> None:
        self.points: list[tuple[int, int]] = []
        self.first: float | None = None
        self.last = 0.0
        self._done = 0
        self._process = psutil.Process()

    def started(self, total: int) -> None:
        """Nothing yet."""

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:
        """Nothing."""

    def running(self, nodes: Any) -> None:
        """Nothing."""

    def ended(self, record: Record | None) -> None:
        """One more."""
        self._done += record is not None
        self.first = self.first or time.perf_counter()
        self.last = time.perf_counter()
        if self._done % 250 == 0:
            self.points.append((self._done, self._process.memory_info().rss))

    def kilobytes_a_trial(self) -> float:
        """Slope between the first quarter, when everything is loaded, and the end."""
        late = [p for p in self.points if p[0] >= self.points[-1][0] // 4]
        (a, low), (b, high) = late[0], late[-1]
        return (high - low) / 1000 / max(b - a, 1)

    def rate(self) -> float:
        """Ends a second, from the first on."""
        return (self._done - 1) / max(self.last - (self.first or 0.0), 1e-9)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds, and what came out."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def timed_alone(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Wall seconds, CPU seconds (which others on the machine change little), here and elsewhere."""
    busy, others = time.process_time(), children_seconds()
    wall, result = timed(work)
    spent = {"wall_s": wall, "cpu_s": time.process_time() - busy}
    if (elsewhere := children_seconds() - others) > 0.05:
        spent["cpu_s_of_other_processes"] = elsewhere
    return {name: round(seconds, 2) for name, seconds in spent.items()}, result


def children_seconds() -> float:
    """CPU seconds of the processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure_plan(trials: int, folder: Path) -> dict[str, Any]:
    """The time of `plan`."""
    sweep = sweep_of(trials, folder)
    store = Store(folder / "empty")
    make_plan(sweep_of(200, folder), store)  # makes the scene
    seconds, plan = timed_alone(lambda: make_plan(sweep, store))
    return {"trials": len(plan.trials), **seconds}


def measure_cluster(trials: int, nodes: int, folder: Path, mlflow: bool) -> dict[str, Any]:
    """A whole run of no-op trials on a simulated cluster, logged to MLflow on SQLite or not."""
    import ray  # noqa: PLC0415  not needed for the rest
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    os.environ["RAY_AUTH_MODE"] = "disabled"
    sweep, store = sweep_of(trials, folder), Store(folder / "out")
    store.prepare()
    plan = make_plan(sweep, store)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0})
    for _ in range(nodes):
        cluster.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    memory, origin = MemoryOfDriver(), Origin(None, {})
    logged: dict[str, Any] = {}
    try:
        with ExitStack() as stack:
            listeners: list[Any] = [memory]
            if mlflow:
                tracking = TrackingLogger(None, "scale", sweep_info(plan, origin), store)
                listeners.append(TrackingListener(stack.enter_context(tracking)))
            listeners.insert(0, stack.enter_context(Progress()))
            seconds, outcome = timed(lambda: execute(plan, store, origin, listeners, bench=NoWork))
            by_then = runs_in(store) if mlflow else 0
            ended = time.perf_counter()
        if mlflow:
            logged = {
                "logged_by_then": by_then,
                "logged": runs_in(store),
                "logging_after_s": round(time.perf_counter() - ended, 1),
                "unlogged": len(tracking.unlogged),
            }
    finally:
        ray.shutdown()
        cluster.shutdown()
    records = store.read_records("trial", [t.key for t in plan.trials])
    return {
        "trials": len(records),
        "nodes": nodes,
        "failures": len(outcome.failures),
        "seconds": round(seconds, 1),
        "trials_per_second": round(memory.rate(), 1),
        "driver_kB_per_trial": round(memory.kilobytes_a_trial(), 2),
        "driver_MB_at_the_end": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "workers": len({record.provenance.host for record in records}),
        **logged,
    }


def runs_in(store: Store) -> int:
    """How many runs in the storage's own MLflow have ended."""
    with closing(sqlite3.connect(store.root / "mlflow.db", timeout=60)) as database:
        (found,) = database.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
    return int(found[0])


def pictures(count: int) -> list[bytes]:
    """Pictures of 504×378 pixels that compress about as photos do."""
    random, found = np.random.default_rng(0), []
    for _ in range(count):
        coarse = PIL.Image.fromarray(random.integers(0, 256, (48, 63, 3), np.uint8))
        smooth = np.asarray(coarse.resize((504, 378), PIL.Image.Resampling.BICUBIC), np.float32)
        noisy = (smooth + random.normal(0.0, 2.0, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(noisy).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def fill(
    sweep: Sweep, folder: Path, shown: Sequence[bytes] = (), noise: float = 1.0
) -> tuple[Plan, Store]:
    """A store that holds the results of a whole sweep."""
    store = Store(folder / "out")
    plan = make_plan(sweep, store)
    bench = NoWork(plan.sweep, store, Origin(None, {}))
    bench.pictures, bench.noise = shown, noise
    for training in plan.trainings:
        if not training.cached:
            list(bench.train(training, Stopwatch()))
    for trial in plan.trials:
        if not trial.cached:
            bench.prune(trial, Stopwatch())
    return make_plan(plan.sweep, store), store


def measure_report(trials: int, folder: Path, with_pictures: bool, mlflow: bool) -> dict[str, Any]:
    """The times of `front` and `report`, from the sweep file to the end; of logging everything."""
    sweep = sweep_of(trials, folder)
    plan, store = fill(sweep, folder, pictures(3) if with_pictures else ())

    def front() -> Any:
        return front_json(report_data(collect(make_plan(sweep, store), store), store))

    def report() -> Any:
        data = report_data(collect(make_plan(sweep, store), store), store)
        return write_report(data, folder / "report")

    front_seconds, found = timed_alone(front)
    report_seconds, files = timed_alone(report)
    logged = {}
    if mlflow:

        def log() -> None:
            info = sweep_info(plan, Origin(None, {}))
            with TrackingLogger(None, "scale", info, store, system_metrics=False) as tracking:
                log_known(plan, store, tracking)

        logged = {"logging": timed_alone(log)[0]}
    return {
        **logged,
        "trials": found["trials"]["done"],
        "front": front_seconds,
        "report": report_seconds,
        "report_MB": round(files.html.stat().st_size / 1e6, 1),
    }


def measure_tail(trials: int, folder: Path) -> dict[str, Any]:
    """The times of what a run does after its last trial, one after another; of logging before."""
    plan, store = fill(fan_out(trials, folder), folder, pictures(3), noise=0.0)
    info, spent = sweep_info(plan, Origin(None, {})), {}
    with TrackingLogger(None, "scale", info, store, system_metrics=False) as tracking:

        def log() -> None:
            log_known(plan, store, tracking)
            tracking.flush()

        def mark() -> None:
            found = {"hypervolume": data.hypervolume or 0.0}
            tracking.front(data.front_keys, found, gallery_of(data))
            tracking.flush()

        spent["logging"], _ = timed_alone(log)
        spent["data"], data = timed_alone(lambda: report_data(collect(plan, store), store))
        spent["front"], _ = timed_alone(mark)
        spent["report"], _ = timed_alone(lambda: write_report(data, folder / "report"))
    return {"trials": len(data.done), "on_the_front": len(data.front_keys), **spent}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what", nargs="*", choices=("plan", "cluster", "report", "tail", []), default=[]
    )
    parser.add_argument("--trials", type=int, help="a multiple of 200")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--mlflow", action="store_true", help="log the trials too")
    parser.add_argument("--pictures", action="store_true", help="report: 504×378, three views each")
    options = parser.parse_args()
    what = options.what or ["plan", "cluster", "report"]
    with tempfile.TemporaryDirectory(prefix="scale.") as name:
        folder = Path(name)
        if "plan" in what:
            print("plan", json.dumps(measure_plan(options.trials or 100_000, folder)), flush=True)
        if "cluster" in what:
            measured = measure_cluster(
                options.trials or 10_000, options.nodes, folder, options.mlflow
            )
            print("cluster", json.dumps(measured), flush=True)
        if "report" in what:
            measured = measure_report(
                options.trials or 10_000, folder, options.pictures, options.mlflow
            )
            print("report", json.dumps(measured), flush=True)
        if "tail" in what:
            measured = measure_tail(options.trials or 500, folder)
            print("tail", json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
