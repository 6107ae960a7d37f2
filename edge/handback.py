"""The way back of a global model: collect its pieces, check everything, hand over graph and weights.

Nothing here trusts the broker: the manifest is signed, every piece has its digest there, and every size is bounded
before memory is taken. Pieces are content-addressed, so a fetch that was cut off goes on where it stood. A gateway that
holds one of the versions before fetches the steps since; one that holds nothing, or other weights, fetches them whole.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np

from broker.messages import (
    CHUNK_BYTES,
    GRAPH,
    MAX_PAYLOAD,
    STEP,
    TERMS,
    WEIGHTS,
    Digest,
    ModelManifest,
    Terms,
    peek,
)
from broker.steps import apply
from broker.topics import Chunk
from models import codec
from models.delta import Layout, Vector, weights_digest
from models.errors import PeerError, UserError
from models.graph import MAX_GRAPH_BYTES
from models.spec import Task, parse_task
from models.width import cut

# A gateway's own bound, far above any compact net: 4 million parameters are 16 MB.
MAX_PARAMETERS = 4_000_000
_FLOAT = 4
_SLACK = 2
_DAY_MS = 86_400_000


@dataclass(frozen=True)
class Model:
    """A verified model: what the federation offers as version `manifest.version`."""

    manifest: ModelManifest
    terms: Terms
    task: Task
    layout: Layout
    graph: bytes
    vector: Vector

    def personalised(
        self, own: Vector | None, average: Vector | None = None, *, resume: Sequence[str] = (), width: float = 1
    ) -> Vector:
        """Return the weights (layout.size,), with a gateway's `own` values where the task keeps them personal.

        So it is below the prefixes of `resume`, too. Where an `average` of models fits, it is that instead of this
        model. Of less than the whole `width`, what lies outside the gateway's part is zero.
        """
        shared = self.vector if average is None or average.size != self.vector.size else average
        if own is not None and own.size == self.vector.size:
            shared = np.where(self.layout.mask((*self.task.personal, *resume)), shared, own)
        return cut(self.layout, width, shared)

    def is_of(self, manifest: ModelManifest) -> bool:
        """Whether a manifest offers this model, if under another task text perhaps."""
        return (manifest.version, manifest.digest) == (self.manifest.version, self.manifest.digest)


def same_model(one: ModelManifest | None, other: ModelManifest | None) -> bool:
    """Whether two manifests offer the same model of the same task, signed at different times perhaps."""
    if one is None or other is None:
        return False
    return (one.version, one.digest, one.terms) == (other.version, other.digest, other.terms)


def newer(manifest: ModelManifest, than: ModelManifest | None, now_ms: int) -> bool:
    """Whether a manifest is the later word of the aggregator.

    One that was signed more than a day after this gateway's clock is not believed over what came by now: an
    aggregator's clock that was wrong once must not shut out every model until that day.
    """
    if than is None:
        return True
    at, than_at = _signed_ms(manifest), _signed_ms(than)
    return at > than_at or at <= now_ms + _DAY_MS < than_at


def passed_over(manifest: ModelManifest, wanted: ModelManifest) -> str:
    """Say why a manifest that is not newer counts for nothing; "" of the same time.

    An old copy of a broker's may be that, or an aggregator whose clock and state were both set back.
    """
    at, wanted_at = _signed_ms(manifest), _signed_ms(wanted)
    if at == wanted_at:
        return ""
    text = f"passed over model {manifest.version}, signed at {_time(at)}, for one of {_time(wanted_at)}"
    return f"{text}; is the aggregator's clock right?"


def _signed_ms(manifest: ModelManifest) -> int:
    return manifest.signed_ms or manifest.created_ms


def _time(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).astimezone().isoformat(" ", "seconds")
    except (OverflowError, ValueError, OSError):
        return f"{ms} ms"


class Fetch:
    """One model on its way. `topics` are what to subscribe to; `take` each message of theirs.

    What is due grows once the terms are there. `held` is the newest model that we have already.
    """

    def __init__(self, federation: str, task: str, manifest: ModelManifest, held: Model | None) -> None:
        """Check what the manifest declares; PeerError if it can't be right."""
        self.manifest, self.held = manifest, held
        self._federation, self._name = federation, task
        if not 0 <= manifest.version - manifest.whole.version <= len(manifest.steps) <= manifest.version:
            raise PeerError("manifest", f"no way from version {manifest.whole.version} to {manifest.version}")
        self._due: dict[str, tuple[str, int, Digest]] = {}
        self._have: dict[tuple[str, int], bytes] = {}
        if held and held.manifest.terms == manifest.terms:
            self.terms, self.task, self.layout = held.terms, held.task, held.layout
            self._want_model()
        else:
            self._want(TERMS, 0, (manifest.terms,))

    def fall_back(self) -> bool:
        """Begin again with the whole weights, where ours were to lead on; False if they were not."""
        if self.since is None:
            return False
        self._want_model(lead_on=False)
        return True

    @property
    def topics(self) -> list[str]:
        """Topics of the pieces that are still missing."""
        return list(self._due)

    def take(self, topic: str, payload: bytes) -> bool:
        """Take one message; False if it is none of ours, PeerError if it is not what was signed, or can't be."""
        if topic not in self._due:
            return False
        name, i, digest = self._due[topic]
        if not payload:
            return False  # an older version's piece being cleared
        most = MAX_PAYLOAD if name == TERMS else CHUNK_BYTES
        if len(payload) > most or hashlib.sha256(payload).digest()[: len(digest)] != digest:
            raise PeerError("chunk", f"{topic} does not have the digest that the manifest gives")
        del self._due[topic]
        if name == TERMS:
            self._read_terms(payload)
        else:
            self._have[name, i] = payload
        return True

    def model(self) -> Model:
        """Put the pieces together once none is missing; PeerError if they are not what was signed."""
        manifest, terms = self.manifest, self.terms
        if self.since is None or self.held is None:
            vector = codec.decode(self._joined(WEIGHTS, len(manifest.whole.chunks)), self.layout.size)
            first = manifest.whole.version
        else:
            vector, first = self.held.vector, self.since
        shared = self.layout.mask(self.task.personal)
        for version in range(first + 1, manifest.version + 1):
            vector = apply(self._have[STEP, version], vector, shared)
        if weights_digest(vector) != manifest.digest:
            raise PeerError("weights", "do not have the digest that the manifest gives")
        graph = self.held.graph if self._graph_held and self.held else b""
        if not graph:
            graph = codec.inflate(self._joined(GRAPH, len(terms.graph.chunks)), terms.graph.size)
            if hashlib.sha256(graph).digest() != terms.graph.digest:
                raise PeerError("graph", "does not have the digest that the terms give")
        return Model(manifest, terms, self.task, self.layout, graph, vector)

    def _read_terms(self, payload: bytes) -> None:
        self.terms = peek(payload, Terms)  # verified: the signed manifest has its digest
        try:
            self.task = parse_task(self.terms.task_text, "published task")
        except (UserError, RecursionError) as error:
            raise PeerError("task", str(error)) from error
        if self.task.name != self._name:
            raise PeerError("task", f"the terms of {self.task.name!r} on the topic of {self._name!r}")
        self.layout = Layout.from_wire(self.terms.layout)
        if self.layout.size > MAX_PARAMETERS:
            raise PeerError("layout", f"{self.layout.size} parameters, at most {MAX_PARAMETERS}")
        if self.terms.graph.size > MAX_GRAPH_BYTES:
            raise PeerError("graph", f"{self.terms.graph.size} bytes, at most {MAX_GRAPH_BYTES}")
        self._want_model()

    def _want_model(self, *, lead_on: bool = True) -> None:
        """Choose the way to the weights; `since` is the version of ours that it leads on from, None without."""
        manifest, graph, held = self.manifest, self.terms.graph, self.held
        self.since: int | None = None
        if lead_on and held and held.layout == self.layout and held.task.personal == self.task.personal:
            behind = manifest.version - held.manifest.version
            same = behind > 0 or held.manifest.digest == manifest.digest
            self.since = held.manifest.version if same and 0 <= behind <= len(manifest.steps) else None
        self._graph_held = held is not None and held.terms.graph.digest == graph.digest
        if not self._graph_held:
            self._want(GRAPH, graph.version, graph.chunks, graph.size)
        first = manifest.whole.version if self.since is None else self.since
        if self.since is None:
            self._want(WEIGHTS, first, manifest.whole.chunks, self.layout.size * _FLOAT)
        for version in range(first + 1, manifest.version + 1):
            self._want(STEP, version, (manifest.steps[manifest.version - version],))

    def _want(self, name: str, version: int, digests: tuple[Digest, ...], size: int = 1) -> None:
        # Random float32 does not compress: a chunk or two more than the raw bytes need is all there can be.
        if len(digests) > -(-size // CHUNK_BYTES) + _SLACK:
            raise PeerError("size", f"{name} in {len(digests)} chunks for {size} bytes")
        for i, digest in enumerate(digests):
            key = version if name == STEP else i
            if (name, key) not in self._have:
                self._due[Chunk(self._federation, self._name, version, f"{name}{i}").topic] = name, key, digest

    def _joined(self, name: str, count: int) -> bytes:
        return b"".join(self._have[name, i] for i in range(count))
