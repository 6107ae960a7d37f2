"""Blocks come back bit by bit, or are refused."""

import struct
import zlib
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.blocks import MOST_VALUES, pack, unpack
from edge.window import Columns
from models.errors import LocalError

TIMES = st.integers(0, 2**63 - 1)
FLOATS = st.one_of(
    st.floats(width=64),
    st.floats(width=32),
    st.integers(-(2**53), 2**53).map(float),
    st.integers(-9999, 9999).map(lambda i: i / 100),
    st.sampled_from([-0.0, 5e-324, float("nan"), float("inf"), struct.unpack("<d", b"\x01" * 6 + b"\xf8\x7f")[0]]),
)


def columns(times: list[int], values: list[float], quality: list[int]) -> Columns:
    return np.array(times, np.int64), np.array(values, np.float64), np.array(quality, np.int8)


def check(before: Columns, tags: list[int] | None = None) -> bytes:
    data = pack(before, None if tags is None else np.array(tags, np.int64))
    after, found = unpack(data)
    pairs: list[tuple[NDArray[Any], NDArray[Any]]] = list(zip(before, after, strict=True))
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert one.tobytes() == other.tobytes()
    assert (None if found is None else found.tolist()) == tags
    return data


@given(st.lists(st.tuples(TIMES, FLOATS, st.integers(0, 2), st.integers(1, 2**31)), min_size=1, max_size=80))
@settings(deadline=None)
def test_any_samples_come_back(rows: list[tuple[int, float, int, int]]) -> None:
    times, values, quality, tags = (list(column) for column in zip(*rows, strict=True))
    check(columns(sorted(times), values, quality))
    check(columns(times, values, quality), tags)


@given(st.lists(st.integers(-(10**7), 10**7), min_size=40, max_size=60), st.integers(0, 6), st.booleans(), st.data())
@settings(deadline=None)
def test_decimals_come_back(numbers: list[int], power: int, single: bool, data: st.DataObject) -> None:  # noqa: FBT001
    values = np.array(numbers) / 10.0**power
    if single:
        values = values.astype(np.float32).astype(np.float64)
    holes = data.draw(st.sets(st.integers(0, len(numbers) - 1)))
    values[list(holes)] = np.nan
    check(columns(list(range(len(values))), values.tolist(), [2] * len(values)))


@given(st.integers(1, 9), st.integers(1, 70), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_waveforms_come_back(count: int, width: int, random: object) -> None:
    bits = np.random.default_rng(getattr(random, "getrandbits")(32)).integers(0, 2**32, (count, width), np.uint32)  # noqa: B009
    check((np.arange(count), bits.view(np.float32), np.full(count, 2, np.int8)))


def test_what_a_sensor_says_takes_little() -> None:
    """4096 samples at 1 Hz of a temperature with two digits: the time costs nothing, the value its digits."""
    random = np.random.default_rng(0)
    values = np.round(80 + np.cumsum(random.normal(0, 0.05, 4096)), 2)
    data = check(columns([10**18 + i * 10**9 for i in range(4096)], values.tolist(), [2] * 4096))
    assert len(data) < 4096 * 1.2


GOOD = pack(columns(list(range(500)), [i / 7 for i in range(500)], [2] * 500))


def framed(frame: bytes) -> bytes:
    return b"\x01" + struct.pack("<I", zlib.crc32(frame)) + frame


def test_each_flipped_bit_and_each_cut_is_refused() -> None:
    for at in [*range(40), *range(40, len(GOOD), 37)]:
        for bit in range(8):
            bad = bytearray(GOOD)
            bad[at] ^= 1 << bit
            with pytest.raises(LocalError):
                unpack(bytes(bad))
    for end in [*range(40), *range(40, len(GOOD), 37)]:
        with pytest.raises(LocalError):
            unpack(GOOD[:end])


def test_a_block_of_another_version_is_refused() -> None:
    with pytest.raises(LocalError, match="format 2, this program knows 1"):
        unpack(b"\x02" + GOOD[1:])


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_with_a_right_checksum_are_read_or_refused(raw: bytes) -> None:
    for frame in (raw, zstandard.compress(raw)):
        try:
            unpack(framed(frame))
        except LocalError:
            continue


@given(st.integers(0, 400), st.integers(0, 255))
@example(33, 0)  # integers of no bytes
@settings(deadline=None)
def test_a_changed_content_with_a_right_checksum_is_read_or_refused(at: int, byte: int) -> None:
    raw = bytearray(zstandard.decompress(GOOD[5:]))
    raw[at] = byte
    try:
        unpack(framed(zstandard.compress(bytes(raw))))
    except LocalError:
        return


def test_a_size_is_refused_before_memory_is_taken() -> None:
    terabyte = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\x01\x00\x00"
    with pytest.raises(LocalError, match="out of bounds"):
        unpack(framed(terabyte))
    with pytest.raises(LocalError, match="out of bounds"):
        unpack(framed(b"\x28\xb5\x2f\xfd\x00\x58" + b"\x01\x00\x00"))  # declares no size
    for count, width in ((MOST_VALUES + 1, 0), (2, MOST_VALUES), (0, 0)):
        with pytest.raises(LocalError, match="out of bounds"):
            unpack(framed(zstandard.compress(struct.pack("<IIBqqq", count, width, 0, 0, 0, 1) + bytes(100))))
