"""`samples.db`: a ring of what was read, bounded in bytes and in days; the oldest go first.

Its writer is a thread with a queue in memory, so that nobody waits for the disk. Each second's samples of all slow
tags are one row of a journal; after a minute or so they become blocks, one a tag, and small blocks of a tag are merged
into larger ones, each sample a few times in all. So a sample takes a few bytes, and a second a few pages, which is what
wears flash out. The file syncs at checkpoints only (a power cut costs the last seconds of samples, not the file); one
that is damaged all the same is set aside, and a new one begun.
"""

import logging
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edge.blocks import MOST_VALUES, Block, Tags, pack, unpack
from edge.flush import DENSE, Part, parts_of
from edge.heap import give_back
from edge.history import CURRENT, FILE, SCHEMA, SCORE, TABLES, Score, by_tag, in_order, joined
from edge.store import SchemaError, open_database
from edge.tags import Sample
from edge.window import Columns
from models.errors import LocalError

log = logging.getLogger(__name__)

_ASIDE = FILE + ".damaged"
_FLUSH_S = 1.0
_DAYS_S = 60.0  # between two looks for samples whose days are over, also while nothing comes
# Samples that may wait for the disk, scores kept.
_MAX_QUEUED = 2_000_000
_MAX_SCORES = 500_000
# So many rows, or values, of the journal become blocks.
_JOURNAL = (64, 262_144)
# Values up to which blocks of a tag are merged, and how much later the second may have been stored.
_MERGED = 4096
_MERGED_MS = 86_400_000
# Room on the disk that samples never take: for the write-ahead logs, the outbox and the models.
_RESERVE = 16 << 20
# The newest block of a tag stays: of one that seldom changes it holds the value of today.
_NOT_NEWEST = "id NOT IN (SELECT max(id) FROM block GROUP BY tag)"
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class Samples:
    """The writer: `append` and `score` return at once; a thread stores, and shows `watch` what it stores.

    `max_days` counts from when a sample became part of a block, on the gateway's clock; 0 is no bound. The newest block
    of a tag stays, whatever the bounds. `dropped` counts samples that could not be kept, `error` is the disk's last
    error, empty while all is well, and `notice` says if a damaged or older file was set aside.
    """

    def __init__(
        self, folder: Path, max_bytes: int, max_days: int = 0, watch: Callable[[Part], object] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.max_bytes, self.max_days, self._folder, self._watch = max_bytes, max_days, folder, watch
        self.dropped, self.error, self.notice = 0, "", ""
        self._batches: deque[Sequence[Sample]] = deque()
        self._scores: deque[Score] = deque()
        self._waiting: deque[threading.Event] = deque()
        # Each counted by one thread alone: samples taken from drivers, and those of them that left the queue.
        self._put, self._taken = 0, 0
        self._meanings: dict[str, str] = {}
        self._stop, self._wake = False, threading.Event()
        self._open()
        self._thread = threading.Thread(target=self._write_loop, name="samples", daemon=True)
        self._thread.start()

    def append(self, samples: Sequence[Sample]) -> None:
        """Take a batch; it is on its way to the disk within a second or so."""
        if self._put - self._taken > _MAX_QUEUED:
            self.dropped += len(samples)
            return
        self._put += len(samples)
        self._batches.append(samples)

    def score(self, score: Score) -> None:
        """Keep a score."""
        if len(self._scores) < _MAX_QUEUED:
            self._scores.append(score)

    def retag(self, meanings: Mapping[str, str]) -> None:
        """Say what each tag means from now on; what a tag was stored as when it meant something else is not mixed in.

        What was appended before is to be flushed before.
        """
        self._meanings, self._changed = dict(meanings), True

    def flush(self) -> None:
        """Wait until everything taken so far is stored (training and tests; scoring never calls it)."""
        done = threading.Event()
        self._waiting.append(done)
        self._wake.set()
        done.wait(30)

    def close(self) -> None:
        """Store what is left, then stop the thread."""
        self._stop = True
        self._wake.set()
        self._thread.join(30)
        self._db.close()

    # -- the file ------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        path = self._folder / FILE
        try:
            try:
                self._begin(path)
            except sqlite3.Error as error:
                if _code(error) not in _DAMAGED:
                    raise
                self._set_aside(f"was damaged ({error})")
                self._begin(path)
            except SchemaError as error:
                if error.found > SCHEMA:
                    raise
                self._set_aside(f"is of an older program (schema {error.found})")
                self._begin(path)
        except (OSError, sqlite3.Error) as error:
            raise LocalError(f"{path} can't be opened: {error}") from error

    def _begin(self, path: Path) -> None:
        self._db, self._closed = open_database(path, TABLES, SCHEMA, "NORMAL"), False
        self._know_tags()

    def _know_tags(self) -> None:
        current = self._db.execute(f"{CURRENT} GROUP BY name").fetchall()
        self._tags: dict[str, tuple[int, str]] = {name: (number, meaning) for number, name, meaning, _ in current}
        self._changed = True

    def _set_aside(self, why: str) -> None:
        """Make way for a new file: what was read is lost to training, scoring and state.db go on without it."""
        path, aside = self._folder / FILE, self._folder / _ASIDE
        path.replace(aside)
        for suffix in ("-wal", "-shm"):  # a log of another file must not be played into the new one
            (self._folder / (FILE + suffix)).unlink(missing_ok=True)
        self.notice = f"{path} {why} and is set aside as {aside.name}; the ring of samples began anew"
        log.error("%s", self.notice)

    def _write_loop(self) -> None:
        next_days = time.monotonic() + _DAYS_S
        while True:
            self._wake.wait(_FLUSH_S)
            self._wake.clear()
            stop, waiting = self._stop, [self._waiting.popleft() for _ in range(len(self._waiting))]
            scores = [self._scores.popleft() for _ in range(len(self._scores))]
            days = bool(self.max_days) and time.monotonic() >= next_days
            if days:
                next_days = time.monotonic() + _DAYS_S
            taken = self._taken
            try:
                parts = self._take()
                if parts or scores or days or self._changed:
                    self._write(parts, scores, days=days)
            except Exception as error:
                # The one writer there is: a mistake costs this flush, and is seen; the thread lives on.
                self.error = f"samples can't be stored: {type(error).__name__}: {error}"
                self.dropped += self._taken - taken
                log.exception("samples")
            for event in waiting:
                event.set()
            if stop:
                return

    def _take(self) -> list[Part]:
        """Empty the queue."""
        batches = [self._batches.popleft() for _ in range(len(self._batches))]
        self._taken += sum(map(len, batches))
        parts, lost = parts_of(batches)
        self.dropped += lost
        try:
            for part in parts if self._watch else ():
                self._watch(part)  # type: ignore[misc]
        except Exception:
            # What is counted wrongly must cost no sample.
            log.exception("health of the tags")
        return parts

    def _write(self, parts: list[Part], scores: list[Score], *, days: bool) -> None:
        """Write one flush; a full disk costs the oldest samples first, and never an exception."""
        problem = ""
        for _ in range(2):
            try:
                if self._closed:
                    self._open()
                self._db.execute("BEGIN IMMEDIATE")
                self._store(parts)
                self._db.executemany(f"INSERT INTO score ({SCORE}) VALUES (?, ?, ?, ?, ?, ?)", scores)
                full = self._keep_bounds(days=days)
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                problem = f"samples can't be stored: {error}; free space on the disk of the state directory"
                log.error("%s", problem)
                self._recover(error)
            except (OSError, LocalError) as error:
                problem = f"samples can't be stored: {error}; check the state directory"
                self._recover(None)
            else:
                self.error = "the disk is nearly full, old samples go early; free space on it" if full else ""
                return
        self.error = problem
        self.dropped += sum(len(part.columns[0]) for part in parts)

    def _recover(self, error: sqlite3.Error | None) -> None:
        """After a failed write: give up the transaction; on a full disk, drop a tenth of what is stored."""
        if self._closed:  # the next write opens it
            return
        code = _code(error)
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if code in _DAMAGED:
                self._db.close()
                self._closed = True
                self._set_aside(f"was damaged ({error})")
                self._open()
                return
            if code == sqlite3.SQLITE_FULL:
                self._trim(self.used() * 9 // 10)
            self._know_tags()
        except (OSError, sqlite3.Error, LocalError) as again:
            log.error("the ring of samples can't be mended yet: %s", again)

    # -- journal and blocks --------------------------------------------------------------------------------------------

    def _store(self, parts: list[Part]) -> None:
        """Store one flush: dense tags and waveforms as blocks, of all others one row of the journal."""
        if self._changed:
            self._changed = False
            for tag in list(self._tags):
                self._number(tag)
        journal: list[tuple[Tags, Columns]] = []
        for refs, each, columns in parts:
            if columns[1].ndim > 1 or each >= DENSE:
                self._add(self._number(refs[0]), [columns])
            else:
                journal.append((np.repeat(np.array([self._number(ref) for ref in refs], np.int64), each), columns))
        while journal:
            count, end = 0, 0
            while end < len(journal) and count + len(journal[end][0]) <= MOST_VALUES:
                count, end = count + len(journal[end][0]), end + 1
            some, journal = journal[:end], journal[end:]
            data = pack(joined([columns for _, columns in some]), np.concatenate([tags for tags, _ in some]))
            self._db.execute("INSERT INTO journal (count, data) VALUES (?, ?)", (count, data))

    def _number(self, tag: str) -> int:
        """The number under which a tag, as its row is written now, is stored; that of an earlier row if it is again."""
        number, known = self._tags.get(tag, (0, ""))
        meaning = self._meanings.get(tag, known)
        if not number or meaning != known:
            (number,) = self._db.execute(
                "INSERT INTO tag (name, meaning, since) VALUES (?, ?, (SELECT coalesce(max(since), 0) + 1 FROM tag))"
                " ON CONFLICT DO UPDATE SET since = excluded.since RETURNING id",
                (tag, meaning),
            ).fetchone()
            self._tags[tag] = number, meaning
        return int(number)

    def _compact(self) -> None:
        """Turn the journal into blocks."""
        parts: list[Block] = []
        for count, data in self._db.execute("SELECT count, data FROM journal ORDER BY id").fetchall():
            try:
                parts.append(unpack(data))
            except LocalError as error:
                self.dropped += count
                log.error("%d samples are lost: %s", count, error)
        if parts:
            tags = np.concatenate([part.tags for part in parts])
            order = np.argsort(tags, kind="stable")
            times, values, quality = joined([part.columns for part in parts])
            for number, columns in by_tag((times[order], values[order], quality[order]), tags[order]):
                self._add(number, [columns])
        self._db.execute("DELETE FROM journal")
        # This takes far more memory than all between two of it.
        del parts
        give_back()

    def _add(self, tag: int, parts: list[Columns]) -> None:
        """Store a tag's samples as one block, together with its newest blocks as far as they are not much larger.

        Sizes at least double from block to block, so a sample is merged again at most log2(_MERGED) times.
        """
        now_ms, newest_ns = int(time.time() * 1000), int(parts[-1][0].max())
        first_ms = now_ms
        total, shape = sum(len(part[0]) for part in parts), parts[0][1].shape[1:]
        width = shape[0] if shape else 0
        query = "SELECT id, stored_ms, count, width, data FROM block WHERE tag = ? ORDER BY id DESC LIMIT 16"
        for number, stored_ms, count, wide, data in self._db.execute(query, (tag,)).fetchall():
            large = count > 2 * total or (total + count) * max(1, width) > _MERGED
            if large or wide != width or abs(now_ms - stored_ms) > _MERGED_MS:
                break
            try:
                parts.insert(0, unpack(data).columns)
            except LocalError as error:
                log.error("%s", error)
                break
            total, first_ms = total + count, min(first_ms, stored_ms)
            self._db.execute("DELETE FROM block WHERE id = ?", (number,))
        times, values, quality = in_order(joined(parts))
        self._db.execute(
            "INSERT INTO block (tag, first_ns, last_ns, newest_ns, stored_ms, count, width, data)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (tag, int(times[0]), int(times[-1]), newest_ns, first_ms, total, width, pack((times, values, quality))),
        )

    # -- bounds --------------------------------------------------------------------------------------------------------

    def _keep_bounds(self, *, days: bool) -> bool:
        """Turn a long journal into blocks and drop what is too much or too old; True if the disk made it go early.

        With `days` any journal becomes blocks, because its rows don't say when they were stored. A block holds what was
        stored within a day from its `stored_ms`, and goes when all of it is too old.
        """
        rows, values = self._db.execute("SELECT count(*), sum(count) FROM journal").fetchone()
        room = self._room()
        bound = min(self.max_bytes, room)
        if rows and (days or rows >= _JOURNAL[0] or values >= _JOURNAL[1] or self.used() > bound):
            self._compact()
        if days:
            before_ms = int(time.time() * 1000) - self.max_days * 86_400_000 - _MERGED_MS
            self._db.execute(f"DELETE FROM block WHERE stored_ms < ? AND {_NOT_NEWEST}", (before_ms,))
        self._db.execute("DELETE FROM score WHERE id <= (SELECT max(id) FROM score) - ?", (_MAX_SCORES,))
        return bool(self._trim(bound)) and room < self.max_bytes

    def used(self) -> int:
        """Bytes of the file that hold something."""
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * size)

    def _room(self) -> int:
        """Bytes that the file may hold if the disk is to keep its reserve; pages that it holds already are its own."""
        pages, size = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        return int(pages * size) + shutil.disk_usage(self._folder).free - _RESERVE

    def _trim(self, most: int) -> int:
        """Drop the oldest blocks until what is left fits; return how many went."""
        gone = 0
        while self.used() > most:
            (count,) = self._db.execute("SELECT count(*) FROM block").fetchone()
            found = self._db.execute(
                f"DELETE FROM block WHERE id IN (SELECT id FROM block WHERE {_NOT_NEWEST} ORDER BY id LIMIT ?)",
                (max(1, count // 50),),
            )
            if not found.rowcount:
                break
            gone += found.rowcount
        return gone


def _code(error: sqlite3.Error | None) -> int:
    """Return SQLite's primary result code; 0 of an error that is Python's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
