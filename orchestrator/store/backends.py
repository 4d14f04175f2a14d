"""What a place for results must be able to do, and the local disk as one.

A place keeps two sorts of things:

========= ======================================================================================
entries   folders of files by kind and content key: published whole, never changed
documents small files by name: failures, leases; changed by compare-and-swap
========= ======================================================================================

`LocalBackend` keeps both under a folder (of one machine, or shared by several);
`orchestrator.store.objects` keeps both in an S3 bucket.
"""

import contextlib
import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.errors import StoreError

RECORD = "record.json"
FOLDERS = {
    "checkpoint": "checkpoints",
    "training": "trainings",
    "statistics": "statistics",
    "trial": "trials",
    "control": "controls",
}


@dataclass(frozen=True)
class Document:
    """A small file as it was read.

    Attributes:
        data: its bytes.
        version: changes with every write; what compare-and-swap compares.
        age: seconds since it was written, by the clock of the place that keeps it, so that the
            clocks of those who read it need not agree.
    """

    data: bytes
    version: str
    age: float


class Backend(Protocol):
    """A place for results; every method raises `StoreError` where the place cannot be used."""

    @property
    def where(self) -> str:
        """The place, for messages."""

    def reach(self) -> None:
        """Learn soon whether the place answers at all."""

    def prepare(self) -> None:
        """Learn before any work whether the place can be written."""

    def keys(self, kind: str) -> set[str]:
        """Keys of all whole entries of a kind."""

    def has(self, kind: str, key: str) -> bool:
        """Whether a whole entry exists."""

    def publish(self, kind: str, key: str, folder: Path) -> None:
        """Make a finished folder an entry, whole at once; of two, the first stays."""

    def record(self, kind: str, key: str) -> bytes:
        """The record of an entry, as bytes; OSError where there is none."""

    def file(self, kind: str, key: str, name: str) -> Path:
        """A file of an entry on this machine; the path need not exist if the entry does not."""

    def folder(self, kind: str, key: str) -> Path:
        """All files of an entry on this machine; the path need not exist if the entry does not."""

    def save_running(self, key: str) -> None:
        """Keep what is in the local folder of a training under way for whoever continues it."""

    def restore_running(self, key: str) -> None:
        """Bring that back into the local folder."""

    def remove_running(self, key: str) -> None:
        """Drop it."""

    def names(self, folder: str) -> set[str]:
        """Names of the documents of a folder."""

    def read(self, name: str) -> Document | None:
        """A document, or None."""

    def write(self, name: str, data: bytes) -> None:
        """Write a document, whole, whatever was there."""

    def swap(self, name: str, data: bytes | None, expected: str | None) -> str | None:
        """Write (or, with no data, remove) a document if it still has an expected version.

        Args:
            name: of the document.
            data: its new bytes; None removes it.
            expected: the version that it must have; None: there must be none.

        Returns:
            The new version ("" when removed), or None: somebody else was first.
        """

    def remove(self, name: str) -> None:
        """Remove a document, if it is there."""


class LocalBackend:
    """A folder, on a disk of this machine or shared by several.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def where(self) -> str:
        """The folder."""
        return str(self.root)

    def reach(self) -> None:
        """A disk answers."""

    def prepare(self) -> None:
        """Make the folder and write into it."""
        try:
            for name in ("tmp", "running", "failures", "leases", "sweeps", *FOLDERS.values()):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root / "tmp"):
                pass
        except OSError as error:
            raise StoreError(
                f"cannot write to the storage folder {self.root}: {error.strerror or error}; "
                "give a writable folder as `storage:` in the sweep file"
            ) from error

    # --- entries ---------------------------------------------------------------------------

    def keys(self, kind: str) -> set[str]:
        """Keys of all whole entries of a kind, by one listing."""
        return self._listing(FOLDERS[kind])

    def _listing(self, folder: str) -> set[str]:
        try:
            with os.scandir(self.root / folder) as entries:
                return {entry.name for entry in entries if not entry.name.startswith(".")}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StoreError(
                f"cannot read the storage folder {self.root}: {error.strerror or error}; "
                "give another folder as `storage:` in the sweep file"
            ) from error

    def has(self, kind: str, key: str) -> bool:
        """Whether a whole entry exists."""
        return self.folder(kind, key).is_dir()

    def publish(self, kind: str, key: str, folder: Path) -> None:
        """Rename a finished folder into its place."""
        try:
            folder.rename(self.folder(kind, key))
        except OSError:
            if not self.has(kind, key):
                raise

    def record(self, kind: str, key: str) -> bytes:
        """The record of an entry."""
        return self.file(kind, key, RECORD).read_bytes()

    def file(self, kind: str, key: str, name: str) -> Path:
        """Where a file of an entry is."""
        return self.root / FOLDERS[kind] / key / name

    def folder(self, kind: str, key: str) -> Path:
        """Where an entry is."""
        return self.root / FOLDERS[kind] / key

    # --- the state of trainings under way: the local folder is where it is kept -------------

    def save_running(self, key: str) -> None:
        """It is kept already."""

    def restore_running(self, key: str) -> None:
        """It is there already."""

    def remove_running(self, key: str) -> None:
        """The caller removes the local folder."""

    # --- documents -------------------------------------------------------------------------

    def names(self, folder: str) -> set[str]:
        """Names of the documents of a folder."""
        return self._listing(folder)

    def read(self, name: str) -> Document | None:
        """A document, or None."""
        path = self.root / name
        try:
            with path.open("rb") as stream:
                data, written = stream.read(), os.fstat(stream.fileno()).st_mtime
            return Document(data, _version(data), max(0.0, self._now() - written))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror or error}") from error

    def _now(self) -> float:
        """The time by the clock that stamps files here: a file server's, on a shared disk."""
        try:
            with tempfile.TemporaryFile(dir=self.root / "tmp") as probe:
                return os.fstat(probe.fileno()).st_mtime
        except OSError:
            return time.time()

    def write(self, name: str, data: bytes) -> None:
        """Write a document beside its place and rename it into it."""
        atomic_write(self.root / name, data)

    def swap(self, name: str, data: bytes | None, expected: str | None) -> str | None:
        """Compare and swap, under a lock of the operating system."""
        path = self.root / name
        with self._locked(path.parent):
            try:
                found: str | None = _version(path.read_bytes())
            except FileNotFoundError:
                found = None
            except OSError as error:
                raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
            if found != expected:
                return None
            if data is None:
                path.unlink(missing_ok=True)
                return ""
            atomic_write(path, data)
            return _version(data)

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StoreError(f"cannot write to {folder}: {error.strerror or error}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        except OSError as error:
            raise StoreError(f"cannot lock {folder}: {error.strerror or error}") from error
        finally:
            os.close(handle)  # gives the lock back

    def remove(self, name: str) -> None:
        """Remove a document, if it is there."""
        with contextlib.suppress(OSError):
            (self.root / name).unlink(missing_ok=True)


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
        temporary = None
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
