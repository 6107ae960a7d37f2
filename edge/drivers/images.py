"""Images: a watched folder of inspection pictures, each one sample of grey pixels and its labels, at the file's time.

A tag's address is `pixels` (its type `float32[size * size]`), `label` for the name of the subfolder that the picture
is in, or a column of the labels CSV. Labels come before the pixels, so that the pixels' window has its target. A
picture is taken when it has not changed between two looks, once, in the order of modification times; a folder that is
gone is a cut.
"""

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from broker.diagnose import Step, fail, ok
from edge.drivers._common import LostError, Point, Reader, file_path, located, option, refusal
from edge.drivers._diagnose import listen
from edge.drivers._pictures import MOST_KNOWN, Folder, Picture, grey, read_labels
from edge.tags import Quality, Sink, Source, Tag
from models.errors import UserError

OPTIONS: dict[str, type] = {"size": int, "labels": str, "classes": list, "backlog": bool, "poll_ms": int}

_PIXELS, _LABEL = "pixels", "label"
_AT_ONCE = 64  # pictures between two looks at the folder


class Driver(Reader[Point]):
    """Watches a folder; the contract is `edge.tags.Driver`'s."""

    schemes: ClassVar[tuple[str, ...]] = ("file",)

    def __init__(self, source: Source, sink: Sink) -> None:
        # Samples of one time come in the order of the points: labels first.
        tags = sorted(source.tags, key=lambda tag: tag.address == _PIXELS)
        super().__init__(source, sink, [Point(tag) for tag in tags])
        self._folder = Folder(file_path(source, "pictures"))
        self._size = option(source, "size", 64, 8, 1024)
        self._poll_s = option(source, "poll_ms", 500, 10, 3_600_000) / 1000
        self._backlog = bool(option(source, "backlog", False))  # noqa: FBT003 - the default of an option
        labels = option(source, "labels", "")
        self._labels = located(source, labels) if labels else None
        self._classes = _classes(source)
        if importlib.util.find_spec("PIL") is None:
            raise refusal(source, "driver", "pictures need the package Pillow", "pip install 'tundish[images]'")
        for tag in tags:
            self._check(tag)
        self._read_at: tuple[int, int] | None = None
        self._columns: list[str] = []
        self._rows: dict[str, list[str]] = {}
        self._begun = False
        self._seen: dict[str, Picture] = {}

    def _check(self, tag: Tag) -> None:
        """UserError for an address or a type that can't be meant."""
        if tag.address == _PIXELS:
            if tag.width != self._size**2:
                problem = f"{tag.type or 'a scalar'} holds no picture of size = {self._size}"
                raise UserError(tag.file, tag.line, "type", problem, f"write float32[{self._size**2}]")
        elif not tag.address.isprintable() or (tag.address != _LABEL and self._labels is None):
            remedy = 'write pixels or label, or add labels = "labels.csv" for a column of it'
            raise UserError(tag.file, tag.line, "address", f"{tag.address!r} is none", remedy)

    async def open(self) -> None:
        """Look at the folder once; may raise anything."""
        self.health.quarantined.clear()
        self._read_at = None
        self._seen.clear()
        there, late = await asyncio.to_thread(self._folder.look)
        self._count(late)
        if not self._begun and not self._backlog:
            self._folder.take(there)
        self._begun = True

    async def read(self) -> None:
        """Deliver each new picture; raises when the folder is gone."""
        self.connected()
        while True:
            await self._look()
            await asyncio.sleep(self._poll_s)

    async def _look(self) -> None:
        """Deliver the pictures that are new and have not changed since the last look."""
        there, late = await asyncio.to_thread(self._folder.look)
        await self._read_labels()
        for picture in there[:_AT_ONCE]:
            if self._seen.get(picture.name) != picture:
                break  # perhaps half of it is written; those behind it wait, to keep the order
            await self._take(picture)
            self._folder.take([picture])
        self._seen = {picture.name: picture for picture in there}
        self._count(late)

    def _count(self, late: list[str]) -> None:
        """Count and name pictures that came too late to tell whether they were taken."""
        if late:
            self.health.overflows += len(late)
            text = f"{late[-1]} is left out: it came after {MOST_KNOWN} newer pictures; check the clock that stamps it"
            self.health.error = f"{self.source.name}: {text}"

    async def _take(self, picture: Picture) -> None:
        """Deliver one picture with its labels; one that is damaged is counted, named and left out."""
        try:
            pixels = await asyncio.to_thread(grey, self._folder.path / picture.name, self._size)
        except FileNotFoundError:
            return
        except Exception as error:  # noqa: BLE001 - a damaged file may raise nearly anything in the library
            self.health.overflows += 1
            text = " ".join(str(error).split())[:200] or type(error).__name__
            self.health.error = f"{self.source.name}: {picture.name} is left out: {text}; check the picture"
            return
        self.health.error = ""
        samples = []
        for point in self.points:
            if self._there(point):
                value = self._value(point.tag, picture.name, pixels)
                quality = Quality.BAD if value is None else Quality.GOOD
                if (sample := self.sample(point, value, picture.time_ns, quality)) is not None:
                    samples.append(sample)
        # An old picture's time says nothing of the clock that a cut is stamped with.
        self.deliver(samples, time.time_ns())

    def _value(self, tag: Tag, name: str, pixels: NDArray[np.float32]) -> object:
        """Return a tag's value for a picture: pixels, a number, a class's index, a text; None if there is none."""
        if tag.address == _PIXELS:
            return pixels
        if self._labels is None:
            text = name.rpartition("/")[0]
        else:
            cells = self._rows.get(name, [])
            place = self._columns.index(tag.address)
            text = cells[place] if place < len(cells) else ""
        if text in self._classes:
            return self._classes.index(text)
        try:
            return float(text)
        except ValueError:
            return None if self._classes or not text else text

    async def _read_labels(self) -> None:
        """Read the labels CSV when it has changed; tags whose column isn't in it are refused until it is."""
        if self._labels is None:
            return
        status = await asyncio.to_thread(self._labels.stat)
        if (status.st_mtime_ns, status.st_ino) == self._read_at:
            return
        self._columns, self._rows = await asyncio.to_thread(read_labels, self._labels)
        self._read_at = status.st_mtime_ns, status.st_ino
        for point in self.points:
            if not self._there(point):
                self.quarantine(point, f"{self._labels.name} has no {point.tag.address}; check the address column")

    def _there(self, point: Point) -> bool:
        return self._labels is None or point.tag.address in {_PIXELS, *self._columns}

    async def close(self) -> None:
        """Nothing is held open between two looks."""

    def explain(self, error: Exception) -> str:
        """Say in one line what failed and what to do about it."""
        where = f"{self.source.name}: {self.source.url}"
        if isinstance(error, LostError):
            return f"{where} {error}"
        if isinstance(error, OSError):
            return f"{where}: {error.filename}: {error.strerror}; check that the folder and its labels are there"
        return f"{where}: {self._labels}: {' '.join(str(error).split())[:200]}; check that it is a CSV"


def _classes(source: Source) -> list[str]:
    """Return the option `classes`: the names by index, all texts and each once; UserError otherwise."""
    names = source.options.get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise refusal(source, "classes", f"{names!r} are no names", 'write classes = ["good", "scratch"]')
    return names


async def diagnose(source: Source) -> AsyncIterator[Step]:
    """Say step by step how far this gateway comes with a folder of pictures."""
    folder = file_path(source, "pictures")
    if not folder.is_dir():
        yield fail("folder", f"no folder {folder}; check the path, which is relative to gateway.toml")
        return
    yield ok("folder", str(folder))
    async for step in listen(source, patient=True):
        yield step
