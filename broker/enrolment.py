"""Who is let in, and by what: a token that the operator made, a certificate that runs out, or a file that he read.

All of it is synchronous and holds the journal's write lock while it decides and signs, so that of two who come with
the same token one is let in. A hash of the token is all that is kept of it.
"""

import hashlib
import time

from cryptography.hazmat.primitives import hashes

from broker import est
from broker.config import EnrolmentTable
from broker.journal import Journal
from broker.messages import VERSION, Admission, Request
from broker.pki import Authority, requested_key
from broker.roster import MAX_GATEWAYS
from models.errors import LocalError, PeerError


def fingerprint(authority: Authority) -> str:
    """SHA-256 of the authority's certificate (DER), hex."""
    return authority.certificate.fingerprint(hashes.SHA256()).hex()


def url_of(authority: Authority, table: EnrolmentTable) -> str:
    """Where gateways enrol; LocalError."""
    return est.https(table.host or authority.brokers_host(), est.listen_address(table.listen)[1])


def make_token(journal: Journal, authority: Authority, path: str, url: str) -> est.Token:
    """Make a token by which a gateway may enrol as a path, once, within 15 minutes."""
    token, now_ms = est.Token.new(url, fingerprint(authority)), _now_ms()
    with journal.transaction():
        journal.add_token(token.digest, path, now_ms + 1000 * est.VALID_S)
        journal.note(now_ms, "token", {"path": path, "expires_ms": now_ms + 1000 * est.VALID_S})
    return token


def admission_of(journal: Journal, authority: Authority, federation: str, request: Request) -> Admission:
    """Certify the request's TLS key under its path, which the caller has checked; PeerError("request")."""
    certificate = authority.issue(requested_key(request.request), request.path, "client")
    root = (authority.folder / "ca.pem").read_bytes()
    return Admission(VERSION, request.path, journal.signer().public_key, federation, certificate, root)


def admit(journal: Journal, path: str, key: bytes, how: str) -> None:
    """Put a gateway into the roster, inside of a transaction; `how` is `key`, `file` or `token`. LocalError if full."""
    if journal.roster_size() >= MAX_GATEWAYS and journal.key_of(path) is None:
        raise LocalError(f"the roster has {MAX_GATEWAYS} gateways, which is the most; revoke one that is gone")
    now_ms = _now_ms()
    journal.add_to_roster(path, key, now_ms, "enrolled")
    journal.note(now_ms, "enrolled", {"path": path, "key": key.hex(), "how": how})


def by_token(journal: Journal, authority: Authority, federation: str, secret: str, request: Request) -> Admission:
    """Let in the one who shows a token; PeerError with one of est's words, and then the token is still good."""
    digest = hashlib.sha256(secret.encode()).digest()
    journal.signer()  # made first: transactions do not nest
    with journal.transaction():
        token = journal.token(digest)
        if token is None:
            raise PeerError(est.UNKNOWN, "no such token")
        if token.used:
            raise PeerError(est.USED, f"the token of {token.path} has been used")
        if _now_ms() >= token.expires_ms:
            raise PeerError(est.EXPIRED, f"the token of {token.path} has expired")
        if request.path != token.path:
            raise PeerError(est.OTHER_PATH, f"the token is for {token.path}, the gateway is {request.path}")
        answer = admission_of(journal, authority, federation, request)
        journal.spend_token(digest)
        admit(journal, token.path, request.public_key, "token")
    return answer


def renew(journal: Journal, authority: Authority, federation: str, name: str, request: Request) -> Admission:
    """Renew a certificate that TLS has verified, by its name; PeerError unless its gateway's own key asks for it."""
    if request.path != name:
        raise PeerError(est.OTHER_PATH, f"the certificate is of {name}, the gateway is {request.path}")
    journal.signer()
    with journal.transaction():
        if journal.key_of(name) != request.public_key:
            raise PeerError(est.STRANGER, f"{name} is not in the roster with that key")
        answer = admission_of(journal, authority, federation, request)
        journal.note(_now_ms(), "renewed", {"path": name})
    return answer


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
