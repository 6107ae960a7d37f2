"""Proof: ledgers that hold and ledgers that were touched, and the report of what left a site."""

import asyncio
import csv
import hashlib
import html
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker import ledger
from broker.journal import Journal
from broker.messages import Signer
from edge.cli import main
from edge.identity import own_signer
from edge.store import State
from models import codec
from tests.brokers import BrokerProcess
from tests.test_service import Plant, delta, gateways, open_plan, until

OTHER = Signer.from_bytes(bytes(32))
SESSION = {"path": "a/b/c/d/e", "session": 1, "software": "0.1.0", "tasks": ["wear"], "policy": {"min_gateways": 3}}


def fill(state: State) -> None:
    signer = own_signer(state)
    with state.transaction():
        state.record("session", {**SESSION})
        state.checkpoint(signer)
        state.record("birth", {"session": 1, "software": "0.1.0", "tasks": ["wear"], "message_bytes": 170})
        state.record("joined", {"task": "wear", "round": 1, "reason": "", "message_bytes": 90})
        update = {"task": "wear", "round": 1, "samples": 200, "digest": "ab" * 32, "bytes": 300, "message_bytes": 400}
        state.record("update", {**update})
        state.record("receipt", {"task": "wear", "round": 1, "digest": "ab" * 32, "outcome": "counted"})
        state.record("update", {**update, "round": 2, "digest": "cd" * 32})
        vote = {"task": "wear", "version": 2, "verdict": "against", "new": 0.5, "old": 0.75, "windows": 40}
        state.record("vote", {**vote, "message_bytes": 140})
        state.record("declined", {"task": "wear", "round": 3, "reason": "=too few", "message_bytes": 95})
        state.checkpoint(signer)
        state.record("feedback", {"task": "wear"})
        state.record("request-made", {"path": "a/b/c/d/e", "public_key": "ef" * 32})


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "state"
    with closing(State(folder)) as state:
        fill(state)
        yield folder  # read while it is open, as on a running gateway


def lines(folder: Path) -> list[str]:
    with closing(State(folder)) as state:
        return list(state.ledger())


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_a_ledger_holds_and_says_who_signed_how_much(gateway: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", str(gateway)]) == 0
    text = said(capsys)
    assert f"{gateway}: ok, 13 entries" in text
    assert "up to entry 10; NOT PROVEN whose key that is" in text
    assert "NOT PROVEN without --head: that nothing was taken off its end" in text
    assert main(["audit", "verify", str(gateway), "--json"]) == 0
    head = json.loads(said(capsys))
    with closing(State(gateway)) as state:
        key = own_signer(state).public_key.hex()
    assert (head["entries"], head["signed"], head["key"]) == (13, 10, key)
    assert main(["audit", "verify", str(gateway), "--key", key.upper(), "--head", head["hash"]]) == 0
    text = said(capsys)
    assert "up to entry 10; as --key wants it\n" in text
    assert "proven: the head that was noted is entry 13; up to it" in text
    assert "NOT PROVEN" not in text


def test_a_head_that_was_kept_shows_what_was_taken_away(gateway: Path, tmp_path: Path) -> None:
    found = lines(gateway)
    file = tmp_path / "ledger.jsonl"
    file.write_text("\n".join(found) + "\n")
    head = ledger.verify(found).hash
    assert main(["audit", "verify", str(file), "--head", head]) == 0
    file.write_text("\n".join(found[:-1]) + "\n")
    assert main(["audit", "verify", str(file)]) == 0  # a shorter chain holds too
    assert main(["audit", "verify", str(file), "--head", head]) == 1
    assert main(["audit", "verify", str(file), "--head", head[:16]]) == 2  # not all of it: no tampering


Touch = Callable[[list[str]], list[str]]


def rewritten(found: list[str], start: int, change: Callable[[dict[str, Any]], None]) -> list[str]:
    """The chain as somebody without the key would write it anew after a change."""
    out, prev = found[:start], json.loads(found[start])["prev"]
    for line in found[start:]:
        one = json.loads(line)
        if len(out) == start:
            change(one)
        entry = ledger.append(prev, one["seq"], one["time_ms"], one["kind"], one["body"])
        out, prev = [*out, entry.line], entry.hash
    return out


@pytest.mark.parametrize(
    ("touch", "says"),
    [
        (lambda f: [*f[:5], f[5].replace('"bytes":300', '"bytes":30'), *f[6:]], "entry 6 was changed after it was"),
        (lambda f: f[:5] + f[6:], "ledger entry 6 is missing: in its place is entry 7;"),
        (lambda f: [*f[:5], f[6], f[5], *f[7:]], "ledger entry 6 is missing: in its place is entry 7;"),
        (lambda f: rewritten(f, 5, lambda one: one["body"].update(bytes=30)), "entry 11 has a signature that does"),
        (lambda f: rewritten(f, 2, lambda one: one["body"].update(key=OTHER.public_key.hex())), "entry 3 has a"),
        (lambda f: rewritten(f, 2, lambda one: one["body"].update(key=7)), "entry 3 has a signature that does not"),
        (lambda f: [*f[:5], "{", *f[6:]], "ledger entry 6 is not JSON"),
        (lambda f: [*f[:5], f[5].replace('"time_ms":', '"time_ms":"x","y":'), *f[6:]], "ledger entry 6 is no entry"),
    ],
)  # fmt: skip
def test_what_was_touched_is_found(
    gateway: Path, tmp_path: Path, touch: Touch, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ledger.jsonl"
    file.write_text("\n".join(touch(lines(gateway))) + "\n")
    assert main(["audit", "verify", str(file)]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"tundish: {file}: ledger entry ")
    assert says in err
    assert main(["audit", "report", str(file), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_a_ledger_in_which_nothing_stands_yet_tells_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(tmp_path).close()
    assert main(["audit", "verify", str(tmp_path)]) == 0
    assert said(capsys).splitlines()[0] == f"{tmp_path}: ok, 0 entries"


@pytest.mark.parametrize("whose", ["gateway's", "aggregator's"])
def test_an_exported_ledger_is_checked_without_its_machine(
    gateway: Path, tmp_path: Path, whose: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place, file = gateway, tmp_path / "ledger.jsonl"
    if whose == "aggregator's":
        place = tmp_path / "office"
        with closing(Journal(place)) as journal, journal.transaction():
            for number in range(13):
                journal.note(number, "task", {"task": "wear"})
    assert main(["audit", "export", str(place), "--out", str(file)]) == 0
    first, last = said(capsys).splitlines()
    head = first.removeprefix(f"{file}: 13 entries, head ")
    assert last == f"whoever has it runs: tundish audit verify ledger.jsonl --head {head}"
    found = file.read_text().splitlines()
    assert ledger.verify(found).hash == head
    assert main(["audit", "verify", str(file), "--head", head]) == 0
    for touched, says in (
        ([*found[:5], found[5].replace("wear", "tear"), *found[6:]], "ledger entry 6 was changed after it was written"),
        (found[:5] + found[6:], "ledger entry 6 is missing: in its place is entry 7"),
        ([*found[:5], found[6], found[5], *found[7:]], "ledger entry 6 is missing: in its place is entry 7"),
        (found[:-1], f"no entry has the hash {head} that was noted earlier"),
    ):
        file.write_text("".join(f"{line}\n" for line in touched))
        assert main(["audit", "verify", str(file), "--head", head]) == 1
        assert says in capsys.readouterr().err
    # What does not hold goes out as it is, and is told.
    with sqlite3.connect(place / ("state.db" if place == gateway else "journal.db")) as db:
        db.execute("UPDATE ledger SET line = replace(line, 'wear', 'tear') WHERE seq = 6")
    assert main(["audit", "export", str(place), "--out", str(file)]) == 1
    assert "ledger entry 6 was changed after it was written" in capsys.readouterr().err
    assert file.read_text() == "".join(
        f"{line}\n" for line in [*found[:5], found[5].replace("wear", "tear"), *found[6:]]
    )
    assert main(["audit", "export", str(place), "--out", str(tmp_path / "no" / "x")]) == 2
    assert "name a file that can be written" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["verify"], ["report", "--out", "x"], ["export", "--out", "x"]], ids=lambda v: v[0])
def test_a_folder_that_is_nobodys_state_is_told(
    tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["audit", *verb, str(tmp_path)]) == 2
    text = "neither a gateway nor an aggregator has its state there; name the --state of tundish edge run"
    assert text in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_state_that_is_anothers_is_told_in_one_line(gateway: Path) -> None:
    """As an engineer without sudo meets it: the folder belongs to the service's user."""
    loaded = "import edge.audit, edge.cli, os, shutil"  # this user may not be able to read the program's own files
    program = f"{loaded}; os.setuid(65534); edge.cli.main(['audit', 'verify', '{gateway}'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == f"tundish: {gateway}: Permission denied; run this as the user who owns that folder\n"


def test_another_key_has_signed_nothing(gateway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", str(gateway), "--key", OTHER.public_key.hex()]) == 1
    assert "ledger entry 3 is signed by" in capsys.readouterr().err
    file = tmp_path / "ledger.jsonl"
    unsigned = ledger.append(ledger.GENESIS, 1, 5, "session", SESSION)
    file.write_text(unsigned.line)
    assert main(["audit", "verify", str(file)]) == 0
    assert "not signed: whoever has the file may have written it" in said(capsys)
    assert main(["audit", "verify", str(file), "--key", OTHER.public_key.hex()]) == 1


def test_what_left_is_one_table_and_one_page(gateway: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["audit", "report", str(gateway), "--out", str(out)]) == 0
    assert said(capsys).startswith("messages that left this site: 7; ")
    with (out / "left-this-site.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == ["birth", "joined", "update", "update", "vote", "declined", "request-made"]
    counted, open_ = rows[2:4]
    assert (counted["digest"], counted["payload_bytes"], counted["message_bytes"]) == ("ab" * 32, "300", "400")
    assert counted["answered"].startswith("counted 20")
    assert open_["answered"] == "not answered yet"
    assert [row["entry"] for row in rows] == ["4", "5", "6", "8", "9", "10", "13"]
    assert rows[0]["message_bytes"] == "170"
    assert (rows[4]["windows"], rows[4]["detail"]) == ("40", "against version 2: 0.5, was 0.75")
    assert rows[5]["detail"] == "'=too few"  # no formula for a spreadsheet
    page = (out / "report.html").read_text()
    assert "2: 600 bytes of weight deltas, 800 with signatures" in page
    same_words(page, rows)
    asked = rows[6]
    assert (asked["what"], asked["entry"]) == ("request-made", "13")
    assert asked["detail"] == f"path a/b/c/d/e, public key {'ef' * 32}, a request for a TLS certificate"
    assert "<script" not in page
    assert ledger.verify(lines(gateway)).hash in page


def test_an_aggregators_ledger_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Journal(tmp_path)) as journal:
        with journal.transaction():
            journal.note(1, "task", {"task": "wear"})
            journal.checkpoint(2, OTHER)
        assert main(["audit", "verify", str(tmp_path), "--key", OTHER.public_key.hex()]) == 0
    assert "ok, 2 entries, 1970-01-01T00:00:00Z" in said(capsys)
    empty = tmp_path / "empty"
    Journal(empty).close()
    assert main(["audit", "report", str(empty), "--out", str(tmp_path / "out")]) == 2
    assert "holds nothing that a gateway or an aggregator has done; name the state" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


async def test_what_an_aggregator_did_and_received_is_one_table_and_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a real round: the table is held against what went over the wire."""
    with BrokerProcess("amqtt") as broker:
        plant, out = Plant(tmp_path, broker.url, min_gateways=1, join="enrolled"), tmp_path / "out"
        enrol = ["broker", "enrol", "-c", str(plant.config), "--state", str(plant.state), "--path"]
        async with gateways(broker.url, 2) as (stays, goes), plant.service():
            for g in (stays, goes):
                assert await asyncio.to_thread(main, [*enrol, str(g.path), "--key", g.signer.public_key.hex()]) == 0
            plan = await open_plan([stays])
            await until(lambda: plant.has_status() and len(plant.status()["tasks"]["wear"]["gateways"]) == 2)
            await asyncio.to_thread(main, [*enrol, str(goes.path), "--revoke"])
            stays.send(plan, np.zeros(3, np.float32))
            await until(stays.receipts)
            sent = stays.send(plan, delta(0))
            assert await asyncio.to_thread(main, ["audit", "report", str(plant.state), "--out", str(out)]) == 0
            await until(lambda: len(stays.receipts()) == 2)
    capsys.readouterr()
    assert main(["audit", "report", str(plant.state), "--out", str(out)]) == 0
    assert said(capsys).endswith(f"; {out / 'aggregator.csv'}, {out / 'report.html'}\n")
    with (out / "aggregator.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        found.setdefault(row["what"], []).append(row)
    paths = [str(g.path) for g in (stays, goes)]
    assert [(row["gateway"], row["detail"]) for row in found["enrolled"]] == [
        (str(g.path), f"key {g.signer.public_key.hex()}, by key") for g in (stays, goes)
    ]
    assert [row["gateway"] for row in found["revoked"]] == [paths[1]]
    assert [(row["task"], row["round"], row["detail"]) for row in found["opened"]] == [
        ("wear", "1", "from version 0, with 1 gateways at least")
    ]
    (update,), (refused,) = found["update"], found["refused"]
    sizes = str(len(codec.encode(delta(0), 32).data)), str(len(sent))
    assert (update["payload_bytes"], update["message_bytes"]) == sizes
    assert (update["gateway"], update["windows"], update["detail"]) == (paths[0], "100", "counted")
    assert update["digest"] == hashlib.sha256(sent).hexdigest()
    assert (refused["gateway"], refused["detail"][:8]) == (paths[0], "layout: ")
    assert [(row["version"], row["detail"]) for row in found["model"]][-1] == ("1", "of 1 gateways")
    page = (out / "report.html").read_text()
    assert f"<td><code>1: {paths[0]}</code></td>" in page
    assert f"1: {len(sent):,} bytes as they came" in page
    assert "<script" not in page
    same_words(page, rows)


def same_words(page: str, rows: list[dict[str, str]]) -> None:
    """What a table says, its page says in the same words, and explains them."""
    assert "".join(f"<th>{name}</th>" for name in rows[0]) in page
    for row in rows:
        assert f"<tr><th>{row['what']}</th><td>" in page
        cells = "".join(f"<td>{html.escape(cell.removeprefix(chr(39)))}</td>" for cell in row.values())
        assert f"<tr>{cells}</tr>" in page


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (None, 2, "holds no ledger (No such file or directory); name the state folder of a gateway"),
        (b"\xff\xfe", 2, "is no ledger; name the state folder"),
        (b"{" + b"x" * (1 << 20) + b"\n", 2, "longer than 1048576 characters; name a ledger"),
        (b"hello\n", 2, "is no ledger; name the state folder"),
        (b"{hello\n", 1, "ledger entry 1 is not JSON"),
        (b'{"a":' * 100_000, 1, "ledger entry 1 is not JSON (RecursionError)"),
    ],
)
def test_what_is_no_ledger(
    tmp_path: Path, text: bytes | None, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "place"
    if text is not None:
        place.write_bytes(text)
    assert main(["audit", "verify", str(place)]) == code
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err
