"""Commands for sweeps that run elsewhere."""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.spec import Sweep, cluster_part, load, load_cluster
from orchestrator.units import counted, typed

if TYPE_CHECKING:
    from orchestrator.scheduler.jobs import Jobs
    from orchestrator.tracking.control import Remote, SweepState

FOLLOW_SECONDS = 5.0
STOP_SECONDS = 60.0


def submit(options: argparse.Namespace) -> int:
    """Run a sweep on a cluster."""
    from orchestrator.errors import SweepError
    from orchestrator.launch import launch

    sweep = load(options.file)
    config = cluster_part(sweep) if options.cluster is None else load_cluster(options.cluster)
    address = options.address or (None if config else os.environ.get("RAY_API_SERVER_ADDRESS"))
    if address:
        with tempfile.TemporaryDirectory(prefix="prunefield-submit-") as folder:
            return submit_to(sweep, address, Path(folder), options.detach)
    if config is None:
        raise SweepError(
            f"{options.file} does not say where Ray runs: give the address of a cluster (--address "
            "http://HEAD:8265) or a Ray cluster file (--cluster FILE), put the sweep under "
            "`metadata.sweep` of such a file as sweeps/fern.yaml does, or run it here: "
            f"prunefield run {typed(options.file)}"
        )
    return launch(sweep, config, options.detach)


def submit_to(
    sweep: Sweep, address: str, folder: Path, detach: bool = False, python: str = "python"
) -> int:
    """Run a sweep as a Ray job.

    Args:
        sweep: the sweep.
        address: of the cluster's dashboard.
        folder: an empty one, for the bundle.
        detach: do not wait for the end.
        python: the interpreter on the head.

    Returns:
        The exit status of the sweep; 0 if nobody waits for it.
    """
    from orchestrator.auth import settle

    settle(address)
    from orchestrator.bundle import make_bundle  # Ray comes after its mode is settled
    from orchestrator.scheduler.jobs import Jobs

    jobs = Jobs(address)
    job = jobs.submit(make_bundle(sweep, folder / "bundle"), python)
    print(f"job {job} on {address}", flush=True)
    file = typed(sweep.source)
    look = (
        f"look again: prunefield status {file} | logs {file} --follow | stop {file}, "
        f"with --job {job} --address {address} where its tracking server cannot be reached"
    )
    if detach:
        print(look)
        return 0
    try:
        return jobs.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\nprunefield: the job goes on. {look}", file=sys.stderr)
        return 130


def status(options: argparse.Namespace) -> int:
    """Say how a sweep stands."""
    if options.job:
        state = _jobs(options).state(options.job)
        print(json.dumps({"job": options.job, "state": state}) if options.json else state)
        return 0 if state else 1
    remote, found = _look(options)
    if options.json:
        print(json.dumps(found.to_json(), indent=1))
        return 0
    if options.follow:
        _watch(remote, found)
        return 0
    _say(found)
    return 0


def _watch(remote: "Remote", found: "SweepState") -> None:
    """Show how a sweep stands until it ends: a panel in a terminal, a line a look without one."""
    from rich.console import Console
    from rich.live import Live

    from orchestrator.panel import line, panel

    console = Console()
    try:
        if console.is_terminal:
            with Live(console=console, transient=True, auto_refresh=False) as live:
                while found.status == "RUNNING":
                    if found.progress is not None:
                        live.update(panel(found.progress), refresh=True)
                    time.sleep(FOLLOW_SECONDS)
                    found = remote.state(found.name, found.hash)
        else:
            shown = ""
            while found.status == "RUNNING":
                text = "" if found.progress is None else line(found.progress)
                if text != shown:
                    print(text, flush=True)
                shown = text
                time.sleep(FOLLOW_SECONDS)
                found = remote.state(found.name, found.hash)
    except KeyboardInterrupt:
        print()  # the sweep goes on
    _say(found)


def _say(found: "SweepState") -> None:
    """How a sweep stands, in a few lines; what its own terminal shows, while it runs."""
    from rich.console import Console

    from orchestrator.panel import clock, panel
    from orchestrator.tracking.control import seconds_since

    print(f"sweep {found.name} ({found.hash}): {found.status}")
    if found.job:
        where = f" on cluster {found.cluster}" if found.cluster else ""
        print(f"  job {found.job}{where}, last sign of life {found.heartbeat}")
    if found.silent:
        print("  the driver has been silent for a while: it may be dead; start the sweep again")
    print(f"  planned:  {found.planned}")
    for label, counts in (("done", found.finished), ("failed", found.failed)):
        if counts:
            said = ", ".join(counted(count, kind) for kind, count in sorted(counts.items()))
            print(f"  {label + ':':<9} {said}")
    for name, value in sorted(found.metrics.items()):
        if not name.startswith("system/"):
            unit = " bytes·dB" if name == "hypervolume" else ""
            print(f"  {name}: {value:.4g}{unit}")
    if found.progress is not None:
        since = seconds_since(found.progress["at"])
        ago = f", {clock(since)} ago" if since and found.status == "RUNNING" else ""
        print(f"  as of {found.progress['at']}{ago}:")
        ended = {} if found.status == "RUNNING" else {"running": 0}  # it was cut short
        Console().print(panel({**found.progress, **ended}))


def logs(options: argparse.Namespace) -> int:
    """Show what the driver of a submitted sweep prints."""
    if options.job:
        jobs = _jobs(options)
        if options.follow:
            return jobs.follow(options.job, lambda text: print(text, end="", flush=True))
        print(jobs.logs(options.job), end="")
        return 0
    remote, found = _look(options)
    shown = 0
    while True:
        text = remote.log(found)
        print(text[shown:], end="", flush=True)
        shown = len(text)
        if not options.follow or found.status != "RUNNING":
            return 0
        time.sleep(FOLLOW_SECONDS)
        found = remote.state(found.name, found.hash)


def stop(options: argparse.Namespace) -> int:
    """End a submitted sweep as Ctrl-C would."""
    if options.job:
        _jobs(options).stop(options.job)
        print(f"job {options.job} was asked to stop")
        return 0
    remote, found = _look(options)
    remote.ask_to_stop(found)
    print(f"sweep {found.name} was asked to stop; it saves what it has …", flush=True)
    deadline = time.monotonic() + STOP_SECONDS
    while found.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(1.0)
        found = remote.state(found.name, found.hash)
    print(f"sweep {found.name}: {found.status}")
    return 0 if found.status != "RUNNING" else 1


def _jobs(options: argparse.Namespace) -> "Jobs":
    from orchestrator.auth import settle
    from orchestrator.errors import ClusterError

    address = options.address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ClusterError("--job needs the cluster's address too: --address http://HEAD:8265")
    settle(address)
    from orchestrator.scheduler.jobs import Jobs

    return Jobs(address)


def _look(options: argparse.Namespace) -> "tuple[Remote, SweepState]":
    """Find a sweep, given by its file or by its name."""
    from orchestrator.cli.sweeps import check_begun
    from orchestrator.errors import SweepError
    from orchestrator.sweep import open_sweep
    from orchestrator.tracking import tracking_uri
    from orchestrator.tracking.control import Remote

    path = Path(options.sweep)
    given = options.tracking or None
    if path.is_file():
        sweep, store = open_sweep(path)
        uri = given or tracking_uri(sweep.tracking.uri, store)
        check_begun(sweep, uri, path)
        remote = Remote(uri, options.experiment or sweep.tracking.experiment)
        return remote, remote.state(None, sweep.hash)
    given = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        raise SweepError(
            f"there is no file {options.sweep}; to find a sweep by its name, say where it is "
            "logged: --tracking http://HOST:5000, or MLFLOW_TRACKING_URI"
        )
    remote = Remote(given, options.experiment or "prunefield")
    return remote, remote.state(options.sweep, None)
