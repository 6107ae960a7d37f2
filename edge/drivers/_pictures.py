"""A folder of pictures: which are new, their grey pixels, and the CSV with their labels. Blocking; bounded."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SUFFIXES = {".png", ".jpg", ".jpeg"}
MOST_BYTES = 64 << 20
MOST_PIXELS = 25_000_000
MOST_KNOWN = 10_000
_MOST_LABELS = 1_000_000
_LINE = 1 << 16


class Picture(NamedTuple):
    """A file as it lies there; pictures are in the order of their times, then their names."""

    time_ns: int
    name: str
    size: int


class Folder:
    """A folder of pictures and its subfolders (one level), and which of them were taken.

    The newest that were taken are known by name and time, so that a file may arrive late: with an equal or an older
    time. Behind these, one that arrives is told by its inode's change time, which no copy keeps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._taken: dict[str, int] = {}
        self._floor = (0, "")  # up to here pictures are known no more
        self._changed_ns = 0

    def look(self) -> tuple[list[Picture], list[str]]:
        """Return the pictures that were not taken, in order, and the names of those that arrived too late for it."""
        new, late, changed_ns = [], [], self._changed_ns
        for name, entry in _files(self.path):
            if os.path.splitext(name)[1].lower() not in SUFFIXES:  # noqa: PTH122 - a name, not a path
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # taken away since
                continue
            changed_ns = max(changed_ns, status.st_ctime_ns)
            if self._taken.get(name) == status.st_mtime_ns:
                continue
            if (status.st_mtime_ns, name) > self._floor:
                new.append(Picture(status.st_mtime_ns, name, status.st_size))
            elif self._changed_ns and status.st_ctime_ns > self._changed_ns:
                late.append(name)
        self._changed_ns = changed_ns
        return sorted(new), late

    def take(self, pictures: Sequence[Picture]) -> None:
        """Remember that these were taken; the oldest of all are forgotten in bulk when they are too many."""
        self._taken.update((picture.name, picture.time_ns) for picture in pictures)
        if len(self._taken) > MOST_KNOWN * 11 // 10:
            known = sorted((time_ns, name) for name, time_ns in self._taken.items())
            self._floor = max(self._floor, known[-MOST_KNOWN - 1])
            self._taken = {name: time_ns for time_ns, name in known[-MOST_KNOWN:]}


def _files(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                yield entry.name, entry
            elif entry.is_dir():
                with os.scandir(entry.path) as inner:
                    yield from ((f"{entry.name}/{file.name}", file) for file in inner if file.is_file())


def grey(path: Path, size: int) -> NDArray[np.float32]:
    """Decode a PNG or JPEG to float32 (size * size,), rows from the top, 0 black to 255 white.

    ValueError if it is larger than is taken in, which its header tells before anything is decoded; the library's own
    errors, of several kinds, if it is damaged.
    """
    from PIL import Image  # noqa: PLC0415 - for those alone who have pictures

    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} are more than {MOST_PIXELS} pixels")
        image.draft("L", (size, size))  # a JPEG is decoded no larger than it is needed
        if image.mode.startswith("I;16"):
            whole = Image.fromarray(np.asarray(image, np.float32) / 257)  # 65535 is white
        else:
            whole = image.convert("L")
        small = whole.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1)


def read_labels(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Read a labels CSV: the header's columns after the first, and the cells of each file named in the first."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline(_LINE)
        delimiter = ";" if first.count(";") > first.count(",") else ","
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        rows: dict[str, list[str]] = {}
        for cells in csv.reader(iter(lambda: file.readline(_LINE), ""), delimiter=delimiter):
            if len(rows) >= _MOST_LABELS:
                raise ValueError(f"more than {_MOST_LABELS} lines")
            if cells:
                rows[cells[0].strip()] = [cell.strip() for cell in cells[1:]]
    return header[1:], rows
