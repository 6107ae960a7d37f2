"""The charter: its file, who accepts it, and that no plan outside of it gets an update."""

import asyncio
import csv
import hashlib
import json
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from broker import messages as m
from broker import topics
from broker.charter import Acceptance, CharterText, parse_charter
from broker.charters import load_charter
from broker.config import load_federation
from broker.journal import Journal
from broker.ledger import bodies
from broker.link import Inbound
from broker.messages import Plan, Signer
from edge.agent import Agent
from edge.charter import CharterKeeper
from edge.clauses import Clauses, breach
from edge.cli import main
from edge.config import Policy, load_config
from edge.events import Answer, ModelStored, PlanSeen, PolicyChanged, StartTraining, StopTraining, WindowsReady
from edge.participant import Participant
from edge.ring import Samples
from edge.runner import Runner
from edge.shop import Shop
from edge.status import read_status
from edge.status_command import _print_charter
from edge.store import State
from models.errors import PeerError, UserError
from tests.brokers import BrokerProcess
from tests.carrier import PATH, Carrier
from tests.test_agent import TASK
from tests.test_agent import plant as staged
from tests.test_service import Gateway, delta, gateways, open_plan, until
from tests.test_service import Plant as Federation

CHARTER = """\
title = "Press lines of Acme and Borealis"
purpose = "To foresee wear of spindles, and nothing else."
tasks = ["wear"]
members = ["acme", "borealis"]
min_gateways = 3
retention = "Updates until their round is closed; models and ledger for ten years."
contributions = "By the windows that a gateway trained on."

[privacy]
mode = "plain"

[model]
recipients = ["acme", "borealis"]
terms = "For use on machines of their own."
"""
DIGEST = hashlib.sha256(CHARTER.encode()).digest()
FEDERATION = Signer.generate()
TOPIC = topics.CharterInForce("north").topic


# -- the file ------------------------------------------------------------------------------------------------------


def test_a_charter_is_named_by_what_sha256sum_says_of_its_file(tmp_path: Path) -> None:
    file = tmp_path / "charter.toml"
    for text in (CHARTER, CHARTER.replace("\n", "\r\n"), "\ufeff" + CHARTER):
        file.write_bytes(text.encode())
        named = load_charter(file)
        assert named.digest == hashlib.sha256(file.read_bytes()).digest()
        assert (named.charter.members, named.charter.min_gateways) == (("acme", "borealis"), 3)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('purpose = "To', 'purpos = "To', ":2: purpos: unknown key; did you mean 'purpose'?"),
        ("min_gateways = 3", "min_gateways = 0", ":5: min_gateways: out of range; write 1 to 1000000"),
        ("min_gateways = 3", 'min_gateways = "3"', ":5: min_gateways: is text in quotes; write a whole number"),
        ("min_gateways = 3\n", "", "min_gateways: missing; add a line min_gateways = … there"),
        ('"plain"', '"none"', ':10: privacy.mode: "none" is none of the words that may stand here; write one of'),
        ('"plain"', '"plain"\nmax_epsilon = 0', ":11: privacy.max_epsilon: out of range; write a number above 0"),
        ('["wear"]', "[]", ":3: tasks: empty; write the tasks by name"),
        ('["acme", "borealis"]\nmin', "[]\nmin", ":4: members: empty; write the enterprises"),
        ('"Press lines of Acme and Borealis"', '" "', ":1: title: says nothing; write it down"),
        ('"Press lines of Acme and Borealis"', '"a\\u001b[2J"', ":1: title: is no title; write one line"),
        ('terms = "For use on machines of their own."', 'terms = ""', ":14: model.terms: says nothing"),
        ('recipients = ["acme", "borealis"]', "recipients = []", ":13: model.recipients: empty"),
        ("[privacy]", "[privacy", ":9: not TOML"),
        ("min_gateways = 3", f"min_gateways = {'9' * 5000}", "not TOML: ValueError"),
        ("min_gateways = 3", f"min_gateways = {'[' * 20_000}", "not TOML: RecursionError"),
        ("title", "# " + "x" * 62_000 + "\ntitle", "larger than 61440 bytes; a charter is a short text"),
    ],
)  # fmt: skip
def test_a_charter_with_a_mistake_is_refused_in_one_line(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old in CHARTER
    file = tmp_path / "charter.toml"
    file.write_text(CHARTER.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_charter(file)
    assert str(caught.value).startswith(str(file))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def federation_toml(folder: Path, task: str = "", roots: str = '"acme"', charter: str = CHARTER) -> Path:
    text = 'name = "wear"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 2\n[[signal]]\nname = "s"\n'
    (folder / "wear.toml").write_text(f"{text}{task}")
    (folder / "charter.toml").write_text(charter)
    path = folder / "federation.toml"
    path.write_text(
        f'[federation]\nname = "north"\nroots = [{roots}]\ncharter = "charter.toml"\n'
        '[mqtt]\nurl = "mqtt://127.0.0.1"\n[[task]]\nfile = "wear.toml"\n'
    )
    return path


ROUND = "[round]\nmin_gateways = 3\n"


@pytest.mark.parametrize(
    ("task", "roots", "old", "new", "says"),
    [
        ("", '"acme"', "", "", ":5: min_gateways: task wear: the charter wants 3 gateways in a sum, the plan 1"),
        (ROUND, '"acme", "corvid"', "", "", ":4: members: the charter names no member corvid"),
        (ROUND, '"acme"', '["wear"]', '["tear"]', ":3: tasks: task wear: the charter names no task wear"),
        (ROUND, '"acme"', '"plain"', '"secure-aggregation"', ":10: privacy.mode: task wear: the charter requires"),
        (ROUND, '"acme"', '"plain"', '"plain"\nmax_epsilon = 4.0', ":11: privacy.max_epsilon: task wear: the charter"),
    ],
)
def test_an_aggregator_starts_no_task_outside_its_own_charter(
    task: str, roots: str, old: str, new: str, says: str, tmp_path: Path
) -> None:
    path = federation_toml(tmp_path, task, roots, CHARTER.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_federation(path)
    assert f"{tmp_path / 'charter.toml'}{says}" in str(caught.value)
    good = load_federation(federation_toml(tmp_path, ROUND, '"acme", "borealis"'))
    assert good.charter
    assert good.charter.digest == DIGEST
    (tmp_path / "charter.toml").unlink()
    with pytest.raises(UserError, match=r"federation\.toml:4: federation\.charter: no file"):
        load_federation(path)


# -- what a gateway takes part in ----------------------------------------------------------------------------------


def plan(charter: bytes = DIGEST, **more: Any) -> Plan:
    given: dict[str, Any] = {"min_gateways": 3, "secure_aggregation": False, "charter": charter} | more
    return Plan(1, bytes(32), 1, 0, bytes(32), "open", 1, 9, bits=4, **given)


def clauses(text: str = CHARTER, task: str = "wear", root: str = "acme") -> Clauses:
    named = parse_charter(text)
    return Clauses(named.digest, named.charter, task, root)


AGREED = Policy(charter=DIGEST.hex())
NOISY = CHARTER.replace('"plain"', '"plain"\nmax_epsilon = 4.0')
MASKED = CHARTER.replace('"plain"', '"secure-aggregation"')


@pytest.mark.parametrize(
    ("policy", "held", "seen", "code", "says"),
    [
        (Policy(), clauses(), plan(), "charter", "waits for acceptance; accepted is none"),
        (AGREED, clauses(), plan(bytes(32)), "charter", f"charter {'00' * 32} waits for acceptance; accepted is"),
        (AGREED, clauses(), plan(b""), "charter", "the plan is under no charter; accepted is"),
        (AGREED, None, plan(), "charter", "has not come yet"),
        (AGREED, clauses(NOISY), plan(), "charter", "has not come yet"),
        (AGREED, clauses(task="tear"), plan(), "task", "the charter names no task tear"),
        (AGREED, clauses(root="corvid"), plan(), "members", "the charter names no member corvid"),
        (AGREED, clauses(), plan(min_gateways=2), "min-gateways", "the charter wants 3 gateways in a sum, the plan 2"),
    ],
)
def test_a_plan_outside_the_charter_is_declined_with_its_reason(
    policy: Policy, held: Clauses | None, seen: Plan, code: str, says: str
) -> None:
    g = Participant(policy, 10, clauses=held)
    (answer,) = [
        one for event in (ModelStored(0, bytes(32)), WindowsReady(10), PlanSeen(seen)) for one in g.handle(event)
    ]
    assert isinstance(answer, Answer)
    assert (answer.verdict, answer.code) == ("declined", code)
    assert says in answer.reason


def test_privacy_that_the_charter_asks_for() -> None:
    for text, code in ((NOISY, "max-epsilon"), (MASKED, "secure-aggregation")):
        held = clauses(text)
        policy = Policy(charter=held.digest.hex())
        against = breach(policy, held, plan(held.digest))
        assert against
        assert against[0] == code
    assert breach(policy, held, plan(held.digest, secure_aggregation=True)) is None


def test_a_policy_is_stricter_than_the_charter_and_never_laxer() -> None:
    strict = Participant(msgspec.structs.replace(AGREED, min_gateways=4), 10, clauses=clauses())
    (answer,) = strict.handle(PlanSeen(plan()))
    assert isinstance(answer, Answer)
    assert (answer.code, answer.reason) == ("min-gateways", "policy wants 4 gateways in a sum, the plan 3")
    lax = Participant(msgspec.structs.replace(AGREED, min_gateways=1), 10, clauses=clauses())
    (answer,) = lax.handle(PlanSeen(plan(min_gateways=2)))
    assert isinstance(answer, Answer)
    assert answer.verdict == "declined"


def test_a_federation_without_a_charter_is_as_before() -> None:
    assert breach(Policy(), None, plan(b"")) is None
    assert breach(Policy(), clauses(), plan(b"")) is None


def test_who_accepts_late_joins_and_another_charter_ends_a_training() -> None:
    g = Participant(Policy(), 10, clauses=clauses())
    for event in (ModelStored(0, bytes(32)), WindowsReady(10), PlanSeen(plan())):
        g.handle(event)
    (absent,) = g.handle(PolicyChanged(AGREED, None))
    assert isinstance(absent, Answer)
    assert (absent.verdict, absent.reason) == ("declined", f"charter {DIGEST.hex()} has not come yet")
    joined, started = g.handle(PolicyChanged(AGREED, clauses()))
    assert joined == Answer(1, "joined", "ok", "")
    assert isinstance(started, StartTraining)
    assert g.handle(PlanSeen(plan())) == []
    stop, declined = g.handle(PlanSeen(plan(bytes(32))))
    assert stop == StopTraining()
    assert isinstance(declined, Answer)
    assert (declined.verdict, declined.code) == ("declined", "charter")


def test_a_round_is_declined_for_what_holds_now_whichever_comes_first() -> None:
    """A plan and its charter come in any order: what the charter says of the round is heard all the same."""
    for root, code in (("corvid", "members"), ("acme", "min-gateways")):
        g, seen = Participant(AGREED, 10), plan(min_gateways=2 if root == "acme" else 3)
        (early,) = g.handle(PlanSeen(seen))
        assert isinstance(early, Answer)
        assert early.reason == f"charter {DIGEST.hex()} has not come yet"
        (answer,) = g.handle(PolicyChanged(AGREED, clauses(root=root)))
        assert isinstance(answer, Answer)
        assert (answer.round, answer.verdict, answer.code) == (1, "declined", code)
        assert g.handle(PolicyChanged(AGREED, clauses(root=root))) == []
        assert g.handle(PlanSeen(seen)) == []


def test_a_round_that_is_under_an_accepted_charter_again_is_joined() -> None:
    """As after an aggregator's restart with the charter that this site waits for, in the middle of a round."""
    g = Participant(AGREED, 10, clauses=clauses())
    for other in (bytes(32), b""):
        (declined,) = g.handle(PlanSeen(plan(other)))
        assert isinstance(declined, Answer)
        assert declined.verdict == "declined"
    assert g.handle(PlanSeen(plan())) == [Answer(1, "joined", "ok", "")]
    assert g.handle(PlanSeen(plan())) == []


# -- what a gateway keeps ------------------------------------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    file = tmp_path / "gateway.toml"
    file.write_text('[gateway]\npath = "acme/b/c/d/e"\n[mqtt]\nurl = "mqtt://127.0.0.1"\n')
    sent: list[tuple[str, bytes]] = []
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:

        def publish(topic: str, payload: bytes, *, retain: bool = False) -> bool:
            assert retain == topic.endswith("/charter")
            sent.append((topic, payload))
            return True

        made = Shop(load_config(file), tmp_path, state, samples, Signer.generate(), publish, sent, print)  # type: ignore[arg-type]
        made.federation, made.federation_key = "north", FEDERATION.public_key
        yield made


def agree(shop: Shop, digest: bytes | None) -> None:
    policy = Policy(charter=digest.hex() if digest else None)
    shop.config = msgspec.structs.replace(shop.config, policy=policy)


def words(shop: Shop) -> list[bytes]:
    """The digests that were published, each a signed word of this gateway."""
    topic = topics.Accepted(shop.config.path).topic
    sent: Any = shop.subscribe
    assert all(where == topic for where, _ in sent)
    return [m.open_envelope(data, topic, shop.signer.public_key, Acceptance).digest for _, data in sent]


def said(text: str, time_ms: int, signer: Signer = FEDERATION) -> Inbound:
    return Inbound(TOPIC, signer.seal(CharterText(1, text, time_ms), TOPIC), retain=True, qos=1, mid=1)


async def heard(keeper: CharterKeeper, inbound: Inbound) -> None:
    keeper.hear(inbound)
    if keeper._news.is_set():
        keeper._news.clear()
        await keeper._keep(*keeper._heard)


def held(shop: Shop) -> bytes | None:
    return shop.charter and shop.charter.digest


def kinds(shop: Shop) -> list[str]:
    return [json.loads(line)["kind"] for line in shop.state.ledger()]


async def test_a_gateway_keeps_the_charter_and_says_its_word_once_it_has_one(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: list[int] = []
    keeper = CharterKeeper(shop, lambda: changes.append(1))
    assert keeper.status() is None
    await heard(keeper, said(CHARTER, 5))
    assert (shop.folder / "charter.toml").read_bytes() == CHARTER.encode()
    assert (words(shop), kinds(shop), len(changes)) == ([], ["charter"], 1)
    assert keeper.status() == {
        "digest": DIGEST.hex(), "title": "Press lines of Acme and Borealis", "accepted": False,
        "file": str(shop.folder / "charter.toml"), "policy": "",
    }  # fmt: skip
    agree(shop, bytes(32))  # a charter that nobody has shown
    await keeper.say()
    _print_charter(keeper.status())
    text = f"waits for acceptance: [policy] names {'00' * 32}, which is another file's: read {shop.folder}/charter.toml"
    assert text in capsys.readouterr().out
    assert words(shop) == []
    agree(shop, DIGEST)
    await asyncio.gather(keeper.say(), keeper.say())
    assert set(words(shop)) == {DIGEST}
    assert kinds(shop) == ["charter", "acceptance"]
    again = CharterKeeper(shop, lambda: None)
    assert held(shop) == DIGEST
    again.repeat()
    sent: Any = shop.subscribe
    assert len({data for _, data in sent}) == 1
    # Another charter ends what was accepted, in as many signed words; an older one that comes late changes nothing.
    await heard(again, said(NOISY, 6))
    await heard(again, said(CHARTER, 5))
    assert words(shop)[-1] == b""
    assert kinds(shop) == ["charter", "acceptance", "charter", "acceptance"]
    await heard(again, said("", 7))
    assert held(shop) is None
    assert again.status() is None


async def test_charters_that_nobody_of_the_federation_said(shop: Shop) -> None:
    keeper = CharterKeeper(shop, lambda: None)
    good = said(CHARTER, 5)
    for i in range(0, len(good.payload), 7):
        flipped = good.payload[:i] + bytes([good.payload[i] ^ 1]) + good.payload[i + 1 :]
        for bad in (good.payload[:i], flipped):
            if bad:
                with pytest.raises(PeerError):
                    keeper.hear(Inbound(TOPIC, bad, retain=True, qos=1, mid=1))
    for bad, reason in (
        (said(CHARTER, 5, Signer.generate()).payload, "signature"),
        (bytes(65_537), "size"),
        (FEDERATION.seal(CharterText(1, CHARTER.replace("[privacy]", "[x]"), 5), TOPIC), "charter"),
        (FEDERATION.seal(CharterText(1, "a=" + "[" * 50_000, 5), TOPIC), "charter"),
        (FEDERATION.seal(CharterText(1, "é" * 40_000, 5), TOPIC), "size"),
        (FEDERATION.seal(CharterText(1, CHARTER, 5), TOPIC + "x"), "signature"),
    ):
        with pytest.raises(PeerError) as caught:
            keeper.hear(Inbound(TOPIC, bad, retain=True, qos=1, mid=1))
        assert caught.value.reason == reason
    keeper.hear(Inbound(TOPIC, b"", retain=True, qos=1, mid=1))
    assert (kinds(shop), shop.charter) == ([], None)


@asynccontextmanager
async def running(keeper: CharterKeeper) -> AsyncIterator[None]:
    """The keeper at work, until it is stopped wherever it stands."""
    job = asyncio.create_task(keeper.run())
    try:
        yield
        assert not job.done(), job.exception()
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)


async def test_a_charter_that_the_disk_does_not_take_is_taken_later(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It comes once, as by file; what is heard meanwhile takes its place, if it is newer."""
    monkeypatch.setattr("edge.charter._RETRY_S", 0.01)
    caplog.set_level("ERROR")  # whoever ran a command in this process may have set it otherwise
    keeper = CharterKeeper(shop, lambda: None)
    shop.state._db.execute("PRAGMA query_only = ON")  # SQLite refuses to write, as on a disk that is read-only
    async with running(keeper):
        for text, time_ms in ((NOISY, 5), (CHARTER, 7), (MASKED, 6)):
            keeper.hear(said(text, time_ms))
            before = len(caplog.records)
            await until(lambda before=before: len(caplog.records) > before + 1)  # type: ignore[misc]
        assert held(shop) is None
        shop.state._db.execute("PRAGMA query_only = OFF")
        await until(lambda: held(shop))
        (shop.folder / "charter.toml").unlink()
        (shop.folder / "charter.toml").mkdir()  # the file of the charter, too, may be what can't be written
        before = len(caplog.records)
        keeper.hear(said(MASKED, 8))
        await until(lambda: len(caplog.records) > before)
        assert (held(shop), kinds(shop)) == (DIGEST, ["charter"])
        (shop.folder / "charter.toml").rmdir()
        await until(lambda: held(shop) == clauses(MASKED).digest)
    assert (shop.folder / "charter.toml").read_text() == MASKED
    assert kinds(shop) == ["charter", "charter"]


async def test_a_charter_that_comes_often_and_a_policy_that_changes_meanwhile(shop: Shop) -> None:
    changes: list[bytes | None] = []
    keeper = CharterKeeper(shop, lambda: changes.append(held(shop)))
    agree(shop, DIGEST)
    async with running(keeper):
        for time_ms in (5, 5, 6):
            keeper.hear(said(CHARTER, time_ms))
        await asyncio.sleep(0)  # it has begun
        agree(shop, clauses(NOISY).digest)
        await asyncio.gather(keeper.say(), keeper.say())
        agree(shop, DIGEST)
        await keeper.say()
        await until(lambda: changes)
    assert changes == [DIGEST]
    assert kinds(shop).count("charter") == 1
    assert m.peek(shop.state.get("charter/said") or b"", Acceptance).digest == words(shop)[-1] == DIGEST


async def test_the_ledger_has_the_charter_of_the_plan_that_was_answered(shop: Shop, tmp_path: Path) -> None:
    """Though the next plan comes before the answer to the one before is written."""
    shop.config = load_config(gateway_files(tmp_path / "site", "acme", "mqtt://127.0.0.1", ""))
    runner = Runner("wear", shop.config.tasks["wear"], shop)
    others = [bytes([i]) * 32 for i in range(3)]
    for number, other in enumerate(others):
        runner.on_plan(msgspec.structs.replace(plan(other), round=number + 1))
    await until(lambda: not runner._jobs)
    entries = [json.loads(line) for line in shop.state.ledger()]
    assert [entry["body"]["charter"] for entry in entries if entry["kind"] == "declined"] == [d.hex() for d in others]


async def test_an_agent_that_is_stopped_waits_for_what_its_state_has_begun(tmp_path: Path) -> None:
    """As a charter's commit on a slow disk: the last entry of the ledger comes after it, and the end is clean."""
    file, folder, go_on = tmp_path / "gateway.toml", tmp_path / "state", threading.Event()
    file.write_text('[gateway]\npath = "acme/b/c/d/e"\n[mqtt]\nurl = "mqtt://127.0.0.1:1"\n')
    agent = Agent(load_config(file), folder, lambda: load_config(file))
    ran = asyncio.create_task(agent.run())
    await until(lambda: (read_status(folder) or {}).get("running"))
    slow = asyncio.create_task(agent.state.commit(lambda: go_on.wait(60)))
    await asyncio.sleep(0)
    agent.stop()
    await until(lambda: not (read_status(folder) or {"running": True})["running"])
    go_on.set()
    await ran
    assert await slow
    with closing(State(folder)) as state:
        assert [json.loads(line)["kind"] for line in state.ledger()][-1] == "checkpoint"


@pytest.mark.parametrize("turns", range(6))
async def test_a_gateway_that_is_stopped_while_a_charter_comes(shop: Shop, turns: int) -> None:
    """Wherever that was: after the next start the file, the state and the word are of one charter."""
    agree(shop, DIGEST)
    async with running(keeper := CharterKeeper(shop, lambda: None)):
        keeper.hear(said(CHARTER, 5))
        for _ in range(turns):
            await asyncio.sleep(0.001)
    await shop.state.commit(lambda: None)  # what was begun in the state's thread is done
    shop.charter = None
    async with running(again := CharterKeeper(shop, lambda: None)):
        if held(shop):
            assert (shop.folder / "charter.toml").read_text() == CHARTER
            again.hear(said(NOISY, 4))  # an older one, as from an old file, takes nothing back
            await asyncio.sleep(0.01)
        again.hear(said(CHARTER, 5))
        await until(lambda: words(shop)[-1:] == [DIGEST])
        await asyncio.sleep(0.01)
    assert held(shop) == DIGEST
    assert (shop.folder / "charter.toml").read_text() == CHARTER
    assert kinds(shop) == ["charter", "acceptance"]


# -- the aggregator ------------------------------------------------------------------------------------------------


def accept(g: Gateway, digest: bytes, time_ms: int) -> None:
    topic = topics.Accepted(g.path).topic
    g.link.publish(topic, g.signer.seal(Acceptance(1, digest, time_ms), topic), retain=True)


def forge(g: Gateway) -> None:
    """Say that a site accepts, as those may who are not that site."""
    topic, stranger = topics.Accepted(g.path).topic, Signer.generate()
    good = g.signer.seal(Acceptance(1, DIGEST, 10), topic)
    for payload in (
        stranger.seal(Acceptance(1, DIGEST, 10), topic),
        g.signer.seal(Acceptance(1, DIGEST, 10), topic + "x"),
        good[:-1],
        bytes(100_000),
    ):
        g.link.publish(topic, payload)
    for path in ("acme/lyon/press/line4/cell9", "corvid/lyon/press/line4/cell2"):
        elsewhere = topics.Accepted(topics.GatewayPath.parse(path)).topic
        g.link.publish(elsewhere, stranger.seal(Acceptance(1, DIGEST, 10), elsewhere))


async def test_an_aggregator_takes_updates_of_those_alone_who_accepted(tmp_path: Path) -> None:
    with BrokerProcess("amqtt") as broker:
        federation = Federation(tmp_path, broker.url, rounds=2)
        (tmp_path / "charter.toml").write_text(CHARTER)
        toml = federation.config.read_text()
        federation.config.write_text(toml.replace("[mqtt]", 'charter = "charter.toml"\n[mqtt]'))
        topic = topics.CharterInForce("press").topic
        async with gateways(broker.url) as there:
            for g in there:
                g.link.subscribe(topic)
            async with federation.service() as service:
                first = await open_plan(there)
                assert first.charter == DIGEST
                assert m.open_envelope(there[0].heard[topic][-1], topic, there[0].key, CharterText).text == CHARTER
                there[0].send(first, delta(0))
                await until(lambda: there[0].outcomes() == ["refused-charter"])
                forge(there[0])
                reasons = {"signature": 2, "envelope": 2, "unknown-gateway": 1, "root": 1}
                await until(lambda: reasons.items() <= service.status()["refused"].items())
                assert service.status()["charter"]["accepted"] == []
                for i, g in enumerate(there):
                    accept(g, DIGEST, 10)
                    g.send(first, delta(i))
                await until(lambda: all(g.outcomes()[-1:] == ["counted"] for g in there))
                assert service.status()["charter"]["accepted"] == sorted(str(g.path) for g in there)
                accept(there[1], b"", 20)  # takes it back, and an older word that is heard again changes nothing
                accept(there[1], DIGEST, 10)
                await until(lambda: service.status()["charter"]["not_accepted"] == [str(there[1].path)])
            for g in there:
                g.heard.clear()
            async with federation.service() as service:
                plan = await open_plan(there, 2)
                assert service.status()["charter"]["not_accepted"] == [str(there[1].path)]
                there[1].send(plan, delta(1))
                there[0].send(plan, delta(0))
                await until(lambda: there[1].outcomes() == ["refused-charter"] and there[0].outcomes() == ["counted"])
            # Without the charter the federation is as it was, and says so in signed words.
            federation.config.write_text(toml)
            for g in there:
                g.heard.clear()
            async with federation.service():
                plan = await open_plan(there, 2)
                assert plan.charter == b""
                assert m.open_envelope(there[0].heard[topic][-1], topic, there[0].key, CharterText).text == ""
        with closing(Journal(federation.state)) as journal:
            assert [body["digest"] for body in bodies(journal.ledger_lines(), "charter")] == [DIGEST.hex(), ""]
            digests = [body["digest"] for body in bodies(journal.ledger_lines(), "acceptance")]
            assert digests == [DIGEST.hex()] * 3 + [""]
            assert [body["charter"] for body in bodies(journal.ledger_lines(), "opened")] == [DIGEST.hex()] * 2
            assert {body["reason"] for body in bodies(journal.ledger_lines(), "refused")} == {"charter"}


def gateway_files(folder: Path, root: str, url: str, policy: str) -> Path:
    folder.mkdir()
    (folder / "plc.csv").write_text("tag,address\na,a\n")
    (folder / "plc.data.csv").write_text("a\n1\n")
    file = folder / "gateway.toml"
    file.write_text(
        f'[gateway]\npath = "{root}/lyon/press/line4/cell2"\n[mqtt]\nurl = "{url}"\n'
        '[[source]]\nname = "plc"\ndriver = "replay"\nurl = "plc.data.csv"\ntags = "plc.csv"\n'
        f'[task.wear]\nsignals = {{ T = "plc/a" }}\n[policy]\ncharter = "{DIGEST.hex()}"\n{policy}'
    )
    return file


async def test_enterprises_meet_in_one_federation_each_with_its_own_policy(tmp_path: Path) -> None:
    policies = {"acme": "", "borealis": "min_gateways = 5\n", "corvid": ""}
    paths = {root: f"{root}/lyon/press/line4/cell2" for root in policies}
    with BrokerProcess("amqtt") as broker:
        federation = Federation(tmp_path, broker.url, min_gateways=3)
        (tmp_path / "charter.toml").write_text(CHARTER)
        toml = federation.config.read_text().replace('["acme"]', '["acme", "borealis"]')
        federation.config.write_text(toml.replace("[mqtt]", 'charter = "charter.toml"\n[mqtt]'))

        def status() -> dict[str, Any]:
            return federation.status() if federation.has_status() else {}

        def answers() -> dict[str, Any]:
            known = status().get("tasks", {}).get("wear", {}).get("gateways", {})
            return {path: (one["verdict"], one["code"]) for path, one in known.items()}

        children = []
        async with gateways(broker.url, 1), federation.service():
            try:
                for root, policy in policies.items():
                    file, state = gateway_files(tmp_path / root, root, broker.url, policy), tmp_path / root / "state"
                    command = [sys.executable, "-m", "edge.cli", "edge", "run", "-c", str(file), "--state", str(state)]
                    children.append(await asyncio.create_subprocess_exec(*command))
                wanted = {paths["acme"]: ("joined", "ok"), paths["borealis"]: ("declined", "min-gateways")}
                await until(lambda: wanted.items() <= answers().items())
                await until(lambda: status()["refused"].get("root", 0) > 0)
                # The third enterprise's gateway itself has read that it is no member.
                await until(lambda: "no member corvid" in str(read_status(tmp_path / "corvid" / "state")))
                assert paths["corvid"] not in answers()
                assert status()["charter"]["accepted"] == [paths["acme"], paths["borealis"]]
            finally:
                for child in children:
                    child.terminate()
                    await child.wait()


# -- both, as processes --------------------------------------------------------------------------------------------


def put_in_force(folder: Path) -> tuple[str, str]:
    """Put a charter beside the aggregator of a stage; return what names it, and its text."""
    text = CHARTER.replace('"wear"', f'"{TASK}"').replace('"acme", "borealis"', '"demo"').replace("= 3", "= 1")
    (folder / "aggregator" / "charter.toml").write_text(text)
    federation = folder / "aggregator" / "federation.toml"
    federation.write_text(federation.read_text().replace("join =", 'charter = "charter.toml"\njoin ='))
    return hashlib.sha256(text.encode()).hexdigest(), text


def test_no_update_leaves_a_site_before_it_has_accepted_the_charter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staged(tmp_path, "amqtt") as p:
        toml, (digest, _) = tmp_path / "plant1" / "gateway.toml", put_in_force(tmp_path)
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.aggregator().get("gateways", {}).get(str(PATH), {}).get("code") == "charter")
        p.until(lambda: (p.status().get("charter") or {}).get("digest") == digest)
        assert main(["edge", "status", "--state", str(p.stage.gateway_state(0))]) == 0
        shown = capsys.readouterr().out
        assert f"waits for acceptance: read {p.stage.gateway_state(0) / 'charter.toml'}, then" in shown
        assert f'then [policy] charter = "{digest}"' in shown
        update, word = topics.Uplink(PATH, TASK, "update").topic, topics.Accepted(PATH).topic
        p.until(lambda: p.task().get("trainable", 0) >= 20)  # it could have trained for long
        assert not p.heard.keys() & {update, word}
        # The legal team's line; the gateway goes on scoring while it is taken up.
        toml.write_text(toml.read_text().replace("[policy]", f'[policy]\ncharter = "{digest}"'))
        os.kill(p.gateway.pid, signal.SIGHUP)
        p.until(lambda: p.aggregator().get("state") == "done")
        p.until(lambda: p.task().get("model") == 1 and p.status()["outbox"] == 0)
        key = bytes.fromhex(p.status()["public_key"])
        assert m.open_envelope(p.last(word), word, key, Acceptance).digest.hex() == digest
        main(["broker", "status", "--state", str(p.stage.aggregator_state)])
        assert f"'Press lines of Acme and Borealis' {digest}, accepted by 1" in capsys.readouterr().out
    out = tmp_path / "what-left"
    assert main(["audit", "report", str(p.stage.gateway_state(0)), "--out", str(out)]) == 0
    with (out / "left-this-site.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    named = f"Press lines of Acme and Borealis {digest}"
    assert {row["charter"] for row in rows if row["what"] in {"update", "acceptance"}} == {named}
    sent = {(hashlib.sha256(data).hexdigest(), str(len(data))) for topic in (update, word) for data in p.heard[topic]}
    assert sent == {(row["digest"], row["message_bytes"]) for row in rows if row["what"] in {"update", "acceptance"}}
    assert named in (out / "report.html").read_text()
    with closing(State(p.stage.gateway_state(0))) as state:
        lines = [json.loads(line) for line in state.ledger()]
    order = [
        line["kind"] for line in lines if line["kind"] in {"charter", "declined", "acceptance", "joined", "update"}
    ]
    assert order[-3:] == ["acceptance", "joined", "update"]
    assert sorted(order[:2]) == ["charter", "declined"]
    declined = next(line["body"] for line in lines if line["kind"] == "declined")
    assert (declined["code"], declined["charter"], declined["min_gateways"]) == ("charter", digest, 1)
    with closing(Journal(p.stage.aggregator_state)) as journal:
        assert [body["digest"] for body in bodies(journal.ledger_lines(), "acceptance")] == [digest]
        assert [body["charter"] for body in bodies(journal.ledger_lines(), "opened")] == [digest]


def test_a_site_without_a_network_accepts_the_charter_by_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with staged(tmp_path, "amqtt") as p:
        state, (digest, text) = p.stage.gateway_state(0), put_in_force(tmp_path)
        p.stage.aggregator.start()
        carrier = Carrier(p)
        carrier.start()

        def exported() -> tuple[list[str], str]:
            """The topics in the file, and what the command said of it."""
            capsys.readouterr()
            return [topic for topic, _ in carrier.export()], capsys.readouterr().out

        carrier.down()
        p.until(lambda: (p.status().get("charter") or {}).get("digest") == digest)
        p.until(lambda: "waits for acceptance" in p.task().get("answer", "") and p.task()["model"] == 0)
        assert (state / "charter.toml").read_text() == text
        found, shown = exported()
        assert (found, "0 updates, 0 votes\n" in shown) == ([], True)
        # The line in the file may as well be written while the gateway is stopped.
        p.gateway.kill()
        file = carrier.toml
        file.write_text(file.read_text().replace("[policy]", f'[policy]\ncharter = "{digest}"'))
        p.gateway.start()
        carrier.down()
        p.until(lambda: p.status().get("outbox") == 1)
        assert not p.status()["mqtt"]["connected"]
        word, update = topics.Accepted(PATH).topic, topics.Uplink(PATH, TASK, "update").topic
        found, shown = exported()
        assert (found, "1 update, 0 votes, the word on the charter\n" in shown) == ([word, update], True)
        for known, said in (("", "counted"), (", which changes nothing", "counted before")):  # and nothing twice
            carrier.import_()
            first, second, third, _ = capsys.readouterr().out.splitlines()
            assert first == f"{PATH}: accepts charter {digest}{known}"
            assert second.startswith(f"{PATH}, {TASK}: an update of round 1, ")
            assert third == f"{PATH}, {TASK}: the update of round 1: {said}"
            p.until(lambda: p.aggregator().get("counted") == [str(PATH)])
        carrier.down()
        p.until(lambda: p.status()["outbox"] == 0)
        assert not {topic for topic in p.heard if topic.startswith(f"{PATH}/")}
    with closing(State(state)) as kept:
        kinds = [json.loads(line)["kind"] for line in kept.ledger()]
    assert kinds.index("acceptance") < kinds.index("update") < kinds.index("receipt")
    with closing(Journal(p.stage.aggregator_state)) as journal:
        assert [body["path"] for body in bodies(journal.ledger_lines(), "acceptance")] == [str(PATH)]
        assert list(journal.counted(TASK, 1)) == [str(PATH)]
