"""The gateway's half of a round as lists of events: no broker, no disk, no child."""

import itertools
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import Plan, Vote
from edge import events
from edge import participant as p
from edge.config import Policy
from edge.events import (
    Answer,
    CastVote,
    Drifted,
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
from edge.participant import Participant, State


def plan(number: int, base: int = 0, state: str = "open", **more: Any) -> Plan:
    given_: dict[str, Any] = {"min_gateways": 3, "bits": 4, "secure_aggregation": False, "opened_ms": number} | more
    return Plan(1, bytes(32), number, base, bytes(32), state, deadline_ms=9, **given_)


def seen(number: int, base: int = 0, state: str = "open", **more: Any) -> PlanSeen:
    return PlanSeen(plan(number, base, state, **more))


def gateway(policy: Policy | None = None, **more: Any) -> Participant:
    return Participant(policy or Policy(), 10, **more)


def tell(g: Participant, *events: events.Event) -> list[events.Action]:
    return [action for event in events for action in g.handle(event)]


def joined(number: int) -> Answer:
    return Answer(number, "joined", "ok", "")


VOTE = Vote(1, 1, bytes(32), 0, 0.8, 0.7, 40, "for", 1)
READY: tuple[events.Event, ...] = (ModelStored(0, bytes(32)), WindowsReady(10))


def test_a_round_from_plan_to_receipt() -> None:
    g, states = gateway(), list[State]()
    for event, actions in ((seen(1), [joined(1)]), (ModelStored(0, bytes(32)), [])):
        assert tell(g, event) == actions
        states.append(g.state)
    assert states == [State.FETCHING, State.WAITING]
    assert tell(g, WindowsReady(9)) == []
    assert tell(g, WindowsReady(10)) == [StartTraining(1, 0, 4, 1)]
    assert tell(g, WindowsReady(11), seen(1), ModelStored(0, bytes(32))) == []
    assert tell(g, Trained(1)) == []
    assert g.state is State.SENT
    assert tell(g, Settled(1, "counted")) == []
    assert (g.state, g.handled) == (State.IDLE, (1, 1))
    assert tell(g, seen(1), seen(1, state="closed"), seen(1, state="done")) == []
    assert tell(g, ModelStored(1, bytes(32)), seen(2, 1)) == [joined(2), StartTraining(2, 1, 4, 2)]


def test_the_order_of_model_windows_and_plan_does_not_matter() -> None:
    for order in itertools.permutations([seen(1), *READY]):
        actions = tell(gateway(), *order)
        assert actions == [joined(1), StartTraining(1, 0, 4, 1)]


def test_another_version_is_not_trained_from() -> None:
    g = gateway()
    assert tell(g, ModelStored(3, bytes(32)), WindowsReady(99), seen(5, 4)) == [joined(5)]
    assert g.state is State.FETCHING
    assert tell(g, ModelStored(4, bytes(32))) == [StartTraining(5, 4, 4, 5)]


def test_a_base_that_has_gone_on_is_not_trained_from() -> None:
    g = gateway()
    assert tell(g, ModelStored(0, bytes(32)), seen(1), ModelStored(1, bytes(32)), WindowsReady(50)) == [joined(1)]
    assert g.state is State.FETCHING
    # The manifest of a closed round may come before its plan says closed.
    g = gateway()
    tell(g, *READY, seen(1))
    assert tell(g, ModelStored(1, bytes(32)), TrainingFailed(1, "killed")) == []
    assert g.state is State.FETCHING


def test_a_round_that_is_over_stops_the_child() -> None:
    for end in ("closed", "done"):
        g = gateway()
        tell(g, *READY, seen(1))
        assert tell(g, seen(1, state=end)) == [StopTraining()]
        assert g.state is State.IDLE
        assert tell(g, Trained(1)) == []
        assert g.state is State.IDLE
    g = gateway()
    tell(g, *READY, seen(1))
    assert tell(g, seen(2, 0)) == [StopTraining(), joined(2), StartTraining(2, 0, 4, 2)]
    assert tell(g, Trained(1)) == []
    assert g.state is State.TRAINING
    # An update of this number is still out, of another opening: what trains now is none of its business.
    assert tell(g, Settled(2, "duplicate")) == []
    assert g.state is State.TRAINING


def test_an_old_plan_is_ignored() -> None:
    g = gateway()
    tell(g, *READY, seen(3))
    assert tell(g, seen(2), seen(2, state="closed"), seen(3, opened_ms=1)) == []
    assert g.state is State.TRAINING


def test_too_little_data_waits_for_more() -> None:
    g = gateway()
    tell(g, *READY, seen(1))
    assert tell(g, TrainingFailed(1, "7 good windows", wait_for=5)) == []
    assert g.state is State.WAITING
    assert tell(g, WindowsReady(14), seen(1), ModelStored(0, bytes(32))) == []
    assert tell(g, WindowsReady(15)) == [StartTraining(1, 0, 4, 1)]
    # It was no failure, however often.
    for windows in range(20, 60, 5):
        assert tell(g, TrainingFailed(1, "few", wait_for=5), WindowsReady(windows)) == [StartTraining(1, 0, 4, 1)]
    assert tell(g, TrainingFailed(1, "few", wait_for=5), seen(2)) == [joined(2), StartTraining(2, 0, 4, 2)]


def test_three_failures_decline() -> None:
    g = gateway()
    tell(g, *READY, seen(1))
    assert tell(g, TrainingFailed(1, "killed")) == [StartTraining(1, 0, 4, 1)]
    assert tell(g, TrainingFailed(7, "another round's")) == []
    assert tell(g, TrainingFailed(1, "killed")) == [StartTraining(1, 0, 4, 1)]
    assert tell(g, TrainingFailed(1, "over its cap")) == [Answer(1, "declined", "training-failed", "over its cap")]
    assert (g.state, g.handled) == (State.IDLE, (1, 1))
    assert tell(g, seen(1), WindowsReady(99)) == []
    assert tell(g, seen(2)) == [joined(2), StartTraining(2, 0, 4, 2)]
    assert tell(g, TrainingFailed(2, "killed")) == [StartTraining(2, 0, 4, 2)]


@pytest.mark.parametrize(
    ("policy", "bad", "code", "reason"),
    [
        (Policy(federate=False), {}, "federate", "takes part in no federation"),
        (Policy(min_gateways=4), {}, "min-gateways", "policy wants 4 gateways in a sum, the plan 3"),
        (Policy(secure_aggregation="required"), {}, "secure-aggregation", "requires secure aggregation"),
    ],
)
def test_policy_declines_with_its_reason_and_goes_on(
    policy: Policy, bad: dict[str, Any], code: str, reason: str
) -> None:
    g = gateway(policy)
    (answer,) = tell(g, *READY, seen(1, **bad))
    assert isinstance(answer, Answer)
    assert (answer.round, answer.verdict, answer.code) == (1, "declined", code)
    assert reason in answer.reason
    assert g.state is State.IDLE
    assert tell(g, seen(1, **bad), WindowsReady(99), ModelStored(0, bytes(32))) == []
    assert tell(g, Reconnected()) == [answer]
    after = tell(g, seen(2, min_gateways=4, secure_aggregation=True))
    if policy.federate:
        assert after == [joined(2), StartTraining(2, 0, 4, 2)]
    else:
        assert after == [Answer(2, "declined", code, answer.reason)]


def test_enough_protection_is_joined() -> None:
    strict = Policy(min_gateways=3, secure_aggregation="required")
    assert tell(gateway(strict), *READY, seen(1, secure_aggregation=True)) == [joined(1), StartTraining(1, 0, 4, 1)]


def test_what_this_gateway_cannot_train() -> None:
    declined = Answer(1, "declined", "training", "no target tag is wired")
    assert tell(gateway(), Unable("no target tag is wired"), seen(1)) == [declined]
    g = gateway()
    assert tell(g, seen(1), Unable(""), Unable("no target tag is wired")) == [joined(1), declined]
    assert tell(g, Unable(""), seen(1)) == []
    assert tell(g, *READY, seen(2)) == [joined(2), StartTraining(2, 0, 4, 2)]
    assert tell(g, Unable("too late for this one")) == []
    assert g.state is State.TRAINING


def test_an_answer_is_repeated_while_its_round_is_open() -> None:
    g = gateway()
    assert tell(g, Reconnected()) == []
    tell(g, seen(1))
    assert tell(g, Reconnected()) == [joined(1)]
    tell(g, *READY, Trained(1))
    assert tell(g, Reconnected()) == [joined(1)]
    tell(g, seen(1, state="closed"))
    assert tell(g, Reconnected()) == []


def test_an_update_in_the_outbox_is_not_made_again() -> None:
    """After a restart, `handled` is the newest round that an update was made for."""
    g = gateway(handled=(3, 3))
    assert tell(g, *READY, seen(3), seen(3)) == []
    assert tell(g, Settled(3, "counted"), seen(3), WindowsReady(20)) == []
    assert tell(g, ModelStored(1, bytes(32)), seen(4, 1)) == [joined(4), StartTraining(4, 1, 4, 4)]


def test_a_round_is_sent_for_once_whatever_plans_come_after_it() -> None:
    g = gateway()
    tell(g, *READY, seen(3, opened_ms=200), Trained(3))
    tell(g, seen(5, opened_ms=100, state="closed"))
    assert tell(g, seen(3, opened_ms=200)) == []


def test_an_aggregator_restored_from_a_backup_is_heard_and_one_with_its_clock_set_back_too() -> None:
    g = gateway(handled=(9, 900))
    tell(g, *READY)
    assert tell(g, seen(9, opened_ms=900), seen(8, opened_ms=899)) == []
    assert tell(g, seen(4, opened_ms=901)) == [joined(4), StartTraining(4, 0, 4, 901)]
    tell(g, Trained(4), Settled(4, "counted"))
    assert tell(g, seen(4, opened_ms=901), seen(4, opened_ms=901, state="closed")) == []
    assert tell(g, seen(5, opened_ms=700)) == [joined(5), StartTraining(5, 0, 4, 700)]


def test_a_round_that_opens_anew_keeps_what_is_trained_for_it() -> None:
    g = gateway()
    tell(g, *READY, seen(3, opened_ms=300))
    assert tell(g, seen(3, opened_ms=500)) == []
    assert tell(g, Trained(3)) == []  # it counts for the later opening
    assert tell(g, seen(3, opened_ms=500), seen(3, opened_ms=600)) == []  # and is on its way
    tell(g, Settled(3, "counted"))
    assert tell(g, seen(3, opened_ms=600)) == []
    # Once it was answered for, another opening says that the answer was lost.
    assert tell(g, seen(3, opened_ms=700)) == [joined(3), StartTraining(3, 0, 4, 700)]
    # Of other weights, what is trained counts for nothing.
    assert tell(g, seen(3, 1, opened_ms=800)) == [StopTraining(), joined(3)]


def test_a_policy_that_changed_leaves_a_round_that_opens_anew() -> None:
    g = gateway()
    tell(g, *READY, seen(3, opened_ms=300, min_gateways=2))
    stop, answer = tell(g, seen(3, opened_ms=500, min_gateways=0))
    assert stop == StopTraining()
    assert isinstance(answer, Answer)
    assert answer.code == "min-gateways"


@pytest.mark.parametrize("way", [(seen(1),), (seen(1), ModelStored(0, bytes(32))), (seen(1), *READY)])
def test_a_policy_that_no_longer_allows_a_round_leaves_it(way: tuple[events.Event, ...]) -> None:
    g = gateway()
    tell(g, *way)
    training = g.state is State.TRAINING
    *stop, answer = tell(g, PolicyChanged(Policy(federate=False)))
    assert stop == [StopTraining()] * training
    assert isinstance(answer, Answer)
    assert (answer.round, answer.verdict, answer.code) == (1, "declined", "federate")
    assert tell(g, seen(1), *READY, PolicyChanged(Policy(federate=False, min_gateways=2))) == []
    # Allowed again while the round is open: where few gateways are, there would be no other.
    again = tell(g, PolicyChanged(Policy()))
    assert again[0] == joined(1)
    assert [type(one) for one in again[1:]] == [StartTraining]
    assert tell(g, PolicyChanged(Policy())) == []
    assert tell(g, seen(2)) == [StopTraining(), joined(2), StartTraining(2, 0, 4, 2)]


def asks(number: int) -> Answer:
    return Answer(number, "asks", "drift", "s1 0.4")


def test_what_has_drifted_is_asked_for_between_rounds_until_it_is_trained_on() -> None:
    g, wish = gateway(), Drifted("s1 0.4")
    assert tell(g, wish, Reconnected()) == []  # no plan is known
    assert tell(g, seen(1, state="closed")) == [asks(1)]
    assert tell(g, seen(1, state="closed"), wish) == []
    assert tell(g, Reconnected()) == [asks(1)]
    assert tell(g, *READY, seen(2)) == [joined(2), StartTraining(2, 0, 4, 2)]
    assert tell(g, wish, Drifted("s1 0.5"), Reconnected()) == [joined(2)]
    # The round went without its update: it asks again; with one, it has what it wanted.
    assert tell(g, seen(2, state="closed")) == [StopTraining(), Answer(2, "asks", "drift", "s1 0.5")]
    assert tell(g, seen(3), Trained(3), seen(3, state="closed"), Reconnected()) == [
        joined(3),
        StartTraining(3, 0, 4, 3),
    ]
    # What drifts and comes back, or drifts after the last round, is not asked for.
    assert tell(g, Drifted(""), wish, Drifted(""), Reconnected()) == [asks(3)]
    assert tell(g, wish, seen(4, state="done"), Reconnected()) == [asks(3)]


def test_who_may_not_or_can_not_take_part_asks_for_nothing() -> None:
    for g in (gateway(Policy(federate=False)), gateway(can_train="no target")):
        assert tell(g, seen(1, state="closed"), Drifted("s1 0.4"), Reconnected()) == []


# -- train_when --------------------------------------------------------------------------------------------------------

STILL = "plc/run == 0"


def not_now(number: int, text: str) -> Answer:
    return Answer(number, "declined", "train-when", f"training may start when {STILL}, which {text}")


AFTER = "is after the round's deadline"


def test_training_starts_when_it_may_and_a_running_one_goes_on() -> None:
    g = gateway()
    assert tell(g, MayTrain(STILL, 5), *READY, seen(1)) == [joined(1)]
    assert tell(g, WindowsReady(20), seen(1), MayTrain(STILL, 9)) == []
    assert tell(g, MayTrain()) == [StartTraining(1, 0, 4, 1)]
    assert tell(g, MayTrain(STILL, 9), seen(1)) == []
    # One that failed starts again when it may.
    assert tell(g, TrainingFailed(1, "killed")) == []
    assert tell(g, MayTrain()) == [StartTraining(1, 0, 4, 1)]


def test_who_may_only_train_after_the_deadline_declines_and_joins_if_that_moves_on() -> None:
    for way in ([seen(1), *READY], [*READY, seen(1)]):
        g = gateway()
        assert tell(g, MayTrain(STILL, 10), *way) == [not_now(1, AFTER)]
        assert tell(g, seen(1), MayTrain(STILL, 11), WindowsReady(50)) == []
        assert tell(g, Reconnected()) == [not_now(1, AFTER)]
        later = PlanSeen(msgspec.structs.replace(plan(1), deadline_ms=12))
        assert tell(g, later) == [joined(1)]
        assert tell(g, MayTrain(STILL, 13)) == [not_now(1, AFTER)]  # the hours have passed
        assert tell(g, MayTrain()) == [joined(1), StartTraining(1, 0, 4, 1)]


def test_a_round_that_is_over_before_training_may_start_is_told_why() -> None:
    g = gateway()
    over = not_now(1, "did not hold before the round was over")
    assert tell(g, MayTrain(STILL, 5), *READY, seen(1), seen(1, state="closed")) == [joined(1), over]
    assert tell(g, MayTrain(), seen(1, state="closed")) == []
    assert tell(g, seen(2)) == [joined(2), StartTraining(2, 0, 4, 2)]
    # Who waits for data, or had declined, has nothing to add.
    g = gateway()
    assert tell(g, ModelStored(0, bytes(32)), seen(1), seen(1, state="closed")) == [joined(1)]
    assert tell(g, MayTrain(STILL, 10), seen(2), seen(2, state="closed")) == [not_now(2, AFTER)]


def test_a_vote_is_said_again_until_a_round_opens_from_it_or_later() -> None:
    g = gateway(handled=(1, 1))
    assert tell(g, seen(1), seen(1, state="closed"), Judged(VOTE)) == [CastVote(VOTE)]
    assert tell(g, Reconnected(), seen(1), Reconnected()) == [CastVote(VOTE), CastVote(VOTE)]
    assert tell(g, seen(2, 0)) == [joined(2)]  # of an aggregator that does not know of that model yet
    assert tell(g, Reconnected()) == [joined(2), CastVote(VOTE)]
    tell(g, seen(3, 1))
    assert tell(g, Reconnected()) == [joined(3)]
    g = gateway(vote=VOTE)  # of a gateway that was restarted
    assert tell(g, Reconnected()) == [CastVote(VOTE)]
    assert tell(g, seen(2, 2, "done"), Reconnected()) == []


# -- every pair, any order ---------------------------------------------------------------------------------------------


EVENTS: dict[type, events.Event] = {
    PlanSeen: seen(1), ModelStored: ModelStored(0, bytes(32)), WindowsReady: WindowsReady(10), Trained: Trained(1),
    TrainingFailed: TrainingFailed(1, "killed"), Settled: Settled(1, "counted"), Unable: Unable(""),
    MayTrain: MayTrain(), Drifted: Drifted("s1 0.4"), Judged: Judged(VOTE), Reconnected: Reconnected(),
    PolicyChanged: PolicyChanged(Policy()),
}  # fmt: skip
WAYS: dict[State, tuple[events.Event, ...]] = {
    State.IDLE: (), State.FETCHING: (seen(1),), State.WAITING: (seen(1), ModelStored(0, bytes(32))),
    State.TRAINING: (seen(1), *READY), State.SENT: (seen(1), *READY, Trained(1)),
}  # fmt: skip


def test_the_table_is_whole() -> None:
    assert EVENTS.keys() == set(get_args(events.Event))
    by_training_alone = {
        (state, event) for state in State if state is not State.TRAINING for event in (Trained, TrainingFailed)
    }
    assert p.TRANSITIONS.keys() == set(itertools.product(State, EVENTS)) - by_training_alone


@pytest.mark.parametrize(
    ("state", "event"), list(itertools.product(State, EVENTS)), ids=lambda v: getattr(v, "name", "") or v.__name__
)
def test_every_pair(state: State, event: type) -> None:
    g = gateway()
    tell(g, *WAYS[state])
    assert g.state is state
    actions = g.handle(EVENTS[event])
    moved = {
        (State.IDLE, PlanSeen): (State.FETCHING, [joined(1)]),
        (State.FETCHING, ModelStored): (State.WAITING, []),
        (State.WAITING, WindowsReady): (State.TRAINING, [StartTraining(1, 0, 4, 1)]),
        (State.TRAINING, Trained): (State.SENT, []),
        (State.TRAINING, TrainingFailed): (State.TRAINING, [StartTraining(1, 0, 4, 1)]),
        (State.SENT, Settled): (State.IDLE, []),
    }
    said: list[events.Action] = [CastVote(VOTE)] if event is Judged else []
    stays = (state, [joined(1)] if event is Reconnected and WAYS[state] else said)
    assert (g.state, actions) == moved.get((state, event), stays)


@dataclass
class World:
    """A gateway around its participant, with a child, an outbox and a disk; and an aggregator that goes on."""

    policy: Policy
    g: Participant = field(init=False)
    number: int = 0
    open: bool = False
    version: int = 0
    stored: int = -1
    windows: int = 0
    running: StartTraining | None = None
    outbox: set[int] = field(default_factory=set)
    settled: int = 0
    trained: list[int] = field(default_factory=list)
    said: dict[int, Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.g = gateway(self.policy)

    def plan(self) -> PlanSeen:
        return seen(self.number, self.version, "open" if self.open else "closed", min_gateways=2 + self.number % 2)

    def tell(self, event: events.Event) -> None:
        actions = self.g.handle(event)
        for i, action in enumerate(actions):
            match action:
                case StartTraining():
                    assert self.running is None, "two trainings at once"
                    known = self.g.plan
                    assert known is not None
                    assert known.state == "open"
                    assert (action.round, action.base) == (known.round, known.base)
                    assert action.base == self.stored
                    assert action.round not in self.outbox
                    assert action.round > self.settled
                    assert action.round not in self.trained
                    assert not (answer := self.said.get(action.round)) or answer.verdict == "joined"
                    assert p.objection(self.policy, known) is None
                    assert not self.g.may_train.unless
                    self.running = action
                case StopTraining():
                    assert self.running is not None
                    self.running = None
                case Answer(verdict="asks"):
                    assert self.g.plan is not None
                    assert (action.round, self.g.plan.state) == (self.g.plan.round, "closed")
                    assert p.objection(self.policy, self.g.plan) is None
                case Answer():
                    before = self.said.get(action.round)
                    if before is not None and before != action:
                        # The causes there are: the training failed three times, it can't be wired after all, or hours.
                        assert before.verdict == "joined" or before.code == "train-when"
                        assert action.code in {"training-failed", "training", "train-when", "ok"}
                        assert isinstance(event, TrainingFailed | Unable) == action.code.startswith("training")
                    assert i == 0 or isinstance(actions[i - 1], StopTraining)
                    self.said[action.round] = action

    def step(self, what: str, count: int) -> None:  # noqa: C901, PLR0912 - one branch for each thing that can happen
        if what == "open" and not self.open:
            self.number, self.open = self.number + 1, True
        elif what == "close" and self.open:
            self.open, self.version = False, self.version + 1
        elif what == "plan" and self.number:
            self.tell(self.plan())
        elif what == "model" and self.stored != self.version:
            self.stored = self.version
            self.tell(ModelStored(self.version, bytes(32)))
        elif what == "windows":
            self.windows += count
            self.tell(WindowsReady(self.windows))
        elif what == "finish" and self.running:
            done, self.running = self.running, None
            self.outbox.add(done.round)
            self.trained.append(done.round)
            self.tell(Trained(done.round))
        elif what in {"fail", "few"} and self.running:
            failed, self.running = self.running, None
            self.tell(TrainingFailed(failed.round, what, count if what == "few" else 0))
        elif what == "receipt" and self.outbox:
            first = min(self.outbox)
            self.outbox.discard(first)
            self.settled = max(self.settled, first)
            self.tell(Settled(first, "counted"))
        elif what == "reconnect":
            self.tell(Reconnected())
        elif what == "hours":
            self.tell([MayTrain(), MayTrain(STILL, 5), MayTrain(STILL, 10)][count % 3])
        elif what == "drift":
            self.tell(Drifted("s1 0.4" if count > 2 else ""))
        elif what == "unable":
            self.tell(Unable("no target" if count > 6 else ""))
        elif what == "restart":
            self.running, self.said, self.windows = None, {}, 0
            newest = max([self.settled, *self.outbox])
            self.g = gateway(self.policy, handled=(newest, newest))
            if self.stored >= 0:
                self.tell(ModelStored(self.stored, bytes(32)))


steps = st.lists(
    st.tuples(
        st.sampled_from([
            "open", "open", "close", "plan", "plan", "plan", "model", "model", "windows", "windows", "finish",
            "fail", "few",
            "receipt", "reconnect", "unable", "restart", "drift", "hours",
        ]),
        st.integers(1, 8),
    ),
    max_size=120,
)  # fmt: skip


@given(steps, st.sampled_from([Policy(), Policy(min_gateways=3), Policy(federate=False)]))
@settings(max_examples=400, deadline=None)
def test_whatever_happens(script: list[tuple[str, int]], policy: Policy) -> None:
    """Never two trainings, never for a round known to be over, never twice for one, never against the policy."""
    world = World(policy)
    for what, count in script:
        world.step(what, count)
        assert (world.running is not None) == (world.g.state is State.TRAINING)
    # And it is never stuck: left in peace, it answers a new round that its policy allows.
    for what in ("close", "receipt", "receipt", "plan", "model", "open", "plan"):
        world.step(what, 1)
    world.step("unable", 1)
    for what in ("close", "plan", "model", "open", "plan"):
        world.step(what, 1)
    world.step("windows", 200)
    world.step("hours", 3)
    known = world.g.plan
    assert known is not None
    assert known.round == world.number
    if p.objection(policy, known) is None:
        assert world.running == StartTraining(world.number, world.version, 4, world.number)
    else:
        assert world.said[world.number].verdict == "declined"


def loose(number: int, base: int, state: str = "open", **more: Any) -> PlanSeen:
    return seen(number, base, state, stalest=2, **more)


def test_a_training_goes_on_while_asynchronous_rounds_pass() -> None:
    g = gateway()
    assert tell(g, *READY, loose(1, 0)) == [joined(1), StartTraining(1, 0, 4, 1)]
    assert tell(g, loose(1, 0, "closed"), loose(2, 1), ModelStored(1, bytes(32)), loose(3, 1)) == []
    assert tell(g, Trained(1)) == [joined(3), StartTraining(3, 1, 4, 3)]
    assert g.handled == (1, 1)
    # Too many rounds later its update would not count.
    assert tell(g, ModelStored(5, bytes(32)), loose(6, 5)) == [StopTraining(), joined(6), StartTraining(6, 5, 4, 6)]
    assert tell(g, loose(7, 6), TrainingFailed(6, "")) == [joined(7)]
    assert g.state is State.FETCHING


def test_an_asynchronous_training_ends_between_two_rounds_or_with_the_last() -> None:
    g = gateway()
    tell(g, *READY, loose(1, 0), loose(1, 0, "closed"))
    assert tell(g, Trained(1)) == []
    assert tell(g, ModelStored(1, bytes(32)), loose(2, 1)) == [joined(2), StartTraining(2, 1, 4, 2)]
    assert tell(g, loose(2, 1, "closed"), TrainingFailed(2, "")) == []
    assert tell(g, loose(3, 1), loose(3, 1, "done")) == [joined(3), StartTraining(3, 1, 4, 3), StopTraining()]


def test_a_plan_that_breaks_the_policy_ends_an_asynchronous_training() -> None:
    g = gateway(Policy(min_gateways=3))
    tell(g, *READY, loose(1, 0))
    stop, no = tell(g, loose(2, 0, min_gateways=2))
    assert stop == StopTraining()
    assert isinstance(no, Answer)
    assert no.verdict == "declined"


def test_a_base_of_the_right_number_and_other_weights_is_not_trained_on() -> None:
    g = gateway()
    assert tell(g, WindowsReady(99), ModelStored(0, b"x" * 32), seen(1)) == [joined(1)]
    assert g.state is State.FETCHING
    assert tell(g, ModelStored(0, bytes(32))) == [StartTraining(1, 0, 4, 1)]


def test_a_bound_on_epsilon_declines_a_plan_without_noise() -> None:
    g = gateway(Policy(max_epsilon=4.0))
    (answer,) = tell(g, WindowsReady(99), ModelStored(0, bytes(32)), seen(1))
    assert isinstance(answer, Answer)
    assert (answer.verdict, answer.code) == ("declined", "max-epsilon")
