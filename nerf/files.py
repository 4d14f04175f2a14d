"""Tensor files that are whole or absent, and that notice when a bit has flipped."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from nerf.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: gives a path beside it, which takes its place at the end.

    Raises:
        CheckpointError: the file cannot be written; what was there before is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write {path}: {reason}; free space or choose another folder"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(header.items())).encode())
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
        metadata: plain data by name, kept as JSON; a digest of it all is added.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    data = as_bytes(tensors, metadata)
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return len(data)


def as_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, object]) -> bytes:
    """What `write_tensors` writes."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {name: json.dumps(value, separators=(",", ":")) for name, value in metadata.items()}
    header["sha256"] = _digest(plain, header)
    return serialize(plain, header)


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
    if _digest(tensors, header) != expected:
        raise CheckpointError(
            f"{path} is damaged: its contents do not match their checksum; make or copy it again"
        )
    try:
        return tensors, {name: json.loads(value) for name, value in header.items()}
    except ValueError as error:
        raise CheckpointError(f"{path} has damaged metadata ({error})") from error
