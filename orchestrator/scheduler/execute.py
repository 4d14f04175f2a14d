"""Run a plan on Ray Tune."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from ray import tune

from orchestrator.errors import StoreError
from orchestrator.log import logger
from orchestrator.plan import Calibration, Plan, Training, Trial
from orchestrator.provenance import Origin
from orchestrator.results import Failure, Provenance, Record
from orchestrator.scheduler.cluster import capacity, connected, environment, requests
from orchestrator.scheduler.dispatch import Dispatcher
from orchestrator.scheduler.exchange import Exchange
from orchestrator.scheduler.queue import KIND, LANE, Node, PlanQueue, item_of
from orchestrator.scheduler.seeking import SearchFeed
from orchestrator.scheduler.shares import Elsewhere, Shares
from orchestrator.scheduler.table import Item
from orchestrator.scheduler.worker import BenchMaker, StageTrainable
from orchestrator.search.summary import is_finished
from orchestrator.stages import Workbench
from orchestrator.store import Store

TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # our records replace Tune's log files
    "TUNE_DISABLE_AUTO_INIT": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000",  # the store is the truth; Tune's snapshot is not read
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # the queue orders nothing by a metric
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Listener(Protocol):
    """Something that wants to know how a sweep goes."""

    def progress(self, training: Training, report: Mapping[str, Any]) -> None:
        """A training reports where it stands: iteration, loss, train_psnr, rate."""

    def started(self, total: int) -> None:
        """So many nodes are about to run."""

    def running(self, nodes: int) -> None:
        """So many are under way: trainings, and the prunings and calibrations in lanes."""

    def ended(self, record: Record | None) -> None:
        """A node ended; calibrations that succeed leave no record."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        failures: the records of what failed.
        interrupted: whether something was left undone.
    """

    failures: tuple[Record, ...]
    interrupted: bool


def execute(
    plan: Plan,
    store: Store,
    origin: Origin,
    listeners: Iterable[Listener],
    bench: BenchMaker = Workbench,
    before: Callable[[], None] = lambda: None,
    closing: ExitStack | None = None,
) -> Outcome:
    """Run what a plan misses, on the cluster at hand or on this machine.

    Every result is in the store before a listener hears of it.

    Args:
        plan: what to run.
        store: where results go.
        origin: commit and versions of this code.
        listeners: told of every report and every end, in the driver's thread.
        bench: makes the bench of each worker.
        before: called before any work, when Ray is up: what takes as long as Ray to start and must
            not fail later is waited for here. What it raises ends the run.
        closing: Ray is left when this is closed, since that takes seconds in which the caller has
            other things to do; None: at the end of this call.

    Raises:
        ClusterError: the cluster cannot be reached or cannot give what the sweep asks for.
        SearchError: the database of a search cannot be used.
        StoreError: the storage is away, also at the end; what was finished stays.
        KeyboardInterrupt: the user stopped it; what was finished stays.
    """
    audience = tuple(listeners)
    failures: list[Record] = []
    unwritten: list[Record] = []

    def on_progress(training: Training, report: dict[str, Any]) -> None:
        for listener in audience:
            listener.progress(training, report)

    def on_end(node: Node, failure: Failure | None) -> None:
        record = _record_of(node, failure, store, origin)
        if record is not None and record.failure is not None:
            failures.append(record)
            unwritten.append(record)
            with suppress(StoreError):  # Tune must not hear of it; the end tries again
                while unwritten:
                    store.write_failure(unwritten[0])
                    unwritten.pop(0)
        elif record is not None:
            store.clear_failure(record.key)
        for listener in audience:
            listener.ended(record)

    def on_running(nodes: int) -> None:
        for listener in audience:
            listener.running(nodes)

    searches = [search for search in plan.searches if not is_finished(search, store)]
    if searches:  # a database that cannot be used is better known before any work
        from orchestrator.search.search import open_study  # noqa: PLC0415  imports Optuna

        for search in searches:
            open_study(plan.sweep, search, store).close()
    feeds = [SearchFeed(plan.sweep, search, store) for search in searches]
    queue = PlanQueue(plan, on_progress, on_end, feeds, on_running, Elsewhere(store))
    for listener in audience:
        listener.started(queue.total)
    if queue.total == 0:
        before()
        return Outcome((), interrupted=False)
    with ExitStack() as own:
        shared = (closing or own).enter_context(connected())
        logger.debug("Ray is up")
        before()
        logger.debug("tracking is open")
        try:
            _fit(plan, store, origin, queue, bench, Shares() if shared else None)
        finally:
            for feed in feeds:
                feed.close()
    for record in unwritten:
        store.write_failure(record)
    for feed in feeds:
        if feed.error is not None:
            raise feed.error
    return Outcome(tuple(failures), interrupted=queue.total > 0)


def _fit(
    plan: Plan,
    store: Store,
    origin: Origin,
    queue: PlanQueue,
    bench: BenchMaker,
    shares: Shares | None,
) -> None:
    wanted = requests(plan.sweep.resources)
    everything: list[Node] = [*plan.trainings, *plan.calibrations, *plan.trials]
    nodes: dict[Item, Node] = {item_of(node): node for node in everything}
    exchange = Exchange()
    # It is made with all that it is to know now: a first call would wait until its process is up,
    # and the lanes, which start meanwhile, would wait behind it.
    expecting = queue.expecting
    dispatcher = Dispatcher(plan.sweep.resources.retries, queue.take_ready(), expecting)
    lanes = capacity(wanted[LANE])
    queue.connect(dispatcher, lanes, expecting)
    if shares is not None:
        queue.share(shares.sweeps, capacity(wanted["train"]))
    trainable = tune.with_resources(
        tune.with_parameters(
            StageTrainable,
            sweep=plan.sweep,
            store=store,
            origin=origin,
            nodes=nodes,
            exchange=exchange,
            dispatcher=dispatcher,
            gpus={kind: request.get("GPU", 1.0) for kind, request in wanted.items()},
            bench=bench,
        ),
        lambda config: tune.PlacementGroupFactory([wanted[config["kind"]]]),
    )
    try:
        # So many may start at once: otherwise lanes would start one after another.
        pending = str(lanes + len(plan.trainings))
        with (
            store.scratch("tune") as scratch,
            _quiet("ray.tune"),
            _quiet(
                "ray.tune.execution.experiment_state", logging.CRITICAL
            ),  # a snapshot nobody reads
            environment({**TUNE_ENVIRONMENT, "TUNE_MAX_PENDING_TRIALS_PG": pending}),
        ):
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(search_alg=queue, num_samples=-1, reuse_actors=True),
                run_config=tune.RunConfig(
                    name=plan.sweep.name,
                    storage_path=str(scratch),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=plan.sweep.resources.retries),
                    # Stages keep their own state in the store. Tune's checkpoints, empty as they
                    # are, would want a disk that driver and workers share.
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
    finally:
        queue.disconnect()
        if shares is not None:
            shares.leave()
        exchange.close()
        dispatcher.close()


def _record_of(node: Node, failure: Failure | None, store: Store, origin: Origin) -> Record | None:
    """The record of a node that ended: the one its worker wrote, or its failure."""
    stage = KIND[type(node)]
    if failure is None:
        if isinstance(node, Calibration):
            return None
        kind = "training" if isinstance(node, Training) else node.kind
        key = node.result if isinstance(node, Training) else node.key
        try:
            if isinstance(node, Trial) and node.look is not None and not store.has("trial", key):
                key = node.look.first_key
            return store.read_record(kind, key)
        except StoreError as error:
            failure = Failure("write", str(error))
    logger.warning("%s %s failed in %s: %s", stage, node.key, failure.stage, failure.reason)
    if isinstance(node, Calibration):
        return None  # the trials that needed it are recorded as failed
    return Record(
        kind="training" if isinstance(node, Training) else node.kind,
        key=node.result if isinstance(node, Training) else node.key,
        training=node.key if isinstance(node, Training) else node.training,
        config=node.config if isinstance(node, Training) else node.config.flat(),
        metrics={},
        views=(),
        widths={},
        provenance=Provenance(origin.commit, "", "", origin.versions, "", {}),
        failure=failure,
    )


@contextmanager
def _quiet(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Only errors of a logger: Tune warns about the log files that we told it not to write."""
    noisy = logging.getLogger(name)
    before = noisy.level
    noisy.setLevel(level)
    try:
        yield
    finally:
        noisy.setLevel(before)
