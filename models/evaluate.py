"""Metrics: what a model is worth on windows with known targets. numpy only."""

import numpy as np
from numpy.typing import NDArray

from models.spec import Task

Array = NDArray[np.floating]


def accuracy(y: NDArray[np.generic], predicted: NDArray[np.generic]) -> float:
    """Share of equal entries of two (N,) arrays."""
    return float(np.mean(y == predicted))


def rmse(y: Array, predicted: Array) -> float:
    """Root mean squared error of two (N,) arrays, in their unit."""
    return float(np.sqrt(np.mean((np.asarray(y, np.float64) - predicted) ** 2)))


def auroc(y: NDArray[np.generic], score: Array) -> float:
    """Chance that a positive (y true) outscores a negative, ties half (Mann-Whitney U); NaN for a single class."""
    positive = np.asarray(y, np.bool_)
    pairs = int(positive.sum()) * int((~positive).sum())
    if pairs == 0:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / pairs)


def auprc(y: NDArray[np.generic], score: Array) -> float:
    """Average precision: the sum of precision over the steps of recall, ties taken together; NaN without positives."""
    positive = np.asarray(y, np.bool_)
    if not positive.any():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    hits = np.cumsum(positive[order])
    last = np.append(np.nonzero(np.diff(score[order]))[0], len(score) - 1)
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


LOWER_IS_BETTER = frozenset({"rmse", "error"})


def metric_name(task: Task) -> str:
    """Name the metric of a task's kind: `accuracy`, `rmse`, or `error` (mean squared, normalised) for anomaly."""
    return {"classification": "accuracy", "regression": "rmse", "anomaly": "error"}[task.kind]


def much_worse(name: str, new: float, old: float, count: int, tolerance: float) -> bool:
    """Say whether `new` is worse than `old` by more than the noise of `count` windows and more than `tolerance`.

    That is points of an accuracy (0.2: from 0.9 to less than 0.7), and of an error a share of it (0.2: a fifth more).
    """
    if not_worse(name, new, old, count):
        return False
    if not np.isfinite(new):
        return True
    return bool(new > old * (1 + tolerance) if name in LOWER_IS_BETTER else new < old - tolerance)


def not_worse(name: str, new: float, old: float, count: int) -> bool:
    """Say whether `new` is as good as `old` within the noise of `count` windows.

    The noise is one standard error: binomial for accuracy, and for errors a relative 1/sqrt(2 count), which is that
    of a root mean square of Gaussian residuals.
    """
    if not np.isfinite(new) or not np.isfinite(old):
        return bool(np.isfinite(new))
    if name in LOWER_IS_BETTER:
        return bool(new <= old * (1 + 1 / np.sqrt(2 * max(count, 1))))
    return bool(new >= old - np.sqrt(max(old * (1 - old), 0.25 / max(count, 1)) / max(count, 1)))
