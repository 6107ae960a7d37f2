"""What a task keeps across restarts, by name, in `state.db`: the models, the scale, the holdout, what is personal."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from broker.messages import ModelManifest, Terms, Vote, peek
from edge.choose import average
from edge.dataset import Dataset
from edge.feedback import Correction
from edge.handback import Model
from edge.store import State
from edge.train import Result
from models.alarm import WEEK_S
from models.delta import Layout, Vector
from models.drift import Reference
from models.scale import Scale
from models.spec import parse_task

_HEAD = 16  # version and kind of what scores, before the share and the weights of each of its nets
_MOST_NETS = 3
_NUMBER = 8
_MOST_CORRECTIONS = 5_000


@dataclass
class Memory:
    """One task's part of the state file. Everything was verified before it was put here."""

    state: State
    task: str

    def _get(self, name: str) -> bytes | None:
        return self.state.get(f"{name}/{self.task}")

    def _put(self, name: str, value: bytes) -> None:
        self.state.put(f"{name}/{self.task}", value)

    def model(self) -> Model | None:
        """The newest verified global model: the base of the next training."""
        return self._model("", self._get("weights"))

    def release(self) -> tuple[int, str, Model] | None:
        """Number and online key of the release that scores here, and its model; None if there is none."""
        data, key = self._get("released") or b"", self._get("released-key") or b""
        model = self._model("released-", data[_NUMBER:])
        return (int.from_bytes(data[:_NUMBER], "big"), key.decode(), model) if data and model else None

    def keep_release(self, number: int, key: str, model: Model, envelope: bytes) -> None:
        """Store that; the caller makes it one transaction."""
        self._put("released-key", key.encode())
        self._put("released", number.to_bytes(_NUMBER, "big") + model.vector.tobytes())
        self._keep_model("released-", model, envelope)

    def _model(self, prefix: str, vector: bytes | None) -> Model | None:
        envelope, packed, graph = (self._get(f"{prefix}{name}") for name in ("manifest", "terms", "graph"))
        if envelope is None or packed is None or graph is None or vector is None:
            return None
        terms = msgspec.msgpack.decode(packed, type=Terms)
        task, layout = parse_task(terms.task_text, "stored task"), Layout.from_wire(terms.layout)
        return Model(peek(envelope, ModelManifest), terms, task, layout, graph, np.frombuffer(vector, np.float32))

    def keep_model(self, model: Model, envelope: bytes, *, again: bool = False) -> Vector:
        """Store a verified model with the manifest that it came by; the caller makes it one transaction.

        Returns the running mean of the models (layout.size,), which the first that has seen data begins, and in which
        one that comes `again`, under another task text or signature, counts once.
        """
        before = self.vector("average") if model.manifest.version > 1 else None
        mean = before if again and before is not None else average(before, model.vector)
        self.keep_vector("average", mean)
        self._keep_model("", model, envelope)
        self._put("weights", model.vector.tobytes())
        return mean

    def keep_manifest(self, envelope: bytes) -> None:
        """Store another manifest of the model that is here."""
        self._put("manifest", envelope)

    def _keep_model(self, prefix: str, model: Model, envelope: bytes) -> None:
        self._put(f"{prefix}manifest", envelope)
        self._put(f"{prefix}terms", msgspec.msgpack.encode(model.terms))
        self._put(f"{prefix}graph", model.graph)

    def scoring(self, size: int) -> tuple[int, str, list[tuple[float, Vector]]] | None:
        """Version and kind of what scores, and of each of its nets the share and weights (size,); None if unknown."""
        data = self._get("scoring")
        count, over = divmod(len(data or b"") - _HEAD, 4 * (size + 1))
        if data is None or over or not 1 <= count <= _MOST_NETS:
            return None
        version, kind = int.from_bytes(data[:8], "big"), data[8:_HEAD].rstrip(b"\0").decode()
        rows = np.frombuffer(data[_HEAD:], np.float32).reshape(count, size + 1)
        return version, kind, [(float(row[0]), row[1:]) for row in rows]

    def keep_scoring(self, version: int, kind: str, parts: Sequence[tuple[float, Vector]]) -> None:
        """Store what scores."""
        head = version.to_bytes(8, "big") + kind.encode().ljust(_HEAD - 8, b"\0")
        self._put("scoring", head + b"".join(np.float32(share).tobytes() + one.tobytes() for share, one in parts))

    def vector(self, name: str) -> Vector | None:
        """A vector of the last training, or `average`, of the global models.

        `residual` has the shared positions (error feedback); `personal`, `own` and `average` have the full layout.
        """
        data = self._get(name)
        return None if data is None else np.frombuffer(data, np.float32)

    def keep_vector(self, name: str, vector: Vector) -> None:
        """Store one of those."""
        self._put(name, vector.tobytes())

    def keep_result(self, result: Result, residual: Vector) -> None:
        """Store what a training leaves here; the caller makes it one transaction with its update."""
        self.keep_vector("residual", residual)
        self.keep_vector("personal", result.vector)
        if result.own is not None:
            self.keep_vector("own", result.own)
        self.keep_scale(result.scale)
        self._put("reference", result.reference.to_json())
        self.keep_holdout(result.holdout)

    def scale(self) -> Scale | None:
        """This gateway's normalisation; None before its first training."""
        data = self._get("scale")
        return None if data is None else Scale.from_json(data)

    def keep_scale(self, scale: Scale) -> None:
        """Store the normalisation."""
        self._put("scale", scale.to_json())

    def reference(self) -> Reference | None:
        """What drift is measured against; None before the first training."""
        data = self._get("reference")
        return None if data is None else Reference.from_json(data)

    def holdout(self) -> Dataset | None:
        """The windows that judge every model offered; None before the first training."""
        data = self._get("holdout")
        if data is None:
            return None
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            often = float(z["per_week"]) if "per_week" in z.files else WEEK_S
            return Dataset(z["x"], z["y"] if "y" in z.files else None, often)

    def keep_holdout(self, data: Dataset) -> None:
        """Store the holdout."""
        buffer = io.BytesIO()
        labels: dict[str, Any] = {} if data.y is None else {"y": data.y}
        np.savez(buffer, x=data.x, per_week=np.array(data.per_week), **labels)
        self._put("holdout", buffer.getvalue())

    def corrections(self) -> dict[int, Correction]:
        """What operators said of windows, by the windows' ends in ms."""
        return msgspec.json.decode(self._get("corrections") or b"{}", type=dict[int, Correction])

    def keep_corrections(self, known: dict[int, Correction]) -> None:
        """Store the newest of them."""
        newest = sorted(known)[-_MOST_CORRECTIONS:]
        self._put("corrections", msgspec.json.encode({end: known[end] for end in newest}))

    def vote(self) -> Vote | None:
        """The vote on the newest model, where this gateway could judge it."""
        data = self._get("vote")
        return None if data is None else msgspec.msgpack.decode(data, type=Vote)

    def keep_vote(self, vote: Vote) -> None:
        """Store that."""
        self._put("vote", msgspec.msgpack.encode(vote))

    def handled(self) -> tuple[int, int]:
        """The newest round that this gateway has sent an update for: its number and its opening in ms."""
        data = self._get("handled") or bytes(16)
        return int.from_bytes(data[:8], "big"), int.from_bytes(data[8:], "big")

    def keep_handled(self, round_: int, opened_ms: int) -> None:
        """Store that."""
        self._put("handled", round_.to_bytes(8, "big") + opened_ms.to_bytes(8, "big"))
