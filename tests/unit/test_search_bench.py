"""A searched trial as a worker measures it: with its first look, stopped by it, and audited."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nerf.checkpoints import load_model
from orchestrator.plan import Look, Trial, make_plan
from orchestrator.provenance import Origin
from orchestrator.search.space import Space, uniform
from orchestrator.stages import MODEL, Stopwatch, Workbench
from orchestrator.store import Store
from tests.unit.sweep_builder import sweep, with_scene

SEARCH: dict[str, Any] = {
    "trials": 4,
    "criteria": "obs",
    "compensation": "obs",
    "calibration": {"views": 2, "rays": 16},
    "fidelity": {"rays": 32, "margin": 0.5},
}
# Smaller than any model, and better: whatever comes is stopped.
BAR = ((1.0, -99.0),)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(
    demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workbench, Trial, Store]:
    """A trained and calibrated model, and a pruning of it that a search would measure."""
    from orchestrator.plan import searched_trial

    made = sweep(prune=None, search=SEARCH, scene__holdout=19, evaluate__renders=1)
    made = with_scene(made, demo_folder)
    store = Store(tmp_path_factory.mktemp("out") / "store")
    store.prepare()
    bench, plan = Workbench(made, store, Origin("0", {}), device="cpu"), make_plan(made, store)
    for _ in bench.train(plan.trainings[0], Stopwatch()):
        pass
    for calibration in plan.calibrations:
        bench.calibrate(calibration, Stopwatch())
    (of,) = plan.searches
    space = Space(of.settings, made.shape, of.sets)
    look = Look("", of.settings.objectives, (), (), of.settings.first_rays, of.settings.margin)
    trial = searched_trial(made, of, space.config(uniform(space, 0.5)), look)
    return bench, trial, store


def with_look(trial: Trial, **changes: Any) -> Trial:
    assert trial.look is not None
    return replace(trial, look=replace(trial.look, **changes))


def test_an_audit_measures_the_stopped_model_as_if_nothing_had_stopped_it(
    trained: tuple[Workbench, Trial, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, trial, store = trained
    assert trial.look is not None
    first_key = trial.look.first_key
    bench.prune(with_look(trial, bar=BAR), Stopwatch())
    stopped = store.read_record("trial", first_key)
    assert not store.has("trial", trial.key)
    assert "validation_psnr" not in stopped.metrics

    with monkeypatch.context() as nothing:  # the model is read, not made again
        nothing.setattr("orchestrator.stages.compress", None)
        bench.prune(with_look(trial, audit=True), Stopwatch())
    audited = store.read_record("trial", trial.key)
    model = load_model(store.file("trial", trial.key, MODEL))[0]
    score = bench.validation(trial.training).score(model, "float32")  # type: ignore[union-attr]
    assert audited.metrics["validation_mse"] == pytest.approx(score.mse, rel=1e-6)
    assert audited.metrics["first_mse"] == stopped.metrics["first_mse"]
    assert audited.files[MODEL] == stopped.files[MODEL]
    assert audited.config == stopped.config

    # The same trial where nothing stops it.
    other = with_look(trial, first_key="f" * 16)
    other = replace(other, key="0" * 16)
    bench.prune(other, Stopwatch())
    whole = store.read_record("trial", other.key)
    timed = {"render_seconds"}
    assert set(whole.metrics) == set(audited.metrics)
    for name in set(whole.metrics) - timed:
        assert audited.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5), name


def test_an_audit_of_a_model_that_is_gone_prunes_again(
    trained: tuple[Workbench, Trial, Store],
) -> None:
    bench, trial, store = trained
    gone = replace(with_look(trial, bar=BAR, audit=True, first_key="a" * 16), key="1" * 16)
    bench.prune(gone, Stopwatch())
    record = store.read_record("trial", gone.key)
    assert "validation_psnr" in record.metrics
    assert not store.has("trial", "a" * 16)
