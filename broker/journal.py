"""The only SQL of the aggregator: what it must know again after a crash.

SQLite in WAL mode with synchronous=FULL and one writer. A commit is what an MQTT acknowledgement and a receipt stand
for. The folder is 0700 and the file 0600, because the aggregator's private key is in it. Times are milliseconds since
1970 UTC; digests are SHA-256.
"""

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from broker import ledger
from broker.messages import Signer
from broker.round import STALEST
from broker.schema import SCHEMA, SCHEMA_VERSION, UPGRADE
from models.errors import LocalError

# Versions whose weights are kept: enough to go back, and to lead on whoever trains on an old one.
_KEPT_VERSIONS = 64
# Task and number, three times: what is counted late comes from the rounds right before, which the index finds.
_COUNTED_IN = f"task = ? AND round BETWEEN ? - {STALEST} AND ? AND counted_in = ?"


class RoundRow(NamedTuple):
    """One round; `state` is `open` or `closed`."""

    round: int
    base: int
    opened_ms: int
    deadline_ms: int
    state: str


class TokenRow(NamedTuple):
    """Of an enrolment token: the path that it is for, until when, and whether it has been used."""

    path: str
    expires_ms: int
    used: bool


class ModelRow(NamedTuple):
    """One model; `weights` is the codec's exact (32 bit) payload, `digest` that of the little-endian float32 values.

    `step` leads here from the version before (`broker.steps`); None where there is no such way.
    """

    version: int
    round: int
    weights: bytes
    digest: bytes
    gateways: int
    samples: int
    created_ms: int
    step: bytes | None = None


class Totals(NamedTuple):
    """What a round counted; `age` is how many rounds late its updates were, the mean by samples."""

    gateways: int
    samples: int
    age: float


class TaskRow(NamedTuple):
    """What does not change with a task's models: `graph` is one zstd frame of the ONNX bytes, `layout` JSON."""

    text: str
    layout: str
    graph: bytes
    graph_size: int
    graph_digest: bytes


def ledger_lines(folder: Path) -> list[str]:
    """The ledger of an aggregator with its state in a folder, which may be running; LocalError if it can't be read."""
    path = folder / "journal.db"
    with (
        _blame_disk(path),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db,
    ):
        return [line for (line,) in db.execute("SELECT line FROM ledger ORDER BY seq")]


class Journal:
    """An open journal. Writes belong inside `with journal.transaction():`; LocalError when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.db"
        self._lock: int | None = None
        with _blame_disk(self.path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            # The other files that SQLite makes take the mode of this one.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self.path.chmod(0o600)
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._prepare()

    def claim(self) -> None:
        """Be the one aggregator of this folder until closed; LocalError when there is another."""
        path = self.path.with_name("lock")
        with _blame_disk(path):
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                problem = "another aggregator runs with this state; stop it, or choose another --state"
                raise LocalError(f"{path}: {problem}") from error

    def close(self) -> None:
        """Close the file; the journal can't be used afterwards."""
        self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside at once, or nothing of it."""
        # The connection commits at the end, or rolls back unless SQLite has done so itself, as on a full disk.
        with _blame_disk(self.path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

    # Keys and roster.

    def signer(self) -> Signer:
        """Return the aggregator's own key; the first call makes it."""
        row = self._one("SELECT private_key FROM keys WHERE name = 'aggregator'")
        if row:
            return Signer.from_bytes(row[0])
        with self.transaction():  # of two who come at once, the first one's stays
            self._do("INSERT OR IGNORE INTO keys VALUES ('aggregator', ?)", Signer.generate().to_bytes())
        return self.signer()

    def roster(self) -> dict[str, bytes]:
        """Gateway path -> raw Ed25519 public key (32 bytes)."""
        return dict(self._rows("SELECT path, public_key FROM roster"))

    def roster_size(self) -> int:
        """Count the gateways that have a key."""
        row = self._one("SELECT count(*) FROM roster")
        return int(row[0]) if row else 0

    def key_of(self, path: str) -> bytes | None:
        """One gateway's raw public key (32 bytes); None when it is not in the roster."""
        row = self._one("SELECT public_key FROM roster WHERE path = ?", path)
        return row[0] if row else None

    def data_version(self) -> int:
        """A number that changes when another process (`enrol`) wrote to the journal."""
        row = self._one("PRAGMA data_version")
        return int(row[0]) if row else 0

    def add_to_roster(self, path: str, public_key: bytes, now_ms: int, how: str) -> None:
        """Remember a gateway's key (`how`: `first-seen` or `enrolled`); an earlier one is replaced."""
        self._do("INSERT OR REPLACE INTO roster VALUES (?, ?, ?, ?)", path, public_key, now_ms, how)

    def remove_from_roster(self, path: str) -> None:
        """Forget a gateway's key and its token: from now on it is a stranger."""
        self._do("DELETE FROM roster WHERE path = ?", path)
        self._do("DELETE FROM tokens WHERE path = ?", path)

    def add_token(self, digest: bytes, path: str, expires_ms: int) -> None:
        """Let the one who knows what has this digest enrol as a path, once; an earlier one of that path is no good."""
        self._do("DELETE FROM tokens WHERE path = ?", path)
        self._do("INSERT INTO tokens VALUES (?, ?, ?, 0)", digest, path, expires_ms)

    def token(self, digest: bytes) -> TokenRow | None:
        """What is known of a token; None if it is none of ours."""
        row = self._one("SELECT path, expires_ms, used FROM tokens WHERE hash = ?", digest)
        return TokenRow(row[0], row[1], bool(row[2])) if row else None

    def spend_token(self, digest: bytes) -> None:
        """Remember that it was used."""
        self._do("UPDATE tokens SET used = 1 WHERE hash = ?", digest)

    # Tasks and models.

    def task(self, task: str) -> TaskRow | None:
        """What is stored of a task, None for a new one."""
        row = self._one("SELECT text, layout, graph, graph_size, graph_digest FROM tasks WHERE task = ?", task)
        return TaskRow(*row) if row else None

    def put_task(self, task: str, row: TaskRow) -> None:
        """Store a task, or its changed text; the strategy's state stays."""
        self._do(
            "INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?, x'', x'') "
            "ON CONFLICT(task) DO UPDATE SET text = excluded.text",
            task,
            *row,
        )

    def strategy_state(self, task: str) -> bytes:
        """What the strategy keeps between rounds; b"" at first."""
        row = self._one("SELECT strategy_state FROM tasks WHERE task = ?", task)
        return row[0] if row else b""

    def residual(self, task: str) -> bytes:
        """What of the aggregator's goal is not published yet, as float32; b"" when nothing waits."""
        row = self._one("SELECT residual FROM tasks WHERE task = ?", task)
        return row[0] if row else b""

    def put_residual(self, task: str, residual: bytes) -> None:
        """Store that; it belongs into the transaction of its version."""
        self._do("UPDATE tasks SET residual = ? WHERE task = ?", residual, task)

    def put_model(self, task: str, row: ModelRow) -> None:
        """Store a version of the weights; what is long past keeps its digest and its numbers alone."""
        self._do("INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", task, *row)
        gone = "UPDATE models SET weights = x'', step = NULL WHERE task = ? AND version = ? AND version > 0"
        self._do(gone, task, row.version - _KEPT_VERSIONS)

    def model(self, task: str, version: int | None = None) -> ModelRow | None:
        """One version, or the newest; None if there is none."""
        columns = f"SELECT {', '.join(ModelRow._fields)} FROM models WHERE task = ?"
        if version is None:
            row = self._one(f"{columns} ORDER BY version DESC LIMIT 1", task)
        else:
            row = self._one(f"{columns} AND version = ?", task, version)
        return ModelRow(*row) if row else None

    def steps(self, task: str, version: int, most: int) -> list[bytes]:
        """Steps that lead to a version, newest first, without a gap; `most` at most."""
        query = "SELECT step FROM models WHERE task = ? AND version <= ? ORDER BY version DESC LIMIT ?"
        found = list[bytes]()
        for (step,) in self._rows(query, task, version, most):
            if step is None:
                break
            found.append(step)
        return found

    # Rounds and updates.

    def open_round(self, task: str, number: int, base: int, opened_ms: int, deadline_ms: int) -> None:
        """Record that a round is open."""
        values = (task, number, base, opened_ms, deadline_ms)
        self._do("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, 'open', NULL, NULL)", *values)

    def extend_round(self, task: str, number: int, deadline_ms: int) -> None:
        """Move an open round's deadline."""
        self._do("UPDATE rounds SET deadline_ms = ? WHERE task = ? AND round = ?", deadline_ms, task, number)

    def close_round(self, task: str, number: int, closed_ms: int, version: int, state: bytes) -> None:
        """Close a round with the version it made and the strategy's state; its updates' payloads are dropped."""
        self._do(
            "UPDATE rounds SET state = 'closed', closed_ms = ?, version = ? WHERE task = ? AND round = ?",
            closed_ms,
            version,
            task,
            number,
        )
        self._do("UPDATE tasks SET strategy_state = ? WHERE task = ?", state, task)
        # Digests stay, so that an update that comes again is known.
        self._do(f"UPDATE updates SET payload = NULL WHERE {_COUNTED_IN}", task, number, number, number)

    def latest_round(self, task: str) -> RoundRow | None:
        """The round with the highest number; None before the first."""
        row = self._one(
            "SELECT round, base, opened_ms, deadline_ms, state FROM rounds WHERE task = ? ORDER BY round DESC LIMIT 1",
            task,
        )
        return RoundRow(*row) if row else None

    def count_update(
        self,
        task: str,
        number: int,
        path: str,
        *,
        digest: bytes,
        samples: int,
        metric: float | None,
        payload: bytes,
        now_ms: int,
        base_loss: float | None = None,
        counted_in: int | None = None,
    ) -> None:
        """Count an update trained for round `number`, in it or in a later one; LocalError if one was before."""
        into = number if counted_in is None else counted_in
        values = (task, number, path, digest, samples, metric, payload, now_ms, base_loss, into)
        self._do("INSERT INTO updates VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *values)

    def counted(self, task: str, number: int) -> dict[str, bytes]:
        """Path -> digest of the counted updates that were trained for a round."""
        return dict(self._rows("SELECT path, digest FROM updates WHERE task = ? AND round = ?", task, number))

    def was_counted(self, task: str, number: int, path: str) -> bool:
        """Say whether an update of this gateway was counted in that round, however long ago."""
        query = "SELECT 1 FROM updates WHERE task = ? AND round = ? AND path = ?"
        return self._one(query, task, number, path) is not None

    def bases(self, task: str, first: int) -> dict[int, int]:
        """Round -> version that it started from, of the rounds from `first` on."""
        return dict(self._rows("SELECT round, base FROM rounds WHERE task = ? AND round >= ?", task, first))

    def older(self, task: str, number: int) -> set[tuple[str, int]]:
        """(path, round) of what a round counted of those before it."""
        query = f"SELECT path, round FROM updates WHERE {_COUNTED_IN} AND round < ?"
        return set(self._rows(query, task, number, number, number, number))

    def totals(self, task: str, number: int) -> Totals:
        """What a round counted."""
        query = (
            "SELECT count(DISTINCT path), total(samples), total(samples * (? - round)) / max(total(samples), 1) "
            f"FROM updates WHERE {_COUNTED_IN}"
        )
        row = self._one(query, number, task, number, number, number)
        return Totals(int(row[0]), int(row[1]), float(row[2])) if row else Totals(0, 0, 0.0)

    def losses(self, task: str, number: int) -> dict[str, tuple[float, int]]:
        """Path -> (base's mean loss on that holdout, samples) of a round's counted updates that report one."""
        query = f"SELECT path, base_loss, samples FROM updates WHERE {_COUNTED_IN} AND base_loss IS NOT NULL"
        rows = self._rows(f"{query} ORDER BY path, round", task, number, number, number)
        return {path: (loss, samples) for path, loss, samples in rows}

    def payloads(self, task: str, number: int) -> Iterator[tuple[bytes, int, int]]:
        """(codec payload, samples, rounds late) of each counted update, ordered by path, one at a time in memory."""
        query = f"SELECT payload, samples, ? - round FROM updates WHERE {_COUNTED_IN} ORDER BY path, round"
        yield from self._rows(query, number, task, number, number, number)

    # The ledger.

    def note(self, now_ms: int, kind: str, body: Mapping[str, Any]) -> None:
        """Append an entry to the ledger."""
        last = self._one("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1")
        seq, prev = (last[0] + 1, last[1]) if last else (ledger.FIRST, ledger.GENESIS)
        entry = ledger.append(prev, seq, now_ms, kind, body)
        self._do("INSERT INTO ledger VALUES (?, ?, ?)", seq, entry.hash, entry.line)

    def checkpoint(self, now_ms: int, signer: ledger.Signs) -> None:
        """Sign the ledger as it stands."""
        last = self._one("SELECT seq, hash FROM ledger ORDER BY seq DESC LIMIT 1")
        if last:
            self.note(now_ms, ledger.CHECKPOINT, ledger.checkpoint(last[1], last[0] + 1, signer))

    def ledger_lines(self) -> Iterator[str]:
        """Every entry from the first, without newlines: what `ledger.verify` takes."""
        for (line,) in self._rows("SELECT line FROM ledger ORDER BY seq"):
            yield line

    def _prepare(self) -> None:
        # First of all: changing the journal mode waits for others too.
        self._db.execute("PRAGMA busy_timeout = 5000")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version == 0:
            self._db.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version in UPGRADE:
            steps = " ".join(UPGRADE[v] for v in range(version, SCHEMA_VERSION))
            self._db.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
        elif version != SCHEMA_VERSION:
            self._db.close()
            raise LocalError(
                f"{self.path} has schema {version}, this program knows {SCHEMA_VERSION}; "
                "install the version that wrote it, or choose another --state"
            )

    def _do(self, query: str, *values: Any) -> None:
        with _blame_disk(self.path):
            self._db.execute(query, values)

    def _rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        with _blame_disk(self.path):
            yield from self._db.execute(query, values)

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        with _blame_disk(self.path):
            row: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
            return row


@contextlib.contextmanager
def _blame_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LocalError(f"{path}: {error}; check the disk, its space and the owner of that folder") from error
