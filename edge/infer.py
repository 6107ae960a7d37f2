"""Scoring: one window in, a score, a verdict and the signals behind it out. Reads memory only.

A Scorer is one model, whole: graph, weights, scale, and the threshold that its last `metric` set. A new model is a
new Scorer built beside the old one; the agent swaps them between two windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge.choose import GLOBAL, MIX, choose, mixed, trust, worst
from edge.dataset import Dataset
from models import evaluate
from models.alarm import LEAST, threshold
from models.delta import Layout, Vector
from models.graph import batch_of, make_session
from models.scale import Scale
from models.spec import Task

Windows = NDArray[np.float32]
_TOP = 3


class Verdict(NamedTuple):
    """Of one window. `score`: the class's probability, the number in the target's unit, or error over threshold.

    `verdict`: a class name, `normal`, `ok` or `alarm`; `alarm` says whether somebody should look.
    """

    score: float
    verdict: str
    alarm: bool


@dataclass
class Scorer:
    """One model of one task, ready to score; with `partners`, several together.

    Together they give the mean, each by its `share`, or of an anomaly what rebuilds a window worst.
    `version` is the global model's that it comes from, `kind` what the plant made of it (see `edge.choose`).
    """

    task: Task
    version: int
    session: ort.InferenceSession
    scale: Scale
    threshold: float = 1.0
    kind: str = GLOBAL
    share: float = 1.0
    partners: "tuple[Scorer, ...]" = ()

    @property
    def learnt(self) -> bool:
        """Whether anybody's data has been seen by it."""
        return self.version > 0 or self.kind != GLOBAL

    @classmethod
    def build(
        cls,
        task: Task,
        version: int,
        graph: bytes,
        layout: Layout,
        vector: Vector,
        scale: Scale,
        *,
        threads: int = 1,
        provider: str = "CPUExecutionProvider",
    ) -> "Scorer":
        """Make a session of its own; the graph has been checked by `models.graph.check_graph`."""
        session = make_session(graph, layout, vector, threads=threads, provider=provider)
        return cls(task, version, session, scale)

    def outputs(self, x: Windows) -> NDArray[np.float32]:
        """Raw windows (N, C, T), NaN where masked -> the net's outputs (N, outputs)."""
        return self.run(self._inputs(x))

    def _inputs(self, x: Windows) -> Windows:
        """Raw windows (N, C, T) -> scaled ones without NaN."""
        return np.nan_to_num(self.scale.inputs(self.task, x), copy=False)

    def run(self, inputs: Windows) -> NDArray[np.float32]:
        """Scaled windows (N, C, T) without NaN -> the net's outputs (N, outputs), so many at once as memory allows."""
        if not len(inputs):
            return np.empty((0, self.task.outputs), np.float32)
        many = batch_of(*self.task.input_shape)
        parts = [self.session.run(None, {"x": inputs[i : i + many]})[0] for i in range(0, len(inputs), many)]
        out: NDArray[np.float32] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not self.partners:
            return out
        outputs = [out, *(one.run(inputs) for one in self.partners)]
        if self.task.kind == "anomaly":
            return worst(outputs, inputs)
        return mixed(self.task.kind, outputs, [self.share, *(one.share for one in self.partners)])

    def score(self, x: Windows, *, whole: bool = False) -> Verdict:
        """Judge one raw window (C, T); `whole` says that it is known to have no NaN."""
        inputs = self.scale.inputs(self.task, x[None])
        if not whole:
            inputs[np.isnan(inputs)] = 0
        return self.judge(self.run(inputs)[0], inputs[0])

    def judge(self, out: NDArray[np.float32], inputs: Windows) -> Verdict:
        """Turn one row of outputs into a verdict, by the task's alarm; a score of NaN is `unknown`, and no alarm."""
        task, alarm = self.task, self.task.alarm
        if task.kind == "anomaly":
            error = out - inputs.ravel()
            ratio = float(error @ error) / error.size / self.threshold
            if not math.isfinite(ratio):
                return Verdict(math.nan, "unknown", alarm=False)
            return Verdict(ratio, "anomaly" if ratio > 1 else "normal", ratio > 1)
        # A handful of numbers: Python is through with them before numpy has begun.
        values = out.tolist()
        if not all(map(math.isfinite, values)):
            return Verdict(math.nan, "unknown", alarm=False)
        if task.kind == "classification" and task.target:
            top = max(values)
            name = task.target.classes[values.index(top)]
            return Verdict(1 / sum(math.exp(value - top) for value in values), name, name in alarm.classes)
        number = values[0] * self.scale.target_std + self.scale.target_mean
        high = alarm.above is not None and number > alarm.above
        low = alarm.below is not None and number < alarm.below
        return Verdict(number, "alarm" if high or low else "ok", high or low)

    def contributions(self, x: Windows) -> list[tuple[str, float]]:
        """The signals that count most for one raw window (C, T), largest first; shares that add up to 1.

        Anomaly: each channel's part of the error. Else occlusion (Zeiler & Fergus 2014, arXiv:1311.2901): how far the
        output moves when one channel is set to its mean, in one batch of C windows more.
        """
        inputs = self._inputs(x[None])[0]
        if self.task.kind == "anomaly":
            weight = ((self.run(inputs[None])[0].reshape(inputs.shape) - inputs) ** 2).mean(1)
        else:
            batch = np.repeat(inputs[None], len(inputs) + 1, 0)
            batch[np.arange(len(inputs)), np.arange(len(inputs))] = 0
            out = self.run(batch)
            weight = np.abs(out[:-1] - out[-1]).sum(1)
        share = weight / max(float(weight.sum()), 1e-12)
        order = np.argsort(-share)[:_TOP]
        return [(self.task.signal[i].name, round(float(share[i]), 3)) for i in order]

    def metric(self, data: Dataset) -> float:
        """The task's metric on labelled windows; NaN without any. Also sets an anomaly model's threshold."""
        if not len(data):
            return float("nan")
        inputs = self._inputs(data.x)
        out = self.run(inputs)
        if data.y is None:
            errors = ((out - inputs.reshape(len(inputs), -1)) ** 2).mean(1)
            self.threshold = self._threshold(errors, data.per_week)
            return float(errors.mean())
        if self.task.kind == "classification":
            return evaluate.accuracy(data.y, out.argmax(1))
        return evaluate.rmse(data.y, out[:, 0] * self.scale.target_std + self.scale.target_mean)

    def _threshold(self, errors: NDArray[np.float32], per_week: float) -> float:
        """Place the alarm by the errors (N,) of windows of which there are `per_week`."""
        alarm = self.task.alarm
        if alarm.quantile is not None:
            return max(float(np.quantile(errors, alarm.quantile)), LEAST)
        return threshold(errors, alarm.false_per_week / per_week)

    def losses(self, data: Dataset) -> NDArray[np.float64]:
        """What this model loses on each window (N,): -log p of the class, or the squared error, normalised."""
        inputs = self._inputs(data.x)
        out = self.run(inputs).astype(np.float64)[: len(data)]
        if data.y is None:
            lost = ((out - inputs.reshape(out.shape)) ** 2).mean(1)
        elif self.task.kind == "classification":
            out -= out.max(1, keepdims=True)
            lost = np.log(np.exp(out).sum(1)) - out[np.arange(len(out)), data.y.astype(np.int64)]
        else:
            lost = (out[:, 0] - self.scale.targets(self.task, data.y)) ** 2
        return np.asarray(lost, np.float64)


def contest(new: Scorer, old: Scorer | None, holdout: Dataset | None) -> tuple[bool, dict[str, object]]:
    """Judge a global model offered against what scores now, on this gateway's own holdout.

    Returns whether to adopt it, and the metrics (`metric`, `new`, `old`; None for one that is not a number). It takes
    over from an older global model if it is no worse, from what the plant chose for itself if it is better by more
    than noise. Without a holdout, or an old one that has learnt anything, there is nothing to compare with, and the
    new one is taken.
    """
    name = evaluate.metric_name(new.task)
    body: dict[str, object] = {"metric": name}
    if holdout is None or not len(holdout) or not new.scale.mean:
        return True, body
    worth = new.metric(holdout)
    body["new"] = worth if math.isfinite(worth) else None
    adopt = math.isfinite(worth)
    if old is not None and old.scale.mean and old.learnt:
        was = old.metric(holdout)
        body["old"] = was if math.isfinite(was) else None
        if old.kind == GLOBAL:
            adopt = adopt and evaluate.not_worse(name, worth, was, len(holdout))
        else:
            adopt = choose(name, was, worth, len(holdout))
    return adopt, body


def elect(candidates: Sequence[Scorer], holdout: Dataset) -> tuple[Scorer, dict[str, Any]]:
    """After a training: what this plant scores with from now on, by how far its holdout lets it trust each model.

    Returns the models together, or the one that is left, and what the ledger notes: `shares` by kind, and `worth`, the
    metric of each and of all together.
    """
    task = candidates[0].task
    losses = np.stack([one.losses(holdout) for one in candidates])
    shares = trust(losses, likelihood=task.kind == "classification")
    if not shares.any():
        shares[0] = 1.0
    kept = [replace(one, share=float(w)) for one, w in zip(candidates, shares, strict=True) if w]
    chosen = kept[0] if len(kept) == 1 else replace(kept[0], kind=MIX, partners=tuple(kept[1:]))
    worths = {one.kind: one.metric(holdout) for one in [*candidates, chosen]}
    return chosen, {
        "metric": evaluate.metric_name(task),
        "chosen": chosen.kind,
        "shares": {one.kind: round(one.share, 3) for one in kept},
        "worth": {kind: worth if math.isfinite(worth) else None for kind, worth in worths.items()},
    }
