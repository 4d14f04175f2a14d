"""The report: self-contained, honest about what is absent, and safe with whatever it is given."""

import base64
import csv
import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from orchestrator.errors import StoreError, SweepError
from orchestrator.pareto import Reference
from orchestrator.report import (
    ReportData,
    effects,
    front_json,
    pictures,
    table,
    webp,
    write_report,
)
from orchestrator.report.data import smallest_within
from orchestrator.report.payload import payload
from orchestrator.report.pictures import Album, album, grids
from orchestrator.report.published import TABLE_1
from orchestrator.results import Failure, Record
from orchestrator.store import Store
from tests.unit.record_builder import DENSE_BYTES, save, training_record, trial_record

EVIL = "<script>alert('x')</script>&\"<img src=http://example.org/x>"


@pytest.fixture
def data(tmp_path: Path) -> ReportData:
    store = Store(tmp_path / "store")
    dense = save(store, training_record())
    trials = [
        save(store, trial_record(dense, ratio, criterion, networks))
        for criterion, networks in (
            ("activation", "both"),
            ("random", "both"),
            ("activation", "coarse"),
        )
        for ratio in (0.15, 0.5)
    ]
    trials.append(save(store, trial_record(dense, 0.5, schedule="front-loaded")))
    trials.append(save(store, trial_record(dense, 0.95, failure=Failure("evaluate", EVIL))))
    return ReportData(
        "synthetic", "ab12" * 4, (dense,), tuple(trials), store, commit="0123abc", seed=0
    )


class Page(HTMLParser):
    """Reads a page and keeps what the tests ask about."""

    VOID = frozenset({"meta", "img", "source", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(data: ReportData, out: Path) -> tuple[Page, str]:
    text = write_report(data, out).html.read_text()
    return Page(text), text


def test_the_report_writes_its_files_and_nothing_else(data: ReportData, tmp_path: Path) -> None:
    files = write_report(data, tmp_path / "out")
    assert {path.name for path in files.plots} == {
        "front_psnr.png",
        "front_mse.png",
        "ratio_mse.png",
        "ratio_psnr.png",
        "renders.png",
    }
    made = {files.html, files.csv, files.json, *files.plots}
    assert set((tmp_path / "out").iterdir()) == made
    for plot in files.plots:
        with Image.open(plot) as image:
            assert min(image.size) > 100


def test_the_page_loads_nothing_and_runs_its_own_script_alone(
    data: ReportData, tmp_path: Path
) -> None:
    page, text = written(data, tmp_path)
    names = {tag for tag, _ in page.tags}
    assert not names & {"link", "iframe", "object"}
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert [script.get("type") for script in scripts] == ["application/json", None]
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#")
    assert not re.search(r"url\(|@import", text)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg|example\.org/x)", text)
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    body = text.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none'")
    assert EVIL in page.text.replace(" ,", ",")  # shown as text


def test_every_picture_has_words_and_every_table_heads(data: ReportData, tmp_path: Path) -> None:
    page, _ = written(data, tmp_path)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) > 10
    assert all(attributes.get("alt") for attributes in images)
    tables = sum(tag == "table" for tag, _ in page.tags)
    assert sum(tag == "caption" for tag, _ in page.tags) == tables
    heads = [attributes for tag, attributes in page.tags if tag == "th"]
    assert all(attributes.get("scope") for attributes in heads)
    ids = {attributes["id"] for tag, attributes in page.tags if tag == "h2"}
    anchors = {a["href"] for tag, a in page.tags if tag == "a"}
    assert anchors == {f"#{name}" for name in ids}


def test_the_page_says_what_was_published_what_failed_and_where_from(
    data: ReportData, tmp_path: Path
) -> None:
    page, _ = written(data, tmp_path)
    for row in TABLE_1:
        assert row.psnr in page.text
    for words in ("As published", "coarse network only", "PSNR was measured wrongly"):
        assert words in page.text
    assert "evaluate" in page.text
    for fact in (data.hash, "0123abc", data.dense[0].provenance.hardware, "0123456789abcdef"):
        assert fact in page.text
    assert "not in this sweep" in page.text  # random has no front-loaded trial, and so on


def test_the_published_table_stands_beside_fern_alone(data: ReportData, tmp_path: Path) -> None:
    page, _ = written(replace(data, scene="lego"), tmp_path)
    assert "As published" not in page.text
    assert "This sweep: activation, both" in page.text
    assert all(row.psnr not in page.text for row in TABLE_1)


def test_the_table_by_ratio_leaves_out_what_has_sizes_alone(
    data: ReportData, tmp_path: Path
) -> None:
    dense = data.dense[0]
    sized = replace(
        trial_record(dense, 0.4, "magnitude", "shared", failure=data.failed[0].failure),
        config={"criterion": "magnitude", "networks": "shared", "ratio": None, "size": 250_000},
    )
    at_ratios = trial_record(dense, 0.4, "random")
    page, _ = written(replace(data, scene="lego", trials=(at_ratios, sized)), tmp_path)
    assert "This sweep: random, both" in page.text
    assert "This sweep: magnitude" not in page.text
    assert "magnitude, shared, 250 kB" in page.text  # among what failed


def test_a_model_that_a_search_tried_and_then_rendered_counts_once(data: ReportData) -> None:
    dense = data.dense[0]
    rendered = trial_record(dense, 0.4, schedule="searched", fine_layer_0_ratio=0.4)
    alone = trial_record(dense, 0.6, schedule="searched", fine_layer_0_ratio=0.6)
    tried = []
    for number, trial in enumerate((rendered, alone)):
        metrics = {"size_bytes": trial.metrics["size_bytes"], "validation_psnr": 24.0 - number}
        metrics["validation_mse"] = 10 ** (-metrics["validation_psnr"] / 10)
        tried.append(replace(trial, key=f"tried{number}", metrics=metrics, views=()))
    more = replace(data, trials=(*data.trials, *tried, rendered))
    assert [t.key for t in more.done] == [*(t.key for t in data.done), "tried1", rendered.key]
    assert len(more.measured) == len(data.done) + 3
    assert len(effects.history(more, "validation")) == 2
    assert more.chosen_ratios == data.chosen_ratios
    assert f"of {len(data.done) + 2} trials" in table(more)


def test_a_metric_that_nobody_measured_is_a_dash(data: ReportData, tmp_path: Path) -> None:
    def without_ssim(record: Record) -> Record:
        kept = {name: v for name, v in record.metrics.items() if name != "ssim"}
        return replace(record, metrics=kept)

    bare = replace(
        data,
        dense=tuple(map(without_ssim, data.dense)),
        trials=tuple(map(without_ssim, data.trials)),
    )
    assert all(trial["ssim"] is None for trial in front_json(bare)["front"])
    assert "–" in table(bare)
    page, _ = written(bare, tmp_path)
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


def test_the_csv_has_a_row_for_every_record(data: ReportData, tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(write_report(data, tmp_path).csv.read_text())))
    assert [row["id"] for row in rows] == [r.key for r in (*data.dense, *data.trials)]
    done = next(row for row in rows if row["id"] == data.trials[0].key)
    assert float(done["psnr"]) == data.trials[0].metrics["psnr"]
    assert done["criterion"] == "activation"
    assert rows[-1]["failure_reason"] == EVIL
    assert rows[-1]["psnr"] == ""


def test_the_json_holds_the_records_themselves(data: ReportData, tmp_path: Path) -> None:
    content = json.loads(write_report(data, tmp_path).json.read_text())
    assert [Record.from_json(r).key for r in content["trials"]] == [t.key for t in data.trials]
    assert content["fronts"]["psnr"]["ids"] == [p.key for p in data.front()]


def test_front_json_names_the_front_and_its_reference_point(data: ReportData) -> None:
    front = front_json(data)
    assert front["hypervolume"]["reference"] == {"size_bytes": DENSE_BYTES, "psnr": 10.0}
    assert front["hypervolume"]["value"] == data.hypervolume
    sizes = [trial["size_bytes"] for trial in front["front"]]
    assert sizes == sorted(sizes)
    assert set(front["front"][0]) == {
        *("id", "training", "configuration", "size_bytes", "mse", "psnr", "ssim")
    }
    assert [model["id"] for model in front["dense"]] == [data.dense[0].key]
    json.dumps(front, allow_nan=False)
    other = replace(data, reference=Reference(1e9, 5.0))
    assert front_json(other)["hypervolume"]["reference"] == {"size_bytes": 1e9, "psnr": 5.0}


def test_the_terminal_table_is_aligned_and_marks_the_front(data: ReportData) -> None:
    lines = table(data).splitlines()
    column = lines[0].index("id")
    keys = [line[column:] for line in lines[2 : 2 + 1 + len(data.done)]]
    assert set(keys) == {r.key for r in (*data.dense, *data.done)}
    marked = {line[column:] for line in lines[2:10] if line.startswith("*")}
    assert marked == data.front_keys
    assert "hypervolume" in table(data)
    assert "failed: trial" in lines[-1]
    short = table(data, only_front=True).splitlines()
    assert len(short) == 2 + len(data.dense) + len(data.front_keys) + len(lines) - (
        2 + len(data.dense) + len(data.done)
    )
    assert "`prunefield front --all`" in "".join(short)


def test_smallest_within_a_loss_compares_with_the_trials_own_dense_model(data: ReportData) -> None:
    best = smallest_within(data, 1.0)
    assert best is not None
    assert best.config["networks"] == "coarse"
    assert best.config["ratio"] == 0.5
    assert smallest_within(replace(data, dense=()), 1.0) is None


def test_grids_hold_truth_dense_and_a_cell_for_every_ratio(data: ReportData) -> None:
    views = grids(data)
    assert [grid.view for grid in views] == [0, 8]
    assert views[0].truth is not None
    assert [row.label for row in views[0].rows] == [
        "activation, both",
        "activation, both, front-loaded",
        "activation, coarse",
        "random, both",
    ]
    cell = views[0].rows[0].cells[0]
    assert cell.render is not None
    assert cell.record is not None
    assert cell.psnr == cell.record.views[0].psnr


def test_pictures_shrink_until_they_fit(data: ReportData) -> None:
    def spent(budget: int) -> int:
        made = album(data, budget)
        uris = [u for views in made.renders.values() for pair in views.values() for u in pair if u]
        return sum(map(len, [*uris, *(u for views in made.truth.values() for u in views.values())]))

    whole = album(data)
    assert whole.views == ("0", "8")
    assert whole.size == (48, 36)
    assert set(whole.renders) == {r.key for r in (*data.dense, *data.done)}
    off_front = next(t.key for t in data.done if t.key not in data.front_keys)
    assert set(whole.renders[off_front]) == {"0"}  # those off the front: the first view
    assert whole.dropped == 0
    assert spent(10**4) < spent(10**7)
    assert album(data, 10**3).dropped > 0


def test_many_pictures_are_made_in_a_process_of_their_own(
    data: ReportData, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [data.store.folder("trial", trial.key) for trial in data.done]
    (folders[0] / "renders" / "view_0.png").write_bytes(b"no picture")
    here = [album(data, budget) for budget in (10**7, 10**4)]
    monkeypatch.setattr(pictures, "MANY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(webp, "encode_here", None)
        assert [album(data, budget) for budget in (10**7, 10**4)] == here
    monkeypatch.setattr(webp, "__file__", "/nowhere/webp.py")  # a process that dies
    assert [album(data, budget) for budget in (10**7, 10**4)] == here
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # or never is
    assert album(data, 10**4) == here[1]


@pytest.mark.parametrize("budget", [0, *(4**n for n in range(3, 12))])
def test_the_first_step_that_fits_is_taken(data: ReportData, budget: int) -> None:
    found = sorted(data.store.root.glob("trials/*/renders/*_0.png"))
    pages, small = [found[:3], found[3:6]], found[6:]
    with pictures.Encoder(len(found)) as encoder:
        first = pictures.STEPS[-1]
        for step in reversed(pictures.STEPS):
            jobs = [(p, *step.main) for page in pages[: step.views] for p in page]
            jobs += [] if step.rest is None else [(p, *step.rest) for p in small]
            if sum(len(uri or "") for uri in encoder(jobs)) <= pictures.SAFETY * budget:
                first = step
        assert pictures._step(encoder, pages, small, budget) == first


def test_a_damaged_or_missing_render_is_shown_as_absent(data: ReportData, tmp_path: Path) -> None:
    folder = data.store.folder("trial", data.trials[0].key) / "renders"
    (folder / "view_0.png").write_bytes(b"no picture")
    other = data.store.folder("trial", data.trials[1].key) / "renders"
    (other / "view_0.png").unlink()
    page, _ = written(data, tmp_path / "out")
    assert page.text.count("no picture kept") == 2


def test_nothing_but_failures_still_makes_a_report(data: ReportData, tmp_path: Path) -> None:
    bare = replace(data, dense=(), trials=data.trials[-1:])
    page, _ = written(bare, tmp_path)
    assert "No trial has a result" in page.text
    assert front_json(bare)["hypervolume"] is None
    assert "0 of 0 trials" in table(bare)


def test_an_empty_sweep_and_an_unwritable_folder_are_clear_errors(
    data: ReportData, tmp_path: Path
) -> None:
    with pytest.raises(SweepError, match="nothing to report"):
        write_report(replace(data, dense=(), trials=()), tmp_path / "out")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="cannot write the report"):
        write_report(data, blocked)


@pytest.mark.parametrize(
    ("scene", "size", "same"),
    [
        ("fern", (504, 378), ["NeRF, nerf-pytorch"]),
        ("fern", (1008, 756), ["NeRF (1008×756)"]),
        ("fern", None, []),
        ("horns", (504, 378), []),
    ],
)
def test_only_published_points_of_the_scene_and_resolution_count_as_comparable(
    data: ReportData, scene: str, size: tuple[int, int] | None, same: list[str]
) -> None:
    found = json.loads(payload(replace(data, scene=scene), Album(size=size)))["published"]
    assert [point["name"] for point in found if point["same"]] == same
    assert any(not point["same"] for point in found)
    assert all(point["source"] and point["size_bytes"] > 0 for point in found)
    assert (scene == "fern") == any(point["scene"] == "fern" for point in found)
    elsewhere = payload(replace(data, scene="lego"), Album(size=size))
    assert json.loads(elsewhere)["published"] == []
