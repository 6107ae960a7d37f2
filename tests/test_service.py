"""The aggregator against both real brokers, with gateways built from the real messages and a real link."""

import asyncio
import json
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cbor2
import cwt
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import cli, intake, ledger, topics
from broker.aggregate import load_state
from broker.config import load_federation
from broker.enrolment import admit
from broker.genesis import put_first_model
from broker.journal import Journal
from broker.link import Inbound, Link, MqttSettings
from broker.messages import (
    MAX_PAYLOAD,
    Answer,
    Birth,
    Death,
    FederationBirth,
    ModelManifest,
    Plan,
    Receipt,
    Signer,
    Update,
    Vote,
    open_envelope,
    peek,
)
from broker.round import STALEST
from broker.service import Service
from edge.handback import Fetch, Model
from models import codec, ringcode
from models.delta import Layout, Vector, weights_digest
from models.errors import PeerError, UserError
from models.spec import load_task
from tests.brokers import BROKERS, BrokerProcess, need_mosquitto

WAIT_S = 40
LAYOUT = Layout(("body.weight", "body.bias", "head.weight"), ((8, 4), (8,), (3,)), ("steps",))
SHARED = 40
GRAPH = b"a graph" * 100

TASK = """
name = "wear"
kind = "regression"
net = "mlp"
personal = ["head"]
[window]
length = 4
[[signal]]
name = "T"
[target]
name = "rul"
[round]
min_gateways = {min_gateways}
deadline = "1h"
every = "0s"
rounds = {rounds}
downlink = "{downlink}"
vote = "{vote}"
"""


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> Iterator[BrokerProcess]:
    if request.param == "mosquitto":
        need_mosquitto()
    with BrokerProcess(request.param) as process:
        yield process


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.02)


class Plant:
    """A federation's files and memory, with version 0 already made, as after the first start."""

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        min_gateways: int = 3,
        rounds: int = 1,
        join: str = "first-seen",
        downlink: str = "float32",
        vote: str = "0s",
        more: str = "",
    ) -> None:
        self.config = folder / "federation.toml"
        self.state = folder / "state"
        self.config.write_text(
            f'[federation]\nname = "press"\nroots = ["acme"]\njoin = "{join}"\n'
            f'[mqtt]\nurl = "{url}"\n[[task]]\nfile = "wear.toml"\n'
        )
        text = TASK.format(min_gateways=min_gateways, rounds=rounds, downlink=downlink, vote=vote) + more
        (folder / "wear.toml").write_text(text)
        task, text = load_task(folder / "wear.toml")
        self.first = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
        journal = Journal(self.state)
        with journal.transaction():
            put_first_model(journal, task, text, graph=GRAPH, vector=self.first, layout=LAYOUT, now_ms=1)
            journal.put_looked(1)
        journal.close()

    @asynccontextmanager
    async def service(self) -> AsyncIterator[Service]:
        service = Service(load_federation(self.config), self.state)
        running = asyncio.create_task(service.run())
        try:
            yield service
            assert not running.done(), running.exception()
        finally:
            service.stop()
            await running

    async def process(self) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "broker.cli", "run", "-c", str(self.config), "--state", str(self.state)]
        with (self.state / "log").open("ab") as out:
            return await asyncio.create_subprocess_exec(*command, stderr=out)

    def has_status(self) -> bool:
        return (self.state / "status.json").exists()

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        return status


class Gateway:
    """A gateway reduced to its protocol: births, answers, updates, and everything that it hears."""

    def __init__(self, url: str, cell: str, signer: Signer | None = None) -> None:
        self.path = topics.GatewayPath.parse(f"acme/lyon/press/line4/{cell}")
        self.signer = signer or Signer.generate()
        self.session = time.time_ns() // 1_000_000
        self.heard: dict[str, list[bytes]] = {}
        self.ups = 0
        self.held: Model | None = None
        self.ways: list[list[str]] = []
        self.status = topics.Status(self.path).topic
        self.receipt_topic = topics.ReceiptFor("press", "wear", self.path).topic
        self.link = Link(
            MqttSettings(url=url),
            client_id=cell,
            will=(self.status, self.signer.seal(Death(1, self.session), self.status)),
            on_message=self._on_message,
            on_up=self._on_up,
            on_down=lambda _: None,
        )
        self.link.subscribe(*topics.downlink_filters("press", "wear", self.path), "_fl/press/wear/model/#")
        self.link.subscribe("_fl/press/status")

    def _on_message(self, inbound: Inbound) -> None:
        self.heard.setdefault(inbound.topic, []).append(inbound.payload)

    def _on_up(self) -> None:
        self.ups += 1
        birth = Birth(1, self.session, self.session, self.signer.public_key, "test", ("wear",))
        self.link.publish(self.status, self.signer.seal(birth, self.status), retain=True)

    @property
    def key(self) -> bytes:
        return peek(self.heard["_fl/press/status"][-1], FederationBirth).public_key

    def plan(self) -> Plan | None:
        topic = topics.RoundPlan("press", "wear").topic
        if topic not in self.heard or "_fl/press/status" not in self.heard:
            return None
        return open_envelope(self.heard[topic][-1], topic, self.key, Plan)

    def manifest(self) -> ModelManifest | None:
        topic = topics.Manifest("press", "wear").topic
        if topic not in self.heard or "_fl/press/status" not in self.heard:
            return None
        return open_envelope(self.heard[topic][-1], topic, self.key, ModelManifest)

    def receipts(self) -> list[Receipt]:
        envelopes = self.heard.get(self.receipt_topic, [])
        return [open_envelope(e, self.receipt_topic, self.key, Receipt) for e in envelopes]

    def outcomes(self) -> list[str]:
        return [r.outcome for r in self.receipts()]

    def model(self) -> Vector | None:
        """The newest weights, fetched as a gateway does from what was heard; `ways` says by which pieces."""
        manifest = self.manifest()
        if not manifest:
            return None
        if self.held and self.held.manifest == manifest:
            return self.held.vector
        fetch, way = Fetch("press", "wear", manifest, self.held), list[str]()
        while fetch.topics:
            topic = fetch.topics[0]
            try:
                if not fetch.take(topic, self.heard.get(topic, [b""])[-1]):
                    return None
            except PeerError:
                return None  # it is not heard yet
            way.append("/".join(topic.split("/")[-2:]))
        self.held = fetch.model()
        self.ways.append(way)
        return self.held.vector

    def has(self, version: int) -> bool:
        return self.model() is not None and self.held is not None and self.held.manifest.version == version

    def weights(self) -> Vector:
        vector = self.model()
        assert vector is not None
        return vector

    def answer(self, number: int, verdict: str) -> None:
        topic = topics.Uplink(self.path, "wear", "answer").topic
        said = {"joined": ("", ""), "declined": ("too-few", "not enough windows"), "asks": ("drift", "T 0.4")}
        code, reason = said[verdict]
        self.link.publish(topic, self.signer.seal(Answer(1, number, verdict, code, reason, 1), topic))

    def send(
        self,
        plan: Plan,
        delta: Vector,
        samples: int = 100,
        *,
        base: int | None = None,
        loss: float | None = None,
        quality: int = 1_000_000,
    ) -> bytes:
        topic = topics.Uplink(self.path, "wear", "update").topic
        payload = codec.encode(delta, 32).data
        base = plan.base if base is None else base
        update = Update(1, plan.round, base, samples, 0.5, payload, base_loss=loss, quality=quality)
        envelope = self.signer.seal(update, topic)
        self.link.publish(topic, envelope)
        return envelope

    def vote(self, version: int, verdict: Literal["for", "against"], *, digest: bytes = b"") -> None:
        topic = topics.Uplink(self.path, "wear", "vote").topic
        digest = digest or weights_digest(self.weights())
        said = Vote(1, version, digest, version - 1, 9.0 if verdict == "against" else 1.0, 2.0, 40, verdict, 1)
        self.link.publish(topic, self.signer.seal(said, topic))


@asynccontextmanager
async def gateways(url: str, count: int = 3) -> AsyncIterator[list[Gateway]]:
    there = [Gateway(url, f"cell{i}") for i in range(count)]
    for g in there:
        g.link.start()
    try:
        yield there
    finally:
        await asyncio.gather(*(g.link.stop() for g in there))


async def open_plan(there: list[Gateway], number: int = 1) -> Plan:
    await until(lambda: all((p := g.plan()) and p.state == "open" and p.round == number for g in there))
    plan = there[0].plan()
    assert plan
    return plan


def delta(i: int) -> Vector:
    return np.full(SHARED, i + 1, np.float32)


async def test_an_update_counts_by_how_good_its_data_was(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url, min_gateways=2, more='weigh = "quality"\n')
    async with gateways(broker.url, 2) as there, plant.service():
        plan = await open_plan(there)
        await until(lambda: all(g.model() is not None for g in there))
        for g, quality in zip(there, (1_000_000, 500_000), strict=True):
            g.answer(1, "joined")
            g.send(plan, delta(0 if quality == 1_000_000 else 6), quality=quality)
        await until(lambda: all((m := g.manifest()) and m.version == 1 and g.model() is not None for g in there))
        manifest = there[0].manifest()
        assert manifest
        assert manifest.samples == 150
        expected = plant.first.copy()
        expected[:SHARED] += np.float32((1 * 100 + 7 * 50) / 150)
        assert np.allclose(there[0].weights(), expected, rtol=1e-6)


async def test_a_full_round(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url, rounds=2)
    async with gateways(broker.url) as there, plant.service():
        plan = await open_plan(there)
        assert (plan.round, plan.base, plan.min_gateways) == (1, 0, 3)
        await until(lambda: all(g.model() is not None for g in there))
        assert np.array_equal(there[0].weights(), plant.first)
        assert there[0].held
        assert there[0].held.graph == GRAPH
        for i, g in enumerate(there):
            g.answer(1, "joined")
            g.send(plan, delta(i), samples=100 * (i + 1))
            g.send(plan, delta(i), samples=100 * (i + 1))
        await until(lambda: all(g.outcomes().count("counted") == 1 and "duplicate" in g.outcomes() for g in there))
        plan = await open_plan(there, 2)
        assert plan.base == 1
        await until(lambda: all((m := g.manifest()) and m.version == 1 and g.model() is not None for g in there))
        expected = plant.first.copy()
        expected[:SHARED] += np.float32((1 * 100 + 2 * 200 + 3 * 300) / 600)
        assert np.allclose(there[0].weights(), expected, rtol=1e-6)
        manifest = there[0].manifest()
        assert manifest
        assert (manifest.gateways, manifest.samples) == (3, 600)
        there[0].send(Plan(1, bytes(32), 1, 0, bytes(32), "open", 0, 0, 0, 32, secure_aggregation=False), delta(5))
        there[1].send(plan, delta(1), base=0)
        await until(lambda: there[0].outcomes().count("duplicate") == 2 and "stale" in there[1].outcomes())
        for i, g in enumerate(there):
            g.send(plan, delta(i))
        await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
        # Version 0's weights are older than the previous version's now, so their chunk is cleared.
        await until(lambda: there[0].heard[topics.Chunk("press", "wear", 0, "weights0").topic][-1] == b"")
    journal = Journal(plant.state)
    ledger.verify(journal.ledger_lines())
    kinds = [json.loads(line)["kind"] for line in journal.ledger_lines()]
    assert kinds.count("update") == 6
    assert kinds.count("model") == 3
    assert kinds.count("pinned") == 3
    journal.close()


async def test_the_share_follows_the_losses_and_a_restart_changes_nothing(
    broker: BrokerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.rate._FEWEST", 0)
    plant = Plant(tmp_path, broker.url, rounds=9)
    kept = [25_000, 25_000, 20_000, 25_000]  # back to the first, no wider
    async with gateways(broker.url) as there:
        for number, loss in enumerate((1.0, 0.5, 2.0), 1):
            for g in there:
                g.heard.clear()  # what is heard next is this service's
            async with plant.service():
                plan = await open_plan(there, number)
                assert plan.keep_ppm == kept[number - 1]
                for i, g in enumerate(there):
                    g.send(plan, delta(i), loss=loss)
                plan = await open_plan(there, number + 1)
                assert plan.keep_ppm == kept[number]


async def test_sums_in_a_ring_over_a_kill_9(broker: BrokerProcess, tmp_path: Path) -> None:
    """Each round's plan carries its ring, a restart makes the same again, and other rounds' updates are not taken."""
    plant = Plant(tmp_path, broker.url, rounds=2, more='codec = "ring"\n')
    learnt = np.random.default_rng(0).normal(0, 3e-3, SHARED).astype(np.float32)
    async with gateways(broker.url) as there:

        def send(g: Gateway, plan: Plan, payload: bytes) -> None:
            topic = topics.Uplink(g.path, "wear", "update").topic
            g.link.publish(topic, g.signer.seal(Update(1, plan.round, plan.base, 100, None, payload), topic))

        process = await plant.process()
        try:
            plan = await open_plan(there)
            ring = ringcode.Ring.from_bytes(plan.ring, SHARED)
            encoded = ringcode.encode(learnt, ring, 100)
            send(there[0], plan, encoded.data)
            await until(lambda: there[0].outcomes() == ["counted"])
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "down")
            process = await plant.process()
            await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "up")
            send(there[1], plan, encoded.data[:-1])
            await until(lambda: there[1].outcomes() == ["refused-codec"])
            for g in there:
                send(g, plan, encoded.data)
            after = await open_plan(there, 2)
            assert there[0].outcomes() == ["counted", "duplicate"]
            await until(lambda: all(g.has(1) for g in there))
            moved = there[0].weights()[:SHARED] - plant.first[:SHARED]
            assert np.allclose(moved, encoded.decoded, atol=1e-6)
            assert ringcode.Ring.from_bytes(after.ring, SHARED).gateways == 3
            send(there[2], plan, encoded.data)
            await until(lambda: there[2].outcomes()[-1] == "duplicate")
            send(there[2], after, encoded.data)
            await until(lambda: there[2].outcomes()[-1] == "refused-codec")
        finally:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0


async def test_without_steps_a_slow_gateway_holds_up_nobody_and_still_counts(
    broker: BrokerProcess, tmp_path: Path
) -> None:
    plant = Plant(tmp_path, broker.url, min_gateways=1, rounds=4, more='mode = "async"\nbuffer = 2\nmomentum = 0.0\n')
    async with gateways(broker.url) as there:
        slow = there[2]
        process = await plant.process()
        await until(lambda: process.returncode is not None or plant.has_status())
        first = await open_plan(there)
        assert first.stalest == STALEST
        plan = first
        for number in (1, 2):
            for i, g in enumerate(there[:2]):
                g.send(plan, delta(i))
            plan = await open_plan(there, number + 1)
        assert plan.base == 2
        slow.send(first, delta(2))
        await until(lambda: slow.outcomes() == ["counted"])
        process.kill()
        await process.wait()
        for g in there:
            g.heard.clear()
        process = await plant.process()
        plan = await open_plan(there, 3)
        slow.send(first, delta(2))
        await until(lambda: slow.outcomes() == ["duplicate"])
        there[0].send(plan, delta(0))
        await until(lambda: (m := there[0].manifest()) and m.version == 3 and there[0].model() is not None)
        manifest = there[0].manifest()
        assert manifest
        assert (manifest.gateways, manifest.samples) == (2, 200)
        expected = plant.first.copy()
        expected[:SHARED] += np.float32(1.5 + 1.5 + (1 + 3 / np.sqrt(3)) / 2)
        assert np.allclose(there[0].weights(), expected, rtol=1e-5)
        process.terminate()
        await process.wait()


async def test_a_model_that_is_voted_down_makes_way_for_the_one_before(
    broker: BrokerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant = Plant(tmp_path, broker.url, rounds=2, vote="1h", more="momentum = 0.9\n")

    def shown(code: int) -> str:
        assert cli.main(["status", "--state", str(plant.state)]) == code
        return capsys.readouterr().out

    async with gateways(broker.url) as there:
        process = await plant.process()
        plan = await open_plan(there)
        for i, g in enumerate(there):
            g.send(plan, delta(i), loss=1.0)
        await until(lambda: all(g.has(1) for g in there))
        first = weights_digest(there[0].weights())
        there[0].vote(1, "for")
        there[0].vote(1, "against")  # the first word stays
        there[1].vote(1, "for", digest=bytes(32))
        await until(lambda: plant.status()["refused"].get("unknown-model") == 1)
        await until(lambda: (v := plant.status()["tasks"]["wear"]["vote"]) and (v["for"], v["against"]) == (1, 0))
        assert there[0].plan() is not None
        assert plant.status()["tasks"]["wear"]["state"] == "voting"
        assert shown(0).splitlines()[0] == "press: running, connected"
        process.send_signal(signal.SIGKILL)
        await process.wait()
        assert shown(1).startswith("press: NOT RUNNING; what it said last, ")
        assert (plant.status()["connected"], "connected" in shown(1)) == (True, False)
        await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "down")
        process = await plant.process()
        await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "up")
        for g in there[1:]:
            g.vote(1, "for")
        plan = await open_plan(there, 2)
        assert (plan.base, plan.base_digest) == (1, first)
        for g in there:
            g.send(plan, delta(7), loss=1.0)
        await until(lambda: all(g.has(2) for g in there))
        assert weights_digest(there[0].weights()) != first
        for g, verdict in zip(there, ("against", "for", "against"), strict=True):
            g.vote(2, verdict)  # type: ignore[arg-type]
        # Versions never go back: the third is the first again, and what the strategy had learnt of the second is gone.
        await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
        await until(lambda: all(g.has(3) for g in there))
        assert weights_digest(there[0].weights()) == first
        await until(lambda: "2 rounds, 1 voted down; last: version 2, by 2 of 3 gateways" in shown(0))
        process.terminate()
        await process.wait()
        assert shown(1).startswith("press: NOT RUNNING; ")
    journal = Journal(plant.state)
    entries = [json.loads(line) for line in journal.ledger_lines()]
    said = [(e["body"]["version"], e["body"]["verdict"]) for e in entries if e["kind"] == "vote"]
    assert sorted(said) == [(1, "for")] * 3 + [(2, "against")] * 2 + [(2, "for")]
    (kept,), (down,) = ([e["body"] for e in entries if e["kind"] == kind] for kind in ("kept", "voted-down"))
    assert (kept["version"], kept["for"], down["version"], down["for"], down["against"]) == (1, 3, 2, 1, 2)
    assert [e["body"]["again"] for e in entries if e["kind"] == "model" and "again" in e["body"]] == [1]
    velocity = load_state(journal.strategy_state("wear"))["velocity"]
    assert np.allclose(velocity, 2)  # the mean of the first round, not 0.9 of it and 8
    ledger.verify(journal.ledger_lines())
    journal.close()


def lesson(number: int, i: int) -> Vector:
    return np.random.default_rng([number, i]).normal(size=SHARED).astype(np.float32)


async def test_steps_down_over_a_kill_9_and_an_empty_broker(broker: BrokerProcess, tmp_path: Path) -> None:
    """Two federations learn the same; the aggregator of one is killed, its broker emptied: their models are equal."""
    (tmp_path / "calm").mkdir()
    (tmp_path / "rough").mkdir()
    digests: list[list[bytes]] = []
    for folder in (tmp_path / "calm", tmp_path / "rough"):
        rough, made = folder.name == "rough", list[bytes]()
        plant = Plant(folder, broker.url, min_gateways=2, rounds=6, downlink="sparse", more="momentum = 0.0\n")
        async with gateways(broker.url, 2) as there:
            process = await plant.process()
            try:
                for number in range(1, 7):
                    plan = await open_plan(there, number)
                    for g in there[: 2 if number in (1, 4) else 1]:  # the other one looks seldom
                        await until(partial(g.has, plan.base))
                    made.append(weights_digest(there[0].weights()))
                    if rough and number == 3:
                        there[0].send(plan, lesson(number, 0))
                        await until(lambda: there[0].outcomes()[-1:] == ["counted"] and len(there[0].outcomes()) == 3)
                        process.send_signal(signal.SIGKILL)
                        await process.wait()
                        broker.stop()
                        for g in there:
                            g.heard.clear()
                        broker.start()
                        process = await plant.process()
                        plan = await open_plan(there, number)
                    for i, g in enumerate(there):
                        g.send(plan, lesson(number, i))
                await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
                await until(partial(there[0].has, 6))
                made.append(weights_digest(there[0].weights()))
            finally:
                process.send_signal(signal.SIGTERM)
                await process.wait()
            assert there[0].ways[1:] == [[f"{version}/step0"] for version in range(1, 7)]
            assert there[1].ways[1] == ["1/step0", "2/step0", "3/step0"]
            late = Gateway(broker.url, "late")
            late.link.start()
            await until(partial(late.has, 6))
            steps = [f"{version}/step0" for version in range(1, 7)]
            assert late.ways == [["0/terms0", "0/graph0", "0/weights0", *steps]]
            await late.link.stop()
        journal = Journal(plant.state)
        waiting = np.frombuffer(journal.residual("wear"), np.float32)
        journal.close()
        # Nothing is lost: what was published and what waits are all that was learnt.
        learnt = sum(((lesson(n, 0) + lesson(n, 1)) / 2 for n in range(1, 7)), np.zeros(SHARED, np.float32))
        assert np.allclose(there[0].weights()[:SHARED] + waiting, plant.first[:SHARED] + learnt, atol=1e-4)
        assert np.abs(waiting).max() > 0.1
        digests.append(made)
        broker.stop()
        broker.start()
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == 7


async def test_who_declines_or_dies_is_not_waited_for(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url, min_gateways=1)
    async with gateways(broker.url) as there:
        await until(lambda: all(g.link.connected for g in there))
        async with plant.service():
            plan = await open_plan(there)
            await until(plant.has_status)
            await until(lambda: len(plant.status()["tasks"]["wear"]["gateways"]) == 3)
            there[0].answer(1, "declined")
            gone = there[1]
            gone.link.publish(gone.status, gone.signer.seal(Death(1, gone.session), gone.status), retain=True)
            await until(lambda: plant.status()["tasks"]["wear"]["waiting_for"] == [str(there[2].path)])
            there[2].send(plan, delta(0))
            await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
            await until(lambda: plant.status()["tasks"]["wear"]["state"] == "done")
            said = plant.status()["tasks"]["wear"]["gateways"][str(there[0].path)]
            assert (said["verdict"], said["code"]) == ("declined", "too-few")


async def test_one_who_is_taken_out_leaves_the_open_round(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url, min_gateways=1, join="enrolled")
    enrol = ["enrol", "-c", str(plant.config), "--state", str(plant.state), "--path"]
    async with gateways(broker.url, 2) as (stays, goes), plant.service():

        def task() -> Any:
            return plant.status()["tasks"]["wear"]

        for g in (goes, stays):
            await asyncio.to_thread(cli.main, [*enrol, str(g.path), "--key", g.signer.public_key.hex()])
        plan = await open_plan([stays])
        await until(lambda: plant.has_status() and task()["waiting_for"] == [str(stays.path), str(goes.path)])
        assert await asyncio.to_thread(cli.main, [*enrol, str(goes.path), "--revoke"]) == 0
        await until(lambda: task()["waiting_for"] == [str(stays.path)])
        assert not task()["gateways"][str(goes.path)]["online"]
        since = plant.status()["taken_out"][str(goes.path)]
        shown = "\n".join(cli._report(plant.status(), 0, running=True))
        assert f"    {goes.path}: REVOKED since {cli._clock(since)}\n" in shown + "\n"
        # Another machine in its place is a gateway as any other; and one whose key was replaced is there no more.
        goes.signer, goes.session = Signer.generate(), goes.session + 1
        await asyncio.to_thread(cli.main, [*enrol, str(goes.path), "--key", goes.signer.public_key.hex()])
        goes._on_up()
        await until(lambda: task()["waiting_for"] == [str(stays.path), str(goes.path)])
        assert not plant.status()["taken_out"]
        await asyncio.to_thread(cli.main, [*enrol, str(goes.path), "--key", bytes(32).hex()])
        await until(lambda: task()["waiting_for"] == [str(stays.path)])
        assert not plant.status()["taken_out"]
        stays.send(plan, delta(0))
        await until(lambda: task()["state"] == "done")


async def test_a_gateway_whose_signals_drifted_has_the_next_round_opened(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url, rounds=2)
    file = tmp_path / "wear.toml"
    file.write_text(file.read_text().replace('every = "0s"', 'every = "7d"\nearly = "0s"'))
    async with gateways(broker.url) as there, plant.service():
        plan = await open_plan(there)
        for i, g in enumerate(there):
            g.send(plan, delta(i))
        await until(lambda: all((p := g.plan()) and p.state == "closed" for g in there))
        there[0].answer(0, "asks")  # about a round that is none
        there[1].answer(1, "asks")
        assert (await open_plan(there, 2)).base == 1
    journal = Journal(plant.state)
    opened = [line["body"] for line in map(json.loads, journal.ledger_lines()) if line["kind"] == "opened"]
    journal.close()
    assert [body.get("asked") for body in opened] == [None, str(there[1].path)]


async def test_kill_9_after_one_counted_update(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url)
    async with gateways(broker.url) as there:
        process = await plant.process()
        plan = await open_plan(there)
        there[0].send(plan, delta(0))
        await until(lambda: there[0].outcomes() == ["counted"])
        process.send_signal(signal.SIGKILL)
        await process.wait()
        await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "down")
        process = await plant.process()
        try:
            await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "up")
            for i, g in enumerate(there):
                g.send(plan, delta(i))
            await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
            assert there[0].outcomes() == ["counted", "duplicate"]
            await until(lambda: there[1].outcomes() == ["counted"] and there[2].outcomes() == ["counted"])
            await until(lambda: there[0].model() is not None and there[0].manifest().version == 1)  # type: ignore[union-attr]
            assert np.allclose(there[0].weights()[:SHARED], plant.first[:SHARED] + 2)
        finally:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        await until(lambda: peek(there[0].heard["_fl/press/status"][-1], FederationBirth).state == "down")


async def test_a_broker_that_comes_back_empty_is_filled_again(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url)
    async with gateways(broker.url) as there, plant.service():
        plan = await open_plan(there)
        there[0].send(plan, delta(0))
        await until(lambda: there[0].outcomes() == ["counted"])
        broker.stop()
        await until(lambda: not any(g.link.connected for g in there))
        broker.start()
        await until(lambda: all(g.ups == 2 for g in there))
        late = Gateway(broker.url, "cell0", there[0].signer)
        late.link = Link(  # another client, so that what it hears is what the broker retains
            MqttSettings(url=broker.url),
            client_id="late",
            will=None,
            on_message=late._on_message,
            on_up=lambda: None,
            on_down=lambda _: None,
        )
        late.link.subscribe("_fl/#")
        late.link.start()
        await until(lambda: (p := late.plan()) and p.state == "open" and late.model() is not None)
        await late.link.stop()
        for i, g in enumerate(there[1:], 1):
            g.send(plan, delta(i))
        await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))


async def test_hostile_messages_are_counted_and_nothing_stops(broker: BrokerProcess, tmp_path: Path) -> None:
    plant = Plant(tmp_path, broker.url)
    stranger = Signer.generate()
    async with gateways(broker.url) as there, plant.service():
        plan = await open_plan(there)
        g = there[0]
        topic = topics.Uplink(g.path, "wear", "update").topic
        good = Update(1, 1, 0, 10, None, codec.encode(delta(0), 8).data)
        wrong_layout = Update(1, 1, 0, 10, None, codec.encode(np.ones(SHARED + 1, np.float32), 8).data)
        bomb = bytes.fromhex("28b52ffde0000000000001000001000000")
        hostile = [
            b"garbage",
            bytes(MAX_PAYLOAD + 10),
            stranger.seal(good, topic),
            g.signer.seal(good, g.status),
            g.signer.seal(wrong_layout, topic),
            g.signer.seal(Update(1, 1, 0, 10, None, b"TD"), topic),
            g.signer.seal(Update(1, 1, 0, 10, None, codec.HEADER.pack(b"TD", 1, 8, SHARED, 1.0) + bomb), topic),
            g.signer.seal(Update(1, 1, 0, 2**40, None, good.payload), topic),
            g.signer.seal(Update(1, 1, 0, 10, None, codec.encode(np.full(SHARED, 3e38, np.float32), 8).data), topic),
            g.signer.seal(Answer(1, 1, "joined", "", "", 1), topic),
        ]
        for payload in hostile:
            assert g.link.publish(topic, payload)
        g.link.publish("acme/lyon/press/line4/cell0/_fl/other/update", b"x")
        g.link.publish("acme/lyon/press/line4/cell0/_fl/wear/nothing", b"x")
        g.link.publish("evil/lyon/press/line4/cell0/_fl/status", b"x")
        g.link.publish("acme/ly on/press/line4/cell0/_fl/status", b"x")
        other = Birth(1, g.session + 1, 1, stranger.public_key, "", ("wear",))
        g.link.publish(g.status, stranger.seal(other, g.status))
        wanted = {"refused-layout", "refused-codec", "refused-samples", "refused-range"}
        await until(lambda: wanted <= set(g.outcomes()))
        for i, one in enumerate(there):
            one.send(plan, delta(i))
        await until(lambda: all("counted" in one.outcomes() for one in there))
        await until(lambda: {"key", "topic", "root"} <= plant.status()["refused"].keys())
        refused = plant.status()["refused"]
        assert refused["signature"] == 2
        assert refused["codec"] == 2
        for reason in ("envelope", "layout", "samples", "range", "schema", "root", "key"):
            assert refused[reason] == 1, reason
    journal = Journal(plant.state)
    assert journal.key_of(str(there[0].path)) == there[0].signer.public_key
    ledger.verify(journal.ledger_lines())
    journal.close()


async def test_an_exception_that_nobody_foresaw_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = intake.Intake.read

    def fragile(self: intake.Intake, inbound: Inbound, now_ms: int) -> intake.Heard:
        if inbound.payload == b"surprise":
            raise ZeroDivisionError
        return read(self, inbound, now_ms)

    monkeypatch.setattr(intake.Intake, "read", fragile)
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1)
        async with gateways(broker.url, 1) as there, plant.service() as service:
            plan = await open_plan(there)
            there[0].link.publish(topics.Uplink(there[0].path, "wear", "update").topic, b"surprise")
            there[0].send(plan, delta(0))
            await until(lambda: there[0].outcomes() == ["counted"])
            assert service.status()["refused"] == {"internal": 1}


async def test_a_refused_update_is_not_waited_for(tmp_path: Path) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1)
        async with gateways(broker.url, 2) as there:
            await until(lambda: all(g.link.connected for g in there))
            async with plant.service() as service:
                plan = await open_plan(there)
                await until(lambda: len(service.status()["tasks"]["wear"]["gateways"]) == 2)
                there[0].send(plan, np.ones(SHARED + 1, np.float32))
                await until(lambda: there[0].outcomes() == ["refused-layout"])
                there[1].send(plan, delta(0))
                await until(lambda: service.status()["tasks"]["wear"]["state"] == "done")


async def test_a_lost_broker_is_told_to_the_federation(tmp_path: Path) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url)
        async with gateways(broker.url) as there, plant.service() as service:
            await open_plan(there)
            job = service._jobs["wear"]
            broker.stop()
            await until(lambda: job.federation._offline)
            broker.start()
            await until(lambda: not job.federation._offline)


async def test_an_update_that_no_message_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant = Plant(tmp_path, "mqtt://127.0.0.1:1")
    monkeypatch.setattr("broker.job.MAX_PAYLOAD", 4 * 14 + 1023)
    with pytest.raises(UserError, match="an update of 40 values may be 1080 bytes") as caught:
        await Service(load_federation(plant.config), plant.state).run()
    assert (caught.value.place, caught.value.key) == (str(tmp_path / "wear.toml"), "round.codec")


CELL = "acme/lyon/press/line4/cell0"
KNOWN = Signer.from_bytes(bytes(range(32)))
cbor_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=60),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
fields = st.tuples(
    st.sampled_from(["birth", "death", "answer", "update", "plan", "x"]), st.integers(0, 2), cbor_values, cbor_values
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Journal, intake.Intake]]:
    plant = Plant(tmp_path_factory.mktemp("intake"), "mqtt://127.0.0.1:1")
    config, journal = load_federation(plant.config), Journal(plant.state)
    with journal.transaction():
        journal.add_to_roster(CELL, KNOWN.public_key, 1, "enrolled")
    yield journal, intake.Intake(config, journal, {"wear": intake.Wanted(config.tasks[0].task, SHARED)})
    journal.close()


@given(
    st.sampled_from(["_fl/status", "_fl/wear/update", "_fl/wear/answer", "_fl/wear/x", "_fl/no/update", "_raw/x"]),
    st.one_of(cbor_values, fields, st.lists(cbor_values, max_size=9).map(lambda rest: ["update", 1, *rest])),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_whatever_is_sent_is_heard_or_refused(
    reader: tuple[Journal, intake.Intake],
    tail: str,
    content: Any,
    signed: bool,  # noqa: FBT001
) -> None:
    """Even what an enrolled gateway signs can only be a message or a refusal."""
    topic, payload = f"{CELL}/{tail}", cbor2.dumps(content)
    if signed:
        payload = cwt.COSE.new(alg_auto_inclusion=True).encode(payload, KNOWN._cose, external_aad=topic.encode())
    try:
        heard = reader[1].read(Inbound(topic, payload, retain=False, qos=1, mid=1), 1)
    except PeerError:
        heard = None
    assert heard is None or signed


async def test_enrolled_gateways_alone_take_part(tmp_path: Path) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, join="enrolled")
        async with gateways(broker.url, 1) as there, plant.service():
            await until(lambda: there[0].model() is not None)
            await until(lambda: plant.status()["refused"].get("unknown-gateway"))
            assert there[0].plan() is None
            # Another process, while the service runs: the retained birth counts without a reconnection.
            command = [
                sys.executable,
                "-m",
                "broker.cli",
                "enrol",
                "-c",
                str(plant.config),
                "--state",
                str(plant.state),
            ]
            key = there[0].signer.public_key.hex()
            enrol = await asyncio.create_subprocess_exec(*command, "--path", str(there[0].path), "--key", key)
            assert await enrol.wait() == 0
            await open_plan(there)


async def test_one_who_was_taken_out_and_asks_again_is_shown_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, join="enrolled")
        options = ["-c", str(plant.config), "--state", str(plant.state)]
        async with gateways(broker.url, 1) as (there,), plant.service():
            path, key = str(there.path), there.signer.public_key.hex()

            async def run(*command: str) -> str:
                assert await asyncio.to_thread(cli.main, [*command, *options]) == 0
                return capsys.readouterr().out

            async def shows(line: str) -> None:
                async with asyncio.timeout(WAIT_S):
                    while line not in await run("status"):  # noqa: ASYNC110 - what is waited for is a file
                        await asyncio.sleep(0.05)

            await until(plant.has_status)
            await shows(f"NOT ENROLLED {path}: tundish broker enrol -c federation.toml --path {path} --key {key}\n")
            await run("enrol", "--path", path, "--key", key)
            await open_plan([there])
            caplog.clear()
            await run("enrol", "--path", path, "--revoke")
            await shows(f"REVOKED {path} since {time.strftime('%Y-%m-', time.gmtime())}")
            text = await run("status")
            assert "it asks with the key that was revoked\n" in text
            assert "NOT ENROLLED" not in text
            assert key not in text
            await until(lambda: "revoked, 1 so far" in caplog.text)
            assert "enrol it" not in caplog.text
            assert plant.status()["revoked"][path]["same_key"]
            # Another machine in its place, whose key the operator compares.
            there.signer = Signer.generate()
            there._on_up()
            await shows(f"it asks with another key, {there.signer.public_key.hex()}\n")
            await run("enrol", "--path", path, "--key", there.signer.public_key.hex())
            await until(lambda: not plant.status()["revoked"] and not plant.status()["not_enrolled"])


def test_no_gateway_makes_the_aggregator_read_its_ledger_again(tmp_path: Path) -> None:
    plant, gone = Plant(tmp_path, "mqtt://127.0.0.1:1", join="enrolled"), Signer.generate()
    config, path, read = load_federation(plant.config), "acme/lyon/press/line4/cell9", list[str]()
    options = ["-c", str(plant.config), "--state", str(plant.state), "--path"]

    def enrol(*more: str) -> None:
        assert cli.main(["enrol", *options, *more]) == 0

    with closing(Journal(plant.state)) as journal:
        hears = intake.Intake(config, journal, {})
        topic = topics.Status(topics.GatewayPath.parse(path)).topic
        journal._db.set_trace_callback(lambda query: read.append(query) if "FROM ledger" in query else None)

        def asks(reason: str) -> None:
            birth = gone.seal(Birth(1, 1, 1, gone.public_key, "test", ()), topic)
            with pytest.raises(PeerError) as caught, journal.transaction():
                hears.read(Inbound(topic, birth, retain=True, qos=1, mid=1), 1)
            assert caught.value.reason == reason

        asks("unknown-gateway")
        enrol(path, "--key", gone.public_key.hex())
        enrol(path, "--revoke")
        asks("revoked")
        enrol(CELL, "--key", KNOWN.public_key.hex())
        asks("revoked")
        before, known = len(read), len(list(journal.ledger_lines()))
        # Whatever a gateway lets the aggregator write: no entry is read for it.
        for session in range(3):
            with journal.transaction():
                journal.put_agreement_key(CELL, bytes([session] * 32), session + 1)
                journal.note(1, "refused", {"kind": "revoked"})
            asks("revoked")
            assert hears.asking()["revoked"][path]["same_key"]
        assert len([query for query in read[before:] if "LIKE" in query]) == 0
        # Of what another process wrote, what is new.
        enrol(CELL, "--revoke")
        asks("revoked")
        last = len(list(journal.ledger_lines()))
        (query,) = [query for query in read[before:] if "LIKE" in query]
        assert f"seq > {known} AND seq <= {last}" in query


async def test_who_was_enrolled_and_never_came_is_shown(tmp_path: Path) -> None:
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, join="enrolled")

        def shown() -> list[str]:
            return cli._report(plant.status(), 0, running=True) if plant.has_status() else []

        def line(path: object, how: str) -> str:
            return f"  {path}: {how}; enrolled {time.strftime('%Y-%m-', time.gmtime())}"

        def has(path: object, how: str) -> bool:
            return any(one.startswith(line(path, how)) for one in shown())

        async with gateways(broker.url, 2) as (comes, stays_away):
            with closing(Journal(plant.state)) as journal:
                for g in (comes, stays_away):
                    admit(journal, str(g.path), g.signer.public_key, "key")
            await stays_away.link.stop()
            never, before = "never seen online", "offline, not seen since this aggregator started"
            async with plant.service():
                await until(lambda: has(stays_away.path, never))
                await until(lambda: list(plant.status()["unseen"]) == [str(stays_away.path)])
                assert not has(comes.path, "")
            # Who has gone is not forgotten with the aggregator's memory; by another key it was never there.
            comes.link.publish(comes.status, b"", retain=True)
            await comes.link.stop()
            (plant.state / "status.json").unlink()
            async with plant.service():
                await until(lambda: has(comes.path, before))
                assert has(stays_away.path, never)
                with closing(Journal(plant.state)) as journal:
                    admit(journal, str(comes.path), bytes(32), "key")
                await until(lambda: has(comes.path, never))


async def test_a_changed_net_needs_a_new_name(tmp_path: Path) -> None:
    plant = Plant(tmp_path, "mqtt://127.0.0.1:1")
    task = tmp_path / "wear.toml"
    text = task.read_text()
    names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in LAYOUT.names))
    for old, new, says in (
        ("length = 4", "length = 5", ":6: window: changed since"),
        (
            'personal = ["head"]\n',
            "",
            ":1: personal: changed since the model of task 'wear' was made, with [\"head\"]; undo",
        ),
        ('["head"]', '["haed"]', f":5: personal: the net has no 'haed'; this net has: {names}"),
    ):
        task.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=re.escape(f"{task}{says}")):
            await Service(load_federation(plant.config), plant.state).run()


async def test_status_command(tmp_path: Path) -> None:
    plant = Plant(tmp_path, "mqtt://127.0.0.1:1")
    async with plant.service():
        await until(plant.has_status)
        command = [sys.executable, "-m", "broker.cli", "status", "--state", str(plant.state)]
        for extra in ([], ["--json"]):
            child = await asyncio.create_subprocess_exec(*command, *extra, stdout=asyncio.subprocess.PIPE)
            out, _ = await child.communicate()
            assert child.returncode == 0
            assert b"wear" in out
        assert json.loads(out)["running"]
    mode = (plant.state / "journal.db").stat().st_mode & 0o777
    assert mode == 0o600
