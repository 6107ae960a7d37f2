"""Pure: what the MQTT broker is told. Mosquitto 2: who may connect, and which topics each may write and read.

A connection is who its certificate says, its client id is bound to that name, and everything that is not granted is
refused. A gateway writes below its own path alone, and reads of the federation what is for all and its own receipts.
"""

from collections.abc import Iterable
from pathlib import Path

from broker.messages import MAX_PAYLOAD
from broker.pki import AGGREGATOR
from broker.topics import FL, RELEASE

# Of a message, beside its payload: the topic and MQTT's own fields.
_AROUND = 4096
_CONNECTIONS = 8  # beside the gateways: aggregator, bridges, dashboards, and who comes back before he is gone


def acl(federation: str, gateways: Iterable[str], operators: Iterable[str] = ()) -> str:
    """Write the access list; a `gateway` is a path, an `operator` the name in his certificate."""
    tree, every = f"{FL}/{federation}", "+/+/+/+/+"
    lines = ["# Written by tundish broker acl. Read at start and on SIGHUP.", ""]
    lines += [f"user {AGGREGATOR}", f"topic readwrite {tree}/#", f"topic read {every}/{FL}/#", ""]
    for path in sorted(gateways):
        lines += [
            f"user {path}",
            *(f"topic write {path}/{part}/#" for part in (FL, "_inference", "_drift", "_health", "_raw")),
            f"topic read {path}/{FL}/status",
            f"topic read {path}/_feedback/#",
            f"topic read {tree}/status",
            f"topic read {tree}/{RELEASE}/#",
            f"topic read {tree}/charter",
            f"topic read {tree}/+/round",
            f"topic read {tree}/+/model/#",
            f"topic read {tree}/+/receipt/{path}",
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


def mosquitto_conf(folder: Path, port: int, gateways: int) -> str:
    """Write the listener's part of Mosquitto's configuration; the files that it names are in `folder`."""
    lines = [
        "# Written by tundish broker acl, for Mosquitto 2: into /etc/mosquitto/conf.d/",
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
        f"max_connections {2 * gateways + _CONNECTIONS}",
        "max_inflight_messages 64",
        "max_queued_messages 10000",
        "persistence true",
        "persistent_client_expiration 30d",
        "autosave_interval 60",
    ]
    return "\n".join([*lines, ""])
