"""Pure: samples -> windows float32 (C, T), with quality mask, machine-state gate and segments.

Time is the sources'. A row is the last value of every signal at one step of the grid; a row is closed once a later
sample proves that nothing more is due for it (the watermark), so windows do not depend on the order in which
concurrent sources deliver. The same rows come from stored samples (`edge.stored`), so what is trained on is what
was scored.
"""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge.tags import Quality, Sample, Scan
from models.spec import Window

Float = NDArray[np.float32]
Wide = NDArray[np.float64]
# Of one tag, oldest first: times (N,) ns, values (N,) or (N, width), qualities (N,).
Columns = tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.int8]]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
# Looking it up in the enum each time costs as much as all else that is done with a sample.
_GOOD = Quality.GOOD
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


class Rows:
    """Turns closed rows into windows; the rows come one by one or by the thousand. `index` is each tag's column."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.index = {ref: i for i, ref in enumerate(wiring.tags)}
        self.c, self.t = len(wiring.signals), wiring.window.length
        self.gains, self.offsets = np.array(wiring.gains), np.array(wiring.offsets)
        self.ranges = np.array(wiring.ranges)
        self.buffer = np.empty((max(4 * self.t, 256), len(self.index)))
        self.gap = 2 * self.t + 1
        self.fill, self.wait, self.segment = 0, self.t, math.nan
        # In how many of the newest rows the gate held without a break.
        self.held = 0

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
        self.held = self.held + 1 if self.gate(row) else 0
        self.wait -= 1
        if self.wait:
            return None
        self.wait = self.wiring.window.stride
        x = self.convert(self.buffer[self.fill - self.t : self.fill, : self.c].T)
        return Win(end_ns, x, good_share(x), self.held >= self.t, self.segment, self.label(row))

    def convert(self, x: NDArray[np.floating]) -> Float:
        """Mask what is out of range in signals (C, T), and bring them to the task's units."""
        if len(self.ranges):
            x = np.where((x >= self.ranges[:, :1]) & (x <= self.ranges[:, 1:]), x, np.nan)
        if len(self.gains):
            x = x * self.gains[: self.c, None] + self.offsets[: self.c, None]
        return np.ascontiguousarray(x, np.float32)

    def gate(self, row: Wide) -> bool:
        """Whether the machine-state gate holds in a row; a gate tag that is not good does not hold."""
        for tag, compare, number in self.wiring.gate:
            value = float(row[self.index[tag]])
            # Of all comparisons, NaN passes "is not" alone.
            if value != value or not OPERATORS[compare](value, number):  # noqa: PLR0124 - quicker than math.isnan
                return False
        return True

    def label(self, row: Wide) -> float:
        """The target's value in a row, NaN without one."""
        if not self.wiring.target:
            return math.nan
        value = float(row[self.index[self.wiring.target]])
        return value * self.wiring.gains[-1] + self.wiring.offsets[-1] if self.wiring.gains else value


class _Row(NamedTuple):
    """What a scan says of the wired tags: values (n,), NaN for not good, of some columns of a row."""

    time_ns: int
    columns: NDArray[np.intp]
    values: Wide


def _count(one: Sample | _Row) -> int:
    return len(one.columns) if isinstance(one, _Row) else 1


def _order(one: Sample | _Row) -> tuple[int, bool]:
    """Stable by time; at one instant scalars come before the waveform that they describe."""
    return one.time_ns, not isinstance(one, _Row) and not isinstance(one.value, float)


def good_share(x: Float) -> float:
    """Return the share of a window's values that are there."""
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
    _pending: list[Sample | _Row] = field(default_factory=list)
    _newest: dict[str, int] = field(default_factory=dict)
    _done_ns: int = -1

    def __post_init__(self) -> None:
        self._rows = Rows(self.wiring)
        # The source of each wired tag.
        self._source = {ref: ref.partition("/")[0] for ref in self.wiring.tags}
        self._latest = np.full(len(self._rows.index), np.nan)
        self._step_ns = self.wiring.step_ns
        # Of the tags read together last: their places in a scan, and their columns in a row.
        self._scanned: tuple[str, ...] = ()
        self._places = np.empty((2, 0), np.intp)
        self._arrays: dict[str, tuple[int, Float]] = {}
        self._row = self._due = -1  # the last row that was closed; the row that the last sample first counts in
        # Late samples in a row, and how many say that a clock was set back: more than one old value of each tag.
        self._behind, self._most_behind = 0, max(_MOST_BEHIND, 8 * len(self._source))
        self._behind_from = self._behind_to = 0
        # A source that has not said anything yet is waited for like one that has gone quiet.
        self._newest = dict.fromkeys(self._source.values(), -1)

    @property
    def closed_ns(self) -> int:
        """Source time up to which rows are closed; -1 before the first."""
        return self._done_ns

    def feed(self, samples: Iterable[Sample]) -> list[Win]:
        """Take a batch; return the windows that are now complete, in time order."""
        newest = self._newest
        if isinstance(samples, Scan):
            self._take_scan(samples)
            samples = ()
        for sample in samples:
            source = self._source.get(sample.tag)
            if source is not None:
                self._pending.append(sample)
                if sample.time_ns < self._done_ns:
                    self._late(sample.time_ns, 1)
                else:
                    self._behind = 0
                newest[source] = max(newest[source], sample.time_ns)
        span_ns = self._behind_to - self._behind_from
        if self._behind > self._most_behind or (self._behind >= _LEAST_BEHIND and span_ns > _BEHIND_NS):
            self._restart()
        return self._run(self._watermark())

    def _late(self, time_ns: int, count: int) -> None:
        """Count late samples in a row, and how far in time they reach."""
        if not self._behind:
            self._behind_from = time_ns
        self._behind, self._behind_to = self._behind + count, time_ns

    def _take_scan(self, scan: Scan) -> None:
        if scan.refs is not self._scanned:
            index = self._rows.index
            known = [(place, index[ref]) for place, ref in enumerate(scan.refs) if ref in index]
            self._scanned, self._places = scan.refs, np.array(known, np.intp).reshape(-1, 2).T
        places, columns = self._places
        if not len(places):
            return
        self._pending.append(_Row(scan.time_ns, columns, scan.values[places]))
        if scan.time_ns < self._done_ns:
            self._late(scan.time_ns, len(places))
        else:
            self._behind = 0
        source = scan.refs[0].partition("/")[0]
        self._newest[source] = max(self._newest[source], scan.time_ns)

    def _restart(self) -> None:
        """Begin again on the sources' new time, with the values held."""
        # The wrong stamps first: what came later on the new time is the newer value.
        for sample in sorted(self._pending, key=lambda s: (s.time_ns < self._done_ns, s.time_ns)):
            self._apply(sample, [])
        self.late += sum(_count(one) for one in self._pending)
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
            due.sort(key=_order)
        out: list[Win] = []
        closed_ns = None
        for sample in due:
            if sample.time_ns < self._done_ns:
                self.late += _count(sample)
            # Of a row's samples, which share their time, the first closes what is before them.
            if not self.wiring.window.waveform and sample.time_ns != closed_ns:
                closed_ns = sample.time_ns
                out += self._close(closed_ns)
            self._apply(sample, out)
        if not self.wiring.window.waveform and self._row >= 0:
            out += self._close(until_ns)
        self._done_ns = until_ns
        return out

    def _apply(self, sample: Sample | _Row, out: list[Win]) -> None:
        self._due = -(-sample.time_ns // self._step_ns)
        if isinstance(sample, _Row):
            self._latest[sample.columns] = sample.values
            return
        good = sample.quality is _GOOD
        column = self._rows.index[sample.tag]
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
        quality = good_share(x)
        active = self._rows.gate(row)
        return [Win(times.pop(), x, quality, active, segment, self._rows.label(row))]

    def _close(self, until_ns: int) -> list[Win]:
        """Close every row whose time is before `until_ns`."""
        last = (until_ns - 1) // self._step_ns
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
            window = self._rows.push(self._row * self._step_ns, self._latest)
            if window is not None:
                out.append(window)
