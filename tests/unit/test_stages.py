"""The three stages as one worker does them, in this process, on the demo scene."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nerf.checkpoints import load_model
from nerf.errors import NerfError, TrainingError
from nerf.evaluation import HeldOut
from nerf.files import read_tensors
from nerf.scenes import write_demo_scene
from nerf.validation import ValidationRays
from orchestrator import stages
from orchestrator.compress import Material, compress, is_light
from orchestrator.errors import StoreError
from orchestrator.plan import CalibrationSet, Plan, Training, Trial, TrialConfig, make_plan
from orchestrator.provenance import Origin
from orchestrator.results import Record
from orchestrator.spec.recover import Recover
from orchestrator.stages import (
    HISTORY,
    MODEL,
    STATE,
    STATISTICS,
    Stopwatch,
    Workbench,
    failure_of,
)
from orchestrator.store import RECORD, Store, file_hash
from pruning.errors import PruningError
from tests.unit.sweep_builder import sweep, with_scene

ORIGIN = Origin("0123456789ab", {"prunefield": "test"})
HOLDOUT = 19  # of 20 views: two are held out, so that evaluating takes no time
SETTINGS: dict[str, Any] = {"scene__holdout": HOLDOUT, "evaluate__renders": 1}
QUICK: dict[str, Any] = {"evaluate__max_rays": 16}


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


def bench_of(store: Store, scene_folder: Path, **changes: Any) -> tuple[Workbench, Plan]:
    made = with_scene(sweep(**{**SETTINGS, **changes}), scene_folder)
    return Workbench(made, store, ORIGIN, device="cpu"), make_plan(made, store)


def drain(work: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(work)


@pytest.fixture(scope="module")
def done(
    scene_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workbench, Plan, Store]:
    """A sweep of one training, one calibration and six prunings, all run."""
    store = Store(tmp_path_factory.mktemp("out") / "store")
    bench, plan = bench_of(store, scene_folder)
    drain(bench.train(plan.trainings[0], Stopwatch()))
    bench.calibrate(plan.calibrations[0], Stopwatch())
    for trial in plan.trials:
        bench.prune(trial, Stopwatch())
    return bench, plan, store


Done = tuple[Workbench, Plan, Store]


def trials_of(done: Done) -> list[tuple[Trial, Record, Path]]:
    _, plan, store = done
    return [
        (t, store.read_record("trial", t.key), store.folder("trial", t.key)) for t in plan.trials
    ]


# --- what is left behind -------------------------------------------------------------------------


def test_after_the_stages_nothing_is_missing(done: Done) -> None:
    bench, _, store = done
    summary = make_plan(bench.sweep, store).summary()
    for what in ("trainings", "calibrations", "trials"):
        assert summary[what]["cached"] == summary[what]["total"] > 0
    assert list((store.root / "running").iterdir()) == []
    assert list((store.root / "tmp").iterdir()) == []


def test_records_list_every_file_with_its_hash(done: Done) -> None:
    _, plan, store = done
    (training,) = plan.trainings
    places = [("checkpoint", training.key), ("training", training.result)]
    places += [("trial", trial.key) for trial in plan.trials]
    expected = {
        "checkpoint": {MODEL, STATE, HISTORY},
        "training": {"renders/view_0.png", "renders/error_0.png", "renders/truth_0.png"},
        "trial": {MODEL, "renders/view_0.png", "renders/error_0.png"},
    }
    for kind, key in places:
        folder = store.folder(kind, key)
        record = store.read_record(kind, key)
        there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert set(record.files) == there - {RECORD} == expected[kind]
        assert all(file_hash(folder / name) == digest for name, digest in record.files.items())
        assert (record.kind, record.key, record.failure) == (kind, key, None)
        assert record.training == training.key
        assert record.provenance.commit == ORIGIN.commit
        assert record.provenance.hardware


def test_a_trials_numbers_are_those_of_its_file(done: Done) -> None:
    _, plan, store = done
    dense = store.read_record("training", plan.trainings[0].result)
    for trial, record, folder in trials_of(done):
        tensors = load_file(folder / MODEL)
        metrics = record.metrics
        assert metrics["size_bytes"] == (folder / MODEL).stat().st_size
        assert metrics["params"] == sum(t.numel() for t in tensors.values())
        for network in ("coarse", "fine"):
            own = [t.numel() for name, t in tensors.items() if name.startswith(f"{network}.")]
            assert metrics[f"params_{network}"] == sum(own)
        assert metrics["size_bytes"] < dense.metrics["size_bytes"]
        assert metrics["flops_per_ray"] < dense.metrics["flops_per_ray"]
        assert metrics["nonzero_bytes"] > 4 * metrics["params"]  # masking keeps the constants

        model, info = load_model(folder / MODEL)
        widths = {name: tuple(f.shape.trunk) for name, f in model.networks().items()}
        assert widths == record.widths
        removed = 1 - sum(map(sum, widths.values())) / (2 * 3 * 8)
        assert metrics["achieved_ratio"] == pytest.approx(removed) == trial.config.ratio
        assert info["pruning"] == record.config == trial.config.flat()
        assert info["scene"]["holdout"] == HOLDOUT  # type: ignore[index,call-overload]


def test_a_trials_file_evaluates_to_the_recorded_scores(done: Done) -> None:
    _, record, folder = trials_of(done)[1]
    again = HeldOut(done[0].scene(), torch.device("cpu")).evaluate(load_model(folder / MODEL)[0])
    for name in ("psnr", "mse", "ssim"):
        assert getattr(again, name) == record.metrics[name]
    assert [(v.view, v.psnr) for v in again.views] == [(v.view, v.psnr) for v in record.views]


def test_dense_and_pruned_models_are_scored_on_the_same_validation_rays(done: Done) -> None:
    bench, plan, store = done
    (training,) = plan.trainings
    rays = ValidationRays(bench.scene(), 0.01, torch.device("cpu"))
    per_view = round(0.01 * bench.scene().camera.height * bench.scene().camera.width)
    assert len(rays) == per_view * len(bench.scene().train) > 0
    dense = store.read_record("training", training.result)
    models = [(dense, store.folder("checkpoint", training.key))]
    models += [(record, folder) for _, record, folder in trials_of(done)[:2]]
    for record, folder in models:
        score = rays.score(load_model(folder / MODEL)[0])
        assert record.metrics["validation_mse"] == score.mse
        assert record.metrics["validation_psnr"] == score.psnr


def test_calibration_passes_the_validation_rays_over(
    done: Done, scene_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        raise PruningError("seen enough")

    monkeypatch.setattr(stages, "calibrate", spy)
    _, _, store = done
    bench, plan = bench_of(store, scene_folder, prune__0__calibration__seeds=5)
    with pytest.raises(PruningError, match="seen enough"):
        bench.calibrate(plan.calibrations[0], Stopwatch())
    assert seen == [0.01]


def test_a_training_without_validation_rays_has_no_such_score(
    scene_folder: Path, tmp_path: Path
) -> None:
    bench, plan = bench_of(Store(tmp_path), scene_folder, train__validation=0, **QUICK)
    drain(bench.train(plan.trainings[0], Stopwatch()))
    metrics = bench.store.read_record("training", plan.trainings[0].result).metrics
    assert "psnr" in metrics
    assert not [name for name in metrics if name.startswith("validation")]


def test_the_dense_record_is_that_of_its_checkpoint(done: Done) -> None:
    bench, plan, store = done
    (training,) = plan.trainings
    record = store.read_record("training", training.result)
    path = store.folder("checkpoint", training.key) / MODEL
    model, _ = load_model(path)
    again = HeldOut(bench.scene(), torch.device("cpu")).evaluate(model)
    assert record.metrics["psnr"] == again.psnr
    assert record.metrics["size_bytes"] == path.stat().st_size
    assert record.metrics["nonzero_bytes"] == 4 * record.metrics["params"]
    assert record.metrics["iterations"] == 6
    assert record.config == {**training.config}
    history = json.loads((path.parent / HISTORY).read_text())
    assert history[-1]["iteration"] == 6
    assert record.metrics["train_psnr"] == history[-1]["train_psnr"]


def test_renders_show_what_was_measured(done: Done) -> None:
    bench, plan, store = done
    folder = store.folder("training", plan.trainings[0].result) / "renders"
    camera = bench.scene().camera
    for name in ("view_0", "error_0", "truth_0"):
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.size == (camera.width, camera.height)


def test_criteria_and_ratios_make_different_models(done: Done) -> None:
    hashes = {record.files[MODEL] for _, record, _ in trials_of(done)}
    assert len(hashes) == 6


def test_only_the_networks_that_are_named_are_pruned(done: Done, scene_folder: Path) -> None:
    _, plan, store = done
    dense = load_file(store.folder("checkpoint", plan.trainings[0].key) / MODEL)
    for network, other in (("coarse", "fine"), ("fine", "coarse")):
        bench, only = bench_of(
            store,
            scene_folder,
            prune__0__networks=network,
            prune__0__criteria="magnitude",
            prune__0__ratios=0.5,
            evaluate__max_rays=16,
        )
        (trial,) = only.trials
        bench.prune(trial, Stopwatch())
        pruned = load_file(store.folder("trial", trial.key) / MODEL)
        record = store.read_record("trial", trial.key)
        assert record.metrics["achieved_ratio"] == 0.5
        assert "ssim" not in record.metrics  # a subset of rays is no picture
        assert record.widths[network] == (4, 4, 4)
        assert record.widths[other] == (8, 8, 8)
        for name, tensor in dense.items():
            if name.startswith(f"{other}."):
                assert torch.equal(pruned[name], tensor)
        assert not (store.folder("trial", trial.key) / "renders").exists()


# --- going on, and not doing things twice --------------------------------------------------------


def weights(store: Store, training: Training) -> dict[str, torch.Tensor]:
    return load_file(store.folder("checkpoint", training.key) / MODEL)


@pytest.fixture
def one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings that report after each iteration or so."""
    advance = stages.Trainer.advance
    monkeypatch.setattr(stages.Trainer, "advance", lambda self, _steps: advance(self, 1))


def test_an_interrupted_training_goes_on_to_the_same_weights(
    done: Done, scene_folder: Path, tmp_path: Path, one_step_at_a_time: None
) -> None:
    store = Store(tmp_path)
    bench, plan = bench_of(store, scene_folder, **QUICK)
    (training,) = plan.trainings
    work = bench.train(training, Stopwatch())
    seen = [next(work)["iteration"] for _ in range(4)]
    work.close()  # type: ignore[attr-defined]
    assert seen == [1, 2, 3, 4]
    assert not store.has("checkpoint", training.key)
    assert (store.running(training.key) / STATE).is_file()

    other, _ = bench_of(store, scene_folder, **QUICK)
    went_on = [update["iteration"] for update in other.train(training, Stopwatch())]
    assert went_on == [5, 6]
    straight = weights(done[2], done[1].trainings[0])
    assert training.key == done[1].trainings[0].key
    for name, tensor in weights(store, training).items():
        assert torch.equal(tensor, straight[name]), name
    history = json.loads((store.folder("checkpoint", training.key) / HISTORY).read_text())
    assert [point["iteration"] for point in history] == [1, 2, 3, 4, 5, 6]
    assert not (store.root / "running" / training.key).exists()


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_model_that_the_storage_does_not_take_is_offered_again_and_never_lost(
    done: Done,
    scene_folder: Path,
    tmp_path: Path,
    one_step_at_a_time: None,
    monkeypatch: pytest.MonkeyPatch,
    comes_back: bool,
) -> None:
    store = Store(tmp_path)
    bench, plan = bench_of(store, scene_folder, **QUICK)
    (training,) = plan.trainings
    monkeypatch.setattr(stages, "WRITE_DELAY", 0.0)
    monkeypatch.setattr(stages, "WRITE_PATIENCE", 60.0 if comes_back else -1.0)
    refused, real = [], Store.writing

    @contextmanager
    def writing(self: Store, kind: str, key: str) -> Iterator[Path]:
        if kind == "checkpoint" and (len(refused) < 2 or not comes_back):
            refused.append(key)
            raise StoreError("the storage is away")
        with real(self, kind, key) as folder:
            yield folder

    monkeypatch.setattr(Store, "writing", writing)
    work = bench.train(training, Stopwatch())
    if comes_back:
        assert [update["iteration"] for update in work] == [1, 2, 3, 4, 5, 6, 6, 6]
    else:
        with pytest.raises(StoreError, match="the storage is away"):
            list(work)
        monkeypatch.undo()
        other, _ = bench_of(store, scene_folder, **QUICK)
        assert list(other.train(training, Stopwatch())) == []  # it was trained already
    straight = weights(done[2], done[1].trainings[0])
    for name, tensor in weights(store, training).items():
        assert torch.equal(tensor, straight[name]), name
    history = json.loads((store.folder("checkpoint", training.key) / HISTORY).read_text())
    assert [point["iteration"] for point in history] == [1, 2, 3, 4, 5, 6]
    assert not (store.root / "running" / training.key).exists()


@pytest.mark.parametrize("damage", ["state", "history", "both"])
def test_a_damaged_state_is_begun_anew_and_gives_the_same_weights(
    done: Done, scene_folder: Path, tmp_path: Path, one_step_at_a_time: None, damage: str
) -> None:
    store = Store(tmp_path)
    bench, plan = bench_of(store, scene_folder, **QUICK)
    (training,) = plan.trainings
    work = bench.train(training, Stopwatch())
    next(work), next(work)
    work.close()  # type: ignore[attr-defined]
    running = store.running(training.key)
    if damage != "history":
        (running / STATE).write_bytes((running / STATE).read_bytes()[:-100])
    if damage != "state":
        (running / HISTORY).write_text("{")
    drain(bench_of(store, scene_folder, **QUICK)[0].train(training, Stopwatch()))
    straight = weights(done[2], done[1].trainings[0])
    for name, tensor in weights(store, training).items():
        assert torch.equal(tensor, straight[name]), name


def test_what_is_in_the_store_is_not_done_again(
    done: Done, scene_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan, store = done

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("this was done already")

    monkeypatch.setattr(stages, "compress", never)
    monkeypatch.setattr(stages, "calibrate", never)
    monkeypatch.setattr(stages.Trainer, "advance", never)
    bench, _ = bench_of(store, scene_folder)
    bench.prune(plan.trials[0], Stopwatch())
    bench.calibrate(plan.calibrations[0], Stopwatch())
    assert drain(bench.train(plan.trainings[0], Stopwatch())) == []


def test_statistics_go_through_shared_memory(done: Done, scene_folder: Path) -> None:
    _, plan, store = done
    key = plan.trials[0].statistics
    assert key is not None
    published: dict[str, Any] = {}
    made = with_scene(sweep(**SETTINGS), scene_folder)
    first = Workbench(made, store, ORIGIN, published.get, published.__setitem__, device="cpu")
    from_file = first.statistics(key)
    assert set(published) == {key}
    (store.folder("statistics", key) / STATISTICS).rename(store.root / "aside")
    try:
        second = Workbench(made, store, ORIGIN, published.get, device="cpu")
        shared = second.statistics(key)
    finally:
        (store.root / "aside").rename(store.folder("statistics", key) / STATISTICS)
    for network, statistics in from_file.items():
        for layer, moments in statistics.sums.items():
            for name, value in moments.items():
                assert torch.equal(value, shared[network].sums[layer][name])


def test_statistics_files_say_what_they_are_of(done: Done) -> None:
    _, plan, store = done
    for wanted, key in plan.calibrations[0].sets.items():
        _, said = read_tensors(store.folder("statistics", key) / STATISTICS)
        assert said["set"] == vars(wanted)


# --- what goes wrong ---------------------------------------------------------------------------


def run_and_fail(work: Any, watch: Stopwatch) -> tuple[str, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011  any error becomes a record
        work()
    failure = failure_of(caught.value, watch)
    return failure.stage, failure.reason


def test_a_diverged_training_fails_in_train(scene_folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    bench, plan = bench_of(store, scene_folder, train__learning_rate=1e30)
    watch = Stopwatch()
    stage, reason = run_and_fail(lambda: drain(bench.train(plan.trainings[0], watch)), watch)
    assert stage == "train"
    assert "diverged" in reason
    assert not store.has("checkpoint", plan.trainings[0].key)


def test_a_missing_or_damaged_model_fails_in_load(
    done: Done, scene_folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    bench, plan = bench_of(store, scene_folder, **QUICK)
    watch = Stopwatch()
    stage, reason = run_and_fail(lambda: bench.prune(plan.trials[0], watch), watch)
    assert stage == "load"
    assert "missing or damaged" in reason

    drain(bench.train(plan.trainings[0], Stopwatch()))
    path = store.folder("checkpoint", plan.trainings[0].key) / MODEL
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    watch = Stopwatch()
    fresh, _ = bench_of(store, scene_folder, **QUICK)
    stage, reason = run_and_fail(lambda: fresh.prune(plan.trials[0], watch), watch)
    assert stage == "load"
    assert str(path.parent) in reason
    assert store.keys("trial") == set()


def test_missing_statistics_fail_in_calibrate(
    done: Done, scene_folder: Path, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    bench, plan = bench_of(store, scene_folder, **QUICK)
    drain(bench.train(plan.trainings[0], Stopwatch()))
    watch = Stopwatch()
    stage, reason = run_and_fail(lambda: bench.prune(plan.trials[0], watch), watch)
    assert stage == "calibrate"
    assert STATISTICS in reason


@pytest.mark.parametrize(
    ("changed", "light"),
    [
        ({}, True),
        ({"criterion": "magnitude", "calibration": None}, True),
        ({"criterion": "wanda"}, True),
        ({"criterion": "obs"}, False),
        ({"criterion": "taylor"}, False),
        ({"compensation": "obs"}, False),
        ({"bits": "int8"}, False),
        ({"size": 100_000, "schedule": "chain"}, False),
        ({"mask": "2:4"}, False),
        ({"errors": "pixel"}, False),
        ({"recover": Recover(iterations=10)}, False),
        ({"control": "dense_longer"}, False),
        ({"layers": ("fine/trunk.0",)}, False),
    ],
)
def test_only_what_takes_a_moment_is_pruned_by_the_host(
    changed: dict[str, Any], light: bool
) -> None:
    wanted = CalibrationSet(1, 8, 0)
    config = TrialConfig("both", "activation", 0.5, "uniform", (0.5,) * 3, wanted, None)
    assert is_light(replace(config, **changed)) is light


def test_what_the_host_pruned_leaves_its_model_where_it_is(done: Done, tmp_path: Path) -> None:
    bench, made, *_ = done
    dense = bench.model(made.trainings[0].key)
    ratios = (0.5,) * len(dense.fine.shape.trunk)
    config = TrialConfig("coarse", "magnitude", 0.5, "uniform", ratios, None, None)
    small = compress(tmp_path / MODEL, dense, config, Material(), {}).model
    assert small.fine is dense.fine  # so a move to the GPU in place would move the dense one too
    copy = small.copied_to("meta")
    assert copy.device.type == "meta"
    assert {dense.device.type, small.device.type} == {"cpu"}


def test_a_missing_scene_fails_in_load(tmp_path: Path) -> None:
    made = sweep(scene={"path": str(tmp_path / "gone")})
    bench = Workbench(made, Store(tmp_path / "out"), ORIGIN, device="cpu")
    training = make_plan(sweep(), bench.store).trainings[0]
    watch = Stopwatch()
    stage, reason = run_and_fail(lambda: drain(bench.train(training, watch)), watch)
    assert stage == "load"
    assert "gone" in reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TrainingError("it diverged"), "it diverged"),
        (StoreError("disk full"), "disk full"),
        (PruningError("no such criterion"), "no such criterion"),
        (NerfError("two\n  lines"), "two lines"),
        (KeyError("x"), "KeyError: 'x'"),
        (
            torch.cuda.OutOfMemoryError(
                "Tried to allocate 5 GiB. GPU 0 has 1 GiB of which 1 MiB is free. Including "
                "non-PyTorch memory, this process has 9 MiB memory in use. Try PYTORCH_ALLOC_CONF"
            ),
            "out of GPU memory: Tried to allocate 5 GiB. GPU 0 has 1 GiB of which 1 MiB is free. "
            "Take fewer rays or samples, or give a worker more of a GPU (`resources`)",
        ),
        (ValueError("x" * 5000), f"ValueError: {'x' * 1988}"),
    ],
)
def test_failures_are_one_line_with_the_stage(error: Exception, reason: str) -> None:
    watch = Stopwatch()
    with pytest.raises(type(error)), watch.during("evaluate"):
        raise error
    failure = failure_of(error, watch)
    assert (failure.stage, failure.reason) == ("evaluate", reason)


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.during("a"):
            pass
    with watch.during("b"):
        pass
    assert watch.stage == "b"
    assert set(watch.seconds) == {"a", "b"}


def test_another_protocol_evaluates_the_same_model_again(done: Done, scene_folder: Path) -> None:
    _, plan, store = done
    bench, other = bench_of(store, scene_folder, evaluate__max_rays=16)
    (training,) = other.trainings
    assert training.trained
    assert not training.evaluated
    assert drain(bench.train(training, Stopwatch())) == []
    quick = store.read_record("training", training.result)
    assert quick.training == plan.trainings[0].key
    assert replace(quick, key="").config == plan.trainings[0].config


def test_a_training_on_two_devices_leaves_the_same_kind_of_checkpoint(
    scene_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: Done
) -> None:
    """`resources.train.gpus: 2` asks for two devices, and changes neither key nor result."""
    asked: list[int] = []

    def two_processes(count: int) -> list[torch.device]:
        asked.append(count)
        return [torch.device("cpu")] * count

    monkeypatch.setattr(stages, "train_devices", two_processes)
    store = Store(tmp_path / "out")
    bench, plan = bench_of(store, scene_folder, resources__train={"gpus": 2})
    training = plan.trainings[0]
    drain(bench.train(training, Stopwatch()))
    assert asked == [2]
    alone, together = done[2], store
    assert training.key == done[1].trainings[0].key
    for name, weights in load_file(alone.folder("checkpoint", training.key) / MODEL).items():
        shared = load_file(together.folder("checkpoint", training.key) / MODEL)[name]
        torch.testing.assert_close(shared, weights, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("total", [1, 10, 49, 50, 51, 120, 1000])
@pytest.mark.parametrize("step", [1, 7, 10, 49, 50, 51, 5000])
def test_the_last_report_of_a_training_is_of_the_same_iterations_at_any_speed(
    total: int, step: int
) -> None:
    strides, left = [], total
    while left:
        strides.append(stages._stride(step, left))
        left -= strides[-1]
        assert left >= 0
    assert strides[-1] == min(total, stages.LAST_ITERATIONS)
    assert max(strides) <= max(step, stages.LAST_ITERATIONS)
