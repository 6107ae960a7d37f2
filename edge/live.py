"""Live scoring of one task: samples in, `_inference` messages out. Reads memory only and waits for nothing."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.dataset import is_holdout, usable
from edge.history import Score
from edge.infer import Scorer, Verdict
from edge.tags import Sample
from edge.window import Win, Windower, Wiring
from models.scale import Scale
from models.spec import Task

# The signals behind a verdict cost C windows more: for every alarm, and for the rest this often.
_EXPLAIN_S = 1.0
# An unchanged verdict is published at most this often; the newest one is what is retained.
_PUBLISH_S = 0.1
# Good windows that a first normalisation is learnt from, before any training.
_FIRST_WINDOWS = 128


@dataclass
class Stats:
    """Counters of one task since start; gaps are seconds between two scores, on the monotonic clock.

    `alarms` counts windows, `alarm_events` how often an alarm began.
    """

    scored: int = 0
    alarms: int = 0
    alarm_events: int = 0
    unreliable: int = 0
    inactive: int = 0
    usable: int = 0
    trainable: int = 0
    max_gap_s: float = 0.0
    late: int = 0


@dataclass
class Live:
    """One task's way from samples to scores. `scorer` is swapped by whoever has a better one, between two windows.

    `watch` is given each window that could be trained on, but for its label.
    """

    task: Task
    wiring: Wiring
    lag_ns: int
    publish: Callable[[bytes], object]
    keep: Callable[[Score], object]
    on_scale: Callable[[Scale], object]
    scorer: Scorer | None = None
    learnt: bool = False
    made_ms: int = 0
    watch: Callable[[Task, NDArray[np.float32]], object] | None = None
    stats: Stats = field(default_factory=Stats)
    last: dict[str, Any] = field(default_factory=dict)
    _first: list[NDArray[np.float32]] = field(default_factory=list)
    _alarming: bool = False
    _scored_at: float = 0.0
    _explained_at: float = 0.0
    _published_at: float = 0.0
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=256))

    def __post_init__(self) -> None:
        self.windower = Windower(self.wiring, self.lag_ns)
        self._fed_at = time.monotonic()

    def fits(self, task: Task, wiring: Wiring) -> bool:
        """Whether windows are made and judged as they are; what else a task says may change while it scores."""
        return wiring == self.wiring and _shape(task) == _shape(self.task)

    def go_on(self, before: "Live") -> None:
        """Score with the model of before, whose windows were wired otherwise; the counts go on too."""
        self.scorer, self.learnt, self.made_ms = before.scorer, before.learnt, before.made_ms
        self.stats, self.last = before.stats, before.last

    def feed(self, samples: Sequence[Sample]) -> None:
        """Take a batch from a driver; score every window that it completes."""
        self._fed_at = time.monotonic()
        for window in self.windower.feed(samples):
            self._window(window)

    def farewell(self) -> bytes:
        """Make the last `_inference` message, which stays with the broker: nothing is scored any more."""
        none: dict[str, object] = {
            "score": None,
            "verdict": "stopped",
            "alarm": False,
            "reliable": False,
            "active": False,
            "top": [],
        }
        none["timestamp_ms"] = int(time.time() * 1000)
        return json.dumps(self.last | none).encode()

    def tick(self) -> None:
        """Let time pass where no sample comes: values hold, and rows are closed with them."""
        elapsed = time.monotonic() - self._fed_at
        for window in self.windower.advance(int(elapsed * 1e9)):
            self._window(window)

    def _window(self, window: Win) -> None:
        stats, task = self.stats, self.task
        stats.late = self.windower.late
        reliable = window.quality >= task.window.min_quality
        stats.unreliable += not reliable
        stats.inactive += not window.active
        if usable(task, window):
            stats.usable += 1
            stats.trainable += not is_holdout(task, window)
        if self.watch and window.active and reliable:
            self.watch(task, window.x)
        if self.scorer is None or not self._scaled(window, reliable=reliable):
            self._say(window, None, "learning", alarm=False, reliable=reliable, top=[])
            return
        verdict = self.scorer.score(window.x, whole=window.quality == 1)
        self._count_gap()
        reliable = reliable and math.isfinite(verdict.score)
        alarm = verdict.alarm and window.active and reliable and self.learnt
        stats.alarms += alarm
        stats.alarm_events += alarm and not self._alarming
        self._alarming = alarm
        word = "learning" if not self.learnt else verdict.verdict if window.active else "inactive"
        now_ms = int(time.time() * 1000)
        self.keep(Score(task.name, now_ms, window.end_ns, verdict.score, word, self.scorer.version))
        self._publish(window, verdict, word, alarm=alarm, reliable=reliable)

    def _scaled(self, window: Win, *, reliable: bool) -> bool:
        """Whether a normalisation is there; before any training, learn a first one from good windows of this run."""
        if self.scorer is None or self.scorer.scale.mean:
            return self.scorer is not None
        if window.active and reliable:
            self._first.append(window.x)
        if len(self._first) < min(_FIRST_WINDOWS, self.task.training.min_windows):
            return False
        self.scorer.scale = Scale.learn(self.task, np.stack(self._first), None)
        self._first.clear()
        self.on_scale(self.scorer.scale)
        return True

    def _count_gap(self) -> None:
        now = time.monotonic()
        if self._scored_at:
            self.stats.max_gap_s = max(self.stats.max_gap_s, now - self._scored_at)
        self._scored_at = now
        self.stats.scored += 1

    def _publish(self, window: Win, verdict: Verdict, word: str, *, alarm: bool, reliable: bool) -> None:
        now = time.monotonic()
        changed = word != self.last.get("verdict") or alarm != self.last.get("alarm")
        if not changed and now - self._published_at < _PUBLISH_S:
            return
        top = self.last.get("top", [])
        if self.scorer and (changed or alarm or now - self._explained_at > _EXPLAIN_S):
            self._explained_at = now
            top = [{"signal": name, "share": share} for name, share in self.scorer.contributions(window.x)]
        self._say(window, verdict.score, word, alarm=alarm, reliable=reliable, top=top)

    def _say(
        self, window: Win, score: float | None, word: str, *, alarm: bool, reliable: bool, top: list[dict[str, object]]
    ) -> None:
        """Publish one `_inference` message: the newest is retained, so a dashboard that starts later sees it."""
        now = time.monotonic()
        if score is None and now - self._published_at < _PUBLISH_S:
            return
        self._published_at = now
        now_ms = int(time.time() * 1000)
        age = round((now_ms - self.made_ms) / 1000, 1) if self.made_ms else None
        self.last = {
            "timestamp_ms": now_ms,
            "window_end_ms": window.end_ns // 1_000_000,
            "score": None if score is None or not math.isfinite(score) else round(score, 6),
            "verdict": word,
            "alarm": alarm,
            "reliable": reliable,
            "active": window.active,
            "quality": round(window.quality, 4),
            "top": top,
            "model": {
                "version": self.scorer.version if self.scorer else None,
                "kind": self.scorer.kind if self.scorer else None,
                "age_s": age,
            },
        }
        self.publish(json.dumps(self.last).encode())


def _shape(task: Task) -> tuple[object, ...]:
    """What of a task decides how windows are made and judged."""
    return task.kind, task.net, task.window, task.signal, task.target
