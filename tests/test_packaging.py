"""What a user installs: the wheel, the command in it, and the board files, from a checkout and installed alike."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from edge import SOFTWARE
from edge.cli import build_parser

ROOT = Path(__file__).parent.parent
BOARDS = sorted(path.stem for path in (ROOT / "firmware-configs").glob("*.toml"))
GATEWAY = """[gateway]
path = "acme/lyon/press/line4/cell2"

[mqtt]
url = "mqtt://127.0.0.1:1883"
"""


def run(*command: str | Path, cwd: Path, pythonpath: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(pythonpath), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The build backend is fetched only where it is not installed.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked as pip does it, to be put first on the path."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(folder)]
    done = subprocess.run([*command, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_a_gateway_says_the_version_that_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"{project['name']} {project['version']}" == SOFTWARE


@pytest.fixture
def gateway(tmp_path: Path) -> Path:
    path = tmp_path / "gateway.toml"
    path.write_text(GATEWAY)
    return path


def test_wheel_holds_what_it_should_and_nothing_else(wheel: Path) -> None:
    command = [sys.executable, "-m", "check_wheel_contents", "--config", str(ROOT / "pyproject.toml"), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("edge", "broker", "models"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}
        assert sources <= names
        assert f"{folder}/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"edge", "broker", "models"}


def test_wheel_holds_every_file_of_firmware_configs(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    files = {path.name for path in (ROOT / "firmware-configs").iterdir() if path.is_file()}
    assert {f"edge/firmware-configs/{name}" for name in files} <= set(names)
    assert BOARDS


def test_a_board_resolves_in_the_checkout(gateway: Path) -> None:
    command = (sys.executable, "-m", "edge.cli", "edge", "check", "-c", gateway, "--profile", "generic-arm64", "--json")
    done = run(*command, cwd=gateway.parent, pythonpath=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["file"] == str(gateway)


def test_a_board_resolves_where_it_is_installed(installed: Path, gateway: Path) -> None:
    where = run(
        sys.executable, "-c", "import edge.cli; print(edge.cli.__file__)", cwd=gateway.parent, pythonpath=installed
    )
    assert where.stdout.strip() == str(installed / "edge" / "cli.py")
    tundish = installed / "bin" / "tundish"
    command = ("edge", "check", "-c", gateway, "--json", "--profile")
    done = run(tundish, *command, "generic-arm64", cwd=gateway.parent, pythonpath=installed)
    assert done.returncode == 0, done.stderr
    wrong = run(tundish, *command, "toaster", cwd=gateway.parent, pythonpath=installed)
    assert wrong.returncode == 2
    assert f"write one of: {', '.join(BOARDS)}" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


def test_container_starts_and_checks_a_gateway() -> None:
    text = (ROOT / "Dockerfile.arm64").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)[0])
    start, health = (json.loads(found) for found in re.findall(r"^ *CMD (\[.*\])$", text, re.MULTILINE)[::-1])
    assert entry == ["tundish"]
    assert build_parser("edge").parse_args(start).run.__name__ == "_run"
    assert health[0] == "tundish"
    assert build_parser("edge").parse_args(health[1:]).run.__name__ == "_status"
    last_stage = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER (?!root)\w+$", last_stage, re.MULTILINE)
    assert "PYTHONSAFEPATH=1" in last_stage


def test_make_alone_says_what_there_is() -> None:
    make = shutil.which("make")
    assert make
    outside = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # make test runs this
    done = subprocess.run([make], cwd=ROOT, env=outside, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    said = {line.split()[1] for line in done.stdout.splitlines()}
    assert said == {"help", "demo", "test", "lint", "arm64", "sbom", "clean"}


def test_the_bill_of_materials_names_what_a_gateway_installs(tmp_path: Path) -> None:
    file = tmp_path / "sbom.json"
    tool = [sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", str(ROOT / "pyproject.toml")]
    subprocess.run([*tool, "--output-reproducible", "-o", str(file), sys.executable], check=True, capture_output=True)
    found = json.loads(file.read_text())
    assert (found["bomFormat"], found["metadata"]["component"]["name"]) == ("CycloneDX", "tundish")
    named = {one["name"].lower(): one for one in found["components"]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in project["dependencies"]:
        name = re.split(r"[\[>=<!~ ]", wanted, maxsplit=1)[0].lower()
        assert named[name]["version"] == version(name)
        assert named[name]["purl"].startswith(f"pkg:pypi/{name}@")
