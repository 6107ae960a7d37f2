"""What gateways send, from MQTT bytes to verified, decoded values; everything hostile ends here as a refusal.

A refusal of bytes whose sender is not proven raises PeerError: a counter and a log line. One of a proven sender is a
`Refused`, which gets a ledger entry and, for an update, a receipt as well.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from broker import topics
from broker.charter import Acceptance
from broker.config import FederationConfig
from broker.journal import Journal, Revocation
from broker.link import Inbound
from broker.messages import BASE_DIGEST, Answer, Birth, Death, Message, Update, Vote, open_envelope, peek
from broker.roster import MAX_GATEWAYS
from models import codec, ringcode
from models.errors import PeerError
from models.ringcode import Ring
from models.spec import Task
from models.width import Places

MAX_STRANGERS = 64
WHOLE = 4  # quarters of a net
# No weight of a net moves by this much in a round; a sum of such values stays far from float32's end.
MAX_VALUE = 1e6


@dataclass(frozen=True)
class Wanted:
    """What an update of a task must be: its layout has `count` shared values; `ring_in` gives an open round's ring.

    `slices` says which of them a narrow gateway has (`width.slices`).
    """

    task: Task
    count: int
    ring_in: Callable[[int], Ring | None] = lambda _round: None
    slices: Mapping[float, Places] = field(default_factory=dict)

    def count_of(self, quarters: int) -> int:
        """How many values a gateway shares that has so many quarters of the net's width; 0 where none may."""
        return self.count if quarters == WHOLE else len(self.slices.get(quarters / WHOLE, ()))


@dataclass(frozen=True)
class HeardBirth:
    """A gateway is there; `pinned` when this birth was the first one and its key is now in the roster."""

    path: str
    birth: Birth
    pinned: bool


@dataclass(frozen=True)
class HeardDeath:
    """A gateway's last will."""

    path: str
    death: Death


@dataclass(frozen=True)
class HeardAcceptance:
    """A gateway's word on the charter, and the key that signed it."""

    path: str
    key: bytes
    word: Acceptance


@dataclass(frozen=True)
class HeardAnswer:
    """A gateway's word on a round."""

    path: str
    task: str
    answer: Answer


@dataclass(frozen=True)
class HeardVote:
    """A gateway's vote on a model that is there."""

    path: str
    task: str
    vote: Vote


@dataclass(frozen=True)
class HeardUpdate:
    """A decodable update; `digest` is the SHA-256 of its envelope, which has `size` bytes."""

    path: str
    task: str
    update: Update
    digest: bytes
    size: int


@dataclass(frozen=True)
class Refused:
    """A proven sender's message that can't be used; `round` is None when it was no update."""

    path: str
    task: str
    round: int | None
    digest: bytes
    reason: str
    detail: str


Heard = HeardBirth | HeardDeath | HeardAcceptance | HeardAnswer | HeardVote | HeardUpdate | Refused
_UPLINK: dict[str, type[Message]] = {"update": Update, "answer": Answer, "vote": Vote}
_BY_FILE = {"update", "vote"}


class Intake:
    """Reads inbound messages; keeps keys of births in the journal, so it belongs inside a transaction."""

    def __init__(
        self,
        config: FederationConfig,
        journal: Journal,
        wanted: Mapping[str, Wanted],
        covers: Callable[[str, bytes], bool] = lambda _path, _key: True,
    ) -> None:
        """`covers` says whether a gateway (path and key) has accepted the charter in force."""
        self._covers = covers
        self._config = config
        self._journal = journal
        self._wanted = wanted
        # Gateways that are not enrolled: path -> the key that they offer, for the operator to see.
        self._strangers: dict[str, bytes] = {}
        # What `broker enrol` has revoked, up to that entry of the ledger, when the journal was at that version.
        self._revoked: dict[str, Revocation] = {}
        self._revoked_to, self._revoked_at = 0, -1

    def read(self, inbound: Inbound, now_ms: int) -> Heard:
        """Verify and decode one message; PeerError when its sender is not proven or may not be here."""
        topic = topics.parse(inbound.topic)
        match topic:
            case topics.Status(path):
                return self._status(path, inbound, now_ms)
            case topics.Accepted(path):
                return self._acceptance(path, inbound)
            case topics.Uplink(path, task, what):
                return self._uplink(path, task, what, inbound)
        raise PeerError("topic", f"{inbound.topic} is not for the aggregator")

    def read_filed(self, inbound: Inbound, now_ms: int) -> Heard:
        """The same for a message that came by file; it writes nothing. PeerError for all but those that may.

        Births, deaths and answers say who is there now; an old copy of one would say it of a gateway that is not. An
        acceptance says when it was given: an old copy of one changes nothing.
        """
        topic = topics.parse(inbound.topic)
        of_task = isinstance(topic, topics.Uplink) and topic.what in _BY_FILE
        if not of_task and not isinstance(topic, topics.Accepted):
            raise PeerError("topic", f"{inbound.topic}: only updates, votes and acceptances come by file")
        return self.read(inbound, now_ms)

    def asking(self) -> dict[str, dict[str, Any]]:
        """Gateways that ask to take part and are not in the roster, for the operator: plain JSON values.

        `not_enrolled` is path -> key; of a path that was taken out, `revoked` has the key, since when, and whether it
        is the one that was taken out.
        """
        found: dict[str, dict[str, Any]] = {"not_enrolled": {}, "revoked": {}}
        for path, key in self._strangers.items():
            if self._journal.key_of(path) is not None:
                continue
            if was := self.revocation(path):
                about = {"key": key.hex(), "since_ms": was.since_ms, "same_key": key == was.key}
                found["revoked"][path] = about
            else:
                found["not_enrolled"][path] = key.hex()
        return found

    def revocation(self, path: str) -> Revocation | None:
        """How a path that is not in the roster was taken out. Only another process revokes: what came since is read."""
        version = self._journal.data_version()
        if version != self._revoked_at:
            self._revoked_at = version
            new, self._revoked_to = self._journal.revocations(self._revoked_to)
            self._revoked |= new
        return self._revoked.get(path)

    def _status(self, path: topics.GatewayPath, inbound: Inbound, now_ms: int) -> Heard:
        self._check_root(path)
        name, data = str(path), inbound.payload
        key = self._journal.key_of(name)
        if key is None:
            birth = self._first_birth(name, inbound, now_ms)
            return HeardBirth(name, birth, pinned=True)
        try:
            birth = open_envelope(data, inbound.topic, key, Birth)
        except PeerError as error:
            if error.reason == "schema":
                return HeardDeath(name, open_envelope(data, inbound.topic, key, Death))
            if error.reason == "signature" and _offers_other_key(data, key):
                known = f"the roster has {key.hex()}"
                raise PeerError(
                    "key", f"{name} signs with another key, {known}; if it was replaced, enrol it"
                ) from error
            raise
        if birth.public_key != key:
            raise PeerError("key", f"{name} names another key than the one it signs with")
        self._keep(name, birth)
        return HeardBirth(name, birth, pinned=False)

    def _keep(self, path: str, birth: Birth) -> None:
        if birth.agreement_key:
            self._journal.put_agreement_key(path, birth.agreement_key, birth.session)
        self._journal.put_seen(path, birth.session)

    def _first_birth(self, path: str, inbound: Inbound, now_ms: int) -> Birth:
        if self._config.join != "first-seen":
            try:
                key = peek(inbound.payload, Birth).public_key
            except PeerError:
                peek(inbound.payload, Death)  # of one who was taken out, or never in
                raise PeerError("unknown-gateway", f"{path}, which is not in the roster, went away") from None
            open_envelope(inbound.payload, inbound.topic, key, Birth)
            if len(self._strangers) < MAX_STRANGERS or path in self._strangers:
                self._strangers[path] = key
            if was := self.revocation(path):
                which = "the key that it had" if key == was.key else "another key"
                raise PeerError("revoked", f"{path} was revoked, and asks again with {which}, {key.hex()}")
            raise PeerError(
                "unknown-gateway", f"{path} is not in the roster; enrol it: --path {path} --key {key.hex()}"
            )
        if self._journal.roster_size() >= MAX_GATEWAYS:
            raise PeerError("roster-full", f"{MAX_GATEWAYS} gateways are pinned")
        offered = peek(inbound.payload, Birth).public_key
        birth = open_envelope(inbound.payload, inbound.topic, offered, Birth)
        self._journal.add_to_roster(path, offered, now_ms, "first-seen")
        self._keep(path, birth)
        return birth

    def _acceptance(self, path: topics.GatewayPath, inbound: Inbound) -> Heard:
        self._check_root(path)
        key = self._journal.key_of(str(path))
        if key is None:
            raise PeerError("unknown-gateway", f"{path} is not in the roster, or its birth was not seen")
        return HeardAcceptance(str(path), key, open_envelope(inbound.payload, inbound.topic, key, Acceptance))

    def _uplink(self, path: topics.GatewayPath, task: str, what: str, inbound: Inbound) -> Heard:
        self._check_root(path)
        name, data = str(path), inbound.payload
        wanted = self._wanted.get(task)
        if wanted is None:
            raise PeerError("unknown-task", f"{task} is not a task of this federation")
        key = self._journal.key_of(name)
        if key is None:
            raise PeerError("unknown-gateway", f"{name} is not in the roster, or its birth was not seen")
        digest = hashlib.sha256(data).digest()
        if what not in _UPLINK:
            raise PeerError("topic", f"{inbound.topic}: no uplink message is called that")
        try:
            message = open_envelope(data, inbound.topic, key, _UPLINK[what])
        except PeerError as error:
            if error.reason != "schema":
                raise
            return Refused(name, task, None, digest, error.reason, error.detail)
        if isinstance(message, Answer):
            return HeardAnswer(name, task, message)
        if isinstance(message, Vote):
            return self._vote(name, task, message, digest, key)
        if not isinstance(message, Update):
            raise PeerError("schema", type(message).__name__)
        try:
            self._check_accepted(name, key)
            self._check_base(task, message)
            check_update(message, wanted)
        except PeerError as error:
            return Refused(name, task, message.round, digest, error.reason, error.detail)
        return HeardUpdate(name, task, message, digest, len(data))

    def _vote(self, path: str, task: str, vote: Vote, digest: bytes, key: bytes) -> Heard:
        try:
            self._check_accepted(path, key)
        except PeerError as error:
            return Refused(path, task, None, digest, error.reason, error.detail)
        model = self._journal.model(task, vote.version)
        if model is None or model.digest != vote.digest:
            detail = f"a vote on version {vote.version}, which is none of ours"
            return Refused(path, task, None, digest, "unknown-model", detail)
        return HeardVote(path, task, vote)

    def _check_base(self, task: str, update: Update) -> None:
        """Refuse what was learnt from weights that the version of that number does not have: of a lost journal."""
        known = self._journal.digest_of(task, update.base)
        if update.base_digest and known and known[:BASE_DIGEST] != update.base_digest:
            raise PeerError("unknown-model", f"trained from another version {update.base} than ours")

    def _check_accepted(self, name: str, key: bytes) -> None:
        if not self._covers(name, key):
            raise PeerError("charter", "this gateway has not accepted the charter in force")

    def _check_root(self, path: topics.GatewayPath) -> None:
        if path.enterprise not in self._config.roots:
            raise PeerError("root", f"{path}: {path.enterprise} does not take part in this federation")


def check_update(update: Update, wanted: Wanted) -> None:
    """Decode an update completely; PeerError `samples`, `width`, `layout`, `codec` or `range`."""
    training = wanted.task.training
    most = training.max_windows * training.epochs
    if update.samples > most:
        raise PeerError("samples", f"{update.samples} samples, the task allows {most}")
    count = wanted.count_of(update.quarters)
    if not count or (update.quarters != WHOLE and wanted.task.round.codec == "ring"):
        raise PeerError("width", f"{update.quarters} of {WHOLE} quarters of a net that is added up whole")
    if wanted.task.round.codec == "ring":
        ring = wanted.ring_in(update.round)
        if ring:
            ringcode.unpack(update.payload, ring)
        return  # what is of no open round is not counted
    declared = codec.declared(update.payload)
    if declared != count:
        raise PeerError("layout", f"{declared} values, of this width the task shares {count}")
    decoded = codec.decode_sparse(update.payload, count)
    values = decoded.values if isinstance(decoded, codec.Sparse) else decoded
    largest = float(np.abs(values).max(initial=0))
    if largest > MAX_VALUE:
        raise PeerError("range", f"a value of {largest:.3g}, at most {MAX_VALUE:.0e} is believed")


def _offers_other_key(data: bytes, key: bytes) -> bool:
    try:
        return peek(data, Birth).public_key != key
    except PeerError:
        return False
