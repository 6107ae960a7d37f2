"""One table of a user's TOML file put in or replaced, everything else byte for byte as it was."""

import re
import tomllib
from typing import Any

_HEADER = re.compile(r"^\s*\[\[?\s*(.+?)\s*\]\]?\s*(?:#.*)?$")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")


def put_table(text: str, path: tuple[str, str], block: str) -> str | None:
    """Return `text` with the table at `path` (`("task", "wear")`) being `block`, appended if there is none.

    None where that can't be done safely: the table is written in a way that no header shows, or something else would
    change with it. The lines of `block` get the file's own line ends.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    lines, fresh = text.splitlines(keepends=True), [line + newline for line in block.splitlines()]
    before, span = _data(text), _span(text.splitlines(), path)
    if path[1] not in before.get(path[0], {}):
        gap = ([] if text.endswith("\n") else [newline]) + [newline]
        lines += (gap if text else []) + fresh
    elif span is not None:
        lines[span[0] : span[1]] = fresh
    else:
        return None
    out = "".join(lines)
    after = _data(out)
    same = _without(before, path) == _without(after, path)
    return out if same and path[1] in after.get(path[0], {}) else None


def _span(lines: list[str], path: tuple[str, str]) -> tuple[int, int] | None:
    """Return the lines of a table and of those below it, without the blank and comment lines at their end."""
    first = end = None
    for number, line in enumerate(lines):
        if not (match := _HEADER.match(line)):
            continue
        names = tuple(part.strip("\"'") for part in _PART.findall(match[1]))
        if names[:2] == path:
            first = number if first is None else first
            end = len(lines)
        elif first is not None and end == len(lines):
            end = number
    if first is None or end is None:
        return None
    while end > first + 1 and re.match(r"\s*(#.*)?$", lines[end - 1]):
        end -= 1
    return first, end


def _data(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))
    except tomllib.TOMLDecodeError:
        return {}


def _without(data: dict[str, Any], path: tuple[str, str]) -> dict[str, Any]:
    """The data without one table, and without the one above it if nothing else is in that."""
    rest = {key: value for key, value in data.get(path[0], {}).items() if key != path[1]}
    return {key: value for key, value in data.items() if key != path[0]} | ({path[0]: rest} if rest else {})
