"""The story of a sweep: read this first."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nerf.devices import describe_device, resolve_device
from orchestrator.baselines import unpruned
from orchestrator.errors import SweepError
from orchestrator.log import logger
from orchestrator.pareto import Reference, default_reference
from orchestrator.plan import Plan, make_plan
from orchestrator.progress import Progress
from orchestrator.provenance import Origin
from orchestrator.report import ReportData, ReportFiles, write_report
from orchestrator.results import Record
from orchestrator.scheduler.execute import Outcome, execute
from orchestrator.search.summary import searched
from orchestrator.showcase import gallery_of
from orchestrator.spec import Sweep, load, relocated
from orchestrator.stages import Workbench
from orchestrator.store import Held, Store
from orchestrator.tracking import SweepInfo, TrackingLogger
from orchestrator.tracking.listener import TrackingListener
from orchestrator.tracking.names import lease_of
from orchestrator.units import typed


@dataclass(frozen=True)
class Finished:
    """What a run of a sweep gives.

    Attributes:
        results: every record of the sweep.
        data: the same, as the report shows it.
        report: where the report is.
        outcome: failures and interruptions of this run.
    """

    results: "Results"
    data: ReportData
    report: ReportFiles
    outcome: Outcome


def run(
    path: Path | str, progress: Progress | None = None, bench: Callable[..., Workbench] = Workbench
) -> Finished:
    """Run a sweep file: train once, prune many, compare. Running it again runs what is missing.

    Args:
        path: the sweep file.
        progress: what a person sees meanwhile.
        bench: makes the bench of each worker.

    Raises:
        SpecError, SceneError, ClusterError, TrackingError, StoreError: before anything ran.
        SweepError: another process runs it already.
        KeyboardInterrupt: it was interrupted; what was finished is kept, logged and reported.
    """
    sweep, store = open_sweep(path)
    plan = make_plan(sweep, store)
    store.prepare()
    origin = Origin.here()
    show = progress or Progress()
    with alone(sweep, store), ExitStack() as closing, show:
        tracking = TrackingLogger(
            sweep.tracking.uri,
            sweep.tracking.experiment,
            sweep_info(plan, origin),
            store,
            patience=sweep.tracking.patience,
        )
        tracking.start()  # it opens while Ray starts: both take seconds
        closing.push(tracking)
        tracking.watch(show.state)
        show.known(log_known(plan, store, tracking))
        listeners = (show, TrackingListener(tracking))
        outcome = execute(plan, store, origin, listeners, bench, tracking.opened, closing)
        results = collect(plan, store)
        if not results.trainings and not results.failed:
            raise KeyboardInterrupt
        data = report_data(results, store)
        found = {"hypervolume": data.hypervolume or 0.0}
        tracking.front(data.front_keys, found, gallery_of(data))  # logged while the report is drawn
        report = write_report(data, report_folder(sweep, store))
        logger.debug("report written")
        tracking.report(report.html.parent)
        if outcome.interrupted:
            raise KeyboardInterrupt
    return Finished(results, data, report, outcome)


@contextmanager
def alone(sweep: Sweep, store: Store) -> Iterator[None]:
    """Keep a sweep to one driver for the time of a block.

    Raises:
        SweepError: another process runs it.
    """
    lease = store.lease(lease_of(sweep.name, sweep.hash), f"sweep {sweep.name}")
    if isinstance(lease, Held):
        raise SweepError(
            f"sweep {sweep.name!r} is being run already, by {lease}. Wait for it; or end it there "
            "and run again, which goes on from what is finished. If it has died on another "
            f"machine, running again is possible in {lease.left:.0f} s"
        )
    with lease:
        yield


# --- the steps -------------------------------------------------------------------------------


def open_sweep(path: Path | str) -> tuple[Sweep, Store]:
    """Read a sweep file; its storage folder is not made yet.

    Raises:
        SpecError: the file holds mistakes.
        StoreError: the storage does not answer.
    """
    sweep = load(path)
    store = Store(sweep.storage)
    store.reach()
    return relocated(sweep, store.root), store


@dataclass(frozen=True)
class Results:
    """All that the store knows of a sweep.

    Attributes:
        plan: the sweep's plan.
        trainings: evaluations of the dense models.
        trials: prunings, and the controls beside them.
        failed: trainings and trials that failed and have no result since.
        searched: trials of searches; those of the final front have held-out scores.
    """

    plan: Plan
    trainings: tuple[Record, ...]
    trials: tuple[Record, ...]
    failed: tuple[Record, ...]
    searched: tuple[Record, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return len(self.trainings) == len(self.plan.trainings) and len(self.trials) == len(
            self.plan.trials
        )


def collect(plan: Plan, store: Store) -> Results:
    """Read every record of a sweep that the store holds."""
    have = {kind: store.keys(kind) for kind in ("training", "trial", "control")}
    known_failures = store.failed_keys()
    failed = []

    def records(wanted: Iterable[tuple[str, str]]) -> tuple[Record, ...]:
        found: list[tuple[str, str]] = []
        for kind, key in wanted:
            if key in have[kind]:
                found.append((kind, key))
            elif key in known_failures and (failure := store.read_failure(key)):
                failed.append(failure)
        read = {
            kind: store.read_records(kind, [k for of, k in found if of == kind]) for kind in have
        }
        by_key = {(kind, record.key): record for kind, of in read.items() for record in of}
        return tuple(by_key[entry] for entry in found)

    trainings = records(("training", t.result) for t in plan.trainings)
    trials = records((t.kind, t.key) for t in plan.trials)
    found = [searched(search, store) for search in plan.searches]
    planned = {t.key for t in plan.trials}
    of_searches = dict.fromkeys(
        key for of in found for key in (*of.trials, *of.final, *of.failed) if key not in planned
    )
    tried = records(("trial", key) for key in of_searches)
    return Results(plan, trainings, trials, tuple(failed), tried)


def results_of(path: Path | str) -> tuple[Results, Store]:
    """What the store knows of a sweep file.

    Raises:
        SpecError, SceneError, StoreError: the sweep cannot be read.
        SweepError: it has no results yet.
    """
    sweep, store = open_sweep(path)
    results = collect(make_plan(sweep, store), store)
    if not results.trials and not results.trainings:
        raise SweepError(
            f"sweep {sweep.name!r} has no results in {store.address} yet; "
            f"run it first: prunefield run {typed(path)}"
        )
    return results, store


def log_known(plan: Plan, store: Store, tracking: TrackingLogger) -> tuple[Record, ...]:
    """Hand the tracking store what an earlier run finished; what it has already costs nothing.

    Returns:
        The records of all that.
    """
    known = collect(plan, store)
    records = (*known.trainings, *known.trials, *known.searched)
    for record in records:
        tracking.record(record)
    return records


def sweep_info(plan: Plan, origin: Origin) -> SweepInfo:
    """What the sweep's run in MLflow says about it."""
    sweep = plan.sweep
    counts = plan.summary()
    return SweepInfo(
        name=sweep.name,
        hash=sweep.hash,
        yaml=sweep.text,
        commit=origin.commit,
        hardware=describe_device(resolve_device("auto")),
        seed=sweep.train_seeds[0],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        description=sweep.description,
        planned={
            **{what: counts[f"{what}s"]["total"] for what in ("training", "calibration", "trial")},
            **({"search trial": counts["search"]["trials"]} if plan.searches else {}),
        },
    )


def report_data(results: Results, store: Store) -> ReportData:
    """What the report of a sweep shows."""
    sweep = results.plan.sweep
    largest = default_reference(results.trainings)
    return ReportData(
        name=sweep.name,
        hash=sweep.hash,
        dense=(*results.trainings, *(r for r in results.failed if r.kind == "training")),
        trials=tuple(
            r for r in (*results.trials, *results.searched, *results.failed) if r.kind == "trial"
        ),
        controls=(
            *(r for r in (*results.trials, *results.failed) if r.kind == "control"),
            *unpruned(results.plan, store),
        ),
        store=store,
        reference=largest and Reference(largest.size_bytes, sweep.report.reference_psnr),
        ratios=sweep.report.ratios,
        description=" ".join(
            filter(
                None,
                (
                    sweep.description,
                    *(searched(s, store).sentence for s in results.plan.searches),
                ),
            )
        ),
        commit=Origin.here().commit,
        seed=sweep.train_seeds[0],
        scene=sweep.scene.path.name if sweep.scene.path else "",
        scene_path=sweep.scene.path and sweep.scene.path.absolute(),
    )


def report_folder(sweep: Sweep, store: Store) -> Path:
    """Where the report of a sweep goes by default."""
    return store.root / "sweeps" / f"{sweep.name}-{sweep.hash}" / "report"
