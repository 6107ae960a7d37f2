"""A TOML file as a typed, frozen value, every mistake reported as file, line, key and remedy.

`tomllib` parses and `msgspec` checks; neither says on which line a key stands, so `line_of` finds it in the text.
"""

import difflib
import json
import operator
import re
import tomllib
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec

from models.errors import UserError

T = TypeVar("T")

_TABLE = re.compile(r"^\s*(\[\[?)\s*(.+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
_FIELD = re.compile(r"`([^`]+)`")
# How msgspec calls a type, and people do.
_TYPES = {
    "str": "text in quotes",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list in [ ]",
    "object": "a table",
    "date": "a date",
    "datetime": "a date",
    "time": "a time of day",
}
_SOME_KEY = "..."  # how msgspec writes a key of a table that it has not kept

_DURATION = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SIZE = {
    "B": 1,
    "kB": 1000,
    "KiB": 1 << 10,
    "MB": 10**6,
    "MiB": 1 << 20,
    "GB": 10**9,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}


def line_of(text: str, path: Sequence[str | int]) -> int:
    """Return the line (from 1) where the key `path` stands, or that of its nearest parent; 1 if none does."""
    best, best_depth = 1, 0
    table: list[str | int] = []
    counts: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            names = [part.strip("\"'") for part in _PART.findall(match[2])]
            joined = ".".join(names)
            if match[1] == "[[":
                counts[joined] = counts.get(joined, -1) + 1
            table = []
            for depth, name in enumerate(names):
                table.append(name)
                index = counts.get(".".join(names[: depth + 1]))
                if index is not None:
                    table.append(index)
            here: list[str | int] = table
        elif match := _KEY.match(line):
            here = table + [part.strip("\"'") for part in _PART.findall(match[1])]
        else:
            continue
        # A table that only its own tables write out begins with the first of these.
        common = here[: len(path)]
        if len(common) > best_depth and list(path[: len(common)]) == common:
            best, best_depth = number, len(common)
    return best


def key_text(path: Sequence[str | int]) -> str:
    """Write a key path as people do: `source[0].url`."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else part
    return out


class TomlFile:
    """One parsed file that remembers its text, so that later checks can point at lines too."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        try:
            self.data: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            match = re.search(r"line (\d+)", str(error))
            line = int(match[1]) if match else text.count("\n") + 1
            raise UserError(name, line, "", f"not TOML: {error}", "mend the syntax at that place") from error

    def error(self, path: Sequence[str | int], problem: str, remedy: str) -> UserError:
        """Build (not raise) the error for the key at `path`."""
        return UserError(self.name, line_of(self.text, path), key_text(path), problem, remedy)

    def convert(self, type_: type[T]) -> T:
        """Check the data against a msgspec type; unknown keys, missing keys and wrong types raise UserError."""
        try:
            return msgspec.convert(self.data, type_, strict=True)
        except msgspec.ValidationError as error:
            raise self._explain(str(error), type_) from error

    def _explain(self, message: str, type_: Any) -> UserError:
        what, _, where = message.partition(" - at `$")
        path = self._named(self._path(where.rstrip("`")), message, type_)
        field = _FIELD.search(what)
        if "unknown field" in what and field:
            known = self._known(type_, path)
            near = difflib.get_close_matches(field[1], known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}"
            return self.error([*path, field[1]], "unknown key", remedy)
        if "missing required field" in what and field:
            path.append(field[1])
            return self.error(path, "missing", _added(path, _type_at(type_, path)))
        choices = _type_at(type_, path)
        if isinstance(choices, msgspec.inspect.LiteralType):
            words = ", ".join(json.dumps(value) for value in choices.values)
            word = json.dumps(reduce(operator.getitem, path, cast("Any", self.data)), default=str, ensure_ascii=False)
            return self.error(path, f"{word} is none of the words that may stand here", f"write one of: {words}")
        if isinstance(choices, msgspec.inspect.Metadata) and (said := choices.extra_json_schema):
            return self.error(path, "is not what belongs here", f"write {said['description']}")
        if types := re.fullmatch(r"Expected `(.+)`, got `(.+)`", what):
            wanted, found = map(_in_words, types.groups())
            return self.error(path, f"is {found}", f"write {wanted}")
        if sizes := re.fullmatch(r"Expected `array` of length (\d+), got (\d+)", what):
            return self.error(path, f"is a list of {sizes[2]}", f"write a list of {sizes[1]}")
        return self.error(path, what[:1].lower() + what[1:], "write a value of that type")

    def _path(self, where: str) -> list[str | int]:
        """Turn msgspec's `.source[0].url` and `[...]` (some key of a table) into a key path."""
        path: list[str | int] = []
        for name, index in re.findall(r"\.([A-Za-z0-9_-]+)|\[(\d+|\.\.\.)\]", where):
            path.append(name or (_SOME_KEY if index == _SOME_KEY else int(index)))
        return path

    def _named(self, path: list[str | int], message: str, type_: Any) -> list[str | int]:
        """Name the keys that msgspec leaves out: of a table's keys, the first that by itself is refused alike."""
        data = self.data
        while _SOME_KEY in path:
            at = path.index(_SOME_KEY)
            table = reduce(operator.getitem, path[:at], cast("Any", data))
            for key, value in table.items():
                alone = _put(data, path[:at], {key: value})
                if _refusal(alone, type_) == message:
                    data, path = alone, [*path[:at], key, *path[at + 1 :]]
                    break
            else:
                return path[:at]
        return path

    def _known(self, type_: Any, path: Sequence[str | int]) -> list[str]:
        info = _type_at(type_, path)
        return [f.encode_name for f in info.fields] if isinstance(info, msgspec.inspect.StructType) else []


def _added(path: Sequence[str | int], info: msgspec.inspect.Type | None) -> str:
    """Say what to write where a key, a table or the first of many tables is missing."""
    table = ".".join(part for part in path if isinstance(part, str))
    if isinstance(info, msgspec.inspect.StructType):
        return f"add a table [{table}]"
    if isinstance(getattr(info, "item_type", None), msgspec.inspect.StructType):
        return f"add a table [[{table}]]"
    return f"add a line {path[-1]} = … there"


def _in_words(types: str) -> str:
    """Write msgspec's `str | null` as people do; what may be left out needs no word."""
    return " or ".join(_TYPES.get(one, one) for one in types.split(" | ") if one != "null")


def _type_at(type_: Any, path: Sequence[str | int]) -> msgspec.inspect.Type | None:
    """Return what may stand at a key path; None if nothing may. Of `T | None` it is T."""
    info: msgspec.inspect.Type | None = _some(msgspec.inspect.type_info(type_))
    for part in path:
        if isinstance(info, msgspec.inspect.StructType):
            info = next((f.type for f in info.fields if f.encode_name == part), None)
        elif isinstance(info, msgspec.inspect.DictType):
            info = info.value_type
        elif isinstance(info, msgspec.inspect.VarTupleType | msgspec.inspect.ListType):
            info = info.item_type
        else:
            return None
        info = _some(info)
    return info


def _some(info: msgspec.inspect.Type | None) -> msgspec.inspect.Type | None:
    if isinstance(info, msgspec.inspect.UnionType):
        return next((t for t in info.types if not isinstance(t, msgspec.inspect.NoneType)), info.types[0])
    return info


def _put(data: Any, path: Sequence[str | int], value: Any) -> Any:
    """Return the data with another value at a key path; what is not on the way is shared."""
    if not path:
        return value
    out = data.copy()
    out[path[0]] = _put(data[path[0]], path[1:], value)
    return out


def _refusal(data: Any, type_: Any) -> str:
    """Say what msgspec has against data; nothing if it takes them."""
    try:
        msgspec.convert(data, type_, strict=True)
    except msgspec.ValidationError as error:
        return str(error)
    return ""


def read_toml(path: Path) -> TomlFile:
    """Read one file; a missing or unreadable one is the user's error too."""
    try:
        return TomlFile(str(path), path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(str(path), 0, "", f"can't be read: {reason}", "check the path and its permissions") from error


def seconds(text: str) -> float:
    """Parse `90s`, `15min`, `2h`, `7d`, `2w` into seconds; ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if not match or match[2] not in _DURATION:
        raise ValueError(f"{text!r} is not a duration")
    return float(match[1]) * _DURATION[match[2]]


def size_bytes(text: str) -> int:
    """Parse `64MiB`, `2GiB`, `500MB` into bytes; ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if not match or match[2] not in _SIZE:
        raise ValueError(f"{text!r} is not a size")
    return int(float(match[1]) * _SIZE[match[2]])
