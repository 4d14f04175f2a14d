"""Commands that take a sweep file."""

import argparse
import json
from pathlib import Path

from orchestrator.provenance import bundle_info
from orchestrator.spec import Sweep, load
from orchestrator.units import counted, typed

MANY = 40
"""Trials from which on a run ends with the front alone."""
AUTO = {
    "train": "a GPU where there is one",
    "prune": "a quarter of a GPU where there is one",
}
"""What `gpus: auto` asks for."""


def validate(options: argparse.Namespace) -> int:
    """Check a sweep file."""
    sweep = load(options.file)
    print(f"{options.file}: sweep {sweep.name!r} is valid (hash {sweep.hash})")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Show what would run."""
    from orchestrator.plan import make_plan
    from orchestrator.search.summary import searched
    from orchestrator.sweep import open_sweep

    sweep, store = open_sweep(options.file)
    made = make_plan(sweep, store)
    summary = made.summary()
    if options.json:
        print(json.dumps(summary, indent=1))
        return 0
    print(f"sweep {sweep.name} ({sweep.hash}), storage {store.address}")
    for what in ("trainings", "calibrations", "trials"):
        count = summary[what]
        print(f"  {what:<13} {count['total']:>7,}   {count['cached']:,} done already")
    if summary["controls"]:
        print("  of them controls, trained beside the recoveries for comparison:")
    for name, count in summary["controls"].items():
        print(f"    {name:<21} {count['total']:>7,}   {count['cached']:,} done already")
    for search in made.searches:
        of = searched(search, store)
        tried = len(of.trials) + len(of.failed)
        print(f"  {'search trials':<13} {search.settings.trials:>7,}   {tried:,} done already")
    combinations = summary["trials"]["combinations"]
    if combinations != summary["trials"]["total"]:
        print(f"  ({combinations:,} combinations; those that make no difference run once)")
    for stage in ("train", "prune"):
        wanted = summary["resources"][stage]
        gpus = AUTO[stage] if wanted["gpus"] is None else counted(wanted["gpus"], "GPU")
        print(f"  each {stage.removesuffix('e')}ing: {counted(wanted['cpus'], 'CPU')}, {gpus}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Run what a sweep misses, then print the front and where to look."""
    from orchestrator.progress import Progress
    from orchestrator.report import front_json, table
    from orchestrator.sweep import run as run_sweep

    finished = run_sweep(options.file, Progress(as_json=True) if options.json else None)
    failed = len(finished.results.failed)
    if options.json:
        found = {**front_json(finished.data), "report": str(finished.report.html)}
        print(json.dumps(found, indent=1))
        return 1 if failed else 0
    print(table(finished.data, only_front=len(finished.data.done) > MANY))
    print(f"\nreport: {finished.report.html}")
    if bundle_info() is None:  # a shipped file is no place to look again
        print(f"MLflow: prunefield ui {typed(options.file)}")
    if failed:
        print(f"{counted(failed, 'failure')}, listed in the report")
    return 1 if failed else 0


def report(options: argparse.Namespace) -> int:
    """Write the report of a sweep."""
    from orchestrator.report import write_report
    from orchestrator.sweep import report_data, report_folder, results_of

    results, store = results_of(options.sweep)
    folder = options.output or report_folder(results.plan.sweep, store)
    print(write_report(report_data(results, store), folder).html)
    return 0


def front(options: argparse.Namespace) -> int:
    """List the non-dominated trials."""
    from orchestrator.report import front_json, table
    from orchestrator.sweep import report_data, results_of

    results, store = results_of(options.sweep)
    data = report_data(results, store)
    print(json.dumps(front_json(data), indent=1) if options.json else table(data, not options.all))
    return 0


def ui(options: argparse.Namespace) -> int:
    """Serve the MLflow UI until interrupted."""
    from orchestrator.sweep import open_sweep
    from orchestrator.tracking import links, serve, tracking_uri

    sweep, store = open_sweep(options.sweep)
    uri = tracking_uri(sweep.tracking.uri, store)
    check_begun(sweep, uri, options.sweep)
    with serve(uri, options.port) as (address, process):
        found = links(address, uri, sweep.tracking.experiment, sweep.hash)
        print(f"MLflow UI: {address}")
        print(f"  sweep:   {found.sweep}")
        print(f"  charts:  {found.charts}")
        print(f"  table:   {found.table}")
        if found.front:
            print(f"  front:   {found.front}")
        if found.compare:
            print(f"  compare: {found.compare}")
        print("Ctrl-C ends it.", flush=True)
        if process is not None:
            try:
                process.wait()
            except KeyboardInterrupt:
                print()
    return 0


def check_begun(sweep: Sweep, uri: str, path: Path) -> None:
    """Whether there is a tracking store to look into: looking must not make one.

    Args:
        sweep: the sweep.
        uri: its tracking store.
        path: its file, as it was given.

    Raises:
        SweepError: the file of runs is not there.
    """
    from orchestrator.errors import SweepError
    from orchestrator.tracking.names import sqlite_path

    database = sqlite_path(uri)
    if database is not None and not database.is_file():
        raise SweepError(
            f"sweep {sweep.name!r} has no tracking store at {database} yet; "
            f"run it first: prunefield run {typed(path)}; if it runs elsewhere, set "
            "`tracking.uri` in its file to a server that both sides reach"
        )
