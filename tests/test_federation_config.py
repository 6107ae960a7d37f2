"""federation.toml and the aggregator's command line: every mistake in one line with file, line, key and remedy."""

import argparse
from pathlib import Path

import pytest

from broker import cli
from broker.config import load_federation
from broker.journal import Journal
from models.errors import UserError

TASK = """name = "{name}"
kind = "anomaly"
net = "autoencoder"
[window]
length = 2
[[signal]]
name = "s"
[round]
strategy = "{strategy}"
deadline = "{deadline}"
"""
GOOD = """[federation]
name = "press-lines"
roots = ["acme"]
join = "first-seen"
[mqtt]
url = "mqtt://127.0.0.1"
[[task]]
file = "wear.toml"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "wear.toml").write_text(TASK.format(name="wear", strategy="fedavg", deadline="2h"))
    (tmp_path / "federation.toml").write_text(GOOD)
    return tmp_path


def test_reads_a_good_one(folder: Path) -> None:
    config = load_federation(folder / "federation.toml")
    assert (config.name, config.roots, config.join) == ("press-lines", ("acme",), "first-seen")
    assert config.mqtt.url == "mqtt://127.0.0.1"
    assert [t.task.name for t in config.tasks] == ["wear"]
    assert config.tasks[0].path == folder / "wear.toml"


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ('name = "press-lines"', 'name = "press lines"', 2, "topic level"),
        ('["acme"]', "[]", 3, "empty"),
        ('["acme"]', '["a/b"]', 3, "topic level"),
        ('["acme"]', '["_fl"]', 3, "functional"),
        ('"first-seen"', '"anybody"', 4, "join"),
        ("join", "joins", 4, "did you mean 'join'"),
        ("mqtt://127.0.0.1", "mqtt://10.0.0.1", 6, "insecure = true"),
        ("wear.toml", "absent.toml", 8, "no file"),
        ('file = "wear.toml"', 'file = "wear.toml"\n[release]\nkeys = []', 10, "0 keys, or one twice; write 1 to 16"),
        ('file = "wear.toml"', 'file = "wear.toml"\n[release]\nkeys = ["ab"]', 10, "'ab' is no key"),
        (
            'file = "wear.toml"',
            f'file = "wear.toml"\n[release]\nkeys = ["{"ab" * 32}"]\nthreshold = 2',
            11,
            "write 1 to 1, the number of keys",
        ),
        (
            'file = "wear.toml"',
            f'file = "wear.toml"\n[release]\nkeys = ["{"ab" * 32}"]\ncanary = ["acme/lyon"]',
            11,
            "has 2 levels",
        ),
        ('file = "wear.toml"\n', 'file = "wear.toml"\n[[task]]\nfile = "wear.toml"\n', 10, "second task"),
        ('[[task]]\nfile = "wear.toml"\n', "", 1, "task"),
    ],
)
def test_refuses(folder: Path, old: str, new: str, line: int, says: str) -> None:
    path = folder / "federation.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=says) as caught:
        load_federation(path)
    assert caught.value.place == str(path)
    assert caught.value.line == line


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        ({"strategy": "fedmagic"}, 9, "write one of: fedadam, fedavg"),
        ({"deadline": "0s"}, 10, "2h"),
        ({"name": "a b"}, 1, "name"),
    ],
)
def test_refuses_tasks(folder: Path, change: dict[str, str], line: int, says: str) -> None:
    values = {"name": "wear", "strategy": "fedavg", "deadline": "2h", **change}
    (folder / "wear.toml").write_text(TASK.format(**values))
    with pytest.raises(UserError, match=says) as caught:
        load_federation(folder / "federation.toml")
    assert caught.value.place == str(folder / "wear.toml")
    assert caught.value.line == line


def test_enrol(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = folder / "state"
    options = ["enrol", "-c", str(folder / "federation.toml"), "--state", str(state), "--path", "acme/a/b/c/d"]
    journal = Journal(state)
    assert cli.main([*options, "--key", "ab" * 32]) == 0
    assert journal.key_of("acme/a/b/c/d") == bytes.fromhex("ab" * 32)
    for bad, says in [("ab" * 31, "--key"), ("zz" * 32, "--key")]:
        assert cli.main([*options, "--key", bad]) == 2
        assert says in capsys.readouterr().err
    options[-1] = "other/a/b/c/d"
    assert cli.main([*options, "--key", "ab" * 32]) == 2
    assert "roots are: acme" in capsys.readouterr().err


def test_bad_input_is_one_line_and_an_exit_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-c", str(folder / "none.toml")]) == 2
    assert cli.main(["run"]) == 2
    assert cli.main(["status", "--state", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_every_command_has_help_with_an_example() -> None:
    parser = argparse.ArgumentParser(prog="tundish broker")
    commands = parser.add_subparsers()
    cli.add_commands(commands)
    assert set(commands.choices) == {"run", "status", "init", "enrol", "acl", "release", "rollback", "import", "export"}
    for command in commands.choices.values():
        assert "example: tundish broker" in command.format_help()


def test_the_default_state_is_the_platforms() -> None:
    assert cli.default_state("press").parts[-3:] == ("tundish", "broker", "press")
