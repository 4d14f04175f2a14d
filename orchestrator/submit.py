"""For ``ray submit CLUSTER_FILE orchestrator/submit.py``: runs the sweep of a cluster on its head.

::

    ray submit sweeps/fern.yaml orchestrator/submit.py
    ray submit infra/cluster.yaml orchestrator/submit.py sweeps/other.yaml
    ray submit sweeps/fern.yaml orchestrator/submit.py --detach

Ray copies this file to the head and runs it there; the code, the sweep files and the scene came
with the cluster file's ``file_mounts``. Without a path, the sweep is the one that the cluster was
brought up with (``metadata.sweep`` in ``~/ray_bootstrap_config.yaml``). The sweep becomes a Ray
job, so that it outlives the connection.

A sweep that is not the newest is never run. What ``ray submit`` does not copy is as old as the last
``ray up``: if the files on the head contradict one another (the sweep file and the cluster's
metadata, or this script and the code that it came from) or the sweep is not the one that
``--expect HASH`` names, nothing runs and the way to refresh is shown.
"""

import argparse
import hashlib
import os
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

ENVIRONMENT = "~/.prunefield/venv/bin/python"

try:
    import yaml
except ImportError:
    # `ray submit` runs whatever `python` is in a login shell of the head.
    _other = Path(ENVIRONMENT).expanduser()
    if __name__ != "__main__" or not _other.is_file() or _other == Path(sys.executable):
        raise
    os.execv(_other, [str(_other), *sys.argv])

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
TREE = "~/prunefield"
OURSELVES = "orchestrator/submit.py"
REFRESH = (
    "refresh the cluster: ray up -y --no-restart {file} (running jobs live on), then submit again"
)


class RefusedError(Exception):
    """Nothing was run; the message says why and what to do."""


def main() -> int:
    """Submit and follow; gives the exit status of the sweep."""
    parser = argparse.ArgumentParser(description="Run a sweep on the Ray cluster of this head.")
    parser.add_argument("sweep", nargs="?", help="sweep file in the code folder, or absolute")
    parser.add_argument("--expect", metavar="HASH", help="run nothing but the sweep of this hash")
    parser.add_argument("--detach", action="store_true", help="do not wait for the end")
    options = parser.parse_args()
    try:
        return run(options)
    except RefusedError as error:
        print(f"prunefield: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    """The steps."""
    config = bootstrap_config(Path(BOOTSTRAP).expanduser())
    tree = find_tree(config)
    check_script(Path(__file__), tree, config)
    sys.path.insert(0, str(tree))
    os.chdir(tree)
    from orchestrator.cli.remote import submit_to  # noqa: PLC0415  the tree is found only now
    from orchestrator.errors import PrunefieldError, SpecError  # noqa: PLC0415
    from orchestrator.spec import load, read_text  # noqa: PLC0415

    try:
        if options.sweep:
            sweep = load(Path(options.sweep).expanduser())
        else:
            text, source = sweep_of(config, tree)
            sweep = read_text(text, source)
        if options.expect and options.expect != sweep.hash:
            raise RefusedError(
                f"sweep {sweep.name!r} on this cluster has hash {sweep.hash}, not "
                f"{options.expect}: it is not the one that you have; " + refresh(config, tree)
            )
        print(f"prunefield: sweep {sweep.name} ({sweep.hash}), code in {tree}", flush=True)
        with tempfile.TemporaryDirectory(prefix="prunefield-bundle-") as folder:
            return submit_to(
                sweep,
                dashboard_of(config),
                Path(folder),
                detach=options.detach,
                python=shlex.quote(sys.executable),
            )
    except SpecError as error:
        print(f"prunefield: {error}", file=sys.stderr)
        return 2
    except PrunefieldError as error:
        raise RefusedError(str(error)) from error


def bootstrap_config(path: Path) -> dict[str, Any]:
    """What the cluster was brought up with.

    Raises:
        RefusedError: this is no head of a cluster.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RefusedError(
            f"{path} cannot be read ({error}): this script is for the head of a cluster that "
            "`ray up` made; elsewhere use `prunefield submit FILE`"
        ) from error
    return config if isinstance(config, dict) else {}


def find_tree(config: dict[str, Any]) -> Path:
    """The folder on this machine that holds the packages.

    Raises:
        RefusedError: no mount of the cluster file brought them.
    """
    mounts = [Path(mount).expanduser() for mount in config.get("file_mounts") or {}]
    places = [place for mount in mounts for place in (mount, mount.parent)]
    places.append(Path(TREE).expanduser())
    for place in places:
        if (place / "orchestrator" / "__init__.py").is_file() and (place / "nerf").is_dir():
            return place.resolve()
    raise RefusedError(
        f"the code is not here (looked in {', '.join(map(str, dict.fromkeys(places)))}); mount it "
        "in the cluster file, `file_mounts: {~/prunefield/orchestrator: orchestrator, …}` as "
        "sweeps/fern.yaml does, and bring it there: ray up -y --no-restart FILE"
    )


def check_script(script: Path, tree: Path, config: dict[str, Any]) -> None:
    """This script was copied just now; the code as old as the last `ray up`.

    Raises:
        RefusedError: they do not belong together.
    """
    theirs = tree / OURSELVES
    if not theirs.is_file() or _hash(theirs) != _hash(script):
        raise RefusedError(
            f"the code in {tree} is older than what you submit ({theirs} is not this script); "
            + refresh(config, tree)
        )


def sweep_of(config: dict[str, Any], tree: Path) -> tuple[str, Path]:
    """Text and name of the sweep that the cluster was brought up with.

    Raises:
        RefusedError: there is none, or its file says something else by now.
    """
    metadata = config.get("metadata")
    sweep = metadata.get("sweep") if isinstance(metadata, dict) else None
    if not isinstance(sweep, dict):
        raise RefusedError(
            "this cluster was brought up without a sweep (`metadata.sweep`); name one: "
            "ray submit FILE orchestrator/submit.py sweeps/fern.yaml"
        )
    for path, data in files_of(config, tree):
        on_disk = (data.get("metadata") or {}).get("sweep")
        if on_disk == sweep:
            return path.read_text(), path
        changed = sorted(
            key
            for key in {*sweep, *(on_disk if isinstance(on_disk, dict) else {})}
            if not isinstance(on_disk, dict) or on_disk.get(key) != sweep.get(key)
        )
        raise RefusedError(
            f"{path} and the sweep that this cluster was brought up with differ (in "
            f"{', '.join(changed)}), so one of them is out of date and nothing was run; "
            + refresh(config, tree)
        )
    return yaml.safe_dump(sweep, sort_keys=False), Path(BOOTSTRAP).expanduser()


def files_of(config: dict[str, Any], tree: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Sweep files in the tree that bring up a cluster of this name."""
    found = []
    for folder in ("sweeps", "infra", "."):
        for path in sorted((tree / folder).glob("*.yaml")):
            try:
                data = yaml.safe_load(path.read_text())
            except (OSError, yaml.YAMLError):
                continue
            if not isinstance(data, dict) or not isinstance(data.get("metadata"), dict):
                continue
            ours = data.get("cluster_name") == config.get("cluster_name")
            if ours and "sweep" in data["metadata"]:
                found.append((path, data))
    return found


def dashboard_of(config: dict[str, Any]) -> str:
    """The address of this head's dashboard, which takes jobs."""
    given = os.environ.get("RAY_API_SERVER_ADDRESS")
    if given:
        return given
    commands = " ".join(map(str, config.get("head_start_ray_commands") or []))
    port = re.search(r"--dashboard-port[= ](\d+)", commands)
    host = re.search(r"--dashboard-host[= ]([\w.:-]+)", commands)
    name = host.group(1) if host and host.group(1) not in ("0.0.0.0", "::") else "127.0.0.1"
    return f"http://{name}:{port.group(1) if port else 8265}"


def refresh(config: dict[str, Any], tree: Path) -> str:
    """How to bring what is on disk to the cluster."""
    files = files_of(config, tree)
    return REFRESH.format(file=files[0][0].relative_to(tree) if files else "CLUSTER_FILE")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
