"""A PLC in a process of its own: OPC UA and Modbus TCP at once, on loopback, for the demo, benchmarks and tests.

    python -m edge.lab.plc --plant 1 --opcua-port 4840 --modbus-port 5020 --seed 7 --rate 50
    python -m edge.lab.plc --data FILE.npz --client 0 --rate 200 --opcua-port 4840 --modbus-port 5020

The first plays the spindle of `edge.lab.physics` on the wall clock. The second plays recorded data, one plant of it:
windows (N, C, T) with T <= 256 and rows (N, F) sample by sample, one second of source time each however fast they are
played; vibration (N, 1, T) as one waveform a snapshot. Prints `ready` when both listen; ends on SIGTERM, and with
the process that started it.
"""

import argparse
import asyncio
import contextlib
import ctypes
import logging
import os
import re
import signal
import struct
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from asyncua import ua
from asyncua.server.server import Server
from asyncua.ua.attribute_ids import AttributeIds
from numpy.typing import NDArray
from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from edge.lab.physics import SNAPSHOT, Row, Spindle
from edge.lab.recorded import read_recorded
from models.errors import UserError

NAMESPACE = "urn:tundish:plant"
HEADER = "tag,address,type,unit,scale,offset,deadband,sampling_ms,description"
CLOCK = "holding:10"  # a source's `clock` option: recorded data runs on the device's time

_LONGEST_SERIES = 256  # a single longer channel is a waveform
_CLOCK_AT = 10
_VALUES_AT = 20
_REGISTERS = 64
_MOST_MODBUS = 2  # channels of recorded data that are served by Modbus
_BATCH_S = 0.005  # a faster play is done in batches of this length
_PR_SET_PDEATHSIG = 1
_SECOND_NS = 1_000_000_000

_T = ua.VariantType
_SPINDLE: dict[str, tuple[Any, Any]] = {
    "Spindle.VibRms": (0.0, _T.Double),
    "Spindle.Crest": (0.0, _T.Double),
    "Spindle.EnvBPFO": (0.0, _T.Double),
    "Spindle.EnvBPFI": (0.0, _T.Double),
    "Spindle.EnvBSF": (0.0, _T.Double),
    "Spindle.BearingTemp": (0.0, _T.Double),
    "Spindle.Running": (False, _T.Boolean),
    "Spindle.BearingSerial": (0, _T.UInt32),
    "Spindle.Condition": (0, _T.Int32),
    "Spindle.Waveform": ([0.0] * SNAPSHOT, _T.Float),
}
_SPINDLE_TAGS = (
    f"""{HEADER}
Spindle.Running,nsu={NAMESPACE};s=Spindle.Running,bool,,,,,10,1 while the machine runs
Spindle.BearingSerial,nsu={NAMESPACE};s=Spindle.BearingSerial,uint32,,,,,10,which bearing is in
Spindle.Condition,nsu={NAMESPACE};s=Spindle.Condition,int32,,,,,10,"0 healthy, 1 outer, 2 inner, 3 ball"
Spindle.VibRms,nsu={NAMESPACE};s=Spindle.VibRms,,g,,,,10,vibration of the bearing's housing
Spindle.Crest,nsu={NAMESPACE};s=Spindle.Crest,,1,,,,10,crest factor of the vibration
Spindle.EnvBPFO,nsu={NAMESPACE};s=Spindle.EnvBPFO,,dB,,,,10,envelope line of the outer race
Spindle.EnvBPFI,nsu={NAMESPACE};s=Spindle.EnvBPFI,,dB,,,,10,envelope line of the inner race
Spindle.EnvBSF,nsu={NAMESPACE};s=Spindle.EnvBSF,,dB,,,,10,envelope line of the balls
Spindle.BearingTemp,nsu={NAMESPACE};s=Spindle.BearingTemp,,degC,,,,10,temperature of the bearing
Spindle.Waveform,nsu={NAMESPACE};s=Spindle.Waveform,float32[{SNAPSHOT}],g,,,,,acceleration at 10240 Hz
""",
    f"""{HEADER}
Drive.Speed,holding:0,float32:ABCD,rpm,,,,20,speed of the spindle
Drive.Torque,holding:2,float32:CDAB,%,,,,20,torque of the motor
Drive.Current,holding:4,int16,A,0.01,,,20,current of the motor
Drive.Uptime,holding:5,uint32:ABCD,s,,,,1000,since the drive was switched on
""",
)


class DataLayout(NamedTuple):
    """How a recorded set is served. `length` is T of a window, 1 for rows; `kind` is series, waveform or rows.

    `names` are the channels as served (`[A-Za-z0-9_-]`, unique), the last `modbus` of them by Modbus. `target` is
    Double (regression) or Int32 (classes), `classes` how many of them, 0 for a regression; `clients` their names.
    Pictures (kind `picture`) are made square; T is then the pixels of one.
    """

    channels: int
    names: tuple[str, ...]
    length: int
    kind: str
    modbus: int
    classes: int
    clients: tuple[str, ...]
    target: str


class Step(NamedTuple):
    """What changes at once: its time (ns since 1970), OPC UA node -> value, and Modbus' channel values."""

    time_ns: int
    nodes: dict[str, Any]
    channels: Sequence[float]


def data_layout(path: Path, *, pictures: bool = False) -> DataLayout:
    """Return how a recorded set is served; UserError for a file that is none, or holds pictures unless they may be."""
    file = read_recorded(path)
    shape = file["x_train"].shape
    if len(shape) not in ({2, 3, 4} if pictures else {2, 3}):
        problem = f"x_train is {shape}: pictures come from no PLC tag"
        raise UserError(str(path), 0, "x_train", problem, "use a set of (N, C, T) windows or (N, F) rows")
    y, given = file["y_train"], file.get("feature_names")
    length = shape[2] if len(shape) == 3 else max(shape[2:], default=1) ** 2  # noqa: PLR2004 - (N, C, T)
    channels = shape[1]
    kind = {2: "rows", 3: "series", 4: "picture"}[len(shape)]
    if kind == "series" and channels == 1 and length > _LONGEST_SERIES:
        kind = "waveform"
    names = [str(name) for name in given] if given is not None and len(given) == channels else []
    if kind == "waveform":
        names = ["Waveform"]
    regression = y.dtype.kind == "f"
    clients = file.get("client_names")
    count = int(file["client_train"].max()) + 1
    return DataLayout(
        channels=channels,
        names=_node_names(names or [f"x{index}" for index in range(channels)]),
        length=length,
        kind=kind,
        modbus=0 if kind == "waveform" else min(_MOST_MODBUS, channels - 1),
        classes=0 if regression else max(2, int(max(y.max(), file["y_test"].max())) + 1),
        clients=tuple(map(str, clients if clients is not None else range(count))),
        target="Double" if regression else "Int32",
    )


def tags_csv(layout: DataLayout | None) -> tuple[str, str]:
    """Return the texts of the OPC UA and the Modbus tags CSV for recorded data, or for the spindle (None).

    Recorded data needs `clock = "holding:10"` at the Modbus source, so that its samples have the same times. The
    Modbus text is a header alone if all is served by OPC UA.
    """
    if layout is None:
        return _SPINDLE_TAGS
    split = layout.channels - layout.modbus
    kind = f"float32[{layout.length}]" if layout.kind == "waveform" else ""
    # Samples of one time come in this order, so what tells of a window stands before its values.
    types = {"Running": "", "Segment": "", "Target": ""} | dict.fromkeys(layout.names[:split], kind)
    # Played faster than it was recorded: a sampling of 1 ms makes the queues long enough.
    opcua = [f"Data.{name},nsu={NAMESPACE};s=Data.{name},{type_},,,,,1," for name, type_ in types.items()]
    modbus = [
        f"Data.{name},holding:{_VALUES_AT + 2 * index},float32:ABCD,,,,,5,"
        for index, name in enumerate(layout.names[split:])
    ]
    return "\n".join([HEADER, *opcua, ""]), "\n".join([HEADER, *modbus, ""])


def _node_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of `[A-Za-z0-9_-]`, unique and none of the three that are served beside them."""
    taken, out = {"Segment", "Target", "Running"}, []
    for name in names:
        base = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "x"
        unique, number = base, 2
        while unique in taken:
            unique, number = f"{base}_{number}", number + 1
        taken.add(unique)
        out.append(unique)
    return tuple(out)


def recorded_steps(path: Path, client: int, part: str, seed: int) -> Iterator[Step]:
    """Return one plant's recording as steps without end; UserError if the file holds nothing of that plant.

    Windows are shuffled by the seed, anew at each pass, which gets new segments. A step is one second of source
    time, which starts so that the first pass ends about now.
    """
    layout = data_layout(path)
    file = read_recorded(path)
    mine = file[f"client_{part}"] == client
    x, y = file[f"x_{part}"][mine], file[f"y_{part}"][mine]
    if not len(x):
        clients = ", ".join(f"{number} {name}" for number, name in enumerate(layout.clients))
        raise UserError("--client", 0, str(client), "has no rows in the file", f"take one of: {clients}")
    x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).reshape(len(x), layout.channels, layout.length)
    return _steps(layout, x, y, seed)


def _steps(layout: DataLayout, x: NDArray[np.float32], y: NDArray[Any], seed: int) -> Iterator[Step]:
    """Yield the steps of x (N, C, T) and y (N,), pass after pass."""
    wave = layout.kind == "waveform"
    count = 1 if wave else layout.length
    time_ns = (time.time_ns() // _SECOND_NS - len(x) * count) * _SECOND_NS
    random, segment = np.random.default_rng(seed), 0
    split = layout.channels - layout.modbus
    names = [f"Data.{name}" for name in layout.names[:split]]
    while True:
        segment += layout.kind == "rows"
        for index in random.permutation(len(x)):
            segment += layout.kind != "rows"
            target = float(y[index]) if layout.target == "Double" else int(y[index])
            # The target stands before the values, so that it is known when the last of them completes a window.
            first: dict[str, Any] = {"Data.Segment": segment, "Data.Target": target, "Data.Running": True}
            for step in range(count):
                column: list[Any] = [x[index, 0].tolist()] if wave else x[index, :, step].tolist()
                yield Step(time_ns, first | dict(zip(names, column, strict=False)), column[split:])
                time_ns += _SECOND_NS


def _recorded_nodes(layout: DataLayout) -> dict[str, tuple[Any, Any]]:
    wave = layout.kind == "waveform"
    value: tuple[Any, Any] = ([0.0] * layout.length, _T.Float) if wave else (0.0, _T.Double)
    nodes: dict[str, tuple[Any, Any]] = {
        "Data.Segment": (0, _T.UInt32),
        # None of these is what the first step writes, so that its time stamp is reported with it.
        "Data.Target": (-1.0, _T.Double) if layout.target == "Double" else (-1, _T.Int32),
        "Data.Running": (False, _T.Boolean),
    }
    split = layout.channels - layout.modbus
    return nodes | dict.fromkeys((f"Data.{name}" for name in layout.names[:split]), value)


def _spindle_values(row: Row) -> dict[str, Any]:
    values: dict[str, Any] = {
        "Spindle.Running": row.running,
        "Spindle.BearingSerial": row.serial,
        "Spindle.Condition": row.condition,
        "Spindle.VibRms": row.vib_rms,
        "Spindle.Crest": row.crest,
        "Spindle.EnvBPFO": row.env_bpfo,
        "Spindle.EnvBPFI": row.env_bpfi,
        "Spindle.EnvBSF": row.env_bsf,
        "Spindle.BearingTemp": row.temp_c,
    }
    return values if row.waveform is None else values | {"Spindle.Waveform": row.waveform.tolist()}


class Plc:
    """Both servers over one set of values. Nodes are written in the order given, all of a step at once."""

    def __init__(
        self, nodes: dict[str, tuple[Any, Any]], opcua_port: int, modbus_port: int, registers: int = _REGISTERS
    ) -> None:
        self._kinds = nodes
        self._ids: dict[str, ua.NodeId] = {}
        self._opcua_port = opcua_port
        self._server = Server()
        block = SimData(0, count=registers, values=0, datatype=DataType.REGISTERS)
        self._modbus = ModbusTcpServer(SimDevice(1, simdata=[block]), address=("127.0.0.1", modbus_port))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Listen on both ports within the context."""
        server = self._server
        await server.init()
        server.set_endpoint(f"opc.tcp://127.0.0.1:{self._opcua_port}/")
        server.set_security_policy([ua.SecurityPolicyType.NoSecurity])
        space = await server.register_namespace(NAMESPACE)
        for name, (value, kind) in self._kinds.items():
            node = ua.NodeId(ua.String(name), ua.Int16(space))
            await server.nodes.objects.add_variable(node, f"{space}:{name}", value, varianttype=kind)
            self._ids[name] = node
        async with server:
            await self._modbus.serve_forever(background=True)
            try:
                yield
            finally:
                await self._modbus.shutdown()  # type: ignore[no-untyped-call]

    async def put(self, time_ns: int, values: dict[str, Any]) -> None:
        """Set nodes, all with one source timestamp."""
        stamp: Any = datetime.fromtimestamp(time_ns // _SECOND_NS, UTC)
        stamp += timedelta(microseconds=time_ns % _SECOND_NS // 1000)
        written = []
        for name, value in values.items():
            variant = ua.Variant(value, self._kinds[name][1])
            data = ua.DataValue(variant, SourceTimestamp=stamp, ServerTimestamp=stamp)
            written.append(ua.WriteValue(self._ids[name], AttributeIds.Value, Value=data))
        await self._server.iserver.isession.write(ua.WriteParameters(NodesToWrite=written))

    async def put_registers(self, at: int, form: str, *values: float) -> None:
        """Set holding registers from `at` on, as struct packs the values."""
        data = struct.pack(form, *values)
        await self._modbus.async_setValues(1, 16, at, list(struct.unpack(f">{len(data) // 2}H", data)))


async def _play_spindle(plc: Plc, rows: Iterator[Row], rate_hz: float) -> None:
    begin = time.monotonic()
    for count, row in enumerate(rows):
        now = time.time_ns()
        torque = struct.unpack(">HH", struct.pack(">f", row.torque_pct))[::-1]
        current = max(-32_768, min(32_767, round(row.current_a * 100)))
        uptime = int(time.monotonic() - begin)
        fields = (row.speed_rpm, *torque, current, uptime, 0, 0, 0, now // 1_000_000)
        await plc.put_registers(0, ">fHHhIHHHQ", *fields)
        await plc.put(now, _spindle_values(row))
        await asyncio.sleep(max(0.0, begin + (count + 1) / rate_hz - time.monotonic()))


async def _play_recorded(plc: Plc, steps: Iterator[Step], rate_hz: float) -> None:
    begin = time.monotonic()
    before: dict[str, Any] = {}
    for count, step in enumerate(steps):
        changed = {
            name: value
            for name, value in step.nodes.items()
            if name not in before or before[name] != value or name == "Data.Waveform"
        }
        before = step.nodes
        gap = (0,) * (_VALUES_AT - _CLOCK_AT - 4)
        form = f">Q{len(gap)}H{len(step.channels)}f"
        await plc.put_registers(_CLOCK_AT, form, step.time_ns // 1_000_000, *gap, *step.channels)
        await plc.put(step.time_ns, changed)
        ahead = begin + (count + 1) / rate_hz - time.monotonic()
        if ahead > _BATCH_S or count % 64 == 0:
            await asyncio.sleep(max(0.0, ahead))


async def _serve(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    if args.data is None:
        plc = Plc(_SPINDLE, args.opcua_port, args.modbus_port)
        play = _play_spindle(plc, Spindle(args.seed, args.plant, args.rate).rows(), args.rate)
    else:
        plc = Plc(_recorded_nodes(data_layout(args.data)), args.opcua_port, args.modbus_port)
        play = _play_recorded(plc, recorded_steps(args.data, args.client, args.part, args.seed), args.rate)
    parent = os.getppid()
    async with plc.serving(), asyncio.TaskGroup() as group:
        playing = group.create_task(play)
        print("ready", flush=True)
        while not stop.is_set() and not playing.done() and os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), 1.0)
        playing.cancel()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the PLC until it is told to stop; 0, or 2 with one line for what the user got wrong."""
    parser = argparse.ArgumentParser(prog="python -m edge.lab.plc", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--opcua-port", type=int, required=True)
    parser.add_argument("--modbus-port", type=int, required=True)
    parser.add_argument("--rate", type=float, default=50.0, help="rows a second of wall clock")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plant", type=int, default=0, help="which plant's spindle")
    parser.add_argument("--data", type=Path, help="play this recorded set instead of the spindle")
    parser.add_argument("--client", type=int, default=0, help="whose rows of the recorded set")
    parser.add_argument("--part", choices=("train", "test"), default="train")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.ERROR)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        asyncio.run(_serve(args))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"plc: can't listen: {error}; take other ports", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
