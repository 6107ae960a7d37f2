"""Pull the cable: what each driver does when its source goes away, as a table.

    python -m tests.cable [--rows "cut 1 s" "server restart"] [--json]

Real servers, and a TCP line that is cut. A counter goes up in the source every quarter of a second, also while nobody
can read it. `lost` counts the numbers that never came, `seconds` goes from when all is well again to the first good
value. A cut of ten minutes is ten seconds long here, with a server that keeps a sixtieth of what it would.
"""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from cryptography.x509 import load_pem_x509_certificate

from edge.drivers._opcua_pki import make_identity, own_identity
from edge.drivers.registry import load
from edge.tags import Driver, Quality, Sample, Source
from tests.opcua_rigs import (
    PASSWORD,
    URI,
    USER,
    AsyncuaPlant,
    Line,
    NodePlant,
    der,
    install_node,
    source,
    tag,
    write_identity,
)
from tests.rigs import ImagesRig, ModbusRig, MqttRig, ReplayRig, RtuRig, until

CACHE = Path(tempfile.gettempdir()) / "tundish-node-opcua"
STEP_S, LATER_S = 0.25, 90.0
REF = "plc/b"
POLICY = "Basic256Sha256:SignAndEncrypt"


@dataclass
class Outcome:
    """One line of the table."""

    driver: str
    row: str
    seconds: float | None
    lost: int | None
    told: str


class Subject:
    """A source on a real server; `cut` and `mend` are the cable's."""

    def __init__(self, name: str, rig: Any, made: Source, line: Line | None = None) -> None:
        self.name, self.rig, self.source, self.line = name, rig, made, line
        self.written: list[int] = []
        self.away = False  # a server of this process keeps its values while it is stopped

    async def change(self, number: int) -> None:
        await self.rig.change("b", number)

    async def cut(self) -> None:
        await (self.line.cut() if self.line else self.rig.stop())

    async def mend(self) -> None:
        await (self.line.mend() if self.line else self.rig.start())

    async def restart(self) -> None:
        self.away = True
        await self.rig.stop()
        await self.rig.start()
        self.away = False

    async def count(self) -> None:
        number = 0
        while True:
            number += 1
            # A server that is away counts nothing.
            with contextlib.suppress(Exception):
                if not self.away:
                    await self.change(number)
                    self.written.append(number)
            await asyncio.sleep(STEP_S)


class OpcuaSubject(Subject):
    """One of the two OPC UA servers."""

    async def change(self, number: int) -> None:
        await self.rig.put("B", float(number))

    async def restart(self) -> None:
        await super().restart()
        await self.rig.add("B", 0.0)


@contextlib.asynccontextmanager
async def subject(name: str, **options: Any) -> AsyncIterator[Subject]:
    """Start a source and the line to it."""
    with tempfile.TemporaryDirectory() as folder:
        rig: Any
        if name.startswith("opcua"):
            rig = AsyncuaPlant(Path(folder)) if name == "opcua" else NodePlant(Path(folder), install_node(CACHE))
        else:
            rig = {"modbus": ModbusRig, "modbus-rtu": RtuRig, "mqtt": MqttRig, "replay": ReplayRig,
                   "images": ImagesRig}[name]()  # fmt: skip
        await rig.start()
        line = None
        if port := rig.broker.port if name == "mqtt" else getattr(rig, "port", 0) * (name != "modbus-rtu"):
            line = Line(port)
            await line.mend()
        try:
            if name.startswith("opcua"):
                await rig.add("B", 0.0)
                item = tag("B", scale=2.0, offset=1.0, sampling_ms=50)
                made = source(rig, msgspec.structs.replace(item, name="b"), port=line.port if line else 0, **options)
                yield OpcuaSubject(name, rig, made, line)
            else:
                url = rig.source.url.replace(f":{port}", f":{line.port}") if line else rig.source.url
                tags = tuple(one for one in rig.source.tags if one.name != "missing")
                yield Subject(name, rig, msgspec.structs.replace(rig.source, url=url, tags=tags), line)
        finally:
            if line:
                await line.cut()
            await rig.stop()


class Reading:
    """A driver at work: what came when, and what was said meanwhile."""

    def __init__(self, one: Subject, made: Source | None = None) -> None:
        self.one, self.seen, self.good_at, self.said = one, set[int](), 0.0, ""
        self.driver: Driver = load(one.source.driver).Driver(made or one.source, self.take)

    def take(self, samples: Sequence[Sample], /) -> None:
        for sample in samples:
            if sample.tag == REF and sample.quality is Quality.GOOD and isinstance(sample.value, float):
                self.seen.add(round((sample.value - 1) / 2))
                self.good_at = time.monotonic()

    async def listen(self) -> None:
        while True:
            health = self.driver.health
            self.said = health.error or next(iter(health.quarantined.values()), "") or self.said
            await asyncio.sleep(0.02)

    async def good_after(self, moment: float) -> float:
        await until(lambda: self.good_at > moment, LATER_S)
        return self.good_at - moment

    def outcome(self, row: str, seconds: float | None, *, counts: bool = True) -> Outcome:
        health = self.driver.health
        span = [n for n in self.one.written if min(self.seen, default=0) <= n <= max(self.seen, default=-1)]
        lost = len(set(span) - self.seen) if counts else None
        more = [f"{key} {value}" for key in ("gaps", "overflows") if (value := getattr(health, key))]
        told = re.sub(r"127\.0\.0\.1:\d+", "10.0.0.10", "; ".join([self.said, *more] if self.said else more))
        told = re.sub(r"/tmp/\S*/", "…/", told)  # noqa: S108 - the rigs' folders
        return Outcome(self.one.name, row, None if seconds is None else round(seconds, 1), lost, told)


@contextlib.asynccontextmanager
async def reading(one: Subject, made: Source | None = None) -> AsyncIterator[Reading]:
    found = Reading(one, made)
    jobs = [asyncio.create_task(work) for work in (found.driver.run(), found.listen(), one.count())]
    try:
        yield found
    finally:
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)


Trouble = Callable[[Subject], Awaitable[None]]


async def _goes_away(row: str, name: str, trouble: Trouble, **options: Any) -> Outcome:
    """Read, have the trouble, and wait until values come again."""
    counts = name not in {"replay", "images"}  # a file waits for its reader
    async with subject(name, **options) as one, reading(one) as found:
        await found.good_after(0.0)
        await asyncio.sleep(4 * STEP_S)
        await trouble(one)
        back = time.monotonic()
        seconds = await found.good_after(back)
        await asyncio.sleep(8 * STEP_S)
        return found.outcome(row, seconds, counts=counts)


def _cut(cut_s: float, **options: Any) -> Callable[[str, str], Awaitable[Outcome]]:
    async def trouble(one: Subject) -> None:
        await one.cut()
        await asyncio.sleep(cut_s)
        await one.mend()

    async def row(name: str, title: str) -> Outcome:
        return await _goes_away(title, name, trouble, **(options if name.startswith("opcua") else {}))

    return row


async def _restart(name: str, title: str) -> Outcome:
    return await _goes_away(title, name, lambda one: one.restart())


async def _reindexed(name: str, title: str) -> Outcome:
    async def trouble(one: Subject) -> None:
        before = one.rig.space
        await one.restart()
        if one.rig.space == before:
            raise RuntimeError("the namespace kept its index")

    return await _goes_away(title, name, trouble)


async def _tag_gone(name: str, title: str) -> Outcome:
    async def trouble(one: Subject) -> None:
        if name == "modbus":
            one.rig.refused.add((3, 3))
            await asyncio.sleep(2.0)
            one.rig.refused.discard((3, 3))
        else:
            await one.rig.remove("B")
            await asyncio.sleep(2.0)
            await one.rig.add("B", 0.0)

    return await _goes_away(title, name, trouble)


async def _silent(name: str, title: str) -> Outcome:
    async def trouble(one: Subject) -> None:
        if name in OPCUA and one.line:
            one.line.silent = True  # connections are still taken
            await asyncio.sleep(10.0)
            one.line.silent = False
        else:
            one.rig.silent.add(1)
            await asyncio.sleep(5.0)
            one.rig.silent.clear()

    return await _goes_away(title, name, trouble)


async def _refused(one: Subject, made: Source, title: str, mend: Callable[[], Awaitable[None]]) -> Outcome:
    """Say what is told; there is no value before somebody has acted, which `mend` does."""
    async with reading(one, made) as found:
        await until(lambda: bool(found.driver.health.error) or bool(found.seen), LATER_S)
        if found.seen:
            raise RuntimeError(f"{one.name} came in: {title}")
        told = found.said = found.driver.health.error
        await mend()
        mended = time.monotonic()
        seconds = await found.good_after(mended)
        found.said = told
        return found.outcome(title, seconds, counts=False)


async def _wrong_password(name: str, title: str) -> Outcome:
    async with subject(name) as one, _known(one) as pki:
        file = pki / "password"
        file.write_text("wrong")
        options = {"security": POLICY, "user": USER, "password_file": str(file)}

        async def mend() -> None:
            file.write_text(PASSWORD)

        return await _refused(one, _secured(one, pki, options), title, mend)


async def _server_expired(name: str, title: str) -> Outcome:
    async with subject(name) as one, _known(one) as pki:

        async def renew(days: int) -> None:
            write_identity(make_identity(URI, "Rig", ["127.0.0.1"], days=days), one.rig.folder, "server")
            await one.restart()
            (pki / "trusted" / "rig.pem").write_bytes(one.rig.certificate.read_bytes())

        await renew(-1)
        return await _refused(one, _secured(one, pki, {"security": POLICY}), title, lambda: renew(365))


async def _gateway_expired(name: str, title: str) -> Outcome:
    async with subject(name) as one, _known(one) as pki:
        certificate, key = write_identity(make_identity("urn:rig:gateway", "Gateway", [], days=-1), pki, "old")
        (pki / "own" / "cert.der").write_bytes(der(load_pem_x509_certificate(certificate.read_bytes())))
        (pki / "own" / "key.pem").write_bytes(key.read_bytes())

        async def mend() -> None:
            shutil.rmtree(pki / "own")
            await one.rig.trust(own_identity(pki).certificate)

        return await _refused(one, _secured(one, pki, {"security": POLICY}), title, mend)


@contextlib.asynccontextmanager
async def _known(one: Subject) -> AsyncIterator[Path]:
    """Make a gateway and the server trust each other; the gateway's PKI folder."""
    with tempfile.TemporaryDirectory() as folder:
        pki = Path(folder) / "pki"
        await one.rig.trust(own_identity(pki).certificate)
        (pki / "trusted").mkdir()
        (pki / "trusted" / "rig.pem").write_bytes(one.rig.certificate.read_bytes())
        yield pki


def _secured(one: Subject, pki: Path, options: dict[str, Any]) -> Source:
    made = one.source
    return msgspec.structs.replace(made, pki=str(pki), options={**made.options, **options})


ALL = ("opcua", "opcua-node", "modbus", "modbus-rtu", "mqtt", "replay", "images")
OPCUA = ("opcua", "opcua-node")
# What happens, to whom, and how; a file has no cable, and a name that is gone is the reindexed server's own row.
ROWS: dict[str, tuple[tuple[str, ...], Callable[[str, str], Awaitable[Outcome]]]] = {
    "cut 1 s": (ALL, _cut(1.0)),
    "cut 30 s": (ALL[:5], _cut(30.0)),
    "cut 10 min": (OPCUA, _cut(10.0, queue_s=0.5)),
    "server restart": (ALL, _restart),
    "wrong password": (OPCUA, _wrong_password),
    "server's certificate expired": (OPCUA, _server_expired),
    "gateway's certificate expired": (OPCUA, _gateway_expired),
    "namespace reindexed": (("opcua",), _reindexed),
    "one tag gone": (("opcua-node", "modbus"), _tag_gone),
    "device silent": (("opcua", "opcua-node", "modbus", "modbus-rtu"), _silent),
}


async def table(rows: list[str], drivers: tuple[str, ...] = ALL) -> list[Outcome]:
    """Play rows, the drivers side by side."""

    async def column(name: str) -> list[Outcome]:
        return [await ROWS[row][1](name, row) for row in rows if name in ROWS[row][0]]

    columns = await asyncio.gather(*(column(name) for name in drivers))
    found = [outcome for column in columns for outcome in column]
    return sorted(found, key=lambda one: (rows.index(one.row), drivers.index(one.driver)))


def shown(found: list[Outcome]) -> str:
    """Return the table as Markdown."""
    lines = ["| what happens | driver | s to a good value | lost | what is told |", "|---|---|---|---|---|"]
    for one in found:
        seconds, lost = ("-" if value is None else str(value) for value in (one.seconds, one.lost))
        lines.append(f"| {one.row} | {one.driver} | {seconds} | {lost} | {one.told or 'nothing: it was too short'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cable", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--drivers", nargs="+", choices=ALL, default=list(ALL), metavar="DRIVER")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    found = asyncio.run(table(args.rows, tuple(args.drivers)))
    sys.stdout.write(json.dumps([asdict(one) for one in found]) if args.json else shown(found))
    sys.stdout.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
