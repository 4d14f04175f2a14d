"""The logger that a sweep talks to: a queue and one background thread.

Calls return at once; MLflow is imported, opened and written by the thread, off the critical path.
What the tracking store refuses is tried again; what is left at the end is named in one warning,
and logged by the next run of the sweep, because the store keeps every record.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from orchestrator.errors import TrackingError
from orchestrator.results import Record
from orchestrator.store import Store
from orchestrator.tracking.gallery import Gallery
from orchestrator.tracking.names import SweepInfo, progress_text, shown, tracking_uri

if TYPE_CHECKING:  # MLflow takes two seconds to import: the thread does it
    from orchestrator.tracking.writer import RunWriter

log = logging.getLogger(__name__)

CURVE_SECONDS = 2.0
CURVE_POINTS = 250
PROGRESS_SECONDS = 5.0
ATTEMPTS = 4
FIRST_DELAY = 0.25
LONGEST_DELAY = 30.0
CLOSING_DELAY = 2.0
OPEN_SECONDS = 300.0  # making the tables of a new database takes a while
PROBE_AGAIN = 10.0
LAST_SECONDS = 10.0  # for what is under way when patience ends
MANY = 100

CurvePoint = tuple[int, int, Mapping[str, float]]
Action = Callable[["RunWriter"], None]


class TrackingLogger:
    """Logs one sweep to MLflow; use it as a context manager.

    ::

        with TrackingLogger(uri, "prunefield", info, store) as tracking:
            tracking.training_progress(key, step, {"psnr": 21.3})
            tracking.record(record)          # any number of times, in any order
            tracking.front(keys, {"hypervolume": hv})
            tracking.report(folder)

    Who has other things to do while the store opens calls `start`, later `opened`, and leaves the
    block to an `ExitStack`. Leaving it waits for what is queued and ends every run: the sweep's as
    FINISHED, as FAILED after an exception, as KILLED after Ctrl-C; children that had no record as
    KILLED.

    Args:
        uri: the tracking store; None for SQLite in the storage folder. `PRUNEFIELD_TRACKING_URI`
            goes before it.
        experiment: name of the MLflow experiment.
        info: what the parent run says about the sweep.
        store: where the files beside the records are.
        system_metrics: log CPU, memory, disk, network and GPU of this machine on the parent run.
        patience: seconds to wait at the end for a tracking store that does not answer; for one
            that does, as long as it takes.

    Raises:
        TrackingError: on entering, when the tracking store cannot be used.
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        info: SweepInfo,
        store: Store,
        *,
        system_metrics: bool = True,
        patience: float = 60.0,
    ) -> None:
        self.uri = tracking_uri(uri, store)
        self.experiment = experiment
        self.info = info
        self.store = store
        self.parent_run_id: str | None = None
        self.experiment_id: str | None = None
        self._system_metrics = system_metrics
        self._patience = patience
        self._jobs: queue.SimpleQueue[tuple[str, Action] | None] = queue.SimpleQueue()
        self._curves: dict[str, list[CurvePoint]] = {}
        self._curves_lock = threading.Lock()
        self._progress: Callable[[], Mapping[str, Any]] | None = None
        self._progress_at = float("-inf")
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._closed = float("inf")
        self._answered = float("-inf")
        self._well = False
        self._status = "FINISHED"
        self._error: TrackingError | None = None
        self._unlogged: list[tuple[str, str]] = []
        self._told = False

    # --- what the sweep calls --------------------------------------------------------------

    def start(self) -> None:
        """Begin to open the tracking store, without waiting for it; entering the block waits."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()

    def record(self, record: Record) -> None:
        """Log a training or a trial, failed or not; one that is logged already costs nothing."""
        self._put(f"{record.kind} {record.key}", lambda writer: writer.write_record(record))

    def training_progress(self, key: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add a point to the curves of a training under way; points travel in batches."""
        point = (step, int(time.time() * 1000), dict(metrics))
        with self._curves_lock:
            self._curves.setdefault(key, []).append(point)

    def front(
        self, keys: Iterable[str], metrics: Mapping[str, float], gallery: Gallery | None = None
    ) -> None:
        """Mark the runs of the Pareto front; metrics of the whole sweep, such as hypervolume.

        Args:
            keys: of the front's trials.
            metrics: of the whole sweep.
            gallery: pictures, tables and views of the sweep's own run.
        """
        chosen = frozenset(keys)
        if gallery is not None:
            beside = gallery.side_by_side
            self._put("the front's pictures", lambda writer: writer.write_side_by_side(beside))
        self._put("the front", lambda writer: writer.write_front(chosen, metrics))
        if gallery is not None:
            self._put("the gallery", lambda writer: writer.write_gallery(gallery))

    def report(self, folder: Path) -> None:
        """Keep the files of the report on the parent run."""
        self._put("the report", lambda writer: writer.write_report(folder))

    def watch(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Leave word of how the sweep stands, every few seconds, for whoever asks from elsewhere.

        Args:
            state: gives it, from any thread; see `orchestrator.progress.Progress.state`.
        """
        self._progress = state

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until what was given so far is logged or given up; False after ``timeout`` s."""
        done = threading.Event()
        self._put("a flush", lambda _: done.set())
        return done.wait(timeout)

    @property
    def unlogged(self) -> tuple[str, ...]:
        """What could not be logged, each with the reason."""
        return tuple(f"{what}: {why}" for what, why in self._unlogged)

    def opened(self) -> None:
        """Wait until the tracking store is open.

        Raises:
            TrackingError: it cannot be used.
        """
        if not self._ready.wait(OPEN_SECONDS):
            raise TrackingError(
                f"the tracking store {shown(self.uri)} does not answer: it takes connections, but "
                f"could not be opened in {OPEN_SECONDS:g} s; see what it is doing, then run again"
            )
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self.start()
        self.opened()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        given_up = kind is not None and issubclass(kind, KeyboardInterrupt | TrackingError)
        if self._error is not None or (given_up and not self._ready.is_set()):
            return  # it was never open
        if kind is not None:
            self._status = "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"
        self._closed = time.monotonic()
        self._closing.set()
        self._jobs.put(None)
        left = self._jobs.qsize()
        log.debug("%d results and tables are still to be logged", left)
        if left > MANY:
            log.warning(
                "the sweep is done; the tracking store still takes in %d results (Ctrl-C leaves "
                "them to the next run)",
                left,
            )
        if self._thread is not None:
            while self._thread.is_alive() and time.monotonic() < self._deadline + LAST_SECONDS:
                self._thread.join(0.5)
            if self._thread.is_alive():
                self._unlogged.append(("the rest", "the tracking store did not answer in time"))
        if self._unlogged:
            log.warning(
                "%d item%s could not be logged to the tracking store (%s). Nothing is lost: the "
                "storage %s has every result; run the sweep again to log what is missing.",
                len(self._unlogged),
                "s" * (len(self._unlogged) != 1),
                "; ".join(self.unlogged[:3]) + "; …" * (len(self._unlogged) > 3),
                self.store.address,
            )

    @property
    def _deadline(self) -> float:
        """When a store that does not answer is given up: only the end has one."""
        return max(self._closed, self._answered) + self._patience

    # --- the thread ------------------------------------------------------------------------

    def _put(self, what: str, action: Action) -> None:
        self._jobs.put((what, action))

    def _work(self) -> None:
        try:
            from orchestrator.tracking.writer import RunWriter  # noqa: PLC0415  takes two seconds

            writer = RunWriter(self.uri, self.experiment, self.info, self.store)
        except Exception as error:
            self._error = (
                error
                if isinstance(error, TrackingError)
                else TrackingError(f"the tracking store {shown(self.uri)} cannot be used: {error}")
            )
            self._ready.set()
            return
        self.parent_run_id, self.experiment_id = writer.parent, writer.experiment_id
        self._ready.set()
        if self._system_metrics:
            self._attempt(writer, "system metrics", lambda w: w.start_monitor())
        while (job := self._next()) is not None:
            self._flush_curves(writer)
            what, action = job
            if action is not None:
                self._attempt(writer, what, action)
            if time.monotonic() - self._progress_at >= PROGRESS_SECONDS:
                self._tell_progress(writer)
        self._flush_curves(writer)
        self._tell_progress(writer)
        self._attempt(writer, "the end of the sweep's run", lambda w: w.end(self._status))

    def _next(self) -> tuple[str, Action | None] | None:
        """The next job; none in a while is a job too, without an action: curves move on."""
        try:
            return self._jobs.get(timeout=CURVE_SECONDS)
        except queue.Empty:
            return "curves", None

    def _flush_curves(self, writer: "RunWriter") -> None:
        with self._curves_lock:
            curves, self._curves = self._curves, {}
        for key, points in curves.items():
            for first in range(0, len(points), CURVE_POINTS):
                part = points[first : first + CURVE_POINTS]
                self._attempt(
                    writer,
                    f"curves of training {key}",
                    lambda w, key=key, part=part: w.write_curve(key, part),  # type: ignore[misc]
                )

    def _tell_progress(self, writer: "RunWriter") -> None:
        """Once, without trying again: the next one says more."""
        from orchestrator.tracking.stores import unreachable  # noqa: PLC0415  imports MLflow

        if self._progress is None or unreachable(self.uri) is not None:
            return
        self._progress_at = time.monotonic()
        state = self._progress()
        if not state["total"]:
            return  # nothing to run: what the last run left says more
        at = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            writer.write_progress(progress_text(state, at))
        except Exception:
            log.debug("the progress could not be logged", exc_info=True)

    def _attempt(self, writer: "RunWriter", what: str, action: Action) -> None:
        """Run an action until it succeeds, fails `ATTEMPTS` times, or time is up.

        A server that nobody reaches counts as no attempt: it may come back during the sweep.
        """
        from orchestrator.tracking.stores import (  # noqa: PLC0415  imports MLflow
            brief,
            is_outage,
            unreachable,
        )

        attempts, delay = 0, FIRST_DELAY
        while True:
            well = self._well and time.monotonic() - self._answered < PROBE_AGAIN
            problem = None if well else unreachable(self.uri)
            if problem is None:
                try:
                    action(writer)
                    self._answered, self._well, self._told = time.monotonic(), True, False
                    return
                except Exception as error:
                    log.debug("logging %s failed", what, exc_info=True)
                    self._well, problem = False, brief(error)
                    attempts += not is_outage(error, self.uri)
            if self._closing.is_set():
                delay = min(delay, CLOSING_DELAY)  # somebody waits, and not for long
            if attempts >= ATTEMPTS or time.monotonic() + delay > self._deadline:
                self._unlogged.append((what, problem))
                return
            if not self._told:  # once an outage
                log.info("cannot log %s yet (%s); trying again in the background", what, problem)
                self._told = True
            if self._closing.is_set():
                time.sleep(delay)
            else:
                self._closing.wait(delay)
            delay = min(2 * delay, LONGEST_DELAY)
