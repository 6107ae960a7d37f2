"""The models that a plant may score with, as scorers: from a training, from a federation, or as stored."""

from dataclasses import dataclass, replace

from edge.choose import GLOBAL, MIX, OWN, TUNED
from edge.config import ScoringTable
from edge.handback import Model
from edge.infer import Scorer
from edge.memory import Memory
from edge.train import Result
from models.delta import Vector
from models.scale import Scale

_UNSCALED = Scale((), ())


@dataclass(frozen=True)
class Candidates:
    """Scorers in the order of preference, and the weights of each kind, to be stored with it."""

    scorers: list[Scorer]
    weights: dict[str, list[Vector]]


def build(table: ScoringTable, model: Model, vector: Vector, scale: Scale | None, kind: str = GLOBAL) -> Scorer:
    """Make a scorer of some weights of a model; without a scale yet, one that can't score."""
    made = Scorer.build(
        model.task, model.manifest.version, model.graph, model.layout, vector, scale or _UNSCALED,
        threads=table.threads, provider=table.provider,
    )  # fmt: skip
    made.kind = kind
    return made


def after_training(table: ScoringTable, model: Model, vector: Vector, result: Result) -> Candidates:
    """What a training leaves to choose from; `vector` is the global model as this gateway scores with it."""
    tuned = build(table, model, result.vector, result.scale, TUNED)
    scorers, weights = [tuned], {TUNED: [result.vector], GLOBAL: [vector]}
    if result.own is not None:
        own = build(table, model, result.own, result.scale, OWN)
        scorers = [replace(tuned, kind=MIX, partner=own), tuned, own]
        weights |= {OWN: [result.own], MIX: [result.vector, result.own]}
    if model.manifest.version > 0:  # the first one has seen nobody's data
        scorers.append(build(table, model, vector, result.scale))
    return Candidates(scorers, weights)


def stored(table: ScoringTable, memory: Memory, model: Model, vector: Vector, scale: Scale | None) -> Scorer:
    """Take up what scored when the gateway went down; the global model where that is unknown."""
    kept = memory.scoring(model.layout.size)
    if kept is None:
        return build(table, model, vector, scale)
    version, kind, (weights, *more) = kept
    scorer = build(table, model, weights, scale, kind)
    scorer.version = version
    scorer.partner = build(table, model, more[0], scale, OWN) if more else None
    return scorer
