"""Sparkplug B payloads: the few fields of Eclipse Tahu's sparkplug_b.proto that a reader needs, strictly and bounded.

Sources: Sparkplug 3.0.0 (Eclipse, 2022), chapter 6.4; the wire format is Protocol Buffers'. The resident process must
stay small, so this is a reader of its own instead of a library's descriptors. Whatever is wrong with the bytes ends in
PeerError("sparkplug", …); memory is bounded by the payload's length, which the link bounds.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from models.errors import PeerError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MOST_SHIFT = 63
_MOST_METRICS = 50_000
# Metric: name, alias, timestamp, datatype, is_historical, is_null, properties, and the value's variants.
_NAME, _ALIAS, _TIMESTAMP, _DATATYPE, _HISTORICAL, _NULL, _PROPERTIES = 1, 2, 3, 4, 5, 7, 9
_INT, _LONG, _FLOAT, _DOUBLE, _BOOLEAN, _STRING, _RAW = 10, 11, 12, 13, 14, 15, 16
_WIRE = {
    _NAME: _BYTES,
    _ALIAS: _VARINT,
    _TIMESTAMP: _VARINT,
    _DATATYPE: _VARINT,
    _HISTORICAL: _VARINT,
    _NULL: _VARINT,
    _PROPERTIES: _BYTES,
    _INT: _VARINT,
    _LONG: _VARINT,
    _FLOAT: _FIXED32,
    _DOUBLE: _FIXED64,
    _BOOLEAN: _VARINT,
    _STRING: _BYTES,
    _RAW: _BYTES,
}
_SIGNED = {1: 8, 2: 16, 3: 32, 4: 64}  # datatypes Int8 to Int64, sent as unsigned two's complement
# Datatypes Int8Array to DoubleArray: numpy's name of the elements, packed little-endian.
ARRAYS = {22: "<i1", 23: "<i2", 24: "<i4", 25: "<i8", 26: "<u1", 27: "<u2", 28: "<u4", 29: "<u8", 30: "<f4", 31: "<f8"}
_BOOLEAN_TYPE = 11


@dataclass(slots=True)
class Metric:
    """One metric. `name` may be "" in data that gives an alias (or None); `datatype` is 0 where only the birth says it.

    `quality` is the code of the property of that name (192 good, 0 bad, 500 stale), None without one.
    """

    name: str = ""
    alias: int | None = None
    timestamp_ms: int | None = None
    datatype: int = 0
    historical: bool = False
    null: bool = False
    quality: int | None = None
    value: int | float | str | bytes | None = None

    def number(self, datatype: int) -> float | str | bytes | None:
        """Return the value as its datatype (this metric's own, or else the birth's) means it."""
        bits = _SIGNED.get(self.datatype or datatype)
        if bits is None or type(self.value) is not int:
            return self.value
        raw = int(self.value) & ((1 << bits) - 1)
        return raw - (1 << bits) if raw >> (bits - 1) else raw


@dataclass(slots=True)
class Payload:
    """One message: the time that it was sent, its place in the edge node's sequence (0 to 255), its metrics."""

    timestamp_ms: int | None = None
    seq: int | None = None
    metrics: list[Metric] = field(default_factory=list)


def decode(data: bytes) -> Payload:
    """Read a payload; PeerError if it isn't one."""
    payload = Payload()
    for number, wire, value in _fields(data):
        if number == 1:
            payload.timestamp_ms = _integer(wire, value)
        elif number == 2:  # noqa: PLR2004 - the proto's field number
            if len(payload.metrics) >= _MOST_METRICS:
                raise PeerError("sparkplug", f"more than {_MOST_METRICS} metrics")
            payload.metrics.append(_metric(_bytes(wire, value)))
        elif number == 3:  # noqa: PLR2004
            payload.seq = _integer(wire, value)
    return payload


def rebirth(timestamp_ms: int) -> bytes:
    """Encode the command that asks an edge node for its births (Sparkplug 3.0.0, 6.4.25); it reaches no machine."""
    name = b"Node Control/Rebirth"
    metric = bytes([_NAME << 3 | _BYTES, len(name)]) + name
    metric += bytes([_DATATYPE << 3, _BOOLEAN_TYPE, _BOOLEAN << 3, 1])
    return bytes([1 << 3]) + _varint(timestamp_ms) + bytes([2 << 3 | _BYTES, len(metric)]) + metric


def _metric(data: bytes) -> Metric:
    metric = Metric()
    for number, wire, value in _fields(data):
        if number not in _WIRE:
            continue
        if wire != _WIRE[number]:
            raise PeerError("sparkplug", f"field {number} of a metric has wire type {wire}")
        if isinstance(value, int):
            _take_integer(metric, number, value)
        else:
            _take_bytes(metric, number, value)
    return metric


def _take_integer(metric: Metric, number: int, value: int) -> None:
    match number:
        case 2:
            metric.alias = value
        case 3:
            metric.timestamp_ms = value
        case 4:
            metric.datatype = value
        case 5:
            metric.historical = bool(value)
        case 7:
            metric.null = bool(value)
        case _:
            metric.value = value


def _take_bytes(metric: Metric, number: int, value: bytes) -> None:
    if number == _NAME:
        metric.name = _text(value)
    elif number == _PROPERTIES:
        metric.quality = _quality(value)
    elif number == _FLOAT:
        metric.value = struct.unpack("<f", value)[0]
    elif number == _DOUBLE:
        metric.value = struct.unpack("<d", value)[0]
    else:
        metric.value = _text(value) if number == _STRING else value


def _quality(data: bytes) -> int | None:
    """Find the property `Quality` in a PropertySet: its keys are field 1, its values field 2, in the same order."""
    keys: list[bytes] = []
    values: list[bytes] = []
    for number, wire, value in _fields(data):
        if number in {1, 2}:
            (keys if number == 1 else values).append(_bytes(wire, value))
    if b"Quality" not in keys[: len(values)]:
        return None
    for number, wire, value in _fields(values[keys.index(b"Quality")]):
        if number == 3:  # noqa: PLR2004 - int_value
            return _integer(wire, value)
    return None


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield (field number, wire type, value) of one message: integers for varints, bytes for all else."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _read_varint(data, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _read_varint(data, at)
        elif wire in {_FIXED64, _FIXED32}:
            size = 8 if wire == _FIXED64 else 4
        else:
            raise PeerError("sparkplug", f"wire type {wire}")
        if size > end - at:
            raise PeerError("sparkplug", "cut short")
        yield number, wire, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > _MOST_SHIFT:
            raise PeerError("sparkplug", "cut short, or a number without an end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(wire: int, value: int | bytes) -> int:
    if wire != _VARINT or not isinstance(value, int):
        raise PeerError("sparkplug", f"wire type {wire} for a number")
    return value


def _bytes(wire: int, value: int | bytes) -> bytes:
    if wire != _BYTES or not isinstance(value, bytes):
        raise PeerError("sparkplug", f"wire type {wire} for bytes")
    return value


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise PeerError("sparkplug", "a text that is not UTF-8") from None
