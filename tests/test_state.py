"""Which folder is whose state: commands with a wrong one say so, and begin nothing new there."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from broker import alone, stick, topics
from broker.config import load_federation
from broker.folder import owned
from broker.journal import Journal
from broker.messages import FederationBirth, Signer, Vote, peek
from broker.pki import Authority
from edge.cli import main
from edge.lab.processes import free_port
from edge.stick import Stick
from edge.store import State
from models.errors import LocalError, UserError
from tests.brokers import BrokerProcess
from tests.test_identity import HERE, THERE, Operator, gateway_toml
from tests.test_service import Plant, broker, gateways, until

__all__ = ["broker"]

KEY = "ab" * 32
BROKER = [
    ["enrol", "--path", HERE, "--key", KEY],
    ["enrol", "--path", HERE, "--revoke"],
    ["enrol", "--path", HERE],
    ["acl", "--out", "mosquitto"],
    ["release", "--to", "canary"],
    ["rollback"],
    ["import", "cell.updates"],
    ["export", "--path", HERE, "cell.models"],
]


@pytest.mark.parametrize("command", BROKER, ids=" ".join)
@pytest.mark.parametrize("there", ["empty", "missing"])
def test_a_command_with_a_wrong_state_begins_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], there: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    office, wrong = Operator(tmp_path / "office"), tmp_path / "wrong"
    if there == "empty":
        wrong.mkdir()
    options = ["broker", *command, "-c", str(office.config), "--state", str(wrong)]
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--state: no aggregator has its state in {wrong}; write the --state of tundish broker init and run" in err
    assert wrong.is_dir() == (there == "empty")
    assert not list(wrong.glob("*"))
    # Once the certificate says where the state is, so does the line; and neither `init` nor `run` begins another one.
    pki = Authority.create(tmp_path / "right" / "pki", "press-lines", ["localhost"]).folder
    tls = f'ca = "{pki}/ca.pem"\ncert = "{pki}/aggregator.pem"\nkey = "{pki}/aggregator.key"\n'
    office.config.write_text(office.config.read_text().replace('"mqtts://localhost"\n', f'"mqtts://localhost"\n{tls}'))
    for verb in (command, ["init"], ["run"]):
        assert main(["broker", *verb, *options[-4:]]) == 2
        assert capsys.readouterr().err.endswith(f"; write --state {tmp_path / 'right'}\n")
    assert not list(wrong.glob("*"))


def test_status_of_a_wrong_state_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    office, wrong = Operator(tmp_path / "office"), tmp_path / "wrong"
    options = ["status", "-c", str(office.config), "--state"]
    assert main(["broker", *options, str(wrong)]) == 2
    says = (
        f"tundish: --state: no aggregator ever ran with its state in {wrong}; write the --state of tundish broker run\n"
    )
    assert capsys.readouterr().err == says
    assert office.run("init", "--host", "localhost") == 0
    assert main(["broker", *options, str(office.state)]) == 1
    assert capsys.readouterr().err.endswith(
        f"no aggregator has run yet with its state in {office.state}; start it: tundish broker run\n"
    )


def test_a_key_for_releases_needs_no_state(tmp_path: Path) -> None:
    office = Operator(tmp_path)
    assert main(["broker", "release", "--new-key", str(tmp_path / "k"), "-c", str(office.config), "--state", "no"]) == 0
    assert (tmp_path / "k").is_file()


def test_a_gateway_runs_for_as_long_as_its_state_is_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = {
        "path": "a/b/c/d/e", "time_ms": int(time.time() * 1000), "running": True, "resident_mb": 1, "outbox": 0,
        "mqtt": {"connected": True, "version": "5", "error": ""}, "sources": {}, "tasks": {}, "problem": "",
        "refused": {}, "store_error": "", "store_notice": "", "samples_dropped": 0,
    }  # fmt: skip
    command = ["edge", "status", "--state", str(tmp_path)]

    def shown() -> tuple[int, str]:
        (tmp_path / "status.json").write_text(json.dumps(status))
        return main(command), capsys.readouterr().out

    state = State(tmp_path)
    assert shown()[0] == 1  # what it said is new, and it is gone
    state.claim()
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alive"]
    assert shown()[1].startswith("a/b/c/d/e: running (")
    status["time_ms"] = int(time.time() * 1000) - 60_000
    assert (shown()[0], shown()[1].split(" (")[0]) == (0, "a/b/c/d/e: running, BUT SILENT")
    (tmp_path / "status.json").unlink()
    assert main(command) == 1
    assert "is starting; its log says" in capsys.readouterr().err
    # A look at it for a moment keeps no gateway from starting.
    with (tmp_path / "lock").open() as look:
        state.close()
        fcntl.flock(look, fcntl.LOCK_SH)
        threading.Timer(0.03, look.close).start()
        after = State(tmp_path)
        after.claim()
        after.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("room", ["broker", "edge"])
def test_the_status_of_a_state_that_is_anothers_is_told_in_one_line(tmp_path: Path, room: str) -> None:
    folder = tmp_path / "state"
    folder.mkdir(0o700)
    (folder / "status.json").write_text("{}")
    # This user may not be able to read the program's own files.
    program = "import os, broker.cli, edge.cli, edge.config, edge.status_command; os.setuid(65534); "
    program += f"raise SystemExit(edge.cli.main(['{room}', 'status', '--state', '{folder}']))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stderr == f"tundish: {folder}: Permission denied; run this as the user who owns that folder\n"
    assert done.returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_doctor_who_may_not_read_the_state_says_so(tmp_path: Path) -> None:
    folder, toml = tmp_path / "state", gateway_toml(tmp_path / "cell")
    folder.mkdir(0o700)
    program = f"""
import asyncio, os
from pathlib import Path
from edge import doctor
from edge.config import load_config
config = load_config(Path("{toml}"))
os.setuid(65534)
print(asyncio.run(doctor._collect(doctor.federation(config, Path("{folder}")))))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert f"{folder}: Permission denied; run this as the user who owns that folder" in done.stdout
    assert "report this" not in done.stdout


async def test_a_second_federation_of_a_name_is_not_begun(broker: BrokerProcess, tmp_path: Path) -> None:
    """By the real command: a running aggregator, and one that is stopped, whose status outlives it."""
    plant, wrong = Plant(tmp_path, broker.url, min_gateways=1), tmp_path / "wrong"
    plant.config.write_text(plant.config.read_text().replace("[mqtt]", '[mqtt]\nclient_id = "mine"'))
    command = [sys.executable, "-m", "broker.cli", "run", "-c", str(plant.config), "--state", str(wrong)]
    topic = topics.FederationStatus("press").topic

    async def refused() -> str:
        child = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, err = await asyncio.wait_for(child.communicate(), 60)
        assert child.returncode == 2
        return err.decode().splitlines()[-1]

    with closing(Journal(plant.state)) as journal:
        key = journal.signer().public_key
    async with gateways(broker.url, 1) as there:
        async with plant.service():
            await until(lambda: topic in there[0].heard)
            says = f"{wrong} is new, but {broker.url} has federation press of the key {key.hex()}; write the --state"
            assert says in await refused()
            # Nobody was thrown off, by the client id that both have in their files neither.
            assert there[0].ups == 1
            assert [peek(one, FederationBirth).state for one in there[0].heard[topic]] == ["up"]
        said = there[0].heard[topic]
        await until(lambda: peek(said[-1], FederationBirth).state == "down")
        assert says in await refused()
        assert {peek(one, FederationBirth).public_key for one in said} == {key}
        assert not wrong.exists()
        # What can't be read may be of a later version, or of one who lost a key: somebody is there.
        good, config, own = said[-1], load_federation(plant.config), Signer.generate().public_key
        bad = (b"rubbish", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), b"")
        for payload in bad:
            there[0].link.publish(topic, payload, retain=True)
            await until(lambda payload=payload: said[-1] == payload)  # type: ignore[misc]
            if payload:
                with pytest.raises(UserError, match=f"has something on {topic} that can't be read.*lost state"):
                    await alone.check_alone(config, wrong, own, lambda: False)
        # Once nothing is retained, whoever asks is alone.
        assert await alone.check_alone(config, wrong, own, lambda: False)
        assert not await alone.check_alone(config, wrong, own, lambda: True)


def test_a_refused_first_start_leaves_what_was_there(tmp_path: Path) -> None:
    def refused(folder: Path, path: str = "") -> list[str]:
        with contextlib.suppress(UserError), owned(folder) as journal:
            (folder / "status.json").write_text("{}")
            with journal.transaction():
                if path:
                    journal.add_to_roster(path, bytes(32), 1, "enrolled")
            raise UserError("--state", 0, "", "is wrong", "write another")
        return sorted(path.name for path in folder.glob("*"))

    folder = tmp_path / "state"
    assert refused(folder) == []
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine").touch()
    assert refused(folder) == ["mine"]
    assert refused(folder, HERE) == ["journal.db", "lock", "mine", "status.json"]  # somebody was let in
    assert refused(folder) == ["journal.db", "lock", "mine", "status.json"]  # it was there before


def test_who_starts_while_a_refused_start_is_cleared_away_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    with contextlib.suppress(UserError), owned(folder):
        second = Journal(folder)  # which has the files open that go now
        raise UserError("--state", 0, "", "is wrong", "write another")
    with closing(second), pytest.raises(LocalError, match="was deleted by another start that was refused; start again"):
        second.claim()
    with owned(folder) as journal:
        assert journal.roster_size() == 0


def test_a_run_before_init_is_told_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    office = Operator(tmp_path)
    plain = office.config.read_text()
    text = plain.replace('"mqtts://localhost"\n', '"mqtts://localhost"\nca = "pki/ca.pem"\n')
    office.config.write_text(text)
    line = text.splitlines().index('ca = "pki/ca.pem"') + 1
    for verb in ("run", "init"):
        assert main(["broker", verb, "-c", str(office.config), "--state", str(office.state)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(
            f"tundish: {office.config}:{line}: mqtt.ca: no file {tmp_path}/pki/ca.pem; check the path"
        )
        assert err.endswith("makes ca, cert and key, and prints these lines: leave them out until then\n")
    assert not office.state.exists()
    office.config.write_text(f'{plain}[enrolment]\nlisten = "127.0.0.1:8443"\n')
    for command in (["run"], ["enrol", "--path", HERE]):
        assert main(["broker", *command, "-c", str(office.config), "--state", str(office.state)]) == 2
        assert "tundish broker init" in capsys.readouterr().err
    assert not office.state.exists()
    # And without these lines, where the MQTT broker is not there, or has another certificate.
    office.config.write_text(plain.replace("localhost", f"localhost:{free_port()}"))
    command = [sys.executable, "-m", "broker.cli", "run", "-c", str(office.config), "--state", str(office.state)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr
        assert "needs tundish broker init first" in child.stderr.readline()
        child.kill()


async def test_a_first_start_goes_on_until_the_mqtt_broker_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = BrokerProcess("amqtt")  # not started yet
    plant = Plant(tmp_path, broker.url, min_gateways=1)
    shutil.rmtree(plant.state)
    listen = free_port()
    assert main(["broker", "init", "--host", "127.0.0.1", "-c", str(plant.config), "--state", str(plant.state)]) == 0
    with plant.config.open("a") as file:
        file.write(f'[enrolment]\nlisten = "127.0.0.1:{listen}"\nhost = "127.0.0.1"\n')
    process = await plant.process()
    try:
        await until(plant.has_status)
        status = plant.status()
        assert (status["connected"], status["tasks"]["wear"]["version"]) == (False, 0)
        assert "first start: it waits for the MQTT broker, to see" in status["mqtt"]["error"]
        assert main(["broker", "status", "--state", str(plant.state)]) == 0
        assert "running, first start: it waits for the MQTT broker" in capsys.readouterr().out
        _, writer = await asyncio.open_connection("127.0.0.1", listen)  # who has a token may enrol
        writer.close()
        # Nothing was said before there was anybody to ask; then it was asked, once.
        with broker:
            await until(lambda: plant.status()["connected"])
            with closing(Journal(plant.state)) as journal:
                assert journal.has_looked()
    finally:
        process.terminate()
        await process.wait()
    # A later start waits for nobody.
    process = await plant.process()
    try:
        await until(lambda: plant.status()["pid"] == process.pid)
        assert "first start" not in plant.status()["mqtt"]["error"]
    finally:
        process.terminate()
        await process.wait()


class Cell:
    """A gateway that was enrolled by two files, and the aggregator that did it: the real commands all the way."""

    def __init__(self, folder: Path, federation: str = "press") -> None:
        office, self.folder = folder / "office", folder / "cell"
        office.mkdir(parents=True)
        self.plant = Plant(office, "mqtt://127.0.0.1:1", join="enrolled")
        self.plant.config.write_text(self.plant.config.read_text().replace('"press"', f'"{federation}"'))
        self.toml, self.state = gateway_toml(self.folder), self.folder / "state"
        self.models, self.updates = folder / "cell.models", folder / "cell.updates"
        self.request, self.admission = folder / "cell.request", folder / "cell.admission"
        assert self.broker("init") == 0
        assert self.edge("export", "--request", self.request) == 0
        assert self.broker("enrol", "--path", HERE, "--request", self.request, "--out", self.admission) == 0
        assert self.edge("import", self.admission) == 0
        assert self.broker("export", "--path", HERE, self.models) == 0
        assert self.edge("export", "--updates", self.updates) == 0

    def broker(self, verb: str, *options: object) -> int:
        return main(
            ["broker", verb, "-c", str(self.plant.config), "--state", str(self.plant.state), *map(str, options)]
        )

    def edge(self, verb: str, *options: object, state: Path | None = None) -> int:
        return main(["edge", verb, *map(str, options), "-c", str(self.toml), "--state", str(state or self.state)])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """One line, and no other word."""
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


async def test_a_file_that_comes_twice_has_nothing_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell(tmp_path)
    capsys.readouterr()
    assert cell.edge("import", cell.models) == 0
    assert "messages; the gateway takes them within a second" in capsys.readouterr().out
    with closing(State(cell.state)) as state:
        gateway = Stick(cell.state, state, lambda *_: None, lambda _: None)
        for _ in range(2):
            await gateway.tick(busy=False)
        assert not stick.waiting(cell.state)
    assert cell.edge("import", cell.models) == 0
    assert capsys.readouterr().out.startswith("nothing new in it: ")
    assert stick.waiting(cell.state)  # a gateway that was restarted since knows no plan any more
    assert cell.broker("enrol", "--path", THERE, "--key", KEY) == 0  # the roster is another one from now on
    assert cell.broker("export", "--path", HERE, cell.models) == 0
    capsys.readouterr()
    assert cell.edge("import", cell.models) == 0
    assert "nothing new" not in capsys.readouterr().out


def test_a_wrong_file_is_not_left_to_a_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell, twin, other = Cell(tmp_path), Cell(tmp_path / "twin"), Cell(tmp_path / "other", "other-lines")
    signer, wrong = Signer.generate(), tmp_path / "wrong"
    topic = topics.Uplink(topics.GatewayPath.parse(HERE), "wear", "vote").topic
    stick.write(cell.updates, [(topic, signer.seal(Vote(1, 1, bytes(32), 0, 1.0, 1.0, 9, "for", 1), topic))])
    assert cell.broker("enrol", "--path", THERE, "--key", KEY) == 0
    assert cell.broker("export", "--path", THERE, tmp_path / "neighbour") == 0
    receipt = topics.ReceiptFor("press", "wear", topics.GatewayPath.parse(THERE)).topic
    stick.write(tmp_path / "answered", [*stick.read(cell.models), (receipt, b"x")])
    stick.write(tmp_path / "none", [])
    stick.write(tmp_path / "odd", [("a/b", b"x")])
    whole = cell.models.read_bytes()
    (tmp_path / "half").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "head").write_bytes(whole[:9])
    capsys.readouterr()
    for file, says in (
        (cell.updates, "holds what a gateway says to the aggregator, which takes it by tundish broker import; give"),
        (other.models, "is of federation other-lines, this gateway follows press; give"),
        (twin.models, "has no model that is signed by the key "),
        (tmp_path / "answered", f"is for {THERE}, this is {HERE}; give"),
        (tmp_path / "neighbour", f"is for {THERE}, this is {HERE}; give"),
        (tmp_path / "none", "holds no message; give"),
        (tmp_path / "odd", "is damaged: "),
        (tmp_path / "half", "is damaged, or not all there; copy it again"),
        (tmp_path / "head", "is no admission of a gateway; give the file that holds"),
        (cell.request, "is no admission of a gateway"),
        (tmp_path / "missing", "can't be read: No such file or directory; check the name"),
        (twin.admission, "its certificate is for another key than this gateway has now"),
    ):
        assert cell.edge("import", file) == 2, file
        assert f"tundish: {file}: {says}" in refused(capsys)
    assert not stick.waiting(cell.state)
    for command in (["import", cell.models], ["import", cell.admission], ["export", "--updates", tmp_path / "x"]):
        assert cell.edge(*command, state=wrong) == 2  # type: ignore[arg-type]
        assert f"--state: no gateway has its state in {wrong}; write the --state that tundish edge" in refused(capsys)
        assert not wrong.exists()
    gateway_toml(cell.folder, THERE)
    assert cell.edge("import", cell.models) == 2
    assert f"{cell.state} is the state of {HERE}, this gateway is {THERE}" in refused(capsys)
    for file in (cell.models, other.models):
        assert cell.broker("import", file) == 2
        assert "which take it by tundish edge import; give what tundish edge export --updates wrote" in refused(capsys)


def test_a_gateway_that_trusts_nobody_takes_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cell, new = Cell(tmp_path), tmp_path / "new"
    assert cell.edge("export", "--request", tmp_path / "again", state=new) == 0
    capsys.readouterr()
    assert cell.edge("import", cell.models, state=new) == 2
    assert "this gateway trusts no federation yet; enrol it first: tundish edge export --request" in refused(capsys)
