"""Real servers for tests, each on a free port of 127.0.0.1: S3 (moto) and PostgreSQL."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

START_SECONDS = 60.0
KEYS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret-key",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(process: psutil.Process) -> dict[str, str]:
    """A process's environment; of one with a title what that leaves: it is written over the start.

    Ray's agents have titles. What psutil says of such a process is that it has no environment.

    Raises:
        OSError: the process is gone, or another user's.
    """
    entries = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
    pairs = (entry.decode(errors="replace").partition("=") for entry in entries)
    return {name: value for name, equals, value in pairs if equals}


def wait_for(port: int, process: subprocess.Popen | None = None) -> None:
    """Until something listens."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the server ended at once, with status {process.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens on port {port} after {START_SECONDS} s")


@contextlib.contextmanager
def s3_server(port: int | None = None) -> Iterator[str]:
    """An S3-compatible server; gives its address."""
    port = port or free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **KEYS},
    )
    try:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def speak_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let S3 be the server at this address, from now on in this test."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)


def make_bucket(endpoint: str, name: str) -> None:
    import boto3

    boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        region_name=KEYS["AWS_DEFAULT_REGION"],
    ).create_bucket(Bucket=name)


class Postgres:
    """A PostgreSQL server of its own, in a temporary folder, as a user that is not root.

    Attributes:
        uri: SQLAlchemy address, without the password.
        password: what PGPASSWORD must hold.
    """

    password = "s3cr3t-of-the-test"

    def __init__(self, folder: Path, tools: Path) -> None:
        self.folder = folder
        self.tools = tools
        self.port = free_port()
        self.user = "postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name
        self._data = ("-D", str(folder / "data"))
        (folder / "password").write_text(self.password)
        if os.getuid() == 0:
            shutil.chown(folder, self.user)
            shutil.chown(folder / "password", self.user)
        self._run(
            "initdb",
            *(*self._data, "-U", "prunefield", "-A", "scram-sha-256"),
            *("--pwfile", str(folder / "password"), "-E", "UTF8", "--no-sync"),
        )
        self.start()
        self._run("createdb", *self.where, "runs")

    @property
    def where(self) -> list[str]:
        """Arguments of PostgreSQL's own programs."""
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prunefield"]

    @property
    def uri(self) -> str:
        return f"postgresql+psycopg://prunefield@127.0.0.1:{self.port}/runs"

    def start(self) -> None:
        settings = f"-p {self.port} -h 127.0.0.1 -k {self.folder} -c fsync=off"
        log = str(self.folder / "log")
        self._run("pg_ctl", *self._data, "-w", "-l", log, "-o", settings, "start")

    def stop(self) -> None:
        self._run("pg_ctl", *self._data, "-m", "immediate", "-w", "stop")

    @contextlib.contextmanager
    def silent(self, *, sessions_only: bool = False) -> Iterator[None]:
        """For a while it takes connections and says nothing; or only those that it has are mute."""
        first = psutil.Process(int((self.folder / "data/postmaster.pid").read_text().split()[0]))
        stopped = [first, *first.children()]
        if sessions_only:  # what a session calls itself: `postgres: USER DATABASE HOST(PORT) …`
            stopped = [p for p in stopped if " runs 127.0.0.1(" in " ".join(p.cmdline())]
        for process in stopped:
            process.suspend()
        try:
            yield
        finally:
            for process in reversed(stopped):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()

    def _run(self, tool: str, *arguments: str) -> None:
        with (self.folder / "said").open("ab") as said:  # not a pipe: the server would keep it open
            done = subprocess.run(
                [str(self.tools / tool), *arguments],
                user=self.user if os.getuid() == 0 else None,
                cwd=self.folder,
                env={**os.environ, "PGPASSWORD": self.password, "HOME": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{tool}: {(self.folder / 'said').read_text()[-2000:]}")


def postgres_tools() -> Path | None:
    """The folder of PostgreSQL's programs, version 15 or later; installed if it can be."""
    for attempt in range(2):
        found = sorted(
            Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3])
        )
        if found and int(found[-1].parts[-3]) >= 15:
            return found[-1].parent
        if initdb := shutil.which("initdb"):
            return Path(initdb).parent
        if attempt == 0 and os.getuid() == 0 and shutil.which("apt-get"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    ["apt-get", "install", "-y", "-q", "--no-install-recommends", "postgresql"],
                    env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=180,
                    check=False,
                )
    return None


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; the test is skipped where there is none and none can be installed."""
    tools = postgres_tools()
    if tools is None:
        pytest.skip("needs PostgreSQL 15 or later, which is not installed and could not be")
    # Not under pytest's folder, which only its own user may enter.
    folder = Path(tempfile.mkdtemp(prefix="pg."))
    server = None
    try:
        server = Postgres(folder, tools)
        yield server
    finally:
        if server is not None:
            with contextlib.suppress(RuntimeError):
                server.stop()
        shutil.rmtree(folder, ignore_errors=True)
