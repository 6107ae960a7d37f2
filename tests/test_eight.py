"""Eight gateways of eight sites, Mosquitto with TLS on both sides: from enrolment to audit, by the commands."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from broker.status import STATUS_FILE
from edge.cli import main
from edge.lab.processes import listens
from edge.lab.stage import Scenario, Stage, gateway_path
from tests.brokers import need_mosquitto

COUNT, WAIT_S, HZ = 8, 240.0, 10
CANARY, REVOKED = 0, 7


def _edit(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file.write_text(text)


class Federation:
    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.stage = Stage(Scenario(gateways=COUNT, seed=0, rounds=2, broker="mosquitto"), folder)
        self.folder, self._capsys = folder, capsys
        _edit(
            folder / "aggregator" / "task.toml",
            ("epochs = 4", "epochs = 1\nalone = false"),
            ("min_windows = 40", "min_windows = 10"),
            ('deadline = "60s"', 'deadline = "240s"'),
            ("rate_hz = 50.0", f"rate_hz = {HZ}"),
        )
        # Eight plants on one machine: a slower spindle leaves the trainings, which stand back, some time.
        for i, plc in enumerate(self.stage.plcs):
            plc.command[plc.command.index("--rate") + 1] = str(HZ)
            _edit(folder / f"plant{i + 1}" / "plc.csv", (",10,", ",100,"))
            _edit(folder / f"plant{i + 1}" / "drive.csv", (",20,", ",100,"))

    def broker(self, verb: str, *options: object) -> str:
        config = self.folder / "aggregator" / "federation.toml"
        command = ["broker", verb, "-c", str(config), "--state", str(self.stage.aggregator_state), *map(str, options)]
        assert main(command) == 0
        return self._capsys.readouterr().out

    def audit(self, state: Path) -> str:
        assert main(["audit", "verify", str(state)]) == 0
        return self._capsys.readouterr().out

    def tasks(self, key: str, *, of: range = range(COUNT)) -> list[Any]:
        return [self.stage.task_status(i).get(key) for i in of]

    def connected(self) -> list[bool]:
        found: list[dict[str, Any]] = [self.stage.status(i)["mqtt"] for i in range(COUNT)]  # type: ignore[misc]
        return [one["connected"] for one in found]

    def aggregator(self) -> dict[str, Any]:
        return json.loads(self.broker("status", "--json"))  # type: ignore[no-any-return]

    def over(self) -> int:
        """The newest version, once the rounds are over and the vote on it too (who loses one has another); else 0."""
        task = self.aggregator()["tasks"].get(self.stage.scenario.task, {})
        return task["version"] if task.get("state") == "done" and task["vote"] is None else 0

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            for process in self.stage.processes:
                process.check()
            assert time.monotonic() < deadline, [self.stage.status(i) for i in range(COUNT)]
            time.sleep(0.2)


def test_eight_gateways_from_enrolment_to_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_mosquitto()
    f = Federation(tmp_path, capsys)
    stage, key = f.stage, tmp_path / "release.key"
    try:
        stage.enrol()
        public = f.broker("release", "--new-key", key).split('"')[1]
        with (tmp_path / "aggregator" / "federation.toml").open("a") as file:
            file.write(f'[release]\nkeys = ["{public}"]\ncanary = ["{gateway_path(CANARY)}"]\n')
        stage.broker.start()
        f.until(lambda: listens(stage.mqtt_port))
        for process in (*stage.plcs, stage.aggregator, *stage.gateways):
            process.start()
        f.until((stage.aggregator_state / STATUS_FILE).exists)

        # Join, and two rounds of everybody.
        f.until(lambda: f.over() and f.tasks("model") == [f.over()] * COUNT)
        assert f.tasks("release") == [0] * COUNT
        last = f.over()
        assert f.aggregator()["outcomes"]["counted"] == 2 * COUNT

        # One canary has it, then all; then all go back.
        assert "release 1 of" in f.broker("release", "--version", 1, "--to", "stable", "--key", key)
        f.until(lambda: f.tasks("release") == [1] * COUNT)
        f.broker("release", "--version", last, "--to", "canary")
        f.until(lambda: f.tasks("release")[CANARY] == 2)
        assert f.tasks("release")[1:] == [1] * (COUNT - 1)
        f.broker("release", "--to", "stable", "--key", key)
        f.until(lambda: f.tasks("release") == [3] * COUNT)
        f.broker("rollback", "--to", 1, "--key", key)
        f.until(lambda: f.tasks("release") == [4] * COUNT)
        assert f.tasks("model") == [last] * COUNT
        assert f.tasks("scoring_model") == [1] * COUNT

        # One is revoked: the broker hears of it, and its connection is ended; it scores on.
        f.broker("enrol", "--path", gateway_path(REVOKED), "--revoke")
        stage.acl()
        os.kill(stage.broker.pid, signal.SIGHUP)
        f.broker("enrol", "--path", gateway_path(REVOKED), "--revoke", "--end-connection")
        f.until(lambda: f.connected() == [True] * REVOKED + [False])
        scored = f.tasks("scored")
        f.until(lambda: all(after > before for before, after in zip(scored, f.tasks("scored"), strict=True)))
        assert f.connected() == [True] * REVOKED + [False]
    finally:
        stage.stop()

    # What each side wrote down agrees, and nobody changed it since.
    assert re.search(r": ok, \d+ entries", f.audit(stage.aggregator_state))
    for i in range(COUNT):
        assert re.search(r": ok, \d+ entries", f.audit(stage.gateway_state(i)))
    assert main(["audit", "report", str(stage.gateway_state(0)), "--out", str(tmp_path / "left")]) == 0
    rows = (tmp_path / "left" / "left-this-site.csv").read_text().splitlines()
    assert sum(",update," in row for row in rows) == 2


def test_a_stage_in_a_relative_folder_enrols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_mosquitto()
    monkeypatch.chdir(tmp_path)
    stage = Stage(Scenario(gateways=1, seed=0, rounds=1, broker="mosquitto"), Path("work"))
    stage.enrol()
    assert "user demo/plant1/machining/line1/spindle\n" in (tmp_path / "work" / "broker" / "acl").read_text()
