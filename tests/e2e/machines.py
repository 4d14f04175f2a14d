"""Ray on several "machines" of this one, started by command as one would by hand.

Each has a name, an address on loopback, and disks of its own where others have their home and
temporary folders: what one of them writes there, no other sees. Ends of processes are not seen
across them either: their leases lapse as those of real machines do.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.services import environment_of, free_port

TREE = Path(__file__).parents[2]
MARK = "PRUNEFIELD_TEST_MACHINE"
START_SECONDS = 120.0
END_SECONDS = 10.0
# A node that is gone is known to be so after seconds, not after a minute.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_failure_threshold": 3}
HEAD = "127.0.0.9"  # not 127.0.0.1, for which Ray puts in an address that others reach
ENTER = ("unshare", "--mount", "--uts", "--propagation", "private")
# $1 name, $2 folder of the test; then the command.
INSIDE = (
    'hostname "$1"; mount -t tmpfs tmpfs "$2"; case "$2" in /tmp/*) mount -t tmpfs tmpfs /tmp;; '
    'esac; mkdir -p /tmp/home; shift 2; exec "$@"'
)


def needed() -> None:
    """Skip where machines cannot be told apart."""
    if not shutil.which("unshare"):
        pytest.skip("needs unshare, of util-linux")
    probe = [*ENTER, "bash", "-c", "mount -t tmpfs tmpfs /mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("may not make namespaces here: run it as root")


class Machines:
    """A head without CPUs in the machine's own namespaces, and nodes in theirs.

    Args:
        folder: whatever is written here before a node is added, that node does not see.
        environment: variables for all of them.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        needed()
        self.folder = folder
        self.port = free_port()
        self._started: list[subprocess.Popen[bytes]] = []
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PRUNEFIELD_"))}
        self._environment = {
            **kept,
            **environment,
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(TREE),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self._start("head", (), *self._head())

    def _head(self) -> tuple[str, ...]:
        return (
            *("ray", "start", "--head", "--block", f"--port={self.port}", "--num-cpus=0"),
            *(f"--node-ip-address={HEAD}", "--include-dashboard=false", "--disable-usage-stats"),
            *(f"--ray-client-server-port={free_port()}", f"--temp-dir={self.folder}/ray"),
            f"--system-config={json.dumps(HEALTH)}",
        )

    def add(self, name: str, number: int, cpus: int = 1) -> None:
        """A node at 127.0.0.NUMBER."""
        inside = ("bash", "-c", INSIDE, "-", name, str(self.folder))
        self._start(
            name,
            (*ENTER, *inside),
            *("ray", "start", "--block", f"--address={HEAD}:{self.port}"),
            *(f"--node-ip-address=127.0.0.{number}", f"--num-cpus={cpus}"),
            "--disable-usage-stats",
        )

    def _start(self, name: str, enter: tuple[str, ...], *command: str) -> None:
        home = self.folder / "home" if name == "head" else Path("/tmp/home")
        if name == "head":
            home.mkdir(parents=True)
        environment = {
            **self._environment,
            "HOME": str(home),
            "TMPDIR": str(home) if name == "head" else "/tmp",
            MARK: f"{self.folder}:{name}",
        }
        log = self.folder / f"{name}.log"
        with log.open("wb") as said:
            process = subprocess.Popen(
                [*enter, *command], env=environment, stdout=said, stderr=said, cwd="/"
            )
        self._started.append(process)
        end = time.monotonic() + START_SECONDS
        while b"Ray runtime started" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)

    def driver(self, *command: str, **more: str) -> "subprocess.Popen[str]":
        """A command on the head."""
        environment = {
            **self._environment,
            "HOME": str(self.folder / "home"),
            "RAY_ADDRESS": f"{HEAD}:{self.port}",
            MARK: f"{self.folder}:driver",
            **more,
        }
        return subprocess.Popen(
            command,
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def of(self, name: str | None = None) -> list[psutil.Process]:
        """The processes of a machine, or of all."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                mark = environment_of(process).get(MARK, "")
                whole = mark.startswith(f"{self.folder}:") and process.status() != "zombie"
                if whole and name in (None, mark.rpartition(":")[2]):
                    found.append(process)
        return found

    def lose(self, name: str | None = None) -> None:
        """A machine is gone from one moment to the next, with everything on it."""
        end = time.monotonic() + END_SECONDS
        while (left := self.of(name)) and time.monotonic() < end:
            for process in left:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
        for started in self._started if name is None else ():
            started.wait()
