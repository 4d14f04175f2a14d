"""The tracking logger against a real MLflow on SQLite."""

import io
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from orchestrator.cli import main
from orchestrator.errors import TrackingError
from orchestrator.progress import Progress
from orchestrator.report import ReportData
from orchestrator.results import Failure, Record
from orchestrator.showcase import gallery_of
from orchestrator.spec.schema import TRACKING_KINDS
from orchestrator.store import Store
from orchestrator.tracking import SweepInfo, TrackingLogger, default_uri, links, names
from orchestrator.tracking.stores import PORTS, open_client
from orchestrator.tracking.ui import build_links
from orchestrator.tracking.writer import RunWriter
from tests.unit.record_builder import DENSE_BYTES, SYNTHETIC, save, training_record, trial_record

INFO = SweepInfo(
    name="synthetic",
    hash="ab12" * 4,
    yaml="name: synthetic\n",
    commit="0123456789abcdef",
    hardware=SYNTHETIC,
    seed=0,
    created="2026-01-02T03:04:05+00:00",
    planned={"training": 1, "trial": 2},
)


@pytest.fixture
def store(tmp_path: Path, fresh_database: bytes) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    (store.root / "mlflow.db").write_bytes(fresh_database)
    return store


def tracking(store: Store, **options: Any) -> TrackingLogger:
    options = {"system_metrics": False, "patience": 5.0, **options}
    return TrackingLogger(None, "tests", INFO, store, **options)


class Seen:
    """What a visitor finds in the tracking store."""

    def __init__(self, store: Store) -> None:
        self.client = MlflowClient(default_uri(store))
        experiment = self.client.get_experiment_by_name("tests")
        assert experiment is not None
        self.experiment_id = experiment.experiment_id
        self.runs: list[Run] = list(self.client.search_runs([self.experiment_id], max_results=1000))

    def of(self, kind: str) -> list[Run]:
        return [run for run in self.runs if run.data.tags[names.KIND] == kind]

    def one(self, key: str) -> Run:
        (run,) = [run for run in self.runs if run.data.tags.get(names.KEY) == key]
        return run

    def files(self, run: Run, path: str | None = None) -> list[str]:
        return [f.path for f in self.client.list_artifacts(run.info.run_id, path)]


@pytest.fixture
def records(store: Store) -> tuple[Record, Record, Record]:
    dense = save(store, training_record())
    trial = save(store, trial_record(dense, 0.3))
    failed = save(store, trial_record(dense, 0.95, failure=Failure("prune", "synthetic reason")))
    return dense, trial, failed


def test_a_sweep_is_a_parent_with_its_training_and_trials(
    store: Store, records: tuple[Record, Record, Record], tmp_path: Path
) -> None:
    dense, trial, failed = records
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>synthetic</p>")
    with tracking(store) as logger:
        logger.training_progress(dense.key, 10, {"psnr": 12.0})
        logger.training_progress(dense.key, 20, {"psnr": 15.0})
        for record in (trial, dense, failed):  # a trial may come before its training
            logger.record(record)
        logger.front([trial.key], {"hypervolume": 7.0})
        logger.report(report)
    assert logger.unlogged == ()

    seen = Seen(store)
    (parent,) = seen.of("sweep")
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "synthetic"
    assert parent.data.metrics["hypervolume"] == 7.0
    assert parent.data.tags[names.HASH] == INFO.hash
    assert set(seen.files(parent)) == {"sweep.yaml", "report"}
    assert seen.files(parent, "report") == ["report/report.html"]

    training, done = seen.one(dense.key), seen.one(trial.key)
    assert {training.info.status, done.info.status} == {"FINISHED"}
    curve = seen.client.get_metric_history(training.info.run_id, "train/psnr")
    assert [(m.step, m.value) for m in curve] == [(10, 12.0), (20, 15.0)]
    assert done.data.tags[names.PARENT] == parent.info.run_id
    assert done.data.tags[names.TRAINING_RUN] == training.info.run_id
    assert done.data.tags[names.COMMIT] == trial.provenance.commit
    assert done.data.tags[names.SEED] == "0"
    assert done.data.tags[names.HARDWARE] == SYNTHETIC
    assert done.data.tags[names.FRONT] == "true"
    assert done.data.params["ratio"] == "0.3"
    assert done.data.params["criterion"] == "activation"
    assert done.data.metrics["psnr"] == trial.metrics["psnr"]
    views = seen.client.get_metric_history(done.info.run_id, "view_psnr")
    assert {m.step: m.value for m in views} == {v.view: v.psnr for v in trial.views}

    lost = seen.one(failed.key)
    assert lost.info.status == "FAILED"
    assert lost.data.tags[names.FAILED_STAGE] == "prune"
    assert lost.data.tags[names.FAILED_REASON] == "synthetic reason"


def test_renders_are_images_and_the_model_is_a_logged_model(
    store: Store, records: tuple[Record, Record, Record]
) -> None:
    _, trial, _ = records
    with tracking(store) as logger:
        logger.record(trial)
    seen = Seen(store)
    run = seen.one(trial.key)
    images = seen.files(run, "images")
    assert sum("render~view_0+step+30+" in name for name in images) == 2  # and a thumbnail
    full = next(n for n in images if "view_0" in n and n.endswith(".png"))
    logged = Path(seen.client.download_artifacts(run.info.run_id, full))
    source = store.folder("trial", trial.key) / "renders/view_0.png"
    assert logged.read_bytes() == source.read_bytes()

    (model,) = seen.client.search_logged_models([seen.experiment_id])
    assert str(model.status) == "READY"
    assert model.source_run_id == run.info.run_id
    assert {m.key: m.value for m in model.metrics or []}["psnr"] == trial.metrics["psnr"]
    (file,) = seen.client.list_logged_model_artifacts(model.model_id)
    assert file.path == "model.safetensors"


def test_running_again_logs_only_what_is_missing(
    store: Store, records: tuple[Record, Record, Record]
) -> None:
    dense, trial, failed = records
    with tracking(store) as logger:
        logger.record(dense)
        logger.record(trial)
    before = {run.info.run_id for run in Seen(store).runs}
    with tracking(store) as logger:
        for record in (dense, trial, failed, trial):
            logger.record(record)
    seen = Seen(store)
    assert len(seen.runs) == 4
    assert before < {run.info.run_id for run in seen.runs}
    assert len(seen.client.search_logged_models([seen.experiment_id])) == 2


def test_a_failed_trial_that_succeeds_later_replaces_its_run(store: Store) -> None:
    dense = save(store, training_record())
    failed = trial_record(dense, 0.3, failure=Failure("prune", "synthetic"))
    for record in (failed, save(store, trial_record(dense, 0.3))):
        with tracking(store) as logger:
            logger.record(record)
    run = Seen(store).one(failed.key)
    assert run.info.status == "FINISHED"
    assert names.FAILED_STAGE not in run.data.tags


def test_pictures_lie_where_mlflow_itself_would_put_them(
    store: Store, records: tuple[Record, Record, Record]
) -> None:
    _, trial, _ = records
    with tracking(store) as logger:
        logger.record(trial)
    seen = Seen(store)
    ours = seen.one(trial.key)
    theirs = seen.client.create_run(seen.experiment_id)
    for source in sorted((store.folder("trial", trial.key) / "renders").glob("view_*.png")):
        with PIL.Image.open(source) as picture:
            seen.client.log_image(theirs.info.run_id, picture, key=f"render/{source.stem}", step=30)

    def found(run: Run) -> list[tuple[str, str, tuple[int, int]]]:
        kinds = []
        for path in seen.files(run, "images"):
            name = re.sub(r"\+timestamp\+\d{13}\+[-0-9a-f]{36}", "+", path)
            with PIL.Image.open(seen.client.download_artifacts(run.info.run_id, path)) as picture:
                kinds.append((name, str(picture.format), picture.size))
        return sorted(kinds)

    assert found(ours) == found(theirs)
    assert len(found(ours)) == 4
    tag = "mlflow.loggedImages"
    assert ours.data.tags[tag] == seen.client.get_run(theirs.info.run_id).data.tags[tag]


def test_a_store_that_cannot_be_opened_is_told_when_it_is_waited_for(tmp_path: Path) -> None:
    with ExitStack() as closing:
        logger = TrackingLogger("ftp://nowhere", "tests", INFO, Store(tmp_path))
        logger.start()
        closing.push(logger)
        with pytest.raises(TrackingError, match="not a tracking store"):
            logger.opened()
    assert logger.unlogged == ()


CRASHES = ["_write_model", "_write_numbers", "_write_images", "_end_child", "_link_trials"]


@pytest.mark.parametrize("step", CRASHES)
def test_what_a_crash_leaves_behind_is_made_whole_exactly_once(
    store: Store,
    records: tuple[Record, Record, Record],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    dense, trial, _ = records
    writer = RunWriter(default_uri(store), "tests", INFO, store)
    writer.write_curve(dense.key, [(1, 1000, {"psnr": 9.0})])
    real = getattr(RunWriter, step)

    def crash(*arguments: Any) -> None:
        if step in ("_write_numbers", "_write_images"):
            real(*arguments)
        raise SystemError("synthetic crash")

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, step, crash)
        for record in (dense, trial):
            try:
                writer.write_record(record)
            except SystemError:
                continue
    assert any(run.info.status == "RUNNING" for run in Seen(store).runs)

    with tracking(store) as logger:
        logger.record(dense)
        logger.record(trial)
    seen = Seen(store)
    assert {run.info.status for run in seen.runs} == {"FINISHED"}
    assert len(seen.runs) == 3
    run, training = seen.one(trial.key), seen.one(dense.key)
    assert len(seen.files(run, "images")) == 4
    assert len(seen.client.get_metric_history(run.info.run_id, "psnr")) == 1
    assert len(seen.client.get_metric_history(training.info.run_id, "train/psnr")) == 1
    assert run.data.tags[names.TRAINING_RUN] == training.info.run_id
    assert len(seen.client.search_logged_models([seen.experiment_id])) == 2


def test_an_interrupted_training_continues_its_curve(store: Store) -> None:
    dense = save(store, training_record())

    def sweep(logger: TrackingLogger) -> None:
        for step in (1, 2, 3):
            logger.training_progress(dense.key, step, {"loss": 1 / step})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), tracking(store) as logger:
        sweep(logger)
    assert {run.info.status for run in Seen(store).runs} == {"KILLED"}
    with tracking(store) as logger:
        for step in (3, 4):  # the checkpoint was older than the curve
            logger.training_progress(dense.key, step, {"loss": 1 / step})
        logger.record(dense)
    seen = Seen(store)
    run = seen.one(dense.key)
    history = seen.client.get_metric_history(run.info.run_id, "train/loss")
    assert [m.step for m in history] == [1, 2, 3, 4]
    assert {run.info.status for run in seen.runs} == {"FINISHED"}


def test_status_shows_what_the_terminal_shows_while_the_sweep_runs(
    store: Store, records: tuple[Record, Record, Record], capsys: pytest.CaptureFixture[str]
) -> None:
    dense, trial, _ = records
    show = Progress(Console(file=io.StringIO()))
    ask = ["status", INFO.name, "--tracking", default_uri(store), "--experiment", "tests"]
    with tracking(store) as logger:
        show.started(30)
        show.running(4)
        for record in (dense, trial, *(None,) * 6):
            show.ended(record)
        logger.watch(show.state)
        logger.record(dense)
        assert logger.flush(30)
        assert main([*ask, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["status"], found["silent"]) == ("RUNNING", False)
        said = {name: found["progress"][name] for name in ("done", "total", "running", "failed")}
        assert said == {"done": 8, "total": 30, "running": 4, "failed": 0}
        assert [point["id"] for point in found["progress"]["front"]] == [trial.key, dense.key]
        assert main(ask) == 0
        text = capsys.readouterr().out
        for words in ("RUNNING", "8/30", "4 running", "front so far", "activation both 30%"):
            assert words in text
    assert main([*ask, "--follow"]) == 0  # it has ended: nothing to wait for
    text = capsys.readouterr().out
    assert "FINISHED" in text
    assert "running" not in text


def test_a_tag_holds_a_front_of_any_length() -> None:
    state = Progress(Console(file=io.StringIO())).state()
    point = {"id": "ab12" * 4, "size_bytes": 1.0, "psnr": 2.0, "model": "m" * 100}
    at = "2026-01-02T03:04:05+00:00"
    text = names.progress_text({**state, "front": [{**point, "psnr": i} for i in range(900)]}, at)
    assert len(text) <= names.MAX_TAG
    kept = [p["psnr"] for p in json.loads(text)["front"]]
    assert kept[0] == 0
    assert kept[-1] == 899
    assert kept == sorted(kept)
    assert len(kept) > 8


def test_an_exception_fails_the_sweep_and_leaves_nothing_running(store: Store) -> None:
    def sweep(logger: TrackingLogger) -> None:
        logger.training_progress("0" * 16, 1, {"loss": 1.0})
        raise RuntimeError("synthetic")

    with pytest.raises(RuntimeError, match="synthetic"), tracking(store) as logger:
        sweep(logger)
    seen = Seen(store)
    assert [run.info.status for run in seen.of("sweep")] == ["FAILED"]
    assert [run.info.status for run in seen.of("training")] == ["KILLED"]


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the next n writes of metrics and params fail."""
    left = [0]
    real = RunWriter._write_numbers

    def fail(*arguments: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise ConnectionError("synthetic outage")
        real(*arguments)

    monkeypatch.setattr(RunWriter, "_write_numbers", fail)
    monkeypatch.setattr("orchestrator.tracking.logger.FIRST_DELAY", 0.01)
    return lambda n: left.__setitem__(0, n)


def test_an_outage_is_waited_out(
    store: Store, records: tuple[Record, Record, Record], flaky: Callable[[int], None]
) -> None:
    flaky(2)
    with tracking(store) as logger:
        logger.record(records[1])
    assert logger.unlogged == ()
    seen = Seen(store)
    assert seen.one(records[1].key).info.status == "FINISHED"
    assert len(seen.files(seen.one(records[1].key), "images")) == 4


def test_what_cannot_be_logged_is_said_and_logged_the_next_time(
    store: Store,
    records: tuple[Record, Record, Record],
    flaky: Callable[[int], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    flaky(10**6)
    with caplog.at_level(logging.WARNING), tracking(store) as logger:
        logger.record(records[1])
    assert logger.unlogged == (f"trial {records[1].key}: synthetic outage",)
    assert "run the sweep again" in caplog.text
    assert {run.info.status for run in Seen(store).runs} == {"FINISHED", "KILLED"}
    flaky(0)
    with tracking(store) as logger:
        logger.record(records[1])
    assert Seen(store).one(records[1].key).info.status == "FINISHED"


def test_files_that_are_refused_cost_no_run_and_are_logged_the_next_time(
    store: Store, records: tuple[Record, Record, Record]
) -> None:
    """The folder for artifacts is a file, for a while."""
    folder, aside = store.root / "mlartifacts", store.root / "aside"
    with tracking(store) as logger:
        folder.rename(aside)
        folder.write_text("in the way")
        logger.record(records[1])
        logger.record(records[2])  # failed: it has no files
    assert [what.partition(":")[0] for what in logger.unlogged] == [f"trial {records[1].key}"]
    seen = Seen(store)
    assert {run.info.status for run in seen.of("sweep")} == {"FINISHED"}
    assert seen.one(records[1].key).info.status == "KILLED"
    assert seen.one(records[2].key).info.status == "FAILED"
    folder.unlink()
    aside.rename(folder)
    with tracking(store) as logger:
        for record in records:
            logger.record(record)
    assert logger.unlogged == ()
    assert Counter(run.info.status for run in Seen(store).runs) == {"FINISHED": 3, "FAILED": 1}


def test_an_outage_at_the_end_is_waited_for_as_long_as_patience_lasts(
    store: Store, records: tuple[Record, Record, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    back: list[float] = []  # when the store answers again
    monkeypatch.setattr("orchestrator.tracking.logger.FIRST_DELAY", 30.0)  # long away already
    monkeypatch.setattr("orchestrator.tracking.logger.PROBE_AGAIN", 0.0)
    monkeypatch.setattr("orchestrator.tracking.logger.CLOSING_DELAY", 0.1)
    monkeypatch.setattr(
        "orchestrator.tracking.stores.unreachable",
        lambda _: "away" if back and time.monotonic() < back[0] else None,
    )
    with tracking(store, patience=20.0) as logger:
        assert logger.flush(timeout=30)
        back.append(time.monotonic() + 1.0)
        logger.record(records[1])
    assert logger.unlogged == ()
    assert Seen(store).one(records[1].key).info.status == "FINISHED"


def test_a_store_that_is_slow_is_waited_for_as_long_as_it_answers(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RunWriter.write_record
    monkeypatch.setattr("orchestrator.tracking.logger.LAST_SECONDS", 0.5)
    monkeypatch.setattr(
        RunWriter, "write_record", lambda *given: (time.sleep(0.3), real(*given))[1]
    )
    dense = save(store, training_record())
    trials = [save(store, trial_record(dense, i / 13)) for i in range(12)]
    with tracking(store, patience=3.0) as logger:
        for record in trials:
            logger.record(record)
    assert logger.unlogged == ()
    assert [run.info.status for run in Seen(store).of("trial")] == ["FINISHED"] * 12


def test_two_sweeps_in_one_process_do_not_meet(
    store: Store, records: tuple[Record, Record, Record]
) -> None:
    other = replace(INFO, name="other", hash="cd34" * 4)
    with (
        tracking(store) as first,
        TrackingLogger(None, "tests", other, store, system_metrics=False) as second,
    ):
        first.record(records[1])
        second.record(records[1])
    seen = Seen(store)
    assert len(seen.of("sweep")) == 2
    parents = {run.data.tags[names.PARENT] for run in seen.of("trial")}
    assert parents == {first.parent_run_id, second.parent_run_id}


def test_an_experiment_that_another_sweep_makes_meanwhile_is_taken(
    store: Store, records: tuple[Record, Record, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = (store.root / "mlartifacts").as_uri()
    MlflowClient(default_uri(store)).create_experiment("tests", artifact_location=place)
    real, asked = MlflowClient.get_experiment_by_name, []

    def too_early(client: MlflowClient, name: str) -> Any:
        asked.append(name)
        return None if len(asked) == 1 else real(client, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", too_early)
    with tracking(store) as logger:
        logger.record(records[1])
    assert asked == ["tests", "tests"]
    assert logger.unlogged == ()
    assert Seen(store).one(records[1].key).info.status == "FINISHED"


def test_system_metrics_stand_on_the_parent_and_their_thread_ends(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.writer.SYSTEM_INTERVAL", 0.2)
    with tracking(store, system_metrics=True) as logger:
        logger.flush()
        threading.Event().wait(1.0)
    (parent,) = Seen(store).of("sweep")
    assert any(name.startswith("system/cpu") for name in parent.data.metrics)
    assert not any("SystemMetrics" in t.name or t.name == "tracking" for t in threading.enumerate())


def test_many_trials_take_seconds(store: Store) -> None:
    dense = save(store, training_record())
    trials = [save(store, trial_record(dense, i / 26)) for i in range(25)]
    with tracking(store) as logger:
        for record in (dense, *trials):
            logger.record(record)
        assert logger.flush(timeout=30)
    assert len(Seen(store).of("trial")) == 25


def test_a_sweep_file_may_name_every_kind_of_store_that_can_be_opened() -> None:
    assert set(TRACKING_KINDS) == {"sqlite", *PORTS}


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("nonsense", "is not a tracking store"),
        ("file:///tmp/mlruns", "is not a tracking store"),
        ("http://127.0.0.1:9", "does not answer"),
        ("sqlite://", "names no file"),
        ("sqlite:////proc/prunefield/mlflow.db", "cannot be written"),
    ],
)
def test_an_unusable_store_is_a_clear_error(tmp_path: Path, uri: str, says: str) -> None:
    store = Store(tmp_path)
    with pytest.raises(TrackingError, match=says), TrackingLogger(uri, "tests", INFO, store):
        pass


def test_a_damaged_database_is_a_clear_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "mlflow.db").write_text("no database " * 100)
    with pytest.raises(TrackingError, match="cannot be written"), tracking(store):
        pass


def test_links_name_the_sweep_and_the_runs_of_its_front(
    store: Store, records: tuple[Record, Record, Record]
) -> None:
    with tracking(store) as logger:
        logger.record(records[1])
        logger.front([records[1].key], {})
    found = links("http://127.0.0.1:5", default_uri(store), "tests", INFO.hash)
    run = Seen(store).one(records[1].key)
    assert logger.experiment_id is not None
    assert logger.parent_run_id is not None
    assert found == build_links(
        "http://127.0.0.1:5", logger.experiment_id, logger.parent_run_id, [run.info.run_id]
    )
    assert run.info.run_id in (found.compare or "")
    with pytest.raises(TrackingError, match="run the sweep first"):
        links("http://127.0.0.1:5", default_uri(store), "tests", "0" * 16)


def test_tables_are_made_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Any) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "mlflow.db"
    with monkeypatch.context() as half:
        half.setattr("mlflow.store.db.utils._upgrade_db", killed)
        with pytest.raises(KeyboardInterrupt):
            open_client(f"sqlite:///{path}")
    assert not path.exists()
    client = open_client(f"sqlite:///{path}")
    client.create_experiment("tests")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f".{path.name}.lock"}


def test_the_sweeps_run_carries_pictures_tables_and_views_of_the_front(store: Store) -> None:
    dense = save(store, training_record())
    trials = [save(store, trial_record(dense, ratio)) for ratio in (0.3, 0.5, 0.7)]
    other = save(store, trial_record(dense, 0.5, "random"))
    data = ReportData(INFO.name, INFO.hash, (dense,), (*trials, other), store)

    def log(front: list[str]) -> None:
        with tracking(store) as logger:
            for record in (dense, *trials, other):
                logger.record(record)
            shown = replace(data, trials=tuple(t for t in data.trials if t.key in front))
            logger.front(front, {"hypervolume": 1.0}, gallery_of(shown))
        assert logger.unlogged == ()

    def pictures() -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for name in seen.files(parent, "images"):
            key, _, step = Path(name).name.split("+")[:3]
            if name.endswith(".png"):
                found.setdefault(key.replace("~", "/"), []).append(int(step))
        return {key: sorted(steps) for key, steps in found.items()}

    log([t.key for t in trials])
    seen = Seen(store)
    (parent,) = seen.of("sweep")
    sizes = [round(100 * (1 - t.metrics["size_bytes"] / DENSE_BYTES)) for t in trials]
    once = {"front/view_0": [0, *sizes], "activation both/view_0": [0, 30, 50, 70]}
    assert pictures() == once
    file = seen.client.download_artifacts(parent.info.run_id, "front.json")
    table = json.loads(Path(file).read_text())
    assert [row[table["columns"].index("id")] for row in table["data"]] == [
        dense.key,
        *(t.key for t in trials),
    ]
    experiment = seen.client.get_experiment(seen.experiment_id)
    found = links("http://127.0.0.1:5", default_uri(store), "tests", INFO.hash)
    assert found.front is not None
    shared = re.search(r"viewStateShareKey=([\w-]+)", found.front)
    assert shared is not None
    state = json.loads(experiment.tags[f"mlflow.sharedViewState.{shared[1]}"])
    chosen = seen.client.search_runs([seen.experiment_id], state["searchFilter"])
    assert {r.data.tags[names.KEY] for r in chosen} == {dense.key, *(t.key for t in trials)}
    assert state["runsHiddenMode"] == "SHOW_ALL"
    assert "viewStateShareKey" in found.table
    assert "compareRunsMode=TABLE" in found.table
    assert {"params.`ratio`", "metrics.`psnr`"} < set(state["selectedColumns"])
    (grid,) = [chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE"]
    (key,) = grid["imageKeys"]
    for run in seen.runs:
        shown = [f for f in seen.files(run, "images") if key.replace("/", "~") in f]
        on_front = run.data.tags.get(names.KEY) in {dense.key, *(t.key for t in trials)}
        assert len(shown) == (2 if on_front else 0)  # with its thumbnail, at the grid's one step
        assert all(f"+step+{grid['step']}+" in f for f in shown)

    log([t.key for t in trials])  # the same again
    assert pictures() == once
    log([t.key for t in trials[:2]])  # another front: the old pictures are gone
    assert pictures() == {"front/view_0": [0, *sizes[:2]], "activation both/view_0": [0, 30, 50]}


def test_of_the_ratios_in_one_percent_one_picture_is_shown(store: Store) -> None:
    dense = save(store, training_record())
    trials = [save(store, trial_record(dense, r)) for r in (0.301, 0.302, 0.304, 0.5, 0.502)]
    images = gallery_of(ReportData("s", "1" * 16, (dense,), tuple(trials), store)).images
    steps = [(i.step, i.path.parents[1].name) for i in images if i.key.startswith("activation")]
    assert steps == [(0, dense.key), (30, trials[0].key), (50, trials[3].key)]


def test_the_front_is_tagged_where_its_pictures_cannot_be_logged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.logger.FIRST_DELAY", 0.0)
    dense = save(store, training_record())
    trial = save(store, trial_record(dense, 0.5))
    data = ReportData(INFO.name, INFO.hash, (dense,), (trial,), store)

    def log() -> TrackingLogger:
        with tracking(store) as logger:
            logger.record(dense)
            logger.record(trial)
            logger.front([trial.key], {"hypervolume": 1.0}, gallery_of(data))
        return logger

    def beside() -> list[str]:
        seen = Seen(store)
        assert seen.one(trial.key).data.tags[names.FRONT] == "true"
        return [f for f in seen.files(seen.one(trial.key), "images") if "side by side" in f]

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "_log_images", lambda *_: 1 / 0)
        assert log().unlogged[-2].startswith("the front's pictures")
    assert beside() == []
    assert log().unlogged == ()
    assert len(beside()) == 2
    assert log().unlogged == ()  # once is enough
    assert len(beside()) == 2
