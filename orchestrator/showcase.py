"""What MLflow shows on a sweep's own run: pictures by how much was removed, and its tables."""

from typing import Any

from orchestrator.report.data import ReportData, number, ratio_of, representative
from orchestrator.report.effects import amount_of, varying
from orchestrator.results import Record, method_of
from orchestrator.tracking.gallery import Gallery, GridImage

MAX_GRIDS = 4
MAX_AXES = 5
PARAMS = {
    "criterion": "criterion",
    "compensation": "compensation",
    "networks": "networks",
    "allocation": "schedule",
    "bits": "bits",
    "recovery": "recover_iterations",
}
"""What a facet of the report is called among MLflow's params."""
METRICS = ("size_bytes", "psnr", "ssim", "mse", "validation_psnr")


def gallery_of(data: ReportData) -> Gallery:
    """The front's pictures by bytes removed, each method's by its ratio; the front as a table."""
    axes = [PARAMS[f.key] for f in varying(data.done) if f.key in PARAMS]
    front = sorted(
        (data.by_key[key] for key in data.front_keys), key=lambda r: -r.metrics["size_bytes"]
    )
    images = (*_front(data, front), *_series(data))
    return Gallery(
        images=images,
        tables={
            "front.json": _table([*(r for r in data.dense if r.failure is None), *front]),
            "trials.json": _table([*data.done, *data.baselines]),
        },
        params=tuple(axes[:MAX_AXES]),
        amounts=tuple(
            name
            for name in ("ratio", "size")
            if any(t.config.get(name) is not None for t in data.done)
        ),
        side_by_side={
            r.key: image
            for r in (*data.dense, *front)
            if (image := _image(data, r, "side by side", 0)) is not None
        },
    )


def _front(data: ReportData, front: list[Record]) -> list[GridImage]:
    """The dense model at 0, then the front: by how many percent of its bytes are gone."""
    steps: dict[int, GridImage] = {}
    for record in front:
        dense = data.dense_of(record)
        if dense is not None and (image := _image(data, record, "front", 0)):
            gone = 1 - record.metrics["size_bytes"] / dense.metrics["size_bytes"]
            step = round(100 * gone)
            steps.setdefault(step, GridImage(image.key, step, image.path))
    if not steps:
        return []
    first = next((i for r in data.dense if (i := _image(data, r, "front", 0))), None)
    return [*([first] if first and 0 not in steps else []), *steps.values()]


def _series(data: ReportData) -> list[GridImage]:
    """Each method's pictures by the ratio removed; methods of several ratios, a few of them."""
    grids: list[list[GridImage]] = []
    for series in data.series:
        ratios = sorted({r for t in data.done if (r := ratio_of(t)) and data.at(series, r)})
        if len(ratios) < 2 or len(grids) >= MAX_GRIDS:
            continue
        key = series.label.replace(", ", " ").replace(" + ", " ")
        steps: dict[int, GridImage] = {}  # the slider stops once a percent
        for ratio in ratios:
            step, record = round(100 * ratio), representative(data.at(series, ratio))
            if step not in steps and record and (image := _image(data, record, key, step)):
                steps[step] = image
        if len(steps) < 2:
            continue
        dense = next((i for r in data.dense if (i := _image(data, r, key, 0))), None)
        grids.append([*([dense] if dense and 0 not in steps else []), *steps.values()])
    return [image for grid in grids for image in grid]


def _image(data: ReportData, record: Record, key: str, step: int) -> GridImage | None:
    """The picture of a record's first held-out view, if it was kept."""
    if record.failure is not None:
        return None
    renders = data.store.folder(record.kind, record.key) / "renders"
    path = min(renders.glob("view_*.png"), default=None)
    return None if path is None else GridImage(f"{key}/{path.stem}", step, path)


def _table(records: list[Record]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "id": [r.key for r in records],
        "method": [
            "dense" if r.kind == "training" else method_of(r.config) or r.config.get("control", "?")
            for r in records
        ],
        "networks": [str(r.config.get("networks", "")) for r in records],
        "removed or limit": [amount_of(r) for r in records],
    }
    for name in METRICS:
        values = [number(r, name) for r in records]
        columns[name] = [None if v is None else float(f"{v:.6g}") for v in values]
    return columns
