"""`tundish edge doctor` on real servers and brokers: what is healthy, and every failure with its remedy."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from broker.diagnose import Step, look
from broker.settings import MqttSettings
from edge import doctor
from edge.cli import main
from edge.config import load_config
from edge.drivers.modbus import diagnose as diagnose_modbus
from edge.drivers.opcua import diagnose as diagnose_opcua
from edge.lab.processes import free_port, mosquitto_path
from edge.store import State
from tests.brokers import BrokerProcess, need_mosquitto
from tests.opcua_rigs import PASSWORD, USER, AsyncuaPlant, source, tag
from tests.rigs import ModbusRig, OpcuaRig, RtuRig, until
from tests.test_propose import TASK

shared = pytest.mark.asyncio(loop_scope="module")


async def all_of(steps: AsyncIterator[Step]) -> list[Step]:
    return [step async for step in steps]


def failures(steps: list[Step]) -> list[tuple[str, str]]:
    return [(step.name, step.text) for step in steps if step.ok is False]


def only(steps: list[Step], name: str, *words: str) -> None:
    """One step failed, this one, with these words; a failure is the last step unless it is a tag's."""
    ((failed, text),) = failures(steps)
    assert failed == name
    for word in words:
        assert word in text
    assert name == "tag" or steps[-1].name == name


# -- OPC UA ------------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plc(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncuaPlant]:
    made = AsyncuaPlant(tmp_path_factory.mktemp("plc"))
    await made.start()
    await made.add("A", 1.5)
    try:
        yield made
    finally:
        await made.stop()


@shared
async def test_a_healthy_server_and_a_bad_node(plc: AsyncuaPlant) -> None:
    steps = await all_of(diagnose_opcua(source(plc, tag("A"))))
    assert failures(steps) == []
    assert [step.name for step in steps] == [
        "name", "tcp", "endpoints", "security", "user", "connect", "clock", "value"
    ]  # fmt: skip
    assert steps[-1].text.startswith("1 of 1 tags; plc/A = 1.5, ")
    steps = await all_of(diagnose_opcua(source(plc, tag("A"), tag("Nope"))))
    only(steps, "tag", "plc/Nope: the server refuses nsu=urn:rig;s=Nope: BadNodeIdUnknown; check the address column")


@shared
async def test_certificates_policies_and_users(plc: AsyncuaPlant, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"pki": tmp_path, "security": "Basic256Sha256:SignAndEncrypt"}
    only(await all_of(diagnose_opcua(source(plc, tag("A"), **asked))), "certificate", "not trusted", "SHA-256", "move ")
    (rejected,) = (tmp_path / "rejected").iterdir()
    rejected.rename(tmp_path / "trusted" / rejected.name)
    only(await all_of(diagnose_opcua(source(plc, tag("A"), **asked))), "connect", "refuses this gateway's certificate")
    own = x509.load_der_x509_certificate((tmp_path / "own" / "cert.der").read_bytes())
    await plc.trust(own)
    assert failures(await all_of(diagnose_opcua(source(plc, tag("A"), **asked)))) == []
    password = tmp_path / "password"
    password.write_text("wrong")
    asked |= {"user": USER, "password_file": str(password)}
    only(await all_of(diagnose_opcua(source(plc, tag("A"), **asked))), "connect", "refuses the user; check user")
    password.write_text(PASSWORD)
    assert failures(await all_of(diagnose_opcua(source(plc, tag("A"), **asked)))) == []


async def test_a_policy_that_is_not_offered_and_a_wrong_place() -> None:
    rig = OpcuaRig()
    await rig.start()
    try:
        plain: Any = rig
        steps = await all_of(diagnose_opcua(source(plain, tag("A"), security="Basic256Sha256:Sign")))
        only(steps, "security", "no endpoint Basic256Sha256:Sign, it offers None", 'write security = "None"')
    finally:
        await rig.stop()
    steps = await all_of(diagnose_opcua(rig.source))
    only(steps, "tcp", "refuses connections; check the port")
    lost: Any = type("Lost", (), {"port": 4840})
    made = source(lost, tag("A"))
    url = "opc.tcp://no-such-host.invalid:4840"
    steps = await all_of(diagnose_opcua(type(made)(name="plc", driver="opcua", url=url, tags=made.tags)))
    only(steps, "name", "no-such-host.invalid is unknown", "mend the name service")


# -- Modbus ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ModbusRig, RtuRig])
async def test_modbus(kind: type[ModbusRig]) -> None:
    rig = kind()
    await rig.start()
    try:
        steps = await all_of(diagnose_modbus(rig.source))
        only(steps, "tag", "plc/missing: the device answers ILLEGAL_ADDRESS for holding:4; check the address column")
        assert [step.name for step in steps][-3:] == ["connect", "tag", "value"]
        rig.silent.add(1)
        steps = await all_of(diagnose_modbus(rig.source))
        only(steps, "connect", "did not answer within 0.5 s; check", "device_id = 1")
    finally:
        await rig.stop()
    name, words = ("port", "is not there") if kind is RtuRig else ("tcp", "refuses connections")
    only(await all_of(diagnose_modbus(rig.source)), name, words)


# -- the broker --------------------------------------------------------------------------------------------------------


class Mosquitto(BrokerProcess):
    """Mosquitto with lines of its own configuration."""

    def __init__(self, folder: Path, *lines: str) -> None:
        super().__init__("mosquitto")
        self._file = folder / "mosquitto.conf"
        # Started by root, it would read its files as another user, who can't.
        text = [f"listener {self.port} 127.0.0.1", "persistence false", "user root", *lines, ""]
        self._file.write_text("\n".join(text))

    def _command(self) -> list[str]:
        return [mosquitto_path() or "mosquitto", "-c", str(self._file)]


def issue(folder: Path, name: str, ca: Any = None, host: str = "localhost", days: int = 1) -> Any:
    """Write NAME.pem and NAME.key, signed by `ca` or by itself; return both for the next one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    end = datetime.now(UTC) + timedelta(days=days)
    builder = (
        x509.CertificateBuilder(
            ca[0].subject if ca else subject, subject, key.public_key(), x509.random_serial_number()
        )
        .not_valid_before(end - timedelta(days=30))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
    )
    certificate = builder.sign(ca[1] if ca else key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pkcs8, bare = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, pkcs8, bare))
    return certificate, key


PROBE = "a/b/c/d/e/_fl/doctor/probe"


async def broker(port: int, **settings: Any) -> list[Step]:
    scheme = "mqtts" if "ca" in settings else "mqtt"
    host = settings.pop("host", "localhost")
    return await all_of(look(MqttSettings(url=f"{scheme}://{host}:{port}", **settings), ["_fl/+/status"], PROBE))


async def test_an_open_broker_hears_one_empty_message_that_is_not_retained(tmp_path: Path) -> None:
    need_mosquitto()
    heard: list[tuple[str, bytes]] = []
    with Mosquitto(tmp_path, "allow_anonymous true") as made:
        client = paho.Client(CallbackAPIVersion.VERSION2)
        client.on_message = lambda _c, _u, m: heard.append((m.topic, bytes(m.payload)))
        client.connect("127.0.0.1", made.port)
        client.subscribe("#")
        client.loop_start()
        steps = await broker(made.port)
        assert [step.name for step in steps] == ["name", "tcp", "connack", "subscribe", "publish", "aggregator"]
        assert failures(steps) == []
        assert steps[-1].ok is None
        assert steps[-1].text.startswith("nothing is retained on _fl/+/status: no aggregator has been there yet, or ")
        client.publish("_fl/press/status", b"up", qos=1, retain=True).wait_for_publish(20)
        steps = await broker(made.port)
        assert (steps[-1].name, steps[-1].ok) == ("aggregator", True)
        assert "_fl/press/status" in steps[-1].text
        client.publish("end", b"", qos=1)
        await until(lambda: ("end", b"") in heard)
        client.disconnect()
        client.loop_stop()
        assert heard == [(PROBE, b""), ("_fl/press/status", b"up"), (PROBE, b""), ("end", b"")]
    only(await broker(made.port), "tcp", "refuses connections")


async def test_a_311_broker_is_found_and_says_nothing_of_publishing() -> None:
    with BrokerProcess("amqtt") as made:
        steps = await broker(made.port)
    assert failures(steps) == []
    assert "MQTT 3.1.1" in steps[-1].text


async def test_wrong_password_and_acl(tmp_path: Path) -> None:
    need_mosquitto()
    (tmp_path / "users").write_text("")
    tool = shutil.which("mosquitto_passwd") or "/usr/bin/mosquitto_passwd"
    made_it = await asyncio.create_subprocess_exec(tool, "-b", tmp_path / "users", "gw", "right")
    assert await made_it.wait() == 0
    (tmp_path / "acl").write_text("user gw\ntopic read _fl/#\n")
    lines = ("allow_anonymous false", f"password_file {tmp_path / 'users'}", f"acl_file {tmp_path / 'acl'}")
    word = tmp_path / "word"
    with Mosquitto(tmp_path, *lines) as made:
        only(await broker(made.port), "connack", "refuses: Not authorized", "check username, password_file")
        word.write_text("wrong")
        asked = {"username": "gw", "password_file": str(word)}
        only(await broker(made.port, **asked), "connack", "check username, password_file")
        word.write_text("right")
        steps = await broker(made.port, **asked)
        only(steps, "publish", f"{PROBE} is refused (Not authorized); allow writing a/b/c/d/e/# in the broker's ACL")


async def test_tls(tmp_path: Path) -> None:
    need_mosquitto()
    ca, other = issue(tmp_path, "ca"), issue(tmp_path, "other")
    issue(tmp_path, "server", ca)
    issue(tmp_path, "old", ca, days=-1)
    issue(tmp_path, "gw", ca)
    issue(tmp_path, "stranger", other)
    lines = [f"cafile {tmp_path / 'ca.pem'}", "allow_anonymous true"]
    names = {"ca": str(tmp_path / "ca.pem")}

    def serve(name: str, *more: str) -> Mosquitto:
        return Mosquitto(tmp_path, *lines, f"certfile {tmp_path}/{name}.pem", f"keyfile {tmp_path}/{name}.key", *more)

    with serve("server") as made:
        assert failures(await broker(made.port, **names)) == []
        only(await broker(made.port), "connack", "wants TLS on this port; write mqtts:// in url")
        unknown = str(tmp_path / "other.pem")
        only(await broker(made.port, ca=unknown), "tls", f"from no CA in {unknown}", "write ca = ")
        only(await broker(made.port, host="127.0.0.1", **names), "tls", "is not for 127.0.0.1; write the host in url")
    with serve("old") as made:
        only(await broker(made.port, **names), "tls", "has expired; renew it there, or check this gateway's clock")
    with serve("server", "require_certificate true") as made:
        only(await broker(made.port, **names), "connack", "a client certificate is missing; check cert and key")
        mine = {key: str(tmp_path / f"gw.{end}") for key, end in (("cert", "pem"), ("key", "key"))}
        assert failures(await broker(made.port, **names, **mine)) == []
        wrong = {key: str(tmp_path / f"stranger.{end}") for key, end in (("cert", "pem"), ("key", "key"))}
        only(
            await broker(made.port, **names, **wrong), "connack", "a client certificate is refused; check cert and key"
        )
    with Mosquitto(tmp_path, "allow_anonymous true") as made:
        only(await broker(made.port, **names), "tls", "no TLS with localhost", "write mqtt:// if this port has no TLS")


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "x.csv").write_text("x\n1.5\n")
    (tmp_path / "tags.csv").write_text("tag,address\nx,x\n")
    with BrokerProcess("amqtt") as made:
        replay = '[[source]]\nname = "{}"\ndriver = "replay"\nurl = "{}"\ntags = "tags.csv"\n'
        (tmp_path / "gateway.toml").write_text(
            f'[gateway]\npath = "a/b/c/d/e"\n[mqtt]\nurl = "{made.url}"\nversion = "3.1.1"\n'
            + replay.format("one", "x.csv") + replay.format("two", "y.csv")
            + f'[[source]]\nname = "line"\ndriver = "modbus"\nurl = "modbus+rtu://{tmp_path}/tty"\ntags = "line.csv"\n'
        )  # fmt: skip
        (tmp_path / "line.csv").write_text("tag,address\nr,holding:1\n")
        yield tmp_path / "gateway.toml"


def test_the_command_says_a_line_a_step_in_the_order_of_the_file(
    gateway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["edge", "doctor", "-c", str(gateway), "--state", str(gateway.parent / "state")]
    assert main([*command, "--source", "one"]) == 0
    assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "one", "file"], ["ok", "one", "connect"], ["note", "one", "connect"], ["ok", "one", "value"]
    ]  # fmt: skip
    assert main(command) == 1
    out, err = capsys.readouterr()
    order = [line.split()[1] for line in out.splitlines()]
    assert list(dict.fromkeys(order)) == ["gateway", "one", "two", "line", "broker"]
    assert f"FAIL  two          file         no file {gateway.parent}/y.csv; check the path" in out
    assert f"FAIL  line         port         {gateway.parent}/tty is not there; check the adapter" in out
    assert err == f"2 of {len(order)} steps failed\n"
    assert main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [step["of"] for step in found["steps"]] == order
    assert main([*command, "--source", "three"]) == 2
    assert capsys.readouterr().err == "tundish: --source: no source 'three'; write one of: one, two, line\n"


def test_a_gateway_that_runs_keeps_its_serial_line_to_itself(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gateway.parent / "state"
    state = State(folder)
    state.claim()
    try:
        assert main(["edge", "doctor", "-c", str(gateway), "--state", str(folder), "--source", "line"]) == 0
        assert "note  line         port         the running gateway has the line" in capsys.readouterr().out
    finally:
        state.close()


async def test_a_source_that_never_ends_is_cut_and_what_was_found_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def steps() -> AsyncIterator[Step]:
        yield Step("first", True, "")  # noqa: FBT003
        await asyncio.sleep(600)

    async def mistaken() -> AsyncIterator[Step]:
        yield Step("first", True, "")  # noqa: FBT003
        raise KeyError("x")

    monkeypatch.setattr(doctor, "_SOURCE_S", 0.1)
    assert [(step.name, step.ok) for step in await doctor._collect(steps())] == [("first", True), ("time", False)]
    found = await doctor._collect(mistaken())
    assert found[-1].text.startswith("KeyError: 'x'; report this")


def test_this_machine(gateway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, folder = load_config(gateway), gateway.parent / "deep" / "state"
    assert failures(doctor.local(config, folder, running=False)) == []
    (gateway.parent / "file").write_text("")
    ((name, text),) = failures(doctor.local(config, gateway.parent / "file" / "state", running=False))
    assert name == "state"
    assert "can't be written (Not a directory)" in text
    monkeypatch.setattr("time.gmtime", lambda: datetime(1970, 1, 1, tzinfo=UTC).utctimetuple())
    ((name, text),) = failures(doctor.local(config, folder, running=False))
    assert (name, text) == ("clock", "1970-01-01 00:00:00 UTC can't be; set it, by NTP or at the board's clock")


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A state folder of a service's user."""
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    folder = tmp_path / "state"
    folder.mkdir()
    os.chown(folder, 4711, 4711)
    return folder


def test_what_root_made_belongs_to_the_folders_owner(owned: Path) -> None:
    (owned / "before").write_text("")
    with doctor.handed_over(owned):
        (owned / "pki" / "own").mkdir(parents=True, mode=0o700)
        (owned / "pki" / "own" / "key.pem").write_text("")
        (owned / "elsewhere").write_text("")
    made = [owned / "pki", owned / "pki" / "own", owned / "pki" / "own" / "key.pem"]
    assert [path.stat().st_uid for path in made] == [4711, 4711, 4711]
    assert [(owned / name).stat().st_uid for name in ("before", "elsewhere")] == [0, 0]


def test_no_link_that_the_owner_planted_is_followed(owned: Path, gateway: Path) -> None:
    target = owned.parent / "root's"
    target.mkdir()
    (target / "shadow").write_text("")
    with doctor.handed_over(owned):
        (owned / "pki").mkdir()
        (owned / "pki" / "soft").symlink_to(target / "shadow")
        (owned / "pki" / "folder").symlink_to(target)
        (owned / "pki" / "hard").hardlink_to(target / "shadow")
    assert [path.stat().st_uid for path in (target, target / "shadow")] == [0, 0]
    (owned / ".doctor").symlink_to(target / "made")
    assert failures(doctor.local(load_config(gateway), owned, running=False)) == []
    assert not (target / "made").exists()


@shared
@pytest.mark.parametrize("verb", ["doctor", "wire", "browse"])
async def test_the_gateway_can_read_the_key_that_root_made(plc: AsyncuaPlant, owned: Path, verb: str) -> None:
    url, security = source(plc).url, "Basic256Sha256:Sign"
    file = owned.parent / "gateway.toml"
    file.write_text(
        f'[gateway]\npath = "a/b/c/d/e"\n[mqtt]\nurl = "mqtt://127.0.0.1:{free_port()}"\n'
        f'[[source]]\nname = "plc"\ndriver = "opcua"\nurl = "{url}"\ntags = "t.csv"\nsecurity = "{security}"\n'
    )
    (owned.parent / "t.csv").write_text("tag,address\nx,nsu=urn:rig;s=X\n")
    task = owned.parent / "task.toml"
    task.write_text(TASK)
    given = ["-c", str(file), *([str(task)] if verb == "wire" else [])]
    command = ["edge", verb, *([url, "--security", security] if verb == "browse" else given), "--state", str(owned)]
    await asyncio.to_thread(main, command)
    (rejected,) = (owned / "pki" / "rejected").iterdir()
    rejected.rename(owned / "pki" / "trusted" / rejected.name)
    await asyncio.to_thread(main, command)
    made = [owned / "pki" / "own", owned / "pki" / "own" / "key.pem", rejected.parent]
    assert [path.stat().st_uid for path in made] == [4711, 4711, 4711]
