"""Streams of codes in files: packed, range coded, damaged."""

import itertools
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nerf.coding import Reader, Writer, _minifloat, _whole, pack_bits, unpack_bits
from nerf.errors import CheckpointError


def codes_of(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def normal_codes(n: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(n, generator=generator) * 2**bits / 12 + 2**bits / 2
    return codes.round().clamp(0, 2**bits - 1).to(torch.uint8)


def entropy(codes: Tensor) -> float:
    p = torch.bincount(codes.long()).double() / len(codes)
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


@given(bits=st.integers(1, 8), data=st.data())
@settings(deadline=None, max_examples=40)
def test_bits_are_packed_as_a_slow_reference_packs_them(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    packed = pack_bits(codes_of(codes), bits)
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    assert packed == number.to_bytes((bits * len(codes) + 7) // 8, "little")
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(data=st.data(), entropy=st.booleans())
@settings(deadline=None, max_examples=60)
def test_streams_behind_each_other_come_back(data: st.DataObject, entropy: bool) -> None:
    writer, streams, written = Writer(entropy), [], b""
    for _ in range(data.draw(st.integers(1, 5))):
        bits = data.draw(st.integers(1, 8))
        some = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=3))
        codes = codes_of(some * data.draw(st.integers(0, 40)))
        stream = writer.write(codes, bits)
        assert len(stream) <= 5 + (bits * len(codes) + 7) // 8
        streams.append((codes, bits))
        written += stream
    reader = Reader(written + b"rest")
    for codes, bits in streams:
        assert torch.equal(reader.read(bits, len(codes)), codes)
    assert reader.take(reader.left) == b"rest"


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_coding_comes_near_the_entropy(bits: int) -> None:
    codes = normal_codes(20_000, bits)
    coded = len(Writer().write(codes, bits))
    table = 11 + 2**bits  # tag, checksum, length, first and last, a byte a code
    assert coded - table <= len(codes) * entropy(codes) / 8 * 1.005
    assert len(Writer(entropy=False).write(codes, bits)) == 5 + 20_000 * bits // 8


def test_a_stream_may_use_the_table_before_it() -> None:
    writer = Writer()
    first = normal_codes(20_000, 8)
    second = first[:2000]
    tags = [writer.write(codes, 8)[0] for codes in (first, second)]
    assert tags == [1, 2]
    assert len(Writer().write(second, 8)) > len(writer.write(second, 8))


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=20))
def test_counts_are_kept_to_one_part_in_sixteen(counts: list[int]) -> None:
    kept = _whole(_minifloat(np.array(counts)))
    for count, of in zip(counts, kept.tolist(), strict=True):
        assert abs(of - count) <= count / 16
        assert (of == 0) == (count == 0)


@pytest.mark.parametrize("redundant", [False, True])
def test_damaged_codes_are_refused(redundant: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (400,), generator=generator, dtype=torch.uint8)
    if redundant:
        codes[50:] = 3
    data = Writer().write(codes, 4)
    assert (data[0] == 0) is not redundant
    for i, bit in itertools.product(range(len(data)), (0, 5)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << bit
        with suppress(CheckpointError):
            # A bit of the table, or behind the last code, may make no difference to the codes.
            assert torch.equal(Reader(bytes(flipped)).read(4, 400), codes)
            assert redundant
    for n in (0, 3, 5, len(data) - 1):
        with pytest.raises(CheckpointError):
            Reader(data[:n]).read(4, 400)
    with pytest.raises(CheckpointError):
        Reader(data).read(4, 401)
