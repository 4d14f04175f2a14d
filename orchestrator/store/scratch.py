"""Folders for what is being written: the name of each tells who made it.

A process that is killed leaves its folders behind. The next run of a sweep on the same machine
removes those whose process is no more; those of other machines, which it cannot know of, it leaves.
"""

import hashlib
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil

from orchestrator.store.leases import machine

NAME = re.compile(r"[^.]+\.(?P<machine>[0-9a-f]{8})-(?P<pid>[0-9]{1,9})\.[^.]+")


def make(parent: Path, name: str) -> Path:
    """A new folder in a folder that is there, which this process has to remove."""
    return Path(tempfile.mkdtemp(prefix=f"{name}.{_here()}-{os.getpid()}.", dir=parent))


def clear(parent: Path) -> int:
    """Remove what dead processes of this machine left behind; gives how many folders."""
    removed = 0
    with suppress(OSError):
        for folder in list(parent.iterdir()):
            found = NAME.fullmatch(folder.name)
            if found and found["machine"] == _here() and _is_dead(int(found["pid"])):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed


def _here() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def _is_dead(pid: int) -> bool:
    """Whether no process has this number; another one that took it over keeps the folder."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False
