"""The roster: who is in, with which keys; what the aggregator says of it, and what a gateway makes of that."""

import asyncio
import copy
import itertools
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from broker import messages as m
from broker import topics
from broker.downlink import Downlink
from broker.enrolment import admit
from broker.journal import Journal
from broker.ledger import bodies
from broker.link import Inbound, Link, MqttSettings
from broker.messages import Plan, Signer
from broker.roster import (
    MAX_GATEWAYS,
    MOST_PARTS,
    PER_PART,
    Collector,
    Member,
    Roster,
    RosterPart,
    Rosters,
    digest_of,
    members_of,
)
from edge.clauses import Headcount
from edge.cli import main
from edge.config import Policy, load_config
from edge.doctor import federation
from edge.events import Answer, ModelStored, PlanSeen, PolicyChanged, StartTraining, StopTraining, Trained, WindowsReady
from edge.identity import own_agreement_key
from edge.participant import Participant
from edge.ring import Samples
from edge.roster import RosterKeeper
from edge.shop import Shop
from edge.status import read_status
from edge.store import State
from models.errors import LocalError, PeerError
from tests.brokers import BrokerProcess
from tests.test_installing import TASK, Cell, Office
from tests.test_service import Gateway, gateways, open_plan, until
from tests.test_service import Plant as Federation
from tests.test_service import broker as broker  # noqa: PLC0414 - the fixture

TOPIC = topics.RosterOf("press", 0).topic

# -- a gateway's own key -------------------------------------------------------------------------------------------


def test_a_gateways_agreement_key_is_made_once_and_kept(tmp_path: Path) -> None:
    with closing(State(tmp_path)) as state:
        public = own_agreement_key(state)
    with closing(State(tmp_path)) as state:
        assert own_agreement_key(state) == public
        lines = [json.loads(line) for line in state.ledger()]
        private = state.get("agreement-key") or b""
    assert [(line["kind"], line["body"]) for line in lines] == [("key-made", {"agreement_key": public.hex()})]
    assert X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == public
    assert private.hex() not in str(lines)
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600


# -- parts ---------------------------------------------------------------------------------------------------------


def members(count: int, root: str = "acme") -> tuple[Member, ...]:
    return tuple(Member(root, i.to_bytes(32), (i + 1).to_bytes(32)) for i in range(count))


def parts(all_: tuple[Member, ...], time_ms: int) -> list[RosterPart]:
    pieces = [all_[i : i + PER_PART] for i in range(0, len(all_), PER_PART)] or [()]
    return [RosterPart(1, time_ms, digest_of(all_), len(pieces), piece) for piece in pieces]


def take(collector: Collector, *said: tuple[int, RosterPart]) -> list[Roster]:
    return [whole for number, part in said if (whole := collector.take(number, part))]


def test_parts_make_a_whole_in_any_order_and_the_newest_stays() -> None:
    old, new = members(2 * PER_PART), members(2 * PER_PART + 1, "borealis")
    for order in itertools.permutations(range(3)):
        collector = Collector()
        first, second = (list(enumerate(parts(some, time_ms))) for some, time_ms in ((old, 5), (new, 6)))
        assert take(collector, first[0]) == []
        (whole,) = take(collector, *(second[i] for i in order), first[1], *second, *first)
        assert whole == Roster(6, digest_of(new), new)
    assert (whole.gateways, whole.enterprises) == (len(new), 1)
    assert whole.has("borealis", bytes(32))
    assert not whole.has("acme", bytes(32))
    # One that was held before a restart: what is not newer changes nothing.
    assert take(Collector(6), *first, *second) == []
    assert len(take(Collector(5), *first, *second)) == 1


def test_one_gateway_that_was_enrolled_twice_is_one() -> None:
    twice = (Member("acme", bytes(32), None), Member("borealis", bytes(32), None))
    roster = Roster(1, digest_of(twice), twice)
    assert (roster.gateways, roster.enterprises) == (1, 2)


def test_parts_that_are_none_of_a_roster() -> None:
    good = parts(members(2 * PER_PART), 5)
    short = parts(members(PER_PART + 1), 5)[1]
    for number, bad in ((2, good[0]), (10**6 - 1, good[0]), (0, short)):
        with pytest.raises(PeerError, match="part"):
            Collector().take(number, bad)
    collector = Collector()
    with pytest.raises(PeerError, match="not those of its digest"):
        take(collector, (0, good[0]), (1, good[0]))
    # Two that claim one time: the first one's parts alone make a whole.
    other = parts(members(2 * PER_PART, "borealis"), 5)
    (whole,) = take(collector, (0, good[0]), (1, other[1]), (1, good[1]))
    assert whole.digest == good[0].digest


def test_a_full_roster_fits_into_its_messages(tmp_path: Path) -> None:
    assert MOST_PARTS * PER_PART >= MAX_GATEWAYS
    signer = Signer.generate()
    with closing(Journal(tmp_path)) as journal:
        with journal.transaction():
            for i in range(MAX_GATEWAYS):
                path = f"{i % 3:_<64}/b/c/d/e{i}".replace("_", "x")
                journal.add_to_roster(path, i.to_bytes(32, "little"), 1, "enrolled")
                journal.put_agreement_key(path, bytes([255]) * 32, 1)
            with pytest.raises(LocalError, match="10000 gateways, which is the most"):
                admit(journal, "one/b/c/d/e", bytes(32), "key")
            admit(journal, path, (MAX_GATEWAYS - 1).to_bytes(32, "little"), "key")
        downlink = Downlink("press", signer, 1)
        with journal.transaction():
            Rosters(journal, downlink).refresh(7)
        said = dict(downlink.waiting)
        expected = members_of(journal)
    assert set(said) == {topics.RosterOf("press", i).topic for i in range(MOST_PARTS)}
    assert max(map(len, said.values())) <= m.MAX_PAYLOAD
    assert list(expected) == sorted(expected, key=lambda one: (one.enterprise, one.public_key))
    collector, wholes = Collector(), list[Roster]()
    for topic, envelope in said.items():
        where = topics.parse(topic)
        assert isinstance(where, topics.RosterOf)
        part = m.open_envelope(envelope, topic, signer.public_key, RosterPart)
        wholes += take(collector, (where.part, part))
    assert [(one.time_ms, one.members) for one in wholes] == [(7, expected)]
    assert (wholes[0].gateways, wholes[0].enterprises) == (MAX_GATEWAYS, 3)


def test_who_says_key_after_key_moves_few_rosters(tmp_path: Path) -> None:
    step_ms, hour_ms = 10_000, 3_600_000
    path, other = "acme/b/c/d/e", "acme/b/c/d/f"
    with closing(Journal(tmp_path)) as journal:
        rosters = Rosters(journal, Downlink("press", Signer.generate(), 1))

        def noted(since_ms: int, until_ms: int, work: Callable[[int], object] = lambda _: None) -> list[int]:
            """When rosters were noted, while `work` is done every ten seconds."""
            before = len(list(bodies(journal.ledger_lines(), "roster")))
            for now_ms in range(since_ms, until_ms, step_ms):
                with journal.transaction():
                    work(now_ms)
                    rosters.refresh(now_ms)
            return [body["time_ms"] for body in bodies(journal.ledger_lines(), "roster")][before:]

        def says(now_ms: int) -> None:
            journal.put_agreement_key(path, now_ms.to_bytes(32), now_ms)

        # At once who is in, soon a first key, and then one of the keys an hour.
        assert noted(0, step_ms, lambda _: journal.add_to_roster(path, b"1" * 32, 1, "enrolled")) == [0]
        now = 2 * hour_ms
        assert noted(step_ms, now, says) == [step_ms, step_ms + hour_ms]
        # Another one that comes meanwhile is told at once, and its first key as soon.
        assert noted(now, now + step_ms, lambda _: journal.add_to_roster(other, bytes(32), 1, "enrolled")) == [now]
        with journal.transaction():
            journal.put_agreement_key(other, b"2" * 32, 1)
        assert noted(now + step_ms, now + hour_ms, says) == [now + step_ms]
        # What waits is told when the hour is over, though nothing more is said; and where the clock was set back.
        assert noted(now + hour_ms, now + 2 * hour_ms) == [now + step_ms + hour_ms]
        assert noted(now + 2 * hour_ms, now + 2 * hour_ms + step_ms, says) == []
        assert len(noted(step_ms, 2 * step_ms)) == 1


@pytest.mark.parametrize(
    "fields",
    [
        [1, bytes(32), 0, []],
        [1, bytes(32), MOST_PARTS + 1, []],
        [1, bytes(31), 1, []],
        [-1, bytes(32), 1, []],
        [1, bytes(32), 1, [["acme", bytes(32), None]] * (PER_PART + 1)],
        [1, bytes(32), 1, [["acme/lyon", bytes(32), None]]],
        [1, bytes(32), 1, [["acme", bytes(31), None]]],
        [1, bytes(32), 1, [["acme", bytes(32), b""]]],
        [1, bytes(32), 1, [["acme", bytes(32)]]],
        [1, bytes(32), 1, [["acme", bytes(32), None, 1]]],
        [1, bytes(32), 1],
    ],
)
def test_signed_bytes_that_are_no_roster(fields: list[object]) -> None:
    import cbor2  # noqa: PLC0415
    import cwt  # noqa: PLC0415

    signer = Signer.generate()
    payload = cbor2.dumps(["roster", 1, *fields])
    envelope = cwt.COSE.new(alg_auto_inclusion=True).encode(payload, signer._cose, external_aad=TOPIC.encode())
    with pytest.raises(PeerError, match="schema"):
        m.open_envelope(envelope, TOPIC, signer.public_key, RosterPart)


# -- the aggregator ------------------------------------------------------------------------------------------------


class Ear:
    """Somebody who comes later: what is retained of the roster, and what follows."""

    def __init__(self, url: str, key: Callable[[], bytes]) -> None:
        self.heard: list[bytes] = []
        self.key = key
        will = "acme/a/b/c/ear/_fl/status", b""
        self.link = Link(
            MqttSettings(url=url), client_id="ear", will=will, on_message=self._hear,
            on_up=lambda: None, on_down=lambda _: None,
        )  # fmt: skip
        self.link.subscribe(TOPIC)

    def _hear(self, one: Inbound) -> None:
        if one.topic == TOPIC:  # amqtt sends a new client more than it asks for
            self.heard.append(one.payload)

    def said(self) -> list[RosterPart]:
        return [m.open_envelope(envelope, TOPIC, self.key(), RosterPart) for envelope in self.heard]

    def is_(self, *there: Gateway, keys: tuple[bytes | None, ...] = ()) -> bool:
        """Whether the newest roster has these gateways alone, with these X25519 keys."""
        known = keys or (None,) * len(there)
        wanted = {("acme", g.signer.public_key, key) for g, key in zip(there, known, strict=True)}
        newest = self.said()[-1:]
        return [{(one.enterprise, one.public_key, one.agreement_key) for one in part.members} for part in newest] == [
            wanted
        ]


def born(g: Gateway, session: int, key: bytes | None) -> None:
    birth = m.Birth(1, session, 1, g.signer.public_key, "test", ("wear",), key)
    g.link.publish(g.status, g.signer.seal(birth, g.status), retain=True)


async def operator(plant: Federation, *options: str) -> None:
    command = ["-m", "broker.cli", "enrol", "-c", str(plant.config), "--state", str(plant.state), *options]
    child = await asyncio.create_subprocess_exec(sys.executable, *command)
    assert await child.wait() == 0


async def enrol(plant: Federation, g: Gateway) -> None:
    await operator(plant, "--path", str(g.path), "--key", g.signer.public_key.hex())


async def test_the_roster_follows_enrolment_births_and_revocation(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Federation(tmp_path, broker.url, min_gateways=1, join="enrolled")
    async with gateways(broker.url, 2) as there, plant.service():
        await until(lambda: "_fl/press/status" in there[0].heard)
        ear = Ear(broker.url, lambda: there[0].key)
        ear.link.start()
        try:
            await until(ear.is_)  # nobody yet, which a gateway is told as well
            await enrol(plant, there[0])
            await until(lambda: ear.is_(there[0]))
            await enrol(plant, there[1])
            await until(lambda: ear.is_(*there))
            await open_plan(there)
            sessions = [g.session for g in there]
            born(there[0], sessions[0] + 1, b"1" * 32)
            await until(lambda: ear.is_(*there, keys=(b"1" * 32, None)))
            # An older birth, heard again, and one without a key: neither takes the key back.
            born(there[0], sessions[0], b"0" * 32)
            born(there[0], sessions[0] + 2, None)
            born(there[1], sessions[1] + 1, b"2" * 32)
            await until(lambda: ear.is_(*there, keys=(b"1" * 32, b"2" * 32)))
            await operator(plant, "--path", str(there[0].path), "--revoke")
            await until(lambda: ear.is_(there[1], keys=(b"2" * 32,)))
            assert [part.time_ms for part in ear.said()] == sorted({part.time_ms for part in ear.said()})
            assert not any(str(there[0].path.site).encode() in envelope for envelope in ear.heard)
        finally:
            await ear.link.stop()
    with closing(Journal(plant.state)) as journal:
        noted = list(bodies(journal.ledger_lines(), "roster"))
        last = ear.said()[-1]
        assert noted[-1] == {"digest": last.digest.hex(), "time_ms": last.time_ms, "gateways": 1, "enterprises": 1}
        assert [body["gateways"] for body in noted] == [0, 1, 2, 2, 2, 1]


async def test_the_roster_outlives_kill_9_and_an_empty_broker(tmp_path: Path) -> None:
    broker = BrokerProcess("amqtt")
    plant = Federation(tmp_path, broker.url, min_gateways=1, join="enrolled")
    g = Gateway(broker.url, "cell0")
    with closing(Journal(plant.state)) as journal:
        key = journal.signer().public_key
    ear = Ear(broker.url, lambda: key)
    broker.start()
    try:
        ear.link.start()
        await enrol(plant, g)
        process = await plant.process()
        await until(lambda: ear.is_(g))
        process.kill()
        await process.wait()
        before = ear.said()[-1]
        broker.stop()
        broker.start()  # it remembers nothing
        ear.heard.clear()
        process = await plant.process()
        await until(lambda: ear.heard)
        again = ear.said()[-1]
        assert again.members == before.members
        assert again.time_ms > before.time_ms  # a restored journal's would be older than what gateways know
        # What changed while nobody ran is said as soon as somebody does.
        process.kill()
        await process.wait()
        await operator(plant, "--path", str(g.path), "--revoke")
        process = await plant.process()
        await until(ear.is_)
        assert ear.said()[-1].time_ms > ear.said()[0].time_ms
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    finally:
        await ear.link.stop()
        broker.stop()


async def test_a_plan_names_the_roster_it_was_opened_under_which_goes_out_first(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    plant, plan = Federation(tmp_path, broker.url, min_gateways=1), topics.RoundPlan("press", "wear").topic
    async with gateways(broker.url, 1) as (g,):
        ear = Ear(broker.url, lambda: g.key)
        ear.link.start()
        g.link.subscribe(TOPIC)
        try:
            async with plant.service():
                opened = await open_plan([g])
                await until(lambda: ear.is_(g))
                # It was enrolled by its birth, in the step that opened the round.
                assert opened.roster_ms == ear.said()[-1].time_ms
                assert list(g.heard).index(TOPIC) < list(g.heard).index(plan)
            # Said anew, it is still the round of that roster: nobody who takes part has to wait for another.
            del g.heard[TOPIC], g.heard[plan]
            async with plant.service():
                await until(lambda: ear.said()[-1].time_ms > opened.roster_ms)
                await until(lambda: plan in g.heard)
                assert g.plan() == opened
                assert list(g.heard).index(TOPIC) < list(g.heard).index(plan)
        finally:
            await ear.link.stop()


# -- a gateway -----------------------------------------------------------------------------------------------------

FEDERATION = Signer.generate()
READY = ModelStored(0, bytes(32)), WindowsReady(10)
PLAN = PlanSeen(Plan(1, bytes(32), 1, 0, bytes(32), "open", 1, 9, min_gateways=3, bits=4, secure_aggregation=False))
SAYS = "policy wants 3 gateways in a sum, the federation's roster has 2"
LATE = "the roster of {} has not come yet (tundish broker acl, and a reload)"
NAMED = PlanSeen(msgspec.structs.replace(PLAN.plan, roster_ms=5))


def test_a_policy_counts_the_gateways_of_the_roster() -> None:
    g, policy = Participant(Policy(min_gateways=3), 10), Policy(min_gateways=3)
    assert g.handle(PolicyChanged(policy, None, Headcount(1, 2))) == []
    for event in READY:
        g.handle(event)
    (answer,) = g.handle(PLAN)
    assert answer == Answer(1, "declined", "roster", SAYS)
    assert g.handle(PolicyChanged(policy, None, Headcount(1, 2))) == []
    joined, started = g.handle(PolicyChanged(policy, None, Headcount(2, 3)))
    assert (joined, type(started)) == (Answer(1, "joined", "ok", ""), StartTraining)
    assert g.handle(PolicyChanged(policy, None, Headcount(3, 4))) == []
    assert g.handle(PolicyChanged(policy, None, Headcount(1, 2))) == [StopTraining(), answer]
    # An aggregator from before says no roster.
    assert g.handle(PolicyChanged(policy, None, None))[0] == joined


def test_a_plan_waits_for_the_roster_that_it_names() -> None:
    policy = Policy(min_gateways=2)
    g = Participant(policy, 10)
    for event in READY:
        g.handle(event)
    (answer,) = g.handle(NAMED)
    assert answer == Answer(1, "declined", "roster", LATE.format(5))
    assert g.handle(PolicyChanged(policy, None, Headcount(4, 10_000))) == []  # an older one, said again
    assert g.handle(NAMED) == []
    joined, started = g.handle(PolicyChanged(policy, None, Headcount(5, 2)))
    assert (joined, type(started)) == (Answer(1, "joined", "ok", ""), StartTraining)
    assert g.handle(PolicyChanged(policy, None, Headcount(6, 2))) == []
    # Who is in decides as before once it is there.
    strict = Participant(Policy(min_gateways=3), 10, headcount=Headcount(9, 2))
    (answer,) = strict.handle(NAMED)
    assert answer == Answer(1, "declined", "roster", SAYS)


def test_who_counts_nobody_waits_for_no_roster() -> None:
    """As where the MQTT broker's access list is older than the roster's topics, and lets none through."""
    g = Participant(Policy(), 10)
    for event in READY:
        g.handle(event)
    joined, started = g.handle(NAMED)
    assert (joined, type(started)) == (Answer(1, "joined", "ok", ""), StartTraining)
    # A policy that begins to count does wait, in the middle of a round too.
    late = Answer(1, "declined", "roster", LATE.format(5))
    assert g.handle(PolicyChanged(Policy(min_gateways=2), None, None)) == [StopTraining(), late]


def test_a_training_does_not_end_because_a_roster_is_late() -> None:
    policy = Policy(min_gateways=3)
    g = Participant(policy, 10, headcount=Headcount(5, 3))
    late = [
        PlanSeen(msgspec.structs.replace(NAMED.plan, round=number, opened_ms=number, roster_ms=4 + number, stalest=3))
        for number in (1, 2, 3)
    ]
    for event in READY:
        g.handle(event)
    joined, started = g.handle(late[0])
    assert (joined, type(started)) == (Answer(1, "joined", "ok", ""), StartTraining)
    # Plans of the next rounds, whose rosters are still on their way, and something else that changes meanwhile.
    assert g.handle(late[1]) == []
    assert g.handle(PolicyChanged(policy, None, Headcount(5, 3))) == []
    assert g.handle(PolicyChanged(policy, None, Headcount(6, 3))) == []
    assert g.handle(late[2]) == []
    # What it learnt is sent; the next round waits for its roster.
    waits = Answer(3, "declined", "roster", LATE.format(7))
    assert g.handle(Trained(1)) == [waits]
    joined, started = g.handle(PolicyChanged(policy, None, Headcount(7, 3)))
    assert (joined, type(started)) == (Answer(3, "joined", "ok", ""), StartTraining)
    # Of a synchronous task the next round is another training, and waits.
    again = PlanSeen(msgspec.structs.replace(NAMED.plan, round=4, opened_ms=4, roster_ms=8))
    waits = Answer(4, "declined", "roster", LATE.format(8))
    assert copy.deepcopy(g).handle(again) == [StopTraining(), waits]
    # One that says too few ends it all the same.
    assert g.handle(PolicyChanged(policy, None, Headcount(8, 2))) == [
        StopTraining(), Answer(3, "declined", "roster", SAYS)
    ]  # fmt: skip


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    file = tmp_path / "gateway.toml"
    file.write_text('[gateway]\npath = "acme/b/c/d/e"\n[mqtt]\nurl = "mqtt://127.0.0.1"\n')
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        made = Shop(load_config(file), tmp_path, state, samples, Signer.generate(), bool, print, print)
        with state.transaction():
            state.pin("press", FEDERATION.public_key, "configured")
        made.federation, made.federation_key = "press", FEDERATION.public_key
        yield made


def said(all_: tuple[Member, ...], time_ms: int, signer: Signer = FEDERATION) -> list[tuple[int, Inbound]]:
    found = []
    for number, part in enumerate(parts(all_, time_ms)):
        topic = topics.RosterOf("press", number).topic
        found.append((number, Inbound(topic, signer.seal(part, topic), retain=True, qos=1, mid=1)))
    return found


async def heard(keeper: RosterKeeper, *messages: tuple[int, Inbound]) -> None:
    for number, inbound in messages:
        keeper.hear(number, inbound)
    if keeper._storing:
        await keeper._storing


def noted(shop: Shop) -> list[int]:
    return [body["gateways"] for body in bodies(shop.state.ledger(), "roster")]


async def test_a_gateway_holds_the_newest_roster_and_finds_itself_in_it(shop: Shop) -> None:
    changes: list[Headcount | None] = []
    keeper = RosterKeeper(shop, lambda: changes.append(shop.rules("wear").headcount))
    assert (keeper.status, shop.rules("wear").headcount) == (None, None)
    others, own = members(PER_PART), Member("acme", shop.signer.public_key, None)
    first, second = said(others, 5), said((own, *others), 6)
    await heard(keeper, *first)
    assert keeper.status
    assert (keeper.status["gateways"], keeper.status["enterprises"], keeper.status["has_this"]) == (PER_PART, 1, False)
    assert keeper.status["out_ms"] is None  # it was never in
    await heard(keeper, second[1])
    assert changes == [Headcount(5, PER_PART)]  # not whole yet
    await heard(keeper, second[0], *first, *second)
    assert changes == [Headcount(5, PER_PART), Headcount(6, PER_PART + 1)]
    assert noted(shop) == [PER_PART, PER_PART + 1]
    assert keeper.status["has_this"]
    # After a restart it holds, and an older one that is said again changes nothing.
    again = RosterKeeper(shop, lambda: changes.append(None))
    assert again.status == keeper.status
    await heard(again, *first, *second)
    assert len(changes) == 2
    # By the same key in another enterprise it would be another gateway.
    await heard(again, *said((Member("borealis", shop.signer.public_key, None),), 7))
    assert again.status
    assert (again.status["gateways"], again.status["has_this"], again.status["out_ms"]) == (1, False, 7)
    # Since when it is out is remembered, until it is in again.
    await heard(again, *said(others, 8))
    third = RosterKeeper(shop, lambda: None)
    assert third.status
    assert third.status == again.status
    await heard(third, *said((own, *others), 9))
    assert (third.status["has_this"], third.status["out_ms"] or 0) == (True, 0)
    await heard(third, *said(others, 10))
    assert str(third.status["out_ms"]) == "10"
    # What a federation with another key said is forgotten with it.
    with shop.state.transaction():
        shop.state.pin("press", bytes(32), "configured")
    assert RosterKeeper(shop, lambda: None).status is None


async def test_rosters_that_nobody_of_the_federation_said(shop: Shop) -> None:
    keeper = RosterKeeper(shop, lambda: None)
    ((_, good),) = said(members(2), 5)
    data = good.payload
    flipped = (data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8))
    for bad in (*flipped, *(data[:i] for i in range(1, len(data))), data + b"x", bytes(m.MAX_PAYLOAD + 1)):
        with pytest.raises(PeerError):
            keeper.hear(0, Inbound(TOPIC, bad, retain=True, qos=1, mid=1))
    ((_, strange),) = said(members(2), 5, Signer.generate())
    elsewhere = Inbound(topics.RosterOf("press", 1).topic, data, retain=True, qos=1, mid=1)
    for number, inbound in ((0, strange), (1, elsewhere)):
        with pytest.raises(PeerError, match="signature"):
            keeper.hear(number, inbound)
    keeper.hear(0, Inbound(TOPIC, b"", retain=True, qos=1, mid=1))
    assert (shop.roster, noted(shop)) == (None, [])


async def test_a_roster_that_the_disk_does_not_take_holds_until_it_comes_again(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = RosterKeeper(shop, lambda: None)
    shop.state._db.execute("PRAGMA query_only = ON")
    await heard(keeper, *said(members(2), 5))
    assert shop.rules("wear").headcount == Headcount(5, 2)
    assert "the roster can't be stored" in caplog.text
    shop.state._db.execute("PRAGMA query_only = OFF")
    again = RosterKeeper(shop, lambda: None)
    assert again.status is None
    await heard(again, *said(members(2), 5))
    assert noted(shop) == [2]


async def test_a_roster_that_is_withheld_lets_no_round_through(tmp_path: Path) -> None:
    office = Office(tmp_path)
    text = f"{TASK}[round]\nmin_gateways = 2\n"
    (tmp_path / "wear.toml").write_text(text)
    with closing(Journal(office.state)) as journal, journal.transaction():
        row = journal.task("wear")
        assert row
        journal.put_task("wear", row._replace(text=text))
        journal.add_to_roster("acme/b/c/d/e", bytes([1] * 32), 1, "enrolled")
        rosters = Rosters(journal, Downlink("press", journal.signer(), 1))
        rosters.refresh(1000)
        journal.open_round("wear", 1, 0, 2000, 2**50, rosters.time_ms)
    cell = Cell(tmp_path, office)
    with cell.file.open("a") as file:
        file.write("[policy]\nmin_gateways = 2\n")
    async with cell.runs():
        messages = office.messages()
        assert any("roster" in topic for topic in messages)
        cell.take(messages, without="roster")
        await cell.until(answer=f"declined: {LATE.format(1000)}", model=0)
        cell.take(messages)
        await cell.when(lambda: cell.ledger("joined"))
    said = [(entry["kind"], entry["body"]["roster_ms"]) for entry in cell.ledger("declined", "joined")]
    assert said == [("declined", 1000), ("joined", 1000)]


# -- both, as processes --------------------------------------------------------------------------------------------


def gateway_files(folder: Path, root: str, url: str) -> tuple[Path, str]:
    folder.mkdir()
    (folder / "plc.csv").write_text("tag,address\na,a\n")
    (folder / "plc.data.csv").write_text("a\n1\n")
    file, path = folder / "gateway.toml", f"{root}/lyon/press/line4/cell2"
    file.write_text(
        f'[gateway]\npath = "{path}"\n[mqtt]\nurl = "{url}"\n'
        '[[source]]\nname = "plc"\ndriver = "replay"\nurl = "plc.data.csv"\ntags = "plc.csv"\n'
        '[task.wear]\nsignals = { T = "plc/a" }\ntarget = "plc/a"\n[policy]\nmin_gateways = 2\n'
    )
    return file, path


async def test_gateways_go_by_the_roster(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roots = "acme", "borealis"
    with BrokerProcess("amqtt") as broker:
        plant = Federation(tmp_path, broker.url, min_gateways=2, join="enrolled")
        plant.config.write_text(plant.config.read_text().replace('["acme"]', '["acme", "borealis"]'))
        states, paths, children = [tmp_path / root / "state" for root in roots], list[str](), []

        def status(i: int) -> Any:
            return read_status(states[i]) or {}

        def roster(i: int) -> tuple[int, int, bool]:
            held = status(i).get("roster") or {}
            return held.get("gateways", -1), held.get("enterprises", -1), held.get("has_this", False)

        def answer() -> tuple[str, str]:
            known = plant.status()["tasks"]["wear"]["gateways"].get(paths[0], {})
            return known.get("verdict"), known.get("code")

        def shown(i: int) -> str:
            main(["edge", "status", "--state", str(states[i])])
            return capsys.readouterr().out

        async with plant.service():
            try:
                for root, state in zip(roots, states, strict=True):
                    file, path = gateway_files(tmp_path / root, root, broker.url)
                    paths.append(path)
                    command = [sys.executable, "-m", "edge.cli", "edge", "run", "-c", str(file), "--state", str(state)]
                    children.append(await asyncio.create_subprocess_exec(*command))
                await until(lambda: roster(0) == roster(1) == (0, 0, False))
                key = status(1)["public_key"]
                line = (
                    "the federation does not know this gateway: ask the operator to enrol it: tundish broker enrol -c"
                )
                await until(lambda: f"{line} federation.toml --path {paths[1]} --key {key}" in shown(1))
                for i in range(2):
                    await operator(plant, "--path", paths[i], "--key", status(i)["public_key"])
                await until(lambda: roster(0) == roster(1) == (2, 2, True))
                assert "roster   2 gateways of 2 enterprises" in shown(0)
                await until(lambda: answer()[0] == "joined")
                await until(lambda: "ENROL" not in shown(0))  # its plan has come as well
                await operator(plant, "--path", paths[1], "--revoke")
                await until(lambda: answer() == ("declined", "roster"))
                await until(lambda: roster(1) == (1, 1, False))
                out = "no more in the federation's roster since that of "
                await until(lambda: f"  REVOKED  {out}" in shown(1))
                assert "ENROL" not in shown(1)
                steps = [
                    step async for step in federation(load_config(tmp_path / roots[1] / "gateway.toml"), states[1])
                ]
                assert (steps[0].ok, steps[0].name, steps[0].text.startswith(out)) == (False, "roster", True)
                await operator(plant, "--path", paths[1], "--key", key)
                await until(lambda: answer()[0] == "joined")
                await until(lambda: "REVOKED" not in shown(1))
                with closing(Journal(plant.state)) as journal:
                    await until(lambda: all(known for _, _, known in journal.members()))
                    keys = {path: known for path, _, known in journal.members()}
                for i, state in enumerate(states):
                    with closing(State(state)) as held:
                        assert own_agreement_key(held) == keys[paths[i]]
            finally:
                for child in children:
                    child.terminate()
                    await child.wait()
