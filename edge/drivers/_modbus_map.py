"""What a tags CSV says of Modbus, and what comes back: addresses, types, blocks, and numbers out of registers. Pure."""

import re
import struct
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from edge.drivers._common import Point
from edge.tags import Tag
from models.errors import UserError

_ADDRESS = re.compile(r"(?P<table>holding|input|coil|discrete):(?P<at>\d{1,5})(?:\.(?P<bit>\d{1,2}))?")
_NUMBERED = re.compile(r"(?P<table>[0134])(?P<at>\d{4}|\d{5})(?:\.(?P<bit>\d{1,2}))?")
_TABLE = {"0": "coil", "1": "discrete", "3": "input", "4": "holding"}
BITS = {"coil", "discrete"}
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


# Registers as they came, two bytes each, or the bits of a table of bits.
Elements = bytes | list[bool]
Decoder = Callable[[Elements], Sequence[float]]


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


def decoder(block: Block, spots: Sequence[Spot]) -> Decoder:
    """Return what takes the numbers of a block's spots, before scale and offset, out of the elements it read.

    Spots side by side of one byte order, which most devices have alone, are one struct.
    """
    spots = list(spots)
    orders = {(spot.kind.swapped, spot.kind.form[:1]) for spot in spots}
    apart = all(one.at + one.count <= other.at for one, other in pairwise(spots))
    if len(orders) > 1 or not apart or not all(spot.kind.form for spot in spots):
        return partial(_decode_each, block.at, spots)
    ((swapped, sign),) = orders
    form, at = sign, block.at
    for spot in spots:
        form += f"{2 * (spot.at - at)}x" + spot.kind.form[1:]
        at = spot.at + spot.count
    unpack = struct.Struct(form).unpack_from
    return lambda elements: unpack(_turned(elements) if swapped else bytes(elements))


def _decode_each(start: int, spots: Sequence[Spot], elements: Elements) -> Sequence[float]:
    if isinstance(elements, list):
        return [elements[spot.at - start] for spot in spots]
    swapped = _turned(elements)
    out: list[float] = []
    for spot in spots:
        data, place = swapped if spot.kind.swapped else elements, 2 * (spot.at - start)
        if spot.kind.form:
            out.append(struct.unpack_from(spot.kind.form, data, place)[0])
        else:
            out.append(int.from_bytes(data[place : place + 2]) >> spot.address.bit & 1)
    return out


def _turned(elements: Elements) -> bytes:
    """Swap the bytes of each register."""
    return np.frombuffer(bytes(elements), np.uint16).byteswap().tobytes()


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
    if bit >= 0 and (table in BITS or bit > _LAST_BIT):
        raise UserError(tag.file, tag.line, "address", f"{text!r} has no such bit", "a register has bits 0 to 15")
    return Address(table, at, bit)


def parse_type(text: str, address: Address, tag: Tag) -> Kind:
    """Parse `float32:CDAB`; empty is uint16, or bool for a bit; UserError at the tag's line otherwise."""
    single = address.table in BITS or address.bit >= 0
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
