"""What every strategy has: the type of its state, and the weighted mean that it begins with."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from models.codec import Sparse
from models.delta import Vector

State = Mapping[str, NDArray[np.float64]]


def mean(updates: Iterator[tuple[Vector | Sparse, int]]) -> NDArray[np.float64]:
    """Mean (n,) of deltas (n,), dense or sparse, by samples, summed in float64 one at a time.

    ValueError if there is none.
    """
    total, weight = None, 0
    for delta, samples in updates:
        if total is None:
            total = np.zeros(delta.size)
        if isinstance(delta, Sparse):
            delta.add_to(total, float(samples))
        else:
            total += np.multiply(delta, float(samples), dtype=np.float64)
        weight += samples
    if total is None:
        raise ValueError("no update to average")
    total /= weight
    return total
