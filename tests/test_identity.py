"""Who may take part: the authority, enrolment by files, and a real Mosquitto that holds everybody to his topics."""

import argparse
import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion

from broker import cli as broker_cli
from broker.acl import BRIDGE_FOLDER
from broker.journal import Journal
from broker.link import Link
from broker.pki import AGGREGATOR, Authority, key_pem, make_request, requested_key
from broker.topics import Status
from edge import cli as edge_cli
from edge.config import load_config
from edge.identity import Issued, with_own_tls
from edge.lab.processes import free_port, mosquitto_path
from edge.resend import Resender
from edge.status import read_status
from edge.store import State
from models.errors import PeerError, UserError
from tests.brokers import need_mosquitto

FEDERATION = "press-lines"
HERE, THERE, GONE, OLD = (f"acme/lyon/press/line4/cell{i}" for i in (2, 3, 4, 5))
TASK = 'name = "wear"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 2\n[[signal]]\nname = "s"\n'
WAIT_S = 20


def federation_toml(folder: Path) -> Path:
    (folder / "wear.toml").write_text(TASK)
    path = folder / "federation.toml"
    path.write_text(
        f'[federation]\nname = "{FEDERATION}"\nroots = ["acme"]\n'
        '[mqtt]\nurl = "mqtts://localhost"\n[[task]]\nfile = "wear.toml"\n'
    )
    return path


def gateway_toml(folder: Path, path: str = HERE, port: int = 8883) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "plc.csv").write_text("tag,address\na,a\n")
    file = folder / "gateway.toml"
    file.write_text(
        f'[gateway]\npath = "{path}"\n[mqtt]\nurl = "mqtts://localhost:{port}"\n'
        '[[source]]\nname = "plc"\ndriver = "replay"\nurl = "plc.data.csv"\ntags = "plc.csv"\n'
        '[task.wear]\nsignals = { s = "plc/a" }\n'
    )
    (folder / "plc.data.csv").write_text("a\n1\n")
    return file


class Operator:
    """The operator's machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.config, self.state = federation_toml(folder), folder / "state"
        self.mosquitto: subprocess.Popen[bytes] | None = None

    def run(self, verb: str, *options: object) -> int:
        parser = argparse.ArgumentParser()
        broker_cli.add_commands(parser.add_subparsers())
        args = parser.parse_args([verb, "-c", str(self.config), "--state", str(self.state), *map(str, options)])
        done: int = args.run(args)
        return done


def edge(folder: Path, verb: str, *options: object) -> int:
    args = edge_cli.build_parser().parse_args(
        ["edge", verb, *map(str, options), "-c", str(folder / "gateway.toml"), "--state", str(folder / "state")]
    )
    done: int = args.run(args)
    return done


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    made = Operator(tmp_path / "office")
    assert made.run("init", "--host", "localhost", "--host", "127.0.0.1") == 0
    return made


def enrolled(operator: Operator, folder: Path, path: str = HERE) -> Path:
    gateway_toml(folder, path)
    request, answer = folder / "cell.request", folder / "cell.admission"
    assert edge(folder, "export", "--request", request) == 0
    assert operator.run("enrol", "--path", path, "--request", request, "--out", answer) == 0
    return answer


def test_the_port_stays_that_of_the_folder(operator: Operator, tmp_path: Path) -> None:
    """As `acl` runs again after each enrolment, and nobody writes --port each time."""
    out, site = tmp_path / "mosquitto", operator.state / "pki" / "bridges" / "acme+lyon" / "tundish-bridge.conf"

    def port() -> list[str]:
        return [line for line in (out / "mosquitto.conf").read_text().splitlines() if line.startswith("listener")]

    operator.config.write_text(operator.config.read_text().replace('"mqtts://localhost"', '"mqtts://localhost:8893"'))
    for options, now in (((), 8893), (("--port", 18883), 18883), ((), 18883), (("--port", 8884), 8884)):
        assert operator.run("acl", "--out", out, "--bridge", "acme/lyon", *options) == 0
        assert port() == [f"listener {now}"]
        assert f"address localhost:{now}\n" in site.read_text()
    (out / "mosquitto.conf").write_text("listener 99999\n")
    with pytest.raises(UserError, match="--port: 99999 is no port; write 1 to 65535"):
        operator.run("acl", "--out", out)


def test_mosquitto_reads_the_folder_as_its_own_header_says(operator: Operator, tmp_path: Path) -> None:
    """With a main configuration as Debian's, and the line out of what was written."""
    need_mosquitto()
    (tmp_path / "x").mkdir()
    port, given, out = free_port(), tmp_path / "x" / ".." / "mosquitto", tmp_path / "mosquitto"
    assert operator.run("acl", "--out", given, "--port", port) == 0
    text = (out / "mosquitto.conf").read_text()
    assert ".." not in text
    assert f"\ncafile {out}/ca.pem\n" in text
    (line,) = [one.removeprefix("# ") for one in text.splitlines() if one.startswith("# include_dir ")]
    (tmp_path / "conf.d").mkdir()
    user = "root" if os.geteuid() == 0 else os.environ["USER"]
    main_conf = tmp_path / "mosquitto.conf"
    main_conf.write_text(
        f"persistence true\npersistence_location {tmp_path}/\nuser {user}\ninclude_dir {tmp_path}/conf.d\n{line}\n"
    )
    log = (tmp_path / "mosquitto.log").open("wb")
    child = subprocess.Popen([mosquitto_path() or "mosquitto", "-c", str(main_conf)], stdout=log, stderr=log)
    try:
        until(lambda: listening(port) or child.poll() is not None)
        assert child.poll() is None, (tmp_path / "mosquitto.log").read_text()
    finally:
        child.terminate()
        child.wait()
        log.close()


# -- the authority -----------------------------------------------------------------------------------------------------


def test_an_authority_is_made_once_and_its_keys_are_the_owners_alone(operator: Operator) -> None:
    pki = operator.state / "pki"
    for name in ("ca.key", "broker.key", "aggregator.key"):
        assert (pki / name).stat().st_mode & 0o777 == 0o600
    before = (pki / "ca.pem").read_bytes()
    with pytest.raises(UserError, match="an authority already"):
        operator.run("init")
    assert (pki / "ca.pem").read_bytes() == before
    shown = x509.load_pem_x509_certificate((pki / "broker.pem").read_bytes())
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    with pytest.raises(UserError, match="tundish broker init"):
        Authority(pki / "elsewhere")


@pytest.mark.parametrize(
    ("url", "host"), [("mqtts://mqtt.acme.example:8883", "mqtt.acme.example"), ("mqtt://127.0.0.1:1883", "localhost")]
)
def test_the_brokers_certificate_is_for_the_name_that_federation_toml_has(
    tmp_path: Path, url: str, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Operator(tmp_path)
    made.config.write_text(re.sub(r'url = "mqtts?://[^"]*"', f'url = "{url}"', made.config.read_text()))
    assert made.run("init") == 0
    assert f"certificate is for {host}: gateways reach it by no other name" in capsys.readouterr().out
    shown = x509.load_pem_x509_certificate((made.state / "pki" / "broker.pem").read_bytes())
    names = shown.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [host]


def test_a_name_comes_from_the_operator_and_never_from_the_request(operator: Operator) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    wish = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, AGGREGATOR)])
    greedy = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(wish)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    authority = Authority(operator.state / "pki")
    made = x509.load_pem_x509_certificate(authority.issue(requested_key(greedy), HERE, "client"))
    assert made.subject.rfc4514_string() == f"CN={HERE}"
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    with pytest.raises(UserError, match="64 at most"):
        authority.issue(requested_key(greedy), "a/" * 40, "client")


def test_hostile_requests_are_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    good = make_request(key)
    assert requested_key(good) == key.public_key()
    for i in range(len(good)):
        with pytest.raises(PeerError):
            requested_key(good[:i])
        with contextlib.suppress(PeerError):  # a flip may fall on what no signature covers: never on the key
            assert requested_key(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :]) == key.public_key()
    weak = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    small = weak.sign(rsa.generate_private_key(65537, 1024), hashes.SHA256())  # noqa: S505 - the point
    for bad in (small.public_bytes(serialization.Encoding.DER), b"\0" * 20_000):
        with pytest.raises(PeerError, match=r"P-256|bytes"):
            requested_key(bad)


# -- by files ----------------------------------------------------------------------------------------------------------


def test_a_gateway_is_enrolled_by_two_files(operator: Operator, tmp_path: Path) -> None:
    folder = tmp_path / "cell2"
    answer = enrolled(operator, folder)
    config = load_config(folder / "gateway.toml")
    assert with_own_tls(config.mqtt, folder / "state") == config.mqtt
    assert edge(folder, "import", answer) == 0
    shown = with_own_tls(config.mqtt, folder / "state")
    assert shown.cert
    certificate = x509.load_pem_x509_certificate(Path(shown.cert).read_bytes())
    assert certificate.subject.rfc4514_string() == f"CN={HERE}"
    assert Path(shown.key or "").stat().st_mode & 0o777 == 0o600
    with contextlib.closing(Journal(operator.state)) as journal:
        assert journal.key_of(HERE)


def test_a_gateway_does_not_run_with_the_state_of_another(operator: Operator, tmp_path: Path) -> None:
    folder = tmp_path / "cell2"
    assert edge(folder, "import", enrolled(operator, folder)) == 0
    gateway_toml(folder, THERE)
    with pytest.raises(UserError, match=f"is the state of {HERE}, this gateway is {THERE}"):
        edge(folder, "run")


def test_files_that_are_not_what_they_say_are_told(operator: Operator, tmp_path: Path) -> None:
    folder, other = tmp_path / "cell2", tmp_path / "cell3"
    answer = enrolled(operator, folder)
    gateway_toml(other, THERE)
    request = folder / "cell.request"
    with pytest.raises(UserError, match=f"is of {HERE}, not of {THERE}"):
        operator.run("enrol", "--path", THERE, "--request", request, "--out", tmp_path / "x")
    with pytest.raises(UserError, match="is for"):
        edge(other, "import", answer)
    with pytest.raises(UserError, match="is no admission"):
        edge(folder, "import", request)
    text = answer.read_text()
    for bad in (text.replace(text[200], "A" if text[200] != "A" else "B"), text[:300], "", text.replace("END", "ENDE")):
        answer.write_text(bad)
        with pytest.raises(UserError):
            edge(folder, "import", answer)
    answer.write_text(text)
    (folder / "state" / "tls" / "key.pem").write_bytes(key_pem(ec.generate_private_key(ec.SECP256R1())))
    with pytest.raises(UserError, match="another key"):
        edge(folder, "import", answer)
    assert not (folder / "state" / "tls" / "cert.pem").exists()


def test_one_who_was_taken_out_is_a_stranger(operator: Operator, tmp_path: Path) -> None:
    enrolled(operator, tmp_path / "cell2")
    assert operator.run("enrol", "--path", HERE, "--revoke") == 0
    with contextlib.closing(Journal(operator.state)) as journal:
        assert journal.key_of(HERE) is None
    crl = x509.load_pem_x509_crl((operator.state / "pki" / "crl.pem").read_bytes())
    issued = x509.load_pem_x509_certificate(
        (operator.state / "pki/issued" / f"{HERE.replace('/', '+')}.pem").read_bytes()
    )
    assert crl.get_revoked_certificate_by_serial_number(issued.serial_number)
    with pytest.raises(UserError, match=f"--path: {THERE} is not in the roster, and has no certificate and no token"):
        operator.run("enrol", "--path", THERE, "--revoke")
    assert operator.run("enrol", "--path", HERE, "--revoke") == 0  # again: an earlier try may have ended half-way


def test_who_was_revoked_before_is_told_so(
    operator: Operator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "ab" * 32

    def enrol(path: str, *options: str) -> str:
        assert operator.run("enrol", "--path", path, *options) == 0
        return capsys.readouterr().out

    today, stays = time.strftime("%Y-%m-%d ", time.gmtime()), "its certificate stays revoked"
    enrolled(operator, tmp_path / "cell2")
    enrol(THERE, "--key", key)  # one without a certificate
    for path in (HERE, THERE):
        assert "already" not in (first := enrol(path, "--revoke"))
        assert ("1 certificate of it revoked" in first) == (path == HERE)
        assert (again := enrol(path, "--revoke")).startswith(f"{path} was already revoked on {today}")
        assert ("its certificates were revoked before" in again) == (path == HERE)
        assert f"it was revoked on {today}" in (again := enrol(path, "--key", key))
        assert (stays in again) == (path == HERE)
        assert "it was revoked" not in enrol(path, "--key", key)
    # With another certificate it is in as any other.
    enrol(HERE, "--revoke")
    enrolled(operator, tmp_path / "new")
    assert stays not in enrol(HERE, "--key", key)


def test_every_certificate_of_a_name_is_taken_back(operator: Operator, tmp_path: Path) -> None:
    enrolled(operator, tmp_path / "stolen")
    enrolled(operator, tmp_path / "new")
    operator.run("enrol", "--path", HERE, "--revoke")
    file = operator.state / "pki" / "crl.pem"
    crl = x509.load_pem_x509_crl(file.read_bytes())
    assert len(list(crl)) == 2
    time.sleep(1.1)  # the list counts in seconds
    enrolled(operator, tmp_path / "third", THERE)
    operator.run("enrol", "--path", THERE, "--revoke")
    days = {entry.serial_number: entry.revocation_date_utc for entry in x509.load_pem_x509_crl(file.read_bytes())}
    assert len(days) == 3
    assert all(days[entry.serial_number] == entry.revocation_date_utc for entry in crl)
    assert operator.run("acl", "--out", tmp_path / "out", "--operator", "marie") == 0
    assert operator.run("acl", "--out", tmp_path / "out", "--revoke-operator", "marie") == 0
    assert len(list(x509.load_pem_x509_crl((tmp_path / "out" / "crl.pem").read_bytes()))) == 4
    assert "marie" not in (tmp_path / "out" / "acl").read_text()
    with pytest.raises(UserError, match="no operator 'marie'"):
        operator.run("acl", "--out", tmp_path / "out", "--revoke-operator", "marie")


def test_pairs_that_were_made_here_are_renewed_in_time(operator: Operator) -> None:
    authority = Authority(operator.state / "pki")
    file = authority.folder / "broker.pem"
    before = file.read_bytes()
    authority.renew()
    assert file.read_bytes() == before
    key = ec.generate_private_key(ec.SECP256R1())
    file.write_bytes(authority.issue(key.public_key(), "broker", "broker", ["localhost", "127.0.0.1"], days=5))
    authority.renew()
    made = x509.load_pem_x509_certificate(file.read_bytes())
    assert made.not_valid_after_utc > x509.load_pem_x509_certificate(before).not_valid_before_utc
    names = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert made.public_key() != key.public_key()


@pytest.mark.parametrize("host", ["münchen", "bad host", "", "a..b"])
def test_a_host_that_is_none_leaves_no_half_authority(tmp_path: Path, host: str) -> None:
    made = Operator(tmp_path / "office")
    with pytest.raises(UserError, match="is no host"):
        made.run("init", "--host", "localhost", "--host", host)
    assert made.run("init", "--host", "localhost") == 0


# -- a real Mosquitto --------------------------------------------------------------------------------------------------


class Party:
    """One who connects with a certificate, and what he gets to read."""

    def __init__(self, port: int, ca: Path, cert: Path | None, key: Path | None, client_id: str = "") -> None:
        self.got: set[str] = set()
        self._answers: dict[int, Any] = {}
        self._there, self.refused = threading.Event(), ""
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id, protocol=mqtt.MQTTv5)
        context = ssl.create_default_context(cafile=str(ca))
        if cert:
            context.load_cert_chain(cert, key)
        self.client.tls_set_context(context)
        self.client.on_connect = lambda _c, _u, _f, reason, _p: self._connected(reason)
        self.client.on_disconnect = lambda _c, _u, _f, reason, _p: self._ended(reason)
        self.client.on_subscribe = lambda *_: self._there.set()
        self.client.on_message = lambda _c, _u, message: self.got.add(message.topic)
        self.client.on_publish = lambda _c, _u, mid, reason, _p: self._answers.__setitem__(mid, reason)
        try:
            self.client.connect("localhost", port)
        except (OSError, ssl.SSLError) as error:
            self.refused = str(error)
            return
        self.client.loop_start()
        # Nothing is sent again to one who subscribes too late: he is here once the broker has said so.
        until(lambda: self._there.is_set() or bool(self.refused))

    def _connected(self, reason: Any) -> None:
        if reason.is_failure:
            self.refused = str(reason)
        else:
            self.client.subscribe("#", qos=1)

    def _ended(self, reason: Any) -> None:
        """TLS 1.3 lets a client believe that it is there, until it reads the broker's alert."""
        if not self._there.is_set():
            self.refused = self.refused or str(reason)

    @property
    def connected(self) -> bool:
        """Whether he was let in and asked to be told everything."""
        return self._there.is_set()

    def may_write(self, topic: str) -> bool:
        mid = self.client.publish(topic, b"x", qos=1).mid
        until(lambda: mid in self._answers)
        return not self._answers[mid].is_failure

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def until(condition: Callable[[], object], within_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def broker(operator: Operator, tmp_path: Path) -> Iterator[tuple[Operator, int, Path]]:
    need_mosquitto()
    for number, path in enumerate((HERE, THERE, GONE)):
        enrolled(operator, tmp_path / f"cell{number}", path)
        edge(tmp_path / f"cell{number}", "import", tmp_path / f"cell{number}" / "cell.admission")
    operator.run("enrol", "--path", GONE, "--revoke")
    port, out = free_port(), tmp_path / "mosquitto"
    assert operator.run("acl", "--out", out, "--port", port, "--operator", "marie") == 0
    shutil.copytree(operator.state / "pki" / "operators", tmp_path / "operators")
    conf = out / "mosquitto.conf"
    # This test's own user reads its files; nothing else of what was written is changed.
    more = f"user {'root' if os.geteuid() == 0 else os.environ['USER']}\npersistence_location {out}/\n"
    conf.write_text(conf.read_text() + more)
    log = (tmp_path / "mosquitto.log").open("wb")
    # A reload finds the file without these lines, and what is kept goes into the working folder.
    command = [mosquitto_path() or "mosquitto", "-c", str(conf)]
    child = subprocess.Popen(command, stdout=log, stderr=log, cwd=out)
    operator.mosquitto = child
    try:
        until(lambda: listening(port) or child.poll() is not None)
        assert child.poll() is None, (tmp_path / "mosquitto.log").read_text()
        yield operator, port, tmp_path
    finally:
        child.terminate()
        child.wait()
        log.close()


def listening(port: int) -> bool:
    import socket  # noqa: PLC0415

    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port), 1).close()
        return True
    return False


TOPICS = (
    f"{HERE}/_fl/status", f"{HERE}/_fl/wear/update", f"{HERE}/_inference/wear", f"{HERE}/_health/plc",
    f"{HERE}/_drift/wear", f"{HERE}/_raw/a", f"{HERE}/_feedback/wear",
    f"{THERE}/_fl/wear/update", f"{THERE}/_inference/wear",
    f"{HERE}/_fl/charter", f"_fl/{FEDERATION}/charter", f"_fl/{FEDERATION}/roster", f"_fl/{FEDERATION}/roster/1",
    f"_fl/{FEDERATION}/status", f"_fl/{FEDERATION}/wear/round", f"_fl/{FEDERATION}/wear/model/manifest",
    f"_fl/{FEDERATION}/_release/timestamp", f"_fl/{FEDERATION}/wear/model/stable",
    f"_fl/{FEDERATION}/wear/model/7/step0", f"_fl/{FEDERATION}/wear/receipt/{HERE}",
    f"_fl/{FEDERATION}/wear/receipt/{THERE}", "_fl/other/wear/round", "spBv1.0/x/NBIRTH/y", "elsewhere",
)  # fmt: skip
OURS = {t for t in TOPICS if t.startswith(f"_fl/{FEDERATION}/")}
WRITES = {
    "aggregator": OURS,
    "gateway": {t for t in TOPICS if t.startswith(HERE)} - {f"{HERE}/_feedback/wear"},
    "operator": {f"{HERE}/_feedback/wear"},
}
READS = {
    "aggregator": {t for t in TOPICS if "/_fl/" in t} | OURS,
    "gateway": (OURS - {f"_fl/{FEDERATION}/wear/receipt/{THERE}"}) | {f"{HERE}/_fl/status", f"{HERE}/_feedback/wear"},
    "operator": {f"{HERE}/_inference/wear", f"{HERE}/_drift/wear", f"{HERE}/_health/plc", f"{THERE}/_inference/wear"},
}


def test_everybody_writes_and_reads_what_is_his_and_nothing_else(broker: tuple[Operator, int, Path]) -> None:
    operator, port, folder = broker
    pki = operator.state / "pki"
    ca = pki / "ca.pem"
    places = {"aggregator": (pki / "aggregator.pem", pki / "aggregator.key")}
    for role, cell in (("gateway", "cell0"), ("neighbour", "cell1")):
        tls = folder / cell / "state" / "tls"
        places[role] = tls / "cert.pem", tls / "key.pem"
    places["operator"] = folder / "operators" / "marie.pem", folder / "operators" / "marie.key"
    parties = {role: Party(port, ca, *files) for role, files in places.items()}
    assert all(party.connected for party in parties.values()), {r: p.refused for r, p in parties.items()}
    for role, expected in WRITES.items():
        assert {topic for topic in TOPICS if parties[role].may_write(topic)} == expected, role
    assert parties["neighbour"].may_write(f"{THERE}/_fl/wear/update")
    assert parties["neighbour"].may_write(f"{THERE}/_inference/wear")
    written = set().union(*WRITES.values()) | {f"{THERE}/_fl/wear/update", f"{THERE}/_inference/wear"}
    for role, may in READS.items():
        expected = may & written
        until(lambda expected=expected, role=role: parties[role].got >= expected)  # type: ignore[misc]
        assert parties[role].got == expected, role
    for party in parties.values():
        party.close()


def test_who_has_no_right_to_connect_does_not(broker: tuple[Operator, int, Path]) -> None:
    operator, port, folder = broker
    authority = Authority(operator.state / "pki")
    ca, key = authority.folder / "ca.pem", ec.generate_private_key(ec.SECP256R1())
    mine = folder / "mine.key"
    mine.write_bytes(key_pem(key))

    def certified(name: str, data: bytes) -> Party:
        (folder / f"{name}.pem").write_bytes(data)
        return Party(port, ca, folder / f"{name}.pem", mine)

    strangers = Authority.create(folder / "strangers", FEDERATION, ["localhost"])
    revoked = folder / "cell2" / "state" / "tls"
    refused = {
        "none": Party(port, ca, None, None),
        "another authority's": certified("strange", strangers.issue(key.public_key(), HERE, "client")),
        "expired": certified("expired", authority.issue(key.public_key(), OLD, "client", days=0)),
        "revoked": Party(port, ca, revoked / "cert.pem", revoked / "key.pem"),
        "a server's": certified("server", authority.issue(key.public_key(), HERE, "broker", ["localhost"])),
    }
    assert {name: party.connected for name, party in refused.items()} == dict.fromkeys(refused, False)
    # A name that nobody granted anything: connected, and mute.
    mute = certified("unknown", authority.issue(key.public_key(), OLD, "client"))
    assert mute.connected
    assert not any(mute.may_write(topic) for topic in TOPICS)
    # Who borrows another's client id doesn't throw him out: the id is the certificate's name.
    tls = folder / "cell0" / "state" / "tls"
    owner = Party(port, ca, tls / "cert.pem", tls / "key.pem")
    assert owner.connected
    neighbours = folder / "cell1" / "state" / "tls"
    thief = Party(port, ca, neighbours / "cert.pem", neighbours / "key.pem", client_id=HERE)
    assert thief.connected
    assert owner.may_write(f"{HERE}/_raw/a")
    assert not thief.may_write(f"{HERE}/_raw/a")
    for party in (mute, owner, thief):
        party.close()


def test_a_revoked_gateway_that_is_connected_is_deaf_and_mute_after_a_reload(
    broker: tuple[Operator, int, Path],
) -> None:
    operator, port, folder = broker
    pki = operator.state / "pki"

    def party(cell: int) -> Party:
        tls = folder / f"cell{cell}" / "state" / "tls"
        return Party(port, pki / "ca.pem", tls / "cert.pem", tls / "key.pem")

    stays, goes = party(0), party(1)
    aggregator = Party(port, pki / "ca.pem", pki / "aggregator.pem", pki / "aggregator.key")
    word, plan = f"{THERE}/_fl/wear/answer", f"_fl/{FEDERATION}/wear/round"
    assert goes.may_write(word)
    assert aggregator.may_write(f"_fl/{FEDERATION}/status")
    until(lambda: f"_fl/{FEDERATION}/status" in stays.got & goes.got)
    assert operator.run("enrol", "--path", THERE, "--revoke") == 0
    assert operator.run("acl", "--out", folder / "mosquitto", "--port", port) == 0
    assert operator.mosquitto
    operator.mosquitto.send_signal(signal.SIGHUP)
    until(lambda: not goes.may_write(word))
    assert aggregator.may_write(plan)
    until(lambda: plan in stays.got)
    assert stays.may_write(f"{HERE}/_fl/wear/answer")
    assert plan not in goes.got
    # Its connection is ended by one of its name, and it doesn't come back, nor does that one.
    assert goes.client.is_connected()
    tls = f'ca = "{pki / "ca.pem"}"\ncert = "{pki / "aggregator.pem"}"\nkey = "{pki / "aggregator.key"}"\n'
    url = f'url = "mqtts://localhost:{port}"\n'
    operator.config.write_text(operator.config.read_text().replace('url = "mqtts://localhost"\n', url + tls))
    assert operator.run("enrol", "--path", THERE, "--revoke", "--end-connection") == 0
    until(lambda: not goes.client.is_connected())
    goes.close()
    assert not party(1).connected
    issued = (pki / "issued" / f"{THERE.replace('/', '+')}.pem").read_bytes()
    crl = x509.load_pem_x509_crl((pki / "crl.pem").read_bytes())
    assert all(
        crl.get_revoked_certificate_by_serial_number(c.serial_number) for c in x509.load_pem_x509_certificates(issued)
    )
    assert stays.may_write(f"{HERE}/_fl/wear/answer")
    with pytest.raises(UserError, match="goes with --revoke"):
        operator.run("enrol", "--path", HERE, "--end-connection")
    for one in (stays, aggregator):
        one.close()


def test_a_bridge_goes_to_a_host_that_is_not_the_sites_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for hosts, address in (
        (["localhost", "127.0.0.1", "mqtt.acme.example"], "mqtt.acme.example"),
        (["10.0.0.5", "localhost"], "10.0.0.5"),
        (["localhost", "127.0.0.1"], "localhost"),
    ):
        office = Operator(tmp_path / address)
        assert office.run("init", *(part for host in hosts for part in ("--host", host))) == 0
        assert office.run("acl", "--out", tmp_path / "out", "--bridge", "acme/lyon") == 0
        conf = (office.state / "pki" / "bridges" / "acme+lyon" / "tundish-bridge.conf").read_text()
        assert f"\naddress {address}:8883\n" in conf
        warned = "BUT its address is localhost: the certificate has no other --host of init" in capsys.readouterr().err
        assert warned == (address == "localhost")


async def test_a_gateway_that_the_broker_does_not_know_yet_speaks_again_once_it_does(
    broker: tuple[Operator, int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.resend._ANEW_S", 0.5)
    operator, port, folder = broker
    pki, late = operator.state / "pki", folder / "late"
    enrolled(operator, late, OLD)
    assert edge(late, "import", late / "cell.admission") == 0
    config = load_config(gateway_toml(late, OLD, port))
    path, ups = config.path, list[str]()

    def up() -> None:
        ups.append("up")
        link.publish(Status(path).topic, b"birth", retain=True)

    settings = with_own_tls(config.mqtt, late / "state")
    link = Link(settings, client_id=OLD, will=None, on_message=lambda _: None, on_up=up, on_down=lambda _: None)
    resender = Resender(State(late / "state"), link, path)
    aggregator = Party(port, pki / "ca.pem", pki / "aggregator.pem", pki / "aggregator.key")
    link.start()

    async def until_then(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():
                resender.tick(())
                await asyncio.sleep(0.05)

    await until_then(lambda: link.refused and len(ups) > 1)
    assert link.status["refused"] == {Status(path).topic: "Not authorized"}
    assert operator.run("acl", "--out", folder / "mosquitto", "--port", port) == 0
    assert operator.mosquitto
    operator.mosquitto.send_signal(signal.SIGHUP)
    await until_then(lambda: Status(path).topic in aggregator.got)
    await until_then(lambda: not link.refused)
    await link.stop()
    aggregator.close()


def test_a_site_is_bridged_and_speaks_for_its_own_gateways_alone(
    broker: tuple[Operator, int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    operator, port, folder = broker
    pki, own = operator.state / "pki", folder / "site"
    for wrong, says in (("acme", "is no site"), ("acme/lyon/press", "is no site"), ("corvid/lyon", "roots are: acme")):
        with pytest.raises(UserError, match=says):
            operator.run("acl", "--out", folder / "mosquitto", "--bridge", wrong)
    acl = "acl", "--out", folder / "mosquitto", "--port", port
    assert operator.run(*acl, "--bridge", "acme/lyon") == 0
    assert "2 gateways, 1 operator, 1 bridge" in capsys.readouterr().out
    assert operator.mosquitto
    operator.mosquitto.send_signal(signal.SIGHUP)
    shutil.copytree(pki / "bridges" / "acme+lyon", own)
    written = (own / "tundish-bridge.conf").read_text()
    assert f"address localhost:{port}\n" in written
    near = free_port()
    user = "root" if os.geteuid() == 0 else os.environ["USER"]
    head = f"user {user}\nlistener {near} localhost\nallow_anonymous true\n"
    (own / "site.conf").write_text(head + written.replace(str(BRIDGE_FOLDER), str(own)))
    aggregator = Party(port, pki / "ca.pem", pki / "aggregator.pem", pki / "aggregator.key")
    with subprocess.Popen([mosquitto_path() or "mosquitto", "-c", str(own / "site.conf")]) as child:
        try:
            until(lambda: listening(near))
            plant = mqtt.Client(CallbackAPIVersion.VERSION2)
            heard = set[str]()
            plant.on_message = lambda _c, _u, message: heard.add(message.topic)
            plant.on_connect = lambda client, *_: client.subscribe("_fl/#", qos=1)
            plant.connect("localhost", near)
            plant.loop_start()
            # In this order over one connection: what did not come before the last one never will.
            other = HERE.replace("lyon", "paris")
            for topic in (
                f"{HERE}/_raw/a",
                f"{other}/_fl/wear/answer",
                f"{HERE}/_fl/wear/update",
                f"{THERE}/_fl/status",
            ):
                plant.publish(topic, b"x", qos=1).wait_for_publish(WAIT_S)
            until(lambda: f"{THERE}/_fl/status" in aggregator.got)
            assert {topic for topic in aggregator.got if topic.startswith("acme")} == {
                f"{HERE}/_fl/wear/update", f"{THERE}/_fl/status",
            }  # fmt: skip
            said = [f"_fl/{FEDERATION}/{part}" for part in ("charter", "roster", "wear/round", "wear/model/manifest")]
            for topic in (f"_fl/{FEDERATION}/wear/receipt/{other}", f"_fl/{FEDERATION}/wear/receipt/{HERE}", *said):
                assert aggregator.may_write(topic)
            until(lambda: said[-1] in heard)
            assert heard == {f"_fl/{FEDERATION}/wear/receipt/{HERE}", *said}
            plant.disconnect()
            plant.loop_stop()
        finally:
            child.terminate()
    aggregator.close()
    assert operator.run(*acl, "--revoke-bridge", "acme/lyon") == 0
    operator.mosquitto.send_signal(signal.SIGHUP)
    assert "user acme/lyon\n" not in (folder / "mosquitto" / "acl").read_text()
    crl = x509.load_pem_x509_crl((folder / "mosquitto" / "crl.pem").read_bytes())
    shown = x509.load_pem_x509_certificate((own / "bridge.pem").read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(shown.serial_number)
    with pytest.raises(UserError, match="there are: none"):
        operator.run(*acl, "--revoke-bridge", "acme/lyon")


def test_gateway_and_aggregator_meet_over_it(
    broker: tuple[Operator, int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    operator, port, folder = broker
    pki, cell = operator.state / "pki", folder / "cell0"
    toml = operator.config.read_text()
    tls = f'ca = "{pki / "ca.pem"}"\ncert = "{pki / "aggregator.pem"}"\nkey = "{pki / "aggregator.key"}"\n'
    url = f'url = "mqtts://localhost:{port}"\n'
    listener = free_port()
    enrolment = f'[enrolment]\nlisten = "127.0.0.1:{listener}"\n'
    operator.config.write_text(toml.replace('url = "mqtts://localhost"\n', url + tls) + enrolment)
    gateway_toml(cell, HERE, port)
    with contextlib.closing(State(cell / "state")) as state, state.transaction():
        # As if it had been enrolled by a token, long ago.
        Issued(f"https://localhost:{listener}", 0, 3).keep(state)
    run = [sys.executable, "-m", "edge.cli"]
    commands = (
        [*run, "broker", "run", "-c", operator.config, "--state", operator.state],
        [*run, "edge", "run", "-c", cell / "gateway.toml", "--state", cell / "state"],
    )

    def seen() -> dict[str, Any]:
        try:
            status: dict[str, Any] = json.loads((operator.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        gateway: dict[str, Any] = status["tasks"].get("wear", {}).get("gateways", {}).get(HERE, {})
        return gateway

    with contextlib.ExitStack() as stack:
        for command in commands:
            child = stack.enter_context(subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL))
            stack.callback(child.terminate)
            until(lambda: listening(listener), 120)
        until(lambda: seen().get("online"), 120)
        # It read the federation's plan, and said in signed words why it does not train yet.
        until(lambda: seen().get("verdict"), 120)
        # Its certificate was due: it got another while it ran.
        until(lambda: (read_status(cell / "state") or {}).get("certificate", {"until_ms": 3})["until_ms"] > 3, 120)
        # A run with a wrong state, and copies of the certificates, is refused before it ends this one's connection.
        shutil.copytree(pki, folder / "copied", ignore=lambda *_: ["ca.key", "issued"])
        office = shutil.copytree(operator.config.parent, folder / "other", ignore=lambda *_: ["state"])
        (office / "federation.toml").write_text(operator.config.read_text().replace(str(pki), str(folder / "copied")))
        wrong = ["run", "-c", str(office / "federation.toml"), "--state", str(folder / "wrong")]
        assert edge_cli.main(["broker", *wrong]) == 2
        assert f"[enrolment] needs an authority, and there is none in {folder / 'wrong'}" in capsys.readouterr().err
        assert not (folder / "wrong").exists()
        status = json.loads((operator.state / "status.json").read_text())
        assert status["mqtt"]["counters"]["connections"] == 1
        # Somebody enrols by a token while all of it runs.
        gateway_toml(folder / "late", OLD, port)
        capsys.readouterr()
        assert operator.run("enrol", "--path", OLD) == 0
        assert edge(folder / "late", "import", capsys.readouterr().out.strip()) == 0
        with contextlib.closing(Journal(operator.state)) as journal:
            assert journal.key_of(OLD)
