"""`tundish edge import` of a file of messages: what it is looked at for before it is left to the gateway.

The gateway verifies each message anew. What is told here is what a person got wrong: the file, or the folder.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker import stick
from broker.database import is_there
from broker.messages import ModelManifest, open_envelope
from broker.topics import Accepted, Local, Manifest, ReceiptFor, Status, Topic, Uplink, parse
from edge.config import Config
from edge.store import ledger_lines
from models.commandline import counted
from models.errors import PeerError, UserError

_GIVE = "give what tundish broker export wrote for this gateway"
_KINDS = {"session", "request-made", "federation-pinned", "imported"}
Entries = Sequence[tuple[str, int, dict[str, Any]]]


def entries_of(folder: Path, config: Config, remedy: str) -> Entries:
    """(kind, time in ms, body) of what a gateway's ledger says of who it is; UserError unless it is this one's."""
    if not is_there(folder / "state.db"):
        raise UserError("--state", 0, "", f"no gateway has its state in {folder}", remedy)
    found = [(one["kind"], one["time_ms"], one["body"]) for one in map(json.loads, ledger_lines(folder))]
    entries = [entry for entry in found if entry[0] in _KINDS]
    path = next((body["path"] for *_, body in reversed(entries) if "path" in body), "")
    if path and path != str(config.path):
        problem = f"{folder} is the state of {path}, this gateway is {config.path}"
        raise UserError("--state", 0, "", problem, remedy)
    return entries


def import_messages(file: Path, config: Config, folder: Path) -> int:
    """Leave a file to the gateway whose state that is; UserError where nothing of it is for it."""
    messages = stick.read(file)
    entries = entries_of(folder, config, "write the --state that tundish edge run has")
    _check(str(file), messages, config, *_federation(config, entries))
    before = _imported(entries, stick.digest(messages))
    stick.leave(folder, file)
    count = counted(len(messages), "message")
    if before is None:
        print(f"{count}; the gateway takes them within a second, or when it is started")
    else:
        when = f"{datetime.fromtimestamp(before / 1000, UTC):%Y-%m-%d %H:%M} UTC"
        print(f"nothing new in it: {count}, which the gateway took on {when}; it takes them once more")
    return 0


def _federation(config: Config, entries: Entries) -> tuple[str, bytes]:
    """Name and key of the federation that this gateway trusts, or will at its next start."""
    wanted = config.federation
    if wanted.name and wanted.key:
        return wanted.name, bytes.fromhex(wanted.key)
    for kind, _, body in reversed(entries):
        if kind == "federation-pinned":
            return body["federation"], bytes.fromhex(body["key"])
    remedy = "enrol it first: tundish edge export --request FILE, and import what the operator answers"
    raise UserError("--state", 0, "", "this gateway trusts no federation yet", remedy)


def _imported(entries: Entries, digest: str) -> int | None:
    """When the gateway took that file, if it did since it trusts the federation that it does."""
    for kind, time_ms, body in reversed(entries):
        if kind == "federation-pinned":
            return None
        if kind == "imported" and body["sha256"] == digest:
            return time_ms
    return None


def _check(place: str, messages: stick.Messages, config: Config, name: str, key: bytes) -> None:
    if not messages:
        raise UserError(place, 0, "", "holds no message", _GIVE)
    try:
        topics: list[tuple[Topic, bytes]] = [(parse(topic), payload) for topic, payload in messages]
    except PeerError as error:
        raise UserError(place, 0, "", f"is damaged: {error.detail}", "copy it again") from error
    signed = list[bool]()
    for topic, payload in topics:
        if isinstance(topic, Uplink | Accepted | Status | Local):
            problem = "holds what a gateway says to the aggregator, which takes it by tundish broker import"
            raise UserError(place, 0, "", problem, _GIVE)
        if topic.federation != name:
            raise UserError(place, 0, "", f"is of federation {topic.federation}, this gateway follows {name}", _GIVE)
        # Of an update, or an empty one, by which `broker export` says whose file it is.
        if isinstance(topic, ReceiptFor) and topic.path != config.path:
            raise UserError(place, 0, "", f"is for {topic.path}, this is {config.path}", _GIVE)
        if isinstance(topic, Manifest):
            signed.append(_is_signed(topic, payload, key))
    if not any(signed):
        what = f"by the key {key.hex()} of federation {name}, which this gateway trusts"
        raise UserError(place, 0, "", f"has no model that is signed {what}", _GIVE)


def _is_signed(topic: Manifest, payload: bytes, key: bytes) -> bool:
    try:
        open_envelope(payload, topic.topic, key, ModelManifest)
    except PeerError as error:
        return error.reason == "schema"  # of a newer version
    return True
