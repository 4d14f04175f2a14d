"""A GPU that runs out of memory, for real: what needs too much fails, the rest goes on.

    python -m benchmarks.chaos.out_of_memory --json out.json    needs a GPU; two minutes
    python -m benchmarks.chaos.out_of_memory --pretend          anywhere, errors raised by hand

One sweep of two trainings: the second draws so many rays a step that no GPU holds them. One pruning
of the first gets no more GPU memory once its model is evaluated, nor when that is tried once more:
its worker's limit is what it holds already, and what is free of that is taken. Both must be
recorded as failed with their stage and the reason, in the store and in MLflow; everything else must
be done; and a second run must complete the pruning, whose worker is no longer short of memory.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.chaos.sabotage import Fault, FaultyBench, environment
from benchmarks.chaos.sweeps import ROOT, DoesNotHoldError, demand, runs, sqlite
from nerf.devices import describe_device, resolve_device
from orchestrator.provenance import git_commit
from orchestrator.scheduler.cluster import environment as variables
from orchestrator.sweep import Finished, run

SMALL, LARGE = 256, 1_000_000
RATIOS, CRITERIA = [0.3, 0.5], ["activation", "magnitude"]
SHORT = (0.5, "activation")
REASON = "out of GPU memory"


def sweep_file(folder: Path, pretend: bool) -> Path:
    """The sweep; tiny where the errors are only raised."""
    network = {"depth": 3, "width": 16, "skip": 1, "point_octaves": 4}
    tiny = {"network": network, "samples": {"coarse": 8, "fine": 8}, "iterations": 20}
    large = {"samples": {"coarse": 256, "fine": 256}, "iterations": 200}
    sweep = {
        "name": "out-of-memory",
        "scene": {"format": "demo"},
        "train": {"rays": [16, 32] if pretend else [SMALL, LARGE], **(tiny if pretend else large)},
        "prune": {
            "criteria": CRITERIA,
            "ratios": RATIOS,
            "calibration": {"views": 4, "rays": 16},
        },
        "evaluate": {"max_rays": 256},
        "resources": {"backend": "eager"},
        "storage": str(folder / "out"),
    }
    path = folder / "out-of-memory.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


def failures(finished: Finished) -> list[dict[str, Any]]:
    """What failed, where, and why."""
    return [
        {
            "kind": record.kind,
            "rays": record.config.get("rays"),
            "ratio": record.config.get("ratio"),
            "criterion": record.config.get("criterion"),
            "stage": record.failure.stage,
            "reason": record.failure.reason[:160],
        }
        for record in finished.results.failed
        if record.failure is not None
    ]


def check(first: Finished, again: Finished, uri: str) -> dict[str, Any]:
    """What must hold of the two runs."""
    large = next(t for t in first.results.plan.trainings if t.recipe.rays not in (SMALL, 16))
    failed = {(r.kind, r.key): r for r in first.results.failed}
    training = failed.pop(("training", large.result), None)
    demand(training is not None, "the large training did not fail")
    assert training is not None
    assert training.failure is not None
    demand(training.failure.stage == "train", f"it failed in {training.failure.stage}")
    demand(REASON in training.failure.reason, f"its reason is {training.failure.reason!r}")
    own = [r for r in failed.values() if r.training != large.key]
    demand(len(own) == 1, f"{len(own)} prunings of the small training failed")
    (short,) = own
    assert short.failure is not None
    demand((short.config["ratio"], short.config["criterion"]) == SHORT, "it is another one")
    demand(short.failure.stage == "evaluate", f"it failed in {short.failure.stage}")
    demand(REASON in short.failure.reason, f"its reason is {short.failure.reason!r}")
    theirs = [r for r in failed.values() if r.training == large.key]
    demand(len(theirs) == 4, f"{len(theirs)} prunings of the large training failed, not 4")
    for record in theirs:
        reason = record.failure.reason if record.failure else ""
        demand("which failed" in reason and REASON in reason, f"the reason is {reason!r}")
    demand(len(first.results.trials) == 3, f"{len(first.results.trials)} prunings, not 3")
    demand(len(again.results.trials) == 4, "the second run did not complete the pruning")
    states = Counter(status for _, status in runs(uri).elements())
    demand(states == {"FINISHED": 6, "FAILED": 5}, f"MLflow holds {dict(states)}")
    return {"runs_in_mlflow": dict(states)}


def table(rows: list[Mapping[str, Any]]) -> str:
    """Rows of what failed, for a person."""
    names = ("kind", "rays", "ratio", "criterion", "stage", "reason")
    lines = [" | ".join(names)]
    lines += [" | ".join(str(row[n]) if row[n] is not None else "" for n in names) for row in rows]
    return "\n".join(lines)


def main() -> int:
    """Run the sweep twice and check both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretend", action="store_true", help="no GPU: raise the errors")
    parser.add_argument("--json", type=Path, help="write what was seen there")
    options = parser.parse_args()
    if not options.pretend and not torch.cuda.is_available():
        print("no GPU here: run it where there is one, or with --pretend", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="out-of-memory."))
    path = sweep_file(folder, options.pretend)
    started = time.monotonic()
    ratio, criterion = SHORT
    what = "memory" if options.pretend else "cap"
    # Twice: a worker tries once more. (Such a pruning itself is done by the host.)
    faults = [Fault("short", "prune", "evaluate", what, times=2, ratio=ratio, criterion=criterion)]
    if options.pretend:
        faults.append(Fault("large", "train", "train", "memory", times=9, rays=32))
    with variables({**environment(faults, folder / "notes"), "RAY_ADDRESS": "local"}):
        first = run(path, bench=FaultyBench)
        # Only one of the 5 may fail again: of the large training nothing can be done.
        again = run(path, bench=FaultyBench)
    said: dict[str, Any] = {
        "device": describe_device(resolve_device("auto")),
        "commit": git_commit(ROOT),
        "pretended": options.pretend,
        "failed": failures(first),
        "failed_again": len(again.results.failed),
        "seconds": round(time.monotonic() - started, 1),
    }
    try:
        said |= check(first, again, sqlite(folder / "out")) | {"holds": True}
    except DoesNotHoldError as error:
        said |= {"holds": False, "why": str(error), "kept": str(folder)}
    print(table(said["failed"]))
    print(json.dumps({k: v for k, v in said.items() if k != "failed"}))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(said, indent=1) + "\n")
    return 0 if said["holds"] else 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    sys.exit(main())
