"""Drift: how far each signal's values have moved from those that a gateway was trained on.

The population stability index (PSI; Siddiqi 2006, "Credit Risk Scorecards", section 7) compares two histograms of one
signal over the deciles of the older: the sum of (new - old) * ln(new / old) over the bins' shares. By custom, below
0.1 nothing has changed, above 0.25 much has. It has noise of its own: without any change it is about
(1 / N + 1 / M) * chi-squared with bins - 1 degrees of freedom, N and M being the samples of the two (Yurdakul and
Naranjo 2020, "Statistical properties of the population stability index"), so below the upper 0.1 % of that nothing is
said.

Values are those that the net sees: of a task that normalises each window by itself, the normalised ones. Else
normalising is monotone and leaves the bins as they are, so raw ones are counted.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from models.scale import FLAT, Scale
from models.spec import Task

Windows = NDArray[np.float32]
_BINS = 10
# The upper 0.1 % of chi-squared with 9 degrees of freedom.
_CHANCE = 27.88
# Values of a window that are counted: of all signals together, and of one.
_MOST, _MOST_OF_ONE = 512, 64
_PIECE = 256
# Added to every count, so that an empty bin has a logarithm.
_PRIOR = 0.5


@dataclass(frozen=True)
class Reference:
    """Histograms of the windows of one training, and how many there were.

    For each signal the edges between its bins, ascending, and the count of each bin, one more; a value on an edge is
    below it. Both are empty for a signal that had no value.
    """

    windows: int
    edges: tuple[tuple[float, ...], ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def learn(cls, task: Task, x: Windows) -> "Reference":
        """Learn from raw windows (N, C, T) with NaN where masked."""
        pieces = [picked(task, x[i : i + _PIECE]) for i in range(0, len(x), _PIECE)]
        seen = np.concatenate(pieces) if pieces else np.empty((0, task.channels, 0), np.float32)
        edges, counts = list[tuple[float, ...]](), list[tuple[int, ...]]()
        for c in range(task.channels):
            values = _finite(seen[:, c])
            cuts = _edges(values) if values.size else np.empty(0)
            edges.append(tuple(cuts.tolist()))
            counts.append(tuple(_histogram(cuts, values).tolist()) if values.size else ())
        return cls(len(x), tuple(edges), tuple(counts))

    def psi(self, newest: Windows) -> NDArray[np.float64]:
        """PSI of each signal (C,) in what `picked` gave of the newest windows (N, C, K); NaN for one without values."""
        out = np.full(len(self.edges), np.nan)
        for c, (edges, counts) in enumerate(zip(self.edges, self.counts, strict=True)):
            values = _finite(newest[:, c])
            if values.size and counts:
                old = _shares(np.array(counts))
                new = _shares(_histogram(np.array(edges), values))
                out[c] = ((new - old) * np.log(new / old)).sum()
        return out

    def chance(self, count: int) -> float:
        """The PSI that `count` windows pass by chance once in a thousand times, without any change."""
        return _CHANCE * (1 / max(count, 1) + 1 / max(self.windows, 1))

    def to_json(self) -> bytes:
        """For the gateway's own state."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Reference":
        """Inverse of `to_json`."""
        found = json.loads(data)
        edges, counts = (tuple(tuple(row) for row in found[key]) for key in ("edges", "counts"))
        return cls(found["windows"], edges, counts)


def picked(task: Task, x: Windows) -> Windows:
    """Pick of raw windows (N, C, T) the values that are counted (N, C, K).

    Of windows that overlap, each row is counted once: in the window that it is new in. Of many values, a few that are
    spread evenly.
    """
    if task.normalise == "window":
        x = Scale((), ()).inputs(task, x)
    length = x.shape[2]
    fresh = length if task.window.waveform else min(task.window.stride, length)
    return x.take(_rows(length, fresh, min(fresh, _MOST_OF_ONE, max(1, _MOST // task.channels))), axis=2)


@cache
def _rows(length: int, fresh: int, count: int) -> NDArray[np.intp]:
    """Pick so many of the last `fresh` rows."""
    return length - 1 - np.arange(count) * fresh // count


def _finite(values: Windows) -> NDArray[np.float64]:
    return values[np.isfinite(values)].astype(np.float64)


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The deciles; where values repeat there are fewer, and what is less than all of them has a bin of its own."""
    low, high = float(values.min()), float(values.max())
    room = FLAT * max(1.0, abs(low))
    if high - low <= room:
        return np.array([low - room, high + room])
    cuts = np.unique(np.quantile(values, np.arange(1, _BINS) / _BINS, method="lower"))
    return np.append(low - room, cuts) if cuts[0] == low else cuts


def _histogram(edges: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)


def _shares(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = (counts + _PRIOR) / (counts.sum() + _PRIOR * len(counts))
    return shares
