"""`tundish simulate`: a whole federation in one process, on recorded data: no sockets, no clock, the same every time.

The state machines, the codec, the strategies, the messages and the training are the ones that gateways and aggregator
run; only the link between them is a function call, and time a counter. Trainings run on all cores.
"""

import argparse
import importlib.util
import json
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import msgspec
import numpy as np

from broker import federation, messages, topics
from broker import round as rounds
from broker.aggregate import next_model
from broker.genesis import weights_digest
from edge import participant as p
from edge.choose import GLOBAL, MIX, OWN, TUNED, choose, mixed
from edge.config import Policy
from edge.infer import Scorer
from edge.lab.down import Down
from edge.lab.fleet import ALL, Site, Workers, complete_task, load_sites, metric_of
from models import codec, evaluate
from models.delta import Layout, Vector
from models.errors import LocalError, UserError
from models.spec import MOST_KEPT, Task, parse_task

_FRACTIONS = (0.92, 0.95, 0.98)
# Tuning at each plant after the last round takes this part of the passes of all rounds.
_TUNE = 5


@dataclass
class Gateway:
    """One plant's half: its state machine, its key, and the error that its last updates left."""

    site: Site
    path: str
    signer: messages.Signer
    machine: p.Participant
    residual: Vector
    steps: int = 0
    sent: list[int] = field(default_factory=list)


class Fleet:
    """Aggregator and gateways joined by function calls."""

    def __init__(self, task: Task, layout: Layout, down: Down, sites: list[Site], count: int, seed: int) -> None:
        self.task, self.layout, self.down, self.seed = task, layout, down, seed
        self.vector = vector = codec.decode(down.rows[0].weights, layout.size)
        self.shared = layout.mask(task.personal)
        self.personal = [vector.copy() for _ in sites]
        self.random = np.random.default_rng(seed)
        self.now, self.version, self.state = 0, 0, b""
        self.payloads: dict[str, tuple[bytes, int]] = {}
        self.gateways = {
            path: Gateway(
                site,
                path,
                messages.Signer.from_bytes(bytes([i % 256, i // 256]) * 16),
                p.Participant(Policy(), 1, windows=len(site.train)),
                np.zeros(int(self.shared.sum()), np.float32),
            )
            for i, site in enumerate(sites)
            for path in [f"lab/site{i}/a/l/c"]
        }
        rules = federation.Rules(1, 1000, 0, count)
        self.federation = federation.Federation(rules, version=0, past=None)

    def run(self, workers: Workers, dropout: float, after: Any) -> None:
        """Run every round; `after(number, vector)` sees each new model."""
        rules, actions = self.federation.rules, list[rounds.Action]()
        for path in self.gateways:
            # The first round waits until everybody is there.
            there = len(self.federation.gateways) + 1 == len(self.gateways)
            self.federation.rules = rules if there else replace(rules, min_gateways=len(self.gateways))
            actions += self.federation.handle(federation.Born(path, 1), self.now)
        while actions:
            action, *actions = actions
            match action:
                case federation.Open():
                    actions += self._round(action, workers, dropout)
                case rounds.Close(number, _):
                    self._close()
                    after(number, self.vector)
                    self.now += 1
                    actions += self.federation.handle(federation.Aggregated(self.version), self.now)
                case rounds.Extend() | rounds.Outcome() | federation.Finish():
                    pass

    def _round(self, opened: federation.Open, workers: Workers, dropout: float) -> list[rounds.Action]:
        """Let every gateway that is there answer the plan, train, and send."""
        r = self.task.round
        plan = messages.Plan(
            messages.VERSION, bytes(32), opened.round, opened.base, weights_digest(self.vector), "open",
            opened.opened_ms, opened.deadline_ms, r.min_gateways, r.bits,
            secure_aggregation=False, keep_ppm=max(1, round(1e6 * r.keep_in(opened.round))),
        )  # fmt: skip
        actions: list[rounds.Action] = []
        training: list[tuple[Gateway, p.StartTraining, Future[tuple[Vector, int]]]] = []
        absent = self.random.random(len(self.gateways)) < dropout
        absent[self.random.integers(len(absent))] &= not absent.all()  # somebody is there
        for path, gateway in self.gateways.items():
            said = gateway.machine.handle(p.ModelStored(opened.base, plan.base_digest))
            said += gateway.machine.handle(p.PlanSeen(plan))
            away = self.random.random() < dropout
            for one in said:
                if isinstance(one, p.StartTraining) and not away:
                    base = np.where(self.shared, self.vector, self.personal[len(training)])
                    training.append(
                        (gateway, one, workers.fit(self._index(gateway), base, self._seed(one.round, path)))
                    )
                elif isinstance(one, p.Answer):
                    event = federation.Answered(path, one.round, one.verdict == "joined")
                    actions += self.federation.handle(event, self.now)
        for gateway, one, job in training:
            vector, steps = job.result()
            gateway.steps += steps
            self.personal[self._index(gateway)] = vector
            actions += self._send(gateway, one, vector)
        if len(training) < len(self.gateways):
            self.now = opened.deadline_ms
            actions += self.federation.handle(federation.Tick(), self.now)
        return actions

    def _index(self, gateway: Gateway) -> int:
        return list(self.gateways).index(gateway.path)

    def _seed(self, number: int, path: str) -> int:
        return (self.seed * 1_000_003 + number * 1009 + list(self.gateways).index(path)) % 2**31

    def _send(self, gateway: Gateway, action: p.StartTraining, vector: Vector) -> list[rounds.Action]:
        """Encode with error feedback, seal as the gateway does, and hand the update over."""
        delta = (vector - self.vector)[self.shared] + gateway.residual
        encoded = codec.encode(delta, action.bits, action.keep_ppm / 1e6)
        gateway.residual = delta - encoded.decoded
        count = len(gateway.site.train)
        update = messages.Update(messages.VERSION, action.round, action.base, count, None, encoded.data)
        topic = topics.Uplink(topics.GatewayPath.parse(gateway.path), self.task.name, "update").topic
        envelope = gateway.signer.seal(update, topic)
        gateway.sent.append(len(envelope))
        gateway.machine.handle(p.Trained(action.round))
        event = federation.Submitted(gateway.path, action.round, action.base, update.payload[:32])
        actions = self.federation.handle(event, self.now)
        for one in actions:
            if isinstance(one, rounds.Outcome):
                gateway.machine.handle(p.Settled(one.round, one.word))
                if one.word == rounds.COUNTED:
                    self.payloads[gateway.path] = (encoded.data, count)
        return actions

    def _close(self) -> None:
        r, order = self.task.round, sorted(self.payloads)
        updates = iter([self.payloads[path] for path in order])
        self.state, goal = next_model(r.strategy, self.state, self.vector, self.shared, updates, momentum=r.momentum)
        self.version += 1
        samples = [count for _, count in self.payloads.values()]
        self.vector = self.down.publish(goal, self.shared, r.down_in(self.version), samples)
        self.payloads.clear()


class Judge:
    """Metrics of weights at the plants, through ONNX Runtime as a gateway scores."""

    def __init__(self, task: Task, graph: bytes, layout: Layout, sites: list[Site]) -> None:
        self.task, self.graph, self.layout, self.sites = task, graph, layout, sites
        self.metric = metric_of(task, sites)

    def outputs(self, vector: Vector, i: int, part: str) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The net's outputs on the plant's holdout or test (N, outputs)."""
        site = self.sites[i]
        scorer = Scorer.build(self.task, 0, self.graph, self.layout, vector, site.scale)
        return scorer.outputs(getattr(site, part).x)

    def worth(self, out: np.ndarray[Any, np.dtype[np.float32]], i: int, part: str) -> float:
        """The metric of outputs on that part; for anomaly without labels, the negative error."""
        site = self.sites[i]
        data = getattr(site, part)
        if self.task.kind == "anomaly":
            inputs = np.nan_to_num(site.scale.inputs(self.task, data.x)).reshape(len(data), -1)
            error = ((out - inputs) ** 2).mean(1)
            if data.y is None:
                return float(error.mean())
            return evaluate.auroc(data.y, error) if 0 < data.y.sum() < len(data) else float("nan")
        if self.metric == "rmse":
            return evaluate.rmse(data.y, out[:, 0] * site.scale.target_std + site.scale.target_mean)
        if self.metric == "auprc":
            return evaluate.auprc(data.y, out[:, 1] - out[:, 0])
        return evaluate.accuracy(data.y, out.argmax(1))

    def test(self, vector: Vector, i: int) -> float:
        """The metric of weights on a plant's fixed test."""
        return self.worth(self.outputs(vector, i, "test"), i, "test")


def _final(judge: Judge, i: int, candidates: dict[str, Vector]) -> tuple[str, float]:
    """Let the plant choose on its own holdout; return the choice and its worth on the test."""

    def outputs(part: str) -> dict[str, Any]:
        found = {name: judge.outputs(vector, i, part) for name, vector in candidates.items()}
        return {MIX: mixed(judge.task.kind, found[TUNED], found[OWN]), **found}

    held = judge.sites[i].holdout
    metric = "error" if judge.task.kind == "anomaly" else judge.metric
    worths = {name: judge.worth(out, i, "holdout") for name, out in outputs("holdout").items()} if len(held) else {}
    chosen = choose(metric, worths or {MIX: 0.0}, len(held))
    return chosen, judge.worth(outputs("test")[chosen], i, "test")


def _mean(values: list[float]) -> float:
    """Mean over the plants that have one (a test without anomalies has no AUROC)."""
    return mean(value for value in values if np.isfinite(value))


class Scenario(NamedTuple):
    """What is asked for beside the task: `dropout` is the chance that a plant misses a round."""

    data: Path
    rounds: int
    seed: int
    dropout: float = 0.0
    codec: str | None = None
    keep: float | None = None
    downlink: str | None = None

    def task(self, text: str, place: str) -> tuple[str, Task]:
        """The task as this scenario runs it."""
        text = complete_task(text, self.data)
        task = parse_task(text, place)
        more: dict[str, Any] = {"codec": self.codec or task.round.codec, "rounds": self.rounds}
        more["downlink"] = self.downlink or task.round.downlink
        more["keep"] = task.round.keep if self.keep is None else self.keep
        if more["keep"] is not None and not 0 < more["keep"] <= MOST_KEPT:
            raise UserError("--keep", 0, "", f"{more['keep']:g} is no share", "write 0.001 to 0.5")
        return text, msgspec.structs.replace(task, round=msgspec.structs.replace(task.round, **more))


def simulate(scenario: Scenario, text: str, place: str) -> dict[str, Any]:
    """Run it, and return every figure."""
    from models.export import export  # noqa: PLC0415 - reaches torch

    begin, count, seed = time.monotonic(), scenario.rounds, scenario.seed
    text, task = scenario.task(text, place)
    sites = load_sites(task, scenario.data)
    graph, layout, first = export(task, seed)
    judge = Judge(task, graph, layout, sites)
    curve: list[list[float]] = []

    def after(number: int, vector: Vector) -> None:
        curve.append([judge.test(vector, i) for i in range(len(sites))])
        if sys.stderr.isatty():
            told = f"\rround {number} of {count}: {judge.metric} {_mean(curve[-1]):.4f} "
            print(told, end="\n" if number == count else "", file=sys.stderr, flush=True)

    with Workers(text, layout, sites) as workers:
        fleet = Fleet(task, layout, Down(text, graph, layout, first), sites, count, seed)
        fleet.run(workers, scenario.dropout, after)
        plants = list(fleet.gateways.values())
        tuning = [max(1, gateway.steps // _TUNE) for gateway in plants]
        budget = [gateway.steps + more for gateway, more in zip(plants, tuning, strict=True)]
        base = [np.where(fleet.shared, fleet.vector, own) for own in fleet.personal]
        jobs = [workers.fit(i, first, seed, steps) for i, steps in enumerate(budget)]
        tuned = [workers.fit(i, base[i], seed, steps) for i, steps in enumerate(tuning)]
        together = workers.fit(ALL, first, seed, sum(budget)).result()[0]
        alone, own = [job.result()[0] for job in jobs], [job.result()[0] for job in tuned]
    every = range(len(sites))
    chosen = [_final(judge, i, {TUNED: own[i], OWN: alone[i], GLOBAL: fleet.vector}) for i in every]
    result = {
        "centralised": [judge.test(together, i) for i in every],
        "silo_own": [judge.test(alone[i], i) for i in every],
        "silo_all": [_mean([judge.test(alone[i], j) for j in every]) for i in every],
        "federated": curve[-1],
        "personalised": [judge.test(own[i], i) for i in every],
        "final": [worth for _, worth in chosen],
    }
    sent = [n for gateway in plants for n in gateway.sent]
    return _figures(judge.metric, result, curve, [s.name for s in sites], [c for c, _ in chosen]) | {
        "bytes_up_per_update": round(mean(sent), 1),
        "bytes_up_last": round(mean(gateway.sent[-1] for gateway in plants if gateway.sent), 1),
        "bytes_up": sum(sent),
        **fleet.down.figures(),
        "float32_bytes": 4 * int(fleet.shared.sum()),
        "ratio_up": round(4 * int(fleet.shared.sum()) / mean(sent), 1),
        "parameters": layout.size,
        "rounds": count,
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 1),
    }


def _figures(
    metric: str, result: dict[str, list[float]], curve: list[list[float]], names: list[str], chosen: list[str]
) -> dict[str, Any]:
    """Means over plants, ratios of which more is better, and the plants one by one."""
    lower = metric in evaluate.LOWER_IS_BETTER

    def over(value: float, other: float) -> float:
        return (other / value if value else float("inf")) if lower else (value / other if other else float("inf"))

    means = {key: _mean(values) for key, values in result.items()}
    best = (min if lower else max)(means["centralised"], means["silo_own"])
    by_plant = [
        {"plant": name, "model": chosen[i], **{key: round(values[i], 5) for key, values in result.items()}}
        for i, name in enumerate(names)
    ]
    versus = [over(f, own) for f, own in zip(result["final"], result["silo_own"], strict=True)]
    reached = {
        str(f): next((n for n, row in enumerate(curve, 1) if over(_mean(row), means["centralised"]) >= f), None)
        for f in _FRACTIONS
    }
    return {
        "metric": metric,
        **{key: round(value, 5) for key, value in means.items()},
        "final_vs_best": round(over(means["final"], best), 4),
        "worst_plant_vs_alone": round(min(v for v in versus if np.isfinite(v)), 4),
        "rounds_to": reached,
        "plants": by_plant,
        "curve": [round(_mean(row), 5) for row in curve],
    }


def main(args: argparse.Namespace) -> int:
    """Check what was asked for, run it, and print the figures as a table or as JSON."""
    if args.rounds < 1:
        raise UserError("--rounds", 0, "", f"{args.rounds} rounds", "write 1 or more")
    if not 0 <= args.dropout < 1:
        raise UserError("--dropout", 0, "", f"{args.dropout:g} is no chance below 1", "write 0.2 for one in five")
    if importlib.util.find_spec("torch") is None:
        raise LocalError("a simulation trains, and torch is not installed; pip install 'tundish[train]'")
    try:
        text = args.task.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(str(args.task), 0, "", f"can't be read: {error}", "give a task.toml in UTF-8") from None
    scenario = Scenario(args.data, args.rounds, args.seed, args.dropout, args.codec, args.keep, args.downlink)
    found = simulate(scenario, text, str(args.task))
    if args.json:
        print(json.dumps(found))
        return 0
    for key, value in found.items():
        if key not in {"plants", "curve"}:
            print(f"{key:24}  {value}")
    for row in found["plants"]:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))
    return 0
