"""Finding, reading and hashing the files a scene is made of."""

import hashlib
import json
import os
import posixpath
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nerf.errors import SceneError

FINGERPRINT_DIGITS = 16
LONGEST_NAME = 250  # bytes, a suffix apart

_SUFFIXES = (".png", ".jpg", ".jpeg")
_EIGHT_BIT_MODES = ("L", "LA", "P", "RGB", "RGBA")
# What Pillow lets through for files that are no pictures, or only the start of one.
_UNREADABLE = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def list_photos(folder: Path) -> list[Path]:
    """The photos in a folder by name; hidden files (macOS leaves some) do not count."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SceneError(
            f"cannot list the photos in {folder}: {error}; check that it is a folder you may read"
        ) from error
    return [
        entry
        for entry in entries
        if entry.suffix.lower() in _SUFFIXES and not entry.name.startswith(".")
    ]


def read_photos(
    paths: Sequence[Path], *, transparent: bool = False, shrink: int = 1
) -> UInt8[np.ndarray, "views height width channels"]:
    """Decode photos of one size.

    Args:
        paths: image files, at least one.
        transparent: keep (or, for opaque files, add) an alpha channel: 4 channels, else 3.
        shrink: average boxes of this many pixels a side into one.

    Returns:
        8-bit values as they are in the files.

    Raises:
        SceneError: a file is missing, truncated, no image, or of another size than the first.
    """
    photos = [_read_photo(path, transparent=transparent, shrink=shrink) for path in paths]
    for path, photo in zip(paths, photos, strict=True):
        if photo.shape != photos[0].shape:
            raise SceneError(
                f"{path} is {_size(photo)} pixels but {paths[0].name} is {_size(photos[0])}; all "
                "photos of a scene must have one size: remove or resize the odd one"
            )
    return np.stack(photos)


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a scene names, which must be in the scene's own folder.

    Args:
        folder: what the name is relative to.
        name: as the scene gives it.
        where: what gives it, for the message.

    Raises:
        SceneError: it leads elsewhere, or no file can have it.
    """
    path = PurePosixPath(posixpath.normpath(name))
    try:
        fits = all(len(os.fsencode(part)) <= LONGEST_NAME for part in path.parts)
    except UnicodeEncodeError:  # half a character
        fits = False
    if path.is_absolute() or ".." in path.parts or not path.name or "\0" in name or not fits:
        raise SceneError(
            f"{where}: {name!r:.200} cannot be the name of a photo; allowed are names of files "
            f"below {folder}: move the photo there"
        )
    return folder / path


def read_bytes(path: Path, what: str) -> bytes:
    """A file's bytes.

    Raises:
        SceneError: it cannot be read; `what` says what it is for.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SceneError(
            f"cannot read {what} {path}: {error.strerror or error}; check that the scene was "
            "copied whole and that you may read it"
        ) from error


def fingerprint(settings: Mapping[str, object], files: Sequence[Path]) -> str:
    """Hash the contents of files, in order, with the settings that shape what is made of them.

    File names do not count, so a scene keeps its fingerprint when it moves.

    Args:
        settings: plain JSON values.
        files: every file that matters.

    Returns:
        The first 16 hex digits of a SHA-256.
    """
    contents = [hashlib.sha256(read_bytes(path, "scene file")).hexdigest() for path in files]
    canonical = json.dumps(
        {"settings": dict(settings), "files": contents}, sort_keys=True, separators=(",", ":")
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def _read_photo(
    path: Path, *, transparent: bool, shrink: int
) -> UInt8[np.ndarray, "height width channels"]:
    try:
        with Image.open(path) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise SceneError(
                    f"{path} is an image of mode {image.mode}; 8-bit grey, palette, RGB and RGBA "
                    "images are allowed: convert it first"
                )
            pixels = image.convert("RGBA" if transparent else _opaque(image))
            if not transparent and pixels.mode == "RGBA":
                # Alpha is dropped, not blended, as NeRF does for photos.
                pixels = Image.merge("RGB", pixels.split()[:3])
            if shrink > 1:
                pixels = pixels.reduce(shrink)
            return np.array(pixels)
    except FileNotFoundError as error:
        raise SceneError(
            f"photo {path} is missing; copy the scene whole, or download it again"
        ) from error
    except _UNREADABLE as error:
        raise SceneError(
            f"cannot read photo {path}: {error}; it is truncated or no image: "
            "copy or download it again"
        ) from error


def _opaque(image: Image.Image) -> str:
    return "RGBA" if image.mode in ("LA", "RGBA") else "RGB"


def _size(photo: UInt8[np.ndarray, "height width channels"]) -> str:
    return f"{photo.shape[1]}×{photo.shape[0]}"
