"""FedAdam: the mean of a round is the gradient of an Adam step at the server (Reddi et al. 2021, arXiv:2003.00295).

Each value moves by the running mean of its deltas over their running root mean square, so that rare small ones count
as much as frequent large ones. Both are corrected for their start at zero (Kingma & Ba 2015, arXiv:1412.6980).
"""

from collections.abc import Iterator

import numpy as np

from broker.strategies._mean import Delta, State, mean
from models.delta import Vector

_RATE, _BETA2, _TAU = 0.01, 0.99, 1e-3


def aggregate(state: State, updates: Iterator[tuple[Delta, int]], *, momentum: float) -> tuple[State, Vector]:
    """Return the new state and the delta (n,) float32 to add to the model; `momentum` is Adam's beta 1.

    `updates` yields (delta (n,) or a part of one, samples >= 1). No value moves by more than 0.01 / (1 - momentum) in a
    round. ValueError if there is no update.
    """
    delta = mean(updates)
    zero = np.zeros_like(delta)
    count = state.get("count", np.zeros(1)) + 1
    first = momentum * state.get("first", zero) + (1 - momentum) * delta
    second = _BETA2 * state.get("second", zero) + (1 - _BETA2) * delta**2
    root = np.sqrt(second / (1 - _BETA2 ** count[0]))
    step = _RATE * first / (1 - momentum ** count[0]) / (root + _TAU)
    return {"count": count, "first": first, "second": second}, step.astype(np.float32)
