"""`tundish demo`: plants, gateways, one aggregator, one broker, an outage in the middle, and a report.

Every process is the one that a user would start; the demo only starts, kills, and reads what they leave behind.
"""

import argparse
import importlib.util
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from broker.journal import Journal
from edge.lab.figures import Outage, figures
from edge.lab.processes import listens, wait_for
from edge.lab.report import table, write_report
from edge.lab.stage import Scenario, Stage
from models.errors import LocalError, UserError

_START_S = 90.0
_ROUND_S = 240.0
_OUTAGE_S = 6.0
_POLL_S = 0.02
_MARK = ".tundish-demo"


class _Round(NamedTuple):
    number: int
    state: str
    counted: int


class Demo:
    """One run: the stage, and what is said about it while it goes on."""

    def __init__(self, scenario: Scenario, out: Path) -> None:
        self.scenario, self.out = scenario, out
        self.stage = Stage(scenario, out / "work")
        self.started = time.monotonic()
        self.outage: Outage | None = None
        self._journal: Journal | None = None
        self._told = 0

    def say(self, text: str) -> None:
        """Progress, on standard error."""
        print(f"[{time.monotonic() - self.started:5.1f} s] {text}", file=sys.stderr, flush=True)

    def run(self) -> dict[str, Any]:
        """Run everything; return the figures."""
        stage = self.stage
        try:
            self._start()
            self._rounds()
            self.say("last round closed; waiting until every gateway scores with the last model")
            self._settle()
        finally:
            stage.stop()
            if self._journal:
                self._journal.close()
        self.say("training the baselines: each plant alone, and all data in one place")
        found = figures(stage, self.outage)
        return found | {"seconds": round(time.monotonic() - self.started, 1)}

    def _start(self) -> None:
        stage, scenario = self.stage, self.scenario
        if scenario.data:
            what = f"{scenario.data.name}, {scenario.play_hz:g} rows/s: {scenario.speedup:g} x the recorded time"
        else:
            what = "spindle bearings that wear out in seconds instead of years, on the wall clock"
        self.say(f"{scenario.gateways} plants ({what}); broker: {scenario.broker}")
        stage.enrol()
        if scenario.broker == "mosquitto":
            self.say("authority made, every gateway enrolled by two files, Mosquitto's access list written")
        stage.broker.start()
        wait_for("the broker", lambda: listens(stage.mqtt_port), [stage.broker], _START_S)
        for process in (*stage.plcs, stage.aggregator, *stage.gateways):
            process.start()
        self.say("PLCs (OPC UA and Modbus), aggregator and gateways started; logs in " + str(stage.folder))
        wait_for("the first round", lambda: self._round() is not None, stage.processes, _START_S)
        self.say("round 1 is open; gateways read, and train as soon as they have enough good windows")

    def _round(self) -> _Round | None:
        """The task's latest round as the aggregator's journal has it."""
        if self._journal is None:
            # The status comes when the journal has been made; to open it earlier would be in its maker's way.
            if not (self.stage.aggregator_state / "status.json").exists():
                return None
            self._journal = Journal(self.stage.aggregator_state)
        row = self._journal.latest_round(self.scenario.task)
        if row is None:
            return None
        return _Round(row.round, row.state, len(self._journal.counted(self.scenario.task, row.round)))

    def _tell(self, now: _Round) -> None:
        """One line for every round that has closed since the last call."""
        closed = now.number if now.state == "closed" else now.number - 1
        if closed > self._told:
            self._told = closed
            scored = ", ".join(str(self.stage.task_status(i).get("scored", 0)) for i in range(self.scenario.gateways))
            self.say(f"round {closed} of {self.scenario.rounds} closed; windows scored: {scored}")

    def _rounds(self) -> None:
        """Follow the rounds to the end; kill the aggregator in the first round from the middle on that allows it."""
        last = self.scenario.rounds or 1
        middle, seen, since = (last + 1) // 2, 0, time.monotonic()
        while True:
            self._check()
            now = self._round()
            if now is not None:
                self._tell(now)
                if now.number >= last and now.state == "closed":
                    return
                if now.number != seen:
                    seen, since = now.number, time.monotonic()
                wanted = self.outage is None and now.number >= middle and now.state == "open"
                if wanted and 0 < now.counted < max(2, self.scenario.gateways):
                    self._break(now.number)
                    since = time.monotonic()
            if time.monotonic() - since > _ROUND_S:
                raise LocalError(f"round {seen} does not close; see the logs in {self.stage.folder}")
            time.sleep(_POLL_S)

    def _check(self) -> None:
        """Stop at once, with the reason, when something has gone wrong that waiting will not mend."""
        for process in self.stage.processes:
            process.check()
        for i in range(self.scenario.gateways):
            if "declined" in str(self.stage.task_status(i).get("answer")):
                raise LocalError(f"gateway {i + 1} {self.stage.task_status(i)['answer']}")

    def _break(self, number: int) -> None:
        """Kill -9 the aggregator in the middle of a round, take the broker away, and bring both back empty-handed."""
        stage, count = self.stage, range(self.scenario.gateways)
        killed_ms = int(time.time() * 1000)
        stage.aggregator.kill()
        now = self._round()
        open_with = now.counted if now and now.number == number and now.state == "open" else None
        if open_with is None:
            self.say(f"round {number} had just closed; the aggregator is started again, and the next round is tried")
            stage.aggregator.start()
            return
        stage.broker.kill()
        total = self.scenario.gateways
        self.say(f"round {number}: aggregator killed (SIGKILL) with {open_with} of {total} updates; broker stopped")
        before = [int(str(stage.task_status(i).get("scored", 0))) for i in count]
        time.sleep(_OUTAGE_S)
        more = [int(str(stage.task_status(i).get("scored", 0))) - before[i] for i in count]
        self.say(f"{_OUTAGE_S:.0f} s without both: windows scored meanwhile: {', '.join(map(str, more))}")
        stage.broker.start()
        wait_for("the broker", lambda: listens(stage.mqtt_port), [stage.broker], _START_S)
        stage.aggregator.start()
        back_ms = int(time.time() * 1000)
        self.say("broker (empty) and aggregator are back")
        self.outage = Outage(number, open_with, killed_ms, back_ms, tuple(more))

    def _settle(self) -> None:
        """Wait until the last model has come to every gateway, and every receipt with it.

        The last is known once the vote on it is over: one that is voted down makes way for another version.
        """
        journal, task = self._journal, self.scenario.task

        def settled() -> bool:
            model, vote = (journal.model(task), journal.ballot(task)) if journal else (None, None)
            version = model.version if model else 0
            return (vote is None or vote.kept is not None) and all(
                self.stage.task_status(i).get("model") == version and self.stage.status(i).get("outbox") == 0
                for i in range(self.scenario.gateways)
            )

        wait_for("the last model at every gateway", settled, self.stage.processes, _START_S)


def _prepare(out: Path) -> None:
    """Make the report folder; only one that an earlier demo made is emptied."""
    if out.exists() and not out.is_dir():
        raise UserError("--out", 0, "", f"{out} is a file", "name a folder")
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UserError("--out", 0, "", f"{out} is not empty and no earlier demo's", "name a new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _need_torch() -> None:
    """Training and the first model need torch: say so now, not in a child's log."""
    if importlib.util.find_spec("torch") is None:
        raise LocalError("the demo trains, and torch is not installed; pip install 'tundish[demo]'")


def main(args: argparse.Namespace) -> int:
    """Run the demo and report; 0 when nothing was lost or counted twice and the outage was survived."""
    scenario = Scenario(args.gateways, args.seed, args.rounds, args.data, args.broker)
    scenario.check()
    _need_torch()
    _prepare(args.out)
    # Told to end, it takes the plants down with it, as it does for Ctrl-C.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    demo = Demo(scenario, args.out)
    report = demo.run()
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    write_report(report, args.out / "report.html")
    demo.say(f"report: {args.out / 'report.html'}")
    print(json.dumps(report) if args.json else table(report))
    return 0 if report["lost"] == report["duplicated"] == 0 else 1
