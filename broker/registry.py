"""Of the journal: the aggregator's own keys, the gateways' keys, and the tokens by which some may come."""

from collections.abc import Iterator
from typing import NamedTuple

from broker.database import Database
from broker.messages import Signer


class TokenRow(NamedTuple):
    """Of an enrolment token: the path that it is for, until when, and whether it has been used."""

    path: str
    expires_ms: int
    used: bool


class Registry(Database):
    """The rows of `keys`, `roster` and `tokens`."""

    _edits = 0

    def signer(self, name: str = "aggregator") -> Signer:
        """Return the aggregator's own key, or another of its; the first call makes it, outside of a transaction."""
        row = self._one("SELECT private_key FROM keys WHERE name = ?", name)
        if row:
            return Signer.from_bytes(row[0])
        with self.transaction():  # of two who come at once, the first one's stays
            self._do("INSERT OR IGNORE INTO keys VALUES (?, ?)", name, Signer.generate().to_bytes())
        return self.signer(name)

    def replace_signer(self, name: str) -> Signer:
        """Make another key in the place of one that is the aggregator's; it belongs into a transaction."""
        made = Signer.generate()
        self._do("INSERT OR REPLACE INTO keys VALUES (?, ?)", name, made.to_bytes())
        return made

    def roster(self) -> dict[str, bytes]:
        """Gateway path -> raw Ed25519 public key (32 bytes)."""
        return dict(self._rows("SELECT path, public_key FROM roster"))

    def roster_size(self) -> int:
        """Count the gateways that have a key."""
        row = self._one("SELECT count(*) FROM roster")
        return int(row[0]) if row else 0

    def key_of(self, path: str) -> bytes | None:
        """One gateway's raw public key (32 bytes); None when it is not in the roster."""
        row = self._one("SELECT public_key FROM roster WHERE path = ?", path)
        return row[0] if row else None

    def data_version(self) -> int:
        """A number that changes when another process (`enrol`) wrote to the journal."""
        row = self._one("PRAGMA data_version")
        return int(row[0]) if row else 0

    def roster_version(self) -> tuple[int, int]:
        """What changes when the roster may have, by this process or by another."""
        return self._edits, self.data_version()

    def add_to_roster(self, path: str, public_key: bytes, now_ms: int, how: str) -> None:
        """Remember a gateway's key (`how`: `first-seen` or `enrolled`); an earlier one is replaced."""
        query = "INSERT OR REPLACE INTO roster(path, public_key, since_ms, how) VALUES (?, ?, ?, ?)"
        self._edits += self._do(query, path, public_key, now_ms, how)

    def put_agreement_key(self, path: str, key: bytes, session: int) -> None:
        """Keep the raw X25519 key (32 bytes) that a gateway's birth of this session names, unless a later one did."""
        query = "UPDATE roster SET agreement_key = ?, session = ? WHERE path = ? AND session < ?"
        self._edits += self._do(f"{query} AND agreement_key IS NOT ?", key, session, path, session, key)

    def put_seen(self, path: str, session: int) -> None:
        """Remember that a gateway was heard with the key that it has now, by a birth of this session."""
        self._do("UPDATE roster SET session = ? WHERE path = ? AND session = 0", session, path)

    def enrolled(self) -> Iterator[tuple[str, int, bool]]:
        """(path, since when it has its key (ms), whether a birth by that key was ever heard) of each of the roster."""
        rows = self._rows("SELECT path, since_ms, session FROM roster ORDER BY path")
        yield from ((path, since_ms, session > 0) for path, since_ms, session in rows)

    def members(self) -> Iterator[tuple[str, bytes, bytes | None]]:
        """(path, raw Ed25519 key, raw X25519 key or None where no birth named one) of each gateway of the roster."""
        yield from self._rows("SELECT path, public_key, agreement_key FROM roster")

    def remove_from_roster(self, path: str) -> bool:
        """Forget a gateway's key and its token: from now on it is a stranger. Whether it had a token to use."""
        self._edits += self._do("DELETE FROM roster WHERE path = ?", path)
        self._do("DELETE FROM tokens WHERE path = ? AND used = 1", path)
        return self._do("DELETE FROM tokens WHERE path = ?", path) > 0

    def add_token(self, digest: bytes, path: str, expires_ms: int) -> None:
        """Let the one who knows what has this digest enrol as a path, once; an earlier one of that path is no good."""
        self._do("DELETE FROM tokens WHERE path = ?", path)
        self._do("INSERT INTO tokens VALUES (?, ?, ?, 0)", digest, path, expires_ms)

    def has_tokens(self) -> bool:
        """Whether somebody may enrol by a token, or did."""
        return self._one("SELECT 1 FROM tokens") is not None

    def token(self, digest: bytes) -> TokenRow | None:
        """What is known of a token; None if it is none of ours."""
        row = self._one("SELECT path, expires_ms, used FROM tokens WHERE hash = ?", digest)
        return TokenRow(row[0], row[1], bool(row[2])) if row else None

    def spend_token(self, digest: bytes) -> None:
        """Remember that it was used."""
        self._do("UPDATE tokens SET used = 1 WHERE hash = ?", digest)
