"""Sweeps as Ray jobs: the driver runs on the cluster's head and outlives whoever submitted it."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from orchestrator.bundle import Bundle
from orchestrator.errors import ClusterError

POLL_SECONDS = 1.0
STOP_SECONDS = 60
"""How long a job that is to stop may take to save what it has; Ray itself would kill it after 3."""
Problems = (
    RuntimeError,
    ConnectionError,
    ValueError,
    AuthenticationError,
    requests.RequestException,
)


class Jobs:
    """The jobs of one cluster.

    Args:
        address: ``http://HOST:PORT`` of its dashboard; `orchestrator.auth.settle` comes first.

    Raises:
        ClusterError: it does not take jobs from here.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
            logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of each connection
        except Problems as error:
            raise ClusterError(_said(f"{address} takes no jobs", error)) from error

    def submit(self, bundle: Bundle, python: str = "python") -> str:
        """Ship a bundle and start its sweep; gives the job's id.

        Args:
            bundle: what to run.
            python: the interpreter there, quoted for a shell.

        Raises:
            ClusterError: the cluster refused.
        """
        job = f"prunefield-{bundle.name}-{bundle.hash[:8]}-{secrets.token_hex(3)}"
        try:
            return str(
                self._client.submit_job(
                    # Nothing of the sweep is in the command: it is all in the bundle.
                    entrypoint=f"{python} -m orchestrator.job",
                    submission_id=job,
                    runtime_env={
                        "working_dir": str(bundle.folder),
                        "env_vars": {
                            "PYTHONUNBUFFERED": "1",
                            "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
                        },
                    },
                    metadata={"sweep": bundle.name, "sweep_hash": bundle.hash},
                )
            )
        except Problems as error:
            what = "the cluster refused the job"
            if "No available agent" in str(error):
                what += (
                    " (its head has no agent for jobs: if Ray has only just started, try again; if "
                    "another Ray runs on that machine, it has port 52365: start the head with "
                    "another --dashboard-agent-listen-port)"
                )
            raise ClusterError(_said(what, error)) from error

    def follow(self, job: str, show: Callable[[str], None]) -> int:
        """Show a job's output until it ends.

        Returns:
            Its exit status; 130 if it was stopped.

        Raises:
            ClusterError: the job is unknown, or the cluster is gone.
        """
        shown = 0
        while not (info := self._info(job)).status.is_terminal():
            with suppress(Exception):  # the stream breaks when it likes; it is taken up again
                shown += asyncio.run(self._stream(job, show, shown))
            time.sleep(POLL_SECONDS)
        show(self.logs(job)[shown:])
        if info.status == JobStatus.SUCCEEDED:
            return 0
        if info.status == JobStatus.STOPPED:
            return 130
        if info.driver_exit_code is None or not 0 < info.driver_exit_code < 256:
            show(f"prunefield: the job failed: {info.message}\n")
            return 1
        return int(info.driver_exit_code)

    async def _stream(self, job: str, show: Callable[[str], None], skip: int) -> int:
        """Show the log from a character on; gives how many characters were new."""
        new = 0
        # The stream begins anew at the first character.
        async for text in self._client.tail_job_logs(job):
            part = text[skip:]
            skip -= len(text) - len(part)
            new += len(part)
            if part:
                show(part)
        return new

    def state(self, job: str) -> str | None:
        """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; None if the cluster does not know it."""
        try:
            return str(self._client.get_job_status(job).value)
        except Problems:
            return None

    def logs(self, job: str) -> str:
        """All that a job has printed.

        Raises:
            ClusterError: the job is unknown, or the cluster is gone.
        """
        try:
            return str(self._client.get_job_logs(job))
        except Problems as error:
            raise ClusterError(_said(f"no log of job {job}", error)) from error

    def stop(self, job: str) -> None:
        """End a job: SIGTERM, which the driver takes as Ctrl-C, then SIGKILL.

        Raises:
            ClusterError: the job is unknown, or the cluster is gone.
        """
        try:
            self._client.stop_job(job)
        except Problems as error:
            raise ClusterError(_said(f"job {job} cannot be stopped", error)) from error

    def _info(self, job: str) -> Any:
        try:
            return self._client.get_job_info(job)
        except Problems as error:
            raise ClusterError(_said(f"job {job} is not to be seen", error)) from error


def _said(what: str, error: Exception) -> str:
    return f"{what}: {' '.join(str(error).split())[:500]}"
