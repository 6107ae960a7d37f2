"""A model's way back to a gateway: real chunks as the aggregator publishes them, and every way to be wrong."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest

from broker import topics
from broker.downlink import Downlink
from broker.genesis import put_first_model
from broker.journal import Journal
from broker.link import Link, MqttSettings
from broker.messages import CHUNK_BYTES, ModelManifest, Object, Signer, open_envelope
from edge.handback import MAX_PARAMETERS, Fetch
from models import codec
from models.delta import Layout, Vector
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


class Published(Link):
    """A link whose broker is a dictionary of retained messages."""

    def __init__(self) -> None:
        nothing = {"on_message": lambda _: None, "on_up": lambda: None, "on_down": lambda _: None}
        super().__init__(MqttSettings(url="mqtt://127.0.0.1"), client_id="x", will=None, **nothing)  # type: ignore[arg-type]
        self.retained: dict[str, bytes] = {}

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        assert (qos, retain) == (1, True)
        self.retained[topic] = payload
        return True


@dataclass
class Offer:
    """What the aggregator's own code publishes for a model."""

    manifest: ModelManifest
    chunks: dict[str, bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def offer(tmp_path_factory: pytest.TempPathFactory) -> Offer:
    folder: Path = tmp_path_factory.mktemp("aggregator")
    journal, task = Journal(folder), parse_task(TEXT)
    with journal.transaction():
        put_first_model(journal, task, TEXT, graph=GRAPH, vector=VECTOR, layout=LAYOUT, now_ms=5)
    row, model = journal.task("wear"), journal.model("wear")
    assert row is not None
    assert model is not None
    down, link = Downlink("press", SIGNER, 1), Published()
    down.put_chunks("wear", 0, "graph", row.graph)
    down.put_chunks("wear", 0, "weights", model.weights)
    down.put_manifest(task, row, model, LAYOUT.size)
    down.pump(link)
    journal.close()
    topic = topics.Manifest("press", "wear").topic
    manifest = open_envelope(link.retained.pop(topic), topic, SIGNER.public_key, ModelManifest)
    return Offer(manifest, link.retained)


def fetch(offer: Offer, known: bytes | None = None, /, **changes: object) -> Fetch:
    return Fetch("press", msgspec.structs.replace(offer.manifest, **changes), known)


def taken(offer: Offer, one: Fetch) -> Fetch:
    for topic in list(one.topics):
        assert one.take(topic, offer.chunks[topic])
    assert one.topics == []
    return one


def weights_topic(version: int = 0, i: int = 0) -> str:
    return topics.Chunk("press", "wear", version, f"weights{i}").topic


def test_a_good_model(offer: Offer) -> None:
    assert len(offer.chunks) == 5
    one = fetch(offer)
    assert set(one.topics) == set(offer.chunks)
    model = taken(offer, one).model()
    assert model.graph == GRAPH
    assert np.array_equal(model.vector, VECTOR)
    assert model.layout == LAYOUT
    assert model.task == parse_task(TEXT)


def test_a_graph_that_is_known_is_not_fetched_again(offer: Offer) -> None:
    one = fetch(offer, GRAPH)
    assert len(one.topics) == 3
    assert taken(offer, one).model().graph == GRAPH
    assert len(fetch(offer, GRAPH + b"x").topics) == 5


def test_chunks_come_in_any_order_and_twice(offer: Offer) -> None:
    one = fetch(offer)
    for topic in reversed(list(offer.chunks)):
        assert one.take(topic, offer.chunks[topic])
        assert not one.take(topic, offer.chunks[topic])
    assert np.array_equal(one.model().vector, VECTOR)


@pytest.mark.parametrize("bad", ["changed", "cut", "longer", "another"])
def test_a_chunk_that_was_not_signed(offer: Offer, bad: str) -> None:
    one, good = fetch(offer), offer.chunks[weights_topic()]
    sent = {
        "changed": bytes([good[0] ^ 1]) + good[1:], "cut": good[:-1], "longer": good + bytes(CHUNK_BYTES),
        "another": offer.chunks[weights_topic(i=1)],
    }[bad]  # fmt: skip
    with pytest.raises(PeerError) as caught:
        one.take(weights_topic(), sent)
    assert caught.value.reason == "chunk"
    assert weights_topic() in one.topics  # it is still waited for, and the right one is taken
    assert np.array_equal(taken(offer, one).model().vector, VECTOR)


def test_what_is_no_chunk_of_this_model(offer: Offer) -> None:
    one = fetch(offer)
    for topic in (weights_topic(version=7), weights_topic(i=3), "_fl/other/wear/model/0/weights0", "x"):
        assert not one.take(topic, offer.chunks[weights_topic()])
    assert not one.take(weights_topic(), b"")  # an older version's chunk is being cleared
    assert len(one.topics) == 5


def test_a_missing_chunk_is_never_a_model(offer: Offer) -> None:
    one = fetch(offer)
    for topic in list(one.topics)[1:]:
        one.take(topic, offer.chunks[topic])
    assert len(one.topics) == 1
    with pytest.raises(KeyError):
        one.model()


def refused(offer: Offer, reason: str, **changes: object) -> str:
    with pytest.raises(PeerError) as caught:
        fetch(offer, **changes)
    assert caught.value.reason == reason
    return caught.value.detail


def test_what_a_manifest_may_not_declare(offer: Offer) -> None:
    weights, graph = offer.manifest.weights, offer.manifest.graph
    replace = msgspec.structs.replace
    refused(offer, "layout", layout=(("a", (0,)),))
    refused(offer, "layout", layout=(("a", (MAX_PARAMETERS + 1,)),))
    assert "for 4 parameters" in refused(offer, "layout", layout=(("a", (4,)),))
    refused(offer, "layout", weights=replace(weights, size=weights.size + 4))
    refused(offer, "graph", graph=replace(graph, size=MAX_GRAPH_BYTES + 1))
    assert "weights in 6 chunks" in refused(offer, "size", weights=replace(weights, chunks=weights.chunks * 2))
    refused(offer, "size", graph=replace(graph, size=10, chunks=graph.chunks * 2))
    refused(offer, "task", task_text="name = 1")
    refused(offer, "task", task_text="not toml")
    refused(offer, "task", task_text="a = " + "[" * 30_000)


def remade(offer: Offer, vector: Vector, digest: bytes | None = None, size: int | None = None) -> Fetch:
    """Sign other weights: each chunk has its digest, but the whole is not what the manifest says."""
    data = codec.encode(vector, codec.EXACT).data
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    known = offer.manifest.weights
    thing = Object(
        "weights", 0, size or known.size, digest or known.digest, tuple(hashlib.sha256(p).digest() for p in pieces)
    )
    one = fetch(offer, GRAPH, weights=thing)
    for i, piece in enumerate(pieces):
        assert one.take(weights_topic(i=i), piece)
    return one


def test_weights_that_are_not_what_was_signed(offer: Offer) -> None:
    with pytest.raises(PeerError, match="weights: do not have the digest"):
        remade(offer, VECTOR + 1).model()
    with pytest.raises(PeerError, match="codec: 120004 values, the layout has 120003"):
        remade(offer, np.zeros(LAYOUT.size + 1, np.float32)).model()
    assert np.array_equal(remade(offer, VECTOR).model().vector, VECTOR)


def test_a_graph_that_is_not_what_was_signed(offer: Offer) -> None:
    graph = offer.manifest.graph
    one = taken(offer, fetch(offer, graph=msgspec.structs.replace(graph, digest=bytes(32))))
    with pytest.raises(PeerError, match="graph: does not have the digest"):
        one.model()
    one = taken(offer, fetch(offer, graph=msgspec.structs.replace(graph, size=graph.size - 1)))
    with pytest.raises(PeerError, match="codec: the frame declares 300000 bytes, 299999 are due"):
        one.model()


def test_a_frame_that_swells_is_stopped(offer: Offer) -> None:
    bomb = codec.deflate(bytes(1 << 28))
    assert len(bomb) < CHUNK_BYTES
    thing = Object("graph", 0, 1000, bytes(32), (hashlib.sha256(bomb).digest(),))
    one = fetch(offer, graph=thing)
    for topic in list(one.topics):
        one.take(topic, bomb if topic.endswith("graph0") else offer.chunks[topic])
    with pytest.raises(PeerError, match="codec: the frame declares"):
        one.model()


def test_the_layout_travels_as_plain_json(offer: Offer) -> None:
    wire = json.loads(json.dumps(LAYOUT.to_wire()))
    assert [list(e) for e in offer.manifest.layout] == [[n, s and tuple(s)] for n, s in wire]
