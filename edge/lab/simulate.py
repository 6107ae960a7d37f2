"""`tundish simulate`: a whole federation in one process, on recorded data: no sockets, no clock, the same every time.

The state machines, the codec, the strategies, the messages and the training are the ones that gateways and aggregator
run; only the link between them is a function call, and time a counter. Trainings run on all cores.
"""

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import msgspec

from broker.aggregate import check_strategy, strategy_names
from broker.charter import SECURE
from broker.job import check_prefixes
from broker.round import STALEST
from edge.choose import GLOBAL, OWN, TUNED
from edge.lab.down import Down
from edge.lab.judge import Judge, figures, final, mean_of
from edge.lab.rounds import Fleet
from edge.lab.simulated import told, write_simulation
from edge.lab.sites import check_fit, complete_task, load_sites, remarks
from edge.lab.workers import ALL, Workers
from models.errors import LocalError, UserError
from models.spec import MOST_KEPT, Task, parse_task
from models.tomlfile import TomlFile, read_toml
from models.width import WIDTHS, unfit

_SEEDS = 2**31
# The codecs that send a share of the values.
_KEEPING = ("sparse", "int2", "ring")
_UNMASKED = (
    "secure-aggregation: codec ring, of which the sum is enough; nothing is masked yet, which changes bytes alone"
)
# What a terminal shows after the last round.
_THEN = "\ntunes at each plant; then trains each plant alone, and all data in one place: twice as many steps again\n"


class Scenario(NamedTuple):
    """What is asked for beside the task: `dropout` is the chance that a plant misses a round."""

    data: Path
    rounds: int
    seed: int
    dropout: float = 0.0
    codec: str | None = None
    keep: float | None = None
    strategy: str | None = None
    downlink: str | None = None
    mode: str | None = None
    stale: int = 0
    width: str = "1"
    privacy: str | None = None

    def task(self, text: str, place: str) -> tuple[str, Task]:
        """The task as this scenario runs it."""
        written, text = text, complete_task(text, self.data)
        task = parse_task(text, place, written=written)
        check_strategy(task, place, written)
        check_fit(task, TomlFile(place, written), self.data)
        chosen = {key: getattr(self, key) for key in ("codec", "keep", "strategy", "downlink", "mode")}
        said = {key: value for key, value in chosen.items() if value is not None}
        if self.privacy == SECURE:
            if self.codec not in {None, "ring"}:
                remedy = "leave it out, or write --codec ring"
                raise UserError("--codec", 0, "", f"{self.codec} shows each update", remedy)
            said["codec"] = "ring"
        rules = msgspec.structs.replace(task.round, rounds=self.rounds, **said)
        if self.strategy is not None and self.strategy not in strategy_names():
            remedy = f"write one of: {', '.join(strategy_names())}"
            raise UserError("--strategy", 0, "", f"no strategy {self.strategy!r}", remedy)
        if rules.codec == "ring" and rules.mode == "async":
            remedy = "write --mode sync, or another --codec"
            raise UserError("--codec", 0, "", "sums in a ring are of one round", remedy)
        if rules.codec == "ring" and rules.weigh != "samples":
            remedy = f'write weigh = "samples" in {place}, or another --codec'
            raise UserError("--codec", 0, "", "in a ring gateways weigh themselves", remedy)
        if not 0 <= self.stale <= STALEST:
            raise UserError("--stale", 0, "", f"{self.stale} versions", f"write 0 to {STALEST}")
        if self.stale and rules.mode != "async":
            raise UserError("--stale", 0, "", "in step nobody lags behind", "write --mode async too")
        if self.keep is not None and not 0 < self.keep <= MOST_KEPT:
            raise UserError("--keep", 0, "", f"{self.keep:g} is no share", "write 0.001 to 0.5")
        if self.keep is not None and rules.codec not in _KEEPING:
            remedy = f"leave it out, or write --codec {' or '.join(_KEEPING)}"
            raise UserError("--keep", 0, "", f"{rules.codec} keeps every value", remedy)
        return text, msgspec.structs.replace(task, round=rules)

    def widths(self, task: Task, names: Sequence[str]) -> list[float]:
        """Each plant's width; 0 for one that is left out."""
        widths = dict.fromkeys(names, 1.0)
        for part in self.width.split(","):
            name, _, number = part.rpartition("=")
            if name and name not in widths:
                raise UserError("--width", 0, "", f"no plant {name!r}", f"plants are: {', '.join(names)}")
            try:
                width = float(number)
            except ValueError:
                width = -1.0
            if width not in (0, *WIDTHS):
                remedy = "write 0.25, 0.5, 0.75 or 1, or 0 to leave a plant out; or PLANT=0.5,PLANT=0.25"
                raise UserError("--width", 0, "", f"{part!r} is no width", remedy)
            widths |= {name: width} if name else dict.fromkeys(names, width)
        for width in widths.values():
            if width and (problem := unfit(task, width)):
                raise UserError("--width", 0, "", problem, "leave --width out")
        if not any(widths.values()):
            raise UserError("--width", 0, "", "leaves out every plant", "give one at least a width")
        return list(widths.values())


def simulate(scenario: Scenario, text: str, place: str) -> dict[str, Any]:
    """Run it, and return every figure."""
    from models.export import export  # noqa: PLC0415 - reaches torch

    begin, count, seed = time.monotonic(), scenario.rounds, scenario.seed
    file, (text, task) = text, scenario.task(text, place)
    sites = load_sites(task, scenario.data)
    notes = list(remarks(task, scenario.data, sites))
    notes += [_UNMASKED] if scenario.privacy == SECURE else []
    for note in notes:
        print(f"tundish: {scenario.data}: {note}", file=sys.stderr)
    widths = scenario.widths(task, [site.name for site in sites])
    graph, layout, first = export(task, seed)
    check_prefixes(task, layout, place, file)
    judge = Judge(task, graph, layout, sites)
    curve: list[list[float]] = []
    every = range(len(sites))

    def after(number: int) -> None:
        curve.append([judge.test(fleet.at(i), i) for i in every])
        if sys.stderr.isatty():
            end = _THEN if number == count else ""
            told = f"\rround {number} of {count}: {judge.metric} {mean_of(curve[-1]):.4f} "
            print(told, end=end, file=sys.stderr, flush=True)

    with Workers(text, layout, sites) as workers:
        fleet = Fleet(Down(text, graph, layout, first), judge, count, seed, scenario.stale, widths)
        fleet.run(workers, scenario.dropout, after)
        plants, much = list(fleet.gateways.values()), max(1, task.training.tune)
        jobs = [workers.fit(g.index, fleet.tuned_from(g.index), seed, epochs=much, width=g.width) for g in plants]
        tuning = [job.result() for job in jobs]
        budget = [gateway.steps + steps for gateway, (_, steps) in zip(plants, tuning, strict=True)]
        whole = workers.fit(ALL, first, seed, steps=sum(budget))
        jobs = [workers.fit(g.index, first, seed, steps=n, width=g.width) for g, n in zip(plants, budget, strict=True)]
        pairs = [{TUNED: vector, OWN: job.result()[0]} for (vector, _), job in zip(tuning, jobs, strict=True)]
        own = {g.index: pair for g, pair in zip(plants, pairs, strict=True)}
        together = whole.result()[0]
    chosen = [final(judge, i, {**own.get(i, {}), GLOBAL: fleet.averaged(i)}) for i in every]

    def test(kind: str, i: int, at: int) -> float:
        return judge.test(own[i][kind], at) if i in own else float("nan")

    result = {
        "centralised": [judge.test(together, i) for i in every],
        "silo_own": [test(OWN, i, i) for i in every],
        "silo_all": [mean_of([test(OWN, i, j) for j in every]) for i in every],
        "federated": curve[-1],
        "personalised": [test(TUNED, i, i) for i in every],
        "final": [worth for _, worth, _ in chosen],
    }
    sent = [n for gateway in plants for n in gateway.sent]
    about = [
        {"model": shares, "windows": len(site.train), "test_windows": len(site.test)} | alarms
        for site, (shares, _, alarms) in zip(sites, chosen, strict=True)
    ]
    return figures(judge.metric, result, curve, [s.name for s in sites], about) | {
        "bytes_up_per_update": round(mean(sent), 1),
        "bytes_up_last": round(mean(gateway.sent[-1] for gateway in plants if gateway.sent), 1),
        "bytes_up": sum(sent),
        **fleet.down.figures(),
        "float32_bytes": 4 * int(fleet.shared.sum()),
        "ratio_up": round(4 * int(fleet.shared.sum()) / mean(sent), 1),
        "parameters": layout.size,
        "task": text,
        "kind": task.kind,
        "net": task.net,
        "window": [task.channels, task.window.length],
        "notes": notes,
        "rounds": count,
        "seed": seed,
        "seconds": round(time.monotonic() - begin, 1),
    }


def main(args: argparse.Namespace) -> int:
    """Check what was asked for, run it, and print the figures as a table or as JSON."""
    if args.rounds < 1:
        raise UserError("--rounds", 0, "", f"{args.rounds} rounds", "write 1 or more")
    if not 0 <= args.seed < _SEEDS:
        raise UserError("--seed", 0, "", f"{args.seed} is no seed", f"write 0 to {_SEEDS - 1}")
    if not 0 <= args.dropout < 1:
        raise UserError("--dropout", 0, "", f"{args.dropout:g} is no chance below 1", "write 0.2 for one in five")
    if importlib.util.find_spec("torch") is None:
        raise LocalError("a simulation trains, and torch is not installed; pip install 'tundish[train]'")
    text = read_toml(args.task).text
    scenario = Scenario(
        args.data, args.rounds, args.seed, args.dropout, args.codec, args.keep, args.strategy, args.downlink,
        args.mode, args.stale, args.width, args.privacy,
    )  # fmt: skip
    found = simulate(scenario, text, str(args.task))
    if args.plot:
        try:
            write_simulation(found, args.plot)
        except OSError as error:
            raise UserError("--plot", 0, "", f"{args.plot}: {error.strerror}", "name a file that can be made") from None
    print(json.dumps(found) if args.json else told(found))
    return 0
