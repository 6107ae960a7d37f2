"""OPC UA certificates: this gateway's own, and which servers' are trusted.

The PKI folder (OPC 10000-12, 7.8; Part 4, 6.1.3 for the checks):

    own/cert.der, own/key.pem   this gateway's application instance certificate, made on first use (Part 6, 6.2.2)
    trusted/                    certificates of servers, or of the CAs that issued them; DER or PEM
    rejected/                   where the certificate of a server that is not trusted is put, to be moved by a person
"""

import contextlib
import ipaddress
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, generate_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

MOST_BYTES = 64 * 1024  # of one file or one certificate with its chain
_MOST_FILES = 1000  # read of trusted/
_MOST_REJECTED = 50  # kept in rejected/, the newest: a server can't fill the disk
_MOST_ISSUERS = 5  # between a server's certificate and a trusted CA
_YEARS = 20  # a gateway outlives the usual year, and its servers would have to trust it anew
_SUFFIXES = {".der", ".cer", ".crt", ".pem"}


class SecurityError(Exception):
    """A server was refused, or something here is missing; the text is one line with its remedy."""


class Identity(NamedTuple):
    """An application instance certificate with its key, and the application URI that stands in it."""

    certificate: x509.Certificate
    key: RSAPrivateKey
    uri: str


def application_uri() -> str:
    """Name this gateway to servers, where no certificate does."""
    return f"urn:{socket.gethostname()}:tundish"


# -- this gateway ----------------------------------------------------------------------------------------------------


def own_identity(pki: Path) -> Identity:
    """Return this gateway's certificate and key, made where there is none yet; SecurityError if they are of no use."""
    own = pki / "own"
    try:
        if not own.exists():
            _make_own(own)
        certificate = x509.load_der_x509_certificate((own / "cert.der").read_bytes())
        key = serialization.load_pem_private_key((own / "key.pem").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        problem = f"this gateway's certificate in {own} can't be read or made ({error})"
        raise SecurityError(f"{problem}; mend that folder, or remove it to have another made") from error
    uris = _names(certificate)[0]
    if not isinstance(key, RSAPrivateKey) or key.public_key() != certificate.public_key() or not uris:
        raise SecurityError(f"{own} holds no RSA certificate with an application URI and its key; mend or remove it")
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        problem = f"this gateway's own certificate is {_validity(certificate)}"
        raise SecurityError(f"{problem}; check the clock, or remove {own} to have another made")
    return Identity(certificate, key, uris[0])


def _make_own(own: Path) -> None:
    """Write a new key and certificate: a folder that appears whole, whoever else is at it."""
    own.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    identity = make_identity(application_uri(), "Tundish gateway", [socket.gethostname()])
    made = Path(tempfile.mkdtemp(prefix="own.", dir=own.parent))
    try:
        (made / "cert.der").write_bytes(identity.certificate.public_bytes(serialization.Encoding.DER))
        (made / "key.pem").touch(mode=0o600)
        (made / "key.pem").write_bytes(
            identity.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        with contextlib.suppress(OSError):  # another source was first: its folder is as good
            made.rename(own)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def make_identity(uri: str, name: str, hosts: Sequence[str], days: int = 365 * _YEARS) -> Identity:
    """Make a self-signed application instance certificate as Part 6, 6.2.2 wants it: RSA 2048, SHA-256."""
    key = generate_private_key(public_exponent=65537, key_size=2048)
    public = key.public_key()
    title = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = dict.fromkeys(("key_agreement", "crl_sign", "encipher_only", "decipher_only"), False)
    usage |= dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment"), True)
    usage |= dict.fromkeys(("data_encipherment", "key_cert_sign"), True)
    client_and_server = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(title, title, public, x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage(client_and_server), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *map(_general_name, hosts)]),
            critical=False,
        )
    )
    return Identity(builder.sign(key, hashes.SHA256()), key, uri)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# -- the server ------------------------------------------------------------------------------------------------------


def parse_chain(blob: bytes) -> list[x509.Certificate]:
    """Parse a server's certificate, and those of its issuers that it sent behind it; SecurityError."""
    chain: list[x509.Certificate] = []
    if len(blob) > MOST_BYTES:
        raise SecurityError(f"the server's certificate is {len(blob)} bytes long; replace it at the server")
    while blob and len(chain) <= _MOST_ISSUERS:
        size = 4 + int.from_bytes(blob[2:4], "big")  # an outer SEQUENCE with two bytes of length: 256 to 65,535
        try:
            chain.append(x509.load_der_x509_certificate(blob[:size]))
        except ValueError as error:
            raise SecurityError(f"the server's certificate can't be read ({error}); replace it there") from error
        blob = blob[size:]
    if not chain:
        raise SecurityError("the server has no certificate; make one there")
    return chain


def check_server(chain: Sequence[x509.Certificate], pki: Path, uri: str, host: str) -> None:
    """Refuse a server whose certificate is not trusted, not valid now, or not its own: SecurityError says which.

    `uri` is the application URI that the server says it has, `host` the one of the source's URL.
    """
    leaf = chain[0]
    trusted, broken = _read_trusted(pki / "trusted")
    if leaf not in trusted and not _issued(leaf, [*trusted, *chain[1:]], trusted):
        file = _reject(leaf, pki / "rejected")
        print_ = leaf.fingerprint(hashes.SHA256()).hex()
        note = f" ({', '.join(broken)} there can't be read)" if broken else ""
        problem = f"the server's certificate is not trusted: {_title(leaf)}, SHA-256 {print_}"
        raise SecurityError(f"{problem}; compare that at the server, then move {file} to {pki / 'trusted'}{note}")
    key = leaf.public_key()
    if not isinstance(key, RSAPublicKey) or key.key_size < 2048:  # noqa: PLR2004 - bits, Part 7 of all three policies
        raise SecurityError("the server's certificate has no RSA key of 2048 bits or more; make another at the server")
    if not leaf.not_valid_before_utc <= datetime.now(UTC) <= leaf.not_valid_after_utc:
        remedy = f"renew it at the server, or check this gateway's clock ({datetime.now(UTC):%Y-%m-%d %H:%M} UTC)"
        raise SecurityError(f"the server's certificate is {_validity(leaf)}; {remedy}")
    uris, hosts = _names(leaf)
    if uri not in uris:
        problem = f"the server's certificate is for {', '.join(uris) or 'no application URI'}, the server is {uri}"
        raise SecurityError(f"{problem}; make another at the server")
    if host.lower() not in hosts:
        problem = f"the server's certificate is for {', '.join(hosts) or 'no host'}, not for {host}"
        raise SecurityError(f"{problem}; write one of these in url, or make another certificate at the server")


def _read_trusted(folder: Path) -> tuple[list[x509.Certificate], list[str]]:
    """Return the certificates in trusted/, and the names of files that hold none."""
    found: list[x509.Certificate] = []
    broken: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir())[:_MOST_FILES]:
        if path.suffix.lower() not in _SUFFIXES:
            continue
        try:
            found += _read_certificates(path)
        except (OSError, ValueError):
            broken.append(path.name)
    return found, broken


def _read_certificates(path: Path) -> list[x509.Certificate]:
    """Read a file of one DER certificate or of PEM ones; OSError, ValueError."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError("too large for a certificate")
    data = path.read_bytes()
    if b"-----BEGIN" in data:
        return x509.load_pem_x509_certificates(data)
    return [x509.load_der_x509_certificate(data)]


def _issued(
    leaf: x509.Certificate, issuers: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate], depth: int = 0
) -> bool:
    """Say whether a chain of valid CA certificates leads from `leaf` to one of the anchors."""
    if depth >= _MOST_ISSUERS:
        return False
    for issuer in issuers:
        if (
            issuer != leaf
            and _is_authority(issuer)
            and _signed(leaf, issuer)
            and (issuer in anchors or _issued(issuer, issuers, anchors, depth + 1))
        ):
            return True
    return False


def _is_authority(certificate: x509.Certificate) -> bool:
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        return False
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _reject(leaf: x509.Certificate, folder: Path) -> Path:
    """Put a certificate where a person finds it, under its name and thumbprint; the oldest make room."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", _title(leaf))[:60]
    file = folder / f"{name}_{leaf.fingerprint(hashes.SHA1()).hex()}.der"  # noqa: S303 - the thumbprint that tools show
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        for old in sorted(folder.glob("*.der"), key=os.path.getmtime)[: 1 - _MOST_REJECTED]:
            old.unlink(missing_ok=True)
        file.write_bytes(leaf.public_bytes(serialization.Encoding.DER))
    return file


def _title(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    text = str(names[0].value) if names else certificate.subject.rfc4514_string()
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:100]


def _names(certificate: x509.Certificate) -> tuple[list[str], list[str]]:
    """Return the URIs of a certificate, and its DNS names and IP addresses."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return [], []
    hosts = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    hosts += [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return names.get_values_for_type(x509.UniformResourceIdentifier), hosts


def _validity(certificate: x509.Certificate) -> str:
    if certificate.not_valid_after_utc < datetime.now(UTC):
        return f"expired since {certificate.not_valid_after_utc:%Y-%m-%d}"
    return f"not valid before {certificate.not_valid_before_utc:%Y-%m-%d}"
