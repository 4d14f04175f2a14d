"""Pictures of a run, all in one request, as MLflow's own `log_image` would leave them one by one.

`log_image` takes a picture, a small copy, and a tag in a request each, and makes the small copy in
the caller's thread: of all that a trial costs the logger, most. Here a run's pictures are files of
one folder, their small copies made side by side, and the tag comes with the run's other tags. The
pictures themselves are links there: whoever stores the folder copies what they point to.
"""

import re
import time
import uuid
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import PIL.Image
from mlflow.tracking.multimedia import COMPRESSED_IMAGE_SIZE
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

from orchestrator.tracking.gallery import GridImage

FOLDER = "images"
TAG = {MLFLOW_LOGGED_IMAGES: "True"}
"""Tells MLflow's pages that a run has pictures."""
NO_NAME = re.compile(r"[^a-zA-Z0-9_\-./ ]")


def write_images(images: Iterable[tuple[GridImage, Path]]) -> None:
    """Write pictures and their small copies into folders, named as MLflow's pages look for them.

    Args:
        images: what to show under which name and step, and a folder that is there, which becomes
            the folder ``images`` among a run's artifacts.

    Raises:
        ValueError: a name that MLflow refuses.
        OSError: a picture cannot be read, or the folder not be written.
    """
    with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it works
        list(pool.map(lambda entry: _write(*entry), images))


def _write(image: GridImage, folder: Path) -> None:
    if NO_NAME.search(image.key):
        raise ValueError(f"MLflow takes no picture named {image.key!r}")
    name = image.key.replace("/", "~")
    at = int(time.time() * 1000)
    stem = f"{name}+step+{image.step}+timestamp+{at}+{uuid.uuid4()}"
    (folder / f"{stem}.png").symlink_to(image.path.resolve())
    with PIL.Image.open(image.path) as picture:
        side = COMPRESSED_IMAGE_SIZE
        scale = side / max(picture.size)
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        small = picture.convert("RGB").resize(size, reducing_gap=2.0)
    small.save(folder / f"{stem}+compressed.webp", method=2)
