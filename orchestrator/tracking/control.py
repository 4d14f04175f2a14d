"""A submitted sweep, watched and stopped from anywhere that reaches its tracking server.

The driver and whoever looks meet in the tags of the sweep's run: the driver says which job it is
and that it is alive, and copies its output to the artifact ``log.txt``; ``prunefield stop`` leaves
the job's id in a tag, which the driver reads every few seconds.
"""

import json
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities import Run, RunTag

from orchestrator.errors import SweepError
from orchestrator.log import logger
from orchestrator.tracking import names
from orchestrator.tracking.stores import brief, open_client, quiet, unreachable

JOB = "prunefield.job"
CLUSTER = "prunefield.cluster"
HEARTBEAT = "prunefield.heartbeat"
STOP = "prunefield.stop"
LOG = "log.txt"
PERIOD = 5.0
MAX_LOG = 10_000_000
END_SECONDS = 30.0
SILENT_SECONDS = 60.0
"""After so long without a sign of life the driver is taken for dead."""


@dataclass(frozen=True)
class Job:
    """Where a driver runs.

    Attributes:
        id: of the Ray job.
        cluster: name of the Ray cluster, empty if it has none.
    """

    id: str
    cluster: str


class Control:
    """The driver's side; a context manager with a thread.

    Args:
        uri: the tracking store.
        experiment: name of the experiment.
        sweep_hash: finds the sweep's run, which the tracking logger makes.
        job: what this driver is.
        log: file with what it prints.
        stop: called once when somebody asks for an end.
        period: seconds between two looks.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        sweep_hash: str,
        job: Job,
        log: Path,
        stop: Callable[[], None],
        period: float = PERIOD,
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._hash = sweep_hash
        self._job = job
        self._log = log
        self._stop: Callable[[], None] | None = stop
        self._period = period
        self._run_id: str | None = None
        self._logged = -1
        self._started = int(datetime.now(UTC).timestamp() * 1000)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="control", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(END_SECONDS)

    def _watch(self) -> None:
        client: MlflowClient | None = None
        while True:
            last = self._ended.wait(self._period)
            try:
                if unreachable(self._uri) is None:
                    with quiet():
                        client = client or MlflowClient(tracking_uri=self._uri)
                        self._look(client)
            except Exception as error:  # the sweep goes on whether or not anybody can watch it
                logger.debug("the sweep's run could not be told: %s", brief(error))
            if last:
                return

    def _look(self, client: MlflowClient) -> None:
        if self._run_id is None:
            # Before the tracking logger has opened the run, that of an earlier job may be there.
            run = find_run(client, self._experiment, digest=self._hash)
            if run is None or (run.info.status != "RUNNING" and not self._ended.is_set()):
                return
            self._run_id = run.info.run_id
            self._tag(client, {JOB: self._job.id, CLUSTER: self._job.cluster})
        asked = client.get_run(self._run_id).data.tags.get(STOP)
        if asked == self._job.id and self._stop is not None:
            stop, self._stop = self._stop, None
            logger.warning("somebody asked for this sweep to stop")
            stop()
        self._tag(client, {HEARTBEAT: datetime.now(UTC).isoformat(timespec="seconds")})
        size = self._log.stat().st_size
        if size != self._logged:
            self._logged = size
            with self._log.open("rb") as stream:
                stream.seek(max(0, size - MAX_LOG))
                text = stream.read().decode(errors="replace")
            client.log_text(self._run_id, text, LOG)

    def _tag(self, client: MlflowClient, tags: dict[str, str]) -> None:
        client.log_batch(self._run_id, tags=[RunTag(k, v) for k, v in tags.items() if v])


# --- who looks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepState:
    """How a sweep stands, as its tracking store knows it.

    Attributes:
        name: of the sweep.
        hash: of the sweep.
        run_id: of its run.
        status: RUNNING, FINISHED, FAILED or KILLED.
        job: id of the Ray job that drives it, if it was submitted.
        cluster: name of the cluster.
        heartbeat: last sign of life of a submitted driver, UTC, ISO 8601.
        silent: whether the driver should have given a sign of life since its last.
        planned: what it planned, in words.
        finished: trainings and trials that are done, by kind.
        failed: trainings and trials that failed, by kind.
        running: those under way or cut short, by kind.
        metrics: of the sweep, e.g. its hypervolume.
        progress: what its terminal shows, see `Progress.state`; ``at`` is when.
    """

    name: str
    hash: str
    run_id: str
    status: str
    job: str | None
    cluster: str | None
    heartbeat: str | None
    silent: bool
    planned: str
    finished: dict[str, int]
    failed: dict[str, int]
    running: dict[str, int]
    metrics: dict[str, float]
    progress: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Remote:
    """The sweeps of a tracking store.

    Args:
        uri: the tracking store.
        experiment: name of the experiment.

    Raises:
        TrackingError: the tracking store cannot be used.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self._client = open_client(uri)
        self._experiment = experiment
        self._uri = uri

    def state(self, name: str | None, digest: str | None) -> SweepState:
        """How a sweep stands, found by its hash or else by its name (the newest of that name).

        Raises:
            SweepError: it is unknown here.
        """
        run = self._run(name, digest)
        tags = run.data.tags
        counts: dict[str, Counter[str]] = {"FINISHED": Counter(), "FAILED": Counter()}
        others: Counter[str] = Counter()
        for child in self._children(run):
            kind = child.data.tags.get(names.KIND, "")
            counts.get(child.info.status, others)[kind] += 1
        heartbeat, progress = tags.get(HEARTBEAT), _progress(tags.get(names.PROGRESS))
        return SweepState(
            name=str(run.info.run_name),
            hash=tags.get(names.HASH, ""),
            run_id=run.info.run_id,
            status=run.info.status,
            job=tags.get(JOB),
            cluster=tags.get(CLUSTER),
            heartbeat=heartbeat,
            silent=run.info.status == "RUNNING"
            and _silent(max(filter(None, (heartbeat, (progress or {}).get("at"))), default=None)),
            planned=tags.get("prunefield.planned", ""),
            finished=dict(counts["FINISHED"]),
            failed=dict(counts["FAILED"]),
            running=dict(others),
            metrics=dict(run.data.metrics) if run.info.status != "RUNNING" else {},
            progress=progress,
        )

    def log(self, state: SweepState) -> str:
        """What the driver of a submitted sweep has printed.

        Raises:
            SweepError: there is nothing.
        """
        listed = {file.path for file in self._client.list_artifacts(state.run_id)}
        if LOG not in listed:
            raise SweepError(
                f"sweep {state.name!r} has no log in {names.sqlite_path(self._uri) or 'MLflow'}: "
                "it was not submitted, or has only just begun"
            )
        with tempfile.TemporaryDirectory() as folder, quiet():
            path = self._client.download_artifacts(state.run_id, LOG, folder)
            return Path(path).read_text(errors="replace")

    def ask_to_stop(self, state: SweepState) -> None:
        """Leave word for the driver.

        Raises:
            SweepError: nobody would read it.
        """
        if state.status != "RUNNING":
            raise SweepError(f"sweep {state.name!r} is not running: it is {state.status}")
        if not state.job:
            raise SweepError(
                f"sweep {state.name!r} was not submitted; stop it where it runs, with Ctrl-C"
            )
        self._client.set_tag(state.run_id, STOP, state.job)

    def _run(self, name: str | None, digest: str | None) -> Run:
        run = find_run(self._client, self._experiment, name=name, digest=digest)
        if run is None:
            store = names.sqlite_path(self._uri) or names.shown(self._uri)
            raise SweepError(
                f"sweep {name or digest!r} is unknown to experiment {self._experiment!r} of "
                f"{store}; it has not begun yet, or logs elsewhere: set `tracking.uri` in its "
                "file to a server that both sides reach, or name it with --tracking"
            )
        return run

    def _children(self, parent: Run) -> list[Run]:
        found, token = [], None
        where = f"tags.`{names.PARENT}` = '{parent.info.run_id}'"
        while True:
            page = self._client.search_runs(
                [parent.info.experiment_id], where, max_results=1000, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found


def find_run(
    client: MlflowClient, experiment: str, name: str | None = None, digest: str | None = None
) -> Run | None:
    """The run of a sweep, the newest one."""
    of = client.get_experiment_by_name(experiment)
    if of is None:
        return None
    where = f"tags.`{names.KIND}` = 'sweep'"
    if digest is not None:
        where += f" AND tags.`{names.HASH}` = '{digest}'"
    runs = client.search_runs([of.experiment_id], where, order_by=["attributes.start_time DESC"])
    return next((run for run in runs if name is None or run.info.run_name == name), None)


def _progress(text: str | None) -> dict[str, Any] | None:
    """What a driver left; None for what no version of this code wrote."""
    try:
        found = json.loads(text or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) and "front" in found else None


def seconds_since(at: str) -> float | None:
    """Since a UTC time in ISO 8601; None if it is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
    except (TypeError, ValueError):
        return None


def _silent(heartbeat: str | None) -> bool:
    since = None if heartbeat is None else seconds_since(heartbeat)
    return since is not None and since > SILENT_SECONDS
