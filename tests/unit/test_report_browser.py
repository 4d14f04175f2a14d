"""The report in a real Chromium: what a person does with it, by mouse, finger and keyboard."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from orchestrator.report import ReportData, write_report
from orchestrator.results import Failure
from orchestrator.store import Store
from tests.unit.record_builder import save, training_record, trial_record

CRITERIA = ("activation", "magnitude", "random")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ReportData:
    """A synthetic sweep: three criteria, three ratios, two networks, three seeds, two baselines."""
    store = Store(tmp_path_factory.mktemp("store"))
    dense = save(store, training_record())
    trials = [
        save(store, trial_record(dense, ratio, criterion, networks, seed=seed))
        for criterion in CRITERIA
        for ratio in (0.15, 0.3, 0.5)
        for networks in ("both", "coarse")
        for seed in ((0, 1, 2) if criterion == "activation" else (0,))
    ]
    for i, trial in enumerate(trials):  # seeds that differ a little
        psnr = trial.metrics["psnr"] + 0.2 * trial.config["seed"]
        trials[i] = replace(trial, metrics={**trial.metrics, "psnr": psnr})
    trials.append(save(store, trial_record(dense, 0.0, "magnitude", bits="int8")))
    failure = Failure("prune", "</script><script>document.title='broken'</script>")
    trials.append(save(store, trial_record(dense, 0.9, failure=failure)))
    return ReportData("browser", "ab12" * 4, (dense,), tuple(trials), store, seed=0)


@pytest.fixture(scope="module")
def written(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(data, tmp_path_factory.mktemp("report")).html


class Opened:
    """The report in a tab, with what it complained about and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | options)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", self.asked)
        self.page.goto(path.as_uri())

    def asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.wrong.append(request.url)

    def dots(self) -> int:
        return int(self.page.locator("#front .dots path[data-id]").count())

    def spot(self, key: str) -> tuple[float, float]:
        """The middle of a model's mark, in the window."""
        dot = self.page.locator(f'#front .dots path[data-id="{key}"]').first
        dot.scroll_into_view_if_needed()
        box = dot.bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def chosen(self) -> str:
        return str(self.page.locator("#chosen p code").first.inner_text())

    def wide(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


@pytest.fixture
def opened(chromium: Any, written: Path) -> Iterator[Opened]:
    tab = Opened(chromium, written)
    yield tab
    assert tab.wrong == []  # no error, no warning, no request to anywhere
    tab.context.close()


def test_it_opens_with_every_group_of_trials_and_the_baselines(opened: Opened) -> None:
    # 18 configurations (the seeds of six are averaged), int8 and the dense model as stars.
    assert opened.dots() == 18 + 1 + 2
    names = opened.page.locator("#front text.name").all_text_contents()
    assert {"dense", "int8"} <= set(names)
    assert opened.page.title() == "browser – pruning sweep"


def test_a_click_on_a_point_shows_its_model(opened: Opened, data: ReportData) -> None:
    wanted = next(
        t
        for t in data.done
        if (t.config["criterion"], t.config["networks"], t.config["ratio"])
        == ("random", "both", 0.5)
    )
    opened.page.mouse.click(*opened.spot(wanted.key))
    assert opened.chosen() == wanted.key
    shown = opened.page.locator("#chosen").inner_text()
    assert f"{wanted.metrics['psnr']:.2f} dB" in shown
    assert opened.page.locator("#chosen .layers svg").count() == len(wanted.widths)
    pictures = opened.page.locator("#chosen .swipe img")
    assert pictures.count() == 2
    assert all(p.evaluate("i => i.naturalWidth") == 48 for p in pictures.all())
    opened.page.locator("#chosen summary").click()
    assert "random" in opened.page.locator("#chosen dl").inner_text()
    assert opened.page.evaluate("location.hash") == f"#model={wanted.key}"


def test_hovering_tells_the_spread_over_calibration_seeds(opened: Opened, data: ReportData) -> None:
    wanted = [t for t in data.done if t.config["criterion"] == "activation"][:3]
    middle = sorted(wanted, key=lambda t: t.metrics["psnr"])[1]
    opened.page.mouse.move(*opened.spot(middle.key))
    tip = opened.page.locator("#front .tip").inner_text()
    assert "3 calibration seeds" in tip
    low, high = (f(t.metrics["psnr"] for t in wanted) for f in (min, max))
    assert f"{low:.2f} dB to {high:.2f} dB" in tip


def test_the_plot_is_walked_by_keyboard(opened: Opened, data: ReportData) -> None:
    plot = opened.page.locator("#front")
    plot.focus()
    plot.press("Home")
    first = opened.chosen()
    sizes = {r.key: r.metrics["size_bytes"] for r in (*data.dense, *data.done)}
    assert sizes[first] == min(sizes.values())
    seen = [first]
    for _ in range(3):
        plot.press("ArrowRight")
        seen.append(opened.chosen())
    assert len(set(seen)) == 4
    assert [sizes[key] for key in seen] == sorted(sizes[key] for key in seen)
    plot.press("ArrowLeft")
    assert opened.chosen() == seen[2]
    assert "dB" in opened.page.locator("#said").inner_text()
    tip = opened.page.locator("#front .tip")
    assert tip.count() == 1
    plot.press("Escape")
    assert tip.count() == 0
    plot.press("Enter")
    focus = "document.activeElement.id"
    assert opened.page.evaluate(focus) == "chosen"
    opened.page.keyboard.press("Escape")
    assert opened.page.evaluate(focus) == "front"


def test_a_filter_hides_trials_everywhere(opened: Opened, data: ReportData) -> None:
    chip = opened.page.locator('.chip[data-key="criterion"][data-value="random"]')
    chip.focus()
    chip.press("Enter")
    assert chip.get_attribute("aria-pressed") == "false"
    left = [t for t in data.done if t.config["criterion"] != "random"]
    assert opened.page.locator("#count").inner_text() == f"{len(left)} of {len(data.done)} trials"
    assert opened.dots() == 12 + 1 + 2
    assert opened.page.locator("#reset").is_visible()
    hidden = opened.page.locator("#trials-table tr[data-id][hidden]").count()
    assert hidden == len(data.done) - len(left)
    opened.page.locator("#reset").click()
    assert opened.dots() == 18 + 1 + 2
    assert not opened.page.locator("#reset").is_visible()


def test_only_one_value_after_a_double_click(opened: Opened) -> None:
    opened.page.locator('.chip[data-key="networks"][data-value="coarse"]').dblclick()
    assert opened.dots() == 9 + 2


def test_only_one_value_by_keyboard(opened: Opened, data: ReportData) -> None:
    opened.page.locator('.chip[data-key="networks"][data-value="coarse"]').press("Shift+Enter")
    assert opened.dots() == 9 + 2
    coarse = sum(t.config["networks"] == "coarse" for t in data.done)
    assert opened.page.locator("#count").inner_text() == f"{coarse} of {len(data.done)} trials"


def test_the_swipe_slider_moves_by_keyboard_and_mouse(opened: Opened) -> None:
    slider = opened.page.locator("#chosen .swipe input")
    at = "document.querySelector('#chosen .swipe').style.getPropertyValue('--at')"
    slider.focus()
    slider.press("Home")
    assert opened.page.evaluate(at) == "0%"
    slider.press("End")
    assert opened.page.evaluate(at) == "100%"
    box = slider.bounding_box()
    opened.page.mouse.click(box["x"] + box["width"] * 0.25, box["y"] + 20)
    assert abs(float(opened.page.evaluate(at).rstrip("%")) - 25) < 5
    opened.page.locator("#chosen select").nth(1).select_option("error")
    assert "error map" in opened.page.locator("#chosen .tag.right").inner_text()
    assert "white from 0.25 on" in opened.page.locator("#chosen").inner_text()


def test_names_of_baselines_and_published_points_do_not_overlap(
    chromium: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    dense = save(store, training_record(psnr=26.77), width=504, height=378)
    trials = [save(store, trial_record(dense, 0.0, bits=bits)) for bits in ("int8", "int6", "int4")]
    places = ((2.5e6, 26.5), (3.5e6, 26.4), (4.5e6, 26.3))  # beside what was published
    for i, (size, psnr) in enumerate(places):
        metrics = {**trials[i].metrics, "size_bytes": size, "psnr": psnr}
        trials[i] = replace(trials[i], metrics=metrics)
    data = ReportData("fern", "ab12" * 4, (dense,), tuple(trials), store, scene="fern")
    tab = Opened(chromium, write_report(data, tmp_path / "report").html)
    tab.page.get_by_text("published elsewhere").click()
    assert tab.page.locator("#front .ghost").count() == 9
    boxes = [name.bounding_box() for name in tab.page.locator("#front text.name").all()]
    assert len(boxes) > 6
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            apart = max(a["x"], b["x"]) >= min(a["x"] + a["width"], b["x"] + b["width"])
            assert apart or abs(a["y"] - b["y"]) > 10
    assert tab.wrong == []
    tab.context.close()


@pytest.mark.parametrize("plane", ["MSE", "SSIM", "render time"])
def test_every_plane_is_drawn(opened: Opened, plane: str) -> None:
    opened.page.get_by_role("button", name=plane, exact=True).click()
    assert opened.dots() == 18 + 1 + 2
    assert f"against {plane}" in opened.page.locator("#front svg").get_attribute("aria-label")
    numbers = opened.page.locator("#front .dots path").evaluate_all(
        "all => all.map(p => p.getAttribute('d')).join('')"
    )
    assert "NaN" not in numbers


def test_the_other_charts_are_drawn(opened: Opened, data: ReportData) -> None:
    for chart in ("#detail", "#history"):
        assert opened.page.locator(f"{chart} svg path").count() >= 2
    assert opened.page.locator("#parallel svg path").count() == len(data.done)
    assert opened.page.locator("#importance-psnr i").count() >= 3
    drawn = opened.page.content()
    assert "NaN" not in drawn.partition("<script")[0]


def test_rows_are_sorted_by_their_heads(opened: Opened) -> None:
    opened.page.locator("summary", has_text=re.compile(r"\d+ trials")).click()
    opened.page.locator("#trials-table th button", has_text="model file").click()
    cells = opened.page.locator("#trials-table td[data-v]")
    sizes = [float(v) for v in cells.evaluate_all("all => all.map(c => c.dataset.v)")]
    assert sizes == sorted(sizes)
    opened.page.locator("#trials-table th button", has_text="model file").click()
    sizes = [float(v) for v in cells.evaluate_all("all => all.map(c => c.dataset.v)")]
    assert sizes == sorted(sizes, reverse=True)


def brightness(page: Any) -> float:
    style = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", style)[:3])) / 3


def test_dark_and_light_follow_the_reader(chromium: Any, written: Path) -> None:
    for scheme, dark in (("dark", True), ("light", False)):
        tab = Opened(chromium, written, color_scheme=scheme)
        assert (brightness(tab.page) < 60) == dark
        tab.page.locator("#theme").click()  # light
        assert brightness(tab.page) > 200
        tab.page.locator("#theme").click()  # dark
        assert brightness(tab.page) < 60
        assert tab.wrong == []
        tab.context.close()


def test_a_phone_shows_everything_without_scrolling_sideways(
    chromium: Any, written: Path, data: ReportData
) -> None:
    tab = Opened(chromium, written, viewport={"width": 360, "height": 740}, has_touch=True)
    assert tab.wide() == 360
    assert tab.dots() == 18 + 1 + 2
    tab.page.touchscreen.tap(*tab.spot(data.done[-1].key))
    assert tab.chosen() == data.done[-1].key
    assert tab.page.locator("#chosen").bounding_box()["width"] <= 360
    assert tab.wrong == []
    tab.context.close()


COVERED = """() => {
    const boxes = (what) => [...document.querySelectorAll("#front " + what)]
        .map((node) => ({ box: node.getBoundingClientRect(), name: node.textContent }));
    const dots = boxes(".dots path").map(({ box }) => box);
    return boxes("text.name").map(({ box, name }) => [name, dots.filter((dot) =>
        box.left < dot.right && dot.left < box.right  // above and below there is room for accents
        && box.top + 3 < dot.bottom && dot.top < box.bottom - 4).length]);
}"""


def test_names_of_baselines_lie_over_no_dot_on_a_phone(chromium: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    dense = save(store, training_record())
    trials = [save(store, trial_record(dense, 0.0, "magnitude", bits="int8"))]
    size, seconds = dense.metrics["size_bytes"], dense.metrics["render_seconds"]
    for number in range(40):  # smaller than the dense model and slower: none is on the front
        trial = trial_record(dense, 0.5, seed=number)
        near = {
            "size_bytes": size * (0.8 + number / 200),
            "render_seconds": seconds * (1.0 + number * 7 % 40 / 80),
        }
        trials.append(save(store, replace(trial, metrics={**trial.metrics, **near})))
    data = ReportData("crowded", "ab12" * 4, (dense,), tuple(trials), store)
    path = write_report(data, tmp_path / "out").html
    tab = Opened(chromium, path, viewport={"width": 360, "height": 740})
    tab.page.locator("#switches").get_by_label("mean of calibration seeds").uncheck()
    tab.page.locator("#planes").get_by_role("button", name="render time").click()
    assert tab.dots() == 40 + 1 + 2
    names = dict(tab.page.evaluate(COVERED))
    assert names["dense"] == 0
    assert not any(names.values())
    tab.context.close()


def test_a_link_opens_its_model(chromium: Any, written: Path, data: ReportData) -> None:
    tab = Opened(chromium, written)
    tab.page.goto(f"{written.as_uri()}#model={data.done[4].key}")
    assert tab.chosen() == data.done[4].key
    tab.context.close()


def test_without_javascript_the_tables_are_there(chromium: Any, written: Path) -> None:
    tab = Opened(chromium, written, java_script_enabled=False)
    assert tab.page.locator("#trials-table tr").count() == 1 + 31
    assert "switched off" in tab.page.locator("noscript").inner_text()
    tab.context.close()


def test_two_hundred_trials_of_fern_size_stay_below_ten_megabytes(
    chromium: Any, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    dense = save(store, training_record(), width=504, height=378)
    # As hard to compress as photos are: noise over a quarter of the grey scale.
    photo = tmp_path / "noise.png"
    Image.effect_noise((504, 378), 64).convert("RGB").save(photo)
    trials = []
    for number in range(200):
        trial = trial_record(dense, 0.2 + number / 400, seed=number)
        with store.writing("trial", trial.key) as folder:
            (folder / "renders").mkdir()
            for name in ("view_0", "error_0", "view_8", "error_8"):
                os.link(photo, folder / f"renders/{name}.png")
        trials.append(trial)
    data = ReportData("large", "ab12" * 4, (dense,), tuple(trials), store)
    path = write_report(data, tmp_path / "out").html
    assert path.stat().st_size < 10_000_000
    tab = Opened(chromium, path)
    assert tab.dots() == 201
    assert tab.page.locator("#gallery img").count() > 3
    assert tab.wrong == []
    tab.context.close()


def test_a_search_is_seen_on_the_rays_that_it_was_chosen_by(chromium: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    dense = training_record()
    dense = save(store, replace(dense, metrics={**dense.metrics, "validation_psnr": 25.5}))
    trials = []
    for number in range(12):
        ratios = {f"fine_layer_{i}_ratio": (number + i) / 13 for i in range(2)}
        trial = trial_record(dense, 0.5, schedule="searched", **ratios)
        psnr = 25.0 - number
        metrics = {"size_bytes": 1e6 - 5e4 * number, "validation_psnr": psnr}
        metrics["validation_mse"] = 10 ** (-psnr / 10)
        trials.append(replace(trial, metrics=metrics, views=()))
    data = ReportData("search", "ab12" * 4, (dense,), tuple(trials), store)
    tab = Opened(chromium, write_report(data, tmp_path / "report").html)
    assert tab.dots() == 1  # the dense model: none of the trials saw a held-out view
    said = tab.page.locator("#count").inner_text()
    assert said.startswith("12 of 12 trials; 12 of them have no PSNR on held-out views")
    tab.page.get_by_role("button", name="validation").click()
    assert tab.page.locator("#count").inner_text() == "12 of 12 trials"
    assert "on validation rays" in tab.page.locator(".whole h3").inner_text()
    assert tab.page.locator("#history svg path").count() == 2
    assert tab.dots() == 1 + len(trials)
    assert tab.page.locator("#importance-psnr").inner_text().startswith("fine layer")
    lines = tab.page.locator("#parallel svg path")
    assert lines.count() == len(trials)
    assert tab.wrong == []
    tab.context.close()
