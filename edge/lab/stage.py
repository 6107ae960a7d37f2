"""A whole federation on one machine: the files a user would write, and the processes that a user would start."""

import csv
import getpass
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge.lab.physics import FEATURES, test_windows
from edge.lab.plc import CLOCK, DataLayout, data_layout, tags_csv
from edge.lab.processes import Process, free_port, mqtt_broker, python
from edge.lab.recorded import read_recorded
from edge.status import read_status
from models.errors import UserError

FEDERATION = "demo"
_SPINDLE_HZ = 50.0
_SPINDLE_WINDOW = 32
_TEST_WINDOWS = 400
_WIRES = {
    "speed_rpm": "drive/Drive.Speed",
    "torque_pct": "drive/Drive.Torque",
    "current_a": "drive/Drive.Current",
    "vib_rms": "plc/Spindle.VibRms",
    "crest": "plc/Spindle.Crest",
    "env_bpfo": "plc/Spindle.EnvBPFO",
    "env_bpfi": "plc/Spindle.EnvBPFI",
    "env_bsf": "plc/Spindle.EnvBSF",
    "temp_c": "plc/Spindle.BearingTemp",
}
# Rows of recorded data played a second, by how they are served; a second of wall clock is so much source time.
_PLAY_HZ = {"series": 60.0, "rows": 40.0, "waveform": 8.0}


@dataclass(frozen=True)
class Scenario:
    """What is staged: the spindles, or recorded data; how many plants; how many rounds (None: without end)."""

    gateways: int
    seed: int
    rounds: int | None
    data: Path | None = None
    broker: str = "embedded"
    min_gateways: int | None = None

    @property
    def layout(self) -> DataLayout | None:
        """Of the recorded data."""
        return data_layout(self.data) if self.data else None

    @property
    def play_hz(self) -> float:
        """Rows (or snapshots) a second of wall clock."""
        return _PLAY_HZ[self.layout.kind] if self.layout else _SPINDLE_HZ

    @property
    def speedup(self) -> float:
        """Seconds of source time in a second of wall clock: the recorded sets count a row as one second."""
        return self.play_hz if self.layout else 1.0

    @property
    def task(self) -> str:
        """The task's name."""
        return "recorded" if self.data else "bearing-condition"

    def check(self) -> None:
        """Refuse what can't be staged, before anything is started."""
        if self.gateways < 1:
            raise UserError("--gateways", 0, "", f"{self.gateways} plants", "write 1 or more")
        if self.rounds is not None and self.rounds < 1:
            raise UserError("--rounds", 0, "", f"{self.rounds} rounds", "write 1 or more")
        if self.layout and self.gateways > len(self.layout.clients):
            many = len(self.layout.clients)
            raise UserError("--gateways", 0, "", f"the file has {many} plants", f"write {many} or less")


def task_toml(scenario: Scenario) -> str:
    """Write the task as an operator would."""
    count = scenario.min_gateways or scenario.gateways
    rounds = f"rounds = {scenario.rounds}\n" if scenario.rounds else ""
    tail = f"""
[round]
strategy = "fedavg"
min_gateways = {count}
deadline = "60s"
every = "3s"
momentum = 0.5
keep = 0.05
{rounds}"""
    if scenario.data is None:
        rows = [row for text in tags_csv(None) for row in csv.DictReader(io.StringIO(text))]
        units = {row["tag"]: row["unit"] for row in rows}
        tags = {name: _WIRES[name].partition("/")[2] for name in FEATURES}
        signals = "".join(f'\n[[signal]]\nname = "{name}"\nunit = "{units[tags[name]]}"\n' for name in FEATURES)
        return f"""name = "{scenario.task}"
kind = "classification"
net = "tcn"

[window]
length = {_SPINDLE_WINDOW}
stride = 8
rate_hz = {_SPINDLE_HZ}
{signals}
[target]
name = "condition"
classes = ["healthy", "outer", "inner", "ball"]

[alarm]
classes = ["outer", "inner", "ball"]

[training]
epochs = 4
batch = 32
lr = 2e-3
tune = 2
min_windows = 40
{tail}"""
    return _recorded_task(scenario.task, scenario.data) + tail


def _recorded_task(task: str, data: Path) -> str:
    layout, y = data_layout(data), read_recorded(data)["y_train"]
    low, high = float(y.min()), float(y.max())
    # Labels that never change teach nothing: such a set is for anomaly detection.
    kind = "anomaly" if low == high else "regression" if layout.target == "Double" else "classification"
    net = "autoencoder" if kind == "anomaly" else "mlp" if layout.kind == "rows" else "tcn"
    signals = "".join(f'\n[[signal]]\nname = "{name}"\nunit = ""\n' for name in layout.names)
    target = ""
    if kind == "classification":
        target = f'\n[target]\nname = "target"\nclasses = {json.dumps([f"class-{i}" for i in range(layout.classes)])}\n'
    elif kind == "regression":
        target = f'\n[target]\nname = "target"\nrange = [{low}, {high}]\n'
    return f"""name = "{task}"
kind = "{kind}"
net = "{net}"

[window]
length = {layout.length}
rate_hz = 1.0
waveform = {"true" if layout.kind == "waveform" else "false"}
{signals}{target}
[training]
epochs = 6
batch = 32
lr = 2e-3
tune = 2
min_windows = 60
"""


def _gateway_toml(scenario: Scenario, i: int, mqtt: str, opcua: int, modbus: int) -> str:
    layout, task = scenario.layout, scenario.task
    if layout is None:
        wires = _WIRES
        target, gate, segment = "Spindle.Condition", "Spindle.Running", "Spindle.BearingSerial"
        clock = ""
    else:
        first_modbus = layout.channels - layout.modbus
        wires = {n: f"{'plc' if k < first_modbus else 'drive'}/Data.{n}" for k, n in enumerate(layout.names)}
        target, gate, segment = "Data.Target", "Data.Running", "Data.Segment"
        clock = f'clock = "{CLOCK}"\npoll_ms = 10\n'
    signals = ", ".join(f'{name} = "{ref}"' for name, ref in wires.items())
    drive = (
        f"""
[[source]]
name = "drive"
driver = "modbus"
url = "modbus+tcp://127.0.0.1:{modbus}"
tags = "drive.csv"
{clock}"""
        if layout is None or layout.modbus
        else ""
    )
    return f"""[gateway]
path = "{gateway_path(i)}"

[mqtt]
url = "{mqtt}"

[[source]]
name = "plc"
driver = "opcua"
url = "opc.tcp://127.0.0.1:{opcua}"
tags = "plc.csv"
{drive}
[task.{task}]
signals = {{ {signals} }}
target = "plc/{target}"
active_when = "plc/{gate} == 1"
{"" if layout and layout.kind == "waveform" else f'segment = "plc/{segment}"'}

[policy]
min_gateways = 1
"""


def gateway_path(i: int) -> str:
    """Topic path of plant i (from 0)."""
    return f"demo/plant{i + 1}/machining/line1/spindle"


class Stage:
    """Files and processes of one scenario under `folder`."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        scenario.check()
        self.scenario, self.folder = scenario, folder
        self.mqtt_port = free_port()
        self.broker = mqtt_broker(scenario.broker, self.mqtt_port, self._dir("broker"))
        secure = scenario.broker == "mosquitto"
        self._url = f"{'mqtts://localhost' if secure else 'mqtt://127.0.0.1'}:{self.mqtt_port}"
        federation = self._dir("aggregator")
        (federation / "task.toml").write_text(task_toml(scenario))
        (federation / "federation.toml").write_text(
            f'[federation]\nname = "{FEDERATION}"\nroots = ["demo"]\n'
            f'join = "{"enrolled" if secure else "first-seen"}"\n\n'
            f'[[task]]\nfile = "task.toml"\n\n[mqtt]\nurl = "{self._url}"\n'
        )
        self.aggregator = Process("aggregator", self._broker("run"), federation / "aggregator.log")
        self.plcs: list[Process] = []
        self.gateways: list[Process] = []
        for i in range(scenario.gateways):
            self._plant(i)

    def _broker(self, verb: str, *options: object) -> list[str]:
        """One of the operator's commands."""
        config = self.folder / "aggregator" / "federation.toml"
        return python("edge.cli", "broker", verb, "-c", config, "--state", self.aggregator_state, *options)

    def _edge(self, i: int, verb: str, *options: object) -> list[str]:
        """One of the commands at gateway i."""
        config = self.folder / f"plant{i + 1}" / "gateway.toml"
        return python("edge.cli", "edge", verb, "-c", config, "--state", self.gateway_state(i), *options)

    def enrol(self) -> None:
        """Make the authority, enrol every gateway by two files, and write what Mosquitto reads: for TLS on both sides.

        With the embedded broker, which has no TLS, there is nothing to do.
        """
        if self.scenario.broker != "mosquitto":
            return
        self._step(self._broker("init", "--host", "localhost"))
        pki = self.aggregator_state.absolute() / "pki"  # a path in federation.toml is relative to that file
        with (self.folder / "aggregator" / "federation.toml").open("a") as file:
            for key, name in (("ca", "ca.pem"), ("cert", "aggregator.pem"), ("key", "aggregator.key")):
                file.write(f'{key} = "{pki / name}"\n')
        for i in range(self.scenario.gateways):
            request, answer = (self.folder / f"plant{i + 1}" / f"gateway.{end}" for end in ("request", "admission"))
            self._step(self._edge(i, "export", "--request", request))
            self._step(self._broker("enrol", "--path", gateway_path(i), "--request", request, "--out", answer))
            self._step(self._edge(i, "import", answer))
        self.acl()

    def acl(self) -> None:
        """Write what Mosquitto reads, as the roster is now."""
        folder = self._dir("broker")
        self._step(self._broker("acl", "--out", folder, "--port", self.mqtt_port))
        with (folder / "mosquitto.conf").open("a") as file:
            # Files of this user, and a broker that comes back empty: the harder case for those who talk to it.
            file.write(f"user {getpass.getuser()}\npersistence false\n")

    def _step(self, command: list[str]) -> None:
        """Run one of these commands to its end."""
        Process("enrolment", command, self.folder / "enrolment.log").complete()

    def _dir(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _plant(self, i: int) -> None:
        scenario, folder = self.scenario, self._dir(f"plant{i + 1}")
        opcua, modbus = free_port(), free_port()
        what = ["--plant", i]
        if scenario.data:
            what = ["--data", scenario.data.resolve(), "--client", i]
        ports = ["--opcua-port", opcua, "--modbus-port", modbus]
        command = python("edge.lab.plc", *what, *ports, "--seed", scenario.seed, "--rate", scenario.play_hz)
        self.plcs.append(Process(f"plc {i + 1}", command, folder / "plc.log"))
        plc, drive = tags_csv(scenario.layout)
        (folder / "plc.csv").write_text(plc)
        (folder / "drive.csv").write_text(drive)
        (folder / "gateway.toml").write_text(_gateway_toml(scenario, i, self._url, opcua, modbus))
        self.gateways.append(Process(f"gateway {i + 1}", self._edge(i, "run"), folder / "gateway.log"))

    @property
    def aggregator_state(self) -> Path:
        """State folder of the aggregator."""
        return self.folder / "aggregator" / "state"

    def gateway_state(self, i: int) -> Path:
        """State folder of gateway i."""
        return self.folder / f"plant{i + 1}" / "state"

    @property
    def processes(self) -> list[Process]:
        """All of them, in the order to stop them."""
        return [*self.gateways, self.aggregator, *self.plcs, self.broker]

    def status(self, i: int) -> dict[str, object]:
        """What gateway i last said of itself; empty before it has."""
        return read_status(self.gateway_state(i)) or {}

    def task_status(self, i: int) -> dict[str, object]:
        """What gateway i last said of the task."""
        tasks = self.status(i).get("tasks", {})
        found = tasks.get(self.scenario.task, {}) if isinstance(tasks, dict) else {}
        return found if isinstance(found, dict) else {}

    def stop(self) -> None:
        """Stop everything that runs."""
        for process in self.processes:
            process.stop()


def test_set(scenario: Scenario, folder: Path, i: int) -> Path:
    """Write plant i's held-out test (npz: x, y) and return where."""
    path = folder / f"plant{i + 1}" / "test.npz"
    if scenario.data is None:
        x, y = test_windows(scenario.seed + 1, i, _SPINDLE_HZ, _TEST_WINDOWS, _SPINDLE_WINDOW)
    else:
        layout = data_layout(scenario.data)
        found = read_recorded(scenario.data)
        mine = found["client_test"] == i
        x, y = found["x_test"][mine].reshape(-1, layout.channels, layout.length), found["y_test"][mine]
    np.savez(path, x=x.astype(np.float32), y=y)
    return path
