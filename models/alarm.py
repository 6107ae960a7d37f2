"""Where the error of an anomaly model becomes an alarm, so that false ones stay as rare as the task wants them.

Peaks over a threshold: the tail of the errors of normal operation is a generalised Pareto distribution (Davison &
Smith 1990, JRSS B 52(3); for streams Siffer et al. 2017, KDD, doi:10.1145/3097983.3098144), fitted by probability-
weighted moments (Hosking & Wallis 1987, Technometrics 29(3)). So a rate can be asked for that is far rarer than the
windows of a holdout could show, and what comes out is an estimate: twice the errors do not give twice the certainty.
"""

import numpy as np
from numpy.typing import NDArray

WEEK_S = 7 * 86_400
# The tail begins at this quantile, and wants so many events for a shape; of fewer it is taken as rather heavy.
_TAIL, _EVENTS, _HEAVY = 0.9, 10, 0.25
# A tail is never taken as bounded, which a few hundred windows can't show, nor as one without a variance.
_SHAPES = 0.0, 0.5
LEAST = 1e-9


def threshold(errors: NDArray[np.floating], chance: float) -> float:
    """Find the error that an alarm begins above with this `chance` a window, from those of normal windows (N,).

    The windows are in the order of time: neighbours share rows, and a run of them above the tail's beginning is one
    event, counted by its largest (Leadbetter 1991, Statistics & Probability Letters 12(4)). At least 1e-9.
    """
    begin = float(np.quantile(errors, _TAIL))
    peaks = _peaks(errors, begin)
    often = len(peaks) / len(errors)
    if not len(peaks) or chance >= often:
        return max(float(np.quantile(errors, 1 - min(chance, 1))), LEAST)
    shape, scale = _fit(peaks - begin)
    more = np.log(often / chance)
    above = scale * (more if shape == 0 else np.expm1(shape * more) / shape)
    return max(begin + float(above), LEAST)


def events(over: NDArray[np.bool_]) -> int:
    """Count the runs of True in windows (N,) in the order of time."""
    return int((over & ~np.concatenate([[False], over[:-1]])).sum())


def _peaks(errors: NDArray[np.floating], begin: float) -> NDArray[np.float64]:
    """Return the largest error of each run above `begin`."""
    over = errors > begin
    starts = np.flatnonzero(over & ~np.concatenate([[False], over[:-1]]))
    if not len(starts):
        return np.empty(0)
    found: NDArray[np.float64] = np.maximum.reduceat(np.where(over, errors, -np.inf), starts)
    return found


def _fit(excess: NDArray[np.float64]) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution of excesses (N,), by probability-weighted moments."""
    mean = float(excess.mean())
    shape = _HEAVY
    if len(excess) >= _EVENTS:
        rest = 1 - (np.arange(1, len(excess) + 1) - 0.35) / len(excess)
        weighted = float((rest * np.sort(excess)).mean())
        shape = float(np.clip(2 - mean / max(mean - 2 * weighted, LEAST * mean), *_SHAPES))
    # The scale that keeps the mean, where the shape is not the estimate.
    return shape, mean * (1 - shape)
