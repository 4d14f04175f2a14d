"""Where results are kept: content-addressed entries, whole or absent.

::

    <root>/
      scenes/<fingerprint>/            scenes that prunefield makes itself (the demo)
      running/<key>/                   the state of a training or recovery under way
      checkpoints/<key>/               a trained model: model and optimiser state, record.json
      trainings/<key>/                 its evaluation, dense: renders/, record.json
      statistics/<key>/                calibration statistics of one model and calibration set
      trials/<key>/                    model.safetensors, renders/, record.json
      controls/<key>/                  the same, of what is trained beside for comparison
      failures/<key>.json              the last failure of a key that has no result
      leases/<name>.json               who is doing what at the moment
      searches/<study>.json            what a search tried and found, for the report
      studies.db                       the studies of searches, by default
      sweeps/<name>/                   the report of a sweep
      mlflow.db, mlartifacts/          the default tracking store

An entry is written in a folder of its own under ``tmp/`` and published whole, so nothing
half-written is ever taken for whole; what a killed process left there goes with the next run.
Its record lists the SHA-256 of every file beside it.

With an address ``s3://bucket/prefix`` the entries are in that bucket (see
`orchestrator.store.objects`), and the folder above is each machine's own copy of what it needed.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.results import Record
from orchestrator.store import leases, scratch
from orchestrator.store.backends import FOLDERS, RECORD, Backend, LocalBackend

CACHE_VARIABLE = "PRUNEFIELD_CACHE"
READERS = 16


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """The storage of one or many sweeps; a folder is made when something is written.

    Args:
        address: a folder, or ``s3://bucket/prefix``.

    Attributes:
        root: the folder, or this machine's own copy of what it needed from the bucket.
    """

    def __init__(self, address: Path | str) -> None:
        if is_bucket(address):
            from orchestrator.store.objects import ObjectBackend  # noqa: PLC0415  needs an extra

            self.address = str(address).rstrip("/")
            self.root = _copy_folder(self.address)
            self._backend: Backend = ObjectBackend(self.address, self.root)
        else:
            self.root = Path(address).expanduser().resolve()
            self.address = str(self.root)
            self._backend = LocalBackend(self.root)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Store, (self.address,))

    def reach(self) -> None:
        """Ask now whether the storage answers: a silent one would be waited for in each question.

        Raises:
            StoreError: it does not within about 20 seconds.
        """
        self._backend.reach()

    def prepare(self) -> None:
        """Make the folder now, to learn before any work whether it can be written.

        Raises:
            StoreError: it cannot.
        """
        self._backend.prepare()
        scratch.clear(self.root / "tmp")

    def identity(self) -> str:
        """What tells this storage from every other, wherever it is looked at from.

        Raises:
            StoreError: it cannot be read, or not be written the first time.
        """
        while (found := self._backend.read("identity")) is None:
            self._backend.swap("identity", secrets.token_hex(8).encode(), None)
        return re.sub(r"\W", "", found.data.decode(errors="replace"))[:64]

    # --- entries ---------------------------------------------------------------------------

    def folder(self, kind: str, key: str) -> Path:
        """Where all files of an entry are on this machine; no such folder if there is no entry.

        Raises:
            StoreError: they are elsewhere and cannot be fetched.
        """
        return self._backend.folder(kind, key)

    def file(self, kind: str, key: str, name: str) -> Path:
        """Where one file of an entry is on this machine; no such file if there is no entry.

        Raises:
            StoreError: it is elsewhere and cannot be fetched.
        """
        return self._backend.file(kind, key, name)

    def keys(self, kind: str) -> set[str]:
        """Keys of all whole entries of a kind, by one listing.

        Raises:
            StoreError: the storage cannot be read.
        """
        return self._backend.keys(kind)

    def has(self, kind: str, key: str) -> bool:
        """Whether a whole entry exists."""
        return self._backend.has(kind, key)

    @contextmanager
    def writing(self, kind: str, key: str) -> Iterator[Path]:
        """A temporary folder that becomes the entry when the block ends without an error.

        If another process finished the same entry first, that one stays.

        Raises:
            StoreError: the entry cannot be written.
        """
        temporary = None
        try:
            for folder in (self.root / "tmp", self.root / FOLDERS[kind]):
                folder.mkdir(parents=True, exist_ok=True)
            temporary = scratch.make(self.root / "tmp", key)
            yield temporary
            self._backend.publish(kind, key, temporary)
        except OSError as error:
            raise StoreError(
                f"cannot write {kind} {key} to {self.root}: {error.strerror or error}; "
                "free space or check the folder's permissions, then run again"
            ) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder for the time of a block, on the disk of the entries.

        Raises:
            StoreError: it cannot be made.
        """
        try:
            (self.root / "tmp").mkdir(parents=True, exist_ok=True)
            folder = scratch.make(self.root / "tmp", name)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.root}/tmp: {error.strerror or error}; free space or check "
                "the folder's permissions, then run again"
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    # --- the state of trainings under way ----------------------------------------------------

    def running(self, key: str) -> Path:
        """A folder for the state of a training under way; it outlives the process.

        What was saved there last, on whichever machine, is in it.
        """
        folder = self.root / "running" / key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {folder}: {error.strerror or error}") from error
        self._backend.restore_running(key)
        return folder

    def save_running(self, key: str) -> None:
        """Let other machines have the state that was just written into that folder."""
        self._backend.save_running(key)

    def remove_running(self, key: str) -> None:
        """Drop that state, once the training is whole."""
        shutil.rmtree(self.root / "running" / key, ignore_errors=True)
        self._backend.remove_running(key)

    # --- leases ------------------------------------------------------------------------------

    def lease(
        self, name: str, what: str, seconds: float = leases.LEASE_SECONDS
    ) -> leases.Lease | leases.Held:
        """Take a lease, or learn who holds it, see `orchestrator.store.leases`.

        Raises:
            StoreError: the storage cannot be read or written.
        """
        return leases.take(self._backend, f"leases/{name}.json", what, seconds)

    def lease_holder(self, name: str) -> leases.Held | None:
        """Who holds a lease now, if anybody does.

        Raises:
            StoreError: the storage cannot be read.
        """
        return leases.holder(self._backend, f"leases/{name}.json")

    # --- records ---------------------------------------------------------------------------

    def write_record(self, folder: Path, record: Record) -> None:
        """Write a record into a folder being written, with the hashes of the files there."""
        files = {
            str(path.relative_to(folder)): file_hash(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        data = {**record.to_json(), "files": files}
        (folder / RECORD).write_text(json.dumps(data, indent=1) + "\n")

    def read_record(self, kind: str, key: str) -> Record:
        """Read the record of an entry.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        try:
            return Record.from_json(json.loads(self._backend.record(kind, key)))
        except (OSError, ValueError, RecursionError) as error:
            place = f"{self._backend.where}/{FOLDERS[kind]}/{key}"
            raise StoreError(
                f"{place}/{RECORD} is missing or damaged ({error}); remove the folder {place} and "
                "run the sweep again to make it anew"
            ) from error

    def read_records(self, kind: str, keys: Iterable[str]) -> list[Record]:
        """Read many records, in the order of their keys.

        Raises:
            StoreError: one is missing or damaged.
        """
        wanted = list(keys)
        if self.address == str(self.root):
            return [self.read_record(kind, key) for key in wanted]
        with ThreadPoolExecutor(READERS) as pool:  # each read waits for a server
            return list(pool.map(lambda key: self.read_record(kind, key), wanted))

    def verified_file(self, kind: str, key: str, name: str) -> Path:
        """The path of a file of an entry, after checking its hash.

        Raises:
            StoreError: the file is missing or its bytes are not those that were written.
        """
        record = self.read_record(kind, key)
        path = self.file(kind, key, name)
        if name not in record.files or not path.is_file() or file_hash(path) != record.files[name]:
            raise StoreError(
                f"{path} is missing or damaged; remove the folder {path.parent} and run the "
                "sweep again to make it anew"
            )
        return path

    # --- notes -----------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> None:
        """Keep a text under a name such as ``searches/x.json``, whole or not at all.

        Raises:
            StoreError: it cannot be written.
        """
        self._backend.write(name, text.encode())

    def read_text(self, name: str) -> str | None:
        """The text under a name, or None.

        Raises:
            StoreError: it cannot be read.
        """
        found = self._backend.read(name)
        return None if found is None else found.data.decode()

    # --- failures --------------------------------------------------------------------------

    def write_failure(self, record: Record) -> None:
        """Keep the failure of a key until it succeeds."""
        data = json.dumps(record.to_json(), indent=1).encode()
        self._backend.write(f"failures/{record.key}.json", data)

    def failed_keys(self) -> set[str]:
        """Keys that have a failure, by one listing.

        Raises:
            StoreError: the storage cannot be read.
        """
        return {name.removesuffix(".json") for name in self._backend.names("failures")}

    def read_failure(self, key: str) -> Record | None:
        """The last failure of a key, if it has one."""
        try:
            found = self._backend.read(f"failures/{key}.json")
            return None if found is None else Record.from_json(json.loads(found.data))
        except (StoreError, ValueError):
            return None

    def clear_failure(self, key: str) -> None:
        """Forget the failure of a key that has succeeded."""
        self._backend.remove(f"failures/{key}.json")


def is_bucket(address: Path | str) -> bool:
    """Whether an address names a bucket, not a folder."""
    return isinstance(address, str) and address.startswith("s3://")


def _copy_folder(address: str) -> Path:
    """Where this machine keeps its own copy of what it needed from a bucket."""
    given = os.environ.get(CACHE_VARIABLE)
    base = Path(given) if given else Path("~/.cache/prunefield").expanduser()
    return base.resolve() / hashlib.sha256(address.encode()).hexdigest()[:16]
