"""The grid of renders (the report's Figure 4), and pictures small enough to live in the page."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from orchestrator.report.data import ReportData, Series, is_uniform, representative, series_of
from orchestrator.results import Record

MAX_VIEWS = 3
BUDGET = 7_000_000
"""Bytes that all pictures of a page may take as base64; the rest of it is far below 3 MB."""
SAFETY = 0.9
SAMPLE = 8
WEBP_METHOD = 2  # 3 takes about twice as long for files a twentieth smaller


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
class Step:
    """How large pictures are: widths in pixels and WebP qualities of two tiers, and how many views.

    Attributes:
        main: of the front, the baselines and the photos.
        rest: of the other trials; None for none of them.
        views: of the main tier; the rest has the first.
    """

    main: tuple[int, int]
    rest: tuple[int, int] | None
    views: int = MAX_VIEWS


STEPS = (
    Step((640, 82), (480, 78)),
    Step((560, 80), (400, 75)),
    Step((504, 78), (320, 72)),
    Step((400, 76), (240, 68), 2),
    Step((400, 74), (240, 66), 1),
    Step((320, 72), (180, 62), 1),
    Step((240, 66), (128, 55), 1),
    Step((240, 60), None, 1),
    Step((160, 55), None, 1),
    Step((96, 45), None, 1),
)
"""From the best down: the first that fits the budget is taken."""


@dataclass(frozen=True)
class Album:
    """The pictures inside the page, each once, as data URIs.

    Attributes:
        views: held-out views that have pictures, as text, in order.
        renders: by key of trial or training, by view: the render and the error map, or None.
        truth: by training, by view: the photo.
        size: width and height of the views in pixels, before any shrinking; None if unknown.
        dropped: trials whose pictures did not fit.
    """

    views: tuple[str, ...] = ()
    renders: Mapping[str, Mapping[str, tuple[str | None, str | None]]] = field(default_factory=dict)
    truth: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    dropped: int = 0

    def has(self, key: str, view: int, error: bool) -> bool:
        """Whether the page holds a render, or an error map."""
        return self.renders.get(key, {}).get(str(view), (None, None))[error] is not None


def album(data: ReportData, budget: int = BUDGET) -> Album:
    """Every kept picture of the sweep, as large as fits the budget; damaged ones are left out.

    The front, the dense models, controls and photos are shown larger, and in up to `MAX_VIEWS`
    views; the other trials in the first view.
    """
    main = {r.key for r in data.dense} | set(data.front_keys)
    main |= {r.key for r in data.by_key.values() if r.kind not in ("trial", "training")}
    records = [r for r in data.by_key.values() if r.failure is None]
    truths: dict[tuple[str, int], Path] = {}
    wanted: dict[tuple[str, int, bool], Path] = {}
    for record in records:
        folder = data.store.folder(record.kind, record.key) / "renders"
        if record.kind == "training":
            truths |= {(record.training, v): p for v, p in _numbered(folder, "truth")}
        for error, name in ((False, "view"), (True, "error")):
            wanted |= {(record.key, v, error): p for v, p in _numbered(folder, name)}
    views = sorted({view for _, view, _ in wanted} | {view for _, view in truths})[:MAX_VIEWS]
    pages = [
        [p for (_, v), p in truths.items() if v == view]
        + [p for (key, v, _), p in wanted.items() if key in main and v == view]
        for view in views
    ]
    small = [p for (k, v, _), p in wanted.items() if k not in main and v in views[:1]]
    step = _step(pages, small, budget)
    large = [path for page in pages[: step.views] for path in page]
    uris = dict(zip(large, _webps(large, *step.main), strict=True))
    if step.rest is not None:
        uris |= zip(small, _webps(small, *step.rest), strict=True)

    renders: dict[str, dict[str, tuple[str | None, str | None]]] = {}
    for key, view, _ in wanted:
        pair = (uris.get(wanted.get((key, view, False))), uris.get(wanted.get((key, view, True))))  # type: ignore[arg-type]
        if any(pair):
            renders.setdefault(key, {})[str(view)] = pair
    truth: dict[str, dict[str, str]] = {}
    for (training, view), path in truths.items():
        if uri := uris.get(path):
            truth.setdefault(training, {})[str(view)] = uri
    any_size = (*truths.values(), *wanted.values())
    first = next((picture for path in any_size if (picture := read(path))), None)
    return Album(
        views=tuple(map(str, views[: step.views])),
        renders=renders,
        truth=truth,
        size=None if first is None else first.size,
        dropped=0 if step.rest else len(small) // 2,
    )


def _numbered(folder: Path, name: str) -> Iterable[tuple[int, Path]]:
    for path in sorted(folder.glob(f"{name}_*.png")):
        number = path.stem.removeprefix(f"{name}_")
        if number.isdecimal():
            yield int(number), path


def _step(pages: Sequence[Sequence[Path]], small: Sequence[Path], budget: int) -> Step:
    """The first step whose pictures, judged by a sample of them, fit the budget."""
    for step in STEPS:
        spent = sum(_estimate(page, *step.main) for page in pages[: step.views])
        if step.rest is not None:
            spent += _estimate(small, *step.rest)
        if spent <= budget * SAFETY:
            return step
    return STEPS[-1]


def _estimate(paths: Sequence[Path], width: int, quality: int) -> float:
    if not paths:
        return 0.0
    count = min(SAMPLE, len(paths))
    picks = [paths[i * len(paths) // count] for i in range(count)]
    return len(paths) / count * sum(len(uri or "") for uri in _webps(picks, width, quality))


def read(path: Path) -> PIL.Image.Image | None:
    """A picture in RGB; None for a damaged one, which is then shown as absent."""
    try:
        with PIL.Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError):
        return None


def _webps(paths: Sequence[Path], width: int, quality: int) -> list[str | None]:
    """Many pictures, on every core: Pillow lets other threads run while it works."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda path: _webp(path, width, quality), paths))


def _webp(path: Path, width: int, quality: int) -> str | None:
    picture = read(path)
    if picture is None:
        return None
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=quality, method=WEBP_METHOD)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
