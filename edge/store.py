"""The only SQL of the gateway: the sample ring, and the state that must survive a power cut.

Two files. `samples.db` is a ring: what was read, in columnar zstd blocks, a block per tag and flush; it is bounded in
bytes, and the oldest go first. Its writer is a thread with a queue in memory, so that nobody waits for the disk. It
syncs at checkpoints only (a power cut costs the last seconds of samples, not the file). `state.db` syncs every commit:
keys, models, the outbox, the ledger.
"""

import asyncio
import fcntl
import logging
import shutil
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from broker import ledger
from edge.blocks import columns_of, pack, unpack
from edge.tags import Sample
from edge.window import Columns
from models.errors import LocalError

log = logging.getLogger(__name__)

T = TypeVar("T")

SCHEMA = 1
_FLUSH_S = 1.0
# Samples that may wait for the disk, samples (or waveform values) in one block, scores kept.
_MAX_QUEUED = 2_000_000
_MAX_BLOCK = 65_536
_MAX_SCORES = 500_000
# Room on the disk that samples never take: for the write-ahead logs, the outbox and the models.
_RESERVE = 16 << 20
# The last time that an int64 of nanoseconds can say (2262): a source may stamp a value with the year 9999.
_LAST_NS = 2**63 - 1
_BLOCK = "tag, first_ns, last_ns, count, width, data"
_SCORE = "task, scored_ms, end_ns, score, verdict, version"
_SAMPLES_SCHEMA = """
CREATE TABLE IF NOT EXISTS block (
  id INTEGER PRIMARY KEY, tag TEXT NOT NULL, first_ns INTEGER NOT NULL, last_ns INTEGER NOT NULL,
  count INTEGER NOT NULL, width INTEGER NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS block_tag ON block (tag, last_ns);
CREATE TABLE IF NOT EXISTS score (
  id INTEGER PRIMARY KEY, task TEXT NOT NULL, scored_ms INTEGER NOT NULL, end_ns INTEGER NOT NULL,
  score REAL, verdict TEXT NOT NULL, version INTEGER NOT NULL);
"""
_STATE_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
  digest BLOB PRIMARY KEY, task TEXT NOT NULL, round INTEGER NOT NULL,
  envelope BLOB NOT NULL, since_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (seq INTEGER PRIMARY KEY, line TEXT NOT NULL, hash TEXT NOT NULL);
"""


class Score(NamedTuple):
    """One scored window, as kept: times in ms (gateway's clock) and ns (the source's)."""

    task: str
    scored_ms: int
    end_ns: int
    score: float | None
    verdict: str
    version: int


class Outgoing(NamedTuple):
    """One signed update that waits for its receipt."""

    digest: bytes
    task: str
    round: int
    envelope: bytes


def _open(path: Path, schema: str, synchronous: str) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, SCHEMA):
            raise LocalError(f"{path} has schema {version}, this program knows {SCHEMA}; use the program that wrote it")
        db.executescript(schema)
        db.execute(f"PRAGMA user_version = {SCHEMA}")
    except sqlite3.Error as error:
        raise LocalError(f"{path} can't be opened: {error}") from error
    return db


class State:
    """`state.db`: every commit is on the disk when the call returns, which on a bad day takes seconds.

    So the event loop, where scoring lives, calls the methods directly only before it starts; later they run inside
    `commit`, in a thread of the state's own. `waiting` mirrors the outbox for those who only want to look.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (folder / "lock").open("w")
        self._db = _open(folder / "state.db", _STATE_SCHEMA, "FULL")
        self._thread = ThreadPoolExecutor(1, "state")
        self.waiting: tuple[Outgoing, ...] = tuple(self.outbox())

    def close(self) -> None:
        """Finish what was begun, and release the file."""
        self._thread.shutdown()
        self._db.close()
        self._lock.close()

    def claim(self) -> None:
        """Make this process the folder's only gateway, until it ends; LocalError if another one runs there."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            folder = Path(self._lock.name).parent
            raise LocalError(f"another gateway runs with its state in {folder}; stop it, or give --state") from None

    async def commit(self, work: Callable[[], T]) -> T:
        """Run `work`, which calls the methods below, as one transaction in the state's thread."""

        def run() -> T:
            try:
                with self.transaction():
                    done = work()
            except sqlite3.Error as error:
                raise LocalError(
                    f"state can't be stored: {error}; free space on the disk of the state folder"
                ) from error
            self.waiting = tuple(self.outbox())
            return done

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it, or nothing; transactions do not nest."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._db.in_transaction:  # SQLite may have rolled back by itself
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def get(self, key: str) -> bytes | None:
        """Return a value, None if there is none."""
        row = self._db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, key: str, value: bytes) -> None:
        """Set a value."""
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value))

    def send(self, out: Outgoing) -> None:
        """Put an update into the outbox; only its receipt takes it out again."""
        self._db.execute("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?, ?)", (*out, int(time.time() * 1000)))

    def outbox(self) -> list[Outgoing]:
        """Everything without a receipt, oldest first."""
        rows = self._db.execute("SELECT digest, task, round, envelope FROM outbox ORDER BY since_ms")
        return [Outgoing(bytes(d), t, r, bytes(e)) for d, t, r, e in rows]

    def settle(self, digest: bytes) -> bool:
        """Delete one update from the outbox on its receipt; False if it was not there."""
        return self._db.execute("DELETE FROM outbox WHERE digest = ?", (digest,)).rowcount > 0

    def forget_federation(self) -> None:
        """Drop what a federation gave and what waits for it; key, normalisation, holdout and ledger stay."""
        self._db.execute("DELETE FROM outbox")
        for name in ("manifest", "graph", "weights", "scoring", "residual", "personal", "handled"):
            self._db.execute("DELETE FROM state WHERE key LIKE ? || '/%'", (name,))

    def record(self, kind: str, body: dict[str, object]) -> None:
        """Append to the gateway's hash-chained ledger."""
        last = self._db.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        seq, previous = (last[0] + 1, last[1]) if last else (ledger.FIRST, ledger.GENESIS)
        entry = ledger.append(previous, seq, int(time.time() * 1000), kind, body)
        self._db.execute("INSERT INTO ledger VALUES (?, ?, ?)", (seq, entry.line, entry.hash))

    def ledger(self) -> Iterator[str]:
        """Give the ledger as JSON lines, oldest first."""
        for (line,) in self._db.execute("SELECT line FROM ledger ORDER BY seq"):
            yield line


class Samples:
    """`samples.db`: `append` and `score` return at once; a thread writes, and shows `watch` what it writes, by tag."""

    def __init__(self, folder: Path, max_bytes: int, watch: Callable[[str, Columns], object] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.max_bytes, self._folder, self._watch = max_bytes, folder, watch
        # Samples that could not be kept (disk full, or slower than the plant), and the last error of the disk.
        self.dropped, self.error = 0, ""
        self._batches: deque[list[Sample]] = deque()
        self._scores: deque[Score] = deque()
        self._waiting: deque[threading.Event] = deque()
        # Each counted by one thread alone: samples taken from drivers, and those of them that left the queue.
        self._put, self._taken = 0, 0
        self._stop, self._wake = False, threading.Event()
        self._db = _open(folder / "samples.db", _SAMPLES_SCHEMA, "NORMAL")
        self._thread = threading.Thread(target=self._write_loop, name="samples", daemon=True)
        self._thread.start()

    def append(self, samples: list[Sample]) -> None:
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

    def _write_loop(self) -> None:
        while True:
            self._wake.wait(_FLUSH_S)
            self._wake.clear()
            stop, waiting = self._stop, [self._waiting.popleft() for _ in range(len(self._waiting))]
            by_tag: dict[tuple[str, int], list[Sample]] = {}
            for _ in range(len(self._batches)):
                batch = self._batches.popleft()
                for sample in batch:
                    if not 0 <= sample.time_ns <= _LAST_NS:
                        self.dropped += 1
                        continue
                    width = 0 if isinstance(sample.value, float) else len(sample.value)
                    by_tag.setdefault((sample.tag, width), []).append(sample)
                self._taken += len(batch)
            scores = [self._scores.popleft() for _ in range(len(self._scores))]
            try:
                self._write(by_tag, scores)
            except Exception as error:
                # The one writer there is: a mistake costs this flush, and is seen; the thread lives on.
                self.error = f"samples can't be stored: {type(error).__name__}: {error}"
                self.dropped += sum(map(len, by_tag.values()))
                log.exception("samples")
            for event in waiting:
                event.set()
            if stop:
                return

    def _write(self, by_tag: dict[tuple[str, int], list[Sample]], scores: list[Score]) -> None:
        """Write one flush; a full disk costs the oldest samples first, and never an exception."""
        if not by_tag and not scores:
            return
        rows = self._rows(by_tag)
        for attempt in range(2):
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany(f"INSERT INTO block ({_BLOCK}) VALUES (?, ?, ?, ?, ?, ?)", rows)
                self._db.executemany(f"INSERT INTO score ({_SCORE}) VALUES (?, ?, ?, ?, ?, ?)", scores)
                room = self._room()
                full = self._trim(min(self.max_bytes, room)) and room < self.max_bytes
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self.error = f"samples can't be stored: {error}; free space on the disk of the state directory"
                log.error("%s", self.error)
                self._recover(full=error.sqlite_errorcode == sqlite3.SQLITE_FULL)
                if attempt:
                    self.dropped += sum(map(len, by_tag.values()))
            except OSError as error:
                self.error = f"samples can't be stored: {error}; check the state directory"
                self._recover(full=False)
                if attempt:
                    self.dropped += sum(map(len, by_tag.values()))
            else:
                self.error = "the disk is nearly full, old samples go early; free space on it" if full else ""
                return

    def _rows(self, by_tag: dict[tuple[str, int], list[Sample]]) -> list[tuple[object, ...]]:
        """Pack what is to be written, in blocks of a bounded size."""
        rows: list[tuple[object, ...]] = []
        for (tag, width), samples in by_tag.items():
            most = max(1, _MAX_BLOCK // max(1, width))
            for start in range(0, len(samples), most):
                # Concurrent sources are ordered among themselves only.
                part = sorted(samples[start : start + most], key=lambda s: s.time_ns)
                columns = columns_of(part, width)
                if self._watch:
                    self._watch(tag, columns)
                rows.append((tag, part[0].time_ns, part[-1].time_ns, len(part), width, pack(columns)))
        return rows

    def _recover(self, *, full: bool) -> None:
        """After a failed write: give up the transaction; on a full disk, drop a tenth of what is stored."""
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            if full:
                self._trim(self._used() * 9 // 10)
        except sqlite3.Error as error:
            log.error("the oldest samples can't be dropped either: %s", error)

    def _used(self) -> int:
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
        while self._used() > most:
            (count,) = self._db.execute("SELECT count(*) FROM block").fetchone()
            # The newest block of a tag stays: of one that seldom changes it holds the value of today.
            found = self._db.execute(
                "DELETE FROM block WHERE id IN (SELECT id FROM block"
                " WHERE id NOT IN (SELECT max(id) FROM block GROUP BY tag) ORDER BY id LIMIT ?)",
                (max(1, count // 50),),
            )
            if not found.rowcount:
                break
            gone += found.rowcount
        self._db.execute("DELETE FROM score WHERE id <= (SELECT max(id) FROM score) - ?", (_MAX_SCORES,))
        return gone


class SampleReader:
    """Read `samples.db` from any process, while it is being written."""

    def __init__(self, folder: Path) -> None:
        self._db = sqlite3.connect(f"file:{folder / 'samples.db'}?mode=ro", uri=True, timeout=10)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def newest_ns(self, tags: Sequence[str]) -> int:
        """Source time of the block of any of the tags that was stored last; 0 without one.

        The last by arrival, not the largest time: one stamp of a wrong clock must not hide what came before it.
        """
        marks = ", ".join("?" * len(tags))
        query = f"SELECT last_ns FROM block WHERE tag IN ({marks}) ORDER BY id DESC LIMIT 1"
        row = self._db.execute(query, tuple(tags)).fetchone()
        return int(row[0]) if row else 0

    def columns(self, tag: str, since_ns: int = 0, most: int = 5_000_000) -> Columns | None:
        """Stored samples of one tag from `since_ns` on, by source time; None if there are none.

        Of more than `most` samples the newest blocks are taken. The block of the last sample before `since_ns` comes
        along, because that value holds then. A waveform tag's Bad notices have no values, and are left out.
        """
        rows, total = [], 0
        (first,) = self._db.execute(
            "SELECT max(last_ns) FROM block WHERE tag = ? AND last_ns < ?", (tag, since_ns)
        ).fetchone()
        for row in self._db.execute(
            "SELECT data, count, width FROM block WHERE tag = ? AND last_ns >= ? ORDER BY id DESC",
            (tag, since_ns if first is None else first),
        ):
            rows.append(row)
            total += row[1]
            if total >= most:
                break
        width = max((row[2] for row in rows), default=0)
        parts = [unpack(data, count, w) for data, count, w in reversed(rows) if w == width]
        if not parts:
            return None
        times, values, quality = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(times, kind="stable")
        return times[order], values[order], quality[order]

    def scores(self, task: str | None = None) -> list[Score]:
        """Kept scores, oldest first."""
        where, args = ("WHERE task = ?", (task,)) if task else ("", ())
        return [Score(*row) for row in self._db.execute(f"SELECT {_SCORE} FROM score {where} ORDER BY id", args)]
