"""Every board file, the systemd unit, and the site bridge between two real brokers."""

import contextlib
import datetime as dt
import ipaddress
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import paho.mqtt.client as paho
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from broker.acl import bridge_conf
from broker.topics import (
    Chunk,
    FederationStatus,
    GatewayPath,
    Local,
    Manifest,
    ReceiptFor,
    RoundPlan,
    Status,
    Topic,
    Uplink,
)
from edge import config, profile
from edge.cli import build_parser
from edge.lab.processes import free_port, mosquitto_path
from edge.profile import load_profile
from models.errors import UserError
from models.tomlfile import size_bytes
from tests.brokers import BrokerProcess, need_mosquitto

FOLDER = Path(__file__).parent.parent / "firmware-configs"
BOARDS = sorted(FOLDER.glob("*.toml"))
UNIT = FOLDER / "tundish-edge.service"
BRIDGE = FOLDER / "mosquitto-site-bridge.conf"
GIB = 1 << 30
WAIT_S = 30

# -- boards ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=BOARDS, ids=lambda path: path.stem)
def board(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_the_boards_we_speak_of_are_there() -> None:
    assert {"generic-x86-64", "generic-arm64", "raspberry-pi-cm4", "nvidia-jetson-orin"} <= {p.stem for p in BOARDS}


def test_board_is_typed_and_its_caps_are_sane(board: Path) -> None:
    found = load_profile(board)
    assert found.board.arch == ("x86_64" if "x86" in board.stem else "aarch64")
    assert found.training.threads <= 4
    assert found.training.nice == 19
    assert 600 <= found.training.cpu_seconds <= 6 * 3600
    assert GIB <= size_bytes(found.training.memory) <= 4 * GIB
    assert GIB <= size_bytes(found.store.max_bytes) <= 64 * GIB
    # More threads make a compact net slower, and take a core from the drivers.
    assert found.scoring.threads == 1
    assert found.scoring.provider == "CPUExecutionProvider"


@pytest.mark.parametrize("table", ["training", "scoring", "store"])
def test_board_file_has_exactly_the_keys_of_gateway_toml(table: str) -> None:
    def keys(module: Any, name: str) -> set[str]:
        return {field.encode_name for field in msgspec.structs.fields(getattr(module, name))}

    # When to train is for the shop to say, not for the board.
    assert keys(profile, table.capitalize()) == keys(config, f"{table.capitalize()}Table") - {"train_when"}


def test_board_stands_where_gateway_toml_says_nothing(board: Path, tmp_path: Path) -> None:
    (tmp_path / "gateway.toml").write_text(
        '[gateway]\npath = "acme/lyon/press/line4/cell2"\n[mqtt]\nurl = "mqtt://127.0.0.1"\n[training]\nnice = 5\n'
    )
    expected = load_profile(board)
    found = config.load_config(tmp_path / "gateway.toml", config.profile_path(board.stem))
    assert found.training.nice == 5
    assert found.training.threads == expected.training.threads
    assert found.training_memory == size_bytes(expected.training.memory)
    assert found.scoring.provider == expected.scoring.provider
    assert found.store_bytes == size_bytes(expected.store.max_bytes)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("threads = 1\nmemory", "thread = 1\nmemory", "did you mean 'threads'?"),
        ('arch = "aarch64"', 'arch = "arm64"', "board.arch"),
        ('memory = "1GiB"', 'memory = "lots"', 'write "512MiB" or "2GiB"'),
        ('memory = "1GiB"', 'memory = "64MiB"', "too little"),
        ("nice = 19", "nice = 0", "training.nice"),
        ("cpu_seconds = 7200\n", "", "missing"),
        ('"/dev/ttyS0"', '"ttyS0"', "board.serial_ports"),
        ('max_bytes = "2GiB"', "max_bytes = 2", "store.max_bytes"),
        ("[store]", "[storage]", "did you mean 'store'?"),
    ],
)
def test_a_mistake_says_file_line_and_what_to_write(tmp_path: Path, old: str, new: str, says: str) -> None:
    text = (FOLDER / "generic-arm64.toml").read_text()
    assert old in text
    path = tmp_path / "board.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        load_profile(path)
    assert str(caught.value).startswith(f"{path}:")
    changed = text[: text.index(old)].count("\n") + 1
    # A missing key is pointed at by its table.
    assert caught.value.line == changed or (not new and 0 < caught.value.line < changed)


# -- the systemd unit ------------------------------------------------------------------------------------------------

HARDENING = {
    "DynamicUser": "yes",
    "StateDirectory": "tundish",
    "Restart": "always",
    "OOMPolicy": "continue",
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "RestrictNamespaces": "yes",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "SystemCallArchitectures": "native",
}


def unit() -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#;[":
            key, equals, value = line.partition("=")
            assert equals
            assert re.fullmatch(r"[A-Za-z]+", key)
            out.setdefault(key, []).append(value)
    return out


def test_unit_runs_our_own_command_with_its_state_where_systemd_puts_it() -> None:
    (start,) = unit()["ExecStart"]
    program, *arguments = start.split()
    assert Path(program).name == "tundish"
    assert arguments.pop() == "$TUNDISH_OPTIONS"
    args = build_parser("edge").parse_args([*arguments, "--profile", "generic-arm64"])
    assert args.run.__name__ == "_run"
    assert args.state == Path("%S/tundish")
    assert "PYTHONSAFEPATH=1" in unit()["Environment"][0].split()
    assert unit()["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


def test_unit_is_hardened_and_capped() -> None:
    found = unit()
    for key, value in HARDENING.items():
        assert found[key] == [value], key
    assert {"MemoryMax", "MemoryHigh", "CPUWeight", "TasksMax"} <= set(found)
    # It would break torch in the training child; the unit says so.
    assert "MemoryDenyWriteExecute" not in found


def test_systemd_agrees(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        return  # there is no systemd to ask; the tests above have read the file
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/opt/tundish/bin/tundish", sys.executable))
    verify = subprocess.run([analyze, "verify", str(path)], capture_output=True, text=True, check=False)
    ours = [line for line in (verify.stdout + verify.stderr).splitlines() if UNIT.stem in line]
    assert ours == []
    command = [analyze, "security", "--offline=true", "--threshold=20", "--no-pager", str(path)]
    exposure = subprocess.run(command, capture_output=True, text=True, check=False)
    assert exposure.returncode == 0, exposure.stdout[-300:] + exposure.stderr


# -- the site bridge -------------------------------------------------------------------------------------------------

GATEWAY = GatewayPath.parse("acme/lyon/press/line4/cell2")
STAYS: list[Topic] = [
    Local(GATEWAY, "raw", "Temp"),
    Local(GATEWAY, "inference", "wear"),
    Local(GATEWAY, "drift", "wear"),
    Local(GATEWAY, "feedback", "wear"),
    Local(GATEWAY, "health", "plc1"),
]
RISES: list[Topic] = [Status(GATEWAY), Uplink(GATEWAY, "wear", "update"), Uplink(GATEWAY, "wear", "answer")]
COMES: list[Topic] = [
    FederationStatus("press"),
    RoundPlan("press", "wear"),
    Manifest("press", "wear"),
    Chunk("press", "wear", 3, "weights0"),
    ReceiptFor("press", "wear", GATEWAY),
]
FENCE_UP, FENCE_DOWN = Uplink(GATEWAY, "wear", "fence"), FederationStatus("fence")


class Listener:
    """A client of one broker that keeps all it hears: topic -> (payload, retained)."""

    def __init__(self, port: int, tls: tuple[str, str, str] | None = None) -> None:
        self.heard: dict[str, tuple[bytes, bool]] = {}
        self._ready = threading.Event()
        self.client = paho.Client(CallbackAPIVersion.VERSION2)
        if tls:
            self.client.tls_set(*tls)
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda client, *_: client.subscribe([("#", 1), ("$SYS/broker/connection/#", 1)])
        self.client.on_subscribe = lambda *_: self._ready.set()
        self.client.on_message = self._keep
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        assert self._ready.wait(WAIT_S)

    def _keep(self, _client: paho.Client, _userdata: object, message: paho.MQTTMessage) -> None:
        self.heard[message.topic] = bytes(message.payload), message.retain

    def publish(self, topic: Topic, payload: bytes, *, retain: bool = False) -> None:
        self.client.publish(topic.topic, payload, qos=1, retain=retain).wait_for_publish(WAIT_S)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Cable:
    """What lies between the bridge and the federation: pulled, its connections are gone and new ones are refused."""

    def __init__(self, to: int) -> None:
        self.port, self._to = free_port(), to
        self._ends: list[socket.socket] = []
        self.plug()

    def plug(self) -> None:
        socket_ = socket.create_server(("127.0.0.1", self.port))
        self._ends.append(socket_)
        threading.Thread(target=self._accept, args=(socket_,), daemon=True).start()

    def pull(self) -> None:
        for end in self._ends:
            _cut(end)
        self._ends.clear()

    def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                try:
                    near, _ = listener.accept()
                except OSError:
                    return
                far = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [near, far]
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=ends, daemon=True).start()


def _pump(near: socket.socket, far: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := near.recv(65536):
            far.sendall(data)
    _cut(near)
    _cut(far)


def _cut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def certificate(folder: Path, name: str, ca: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None) -> Any:
    """NAME.pem and NAME.key for 127.0.0.1; its own CA without one."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca[0].subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(ca[1] if ca else key, hashes.SHA256())
    )
    (folder / f"{name}.pem").write_bytes(made.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (folder / f"{name}.key").chmod(0o644)  # Mosquitto reads it as another user
    return made, key


def bridge_text(port: int, certificates: Path) -> str:
    """The shipped file with this test's address, certificates and a shorter wait, and not one line more or less."""
    put = {
        "address": f"127.0.0.1:{port}",
        "bridge_cafile": str(certificates / "ca.pem"),
        "bridge_certfile": str(certificates / "bridge.pem"),
        "bridge_keyfile": str(certificates / "bridge.key"),
        "restart_timeout": "1",
    }
    lines = BRIDGE.read_text().splitlines()
    for key, value in put.items():
        (place,) = (i for i, line in enumerate(lines) if line.startswith(f"{key} "))
        lines[place] = f"{key} {value}"
    return "\n".join([*lines, ""])


class Bridged(NamedTuple):
    """Clients of the federation's broker (TLS, client certificates) and of a site's, and what joins the two."""

    above: Listener
    site: Listener
    cable: Cable
    site_port: int


@pytest.fixture
def bridged(tmp_path: Path) -> Iterator[Bridged]:
    need_mosquitto()
    for parent in (p for p in (tmp_path, *tmp_path.parents) if "pytest-of-" in str(p)):
        parent.chmod(0o755)
    ca = certificate(tmp_path, "ca", None)
    for name in ("server", "bridge", "listener"):
        certificate(tmp_path, name, ca)
    tls = (tmp_path / "ca.pem", tmp_path / "server.pem", tmp_path / "server.key")
    with BrokerProcess("mosquitto", tls) as federation, contextlib.ExitStack() as stack:
        port, cable = free_port(), Cable(federation.port)
        stack.callback(cable.pull)
        # Not as root, which gives itself up and then reads no file of root's.
        who = "user root\n" if os.geteuid() == 0 else ""
        own = f"{who}listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
        (tmp_path / "site.conf").write_text(own + bridge_text(cable.port, tmp_path))
        process = stack.enter_context(subprocess.Popen([mosquitto_path() or "", "-c", str(tmp_path / "site.conf")]))
        stack.callback(process.kill)
        until(lambda: process.poll() is not None or _listens(port))
        assert process.poll() is None
        own_tls = (str(tmp_path / "ca.pem"), str(tmp_path / "listener.pem"), str(tmp_path / "listener.key"))
        above, site = Listener(federation.port, own_tls), Listener(port)
        stack.callback(above.close)
        stack.callback(site.close)
        yield Bridged(above, site, cable, port)


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_bridge_carries_federation_traffic_and_nothing_else(bridged: Bridged) -> None:
    above, site = bridged.above, bridged.site
    # Messages of one connection keep their order, so once the fence has crossed, all before it has, or never will.
    for topic in (*STAYS, *RISES):
        site.publish(topic, b"up", retain=isinstance(topic, Status | Local))
    site.publish(FENCE_UP, b"up")
    until(lambda: FENCE_UP.topic in above.heard)
    assert set(above.heard) == {topic.topic for topic in (*RISES, FENCE_UP)}

    for topic in (*STAYS, Uplink(GATEWAY, "wear", "from-above"), *COMES):
        above.publish(topic, b"down", retain=True)
    above.publish(FENCE_DOWN, b"down")
    until(lambda: FENCE_DOWN.topic in site.heard)
    came = {topic for topic, (payload, _) in site.heard.items() if payload == b"down"}
    assert came == {topic.topic for topic in (*COMES, FENCE_DOWN)}
    assert not [topic for topic in (*above.heard, *site.heard) if topic.startswith("$SYS")]
    # Whoever comes later finds plans and models on the site's own broker.
    late = Listener(bridged.site_port)
    until(lambda: all(late.heard.get(topic.topic) == (b"down", True) for topic in COMES))
    late.close()


def test_bridge_keeps_updates_while_the_federation_is_away(bridged: Bridged) -> None:
    above, site = bridged.above, bridged.site
    site.publish(FENCE_UP, b"up")
    until(lambda: FENCE_UP.topic in above.heard)
    bridged.cable.pull()
    for topic in (*RISES, *STAYS):
        site.publish(topic, b"meanwhile")
    bridged.cable.plug()
    until(lambda: all(above.heard.get(topic.topic) == (b"meanwhile", False) for topic in RISES))
    assert not {topic.topic for topic in STAYS} & set(above.heard)


def test_bridge_file_says_what_it_must() -> None:
    assert BRIDGE.read_text() == bridge_conf("acme/lyon", "broker.acme.example:8883")
    lines = [line for line in BRIDGE.read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if line.startswith("topic ")] == [
        "topic +/+/+/+/+/_fl/# out 1",
        "topic _fl/# in 1",
    ]
    assert {"notifications false", "cleansession false", "bridge_insecure false"} <= set(lines)
    assert {"bridge_cafile", "bridge_certfile", "bridge_keyfile"} <= {line.split()[0] for line in lines}
