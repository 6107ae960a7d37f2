"""Stored samples -> what one training learns from, and the holdout that judges every model offered to this gateway."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge.window import Win
from models.alarm import WEEK_S
from models.spec import Task

Windows = NDArray[np.float32]
MAX_HOLDOUT = 2_000
# Windows of one stretch of time share rows, so train and holdout are parted by stretches this many windows long.
_BLOCK = 20


@dataclass(frozen=True)
class Dataset:
    """x (N, C, T) raw, with NaN where masked; y (N,) in the target's unit, None for anomaly.

    `per_week` is how many windows there are in a week in which the machine never stands.
    """

    x: Windows
    y: NDArray[np.float32] | None
    per_week: float = WEEK_S

    def __len__(self) -> int:
        return len(self.x)


def usable(task: Task, window: Win) -> bool:
    """Say whether a window may be trained on: the gate held, quality is enough, and the label is good and valid."""
    if not window.active or window.quality < task.window.min_quality:
        return False
    if task.kind == "anomaly":
        return True
    if task.kind == "classification":
        return window.label == window.label and 0 <= window.label < task.outputs and window.label.is_integer()
    return bool(np.isfinite(window.label))


def is_holdout(task: Task, window: Win) -> bool:
    """Choose by segment, or by stretch of time without one: stable as data grows, the same after a restart."""
    if window.segment == window.segment:
        key = f"segment {window.segment!r}"
    else:
        step_ns = 1e9 / task.window.rate_hz * (1 if task.window.waveform else task.window.stride)
        key = f"time {int(window.end_ns // (_BLOCK * step_ns))}"
    return zlib.crc32(key.encode()) % 1000 < task.training.holdout * 1000


def split(task: Task, windows: Iterable[Win]) -> tuple[Dataset, Dataset]:
    """Part usable windows into train and holdout, the newest `max_windows` and MAX_HOLDOUT of them."""
    train: list[Win] = []
    holdout: list[Win] = []
    for window in windows:
        if usable(task, window):
            chosen, most = (holdout, MAX_HOLDOUT) if is_holdout(task, window) else (train, task.training.max_windows)
            chosen.append(window)
            if len(chosen) >= 2 * most:
                del chosen[:most]
    often = _per_week([*train, *holdout])
    return _dataset(task, train[-task.training.max_windows :], often), _dataset(task, holdout[-MAX_HOLDOUT:], often)


def _per_week(windows: list[Win]) -> float:
    """Windows in a week, by the usual time from one to the next."""
    apart = np.diff(np.sort([window.end_ns for window in windows]))
    return WEEK_S * 1e9 / max(float(np.median(apart)), 1.0) if apart.size else WEEK_S


def _dataset(task: Task, windows: list[Win], per_week: float) -> Dataset:
    x = np.stack([w.x for w in windows]) if windows else np.empty((0, *task.input_shape), np.float32)
    y = None if task.kind == "anomaly" else np.array([w.label for w in windows], np.float32)
    return Dataset(x, y, per_week)
