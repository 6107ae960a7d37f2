"""`tundish audit`: whether a ledger holds, its file for an auditor, and for a legal team what left a site."""

import argparse
import csv
import html
import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from broker import database, ledger, stick
from edge import store
from models.commandline import counted
from models.errors import UserError

MOST_LINE = 1 << 20  # characters of an entry in a file
COLUMNS = (
    "entry", "time_utc", "what", "task", "round", "windows", "payload_bytes", "message_bytes", "digest", "answered",
    "charter", "detail",
)  # fmt: skip
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1f2937}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.25rem .6rem;border-bottom:1px solid #e5e7eb;text-align:left;vertical-align:top}
td.n{text-align:right}code{font-size:.8rem;word-break:break-all}
"""
_WORDS = {
    "birth": "birth: the gateway said who it is (again at each connection, and that it ended)",
    "joined": "answer: it takes part in a round",
    "declined": "answer: it does not take part in a round",
    "asks": "answer: it asks for a round, since signals have drifted",
    "vote": "vote: for or against a new model, with what it and the one before are worth on this gateway's own holdout",
    "update": "update: a weight delta (the same one again until it is answered)",
    "acceptance": "acceptance: which charter this site accepts (again at each connection)",
    "request-made": "request for enrolment, written to a file or sent with a token",
}

_UNDER = ("update", "acceptance")  # kinds that name the charter
_WHAT_IT_MEANS = (
    "Entry: its number in the ledger. Payload: the weight delta alone, in bytes; message: with signature and header. "
    "Digest: SHA-256 of the message. Charter: what it left under, by title and SHA-256 of its file. Answered: what the "
    "aggregator said of it; counted: it is part of a model. From a "
    "weight delta something of the data that it was learnt from can be inferred. Whoever runs tundish edge doctor also "
    "publishes one empty message, to _fl/doctor/probe, which is not in the ledger."
)


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
    head = ledger.verify(lines_of(args.place), key=key, head=noted)
    if args.json:
        print(json.dumps(head._asdict()))
        return 0
    entries = counted(head.entries, "entry", "entries")
    span = f", {_time(head.first_ms)} to {_time(head.last_ms)}" if head.entries else ""
    print(f"{args.place}: ok, {entries}{span}")
    print(f"  head   {head.hash}")
    if head.signed:
        print(f"  signed by {head.key} up to entry {head.signed}")
    else:
        print("  not signed: whoever has the file may have written it")
    print("  keep the head: with --head, a later check proves that nothing before it was taken away or changed")
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a ledger as it is to a file, whose head an auditor can be told by another way; then check it."""
    lines = lines_of(args.place)
    try:
        stick.put(args.out, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        raise UserError("--out", 0, "", f"{args.out}: {error.strerror}", "name a file that can be written") from None
    head = ledger.verify(lines)
    print(f"{args.out}: {counted(head.entries, 'entry', 'entries')}, head {head.hash}")
    print(f"whoever has it runs: tundish audit verify {args.out.name} --head {head.hash}")
    return 0


def report(args: argparse.Namespace) -> int:
    """Check a gateway's ledger, and write what left its site as one page and one table."""
    lines = lines_of(args.place)
    head = ledger.verify(lines, key=_hex("--key", args.key))
    entries = [json.loads(line) for line in lines]
    sessions = [entry["body"] for entry in entries if entry["kind"] == "session"]
    if not sessions:
        raise UserError(str(args.place), 0, "", "is no gateway's ledger", "name the gateway's state folder")
    found = list(left(entries))
    page, table = args.out / "report.html", args.out / "left-this-site.csv"
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            rows.writerows([_cell(value) for value in one] for one in found)
        page.write_text(_page(str(sessions[-1].get("path", "")), head, entries, found), encoding="utf-8")
    except OSError as error:
        raise UserError("--out", 0, "", f"{args.out}: {error.strerror}", "name a folder that can be written") from None
    print(f"messages that left this site: {len(found)}; {table}, {page}")
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
        entry["body"].get("digest"): f"{entry['body'].get('outcome')} {_time(entry['time_ms'])}"
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
        if kind == "vote":
            detail = f"{body.get('verdict')} version {body.get('version')}: {body.get('new')}, was {body.get('old')}"
        yield Left(
            str(entry["seq"]),
            _time(entry["time_ms"]),
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


def _time(time_ms: int) -> str:
    """Text of a time; of one that no calendar holds, the number."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(time_ms)


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text


def _page(path: str, head: ledger.Head, entries: list[dict[str, Any]], found: list[Left]) -> str:
    """One page that needs nothing else to be read."""
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
        ("Written", f"{_time(head.first_ms)} to {_time(head.last_ms)}, {counted(head.entries, 'entry', 'entries')}"),
        ("Head", head.hash),
        ("Signed", f"by {head.key} up to entry {head.signed}" if head.signed else "not signed"),
        ("Federation", ", ".join(f"{one.get('federation')} (key {one.get('key')})" for one in trusted) or "none yet"),
        ("Policy in force", _plain(policy)),
        ("Charters accepted, oldest first", "; ".join(one for one in charters if one != "none") or "none"),
        ("Updates", f"{len(updates)}: {payload:,} bytes of weight deltas, {message:,} with signatures"),
    ]  # fmt: skip
    summary = "".join(f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>" for name, value in facts)
    words = "".join(f"<li>{_text(text)}</li>" for text in _WORDS.values())
    header = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in one)}</tr>" for one in found)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>What left {_text(path)}</title>'
        f"<style>{_STYLE}</style><h1>What left {_text(path)}</h1><table>{summary}</table>"
        f"<h2>Kinds of message</h2><p>Beyond the site's broker go these and no others:</p><ul>{words}</ul>"
        f"<h2>One by one</h2><p>{_text(_WHAT_IT_MEANS)}</p><table><tr>{header}</tr>{rows}</table></html>\n"
    )


def _plain(policy: object) -> str:
    """A policy as its file says it."""
    if not isinstance(policy, dict):
        return str(policy)
    return "; ".join(f"{key} = {json.dumps(value)}" for key, value in policy.items() if value is not None)


def _text(value: object) -> str:
    return html.escape(str(value))
