"""What `samples.db` holds, for those who read it: training, reports, tests. The writer is `edge.ring`."""

import logging
import sqlite3
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge.blocks import Tags, unpack
from edge.window import Columns
from models.errors import LocalError

log = logging.getLogger(__name__)

FILE = "samples.db"
SCHEMA = 3
# The last time that an int64 of nanoseconds can say (2262): a source may stamp a value with the year 9999.
LAST_NS = 2**63 - 1
SCORE = "task, scored_ms, end_ns, score, verdict, version"
TABLES = """
CREATE TABLE IF NOT EXISTS tag (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL, meaning TEXT NOT NULL, since INTEGER NOT NULL, UNIQUE (name, meaning));
CREATE TABLE IF NOT EXISTS journal (id INTEGER PRIMARY KEY, count INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS block (
  id INTEGER PRIMARY KEY, tag INTEGER NOT NULL, first_ns INTEGER NOT NULL, last_ns INTEGER NOT NULL,
  newest_ns INTEGER NOT NULL, stored_ms INTEGER NOT NULL, count INTEGER NOT NULL, width INTEGER NOT NULL,
  data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS block_tag ON block (tag, id, last_ns);
CREATE TABLE IF NOT EXISTS score (
  id INTEGER PRIMARY KEY, task TEXT NOT NULL, scored_ms INTEGER NOT NULL, end_ns INTEGER NOT NULL,
  score REAL, verdict TEXT NOT NULL, version INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS score_end ON score (task, end_ns);
"""


# A tag whose row was changed means something else, under another number; what it means now is its last one.
CURRENT = "SELECT id, name, meaning, max(since) FROM tag"


class Score(NamedTuple):
    """One scored window, as kept: times in ms (gateway's clock) and ns (the source's)."""

    task: str
    scored_ms: int
    end_ns: int
    score: float | None
    verdict: str
    version: int


class SampleReader:
    """Read `samples.db` from any process, while it is being written."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True, timeout=10, isolation_level=None)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def newest_ns(self, tags: Sequence[str]) -> int:
        """Newest source time in what was stored last of any of the tags; 0 without anything.

        The last by arrival, not the largest time: one stamp of a wrong clock must not hide what came before it.
        """
        marks = ", ".join("?" * len(tags))
        with self._db:
            self._db.execute("BEGIN")
            query = f"{CURRENT} WHERE name IN ({marks}) GROUP BY name"
            numbers = [number for number, *_ in self._db.execute(query, tuple(tags))]
            for (data,) in self._db.execute("SELECT data FROM journal ORDER BY id DESC"):
                if found := [int(columns[0][-1]) for number, columns in _readable(data) if number in numbers]:
                    return max(found)
            marks = ", ".join("?" * len(numbers))
            last = f"SELECT max(id) FROM block WHERE tag IN ({marks})"
            row = self._db.execute(f"SELECT newest_ns FROM block WHERE id = ({last})", tuple(numbers)).fetchone()
            return int(row[0]) if row else 0

    def columns(self, tag: str, since_ns: int = 0, most: int = 5_000_000, until_ns: int = LAST_NS) -> Columns | None:
        """Stored samples of one tag from `since_ns` to `until_ns`, by source time; None if there are none.

        Only what was stored while the tag meant what it does now. Of more than `most` samples the newest blocks are
        taken. The last sample before `since_ns` comes along, because that value holds then. A waveform tag's Bad
        notices have no values, and are left out, and so are damaged blocks.
        """
        with self._db:
            self._db.execute("BEGIN")  # one view of journal and blocks, between which samples move
            parts = list(self._parts(tag, since_ns, until_ns, most))
        widest = max((part[1].ndim for part in parts), default=1)
        width = max((part[1].shape[1] for part in parts if part[1].ndim > 1), default=0)
        parts = [part for part in parts if part[1].ndim == widest and (not width or part[1].shape[1] == width)]
        if not parts:
            return None
        times, values, quality = in_order(joined(parts[::-1]))
        first = max(0, int(np.searchsorted(times, since_ns)) - 1)
        end = int(np.searchsorted(times, until_ns, "right"))
        return (times[first:end], values[first:end], quality[first:end]) if end > first else None

    def _parts(self, tag: str, since_ns: int, until_ns: int, most: int) -> Iterator[Columns]:
        """What may hold samples of that time, newest first."""
        found = self._db.execute(f"{CURRENT} WHERE name = ? GROUP BY name", (tag,)).fetchone()
        if found is None:
            return
        total = 0
        for (data,) in self._db.execute("SELECT data FROM journal ORDER BY id DESC"):
            for number, columns in _readable(data):
                if number == found[0]:
                    total += len(columns[0])
                    yield columns
        query = "SELECT max(last_ns) FROM block WHERE tag = ? AND last_ns < ?"
        (first,) = self._db.execute(query, (found[0], since_ns)).fetchone()
        query = "SELECT data FROM block WHERE tag = ? AND last_ns >= ? AND first_ns <= ? ORDER BY id DESC"
        for (data,) in self._db.execute(query, (found[0], since_ns if first is None else first, until_ns)):
            if total >= most:
                return
            for _, columns in _readable(data):
                total += len(columns[0])
                yield columns

    def verdict(self, task: str, from_ns: int, before_ns: int) -> str | None:
        """The newest kept verdict on a window that ended in that time; None if there is none."""
        query = "SELECT verdict FROM score WHERE task = ? AND end_ns >= ? AND end_ns < ? ORDER BY id DESC LIMIT 1"
        row = self._db.execute(query, (task, min(from_ns, LAST_NS), min(before_ns, LAST_NS))).fetchone()
        return None if row is None else str(row[0])

    def scores(self, task: str | None = None) -> list[Score]:
        """Kept scores, oldest first."""
        where, args = ("WHERE task = ?", (task,)) if task else ("", ())
        return [Score(*row) for row in self._db.execute(f"SELECT {SCORE} FROM score {where} ORDER BY id", args)]


def sections(data: bytes) -> Iterator[tuple[int, Columns]]:
    """Each tag's columns of a block, which begin where the number changes; 0 for the tag of an unmixed one."""
    columns, tags = unpack(data)
    yield from [(0, columns)] if tags is None else by_tag(columns, tags)


def by_tag(columns: Columns, tags: Tags) -> Iterator[tuple[int, Columns]]:
    """Each tag's columns where samples of many follow each other, one tag's in one piece."""
    times, values, quality = columns
    starts = [0, *(np.nonzero(np.diff(tags))[0] + 1).tolist(), len(tags)]
    for start, end in pairwise(starts):
        yield int(tags[start]), (times[start:end], values[start:end], quality[start:end])


def _readable(data: bytes) -> list[tuple[int, Columns]]:
    """The same for a reader, to whom a damaged block is one that is not there."""
    try:
        return list(sections(data))
    except LocalError as error:
        log.error("%s", error)
        return []


def joined(parts: Sequence[Columns]) -> Columns:
    """Columns of one shape, one after the other."""
    times, values, quality = (np.concatenate(column) for column in zip(*parts, strict=True))
    return times, values, quality


def in_order(columns: Columns) -> Columns:
    """Columns by source time; of one time, those that were stored first come first."""
    times, values, quality = columns
    order = np.argsort(times, kind="stable")
    return times[order], values[order], quality[order]
