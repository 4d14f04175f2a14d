"""Networks in few bits, as model files hold them: arrays of codes and scales, read back as fields.

This is the reading half of the format. Whoever quantises writes the arrays; here they become the
weights that they stand for. All arrays of a network lie behind each other in one row of bytes, so
that a file of a few kilobytes is not mostly header. A `Packed` tells them apart:

    scheme      int8     symmetric grid    w = s (c − 2^(b−1) + 1)
                uint8    grid with offset  w = s c + o
                kmeans8  codebook          w = codebook[c]          (b bits, 1 to 8, in each)
                fp16, bf16, fp32           w as it is
    arrays      in this order for each layer, in the order of computation: ``weight`` of a float
                scheme; ``scale``, ``offset``, ``codebook`` where the scheme has them; ``bias``;
                ``codes``. All but codes and floats are float16.
    codes       a byte 0, the CRC-32 of what follows (little endian), and b bits a code, lowest bit
                first, row after row of the weight

Letters: c a code, b its bits, s a row's scale, o its offset.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from nerf.errors import CheckpointError
from nerf.field import Field, FieldShape, LayerSpec

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TAG = 5  # bytes before the codes: the byte 0 and the CRC-32


@dataclass(frozen=True)
class Packed:
    """One network in few bits.

    Attributes:
        shape: its widths.
        scheme: how each of its layers is stored.
        arrays: by layer and name, e.g. ``trunk.0/codes`` (a row of bytes), ``trunk.0/scale``.
    """

    shape: FieldShape
    scheme: str
    arrays: Mapping[str, Tensor]

    def row(self) -> UInt8[Tensor, " bytes"]:
        """The arrays behind each other."""
        parts = []
        for name, (dtype, shape) in _layout(self.shape, self.scheme).items():
            array = self.arrays.get(name)
            if array is None or array.dtype != dtype or tuple(array.shape) != shape:
                found = None if array is None else (array.dtype, tuple(array.shape))
                raise CheckpointError(f"{name!r} must be {dtype} of {shape}, got {found}")
            parts.append(array.detach().cpu().contiguous().reshape(-1).view(torch.uint8))
        return torch.cat(parts)

    @classmethod
    def from_row(cls, shape: FieldShape, scheme: str, row: UInt8[Tensor, " bytes"]) -> "Packed":
        """The inverse of `row`.

        Raises:
            CheckpointError: there is no such scheme, or the bytes are too many or too few.
        """
        arrays, start = {}, 0
        for name, (dtype, size) in _layout(shape, scheme).items():
            count = torch.Size(size).numel() * dtype.itemsize
            part = row[start : start + count]
            if len(part) == count:
                arrays[name] = part.clone().view(dtype).view(size)
            start += count
        if start != len(row):
            raise CheckpointError(f"{len(row):,} bytes where {start:,} of {scheme!r} belong")
        return cls(shape, scheme, arrays)

    def field(self) -> Field:
        """The network that the arrays stand for, on the CPU in float32.

        Raises:
            CheckpointError: codes are damaged.
        """
        state = {}
        for layer in self.shape.layers():
            state[f"{layer.name}.weight"] = self._weight(layer)
            state[f"{layer.name}.bias"] = self.arrays[f"{layer.name}/bias"].float()
        field = Field(self.shape)
        field.load_state_dict(state)
        return field

    def _weight(self, layer: LayerSpec) -> Float[Tensor, "out in"]:
        kind, bits = _parsed(self.scheme)
        if bits is None:
            return self.arrays[f"{layer.name}/weight"].float()
        data = self.arrays[f"{layer.name}/codes"]
        codes = _unpacked(data, bits, layer).view(layer.out_width, layer.in_width)
        if kind == "kmeans":
            return self.arrays[f"{layer.name}/codebook"].float()[codes.long()]
        scale = self.arrays[f"{layer.name}/scale"].float()[:, None]
        if kind == "int":
            return (codes.float() - (2 ** (bits - 1) - 1)) * scale
        return codes.float() * scale + self.arrays[f"{layer.name}/offset"].float()[:, None]


def _parsed(scheme: str) -> tuple[str, int | None]:
    """Kind and bits of a scheme; None for floats."""
    if scheme in FLOATS:
        return scheme, None
    found = re.fullmatch(r"(int|uint|kmeans)([1-8])", scheme)
    if not found:
        raise CheckpointError(f"weights stored as {scheme!r}, which this prunefield cannot read")
    return found[1], int(found[2])


def _layout(shape: FieldShape, scheme: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each array, in order."""
    kind, bits = _parsed(scheme)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for layer in shape.layers():
        name, rows = layer.name, (layer.out_width,)
        if bits is None:
            layout[f"{name}/weight"] = FLOATS[kind], (layer.out_width, layer.in_width)
            layout[f"{name}/bias"] = FLOATS[kind], rows
            continue
        if kind == "kmeans":
            layout[f"{name}/codebook"] = torch.float16, (2**bits,)
        else:
            layout[f"{name}/scale"] = torch.float16, rows
        if kind == "uint":
            layout[f"{name}/offset"] = torch.float16, rows
        layout[f"{name}/bias"] = torch.float16, rows
        packed = TAG + (layer.out_width * layer.in_width * bits + 7) // 8
        layout[f"{name}/codes"] = torch.uint8, (packed,)
    return layout


def _unpacked(
    data: UInt8[Tensor, " bytes"], bits: int, layer: LayerSpec
) -> UInt8[Tensor, " codes"]:
    payload = data[TAG:]
    checksum = int.from_bytes(bytes(data[1:TAG].tolist()), "little")
    if int(data[0]) != 0 or zlib.crc32(payload.numpy().tobytes()) != checksum:
        raise CheckpointError(f"the codes of layer {layer.name!r} are damaged")
    octets = payload[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    stream = octets.flatten()[: layer.out_width * layer.in_width * bits]
    return (stream.view(-1, bits).int() << torch.arange(bits)).sum(dim=1).to(torch.uint8)
