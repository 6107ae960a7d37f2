"""`tundish bench infer`: a window from its last value to its score, beside the same session's bare run.

Ours is what a gateway does with a row of values that completes a window: gate, quality, normalisation, ONNX Runtime,
verdict, the values kept for drift, the score for the store, and the `_inference` message to a broker over MQTT. Raw is
`session.run` on an input that is scaled already. They take turns. Then rows come at a pace, without and with a training
beside them.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.link import Link, MqttSettings
from broker.topics import GatewayPath, Local
from edge.history import Score
from edge.infer import Scorer
from edge.lab.processes import Process, free_port, listens, mqtt_broker, python, wait_for
from edge.live import Live
from edge.tags import Quality, Sample
from edge.window import Wiring, parse_gate
from models.delta import read_export
from models.drift import picked
from models.errors import LocalError, UserError
from models.scale import Scale
from models.spec import Task, parse_task

_SIGNALS, _LENGTH = 4, 256
_TASK = (
    f'name = "bench"\nkind = "classification"\nnet = "tcn"\n[window]\nlength = {_LENGTH}\nrate_hz = 100.0\n'
    + "".join(f'[[signal]]\nname = "s{i}"\n' for i in range(_SIGNALS))
    + '[target]\nname = "t"\nclasses = ["good", "worn", "broken"]\n'
)
_TURN, _WINDOWS = 100, (200, 1_000_000)
_PACE_S = 0.005
_WAIT_S = 120.0
_FIRST_NS = 1_790_000_000 * 10**9


def measure(windows: int) -> dict[str, Any]:
    """Percentiles in microseconds, their ratios, and how many windows were fed and not scored."""
    if not _WINDOWS[0] <= windows <= _WINDOWS[1]:
        raise UserError("--windows", 0, "", f"{windows} is out of range", "write {} to {}".format(*_WINDOWS))
    with tempfile.TemporaryDirectory(prefix="tundish-") as name:
        folder = Path(name)
        task, model = folder / "task.toml", folder / "model.npz"
        task.write_text(_TASK)
        Process("export", python("models.export", "--task", task, "--out", model), folder / "export.log").complete()
        return asyncio.run(_measured(folder, windows))


async def _measured(folder: Path, windows: int) -> dict[str, Any]:
    port = free_port()
    broker = mqtt_broker("embedded", port, folder)
    broker.start()
    try:
        wait_for("the broker", lambda: listens(port), [broker], _WAIT_S)
        link = Link(
            MqttSettings(url=f"mqtt://127.0.0.1:{port}"), client_id="bench", will=None,
            on_message=lambda _: None, on_up=lambda: None, on_down=lambda _: None,
        )  # fmt: skip
        link.start()
        async with asyncio.timeout(_WAIT_S):
            while not link.connected:  # noqa: ASYNC110 - the link sets no event
                await asyncio.sleep(0.05)
        feed = _Feed(folder, link)
        await asyncio.sleep(0)
        ours, raw = await _turns(feed, windows)
        idle = await _paced(feed, windows)
        with _training(folder):
            training = await _paced(feed, windows)
        await link.stop()
    finally:
        broker.stop()
    if link.counters["publish-offline"]:
        raise LocalError("the broker was lost")
    p50, p99, raw_p50 = (float(np.percentile(a, q)) for a, q in ((ours, 50), (ours, 99), (raw, 50)))
    ratio = float(np.percentile(training, 99) / np.percentile(idle, 99))
    return {
        "p50_us": round(p50, 1),
        "p99_us": round(p99, 1),
        "raw_p50_us": round(raw_p50, 1),
        "p50_ratio": round(p50 / raw_p50, 3),
        "p99_training_ratio": round(ratio, 3),
        "idle_p99_us": round(float(np.percentile(idle, 99)), 1),
        "training_p99_us": round(float(np.percentile(training, 99)), 1),
        "missed": feed.fed - feed.live.stats.scored,
        "windows": feed.fed,
    }


class _Feed:
    """A task's live scoring with a model in place, and rows of values for it."""

    def __init__(self, folder: Path, link: Link) -> None:
        task = parse_task(_TASK)
        graph, layout, vector = read_export(folder / "model.npz")
        scorer = Scorer.build(task, 1, graph, layout, vector, Scale((50.0,) * _SIGNALS, (10.0,) * _SIGNALS))
        signals = tuple(f"plc/s{i}" for i in range(_SIGNALS))
        wiring = Wiring(task.window, signals, gate=parse_gate("plc/running == 1"))
        topic = Local(GatewayPath.parse("lab/site/area/line/cell"), "inference", task.name).topic
        scores = list[Score]()

        def publish(payload: bytes) -> None:
            link.publish(topic, payload, qos=0, retain=True)

        newest = list[NDArray[np.float32]]()

        def watch(task: Task, x: NDArray[np.float32]) -> None:
            newest.append(picked(task, x[None])[0])

        self.live = Live(task, wiring, 0, publish, scores.append, lambda _: None, scorer, learnt=True, watch=watch)
        self.session = scorer.session
        self._refs = (*signals, "plc/running")
        self._step_ns, self._steps, self._random = wiring.step_ns, count(), np.random.default_rng(0)
        while not self.live.stats.scored:
            self.live.feed(self._row())
        self.fed, self.live.stats.scored = 0, 0

    def _row(self) -> list[Sample]:
        time_ns = _FIRST_NS + next(self._steps) * self._step_ns
        values = [*self._random.normal(50, 10, _SIGNALS).tolist(), 1.0]
        return [Sample(ref, time_ns, value, Quality.GOOD) for ref, value in zip(self._refs, values, strict=True)]

    def one(self) -> float:
        """Feed one row, which completes one window; microseconds."""
        row = self._row()
        self.fed += 1
        return _us(lambda: self.live.feed(row))

    def raw(self) -> float:
        """Run the bare session on a window that is scaled already; microseconds."""
        x = self._random.normal(size=(1, _SIGNALS, _LENGTH)).astype(np.float32)
        return _us(lambda: self.session.run(None, {"x": x}))


def _us(work: Callable[[], object]) -> float:
    begin = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - begin) / 1000


async def _turns(feed: _Feed, windows: int) -> tuple[list[float], list[float]]:
    ours, raw = list[float](), list[float]()
    while len(ours) < windows:
        ours += [feed.one() for _ in range(_TURN)]
        raw += [feed.raw() for _ in range(_TURN)]
        await asyncio.sleep(0)
    return ours, raw


async def _paced(feed: _Feed, windows: int) -> list[float]:
    """Rows as a plant gives them: one after the other, with time between."""
    found = list[float]()
    for _ in range(windows):
        await asyncio.sleep(_PACE_S)
        found.append(feed.one())
    return found


@contextmanager
def _training(folder: Path) -> Iterator[None]:
    child = Process(
        "training",
        python("edge.lab.train_child", folder / "model.npz", folder / "task.toml"),
        folder / "training.log",
    )
    child.start()
    try:
        wait_for("the training", lambda: "training" in child.log.read_text(errors="replace"), [child], _WAIT_S)
        yield
        child.check()
    finally:
        child.stop()
