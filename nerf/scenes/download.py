"""Fetching public scenes: download, unpack what is needed, check, put in place.

Only the wanted scene is unpacked, beside its place, and renamed into it when every known hash
agrees: a scene folder is whole or absent. Archives that would write outside their folder are
refused. `nerf.scenes.public` says where the archives are; `PRUNEFIELD_MIRROR` (or `base_url`) names
another place that serves files of these names, such as a lab's own server that holds what was
downloaded by hand.
"""

import difflib
import json
import logging
import lzma
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from nerf.errors import DownloadError
from nerf.scenes.public import PUBLIC_SCENES, PublicScene
from nerf.scenes.transfer import Progress, Transfer, UnavailableError, file_sha256

MIRROR_VARIABLE = "PRUNEFIELD_MIRROR"

_WORKSHOP = ".prunefield-downloads"
_RECEIPT = ".prunefield-fetch.json"
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)


class _BadArchiveError(Exception):
    """The archive is dangerous, or does not hold what it should."""


def fetch_scene(
    name: str,
    destination: Path,
    *,
    base_url: str | None = None,
    everything: bool = False,
    keep_archive: bool = False,
    progress: Callable[[Progress], None] | None = None,
    attempts: int = 4,
    timeout: float = 30.0,
) -> Path:
    """Download a public scene and unpack what is needed of it.

    An interrupted download goes on where it stopped, within the call and in later ones. A scene
    that an earlier call fetched whole is not fetched again.

    Args:
        name: a name in `PUBLIC_SCENES`.
        destination: folder to put it in, as `nerf_llff_data/<name>` or `nerf_synthetic/<name>`.
        base_url: address of a folder that holds the archives; None: the environment variable
            PRUNEFIELD_MIRROR if set, else the known hosts.
        everything: unpack all of the scene's files, not only those that prunefield reads
            (LLFF: `poses_bounds.npy` and `images_8`; Blender: training and test views).
        keep_archive: keep the archive, for the other scenes in it.
        progress: called after each piece that arrives.
        attempts: how often to try before giving up; an attempt that got further is not counted.
        timeout: seconds to wait for an answer.

    Returns:
        The scene's folder.

    Raises:
        DownloadError: the scene is unknown, the server does not have it, what came is damaged,
            dangerous or not what was expected, or it cannot be written. What was downloaded of an
            interrupted transfer stays for the next call.
    """
    scene = _named(name)
    target = destination / scene.folder
    if _is_fetched(target, everything=everything):
        return target
    workshop = destination / _WORKSHOP
    try:
        workshop.mkdir(parents=True, exist_ok=True)
        transfers = [
            replace(transfer, progress=progress, attempts=attempts, timeout=timeout)
            for transfer in _transfers(scene, workshop, base_url)
        ]
        transfer = _first_available(scene, transfers)
        with tempfile.TemporaryDirectory(dir=workshop) as bench:
            unpacked = Path(bench) / "unpacked"
            try:
                _unpack(scene, transfer.part, unpacked, everything=everything)
            except _BadArchiveError as error:
                transfer.forget()
                raise DownloadError(
                    f"{transfer.url} cannot be used: {error}; it was thrown away: try again, or "
                    "use another mirror (a login or quota page in place of the archive looks like "
                    "this too)"
                ) from error
            _write_receipt(unpacked, transfer.url, everything=everything)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.rename(Path(bench) / "replaced")
            unpacked.rename(target)
        if not keep_archive:
            transfer.forget()
            if not any(workshop.iterdir()):
                workshop.rmdir()
    except OSError as error:
        raise DownloadError(
            f"cannot write {name} to {destination}: {error}; choose a folder with room that you "
            "may write to"
        ) from error
    _log.info("fetched %s into %s. %s", name, target, scene.terms)
    return target


def _named(name: str) -> PublicScene:
    if name in PUBLIC_SCENES:
        return PUBLIC_SCENES[name]
    near = difflib.get_close_matches(name, PUBLIC_SCENES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DownloadError(f"no public scene {name!r}; there are {', '.join(PUBLIC_SCENES)}{hint}")


def _is_fetched(target: Path, *, everything: bool) -> bool:
    """Whether an earlier call put the wanted files there and they still have their sizes."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        receipt = json.loads((target / _RECEIPT).read_bytes())
        sizes = dict(receipt["files"])
        complete = bool(receipt["everything"]) or not everything
        return complete and all(
            (target / name).is_file() and (target / name).stat().st_size == size
            for name, size in sizes.items()
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DownloadError(
            f"{target} is there already but prunefield did not fetch it; use it as it is, or move "
            "it away to have it fetched"
        ) from error


def _write_receipt(folder: Path, url: str, *, everything: bool) -> None:
    files = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    receipt = {"archive": url, "everything": everything, "files": files}
    (folder / _RECEIPT).write_text(json.dumps(receipt, indent=1) + "\n")


def _transfers(scene: PublicScene, workshop: Path, base_url: str | None) -> list[Transfer]:
    """The archives to try, in order."""
    mirror = base_url or os.environ.get(MIRROR_VARIABLE) or None
    if mirror is not None and not mirror.lower().startswith(("http://", "https://")):
        raise DownloadError(
            f"the mirror's address is {mirror!r}; it must begin with http:// or https:// "
            f"(given as base_url or in {MIRROR_VARIABLE})"
        )
    transfers = []
    for archive in scene.archives:
        url = f"{(mirror or archive.base_url).rstrip('/')}/{archive.name}"
        transfer = Transfer(url, workshop / f"{archive.name}.part")
        if mirror is None:
            # A mirror may have packed its own archive: only the known host's has the known hash.
            transfer = replace(transfer, size=archive.size, sha256=archive.sha256)
        transfers.append(transfer)
    return transfers


def _first_available(scene: PublicScene, transfers: list[Transfer]) -> Transfer:
    """Run transfers until one succeeds, and say which."""
    failures = []
    for transfer in transfers:
        try:
            transfer.run()
        except UnavailableError as error:
            failures.append(str(error))
            continue
        return transfer
    names = " or ".join(archive.name for archive in scene.archives)
    raise DownloadError(
        f"cannot fetch {scene.name}: {'; '.join(failures)}. Check the network, or name a server "
        f"that has {names} in {MIRROR_VARIABLE}"
    )


def _unpack(scene: PublicScene, file: Path, folder: Path, *, everything: bool) -> None:
    """Unpack one scene of an archive into a new folder, and check it.

    Raises:
        _BadArchiveError: the archive is damaged, dangerous, or not the one it should be.
        DownloadError: there is no room for it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = _wanted(scene, archive, everything=everything)
            _check_room(scene, members, file.parent)
            for name, info in members.items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, place.open("wb") as sink:
                    shutil.copyfileobj(source, sink, _CHUNK)
    # RuntimeError: encrypted; ValueError: names in no encoding, offsets that lead nowhere.
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ) as error:
        raise _BadArchiveError(str(error) or type(error).__name__) from error
    for name, known in scene.hashes.items():
        if (folder / name).is_file() and (actual := file_sha256(folder / name)) != known:
            raise _BadArchiveError(
                f"{name} of {scene.name} has SHA-256 {actual}, but {known} is known to be right"
            )


def _check_room(scene: PublicScene, members: dict[str, zipfile.ZipInfo], folder: Path) -> None:
    needed = sum(info.file_size for info in members.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"unpacking {scene.name} needs {needed:,} bytes but {free:,} are free in {folder}; "
            "make room and run the same command again"
        )


def _wanted(
    scene: PublicScene, archive: zipfile.ZipFile, *, everything: bool
) -> dict[str, zipfile.ZipInfo]:
    """The scene's files to unpack, by their path relative to the scene's folder."""
    infos = [info for info in archive.infolist() if not info.filename.startswith("__MACOSX/")]
    for info in infos:
        _refuse_escapes(info)
    # Mirrors nest the scenes differently: the hallmark tells where the scene's folder is.
    tail = f"{scene.name}/{scene.hallmark}"
    found = [i.filename for i in infos if f"/{i.filename}".endswith(f"/{tail}")]
    if not found:
        raise _BadArchiveError(f"it holds no {tail}")
    prefix = min(found, key=len).removesuffix(scene.hallmark)
    files = {
        info.filename.removeprefix(prefix): info
        for info in infos
        if info.filename.startswith(prefix) and not info.is_dir()
    }
    if not everything:
        files = {
            name: info
            for name, info in files.items()
            if any(re.fullmatch(pattern, name) for pattern in scene.usual)
        }
    if not any(name.lower().endswith((".png", ".jpg")) for name in files):
        raise _BadArchiveError(f"it holds none of the photos of {scene.name} that are needed")
    return files


def _refuse_escapes(info: zipfile.ZipInfo) -> None:
    """Refuse an archive with a member that could be written outside its folder."""
    path = PurePosixPath(info.filename)
    mode = info.external_attr >> 16
    if (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in info.filename
        or ":" in info.filename
        or (mode != 0 and stat.S_ISLNK(mode))
    ):
        raise _BadArchiveError(
            f"its member {info.filename!r} points outside the archive's folder or is a link"
        )
