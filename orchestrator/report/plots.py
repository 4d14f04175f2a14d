"""The plots, by Matplotlib's object interface: no pyplot, no global figure, no window.

Colour names the criterion, the marker the networks; a hollow marker is a schedule other than
uniform.
"""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from orchestrator.pareto import Quality
from orchestrator.report.data import (
    MB,
    ReportData,
    Series,
    is_uniform,
    number,
    ratio_of,
    series_of,
)

DPI = 160
NAMES: dict[str, str] = {"psnr": "PSNR (dB)", "mse": "MSE"}
MARKERS = {"both": "o", "coarse": "D", "fine": "^"}


@dataclass(frozen=True)
class Theme:
    """Colours of a plot; those of the criteria stay apart for colour-blind eyes (Okabe–Ito)."""

    paper: str
    ink: str
    faint: str
    cycle: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1c2024",
    "#d5d9de",
    ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
)


def front_plot(data: ReportData, quality: Quality, theme: Theme) -> bytes:
    """Size against quality: every trial, the front as a staircase, the dense models as stars."""
    figure, axes = _figure(theme, (6.4, 4.4))
    front = data.front(quality)
    if front:
        sizes = [point.size_bytes / MB for point in front]
        values = [getattr(point, quality) for point in front]
        axes.step(sizes, values, where="post", color=theme.ink, lw=1.2, alpha=0.75, zorder=2)
    _scatter(
        axes, data, theme, horizontal="size_bytes", quality=quality, scale=lambda size: size / MB
    )
    for record in data.dense:
        size, value = number(record, "size_bytes"), number(record, quality)
        if size is not None and value is not None:
            axes.plot(size / MB, value, "*", ms=14, color=theme.ink, zorder=5)
    extra = [Line2D([], [], color=theme.ink, lw=1.2, label="Pareto front")]
    if any(number(record, quality) is not None for record in data.dense):
        extra.append(_dot(theme, "*", theme.ink, "dense model", size=12))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("model file (MB of 2²⁰ bytes, log scale)")
    axes.set_ylabel(f"{NAMES[quality]}, held-out views")
    _legend(axes, data, theme, extra)
    return _png(figure)


def ratio_plot(data: ReportData, quality: Quality, theme: Theme) -> bytes:
    """Half of the report's Figure 3: MSE or PSNR against the requested ratio."""
    figure, axes = _figure(theme, (6.4, 4.4))
    for series in data.series:
        _mean_line(axes, data, series, quality, theme)
    _scatter(axes, data, theme, horizontal=None, quality=quality, scale=lambda ratio: 100 * ratio)
    dashes = (0, (4, 3))
    levels = [v for r in data.dense if (v := number(r, quality)) is not None]
    for level in levels:
        axes.axhline(level, color=theme.ink, lw=1, ls=dashes, alpha=0.7, zorder=1)
    axes.set_xlabel("channels removed, requested (%)")
    axes.set_ylabel(f"{NAMES[quality]}, held-out views")
    dense = [Line2D([], [], color=theme.ink, lw=1, ls=dashes, label="dense model")]
    _legend(axes, data, theme, dense if levels else [])
    return _png(figure)


def contact_sheet(
    rows: Sequence[str],
    columns: Sequence[str],
    pictures: Mapping[tuple[str, str], PIL.Image.Image],
    theme: Theme,
) -> bytes | None:
    """The report's Figure 4 as one picture: a grid of renders; None without any."""
    if not pictures:
        return None
    first = next(iter(pictures.values()))
    aspect = first.height / first.width
    width = 1.9
    figure = Figure(
        (width * len(columns) + 1.2, (width * aspect + 0.12) * len(rows) + 0.4),
        facecolor=theme.paper,
        layout="constrained",
    )
    grid: Any = figure.subplots(len(rows), len(columns), squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            axes = grid[i][j]
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_frame_on(False)
            if i == 0:
                axes.set_title(column, fontsize=9, color=theme.ink)
            if j == 0:
                axes.set_ylabel(row.replace(", ", "\n"), fontsize=9, color=theme.ink)
            if picture := pictures.get((row, column)):
                axes.imshow(picture)
            else:
                axes.text(0.5, 0.5, "–", ha="center", va="center", color=theme.ink)
    return _png(figure, 120)


def _scatter(
    axes: Axes,
    data: ReportData,
    theme: Theme,
    *,
    horizontal: str | None,
    quality: str,
    scale: Callable[[float], float],
) -> None:
    groups: dict[tuple[Series, bool], list[tuple[float, float]]] = {}
    for trial in data.done:
        x = ratio_of(trial) if horizontal is None else number(trial, horizontal)
        y = number(trial, quality)
        if x is not None and y is not None:
            groups.setdefault((series_of(trial), is_uniform(trial)), []).append((scale(x), y))
    for (series, uniform), places in groups.items():
        color = _color(data, series, theme)
        axes.plot(
            [x for x, _ in places],
            [y for _, y in places],
            _marker(series),
            ms=5.5 if uniform else 9,
            mec=color,
            mew=1.2,
            mfc=color if uniform else "none",
            alpha=0.9,
            zorder=4,
        )


def _mean_line(axes: Axes, data: ReportData, series: Series, quality: str, theme: Theme) -> None:
    by_ratio: dict[float, list[float]] = {}
    for trial in data.done:
        ratio, value = ratio_of(trial), number(trial, quality)
        if series_of(trial) == series and is_uniform(trial) and ratio is not None:
            by_ratio.setdefault(ratio, []).extend([] if value is None else [value])
    ratios = sorted(ratio for ratio, values in by_ratio.items() if values)
    means = [statistics.fmean(by_ratio[ratio]) for ratio in ratios]
    axes.plot(
        [100 * ratio for ratio in ratios],
        means,
        color=_color(data, series, theme),
        lw=1.4,
        ls={"both": "-", "coarse": "--"}.get(series.networks, ":"),
        zorder=3,
    )


def _color(data: ReportData, series: Series, theme: Theme) -> str:
    criteria = list(dict.fromkeys(s.criterion for s in data.series))
    return theme.cycle[criteria.index(series.criterion) % len(theme.cycle)]


def _marker(series: Series) -> str:
    return MARKERS.get(series.networks, "s")


def _dot(
    theme: Theme, marker: str, color: str, label: str, *, size: float = 6, hollow: bool = False
) -> Line2D:
    face = theme.paper if hollow else color
    return Line2D([], [], ls="", marker=marker, ms=size, mec=color, mfc=face, label=label)


LEGEND_INSIDE = 9
LEGEND_COLUMNS = 2
LEGEND_ROW_INCHES = 0.21


def _legend(axes: Axes, data: ReportData, theme: Theme, extra: list[Line2D]) -> None:
    handles = [
        _dot(theme, _marker(series), _color(data, series, theme), series.label)
        for series in data.series
        if any(series_of(trial) == series for trial in data.done)
    ]
    if any(not is_uniform(trial) for trial in data.done):
        handles.append(_dot(theme, "o", theme.ink, "schedule not uniform", size=9, hollow=True))
    entries = [*handles, *extra]
    if not entries:
        return
    look = {
        "fontsize": 8.5,
        "frameon": True,
        "framealpha": 0.8,
        "facecolor": theme.paper,
        "edgecolor": theme.faint,
        "labelcolor": theme.ink,
    }
    if len(entries) <= LEGEND_INSIDE:
        axes.legend(handles=entries, **look)
        return
    # Too many to cover the plot with: below it, and the figure grows by as much.
    figure = axes.get_figure(root=True)
    assert figure is not None
    rows = math.ceil(len(entries) / LEGEND_COLUMNS)
    figure.set_size_inches(figure.get_figwidth(), figure.get_figheight() + LEGEND_ROW_INCHES * rows)
    figure.legend(handles=entries, loc="outside lower center", ncols=LEGEND_COLUMNS, **look)


def _figure(theme: Theme, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(size, facecolor=theme.paper, layout="constrained")
    axes: Axes = figure.subplots()
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, which="both", labelsize=9)
    for name in ("xaxis", "yaxis"):
        getattr(axes, name).label.set(color=theme.ink, size=10)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
    return figure, axes


def _png(figure: Figure, dpi: int = DPI) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return buffer.getvalue()


def describe_front(data: ReportData, quality: Quality) -> str:
    """The front plot in words, for those who cannot see it."""
    front = data.front(quality)
    if not front:
        return f"Model size against {NAMES[quality]}: no trial has a result yet."
    digits = 2 if quality == "psnr" else 5
    ends = " to ".join(
        f"{point.size_bytes / MB:.3f} MB at {getattr(point, quality):.{digits}f}"
        for point in dict.fromkeys((front[0], front[-1]))
    )
    return (
        f"Model size against {NAMES[quality]} for {len(data.points)} trials; the Pareto front "
        f"holds {len(front)}, from {ends}."
    )


def describe_ratios(data: ReportData, quality: Quality) -> str:
    """A ratio plot in words."""
    ratios = [ratio for trial in data.done if (ratio := ratio_of(trial)) is not None]
    if not ratios:
        return f"{NAMES[quality]} against ratio: no trial has a result yet."
    low, high = min(ratios), max(ratios)
    labels = "; ".join(series.label for series in data.series)
    return (
        f"{NAMES[quality]} against the fraction of channels removed, {100 * low:g} to "
        f"{100 * high:g} percent, one line for each of: {labels}. "
        "The numbers are in the tables."
    )
