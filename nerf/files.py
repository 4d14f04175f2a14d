"""Tensor files that are whole or absent, and that notice when a bit has flipped."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from nerf.errors import CheckpointError


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> int:
    """Write tensors and metadata as safetensors, whole or not at all.

    Args:
        path: the file.
        tensors: by name.
        metadata: plain data by name, kept as JSON; a digest of the tensors is added.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(value, separators=(",", ":")) for name, value in metadata.items()}
    header["sha256"] = _digest(plain)
    data = serialize(plain, header)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    return len(data)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read what `write_tensors` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or not ours.
    """
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        with safe_open(str(path), framework="pt") as stream:
            header = dict(stream.metadata() or {})
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}); it may be truncated: "
            "make or copy it again"
        ) from error
    expected = header.pop("sha256", None)
    if expected is None:
        raise CheckpointError(f"{path} is a safetensors file, but not one that prunefield wrote")
    if _digest(tensors) != expected:
        raise CheckpointError(
            f"{path} is damaged: its tensors do not match their checksum; make or copy it again"
        )
    try:
        return tensors, {name: json.loads(value) for name, value in header.items()}
    except ValueError as error:
        raise CheckpointError(f"{path} has damaged metadata ({error})") from error
