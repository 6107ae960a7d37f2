"""MQTT: values that others already publish, as JSON or Sparkplug B: a plant with a namespace needs no new wires.

A tag's address is a topic (JSON: `{"timestamp_ms", "value"}` or a bare value), or a Sparkplug data topic and a metric:
`spBv1.0/Group/DDATA/Edge/Device#Metric`. Times are the publishers', retained values keep theirs. A topic that is silent
is not Bad; a lost broker, a death certificate and a null value are. The one thing ever published is a Sparkplug rebirth
request, which asks an edge node to say its births again and reaches no machine (`rebirth = false`: not even that).
"""

import asyncio
import contextlib
import re
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from typing import ClassVar

import msgspec

from broker.diagnose import Step, look
from broker.link import Inbound, Link
from broker.settings import MqttSettings, check_mqtt
from edge.drivers import _sparkplug as sparkplug
from edge.drivers._common import MOST_MS, LostError, Point, Reader, located, option, refusal
from edge.drivers._diagnose import listen
from edge.drivers._sparkplug_node import MESSAGES, Node, stamp_ns
from edge.tags import Quality, Sample, Sink, Source, Tag
from models.errors import PeerError, UserError

OPTIONS: dict[str, type] = {
    "client_id": str,
    "username": str,
    "password_file": str,
    "ca": str,
    "cert": str,
    "key": str,
    "insecure": bool,
    "version": str,
    "keepalive_s": int,
    "timeout_s": float,
    "rebirth": bool,
}

_SPARKPLUG = re.compile(
    r"spBv1\.0/(?P<group>[^/+#]+)/(?:NDATA/(?P<node>[^/+#]+)|DDATA/(?P<edge>[^/+#]+)/(?P<device>[^/+#]+))#(?P<metric>.+)"
)
_EXAMPLE = "write a topic, acme/lyon/_raw/Temp, or spBv1.0/Group/DDATA/Edge/Device#Metric"
_MOST_TOPIC = 65_535
_TEND_S = 0.25
_MOST_SHOWN = 20  # topics that the doctor subscribes to one by one
_REMEDY = "check what publishes there"


class Driver(Reader[Point]):
    """Subscribes at `mqtt://` and `mqtts://` brokers; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("mqtt", "mqtts")

    def __init__(self, source: Source, sink: Sink) -> None:
        super().__init__(source, sink, [Point(tag) for tag in source.tags])
        self._settings = _settings(source)
        self._version = self._settings.version
        self._timeout_s = option(source, "timeout_s", 10.0, 0.1, 120.0)
        self._rebirth = bool(option(source, "rebirth", True))  # noqa: FBT003 - the default of an option
        self._topics: dict[str, list[Point]] = defaultdict(list)
        self._nodes: dict[tuple[str, str], Node] = {}
        for point in self.points:
            self._place(point)
        self._link: Link | None = None
        self._ended = asyncio.Event()

    def _place(self, point: Point) -> None:
        """Put a tag where its messages will find it; UserError for an address that is none."""
        tag = point.tag
        if match := _SPARKPLUG.fullmatch(tag.address):
            group, name, device = match["group"], match["node"] or match["edge"], match["device"] or ""
            node = self._nodes.setdefault((group, name), Node(group, name))
            node.asset(device).points[match["metric"]].append(point)
        else:
            self._topics[_topic(tag)].append(point)

    async def open(self) -> None:
        """Connect to the broker; may raise anything."""
        self._ended.clear()
        self.health.quarantined.clear()
        for node in self._nodes.values():
            node.reset()
        settings = msgspec.structs.replace(self._settings, version=self._version)
        self._version = self._settings.version
        client_id = f"tundish-{self.source.name}-{secrets.token_hex(4)}"
        self._link = link = Link(
            settings,
            client_id=client_id,
            will=None,
            on_message=self._message,
            on_up=self.connected,
            on_down=lambda _reason: self._ended.set(),
        )
        link.subscribe(*self._topics, *(name for node in self._nodes.values() for name in node.filters))
        link.start()
        async with asyncio.timeout(self._timeout_s):
            while not link.connected:
                if link.error:
                    raise LostError(link.error)
                await asyncio.sleep(0.02)
        # What was found out about the broker holds for the next connection: 3.1.1 is not searched for again.
        self._version = link.version

    async def read(self) -> None:
        """Ask for births that are owed while the messages come; raises when the broker is lost."""
        link = self._link
        if link is None:
            raise LostError("not connected")
        while True:
            if link.error:
                self.health.error = f"{self.source.name}: {link.error}"
            if self._ended.is_set():
                raise LostError(link.error)
            if self._rebirth:
                self._ask(link)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _TEND_S)

    async def close(self) -> None:
        """Disconnect."""
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(link.stop(), 1.5)

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        where = f"{self.source.name}: {self.source.url}"
        if isinstance(error, LostError | UserError):
            return f"{self.source.name}: {error}"
        if isinstance(error, TimeoutError):
            return f"{where} did not answer within {self._timeout_s:g} s; check address, network and firewall"
        return f"{where}: {type(error).__name__}: {error}; check that an MQTT broker is there"

    def _message(self, inbound: Inbound) -> None:
        """Take one message; called by the link in the event loop."""
        if points := self._topics.get(inbound.topic):
            self._json(points, inbound)
        elif inbound.topic.startswith("spBv1.0/"):
            self._sparkplug(inbound)

    # -- JSON ---------------------------------------------------------------------------------------------------------

    def _json(self, points: list[Point], inbound: Inbound) -> None:
        now = time.time_ns()
        try:
            value, time_ns = parse_json(inbound.payload, now)
        except PeerError as error:
            for point in points:
                self.quarantine(point, f"{inbound.topic}: {error.detail}; {_REMEDY}")
            return
        samples = [self.sample(point, value, time_ns, Quality.GOOD) for point in points]
        # A retained value's time says when it was published, not what its publisher's clock is now.
        self._hand(samples, now + (self._ahead_ns or 0) if inbound.retain else time_ns)

    def _hand(self, samples: list[Sample | None], sent_ns: int) -> None:
        self.deliver(sorted((s for s in samples if s is not None), key=lambda sample: sample.time_ns), sent_ns)

    # -- Sparkplug ----------------------------------------------------------------------------------------------------

    def _sparkplug(self, inbound: Inbound) -> None:
        _, group, kind, name, *rest = [*inbound.topic.split("/"), "", "", ""]
        node = self._nodes.get((group, name))
        if node is None or kind not in MESSAGES:
            return
        try:
            payload = sparkplug.decode(inbound.payload)
        except PeerError as error:
            self.health.error = f"{self.source.name}: {inbound.topic}: {error.detail}; {_REMEDY}"
            node.unborn = True
            return
        if kind == "NDEATH":
            if node.died(payload):
                # The broker sends it as a will, made when the node connected: its time is not now.
                self.deliver(self._bad([point for asset in node.assets.values() for point in asset.all]))
            return
        if kind == "NBIRTH":
            node.born(payload)
            self.health.error = ""
        else:
            self.health.overflows += node.follow(payload)
        asset, sent_ns = node.assets.get(rest[0]), stamp_ns(payload.timestamp_ms, time.time_ns())
        if asset is None:
            return
        if kind == "DDEATH":
            self.deliver(self._bad(asset.all), sent_ns)
            return
        missing = asset.learn(payload.metrics) if kind in {"NBIRTH", "DBIRTH"} else []
        self._hand([self.sample(*value) for value in node.values(asset, payload, sent_ns)], sent_ns)
        for name in missing:
            for point in asset.points[name]:
                reason = f"the birth of {asset.what} has no metric {name!r}; check the address column"
                self.quarantine(point, reason)

    def _ask(self, link: Link) -> None:
        """Request the births that are owed."""
        now = time.monotonic()
        for node in self._nodes.values():
            if node.ask(now):
                request = sparkplug.rebirth(time.time_ns() // 1_000_000)
                link.publish(f"spBv1.0/{node.group}/NCMD/{node.name}", request, qos=0)


def parse_json(payload: bytes, now_ns: int) -> tuple[object, int]:
    """Return the value and its time of `{"timestamp_ms", "value"}`, or of a bare value with the time `now_ns`.

    PeerError for what is neither; the value may be None, which is Bad.
    """
    try:
        found = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise PeerError("json", "the payload is not JSON") from None
    if not isinstance(found, dict):
        return found, now_ns
    stamp = found.get("timestamp_ms")
    if "value" not in found or not isinstance(stamp, int | float) or not 0 < stamp < MOST_MS:
        raise PeerError("json", 'the payload is not {"timestamp_ms": milliseconds, "value": a value}')
    return found["value"], int(stamp) * 1_000_000


def _topic(tag: Tag) -> str:
    """Return the address as a topic without wildcards."""
    wrong = re.search(r"[+#\0]", tag.address) or tag.address.startswith(("$", "spBv1.0/"))
    if wrong or len(tag.address.encode()) > _MOST_TOPIC:
        raise UserError(tag.file, tag.line, "address", f"{tag.address!r} is no topic", _EXAMPLE)
    return tag.address


class _Place:
    """A `[[source]]` as `check_mqtt` wants a file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.name = str(located(source, "gateway.toml"))

    def error(self, path: list[str | int], problem: str, remedy: str) -> UserError:
        """Build the error for the last key of a path."""
        return refusal(self.source, str(path[-1]), problem, remedy)


def _settings(source: Source) -> MqttSettings:
    keys = set(MqttSettings.__struct_fields__) & source.options.keys()
    try:
        settings = msgspec.convert({"url": source.url} | {key: source.options[key] for key in keys}, MqttSettings)
    except msgspec.ValidationError as error:
        key = str(error).rpartition("$.")[2].rstrip("`")
        raise refusal(source, key, str(error), "see docs/reference.md") from None
    return check_mqtt(_Place(source), settings)


async def diagnose(source: Source) -> AsyncIterator[Step]:
    """Say step by step how far this gateway comes with a broker and its topics."""
    topics = [tag.address for tag in source.tags if not _SPARKPLUG.fullmatch(tag.address)]
    async for step in look(_settings(source), topics[:_MOST_SHOWN], ""):
        yield step
        if step.ok is False:
            return
    async for step in listen(source, patient=True):
        yield step
