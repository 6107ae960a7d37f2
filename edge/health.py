"""Per-tag health: how often a tag says something, what share of it is bad, whether it has fallen silent or is stuck.

Everything is learnt from the tag itself, so nothing has to be configured: a value that changed every few seconds and
has not for twenty times as long is stuck, one that never changes is a constant. Times are the sources'. The counts are
kept by the store's writer, which has the samples as columns anyway, and for several flushes at a time, so that a sample
costs next to no work of its own.
"""

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.flush import Part
from edge.history import LAST_NS
from edge.tags import Quality, Tag
from edge.window import Columns

Wide = NDArray[np.float64]
Rows = NDArray[np.intp]

# A tag must have been heard, or have changed, this often before a pause of it means something.
_KNOWN = 20
# How many times its usual interval a pause is, and at least how long (seconds).
_TIMES, _LEAST_S = 20.0, 30.0
# Share of the newest flush in a running mean: a Bad ratio is that of the last hundred flushes or so.
_DECAY = 0.02
_FLUSHES = 8  # of a tag, counted at a time
_MOST_BAD = 0.5
_GOOD = Quality.GOOD
# Tags of a source in one message: 200 bytes each, and brokers take 256 KiB.
MOST_SHOWN = 500


class Table:
    """Tags since the start, a row each; intervals and times in nanoseconds of source time, ratios 0 to 1."""

    def __init__(self, low: Sequence[float], high: Sequence[float]) -> None:
        self.low, self.high = np.array(low, np.float64), np.array(high, np.float64)
        count = len(self.low)
        self.samples, self.bad, self.out_of_range, self.gaps, self.changes, self.last_ns, self.changed_ns = (
            np.zeros(count, np.int64) for _ in range(7)
        )
        self.bad_ratio, self.interval_ns, self.change_ns = (np.zeros(count) for _ in range(3))
        self.last = np.full(count, np.nan)

    def keep(self, rows: Sequence[int], other: "Table", theirs: Sequence[int]) -> None:
        """Go on with what another table counted of some tags."""
        for name, column in vars(self).items():
            if name not in {"low", "high"}:
                column[rows] = vars(other)[name][theirs]

    def take(self, rows: Rows, table: Columns, flushes: int) -> None:
        """Count some flushes of K tags: times (K, N) ns, values (K, N) or (K, N, width), qualities (K, N)."""
        share = 1 - (1 - _DECAY) ** flushes
        times, values, quality = table
        count = times.shape[1]
        good = quality == _GOOD
        bad = count - np.count_nonzero(good, axis=1)
        self.bad[rows] += bad
        self.bad_ratio[rows] = _mean(self.bad_ratio[rows], bad / count, self.samples[rows], share)
        self.samples[rows] += count
        self._intervals(rows, times, share)
        if values.ndim > times.ndim:  # waveforms have no one value
            return
        if not bad.any():
            self._values(rows, times, values, share)
            return
        for i in np.flatnonzero(bad < count):
            one = rows[i : i + 1]
            self._values(one, times[i : i + 1, good[i]], values[i : i + 1, good[i]], share)

    def _intervals(self, rows: Rows, times: NDArray[np.int64], share: float) -> None:
        before = self.last_ns[rows]
        steps = _steps(times, np.where(before == 0, times[:, 0], before))
        onward = steps > 0
        count = np.count_nonzero(onward, axis=1)
        usual = self.interval_ns[rows]
        gaps = np.count_nonzero(onward & (steps > _pause(usual)[:, None]), axis=1)
        self.gaps[rows] += np.where(self.samples[rows] > _KNOWN, gaps, 0)
        ordered = np.sort(np.where(onward, steps, LAST_NS), axis=1)
        middle = np.take_along_axis(ordered, (count // 2)[:, None].clip(max=steps.shape[1] - 1), 1)[:, 0]
        self.interval_ns[rows] = np.where(count > 0, _mean(usual, middle, usual, share), usual)
        self.last_ns[rows] = times[:, -1]  # an earlier one that was newer was wrong

    def _values(self, rows: Rows, times: NDArray[np.int64], values: NDArray[np.floating], share: float) -> None:
        outside = (values < self.low[rows, None]) | (values > self.high[rows, None])
        self.out_of_range[rows] += np.count_nonzero(outside, axis=1)
        moved = _steps(values, self.last[rows]) != 0
        self.last[rows] = values[:, -1]
        count = np.count_nonzero(moved, axis=1)
        if not count.all():
            some = np.flatnonzero(count)
            rows, times, moved, count = rows[some], times[some], moved[some], count[some]
        each = np.arange(len(rows))
        first, last = times[each, moved.argmax(1)], times[each, -1 - moved[:, ::-1].argmax(1)]
        before, usual = self.changed_ns[rows], self.change_ns[rows]
        pace = (last - np.where(before == 0, first, before)) / count
        self.change_ns[rows] = np.where(pace > 0, _mean(usual, pace, usual, share), usual)
        self.changes[rows] += count
        self.changed_ns[rows] = last

    def word(self, row: int, now_ns: int) -> str:
        """Say what is wrong with a tag at a source time: `bad`, `silent`, `stuck`, or nothing."""
        if self.samples[row] and self.bad_ratio[row] > _MOST_BAD:
            return "bad"
        if self.samples[row] > _KNOWN and now_ns - self.last_ns[row] > _pause(self.interval_ns[row]):
            return "silent"
        if self.changes[row] > _KNOWN and self.last_ns[row] - self.changed_ns[row] > _pause(self.change_ns[row]):
            return "stuck"
        return ""

    def snapshot(self, row: int, now_ns: int) -> dict[str, object]:
        """What status and the `_health` topic show of a tag; `value` is the last good one; plain JSON types."""
        last_ns, changed_ns, interval_ns = int(self.last_ns[row]), int(self.changed_ns[row]), self.interval_ns[row]
        return {
            "value": round(float(self.last[row]), 9) if np.isfinite(self.last[row]) else None,
            "samples": int(self.samples[row]),
            "rate_hz": round(float(1e9 / interval_ns), 3) if interval_ns else None,
            "bad_ratio": round(float(self.bad_ratio[row]), 4),
            "out_of_range": int(self.out_of_range[row]),
            "gaps": int(self.gaps[row]),
            "age_s": round((now_ns - last_ns) / 1e9, 1) if last_ns else None,
            "unchanged_s": round((last_ns - changed_ns) / 1e9, 1) if changed_ns else None,
            "word": self.word(row, now_ns),
        }


class Watch:
    """The health of every tag of a gateway. `take` runs in the store's writer, the rest in the event loop."""

    def __init__(self, tags: dict[str, Tag]) -> None:
        self._waiting: dict[tuple[str, ...], list[Part]] = {}
        self._lock = threading.Lock()
        self._begin(tags)

    def _begin(self, tags: dict[str, Tag]) -> None:
        self.tags, self._row = tags, {ref: row for row, ref in enumerate(tags)}
        self._table = Table([tag.low for tag in tags.values()], [tag.high for tag in tags.values()])

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
        """Count what waits of some tags."""
        parts = self._waiting.pop(refs)
        known = [place for place, ref in enumerate(refs) if ref in self._row]
        if not known:
            return
        # Of each column a table: a row for each tag, all its flushes one after the other.
        times, values, quality = (
            np.concatenate([c.reshape(len(refs), -1, *c.shape[1:]) for c in column], axis=1)[known]
            for column in zip(*(part.columns for part in parts), strict=True)
        )
        rows = np.array([self._row[refs[place]] for place in known], np.intp)
        self._table.take(rows, (times, values, quality), len(parts))

    def _count_all(self) -> None:
        for refs in list(self._waiting):
            self._count(refs)

    def retag(self, tags: dict[str, Tag], changed: Iterable[str]) -> None:
        """Watch other tags from now on; those that went, or mean something else, are learnt anew."""
        with self._lock:
            self._count_all()
            before, rows = self._table, self._row
            self._begin(tags)
            kept = [ref for ref in self._row.keys() & rows.keys() if ref not in set(changed)]
            self._table.keep([self._row[ref] for ref in kept], before, [rows[ref] for ref in kept])

    def snapshot(self, source: str, now_ns: int) -> dict[str, dict[str, object]]:
        """Tag name -> its health, of a source's tags that have said something; the unwell first, MOST_SHOWN at most."""
        with self._lock:
            self._count_all()
            found = [
                (tag.name, self._table.snapshot(row, now_ns))
                for ref, row in self._row.items()
                if (tag := self.tags[ref]).source == source and self._table.samples[row]
            ]
        found.sort(key=lambda pair: not (pair[1]["word"] or pair[1]["out_of_range"]))
        return dict(found[:MOST_SHOWN])


def _mean(before: Wide, now: Wide, known: NDArray[Any], share: float) -> Wide:
    """Running mean: the first value as it is, later ones by a small share."""
    return np.where(known == 0, now, before + share * (now - before))


def _steps(rows: NDArray[Any], before: NDArray[Any]) -> NDArray[Any]:
    """Each number of a row (K, N) minus the one before it, the first minus `before` (K,)."""
    return np.diff(rows, axis=1, prepend=before[:, None])


def _pause(usual_ns: Any) -> Any:
    """The pause that is too long for something usually so often, nanoseconds."""
    return np.maximum(_TIMES * usual_ns, _LEAST_S * 1e9)
