"""The one MQTT shell, over paho-mqtt: the aggregator and the gateways both speak through a `Link`.

paho runs its own network thread; whatever happens there is handed to the event loop, so owners see every callback in
their loop and need no lock. A link connects in the background for ever and never raises because the broker is away.
Nothing is queued while offline: owners publish again whatever still matters when `on_up` is called.

MQTT 5 (OASIS, 2019) is tried first and 3.1.1 is used where the broker does not have it. Brokers say so in three ways:
a CONNACK with a refusal, a closed connection, or, because a 3.1.1 parser takes the properties for the length of a
client id and waits for the rest, by silence; all three end in 3.1.1 within two seconds.
"""

import asyncio
import contextlib
import logging
import ssl
import sys
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.messages import MAX_PAYLOAD
from broker.settings import MqttSettings, check_mqtt, endpoint, password_of
from models.errors import UserError

__all__ = ["Inbound", "Link", "MqttSettings", "check_mqtt"]

log = logging.getLogger(__name__)

INBOUND_BYTES = 32 << 20
OUTBOUND_BYTES = 32 << 20
OUTBOUND_MESSAGES = 1000
RECEIVE_MAXIMUM = 64
SESSION_EXPIRY_S = 3600
RECONNECT_S = (1, 15)
# How long a broker may keep silent after an MQTT 5 CONNECT before 3.1.1 is tried.
SILENCE_S = 1.5
DRAIN_S = 2.0
_OVERHEAD = 1024  # topic and headers of a packet, at most
_WRONG_VERSION = 0x84


class Inbound(NamedTuple):
    """One received message; `connection` counts connections, so that an old message id is never acknowledged."""

    topic: str
    payload: bytes
    retain: bool
    qos: int
    mid: int
    connection: int = 0


class Link:
    """A connection that heals itself; every callback and every method belongs to the loop that called `start`.

    With `manual_ack` the owner calls `ack` for every message it was given, whatever it thinks of it: only then is
    the broker told (QoS 1) and are the message's bytes given back to the inbound queue, which holds 32 MiB at most.
    An `on_message` that raises has not kept its message: the link logs it, acknowledges, and goes on.
    `error` is the last failure in one line with its remedy, "" while all is well; `counters` only grow; `refused` is
    why the broker (MQTT 5) did not take the last message on a topic.
    """

    def __init__(
        self,
        settings: MqttSettings,
        *,
        client_id: str,
        will: tuple[str, bytes] | None,
        on_message: Callable[[Inbound], None],
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        manual_ack: bool = False,
    ) -> None:
        self.connected = False
        self.error = ""
        self._told = set[str]()  # since the last connection
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._endpoint = endpoint(settings.url)
        self._client_id = settings.client_id or client_id
        self._will = will
        self._on_message, self._on_up, self._on_down = on_message, on_up, on_down
        self._manual_ack = manual_ack
        self._five = settings.version != "3.1.1"
        self._filters: dict[str, None] = {}
        self.refused: dict[str, str] = {}
        self._sent: dict[int, tuple[str, int]] = {}
        self._lock = threading.Lock()
        self._held = 0  # inbound bytes not yet given back; guarded by the lock, because both threads change it
        self._lost = self._stopped = False
        self._answered = False  # whether the broker said why this try failed
        self._connection = 0
        self._max_packet: int | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[object]] = set()

    @property
    def version(self) -> Literal["5", "3.1.1"]:
        """The protocol of the current or next connection."""
        return "5" if self._five else "3.1.1"

    @property
    def status(self) -> dict[str, object]:
        """How it is; plain JSON types."""
        return {"connected": self.connected, "version": self.version, "error": self.error, "refused": {**self.refused}}

    def start(self) -> None:
        """Connect in the background; UserError when a certificate, key or password file can't be used."""
        self._loop = asyncio.get_running_loop()
        if self._endpoint.plain_remote:
            log.warning("mqtt: no TLS to %s (insecure = true): anybody on the way reads along", self._settings.url)
        self._client = self._connect()

    async def stop(self) -> None:
        """Send what is under way (two seconds at most), disconnect cleanly (no last will), join the thread."""
        deadline = self._loop.time() + DRAIN_S
        while self.connected and self._sent and self._loop.time() < deadline:  # noqa: ASYNC110 - the end of a life
            await asyncio.sleep(0.02)
        self.connected = False
        self._hush()
        self._stopped = True
        self._retire(self._client)
        await asyncio.gather(*self._closing)

    def subscribe(self, *filters: str) -> None:
        """Subscribe at QoS 1, now if connected and on every later connection."""
        new = [f for f in filters if f not in self._filters]
        self._filters.update(dict.fromkeys(filters))
        if new and self.connected:
            self._client.subscribe([(f, 1) for f in new])

    def unsubscribe(self, *filters: str) -> None:
        """Forget filters; unknown ones are ignored."""
        old = [f for f in filters if self._filters.pop(f, self) is None]
        if old and self.connected:
            self._client.unsubscribe(old)

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False) -> bool:
        """Hand a message to the network thread; False when offline, full, or too large for the broker."""
        waiting = len(payload) + sum(size for _, size in self._sent.values())
        full = len(self._sent) >= OUTBOUND_MESSAGES or waiting > OUTBOUND_BYTES
        if not self.connected or full:
            self.counters["publish-full" if full else "publish-offline"] += 1
            return False
        if self._max_packet and len(payload) + _OVERHEAD > self._max_packet:
            # An MQTT 5 broker would end the connection over it, again and again.
            self.counters["publish-large"] += 1
            self._fault(f"{len(payload)} bytes are too large for the broker", "raise its max_packet_size to 256 KiB")
            return False
        info = self._client.publish(topic, payload, qos=qos, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            return False
        if qos:
            self._sent[info.mid] = topic, len(payload)
        self.counters["published"] += 1
        return True

    def ack(self, inbound: Inbound) -> None:
        """Give the message's bytes back and, on the connection that it came by, tell the broker."""
        self._release(inbound)
        if self.connected and inbound.qos and inbound.connection == self._connection:
            self._client.ack(inbound.mid, inbound.qos)
        if self._lost and not self._held:
            # Messages were dropped unacknowledged; a session that is taken up again delivers them once more.
            self._lost = False
            self.renew("the inbound queue was full")

    # The network thread. Each of these only measures, then hands over to the loop.

    def _connect(self) -> paho.Client:
        s, where = self._settings, self._endpoint
        version = MQTTProtocolVersion.MQTTv5 if self._five else MQTTProtocolVersion.MQTTv311
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self._client_id,
            clean_session=None if self._five else not self._manual_ack,
            protocol=version,
            manual_ack=self._manual_ack,
        )
        if s.username is not None:
            client.username_pw_set(s.username, password_of(s.password_file))
        if where.tls:
            context = tls_context(s)
            client.tls_set_context(context)
            client.on_pre_connect = partial(self._read_certificate, context)
        if self._will:
            client.will_set(self._will[0], self._will[1], qos=1, retain=True)
        client.max_inflight_messages_set(RECEIVE_MAXIMUM)
        client.max_queued_messages_set(OUTBOUND_MESSAGES)
        client.reconnect_delay_set(*RECONNECT_S)
        client.on_socket_open = self._socket_open
        client.on_connect = self._connack
        client.on_connect_fail = self._connect_fail
        client.on_disconnect = self._disconnect
        client.on_message = self._message
        client.on_publish = self._puback
        client.on_subscribe = self._suback
        if self._five:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S if self._manual_ack else 0
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            properties.MaximumPacketSize = MAX_PAYLOAD + _OVERHEAD
            fresh = not self._manual_ack
            client.connect_async(where.host, where.port, s.keepalive_s, clean_start=fresh, properties=properties)
        else:
            client.connect_async(where.host, where.port, s.keepalive_s)
        client.loop_start()
        return client

    def _hand(self, client: paho.Client, function: Callable[..., None], *values: object) -> None:
        def run() -> None:
            if client is self._client and not self._stopped:
                function(*values)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(run)

    def _read_certificate(self, context: ssl.SSLContext, _client: paho.Client, _userdata: Any) -> None:
        """Before each connection: the certificate may have been renewed since the last one."""
        if not self._settings.cert:
            return
        try:
            context.load_cert_chain(self._settings.cert, self._settings.key)
        except (OSError, ValueError) as error:
            log.warning("mqtt: %s can't be used, the one before is: %s", self._settings.cert, error)

    def _socket_open(self, client: paho.Client, _userdata: Any, _socket: Any) -> None:
        self._hand(client, self._listen)

    def _connack(self, client: paho.Client, _u: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason.is_failure:
            self._hand(client, self._refused, reason.value, str(reason))
        else:
            self._connection += 1
            self._hand(client, self._up, getattr(properties, "MaximumPacketSize", None))

    def _connect_fail(self, client: paho.Client, _userdata: Any) -> None:
        # paho calls this while it handles the exception, and hands it to nobody.
        self._hand(client, self._failed, sys.exc_info()[1])

    def _disconnect(self, client: paho.Client, _u: Any, _flags: Any, reason: ReasonCode, _p: Any) -> None:
        self._hand(client, self._down, str(reason))

    def _message(self, client: paho.Client, _userdata: Any, message: paho.MQTTMessage) -> None:
        size = len(message.payload)
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        inbound = Inbound(topic, bytes(message.payload), message.retain, message.qos, message.mid, self._connection)
        if not topic or size > MAX_PAYLOAD:
            self.counters["dropped-topic" if not topic else "dropped-size"] += 1
            client.ack(message.mid, message.qos)  # it will not get smaller: don't have it sent again
            return
        with self._lock:
            if self._held + size + _OVERHEAD > INBOUND_BYTES:
                self.counters["dropped-full"] += 1
                self._lost = self._lost or (self._manual_ack and message.qos > 0)
                return
            self._held += size + _OVERHEAD
        with contextlib.suppress(RuntimeError):  # as in _hand, but a replaced client's last messages count too
            self._loop.call_soon_threadsafe(self._deliver, inbound)

    def _puback(self, client: paho.Client, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
        self._hand(client, self._published, mid, str(reason) if reason.is_failure else "")

    def _suback(self, client: paho.Client, _u: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        for reason in reasons:
            if reason.is_failure:
                problem = f"a subscription was refused ({reason})"
                self._hand(client, self._fault, problem, "allow it in the broker's ACL")

    # The loop.

    def _listen(self) -> None:
        self._answered = False
        self._hush()
        if self._five and self._settings.version == "auto":
            self._silence = self._loop.call_later(SILENCE_S, self._fall_back, "no answer to an MQTT 5 CONNECT")

    def _hush(self) -> None:
        if self._silence:
            self._silence.cancel()
            self._silence = None

    def _up(self, max_packet: int | None) -> None:
        self._hush()
        self._told.clear()
        self._max_packet = max_packet
        self.connected, self.error = True, ""
        self._sent.clear()
        self.refused.clear()
        self.counters["connections"] += 1
        log.info("mqtt: connected to %s with MQTT %s", self._settings.url, self.version)
        if self._filters:
            self._client.subscribe([(f, 1) for f in self._filters])
        self._on_up()

    def _refused(self, code: int, text: str) -> None:
        self._answered = True
        if code == _WRONG_VERSION and self._settings.version == "auto" and self._five:
            self._fall_back(text)
        else:
            self._fault(f"the broker refused: {text}", "check username, password_file, the certificate and the ACL")

    def _failed(self, error: BaseException | None) -> None:
        remedy = "check url, and that the broker runs"
        if isinstance(error, ssl.SSLError):
            remedy = "check ca, cert and key, and that the certificate names this host"
        self._fault(f"{type(error).__name__}: {error}", remedy)

    def _down(self, reason: str) -> None:
        if self.connected:
            self.connected = False
            self._fault(f"connection lost: {reason}", "it reconnects by itself")
            self._on_down(self.error)
        elif self._five and self._settings.version == "auto" and self._silence:
            self._fall_back(f"closed on an MQTT 5 CONNECT: {reason}")
        elif not self._answered:
            # TLS 1.3 lets a client believe that it is there, until it reads the broker's alert.
            remedy = "its log says why; with TLS, check that cert is the one that it wants, not expired or revoked"
            self._fault("the broker ends the connection", remedy)
        self._hush()

    def _fall_back(self, why: str) -> None:
        if not self.connected and self._five:
            self._five = False
            self.renew(why)

    def _fault(self, problem: str, remedy: str) -> None:
        line = f"mqtt {self._settings.url}: {problem}; {remedy}"
        if line not in self._told:  # tries that fail by turns in two ways are no news each time
            self._told.add(line)
            log.warning("%s", line)
        self.error = line

    def renew(self, why: str) -> None:
        """Begin again with a new client: paho can't change the version, nor take up its session, in another way."""
        log.info("mqtt: new connection with MQTT %s (%s)", self.version, why)
        self._hush()
        was, self.connected = self.connected, False
        old, self._client = self._client, self._connect()
        self._retire(old)
        if was:
            self._on_down(why)

    def _retire(self, client: paho.Client) -> None:
        client.disconnect()
        # Joining waits for the thread's next breath, so it is done off the loop.
        task: asyncio.Task[object] = self._loop.create_task(asyncio.to_thread(client.loop_stop))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _deliver(self, inbound: Inbound) -> None:
        if self._stopped:
            return
        self.counters["received"] += 1
        try:
            self._on_message(inbound)
        except Exception:
            self.counters["failed"] += 1
            log.exception("mqtt: a message on %r could not be handled", inbound.topic[:400])
            self.ack(inbound)  # nobody else will
            return
        if not self._manual_ack:
            self._release(inbound)

    def _release(self, inbound: Inbound) -> None:
        with self._lock:
            self._held = max(0, self._held - len(inbound.payload) - _OVERHEAD)

    def _published(self, mid: int, refusal: str) -> None:
        topic, _ = self._sent.pop(mid, ("", 0))
        self.refused.pop(topic, None)
        if refusal:
            self.refused[topic] = refusal
            self.counters["publish-refused"] += 1
            self._fault(f"a message was refused ({refusal})", "allow it in the broker's ACL")


def tls_context(s: MqttSettings) -> ssl.SSLContext:
    """Make what verifies the broker and shows this machine's certificate; UserError for files that don't fit."""
    try:
        context = ssl.create_default_context(cafile=s.ca)
        if s.cert:
            context.load_cert_chain(s.cert, s.key)
    except (OSError, ValueError) as error:
        place = s.cert or s.ca or "[mqtt]"
        raise UserError(place, 0, "ca, cert, key", f"can't be used: {error}", "give PEM files that fit") from error
    return context
