"""The way down in a simulation: the aggregator's own steps, manifests and offers, on lists instead of a journal."""

from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.downlink import Downlink, Offer
from broker.genesis import task_row
from broker.journal import ModelRow
from broker.messages import Signer
from broker.steps import step_towards
from models import codec
from models.delta import Layout, Vector, weights_digest

_NAME = "lab"


class Down:
    """What the versions of a task are, and what they cost a gateway that misses none."""

    def __init__(self, text: str, graph: bytes, layout: Layout, first: Vector) -> None:
        self.row = task_row(text, graph, layout)
        self.rows = [_row(0, first, 0, 0, None)]
        self.residual: Vector | None = None
        self._downlink = Downlink(_NAME, Signer.from_bytes(bytes(32)), 0)
        self._values = 4 * first.size
        self._per_round = list[tuple[int, int]]()
        fetched_once = len(self._downlink.terms(_NAME, self.row)) + len(self.row.graph)
        self._first = sum(self._sizes()) + fetched_once

    def publish(self, goal: Vector, shared: NDArray[np.bool_], keep: float | None, samples: list[int]) -> Vector:
        """Make the next version (n,) on the way to goal (n,), as the service does."""
        before = codec.decode(self.rows[-1].weights, goal.size)
        step = step_towards(goal, before, self.residual, shared, keep)
        self.residual = step.residual
        self.rows.append(_row(len(self.rows), step.vector, len(samples), sum(samples), step.payload))
        self._per_round.append(self._sizes())
        return step.vector

    def model(self, _task: str, version: int) -> ModelRow | None:
        """As the journal does."""
        return self.rows[version]

    def steps(self, _task: str, version: int, most: int) -> list[bytes]:
        """As the journal does."""
        found = list[bytes]()
        for row in self.rows[version : max(0, version - most) : -1]:
            if row.step is None:
                break
            found.append(row.step)
        return found

    def figures(self) -> dict[str, Any]:
        """Bytes a round (manifest and weights), of those the manifest's, and of a gateway's first model."""
        per_round = mean(sum(sizes) for sizes in self._per_round)
        return {
            "bytes_down_per_round": round(per_round, 1),
            "bytes_down_manifest": round(mean(manifest for manifest, _ in self._per_round), 1),
            "bytes_down_last": sum(self._per_round[-1]),
            "bytes_down_first": self._first,
            "ratio_down": round(self._values / per_round, 2),
        }

    def _sizes(self) -> tuple[int, int]:
        """Bytes that a gateway reads to have the newest version once it has the one before: manifest and weights."""
        offer = Offer.of(self, _NAME, len(self.rows) - 1)
        if offer is None:
            raise IndexError
        weights = offer.steps[0] if offer.steps else offer.whole.weights
        return len(self._downlink.manifest(_NAME, self.row, offer)), len(weights)


def _row(version: int, vector: Vector, gateways: int, samples: int, step: bytes | None) -> ModelRow:
    weights = codec.encode(vector, codec.EXACT).data
    # A time as a real manifest has one: it counts in its size.
    made_ms = 10**12 + version
    return ModelRow(version, version, weights, weights_digest(vector), gateways, samples, made_ms, step, made_ms)
