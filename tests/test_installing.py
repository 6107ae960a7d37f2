"""What a gateway installs of what is released: the aggregator's own commands, files as for a line with no way out."""

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from broker import stick
from broker.channels import Custom, target_of
from broker.genesis import put_first_model, task_row
from broker.journal import BallotRow, Journal, ModelRow
from broker.release import new_key
from edge.agent import Agent
from edge.cli import main
from edge.config import load_config
from edge.memory import Memory
from edge.probe import EndedError, Prober
from edge.ring import Samples
from edge.store import State, ledger_lines
from models import codec
from models.delta import Layout, weights_digest
from models.errors import LocalError
from models.export import export
from models.spec import parse_task
from tests.test_drift import Floor
from tests.test_models import PLAIN, offered

torch.set_num_threads(1)
WAIT_S = 60
PATH = "acme/lyon/press/line4/cell2"
TASK = 'name = "wear"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 4\n[[signal]]\nname = "T"\n'


class Office:
    """An aggregator's files: a journal that learns a version at a word, and the operator's key."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state, self.key = folder, folder / "state", folder / "release.key"
        self.config = folder / "federation.toml"
        (folder / "wear.toml").write_text(TASK)
        self.config.write_text(
            '[federation]\nname = "press"\nroots = ["acme"]\n[mqtt]\nurl = "mqtt://127.0.0.1"\n'
            f'[[task]]\nfile = "wear.toml"\n[release]\nkeys = ["{new_key(self.key)}"]\ncanary = ["{PATH}"]\n'
        )
        task = parse_task(TASK)
        graph, layout, self.first = export(task, 0)
        with closing(Journal(self.state)) as journal:
            self.public_key = journal.signer().public_key.hex()
            with journal.transaction():
                put_first_model(journal, task, TASK, graph=graph, vector=self.first, layout=layout, now_ms=1)
                journal.add_to_roster(PATH, bytes(32), 1, "enrolled")

    def learn(self, version: int) -> None:
        """Let a round have made a version."""
        vector = self.first + np.random.default_rng(version).normal(0, 0.1, self.first.size).astype(np.float32)
        weights, digest = codec.encode(vector, codec.EXACT).data, weights_digest(vector)
        now_ms = time.time_ns() // 1_000_000
        row = ModelRow(version, version, weights, digest, 3, 9, now_ms, signed_ms=now_ms)
        with closing(Journal(self.state)) as journal, journal.transaction():
            journal.put_model("wear", row)

    def regraph(self) -> None:
        """Let the task have another graph, which does the same."""
        with closing(Journal(self.state)) as journal, journal.transaction():
            row = journal.task("wear")
            assert row
            model = onnx.load_from_string(codec.inflate(row.graph, row.graph_size))
            model.doc_string = "again"
            made = task_row(row.text, model.SerializeToString(), Layout.from_json(row.layout))
            values = made.graph, made.graph_size, made.graph_digest
            journal._db.execute("UPDATE tasks SET graph = ?, graph_size = ?, graph_digest = ?", values)

    def run(self, *options: object) -> int:
        return main(["broker", *map(str, options), "-c", str(self.config), "--state", str(self.state)])

    def release(self, version: int, channel: str = "stable") -> None:
        assert self.run("release", "--to", channel, "--version", version, "--key", self.key) == 0

    def messages(self) -> dict[str, bytes]:
        """What goes to the gateway, by topic."""
        file = self.folder / "cell2.models"
        assert self.run("export", "--path", PATH, file) == 0
        return dict(stick.read(file))


def test_a_release_says_from_what_to_what_and_for_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    office = Office(tmp_path)
    with closing(Journal(office.state)) as journal, journal.transaction():
        journal.add_to_roster(PATH, bytes(32), 0, "enrolled")
    for version in (1, 2, 3):
        office.learn(version)

    def says(verb: str, *options: object) -> list[str]:
        capsys.readouterr()
        assert office.run(verb, *options, "--key", office.key) == 0
        return capsys.readouterr().out.splitlines()

    at_once = "no canary was given version {}: all gateways get it at once (--to canary lets some try it first)"
    of = "release {} of wear: version {} for {}".format
    assert says("release", "--to", "stable", "--version", 1) == [of(1, 1, "all gateways"), at_once.format(1)]
    assert says("release", "--to", "canary", "--version", 2) == [of(2, 2, PATH)]
    line = "stable goes from version 1 to 2, canaries too"
    assert says("release", "--to", "stable") == [of(3, 2, "all gateways"), line]
    assert says("release", "--to", "canary", "--version", 3) == [of(4, 3, PATH), "canary goes from version 2 to 3"]
    assert says("rollback", "--channel", "canary") == [of(5, 2, PATH), "canary goes back from version 3 to 2"]
    line = "stable goes back from version 2 to 1, canaries too"
    assert says("rollback") == [of(6, 1, "all gateways"), line]
    line = "stable had version 2 before; what is newer goes to canaries first: --to canary"
    says("release", "--to", "stable")
    assert says("release", "--to", "stable") == [of(8, 2, "all gateways"), line]
    assert says("release", "--to", "canary", "--version", 2) == [of(9, 2, PATH), "canary had version 2 before"]
    office.config.write_text(office.config.read_text().replace(PATH, f"{PATH}2"))
    line = f"[release] canary {PATH}2 is not in the roster: write the path as tundish broker status shows it"
    assert line in says("release", "--to", "canary")
    for to, why in (("canary", "'canary' is a channel: write --channel canary"), ("v1", "'v1' is no version: write")):
        with pytest.raises(SystemExit) as caught:
            office.run("rollback", "--to", to)
        assert caught.value.code == 2
        assert f"argument --to: {why}" in (err := capsys.readouterr().err)
        assert err.count("\n") == 1


class Cell:
    """A gateway's process, here, whose broker can't be reached."""

    def __init__(self, folder: Path, office: Office) -> None:
        self.folder, self.office, self.file = folder / "gateway", office, folder / "gateway.toml"
        (folder / "plc.csv").write_text("tag,address\na,a\n")
        (folder / "rows.csv").write_text("a\n1\n")
        self.file.write_text(
            f'[gateway]\npath = "{PATH}"\n[mqtt]\nurl = "mqtt://127.0.0.1:1"\n'
            f'[federation]\nname = "press"\nkey = "{office.public_key}"\n'
            '[[source]]\nname = "plc"\ndriver = "replay"\nurl = "rows.csv"\ntags = "plc.csv"\n'
            '[task.wear]\nsignals = { T = "plc/a" }\n'
        )

    @asynccontextmanager
    async def runs(self) -> AsyncIterator["Cell"]:
        self.agent = Agent(load_config(self.file), self.folder, partial(load_config, self.file))
        running = asyncio.create_task(self.agent.run())
        try:
            yield self
            assert not running.done(), running.exception()
        finally:
            self.agent.stop()
            await running

    def take(self, messages: dict[str, bytes], *, without: str = "-") -> None:
        """Bring a file of messages, but for those whose topic has some word in it."""
        file = self.folder / "brought"
        stick.write(file, [(topic, data) for topic, data in messages.items() if without not in topic])
        stick.leave(self.folder, file)

    @property
    def task(self) -> dict[str, Any]:
        return self.agent.snapshot()["tasks"]["wear"]  # type: ignore[index, no-any-return]

    def ledger(self, *kinds: str) -> list[dict[str, Any]]:
        """The ledger's entries of some kinds."""
        entries = [json.loads(line) for line in ledger_lines(self.folder)]
        return [entry for entry in entries if entry["kind"] in kinds]

    async def until(self, **status: object) -> None:
        await self.when(lambda: self.task | status == self.task)

    async def when(self, condition: Callable[[], object]) -> None:
        try:
            async with asyncio.timeout(WAIT_S):
                while not condition():  # noqa: ASYNC110 - what is waited for happens in threads and children
                    await asyncio.sleep(0.02)
        except TimeoutError:
            pytest.fail(str(self.agent.snapshot()))

    async def taken(self) -> None:
        """Wait until all that was brought has been heard, and nothing of it is left to be fetched."""
        await self.when(lambda: not any((self.folder / stick.INBOX).iterdir()))


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def forged(messages: dict[str, bytes], thief: CryptoSigner, change: Callable[[dict[str, Any]], None]) -> None:
    """Let some of the metadata say something else, signed by the online key."""
    prefix = "_fl/press/_release/"
    made = {name: Metadata[Any].from_bytes(messages[prefix + name]) for name in ("canary", "snapshot", "timestamp")}
    change({name: one.signed for name, one in made.items()})
    for name, one in made.items():
        one.sign(thief)
        messages[prefix + name] = one.to_bytes()


async def test_numbers_of_releases_begin_anew_under_another_online_key(office: Office, tmp_path: Path) -> None:
    for version in (1, 2):
        office.learn(version)
    office.release(1)
    office.release(2, "canary")
    with closing(Journal(office.state)) as journal:
        key = journal.signer("release").to_bytes()
    thief = CryptoSigner(Ed25519PrivateKey.from_private_bytes(key))
    cell, last = Cell(tmp_path, office), 2**53

    def highest(signed: dict[str, Any]) -> None:
        """The highest release that can be said, of the version that the canary has."""
        name = target_of("canary", "wear", PATH)
        one: TargetFile = signed["canary"].targets[name]
        custom = one.unrecognized_fields["custom"]
        one.unrecognized_fields["custom"] = msgspec.to_builtins(Custom(last, custom["version"], custom["model"]))
        for role in signed.values():
            role.version += 9
        signed["snapshot"].meta["canary.json"] = MetaFile(signed["canary"].version)
        signed["timestamp"].snapshot_meta = MetaFile(signed["snapshot"].version)

    async with cell.runs():
        cell.take(office.messages())
        await cell.until(release=2, scoring_model=2, model=2)
        bad = office.messages()
        forged(bad, thief, highest)
        cell.take(bad)
        await cell.until(release=last)
        office.release(1)
        cell.take(office.messages())
        await cell.when(lambda: "BadVersionNumberError" in str(cell.agent.snapshot()["problem"]))
        assert office.run("release", "--new-online-key", "--key", office.key) == 0
        cell.take(office.messages())
        await cell.until(release=3, scoring_model=1, problem="")
        assert cell.agent.snapshot()["problem"] == ""
        office.release(2, "canary")
        cell.take(office.messages())
        await cell.until(release=4)
    async with cell.runs():  # it is known after a restart, too
        assert (cell.task["release"], cell.task["problem"]) == (4, "")
        assert office.run("release", "--new-online-key", "--key", office.key) == 0
        runner, tried = cell.agent.runners["wear"], len(cell.ledger("model-adopted", "model-kept"))
        installer, before = runner.installer, runner.installer.key
        cell.take(office.messages())
        await cell.when(lambda: installer.key != before)
        # The same model by another key is not fetched, and tried, again.
        assert (cell.task["release"], len(cell.ledger("model-adopted", "model-kept"))) == (4, tried)
        # A journal that was restored may give a number twice: that is told.
        assert installer._wanted
        installer.on_release(replace(installer._wanted, digest=bytes(32)), runner.model)
        assert cell.task["problem"] == "release 4 is another one than that which is installed and stays"


async def test_a_model_that_a_full_disk_kept_from_scoring_is_taken_once(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.runner.RETRY_S", 0.1)
    keep, refused = Memory.keep_scoring, list[int]()

    def full(self: Memory, version: int, *what: Any) -> None:
        """The disk is full once, after the model itself was stored."""
        if version > 1 and not refused:
            refused.append(version)
            raise LocalError("database or disk is full")
        keep(self, version, *what)

    monkeypatch.setattr(Memory, "keep_scoring", full)
    cell = Cell(tmp_path, office)
    async with cell.runs():
        for version in (1, 2):
            office.learn(version)
            cell.take(office.messages())
            # It scores before that is stored; the ledger tells both.
            await cell.when(lambda version=version: len(cell.ledger("model-adopted")) == version)  # type: ignore[misc]
            await cell.until(model=version, scoring_model=version, problem="")
            if version == 1:
                first = cell.agent.runners["wear"].model
        second, average = cell.agent.runners["wear"].model, cell.agent.runners["wear"].scoring.average
        assert first and second and average is not None  # noqa: PT018
        assert refused == [2]
        assert np.allclose(average, first.vector + 0.25 * (second.vector - first.vector))


async def test_without_the_metadata_of_releases_no_candidate_scores(office: Office, tmp_path: Path) -> None:
    office.learn(1)
    cell, said = Cell(tmp_path, office), office.messages()
    async with cell.runs():
        cell.take(said)
        await cell.until(model=1, scoring_model=1, problem="")  # as yet nobody has released anything
        office.release(1)
        cell.take(office.messages(), without="_release/")  # the model is the same, and its manifest says so
        await cell.when(lambda: "their metadata is missing" in str(cell.agent.snapshot()["problem"]))
        office.learn(2)
        cell.take(office.messages(), without="_release/")
        await cell.until(model=2)
        await cell.taken()
        assert (cell.task["scoring_model"], cell.task["release"]) == (1, 0)
    async with cell.runs():  # it is known after a restart, whatever is withheld then
        office.learn(3)
        cell.take(office.messages(), without="_release/first")
        await cell.until(model=3)
        await cell.taken()
        assert (cell.task["scoring_model"], cell.task["release"]) == (1, 0)
        assert "their metadata is missing" in str(cell.agent.snapshot()["problem"])
        office.release(3)
        cell.take(office.messages())
        await cell.until(release=2, scoring_model=3)
        assert cell.agent.snapshot()["problem"] == ""


async def test_one_that_is_new_waits_for_the_metadata_of_releases(office: Office, tmp_path: Path) -> None:
    office.learn(1)
    office.release(1)
    office.learn(2)
    cell = Cell(tmp_path, office)
    async with cell.runs():
        cell.take(office.messages(), without="_release/first")
        await cell.until(model=2)
        await cell.taken()
        assert (cell.task["scoring_model"], cell.task["state"]) == (None, "idle")
        cell.take(office.messages())
        await cell.until(release=1, scoring_model=1, model=2)
        assert cell.agent.snapshot()["problem"] == ""


async def test_a_model_that_is_voted_down_meanwhile_is_not_released(
    office: Office, capsys: pytest.CaptureFixture[str]
) -> None:
    office.learn(1)
    command = partial(office.run, "release", "--to", "stable", "--key", office.key)
    with closing(Journal(office.state)) as journal:
        with journal.transaction():
            running = asyncio.create_task(asyncio.to_thread(command))
            await asyncio.sleep(1)  # until it waits for this transaction
            journal.open_ballot("wear", BallotRow(1, 0, 1, b"", b""))
            journal.close_ballot("wear", 1, kept=False)
        assert await running == 1
        assert "no model of wear may be released yet" in capsys.readouterr().err
        assert (journal.releases("wear"), journal.metadata()) == ([], {})


def graph_runs() -> list[int]:
    """Children of this process that run a graph for the first time."""
    found = list[int]()
    for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        with contextlib.suppress(OSError):
            if b"models.graphcheck" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def end_first_runs(times: int = 1) -> None:
    """Kill the next such children."""
    until, ended = time.monotonic() + WAIT_S, set[int]()
    while time.monotonic() < until:
        for pid in set(graph_runs()) - ended:  # one that was killed is there until it is waited for
            os.kill(pid, signal.SIGKILL)
            ended.add(pid)
        if len(ended) == times:
            return
        time.sleep(0.005)
    pytest.fail("no graph was run")


async def test_a_fault_of_this_machine_makes_no_release_forgotten(office: Office, tmp_path: Path) -> None:
    office.learn(1)
    cell = Cell(tmp_path, office)
    async with cell.runs():
        cell.take(office.messages())
        await cell.until(model=1)
        await cell.taken()
        # Its graph is a new one here, and its first run is ended, as where memory runs out.
        office.regraph()
        office.release(1)
        said, ended = office.messages(), asyncio.create_task(asyncio.to_thread(end_first_runs))
        cell.take(said, without="model/manifest")
        await ended
        yet = "release 1 can't be installed yet: the graph's first run was ended from outside, by SIGKILL; try 1,"
        await cell.when(lambda: cell.task["problem"].startswith(yet))
        await cell.until(release=1, scoring_model=1, problem="")
        # A disk that is read-only for a while.
        state = cell.agent.state._db
        state.execute("PRAGMA query_only = ON")
        office.learn(2)
        office.release(2)
        cell.take(office.messages(), without="model/manifest")
        await cell.when(lambda: "release 2 can't be installed yet: state can't be stored" in cell.task["problem"])
        assert cell.task["release"] == 1
        state.execute("PRAGMA query_only = OFF")
        await cell.until(release=2, scoring_model=2, problem="")
    installed = [entry["body"]["release"] for entry in cell.ledger("release-installed")]
    assert installed == [1, 2]


async def test_a_first_run_that_is_ended_is_tried_again_however_often(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("runner", "installer"):
        monkeypatch.setattr(f"edge.{user}.RETRY_S", 0.05)
    monkeypatch.setattr("edge.probe._SHORTEST_S", 0.001)
    cell = Cell(tmp_path, office)
    async with cell.runs():
        ends = asyncio.create_task(asyncio.to_thread(end_first_runs, 7))  # of a candidate
        cell.take(office.messages())
        await cell.when(lambda: "model 0 can't be taken yet: the graph's first run was ended" in cell.task["problem"])
        await ends
        await cell.until(model=0, scoring_model=0, problem="")
        office.regraph()
        office.learn(1)
        office.release(1)
        ends = asyncio.create_task(asyncio.to_thread(end_first_runs, 3))
        cell.take(office.messages())
        await ends
        await cell.until(release=1, model=1, scoring_model=1, problem="")


async def test_a_graph_whose_first_run_is_ended_again_and_again_is_run_ever_more_seldom(tmp_path: Path) -> None:
    now = [0.0]
    prober, model = Prober(tmp_path, lambda: now[0]), offered(PLAIN.SerializeToString())
    for tries, wait_s in enumerate((2, 4, 8), 1):
        ends = asyncio.create_task(asyncio.to_thread(end_first_runs))
        with pytest.raises(EndedError, match=f"by SIGKILL; try {tries}, and it is tried again"):
            await prober.run(model)
        await ends
        now[0] += wait_s - 0.5
        with pytest.raises(EndedError, match=f"by SIGKILL; try {tries}, "):
            await prober.run(model)  # nobody ends this one: it is not run
        now[0] += 0.5
    await prober.run(model)


@pytest.mark.parametrize("before", [False, True])
async def test_who_is_told_of_releases_elects_nothing_of_the_federation(tmp_path: Path, *, before: bool) -> None:
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        floor = Floor(tmp_path, state, samples)
        model, result, releases = floor.model, floor.trained(), floor.shop.releases
        result = replace(result, own=result.vector + 1e-3)
        if before:
            releases.tell(msgspec.structs.replace(model.manifest, released=True))
            await releases._telling
        runner = floor.runner()
        live, scoring = runner.live, runner.scoring
        assert live
        scoring.begin()
        await scoring.elect(model, model, result)
        scorer = live.scorer
        assert scorer
        assert scorer.kind == ("own" if before else "mix")
        if not before:  # what scored goes on
            releases.tell(msgspec.structs.replace(model.manifest, released=True))
            await releases._telling
            await scoring.elect(model, model, result)
            assert live.scorer is scorer
        await runner.stop()
