"""A gateway's vote on a new global model, by its own holdout; who has none does not vote."""

import logging
import math
import time

from broker import messages as m
from broker.topics import Uplink
from edge.candidates import build
from edge.config import ScoringTable
from edge.dataset import Dataset
from edge.handback import Model
from edge.memory import Memory
from edge.shop import Shop
from models import evaluate
from models.delta import Vector
from models.scale import Scale

log = logging.getLogger(__name__)


def judge(
    table: ScoringTable,
    new: Model,
    before: Model | None,
    holdout: Dataset | None,
    scale: Scale | None,
    own: Vector | None,
    width: float = 1,
) -> m.Vote | None:
    """Hold a new model against the one before, both as the federation has them; None where it can't.

    What the plant made of them for itself has no part in it: the vote is on what all will have.
    """
    if not new.task.round.vote_s or before is None or before.layout != new.layout:
        return None
    if holdout is None or not len(holdout) or scale is None:
        return None
    # Not with the last layer of its own that it may go on with: who has none yet would get one that nobody looked at.
    vectors = (model.personalised(own, width=width) for model in (new, before))
    now, was = (build(table, new, vector, scale).metric(holdout) for vector in vectors)
    name, tolerance = evaluate.metric_name(new.task), new.task.round.tolerance
    against = evaluate.much_worse(name, now, was, len(holdout), tolerance)
    return m.Vote(
        m.VERSION, new.manifest.version, new.manifest.digest, before.manifest.version, _finite(now), _finite(was),
        len(holdout), "against" if against else "for", int(time.time() * 1000),
    )  # fmt: skip


def seal(shop: Shop, task: str, vote: m.Vote) -> tuple[str, bytes]:
    """Sign a vote: (topic, envelope), the same for the same vote."""
    topic = Uplink(shop.config.path, task, "vote").topic
    return topic, shop.signer.seal(vote, topic)


def keep(shop: Shop, memory: Memory, vote: m.Vote) -> None:
    """Store a vote, with its line in the ledger; inside of a transaction."""
    memory.keep_vote(vote)
    body: dict[str, object] = {"task": memory.task, "version": vote.version, "verdict": vote.verdict, "than": vote.than}
    body |= {"new": vote.new, "old": vote.old, "windows": vote.windows}
    log.info("%s: votes %s model %d: %s, was %s", memory.task, vote.verdict, vote.version, vote.new, vote.old)
    shop.state.record("vote", body | {"message_bytes": len(seal(shop, memory.task, vote)[1])})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
