"""Modbus TCP and RTU: tags read in as few blocks as the device allows, one request in flight.

All tags with one poll interval are one cycle with one timestamp: the gateway's clock when the last reply came, or the
device's own (`clock`). A block that the device refuses is halved at tag borders until only the refused tag is apart.
The library sends a request again once; after that the device is given up and tried anew. Sources with the same serial
port, or the same host and port, share one connection (`_modbus_line`); what addresses mean is in `_modbus_map`.
"""

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import chain, groupby
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pymodbus.constants import ExcCodes

from broker.diagnose import Step, fail, ok, reach
from edge.drivers._common import LostError, Points, Reader, option, refusal
from edge.drivers._diagnose import listen
from edge.drivers._modbus_line import SERIAL_OPTIONS, Line, join, parse_place
from edge.drivers._modbus_map import BITS, Block, Decoder, Elements, Spot, decoder, plan_blocks
from edge.tags import Quality, Sink, Source, Tag
from models.errors import UserError

OPTIONS: dict[str, type] = {
    "device_id": int,
    "poll_ms": int,
    "timeout_s": float,
    "max_gap": int,
    "max_block": int,
    "address_base": int,
    "clock": str,
} | SERIAL_OPTIONS

# The library logs each failed request; what they mean is said once, in `health.error`.
logging.getLogger("pymodbus.logging").setLevel(logging.CRITICAL)

_MAX_BITS = 1900  # coils of one request; the standard allows 2000
_MOST_NS = 2**63 - 1  # a clock that isn't set may hold anything
_MOST_PLANS = 64  # sets of tags that were read together
_IDLE_S = 0.25  # between two looks at an idle connection
_BUSY = {ExcCodes.ACKNOWLEDGE, ExcCodes.DEVICE_BUSY}
_GONE = {ExcCodes.GATEWAY_PATH_UNAVIABLE, ExcCodes.GATEWAY_NO_RESPONSE}


class _Refused(NamedTuple):
    """A device's exception reply."""

    code: int

    @property
    def name(self) -> str:
        """The standard's name of the code."""
        try:
            return ExcCodes(self.code).name
        except ValueError:
            return f"code {self.code}"


class _Request(NamedTuple):
    """One request of a plan, the tags that it serves, and what finds them in the reply."""

    table: str
    block: Block
    spots: list[Spot]
    decode: Decoder


class _Plan(NamedTuple):
    """How a set of tags is read: the requests, and which of what they bring is delivered whole, and which one by one.

    `whole` and `apart` are places in what the requests bring, one after the other.
    """

    requests: list[_Request]
    members: list[Spot]
    points: Points[Spot]
    whole: NDArray[np.intp]
    apart: list[int]


# What a request, or a part of one, has brought.
_Found = list[tuple[Sequence[Spot], Sequence[float]]]


class Driver(Reader[Spot]):
    """Reads devices by TCP or RTU with function codes 1 to 4; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("modbus+tcp", "modbus+rtu")

    def __init__(self, source: Source, sink: Sink) -> None:
        base = option(source, "address_base", 1, 0, 1)
        poll_ms = option(source, "poll_ms", 1000, 1, 86_400_000)
        super().__init__(source, sink, [Spot(tag, base, poll_ms) for tag in source.tags])
        self._place = parse_place(source)
        # On a serial line 0 is a broadcast, which nobody answers, and what is above 247 is reserved.
        self._device_id = option(source, "device_id", 1, *((0, 255) if self._place.port else (1, 247)))
        self._timeout_s = option(source, "timeout_s", 1.0, 0.05, 60.0)
        self._max_gap = option(source, "max_gap", 8, 0, 120)
        self._max_block = option(source, "max_block", 120, 4, 125)
        self._clock = _clock(source, base, poll_ms)
        periods = sorted({spot.period_s for spot in self.points})
        self._by_period = {p: tuple(spot for spot in self.points if spot.period_s == p) for p in periods}
        self._line: Line | None = None
        self._borders: set[tuple[str, int]] = set()
        self._plans: dict[tuple[Spot, ...], _Plan] = {}

    async def open(self) -> None:
        """Connect; may raise anything."""
        self._borders.clear()
        self._plans.clear()
        self.health.quarantined.clear()
        self._line = join(self._place, self)
        await self._line.connect(self._timeout_s)

    async def read(self) -> None:
        """Run the poll cycles, each when it is due; raises when the connection is lost."""
        due = dict.fromkeys(self._by_period, time.monotonic())
        while True:
            for period in due:
                now = time.monotonic()
                if due[period] <= now:
                    # A cycle that was missed is not made up for: a slow device is not flooded.
                    due[period] = max(due[period] + period, now)
                    await self._cycle(period)
            for spot in self.due():
                await self._scan((spot,))
            wait = min(due.values(), default=math.inf) - time.monotonic()
            await asyncio.sleep(max(0.0, min(wait, _IDLE_S)))
            if self._line is None or self._line.over:
                raise LostError(self._place.ended)

    async def close(self) -> None:
        """Leave the connection to the others on it, if there are any."""
        line, self._line = self._line, None
        if line is not None:
            line.leave(self)

    async def _cycle(self, period: float) -> None:
        """Read and deliver all tags of one poll interval that aren't in quarantine."""
        spots, apart = self._by_period[period], self.health.quarantined
        if apart:
            spots = tuple(spot for spot in spots if spot.ref not in apart)
        if spots:
            await self._scan(spots)

    async def _scan(self, spots: tuple[Spot, ...]) -> None:
        """Read tags, and the device's clock along with them, and deliver them; one timestamp for all."""
        plan = self._planned((*spots, self._clock) if self._clock else spots)
        found: _Found = []
        for request in plan.requests:
            await self._read_block(request, found)
        time_ns = self._stamp(found)
        apart: Iterable[tuple[Spot, float]]
        if [id(part) for part, _ in found] == [id(request.spots) for request in plan.requests]:
            raw = list(chain.from_iterable(values for _, values in found))
            if plan.points.members:
                self.deliver(plan.points.take(np.array(raw, np.float64)[plan.whole], time_ns))
            apart = ((plan.members[i], raw[i]) for i in plan.apart)
        else:  # some were refused
            apart = chain.from_iterable(zip(*part, strict=True) for part in found)
        samples = []
        for spot, value in apart:
            if spot is self._clock:
                continue
            # Polled twice within one tick of the device's clock: nothing new.
            before = spot.last if spot.read_ns == time_ns else None
            sample = spot.take(value, time_ns, Quality.GOOD)
            spot.read_ns = time_ns
            if sample is not None and sample.value != before:
                samples.append(sample)
        self.deliver(samples)

    def _planned(self, wanted: tuple[Spot, ...]) -> _Plan:
        """Return how some tags are read; that stays the same from cycle to cycle."""
        if wanted not in self._plans:
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            requests = []
            for table, group in groupby(sorted(wanted, key=_by_table), key=_by_table):
                requests += self._plan(table, list(group), {at for name, at in self._borders if name == table})
            members = [spot for request in requests for spot in request.spots]
            # What a device's clock stamps may be read twice at one time.
            alone = [bool(spot.deadband or self._clock) for spot in members]
            apart = [i for i, one in enumerate(alone) if one]
            whole = np.flatnonzero(~np.array(alone, np.bool_))  # setdiff1d loads numpy.ma: 1.6 MB for good
            self._plans[wanted] = _Plan(requests, members, Points([members[i] for i in whole]), whole, apart)
        return self._plans[wanted]

    def _plan(self, table: str, members: Sequence[Spot], borders: set[int]) -> list[_Request]:
        limit = _MAX_BITS if table in BITS else self._max_block
        plan = []
        for block in plan_blocks(members, self._max_gap, limit, borders):
            spots = [members[place] for place in block.members]
            plan.append(_Request(table, block, spots, decoder(block, spots)))
        return plan

    def _stamp(self, found: _Found) -> int:
        """Return the time of a cycle: the device's, if it has one and that could be read, else the gateway's."""
        now = time.time_ns()
        if self._clock is None:
            return now
        read = (value for part in found for spot, value in zip(*part, strict=True) if spot is self._clock)
        time_ns = int(next(read, 0)) * 1_000_000
        if not 0 < time_ns <= _MOST_NS:
            return now
        self.health.clock_skew_s = (time_ns - now) / 1e9
        return time_ns

    async def _read_block(self, request: _Request, found: _Found) -> None:
        """Read one block into `found`; one that is refused is read by halves, one tag that is, quarantined."""
        table, block, spots, decode = request
        reply = await self._request(table, block)
        if not self.health.connected:
            self.connected()
        if not isinstance(reply, _Refused):
            found.append((spots, decode(reply)))
            if self.health.quarantined:
                for spot in spots:
                    self.release(spot)
            return
        starts = sorted({spot.at for spot in spots})
        if len(starts) == 1 or reply.code in _BUSY:
            for spot in spots:
                self._refuse(spot, reply)
            return
        # The border stays for as long as the connection: the same request would be refused again.
        border = starts[len(starts) // 2]
        self._borders.add((table, border))
        self._plans.clear()
        for half in self._plan(table, spots, {border}):
            await self._read_block(half, found)

    def _refuse(self, spot: Spot, reply: _Refused) -> None:
        if spot is self._clock:
            self.health.error = f"{self.source.name}: the device refuses its clock ({reply.name}); check clock ="
            return
        where = "check the address column and the source's device_id"
        reason = f"the device answers {reply.name} for {spot.tag.address}; {where}"
        self.quarantine(spot, reason)

    async def _request(self, table: str, block: Block) -> Elements | _Refused:
        """Send one read request: the elements, or the device's exception; raises if no answer comes."""
        if self._line is None:
            raise LostError("not connected")
        # A device that is away is asked once: the others on its line wait for no more than that.
        retries = 1 if self.health.connected else 0
        reply = await self._line.ask(self, table, *block[:2], self._device_id, self._timeout_s, retries)
        if reply.isError():
            refused = _Refused(reply.exception_code)
            if refused.code in _GONE:
                raise LostError(f"has no device {self._device_id} behind it ({refused.name}); check device_id")
            return refused
        elements: Elements = reply.bits if table in BITS else reply.payload
        # Bits come in whole bytes, registers in two.
        due = (block.size + 7) // 8 * 8 if table in BITS else 2 * block.size
        if len(elements) != due:
            problem = f"sent {len(elements)} {'bits' if table in BITS else 'bytes'} where {due} are due"
            raise LostError(f"{problem}; check device_id and the wiring")
        return elements

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        where = f"{self.source.name}: {self.source.url}"
        if isinstance(error, LostError):
            return f"{where} {error}"
        if isinstance(error, TimeoutError):
            wires = "the cable" if self._place.port else "the cable, that A and B aren't swapped, baud, parity"
            return (
                f"{where} did not answer within {self._timeout_s:g} s; check {wires}, "
                f"device_id = {self._device_id} and timeout_s"
            )
        return f"{where}: {type(error).__name__}: {error}; check that it speaks Modbus"


def _by_table(spot: Spot) -> str:
    return spot.address.table


def _clock(source: Source, base: int, poll_ms: int) -> Spot | None:
    """Return the device's clock as something to read: uint64 Unix milliseconds, ABCD; None without the option."""
    text = option(source, "clock", "")
    if not text:
        return None
    try:
        tag = Tag(source=source.name, name="clock", address=text, type="uint64")
        return Spot(tag, base, poll_ms)
    except UserError as error:
        raise refusal(source, "clock", error.problem, "write the register where it begins: holding:10") from error


async def diagnose(source: Source) -> AsyncIterator[Step]:
    """Say step by step how far this gateway comes with a device."""
    place = parse_place(source)
    if place.port:
        async for step in reach(place.host, place.port):
            yield step
            if step.ok is False:
                return
    elif not os.access(place.host, os.R_OK | os.W_OK):
        yield fail("port", f"{place.host} {place.unreachable}")
        return
    else:
        yield ok("port", f"{place.host} is there, {place.baud} baud, parity {place.parity}")
    async for step in listen(source):
        yield step
