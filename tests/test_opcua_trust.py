"""Which servers a gateway trusts: OPC UA Part 4, 6.1.3, on real certificates in a real folder."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from edge.drivers._opcua_pki import SecurityError, check_server, make_identity, own_identity, parse_chain
from edge.drivers.opcua import Driver
from edge.tags import Source
from models.errors import UserError
from tests.opcua_rigs import der, write_identity
from tests.rigs import Collector

URI, HOST = "urn:plc", "10.0.0.10"


class Authority:
    """A certificate authority, by itself or below another one."""

    def __init__(self, name: str, above: "Authority | None" = None, days: int = 30, *, ca: bool = True) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.key = rsa.generate_private_key(65537, 2048)
        self.certificate = (above or self).issue(self.name, self.key, days=days, ca=ca)

    def issue(self, name: x509.Name, key: Any, days: int = 30, *, ca: bool = False) -> x509.Certificate:
        end = datetime.now(UTC) + timedelta(days=days)
        san = x509.SubjectAlternativeName(
            [x509.UniformResourceIdentifier(URI), x509.DNSName("plc.local"), x509.DNSName(HOST)]
        )
        builder = x509.CertificateBuilder(self.name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(end - timedelta(days=60)).not_valid_after(end)
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        return builder.add_extension(san, critical=False).sign(self.key, hashes.SHA256())

    def server(self, days: int = 30, bits: int = 2048) -> x509.Certificate:
        key = rsa.generate_private_key(65537, bits)
        return self.issue(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "plc")]), key, days)


ROOT = Authority("root")
MIDDLE = Authority("middle", ROOT)
STALE = Authority("stale", ROOT, days=-1)
NO_CA = Authority("no CA", ROOT, ca=False)


def trust(pki: Path, *certificates: x509.Certificate, form: Encoding = Encoding.DER) -> None:
    (pki / "trusted").mkdir(exist_ok=True, parents=True)
    for number, certificate in enumerate(certificates):
        suffix = "der" if form is Encoding.DER else "pem"
        (pki / "trusted" / f"{number}.{suffix}").write_bytes(certificate.public_bytes(form))


@pytest.mark.parametrize("form", [Encoding.DER, Encoding.PEM])
def test_a_server_is_trusted_by_its_own_certificate_or_its_authoritys(tmp_path: Path, form: Encoding) -> None:
    server, below = ROOT.server(), MIDDLE.server()
    trust(tmp_path / "own", server, form=form)
    check_server([server], tmp_path / "own", URI, HOST)
    trust(tmp_path / "root", ROOT.certificate, form=form)
    check_server([server], tmp_path / "root", URI, "PLC.local")
    check_server([below, MIDDLE.certificate], tmp_path / "root", URI, HOST)
    check_server(parse_chain(der(below) + der(MIDDLE.certificate)), tmp_path / "root", URI, HOST)
    with pytest.raises(SecurityError, match="not trusted"):
        check_server([below], tmp_path / "root", URI, HOST)  # the authority between is missing
    with pytest.raises(SecurityError, match="not trusted"):
        check_server([below, MIDDLE.certificate], tmp_path / "own", URI, HOST)


@pytest.mark.parametrize("issuer", [STALE, NO_CA])
def test_an_issuer_that_is_none_vouches_for_nobody(tmp_path: Path, issuer: Authority) -> None:
    trust(tmp_path, ROOT.certificate)
    with pytest.raises(SecurityError, match="not trusted"):
        check_server([issuer.server(), issuer.certificate], tmp_path, URI, HOST)


@pytest.mark.parametrize(
    ("server", "uri", "host", "said"),
    [
        (ROOT.server(days=-1), URI, HOST, "is expired since .*; renew it at the server"),
        (ROOT.server(days=61), URI, HOST, "is not valid before .* check this gateway's clock"),
        (ROOT.server(), "urn:other", HOST, "is for urn:plc, the server is urn:other; make another"),
        (ROOT.server(), URI, "10.0.0.11", "is for plc.local, 10.0.0.10, not for 10.0.0.11; write one of these in url"),
        (ROOT.server(bits=1024), URI, HOST, "no RSA key of 2048 bits or more"),
    ],
)
def test_a_trusted_certificate_must_be_valid_and_the_servers_own(
    tmp_path: Path, server: x509.Certificate, uri: str, host: str, said: str
) -> None:
    trust(tmp_path, ROOT.certificate)
    with pytest.raises(SecurityError, match=said):
        check_server([server], tmp_path, uri, host)


def test_a_file_in_trusted_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    trust(tmp_path)
    (tmp_path / "trusted" / "broken.der").write_bytes(b"what?")
    with pytest.raises(SecurityError, match=r"\(broken\.der there can't be read\)"):
        check_server([ROOT.server()], tmp_path, URI, HOST)


def test_rejected_certificates_do_not_fill_the_disk(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    for number in range(60):
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"../{number}")])
        with pytest.raises(SecurityError):
            check_server([ROOT.issue(name, key)], tmp_path, URI, HOST)
    assert len(list((tmp_path / "rejected").iterdir())) == 50
    assert {path.name for path in tmp_path.iterdir()} == {"rejected", "trusted"}


@pytest.mark.parametrize("blob", [b"", b"\x30\x82\x00", b"x" * 70_000, b"\x30\x82\xff\xff" + b"\x00" * 300])
def test_bytes_that_are_no_certificate_are_refused(blob: bytes) -> None:
    with pytest.raises(SecurityError, match="certificate"):
        parse_chain(blob)


def test_the_gateways_certificate_is_made_once_and_is_its_own(tmp_path: Path) -> None:
    first, again = own_identity(tmp_path), own_identity(tmp_path)
    assert first.certificate == again.certificate
    names = first.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [first.uri]
    assert len(names.get_values_for_type(x509.DNSName)) == 1
    assert (tmp_path / "own" / "key.pem").stat().st_mode & 0o077 == 0
    (tmp_path / "own" / "key.pem").write_bytes(b"what?")
    with pytest.raises(SecurityError, match="remove it to have another made"):
        own_identity(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"security": "Basic128Rsa15:Sign"}, "security: .* is no policy and mode; write"),
        ({"security": "Basic256Sha256"}, "security: .* is no policy and mode"),
        ({"user": "ot", "password_file": "/nowhere"}, "password_file: /nowhere can't be read"),
        ({"user_certificate": "{pem}"}, "user_key: is no private key"),
        ({"user_certificate": "{pem}", "user_key": "{other}"}, "user_key: is not the RSA key of user_certificate"),
        ({"user_certificate": "{key}", "user_key": "{key}"}, "user_certificate: is no certificate"),
        ({"user": "ot", "user_certificate": "{pem}", "user_key": "{key}"}, "user: .* exclude each other"),
        ({"mode": "push"}, "mode: 'push' is no mode"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path: Path, options: dict[str, str], said: str) -> None:
    pem, key = write_identity(make_identity("urn:user", "user", []), tmp_path, "user")
    _, other = write_identity(make_identity("urn:user", "user", []), tmp_path, "other")
    filled: dict[str, object] = {name: value.format(pem=pem, key=key, other=other) for name, value in options.items()}
    made = Source(name="plc", driver="opcua", url="opc.tcp://h", tags=(), options=filled)
    with pytest.raises(UserError, match=said):
        Driver(made, Collector())
