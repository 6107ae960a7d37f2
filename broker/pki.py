"""The federation's certificate authority: who may open a connection to the broker, and under which name.

    ca.pem, ca.key              the authority, made once by `tundish broker init`; the key stays where it was made
    broker.pem, broker.key      what the MQTT broker shows
    aggregator.pem, .key        what the aggregator shows
    enrolment.pem, .key         what the listener for enrolment shows, where there is one
    operators/NAME.pem, .key    what people show who read scores and give feedback
    bridges/SITE/               what a site's broker needs to forward to the federation's, `/` written as `+`
    issued/NAME.pem             the certificates of each name, oldest first, `/` written as `+`
    crl.pem                     serial numbers that are no longer good

Certificates are X.509 version 3 (RFC 5280) on P-256. A name is put there by the operator, as the common name and a
`urn:tundish:` URI; of a certificate request (RFC 2986) the public key is taken, and nothing else.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.settings import is_loopback
from models.errors import LocalError, PeerError, UserError

Role = Literal["broker", "client"]
PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey | rsa.RSAPublicKey

AGGREGATOR, OPERATORS, ENROLMENT, BRIDGES = "aggregator", "operators", "enrolment", "bridges"
# The standard's bound of a common name (RFC 5280, ub-common-name), which OpenSSL keeps.
MOST_NAME = 64
MOST_REQUEST = 16 * 1024
_DAYS = 90
_CA_DAYS = 3650
# An expired list would shut everybody out, so it lives as long as the authority; a new one replaces it at once.
_CRL_DAYS = _CA_DAYS
_LEAST_RSA_BITS = 2048
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
# A machine whose clock is a little behind must not find its new certificate to be of the future.
_EARLIER = timedelta(hours=1)


class Authority:
    """The CA in a folder."""

    def __init__(self, folder: Path, key_file: Path | None = None) -> None:
        """Load it; UserError where there is none, LocalError where it can't be read."""
        self.folder = folder
        try:
            self.certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
            key = serialization.load_pem_private_key((key_file or folder / "ca.key").read_bytes(), None)
        except FileNotFoundError as error:
            remedy = "write the --state of tundish broker init, or run that first: it makes the authority"
            raise UserError("--state", 0, "", f"{error.filename} is not there", remedy) from None
        except (OSError, ValueError) as error:
            raise LocalError(f"the authority in {folder} can't be read: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise LocalError(f"{folder / 'ca.key'} is no key of this program")
        self._key = key

    @classmethod
    def create(cls, folder: Path, federation: str, hosts: Sequence[str]) -> "Authority":
        """Make the authority, and keys and certificates of broker (for `hosts`) and aggregator; never a second time."""
        if (folder / "ca.key").exists():
            remedy = "it is made once: every certificate hangs on it; as long as none is out, remove it to begin again"
            raise UserError(str(folder), 0, "", "there is an authority already", remedy)
        for host in hosts:
            _general_name(host)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        key, name = ec.generate_private_key(ec.SECP256R1()), _name(f"tundish {federation}"[:MOST_NAME])
        builder = _begun(name, name, key.public_key(), _CA_DAYS)
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .sign(key, hashes.SHA256())
        )
        write_file(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
        part = folder / "ca.key.part"
        write_file(part, key_pem(key), secret=True)
        made = cls(folder, part)
        made._revoke_serials((), ())
        made.make_pair("broker", "broker", hosts)
        made.make_pair(AGGREGATOR, "client")
        # Last: an authority that was only half made is made again.
        part.rename(folder / "ca.key")
        return made

    def renew(self) -> list[Path]:
        """Make the pairs anew that were made here and have less than a third of their time left; return those."""
        pairs: list[tuple[Path, Role]] = [(self.folder / "broker.pem", "broker")]
        pairs += [(self.folder / f"{AGGREGATOR}.pem", "client")]
        pairs += [(path, "client") for path in sorted((self.folder / OPERATORS).glob("*.pem"))]
        pairs += [(path, "client") for path in sorted((self.folder / BRIDGES).glob("*/bridge.pem"))]
        old = [(path, role) for path, role in pairs if not _lasts(path)]
        for path, role in old:
            file = str(path.relative_to(self.folder).with_suffix(""))
            self.make_pair(file, role, _hosts(path), name=_common_name(path))
        return [path for path, _ in old]

    def brokers_host(self, *, far: bool = False) -> str:
        """Return the first name or address by which the MQTT broker is reached; LocalError if there is none.

        From `far`, one that is not this machine itself goes first.
        """
        try:
            hosts = _hosts(self.folder / "broker.pem")
            return min(hosts, key=is_loopback) if far else hosts[0]
        except (OSError, ValueError, IndexError) as error:
            raise LocalError(f"{self.folder / 'broker.pem'} names no host: {error}") from error

    def server_pair(self, host: str) -> tuple[Path, Path]:
        """Return certificate and key of the listener for enrolment, made anew for another host or when they run out."""
        path = self.folder / f"{ENROLMENT}.pem"
        if not path.is_file() or not _lasts(path) or _hosts(path) != [str(_general_name(host).value)]:
            self.make_pair(ENROLMENT, "broker", [host])
        return path, path.with_suffix(".key")

    def make_pair(self, file: str, role: Role, hosts: Sequence[str] = (), *, name: str = "") -> None:
        """Make a key and its certificate here, for `name` (or `file`): of who lives on the aggregator's own machine."""
        key = ec.generate_private_key(ec.SECP256R1())
        write_file(self.folder / f"{file}.key", key_pem(key), secret=True)
        write_file(self.folder / f"{file}.pem", self.issue(key.public_key(), name or file, role, hosts))

    def issue(self, key: PublicKey, name: str, role: Role, hosts: Sequence[str] = (), days: int = _DAYS) -> bytes:
        """Certify a public key under a name (PEM); UserError for a name that is too long for a certificate."""
        if not 0 < len(name) <= MOST_NAME:
            raise UserError(name, 0, "", f"{len(name)} characters", f"a certificate's name has {MOST_NAME} at most")
        uri = x509.UniformResourceIdentifier(f"urn:tundish:{name}")
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if role == "broker" else ExtendedKeyUsageOID.CLIENT_AUTH
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _begun(_name(name), self.certificate.subject, key, days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectAlternativeName([uri, *map(_general_name, hosts)]), critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        (self.folder / "issued").mkdir(exist_ok=True, mode=0o700)
        before = self._issued(name).read_bytes() if self._issued(name).is_file() else b""
        write_file(self._issued(name), before + pem)
        return pem

    def revoke(self, name: str) -> int:
        """Put every certificate of a name on the list; return how many are new, LocalError if it never had one."""
        try:
            issued = x509.load_pem_x509_certificates(self._issued(name).read_bytes())
        except OSError:
            raise LocalError(f"{name} has no certificate of this authority") from None
        old = x509.load_pem_x509_crl((self.folder / "crl.pem").read_bytes())
        serials = {one.serial_number for one in issued} - {entry.serial_number for entry in old}
        self._revoke_serials(old, serials)
        return len(serials)

    def is_revoked(self, name: str) -> bool:
        """Whether a name had certificates, and none is left that counts."""
        try:
            issued = x509.load_pem_x509_certificates(self._issued(name).read_bytes())
        except OSError:
            return False
        revoked = x509.load_pem_x509_crl((self.folder / "crl.pem").read_bytes())
        return all(revoked.get_revoked_certificate_by_serial_number(one.serial_number) for one in issued)

    def _issued(self, name: str) -> Path:
        return self.folder / "issued" / f"{name.replace('/', '+')}.pem"

    def _revoke_serials(self, before: Iterable[x509.RevokedCertificate], serials: Iterable[int]) -> None:
        """Write the list: what was on it, each with its day, and what is revoked now."""
        now = datetime.now(UTC)
        builder = x509.CertificateRevocationListBuilder(
            self.certificate.subject, now - _EARLIER, now + timedelta(days=_CRL_DAYS)
        )
        for entry in before:
            builder = builder.add_revoked_certificate(entry)
        for serial in sorted(serials):
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
            builder = builder.add_revoked_certificate(entry)
        crl = builder.sign(self._key, hashes.SHA256())
        write_file(self.folder / "crl.pem", crl.public_bytes(serialization.Encoding.PEM))


def _lasts(path: Path) -> bool:
    """Whether a certificate has more than a third of its time left."""
    left = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc - datetime.now(UTC)
    return left > timedelta(days=_DAYS / 3)


def _common_name(path: Path) -> str:
    (name,) = x509.load_pem_x509_certificate(path.read_bytes()).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(name.value)


def _hosts(path: Path) -> list[str]:
    """Names and addresses that a certificate is for."""
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.DNSName) + [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]


def make_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Ask for a certificate of a key (DER). It names nobody: whoever signs it says whom."""
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def requested_key(request: bytes) -> PublicKey:
    """Return the key that a peer's request (DER) proves to hold; PeerError("request")."""
    if len(request) > MOST_REQUEST:
        raise PeerError("request", f"{len(request)} bytes, at most {MOST_REQUEST}")
    try:
        parsed = x509.load_der_x509_csr(request)
        proven, key = parsed.is_signature_valid, parsed.public_key()
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise PeerError("request", f"no certificate request: {error}") from error
    if not proven:
        raise PeerError("request", "its signature is not by the key that it names")
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _LEAST_RSA_BITS:
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    raise PeerError("request", "a key that is none of P-256, P-384, Ed25519 and RSA of 2048 bits or more")


def _begun(subject: x509.Name, issuer: x509.Name, key: PublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    if not _HOST.fullmatch(host):
        raise UserError("--host", 0, "", f"{host!r} is no host", "write a name or an address")
    return x509.DNSName(host)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a private key as PEM, PKCS 8 (RFC 5958), without a password: its file is the owner's alone."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def write_file(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Replace a file whole; a secret one was never readable by others."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
