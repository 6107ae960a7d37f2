"""The ring of samples: small, bounded in days, readable by time, and begun anew when its file is damaged."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edge.history import SampleReader
from edge.ring import Samples
from edge.tags import Quality, Sample, Scan

GOOD = Quality.GOOD
PLENTY = 1 << 30
S = 10**9
START = 1_790_000_000 * S
# A folder SET/SET.npz for each; licences differ, so the recordings are no part of this project.
DATA = Path(os.environ.get("TUNDISH_RECORDED", Path(__file__).parents[2] / "shared" / "data"))


@contextlib.contextmanager
def ring(folder: Path, max_bytes: int = PLENTY, max_days: int = 0) -> Iterator[Samples]:
    opened = Samples(folder, max_bytes, max_days)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Puts the gateway's clock so many seconds ahead; what is too old is looked for at each flush."""
    real = time.time
    monkeypatch.setattr("edge.ring._DAYS_S", 0.0)
    return lambda ahead_s: monkeypatch.setattr(time, "time", lambda: real() + ahead_s)


def reader(folder: Path) -> contextlib.closing[SampleReader]:
    return contextlib.closing(SampleReader(folder))


def seconds(store: Samples, first: int, last: int, *tags: str) -> None:
    """One sample a second and tag, one flush a second, as on a plant; the value is the second."""
    for second in range(first, last):
        store.append([Sample(tag, START + second * S, float(second), GOOD) for tag in tags])
        store.flush()


def rows(folder: Path, query: str) -> list[tuple[int, ...]]:
    db = sqlite3.connect(folder / "samples.db")
    found = db.execute(query).fetchall()
    db.close()
    return found


def test_slow_tags_end_up_in_few_blocks(tmp_path: Path) -> None:
    with ring(tmp_path) as store:
        seconds(store, 0, 1000, "a/x", "a/y")
        with reader(tmp_path) as found:
            columns = found.columns("a/y")
            assert columns is not None
            assert columns[1].tolist() == list(range(1000))
    assert 0 < rows(tmp_path, "SELECT count(*) FROM journal")[0][0] < 64
    counts = [count for (count,) in rows(tmp_path, "SELECT count FROM block WHERE tag = 1 ORDER BY id")]
    assert len(counts) <= 6
    assert sum(counts) == 960


def test_samples_of_a_stretch_of_time(tmp_path: Path) -> None:
    with ring(tmp_path) as store, reader(tmp_path) as found:
        seconds(store, 0, 150, "a/x")
        for since, until, wanted in (
            (20, 30, range(19, 31)),  # with the value that holds at the beginning
            (0, 3, range(4)),
            (140, 1000, range(139, 150)),
            (60, 70, range(59, 71)),  # where a block ends
        ):
            columns = found.columns("a/x", START + since * S, until_ns=START + until * S)
            assert columns is not None
            assert columns[1].tolist() == list(wanted)
        assert found.columns("a/x", until_ns=START - 1) is None
        assert found.columns("a/none") is None


def test_samples_go_when_their_days_are_over_but_the_newest(tmp_path: Path, later: Callable[[float], None]) -> None:
    with ring(tmp_path, max_days=2) as store:
        for day in range(6):
            later(day * 86_401)
            seconds(store, day * 86_400, day * 86_400 + 3, "a/x", *(["a/once"] if day == 0 else []))
        with reader(tmp_path) as found:
            columns = found.columns("a/x")
            assert columns is not None
            days = sorted({int(value) // 86_400 for value in columns[1]})
            assert days == [3, 4, 5]  # a block may hold a day, and goes as a whole
            once = found.columns("a/once")
            assert once is not None
            assert once[1].tolist() == list(range(3))


def test_samples_go_by_days_while_nothing_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    with ring(tmp_path, max_days=2) as store:
        seconds(store, 0, 2, "a/x")
        (journal,) = rows(tmp_path, "SELECT count(*) FROM journal")
        assert journal == (2,)
    monkeypatch.setattr("edge.ring._DAYS_S", 0.0)
    with ring(tmp_path, max_days=2) as store:
        store.flush()
        assert rows(tmp_path, "SELECT count(*) FROM journal") == [(0,)]
        monkeypatch.setattr(time, "time", lambda: real() + 2 * 86_400)
        seconds(store, 10, 11, "a/x")
        assert rows(tmp_path, "SELECT count(*) FROM block") == [(2,)]
        monkeypatch.setattr(time, "time", lambda: real() + 3 * 86_401)
        store.flush()
        assert rows(tmp_path, "SELECT first_ns FROM block") == [(START + 10 * S,)]


def test_merging_makes_no_sample_younger(tmp_path: Path, later: Callable[[float], None]) -> None:
    with ring(tmp_path, max_days=1) as store:
        for half_day in range(12):
            later(half_day * 43_200)
            seconds(store, half_day, half_day + 1, "a/x")
        with reader(tmp_path) as found:
            columns = found.columns("a/x")
            assert columns is not None
            assert columns[1][0] >= 7  # a day, and one late


def test_a_stamp_of_a_wrong_clock_does_not_become_the_newest_time(tmp_path: Path) -> None:
    with ring(tmp_path) as store, reader(tmp_path) as found:
        store.append([Sample("a/x", 2**63 - 1, 1.0, GOOD)])
        store.flush()
        seconds(store, 0, 130, "a/x")
        assert found.newest_ns(["a/x"]) == START + 129 * S
        assert found.newest_ns(["a/none"]) == 0
        assert rows(tmp_path, "SELECT max(newest_ns) FROM block") == [(START + 126 * S,)]


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_file_is_set_aside_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "samples.db").write_bytes(b"not a database" * 1000)
    with ring(tmp_path) as store, reader(tmp_path) as found:
        assert "is set aside as samples.db.damaged" in store.notice
        seconds(store, 0, 3, "a/x")
        assert store.error == ""
        columns = found.columns("a/x")
        assert columns is not None
        assert columns[1].tolist() == [0, 1, 2]
    assert (tmp_path / "samples.db.damaged").read_bytes() == b"not a database" * 1000
    with ring(tmp_path) as store:
        assert store.notice == ""


def test_a_file_that_is_damaged_in_use_is_set_aside(tmp_path: Path) -> None:
    """A worn-out page: the flush that needs it begins a new file, and is stored there."""
    with ring(tmp_path) as store:
        seconds(store, 0, 200, "a/x", "a/y")
    ((root,),) = rows(tmp_path, "SELECT rootpage FROM sqlite_master WHERE name = 'block'")
    size = (tmp_path / "samples.db").stat().st_size
    with (tmp_path / "samples.db").open("r+b") as file:
        file.seek(4096 * (root - 1))
        file.write(os.urandom(4096))
    with ring(tmp_path) as store:
        assert store.notice == ""
        seconds(store, 200, 280, "a/x", "a/y")
        assert "is set aside" in store.notice
        assert (store.dropped, store.error) == (0, "")
        with reader(tmp_path) as found:
            columns = found.columns("a/x")
            assert columns is not None
            values = columns[1].tolist()
            assert values == list(range(int(values[0]), 280))
    assert (tmp_path / "samples.db.damaged").stat().st_size >= size


def test_a_damaged_file_that_cannot_be_set_aside_yet_is_tried_again(tmp_path: Path) -> None:
    with ring(tmp_path) as store:
        seconds(store, 0, 200, "a/x")
    ((root,),) = rows(tmp_path, "SELECT rootpage FROM sqlite_master WHERE name = 'block'")
    with (tmp_path / "samples.db").open("r+b") as file:
        file.seek(4096 * (root - 1))
        file.write(os.urandom(4096))
    hindrance = tmp_path / "samples.db.damaged" / "full"
    hindrance.mkdir(parents=True)
    with ring(tmp_path) as store:
        seconds(store, 200, 280, "a/x")
        assert store.dropped > 0
        assert "samples can't be stored: " in store.error
        hindrance.rmdir()
        hindrance.parent.rmdir()
        seconds(store, 280, 290, "a/x")
        dropped = store.dropped
        seconds(store, 290, 300, "a/x")
        assert (store.dropped, store.error) == (dropped, "")
        assert "is set aside" in store.notice
        with reader(tmp_path) as found:
            columns = found.columns("a/x")
            assert columns is not None
            assert columns[1].tolist()[-10:] == list(range(290, 300))


def test_a_file_of_an_older_program_is_set_aside(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "samples.db")
    db.execute("CREATE TABLE sample (time_ns INTEGER)")  # of schema 1
    db.execute("PRAGMA user_version = 1")
    db.close()
    with ring(tmp_path) as store, reader(tmp_path) as found:
        assert "is of an older program (schema 1) and is set aside as samples.db.damaged" in store.notice
        seconds(store, 0, 3, "a/x")
        assert found.columns("a/x") is not None
    assert (tmp_path / "samples.db.damaged").exists()


def test_a_damaged_block_costs_its_samples_alone(tmp_path: Path) -> None:
    with ring(tmp_path) as store:
        seconds(store, 0, 192, "a/x")
    db = sqlite3.connect(tmp_path / "samples.db", isolation_level=None)
    (number, data) = db.execute("SELECT id, data FROM block ORDER BY id LIMIT 1").fetchone()
    db.execute("UPDATE block SET data = ? WHERE id = ?", (data[:-1] + bytes([data[-1] ^ 1]), number))
    db.execute("INSERT INTO journal (count, data) VALUES (7, ?)", (b"\x01 no block",))
    db.close()
    with ring(tmp_path) as store, reader(tmp_path) as found:
        seconds(store, 192, 300, "a/x")
        assert (store.dropped, store.error) == (7, "")
        columns = found.columns("a/x")
        assert columns is not None
        values = columns[1].tolist()
        assert values == list(range(int(values[0]), 300))
        assert 0 < values[0] <= 192


WRITER = """
import sys
from pathlib import Path
from edge.ring import Samples
from edge.tags import Quality, Sample, Scan
samples, number = Samples(Path(sys.argv[1]), 1 << 30), 0
while True:
    samples.append([Sample("a/x", number, float(number), Quality.GOOD)])
    samples.flush()
    number += 1
    print(number, flush=True)
"""


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.77, 1.0])
def test_a_power_cut_that_tears_the_write_ahead_log(tmp_path: Path, keep: float) -> None:
    """`kill -9`, and only a part of the log on the disk: what is there is whole, from the beginning, and goes on."""
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        while int(child.stdout.readline()) < 300:
            pass
        child.send_signal(signal.SIGKILL)
    log = tmp_path / "samples.db-wal"
    size = log.stat().st_size
    os.truncate(log, int(size * keep))
    with ring(tmp_path) as store:
        assert store.notice == ""
        store.append([Sample("a/x", 10**6, 1.0, GOOD)])
        store.flush()
        assert store.error == ""
    with reader(tmp_path) as found:
        columns = found.columns("a/x")
        assert columns is not None
        assert columns[0].tolist() == [*range(len(columns[0]) - 1), 10**6]


# -- bytes -------------------------------------------------------------------------------------------------------------

# Recorded sets whose rows are values over time, and how many nanoseconds lie between two.
RECORDED = {"skab": S, "hydraulic": S, "cmapss": S, "gasturbine_nox": 3600 * S, "ai4i2020": 60 * S}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_scalars_take_four_bytes_at_most(tmp_path: Path, name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"no recorded data in {DATA / name}")
    with np.load(DATA / name / f"{name}.npz", allow_pickle=False) as file:
        x = file["x_train"]
    series = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)[:, :2000].astype(np.float64)
    before = 0
    with ring(tmp_path) as store, reader(tmp_path) as found:
        before = store.used()
        for row in range(series.shape[1]):
            time_ns = START + row * RECORDED[name]
            store.append([Sample(f"plc1/{c}", time_ns, float(series[c, row]), GOOD) for c in range(len(series))])
            store.flush()
        taken = store.used() - before
        assert (store.dropped, store.error) == (0, "")
        for c in range(len(series)):
            columns = found.columns(f"plc1/{c}")
            assert columns is not None
            np.testing.assert_array_equal(columns[1], series[c])
    assert taken / series.size <= 4.0
    print(f"{name}: {taken / series.size:.2f} bytes a sample")  # noqa: T201 - shown by pytest -s


def test_recorded_waveforms_take_four_bytes_a_value_at_most(tmp_path: Path) -> None:
    if not (DATA / "cwru_bearing").is_dir():
        pytest.skip(f"no recorded data in {DATA / 'cwru_bearing'}")
    with np.load(DATA / "cwru_bearing" / "cwru_bearing.npz", allow_pickle=False) as file:
        x = file["x_train"][:600, 0]
    with ring(tmp_path) as store, reader(tmp_path) as found:
        before = store.used()
        for number, wave in enumerate(x):
            store.append([Sample("plc1/vib", START + number * S, wave, GOOD)])
            store.flush()
        columns = found.columns("plc1/vib")
        assert columns is not None
        assert columns[1].tobytes() == x.tobytes()
        taken = store.used() - before
    assert taken / x.size <= 4.0
    print(f"cwru_bearing: {taken / x.size:.2f} bytes a value")  # noqa: T201 - shown by pytest -s


def test_scans_are_stored_as_their_samples(tmp_path: Path) -> None:
    refs: tuple[str, ...] = ("a/x", "a/y", "a/z")
    random = np.random.default_rng(0)
    batches: list[Scan | list[Sample]] = []
    for i in range(40):
        quality = random.integers(0, 3, len(refs)).astype(np.int8)
        values = np.where(quality == 0, np.nan, random.normal(size=len(refs)))
        batches.append(Scan(refs, START + i * S - (S // 2 if i % 7 == 0 else 0), values, quality))
        if i == 20:  # a cut, of which the store hears in the same flush
            batches.append([Sample("a/y", START + i * S + 5, float("nan"), Quality.BAD)])
        if i == 30:  # from now on one of them is read apart
            refs = ("a/x", "a/z")
            batches.append([Sample("a/y", START + i * S + 5, 1.5, GOOD)])
    for folder, flushes in (("one", [batches]), ("some", [batches[:12], batches[12:25], batches[25:]])):
        with ring(tmp_path / f"scans-{folder}") as scans, ring(tmp_path / f"samples-{folder}") as samples:
            for flush in flushes:
                for batch in flush:
                    scans.append(batch)
                    samples.append(list(batch))
                scans.flush()
                samples.flush()
            assert (scans.dropped, scans.error) == (0, "")
        with reader(tmp_path / f"scans-{folder}") as left, reader(tmp_path / f"samples-{folder}") as right:
            for ref in ("a/x", "a/y", "a/z"):
                one, other = left.columns(ref), right.columns(ref)
                assert one is not None
                assert other is not None
                assert len(one[0]) > 20
                for found, expected in zip(one, other, strict=True):
                    np.testing.assert_array_equal(found, expected)


def test_what_a_tag_was_before_its_row_changed_is_not_mixed_in(tmp_path: Path) -> None:
    with ring(tmp_path) as store, reader(tmp_path) as found:

        def known() -> list[float]:
            columns = found.columns("a/x")
            return [] if columns is None else columns[1].tolist()

        store.retag({"a/x": "ABCD", "a/y": "ABCD"})
        seconds(store, 0, 100, "a/x", "a/y")
        store.retag({"a/x": "CDAB", "a/y": "ABCD"})
        store.flush()
        assert known() == []  # before the first sample of the new kind
        assert found.newest_ns(["a/x"]) == 0
        seconds(store, 100, 170, "a/x", "a/y")
        assert known() == [float(i) for i in range(100, 170)]
        other = found.columns("a/y")
        assert other is not None
        assert len(other[0]) == 170
        store.retag({"a/x": "ABCD", "a/y": "ABCD"})  # the first row was right after all
        seconds(store, 170, 180, "a/x")
        assert known() == [*map(float, range(100)), *map(float, range(170, 180))]
    with ring(tmp_path) as store, reader(tmp_path) as found:
        store.retag({"a/x": "ABCD"})
        store.flush()
        columns = found.columns("a/x")
        assert columns is not None
        assert len(columns[0]) == 110
