"""What a search found, in tables and plots; and what it needs to begin and to be believed.

Usage::

    python -m benchmarks.search place  SWEEP CHECKPOINT    # begin from a model trained elsewhere
    python -m benchmarks.search report SWEEP [-o DIR]      # search.md's tables and plots
    python -m benchmarks.search same   SWEEP SWEEP         # whether two studies went the same way

``place`` puts a model file into the sweep's storage as the model that its training would make; its
record says that it was placed. Unless it was trained with the sweep's own `train.validation`, its
validation rays were training rays, and the search chooses on rays that the model knows.
"""

import argparse
import itertools
import json
import shutil
import statistics
from collections.abc import Iterable, Sequence
from contextlib import chdir
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from nerf.checkpoints import load_model
from nerf.devices import resolve_device
from orchestrator.pareto import Point, Reference, front, hypervolume
from orchestrator.plan import Plan, SearchPlan, make_plan
from orchestrator.provenance import Origin
from orchestrator.results import Record
from orchestrator.search.search import open_study
from orchestrator.search.summary import read_summary
from orchestrator.stages import MODEL
from orchestrator.store import Store
from orchestrator.sweep import Results, collect, open_sweep

KB = 1000
BANDS = (0, 300_000, 800_000, 1_500_000, 2_200_000, 3_000_000, 5_000_000)


# --- place -----------------------------------------------------------------------------------


def place(sweep_file: Path, checkpoint: Path) -> None:
    """Put a trained model into the sweep's storage in the place of its only training."""
    sweep, store = open_sweep(sweep_file)
    store.prepare()
    (training,) = make_plan(sweep, store).trainings
    if training.trained:
        print(f"training {training.key} is there already")
        return
    model, _ = load_model(checkpoint)
    if model.fine.shape != sweep.shape:
        raise SystemExit(f"{checkpoint} has networks of another shape than the sweep's")
    with store.writing("checkpoint", training.key) as folder:
        shutil.copy(checkpoint, folder / MODEL)
        record = Record(
            kind="checkpoint",
            key=training.key,
            training=training.key,
            config={**training.config, "placed_from": checkpoint.name},
            metrics={
                "iterations": training.recipe.iterations,
                "train_seconds": float("nan"),
                "train_psnr": float("nan"),
            },
            views=(),
            widths={name: of.shape.trunk for name, of in model.stored().items()},
            provenance=Origin.here().provenance(resolve_device("cpu"), {}),
        )
        store.write_record(folder, record)
    print(f"placed as training {training.key}")


# --- report ----------------------------------------------------------------------------------


def point(record: Record, validation: bool = False) -> Point:
    """A record on the size-quality plane, on held-out views or on validation rays."""
    prefix = "validation_" if validation else ""
    return Point(
        record.key,
        record.metrics["size_bytes"],
        record.metrics[f"{prefix}psnr"],
        record.metrics[f"{prefix}mse"],
    )


class Found:
    """A finished search and what it is compared with.

    Attributes:
        plan: of the search.
        dense: the dense model.
        tried: records of its trials, measured on validation rays, in the order of their proposal.
        final: records of its final front, measured on held-out views.
        uniform: uniform schedules of the same sweep.
        chain: sizes by the chain allocation of the same sweep.
    """

    def __init__(self, results: Results, store: Store) -> None:
        plan: Plan = results.plan
        self.plan: SearchPlan = plan.searches[0]
        summary = read_summary(self.plan, store)
        if summary is None:
            raise SystemExit("the search has not begun yet: run the sweep first")
        self.summary: dict[str, Any] = dict(summary)
        (self.dense,) = (r for r in results.trainings if r.training == self.plan.training.key)
        by_key = {r.key: r for r in results.searched}
        self.tried = [by_key[t["record"]] for t in summary["trials"] if t["record"] in by_key]
        self.final = [by_key[key] for key in summary["final"] if key in by_key]
        mine = [r for r in results.trials if r.training == self.dense.training and not r.failure]
        self.uniform = [
            r for r in mine if r.config.get("schedule") == "uniform" and "size" not in r.config
        ]
        self.chain = [r for r in mine if r.config.get("allocation") == "chain"]
        self.reference = Reference(self.dense.metrics["size_bytes"])

    @property
    def full(self) -> list[Record]:
        """Trials that were measured on all validation rays."""
        return [r for r in self.tried if "validation_psnr" in r.metrics]

    @property
    def stopped(self) -> list[Record]:
        """Trials that the first look stopped."""
        return [r for r in self.tried if "validation_psnr" not in r.metrics]


def report(sweep_file: Path, out: Path | None) -> None:
    """Print the tables as Markdown, and write them and the plots into a folder."""
    sweep, store = open_sweep(sweep_file)
    found = Found(collect(make_plan(sweep, store), store), store)
    parts = [
        _about(found, sweep.hash),
        _hypervolumes(found),
        _at_sizes(found),
        _origins(found),
        _layers(found),
        _times(found),
    ]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tables.md").write_text(text)
        _plot_fronts(found, out / "fronts.png")
        _plot_layers(found, out / "layers.png")
        _plot_progress(found, out / "hypervolume.png")
        rows = [{"key": r.key, **r.config, **r.metrics} for r in (*found.tried, *found.final)]
        (out / "trials.json").write_text(json.dumps(rows, indent=0, default=str) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _about(found: Found, digest: str) -> str:
    provenance = found.tried[-1].provenance
    settings = found.plan.settings
    return table(
        ["", ""],
        [
            ["commit", provenance.commit],
            ["sweep hash", digest],
            ["study", found.plan.name],
            ["sampler, seed, batch", f"{settings.sampler}, {settings.seed}, {settings.batch}"],
            ["hardware", provenance.hardware],
            ["trials", f"{len(found.tried)} ({len(found.stopped)} stopped by the first look)"],
            ["final front", f"{len(found.final)} of {len(found.summary['front'])} points"],
            ["dense", f"{found.dense.metrics['psnr']:.3f} dB on the held-out views, "
                      f"{found.dense.metrics.get('validation_psnr', float('nan')):.3f} dB on the "
                      f"validation rays, {found.dense.metrics['size_bytes']:,.0f} bytes"],
        ],
    )  # fmt: skip


def _hypervolumes(found: Found) -> str:
    rows = []
    sets = {
        "search": (found.final, found.full),
        "uniform": (found.uniform, found.uniform),
        "chain": (found.chain, found.chain),
        "search ∪ chain": ([*found.final, *found.chain], [*found.full, *found.chain]),
    }
    values = {}
    for name, (held_out, validation) in sets.items():
        values[name] = [
            hypervolume([point(r) for r in held_out], found.reference),
            hypervolume(
                [point(r, True) for r in validation if "validation_psnr" in r.metrics],
                found.reference,
            ),
        ]
    for name, of in values.items():
        cells: list[object] = [name, len(sets[name][0])]
        for i, value in enumerate(of):
            if i == 0 and not found.final and "search" in name:
                cells += ["not rendered", "–", "–"]
                continue
            cells.append(f"{value:,.0f}")
            for other in ("uniform", "chain"):
                base = values[other][i]
                cells.append(f"{value / base - 1:+.1%}" if base and other != name else "–")
        rows.append(cells)
    head = ["front of", "points", "held-out views, bytes·dB", "over uniform", "over chain",
            "validation rays, bytes·dB", "over uniform", "over chain"]  # fmt: skip
    corner = f"Reference point: {found.reference.size_bytes:,.0f} bytes, {found.reference.psnr} dB."
    return "## Hypervolume\n\n" + table(head, rows) + f"\n\n{corner}"


def _best_within(records: Iterable[Record], size: float) -> Record | None:
    fits = [r for r in records if r.metrics["size_bytes"] <= size]
    return max(fits, key=lambda r: r.metrics["psnr"], default=None)


def _at_sizes(found: Found) -> str:
    """Held-out PSNR at the chain's own sizes; the search's point is the best that is no larger."""
    rows = []
    for size in sorted(int(r.metrics["size_bytes"]) for r in found.chain):
        cells: list[object] = [f"{size / KB:,.0f} kB"]
        for records in (found.uniform, found.chain, found.final):
            best = _best_within(records, size)
            cells.append(
                "–"
                if best is None
                else f"{best.metrics['psnr']:.2f} ({best.metrics['size_bytes'] / KB:,.0f} kB)"
            )
        rows.append(cells)
    head = ["within", "uniform", "chain", "search"]
    return "## Held-out PSNR within a size\n\n" + table(head, rows)


def _origins(found: Found) -> str:
    """Who proposed what is on the front of the validation rays."""
    on_front = set(found.summary["front"])
    counts: dict[str, list[int]] = {}
    for trial in found.summary["trials"]:
        name = trial["origin"].split(" ")[0]
        row = counts.setdefault(name, [0, 0, 0, 0])
        row[0] += 1
        row[1] += trial["stopped"] is not None
        row[2] += trial["state"] == "failed"
        row[3] += trial["key"] in on_front
    head = ["proposed by", "trials", "stopped", "failed", "on the front"]
    return "## Where the front comes from\n\n" + table(
        head, [[name, *row] for name, row in counts.items()]
    )


def ratios_of(record: Record) -> dict[str, float]:
    """The searched ratios of a record, by ``network layer``."""
    return {
        name.removesuffix("_ratio").replace("_", " ", 1): float(value)
        for name, value in record.config.items()
        if name.endswith("_ratio") and name != "achieved_ratio"
    }


def _layers(found: Found) -> str:
    """Ratios of the final front layer by layer, at five sizes."""
    ordered = sorted(found.final, key=lambda r: r.metrics["size_bytes"])
    if not ordered:
        return "## Ratios layer by layer\n\nNone yet."
    picks = sorted({round(i * (len(ordered) - 1) / 4) for i in range(5)})
    chosen = [ordered[i] for i in picks]
    head = ["layer"] + [
        f"{r.metrics['size_bytes'] / KB:,.0f} kB, {r.metrics['psnr']:.2f} dB" for r in chosen
    ]
    columns = [ratios_of(r) for r in chosen]
    rows = [[layer, *(f"{c[layer]:.0%}" for c in columns)] for layer in columns[0]]
    single = "## Ratios layer by layer\n\nThe fraction removed.\n\n" + table(head, rows)
    return f"{single}\n\n{_bands(ordered)}"


def _bands(ordered: Sequence[Record]) -> str:
    """Median ratios of the models between some sizes: steadier than those of one model."""
    head, columns = ["layer"], []
    for low, high in itertools.pairwise(BANDS):
        inside = [r for r in ordered if low <= r.metrics["size_bytes"] < high]
        if inside:
            psnrs = [r.metrics["psnr"] for r in inside]
            head.append(
                f"{low / KB:,.0f} to {high / KB:,.0f} kB: {len(inside)} models, "
                f"{min(psnrs):.1f} to {max(psnrs):.1f} dB"
            )
            columns.append([ratios_of(r) for r in inside])
    rows = [
        [layer, *(f"{statistics.median(r[layer] for r in of):.0%}" for of in columns)]
        for layer in ratios_of(ordered[0])
    ]
    return "Medians of the final front's models by size.\n\n" + table(head, rows)


def _times(found: Found) -> str:
    def mean(records: Iterable[Record], *stages: str) -> float:
        values = [sum(r.provenance.seconds.get(s, 0.0) for s in stages) for r in records]
        return statistics.fmean(values) if values else 0.0

    proposing = float(found.summary.get("proposing_seconds", 0.0))
    rows = [
        ["all prunings of the sweep, first to last", f"{_whole(found):.0f}"],
        ["the search", f"{found.summary.get('seconds', float('nan')):.0f}"],
        ["the sampler, all proposals", f"{proposing:.0f}"],
        ["pruning, mean", f"{mean(found.tried, 'prune'):.3f}"],
        ["first look, mean", f"{mean(found.tried, 'first look'):.3f}"],
        ["the rest of the validation rays, mean", f"{mean(found.full, 'validate'):.3f}"],
        ["a final model on its held-out views, mean", f"{mean(found.final, 'evaluate'):.3f}"],
        ["the sampler, mean", f"{proposing / max(len(found.tried), 1):.3f}"],
    ]  # fmt: skip
    saved, audit = found.summary.get("saved", {}), found.summary.get("audit", {})
    whole = saved.get("spent", 0.0) + saved.get("saved", 0.0)
    text = "## Time\n\n" + table(["seconds", ""], rows)
    if whole:
        text += (
            f"\n\nThe first look stopped {len(found.stopped)} of {len(found.tried)} trials and "
            f"saved {saved['saved']:.1f} s of {whole:.1f} s of worker time "
            f"({saved['saved'] / whole:.1%}); the looks took {saved['looks']:.1f} s."
        )
    if checked := audit.get("trials", 0):
        text += (
            f"\n\nOf the stopped trials {checked} were measured in full afterwards: "
            f"{len(audit['joined'])} belong on the front of {len(found.summary['front'])}, "
            f"{len(audit['left'])} of whose points leave it for them."
        )
    return text


def _whole(found: Found) -> float:
    """Seconds from the first pruning of the sweep to the last of the final front."""
    records = [*found.uniform, *found.chain, *found.tried, *found.final]
    begun = [datetime.fromisoformat(r.provenance.started) for r in records]
    ended = [
        at + timedelta(seconds=sum(r.provenance.seconds.values()))
        for at, r in zip(begun, records, strict=True)
    ]
    return (max(ended) - min(begun)).total_seconds()


# --- plots -----------------------------------------------------------------------------------


def _plot_fronts(found: Found, path: Path) -> None:
    """Fronts on the validation rays, which were chosen by, and on the held-out views."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True, sharey=True)
    for axes, validation, searched, title in (
        (panels[0], True, found.full, "validation rays"),
        (panels[1], False, found.final, "held-out views"),
    ):
        prefix = "validation_" if validation else ""
        for name, records, style in (
            ("uniform", found.uniform, "s-"),
            ("chain", found.chain, "^-"),
            ("search", searched, "o-"),
        ):
            scored = [r for r in records if f"{prefix}psnr" in r.metrics]
            if line := front([point(r, validation) for r in scored]):
                sizes = [p.size_bytes / 1e6 for p in line]
                axes.plot(sizes, [p.psnr for p in line], style, ms=4, label=name)
        dense = found.dense.metrics[f"{prefix}psnr"]
        axes.axhline(dense, color="grey", lw=0.8, label="dense")
        axes.set(xlabel="model file, MB", ylabel="PSNR, dB", title=title)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_layers(found: Found, path: Path) -> None:
    ordered = sorted(found.final, key=lambda r: r.metrics["size_bytes"])
    if not ordered:
        return
    layers = list(ratios_of(ordered[0]))
    rows = [[ratios_of(r)[layer] for r in ordered] for layer in layers]
    figure, axes = plt.subplots(figsize=(8, 0.28 * len(layers) + 1.4))
    image = axes.imshow(rows, aspect="auto", vmin=0, vmax=1, cmap="magma_r")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    ticks = sorted({round(i * (len(ordered) - 1) / 6) for i in range(7)})
    axes.set_xticks(ticks, [f"{ordered[i].metrics['size_bytes'] / KB:,.0f}" for i in ticks])
    axes.set_xlabel("models of the final front, kB")
    figure.colorbar(image, label="fraction removed")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_progress(found: Found, path: Path) -> None:
    """Hypervolume on the validation rays over the trials."""
    seen: list[Point] = []
    values = []
    for record in found.tried:
        if "validation_psnr" in record.metrics:
            seen.append(point(record, True))
        values.append(hypervolume(seen, found.reference))
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(range(1, len(values) + 1), values, color="C2", label="search")
    for name, records, color in (("uniform", found.uniform, "C0"), ("chain", found.chain, "C1")):
        scored = [point(r, True) for r in records if "validation_psnr" in r.metrics]
        value = hypervolume(scored, found.reference)
        axes.axhline(value, ls="--", lw=0.8, color=color, label=name)
    axes.set(xlabel="trials", ylabel="hypervolume on the validation rays, bytes·dB")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


# --- same ------------------------------------------------------------------------------------


def same(one: Path, other: Path) -> None:
    """Say how far two studies agree, trial by trial in the order of their proposal."""
    found = [_study(path) for path in (one, other)]
    pairs = list(zip(*found, strict=False))
    proposed = sum(1 for _ in itertools.takewhile(lambda p: p[0][0] == p[1][0], pairs))
    measured = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
    lengths = " and ".join(str(len(of)) for of in found)
    print(
        f"{lengths} trials: the first {proposed} of {len(pairs)} are the same prunings in the same "
        f"order, the first {measured} were measured alike to the last bit"
    )


def _study(sweep_file: Path) -> list[tuple[str, tuple[float, ...] | None]]:
    with chdir(sweep_file.resolve().parent):  # where its storage is, unless it says another place
        sweep, store = open_sweep(sweep_file.name)
    (plan,) = make_plan(sweep, store).searches
    study = open_study(sweep, plan, store)
    try:
        return [(entry.key, entry.values) for entry in study.entries()]
    finally:
        study.close()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    placing = commands.add_parser("place")
    placing.add_argument("sweep", type=Path)
    placing.add_argument("checkpoint", type=Path)
    reporting = commands.add_parser("report")
    reporting.add_argument("sweep", type=Path)
    reporting.add_argument("-o", "--output", type=Path)
    comparing = commands.add_parser("same")
    comparing.add_argument("sweep", type=Path)
    comparing.add_argument("other", type=Path)
    options = parser.parse_args()
    if options.command == "place":
        place(options.sweep, options.checkpoint)
    elif options.command == "report":
        report(options.sweep, options.output)
    else:
        same(options.sweep, options.other)


if __name__ == "__main__":
    main()
