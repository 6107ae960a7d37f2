"""The ledger: a hash chain of JSON lines, so that nobody rewrites the past of a federation unseen.

An entry is one line, the canonical JSON (keys sorted, no spaces, UTF-8, no NaN) of
`{"body", "hash", "kind", "prev", "seq", "time_ms"}`. `hash` is the SHA-256 (hex) of the canonical JSON of the other
five; `prev` is the hash of the entry before, 64 zeros in the first; `seq` counts from 1; `time_ms` is milliseconds
since 1970 UTC on the writer's clock. A chain shows changes to anybody who kept a later hash; it does not stop its
owner from writing a whole new one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import LocalError

GENESIS = "0" * 64
FIRST = 1
_KEYS = {"body", "hash", "kind", "prev", "seq", "time_ms"}


class LedgerError(LocalError):
    """The chain breaks at entry `seq`."""

    def __init__(self, seq: int, problem: str) -> None:
        self.seq = seq
        super().__init__(f"ledger entry {seq}: {problem}; this and all later entries prove nothing")


@dataclass(frozen=True)
class Entry:
    """One entry; `line` is its canonical JSON, without a newline."""

    seq: int
    time_ms: int
    kind: str
    body: Mapping[str, Any]
    prev: str
    hash: str

    @property
    def line(self) -> str:
        """What is stored and verified."""
        return _canonical({**_content(self.prev, self.seq, self.time_ms, self.kind, self.body), "hash": self.hash})


def append(prev_hash: str, seq: int, time_ms: int, kind: str, body: Mapping[str, Any]) -> Entry:
    """Make the entry that follows the one with `prev_hash`; ValueError if the body is not JSON."""
    digest = hashlib.sha256(_canonical(_content(prev_hash, seq, time_ms, kind, body)).encode()).hexdigest()
    return Entry(seq, time_ms, kind, body, prev_hash, digest)


def verify(lines: Iterable[str]) -> None:
    """Check a whole chain from its first entry; LedgerError names the first bad seq."""
    prev = GENESIS
    for seq, line in enumerate(lines, FIRST):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LedgerError(seq, f"not JSON ({type(error).__name__})") from error
        if not isinstance(entry, dict) or entry.keys() != _KEYS or not isinstance(entry["body"], dict):
            raise LedgerError(seq, "not an entry")
        if entry["seq"] != seq:
            raise LedgerError(seq, f"numbered {entry['seq']!r}"[:80])
        if entry["prev"] != prev:
            raise LedgerError(seq, "does not follow the entry before")
        try:
            expected = append(prev, seq, entry["time_ms"], entry["kind"], entry["body"])
        except (ValueError, RecursionError) as error:
            raise LedgerError(seq, "not canonical JSON") from error
        # The whole line is compared, so that not even a space or a doubled key can be slipped in.
        if line.rstrip("\n") != expected.line:
            raise LedgerError(seq, "changed after it was written")
        prev = expected.hash


def _content(prev: str, seq: int, time_ms: int, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"seq": seq, "time_ms": time_ms, "kind": kind, "body": body, "prev": prev}


def _canonical(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
