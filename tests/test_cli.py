"""The command itself, as a shell runs it."""

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker.journal import Journal
from broker.status import STATUS_FILE
from edge.identity import own_signer
from edge.store import State

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
