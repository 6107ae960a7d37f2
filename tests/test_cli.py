"""The command itself, as a shell runs it."""

import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker.cli import _of_task
from broker.cli import main as broker_main
from broker.journal import Journal
from broker.status import STATUS_FILE
from edge import SOFTWARE, participant, status_command
from edge.choose import GLOBAL, MIX, OWN, TUNED
from edge.cli import main
from edge.identity import own_signer
from edge.store import State
from tests.test_docs import ALL
from tests.test_identity import federation_toml, gateway_toml

# As in a shell: what is short is written at the end.
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["edge", "check", "--schema"],
        ["audit", "verify", "state"],
        ["broker", "status", "--state", "aggregator"],
        ["audit", "verify", "state", "--json"],
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_ends_a_command_without_a_word(tmp_path: Path, command: list[str]) -> None:
    """`tundish … | true`: a real pipe, which nobody reads any more before the command begins."""
    with closing(State(tmp_path / "state")) as state:
        signer = own_signer(state)
        with state.transaction():
            state.record("feedback", {"task": "wear"})
            state.checkpoint(signer)
    status = {
        "federation": "press", "time_ms": int(time.time() * 1000), "connected": True, "mqtt": {"error": ""},
        "public_key": "ab" * 32, "tasks": {}, "not_enrolled": {}, "refused": {},
    }  # fmt: skip
    running = Journal(tmp_path / "aggregator")
    running.claim()
    (tmp_path / "aggregator" / STATUS_FILE).write_bytes(msgspec.json.encode(status))
    whole = [sys.executable, "-P", "-m", "edge.cli", *command]
    assert subprocess.run(whole, cwd=tmp_path, capture_output=True, check=True, timeout=60).stdout
    reads, writes = os.pipe()
    os.close(reads)
    try:
        done = subprocess.run(
            whole, cwd=tmp_path, env=BUFFERED, stdout=writes, stderr=subprocess.PIPE, check=False, timeout=60
        )
    finally:
        os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_status_has_a_sentence_for_each_word_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    """`mix` and `sent joined` are words of the program's own."""
    assert status_command._SCORES.keys() == {GLOBAL, TUNED, OWN, MIX}
    assert status_command._DOES.keys() == {state.name.lower() for state in participant.State}
    task = {
        "scored": 9,
        "model": 3,
        "scoring_kind": MIX,
        "scoring_model": 2,
        "round": 4,
        "answer": "joined",
        "state": "sent",
    }
    for more in ({}, {"answer": "declined: too few windows", "state": "idle"}, {"round": None, "model": None}):
        status_command._print_task("wear", task | {"problem": ""} | more, connected=False)
    said = "  task     wear: 9 windows scored, "
    together = "by the federation's model and those that learnt here together, model version 2"
    assert capsys.readouterr().out.splitlines() == [
        f"{said}{together}, joined round 4, update sent",
        f"{said}{together}, round 4 declined: too few windows",
        f"{said}no model yet, no round yet",
    ]


def test_status_says_what_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    task = {"scored": 9, "model": 0, "scoring_kind": None, "scoring_model": 0, "round": 1, "answer": "joined"}
    task |= {"problem": "", "state": "waiting"}
    for trainable in (58, 64):
        now = task | {"windows": {"trainable": trainable, "wanted": 64}}
        status_command._print_task("wear", now, connected=True)
        assert ("58 of 64 windows to train on" in capsys.readouterr().out) == (trainable == 58)
    gateway = {"path": "a/b/c/d/e", "public_key": "ab" * 32, "outbox": 0, "answered": False}
    gateway |= {"mqtt": {"connected": True}, "tasks": {"wear": {"round": None}}}
    said = []
    for roster in (None, {"has_this": True}, {"has_this": False}):
        status_command._print_stranger(gateway | {"roster": roster})
        said.append(capsys.readouterr().out.split(":")[0])
    assert said == ["  ENROL    no plan for this gateway yet", "  waits    for a round",
                    "  ENROL    the federation does not know this gateway"]  # fmt: skip
    there = {"online": True, "round": 0, "verdict": "", "reason": ""}
    federation = {"round": 0, "state": "waiting", "version": 0, "min_gateways": 3, "vote": None}
    lines = _of_task("wear", federation | {"gateways": {"a/b/c/d/e": there}}, {})
    assert "    begins with 3 gateways online (min_gateways); now 1" in lines
    enough = _of_task("wear", federation | {"gateways": dict.fromkeys("123", there)}, {})
    assert not any("begins with" in line for line in enough)


def test_version_is_the_software_that_a_birth_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out.strip()) == (0, SOFTWARE)


@pytest.mark.parametrize("path", ALL)
def test_what_a_command_does_not_take_is_told_in_one_line(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every command: an option that is none, and a verb that is none."""
    group = path.rpartition(" ")[0]
    for wrong in ([*path.split()[1:], "--no-such-option"], [*group.split()[1:], "no-such-verb"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        assert re.fullmatch(r"tundish: .+; see: (tundish( [a-z]+)*) --help\n", err)
    assert f"see: {group} --help" in err
    with pytest.raises(SystemExit):
        broker_main(["no-such-verb"])
    assert capsys.readouterr().err.endswith("; see: tundish broker --help\n")


@pytest.mark.parametrize("state", ["file", "/proc/none"])
@pytest.mark.parametrize(
    "command",
    [["edge", "run"], ["edge", "export", "--request", "x"], ["broker", "init"], ["broker", "run"]],
    ids=" ".join,
)
def test_a_state_that_can_not_be_made_is_told_in_one_line(
    tmp_path: Path, command: list[str], state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / state
    if state == "file":
        place.write_text("")
    config = gateway_toml(tmp_path) if command[0] == "edge" else federation_toml(tmp_path)
    assert main([*command, "-c", str(config), "--state", str(place)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"tundish: {place}")
    assert "; " in err
