"""Enrolment over the network: a token, a listener of the aggregator over real sockets, and all that may go wrong."""

import asyncio
import base64
import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from broker import est, listener
from broker.config import load_federation
from broker.enrolment import by_token, make_token
from broker.journal import Journal
from broker.link import Link
from broker.listener import body_length, listening, password, read_head
from broker.messages import Request, Signer
from broker.pki import Authority, key_pem
from broker.settings import MqttSettings
from edge import enrol
from edge.cli import main
from edge.config import load_config
from edge.identity import Issued, make_own_request, own_signer, tls_files, with_own_tls
from edge.lab.processes import free_port
from edge.renewal import Renewal, renews_ms
from edge.ring import Samples
from edge.shop import Shop
from edge.store import State
from models.errors import LocalError, PeerError, UserError
from tests.test_identity import HERE, THERE, Operator, gateway_toml


class Office(Operator):
    """The operator's machine, whose federation.toml asks for a listener; `refused` is what it counts."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port, self.refused = free_port(), Counter[str]()
        with self.config.open("a") as file:
            file.write(f'[enrolment]\nlisten = "127.0.0.1:{self.port}"\n')

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The listener, in a loop of its own: the gateway's side blocks."""
        config = load_federation(self.config)
        assert config.enrolment
        ready, stop, loops = threading.Event(), asyncio.Event(), list[asyncio.AbstractEventLoop]()

        async def serve() -> None:
            assert config.enrolment
            async with listening(config, config.enrolment, self.state, self.refused):
                loops.append(asyncio.get_running_loop())
                ready.set()
                await stop.wait()

        thread = threading.Thread(target=lambda: asyncio.run(serve()))
        thread.start()
        try:
            assert ready.wait(20)
            yield
        finally:
            loops[0].call_soon_threadsafe(stop.set)
            thread.join(20)
            assert not thread.is_alive()

    def token(self, capsys: pytest.CaptureFixture[str], path: str = HERE) -> str:
        capsys.readouterr()
        assert self.run("enrol", "--path", path) == 0
        return capsys.readouterr().out.strip()


@pytest.fixture
def office(tmp_path: Path) -> Office:
    made = Office(tmp_path / "office")
    assert made.run("init", "--host", "localhost") == 0
    return made


def take(folder: Path, token: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """`tundish edge import`, as a person runs it: exit code and what it says on standard error."""
    capsys.readouterr()
    code = main(["edge", "import", token, "-c", str(folder / "gateway.toml"), "--state", str(folder / "state")])
    return code, capsys.readouterr().err


def ask(office: Office, data: bytes) -> bytes:
    """What the listener says to these bytes, over TLS."""
    context = ssl.create_default_context(cafile=str(office.state / "pki" / "ca.pem"))
    with (
        socket.create_connection(("127.0.0.1", office.port), 20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        tls.sendall(data)
        got = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while more := tls.recv(4096):
                got += more
        return got


def test_a_gateway_is_enrolled_by_a_token(office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cell2"
    gateway_toml(folder)
    token = office.token(capsys)
    with office.serving():
        assert take(folder, token, capsys)[0] == 0
        assert not office.refused
        code, said = take(folder, token, capsys)  # twice
        assert (code, "has been used" in said, said.count("\n")) == (2, True, 1)
    shown = with_own_tls(load_config(folder / "gateway.toml").mqtt, folder / "state")
    assert shown.cert
    certificate = x509.load_pem_x509_certificate(Path(shown.cert).read_bytes())
    assert certificate.subject.rfc4514_string() == f"CN={HERE}"
    assert (folder / "state/tls/ca.pem").read_bytes() == (office.state / "pki/ca.pem").read_bytes()
    with contextlib.closing(Journal(office.state)) as journal, contextlib.closing(State(folder / "state")) as state:
        assert journal.key_of(HERE) == own_signer(state).public_key
        assert state.pinned() == ("press-lines", journal.signer().public_key)
        lines = "".join(journal.ledger_lines())
    assert '"how":"token"' in lines.replace(" ", "")
    secret = est.Token.parse(token).secret
    for file in (*office.state.rglob("*"), *(folder / "state").rglob("*")):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_what_is_wrong_is_told_in_one_line(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cell2"
    gateway_toml(folder)
    token = office.token(capsys)

    def said(text: str) -> tuple[int, str]:
        code, line = take(folder, text, capsys)
        assert line.count("\n") == 1, line
        assert ";" in line  # its remedy
        return code, line

    code, line = said(token)
    assert (code, "can't be reached" in line) == (1, True)
    with office.serving():
        code, line = said(token[:-64] + "0" * 64)
        assert (code, "nothing was sent" in line) == (2, True)
        code, line = said(token[:-1])
        assert (code, "damaged" in line) == (2, True)
        code, line = said(office.token(capsys, THERE))
        assert (code, "for another path" in line) == (2, True)
        newer = office.token(capsys)
        code, line = said(token)
        assert (code, "a newer one replaced it" in line) == (2, True)
        with contextlib.closing(Journal(office.state)) as journal, journal.transaction():
            journal.add_token(est.Token.parse(newer).digest, HERE, 1)
        code, line = said(newer)
        assert (code, "has expired" in line) == (2, True)
    assert not (folder / "state/tls/cert.pem").exists()
    counted = {f"enrolment-{word}" for word in (est.OTHER_PATH, est.UNKNOWN, est.EXPIRED)}
    assert counted <= set(office.refused)
    with contextlib.closing(Journal(office.state)) as journal:
        assert journal.roster() == {}
    for text in (token, newer):
        assert est.Token.parse(text).secret not in caplog.text


def test_one_who_was_taken_out_has_no_token_left(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    token = est.Token.parse(office.token(capsys))
    # It has no key and no certificate yet.
    assert office.run("enrol", "--path", HERE, "--revoke") == 0
    assert capsys.readouterr().out == f"the token of {HERE} is no good any more\n"
    with contextlib.closing(Journal(office.state)) as journal:
        assert journal.token(token.digest) is None


def test_of_two_with_one_token_one_is_let_in(office: Office, tmp_path: Path) -> None:
    authority = Authority(office.state / "pki")
    with contextlib.closing(Journal(office.state)) as journal:
        token = make_token(journal, authority, HERE, office.url)
    requests = []
    for name in ("one", "two"):
        gateway_toml(tmp_path / name)
        with contextlib.closing(State(tmp_path / name / "state")) as state:
            config = load_config(tmp_path / name / "gateway.toml")
            requests.append(make_own_request(config, own_signer(state), tmp_path / name / "state"))
    won, start = list[bytes](), threading.Barrier(2)

    def come(request: Request) -> None:
        start.wait(20)
        with contextlib.closing(Journal(office.state)) as journal, contextlib.suppress(PeerError):
            by_token(journal, authority, "press-lines", token.secret, request)
            won.append(request.public_key)

    threads = [threading.Thread(target=come, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    with contextlib.closing(Journal(office.state)) as journal:
        assert [journal.key_of(HERE)] == won


def test_hostile_bytes_are_refused_and_the_listener_goes_on(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "GUESS_S", 0.0)
    folder = tmp_path / "cell2"
    gateway_toml(folder)
    basic = base64.b64encode(f"x:{'A' * 32}".encode())
    enroll = f"POST {est.ENROLL} HTTP/1.1\r\n".encode()
    with office.serving():
        for data, answer in (
            (b"GET / HTTP/1.1\r\n\r\n", b" 404 "),
            (b"DELETE /.well-known/est/cacerts HTTP/1.1\r\n\r\n", b" 405 "),
            (b"GET /.well-known/est/cacerts HTTP/1.1\r\n\r\n", b" 200 "),
            (b"\xff\xfe\r\n\r\n", b" 400 "),
            (enroll + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", b" 400 "),
            (enroll + b"\r\n", b" 411 "),
            (enroll + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n", b" 411 "),
            (enroll + b"Content-Length: 8193\r\n\r\n", b" 413 "),
            (enroll + b"Content-Length: -1\r\n\r\n", b" 413 "),
            (enroll + b"Content-Length: 3\r\n\r\nabc", b" 401 "),
            (enroll + b"Authorization: Basic " + basic + b"\r\nContent-Length: 3\r\n\r\nabc", b" 400 "),
            (f"POST {est.REENROLL} HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc".encode(), b" 403 "),
            (b"A" * 10_000, b""),
        ):
            got = ask(office, data)
            assert answer in got[:20], (data[:80], got)
        assert take(folder, office.token(capsys), capsys)[0] == 0
    assert office.refused["enrolment-internal"] == 0


def test_those_who_say_nothing_lose_their_places(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "LIFE_S", 3.0)
    monkeypatch.setattr(listener, "MOST_CONNECTIONS", 2)
    gateway_toml(tmp_path / "cell2")
    with office.serving(), contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", office.port), 60)) for _ in range(2)]
        assert take(tmp_path / "cell2", office.token(capsys), capsys)[0] == 0
        # Its two connections found no place before these two had lost theirs.
        assert office.refused["enrolment-connection"] == 2
        for one in silent:
            assert one.recv(1) == b""


@pytest.mark.filterwarnings("ignore:PKCS#7 certificates could not be parsed as DER")
def test_every_truncated_and_flipped_request_is_refused(office: Office, tmp_path: Path) -> None:
    from broker import admission  # noqa: PLC0415

    gateway_toml(tmp_path / "cell2")
    with contextlib.closing(State(tmp_path / "state")) as state:
        signer = own_signer(state)
        request = make_own_request(load_config(tmp_path / "cell2/gateway.toml"), signer, tmp_path / "state")
    sealed = admission.seal(signer, request)
    assert len(sealed) < est.MOST_BODY
    assert admission.unseal(sealed, Request) == request
    for i in range(len(sealed)):
        with pytest.raises(PeerError):
            admission.unseal(sealed[:i], Request)
        with pytest.raises(PeerError):
            admission.unseal(sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :], Request)
    certificates = pkcs7.serialize_certificates([Authority(office.state / "pki").certificate], Encoding.DER)
    body = base64.encodebytes(certificates)
    enrol.cacerts(body)
    for i in range(len(certificates)):
        with pytest.raises(PeerError):
            enrol.cacerts(base64.b64encode(certificates[:i]))
        with contextlib.suppress(PeerError):  # what still reads is caught by the fingerprint
            enrol.cacerts(base64.b64encode(certificates[:i] + bytes([certificates[i] ^ 1]) + certificates[i + 1 :]))


@pytest.mark.parametrize(
    "head",
    [b"", b"GET /", b"GET / HTTP/1.0", b"GET  / HTTP/1.1", b"GET / HTTP/1.1\r\nno colon", b"GET / HTTP/1.1\r\n: x"],
)
def test_heads_that_are_none(head: bytes) -> None:
    with pytest.raises(PeerError):
        read_head(head + b"\r\n\r\n")


def test_a_head_is_read_as_it_is() -> None:
    basic = base64.b64encode(b"acme/lyon:secret").decode()
    head = read_head(f"POST /x HTTP/1.1\r\nContent-Length: 12\r\nauthorization: Basic {basic}\r\n\r\n".encode())
    assert (head.method, head.target, body_length(head), password(head)) == ("POST", "/x", 12, "secret")


def test_a_token_is_read_as_it_was_written() -> None:
    for url in ("https://mqtt.acme.example:8443", "https://10.0.0.3:8443", "https://[fd00::1]:8443"):
        token = est.Token.new(url, "0" * 64)
        assert est.Token.parse(f" {token.text}\n") == token
        assert est.is_token(token.text)
        assert token.secret not in repr(token)
        for i in range(len(token.text)):
            with pytest.raises(UserError):
                est.Token.parse(token.text[:i])
    assert not est.is_token("/media/stick/cell2.admission")


def test_without_a_listener_there_is_no_token(tmp_path: Path) -> None:
    made = Operator(tmp_path / "office")
    made.run("init")
    with pytest.raises(UserError, match=r"\[enrolment\] listen"):
        made.run("enrol", "--path", HERE)


@pytest.mark.parametrize(
    ("listen", "host", "problem"),
    [("8443", "a", "no address"), ("localhost:8443", "a", "localhost"), ("0.0.0.0:99999", "a", "range"),
     ("0.0.0.0:8443", "a b", "no host")],
)  # fmt: skip
def test_a_listener_that_can_not_be(tmp_path: Path, listen: str, host: str, problem: str) -> None:
    made = Operator(tmp_path / "office")
    with made.config.open("a") as file:
        file.write(f'[enrolment]\nlisten = "{listen}"\nhost = "{host}"\n')
    with pytest.raises(UserError, match=problem) as caught:
        load_federation(made.config)
    assert caught.value.key.startswith("enrolment.")


async def test_a_port_that_is_taken_is_told(office: Office) -> None:
    config = load_federation(office.config)
    assert config.enrolment
    with office.serving(), pytest.raises(LocalError, match="choose another address or port"):
        async with listening(config, config.enrolment, office.state, office.refused):
            pass


# -- renewal -----------------------------------------------------------------------------------------------------------

DAY_MS = 24 * 3600 * 1000


@contextlib.contextmanager
def gateway(office: Office, folder: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Shop]:
    """One that was enrolled by a token, while the listener served."""
    gateway_toml(folder)
    with office.serving():
        assert take(folder, office.token(capsys), capsys)[0] == 0
    here = folder / "state"
    with contextlib.closing(State(here)) as state, contextlib.closing(Samples(here, 1 << 20)) as samples:
        shop = Shop(load_config(folder / "gateway.toml"), here, state, samples, own_signer(state), bool, print, print)
        pinned = state.pinned()
        assert pinned
        shop.federation, shop.federation_key = pinned
        yield shop


def serial(shop: Shop) -> int:
    return x509.load_pem_x509_certificate(tls_files(shop.folder)[1].read_bytes()).serial_number


def due_ms(shop: Shop) -> int:
    issued = Issued.stored(shop.state)
    assert issued
    at = renews_ms(issued)
    assert at
    return at


def test_a_certificate_is_renewed_at_two_thirds_of_its_life() -> None:
    assert renews_ms(Issued("https://a:1", 0, 90 * DAY_MS)) == 60 * DAY_MS
    assert renews_ms(Issued("https://a:1", 3 * DAY_MS, 6 * DAY_MS)) == 5 * DAY_MS
    assert renews_ms(Issued("", 0, 90 * DAY_MS)) is None


async def test_renewal_asks_with_the_certificate_that_ends(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway(office, tmp_path / "cell2", capsys) as shop, office.serving():
        due, before, key = due_ms(shop), serial(shop), tls_files(shop.folder)[2].read_bytes()
        renewal = Renewal(shop)
        await renewal.look(due - 1)
        assert serial(shop) == before
        await renewal.look(due)
        assert (renewal.problem, serial(shop) != before) == ("", True)
        assert tls_files(shop.folder)[2].read_bytes() == key
        assert due_ms(shop) >= due
        after = serial(shop)
        await renewal.look(due - 1)
        assert serial(shop) == after
    issued = (office.state / "pki/issued" / f"{HERE.replace('/', '+')}.pem").read_bytes()
    assert [one.serial_number for one in x509.load_pem_x509_certificates(issued)] == [before, after]


async def test_a_renewal_that_fails_is_told_and_tried_a_day_later(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway(office, tmp_path / "cell2", capsys) as shop:
        due, before, renewal = due_ms(shop), serial(shop), Renewal(shop)
        await renewal.look(due)
        assert "can't be reached" in renewal.problem
        assert (renewal.status() or {})["problem"] == renewal.problem
        with office.serving():
            await renewal.look(due + DAY_MS - 1)
            assert serial(shop) == before
            await renewal.look(due + DAY_MS)
        assert (renewal.problem, serial(shop) != before) == ("", True)


async def test_one_who_was_taken_out_is_not_renewed(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway(office, tmp_path / "cell2", capsys) as shop, office.serving():
        due, before, renewal = due_ms(shop), serial(shop), Renewal(shop)
        empty = (office.state / "pki/crl.pem").read_bytes()
        assert office.run("enrol", "--path", HERE, "--revoke") == 0
        await renewal.look(due)
        assert renewal.problem
        assert serial(shop) == before
        # Nor where the list of revoked ones got lost: the roster counts too.
        (office.state / "pki/crl.pem").write_bytes(empty)
        await renewal.look(due + DAY_MS)
        assert "not enrolled any more" in renewal.problem
        assert serial(shop) == before


async def test_a_stolen_certificate_alone_is_not_renewed(
    office: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway(office, tmp_path / "cell2", capsys) as shop, office.serving():
        due, before = due_ms(shop), serial(shop)
        shop.signer = Signer.generate()
        renewal = Renewal(shop)
        await renewal.look(due)
        assert "not enrolled any more" in renewal.problem
        assert serial(shop) == before
        assert office.refused[f"enrolment-{est.STRANGER}"] == 1


async def test_a_connection_shows_the_certificate_that_is_there_now(office: Office, tmp_path: Path) -> None:
    pki = office.state / "pki"
    authority, key = Authority(pki), ec.generate_private_key(ec.SECP256R1())
    cert = tmp_path / "cert.pem"
    (tmp_path / "cert.key").write_bytes(key_pem(key))
    cert.write_bytes(authority.issue(key.public_key(), HERE, "client"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki / "broker.pem", pki / "broker.key")
    context.load_verify_locations(pki / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    shown: asyncio.Queue[int] = asyncio.Queue()

    async def seen(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        await shown.put(x509.load_der_x509_certificate(der).serial_number)
        writer.close()

    server = await asyncio.start_server(seen, "127.0.0.1", 0, ssl=context)
    url = f"mqtts://localhost:{server.sockets[0].getsockname()[1]}"
    settings = MqttSettings(url=url, ca=str(pki / "ca.pem"), cert=str(cert), key=str(tmp_path / "cert.key"))
    link = Link(settings, client_id="x", will=None, on_message=print, on_up=print, on_down=print)
    async with server:
        link.start()
        first = await asyncio.wait_for(shown.get(), 60)
        cert.write_bytes(authority.issue(key.public_key(), HERE, "client"))
        renewed = x509.load_pem_x509_certificate(cert.read_bytes()).serial_number
        assert first != renewed
        while await asyncio.wait_for(shown.get(), 60) != renewed:
            pass
        await link.stop()
