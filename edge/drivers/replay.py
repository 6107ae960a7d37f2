"""Replay: a recording (CSV, npz, Parquet) played as if it were a machine, at a set speed.

A tag's address is a column, or an array of an npz and perhaps a channel of it (`x_train[3]`). A window of an npz is
played value by value for a scalar tag; for a `float32[T]` it is one waveform. A file that is gone is a cut.
"""

import asyncio
import contextlib
import importlib.util
import time
from collections.abc import AsyncIterator, Generator
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from broker.diagnose import Step, fail, ok
from edge.drivers._common import LostError, Point, Reader, file_path, option, refusal
from edge.drivers._diagnose import listen
from edge.drivers._recording import READERS
from edge.tags import Quality, Sample, Sink, Source
from models.errors import UserError

OPTIONS: dict[str, type] = {
    "speed": float,
    "loop": bool,
    "times": str,
    "time_column": str,
    "rate_hz": float,
    "client": int,
}

_PIECE = 256  # rows that are read ahead
_TEND_S = 0.2
_PAUSE_S = 0.01  # between two passes over a file, however short it is
_S = 1_000_000_000


class Driver(Reader[Point]):
    """Plays `file://` recordings; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("file",)

    def __init__(self, source: Source, sink: Sink) -> None:
        super().__init__(source, sink, [Point(tag) for tag in source.tags])
        self._path = file_path(source, "x.csv")
        self._read = READERS.get(self._path.suffix.lower())
        if self._read is None or self._path.name == self._path.suffix:
            raise refusal(source, "url", f"{source.url!r} is no recording", f"name a file: {', '.join(READERS)}")
        if self._path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise refusal(source, "url", "Parquet needs the package pyarrow", "pip install 'tundish[parquet]'")
        for tag in source.tags:
            if not tag.address.isprintable():
                raise UserError(tag.file, tag.line, "address", f"{tag.address!r} is no name", "write a column's name")
        self._speed = option(source, "speed", 1.0, 1e-3, 1e6)
        self._step_ns = _S / option(source, "rate_hz", 1.0, 1e-6, 1e6)
        self._loop = bool(option(source, "loop", False))  # noqa: FBT003 - the default of an option
        self._time_column = option(source, "time_column", "time")
        self._client = option(source, "client", -1, -1, 2**31)
        times = option(source, "times", "now")
        if times not in {"now", "recorded"}:
            raise refusal(source, "times", f"{times!r} is neither", 'write "now" or "recorded"')
        self._shifted = times == "now"
        if self._loop and not self._shifted:
            raise refusal(source, "times", "a loop would go back in time", 'write times = "now", or loop = false')
        self._rows: Generator[Any, None, None] = _nothing()
        self._columns: list[list[Point]] = []

    async def open(self) -> None:
        """Open the recording and find its columns; may raise anything."""
        self.health.quarantined.clear()
        await self._begin()

    async def _begin(self) -> None:
        """Begin at the first row; tags whose column isn't there are refused until it is."""
        if self._read is None:
            raise LostError("can't be read")
        wanted = list(dict.fromkeys(point.tag.address for point in self.points))
        self._rows = self._read(self._path, wanted, self._time_column, self._client)
        found: list[str] = await asyncio.to_thread(next, self._rows)
        self._columns = [[point for point in self.points if point.tag.address == name] for name in found]
        for point in self.points:
            if point.tag.address in found:
                self.release(point)
            else:
                self.quarantine(point, f"{self._path.name} has no {point.tag.address}; check the address column")

    async def read(self) -> None:
        """Play until the file is gone; always ends by raising."""
        self.connected()
        while True:
            last = await self._play()
            if not self._loop:
                self.health.error = f"{self._where} was played to its end; write loop = true to play it again"
                while True:
                    await self._wait(time.monotonic() + _TEND_S)
            await self._wait(max(last + self._step_ns / self._speed / _S, time.monotonic() + _PAUSE_S))
            await self._begin()

    async def _play(self) -> float:
        """Deliver every row when it is due; the result is when the last one was, on the monotonic clock."""
        begin, begin_ns = time.monotonic(), time.time_ns()
        due, first_ns, place = begin, None, 0
        while piece := await asyncio.to_thread(lambda: list(islice(self._rows, _PIECE))):
            batch: list[Sample] = []
            for stamp, values in piece:
                for step in range(self._steps(values)):
                    time_ns = int(place * self._step_ns) if stamp is None else stamp
                    first_ns = time_ns if first_ns is None else first_ns
                    place += 1
                    after_ns = (time_ns - first_ns) / self._speed
                    due = max(due, begin + after_ns / _S)
                    if due > time.monotonic():
                        self.deliver(batch)
                        batch = []
                        await self._wait(due)
                    shifted = self._shifted or stamp is None
                    batch += self._samples(values, step, begin_ns + int(after_ns) if shifted else time_ns)
            self.deliver(batch)
        return due

    def _steps(self, values: list[Any]) -> int:
        """Count the instants of a row: the length of its longest window that is taken value by value."""
        pairs = zip(values, self._columns, strict=True)
        return max((value.size for value, points in pairs for point in points if _series(value, point)), default=1)

    def _samples(self, values: list[Any], step: int, time_ns: int) -> list[Sample]:
        """Make the samples of one instant; a label holds for its whole window, a waveform is delivered once."""
        samples = []
        for value, points in zip(values, self._columns, strict=True):
            for point in points:
                series = _series(value, point)
                if value is None or (series and step >= value.size) or (point.tag.width and step):
                    continue
                sample = self.sample(point, value[step] if series else value, time_ns, Quality.GOOD)
                if sample is not None:
                    samples.append(sample)
        return samples

    async def _wait(self, until: float) -> None:
        """Sleep until then on the monotonic clock; LostError as soon as the file is gone."""
        while True:
            if not self._path.exists():
                raise LostError("is gone; check the file")
            left = until - time.monotonic()
            if left <= 0:
                await asyncio.sleep(0)
                return
            await asyncio.sleep(min(left, _TEND_S))

    async def close(self) -> None:
        """Close the file."""
        rows, self._rows = self._rows, _nothing()
        with contextlib.suppress(ValueError):  # a thread may be reading still, and closes it when it is done
            rows.close()

    @property
    def _where(self) -> str:
        return f"{self.source.name}: {self.source.url}"

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        if isinstance(error, LostError):
            return f"{self._where} {error}"
        if isinstance(error, FileNotFoundError):
            return f"{self._where}: no file {self._path}; check the path, which is relative to gateway.toml"
        text = " ".join(str(error).split())[:300] or type(error).__name__
        return f"{self._where} can't be played: {text}; check that it is a whole {self._path.suffix} file"


def _nothing() -> Generator[Any, None, None]:
    """No rows."""
    yield from ()


def _series(value: object, point: Point) -> bool:
    """Tell whether a value is a window that this point takes one by one."""
    return isinstance(value, np.ndarray) and value.ndim == 1 and not point.tag.width


async def diagnose(source: Source) -> AsyncIterator[Step]:
    """Say step by step how far this gateway comes with a recording."""
    path = file_path(source, "x.csv")
    if not path.is_file():
        yield fail("file", f"no file {path}; check the path, which is relative to gateway.toml")
        return
    yield ok("file", f"{path}, {path.stat().st_size} bytes")
    async for step in listen(source):
        yield step
