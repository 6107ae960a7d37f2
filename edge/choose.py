"""Which model a plant scores with: the global one, the one tuned on its own data, one learnt alone, or two together.

Pure: what the candidates are worth on the plant's own holdout goes in, a name comes out.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from models import evaluate

Outputs = NDArray[np.float32]

GLOBAL, TUNED, OWN, MIX = "global", "tuned", "own", "mix"


def mixed(task_kind: str, one: Outputs, other: Outputs) -> Outputs:
    """Mean of two models' outputs (N, outputs): of probabilities for classes, of the numbers else."""
    if task_kind != "classification":
        return ((one + other) / 2).astype(np.float32)
    return np.log((_softmax(one) + _softmax(other)) / 2 + 1e-9).astype(np.float32)


def choose(metric: str, worths: Mapping[str, float], count: int) -> str:
    """Name the candidate to score with, by what each is worth on a holdout of `count` windows.

    The first candidate stays unless a later one is better by more than the holdout's noise: a small holdout knows
    little, and the best of several by chance is often not the best.
    """
    best, *others = worths
    for name in others if count else ():
        if not evaluate.not_worse(metric, worths[best], worths[name], count):
            best = name
    return best


def _softmax(out: Outputs) -> Outputs:
    p = np.exp(out - out.max(1, keepdims=True))
    soft: Outputs = p / p.sum(1, keepdims=True)
    return soft
