"""The models that a plant may score with, as scorers: from a training, from a federation, or as stored."""

from dataclasses import dataclass, replace

from edge.choose import GLOBAL, OWN, TUNED, Start, whose
from edge.config import ScoringTable
from edge.dataset import Dataset
from edge.handback import Model
from edge.infer import Scorer
from edge.memory import Memory
from edge.train import Result
from models.delta import Vector
from models.scale import Scale
from models.spec import Task

_UNSCALED = Scale((), ())


@dataclass(frozen=True)
class Candidates:
    """A scorer of each kind, and its weights, to be stored with it."""

    scorers: list[Scorer]
    weights: dict[str, Vector]


def build(table: ScoringTable, model: Model, vector: Vector, scale: Scale | None, kind: str = GLOBAL) -> Scorer:
    """Make a scorer of some weights of a model; without a scale yet, one that can't score."""
    made = Scorer.build(
        model.task, model.manifest.version, model.graph, model.layout, vector, scale or _UNSCALED,
        threads=table.threads, provider=table.provider,
    )  # fmt: skip
    made.kind = kind
    return made


def start(
    table: ScoringTable,
    model: Model,
    average: Vector | None,
    own: Vector | None,
    holdout: Dataset | None,
    scale: Scale | None,
    *,
    width: float = 1,
) -> Start:
    """Where a gateway goes on from, to train or to score: a model, or the `average` of models where it fits.

    `own` is what its last training left. Without that, or a holdout, all but what is personal is the federation's.
    """
    personal = model.task.personal
    if own is None or own.size != model.layout.size or holdout is None or not len(holdout) or scale is None:
        return Start(model.personalised(own, average, width=width), personal)

    def held(prefixes: tuple[str, ...]) -> Vector:
        return model.personalised(own, average, resume=prefixes, width=width)

    def loss(vector: Vector) -> float:
        return float(build(table, model, vector, scale).losses(holdout).mean())

    return whose(model.task, held, loss)


def kinds(task: Task, version: int, *, alone: bool) -> list[str]:
    """What a plant may score with after a training, by kind.

    The global model is none of them before anybody's data was seen, nor for an anomaly: what is normal somewhere else
    it would forgive here.
    """
    found = [TUNED, OWN] if alone else [TUNED]
    return found if version == 0 or task.kind == "anomaly" else [*found, GLOBAL]


def after_training(
    table: ScoringTable, model: Model, vector: Vector, result: Result, *, federated: bool = True
) -> Candidates:
    """What a training leaves to choose from; `vector` is the global model as this gateway scores with it.

    Without `federated`, only what was learnt alone, if that was.
    """
    weights = {TUNED: result.tuned, GLOBAL: vector} | ({} if result.own is None else {OWN: result.own})
    found = kinds(model.task, model.manifest.version, alone=result.own is not None)
    found = found if federated else [kind for kind in found if kind == OWN]
    return Candidates([build(table, model, weights[kind], result.scale, kind) for kind in found], weights)


def stored(table: ScoringTable, memory: Memory, model: Model, vector: Vector, scale: Scale | None) -> Scorer:
    """Take up what scored when the gateway went down; the global model where that is unknown."""
    kept = memory.scoring(model.layout.size)
    if kept is None:
        return build(table, model, vector, scale)
    version, kind, parts = kept
    first, *others = (replace(build(table, model, weights, scale, kind), share=share) for share, weights in parts)
    return replace(first, version=version, partners=tuple(others))
