"""`tundish bench ingest`: values per CPU-second of our way in, beside a raw client of the same library on one server.

The server is a process of its own, and so is every measurement, whose CPU time is that of all its threads. Raw and ours
take turns, and the ratio is the median of the pairs, because a machine that is shared changes from minute to minute.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from edge.lab.ingest_child import MODEL, RATE_HZ, TAGS, write_task
from edge.lab.processes import Process, free_port, python, wait_for
from edge.train import resident_bytes
from models.errors import UserError

_CHILD = "edge.lab.ingest_child"
_SECONDS, _ROUNDS, _SOAK = (0.1, 600.0), (1, 100), (0, 10**6)
_WAIT_S = 120.0
_WARM_S = 90.0  # two turns of the journal into blocks, whose memory is kept
_MB = 2**20


def main(*, seconds: float, rounds: int, soak: float, data: Path | None, as_json: bool) -> int:
    """Measure and print; with `soak` in seconds, run one gateway's way in for so long instead."""
    bounds = (("--seconds", seconds, _SECONDS), ("--rounds", rounds, _ROUNDS), ("--soak", soak, _SOAK))
    for option, value, (least, most) in bounds:
        if not least <= value <= most:
            raise UserError(option, 0, "", f"{value:g} is out of range", f"write {least:g} to {most:g}")
    with tempfile.TemporaryDirectory(prefix="tundish-") as name:
        folder = Path(name)
        found = _soaked(folder, soak) if soak else _compared(folder, seconds, rounds, data)
    if as_json:
        print(json.dumps(found))
        return 0
    for what, figures in found.items():
        print(f"{what:<8}" + "  ".join(f"{key} {value:,}" for key, value in figures.items()))
    return 0


def _compared(folder: Path, seconds: float, rounds: int, data: Path | None) -> dict[str, dict[str, Any]]:
    _model(folder)
    found: dict[str, dict[str, Any]] = {}
    with _plant(folder, RATE_HZ) as ports:
        for kind, port in ports.items():
            pairs = []
            for _ in range(rounds):
                raw, ours = (
                    _child(folder, role, "--kind", kind, "--port", port, "--seconds", seconds)["values_per_cpu_s"]
                    for role in ("raw", "ours")
                )
                pairs.append((ours, raw))
            found[kind] = {
                "values_per_cpu_s": round(median(ours for ours, _ in pairs)),
                "raw_values_per_cpu_s": round(median(raw for _, raw in pairs)),
                "ratio": round(median(ours / raw for ours, raw in pairs), 3),
            }
    found["store"] = _child(folder, "store", *(["--data", data.absolute()] if data else []))
    return found


def _soaked(folder: Path, seconds: float) -> dict[str, dict[str, Any]]:
    """Resident memory of one gateway's way in, after it is warm and at the end, at 2,000 values a second."""
    _model(folder)
    with _plant(folder, 2_000 / TAGS) as ports:
        arguments = ("ours", "--kind", "opcua", "--port", ports["opcua"], "--seconds", seconds + _WARM_S)
        gateway = Process("gateway", python(_CHILD, *arguments, "--folder", folder), folder / "gateway.log")
        gateway.start()
        try:
            wait_for("the gateway", lambda: "reading" in _said(gateway), [gateway], _WAIT_S)
            time.sleep(_WARM_S)
            first = last = resident_bytes(gateway.pid)
            until = time.monotonic() + seconds - 1
            while time.monotonic() < until:
                gateway.check()
                last = resident_bytes(gateway.pid)
                time.sleep(min(1.0, max(0.0, until - time.monotonic())))
            wait_for("the gateway's figures", lambda: bool(_figures(gateway)), [], _WAIT_S)
            values = _figures(gateway)["values"]
        finally:
            gateway.stop()
    return {
        "soak": {
            "seconds": seconds,
            "values": values,
            "first_rss_mb": round(first / _MB, 1),
            "last_rss_mb": round(last / _MB, 1),
        }
    }


def _said(process: Process) -> str:
    return process.log.read_text(errors="replace")


def _figures(process: Process) -> dict[str, Any]:
    """What a child measured, among what its libraries log; nothing before it is through."""
    for line in reversed(_said(process).splitlines()):
        if line.startswith('{"'):
            with contextlib.suppress(ValueError):  # half written
                found: dict[str, Any] = json.loads(line)
                return found
    return {}


def _model(folder: Path) -> None:
    """Make the net whose scores are a part of our way in; torch is only in that child."""
    task = write_task(folder)
    child = Process("export", python("models.export", "--task", task, "--out", folder / MODEL), folder / "export.log")
    child.complete()


@contextlib.contextmanager
def _plant(folder: Path, rate_hz: float) -> Iterator[dict[str, int]]:
    """A PLC with TAGS values that change `rate_hz` times a second; its port by protocol."""
    ports = {"opcua": free_port(), "modbus": free_port()}
    arguments = ("plant", "--port", ports["opcua"], "--modbus-port", ports["modbus"], "--rate", rate_hz)
    plant = Process("plant", python(_CHILD, *arguments), folder / "plant.log")
    plant.start()
    try:
        wait_for("the plant", lambda: "ready" in _said(plant), [plant], _WAIT_S)
        yield ports
    finally:
        plant.stop()


def _child(folder: Path, role: str, *arguments: object) -> dict[str, Any]:
    log = folder / f"{role}.log"
    log.unlink(missing_ok=True)
    child = Process(role, python(_CHILD, role, *arguments, "--folder", folder), log)
    child.complete()
    return _figures(child)
