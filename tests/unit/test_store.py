"""The store: entries are whole or absent, and damage is noticed."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import StoreError
from orchestrator.results import Failure, Record
from orchestrator.store import RECORD, Store, atomic_write, file_hash
from tests.unit.record_builder import training_record, trial_record


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def record() -> Record:
    return trial_record(training_record(), 0.5)


def put(store: Store, record: Record, content: str = "weights") -> Path:
    with store.writing(record.kind, record.key) as folder:
        (folder / "renders").mkdir()
        (folder / "renders" / "view_0.png").write_text("picture")
        (folder / "model.safetensors").write_text(content)
        store.write_record(folder, record)
    return store.folder(record.kind, record.key)


def left_over(store: Store) -> list[Path]:
    return list((store.root / "tmp").iterdir())


# --- nothing is made before it is needed -------------------------------------------------------


def test_a_store_that_is_only_read_makes_no_folder(store: Store, record: Record) -> None:
    assert store.keys("trial") == set()
    assert not store.has("trial", record.key)
    assert store.read_failure(record.key) is None
    store.clear_failure(record.key)
    store.remove_running(record.key)
    with pytest.raises(StoreError):
        store.read_record("trial", record.key)
    assert not store.root.exists()


def test_prepare_makes_it_and_may_be_called_again(store: Store) -> None:
    store.prepare()
    store.prepare()
    assert {"tmp", "trials", "checkpoints"} <= {path.name for path in store.root.iterdir()}
    assert left_over(store) == []


def test_what_a_killed_process_left_is_removed_by_the_next_run(store: Store) -> None:
    store.prepare()
    made = "import sys; from orchestrator.store import scratch as s; from pathlib import Path;"
    made += "print(s.make(Path(sys.argv[1]), 'abcd').name)"
    said = subprocess.run(
        [sys.executable, "-c", made, str(store.root / "tmp")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    dead = store.root / "tmp" / said
    (dead / "renders").mkdir()
    elsewhere = dead.with_name(f"abcd.00000000-{said.rpartition('-')[2]}")
    elsewhere.mkdir()
    with store.writing("trial", "0123") as ours, store.scratch("tune") as scratch:
        store.prepare()
        assert not dead.exists()
        assert set(left_over(store)) == {ours, scratch, elsewhere}
    assert left_over(store) == [elsewhere]


WRITES: dict[str, Callable[[Store, Record], object]] = {
    "prepare": lambda store, _: store.prepare(),
    "writing": put,
    "write_failure": Store.write_failure,
    "running": lambda store, record: store.running(record.key),
    "keys": lambda store, _: store.keys("trial"),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_root_that_cannot_be_is_a_clear_error(
    tmp_path: Path, record: Record, write: Callable[[Store, Record], object]
) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="Not a directory") as caught:
        write(store, record)
    assert str(store.root) in str(caught.value)


def test_a_read_only_folder_is_a_clear_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    try:
        (folder / "probe").mkdir()
    except OSError:
        with pytest.raises(StoreError, match=r"Permission denied.*storage:"):
            Store(folder / "store").prepare()
    else:
        pytest.skip("this user may write anywhere (root), so no folder is read-only")


# --- entries -----------------------------------------------------------------------------------


def test_an_entry_appears_whole(store: Store, record: Record) -> None:
    with store.writing("trial", record.key) as folder:
        (folder / "model.safetensors").write_text("weights")
        store.write_record(folder, record)
        assert not store.has("trial", record.key)
        assert store.keys("trial") == set()
    assert store.has("trial", record.key)
    assert store.keys("trial") == {record.key}
    assert left_over(store) == []


def test_records_come_back_as_they_were(store: Store, record: Record) -> None:
    folder = put(store, record)
    hashes = {
        name: file_hash(folder / name) for name in ("model.safetensors", "renders/view_0.png")
    }
    assert store.read_record("trial", record.key) == replace(record, files=hashes)
    assert store.verified_file("trial", record.key, "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize("error", [ValueError("oops"), KeyboardInterrupt(), GeneratorExit()])
def test_an_error_inside_leaves_nothing(store: Store, record: Record, error: BaseException) -> None:
    def write() -> None:
        with store.writing("trial", record.key) as folder:
            (folder / "half").write_text("written")
            raise error

    with pytest.raises(type(error)):
        write()
    assert not store.has("trial", record.key)
    assert store.keys("trial") == set()
    assert left_over(store) == []


def test_a_full_disk_is_a_store_error(store: Store, record: Record) -> None:
    with (
        pytest.raises(StoreError, match=r"No space left.*free space"),
        store.writing("trial", record.key),
    ):
        raise OSError(28, "No space left on device")
    assert not store.has("trial", record.key)


def test_of_two_writers_of_one_key_the_first_to_finish_stays(store: Store, record: Record) -> None:
    with store.writing("trial", record.key) as slow:
        (slow / "model.safetensors").write_text("second")
        store.write_record(slow, record)
        put(store, record, "first")
    assert store.verified_file("trial", record.key, "model.safetensors").read_text() == "first"
    assert left_over(store) == []


def test_a_store_travels_to_workers(store: Store) -> None:
    assert pickle.loads(pickle.dumps(store)).root == store.root


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", "{}", '{"kind": "trial"}', "\udcff", '{"files": 3}']
)
def test_a_damaged_record_says_what_to_do(store: Store, record: Record, content: str) -> None:
    folder = put(store, record)
    (folder / RECORD).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreError, match=r"remove the folder .* and run") as caught:
        store.read_record("trial", record.key)
    assert str(folder / RECORD) in str(caught.value)


@pytest.mark.parametrize("field", ["views", "provenance", "widths", "metrics", "files", "failure"])
def test_a_record_with_a_field_of_another_kind_is_damaged(
    store: Store, record: Record, field: str
) -> None:
    folder = put(store, record)
    data = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**data, field: 7}))
    with pytest.raises(StoreError, match="damaged"):
        store.read_record("trial", record.key)


@pytest.mark.parametrize("how", ["changed", "missing", "unlisted"])
def test_a_file_that_is_not_what_was_written_is_refused(
    store: Store, record: Record, how: str
) -> None:
    folder = put(store, record)
    name = "model.safetensors"
    if how == "changed":
        (folder / name).write_text("weightz")
    elif how == "missing":
        (folder / name).unlink()
    else:
        name = "other"
        (folder / name).write_text("x")
    with pytest.raises(StoreError, match="remove the folder") as caught:
        store.verified_file("trial", record.key, name)
    assert str(folder / name) in str(caught.value)


# --- failures and text files ---------------------------------------------------------------------


def test_failures_are_kept_until_they_are_cleared(store: Store, record: Record) -> None:
    failed = replace(record, failure=Failure("prune", "why"), metrics={}, views=())
    store.write_failure(failed)
    assert store.read_failure(record.key) == failed
    assert store.keys("trial") == set()
    store.write_failure(replace(failed, failure=Failure("evaluate", "again")))
    assert store.read_failure(record.key).failure.stage == "evaluate"  # type: ignore[union-attr]
    store.clear_failure(record.key)
    store.clear_failure(record.key)
    assert store.read_failure(record.key) is None


def test_a_damaged_failure_is_no_failure(store: Store, record: Record) -> None:
    store.write_failure(replace(record, failure=Failure("prune", "why")))
    (store.root / "failures" / f"{record.key}.json").write_text("{")
    assert store.read_failure(record.key) is None


def test_a_text_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    atomic_write(path, "one")
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "\ud800")
    assert path.read_text() == "one"
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot write"):
        atomic_write(tmp_path / "folder", "two")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["deep", "file.json", "folder"]
