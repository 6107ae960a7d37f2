"""What stands between this machine and an MQTT broker, step by step: name, TCP, TLS, CONNACK, permissions.

Each step says what was found, or what is wrong and what to do about it. The client that looks is one of its own, so
that nobody's session is taken over; it keeps nothing, and publishes one empty message, not retained, if at all.
"""

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from broker.link import tls_context
from broker.settings import Endpoint, MqttSettings, endpoint, password_of
from models.errors import UserError

_SHOWN = 5  # topics in one line
STEP_S = 5.0  # the longest that one answer is waited for

# OpenSSL's X509_V_ERR_… codes (openssl/x509_vfy.h).
_NOT_YET, _EXPIRED = 9, 10
_UNKNOWN = {2, 18, 19, 20, 21}
_OTHER_NAME = {62, 64}
_WRONG_VERSION = 0x84  # of CONNACK, in MQTT 5's numbers, which paho gives for 3.1.1 too
_CONNACK = {
    0x80: "check the broker's log",
    0x85: "set another client_id, or none; see the broker's log",
    0x86: "check username and password_file",
    0x87: "check username, password_file and the certificate, and that the broker knows this gateway",
    0x8C: "the broker wants another kind of login than a user name and password",
}


class Step(NamedTuple):
    """One look: `ok` True, False with the remedy in `text`, or None for what is worth knowing."""

    name: str
    ok: bool | None
    text: str


def ok(name: str, text: str) -> Step:
    """Make a step that went well."""
    return Step(name, True, text)  # noqa: FBT003


def fail(name: str, text: str) -> Step:
    """Make a step that failed; its text ends with the remedy."""
    return Step(name, False, text)  # noqa: FBT003


def note(name: str, text: str) -> Step:
    """Make a step that fails nothing, and should be known."""
    return Step(name, None, text)


async def reach(host: str, port: int) -> AsyncIterator[Step]:
    """Resolve a name and open a TCP connection to it; ends at the first step that fails."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(STEP_S):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError) as error:
        yield fail("name", f"{host} is unknown ({_short(error)}); write its IP address or mend the name service")
        return
    addresses = sorted({str(info[4][0]) for info in found})
    yield ok("name", f"{host} is {', '.join(addresses)}" if addresses != [host] else f"{host} is an address")
    try:
        async with asyncio.timeout(STEP_S):
            _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        yield fail("tcp", f"{host}:{port} refuses connections; check the port, and that the server runs")
    except TimeoutError:
        remedy = "check address, cable, routing and firewall"
        yield fail("tcp", f"{host}:{port} did not answer within {STEP_S:g} s; {remedy}")
    except OSError as error:
        yield fail("tcp", f"{host}:{port} can't be reached ({_short(error)}); check network and firewall")
    else:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        yield ok("tcp", f"{host}:{port} takes connections")


async def look(settings: MqttSettings, filters: Sequence[str], probe: str) -> AsyncIterator[Step]:
    """Go all the way to a broker: `filters` are subscribed to, `probe` ("": none) is a topic for one empty message."""
    where = endpoint(settings.url)
    async for step in reach(where.host, where.port):
        yield step
        if step.ok is False:
            return
    if where.tls:
        step = await _tls(settings, where)
        yield step
        if not step.ok:
            return
    async for step in _session(settings, where, filters, probe):
        yield step


# -- TLS -------------------------------------------------------------------------------------------------------------


async def _tls(settings: MqttSettings, where: Endpoint) -> Step:
    try:
        context = tls_context(settings)
    except UserError as error:
        return fail("tls", str(error))
    try:
        found, version = await _handshake(where, context)
    except ssl.SSLCertVerificationError as error:
        return fail("tls", _explain(error, settings, where))
    except (OSError, TimeoutError) as error:
        remedy = "write mqtt:// if this port has no TLS, or the port that has it"
        return fail("tls", f"no TLS with {where.host}:{where.port} ({_short(error)}); {remedy}")
    return ok("tls", f"{version}, the certificate is trusted and valid until {found.get('notAfter', '?')}")


async def _handshake(where: Endpoint, context: ssl.SSLContext) -> tuple[dict[str, Any], str]:
    """Shake hands and close; return the server's certificate (as `ssl` gives it) and TLS's version."""
    async with asyncio.timeout(STEP_S):
        _, writer = await asyncio.open_connection(where.host, where.port, ssl=context, server_hostname=where.host)
    connection = writer.get_extra_info("ssl_object")
    found, version = connection.getpeercert() or {}, str(connection.version())
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return found, version


def _explain(error: ssl.SSLCertVerificationError, settings: MqttSettings, where: Endpoint) -> str:
    code = error.verify_code
    if code in _UNKNOWN:
        ca = settings.ca or "the system's list"
        return f"the broker's certificate is from no CA in {ca}; write ca = the PEM file of the CA that issued it"
    if code == _EXPIRED:
        return "the broker's certificate has expired; renew it there, or check this gateway's clock"
    if code == _NOT_YET:
        return "the broker's certificate is not valid yet; check this gateway's clock"
    if code in _OTHER_NAME:
        return (
            f"the broker's certificate is not for {where.host}; write the host in url as it stands in the certificate"
        )
    return f"the broker's certificate is refused ({error.verify_message}); check ca, and the broker's certificate"


async def _speaks_tls(where: Endpoint) -> bool:
    """Whether a port that does not answer plain MQTT shakes hands by TLS. Nothing is sent to whom it may be."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        await _handshake(where, context)
    except (OSError, TimeoutError):
        return False
    return True


# -- MQTT ------------------------------------------------------------------------------------------------------------


class _Client:
    """One connection of a client with its own name; what the broker says comes in through `heard`."""

    def __init__(self, settings: MqttSettings, where: Endpoint, version: MQTTProtocolVersion) -> None:
        self.heard: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self.topics: list[str] = []  # that messages came on
        self.loop = asyncio.get_running_loop()
        five = version == MQTTProtocolVersion.MQTTv5
        name = f"tundish-doctor-{secrets.token_hex(4)}"
        self.paho = client = paho.Client(
            CallbackAPIVersion.VERSION2, name, clean_session=None if five else True, protocol=version
        )
        if settings.username is not None:
            client.username_pw_set(settings.username, password_of(settings.password_file))
        if where.tls:
            client.tls_set_context(tls_context(settings))
        client.on_connect = lambda _c, _u, _f, reason, _p: self._hear("connack", reason)
        client.on_disconnect = lambda _c, _u, _f, reason, _p: self._hear("end", reason)
        client.on_subscribe = lambda _c, _u, _m, reasons, _p: self._hear("suback", reasons)
        client.on_publish = lambda _c, _u, _m, reason, _p: self._hear("puback", reason)
        client.on_message = lambda _c, _u, message: self.topics.append(message.topic)

    def _hear(self, what: str, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.heard.put_nowait, (what, value))

    async def wait(self, *kinds: str) -> Any:
        """Return the next (kind, value) of these kinds; TimeoutError, or ConnectionError at the connection's end."""
        async with asyncio.timeout(STEP_S):
            while True:
                kind, value = await self.heard.get()
                if kind in kinds:
                    return value
                if kind == "end":
                    raise ConnectionError(str(value))

    async def connect(self, where: Endpoint) -> Any:
        """Connect; return CONNACK's reason."""
        await asyncio.to_thread(self.paho.connect, where.host, where.port, 15)
        self.paho.loop_start()
        return await self.wait("connack")

    async def close(self) -> None:
        self.paho.disconnect()
        await asyncio.to_thread(self.paho.loop_stop)


async def _session(settings: MqttSettings, where: Endpoint, filters: Sequence[str], probe: str) -> AsyncIterator[Step]:
    """Connect, with MQTT 3.1.1 where 5 is not had, and see what is allowed."""
    versions = [MQTTProtocolVersion.MQTTv5, MQTTProtocolVersion.MQTTv311]
    if settings.version != "auto":
        versions = versions[:1] if settings.version == "5" else versions[1:]
    for version in versions:
        client = _Client(settings, where, version)
        last = version == versions[-1]
        try:
            reason = await client.connect(where)
            if reason.value == _WRONG_VERSION and not last:
                continue
            if reason.is_failure:
                remedy = _CONNACK.get(reason.value, "see the broker's log")
                yield fail("connack", f"the broker refuses: {reason}; {remedy}")
                return
            shown = "5" if version == MQTTProtocolVersion.MQTTv5 else "3.1.1"
            yield ok("connack", f"connected with MQTT {shown}{_as(settings)}")
            async for step in _allowed(client, filters, probe, five=shown == "5"):
                yield step
        except (OSError, TimeoutError) as error:
            if not last:
                continue
            yield fail("connack", await _no_answer(settings, where, error))
        finally:
            await client.close()
        return


def _as(settings: MqttSettings) -> str:
    return f" as {settings.username}" if settings.username else ""


async def _no_answer(settings: MqttSettings, where: Endpoint, error: Exception) -> str:
    if not where.tls and await _speaks_tls(where):
        return "the broker wants TLS on this port; write mqtts:// in url, and ca"
    if where.tls:
        mine = "is refused" if settings.cert else "is missing"
        problem = f"the broker ended the connection ({_short(error)}): most likely a client certificate {mine}"
        return f"{problem}; check cert and key"
    return f"no answer to CONNECT ({_short(error)}); check that an MQTT broker listens on {where.host}:{where.port}"


async def _allowed(client: _Client, filters: Sequence[str], probe: str, *, five: bool) -> AsyncIterator[Step]:
    """Subscribe to each filter, and publish the probe."""
    for name in filters:
        client.paho.subscribe(name, 1)
        refusal = await _refusal(client, "suback")
        if refusal:
            yield fail("subscribe", f"{name} is refused ({refusal}); allow reading it in the broker's ACL")
        else:
            yield ok("subscribe", name)
    if not probe:
        return
    if not five:
        yield note("publish", "MQTT 3.1.1 brokers do not say whether publishing is allowed; see the broker's log")
        return
    client.paho.publish(probe, b"", qos=1)
    refusal = await _refusal(client, "puback")
    if refusal:
        area = probe.rpartition("/_fl/")[0]
        yield fail("publish", f"{probe} is refused ({refusal}); allow writing {area}/# in the broker's ACL")
        return
    yield ok("publish", probe)
    # What is retained came before the answer to what was sent later.
    if client.topics:
        yield ok("aggregator", f"retained: {', '.join(client.topics[:_SHOWN])}")
    else:
        why = "no aggregator has been there yet, or the broker's ACL forbids reading it, which Mosquitto does not say"
        yield note("aggregator", f"nothing is retained on {filters[0]}: {why}")


async def _refusal(client: _Client, kind: str) -> str:
    """Wait for an answer; say how it refuses, nothing if it does not. Some brokers refuse by hanging up."""
    try:
        answer = await client.wait(kind)
    except (OSError, TimeoutError) as error:
        return _short(error)
    reason = answer[0] if kind == "suback" else answer
    return str(reason) if reason.is_failure else ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
