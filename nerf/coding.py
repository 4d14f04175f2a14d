"""Small integers as bytes: packed bits, or a range coder that comes close to their entropy.

A stream is one of

    tag 0    CRC-32 of what follows, b bits a code (lowest bit first)
    tag 1    CRC-32 of the codes (a byte each), 4 bytes: length of the coded words, a table of how
             often each code comes, the words
    tag 2    the same with the table of the stream before it

and `Writer` takes the shortest. Numbers are little endian. A table is the first code, the last one,
and a byte each for those between: a float of 3 bits (mantissa) and 5 bits (exponent), so that the
coder's probabilities are ratios of whole numbers and the same on every machine.

Letters: b bits of a code, n how many codes there are.
"""

import zlib
from dataclasses import dataclass, field

import constriction
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8, UInt32
from torch import Tensor

from nerf.errors import CheckpointError

PACKED, CODED, AS_BEFORE = 0, 1, 2
HEAD = 5  # bytes of tag and CRC


def pack_bits(codes: UInt8[Tensor, "..."], bits: int) -> bytes:
    """Codes below 2^b, b bits each, the lowest bit first; the last byte is filled up with zeros.

    >>> pack_bits(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).hex()
    '2103'
    """
    places = torch.arange(bits, dtype=torch.uint8)
    stream = (codes.flatten()[:, None] >> places & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return bytes((stream.int() << torch.arange(8)).sum(dim=1).to(torch.uint8).numpy().tobytes())


def packed_size(bits: int, n: int) -> int:
    """Bytes of n packed codes."""
    return (n * bits + 7) // 8


def unpack_bits(data: bytes, bits: int, n: int) -> UInt8[Tensor, " n"]:
    """The inverse of `pack_bits`; `data` are `packed_size(bits, n)` bytes."""
    if not n:
        return torch.zeros(0, dtype=torch.uint8)
    octets = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    stream = (octets[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: n * bits]
    return (stream.view(n, bits).int() << torch.arange(bits)).sum(dim=1).to(torch.uint8)


# ------------------------------------------------------------------------------------- frequencies


def _minifloat(counts: Int[np.ndarray, " symbols"]) -> UInt8[np.ndarray, " symbols"]:
    """Counts rounded to 4 significant bits, a byte each; 0 stays 0."""
    out = np.zeros(len(counts), dtype=np.uint8)
    for i, count in enumerate(counts.tolist()):
        if count:
            exponent = max(count.bit_length() - 4, 0)
            mantissa = (count + (1 << exponent) // 2) >> exponent
            if mantissa == 16:
                exponent, mantissa = exponent + 1, 8
            # Below 8 a count is written as it is; above, its leading 1 is not.
            out[i] = mantissa if mantissa < 8 else 8 * (exponent + 1) + mantissa - 8
    return out


def _whole(table: UInt8[np.ndarray, " symbols"]) -> Int[np.ndarray, " symbols"]:
    """What `_minifloat` wrote, as whole numbers."""
    small = table < 8
    exponent = np.where(small, 0, table // 8 - 1).astype(np.int64)
    mantissa = np.where(small, table, 8 + table % 8).astype(np.int64)
    return np.asarray(mantissa << np.minimum(exponent, 40))


def _probabilities(table: bytes) -> Float[np.ndarray, " symbols"]:
    """How likely each code is, from first, last and what lies between."""
    first, last = table[0], table[1]
    counts = np.zeros(max(last + 1, 2), dtype=np.int64)
    counts[first : last + 1] = _whole(np.frombuffer(table[2:], dtype=np.uint8))
    return np.asarray(counts / counts.sum())


def _table(codes: Int[np.ndarray, " n"]) -> bytes:
    counts = np.bincount(codes)
    first, last = int(np.flatnonzero(counts)[0]), len(counts) - 1
    return bytes([first, last]) + _minifloat(counts[first:]).tobytes()


def _model(table: bytes) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(_probabilities(table), perfect=False)


def _can_code(table: bytes, codes: Int[np.ndarray, " n"]) -> bool:
    """Whether every code has a place in a table."""
    known = np.flatnonzero(_probabilities(table) > 0)
    return bool(np.isin(codes, known).all())


# ----------------------------------------------------------------------------------------- streams


@dataclass
class Writer:
    """Writes streams of codes behind each other.

    Attributes:
        entropy: whether codes are range coded where that is shorter.
    """

    entropy: bool = True
    _before: bytes = field(default=b"", init=False)

    def write(self, codes: UInt8[Tensor, "..."], bits: int) -> bytes:
        """One stream.

        Args:
            codes: below 2^b.
            bits: b.
        """
        body = pack_bits(codes.cpu(), bits)
        forms = [bytes([PACKED]) + _crc(body) + body]
        values = codes.flatten().cpu().numpy().astype(np.int32)
        own = b""
        if self.entropy and len(values):
            own = _table(values)
            forms.append(_coded(CODED, own, own, values))
            if self._before and _can_code(self._before, values):
                forms.append(_coded(AS_BEFORE, self._before, b"", values))
        shortest = min(forms, key=len)
        if shortest[0] == CODED:
            self._before = own
        return shortest


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


def _coded(tag: int, table: bytes, written: bytes, values: Int[np.ndarray, " n"]) -> bytes:
    coder = constriction.stream.queue.RangeEncoder()
    coder.encode(values, _model(table))
    words = coder.get_compressed().astype("<u4").tobytes()
    head = bytes([tag]) + _crc(values.astype(np.uint8).tobytes())
    return head + len(words).to_bytes(4, "little") + written + words


class Reader:
    """Reads what a `Writer` wrote, stream after stream.

    Args:
        data: the streams, and whatever follows them.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._before = b""

    @property
    def left(self) -> int:
        """Bytes that are not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next bytes as they are.

        Raises:
            CheckpointError: there are not so many.
        """
        if count > self.left:
            raise CheckpointError(f"{count:,} bytes belong where {self.left:,} are left")
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def read(self, bits: int, n: int) -> UInt8[Tensor, " n"]:
        """The codes of the next stream.

        Args:
            bits: b.
            n: how many there are.

        Raises:
            CheckpointError: the stream is truncated, changed, or of another size.
        """
        head = self.take(HEAD)
        tag, crc = head[0], head[1:]
        if tag == PACKED:
            body = self.take(packed_size(bits, n))
            if _crc(body) != crc:
                raise CheckpointError("codes fail their checksum")
            return unpack_bits(body, bits, n)
        if tag not in (CODED, AS_BEFORE):
            raise CheckpointError(f"codes of an unknown kind {tag}")
        size = int.from_bytes(self.take(4), "little")
        if tag == CODED:
            first, last = ends = self.take(2)
            if not first <= last < 2**bits:
                raise CheckpointError(f"codes from {first} to {last} where {bits} bits belong")
            self._before = ends + self.take(last - first + 1)
        if not self._before or not _probabilities_fit(self._before) or size % 4:
            raise CheckpointError("codes without a table that fits")
        words = np.frombuffer(self.take(size), dtype="<u4").astype(np.uint32)
        values = _decoded(words, self._before, n)
        if _crc(values.astype(np.uint8).tobytes()) != crc:
            raise CheckpointError("codes fail their checksum")
        return torch.from_numpy(values.astype(np.uint8))


def _probabilities_fit(table: bytes) -> bool:
    return bool(_whole(np.frombuffer(table[2:], dtype=np.uint8)).any())


def _decoded(words: UInt32[np.ndarray, " words"], table: bytes, n: int) -> Int[np.ndarray, " n"]:
    try:
        decoded = constriction.stream.queue.RangeDecoder(words).decode(_model(table), n)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"codes cannot be decoded ({error})") from error
    return np.asarray(decoded)
