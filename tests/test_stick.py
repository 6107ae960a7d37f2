"""Messages by file: what a file may be, and what the aggregator makes of one."""

import asyncio
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import stick, topics
from broker.journal import Journal
from broker.messages import MAX_PAYLOAD, Answer, Birth, ModelManifest, Receipt, Signer, Update, open_envelope
from edge.cli import main
from edge.handback import Fetch
from models import codec
from models.errors import UserError
from models.spec import load_task
from models.width import slices
from tests.brokers import BrokerProcess
from tests.test_service import LAYOUT, Plant, delta, gateways, open_plan, until

NOWHERE = "mqtt://127.0.0.1:1"
CELL = topics.GatewayPath.parse("acme/lyon/press/line9/cell9")

MESSAGES = [("a/b", b"one"), ("_fl/x", b""), ("a/b", bytes(1000))]
LARGE = stick.MAGIC + b"\x00\x01a" + (MAX_PAYLOAD + 1).to_bytes(4, "big") + bytes(MAX_PAYLOAD + 1)


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    file = tmp_path / "stick"
    assert stick.write(file, MESSAGES) == 3
    assert stick.read(file) == MESSAGES
    assert stick.is_stick(file)
    assert not stick.is_stick(tmp_path / "absent")
    assert [path.name for path in tmp_path.iterdir()] == ["stick"]
    stick.leave(tmp_path / "state", file)
    (tmp_path / "state" / stick.INBOX / ".half.part").write_bytes(b"x")
    (left,) = stick.waiting(tmp_path / "state")
    assert stick.read(left) == MESSAGES


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-1], "is damaged"),
        (lambda data: data + b"\x00", "is damaged"),
        (lambda data: b"x" + data, "is no file of messages"),
        (lambda _: b"", "is no file of messages"),
        (lambda _: stick.MAGIC + b"\xff\xff", "is damaged"),
        (
            lambda _: stick.MAGIC + b"\x00\x01a" + (MAX_PAYLOAD + 1).to_bytes(4, "big") + bytes(MAX_PAYLOAD + 1),
            "damaged",
        ),
        (lambda _: stick.MAGIC + b"\x00\x01\xff" + bytes(4), "is damaged"),
        (lambda data: data + bytes(stick.MOST_BYTES), "is no file of messages"),
    ],
)
def test_what_is_no_file_of_messages_is_told(tmp_path: Path, change: Callable[[bytes], bytes], says: str) -> None:
    file = tmp_path / "stick"
    stick.write(file, MESSAGES)
    file.write_bytes(change(file.read_bytes()))
    for take in (stick.read, lambda path: stick.leave(tmp_path / "state", path)):
        with pytest.raises(UserError, match=says):
            take(file)
    assert not (tmp_path / "state").exists()


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any"
    file.write_bytes(stick.MAGIC + data)
    try:
        messages = stick.read(file)
    except UserError:
        return
    stick.write(file, messages)
    assert file.read_bytes() == stick.MAGIC + data


async def test_an_update_by_file_counts_as_one_by_mqtt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signer, path = Signer.generate(), CELL
    topic = topics.Uplink(path, "wear", "update").topic
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=2, rounds=1)
        models, updates = tmp_path / "cell9.models", tmp_path / "cell9.updates"

        async def run(verb: str, *options: object) -> tuple[int, str]:
            command = ["broker", verb, "-c", str(plant.config), "--state", str(plant.state), *map(str, options)]
            code = await asyncio.to_thread(main, command)
            out, err = capsys.readouterr()
            return code, out + err

        def receipts() -> list[str]:
            with closing(Journal(plant.state)) as journal:
                kept = journal.receipts(str(path))
                key = journal.signer().public_key
            return [open_envelope(envelope, where, key, Receipt).outcome for where, envelope in kept]

        async with gateways(broker.url, 2) as there, plant.service():
            plan = await open_plan(there)
            assert (await run("export", models, "--path", path))[0] == 0
            said = dict(stick.read(models))
            code, text = await run("export", models, "--path", "a/b")
            assert (code, "write acme/lyon/press/line4/cell2" in text) == (2, True)
            place = topics.Manifest("press", "wear").topic
            manifest = open_envelope(said[place], place, there[0].key, ModelManifest)
            fetch = Fetch("press", "wear", manifest, None)
            while fetch.topics:
                fetch.take(fetch.topics[0], said[fetch.topics[0]])
            assert fetch.model().vector.tolist() == plant.first.tolist()
            update = Update(1, plan.round, plan.base, 100, None, codec.encode(delta(8), 32).data)
            envelope = signer.seal(update, topic)
            stick.write(updates, [(topic, envelope)])
            code, text = await run("import", updates)
            assert (code, "is not in the roster" in text) == (1, True)
            await run("enrol", "--path", path, "--key", signer.public_key.hex())
            broken = envelope[:-1] + bytes([envelope[-1] ^ 1])
            stick.write(updates, [(topic, broken), (topic + "/x", b"x"), (topic, b"")])
            code, text = await run("import", updates)
            assert (code, text.count("refused: ")) == (1, 3)
            stick.write(updates, [(topic, envelope), (topic, envelope)])
            code, text = await run("import", updates)
            assert (code, text.count(f"{path}, wear: an update of round 1")) == (0, 2)
            await until(lambda: receipts() == ["counted"])
            for i, g in enumerate(there):
                g.send(plan, delta(i))
            await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
        assert (await run("export", models, "--path", path))[0] == 0
    found = [(where, payload) for where, payload in stick.read(models) if where.endswith(f"/receipt/{path}")]
    assert len(found) == 1
    with closing(Journal(plant.state)) as journal:
        assert journal.counted("wear", 1).keys() == {str(path), *(str(g.path) for g in there)}
        assert journal.totals("wear", 1).gateways == 3


def take(plant: Plant, file: Path) -> int:
    return main(["broker", "import", "-c", str(plant.config), "--state", str(plant.state), str(file)])


def enrol(plant: Plant, signer: Signer) -> None:
    with closing(Journal(plant.state)) as journal, journal.transaction():
        journal.add_to_roster(str(CELL), signer.public_key, 1, "enrolled")


def test_a_narrow_gateways_update_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant, signer = Plant(tmp_path, NOWHERE), Signer.generate()
    enrol(plant, signer)
    count = slices(load_task(tmp_path / "wear.toml")[0], LAYOUT)[0.5].size
    payload = codec.encode(np.ones(count, np.float32), 32).data
    topic = topics.Uplink(CELL, "wear", "update").topic
    stick.write(tmp_path / "updates", [(topic, signer.seal(Update(1, 1, 0, 100, None, payload, None, 2), topic))])
    assert take(plant, tmp_path / "updates") == 0
    assert f"{CELL}, wear: an update of round 1" in capsys.readouterr().out


async def test_no_birth_and_no_answer_come_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant, signer, other = Plant(tmp_path, NOWHERE, join="first-seen"), Signer.generate(), Signer.generate()
    enrol(plant, signer)
    file, status = tmp_path / "updates", topics.Status(CELL).topic
    stranger = status.replace("cell9", "cell8")
    answer = topics.Uplink(CELL, "wear", "answer").topic
    births = [
        (topic, by.seal(Birth(1, 5, 5, by.public_key, "test", ("wear",)), topic))
        for by, topic in ((signer, status), (other, stranger))
    ]
    stick.write(file, [*births, (answer, signer.seal(Answer(1, 1, "joined", "ok", "", 5), answer))])

    def known() -> tuple[int, list[str]]:
        with closing(Journal(plant.state)) as journal:
            return journal.roster_size(), list(journal.ledger_lines())

    before = known()
    assert take(plant, file) == 1
    assert capsys.readouterr().out.count("only updates and votes come by file") == 3
    assert known() == before
    async with plant.service() as service:
        await until(lambda: not stick.waiting(plant.state))
        assert service.status()["refused"] == {"topic": 3}
        assert not service.status()["tasks"]["wear"]["gateways"]
    assert known()[0] == before[0]
