"""The gateway's real process between a real PLC simulator, a real broker and the real aggregator."""

import csv
import hashlib
import itertools
import json
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from broker import cli, ledger, topics
from broker.journal import Journal
from broker.messages import (
    MAX_PAYLOAD,
    Answer,
    Birth,
    Death,
    ModelManifest,
    Plan,
    Signer,
    Terms,
    Update,
    Vote,
    Whole,
    open_envelope,
    peek,
)
from edge.cli import main
from edge.feedback import Correction
from edge.lab.physics import FEATURES
from edge.lab.stage import FEDERATION, Scenario, Stage
from edge.memory import Memory
from edge.store import State
from models import codec
from models.errors import PeerError
from models.width import slices
from tests.brokers import BROKERS, BrokerProcess, need_mosquitto
from tests.carrier import PATH, Carrier

WAIT_S = 240  # where other tests take all cores, a niced training takes its time
TASK = "bearing-condition"
STATUS = topics.Status(PATH).topic
HEALTH = topics.Local(PATH, "health", "plc").topic
INFERENCE = topics.Local(PATH, "inference", TASK).topic


class Plant:
    """One plant whose processes are started one by one, and a listener on everything that is published."""

    def __init__(self, folder: Path, broker: BrokerProcess, rounds: int) -> None:
        self.stage = Stage(Scenario(gateways=1, seed=0, rounds=rounds, min_gateways=1), folder)
        broker.port = self.stage.mqtt_port
        self.broker = broker
        # Rounds of seconds: what is tested is the way, not what is learnt.
        task = folder / "aggregator" / "task.toml"
        text = task.read_text()
        assert "min_windows = 40\n" in text
        assert "epochs = 4\n" in text
        task.write_text(text.replace("min_windows = 40", "min_windows = 10").replace("epochs = 4", "epochs = 1"))
        self.heard: dict[str, list[bytes]] = {}
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv311)
        self.client.on_message = lambda _c, _u, m: self.heard.setdefault(m.topic, []).append(bytes(m.payload))
        self.client.on_connect = lambda c, *_: c.subscribe([("#", 1)])
        self.client.reconnect_delay_set(1, 1)

    @property
    def gateway(self) -> Any:
        return self.stage.gateways[0]

    def status(self) -> dict[str, Any]:
        return self.stage.status(0)

    def task(self) -> dict[str, Any]:
        return self.stage.task_status(0)

    def aggregator_status(self) -> dict[str, Any]:
        """What the aggregator last said of itself; empty before it has."""
        try:
            found: dict[str, Any] = json.loads((self.stage.aggregator_state / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def aggregator(self) -> dict[str, Any]:
        """The task as the aggregator's status has it."""
        return self.aggregator_status().get("tasks", {}).get(TASK, {})  # type: ignore[no-any-return]

    def listen(self) -> None:
        self.client.connect("127.0.0.1", self.stage.mqtt_port)
        self.client.loop_start()

    def last(self, topic: str) -> bytes:
        return (self.heard.get(topic) or [b""])[-1]

    def inference(self) -> dict[str, Any]:
        return json.loads(self.last(INFERENCE) or b"{}")  # type: ignore[no-any-return]

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(WAIT_S)

    def until(self, condition: Callable[[], object], *, gateway: bool = True) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            for process in self.stage.processes if gateway else self.stage.plcs:
                process.check()
            assert time.monotonic() < deadline, f"{self.status()}\n{self.aggregator()}"
            time.sleep(0.05)


@contextmanager
def plant(folder: Path, kind: str, rounds: int = 1) -> Iterator[Plant]:
    if kind == "mosquitto":
        need_mosquitto()
    made = Plant(folder, BrokerProcess(kind), rounds)
    try:
        made.broker.start()
        made.listen()
        yield made
    finally:
        made.client.disconnect()
        made.client.loop_stop()
        made.stage.stop()
        made.broker.stop()


@pytest.mark.parametrize("kind", BROKERS)
def test_a_round_completes_and_scores_say_by_which_model(tmp_path: Path, kind: str) -> None:
    with plant(tmp_path, kind) as p:
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.aggregator().get("state") == "done")
        p.until(lambda: p.task().get("model") == 1 and p.status()["outbox"] == 0)
        # The model is stored before it is tried, and a window of the one before may be on its way.
        p.until(lambda: (said := p.inference()) and said["model"]["version"] == p.task()["scoring_model"])
        p.until(
            lambda: (said := p.inference()) and said["verdict"] in {"healthy", "outer", "inner", "ball", "inactive"}
        )
        said = p.inference()
        assert set(said) >= {
            "timestamp_ms",
            "window_end_ms",
            "score",
            "verdict",
            "alarm",
            "reliable",
            "active",
            "quality",
            "top",
            "model",
        }
        assert 0 < said["score"] <= 1
        assert 0 < said["quality"] <= 1
        assert said["model"]["version"] in {0, 1}
        assert said["model"]["age_s"] > 0
        assert 0 < sum(one["share"] for one in said["top"]) <= 1.01
        signals = {one["signal"] for one in said["top"]}
        assert signals <= set(FEATURES)
        key = bytes.fromhex(p.status()["public_key"])
        birth = open_envelope(p.last(STATUS), STATUS, key, Birth)
        assert birth.tasks == (TASK,)
        # The last will: a death that verifies, of this session, retained for whoever comes later.
        p.gateway.kill()
        p.until(lambda: p.last(STATUS) and not is_birth(p.last(STATUS)), gateway=False)
        assert open_envelope(p.last(STATUS), STATUS, key, Death).session == birth.session
    state = State(p.stage.gateway_state(0))
    lines = [json.loads(line) for line in state.ledger()]
    ledger.verify(state.ledger())
    kinds = [line["kind"] for line in lines]
    assert kinds[:4] == ["key-made", "key-made", "session", "checkpoint"]
    assert kinds.index("birth") < kinds.index("update")
    assert kinds.index("federation-pinned") < kinds.index("update")
    assert [line["body"]["outcome"] for line in lines if line["kind"] == "receipt"] == ["counted"]
    state.close()
    nothing_else_left(p, tmp_path / "what-left")
    assert main(["audit", "verify", str(p.stage.aggregator_state)]) == 0
    journal = Journal(p.stage.aggregator_state)
    assert list(journal.counted(TASK, 1)) == [str(PATH)]
    assert journal.votes(TASK, 1).keys() == journal.losses(TASK, 1).keys()
    assert (ballot := journal.ballot(TASK))
    assert (ballot.version, ballot.before, ballot.kept) == (1, 0, 1)
    journal.close()


def nothing_else_left(p: Plant, out: Path) -> None:
    """Hold the report of what left a site against all that a broker saw below its `_fl/`, which alone is forwarded."""
    assert main(["audit", "report", str(p.stage.gateway_state(0)), "--out", str(out)]) == 0
    with (out / "left-this-site.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    key = bytes.fromhex(p.status()["public_key"])
    update, answer, vote = (topics.Uplink(PATH, TASK, kind).topic for kind in ("update", "answer", "vote"))
    assert {topic for topic in p.heard if topic.startswith(f"{PATH}/_fl/")} - {vote} == {STATUS, update, answer}
    cast = [open_envelope(payload, vote, key, Vote) for payload in set(p.heard.get(vote, []))]
    votes = [(str(one.windows), f"{one.verdict} version {one.version}: {one.new}, was {one.old}") for one in cast]
    assert votes == [(row["windows"], row["detail"]) for row in rows if row["what"] == "vote"]
    # Who had enough windows to judge by says so in its update, and is waited for.
    learnt = [open_envelope(payload, update, key, Update) for payload in set(p.heard[update])]
    assert [(one.version, one.than) for one in cast] == [(1, 0) for one in learnt if one.base_loss is not None]
    sent = {(hashlib.sha256(payload).hexdigest(), str(len(payload))) for payload in p.heard[update]}
    assert sent == {(row["digest"], row["message_bytes"]) for row in rows if row["what"] == "update"}
    said = [open_envelope(payload, answer, key, Answer) for payload in p.heard[answer]]
    answers = {(row["what"], row["round"]) for row in rows if row["what"] in {"joined", "declined"}}
    assert {(one.verdict, str(one.round)) for one in said} == answers
    births = [open_envelope(one, STATUS, key, Birth) for one in p.heard[STATUS] if one and is_birth(one)]
    assert len({one.session for one in births}) == sum(row["what"] == "birth" for row in rows)
    assert all(f"software {one.software}, tasks {list(one.tasks)}" in rows[0]["detail"] for one in births)


def test_an_asynchronous_federation_goes_from_version_to_version(tmp_path: Path) -> None:
    with plant(tmp_path, "amqtt", rounds=3) as p:
        file = tmp_path / "aggregator" / "task.toml"
        file.write_text(file.read_text().replace("momentum = 0.5", 'momentum = 0.5\nmode = "async"\nbuffer = 1'))
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.aggregator().get("state") == "done")
        p.until(lambda: p.task().get("model") == 3 and p.status()["outbox"] == 0)
        end_ms = correct(p)
    state = State(p.stage.gateway_state(0))
    entries = [entry["body"] for entry in map(json.loads, state.ledger()) if entry["kind"] == "feedback"]
    assert [(body["task"], body["window_end_ms"], body["label"]) for body in entries] == [(TASK, end_ms, 1.0)]
    state.close()
    journal = Journal(p.stage.aggregator_state)
    for number in (1, 2, 3):
        assert list(journal.counted(TASK, number)) == [str(PATH)]
    journal.close()


def correct(p: Plant) -> int:
    """Say what a window was, as an operator would, after things that can't be used; returns the window's end."""
    p.until(lambda: p.inference().get("score") is not None)
    end_ms, topic = int(p.inference()["window_end_ms"]), topics.Local(PATH, "feedback", TASK).topic
    body = {"timestamp_ms": 5, "window_end_ms": end_ms, "verdict": "label", "label": "outer"}
    bad: dict[str, dict[str, Any]] = {"window": {"window_end_ms": 7}, "label": {"label": "rust"}, "schema": {"more": 1}}
    for change in bad.values():
        p.publish(topic, json.dumps(body | change).encode())
    p.until(lambda: (said := p.status().get("refused")) and all(said.get(reason) == 1 for reason in bad))

    def known() -> dict[int, Correction]:
        state = State(p.stage.gateway_state(0))
        try:
            return Memory(state, TASK).corrections()
        finally:
            state.close()

    for label in ("outer", "inner"):  # the second is no newer than what is known
        p.publish(topic, json.dumps(body | {"label": label}).encode())
        p.until(known)
    assert known() == {end_ms: Correction(5, 1.0)}
    return end_ms


def is_birth(envelope: bytes) -> bool:
    try:
        peek(envelope, Birth)
    except PeerError:
        return False
    return True


def test_an_update_in_the_outbox_outlives_kill_9_and_an_empty_broker(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plant(tmp_path, "amqtt") as p:
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.task().get("state") in {"waiting", "training"})
        assert p.task()["windows"]["wanted"] == 10
        p.stage.aggregator.kill()  # nobody is there to send a receipt
        p.until(lambda: p.status()["outbox"] == 1)
        main(["edge", "status", "--state", str(p.stage.gateway_state(0))])
        said = capsys.readouterr().out
        assert "ENROL    no receipt for this gateway yet: ask the operator to enrol it: tundish broker enrol" in said
        assert f"--path {PATH} --key {p.status()['public_key']}" in said
        p.gateway.kill()
        p.broker.stop()
        before = outbox(p)
        assert len(before) == 1
        # Without broker and aggregator it scores at once, with the model that it has.
        (p.stage.gateway_state(0) / "status.json").unlink()
        p.gateway.start()
        p.until(lambda: p.task().get("scored", 0) > 0)
        status = p.status()
        assert not status["mqtt"]["connected"]
        assert p.task()["scoring_model"] == 0
        assert status["outbox"] == 1
        p.broker.start()
        p.stage.aggregator.start()
        p.until(lambda: p.aggregator().get("state") == "done" and p.status()["outbox"] == 0)
        p.until(lambda: p.task().get("model") == 1)
        p.until(lambda: p.status()["answered"])
        p.stage.aggregator.stop()
        p.until(lambda: p.inference().get("score") is not None)
        p.gateway.stop()
        # What the broker retains does not look live, and status.json has the last counts.
        p.until(lambda: p.inference().get("verdict") == "stopped", gateway=False)
        assert (p.inference()["score"], p.inference()["alarm"]) == (None, False)
        p.until(lambda: not json.loads(p.last(HEALTH))["connected"], gateway=False)
        assert json.loads(p.last(HEALTH))["error"] == "the gateway reads it no more"
        assert p.task()["scored"] > 0
        journal = Journal(p.stage.aggregator_state)
        assert journal.counted(TASK, 1) == {str(PATH): before[0]}
        assert journal.totals(TASK, 1)[0] == 1
        journal.close()
        state = State(p.stage.gateway_state(0))
        kinds = [json.loads(line)["kind"] for line in state.ledger()]
        assert kinds.count("update") == 1  # it was not trained again
        assert kinds.count("receipt") == 1
        ledger.verify(state.ledger())
        state.close()


def test_an_aggregator_restored_from_a_backup_goes_on(tmp_path: Path) -> None:
    """Its gateways hold later models than it knows of, and have answered rounds that it holds to be open."""
    with plant(tmp_path, "amqtt", rounds=40) as p:
        file, state = tmp_path / "aggregator" / "task.toml", p.stage.aggregator_state
        file.write_text(file.read_text().replace('deadline = "60s"', 'deadline = "5s"'))
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: (p.task().get("model") or 0) >= 1)
        p.stage.aggregator.kill()  # in the midst of a round
        with closing(Journal(state)) as journal:
            was = journal.model(TASK)
        assert was
        shutil.copytree(state, tmp_path / "backup")
        p.stage.aggregator.start()
        p.until(lambda: (p.task().get("model") or 0) >= was.version + 3)
        p.stage.aggregator.kill()
        ahead = p.task()["model"]
        shutil.rmtree(state)
        shutil.copytree(tmp_path / "backup", state)
        p.stage.aggregator.start()
        p.until(lambda: was.version < p.task()["model"] < ahead)
        assert p.task()["problem"] == ""
        p.stage.aggregator.stop()
        p.gateway.stop()
    with closing(State(p.stage.gateway_state(0))) as gateway, closing(Journal(state)) as journal:
        held = Memory(gateway, TASK).model()
        assert held
        made = journal.model(TASK, held.manifest.version)
        assert made
        assert (made.digest, made.round) == (held.manifest.digest, held.manifest.round)
        ledger.verify(gateway.ledger())


def test_a_gateway_trains_when_it_may_and_says_why_it_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plant(tmp_path, "amqtt") as p:
        toml = tmp_path / "plant1" / "gateway.toml"
        always = toml.read_text()
        day = (datetime.now().astimezone() + timedelta(days=3)).strftime("%a")
        toml.write_text(f'{always}\n[training]\ntrain_when = "{day} 06:00-14:00"\n')
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.aggregator().get("gateways", {}).get(str(PATH), {}).get("verdict") == "declined")
        said = p.aggregator()["gateways"][str(PATH)]
        reason = f"training may start when {day} 06:00-14:00, which is after the round's deadline"
        assert (said["code"], said["reason"]) == ("train-when", reason)
        p.until(lambda: p.task()["state"] == "waiting" and p.task()["scored"] > 20)
        main(["edge", "status", "--state", str(p.stage.gateway_state(0))])
        assert f"training may start when {day} 06:00-14:00\n" in capsys.readouterr().out
        assert p.status()["outbox"] == 0
        # Hours that hold: it joins the same round after all.
        p.gateway.stop()
        toml.write_text(f'{always}\n[training]\ntrain_when = "{day} or 00:00-24:00"\n')
        p.gateway.start()
        p.until(lambda: p.aggregator().get("state") == "done")
    journal = Journal(p.stage.aggregator_state)
    assert list(journal.counted(TASK, 1)) == [str(PATH)]
    journal.close()


def test_a_gateway_of_half_a_net_takes_part_and_moves_no_more(tmp_path: Path) -> None:
    with plant(tmp_path, "amqtt") as p:
        toml = tmp_path / "plant1" / "gateway.toml"
        toml.write_text(toml.read_text().replace("\nactive_when", "\nwidth = 0.5\nactive_when"))
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.aggregator().get("state") == "done")
        p.until(lambda: p.task().get("model") == 1 and p.status()["outbox"] == 0)
        topic = topics.Uplink(PATH, TASK, "update").topic
        update = open_envelope(p.last(topic), topic, bytes.fromhex(p.status()["public_key"]), Update)
    state, journal = State(p.stage.gateway_state(0)), Journal(p.stage.aggregator_state)
    memory = Memory(state, TASK)
    model, residual, own = memory.model(), memory.vector("residual"), memory.vector("own")
    before, after = (journal.model(TASK, version) for version in (0, 1))
    assert model and before and after and residual is not None and own is not None  # noqa: PT018
    inside = slices(model.task, model.layout)[0.5]
    assert update.quarters == 2
    assert codec.declared(update.payload) == residual.size == inside.size < model.layout.size / 2
    assert list(journal.counted(TASK, 1)) == [str(PATH)]
    moved = np.flatnonzero(model.vector != codec.decode(before.weights, model.layout.size))
    assert moved.size > 10
    assert set(moved.tolist()) <= set(inside.tolist())
    # What it scores with is of that width too.
    scoring = memory.scoring(model.layout.size)
    assert scoring is not None
    for weights in (own, *(one for _, one in scoring[2])):
        assert set(np.flatnonzero(weights).tolist()) <= set(inside.tolist())
    state.close()
    journal.close()


def outbox(p: Plant) -> list[bytes]:
    db = sqlite3.connect(p.stage.gateway_state(0) / "state.db")
    digests = [row[0] for row in db.execute("SELECT digest FROM outbox")]
    db.close()
    return digests


def test_a_policy_that_forbids_and_peers_that_lie_stop_no_score(tmp_path: Path) -> None:
    with plant(tmp_path, "mosquitto") as p:
        toml = tmp_path / "plant1" / "gateway.toml"
        toml.write_text(toml.read_text().replace("[policy]\nmin_gateways = 1", "[policy]\nmin_gateways = 5"))
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.aggregator().get("gateways", {}).get(str(PATH), {}).get("verdict") == "declined")
        said = p.aggregator()["gateways"][str(PATH)]
        assert said["code"] == "min-gateways"
        assert "policy wants 5 gateways in a sum, the plan 1" in json.dumps(said)
        assert "policy wants 5 gateways" in p.task()["answer"]
        p.until(lambda: p.task().get("scored", 0) > 0)
        lie(p)
        scored, pid = p.task()["scored"], p.status()["pid"]
        p.until(lambda: p.task()["scored"] > scored + 5)
        assert p.status()["pid"] == pid == p.gateway.pid
        assert p.status()["mqtt"]["connected"]
        assert p.task()["model"] == 0
        assert p.task()["state"] == "idle"
        assert p.status()["outbox"] == 0
        assert p.aggregator()["state"] == "open"


def lie(p: Plant) -> None:
    """Send what a hostile peer may to every topic that the gateway reads, and wait until each is counted."""
    birth = topics.FederationStatus(FEDERATION).topic
    plan = topics.RoundPlan(FEDERATION, TASK).topic
    manifest = topics.Manifest(FEDERATION, TASK).topic
    receipt = topics.ReceiptFor(FEDERATION, TASK, PATH).topic
    chunk = topics.Chunk(FEDERATION, TASK, 9, "weights0").topic

    def refused(reason: str) -> int:
        count: int = p.status().get("refused", {}).get(reason, 0)
        return count

    def sent(reason: str, *messages: tuple[str, bytes]) -> None:
        before = refused(reason)
        for topic, payload in messages:
            p.publish(topic, payload)
        p.until(lambda: refused(reason) == before + len(messages))

    everywhere = (birth, plan, manifest, receipt)
    signed = {topic: p.last(topic) for topic in everywhere[:3]}
    sent("envelope", *((topic, b"\x00garbage\xff") for topic in everywhere))
    sent("envelope", *((topic, b"\xd2" + b"\x84" * 100_000) for topic in everywhere))
    stranger = Signer.generate()
    forged = Plan(1, bytes(32), 99, 0, bytes(32), "open", 2**50, 2**50, 50, 4, secure_aggregation=False)
    sent("signature", *((topic, stranger.seal(forged, topic)) for topic in everywhere))
    # What the aggregator did sign, on another topic.
    sent("signature", (plan, signed[manifest]), (receipt, signed[plan]), (manifest, signed[birth]))
    journal = Journal(p.stage.aggregator_state)
    signer = journal.signer()
    journal.close()
    # What it signs, but is no such message, nor a model that can be.
    sent("schema", (plan, signer.seal(Death(1, 1), plan)), (manifest, signer.seal(Death(1, 1), manifest)))
    real = open_envelope(signed[manifest], manifest, signer.public_key, ModelManifest)
    fields = {name: getattr(real, name) for name in real.__struct_fields__} | {
        "version": 9, "whole": Whole(9, (bytes(32),)), "steps": ()
    }  # fmt: skip
    later = itertools.count(real.signed_ms + 1)

    def offer(**changes: object) -> bytes:
        return signer.seal(ModelManifest(**fields | {"signed_ms": next(later)} | changes), manifest)

    other = topics.Manifest(FEDERATION, "other").topic
    sent("signature", (manifest, signer.seal(ModelManifest(**fields), other)))
    sent("manifest", (manifest, offer(whole=Whole(8, (bytes(32),)))))
    terms = topics.Chunk(FEDERATION, TASK, 0, "terms0").topic
    known = peek(p.last(terms), Terms)
    for reason, changes in (("layout", {"layout": (("w", (1 << 40,)),)}), ("task", {"task_text": "no = "})):
        envelope, before = signer.seal(msgspec.structs.replace(known, **changes), terms), refused(reason)
        p.publish(manifest, offer(terms=hashlib.sha256(envelope).digest()))

        def terms_refused(reason: str = reason, envelope: bytes = envelope, before: int = before) -> bool:
            p.publish(terms, envelope)
            return refused(reason) > before

        p.until(terms_refused)
    # A manifest that verifies makes it wait for a chunk, which is not what was signed.
    p.publish(manifest, offer())
    before = refused("chunk")

    def chunk_refused() -> bool:
        p.publish(chunk, b"not the chunk")
        return refused("chunk") > before

    p.until(chunk_refused)
    # More than a payload may be: it never gets as far as being parsed.
    for topic in everywhere:
        p.publish(topic, bytes(MAX_PAYLOAD + 1))
        p.publish(topic, bytes(MAX_PAYLOAD + 20_000))
    sent("envelope", (plan, b"still listening"))


def test_gateways_score_with_what_is_released(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plant(tmp_path, "mosquitto", rounds=2) as p:
        task = tmp_path / "aggregator" / "task.toml"
        task.write_text(task.read_text().replace("epochs = 1", "epochs = 1\nalone = false"))
        config = tmp_path / "aggregator" / "federation.toml"
        command = ["-c", str(config), "--state", str(p.stage.aggregator_state)]
        key = tmp_path / "release.key"
        assert main(["broker", "release", *command, "--new-key", str(key)]) == 0
        public = capsys.readouterr().out.split('"')[1]
        with config.open("a") as file:
            file.write(f'[release]\nkeys = ["{public}"]\ncanary = ["{PATH}"]\n')
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.task().get("model") in {1, 2})
        p.until(lambda: p.aggregator().get("state") == "done" and p.task().get("model") == 2)
        # Until the first release, each model is tried as it comes.
        assert (p.task()["release"], p.task()["released"]) == (0, None)
        assert p.task()["scoring_model"] is not None
        assert main(["broker", "release", *command, "--to", "canary"]) == 2  # the first one needs the operators' keys
        assert "--key: too few: root needs 1 signature by keys of [release], 0 given" in capsys.readouterr().err
        steps: list[tuple[list[str], int]] = [
            (["release", "--version", "1", "--to", "canary", "--key", str(key)], 1),
            (["release", "--to", "stable", "--key", str(key)], 1),  # what the canaries have
            (["release", "--version", "2", "--to", "canary"], 2),
            (["rollback", "--key", str(key), "--to", "1"], 1),
        ]

        def shown() -> list[str]:
            return cli._report(json.loads((p.stage.aggregator_state / "status.json").read_text()), 0, running=True)

        def shows(text: str) -> bool:
            return any(text in line for line in shown())

        def installed(number: int) -> bool:
            return p.task()["release"] == number  # type: ignore[no-any-return]

        for number, ((verb, *options), version) in enumerate(steps, 1):
            assert main(["broker", verb, *command, *options]) == 0
            assert f"release {number} of {TASK}: version {version} for" in capsys.readouterr().out
            p.until(partial(installed, number))
            said = ("stable", "canary")["canary" in options]
            assert p.task()["released"] == {"channel": said, "version": version, "problem": ""}
            assert main(["edge", "status", "--state", str(p.stage.gateway_state(0))]) == 0
            assert f" release {number} of {said}, version {version}\n" in capsys.readouterr().out
            assert p.task()["model"] == 2  # training goes on from the newest
            p.until(partial(shows, f"{PATH}: online, has release {number} (version {version})"))
            # After a rollback of stable, what the canaries were given is not what they go by.
            by = [line.endswith("go by stable, whose release is higher") for line in shown() if ": canary has" in line]
            assert by == [said == "stable"]
            if version == 1:
                assert (p.task()["scoring_model"], p.task()["scoring_kind"]) == (1, "global")
        p.gateway.kill()
        p.gateway.start()
        p.until(lambda: p.task().get("release") == 4 and p.task()["scoring_model"] == 1 and p.task()["scored"] > 0)
    state = State(p.stage.gateway_state(0))
    entries = [json.loads(line) for line in state.ledger()]
    ledger.verify(state.ledger())
    state.close()
    ways = [(e["body"]["channel"], e["body"]["version"]) for e in entries if e["kind"] == "release-installed"]
    assert ways == [("canary", 1), ("stable", 1), ("canary", 2), ("stable", 1)]
    assert sum(e["kind"] == "release-root-pinned" for e in entries) == 1


def test_a_gateway_without_a_network_takes_part_by_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with plant(tmp_path, "amqtt") as p:
        task = tmp_path / "aggregator" / "task.toml"
        task.write_text(task.read_text().replace("epochs = 1", "epochs = 1\nalone = false"))
        p.stage.aggregator.start()
        carrier = Carrier(p)
        carrier.start()
        carrier.down()
        p.until(lambda: p.task().get("model") == 0)
        p.until(lambda: p.status()["outbox"] == 1)
        assert not p.status()["mqtt"]["connected"]
        capsys.readouterr()
        for _ in range(2):  # nothing is counted twice
            assert topics.Accepted(PATH).topic not in dict(carrier.export())  # nobody asked for a word
            carrier.import_()
            assert f"{PATH}, {TASK}: an update of round 1, " in capsys.readouterr().out
            p.until(lambda: p.aggregator().get("counted") == [str(PATH)])
        carrier.goes_alone()
        p.until(lambda: p.aggregator().get("state") == "done")
        carrier.down()
        p.until(lambda: p.task().get("model") == 1 and p.status()["outbox"] == 0)
        p.until(lambda: p.task()["scored"] > 0)
        assert not {topic for topic in p.heard if topic.startswith(f"{PATH}/")}
    ring = State(p.stage.gateway_state(0))
    kinds = [json.loads(line)["kind"] for line in ring.ledger()]
    ledger.verify(ring.ledger())
    ring.close()
    assert kinds.index("update") < kinds.index("exported") < kinds.index("receipt")
    journal = Journal(p.stage.aggregator_state)
    assert list(journal.counted(TASK, 1)) == [str(PATH)]
    journal.close()
