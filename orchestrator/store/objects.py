"""An S3 bucket as a place for results; any server that speaks S3 with conditional writes will do.

::

    s3://<bucket>/<prefix>/
      blobs/<sha256>                   the files of all entries, by their content
      trials/<key>.json                an entry: its record, and name → hash and size of its files
      checkpoints/… trainings/… statistics/…
      running/<key>/                   the state of a training under way
      failures/…  leases/…             documents

The blobs of an entry are put first and its manifest last, so an entry is whole or absent; the first
manifest stays. Every file is checked against its hash when it is fetched, and kept on the machine
that fetched it: workers need no disk in common.

Endpoint, region and credentials come from the environment as usual with S3 (``AWS_ENDPOINT_URL``,
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, …, or a profile or role); the sweep file holds
none of them, and every machine that works on a sweep needs its own.
"""

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.errors import StoreError
from orchestrator.store.backends import FOLDERS, RECORD, Document, atomic_write

CONNECT_SECONDS = 10
READ_SECONDS = 30
ATTEMPTS = 5
GREETING_SECONDS, GREETINGS = 10, 2
"""How long, and how often, `reach` waits."""
CONNECTIONS = 32
UNSENT = ".unsent"
# Answers to a conditional write that somebody else was faster with, and to a read of nothing.
BEATEN = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
ABSENT = {"NoSuchKey", "404", "NotFound"}
ADDRESS = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?")

_client_lock = threading.Lock()


class ObjectBackend:
    """A bucket.

    Args:
        address: ``s3://bucket/prefix``.
        root: this machine's own copy of what it needed.

    Raises:
        StoreError: that is no address of a bucket, or the package that speaks S3 is missing.
    """

    def __init__(self, address: str, root: Path) -> None:
        match = ADDRESS.fullmatch(address)
        if match is None:
            raise StoreError(
                f"{address!r} is not the address of a bucket; write s3://BUCKET or "
                "s3://BUCKET/PREFIX"
            )
        self.where = address
        self.root = root
        self._bucket = match["bucket"]
        self._prefix = f"{match['prefix'].strip('/')}/" if match["prefix"] else ""

    @cached_property
    def _s3(self) -> Any:
        return self._client(CONNECT_SECONDS, READ_SECONDS, ATTEMPTS)

    @cached_property
    def _session(self) -> Any:
        """What clients have in common: they know the service and the credentials through it."""
        try:
            import boto3  # noqa: PLC0415  an optional dependency
        except ImportError as error:
            raise StoreError(
                f"storage {self.where} needs the package boto3; install it: pip install "
                "'prunefield[s3]'"
            ) from error
        with self._speaking("reach"):
            return boto3.session.Session()

    def _client(self, connect: int, read: int, attempts: int) -> Any:
        with _client_lock:  # neither making a session nor using it is for two threads at once
            session = self._session
            from botocore.config import Config  # noqa: PLC0415  comes with it

            with self._speaking("reach"):
                return session.client(
                    "s3",
                    config=Config(
                        connect_timeout=connect,
                        read_timeout=read,
                        retries={"total_max_attempts": attempts, "mode": "standard"},
                        max_pool_connections=CONNECTIONS,
                    ),
                )

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """Errors of the server and of the way to it as ours."""
        from boto3.exceptions import Boto3Error  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415

        try:
            yield
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise StoreError(
                f"cannot {what} the storage {self.where}: {error}; check the bucket, "
                "AWS_ENDPOINT_URL and the credentials in the environment, then run again"
            ) from error

    def reach(self) -> None:
        """Ask for the bucket, less patiently than anything later does."""
        client = self._client(GREETING_SECONDS, GREETING_SECONDS, GREETINGS)
        from botocore.exceptions import ClientError  # noqa: PLC0415

        with self._speaking("reach"), suppress(ClientError):  # whatever it answers, it is there
            client.head_bucket(Bucket=self._bucket)

    def prepare(self) -> None:
        """Write and remove an object."""
        try:
            for name in ("tmp", "running", "sweeps"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"cannot write to {self.root}, this machine's copy of {self.where}: "
                f"{error.strerror or error}; set PRUNEFIELD_CACHE to a writable folder"
            ) from error
        name = f"probe-{secrets.token_hex(8)}"
        self.write(name, b"")
        self.remove(name)

    # --- entries ---------------------------------------------------------------------------

    def keys(self, kind: str) -> set[str]:
        """Keys of all whole entries of a kind: those that have a manifest."""
        return {name.removesuffix(".json") for name in self.names(FOLDERS[kind])}

    def has(self, kind: str, key: str) -> bool:
        """Whether there is a manifest."""
        return self._head(_manifest_name(kind, key)) is not None

    def publish(self, kind: str, key: str, folder: Path) -> None:
        """Put the files, then the manifest unless there is one; keep the files here too."""
        files = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        with ThreadPoolExecutor(8) as pool:
            blobs = dict(zip(files, pool.map(self._put_blob, files.values()), strict=True))
        record = files[RECORD].read_text() if RECORD in files else None
        manifest = json.dumps({"record": record, "files": blobs}, indent=1).encode()
        if self.swap(_manifest_name(kind, key), manifest, None) is None:
            return  # another was first: its files are the entry's
        atomic_write(self._manifest_copy(kind, key), manifest)
        with suppress(OSError):
            folder.rename(self.root / FOLDERS[kind] / key)

    def _put_blob(self, path: Path) -> dict[str, Any]:
        """Put a file by its content; also if it is there, since it may be damaged there."""
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        with self._speaking("write to"):
            self._s3.upload_file(str(path), self._bucket, f"{self._prefix}blobs/{digest}")
        return {"sha256": digest, "size": path.stat().st_size}

    def _manifest_copy(self, kind: str, key: str) -> Path:
        return self.root / "manifests" / FOLDERS[kind] / f"{key}.json"

    def _manifest(self, kind: str, key: str) -> Mapping[str, Any] | None:
        """The manifest of an entry: entries never change, so a copy will do."""
        copy = self._manifest_copy(kind, key)
        with suppress(OSError, ValueError):
            return _checked(json.loads(copy.read_bytes()))
        found = self.read(_manifest_name(kind, key))
        if found is None:
            return None
        try:
            manifest = _checked(json.loads(found.data))
        except ValueError as error:
            raise StoreError(
                f"{self.where}/{_manifest_name(kind, key)} is damaged ({error}); remove it and run "
                "the sweep again to make it anew"
            ) from error
        atomic_write(copy, found.data)
        return manifest

    def record(self, kind: str, key: str) -> bytes:
        """The record of an entry: part of its manifest."""
        manifest = self._manifest(kind, key)
        if manifest is None or not isinstance(manifest.get("record"), str):
            raise FileNotFoundError(f"{self.where} has none")
        return str(manifest["record"]).encode()

    def file(self, kind: str, key: str, name: str) -> Path:
        """A file of an entry, fetched unless it was before."""
        path = self.root / FOLDERS[kind] / key / name
        if not path.is_file():
            manifest = self._manifest(kind, key)
            if manifest is not None and name in manifest["files"]:
                self._fetch(manifest["files"][name]["sha256"], path, _manifest_name(kind, key))
        return path

    def folder(self, kind: str, key: str) -> Path:
        """All files of an entry, fetched unless they were before."""
        folder = self.root / FOLDERS[kind] / key
        manifest = self._manifest(kind, key)
        missing = [n for n in (manifest or {"files": ()})["files"] if not (folder / n).is_file()]
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda name: self.file(kind, key, name), missing):
                pass
        return folder

    def _fetch(self, digest: str, path: Path, manifest: str) -> None:
        """Bring a blob here, whole and as it was written, or not at all."""

        def check(temporary: Path) -> str | None:
            with temporary.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
            return None if found == digest else "its contents do not match their hash"

        problem = self._download(f"blobs/{digest}", path, check)
        if problem is not None:
            raise StoreError(
                f"{self.where}/blobs/{digest} is missing or damaged ({problem}); remove "
                f"{self.where}/{manifest} and run the sweep again to make {path.name} anew"
            )

    def _download(
        self, name: str, path: Path, check: Callable[[Path], str | None] = lambda _: None
    ) -> str | None:
        """Fetch an object; gives what is wrong with it, None if nothing is."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        problem: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):  # a transfer may go wrong once
                try:
                    with self._speaking("read"):
                        self._s3.download_file(self._bucket, self._prefix + name, str(temporary))
                except StoreError as error:
                    if _code(error.__cause__) not in ABSENT:
                        raise
                    problem = "it is missing"
                    continue
                problem = check(temporary)
                if problem is None:
                    temporary.replace(path)
                    break
        except OSError as error:
            raise StoreError(
                f"cannot keep {self.where}/{name} in {path.parent}: {error.strerror or error}; "
                "free space or set PRUNEFIELD_CACHE to another folder"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        return problem

    # --- the state of trainings under way -----------------------------------------------------

    def save_running(self, key: str) -> None:
        """Put the files of the local folder; while that is not done, a mark is in it."""
        mark = self.root / "running" / key / UNSENT
        mark.touch()
        for path in sorted(mark.parent.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                with self._speaking("write to"):
                    self._s3.upload_file(
                        str(path), self._bucket, f"{self._prefix}running/{key}/{path.name}"
                    )
        mark.unlink(missing_ok=True)

    def restore_running(self, key: str) -> None:
        """Fetch them, unless this machine has newer ones that it could not put.

        The files know themselves whether they are damaged.
        """
        folder = self.root / "running" / key
        found = self._listed(f"running/{key}")
        if (folder / UNSENT).exists():
            here = [path.stat().st_mtime for path in folder.iterdir() if path.name != UNSENT]
            if here and all(max(here) > there.timestamp() for there in found.values()):
                return
        for name in found:
            if "/" not in name:
                self._download(f"running/{key}/{name}", folder / name)
        (folder / UNSENT).unlink(missing_ok=True)

    def remove_running(self, key: str) -> None:
        """Remove them."""
        for name in self.names(f"running/{key}"):
            self.remove(f"running/{key}/{name}")

    # --- documents -------------------------------------------------------------------------

    def names(self, folder: str) -> set[str]:
        """Names of the objects under a folder."""
        return set(self._listed(folder))

    def _listed(self, folder: str) -> dict[str, datetime]:
        """The objects under a folder, and when each was put."""
        start = f"{self._prefix}{folder}/"
        with self._speaking("read"):
            pages = self._s3.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=start
            )
            return {
                found["Key"].removeprefix(start): found["LastModified"]
                for page in pages
                for found in page.get("Contents", ())
            }

    def _head(self, name: str) -> Mapping[str, Any] | None:
        try:
            with self._speaking("read"):
                return self._s3.head_object(Bucket=self._bucket, Key=self._prefix + name)
        except StoreError as error:
            if _code(error.__cause__) in ABSENT:
                return None
            raise

    def read(self, name: str) -> Document | None:
        """An object; its age is by the server's clock."""
        try:
            with self._speaking("read"):
                answer = self._s3.get_object(Bucket=self._bucket, Key=self._prefix + name)
                data = answer["Body"].read()
        except StoreError as error:
            if _code(error.__cause__) in ABSENT:
                return None
            raise
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        age = max(0.0, (now - answer["LastModified"]).total_seconds())
        return Document(data, answer["ETag"], age)

    def write(self, name: str, data: bytes) -> None:
        """Put an object."""
        with self._speaking("write to"):
            self._s3.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def swap(self, name: str, data: bytes | None, expected: str | None) -> str | None:
        """Put an object on the server's condition that it has a version, or is not there."""
        where = {"Bucket": self._bucket, "Key": self._prefix + name}
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            with self._speaking("write to"):
                if data is None:
                    self._s3.delete_object(**where, **condition)
                    return ""
                return str(self._s3.put_object(**where, **condition, Body=data)["ETag"])
        except StoreError as error:
            if _code(error.__cause__) in BEATEN | ABSENT:
                return None
            raise

    def remove(self, name: str) -> None:
        """Remove an object, if it is there."""
        with suppress(StoreError), self._speaking("write to"):
            self._s3.delete_object(Bucket=self._bucket, Key=self._prefix + name)


def _manifest_name(kind: str, key: str) -> str:
    return f"{FOLDERS[kind]}/{key}.json"


def _code(error: BaseException | None) -> str:
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _checked(data: Any) -> Mapping[str, Any]:
    """A manifest whose files have plain names: what a bucket says must not leave the folder.

    Raises:
        ValueError: it is none.
    """
    files = data.get("files") if isinstance(data, dict) else None
    if not isinstance(files, dict):
        raise ValueError("not a manifest")
    for name, blob in files.items():
        path = PurePosixPath(name)
        plain = path.parts and not path.is_absolute() and not {"..", "\0"} & {*path.parts, *name}
        digest = blob.get("sha256") if isinstance(blob, dict) else None
        if not plain or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"not a manifest: file {name!r}")
    return data
