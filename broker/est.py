"""Enrolment over the network, what both sides know of it: the paths of EST (RFC 7030), the token, sizes and words.

`/cacerts` is EST's own: the authority's certificate in a certs-only PKCS 7, base64 (RFC 7030, 4.1.3). `/simpleenroll`
(HTTP Basic, the token as password; 3.2.3) and `/simplereenroll` (TLS with the certificate that is to be renewed) are
EST's requests with another body: where EST has a PKCS 10 and a PKCS 7, here go the signed `Request`, which holds the
PKCS 10 and the Ed25519 key, and the signed `Admission`, in a COSE_Sign1 each (`broker.admission`). Refusals have
one of WORDS as their text.
"""

import hashlib
import ipaddress
import re
import secrets
from typing import NamedTuple
from urllib.parse import urlsplit

from models.errors import UserError

CACERTS, ENROLL, REENROLL = (f"/.well-known/est/{name}" for name in ("cacerts", "simpleenroll", "simplereenroll"))
PKCS7_TYPE = "application/pkcs7-mime"
BODY_TYPE = 'application/cose; cose-type="cose-sign1"'
MOST_HEAD = 4 * 1024
MOST_BODY = 8 * 1024
MOST_ANSWER = 64 * 1024
VALID_S = 15 * 60
# Why not: of the token, of the path that the gateway believes to have, of its request, of a certificate's name.
EXPIRED, USED, UNKNOWN, OTHER_PATH, BAD, STRANGER = (
    "token-expired", "token-used", "token-unknown", "other-path", "request", "not-enrolled",
)  # fmt: skip

_SCHEME = "tundish+https"
_SECRET_BYTES = 24
_SECRET = re.compile(r"[A-Za-z0-9_-]{32}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class Token(NamedTuple):
    """What an engineer pastes: where to enrol, the proof that one may, and whom to believe there.

    `fingerprint` is the SHA-256 of the authority's certificate (DER), in hex. `repr` and logs never show the secret.
    """

    url: str
    secret: str
    fingerprint: str

    def __repr__(self) -> str:
        return f"Token({self.url!r})"

    @property
    def text(self) -> str:
        """As `parse` reads it; what follows # would not be sent even by a browser."""
        return f"{_SCHEME}{self.url.removeprefix('https')}/#{self.secret}.{self.fingerprint}"

    @property
    def digest(self) -> bytes:
        """SHA-256 of the secret: 192 random bits need no slow hash."""
        return hashlib.sha256(self.secret.encode()).digest()

    @classmethod
    def new(cls, url: str, fingerprint: str) -> "Token":
        """Make one from the operating system's randomness."""
        return cls(url, secrets.token_urlsafe(_SECRET_BYTES), fingerprint)

    @classmethod
    def parse(cls, text: str) -> "Token":
        """Inverse of `text`; UserError."""
        try:
            parts = urlsplit(text.strip())
            secret, _, fingerprint = parts.fragment.partition(".")
            host, port = parts.hostname or "", parts.port
            whole = parts.scheme == _SCHEME and parts.path in ("", "/") and not parts.query and "@" not in parts.netloc
            if whole and port and is_host(host) and _SECRET.fullmatch(secret) and _FINGERPRINT.fullmatch(fingerprint):
                return cls(https(host, port), secret, fingerprint)
        except ValueError:
            pass
        remedy = "paste all of what tundish broker enrol printed, in quotes"
        raise UserError("TOKEN", 0, "", "is damaged, or not all of it is there", remedy)


def is_token(text: str) -> bool:
    """Whether that is meant to be a token, and no file."""
    return text.strip().startswith(f"{_SCHEME}:")


def is_host(text: str) -> bool:
    """Whether that is a name or an address, which a certificate can carry."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return _HOST.fullmatch(text) is not None
    return True


def https(host: str, port: int) -> str:
    """Write where a listener is; an IPv6 address goes into brackets."""
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"


def listen_address(text: str) -> tuple[str, int]:
    """Take `0.0.0.0:8443` or `[::]:8443` apart; ValueError."""
    parts = urlsplit(f"//{text}")
    if not parts.hostname or not parts.port or parts.netloc != text or "@" in text:
        raise ValueError(f"{text!r} is no address and port")
    ipaddress.ip_address(parts.hostname)
    return parts.hostname, parts.port
