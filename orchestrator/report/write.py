"""Writes the report's files, each whole or not at all."""

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from orchestrator.errors import StoreError, SweepError
from orchestrator.report import plots
from orchestrator.report.data import ReportData
from orchestrator.report.page import page
from orchestrator.report.pictures import Grid, album, grids
from orchestrator.report.tables import percent, results_csv, results_json
from orchestrator.report.webp import read


@dataclass(frozen=True)
class ReportFiles:
    """Where the report is.

    Attributes:
        html: the page, self-contained.
        csv: one row a record.
        json: every record, and the fronts.
        plots: the plots as PNG.
    """

    html: Path
    csv: Path
    json: Path
    plots: tuple[Path, ...]


def write_report(data: ReportData, out: Path) -> ReportFiles:
    """Write ``report.html``, the plots, ``results.csv`` and ``results.json`` into a folder.

    Raises:
        SweepError: the sweep has neither a result nor a failure to report yet.
        StoreError: the folder cannot be written.
    """
    if not data.dense and not data.trials:
        raise SweepError(
            f"the sweep {data.name} has nothing to report yet; run it first: prunefield run FILE"
        )
    contents = _contents(data)
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".report.", dir=out))
        try:
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
            for name in contents:
                (temporary / name).replace(out / name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StoreError(
            f"cannot write the report to {out}: {error.strerror or error}; give another folder "
            "with -o DIR"
        ) from error
    return ReportFiles(
        html=out / "report.html",
        csv=out / "results.csv",
        json=out / "results.json",
        plots=tuple(out / name for name in contents if name.endswith(".png")),
    )


def _contents(data: ReportData) -> dict[str, bytes]:
    with ThreadPoolExecutor(1) as beside:  # the pictures are made elsewhere, and waited for here
        pictures = beside.submit(album, data)
        drawn = {
            "front_psnr": plots.front_plot(data, "psnr", plots.LIGHT),
            "front_mse": plots.front_plot(data, "mse", plots.LIGHT),
            "ratio_mse": plots.ratio_plot(data, "mse", plots.LIGHT),
            "ratio_psnr": plots.ratio_plot(data, "psnr", plots.LIGHT),
        }
        views = grids(data)
        sheet = _sheet(data, views[0]) if views else None
        tables = {"results.csv": results_csv(data), "results.json": results_json(data)}
        text = page(data, views, pictures.result())
    contents = {"report.html": text.encode()}
    contents |= {f"{name}.png": png for name, png in drawn.items()}
    if sheet:
        contents["renders.png"] = sheet
    return contents | {name: table.encode() for name, table in tables.items()}


def _sheet(data: ReportData, grid: Grid) -> bytes | None:
    columns = ["ground truth", "dense", *(percent(ratio) for ratio in data.chosen_ratios)]
    pictures: dict[tuple[str, str], PIL.Image.Image] = {}
    for row in grid.rows:
        places = [grid.truth, grid.dense.render, *(cell.render for cell in row.cells)]
        pictures |= {
            (row.label, column): picture
            for column, path in zip(columns, places, strict=True)
            if path is not None and (picture := read(path)) is not None
        }
    return plots.contact_sheet([row.label for row in grid.rows], columns, pictures, plots.LIGHT)
