"""What the aggregator publishes: retained chunks, manifests, plans and its own birth, and receipts.

Retained messages wait in order, newest content per topic, until the link takes them; after every connection all of
them are put again, because a broker may come back empty. A receipt that can't be sent is dropped: its gateway sends
the update again and gets another.
"""

import hashlib
import json

import msgspec

from broker import topics
from broker.federation import Federation, State
from broker.journal import ModelRow, TaskRow
from broker.link import Link
from broker.messages import (
    CHUNK_BYTES,
    FederationBirth,
    ModelManifest,
    Object,
    Plan,
    Receipt,
    Signer,
)
from models.spec import Task, task_digest


class Downlink:
    """Seals and sends; `pump` after every change and from time to time."""

    def __init__(self, federation: str, signer: Signer, session: int) -> None:
        self._federation = federation
        self._signer = signer
        self._session = session
        self._waiting: dict[str, bytes] = {}

    @property
    def status_topic(self) -> str:
        """Where the federation's birth and last will go."""
        return topics.FederationStatus(self._federation).topic

    def status(self, state: str) -> bytes:
        """Seal the federation's birth (`up`), or its last will (`down`)."""
        birth = FederationBirth(1, self._session, self._signer.public_key, state)
        return self._signer.seal(birth, self.status_topic)

    def put(self, topic: str, payload: bytes) -> None:
        """Publish retained as soon as the link takes it, after what waits already; b"" clears the topic."""
        self._waiting.pop(topic, None)
        self._waiting[topic] = payload

    def forget(self) -> None:
        """Drop what waits: a new connection begins with everything."""
        self._waiting.clear()

    def pump(self, link: Link) -> None:
        """Hand to the link what it takes now, in order."""
        while self._waiting:
            topic, payload = next(iter(self._waiting.items()))
            if not link.publish(topic, payload, retain=True):
                return
            self._waiting.pop(topic)

    def put_chunks(self, task: str, version: int, name: str, data: bytes) -> None:
        """Put an object's chunks."""
        for i, piece in enumerate(_pieces(data)):
            self.put(topics.Chunk(self._federation, task, version, f"{name}{i}").topic, piece)

    def clear_chunks(self, task: str, version: int, name: str, data: bytes) -> None:
        """Clear the chunks that `put_chunks` put."""
        for i in range(len(_pieces(data))):
            self.put(topics.Chunk(self._federation, task, version, f"{name}{i}").topic, b"")

    def put_manifest(self, task: Task, row: TaskRow, model: ModelRow, count: int) -> None:
        """Put the manifest of the newest model; `count` is the number of values in its vector."""
        graph = Object("graph", 0, row.graph_size, row.graph_digest, _digests(row.graph))
        weights = Object("weights", model.version, 4 * count, model.digest, _digests(model.weights))
        manifest = ModelManifest(
            v=1,
            task_text=row.text,
            version=model.version,
            round=model.round,
            created_ms=model.created_ms,
            gateways=model.gateways,
            samples=model.samples,
            layout=msgspec.convert(json.loads(row.layout), tuple[tuple[str, tuple[int, ...] | None], ...]),
            graph=graph,
            weights=weights,
        )
        topic = topics.Manifest(self._federation, task.name).topic
        self.put(topic, self._signer.seal(manifest, topic))

    def put_plan(self, task: Task, text: str, federation: Federation, base_digest: bytes, deadline_ms: int) -> None:
        """Put the plan of the latest round; nothing before the first."""
        if not federation.number:
            return
        current = federation.round
        state = "open" if federation.state is State.OPEN else "done" if federation.state is State.DONE else "closed"
        plan = Plan(
            v=1,
            task_digest=task_digest(text),
            round=federation.number,
            base=current.base if current else federation.version,
            base_digest=base_digest,
            state=state,
            opened_ms=max(0, federation.opened_ms),
            deadline_ms=current.deadline_ms if current else deadline_ms,
            min_gateways=task.round.min_gateways,
            bits=task.round.bits,
            secure_aggregation=task.privacy.secure_aggregation,
            keep_ppm=max(1, round(1e6 * task.round.keep_in(federation.number))),
        )
        topic = topics.RoundPlan(self._federation, task.name).topic
        self.put(topic, self._signer.seal(plan, topic))

    def receipt(self, task: str, path: str, receipt: Receipt) -> tuple[str, bytes]:
        """Seal a receipt; return (topic, envelope)."""
        topic = topics.ReceiptFor(self._federation, task, topics.GatewayPath.parse(path)).topic
        return topic, self._signer.seal(receipt, topic)


def _pieces(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]


def _digests(data: bytes) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(piece).digest() for piece in _pieces(data))
