"""A tags CSV as Excel saves it -> Tag values; every mistake with file, line, column and remedy."""

import csv
import io
import math
import re
from collections.abc import Iterable
from functools import partial

from edge.tags import NO_BOUND, Tag
from models.errors import UserError

COLUMNS = ("tag", "address", "type", "unit", "scale", "offset", "deadband", "sampling_ms", "description", "low", "high")
MAX_TAGS = 100_000
MAX_NUMBER = 1e12
_ALL = 100.0  # percent


def parse_tags(source: str, path: str, text: str) -> Iterable[Tag]:
    """Parse the text of a tags CSV: `,` or `;` between the cells, decimal commas with the latter."""
    first = text.partition("\n")[0]
    semicolons = first.count(";") > first.count(",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=";" if semicolons else ",")
    header = _header(path, next(reader, []))
    seen: dict[str, int] = {}
    for cells in reader:
        row = {k: v.strip() for k, v in zip(header, cells, strict=False)}
        if not any(cell.strip() for cell in cells):
            continue
        if any(cell.strip() for cell in cells[len(header) :]):
            problem = f"{len(cells)} cells, the first line names {len(header)}"
            remedy = "put a cell with a comma in quotes; write 0.1, not 0,1"
            if semicolons:
                remedy = 'put a cell with a semicolon in quotes, as "ns=2;s=Spindle.Temp"'
            raise UserError(path, reader.line_num, "", problem, remedy)
        tag = _tag(source, path, reader.line_num, row, decimal_comma=semicolons)
        if tag.name in seen:
            remedy = "give each tag its own name, since the name is its topic"
            raise UserError(path, tag.line, "tag", f"{tag.name!r} stands on line {seen[tag.name]} too", remedy)
        seen[tag.name] = tag.line
        if len(seen) > MAX_TAGS:
            raise UserError(path, tag.line, "", f"more than {MAX_TAGS} tags", "split them over sources")
        yield tag


def _header(path: str, cells: list[str]) -> list[str]:
    header = [name.strip() for name in cells]
    if not set(header) & set(COLUMNS):
        raise UserError(path, 1, "", "names no column", f"write a first line: {','.join(COLUMNS[:9])}")
    for name in header:
        if name not in COLUMNS:
            raise UserError(path, 1, name, "unknown column", f"columns are: {', '.join(COLUMNS)}")
    for name in COLUMNS[:2]:
        if name not in header:
            raise UserError(path, 1, name, "missing column", f"the first line is {','.join(COLUMNS[:9])}")
    return header


def _tag(source: str, path: str, line: int, row: dict[str, str], *, decimal_comma: bool) -> Tag:
    for key in COLUMNS[:2]:
        if not row.get(key):
            raise UserError(path, line, key, "empty", f"write the {key}, or remove the line")
    if re.search(r"[\s/]", row["tag"]):
        raise UserError(path, line, "tag", f"{row['tag']!r} holds a space or a slash", "use letters, digits, . _ -")

    number = partial(_number, path, line, row, decimal_comma=decimal_comma)
    if number("scale", 1.0) == 0:
        raise UserError(path, line, "scale", "0 makes every value the same", "write 1, or what a count is worth")
    low, high = number("low", -NO_BOUND), number("high", NO_BOUND)
    if low > high:
        raise UserError(path, line, "low", f"{low:g} is above high, {high:g}", "swap them, or leave one empty")
    deadband = row.get("deadband", "")
    percent = deadband.endswith("%")
    row["deadband"] = deadband.removesuffix("%").strip()
    band = number("deadband", 0.0)
    if percent and not 0 < band <= _ALL:
        raise UserError(
            path, line, "deadband", f"{deadband!r} is out of range", "write 2% for 2 percent of the EURange"
        )
    type_ = row.get("type", "")
    waveform = re.fullmatch(r"(\w+)\[(\d{1,6})\]", type_)
    return Tag(
        source=source,
        name=row["tag"],
        address=row["address"],
        type=type_,
        unit=row.get("unit", ""),
        scale=number("scale", 1.0),
        offset=number("offset", 0.0),
        deadband=0.0 if percent else band,
        deadband_percent=band if percent else 0.0,
        sampling_ms=int(number("sampling_ms", 0)),
        description=row.get("description", ""),
        low=low,
        high=high,
        width=int(waveform[2]) if waveform else 0,
        file=path,
        line=line,
    )


def _number(path: str, line: int, row: dict[str, str], key: str, default: float, *, decimal_comma: bool) -> float:
    """Return the number in a cell, or the default where it is empty; UserError."""
    text = row.get(key, "")
    try:
        value = float(text.replace(",", ".") if decimal_comma else text) if text else default
    except ValueError:
        raise UserError(path, line, key, f"{text!r} is no number", "write one, such as 0.1") from None
    negative = value < 0 and key in {"deadband", "sampling_ms"}
    if not math.isfinite(value) or (text and abs(value) > MAX_NUMBER) or negative:
        raise UserError(path, line, key, f"{text!r} is out of range", "write one, such as 0.1")
    return value
