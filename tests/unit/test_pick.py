"""Picking a model: against a brute-force look at every model, and the knee in closed form."""

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import SweepError
from orchestrator.pareto import Point, front, knee
from orchestrator.pick import pick
from orchestrator.report import ReportData
from orchestrator.results import Failure, Record
from orchestrator.store import Store
from tests.unit.record_builder import DENSE_BYTES, training_record, trial_record


def sweep(*models: tuple[float, float], dense_psnr: float = 25.0) -> ReportData:
    """A sweep whose trials have these sizes and PSNRs."""
    dense = training_record(psnr=dense_psnr)
    trials = []
    for number, (size, psnr) in enumerate(models):
        trial = trial_record(dense, 0.5, seed=number)
        metrics = {**trial.metrics, "size_bytes": size, "psnr": psnr}
        trials.append(replace(trial, metrics=metrics))
    return ReportData("picked", "ab12" * 4, (dense,), tuple(trials), Store("/nowhere"))


MODELS = ((100_000, 20.0), (200_000, 23.5), (400_000, 24.5), (800_000, 24.9), (300_000, 22.0))


def measured(record: Record) -> tuple[float, float]:
    return record.metrics["size_bytes"], record.metrics["psnr"]


def test_within_a_size_the_best_picture_wins() -> None:
    assert measured(pick(sweep(*MODELS), max_size=350_000).record) == (200_000, 23.5)
    assert measured(pick(sweep(*MODELS), max_size=400_000).record) == (400_000, 24.5)


def test_from_a_quality_on_the_smallest_wins() -> None:
    assert measured(pick(sweep(*MODELS), min_psnr=24.5).record) == (400_000, 24.5)
    assert measured(pick(sweep(*MODELS), min_psnr=21.0).record) == (200_000, 23.5)


def test_the_dense_model_is_a_candidate() -> None:
    chosen = pick(sweep(*MODELS), min_psnr=24.95)
    assert chosen.record.kind == "training"
    assert (
        chosen.model == Path("/nowhere/checkpoints") / chosen.record.training / "model.safetensors"
    )
    assert chosen.sentence.startswith("Ship the dense model")


def test_a_tie_in_quality_goes_to_the_smaller_file() -> None:
    assert measured(pick(sweep((300, 20.0), (200, 20.0)), max_size=1000).record)[0] == 200


@given(
    models=st.lists(st.tuples(st.integers(1, 10_000), st.floats(10, 40)), min_size=1, max_size=12),
    size=st.integers(1, 10_000),
)
def test_no_model_beats_the_pick(models: list[tuple[float, float]], size: int) -> None:
    data = sweep(*models)
    fitting = [psnr for bytes_, psnr in models if bytes_ <= size]
    if not fitting:
        with pytest.raises(SweepError, match="nearest"):
            pick(data, max_size=size)
        return
    chosen = pick(data, max_size=size)
    assert measured(chosen.record)[0] <= size
    assert measured(chosen.record)[1] == max(fitting)


def test_the_knee_is_the_point_highest_above_the_chord() -> None:
    # Sizes double and the gain halves: 20, 24, 26, 27, 27.5 dB. Above the chord from (0, 0) to
    # (1, 1) the points lie 0, 8/15 − 1/4, 12/15 − 2/4, 14/15 − 3/4, 0: the third is the highest.
    points = tuple(
        Point(str(i), 1000.0 * 2**i, 20 + 8 * (1 - 0.5**i), 10 ** -(2 + i)) for i in range(5)
    )
    assert front(points) == points
    assert knee(points).key == "2"
    assert knee(points[:1]).key == "0"
    # Of the first three, with a model of 16,000 bytes that is no better: 0, 4/6 − 1/4, 1 − 2/4.
    assert knee(points[:3], up_to=16_000.0).key == "2"
    assert knee(points[:3]).key == "1"


@given(st.lists(st.tuples(st.integers(1, 10**7), st.floats(5, 50)), min_size=2, max_size=20))
def test_the_knee_does_not_depend_on_units(models: list[tuple[int, float]]) -> None:
    points = [Point(str(i), s, q, 10 ** (-q / 10)) for i, (s, q) in enumerate(models)]
    other = [Point(p.key, p.size_bytes * 8, p.psnr, p.mse) for p in points]
    first, second = knee(front(points)), knee(front(other))
    ordered = front(points)

    def height(point: Point) -> float:
        a, b = ordered[0], ordered[-1]
        if a.psnr == b.psnr or a.size_bytes == b.size_bytes:
            return 0.0
        along = math.log(point.size_bytes / a.size_bytes) / math.log(b.size_bytes / a.size_bytes)
        return (point.psnr - a.psnr) / (b.psnr - a.psnr) - along

    same = next(p for p in points if p.key == second.key)
    assert height(first) == pytest.approx(height(same), abs=1e-9)
    assert height(first) == pytest.approx(max(map(height, ordered)), abs=1e-9)


def test_the_answer_names_trial_loss_file_and_command() -> None:
    chosen = pick(sweep((DENSE_BYTES / 10, 24.75)), scene=Path("my data/fern"))
    assert chosen.record.key in chosen.sentence
    assert "0.25 dB under the dense model and 10.0 times smaller" in chosen.sentence
    command = shlex.split(chosen.render_command)
    assert command[:3] == ["prunefield", "render", str(chosen.model)]
    assert command[command.index("--scene") + 1] == "my data/fern"
    level = pick(sweep((DENSE_BYTES - 1, 24.999)), max_size=DENSE_BYTES - 1)
    assert "level with the dense model (" in level.sentence
    data = chosen.to_json()
    json.dumps(data, allow_nan=False)
    assert data["id"] == chosen.record.key


def validated(data: ReportData, *psnrs: float) -> ReportData:
    """The same sweep, its trials and its dense model measured on validation rays as well."""

    def on_rays(record: Record, psnr: float) -> Record:
        more = {"validation_psnr": psnr, "validation_mse": 10 ** (-psnr / 10)}
        return replace(record, metrics={**record.metrics, **more})

    trials = tuple(on_rays(t, p) for t, p in zip(data.trials, psnrs, strict=True))
    return replace(data, dense=(on_rays(data.dense[0], 26.0),), trials=trials)


def test_validation_rays_choose_and_held_out_views_judge() -> None:
    # By the held-out views the second is best within 300 bytes; by the validation rays the first.
    data = validated(sweep((200, 20.0), (300, 20.5), (400, 23.0)), 21.4, 21.2, 24.0)
    chosen = pick(data, max_size=300)
    assert (measured(chosen.record), chosen.by) == ((200, 20.0), "validation")
    assert "20.00 dB on the held-out views" in chosen.sentence
    assert "the best within 300 bytes on the validation rays, 21.40 dB there" in chosen.sentence
    assert chosen.to_json()["chosen_by"] == "validation"
    other = pick(data, max_size=300, by="held-out")
    assert measured(other.record) == (300, 20.5)
    assert "on the held-out views" in other.sentence
    assert "there" not in other.sentence
    assert measured(pick(data, min_psnr=21.3).record) == (200, 20.0)
    assert measured(pick(data, min_psnr=21.3, by="held-out").record) == (400, 23.0)
    with pytest.raises(SweepError, match=r"30 dB on the validation rays\).* 26\.00 dB"):
        pick(data, min_psnr=30.0)


def test_without_validation_figures_of_all_the_held_out_views_choose() -> None:
    data = validated(sweep((200, 20.0), (300, 20.5)), 21.4, 21.2)
    old = replace(data.trials[0], metrics=sweep((200, 20.0)).trials[0].metrics)
    mixed = replace(data, trials=(old, data.trials[1]))
    chosen = pick(mixed, max_size=300)
    assert (chosen.by, measured(chosen.record)) == ("held-out", (300, 20.5))
    with pytest.raises(SweepError, match=r"1 of 3 models .* --by held-out"):
        pick(mixed, max_size=300, by="validation")


def test_what_a_search_never_rendered_is_not_shipped() -> None:
    data = validated(sweep((200, 20.0), (300, 20.5)), 21.4, 25.0)
    unseen = dict(data.trials[1].metrics)
    del unseen["psnr"]
    searched = replace(data, trials=(data.trials[0], replace(data.trials[1], metrics=unseen)))
    chosen = pick(searched, max_size=300)
    assert (chosen.by, measured(chosen.record)) == ("validation", (200, 20.0))


def test_failed_trials_are_no_candidates() -> None:
    data = sweep()
    failed = trial_record(data.dense[0], 0.5, failure=Failure("prune", "no"))
    assert pick(replace(data, trials=(failed,))).record.kind == "training"
    with pytest.raises(SweepError, match="no model"):
        pick(replace(data, trials=(failed,), dense=()))


def test_the_command_answers_and_refuses(
    write_results: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.cli import main

    path = write_results()
    assert main(["pick", str(path), "--max-size", "3MB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Path(found["model"]).is_file()
    assert found["metrics"]["size_bytes"] <= 3_000_000
    assert main(["pick", str(path), "--min-psnr", "99"]) == 1
    assert "the nearest is" in capsys.readouterr().err
