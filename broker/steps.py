"""From one published version to the next: a sparse difference with error feedback, the same float32 sums everywhere.

What the aggregator would publish is its goal, the model that the strategy made. What it publishes is the version
before plus what the sparse difference decodes to; the rest waits in the residual and is part of the next difference
(error feedback: Seide et al. 2014; on the way down: Tang et al. 2019, DoubleSqueeze, arXiv:1905.05957). Every gateway
that holds the version before makes the same addition, so its weights have the digest that the manifest signs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from broker.messages import CHUNK_BYTES
from models import codec
from models.delta import Vector


class Step(NamedTuple):
    """`payload` leads from the version before to `vector` (n,); None where there is none that fits a message.

    `residual` covers the shared positions: what of the goal is not published yet.
    """

    payload: bytes | None
    vector: Vector
    residual: Vector


def step_towards(
    goal: Vector, before: Vector, residual: Vector | None, shared: NDArray[np.bool_], keep: float | None
) -> Step:
    """Publish the largest share `keep` (None: all, exactly) of what goal (n,) and residual are away from before (n,).

    `goal` differs from `before` at the True positions of `shared` (n,) alone. ValueError if it is not finite.
    """
    difference = (goal - before)[shared]
    if residual is not None:
        difference += residual
    exact = before.copy()
    exact[shared] += difference
    if not np.isfinite(exact).all():
        raise ValueError("the new weights hold a NaN or an infinity")
    encoded = None if keep is None else codec.encode(difference, codec.SPARSE, keep)
    if encoded is None or len(encoded.data) > CHUNK_BYTES:
        return Step(None, exact, np.zeros_like(difference))
    return Step(encoded.data, apply(encoded.data, before, shared), difference - encoded.decoded)


def apply(payload: bytes, before: Vector, shared: NDArray[np.bool_]) -> Vector:
    """Return the version after `before` (n,); PeerError("codec") for a payload that is none of these positions."""
    after = before.copy()
    after[shared] += codec.decode(payload, int(shared.sum()))
    return after
