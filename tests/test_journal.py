"""The journal: what was committed is there after kill -9, and a file of another schema is left alone."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from broker import ledger
from broker.config import TaskFile
from broker.genesis import ensure_model, put_first_model
from broker.job import load_job
from broker.journal import Journal, ModelRow, TaskRow
from models.delta import Layout
from models.errors import LocalError, UserError
from models.spec import parse_task

TASK_ROW = TaskRow("text", "[]", b"graph", 5, bytes(32))
WRITER = """
import sys
from pathlib import Path
from broker.journal import Journal
journal = Journal(Path(sys.argv[1]))
for i in range(1, 100000):
    with journal.transaction():
        for path in ("a", "b", "c"):
            journal.count_update("t", i, path, digest=bytes(32), samples=i, metric=None, payload=bytes(2000), now_ms=i)
        journal.note(i, "update", {"round": i})
    print(i, flush=True)
"""


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "state")


def count(journal: Journal, number: int, path: str, payload: bytes = b"p", samples: int = 3) -> None:
    journal.count_update(
        "t", number, path, digest=path.encode() * 32, samples=samples, metric=0.5, payload=payload, now_ms=9
    )


def test_keeps_its_key_to_itself(tmp_path: Path) -> None:
    os.umask(0o022)
    journal = Journal(tmp_path / "state")
    key = journal.signer().public_key
    for file in (tmp_path / "state").iterdir():
        assert file.stat().st_mode & 0o777 == 0o600, file
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    journal.close()
    assert Journal(tmp_path / "state").signer().public_key == key


def count_both(journal: Journal, path: str, other: str | None) -> None:
    with journal.transaction():
        count(journal, 1, path)
        if other is None:
            raise KeyError
        count(journal, 1, other)


def test_all_or_nothing(journal: Journal) -> None:
    with journal.transaction():
        count(journal, 1, "a")
    with pytest.raises(KeyError):
        count_both(journal, "b", None)
    with pytest.raises(LocalError, match="UNIQUE"):
        count_both(journal, "c", "a")
    assert journal.counted("t", 1) == {"a": b"a" * 32}
    assert journal.was_counted("t", 1, "a")
    assert not journal.was_counted("t", 1, "b")


def test_a_round_and_its_updates(journal: Journal) -> None:
    assert journal.latest_round("t") is None
    with journal.transaction():
        journal.put_task("t", TASK_ROW)
        journal.open_round("t", 1, 0, 10, 20, 7)
        journal.extend_round("t", 1, 10, 30)
        for path, samples in (("b", 2), ("a", 1), ("c", 3)):
            count(journal, 1, path, path.encode(), samples)
    assert journal.latest_round("t") == (1, 0, 10, 30, "open", 7)
    assert list(journal.payloads("t", 1)) == [(b"a", 1, 0), (b"b", 2, 0), (b"c", 3, 0)]
    assert journal.totals("t", 1) == (3, 6, 0)
    with journal.transaction():
        journal.put_model("t", ModelRow(1, 1, b"weights", bytes(32), 3, 6, 40))
        journal.close_round("t", 1, 40, 1, b"state")
    assert journal.latest_round("t") == (1, 0, 10, 30, "closed", 7)
    assert journal.strategy_state("t") == b"state"
    # Payloads are gone, digests are not.
    assert [payload for payload, *_ in journal.payloads("t", 1)] == [None] * 3
    assert journal.was_counted("t", 1, "a")


def test_what_is_late_is_counted_in_a_later_round(journal: Journal) -> None:
    with journal.transaction():
        journal.put_task("t", TASK_ROW)
        for number in (1, 2, 3):
            journal.open_round("t", number, number - 1, 10, 20)
        for path, number in (("a", 1), ("b", 3), ("a", 3)):
            journal.count_update(
                "t", number, path, digest=bytes(32), samples=2 * number, metric=None, payload=path.encode(),
                now_ms=1, counted_in=3,
            )  # fmt: skip
    assert list(journal.payloads("t", 3)) == [(b"a", 2, 2), (b"a", 6, 0), (b"b", 6, 0)]
    assert journal.totals("t", 3)[:2] == (2, 14)
    assert journal.totals("t", 3).age == pytest.approx(4 / 14)
    assert journal.totals("t", 1) == (0, 0, 0)
    assert journal.older("t", 3) == {("a", 1)}
    assert journal.counted("t", 3).keys() == {"a", "b"}
    assert journal.was_counted("t", 1, "a")
    assert journal.bases("t", 2) == {2: 1, 3: 2}
    with journal.transaction():
        journal.close_round("t", 3, 40, 3, b"")
    assert [payload for payload, *_ in journal.payloads("t", 3)] == [None] * 3


def test_losses_by_gateway(journal: Journal) -> None:
    with journal.transaction():
        for path, loss in (("b", 0.5), ("a", 0.25), ("c", None)):
            journal.count_update(
                "t", 1, path, digest=bytes(32), samples=7, metric=None, payload=b"", now_ms=1, base_loss=loss
            )
    assert journal.losses("t", 1) == {"a": (0.25, 7), "b": (0.5, 7)}
    assert journal.losses("t", 2) == {}


def test_models_and_tasks(journal: Journal) -> None:
    assert journal.model("t") is None
    assert journal.task("t") is None
    rows = [ModelRow(v, v, bytes([v]), bytes(32), 1, 2, 3) for v in range(3)]
    with journal.transaction():
        journal.put_task("t", TASK_ROW)
        for row in rows:
            journal.put_model("t", row)
        journal.put_task("t", TASK_ROW._replace(text="changed"))
    assert journal.model("t") == rows[2]
    assert journal.model("t", 1) == rows[1]
    assert journal.model("t", 7) is None
    assert journal.task("t") == TASK_ROW._replace(text="changed")


def test_the_roster_is_seen_by_a_second_process(tmp_path: Path, journal: Journal) -> None:
    before = journal.data_version()
    other = Journal(tmp_path / "state")
    with other.transaction():
        other.add_to_roster("a/b/c/d/e", bytes(32), 1, "enrolled")
        other.note(1, "enrolled", {})
    assert journal.data_version() != before
    assert journal.roster() == {"a/b/c/d/e": bytes(32)}
    assert journal.key_of("a/b/c/d/e") == bytes(32)
    assert journal.roster_size() == 1
    with journal.transaction():
        journal.note(2, "more", {})
    ledger.verify(journal.ledger_lines())


def test_the_first_model(journal: Journal) -> None:
    text = 'name = "t"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 2\n[[signal]]\nname = "s"\n'
    layout = Layout(("w",), ((3,),))
    with journal.transaction():
        vector = np.ones(3, np.float32)
        put_first_model(journal, parse_task(text), text, graph=b"g", vector=vector, layout=layout, now_ms=1)
    assert journal.task("t").layout == '[["w", [3]]]'  # type: ignore[union-attr]
    assert journal.model("t").version == 0  # type: ignore[union-attr]


def test_a_prefix_that_keeps_nothing_back_may_go(journal: Journal, tmp_path: Path) -> None:
    """A task from before such a prefix was refused, which no aggregator takes as it is any more."""
    layout, vector = Layout(("body.w", "head.w"), ((3,), (2,))), np.ones(5, np.float32)

    def file(personal: str) -> TaskFile:
        text = (
            f'name = "t"\nkind = "anomaly"\nnet = "autoencoder"\npersonal = {personal}\n'
            '[window]\nlength = 2\n[[signal]]\nname = "s"\n'
        )
        return TaskFile(parse_task(text), text, tmp_path / "task.toml")

    old, mended = file('["head", "adapter"]'), file('["head"]')
    with journal.transaction():
        put_first_model(journal, old.task, old.text, graph=b"g", vector=vector, layout=layout, now_ms=1)
    with pytest.raises(UserError, match="the net has no 'adapter'"):
        load_job(journal, old)
    asyncio.run(ensure_model(journal, mended, 2))
    assert load_job(journal, mended).shared.tolist() == [True] * 3 + [False] * 2
    for other in ("[]", '["body"]', '["head", "body"]'):
        with pytest.raises(UserError, match=r"""the model of task 't' was made, with \["head"\]; undo it"""):
            asyncio.run(ensure_model(journal, file(other), 3))


def test_a_first_model_that_takes_too_long(journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'name = "t"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 2\n[[signal]]\nname = "s"\n'
    monkeypatch.setattr("broker.genesis._TIMEOUT_S", 0)
    with pytest.raises(LocalError, match="no first model in 0 s"):
        asyncio.run(ensure_model(journal, TaskFile(parse_task(text), text, tmp_path / "task.toml"), 1))
    assert journal.task("t") is None


def test_kill_9_loses_nothing_committed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "state")], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout
        deadline = time.monotonic() + 60
        promised = 0
        while promised < 50 and time.monotonic() < deadline:
            promised = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
    promised = int(rest[-1]) if rest else promised
    journal = Journal(tmp_path / "state")
    ledger.verify(journal.ledger_lines())
    lines = len(list(journal.ledger_lines()))
    assert lines in (promised, promised + 1)
    for number in range(1, lines + 1):
        assert journal.counted("t", number).keys() == {"a", "b", "c"}
    assert journal.counted("t", lines + 1) == {}


def test_a_full_disk_is_named_and_costs_nothing_that_was_committed(journal: Journal) -> None:
    with journal.transaction():
        count(journal, 1, "a")
    journal._db.execute("PRAGMA cache_size = 5")  # what is changed goes to the disk before the end
    journal._db.execute("PRAGMA max_page_count = 40")

    def many() -> None:
        with journal.transaction():
            for number in range(2, 200):
                count(journal, number, "a", bytes(5000))

    with pytest.raises(LocalError, match="disk is full; check the disk"):
        many()
    with journal.transaction():
        count(journal, 2, "a")
    assert [journal.counted("t", number).keys() for number in (1, 2, 3)] == [{"a"}, {"a"}, set()]


def test_a_lost_table_is_this_machines_fault(journal: Journal) -> None:
    journal._db.execute("DROP TABLE roster")
    with pytest.raises(LocalError, match="no such table: roster; check the disk"):
        journal.roster()


def test_one_aggregator_a_folder(tmp_path: Path, journal: Journal) -> None:
    journal.claim()
    with pytest.raises(LocalError, match="another aggregator"):
        Journal(tmp_path / "state").claim()
    journal.close()
    Journal(tmp_path / "state").claim()


def test_what_is_committed_stays_when_others_have_come_and_gone(tmp_path: Path, journal: Journal) -> None:
    """One in this process, as for an enrolment over the network; then one in another, as for `broker enrol`."""
    folder = tmp_path / "state"
    with journal.transaction():
        journal.add_to_roster("a/b/c/d/e", bytes(32), 1, "enrolled")
    Journal(folder).close()
    other = "import sys, pathlib; from broker.journal import Journal; Journal(pathlib.Path(sys.argv[1])).close()"
    subprocess.run([sys.executable, "-c", other, str(folder)], check=True)
    with journal.transaction():
        journal.add_to_roster("a/b/c/d/f", bytes(32), 1, "enrolled")
    look = "import sys, sqlite3; print(*sqlite3.connect(sys.argv[1]).execute('SELECT count(*) FROM roster').fetchone())"
    seen = subprocess.run([sys.executable, "-c", look, str(folder / "journal.db")], check=True, capture_output=True)
    assert seen.stdout == b"2\n"


def test_refuses_an_unknown_schema(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    db = sqlite3.connect(tmp_path / "journal.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LocalError, match="schema 99"):
        Journal(tmp_path)


_WITH_KEYS = 10  # the first schema with X25519 keys
_TO_12 = "ALTER TABLE models DROP COLUMN signed_ms;"
_TO_11 = f"{_TO_12} DROP TABLE looked;"
_TO_10 = f"{_TO_11} ALTER TABLE rounds DROP COLUMN roster_ms;"
_TO_9 = f"{_TO_10} ALTER TABLE roster DROP COLUMN session; ALTER TABLE roster DROP COLUMN agreement_key;"
_TO_8 = f"{_TO_9} DROP TABLE receipts;"
_TO_7 = f"{_TO_8} DROP TABLE metadata; DROP TABLE releases;"
_TO_6 = f"{_TO_7} DROP TABLE ballots; DROP TABLE votes;"
_TO_5 = f"{_TO_6} DROP TABLE tokens;"
_TO_4 = _TO_5 + "".join(
    f"ALTER TABLE updates {change};"
    for change in (
        "DROP COLUMN counted_in", "DROP COLUMN base_loss", "ADD COLUMN base_metric REAL", "ADD COLUMN base_loss REAL",
        "ADD COLUMN counted_in INTEGER",
    )
)  # fmt: skip
_TO_3 = f"{_TO_4} ALTER TABLE updates DROP COLUMN counted_in;"
_TO_2 = f"{_TO_3} ALTER TABLE updates DROP COLUMN base_loss;"
UNDO = {
    1: f"{_TO_2} ALTER TABLE tasks DROP COLUMN residual; ALTER TABLE models DROP COLUMN step;"
    "ALTER TABLE updates DROP COLUMN base_metric;",
    2: _TO_2,
    3: _TO_3,
    4: _TO_4,
    5: _TO_5,
    6: _TO_6,
    7: _TO_7,
    8: _TO_8,
    9: _TO_9,
    10: _TO_10,
    11: _TO_11,
    12: _TO_12,
}


def columns(folder: Path) -> dict[str, list[str]]:
    """The columns of each table in their order, which inserts rely on."""
    with closing(sqlite3.connect(folder / "journal.db")) as db:
        names = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: [row[1] for row in db.execute(f"PRAGMA table_info({name})")] for name in names}


@pytest.mark.parametrize("version", UNDO)
def test_takes_up_a_journal_of_the_schema_before(tmp_path: Path, version: int) -> None:
    row = ModelRow(0, 0, b"weights", bytes(32), 0, 0, 1, signed_ms=1)
    journal = Journal(tmp_path)
    with journal.transaction():
        journal.put_task("wear", TaskRow("", "[]", b"", 0, b""))
        journal.put_model("wear", row)
        journal.add_to_roster("a/b/c/d/e", bytes(32), 1, "enrolled")
        journal.put_agreement_key("a/b/c/d/e", bytes(32), 5)
        journal.put_looked(1)
    journal.close()
    tables = columns(tmp_path)
    db = sqlite3.connect(tmp_path / "journal.db")
    db.executescript(f"{UNDO[version]} PRAGMA user_version = {version};")
    db.close()
    for _ in range(2):
        journal = Journal(tmp_path)
        assert journal.has_looked()  # its aggregator had begun
        assert list(journal.members()) == [("a/b/c/d/e", bytes(32), bytes(32) if version >= _WITH_KEYS else None)]
        assert (journal.residual("wear"), journal.model("wear"), journal.steps("wear", 0, 8)) == (b"", row, [])
        with journal.transaction():
            journal.put_residual("wear", b"")
        journal.close()
    assert columns(tmp_path) == tables
    journal = Journal(tmp_path)
    with journal.transaction():
        count(journal, 1, "a")
    journal.close()


def test_a_journal_of_the_schema_before_whose_aggregator_never_began_has_not_looked(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "journal.db")) as db:
        db.executescript(f"{_TO_11} PRAGMA user_version = 11;")
    with closing(Journal(tmp_path)) as journal:
        assert not journal.has_looked()
        with journal.transaction():
            journal.put_looked(1)
        assert journal.has_looked()


def test_an_agreement_key_gives_way_to_that_of_a_later_birth_alone(journal: Journal) -> None:
    path, old, new = "a/b/c/d/e", b"o" * 32, b"n" * 32

    def known() -> list[bytes | None]:
        return [key for _, _, key in journal.members()]

    with journal.transaction():
        journal.put_agreement_key(path, old, 5)
        assert known() == []  # a stranger's
        journal.add_to_roster(path, bytes(32), 1, "enrolled")
        for key, session, kept in ((None, 0, None), (old, 5, old), (new, 5, old), (old, 9, old), (new, 10, new)):
            if key:
                journal.put_agreement_key(path, key, session)
            assert known() == [kept]
        journal.put_agreement_key(path, old, 9)  # said before, and heard again
        assert known() == [new]
        journal.add_to_roster(path, bytes(32), 2, "enrolled")  # of a new enrolment nothing is known yet
        journal.put_agreement_key(path, old, 9)
        assert known() == [old]


def test_steps_lead_to_a_version_without_a_gap(journal: Journal) -> None:
    with journal.transaction():
        for version, step in enumerate((None, b"1", None, b"3", b"4", b"5")):
            journal.put_model("wear", ModelRow(version, version, b"", bytes(32), 0, 0, 1, step))
    assert journal.steps("wear", 5, 8) == [b"5", b"4", b"3"]
    assert journal.steps("wear", 5, 2) == [b"5", b"4"]
    assert journal.steps("wear", 1, 8) == [b"1"]
    assert journal.steps("wear", 2, 8) == []


def test_refuses_what_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database" * 100)
    with pytest.raises(LocalError, match="not a database"):
        Journal(tmp_path)
