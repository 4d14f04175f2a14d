"""A plan names each piece of work once, by a key of all that decides its result."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.errors import SceneError, SpecError
from orchestrator.plan import CalibrationSet, Plan, make_plan
from orchestrator.spec import read_text
from orchestrator.store import Store
from tests.unit.sweep_builder import mapping, sweep, text

DEMO_VIEWS = 17  # training views of the demo scene with holdout 8


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def plan_of(store: Store, **changes: Any) -> Plan:
    return make_plan(sweep(**changes), store)


def keys(plan: Plan) -> dict[str, list[str]]:
    return {
        "trainings": [t.key for t in plan.trainings],
        "results": [t.result for t in plan.trainings],
        "statistics": [key for c in plan.calibrations for key in c.sets.values()],
        "trials": [t.key for t in plan.trials],
    }


def fill(store: Store, kind: str, key: str) -> None:
    with store.writing(kind, key) as folder:
        (folder / "x").write_text("x")


# --- counts ------------------------------------------------------------------------------------


def test_a_grid_is_every_combination(store: Store) -> None:
    plan = plan_of(
        store,
        train__seeds=[0, 1],
        prune__0__networks=["both", "coarse", "fine"],
        prune__0__criteria="activation",
        prune__0__schedules=["uniform", "back-loaded"],
        prune__0__calibration={"views": [1, 2], "rays": [8, 16], "seeds": [0, 1]},
    )
    assert len(plan.trainings) == 2
    assert len(plan.trials) == plan.combinations == 2 * 3 * 2 * 2 * (2 * 2 * 2)
    assert len({trial.key for trial in plan.trials}) == len(plan.trials)
    # One pass a model and seed, which gives the statistics of all four set sizes.
    assert len(plan.calibrations) == 2 * 2
    assert all(len(calibration.sets) == 4 for calibration in plan.calibrations)
    statistics = {key for c in plan.calibrations for key in c.sets.values()}
    assert {trial.statistics for trial in plan.trials} == statistics


def test_what_makes_no_difference_runs_once(store: Store) -> None:
    axes = {"views": [1, 2], "rays": [8, 16], "seeds": [0, 1, 2]}
    counts = {
        criterion: len(
            plan_of(
                store,
                prune__0__criteria=criterion,
                prune__0__ratios=0.5,
                prune__0__calibration=axes,
            ).trials
        )
        for criterion in ("activation", "magnitude", "random")
    }
    assert counts == {"activation": 12, "magnitude": 1, "random": 3}


def test_an_explicit_schedule_stands_for_itself_whatever_the_ratios(store: Store) -> None:
    plan = plan_of(
        store,
        prune__0__criteria="magnitude",
        prune__0__ratios=[0.1, 0.2, 0.9],
        prune__0__schedules=[[0.0, 0.3, 0.6]],
    )
    (trial,) = plan.trials
    assert plan.combinations == 3
    assert trial.config.schedule == "explicit"
    assert trial.config.layer_ratios == (0.0, 0.3, 0.6)
    assert trial.config.ratio == pytest.approx(0.3)


def test_grids_that_overlap_share_their_trials(store: Store) -> None:
    data = mapping()
    data["prune"] += [dict(data["prune"][0]), {"ratios": [0.5, 0.75], "criteria": "magnitude"}]
    plan = make_plan(read_text(text(data), Path("x")), store)
    assert plan.combinations == 6 + 6 + 2
    assert len(plan.trials) == 6 + 1


def test_only_statistics_that_a_criterion_reads_are_planned(store: Store) -> None:
    assert plan_of(store, prune__0__criteria=["magnitude", "random"]).calibrations == ()


def test_all_views_are_the_scenes_training_views(store: Store) -> None:
    everything = plan_of(store, prune__0__calibration__views="all")
    counted = plan_of(store, prune__0__calibration__views=DEMO_VIEWS)
    assert list(everything.calibrations[0].sets) == [CalibrationSet(DEMO_VIEWS, 16, 0)]
    assert keys(everything) == keys(counted)


@pytest.mark.parametrize("lone", [True, False])
def test_more_views_than_the_scene_has_are_a_mistake_with_a_path(store: Store, lone: bool) -> None:
    data = mapping(prune__0__calibration__views=[2, DEMO_VIEWS + 1])
    if not lone:
        data["prune"].insert(0, {"ratios": 0.5})
    with pytest.raises(SpecError) as caught:
        make_plan(read_text(text(data), Path("x")), store)
    (mistake,) = caught.value.mistakes
    assert mistake.path == f"prune[{0 if lone else 1}].calibration.views[1]"
    assert mistake.value == DEMO_VIEWS + 1
    assert f"1 to {DEMO_VIEWS}" in mistake.message


def test_that_path_is_as_written_for_lone_values_and_in_a_cluster_file(store: Store) -> None:
    inner = mapping(prune={"ratios": 0.5, "calibration": {"views": 99}})
    for data, prefix in ((inner, ""), ({"metadata": {"sweep": inner}}, "metadata.sweep.")):
        with pytest.raises(SpecError) as caught:
            make_plan(read_text(text(data), Path("x")), store)
        assert [m.path for m in caught.value.mistakes] == [f"{prefix}prune.calibration.views"]


def test_a_scene_that_is_missing_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="nowhere"):
        plan_of(store, scene={"path": str(tmp_path / "nowhere")})


# --- keys --------------------------------------------------------------------------------------


def test_keys_are_the_same_in_any_order_and_in_every_process(store: Store) -> None:
    backwards = yaml.safe_dump(mapping(), sort_keys=True)
    here = keys(make_plan(sweep(), store))
    assert keys(make_plan(read_text(backwards, Path("x")), store)) == here
    code = (
        "import json; from pathlib import Path\n"
        "from orchestrator.store import Store\n"
        "from tests.unit.test_sweep_plan import keys, plan_of\n"
        f"print(json.dumps(keys(plan_of(Store(Path({str(store.root)!r}))))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "1234", "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == here


TRAINING = {"trainings", "results", "statistics", "trials"}
EVALUATION = {"results", "trials"}


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"scene__holdout": 5}, TRAINING),
        ({"scene__ndc": False}, TRAINING),
        ({"train__iterations": 7}, TRAINING),
        ({"train__rays": 33}, TRAINING),
        ({"train__learning_rate": 1e-3}, TRAINING),
        ({"train__decay": 0.2}, TRAINING),
        ({"train__decay_iterations": 7}, TRAINING),
        ({"train__density_noise": 0.5}, TRAINING),
        ({"train__precision": "bfloat16"}, TRAINING),
        ({"train__validation": 0.02}, TRAINING),
        ({"train__validation": 0}, TRAINING),
        ({"train__optimizer": "muon"}, TRAINING),
        ({"train__anneal": "cosine"}, TRAINING),
        ({"train__seeds": 1}, TRAINING),
        ({"train__network__width": 9}, TRAINING),
        ({"train__network__depth": 4}, TRAINING),
        ({"train__network__skip": 0}, TRAINING),
        ({"train__network__view": 5}, TRAINING),
        ({"train__network__point_octaves": 4}, TRAINING),
        ({"train__network__direction_octaves": 2}, TRAINING),
        ({"train__samples__coarse": 5}, TRAINING),
        ({"train__samples__fine": 5}, TRAINING),
        ({"evaluate__max_rays": 100}, EVALUATION),
        ({"evaluate__precision": "tf32"}, EVALUATION),
        ({"evaluate__renders": 2}, EVALUATION),
        ({"prune__0__networks": "fine"}, {"trials"}),
        ({"prune__0__ratios": [0.26, 0.51]}, {"trials"}),
        ({"prune__0__schedules": "front-loaded"}, {"trials"}),
        ({"name": "other", "description": "words"}, set()),
        ({"storage": "elsewhere", "resources": {"retries": 7}}, set()),
    ],
)
def test_keys_follow_what_matters_and_nothing_else(
    store: Store, changes: dict[str, Any], differ: set[str]
) -> None:
    before, after = keys(plan_of(store)), keys(plan_of(store, **changes))
    assert {what for what in before if not set(before[what]) & set(after[what])} == differ
    assert all(before[what] == after[what] for what in TRAINING - differ)


def test_a_calibration_set_matters_only_to_criteria_that_look_at_it(store: Store) -> None:
    def by_criterion(**changes: Any) -> dict[str, list[str]]:
        trials = plan_of(store, **changes).trials
        return {
            name: [t.key for t in trials if t.config.criterion == name]
            for name in ("activation", "magnitude", "random")
        }

    before = by_criterion()
    for change, changed in (
        ({"views": 3, "rays": 16}, {"activation"}),
        ({"views": 2, "rays": 17}, {"activation"}),
        ({"views": 2, "rays": 16, "seeds": 1}, {"activation", "random"}),
    ):
        after = by_criterion(prune__0__calibration=change)
        assert {name for name in before if before[name] != after[name]} == changed


def test_no_two_nodes_share_a_key(store: Store) -> None:
    plan = plan_of(store, train__seeds=[0, 1], train__iterations=[6, 7])
    everything = list(itertools.chain.from_iterable(keys(plan).values()))
    assert len(everything) == len(set(everything))


# --- what is done already ------------------------------------------------------------------------


def test_what_the_store_holds_is_not_run_again(store: Store) -> None:
    plan = plan_of(store)
    (training,), (calibration,) = plan.trainings, plan.calibrations
    fill(store, "checkpoint", training.key)
    (trained,) = plan_of(store).trainings
    assert trained.trained
    assert not trained.cached
    fill(store, "training", training.result)
    for trial in plan.trials[:4]:
        fill(store, "trial", trial.key)
    for key in calibration.sets.values():
        fill(store, "statistics", key)
    counts = plan_of(store).summary()
    assert counts["trainings"] == {"total": 1, "cached": 1}
    assert counts["calibrations"] == {"total": 1, "cached": 1}
    assert counts["trials"] == {"total": 6, "cached": 4, "combinations": 6}
    assert counts["controls"] == {}


def test_controls_are_counted_by_name(store: Store) -> None:
    recover = {"iterations": 10, "controls": "dense_longer", "control_iterations": [10, 500]}
    plan = plan_of(store, prune__0__recover=recover)
    longest = next(t for t in plan.trials if t.config.control and t.config.recover.iterations > 10)
    fill(store, "control", longest.key)
    counts = plan_of(store, prune__0__recover=recover).summary()
    assert counts["trials"] == {"total": 8, "cached": 1, "combinations": 8}
    assert counts["controls"] == {
        "dense_longer 10": {"total": 1, "cached": 0},
        "dense_longer 500": {"total": 1, "cached": 1},
    }


def test_a_calibration_is_done_when_all_its_sets_are(store: Store) -> None:
    changes = {"prune__0__calibration": {"views": [1, 2], "rays": 16}}
    first, second = plan_of(store, **changes).calibrations[0].sets.values()
    fill(store, "statistics", first)
    assert not plan_of(store, **changes).calibrations[0].cached
    fill(store, "statistics", second)
    assert plan_of(store, **changes).calibrations[0].cached


def test_planning_writes_nothing(store: Store) -> None:
    plan_of(store).summary()
    assert not store.root.exists()


def test_a_summary_is_json(store: Store) -> None:
    summary = json.loads(json.dumps(plan_of(store).summary()))
    assert summary["sweep"] == "tiny"
    assert {"trainings", "calibrations", "trials", "resources", "storage"} <= summary.keys()


def test_a_hundred_thousand_trials_are_planned(store: Store) -> None:
    plan = plan_of(
        store,
        train__seeds=list(range(10)),
        prune__0__criteria=["activation", "random"],
        prune__0__ratios=[i / 1000 for i in range(100)],
        prune__0__calibration={"views": [1, 2, 4, 8], "rays": [8, 16], "seeds": list(range(11))},
    )
    assert len(plan.trials) == 10 * 100 * (4 * 2 * 11 + 11)
    assert len({trial.key for trial in plan.trials}) == len(plan.trials)
