"""What every strategy has: the type of its state, and the weighted mean that it begins with."""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from models.codec import Sparse
from models.delta import Vector
from models.width import Part

State = Mapping[str, NDArray[np.float64]]


Delta = Vector | Sparse | Part


def mean(updates: Iterator[tuple[Delta, int]]) -> NDArray[np.float64]:
    """Mean (n,) of deltas (n,), dense or sparse, by samples, summed in float64 one at a time.

    Each value's is over the gateways that have it; one that none has does not move. ValueError without any delta.
    """
    total, weight, partly = None, 0, None
    for delta, samples in updates:
        if total is None:
            total = np.zeros(delta.size)
        if isinstance(delta, Part):
            partly = np.zeros(delta.size) if partly is None else partly
            partly[delta.places] += samples
            total[delta.places] += np.multiply(_dense(delta.values), float(samples), dtype=np.float64)
            continue
        if isinstance(delta, Sparse):
            delta.add_to(total, float(samples))
        else:
            total += np.multiply(delta, float(samples), dtype=np.float64)
        weight += samples
    if total is None:
        raise ValueError("no update to average")
    if partly is None:
        total /= weight
    else:
        partly += weight
        np.divide(total, partly, out=total, where=partly > 0)
    return total


def _dense(values: Vector | Sparse) -> Vector:
    return values.dense() if isinstance(values, Sparse) else values
