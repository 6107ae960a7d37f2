"""Enrolment over the network, the aggregator's side: an HTTPS listener for the three paths of `broker.est`.

Off unless `[enrolment]` asks for it. Whoever can reach the port may send anything: a connection carries one request
within LIFE_S, of bounded head and body, MOST_CONNECTIONS at a time, the handshake counted in; what is decided and
signed is done in a thread, so that no round waits for it. A token that is not good costs GUESS_S before it is answered.
"""

import asyncio
import base64
import binascii
import contextlib
import logging
import os
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from cryptography.x509.oid import NameOID

from broker import admission, est
from broker.config import EnrolmentTable, FederationConfig
from broker.enrolment import by_token, renew, url_of
from broker.journal import Journal
from broker.messages import Admission, Request
from broker.pki import Authority
from models.errors import LocalError, PeerError, TundishError

log = logging.getLogger(__name__)

LIFE_S = 10.0
GUESS_S = 1.0
MOST_CONNECTIONS = 16
_LOUD = 10
_BACKLOG = 32
_PAUSE_S = 1.0
_STATUS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    411: "Length Required", 413: "Content Too Large", 500: "Internal Server Error",
}  # fmt: skip
_STATUS_OF = {est.UNKNOWN: 401, est.USED: 401, est.EXPIRED: 401, est.OTHER_PATH: 403, est.STRANGER: 403}
_METHODS = {est.CACERTS: "GET", est.ENROLL: "POST", est.REENROLL: "POST"}


class HttpRequest(NamedTuple):
    """What of a request matters here: header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]


class _Refusal(Exception):  # noqa: N818 - not an error of ours
    """What is answered instead: a status, and a word."""

    def __init__(self, status: int, word: str) -> None:
        super().__init__(word)
        self.status, self.word = status, word


@contextlib.asynccontextmanager
async def listening(
    config: FederationConfig, table: EnrolmentTable, state: Path, refusals: Counter[str]
) -> AsyncIterator[None]:
    """Serve as long as the context lasts; UserError without an authority, LocalError where the port can't be had."""
    listener = Listener(config, table, state, refusals)
    listener.open()
    serving = asyncio.create_task(listener.serve())
    try:
        yield
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        await listener.close()


class Listener:
    """Accepts and answers; `refusals` counts by reason."""

    def __init__(self, config: FederationConfig, table: EnrolmentTable, state: Path, refusals: Counter[str]) -> None:
        self._federation, self._state, self._refusals = config.name, state, refusals
        self._address = est.listen_address(table.listen)
        self._authority = Authority(state / "pki")
        self._url = url_of(self._authority, table)
        self._host = table.host or self._authority.brokers_host()
        self._free = asyncio.Semaphore(MOST_CONNECTIONS)
        self._pair = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def open(self) -> None:
        """Take the port; LocalError."""
        try:
            family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
            self._socket = socket.create_server(self._address, family=family, backlog=_BACKLOG)
        except OSError as error:
            problem = f"[enrolment] listen: {est.https(*self._address)}: {os.strerror(error.errno or 0)}"
            raise LocalError(f"{problem}; choose another address or port") from error
        self._socket.settimeout(0.0)
        log.info("enrolment: listening on %s port %d, for tokens with %s", *self._address, self._url)

    async def close(self) -> None:
        """Let the port go, and whoever is connected."""
        self._socket.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def serve(self) -> None:
        """Accept until cancelled; who comes when all places are taken waits in the system's queue."""
        loop = asyncio.get_running_loop()
        while True:
            await self._free.acquire()
            try:
                peer, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                self._free.release()
                log.warning("enrolment: %s", error)
                await asyncio.sleep(_PAUSE_S)
                continue
            except asyncio.CancelledError:
                self._free.release()
                raise
            task = asyncio.create_task(self._life(peer))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._free.release()

    async def _life(self, peer: socket.socket) -> None:
        """One connection, from its first byte to its last; whatever it does ends here."""
        try:
            async with asyncio.timeout(LIFE_S):
                await self._converse(peer)
        except (OSError, TimeoutError, EOFError, asyncio.LimitOverrunError) as error:
            self._refuse("connection", f"{type(error).__name__}: {error}")
        except Exception:
            # Nobody foresaw it, yet one connection must not end enrolment for everybody else.
            self._refusals["enrolment-internal"] += 1
            log.exception("enrolment: a connection")
        finally:
            peer.close()

    async def _converse(self, peer: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with self._pair:
            context = await asyncio.to_thread(self._context)
        reader = asyncio.StreamReader(limit=est.MOST_HEAD)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, peer, ssl=context)
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            writer.write(await self._answer(reader, transport.get_extra_info("ssl_object")))
            await writer.drain()
            writer.close()
            with contextlib.suppress(OSError):  # it has its answer: how it hangs up is its own affair
                await writer.wait_closed()
        finally:
            transport.abort()

    def _context(self) -> ssl.SSLContext:
        """TLS by what the files hold now: our own certificate, and who is revoked."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(*self._authority.server_pair(self._host))
        context.load_verify_locations(self._authority.folder / "ca.pem")
        context.load_verify_locations(self._authority.folder / "crl.pem")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    async def _answer(self, reader: asyncio.StreamReader, tls: ssl.SSLObject) -> bytes:
        """Read a request and carry it out: the bytes of its response."""
        try:
            request = read_head(await reader.readuntil(b"\r\n\r\n"))
            check_target(request)
            if request.target == est.CACERTS:
                certificates = pkcs7.serialize_certificates([self._authority.certificate], Encoding.DER)
                return response(200, base64.encodebytes(certificates), est.PKCS7_TYPE, encoded=True)
            body = await reader.readexactly(body_length(request))
            answer = await asyncio.to_thread(self._decide, request, body, tls.getpeercert(binary_form=True))
            return response(200, answer, est.BODY_TYPE)
        except PeerError as error:
            self._refuse(error.reason, error.detail)
            if error.reason == est.UNKNOWN:
                await asyncio.sleep(GUESS_S)
            word = error.reason if error.reason in _STATUS_OF else est.BAD
            return response(_STATUS_OF.get(error.reason, 400), word.encode())
        except _Refusal as refusal:
            self._refuse(refusal.word, str(refusal.status))
            return response(refusal.status, refusal.word.encode())
        except TundishError as error:
            log.error("enrolment: %s", error)
            return response(500, b"internal")

    def _decide(self, request: HttpRequest, body: bytes, certificate: bytes | None) -> bytes:
        """Let in, or renew (in a thread): the sealed admission; PeerError."""
        secret, name = "", ""
        if request.target == est.ENROLL:
            secret = password(request)
        elif certificate is None:
            raise PeerError(est.STRANGER, "no certificate was shown")
        else:
            subject = x509.load_der_x509_certificate(certificate).subject
            name = str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        asked = admission.unseal(body, Request)
        with contextlib.closing(Journal(self._state)) as journal:
            answer: Admission
            if secret:
                answer = by_token(journal, self._authority, self._federation, secret, asked)
            else:
                answer = renew(journal, self._authority, self._federation, name, asked)
            log.info("enrolment: %s %s", answer.path, "is enrolled" if secret else "has a new certificate")
            return admission.seal(journal.signer(), answer)

    def _refuse(self, reason: str, detail: str) -> None:
        self._refusals[f"enrolment-{reason}"] += 1
        count = self._refusals[f"enrolment-{reason}"]
        if count <= _LOUD or count % 1000 == 0:
            log.warning("enrolment: refused (%s, %d so far): %r", reason, count, detail[:400])


def read_head(head: bytes) -> HttpRequest:
    """Read request line and headers (RFC 9112), without the body; PeerError."""
    try:
        first, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
        method, target, version = first.split(" ")
        headers = dict[str, str]()
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip() or name.lower() in headers:
                raise PeerError(est.BAD, "a header that is none, or there twice")
            headers[name.lower()] = value.strip()
    except (UnicodeDecodeError, ValueError) as error:
        raise PeerError(est.BAD, "not a request of HTTP/1.1") from error
    if version != "HTTP/1.1":
        raise PeerError(est.BAD, "not HTTP/1.1")
    return HttpRequest(method, target, headers)


def check_target(request: HttpRequest) -> None:
    """Hold a request to the three paths, each with its method."""
    if request.target not in _METHODS:
        raise _Refusal(404, "path")
    if request.method != _METHODS[request.target]:
        raise _Refusal(405, "method")


def body_length(request: HttpRequest) -> int:
    """How many bytes follow, before any is taken."""
    text = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not text:
        raise _Refusal(411, "length")
    if not text.isdecimal() or len(text) > len(str(est.MOST_BODY)) or int(text) > est.MOST_BODY:
        raise _Refusal(413, "size")
    return int(text)


def password(request: HttpRequest) -> str:
    """The token of HTTP Basic (RFC 7617); PeerError."""
    scheme, _, text = request.headers.get("authorization", "").partition(" ")
    try:
        secret = base64.b64decode(text, validate=True).decode("ascii").partition(":")[2]
    except (binascii.Error, ValueError):
        secret = ""
    if scheme.lower() != "basic" or not secret:
        raise PeerError(est.UNKNOWN, "no token")
    return secret


def response(status: int, body: bytes, type_: str = "text/plain", *, encoded: bool = False) -> bytes:
    """Write a response, the connection's last."""
    lines = [f"HTTP/1.1 {status} {_STATUS[status]}", f"Content-Type: {type_}", f"Content-Length: {len(body)}"]
    lines += ["Content-Transfer-Encoding: base64"] if encoded else []
    lines += ['WWW-Authenticate: Basic realm="enrolment"'] if status == 401 else []  # noqa: PLR2004
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("ascii") + body
