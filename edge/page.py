"""A ledger as a page that needs nothing else to be read, and as a table: the same words, the same columns."""

import csv
import html
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from broker.ledger import Head
from models.commandline import counted
from models.errors import UserError

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1f2937}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.25rem .6rem;border-bottom:1px solid #e5e7eb;text-align:left;vertical-align:top}
td.n{text-align:right}code{font-size:.8rem;word-break:break-all}
"""


class Report(NamedTuple):
    """What is written: `words` says what each kind in the column `what` is, `means` what each other column holds.

    Of `rows` each has a text for each of `columns`; an empty one where a column says nothing.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    intro: str
    words: dict[str, str]
    means: dict[str, str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def write(folder: Path, table: str, report: Report) -> tuple[Path, Path]:
    """Write the table, a CSV of that name, and report.html, into a folder; UserError where they can't be."""
    page, cells = folder / "report.html", folder / table
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with cells.open("w", encoding="utf-8-sig", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(report.columns)
            rows.writerows([_cell(value) for value in one] for one in report.rows)
        page.write_text(_page(report), encoding="utf-8")
    except OSError as error:
        raise UserError("--out", 0, "", f"{folder}: {error.strerror}", "name a folder that can be written") from None
    return cells, page


def proof(head: Head) -> list[tuple[str, str]]:
    """What both kinds of ledger say of themselves."""
    return [
        ("Written", f"{utc(head.first_ms)} to {utc(head.last_ms)}, {counted(head.entries, 'entry', 'entries')}"),
        ("Head", head.hash),
        ("Signed", f"by {head.key} up to entry {head.signed}" if head.signed else "not signed"),
    ]


def utc(time_ms: int) -> str:
    """Text of a time; of one that no calendar holds, the number."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return str(time_ms)


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula (OWASP, CSV injection)."""
    return f"'{text}" if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else text


def _page(report: Report) -> str:
    title = _text(report.title)
    facts = "".join(
        f"<tr><th>{_text(name)}</th><td><code>{_text(value)}</code></td></tr>" for name, value in report.facts
    )
    words, means = (
        "".join(f"<tr><th>{_text(name)}</th><td>{_text(text)}</td></tr>" for name, text in said.items())
        for said in (report.words, report.means)
    )
    header = "".join(f"<th>{_text(name)}</th>" for name in report.columns)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in one)}</tr>" for one in report.rows)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1><table>{facts}</table>"
        f"<h2>Words in the column what</h2><p>{_text(report.intro)}</p><table>{words}</table>"
        f"<h2>Columns</h2><table>{means}</table>"
        f"<h2>One by one</h2><table><tr>{header}</tr>{rows}</table></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))
