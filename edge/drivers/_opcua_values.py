"""OPC UA values -> samples: one item a tag, and what of a DataValue becomes a number."""

import math
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from asyncua import ua

from edge.drivers._common import Point, misfit
from edge.drivers._opcua_nodes import parse_address
from edge.tags import Quality, Sample, Tag
from models.errors import UserError

_NUMBER = (float, int)  # bool is an int
_BAD = Quality.BAD

# Of an OPC UA tag; the server knows the number's own type, so that it is for people, but for waveforms and texts.
TYPES = (
    "", "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64",
    "string",
)  # fmt: skip


class Item(Point):
    """One tag and its node; its client handle is its place among the driver's points.

    `target` is the node in this life of the server, `monitored` the server's id of it, `queue` how many values the
    server keeps for it; `before` what was polled last.
    """

    __slots__ = ("before", "filter", "handle", "monitored", "node", "quality", "queue", "target", "uri", "width")

    def __init__(self, handle: int, tag: Tag) -> None:
        super().__init__(tag)
        self.handle = handle
        self.uri, self.node = parse_address(tag)
        self.target: ua.NodeId = self.node
        self.monitored: int | None = None
        self.queue = 0
        self.before: ua.DataValue | None = None
        self.quality = _BAD
        if tag.type.partition("[")[0] not in TYPES:
            known = ", ".join(TYPES[1:])
            raise UserError(tag.file, tag.line, "type", f"{tag.type!r} is no type", f"leave it empty, or write {known}")
        self.width = tag.width
        self.filter = make_filter(tag)


def make_filter(tag: Tag) -> ua.DataChangeFilter | None:
    """Make what the server is asked to report (Part 4, 7.22.2); None for its default, each change of value or status.

    A repeated snapshot is still a snapshot, so arrays are reported by timestamp. An absolute deadband is the
    gateway's work, in the tag's own unit; percent of the EURange (Part 8, 7.2) only the server can tell.
    """
    if tag.width:
        return ua.DataChangeFilter(Trigger=ua.DataChangeTrigger.StatusValueTimestamp)
    if tag.deadband_percent:
        return ua.DataChangeFilter(
            Trigger=ua.DataChangeTrigger.StatusValue,
            DeadbandType=ua.DeadbandType.Percent,
            DeadbandValue=tag.deadband_percent,
        )
    return None


def to_sample(item: Item, raw: object, time_ns: int, quality: Quality) -> Sample | None:
    """Make a sample of one value; None within the deadband, BAD for what is no value of that tag."""
    if quality is not item.quality:
        item.quality, item.last = quality, math.nan  # what a value is worth changes what it says
    if quality is not _BAD:
        if item.width:
            return _wave(item, raw, time_ns, quality)
        if isinstance(raw, _NUMBER):
            return item.take(raw, time_ns, quality)
        raw = _text(raw)
        if isinstance(raw, str) and item.tag.type == "string":
            item.last = float(zlib.crc32(raw.encode()))
            return Sample(item.ref, item.since(time_ns), item.last, quality)
    return item.bad(time_ns)


def _text(raw: object) -> object:
    return raw.Text if isinstance(raw, ua.LocalizedText) else raw


def unfit(item: Item, raw: object) -> str:
    """Say why a value can't be one of the tag, and what to write; empty if it can, or is Bad for itself alone."""
    return misfit(item.tag, _text(raw))


def _wave(item: Item, raw: object, time_ns: int, quality: Quality) -> Sample:
    """Make a waveform sample: float32 (width,); BAD for an array of another length or not of finite numbers."""
    if not isinstance(raw, list) or len(raw) != item.width or not isinstance(raw[0], _NUMBER):
        return item.bad(time_ns)
    wave = np.array(raw, np.float32)
    if not item.plain:
        wave = wave * np.float32(item.scale) + np.float32(item.offset)
    return Sample(item.ref, item.since(time_ns), wave, quality) if np.isfinite(wave).all() else item.bad(time_ns)


class Held:
    """What each tag held when the line was cut: the server says nothing of it again unless it changes."""

    def __init__(self) -> None:
        self._values: dict[Item, tuple[float, Quality, int]] = {}
        self._cut_ns: dict[Item, int] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def keep(self, items: Sequence[Item]) -> None:
        """Note every tag's value, before the cut makes it BAD; one that is BAD already keeps what was noted."""
        for item in items:
            if not math.isnan(item.last):
                self._values[item] = (item.last, item.quality, item.latest_ns)

    def resume(self, items: Sequence[Item]) -> None:
        """Let what the server queued meanwhile come with its own time, though BAD was said later than that."""
        for item in items:
            self._cut_ns[item] = item.bad_ns
            item.bad_ns = 0
            if item in self._values:
                item.latest_ns = self._values[item][2]

    def settle(self, now_ns: int) -> list[Sample]:
        """Say again what has not changed, once all that was queued has come."""
        samples = []
        for item, (value, quality, _) in self._values.items():
            if math.isnan(item.last) and not item.bad_ns:
                item.last, item.quality = value, quality
                item.bad_ns = item.latest_ns = max(now_ns, self._cut_ns.get(item, 0))
                samples.append(Sample(item.ref, item.latest_ns, value, quality))
        self.clear()
        return samples

    def clear(self) -> None:
        """Forget: the server starts over."""
        self._values.clear()
        self._cut_ns.clear()


class Backlog:
    """What comes of each tag after a cut, until the server has no more: a queue that came back full may have lost some.

    A server marks that with the overflow bit (Part 4, 7.39), but not every one does.
    """

    def __init__(self, overflows: int) -> None:
        self._overflows = overflows
        self._counts: Counter[int] = Counter()

    def add(self, handles: Iterable[int]) -> None:
        """Count values by their items' handles."""
        self._counts.update(handles)

    def lost(self, items: Sequence[Item], overflows: int) -> bool:
        """Say whether values went that nobody speaks of."""
        full = any(0 < items[h].queue <= n for h, n in self._counts.items() if h < len(items))
        return full and overflows == self._overflows
