"""What is replay's alone: times, speeds, the layouts of npz and Parquet, and files larger than they may weigh."""

import contextlib
import time
import tracemalloc
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from edge.drivers._recording import parse_time, read_csv, read_npz
from edge.drivers.replay import Driver
from edge.tags import Quality, Source, Tag
from models.errors import UserError
from tests.rigs import Collector, running, until

T0 = 1_600_000_000_000_000_000


def tag(address: str, **more: Any) -> Tag:
    return Tag(source="r", name=address, address=address, **more)


def source(path: Path, *tags: Tag, **options: object) -> Source:
    return Source(name="r", driver="replay", url=path.name, tags=tags, options=options, folder=str(path.parent))


@contextlib.asynccontextmanager
async def playing(played: Source) -> AsyncIterator[tuple[Driver, Collector]]:
    sink = Collector()
    driver = Driver(played, sink)
    async with running(driver):
        yield driver, sink


def found(sink: Collector, address: str) -> list[object]:
    return [sample.value for sample in sink.of(f"r/{address}")]


async def test_a_csv_as_excel_saves_it_with_its_own_times(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        "\ufefftime;Temp;Part;\n2020-09-13T12:26:40Z;1,5;p7;\n2020-09-13T14:26:41+02:00;;p7\n1600000003;2,5;p8\n"
    )
    played = source(path, tag("Temp"), tag("Part", type="string"), times="recorded", speed=1e6)
    async with playing(played) as (driver, sink):
        await until(lambda: "played to its end" in driver.health.error)
        assert [(s.time_ns - T0, s.value) for s in sink.of("r/Temp")] == [(0, 1.5), (3_000_000_000, 2.5)]
        assert [s.time_ns - T0 for s in sink.of("r/Part")] == [0, 1_000_000_000, 3_000_000_000]
        assert len(set(found(sink, "Part"))) == 2
        path.unlink()
        await until(lambda: sink.samples[-1].quality is Quality.BAD)


async def test_times_are_shifted_to_now_and_as_fast_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("time,v\n" + "".join(f"{1_600_000_000 + n},{n}\n" for n in range(61)))
    begin = time.time_ns()
    async with playing(source(path, tag("v"), speed=60.0)) as (_, sink):
        await until(lambda: len(sink.samples) == 61)
        stamps = [sample.time_ns for sample in sink.samples]
        # A minute's recording lasts a second of source time, which is not ahead of the clock.
        assert stamps[-1] - stamps[0] == pytest.approx(1e9, abs=1e3)
        assert begin <= stamps[0]
        assert stamps[-1] <= time.time_ns()


async def test_a_loop_goes_on_in_time(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("v\n1\n2\n")
    async with playing(source(path, tag("v"), rate_hz=100.0, loop=True)) as (driver, sink):
        await until(lambda: len(sink.samples) > 8)
        assert found(sink, "v")[:6] == [1, 2, 1, 2, 1, 2]
        stamps = [sample.time_ns for sample in sink.samples]
        assert stamps == sorted(stamps)
        assert driver.health.connects == 1


async def test_npz_windows_value_by_value_or_as_waveforms_of_one_plant(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    x = np.arange(4 * 2 * 3, dtype=np.float32).reshape(4, 2, 3)
    np.savez_compressed(path, x_train=x, y_train=np.array([5, 6, 7, 8]), client_train=np.array([0, 1, 0, 1]))
    wave = Tag(source="r", name="wave", address="x_train[0]", width=3)
    tags = (tag("x_train[1]"), tag("y_train"), wave, tag("x_train[2]"), tag("nothing"))
    async with playing(source(path, *tags, speed=1e6, client=1)) as (driver, sink):
        await until(lambda: "played to its end" in driver.health.error)
        good = [sample for sample in sink.samples if sample.quality is Quality.GOOD]
        assert [s.value for s in good if s.tag == "r/x_train[1]"] == [9, 10, 11, 21, 22, 23]
        assert [s.value for s in good if s.tag == "r/y_train"] == [6, 6, 6, 8, 8, 8]
        assert [list(s.value) for s in good if s.tag == "r/wave"] == [[6, 7, 8], [18, 19, 20]]  # type: ignore[arg-type]
        assert set(driver.health.quarantined) == {"r/x_train[2]", "r/nothing"}


async def test_parquet_with_timestamps_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    when = [datetime(2020, 9, 13, 12, 26, 40 + n, tzinfo=UTC) for n in range(3)]
    table = pa.table({"time": when, "v": [1.5, None, 3.0], "w": [[1.0, 2.0], [3.0, 4.0], [5.0]], "unread": ["x"] * 3})
    parquet.write_table(table, path, row_group_size=2)
    tags = (tag("v"), Tag(source="r", name="w", address="w", width=2))
    async with playing(source(path, *tags, times="recorded", speed=1e6)) as (driver, sink):
        await until(lambda: "played to its end" in driver.health.error)
        assert [(s.time_ns - T0, s.value) for s in sink.of("r/v")] == [(0, 1.5), (2_000_000_000, 3.0)]
        assert [s.quality for s in sink.of("r/w")] == [Quality.GOOD, Quality.GOOD, Quality.BAD]


def test_a_file_is_read_in_pieces(tmp_path: Path) -> None:
    npz, text = tmp_path / "x.npz", tmp_path / "x.csv"
    np.savez_compressed(npz, x_train=np.zeros((15_000, 4, 512), np.float32))  # 123 MB
    text.write_text("v,unread\n" + ("1.5," + "x" * 500 + "\n") * 50_000)  # 25 MB
    tracemalloc.start()
    try:
        for rows in (read_npz(npz, ["x_train[3]"], "time", -1), read_csv(text, ["v"], "time", -1)):
            assert len(next(rows)) == 1
            assert sum(1 for _ in rows) >= 15_000
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.npz", b"PK no zip"),
        ("x.parquet", b"PAR1 none"),
        ("x.csv", b"\xff\xfe\xff"),
        ("x.csv", b"v\n" + b"1" * (2 << 20)),
        ("x.csv", b"time,v\nnoon,1\n"),
    ],
)
async def test_a_file_that_is_none_is_said_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    async with playing(source(path, tag("v"))) as (driver, sink):
        await until(lambda: "can't be played" in driver.health.error)
        assert "\n" not in driver.health.error
        assert not [s for s in sink.samples if s.quality is Quality.GOOD]


async def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, v=np.array([{"a": 1}], dtype=object))
    async with playing(source(path, tag("v"))) as (driver, _):
        await until(lambda: "can't be played" in driver.health.error)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_600_000_000, T0),
        (1_600_000_000_000, T0),
        (1_600_000_000_000_000, T0),
        (T0 + 1, T0 + 1),
        ("1600000000.5", T0 + 500_000_000),
        ("2020-09-13 12:26:40", T0),
        (np.datetime64("2020-09-13T12:26:40", "s"), T0),
        (np.int64(T0), T0),
        ("", None),
        (None, None),
    ],
)
def test_times(value: object, expected: int | None) -> None:
    assert parse_time(value) == expected


@pytest.mark.parametrize(
    ("url", "options", "key"),
    [
        ("x.xlsx", {}, "url"),
        ("file://host/x.csv", {}, "url"),
        ("x.csv", {"times": "then"}, "times"),
        ("x.csv", {"times": "recorded", "loop": True}, "times"),
        ("x.csv", {"rate_hz": 0}, "rate_hz"),
    ],
)
def test_settings_that_are_none(url: str, options: dict[str, object], key: str) -> None:
    with pytest.raises(UserError, match=rf"source\]\] r: {key}: "):
        Driver(Source(name="r", driver="replay", url=url, tags=(tag("v"),), options=options), Collector())
