"""Normalisation: learnt by each gateway from its own windows, and never sent anywhere."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models.spec import Task

Windows = NDArray[np.float32]
FLAT = 1e-6
_FAR = 20


@dataclass(frozen=True)
class Scale:
    """Per-channel mean and deviation of the input, and of the target (a number's unit; 0 and 1 for a class)."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    target_mean: float = 0.0
    target_std: float = 1.0

    @classmethod
    def learn(cls, task: Task, x: Windows, y: NDArray[np.float32] | None) -> "Scale":
        """Learn from windows x (N, C, T) with NaN where masked, and targets y (N,) in the target's unit."""
        mean, std = [0.0] * task.channels, [1.0] * task.channels
        if task.normalise == "gateway":
            for c in range(task.channels):
                seen = x[:, c][np.isfinite(x[:, c])].astype(np.float64)
                if seen.size:
                    mean[c] = float(seen.mean())
                    # A channel that never moved says nothing: leave it at 0 rather than blow up its last digit.
                    spread = float(seen.std())
                    std[c] = spread if spread > FLAT * max(1.0, abs(mean[c])) else 1.0
        low_high = task.target.range if task.target else None
        target_mean, target_std = 0.0, 1.0
        if task.kind == "regression" and low_high:
            target_mean, target_std = (low_high[0] + low_high[1]) / 2, (low_high[1] - low_high[0]) / 2
        elif task.kind == "regression" and y is not None and y.size:
            target_mean, target_std = float(np.mean(y)), float(np.std(y)) or 1.0
        return cls(tuple(mean), tuple(std), target_mean, target_std)

    def inputs(self, task: Task, x: Windows) -> Windows:
        """Scale windows (N, C, T); NaN (masked) stays NaN, and the net sees it as 0, the mean."""
        if task.normalise == "window":
            keep = np.isfinite(x)
            many = np.maximum(keep.sum(-1, keepdims=True), 1)
            filled = np.where(keep, x, 0)
            mean = filled.sum(-1, keepdims=True) / many
            spread = np.sqrt((np.where(keep, x - mean, 0) ** 2).sum(-1, keepdims=True) / many)
            scaled: Windows = ((x - mean) / np.maximum(spread, FLAT)).astype(np.float32)
            return scaled
        mean_c, std_c = self._columns
        # Of one window, each call counts: numpy's clip costs as much as these two and the division.
        scaled = x - mean_c
        scaled /= std_c
        np.maximum(scaled, -_FAR, out=scaled)
        return np.minimum(scaled, _FAR, out=scaled)

    @cached_property
    def _columns(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return np.asarray(self.mean, np.float32)[:, None], np.asarray(self.std, np.float32)[:, None]

    def targets(self, task: Task, y: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scale targets (N,) to what the net learns."""
        return y if task.kind == "classification" else (y - self.target_mean) / np.float32(self.target_std)

    def to_json(self) -> bytes:
        """For the gateway's own state."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Scale":
        """Inverse of `to_json`."""
        fields = json.loads(data)
        return cls(tuple(fields["mean"]), tuple(fields["std"]), fields["target_mean"], fields["target_std"])
