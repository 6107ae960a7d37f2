"""The aggregator's file as such: how it is opened, owned, and written, all or nothing. What is in it: `journal`."""

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from broker.schema import SCHEMA, SCHEMA_VERSION, UPGRADE
from models.errors import LocalError

LOCK_FILE = "lock"
_TRIES, _PAUSE_S = 5, 0.02


class Database:
    """An open `journal.db`. Writes belong inside `with journal.transaction():`; LocalError when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.db"
        self._lock: int | None = None
        with blame_disk(self.path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
            # The other files that SQLite makes take the mode of this one. Only a new file is opened here: to close one
            # takes all of this process's locks on it away (POSIX), and then another process ends SQLite's log under us.
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            self.path.chmod(0o600)
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._prepare()
            self._inode = self.path.stat().st_ino

    def claim(self) -> None:
        """Be the one aggregator of this folder until closed; LocalError when there is another."""
        path = self.path.with_name(LOCK_FILE)
        with blame_disk(path):
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            for _ in range(_TRIES):  # `tundish broker status` holds it for a moment, to see whether anybody does
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._check_there(path)
                    return
                time.sleep(_PAUSE_S)
        raise LocalError(f"{path}: another aggregator runs with this state; stop it, or choose another --state")

    def _check_there(self, lock: Path) -> None:
        """LocalError where a first start that was refused has deleted these files meanwhile: they are nobody's."""
        open_ = (os.fstat(self._lock).st_ino if self._lock is not None else 0, self._inode)
        if not (lock.exists() and self.path.exists()) or open_ != (lock.stat().st_ino, self.path.stat().st_ino):
            raise LocalError(f"{self.path}: was deleted by another start that was refused; start again")

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
        with blame_disk(self.path), self._db:
            self._db.execute("BEGIN IMMEDIATE")
            yield

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

    def _do(self, query: str, *values: Any) -> int:
        """Execute, and return how many rows changed."""
        with blame_disk(self.path):
            return self._db.execute(query, values).rowcount

    def _rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        with blame_disk(self.path):
            yield from self._db.execute(query, values)

    def _one(self, query: str, *values: Any) -> tuple[Any, ...] | None:
        with blame_disk(self.path):
            row: tuple[Any, ...] | None = self._db.execute(query, values).fetchone()
            return row


def is_there(file: Path) -> bool:
    """Whether a state folder has a file; LocalError where this user may not look."""
    try:
        return file.is_file()
    except PermissionError as error:
        raise forbidden(file.parent, error) from error


def forbidden(folder: Path, error: PermissionError) -> LocalError:
    """Say of a state folder that this user may not read it."""
    return LocalError(f"{folder}: {error.strerror}; run this as the user who owns that folder")


def ledger_lines(folder: Path) -> list[str]:
    """The ledger of an aggregator with its state in a folder, which may be running; LocalError if it can't be read."""
    path = folder / "journal.db"
    with (
        blame_disk(path),
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as db,
    ):
        return [line for (line,) in db.execute("SELECT line FROM ledger ORDER BY seq")]


@contextlib.contextmanager
def blame_disk(path: Path) -> Iterator[None]:
    """Turn what the disk or SQLite refuses into LocalError."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise LocalError(f"{path}: {error}; check the disk, its space and the owner of that folder") from error
