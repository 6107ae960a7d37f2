"""The roster, as the aggregator signs it and every gateway checks it: who is in, by enterprise, with which keys.

A gateway stands in it by the first level of its path alone: where a competitor's machines are is not others' to know.
It goes in parts, since 10,000 gateways do not fit into one message; each names the whole by its time and its digest.
"""

import hashlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import cbor2
import msgspec

from broker.ledger import bodies
from broker.messages import VERSION, Digest, Message, Millis, PublicKey
from models.errors import PeerError

if TYPE_CHECKING:
    from broker.downlink import Downlink
    from broker.journal import Journal

log = logging.getLogger(__name__)

ROSTER = "roster"  # kind of ledger entries
MAX_GATEWAYS = 10_000
# An entry has 140 bytes at most, so a part stays below MAX_PAYLOAD.
PER_PART = 1500
# From one roster to the next, where nothing but gateways' first X25519 keys is new; and where keys took the place of
# others, which no gateway needs that keeps its state: each roster is a line in every ledger, for ever.
_FIRST_KEYS_MS, _OTHER_KEYS_MS = 10_000, 3_600_000
MOST_PARTS = -(-MAX_GATEWAYS // PER_PART)


class Member(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A gateway: its enterprise, its Ed25519 key, and its X25519 key (None until it has named one)."""

    enterprise: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,64}$")]
    public_key: PublicKey
    agreement_key: PublicKey | None


class RosterPart(Message, frozen=True, tag="roster"):
    """Retained: members number `PER_PART * part` and on, `part` being that of its topic, of a roster in `parts` parts.

    `time_ms` grows with each roster, and `digest` (`digest_of`) is that of all members.
    """

    time_ms: Millis
    digest: Digest
    parts: Annotated[int, msgspec.Meta(ge=1, le=MOST_PARTS)]
    members: Annotated[tuple[Member, ...], msgspec.Meta(max_length=PER_PART)]


class Roster(msgspec.Struct, frozen=True):
    """A whole roster."""

    time_ms: int
    digest: bytes
    members: tuple[Member, ...]

    @property
    def gateways(self) -> int:
        """How many gateways are in; two with the same key are one."""
        return len({member.public_key for member in self.members})

    @property
    def enterprises(self) -> int:
        """Of how many enterprises they are."""
        return len({member.enterprise for member in self.members})

    def has(self, enterprise: str, public_key: bytes) -> bool:
        """Whether a gateway of that enterprise is in with that Ed25519 key."""
        return any((one.enterprise, one.public_key) == (enterprise, public_key) for one in self.members)


def digest_of(members: Sequence[Member]) -> bytes:
    """SHA-256 of the CBOR array of all members, each `[enterprise, Ed25519 key, X25519 key or null]`."""
    return hashlib.sha256(cbor2.dumps(msgspec.to_builtins(members, builtin_types=(bytes,)))).digest()


def members_of(journal: "Journal") -> tuple[Member, ...]:
    """The members by enterprise and key, an order that tells nothing of where a gateway stands."""
    found = {(path.partition("/")[0], key, agreement or b"") for path, key, agreement in journal.members()}
    return tuple(Member(enterprise, key, agreement or None) for enterprise, key, agreement in sorted(found))


def _who(members: Sequence[Member]) -> list[tuple[str, bytes]]:
    return [(one.enterprise, one.public_key) for one in members]


def _wait_ms(before: Sequence[Member], members: Sequence[Member]) -> int:
    """How long after a roster another one may follow, milliseconds: who comes or goes is told at once."""
    if _who(before) != _who(members):
        return 0
    named = [[one.agreement_key is not None for one in some] for some in (before, members)]
    return _FIRST_KEYS_MS if named[0] != named[1] else _OTHER_KEYS_MS


class Collector:
    """Puts the parts of a roster together, of the newest alone: at most `MOST_PARTS` messages are kept."""

    def __init__(self, newest_ms: int = -1) -> None:
        """`newest_ms` is the time of the roster that is held already."""
        self._whole_ms = newest_ms
        self._head: tuple[int, bytes, int] = (newest_ms, b"", 0)
        self._parts: dict[int, tuple[Member, ...]] = {}

    def take(self, part: int, said: RosterPart) -> Roster | None:
        """Take a verified part; the whole once all are there. What is not newer is passed over; PeerError `roster`."""
        head = said.time_ms, said.digest, said.parts
        if part >= said.parts or (part + 1 < said.parts and len(said.members) != PER_PART):
            raise PeerError("roster", f"part {part} of {said.parts} with {len(said.members)} members")
        if said.time_ms > self._head[0]:
            self._head, self._parts = head, {}
        if head != self._head or said.time_ms <= self._whole_ms:
            return None
        self._parts[part] = said.members
        if len(self._parts) < said.parts:
            return None
        members = tuple(one for i in range(said.parts) for one in self._parts[i])
        self._parts = {}
        if digest_of(members) != said.digest:
            raise PeerError("roster", "its members are not those of its digest")
        self._whole_ms = said.time_ms
        return Roster(said.time_ms, said.digest, members)


class Rosters:
    """The aggregator's part: publishes the roster, and notes in the ledger which one held from when on.

    Each start says it under a later time: of a journal that was restored, gateways know a newer one. `time_ms` is that
    of the newest one.
    """

    def __init__(self, journal: "Journal", downlink: "Downlink") -> None:
        """Take up what the ledger says."""
        self._journal, self._downlink = journal, downlink
        last = list(bodies(journal.ledger_lines(), ROSTER))
        self.time_ms: int = last[-1]["time_ms"] if last else -1
        self._said_ms = self._due_ms = 0
        self._seen: tuple[int, int] | None = None
        self._said: Roster | None = None

    def refresh(self, now_ms: int) -> None:
        """Note and put the roster where it is another one than before; inside of a transaction."""
        waits = self._said_ms <= now_ms < self._due_ms  # not where the clock was set back
        if self._seen == (seen := self._journal.roster_version()) and (waits or not self._due_ms):
            return
        self._seen, self._due_ms = seen, 0
        members, before = members_of(self._journal), self._said
        if before:
            if before.members == members:
                return
            due_ms = self._said_ms + _wait_ms(before.members, members)
            if self._said_ms <= now_ms < due_ms:
                self._due_ms = due_ms
                return
        self._said_ms = now_ms
        said = Roster(max(now_ms, self.time_ms + 1), digest_of(members), members)
        body = {"digest": said.digest.hex(), "time_ms": said.time_ms, "gateways": said.gateways}
        self._journal.note(now_ms, ROSTER, body | {"enterprises": said.enterprises})
        log.info("roster: %d gateways of %d enterprises", said.gateways, said.enterprises)
        self._said, self.time_ms = said, said.time_ms
        self.put()

    def put(self) -> None:
        """Put every part of it; nothing before the first `refresh`."""
        if said := self._said:
            pieces = [said.members[i : i + PER_PART] for i in range(0, len(said.members), PER_PART)] or [()]
            for number, members in enumerate(pieces):
                self._downlink.put_roster(number, RosterPart(VERSION, said.time_ms, said.digest, len(pieces), members))
