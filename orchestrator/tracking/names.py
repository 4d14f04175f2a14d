"""What runs, tags, params and metrics are called in MLflow."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.keys import content_key
from orchestrator.panel import thinned
from orchestrator.results import Record, method_of
from orchestrator.store import Store
from orchestrator.units import counted, show_bytes

URI_VARIABLE = "PRUNEFIELD_TRACKING_URI"

HASH = "prunefield.sweep_hash"
STORAGE = "prunefield.storage"
KIND = "prunefield.kind"
KEY = "prunefield.key"
STATE = "prunefield.state"
DIGEST = "prunefield.digest"
TRAINING = "prunefield.training"
TRAINING_RUN = "prunefield.training_run"
FRONT = "prunefield.front"
SHOWN = "prunefield.shown"
GALLERY = "prunefield.gallery"
BESIDE = "prunefield.side_by_side"
PROGRESS = "prunefield.progress"
COMMIT = "prunefield.commit"
SEED = "prunefield.seed"
HARDWARE = "prunefield.hardware"
FAILED_STAGE = "prunefield.failure_stage"
FAILED_REASON = "prunefield.failure_reason"
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"

MAX_TAG = 5000
MAX_PARAM = 6000


@dataclass(frozen=True)
class SweepInfo:
    """What the parent run says about its sweep.

    Attributes:
        name: the sweep's name.
        hash: content hash of the resolved sweep; the same sweep is the same parent run.
        yaml: text of the sweep file, kept as ``sweep.yaml``.
        commit: git commit of the code, None outside git.
        hardware: the machine that drives the sweep.
        seed: the sweep's seed.
        created: UTC time, ISO 8601.
        planned: how many were planned, by what one of them is called: training, calibration, trial.
        description: a sentence of the sweep file.
    """

    name: str
    hash: str
    yaml: str
    commit: str | None
    hardware: str
    seed: int | None
    created: str
    planned: Mapping[str, int] = field(default_factory=dict)
    description: str = ""


def default_uri(store: Store) -> str:
    """The tracking store inside a storage folder: SQLite."""
    return f"sqlite:///{store.root / 'mlflow.db'}"


def tracking_uri(setting: str | None, store: Store) -> str:
    """Where runs are logged: what the environment says, else the sweep file, else SQLite.

    The environment may hold what a file must not: an address with a password in it.
    """
    return os.environ.get(URI_VARIABLE) or setting or default_uri(store)


def shown(uri: str) -> str:
    """An address without its password, wherever that stands in it."""
    uri = re.sub(r"(?<=://)([^/@:]*):[^/]*@", r"\1:***@", uri)
    return re.sub(r"(?i)([?&](?:password|passwd|sslpassword|token)=)[^&#]*", r"\1***", uri)


def sqlite_path(uri: str) -> Path | None:
    """The file behind a SQLite address; None for anything else."""
    name = uri.partition(":///")[2].partition("?")[0]
    return Path(name) if uri.startswith("sqlite") and name else None


def artifact_location(uri: str, store: Store | None = None) -> str | None:
    """Where a new experiment keeps its files; a server decides itself.

    Beside a SQLite file; with another database in the storage, if that is given.
    """
    if path := sqlite_path(uri):
        return (path.resolve().parent / "mlartifacts").as_uri()
    if store is None or uri.startswith(("http://", "https://")):
        return None
    if store.address != str(store.root):
        return f"{store.address}/mlartifacts"
    return (store.root / "mlartifacts").as_uri()


def lease_of(name: str, sweep_hash: str) -> str:
    """Name of the lease of whoever runs a sweep."""
    return f"sweep-{name}-{sweep_hash}"


def sweep_tags(info: SweepInfo) -> dict[str, str]:
    """Tags of the parent run."""
    planned = ", ".join(counted(count, what) for what, count in info.planned.items())
    return _strings(
        {
            KIND: "sweep",
            HASH: info.hash,
            COMMIT: info.commit,
            "mlflow.source.git.commit": info.commit,
            HARDWARE: info.hardware,
            SEED: info.seed,
            "prunefield.created": info.created,
            "prunefield.planned": planned or None,
            NOTE: sweep_note(info),
        }
    )


def sweep_note(info: SweepInfo) -> str:
    """What a visitor sees on a sweep's run, in Markdown."""
    return f"""Sweep **{info.name}**{": " + info.description if info.description else ""}

A neural radiance field was trained, then pruned in many ways; each child run is one training
(dense model) or one pruning (trial), evaluated on held-out views.

- **Artifacts → report/report.html**: the interactive report (download it; it opens offline), plots,
  CSV and JSON. `front.json` and `trials.json` are tables. `sweep.yaml` is the sweep itself.
- **Images** (Model metrics, or Artifacts → images): `front/…` walks from the dense model (0) along
  the Pareto front by percent of the bytes that are gone; the other grids walk through one method's
  ratios of channels removed, in percent.
- **Metrics**: `psnr`, `ssim`, `mse` are means over whole held-out views, `size_bytes` is the model
  file on disk, `validation_psnr` was measured on pixels of training views that nobody trained on.
- **Front**: child runs with `tags.prunefield.front = 'true'`. `prunefield ui` prints addresses that
  open MLflow's charts and compare page on them.
"""


def record_note(record: Record) -> str:
    """What a visitor sees on the run of a training or a trial, in Markdown."""
    if record.failure is not None:
        return f"Failed in **{record.failure.stage}**: {record.failure.reason}"
    metrics = summary_metrics(record)
    dense = record.kind == "training"
    what = (
        "The dense model of the sweep."
        if dense
        else f"Pruned by **{method_of(record.config)}** ({record.config.get('networks', '?')})."
        if record.kind == "trial"
        else "A control: trained beside the recoveries, for comparison."
    )
    if {"psnr", "size_bytes"} <= metrics.keys():
        size = show_bytes(int(metrics["size_bytes"]))
        what += f" **{metrics['psnr']:.2f} dB** on held-out views from a file of **{size}**."
    elif "validation_psnr" in metrics:
        what += f" {metrics['validation_psnr']:.2f} dB on validation rays; no held-out view seen."
    return (
        f"{what}\n\n`render/view_N` is held-out view N; the slider's step is the percentage of "
        "channels removed (0: dense). `view_psnr` has the number of the view as its step. The "
        "model file is the logged model."
    )


def record_tags(record: Record, info: SweepInfo, parent: str) -> dict[str, str]:
    """Tags of a child run that holds a record."""
    seed = record.config.get("seed", info.seed)
    return child_tags(record.kind, record.key, record.training, info, parent) | _strings(
        {
            COMMIT: record.provenance.commit,
            "mlflow.source.git.commit": record.provenance.commit,
            HARDWARE: record.provenance.hardware,
            "prunefield.host": record.provenance.host,
            SEED: seed,
            FRONT: "false" if record.kind == "trial" else None,
            NOTE: record_note(record),
            FAILED_STAGE: record.failure.stage if record.failure else None,
            FAILED_REASON: record.failure.reason if record.failure else None,
        }
    )


def child_tags(kind: str, key: str, training: str, info: SweepInfo, parent: str) -> dict[str, str]:
    """Tags that every child run has from its first moment."""
    return {PARENT: parent, KIND: kind, KEY: key, TRAINING: training, HASH: info.hash}


def run_name(kind: str, key: str, config: Mapping[str, Any]) -> str:
    """What a person reads in the run list: ``activation both 50% uniform ab12cd34``."""
    ratio, size = config.get("ratio"), config.get("size")
    parts = [
        kind if kind == "training" else None,
        method_of(config),
        config.get("networks"),
        f"{100 * ratio:.4g}%" if isinstance(ratio, int | float) else None,
        show_bytes(size) if isinstance(size, int) else None,
        config.get("schedule"),
        key[:8],
    ]
    return " ".join(str(part) for part in parts if part)


def params(record: Record) -> dict[str, str]:
    """The flat configuration as MLflow params; what is None is left out."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in record.config.items()
        if value is not None
    }


def summary_metrics(record: Record) -> dict[str, float]:
    """The record's metrics; MLflow cannot draw NaN or infinity, so those are left out."""
    return {name: float(v) for name, v in record.metrics.items() if math.isfinite(v)}


def view_metrics(record: Record) -> list[tuple[str, float, int]]:
    """Name, value, step: ``view_psnr`` and so on, with the number of the view as the step."""
    return [
        (f"view_{name}", float(value), score.view)
        for score in record.views
        for name, value in (("mse", score.mse), ("psnr", score.psnr), ("ssim", score.ssim))
        if value is not None and math.isfinite(value)
    ]


def digest(record: Record) -> str:
    """Changes when a record is made anew, so that its run is too."""
    data = json.dumps({**record.to_json(), "files": {}}, default=str)
    return content_key(json.loads(data, parse_constant=str))


def image_step(record: Record) -> int:
    """The ratio in percent, so that the slider of an image grid walks through the ratios."""
    ratio = record.config.get("ratio", record.metrics.get("achieved_ratio", 0.0))
    return round(100 * ratio) if isinstance(ratio, int | float) else 0


def progress_text(state: Mapping[str, Any], at: str) -> str:
    """The state of a sweep as a tag's text, with the time; its front thinned to what a tag holds.

    Args:
        state: of `orchestrator.progress.Progress`.
        at: UTC time, ISO 8601.
    """
    points = len(state["front"])
    while True:
        text = json.dumps({**state, "at": at, "front": thinned(state["front"], points)})
        if len(text) <= MAX_TAG or points <= 1:
            return text
        points = max(1, points // 2)


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value)[:MAX_TAG] for name, value in values.items() if value is not None}
