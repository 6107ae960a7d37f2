"""What the program takes is what the documentation says: options, commands, keys, modules."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker import config as federation
from broker.charter import CharterModel, CharterPrivacy
from broker.settings import MqttSettings
from edge import config
from edge.cli import build_parser, main
from edge.drivers import registry
from models import spec

ROOT = Path(__file__).parent.parent
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
ROOMS = ("models", "broker", "edge")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *(ROOT / room / "README.md" for room in ROOMS)]


def commands(parser: argparse.ArgumentParser, path: str = "tundish") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not subs:
        yield path, parser
    for sub in subs:
        for name, child in sub.choices.items():
            yield from commands(child, f"{path} {name}")


ALL = dict(commands(build_parser()))


def section_of(path: str) -> str:
    *group, verb = path.split()
    heads = [line for line in REFERENCE.splitlines() if line.startswith(f"### `{' '.join(group)}")]
    heading = next((line for line in heads if f"`{path}`" in line or f"`{verb}`" in line), "")
    assert heading, f"{path} has no heading"
    return REFERENCE[REFERENCE.index(heading) :].split("\n### ")[0].split("\n## ")[0]


@pytest.mark.parametrize("path", ALL)
def test_every_command_and_option_is_in_the_reference(path: str) -> None:
    section = section_of(path)
    for action in ALL[path]._actions:
        for option in action.option_strings:
            if option not in {"-h", "--help"}:
                assert re.search(rf"`{re.escape(option)}[ `]", section), f"{path} {option} is undocumented"


@pytest.mark.parametrize("path", ALL)
def test_every_number_that_is_a_default_is_in_the_reference(path: str) -> None:
    rows = section_of(path).splitlines()
    for action in ALL[path]._actions:
        if isinstance(action.default, int | float) and not isinstance(action.default, bool):
            named = [row for row in rows if f"`{action.option_strings[-1]}" in row.partition("|")[2].partition("|")[0]]
            said = "".join(named)
            assert not action.default or f"({action.default:g})" in said, f"{path} {action.option_strings[-1]}"


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_help_with_an_example(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*path.split()[1:], "--help"])
    assert stop.value.code == 0
    assert f"example: {path}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("table", "type_"),
    [
        ("gateway", config.GatewayTable),
        ("federation", config.FederationTable),
        ("policy", config.Policy),
        ("store", config.StoreTable),
        ("training", config.TrainingTable),
        ("scoring", config.ScoringTable),
        ("mqtt", MqttSettings),
        ("task.NAME", config.TaskTable),
        ("federation", federation.FederationTable),
        ("enrolment", federation.EnrolmentTable),
        ("release", federation.ReleaseTable),
        ("window", spec.Window),
        ("target", spec.Target),
        ("alarm", spec.Alarm),
        ("drift", spec.Drift),
        ("training", spec.Training),
        ("round", spec.Round),
        ("privacy", spec.Privacy),
        ("privacy", CharterPrivacy),
        ("model", CharterModel),
    ],
)
def test_every_key_is_in_the_reference(table: str, type_: type[msgspec.Struct]) -> None:
    rows = [line for line in REFERENCE.splitlines() if line.startswith(f"| `[{table}]")]
    named = set(re.findall(r"`(?:\[[^\]]+\] )?([a-z_]+)`", "\n".join(row.split("|")[1] for row in rows)))
    assert set(type_.__struct_fields__) <= named


@pytest.mark.parametrize("driver", registry.driver_names())
def test_every_driver_option_is_in_the_reference(driver: str) -> None:
    section = REFERENCE.split(f"### Options of a source: `{driver}`")[1].split("\n#")[0]
    for option in registry.load(driver).OPTIONS:
        assert f"`{option}`" in section


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("room", ROOMS)
def test_every_module_has_its_line_in_the_rooms_readme(room: str) -> None:
    text = (ROOT / room / "README.md").read_text()
    for module in (ROOT / room).glob("*.py"):
        if module.stem != "__init__":
            assert module.name in text, f"{room}/README.md does not name {module.name}"


def test_the_readme_shows_a_real_run() -> None:
    text = (ROOT / "README.md").read_text()
    assert "DEMO_OUTPUT" not in text
    assert "lost, counted twice                 0, 0" in text


def test_every_test_that_the_security_page_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 30
    for file, test in named:
        assert re.search(rf"^(async )?def {test}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE), (
            f"{file}::{test}"
        )
