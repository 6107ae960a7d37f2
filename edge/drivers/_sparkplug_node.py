"""What a reader of Sparkplug B knows of an edge node: where its sequence is, its births, and which tags it has. Pure.

Sources: Sparkplug 3.0.0 (Eclipse, 2022), chapters 5 and 6.4; the bytes are `_sparkplug`'s.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from edge.drivers import _sparkplug as sparkplug
from edge.drivers._common import MOST_MS, Point
from edge.tags import Quality

MESSAGES = ("NBIRTH", "NDATA", "NDEATH", "DBIRTH", "DDATA", "DDEATH")
_ASK_S = (10.0, 600.0)  # between two rebirth requests to one edge node that doesn't answer them: first, most
_GOOD = 192


class Asset:
    """An edge node's own metrics, or one device's: the points by name, and what its birth says of their aliases."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.points: dict[str, list[Point]] = defaultdict(list)
        self._aliases: dict[int, str] = {}
        self._types: dict[str, int] = {}

    @property
    def all(self) -> list[Point]:
        """Every point here."""
        return [point for points in self.points.values() for point in points]

    def forget(self) -> None:
        """Know no alias and no type, as before a birth."""
        self._aliases.clear()
        self._types.clear()

    def learn(self, metrics: Sequence[sparkplug.Metric]) -> list[str]:
        """Take names, aliases and types from a birth; return the names of points that it does not have."""
        self._aliases = {m.alias: m.name for m in metrics if m.alias is not None}
        self._types = {m.name: m.datatype for m in metrics if m.name in self.points}
        return list(self.points.keys() - {m.name for m in metrics})

    def name(self, metric: sparkplug.Metric) -> str:
        """A metric's name, by its alias if it has to be; "" for one that no birth has named."""
        return metric.name or self._aliases.get(-1 if metric.alias is None else metric.alias, "")

    def value(self, name: str, metric: sparkplug.Metric) -> object:
        """A metric's value as its own datatype, or else its birth's, means it; None if it has none."""
        kind = metric.datatype or self._types.get(name, 0)
        value = None if metric.null else metric.number(kind)
        return _array(value, kind) if isinstance(value, bytes) else value


class Node:
    """One edge node: its assets by device ("" is its own), where its sequence is, and whether it owes its births."""

    def __init__(self, group: str, name: str) -> None:
        self.group, self.name = group, name
        self.assets: dict[str, Asset] = {}
        self.reset()

    def reset(self) -> None:
        """Know nothing, as at the start of a connection."""
        self.ask_at = 0.0
        self._asked = 0
        self._forget()

    def _forget(self) -> None:
        """Know nothing, as before a birth."""
        self.seq: int | None = None
        self._bd_seq: int | None = None
        self.unborn = True
        for asset in self.assets.values():
            asset.forget()

    @property
    def filters(self) -> list[str]:
        """What to subscribe to: a node's sequence runs over the messages of all its devices."""
        return [f"spBv1.0/{self.group}/{m}/{self.name}{'/+' if m[0] == 'D' else ''}" for m in MESSAGES]

    def asset(self, device: str) -> Asset:
        """Return a device's asset, the node's own for "", made where there is none yet."""
        return self.assets.setdefault(device, Asset(f"{self.group}/{self.name}/{device}".rstrip("/")))

    def born(self, payload: sparkplug.Payload) -> None:
        """Begin anew with the node's own birth (NBIRTH)."""
        self._forget()
        self.seq, self._bd_seq, self.unborn = payload.seq, _bd_seq(payload), False

    def follow(self, payload: sparkplug.Payload) -> int:
        """Count what the node sends: how many messages before this one were lost, perhaps a birth among them."""
        before, self.seq = self.seq, payload.seq
        if before is None or payload.seq is None or payload.seq == (before + 1) % 256:
            return 0
        self.unborn = True
        return (payload.seq - before - 1) % 256

    def died(self, payload: sparkplug.Payload) -> bool:
        """Whether a death certificate (NDEATH) is this connection's, and not an earlier one's."""
        bd_seq = _bd_seq(payload)
        if bd_seq is not None and self._bd_seq is not None and bd_seq != self._bd_seq:
            return False
        self.seq = None
        return True

    def values(
        self, asset: Asset, payload: sparkplug.Payload, sent_ns: int
    ) -> Iterator[tuple[Point, object, int, Quality]]:
        """Give a message's values: the point, what was read (None for null), its time in ns and its quality.

        What is historical is left out; a metric without a name says that a birth is owed.
        """
        for metric in payload.metrics:
            name = asset.name(metric)
            if not name:
                self.unborn = True
            if metric.historical or name not in asset.points:
                continue
            what = asset.value(name, metric), stamp_ns(metric.timestamp_ms, sent_ns), _quality(metric.quality)
            for point in asset.points[name]:
                yield point, *what

    def ask(self, now: float) -> bool:
        """Whether to request the births that are owed: at once, then less and less often until a quiet while.

        `now` is on the monotonic clock, in seconds.
        """
        if not self.unborn or self.ask_at > now:
            return False
        if now - self.ask_at > _ASK_S[1]:
            self._asked = 0
        self.ask_at = now + min(_ASK_S[1], _ASK_S[0] * 2 ** min(self._asked, 10))
        self._asked += 1
        return True


def stamp_ns(stamp_ms: int | None, otherwise_ns: int) -> int:
    """Return a timestamp in nanoseconds, or the other time where there is none that can be."""
    return stamp_ms * 1_000_000 if stamp_ms is not None and 0 < stamp_ms < MOST_MS else otherwise_ns


def _array(data: bytes, datatype: int) -> object:
    """Return a packed array of numbers, None for other bytes."""
    form = sparkplug.ARRAYS.get(datatype)
    if form is None or len(data) % int(form[2]):
        return None
    return np.frombuffer(data, form)


def _quality(code: int | None) -> Quality:
    """Return what the property `Quality` means (Sparkplug 3.0.0, 6.4.14): good, or else bad or stale."""
    return Quality.GOOD if code is None or code == _GOOD else Quality.BAD


def _bd_seq(payload: sparkplug.Payload) -> int | None:
    found = next((m.value for m in payload.metrics if m.name == "bdSeq"), None)
    return found if isinstance(found, int) else None
