"""The gateway's two files: commits outlive kill -9, the ring keeps its bound, and a full disk stops nobody."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import ledger
from edge.history import SampleReader, Score
from edge.ring import Samples
from edge.store import Outgoing, State
from edge.tags import Quality, Sample
from models.errors import LocalError

GOOD, BAD = Quality.GOOD, Quality.BAD
PLENTY = 1 << 30
WAIT_S = 60
NOISE = np.random.default_rng(0).integers(0, 2**32, 65_536, np.uint32)


@pytest.fixture
def samples(tmp_path: Path) -> Iterator[Samples]:
    opened = Samples(tmp_path, PLENTY)
    yield opened
    opened.close()


def reader(folder: Path) -> contextlib.closing[SampleReader]:
    return contextlib.closing(SampleReader(folder))


def noise(number: int, tag: str = "a/w") -> Sample:
    """A quarter of a megabyte that does not compress; its number is its time."""
    wave = (np.roll(NOISE, number) >> 9 | 0x3F800000).view(np.float32)
    return Sample(tag, number, wave, GOOD)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- samples -----------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["a/x", "a/y", "b/x"]),
                st.integers(0, 2**63 - 1),
                st.floats(allow_nan=True, allow_infinity=False),
                st.sampled_from(Quality),
            ),
            max_size=12,
        ),
        max_size=5,
    )
)
@settings(max_examples=40, deadline=None)
def test_scalars_come_back_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, flushes: list[list[tuple[str, int, float, Quality]]]
) -> None:
    folder = tmp_path_factory.mktemp("ring")
    store = Samples(folder, PLENTY)
    for flush in flushes:
        store.append([Sample(*one) for one in flush])
        store.flush()
    store.close()
    assert (store.dropped, store.error) == (0, "")
    with reader(folder) as found:
        for tag in ("a/x", "a/y", "b/x"):
            mine = sorted((one[1:] for flush in flushes for one in flush if one[0] == tag), key=lambda one: one[0])
            columns = found.columns(tag)
            if not mine:
                assert columns is None
                continue
            assert columns is not None
            assert columns[0].tolist() == [one[0] for one in mine]
            np.testing.assert_array_equal(columns[1], [one[1] for one in mine])
            assert columns[2].tolist() == [one[2] for one in mine]
        last = next((flush for flush in reversed(flushes) if any(one[0] == "a/x" for one in flush)), [])
        assert found.newest_ns(["a/x"]) == max((one[1] for one in last if one[0] == "a/x"), default=0)


def test_waveforms_come_back_and_their_notices_are_left_out(samples: Samples, tmp_path: Path) -> None:
    waves = [Sample("a/w", i, np.arange(i, i + 6, dtype=np.float32), Quality(i % 3)) for i in range(5)]
    samples.append([*waves[:3], Sample("a/w", 9, np.empty(0, np.float32), BAD), Sample("a/w", 10, float("nan"), BAD)])
    samples.flush()
    samples.append([waves[4], waves[3]])
    samples.flush()
    with reader(tmp_path) as found:
        columns = found.columns("a/w")
        assert columns is not None
        assert columns[0].tolist() == [0, 1, 2, 3, 4]
        assert columns[1].dtype == np.float32
        assert columns[1].tolist() == [np.arange(i, i + 6).tolist() for i in range(5)]
        assert columns[2].tolist() == [0, 1, 2, 0, 1]


def test_a_waveform_that_was_never_good(samples: Samples, tmp_path: Path) -> None:
    samples.append([Sample("a/w", i, np.empty(0, np.float32), BAD) for i in range(3)])
    samples.flush()
    with reader(tmp_path) as found:
        columns = found.columns("a/w")
        assert columns is not None
        assert columns[0].tolist() == [0, 1, 2]
        assert np.isnan(columns[1]).all()
        assert columns[2].tolist() == [BAD] * 3


def test_blocks_larger_than_one(samples: Samples, tmp_path: Path) -> None:
    samples.append([Sample("a/x", i, float(i), GOOD) for i in range(200_000)])
    samples.flush()
    with reader(tmp_path) as found:
        columns = found.columns("a/x")
        assert columns is not None
        assert np.array_equal(columns[0], np.arange(200_000))
        newest = found.columns("a/x", most=10)
        assert newest is not None
        assert newest[0][-1] == 199_999
        assert 10 <= len(newest[0]) <= 65_536


def test_a_value_that_has_long_held_comes_along(samples: Samples, tmp_path: Path) -> None:
    """A machine-state tag reports on change alone: its value of hours ago is its value now."""
    for at in (10, 20, 5_000):
        samples.append([Sample("a/run", at, float(at), GOOD)])
        samples.flush()
    with reader(tmp_path) as found:
        columns = found.columns("a/run", since_ns=1_000)
        assert columns is not None
        assert columns[0].tolist() == [20, 5_000]
        columns = found.columns("a/run", since_ns=9_000)
        assert columns is not None
        assert columns[0].tolist() == [5_000]
        columns = found.columns("a/run", since_ns=5)
        assert columns is not None
        assert columns[0].tolist() == [10, 20, 5_000]


def test_the_ring_keeps_its_bound_and_drops_the_oldest(tmp_path: Path) -> None:
    bound = 4 << 20
    store = Samples(tmp_path, bound)
    store.append([Sample("a/run", 0, 1.0, GOOD)])
    for number in range(60):
        store.append([noise(number)])
        store.flush()
        assert store.used() <= bound
    with reader(tmp_path) as found:
        columns = found.columns("a/w")
        assert columns is not None
        kept = columns[0].tolist()
        assert kept == list(range(kept[0], 60))
        assert 8 <= len(kept) <= 24
        # What seldom changes outlives what is newer than it: its last value holds today.
        held = found.columns("a/run")
        assert held is not None
        assert held[0].tolist() == [0]
    store.close()
    assert (tmp_path / "samples.db").stat().st_size < 2 * bound
    assert (store.dropped, store.error) == (0, "")


def test_a_bound_below_one_block_keeps_the_newest_block_alone(tmp_path: Path) -> None:
    store = Samples(tmp_path, 1000)
    for number in range(5):
        store.append([noise(number)])
        store.flush()
    store.close()
    with reader(tmp_path) as found:
        columns = found.columns("a/w")
        assert columns is not None
        assert columns[0].tolist() == [4]


def test_a_time_that_no_int64_holds_is_dropped_alone(samples: Samples, tmp_path: Path) -> None:
    year_9999 = 253_402_300_799 * 10**9
    samples.append([Sample("a/x", year_9999, 1.0, GOOD), Sample("a/x", 7, 2.0, GOOD), Sample("a/x", -1, 3.0, GOOD)])
    samples.flush()
    samples.append([Sample("a/x", 8, 4.0, GOOD)])
    samples.flush()
    assert samples.dropped == 2
    with reader(tmp_path) as found:
        columns = found.columns("a/x")
        assert columns is not None
        assert columns[1].tolist() == [2, 4]


def test_scores(samples: Samples, tmp_path: Path) -> None:
    kept = [Score("t", 1, 10, 0.5, "ok", 3), Score("u", 2, 20, None, "learning", 0), Score("t", 3, 30, 1.5, "alarm", 4)]
    for score in kept:
        samples.score(score)
    samples.flush()
    with reader(tmp_path) as found:
        assert found.scores() == kept
        assert found.scores("t") == [kept[0], kept[2]]


def test_reading_while_writing(samples: Samples, tmp_path: Path) -> None:
    samples.append([Sample("a/x", 0, 0.0, GOOD)])
    samples.flush()
    stop = threading.Event()

    def write() -> None:
        number = 1
        while not stop.is_set():
            samples.append([Sample("a/x", number + i, float(number + i), GOOD) for i in range(100)])
            samples.flush()
            number += 100

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = 0
        with reader(tmp_path) as found:
            until(lambda: found.newest_ns(["a/x"]) > 100)
            for _ in range(50):
                columns = found.columns("a/x")
                assert columns is not None
                assert np.array_equal(columns[0], np.arange(len(columns[0])))
                assert np.array_equal(columns[1], columns[0])
                assert (len(columns[0]) - 1) % 100 == 0
                assert len(columns[0]) >= seen
                seen = len(columns[0])
    finally:
        stop.set()
        writer.join()
    assert samples.error == ""


# -- state -------------------------------------------------------------------------------------------------------------


def out(number: int, round_: int, task: str = "t") -> Outgoing:
    return Outgoing(bytes([number]) * 32, task, round_, b"envelope %d" % number)


def test_state_keeps_values(tmp_path: Path) -> None:
    state = State(tmp_path)
    assert state.get("k") is None
    state.put("k", b"1")
    state.put("k", b"\x00\xff")
    with pytest.raises(ZeroDivisionError), state.transaction():  # noqa: PT012 - the transaction is what is tested
        state.put("k", b"lost")
        state.put("other", b"lost")
        state.send(out(1, 1))
        raise ZeroDivisionError
    state.close()
    state = State(tmp_path)
    assert state.get("k") == b"\x00\xff"
    assert state.get("other") is None
    assert state.outbox() == []
    state.close()
    assert (tmp_path / "state.db").stat().st_mode & 0o777 == 0o600


def test_the_outbox(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.send(out(1, 1))
    state.send(out(2, 2))
    state.send(out(3, 1, "u"))
    assert {o.digest[0] for o in state.outbox()} == {1, 2, 3}
    state.send(out(4, 1))  # whatever the round: only a receipt takes one out
    assert {o.digest[0] for o in state.outbox()} == {1, 2, 3, 4}
    assert state.settle(bytes([1]) * 32)
    assert {o.digest[0] for o in state.outbox()} == {2, 3, 4}
    assert not state.settle(out(1, 1).digest)
    assert state.settle(out(2, 2).digest)
    assert not state.settle(out(2, 2).digest)
    state.close()
    state = State(tmp_path)
    assert sorted(state.outbox()) == sorted([out(3, 1, "u"), out(4, 1)])
    state.close()


def test_another_key_forgets_what_a_federation_gave(tmp_path: Path) -> None:
    state = State(tmp_path)
    assert state.pinned() is None
    with state.transaction():
        state.pin("north", bytes(32), "configured")
        state.put("weights/t", b"theirs")
        state.put("scale/t", b"ours")
        state.send(out(1, 1))
        state.send(out(2, 2))
        state.settle(out(2, 2).digest)
    with state.transaction():
        state.pin("renamed", bytes(32), "imported")
    assert (state.pinned(), state.answered, state.waiting) == (("renamed", bytes(32)), True, (out(1, 1),))
    with state.transaction():
        state.pin("south", b"k" * 32, "configured")
    assert (state.pinned(), state.answered, state.waiting) == (("south", b"k" * 32), False, ())
    assert (state.get("weights/t"), state.get("scale/t")) == (None, b"ours")
    assert [json.loads(line)["kind"] for line in state.ledger()] == ["federation-pinned"] * 3
    state.close()


def test_the_ledger_is_a_chain(tmp_path: Path) -> None:
    for start in range(0, 6, 2):
        state = State(tmp_path)
        state.record("update", {"round": start})
        state.record("receipt", {"round": start, "outcome": "counted", "é": None})
        lines = list(state.ledger())
        state.close()
    ledger.verify(lines)
    assert len(lines) == 6
    with pytest.raises(ledger.LedgerError, match="entry 3"):
        ledger.verify([*lines[:2], lines[2].replace('"round":2', '"round":3'), *lines[3:]])


@pytest.mark.parametrize(("name", "known"), [("state.db", 1), ("samples.db", 3)])
def test_a_file_of_another_version_is_refused(tmp_path: Path, name: str, known: int) -> None:
    db = sqlite3.connect(tmp_path / name)
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(LocalError, match=f"schema 9, this program knows {known}"):
        State(tmp_path) if name == "state.db" else Samples(tmp_path, PLENTY)


def test_a_state_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(LocalError, match="can't be opened"):
        State(tmp_path)


# -- kill -9 -----------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from edge.ring import Samples
from edge.store import Outgoing, State
from edge.tags import Quality, Sample
folder = Path(sys.argv[1])
state, samples, number = State(folder), Samples(folder, 1 << 30), 0
while True:
    with state.transaction():
        state.put("number", str(number).encode())
        state.send(Outgoing(number.to_bytes(32, "big"), "t", number, b"x" * 5000))
        state.record("update", {"round": number})
    samples.append([Sample("a/x", 50 * number + i, float(50 * number + i), Quality.GOOD) for i in range(50)])
    if number % 10 == 0:
        samples.flush()
    print(number, flush=True)
    number += 1
"""


def test_kill_9_loses_no_commit(tmp_path: Path) -> None:
    for kill_after in (1, 23, 64):
        folder = tmp_path / str(kill_after)
        folder.mkdir()
        with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout
            said = -1
            while said < kill_after:
                said = int(child.stdout.readline())
            child.send_signal(signal.SIGKILL)
            said = int((child.stdout.read().split() or [str(said)])[-1])
        state = State(folder)
        number = int(state.get("number") or b"-1")
        assert number in {said, said + 1}
        assert [int.from_bytes(o.digest, "big") for o in state.outbox()] == list(range(number + 1))
        lines = list(state.ledger())
        ledger.verify(lines)
        assert len(lines) == number + 1
        state.close()
        samples = Samples(folder, PLENTY)
        samples.append([Sample("a/x", 10**9, 1.0, GOOD)])
        samples.flush()
        assert samples.error == ""
        samples.close()
        with reader(folder) as found:
            columns = found.columns("a/x")
            assert columns is not None
            kept = len(columns[0]) - 1
            assert kept >= 50 * (said // 10 * 10 + 1)
            assert np.array_equal(columns[0][:-1], np.arange(kept))


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 28 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["/bin/mount", "-t", "tmpfs", "-o", "size=28m", "tmpfs", str(folder)], check=False, capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["/bin/umount", "-l", str(folder)], check=True)


def times(folder: Path, tag: str = "a/w") -> list[int]:
    with reader(folder) as found:
        columns = found.columns(tag)
        return [] if columns is None else [int(t) for t in columns[0]]


def test_a_disk_that_fills_up_costs_the_oldest_samples(small_disk: Path) -> None:
    samples, state = Samples(small_disk, PLENTY), State(small_disk)
    for number in range(120):  # 30 MB
        samples.append([noise(number)])
        samples.flush()
    assert "nearly full" in samples.error
    assert samples.dropped == 0
    kept = times(small_disk)
    assert kept == list(range(kept[0], 120))
    assert 4 <= len(kept) < 60
    state.send(Outgoing(b"d" * 32, "t", 1, b"e" * 200_000))  # the reserve is for what matters more
    assert len(state.outbox()) == 1
    state.close()
    samples.close()


def test_a_disk_that_somebody_else_fills_is_survived(small_disk: Path) -> None:
    samples = Samples(small_disk, PLENTY)
    for number in range(20):
        samples.append([noise(number)])
    samples.flush()
    with (small_disk / "somebody-else").open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    assert shutil.disk_usage(small_disk).free == 0
    for number in range(20, 80):
        samples.append([noise(number)])
        samples.flush()
    assert samples.error != ""
    assert times(small_disk)  # what is there stays readable
    (small_disk / "somebody-else").unlink()
    for number in range(80, 84):
        samples.append([noise(number)])
        samples.flush()
    assert samples.error == ""
    assert times(small_disk)[-4:] == [80, 81, 82, 83]
    samples.close()


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from edge.ring import Samples
from edge.tags import Quality, Sample
samples = Samples(Path(sys.argv[1]), 1 << 30)
resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, 3 << 20))
random = np.random.default_rng(0)
for number in range(40):
    samples.append([Sample("a/w", number, random.random(65536, np.float32), Quality.GOOD)])
    samples.flush()
print(samples.dropped, samples.error)
samples.append([Sample("a/w", 99, random.random(4, np.float32), Quality.GOOD)])
"""


async def test_writes_that_fail_raise_nowhere(tmp_path: Path) -> None:
    """Also without root: a process whose files may not grow."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FILE_LIMIT, str(tmp_path), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(child.communicate(), WAIT_S)
    assert child.returncode == 0, errors.decode()[-500:]
    dropped, _, error = output.decode().partition(" ")
    assert int(dropped) > 0
    assert error.startswith("samples can't be stored: ")
    assert "; free space" in error
    kept = times(tmp_path)
    assert kept
    assert kept == sorted(set(kept))
