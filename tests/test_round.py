"""Rounds and federations as lists of events on a fake clock: no broker, no disk, no waiting."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import federation
from broker import round as rounds
from broker.ballot import Ballot, Decided, Voted
from broker.federation import (
    Aggregated,
    Answered,
    Asked,
    Born,
    Connected,
    Died,
    Disconnected,
    Federation,
    Finish,
    Open,
    Rules,
    Tick,
)
from broker.round import Action, Close, Extend, Outcome, Past, Round
from models.errors import LocalError

D = [bytes([i]) * 32 for i in range(8)]
HOUR = 3_600_000


def sync(expected: str = "abc", minimum: int = 2, **options: Any) -> Round:
    return Round(1, 0, deadline_ms=100, length_ms=100, min_gateways=minimum, expected=expected, **options)


def words(actions: list[Action]) -> list[str]:
    return [a.word if isinstance(a, Outcome) else type(a).__name__ for a in actions]


def feed(r: Round, *events: rounds.Event, now: int = 1) -> list[str]:
    return words([action for event in events for action in r.handle(event, now)])


def submit(path: str, digest: bytes = D[0], base: int = 0) -> rounds.Submitted:
    return rounds.Submitted(path, base, digest)


def test_every_transition_stands_in_the_table() -> None:
    events = [rounds.Arrived, rounds.Left, rounds.Declined, rounds.Joined, rounds.Submitted, rounds.Refused]
    events += [rounds.Held, rounds.Tick]
    assert rounds.TRANSITIONS.keys() == set(itertools.product(rounds.State, events))
    with pytest.raises(LocalError, match="knows no Event"):
        sync().handle(rounds.Event(), 0)
    more = [Born, Died, Answered, Asked, federation.Submitted, federation.Refused, Voted, Disconnected, Connected, Tick]
    pairs = {*itertools.product(federation.State, more), (federation.State.CLOSING, Aggregated)}
    assert federation.TRANSITIONS.keys() == pairs
    with pytest.raises(LocalError, match="waiting knows no Aggregated"):
        Federation(Rules(1, 1, 1), version=0, past=None).handle(Aggregated(1), 0)


def test_closes_when_all_are_counted() -> None:
    r = sync()
    assert feed(r, submit("a"), submit("b")) == ["counted", "counted"]
    assert feed(r, submit("c")) == ["counted", "Close"]
    assert feed(r, submit("a"), submit("d")) == ["duplicate", "late"]


def test_counts_a_gateway_once() -> None:
    r = sync()
    assert feed(r, submit("a"), submit("a"), submit("a", D[1])) == ["counted", "duplicate", "duplicate"]
    assert r.counted == {"a": D[0]}


def test_refuses_another_base() -> None:
    r = sync()
    assert feed(r, submit("a", base=1)) == ["stale"]
    assert feed(r, submit("a")) == ["counted"]


@pytest.mark.parametrize("spent", [submit("c", base=1), rounds.Refused("c")])
def test_whose_update_can_not_be_used_is_not_waited_for(spent: rounds.Event) -> None:
    r = sync()
    assert feed(r, submit("a"), spent, rounds.Joined("c")) in (["counted"], ["counted", "stale"])
    assert r.waiting_for == {"b"}
    assert feed(r, submit("b")) == ["counted", "Close"]
    r = sync()
    assert feed(r, submit("a"), submit("b"), spent)[-1] == "Close"
    r = sync()
    feed(r, spent)
    assert feed(r, submit("c"), submit("a"), submit("b")) == ["counted", "counted", "counted", "Close"]


def test_needs_the_quorum_however_few_are_expected() -> None:
    r = sync("a", minimum=2)
    assert feed(r, submit("a"), rounds.Tick()) == ["counted"]
    assert feed(r, submit("b")) == ["counted", "Close"]


def test_who_declines_dies_or_returns() -> None:
    r = sync("abcd")
    feed(r, submit("a"), submit("b"), rounds.Declined("c"))
    assert r.waiting_for == {"d"}
    assert feed(r, rounds.Arrived("e"), rounds.Left("d")) == []
    assert r.waiting_for == {"e"}
    assert feed(r, rounds.Arrived("d"), rounds.Left("e")) == []
    assert feed(r, rounds.Arrived("c"), submit("d")) == ["counted", "Close"]


def test_a_restart_or_a_change_of_mind_undoes_a_decline() -> None:
    for event in (rounds.Arrived("c", restarted=True), rounds.Joined("c")):
        r = sync()
        assert feed(r, submit("a"), rounds.Declined("c"), event, submit("b")) == ["counted", "counted"]
        assert r.waiting_for == {"c"}


def test_the_last_decline_closes() -> None:
    r = sync()
    assert feed(r, submit("a"), submit("b"), rounds.Declined("c")) == ["counted", "counted", "Close"]


def test_the_deadline_closes_or_moves_on() -> None:
    r = sync()
    assert feed(r, submit("a"), now=50) == ["counted"]
    assert feed(r, rounds.Tick(), now=99) == []
    assert r.handle(rounds.Tick(), 120) == [Extend(1, 220)]
    assert feed(r, rounds.Tick(), now=219) == []
    assert r.handle(rounds.Tick(), 220) == [Extend(1, 320)]
    assert feed(r, submit("a"), submit("b"), now=300) == ["duplicate", "counted"]
    assert r.handle(rounds.Tick(), 320) == [Close(1, 0)]


def test_a_held_round_does_not_close() -> None:
    r = sync("", minimum=1)
    r.take_up({"a": D[0]})
    assert feed(r, rounds.Tick(), now=10**9) == []
    assert feed(r, rounds.Held(10**9 + 5), rounds.Tick(), now=10**9) == []
    assert feed(r, rounds.Tick(), now=10**9 + 5) == ["Close"]


events = st.one_of(
    st.builds(rounds.Arrived, st.sampled_from("abcd"), st.booleans()),
    st.builds(rounds.Left, st.sampled_from("abcd")),
    st.builds(rounds.Declined, st.sampled_from("abcd")),
    st.builds(rounds.Joined, st.sampled_from("abcd")),
    st.builds(rounds.Refused, st.sampled_from("abcd")),
    st.builds(rounds.Submitted, st.sampled_from("abcd"), st.integers(0, 1), st.sampled_from(D)),
    st.just(rounds.Tick()),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(events, st.integers(0, 60)), max_size=60), st.integers(1, 4))
def test_whatever_happens(script: list[tuple[rounds.Event, int]], minimum: int) -> None:
    """No gateway is counted twice, nothing counted is lost, a round closes once and never below its quorum."""
    r, now, counted, closes = sync(minimum=minimum), 0, [], 0
    for event, step in script:
        now += step
        for action in r.handle(event, now):
            if isinstance(action, Outcome) and action.word == rounds.COUNTED:
                assert closes == 0
                counted.append(action.path)
            closes += isinstance(action, Close)
    assert len(counted) == len(set(counted))
    assert set(counted) == r.counted.keys()
    assert closes == (r.state is rounds.State.CLOSED) <= 1
    assert not closes or len(counted) >= minimum


@settings(max_examples=200)
@given(st.lists(st.tuples(events, st.integers(0, 60)), max_size=40), st.integers(0, 40))
def test_a_restart_changes_no_outcome(script: list[tuple[rounds.Event, int]], crash_at: int) -> None:
    """A round rebuilt from what was counted gives every later update the same outcome."""
    r, twin, now = sync(minimum=5), None, 0
    for i, (event, step) in enumerate(script):
        now += step
        if i == crash_at:
            twin = sync(minimum=5)
            twin.take_up(r.counted)
        mine = r.handle(event, now)
        if twin and isinstance(event, rounds.Submitted):
            assert twin.handle(event, now) == mine


def free(number: int = 9, **options: Any) -> Round:
    """An asynchronous round; round n started from version n - 1."""
    more: dict[str, Any] = {
        "buffer": 3,
        "min_gateways": 2,
        "expected": "abc",
        "bases": {n: n - 1 for n in range(20)},
    } | options
    return Round(number, number - 1, deadline_ms=100, length_ms=100, **more)


def trained(path: str, number: int, base: int | None = None) -> rounds.Submitted:
    return rounds.Submitted(path, number - 1 if base is None else base, D[0], number)


def test_a_buffer_counts_what_is_late_but_not_too_late() -> None:
    r = free()
    assert feed(r, trained("a", 9 - rounds.STALEST), trained("a", 8 - rounds.STALEST)) == ["counted", "stale"]
    assert feed(r, trained("a", 9 - rounds.STALEST)) == ["duplicate"]
    assert feed(r, trained("b", 8, base=3)) == ["stale"]
    assert r.waiting_for == {"a", "b", "c"}  # each may still send one of this round
    # Enough updates, but all of them of one gateway: a sum of fewer gateways than agreed is none.
    assert feed(r, trained("a", 7), trained("a", 8)) == ["counted", "counted"]
    assert feed(r, trained("b", 9)) == ["counted", "Close"]
    assert feed(r, trained("b", 9), trained("a", 8), trained("c", 8)) == ["duplicate", "duplicate", "late"]
    assert feed(sync(), trained("a", 0)) == ["stale"]


def test_a_buffer_closes_early_and_at_its_deadline_too() -> None:
    assert feed(free(), trained("a", 9), trained("b", 9), rounds.Left("c")) == ["counted", "counted", "Close"]
    r = free()
    assert feed(r, trained("a", 8)) == ["counted"]
    assert feed(r, rounds.Tick(), now=100) == ["Extend"]
    assert feed(r, trained("b", 7), now=101) == ["counted"]
    assert feed(r, rounds.Tick(), now=200) == ["Close"]


late = st.builds(trained, st.sampled_from("abcd"), st.integers(8 - rounds.STALEST, 9))


@settings(max_examples=300)
@given(st.lists(st.tuples(events | late | late, st.integers(0, 20)), max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_whatever_happens_to_a_buffer(script: list[tuple[rounds.Event, int]], minimum: int, buffer: int) -> None:
    """Each gateway counts once for each round, and a buffer closes once, full or in time, never below its quorum."""
    r, now, counted, closes = free(min_gateways=minimum, buffer=buffer), 0, [], 0
    for event, step in script:
        now += step
        twin = free(min_gateways=minimum, buffer=buffer)
        twin.take_up(r.counted, r.older)
        is_open = r.state is rounds.State.OPEN
        actions = r.handle(event, now)
        if isinstance(event, rounds.Submitted) and is_open:
            same = [action for action in actions if isinstance(action, Outcome)]
            assert twin.handle(event, now) == same  # a restart changes no outcome
        counted += [(a.path, a.round) for a in actions if isinstance(a, Outcome) and a.word == rounds.COUNTED]
        closes += words(actions).count("Close")
    assert len(counted) == len(set(counted))
    assert closes == (r.state is rounds.State.CLOSED)
    assert not closes or len({path for path, _ in counted}) >= minimum
    assert closes or len(counted) < buffer or len({path for path, _ in counted}) < minimum


# Federations.


def fed(minimum: int = 2, every: int = HOUR, rounds: int | None = None, past: Past | None = None) -> Federation:
    return Federation(Rules(minimum, 100, every, rounds), version=past.base if past else 0, past=past)


def tell(f: Federation, *happened: rounds.Event, now: int = 0) -> list[Action]:
    return [action for event in happened for action in f.handle(event, now)]


def update(path: str, number: int = 1, base: int = 0, *, known: bool = False) -> federation.Submitted:
    return federation.Submitted(path, number, base, D[0], known)


def test_opens_with_enough_gateways_and_then_every() -> None:
    f = fed()
    assert tell(f, Tick(), Born("a", 1), Born("c", 1, serves=False)) == []
    assert tell(f, Born("b", 1), now=7) == [Open(1, 0, 7, 107)]
    assert words(tell(f, update("a"), update("b"), now=8)) == ["counted", "counted", "Close"]
    assert f.state is federation.State.CLOSING
    assert tell(f, Aggregated(1), Tick(), now=9) == []
    assert f.next_opening_ms == 7 + HOUR
    assert tell(f, Tick(), now=6 + HOUR) == []
    assert tell(f, Tick(), now=7 + HOUR) == [Open(2, 1, 7 + HOUR, 107 + HOUR)]


def early(early_ms: int | None = 50) -> Federation:
    """Between round 1, which opened at 0, and round 2."""
    f = Federation(Rules(2, 100, HOUR, early_ms=early_ms), version=0, past=None)
    tell(f, Born("a", 1), Born("b", 1), update("a"), update("b"), Aggregated(1))
    return f


def test_a_gateway_may_have_the_next_round_opened_early() -> None:
    f = early()
    assert tell(f, Asked("a", 1), Tick(), now=49) == []
    assert f.next_opening_ms == 50
    assert tell(f, Tick(), now=50) == [Open(2, 1, 50, 150, "a")]
    assert tell(f, Asked("b", 2), update("a", 2, 1), update("b", 2, 1), now=60)[-1] == Close(2, 1)
    assert tell(f, Asked("b", 2), Aggregated(2), Tick(), now=HOUR) == []  # in a round, and while it closes
    assert tell(f, Asked("b", 1), Asked("b", 3), Asked("x", 2), Tick(), now=HOUR) == []  # of before, of later, by whom?
    assert tell(f, Asked("b", 2), now=HOUR) == [Open(3, 2, HOUR, HOUR + 100, "b")]


def test_who_asks_opens_no_round_that_may_not_be() -> None:
    assert tell(early(None), Asked("a", 1), Tick(), now=HOUR - 1) == []
    f = early()
    assert tell(f, Died("b", 1), Asked("a", 1), Asked("b", 1), Tick(), now=60) == []  # too few are there
    assert tell(f, Born("b", 2), now=61) == [Open(2, 1, 61, 161, "a")]
    f = early()
    tell(f, Asked("a", 1), now=1)
    assert tell(f, Tick(), now=HOUR) == [Open(2, 1, HOUR, HOUR + 100)]  # its time had come anyway


def test_every_zero_opens_at_once_and_rounds_end() -> None:
    f = fed(every=0, rounds=2)
    tell(f, Born("a", 1), Born("b", 1), update("a"), update("b"))
    assert tell(f, Aggregated(1), now=5) == [Open(2, 1, 5, 105)]
    tell(f, update("a", 2, 1), update("b", 2, 1))
    assert tell(f, Aggregated(2), Tick(), now=HOUR) == [Finish()]
    assert f.state is federation.State.DONE
    assert words(tell(f, Born("c", 1), Connected(), update("a", 2, 2), update("a", 3, 2))) == ["late", "unknown-round"]


def test_never_opens_while_one_is_open_nor_with_too_few() -> None:
    f = fed(every=0)
    tell(f, Born("a", 1), Born("b", 1), update("a"))
    assert not [a for a in tell(f, Tick(), Born("c", 1), now=50) if isinstance(a, Open)]
    f = fed(every=0)
    tell(f, Born("a", 1), Died("a", 1))
    assert tell(f, Born("b", 1)) == []


def test_an_asynchronous_federation_goes_on_without_the_slow() -> None:
    rules = Rules(1, 100, 0, None, 2)
    f = Federation(rules, version=0, past=None)
    tell(f, Born("a", 1), Born("b", 1), Born("c", 1))
    while f.number < 4:
        for path in "ab":
            tell(f, update(path, f.number, f.version))
        assert words(tell(f, Aggregated(f.version + 1))) == ["Open"]
    slow = update("c", 2, 1)
    assert f.round
    assert words(tell(f, slow, slow, update("a", 1, 0, known=True))) == ["counted", "duplicate", "duplicate"]
    past = Past(4, 3, 0, 100, is_open=True, bases={1: 0, 2: 1, 3: 2}, older=f.round.older)
    again = Federation(rules, version=3, past=past)
    assert words(tell(again, slow, update("c", 3, 2), update("c", 5, 4))) == ["duplicate", "counted", "unknown-round"]
    tell(again, Connected())
    assert words(tell(again, Tick(), now=federation.SETTLE_MS)) == ["Close"]


def test_an_asynchronous_round_is_open_for_as_long_as_every() -> None:
    """Those who are online leave nobody behind who comes by file: eight rounds are eight times `every`."""
    f = Federation(Rules(1, 2 * HOUR, HOUR, None, 1), version=0, past=None)
    tell(f, Born("a", 1))
    assert words(tell(f, update("a"), Tick(), now=HOUR - 1)) == ["counted"]
    assert words(tell(f, update("c"), now=HOUR - 1)) == ["counted"]  # a full one still counts what comes
    past = Past(1, 0, 0, 2 * HOUR, is_open=True, counted={"a": D[0], "c": D[0]})
    again = Federation(f.rules, version=0, past=past)
    tell(again, Connected(), now=HOUR - federation.SETTLE_MS - 1)
    assert words(tell(again, Tick(), now=HOUR - 1)) == []
    for g in (f, again):
        assert words(tell(g, Tick(), now=HOUR)) == ["Close"]
    tell(f, Aggregated(1), now=HOUR)
    # Nothing is counted in the second: time alone opens no other.
    opened = [tell(f, Tick(), now=now) for now in range(HOUR, 30 * HOUR, HOUR // 2)]
    assert {word for actions in opened for word in words(actions)} == {"Extend"}
    assert f.number == 2
    assert words(tell(f, update("c", 1, 0, known=True), update("d", 1, 0), now=30 * HOUR)) == [
        "duplicate",
        "counted",
        "Close",
    ]


def test_outcomes_of_other_rounds() -> None:
    f = fed(every=0)
    tell(f, Born("a", 1), Born("b", 1), update("a"), update("b"), Aggregated(1))
    late = tell(f, update("c"), update("a", known=True), update("a", 3), update("a", 2, 0), update("a", 2, 1))
    assert words(late) == ["late", "duplicate", "unknown-round", "stale", "counted"]


def test_sessions_order_births_and_deaths() -> None:
    f = fed()
    tell(f, Born("a", 5), Died("a", 4))
    assert f.online == {"a"}
    tell(f, Died("a", 5), Born("a", 4))
    assert f.online == set()
    tell(f, Born("a", 5))
    assert f.online == {"a"}
    tell(f, Born("a", 6, serves=False))
    assert f.online == set()


def test_answers_are_kept_for_people_and_count_for_the_open_round_alone() -> None:
    f = fed()
    tell(f, Born("a", 1), Born("b", 1), Born("c", 1))
    tell(f, Answered("c", 1, joined=False, code="too-few", reason="x"), Answered("b", 0, joined=False))
    assert f.round
    assert f.round.waiting_for == {"a", "b"}
    assert (f.gateways["c"].answer_round, f.gateways["c"].code) == (1, "too-few")
    assert words(tell(f, update("a"), update("b"))) == ["counted", "counted", "Close"]


def test_who_is_silent_after_a_lost_connection_is_gone() -> None:
    f = fed(minimum=1)
    tell(f, Born("a", 1), Born("b", 1), now=0)
    tell(f, Connected(), now=10)
    assert words(tell(f, Born("a", 1), update("a"), now=20)) == ["counted"]
    assert tell(f, Tick(), now=99) == []
    f.round.deadline_ms = 10 * HOUR  # type: ignore[union-attr]
    assert words(tell(f, Tick(), now=10 + federation.CONFIRM_MS)) == ["Close"]
    assert f.online == {"a"}


def test_nothing_closes_or_opens_without_a_broker() -> None:
    f = fed(every=0)
    tell(f, Born("a", 1), Born("b", 1), Born("c", 1), update("a"), update("b"))
    tell(f, Disconnected(), now=50)
    assert tell(f, Tick(), now=100) == []
    assert tell(f, Tick(), now=HOUR) == []
    assert f.online == {"a", "b", "c"}  # nobody could have said that they are still there
    tell(f, Connected(), now=HOUR)
    assert words(tell(f, Born("a", 1), Born("b", 1), Born("c", 1), Tick(), now=HOUR + 1)) == []
    assert words(tell(f, update("c"), now=HOUR + 2)) == ["counted"]
    tell(f, Disconnected(), now=HOUR + 3)
    assert tell(f, Tick(), now=2 * HOUR) == []
    tell(f, Connected(), now=2 * HOUR)
    assert words(tell(f, Tick(), now=2 * HOUR + federation.SETTLE_MS)) == ["Close"]
    tell(f, Disconnected(), now=2 * HOUR + 4000)
    assert tell(f, Aggregated(1), Tick(), Born("d", 1), now=3 * HOUR) == []
    assert tell(f, Connected(), Tick(), now=3 * HOUR) == [Open(2, 1, 3 * HOUR, 3 * HOUR + 100)]


def test_a_refusal_counts_for_the_open_round_alone() -> None:
    f = fed()
    assert tell(f, federation.Refused("a", 1)) == []
    tell(f, Born("a", 1), Born("b", 1), federation.Refused("a", 0))
    assert f.round
    assert f.round.waiting_for == {"a", "b"}
    tell(f, federation.Refused("a", 1))
    assert f.round.waiting_for == {"b"}


def test_an_open_round_is_taken_up_after_a_restart() -> None:
    past = Past(4, 3, 1000, 1100, is_open=True, counted={"a": D[0]})
    f = fed(past=past)
    assert tell(f, Tick(), now=5000) == []  # nobody had a chance to be heard yet
    tell(f, Connected(), now=5000)
    done = tell(f, Born("a", 1), Born("b", 1), update("a", 4, 3), update("b", 4, 3), now=5001)
    assert words(done) == ["duplicate", "counted"]
    assert words(tell(f, Tick(), now=5000 + federation.SETTLE_MS)) == ["Close"]
    assert tell(f, Aggregated(4), now=9000) == []
    assert f.next_opening_ms == 1000 + HOUR


def test_a_round_that_was_taken_up_opens_anew_once_where_nobody_comes() -> None:
    """Of a journal restored from a backup, gateways know later openings."""
    f = fed(past=Past(4, 3, 1000, 1100, is_open=True, counted={"a": D[0]}))
    tell(f, Connected(), Born("a", 1), now=4000)
    at, length_ms = 4000 + federation.SETTLE_MS, f.rules.deadline_ms
    assert tell(f, Tick(), now=at) == [Extend(4, at + length_ms)]  # all who are there are counted
    tell(f, Born("b", 1), now=at)
    at += length_ms
    assert tell(f, Tick(), now=at) == [Extend(4, at + length_ms, again=True)]
    assert f.opened_ms == at
    assert tell(f, Tick(), now=at + length_ms) == [Extend(4, at + 2 * length_ms)]
    assert f.opened_ms == at
    assert words(tell(f, update("b", 4, 3), now=at + length_ms)) == ["counted", "Close"]


def test_a_closed_or_last_round_is_known_after_a_restart() -> None:
    past = Past(4, 3, 1000, 1100, is_open=False)
    assert fed(past=past).next_opening_ms == 1000 + HOUR
    assert fed(rounds=4, past=past).state is federation.State.DONE
    assert fed(rounds=5, past=past).state is federation.State.WAITING


# Votes.


def voting(ballot: Ballot | None = None) -> Federation:
    """After round 1, whose model is voted on until 1000; d was not counted."""
    rules = Rules(2, 100, 0, 3, vote_ms=1000)
    if ballot:
        return Federation(rules, version=1, past=Past(1, 0, 0, 100, is_open=False), ballot=ballot)
    f = Federation(rules, version=0, past=None)
    tell(f, Born("a", 1), Born("b", 1), Born("c", 1), *map(update, "abc"))
    assert tell(f, Born("d", 1), Aggregated(1, frozenset("abc")), Tick()) == []
    assert f.state is federation.State.VOTING
    assert f.ballot
    assert f.ballot.waits_for(f.gone) == {"a", "b", "c"}
    return f


def vote(path: str, version: int = 1, *, against: bool = False) -> Voted:
    return Voted(path, version, against)


def no(path: str) -> Voted:
    return vote(path, against=True)


def test_a_model_is_kept_when_everybody_has_voted() -> None:
    f = voting()
    assert tell(f, vote("a"), no("a"), vote("b", 0), no("d"), vote("b"), Tick(), now=9) == []
    decided = Decided(1, 0, kept=True, votes={"a": False, "d": True, "b": False, "c": True})
    assert tell(f, no("c"), now=9) == [decided, Open(2, 1, 9, 109)]  # half is no majority
    assert tell(f, no("b"), now=9) == []


def test_a_model_that_is_voted_down_makes_way() -> None:
    f = voting()
    decided = Decided(1, 0, kept=False, votes={"a": True, "b": False, "c": True})
    assert tell(f, no("a"), vote("b"), no("c"), now=9) == [decided]
    assert f.state is federation.State.CLOSING
    assert tell(f, Tick(), now=9999) == []
    assert tell(f, Aggregated(2), now=9999) == [Open(2, 2, 9999, 10099)]  # and nobody votes on that
    tell(f, *(update(path, 2, 2) for path in "abcd"))
    assert tell(f, Aggregated(2), now=9999) == [Open(3, 2, 9999, 10099)]  # nor where a round made no model
    tell(f, *(update(path, 3, 2) for path in "abcd"))
    assert tell(f, Aggregated(3)) == [Decided(3, 2, kept=True, votes={}), Finish()]  # nobody has a holdout


def test_a_vote_ends_in_time_without_the_silent_and_the_gone() -> None:
    assert words(tell(voting(), Tick(), now=999)) == []
    assert tell(voting(), Tick(), now=1000)[0] == Decided(1, 0, kept=True, votes={})
    f = voting()
    assert tell(f, no("a"), Tick(), now=999) == []
    # One of three can't take a model from all.
    assert tell(f, Tick(), now=1000)[0] == Decided(1, 0, kept=True, votes={"a": True})
    f = voting()
    assert tell(f, no("a"), no("b"), Tick(), now=999) == []
    assert tell(f, Tick(), now=1000) == [Decided(1, 0, kept=False, votes={"a": True, "b": True})]
    f = voting()
    assert tell(f, no("a"), vote("b"), Died("c", 1)) == []
    assert words(tell(f, Tick())) == ["Decided", "Open"]


def test_no_vote_ends_while_nobody_can_be_heard() -> None:
    f = voting(Ballot(1, 0, frozenset("ab"), 1000, {"a": True}))
    assert tell(f, Disconnected(), Tick(), now=5000) == []
    assert tell(f, Connected(), Tick(), now=6000) == []  # what was said meanwhile is on its way
    assert tell(f, Tick(), now=6999) == []
    assert words(tell(f, no("b"), now=6999)) == ["Decided"]
    f = voting(Ballot(1, 0, frozenset("ab"), 1000, {"a": True}))
    tell(f, Disconnected(), Connected(), now=6000)
    assert tell(f, Tick(), now=7000)[0] == Decided(1, 0, kept=True, votes={"a": True})
