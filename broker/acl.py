"""Pure: what the MQTT broker is told. Mosquitto 2: who may connect, and which topics each may write and read.

A connection is who its certificate says, its client id is bound to that name, and everything that is not granted is
refused. A gateway writes below its own path alone, and reads of the federation what is for all and its own receipts. A
site's own broker, bridged to the federation's, does so for all gateways of that site.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from broker.messages import MAX_PAYLOAD
from broker.pki import AGGREGATOR
from broker.topics import FL, RELEASE

# Of a message, beside its payload: the topic and MQTT's own fields.
_AROUND = 4096
_CONNECTIONS = 8  # beside gateways and bridges: aggregator, dashboards, and who comes back before he is gone
# Where a site's Mosquitto finds what `acl --bridge` wrote for it.
BRIDGE_FOLDER = Path("/etc/mosquitto/tundish")


def acl(federation: str, gateways: Iterable[str], operators: Iterable[str] = (), bridges: Iterable[str] = ()) -> str:
    """Write the access list; a `gateway` is a path, an `operator` the name in his certificate, a `bridge` a site."""
    tree, every = f"{FL}/{federation}", "+/+/+/+/+"
    lines = ["# Written by tundish broker acl. Read at start and on SIGHUP.", ""]
    lines += [f"user {AGGREGATOR}", f"topic readwrite {tree}/#", f"topic read {every}/{FL}/#", ""]
    for path in sorted(gateways):
        lines += [
            f"user {path}",
            *(f"topic write {path}/{part}/#" for part in (FL, "_inference", "_drift", "_health", "_raw")),
            f"topic read {path}/{FL}/status",
            f"topic read {path}/_feedback/#",
            *_for_all(tree),
            f"topic read {tree}/+/receipt/{path}",
            "",
        ]
    for site in sorted(bridges):
        lines += [
            f"user {site}",
            f"topic write {site}/+/+/+/{FL}/#",
            *_for_all(tree),
            f"topic read {tree}/+/receipt/{site}/#",
            "",
        ]
    for name in sorted(operators):
        lines += [
            f"user {name}",
            *(f"topic read {every}/{part}/#" for part in ("_inference", "_drift", "_health")),
            f"topic write {every}/_feedback/#",
            "",
        ]
    return "\n".join(lines)


def _for_all(tree: str) -> list[str]:
    """What a federation says to every gateway."""
    parts = ("status", f"{RELEASE}/#", "charter", "roster", "roster/+", "+/round", "+/model/#")
    return [f"topic read {tree}/{part}" for part in parts]


def mosquitto_conf(folder: Path, port: int, clients: int) -> str:
    """Write the listener's part of Mosquitto's configuration; the files that it names are in `folder`.

    `clients` is the number of gateways and bridges.
    """
    lines = [
        "# Written by tundish broker acl, for Mosquitto 2. It stays here: /etc/mosquitto/mosquitto.conf gets, once,",
        "# beside Debian's own `include_dir /etc/mosquitto/conf.d`, the line",
        f"# include_dir {folder}",
        "per_listener_settings false",
        f"listener {port}",
        f"cafile {folder / 'ca.pem'}",
        f"certfile {folder / 'broker.pem'}",
        f"keyfile {folder / 'broker.key'}",
        f"crlfile {folder / 'crl.pem'}",
        "tls_version tlsv1.2",
        "require_certificate true",
        "use_identity_as_username true",
        "use_username_as_clientid true",
        "allow_anonymous false",
        f"acl_file {folder / 'acl'}",
        f"max_packet_size {MAX_PAYLOAD + _AROUND}",
        f"max_connections {2 * clients + _CONNECTIONS}",
        "max_inflight_messages 64",
        "max_queued_messages 10000",
        "persistence true",
        "persistent_client_expiration 30d",
        "autosave_interval 60",
    ]
    return "\n".join([*lines, ""])


def listener_of(conf: str) -> int | None:
    """Return the port that a configuration of `mosquitto_conf` has."""
    found = re.search(r"^listener (\d{1,5})\s*$", conf, re.MULTILINE)
    return int(found[1]) if found else None


def bridge_conf(site: str, address: str) -> str:
    """Write what a site's Mosquitto needs to forward its gateways' federation traffic to `address` (host:port).

    Raw values, scores, drift, health and feedback match neither topic line, so they stay whatever a gateway publishes.
    """
    lines = [
        "# The site's Mosquitto, bridged to the federation's: include it beside the site's own settings.",
        "# `_fl` of every gateway goes up, `_fl` of the federation comes down, nothing else: add no topic line here.",
        "# The site's broker needs `persistence true` if what waits shall outlive its own restart.",
        f"connection tundish-{site.replace('/', '-')}",
        f"address {address}",
        f"remote_clientid {site}",
        f"bridge_cafile {BRIDGE_FOLDER / 'ca.pem'}",
        f"bridge_certfile {BRIDGE_FOLDER / 'bridge.pem'}",
        f"bridge_keyfile {BRIDGE_FOLDER / 'bridge.key'}",
        "bridge_insecure false",
        f"topic +/+/+/+/+/{FL}/# out 1",
        f"topic {FL}/# in 1",
        "# The session outlives a lost connection, so what waits at QoS 1 is not lost with it.",
        "cleansession false",
        "start_type automatic",
        "restart_timeout 5 60",
        "keepalive_interval 30",
        "# A bridge's state is the site's own business.",
        "notifications false",
        "# So retained plans and models arrive as retained. A broker that does not know the flag (not Mosquitto,",
        "# not EMQX) needs instead: bridge_protocol_version mqttv50",
        "try_private true",
    ]
    return "\n".join([*lines, ""])
