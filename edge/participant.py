"""SANS-IO: the gateway's half of a round, one for each task. `handle(event) -> list[Action]`.

No clock, no await, no random. The agent feeds events and carries out the actions; `TRANSITIONS` holds every
transition there is, and an event that a state does not name changes nothing.

    IDLE      no round concerns us: none is open, we declined it, or it is settled
    FETCHING  a round is open, its base model has not arrived yet
    WAITING   the base is here, there are too few good windows to train on, or training may not start yet
    TRAINING  the child trains
    SENT      the update is in the outbox until its receipt comes

In an asynchronous federation (`Plan.stalest`) a training goes on while rounds pass, as long as its update still counts;
after it, the newest round is next.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

from broker.messages import Plan, Vote
from edge.clauses import Clauses, Headcount, breach, too_few
from edge.config import Policy
from edge.events import (
    Action,
    Answer,
    CastVote,
    Drifted,
    Event,
    Judged,
    MayTrain,
    ModelStored,
    PlanSeen,
    PolicyChanged,
    Reconnected,
    Settled,
    StartTraining,
    StopTraining,
    Trained,
    TrainingFailed,
    Unable,
    WindowsReady,
)

MAX_FAILURES = 3


class State(Enum):
    """Where the participant stands in the task's latest round."""

    IDLE = auto()
    FETCHING = auto()
    WAITING = auto()
    TRAINING = auto()
    SENT = auto()


_OF_POLICY = frozenset({
    "federate", "min-gateways", "max-epsilon", "secure-aggregation", "charter", "task", "members", "roster",
})  # fmt: skip


def objection(policy: Policy, plan: Plan) -> tuple[str, str] | None:
    """Say what of this gateway's policy a plan breaks, as (code, sentence); None if nothing."""
    if not policy.federate:
        return "federate", "this gateway's policy takes part in no federation"
    if plan.min_gateways < policy.min_gateways:
        return "min-gateways", f"policy wants {policy.min_gateways} gateways in a sum, the plan {plan.min_gateways}"
    if policy.max_epsilon is not None:
        return "max-epsilon", f"policy bounds epsilon at {policy.max_epsilon:g}, the plan adds no noise"
    if policy.secure_aggregation == "required" and not plan.secure_aggregation:
        return "secure-aggregation", "policy requires secure aggregation, the plan has none"
    return None


def _named(plan: Plan) -> tuple[int, int]:
    return plan.round, plan.opened_ms


def _round_of(plan: Plan) -> tuple[int, int, bytes]:
    return plan.round, plan.base, plan.base_digest


def _newer(plan: Plan, than: tuple[int, int]) -> bool:
    return plan.round > than[0] or plan.opened_ms > than[1]


@dataclass
class Participant:
    """One task's state. `handled` is the newest round that needs nothing more from us: its number and its opening.

    A round is newer when either grew: the number falls when an aggregator is restored from a backup, the time when
    its clock is set back. `started` is the round that the child trains for, `under_ms` the roster that its plan named:
    no later one is waited for before the training ends. `wish` says why the next round should come early: it is said
    once a round is closed, and again whenever the aggregator may not have heard it. So is `vote`, on the newest model,
    until a round opens from that or a later one.

    Who may not start to train before the round's deadline declines, so that nobody waits for it, and joins after all if
    the deadline moves on, or if it may start sooner than was known.
    """

    policy: Policy
    min_windows: int
    can_train: str = ""
    handled: tuple[int, int] = (0, 0)
    state: State = State.IDLE
    plan: Plan | None = None
    stored: tuple[int, bytes] = (-1, b"")
    windows: int = 0
    failures: int = 0
    answer: Answer | None = None
    started: tuple[int, int] = (0, 0)
    under_ms: int = 0
    wish: str = ""
    vote: Vote | None = None
    may_train: MayTrain = field(default_factory=MayTrain)
    clauses: Clauses | None = None
    headcount: Headcount | None = None
    _due: int = field(default=0, repr=False)

    @property
    def least(self) -> int:
        """So many windows to train on it waits for."""
        return max(self.min_windows, self._due)

    def handle(self, event: Event) -> list[Action]:
        """Take one event; return what to do, in order."""
        step = TRANSITIONS.get((self.state, type(event)))
        return step(self, event) if step else []

    def _objection(self, plan: Plan, *, running: bool = False) -> tuple[str, str] | None:
        """Say what of this gateway's policy, by the roster too, or of the charter a plan breaks; None if nothing.

        `running` asks of a training that is under way, which needs no later roster than that which it began under.
        """
        roster_ms = min(plan.roster_ms, self.under_ms) if running else plan.roster_ms
        own = objection(self.policy, plan) or too_few(self.policy, self.headcount, roster_ms)
        return own or breach(self.policy, self.clauses, plan)

    # -- transitions; each takes the event of its row in the table ---------------------------------------------------

    def on_plan(self, event: PlanSeen) -> list[Action]:
        """A plan, new or seen before: join, decline, or leave what its round no longer needs."""
        plan, stop = event.plan, list[Action]()
        known = _named(self.plan) if self.plan else (0, 0)
        same = _named(plan) == known
        if not same and not _newer(plan, known):
            return []
        if self.vote and plan.state != "closed" and plan.base >= self.vote.version:
            self.vote = None
        if self._opened_again(plan):
            return self._leave()
        if self.state is State.TRAINING and self._goes_on(plan):
            self.plan = plan
            return []
        if self.state is State.TRAINING and not (same and plan.state == "open"):
            stop = [StopTraining()]
        if same and plan.state == "open" and self.state is not State.IDLE:
            self.plan = plan
            return self._leave() or (self._begin() if self.state is State.WAITING else [])
        told = same and self.plan is not None and self.plan.state == plan.state
        self.plan, self.failures, self._due = plan, 0, 0
        if plan.state != "open" or not _newer(plan, self.handled):
            if told and self._declined_by_policy(plan):
                return self._reconsider(plan)  # the same round may be under another charter by now
            late = self._too_late() if same and self.state is State.WAITING else []
            self.state = State.IDLE
            return stop + late if told else stop + late + self._ask()
        return stop + self._join(plan)

    def _opened_again(self, plan: Plan) -> bool:
        """Take up a round's later opening: what is trained for it, or sent without an answer yet, still counts."""
        before = self.plan
        if before is None or _named(before) != self.started or self.state not in {State.TRAINING, State.SENT}:
            return False
        if plan.state != "open" or _round_of(plan) != _round_of(before) or _named(plan) == _named(before):
            return False
        self.plan, self.started = plan, _named(plan)
        if self.state is State.SENT:
            self.handled = self.started
        return True

    def _goes_on(self, plan: Plan) -> bool:
        """Whether what is being trained still counts under this plan of an asynchronous federation."""
        allowed = plan.state != "done" and self._objection(plan, running=True) is None
        return bool(plan.stalest) and allowed and 0 <= plan.round - self.started[0] <= plan.stalest

    def _next(self) -> list[Action]:
        """After a training: what a plan that came meanwhile asks for."""
        plan = self.plan
        if plan is None or plan.state != "open" or not _newer(plan, self.handled):
            return []
        self.failures, self._due = 0, 0
        return self._join(plan)

    def _join(self, plan: Plan) -> list[Action]:
        against = self._objection(plan)
        if against is None and self.can_train:
            against = "training", self.can_train
        if against:
            return self._decline(*against)
        self.answer = None
        return self._begin()

    def _decline(self, code: str, reason: str) -> list[Action]:
        if self.plan is None:
            return []
        self.state, self.handled = State.IDLE, _named(self.plan)
        self.answer = Answer(self.plan.round, "declined", code, reason)
        return [self.answer]

    def _begin(self) -> list[Action]:
        """Go as far towards training as model and data allow."""
        if self.plan is None:
            return []
        plan, may = self.plan, self.may_train
        said = self._say(Answer(plan.round, "joined", "ok", ""))
        if self.stored != (plan.base, plan.base_digest):
            self.state = State.FETCHING
        elif self.windows < self.least or may.unless:
            self.state = State.WAITING
        else:
            self.state, self.started, self.under_ms = State.TRAINING, _named(plan), plan.roster_ms
            said.append(StartTraining(plan.round, plan.base, plan.bits, plan.opened_ms, plan.keep_ppm, plan.ring))
        return said

    def _say(self, answer: Answer) -> list[Action]:
        """Answer the round, unless that is what was said last; or decline it as long as it is too early to train."""
        plan, may = self.plan, self.may_train
        if plan and may.unless and may.opens_ms > plan.deadline_ms:
            text = f"training may start when {may.unless}, which is after the round's deadline"
            answer = Answer(plan.round, "declined", "train-when", text)
        if answer == self.answer:
            return []
        self.answer = answer
        return [answer]

    def _too_late(self) -> list[Action]:
        """Say why a round that was joined is over without this gateway's update."""
        if not self.may_train.unless or not self.answer or self.answer.verdict != "joined":
            return []
        text = f"training may start when {self.may_train.unless}, which did not hold before the round was over"
        self.answer = Answer(self.answer.round, "declined", "train-when", text)
        return [self.answer]

    def on_model(self, event: ModelStored) -> list[Action]:
        """The base may have come."""
        self.stored = event.version, event.digest
        return self._begin() if self.state is State.FETCHING else []

    def on_windows(self, event: WindowsReady) -> list[Action]:
        """There may be enough data now."""
        self.windows = event.count
        return self._begin() if self.state is State.WAITING else []

    def on_trained(self, event: Trained) -> list[Action]:
        """The update stands in the outbox."""
        if event.round != self.started[0]:
            return []
        self.state, self.handled, self.wish = State.SENT, self.started, ""  # it has learnt from what is new
        return self._next()

    def on_failed(self, event: TrainingFailed) -> list[Action]:
        """Wait for data, try again, or give up on this round and say so."""
        if self.plan is None or event.round != self.started[0]:
            return []
        if self.plan.state != "open":
            self.state = State.IDLE  # the round that it was for is over, and no other is open yet
            return []
        if event.wait_for:
            self._due = self.windows + event.wait_for
            self.state = State.WAITING
            return []
        self.failures += 1
        if self.failures >= MAX_FAILURES:
            return self._decline("training-failed", event.reason)
        if self.started != _named(self.plan):
            return self._join(self.plan)
        return self._begin()  # the base may have gone on meanwhile

    def on_settled(self, event: Settled) -> list[Action]:
        """The receipt came: nothing of this round is left to do.

        Before the round's update is sent, a receipt of its number is another opening's, of a restored aggregator.
        """
        if self.state is State.SENT and self.plan and event.round == self.plan.round:
            self.state = State.IDLE
        return []

    def on_unable(self, event: Unable) -> list[Action]:
        """Decline a round that is under way; the next plan meets the reason at once."""
        self.can_train = event.reason
        if not event.reason or self.state not in {State.FETCHING, State.WAITING}:
            return []
        return self._decline("training", event.reason)

    def on_again(self, _event: Reconnected) -> list[Action]:
        """Repeat the answer, or the wish, and the vote: the aggregator may not have heard them."""
        vote: list[Action] = [CastVote(self.vote)] if self.vote else []
        if self.answer and self.plan and self.plan.state == "open":
            return [self.answer, *vote]
        return self._ask() + vote

    def on_judged(self, event: Judged) -> list[Action]:
        """Vote on the newest model."""
        self.vote = event.vote
        return [CastVote(event.vote)]

    def on_may_train(self, event: MayTrain) -> list[Action]:
        """Training may start now, or it is known when."""
        self.may_train = event
        return self._begin() if self.state is State.WAITING else []

    def on_drifted(self, event: Drifted) -> list[Action]:
        """Wish for a round, or no longer."""
        first, self.wish = not self.wish, event.reason
        return self._ask() if first else []

    def _ask(self) -> list[Action]:
        """Say the wish, between two rounds that this gateway may take part in."""
        plan = self.plan
        if not self.wish or plan is None or plan.state != "closed" or self.can_train or self._objection(plan):
            return []
        return [Answer(plan.round, "asks", "drift", self.wish)]

    def _declined_by_policy(self, plan: Plan) -> bool:
        """Whether the open round was declined for what the policy was."""
        answer = self.answer
        if answer is None or self.state is not State.IDLE or plan.state != "open":
            return False
        return (answer.round, answer.verdict) == (plan.round, "declined") and answer.code in _OF_POLICY

    def on_policy(self, event: PolicyChanged) -> list[Action]:
        """Leave a round that is no longer allowed, unless its update is already sent; join one that now is."""
        self.policy, self.clauses, self.headcount, plan = event.policy, event.clauses, event.headcount, self.plan
        if plan and self._declined_by_policy(plan):
            return self._reconsider(plan)
        return self._leave()

    def _reconsider(self, plan: Plan) -> list[Action]:
        """Join what was declined by policy or charter, or decline it for what they say now, where that is another."""
        against, answer = self._objection(plan), self.answer
        if answer and against == (answer.code, answer.reason):
            return []
        return self._decline(*against) if against else self._join(plan)

    def _leave(self) -> list[Action]:
        """Decline after all, where the round is no longer allowed and its update not yet sent."""
        training = self.state is State.TRAINING
        against = self._objection(self.plan, running=training) if self.plan else None
        if against is None or self.state not in {State.FETCHING, State.WAITING, State.TRAINING}:
            return []
        stop: list[Action] = [StopTraining()] if training else []
        return stop + self._decline(*against)


_Step = Callable[[Participant, Any], list[Action]]
_ANY: dict[type[Event], _Step] = {
    PlanSeen: Participant.on_plan,
    ModelStored: Participant.on_model,
    WindowsReady: Participant.on_windows,
    Settled: Participant.on_settled,
    Unable: Participant.on_unable,
    MayTrain: Participant.on_may_train,
    Drifted: Participant.on_drifted,
    Judged: Participant.on_judged,
    Reconnected: Participant.on_again,
    PolicyChanged: Participant.on_policy,
}
TRANSITIONS: dict[tuple[State, type[Event]], _Step] = {
    **{(state, event): step for state in State for event, step in _ANY.items()},
    (State.TRAINING, Trained): Participant.on_trained,
    (State.TRAINING, TrainingFailed): Participant.on_failed,
}
