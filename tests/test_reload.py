"""SIGHUP: what a changed file asks of a running gateway, and a real one that does it."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge.cli import main
from edge.config import load_config
from edge.lab.processes import Process, free_port, python
from edge.reload import plan
from tests.rigs import ModbusRig, OpcuaRig, until
from tests.test_agent import plant
from tests.test_config import DRIVE, GATEWAY, PLC1, change

WAIT_S = 60.0


@pytest.fixture
def gateway(tmp_path: Path) -> Path:
    (tmp_path / "plc1.csv").write_text(PLC1)
    (tmp_path / "drive.csv").write_text(DRIVE)
    (tmp_path / "gateway.toml").write_text(GATEWAY)
    return tmp_path / "gateway.toml"


def test_the_same_files_change_nothing(gateway: Path) -> None:
    old = load_config(gateway)
    change(gateway.parent / "plc1.csv", "at the bearing, front", "at the front bearing")
    change(gateway.parent / "plc1.csv", "\nRUL,", "\n\n\nRUL,")
    made = plan(old, load_config(gateway))
    assert made[1:] == ((), (), (), (), (), frozenset(), ())
    assert made.summary == "nothing to do"
    assert made.config == load_config(gateway)


# File, what is written in place of what; sources stopped and started, tasks wired anew, tags that changed.
CHANGES: dict[str, tuple[str, str, str, str, str, set[str]]] = {
    "a tag came": ("plc1.csv", "\nRUL,", "\nNew,ns=2;s=New,,,,,,,\nRUL,", "plc1", "", set()),
    "a tag went": ("plc1.csv", "Wave,ns=2;s=Wave,float32[16],g,,,,,\n", "", "plc1", "", {"plc1/Wave"}),
    "a signal's scale": ("plc1.csv", "0.1,-40", "0.2,-40", "plc1", "spindle-wear", {"plc1/Spindle.Temp"}),
    "the gate's address": ("plc1.csv", "s=Running", "s=Runs", "plc1", "spindle-wear", {"plc1/Running"}),
    "the segment's address": ("plc1.csv", "s=PartId", "s=Part", "plc1", "spindle-wear", {"plc1/PartId"}),
    "an option": ("gateway.toml", "device_id = 1", "device_id = 2", "drive", "spindle-wear", {"drive/rms"}),
    "a signal": ("gateway.toml", 'vib = "drive/rms"', 'vib = "plc1/RUL"', "", "spindle-wear", set()),
    "the gate": ("gateway.toml", "rms < 90.5", "rms < 80", "", "spindle-wear", set()),
    "the lag": ("gateway.toml", "\n[policy]", 'max_lag = "3s"\n[policy]', "", "spindle-wear", set()),
    "the policy": ("gateway.toml", "min_gateways = 3", "min_gateways = 4", "", "", set()),
    "raw": ("gateway.toml", '["plc1/RUL"]', "[]", "", "", set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_started_anew_alone(gateway: Path, name: str) -> None:
    file, before, after, source, task, tags = CHANGES[name]
    old = load_config(gateway)
    change(gateway.parent / file, before, after)
    made = plan(old, load_config(gateway))
    assert made.stop == made.start == tuple(source.split())
    assert made.rewire == tuple(task.split())
    assert made.changed == tags
    assert (made.leave, made.join, made.restart) == ((), (), ())
    assert made.config == load_config(gateway)


def test_sources_and_tasks_come_and_go(gateway: Path) -> None:
    both = load_config(gateway)
    text = GATEWAY[: GATEWAY.index('[[source]]\nname = "drive"')] + '[task.other]\nsignals = { a = "plc1/RUL" }\n'
    gateway.write_text(text)
    one = load_config(gateway)
    made = plan(both, one)
    assert (made.stop, made.start, made.leave, made.join) == (("drive",), (), ("spindle-wear",), ("other",))
    assert made.changed == {"drive/rms"}
    assert made.summary == "sources stopped: drive; tasks left: spindle-wear; tasks joined: other"
    back = plan(one, both)
    assert (back.stop, back.start, back.leave, back.join) == ((), ("drive",), ("other",), ("spindle-wear",))


def test_a_source_that_is_offline_is_tried_again_and_its_tags_mean_the_same(gateway: Path) -> None:
    config = load_config(gateway)
    made = plan(config, config, frozenset({"plc1"}))
    assert (made.stop, made.start, made.rewire, made.changed) == (("plc1",), ("plc1",), (), frozenset())
    assert made.summary == "sources started anew: plc1"


# What is written in place of what, and the key that needs a restart.
FIXED = {
    "cell2": ("cell3", "gateway.path"),
    "127.0.0.1:1883": ("127.0.0.1:1884", "mqtt.url"),
    '"2GiB"': ('"1GiB"', "store.max_bytes"),
    "[policy]": ("[training]\nnice = 5\n[policy]", "training.nice"),
    "[store]": ('[training]\nmemory = "1GiB"\n[store]', "training.memory training.memory"),
    "[policy]\n": ('[federation]\nname = "f"\n[policy]\n', "federation.name"),
    "[store]\n": ("[scoring]\nthreads = 2\n[store]\n", "scoring.threads"),
}


@pytest.mark.parametrize("before", FIXED)
def test_what_needs_a_restart_is_named_and_stays(gateway: Path, before: str) -> None:
    after, keys = FIXED[before]
    old = load_config(gateway)
    change(gateway, before, after)
    made = plan(old, load_config(gateway))
    assert made.restart == tuple(dict.fromkeys(keys.split()))
    assert made[1:7] == ((), (), (), (), (), frozenset())
    assert made.config == msgspec.structs.replace(old)


# -- a running gateway -------------------------------------------------------------------------------------------------


class Running:
    """A gateway's real process between two real servers; no broker is needed to read."""

    def __init__(self, folder: Path, opcua: OpcuaRig, modbus: ModbusRig) -> None:
        self.toml, self.state = folder / "gateway.toml", folder / "state"
        (folder / "plc.csv").write_text("tag,address\na,nsu=urn:rig;s=A\n")
        (folder / "drive.csv").write_text("tag,address,type\nb,40004,int16\n")
        self.toml.write_text(
            '[gateway]\npath = "a/b/c/d/e"\n\n'
            f'[mqtt]\nurl = "mqtt://127.0.0.1:{free_port()}"\n\n'
            f'[[source]]\nname = "plc"\ndriver = "opcua"\nurl = "{opcua.source.url}"\ntags = "plc.csv"\n\n'
            f'[[source]]\nname = "drive"\ndriver = "modbus"\nurl = "{modbus.source.url}"\ntags = "drive.csv"\n'
        )
        command = python("edge.cli", "edge", "run", "-c", self.toml, "--state", self.state)
        self.log = folder / "gateway.log"
        self.process = Process("gateway", command, self.log)

    @property
    def status(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.state / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def source(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.status.get("sources", {}).get(name, {})
        return found

    def hangup(self) -> None:
        assert self.process.pid
        os.kill(self.process.pid, signal.SIGHUP)

    async def until(self, condition: Callable[[], object]) -> None:
        def met() -> bool:
            self.process.check()
            return bool(condition())

        await until(met, WAIT_S)


async def test_a_running_gateway_takes_up_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opcua, modbus = OpcuaRig(), ModbusRig()
    await opcua.start()
    await modbus.start()
    g = Running(tmp_path, opcua, modbus)
    g.process.start()
    try:
        await g.until(lambda: g.source("plc").get("connects") == 1 and g.source("drive").get("samples", 0) > 3)
        # A tag more: its source begins anew and reads it, the other one is not touched.
        with (tmp_path / "plc.csv").open("a") as file:
            file.write("flag,nsu=urn:rig;s=Flag\nlost,nsu=urn:rig;s=Missing\n")
        g.hangup()
        await g.until(lambda: "plc/lost" in g.source("plc").get("quarantined", {}))
        await g.until(lambda: g.source("plc")["samples"] >= 2)
        assert g.source("plc")["connects"] == 2  # what was counted before goes on
        before = g.source("drive")
        assert before["connects"] == 1
        # A file that is wrong: what ran goes on, and status says where the mistake is, whatever state the file is in.
        good = g.toml.read_text()
        g.toml.write_text(good.replace("[mqtt]", "[mqt]"))
        g.hangup()
        await g.until(lambda: g.status["problem"])
        assert f"{g.toml}:" in g.status["problem"]
        assert "unknown key; did you mean 'mqtt'?" in g.status["problem"]
        await g.until(lambda: g.source("drive")["samples"] > before["samples"] + 3)
        assert main(["edge", "status", "-c", str(g.toml), "--state", str(g.state)]) == 0
        assert "did you mean 'mqtt'?" in capsys.readouterr().out
        # Mended, with one source less and a key that can't change under way.
        g.toml.write_text(
            good[: good.index('[[source]]\nname = "plc"')] + good[good.index('[[source]]\nname = "drive"') :]
        )
        change(g.toml, 'path = "a/b/c/d/e"', 'path = "a/b/c/d/f"')
        g.hangup()
        await g.until(lambda: list(g.status["sources"]) == ["drive"])
        await g.until(lambda: g.status["restart"] == ["gateway.path"])
        assert g.status["problem"] == ""
        assert g.status["path"] == "a/b/c/d/e"
        assert g.source("drive")["connects"] == 1
        assert "reload: gateway.path has changed, which takes a restart" in g.log.read_text()
        assert main(["edge", "status", "-c", str(g.toml), "--state", str(g.state)]) == 0
        assert "RESTART  to take up gateway.path" in capsys.readouterr().out
        await g.until(lambda: g.source("drive").get("tags"))
        assert main(["edge", "status", "-c", str(g.toml), "--state", str(g.state), "--tags"]) == 0
        assert re.search(r"drive/b = -?\d+, [\d.]+ s ago", capsys.readouterr().out)
        g.process.kill()  # SIGKILL: it says nothing any more, and holds its state no longer
        assert json.loads((g.state / "status.json").read_text())["running"]
        assert main(["edge", "status", "-c", str(g.toml), "--state", str(g.state)]) == 1
        said = capsys.readouterr().out
        assert "NOT RUNNING; what it said last" in said
        assert "source   drive: connected" in said
    finally:
        g.process.stop()
        await opcua.stop()
        await modbus.stop()


def test_tasks_score_on_when_files_change(tmp_path: Path) -> None:
    with plant(tmp_path, "amqtt") as p:
        for process in (*p.stage.plcs, p.stage.aggregator, p.gateway):
            process.start()
        p.until(lambda: p.task().get("scored", 0) > 2)
        folder, pid = tmp_path / "plant1", p.gateway.pid

        def hangup(condition: Callable[[], object]) -> None:
            os.kill(pid, signal.SIGHUP)
            p.until(condition)
            scored = p.task()["scored"]
            p.until(lambda: p.task()["scored"] > scored + 3)

        # Another source: the task does not notice.
        (folder / "more.csv").write_text("tag,address\nx,x\n")
        (folder / "x.csv").write_text("x\n1\n2\n")
        toml = folder / "gateway.toml"
        source = '[[source]]\nname = "more"\ndriver = "replay"\nurl = "x.csv"\ntags = "more.csv"\n'
        toml.write_text(toml.read_text() + source)
        hangup(lambda: "more" in p.status()["sources"])
        # Another wiring: its windows begin again, and the model goes on; a task that nobody publishes waits.
        change(toml, "\n[policy]", 'max_lag = "1s"\n\n[task.other]\nsignals = { x = "more/x" }\n\n[policy]')
        hangup(lambda: "other" in p.status()["tasks"])
        assert p.task()["problem"] == ""
        assert "tasks joined: other; tasks wired anew: bearing-condition" in (folder / "gateway.log").read_text()
        # A wiring that does not fit the task is not taken, and scoring goes on with the one before.
        text = (folder / "plc.csv").read_text()
        (folder / "plc.csv").write_text(text.replace(",degC,", ",bar,"))
        os.kill(pid, signal.SIGHUP)
        p.until(lambda: "can't be temp_c" in p.status()["problem"])
        before = p.task()["scored"]
        p.until(lambda: p.task()["scored"] > before + 3)
        assert p.task()["problem"] == ""
        (folder / "plc.csv").write_text(text)
        hangup(lambda: p.status()["problem"] == "" and p.task()["scoring_model"] is not None)
        sources: Any = p.status()["sources"]
        assert sources["drive"]["connects"] == 1
        assert p.status()["pid"] == pid
