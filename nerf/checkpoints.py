"""Model files: the weights of both networks and what is needed to render with them.

A shared network is stored once: the description of ``coarse`` is then the word ``fine``. Networks
in few bits are one row of bytes each, see `nerf.packing`.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nerf import interchange
from nerf.errors import CheckpointError
from nerf.field import Field, FieldShape, NerfModel, SampleCounts
from nerf.files import as_bytes, read_tensors, write_tensors
from nerf.packing import Packed

FORMAT = "prunefield-nerf"
VERSION = 1


def save_model(
    path: Path,
    model: NerfModel,
    info: Mapping[str, Any],
    packed: Mapping[str, Packed] | None = None,
) -> int:
    """Write a model file (safetensors).

    Args:
        path: the file.
        model: the networks; a shared one is stored once.
        info: plain data about where the model comes from (scene settings, training).
        packed: what to store instead of the float32 weights: every stored network in few bits.

    Returns:
        The size of the file in bytes: everything needed to render.

    Raises:
        CheckpointError: the file cannot be written.
    """
    return write_tensors(path, *_contents(model, info, packed))


def model_size(
    model: NerfModel, info: Mapping[str, Any], packed: Mapping[str, Packed] | None = None
) -> int:
    """The size in bytes of the file that `save_model` would write."""
    return len(as_bytes(*_contents(model, info, packed)))


def _contents(
    model: NerfModel, info: Mapping[str, Any], packed: Mapping[str, Packed] | None
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Tensors and metadata of a model file."""
    metadata: dict[str, object] = {
        "format": FORMAT,
        "version": VERSION,
        "coarse": "fine" if model.shared else asdict(model.coarse.shape),
        "fine": asdict(model.fine.shape),
        "samples": asdict(model.samples),
        "info": dict(info),
    }
    if packed is not None:
        schemes = {
            network: of.scheme if isinstance(of.scheme, str) else list(of.scheme)
            for network, of in packed.items()
        }
        return {network: of.row() for network, of in packed.items()}, metadata | {
            "schemes": schemes
        }
    return {
        f"{network}.{name}": tensor
        for network, field in model.stored().items()
        for name, tensor in field.state_dict().items()
    }, metadata


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
    try:
        tensors, metadata = read_tensors(path)
    except CheckpointError as error:
        if path.suffix == ".safetensors":
            raise
        raise CheckpointError(
            f"{error} — models are read from prunefield's .safetensors and nerf-pytorch's .tar, "
            ".pt and .pth"
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} holds {metadata.get('format')!r} version {metadata.get('version')!r}; "
            f"this prunefield reads {FORMAT!r} version {VERSION}"
        )
    try:
        schemes: Any = metadata.get("schemes", {})
        names = ("fine",) if metadata["coarse"] == "fine" else ("coarse", "fine")
        fields = {
            name: _unpacked(metadata[name], schemes[name], tensors[name])
            if name in schemes
            else _field(metadata[name], name, tensors)
            for name in names
        }
        counts = samples or SampleCounts(**metadata["samples"])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(
            f"{path}: the weights do not fit the described networks ({error})"
        ) from error
    info = metadata.get("info")
    model = NerfModel(fields.get("coarse", fields["fine"]), fields["fine"], counts)
    return model, dict(info) if isinstance(info, dict) else {}


def _shape(description: Any) -> FieldShape:
    return FieldShape(**{**description, "trunk": tuple(description["trunk"])})


def _unpacked(description: Any, scheme: str | list[str], row: Tensor) -> Field:
    if not isinstance(scheme, str | list) or not all(isinstance(s, str) for s in scheme):
        raise CheckpointError(f"weights stored as {scheme!r}, which is no name of a scheme")
    return Packed.from_row(_shape(description), scheme, row).field()


def _field(description: Any, network: str, tensors: Mapping[str, Tensor]) -> Field:
    field = Field(_shape(description))
    prefix = f"{network}."
    field.load_state_dict(
        {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
    )
    return field
