"""What every driver does alike: live through cuts, keep refused tags apart, scale values, read its options.

A driver inherits `Reader` and brings `open`, `read`, `close` and `explain`; the contract is `edge.tags.Driver`'s.
"""

import contextlib
import logging
import math
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Generic, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from edge.tags import Health, Quality, Sample, Scan, Sink, Source, Tag, Value, sleep_backoff
from models.errors import UserError

T = TypeVar("T", int, float, str)

_GOOD, _BAD = Quality.GOOD, Quality.BAD
MOST_MS = 2**63 // 1_000_000  # the last time in milliseconds whose nanoseconds an int64 holds
_BACK_NS = 10_000_000_000  # behind the newest stamp of a tag, from which on its clock may have been set back
_log = logging.getLogger(__name__)


class LostError(Exception):
    """The connection is no longer of use; the text says why, and what to do if there is more than waiting."""


class Point:
    """One tag on the way from its source, with what was last delivered of it."""

    __slots__ = (
        "bad_ns", "behind_ns", "deadband", "due", "last", "latest_ns", "offset", "plain", "ref", "scale", "tag",
        "tries",
    )  # fmt: skip

    def __init__(self, tag: Tag) -> None:
        self.tag = tag
        self.ref = tag.ref
        self.scale = tag.scale
        self.offset = tag.offset
        self.plain = tag.scale == 1.0 and tag.offset == 0.0
        self.deadband = tag.deadband
        self.last = math.nan
        self.latest_ns = 0
        self.bad_ns = 0
        self.behind_ns = 0  # the last stamp that was far older than `latest_ns`
        self.tries = 0
        self.due = 0.0

    def bad(self, time_ns: int) -> Sample:
        """Make the sample that says: no value. The next good one passes the deadband."""
        self.last = math.nan
        if time_ns < self.latest_ns:
            self.since(time_ns)
        else:
            self.behind_ns = 0
        self.bad_ns = self.latest_ns = max(time_ns, self.latest_ns)
        empty: Value = np.empty(0, np.float32) if self.tag.width else math.nan
        return Sample(self.ref, self.bad_ns, empty, _BAD)

    def since(self, time_ns: int) -> int:
        """Return the time from which a value holds: its own stamp, or that of the BAD before it, if that is newer.

        After a cut a source says again what has not changed, with the time of the change: it holds from now on. Where
        the stamps go on from there instead, far behind the newest one, that one was wrong, and is forgotten.
        """
        if time_ns >= self.latest_ns:
            self.latest_ns = time_ns
        elif time_ns < self.latest_ns - _BACK_NS:
            if 0 < self.behind_ns < time_ns:
                self.latest_ns, self.bad_ns = time_ns, 0
            self.behind_ns = time_ns
        return max(time_ns, self.bad_ns)

    def take(self, raw: float, time_ns: int, quality: Quality) -> Sample | None:
        """Make a sample of a number as it was read; None within the deadband, BAD for NaN and infinity."""
        if time_ns > self.latest_ns:
            self.latest_ns = time_ns
        elif time_ns < self.latest_ns:
            time_ns = self.since(time_ns)
        value = float(raw) if self.plain else raw * self.scale + self.offset
        if not math.isfinite(value):
            return self.bad(time_ns)
        # Nothing delivered yet is NaN, and nothing is within a deadband of that.
        if abs(value - self.last) < self.deadband:
            return None
        self.last = value
        return Sample(self.ref, time_ns, value, quality)

    def any(self, raw: object, time_ns: int, quality: Quality) -> Sample | None:
        """Make a sample of whatever was read; None within the deadband, BAD for what is no value of this tag."""
        if quality is _BAD:
            return self.bad(time_ns)
        if self.tag.width:
            return self._wave(raw, time_ns, quality)
        if isinstance(raw, str):
            # Nothing is ordered among texts, so none is scaled, and a repeated one is still one.
            return Sample(self.ref, self.since(time_ns), float(zlib.crc32(raw.encode())), quality)
        if isinstance(raw, int | float | np.number):
            with contextlib.suppress(OverflowError):  # JSON's integers have no bound
                return self.take(float(raw), time_ns, quality)
        return self.bad(time_ns)

    def _wave(self, raw: object, time_ns: int, quality: Quality) -> Sample:
        """Make a waveform sample: float32 (width,); BAD for another length or for what isn't all finite numbers."""
        numbers = isinstance(raw, list) and all(isinstance(number, int | float) for number in raw)
        with np.errstate(over="ignore"), contextlib.suppress(OverflowError):
            wave = np.array(raw, np.float64) if numbers or isinstance(raw, np.ndarray) else np.empty(0)
            snapshot = (wave * self.scale + self.offset).astype(np.float32)
            if snapshot.shape == (self.tag.width,) and np.isfinite(snapshot).all():
                return Sample(self.ref, self.since(time_ns), snapshot, quality)
        return self.bad(time_ns)


def misfit(tag: Tag, raw: object) -> str:
    """Say why what was read can't be a value of a tag as its row is written, and what to write; empty if it can."""
    if isinstance(raw, str):
        # A checksum that is scored as a number would look like one.
        text = f"{tag.address} is a text; write type = string: its checksum then tells segments apart"
        return "" if tag.type == "string" else text
    if tag.width or not isinstance(raw, list | np.ndarray):
        return ""
    numbers = raw.ndim == 1 if isinstance(raw, np.ndarray) else raw and all(isinstance(one, int | float) for one in raw)
    return f"{tag.address} is an array of {len(raw)} numbers; write type = float32[{len(raw)}]" if numbers else ""


P = TypeVar("P", bound=Point)


class Points(Generic[P]):
    """Scalar tags that are always read together, at one time, and delivered whole: without a deadband."""

    def __init__(self, points: Sequence[P]) -> None:
        self.members = list(points)
        self.refs = tuple(point.ref for point in points)
        self._scale = np.array([point.scale for point in points])
        self._offset = np.array([point.offset for point in points])
        self._plain = all(point.plain for point in points)

    def take(self, raw: NDArray[np.float64], time_ns: int) -> Sequence[Sample]:
        """Make a batch of numbers (N,) as they were read: what `Point.take` makes of each."""
        members = self.members
        if max([point.latest_ns for point in members]) > time_ns:  # rare: the source's clock was set back
            return [sample for p, x in zip(members, raw, strict=True) if (sample := p.take(x, time_ns, _GOOD))]
        values = raw if self._plain else raw * self._scale + self._offset
        good = np.isfinite(values)
        for point in members:
            point.latest_ns = time_ns
        if not good.all():
            values = np.where(good, values, np.nan)
            for place in np.flatnonzero(~good).tolist():
                members[place].bad(time_ns)
        return Scan(self.refs, time_ns, values, np.where(good, _GOOD, _BAD).astype(np.int8))


class Reader(Generic[P]):
    """The life of a driver around its connections.

    `knows_range` says whether a protocol tells a tag's range, of which a deadband can be a percentage.
    """

    knows_range: ClassVar[bool] = False

    def __init__(self, source: Source, sink: Sink, points: Sequence[P]) -> None:
        for tag in source.tags:
            if tag.deadband_percent and not self.knows_range:
                problem = f"{tag.deadband_percent:g}% of a range that {source.driver} does not tell"
                raise UserError(tag.file, tag.line, "deadband", problem, "write it in the tag's unit, such as 0.5")
        self.health = Health()
        self.source = source
        self.points = points
        self._sink = sink
        self._told = False
        self._ahead_ns: int | None = None  # the source's clock minus the gateway's; unknown before a first sample
        self._owed: list[P] = []  # refused before that

    async def open(self) -> None:
        """Connect and begin; may raise anything."""
        raise NotImplementedError

    async def read(self) -> None:
        """Deliver until the connection is lost; always ends by raising."""
        raise NotImplementedError

    async def close(self) -> None:
        """Let go of the connection within a second and a half, whatever its state; never raises."""
        raise NotImplementedError

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        raise NotImplementedError

    async def cut(self) -> None:
        """Let go of what failed, for the next `open`; by default of everything. Never raises."""
        await self.close()

    async def run(self) -> None:
        """Read until cancelled."""
        attempt = 0
        try:
            while True:
                before = self.health.connects
                try:
                    await self.open()
                    await self.read()
                except Exception as error:  # noqa: BLE001 - the boundary: the libraries raise bare exceptions too
                    self._lost(self.explain(error))
                    await self.cut()
                attempt = 0 if self.health.connects > before else attempt
                await sleep_backoff(attempt)
                attempt += 1
        finally:
            self.health.connected = False
            await self.close()

    def connected(self) -> None:
        """Note that the source answers."""
        self.health.connected, self.health.error = True, ""
        self.health.connects += 1
        self._told = False
        _log.info("%s: reads %d tags from %s", self.source.name, len(self.points), self.source.url)

    def deliver(self, samples: Sequence[Sample], sent_ns: int | None = None) -> None:
        """Hand a batch on, oldest first, and count it; `sent_ns` is the source's clock, if not the last sample's."""
        if not samples:
            return
        self._ahead_ns = (samples[-1].time_ns if sent_ns is None else sent_ns) - time.time_ns()
        if self._owed:
            samples = [*samples, *self._bad(self._owed)]
            self._owed = []
        self.health.samples += len(samples)
        if isinstance(samples, Scan):
            self.health.bad += int(np.count_nonzero(samples.quality == _BAD))
        else:
            self.health.bad += [sample.quality for sample in samples].count(_BAD)
        self._sink(samples)

    def _bad(self, points: Sequence[P]) -> list[Sample]:
        """BAD for each, on the source's clock as its last sample tells it.

        A stamp of the gateway's clock could lie in the source's future, and would then undo values that come later.
        """
        now = self.source_ns()
        for point in points:
            point.behind_ns = 0  # that time is reckoned, and says nothing of a clock that was set back
        return [point.bad(now) for point in points]

    def source_ns(self) -> int:
        """Return the time on the source's clock, as its last sample tells it."""
        return time.time_ns() + (self._ahead_ns or 0)

    def sample(self, point: P, raw: object, time_ns: int, quality: Quality) -> Sample | None:
        """Make a sample of whatever was read; a tag whose row it does not fit is kept apart until it does."""
        if reason := misfit(point.tag, raw):
            self.quarantine(point, reason)
            return None
        self.release(point)
        return point.any(raw, time_ns, quality)

    def quarantine(self, point: P, reason: str) -> None:
        """Keep a refused tag apart until its next try is due, 1 s to 60 s from now; BAD once."""
        known = point.ref in self.health.quarantined
        self.health.quarantined[point.ref] = reason
        point.due = time.monotonic() + min(60.0, 2.0 ** min(point.tries, 6))
        point.tries += 1
        if not known:
            _log.warning("%s: %s", point.ref, reason)
            if self._ahead_ns is None:
                self._owed.append(point)
            else:
                self.deliver(self._bad([point]))

    def release(self, point: P) -> None:
        """Take a tag that reads well back among the others."""
        point.tries = 0
        if self.health.quarantined.pop(point.ref, None) is not None:
            _log.info("%s: reads again", point.ref)

    def due(self) -> list[P]:
        """Return the refused tags whose next try is due."""
        if not self.health.quarantined:
            return []
        now = time.monotonic()
        return [point for point in self.points if point.ref in self.health.quarantined and point.due <= now]

    def _lost(self, reason: str) -> None:
        """Say at once, and once a cut, that no tag has a value any more."""
        self.health.connected = False
        if reason != self.health.error:
            _log.warning("%s", reason)
        self.health.error = reason
        if not self._told and self._ahead_ns is not None:
            self.deliver(self._bad(self.points))
        self._told = True


def option(source: Source, key: str, default: T, least: float = 0, most: float = math.inf) -> T:
    """Return a source's option in the type of its default; UserError for another type or a value out of range."""
    value = source.options.get(key, default)
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise refusal(source, key, f"{value!r} is not of type {kind.__name__}", f"write {key} = {default!r}")
    if not isinstance(value, str) and not least <= value <= most:
        top = f" to {most:g}" if math.isfinite(most) else " or more"
        raise refusal(source, key, f"{value!r} is out of range", f"write {least:g}{top}")
    return value


def located(source: Source, path: str) -> Path:
    """Return a path of a `[[source]]`, which is meant relative to the file that it stands in."""
    return Path(source.folder) / path


def file_path(source: Source, example: str) -> Path:
    """Return the path of a source's `file:///…` URL or relative path; UserError for another scheme."""
    scheme, mark, rest = source.url.partition("://")
    if not source.url or (mark and (scheme != "file" or not rest.startswith("/"))):
        raise refusal(source, "url", f"{source.url!r} is no file", f"write a path, or file:///data/{example}")
    return Path(unquote(rest)) if mark else located(source, source.url)


def refusal(source: Source, key: str, problem: str, remedy: str) -> UserError:
    """Build (not raise) the error for a key of a `[[source]]`."""
    return UserError(f"[[source]] {source.name}", 0, key, problem, remedy)


def endpoint(source: Source, scheme: str, default_port: int) -> tuple[str, int]:
    """Return host and port of a source's URL; UserError if it is none of that scheme."""
    try:
        url = urlsplit(source.url)
        host, port = url.hostname, url.port or default_port
    except ValueError:
        host, port = None, 0
    if not host or url.scheme != scheme or "@" in url.netloc:
        example = f"write {scheme}://10.0.0.10:{default_port}"
        raise refusal(source, "url", f"{source.url!r} is not a {scheme} URL", example)
    return host, port
