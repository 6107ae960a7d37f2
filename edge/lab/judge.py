"""What models are worth at the plants of a simulation, what each plant would score with, and the figures of both."""

from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.candidates import kinds
from edge.infer import Scorer, elect
from edge.lab.sites import Site, metric_of
from models import evaluate
from models.alarm import events
from models.delta import Layout, Vector
from models.spec import Task

_FRACTIONS = (0.92, 0.95, 0.98)


class Judge:
    """Metrics of weights at the plants, through ONNX Runtime as a gateway scores."""

    def __init__(self, task: Task, graph: bytes, layout: Layout, sites: list[Site]) -> None:
        self.task, self.graph, self.layout, self.sites = task, graph, layout, sites
        self.metric = metric_of(task, sites)
        self._last: tuple[Vector, Scorer] | None = None

    def _scorer(self, vector: Vector, i: int) -> Scorer:
        """Weights as a plant scores with them; plants that are asked one after the other share the session."""
        scale = self.sites[i].scale
        if self._last is None or self._last[0] is not vector:
            self._last = vector, Scorer.build(self.task, 0, self.graph, self.layout, vector, scale)
        return replace(self._last[1], scale=scale)

    def worth(self, out: NDArray[np.float32], i: int) -> float:
        """The metric of a net's outputs (N, outputs) on a plant's fixed test; NaN where nothing is to be judged."""
        scale, x, y = self.sites[i].scale, self.sites[i].test.x, self.sites[i].test.y
        if y is None or not len(y):
            return float("nan")
        if self.task.kind == "anomaly":
            inputs = np.nan_to_num(scale.inputs(self.task, x)).reshape(len(x), -1)
            return evaluate.auroc(y, ((out - inputs) ** 2).mean(1))
        if self.metric == "rmse":
            return evaluate.rmse(y, out[:, 0] * scale.target_std + scale.target_mean)
        if self.metric in {"auprc", "auroc"}:
            area = evaluate.auprc if self.metric == "auprc" else evaluate.auroc
            return area(y, out[:, 1] - out[:, 0])
        return evaluate.accuracy(y, out.argmax(1))

    def alarms(self, scorer: Scorer, out: NDArray[np.float32], i: int) -> dict[str, Any]:
        """Count what a scorer makes of a plant's test: the alarms of normal windows, and the share of the others found.

        `out` are its outputs (N, C * T). Nothing of a task that is no anomaly's.
        """
        scale, x, y = self.sites[i].scale, self.sites[i].test.x, self.sites[i].test.y
        if self.task.kind != "anomaly" or y is None:
            return {}
        inputs = np.nan_to_num(scale.inputs(self.task, x)).reshape(out.shape)
        over = ((out - inputs) ** 2).mean(1) > scorer.threshold
        odd = y != 0
        found = round(float(over[odd].mean()), 4) if odd.any() else None
        return {"normal_windows": int((~odd).sum()), "false_alarms": events(over & ~odd), "found": found}

    def loss(self, vector: Vector, i: int) -> float:
        """The mean loss of weights on a plant's holdout; NaN without one."""
        holdout = self.sites[i].holdout
        return float(self._scorer(vector, i).losses(holdout).mean()) if len(holdout) else float("nan")

    def test(self, vector: Vector, i: int) -> float:
        """The metric of weights on a plant's fixed test."""
        return self.worth(self._scorer(vector, i).outputs(self.sites[i].test.x), i)


def final(judge: Judge, i: int, weights: dict[str, Vector]) -> tuple[dict[str, float], float, dict[str, Any]]:
    """Let the plant choose as a gateway does, on its own holdout.

    Returns the shares by kind, the worth on its test, and of an anomaly task its alarms there.

    `weights` are those of each kind of model; version 1 says that the global one has seen data.
    """
    site, task = judge.sites[i], judge.task
    scorers = [
        replace(Scorer.build(task, 1, judge.graph, judge.layout, weights[kind], site.scale), kind=kind)
        for kind in kinds(task, 1, alone=task.training.alone)
        if kind in weights
    ]
    chosen, body = elect(scorers, site.holdout)
    out = chosen.outputs(site.test.x)
    return body["shares"], judge.worth(out, i), judge.alarms(chosen, out, i)


def mean_of(values: list[float]) -> float:
    """Mean over the plants that have one (a test without anomalies has no AUROC)."""
    return mean([value for value in values if np.isfinite(value)] or [float("nan")])


def figures(
    metric: str, result: dict[str, list[float]], curve: list[list[float]], names: list[str], about: list[dict[str, Any]]
) -> dict[str, Any]:
    """Means over plants, ratios of which more is better, and the plants one by one, each with what is said `about` it.

    `final_vs_best` is of the plants that have all it needs: one of no width has nothing that it learnt alone.
    """
    lower = metric in evaluate.LOWER_IS_BETTER

    def over(value: float, other: float) -> float:
        return (other / value if value else float("inf")) if lower else (value / other if other else float("inf"))

    means = {key: mean_of(values) for key, values in result.items()}
    ours, whole, own = (np.array(result[key]) for key in ("final", "centralised", "silo_own"))
    both = np.isfinite(ours) & np.isfinite(whole) & np.isfinite(own)
    versus = [over(f, o) for f, o in zip(result["final"], result["silo_own"], strict=True)]
    by_plant = [
        {"plant": name}
        | {key: _rounded(values[i], 5) for key, values in result.items()}
        | {"final_vs_alone": _rounded(versus[i], 4)}
        | about[i]
        for i, name in enumerate(names)
    ]
    reached = {
        str(f): next((n for n, row in enumerate(curve, 1) if over(mean_of(row), means["centralised"]) >= f), None)
        for f in _FRACTIONS
    }
    best = (min if lower else max)(mean_of(list(whole[both])), mean_of(list(own[both])))
    return {
        "metric": metric,
        **{key: _rounded(value, 5) for key, value in means.items()},
        "final_vs_best": _rounded(over(mean_of(list(ours[both])), best), 4),
        "final_vs_alone": _rounded(over(mean_of(list(ours[both])), mean_of(list(own[both]))), 4),
        "worst_plant_vs_alone": _rounded(min([v for v in versus if np.isfinite(v)] or [float("nan")]), 4),
        "rounds_to": reached,
        "plants": by_plant,
        "curve": [_rounded(mean_of(row), 5) for row in curve],
    }


def _rounded(value: float, digits: int) -> float | None:
    """A figure for JSON; None where there is none, such as the AUROC of a test of one class."""
    return round(value, digits) if np.isfinite(value) else None
