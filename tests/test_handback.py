"""A model's way back to a gateway: real chunks as the aggregator publishes them, and every way to be wrong."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker import topics
from broker.downlink import Downlink, Offer
from broker.genesis import put_first_model
from broker.journal import Journal, ModelRow
from broker.link import Link, MqttSettings
from broker.messages import (
    CHUNK_BYTES,
    MAX_PAYLOAD,
    MAX_STEPS,
    STEP_DIGEST,
    ModelManifest,
    Object,
    Signer,
    Terms,
    Whole,
    open_envelope,
    peek,
)
from broker.steps import step_towards
from edge.handback import MAX_PARAMETERS, Fetch, Model
from models import codec
from models.delta import Layout, Vector, weights_digest
from models.errors import PeerError
from models.graph import MAX_GRAPH_BYTES
from models.spec import parse_task

TEXT = (
    'name = "wear"\nkind = "regression"\nnet = "mlp"\n'
    '[window]\nlength = 4\n[[signal]]\nname = "T"\n[target]\nname = "r"\n'
)
LAYOUT = Layout(("body.weight", "head.weight"), ((300, 400), (3,)), ("steps",))
GRAPH = np.random.default_rng(2).bytes(300_000)  # two chunks
VECTOR = np.random.default_rng(3).normal(size=LAYOUT.size).astype(np.float32)  # three chunks
SIGNER = Signer.from_bytes(bytes(range(32)))
TERMS_TOPIC = topics.Chunk("press", "wear", 0, "terms0").topic


class Retained(Link):
    """A link whose broker is a dictionary of retained messages."""

    def __init__(self) -> None:
        nothing = {"on_message": lambda _: None, "on_up": lambda: None, "on_down": lambda _: None}
        super().__init__(MqttSettings(url="mqtt://127.0.0.1"), client_id="x", will=None, **nothing)  # type: ignore[arg-type]
        self.retained: dict[str, bytes] = {}

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        assert (qos, retain) == (1, True)
        self.retained[topic] = payload
        if not payload:
            del self.retained[topic]
        return True


@dataclass
class Published:
    """What the aggregator's own code publishes of a task's newest version."""

    manifest: ModelManifest
    chunks: dict[str, bytes] = field(default_factory=dict)


class Aggregator:
    """Its journal and its downlink; each `publish` makes a version of VECTOR plus noise, as the service does."""

    def __init__(self, folder: Path) -> None:
        self.journal, self.task, self.now_ms = Journal(folder), parse_task(TEXT), 5
        self.residual: Vector | None = None
        self.link, self.down = Retained(), Downlink("press", SIGNER, 1)
        with self.journal.transaction():
            put_first_model(
                self.journal, self.task, TEXT, graph=GRAPH, vector=VECTOR, layout=LAYOUT, now_ms=self.now_ms
            )
        self.put(new=False)

    def put(self, *, new: bool = True) -> None:
        row, newest = self.journal.task("wear"), self.journal.model("wear")
        assert row
        assert newest
        offer = Offer.of(self.journal, "wear", newest.version)
        assert offer
        if not new:
            self.down.put_terms("wear", row)
        self.down.put_model("wear", row, offer, new=new)
        self.down.pump(self.link)

    def publish(self, seed: int, keep: float | None = 0.02) -> None:
        newest = self.journal.model("wear")
        assert newest
        before = codec.decode(newest.weights, LAYOUT.size)
        shared = LAYOUT.mask(self.task.personal)
        goal = before + np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32) * shared
        step = step_towards(goal, before, self.residual, shared, keep)
        self.residual, self.now_ms, version = step.residual, self.now_ms + 1, newest.version + 1
        weights = codec.encode(step.vector, codec.EXACT).data
        with self.journal.transaction():
            digest, now_ms = weights_digest(step.vector), self.now_ms
            row = ModelRow(version, version, weights, digest, 1, 1, now_ms, step.payload, now_ms)
            self.journal.put_model("wear", row)
        self.put()

    def published(self) -> Published:
        topic = topics.Manifest("press", "wear").topic
        manifest = open_envelope(self.link.retained[topic], topic, SIGNER.public_key, ModelManifest)
        return Published(manifest, {t: data for t, data in self.link.retained.items() if t != topic})

    def model(self, version: int | None = None) -> Vector:
        row = self.journal.model("wear", version)
        assert row
        return codec.decode(row.weights, LAYOUT.size)


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Published:
    aggregator = Aggregator(tmp_path_factory.mktemp("aggregator"))
    aggregator.journal.close()
    return aggregator.published()


@pytest.fixture
def aggregator(tmp_path: Path) -> Iterator[Aggregator]:
    one = Aggregator(tmp_path)
    yield one
    one.journal.close()


def fetch(offer: Published, held: Model | None = None, /, **changes: object) -> Fetch:
    return Fetch("press", "wear", msgspec.structs.replace(offer.manifest, **changes), held)


def taken(offer: Published, one: Fetch) -> Fetch:
    while one.topics:
        topic = one.topics[0]
        assert one.take(topic, offer.chunks[topic])
    return one


def started(offer: Published, one: Fetch) -> Fetch:
    """Of a fetch that knows nothing yet, the terms are there."""
    assert one.topics == [TERMS_TOPIC]
    assert one.take(TERMS_TOPIC, offer.chunks[TERMS_TOPIC])
    return one


def weights_topic(version: int = 0, i: int = 0) -> str:
    return topics.Chunk("press", "wear", version, f"weights{i}").topic


def test_a_good_model(offer: Published) -> None:
    assert len(offer.chunks) == 6
    one = started(offer, fetch(offer))
    assert set(one.topics) == set(offer.chunks) - {TERMS_TOPIC}
    model = taken(offer, one).model()
    assert model.graph == GRAPH
    assert np.array_equal(model.vector, VECTOR)
    assert model.layout == LAYOUT
    assert model.task == parse_task(TEXT)


def test_chunks_come_in_any_order_and_twice(offer: Published) -> None:
    one = started(offer, fetch(offer))
    for topic in reversed(one.topics):
        assert one.take(topic, offer.chunks[topic])
        assert not one.take(topic, offer.chunks[topic])
    assert np.array_equal(one.model().vector, VECTOR)


def test_who_missed_rounds_fetches_those_and_nothing_else(aggregator: Aggregator) -> None:
    held = [taken(aggregator.published(), fetch(aggregator.published())).model()]
    for version in range(1, 11):
        aggregator.publish(version)
        offer = aggregator.published()
        model = taken(offer, fetch(offer, held[-1])).model()
        assert np.array_equal(model.vector, aggregator.model())
        held.append(model)
        for missed in {1, 2, MAX_STEPS, min(version, MAX_STEPS + 1)} - set(range(version + 1, 20)):
            one = fetch(offer, held[version - missed])
            names = [topic.rsplit("/", 2)[-2:] for topic in one.topics]
            steps = [[str(v), "step0"] for v in range(version - missed + 1, version + 1)]
            if missed <= MAX_STEPS:
                assert names == steps
            else:
                assert [name for _, name in names[:3]] == ["weights0", "weights1", "weights2"]
                assert {v for v, _ in names[:3]} == {str(version - version % MAX_STEPS)}
                assert len(names) == 3 + version % MAX_STEPS
            assert np.array_equal(taken(offer, one).model().vector, aggregator.model())
        newcomer = taken(offer, fetch(offer)).model()
        assert np.array_equal(newcomer.vector, aggregator.model())
    sizes = [len(data) for topic, data in offer.chunks.items() if "step" in topic]
    assert max(sizes) < 4 * LAYOUT.size / 100
    envelope = aggregator.link.retained[topics.Manifest("press", "wear").topic]
    assert len(envelope) < 420


def test_steps_as_large_as_the_whole_are_not_offered(aggregator: Aggregator) -> None:
    for version, keep in ((1, 0.02), (2, None), (3, 0.02), (4, 0.5), (5, 0.5), (6, 0.5), (7, 0.5)):
        aggregator.publish(version, keep)
        offer = aggregator.published()
        assert len(offer.manifest.steps) == (1, 0, 1, 2, 3, 4, 5)[version - 1]
        assert offer.manifest.whole.version == (0, 2, 3, 4, 5, 6, 7)[version - 1]
        assert np.array_equal(taken(offer, fetch(offer)).model().vector, aggregator.model())


def test_other_weights_than_those_led_on_from(aggregator: Aggregator) -> None:
    """An aggregator restored from a backup made other versions of the same numbers."""
    first = taken(aggregator.published(), fetch(aggregator.published())).model()
    aggregator.publish(1)
    offer = aggregator.published()
    lost = replace(first, vector=first.vector + 1, manifest=msgspec.structs.replace(first.manifest, digest=bytes(32)))
    one = taken(offer, fetch(offer, lost))
    with pytest.raises(PeerError, match="weights: do not have the digest"):
        one.model()
    assert one.fall_back()
    assert len(one.topics) == 3  # the whole; the step and the graph are there already
    assert np.array_equal(taken(offer, one).model().vector, aggregator.model())
    assert not one.fall_back()
    # One that is ahead, or at the same number with other weights, takes the whole at once.
    for version in (1, 2):
        ahead = replace(lost, manifest=msgspec.structs.replace(lost.manifest, version=version))
        assert any("weights" in topic for topic in fetch(offer, ahead).topics)
    same = taken(offer, fetch(offer)).model()
    assert fetch(offer, same).topics == []


def test_a_step_that_is_not_what_was_signed(aggregator: Aggregator) -> None:
    first = taken(aggregator.published(), fetch(aggregator.published())).model()
    aggregator.publish(1)
    offer = aggregator.published()
    (topic,) = fetch(offer, first).topics
    good = offer.chunks[topic]
    for bad in (good[:-1], good + b"x", bytes([good[0] ^ 1]) + good[1:], bytes(CHUNK_BYTES + 1)):
        one = fetch(offer, first)
        with pytest.raises(PeerError, match="chunk"):
            one.take(topic, bad)
        assert one.topics == [topic]
    # Signed, but no codec payload of this layout, or one that leads elsewhere.
    other = codec.encode(np.ones(LAYOUT.size, np.float32), codec.SPARSE, 0.1).data
    longer = codec.encode(np.ones(LAYOUT.size + 1, np.float32), codec.SPARSE, 0.1).data
    for bad, says in ((b"x", "codec"), (good[:-1], "codec"), (longer, "codec"), (other, "weights")):
        one = fetch(offer, first, steps=(hashlib.sha256(bad).digest()[:STEP_DIGEST],))
        assert one.take(topic, bad)
        with pytest.raises(PeerError, match=says):
            one.model()
        assert one.fall_back()


@pytest.mark.parametrize("bad", ["changed", "cut", "longer", "another"])
def test_a_chunk_that_was_not_signed(offer: Published, bad: str) -> None:
    one, good = started(offer, fetch(offer)), offer.chunks[weights_topic()]
    sent = {
        "changed": bytes([good[0] ^ 1]) + good[1:], "cut": good[:-1], "longer": good + bytes(CHUNK_BYTES),
        "another": offer.chunks[weights_topic(i=1)],
    }[bad]  # fmt: skip
    with pytest.raises(PeerError) as caught:
        one.take(weights_topic(), sent)
    assert caught.value.reason == "chunk"
    assert weights_topic() in one.topics  # it is still waited for, and the right one is taken
    assert np.array_equal(taken(offer, one).model().vector, VECTOR)


def test_what_is_no_chunk_of_this_model(offer: Published) -> None:
    one = started(offer, fetch(offer))
    for topic in (weights_topic(version=7), weights_topic(i=3), "_fl/other/wear/model/0/weights0", "x"):
        assert not one.take(topic, offer.chunks[weights_topic()])
    assert not one.take(weights_topic(), b"")  # an older version's chunk is being cleared
    assert len(one.topics) == 5


def test_a_missing_chunk_is_never_a_model(offer: Published) -> None:
    one = started(offer, fetch(offer))
    for topic in list(one.topics)[1:]:
        one.take(topic, offer.chunks[topic])
    assert len(one.topics) == 1
    with pytest.raises(KeyError):
        one.model()


def with_terms(offer: Published, **changes: object) -> Fetch:
    """Sign other terms, and let them come."""
    terms = msgspec.structs.replace(peek(offer.chunks[TERMS_TOPIC], Terms), **changes)
    envelope = SIGNER.seal(terms, TERMS_TOPIC)
    one = fetch(offer, terms=hashlib.sha256(envelope).digest())
    assert one.take(TERMS_TOPIC, envelope)
    return one


def test_what_terms_may_not_declare(offer: Published) -> None:
    graph, replaced = peek(offer.chunks[TERMS_TOPIC], Terms).graph, msgspec.structs.replace

    def refused(reason: str, **changes: object) -> str:
        with pytest.raises(PeerError) as caught:
            with_terms(offer, **changes)
        assert caught.value.reason == reason
        return caught.value.detail

    refused("layout", layout=(("a", (0,)),))
    refused("layout", layout=(("a", (MAX_PARAMETERS + 1,)),))
    refused("graph", graph=replaced(graph, size=MAX_GRAPH_BYTES + 1))
    refused("size", graph=replaced(graph, size=10, chunks=graph.chunks * 2))
    refused("task", task_text="name = 1")
    refused("task", task_text="not toml")
    refused("task", task_text="a = " + "[" * 30_000)
    refused("task", task_text=TEXT.replace('"wear"', '"other"'))
    one = fetch(offer)
    for bad in (b"x", offer.chunks[TERMS_TOPIC][:-1], bytes(MAX_PAYLOAD + 1)):
        with pytest.raises(PeerError, match="chunk"):
            one.take(TERMS_TOPIC, bad)
    one = fetch(offer, terms=hashlib.sha256(b"x").digest())
    with pytest.raises(PeerError, match="envelope"):
        one.take(TERMS_TOPIC, b"x")


def test_what_a_manifest_may_not_declare(offer: Published) -> None:
    whole = offer.manifest.whole
    for changes in (
        {"version": 3},
        {"version": 3, "whole": Whole(4, whole.chunks)},
        {"steps": (bytes(STEP_DIGEST),)},
        {"version": 2, "steps": (bytes(STEP_DIGEST),)},
    ):
        with pytest.raises(PeerError, match="manifest: no way from version"):
            fetch(offer, **changes)
    one = fetch(offer, whole=Whole(0, whole.chunks * 2))
    with pytest.raises(PeerError, match="size: weights in 6 chunks"):
        one.take(TERMS_TOPIC, offer.chunks[TERMS_TOPIC])


def remade(offer: Published, vector: Vector) -> Fetch:
    """Sign other weights: each chunk has its digest, but the whole is not what the manifest says."""
    data = codec.encode(vector, codec.EXACT).data
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    one = started(offer, fetch(offer, whole=Whole(0, tuple(hashlib.sha256(p).digest() for p in pieces))))
    for i, piece in enumerate(pieces):
        assert one.take(weights_topic(i=i), piece)
    return taken(offer, one)


def test_weights_that_are_not_what_was_signed(offer: Published) -> None:
    with pytest.raises(PeerError, match="weights: do not have the digest"):
        remade(offer, VECTOR + 1).model()
    with pytest.raises(PeerError, match="codec: 120004 values, the layout has 120003"):
        remade(offer, np.zeros(LAYOUT.size + 1, np.float32)).model()
    assert np.array_equal(remade(offer, VECTOR).model().vector, VECTOR)


def test_a_graph_that_is_not_what_was_signed(offer: Published) -> None:
    graph = peek(offer.chunks[TERMS_TOPIC], Terms).graph
    one = taken(offer, with_terms(offer, graph=msgspec.structs.replace(graph, digest=bytes(32))))
    with pytest.raises(PeerError, match="graph: does not have the digest"):
        one.model()
    one = taken(offer, with_terms(offer, graph=msgspec.structs.replace(graph, size=graph.size - 1)))
    with pytest.raises(PeerError, match="codec: the frame declares 300000 bytes, 299999 are due"):
        one.model()


def test_a_frame_that_swells_is_stopped(offer: Published) -> None:
    bomb = codec.deflate(bytes(1 << 28))
    assert len(bomb) < CHUNK_BYTES
    one = with_terms(offer, graph=Object("graph", 0, 1000, bytes(32), (hashlib.sha256(bomb).digest(),)))
    for topic in list(one.topics):
        one.take(topic, bomb if topic.endswith("graph0") else offer.chunks[topic])
    with pytest.raises(PeerError, match="codec: the frame declares"):
        one.model()


def test_the_layout_travels_as_plain_json(offer: Published) -> None:
    wire = json.loads(json.dumps(LAYOUT.to_wire()))
    assert [list(e) for e in peek(offer.chunks[TERMS_TOPIC], Terms).layout] == [[n, s and tuple(s)] for n, s in wire]
