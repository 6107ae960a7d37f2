"""Pure: samples -> windows float32 (C, T), with quality mask, machine-state gate and segments.

Time is the sources'. A row is the last value of every signal at one step of the grid; a row is closed once a later
sample proves that nothing more is due for it (the watermark), so windows do not depend on the order in which
concurrent sources deliver. The same rows come from stored samples (`stored_windows`), so what is trained on is what
was scored.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.tags import Quality, Sample
from models.spec import Window

Float = NDArray[np.float32]
Wide = NDArray[np.float64]
# Of one tag, oldest first: times (N,) ns, values (N,) or (N, width), qualities (N,).
Columns = tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.int8]]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_PIECE = 4096
_MOST_BEHIND = 64
# Late samples in a row that span this much source time say so as well; a few stragglers do not.
_LEAST_BEHIND, _BEHIND_NS = 8, 5_000_000_000
_CONDITION = re.compile(r"\s*(\S+)\s*(==|!=|<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)\s*")


class Condition(NamedTuple):
    """One comparison of a gate: a tag's ref, an operator, a number."""

    tag: str
    compare: str
    number: float


def parse_gate(text: str) -> tuple[Condition, ...]:
    """Parse `plc1/Running == 1 and plc1/Speed > 100`; ValueError says what is wrong."""
    out = []
    for part in re.split(r"\s+and\s+", text.strip()):
        match = _CONDITION.fullmatch(part)
        if not match:
            raise ValueError(f"{part!r} is no comparison")
        out.append(Condition(match[1], match[2], float(match[3])))
    return tuple(out)


@dataclass(frozen=True)
class Wiring:
    """Which tag is which: signals in the task's order, target, gate, segment (refs; None where there is none).

    `gains` and `offsets` bring a tag's unit to the task's, one for each signal and then the target; empty where all
    units are the task's own. Gate and segment stay in the tag's. `ranges` are low and high of each signal in the tag's
    unit, empty where no tag has any; a value outside is masked like one that is not good.
    """

    window: Window
    signals: tuple[str, ...]
    target: str | None = None
    gate: tuple[Condition, ...] = ()
    segment: str | None = None
    gains: tuple[float, ...] = ()
    offsets: tuple[float, ...] = ()
    ranges: tuple[tuple[float, float], ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Every ref once, the signals first."""
        extra = [self.target, *(c.tag for c in self.gate), self.segment]
        return tuple(dict.fromkeys([*self.signals, *(t for t in extra if t)]))

    @property
    def step_ns(self) -> int:
        """Nanoseconds of source time from one row to the next."""
        return round(1e9 / self.window.rate_hz)


class Win(NamedTuple):
    """One window. x (C, T) with NaN where a sample was not good; `quality` is the good share.

    `active`: the gate held all through. `label` is the target at the window's end, NaN when it is not good.
    """

    end_ns: int
    x: Float
    quality: float
    active: bool
    segment: float
    label: float


class _Rows:
    """Turn closed rows into windows; the rows come one by one or by the thousand."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.index = {ref: i for i, ref in enumerate(wiring.tags)}
        self.c, self.t = len(wiring.signals), wiring.window.length
        self.gains, self.offsets = np.array(wiring.gains), np.array(wiring.offsets)
        self.ranges = np.array(wiring.ranges)
        self.buffer = np.empty((max(4 * self.t, 256), len(self.index)))
        self.gap = 2 * self.t + 1
        self.fill, self.wait, self.segment = 0, self.t, math.nan

    def clear(self) -> None:
        """Begin again: the next window holds only rows from now on."""
        self.fill, self.wait = 0, self.t

    def push(self, end_ns: int, row: Wide) -> Win | None:
        """Take one row (all tags, NaN for not good); give the window that it completes."""
        if self.wiring.segment is not None:
            segment = float(row[self.index[self.wiring.segment]])
            # A segment tag that is Bad for a moment (a cut) does not start a new segment.
            if not math.isnan(segment) and segment != self.segment:
                self.segment = segment
                self.clear()
        if self.fill == len(self.buffer):
            self.buffer[: self.t - 1] = self.buffer[self.fill - self.t + 1 :]
            self.fill = self.t - 1
        self.buffer[self.fill] = row
        self.fill += 1
        self.wait -= 1
        if self.wait:
            return None
        self.wait = self.wiring.window.stride
        rows = self.buffer[self.fill - self.t : self.fill]
        x = self.convert(rows[:, : self.c].T)
        return Win(end_ns, x, _good_share(x), self.gate(rows), self.segment, self.label(row))

    def convert(self, x: NDArray[np.floating]) -> Float:
        """Mask what is out of range in signals (C, T), and bring them to the task's units."""
        if len(self.ranges):
            x = np.where((x >= self.ranges[:, :1]) & (x <= self.ranges[:, 1:]), x, np.nan)
        if len(self.gains):
            x = x * self.gains[: self.c, None] + self.offsets[: self.c, None]
        return np.ascontiguousarray(x, np.float32)

    def gate(self, rows: Wide) -> bool:
        """Whether the machine-state gate held in all rows; a gate tag that is not good does not hold."""
        for c in self.wiring.gate:
            column = rows[:, self.index[c.tag]]
            holds: NDArray[np.bool_] = _OPERATORS[c.compare](column, c.number)  # type: ignore[arg-type, assignment]
            # Of all comparisons, NaN passes "is not" alone.
            if not holds.all() or (c.compare == "!=" and np.isnan(column).any()):
                return False
        return True

    def label(self, row: Wide) -> float:
        """The target's value in a row, NaN without one."""
        if not self.wiring.target:
            return math.nan
        value = float(row[self.index[self.wiring.target]])
        return value * self.wiring.gains[-1] + self.wiring.offsets[-1] if self.wiring.gains else value


def _good_share(x: Float) -> float:
    return int(np.count_nonzero(np.isfinite(x))) / x.size


@dataclass
class Windower:
    """The live half: feed it samples as they come, from any source, and take the windows.

    `lag_ns` is how long (source time) a row waits for a source that has gone quiet. Samples that come later than
    that are counted in `late` and hold from then on. When nothing but late samples comes for some seconds, the sources'
    clock was set back (or a first stamp was wrong): the windows begin again on the new time, counted in `restarts`.
    """

    wiring: Wiring
    lag_ns: int = 2_000_000_000
    late: int = 0
    restarts: int = 0
    _pending: list[Sample] = field(default_factory=list)
    _newest: dict[str, int] = field(default_factory=dict)
    _done_ns: int = -1

    def __post_init__(self) -> None:
        self._rows = _Rows(self.wiring)
        self._wanted = frozenset(self.wiring.tags)
        self._latest = np.full(len(self._rows.index), np.nan)
        self._arrays: dict[str, tuple[int, Float]] = {}
        self._row = self._due = -1  # the last row that was closed; the row that the last sample first counts in
        # Late samples in a row, and how many say that a clock was set back: more than one old value of each tag.
        self._behind, self._most_behind = 0, max(_MOST_BEHIND, 8 * len(self._wanted))
        self._behind_from = self._behind_to = 0
        # A source that has not said anything yet is waited for like one that has gone quiet.
        self._newest = dict.fromkeys((ref.partition("/")[0] for ref in self.wiring.tags), -1)

    @property
    def closed_ns(self) -> int:
        """Source time up to which rows are closed; -1 before the first."""
        return self._done_ns

    def feed(self, samples: Iterable[Sample]) -> list[Win]:
        """Take a batch; return the windows that are now complete, in time order."""
        newest = self._newest
        for sample in samples:
            if sample.tag in self._wanted:
                self._pending.append(sample)
                if sample.time_ns < self._done_ns:
                    self._count(sample.time_ns)
                else:
                    self._behind = 0
                source = sample.tag.partition("/")[0]
                newest[source] = max(newest[source], sample.time_ns)
        span_ns = self._behind_to - self._behind_from
        if self._behind > self._most_behind or (self._behind >= _LEAST_BEHIND and span_ns > _BEHIND_NS):
            self._restart()
        return self._run(self._watermark())

    def _count(self, time_ns: int) -> None:
        """Count late samples in a row, and how far in time they reach."""
        if not self._behind:
            self._behind_from = time_ns
        self._behind, self._behind_to = self._behind + 1, time_ns

    def _restart(self) -> None:
        """Begin again on the sources' new time, with the values held."""
        # The wrong stamps first: what came later on the new time is the newer value.
        for sample in sorted(self._pending, key=lambda s: (s.time_ns < self._done_ns, s.time_ns)):
            self._apply(sample, [])
        self.late += len(self._pending)
        self._pending.clear()
        self._newest = dict.fromkeys(self._newest, -1)
        self._done_ns = self._row = self._due = -1
        self._rows.clear()
        self._behind = 0
        self.restarts += 1

    def advance(self, elapsed_ns: int) -> list[Win]:
        """Say that nothing has come for `elapsed_ns`: rows older than the lag are closed with the values held."""
        newest = max(self._newest.values())
        return self._run(newest + elapsed_ns - self.lag_ns) if newest >= 0 else []

    def _watermark(self) -> int:
        return max(min(self._newest.values()), max(self._newest.values()) - self.lag_ns)

    def _run(self, until_ns: int) -> list[Win]:
        """Apply samples older than the watermark and close the rows before it."""
        until_ns = max(until_ns, self._done_ns)
        due = [s for s in self._pending if s.time_ns < until_ns]
        if due:
            self._pending = [s for s in self._pending if s.time_ns >= until_ns]
            # Stable by time; at one instant scalars come before the waveform that they describe.
            due.sort(key=lambda s: (s.time_ns, not isinstance(s.value, float)))
        out: list[Win] = []
        closed_ns = None
        for sample in due:
            if sample.time_ns < self._done_ns:
                self.late += 1
            # Of a row's samples, which share their time, the first closes what is before them.
            if not self.wiring.window.waveform and sample.time_ns != closed_ns:
                closed_ns = sample.time_ns
                out += self._close(closed_ns)
            self._apply(sample, out)
        if not self.wiring.window.waveform and self._row >= 0:
            out += self._close(until_ns)
        self._done_ns = until_ns
        return out

    def _apply(self, sample: Sample, out: list[Win]) -> None:
        good = sample.quality is Quality.GOOD
        column = self._rows.index[sample.tag]
        self._due = -(-sample.time_ns // self.wiring.step_ns)
        if isinstance(sample.value, float):
            self._latest[column] = sample.value if good else np.nan
        elif good and column < self._rows.c:
            self._arrays[sample.tag] = (sample.time_ns, sample.value)
            if self.wiring.window.waveform:
                out += self._waveform()

    def _waveform(self) -> list[Win]:
        """A window once every waveform signal has an array of one source time; the arrays are then used up."""
        if len(self._arrays) < self._rows.c:
            return []
        times = {t for t, _ in self._arrays.values()}
        if len(times) > 1:
            return []
        x = self._rows.convert(np.stack([self._arrays[ref][1] for ref in self.wiring.signals]))
        self._arrays.clear()
        row = self._latest
        segment = float(row[self._rows.index[self.wiring.segment]]) if self.wiring.segment else math.nan
        quality = _good_share(x)
        active = self._rows.gate(row[None])
        return [Win(times.pop(), x, quality, active, segment, self._rows.label(row))]

    def _close(self, until_ns: int) -> list[Win]:
        """Close every row whose time is before `until_ns`."""
        last = (until_ns - 1) // self.wiring.step_ns
        out: list[Win] = []
        if self._row < 0 or last - self._row > self._rows.gap:
            # The first samples, or a gap longer than two windows: no window spans it.
            self._push(self._due, out)
            self._rows.clear()
            self._row = last
        self._push(last, out)
        return out

    def _push(self, last: int, out: list[Win]) -> None:
        while self._row < last:
            self._row += 1
            window = self._rows.push(self._row * self.wiring.step_ns, self._latest)
            if window is not None:
                out.append(window)


def stored_windows(wiring: Wiring, columns: Mapping[str, Columns]) -> Iterable[Win]:
    """Make the windows of stored samples, oldest first; tags without samples may be missing from `columns`.

    The same windows as the live half gives for the same samples, but for stretches longer than two windows in which
    nothing at all was reported: those are scored live with the values held, and are not trained on.
    """
    rows = _Rows(wiring)
    if wiring.window.waveform:
        yield from _stored_waveforms(rows, columns)
        return
    times = [columns[ref][0] for ref in wiring.tags if ref in columns and len(columns[ref][0])]
    if not times:
        return
    step = wiring.step_ns
    due = np.unique(-(-np.concatenate(times) // step))  # the row that each sample first counts in
    last = (int(max(t[-1] for t in times)) - 1) // step
    breaks = np.nonzero(np.diff(due) > rows.gap)[0] + 1
    for first, after in pairwise([0, *breaks.tolist(), len(due)]):
        rows.clear()
        for start in range(int(due[first]), min(int(due[after - 1]), last) + 1, _PIECE):
            numbers = np.arange(start, min(start + _PIECE, int(due[after - 1]) + 1, last + 1))
            table = _held(rows, columns, numbers * step)
            for number, row in zip(numbers.tolist(), table, strict=True):
                window = rows.push(number * step, row)
                if window is not None:
                    yield window


def _held(rows: _Rows, columns: Mapping[str, Columns], times: NDArray[np.int64]) -> Wide:
    """The last value of every scalar tag at each time, NaN where it was not good: (len(times), tags)."""
    out = np.full((len(times), len(rows.index)), np.nan)
    for ref, i in rows.index.items():
        if ref not in columns or columns[ref][1].ndim > 1:
            continue
        t, values, quality = columns[ref]
        at = np.searchsorted(t, times, side="right") - 1
        known = (at >= 0) & (quality[at] == Quality.GOOD) if len(t) else np.zeros(len(times), np.bool_)
        out[known, i] = values[at[known]]
    return out


def _stored_waveforms(rows: _Rows, columns: Mapping[str, Columns]) -> Iterable[Win]:
    signals = rows.wiring.signals
    if any(ref not in columns for ref in signals):
        return
    good = [
        (columns[r][0][columns[r][2] == Quality.GOOD], columns[r][1][columns[r][2] == Quality.GOOD]) for r in signals
    ]
    common = good[0][0]
    for t, _ in good[1:]:
        common = np.intersect1d(common, t)
    for start in range(0, len(common), _PIECE):
        times = common[start : start + _PIECE]
        table = _held(rows, columns, times)
        picks = [values[np.searchsorted(t, times)] for t, values in good]
        for i, end_ns in enumerate(times.tolist()):
            x = rows.convert(np.stack([p[i] for p in picks]))
            segment = float(table[i, rows.index[rows.wiring.segment]]) if rows.wiring.segment else math.nan
            quality = float(np.isfinite(x).mean())
            yield Win(end_ns, x, quality, rows.gate(table[i : i + 1]), segment, rows.label(table[i]))
