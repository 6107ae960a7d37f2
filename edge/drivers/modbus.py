"""Modbus TCP: tags read in as few blocks as the device allows, one request in flight.

All tags with one poll interval are one cycle with one timestamp: the gateway's clock when the last reply came, or the
device's own (`clock`). A block that the device refuses is halved at tag borders until only the refused tag is apart.
The library sends a request again once; after that the connection is given up and made anew.
"""

import asyncio
import logging
import math
import re
import struct
import time
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, Protocol

from pymodbus.client import AsyncModbusTcpClient
from pymodbus.constants import ExcCodes
from pymodbus.exceptions import ModbusException

from edge.drivers._common import LostError, Point, Reader, endpoint, option, refusal
from edge.tags import Quality, Sample, Sink, Source, Tag
from models.errors import UserError

OPTIONS: dict[str, type] = {
    "device_id": int,
    "poll_ms": int,
    "timeout_s": float,
    "max_gap": int,
    "max_block": int,
    "address_base": int,
    "clock": str,
}

# The library logs each failed request; what they mean is said once, in `health.error`.
logging.getLogger("pymodbus.logging").setLevel(logging.CRITICAL)

_ADDRESS = re.compile(r"(?P<table>holding|input|coil|discrete):(?P<at>\d{1,5})(?:\.(?P<bit>\d{1,2}))?")
_NUMBERED = re.compile(r"(?P<table>[0134])(?P<at>\d{4}|\d{5})(?:\.(?P<bit>\d{1,2}))?")
_TABLE = {"0": "coil", "1": "discrete", "3": "input", "4": "holding"}
_BITS = {"coil", "discrete"}
_FORMAT = {
    "int16": "h",
    "uint16": "H",
    "int32": "i",
    "uint32": "I",
    "int64": "q",
    "uint64": "Q",
    "float32": "f",
    "float64": "d",
}
# The order of the bytes of a value, as (swapped within each register, byte order of all): ABCD is Modbus' own.
_ORDER = {"ABCD": (False, ">"), "CDAB": (True, "<"), "BADC": (True, ">"), "DCBA": (False, "<")}
_TYPES = f"{', '.join(_FORMAT)} or bool, with the order of its bytes if it has several registers: float32:CDAB"
_LAST = 65_535
_LAST_BIT = 15
_MAX_BITS = 1900  # coils of one request; the standard allows 2000
_MOST_NS = 2**63 - 1  # a clock that isn't set may hold anything
_IDLE_S = 0.25  # between two looks at an idle connection
_BUSY = {ExcCodes.ACKNOWLEDGE, ExcCodes.DEVICE_BUSY}
_GONE = {ExcCodes.GATEWAY_PATH_UNAVIABLE, ExcCodes.GATEWAY_NO_RESPONSE}


class Address(NamedTuple):
    """A place in a device: a table, the first element counted from 0, and a bit of a register or -1."""

    table: str
    at: int
    bit: int = -1


class Kind(NamedTuple):
    """How registers become a number: how many, whether bytes are swapped within each, and the struct format.

    An empty `form` is a bit.
    """

    registers: int
    swapped: bool
    form: str


class Span(Protocol):
    """What lies in a table from `at` on, `count` elements long."""

    @property
    def at(self) -> int:
        """The first element."""

    @property
    def count(self) -> int:
        """How many elements."""


class Block(NamedTuple):
    """One request: elements `at` to `at + size` of a table, and the places of the spans that it serves."""

    at: int
    size: int
    members: list[int]


class Spot(Point):
    """One tag, and where and how it is read."""

    __slots__ = ("address", "at", "count", "kind", "period_s", "read_ns")

    def __init__(self, tag: Tag, base: int, poll_ms: int) -> None:
        super().__init__(tag)
        self.address = parse_address(tag.address, base, tag)
        self.kind = parse_type(tag.type, self.address, tag)
        self.at = self.address.at
        self.count = self.kind.registers
        self.period_s = (tag.sampling_ms or poll_ms) / 1000
        self.read_ns = 0


class _Refused(NamedTuple):
    """A device's exception reply."""

    code: int

    @property
    def name(self) -> str:
        """The standard's name of the code."""
        return ExcCodes(self.code).name if self.code in ExcCodes._value2member_map_ else f"code {self.code}"


class Driver(Reader[Spot]):
    """Reads `modbus+tcp://` devices with function codes 1 to 4; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("modbus+tcp",)

    def __init__(self, source: Source, sink: Sink) -> None:
        base = option(source, "address_base", 1, 0, 1)
        poll_ms = option(source, "poll_ms", 1000, 1, 86_400_000)
        super().__init__(source, sink, [Spot(tag, base, poll_ms) for tag in source.tags])
        self._host, self._port = endpoint(source, "modbus+tcp", 502)
        self._device_id = option(source, "device_id", 1, 0, 255)
        self._timeout_s = option(source, "timeout_s", 1.0, 0.05, 60.0)
        self._max_gap = option(source, "max_gap", 8, 0, 120)
        self._max_block = option(source, "max_block", 120, 4, 125)
        self._clock = _clock(source, base, poll_ms)
        self._client: AsyncModbusTcpClient | None = None
        self._borders: set[tuple[str, int]] = set()

    async def open(self) -> None:
        """Connect; may raise anything."""
        self._borders.clear()
        self.health.quarantined.clear()
        self._client = client = AsyncModbusTcpClient(
            self._host,
            port=self._port,
            timeout=self._timeout_s,
            retries=1,
            reconnect_delay=0,
            reconnect_delay_max=0,
        )
        if not await client.connect():
            raise LostError("can't be reached; check address, network, firewall and that the device is on")

    async def read(self) -> None:
        """Run the poll cycles, each when it is due; raises when the connection is lost."""
        periods = sorted({spot.period_s for spot in self.points})
        due = dict.fromkeys(periods, time.monotonic())
        while True:
            for period in periods:
                now = time.monotonic()
                if due[period] <= now:
                    # A cycle that was missed is not made up for: a slow device is not flooded.
                    due[period] = max(due[period] + period, now)
                    await self._cycle(period)
            for spot in self.due():
                self.deliver(await self._read_spots([spot]))
            wait = min(due.values(), default=math.inf) - time.monotonic()
            await asyncio.sleep(max(0.0, min(wait, _IDLE_S)))
            if self._client is None or not self._client.connected:
                raise LostError("closed the connection; check that the device serves one more client")

    async def close(self) -> None:
        """Close the socket; a request in flight ends with it."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    async def _cycle(self, period: float) -> None:
        """Read and deliver all tags of one poll interval that aren't in quarantine."""
        apart = self.health.quarantined
        spots = [spot for spot in self.points if spot.period_s == period and spot.ref not in apart]
        if spots:
            self.deliver(await self._read_spots(spots))

    async def _read_spots(self, spots: Sequence[Spot]) -> list[Sample]:
        """Read tags, and the device's clock along with them; one timestamp for all."""
        wanted = [*spots, self._clock] if self._clock else list(spots)
        found: dict[Spot, float] = {}
        for table, group in groupby(sorted(wanted, key=_by_table), key=_by_table):
            members = list(group)
            borders = {at for name, at in self._borders if name == table}
            limit = _MAX_BITS if table in _BITS else self._max_block
            for block in plan_blocks(members, self._max_gap, limit, borders):
                await self._read_block(table, block, members, found)
        time_ns = self._stamp(found)
        samples = []
        for spot in spots:
            if spot in found:
                was = spot.read_ns, spot.last
                sample = spot.take(found[spot], time_ns, Quality.GOOD)
                spot.read_ns = time_ns
                # Polled twice within one tick of the device's clock: nothing new.
                if sample is not None and was != (time_ns, sample.value):
                    samples.append(sample)
        return samples

    def _stamp(self, found: dict[Spot, float]) -> int:
        """Return the time of a cycle: the device's, if it has one and that could be read, else the gateway's."""
        now = time.time_ns()
        if self._clock is None or self._clock not in found:
            return now
        time_ns = int(found[self._clock]) * 1_000_000
        if not 0 < time_ns <= _MOST_NS:
            return now
        self.health.clock_skew_s = (time_ns - now) / 1e9
        return time_ns

    async def _read_block(self, table: str, block: Block, members: Sequence[Spot], found: dict[Spot, float]) -> None:
        """Read one block into `found`; one that is refused is read by halves, one tag that is, quarantined."""
        reply = await self._request(table, block)
        if not self.health.connected:
            self.connected()
        spots = [members[place] for place in block.members]
        if not isinstance(reply, _Refused):
            for spot, value in zip(spots, decode(reply, block.at, spots), strict=True):
                found[spot] = value
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
        limit = _MAX_BITS if table in _BITS else self._max_block
        for half in plan_blocks(spots, self._max_gap, limit, {border}):
            await self._read_block(table, half, spots, found)

    def _refuse(self, spot: Spot, reply: _Refused) -> None:
        if spot is self._clock:
            self.health.error = f"{self.source.name}: the device refuses its clock ({reply.name}); check clock ="
            return
        where = "check the address column and the source's device_id"
        reason = f"the device answers {reply.name} for {spot.tag.address}; {where}"
        self.quarantine(spot, reason)

    async def _request(self, table: str, block: Block) -> list[int] | list[bool] | _Refused:
        """Send one read request: the elements, or the device's exception; raises if no answer comes."""
        client = self._client
        if client is None:
            raise LostError("not connected")
        read: Any = {
            "coil": client.read_coils,
            "discrete": client.read_discrete_inputs,
            "holding": client.read_holding_registers,
            "input": client.read_input_registers,
        }[table]
        reply = await read(block.at, count=block.size, device_id=self._device_id)
        if reply.isError():
            refused = _Refused(reply.exception_code)
            if refused.code in _GONE:
                raise LostError(f"has no device {self._device_id} behind it ({refused.name}); check device_id")
            return refused
        elements: list[int] | list[bool] = reply.bits if table in _BITS else reply.registers
        if len(elements) < block.size:
            raise LostError(f"sent {len(elements)} elements of {block.size}; check that it speaks Modbus TCP")
        return elements

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        where = f"{self.source.name}: modbus+tcp://{self._host}:{self._port}"
        if isinstance(error, LostError):
            return f"{where} {error}"
        if isinstance(error, ModbusException | OSError | TimeoutError):
            return (
                f"{where} did not answer within {self._timeout_s:g} s, asked twice; check the cable, "
                f"device_id = {self._device_id} and timeout_s"
            )
        return f"{where}: {type(error).__name__}: {error}; check that it speaks Modbus TCP"


def plan_blocks(spans: Sequence[Span], max_gap: int, max_block: int, borders: Collection[int] = ()) -> list[Block]:
    """Cover spans of one table with as few requests as there can be.

    A block skips at most `max_gap` unused elements in a row, is at most `max_block` long (longer only for a single
    span that is), and none reaches over an element in `borders`.
    """
    blocks: list[Block] = []
    last = 0
    for place in sorted(range(len(spans)), key=lambda place: (spans[place].at, spans[place].count)):
        at, end = spans[place].at, spans[place].at + spans[place].count
        if blocks:
            head = blocks[-1]
            reach = max(end, head.at + head.size)
            near = at - (head.at + head.size) <= max_gap and reach - head.at <= max_block
            if near and not any(last < border <= at for border in borders):
                blocks[-1] = Block(head.at, reach - head.at, [*head.members, place])
                last = at
                continue
        blocks.append(Block(at, end - at, [place]))
        last = at
    return blocks


def decode(elements: Sequence[int] | Sequence[bool], start: int, spots: Iterable[Spot]) -> list[float]:
    """Take the spots' numbers, before scale and offset, out of the elements read from `start` on."""
    first = next(iter(elements), 0)
    plain = swapped = b""
    if not isinstance(first, bool):
        plain = struct.pack(f">{len(elements)}H", *elements)
        swapped = struct.pack(f"<{len(elements)}H", *elements)
    out: list[float] = []
    for spot in spots:
        place = spot.at - start
        if spot.kind.form:
            data = swapped if spot.kind.swapped else plain
            out.append(struct.unpack_from(spot.kind.form, data, 2 * place)[0])
        else:
            out.append((elements[place] >> max(0, spot.address.bit)) & 1)
    return out


def parse_address(text: str, base: int, tag: Tag) -> Address:
    """Parse `holding:0`, `40001` (counted from `base`) or `holding:5.3`; UserError at the tag's line otherwise."""
    match = _ADDRESS.fullmatch(text.strip()) or _NUMBERED.fullmatch(text.strip())
    example = "write holding:0, input:12, coil:3, discrete:4, 40001, or holding:5.3 for a bit"
    if match is None:
        raise UserError(tag.file, tag.line, "address", f"{text!r} is not a Modbus address", example)
    numbered = match["table"] in _TABLE
    table = _TABLE.get(match["table"], match["table"])
    at = int(match["at"]) - (base if numbered else 0)
    bit = int(match["bit"]) if match["bit"] else -1
    if not 0 <= at <= _LAST:
        lowest = base if numbered else 0
        problem = f"{text!r} is outside of the table"
        raise UserError(tag.file, tag.line, "address", problem, f"count from {lowest} to {_LAST + lowest}")
    if bit >= 0 and (table in _BITS or bit > _LAST_BIT):
        raise UserError(tag.file, tag.line, "address", f"{text!r} has no such bit", "a register has bits 0 to 15")
    return Address(table, at, bit)


def parse_type(text: str, address: Address, tag: Tag) -> Kind:
    """Parse `float32:CDAB`; empty is uint16, or bool for a bit; UserError at the tag's line otherwise."""
    single = address.table in _BITS or address.bit >= 0
    name, _, order = text.strip().partition(":")
    name = name or ("bool" if single else "uint16")
    if tag.width or "[" in name:
        remedy = "write one tag a value, or read the waveform by OPC UA"
        raise UserError(tag.file, tag.line, "type", f"{text!r}: Modbus has no waveforms", remedy)
    if single != (name == "bool"):
        remedy = "write bool" if single else "a register holds no bool: name its bit, as in holding:5.3"
        raise UserError(tag.file, tag.line, "type", f"{text!r} doesn't fit {tag.address!r}", remedy)
    if single and not order:
        return Kind(1, swapped=False, form="")
    order = order.upper() or "ABCD"
    if name not in _FORMAT or order not in _ORDER:
        raise UserError(tag.file, tag.line, "type", f"{text!r} is not a Modbus type", f"write {_TYPES}")
    swapped, sign = _ORDER[order]
    form = sign + _FORMAT[name]
    registers = struct.calcsize(form) // 2
    if address.at + registers - 1 > _LAST:
        raise UserError(tag.file, tag.line, "address", f"{name} reaches over the table's end", "check the address")
    return Kind(registers, swapped, form)


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
