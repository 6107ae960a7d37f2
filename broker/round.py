"""One round, sans-IO: `handle(event, now_ms)` returns what is to be done and does nothing itself.

A round counts at most one update of each gateway. It closes
- early, when every expected gateway has been counted and the quorum is met: expected is who is online and has not
  declined; who dies leaves, who comes back is expected again; whose update was stale or refused is not waited for,
  because it sends no other in this round;
- at the deadline, when the quorum is met; if it is not, the deadline moves on by its own length and everything that
  was counted stays.
An asynchronous round (`buffer`, after FedBuff: Nguyen et al. 2022, arXiv:2106.06639) also closes as soon as that many
updates of enough gateways are counted, and counts those of rounds up to STALEST before, which a gateway was still
training for when their round closed; each gateway counts once for each round that it trained for. It is open for
`least_ms` at least, so that those who are fast don't leave behind whoever needs longer.
While held (from a restart or a lost connection until births had time to arrive) it does not close at all.

Times are milliseconds on the caller's clock. Every transition stands in `TRANSITIONS`.
"""

# ruff: noqa: SLF001 - the table of transitions stands below the class whose methods it names

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from models.errors import LocalError

COUNTED = "counted"
DUPLICATE = "duplicate"
LATE = "late"
STALE = "stale"
UNKNOWN_ROUND = "unknown-round"
FOREVER_MS = 2**62
# Versions that the base of an update may be behind, in an asynchronous federation.
STALEST = 8


class State(enum.Enum):
    """A closed round stays closed."""

    OPEN = "open"
    CLOSED = "closed"


class Event:
    """What happened."""


@dataclass(frozen=True)
class Arrived(Event):
    """A gateway is online; `restarted` forgets that it had declined."""

    path: str
    restarted: bool = False


@dataclass(frozen=True)
class Left(Event):
    """A gateway died or went away."""

    path: str


@dataclass(frozen=True)
class Declined(Event):
    """A gateway will not take part in this round."""

    path: str


@dataclass(frozen=True)
class Joined(Event):
    """A gateway takes part (after all)."""

    path: str


@dataclass(frozen=True)
class Submitted(Event):
    """A valid update trained from version `base`; `digest` names it (32 bytes).

    `round` is the one that it was trained for, None for this one.
    """

    path: str
    base: int
    digest: bytes
    round: int | None = None


@dataclass(frozen=True)
class Refused(Event):
    """A gateway's update for this round can't be used."""

    path: str


@dataclass(frozen=True)
class Held(Event):
    """Don't close before `until_ms`: who is online is not known again yet."""

    until_ms: int


@dataclass(frozen=True)
class Tick(Event):
    """Time has passed."""


class Action:
    """What is to be done, in this order."""


@dataclass(frozen=True)
class Outcome(Action):
    """What became of an update, for its receipt."""

    path: str
    round: int
    digest: bytes
    word: str
    detail: str = ""


@dataclass(frozen=True)
class Extend(Action):
    """The deadline moved on; `again` says that the round opens anew, under the same number."""

    round: int
    deadline_ms: int
    again: bool = False


@dataclass(frozen=True)
class Close(Action):
    """The round is closed: aggregate what was counted."""

    round: int
    base: int


@dataclass(frozen=True)
class Past:
    """The latest round, as the journal knows it; `counted` is path -> digest.

    `bases` are the versions of the rounds before, by number, and `older` what of them it counted, as (path, round).
    """

    round: int
    base: int
    opened_ms: int
    deadline_ms: int
    is_open: bool
    counted: Mapping[str, bytes] = field(default_factory=dict)
    bases: Mapping[int, int] = field(default_factory=dict)
    older: Iterable[tuple[str, int]] = ()


class Round:
    """The state of one round.

    `length_ms` is from opening to deadline; `counted` is path -> digest, `expected` the paths that are online.
    It closes neither before `hold_ms` nor before `least_ms`.
    `buffer` is None for a synchronous round; `older` holds (path, round) of what it counted of rounds before, and
    `bases` the versions that those started from, by round.
    """

    def __init__(
        self,
        number: int,
        base: int,
        *,
        deadline_ms: int,
        length_ms: int,
        min_gateways: int,
        expected: Iterable[str] = (),
        buffer: int | None = None,
        bases: Mapping[int, int] | None = None,
        least_ms: int = 0,
    ) -> None:
        self.number = number
        self.base = base
        self.deadline_ms = deadline_ms
        self.length_ms = length_ms
        self.min_gateways = min_gateways
        self.expected = set(expected)
        self.declined: set[str] = set()
        self.refused: set[str] = set()
        self.counted: dict[str, bytes] = {}
        self.hold_ms = 0
        self.least_ms = least_ms
        self.buffer = buffer
        self.bases = {n: version for n, version in (bases or {}).items() if number - STALEST <= n < number}
        self.older: set[tuple[str, int]] = set()
        self.taken_up = False
        self.state = State.OPEN

    def take_up(self, counted: Mapping[str, bytes], older: Iterable[tuple[str, int]] = ()) -> None:
        """Go on, after a restart, with what was counted; nothing closes before it is known who is online.

        Of a journal that was restored from a backup, gateways know later openings, and pass the round over: where its
        deadline comes without enough updates, it opens anew, once.
        """
        self.counted, self.older, self.hold_ms, self.taken_up = dict(counted), set(older), FOREVER_MS, True

    @property
    def waiting_for(self) -> set[str]:
        """Paths that are expected and not counted yet."""
        return self.expected - self.declined - self.refused - self.counted.keys()

    def handle(self, event: Event, now_ms: int) -> list[Action]:
        """Take one event; LocalError for an event that no round knows."""
        try:
            transition = TRANSITIONS[self.state, type(event)]
        except KeyError:
            raise LocalError(f"a round that is {self.state.value} knows no {type(event).__name__}") from None
        return transition(self, event, now_ms)

    def _arrived(self, event: Arrived, _now_ms: int) -> list[Action]:
        self.expected.add(event.path)
        if event.restarted:
            self.declined.discard(event.path)
        return []

    def _left(self, event: Left, now_ms: int) -> list[Action]:
        self.expected.discard(event.path)
        return self._early(now_ms)

    def _declined(self, event: Declined, now_ms: int) -> list[Action]:
        self.declined.add(event.path)
        return self._early(now_ms)

    def _joined(self, event: Joined, _now_ms: int) -> list[Action]:
        self.declined.discard(event.path)
        return []

    def _submitted(self, event: Submitted, now_ms: int) -> list[Action]:
        if event.round is not None and event.round != self.number:
            return self._straggler(event, event.round, now_ms)
        known = self.counted.get(event.path)
        if known is not None:
            detail = "" if known == event.digest else "another update of this gateway was counted in this round"
            return [Outcome(event.path, self.number, event.digest, DUPLICATE, detail)]
        if event.base != self.base:
            detail = f"trained from version {event.base}, the round's is {self.base}"
            self.refused.add(event.path)
            return [Outcome(event.path, self.number, event.digest, STALE, detail), *self._early(now_ms)]
        self.counted[event.path] = event.digest
        return [Outcome(event.path, self.number, event.digest, COUNTED), *self._early(now_ms)]

    def _straggler(self, event: Submitted, number: int, now_ms: int) -> list[Action]:
        """An update of a round before: whose base is not too old counts here."""
        if (event.path, number) in self.older:
            return [Outcome(event.path, number, event.digest, DUPLICATE)]
        base = self.bases.get(number)
        if self.buffer is None or base != event.base:
            detail = (
                f"trained from version {event.base} in round {number}; this is {self.number}, at most {STALEST} later"
            )
            return [Outcome(event.path, number, event.digest, STALE, detail)]
        self.older.add((event.path, number))
        return [Outcome(event.path, number, event.digest, COUNTED), *self._early(now_ms)]

    def _refused(self, event: Refused, now_ms: int) -> list[Action]:
        self.refused.add(event.path)
        return self._early(now_ms)

    def _too_late(self, event: Submitted, _now_ms: int) -> list[Action]:
        number = self.number if event.round is None else event.round
        known = event.path in self.counted if number == self.number else (event.path, number) in self.older
        return [Outcome(event.path, number, event.digest, DUPLICATE if known else LATE, "the round is closed")]

    def _held(self, event: Held, _now_ms: int) -> list[Action]:
        self.hold_ms = event.until_ms
        return []

    def _tick(self, _event: Tick, now_ms: int) -> list[Action]:
        if now_ms < max(self.deadline_ms, self.hold_ms, self.least_ms):
            return self._early(now_ms)
        if self._enough():
            return self._close()
        self.deadline_ms = now_ms + self.length_ms
        # Where all who are there are counted, another opening would have them learn the same again.
        again = self.taken_up and bool(self.waiting_for)
        self.taken_up = self.taken_up and not again
        return [Extend(self.number, self.deadline_ms, again)]

    def _nothing(self, _event: Event, _now_ms: int) -> list[Action]:
        return []

    def _early(self, now_ms: int) -> list[Action]:
        full = self.buffer is not None and len(self.counted) + len(self.older) >= self.buffer
        if now_ms < max(self.hold_ms, self.least_ms) or not self._enough() or (self.waiting_for and not full):
            return []
        return self._close()

    def _enough(self) -> bool:
        """Whether as many gateways are counted as a sum must have."""
        return len(self.counted.keys() | {path for path, _ in self.older}) >= self.min_gateways

    def _close(self) -> list[Action]:
        self.state = State.CLOSED
        return [Close(self.number, self.base)]


# A transition's event is of the type that its key names.
TRANSITIONS: dict[tuple[State, type[Event]], Callable[..., list[Action]]] = {
    (State.OPEN, Arrived): Round._arrived,
    (State.OPEN, Left): Round._left,
    (State.OPEN, Declined): Round._declined,
    (State.OPEN, Joined): Round._joined,
    (State.OPEN, Submitted): Round._submitted,
    (State.OPEN, Refused): Round._refused,
    (State.OPEN, Held): Round._held,
    (State.OPEN, Tick): Round._tick,
    (State.CLOSED, Arrived): Round._nothing,
    (State.CLOSED, Left): Round._nothing,
    (State.CLOSED, Declined): Round._nothing,
    (State.CLOSED, Joined): Round._nothing,
    (State.CLOSED, Submitted): Round._too_late,
    (State.CLOSED, Refused): Round._nothing,
    (State.CLOSED, Held): Round._nothing,
    (State.CLOSED, Tick): Round._nothing,
}
