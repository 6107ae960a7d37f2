"""Envelopes: what was signed for a topic comes back, and nothing else is ever believed."""

import cbor2
import cwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.charter import Acceptance, CharterText
from broker.messages import (
    MAX_PAYLOAD,
    Answer,
    AnyMessage,
    Birth,
    Death,
    FederationBirth,
    Installed,
    Message,
    ModelManifest,
    Object,
    Plan,
    Receipt,
    Signer,
    Terms,
    Update,
    Whole,
    open_envelope,
    peek,
)
from models.errors import PeerError

TOPIC = "acme/lyon/press/line4/cell2/_fl/spindle-wear/update"
SIGNER = Signer.from_bytes(bytes(range(32)))
UPDATE = Update(1, 7, 6, 128, 0.25, b"payload")
# RFC 8032: the public key of the private key 00 01 … 1f. Ed25519 signs without randomness, so envelopes are vectors.
PUBLIC = "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
ENVELOPE = (
    "d28443a10127a0581e87667570646174650107061880fb3fd0000000000000477061796c6f616458404e078a6dbda192352a"
    "a28ebb3ccf07630046e2406fe4e368cddd4210aa647342109b9556a5071ee6e0132c468c62bcadca23b33e3d6aa17590b501"
    "14162a8907"
)
DIGEST = bytes(32)
OBJECT = Object("weights", 3, 12, DIGEST, (DIGEST,))
MESSAGES: list[AnyMessage | CharterText | Acceptance] = [
    Birth(1, 5, 6, DIGEST, "tundish 0.1.0", ("wear",)),
    Birth(1, 5, 6, DIGEST, "tundish 0.1.0", ("wear",), DIGEST),
    Birth(1, 5, 6, DIGEST, "tundish 0.1.0", ("wear",), DIGEST, (Installed("wear", 3, 1),)),
    Death(1, 1_700_000_000_000),
    Answer(1, 3, "declined", "too-few", "12 windows, 64 are needed", 9),
    UPDATE,
    Update(1, 7, 6, 128, None, b"", 0.5, 2),
    FederationBirth(1, 5, DIGEST, "up"),
    Plan(1, DIGEST, 1, 0, DIGEST, "open", 1, 2, 3, 8, secure_aggregation=False),
    Receipt(1, 7, DIGEST, "refused-codec", "why", 1),
    Terms(1, "text", (("a", (1, 3)), ("steps", None)), OBJECT),
    ModelManifest(1, 3, 3, 1, 3, 600, DIGEST, DIGEST, Whole(2, (DIGEST,)), (bytes(8),)),
    ModelManifest(1, 3, 3, 1, 3, 600, DIGEST, DIGEST, Whole(2, (DIGEST,)), (bytes(8),), signed_ms=2),
    CharterText(1, "title = …", 7),
    Acceptance(1, DIGEST, 7),
]


def sealed(payload: object, topic: str = TOPIC) -> bytes:
    """Sign any CBOR value correctly: what a hostile but enrolled gateway can do."""
    envelope: bytes = cwt.COSE.new(alg_auto_inclusion=True).encode(
        cbor2.dumps(payload), SIGNER._cose, external_aad=topic.encode()
    )
    return envelope


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: Message) -> None:
    envelope = SIGNER.seal(message, TOPIC)
    assert open_envelope(envelope, TOPIC, SIGNER.public_key, type(message)) == message
    assert peek(envelope, type(message)) == message


class OlderUpdate(Message, frozen=True, tag="update"):
    """An update as it was before it had its last fields."""

    round: int
    base: int
    samples: int
    metric: float | None
    payload: bytes


def test_fields_that_have_their_defaults_are_read_by_who_does_not_know_them() -> None:
    old = OlderUpdate(1, 7, 6, 100, 0.5, b"payload")
    new = Update(1, 7, 6, 100, 0.5, b"payload")
    assert open_envelope(SIGNER.seal(new, TOPIC), TOPIC, SIGNER.public_key, OlderUpdate) == old
    assert open_envelope(SIGNER.seal(old, TOPIC), TOPIC, SIGNER.public_key, Update) == new
    narrow = Update(1, 7, 6, 100, 0.5, b"payload", quarters=2)
    assert open_envelope(SIGNER.seal(narrow, TOPIC), TOPIC, SIGNER.public_key, Update) == narrow
    with pytest.raises(PeerError, match="schema"):
        open_envelope(SIGNER.seal(narrow, TOPIC), TOPIC, SIGNER.public_key, OlderUpdate)


def test_vectors() -> None:
    assert SIGNER.public_key.hex() == PUBLIC
    assert SIGNER.seal(UPDATE, TOPIC).hex() == ENVELOPE
    assert open_envelope(bytes.fromhex(ENVELOPE), TOPIC, bytes.fromhex(PUBLIC), Update) == UPDATE
    assert Signer.from_bytes(SIGNER.to_bytes()).public_key == SIGNER.public_key


def test_a_birth_of_a_gateway_from_before_is_read() -> None:
    fields = ["birth", 1, 5, 6, DIGEST, "tundish 0.1.0", ["wear"]]
    assert open_envelope(sealed(fields), TOPIC, SIGNER.public_key, Birth).agreement_key is None
    assert open_envelope(sealed([*fields, DIGEST]), TOPIC, SIGNER.public_key, Birth).installed == ()
    for many in ([["wear", 1, -1]], [["wear", 1]], [["wear", 1, 1, 1]], [["wear", 1, 1]] * 65):
        assert refused(sealed([*fields, DIGEST, many]), Birth) == "schema"
    for bad in (b"", bytes(31), bytes(33), 7):
        assert refused(sealed([*fields, bad]), Birth) == "schema"


def test_truncated_at_every_byte() -> None:
    envelope = bytes.fromhex(ENVELOPE)
    for end in range(len(envelope)):
        with pytest.raises(PeerError, match="envelope"):
            open_envelope(envelope[:end], TOPIC, SIGNER.public_key, Update)


def test_every_flipped_bit_is_refused() -> None:
    envelope = bytes.fromhex(ENVELOPE)
    for position in range(len(envelope) * 8):
        bad = bytearray(envelope)
        bad[position // 8] ^= 1 << position % 8
        with pytest.raises(PeerError):
            open_envelope(bytes(bad), TOPIC, SIGNER.public_key, Update)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for function in (lambda: open_envelope(data, TOPIC, SIGNER.public_key, Update), lambda: peek(data, Birth)):
        with pytest.raises(PeerError):
            function()


def refused(envelope: bytes, type_: type[Message] = Update, topic: str = TOPIC, key: bytes | None = None) -> str:
    with pytest.raises(PeerError) as caught:
        open_envelope(envelope, topic, key or SIGNER.public_key, type_)
    return caught.value.reason


def test_replay_on_another_topic_and_another_key() -> None:
    envelope = SIGNER.seal(UPDATE, TOPIC)
    assert refused(envelope, topic=TOPIC.replace("cell2", "cell3")) == "signature"
    assert refused(envelope, key=Signer.generate().public_key) == "signature"
    assert refused(envelope, key=bytes(32)) == "signature"


def test_oversized() -> None:
    assert refused(bytes(MAX_PAYLOAD + 1)) == "size"
    with pytest.raises(ValueError, match="at most"):
        SIGNER.seal(Update(1, 1, 0, 1, None, bytes(MAX_PAYLOAD)), TOPIC)


def test_bytes_after_the_envelope() -> None:
    assert refused(SIGNER.seal(UPDATE, TOPIC) + b"\0") == "envelope"


@pytest.mark.parametrize(
    "payload",
    [
        ["update", 2, 7, 6, 128, 0.25, b"p"],  # a version of tomorrow
        ["update", 0, 7, 6, 128, 0.25, b"p"],
        ["updat", 1, 7, 6, 128, 0.25, b"p"],
        ["birth", 1, 7, 6, 128, 0.25, b"p"],
        ["update", 1, 7, 6, 128, 0.25],
        ["update", 1, 7, 6, 128, 0.25, b"p", 1, 1, 1, 1],
        ["update", 1, -1, 6, 128, 0.25, b"p"],
        ["update", 1, 7, 6, 0, 0.25, b"p"],
        ["update", 1, 7, 6, 2**60, 0.25, b"p"],
        ["update", 1, 7, 6, 1.5, 0.25, b"p"],
        ["update", 1, 7, 6, True, 0.25, b"p"],
        ["update", 1, 7, 6, 128, float("nan"), b"p"],
        ["update", 1, 7, 6, 128, float("inf"), b"p"],
        ["update", 1, 7, 6, 128, 0.25, "p"],
        {"type": "update"},
        None,
        7,
        [],
        cbor2.CBORTag(0, "2026-01-01T00:00:00Z"),
    ],
    ids=str,
)
def test_signed_but_not_a_message(payload: object) -> None:
    assert refused(sealed(payload)) == "schema"


@pytest.mark.parametrize(
    "hexadecimal",
    [
        "c5821b400000000000000003",  # a bigfloat whose exponent decimal can't hold
        "d823645b5b5b5b",  # a pattern that does not compile
        "c074323032362d30312d30315430303a30303a30305a",  # a date
        "a1616101",  # a map
        "8181c100",  # a tag further in
        "5fc100ff",  # a tag among the parts of bytes
        "1c",  # a reserved length
        "00" * 2,  # two items
        "9f" + "00" * 70_000 + "ff",  # more items than any message has
        "9b7fffffffffffffff",  # an array that says it has 2^63 - 1 items
        "5b7fffffffffffffff00",  # bytes that say so
        "81" * 5000,  # nested too deep
        "d8198100",  # a tag for shared references
        "c48219ffff1b7fffffffffffffff",  # a decimal fraction with a huge exponent
    ],
    ids=lambda h: h[:12],
)
def test_cbor_that_asks_for_too_much(hexadecimal: str) -> None:
    data = bytes.fromhex(hexadecimal)
    assert refused(data) == "envelope"
    with pytest.raises(PeerError, match="envelope"):
        peek(data, Birth)
    envelope: bytes = cwt.COSE.new(alg_auto_inclusion=True).encode(data, SIGNER._cose, external_aad=TOPIC.encode())
    assert refused(envelope) == "schema"
    with pytest.raises(PeerError, match="schema"):
        peek(envelope, Update)


HEAD, SIGNATURE = bytes.fromhex("d28443a10127a0"), bytes.fromhex("5840") + bytes(64)


@pytest.mark.parametrize(
    "envelope",
    [
        HEAD + bytes.fromhex("5f414100ff") + SIGNATURE,  # bytes in parts
        HEAD + bytes.fromhex("5bffffffffffffffff00") + SIGNATURE,
        HEAD + bytes.fromhex("6100") + SIGNATURE,  # text
        HEAD + bytes.fromhex("5c00") + SIGNATURE,
        HEAD + SIGNATURE,
        HEAD + bytes.fromhex("4100") + SIGNATURE + b"\0",
        HEAD + bytes.fromhex("4100") + bytes.fromhex("583f") + bytes(63),
        bytes.fromhex("d28443a10127a1c5821b400000000000000003004100") + SIGNATURE,  # a header that computes
        bytes.fromhex("d284c5821b400000000000000003a04100") + SIGNATURE,
    ],
    ids=lambda e: e.hex()[:60],
)
def test_any_other_shape_reaches_no_decoder(envelope: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.cose.cbor2", None)
    assert refused(envelope) == "envelope"
    with pytest.raises(PeerError, match="envelope"):
        peek(envelope, Birth)


@pytest.mark.parametrize("length", ["581e", "59001e", "5a0000001e", "5b000000000000001e"])
def test_every_length_of_the_payload_is_read(length: str) -> None:
    """The signature is over the payload, not over how its length is written."""
    payload = bytes.fromhex(ENVELOPE)[9:-66]
    envelope = HEAD + bytes.fromhex(length) + payload + bytes.fromhex(ENVELOPE)[-66:]
    assert peek(envelope, Update) == UPDATE
    assert open_envelope(envelope, TOPIC, SIGNER.public_key, Update) == UPDATE


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_signed_bytes_are_refused(data: bytes) -> None:
    envelope = cwt.COSE.new(alg_auto_inclusion=True).encode(data, SIGNER._cose, external_aad=TOPIC.encode())
    assert refused(envelope) in {"schema", "envelope"}
