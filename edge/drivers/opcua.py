"""OPC UA: one subscription per connection, samples from its publish responses.

A connection is used once: after any failure a fresh client connects, looks the namespaces up and makes its
subscription again, so that nothing of a server's former life is believed. Publish responses are taken whole
from the session, not value by value, because a task per value would cost more than all of the rest.
"""

import asyncio
import base64
import contextlib
import logging
import math
import re
import socket
import time
import uuid
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import numpy as np
from asyncua import ua
from asyncua.client.client import Client
from asyncua.client.ua_client import UaClientState
from asyncua.ua import uaerrors
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.status_codes import StatusCodes

from edge.drivers._common import LostError, Point, Reader, endpoint, option, refusal
from edge.tags import Quality, Sample, Sink, Source, Tag
from models.errors import UserError

OPTIONS: dict[str, type] = {"publishing_ms": int, "user": str, "password_file": str, "timeout_s": float}

# The library logs a traceback for each failed request; what they mean is said once, in `health.error`.
logging.getLogger("asyncua").setLevel(logging.CRITICAL)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ADDRESS = re.compile(r"(?:nsu=(?P<uri>[^;]+);|ns=(?P<ns>\d{1,5});)?(?P<kind>[isgb])=(?P<id>.+)", re.DOTALL)
_BATCH = 500  # servers cap the items of one call, 1000 is common
_WATCH_S = 1.0  # between two looks at the server's state, and the wait for its answer
_TEND_S = 0.25  # between two looks at quarantine and silence
_OVERFLOW = 0x480  # InfoType DataValue and its Overflow bit (Part 4, 7.39)
_MOST_UINT32 = 2**32 - 1
_MOST_UINT16 = 2**16 - 1
_BY_HANDLE = attrgetter("ClientHandle")
_BY_TIME = itemgetter(1)  # of a Sample
_FILTER_REFUSED = {
    StatusCodes.BadMonitoredItemFilterInvalid,
    StatusCodes.BadMonitoredItemFilterUnsupported,
    StatusCodes.BadFilterNotAllowed,
}
_NUMBER = (float, int)  # bool is an int
_BAD = Quality.BAD
_QUALITY = (Quality.GOOD, Quality.UNCERTAIN, Quality.BAD, Quality.BAD)  # by a status code's two severity bits


class _Item(Point):
    """One tag and its node; its client handle is its place among the driver's points."""

    __slots__ = ("filtered", "handle", "node", "uri", "width")

    def __init__(self, handle: int, tag: Tag) -> None:
        super().__init__(tag)
        self.handle = handle
        self.uri, self.node = _parse_address(tag)
        self.width = tag.width
        # A repeated snapshot is still a snapshot, so arrays are reported by timestamp where the server can.
        self.filtered = tag.width > 0


class Driver(Reader[_Item]):
    """Reads `opc.tcp://` servers without security; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("opc.tcp",)

    def __init__(self, source: Source, sink: Sink) -> None:
        super().__init__(source, sink, [_Item(handle, tag) for handle, tag in enumerate(source.tags)])
        host, port = endpoint(source, "opc.tcp", 4840)
        shown = f"[{host}]" if ":" in host else host
        self._url = source.url if f":{port}" in source.url else f"opc.tcp://{shown}:{port}"
        self._publishing_ms = option(source, "publishing_ms", 100, 10, 60_000)
        self._timeout_s = option(source, "timeout_s", 4.0, 0.1, 120.0)
        self._user = option(source, "user", "")
        self._password = _password(source)
        self._client: Client | None = None
        self._subscription = 0
        self._ended = ""
        self._heard = 0.0
        self._silent_s = math.inf

    async def open(self) -> None:
        """Connect, make the subscription and its items; may raise anything."""
        self._ended = ""
        self._client = client = Client(self._url, timeout=self._timeout_s, watchdog_intervall=_WATCH_S)
        if self._user:
            client.set_user(self._user)
            client.set_password(self._password)
        await client.connect()
        keep_alives = max(1, round(1000 / self._publishing_ms))
        params = ua.CreateSubscriptionParameters()
        params.RequestedPublishingInterval = self._publishing_ms
        params.RequestedMaxKeepAliveCount = keep_alives
        params.RequestedLifetimeCount = max(3 * keep_alives, 60_000 // self._publishing_ms)
        params.PublishingEnabled = True
        result = await client.uaclient.session.create_subscription(params, self._published)
        self._subscription = result.SubscriptionId
        # Servers revise: wait as long as three of the keep-alives that they promised.
        self._silent_s = max(5.0, 3 * result.RevisedPublishingInterval * result.RevisedMaxKeepAliveCount / 1000)
        self._heard = time.monotonic()
        self.health.quarantined.clear()
        await self._create(client, self.points)

    async def read(self) -> None:
        """Watch while the session delivers; raises when the connection or the subscription is over."""
        client = self._client
        if client is None:
            raise LostError("not connected")
        self.connected()
        async with client.subscribe_state() as state:
            while True:
                with contextlib.suppress(TimeoutError):
                    await state.wait_for_state(UaClientState.DISCONNECTED, timeout=_TEND_S)
                    raise LostError(self._ended or "the connection was lost")
                if self._ended:
                    raise LostError(self._ended)
                if time.monotonic() - self._heard > self._silent_s:
                    raise LostError(f"the subscription sent nothing for {self._silent_s:.0f} s")
                if due := self.due():
                    await self._create(client, due)

    async def close(self) -> None:
        """Close session and socket, whatever state they are in."""
        client, self._client, self._subscription = self._client, None, 0
        if client is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), 1.5)
            client.disconnect_socket()

    async def _create(self, client: Client, items: Sequence[_Item]) -> None:
        """Create the monitored items of tags, in batches; those refused are quarantined."""
        spaces = await client.get_namespace_array()
        todo = []
        for item in items:
            if item.uri is None:
                todo.append((item, item.node))
            elif item.uri in spaces:
                space = ua.Int16(spaces.index(item.uri))
                todo.append((item, ua.NodeId(item.node.Identifier, space)))
            else:
                self.quarantine(item, f"the server has no namespace {item.uri}; check nsu= in the address")
        batch = _BATCH
        while todo:
            part = todo[:batch]
            try:
                again = await self._create_batch(client, part)
            except uaerrors.BadTooManyOperations:
                if len(part) == 1:
                    raise
                batch = len(part) // 2
            else:
                todo = again + todo[len(part) :]

    async def _create_batch(self, client: Client, part: list[tuple[_Item, ua.NodeId]]) -> list[tuple[_Item, ua.NodeId]]:
        """Create some items and act on each one's status; return those to try again without a filter."""
        params = ua.CreateMonitoredItemsParameters()
        params.SubscriptionId = self._subscription
        params.TimestampsToReturn = ua.TimestampsToReturn.Both
        params.ItemsToCreate = [self._request(item, node) for item, node in part]
        results = await client.uaclient.session.create_monitored_items(params)
        again = []
        for (item, node), result in zip(part, results, strict=True):
            status = result.StatusCode
            if status.is_good():
                self.release(item)
            elif item.filtered and status.value in _FILTER_REFUSED:
                item.filtered = False
                again.append((item, node))
            else:
                reason = f"the server refuses {item.tag.address}: {status.name}; check the address column"
                self.quarantine(item, reason)
        return again

    def _request(self, item: _Item, node: ua.NodeId) -> ua.MonitoredItemCreateRequest:
        sampling_ms = item.tag.sampling_ms or self._publishing_ms
        request = ua.MonitoredItemCreateRequest()
        request.ItemToMonitor.NodeId = node
        request.ItemToMonitor.AttributeId = AttributeIds.Value
        request.MonitoringMode = ua.MonitoringMode.Reporting
        parameters = request.RequestedParameters
        parameters.ClientHandle = item.handle
        parameters.SamplingInterval = sampling_ms
        # Ten times what one publishing interval brings: a gateway that is late a few times loses nothing.
        parameters.QueueSize = max(10, 10 * math.ceil(self._publishing_ms / sampling_ms))
        parameters.DiscardOldest = True
        if item.filtered:
            parameters.Filter = ua.DataChangeFilter(Trigger=ua.DataChangeTrigger.StatusValueTimestamp)
        return request

    def _published(self, result: ua.PublishResult) -> None:
        """Take one publish response; called by the session in the event loop."""
        if self._subscription not in {0, result.SubscriptionId}:
            return
        self._heard = time.monotonic()
        message = result.NotificationMessage
        if message.PublishTime is not None and message.PublishTime > _EPOCH:
            self.health.clock_skew_s = message.PublishTime.timestamp() - time.time()
        for part in message.NotificationData or ():
            if isinstance(part, ua.DataChangeNotification):
                self._changed(part.MonitoredItems)
            elif isinstance(part, ua.StatusChangeNotification):
                self._ended = self._ended or f"the server ended the subscription ({part.Status.name})"

    def _changed(self, notes: Sequence[Any]) -> None:
        """Turn one publish response into one batch of samples: the path that every value takes."""
        points, samples = self.points, []
        was, time_ns = None, 0
        # A server groups a response by item; the contract is by time, within one time by the order of the tags.
        for note in sorted(notes, key=_BY_HANDLE):
            data = note.Value
            if data is None or note.ClientHandle >= len(points):
                continue
            stamp = data.SourceTimestamp or data.ServerTimestamp
            if stamp is None:
                was, time_ns = None, time.time_ns()
            elif stamp != was:
                since = stamp - _EPOCH
                time_ns = (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
                was = stamp
            status = data.StatusCode.value if data.StatusCode is not None else 0
            if status & _OVERFLOW == _OVERFLOW:
                self.health.overflows += 1
            raw = data.Value.Value if data.Value is not None else None
            sample = _sample(points[note.ClientHandle], raw, time_ns, _QUALITY[status >> 30])
            if sample is not None:
                samples.append(sample)
        samples.sort(key=_BY_TIME)
        self.deliver(samples)

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        where = f"{self.source.name}: {self._url}"
        text = str(error) or type(error).__name__
        match error:
            case LostError():
                return f"{where}: {text}; connecting again"
            case ConnectionRefusedError():
                return f"{where} refuses connections; check that the server runs and the port is open"
            case socket.gaierror():
                return f"{where}: the host name is unknown; write its IP address or mend the name service"
            case TimeoutError():
                waited = f"{self._timeout_s:g} s"
                return f"{where} did not answer within {waited}; check address, network and firewall"
            case (
                uaerrors.BadUserAccessDenied()
                | uaerrors.BadIdentityTokenRejected()
                | uaerrors.BadIdentityTokenInvalid()
            ):
                return f"{where} refuses the user; check user and password_file of the source"
            case uaerrors.BadSecurityPolicyRejected() | uaerrors.BadSecurityModeRejected():
                return f"{where} has no endpoint without security; enable one for this gateway"
            case uaerrors.BadTooManySessions():
                return f"{where} has no free session; close another client or raise the server's limit"
            case uaerrors.UaStatusCodeError():
                return f"{where} answers {type(error).__name__}: {text}; see the server's log"
            case OSError():
                return f"{where} can't be reached ({text}); check the network and that the server runs"
        return f"{where}: {type(error).__name__}: {text}; check that the URL is an OPC UA server's"


def _sample(item: _Item, raw: object, time_ns: int, quality: Quality) -> Sample | None:
    """Make a sample of one value; None within the deadband, BAD for what is no value of that tag."""
    if quality is not _BAD:
        if item.width:
            return _wave(item, raw, time_ns, quality)
        if isinstance(raw, _NUMBER):
            return item.take(raw, time_ns, quality)
        if isinstance(raw, ua.LocalizedText):
            raw = raw.Text
        if isinstance(raw, str):
            item.latest_ns = max(item.latest_ns, time_ns)
            return Sample(item.ref, time_ns, float(zlib.crc32(raw.encode())), quality)
    item.latest_ns = max(item.latest_ns, time_ns)
    return item.bad(time_ns)


def _wave(item: _Item, raw: object, time_ns: int, quality: Quality) -> Sample:
    """Make a waveform sample: float32 (width,); BAD for an array of another length or not of finite numbers."""
    item.latest_ns = max(item.latest_ns, time_ns)
    if not isinstance(raw, list) or len(raw) != item.width or not isinstance(raw[0], _NUMBER):
        return item.bad(time_ns)
    wave = np.array(raw, np.float32)
    if not item.plain:
        wave = wave * np.float32(item.scale) + np.float32(item.offset)
    return Sample(item.ref, time_ns, wave, quality) if np.isfinite(wave).all() else item.bad(time_ns)


def _parse_address(tag: Tag) -> tuple[str | None, ua.NodeId]:
    """Parse the standard's text form (Part 6, 5.3.1.10) into namespace URI (or None) and node; UserError."""
    match = _ADDRESS.fullmatch(tag.address.strip())
    identifier = _identifier(match["kind"], match["id"]) if match else None
    space = int(match["ns"] or 0) if match else 0
    if match is None or identifier is None or space > _MOST_UINT16:
        remedy = "write nsu=urn:plant;s=Spindle.Temp, ns=2;s=Spindle.Temp or ns=2;i=1001"
        raise UserError(tag.file, tag.line, "address", f"{tag.address!r} is not an OPC UA node", remedy)
    return unquote(match["uri"]) if match["uri"] else None, ua.NodeId(identifier, ua.Int16(space))


def _identifier(kind: str, text: str) -> Any:
    """Return what follows `s=`, `i=`, `g=` or `b=` as the library wants it; None if it is no such thing."""
    try:
        if kind == "i":
            return ua.Int32(text) if 0 <= int(text) <= _MOST_UINT32 else None
        if kind == "g":
            return uuid.UUID(text)
        return text if kind == "s" else base64.b64decode(text, validate=True)
    except ValueError:
        return None


def _password(source: Source) -> str:
    file = option(source, "password_file", "")
    try:
        return Path(file).read_text(encoding="utf-8").strip() if file else ""
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{file} can't be read"
        raise refusal(source, "password_file", problem, "check its path and permissions") from error
