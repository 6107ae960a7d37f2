"""The way back of a global model: collect its chunks, check everything, hand over graph and weights.

Nothing here trusts the broker: the manifest is signed, every chunk has its digest there, and every size is bounded
before memory is taken. Chunks are content-addressed, so a fetch that was cut off goes on where it stood.
"""

import asyncio
import contextlib
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from broker.messages import CHUNK_BYTES, ModelManifest, Object
from broker.topics import Chunk
from models import codec
from models.delta import Layout, Vector
from models.errors import PeerError, UserError
from models.graph import MAX_GRAPH_BYTES
from models.spec import Task, parse_task

# A gateway's own bound, far above any compact net: 4 million parameters are 16 MB.
MAX_PARAMETERS = 4_000_000
_FLOAT = 4
_SLACK = 2
_PROBE_S = 120.0


@dataclass(frozen=True)
class Model:
    """A verified model: what the federation offers as version `manifest.version`."""

    manifest: ModelManifest
    task: Task
    layout: Layout
    graph: bytes
    vector: Vector

    def personalised(self, own: Vector | None, average: Vector | None = None) -> Vector:
        """Return the weights (layout.size,), with a gateway's own values where the task keeps them personal.

        Where an `average` of models fits, it is that instead of this model.
        """
        shared = self.vector if average is None or average.size != self.vector.size else average
        if own is None or own.size != self.vector.size:
            return shared
        return np.where(self.layout.mask(self.task.personal), shared, own)


class Fetch:
    """One model on its way. `topics` are what to subscribe to; `take` each message of theirs."""

    def __init__(self, federation: str, manifest: ModelManifest, graph: bytes | None) -> None:
        """Check what the manifest declares; PeerError if it can't be right. `graph` is one that we have already."""
        self.manifest = manifest
        try:
            self.task = parse_task(manifest.task_text, "published task")
        except (UserError, RecursionError) as error:
            raise PeerError("task", str(error)) from error
        self.layout = Layout.from_wire(manifest.layout)
        if self.layout.size > MAX_PARAMETERS:
            raise PeerError("layout", f"{self.layout.size} parameters, at most {MAX_PARAMETERS}")
        if manifest.weights.size != self.layout.size * _FLOAT:
            raise PeerError("layout", f"weights of {manifest.weights.size} bytes for {self.layout.size} parameters")
        if manifest.graph.size > MAX_GRAPH_BYTES:
            raise PeerError("graph", f"{manifest.graph.size} bytes, at most {MAX_GRAPH_BYTES}")
        self.graph = graph if graph and hashlib.sha256(graph).digest() == manifest.graph.digest else None
        self._due: dict[str, tuple[str, int, bytes]] = {}
        self._have: dict[tuple[str, int], bytes] = {}
        for thing in (manifest.weights, *([] if self.graph else [manifest.graph])):
            # Random float32 does not compress: a chunk or two more than the raw bytes need is all there can be.
            if len(thing.chunks) > -(-thing.size // CHUNK_BYTES) + _SLACK:
                raise PeerError("size", f"{thing.name} in {len(thing.chunks)} chunks for {thing.size} bytes")
            for i, digest in enumerate(thing.chunks):
                topic = Chunk(federation, self.task.name, thing.version, f"{thing.name}{i}").topic
                self._due[topic] = thing.name, i, digest

    @property
    def topics(self) -> list[str]:
        """Topics of the chunks that are still missing."""
        return list(self._due)

    def take(self, topic: str, payload: bytes) -> bool:
        """Take one message; False if it is none of ours, PeerError("chunk") if it is not what was signed."""
        if topic not in self._due:
            return False
        name, i, digest = self._due[topic]
        if not payload:
            return False  # an older version's chunk being cleared
        if len(payload) > CHUNK_BYTES or hashlib.sha256(payload).digest() != digest:
            raise PeerError("chunk", f"{topic} does not have the digest that the manifest gives")
        self._have[name, i] = payload
        del self._due[topic]
        return True

    def model(self) -> Model:
        """Put the chunks together once none is missing; PeerError if they are not what was signed."""
        weights = codec.decode(self._joined(self.manifest.weights), self.layout.size)
        if hashlib.sha256(weights.astype("<f4").tobytes()).digest() != self.manifest.weights.digest:
            raise PeerError("weights", "do not have the digest that the manifest gives")
        graph = self.graph
        if graph is None:
            graph = codec.inflate(self._joined(self.manifest.graph), self.manifest.graph.size)
            if hashlib.sha256(graph).digest() != self.manifest.graph.digest:
                raise PeerError("graph", "does not have the digest that the manifest gives")
        return Model(self.manifest, self.task, self.layout, graph, weights)

    def _joined(self, thing: Object) -> bytes:
        return b"".join(self._have[thing.name, i] for i in range(len(thing.chunks)))


async def probe(model: Model, folder: Path) -> None:
    """Run a new graph for the first time, in a child with a memory limit; PeerError("graph") says why it is refused."""
    path = await asyncio.to_thread(_write_probe, model, folder)
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "models.graphcheck", str(path),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, errors = await asyncio.wait_for(child.communicate(), _PROBE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
    except TimeoutError:
        raise PeerError("graph", f"its first run took longer than {_PROBE_S:.0f} s") from None
    finally:
        path.unlink(missing_ok=True)
    if child.returncode:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        raise PeerError("graph", last or f"its first run ended with {child.returncode}")


def _write_probe(model: Model, folder: Path) -> Path:
    wire = np.frombuffer(json.dumps(model.layout.to_wire()).encode(), np.uint8)
    shape = np.array([*model.task.input_shape, model.task.outputs])
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
        np.savez(file, graph=np.frombuffer(model.graph, np.uint8), layout=wire, shape=shape)
    return Path(file.name)
