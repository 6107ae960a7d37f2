"""Blocks of the sample ring: the samples of one tag as columns in one zstd frame."""

from collections.abc import Sequence

import numpy as np
import zstandard

from edge.tags import Sample
from edge.window import Columns


def pack(samples: Sequence[Sample], width: int) -> bytes:
    """Columns of one tag: time deltas int64, values float64 (or float32 waveforms), qualities int8, in one frame."""
    times = np.array([s.time_ns for s in samples], np.int64)
    quality = np.array([s.quality for s in samples], np.int8)
    if width:
        values = np.stack([s.value for s in samples]).astype(np.float32).tobytes()
    else:  # a waveform that is Bad has an empty array
        values = np.array([s.value if isinstance(s.value, float) else np.nan for s in samples], np.float64).tobytes()
    raw = np.diff(times, prepend=0).tobytes() + quality.tobytes() + values
    return zstandard.ZstdCompressor(level=3).compress(raw)


def unpack(data: bytes, count: int, width: int) -> Columns:
    """Inverse of `pack`."""
    raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=count * (17 + 4 * width))
    times = np.cumsum(np.frombuffer(raw, np.int64, count))
    quality = np.frombuffer(raw, np.int8, count, 8 * count)
    if width:
        return times, np.frombuffer(raw, np.float32, count * width, 9 * count).reshape(count, width), quality
    return times, np.frombuffer(raw, np.float64, count, 9 * count), quality
