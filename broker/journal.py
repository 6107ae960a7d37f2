"""The only SQL of the aggregator, with `members`: what it must know again after a crash.

SQLite in WAL mode with synchronous=FULL and one writer. A commit is what an MQTT acknowledgement and a receipt stand
for. The folder is 0700 and the file 0600, because the aggregator's private key is in it. Times are milliseconds since
1970 UTC; digests are SHA-256.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from broker import ledger
from broker.registry import Registry
from broker.round import STALEST

# Versions whose weights are kept: enough to go back, and to lead on whoever trains on an old one.
_KEPT_VERSIONS = 64
# Task and number, three times: what is counted late comes from the rounds right before, which the index finds.
_COUNTED_IN = f"task = ? AND round BETWEEN ? - {STALEST} AND ? AND counted_in = ?"


class RoundRow(NamedTuple):
    """One round; `state` is `open` or `closed`, `roster_ms` the time of the roster that held when it was opened."""

    round: int
    base: int
    opened_ms: int
    deadline_ms: int
    state: str
    roster_ms: int


class ModelRow(NamedTuple):
    """One model; `weights` is the codec's exact (32 bit) payload, `digest` that of the little-endian float32 values.

    `step` leads here from the version before (`broker.steps`); None where there is no such way. `signed_ms` is the time
    that its manifest is signed under: the newest has the latest, whatever the clock says.
    """

    version: int
    round: int
    weights: bytes
    digest: bytes
    gateways: int
    samples: int
    created_ms: int
    step: bytes | None = None
    signed_ms: int = 0


class ReleaseRow(NamedTuple):
    """One release of a task: its number, `stable` or `canary`, and the version that it is."""

    release: int
    channel: str
    version: int


class BallotRow(NamedTuple):
    """The vote on a version: the one `before` it, until when it lasts, and what the strategy had kept until then.

    `kept` is None while it lasts, then 0 or 1.
    """

    version: int
    before: int
    until_ms: int
    strategy_state: bytes
    residual: bytes
    kept: int | None = None


class Revocation(NamedTuple):
    """When a gateway was taken out, and the raw key (32 bytes) that it had."""

    since_ms: int
    key: bytes


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


class Journal(Registry):
    """An open journal: `transaction` and the rest of `Database`, keys and roster of `Registry`, and what is kept."""

    # Tasks and models.

    def task(self, task: str) -> TaskRow | None:
        """What is stored of a task, None for a new one."""
        row = self._one("SELECT text, layout, graph, graph_size, graph_digest FROM tasks WHERE task = ?", task)
        return TaskRow(*row) if row else None

    def has_looked(self) -> bool:
        """Whether an aggregator with this journal has seen that nobody else has its federation."""
        return self._one("SELECT 1 FROM looked") is not None

    def put_looked(self, now_ms: int) -> None:
        """Remember that."""
        self._do("INSERT INTO looked VALUES (?)", now_ms)

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

    def put_strategy_state(self, task: str, state: bytes) -> None:
        """Store that."""
        self._do("UPDATE tasks SET strategy_state = ? WHERE task = ?", state, task)

    def residual(self, task: str) -> bytes:
        """What of the aggregator's goal is not published yet, as float32; b"" when nothing waits."""
        row = self._one("SELECT residual FROM tasks WHERE task = ?", task)
        return row[0] if row else b""

    def put_residual(self, task: str, residual: bytes) -> None:
        """Store that; it belongs into the transaction of its version."""
        self._do("UPDATE tasks SET residual = ? WHERE task = ?", residual, task)

    def put_model(self, task: str, row: ModelRow) -> None:
        """Store a version of the weights; what is long past, and was never released, keeps digest and numbers alone."""
        self._do("INSERT INTO models VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", task, *row)
        gone = (
            "UPDATE models SET weights = x'', step = NULL WHERE task = ? AND version = ? AND version > 0 "
            "AND NOT EXISTS (SELECT 1 FROM releases AS r WHERE r.task = models.task AND r.version = models.version)"
        )
        self._do(gone, task, row.version - _KEPT_VERSIONS)

    def sign_model(self, task: str, version: int, signed_ms: int) -> None:
        """Let a version's manifest be signed under another time."""
        self._do("UPDATE models SET signed_ms = ? WHERE task = ? AND version = ?", signed_ms, task, version)

    def model(self, task: str, version: int | None = None) -> ModelRow | None:
        """One version, or the newest; None if there is none."""
        columns = f"SELECT {', '.join(ModelRow._fields)} FROM models WHERE task = ?"
        if version is None:
            row = self._one(f"{columns} ORDER BY version DESC LIMIT 1", task)
        else:
            row = self._one(f"{columns} AND version = ?", task, version)
        return ModelRow(*row) if row else None

    def digest_of(self, task: str, version: int) -> bytes | None:
        """The digest of a version's weights; None if there is none."""
        row = self._one("SELECT digest FROM models WHERE task = ? AND version = ?", task, version)
        return row[0] if row else None

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

    def open_round(
        self, task: str, number: int, base: int, opened_ms: int, deadline_ms: int, roster_ms: int = 0
    ) -> None:
        """Record that a round is open, under the roster of that time."""
        values = (task, number, base, opened_ms, deadline_ms, roster_ms)
        self._do("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, 'open', NULL, NULL, ?)", *values)

    def extend_round(self, task: str, number: int, opened_ms: int, deadline_ms: int) -> None:
        """Move an open round's deadline; one that is opened again has another opening, too."""
        values = (opened_ms, deadline_ms, task, number)
        self._do("UPDATE rounds SET opened_ms = ?, deadline_ms = ? WHERE task = ? AND round = ?", *values)

    def close_round(self, task: str, number: int, closed_ms: int, version: int, state: bytes) -> None:
        """Close a round with the version it made and the strategy's state; its updates' payloads are dropped."""
        self._do(
            "UPDATE rounds SET state = 'closed', closed_ms = ?, version = ? WHERE task = ? AND round = ?",
            closed_ms,
            version,
            task,
            number,
        )
        self.put_strategy_state(task, state)
        # Digests stay, so that an update that comes again is known.
        self._do(f"UPDATE updates SET payload = NULL WHERE {_COUNTED_IN}", task, number, number, number)

    def latest_round(self, task: str) -> RoundRow | None:
        """The round with the highest number; None before the first."""
        row = self._one(
            f"SELECT {', '.join(RoundRow._fields)} FROM rounds WHERE task = ? ORDER BY round DESC LIMIT 1", task
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

    def put_receipt(self, topic: str, digest: bytes, envelope: bytes, *, copy: bool) -> None:
        """Keep the last receipt of an update that came by file; of a `copy` of one that was counted, the first."""
        self._do(f"INSERT OR {'IGNORE' if copy else 'REPLACE'} INTO receipts VALUES (?, ?, ?)", topic, digest, envelope)

    def receipts(self, path: str) -> list[tuple[str, bytes]]:
        """(topic, envelope) of the receipts that are kept for a gateway."""
        end = f"/receipt/{path}"
        return list(self._rows("SELECT topic, envelope FROM receipts WHERE substr(topic, ?) = ?", -len(end), end))

    # Votes on models.

    def open_ballot(self, task: str, row: BallotRow) -> None:
        """Let a version be voted on."""
        self._do("INSERT INTO ballots VALUES (?, ?, ?, ?, ?, ?, ?)", task, *row)

    def ballot(self, task: str) -> BallotRow | None:
        """The vote on the newest version that was voted on; None if none ever was."""
        columns = ", ".join(BallotRow._fields)
        row = self._one(f"SELECT {columns} FROM ballots WHERE task = ? ORDER BY version DESC LIMIT 1", task)
        return BallotRow(*row) if row else None

    def close_ballot(self, task: str, version: int, *, kept: bool) -> None:
        """End a vote; what it would have taken to go back is dropped."""
        query = "UPDATE ballots SET kept = ?, strategy_state = x'', residual = x'' WHERE task = ? AND version = ?"
        self._do(query, int(kept), task, version)

    def put_vote(self, task: str, version: int, path: str, *, against: bool) -> bool:
        """Keep a gateway's vote; False if it has voted on that version before, whose word stays."""
        if self._one("SELECT 1 FROM votes WHERE task = ? AND version = ? AND path = ?", task, version, path):
            return False
        self._do("INSERT INTO votes VALUES (?, ?, ?, ?)", task, version, path, int(against))
        return True

    def votes(self, task: str, version: int) -> dict[str, bool]:
        """Path -> whether it voted against a version."""
        rows = self._rows("SELECT path, against FROM votes WHERE task = ? AND version = ?", task, version)
        return {path: bool(against) for path, against in rows}

    def tally(self, task: str) -> dict[str, Any]:
        """How many rounds were closed and how many of their models voted down, the last of them by whom; plain JSON."""
        closed = self._one("SELECT count(*) FROM rounds WHERE task = ? AND state = 'closed'", task)
        down = self._one("SELECT count(*), max(version) FROM ballots WHERE task = ? AND kept = 0", task)
        count, version = down or (0, None)
        last = None
        if version is not None:
            votes = self.votes(task, version)
            last = {"version": version, "against": sum(votes.values()), "votes": len(votes)}
        return {"closed": closed[0] if closed else 0, "voted_down": count, "last_voted_down": last}

    # Releases.

    def metadata(self) -> dict[str, bytes]:
        """Name -> file, of what `broker.release` has signed."""
        return dict(self._rows("SELECT name, data FROM metadata"))

    def put_metadata(self, name: str, data: bytes) -> None:
        """Store a file, in place of an older one of that name."""
        self._do("INSERT OR REPLACE INTO metadata VALUES (?, ?)", name, data)

    def releases(self, task: str) -> list[ReleaseRow]:
        """What was released of a task, newest first."""
        rows = self._rows("SELECT release, channel, version FROM releases WHERE task = ? ORDER BY release DESC", task)
        return [ReleaseRow(*row) for row in rows]

    def add_release(self, task: str, row: ReleaseRow) -> None:
        """Keep a release."""
        self._do("INSERT INTO releases VALUES (?, ?, ?, ?)", task, *row)

    def released_bytes(self, task: str) -> dict[int, int]:
        """Version -> bytes of its weights, of all that ever were released."""
        query = "SELECT version, length(weights) FROM models WHERE task = ? AND version IN "
        return dict(self._rows(f"{query} (SELECT version FROM releases WHERE task = ?)", task, task))

    def releasable(self, task: str) -> list[int]:
        """Versions that may be released, newest first: learnt, still there, and not voted down or being voted on."""
        query = (
            "SELECT version FROM models WHERE task = ? AND version > 0 AND length(weights) > 0 AND version NOT IN "
            "(SELECT version FROM ballots WHERE task = ? AND kept IS NOT 1) ORDER BY version DESC"
        )
        return [version for (version,) in self._rows(query, task, task)]

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

    def revocations(self, after: int = 0) -> tuple[dict[str, Revocation], int]:
        """Path -> the newest revocation of each gateway that was revoked since entry `after`; and the last entry."""
        row = self._one("SELECT max(seq) FROM ledger")
        last = (row and row[0]) or 0
        query = """SELECT line FROM ledger WHERE seq > ? AND seq <= ? AND line LIKE '%"kind":"revoked"%' ORDER BY seq"""
        entries = (json.loads(line) for (line,) in self._rows(query, after, last))
        found = {
            one["body"]["path"]: Revocation(one["time_ms"], bytes.fromhex(one["body"]["key"]))
            for one in entries
            if one["kind"] == "revoked"
        }
        return found, last

    def ledger_lines(self) -> Iterator[str]:
        """Every entry from the first, without newlines: what `ledger.verify` takes."""
        for (line,) in self._rows("SELECT line FROM ledger ORDER BY seq"):
            yield line
