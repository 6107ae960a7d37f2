"""Every mistake in gateway.toml and its tags files is told in one line: file, line, key and what to write instead."""

import json
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest

from edge.cli import main
from edge.config import Config, TaskTable, load_config, profile_path, state_folder
from edge.tags import Health
from edge.window import Condition
from edge.wiring import unit_notes, wire, wiring_notes
from models.errors import UserError
from models.spec import Task, parse_task

GATEWAY = """\
[gateway]
path = "acme/lyon/press/line4/cell2"
publish_raw = ["plc1/RUL"]

[mqtt]
url = "mqtt://127.0.0.1:1883"

[[source]]
name = "plc1"
driver = "opcua"
url = "opc.tcp://10.0.0.10:4840"
tags = "plc1.csv"

[[source]]
name = "drive"
driver = "modbus"
url = "modbus+tcp://10.0.0.11:502"
device_id = 1
tags = "drive.csv"

[task.spindle-wear]
signals = { T24 = "plc1/Spindle.Temp", vib = "drive/rms" }
target = "plc1/RUL"
active_when = "plc1/Running == 1 and drive/rms < 90.5"
segment = "plc1/PartId"

[policy]
min_gateways = 3

[store]
max_bytes = "2GiB"
"""
PLC1 = """\
tag,address,type,unit,scale,offset,deadband,sampling_ms,description
Spindle.Temp,nsu=urn:plant;s=Spindle.Temp,,degC,0.1,-40,0.5,100,"at the bearing, front"
RUL,ns=2;s=RUL,,,,,,,
Running,ns=2;s=Running,,,,,,,

PartId,ns=2;s=PartId,,,,,,,
Wave,ns=2;s=Wave,float32[16],g,,,,,
"""
DRIVE = "tag,address,type,unit\nrms,holding:0,float32:CDAB,mm/s\n"
TASK = """\
name = "spindle-wear"
kind = "regression"
net = "tcn"
[window]
length = 30
[[signal]]
name = "T24"
unit = "degC"
[[signal]]
name = "vib"
unit = "mm/s"
[target]
name = "rul"
"""


@pytest.fixture
def gateway(tmp_path: Path) -> Path:
    (tmp_path / "plc1.csv").write_text(PLC1)
    (tmp_path / "drive.csv").write_text(DRIVE)
    (tmp_path / "gateway.toml").write_text(GATEWAY)
    return tmp_path / "gateway.toml"


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def refused(gateway: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(gateway)
    assert "\n" not in str(caught.value)
    return caught.value


def told(error: UserError, file: Path | str, line: int, key: str, problem: str, remedy: str) -> None:
    assert (error.place, error.line, error.key) == (str(file), line, key)
    assert problem in error.problem
    assert remedy in error.remedy
    where = f"{file}:{line}: " if line else f"{file}: "
    assert str(error).startswith(f"{where}{key}: " if key else where)


def test_a_good_one(gateway: Path) -> None:
    config = load_config(gateway)
    assert str(config.path) == "acme/lyon/press/line4/cell2"
    assert config.publish_raw == {"plc1/RUL": "RUL"}
    assert [s.name for s in config.sources] == ["plc1", "drive"]
    assert config.sources[1].options == {"device_id": 1}
    assert config.store_bytes == 2 << 30
    assert config.training_memory == 1536 << 20
    assert config.policy.min_gateways == 3
    temp = config.tags["plc1/Spindle.Temp"]
    assert (temp.unit, temp.scale, temp.offset, temp.deadband, temp.sampling_ms) == ("degC", 0.1, -40, 0.5, 100)
    assert (temp.file, temp.line, temp.description) == (str(gateway.parent / "plc1.csv"), 2, "at the bearing, front")
    assert (config.tags["plc1/PartId"].line, config.tags["plc1/RUL"].scale) == (6, 1.0)
    assert config.tags["plc1/Wave"].width == 16
    made = wire(parse_task(TASK), config.tasks["spindle-wear"], config.tags, config.file)
    assert made.signals == ("plc1/Spindle.Temp", "drive/rms")
    assert (made.target, made.segment) == ("plc1/RUL", "plc1/PartId")
    assert made.gate == (Condition("plc1/Running", "==", 1), Condition("drive/rms", "<", 90.5))


# What is written, in place of what; then line, key, a word of the problem and of the remedy.
MISTAKES: dict[str, tuple[str, str, int, str, str, str]] = {
    "unknown key": (
        "[policy]\nmin_gateways",
        "[policy]\nmin_gateway",
        28,
        "policy.min_gateway",
        "unknown key",
        "did you mean 'min_gateways'?",
    ),
    "unknown table": ("[store]", "[stores]", 30, "stores", "unknown key", "did you mean 'store'?"),
    "unknown key of a source": (
        "device_id",
        "deviceid",
        18,
        "source[1].deviceid",
        "unknown key",
        "did you mean 'device_id'?",
    ),
    "another driver's key": ("device_id = 1", "zzz = 1", 18, "source[1].zzz", "unknown key", "known keys: "),
    "unknown driver": (
        '"modbus"',
        '"profinet"',
        16,
        "source[1].driver",
        "no driver 'profinet'",
        "write one of: images, modbus, mqtt, opcua, replay",
    ),
    "wrong type": (
        "min_gateways = 3",
        'min_gateways = "three"',
        28,
        "policy.min_gateways",
        "is text in quotes",
        "write a whole number",
    ),
    "wrong type of an option": (
        "device_id = 1",
        'device_id = "1"',
        18,
        "source[1].device_id",
        "not of type int",
        "write one that is",
    ),
    "missing key": ('path = "acme/lyon/press/line4/cell2"\n', "", 1, "gateway.path", "missing", "add a line path = "),
    "a wrong key of a source": ('name = "drive"\n', 'nmae = "drive"\n', 15, "source[1].nmae", "unknown key", "'name'"),
    "a table of a name that is none": (
        "[task.spindle-wear]",
        "[tasks.spindle-wear]",
        21,
        "tasks",
        "unknown key",
        "did you mean 'task'?",
    ),
    "missing key of a source": ('name = "drive"\n', "", 14, "source[1].name", "missing", 'write name = "…"'),
    "missing table": ('[mqtt]\nurl = "mqtt://127.0.0.1:1883"\n', "", 1, "mqtt", "missing", "add a table [mqtt]"),
    "missing tags file": (
        '"drive.csv"',
        '"drives.csv"',
        19,
        "source[1].tags",
        "can't be read: No such file",
        "check the path",
    ),
    "no TOML": ("[policy]", "[policy", 27, "", "not TOML", "mend the syntax"),
    "a tag that does not exist": (
        '"drive/rms" }',
        '"drive/rmss" }',
        22,
        "task.spindle-wear.signals.vib",
        "no tag 'drive/rmss'",
        "did you mean 'drive/rms'?",
    ),
    "a target that does not exist": (
        'target = "plc1/RUL"',
        'target = "xyz"',
        23,
        "task.spindle-wear.target",
        "no tag 'xyz'",
        'write "source/tag"',
    ),
    "a segment that does not exist": (
        '"plc1/PartId"',
        '"plc1/PartID"',
        25,
        "task.spindle-wear.segment",
        "no tag 'plc1/PartID'",
        "did you mean 'plc1/PartId'?",
    ),
    "a gate that is none": (
        "Running == 1 and",
        "Running = 1 and",
        24,
        "task.spindle-wear.active_when",
        "is no comparison",
        "plc1/Running == 1",
    ),
    "a gate on no tag": (
        "drive/rms < 90.5",
        "drive/rpm < 90.5",
        24,
        "task.spindle-wear.active_when",
        "no tag 'drive/rpm'",
        "did you mean 'drive/rms'?",
    ),
    "a raw topic that can't be": (
        '["plc1/RUL"]',
        '["plc1/RUL", "plc1/Spindle.Temp"]',
        3,
        "gateway.publish_raw[1]",
        "is no topic level",
        "rename the tag in",
    ),
    "a raw topic of no tag": (
        '["plc1/RUL"]',
        '["plc1/nope"]',
        3,
        "gateway.publish_raw[0]",
        "no tag 'plc1/nope'",
        'write "source/tag"',
    ),
    "a short path": ("line4/cell2", "cell2", 2, "gateway.path", "has 4 levels", "acme/lyon/press/line4/cell2"),
    "a path with a space": ("lyon", "ly on", 2, "gateway.path", "is no topic level", "acme/lyon/press/line4/cell2"),
    "no TLS to afar": (
        "127.0.0.1:1883",
        "10.0.0.1:1883",
        6,
        "mqtt.url",
        "without TLS to another machine",
        "insecure = true",
    ),
    "no MQTT url": ("mqtt://127", "http://127", 6, "mqtt.url", "is no mqtt:// or mqtts:// url", "mqtts://"),
    "a source twice": (
        'name = "drive"',
        'name = "plc1"',
        15,
        "source[1].name",
        "'plc1' is used twice",
        "give each source its own name",
    ),
    "a source with a slash": (
        'name = "drive"',
        'name = "dr/ive"',
        15,
        "source[1].name",
        "is no topic level",
        "use A-Z a-z 0-9",
    ),
    "a source's url": (
        "modbus+tcp://",
        "http://",
        17,
        "source[1].url",
        "is not a modbus+tcp URL",
        "write modbus+tcp://",
    ),
    "a duration": (
        'segment = "plc1/PartId"',
        'max_lag = "2 fortnights"',
        25,
        "task.spindle-wear.max_lag",
        "is not a duration",
        'write "2s"',
    ),
    "a width": (
        'segment = "plc1/PartId"',
        "width = 0.6",
        25,
        "task.spindle-wear.width",
        "0.6 is no width",
        "write 0.25, 0.5, 0.75 or 1",
    ),
    "a size": ('"2GiB"', '"2 gigs"', 31, "store.max_bytes", "'2 gigs' is not a size", '"512MiB" or "2GiB"'),
    "a choice": (
        "min_gateways = 3",
        'secure_aggregation = "maybe"',
        28,
        "policy.secure_aggregation",
        "maybe",
        'write one of: "allowed", "required"',
    ),
    "unknown key of a task": (
        'segment = "plc1/PartId"',
        'segmant = "plc1/PartId"',
        25,
        "task.spindle-wear.segmant",
        "unknown key",
        "did you mean 'segment'?",
    ),
    "wrong type in the second task": (
        "[policy]",
        '[task.other]\nsignals = { a = "drive/rms", b = 2 }\n[policy]',
        28,
        "task.other.signals.b",
        "is a whole number",
        "write text in quotes",
    ),
    "training when": (
        "[policy]",
        '[training]\ntrain_when = "Samstag or plc1/Running == 0"\n[policy]',
        28,
        "training.train_when",
        "'Samstag' is neither hours nor a comparison",
        'write "Sat 06:00-14:00 or plc1/Running == 0"',
    ),
    "training when no tag says so": (
        "[policy]",
        '[training]\ntrain_when = "Sat and plc1/Runing == 0"\n[policy]',
        28,
        "training.train_when",
        "no tag 'plc1/Runing'",
        "did you mean 'plc1/Running'?",
    ),
    "training when a waveform": (
        "[policy]",
        '[training]\ntrain_when = "plc1/Wave < 1"\n[policy]',
        28,
        "training.train_when",
        "plc1/Wave is no number",
        "compare with a tag that is one",
    ),
    "a key that is none": (
        "[policy]",
        '[federation]\nkey = "AB"\n[policy]',
        28,
        "federation.key",
        "is not what belongs here",
        "write the 64 digits of the public key that tundish broker status prints, in lower case",
    ),
    "a charter in capitals": (
        "[policy]",
        f'[policy]\ncharter = "{"AB" * 32}"',
        28,
        "policy.charter",
        "is not what belongs here",
        "write the 64 digits that sha256sum charter.toml prints, in lower case",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_gateway_toml(gateway: Path, mistake: str) -> None:
    old, new, *expected = MISTAKES[mistake]
    change(gateway, old, new)
    told(refused(gateway), gateway, *expected)  # type: ignore[arg-type]


def test_two_tags_on_one_raw_topic(gateway: Path) -> None:
    change(gateway.parent / "drive.csv", "rms,", "RUL,holding:8,uint16,\nrms,")
    change(gateway, '["plc1/RUL"]', '["plc1/RUL", "drive/RUL"]')
    error = refused(gateway)
    told(error, gateway, 3, "gateway.publish_raw[1]", "drive/RUL and plc1/RUL share the topic _raw/RUL", "rename one")


CSV_MISTAKES: dict[str, tuple[str, str, int, str, str, str]] = {
    "range upside down": (",scale,offset,", ",low,high,", 2, "low", "0.1 is above high, -40", "swap them"),
    "no header": (
        PLC1.partition("\n")[0],
        "rms,holding:0,float32",
        1,
        "",
        "names no column",
        "write a first line: tag",
    ),
    "a decimal comma": (",0.1,-40,", ",0,1,-40,", 2, "", "cells, the first line names 9", "write 0.1, not 0,1"),
    "scale 0": (",0.1,-40,", ",0,-40,", 2, "scale", "0 makes every value the same", "write 1"),
    "unknown column": (",sampling_ms,", ",sampling,", 1, "sampling", "unknown column", "columns are: tag, address"),
    "missing column": ("tag,address", "tag,type", 1, "address", "missing column", "the first line is tag,address,type"),
    "a tag twice": ("\nPartId,", "\nRUL,", 6, "tag", "'RUL' stands on line 3 too", "give each tag its own name"),
    "a bad number": ("0.1,-40", "0.1,minus", 2, "offset", "'minus' is no number", "write one, such as 0.1"),
    "a decimal comma between commas": (
        "0.1,-40",
        '"0,1",-40',
        2,
        "scale",
        "'0,1' is no number",
        "write one, such as 0.1",
    ),
    "no address": ("RUL,ns=2;s=RUL", "RUL,", 3, "address", "empty", "write the address, or remove the line"),
    "no name": ("RUL,ns=2;s=RUL", ",ns=2;s=RUL", 3, "tag", "empty", "write the tag, or remove the line"),
    "a name with a space": ("\nRunning,", "\nRun ning,", 4, "tag", "holds a space or a slash", "use letters, digits"),
    "an address that is none": ("ns=2;s=PartId", "DB1.DBW4", 6, "address", "is not an OPC UA node", "write nsu="),
}


@pytest.mark.parametrize("mistake", CSV_MISTAKES)
def test_a_mistake_in_a_tags_file(gateway: Path, mistake: str) -> None:
    old, new, *expected = CSV_MISTAKES[mistake]
    file = gateway.parent / "plc1.csv"
    if mistake == "missing column":
        old, new = file.read_text().partition("\n")[0], "tag,type,unit"
    change(file, old, new)
    told(refused(gateway), file, *expected)  # type: ignore[arg-type]


def test_a_file_that_excel_saved(gateway: Path) -> None:
    """Semicolons, decimal commas, a byte order mark, CRLF, and empty lines at the end."""
    rows = [
        "tag;address;type;unit;scale;offset",
        "Spindle.Temp;nsu=urn:plant|s=Spindle.Temp;;degC;0,1;-40,5",
        *(f"{name};ns=2|s={name};;;;" for name in ("RUL", "Running", "PartId")),
        ";;;;;", "",
    ]  # fmt: skip
    text = "\r\n".join(rows)
    for name in ("nsu=urn:plant|s=Spindle.Temp", *(f"ns=2|s={n}" for n in ("RUL", "Running", "PartId"))):
        text = text.replace(name, '"' + name.replace("|", ";") + '"')
    (gateway.parent / "plc1.csv").write_text(text, encoding="utf-8-sig", newline="")
    tags = load_config(gateway).tags
    temp = tags["plc1/Spindle.Temp"]
    assert (temp.scale, temp.offset, temp.unit, temp.address) == (0.1, -40.5, "degC", "nsu=urn:plant;s=Spindle.Temp")
    assert [t.line for t in tags.values()] == [2, 3, 4, 5, 2]


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        ("tag;address", "put a cell with a semicolon in quotes"),
        ("tag;address;type;unit", "or ns=2;i=1001, in quotes where semicolons part the cells"),
    ],
)
def test_a_node_without_quotes_between_semicolons(gateway: Path, columns: str, remedy: str) -> None:
    file = gateway.parent / "plc1.csv"
    file.write_text(f"{columns}\nSpindle.Temp;nsu=urn:plant;s=Spindle.Temp\n")
    error = refused(gateway)
    assert (error.place, error.line) == (str(file), 2)
    assert remedy in str(error)


def test_files_that_are_no_text(gateway: Path) -> None:
    (gateway.parent / "plc1.csv").write_bytes(PLC1.encode("utf-16"))
    told(refused(gateway), gateway.parent / "plc1.csv", 0, "", "not UTF-8 text", 'save it as "CSV UTF-8"')
    gateway.write_bytes(b"\xff\xfe")
    told(refused(gateway), gateway, 0, "", "not UTF-8 text", "check the path")
    gateway.unlink()
    told(refused(gateway), gateway, 0, "", "can't be read: No such file", "check the path")


# -- wiring a published task -------------------------------------------------------------------------------------------


def wired(config: Config, text: str, **more: str) -> UserError:
    table = TaskTable(signals=more) if more else config.tasks["spindle-wear"]
    with pytest.raises(UserError) as caught:
        wire(parse_task(text), table, config.tags, config.file)
    return caught.value


def test_units_that_differ_are_converted_and_those_not_named_are_taken_as_they_are(gateway: Path) -> None:
    config = load_config(gateway)
    table = config.tasks["spindle-wear"]
    made = wire(parse_task(TASK), table, config.tags, config.file)
    assert (made.gains, made.offsets) == ((), ())
    made = wire(parse_task(TASK.replace('"degC"', '"degF"')), table, config.tags, config.file)
    assert made.gains == pytest.approx((1.8, 1, 1))
    assert made.offsets == pytest.approx((32, 0, 0))
    notes = unit_notes(parse_task(TASK.replace('"degC"', '"degF"')), made, config.tags)
    assert notes == ["plc1/Spindle.Temp: degC to degF, x 1.8 +32"]
    unnamed = {ref: msgspec.structs.replace(tag, unit="") for ref, tag in config.tags.items()}
    bar = parse_task(TASK.replace('"degC"', '"bar"'))
    made = wire(bar, table, unnamed, config.file)
    assert made.gains == ()
    assert "no unit in" in unit_notes(bar, made, unnamed)[0]


def test_a_task_that_does_not_fit_the_wiring(gateway: Path) -> None:
    config, plc1 = load_config(gateway), gateway.parent / "plc1.csv"
    error = wired(config, TASK.replace('"degC"', '"bar"'))
    told(error, plc1, 2, "unit", "can't be T24: 'degC' (temperature) is no 'bar'", "wire another tag")
    error = wired(config, TASK.replace('"vib"', '"rpm"'))
    told(
        error, gateway, 0, "task.spindle-wear.signals", "signal 'rpm' is not wired", 'add rpm = "source/tag" (in mm/s)'
    )
    error = wired(config, TASK.replace('"vib"', '"vibr"'))
    told(
        error, gateway, 0, "task.spindle-wear.signals", "'vibr' is not wired", "'vib' is wired, which the task does not"
    )
    error = wired(config, TASK.replace('"degC"', '"Celsius"'))
    told(error, "task spindle-wear", 0, "T24", "unit 'Celsius' is none that is known", "the operator mends it")
    error = wired(config, TASK.replace("length = 30", "length = 16\nwaveform = true"))
    told(
        error,
        plc1,
        2,
        "type",
        "is a scalar, and spindle-wear wants float32[16]",
        "write type float32[16], or another tag",
    )
    one = TASK[: TASK.index("[[signal]]")] + '[[signal]]\nname = "w"\nunit = "g"\n[target]\nname = "rul"\n'
    error = wired(config, one, w="plc1/Wave")
    told(error, plc1, 7, "type", "is float32[16], and spindle-wear wants a scalar", "wire a tag of one number")
    error = wired(config, one.replace("length = 30", "length = 17\nwaveform = true"), w="plc1/Wave")
    told(error, plc1, 7, "type", "is float32[16], and spindle-wear wants float32[17]", "write type float32[17]")
    fits: Task = parse_task(one.replace("length = 30", "length = 16\nwaveform = true"))
    assert wire(fits, TaskTable(signals={"w": "plc1/Wave"}), config.tags, "x").signals == ("plc1/Wave",)


def test_a_gate_is_of_numbers_and_a_segment_of_single_values(gateway: Path) -> None:
    plc1 = gateway.parent / "plc1.csv"
    change(gateway, "plc1/Running == 1", "plc1/Wave == 1")
    told(refused(gateway), plc1, 7, "type", "plc1/Wave is a waveform, which the gate active_when", "one number")
    change(gateway, "plc1/Wave == 1", "plc1/Running == 1")
    change(gateway, 'segment = "plc1/PartId"', 'segment = "plc1/Wave"')
    told(refused(gateway), plc1, 7, "type", "plc1/Wave is a waveform, which segment can't be", "one number")
    change(gateway, 'segment = "plc1/Wave"', 'segment = "plc1/PartId"')
    change(plc1, "PartId,,", "PartId,string,")
    load_config(gateway)  # its checksum tells parts apart
    change(plc1, "Running,,", "Running,string,")
    told(refused(gateway), plc1, 4, "type", "plc1/Running is a text, the gate active_when a number", "as segment")


def test_an_anomaly_task_ignores_a_target(gateway: Path) -> None:
    config = load_config(gateway)
    text = TASK.replace("regression", "anomaly").replace("tcn", "autoencoder").partition("[target]")[0]
    assert wire(parse_task(text), config.tasks["spindle-wear"], config.tags, "x").target is None


# -- profiles and folders ----------------------------------------------------------------------------------------------


def test_a_profile_fills_in_what_the_file_leaves_open(gateway: Path) -> None:
    board = gateway.parent / "board.toml"
    board.write_text(
        profile_path("generic-arm64").read_text().replace("threads = 1", "threads = 3").replace('"1GiB"', '"640MiB"')
    )
    config = load_config(gateway, board)
    assert (config.training.threads, config.training_memory, config.store_bytes) == (3, 640 << 20, 2 << 30)
    with pytest.raises(UserError) as caught:
        profile_path("../../etc/passwd")
    told(caught.value, "--profile", 0, "", "no board '../../etc/passwd'", "write one of: ")


def test_where_state_is_kept(gateway: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(gateway)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert state_folder(config, None).name == "acme-lyon-press-line4-cell2"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/tundish:/elsewhere")
    assert state_folder(config, None) == Path("/var/lib/tundish")
    assert state_folder(config, gateway.parent) == gateway.parent


def test_what_a_wiring_allows_and_seldom_means(gateway: Path) -> None:
    config = load_config(gateway)
    table = config.tasks["spindle-wear"]
    assert wiring_notes(parse_task(TASK), table, config.tags, config.sources) == []
    odd = msgspec.structs.replace(
        table, signals={**table.signals, "foo": "plc1/RUL"}, target=None, segment="plc1/Spindle.Temp"
    )
    fast = msgspec.structs.replace(config.sources[0], options={"speed": 60.0})
    told = wiring_notes(parse_task(f'{TASK}classes = ["a", "b"]\n'), odd, config.tags, [fast])
    assert [note.partition(": ")[2][:24] for note in told] == [
        "wired, and none of its s", "no target is wired, so t", "its target has classes, ", "segment plc1/Spindle.Tem",
        "its times pass 60 times ",
    ]  # fmt: skip
    recorded = msgspec.structs.replace(fast, options={"speed": 60.0, "times": "recorded"})
    assert wiring_notes(parse_task(TASK), table, config.tags, [recorded]) == []


# -- the command -------------------------------------------------------------------------------------------------------


def test_check_says_ok(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = gateway.parent / "task.toml"
    task.write_text(TASK)
    assert main(["edge", "check", "-c", str(gateway), "--task", str(task)]) == 0
    out, err = capsys.readouterr()
    assert out == f"{gateway}: ok (2 sources, 6 tags, tasks: spindle-wear)\n"
    assert err == ""
    assert main(["edge", "check", "-c", str(gateway)]) == 0
    said = capsys.readouterr().out
    assert "task spindle-wear: not checked whether there is one of that name, nor its signals; add --task FILE" in said
    change(gateway.parent / "drive.csv", "mm/s", "mm/sec/sec.")
    assert main(["edge", "check", "-c", str(gateway)]) == 0
    assert f"{gateway.parent / 'drive.csv'}:2: unit: 'mm/sec/sec.' of drive/rms is none" in capsys.readouterr().out
    assert main(["edge", "check", "-c", str(gateway), "--json"]) == 0
    assert capsys.readouterr().out.startswith('{"file": ')


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        ("gateway.toml", "min_gateways", "min_gatewais", "gateway.toml:28: policy.min_gatewais: unknown key; "),
        ("plc1.csv", ",degC,", ",bar,", "plc1.csv:2: unit: plc1/Spindle.Temp can't be T24: 'bar'"),
        ("task.toml", "tcn", "lstm", "task.toml:3: net: no net 'lstm'; write one of: "),
        ("task.toml", "spindle-wear", "other", "gateway.toml: task.other: is not wired; add [task.other]"),
    ],
)  # fmt: skip
def test_check_says_what_is_wrong_in_one_line(
    gateway: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, line: str
) -> None:
    task = gateway.parent / "task.toml"
    task.write_text(TASK)
    change(gateway.parent / file, old, new)
    assert main(["edge", "check", "-c", str(gateway), "--task", str(task)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"tundish: {gateway.parent}/{line}")


def test_check_says_where_a_part_of_a_net_can_not_take_part(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = gateway.parent / "task.toml"
    task.write_text(TASK)
    change(gateway, 'segment = "plc1/PartId"', "width = 0.5")
    assert load_config(gateway).tasks["spindle-wear"].width == 0.5
    assert main(["edge", "check", "-c", str(gateway), "--task", str(task)]) == 0
    task.write_text(f'{TASK}\n[round]\ncodec = "ring"\n')
    assert main(["edge", "check", "-c", str(gateway), "--task", str(task)]) == 2
    why = "task.spindle-wear.width: a ring adds updates of one size, so width 0.5 can't take part; leave it out"
    assert why in capsys.readouterr().err


def test_a_deadband_is_absolute_or_percent_of_the_range(gateway: Path) -> None:
    change(gateway.parent / "plc1.csv", ",0.5,", ",2 %,")
    (tag,) = (tag for tag in load_config(gateway).tags.values() if tag.deadband_percent)
    assert (tag.deadband, tag.deadband_percent) == (0.0, 2.0)


def test_status_shows_what_was_lost_and_a_clock_that_is_off(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    health = asdict(Health(connected=True, overflows=3, gaps=2, clock_skew_s=-2.5, notes={"queue": "queues 5 only"}))
    status = {
        "path": "a/b/c/d/e", "time_ms": 0, "running": True, "resident_mb": 1, "outbox": 0, "problem": "", "tasks": {},
        "mqtt": {"connected": True, "version": "5", "error": ""}, "sources": {"plc1": health}, "refused": {},
        "store_error": "", "store_notice": "samples.db was damaged", "samples_dropped": 0,
    }  # fmt: skip
    (gateway.parent / "status.json").write_text(json.dumps(status))
    main(["edge", "status", "--state", str(gateway.parent)])
    said = capsys.readouterr().out
    assert "ENROL" not in said
    for words in (
        "queue ran over 3 times",
        "LOST: 2 times",
        "CLOCK: the source's is 2.5 s behind",
        "queues 5 only",
        "STORE    samples.db was",
    ):
        assert words in said


def test_status_wants_a_file_or_a_folder(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert main(["edge", "status"]) == 2
    assert capsys.readouterr().err == "tundish: --config: missing; write -c gateway.toml, or --state DIR\n"


def test_no_gateway_is_running(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["edge", "status", "-c", str(gateway), "--state", str(gateway.parent / "state")]) == 1
    assert capsys.readouterr().err.startswith("tundish: no gateway has run with its state in ")
