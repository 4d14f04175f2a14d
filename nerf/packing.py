"""Networks in few bits, as model files hold them: arrays of codes and scales, read back as fields.

Whoever quantises gives the arrays; here they become a row of bytes and, read back, the weights
that they stand for. All arrays of a network lie behind each other, so that a file of a few
kilobytes is not mostly header. A `Packed` tells them apart:

    scheme      int8     symmetric grid    w = s (c − 2^(b−1) + 1)
                uint8    grid with offset  w = s c + o
                kmeans8  codebook          w = codebook[c]          (b bits, 1 to 8, in each)
                fp16, bf16, fp32           w as it is
                sparse32, sparse16         w as it is where its bit is set, 0 elsewhere
    arrays      in this order for each layer, in the order of computation: ``scale``, ``offset``,
                ``codebook`` where the scheme has them; ``bias``; ``weight`` of a float scheme or
                ``codes``. All but codes and floats are float16.
    codes       a stream of `nerf.coding`, row after row of the weight
    sparse      a stream of `nerf.coding` with 4 bits a code, the bits of 4 weights in a row (the
                last code filled up with zeros), then the weights that are not 0

Letters: c a code, b its bits, s a row's scale, o its offset.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from nerf.coding import Reader, Writer
from nerf.errors import CheckpointError
from nerf.field import Field, FieldShape, LayerSpec

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SPARSE = {"sparse32": torch.float32, "sparse16": torch.float16}
GROUP = 4  # weights whose bits make one code


@dataclass(frozen=True)
class Packed:
    """One network in few bits.

    Attributes:
        shape: its widths.
        scheme: how its layers are stored: one name for all, or one each in the order of
            computation.
        arrays: by layer and name, e.g. ``trunk.0/scale``; ``trunk.0/codes`` holds a code (uint8) in
            the place of each weight.
    """

    shape: FieldShape
    scheme: str | Sequence[str]
    arrays: Mapping[str, Tensor]

    @classmethod
    def by_layer(
        cls, shape: FieldShape, schemes: Mapping[str, str], arrays: Mapping[str, Tensor]
    ) -> "Packed":
        """With a scheme for each layer: under one name where all are alike.

        Args:
            shape: its widths.
            schemes: by the name of the layer.
            arrays: as of the attributes.
        """
        found = [schemes[layer.name] for layer in shape.layers()]
        return cls(shape, found[0] if len(set(found)) == 1 else found, arrays)

    def schemes(self) -> dict[str, str]:
        """The scheme of each layer."""
        names = [layer.name for layer in self.shape.layers()]
        if isinstance(self.scheme, str):
            return dict.fromkeys(names, self.scheme)
        if len(self.scheme) != len(names):
            raise CheckpointError(f"{len(self.scheme)} schemes for {len(names)} layers")
        return dict(zip(names, self.scheme, strict=True))

    def row(self, entropy: bool = True) -> UInt8[Tensor, " bytes"]:
        """The arrays behind each other.

        Args:
            entropy: whether codes are range coded where that is shorter.

        Raises:
            CheckpointError: an array is missing or of another shape or type.
        """
        parts, schemes, writer = [], self.schemes(), Writer(entropy)
        for layer in self.shape.layers():
            kind, bits = _parsed(schemes[layer.name])
            for name, (dtype, shape) in _layout(layer, kind, bits).items():
                array = self.arrays.get(f"{layer.name}/{name}")
                if array is None or array.dtype != dtype or tuple(array.shape) != shape:
                    found = None if array is None else (array.dtype, tuple(array.shape))
                    raise CheckpointError(
                        f"'{layer.name}/{name}' must be {dtype} of {shape}, got {found}"
                    )
                plain = array.detach().cpu().contiguous()
                if name == "codes" and bits is not None:
                    parts.append(writer.write(plain, bits))
                elif name == "weight" and kind in SPARSE:
                    kept = plain != 0
                    parts += [writer.write(_grouped(kept), GROUP), _bytes(plain[kept])]
                else:
                    parts.append(_bytes(plain))
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)

    @classmethod
    def from_row(
        cls, shape: FieldShape, scheme: str | Sequence[str], row: UInt8[Tensor, " bytes"]
    ) -> "Packed":
        """The inverse of `row`.

        Raises:
            CheckpointError: there is no such scheme, codes are damaged, or the bytes are too many
                or too few.
        """
        if row.dtype != torch.uint8 or row.ndim != 1:
            raise CheckpointError(f"a row of bytes belongs here, got {row.dtype} {row.ndim}-D")
        packed = cls(shape, scheme, {})
        arrays: dict[str, Tensor] = {}
        reader = Reader(row.numpy().tobytes())
        for layer, of_layer in zip(shape.layers(), packed.schemes().values(), strict=True):
            kind, bits = _parsed(of_layer)
            for name, (dtype, size) in _layout(layer, kind, bits).items():
                count = torch.Size(size).numel()
                if name == "codes" and bits is not None:
                    array = reader.read(bits, count).view(size)
                elif name == "weight" and kind in SPARSE:
                    kept = _ungrouped(reader.read(GROUP, -(-count // GROUP)), count)
                    array = torch.zeros(count, dtype=dtype)
                    array[kept] = _taken(reader, dtype, int(kept.sum()))
                    array = array.view(size)
                else:
                    array = _taken(reader, dtype, count).view(size)
                arrays[f"{layer.name}/{name}"] = array
        if reader.left:
            raise CheckpointError(f"{reader.left:,} bytes behind the end of {scheme!r}")
        return cls(shape, scheme, arrays)

    def field(self) -> Field:
        """The network that the arrays stand for, on the CPU in float32."""
        state = {}
        for layer, scheme in zip(self.shape.layers(), self.schemes().values(), strict=True):
            state[f"{layer.name}.weight"] = self._weight(layer, scheme)
            state[f"{layer.name}.bias"] = self.arrays[f"{layer.name}/bias"].float()
        field = Field(self.shape)
        field.load_state_dict(state)
        return field

    def _weight(self, layer: LayerSpec, scheme: str) -> Float[Tensor, "out in"]:
        kind, bits = _parsed(scheme)
        if bits is None:
            return self.arrays[f"{layer.name}/weight"].float()
        codes = self.arrays[f"{layer.name}/codes"]
        if kind == "kmeans":
            return self.arrays[f"{layer.name}/codebook"].float()[codes.long()]
        scale = self.arrays[f"{layer.name}/scale"].float()[:, None]
        if kind == "int":
            return (codes.float() - (2 ** (bits - 1) - 1)) * scale
        return codes.float() * scale + self.arrays[f"{layer.name}/offset"].float()[:, None]


def _parsed(scheme: str) -> tuple[str, int | None]:
    """Kind and bits of a scheme; None for floats."""
    if scheme in FLOATS or scheme in SPARSE:
        return scheme, None
    found = re.fullmatch(r"(int|uint|kmeans)([1-8])", scheme)
    if not found:
        raise CheckpointError(f"weights stored as {scheme!r}, which this prunefield cannot read")
    return found[1], int(found[2])


def _layout(
    layer: LayerSpec, kind: str, bits: int | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each array of a layer, in order."""
    rows, whole = (layer.out_width,), (layer.out_width, layer.in_width)
    if bits is None:
        dtype = {**FLOATS, **SPARSE}[kind]
        return {"bias": (dtype, rows), "weight": (dtype, whole)}
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if kind == "kmeans":
        layout["codebook"] = torch.float16, (2**bits,)
    else:
        layout["scale"] = torch.float16, rows
    if kind == "uint":
        layout["offset"] = torch.float16, rows
    return layout | {"bias": (torch.float16, rows), "codes": (torch.uint8, whole)}


def _bytes(array: Tensor) -> bytes:
    return bytes(array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _taken(reader: Reader, dtype: torch.dtype, count: int) -> Tensor:
    """The next so many numbers."""
    data = reader.take(count * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype) if count else torch.zeros(0, dtype=dtype)


def _grouped(kept: Bool[Tensor, "out in"]) -> UInt8[Tensor, " groups"]:
    """The bits of 4 weights as one code."""
    flat = kept.flatten().to(torch.uint8)
    groups = torch.nn.functional.pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    return (groups << torch.arange(GROUP, dtype=torch.uint8)).sum(dim=1).to(torch.uint8)


def _ungrouped(codes: UInt8[Tensor, " groups"], count: int) -> Bool[Tensor, " n"]:
    bits = codes[:, None] >> torch.arange(GROUP, dtype=torch.uint8) & 1
    return bits.flatten()[:count].bool()
