"""The MLflow UI on a sweep's tracking store, and addresses that open the right page of it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.errors import TrackingError
from orchestrator.tracking import names
from orchestrator.tracking.gallery import SHARED_VIEW, view_key

HOST = "127.0.0.1"
START_SECONDS = 60.0
MAX_COMPARED = 100
MODE = {"workflowType": "machine_learning"}


@dataclass(frozen=True)
class Links:
    """Addresses in the UI.

    Attributes:
        sweep: the parent run: description, system metrics, report.
        charts: charts and image grids of the dense models and all trials, best PSNR first.
        table: the same runs as a table.
        front: charts and image grids of the front and the dense models alone; None as `compare`.
        compare: parallel coordinates, scatter and contour plots of the front's runs; None when no
            run is marked as the front.
    """

    sweep: str
    charts: str
    table: str
    compare: str | None
    front: str | None = None


def ui_command(uri: str, port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves a tracking store, and its environment.

    One worker without job execution: as fast for one person and a fifth of the memory.
    """
    if path := names.sqlite_path(uri):
        uri = f"sqlite:///{path.resolve()}"
    command = [sys.executable, "-m", "mlflow", "server"]
    if location := names.artifact_location(uri):
        command += ["--default-artifact-root", location]
    command += ["--host", HOST, "--port", str(port), "--workers", "1"]
    environment = {
        **os.environ,
        # Not an argument, which every user of this machine could read: it may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": os.environ.get("MLFLOW_DISABLE_TELEMETRY", "true"),
    }
    environment.pop("MLFLOW_RUN_ID", None)
    return command, environment


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serve(
    uri: str, port: int | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes] | None"]]:
    """Serve a tracking store while the block runs.

    Args:
        uri: the tracking store; the address of an MLflow server is served already.
        port: the port; None for a free one.

    Yields:
        The address, and the server's process to wait for (None for a remote server).

    Raises:
        TrackingError: the server did not start; the message ends with what it said.
    """
    if uri.startswith(("http://", "https://")):
        yield uri.rstrip("/"), None
        return
    port = port or free_port()
    command, environment = ui_command(uri, port)
    address = f"http://{HOST}:{port}"
    with tempfile.TemporaryDirectory(prefix="prunefield-ui-") as folder:
        said = Path(folder) / "server.log"  # a file: nobody reads a pipe, and it would fill up
        with said.open("wb") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            _wait(process, address, said)
            yield address, process
        finally:
            _stop(process)


def links(address: str, uri: str, experiment: str, sweep_hash: str) -> Links:
    """Addresses for one sweep in a UI that runs at ``address``.

    Raises:
        TrackingError: the sweep is not in this tracking store.
    """
    from orchestrator.tracking.stores import open_client  # noqa: PLC0415  imports MLflow

    client = open_client(uri)
    found = client.get_experiment_by_name(experiment)
    where = f"tags.`{names.HASH}` = '{sweep_hash}' AND tags.`{names.KIND}` = "
    parents = client.search_runs([found.experiment_id], f"{where}'sweep'") if found else []
    if found is None or not parents:
        raise TrackingError(
            f"the tracking store holds no run of this sweep (experiment {experiment!r}, sweep "
            f"{sweep_hash}); run the sweep first"
        )
    front = client.search_runs(
        [found.experiment_id],
        f"{where}'trial' AND tags.`{names.FRONT}` = 'true'",
        max_results=MAX_COMPARED,
    )
    made = build_links(
        address,
        str(found.experiment_id),
        parents[0].info.run_id,
        [run.info.run_id for run in front],
    )
    shared = {
        which: view_key(sweep_hash, which)
        for which in ("front", "all")
        if SHARED_VIEW + view_key(sweep_hash, which) in found.tags
    }
    base = f"{address}/#/experiments/{found.experiment_id}/runs"

    def page(which: str, mode: str) -> str | None:
        if which not in shared:
            return None
        asked = {**MODE, "compareRunsMode": mode, "viewStateShareKey": shared[which]}
        return f"{base}?{_query(asked)}"

    return replace(
        made,
        charts=page("all", "CHART") or made.charts,
        table=page("all", "TABLE") or made.table,
        front=page("front", "CHART"),
    )


def build_links(address: str, experiment_id: str, parent: str, front: Iterable[str]) -> Links:
    """The addresses themselves, from ids.

    Ordered by start time, its default, MLflow folds children under their parent and the charts
    have nothing to draw; ordered by a metric it lists them flat. The dense models are among them:
    their renders are step 0 of the image grids.
    """
    runs = list(front)
    base = f"{address}/#/experiments/{experiment_id}/runs"
    query = {
        "searchFilter": f"tags.`{names.PARENT}` = '{parent}'",
        "orderByKey": "metrics.`psnr`",
        "orderByAsc": "false",
        "workflowType": "machine_learning",
    }
    compared = {
        "runs": json.dumps(runs, separators=(",", ":")),
        "experiments": json.dumps([experiment_id]),
        "workflowType": "machine_learning",
    }
    return Links(
        sweep=f"{base}/{parent}?workflowType=machine_learning",
        charts=f"{base}?{_query({**query, 'compareRunsMode': 'CHART'})}",
        table=f"{base}?{_query({**query, 'compareRunsMode': 'TABLE'})}",
        compare=f"{address}/#/compare-runs?{_query(compared)}" if runs else None,
    )


def _query(values: dict[str, str]) -> str:
    return urllib.parse.urlencode(values, quote_via=urllib.parse.quote)


def _wait(process: "subprocess.Popen[bytes]", address: str, said: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise TrackingError(
                f"the MLflow server did not start (exit {process.returncode}): "
                + said.read_text(errors="replace").strip()[-500:]
            )
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{address}/health", timeout=2) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise TrackingError(f"the MLflow server at {address} did not answer in {START_SECONDS:g} s")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers, which live in a session of their own."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return
