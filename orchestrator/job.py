"""The driver of a submitted sweep: ``python -m orchestrator.job``, in a Ray job, inside a bundle.

It runs what the bundle holds as `prunefield run` would, with the head's home folder as working
directory (a relative `storage` is found there again), copies what it prints to the sweep's run in
MLflow, and ends as after Ctrl-C when somebody asks for it there.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from orchestrator.auth import settle_here
from orchestrator.bundle import SWEEP
from orchestrator.cli import main as run_command
from orchestrator.errors import PrunefieldError
from orchestrator.provenance import bundle_info, code_folder

SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "PGPASSWORD",
    "RAY_AUTH_TOKEN",
)
MIN_SECRET = 6


def main() -> int:
    """Run the sweep of this bundle; gives its exit status."""
    if bundle_info() is None:
        print("prunefield: this is the driver of `prunefield submit`; run that", file=sys.stderr)
        return 2
    settle_here()
    os.chdir(Path.home())
    path = code_folder() / SWEEP
    with tempfile.TemporaryDirectory(prefix="prunefield-job-") as folder:
        log = Path(folder) / "log.txt"
        with copied_output(log), listening(path, log):
            return run_command(["run", str(path)])


@contextmanager
def listening(path: Path, log: Path) -> Iterator[None]:
    """Keep the sweep's run in MLflow informed, and do what is asked for there."""
    from orchestrator.sweep import open_sweep  # noqa: PLC0415  after the output is copied
    from orchestrator.tracking import tracking_uri  # noqa: PLC0415
    from orchestrator.tracking.control import Control, Job  # noqa: PLC0415

    try:
        sweep, store = open_sweep(path)
        uri = tracking_uri(sweep.tracking.uri, store)
    except PrunefieldError:
        yield  # the command says what is wrong
        return
    job = Job(os.environ.get("RAY_JOB_SUBMISSION_ID") or _job_id(), _cluster_name(sweep))
    with Control(uri, sweep.tracking.experiment, sweep.hash, job, log, _stop):
        yield


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _job_id() -> str:
    import json  # noqa: PLC0415

    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return str(config.get("metadata", {}).get("job_submission_id", ""))


def _cluster_name(sweep: Any) -> str:
    from orchestrator.spec import cluster_part  # noqa: PLC0415

    return str((cluster_part(sweep) or {}).get("cluster_name", ""))


# --- what is printed ---------------------------------------------------------------------------


class Copied:
    """A text stream whose lines also go to a file, without the secrets of the environment."""

    def __init__(self, stream: TextIO, copy: TextIO, secrets: list[str]) -> None:
        self._stream = stream
        self._copy = copy
        self._secrets = secrets

    def write(self, text: str) -> int:
        """Write to both."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        self._copy.write(text)
        self._copy.flush()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def copied_output(path: Path) -> Iterator[None]:
    """Copy what this process prints to a file for the time of a block."""
    values = (os.environ.get(name, "") for name in SECRET_VARIABLES)
    secrets = [value for value in values if len(value) >= MIN_SECRET]
    before = sys.stdout, sys.stderr
    with path.open("w") as copy:
        sys.stdout = Copied(before[0], copy, secrets)
        sys.stderr = Copied(before[1], copy, secrets)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


if __name__ == "__main__":
    sys.exit(main())
