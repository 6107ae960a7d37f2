"""Pure: the windows of stored samples, of the same rows as the live ones: what is trained on is what was scored."""

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edge.tags import Quality
from edge.window import Columns, Rows, Wide, Win, Wiring, good_share

_PIECE = 4096


def stored_windows(wiring: Wiring, columns: Mapping[str, Columns]) -> Iterable[Win]:
    """Make the windows of stored samples, oldest first; tags without samples may be missing from `columns`.

    The same windows as the live half gives for the same samples, but for stretches longer than two windows in which
    nothing at all was reported: those are scored live with the values held, and are not trained on.
    """
    rows = Rows(wiring)
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


def _held(rows: Rows, columns: Mapping[str, Columns], times: NDArray[np.int64]) -> Wide:
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


def _stored_waveforms(rows: Rows, columns: Mapping[str, Columns]) -> Iterable[Win]:
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
            quality = good_share(x)
            yield Win(end_ns, x, quality, rows.gate(table[i]), segment, rows.label(table[i]))
