"""The charter in force: read from its file, held against the tasks, published; and who of the members has accepted it.

The ledger is the only memory of who accepted what.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from broker import topics
from broker.charter import (
    ACCEPTANCE,
    BOM,
    CHARTER,
    MOST_CHARTER,
    Acceptance,
    CharterText,
    Named,
    outside,
    parse_charter,
)
from broker.ledger import bodies
from broker.messages import VERSION, Signer
from models.errors import UserError
from models.spec import Task
from models.tomlfile import TomlFile

if TYPE_CHECKING:
    from broker.journal import Journal

log = logging.getLogger(__name__)

# Where in a charter what a plan breaks is written.
_KEYS: dict[str, list[str | int]] = {
    "task": ["tasks"],
    "members": ["members"],
    "min-gateways": ["min_gateways"],
    "max-epsilon": ["privacy", "max_epsilon"],
    "secure-aggregation": ["privacy", "mode"],
}


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


def check_tasks(name: str, named: Named, tasks: Iterable[Task], roots: Iterable[str]) -> None:
    """Refuse tasks and roots of federation.toml that its own charter (file `name`) forbids; UserError."""
    file, roots = TomlFile(name, named.text.removeprefix(BOM)), tuple(roots)
    for task in tasks:
        secure = task.privacy.secure_aggregation
        against = outside(named.charter, task.name, roots, min_gateways=task.round.min_gateways, secure=secure)
        if against:
            what = "[federation] roots" if against[0] == "members" else "the task"
            remedy = f"change {what}, or agree on another charter"
            about = "" if against[0] == "members" else f"task {task.name}: "
            raise file.error(_KEYS[against[0]], f"{about}{against[1]}", remedy)


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
