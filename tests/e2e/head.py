"""A cluster head on this machine, reached as Ray reaches one: by ssh, but without a listening sshd.

`ssh` is told to talk to `sshd -i`, a process of its own for each connection. The head has a home
folder, a Python environment, ports and a token of its own, and never hears of other clusters here.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.services import environment_of

SSHD = "/usr/sbin/sshd"
TREE = Path(__file__).parents[2]
END_SECONDS = 30.0


def needed() -> None:
    """Skip where ssh cannot be played."""
    missing = [tool for tool in ("ssh", "ssh-keygen", "rsync", SSHD) if not shutil.which(tool)]
    if missing and hasattr(os, "getuid") and os.getuid() == 0 and shutil.which("apt-get"):
        packages = ["openssh-client", "openssh-server", "rsync"]
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        subprocess.run(command, capture_output=True, timeout=300, check=False)
        missing = [tool for tool in missing if not shutil.which(tool)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: apt-get install openssh-server rsync")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Head:
    """A head and the folder that holds everything of it."""

    folder: Path
    port: int
    dashboard: int

    @classmethod
    def make(cls, folder: Path) -> "Head":
        needed()
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it when it is root
        head = cls(folder, free_port(), free_port())
        (head.home / ".ray").mkdir(parents=True)
        (head.home / ".bash_profile").write_text(
            f'export PATH="{Path(sys.executable).parent}:$PATH"\ncd "$HOME"\n'
        )
        (head.home / ".bashrc").touch()
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(command, check=True)
        (folder / "sshd.conf").write_text(
            f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nLogLevel ERROR\n"
            f"SetEnv HOME={head.home}\n"
        )
        return head

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def start_command(self, mode: str) -> str:
        return (
            f"RAY_AUTH_MODE={mode} RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 "
            f"ray start --head --node-ip-address=127.0.0.1 --port={self.port} "
            f"--dashboard-host=127.0.0.1 --dashboard-port={self.dashboard} "
            f"--dashboard-agent-listen-port={free_port()} "
            f"--ray-client-server-port={free_port()} --num-cpus=2 --disable-usage-stats "
            f"--temp-dir={self.folder}/ray"
        )

    def cluster_file(self, path: Path, sweep: dict[str, Any] | None, mode: str = "token") -> Path:
        """A cluster file for this head, with a sweep in it or without."""
        config: dict[str, Any] = {
            "cluster_name": f"test-{self.port}",
            "max_workers": 0,
            "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
            "auth": {
                "ssh_user": getpass.getuser(),
                "ssh_private_key": str(self.folder / "user"),
                "ssh_proxy_command": f"{SSHD} -i -f {self.folder}/sshd.conf",
            },
            "file_mounts": {
                f"~/prunefield/{name}": name
                for name in ("nerf", "pruning", "orchestrator", "sweeps")
            },
            "rsync_exclude": ["__pycache__"],
            "head_start_ray_commands": [
                "test -s ~/.ray/auth_token || "
                "(umask 077; ray get-auth-token --generate >/dev/null)",
                self.start_command(mode),
            ],
            "worker_start_ray_commands": [],
        }
        if sweep is not None:
            config["metadata"] = {"sweep": sweep}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def environment(self, **changes: str) -> dict[str, str]:
        """That of somebody who sits at another machine, with nothing of Ray in his home."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PRUNEFIELD_"))}
        laptop = self.folder / "laptop"
        laptop.mkdir(exist_ok=True)
        return {
            **kept,
            "HOME": str(laptop),
            "RAY_TMPDIR": str(self.folder / "launcher"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **changes,
        }

    def run(
        self, *command: str, cwd: Path = TREE, timeout: float = 600, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there; standard error goes with standard output."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment(**changes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to this head's Ray."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                # Ray's agents write their titles over what they were called with and some more.
                home = environment_of(process).get("HOME")
                where = (home, process.cwd(), *process.cmdline())
                if any(str(self.folder) in str(part) for part in where):
                    found.append(process)
        return [process for process in found if process.pid != os.getpid()]

    def end(self) -> None:
        """Kill what this head started, and nothing else: `ray stop` would end every Ray here."""
        end = time.monotonic() + END_SECONDS
        while left := self.processes():
            assert time.monotonic() < end, left
            for process in left:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.1)
