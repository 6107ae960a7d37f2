"""Which gateways were heard of since the start, by their newest births, and which of them were taken out since."""

from collections.abc import Callable, Iterator
from typing import Any

from broker.journal import Journal, Revocation
from broker.messages import Birth


class Presence:
    """The newest birth of each gateway; `revocation` says how a path was taken out, if it was."""

    def __init__(self, journal: Journal, revocation: Callable[[str], Revocation | None]) -> None:
        self._journal, self._revocation = journal, revocation
        self._births: dict[str, Birth] = {}
        self._out: set[str] = set()
        self._roster: tuple[int, int] | None = None

    def hear(self, path: str, birth: Birth) -> None:
        """Take a verified birth, whose key is the roster's; one of an earlier session is passed over."""
        before = self._births.get(path)
        if before is None or birth.session >= before.session:
            self._births[path] = birth
            self._out.discard(path)

    def gone(self) -> Iterator[tuple[str, int]]:
        """Path and session of each gateway that another process took out, or gave another key, since the last call.

        Whoever it is cannot be heard any more, so that nobody may wait for it.
        """
        if self._roster == (version := self._journal.roster_version()):
            return
        self._roster, keys = version, self._journal.roster()
        for path, birth in list(self._births.items()):
            if keys.get(path) != birth.public_key:
                del self._births[path]
                self._out.add(path)
                yield path, birth.session

    def unseen(self) -> dict[str, dict[str, Any]]:
        """Of the roster, who was not heard since the start: since when it is in, and whether it ever was `seen`."""
        rows = self._journal.enrolled()
        return {p: {"since_ms": since, "seen": seen} for p, since, seen in rows if p not in self._births}

    def installed(self) -> dict[str, dict[str, dict[str, int]]]:
        """Path -> task -> `release` and `version`, of those who said which release they have."""
        said = {path: birth.installed for path, birth in sorted(self._births.items()) if birth.installed}
        return {p: {i.task: {"release": i.release, "version": i.version} for i in some} for p, some in said.items()}

    def revoked(self) -> dict[str, int]:
        """Path -> since when (ms), of those that were here and were taken out."""
        found = {path: self._revocation(path) for path in sorted(self._out) if self._journal.key_of(path) is None}
        return {path: was.since_ms for path, was in found.items() if was}
