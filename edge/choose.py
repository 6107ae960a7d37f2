"""What a plant scores with: the federated model, the one tuned on its own data, one learnt alone, or them together.

Pure: what the models lose on each window of the plant's own holdout goes in, how far each is trusted comes out.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models import evaluate
from models.delta import Vector
from models.spec import Task

Outputs = NDArray[np.float32]

GLOBAL, TUNED, OWN, MIX = "global", "tuned", "own", "mix"
# A model that is trusted less than this is not worth the time that it takes to score.
_LEAST = 0.1
_STEPS = 50
_NEWEST = 0.25


def mixed(task_kind: str, outputs: Sequence[Outputs], shares: Sequence[float]) -> Outputs:
    """Mean of models' outputs (N, outputs) by their shares: of probabilities for classes, of the numbers else."""
    if len(outputs) == 1:
        return outputs[0]
    if task_kind != "classification":
        return np.asarray(sum(share * one for one, share in zip(outputs, shares, strict=True)), np.float32)
    both = sum(share * _softmax(one) for one, share in zip(outputs, shares, strict=True))
    return np.log(both + 1e-9).astype(np.float32)


def worst(outputs: Sequence[Outputs], inputs: NDArray[np.float32]) -> Outputs:
    """Of models that rebuild windows, each window (N, C, T) by the one that rebuilds it worst (N, C * T).

    What either finds unusual is: a mean of both would forgive what one has seen elsewhere.
    """
    stacked = np.stack(outputs)  # (K, N, C * T)
    errors = ((stacked - inputs.reshape(stacked.shape[1:])) ** 2).mean(2)
    found: Outputs = stacked[errors.argmax(0), np.arange(len(inputs))]
    return found


def trust(losses: NDArray[np.float64], *, likelihood: bool) -> NDArray[np.float64]:
    """Shares (K,) of K models, by what each loses on each of N windows (K, N): they add up to 1.

    The weights of a mixture, by expectation maximisation (Dempster et al. 1977) with one window's worth of prior for
    each model: a small holdout leaves all of them in, a large one those that foresaw it, and no choice hangs on a
    thin difference. `likelihood` says that a loss is -log p; else it is a squared error, of Gaussian residuals as
    wide as those of the best model. A model that gives no number gets nothing.
    """
    valid: NDArray[np.bool_] = np.asarray(np.isfinite(losses).all(1))
    shares: NDArray[np.float64] = valid / max(int(valid.sum()), 1)
    if losses.shape[1] == 0 or not valid.any():
        return shares
    width = 1.0 if likelihood else 2 * max(float(losses[valid].mean(1).min()), 1e-12)
    found = np.where(valid[:, None], losses, np.inf)
    seen = np.exp(-(found - found.min(0)) / width)  # (K, N)
    for _ in range(_STEPS):
        parts = shares[:, None] * seen
        shares = ((parts / parts.sum(0)).sum(1) + valid) / (losses.shape[1] + valid.sum())
    shares = np.where(shares < min(_LEAST, shares.max()), 0, shares)
    return shares / float(shares.sum())


class Start(NamedTuple):
    """Weights (layout.size,) that a gateway goes on from, and the prefixes below which they are its own."""

    vector: Vector
    own: tuple[str, ...]


def whose(task: Task, held: Callable[[tuple[str, ...]], Vector], loss: Callable[[Vector], float]) -> Start:
    """Say whose values a gateway goes on from: its own below `[training] resume` where they lose less, or not.

    `held` gives the weights with its own values below some prefixes, `loss` what weights lose on its holdout. Where
    plants differ in condition, a head that fits them all fits none; where one has seen few faults, the others' head
    knows more. (A layer of one's own: Arivazhagan et al. 2019, arXiv:1912.00818; here it is averaged all the same, for
    who comes later.)
    """
    personal = task.personal
    more = tuple(prefix for prefix in task.training.resume if prefix not in personal)
    plain = Start(held(personal), personal)
    if not more:
        return plain
    resumed = Start(held((*personal, *more)), (*personal, *more))
    return resumed if loss(resumed.vector) < loss(plain.vector) else plain


def average(before: Vector | None, new: Vector) -> Vector:
    """The running mean (n,) of the global models that came, in which the newest counts a quarter.

    Rounds with plants that differ swing about; the mean of the last few is steadier than any of them (Polyak & Juditsky
    1992; for federated rounds Caldarola et al. 2022, arXiv:2203.11834).
    """
    if before is None or before.size != new.size:
        return new
    return (before + _NEWEST * (new - before)).astype(np.float32)


def choose(metric: str, worth: float, other: float, count: int) -> bool:
    """Say whether another model is better than what scores by more than the noise of `count` windows."""
    return not evaluate.not_worse(metric, worth, other, count)


def _softmax(out: Outputs) -> Outputs:
    p = np.exp(out - out.max(1, keepdims=True))
    soft: Outputs = p / p.sum(1, keepdims=True)
    return soft
