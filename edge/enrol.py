"""Enrolment over the network (`broker.est`), the gateway's side: it blocks, so a running gateway takes a thread."""

import base64
import binascii
import http.client
import logging
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from broker import admission, est
from broker.messages import Admission, Request, Signer
from models.errors import LocalError, PeerError, UserError

log = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_AGAIN = "ask the operator for a new one: tundish broker enrol"
_TOKEN_REFUSED = {
    est.EXPIRED: "has expired",
    est.USED: "has been used",
    est.UNKNOWN: "is not known there: a newer one replaced it, or it was taken back",
}


def by_token(token: est.Token, signer: Signer, request: Request) -> Admission:
    """Enrol; the authority is fetched and compared before anything else is sent. UserError, LocalError, PeerError."""
    authority = fetch_authority(token)
    trust = ssl.create_default_context(cadata=authority)
    credentials = base64.b64encode(f"{request.path}:{token.secret}".encode()).decode()
    headers = {"Content-Type": est.BODY_TYPE, "Authorization": f"Basic {credentials}"}
    status, answer = _ask(token.url, trust, "POST", est.ENROLL, headers, admission.seal(signer, request))
    if status == http.client.OK:
        admitted = admission.unseal(answer, Admission)
        if admitted.authority != authority.encode():
            raise PeerError("authority", "the admission brings another authority than the token names")
        return admitted
    word = _word(answer)
    if word in _TOKEN_REFUSED:
        raise UserError("TOKEN", 0, "", _TOKEN_REFUSED[word], _AGAIN)
    if word == est.OTHER_PATH:
        remedy = "write the path that the operator meant as [gateway] path, or ask for a token with this one"
        raise UserError("TOKEN", 0, "", f"is for another path than {request.path}", remedy)
    raise LocalError(f"{token.url} answers {status} {word}; the aggregator's log says more")


def renew(url: str, signer: Signer, request: Request, files: tuple[Path, Path, Path]) -> Admission:
    """Renew the certificate of `files` (authority, certificate, key), which is shown; LocalError, PeerError."""
    ca, cert, key = files
    try:
        trust = ssl.create_default_context(cafile=ca)
        trust.load_cert_chain(cert, key)
    except OSError as error:
        raise LocalError(f"{cert}: can't be used: {error}; enrol this gateway again") from error
    body = admission.seal(signer, request)
    status, answer = _ask(url, trust, "POST", est.REENROLL, {"Content-Type": est.BODY_TYPE}, body)
    if status == http.client.OK:
        return admission.unseal(answer, Admission)
    if (word := _word(answer)) == est.STRANGER:
        raise LocalError(f"{url}: this gateway is not enrolled any more; ask the operator")
    raise LocalError(f"{url} answers {status} {word}; the aggregator's log says more")


def fetch_authority(token: est.Token) -> str:
    """Return the authority's certificate (PEM) that a token names, from a listener that nobody vouches for yet.

    RFC 7030, 4.1.1: the fingerprint that came another way decides. UserError for another one, LocalError for none.
    """
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    nobody.check_hostname, nobody.verify_mode = False, ssl.CERT_NONE
    status, answer = _ask(token.url, nobody, "GET", est.CACERTS, {}, None)
    if status != http.client.OK:
        raise LocalError(
            f"{token.url} answers {status}: no listener for enrolment; check [enrolment] of federation.toml"
        )
    found = cacerts(answer)
    fingerprint = found.fingerprint(hashes.SHA256()).hex()
    if fingerprint != token.fingerprint:
        problem = f"{token.url} is of the authority {fingerprint}, the token names {token.fingerprint}"
        remedy = "nothing was sent; ask the operator, for somebody else may answer there"
        raise UserError("TOKEN", 0, "", problem, remedy)
    return found.public_bytes(Encoding.PEM).decode()


def cacerts(body: bytes) -> x509.Certificate:
    """Read the one certificate of a /cacerts response (PKCS 7 in base64); PeerError."""
    try:
        found = pkcs7.load_der_pkcs7_certificates(base64.b64decode(b"".join(body.split()), validate=True))
    except (binascii.Error, ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise PeerError("cacerts", f"is no PKCS 7 of certificates: {type(error).__name__}") from error
    if len(found) != 1:
        raise PeerError("cacerts", f"{len(found)} certificates, one was expected")
    return found[0]


def _ask(
    url: str, trust: ssl.SSLContext, method: str, target: str, headers: Mapping[str, str], body: bytes | None
) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body, MOST_ANSWER bytes at most."""
    where = urlsplit(url)
    connection = http.client.HTTPSConnection(where.hostname or "", where.port, timeout=_TIMEOUT_S, context=trust)
    try:
        connection.request(method, target, body, dict(headers))
        answer = connection.getresponse()
        data = answer.read(est.MOST_ANSWER + 1)
    except ssl.SSLError as error:
        remedy = (
            "a certificate that was revoked or has expired needs a new token; else check clock and [enrolment] host"
        )
        raise LocalError(f"{url}: {error.reason or error}; {remedy}") from error
    except (OSError, http.client.HTTPException) as error:
        remedy = "check that the aggregator runs with [enrolment] listen, and that nothing on the way keeps us out"
        raise LocalError(f"{url} can't be reached: {error or type(error).__name__}; {remedy}") from error
    finally:
        connection.close()
    if len(data) > est.MOST_ANSWER:
        raise PeerError("size", f"{url} answers with more than {est.MOST_ANSWER} bytes")
    return answer.status, data


def _word(answer: bytes) -> str:
    """What a refusal says, fit for a terminal."""
    text = answer[:40].decode("ascii", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)
