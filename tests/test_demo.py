"""The demo as a user runs it, short: real processes, a real kill -9, figures that can tell when something is lost."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from broker import ledger
from edge.lab.figures import account
from edge.lab.report import Line, plot
from edge.lab.stage import Scenario, task_toml
from models.spec import parse_task
from tests.brokers import need_mosquitto

Array = NDArray[np.generic]

KEYS = {
    "rounds", "federated", "silo", "centralised", "updates_sent", "updates_counted", "lost", "duplicated",
    "bytes_per_update", "float32_bytes", "max_score_gap_s", "outage_max_score_gap_s",
}  # fmt: skip


def demo(out: Path, *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "edge.cli", "demo", "--json", "--out", str(out), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(found: dict[str, Any], out: Path, *, gateways: int, rounds: int) -> None:
    assert found.keys() >= KEYS
    assert json.loads((out / "report.json").read_text()) == found
    assert found["rounds"] == rounds
    assert found["updates_sent"] == found["updates_counted"] == gateways * rounds
    assert found["lost"] == found["duplicated"] == found["updates_refused"] == 0
    assert len(found["silo"]) == gateways
    assert 0 < found["bytes_per_update"] < found["float32_bytes"] / 4
    assert found["outage"]["counted"] < gateways
    assert all(scored > 0 for scored in found["outage"]["scored"])
    assert 0 < found["outage_max_score_gap_s"] < found["outage"]["seconds"]
    ledgers = sorted(out.glob("*ledger*"))
    assert len(ledgers) == gateways + 1
    for path in ledgers:
        ledger.verify(path.read_text().splitlines())
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=|https?://", page)


def save(path: Path, x: Array, y_train: Array, y_test: Array, client: Array) -> None:
    np.savez(path, x_train=x, y_train=y_train, client_train=client, x_test=x, y_test=y_test, client_test=client)


def test_the_demo_survives_its_outage_and_loses_nothing(tmp_path: Path) -> None:
    found = demo(tmp_path / "out", "--gateways", 2, "--rounds", 3, "--seed", 3)
    check(found, tmp_path / "out", gateways=2, rounds=3)
    assert found["centralised"] > 0.5


def test_the_demo_plays_recorded_waveforms_over_mosquitto(tmp_path: Path) -> None:
    need_mosquitto()
    rng = np.random.default_rng(0)
    count, length = 240, 512
    y = rng.integers(0, 2, count)
    tone = np.sin(np.arange(length)[None] * np.where(y, 0.2, 0.5)[:, None] + rng.uniform(0, 6, (count, 1)))
    x = (tone + 0.3 * rng.standard_normal((count, length))).astype(np.float32)[:, None]
    client = np.arange(count) % 2
    path = tmp_path / "tones.npz"
    save(path, x, y, y, client)
    found = demo(tmp_path / "out", "--gateways", 2, "--rounds", 2, "--broker", "mosquitto", "--data", path)
    check(found, tmp_path / "out", gateways=2, rounds=2)
    assert found["speedup"] > 1


def entry(kind: str, **body: object) -> dict[str, Any]:
    return {"kind": kind, "body": body}


def test_an_update_that_nobody_counted_is_lost_and_one_counted_twice_is_seen() -> None:
    sent = [{"digest": digest} for digest in ("a", "b", "c", "d")]
    gateways = [[entry("receipt", digest="c", outcome="late")]]
    aggregator = [
        entry("update", digest="a", path="p1", round=1),
        entry("update", digest="d", path="p1", round=1),
    ]
    found = account(sent, gateways, aggregator)
    assert found == {"updates_sent": 4, "updates_counted": 2, "updates_refused": 1, "lost": 1, "duplicated": 1}


def test_a_plot_escapes_its_names() -> None:
    assert "<script>" not in plot("<script>", "x", "<script>", [Line("<script>", [(0, 1), (1, 2)])])


def processes_of(folder: Path) -> list[int]:
    """Processes whose command line names a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def test_a_demo_that_is_told_to_end_takes_its_plants_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-P", "-m", "edge.cli", "demo", "--gateways", "1", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        assert any("gateways started" in line for line in child.stderr)
        # The demo, an aggregator and a gateway name it; a child has its command line a moment after it is started.
        deadline = time.monotonic() + 20
        while len(processes_of(out)) != 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(processes_of(out)) == 3
        child.terminate()
        child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert processes_of(out) == []


@pytest.mark.parametrize(
    "arguments",
    [("--rounds", "0"), ("--gateways", "0"), ("--data", "/nowhere.npz"), ("--gateways", "x"), ("--out", __file__)],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments: tuple[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "edge.cli", "demo", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("tundish")


def test_a_folder_of_somebody_elses_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years")
    command = [sys.executable, "-P", "-m", "edge.cli", "demo", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert (tmp_path / "thesis.txt").read_text() == "ten years"


def test_a_set_without_labels_becomes_an_anomaly_task(tmp_path: Path) -> None:
    x = np.zeros((8, 3, 16), np.float32)
    path = tmp_path / "normal.npz"
    save(path, x, np.zeros(8, np.int64), np.arange(8) % 2, np.zeros(8, np.int64))
    task = parse_task(task_toml(Scenario(gateways=1, seed=0, rounds=1, data=path)))
    assert (task.kind, task.net, task.target) == ("anomaly", "autoencoder", None)
