"""The end of a round: from its counted updates, as the journal holds them, to the task's next version, or back."""

import logging
import threading
import time

import numpy as np

from broker import aggregate
from broker.ballot import Decided
from broker.job import Job
from broker.journal import BallotRow, Journal, ModelRow
from broker.mask import ring_for
from broker.steps import Step, step_towards
from models import codec
from models.delta import Layout, Vector, weights_digest
from models.errors import LocalError

log = logging.getLogger(__name__)


def close_round(journal: Journal, job: Job, number: int, base: int, now_ms: int) -> bool:
    """Make the round's model from version `base`, store it, and make it the job's; belongs inside a transaction.

    If its numbers overflow, the round closes without one and the ledger says so: False.
    """
    task, name = job.task, job.task.name
    model = _model(journal, name, base)
    before = state = journal.strategy_state(name)
    gateways, samples, age = journal.totals(name, number)
    version = job.model.version + 1
    started = time.monotonic()
    try:
        vector = codec.decode(model.weights, job.shared.size)
        payloads = journal.payloads(name, number)
        rule, momentum = task.round.strategy, task.round.momentum
        state, goal = aggregate.next_model(
            rule, state, vector, job.shared, payloads, momentum=momentum, age=age, ring=job.ring, slices=job.slices
        )
        step = _step(journal, job, goal, vector, version)
    except ValueError as error:
        log.error("%s round %d: no new model: %s", name, number, error)
        journal.note(now_ms, "failed", {"task": name, "round": number, "reason": str(error)})
        journal.close_round(name, number, now_ms, base, state)
        return False
    weights, digest = codec.encode(step.vector, codec.EXACT).data, weights_digest(step.vector)
    if task.round.vote_s:
        until_ms = now_ms + int(task.round.vote_s * 1000)
        ballot = BallotRow(version, job.model.version, until_ms, before, journal.residual(name))
        journal.open_ballot(name, ballot)
    signed_ms = _later(job, now_ms)
    job.model = ModelRow(version, number, weights, digest, gateways, samples, now_ms, step.payload, signed_ms)
    journal.put_model(name, job.model)
    journal.put_residual(name, step.residual.astype("<f4").tobytes())
    journal.close_round(name, number, now_ms, version, state)
    if job.ring:
        job.ring = ring_for(task, Layout.from_json(job.row.layout), aggregate.load_state(state))
    body = {"task": name, "version": version, "digest": digest.hex(), "round": number}
    journal.note(now_ms, "model", {**body, "gateways": gateways, "samples": samples})
    if gateways >= aggregate.MANY:
        threading.Thread(target=aggregate.hasten, daemon=True).start()
    elapsed = time.monotonic() - started
    log.info("%s round %d: version %d from %d gateways in %.2f s", name, number, version, gateways, elapsed)
    return True


def end_vote(journal: Journal, job: Job, vote: Decided, now_ms: int) -> bool:
    """Keep the model that was voted on, or make another version of the weights before it: False.

    Belongs inside a transaction. Versions never go back: whoever has the newest has the highest.
    """
    name, against = job.task.name, sum(vote.votes.values())
    body = {"task": name, "version": vote.version, "for": len(vote.votes) - against, "against": against}
    journal.note(now_ms, "kept" if vote.kept else "voted-down", body)
    if not vote.kept:
        _go_back(journal, job, now_ms)
        text = "%s: version %d is voted down, %d against %d; version %d is version %d again"
        log.warning(text, name, vote.version, against, body["for"], job.model.version, vote.before)
    journal.close_ballot(name, vote.version, kept=vote.kept)
    return vote.kept


def _go_back(journal: Journal, job: Job, now_ms: int) -> None:
    """Let the strategy forget the round that made the version voted on, too."""
    name, ballot = job.task.name, journal.ballot(job.task.name)
    if ballot is None:
        raise LocalError(f"{journal.path}: no vote on {name} is there; restore a backup")
    model = _model(journal, name, ballot.before)
    version, signed_ms = job.model.version + 1, _later(job, now_ms)
    job.model = model._replace(version=version, created_ms=now_ms, step=None, signed_ms=signed_ms)
    journal.put_model(name, job.model)
    journal.put_strategy_state(name, ballot.strategy_state)
    journal.put_residual(name, ballot.residual)
    if job.ring:
        layout = Layout.from_json(job.row.layout)
        job.ring = ring_for(job.task, layout, aggregate.load_state(ballot.strategy_state))
    body = {"task": name, "version": job.model.version, "digest": model.digest.hex(), "again": model.version}
    journal.note(now_ms, "model", body)


def _later(job: Job, now_ms: int) -> int:
    """When the next model is signed: after the one before, where the clock was set back too."""
    return max(now_ms, job.model.signed_ms + 1)


def _model(journal: Journal, name: str, version: int) -> ModelRow:
    model = journal.model(name, version)
    if model is None:
        raise LocalError(f"{journal.path}: version {version} of {name} is missing; restore a backup")
    return model


def _step(journal: Journal, job: Job, goal: Vector, before: Vector, version: int) -> Step:
    """Make the version that leads to the goal by as much as goes down in one round."""
    waiting = np.frombuffer(journal.residual(job.task.name), "<f4")
    residual = waiting if waiting.size == job.shared.sum() else None
    return step_towards(goal, before, residual, job.shared, job.task.round.down_in(version))
