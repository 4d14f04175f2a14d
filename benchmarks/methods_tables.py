"""Tables and a plot of a sweep of pruning methods, from its records alone.

Usage: ``python -m benchmarks.methods_tables sweeps/methods.yaml -o docs/results/methods``

Writes ``methods.csv`` (every trial), ``tables.md`` (PSNR by what the grids vary, mean over
calibration seeds with the spread behind it) and ``front_psnr.png``. Running it again after the
sweep ran again makes the document's numbers anew.
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from orchestrator.results import Record
from orchestrator.sweep import results_of

Key = Callable[[Record], str]


def main() -> None:
    """Read the sweep's records and write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    results, _ = results_of(options.sweep)
    dense, trials = results.trainings[0], results.trials
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "methods.csv", trials)
    text = "\n".join([*head(results, dense), *tables(trials), *failures(results.failed)])
    (options.output / "tables.md").write_text(text + "\n")
    plot(options.output / "front_psnr.png", dense, trials)
    print(text)


def config(record: Record, name: str, default: Any = None) -> Any:
    """A setting of a trial."""
    return record.config.get(name, default)


def by(name: str, default: Any = None) -> Key:
    """A row or column for each value of a setting."""
    return lambda record: shown(config(record, name, default))


def shown(value: Any) -> str:
    """A setting as a table shows it: fractions as per cent, large numbers with separators."""
    if isinstance(value, float) and 0 < value < 1:
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def method(record: Record) -> str:
    """Criterion and compensation, and whose errors were weighed."""
    pixel = ", pixel" if config(record, "errors") == "pixel" else ""
    return f"{config(record, 'criterion')} + {config(record, 'compensation')}{pixel}"


def tables(trials: Sequence[Record]) -> Iterable[str]:
    """Every table, one after the other."""
    full = [t for t in trials if config(t, "bits") == "fp32"]
    ratios = [t for t in full if "ratio" in t.config and config(t, "ratio") > 0]
    sizes = [t for t in full if "size" in t.config]
    both = [t for t in sizes if config(t, "networks") == "both"]
    plain = [t for t in both if config(t, "calibration_weighting", "uniform") == "uniform"]
    usual = [t for t in plain if config(t, "coarse_weight", 0.1) == 0.1]
    chain = [t for t in sizes if config(t, "allocation") == "chain"]
    best = [t for t in chain if method(t) in ("obs + obs", "obs + obs, pixel")]
    few = [t for t in trials if config(t, "bits") != "fp32" and "mask" not in t.config]
    yield from table("The same ratio in every layer", ratios, method, by("ratio"))
    yield from table("Allocation of a size", usual, by_allocation, by("size"))
    weights = [t for t in best if config(t, "calibration_weighting") == "uniform"]
    yield from table("How much errors of the coarse network count", weights, coarse, by("size"))
    alike = [t for t in best if config(t, "coarse_weight") == 0.1 and method(t) == "obs + obs"]
    yield from table("Weighting of the calibration", alike, by("calibration_weighting"), by("size"))
    yield from table(
        "Few bits",
        few,
        lambda t: f"{config(t, 'networks')}, {config(t, 'bits')}{few_bits_differ(t)}",
        lambda t: shown(config(t, "size", "nothing removed")),
    )
    masks = [t for t in trials if "mask" in t.config]
    yield from table("Single weights", masks, by("criterion"), by("mask"))


def by_allocation(record: Record) -> str:
    """The allocation, and the method where it is not structured OBS."""
    name = str(config(record, "allocation"))
    return name if method(record) == "obs + obs" else f"{name}, {method(record)}"


def coarse(record: Record) -> str:
    """Whose errors count, and the coarse weight; behind ``auto`` the one that was chosen."""
    given, whose = config(record, "coarse_weight"), config(record, "errors", "layer")
    if config(record, "networks") == "shared":
        return f"shared, {whose}"
    weight = f"auto ({record.metrics['coarse_weight']:g})" if given == "auto" else shown(given)
    return f"{weight}, {whose}"


def few_bits_differ(record: Record) -> str:
    """What tells apart the trials of one scheme of few bits."""
    rays = config(record, "calibration_rays", 256)
    whose = config(record, "errors", "layer")
    return ("" if whose == "layer" else f", {whose}") + ("" if rays == 256 else f", {rays} rays")


def table(title: str, trials: Sequence[Record], row: Key, column: Key) -> Iterable[str]:
    """PSNR in dB and bytes: mean, and lowest to highest where there are several trials."""
    cells: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for trial in trials:
        cells[row(trial), column(trial)].append(trial)
    if not cells:
        return
    rows, columns = (list(dict.fromkeys(k[i] for k in cells)) for i in (0, 1))
    rows.sort(
        key=lambda r: statistics.mean(psnr(t) for k, of in cells.items() if k[0] == r for t in of)
    )
    yield from (
        "",
        f"## {title}",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    )
    for name in rows:
        yield f"| {name} | " + " | ".join(cell(cells.get((name, c), [])) for c in columns) + " |"


def psnr(record: Record) -> float:
    """Of the held-out views, dB."""
    return float(record.metrics["psnr"])


def cell(trials: Sequence[Record]) -> str:
    """The trials of one cell."""
    if not trials:
        return ""
    values, size = [psnr(t) for t in trials], max(t.metrics["size_bytes"] for t in trials)
    spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}, {size / 1000:,.0f} kB"


def head(results: Any, dense: Record) -> Iterable[str]:
    """Where the numbers come from."""
    origin = dense.provenance
    seconds = sum(sum(t.provenance.seconds.values()) for t in results.trials)
    yield f"- sweep hash {results.plan.sweep.hash}; {len(results.trials)} prunings"
    commits = sorted({str(t.provenance.commit) for t in results.trials})
    yield f"- commits {', '.join(commits)} (the dense model: {origin.commit})"
    yield f"- hardware {origin.hardware}; PyTorch {origin.versions.get('torch')}"
    yield f"- dense: {psnr(dense):.2f} dB, {dense.metrics['size_bytes']:,.0f} bytes"
    yield f"- {seconds:.0f} s of workers' time in the prunings together"


def failures(failed: Iterable[Record]) -> Iterable[str]:
    """What has no result."""
    for record in failed:
        reason = record.failure.reason if record.failure else "?"
        yield f"- failed: {method(record) if record.kind == 'trial' else record.kind}: {reason}"


def write_csv(path: Path, trials: Sequence[Record]) -> None:
    """Every trial, one a row."""
    names = list(dict.fromkeys(n for t in trials for n in t.config))
    metrics = list(dict.fromkeys(n for t in trials for n in t.metrics))
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["key", *names, *(f"metric_{m}" for m in metrics)])
        for t in trials:
            values = [t.config.get(n, "") for n in names]
            writer.writerow([t.key, *values, *(t.metrics.get(m, "") for m in metrics)])


def plot(path: Path, dense: Record, trials: Sequence[Record]) -> None:
    """Size against PSNR: one colour a way of storing the weights, one marker a scope."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for t in trials:
        kind = "single weights" if "mask" in t.config else str(config(t, "bits"))
        groups[kind, str(config(t, "networks"))].append(t)
    colours = {kind: f"C{i}" for i, kind in enumerate(sorted({kind for kind, _ in groups}))}
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for (kind, scope), of in sorted(groups.items()):
        sizes, marker = [t.metrics["size_bytes"] / 1e6 for t in of], "x" if scope == "both" else "."
        values = [psnr(t) for t in of]
        axes.plot(sizes, values, marker, color=colours[kind], label=f"{kind}, {scope}")
    axes.plot(dense.metrics["size_bytes"] / 1e6, psnr(dense), "k*", label="dense")
    axes.set(xscale="log", xlabel="file, MB", ylabel="held-out PSNR, dB")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=4, fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
