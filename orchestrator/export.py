"""Model files for other programs: plain safetensors, nerf-pytorch's .tar, ONNX."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nerf.checkpoints import save_model
from nerf.field import NerfModel
from nerf.interchange import export_tar
from nerf.onnx_export import export_onnx
from orchestrator.errors import OrchestratorError

SUFFIXES = {".safetensors": "safetensors", ".tar": "tar", ".onnx": "onnx"}

Exporter = Callable[[Path, NerfModel, Mapping[str, Any]], object]


def _tar(path: Path, model: NerfModel, info: Mapping[str, Any]) -> None:
    training = info.get("training", {})
    iterations = training.get("iterations", 0) if isinstance(training, dict) else 0
    export_tar(path, model, iterations if type(iterations) is int else 0)


FORMATS: dict[str, Exporter] = {
    "safetensors": save_model,
    "tar": _tar,
    "onnx": export_onnx,
}
"""How to write each format: (file, model, what is known of it).

``safetensors`` is our own file with float32 weights, whatever bits they were read from; ``tar``
needs nerf-pytorch's widths."""


def form_of(path: Path) -> str:
    """The format that a file's name says.

    Raises:
        OrchestratorError: it says none.
    """
    form = SUFFIXES.get(path.suffix.lower())
    if form is None:
        raise OrchestratorError(
            f"{path}: the name of a model file ends with {', '.join(SUFFIXES)}, or its format is "
            "given with --format"
        )
    return form


def export(path: Path, model: NerfModel, info: Mapping[str, Any], form: str) -> int:
    """Write a model for other programs.

    Args:
        path: the file.
        model: on any device.
        info: plain data about where it comes from.
        form: a name in `FORMATS`.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: the model has a shape that the format cannot hold, the file cannot be
            written, or a package is missing.
    """
    FORMATS[form](path, model, info)
    return path.stat().st_size
