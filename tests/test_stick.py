"""Messages by file: what a file may be, and what the aggregator makes of one."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker import stick, topics
from broker.charter import Acceptance, CharterText
from broker.journal import Journal
from broker.ledger import bodies
from broker.messages import (
    MAX_PAYLOAD,
    Answer,
    Birth,
    ModelManifest,
    Receipt,
    Signer,
    Update,
    Vote,
    Whole,
    open_envelope,
)
from broker.roster import RosterPart
from broker.service import FILED
from edge.cli import main
from edge.handback import Fetch
from edge.identity import own_signer
from edge.stick import Stick
from edge.store import State
from models import codec
from models.errors import UserError
from models.spec import load_task
from models.width import slices
from tests.brokers import BrokerProcess
from tests.test_identity import gateway_toml
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
        (lambda _: stick.MAGIC + b"\x00\x01a\x00\x00\x00\x00" * (stick.MOST_MESSAGES + 1), "has more than 10000"),
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
            assert (await run("export", models, "--path", there[0].path))[0] == 0
            said = dict(stick.read(models))
            place = topics.RosterOf("press", 0).topic
            assert len(open_envelope(said[place], place, there[0].key, RosterPart).members) == 2
            assert topics.CharterInForce("press").topic not in said  # there is none
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
            assert text.count(f"{path}, wear: the update of round 1: counted\n") == 1
            assert receipts() == ["counted"]
            assert await run("import", updates) == (0, text.replace(": counted\n", ": counted before\n"))  # again
            for i, g in enumerate(there):
                g.send(plan, delta(i))
            await until(lambda: all((p := g.plan()) and p.state == "done" for g in there))
        assert (await run("export", models, "--path", path))[0] == 0
    found = [(where, payload) for where, payload in stick.read(models) if where.endswith(f"/receipt/{path}")]
    assert [bool(payload) for _, payload in found] == [True, False]  # the last one says whose file it is
    with closing(Journal(plant.state)) as journal:
        assert journal.counted("wear", 1).keys() == {str(path), *(str(g.path) for g in there)}
        assert journal.totals("wear", 1).gateways == 3


async def test_where_nobody_is_waited_for_a_file_of_an_earlier_round_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signer, path = Signer.generate(), CELL
    topic = topics.Uplink(path, "wear", "update").topic
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, rounds=12, more='mode = "async"\nbuffer = 1\n')
        command = ["-c", str(plant.config), "--state", str(plant.state)]
        async with gateways(broker.url, 1) as (there,), plant.service():
            first = await open_plan([there])
            assert (
                await asyncio.to_thread(
                    main, ["broker", "enrol", *command, "--path", str(path), "--key", signer.public_key.hex()]
                )
                == 0
            )
            updates = tmp_path / "late"
            update = Update(1, first.round, first.base, 100, None, codec.encode(delta(8), 32).data)
            stick.write(updates, [(topic, signer.seal(update, topic))])
            for number in (1, 2):
                there.send(await open_plan([there], number), delta(0))
            await open_plan([there], 3)
            assert await asyncio.to_thread(main, ["broker", "import", *command, str(updates)]) == 0
            assert ": the update of round 1: counted\n" in capsys.readouterr().out
            # The fourth is one that the file alone has brought about. One that comes nine rounds late is not counted.
            for number in range(4, 11):
                there.send(await open_plan([there], number), delta(0))
            await open_plan([there], 11)
            update = Update(1, 2, 1, 100, None, codec.encode(delta(8), 32).data)
            with closing(Journal(plant.state)) as journal:
                first_model = journal.model("wear", 1)
            assert first_model
            vote = Vote(1, 1, first_model.digest, 0, 0.8, 0.7, 40, "for", 1)  # long over
            ballot = topics.Uplink(path, "wear", "vote").topic
            stick.write(updates, [(topic, signer.seal(update, topic)), (ballot, signer.seal(vote, ballot))])
            assert await asyncio.to_thread(main, ["broker", "import", *command, str(updates)]) == 1
            out = capsys.readouterr().out
            assert ": NOT COUNTED: stale: trained from version 1 in round 2; this is 11, at most 8 later\n" in out
            assert ": a vote for version 1, which changes nothing\n" in out
    with closing(Journal(plant.state)) as journal:
        assert journal.totals("wear", 3) == (1, 100, 2.0)


async def test_what_was_learnt_from_a_lost_version_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An aggregator that was restored uses numbers of rounds and versions again."""
    signer, path = Signer.generate(), CELL
    topic = topics.Uplink(path, "wear", "update").topic
    with BrokerProcess("amqtt") as broker:
        plant = Plant(tmp_path, broker.url, min_gateways=1, rounds=12, more='mode = "async"\nbuffer = 2\n')
        command = ["-c", str(plant.config), "--state", str(plant.state)]
        async with gateways(broker.url, 1) as (there,), plant.service():
            plan = await open_plan([there])
            enrol = ["broker", "enrol", *command, "--path", str(path), "--key", signer.public_key.hex()]
            assert await asyncio.to_thread(main, enrol) == 0
            file = tmp_path / "cell.updates"
            for digest, code, says in (
                (b"lost", 1, f"refused: {path}, wear: unknown-model: trained from another version 0 than ours\n"),
                (plan.base_digest[:4], 0, ": the update of round 1: counted\n"),
            ):
                update = Update(1, plan.round, plan.base, 100, None, codec.encode(delta(8), 32).data, None)
                update = msgspec.structs.replace(update, base_digest=digest)
                stick.write(file, [(topic, signer.seal(update, topic))])
                assert await asyncio.to_thread(main, ["broker", "import", *command, str(file)]) == code
                assert says in capsys.readouterr().out


@pytest.mark.parametrize(("newest", "goes"), [(4, True), (5, False)])
def test_a_vote_goes_by_file_until_a_newer_model_is_here(tmp_path: Path, newest: int, goes: bool) -> None:  # noqa: FBT001
    config, out = gateway_toml(tmp_path, str(CELL)), tmp_path / "cell.updates"
    vote = Vote(1, 4, bytes(32), 3, 0.8, 0.7, 40, "for", 1)
    manifest = ModelManifest(1, newest, 1, 1, 1, 1, bytes(32), bytes(32), Whole(newest, (bytes(32),)))
    with closing(State(tmp_path / "cell")) as state:
        signer = own_signer(state)
        with state.transaction():
            state.put("vote/wear", msgspec.msgpack.encode(vote))
            state.put("manifest/wear", signer.seal(manifest, topics.Manifest("press", "wear").topic))
            state.record("session", {"path": str(CELL)})
    command = ["edge", "export", "-c", str(config), "--state", str(tmp_path / "cell"), "--updates", str(out)]
    assert main(command) == 0
    assert [topic.rsplit("/", 1)[-1] for topic, _ in stick.read(out)] == (["vote"] if goes else [])


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("a/b", "write acme/lyon/press/line4/cell2"),
        (str(CELL).replace("acme", "other"), "--path: 'other' does not take part; roots are: acme"),
        (str(CELL), f"--path: nobody is enrolled as {CELL}; enrol it first: tundish broker enrol"),
    ],
)
def test_export_is_for_one_who_is_enrolled(
    tmp_path: Path, path: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, file = Plant(tmp_path, NOWHERE), tmp_path / "models"
    command = ["broker", "export", "-c", str(plant.config), "--state", str(plant.state), "--path", path, str(file)]
    assert main(command) == 2
    assert says in capsys.readouterr().err
    assert not file.exists()


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


async def test_an_update_that_cannot_count_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its gateway keeps it until there is a receipt, so the aggregator gets the file."""
    plant, signer = Plant(tmp_path, NOWHERE), Signer.generate()
    enrol(plant, signer)
    topic = topics.Uplink(CELL, "wear", "update").topic
    envelope = signer.seal(Update(1, 1, 0, 100, None, codec.encode(np.ones(3, np.float32), 32).data), topic)
    stick.write(tmp_path / "updates", [(topic, envelope)])
    assert take(plant, tmp_path / "updates") == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"refused: {CELL}, wear: ")
    assert last.startswith("the aggregator counts nothing of it, and answers when it is started; import the file again")
    async with plant.service():
        await until(lambda: not stick.waiting(plant.state))
    with closing(Journal(plant.state)) as journal:
        ((where, answer),) = journal.receipts(str(CELL))
        assert open_envelope(answer, where, journal.signer().public_key, Receipt).outcome.startswith("refused-")


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
    text = capsys.readouterr().out
    assert text.count("only updates, votes and acceptances come by file") == 3
    assert text.endswith(f"nothing of {file} can be used, so the aggregator does not get it\n")
    assert known() == before
    assert not stick.waiting(plant.state)
    stick.leave(plant.state, file)  # the aggregator does not rely on that
    async with plant.service() as service:
        await until(lambda: not stick.waiting(plant.state))
        assert service.status()["refused"] == {"topic": 3}
        assert not service.status()["tasks"]["wear"]["gateways"]
    assert known()[0] == before[0]


CHARTER = """\
title = "One line"
purpose = "To foresee wear."
tasks = ["wear"]
members = ["acme"]
min_gateways = 3
retention = "Until the round is closed."
contributions = "By windows."
[privacy]
mode = "plain"
[model]
recipients = ["acme"]
terms = "None."
"""
DIGEST = hashlib.sha256(CHARTER.encode()).digest()


def with_charter(plant: Plant) -> str:
    """Put a charter beside an aggregator; return what federation.toml was without."""
    plain = plant.config.read_text()
    (plant.config.parent / "charter.toml").write_text(CHARTER)
    plant.config.write_text(plain.replace("[mqtt]", 'charter = "charter.toml"\n[mqtt]'))
    return plain


async def test_the_charter_in_force_goes_by_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant, file = Plant(tmp_path, NOWHERE), tmp_path / "models"
    plain = with_charter(plant)
    enrol(plant, Signer.generate())
    export = ["broker", "export", "-c", str(plant.config), "--state", str(plant.state), "--path", str(CELL), str(file)]
    for text in (CHARTER, ""):  # and that there is none any more
        assert await asyncio.to_thread(main, export) == 1  # no aggregator has put that in force yet
        assert "restart tundish broker run first" in capsys.readouterr().err
        (plant.state / "status.json").unlink(missing_ok=True)
        async with plant.service():
            await until(plant.has_status)
            assert await asyncio.to_thread(main, export) == 0
        # Ahead of what is held against them.
        (roster, _), (topic, sealed), *_ = stick.read(file)
        assert (roster, topic) == (topics.RosterOf("press", 0).topic, topics.CharterInForce("press").topic)
        with closing(Journal(plant.state)) as journal:
            assert open_envelope(sealed, topic, journal.signer().public_key, CharterText).text == text
        plant.config.write_text(plain)


def bad_words(good: bytes, word: str, signer: Signer) -> list[tuple[str, bytes]]:
    """What is no acceptance of this gateway: damaged, of others, for others, or of another kind."""
    elsewhere, root = word.replace("cell9", "cell8"), word.replace("acme", "corvid")
    said = Acceptance(1, DIGEST, 10)
    return [
        *((word, good[:i]) for i in range(0, len(good), 9)),
        *((word, good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]) for i in range(0, len(good), 7)),
        (word, Signer.generate().seal(said, word)), (word, signer.seal(said, elsewhere)), (elsewhere, good),
        (elsewhere, signer.seal(said, elsewhere)), (root, signer.seal(said, root)), (word, bytes(MAX_PAYLOAD)),
        (word, signer.seal(Acceptance(1, DIGEST * 2, 10), word)),
        (word, signer.seal(Answer(1, 1, "", "", "", 5), word)),
    ]  # fmt: skip


async def test_an_acceptance_comes_by_file_and_what_follows_goes_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant, signer, other = Plant(tmp_path, NOWHERE), Signer.generate(), bytes(32)
    with_charter(plant)
    enrol(plant, signer)
    word, where = topics.Accepted(CELL).topic, topics.Uplink(CELL, "wear", "update").topic
    envelope = signer.seal(Update(1, 1, 0, 100, None, codec.encode(delta(8), 32).data), where)
    update = where, envelope

    def accept(digest: bytes, time_ms: int) -> tuple[str, bytes]:
        return word, signer.seal(Acceptance(1, digest, time_ms), word)

    async def take_in(*messages: tuple[str, bytes]) -> list[str]:
        """The lines that `import` prints, once the aggregator has taken the file."""
        stick.write(tmp_path / "updates", messages)
        await asyncio.to_thread(take, plant, tmp_path / "updates")
        assert not stick.waiting(plant.state)
        return capsys.readouterr().out.splitlines()[:-1]

    async with plant.service() as service:

        def status() -> tuple[list[str], dict[str, int]]:
            return service.status()["charter"]["accepted"], service.status()["outcomes"]

        await until(plant.has_status)
        refused = f"refused: {CELL}, wear: charter: this gateway has not accepted the charter in force"
        accepted = f"{CELL}: accepts charter {DIGEST.hex()}"
        lines = await take_in(update, accept(other, 5), update)
        assert lines == [refused, f"{CELL}: accepts charter {other.hex()}", refused]
        hostile = bad_words(accept(DIGEST, 10)[1], word, signer)
        lines = await take_in(*hostile)
        assert len(lines) == len(hostile)
        assert all(line.startswith("refused: ") for line in lines)
        assert status() == ([], {})
        lines = await take_in(accept(DIGEST, 10), update)
        assert lines == [
            accepted,
            f"{CELL}, wear: an update of round 1, {len(envelope)} bytes",
            f"{CELL}, wear: the update of round 1: NOT COUNTED: unknown-round: the latest round is 0",
        ]
        assert status() == ([str(CELL)], {"unknown-round": 1})  # no round is open here, but it is looked for
        assert await take_in(accept(b"", 20)) == [f"{CELL}: accepts no charter"]
        # An old copy changes nothing, and what is in the file with it is refused.
        assert await take_in(accept(DIGEST, 10), update) == [f"{accepted}, which changes nothing", refused]
        assert status() == ([], {"unknown-round": 1})
    with closing(Journal(plant.state)) as journal:
        said = [body["digest"] for body in bodies(journal.ledger_lines(), "acceptance")]
    assert said == [other.hex(), DIGEST.hex(), ""]


def test_as_many_messages_as_may_be(tmp_path: Path) -> None:
    file, many = tmp_path / "stick", [("a", b"")] * stick.MOST_MESSAGES
    assert stick.write(file, many) == len(stick.read(file)) == stick.MOST_MESSAGES
    with pytest.raises(UserError, match="10001 messages, at most 10000"):
        stick.write(file, [*many, ("a", b"")])


def put(state: Path, messages: list[tuple[str, bytes]]) -> Path:
    """Leave a file there; return where it is."""
    before = set(stick.waiting(state))
    stick.write(state.parent / "file", messages)
    stick.leave(state, state.parent / "file")
    (left,) = set(stick.waiting(state)) - before
    return left


async def test_the_aggregator_takes_a_file_in_parts_and_deletes_it_after_the_last(tmp_path: Path) -> None:
    plant, count = Plant(tmp_path, NOWHERE), 3 * FILED + 1
    file = put(plant.state, [(topics.Status(CELL).topic, b"x")] * count)
    async with plant.service() as service:
        seen = {(0, True)}

        def look() -> bool:
            seen.add((service._refusals["topic"], file.exists()))
            return (count, False) in seen

        async with asyncio.timeout(40):
            while not look():  # noqa: ASYNC110 - every turn of the service's loop is looked at
                await asyncio.sleep(0)
    assert {taken for taken, _ in seen} >= {0, FILED, 2 * FILED, 3 * FILED, count}
    assert all(there for taken, there in seen if taken < count)


async def test_a_gateway_keeps_a_file_until_nothing_of_it_is_fetched(tmp_path: Path) -> None:
    piece = topics.Chunk("press", "wear", 1, "c0").topic
    first, second = (
        put(tmp_path / "state", [("a/b", b"1"), (piece, b"x"), ("a/c", b"")]),
        put(tmp_path / "state", [("a/b", b"2")]),
    )
    heard, state = list[bytes](), State(tmp_path / "state")

    def gateway() -> Stick:
        heard.clear()
        return Stick(tmp_path / "state", state, lambda *_: None, lambda inbound: heard.append(inbound.payload))

    taken = gateway()
    await taken.tick(busy=False)
    assert heard == [b"1"]
    await taken.tick(busy=True)
    assert heard == [b"1", b"2"]
    assert stick.waiting(tmp_path / "state") == [first, second]
    taken = gateway()  # as after a power cut
    await taken.tick(busy=False)
    await taken.tick(busy=True)
    taken.subscribe(piece)
    await asyncio.sleep(0)
    assert heard == [b"1", b"2", b"x"]
    await taken.tick(busy=False)
    assert stick.waiting(tmp_path / "state") == []
    await taken.tick(busy=False)
    assert heard == [b"1", b"2", b"x"]


async def test_a_large_file_lets_the_gateway_go_on(tmp_path: Path) -> None:
    put(tmp_path / "state", [("a/b", b"x")] * 1000)
    turns, at = 0, list[int]()
    gateway = Stick(tmp_path / "state", State(tmp_path / "state"), lambda *_: None, lambda _: at.append(turns))
    taken = asyncio.create_task(gateway.tick(busy=False))
    while not taken.done():
        await asyncio.sleep(0)
        turns += 1
    assert max(at.count(turn) for turn in at) == 64
    assert len(at) == 1000


def test_what_the_disk_refuses_stays_and_what_is_damaged_is_put_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")  # whoever ran a command in this process may have set it otherwise
    good, inbox = put(tmp_path / "state", MESSAGES), stick.Inbox(tmp_path / "state")
    damaged, refused = good.with_name("1"), good.with_name("2")
    damaged.write_bytes(good.read_bytes()[:-1])
    refused.symlink_to("/proc/self/mem")  # reading its first page is EIO, as from a disk that fails
    assert inbox.next() == (good, MESSAGES)
    assert inbox.next() is None
    assert [record.message.partition(": ")[0] for record in caplog.records] == [
        str(damaged),
        f"{refused} can't be read, and stays",
    ]
    assert "is damaged" in caplog.records[0].message
    assert {path.name for path in good.parent.iterdir()} == {good.name, "1.bad", "2"}
    refused.unlink()
    refused.write_bytes(good.read_bytes())
    assert inbox.next() == (refused, MESSAGES)
    caplog.clear()
    refused.unlink()
    refused.mkdir()
    inbox.delete(refused)
    inbox.delete(refused)
    assert len(caplog.records) == 1
    assert "can't be deleted" in caplog.text
    inbox.delete(good)
    assert not good.exists()


async def test_an_inbox_that_is_none_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")  # whoever ran a command in this process may have set it otherwise
    plant = Plant(tmp_path, NOWHERE)
    inbox = plant.state / stick.INBOX
    inbox.write_text("")
    async with plant.service():
        await until(lambda: "inbox can't be read" in caplog.text)
        inbox.unlink()
        file = put(plant.state, [(topics.Status(CELL).topic, b"x")])
        await until(lambda: not file.exists())
    assert caplog.text.count("inbox can't be read") == 1
    gateway = Stick(tmp_path / "cell", State(tmp_path / "cell"), lambda *_: None, lambda _: None)
    (tmp_path / "cell" / stick.INBOX).write_text("")
    await gateway.tick(busy=False)
    assert caplog.text.count("inbox can't be read") == 2
    with pytest.raises(UserError, match="can't be written"):
        stick.leave(tmp_path / "cell", tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_leaves_belongs_to_the_owner_of_the_state(tmp_path: Path) -> None:
    state, target = tmp_path / "state", tmp_path / "root's"
    state.mkdir()
    target.mkdir()
    os.chown(state, 4711, 4711)
    file = put(state, MESSAGES)
    assert (file.stat().st_uid, file.parent.stat().st_uid) == (4711, 4711)
    file.unlink()
    file.parent.rmdir()
    file.parent.symlink_to(target)
    with pytest.raises(UserError, match="can't be written"):
        stick.leave(state, tmp_path / "file")
    assert (list(target.iterdir()), target.stat().st_uid) == ([], 0)
