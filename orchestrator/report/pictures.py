"""The grid of renders (the report's Figure 4), and pictures small enough to live in the page."""

import bisect
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.log import logger
from orchestrator.report import webp
from orchestrator.report.data import ReportData, Series, is_uniform, representative, series_of
from orchestrator.report.webp import Job, read
from orchestrator.results import Record

MAX_VIEWS = 3
BUDGET = 7_000_000
"""Bytes that all pictures of a page may take as base64; the rest of it is far below 3 MB."""
SAFETY = 0.9
SAMPLE = 8
MANY = 100
"""So many pictures are worth a process of their own."""


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


_Render = tuple[str, int, bool]
"""Key of a trial or training, view, and whether it is the error map."""


def album(data: ReportData, budget: int = BUDGET) -> Album:
    """Every kept picture of the sweep, as large as fits the budget; damaged ones are left out.

    The front, the dense models, controls and photos are shown larger, and in up to `MAX_VIEWS`
    views; the other trials in the first view.
    """
    main = {r.key for r in data.dense} | set(data.front_keys)
    main |= {r.key for r in data.by_key.values() if r.kind not in ("trial", "training")}
    truths, wanted = _kept(data)
    views = sorted({view for _, view, _ in wanted} | {view for _, view in truths})[:MAX_VIEWS]
    pages = [
        [p for (_, v), p in truths.items() if v == view]
        + [p for (key, v, _), p in wanted.items() if key in main and v == view]
        for view in views
    ]
    small = [p for (k, v, _), p in wanted.items() if k not in main and v in views[:1]]
    with Encoder(sum(map(len, pages)) + len(small)) as encoder:
        step = _step(encoder, pages, small, budget)
        large = [path for page in pages[: step.views] for path in page]
        rest = [] if step.rest is None else [(path, *step.rest) for path in small]
        made = encoder([*((path, *step.main) for path in large), *rest])
    uris = dict(zip((*large, *(path for path, *_ in rest)), made, strict=True))

    made_of = {entry: uri for entry, path in wanted.items() if (uri := uris.get(path))}
    renders: dict[str, dict[str, tuple[str | None, str | None]]] = {}
    for key, view, _ in made_of:
        pair = made_of.get((key, view, False)), made_of.get((key, view, True))
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


def _kept(data: ReportData) -> tuple[dict[tuple[str, int], Path], dict[_Render, Path]]:
    """Files of the photos, by training and view, and of the renders and error maps."""
    truths: dict[tuple[str, int], Path] = {}
    wanted: dict[_Render, Path] = {}
    for record in data.by_key.values():
        if record.failure is not None:
            continue
        folder = data.store.folder(record.kind, record.key) / "renders"
        if record.kind == "training":
            truths |= {(record.training, v): p for v, p in _numbered(folder, "truth")}
        for error, name in ((False, "view"), (True, "error")):
            wanted |= {(record.key, v, error): p for v, p in _numbered(folder, name)}
    return truths, wanted


def _numbered(folder: Path, name: str) -> Iterable[tuple[int, Path]]:
    for path in sorted(folder.glob(f"{name}_*.png")):
        number = path.stem.removeprefix(f"{name}_")
        if number.isdecimal():
            yield int(number), path


def _step(
    encoder: "Encoder", pages: Sequence[Sequence[Path]], small: Sequence[Path], budget: int
) -> Step:
    """The first step whose pictures, judged by a sample of them, fit the budget."""

    def fits(step: Step) -> bool:
        tiers = [(page, step.main) for page in pages[: step.views]]
        tiers += [] if step.rest is None else [(small, step.rest)]
        picks = [[(path, *look) for path in _sample(of)] for of, look in tiers]
        sizes = iter([len(uri or "") for uri in encoder([job for jobs in picks for job in jobs])])
        spent = 0.0
        for (of, _), jobs in zip(tiers, picks, strict=True):
            spent += sum(next(sizes) for _ in jobs) * len(of) / max(len(jobs), 1)
        return spent <= budget * SAFETY

    if fits(STEPS[0]):
        return STEPS[0]
    # Each is smaller than the one before: not all have to be tried.
    return STEPS[bisect.bisect_left(STEPS[:-1], True, lo=1, key=fits)]


def _sample(paths: Sequence[Path]) -> list[Path]:
    count = min(SAMPLE, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


class Encoder:
    """Makes WebPs of pictures, each once; of many in a process of its own.

    Use it as a context manager.

    Args:
        expected: how many pictures there will be.
    """

    def __init__(self, expected: int) -> None:
        self._made: dict[tuple[Path, int, int], str | None] = {}
        self._expected = expected
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        if self._expected >= MANY:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", webp.__file__],  # -P: its neighbours are no libraries
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            except OSError as error:
                logger.debug("pictures are made in this process: %s", error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def __call__(self, jobs: Sequence[tuple[Path, int, int]]) -> list[str | None]:
        """Data URIs of pictures, given as path, width and quality; None for damaged ones."""
        new = [job for job in dict.fromkeys(jobs) if job not in self._made]
        if new:
            made = self._encode([(str(path), width, quality) for path, width, quality in new])
            self._made |= zip(new, made, strict=True)
        return [self._made[job] for job in jobs]

    def _encode(self, jobs: list[Job]) -> list[str | None]:
        if self._process is not None and self._process.stdin and self._process.stdout:
            try:
                self._process.stdin.write(json.dumps(jobs) + "\n")
                self._process.stdin.flush()
                made: list[str | None] = json.loads(self._process.stdout.readline())
                return made
            except (OSError, ValueError) as error:  # it died: there is another way
                logger.debug("pictures are made in this process: %s", error)
                self._end()
        return webp.encode_here(jobs)

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
