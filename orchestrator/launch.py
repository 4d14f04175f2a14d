"""`prunefield submit` for a file with a cluster part: brings the cluster up, runs the sweep there.

Everything goes through the ``ray`` command, as one would type it: ``ray up -y --no-restart``, which
starts what is not there and leaves running jobs alone, then ``ray submit``. The cluster file that
Ray sees is the sweep's own with one thing added: a mount that holds this very code, the sweep and
the scene.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from orchestrator.bundle import make_bundle
from orchestrator.errors import ClusterError
from orchestrator.spec import Sweep

REMOTE = "~/.prunefield/bundles"
UP, DOWN, OTHER = "prunefield-ray-is-up", "prunefield-ray-is-down", "prunefield-ray-is-else"
DEFAULT_PORT = 6379


def launch(sweep: Sweep, config: dict[str, Any], detach: bool = False) -> int:
    """Bring the cluster up if it is not, and run a sweep on it.

    Args:
        sweep: the sweep.
        config: its file, a Ray cluster file.
        detach: do not wait for the end.

    Returns:
        The exit status: 0 done, 1 failed.

    Raises:
        ClusterError: the cluster cannot be brought up or reached.
        SceneError, SpecError: the sweep cannot be shipped.
    """
    with tempfile.TemporaryDirectory(prefix="prunefield-submit-") as folder:
        bundle = make_bundle(sweep, Path(folder) / "bundle")
        mount = f"{REMOTE}/{bundle.digest}"
        file = Path(folder) / "cluster.yaml"
        file.write_text(yaml.safe_dump(with_bundle(config, mount, bundle.folder), sort_keys=False))
        bring_up(file, port_of(config))
        script = bundle.folder / "orchestrator" / "submit.py"
        arguments = [f"{mount}/sweep.yaml", "--expect", sweep.hash]
        return _ray("submit", str(file), str(script), *quoted([*arguments, *["--detach"] * detach]))


def with_bundle(config: dict[str, Any], mount: str, folder: Path) -> dict[str, Any]:
    """The cluster file with one mount more; the scene is in it, and need not be where it says."""
    mounts = {
        remote: local
        for remote, local in (config.get("file_mounts") or {}).items()
        if not f"{remote}/".startswith("~/prunefield/data/")
    }
    return {**config, "file_mounts": {mount: str(folder), **mounts}}


def quoted(arguments: Sequence[str]) -> list[str]:
    """Arguments as `ray submit` needs them: it joins them with blanks and hands them to a shell.

    `~/` stays free, so that the shell there expands it.
    """
    return [
        "~/" + shlex.quote(argument[2:]) if argument.startswith("~/") else shlex.quote(argument)
        for argument in arguments
    ]


def port_of(config: dict[str, Any]) -> int:
    """The port of the cluster's head."""
    commands = " ".join(map(str, config.get("head_start_ray_commands") or []))
    found = re.search(r"--port[= ](\d+)", commands)
    return int(found.group(1)) if found else DEFAULT_PORT


def bring_up(file: Path, port: int) -> None:
    """Make the cluster run, without touching what runs on it.

    ``ray up --no-restart`` makes a head that is not there, with Ray on it. A head that is there but
    has lost Ray (it was rebooted, say) needs a full ``ray up``; that would also end what runs, so
    it is done only if nothing listens on the head's port.

    Raises:
        ClusterError: it cannot be brought up.
    """
    if _ray("up", "-y", "--no-restart", str(file)) != 0:
        raise ClusterError(
            "the cluster could not be brought up; what Ray said stands above (`ray up -y "
            "--no-restart FILE` tries it alone)"
        )
    said = _ray_said("exec", str(file), probe(port))
    if UP in said:
        return
    if DOWN not in said:
        raise ClusterError(
            f"something listens on port {port} of the head that this user's Ray cannot talk to; is "
            "it somebody else's cluster, or one with another RAY_AUTH_MODE? Give this one another "
            "--port in head_start_ray_commands"
            if OTHER in said
            else "the head does not answer; what Ray said: " + said[-500:]
        )
    if _ray("up", "-y", str(file)) != 0:
        raise ClusterError("Ray could not be started on the head; what it said stands above")


def probe(port: int) -> str:
    """A shell command that says, on the head, whether Ray is up there, down, or somebody else's.

    Ray puts this machine's address for 127.0.0.1, where a head on loopback alone does not listen,
    unless it is told that it makes no clusters. What listens without an answer is not started anew:
    it may hold running jobs.
    """
    # The quotes keep the markers out of the command line that Ray prints.
    up, down, other = (f'echo "{said[:5]}""{said[5:]}"' for said in (UP, DOWN, OTHER))
    return (
        'export PATH="$HOME/.prunefield/venv/bin:$PATH" RAY_AUTH_MODE=${RAY_AUTH_MODE:-'
        "$(test -f ~/.ray/auth_token && echo token || echo disabled)}; "
        f'listens() {{ timeout 3 bash -c "exec 3<>/dev/tcp/$1/{port}" 2>/dev/null; }}; '
        f"answers() {{ ray health-check --address 127.0.0.1:{port} >/dev/null 2>&1; }}; "
        f'if ! listens 127.0.0.1 && ! listens "$(hostname)"; then {down}; '
        f"elif RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 answers || answers; then {up}; "
        f"else {other}; fi"
    )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


def _environment() -> dict[str, str]:
    # These commands only speak ssh; what is said to Ray is said on the head, with its own mode.
    return {"RAY_AUTH_MODE": "disabled", **os.environ}


def _ray(*arguments: str) -> int:
    """Run a `ray` command in the terminal."""
    try:
        return subprocess.run(_command(*arguments), env=_environment(), check=False).returncode
    except OSError as error:
        raise ClusterError(f"the ray command cannot be run: {error}") from error


def _ray_said(*arguments: str) -> str:
    """Run a `ray` command; gives all that it printed."""
    done = subprocess.run(
        _command(*arguments), env=_environment(), capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr
