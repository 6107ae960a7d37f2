"""Recordings as rows, read in pieces so that memory does not grow with the file: CSV, npz, Parquet.

Each reader is a generator whose first item is the list of the columns that there are among those asked for; every later
one is a row, (time in nanoseconds since 1970 or None, values in the order of that list). ValueError says what is wrong.
"""

import csv
import re
import zipfile
from collections.abc import Callable, Generator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Reader = Callable[[Path, Sequence[str], str, int], Generator[Any, None, None]]

_LINE = 1 << 20  # bytes of one line of a CSV, or of one row of an array
_PIECE = 1 << 20
_CHANNEL = re.compile(r"(?P<array>\w+)(?:\[(?P<channel>\d{1,6})\])?")
# What counts as seconds, milliseconds, microseconds: below these a number since 1970 is one of the unit.
_UNITS = ((1e11, 1e9), (1e14, 1e6), (1e17, 1e3))


def parse_time(value: object) -> int | None:
    """Return nanoseconds since 1970 of an ISO 8601 text (UTC without an offset) or a number; None for an empty cell.

    Numbers are seconds, milliseconds, microseconds or nanoseconds, told apart by their size.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            return parse_time(float(value))
        except ValueError:
            when = datetime.fromisoformat(value)
            since = (when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
            return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
    if isinstance(value, np.datetime64):
        return int(value.astype("datetime64[ns]").astype(np.int64))
    if not isinstance(value, int | float | np.number):
        raise ValueError(f"{value!r} is no time")  # noqa: TRY004 - a value of a file, not a type of ours
    number = float(value)
    factor = next((factor for limit, factor in _UNITS if abs(number) < limit), 1.0)
    return round(number * factor) if factor > 1.0 else int(value)


def read_csv(path: Path, wanted: Sequence[str], time_column: str, _client: int) -> Generator[Any, None, None]:
    """Read a CSV: `,` or `;` (then with decimal commas), one header line, UTF-8."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = _line(file)
        semicolons = first.count(";") > first.count(",")
        delimiter = ";" if semicolons else ","
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        found = [name for name in wanted if name in header]
        places = [header.index(name) for name in found]
        clock = header.index(time_column) if time_column in header else -1
        yield found
        for cells in csv.reader(iter(lambda: _line(file), ""), delimiter=delimiter):
            if cells:
                full = cells + [""] * (len(header) - len(cells))
                time_ns = parse_time(full[clock].strip()) if clock >= 0 else None
                yield time_ns, [_cell(full[place].strip(), decimal_comma=semicolons) for place in places]


def _line(file: IO[str]) -> str:
    line = file.readline(_LINE)
    if len(line) == _LINE:
        raise ValueError(f"a line is longer than {_LINE} characters")
    return line


def _cell(text: str, *, decimal_comma: bool) -> object:
    """Return a number, a text, or None for an empty cell, which is no sample."""
    try:
        return float(text.replace(",", ".") if decimal_comma else text) if text else None
    except ValueError:
        return text


def read_npz(path: Path, wanted: Sequence[str], time_column: str, client: int) -> Generator[Any, None, None]:
    """Read arrays side by side: `y_train` is (N,), `x_train[3]` channel 3 of (N, F) rows or (N, C, T) windows.

    With `client` 0 or more, rows alone where `client_train` (or `client_test`) is that number.
    """
    with zipfile.ZipFile(path) as file:
        names = {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}
        matches = [(name, _CHANNEL.fullmatch(name)) for name in wanted]
        found = [
            (name, match["array"], match["channel"]) for name, match in matches if match and match["array"] in names
        ]
        arrays = {array for _, array, _ in found} | ({time_column} & names)
        filters = {f"client_{array.rpartition('_')[2]}" for _, array, _ in found} & names if client >= 0 else set()
        streams = {name: _stream(file, name) for name in sorted(arrays | filters)}
        shapes = {name: next(stream) for name, stream in streams.items()}
        found = [(n, a, c) for n, a, c in found if c is None or (len(shapes[a]) > 1 and int(c) < shapes[a][1])]
        yield [name for name, _, _ in found]
        for rows in zip(*streams.values(), strict=False):
            row = dict(zip(streams, rows, strict=True))
            if all(row[name] == client for name in filters):
                time_ns = parse_time(row[time_column]) if time_column in row else None
                yield time_ns, [row[array] if c is None else row[array][int(c)] for _, array, c in found]


def _stream(file: zipfile.ZipFile, name: str) -> Generator[Any, None, None]:
    """Yield an array's shape, then its rows, never holding more than a piece of it."""
    with file.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = read(member)
        size = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        if dtype.hasobject or by_column or not shape or not 0 < size <= _LINE:
            raise ValueError(f"{name}: {dtype} {shape} can't be played")
        yield shape
        count, left = max(1, _PIECE // size), shape[0]
        while left:
            data = member.read(min(count, left) * size)
            if len(data) < min(count, left) * size:
                raise ValueError(f"{name} is cut short")
            piece: NDArray[Any] = np.frombuffer(data, dtype).reshape(-1, *shape[1:])
            left -= len(piece)
            yield from piece


def read_parquet(path: Path, wanted: Sequence[str], time_column: str, _client: int) -> Generator[Any, None, None]:
    """Read a Parquet file, one row group at a time; lists of numbers are waveforms."""
    import pyarrow as pa  # noqa: PLC0415 - 50 MB, for those alone who play Parquet
    from pyarrow import parquet  # noqa: PLC0415

    with parquet.ParquetFile(path) as file:
        there = set(file.schema_arrow.names)
        found = [name for name in wanted if name in there]
        yield found
        for batch in file.iter_batches(256, columns=sorted({*found, *({time_column} & there)})):
            times: list[object] = [None] * batch.num_rows
            if time_column in there:
                column = batch.column(time_column)
                if pa.types.is_timestamp(column.type):
                    column = column.cast(pa.timestamp("ns", tz=column.type.tz)).cast(pa.int64())
                times = column.to_pylist()
            columns = [batch.column(name).to_pylist() for name in found]
            for nth, stamp in enumerate(times):
                yield parse_time(stamp), [column[nth] for column in columns]


READERS: dict[str, Reader] = {".csv": read_csv, ".npz": read_npz, ".parquet": read_parquet}
