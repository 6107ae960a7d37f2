"""One real server a protocol, on a free loopback port, that the conformance suite can change, cut and bring back."""

import asyncio
import contextlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from asyncua import ua
from asyncua.server.server import Server
from PIL import Image
from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from edge.lab.processes import free_port
from edge.tags import Driver, Sample, Source, Tag
from tests.brokers import BrokerProcess
from tests.sparkplug_node import SparkplugNode

LATER_S = 20.0  # an upper bound for whatever is awaited, generous on a busy machine


def labels() -> list[Tag]:
    """The tags of a source whose addresses are names: two that are scaled, and one that is not."""
    scaled = [Tag(source="plc", name=name, address=name, scale=2.0, offset=1.0) for name in "ab"]
    return [*scaled, Tag(source="plc", name="flag", address="flag")]


@contextlib.asynccontextmanager
async def running(driver: Driver) -> AsyncIterator[None]:
    """Run a driver, and stop it."""
    task = asyncio.create_task(driver.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Collector:
    """A sink that keeps all it gets."""

    def __init__(self) -> None:
        self.batches: list[Sequence[Sample]] = []

    def __call__(self, samples: Sequence[Sample], /) -> None:
        self.batches.append(samples)

    @property
    def samples(self) -> list[Sample]:
        return [sample for batch in self.batches for sample in batch]

    def of(self, ref: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.tag == ref]

    def clear(self) -> None:
        self.batches.clear()


async def until(condition: Callable[[], bool], within_s: float = LATER_S) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the condition is on what a driver did, which sets no event
            await asyncio.sleep(0.02)


class Rig(Protocol):
    """What the suite needs of a server. Its tags are `a` and `b`, scaled by 2 and moved by 1, and the `flag`."""

    source: Source
    missing: Tag
    wrong: str  # an address that can't be meant
    positive: str  # an option that takes a number above 0

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def change(self, name: str, value: float) -> None: ...
    async def appear(self) -> None: ...


class OpcuaRig:
    """An asyncua server."""

    wrong = "what?"
    positive = "timeout_s"

    def __init__(self) -> None:
        port = free_port()
        self.server: Server | None = None
        self.port = port
        tags = [
            Tag(source="plc", name="a", address="nsu=urn:rig;s=A", scale=2.0, offset=1.0),
            Tag(source="plc", name="b", address="nsu=urn:rig;s=B", scale=2.0, offset=1.0, sampling_ms=20),
            Tag(source="plc", name="flag", address="nsu=urn:rig;s=Flag"),
        ]
        self.missing = Tag(source="plc", name="missing", address="nsu=urn:rig;s=Missing")
        self.source = Source(
            name="plc",
            driver="opcua",
            url=f"opc.tcp://127.0.0.1:{port}",
            tags=(*tags, self.missing),
            options={"publishing_ms": 50},
        )
        self.nodes: dict[str, Any] = {}
        self.space = 0
        self.values: dict[str, Any] = {"A": 1.5, "B": 2, "Flag": True}

    async def start(self) -> None:
        server = Server()
        await server.init()
        server.set_endpoint(f"opc.tcp://127.0.0.1:{self.port}/")
        await self.prepare(server)
        # The URI's index differs from start to start, as it may at a real server.
        await server.register_namespace(f"urn:other:{id(server)}")
        if len(self.nodes) % 2:
            await server.register_namespace("urn:another")
        self.space = await server.register_namespace("urn:rig")
        self.server = server
        for name, value in self.values.items():
            await self.add(name, value)
        await server.start()

    async def prepare(self, server: Server) -> None:
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])

    async def add(self, name: str, value: Any, kind: ua.VariantType | None = None) -> None:
        assert self.server is not None
        node = ua.NodeId(ua.String(name), ua.Int16(self.space))
        parent = self.server.nodes.objects
        self.nodes[name] = await parent.add_variable(node, f"{self.space}:{name}", value, varianttype=kind)

    async def put(self, name: str, value: Any, time: datetime | None = None, status: int = 0) -> None:
        node = self.nodes[name]
        known = (await node.read_data_value(raise_on_bad_status=False)).Value
        stamp: Any = time or datetime.now(UTC)
        variant = ua.Variant(value)
        if value is not None and known is not None and known.Value is not None:
            variant = ua.Variant(value, known.VariantType)
        data = ua.DataValue(variant, ua.StatusCode(ua.UInt32(status)), SourceTimestamp=stamp)
        await node.write_value(data)

    async def stop(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            await server.stop()

    async def change(self, name: str, value: float) -> None:
        await self.put({"a": "A", "b": "B", "flag": "Flag"}[name], {"a": float, "b": int, "flag": bool}[name](value))

    async def appear(self) -> None:
        await self.add("Missing", 7.0)


class ModbusRig:
    """A pymodbus server; the register that is missing refuses to be read until it appears."""

    wrong = "what?"
    positive = "timeout_s"

    def __init__(self) -> None:
        self.port = free_port()
        self.server: ModbusTcpServer | ModbusSerialServer | None = None
        self.devices = [1]
        self.silent: set[int] = set()
        self.refused: set[tuple[int, int]] = {(3, 4)}
        self.requests: list[tuple[int, int, int]] = []
        tags = [
            Tag(source="plc", name="a", address="holding:0", type="float32:CDAB", scale=2.0, offset=1.0),
            Tag(source="plc", name="b", address="40004", type="int16", scale=2.0, offset=1.0, sampling_ms=50),
            Tag(source="plc", name="flag", address="coil:3"),
        ]
        self.missing = Tag(source="plc", name="missing", address="holding:4", type="uint16", sampling_ms=50)
        self.source = Source(
            name="plc",
            driver="modbus",
            url=f"modbus+tcp://127.0.0.1:{self.port}",
            tags=(*tags, self.missing),
            options={"poll_ms": 100, "timeout_s": 0.5},
        )

    async def action(
        self, function: int, _start: int, address: int, count: int, _now: list[int], _new: Any
    ) -> ExcCodes | None:
        if _new is None:
            self.requests.append((function, address, count))
        read = {(function, place) for place in range(address, address + count)}
        return ExcCodes.ILLEGAL_ADDRESS if read & self.refused and _new is None else None

    async def start(self) -> None:
        def bits() -> list[SimData]:
            return [SimData(0, count=16, values=False, datatype=DataType.BITS)]

        def registers() -> list[SimData]:
            return [SimData(0, count=200, values=0, datatype=DataType.REGISTERS)]

        blocks = [(bits(), bits(), registers(), registers()) for _ in self.devices]
        devices = [SimDevice(n, simdata=b, action=self.action) for n, b in zip(self.devices, blocks, strict=True)]
        self.server = self.serve(devices)
        await self.server.serve_forever(background=True)
        await self.change("a", 1.5)
        await self.change("b", 2)
        await self.change("flag", 1)

    def serve(self, devices: list[SimDevice]) -> ModbusTcpServer | ModbusSerialServer:
        return ModbusTcpServer(devices, address=("127.0.0.1", self.port), trace_packet=partial(self.mute, 6))

    def mute(self, at: int, sending: bool, frame: bytes) -> bytes:  # noqa: FBT001 - the library's signature
        """Let no answer of a silent device out; its number is the frame's byte `at`."""
        return b"" if sending and frame[at] in self.silent else frame

    async def put(self, address: int, registers: list[int], device_id: int = 1) -> None:
        assert self.server is not None
        await self.server.async_setValues(device_id, 16, address, registers)

    async def stop(self) -> None:
        if self.server is not None:
            server, self.server = self.server, None
            await server.shutdown()  # type: ignore[no-untyped-call]

    async def change(self, name: str, value: float) -> None:
        assert self.server is not None
        if name == "a":
            high, low = struct.unpack(">HH", struct.pack(">f", value))
            await self.put(0, [low, high])
        elif name == "b":
            await self.put(3, [int(value) & 0xFFFF])
        else:
            await self.server.async_setValues(1, 15, 3, [bool(value)])

    async def appear(self) -> None:
        self.refused.clear()


class Cable:
    """Two serial ports with a cable between them: the ends of two pseudo-terminals, and what comes in goes across."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.ports: list[str] = []
        self.asked: list[int] = []  # the device of each frame that came in at the first port
        for _ in range(2):
            end, port = os.openpty()
            os.set_blocking(end, False)
            self.ports.append(os.ttyname(port))
            self.ends += [end, port]
        loop = asyncio.get_running_loop()
        loop.add_reader(self.ends[0], partial(self._across, self.ends[0], self.ends[2]))
        loop.add_reader(self.ends[2], partial(self._across, self.ends[2], self.ends[0]))

    def _across(self, source: int, target: int) -> None:
        with contextlib.suppress(OSError):
            frame = os.read(source, 1024)
            if source == self.ends[0]:
                self.asked.append(frame[0])
            os.write(target, frame)

    def unplug(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.ends[0])
        loop.remove_reader(self.ends[2])
        for end in self.ends:
            os.close(end)


class RtuRig(ModbusRig):
    """A pymodbus server at the other end of a serial cable; a cut is an adapter that is pulled out."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "ttyRig"
        self.cable: Cable | None = None
        options = {"poll_ms": 100, "timeout_s": 0.5, "baud": 115_200, "parity": "n", "stop_bits": 1}
        self.source = Source(
            name="plc", driver="modbus", url=f"modbus+rtu://{self.path}", tags=self.source.tags, options=options
        )

    def serve(self, devices: list[SimDevice]) -> ModbusSerialServer:
        self.cable = Cable()
        self.path.symlink_to(self.cable.ports[0])
        return ModbusSerialServer(
            devices, port=self.cable.ports[1], baudrate=115_200, trace_packet=partial(self.mute, 0)
        )

    async def stop(self) -> None:
        await super().stop()
        if self.cable is not None:
            cable, self.cable = self.cable, None
            cable.unplug()
            self.path.unlink()


class MqttRig:
    """Mosquitto, with JSON publishers and a Sparkplug edge node; a metric that its birth has not is missing."""

    wrong = "plant/+/rms"  # nearly any other text is a topic
    positive = "timeout_s"

    def __init__(self, kind: str = "mosquitto") -> None:
        self.broker = BrokerProcess(kind)
        self.node = SparkplugNode(self.broker.port)
        self.values: dict[str, float] = {"a": 1.5, "flag": 1}
        metric = "spBv1.0/rig/DDATA/edge/dev#"
        tags = [
            Tag(source="plc", name="a", address="plant/a", scale=2.0, offset=1.0),
            Tag(source="plc", name="b", address=f"{metric}B Value", scale=2.0, offset=1.0),
            Tag(source="plc", name="flag", address="plant/flag"),
        ]
        self.missing = Tag(source="plc", name="missing", address=f"{metric}Missing")
        self.source = Source(name="plc", driver="mqtt", url=self.broker.url, tags=(*tags, self.missing))
        self.node.metrics["B Value"] = {"alias": 7, "datatype": 3, "int_value": 2}

    async def start(self) -> None:
        await asyncio.to_thread(self.broker.start)
        await asyncio.to_thread(self.node.start)
        for name in self.values:
            await self.change(name, self.values[name])

    async def stop(self) -> None:
        await asyncio.to_thread(self.broker.stop)
        await asyncio.to_thread(self.node.stop)

    async def change(self, name: str, value: float) -> None:
        if name == "b":
            await asyncio.to_thread(self.node.data, "B Value", int_value=int(value) & 0xFFFF_FFFF)
            return
        self.values[name] = value
        body = {"timestamp_ms": time.time_ns() // 1_000_000, "value": value} if name == "a" else bool(value)
        self.put(f"plant/{name}", json.dumps(body))

    def put(self, topic: str, body: str | bytes, *, retain: bool = True) -> None:
        self.node.client.publish(topic, body, qos=1, retain=retain).wait_for_publish(LATER_S)

    async def appear(self) -> None:
        self.node.metrics["Missing"] = {"alias": 8, "datatype": 10, "double_value": 7.0}
        await asyncio.to_thread(self.node.birth)


class ReplayRig:
    """A recording that is played over and over; it has no server, so a change is another file of the same name."""

    wrong = "a\nb"  # any other text may head a column
    positive = "speed"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "plant.csv"
        self.values: dict[str, float] = {"a": 1.5, "b": 2, "flag": 1}
        tags = labels()
        self.missing = Tag(source="plc", name="missing", address="missing")
        self.source = Source(
            name="plc",
            driver="replay",
            url=f"file://{self.path}",
            tags=(*tags, self.missing),
            options={"loop": True, "rate_hz": 20.0},
        )

    async def start(self) -> None:
        lines = [",".join(self.values), *[",".join(map(str, self.values.values()))] * 3, ""]
        fresh = self.path.with_suffix(".new")
        fresh.write_text("\n".join(lines))
        fresh.rename(self.path)

    async def stop(self) -> None:
        self.path.unlink(missing_ok=True)

    async def change(self, name: str, value: float) -> None:
        self.values[name] = value
        await self.start()

    async def appear(self) -> None:
        await self.change("missing", 7.0)


class ImagesRig:
    """A folder with one picture at a time, a new one for each change; the values are labels of it."""

    wrong = "a\nb"  # any other text may head a column
    positive = "poll_ms"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "pictures"
        self.number = 0
        self.values: dict[str, float] = {"a": 1.5, "b": 2, "flag": 1}
        tags = [
            Tag(source="plc", name="pixels", address="pixels", type="float32[64]", width=64),
            *labels(),
        ]
        self.missing = Tag(source="plc", name="missing", address="missing")
        self.source = Source(
            name="plc",
            driver="images",
            url=f"file://{self.path}",
            tags=(*tags, self.missing),
            options={"size": 8, "poll_ms": 20, "backlog": True, "labels": str(self.path / "labels.csv")},
        )

    async def start(self) -> None:
        self.path.mkdir(exist_ok=True)
        for old in self.path.glob("*.png"):
            old.unlink()
        self.number += 1
        name = f"{self.number:04}.png"
        lines = [",".join(["file", *self.values]), ",".join([name, *map(str, self.values.values())]), ""]
        fresh = self.path / "labels.new"
        fresh.write_text("\n".join(lines))
        fresh.rename(self.path / "labels.csv")
        Image.new("L", (16, 16), self.number).save(self.path / name)

    async def stop(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    async def change(self, name: str, value: float) -> None:
        self.values[name] = value
        await self.start()

    async def appear(self) -> None:
        await self.change("missing", 7.0)


# What `driver =` may say, and at least one rig for it.
RIGS: dict[str, type[OpcuaRig] | type[ModbusRig] | type[MqttRig] | type[ReplayRig] | type[ImagesRig]] = {
    "opcua": OpcuaRig,
    "modbus": ModbusRig,
    "modbus-rtu": RtuRig,
    "mqtt": MqttRig,
    "replay": ReplayRig,
    "images": ImagesRig,
}
