"""The grid of renders (the report's Figure 4), and pictures small enough to live in the page."""

import base64
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from orchestrator.report.data import ReportData, Series, is_uniform, representative, series_of
from orchestrator.results import Record

MAX_VIEWS = 3
BUDGET = 6_500_000
"""Bytes that all renders of a page may take as base64; the plots and tables add less than 1 MB."""
STEPS = ((400, 84), (320, 80), (240, 78), (180, 75), (120, 70))
"""Widths in pixels and JPEG qualities to try, best first."""


@dataclass(frozen=True)
class Cell:
    """A place in the grid.

    Attributes:
        record: the trial or training shown; None when the sweep has none for this place.
        render: its render of the grid's view, if it was kept.
        error: its error map, if it was kept.
        psnr: of this view, in dB, if known.
    """

    record: Record | None
    render: Path | None = None
    error: Path | None = None
    psnr: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of the grid: one series under one schedule, a cell for each chosen ratio."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """The renders of one held-out view.

    Attributes:
        view: number of the view.
        training: the model that all of them come from.
        truth: the photo, if it was kept.
        dense: the dense model's render.
        rows: the pruned models' renders.
    """

    view: int
    training: str
    truth: Path | None
    dense: Cell
    rows: tuple[Row, ...]

    def paths(self, errors: bool) -> Iterable[Path]:
        """All pictures as often as the page shows them: renders, and error maps if asked for.

        Photo and dense render stand at the head of every row.
        """
        heads = max(1, len(self.rows))
        cells = [self.dense] * heads + [cell for row in self.rows for cell in row.cells]
        shown = [self.truth] * heads + [cell.render for cell in cells]
        if errors:
            shown += [self.truth] * heads + [cell.error for cell in cells]
        yield from (path for path in shown if path)


def grids(data: ReportData) -> tuple[Grid, ...]:
    """One grid a kept view, of the first training that has renders."""
    for dense in sorted(data.dense, key=lambda record: record.key):
        folder = data.store.folder("training", dense.key) / "renders"
        trials = tuple(trial for trial in data.trials if trial.training == dense.training)
        kept = [folder] + [data.store.folder("trial", t.key) / "renders" for t in trials]
        views = sorted({number for f in kept for number in _views(f)})
        if views:
            return tuple(_grid(data, dense, trials, view) for view in views[:MAX_VIEWS])
    return ()


def _grid(data: ReportData, dense: Record, trials: tuple[Record, ...], view: int) -> Grid:
    truth = data.store.folder("training", dense.key) / "renders" / f"truth_{view}.png"
    rows = []
    for series in data.series:
        of_series = [trial for trial in trials if series_of(trial) == series]
        schedules = {str(t.config.get("schedule", "uniform")): is_uniform(t) for t in of_series}
        for schedule, uniform in sorted(schedules.items(), key=lambda item: (not item[1], item[0])):
            label = series.label if uniform else f"{series.label}, {schedule}"
            cells = tuple(
                _cell(data, _trial_at(data, dense.training, series, schedule, ratio), view)
                for ratio in data.chosen_ratios
            )
            if any(cell.record for cell in cells):
                rows.append(Row(label, cells))
    return Grid(
        view,
        dense.training,
        truth if truth.is_file() else None,
        _cell(data, dense, view),
        tuple(rows),
    )


def _trial_at(
    data: ReportData, training: str, series: Series, schedule: str, ratio: float
) -> Record | None:
    return representative(
        trial
        for trial in data.at(series, ratio, uniform=False)
        if trial.training == training and trial.config.get("schedule", "uniform") == schedule
    )


def _cell(data: ReportData, record: Record | None, view: int) -> Cell:
    if record is None or record.failure is not None:
        return Cell(record)
    folder = data.store.folder(record.kind, record.key) / "renders"
    render, error = folder / f"view_{view}.png", folder / f"error_{view}.png"
    psnr = next((score.psnr for score in record.views if score.view == view), None)
    return Cell(
        record, render if render.is_file() else None, error if error.is_file() else None, psnr
    )


def _views(folder: Path) -> Iterable[int]:
    for path in folder.glob("view_*.png"):
        number = path.stem.removeprefix("view_")
        if number.isdecimal():
            yield int(number)


@dataclass(frozen=True)
class Inlined:
    """A picture inside the page: its data URI and its size in pixels."""

    uri: str
    width: int
    height: int


def inline(paths: Iterable[Path], budget: int = BUDGET) -> dict[Path, Inlined]:
    """Pictures as JPEG data URIs, as large as fits the budget; damaged ones are left out."""
    wanted = Counter(paths)
    found: dict[Path, Inlined] = {}
    for width, quality in STEPS:
        found, spent = {}, 0
        for path, times in wanted.items():
            picture = _jpeg(path, width, quality)
            if picture is not None:
                found[path] = picture
                spent += times * len(picture.uri)
            if spent > budget:
                break
        else:
            return found
    return found


def png_uri(data: bytes) -> str:
    """PNG bytes as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def read(path: Path) -> PIL.Image.Image | None:
    """A picture in RGB; None for a damaged one, which is then shown as absent."""
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError):
        return None


def _jpeg(path: Path, width: int, quality: int) -> Inlined | None:
    picture = read(path)
    if picture is None:
        return None
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality, optimize=True)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Inlined(uri, picture.width, picture.height)
