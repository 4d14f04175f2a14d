"""The tracking logger on a real PostgreSQL and a real MLflow server: writers, outages, secrets."""

import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from sqlalchemy import create_engine, text

from orchestrator.cli import main
from orchestrator.errors import SpecError, TrackingError
from orchestrator.results import Record
from orchestrator.store import Lease, Store
from orchestrator.tracking import SweepInfo, TrackingLogger, names
from orchestrator.tracking.control import Remote
from orchestrator.tracking.stores import OPENING, brief, open_client
from orchestrator.tracking.ui import free_port, serve, ui_command
from tests.services import Postgres, postgres
from tests.unit.record_builder import save, training_record, trial_record
from tests.unit.sweep_builder import sweep

INFO = SweepInfo("synthetic", "ab12" * 4, "name: synthetic\n", None, "synthetic", 0, "2026-01-02")
SECRET = Postgres.password


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGPASSWORD", server.password)
        MlflowClient(server.uri).search_experiments()  # makes the tables
        yield server


def filled(folder: Path, trials: int) -> tuple[Store, list[Record]]:
    store = Store(folder)
    store.prepare()
    dense = save(store, training_record())
    return store, [dense, *(save(store, trial_record(dense, i / 40)) for i in range(trials))]


def tracking(uri: str, store: Store, info: SweepInfo = INFO, **options: Any) -> TrackingLogger:
    return TrackingLogger(
        uri, "tests", info, store, system_metrics=False, **{"patience": 60.0, **options}
    )


def runs_of(uri: str, info: SweepInfo = INFO) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    where = f"tags.`{names.HASH}` = '{info.hash}'"
    return list(client.search_runs([experiment.experiment_id], where, max_results=1000))


def assert_each_once(runs: list[Run], records: list[Record]) -> None:
    keys = Counter(r.data.tags[names.KEY] for r in runs if names.KEY in r.data.tags)
    assert keys == Counter(record.key for record in records)
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_key = {run.data.tags.get(names.KEY): run for run in runs}
    for record in records:
        assert by_key[record.key].data.metrics["psnr"] == pytest.approx(record.metrics["psnr"])


# --- PostgreSQL ----------------------------------------------------------------------------------


def _write_a_sweep(uri: str, folder: Path, info: SweepInfo) -> None:
    store, records = filled(folder, 6)
    with tracking(uri, store, info) as logger:
        for record in records:
            logger.record(record)


def test_several_writers_share_one_database(database: Postgres, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    infos = [replace(INFO, name=f"sweep-{i}", hash=f"{i:016x}") for i in range(3)]
    writers = [
        spawn.Process(target=_write_a_sweep, args=(database.uri, tmp_path / info.name, info))
        for info in infos
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    for info in infos:
        _, records = filled(tmp_path / info.name, 6)
        assert_each_once(runs_of(database.uri, info), records)


def test_a_database_that_restarts_gets_everything_once(
    database: Postgres, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    info = replace(INFO, hash="cd34" * 4)
    store, records = filled(tmp_path, 8)
    with tracking(database.uri, store, info) as logger:
        for record in records[:3]:
            logger.record(record)
        logger.flush()
        database.stop()
        try:
            for record in records[3:]:
                logger.record(record)
            time.sleep(3)  # longer than the attempts that an error gets
        finally:
            database.start()
        assert logger.flush(timeout=60)
    assert logger.unlogged == ()
    assert_each_once(runs_of(database.uri, info), records)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("sessions_only", [False, True])
def test_a_database_that_takes_connections_and_says_nothing_is_waited_for(
    sessions_only: bool,
    database: Postgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Stopped by SIGSTOP: the system goes on taking what is sent to it."""
    monkeypatch.setattr("orchestrator.tracking.stores.PROBE_SECONDS", 1.0)
    monkeypatch.setattr("orchestrator.databases.SILENT_SECONDS", 1.0)
    monkeypatch.setattr("orchestrator.databases.CONNECT_SECONDS", 2.0)
    info = replace(INFO, hash=f"5e{sessions_only:014x}")
    store, records = filled(tmp_path, 4)
    logger = tracking(database.uri, store, info)
    logger.__enter__()
    for record in records[:2]:
        logger.record(record)
    assert logger.flush(timeout=60)
    with database.silent(sessions_only=sessions_only):
        for record in records[2:]:
            logger.record(record)
        if sessions_only:  # new ones are heard
            assert logger.flush(timeout=60)
        else:
            with pytest.raises(TrackingError, match="does not answer: no answer within 1 s"):
                Remote(database.uri, "tests")
            with pytest.raises(TrackingError, match="does not answer: no answer within 1 s"):
                tracking(database.uri, store, info).__enter__()
            assert not logger.flush(timeout=2)
    logger.__exit__(None, None, None)
    assert logger.unlogged == ()
    assert_each_once(runs_of(database.uri, info), records)
    assert "Traceback" not in capfd.readouterr().err


def test_a_database_that_stays_silent_is_given_up_at_the_end(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.stores.PROBE_SECONDS", 1.0)
    monkeypatch.setattr("orchestrator.databases.SILENT_SECONDS", 1.0)
    monkeypatch.setattr("orchestrator.databases.CONNECT_SECONDS", 2.0)
    info = replace(INFO, hash="0d0d" * 4)
    store, records = filled(tmp_path, 2)
    logger = tracking(database.uri, store, info, patience=2.0)
    logger.__enter__()
    logger.record(records[0])
    assert logger.flush(timeout=60)
    with database.silent():
        for record in records[1:]:
            logger.record(record)
        logger.__exit__(None, None, None)
    assert len(logger.unlogged) >= 2  # the record, and the end of the sweep's run
    with tracking(database.uri, store, info) as again:
        for record in records:
            again.record(record)
    assert again.unlogged == ()
    assert_each_once(runs_of(database.uri, info), records)


def test_who_waits_for_the_tables_of_a_fresh_database_does_not_wait_for_ever(
    database: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.stores.TURN_SECONDS", 0.5)
    engine = create_engine(database.uri)
    with engine.connect() as other:
        other.execute(text("SELECT pg_advisory_lock(:key)"), {"key": OPENING})
        with pytest.raises(TrackingError, match="another process has been making its tables"):
            open_client(database.uri)
    engine.dispose()
    open_client(database.uri)


def test_a_password_is_nowhere_to_be_read(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address with its password, as the environment may hold it."""
    info = replace(INFO, hash="ef56" * 4)
    uri = database.uri.replace("prunefield@", f"prunefield:{SECRET}@")
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("PRUNEFIELD_TRACKING_URI", uri)
    store, records = filled(tmp_path, 1)
    with tracking("sqlite:////nowhere/at/all.db", store, info) as logger:
        logger.record(records[0])
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
    dump = subprocess.run(
        [str(database.tools / "pg_dump"), *database.where, "runs"],
        env={**os.environ, "PGPASSWORD": SECRET},
        capture_output=True,
        check=True,
    ).stdout
    assert info.hash.encode() in dump
    assert SECRET.encode() not in dump
    command, environment = ui_command(uri, 1)
    assert not [word for word in command if SECRET in word]
    assert environment["MLFLOW_BACKEND_STORE_URI"] == uri


def test_a_wrong_password_is_a_clear_error_that_does_not_show_it(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PGPASSWORD")
    uri = database.uri.replace("prunefield@", "prunefield:not-it@")
    with (
        pytest.raises(TrackingError, match="cannot be used") as caught,
        tracking(uri, Store(tmp_path)),
    ):
        pass
    assert "not-it" not in str(caught.value)
    assert "prunefield:***@127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql://ada:s3cr3t@db/runs",
        "postgresql://db/runs?user=ada&password=s3cr3t",
        "https://ada:s3cr3t@mlflow.example",
    ],
)
def test_a_password_in_a_sweep_file_is_refused_and_not_shown(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SpecError, match=r"tracking\.uri.*environment") as caught:
        sweep(tracking__uri=uri)
    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in brief(ValueError(f"cannot reach {uri}"))
    assert main(["validate", str(tmp_path / "none.yaml")]) == 2
    assert "s3cr3t" not in capsys.readouterr().err
    assert sweep(tracking__uri="postgresql://ada@db/runs").tracking.uri is not None
    with pytest.raises(SpecError, match=r"search\.storage.*environment") as caught:
        sweep(search={"trials": 4, "storage": uri})
    assert "s3cr3t" not in str(caught.value)
    bucket = f"s3://{uri.partition('//')[2]}"
    with pytest.raises(SpecError, match=r"storage") as caught:
        sweep(storage=bucket)
    assert "s3cr3t" not in str(caught.value)


# --- an MLflow server ----------------------------------------------------------------------------


def test_a_server_that_is_down_for_a_while_gets_everything_once(tmp_path: Path) -> None:
    database, port = f"sqlite:///{tmp_path / 'server.db'}", free_port()
    store, records = filled(tmp_path / "store", 4)
    with serve(database, port) as (address, _):
        logger = tracking(address, store)
        logger.__enter__()
        for record in records[:2]:
            logger.record(record)
        assert logger.flush(timeout=60)
    for record in records[2:]:
        logger.record(record)
    closing = threading.Thread(target=logger.__exit__, args=(None, None, None))
    closing.start()
    time.sleep(2)
    assert closing.is_alive()
    with serve(database, port):
        closing.join(60)
        assert logger.unlogged == ()
    assert_each_once(runs_of(database), records)


def test_a_server_that_takes_connections_and_says_nothing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.tracking.stores.PROBE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    database = f"sqlite:///{tmp_path / 'server.db'}"
    store, records = filled(tmp_path / "store", 4)
    with serve(database) as (address, server):
        assert server is not None
        logger = tracking(address, store)
        logger.__enter__()
        for record in records[:2]:
            logger.record(record)
        assert logger.flush(timeout=60)
        os.killpg(server.pid, signal.SIGSTOP)
        try:
            for record in records[2:]:
                logger.record(record)
            closing = threading.Thread(target=logger.__exit__, args=(None, None, None))
            closing.start()
            with pytest.raises(TrackingError, match="does not answer: no answer within 1 s"):
                Remote(address, "tests")
            with pytest.raises(TrackingError, match="does not answer: no answer within 1 s"):
                tracking(address, store).__enter__()
            time.sleep(2)
            assert closing.is_alive()
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        closing.join(60)
        assert logger.unlogged == ()
    assert_each_once(runs_of(database), records)


@pytest.mark.slow
def test_a_server_whose_database_is_silent_is_waited_for(
    database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers, and requests do not end; those that nobody waits for any more are done later."""
    monkeypatch.setattr("orchestrator.tracking.stores.PROBE_SECONDS", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    info = replace(INFO, hash="7a7a" * 4)
    store, records = filled(tmp_path / "store", 6)
    with serve(database.uri) as (address, _):
        logger = tracking(address, store, info)
        logger.__enter__()
        for record in records[:2]:
            logger.record(record)
        assert logger.flush(timeout=60)
        with database.silent():
            for record in records[2:]:
                logger.record(record)
            assert not logger.flush(timeout=15)
            with pytest.raises(TrackingError, match=r"cannot be used: .*timed out"):
                Remote(address, "tests")
        logger.__exit__(None, None, None)
        assert logger.unlogged == ()
    assert_each_once(runs_of(database.uri, info), records)


# --- what a killed driver leaves behind --------------------------------------------------------


def test_runs_of_a_killed_driver_are_ended_by_the_next_sweep_of_its_storage(tmp_path: Path) -> None:
    store, records = filled(tmp_path / "store", 1)
    other = replace(INFO, name="other", hash="99aa" * 4)
    alive = replace(INFO, name="alive", hash="77bb" * 4)
    uri = names.default_uri(store)
    lease = store.lease(names.lease_of(alive.name, alive.hash), "the sweep alive")
    assert isinstance(lease, Lease)
    with lease:
        for info in (other, alive):  # as after SIGKILL: nobody ends the block
            killed = tracking("", store, info)
            killed.__enter__()
            killed.training_progress("beef", 1, {"loss": 0.5})
            assert killed.flush(timeout=30)
        with tracking("", store) as logger:
            logger.record(records[0])
        assert {r.info.status for r in runs_of(uri, other)} == {"KILLED"}
        assert len(runs_of(uri, other)) == 2
        assert {r.info.status for r in runs_of(uri, alive)} == {"RUNNING"}
        assert {r.info.status for r in runs_of(uri)} == {"FINISHED"}
    with tracking("", store):
        pass
    assert {r.info.status for r in runs_of(uri, alive)} == {"KILLED"}


def test_a_run_that_a_broken_connection_made_twice_is_removed(tmp_path: Path) -> None:
    store, records = filled(tmp_path / "store", 1)
    uri = names.default_uri(store)
    with tracking("", store) as logger:
        logger.record(records[0])
        assert logger.flush(timeout=30)
        tags = names.child_tags("trial", "cafe", "beef", INFO, str(logger.parent_run_id))
        MlflowClient(uri).create_run(str(logger.experiment_id), tags=tags)
    assert_each_once(runs_of(uri), records[:1])
