"""`charter.toml`: what the members of a federation agreed on, and who of them has accepted it.

A charter is named by the SHA-256 of its file, which is published as it is: what `sha256sum` says of one's own copy is
what a plan names and a site accepts. The ledger is the only memory of who accepted what.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec

from broker import topics
from broker.messages import VERSION, Message, Millis, Signer
from models.errors import UserError
from models.spec import Task
from models.tomlfile import TomlFile

if TYPE_CHECKING:
    from broker.journal import Journal

log = logging.getLogger(__name__)

SECURE = "secure-aggregation"
CHARTER, ACCEPTANCE = "charter", "acceptance"  # kinds of ledger entries
_BOM = "\ufeff"
# Where in a charter what a plan breaks is written.
_KEYS: dict[str, list[str | int]] = {
    "task": ["tasks"],
    "members": ["members"],
    "min-gateways": ["min_gateways"],
    "max-epsilon": ["privacy", "max_epsilon"],
    "secure-aggregation": ["privacy", "mode"],
}
MOST_CHARTER = 60 * 1024  # bytes of its text, so that its message has 64 KiB at most
_MOST_TITLE = 120
_MOST_GATEWAYS = 10**6


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of the file's tables."""


class CharterPrivacy(_Table, frozen=True, kw_only=True):
    """`[privacy]`: whether a sum may be made in the clear, and the budget of epsilon, if there is one."""

    mode: Literal["plain", "secure-aggregation"]
    max_epsilon: float | None = None


class CharterModel(_Table, frozen=True, kw_only=True):
    """`[model]`: who receives the model that was learnt together, and under which terms."""

    recipients: tuple[str, ...]
    terms: str


class Charter(_Table, frozen=True, kw_only=True):
    """The whole file. `members` are enterprises, the roots of their gateways' paths.

    `tasks`, `members`, `min_gateways` and `[privacy]` bind every plan; the rest is for people.
    """

    title: str
    purpose: str
    tasks: tuple[str, ...]
    members: tuple[str, ...]
    min_gateways: int
    retention: str
    contributions: str
    privacy: CharterPrivacy
    model: CharterModel


class CharterText(Message, frozen=True, tag="charter"):
    """Retained, signed: the charter in force as its file has it, empty for none any more; `time_ms` grows."""

    text: Annotated[str, msgspec.Meta(max_length=MOST_CHARTER)]
    time_ms: Millis


class Acceptance(Message, frozen=True, tag="acceptance"):
    """Retained: a gateway has accepted the charter of this SHA-256, or (empty) accepts none any more."""

    digest: Annotated[bytes, msgspec.Meta(max_length=32)]
    time_ms: Millis


class Named(NamedTuple):
    """A charter with its text and what it is named by: the text's SHA-256."""

    charter: Charter
    text: str
    digest: bytes


def parse_charter(text: str, name: str = "charter.toml") -> Named:
    """Parse and check a charter; UserError with file, line, key and remedy."""
    data = text.encode()
    if len(data) > MOST_CHARTER:
        raise UserError(name, 0, "", f"larger than {MOST_CHARTER} bytes", "a charter is a short text")
    try:
        file = TomlFile(name, text.removeprefix(_BOM))
    except (ValueError, RecursionError) as error:  # a number of many digits, tables in tables without end
        raise UserError(name, 0, "", f"not TOML: {type(error).__name__}", "mend what is no charter") from error
    charter = file.convert(Charter)
    _check(file, charter)
    return Named(charter, text, hashlib.sha256(data).digest())


def load_charter(path: Path) -> Named:
    """Read a charter, byte for byte; UserError."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_CHARTER + 1)
    except OSError as error:
        raise UserError(str(path), 0, "", f"can't be read: {error.strerror}", "check the path") from error
    try:
        # What is cut off was too much anyway, and may have been cut in the middle of a character.
        text = data.decode("utf-8") if len(data) <= MOST_CHARTER else data.decode("utf-8", "ignore") + " " * 4
    except UnicodeDecodeError:
        raise UserError(str(path), 0, "", "not UTF-8 text", "save it as UTF-8") from None
    return parse_charter(text, str(path))


def _check(file: TomlFile, charter: Charter) -> None:
    def need(ok: bool, path: list[str | int], problem: str, remedy: str) -> None:  # noqa: FBT001
        if not ok:
            raise file.error(path, problem, remedy)

    texts = {key: getattr(charter, key) for key in ("title", "purpose", "retention", "contributions")}
    for key, text in texts.items():
        need(bool(text.strip()), [key], "says nothing", "write it down: somebody has to sign it")
    line = charter.title.isprintable() and len(charter.title) <= _MOST_TITLE
    need(line, ["title"], "is no title", f"write one line of {_MOST_TITLE} characters at most")
    need(bool(charter.tasks), ["tasks"], "empty", 'write the tasks by name: tasks = ["spindle-wear"]')
    need(bool(charter.members), ["members"], "empty", 'write the enterprises: members = ["acme", "borealis"]')
    many = 1 <= charter.min_gateways <= _MOST_GATEWAYS
    need(many, ["min_gateways"], "out of range", f"write 1 to {_MOST_GATEWAYS}")
    epsilon = charter.privacy.max_epsilon
    need(epsilon is None or epsilon > 0, ["privacy", "max_epsilon"], "out of range", "write a number above 0")
    need(bool(charter.model.recipients), ["model", "recipients"], "empty", "write who receives the model")
    need(bool(charter.model.terms.strip()), ["model", "terms"], "says nothing", "write under which terms")


def outside(
    charter: Charter, task: str, roots: Iterable[str], *, min_gateways: int, secure: bool
) -> tuple[str, str] | None:
    """Say what of a charter a plan breaks, as (code, sentence); None if nothing. No plan adds noise yet."""
    strangers = [root for root in roots if root not in charter.members]
    if task not in charter.tasks:
        return "task", f"the charter names no task {task}"
    if strangers:
        return "members", f"the charter names no member {strangers[0]}"
    if min_gateways < charter.min_gateways:
        return "min-gateways", f"the charter wants {charter.min_gateways} gateways in a sum, the plan {min_gateways}"
    if charter.privacy.max_epsilon is not None:
        bound = f"the charter bounds epsilon at {charter.privacy.max_epsilon:g}"
        return "max-epsilon", f"{bound}, the plan adds no noise"
    if charter.privacy.mode == SECURE and not secure:
        return "secure-aggregation", "the charter requires secure aggregation, the plan has none"
    return None


def check_tasks(name: str, named: Named, tasks: Iterable[Task], roots: Iterable[str]) -> None:
    """Refuse tasks and roots of federation.toml that its own charter (file `name`) forbids; UserError."""
    file, roots = TomlFile(name, named.text.removeprefix(_BOM)), tuple(roots)
    for task in tasks:
        secure = task.privacy.secure_aggregation
        against = outside(named.charter, task.name, roots, min_gateways=task.round.min_gateways, secure=secure)
        if against:
            remedy = "change the task or the roots, or agree on another charter"
            raise file.error(_KEYS[against[0]], f"task {task.name}: {against[1]}", remedy)


def bodies(lines: Iterable[str], kind: str) -> Iterator[dict[str, Any]]:
    """Give the bodies of a ledger's entries of a kind, oldest first."""
    for line in lines:
        if f'"kind":"{kind}"' in line and (entry := json.loads(line))["kind"] == kind:
            yield entry["body"]


class Charters:
    """The aggregator's part: publishes the charter in force, and knows who has accepted it.

    The same charter has the same time until there is another, whose time is later, whatever the clock says.
    """

    def __init__(self, named: Named | None, journal: "Journal", time_ms: int) -> None:
        """Take up what the ledger says; it writes nothing."""
        self.named, self._journal = named, journal
        self._said: dict[str, dict[str, Any]] = {
            body["path"]: body for body in bodies(journal.ledger_lines(), ACCEPTANCE)
        }
        before = list(bodies(journal.ledger_lines(), CHARTER))
        self._silent = named is None and not before
        last: dict[str, Any] = before[-1] if before else {"digest": ""}
        self.in_force = bool(self.digest.hex() == last["digest"])
        # Entries of earlier versions have no time.
        since_ms = int(last.get("time_ms", time_ms if self.in_force else -1))
        self._time_ms = since_ms if self.in_force else max(time_ms, since_ms + 1)

    def enter(self) -> None:
        """Put it in force: where the ledger has another charter, or none, note that there."""
        if self.in_force:
            return
        title = self.named.charter.title if self.named else ""
        log.warning("charter from now on: %s %s", self.digest.hex() or "none", title)
        with self._journal.transaction():
            body = {"digest": self.digest.hex(), "title": title, "time_ms": self._time_ms}
            self._journal.note(self._time_ms, CHARTER, body)
        self.in_force = True

    @property
    def digest(self) -> bytes:
        """What the charter in force is named by; empty without one."""
        return self.named.digest if self.named else b""

    def message(self, federation: str, signer: Signer) -> tuple[str, bytes] | None:
        """Return topic and envelope of the charter in force; None where there never was one."""
        if self._silent:
            return None
        topic = topics.CharterInForce(federation).topic
        text = self.named.text if self.named else ""
        return topic, signer.seal(CharterText(VERSION, text, self._time_ms), topic)

    def hear(self, path: str, key: bytes, word: Acceptance) -> dict[str, Any] | None:
        """Go by a gateway's verified word from now on; return what the ledger says of it, None for nothing new."""
        body = {"path": path, "key": key.hex(), "digest": word.digest.hex(), "said_ms": word.time_ms}
        before = self._said.get(path)
        if before and before["key"] == body["key"] and before["said_ms"] >= word.time_ms:
            return None  # said again, or what held before
        self._said[path] = body
        return body

    def take(self, path: str, key: bytes, word: Acceptance, now_ms: int) -> None:
        """Note a gateway's verified word, once; inside of a transaction."""
        if body := self.hear(path, key, word):
            self._journal.note(now_ms, ACCEPTANCE, body)
            log.info("%s accepts %s", path, f"charter {body['digest']}" if word.digest else "no charter")

    def covers(self, path: str, key: bytes | None) -> bool:
        """Whether a gateway with this key may take part: no charter is in force, or it has accepted that one."""
        said = self._said.get(path, {})
        named = said.get("digest"), said.get("key")
        return self.named is None or (key is not None and named == (self.digest.hex(), key.hex()))

    def status(self) -> dict[str, Any] | None:
        """The charter in force and which gateways of the roster have accepted it; plain JSON values."""
        if self.named is None:
            return None
        roster = self._journal.roster()
        accepted = sorted(path for path, key in roster.items() if self.covers(path, key))
        waits = sorted(roster.keys() - accepted)
        title = self.named.charter.title
        return {"digest": self.digest.hex(), "title": title, "accepted": accepted, "not_accepted": waits}
