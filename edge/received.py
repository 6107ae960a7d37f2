"""What an aggregator did and received, from its ledger: who was let in, what came from whom, what it made of it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from broker.ledger import Head
from edge.page import Report, proof, utc

Body = dict[str, Any]


class Received(NamedTuple):
    """One entry; an empty text where a column says nothing."""

    entry: str
    time_utc: str
    what: str
    gateway: str = ""
    task: str = ""
    round: str = ""
    version: str = ""
    windows: str = ""
    payload_bytes: str = ""
    message_bytes: str = ""
    digest: str = ""
    detail: str = ""


_WORDS = {
    "token": "a token was made, by which a gateway may enrol over the network, once",
    "enrolled": "a gateway was let in, or its key replaced",
    "pinned": "a gateway's key was taken when it was first seen",
    "revoked": "a gateway was taken out",
    "renewed": "a gateway's certificate was renewed",
    "roster": "who is in, as it was signed for all",
    "charter": "a charter came into force, or none any more",
    "acceptance": "a gateway said which charter its site accepts",
    "task": "a task was taken up, or its text changed",
    "opened": "a round was opened: its plan went to all",
    "extended": "a round's deadline moved on, as too few updates were counted",
    "update": "a gateway's update was counted in a round",
    "refused": "a gateway's message could not be used (of each gateway the first 16 between two openings)",
    "vote": "a gateway voted on a new model, by its own holdout",
    "model": "a model was made: the first, one of what a round counted, or an earlier one again",
    "failed": "a round made no model",
    "kept": "the vote on a model ended, and it stays",
    "voted-down": "the vote on a model ended, and the one before takes its place",
    "done": "a task's last round is over",
    "release": "a model was released: gateways score with it",
    "release-key": "another online key signs releases",
}
_INTRO = (
    "All that the ledger has of these. An update that came late, twice or for another model is answered by a receipt, "
    "and is not in the ledger; nor are messages whose sender is not proven, which tundish broker status counts."
)
_MEANS = {
    "entry": "its number in the ledger",
    "gateway": "whose it is, by path",
    "windows": "that it was learnt from, or judged by; of a model, of all that were counted",
    "payload_bytes": "the weight delta alone; empty in entries of earlier versions",
    "message_bytes": "the whole message as it came, with signature and header",
    "digest": "SHA-256: of an update's message, a model's weights, a charter's or task's file, a roster's members",
}


def _value(body: Body, key: str) -> str:
    return "" if body.get(key) is None else str(body[key])


def _opened(body: Body) -> str:
    asked = f"; asked for by {body['asked']}" if body.get("asked") else ""
    under = f"; under charter {body['charter']}" if body.get("charter") else ""
    return f"from version {body.get('base')}, with {body.get('min_gateways')} gateways at least{asked}{under}"


def _model(body: Body) -> str:
    if "again" in body:
        return f"the weights of version {body['again']} again"
    return f"of {body['gateways']} gateways" if "gateways" in body else "the first"


def _ballot(body: Body) -> str:
    return f"{body.get('for')} for, {body.get('against')} against"


_DETAILS: dict[str, Callable[[Body], str]] = {
    "token": lambda b: f"good until {utc(b.get('expires_ms', 0))}",
    "enrolled": lambda b: f"key {b.get('key')}, by {b.get('how')}",
    "pinned": lambda b: f"key {b.get('key')}",
    "revoked": lambda b: f"key {b.get('key')}",
    "roster": lambda b: f"{b.get('gateways')} gateways of {b.get('enterprises')} enterprises",
    "charter": lambda b: str(b.get("title") or "none"),
    "acceptance": lambda b: "" if b.get("digest") else "no charter",
    "opened": _opened,
    "extended": lambda b: f"until {utc(b.get('deadline_ms', 0))}",
    "update": lambda b: str(b.get("outcome")),
    "refused": lambda b: f"{b.get('reason')}: {b.get('detail')}",
    "vote": lambda b: f"{b.get('verdict')}: {b.get('new')}, version {b.get('than')} has {b.get('old')}",
    "model": _model,
    "failed": lambda b: str(b.get("reason")),
    "kept": _ballot,
    "voted-down": _ballot,
    "release": lambda b: f"release {b.get('release')} for {b.get('channel')}",
    "release-key": lambda b: f"key {b.get('key')}",
}


def rows_of(entries: Iterable[dict[str, Any]]) -> list[Received]:
    """What an aggregator did, from the entries of its ledger, oldest first."""
    found = []
    for entry in entries:
        kind, body = entry["kind"], entry["body"]
        if kind not in _WORDS:
            continue
        columns = ("path", "task", "round", "version")
        gateway, task, number, version = (_value(body, key) for key in columns)
        windows = _value(body, "windows") or _value(body, "samples")
        sizes = _value(body, "bytes"), _value(body, "message_bytes")
        detail = _DETAILS[kind](body) if kind in _DETAILS else ""
        start = str(entry["seq"]), utc(entry["time_ms"]), kind
        found.append(Received(*start, gateway, task, number, version, windows, *sizes, _value(body, "digest"), detail))
    return found


def report(head: Head, entries: list[dict[str, Any]]) -> Report:
    """Make the page and table of an aggregator's ledger that holds; no rows where it is none's."""
    rows, inside = rows_of(entries), dict[str, None]()
    for row in rows:
        if row.what in {"enrolled", "pinned"}:
            inside[row.gateway] = None
        if row.what == "revoked":
            inside.pop(row.gateway, None)
    updates = [row for row in rows if row.what == "update"]
    size = sum(int(row.message_bytes) for row in updates if row.message_bytes.isdecimal())
    charter = next((row for row in reversed(rows) if row.what == "charter"), None)
    counts = {kind: sum(row.what == kind for row in rows) for kind in ("opened", "model", "release", "refused")}
    facts = [
        *proof(head),
        ("Gateways that are in", f"{len(inside)}: {', '.join(inside)}" if inside else "none"),
        ("Charter in force", f"{charter.detail} {charter.digest}".strip() if charter else "none"),
        ("Rounds opened, models made", f"{counts['opened']}, {counts['model']}"),
        ("Updates counted", f"{len(updates)}: {size:,} bytes as they came"),
        ("Releases, refusals", f"{counts['release']}, {counts['refused']}"),
    ]
    return Report("What this aggregator did and received", facts, _INTRO, _WORDS, _MEANS, Received._fields, rows)
