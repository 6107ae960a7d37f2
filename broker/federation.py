"""All rounds of one task, sans-IO: who is online, when the next round opens, which version is current.

    WAITING --due, enough gateways--> OPEN --closed--> CLOSING --aggregated--> VOTING --kept--> WAITING, or DONE
                                                          ^--voted down: the weights before, again--'  after `rounds`

Rounds open every `every_ms`, measured from the last opening, never while one is open, and only when `min_gateways`
are online. An asynchronous one is open for all of that time: what comes between two rounds counts in neither.
`early_ms` after that opening, one opens too if a gateway that is online has asked for it since the last
round closed. A new model waits `vote_ms` at most for the votes of those that can judge it (`broker.ballot`); one that
is voted down makes way for the weights before. While the broker is out of reach, gateways keep what they have to say,
so no round opens or closes and no vote ends. After a restart the state is rebuilt from what the journal says (`Past`).
Times are milliseconds on the caller's clock. Every transition stands in `TRANSITIONS`.
"""

# ruff: noqa: SLF001 - the table of transitions stands below the class whose methods it names

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from broker import round as rounds
from broker.ballot import Ballot, Voted
from broker.round import Action, Event, Outcome, Past, Round
from models.errors import LocalError

# After a connection, births may take this long until a round may close.
SETTLE_MS = 3_000
# Who was online before a lost connection and has not said so again by then is gone.
CONFIRM_MS = 30_000


class State(enum.Enum):
    """`CLOSING` lasts until the new model is stored, `VOTING` until it is kept."""

    WAITING = "waiting"
    OPEN = "open"
    CLOSING = "closing"
    VOTING = "voting"
    DONE = "done"


@dataclass(frozen=True)
class Rules:
    """The task's `[round]` table in milliseconds.

    `rounds` None means without end, `buffer` None in step, `early_ms` None that nobody may ask for a round, `vote_ms` 0
    that nobody votes.
    """

    min_gateways: int
    deadline_ms: int
    every_ms: int
    rounds: int | None = None
    buffer: int | None = None
    early_ms: int | None = None
    vote_ms: int = 0


@dataclass(frozen=True)
class Born(Event):
    """A gateway's verified birth; `session` grows with its starts, `serves` says whether it names this task."""

    path: str
    session: int
    serves: bool = True


@dataclass(frozen=True)
class Died(Event):
    """A gateway's verified death: it ends the session of the same number only."""

    path: str
    session: int


@dataclass(frozen=True)
class Answered(Event):
    """A gateway's verified word on a round; `code` and `reason` are for people."""

    path: str
    round: int
    joined: bool
    code: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Asked(Event):
    """A gateway's verified wish for a round after the latest, number `round`."""

    path: str
    round: int


@dataclass(frozen=True)
class Submitted(Event):
    """A verified, decoded update; `known` says that the journal holds one of this gateway for that round."""

    path: str
    round: int
    base: int
    digest: bytes
    known: bool = False


@dataclass(frozen=True)
class Refused(Event):
    """A proven gateway's update for a round can't be used."""

    path: str
    round: int


@dataclass(frozen=True)
class Disconnected(Event):
    """The broker is out of reach: nobody can be heard until `Connected`."""


@dataclass(frozen=True)
class Connected(Event):
    """The broker was reached (again): retained births are on their way."""


@dataclass(frozen=True)
class Aggregated(Event):
    """Model `version` is stored, and the current one; of those counted, `voters` have a holdout to judge it by."""

    version: int
    voters: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


@dataclass(frozen=True)
class Open(Action):
    """Open a round: journal it, publish its plan; `asked` is the gateway that had it open early."""

    round: int
    base: int
    opened_ms: int
    deadline_ms: int
    asked: str = ""


@dataclass(frozen=True)
class Finish(Action):
    """The last round is over."""


@dataclass
class Gateway:
    """What is known of one gateway; the last answer is for people."""

    session: int
    online: bool = True
    confirmed: bool = True
    answer_round: int = 0
    joined: bool = False
    code: str = ""
    reason: str = ""


class Federation:
    """The state of one task; `version` is the current model's, `number` the latest round's (0 before the first).

    `ballot` is the vote on that model, if it is not over.
    """

    def __init__(self, rules: Rules, *, version: int, past: Past | None, ballot: Ballot | None = None) -> None:
        self.rules = rules
        self.version = version
        self.number = past.round if past else 0
        self.opened_ms = past.opened_ms if past else -rounds.FOREVER_MS
        self.gateways: dict[str, Gateway] = {}
        self.round: Round | None = None
        self.bases = {**past.bases, past.round: past.base} if past else {}
        self._confirm_by_ms = 0
        self._offline = False
        self._asked = ""
        self.state = State.WAITING
        self.ballot = ballot
        if ballot:
            self.state = State.VOTING
        elif past and past.is_open:
            self.state = State.OPEN
            self.round = self._make(past.base, past.deadline_ms)
            self.round.take_up(past.counted, past.older)
        elif self._is_last():
            self.state = State.DONE

    @property
    def online(self) -> set[str]:
        """Paths of the gateways that are there."""
        return {path for path, gateway in self.gateways.items() if gateway.online}

    @property
    def gone(self) -> set[str]:
        """Paths of those that were there once, and are not."""
        return self.gateways.keys() - self.online

    @property
    def next_opening_ms(self) -> int | None:
        """When the next round is due; None when none will come or one is open."""
        if self.state is not State.WAITING:
            return None
        early = self.rules.early_ms if self._asked else None
        return self.opened_ms + (self.rules.every_ms if early is None else min(early, self.rules.every_ms))

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        """Take one event; LocalError for one that can't happen in this state."""
        try:
            transition = TRANSITIONS[self.state, type(event)]
        except KeyError:
            raise LocalError(f"a federation that is {self.state.value} knows no {type(event).__name__}") from None
        return transition(self, event, now_ms)

    def _born(self, event: Born, now_ms: int) -> list[Action]:
        before = self.gateways.get(event.path)
        if before and event.session < before.session:
            return []  # a retained birth of the past
        if not event.serves:
            return self._gone(event.path, now_ms)
        restarted = before is not None and event.session > before.session
        gateway = self.gateways.setdefault(event.path, Gateway(event.session))
        gateway.session, gateway.online, gateway.confirmed = event.session, True, True
        if self.round:
            self._round(rounds.Arrived(event.path, restarted), now_ms)
        return self._open_if_due(now_ms)

    def _died(self, event: Died, now_ms: int) -> list[Action]:
        gateway = self.gateways.get(event.path)
        if not gateway or gateway.session != event.session:
            return []
        return self._gone(event.path, now_ms)

    def _gone(self, path: str, now_ms: int) -> list[Action]:
        gateway = self.gateways.get(path)
        if not gateway or not gateway.online:
            return []
        gateway.online = False
        return self._round(rounds.Left(path), now_ms)

    def _answered(self, event: Answered, now_ms: int) -> list[Action]:
        gateway = self.gateways.get(event.path)
        if gateway and event.round >= gateway.answer_round:
            gateway.answer_round, gateway.joined = event.round, event.joined
            gateway.code, gateway.reason = event.code, event.reason
        if not self.round or event.round != self.round.number:
            return []
        return self._round((rounds.Joined if event.joined else rounds.Declined)(event.path), now_ms)

    def _asks(self, event: Asked, now_ms: int) -> list[Action]:
        if self.rules.early_ms is None or event.round != self.number or event.path not in self.online:
            return []  # a wish of a round ago has been met
        self._asked = event.path
        return self._open_if_due(now_ms)

    def _asks_late(self, _event: Asked, _now_ms: int) -> list[Action]:
        """A round is under way, in which the asker takes part; or there will be none any more."""
        return []

    def _submitted(self, event: Submitted, now_ms: int) -> list[Action]:
        if self.round and event.round == self.round.number:
            return self._round(rounds.Submitted(event.path, event.base, event.digest), now_ms)
        if event.known:
            word, detail = rounds.DUPLICATE, "the round is closed"
        elif event.round > self.number:
            word, detail = rounds.UNKNOWN_ROUND, f"the latest round is {self.number}"
        elif self.round and self.rules.buffer is not None:
            return self._round(rounds.Submitted(event.path, event.base, event.digest, event.round), now_ms)
        else:
            word, detail = rounds.LATE, f"the latest round is {self.number}"
        return [Outcome(event.path, event.round, event.digest, word, detail)]

    def _refused(self, event: Refused, now_ms: int) -> list[Action]:
        if not self.round or event.round != self.round.number:
            return []
        return self._round(rounds.Refused(event.path), now_ms)

    def _disconnected(self, _event: Disconnected, now_ms: int) -> list[Action]:
        # Nobody can confirm anything now; the next connection asks again.
        self._offline, self._confirm_by_ms = True, 0
        return self._round(rounds.Held(rounds.FOREVER_MS), now_ms)

    def _connected(self, _event: Connected, now_ms: int) -> list[Action]:
        self._offline = False
        self._confirm_by_ms = now_ms + CONFIRM_MS
        if self.ballot:
            self.ballot.until_ms = max(self.ballot.until_ms, now_ms + min(CONFIRM_MS, self.rules.vote_ms))
        for gateway in self.gateways.values():
            gateway.confirmed = False
        return self._round(rounds.Held(now_ms + SETTLE_MS), now_ms)

    def _tick(self, _event: Tick, now_ms: int) -> list[Action]:
        actions: list[Action] = []
        if self._confirm_by_ms and now_ms >= self._confirm_by_ms:
            self._confirm_by_ms = 0
            for path, gateway in self.gateways.items():
                if not gateway.confirmed:
                    actions += self._gone(path, now_ms)
        return actions + self._round(rounds.Tick(), now_ms) + self._decide(now_ms) + self._open_if_due(now_ms)

    def _aggregated(self, event: Aggregated, now_ms: int) -> list[Action]:
        before, self.version = self.version, event.version
        closed, self.round = self.round, None
        # There is none after a vote; and a round whose numbers overflowed made no model.
        if closed is None or event.version == before or not self.rules.vote_ms:
            return self._go_on(now_ms)
        self.state = State.VOTING
        self.ballot = Ballot(event.version, before, event.voters, now_ms + self.rules.vote_ms)
        return self._decide(now_ms)

    def _voted(self, event: Voted, now_ms: int) -> list[Action]:
        if self.ballot:
            self.ballot.take(event)
        return self._decide(now_ms)

    def _decide(self, now_ms: int) -> list[Action]:
        decided = None if self.ballot is None or self._offline else self.ballot.decide(self.gone, now_ms)
        if decided is None:
            return []
        self.ballot = None
        if decided.kept:
            return [decided, *self._go_on(now_ms)]
        self.state = State.CLOSING
        return [decided]

    def _go_on(self, now_ms: int) -> list[Action]:
        if self._is_last():
            self.state = State.DONE
            return [Finish()]
        self.state = State.WAITING
        return self._open_if_due(now_ms)

    def _is_last(self) -> bool:
        return self.rules.rounds is not None and self.number >= self.rules.rounds

    def _round(self, event: Event, now_ms: int) -> list[Action]:
        if not self.round:
            return []
        actions = self.round.handle(event, now_ms)
        if self.state is State.OPEN and self.round.state is rounds.State.CLOSED:
            self.state = State.CLOSING
        if any(isinstance(one, rounds.Extend) and one.again for one in actions):
            self.opened_ms = now_ms
        return actions

    def _open_if_due(self, now_ms: int) -> list[Action]:
        online, due_ms = self.online, self.next_opening_ms
        due = due_ms is not None and now_ms >= due_ms
        if not due or self._offline or len(online) < self.rules.min_gateways:
            return []
        asked = self._asked if now_ms < self.opened_ms + self.rules.every_ms else ""
        self._asked = ""
        self.number, self.opened_ms, self.state = self.number + 1, now_ms, State.OPEN
        deadline_ms = now_ms + self.rules.deadline_ms
        self.round = self._make(self.version, deadline_ms, online)
        self.bases = {**self.round.bases, self.number: self.version}
        return [Open(self.number, self.version, now_ms, deadline_ms, asked)]

    def _make(self, base: int, deadline_ms: int, expected: Iterable[str] = ()) -> Round:
        return Round(
            self.number,
            base,
            deadline_ms=deadline_ms,
            length_ms=self.rules.deadline_ms,
            min_gateways=self.rules.min_gateways,
            expected=expected,
            buffer=self.rules.buffer,
            bases=self.bases,
            least_ms=0 if self.rules.buffer is None else self.opened_ms + self.rules.every_ms,
        )


# A transition's event is of the type that its key names. Only a federation that is closing is told of a new model.
_ALWAYS: dict[type[Event], Callable[..., list[Action]]] = {
    Born: Federation._born,
    Died: Federation._died,
    Answered: Federation._answered,
    Submitted: Federation._submitted,
    Refused: Federation._refused,
    Voted: Federation._voted,
    Disconnected: Federation._disconnected,
    Connected: Federation._connected,
    Tick: Federation._tick,
}
TRANSITIONS: dict[tuple[State, type[Event]], Callable[..., list[Action]]] = {
    **{(state, event): transition for state in State for event, transition in _ALWAYS.items()},
    **{(state, Asked): Federation._asks_late for state in State},
    (State.WAITING, Asked): Federation._asks,
    (State.VOTING, Asked): Federation._asks,
    (State.CLOSING, Aggregated): Federation._aggregated,
}
