"""Typed payloads <-> signed bytes.

An envelope is a COSE_Sign1 (RFC 9052) over Ed25519 (EdDSA, RFC 8032). Its payload is the CBOR (RFC 8949) array
`[type, version, field…]`, and the MQTT topic is its external_aad, so that a message replayed on another topic does
not verify. Unknown types, versions, fields and lengths are refused, and so is any byte after the envelope.

Times are integer milliseconds since 1970-01-01 UTC on the sender's clock; digests are SHA-256 (32 bytes).
"""

from typing import Annotated, Literal, TypeVar

import cbor2
import cwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cwt.exceptions import CWTError

from broker.cose import read_plain, take_apart
from models.errors import PeerError

MAX_PAYLOAD = 256 * 1024
CHUNK_BYTES = 192 * 1024
VERSION = 1
KEY_BYTES = 32
# Names of the objects of a model, in its chunks' topics.
TERMS, GRAPH, WEIGHTS, STEP = "terms", "graph", "weights", "step"
# Versions that a manifest leads on from: a gateway that missed more rounds takes the whole model.
MAX_STEPS = 8
STEP_DIGEST = 8

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
StepDigest = Annotated[bytes, msgspec.Meta(min_length=STEP_DIGEST, max_length=STEP_DIGEST)]
PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Text = Annotated[str, msgspec.Meta(max_length=512)]
Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9-]{1,40}$")]
Millis = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Share = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]  # in millionths
Real = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]


# Of a base's digest that an update carries: it tells versions apart, the signature proves.
BASE_DIGEST = 4


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Base of all messages. `v` is the version of its fields, 1 today."""

    v: Annotated[int, msgspec.Meta(ge=VERSION, le=VERSION)]


class Installed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A release that a gateway has installed: the task, the release's number, and the version that it is."""

    task: Text
    release: Count
    version: Count


class Birth(Message, frozen=True, tag="birth"):
    """Retained on a gateway's status topic: it is there, with these keys: Ed25519, and X25519 (RFC 7748) to agree by.

    `session` grows with each start (milliseconds at start), so an older birth or death is known to be old. `installed`
    has a release for each task that has one, where the federation releases.
    """

    session: Millis
    time_ms: Millis
    public_key: PublicKey
    software: Text
    tasks: Annotated[tuple[Text, ...], msgspec.Meta(max_length=64)]
    agreement_key: PublicKey | None = None
    installed: Annotated[tuple[Installed, ...], msgspec.Meta(max_length=64)] = ()


class Death(Message, frozen=True, tag="death"):
    """A gateway's last will, signed when it connects; it ends the session of the same number only."""

    session: Millis


class Answer(Message, frozen=True, tag="answer"):
    """A gateway's word on a round plan: `joined`, or `declined` with a reason code and a sentence.

    `asks`, on the latest round once it is closed: for the next one before its time, and why.
    """

    round: Count
    verdict: Word
    code: Word
    reason: Text
    time_ms: Millis


class Update(Message, frozen=True, tag="update"):
    """What a gateway learnt in a round: a codec payload, its weight in the mean, and metrics on its own holdout.

    `metric` is the trained model's, `base_loss` the mean loss of the round's base; None without a holdout. `quarters`
    is the gateway's width (`models.width`), in quarters of the net; `quality` the share of good values in its windows.
    `base_digest` begins the SHA-256 of the base's weights, and tells it from another version of that number, which an
    aggregator that was restored has made.
    """

    round: Count
    base: Count
    samples: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    metric: Real | None
    payload: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD)]
    base_loss: Real | None = None
    quarters: Annotated[int, msgspec.Meta(ge=1, le=4)] = 4
    quality: Share = 1_000_000
    base_digest: Annotated[bytes, msgspec.Meta(max_length=BASE_DIGEST)] = b""


class Vote(Message, frozen=True, tag="vote"):
    """A gateway's word on a new global model, by its own holdout of `windows` windows: `for` or `against` it.

    `digest` is that of the weights; `new` is their metric there, `old` that of version `than`, which it had; None for
    one that is no number.
    """

    version: Count
    digest: Digest
    than: Count
    new: Real | None
    old: Real | None
    windows: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    verdict: Literal["for", "against"]
    time_ms: Millis


class FederationBirth(Message, frozen=True, tag="federation"):
    """Retained on the federation's status topic by the aggregator; `state` is `up`, or `down` in its last will."""

    session: Millis
    public_key: PublicKey
    state: Word


class Plan(Message, frozen=True, tag="plan"):
    """Retained: the task's latest round. `state` is `open`, `closed`, or `done` when no further round will come.

    `base` is the model version to train from and `base_digest` its weights'; `deadline_ms` is on the aggregator's
    clock and is a hint to the gateway. `bits` is the codec's coding, `keep_ppm` what a sparse one keeps of a million.
    `ring` is what updates of a ring share (`models.ringcode`), else empty.
    In an asynchronous federation, an update still counts `stalest` rounds later. `charter` is that in force.
    `roster_ms` is the time of the roster that held when the round was opened; 0 from an aggregator that says none.
    """

    task_digest: Digest
    round: Count
    base: Count
    base_digest: Digest
    state: Word
    opened_ms: Millis
    deadline_ms: Millis
    min_gateways: Count
    bits: Count
    secure_aggregation: bool
    keep_ppm: Share = 1_000_000
    stalest: Count = 0
    ring: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD)] = b""
    charter: Annotated[bytes, msgspec.Meta(max_length=32)] = b""
    roster_ms: Millis = 0


class Receipt(Message, frozen=True, tag="receipt"):
    """The aggregator's answer to one update; `digest` is the SHA-256 of the update's whole envelope, as it was sent.

    `outcome` is `counted`, `duplicate` (this gateway was counted in that round before), `late`, `stale` (another base
    than the round's), `unknown-round` (none of that number yet), or `refused-` and the reason of a PeerError.
    """

    round: Count
    digest: Digest
    outcome: Word
    detail: Text
    time_ms: Millis


class Object(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A content-addressed thing in chunks: topics `model/{version}/{name}{i}`, each with its digest.

    `size` and `digest` are those of what the joined chunks hold.
    """

    name: Word
    version: Count
    size: Annotated[int, msgspec.Meta(ge=1, le=2**30)]
    digest: Digest
    chunks: Annotated[tuple[Digest, ...], msgspec.Meta(min_length=1, max_length=4096)]


class Terms(Message, frozen=True, tag="terms"):
    """Retained as `model/0/terms0`: what stays from one model of a task to the next.

    `layout` is `Layout.to_wire()`; `graph` is the ONNX graph without weights, its chunks joined one zstd frame.
    """

    task_text: Annotated[str, msgspec.Meta(max_length=64 * 1024)]
    layout: Annotated[tuple[tuple[Text, tuple[int, ...] | None], ...], msgspec.Meta(min_length=1, max_length=4096)]
    graph: Object


class Whole(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The newest version whose weights are retained whole: `model/{version}/weights{i}`, joined an exact payload."""

    version: Count
    chunks: Annotated[tuple[Digest, ...], msgspec.Meta(min_length=1, max_length=4096)]


class ModelManifest(Message, frozen=True, tag="manifest"):
    """Retained, signed: the newest global model of a task.

    `terms` is the SHA-256 of the terms' envelope, `digest` that of the weights as little-endian float32 in layout
    order. There are two ways to them: from `whole`, or from a version held already, by the `steps` that lead to
    `version`, newest first: each the first `STEP_DIGEST` bytes of the SHA-256 of `model/{its version}/step0`, a codec
    payload to add to the version before (`broker.steps`). Short, since they only tell pieces apart; `digest` proves
    the whole. `gateways` and `samples` say how many the round that made it counted; `released` that there are releases.
    `created_ms` is when the model was made. `signed_ms` (0 in those of before it: `created_ms`) orders manifests:
    versions alone do not, since an aggregator that was restored from a backup counts lower again.
    """

    version: Count
    round: Count
    created_ms: Millis
    gateways: Count
    samples: Count
    terms: Digest
    digest: Digest
    whole: Whole
    steps: Annotated[tuple[StepDigest, ...], msgspec.Meta(max_length=MAX_STEPS)] = ()
    released: bool = False
    signed_ms: Millis = 0


class FirstRoot(Message, frozen=True, tag="first-root"):
    """Retained as `_release/first`: the first root of the metadata of releases, from which all later ones follow."""

    root: Annotated[bytes, msgspec.Meta(max_length=MAX_PAYLOAD)]


class Request(Message, frozen=True, tag="request"):
    """A gateway's file for the operator: its path, its Ed25519 key, and a certificate request (DER) for TLS."""

    path: Text
    public_key: PublicKey
    request: Annotated[bytes, msgspec.Meta(max_length=16 * 1024)]


class Admission(Message, frozen=True, tag="admission"):
    """The operator's answer: the federation and its key, this path's TLS certificate, and the CA's (both PEM)."""

    path: Text
    public_key: PublicKey
    federation: Text
    certificate: Annotated[bytes, msgspec.Meta(max_length=16 * 1024)]
    authority: Annotated[bytes, msgspec.Meta(max_length=16 * 1024)]


AnyMessage = (
    Birth
    | Death
    | Answer
    | Update
    | Vote
    | FederationBirth
    | Plan
    | Receipt
    | Terms
    | ModelManifest
    | FirstRoot
    | Request
    | Admission
)
M = TypeVar("M", bound=Message)


class Signer:
    """An Ed25519 private key that signs envelopes."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._private = key
        self._cose = cwt.COSEKey.from_pem(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())
        self._encoder = cwt.COSE.new(alg_auto_inclusion=True)

    @classmethod
    def generate(cls) -> "Signer":
        """Make a new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Signer":
        """Inverse of `to_bytes`: 32 bytes."""
        return cls(Ed25519PrivateKey.from_private_bytes(raw))

    def to_bytes(self) -> bytes:
        """Return the private key, 32 bytes: for the state directory only."""
        return self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""
        return self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def sign(self, data: bytes) -> bytes:
        """Return a plain signature, 64 bytes; what is signed says itself what it is."""
        return self._private.sign(data)

    def seal(self, message: Message, topic: str) -> bytes:
        """Sign a message for one topic; ValueError if the result is larger than a payload may be."""
        payload = cbor2.dumps(_fields(message))
        envelope: bytes = self._encoder.encode(payload, self._cose, external_aad=topic.encode())
        if len(envelope) > MAX_PAYLOAD:
            raise ValueError(f"message of {len(envelope)} bytes, at most {MAX_PAYLOAD} may be sent")
        return envelope


def open_envelope(data: bytes, topic: str, public_key: bytes, type_: type[M]) -> M:
    """Verify and decode a peer's envelope.

    PeerError reasons: `size`, `envelope` (not a COSE_Sign1 of ours), `signature`, `schema` (signed, but not a
    message of this type and version).
    """
    _, payload = take_apart(data, MAX_PAYLOAD)
    key = cwt.COSEKey.new({1: 1, 3: -8, -1: 6, -2: public_key})
    try:
        cwt.COSE.new().decode(data, key, external_aad=topic.encode())
    except (CWTError, ValueError) as error:
        raise PeerError("signature", f"does not verify with this sender's key on {topic}") from error
    return _typed(payload, type_)


def peek(data: bytes, type_: type[M]) -> M:
    """Decode an envelope WITHOUT verifying it: only to learn the key that a first birth offers."""
    return _typed(take_apart(data, MAX_PAYLOAD)[1], type_)


def _fields(message: Message) -> list[object]:
    """Without the last ones that have their defaults: a peer that doesn't know them yet reads the others."""
    fields: list[object] = msgspec.to_builtins(message, builtin_types=(bytes,))
    for default in reversed(type(message).__struct_defaults__):
        if fields[-1] != msgspec.to_builtins(default, builtin_types=(bytes,)):
            break
        fields.pop()
    return fields


def _typed(payload: bytes, type_: type[M]) -> M:
    try:
        return msgspec.convert(read_plain(payload, "schema"), type_, strict=True)
    except msgspec.ValidationError as error:
        raise PeerError("schema", f"{type_.__name__}: {error}"[:300]) from error
