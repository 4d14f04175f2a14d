"""Model files: the weights of both networks and what is needed to render with them."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nerf import interchange
from nerf.errors import CheckpointError
from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.files import read_tensors, write_tensors

FORMAT = "prunefield-nerf"
VERSION = 1


def save_model(path: Path, model: NerfModel, info: Mapping[str, Any]) -> int:
    """Write a model file (safetensors).

    Args:
        path: the file.
        model: the networks.
        info: plain data about where the model comes from (scene settings, training).

    Returns:
        The size of the file in bytes: everything needed to render.

    Raises:
        CheckpointError: the file cannot be written.
    """
    tensors = {
        f"{network}.{name}": tensor
        for network, field in model.networks().items()
        for name, tensor in field.state_dict().items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "coarse": asdict(model.coarse.shape),
        "fine": asdict(model.fine.shape),
        "samples": asdict(model.samples),
        "info": dict(info),
    }
    return write_tensors(path, tensors, metadata)


def load_model(path: Path, samples: SampleCounts | None = None) -> tuple[NerfModel, dict[str, Any]]:
    """Read a model: ours (safetensors) or a nerf-pytorch ``.tar``.

    Args:
        path: the file.
        samples: sample counts to render with; by default those of the file, or the original
            64 + 64 for a ``.tar``, which does not tell.

    Returns:
        The model on the CPU, and what the file says about where it comes from.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or of a shape that does not fit.
    """
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}")
    if path.suffix in (".tar", ".pt", ".pth"):
        return interchange.import_tar(path, samples or SampleCounts())
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} holds {metadata.get('format')!r} version {metadata.get('version')!r}; "
            f"this prunefield reads {FORMAT!r} version {VERSION}"
        )
    try:
        fields = {name: _field(metadata[name], name, tensors) for name in ("coarse", "fine")}
        counts = samples or SampleCounts(**metadata["samples"])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the weights do not fit the described networks ({error})"
        ) from error
    info = metadata.get("info")
    return NerfModel(fields["coarse"], fields["fine"], counts), dict(info) if isinstance(
        info, dict
    ) else {}


def _field(description: Any, network: str, tensors: Mapping[str, Tensor]) -> Field:
    shape = FieldShape(**{**description, "trunk": tuple(description["trunk"])})
    field = Field(shape)
    prefix = f"{network}."
    field.load_state_dict(
        {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    )
    return field
