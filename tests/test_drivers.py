"""The contract of edge.tags.Driver, held for every file in edge/drivers; and what is OPC UA's alone."""

import asyncio
import contextlib
import inspect
import math
import time
import types
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio
from asyncua import ua

from edge.drivers import registry
from edge.drivers.registry import driver_names, load
from edge.lab.processes import free_port
from edge.tags import Driver, Quality, Source, Tag, sleep_backoff
from edge.window import Windower, Wiring
from models.errors import UserError
from models.spec import Window
from tests.opcua_rigs import Line
from tests.rigs import RIGS, Collector, OpcuaRig, Rig, until


@contextlib.asynccontextmanager
async def running(driver: Driver) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(driver.run())
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def make(source: Source) -> tuple[Driver, Collector]:
    sink = Collector()
    driver: Driver = load(source.driver).Driver(source, sink)
    return driver, sink


# A server takes seconds to start, so one serves all tests of a protocol; each leaves it as it needs it itself.
@pytest_asyncio.fixture(params=RIGS, scope="module", loop_scope="module")
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    made = RIGS[request.param]()
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plant() -> AsyncIterator[OpcuaRig]:
    made = OpcuaRig()
    await made.start()
    try:
        yield made
    finally:
        await made.stop()


shared = pytest.mark.asyncio(loop_scope="module")


def last(sink: Collector, ref: str) -> tuple[object, Quality]:
    found = sink.of(ref)
    return (found[-1].value, found[-1].quality) if found else (None, Quality.BAD)


def all_good(sink: Collector) -> bool:
    good = {sample.tag for sample in sink.samples if sample.quality is Quality.GOOD}
    return {"plc/a", "plc/b", "plc/flag"} <= good


def test_every_driver_has_a_rig_and_a_place_in_the_registry() -> None:
    assert set(driver_names()) == {rig().source.driver for rig in RIGS.values()}
    for name in driver_names():
        module = load(name)
        assert module.Driver.schemes
        assert all(isinstance(kind, type) for kind in module.OPTIONS.values())
        assert inspect.isasyncgenfunction(module.diagnose)
    with pytest.raises(KeyError):
        load("registry")


@pytest.mark.parametrize("path", sorted(Path(registry.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_no_driver_can_change_a_machine(path: Path) -> None:
    # Certificates are written to files, which are no machines.
    source = path.read_text().replace(".write_bytes(", "(")
    for word in ("write_", ".write", "WriteRequest", "WriteValue", "set_value", "call_method", "execute("):
        assert word not in source


@shared
async def test_values_arrive_scaled_good_and_stamped(rig: Rig) -> None:
    driver, sink = make(rig.source)
    for name, value in (("a", 1.5), ("b", 2), ("flag", 1)):
        await rig.change(name, value)
    begin = time.time_ns()
    async with running(driver):
        await until(lambda: all_good(sink) and driver.health.connected)
        assert last(sink, "plc/a") == (4.0, Quality.GOOD)
        assert last(sink, "plc/b") == (5.0, Quality.GOOD)
        assert last(sink, "plc/flag") == (1.0, Quality.GOOD)
        await rig.change("a", -3.25)
        await rig.change("b", -7)
        await rig.change("flag", 0)
        await until(lambda: last(sink, "plc/a")[0] == -5.5)
        await until(lambda: last(sink, "plc/b")[0] == -13.0)
        await until(lambda: last(sink, "plc/flag")[0] == 0.0)
    assert driver.health.samples == len(sink.samples)
    assert driver.health.bad == sum(sample.quality is Quality.BAD for sample in sink.samples)
    for sample in sink.samples:
        assert begin - 60e9 < sample.time_ns <= time.time_ns()
    for batch in sink.batches:
        assert [s.time_ns for s in batch] == sorted(s.time_ns for s in batch)


@shared
async def test_a_cut_is_bad_for_every_tag_once_and_heals_by_itself(rig: Rig) -> None:
    driver, sink = make(rig.source)
    async with running(driver):
        await until(lambda: all_good(sink))
        sink.clear()
        await rig.stop()
        refs = {tag.ref for tag in rig.source.tags}
        await until(lambda: refs <= {s.tag for s in sink.samples if s.quality is Quality.BAD}, 5.0)
        assert not driver.health.connected
        assert driver.health.error.startswith("plc: ")
        await asyncio.sleep(0.7)
        bad = [s.tag for s in sink.samples if s.quality is Quality.BAD]
        assert sorted(bad) == sorted(refs)
        sink.clear()
        await rig.start()
        await until(lambda: all_good(sink) and driver.health.connected)
        assert driver.health.connects == 2
        assert driver.health.error == ""


@shared
async def test_a_refused_tag_stands_apart_and_heals_when_it_appears(rig: Rig) -> None:
    driver, sink = make(rig.source)
    async with running(driver):
        await until(lambda: all_good(sink) and "plc/missing" in driver.health.quarantined)
        await rig.change("a", 10)
        await until(lambda: last(sink, "plc/a")[0] == 21.0)
        missing = sink.of("plc/missing")
        assert [sample.quality for sample in missing] == [Quality.BAD]
        assert isinstance(missing[0].value, float)
        assert math.isnan(missing[0].value)
        assert list(driver.health.quarantined) == ["plc/missing"]
        assert "check" in driver.health.quarantined["plc/missing"]
        await rig.appear()
        await until(lambda: not driver.health.quarantined)
        await until(lambda: last(sink, "plc/missing")[1] is Quality.GOOD)


@shared
async def test_cancelling_returns_soon(rig: Rig) -> None:
    driver, sink = make(rig.source)
    task = asyncio.create_task(driver.run())
    await until(lambda: all_good(sink))
    task.cancel()
    async with asyncio.timeout(2.0):
        with pytest.raises(asyncio.CancelledError):
            await task
    assert not driver.health.connected
    count = len(sink.samples)
    await rig.change("a", 99)
    await asyncio.sleep(0.3)
    assert len(sink.samples) == count


async def test_tries_are_ten_seconds_apart_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("edge.tags.asyncio", types.SimpleNamespace(sleep=sleep))
    for attempt in (*range(8), 10**6):
        await sleep_backoff(attempt)
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0, 10.0]


async def test_nobody_there_is_said_in_one_line_with_a_remedy() -> None:
    for rig in RIGS.values():
        source = rig().source
        driver, sink = make(source)
        async with running(driver):
            await until(lambda driver=driver: bool(driver.health.error))  # type: ignore[misc]
            assert source.url in driver.health.error
            assert "check" in driver.health.error
            assert "\n" not in driver.health.error
            await asyncio.sleep(0.6)
        assert sink.samples == []  # the source's clock is not known yet, and neither is any value


@shared
async def test_a_diagnosis_goes_to_the_values_and_names_the_refused_tag(rig: Rig) -> None:
    good = msgspec.structs.replace(rig.source, tags=tuple(tag for tag in rig.source.tags if tag != rig.missing))
    steps = [step async for step in load(rig.source.driver).diagnose(good)]
    assert [step for step in steps if step.ok is False] == []
    assert steps[-1].name == "value"
    assert "tags; plc/" in steps[-1].text
    lost = msgspec.structs.replace(rig.missing, name="lost", address=rig.missing.address.replace("issing", "essing"))
    if lost.address == rig.missing.address:  # a register, which has appeared
        lost = msgspec.structs.replace(lost, address="holding:300")
    steps = [
        step async for step in load(rig.source.driver).diagnose(msgspec.structs.replace(good, tags=(*good.tags, lost)))
    ]
    (failed,) = (step for step in steps if step.ok is False)
    assert failed.name == "tag"
    assert failed.text.startswith("plc/lost: ")
    assert "check" in failed.text


async def test_a_diagnosis_of_nobody_ends_with_one_failure_and_its_remedy() -> None:
    for rig in RIGS.values():
        source = rig().source
        steps = [step async for step in load(source.driver).diagnose(source)]
        assert [step.ok for step in steps].count(False) == 1
        assert steps[-1].ok is False
        assert "check" in steps[-1].text
        assert "\n" not in steps[-1].text


@pytest.mark.parametrize("name", RIGS)
def test_what_cannot_be_meant_is_refused_at_its_place(name: str) -> None:
    source = RIGS[name]().source
    tag = msgspec.structs.replace(source.tags[0], address=RIGS[name].wrong, file="plc.csv", line=7)
    with pytest.raises(UserError, match=r"plc\.csv:7: address: ") as caught:
        make(msgspec.structs.replace(source, tags=(tag,)))
    assert caught.value.remedy
    for url in (
        "http://127.0.0.1",
        *(f"{scheme}://" for scheme in load(source.driver).Driver.schemes),
        "opc.tcp://h:nan",
    ):
        with pytest.raises(UserError, match="url: "):
            make(msgspec.structs.replace(source, url=url))
    key = RIGS[name].positive
    with pytest.raises(UserError, match=f"{key}: "):
        make(msgspec.structs.replace(source, options={key: "soon"}))
    with pytest.raises(UserError, match=f"{key}: .*out of range"):
        make(msgspec.structs.replace(source, options={key: -1}))


def opcua(rig: OpcuaRig, *tags: Tag) -> tuple[Driver, Collector]:
    return make(msgspec.structs.replace(rig.source, tags=tags))


@shared
async def test_opcua_types_quality_and_time(plant: OpcuaRig) -> None:
    await plant.add("Text", "part 7")
    stamp = datetime(2020, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    types = {"A": "", "Text": "string", "Flag": ""}
    tags = [Tag(source="plc", name=n, address=f"nsu=urn:rig;s={n}", type=types[n]) for n in types]
    driver, sink = opcua(plant, *tags, Tag(source="plc", name="idx", address=f"ns={plant.space};s=B"))
    async with running(driver):
        await until(lambda: {s.tag for s in sink.samples} >= {"plc/A", "plc/Text", "plc/Flag", "plc/idx"})
        assert last(sink, "plc/Text") == (float(zlib.crc32(b"part 7")), Quality.GOOD)
        assert last(sink, "plc/idx") == (2.0, Quality.GOOD)
        await plant.put("A", 8.0, stamp, 0x40000000)
        await until(lambda: last(sink, "plc/A") == (8.0, Quality.UNCERTAIN))
        assert sink.of("plc/A")[-1].time_ns == 1_577_934_245_678_901_000
        await plant.put("A", 9.0, stamp, 1152)
        await until(lambda: last(sink, "plc/A") == (9.0, Quality.GOOD))
        assert driver.health.overflows == 1
        await plant.put("A", math.nan)
        await until(lambda: last(sink, "plc/A")[1] is Quality.BAD)
        await plant.put("A", 9.0)
        await until(lambda: last(sink, "plc/A") == (9.0, Quality.GOOD))
        await plant.put("A", None, None, 0x808A0000)
        await until(lambda: last(sink, "plc/A")[1] is Quality.BAD)
        assert driver.health.clock_skew_s is not None
        assert abs(driver.health.clock_skew_s) < 10


@shared
@pytest.mark.parametrize("mode", ["subscribe", "poll"])
async def test_opcua_a_text_or_array_whose_row_does_not_say_so_is_told_and_never_a_number(
    plant: OpcuaRig, mode: str
) -> None:
    await plant.add("Word", ua.LocalizedText("part 7"))
    await plant.add("Array", [0.0, 1.0, 2.0])
    await plant.add("Any", "part 7")
    tags = [
        Tag(source="plc", name=n, address=f"nsu=urn:rig;s={n}", sampling_ms=20) for n in ("A", "Word", "Array", "Any")
    ]
    made = msgspec.structs.replace(plant.source, tags=tuple(tags), options={"publishing_ms": 50, "mode": mode})
    driver, sink = make(made)
    async with running(driver):
        await until(lambda: len(driver.health.quarantined) == 3)
        told = driver.health.quarantined
        text = "is a text; write type = string: its checksum then tells segments apart"
        assert told["plc/Word"] == f"nsu=urn:rig;s=Word {text}"
        assert told["plc/Array"] == "nsu=urn:rig;s=Array is an array of 3 numbers; write type = float32[3]"
        await plant.put("Word", ua.LocalizedText("part 8"))
        await asyncio.sleep(1.5)
        # Said once, and the tag is not taken back for another look.
        assert len(told) == 3
        assert [s.quality for s in sink.of("plc/Word")] == [Quality.BAD]
        # The server's program is mended; a subscription learns of it when it is made anew.
        await plant.server.delete_nodes([plant.nodes["Any"]])  # type: ignore[union-attr]
        await plant.add("Any", 4.0)
        if mode == "subscribe":
            driver._ended = "the server ended it"  # type: ignore[attr-defined]
        await until(lambda: last(sink, "plc/Any") == (4.0, Quality.GOOD))
        await until(lambda: set(told) == {"plc/Word", "plc/Array"})
    for name in ("Word", "Array", "Any"):
        await plant.server.delete_nodes([plant.nodes.pop(name)])  # type: ignore[union-attr]


@shared
async def test_opcua_waveforms_and_deadband(plant: OpcuaRig) -> None:
    await plant.add("Wave", [0.0, 1.0, 2.0, 3.0])
    wave = Tag(source="plc", name="wave", address="nsu=urn:rig;s=Wave", width=4, scale=0.5)
    await plant.put("A", 1.5)
    band = Tag(source="plc", name="band", address="nsu=urn:rig;s=A", deadband=1.0)
    driver, sink = opcua(plant, wave, band)
    async with running(driver):
        await until(lambda: len({s.tag for s in sink.samples}) == 2)
        first = sink.of("plc/wave")[0].value
        assert isinstance(first, np.ndarray)
        assert first.dtype == np.float32
        assert first.tolist() == [0.0, 0.5, 1.0, 1.5]
        # The same snapshot again, at another time, is another sample.
        await plant.put("Wave", [0.0, 1.0, 2.0, 3.0])
        await until(lambda: len(sink.of("plc/wave")) == 2)
        await plant.put("Wave", [0.0, 1.0, 2.0])
        await until(lambda: len(sink.of("plc/wave")) == 3)
        short = sink.of("plc/wave")[-1]
        assert short.quality is Quality.BAD
        assert isinstance(short.value, np.ndarray)
        assert short.value.shape == (0,)
        assert driver.health.bad == 1
        for value in (2.0, 2.4, 2.6, 2.7):
            await plant.put("A", value)
        await until(lambda: last(sink, "plc/band")[0] == 2.6)
        assert [s.value for s in sink.of("plc/band")] == [1.5, 2.6]


@shared
async def test_opcua_keeps_every_value_between_two_publishings(plant: OpcuaRig) -> None:
    driver, sink = opcua(plant, Tag(source="plc", name="A", address="nsu=urn:rig;s=A", sampling_ms=1))
    async with running(driver):
        await until(lambda: bool(sink.samples))
        for number in range(300):
            await plant.put("A", float(number))
        await until(lambda: last(sink, "plc/A")[0] == 299.0)
        assert [s.value for s in sink.samples][1:] == [float(number) for number in range(300)]


@shared
@pytest.mark.parametrize("between", ["nothing", "bad value", "cut"])
async def test_opcua_a_clock_that_was_a_year_ahead_and_is_set_right(plant: OpcuaRig, between: str) -> None:
    """A stamp of next year holds up neither the tag nor the windows, whatever comes between it and the right time."""
    tag = Tag(source="plc", name="A", address="nsu=urn:rig;s=A")
    line = Line(plant.port)
    await line.mend()
    made = msgspec.structs.replace(plant.source, tags=(tag,), url=f"opc.tcp://127.0.0.1:{line.port}")
    driver, sink = make(made)
    windower = Windower(Wiring(Window(length=3, rate_hz=20.0), ("plc/A",)))
    async with running(driver):
        await until(lambda: driver.health.connected)
        await plant.put("A", 1.0, datetime.now(UTC) + timedelta(days=365))
        await until(lambda: last(sink, "plc/A") == (1.0, Quality.GOOD))
        if between == "bad value":
            await plant.put("A", None, None, 0x808A0000)
            await until(lambda: last(sink, "plc/A")[1] is Quality.BAD)
        elif between == "cut":
            await line.cut()
            await until(lambda: last(sink, "plc/A")[1] is Quality.BAD)
            await line.mend()
            await until(lambda: driver.health.connected)
        windower.feed(sink.samples)
        sink.clear()
        ends = []
        for number in range(100):
            await plant.put("A", float(number + 2))
            await asyncio.sleep(0.02)
        await until(lambda: last(sink, "plc/A") == (101.0, Quality.GOOD))
        for batch in sink.batches:
            ends += [window.end_ns for window in windower.feed(batch) if window.quality == 1.0]
    await line.cut()
    now = time.time_ns()
    assert [s.quality for s in sink.samples[10:]] == [Quality.GOOD] * len(sink.samples[10:])
    assert all(now - 60e9 < s.time_ns <= now for s in sink.samples[10:])
    assert now - 60e9 < ends[-1] <= now
    assert windower.restarts == 1


@shared
async def test_opcua_a_text_said_again_after_a_restart_is_newer_than_the_cut(plant: OpcuaRig) -> None:
    """A new subscription tells a value with the time of its change; BAD was said later than that."""
    stamp = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
    await plant.add("Part", "part 7")
    await plant.put("Part", "part 7", stamp)
    driver, sink = opcua(plant, Tag(source="plc", name="Part", address="nsu=urn:rig;s=Part", type="string"))
    async with running(driver):
        await until(lambda: bool(sink.samples))
        driver._ended = "the server ended it"  # type: ignore[attr-defined]
        await until(lambda: len(sink.samples) == 3)
        assert [s.quality for s in sink.samples] == [Quality.GOOD, Quality.BAD, Quality.GOOD]
        assert sink.samples[2].time_ns == sink.samples[1].time_ns > sink.samples[0].time_ns


@shared
async def test_opcua_makes_many_items_and_quarantines_an_unknown_namespace(plant: OpcuaRig) -> None:
    tags = [Tag(source="plc", name=f"t{n}", address="nsu=urn:rig;s=A") for n in range(1203)]
    driver, sink = opcua(plant, *tags, Tag(source="plc", name="lost", address="nsu=urn:gone;i=5"))
    async with running(driver):
        await until(lambda: len({s.tag for s in sink.samples if s.quality is Quality.GOOD}) == 1203)
        assert "urn:gone" in driver.health.quarantined["plc/lost"]


@pytest.mark.parametrize("address", ["s=", "ns=70000;i=1", "ns=2;i=-1", "i=x", "g=12", "nsu=;s=a", "b=*"])
def test_opcua_addresses_that_are_none(address: str) -> None:
    source = OpcuaRig().source
    tag = Tag(source="plc", name="x", address=address, file="t.csv", line=3)
    with pytest.raises(UserError, match=r"t\.csv:3: address"):
        make(msgspec.structs.replace(source, tags=(tag,)))


async def test_a_silent_server_is_a_cut_too() -> None:
    """A listener that accepts and never answers: no value, an error that says so, and a prompt end."""
    for name, scheme in (("opcua", "opc.tcp"), ("modbus", "modbus+tcp")):
        port = free_port()
        held: list[asyncio.StreamWriter] = []
        server = await asyncio.start_server(lambda _, writer, held=held: held.append(writer), "127.0.0.1", port)  # type: ignore[misc]
        source = msgspec.structs.replace(
            RIGS[name]().source, url=f"{scheme}://127.0.0.1:{port}", options={"timeout_s": 0.3}
        )
        driver, sink = make(source)
        async with running(driver):
            await until(lambda driver=driver: "did not answer" in driver.health.error)  # type: ignore[misc]
            assert sink.samples == []
        for writer in held:
            writer.close()
        server.close()
