"""Where results are kept: a folder of content-addressed entries, whole or absent.

::

    <root>/
      scenes/<fingerprint>/            scenes that prunefield makes itself (the demo)
      running/<key>/                   the state of a training under way
      checkpoints/<key>/               a trained model: model and optimiser state, record.json
      trainings/<key>/                 its evaluation, dense: renders/, record.json
      statistics/<key>/                calibration statistics of one model and calibration set
      trials/<key>/                    model.safetensors, renders/, record.json
      failures/<key>.json              the last failure of a key that has no result
      sweeps/<name>/                   the report of a sweep
      mlflow.db, mlartifacts/          the default tracking store

An entry is written in a folder of its own under ``tmp/`` and renamed into place, so nothing
half-written is ever taken for whole. Its record lists the SHA-256 of every file beside it.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.results import Record

RECORD = "record.json"
FOLDERS = {
    "checkpoint": "checkpoints",
    "training": "trainings",
    "statistics": "statistics",
    "trial": "trials",
}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Store:
    """The storage folder of one or many sweeps.

    Raises:
        StoreError: the folder cannot be made or written.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().resolve()
        self._probe()

    def _probe(self) -> None:
        try:
            for name in ("tmp", "running", "failures", "sweeps", *FOLDERS.values()):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root / "tmp"):
                pass
        except OSError as error:
            raise StoreError(
                f"cannot write to the storage folder {self.root}: {error.strerror or error}; "
                "give a writable folder as `storage:` in the sweep file"
            ) from error

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return (Store, (str(self.root),))

    # --- entries ---------------------------------------------------------------------------

    def folder(self, kind: str, key: str) -> Path:
        """Where the entry of a key is, or would be."""
        return self.root / FOLDERS[kind] / key

    def keys(self, kind: str) -> set[str]:
        """Keys of all whole entries of a kind, by one listing."""
        with os.scandir(self.root / FOLDERS[kind]) as entries:
            return {entry.name for entry in entries}

    def has(self, kind: str, key: str) -> bool:
        """Whether a whole entry exists."""
        return self.folder(kind, key).is_dir()

    @contextmanager
    def writing(self, kind: str, key: str) -> Iterator[Path]:
        """A temporary folder that becomes the entry when the block ends without an error.

        If another process finished the same entry first, that one stays.
        """
        temporary = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=self.root / "tmp"))
        try:
            yield temporary
            try:
                temporary.rename(self.folder(kind, key))
            except OSError:
                if not self.has(kind, key):
                    raise
        except OSError as error:
            raise StoreError(
                f"cannot write {kind} {key} to {self.root}: {error.strerror or error}; "
                "free space or check the folder's permissions, then run again"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def running(self, key: str) -> Path:
        """A folder for the state of a training under way; it outlives the process."""
        folder = self.root / "running" / key
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def remove_running(self, key: str) -> None:
        """Drop that state, once the training is whole."""
        shutil.rmtree(self.root / "running" / key, ignore_errors=True)

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
        path = self.folder(kind, key) / RECORD
        try:
            return Record.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is missing or damaged ({error}); remove the folder {path.parent} and run "
                "the sweep again to make it anew"
            ) from error

    def verified_file(self, kind: str, key: str, name: str) -> Path:
        """The path of a file of an entry, after checking its hash.

        Raises:
            StoreError: the file is missing or its bytes are not those that were written.
        """
        record = self.read_record(kind, key)
        path = self.folder(kind, key) / name
        if name not in record.files or not path.is_file() or file_hash(path) != record.files[name]:
            raise StoreError(
                f"{path} is missing or damaged; remove the folder {path.parent} and run the "
                "sweep again to make it anew"
            )
        return path

    # --- failures --------------------------------------------------------------------------

    def write_failure(self, record: Record) -> None:
        """Keep the failure of a key until it succeeds."""
        atomic_write(
            self.root / "failures" / f"{record.key}.json", json.dumps(record.to_json(), indent=1)
        )

    def read_failure(self, key: str) -> Record | None:
        """The last failure of a key, if it has one."""
        path = self.root / "failures" / f"{key}.json"
        try:
            return Record.from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def clear_failure(self, key: str) -> None:
        """Forget the failure of a key that has succeeded."""
        (self.root / "failures" / f"{key}.json").unlink(missing_ok=True)


def atomic_write(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror or error}") from error
