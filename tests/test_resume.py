"""Where a gateway goes on from: its own last layer or the federation's, by its holdout."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from broker import messages as m
from broker.topics import GatewayPath, Uplink
from edge.candidates import start
from edge.choose import Start
from edge.config import ScoringTable, load_config
from edge.dataset import Dataset
from edge.events import StartTraining
from edge.handback import Model
from edge.memory import Memory
from edge.ring import Samples
from edge.shop import Shop
from edge.store import State
from edge.train import Job, Result, Trainer
from edge.update import seal_update
from edge.vote import judge
from models import codec
from models.delta import Vector, weights_digest
from models.drift import Reference
from models.export import export
from models.scale import Scale
from models.spec import Task, parse_task
from tests.test_drift import Floor
from tests.test_simulate import TASK, figures, rows, run

TEXT = (
    'name = "wear"\nkind = "classification"\nnet = "mlp"\n{}[window]\nlength = 4\n'
    '[[signal]]\nname = "a"\n[[signal]]\nname = "b"\n[target]\nname = "c"\nclasses = ["ok", "worn"]\n{}'
)
SCALE = Scale((0.0, 0.0), (1.0, 1.0))
X = np.random.default_rng(0).normal(size=(40, 2, 4)).astype(np.float32)
TABLE = ScoringTable()


def made(head: str = "", tail: str = "") -> Model:
    """The federation's model, which has not learnt anything."""
    task: Task = parse_task(TEXT.format(head, tail))
    graph, layout, vector = export(task, 0)
    manifest = m.ModelManifest(1, 1, 1, 1, 1, 1, bytes(32), weights_digest(vector), m.Whole(1, (bytes(32),)))
    terms = m.Terms(1, "", layout.to_wire(), m.Object("graph", 0, 1, bytes(32), (bytes(32),)))
    return Model(manifest, terms, task, layout, graph, vector)


def says(model: Model, *logits: float) -> Vector:
    """Weights that say the same of every window, and whose body is another one."""
    vector = model.vector + np.float32(0.5)
    arrays = model.layout.split(vector)
    arrays["head.weight"][:], arrays["head.bias"][:] = 0, logits
    return vector


def begun(model: Model, own: Vector | None, label: int, average: Vector | None = None) -> Start:
    holdout = Dataset(X, np.full(len(X), label, np.float32))
    return start(TABLE, model, average, own, holdout, SCALE)


def test_the_holdout_says_whose_last_layer_it_is() -> None:
    model = made()
    own, head = says(model, 0, 9), ~model.layout.mask(["head"])
    resumed, plain = begun(model, own, 1), begun(model, own, 0)
    assert resumed.own == ("head",)
    assert_array_equal(resumed.vector[head], own[head])
    assert_array_equal(resumed.vector[~head], model.vector[~head])
    assert plain == Start(plain.vector, ())
    assert_array_equal(plain.vector, model.vector)
    # The mean of models, with the same last layer.
    average = model.vector - np.float32(0.25)
    assert_array_equal(begun(model, own, 1, average).vector, np.where(head, own, average))


@pytest.mark.parametrize("case", ["no training yet", "another net's", "no holdout", "no scale", "not wanted"])
def test_without_a_reason_it_is_the_federations(case: str) -> None:
    model = made(tail="[training]\nresume = []\n" if case == "not wanted" else "")
    own: Vector | None = says(model, 0, 9)
    holdout, scale = Dataset(X, np.ones(len(X), np.float32)), SCALE
    if case == "no training yet":
        own = None
    elif case == "another net's":
        own = np.zeros(3, np.float32)
    data = Dataset(X[:0], np.zeros(0, np.float32)) if case == "no holdout" else holdout
    found = start(TABLE, model, None, own, data, None if case == "no scale" else scale)
    assert_array_equal(found.vector, model.vector)
    assert found.own == ()


def test_what_is_personal_is_its_own_in_any_case() -> None:
    model = made('personal = ["head"]\n')
    own, head = says(model, 0, 9), ~model.layout.mask(["head"])
    for label in (0, 1):
        found = begun(model, own, label)
        assert "head" in found.own
        assert_array_equal(found.vector[head], own[head])


def test_a_last_layer_that_is_turned_round_is_voted_against_by_those_who_do_not_use_it() -> None:
    before = made()
    own, holdout = says(before, 0, 9), Dataset(X, np.ones(len(X), np.float32))
    good = replace(before, vector=says(before, 0, 1))
    poisoned = replace(before, vector=says(before, 9, 0))
    assert begun(poisoned, own, 1).own == ("head",)
    vote = judge(TABLE, poisoned, good, holdout, SCALE, own)
    assert vote
    assert (vote.verdict, vote.new, vote.old) == ("against", 0, 1)


async def test_a_gateway_trains_and_scores_from_its_own_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Job, Vector]] = []
    train = Trainer.train

    async def watched(self: Trainer, job: Job, base: Vector, *more: Any) -> Result:
        given.append((job, base))
        return await train(self, job, base, *more)

    monkeypatch.setattr(Trainer, "train", watched)
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        floor = Floor(tmp_path, state, samples)
        runner = floor.runner()
        head, own = ~floor.model.layout.mask(["head"]), floor.model.vector
        # A newer model, whose last layer rebuilds nothing of this gateway's windows.
        new = replace(floor.model, vector=np.where(head, own + np.float32(3), own - np.float32(0.01)))
        runner.model = new
        await runner._train(StartTraining(1, 1, codec.EXACT, 1), None)
        job, base = given[0]
        assert job.own == ("head",)
        assert_array_equal(base, np.where(head, own, new.vector))
        await runner.scoring.offer(new, changed=True)
        scoring = Memory(state, "wear").scoring(new.layout.size)
        assert scoring is not None
        assert_array_equal(scoring[2][0][1], base)
        await runner.stop()


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    file = tmp_path / "gateway.toml"
    file.write_text('[gateway]\npath = "a/b/c/d/e"\n[mqtt]\nurl = "mqtt://127.0.0.1"\n')
    with closing(State(tmp_path)) as state, closing(Samples(tmp_path, 1 << 26)) as samples:
        yield Shop(load_config(file), tmp_path, state, samples, m.Signer.generate(), bool, print, print)


def test_an_update_is_what_was_learnt_since_the_start(shop: Shop) -> None:
    model = made()
    base = begun(model, says(model, 0, 9), 1).vector
    learnt = base + np.random.default_rng(1).normal(0, 0.1, base.size).astype(np.float32)
    task, holdout = model.task, Dataset(X, np.ones(len(X), np.float32))
    result = Result(learnt, 40, 1, 0.1, 0.1, "cpu", SCALE, Reference.learn(task, X), holdout, learnt)
    sealed = seal_update(shop, StartTraining(1, 1, codec.EXACT, 1), model, result, None, base)
    topic = Uplink(GatewayPath.parse("a/b/c/d/e"), "wear", "update").topic
    update = m.open_envelope(sealed.envelope, topic, shop.signer.public_key, m.Update)
    assert_allclose(codec.decode(update.payload, model.layout.size), learnt - base, atol=1e-7)
    assert not sealed.residual.any()
    # What its start loses is what the aggregator steers by: next to nothing, of a head that says what is so.
    assert update.base_loss == pytest.approx(0, abs=1e-3)


def contrary(folder: Path) -> Path:
    """Plants at every second of which a class means the opposite: no last layer fits all."""
    path = rows(folder)
    with np.load(path) as z:
        arrays = dict(z)
    for part in ("train", "test"):
        turned = arrays[f"client_{part}"] % 2 == 1
        arrays[f"y_{part}"] = np.where(turned, 1 - arrays[f"y_{part}"], arrays[f"y_{part}"])
    np.savez(path, **arrays)
    return path


def test_plants_that_contradict_each_other_learn_from_each_other(tmp_path: Path) -> None:
    data = contrary(tmp_path)
    resumed = figures(tmp_path, data, "--rounds", "8")
    shared = figures(tmp_path, data, "--rounds", "8", text=TASK.replace("epochs = 1", "epochs = 1\nresume = []"))
    assert resumed["federated"] > shared["federated"] + 0.1


@pytest.mark.parametrize(("key", "before"), [("personal", "[training]\n"), ("resume", "epochs = 1\n")])
def test_a_layer_that_the_net_does_not_have_is_refused(tmp_path: Path, key: str, before: str) -> None:
    text = TASK.replace(before, f'{key} = ["haed"]\n{before}')
    done = run(tmp_path, rows(tmp_path), "--rounds", "1", text=text)
    assert done.returncode == 2
    line = text[: text.index("haed")].count("\n") + 1
    assert f"task.toml:{line}: " in done.stderr
    assert f"{key}: the net has no 'haed'; this net has: body, head" in done.stderr
