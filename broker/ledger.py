"""The ledger: a hash chain of JSON lines, so that nobody rewrites the past of a federation unseen.

An entry is one line, the canonical JSON (keys sorted, no spaces, UTF-8, no NaN) of
`{"body", "hash", "kind", "prev", "seq", "time_ms"}`. `hash` is the SHA-256 (hex) of the canonical JSON of the other
five; `prev` is the hash of the entry before, 64 zeros in the first; `seq` counts from 1; `time_ms` is milliseconds
since 1970 UTC on the writer's clock. A chain shows changes to anybody who kept a later hash. So that nobody but its
writer can make another, its writer signs it now and then: the body of a `checkpoint` entry holds the writer's public
key and its Ed25519 signature (RFC 8032) over `tundish ledger 1 SEQ PREV` of that entry. Against its own writer it
helps to keep a head: `verify` says whether that is still in the chain.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from models.errors import LocalError

GENESIS = "0" * 64
FIRST = 1
CHECKPOINT = "checkpoint"
_KEYS = {"body", "hash", "kind", "prev", "seq", "time_ms"}


class LedgerError(LocalError):
    """The chain breaks at entry `seq`."""

    def __init__(self, seq: int, problem: str) -> None:
        self.seq = seq
        super().__init__(f"ledger entry {seq} {problem}; this and all later entries prove nothing")


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


class Signs(Protocol):
    """Whoever has an Ed25519 key: `broker.messages.Signer`."""

    @property
    def public_key(self) -> bytes:
        """The raw public key, 32 bytes."""

    def sign(self, data: bytes) -> bytes:
        """Return the signature, 64 bytes."""


class Head(NamedTuple):
    """A chain that holds: its entries, the hash of the last, and from when to when they were written (ms).

    `key` (hex, empty without a checkpoint) has signed the first `signed` entries. `noted` is the entry whose hash was
    noted earlier, 0 where none was given.
    """

    entries: int
    hash: str
    first_ms: int
    last_ms: int
    key: str
    signed: int
    noted: int = 0


def checkpoint(prev_hash: str, seq: int, signer: Signs) -> dict[str, str]:
    """Make the body of a checkpoint that follows the entry with `prev_hash`."""
    return {"key": signer.public_key.hex(), "signature": signer.sign(_signed(prev_hash, seq)).hex()}


def append(prev_hash: str, seq: int, time_ms: int, kind: str, body: Mapping[str, Any]) -> Entry:
    """Make the entry that follows the one with `prev_hash`; ValueError if the body is not JSON."""
    digest = hashlib.sha256(_canonical(_content(prev_hash, seq, time_ms, kind, body)).encode()).hexdigest()
    return Entry(seq, time_ms, kind, body, prev_hash, digest)


def verify(lines: Iterable[str], *, key: str = "", head: str = "") -> Head:
    """Check a whole chain from its first entry; LedgerError names the first bad seq.

    Checkpoints must be `key`'s (hex; by default that of the first one). LocalError if `head`, the hash of some entry
    that was noted earlier, is in it no more, or if it isn't signed by a `key` that was named.
    """
    prev, first_ms, last_ms, signed, seq = GENESIS, 0, 0, 0, 0
    wanted, noted = key, 0
    for seq, line in enumerate(lines, FIRST):
        entry = _entry(line, prev, seq)
        if entry.kind == CHECKPOINT:
            wanted = wanted or str(entry.body.get("key"))
            _check_signature(entry.body, wanted, prev, seq)
            signed = seq - 1
        prev = entry.hash
        noted = seq if prev == head else noted
        first_ms, last_ms = first_ms or entry.time_ms, entry.time_ms
    if head not in ("", GENESIS) and not noted:
        raise LocalError(f"no entry has the hash {head} that was noted earlier: some were taken away, or all made anew")
    if key and not signed:
        raise LocalError(f"no entry is signed by {key}: whoever has the file may have written it")
    return Head(seq, prev, first_ms, last_ms, wanted if signed else "", signed, noted)


def bodies(lines: Iterable[str], kind: str) -> Iterator[dict[str, Any]]:
    """Give the bodies of a ledger's entries of a kind, oldest first."""
    for line in lines:
        if f'"kind":"{kind}"' in line and (entry := json.loads(line))["kind"] == kind:
            yield entry["body"]


def _entry(line: str, prev: str, seq: int) -> Entry:
    """Read the line that must follow the entry with hash `prev`."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LedgerError(seq, f"is not JSON ({type(error).__name__})") from error
    if not isinstance(entry, dict) or entry.keys() != _KEYS or not isinstance(entry["body"], dict):
        raise LedgerError(seq, "is no entry")
    if type(entry["time_ms"]) is not int or type(entry["kind"]) is not str:
        raise LedgerError(seq, "is no entry")
    if entry["seq"] != seq:
        raise LedgerError(seq, f"is missing: in its place is entry {entry['seq']!r}"[:80])
    if entry["prev"] != prev:
        raise LedgerError(seq, "does not follow the entry before")
    try:
        expected = append(prev, seq, entry["time_ms"], entry["kind"], entry["body"])
    except (ValueError, RecursionError) as error:
        raise LedgerError(seq, "is not canonical JSON") from error
    # The whole line is compared, so that not even a space or a doubled key can be slipped in.
    if line.rstrip("\n") != expected.line:
        raise LedgerError(seq, "was changed after it was written")
    return expected


def _check_signature(body: Mapping[str, Any], key: str, prev: str, seq: int) -> None:
    named = body.get("key")
    if named != key and isinstance(named, str):
        raise LedgerError(seq, f"is signed by {named[:64]!r}, not by {key}")
    try:
        signature = bytes.fromhex(body["signature"]) if named == key else b""
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, _signed(prev, seq))
    except (KeyError, TypeError, ValueError, InvalidSignature) as error:
        raise LedgerError(seq, "has a signature that does not verify") from error


def _signed(prev: str, seq: int) -> bytes:
    return f"tundish ledger 1 {seq} {prev}".encode()


def _content(prev: str, seq: int, time_ms: int, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    return {"seq": seq, "time_ms": time_ms, "kind": kind, "body": body, "prev": prev}


def _canonical(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
