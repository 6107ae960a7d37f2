"""The page of the trial, as its reader follows it: recordings, file, task, command."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edge.lab.recorded import read_recorded
from models.spec import parse_task

PAGE = (Path(__file__).parent.parent / "docs" / "trial.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found[1]


def names(output: str) -> list[str]:
    """What each line of figures is called, and the columns of the plants."""
    figures, _, plants = output.partition("\n\n")
    called = [re.split(r"(?<=\S)  ", line)[0] for line in figures.splitlines()]
    return called + re.split(r"  +", plants.splitlines()[0])


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ("torque,current,worn\n1,2,0\n", "b.csv has other columns than recordings/a.csv: current, torque"),
        ("current,torque,worn\n1,2,0.5\n", "b.csv: worn is no class"),
        ("current,torque,worn\n1,2,\n", "b.csv: worn is no class"),
    ],
)
def test_recordings_that_do_not_go_together(tmp_path: Path, second: str, told: str) -> None:
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / "a.csv").write_text("current,torque,worn\n1,2,0\n")
    (tmp_path / "recordings" / "b.csv").write_text(second)
    (tmp_path / "make_set.py").write_text(block("python").replace("LENGTH = 32", "LENGTH = 1"))
    done = subprocess.run([sys.executable, "make_set.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_recordings_from_excel(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    text = "\ufeffcurrent;torque;worn\r\n1,5;;1\r\n2,5;3;0\r\n"
    (tmp_path / "recordings" / "a.csv").write_bytes(text.encode())
    script = block("python").replace("LENGTH = 32", "LENGTH = 1").replace('CELLS = ","', 'CELLS = ";"')
    (tmp_path / "make_set.py").write_text(script)
    subprocess.run([sys.executable, "make_set.py"], cwd=tmp_path, check=True)
    with np.load(tmp_path / "plants.npz") as found:
        assert found["x_train"][0].ravel().tolist() == pytest.approx([1.5, np.nan], nan_ok=True)
        assert found["feature_names"].tolist() == ["current", "torque"]


def test_the_trial_goes_as_its_page_says(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    (tmp_path / "recordings").mkdir()
    for number, name in enumerate(("lyon", "turin")):
        worn = np.repeat(random.integers(0, 2, 120), 32)
        level = random.normal(number, 1, len(worn)) * (1 + 2 * worn)
        table = np.column_stack([level, random.normal(size=len(worn)), worn])
        np.savetxt(
            tmp_path / "recordings" / f"{name}.csv", table, delimiter=",", header="current,torque,worn", comments=""
        )
    (tmp_path / "make_set.py").write_text(block("python"))
    done = subprocess.run([sys.executable, "make_set.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = read_recorded(tmp_path / "plants.npz")
    assert found["x_train"].shape == (180, 2, 32)
    assert found["client_names"].tolist() == ["lyon", "turin"]
    assert found["feature_names"].tolist() == ["current", "torque"]
    (tmp_path / "trial.toml").write_text(block("toml"))
    command = ["simulate", "trial.toml", "--data", "plants.npz", "--plot", "trial.html"]
    assert " ".join(["tundish", *command]) in PAGE
    ran = subprocess.run(
        [sys.executable, "-m", "edge.cli", *command, "--rounds", "3"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    again = [*command[:-2], "--json", "--rounds", "1"]
    printed = subprocess.run([sys.executable, "-m", "edge.cli", *again], cwd=tmp_path, capture_output=True, check=True)
    parse_task(json.loads(printed.stdout)["task"], "task.toml")
    assert names(ran.stdout) == names(block("text"))
    assert "<polyline" in (tmp_path / "trial.html").read_text()
