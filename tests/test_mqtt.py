"""What is MQTT's alone: JSON payloads, Sparkplug B's births, deaths and sequence, and bytes that are neither."""

import asyncio
import contextlib
import json
import math
import random
import struct
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge.drivers import _sparkplug as sparkplug
from edge.drivers.mqtt import Driver, parse_json
from edge.tags import Quality, Sample, Tag
from models.errors import PeerError, UserError
from tests.rigs import Collector, MqttRig, until
from tests.sparkplug_node import Payload

GOOD, BAD = Quality.GOOD, Quality.BAD
METRIC = "spBv1.0/rig/DDATA/edge/dev#"


def tag(name: str, address: str, **more: Any) -> Tag:
    return Tag(source="plc", name=name, address=address, **more)


@contextlib.asynccontextmanager
async def listening(rig: MqttRig, *tags: Tag, **options: object) -> AsyncIterator[tuple[Driver, Collector]]:
    sink = Collector()
    driver = Driver(msgspec.structs.replace(rig.source, tags=tags, options=options), sink)
    await rig.start()
    task = asyncio.create_task(driver.run())
    try:
        await until(lambda: driver.health.connected)
        yield driver, sink
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await rig.stop()


def last(sink: Collector, name: str) -> tuple[object, Quality] | None:
    found = sink.of(f"plc/{name}")
    return (found[-1].value, found[-1].quality) if found else None


@pytest.mark.parametrize("kind", ["mosquitto", "amqtt"])
async def test_json_of_every_shape(kind: str) -> None:
    rig = MqttRig(kind)
    wave, part = tag("wave", "w", width=3, scale=2.0), tag("part", "part", type="string")
    async with listening(rig, tag("x", "x"), tag("again", "x", scale=10.0), wave, part) as (driver, sink):
        rig.put("x", '{"timestamp_ms": 1600000000123, "value": 1.5, "more": [1]}')
        await until(lambda: last(sink, "again") == (15.0, GOOD))
        assert sink.of("plc/x") == [Sample("plc/x", 1_600_000_000_123_000_000, 1.5, GOOD)]
        for text, value in (("2", 2.0), ("true", 1.0)):
            rig.put("x", text)
            await until(lambda value=value: last(sink, "x") == (value, GOOD))  # type: ignore[misc]
        rig.put("x", '{"timestamp_ms": 1600000000123, "value": null}')
        await until(lambda: last(sink, "x") is not None and sink.of("plc/x")[-1].quality is BAD)
        rig.put("x", "not JSON")
        await until(lambda: "plc/x" in driver.health.quarantined)
        assert "check" in driver.health.quarantined["plc/x"]
        for wrong, said in (
            ('"21.5"', "x is a text; write type = string: its checksum then tells segments apart"),
            ("[1, 2]", "x is an array of 2 numbers; write type = float32[2]"),
        ):
            rig.put("x", wrong)
            await until(lambda said=said: driver.health.quarantined.get("plc/x") == said)  # type: ignore[misc]
        for ragged in ("[[1, [2]]]", "[[1], 2]", "[]", '[{"a": 1}]'):  # no value, whatever is in it
            rig.put("x", "3.0")
            await until(lambda: last(sink, "x") == (3.0, GOOD))
            rig.put("x", ragged)
            await until(lambda: sink.of("plc/x")[-1].quality is BAD)
        rig.put("part", '"part 7"')
        await until(lambda: last(sink, "part") == (float(zlib.crc32(b"part 7")), GOOD))
        rig.put("w", "[1, 2, 3.5]")
        await until(lambda: bool(sink.of("plc/wave")))
        snapshot = sink.of("plc/wave")[0].value
        assert isinstance(snapshot, np.ndarray)
        assert snapshot.dtype == np.float32
        assert snapshot.tolist() == [2.0, 4.0, 7.0]
        for wrong in ("[1, 2]", "[1, 2, 1e999999]", "[[1], [2], [3]]", '[1, 2, "3"]', f"[1, 2, 1{'0' * 400}]"):
            rig.put("w", wrong)
            await until(lambda: sink.of("plc/wave")[-1].quality is BAD)
            rig.put("w", "[1, 2, 3]")
            await until(lambda: sink.of("plc/wave")[-1].quality is GOOD)
        rig.put("x", "3")
        await until(lambda: last(sink, "x") == (3.0, GOOD))
        assert "plc/x" not in driver.health.quarantined


async def test_a_retained_old_value_keeps_its_time_and_a_cut_is_now() -> None:
    rig = MqttRig()
    async with listening(rig, tag("old", "old"), tag("quiet", "quiet")) as (driver, sink):
        rig.put("old", '{"timestamp_ms": 1500000000000, "value": 4}')
        await until(lambda: last(sink, "old") == (4.0, GOOD))
        other = Collector()
        second = Driver(msgspec.structs.replace(rig.source, tags=(tag("old", "old"), tag("quiet", "quiet"))), other)
        task = asyncio.create_task(second.run())
        await until(lambda: bool(other.samples))
        assert other.samples == [Sample("plc/old", 1_500_000_000_000_000_000, 4.0, GOOD)]
        before = time.time_ns()
        await asyncio.to_thread(rig.broker.stop)
        await until(lambda: len([s for s in other.samples if s.quality is BAD]) == 2)
        # The silent topic too; and at the time of the cut, not at that of the retained value.
        assert {s.tag for s in other.samples if s.quality is BAD} == {"plc/old", "plc/quiet"}
        assert all(before - 5e9 < s.time_ns <= time.time_ns() for s in other.samples if s.quality is BAD)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert driver.health.connects == 1


async def test_sparkplug_types_by_alias() -> None:
    rig = MqttRig()
    rig.node.metrics = {
        "Neg8": {"alias": 1, "datatype": 1, "int_value": 0xFF},
        "Neg32": {"alias": 2, "datatype": 3, "int_value": 0xFFFF_FFFE},
        "Neg64": {"alias": 3, "datatype": 4, "long_value": 2**64 - 3},
        "U64": {"alias": 4, "datatype": 8, "long_value": 5},
        "Float": {"alias": 5, "datatype": 9, "float_value": 1.5},
        "Flag": {"alias": 6, "datatype": 11, "boolean_value": True},
        "Text": {"alias": 7, "datatype": 12, "string_value": "part 7"},
        "Wave": {"alias": 8, "datatype": 30, "bytes_value": struct.pack("<3f", 1, 2, 3)},
        "Null": {"alias": 9, "datatype": 10, "is_null": True},
        "Poor": {
            "alias": 10,
            "datatype": 10,
            "double_value": 9.0,
            "properties": {"keys": ["Unit", "Quality"], "values": [{"type": 3}, {"type": 3, "int_value": 500}]},
        },
    }
    kinds: dict[str, dict[str, Any]] = {"Wave": {"width": 3}, "Text": {"type": "string"}}
    tags = [tag(name, METRIC + name, **kinds.get(name, {})) for name in rig.node.metrics]
    async with listening(rig, *tags) as (_driver, sink):
        await until(lambda: {s.tag for s in sink.samples} == {f"plc/{name}" for name in rig.node.metrics})
        good = {s.tag[4:]: s.value for s in sink.samples if s.quality is GOOD}
        wave = good.pop("Wave")
        assert isinstance(wave, np.ndarray)
        assert wave.tolist() == [1.0, 2.0, 3.0]
        text = float(zlib.crc32(b"part 7"))
        expected = {"Neg8": -1, "Neg32": -2, "Neg64": -3, "U64": 5, "Float": 1.5, "Flag": 1, "Text": text}
        assert good == expected
        assert {s.tag for s in sink.samples if s.quality is BAD} == {"plc/Null", "plc/Poor"}
        # Data give an alias alone: name and type are the birth's.
        await asyncio.to_thread(rig.node.data, "Neg8", int_value=0xF0)
        await until(lambda: last(sink, "Neg8") == (-16.0, GOOD))


async def test_a_death_is_bad_for_all_of_it_and_a_birth_heals() -> None:
    rig = MqttRig()
    tags = [tag("b", METRIC + "B Value"), tag("json", "plant/a")]
    async with listening(rig, *tags) as (driver, sink):
        await until(lambda: last(sink, "b") == (2.0, GOOD) and last(sink, "json") is not None)
        rig.put("spBv1.0/rig/DDEATH/edge/dev", Payload(seq=rig.node.seq + 1).SerializeToString(), retain=False)
        rig.node.seq += 1
        await until(lambda: sink.of("plc/b")[-1].quality is BAD)
        await asyncio.to_thread(rig.node.birth)
        await until(lambda: last(sink, "b") == (2.0, GOOD))
        # The death of an earlier connection, late: nothing to it.
        stale = rig.node.death()
        await asyncio.to_thread(rig.node.stop, cleanly=False)
        await until(lambda: sink.of("plc/b")[-1].quality is BAD)
        await asyncio.to_thread(rig.node.start)
        await until(lambda: last(sink, "b") == (2.0, GOOD))
        count = len(sink.samples)
        rig.put("spBv1.0/rig/NDEATH/edge", stale, retain=False)
        await asyncio.to_thread(rig.node.data, "B Value", int_value=3)
        await until(lambda: last(sink, "b") == (3.0, GOOD))
        assert [s.quality for s in sink.samples[count:]] == [GOOD]
        assert last(sink, "json") == (1.5, GOOD)
        assert driver.health.connects == 1


async def test_a_rebirth_is_asked_for_at_the_start_and_after_a_gap_but_not_in_a_rush() -> None:
    rig = MqttRig()
    async with listening(rig, tag("b", METRIC + "B Value")) as (driver, sink):
        # The node was born before anybody listened.
        await until(lambda: last(sink, "b") == (2.0, GOOD))
        assert rig.node.births == 2
        node = driver._nodes["rig", "edge"]
        assert node.ask_at > time.monotonic()
        rig.node.seq += 3
        await asyncio.to_thread(rig.node.data, "B Value", int_value=4)
        await until(lambda: last(sink, "b") == (4.0, GOOD))  # a value is still a value
        assert driver.health.overflows == 3
        assert node.unborn
        node.ask_at = 0.0  # the ten seconds are over
        await until(lambda: rig.node.births == 3 and not node.unborn)
        rig.put("spBv1.0/rig/DDATA/edge/dev", b"\x12\xff", retain=False)
        await until(lambda: "check what publishes" in driver.health.error)
        node.ask_at = 0.0
        await until(lambda: driver.health.error == "" and rig.node.births == 4)


async def test_without_rebirth_nothing_is_published() -> None:
    rig = MqttRig()
    async with listening(rig, tag("b", METRIC + "B Value"), rebirth=False) as (driver, sink):
        await asyncio.to_thread(rig.node.data, "B Value", int_value=5)
        await until(lambda: driver._nodes["rig", "edge"].seq is not None)
        assert sink.samples == []  # an alias without a birth says nothing
        await asyncio.to_thread(rig.node.birth)
        await until(lambda: last(sink, "b") == (5.0, GOOD))
        assert driver._link is not None
        assert driver._link.counters["published"] == 0


metrics = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=20),
        "alias": st.integers(0, 2**64 - 1),
        "timestamp": st.integers(0, 2**64 - 1),
        "datatype": st.integers(0, 2**32 - 1),
        "is_historical": st.booleans(),
        "is_null": st.booleans(),
    },
)
values = st.one_of(
    st.tuples(st.just("int_value"), st.integers(0, 2**32 - 1)),
    st.tuples(st.just("long_value"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("double_value"), st.floats(allow_nan=False)),
    st.tuples(st.just("float_value"), st.floats(width=32, allow_nan=False)),
    st.tuples(st.just("string_value"), st.text(max_size=20)),
    st.tuples(st.just("bytes_value"), st.binary(max_size=20)),
    st.tuples(st.just("boolean_value"), st.booleans()),
)


@settings(max_examples=50)
@given(st.lists(st.tuples(metrics, values), max_size=4), st.integers(0, 255), st.integers(0, 2**64 - 1))
def test_payloads_of_protobuf_are_read_alike(found: list[Any], seq: int, stamp: int) -> None:
    theirs = Payload(timestamp=stamp, seq=seq, uuid="x", body=b"y")
    for metric, (key, value) in found:
        theirs.metrics.add(**metric, **{key: value})
    ours = sparkplug.decode(theirs.SerializeToString())
    assert (ours.timestamp_ms, ours.seq, len(ours.metrics)) == (stamp, seq, len(found))
    for metric, (given_, (_, value)) in zip(ours.metrics, found, strict=True):
        assert metric.value == value
        assert metric.name == given_.get("name", "")
        assert metric.alias == given_.get("alias")
        assert metric.timestamp_ms == given_.get("timestamp")
        assert (metric.historical, metric.null) == (given_.get("is_historical", False), given_.get("is_null", False))


def example() -> bytes:
    payload = Payload(timestamp=1_700_000_000_000, seq=9, body=b"z")
    payload.metrics.add(name="Täst", alias=3, timestamp=5, datatype=10, double_value=math.pi)
    payload.metrics.add(alias=4, float_value=1.5, properties={"keys": ["Quality"], "values": [{"int_value": 192}]})
    payload.metrics.add(alias=5, string_value="x" * 200)
    return bytes(payload.SerializeToString())


def test_bytes_that_are_no_payload_end_in_our_error_alone() -> None:
    whole = example()
    assert sparkplug.decode(whole).metrics[1].quality == 192
    refused = 0
    rng = random.Random(1)  # noqa: S311 - a fuzzer's
    cut = [whole[:n] for n in range(len(whole))]
    flipped = [
        bytes(b ^ (1 << bit if at == n else 0) for at, b in enumerate(whole))
        for n in range(len(whole))
        for bit in range(8)
    ]
    for data in [*cut, *flipped, *(rng.randbytes(rng.randrange(60)) for _ in range(20_000))]:
        try:
            sparkplug.decode(data)
        except PeerError:  # anything else fails the test
            refused += 1
    assert refused > len(whole)


def test_a_rebirth_request_is_what_protobuf_reads() -> None:
    asked = Payload.FromString(sparkplug.rebirth(1_700_000_000_123))
    assert asked.timestamp == 1_700_000_000_123
    (metric,) = asked.metrics
    assert (metric.name, metric.datatype, metric.boolean_value) == ("Node Control/Rebirth", 11, True)


@given(st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_any_bytes_are_json_or_a_peers_error(data: bytes) -> None:
    with contextlib.suppress(PeerError):
        parse_json(data, 0)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[" * 100_000,
        '{"value": 1}',
        '{"timestamp_ms": "x", "value": 1}',
        '{"timestamp_ms": 1e30, "value": 1}',
        '{"timestamp_ms": -1, "value": 1}',
        "NaN",
        '"\\ud800"',
    ],
)
def test_json_that_is_none(text: str) -> None:
    with pytest.raises(PeerError):
        parse_json(text.encode(), 0)


@pytest.mark.parametrize(
    "address",
    [
        "a/#",
        "+/a",
        "$SYS/x",
        "spBv1.0/G/DDATA/E/D",
        "spBv1.0/G/NBIRTH/E#m",
        "spBv1.0/G/NDATA/E/D#m",
        "spBv1.0/G/NDATA/E#",
    ],
)
def test_addresses_that_are_none_say_where_they_stand(address: str) -> None:
    source = msgspec.structs.replace(MqttRig().source, tags=(tag("x", address, file="uns.csv", line=4),))
    with pytest.raises(UserError, match=r"^uns\.csv:4: address: "):
        Driver(source, Collector())


@pytest.mark.parametrize(
    ("url", "options", "key"),
    [
        ("mqtt://10.0.0.1", {}, "url"),
        ("mqtts://h", {"ca": "none.pem"}, "ca"),
        ("mqtt://127.0.0.1", {"password_file": "p"}, "password_file"),
        ("mqtt://127.0.0.1", {"version": "6"}, "version"),
        ("mqtt://127.0.0.1", {"keepalive_s": 0}, "keepalive_s"),
    ],
)
def test_settings_that_are_none(url: str, options: dict[str, object], key: str) -> None:
    source = msgspec.structs.replace(MqttRig().source, url=url, options=options)
    with pytest.raises(UserError, match=rf"source\]\] plc: {key}: "):
        Driver(source, Collector())


def test_files_are_meant_relative_to_the_gateways(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("secret")
    source = msgspec.structs.replace(
        MqttRig().source, options={"username": "u", "password_file": "p"}, folder=str(tmp_path)
    )
    assert Driver(source, Collector())._settings.password_file == str(tmp_path / "p")


def test_json_is_what_the_gateways_own_raw_topics_carry() -> None:
    body = json.dumps({"timestamp_ms": 1, "value": 2.5})
    assert parse_json(body.encode(), 0) == (2.5, 1_000_000)
