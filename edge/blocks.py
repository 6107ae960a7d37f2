"""Blocks of the sample ring: samples as columns, without loss, in one zstd frame.

Format, version 1, little-endian: a version byte, the CRC-32 (IEEE 802.3) of what follows, and a zstd frame (RFC 8878)
that declares its size, which holds

    u32 count, u32 width          samples; values of one waveform, 0 for scalars
    u8 mixed                      1 where samples of many tags follow each other, each with its tag's number
    i64 first, i64 step, i64 unit time i is time i-1 + step + unit * residual i, in ns; a regular cadence is all zeros
    integers residuals            zigzag, in the least whole number of bytes
    integers tag numbers          differences; only where mixed
    u8 x count qualities          `edge.tags.Quality`
    u8 coding, values

Columns of numbers are byte-shuffled: all first bytes, then all second ones, which zstd compresses far better. Values
are floats (4 bytes where that loses nothing, else 8) as they are or shuffled; or decimals, integers over a power of
ten as a sensor's electronics made them (after Afroozeh et al., ALP: Adaptive Lossless floating-Point Compression,
SIGMOD 2023). Of the codings that bring back every bit the smallest is stored.
"""

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from edge.tags import Sample
from edge.window import Columns
from models.errors import LocalError

VERSION = 1
MOST_VALUES = 65_536  # values of one block, if it is not a single longer waveform
_MOST_BYTES = 64 << 20
_OUTER = struct.Struct("<BI")
_HEAD = struct.Struct("<IIBqqq")
_PLAIN, _SHUFFLED, _DECIMAL = 0, 16, 32  # plus the bytes of a float, or the power of ten in the next byte
_POWERS = range(7)
# Below this a decimal's own bytes are more than it saves.
_WORTH = 32

Ints = NDArray[np.int64]
Tags = NDArray[np.int64]


class Block(NamedTuple):
    """What `unpack` gives: columns as in `edge.window.Columns`, and each sample's tag number in a mixed block."""

    columns: Columns
    tags: Tags | None


def columns_of(samples: Sequence[Sample], width: int) -> Columns:
    """Times (N,) int64 ns, values (N,) float64 or (N, width) float32, qualities (N,) int8 of one tag's samples."""
    _, stamps, values, qualities = zip(*samples, strict=True)
    times, quality = np.array(stamps, np.int64), np.array(qualities, np.int8)
    if width:
        return times, np.stack(values).astype(np.float32), quality
    # A waveform that is Bad has an empty array.
    return times, np.array([v if isinstance(v, float) else np.nan for v in values], np.float64), quality


def pack(columns: Columns, tags: Tags | None = None) -> bytes:
    """Put columns of one tag, or (scalars only) of many with their numbers, into one block.

    One of many is packed for the moment: it is packed again, tag by tag, and takes the quickest coding.
    """
    times, values, quality = columns
    deltas = np.diff(times, prepend=times[:1])
    step = int(np.sort(deltas)[len(deltas) // 2])
    residuals = deltas - step
    unit = int(np.gcd.reduce(residuals)) or 1
    width = values.shape[1] if values.ndim > 1 else 0
    head = _HEAD.pack(len(times), width, tags is not None, int(times[0]), step, unit) + _pack_ints(residuals // unit)
    if tags is not None:
        head += _pack_ints(np.diff(tags, prepend=0))
    head += quality.tobytes()
    compress = zstandard.ZstdCompressor(level=3 if tags is None else 1).compress
    frame = min((compress(head + coded) for coded in _codings(values, quick=tags is not None)), key=len)
    return _OUTER.pack(VERSION, zlib.crc32(frame)) + frame


def unpack(data: bytes) -> Block:
    """Inverse of `pack`; LocalError for anything else, before any memory is taken for it."""
    if len(data) < _OUTER.size or data[0] != VERSION:
        raise LocalError(f"a block of samples has format {data[0] if data else None}, this program knows {VERSION}")
    frame = data[_OUTER.size :]
    if _OUTER.unpack_from(data)[1] != zlib.crc32(frame):
        raise LocalError("a block of samples is damaged: its checksum does not match")
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= _MOST_BYTES:
            raise LocalError(f"a block of samples of {size} bytes is out of bounds")
        return _parse(zstandard.ZstdDecompressor().decompress(frame, max_output_size=size))
    except (zstandard.ZstdError, ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise LocalError(f"a block of samples can't be read: {error}") from error


def _parse(raw: bytes) -> Block:
    count, width, mixed, first, step, unit = _HEAD.unpack_from(raw)
    if not 0 < count <= max(1, MOST_VALUES // max(1, width)):
        raise LocalError(f"a block of {count} samples of {width} values is out of bounds")
    residuals, at = _unpack_ints(raw, _HEAD.size, count)
    deltas = residuals * unit + step
    deltas[0] = first
    tags = None
    if mixed:
        differences, at = _unpack_ints(raw, at, count)
        tags = np.cumsum(differences)
    quality = np.frombuffer(raw, np.int8, count, at)
    values = _values(raw, at + count, count * max(1, width))
    if width and values.dtype != np.float32:
        raise ValueError("a waveform of doubles")
    shaped = values.reshape(count, width) if width else values.astype(np.float64)
    return Block((np.cumsum(deltas), shaped, quality), tags)


# -- integers: zigzag, shuffled ----------------------------------------------------------------------------------------


_SIZES = (1, 2, 4, 8)


def _pack_ints(numbers: Ints) -> bytes:
    zigzag = ((numbers << 1) ^ (numbers >> 63)).view(np.uint64)
    most = int(zigzag.max())
    size = next(size for size in _SIZES if most < 1 << 8 * size)
    return bytes([size]) + _shuffle(zigzag.astype(f"<u{size}"))


def _unpack_ints(raw: bytes, at: int, count: int) -> tuple[Ints, int]:
    size = raw[at]
    if size not in _SIZES:
        raise ValueError(f"integers of {size} bytes")
    zigzag = _unshuffle(raw, at + 1, f"<u{size}", count).astype(np.uint64)
    return (zigzag >> 1).view(np.int64) ^ -(zigzag & 1).view(np.int64), at + 1 + count * size


def _shuffle(numbers: NDArray[Any]) -> bytes:
    return numbers.view(np.uint8).reshape(len(numbers), -1).T.tobytes()


def _unshuffle(raw: bytes, at: int, kind: str, count: int) -> NDArray[Any]:
    size = np.dtype(kind).itemsize
    planes = np.frombuffer(raw, np.uint8, count * size, at).reshape(size, count)
    return np.ascontiguousarray(planes.T).view(kind)[:, 0]


# -- values ------------------------------------------------------------------------------------------------------------


def _codings(values: NDArray[np.floating], *, quick: bool) -> list[bytes]:
    """Every way in which these values can be stored without loss, or the quickest."""
    flat = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore"):
        short = flat.astype(np.float32)
    if flat.dtype == np.float32 or _same(short.astype(np.float64), flat):
        flat = short
    size = flat.itemsize
    shuffled = bytes([_SHUFFLED + size]) + _shuffle(flat)
    if quick or len(flat) < _WORTH:
        return [shuffled]
    codings = [shuffled, bytes([_PLAIN + size]) + flat.tobytes()]
    decimal = _decimals(flat)
    return codings if decimal is None else [*codings, decimal]


def _decimals(flat: NDArray[np.floating]) -> bytes | None:
    """Values as integers over the least power of ten that brings each bit of them back; None without one.

    NaN, which is what a Bad sample holds, repeats the value before it, and is marked.
    """
    holes = np.isnan(flat)
    if holes.all() or not _same(flat[holes], np.full(int(holes.sum()), np.nan, flat.dtype)):
        return None
    filled = flat.astype(np.float64)
    if holes.any():
        known = np.maximum.accumulate(np.where(holes, -1, np.arange(len(flat))))
        filled = np.where(known < 0, 0.0, filled[known])
    if not np.isfinite(filled).all():
        return None
    wanted = filled.astype(flat.dtype)
    for power in _POWERS:
        # What is no decimal of so few places shows among the first ones.
        head = (np.rint(filled[:_WORTH] * 10.0**power) / 10.0**power).astype(flat.dtype)
        if not _same(head, wanted[:_WORTH]):
            continue
        scaled = np.rint(filled * 10.0**power)
        if np.abs(scaled).max() >= 2**53:
            return None
        numbers = scaled.astype(np.int64)
        if _same((numbers / 10.0**power).astype(flat.dtype), wanted):
            marks = np.packbits(holes).tobytes()
            return bytes([_DECIMAL + flat.itemsize, power]) + marks + _pack_ints(np.diff(numbers, prepend=0))
    return None


def _values(raw: bytes, at: int, count: int) -> NDArray[np.floating]:
    """Read what one of `_codings` wrote; ValueError if it isn't all that is left."""
    coding, size = raw[at] & ~15, raw[at] & 15
    kind = {4: "<f4", 8: "<f8"}[size]
    end = at + 1 + count * size
    if coding == _PLAIN:
        found = np.frombuffer(raw, kind, count, at + 1)
    elif coding == _SHUFFLED:
        found = _unshuffle(raw, at + 1, kind, count)
    elif coding == _DECIMAL:
        power, marks = raw[at + 1], -(-count // 8)
        if power not in _POWERS:
            raise ValueError(f"power {power}")
        holes = np.unpackbits(np.frombuffer(raw, np.uint8, marks, at + 2), count=count).astype(np.bool_)
        numbers, end = _unpack_ints(raw, at + 2 + marks, count)
        found = (np.cumsum(numbers) / 10.0**power).astype(kind)
        found[holes] = np.nan
    else:
        raise ValueError(f"coding {coding}")
    if end != len(raw):
        raise ValueError(f"{len(raw) - end} bytes too many")
    return found


def _same(one: NDArray[np.floating], other: NDArray[np.floating]) -> bool:
    """Whether two arrays of one type hold the same bits: -0.0 is not 0.0, and a NaN is itself."""
    return one.tobytes() == other.tobytes()
