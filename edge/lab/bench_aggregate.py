"""`tundish bench aggregate`: from a journal's counted updates to the next model, beside plain sums of numpy.

Ours is what the aggregator does when a round closes: read each payload from the journal, decode it, add it with its
weight in float64, and make the model. Plain is `total += vector` over as many float32 vectors in memory. It runs in a
process of its own, so that its peak of resident memory is its own.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from broker.aggregate import MANY, hasten, next_model
from broker.journal import Journal
from broker.messages import Signer, Update, open_envelope
from broker.rate import floor_of
from models import codec
from models.delta import Vector

# A compact net's (4 bytes a value: 292,512 bytes), and what an update keeps of it once its share has narrowed.
_SIZE = 73_128
_KEEP = floor_of(_SIZE)
_FEW = 10
_VECTORS, _TURNS = 250, 5
_TASK, _TOPIC = "bench", "a/b/c/d/e/_fl/bench/update"


def measure(many: int = 1_000) -> dict[str, Any]:
    """Milliseconds for 1,000 of `many` updates, growth of peak memory from 10 to them, microseconds to verify one."""
    with tempfile.TemporaryDirectory(prefix="tundish-") as name:
        folder = Path(name)
        size = _fill(folder, many)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            growth = pool.submit(_growth, folder).result()
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            ours, plain = pool.submit(_times, folder, many).result()
    return {
        "ms_per_1000": round(ours, 1),
        "plain_ms_per_1000": round(plain, 1),
        "ratio": round(ours / plain, 2),
        "growth_mb": round(growth, 2),
        "verify_us": round(_verify(), 1),
        "bytes_per_update": round(size, 1),
        "parameters": _SIZE,
    }


def _delta(i: int) -> Vector:
    """Draw a delta as trained nets give them: a few large values among many small ones."""
    return np.random.default_rng(i).standard_t(4, _SIZE).astype(np.float32)


def _fill(folder: Path, many: int) -> float:
    """Count the updates of two rounds, of few gateways and of many; return their mean payload in bytes."""
    journal, sizes = Journal(folder), []
    for number, count in ((1, _FEW), (2, many)):
        with journal.transaction():
            for i in range(count):
                payload = codec.encode(_delta(i), codec.SPARSE, _KEEP).data
                sizes.append(len(payload))
                journal.count_update(
                    _TASK, number, f"g{i:04}", digest=bytes(32), samples=100 + i, metric=None, payload=payload, now_ms=0
                )
    journal.close()
    return sum(sizes) / len(sizes)


def _close(journal: Journal, number: int) -> None:
    base, shared = np.zeros(_SIZE, np.float32), np.ones(_SIZE, np.bool_)
    next_model("fedavg", b"", base, shared, journal.payloads(_TASK, number), momentum=0.7)


def _growth(folder: Path) -> float:
    journal = Journal(folder)
    peaks = []
    for number in (1, 2):
        _close(journal, number)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    journal.close()
    return (peaks[1] - peaks[0]) / 1024


def _times(folder: Path, many: int) -> tuple[float, float]:
    """Median milliseconds for 1,000 of ours and of plain, which take turns."""
    # What the aggregator itself does once so many gateways take part.
    if many >= MANY:
        hasten()
    journal, vectors = Journal(folder), [_delta(i) for i in range(_VECTORS)]

    def plain() -> None:
        total = np.zeros(_SIZE, np.float32)
        for i in range(many):
            total += vectors[i % _VECTORS]

    pairs = [(_seconds(lambda: _close(journal, 2)), _seconds(plain)) for _ in range(_TURNS)]
    journal.close()
    return median(a for a, _ in pairs) * 1e6 / many, median(b for _, b in pairs) * 1e6 / many


def _seconds(work: Callable[[], None]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _verify() -> float:
    """Median microseconds to verify the signature of an update and to take it apart."""
    signer = Signer.from_bytes(bytes(32))
    envelope = signer.seal(Update(1, 1, 0, 100, 0.5, codec.encode(_delta(0), codec.SPARSE, _KEEP).data, 0.5), _TOPIC)
    key = signer.public_key
    return median(_seconds(lambda: _open(envelope, key)) for _ in range(300)) * 1e6


def _open(envelope: bytes, key: bytes) -> None:
    open_envelope(envelope, _TOPIC, key, Update)
