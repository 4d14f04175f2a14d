"""Recovery in a sweep: spec, keys, files, controls, records, going on after a worker died."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nerf import recovery as nerf_recovery
from nerf.checkpoints import load_model
from nerf.evaluation import HeldOut
from nerf.field import NerfModel
from nerf.files import read_tensors
from nerf.scenes import write_demo_scene
from orchestrator import recovering
from orchestrator.errors import SpecError
from orchestrator.plan import Plan, Trial, make_plan
from orchestrator.provenance import Origin
from orchestrator.recovering import narrow_shape
from orchestrator.report.tables import front_json, results_csv, table
from orchestrator.results import Record, method_of
from orchestrator.spec import Sweep, load
from orchestrator.spec.recover import Recover
from orchestrator.stages import MODEL, Stopwatch, Workbench, failure_of
from orchestrator.store import Store
from orchestrator.sweep import collect, report_data
from tests.unit.sweep_builder import with_scene
from tests.unit.test_methods import sweep_of

ORIGIN = Origin("0123456789ab", {"prunefield": "test"})
TRAIN: dict[str, Any] = {
    "iterations": 250,
    "rays": 128,
    "learning_rate": 4e-3,
    "decay_iterations": 250,
    "density_noise": 0.0,
    "network": {"depth": 3, "width": 32, "skip": 1, "point_octaves": 4},
    "samples": {"coarse": 12, "fine": 12},
}
RECOVER: dict[str, Any] = {"iterations": 80, "learning_rate": 2e-3, "rays": 96}
SMALL: dict[str, Any] = {
    "sizes": "6kB",
    "networks": "shared",
    "bits": "int4",
    "calibration": {"views": 2, "rays": 64},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these gain nothing from threads and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_scene(tmp_path_factory.mktemp("scenes") / "demo")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("out") / "store")


def swept(folder: Path, *grids: dict[str, Any], **sections: Any) -> Sweep:
    evaluate = {"max_rays": 300, "renders": 0}
    return with_scene(sweep_of(*grids, train=TRAIN, evaluate=evaluate, **sections), folder)


def ready(made: Sweep, store: Store) -> tuple[Workbench, Plan]:
    """A workbench whose model is trained and calibrated."""
    bench, plan = Workbench(made, store, ORIGIN, device="cpu"), make_plan(made, store)
    list(bench.train(plan.trainings[0], Stopwatch()))
    for calibration in plan.calibrations:
        bench.calibrate(calibration, Stopwatch())
    return bench, plan


GRIDS = (
    {**SMALL, "recover": {**RECOVER, "iterations": [0, 80], "from": ["photos", "both"]}},
    {
        **SMALL,
        "sizes": "12kB",
        "bits": "int8",
        "networks": "both",
        "recover": {**RECOVER, "from": "distill", "steps": 2, "controls": []},
    },
    {"ratios": 0.5, "calibration": {"views": 2, "rays": 64}, "recover": RECOVER},
    {**SMALL, "sizes": "7kB", "bits": "auto", "recover": {**RECOVER, "controls": "narrow"}},
    {**SMALL, "sizes": "5kB", "bits": "rate", "recover": {**RECOVER, "controls": []}},
    {**SMALL, "sizes": "5kB", "bits": "rate"},
    {
        **SMALL,
        "sizes": "4kB",
        "recover": {
            **RECOVER,
            "iterations": 200,
            "squeeze": 1.5,
            "controls": "narrow",
            "control_iterations": 80,
        },
    },
)


@pytest.fixture(scope="module")
def done(scene_folder: Path, store: Store) -> tuple[Workbench, Plan]:
    bench, plan = ready(swept(scene_folder, *GRIDS), store)
    for trial in plan.trials:
        bench.prune(trial, Stopwatch())
    return bench, plan


Done = tuple[Workbench, Plan]


def record_of(done: Done, **config: Any) -> tuple[Trial, Record]:
    """The one trial or control with these settings."""
    bench, plan = done
    found = [t for t in plan.trials if all(t.config.flat().get(k) == v for k, v in config.items())]
    (trial,) = found
    return trial, bench.store.read_record(trial.kind, trial.key)


def schemes_of(path: Path) -> list[str]:
    """How each layer of a shared network is stored."""
    said = read_tensors(path)[1]["schemes"]["fine"]  # type: ignore[index,call-overload]
    return [str(said)] if isinstance(said, str) else [str(scheme) for scheme in said]


# --- the sweep file and the plan ----------------------------------------------------------------


def test_a_file_without_recovery_keeps_its_hash_and_keys(tmp_path: Path) -> None:
    plain, with_zero = sweep_of(SMALL), sweep_of({**SMALL, "recover": {"iterations": 0}})
    assert plain.hash == with_zero.hash
    assert "recover" not in plain.identity["prune"][0]
    (before,), (after,) = (make_plan(s, Store(tmp_path)).trials for s in (plain, with_zero))
    assert before.key == after.key
    assert "recover" not in before.config.identity


def test_every_axis_of_a_recovery_is_part_of_the_key(tmp_path: Path) -> None:
    recover = {
        "iterations": [0, 10, 20],
        "from": ["photos", "distill", "both"],
        "learning_rate": [1e-3, 1e-4],
        "rays": [64, 128],
        "rounding_from": [0.2, 0.5],
        "steps": [1, 2],
        "squeeze": [1, 2.5],
        "controls": [],
    }
    trials = make_plan(sweep_of({**SMALL, "recover": recover}), Store(tmp_path)).trials
    assert len(trials) == len({t.key for t in trials}) == 1 + 2 * 3 * 2 * 2 * 2 * 2 * 2


def test_controls_stand_beside_every_recovery(tmp_path: Path) -> None:
    grid = {**SMALL, "bits": ["fp32", "int4"], "recover": {"iterations": [0, 10, 20]}}
    trials = make_plan(sweep_of(grid), Store(tmp_path)).trials
    controls = [t for t in trials if t.kind == "control"]
    assert sorted(method_of(t.config.flat()) for t in controls) == [
        "dense_longer 10",
        "dense_longer 20",
        *("narrow 10", "narrow 10", "narrow 20", "narrow 20"),
    ]
    assert {t.config.bits for t in controls if t.config.control == "narrow"} == {"fp32", "int4"}
    assert all(t.statistics is None for t in controls)
    flat = controls[0].config.flat()
    assert flat["control"] == "dense_longer"
    assert not {"criterion", "ratio", "schedule", "compensation"} & set(flat)


def test_controls_that_are_trained_for_longer_are_those_of_a_longer_recovery(
    tmp_path: Path,
) -> None:
    """By key, so that the records of the one serve the other; the recovery itself stays."""

    def keys(**recover: Any) -> dict[str, set[str]]:
        grid = {**SMALL, "recover": {"rays": 64, **recover}}
        trials = make_plan(sweep_of(grid), Store(tmp_path)).trials
        assert len({trial.key for trial in trials}) == len(trials)
        return {
            kind: {trial.key for trial in trials if trial.kind == kind}
            for kind in ("trial", "control")
        }

    at_once = keys(iterations=10, learning_rate=2e-3, squeeze=1.5, steps=2)
    fast = keys(
        iterations=10,
        learning_rate=2e-3,
        squeeze=1.5,
        steps=2,
        control_iterations=[10, 500],
        control_learning_rate=[2e-3, 7e-4],
    )
    assert fast["trial"] == at_once["trial"]
    assert at_once["control"] < fast["control"]
    assert len(fast["control"]) == 2 * 2 * 2
    longer = keys(iterations=500, learning_rate=7e-4)
    assert longer["control"] < fast["control"]
    # Recoveries of several lengths have the same controls.
    assert len(keys(iterations=[0, 10, 20, 30], control_iterations=500)["control"]) == 2


def test_grids_that_differ_in_their_controls_share_the_recovery(tmp_path: Path) -> None:
    grids = [
        {**SMALL, "recover": {"iterations": 10, "controls": "narrow", "control_iterations": n}}
        for n in (100, 200)
    ]
    trials = make_plan(sweep_of(*grids), Store(tmp_path)).trials
    names = sorted(method_of(trial.config.flat()) for trial in trials)
    assert names == ["narrow 100", "narrow 200", "obs + obs, int4, recovered 10 iterations"]


def test_a_file_that_says_nothing_of_its_controls_keeps_its_hash_and_keys(tmp_path: Path) -> None:
    """Those of `sweeps/recovery-best.yaml`'s kind, as they were before controls had settings."""
    recover = {"iterations": 10, "rays": 64, "learning_rate": 2e-3, "squeeze": 1.5}
    plain = sweep_of({**SMALL, "recover": recover})
    assert plain.hash == "645aa7b1ede4a068"
    keys = {t.config.control: t.key for t in make_plan(plain, Store(tmp_path)).trials}
    assert keys == {
        None: "b82c73407de74a85",
        "dense_longer": "838a8dbf55f09aed",
        "narrow": "92c161c52c8f11f2",
    }
    of_recover = plain.identity["prune"][0]["recover"]
    assert not {"control_iterations", "control_learning_rate"} & set(of_recover)
    other = sweep_of({**SMALL, "recover": {**recover, "control_iterations": 20}})
    assert other.hash != plain.hash


def test_the_sweep_of_controls_has_the_recoveries_of_the_best() -> None:
    sweeps = Path(__file__).parents[2] / "sweeps"
    best, controls = (
        {
            (size, grid.networks, grid.bits, recover)
            for grid in load(sweeps / name).grids
            if grid.calibration.seeds == (0,)
            for size in grid.sizes
            for recover in grid.recover.recoveries()
        }
        for name in ("recovery-best.yaml", "recovery-controls.yaml")
    )
    assert best == controls


def test_no_recovery_no_controls(tmp_path: Path) -> None:
    trials = make_plan(sweep_of(SMALL), Store(tmp_path)).trials
    assert [t.kind for t in trials] == ["trial"]


@pytest.mark.parametrize(
    ("grid", "place", "reason"),
    [
        ({**SMALL, "recover": {"iterations": -1}}, "recover.iterations", "at least 0"),
        ({**SMALL, "recover": {"from": "photo"}}, "recover.from", "photos, distill, both"),
        ({**SMALL, "recover": {"form": "photos"}}, "recover.form", "did you mean 'from'"),
        ({**SMALL, "recover": {"steps": 2}}, "recover.iterations", "required"),
        ({**SMALL, "recover": {"iterations": 9, "steps": 0}}, "recover.steps", "at least 1"),
        ({**SMALL, "recover": {"iterations": 9, "controls": ["wide"]}}, "controls", "narrow"),
        ({"ratios": 0.5, "recover": {"iterations": 9, "steps": 2}}, "recover.steps", "`sizes`"),
        (
            {**SMALL, "recover": {"iterations": 9, "control_iterations": 0}},
            "recover.control_iterations",
            "at least 1",
        ),
        (
            {**SMALL, "recover": {"iterations": 9, "control_learning_rate": [1e-3, 0]}},
            "recover.control_learning_rate[1]",
            "above 0",
        ),
        (
            {**SMALL, "recover": {"control_iterations": 9}},
            "recover.iterations",
            "required beside other settings",
        ),
        (
            {**SMALL, "recover": {"iterations": 9, "controls": [], "control_iterations": 9}},
            "recover.control_iterations",
            "`controls` is empty",
        ),
        (
            {"ratios": 0.5, "recover": {"iterations": 9, "controls": ["narrow"]}},
            "recover.controls",
            "needs `sizes`",
        ),
        ({**SMALL, "bits": "gptq4", "recover": {"iterations": 9}}, "bits", "'int4' is stored"),
        (
            {**SMALL, "bits": "kmeans4", "recover": {"iterations": 9, "squeeze": 2}},
            "squeeze",
            "int2",
        ),
        ({"ratios": 0.5, "recover": {"iterations": 9, "squeeze": 2}}, "squeeze", "`sizes`"),
        ({"masks": 0.5, "recover": {"iterations": 9}}, "recover", "would grow back"),
    ],
)
def test_mistakes_are_named(grid: dict[str, Any], place: str, reason: str) -> None:
    with pytest.raises(SpecError) as error:
        sweep_of(grid)
    assert place in str(error.value)
    assert reason in str(error.value)


# --- what comes out -----------------------------------------------------------------------------


def test_recovery_improves_a_pruned_model(done: Done) -> None:
    _, before = record_of(done, size=6000, criterion="obs", recover_iterations=None)
    for source in ("photos", "both"):
        _, after = record_of(done, size=6000, criterion="obs", recover_from=source)
        assert after.metrics["psnr"] > before.metrics["psnr"] + 0.1
        assert after.metrics["recover_seconds"] > 0
        assert after.config["recover_iterations"] == 80
        assert after.metrics["size_bytes"] <= 6000
        assert method_of(after.config) == (
            "obs + obs, int4, recovered 80 iterations"
            + ("" if source == "photos" else f" ({source})")
        )
    assert "recover_seconds" not in before.metrics


def test_recovery_after_a_pruning_by_ratio(done: Done) -> None:
    bench, plan = done
    _, record = record_of(done, ratio=0.5)
    assert record.metrics["achieved_ratio"] == 0.5
    assert record.widths == {"coarse": (16, 16, 16), "fine": (16, 16, 16)}
    dense = bench.store.read_record("training", plan.trainings[0].result)
    assert record.metrics["psnr"] > dense.metrics["psnr"] - 3


def test_what_was_measured_is_the_file(done: Done) -> None:
    bench, plan = done
    held_out = HeldOut(bench.scene(), torch.device("cpu"), max_rays=300)
    for trial in plan.trials:
        record = bench.store.read_record(trial.kind, trial.key)
        path = bench.store.verified_file(trial.kind, trial.key, MODEL)
        assert record.metrics["size_bytes"] == path.stat().st_size
        assert held_out.evaluate(load_model(path)[0]).psnr == record.metrics["psnr"]
        assert trial.config.size is None or path.stat().st_size <= trial.config.size


def test_a_squeezed_model_fills_its_file(done: Done) -> None:
    _, record = record_of(done, recover_squeeze=1.5)
    assert 0.9 * 4000 < record.metrics["size_bytes"] <= 4000
    assert method_of(record.config).endswith("recovered 200 iterations squeezed 1.5")


def test_layers_that_choose_their_bits_are_trained_in_them(done: Done) -> None:
    bench, _ = done
    trial, record = record_of(done, bits="auto", criterion="obs")
    path = bench.store.folder("trial", trial.key) / MODEL
    assert path.stat().st_size == record.metrics["size_bytes"] <= 7000
    layers = schemes_of(path)
    assert {*layers} <= {f"int{bits}" for bits in range(3, 9)}
    control, _ = record_of(done, control="narrow", bits="auto")
    assert {*schemes_of(bench.store.folder("control", control.key) / MODEL)} == {"int6"}


def test_weights_of_one_step_are_trained_on_their_grids(done: Done) -> None:
    bench, plan = done
    trial, record = record_of(done, bits="rate", recover_iterations=80)
    path = bench.store.folder("trial", trial.key) / MODEL
    assert 0.9 * 5000 < path.stat().st_size == record.metrics["size_bytes"] <= 5000
    untrained = next(t for t in plan.trials if t.config.bits == "rate" and t.config.recover is None)
    before = bench.store.read_record("trial", untrained.key)
    assert record.metrics["validation_psnr"] > before.metrics["validation_psnr"]
    assert record.widths == before.widths


def test_rounds_prune_further_and_further(
    done: Done, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, plan = done
    trial, record = record_of(done, recover_steps=2)
    dense = bench.model(plan.trainings[0].key)
    first, last = recovering.round_sizes(dense, trial.config, {})
    assert last == 11_760  # less than 12,000 bytes: trained codes may take more
    assert first is not None
    assert last < first < 32_000
    kept = sum(map(sum, record.widths.values()))
    channels = 2 * 3 * 32
    assert 0 < kept < channels
    assert 0 < record.metrics["achieved_ratio"] < 1


def test_the_parts_of_a_round_make_one_pruning(done: Done) -> None:
    bench, plan = done
    dense = bench.model(plan.trainings[0].key)
    keep = {"trunk.0": torch.arange(32) % 2 == 0}
    first = recovering._pruned_to(dense.fine, keep, None)
    second = recovering._pruned_to(dense.fine, {"trunk.0": torch.arange(16) < 5}, None)
    whole = recovering._as_one(dense.fine, first, second)
    assert whole.keep["trunk.0"].nonzero().flatten().tolist() == [0, 2, 4, 6, 8]
    assert whole.achieved["trunk.0"] == 27 / 32


# --- controls -----------------------------------------------------------------------------------


def test_controls_are_baselines_not_points_of_the_front(done: Done) -> None:
    bench, plan = done
    data = report_data(collect(plan, bench.store), bench.store)
    assert {r.kind for r in data.baselines} == {"control"}
    assert {r.kind for r in data.done} == {"trial"}
    names = {r.config["control"] for r in data.baselines}
    assert names == {"dense_longer", "narrow"}
    keys = {r.key for r in data.baselines}
    assert not keys & data.front_keys
    assert {c["id"] for c in front_json(data)["controls"]} == keys
    rows = results_csv(data).splitlines()
    assert sum(",control," in row for row in rows[1:]) == len(keys)
    assert "narrow 80" in table(data)
    assert "narrow 80" not in table(data, only_front=True)


def test_the_dense_model_trained_longer_has_the_dense_models_shape(done: Done) -> None:
    bench, plan = done
    _, record = record_of(done, control="dense_longer")
    dense = bench.store.read_record("training", plan.trainings[0].result)
    assert record.widths == dense.widths
    assert record.metrics["params"] == dense.metrics["params"]
    assert record.metrics["psnr"] > dense.metrics["psnr"]
    assert record.config["recover_iterations"] == 80
    assert record.training == plan.trainings[0].key


def test_a_narrow_nerf_fills_the_same_file(done: Done) -> None:
    bench, _ = done
    trial, record = record_of(done, control="narrow", size=4000)
    assert 0.9 * 4000 < record.metrics["size_bytes"] <= 4000
    (trunk,) = record.widths.values()
    assert len(trunk) == 3
    assert len(set(trunk)) == 1
    model, info = load_model(bench.store.folder("control", trial.key) / MODEL)
    assert model.shared
    assert info["pruning"]["control"] == "narrow"  # type: ignore[index,call-overload]


def test_a_narrow_nerf_is_never_wider_than_the_dense_one(done: Done) -> None:
    """However much its file may hold."""
    bench, _ = done
    trial, _ = record_of(done, control="narrow", size=6000)
    shape, samples = bench.sweep.shape, bench.sweep.samples
    dense = NerfModel.create(shape, samples, 0)
    small, large = (
        narrow_shape(dense, shape, replace(trial.config, size=size), {}) for size in (4_000, 10**7)
    )
    assert set(small.trunk) < {*range(1, max(shape.trunk))}
    assert large.trunk == (max(shape.trunk),) * len(shape.trunk)


# --- going on, and failing ----------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 0])
def test_a_worker_that_dies_changes_nothing(
    done: Done, scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    bench, _ = done
    if steps == 0:
        trial, record, steps = *record_of(done, recover_squeeze=1.5), 1
    elif steps == 1:
        trial, record = record_of(done, size=6000, recover_from="both")
    else:
        trial, record = record_of(done, recover_steps=2)
    undisturbed = bench.store.folder("trial", trial.key) / MODEL

    store = Store(tmp_path / "store")
    for kind in ("checkpoints", "trainings", "statistics"):
        (store.root / kind).parent.mkdir(parents=True, exist_ok=True)
        (store.root / kind).symlink_to(bench.store.root / kind)
    again = Workbench(
        swept(scene_folder, *GRIDS, resources={"checkpoint_seconds": 1e-9}),
        store,
        ORIGIN,
        device="cpu",
    )
    advance = nerf_recovery.Recovery.advance
    calls: dict[nerf_recovery.Recovery, int] = {}  # of each round; slow machines take small steps

    def dying(self: nerf_recovery.Recovery, iterations: int) -> Any:
        calls[self] = calls.get(self, 0) + 1
        if len(calls) == steps and calls[self] == 3:
            calls[self] += 1
            raise KeyboardInterrupt
        return advance(self, min(iterations, 20))

    monkeypatch.setattr(nerf_recovery.Recovery, "advance", dying)
    with pytest.raises(KeyboardInterrupt):
        again.prune(trial, Stopwatch())
    state = store.root / "running" / trial.key
    assert (state / f"state-{steps - 1}.safetensors").is_file()
    again.prune(trial, Stopwatch())
    assert not state.exists()
    tensors, expected = load_file(store.folder("trial", trial.key) / MODEL), load_file(undisturbed)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert store.read_record("trial", trial.key).metrics["psnr"] == record.metrics["psnr"]


def test_a_damaged_state_is_begun_anew(done: Done, tmp_path: Path) -> None:
    bench, _ = done
    trial, record = record_of(done, control="narrow", size=6000)
    store = Store(tmp_path / "store")
    (store.root).mkdir()
    (store.root / "checkpoints").symlink_to(bench.store.root / "checkpoints")
    again = Workbench(bench.sweep, store, ORIGIN, device="cpu")
    (store.running(trial.key) / "state-0.safetensors").write_bytes(b"damaged")
    again.prune(trial, Stopwatch())
    assert store.read_record("control", trial.key).metrics["psnr"] == record.metrics["psnr"]


def test_a_recovery_that_diverges_is_a_failure_of_its_stage(
    scene_folder: Path, store: Store, done: Done
) -> None:
    wild = {**SMALL, "recover": {**RECOVER, "learning_rate": 1e30, "controls": []}}
    bench, plan = ready(swept(scene_folder, wild), store)
    watch = Stopwatch()
    with pytest.raises(Exception, match="diverged") as error:
        bench.prune(plan.trials[0], watch)
    failure = failure_of(error.value, watch)
    assert failure.stage == "recover"
    assert "lower its learning rate (now 1e+30)" in failure.reason
    assert not store.has("trial", plan.trials[0].key)


def test_noise_is_that_of_the_training_unless_the_recovery_says_otherwise() -> None:
    silent, given = Recover(100), Recover(100, density_noise=0.0)
    assert silent.recipe(1.0, "float32", last=True).density_noise == 1.0
    assert given.recipe(1.0, "float32", last=True).density_noise == 0.0
    assert Recover(100, optimizer="muon").recipe(1.0, "float32", last=True).optimizer == "muon"
    assert Recover(100, optimizer="muon").identity()["optimizer"] == "muon"
    assert "optimizer" not in silent.identity()
    assert "density_noise" not in silent.identity()  # keys of recoveries before stay as they were
    assert given.identity()["density_noise"] == 0.0
    assert given.flat()["recover_density_noise"] == 0.0


def test_noises_fan_out(scene_folder: Path, store: Store) -> None:
    grid = {**SMALL, "recover": {**RECOVER, "density_noise": [0, 1], "controls": []}}
    plan = make_plan(swept(scene_folder, grid), store)
    assert [t.config.recover and t.config.recover.density_noise for t in plan.trials] == [0, 1]


@pytest.mark.parametrize(
    ("size", "bits", "kept"),
    [
        (9_000, "int6", True),
        (9_000, "rate", True),
        (9_000, {"fine": {"a": "int4", "b": "int7"}}, True),
        (9_000, {"fine": {"a": "int4", "b": "fp16"}}, False),
        (9_000, "kmeans4", False),
        (9_000, "fp32", False),
        (None, "int6", False),
    ],
)
def test_codes_on_symmetric_grids_are_held_to_the_size_of_a_file(size, bits, kept) -> None:
    assert (recovering._keeper(size, bits, {}) is not None) == kept
