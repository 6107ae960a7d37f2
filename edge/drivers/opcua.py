"""OPC UA: one subscription that outlives its connections, samples from its publish responses.

What of a server's former life goes on is decided in `_opcua_link`; anything that does not is made again from nothing:
namespaces, subscription, items. Publish responses are taken whole, not value by value, because a task per value
would cost more than all of the rest. Where a server gives no subscription, values are read in batches.
"""

import asyncio
import logging
import math
import time
from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

from asyncua import ua
from asyncua.ua import uaerrors
from asyncua.ua.attribute_ids import AttributeIds
from asyncua.ua.status_codes import StatusCodes

from edge.drivers import _opcua_security as security
from edge.drivers._common import LostError, Reader, option, refusal
from edge.drivers._opcua_diagnose import diagnose
from edge.drivers._opcua_errors import explain
from edge.drivers._opcua_link import Link, batches, server_url
from edge.drivers._opcua_values import Backlog, Held, Item, make_filter, to_sample, unfit
from edge.tags import Quality, Sample, Sink, Source

__all__ = ["OPTIONS", "Driver", "diagnose"]

OPTIONS: dict[str, type] = {
    "publishing_ms": int,
    "timeout_s": float,
    "mode": str,
    "queue_s": float,
    **security.OPTIONS,
}

# The library logs a traceback for each failed request; what they mean is said once, in `health.error`.
logging.getLogger("asyncua").setLevel(logging.CRITICAL)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BAD = Quality.BAD
_TEND_S = 0.25  # between two looks at quarantine and silence
_OVERFLOW = 0x480  # InfoType DataValue and its Overflow bit (Part 4, 7.39)
_QUEUE = (10, 10_000)  # least and most values that a server is asked to queue for one tag
_COARSER = 1.05  # times the interval asked for, from which on it is worth a note
_BY_HANDLE = attrgetter("ClientHandle")
_BY_TIME = itemgetter(1)  # of a Sample
_FILTER_REFUSED = {
    StatusCodes.BadMonitoredItemFilterInvalid,
    StatusCodes.BadMonitoredItemFilterUnsupported,
    StatusCodes.BadFilterNotAllowed,
    StatusCodes.BadDeadbandFilterInvalid,
}
_GONE = {
    StatusCodes.BadNodeIdUnknown,
    StatusCodes.BadNodeIdInvalid,
    StatusCodes.BadAttributeIdInvalid,
    StatusCodes.BadMonitoredItemIdInvalid,
}
_NO_SUBSCRIPTION = (
    uaerrors.BadServiceUnsupported,
    uaerrors.BadNotSupported,
    uaerrors.BadNotImplemented,
    uaerrors.BadTooManySubscriptions,
)
_QUALITY = (Quality.GOOD, Quality.UNCERTAIN, Quality.BAD, Quality.BAD)  # by a status code's two severity bits


class Driver(Reader[Item]):
    """Reads `opc.tcp://` servers; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("opc.tcp",)
    knows_range: ClassVar[bool] = True

    def __init__(self, source: Source, sink: Sink) -> None:
        super().__init__(source, sink, [Item(handle, tag) for handle, tag in enumerate(source.tags)])
        self._url = server_url(source)
        self._publishing_ms = option(source, "publishing_ms", 100, 10, 60_000)
        self._timeout_s = option(source, "timeout_s", 4.0, 0.1, 120.0)
        self._queue_s = option(source, "queue_s", 30.0, 0.0, 3600.0)
        mode = option(source, "mode", "subscribe")
        if mode not in {"subscribe", "poll"}:
            raise refusal(source, "mode", f"{mode!r} is no mode", 'write "subscribe" or "poll"')
        self._poll_asked = mode == "poll"
        self._polls = False
        self._security = security.Security(source)
        self._link = Link(self._url, self._timeout_s, self._security)
        self._held = Held()
        self._backlog: Backlog | None = None
        self._noted: dict[str, tuple[int, str]] = {}
        self._ended = ""
        self._heard = 0.0
        self._silent_s = math.inf

    async def open(self) -> None:
        """Connect, and go on with the subscription of before or make a new one; may raise anything."""
        self._ended = ""
        resumed = await self._link.open()
        self.health.gaps = self._link.gaps
        self._heard = time.monotonic()
        if resumed:
            self._held.resume(self.points)
            self._backlog = Backlog(self.health.overflows)
            return
        self._backlog = None
        self._held.clear()
        self._noted.clear()
        self.health.notes.clear()
        self.health.quarantined.clear()
        if self._security.exposed:
            self._note("password", self._security.exposed)
        for item in self.points:
            item.monitored, item.filter = None, make_filter(item.tag)
        self._polls = self._poll_asked or not await self._subscribe()
        found = self._resolve(self.points)
        if not self._polls:
            await self._create(found)

    async def _subscribe(self) -> bool:
        """Make the subscription; False if the server gives none."""
        keep_alives = max(1, round(1000 / self._publishing_ms))
        try:
            result = await self._link.subscribe(self._publishing_ms, keep_alives)
        except _NO_SUBSCRIPTION as error:
            self._note("mode", f"the server gives no subscription ({type(error).__name__}): values are polled")
            return False
        interval_ms = result.RevisedPublishingInterval
        # Servers revise: wait as long as three of the keep-alives that they promised.
        self._silent_s = max(5.0, 3 * interval_ms * result.RevisedMaxKeepAliveCount / 1000)
        bridged_s = min(interval_ms * result.RevisedLifetimeCount / 1000, self._link.session_s)
        if bridged_s < self._queue_s:
            self._note("lifetime", f"the server keeps the subscription for {bridged_s:.0f} s of a cut only")
        if interval_ms > self._publishing_ms * _COARSER:
            self._note("publishing", f"the server publishes every {interval_ms:g} ms, not {self._publishing_ms}")
        return True

    async def read(self) -> None:
        """Deliver while the session lasts; raises when the connection or the subscription is over."""
        self.connected()
        work: list[Coroutine[Any, Any, None]] = [self._link.watch()]
        work += [self._poll(period) for period in self._periods()] if self._polls else [self._publish()]
        jobs = [asyncio.create_task(each) for each in work]
        try:
            while True:
                done, _ = await asyncio.wait(jobs, timeout=_TEND_S, return_when=asyncio.FIRST_COMPLETED)
                self.health.gaps = self._link.gaps
                for job in done:
                    job.result()
                await self._tend()
        finally:
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            if self._link.subscription:
                self._held.keep(self.points)
            self.health.gaps = self._link.gaps

    async def _tend(self) -> None:
        """Look after what no value tells: an ended or silent subscription, and refused tags."""
        if self._ended:
            await self._link.abandon()
            raise LostError(self._ended)
        if not self._polls and time.monotonic() - self._heard > self._silent_s:
            await self._link.abandon()
            raise LostError(f"the subscription sent nothing for {self._silent_s:.0f} s")
        if due := self._resolve(self.due()):
            await (self._probe(due) if self._polls else self._create(due))

    async def cut(self) -> None:
        """Drop the connection; the session waits at the server for a while."""
        self._link.cut()

    async def close(self) -> None:
        """Close session and socket, whatever state they are in."""
        await self._link.close()

    # -- items ------------------------------------------------------------------------------------------------------

    def _resolve(self, items: Sequence[Item]) -> list[Item]:
        """Find the nodes of this life of the server by their namespaces' URIs; return the items that have one."""
        spaces = self._link.spaces
        found = []
        for item in items:
            item.before = None
            if item.uri in spaces:
                item.target = ua.NodeId(item.node.Identifier, ua.Int16(spaces.index(item.uri)))
            if item.uri is None or item.uri in spaces:
                found.append(item)
            else:
                self.quarantine(item, f"the server has no namespace {item.uri}; check nsu= in the address")
        return found

    async def _create(self, items: Sequence[Item]) -> None:
        """Create the monitored items of tags, in batches; those refused are quarantined."""
        stale = [item.monitored for item in items if item.monitored is not None]
        for part in batches(stale, self._link.max_items):
            params = ua.DeleteMonitoredItemsParameters(self._link.subscription, list(part))
            await self._link.session.delete_monitored_items(params)
        todo, batch = list(items), self._link.max_items
        while todo:
            part = todo[:batch]
            try:
                again = await self._create_batch(part)
            except uaerrors.BadTooManyOperations:
                if len(part) == 1:
                    raise
                batch = len(part) // 2
            else:
                todo = again + todo[len(part) :]

    async def _create_batch(self, part: list[Item]) -> list[Item]:
        """Create some items and act on each one's status; return those to try again without a filter."""
        params = ua.CreateMonitoredItemsParameters()
        params.SubscriptionId = self._link.subscription
        params.TimestampsToReturn = ua.TimestampsToReturn.Both
        params.ItemsToCreate = [self._request(item) for item in part]
        results = await self._link.session.create_monitored_items(params)
        again = []
        for item, result in zip(part, results, strict=True):
            status = result.StatusCode
            item.monitored = result.MonitoredItemId if status.is_good() else None
            if status.is_good():
                self._revised(item, result)
                self.release(item)
            elif item.filter is not None and status.value in _FILTER_REFUSED:
                if item.tag.deadband_percent:
                    why = "the server knows no percent deadband for it: every change is reported"
                    self._note("deadband", f"{item.ref}: {why}")
                item.filter = None
                again.append(item)
            else:
                reason = f"the server refuses {item.tag.address}: {status.name}; check the address column"
                self.quarantine(item, reason)
        return again

    def _request(self, item: Item) -> ua.MonitoredItemCreateRequest:
        request = ua.MonitoredItemCreateRequest()
        request.ItemToMonitor.NodeId = item.target
        request.ItemToMonitor.AttributeId = AttributeIds.Value
        request.MonitoringMode = ua.MonitoringMode.Reporting
        parameters = request.RequestedParameters
        parameters.ClientHandle = item.handle
        parameters.SamplingInterval = item.tag.sampling_ms or self._publishing_ms
        parameters.QueueSize = self._queue(item)
        parameters.DiscardOldest = True
        parameters.Filter = item.filter
        return request

    def _queue(self, item: Item) -> int:
        """How many values bridge `queue_s` without a connection."""
        least, most = _QUEUE
        return min(most, max(least, math.ceil(1000 * self._queue_s / (item.tag.sampling_ms or self._publishing_ms))))

    def _revised(self, item: Item, result: ua.MonitoredItemCreateResult) -> None:
        """Say where the server gives less than was asked for."""
        item.queue = result.RevisedQueueSize
        asked, given = item.tag.sampling_ms, result.RevisedSamplingInterval
        if asked and given > asked * _COARSER:
            self._note("sampling", f"{item.ref}: the server samples every {given:g} ms, not {asked}")
        if 0 < result.RevisedQueueSize < self._queue(item):
            size = result.RevisedQueueSize
            self._note("queue", f"{item.ref}: the server queues {size} values for a cut, not {self._queue(item)}")

    def _note(self, kind: str, text: str) -> None:
        """Say something once for all tags that it is true of."""
        count, first = self._noted.get(kind, (0, text))
        self._noted[kind] = (count + 1, first)
        self.health.notes[kind] = f"{first} (and {count} tags more)" if count else first

    # -- values -----------------------------------------------------------------------------------------------------

    async def _publish(self) -> None:
        await self._link.publish(self._published)

    def _published(self, result: ua.PublishResult) -> None:
        """Take one publish response."""
        self._heard = time.monotonic()
        message = result.NotificationMessage
        if message.PublishTime is not None and message.PublishTime > _EPOCH:
            self.health.clock_skew_s = message.PublishTime.timestamp() - time.time()
        for part in message.NotificationData or ():
            if isinstance(part, ua.DataChangeNotification):
                self._changed(part.MonitoredItems)
                if self._backlog is not None:
                    self._backlog.add(note.ClientHandle for note in part.MonitoredItems)
            elif isinstance(part, ua.StatusChangeNotification):
                self._ended = self._ended or f"the server ended the subscription ({part.Status.name})"
        if result.MoreNotifications:
            return
        if self._backlog is not None:
            self._link.gaps += self._backlog.lost(self.points, self.health.overflows)
            self._backlog = None
        if self._held:
            self.deliver(self._held.settle(self.source_ns()))

    def _changed(self, notes: Sequence[Any]) -> None:
        """Turn one publish response into one batch of samples: the path that every value takes."""
        points, apart, samples = self.points, self.health.quarantined, []
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
            if status:
                if status & _OVERFLOW == _OVERFLOW:
                    self.health.overflows += 1
                if status in _GONE:
                    self._gone(points[note.ClientHandle], data.StatusCode.name)
                    continue
            raw = data.Value.Value if data.Value is not None else None
            sample = to_sample(points[note.ClientHandle], raw, time_ns, _QUALITY[status >> 30])
            # Of what is Good there is something to look at only while a tag is apart.
            if sample is not None and (
                (sample.quality is not _BAD and not apart) or self._fits(points[note.ClientHandle], sample, raw)
            ):
                samples.append(sample)
        samples.sort(key=_BY_TIME)
        self.deliver(samples)

    def _fits(self, item: Item, sample: Sample, raw: object) -> bool:
        """Say whether a sample is one of its tag; a tag whose node is of another kind is kept apart until it is."""
        if sample.quality is not _BAD:
            self.release(item)
            return True
        if not (reason := unfit(item, raw)):
            return True
        self.quarantine(item, reason)
        if not self._polls:
            item.due = math.inf  # it is monitored as before, and a value that fits takes it back
        return False

    def _gone(self, item: Item, status: str) -> None:
        """A node went away at the server: look for it again later, as for one that never was there."""
        if item.ref not in self.health.quarantined:
            self.quarantine(item, f"the server has no {item.tag.address} any more: {status}; check the address column")

    def _periods(self) -> set[int]:
        return {item.tag.sampling_ms or self._publishing_ms for item in self.points}

    async def _poll(self, period_ms: int) -> None:
        """Read all tags of one interval, again and again; each change is delivered."""
        mine = [item for item in self.points if (item.tag.sampling_ms or self._publishing_ms) == period_ms]
        due = time.monotonic()
        while True:
            await self._probe([item for item in mine if item.ref not in self.health.quarantined])
            due = max(due + period_ms / 1000, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    async def _probe(self, items: Sequence[Item]) -> None:
        """Read tags and deliver what has changed."""
        for part in batches(items, self._link.max_reads):
            values = await self._link.read([item.target for item in part])
            notes = []
            for item, data in zip(part, values, strict=True):
                if data.StatusCode is not None and data.StatusCode.value in _GONE:
                    reason = f"the server refuses {item.tag.address}: {data.StatusCode.name}; check the address column"
                    self.quarantine(item, reason)
                    continue
                if data.Value is None or not unfit(item, data.Value.Value):
                    self.release(item)
                if not _same(item.before, data):
                    item.before = data
                    notes.append(ua.MonitoredItemNotification(item.handle, data))
            self._changed(notes)

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        return explain(f"{self.source.name}: {self._url}", self._timeout_s, error)


def _same(before: ua.DataValue | None, data: ua.DataValue) -> bool:
    """Say whether a read brought nothing new; the server's own timestamp moves with every read."""
    return before is not None and (before.Value, before.StatusCode, before.SourceTimestamp) == (
        data.Value,
        data.StatusCode,
        data.SourceTimestamp,
    )
