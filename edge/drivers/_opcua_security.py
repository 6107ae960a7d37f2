"""OPC UA security: what a source asks for, its policy and mode and who its user is; certificates are `_opcua_pki`'s."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from asyncua import ua
from asyncua.client.client import Client
from asyncua.crypto import security_policies as policies
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from edge.drivers._common import option, refusal
from edge.drivers._opcua_pki import MOST_BYTES, SecurityError, check_server, own_identity, parse_chain
from edge.tags import Source

POLICIES: dict[str, Any] = {
    "Basic256Sha256": policies.SecurityPolicyBasic256Sha256,
    "Aes128_Sha256_RsaOaep": policies.SecurityPolicyAes128Sha256RsaOaep,
    "Aes256_Sha256_RsaPss": policies.SecurityPolicyAes256Sha256RsaPss,
}
MODES = {"Sign": ua.MessageSecurityMode.Sign, "SignAndEncrypt": ua.MessageSecurityMode.SignAndEncrypt}
OPTIONS: dict[str, type] = {
    "security": str,
    "user": str,
    "password_file": str,
    "user_certificate": str,
    "user_key": str,
}

_NONE = policies.SecurityPolicyNone.URI
_NAMES = {policy.URI: name for name, policy in POLICIES.items()} | {_NONE: "None"}


class UntrustedError(Exception):
    """The server takes no secure channel from this gateway: it does not trust its certificate, most likely."""


class Security:
    """What a source asks for: its policy and mode, and how it says who it is; UserError for what can't be meant."""

    def __init__(self, source: Source) -> None:
        asked = option(source, "security", "None")
        name, _, mode = asked.partition(":")
        if asked != "None" and (name not in POLICIES or mode not in MODES):
            remedy = f'write "None", or one of {", ".join(POLICIES)} with :Sign or :SignAndEncrypt'
            raise refusal(source, "security", f"{asked!r} is no policy and mode", remedy)
        self.asked = asked
        self.policy = POLICIES.get(name)
        self.mode = MODES.get(mode, ua.MessageSecurityMode.None_)
        self.user = option(source, "user", "")
        self._source = source
        self.read_user()
        if self.user and self.certificate:
            raise refusal(source, "user", "user and user_certificate exclude each other", "remove one of them")

    def read_user(self) -> None:
        """Read the files that say who the user is, anew for each connection; UserError."""
        self.password = _password(self._source)
        self.certificate, self.key = _user_pair(self._source)

    @property
    def exposed(self) -> str:
        """What is worth knowing of this choice; empty if nothing is."""
        return "the password travels without message security; set security" if self.user and not self.policy else ""

    @property
    def _folder(self) -> Path:
        """The PKI folder; SecurityError where there is none."""
        if not self._source.pki:
            raise SecurityError("no state folder for certificates is known; start with --state DIR")
        return Path(self._source.pki)

    def select(self, endpoints: Sequence[ua.EndpointDescription]) -> ua.EndpointDescription:
        """Return the endpoint of this policy and mode; SecurityError names those that the server has."""
        uri = self.policy.URI if self.policy else _NONE
        for found in endpoints:
            if found.SecurityPolicyUri == uri and found.SecurityMode == self.mode:
                return found
        names = offered(endpoints)
        remedy = f'write security = "{names[0]}"' if names else "enable one at the server"
        have = ", ".join(names) or "none that is safe"
        raise SecurityError(f"the server has no endpoint {self.asked}, it offers {have}; {remedy}")

    def check(self, endpoint: ua.EndpointDescription, host: str) -> x509.Certificate:
        """Check and return the server's certificate; blocks (RSA, disk), SecurityError."""
        folder, chain = self._folder, parse_chain(endpoint.ServerCertificate or b"")
        check_server(chain, folder, endpoint.Server.ApplicationUri or "", host)
        return chain[0]

    def secure(self, client: Client, endpoint: ua.EndpointDescription, host: str) -> None:
        """Check the server's certificate and set the client up for it; blocks (RSA, disk), SecurityError."""
        if self.policy is None:
            return
        server, own = self.check(endpoint, host), own_identity(self._folder)
        client.application_uri = own.uri
        policy = self.policy(server, own.certificate, own.key, self.mode)
        client.security_policy = policy
        client.uaclient.set_security(policy)


def offered(endpoints: Sequence[ua.EndpointDescription]) -> list[str]:
    """Name the policies and modes that a server has and we know, as they are written in gateway.toml, each once."""
    known = ((_NAMES.get(found.SecurityPolicyUri), found.SecurityMode.name) for found in endpoints)
    return list(dict.fromkeys(name if name == "None" else f"{name}:{mode}" for name, mode in known if name))


def _read(source: Source, key: str) -> bytes:
    file = option(source, key, "")
    if not file:
        return b""
    try:
        with Path(file).open("rb") as opened:
            return opened.read(MOST_BYTES)
    except OSError as error:
        raise refusal(source, key, f"{file} can't be read", "check its path and permissions") from error


def _password(source: Source) -> str:
    try:
        return _read(source, "password_file").decode().strip()
    except UnicodeDecodeError as error:
        raise refusal(source, "password_file", "is not UTF-8 text", "save it as UTF-8") from error


def _user_pair(source: Source) -> tuple[x509.Certificate | None, RSAPrivateKey | None]:
    """Read a user's certificate and its key, which must belong together."""
    blob, key_blob = _read(source, "user_certificate"), _read(source, "user_key")
    if not blob and not key_blob:
        return None, None
    try:
        pem = b"-----BEGIN" in blob
        certificate = x509.load_pem_x509_certificate(blob) if pem else x509.load_der_x509_certificate(blob)
    except ValueError as error:
        remedy = "name a certificate file, DER or PEM, beside user_key"
        raise refusal(source, "user_certificate", "is no certificate", remedy) from error
    try:
        pem = b"-----BEGIN" in key_blob
        load = serialization.load_pem_private_key if pem else serialization.load_der_private_key
        key = load(key_blob, None)
    except (ValueError, TypeError) as error:
        remedy = "name the key's file, PEM or DER, without a pass phrase"
        raise refusal(source, "user_key", "is no private key", remedy) from error
    if not isinstance(key, RSAPrivateKey) or key.public_key() != certificate.public_key():
        raise refusal(source, "user_key", "is not the RSA key of user_certificate", "name the two that belong together")
    return certificate, key
