"""One task at work in the aggregator: its definition, its newest model, and the federation that decides."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.aggregate import load_state
from broker.ballot import Ballot
from broker.config import TaskFile
from broker.federation import Federation, Rules
from broker.intake import Wanted
from broker.journal import Journal, ModelRow, TaskRow
from broker.mask import MOST_BITS, ring_for
from broker.messages import MAX_PAYLOAD
from broker.rate import AROUND, KEPT, Rate, floor_of, replay
from broker.round import STALEST, Past
from models.delta import Layout
from models.errors import LocalError, UserError
from models.ringcode import Ring
from models.spec import Task, Training
from models.tomlfile import TomlFile
from models.width import Places, slices


@dataclass
class Job:
    """`shared` (n,) is True where values travel.

    `deadline_ms` and `roster_ms` are the latest round's, `rate` its share. `ring` is the next update's, of a task
    whose codec is one; `slices` are what narrow gateways have of the shared.
    """

    task: Task
    row: TaskRow
    model: ModelRow
    shared: NDArray[np.bool_]
    federation: Federation
    deadline_ms: int
    roster_ms: int
    rate: Rate
    ring: Ring | None = None
    slices: Mapping[float, Places] = field(default_factory=dict)

    @property
    def keep(self) -> float:
        """Share of values that an update of the latest round keeps: the task's, or steered."""
        return self.rate.keep if self.task.round.keep is None else self.task.round.keep

    def ring_in(self, number: int) -> Ring | None:
        """What updates of a round share while it is open."""
        now = self.federation.round
        return self.ring if now and now.number == number else None

    @property
    def wanted(self) -> Wanted:
        """What an update of this task must be, by whichever way it comes."""
        return Wanted(self.task, int(self.shared.sum()), self.ring_in, self.slices)

    def status(self) -> dict[str, Any]:
        """Plain JSON values for people and scripts; times in milliseconds since 1970 UTC."""
        f = self.federation
        return {
            "state": f.state.value,
            "round": f.number,
            "version": self.model.version,
            "keep": round(self.keep, 6),
            "next_opening_ms": max(0, f.next_opening_ms) if f.next_opening_ms is not None else None,
            "deadline_ms": f.round.deadline_ms if f.round else None,
            "counted": sorted(f.round.counted) if f.round else [],
            "counted_of_before": len(f.round.older) if f.round else 0,
            "waiting_for": sorted(f.round.waiting_for) if f.round else [],
            "min_gateways": f.rules.min_gateways,
            "vote": self._vote(),
            "gateways": {
                path: {
                    "online": g.online,
                    "round": g.answer_round,
                    "verdict": ("joined" if g.joined else "declined") if g.answer_round else None,
                    "code": g.code,
                    "reason": g.reason,
                }
                for path, g in sorted(f.gateways.items())
            },
        }

    def _vote(self) -> dict[str, Any] | None:
        ballot = self.federation.ballot
        if ballot is None:
            return None
        against = sum(ballot.votes.values())
        return {
            "version": ballot.version,
            "for": len(ballot.votes) - against,
            "against": against,
            "until_ms": ballot.until_ms,
            "waiting_for": sorted(ballot.waits_for(self.federation.gone)),
        }


def load_job(journal: Journal, file: TaskFile) -> Job:
    """Take a task up where the journal left it; UserError when it shares nothing, LocalError without a model."""
    task, name = file.task, file.task.name
    row, model, last = journal.task(name), journal.model(name), journal.latest_round(name)
    if row is None or model is None:
        raise LocalError(f"{journal.path}: the model of {name} is missing; restore a backup")
    layout = Layout.from_json(row.layout)
    shared = layout.mask(task.personal)
    if not shared.any():
        raise UserError(str(file.path), 0, "personal", "nothing is left to share", "take a prefix out")
    check_prefixes(task, layout, str(file.path), file.text)
    _check_size(file, int(shared.sum()))
    r = task.round
    every_ms = int(r.every_s * 1000)
    # An asynchronous round is open for `every` at least; its plan says no earlier deadline.
    length_ms = max(int(r.deadline_s * 1000), every_ms if r.mode == "async" else 0)
    early_ms = None if r.early_s is None else int(r.early_s * 1000)
    rules = Rules(r.min_gateways, length_ms, every_ms, r.rounds, r.full, early_ms, int(r.vote_s * 1000))
    past = ballot = None
    if last:
        counted = journal.counted(name, last.round)
        bases, older = journal.bases(name, last.round - STALEST), journal.older(name, last.round)
        open_ = last.state == "open"
        if (vote := journal.ballot(name)) and vote.kept is None:
            votes = journal.votes(name, vote.version)
            ballot = Ballot(
                vote.version, vote.before, frozenset(journal.losses(name, last.round)), vote.until_ms, votes
            )
        past = Past(last.round, last.base, last.opened_ms, last.deadline_ms, open_, counted, bases, older)
    federation = Federation(rules, version=model.version, past=past, ballot=ballot)
    closed = range(1, last.round + (last.state != "open")) if last else ()
    rate = replay(int(shared.sum()), (journal.losses(name, number) for number in closed))
    ring = ring_for(task, layout, load_state(journal.strategy_state(name))) if task.round.codec == "ring" else None
    deadline_ms, roster_ms = (last.deadline_ms, last.roster_ms) if last else (0, 0)
    return Job(task, row, model, shared, federation, deadline_ms, roster_ms, rate, ring, slices(task, layout))


def check_prefixes(task: Task, layout: Layout, place: str, text: str) -> None:
    """Refuse a prefix below which the net has nothing: what was to stay at the gateways would travel."""
    for keys, prefixes in ((["personal"], task.personal), (["training", "resume"], task.training.resume)):
        # A net without a head has nothing to resume unless its task says so.
        if (unknown := layout.unknown(prefixes)) and prefixes != Training().resume:
            remedy = f"this net has: {', '.join(dict.fromkeys(name.partition('.')[0] for name in layout.names))}"
            raise TomlFile(place, text).error(keys, f"the net has no {unknown[0]!r}", remedy)


def _check_size(file: TaskFile, count: int) -> None:
    """Refuse a task whose updates might not fit into a message: gateways would train for nothing."""
    rules = file.task.round
    kept = math.ceil(count * (floor_of(count) if rules.keep is None else rules.keep))
    # A ring's plan says of each value by a bit at most whether it goes.
    bits = max(1.0, MOST_BITS * (rules.keep or 0)) if rules.codec == "ring" else rules.bits
    worst = (kept * KEPT if rules.codec == "sparse" else math.ceil(count * bits / 8)) + AROUND
    if worst > MAX_PAYLOAD:
        problem = f"an update of {count} values may be {worst} bytes, a message {MAX_PAYLOAD}"
        remedy = "keep less or take a narrower codec, use a smaller net, or make more of it personal"
        raise TomlFile(str(file.path), file.text).error(["round", "codec"], problem, remedy)
