"""The processes of `tundish bench ingest`: the plant, and what is measured on it, each by its own CPU time.

    python -m edge.lab.ingest_child plant --port 4840 --modbus-port 5020 --rate 20
    python -m edge.lab.ingest_child raw|ours --kind opcua|modbus --port 4840 --seconds 4 --folder DIR
    python -m edge.lab.ingest_child store --folder DIR

A measurement prints one JSON object as its last line.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from asyncua import ua
from asyncua.client.client import Client
from pymodbus.client import AsyncModbusTcpClient

from edge.drivers import registry
from edge.health import Watch
from edge.heap import share_one_heap
from edge.infer import Scorer
from edge.lab.physics import Spindle
from edge.lab.plc import NAMESPACE, Plc, recorded_steps
from edge.live import Live
from edge.ring import Samples
from edge.tags import Driver, Quality, Sample, Source, Tag
from edge.window import Wiring
from models.delta import read_export
from models.errors import LocalError
from models.scale import Scale
from models.spec import parse_task

MODEL = "model.npz"
TAGS, RATE_HZ = 200, 20.0
_PUBLISHING_MS, _BLOCK = 100, 120
_SIGNALS = 8
_WARM_S = 1.5
_STEPS, _PLANTS, _FLUSH = 6_000, 3, 50  # of the spindle: rows, plants, rows that make one flush
_FIRST_NS = 1_790_000_000 * 10**9


def write_task(folder: Path) -> Path:
    """Write the task whose windows are scored: ten rows a second of the first tags."""
    path = folder / "ingest.toml"
    head = 'name = "ingest"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 16\nrate_hz = 10.0\n'
    path.write_text(head + "".join(f'[[signal]]\nname = "{_name(i)}"\n' for i in range(_SIGNALS)))
    return path


def _name(i: int) -> str:
    return f"V{i:03}"


# -- the plant ---------------------------------------------------------------------------------------------------------


async def _serve(args: argparse.Namespace) -> None:
    stop, parent = asyncio.Event(), os.getppid()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    kind = ua.VariantType.Float
    plc = Plc({_name(i): (0.0, kind) for i in range(TAGS)}, args.port, args.modbus_port, 2 * TAGS)
    random = np.random.default_rng(0)
    values = random.normal(50, 10, TAGS)
    async with plc.serving():
        print("ready", flush=True)
        due = time.monotonic()
        while not stop.is_set() and os.getppid() == parent:
            values += random.normal(0, 0.1, TAGS)
            now = values.astype(np.float32).tolist()
            await plc.put(time.time_ns(), {_name(i): now[i] for i in range(TAGS)})
            await plc.put_registers(0, f">{TAGS}f", *now)
            due = max(due + 1 / args.rate, time.monotonic())
            await asyncio.sleep(due - time.monotonic())


# -- what is measured --------------------------------------------------------------------------------------------------


async def _measured(count: Callable[[], int], seconds: float, began: Callable[[], int]) -> dict[str, float]:
    """Values and CPU seconds (all threads of this process) from when all is under way."""
    async with asyncio.timeout(60):
        while not began():  # noqa: ASYNC110 - counters set no event
            await asyncio.sleep(0.05)
    print("reading", flush=True)
    await asyncio.sleep(_WARM_S)
    values, cpu = count(), time.process_time()
    await asyncio.sleep(seconds)
    values, cpu = count() - values, time.process_time() - cpu
    if not values:
        raise LocalError("no value came")
    return {"values": values, "cpu_s": round(cpu, 4), "values_per_cpu_s": values / cpu}


async def _raw(args: argparse.Namespace) -> dict[str, float]:
    async with (_raw_opcua if args.kind == "opcua" else _raw_modbus)(args.port) as count:
        return await _measured(count, args.seconds, count)


class _Counter:
    """A subscription handler that does the least."""

    def __init__(self) -> None:
        self.values = 0

    def datachange_notification(self, _node: Any, _value: Any, _data: Any) -> None:
        """Count one."""
        self.values += 1


@contextlib.asynccontextmanager
async def _raw_opcua(port: int) -> AsyncIterator[Callable[[], int]]:
    async with Client(f"opc.tcp://127.0.0.1:{port}") as client:
        space = await client.get_namespace_index(NAMESPACE)
        nodes = [client.get_node(f"ns={space};s={_name(i)}") for i in range(TAGS)]
        counter = _Counter()
        subscription = await client.create_subscription(_PUBLISHING_MS, counter)
        await subscription.subscribe_data_change(nodes, queuesize=300)
        yield lambda: counter.values


@contextlib.asynccontextmanager
async def _raw_modbus(port: int) -> AsyncIterator[Callable[[], int]]:
    """Read the blocks that the driver reads, as often."""
    client, read = AsyncModbusTcpClient("127.0.0.1", port=port), 0

    async def poll() -> None:
        nonlocal read
        due = time.monotonic()
        while True:
            for at in range(0, 2 * TAGS, _BLOCK):
                reply = await client.read_holding_registers(at, count=min(_BLOCK, 2 * TAGS - at))
                read += len(reply.registers) // 2
            due = max(due + 1 / RATE_HZ, time.monotonic())
            await asyncio.sleep(due - time.monotonic())

    await client.connect()
    work = asyncio.create_task(poll())
    try:
        yield lambda: read
    finally:
        work.cancel()
        client.close()


async def _ours(args: argparse.Namespace) -> dict[str, float]:
    """Driver, store with health, window and score: all that a gateway does with a value, but publish scores."""
    share_one_heap()
    source = _source(args.kind, args.port)
    samples = Samples(args.folder / "state", 1 << 30, 0, Watch({tag.ref: tag for tag in source.tags}).take)
    live = _live(args.folder, samples)

    def sink(batch: Sequence[Sample], /) -> None:
        samples.append(batch)
        live.feed(batch)

    driver: Driver = registry.load(args.kind).Driver(source, sink)
    work = asyncio.create_task(driver.run())
    try:
        found = await _measured(lambda: driver.health.samples, args.seconds, lambda: live.stats.scored)
    finally:
        work.cancel()
        await asyncio.wait([work])
        samples.close()
    if not live.stats.scored or driver.health.bad or samples.dropped or samples.error:
        raise LocalError(f"{live.stats}, {driver.health}, {samples.dropped} dropped, {samples.error}")
    return found


def _source(kind: str, port: int) -> Source:
    if kind == "opcua":
        url, options = f"opc.tcp://127.0.0.1:{port}", {"publishing_ms": _PUBLISHING_MS}
        addresses = [f"nsu={NAMESPACE};s={_name(i)}" for i in range(TAGS)]
    else:
        url, options = f"modbus+tcp://127.0.0.1:{port}", {"poll_ms": round(1000 / RATE_HZ), "max_block": _BLOCK}
        addresses = [f"holding:{2 * i}" for i in range(TAGS)]
    tags = tuple(Tag(source="plc", name=_name(i), address=at, type="float32") for i, at in enumerate(addresses))
    return Source(name="plc", driver=kind, url=url, tags=tags, options=dict(options))


def _live(folder: Path, samples: Samples) -> Live:
    task = parse_task((folder / "ingest.toml").read_text())
    graph, layout, vector = read_export(folder / MODEL)
    scorer = Scorer.build(task, 1, graph, layout, vector, Scale((50.0,) * _SIGNALS, (10.0,) * _SIGNALS))
    wiring = Wiring(task.window, tuple(f"plc/{_name(i)}" for i in range(_SIGNALS)))
    return Live(task, wiring, 2 * 10**9, lambda _: None, samples.score, lambda _: None, scorer, learnt=True)


# -- the store ---------------------------------------------------------------------------------------------------------


def _store(args: argparse.Namespace) -> dict[str, float]:
    """Bytes on the disk and CPU time of samples that are stored as they would come, a flush a second."""
    flushes = list(_recorded(args.data) if args.data else _simulated())
    samples = Samples(args.folder / "stored", 1 << 40)
    samples.flush()
    empty, cpu = samples.used(), time.process_time()
    for flush in flushes:
        samples.append(flush)
        samples.flush()
    cpu = time.process_time() - cpu
    count = sum(_values(sample) for flush in flushes for sample in flush)
    taken = samples.used() - empty
    samples.close()
    if samples.dropped or samples.error:
        raise LocalError(f"{samples.dropped} dropped, {samples.error}")
    return {"bytes_per_sample": round(taken / count, 3), "samples_per_cpu_s": round(count / cpu)}


def _values(sample: Sample) -> int:
    return 1 if isinstance(sample.value, float) else len(sample.value)


def _simulated() -> list[list[Sample]]:
    """The spindles' features, as float32 as a PLC's REAL holds them, at 50 Hz."""
    flushes: list[list[Sample]] = [[] for _ in range(_STEPS // _FLUSH)]
    for plant in range(_PLANTS):
        for step, row in enumerate(islice(Spindle(0, plant, float(_FLUSH)).rows(), _STEPS)):
            time_ns = _FIRST_NS + step * 10**9 // _FLUSH
            features = np.array(row[4:13], np.float32).tolist()
            flushes[step // _FLUSH] += [
                Sample(f"plc{plant}/{name}", time_ns, value, Quality.GOOD)
                for name, value in zip(row._fields[4:13], features, strict=True)
            ]
    return flushes


def _recorded(path: Path) -> list[list[Sample]]:
    """A recorded set's first plant, a sample of each channel a second."""
    flushes = []
    for step in islice(recorded_steps(path, 0, "train", 0), _STEPS // 4):
        named = {**dict(zip((f"c{i}" for i in range(len(step.channels))), step.channels, strict=True)), **step.nodes}
        flushes.append(
            [
                Sample(f"plc/{name}", step.time_ns, _value(value), Quality.GOOD)
                for name, value in named.items()
                if isinstance(value, int | float | list | np.ndarray)
            ]
        )
    return flushes


def _value(value: Any) -> Any:
    return float(value) if isinstance(value, int | float) else np.asarray(value, np.float32)


def main() -> int:
    """Play one part."""
    parser = argparse.ArgumentParser(prog="python -m edge.lab.ingest_child")
    parser.add_argument("role", choices=("plant", "raw", "ours", "store"))
    parser.add_argument("--kind", choices=("opcua", "modbus"))
    parser.add_argument("--port", type=int)
    parser.add_argument("--modbus-port", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    if args.role == "plant":
        asyncio.run(_serve(args))
    elif args.role == "store":
        print(json.dumps(_store(args)))
    else:
        print(json.dumps(asyncio.run((_raw if args.role == "raw" else _ours)(args))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
