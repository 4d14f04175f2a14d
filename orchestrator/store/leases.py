"""Leases: one of several processes does a thing, and if it dies another may take over.

A lease is a document that its owner writes anew now and then. Whoever finds it says who holds it
and since when. It may be taken over once it has not been renewed for its time, or at once when it
was taken on this very machine by a process that is no more. Every change is a compare-and-swap, so
two can never hold one lease; ages are read by the clock of the store, so clocks need not agree.
"""

import getpass
import json
import os
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from orchestrator.errors import StoreError
from orchestrator.log import logger
from orchestrator.store.backends import Backend, Document

LEASE_SECONDS = 30.0
BEATS = 3  # so often is a lease renewed in its time


@dataclass(frozen=True)
class Owner:
    """Who holds a lease.

    Attributes:
        what: what it is held for, in a few words.
        user: who started the process.
        host: where it runs.
        machine: the machine's boot and process namespace; equal where process numbers compare.
        pid: number of the process.
        born: when that process started, in seconds since 1970; a number used again differs here.
        since: UTC time when the lease was taken, ISO 8601.
        seconds: how long the lease holds without being renewed.
        nonce: makes every lease different.
    """

    what: str
    user: str
    host: str
    machine: str
    pid: int
    born: float
    since: str
    seconds: float
    nonce: str

    @classmethod
    def here(cls, what: str, seconds: float) -> "Owner":
        """This process."""
        pid = os.getpid()
        return cls(
            what=what,
            user=_user(),
            host=socket.gethostname(),
            machine=machine(),
            pid=pid,
            born=psutil.Process(pid).create_time(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            nonce=secrets.token_hex(8),
        )

    @property
    def gone(self) -> bool:
        """Whether it is known to be dead: a process of this machine that is no more."""
        if self.machine != machine():
            return False
        try:
            process = psutil.Process(self.pid)
            another = abs(process.create_time() - self.born) > 1.0
            return another or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"{self.user} on {self.host} (process {self.pid}) since {self.since}"


@dataclass(frozen=True)
class Held:
    """Somebody else holds a lease.

    Attributes:
        owner: who.
        age: seconds since the last renewal.
    """

    owner: Owner
    age: float

    @property
    def left(self) -> float:
        """Seconds until it may be taken over, unless it is renewed."""
        return max(0.0, self.owner.seconds - self.age)

    def __str__(self) -> str:
        return f"{self.owner}; last sign of life {self.age:.0f} s ago"


class Lease:
    """A lease that this process holds; a context manager that renews it and gives it back.

    Attributes:
        name: of its document.
        owner: this process.
    """

    def __init__(self, backend: Backend, name: str, owner: Owner, version: str) -> None:
        self.name = name
        self.owner = owner
        self._backend = backend
        self._version = version
        self._beat = 0
        self._ended = threading.Event()
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether it could not be renewed in time, so that somebody else may hold it now."""
        return self._lost.is_set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give it back; once is enough."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        if not self.lost:
            with suppress(StoreError):  # it lapses by itself
                self._backend.swap(self.name, None, self._version)

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(self.owner.seconds / BEATS):
            self._beat += 1
            try:
                version = self._backend.swap(
                    self.name, _text(self.owner, self._beat), self._version
                )
            except StoreError as error:
                logger.debug("lease %s could not be renewed: %s", self.name, error)
                if not self.lost and time.monotonic() - renewed > self.owner.seconds:
                    self._lose("the storage does not answer")
                continue
            if version is None:
                self._lose("another process took it over")
                return
            # Had anybody else held it meanwhile, it would not have been as it was left.
            self._lost.clear()
            self._version, renewed = version, time.monotonic()

    def _lose(self, why: str) -> None:
        self._lost.set()
        logger.warning("the lease %s was lost: %s", self.name, why)


def take(backend: Backend, name: str, what: str, seconds: float = LEASE_SECONDS) -> Lease | Held:
    """Take a lease if it is free, lapsed, or of a process that is no more.

    Args:
        backend: the place that keeps it.
        name: of its document.
        what: what it is for, for whoever finds it taken.
        seconds: how long it holds without being renewed.

    Returns:
        The lease, or who holds it.

    Raises:
        StoreError: the place cannot be read or written.
    """
    while True:
        found = backend.read(name)
        holder = None if found is None else _holder(found)
        if holder is not None and holder.left > 0 and not holder.owner.gone:
            return holder
        owner = Owner.here(what, seconds)
        version = backend.swap(name, _text(owner, 0), found.version if found else None)
        if version is not None:
            return Lease(backend, name, owner, version)


def holder(backend: Backend, name: str) -> Held | None:
    """Who holds a lease now, if anybody does.

    Raises:
        StoreError: the place cannot be read.
    """
    found = backend.read(name)
    held = None if found is None else _holder(found)
    return held if held is not None and held.left > 0 and not held.owner.gone else None


def _holder(found: Document) -> Held | None:
    """Who a document names; None if it is damaged, so that it may be replaced."""
    try:
        owner = Owner(**json.loads(found.data)["owner"])
        return Held(replace(owner, born=float(owner.born), seconds=float(owner.seconds)), found.age)
    except (ValueError, TypeError, KeyError):
        return None


def _text(owner: Owner, beat: int) -> bytes:
    return json.dumps({"owner": asdict(owner), "beat": beat}, indent=1).encode()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@cache
def machine() -> str:
    """This boot of this machine, and the namespace of its process numbers."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(Path("/proc/self/ns/pid").readlink()),
    ):
        with suppress(OSError):
            parts.append(read())
    return " ".join(parts)
