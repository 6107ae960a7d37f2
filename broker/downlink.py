"""What the aggregator publishes: retained chunks, manifests, plans and its own birth, and receipts.

Of a model, `Offer` says what is retained: the newest steps, and the whole weights that they lead on from.
Retained messages wait in order, newest content per topic, until the link takes them; after every connection all of
them are put again, because a broker may come back empty. A receipt that can't be sent is dropped: its gateway sends
the update again and gets another.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from broker import topics
from broker.channels import FIRST
from broker.federation import Federation, State
from broker.journal import ModelRow, TaskRow
from broker.link import Link
from broker.messages import (
    CHUNK_BYTES,
    GRAPH,
    MAX_STEPS,
    STEP,
    STEP_DIGEST,
    TERMS,
    VERSION,
    WEIGHTS,
    FederationBirth,
    FirstRoot,
    Message,
    ModelManifest,
    Object,
    Plan,
    Receipt,
    Signer,
    Terms,
    Whole,
)
from broker.round import STALEST
from models.delta import Layout
from models.ringcode import Ring
from models.spec import Task, task_digest

Objects = dict[tuple[int, str], bytes]


class Versions(Protocol):
    """What knows a task's models: the journal."""

    def model(self, task: str, version: int, /) -> ModelRow | None:
        """One version; None if there is none."""

    def steps(self, task: str, version: int, most: int, /) -> list[bytes]:
        """Steps that lead to a version, newest first, without a gap; `most` at most."""


@dataclass(frozen=True)
class Offer:
    """What leads to a version: the whole weights of one up to MAX_STEPS before, and the newest steps, newest first."""

    newest: ModelRow
    whole: ModelRow
    steps: tuple[bytes, ...]

    @classmethod
    def of(cls, versions: Versions, task: str, version: int) -> "Offer | None":
        """Return a version's offer, the same whenever it is asked for; None if there is no such version.

        A whole is due every MAX_STEPS versions, and where there is no way on by steps smaller than the whole.
        """
        newest = versions.model(task, version)
        if newest is None:
            return None
        steps, room = list[bytes](), len(newest.weights)
        for step in versions.steps(task, version, MAX_STEPS):
            room -= len(step)
            if room < 0:
                break
            steps.append(step)
        since = version % MAX_STEPS
        whole = versions.model(task, version - since) if since <= len(steps) else None
        return cls(newest, whole or newest, tuple(steps))

    def objects(self) -> Objects:
        """(version, name) -> bytes of what is retained for it, oldest first."""
        newest = self.newest.version
        steps = {(newest - i, STEP): step for i, step in enumerate(self.steps)}
        return {(self.whole.version, WEIGHTS): self.whole.weights} | dict(reversed(steps.items()))


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
        birth = FederationBirth(VERSION, self._session, self._signer.public_key, state)
        return self._signer.seal(birth, self.status_topic)

    def put(self, topic: str, payload: bytes) -> None:
        """Publish retained as soon as the link takes it, after what waits already; b"" clears the topic."""
        self._waiting.pop(topic, None)
        self._waiting[topic] = payload

    @property
    def waiting(self) -> list[tuple[str, bytes]]:
        """(topic, payload) of what waits, in order."""
        return list(self._waiting.items())

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

    def put_terms(self, task: str, row: TaskRow) -> None:
        """Put what all models of a task share; ValueError when it does not fit into a message."""
        self.put_chunks(task, 0, GRAPH, row.graph)
        self.put(self._terms_topic(task), self.terms(task, row))

    def put_model(self, task: str, row: TaskRow, offer: Offer, *, new: bool, released: bool = False) -> None:
        """Put the way to a version, all of it, or (`new`) what the version before did not have; then its manifest.

        `released` says that gateways are to score with releases alone, and with this one only if it becomes one.
        """
        for (version, name), data in offer.objects().items():
            if not new or version == offer.newest.version:
                self.put_chunks(task, version, name, data)
        self.put(topics.Manifest(self._federation, task).topic, self.manifest(task, row, offer, released=released))

    def clear(self, task: str, gone: Mapping[tuple[int, str], int]) -> None:
        """Clear what no manifest leads to any more: (version, name) -> bytes."""
        for (version, name), size in gone.items():
            for i in range(-(-size // CHUNK_BYTES)):
                self.put(topics.Chunk(self._federation, task, version, f"{name}{i}").topic, b"")

    def put_release(self, task: str, row: TaskRow, model: ModelRow, channel: str) -> None:
        """Put a released version, whole, and its channel's manifest."""
        self.put_chunks(task, model.version, WEIGHTS, model.weights)
        topic = topics.Manifest(self._federation, task, channel).topic
        self.put(topic, self.manifest(task, row, Offer(model, model, ()), channel, released=True))

    def put_metadata(self, files: Mapping[str, bytes]) -> None:
        """Put the metadata of releases; what says which of the others hold together goes last."""
        topic = topics.ReleaseFile(self._federation, FIRST).topic
        self.put(topic, self._signer.seal(FirstRoot(VERSION, files["root1"]), topic))
        for name in sorted(files, key=("snapshot", "timestamp").__contains__):
            self.put(topics.ReleaseFile(self._federation, name).topic, files[name])
        self.put(topics.ReleaseFile(self._federation, "timestamp").topic, files["timestamp"])

    def manifest(self, task: str, row: TaskRow, offer: Offer, of: str = "manifest", *, released: bool = False) -> bytes:
        """Seal the manifest of a version: the newest one, or that of a channel."""
        model = offer.newest
        manifest = ModelManifest(
            v=VERSION,
            version=model.version,
            round=model.round,
            created_ms=model.created_ms,
            signed_ms=model.signed_ms,
            gateways=model.gateways,
            samples=model.samples,
            terms=hashlib.sha256(self.terms(task, row)).digest(),
            digest=model.digest,
            whole=Whole(offer.whole.version, _digests(offer.whole.weights)),
            steps=tuple(hashlib.sha256(step).digest()[:STEP_DIGEST] for step in offer.steps),
            released=released,
        )
        return self._signer.seal(manifest, topics.Manifest(self._federation, task, of).topic)

    def _terms_topic(self, task: str) -> str:
        return topics.Chunk(self._federation, task, 0, f"{TERMS}0").topic

    def terms(self, task: str, row: TaskRow) -> bytes:
        """Seal the terms; the same bytes every time, since neither CBOR nor Ed25519 leaves a choice."""
        layout = Layout.from_json(row.layout).to_wire()
        graph = Object(GRAPH, 0, row.graph_size, row.graph_digest, _digests(row.graph))
        return self._signer.seal(Terms(VERSION, row.text, layout, graph), self._terms_topic(task))

    def put_plan(self, task: str, plan: Plan) -> None:
        """Put the plan of the latest round."""
        topic = topics.RoundPlan(self._federation, task).topic
        self.put(topic, self._signer.seal(plan, topic))

    def put_roster(self, number: int, part: Message) -> None:
        """Put a part of the roster ahead of what waits: gateways hold a plan against it."""
        topic = topics.RosterOf(self._federation, number).topic
        self._waiting.pop(topic, None)
        self._waiting = {topic: self._signer.seal(part, topic), **self._waiting}

    def receipt(self, task: str, path: str, receipt: Receipt) -> tuple[str, bytes]:
        """Seal a receipt; return (topic, envelope)."""
        topic = topics.ReceiptFor(self._federation, task, topics.GatewayPath.parse(path)).topic
        return topic, self._signer.seal(receipt, topic)


def plan_of(
    task: Task,
    text: str,
    federation: Federation,
    *,
    base_digest: bytes,
    deadline_ms: int,
    keep: float,
    ring: Ring | None = None,
    charter: bytes = b"",
    roster_ms: int = 0,
) -> Plan:
    """Make the plan of a federation's latest round, whose updates keep the share `keep`, or are a ring's.

    `charter` is the digest of the one in force, `roster_ms` the time of the roster that held at the round's opening.
    """
    current = federation.round
    state = "open" if federation.state is State.OPEN else "done" if federation.state is State.DONE else "closed"
    return Plan(
        v=VERSION,
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
        keep_ppm=max(1, round(1e6 * keep)),
        stalest=0 if task.round.full is None else STALEST,
        ring=ring.data if ring else b"",
        charter=charter,
        roster_ms=roster_ms,
    )


def _pieces(data: bytes) -> list[bytes]:
    return [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]


def _digests(data: bytes) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(piece).digest() for piece in _pieces(data))
