"""The PLC simulator as a process: both protocols at once, the spindle and recorded data."""

import asyncio
import contextlib
import csv
import io
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge.drivers import modbus, opcua
from edge.lab.physics import SNAPSHOT
from edge.lab.plc import CLOCK, HEADER, DataLayout, data_layout, main, recorded_steps, tags_csv
from edge.lab.processes import free_port
from edge.tags import Driver, Quality, Source, Tag
from models.errors import UserError
from tests.rigs import Collector, until

ROOT = Path(__file__).parent.parent


def save(path: Path, x: Any, y: Any, **more: Any) -> Path:
    client = np.arange(len(x)) % 2
    np.savez(
        path, x_train=x, y_train=y, client_train=client, x_test=x[:2], y_test=y[:2], client_test=client[:2], **more
    )
    return path


def tags(text: str, source: str) -> tuple[Tag, ...]:
    found = []
    for row in csv.DictReader(io.StringIO(text)):
        name, _, width = row["type"].rstrip("]").partition("[")
        found.append(
            Tag(
                source=source,
                name=row["tag"],
                address=row["address"],
                type=name,
                scale=float(row["scale"] or 1),
                sampling_ms=int(row["sampling_ms"] or 0),
                width=int(width or 0),
            )
        )
    return tuple(found)


@contextlib.asynccontextmanager
async def reading(layout: DataLayout | None, *args: str) -> AsyncIterator[tuple[Collector, asyncio.subprocess.Process]]:
    """Start a PLC and both drivers on it, all into one collector."""
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "edge.lab.plc", "--opcua-port", str(ports[0]), "--modbus-port", str(ports[1])]
    process = await asyncio.create_subprocess_exec(*command, *args, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30.0) == b"ready\n"
    sink = Collector()
    texts = tags_csv(layout)
    clock: dict[str, object] = {} if layout is None else {"clock": CLOCK}
    sources = [
        Source(name="plc", driver="opcua", url=f"opc.tcp://127.0.0.1:{ports[0]}", tags=tags(texts[0], "plc")),
        Source(
            name="drive",
            driver="modbus",
            url=f"modbus+tcp://127.0.0.1:{ports[1]}",
            tags=tags(texts[1], "drive"),
            options=clock,
        ),
    ]
    drivers: list[Driver] = [opcua.Driver(sources[0], sink), modbus.Driver(sources[1], sink)]
    tasks = [asyncio.create_task(driver.run()) for driver in drivers]
    try:
        yield sink, process
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def columns(sink: Collector) -> dict[int, dict[str, Any]]:
    by_time: dict[int, dict[str, Any]] = defaultdict(dict)
    for sample in sink.samples:
        by_time[sample.time_ns][sample.tag.partition("/")[2]] = sample.value
    return by_time


async def test_the_spindle_by_both_protocols() -> None:
    async with reading(None, "--plant", "1", "--seed", "3", "--rate", "50") as (sink, process):
        wanted = {
            tag.ref for text, name in zip(tags_csv(None), ("plc", "drive"), strict=True) for tag in tags(text, name)
        }
        await until(lambda: {s.tag for s in sink.samples if s.quality is Quality.GOOD} >= wanted)
        await until(lambda: len(sink.of("plc/Spindle.VibRms")) > 20)
        assert all(sample.quality is Quality.GOOD for sample in sink.samples)
        wave = sink.of("plc/Spindle.Waveform")[-1].value
        assert isinstance(wave, np.ndarray)
        assert wave.shape == (SNAPSHOT,)
        speeds = [float(sample.value) for sample in sink.of("drive/Drive.Speed")]
        assert all(0 <= speed < 4000 for speed in speeds)
        assert all(0 <= float(sample.value) < 120 for sample in sink.of("drive/Drive.Torque"))
        assert process.returncode is None
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20.0) == 0


async def test_recorded_windows_arrive_aligned_and_whole(tmp_path: Path) -> None:
    x = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)
    y = np.arange(8, dtype=np.float32) / 8 + 0.5
    path = save(tmp_path / "set.npz", x, y, feature_names=np.array(["T 24 [K]", "T/24 [K]", "Segment", "p"]))
    layout = data_layout(path)
    assert layout.names == ("T_24_K", "T_24_K_2", "Segment_2", "p")
    async with reading(layout, "--data", str(path), "--client", "1", "--rate", "20") as (sink, _):
        await until(lambda: len(sink.of("drive/Data.p")) > 30 and len(sink.of("plc/Data.Segment")) > 4)
    known = {float(value): (window, step) for window in (1, 3, 5, 7) for step, value in enumerate(x[window, 0])}
    by_time, whole = columns(sink), 0
    state: dict[str, float] = {}
    for time_ns in sorted(by_time):
        state |= by_time[time_ns]
        if len({"Data.T_24_K", "Data.T_24_K_2", "Data.Segment_2", "Data.p"} & by_time[time_ns].keys()) < 4:
            continue
        window, step = known[by_time[time_ns]["Data.T_24_K"]]
        for channel, name in enumerate(layout.names):
            assert by_time[time_ns][f"Data.{name}"] == x[window, channel, step]
        assert state["Data.Target"] == y[window]
        assert time_ns % 1_000_000_000 == 0
        whole += 1
    assert whole > 12


async def test_recorded_vibration_comes_as_waveforms(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((6, 1, 300)).astype(np.float32)
    path = save(tmp_path / "wave.npz", x, np.array([0, 1, 2, 0, 1, 2]), client_names=np.array(["a", "b"]))
    layout = data_layout(path)
    assert (layout.kind, layout.modbus, layout.classes, layout.clients) == ("waveform", 0, 3, ("a", "b"))
    assert tags_csv(layout)[1] == HEADER + "\n"
    async with reading(layout, "--data", str(path), "--client", "0", "--rate", "20") as (sink, process):
        await until(lambda: len(sink.of("plc/Data.Waveform")) > 8)
        assert process.pid != os.getpid()
    by_time, whole = columns(sink), 0
    state: dict[str, Any] = {}
    for time_ns in sorted(by_time):
        state |= by_time[time_ns]
        # The two items are made one after the other, so the first value of one may be a step older than the other's.
        if not {"Data.Waveform", "Data.Target"} <= state.keys():
            continue
        window = next(w for w in (0, 2, 4) if x[w, 0].tolist() == state["Data.Waveform"].tolist())
        assert state["Data.Target"] == [0, 1, 2, 0, 1, 2][window]
        whole += 1
    assert whole > 6


def test_steps_are_the_same_for_a_seed_and_each_pass_has_new_segments(tmp_path: Path) -> None:
    x = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
    path = save(tmp_path / "set.npz", x, np.array([0, 1, 1, 0]))
    steps = recorded_steps(path, 0, "train", 1)
    first = [next(steps) for _ in range(20)]
    assert [step.nodes["Data.Segment"] for step in first] == [s for s in (1, 2, 3, 4) for _ in range(5)]
    assert all(b.time_ns - a.time_ns == 1_000_000_000 for a, b in pairwise(first))
    again = recorded_steps(path, 0, "train", 1)
    assert [next(again).nodes for _ in range(20)] == [step.nodes for step in first]
    assert list(first[0].nodes)[:3] == ["Data.Segment", "Data.Target", "Data.Running"]


def test_rows_are_steps_of_one_segment(tmp_path: Path) -> None:
    path = save(tmp_path / "rows.npz", np.arange(12, dtype=np.float32).reshape(6, 2), np.array([0, 1, 0, 1, 0, 1]))
    layout = data_layout(path)
    assert (layout.kind, layout.length, layout.names, layout.modbus) == ("rows", 1, ("x0", "x1"), 1)
    steps = recorded_steps(path, 1, "train", 0)
    found = [next(steps) for _ in range(6)]
    assert [step.nodes["Data.Segment"] for step in found] == [1, 1, 1, 2, 2, 2]
    assert sorted(step.nodes["Data.x0"] for step in found[:3]) == [2.0, 6.0, 10.0]


def test_what_cannot_be_played_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = save(tmp_path / "p.npz", np.zeros((4, 1, 8, 8), np.float32), np.zeros(4, np.int64))
    with pytest.raises(UserError, match="pictures"):
        data_layout(pictures)
    odd = np.array([{}, {}], dtype=object)
    np.savez(tmp_path / "o.npz", x_train=odd)
    (tmp_path / "t.npz").write_text("no archive")
    windows = save(tmp_path / "w.npz", np.zeros((4, 2, 8), np.float32), np.zeros(4, np.int64))
    for path, client in ((pictures, 0), (tmp_path / "o.npz", 0), (tmp_path / "t.npz", 0), (windows, 9)):
        ports = ["--opcua-port", str(free_port()), "--modbus-port", str(free_port())]
        assert main([*ports, "--data", str(path), "--client", str(client)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "Traceback" not in said
