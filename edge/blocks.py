"""Blocks of the sample ring: the samples of one tag as columns in one zstd frame."""

from collections.abc import Sequence

import numpy as np
import zstandard

from edge.tags import Sample
from edge.window import Columns


def columns_of(samples: Sequence[Sample], width: int) -> Columns:
    """Times (N,) int64 ns, values (N,) float64 or (N, width) float32, qualities (N,) int8 of one tag's samples."""
    times = np.array([s.time_ns for s in samples], np.int64)
    quality = np.array([s.quality for s in samples], np.int8)
    if width:
        return times, np.stack([s.value for s in samples]).astype(np.float32), quality
    # A waveform that is Bad has an empty array.
    values = [s.value if isinstance(s.value, float) else np.nan for s in samples]
    return times, np.array(values, np.float64), quality


def pack(columns: Columns) -> bytes:
    """Put the columns of one tag into one frame: time deltas, qualities, values."""
    times, values, quality = columns
    raw = np.diff(times, prepend=0).tobytes() + quality.tobytes() + values.tobytes()
    return zstandard.ZstdCompressor(level=3).compress(raw)


def unpack(data: bytes, count: int, width: int) -> Columns:
    """Inverse of `pack`."""
    raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=count * (17 + 4 * width))
    times = np.cumsum(np.frombuffer(raw, np.int64, count))
    quality = np.frombuffer(raw, np.int8, count, 8 * count)
    if width:
        return times, np.frombuffer(raw, np.float32, count * width, 9 * count).reshape(count, width), quality
    return times, np.frombuffer(raw, np.float64, count, 9 * count), quality
