"""Federated averaging, with optional server momentum.

McMahan et al. 2017, arXiv:1602.05629; Hsu et al. 2019, arXiv:1909.06335. The mean is summed in float64, one update
at a time, so memory does not grow with the number of gateways, and their order changes nothing a float32 could show.
"""

from collections.abc import Iterator

import numpy as np

from broker.strategies._mean import Delta, State, mean
from models.delta import Vector


def aggregate(state: State, updates: Iterator[tuple[Delta, int]], *, momentum: float) -> tuple[State, Vector]:
    """Return the new state and the delta (n,) float32 to add to the model.

    `updates` yields (delta (n,) or a part of one, samples >= 1). With momentum m, the delta is v = m * v_before + mean,
    and v is the state; without, the state is empty. ValueError if there is no update.
    """
    total = mean(updates)
    if momentum == 0:
        return {}, total.astype(np.float32)
    before = state.get("velocity")
    if before is not None:
        total += momentum * before
    return {"velocity": total}, total.astype(np.float32)
