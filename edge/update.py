"""What a training becomes: a delta with error feedback, encoded, signed, and what the gateway keeps of it."""

import hashlib
import math
from typing import NamedTuple

from broker import messages as m
from broker.topics import Uplink
from edge.candidates import build
from edge.charter import under_charter
from edge.events import StartTraining
from edge.handback import Model
from edge.shop import Shop
from edge.train import Result
from models import codec, ringcode
from models.delta import Vector
from models.width import slices


class Sealed(NamedTuple):
    """An update as it will be sent, and what stays: the residual (positions that it has) and the ledger's entry."""

    topic: str
    envelope: bytes
    digest: bytes
    residual: Vector
    body: dict[str, object]


def seal_update(
    shop: Shop,
    action: StartTraining,
    model: Model,
    result: Result,
    residual: Vector | None,
    start: Vector,
    *,
    width: float = 1,
) -> Sealed:
    """Encode and sign what was learnt from `start`, the weights (layout.size,) that this gateway made of `model`.

    `width` is the part of the net that was trained.
    """
    name, shared = model.task.name, model.layout.mask(model.task.personal)
    delta = (result.vector - start)[shared][slices(model.task, model.layout).get(width, slice(None))]
    if residual is not None and residual.size == delta.size:
        delta = delta + residual
    encoded = encode(action, delta, result.samples)
    trained, base = (build(shop.config.scoring, model, vector, result.scale) for vector in (result.vector, start))
    holdout = result.holdout
    loss = float(base.losses(holdout).mean()) if len(holdout) else math.nan
    update = m.Update(
        m.VERSION, action.round, action.base, result.samples, _finite(trained.metric(holdout)), encoded.data,
        _finite(loss), round(4 * width), max(1, round(1e6 * result.quality)), model.manifest.digest[: m.BASE_DIGEST],
    )  # fmt: skip
    topic = Uplink(shop.config.path, name, "update").topic
    envelope = shop.signer.seal(update, topic)
    digest = hashlib.sha256(envelope).digest()
    body: dict[str, object] = {
        "task": name, "round": action.round, "base": action.base, "samples": result.samples,
        "quality": round(result.quality, 4),
        "digest": digest.hex(), "bytes": len(encoded.data), "message_bytes": len(envelope),
        "metric": update.metric, "base_loss": update.base_loss, "steps": result.steps, "device": result.device,
        "seconds": round(result.seconds, 3), **under_charter(shop),
    }  # fmt: skip
    return Sealed(topic, envelope, digest, delta - encoded.decoded, body)


def encode(action: StartTraining, delta: Vector, samples: int) -> codec.Encoded:
    """Encode a delta as the round's plan says; PeerError for a ring that is none, or of other vectors."""
    if action.bits != ringcode.RING:
        return codec.encode(delta, action.bits, action.keep_ppm / 1e6)
    return ringcode.encode(delta, ringcode.Ring.from_bytes(action.ring, delta.size), samples)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
