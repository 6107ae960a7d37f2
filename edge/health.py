"""Per-tag health: how often a tag says something, what share of it is bad, whether it has fallen silent or is stuck.

Everything is learnt from the tag itself, so nothing has to be configured: a value that changed every few seconds and
has not for twenty times as long is stuck, one that never changes is a constant. Times are the sources'. The counts are
kept by the store's writer, which has the samples as columns anyway, and for several flushes at a time, so that a sample
costs next to no work of its own.
"""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.flush import Part
from edge.history import joined
from edge.tags import Quality, Tag
from edge.window import Columns

# A tag must have been heard, or have changed, this often before a pause of it means something.
_KNOWN = 20
# How many times its usual interval a pause is, and at least how long (seconds).
_TIMES, _LEAST_S = 20.0, 30.0
# Share of the newest flush in a running mean: a Bad ratio is that of the last hundred flushes or so.
_DECAY = 0.02
_FLUSHES = 8  # of a tag, counted at a time
_MOST_BAD = 0.5
# Tags of a source in one message: 200 bytes each, and brokers take 256 KiB.
MOST_SHOWN = 500


@dataclass(slots=True)
class TagHealth:
    """One tag since the start; intervals and times in nanoseconds of source time, ratios 0 to 1."""

    samples: int = 0
    bad: int = 0
    bad_ratio: float = 0.0
    out_of_range: int = 0
    gaps: int = 0
    last: float = math.nan
    last_ns: int = 0
    changed_ns: int = 0
    changes: int = 0
    interval_ns: float = 0.0
    change_ns: float = 0.0

    def take(self, columns: Columns, low: float, high: float, flushes: int = 1) -> None:
        """Count a tag's flushes: times (N,) ns, values (N,) or (N, width), qualities (N,)."""
        share = 1 - (1 - _DECAY) ** flushes
        times, values, quality = columns
        good = quality == Quality.GOOD
        bad = len(times) - int(np.count_nonzero(good))
        self.bad += bad
        self.bad_ratio = _mean(self.bad_ratio, bad / len(times), self.samples, share)
        self.samples += len(times)
        steps = _steps(times, int(times[0]) if self.last_ns == 0 else self.last_ns)
        steps = steps[steps > 0]
        if len(steps):
            if self.samples > _KNOWN:
                self.gaps += int(np.count_nonzero(steps > self._pause(self.interval_ns)))
            self.interval_ns = _mean(self.interval_ns, float(np.sort(steps)[len(steps) // 2]), self.interval_ns, share)
        self.last_ns = int(times[-1])  # an earlier one that was newer was wrong
        if values.ndim == 1 and bad < len(times):
            times, values = (times[good], values[good]) if bad else (times, values)
            self._values(times, values, low, high, share)

    def _values(
        self, times: NDArray[np.int64], values: NDArray[np.floating], low: float, high: float, share: float
    ) -> None:
        self.out_of_range += int(np.count_nonzero((values < low) | (values > high)))
        moved = times[_steps(values, self.last) != 0]
        if len(moved):
            before = self.changed_ns or int(moved[0])
            pace = (int(moved[-1]) - before) / len(moved)
            if pace > 0:
                self.change_ns = _mean(self.change_ns, pace, self.change_ns, share)
            self.changes += len(moved)
            self.changed_ns = int(moved[-1])
        self.last = float(values[-1])

    def word(self, now_ns: int) -> str:
        """Say what is wrong with the tag at a source time: `bad`, `silent`, `stuck`, or nothing."""
        if self.samples and self.bad_ratio > _MOST_BAD:
            return "bad"
        if self.samples > _KNOWN and now_ns - self.last_ns > self._pause(self.interval_ns):
            return "silent"
        if self.changes > _KNOWN and self.last_ns - self.changed_ns > self._pause(self.change_ns):
            return "stuck"
        return ""

    def snapshot(self, now_ns: int) -> dict[str, object]:
        """What status and the `_health` topic show; plain JSON types."""
        return {
            "samples": self.samples,
            "rate_hz": round(1e9 / self.interval_ns, 3) if self.interval_ns else None,
            "bad_ratio": round(self.bad_ratio, 4),
            "out_of_range": self.out_of_range,
            "gaps": self.gaps,
            "age_s": round((now_ns - self.last_ns) / 1e9, 1) if self.last_ns else None,
            "unchanged_s": round((self.last_ns - self.changed_ns) / 1e9, 1) if self.changed_ns else None,
            "word": self.word(now_ns),
        }

    @staticmethod
    def _pause(usual_ns: float) -> float:
        """The pause that is too long for something usually so often."""
        return max(_TIMES * usual_ns, _LEAST_S * 1e9)


@dataclass
class Watch:
    """The health of every tag of a gateway. `take` runs in the store's writer, the rest in the event loop."""

    tags: dict[str, Tag]
    _health: dict[str, TagHealth] = field(default_factory=dict)
    _waiting: dict[tuple[str, ...], list[Part]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, part: Part) -> None:
        """Take one flush of a tag, or of tags that are read together."""
        with self._lock:
            before = self._waiting.get(part.refs)
            # A waveform that was Bad is a column of its own, and its width may change.
            if before and before[-1].columns[1].shape[1:] != part.columns[1].shape[1:]:
                self._count(part.refs)
            waiting = self._waiting.setdefault(part.refs, [])
            waiting.append(part)
            if len(waiting) >= _FLUSHES:
                self._count(part.refs)

    def _count(self, refs: tuple[str, ...]) -> None:
        """Count what waits of some tags, a tag's flushes together."""
        parts = self._waiting.pop(refs)
        for i, ref in enumerate(refs):
            if tag := self.tags.get(ref):
                columns = parts[0].of(i) if len(parts) == 1 else joined([part.of(i) for part in parts])
                self._health.setdefault(ref, TagHealth()).take(columns, tag.low, tag.high, len(parts))

    def _count_all(self) -> None:
        for refs in list(self._waiting):
            self._count(refs)

    def retag(self, tags: dict[str, Tag], changed: Iterable[str]) -> None:
        """Watch other tags from now on; those that went, or mean something else, are learnt anew."""
        with self._lock:
            self._count_all()
            for ref in (*self.tags.keys() - tags.keys(), *changed):
                self._health.pop(ref, None)
            self.tags = tags

    def snapshot(self, source: str, now_ns: int) -> dict[str, dict[str, object]]:
        """Tag name -> its health, of a source's tags that have said something; the unwell first, MOST_SHOWN at most."""
        with self._lock:
            self._count_all()
            found = [
                (tag.name, one.snapshot(now_ns))
                for ref, one in self._health.items()
                if (tag := self.tags.get(ref)) and tag.source == source
            ]
        found.sort(key=lambda pair: not (pair[1]["word"] or pair[1]["out_of_range"]))
        return dict(found[:MOST_SHOWN])


def _mean(before: float, now: float, known: float, share: float) -> float:
    """Running mean: the first value as it is, later ones by a small share."""
    return before + share * (now - before) if known else now


def _steps(column: NDArray[Any], before: float) -> NDArray[Any]:
    """Each number minus the one before it: np.diff with `prepend`, at a fifth of its cost for a few numbers."""
    steps = np.empty_like(column)
    steps[0] = column[0] - before
    np.subtract(column[1:], column[:-1], out=steps[1:])
    return steps
