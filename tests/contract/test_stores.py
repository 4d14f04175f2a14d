"""What every place for results must do: the local disk, and a real S3-compatible server."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import StoreError
from orchestrator.results import Failure, Record
from orchestrator.store import Held, Lease, Store, leases, objects
from orchestrator.store.leases import Owner
from orchestrator.sweep import open_sweep
from tests.services import make_bucket, s3_server, speak_to
from tests.unit.record_builder import training_record, trial_record
from tests.unit.sweep_builder import mapping, text

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore")

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(params=["disk", "s3"])
def elsewhere(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Store]:
    """Opens the same storage, each time as another machine would see it."""
    if request.param == "disk":
        return lambda: Store(tmp_path / "store")
    endpoint = request.getfixturevalue("endpoint")
    speak_to(endpoint, monkeypatch)
    bucket = f"bucket-{os.urandom(6).hex()}"
    make_bucket(endpoint, bucket)
    machines = iter(range(100))

    def open_it() -> Store:
        monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path / f"machine-{next(machines)}"))
        return Store(f"s3://{bucket}/some/sweeps")

    return open_it


@pytest.fixture
def store(elsewhere: Callable[[], Store]) -> Store:
    return elsewhere()


@pytest.fixture
def record() -> Record:
    return trial_record(training_record(), 0.5)


def put(store: Store, record: Record, content: str = "weights") -> None:
    with store.writing(record.kind, record.key) as folder:
        (folder / "renders").mkdir()
        (folder / "renders" / "view_0.png").write_text("picture")
        (folder / MODEL).write_text(content)
        store.write_record(folder, record)


def damage(store: Store, how: Callable[[bytes], bytes]) -> None:
    """Change the stored bytes of the only model there is."""
    if store.address == str(store.root):
        (path,) = store.root.glob(f"trials/*/{MODEL}")
        path.write_bytes(how(path.read_bytes()))
        return
    s3, bucket = store._backend._s3, store._backend._bucket  # type: ignore[attr-defined]
    record = json.loads(store._backend.record("trial", next(iter(store.keys("trial")))))
    name = f"some/sweeps/blobs/{record['files'][MODEL]}"
    data = s3.get_object(Bucket=bucket, Key=name)["Body"].read()
    s3.put_object(Bucket=bucket, Key=name, Body=how(data))


# --- entries -----------------------------------------------------------------------------------


def test_what_one_machine_writes_another_reads(
    elsewhere: Callable[[], Store], record: Record
) -> None:
    put(elsewhere(), record)
    there = elsewhere()
    assert there.keys("trial") == {record.key}
    assert there.has("trial", record.key)
    assert replace(there.read_record("trial", record.key), files={}) == replace(record, files={})
    assert there.verified_file("trial", record.key, MODEL).read_text() == "weights"
    assert (there.folder("trial", record.key) / "renders" / "view_0.png").read_text() == "picture"
    assert there.read_records("trial", [record.key]) == [there.read_record("trial", record.key)]


def test_what_is_not_there_is_not_there(store: Store, record: Record) -> None:
    assert store.keys("trial") == set()
    assert not store.has("trial", record.key)
    assert not store.file("trial", record.key, MODEL).exists()
    assert not store.folder("trial", record.key).exists()
    assert store.read_failure(record.key) is None
    store.clear_failure(record.key)
    store.remove_running(record.key)
    with pytest.raises(StoreError, match="missing or damaged"):
        store.read_record("trial", record.key)
    with pytest.raises(StoreError, match="missing or damaged"):
        store.verified_file("trial", record.key, MODEL)


def test_an_entry_that_ends_in_an_error_is_absent(
    elsewhere: Callable[[], Store], record: Record
) -> None:
    store = elsewhere()

    def fail() -> None:
        with store.writing("trial", record.key) as folder:
            (folder / MODEL).write_text("half")
            raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        fail()
    assert elsewhere().keys("trial") == set()
    assert not elsewhere().has("trial", record.key)


def test_a_place_that_refuses_is_named_and_holds_nothing_half(
    elsewhere: Callable[[], Store], record: Record
) -> None:
    """The folder of trials is a file; the bucket is no more."""
    store = elsewhere()
    store.prepare()
    on_disk = store.address == str(store.root)
    if on_disk:
        shutil.rmtree(store.root / "trials", ignore_errors=True)
        (store.root / "trials").write_text("in the way")
    else:
        backend: Any = store._backend
        for entry in backend._s3.list_objects_v2(Bucket=backend._bucket).get("Contents", ()):
            backend._s3.delete_object(Bucket=backend._bucket, Key=entry["Key"])
        backend._s3.delete_bucket(Bucket=backend._bucket)
    with pytest.raises((StoreError, OSError)) as caught:
        put(store, record)
    assert store.address in str(caught.value)
    if on_disk:
        (store.root / "trials").unlink()
        (store.root / "trials").mkdir()
    else:
        backend._s3.create_bucket(Bucket=backend._bucket)
    assert not elsewhere().has("trial", record.key)
    put(store, record)
    assert elsewhere().verified_file("trial", record.key, MODEL).read_text() == "weights"


def test_of_two_writers_the_first_to_finish_stays(
    elsewhere: Callable[[], Store], record: Record
) -> None:
    slow, fast = elsewhere(), elsewhere()
    with slow.writing("trial", record.key) as folder:
        (folder / MODEL).write_text("second")
        slow.write_record(folder, record)
        put(fast, record, "first")
    for reader in (slow, fast, elsewhere()):
        assert reader.verified_file("trial", record.key, MODEL).read_text() == "first"


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-2],
    "bit-flipped": lambda data: bytes([data[0] ^ 4]) + data[1:],
    "empty": lambda _: b"",
}


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_noticed_and_can_be_repaired(
    elsewhere: Callable[[], Store], record: Record, how: Callable[[bytes], bytes]
) -> None:
    put(elsewhere(), record)
    damage(elsewhere(), how)
    with pytest.raises(StoreError, match=r"missing or damaged.*remove .* and run the"):
        elsewhere().verified_file("trial", record.key, MODEL)


def test_a_store_travels_to_workers(store: Store, record: Record) -> None:
    put(store, record)
    again = pickle.loads(pickle.dumps(store))
    assert again.address == store.address
    assert again.has("trial", record.key)


def test_prepare_may_be_called_again(store: Store) -> None:
    store.prepare()
    store.prepare()
    assert all(store.keys(kind) == set() for kind in ("checkpoint", "training", "trial"))


# --- the state of a training under way -----------------------------------------------------------


def test_another_machine_goes_on_with_a_training(elsewhere: Callable[[], Store]) -> None:
    first = elsewhere()
    (first.running("abc") / "state").write_text("at iteration 7")
    first.save_running("abc")
    second = elsewhere()
    assert (second.running("abc") / "state").read_text() == "at iteration 7"
    (second.running("abc") / "state").write_text("at iteration 9")
    second.save_running("abc")
    assert (first.running("abc") / "state").read_text() == "at iteration 9"
    first.remove_running("abc")
    assert list(elsewhere().running("abc").iterdir()) == []


# --- failures ------------------------------------------------------------------------------------


def test_a_state_that_could_not_be_sent_is_gone_on_with_here_unless_another_went_further(
    elsewhere: Callable[[], Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = elsewhere()
    if first.address == str(first.root):
        pytest.skip("on a disk nothing is sent")
    (first.running("abc") / "state").write_text("at iteration 7")
    first.save_running("abc")
    time.sleep(1.1)  # a bucket tells its times in seconds
    (first.running("abc") / "state").write_text("at iteration 9")
    with monkeypatch.context() as away:
        away.setattr(first._backend._s3, "upload_file", fail_to_connect)  # type: ignore[attr-defined]
        with pytest.raises(StoreError, match="cannot write to"):
            first.save_running("abc")
    assert (first.running("abc") / "state").read_text() == "at iteration 9"
    time.sleep(1.1)
    second = elsewhere()
    (second.running("abc") / "state").write_text("at iteration 11")
    second.save_running("abc")
    assert (first.running("abc") / "state").read_text() == "at iteration 11"


def fail_to_connect(*_: Any) -> None:
    from botocore.exceptions import EndpointConnectionError

    raise EndpointConnectionError(endpoint_url="http://nowhere")


def test_failures_are_kept_until_they_are_cleared(
    elsewhere: Callable[[], Store], record: Record
) -> None:
    failed = replace(record, failure=Failure("prune", "why"), metrics={}, views=())
    elsewhere().write_failure(failed)
    assert elsewhere().failed_keys() == {record.key}
    assert elsewhere().read_failure(record.key) == failed
    assert elsewhere().keys("trial") == set()
    elsewhere().clear_failure(record.key)
    assert elsewhere().failed_keys() == set()
    assert elsewhere().read_failure(record.key) is None


# --- leases --------------------------------------------------------------------------------------


def test_a_lease_is_held_by_one_and_then_free(elsewhere: Callable[[], Store]) -> None:
    lease = elsewhere().lease("training-abc", "training abc")
    assert isinstance(lease, Lease)
    with lease:
        other = elsewhere().lease("training-abc", "training abc")
        assert isinstance(other, Held)
        assert other.owner == lease.owner
        assert f"process {os.getpid()}" in str(other)
        assert elsewhere().lease_holder("training-abc") is not None
        another = elsewhere().lease("training-def", "training def")
        assert isinstance(another, Lease)
        another.release()
    assert elsewhere().lease_holder("training-abc") is None
    again = elsewhere().lease("training-abc", "training abc")
    assert isinstance(again, Lease)
    again.release()
    again.release()


def test_a_lease_is_renewed_while_its_owner_lives(elsewhere: Callable[[], Store]) -> None:
    lease = elsewhere().lease("x", "x", seconds=1.5)
    assert isinstance(lease, Lease)
    with lease:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert isinstance(elsewhere().lease("x", "x"), Held)
            time.sleep(0.2)
        assert not lease.lost


def foreign(seconds: float, **changes: object) -> bytes:
    """A lease of a process that this machine knows nothing of."""
    owner = replace(Owner.here("x", seconds), host="far", machine="another", **changes)  # type: ignore[arg-type]
    return json.dumps({"owner": asdict(owner), "beat": 0}).encode()


def test_a_lease_that_nobody_renews_lapses(store: Store) -> None:
    store._backend.write("leases/x.json", foreign(2.0))
    held = store.lease("x", "x")
    assert isinstance(held, Held)
    assert "on far" in str(held)
    time.sleep(held.left + 1.1)  # a server's clock may count whole seconds
    lease = store.lease("x", "x")
    assert isinstance(lease, Lease)
    lease.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"owner": {}}', b'{"owner": null}'])
def test_a_damaged_lease_is_nobodys(store: Store, content: bytes) -> None:
    store._backend.write("leases/x.json", content)
    lease = store.lease("x", "x")
    assert isinstance(lease, Lease)
    lease.release()


def test_who_loses_a_lease_learns_it_and_does_not_take_it_back(store: Store) -> None:
    lease = store.lease("x", "x", seconds=0.6)
    assert isinstance(lease, Lease)
    theirs = foreign(60.0)
    store._backend.write("leases/x.json", theirs)
    end = time.monotonic() + 10
    while not lease.lost and time.monotonic() < end:
        time.sleep(0.05)
    assert lease.lost
    lease.release()
    found = store._backend.read("leases/x.json")
    assert found is not None
    assert found.data == theirs


def _take_and_tell(store: Store, answer: "multiprocessing.SimpleQueue[int]") -> None:
    lease = store.lease("x", "x")
    answer.put(os.getpid() if isinstance(lease, Lease) else 0)
    time.sleep(60)


def test_of_many_processes_one_gets_the_lease_and_its_death_frees_it(store: Store) -> None:
    spawn = multiprocessing.get_context("spawn")
    answer = spawn.SimpleQueue()
    store.prepare()
    racers = [spawn.Process(target=_take_and_tell, args=(store, answer)) for _ in range(4)]
    for racer in racers:
        racer.start()
    try:
        winners = [pid for _ in racers if (pid := answer.get())]
        assert len(winners) == 1
        assert isinstance(store.lease("x", "x"), Held)
        os.kill(winners[0], signal.SIGKILL)
        time.sleep(0.2)
        lease = store.lease("x", "x")  # at once, though nobody gave it back
        assert isinstance(lease, Lease)
        lease.release()
    finally:
        for racer in racers:
            racer.kill()
            racer.join()


def test_a_process_number_used_again_is_another_process() -> None:
    here = Owner.here("x", 30.0)
    assert not here.gone
    assert replace(here, born=here.born - 60).gone
    assert not replace(here, machine="another", pid=2**22 - 1).gone


def test_compare_and_swap_lets_one_of_two_win(store: Store) -> None:
    backend = store._backend
    first = backend.swap("leases/y.json", b"1", None)
    assert first is not None
    assert backend.swap("leases/y.json", b"2", None) is None
    second = backend.swap("leases/y.json", b"2", first)
    assert second is not None
    assert backend.swap("leases/y.json", b"3", first) is None
    assert backend.swap("leases/y.json", None, first) is None
    found = backend.read("leases/y.json")
    assert found is not None
    assert (found.data, found.version) == (b"2", second)
    assert backend.swap("leases/y.json", None, second) is not None
    assert backend.read("leases/y.json") is None


def test_beats_are_well_within_a_lease() -> None:
    assert leases.BEATS >= 3


def test_a_bucket_that_never_says_anything_is_an_error_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes connections and is silent; whoever works already is more patient with it."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        speak_to(f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path))
        assert objects.GREETING_SECONDS * objects.GREETINGS < objects.READ_SECONDS
        monkeypatch.setattr(objects, "GREETING_SECONDS", 1)
        sweep = tmp_path / "sweep.yaml"
        sweep.write_text(text(mapping(storage="s3://a-bucket/sweeps")))
        with pytest.raises(StoreError, match="cannot reach the storage s3://a-bucket/sweeps: Re"):
            open_sweep(sweep)


def test_a_bucket_that_answers_no_is_reached(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with it is said by the first question that it does not answer."""
    speak_to(endpoint, monkeypatch)
    monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path))
    store = Store("s3://no-such-bucket-here/sweeps")
    store.reach()
    with pytest.raises(StoreError, match="NoSuchBucket"):
        store.prepare()


def test_greeting_a_bucket_and_working_with_it_share_a_session(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session reads what S3 is, and asks for credentials: where there is a role, over the net."""
    import boto3

    speak_to(endpoint, monkeypatch)
    monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path))
    make_bucket(endpoint, "one-session")
    sessions: list[Any] = []
    make = boto3.session.Session
    monkeypatch.setattr(boto3.session, "Session", lambda: sessions.append(make()) or sessions[-1])
    store = Store("s3://one-session/sweeps")
    store.reach()
    assert store.keys("trial") == set()
    assert len(sessions) == 1


def test_a_profile_that_does_not_exist_is_said(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    monkeypatch.setenv("PRUNEFIELD_CACHE", str(tmp_path))
    with pytest.raises(
        StoreError, match=r"cannot reach the storage s3://a-bucket/sweeps: .*nobody"
    ):
        Store("s3://a-bucket/sweeps").reach()
