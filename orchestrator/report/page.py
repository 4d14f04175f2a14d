"""The page: one file of HTML with its style, its script and its data; nothing is loaded.

The tables are plain HTML and readable without JavaScript; charts, filters and the chosen model are
drawn by ``assets/page.js`` from the block of JSON that `payload` makes. The page's own security
policy allows that one script, by its hash, and no request to anywhere.
"""

import base64
import hashlib
import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from nerf.evaluation import ERROR_MAP_FULL_SCALE
from orchestrator.pareto import Quality
from orchestrator.report.data import (
    ReportData,
    Series,
    mean,
    number,
    ratio_of,
    smallest_within,
)
from orchestrator.report.effects import amount_of
from orchestrator.report.payload import ASSETS, payload, quality_of
from orchestrator.report.pictures import Album, Cell, Grid
from orchestrator.report.plots import describe_front, describe_ratios
from orchestrator.report.published import TABLE_1
from orchestrator.report.tables import ABSENT, fixed, megabytes, percent
from orchestrator.results import Record, method_of
from orchestrator.units import show_bytes

LOSSES = (0.5, 1.0)
SCALE = f"mean error of the three colours, black for 0, white from {ERROR_MAP_FULL_SCALE:g} on; "
QUALITIES: tuple[Quality, ...] = ("psnr", "mse")


def page(data: ReportData, grids: Sequence[Grid], album: Album) -> str:
    """The whole page.

    Args:
        data: the sweep.
        grids: the grids of renders, one a view.
        album: the pictures that fit into the page.
    """
    script = (ASSETS / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    sections = [
        ("fronts", "Size against quality", _explorer(data)),
        ("gallery-title", "The front in pictures", _gallery(album)),
        ("detail-title", "Flat regions and detail", _detail()),
        ("effects", "What the parameters did", _effects(data)),
        ("table", "Beside the published table" if of_fern(data) else "By ratio", _published(data)),
        ("renders", "Renders by ratio", _renders(data, grids, album)),
        ("trials", "All trials", _trials(data)),
        ("failed", "Failed", _failed(data)),
        ("provenance", "Where the numbers come from", _provenance(data)),
    ]
    links = "".join(f'<li><a href="#{name}">{e(title)}</a></li>' for name, title, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{e(title)}</h2>{content}</section>\n'
        for name, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light dark">
<title>{e(data.name)} – pruning sweep</title>
<style>{(ASSETS / "page.css").read_text()}</style>
</head>
<body>
<header>
<div class="top"><div>
<h1>{e(data.name)}</h1>
<p class="soft">{e(data.description or "A pruning sweep")} · sweep <code>{e(data.hash)}</code></p>
</div><button type="button" class="button" id="theme">theme: auto</button></div>
{_facts(data)}
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
<noscript><p class="bad">The charts and pictures of this page are drawn by its own JavaScript, which
is switched off; the tables below hold the same numbers.</p></noscript>
{body}</main>
<p class="sr" id="said" aria-live="polite"></p>
<footer>Made by prunefield. kB and MB are 10<sup>3</sup> and 10<sup>6</sup> bytes (2<sup>20</sup>
in the table by ratio); MSE and PSNR are means over full held-out views, PSNR in dB.</footer>
<script type="application/json" id="data">{payload(data, album)}</script>
<script>{script}</script>
</body>
</html>
"""


def e(value: Any) -> str:
    """Text as HTML."""
    return html.escape(str(value), quote=True)


# --- sections ------------------------------------------------------------------------------


def _facts(data: ReportData) -> str:
    failed = len(data.trials) - len(data.measured)
    facts = [
        (
            "Trials",
            f"{len(data.done)} done",
            f"{failed} failed" if failed else "none failed",
        ),
        ("On the Pareto front", str(len(data.front_keys)), "of size and PSNR"),
    ]
    for record in data.dense[:2]:
        if record.failure is None:
            psnr = fixed(number(record, "psnr"), 2)
            facts.append(("Dense model", f"{psnr} dB", _bytes(record)))
    for loss in LOSSES:
        best = smallest_within(data, loss)
        facts.append(
            (
                f"Smallest within {loss:g} dB of dense",
                _bytes(best) if best else "none",
                _summary(best) if best else "no trial comes this close",
            )
        )
    if data.hypervolume is not None and data.corner is not None:
        corner = f"from {show_bytes(int(data.corner.size_bytes))}, {data.corner.psnr:g} dB"
        facts.append(("Hypervolume", f"{data.hypervolume / 1000:,.0f} kB·dB", corner))
    items = "".join(
        f"<div><dt>{e(name)}</dt><dd>{e(value)}<small>{e(more)}</small></dd></div>"
        for name, value, more in facts
    )
    return f'<dl class="facts">{items}</dl>'


def _explorer(data: ReportData) -> str:
    words = " ".join((*(describe_front(data, q) for q in QUALITIES), describe_ratios(data, "psnr")))
    return f"""
<p class="sr">{e(words)}</p>
<p>Each mark is a trial, the line the Pareto front of what is shown: no trial beats it in both size
and quality. Stars are baselines. Click a mark, or use the arrow keys, to look at that model.</p>
<div class="row"><div class="segments" id="planes" role="group" aria-label="quality"></div>
<div class="row" id="switches"></div></div>
<details id="filter-box"><summary>Filters</summary><div class="filters" id="filters"></div>
</details>
<p class="row soft"><span id="count"></span>
<button type="button" class="button" id="reset" hidden>show all</button></p>
<div class="explorer">
<div class="card"><div class="chart" id="front" tabindex="0" role="application"
aria-label="Size against quality. Arrow keys move from model to model, Enter goes to the chosen one,
Escape comes back."></div>
<ul class="legend" id="legend"></ul></div>
<aside class="card chosen" id="chosen" tabindex="-1" aria-label="The chosen model"></aside>
</div>"""


def _gallery(album: Album) -> str:
    dropped = (
        f"<p class='soft'>Pictures of {album.dropped} trials off the front did not fit in.</p>"
        if album.dropped
        else ""
    )
    return (
        "<p>The models of the front, largest first, as far as the filters above let them pass.</p>"
        f'<div class="gallery" id="gallery"></div>{dropped}'
    )


def _detail() -> str:
    return """
<p>The pixels of each held-out photo in five equal parts, from its flattest fifth to its most
detailed (by the gradient of the luminance), and the PSNR of each: what pruning takes away
first.</p>
<div class="segments" id="losses" role="group" aria-label="scale"></div>
<div class="card chart" id="detail"></div>"""


def _effects(data: ReportData) -> str:
    if not data.done:
        return '<p class="none">No trial has a result.</p>'
    searched = quality_of(data) == "validation_psnr"
    what = "PSNR on validation rays" if searched else "PSNR"
    where = ", on validation rays" if searched else ""
    progress = (
        f'<div class="card whole"><h3>Hypervolume over trials{where}</h3>'
        '<div class="chart" id="history"></div></div>'
        if data.corner is not None
        else ""
    )
    return f"""
<div class="charts">
<div class="card"><h3>What {what} depends on</h3><p class="soft">Share of the variance over the
trials that a parameter explains alone (ε²).</p><div class="bars" id="importance-psnr"></div></div>
<div class="card"><h3>What the loss at equal size depends on</h3><p class="soft">The same for
how far a trial lies below the front at its size.</p><div class="bars" id="importance-gap"></div>
</div>
{progress}</div>
<p class="soft">Parameters that vary together in the sweep's grids share their credit.</p>
<div class="card" id="parallel"><h3>Parallel coordinates</h3><p class="soft">One line a trial,
brighter for a higher PSNR; the filters above grey lines out, a click chooses one.</p>
<div class="wide chart" tabindex="0" role="region" aria-label="parallel coordinates"></div></div>"""


def of_fern(data: ReportData) -> bool:
    """Whether the scene is the published table's, as far as its folder's name says."""
    return data.scene in ("", "fern")


def _published(data: ReportData) -> str:
    series, table_1 = _compared(data), TABLE_1 if of_fern(data) else ()
    have = {0.0} | {row.ratio for row in table_1}
    tried = {r for t in data.trials if (r := ratio_of(t))}
    have |= {r for r in tried if any(data.at(s, r) for s in series)}
    published = {row.ratio: row for row in table_1}
    top, second = '<th rowspan="2" scope="col" class="left">Removed</th>', ""
    if table_1:
        top += '<th colspan="3" scope="colgroup" class="edge">As published (fern)</th>'
        second = (
            '<th scope="col" class="edge">size, coarse only</th><th scope="col">MSE</th>'
            '<th scope="col">PSNR</th>'
        )
    for s in series:
        top += f'<th colspan="4" scope="colgroup" class="edge">This sweep: {e(s.label)}</th>'
        second += (
            '<th scope="col" class="edge">model file</th><th scope="col">nonzero, coarse</th>'
            '<th scope="col">MSE</th><th scope="col">PSNR</th>'
        )
    rows = []
    for ratio in sorted(have):
        row = published.get(ratio)
        name = "original" if ratio == 0 else percent(ratio)
        cells = f'<th scope="row">{e(name)}</th>'
        if table_1:
            cells += _cells((f"{row.size} MB", row.mse, row.psnr) if row else (ABSENT,) * 3)
        for s in series:
            records = data.dense if ratio == 0 else data.at(s, ratio)
            cells += _cells(
                (
                    megabytes(mean(records, "size_bytes")),
                    megabytes(mean(records, "nonzero_bytes_coarse")),
                    fixed(mean(records, "mse"), 4),
                    fixed(mean(records, "psnr"), 2),
                )
            )
        rows.append(f"<tr>{cells}</tr>")
    several = any(
        sum(t.failure is None for t in data.at(s, r)) > 1 for s in series for r in have if r
    )
    note = (
        "<p>The published numbers are the report's Table 1, as published: LLFF fern, factor 8, "
        "200,000 iterations. They are not to be compared digit by digit: their size counts the "
        "nonzero parameters of the <em>coarse network only</em> (no file became smaller), their "
        "<em>PSNR was measured wrongly</em> (the render of one view against the photo of another, "
        "so it stays near 14.5 dB whatever is pruned), and their MSE is a training loss on random "
        "training rays. This sweep measures full held-out views, and its files are the smaller "
        "networks themselves.</p>"
        if table_1
        else "<p>Files of the smaller networks themselves. MB is 2<sup>20</sup> bytes here.</p>"
    )
    if several:
        note += (
            "<p class='soft'>Where a series has several trials at one ratio (seeds, calibration "
            "sets, trainings), their mean is shown.</p>"
        )
    caption = f"<caption><span>Uniform schedules only; {ABSENT}: no such number</span></caption>"
    return (
        f"{note}{_scroll('Sizes and quality by ratio')}<table>{caption}<thead><tr>{top}</tr>"
        f"<tr>{second}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _compared(data: ReportData) -> tuple[Series, ...]:
    """The report's own criterion where the sweep has it, else whatever it has at ratios."""
    tried = {r for t in data.trials if (r := ratio_of(t)) is not None}
    at_ratios = tuple(s for s in data.series if any(data.at(s, r) for r in tried))
    own = tuple(s for s in at_ratios if s.criterion == "activation")
    return (own or at_ratios or data.series)[:3]


def _renders(data: ReportData, grids: Sequence[Grid], album: Album) -> str:
    if not grids:
        return '<p class="none">The storage folder holds no renders of this sweep.</p>'
    parts = [_grid(data, grids[0], album, errors=False)]
    if any(cell.error for row in grids[0].rows for cell in row.cells):
        parts.append(_grid(data, grids[0], album, errors=True))
    return "".join(parts)


def _grid(data: ReportData, grid: Grid, album: Album, *, errors: bool) -> str:
    what = "Error maps" if errors else "Renders"
    title = f"{what} of held-out view {grid.view}"
    scale = SCALE if errors else ""
    head = '<th scope="col">Ground truth</th><th scope="col">Dense</th>'
    head = f'<th scope="col">Pruned</th>{head}' + "".join(
        f'<th scope="col">{e(percent(ratio))}</th>' for ratio in data.chosen_ratios
    )
    place = f"{grid.training}/{grid.view}/2"
    has = str(grid.view) in album.truth.get(grid.training, {})
    truth = _picture(place if has else None, f"Photo of held-out view {grid.view}", "photo")
    dense = _render(grid.dense, grid.view, album, f"the dense model, view {grid.view}", errors)
    rows = []
    for row in grid.rows:
        cells = f'<th scope="row">{e(row.label)}</th><td>{truth}</td><td>{dense}</td>'
        for ratio, cell in zip(data.chosen_ratios, row.cells, strict=True):
            name = f"{row.label}, {percent(ratio)} removed, view {grid.view}"
            cells += f"<td>{_render(cell, grid.view, album, name, errors)}</td>"
        rows.append(f"<tr>{cells}</tr>")
    if not rows:
        cells = f'<th scope="row">{ABSENT}</th><td>{truth}</td><td>{dense}</td>'
        rows.append(f"<tr>{cells}{'<td></td>' * len(data.chosen_ratios)}</tr>")
    table = (
        f'{_scroll(title)}<table class="grid"><caption><span>{e(title)} of training '
        f"<code>{e(grid.training)}</code>; {scale}under each its PSNR on this view "
        f"and the size of the model file</span></caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f"<details><summary>{e(title)}</summary>{table}</details>"


def _render(cell: Cell, view: int, album: Album, name: str, errors: bool) -> str:
    if cell.record is None:
        return '<div class="none">not in this sweep</div>'
    if cell.record.failure is not None:
        return f'<div class="none bad">failed in {e(cell.record.failure.stage)}</div>'
    caption = f"{fixed(cell.psnr, 2)} dB · {_bytes(cell.record)}"
    place = f"{cell.record.key}/{view}/{int(errors)}"
    kept = album.has(cell.record.key, view, errors)
    alt = f"{'Error map' if errors else 'Render'} of {name}"
    return _picture(place if kept else None, alt, caption)


def _picture(place: str | None, alt: str, caption: str) -> str:
    """A picture that the script takes from the block of data: key / view / which."""
    if place is None:
        return f'<div class="none">no picture kept<br>{e(caption)}</div>'
    return (
        f'<figure><img data-picture="{e(place)}" alt="{e(alt)}" decoding="async">'
        f"<figcaption>{e(caption)}</figcaption></figure>"
    )


TRIAL_HEAD = (
    "criterion",
    "networks",
    "ratio or size",
    "schedule",
    "calibration",
    "model file",
    "MSE",
    "PSNR",
    "SSIM",
    "trial",
)


def _trials(data: ReportData) -> str:
    ordered = sorted(data.done, key=lambda r: (number(r, "size_bytes") or 0.0, r.key))
    rows = [_trial_row(data, record) for record in ordered]
    table = _table(
        "All trials with a result by size; ● marks the front", TRIAL_HEAD, rows, "trials-table"
    )
    return f"<details><summary>{len(rows)} trials</summary>{table}</details>"


def _trial_row(data: ReportData, record: Record) -> str:
    config = record.config
    front = record.key in data.front_keys
    views, rays = config.get("calibration_views"), config.get("calibration_rays")
    calibration = ABSENT if views is None and rays is None else f"{views} × {rays}"
    if config.get("seed") is not None:
        calibration += f", seed {config['seed']}"
    mark = '<span class="mark" aria-label="on the front">●</span> ' if front else ""
    return (
        f'<tr data-id="{e(record.key)}"{" class=front" if front else ""}><th scope="row">{mark}'
        f"{e(method_of(config) or ABSENT)}</th>"
        f'<td class="left">{e(config.get("networks", ABSENT))}</td>'
        f"<td>{e(amount_of(record))}</td>"
        f'<td class="left">{e(config.get("schedule", ABSENT))}</td>'
        f'<td class="left">{e(calibration)}</td>'
        f'<td data-v="{e(number(record, "size_bytes") or 0)}">{e(_bytes(record))}</td>'
        f"<td>{fixed(number(record, 'mse'), 5)}</td><td>{fixed(number(record, 'psnr'), 2)}</td>"
        f"<td>{fixed(number(record, 'ssim'), 3)}</td><td><code>{e(record.key)}</code></td></tr>"
    )


def _failed(data: ReportData) -> str:
    rows = [
        f'<tr><th scope="row"><code>{e(r.key)}</code></th><td class="left">{e(r.kind)}</td>'
        f'<td class="left">{e(_summary(r))}</td><td class="left bad">{e(r.failure.stage)}</td>'
        f'<td class="left wrap">{e(r.failure.reason)}</td></tr>'
        for r in data.failed
        if r.failure
    ]
    if not rows:
        return "<p>Nothing failed.</p>"
    head = ("id", "kind", "configuration", "stage", "reason")
    return _table("What has no result, and why; running the sweep again tries it again", head, rows)


def _provenance(data: ReportData) -> str:
    records = (*data.dense, *data.trials, *data.controls)
    made = [r for r in records if r.failure is None] or list(records)
    facts: list[tuple[str, str]] = [
        ("sweep", f"{data.name}, hash {data.hash}"),
        ("seed of the sweep", ABSENT if data.seed is None else str(data.seed)),
        ("commit that wrote this page", data.commit or ABSENT),
        ("commits that made the results", _counted(r.provenance.commit or ABSENT for r in made)),
        ("hardware", _counted(r.provenance.hardware for r in made)),
        ("hosts", _counted(r.provenance.host for r in made)),
        ("results made", _span([r.provenance.started for r in made])),
        ("versions", _counted(_versions(r) for r in made)),
    ]
    facts += [
        (
            f"training {record.key}",
            ", ".join(f"{k} {v}" for k, v in sorted(record.config.items()) if v is not None),
        )
        for record in data.dense
    ]
    rows = [
        f'<tr><th scope="row" class="wrap">{e(name)}</th><td class="left wrap">{e(value)}</td></tr>'
        for name, value in facts
    ]
    return _table("Provenance; counts are records", ("what", "value"), rows)


# --- small things --------------------------------------------------------------------------


def _bytes(record: Record) -> str:
    size = number(record, "size_bytes")
    return ABSENT if size is None else show_bytes(int(size))


def _table(caption: str, head: Sequence[str], rows: Iterable[str], name: str | None = None) -> str:
    text = {"criterion", "networks", "schedule", "calibration", "id", "kind"}
    text |= {"configuration", "stage", "reason", "what", "value"}
    columns = "".join(
        f'<th scope="col"{" class=left" if name in text else ""}>{e(name)}</th>' for name in head
    )
    return (
        f"{_scroll(caption)}<table{f' id={name}' if name else ''}>"
        f"<caption><span>{e(caption)}</span></caption>"
        f"<thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _scroll(label: str) -> str:
    """A wide table scrolls in a box of its own, by keyboard too."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{e(label)}">'


def _cells(values: Iterable[str]) -> str:
    return "".join(
        f"<td{' class=edge' if i == 0 else ''}>{e(value)}</td>" for i, value in enumerate(values)
    )


def _summary(record: Record) -> str:
    parts = [method_of(record.config), record.config.get("networks")]
    if ratio_of(record) is not None:
        parts.append(percent(record.config["ratio"]))
    elif "size" in record.config:
        parts.append(amount_of(record))
    if record.config.get("schedule") not in (None, "uniform"):
        parts.append(record.config["schedule"])
    return ", ".join(str(part) for part in parts if part) or record.key


def _counted(values: Iterable[str]) -> str:
    counts = Counter(values)
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{value} ({count})" for value, count in counts.most_common()) or ABSENT


def _versions(record: Record) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(record.provenance.versions.items())) or ABSENT


def _span(times: Sequence[str]) -> str:
    if not times:
        return ABSENT
    return " to ".join(dict.fromkeys((min(times), max(times))))
