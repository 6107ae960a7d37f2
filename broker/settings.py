"""The `[mqtt]` table, the same in `gateway.toml` and `federation.toml`."""

import ipaddress
from pathlib import Path
from typing import Literal, NamedTuple, Protocol
from urllib.parse import urlsplit

import msgspec

from models.errors import UserError

_PORTS = {"mqtt": 1883, "mqtts": 8883}
_FILES = ("password_file", "ca", "cert", "key")
_MAX_KEEPALIVE_S = 65_535


class MqttSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to reach the broker.

    `url` is `mqtts://host[:8883]`, or `mqtt://host[:1883]` on loopback and, with `insecure`, elsewhere. `ca` is the
    PEM file that vouches for the broker (default: the system's), `cert` and `key` are this machine's. `version`
    "auto" tries MQTT 5, then 3.1.1. `keepalive_s` is in seconds.
    """

    url: str
    client_id: str | None = None
    username: str | None = None
    password_file: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    insecure: bool = False
    version: Literal["auto", "5", "3.1.1"] = "auto"
    keepalive_s: int = 15


class Endpoint(NamedTuple):
    """A url taken apart; `plain_remote` is True without TLS to another machine."""

    host: str
    port: int
    tls: bool
    plain_remote: bool


def endpoint(url: str) -> Endpoint:
    """Take `mqtt[s]://host[:port]` apart; ValueError says what is wrong with it."""
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError(f"{url!r} is no mqtt:// or mqtts:// url")
    if not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError(f"{url!r} is not a scheme, a host and a port alone")
    port = parts.port  # raises ValueError itself when it is not one
    tls = parts.scheme == "mqtts"
    return Endpoint(parts.hostname, port or _PORTS[parts.scheme], tls, not tls and not is_loopback(parts.hostname))


class Place(Protocol):
    """Where settings stand: a file by its name, and what an error in it looks like."""

    @property
    def name(self) -> str:
        """The file, from whose folder paths are meant."""

    def error(self, path: list[str | int], problem: str, remedy: str, /) -> UserError:
        """Build the error for a key."""


def check_mqtt(file: Place, settings: MqttSettings, made_by: str = "") -> MqttSettings:
    """Check the table; UserError at ["mqtt", key], which says by what a certificate that is not there is `made_by`.

    Returns the settings with their file names made absolute: they are meant relative to the file they stand in.
    """
    try:
        where = endpoint(settings.url)
    except ValueError as error:
        raise file.error(["mqtt", "url"], str(error), 'write "mqtts://broker.example:8883"') from None
    if where.plain_remote and not settings.insecure:
        remedy = "write mqtts://, or insecure = true if you accept that anybody on the way reads along"
        raise file.error(["mqtt", "url"], "mqtt:// without TLS to another machine", remedy)
    if bool(settings.cert) != bool(settings.key):
        raise file.error(["mqtt", "cert" if settings.cert else "key"], "cert and key go together", "write both or none")
    if not where.tls and (settings.ca or settings.cert):
        raise file.error(["mqtt", "url"], "certificates without TLS", "write mqtts://, or remove ca, cert and key")
    if settings.password_file and settings.username is None:
        raise file.error(["mqtt", "password_file"], "a password without a username", "add username = …")
    if not 1 <= settings.keepalive_s <= _MAX_KEEPALIVE_S:
        raise file.error(["mqtt", "keepalive_s"], "out of range", f"write 1 to {_MAX_KEEPALIVE_S} seconds")
    found: dict[str, str] = {}
    for key in _FILES:
        name = getattr(settings, key)
        if name is None:
            continue
        path = Path(file.name).absolute().parent / name
        _check_there(file, key, path, "" if key == "password_file" else made_by)
        found[key] = str(path)
    return msgspec.structs.replace(settings, **found)


def _check_there(file: Place, key: str, path: Path, more: str) -> None:
    try:
        there = path.is_file()
    except PermissionError:
        remedy = "let the user who runs this read it, or run this as its owner"
        raise file.error(["mqtt", key], f"{path}: Permission denied", remedy) from None
    if not there:
        raise file.error(["mqtt", key], f"no file {path}", f"check the path, which is relative to this file{more}")


def password_of(path: str | None) -> str | None:
    """Read a password file; UserError if that can't be done."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(path, 0, "password_file", f"can't be read: {error}", "write the password in it") from error


def is_loopback(host: str) -> bool:
    """Whether a name or address means the machine itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
