"""What a person, or a program, sees while a sweep runs."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orchestrator.cli import main
from orchestrator.panel import gpus, line, panel, thinned
from orchestrator.pareto import front, points
from orchestrator.progress import GpuUse, Progress, gpu_use
from orchestrator.results import Failure
from tests.unit.record_builder import training_record, trial_record


def run(show: Progress, failures: int = 1) -> list:
    dense = training_record()
    trials = [
        trial_record(dense, ratio, c) for ratio in (0.3, 0.5) for c in ("activation", "random")
    ]
    failed = [
        trial_record(dense, 0.9, failure=Failure("prune", "no"), seed=i) for i in range(failures)
    ]
    with show:
        show.started(1 + len(trials) + len(failed))
        for record in (dense, *trials, *failed):
            show.ended(record)
    return [dense, *trials]


def test_json_lines_hold_counts_and_the_front() -> None:
    out = io.StringIO()
    done = run(Progress(Console(file=out), as_json=True))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    last = lines[-1]
    assert (last["done"], last["total"], last["failed"], last["stage"]) == (6, 6, 1, "finished")
    assert [p["id"] for p in last["front"]] == [p.key for p in front(points(done))]
    assert last["left_seconds"] == pytest.approx(0, abs=1e-6)


def test_the_state_says_how_many_are_under_way_until_all_have_ended() -> None:
    show = Progress(Console(file=io.StringIO()))
    show.started(3)
    show.running(2)
    assert (show.state()["running"], show.state()["stage"]) == (2, "starting")
    for record in (training_record(), None, None):
        show.ended(record)
    assert (show.state()["running"], show.state()["stage"]) == (0, "writing the report")
    with show:
        show.started(9)  # about, of a search that needs fewer
    assert (show.state()["total"], show.state()["stage"]) == (3, "finished")


def test_the_rate_counts_from_when_trials_could_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    show = Progress(Console(file=io.StringIO()))
    show.started(9)
    now[0] += 50  # Ray starts, the dense model is trained
    dense = training_record()
    show.ended(dense)
    now[0] += 30
    for seed in range(4):  # a batch ends at once
        show.ended(trial_record(dense, 0.5, seed=seed))
    assert show.state()["trials_per_minute"] == pytest.approx(8)
    assert show.state()["left_seconds"] == pytest.approx(30)
    now[0] += 30
    for seed in range(4, 8):
        show.ended(trial_record(dense, 0.5, seed=seed))
    now[0] += 60  # the report is written
    assert show.state()["trials_per_minute"] == pytest.approx(8)


def test_time_left_is_of_the_sweep_beside_that_of_its_trainings() -> None:
    out = io.StringIO()
    show = Progress(Console(file=out, width=200))
    show.started(20)
    training = SimpleNamespace(key="ab" * 8, recipe=SimpleNamespace(iterations=400))
    report = {"iteration": 100, "rate": 10.0, "loss": 0.01, "train_psnr": 20.0}
    show.progress(training, {**report, "node_ip": "127.0.0.1"})
    assert show.state()["trainings"] == {training.key: {**report, "iterations": 400}}
    assert (show.state()["stage"], show.state()["left_seconds"]) == ("training", None)
    assert "10 it/s, about 0:30 left" in out.getvalue()
    show.progress(training, {**report, "iteration": 400})
    assert show.state()["stage"] == "evaluating the dense model"


def test_the_front_of_a_search_is_that_of_the_validation_rays() -> None:
    show = Progress(Console(file=io.StringIO()))
    dense = training_record()
    dense = replace(
        dense, metrics={**dense.metrics, "validation_psnr": 25.0, "validation_mse": 0.003}
    )
    show.known([dense, trial_record(dense, 0.9)])  # the second was not measured on these rays
    assert [p["model"] for p in show.state()["front"]] == ["activation both 90% uniform", "dense"]
    show.started(9)
    scores = {"size_bytes": 1e6, "validation_psnr": 24.0, "validation_mse": 0.004}
    trial = replace(trial_record(dense, 0.5, schedule="searched"), metrics=scores)
    show.ended(trial)
    final = replace(trial, key="of the final front", metrics={**trial.metrics, "psnr": 23.5})
    show.ended(final)
    state = show.state()
    assert state["front_rays"] == "validation"
    assert [(p["size_bytes"], p["psnr"]) for p in state["front"]] == [
        (1e6, 24.0),
        (dense.metrics["size_bytes"], 25.0),
    ]
    assert "(validation rays)" in line(state)


@given(st.integers(0, 60), st.integers(1, 12))
def test_a_thinned_front_keeps_its_order_and_its_end(points: int, most: int) -> None:
    shown = thinned(range(points), most)
    assert len(shown) == min(points, most)
    assert sorted(set(shown)) == shown
    assert not points or shown[-1] == points - 1


def test_the_panel_fits_into_80_columns() -> None:
    report = {"iteration": 120_400, "iterations": 200_000, "rate": 682.3}
    state = {
        **Progress(Console(file=io.StringIO())).state(),
        **{"stage": "training and pruning", "done": 11_180, "total": 12_400},
        **{"running": 128, "failed": 3, "trials_per_minute": 64.2},
        **{"elapsed_seconds": 40_000.0, "left_seconds": 90_000.0},
        "trainings": {"a98772a1b65d88d4": {**report, "loss": 0.0031, "train_psnr": 26.12}},
    }
    out = io.StringIO()
    Console(file=out, width=80).print(panel(state))
    assert [
        " ".join(re.sub("[━╸╺]", "", line).split()) for line in out.getvalue().splitlines()
    ] == [
        "training and pruning",
        "11180/12400 done 128 running 3 failed",
        "11:06:40 elapsed, 64 trials/min, about 25:00:00 left",
        "training a98772a1 120,400/200,000",
        "682 it/s loss 0.0031 26.12 dB about 1:57 left",
    ]


def test_one_point_is_one_point() -> None:
    show = Progress(Console(file=io.StringIO()))
    show.started(2)
    show.ended(training_record())
    assert "front: 1 point, best" in line(show.state())


def test_without_a_terminal_there_are_few_plain_lines() -> None:
    out = io.StringIO()
    run(Progress(Console(file=out, width=200)))
    text = out.getvalue()
    assert "\x1b" not in text
    assert len(text.splitlines()) <= 3
    assert "6/6 done; 1 failed" in text


def test_a_terminal_shows_stage_bar_failures_and_front() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    show = Progress(console)
    done = run(show)
    console.print(show)
    text = out.getvalue()
    for words in ("finished", "6/6 done", "1 failed", "front", "activation both 30%"):
        assert words in text
    smallest = front(points(done))[0]
    assert f"{smallest.psnr:.2f} dB" in text


def test_gpu_use_comes_from_nvidias_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '87, 4096, 143771'\necho '3, 0, 143771'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_use() == [GpuUse(87, 4096, 143771), GpuUse(3, 0, 143771)]
    assert gpus([vars(use) for use in gpu_use()]).startswith("GPU 0: 87 %, 4.0 of 140 GiB")
    tool.write_text("#!/bin/sh\necho broken\n")
    assert gpu_use() == []
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert gpu_use() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_run_as_json_prints_nothing_else(
    write_results: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_results()
    assert main(["run", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert Path(said["report"]).is_file()
    assert main(["front", str(path), "--json"]) == 0
    front_alone = json.loads(capsys.readouterr().out)
    assert {name: said[name] for name in front_alone} == front_alone
