"""The records as rows: CSV, JSON, the front for programs and the table for a terminal."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator import pareto
from orchestrator.pareto import Quality
from orchestrator.report.data import MB, ReportData, number
from orchestrator.report.effects import NONE, allocation_of, amount_of
from orchestrator.results import Record, method_of
from orchestrator.units import counted, show_bytes

ABSENT = "–"
CONFIG_FIRST = ("criterion", "networks", "ratio", "schedule", "calibration_views")
METRICS_FIRST = ("size_bytes", "mse", "psnr", "ssim", "nonzero_bytes", "params")
UNITS: dict[Quality, str] = {"psnr": "bytes·dB", "mse": "bytes·MSE"}


def front_json(data: ReportData, quality: Quality = "psnr") -> dict[str, Any]:
    """The front as plain data: trials, hypervolume with its reference point, dense models."""
    corner = data.corner
    return {
        "sweep": {"name": data.name, "hash": data.hash},
        "objectives": {"size_bytes": "min", quality: "max" if quality == "psnr" else "min"},
        "front": [_brief(data.by_key[point.key]) for point in data.front(quality)],
        "hypervolume": None
        if corner is None
        else {
            "value": _plain(pareto.hypervolume(data.points, corner, quality)),
            "unit": UNITS[quality],
            "reference": {"size_bytes": corner.size_bytes, quality: getattr(corner, quality)},
        },
        "dense": [_brief(record) for record in data.dense if record.failure is None],
        "controls": [_brief(record) for record in data.baselines],
        "trials": {"done": len(data.done), "failed": len(data.trials) - len(data.measured)},
    }


def results_json(data: ReportData) -> str:
    """Both fronts and every record, whole."""
    fronts = {quality: front_json(data, quality) for quality in UNITS}
    content = {
        "sweep": {"name": data.name, "hash": data.hash, "commit": data.commit, "seed": data.seed},
        "fronts": {
            quality: {
                "ids": [trial["id"] for trial in front["front"]],
                "hypervolume": front["hypervolume"],
            }
            for quality, front in fronts.items()
        },
        "dense": [_plain(record.to_json()) for record in data.dense],
        "trials": [_plain(record.to_json()) for record in data.trials],
        "controls": [_plain(record.to_json()) for record in data.controls],
    }
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def results_csv(data: ReportData) -> str:
    """One row a record; an empty cell is an absent value."""
    records = (*data.dense, *data.trials, *data.controls)
    config = _ordered((name for r in records for name in r.config), CONFIG_FIRST)
    metrics = _ordered((name for r in records for name in r.metrics), METRICS_FIRST)
    fronts = {q: {point.key for point in data.front(q)} for q in UNITS}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            *("id", "kind", "training", "status", "failure_stage", "failure_reason"),
            *("front_psnr", "front_mse"),
            *config,
            *(f"metric_{name}" if name in config else name for name in metrics),
            *("commit", "hardware", "host", "started"),
        ]
    )
    for r in records:
        writer.writerow(
            [
                *(r.key, r.kind, r.training, "failed" if r.failure else "done"),
                *((r.failure.stage, r.failure.reason) if r.failure else ("", "")),
                *(int(r.key in fronts[q]) if r.kind == "trial" else "" for q in UNITS),
                *(_cell(r.config.get(name)) for name in config),
                *(_cell(number(r, name)) for name in metrics),
                *(r.provenance.commit or "", r.provenance.hardware),
                *(r.provenance.host, r.provenance.started),
            ]
        )
    return text.getvalue()


def table(data: ReportData, only_front: bool = False) -> str:
    """Dense models and trials by size, aligned, the front marked; for a terminal.

    Args:
        data: the sweep.
        only_front: without the trials off the front, and without what was trained for comparison.
    """
    head = ["", "method", "networks", "amount", "schedule", "file", "MSE", "PSNR", "SSIM", "id"]
    rows = [
        ["", "dense", "", "", "", *_quality(record), record.key]
        for record in sorted(data.dense, key=lambda r: r.key)
        if record.failure is None
    ]
    for record in sorted(
        (*data.done, *data.baselines),
        key=lambda r: (number(r, "size_bytes") or math.inf, r.key),
    ):
        on_front = record.key in data.front_keys
        if on_front or not only_front:
            words = [method_of(record.config), record.config.get("networks")]
            rows.append(
                [
                    "*" if on_front else "c" if record.kind == "control" else "",
                    *(str(word or ABSENT) for word in words),
                    amount if (amount := amount_of(record)) != NONE else ABSENT,
                    schedule if (schedule := allocation_of(record)) != "?" else ABSENT,
                    *_quality(record),
                    record.key,
                ]
            )
    lines = align([head, *rows], right={3, 5, 6, 7, 8})
    lines.insert(1, "-" * max(map(len, lines)))
    lines.append("")
    lines.append(
        f"* on the Pareto front of size and PSNR: {len(data.front_keys)} of "
        + counted(len(data.done), "trial")
        + (" (`prunefield front --all` lists them)" if only_front else "")
    )
    if data.hypervolume is not None and data.corner is not None:
        lines.append(
            f"hypervolume {data.hypervolume:.4g} bytes·dB "
            f"(reference {data.corner.size_bytes:,.0f} bytes, {data.corner.psnr:g} dB)"
        )
    lines += [
        f"failed: {r.kind} {r.key} in {r.failure.stage}: {r.failure.reason.partition(chr(10))[0]}"
        for r in data.failed
        if r.failure
    ]
    return "\n".join(lines)


def align(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Rows of cells as lines of equal columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def megabytes(size: float | None) -> str:
    """Bytes as MB of 2^20 bytes, with three decimals as in the report."""
    return ABSENT if size is None else f"{size / MB:.3f} MB"


def percent(ratio: Any) -> str:
    """A ratio in percent."""
    return f"{100 * ratio:.4g} %" if isinstance(ratio, int | float) else ABSENT


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals, or a dash."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def _quality(record: Record) -> list[str]:
    size = number(record, "size_bytes")
    return [
        ABSENT if size is None else show_bytes(int(size)),
        fixed(number(record, "mse"), 5),
        fixed(number(record, "psnr"), 2),
        fixed(number(record, "ssim"), 3),
    ]


def _brief(record: Record) -> dict[str, Any]:
    size = number(record, "size_bytes")
    return {
        "id": record.key,
        "training": record.training,
        "configuration": _plain(dict(record.config)),
        "size_bytes": None if size is None else int(size),
        **{name: number(record, name) for name in ("mse", "psnr", "ssim")},
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null says that there is no such number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _ordered(names: Iterable[str], first: Sequence[str]) -> list[str]:
    found = set(names)
    return [name for name in first if name in found] + sorted(found - set(first))


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list | tuple | Mapping | bool) else value
