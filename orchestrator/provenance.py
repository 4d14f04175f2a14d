"""Where a result comes from: commit, hardware, versions."""

import json
import os
import platform
import socket
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nerf.devices import describe_device
from orchestrator.results import Provenance

COMMIT_VARIABLE = "PRUNEFIELD_COMMIT"
BUNDLE = "bundle.json"


@dataclass(frozen=True)
class Origin:
    """What a driver knows about the code it runs, handed to its workers.

    Attributes:
        commit: git commit, "+dirty" behind it when tracked files had changed; None outside git.
        versions: of the packages that decide numbers.
    """

    commit: str | None
    versions: dict[str, str]

    @classmethod
    def here(cls) -> "Origin":
        """The origin of this very code."""
        return cls(git_commit(Path(__file__).resolve().parent), versions())

    def provenance(self, device: torch.device, seconds: dict[str, float]) -> Provenance:
        """The provenance of a result made now, on a device of this machine."""
        return Provenance(
            commit=self.commit,
            hardware=describe_device(device),
            host=socket.gethostname(),
            versions=self.versions,
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds={stage: round(value, 6) for stage, value in seconds.items()},
        )


def versions() -> dict[str, str]:
    """Versions of Python, PyTorch and prunefield."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "prunefield": package_version(),
    }


def package_version() -> str:
    """The installed version of prunefield."""
    try:
        return metadata.version("prunefield")
    except metadata.PackageNotFoundError:
        return "uninstalled"


def code_folder() -> Path:
    """The folder that holds our packages."""
    return Path(__file__).resolve().parents[1]


def bundle_info() -> dict[str, Any] | None:
    """What `orchestrator.bundle` wrote beside this code when it was shipped; None if it was not."""
    try:
        return dict(json.loads((code_folder() / BUNDLE).read_text()))
    except (OSError, ValueError):
        return None


def git_commit(folder: Path) -> str | None:
    """The commit checked out around a folder, or None.

    Where the code was shipped to a cluster, its bundle knows it; where it was copied without its
    repository otherwise (an image), ``PRUNEFIELD_COMMIT`` may name it.
    """
    bundle = bundle_info()
    if bundle is not None:
        return bundle.get("commit")

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    if commit is None:
        return os.environ.get(COMMIT_VARIABLE)
    return commit + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
