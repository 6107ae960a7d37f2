"""`tundish audit`: whether a ledger holds, its file for an auditor, and what left a site."""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from broker import database, ledger, stick
from edge import received, store
from edge.page import Report, proof, utc, write
from models.commandline import counted
from models.errors import LocalError, UserError

MOST_LINE = 1 << 20  # characters of an entry in a file
COLUMNS = (
    "entry", "time_utc", "what", "task", "round", "windows", "payload_bytes", "message_bytes", "digest", "answered",
    "charter", "detail",
)  # fmt: skip
_WORDS = {
    "birth": "the gateway said who it is (again at each connection, and that it ended)",
    "joined": "it takes part in a round",
    "declined": "it does not take part in a round",
    "asks": "it asks for a round, since signals have drifted",
    "vote": "for or against a new model, with what it and the one before are worth on this gateway's own holdout",
    "update": "a weight delta (the same one again until it is answered)",
    "acceptance": "which charter this site accepts (again at each connection)",
    "request-made": "a request for enrolment, written to a file or sent with a token",
}

_UNDER = ("update", "acceptance")  # kinds that name the charter
_INTRO = (
    "Beyond the site's broker go these and no others. From a weight delta something of the data that it was learnt "
    "from can be inferred. Whoever runs tundish edge doctor also publishes one empty message, to "
    "_fl/doctor/probe, which is not in the ledger."
)
_MEANS = {
    "entry": "its number in the ledger",
    "payload_bytes": "the weight delta alone",
    "message_bytes": "the whole message, with signature and header",
    "digest": "SHA-256 of the message",
    "answered": "what the aggregator said of it; counted: it is part of a model",
    "charter": "what it left under, by title and SHA-256 of its file",
}


class Left(NamedTuple):
    """One thing that left the site, in the order of COLUMNS; an empty text where a column says nothing."""

    entry: str
    time_utc: str
    what: str
    task: str = ""
    round: str = ""
    windows: str = ""
    payload_bytes: str = ""
    message_bytes: str = ""
    digest: str = ""
    answered: str = ""
    charter: str = ""
    detail: str = ""


def verify(args: argparse.Namespace) -> int:
    """Check a ledger; LocalError names the first entry that does not hold."""
    key, noted = (_hex(f"--{name}", getattr(args, name)) for name in ("key", "head"))
    head = _verified(args.place, lines_of(args.place), key=key, head=noted)
    if args.json:
        print(json.dumps(head._asdict()))
        return 0
    entries = counted(head.entries, "entry", "entries")
    span = f", {utc(head.first_ms)} to {utc(head.last_ms)}" if head.entries else ""
    print(f"{args.place}: ok, {entries}{span}")
    print(f"  head   {head.hash}")
    if not head.signed:
        print("  not signed: whoever has the file may have written it")
    else:
        whose = "as --key wants it" if key else "NOT PROVEN whose key that is: compare it, or give --key"
        print(f"  signed by {head.key} up to entry {head.signed}; {whose}")
    print("  proven: no entry in it was changed, left out or moved without all later ones being made anew")
    if head.noted:
        print(
            f"  proven: the head that was noted is entry {head.noted}; up to it nothing was changed or taken away since"
        )
    else:
        print("  NOT PROVEN without --head: that nothing was taken off its end, or all of it made anew by its writer")
    print("  keep the head: with --head, a later check proves that nothing before it was taken away or changed")
    return 0


def _verified(place: Path, lines: list[str], *, key: str = "", head: str = "") -> ledger.Head:
    """Check a ledger; LocalError says of which place, and names the first entry that does not hold."""
    try:
        return ledger.verify(lines, key=key, head=head)
    except LocalError as error:
        raise LocalError(f"{place}: {error}") from error


def export(args: argparse.Namespace) -> int:
    """Write a ledger as it is to a file, whose head an auditor can be told by another way; then check it."""
    lines = lines_of(args.place)
    try:
        stick.put(args.out, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise UserError("--out", 0, "", f"{args.out}: {error.strerror}", "name a file that can be written") from None
    head = _verified(args.place, lines)
    print(f"{args.out}: {counted(head.entries, 'entry', 'entries')}, head {head.hash}")
    print(f"whoever has it runs: tundish audit verify {args.out.name} --head {head.hash}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Check a ledger, and write what left a gateway's site, or what an aggregator did, as one page and one table."""
    lines = lines_of(args.place)
    head = _verified(args.place, lines, key=_hex("--key", args.key))
    entries = [json.loads(line) for line in lines]
    sessions = [entry["body"] for entry in entries if entry["kind"] == "session"]
    if sessions:
        found = list(left(entries))
        made = _report(str(sessions[-1].get("path", "")), head, entries, found)
        table, page = write(args.out, "left-this-site.csv", made)
        print(f"messages that left this site: {len(found)}; {table}, {page}")
        return 0
    made = received.report(head, entries)
    if not made.rows:
        problem = "holds nothing that a gateway or an aggregator has done"
        raise UserError(str(args.place), 0, "", problem, "name the state folder of one that has run")
    table, page = write(args.out, "aggregator.csv", made)
    print(f"what this aggregator did and received: {counted(len(made.rows), 'entry', 'entries')}; {table}, {page}")
    return 0


def _hex(option: str, text: str) -> str:
    """Take a hash or a key as it was noted; UserError for what is none."""
    if text and not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise UserError(option, 0, "", f"{text!r} is not 64 hex digits", "copy all of what audit verify prints")
    return text.lower()


def lines_of(place: Path) -> list[str]:
    """A ledger's lines, from a state folder or an exported file; UserError if there is none."""
    if database.is_there(place / "state.db"):
        return store.ledger_lines(place)
    if database.is_there(place / "journal.db"):
        return database.ledger_lines(place)
    if place.is_dir():
        problem = "neither a gateway nor an aggregator has its state there"
        raise UserError(str(place), 0, "", problem, "name the --state of tundish edge run or tundish broker run")
    remedy = "name the state folder of a gateway or an aggregator, or an exported ledger"
    try:
        with place.open(encoding="utf-8") as file:
            if file.read(1) not in {"", "{"}:
                raise UserError(str(place), 0, "", "is no ledger", remedy)
            file.seek(0)
            return list(_bounded(file, place))
    except UnicodeDecodeError:
        raise UserError(str(place), 0, "", "is no ledger", remedy) from None
    except OSError as error:
        raise UserError(str(place), 0, "", f"holds no ledger ({error.strerror})", remedy) from None


def _bounded(file: Any, place: Path) -> Iterator[str]:
    number = 0
    while line := file.readline(MOST_LINE):
        number += 1
        if len(line) == MOST_LINE:
            raise UserError(str(place), number, "", f"longer than {MOST_LINE} characters", "name a ledger")
        yield line.rstrip("\n")


def left(entries: list[dict[str, Any]]) -> Iterator[Left]:
    """What left a site, from the entries of its gateway's ledger, oldest first."""
    answers = {
        entry["body"].get("digest"): f"{entry['body'].get('outcome')} {utc(entry['time_ms'])}"
        for entry in entries
        if entry["kind"] == "receipt"
    }
    for entry in entries:
        kind, body = entry["kind"], entry["body"]
        if kind not in _WORDS:
            continue
        digest = str(body.get("digest", ""))
        detail = body.get("reason", "")
        if kind == "birth":
            detail = f"path, public key, software {body.get('software')}, tasks {body.get('tasks')}"
            if has := body.get("installed"):
                detail += f", task, release and version installed: {has}"
        if kind == "request-made":
            detail = f"path {body.get('path')}, public key {body.get('public_key')}, a request for a TLS certificate"
        if kind == "vote":
            detail = f"{body.get('verdict')} version {body.get('version')}: {body.get('new')}, was {body.get('old')}"
        yield Left(
            str(entry["seq"]),
            utc(entry["time_ms"]),
            kind,
            str(body.get("task", "")),
            str(body.get("round", "")),
            str(body.get("samples", body.get("windows", ""))),
            str(body.get("bytes", "")),
            str(body.get("message_bytes", "")),
            digest,
            answers.get(digest, "not answered yet") if kind == "update" else "",
            _clause(body) if kind in _UNDER else "",
            str(detail),
        )


def _clause(body: dict[str, Any]) -> str:
    """The charter that something left under: its title, and the SHA-256 of its file."""
    return f"{body.get('title', '')} {body['charter']}".strip() if body.get("charter") else "none"


def _report(path: str, head: ledger.Head, entries: list[dict[str, Any]], found: list[Left]) -> Report:
    updates = [one for one in found if one.what == "update"]
    payload, message = (
        sum(int(text) for one in updates if (text := getattr(one, key)).isdecimal())
        for key in ("payload_bytes", "message_bytes")
    )
    trusted = [e["body"] for e in entries if e["kind"] == "federation-pinned"]
    policy = next((e["body"]["policy"] for e in reversed(entries) if "policy" in e["body"]), "none")
    charters = dict.fromkeys(one.charter for one in found if one.what == "acceptance")
    facts = [
        ("Gateway", path),
        *proof(head),
        ("Federation", ", ".join(f"{one.get('federation')} (key {one.get('key')})" for one in trusted) or "none yet"),
        ("Policy in force", _plain(policy)),
        ("Charters accepted, oldest first", "; ".join(one for one in charters if one != "none") or "none"),
        ("Updates", f"{len(updates)}: {payload:,} bytes of weight deltas, {message:,} with signatures"),
    ]
    return Report(f"What left {path}", facts, _INTRO, _WORDS, _MEANS, COLUMNS, found)


def _plain(policy: object) -> str:
    """A policy as its file says it."""
    if not isinstance(policy, dict):
        return str(policy)
    return "; ".join(f"{key} = {json.dumps(value)}" for key, value in policy.items() if value is not None)
