"""Scoring with real sessions: verdicts, alarms, the signals behind them, and what a holdout says of a model."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from broker.messages import ModelManifest, Object, Terms, Whole
from edge.choose import GLOBAL, MIX, OWN, TUNED
from edge.config import ScoringTable
from edge.dataset import Dataset
from edge.handback import Model
from edge.history import Score
from edge.infer import Scorer, contest, elect
from edge.live import Live
from edge.tags import Quality, Sample
from edge.vote import judge
from edge.window import Wiring
from models.delta import Layout, Vector, weights_digest
from models.export import export
from models.scale import Scale
from models.spec import Task, parse_task

torch.set_num_threads(1)
SECOND = 1_000_000_000
RANDOM = np.random.default_rng(0)


def task(kind: str, tail: str = "", channels: int = 3, length: int = 4) -> Task:
    net = "autoencoder" if kind == "anomaly" else "mlp"
    head = f'name = "t"\nkind = "{kind}"\nnet = "{net}"\n[window]\nlength = {length}\n'
    return parse_task(head + "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(channels)) + tail)


TAIL = '[target]\nname = "c"\nclasses = ["ok", "worn", "torn"]\n[alarm]\nclasses = ["worn", "torn"]\n'
CLASSES = task("classification", TAIL)
NUMBER = task("regression", '[target]\nname = "r"\n[alarm]\nabove = 50.0\nbelow = -50.0\n')
ANOMALY = task("anomaly")
PLAIN = Scale((0.0, 10.0, 0.0), (1.0, 5.0, 1.0))


def build(one: Task, scale: Scale = PLAIN, edit: Any = None) -> Scorer:
    graph, layout, vector = export(one, 0)
    if edit:
        vector = edited(layout, vector, edit)
    return Scorer.build(one, 3, graph, layout, vector, scale)


def edited(layout: Layout, vector: Vector, edit: Any) -> Vector:
    vector = vector.copy()
    edit(layout.split(vector))
    return vector


def bias(*values: float) -> Any:
    """Make the net say just these numbers, whatever it sees."""

    def edit(arrays: dict[str, Vector]) -> None:
        arrays["head.weight"][:] = 0
        arrays["head.bias"][:] = values

    return edit


X = RANDOM.normal(size=(3, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("logits", "verdict", "alarm"), [((3, 0, 0), "ok", False), ((0, 2, 0), "worn", True), ((0, 0, 1), "torn", True)]
)
def test_a_class(logits: tuple[float, ...], verdict: str, *, alarm: bool) -> None:
    found = build(CLASSES, edit=bias(*logits)).score(X)
    assert (found.verdict, found.alarm) == (verdict, alarm)
    assert found.score == pytest.approx(math.exp(max(logits)) / sum(map(math.exp, logits)), rel=1e-5)


@pytest.mark.parametrize(
    ("out", "number", "verdict"), [(0.0, 20, "ok"), (3.1, 51, "alarm"), (-7.1, -51, "alarm"), (3.0, 50, "ok")]
)
def test_a_number(out: float, number: float, verdict: str) -> None:
    scale = Scale(PLAIN.mean, PLAIN.std, target_mean=20, target_std=10)
    found = build(NUMBER, scale, bias(out)).score(X)
    assert found.score == pytest.approx(number, rel=1e-5)
    assert (found.verdict, found.alarm) == (verdict, verdict == "alarm")


def test_an_anomaly_is_an_error_over_the_threshold_of_the_holdout() -> None:
    scorer = build(ANOMALY, Scale((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), bias(*[0.0] * 12))
    normal = RANDOM.normal(0, 0.1, (500, 3, 4)).astype(np.float32)
    errors = (normal**2).mean((1, 2))
    # A window a second, and one false alarm a week: far above all that was seen.
    assert scorer.metric(Dataset(normal, None)) == pytest.approx(0.01, rel=0.1)
    assert errors.max() < scorer.threshold < 4 * errors.max()
    week = scorer.threshold
    scorer.metric(Dataset(normal, None, per_week=100))
    assert scorer.threshold < week
    scorer.task = task("anomaly", "[alarm]\nquantile = 0.99\n")
    scorer.metric(Dataset(normal, None))
    assert scorer.threshold == pytest.approx(float(np.quantile(errors, 0.99)), rel=1e-4)
    verdicts = [scorer.score(x) for x in normal]
    assert sum(v.alarm for v in verdicts) == 5
    odd = normal[0].copy()
    odd[1] += 1
    found = scorer.score(odd)
    assert (found.verdict, found.alarm) == ("anomaly", True)
    assert found.score == pytest.approx(float((odd**2).mean()) / scorer.threshold, rel=1e-4)
    (name, share), *rest = scorer.contributions(odd)
    assert name == "s1"
    assert share > 0.9
    assert share + sum(s for _, s in rest) == pytest.approx(1, abs=0.002)


@pytest.mark.parametrize("one", [CLASSES, NUMBER], ids=lambda t: t.kind)
def test_the_channel_that_matters_is_named(one: Task) -> None:
    def edit(arrays: dict[str, Vector]) -> None:
        # Only channel 1 reaches the net.
        first = arrays["body.1.weight"].reshape(-1, 3, 4)
        first[:, [0, 2]] = 0

    shares = build(one, edit=edit).contributions(X)
    assert shares[0] == ("s1", 1.0)
    assert [share for _, share in shares] == [1, 0, 0]


def test_shares_of_many_channels_add_up_and_fall() -> None:
    shares = build(NUMBER).contributions(X)
    assert {name for name, _ in shares} == {"s0", "s1", "s2"}
    assert sum(share for _, share in shares) == pytest.approx(1, abs=0.002)
    assert [share for _, share in shares] == sorted((share for _, share in shares), reverse=True)


def test_what_was_masked_is_the_mean_to_the_net() -> None:
    scorer, masked, mean = build(NUMBER), X.copy(), X.copy()
    masked[1, 2] = math.nan
    mean[1, 2] = 10
    assert scorer.score(masked) == scorer.score(mean)
    assert math.isfinite(scorer.score(np.full((3, 4), math.nan, np.float32)).score)


def test_metrics_of_a_holdout() -> None:
    x = RANDOM.normal(size=(600, 3, 4)).astype(np.float32)
    y = np.arange(600, dtype=np.float32) % 3
    assert build(CLASSES, edit=bias(0, 1, 0)).metric(Dataset(x, y)) == pytest.approx(1 / 3)
    scale = Scale(PLAIN.mean, PLAIN.std, target_mean=20, target_std=10)
    assert build(NUMBER, scale, bias(1.0)).metric(Dataset(x, np.full(600, 33, np.float32))) == pytest.approx(
        3, rel=1e-4
    )
    empty = Dataset(np.empty((0, 3, 4), np.float32), np.empty(0, np.float32))
    assert math.isnan(build(CLASSES).metric(empty))


# -- live --------------------------------------------------------------------------------------------------------------


class Floor:
    """Where a task's scores go."""

    def __init__(self, one: Task, **wires: Any) -> None:
        self.said: list[dict[str, Any]] = []
        self.kept: list[Score] = []
        self.scales: list[Scale] = []
        wiring = Wiring(one.window, ("p/a", "p/b", "p/c"), **wires)
        self.live = Live(
            one,
            wiring,
            SECOND,
            lambda payload: self.said.append(json.loads(payload)),
            self.kept.append,
            self.scales.append,
        )

    def feed(self, first: int, count: int, quality: Quality = Quality.GOOD, run: float = 1.0) -> None:
        for at in range(first, first + count):
            values = {"p/a": RANDOM.normal(), "p/b": 10 + 5 * RANDOM.normal(), "p/c": 0.5, "p/run": run, "p/y": 1.0}
            samples = [
                Sample(tag, at * SECOND, float(v), quality if tag < "p/d" else Quality.GOOD)
                for tag, v in values.items()
            ]
            self.live.feed(samples)


def together(one: Scorer, other: Scorer) -> Scorer:
    return replace(one, kind=MIX, share=0.5, partners=(replace(other, share=0.5),))


def test_two_models_score_with_the_mean_of_their_probabilities_and_of_their_numbers() -> None:
    one, other = build(CLASSES, edit=bias(2, 0, 0)), build(CLASSES, edit=bias(0, 4, 0))
    x = np.zeros(CLASSES.input_shape, np.float32)
    both = together(one, other)
    mean = {"ok": (0.7870 + 0.0177) / 2, "worn": (0.1065 + 0.9647) / 2}
    verdict = both.score(x)
    assert verdict.score == pytest.approx(mean["worn"], abs=1e-3)
    assert (verdict.verdict, verdict.alarm) == ("worn", True)
    assert one.score(x).verdict == "ok"
    low, high = build(NUMBER, edit=bias(10)), build(NUMBER, edit=bias(30))
    assert together(low, high).score(x).score == pytest.approx(20)
    noise = build(ANOMALY)
    twice = together(noise, noise)
    data = Dataset(RANDOM.normal(size=(40, 3, 4)).astype(np.float32), None)
    assert twice.metric(data) == pytest.approx(noise.metric(data))
    assert twice.threshold == pytest.approx(noise.threshold)


def test_a_plant_trusts_models_by_what_they_lose_on_its_holdout() -> None:
    data = Dataset(np.zeros((200, 3, 4), np.float32), np.zeros(200, np.float32))
    right, wrong = build(NUMBER, edit=bias(0.5)), build(NUMBER, edit=bias(5))
    tuned, own = replace(right, kind=TUNED), replace(wrong, kind=OWN)
    chosen, body = elect([tuned, own], data)
    assert chosen.kind == TUNED
    assert chosen.partners == ()
    assert body["shares"] == {TUNED: 1}
    assert body["worth"] == {TUNED: pytest.approx(0.5), OWN: pytest.approx(5)}
    # Errors to both sides: the mean of both models is better than either.
    y = np.where(np.arange(200) % 2, 1, -1).astype(np.float32)
    low, high = (replace(build(NUMBER, edit=bias(b)), kind=k) for b, k in ((-1, TUNED), (1, OWN)))
    chosen, body = elect([low, high], Dataset(data.x, y))
    assert chosen.kind == body["chosen"] == MIX
    assert body["shares"] == {TUNED: 0.5, OWN: 0.5}
    assert body["worth"][MIX] == pytest.approx(1)
    nothing = elect([tuned, own, replace(right, kind=GLOBAL)], Dataset(data.x[:0], np.zeros(0, np.float32)))[1]
    assert nothing["shares"] == {TUNED: 0.333, OWN: 0.333, GLOBAL: 0.333}
    # A global model takes over from the plant's choice when it is better by more than noise, and not before.
    slightly, clearly = build(NUMBER, edit=bias(0.49)), build(NUMBER, edit=bias(0.2))
    assert not contest(slightly, tuned, data)[0]
    assert contest(clearly, tuned, data)[0]
    assert contest(slightly, right, data)[0]


def test_live_scores_say_what_when_and_by_which_model() -> None:
    from edge.window import parse_gate  # noqa: PLC0415

    floor = Floor(CLASSES, target="p/y", gate=parse_gate("p/run == 1"))
    floor.feed(1000, 10)
    assert floor.kept == []
    assert floor.said[0]["verdict"] == "learning"
    assert floor.said[0]["model"] == {"version": None, "kind": None, "age_s": None}
    floor.live.scorer, floor.live.learnt, floor.live.made_ms = (
        build(CLASSES, edit=bias(0, 5, 0)),
        True,
        1_700_000_000_000,
    )
    floor.feed(1010, 10)
    said = floor.said[-1]
    assert (said["verdict"], said["alarm"], said["reliable"], said["active"], said["quality"]) == (
        "worn",
        True,
        True,
        True,
        1,
    )
    assert said["model"]["version"] == 3
    assert said["model"]["age_s"] > 0
    assert [set(one) for one in said["top"]] == [{"signal", "share"}] * 3
    assert floor.kept[-1].verdict == "worn"
    # The machine stands: no alarm; then bad quality: no alarm either.
    floor.feed(1020, 10, run=0.0)
    assert (floor.said[-1]["verdict"], floor.said[-1]["alarm"], floor.said[-1]["active"]) == ("inactive", False, False)
    alarms = floor.live.stats.alarms
    floor.feed(1030, 10, run=1.0)
    floor.feed(1040, 10, Quality.BAD)
    assert (floor.said[-1]["alarm"], floor.said[-1]["reliable"]) == (False, False)
    stats = floor.live.stats
    assert alarms < stats.alarms <= alarms + 11
    assert 1 <= stats.alarm_events <= stats.alarms
    assert stats.scored == len(floor.kept)
    assert stats.unreliable >= 9
    assert stats.inactive >= 10
    assert 0 < stats.trainable <= stats.usable


def test_a_model_that_nobody_trained_learns_the_normal_first_and_raises_no_alarm() -> None:
    one = parse_task(
        'name = "t"\nkind = "classification"\nnet = "mlp"\n[window]\nlength = 4\n'
        + "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(3))
        + '[target]\nname = "c"\nclasses = ["ok", "worn", "torn"]\n[alarm]\nclasses = ["worn"]\n'
        + "[training]\nmin_windows = 20\n"
    )
    floor = Floor(one)
    floor.live.scorer = build(one, Scale((), ()), bias(0, 5, 0))
    floor.feed(1000, 20)
    assert floor.scales == []
    assert floor.kept == []
    floor.feed(1020, 30)
    (scale,) = floor.scales
    assert scale.mean == pytest.approx((0, 10, 0.5), abs=6)
    assert floor.kept
    assert {score.verdict for score in floor.kept} == {"learning"}
    assert floor.live.stats.alarms == 0


def model(version: int, *logits: float, one: Task = CLASSES) -> Model:
    graph, layout, vector = export(one, 0)
    vector = edited(layout, vector, bias(*logits))
    manifest = ModelManifest(
        1, version, version, version, 1, 1, bytes(32), weights_digest(vector), Whole(0, (b"0" * 32,))
    )
    terms = Terms(1, "", layout.to_wire(), Object("graph", 0, 1, bytes(32), (bytes(32),)))
    return Model(manifest, terms, one, layout, graph, vector)


def test_a_gateway_votes_by_its_own_holdout() -> None:
    y = np.array([0] * 91 + [1] * 109, np.float32)
    holdout, table = Dataset(np.zeros((200, 3, 4), np.float32), y), ScoringTable()
    ok, worn = model(4, 1, 0, 0), model(5, 0, 1, 0)
    scale, none = replace(PLAIN), (None, Dataset(holdout.x[:0], y[:0]))
    found = judge(table, worn, ok, holdout, scale, None)
    assert found
    assert (found.version, found.than, found.digest) == (5, 4, worn.manifest.digest)
    assert (found.windows, found.verdict) == (200, "for")
    assert found.new == pytest.approx(0.545)
    assert found.old == pytest.approx(0.455)
    # Worse by nine points: of twenty that are tolerated, and of five.
    assert (vote := judge(table, ok, worn, holdout, scale, None))
    assert vote.verdict == "for"
    strict = replace(ok, task=task("classification", TAIL + "[round]\ntolerance = 0.05\n"))
    assert (vote := judge(table, strict, worn, holdout, scale, None))
    assert vote.verdict == "against"
    for nothing in none:
        assert judge(table, worn, ok, nothing, scale, None) is None
    assert judge(table, worn, None, holdout, scale, None) is None
    assert judge(table, worn, ok, holdout, None, None) is None
    silent = replace(worn, task=task("classification", TAIL + '[round]\nvote = "0s"\n'))
    assert judge(table, silent, ok, holdout, scale, None) is None
