"""What a participant (`edge.participant`) is told, and what it wants done. Values alone."""

from dataclasses import dataclass

from broker.messages import Plan, Vote
from edge.clauses import Clauses, Headcount
from edge.config import Policy


@dataclass(frozen=True)
class PlanSeen:
    """A verified plan arrived (retained plans arrive again on every connection)."""

    plan: Plan


@dataclass(frozen=True)
class ModelStored:
    """The global model of this version is verified and stored as training base; `digest` is its weights'."""

    version: int
    digest: bytes


@dataclass(frozen=True)
class WindowsReady:
    """There are this many good windows stored."""

    count: int


@dataclass(frozen=True)
class Trained:
    """The child is done, and its update stands in the outbox."""

    round: int


@dataclass(frozen=True)
class TrainingFailed:
    """The child failed; `wait_for` windows more are needed when it had too few (0: it was something else)."""

    round: int
    reason: str
    wait_for: int = 0


@dataclass(frozen=True)
class Settled:
    """A verified receipt came, and the outbox let go of the round's update."""

    round: int
    outcome: str


@dataclass(frozen=True)
class Unable:
    """This gateway can't train the task, whatever its data: wired wrongly, or no target. Empty: it can after all."""

    reason: str


@dataclass(frozen=True)
class MayTrain:
    """Whether training may start now: `unless` is empty, or says what has to hold first.

    That may come at `opens_ms` at the earliest, in milliseconds since 1970.
    """

    unless: str = ""
    opens_ms: int = 0


@dataclass(frozen=True)
class Drifted:
    """Signals have drifted from what was trained on, as `reason` says; empty: they have not, or not any more."""

    reason: str


@dataclass(frozen=True)
class Judged:
    """A new global model was held against the one before, on this gateway's own holdout."""

    vote: Vote


@dataclass(frozen=True)
class Reconnected:
    """The broker is there again; what we said may not have arrived."""


@dataclass(frozen=True)
class PolicyChanged:
    """What this gateway allows from now on, what the charter that it holds says of the task, and how many are in.

    Without a roster, `headcount` is None.
    """

    policy: Policy
    clauses: Clauses | None = None
    headcount: Headcount | None = None


Event = (
    PlanSeen | ModelStored | WindowsReady | Trained | TrainingFailed | Settled | Unable | MayTrain | Drifted
    | Judged | Reconnected | PolicyChanged
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Say `joined` or `declined` to the aggregator, or `asks` for the next round; with a code and a sentence."""

    round: int
    verdict: str
    code: str
    reason: str


@dataclass(frozen=True)
class StartTraining:
    """Train from version `base`, encode with `bits` and `keep_ppm`, or in `ring`, and put the update in the outbox."""

    round: int
    base: int
    bits: int
    opened_ms: int
    keep_ppm: int = 1_000_000
    ring: bytes = b""


@dataclass(frozen=True)
class StopTraining:
    """Kill the child: its round is over."""


@dataclass(frozen=True)
class CastVote:
    """Send a vote; said again, it is the same message."""

    vote: Vote


Action = Answer | StartTraining | StopTraining | CastVote
