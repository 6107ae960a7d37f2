"""Drift: the index by hand, what it says of windows, and a task's real runner that watches, publishes and asks."""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from broker import messages as m
from broker.messages import Signer
from broker.topics import Local, Uplink
from edge import status_command
from edge.cli import main
from edge.config import load_config
from edge.dataset import Dataset
from edge.handback import Model
from edge.memory import Memory
from edge.ring import Samples
from edge.runner import Runner
from edge.shop import Shop
from edge.store import State
from edge.tags import Quality, Sample
from edge.train import Result
from models.delta import weights_digest
from models.drift import Reference, Windows, picked
from models.export import export
from models.scale import Scale
from models.spec import Task, parse_task, task_digest

torch.set_num_threads(1)
RANDOM = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _the_same_numbers_for_each_test() -> None:
    """Whichever tests ran before, of this module or of others that use its floor."""
    RANDOM.bit_generator.state = np.random.default_rng(5).bit_generator.state


SECOND = 1_000_000_000


def task(window: str = "length = 4", tail: str = "", signals: int = 2) -> Task:
    return parse_task(text(window, tail, signals))


def text(window: str = "length = 4", tail: str = "", signals: int = 2) -> str:
    head = f'name = "wear"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\n{window}\n'
    return head + "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(signals)) + tail


def of(*values: float, signals: int = 1) -> Windows:
    """Windows (N, signals, 1) of these values."""
    return np.repeat(np.array(values, np.float32)[:, None, None], signals, 1)


def normal(count: int, *, mean: float = 0.0, signals: int = 2, length: int = 4) -> Windows:
    return RANDOM.normal(mean, 1, (count, signals, length)).astype(np.float32)


# -- the index ---------------------------------------------------------------------------------------------------------


def test_the_index_is_the_textbooks() -> None:
    one = task("length = 1", signals=1)
    known = Reference.learn(one, of(*range(1000)))
    assert known.edges[0] == tuple(range(99, 900, 100))  # "lower": a value on an edge is below it
    assert known.counts[0] == (100,) * 10
    # Half of what is new lies in the first decile, half in the last.
    new = of(*[5] * 50, *[995] * 50)
    old, filled, empty = 100.5 / 1005, 50.5 / 105, 0.5 / 105
    expected = 2 * (filled - old) * math.log(filled / old) + 8 * (empty - old) * math.log(empty / old)
    assert known.psi(picked(one, new))[0] == pytest.approx(expected)


def test_what_has_not_changed_stays_below_chance_and_a_shift_does_not() -> None:
    one = task()
    for count, more in ((200, 200), (1000, 64), (1000, 5000)):
        known = Reference.learn(one, normal(more))
        assert known.windows == more
        assert (known.psi(picked(one, normal(count))) < known.chance(count)).all()
    moved = known.psi(picked(one, np.concatenate([normal(1000, signals=1), normal(1000, mean=1, signals=1)], 1)))
    assert moved[0] < 0.1
    assert moved[1] > 0.25


def test_constants_and_few_levels_have_bins_too() -> None:
    one = task("length = 1", signals=1)
    fixed = Reference.learn(one, of(*[50.0] * 500))
    assert fixed.psi(of(*[50.0] * 500))[0] < 0.01
    assert fixed.psi(of(*[50.1] * 500))[0] > 1
    assert fixed.psi(of(*[49.9] * 500))[0] > 1
    levels = Reference.learn(one, of(*[0, 1] * 250))
    assert levels.psi(of(*[1, 0] * 250))[0] < 0.01
    assert levels.psi(of(*[0] * 450, *[1] * 50))[0] > 0.25
    assert levels.psi(of(*[-1] * 500))[0] > 1
    assert levels.psi(of(*[2] * 500))[0] > 1


def test_masked_values_are_left_out_and_a_signal_without_any_has_no_index() -> None:
    one = task("length = 1")
    x = of(*range(400), signals=2)
    x[:, 1] = math.nan
    known = Reference.learn(one, x)
    assert np.isfinite(known.psi(x)).tolist() == [True, False]
    x[:200, 0] = math.nan
    assert known.psi(x)[0] > 0.25  # of the lower half nothing is left
    assert np.isnan(known.psi(np.full((5, 2, 1), math.nan, np.float32))).all()
    assert Reference.from_json(known.to_json()) == known
    none = Reference.learn(one, np.empty((0, 2, 1), np.float32))
    assert (none.windows, none.edges) == (0, ((), ()))


def test_each_row_of_windows_that_overlap_is_counted_once() -> None:
    rows = np.arange(20, dtype=np.float32)
    for stride in (1, 3):
        windows = np.stack([rows[i : i + 6][None] for i in range(0, 15, stride)])
        seen = picked(task(f"length = 6\nstride = {stride}", signals=1), windows)
        assert sorted(seen.ravel().tolist()) == rows[6 - stride : 6 - stride + seen.size].tolist()
    many = picked(task("length = 1024\nwaveform = true", signals=20), normal(3, signals=20, length=1024))
    assert many.shape == (3, 20, 25)


def test_where_the_net_sees_no_level_there_is_no_drift_of_it() -> None:
    wave = task("length = 64\nwaveform = true", signals=1)
    known = Reference.learn(wave, normal(400, signals=1, length=64))
    louder = 5 * normal(400, signals=1, length=64) + 3
    assert known.psi(picked(wave, louder))[0] < 0.05
    square = np.sign(normal(400, signals=1, length=64))
    assert known.psi(picked(wave, square))[0] > 0.25


# -- a task's runner ---------------------------------------------------------------------------------------------------

TAIL = '[drift]\nwindows = 100\n[training]\nmin_windows = 10\n[round]\nevery = "7d"\nearly = "1h"\n'


class Floor:
    """One task of a gateway with its real state; what it publishes is kept by topic."""

    def __init__(self, folder: Path, state: State, samples: Samples, tail: str = TAIL) -> None:
        file = folder / "gateway.toml"
        (folder / "plc.csv").write_text("tag,address\na,a\nb,b\n")
        (folder / "rows.csv").write_text("a,b\n1,2\n")
        file.write_text(
            '[gateway]\npath = "a/b/c/d/e"\n[mqtt]\nurl = "mqtts://b"\n'
            '[[source]]\nname = "plc"\ndriver = "replay"\nurl = "rows.csv"\ntags = "plc.csv"\n'
            '[task.wear]\nsignals = { s0 = "plc/a", s1 = "plc/b" }\n'
        )
        self.said: dict[str, list[bytes]] = {}
        config = load_config(file)
        self.signer = Signer.generate()
        self.shop = Shop(config, folder, state, samples, self.signer, self._publish, print, print)
        self.text, self.task = text("length = 4", tail), task("length = 4", tail)
        graph, layout, vector = export(self.task, 0)
        terms = m.Terms(1, self.text, layout.to_wire(), m.Object("graph", 0, 1, bytes(32), (bytes(32),)))
        manifest = m.ModelManifest(
            1, 1, 1, 1, 1, 1, bytes(32), weights_digest(vector), m.Whole(1, (bytes(32),))
        )  # fmt: skip
        self.model = Model(manifest, terms, self.task, layout, graph, vector)
        self.memory = Memory(state, "wear")
        self.at = 0

    def _publish(self, topic: str, payload: bytes, **_: object) -> bool:
        self.said.setdefault(topic, []).append(payload)
        return True

    def trained(self) -> Result:
        """What a training leaves behind that has learnt from values around 0 and 0."""
        x, vector = normal(3000), self.model.vector
        scale = Scale.learn(self.task, x, None)
        reference = Reference.learn(self.task, x)
        return Result(vector, 3000, 1, 0.1, 0.1, "cpu", scale, reference, Dataset(normal(100), None), vector)

    def runner(self) -> Runner:
        """Start the task, as after a restart of a gateway that has trained once."""
        with self.shop.state.transaction():
            session = {"path": "a/b/c/d/e", "session": 1, "software": "0", "tasks": ["wear"], "policy": {}}
            self.shop.state.record("session", session)
            envelope = self.signer.seal(self.model.manifest, "x")
            self.memory.keep_model(self.model, envelope)
            self.memory.keep_result(self.trained(), np.zeros(1, np.float32))
        made = Runner("wear", self.shop.config.tasks["wear"], self.shop)
        made.start()
        return made

    def feed(self, runner: Runner, count: int, *, b: float = 0.0) -> None:
        for row in RANDOM.normal((0, b), 1, (count, 2)).tolist():
            self.at += 1
            tags = zip(("plc/a", "plc/b"), row, strict=True)
            runner.feed([Sample(tag, self.at * SECOND, value, Quality.GOOD) for tag, value in tags])

    def plan(self, number: int, state: str) -> m.Plan:
        digest = weights_digest(self.model.vector)
        return m.Plan(
            1, task_digest(self.text), number, 1, digest, state, number, 9, 1, 0, secure_aggregation=False
        )  # fmt: skip

    def drift(self) -> list[dict[str, Any]]:
        topic = Local(self.shop.config.path, "drift", "wear").topic
        return [json.loads(payload) for payload in self.said.get(topic, [])]

    def answers(self) -> list[m.Answer]:
        topic = Uplink(self.shop.config.path, "wear", "answer").topic
        key = self.signer.public_key
        return [m.open_envelope(sealed, topic, key, m.Answer) for sealed in self.said.get(topic, [])]

    def ledger(self, kind: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self.shop.state.ledger()]
        return [line["body"] for line in lines if line["kind"] == kind]


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[Path, State, Samples]]:
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        yield tmp_path, state, samples


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for is a thread
            await asyncio.sleep(0.01)


async def test_a_gateway_says_once_that_its_signals_drift_and_asks_for_a_round(
    stores: tuple[Path, State, Samples], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("WARNING")  # whoever ran a command in this process may have set it otherwise
    floor = Floor(*stores)
    runner = floor.runner()
    runner.on_plan(floor.plan(3, "closed"))
    floor.feed(runner, 105)
    await until(lambda: len(floor.drift()) == 1)
    said = floor.drift()[0]
    assert (said["drifted"], said["windows"], said["trained_on"]) == ([], 100, 3000)
    assert said["above"] == pytest.approx(27.88 * (1 / 100 + 1 / 3000), abs=1e-4)  # so few windows say no less
    assert all(0 < psi < said["above"] for psi in said["psi"].values())
    assert (floor.answers(), floor.ledger("drift")) == ([], [])
    # One signal moves: said, noted and asked for once, published each time.
    for times in (2, 3):
        floor.feed(runner, 100, b=2)
        await until(lambda times=times: len(floor.drift()) == times)  # type: ignore[misc]
        assert floor.drift()[-1]["drifted"] == ["s1"]
        assert floor.drift()[-1]["psi"]["s1"] > 1
    await until(lambda: floor.ledger("drift"))
    assert [(entry["task"], list(entry["psi"])) for entry in floor.ledger("drift")] == [("wear", ["s1"])]
    assert caplog.text.count("1 of 2 signals have drifted") == 1
    await until(floor.answers)
    asked = floor.answers()
    assert [(one.round, one.verdict, one.code) for one in asked] == [(3, "asks", "drift")]
    assert asked[0].reason == "1 of 2 signals have drifted (PSI above 0.29)"
    status_command._print_drift(json.loads(json.dumps(runner.status())))
    assert "DRIFT s1 " in (shown := capsys.readouterr().out)
    assert "(PSI above 0.2881; the newest 100 windows, training had 3000)" in shown
    # Again where the aggregator may not have heard it; no more once a training has seen what is new.
    runner.reconnected()
    await until(lambda: len(floor.answers()) == 2)
    assert [(entry["round"], entry["code"]) for entry in floor.ledger("asks")] == [(3, "drift")]
    assert main(["audit", "report", str(floor.shop.folder), "--out", str(floor.shop.folder / "out")]) == 0
    assert ",asks,wear,3," in (floor.shop.folder / "out" / "left-this-site.csv").read_text()
    assert floor.drift()[-1] == floor.drift()[-2]
    floor.feed(runner, 60, b=2)
    runner.scoring.take_result(floor.trained())
    assert (floor.drift()[-1]["drifted"], floor.drift()[-1]["psi"]) == ([], {})
    # What was collected stays, and what still drifts is not said again; what comes back and goes again is.
    looks = len(floor.drift())
    for more, b in ((40, 2), (100, 0), (100, 2)):
        looks += 1
        floor.feed(runner, more, b=b)
        await until(lambda looks=looks: len(floor.drift()) == looks)  # type: ignore[misc]
        assert floor.drift()[-1]["drifted"] == ["s1"] * (b > 0)
    await until(lambda: len(floor.ledger("drift")) == 2)
    assert caplog.text.count("1 of 2 signals have drifted") == 2
    await runner.stop()


async def test_where_the_task_does_not_allow_it_nobody_asks(stores: tuple[Path, State, Samples]) -> None:
    floor = Floor(*stores, tail=TAIL.replace('early = "1h"\n', ""))
    runner = floor.runner()
    runner.on_plan(floor.plan(3, "closed"))
    floor.feed(runner, 105, b=2)
    await until(lambda: floor.ledger("drift"))
    assert (floor.answers(), runner.participant.wish) == ([], "")
    await runner.stop()


async def test_a_threshold_that_moves_with_what_drifted_is_told(
    stores: tuple[Path, State, Samples], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("WARNING")  # whoever ran a command in this process may have set it otherwise
    floor = Floor(*stores)
    runner = floor.runner()
    floor.feed(runner, 105, b=3)
    await until(lambda: floor.drift() and floor.drift()[-1]["drifted"])
    assert runner.live
    assert runner.live.scorer
    before = runner.live.scorer.threshold
    result = floor.trained()
    wide = Dataset(normal(100, mean=3), None)
    result = Result(**{**result.__dict__, "holdout": wide})
    runner.scoring.take_result(result)
    await runner.scoring.elect(floor.model, floor.model, result)
    (entry,) = floor.ledger("model-chosen")
    assert entry["drifted"] == ["s1"]
    assert entry["threshold_before"] == pytest.approx(before)
    assert entry["threshold"] > 2 * before
    assert "the alarm's threshold rose from" in caplog.text
    status_command._print_drift(json.loads(json.dumps(runner.status())))
    assert "trained on what had drifted (s1)" in capsys.readouterr().out
    await runner.stop()
