"""The link against both real brokers: versions, healing, refusals, bounds."""

import asyncio
import datetime as dt
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from broker import link as link_module
from broker.link import Inbound, Link, MqttSettings, check_mqtt
from broker.messages import MAX_PAYLOAD
from edge.lab.processes import free_port
from models.errors import UserError
from models.tomlfile import TomlFile
from tests.brokers import BROKERS, BrokerProcess, need_mosquitto

WAIT_S = 30


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> Iterator[BrokerProcess]:
    if request.param == "mosquitto":
        need_mosquitto()
    with BrokerProcess(request.param) as process:
        yield process


@pytest.fixture
def mosquitto() -> Iterator[BrokerProcess]:
    need_mosquitto()
    with BrokerProcess("mosquitto") as process:
        yield process


class Peer:
    """A link that keeps what it hears."""

    def __init__(self, settings: MqttSettings, name: str, **options: object) -> None:
        self.heard: list[Inbound] = []
        self.ups = 0
        self.downs: list[str] = []
        self.link = Link(
            settings,
            client_id=name,
            will=options.get("will"),  # type: ignore[arg-type]
            on_message=self.heard.append,
            on_up=self._up,
            on_down=self.downs.append,
            manual_ack=bool(options.get("manual_ack")),
        )

    def _up(self) -> None:
        self.ups += 1

    def topics(self) -> list[str]:
        return [m.topic for m in self.heard]


def known(broker: BrokerProcess) -> MqttSettings:
    """Say the version, where finding it is not the test."""
    return MqttSettings(url=broker.url, version="5" if broker.kind == "mosquitto" else "3.1.1")


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is another process
            await asyncio.sleep(0.02)


@asynccontextmanager
async def peer(settings: MqttSettings, name: str, *filters: str, **options: object) -> AsyncIterator[Peer]:
    p = Peer(settings, name, **options)
    p.link.subscribe(*filters)
    p.link.start()
    try:
        yield p
    finally:
        await p.link.stop()


async def test_finds_the_brokers_version_and_delivers(broker: BrokerProcess) -> None:
    settings = MqttSettings(url=broker.url)
    async with peer(settings, "a", "x/+") as a, peer(settings, "b") as b:
        await until(lambda: a.link.connected and b.link.connected)
        assert a.link.version == ("5" if broker.kind == "mosquitto" else "3.1.1")
        assert b.link.publish("x/1", b"one")
        await until(lambda: a.topics() == ["x/1"])
        assert a.heard[0].payload == b"one"
        assert not a.heard[0].retain


async def test_no_broker_is_no_exception_and_a_late_one_is_found() -> None:
    broker = BrokerProcess("amqtt")
    async with peer(MqttSettings(url=broker.url), "a") as a:
        await until(lambda: a.link.error)
        assert "Refused" in a.link.error
        assert not a.link.publish("x", b"")
        assert a.link.counters["publish-offline"] == 1
        with broker:
            await until(lambda: a.link.connected)
            assert a.link.error == ""


async def test_comes_back_to_an_empty_broker_with_its_subscriptions(broker: BrokerProcess) -> None:
    settings = MqttSettings(url=broker.url)
    async with peer(settings, "a", "x", manual_ack=True) as a, peer(settings, "b") as b:
        await until(lambda: a.link.connected and b.link.connected)
        broker.stop()
        await until(lambda: a.downs and b.downs)
        broker.start()
        await until(lambda: a.ups == 2 and b.ups == 2)
        await until(lambda: b.link.publish("x", b"again"))
        await until(a.topics)


async def test_a_dead_client_leaves_its_will_and_a_stopped_one_does_not(broker: BrokerProcess) -> None:
    settings = known(broker)
    async with peer(settings, "a", "will/+") as a:
        await until(lambda: a.link.connected)
        async with peer(settings, "b", will=("will/b", b"dead")) as b:
            await until(lambda: b.link.connected)
        async with peer(settings, "c", will=("will/c", b"dead")) as c:
            await until(lambda: c.link.connected)
            c.link._client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
            await until(a.topics)
        assert set(a.topics()) == {"will/c"}


async def test_unacknowledged_messages_come_again(mosquitto: BrokerProcess) -> None:
    settings = MqttSettings(url=mosquitto.url)
    async with peer(settings, "b") as b:
        async with peer(settings, "a", "x", manual_ack=True) as a:
            await until(lambda: a.link.connected and b.link.connected)
            await asyncio.sleep(0.1)
            b.link.publish("x", b"1")
            b.link.publish("x", b"2")
            await until(lambda: len(a.heard) == 2)
            a.link.ack(a.heard[0])
        async with peer(settings, "a", "x", manual_ack=True) as again:
            await until(again.heard.__len__)
            assert [m.payload for m in again.heard] == [b"2"]


async def test_an_inbound_queue_that_is_full_drops_and_asks_again(
    mosquitto: BrokerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "INBOUND_BYTES", 300_000)
    settings = MqttSettings(url=mosquitto.url)
    async with peer(settings, "a", "x", manual_ack=True) as a, peer(settings, "b") as b:
        await until(lambda: a.link.connected and b.link.connected)
        await asyncio.sleep(0.1)
        for i in range(4):
            assert b.link.publish("x", bytes([i]) * 100_000)
        await until(lambda: a.link.counters["dropped-full"] == 2)
        seen: set[int] = set()
        while len(seen) < 4:
            await until(lambda: a.heard)
            message = a.heard.pop(0)
            seen.add(message.payload[0])
            a.link.ack(message)
        assert seen == {0, 1, 2, 3}


async def test_oversized_payloads_never_reach_the_owner(broker: BrokerProcess) -> None:
    settings = known(broker)
    async with peer(settings, "a", "x") as a, peer(settings, "b") as b:
        await until(lambda: a.link.connected and b.link.connected)
        await asyncio.sleep(0.1)
        b.link.publish("x", bytes(MAX_PAYLOAD + 1))
        b.link.publish("x", b"small")
        await until(a.topics)
        assert [m.payload for m in a.heard] == [b"small"]
        if broker.kind == "amqtt":  # an MQTT 5 broker is told the limit and does not send it at all
            assert a.link.counters["dropped-size"] == 1


async def test_the_outbound_queue_is_bounded(mosquitto: BrokerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "OUTBOUND_BYTES", 1000)
    async with peer(MqttSettings(url=mosquitto.url), "a") as a:
        await until(lambda: a.link.connected)
        assert a.link.publish("x", bytes(900))
        assert not a.link.publish("x", bytes(900))
        await until(lambda: a.link.publish("x", bytes(900)))


@pytest.mark.parametrize("manual_ack", [False, True])
async def test_an_owner_that_raises_keeps_no_bytes_and_hears_the_next(
    monkeypatch: pytest.MonkeyPatch, *, manual_ack: bool
) -> None:
    monkeypatch.setattr(link_module, "INBOUND_BYTES", 5000)
    heard: list[bytes] = []

    def on_message(inbound: Inbound) -> None:
        heard.append(inbound.payload)
        raise RuntimeError("not foreseen")

    with BrokerProcess("amqtt") as broker:
        link = Link(
            known(broker),
            client_id="a",
            will=None,
            on_message=on_message,
            on_up=lambda: None,
            on_down=lambda _: None,
            manual_ack=manual_ack,
        )
        link.subscribe("x")
        link.start()
        async with peer(known(broker), "b") as b:
            await until(lambda: link.connected and b.link.connected)
            await asyncio.sleep(0.1)
            for i in range(4):
                assert b.link.publish("x", bytes([i]) * 2000)
                await until(lambda i=i: len(heard) == i + 1)  # type: ignore[misc]
        assert link._held == 0
        assert link.counters["failed"] == 4
        await link.stop()


def _certificate(
    folder: Path, name: str, issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / f"{name}.key").chmod(0o644)  # Mosquitto reads it as another user
    return certificate, key


async def test_tls_with_a_client_certificate(tmp_path: Path) -> None:
    need_mosquitto()
    for parent in (p for p in (tmp_path, *tmp_path.parents) if "pytest-of-" in str(p)):
        parent.chmod(0o755)
    ca = _certificate(tmp_path, "ca", None)
    _certificate(tmp_path, "server", ca)
    _certificate(tmp_path, "client", ca)
    _certificate(tmp_path, "stranger", None)
    tls = (tmp_path / "ca.pem", tmp_path / "server.pem", tmp_path / "server.key")
    with BrokerProcess("mosquitto", tls) as broker:
        good = MqttSettings(
            url=broker.url,
            ca=str(tmp_path / "ca.pem"),
            cert=str(tmp_path / "client.pem"),
            key=str(tmp_path / "client.key"),
        )
        wrong = MqttSettings(url=broker.url, ca=str(tmp_path / "stranger.pem"))
        none = MqttSettings(url=broker.url, ca=str(tmp_path / "ca.pem"))
        async with peer(good, "a") as a, peer(wrong, "b") as b, peer(none, "c") as c:
            await until(lambda: a.link.connected)
            await until(lambda: b.link.error)
            assert "CERTIFICATE_VERIFY_FAILED" in b.link.error
            assert "check ca, cert and key" in b.link.error
            await until(lambda: c.link.error)
            assert "the broker ends the connection; its log says why; with TLS, check that cert is" in c.link.error


async def test_what_fails_by_turns_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING")  # whoever ran a command in this process may have set it otherwise
    port = free_port()

    async def ended() -> None:
        """Let one connection in, and end it."""
        came = asyncio.Event()

        def end(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()
            came.set()

        server = await asyncio.start_server(end, "127.0.0.1", port)
        await asyncio.wait_for(came.wait(), 40)
        server.close()
        await server.wait_closed()
        await until(lambda: "ends the connection" in a.link.error)

    async with peer(MqttSettings(url=f"mqtt://127.0.0.1:{port}", version="3.1.1"), "a") as a:
        for _ in range(2):
            await until(lambda: "Refused" in a.link.error)
            await ended()
    assert [caplog.text.count(word) for word in ("ConnectionRefusedError", "ends the connection")] == [1, 1]


async def test_unusable_certificate_is_the_users_error(tmp_path: Path) -> None:
    bad = tmp_path / "ca.pem"
    bad.write_text("no PEM")
    with pytest.raises(UserError, match=r"ca\.pem"):
        Peer(MqttSettings(url=f"mqtts://127.0.0.1:{free_port()}", ca=str(bad)), "a").link.start()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('url = "http://x"', "no mqtt"),
        ('url = "mqtts://x:notaport"', "url"),
        ('url = "mqtts://x/path"', "alone"),
        ('url = "mqtt://broker.example"', "insecure = true"),
        ('url = "mqtts://x"\ncert = "c.pem"', "go together"),
        ('url = "mqtt://127.0.0.1"\nca = "c.pem"', "without TLS"),
        ('url = "mqtts://x"\nca = "missing.pem"', "no file"),
        ('url = "mqtts://x"\nkeepalive_s = 0', "1 to 65535"),
        ('url = "mqtts://x"\npassword_file = "p"', "username"),
    ],
)
def test_refuses_settings(tmp_path: Path, line: str, says: str) -> None:
    file = TomlFile(str(tmp_path / "g.toml"), f"[mqtt]\n{line}\n")
    settings = _settings(line)
    with pytest.raises(UserError, match=says) as caught:
        check_mqtt(file, settings)
    assert caught.value.line > 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_file_that_this_user_may_not_read_is_told(tmp_path: Path) -> None:
    """A service's user, and files that root made in a folder of its own."""
    (tmp_path / "pki").mkdir(mode=0o700)
    file = TomlFile(str(tmp_path / "g.toml"), '[mqtt]\nurl = "mqtts://x"\nca = "pki/ca.pem"\n')
    os.seteuid(65534)
    try:
        with pytest.raises(UserError) as caught:
            check_mqtt(file, MqttSettings(url="mqtts://x", ca="pki/ca.pem"))
    finally:
        os.seteuid(0)
    assert str(caught.value).endswith(
        "/pki/ca.pem: Permission denied; let the user who runs this read it, or run this as its owner"
    )


def test_accepts_settings(tmp_path: Path) -> None:
    file = TomlFile(str(tmp_path / "g.toml"), "[mqtt]\n")
    (tmp_path / "p").write_text("secret")
    for url in ("mqtt://127.0.0.9", "mqtt://localhost:1", "mqtt://[::1]", "mqtts://broker.example"):
        check_mqtt(file, MqttSettings(url=url))
    check_mqtt(file, MqttSettings(url="mqtt://broker.example", insecure=True))
    found = check_mqtt(file, MqttSettings(url="mqtts://x", username="u", password_file="p"))  # noqa: S106 - a file name
    assert found.password_file == str(tmp_path / "p")


def _settings(lines: str) -> MqttSettings:
    return TomlFile("x", lines).convert(MqttSettings)
