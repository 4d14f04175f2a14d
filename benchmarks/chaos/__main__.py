"""Kill, drown and starve a sweep, then see that nothing is lost, doubled or wrong.

    python -m benchmarks.chaos                      everything, three quarters of an hour on 2 cores
    python -m benchmarks.chaos driver --times 20    SIGKILL of the driver at random moments
    python -m benchmarks.chaos interrupt --times 6  Ctrl-C, once and twice in turn
    python -m benchmarks.chaos server --seconds 60  the MLflow server is away for a minute
    python -m benchmarks.chaos silence              it takes connections and says nothing
    python -m benchmarks.chaos postgres             the database of the runs restarts, or is silent
    python -m benchmarks.chaos bucket --seconds 20  the bucket of the results is away
    python -m benchmarks.chaos disk                 the storage is a disk that fills up (needs root)

Each prints one line of JSON a case and ends with status 1 if something does not hold. What holds is
in docs/results/reliability.md. Killed workers, nodes, databases and damaged files are tests:
tests/e2e/test_faults.py, tests/e2e/test_nodes.py, tests/unit/test_tracking_servers.py. Scripts of
their own: `benchmarks.chaos.fuzz` (inputs, guided by coverage), `benchmarks.chaos.out_of_memory`
(needs a GPU).
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from benchmarks.chaos.drivers import interrupt, kill_drivers
from benchmarks.chaos.places import (
    bucket_away,
    disk_full,
    postgres_away,
    postgres_silent_for_good,
    server_away,
    server_hangs,
)
from benchmarks.chaos.sweeps import DoesNotHoldError

CASES: dict[str, Callable[[Path, argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "driver": lambda folder, o: kill_drivers(folder, o.times, o.seed),
    "interrupt": lambda folder, o: interrupt(folder, o.times, o.seed),
    "server": lambda folder, o: server_away(folder, o.seconds),
    "silence": lambda folder, o: server_hangs(folder, o.seconds),
    "postgres": lambda folder, o: chain(
        *(postgres_away(folder, o.seconds, fault) for fault in ("restart", "silence", "sessions")),
        postgres_silent_for_good(folder),
    ),
    "bucket": lambda folder, o: bucket_away(folder, o.seconds),
    "disk": lambda folder, _: disk_full(folder),
}


def main() -> int:
    """Run the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all")
    parser.add_argument("--times", type=int, default=20, help="kills or interruptions (20)")
    parser.add_argument("--seconds", type=float, default=60, help="that a place is away (60)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    broken = 0
    for name in options.cases or CASES:
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}."))
        try:
            for measured in CASES[name](folder, options):
                print(name, json.dumps(measured), flush=True)
        except DoesNotHoldError as error:
            print(name, f"DOES NOT HOLD: {error} (kept: {folder})", flush=True)
            broken += 1
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
