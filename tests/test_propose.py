"""`tundish edge wire`: the right tag first among sixty with near misses, and nothing written without acceptance."""

import itertools
import json
import os
import pty
import sys
from pathlib import Path

import numpy as np
import pytest

from edge.cli import main
from edge.config import load_config
from edge.propose import assign, propose, words
from edge.propose_command import _read
from edge.tagscsv import parse_tags
from edge.tomledit import put_table
from models.spec import parse_task
from tests.rigs import OpcuaRig

# What is to be found -> the signal; the near misses stand beside them.
RIGHT = {
    "speed_rpm": "Line4.Spindle.ActSpeed",
    "torque_pct": "Line4.Drive.TrqActual",
    "current_a": "Line4.Drive.MotorCur",
    "vib_rms": "Line4.Spindle.VibRMS",
    "bearing_temp": "Line4.Spindle.BrgTmp_Front",
    "coolant_pressure": "Line4.Coolant.Press",
    "coolant_flow": "Line4.Coolant.Flw",
    "motor_power": "Line4.Drive.Pwr",
    "x_position": "Line4.AxisX.Pos",
    "T24": "Line4.TC.T24",
    "condition": "Line4.Spindle.Condition",
}
ROWS = """\
Line4.Spindle.ActSpeed,rpm,actual speed
Line4.Spindle.SpeedSetpoint,rpm,commanded speed
Line4.Spindle.SpeedMax,rpm,limit
Line4.Spindle.SpeedOverride,%,
Line4.Conveyor.Speed,m/s,belt
Line4.Drive.TrqActual,%,
Line4.Drive.TrqLimit,%,
Line4.Drive.TorqueNm,N.m,
Line4.Drive.MotorCur,A,motor current
Line4.Drive.CurrentLimit,A,
Line4.Drive.BrakeVolt,V,
Line4.Drive.Pwr,kW,motor power
Line4.Drive.PowerFactor,1,
Line4.Drive.Energy,kWh,
Line4.Drive.MotorTemp,degC,winding
Line4.Spindle.VibRMS,mm/s,
Line4.Spindle.VibPeak,mm/s,
Line4.Spindle.VibCrest,1,
Line4.Gearbox.Vib,mm/s,
Line4.Spindle.BrgTmp_Front,degC,front bearing
Line4.Spindle.BrgTmp_Alarm,degC,
Line4.Spindle.BearingPreload,N,
Line4.Cabinet.Temp,degC,
Line4.Ambient.Temp,degF,hall
Line4.Coolant.Press,bar,
Line4.Coolant.PressMin,bar,
Line4.Coolant.Temp,degC,
Line4.Coolant.Flw,l/min,
Line4.Coolant.Level,%,
Line4.Hydraulic.Pressure,bar,
Line4.Hydraulic.Flow,l/min,
Line4.AirSupply.Pressure,bar,
Line4.AxisX.Pos,mm,
Line4.AxisX.PosSP,mm,
Line4.AxisX.Speed,mm/s,
Line4.AxisY.Pos,mm,
Line4.AxisZ.Pos,mm,
Line4.AxisX.LagError,um,
Line4.TC.T24,degF,
Line4.TC.T2,degF,
Line4.TC.T30,degF,
Line4.TC.T50,degF,
Line4.Spindle.Condition,,
Line4.Spindle.Running,,
Line4.Spindle.Hours,h,
Line4.PartId,,
Line4.PartCount,,
Line4.Program,,
Line4.Door.Closed,,
Line4.EStop,,
Line4.Light.Red,,
Line4.Light.Green,,
Line4.Tool.Number,,
Line4.Tool.Life,%,
Line4.Tool.Diameter,mm,
Line4.Shift,,
Line4.Operator,,
Line4.OEE,%,
Line4.Takt,s,
Line4.Spare1,degC,bearing temp spare
"""
# Named just like a signal, in a unit that can't be.
WRONG = {"motor_power": "motor_power,degC", "coolant_flow": "CoolantFlow,bar", "x_position": "XPosition,degC"}
UNITS = dict.fromkeys(RIGHT, "") | {
    "speed_rpm": "rpm", "torque_pct": "%", "current_a": "A", "vib_rms": "mm/s", "bearing_temp": "degC",
    "coolant_pressure": "psi", "coolant_flow": "m3/h", "motor_power": "W", "x_position": "mm", "T24": "degC",
}  # fmt: skip
TASK = (
    'name = "wear"\nkind = "classification"\nnet = "tcn"\n[window]\nlength = 30\n'
    + "".join(f'[[signal]]\nname = "{name}"\nunit = "{UNITS[name]}"\n' for name in RIGHT if name != "condition")
    + '[target]\nname = "condition"\nclasses = ["good", "worn"]\n'
)
CSV = "tag,unit,description,address,type\n" + "".join(
    f"{line},x{number},\n" for number, line in enumerate(ROWS.splitlines())
) + "".join(f"{row},,x,\n" for row in WRONG.values()) + "Wave,g,vib rms,w,float32[30]\n"  # fmt: skip
GATEWAY = """\
# our line
[gateway]
path = "a/b/c/d/e"

[mqtt]
url = "mqtt://127.0.0.1"   # here

[[source]]
name = "plc"
driver = "replay"
url = "x.csv"
tags = "plc.csv"
"""


@pytest.fixture
def gateway(tmp_path: Path) -> Path:
    (tmp_path / "plc.csv").write_text(CSV)
    (tmp_path / "task.toml").write_text(TASK)
    (tmp_path / "gateway.toml").write_text(GATEWAY)
    return tmp_path / "gateway.toml"


def wire(gateway: Path, *more: str) -> int:
    task, state = gateway.parent / "task.toml", gateway.parent / "state"
    return main(["edge", "wire", str(task), "-c", str(gateway), "--state", str(state), *more])


def test_every_signal_has_its_tag_first_and_no_wrong_unit_is_proposed() -> None:
    tags = list(parse_tags("plc", "plc.csv", CSV))
    assert len(tags) > 60
    found = propose(parse_task(TASK), tags, {})
    assert {name: guess.tag.name for name, guess in found.guesses.items() if guess} == RIGHT
    assert {name: ranked[0].tag.name for name, ranked in found.ranked.items()} == RIGHT
    for name, row in WRONG.items():
        ref = f"plc/{row.partition(',')[0]}"
        assert ref not in {guess.tag.ref for guess in found.ranked[name]}
        assert ref in dict(found.excluded[name])
    assert "temperature" in dict(found.excluded["motor_power"])["plc/motor_power"]
    assert dict(found.excluded["vib_rms"])["plc/Wave"] == "float32[30], not a scalar"
    guess = found.guesses["coolant_pressure"]
    assert guess
    assert guess.reasons == ("coolant = coolant", "pressure = pressure", "bar to psi")


def test_signals_that_nobody_has_get_no_tag_and_none_is_given_twice() -> None:
    tags = list(parse_tags("plc", "plc.csv", "tag,address,unit\nSpindleSpeed,a,rpm\nSpeed,b,rpm\nDoor,c,\n"))
    signals = "".join(
        f'[[signal]]\nname = "{name}"\nunit = "rpm"\n' for name in ("speed", "spindle_speed", "viscosity")
    )
    found = propose(parse_task(TASK[: TASK.index("[[signal]]")] + signals + TASK[TASK.index("[target]") :]), tags, {})
    assert {name: guess and guess.tag.name for name, guess in found.guesses.items()} == {
        "speed": "Speed", "spindle_speed": "SpindleSpeed", "viscosity": None, "condition": None
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SpindleTemp_01", ["spindle", "temperature", "1"]),
        ("OPCUATemp", ["opcua", "temperature"]),
        ("env-bpfo", ["envelope", "bpfo"]),
        ("T24", ["temperature", "24"]),
        ("temp_c", ["temperature"]),
        ("c", ["c"]),
    ],
)
def test_names_are_words(text: str, found: list[str]) -> None:
    assert words(text) == found


def test_the_assignment_is_the_cheapest() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        rows = int(rng.integers(1, 5))
        cost = rng.random((rows, rows + int(rng.integers(0, 3))))
        got = assign(cost)
        assert len(set(got)) == rows
        ways = itertools.permutations(range(cost.shape[1]), rows)
        best = min(sum(cost[i, way[i]] for i in range(rows)) for way in ways)
        assert sum(cost[i, got[i]] for i in range(rows)) == pytest.approx(best)


async def test_values_speak_against_a_tag() -> None:
    rig = OpcuaRig()
    rig.values |= {"Speed": 7.0, "Condition": 55, "Condition2": 1}
    await rig.start()
    try:
        text = "tag,address\n" + "".join(
            f'{name},"nsu=urn:rig;s={name}"\n' for name in ("Speed", "Condition", "Condition2", "Speed2")
        )
        tags = tuple(parse_tags("plc", "plc.csv", text))
        source = type(rig.source)(name="plc", driver="opcua", url=rig.source.url, tags=tags)
        values = await _read([source], Path("/nowhere"))
    finally:
        await rig.stop()
    signal = '[[signal]]\nname = "speed"\n'
    task = parse_task(TASK[: TASK.index("[[signal]]")] + signal + TASK[TASK.index("[target]") :])
    found = propose(task, tags, values)
    speed, condition = found.guesses["speed"], found.guesses["condition"]
    assert speed
    assert condition
    assert (speed.tag.name, speed.reasons[-1]) == ("Speed", "now 7")
    assert condition.tag.name == "Condition2"
    reasons = {guess.tag.name: guess.reasons[-1] for ranked in found.ranked.values() for guess in ranked}
    assert reasons["Condition"] == "now 55, which the task does not expect"
    assert reasons["Speed2"] == "now bad"


def test_a_proposal_is_printed_and_nothing_is_written(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {path.name: path.read_bytes() for path in gateway.parent.iterdir()}
    assert wire(gateway, "--top", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith("[task.wear]\n")
    assert 'signals.T24 = "plc/Line4.TC.T24"  # ' in out
    assert 'target = "plc/Line4.Spindle.Condition"  # ' in out
    assert '#   or "plc/Line4.Spindle.SpeedOverride"' not in out
    assert wire(gateway, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: one["tag"] for name, one in found["proposed"].items()} == {n: f"plc/{t}" for n, t in RIGHT.items()}
    assert "plc/motor_power" in {one["tag"] for one in found["excluded"]["motor_power"]}
    assert {path.name: path.read_bytes() for path in gateway.parent.iterdir()} == files


def test_what_is_accepted_is_written_and_passes_check(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.chmod(0o640)
    assert wire(gateway, "--accept", "--offline") == 0
    assert gateway.read_text().startswith(GATEWAY + "\n[task.wear]\n")
    assert gateway.stat().st_mode & 0o777 == 0o640
    assert (gateway.parent / "gateway.toml.bak").read_text() == GATEWAY
    assert not (gateway.parent / ".gateway.toml.part").exists()
    assert main(["edge", "check", "-c", str(gateway), "--task", str(gateway.parent / "task.toml")]) == 0
    assert load_config(gateway).tasks["wear"].signals == {n: f"plc/{t}" for n, t in RIGHT.items() if n != "condition"}
    capsys.readouterr()
    assert wire(gateway, "--accept", "--offline") == 2
    assert "task.wear: is wired already; add --replace, or edit it by hand" in capsys.readouterr().err
    text = gateway.read_text().replace("[task.wear]", '[task.wear]\nactive_when = "plc/Line4.Shift == 1"')
    text = text.replace('"plc/Line4.TC.T24"', '"plc/Line4.TC.T2"') + "\n# the end\n[policy]\nmin_gateways = 2\n"
    gateway.write_text(text)
    assert wire(gateway, "--accept", "--replace", "--offline") == 0
    config = load_config(gateway)
    assert config.tasks["wear"].signals["T24"] == "plc/Line4.TC.T24"
    assert config.tasks["wear"].active_when == "plc/Line4.Shift == 1"
    assert gateway.read_text().endswith("\n# the end\n[policy]\nmin_gateways = 2\n")
    assert (gateway.parent / "gateway.toml.bak").read_text() == text


def test_a_signal_without_a_tag_is_not_accepted(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = gateway.parent / "task.toml"
    task.write_text(TASK.replace('"T24"', '"viscosity"'))
    assert wire(gateway, "--accept", "--offline") == 1
    out, err = capsys.readouterr()
    assert "# signals.viscosity = no likely tag; write one by hand" in out
    assert err == "tundish: nothing is written: no tag for viscosity; wire by hand under [task.wear]\n"
    assert gateway.read_text() == GATEWAY
    assert wire(gateway, "--source", "plc9") == 2
    assert "no source 'plc9'; write one of: plc" in capsys.readouterr().err


def test_two_tags_that_are_as_likely_are_for_a_person_to_tell_apart(
    gateway: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = gateway.parent / "plc.csv"
    csv.write_text(csv.read_text() + "Line5.Drive.Pwr,kW,motor power,x,\n")
    assert wire(gateway, "--offline", "--accept") == 1
    out, err = capsys.readouterr()
    assert out.count("; ANOTHER IS AS LIKELY") == 1
    assert 'as likely as the first is for motor_power: "plc/Line5.Drive.Pwr"; accept it on a terminal' in err
    assert gateway.read_text() == GATEWAY
    assert wire(gateway, "--top", "1") == 2
    assert "--top: 1 is out of range; write 2 or more" in capsys.readouterr().err


def test_on_a_terminal_each_signal_is_asked_for(gateway: Path) -> None:
    def talk(answers: list[str]) -> tuple[int, str]:
        child, terminal = pty.fork()
        if child == 0:
            command = [sys.executable, "-m", "edge.cli", "edge", "wire", str(gateway.parent / "task.toml")]
            os.execv(sys.executable, [*command, "-c", str(gateway), "--offline"])  # noqa: S606
        said = ""
        for answer in [*answers, ""]:
            while not said.endswith("] ") if answer else True:
                try:
                    more = os.read(terminal, 4096).decode()
                except OSError:  # the end of a terminal
                    break
                if not more:
                    break
                said += more
            if answer:
                os.write(terminal, answer.encode() + b"\n")
                said += "\n"
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said

    code, said = talk(["y"] * len(RIGHT) + ["n"])
    assert code == 0, said
    assert "nothing is written" in said
    assert gateway.read_text() == GATEWAY
    code, said = talk(["y", "n", *["y"] * (len(RIGHT) - 2)])
    assert code == 1, said
    assert "no tag for torque_pct" in said
    assert gateway.read_text() == GATEWAY
    code, said = talk(["2", *["y"] * (len(RIGHT) - 1), "y"])
    assert code == 0, said
    table = load_config(gateway).tasks["wear"]
    assert table.signals["speed_rpm"] != f"plc/{RIGHT['speed_rpm']}"
    assert table.target == f"plc/{RIGHT['condition']}"


OLD = '[task.wear]\nsignals = { a = "x" }\n'
NEW = "[task.wear]\nfresh = 1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", NEW),
        ("a = 1", "a = 1\n\n" + NEW),
        ("a = 1\r\n", "a = 1\r\n\r\n" + NEW.replace("\n", "\r\n")),
        ("\ufeff[b]\nc = 2\n", "\ufeff[b]\nc = 2\n\n" + NEW),
        (OLD, NEW),
        (f"# x\n{OLD}\n# about b\n[b]\nc = 2\n", f"# x\n{NEW}\n# about b\n[b]\nc = 2\n"),
        ('[task.wear] # mine\n[task.wear.signals]\na = "x"\n[[b]]\nc = 2\n', f"{NEW}[[b]]\nc = 2\n"),
        ('[task."wear"]\nx = 1\n[task.wearing]\nx = 1\n', f"{NEW}[task.wearing]\nx = 1\n"),
        ("[task]\nwear = { x = 1 }\n", None),
        ("[task.wear]\nx = 1\n[b]\nc = 2\n[task.wear.signals]\na = 1\n", None),
        ('[task.wear]\nx = """\n[b]\n"""\n', None),
    ],
)
def test_one_table_is_put_in_and_the_rest_is_left(text: str, expected: str | None) -> None:
    assert put_table(text, ("task", "wear"), NEW) == expected
