"""What a sweep needs on another machine, in one folder: this very code, its file, its scene.

::

    bundle/
      bundle.json            name and hash of the sweep, commit of the code
      sweep.yaml             the sweep file, to the letter
      nerf/ pruning/ orchestrator/    the code as it is here, changed files and all
      data/<scene.path>      of the scene what is read, where it is given by a relative path

The packages know that they are in a bundle by the ``bundle.json`` beside them, wherever Ray put it.
A scene with an absolute path stays where it is: it must be there on the cluster too.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nerf.errors import SceneError
from nerf.scenes import SceneSettings, scene_fingerprint
from orchestrator.errors import Mistake, SpecError
from orchestrator.provenance import BUNDLE, code_folder, git_commit
from orchestrator.spec import Sweep, given_scene_path, place_of

SWEEP = "sweep.yaml"
DATA = "data"
PACKAGES = ("nerf", "pruning", "orchestrator")
# What Ray takes as a working directory by default.
MAX_BYTES = 500_000_000


@dataclass(frozen=True)
class Bundle:
    """A folder ready to be shipped.

    Attributes:
        folder: where it is.
        name: of the sweep.
        hash: of the sweep.
        digest: changes with any byte in the folder.
    """

    folder: Path
    name: str
    hash: str
    digest: str


def make_bundle(sweep: Sweep, folder: Path) -> Bundle:
    """Copy what a sweep needs into an empty folder.

    Raises:
        SceneError: the scene is missing here, or more than Ray ships.
        SpecError: the scene's path leads out of the folders that are shipped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = code_folder()
    for package in PACKAGES:
        shutil.copytree(
            code / package,
            folder / package,
            ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
            dirs_exist_ok=True,
        )
    (folder / SWEEP).write_text(sweep.text)
    _copy_scene(sweep, folder / DATA)
    said = {"name": sweep.name, "hash": sweep.hash, "commit": git_commit(code)}
    (folder / BUNDLE).write_text(json.dumps(said, indent=1) + "\n")
    size = sum(path.stat().st_size for path in _files(folder))
    if size > MAX_BYTES:
        raise SceneError(
            f"the scene in {sweep.scene.path} makes {size / 1e6:,.0f} MB to ship, more than Ray "
            f"takes ({MAX_BYTES / 1e6:,.0f} MB); copy it to the cluster yourself and give "
            "`scene.path` as an absolute path there"
        )
    return Bundle(folder, sweep.name, sweep.hash, digest_of(folder))


def digest_of(folder: Path) -> str:
    """A short hash of every name and byte under a folder."""
    whole = hashlib.sha256()
    for path in _files(folder):
        with path.open("rb") as stream:
            part = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder)}\0{part}\n".encode())
    return whole.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _copy_scene(sweep: Sweep, data: Path) -> None:
    given = given_scene_path(sweep)
    if given is None or given.is_absolute():
        return
    if ".." in given.parts:
        message = (
            "a scene that is to travel with its sweep needs a relative path without `..`, or an "
            "absolute path that is the same on the cluster"
        )
        place = place_of(sweep, "scene", "path")
        raise SpecError(str(sweep.source), [Mistake(place, str(given), message)])
    wanted = scene_fingerprint(sweep.scene)  # complains if it is not whole
    source, target = sweep.scene.folder(), data / given
    factor = sweep.scene.factor
    if factor is not None:
        needed = f"images_{factor}" if factor > 1 else "images"
        _copy_tree(source, target, skip_images_but=needed)
        if _fingerprint(sweep.scene, target) == wanted:
            return
        shutil.rmtree(target)
    _copy_tree(source, target)


def _copy_tree(source: Path, target: Path, skip_images_but: str | None = None) -> None:
    def ignore(folder: str, names: list[str]) -> set[str]:
        if skip_images_but is None or Path(folder) != source:
            return set()
        folders = {name for name in names if (source / name).is_dir()}
        return folders - {skip_images_but}

    shutil.copytree(source, target, ignore=ignore)


def _fingerprint(settings: SceneSettings, folder: Path) -> str | None:
    try:
        return scene_fingerprint(replace(settings, path=folder))
    except SceneError:
        return None
