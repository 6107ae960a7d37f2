"""`state.db`: what must survive a power cut. Every commit syncs: keys, models, the outbox, the ledger.

The ring of samples is `edge.ring`; the two share how a file is opened, and nothing else.
"""

import asyncio
import fcntl
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from broker import ledger
from models.errors import LocalError

T = TypeVar("T")

# Keys of the state that a federation gave, each followed by the task's name.
_FEDERATIONS = (
    "manifest", "terms", "graph", "weights", "scoring", "residual", "personal", "average", "handled", "answered",
    "vote", "release-root", "released", "released-key", "released-manifest", "released-terms", "released-graph",
    "charter", "roster",
)  # fmt: skip
# Of each file; 2,000 as it comes. What is written once and read by another process gains nothing from more.
_CACHE_KIB = 256

_PINNED, _ANSWERED = "federation", "answered/receipt"
_KEY_BYTES = 32
_TRIES, _PAUSE_S = 5, 0.02

SCHEMA = 1
_STATE_SCHEMA = """
CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS outbox (
  digest BLOB PRIMARY KEY, task TEXT NOT NULL, round INTEGER NOT NULL,
  envelope BLOB NOT NULL, since_ms INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS ledger (seq INTEGER PRIMARY KEY, line TEXT NOT NULL, hash TEXT NOT NULL);
"""


class Outgoing(NamedTuple):
    """One signed update that waits for its receipt."""

    digest: bytes
    task: str
    round: int
    envelope: bytes


class SchemaError(LocalError):
    """The file has another version, `found`."""

    def __init__(self, path: Path, found: int, known: int) -> None:
        super().__init__(f"{path} has schema {found}, this program knows {known}; use the program that wrote it")
        self.found = found


def open_database(path: Path, schema: str, version: int, synchronous: str) -> sqlite3.Connection:
    """Open a file in WAL mode, make its tables; SchemaError if it has another version, sqlite3.Error for the rest."""
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    try:
        path.chmod(0o600)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        if found in (0, version):
            db.executescript(schema)
            db.execute(f"PRAGMA user_version = {version}")
            return db
    except BaseException:
        db.close()
        raise
    db.close()
    raise SchemaError(path, found, version)


def ledger_lines(folder: Path) -> list[str]:
    """The ledger of a gateway with its state in a folder, which may be running; LocalError if it can't be read."""
    path = folder / "state.db"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            return [line for (line,) in db.execute("SELECT line FROM ledger ORDER BY seq")]
    except sqlite3.Error as error:
        raise LocalError(f"{path} can't be read: {error}") from error


class State:
    """`state.db`: every commit is on the disk when the call returns, which on a bad day takes seconds.

    So the event loop, where scoring lives, calls the methods directly only before it starts; later they run inside
    `commit`, in a thread of the state's own. For those who only want to look, `waiting` mirrors the outbox, and
    `answered` says whether the pinned federation has ever answered for an update.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (folder / "lock").open("w")
        except OSError as error:
            remedy = "name a --state that this user may write, or mend its owner"
            raise LocalError(f"{folder} can't be written: {error.strerror}; {remedy}") from error
        path = folder / "state.db"
        try:
            self._db = open_database(path, _STATE_SCHEMA, SCHEMA, "FULL")
        except sqlite3.Error as error:
            raise LocalError(f"{path} can't be opened: {error}") from error
        self._thread = ThreadPoolExecutor(1, "state")
        self._mirror()

    def _mirror(self) -> None:
        self.waiting = tuple(self.outbox())
        self.answered = self.get(_ANSWERED) is not None

    def close(self) -> None:
        """Finish what was begun, and release the file."""
        self._thread.shutdown()
        self._db.close()
        self._lock.close()

    def claim(self) -> None:
        """Make this process the folder's only gateway, until it ends; LocalError if another one runs there."""
        for _ in range(_TRIES):  # `tundish edge status` holds it for a moment, to see whether anybody does
            with suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(_PAUSE_S)
        folder = Path(self._lock.name).parent
        raise LocalError(f"a gateway runs with its state in {folder}; stop it first, or give another --state")

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
        self._mirror()

    def get(self, key: str) -> bytes | None:
        """Return a value, None if there is none."""
        row = self._db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def put(self, key: str, value: bytes) -> None:
        """Set a value."""
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, value))

    def next_session(self) -> int:
        """A number that grows with every start (milliseconds since 1970), even if the clock was set back."""
        last = int.from_bytes(self.get("session") or b"", "big")
        session = max(int(time.time() * 1000), last + 1)
        self.put("session", session.to_bytes(8, "big"))
        return session

    def send(self, out: Outgoing) -> None:
        """Put an update into the outbox; only its receipt takes it out again."""
        self._db.execute("INSERT OR REPLACE INTO outbox VALUES (?, ?, ?, ?, ?)", (*out, int(time.time() * 1000)))

    def outbox(self) -> list[Outgoing]:
        """Everything without a receipt, oldest first."""
        rows = self._db.execute("SELECT digest, task, round, envelope FROM outbox ORDER BY since_ms")
        return [Outgoing(bytes(d), t, r, bytes(e)) for d, t, r, e in rows]

    def settle(self, digest: bytes) -> bool:
        """Delete one update from the outbox on its receipt; False if it was not there."""
        if not self._db.execute("DELETE FROM outbox WHERE digest = ?", (digest,)).rowcount:
            return False
        self.put(_ANSWERED, b"1")
        return True

    def pinned(self) -> tuple[str, bytes] | None:
        """The federation that this gateway trusts: its name and its Ed25519 key (32 bytes); None before a first."""
        data = self.get(_PINNED)
        return None if data is None else (data[_KEY_BYTES:].decode(), data[:_KEY_BYTES])

    def pin(self, name: str, key: bytes, how: str) -> None:
        """Trust a federation from now on, with a line in the ledger; what one with another key gave is forgotten."""
        before = self.pinned()
        if before is not None and before[1] != key:
            self._forget_federation()
        self.put(_PINNED, key + name.encode())
        self.record("federation-pinned", {"federation": name, "key": key.hex(), "how": how})

    def _forget_federation(self) -> None:
        """Drop what a federation gave and what waits for it; key, normalisation, holdout and ledger stay."""
        self._db.execute("DELETE FROM outbox")
        for name in _FEDERATIONS:
            self._db.execute("DELETE FROM state WHERE key LIKE ? || '/%'", (name,))

    def record(self, kind: str, body: dict[str, object]) -> None:
        """Append to the gateway's hash-chained ledger."""
        last = self._db.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        seq, previous = (last[0] + 1, last[1]) if last else (ledger.FIRST, ledger.GENESIS)
        entry = ledger.append(previous, seq, int(time.time() * 1000), kind, body)
        self._db.execute("INSERT INTO ledger VALUES (?, ?, ?)", (seq, entry.line, entry.hash))

    def checkpoint(self, signer: ledger.Signs) -> None:
        """Sign the ledger as it stands."""
        last = self._db.execute("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1").fetchone()
        if last:
            self.record(ledger.CHECKPOINT, {**ledger.checkpoint(last[1], last[0] + 1, signer)})

    def ledger(self) -> Iterator[str]:
        """Give the ledger as JSON lines, oldest first."""
        for (line,) in self._db.execute("SELECT line FROM ledger ORDER BY seq"):
            yield line
