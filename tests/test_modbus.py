"""What is Modbus' alone: blocks, byte orders, addresses as people write them, and devices that refuse a register."""

import asyncio
import contextlib
import math
import struct
from collections.abc import AsyncIterator
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.drivers._modbus_map import Address, Block, Spot, decoder, parse_address, parse_type, plan_blocks
from edge.drivers.modbus import Driver
from edge.tags import Quality, Sample, Tag
from models.errors import UserError
from tests.rigs import Collector, ModbusRig, RtuRig, until


class Piece(NamedTuple):
    at: int
    length: int

    @property
    def count(self) -> int:  # type: ignore[override]
        return self.length


pieces = st.lists(st.builds(Piece, st.integers(0, 400), st.sampled_from([1, 2, 4])), min_size=1, max_size=60)


@given(pieces, st.integers(0, 20), st.integers(4, 125), st.sets(st.integers(0, 400), max_size=5))
def test_blocks_cover_each_span_once_within_the_limits(
    spans: list[Piece], gap: int, most: int, borders: set[int]
) -> None:
    blocks = plan_blocks(spans, gap, most, borders)
    assert sorted(place for block in blocks for place in block.members) == list(range(len(spans)))
    for block in blocks:
        assert block.size <= most
        members = sorted(block.members, key=lambda place: spans[place].at)
        end = block.at
        for place in members:
            assert block.at <= spans[place].at
            assert spans[place].at - end <= gap
            end = max(end, spans[place].at + spans[place].length)
        assert end == block.at + block.size
        starts = [spans[place].at for place in members]
        assert not any(starts[0] < border <= starts[-1] for border in borders)


@given(pieces)
def test_blocks_without_limits_are_one(spans: list[Piece]) -> None:
    assert len(plan_blocks(spans, 500, 500)) == 1


def test_blocks_by_example() -> None:
    spans = [Piece(0, 2), Piece(2, 1), Piece(10, 4), Piece(40, 1)]
    assert [(b.at, b.size) for b in plan_blocks(spans, 8, 120)] == [(0, 14), (40, 1)]
    assert [(b.at, b.size) for b in plan_blocks(spans, 6, 120)] == [(0, 3), (10, 4), (40, 1)]
    assert [(b.at, b.size) for b in plan_blocks(spans, 50, 13)] == [(0, 3), (10, 4), (40, 1)]
    assert [(b.at, b.size) for b in plan_blocks(spans, 50, 120, {2})] == [(0, 2), (2, 39)]


def tag(address: str = "holding:0", type_: str = "", **more: Any) -> Tag:
    return Tag(source="m", name="x", address=address, type=type_, file="drive.csv", line=4, **more)


def sent(*registers: int) -> bytes:
    return struct.pack(f">{len(registers)}H", *registers)


@pytest.mark.parametrize(
    ("type_", "registers", "value"),
    [
        ("", [0xFFFE], 65534),
        ("uint16", [0x0102], 0x0102),
        ("uint16:BADC", [0x0102], 0x0201),
        ("int16", [0xFFFE], -2),
        ("uint32", [0x0A0B, 0x0C0D], 0x0A0B0C0D),
        ("uint32:CDAB", [0x0C0D, 0x0A0B], 0x0A0B0C0D),
        ("uint32:BADC", [0x0B0A, 0x0D0C], 0x0A0B0C0D),
        ("uint32:DCBA", [0x0D0C, 0x0B0A], 0x0A0B0C0D),
        ("int32:cdab", [0xFFFF, 0xFFFF], -1),
        # 123456.0 is 0x47F12000
        ("float32:ABCD", [0x47F1, 0x2000], 123456.0),
        ("float32:CDAB", [0x2000, 0x47F1], 123456.0),
        ("float32:BADC", [0xF147, 0x0020], 123456.0),
        ("float32:DCBA", [0x0020, 0xF147], 123456.0),
        ("uint64", [0x0102, 0x0304, 0x0506, 0x0708], 0x0102030405060708),
        ("uint64:CDAB", [0x0708, 0x0506, 0x0304, 0x0102], 0x0102030405060708),
        ("int64:DCBA", [0xFEFF, 0xFFFF, 0xFFFF, 0xFFFF], -2),
        # pi is 0x400921FB54442D18
        ("float64:ABCD", [0x4009, 0x21FB, 0x5444, 0x2D18], math.pi),
        ("float64:CDAB", [0x2D18, 0x5444, 0x21FB, 0x4009], math.pi),
        ("float64:BADC", [0x0940, 0xFB21, 0x4454, 0x182D], math.pi),
    ],
)
def test_known_vectors(type_: str, registers: list[int], value: float) -> None:
    spot = Spot(tag("holding:7", type_), 1, 1000)
    assert spot.count == len(registers)
    assert list(decoder(Block(5, len(registers) + 3, [0]), [spot])(sent(9, 9, *registers, 9))) == [value]


@given(st.floats(width=32, allow_nan=False), st.sampled_from(["ABCD", "CDAB", "BADC", "DCBA"]))
def test_orders_permute_bytes(value: float, order: str) -> None:
    swapped = bytes(struct.pack(">f", value)["ABCD".index(letter)] for letter in order)
    spot = Spot(tag("holding:0", f"float32:{order}"), 1, 1000)
    assert list(decoder(Block(0, 2, [0]), [spot])(swapped)) == [value]


def test_bits() -> None:
    spots = [Spot(tag(f"holding:3.{bit}"), 1, 1000) for bit in (0, 1, 15)]
    assert decoder(Block(2, 2, [0, 1, 2]), spots)(sent(0, 0x8002)) == [0, 1, 1]
    coils = [Spot(tag("coil:5"), 1, 1000), Spot(tag("coil:6"), 1, 1000)]
    assert decoder(Block(4, 3, [0, 1]), coils)([False, True, False]) == [1, 0]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["int16", "uint32", "float32", "float64"])), min_size=1, max_size=9
    ),
    st.sampled_from(["ABCD", "CDAB", "BADC", "DCBA"]),
    st.randoms(use_true_random=False),
)
def test_many_values_of_a_block_are_each_what_one_alone_is(
    parts: list[tuple[int, str]], order: str, random: Random
) -> None:
    spots, at = [], 7
    for gap, kind in parts:
        at += gap
        spots.append(Spot(tag(f"holding:{at}", f"{kind}:{order}"), 0, 100))
        at += spots[-1].count
    registers = [random.randrange(65536) for _ in range(at - 7)]
    together = decoder(Block(7, len(registers), []), spots)(sent(*registers))
    alone = [
        decoder(Block(spot.at, spot.count, []), [spot])(sent(*registers[spot.at - 7 :][: spot.count])) for spot in spots
    ]
    np.testing.assert_array_equal(together, [value for (value,) in alone])


@pytest.mark.parametrize(
    ("text", "base", "expected"),
    [
        ("holding:0", 1, Address("holding", 0)),
        ("input:12", 1, Address("input", 12)),
        ("coil:3", 0, Address("coil", 3)),
        ("discrete:65535", 1, Address("discrete", 65535)),
        ("holding:5.3", 1, Address("holding", 5, 3)),
        ("40001", 1, Address("holding", 0)),
        ("40001", 0, Address("holding", 1)),
        ("40000", 0, Address("holding", 0)),
        ("400001", 1, Address("holding", 0)),
        ("465536", 1, Address("holding", 65535)),
        ("30010", 1, Address("input", 9)),
        ("10001", 1, Address("discrete", 0)),
        ("00001", 1, Address("coil", 0)),
        (" 40006.15 ", 1, Address("holding", 5, 15)),
    ],
)
def test_addresses(text: str, base: int, expected: Address) -> None:
    assert parse_address(text, base, tag()) == expected


@pytest.mark.parametrize(
    "text", ["", "1", "50001", "4000", "holding", "holding:-1", "holding:65536", "holding:1.16", "coil:1.1", "40000"]
)
def test_addresses_that_are_none_say_where_they_stand(text: str) -> None:
    with pytest.raises(UserError, match=r"^drive\.csv:4: address: ") as caught:
        parse_address(text, 1, tag())
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("address", "type_", "width", "key"),
    [
        ("holding:0", "float16", 0, "type"),
        ("holding:0", "float32:ACBD", 0, "type"),
        ("holding:0", "bool", 0, "type"),
        ("holding:0.1", "uint16", 0, "type"),
        ("coil:0", "float32", 0, "type"),
        ("coil:0", "bool:ABCD", 0, "type"),
        ("holding:0", "float32[8]", 8, "type"),
        ("holding:65535", "float32", 0, "address"),
    ],
)
def test_types_that_are_none_say_where_they_stand(address: str, type_: str, width: int, key: str) -> None:
    wrong = tag(address, type_, width=width)
    with pytest.raises(UserError, match=rf"^drive\.csv:4: {key}: "):
        parse_type(type_, parse_address(address, 1, wrong), wrong)


@contextlib.asynccontextmanager
async def reading(
    tags: list[Tag], refused: set[tuple[int, int]], **options: object
) -> AsyncIterator[tuple[Driver, Collector, ModbusRig]]:
    rig, sink = ModbusRig(), Collector()
    rig.refused = refused
    await rig.start()
    source = msgspec.structs.replace(rig.source, tags=tuple(tags), options=rig.source.options | options)
    driver = Driver(source, sink)
    task = asyncio.create_task(driver.run())
    try:
        yield driver, sink, rig
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await rig.stop()


def at(address: int, **more: Any) -> Tag:
    return Tag(source="plc", name=f"h{address}", address=f"holding:{address}", **more)


async def test_one_unreadable_register_does_not_take_its_neighbours() -> None:
    tags = [at(address) for address in range(10, 30)]
    async with reading(tags, {(3, 17)}) as (driver, sink, rig):
        await until(lambda: len({s.tag for s in sink.samples if s.quality is Quality.GOOD}) == 19)
        assert list(driver.health.quarantined) == ["plc/h17"]
        assert "ILLEGAL_ADDRESS" in driver.health.quarantined["plc/h17"]
        assert [s.quality for s in sink.of("plc/h17")] == [Quality.BAD]
        # From then on the blocks keep clear of it.
        await asyncio.sleep(0.3)
        rig.requests.clear()
        await asyncio.sleep(0.5)
        good = {request for request in rig.requests if request != (3, 17, 1)}
        assert len(good) <= 8
        assert not any(start <= 17 < start + count for _, start, count in good)
        assert driver.health.connects == 1


async def test_an_unreadable_register_between_two_tags_divides_them() -> None:
    async with reading([at(10), at(14)], {(3, 12)}) as (driver, sink, rig):
        await until(lambda: len({s.tag for s in sink.samples if s.quality is Quality.GOOD}) == 2)
        assert not driver.health.quarantined
        rig.requests.clear()
        await until(lambda: len(rig.requests) > 6)
        assert {request[1:] for request in rig.requests} == {(10, 1), (14, 1)}


async def test_one_cycle_is_few_requests_with_one_time() -> None:
    tags = [at(0), at(4), at(9), at(100), Tag(source="plc", name="i", address="input:3")]
    async with reading(tags, set()) as (_driver, sink, rig):
        await until(lambda: len(sink.batches) > 2)
        assert set(rig.requests) == {(3, 0, 10), (3, 100, 1), (4, 3, 1)}
        for batch in sink.batches:
            assert len(batch) == 5
            assert len({sample.time_ns for sample in batch}) == 1


async def test_the_devices_clock_stamps_what_is_read_with_it() -> None:
    tags = [at(20, sampling_ms=20)]
    async with reading(tags, set(), clock="holding:10") as (driver, sink, rig):
        # A clock that is not set stamps nothing.
        await until(lambda: bool(sink.samples))
        assert sink.samples[0].time_ns > 1_600_000_000_000_000_000
        sink.clear()
        for number, millis in enumerate((1_700_000_000_123, 1_700_000_001_123)):
            clock = struct.unpack(">4H", struct.pack(">Q", millis))
            await rig.put(10, [*clock, 0, 0, 0, 0, 0, 0, number + 7])
            expected = Sample("plc/h20", millis * 1_000_000, number + 7.0, Quality.GOOD)
            await until(lambda expected=expected: expected in sink.samples)  # type: ignore[misc]
        await asyncio.sleep(0.2)
        # Polled again within the same tick: not delivered again.
        assert sum(sample.value == 8.0 for sample in sink.samples) == 1
        assert set(rig.requests) == {(3, 10, 11)}
        assert driver.health.clock_skew_s is not None
        assert driver.health.clock_skew_s < -1e6


async def test_deadband_and_scale() -> None:
    tags = [at(20, sampling_ms=20, deadband=1.0, scale=0.1)]
    async with reading(tags, set()) as (_driver, sink, rig):
        await until(lambda: bool(sink.samples))
        for value in (9, 12, 15, 30):
            await rig.put(20, [value])
            await asyncio.sleep(0.15)
        await until(lambda: sink.samples[-1].value == pytest.approx(3.0))
        assert [s.value for s in sink.samples] == pytest.approx([0.0, 1.2, 3.0])


def test_a_clock_that_cannot_be_meant_is_refused() -> None:
    source = msgspec.structs.replace(ModbusRig().source, options={"clock": "noon"})
    with pytest.raises(UserError, match=r"source\]\] plc: clock: "):
        Driver(source, Collector())


# -- lines that several sources share -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def sharing(
    rig: ModbusRig, devices: list[int], *sources: dict[str, object]
) -> AsyncIterator[list[tuple[Driver, Collector]]]:
    """Drivers on one rig, each with a tag of its own at register 20 and options of its own."""
    rig.devices, rig.refused = devices, set()
    await rig.start()
    made, tasks = [], []
    for number, options in enumerate(sources):
        sink = Collector()
        tags = (Tag(source=f"s{number}", name="x", address="holding:20", sampling_ms=20),)
        driver = Driver(
            msgspec.structs.replace(rig.source, name=f"s{number}", tags=tags, options=rig.source.options | options),
            sink,
        )
        made.append((driver, sink))
        tasks.append(asyncio.create_task(driver.run()))
    try:
        yield made
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await rig.stop()


def values(sink: Collector) -> set[object]:
    return {sample.value for sample in sink.samples if sample.quality is Quality.GOOD}


@pytest.mark.parametrize("kind", [ModbusRig, RtuRig])
async def test_sources_at_one_place_share_one_connection(kind: type[ModbusRig]) -> None:
    rig = kind()
    async with sharing(rig, [1, 7], {"device_id": 1}, {"device_id": 7}) as ((one, first), (seven, second)):
        await until(lambda: one.health.connected and seven.health.connected)
        await rig.put(20, [11])
        await rig.put(20, [77], 7)
        await until(lambda: 11.0 in values(first) and 77.0 in values(second))
        assert 77.0 not in values(first)
        assert 11.0 not in values(second)
        assert rig.server is not None
        assert len(rig.server.active_connections) == 1
        # One that stops leaves the line to the other.
        assert one._line is seven._line
        line = one._line
        assert line is not None
        line.leave(one)
        await rig.put(20, [78], 7)
        await until(lambda: 78.0 in values(second))
        assert seven.health.connects == 1


@pytest.mark.parametrize("kind", [ModbusRig, RtuRig])
async def test_a_dead_device_costs_its_line_one_request_at_a_time(kind: type[ModbusRig]) -> None:
    rig = kind()
    rig.silent = {9}
    dead_options: dict[str, object] = {"device_id": 9, "timeout_s": 0.3}
    async with sharing(rig, [1, 9], {"device_id": 1}, dead_options) as (
        (live, sink),
        (dead, none),
    ):
        await until(lambda: live.health.connected)
        line = live._line
        assert line is not None
        asked: list[int] = []
        ask = line._ask

        async def noted(table: str, at: int, count: int, device_id: int, timeout_s: float, retries: int) -> Any:
            asked.append(device_id)
            return await ask(table, at, count, device_id, timeout_s, retries)

        line._ask = noted  # type: ignore[method-assign]
        await until(lambda: asked.count(9) >= 3)
        if isinstance(rig, RtuRig):
            assert rig.cable is not None
            asked = rig.cable.asked  # the frames themselves: nothing is sent twice either
        assert (9, 9) not in set(pairwise(asked))
        assert all(sample.quality is Quality.GOOD for sample in sink.samples)
        assert live.health.connects == 1
        assert "device_id = 9" in dead.health.error
        assert none.samples == []
        rig.silent.clear()
        await until(lambda: values(none) == {0.0})


async def test_it_stops_whatever_it_waits_for() -> None:
    rig = ModbusRig()
    await rig.start()
    try:
        for i in range(40):
            sink = Collector()
            tags = tuple(Tag(source="plc", name=f"h{at}", address=f"holding:{at}", sampling_ms=1) for at in (20, 60))
            driver = Driver(msgspec.structs.replace(rig.source, tags=tags), sink)
            task = asyncio.create_task(driver.run())
            await until(lambda sink=sink: sink.samples)  # type: ignore[misc]
            await asyncio.sleep(i / 10_000)
            task.cancel()
            # Once; Python's own wait_for may forget it.
            done, _ = await asyncio.wait({task}, timeout=10)
            assert done
    finally:
        await rig.stop()


async def test_a_late_answer_is_not_taken_for_another_registers() -> None:
    rig = RtuRig()
    # Seconds until each answer: a first one too late, a cycle in time, one so late that it is asked for twice and comes
    # twice, and the next register's just slow enough to be overtaken by it.
    late = [0.8, 0.0, 0.0, 0.8, 0.0, 0.45]
    act = rig.action

    async def action(*given: Any) -> Any:
        if given[-1] is None and late:
            await asyncio.sleep(late.pop(0))
        return await act(*given)

    rig.action = action  # type: ignore[assignment, method-assign]
    rig.refused = set()
    await rig.start()
    await rig.put(20, [20])
    await rig.put(120, [120])
    sink = Collector()
    driver = Driver(msgspec.structs.replace(rig.source, tags=(at(20), at(120))), sink)
    task = asyncio.create_task(driver.run())
    await until(lambda: not late)
    count = len(sink.batches)
    await until(lambda: len(sink.batches) > count + 3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await rig.stop()
    assert {(s.tag, s.value) for s in sink.samples if s.quality is Quality.GOOD} == {
        ("plc/h20", 20.0),
        ("plc/h120", 120.0),
    }


async def test_a_port_that_is_set_otherwise_elsewhere_is_said() -> None:
    rig = RtuRig()
    async with sharing(rig, [1], {"device_id": 1}, {"device_id": 1, "baud": 9600}) as ((one, _), (two, none)):
        await until(lambda: one.health.connected and "check baud" in two.health.error)
        assert none.samples == []


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"baud": 0}, "baud"),
        ({"parity": "X"}, "parity"),
        ({"stop_bits": 3}, "stop_bits"),
        ({"data_bits": 9}, "data_bits"),
        ({"device_id": 0}, "device_id"),
        ({"device_id": 248}, "device_id"),
    ],
)
def test_serial_settings_that_are_none(options: dict[str, object], key: str) -> None:
    source = RtuRig().source
    with pytest.raises(UserError, match=rf"source\]\] plc: {key}: "):
        Driver(msgspec.structs.replace(source, options=options), Collector())


def test_serial_settings_are_of_a_serial_port() -> None:
    source = msgspec.structs.replace(ModbusRig().source, options={"baud": 9600})
    with pytest.raises(UserError, match="baud: is of a serial port"):
        Driver(source, Collector())
