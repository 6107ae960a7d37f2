"""`tundish broker init`, `enrol` and `acl`: the operator's hand on keys, roster and the MQTT broker's files."""

import argparse
import shutil
import sys
import time
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from broker import admission
from broker.acl import BRIDGE_FOLDER, bridge_conf, listener_of, mosquitto_conf
from broker.acl import acl as access_list
from broker.config import FederationConfig
from broker.database import blame_disk
from broker.enrolment import admission_of, admit, make_token, url_of
from broker.est import VALID_S
from broker.journal import Journal
from broker.messages import KEY_BYTES, Request
from broker.pki import AGGREGATOR, BRIDGES, ENROLMENT, MOST_NAME, OPERATORS, Authority
from broker.settings import MqttSettings, endpoint, is_loopback
from broker.topics import GatewayPath, segment
from models.commandline import counted
from models.errors import PeerError, TundishError, UserError

_BROKERS_FILES = ("ca.pem", "broker.pem", "broker.key", "crl.pem")
_MOST_PORT, _MQTTS_PORT = 65_535, 8883


def folder(state: Path) -> Path:
    """Where the authority is."""
    return state / "pki"


def init(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Make the authority; say what comes next."""
    there = endpoint(config.mqtt.url).host
    hosts = args.host or ["localhost" if is_loopback(there) else there]
    with blame_disk(folder(state)):
        made = Authority.create(folder(state.resolve()), config.name, hosts)
    print(f"the authority of {config.name} is {made.folder / 'ca.pem'}; its key {made.folder / 'ca.key'} stays here")
    print(f"the MQTT broker's certificate is for {', '.join(hosts)}: gateways reach it by no other name")
    print("[mqtt] of federation.toml:")
    for key, name in (("ca", "ca.pem"), ("cert", f"{AGGREGATOR}.pem"), ("key", f"{AGGREGATOR}.key")):
        print(f'  {key} = "{made.folder / name}"')
    print("then: tundish broker enrol for each gateway, and tundish broker acl for the MQTT broker")
    return 0


def enrol(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Put a gateway into the roster by its key or its request, or take it out."""
    path = gateway_path(args.path, config)
    if args.end_connection and not args.revoke:
        remedy = "it goes with --revoke, after tundish broker acl and a reload of the MQTT broker"
        raise UserError("--end-connection", 0, "", "of one who may come back at once", remedy)
    if args.request is not None and args.out is None:
        raise UserError("--out", 0, "", "missing", "name the file that goes back to the gateway")
    with closing(Journal(state)) as journal:
        if args.revoke and config.join != "enrolled":
            remedy = 'write join = "enrolled" first, or its key is taken when it is next seen'
            raise UserError("--revoke", 0, "", f'join = "{config.join}" lets anybody in', remedy)
        if args.revoke:
            return _revoke(journal, str(path), state, config.mqtt if args.end_connection else None)
        if args.key is not None:
            return _admit(journal, str(path), _key(args.key), "key", state)
        if args.request is None:
            return _token(args, config, journal, str(path), state)
        request = admission.read(args.request, Request)
        if request.path != str(path):
            problem = f"is of {request.path}, not of {path}"
            raise UserError(str(args.request), 0, "", problem, "write the gateway's own path, or give its own file")
        _check_length(str(path))
        try:
            answer = admission_of(journal, Authority(folder(state)), config.name, request)
        except PeerError as error:
            raise UserError(str(args.request), 0, "", error.detail, "make it again on the gateway") from error
        admission.write(args.out, journal.signer(), answer)
        _admit(journal, str(path), request.public_key, "file", state)
    print(
        f"{args.out} goes back to the gateway: tundish edge import {args.out.name} -c gateway.toml, "
        "with the --state that it runs with"
    )
    print("tundish broker acl writes the access list anew")
    return 0


def _token(args: argparse.Namespace, config: FederationConfig, journal: Journal, path: str, state: Path) -> int:
    """Print what an engineer pastes on the gateway; the journal keeps a hash of it."""
    if config.enrolment is None:
        remedy = 'write [enrolment] listen = "0.0.0.0:8443" for a token, or give --key, --request or --revoke'
        raise UserError(str(args.config), 0, "enrolment", "missing", remedy)
    if args.out is not None:
        raise UserError("--request", 0, "", "missing", "--out goes with --request FILE; a token goes without both")
    _check_length(path)
    authority = Authority(folder(state))
    token = make_token(journal, authority, path, url_of(authority, config.enrolment))
    print(token.text)
    print(
        f"within {VALID_S // 60} minutes, once, on the gateway of {path}: "
        "tundish edge import 'TOKEN' -c gateway.toml, with the --state that it runs with",
        file=sys.stderr,
    )
    print("then tundish broker acl writes the access list anew", file=sys.stderr)
    return 0


def acl(args: argparse.Namespace, config: FederationConfig, state: Path) -> int:
    """Write what Mosquitto reads: certificates, revocations, access list, and its configuration."""
    out: Path = args.out.resolve()  # what is written names it, for a server that starts anywhere
    port = _port(out, config) if args.port is None else args.port
    if not 0 < port <= _MOST_PORT:
        raise UserError("--port", 0, "", f"{port} is no port", f"write 1 to {_MOST_PORT}")
    authority = Authority(folder(state))
    for name in args.revoke_operator:
        _revoke_operator(authority, name)
    for name in args.operator:
        _certify_operator(authority, name)
    for site in args.revoke_bridge:
        _revoke_bridge(authority, site)
    for site in args.bridge:
        _certify_bridge(authority, site, port, config)
    for path in authority.renew():
        if path.name == "bridge.pem":
            print(f"{path.parent} has another certificate: carry it over to that site's broker again")
    with closing(Journal(state)) as journal:
        gateways = sorted(journal.roster())
    operators = sorted(p.stem for p in (authority.folder / OPERATORS).glob("*.pem"))
    bridges = _bridges(authority)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in _BROKERS_FILES:
            shutil.copy(authority.folder / name, out / name)
        (out / "acl").write_text(access_list(config.name, gateways, operators, bridges), encoding="ascii")
        (out / "mosquitto.conf").write_text(mosquitto_conf(out, port, len(gateways) + len(bridges)), encoding="utf-8")
    except OSError as error:
        raise UserError(str(out), 0, "", f"can't be written: {error.strerror}", "name another folder") from error
    may = (gateways, "gateway"), (operators, "operator"), (bridges, "bridge")
    print(f"{out}: port {port}, {', '.join(counted(len(those), name) for those, name in may)}")
    print(f"first time: include_dir {out} in mosquitto.conf; chown -R mosquitto {out}, so that Mosquitto may read it")
    print(
        "after a change: systemctl reload mosquitto; one who was revoked and is connected is deaf and mute from then on"
    )
    return 0


def _port(out: Path, config: FederationConfig) -> int:
    """The port that an earlier `acl` wrote, else the one at which the aggregator looks for the broker with TLS."""
    with suppress(OSError, ValueError):
        if port := listener_of((out / "mosquitto.conf").read_text(encoding="utf-8")):
            return port
    where = endpoint(config.mqtt.url)
    return where.port if where.tls else _MQTTS_PORT


def _certify_operator(authority: Authority, name: str) -> None:
    try:
        segment(name)
    except PeerError as error:
        raise UserError("--operator", 0, "", error.detail, "write a short name") from error
    if name in {AGGREGATOR, ENROLMENT}:
        raise UserError("--operator", 0, "", f"{name!r} is the aggregator's own name", "write another")
    people = authority.folder / OPERATORS
    people.mkdir(exist_ok=True, mode=0o700)
    if not (people / f"{name}.pem").exists():
        authority.make_pair(f"{OPERATORS}/{name}", "client", name=name)
        print(f"{people / name}.pem and .key are for {name}")


def _revoke_operator(authority: Authority, name: str) -> None:
    files = [authority.folder / OPERATORS / f"{name}.{end}" for end in ("pem", "key")]
    if not files[0].exists():
        known = ", ".join(sorted(path.stem for path in files[0].parent.glob("*.pem"))) or "none"
        raise UserError("--revoke-operator", 0, "", f"no operator {name!r}", f"there are: {known}")
    authority.revoke(name)
    for file in files:
        file.unlink(missing_ok=True)
    print(f"{name} is an operator no more")


def _bridges(authority: Authority) -> list[str]:
    return sorted(path.parent.name.replace("+", "/") for path in (authority.folder / BRIDGES).glob("*/bridge.pem"))


def _certify_bridge(authority: Authority, site: str, port: int, config: FederationConfig) -> None:
    """Leave a folder for a site's broker: its certificate, and how it forwards."""
    try:
        enterprise = GatewayPath.parse(f"{site}/area/line/cell").enterprise
    except PeerError:
        raise UserError("--bridge", 0, "", f"{site!r} is no site", "write enterprise/site: acme/lyon") from None
    _check_root("--bridge", enterprise, config)
    if len(site) > MOST_NAME:
        raise UserError("--bridge", 0, "", f"{len(site)} characters", f"a certificate takes {MOST_NAME} at most")
    folder = authority.folder / BRIDGES / site.replace("/", "+")
    if not (folder / "bridge.pem").exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        authority.make_pair(f"{BRIDGES}/{folder.name}/bridge", "client", name=site)
    shutil.copy(authority.folder / "ca.pem", folder / "ca.pem")
    host = authority.brokers_host(far=True)
    (folder / "tundish-bridge.conf").write_text(bridge_conf(site, f"{host}:{port}"), encoding="utf-8")
    print(f"{folder} is for the broker of {site}: its files into {BRIDGE_FOLDER} there, readable by mosquitto alone")
    if is_loopback(host):
        remedy = "the certificate has no other --host of init; a broker elsewhere does not reach this one by that"
        print(f"  BUT its address is {host}: {remedy}", file=sys.stderr)


def _revoke_bridge(authority: Authority, site: str) -> None:
    known = _bridges(authority)
    if site not in known:
        raise UserError("--revoke-bridge", 0, "", f"no bridge {site!r}", f"there are: {', '.join(known) or 'none'}")
    authority.revoke(site)
    shutil.rmtree(authority.folder / BRIDGES / site.replace("/", "+"))
    print(f"{site} has no bridge any more")


def _check_length(path: str) -> None:
    if len(path) > MOST_NAME:
        raise UserError("--path", 0, "", f"{len(path)} characters", f"a certificate takes {MOST_NAME} at most")


def gateway_path(text: str, config: FederationConfig) -> GatewayPath:
    """Read `--path`; UserError if it is none, or below no root of the federation."""
    try:
        path = GatewayPath.parse(text)
    except PeerError as error:
        raise UserError("--path", 0, "", error.detail, "write acme/lyon/press/line4/cell2") from error
    _check_root("--path", path.enterprise, config)
    return path


def _check_root(option: str, enterprise: str, config: FederationConfig) -> None:
    if enterprise not in config.roots:
        raise UserError(option, 0, "", f"{enterprise!r} does not take part", f"roots are: {', '.join(config.roots)}")


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise UserError("--key", 0, "", "not an Ed25519 public key", "write the 64 hex digits that the gateway prints")
    return key


def _admit(journal: Journal, path: str, key: bytes, how: str, state: Path) -> int:
    was, _ = journal.revocations()
    with journal.transaction():
        before = journal.key_of(path)
        admit(journal, path, key, how)
    print(f"{path} may take part with key {key.hex()} (state: {state})")
    if before is None and path in was:
        print(f"it was revoked on {_day(was[path].since_ms)}, and is in again from now on")
    if how == "key" and (folder(state) / "ca.key").exists() and Authority(folder(state)).is_revoked(path):
        print("its certificate stays revoked: the MQTT broker refuses it without another, by --request FILE --out FILE")
        print("instead of --key, or by a token (--path alone, where federation.toml has [enrolment]); then broker acl")
    return 0


def _revoke(journal: Journal, path: str, state: Path, ends: MqttSettings | None) -> int:
    """Out of the roster at once, which ends what it may say; and its certificate onto the list, if it has one.

    With `ends`, its connection is closed too, by these settings.
    """
    key, was = journal.key_of(path), journal.revocations()[0].get(path)
    with journal.transaction():
        had_token = journal.remove_from_roster(path)
        if key is not None:
            journal.note(time.time_ns() // 1_000_000, "revoked", {"path": path, "key": key.hex()})
    if key is not None:
        print(f"{path} takes part no more (state: {state})")
    elif was is not None:
        print(f"{path} was already revoked on {_day(was.since_ms)} (state: {state})")
    if had_token:
        print(f"the token of {path} is no good any more")
    certified = _revoke_certificates(path, state, quiet=key is None and was is None)
    if ends is not None:
        from broker.kick import end_connection  # noqa: PLC0415 - no other command connects

        end_connection(ends, Authority(folder(state)), path)
        print(f"{path} is connected no more; it comes back if the MQTT broker has not been reloaded after broker acl")
    if key is None and was is None and not certified and not had_token:
        problem = f"{path} is not in the roster, and has no certificate and no token"
        raise UserError("--path", 0, "", problem, "write the path as tundish broker status shows it")
    return 0


def _revoke_certificates(path: str, state: Path, *, quiet: bool) -> bool:
    """Put every certificate of a gateway onto the list, and say so; whether it has any. `quiet`: not that it has none.

    Also where the roster has forgotten it: an earlier try may have ended between the two.
    """
    if not (folder(state) / "ca.key").exists():
        return False
    try:
        revoked = Authority(folder(state)).revoke(path)
    except TundishError as error:
        if not quiet:
            print(error)
        return False
    said = f"{counted(revoked, 'certificate')} of it revoked" if revoked else "its certificates were revoked before"
    print(f"{said}; tundish broker acl tells the MQTT broker")
    return True


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
