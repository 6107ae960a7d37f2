"""The metadata of releases, as the aggregator makes and keeps it: The Update Framework 1.0, by python-tuf.

`root` and `targets` are signed by the operators' keys, which are files that are offline but when they sign; so is
`stable`, by as many of them as `threshold` says. `canary`, `snapshot` and `timestamp` are signed by a key of the
journal: who takes the aggregator over can let canary gateways score with what he likes, and nobody else. Expiry ends
new installs alone. Each change is a version more of the roles that it concerns, in one transaction of the journal.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Key,
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
    VerificationResult,
)
from tuf.api.serialization.json import JSONSerializer

from broker.channels import CHANNELS, MAX_METADATA, MAX_ROOTS, Channel, target_of
from broker.config import ReleaseTable
from broker.journal import Journal
from broker.messages import Signer
from broker.pki import write_file
from models.commandline import counted
from models.errors import LocalError, UserError

_ONLINE = "release"
_YEAR, _MONTH, _WEEK = timedelta(days=365), timedelta(days=30), timedelta(days=7)
_LIFE = {"root": _YEAR, "targets": _YEAR, "stable": _YEAR, "canary": _MONTH, "snapshot": _MONTH, "timestamp": _WEEK}
_TOP = ("root", "targets", "snapshot", "timestamp")
_OFFLINE = ("root", "targets")
_ANEW = "run tundish broker release --new-online-key, with the operators' keys"
# At INFO it tells of each key that has not signed, where enough others have too.
logging.getLogger("tuf").setLevel(logging.WARNING)
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


def new_key(path: Path) -> str:
    """Make an operator's key, in a file of its owner's alone; return the public one in hex. UserError if it exists."""
    if path.exists():
        raise UserError("--new-key", 0, "", f"{path} exists", "name a new file")
    key = Ed25519PrivateKey.generate()
    try:
        write_file(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), secret=True)
    except OSError as error:
        raise UserError("--new-key", 0, "", f"{path}: {error.strerror}", "name a file that can be made") from None
    return key.public_key().public_bytes_raw().hex()


def load_key(path: Path) -> CryptoSigner:
    """Read what `new_key` made; UserError."""
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except OSError as error:
        raise UserError("--key", 0, "", f"{path}: {error.strerror}", "name a file of --new-key") from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError("--key", 0, "", f"{path} is no key of releases", "name a file of --new-key")
    return CryptoSigner(key)


class Repository:
    """What the journal holds of metadata; every method that changes it belongs inside a transaction.

    `signers` are the operators' keys that are at hand.
    """

    def __init__(
        self, journal: Journal, table: ReleaseTable, now_ms: int, signers: Sequence[CryptoSigner] = ()
    ) -> None:
        self._journal, self._table, self._signers = journal, table, signers
        self._now = datetime.fromtimestamp(now_ms // 1000, UTC)
        self._online = _signer(journal.signer(_ONLINE))
        self._keys = [SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(k))) for k in table.keys]

    def operators(self) -> set[str]:
        """Public keys (hex) that may sign: those of federation.toml, and those that the newest root has until then."""
        root = self._root()
        before = [] if root is None else [root.keys[one] for one in root.roles["root"].keyids]
        return {str(key.keyval["public"]) for key in (*self._keys, *before)}

    def prepare(self) -> None:
        """Let root, targets and both channels be there as federation.toml says; UserError where keys are needed."""
        root, targets, wanted = self._prepare_root(), self._load("targets", Targets), self._delegations()
        if targets is None or targets.delegations != wanted or self._due("targets", targets):
            targets = targets or Targets()
            targets.delegations = wanted
            self._put("targets", targets, self._signers, root)
        for channel in CHANNELS:
            made: Metadata[Targets] = self._stored(channel) or Metadata(Targets())
            known = targets.get_verification_result(channel, made.signed_bytes, made.signatures)
            if not known or self._due(channel, made.signed):
                self._put(channel, made.signed, self._signers_of(channel), targets)

    def release(self, channel: Channel, task: str, files: Mapping[str, TargetFile]) -> None:
        """Let a channel's gateways score with a task's model from now on: `target_of` of each -> what it is."""
        self.prepare()
        delegator, now = self._load("targets", Targets), self._load(channel, Targets)
        if delegator is None or now is None:
            raise LocalError(f"{self._journal.path}: metadata of releases is missing; restore a backup")
        others = {name: one for name, one in now.targets.items() if name.rpartition("/")[2] != task}
        now.targets = others | dict(files)
        self._put(channel, now, self._signers_of(channel), delegator)
        self.freshen(changed=True)

    def renew(self) -> str:
        """Let a new online key, whose public part is returned in hex, sign by a new root; LocalError where none is.

        Gateways then forget what they knew by the one before (TUF 5.3.11): whoever had it may have signed the highest
        versions there are, and a journal that was restored counts lower than it did.
        """
        if self._root() is None:
            raise LocalError("nothing is released yet, so no gateway knows an online key; release a model first")
        made = self._journal.replace_signer(_ONLINE)
        self._online = _signer(made)
        self.prepare()
        self.freshen(changed=True)
        return made.public_key.hex()

    def freshen(self, *, changed: bool = False) -> bool:
        """Make what the online key signs anew where it ages, or `changed`; say whether anything was."""
        targets, root = self._load("targets", Targets), self._root()
        canary = self._load("canary", Targets)
        if targets is None or root is None or canary is None:
            return False
        if self._ages("canary", canary):
            self._put("canary", canary, [self._online], targets)
            changed = True
        snapshot, timestamp = self._load("snapshot", Snapshot), self._load("timestamp", Timestamp)
        if changed or snapshot is None or self._ages("snapshot", snapshot):
            snapshot = snapshot or Snapshot()
            snapshot.meta = {f"{name}.json": self._meta(name) for name in ("targets", *CHANNELS)}
            self._put("snapshot", snapshot, [self._online], root)
            changed = True
        if changed or timestamp is None or self._ages("timestamp", timestamp):
            timestamp = timestamp or Timestamp()
            timestamp.snapshot_meta = self._meta("snapshot")
            self._put("timestamp", timestamp, [self._online], root)
            changed = True
        return changed

    def _prepare_root(self) -> Root:
        now = self._root()
        wanted = Root(consistent_snapshot=False)
        for name in _TOP:
            offline = name in _OFFLINE
            keys = self._keys if offline else [self._online.public_key]
            wanted.roles[name] = Role([], self._table.threshold if offline else 1)
            for key in keys:
                wanted.add_key(key, name)
        if now is not None and (now.keys, now.roles) == (wanted.keys, wanted.roles) and not self._due("root", now):
            return now
        if now is not None and now.version == MAX_ROOTS:
            raise LocalError(f"{MAX_ROOTS} roots were made; begin a new federation")
        # Who held the keys before says who does from now on.
        return self._put("root", wanted, self._signers, *([now] if now else []), wanted)

    def _delegations(self) -> Delegations:
        online = self._online.public_key
        keys: dict[str, Key] = {key.keyid: key for key in (*self._keys, online)}
        ids = [key.keyid for key in self._keys]
        globs = [target_of("canary", "*", path) for path in self._table.canary]
        roles = {
            "stable": DelegatedRole("stable", ids, self._table.threshold, terminating=True, paths=["stable/*"]),
            "canary": DelegatedRole("canary", [online.keyid], 1, terminating=True, paths=globs),
        }
        return Delegations(keys, roles)

    def _signers_of(self, channel: Channel) -> Sequence[CryptoSigner]:
        return self._signers if channel == "stable" else [self._online]

    def _root(self) -> Root | None:
        return self._load(self._last_root(), Root)

    def _last_root(self) -> str:
        return max((name for name in self._journal.metadata() if name.startswith("root")), key=_number, default="root0")

    def _load(self, name: str, _kind: type[S]) -> S | None:
        stored: Metadata[S] | None = self._stored(name)
        return None if stored is None else stored.signed

    def _stored(self, name: str) -> Any:
        """A file of metadata that the journal has, None for none; LocalError for one that is damaged."""
        data = self._journal.metadata().get(name)
        try:
            return None if data is None else Metadata.from_bytes(data)
        except (RepositoryError, ValueError) as error:
            place = f"{self._journal.path}: the metadata {name!r} of releases is damaged"
            raise LocalError(f"{place} ({error}); restore a backup") from error

    def _ages(self, name: str, signed: Root | Targets | Snapshot | Timestamp) -> bool:
        """Whether half of its life is over."""
        return signed.expires - self._now < _LIFE[name] / 2

    def _due(self, name: str, signed: Root | Targets) -> bool:
        """Whether it is to be signed anew now that keys are at hand."""
        return bool(self._signers) and self._ages(name, signed)

    def _meta(self, name: str) -> MetaFile:
        data = self._journal.metadata()[name]
        version = self._stored(name).signed.version
        return MetaFile(version, len(data), {"sha256": hashlib.sha256(data).hexdigest()})

    def _put(self, name: str, signed: S, signers: Sequence[CryptoSigner], *delegators: Root | Targets) -> S:
        """Sign the next version of a role, as each of those who delegate to it demands, and store it; UserError."""
        stored = self._stored(self._last_root() if name == "root" else name)
        signed.version = stored.signed.version + 1 if stored else 1
        signed.expires = self._now + _LIFE[name]
        made = Metadata(signed)
        for signer in signers:
            made.sign(signer, append=True)
        for delegator in delegators:
            self._check(name, delegator.get_verification_result(name, made.signed_bytes, made.signatures))
        data = made.to_bytes(JSONSerializer(compact=True))
        if len(data) > MAX_METADATA:
            problem = f"{name} would have {len(data)} bytes, at most {MAX_METADATA} are sent"
            raise UserError("federation.toml", 0, "release.canary", problem, "name fewer gateways")
        self._journal.put_metadata(f"root{signed.version}" if name == "root" else name, data)
        return signed

    def _check(self, name: str, found: VerificationResult) -> None:
        """Refuse what too few of those have signed who must; UserError, LocalError for what was not the operators'."""
        if found:
            return
        keys = sorted(str(key.keyval["public"]) for key in found.unsigned.values())
        if self._online.public_key.keyval["public"] in (*keys, *(k.keyval["public"] for k in found.signed.values())):
            raise LocalError(f"{self._journal.path}: the online key of releases is not that of {name}; {_ANEW}")
        whose = "of [release]" if set(keys) <= set(self._table.keys) else "that [release] had before this change"
        needed = counted(found.threshold, "signature")
        problem = f"too few: {name} needs {needed} by keys {whose}, {len(found.signed)} given"
        remedy = f"give --key FILE for {found.missing} more of: {', '.join(keys)}"
        raise UserError("--key", 0, "", problem, remedy)


def _signer(key: Signer) -> CryptoSigner:
    return CryptoSigner(Ed25519PrivateKey.from_private_bytes(key.to_bytes()))


def _number(root: str) -> int:
    return int(root.removeprefix("root"))
