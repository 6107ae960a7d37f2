"""Task: what to learn, from which signals, in which windows; the same file for every site.

Parsed from `task.toml` and checked here, so that the aggregator that publishes a task and the gateway that receives
one refuse the same mistakes. No torch.
"""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from models.errors import UserError
from models.tomlfile import TomlFile, read_toml, seconds

MAX_TASK_BYTES = 64 * 1024
MAX_RATE_HZ = 1e6
# What a task may ask of a gateway at most; a slip of a digit or two ends here and not on the plant's machines.
MAX_EPOCHS = 1000
MAX_PROXIMAL = 100.0
MAX_BATCH = 65_536
MAX_WINDOW_VALUES = 4_000_000
MAX_STRIDE = 1_000_000
MAX_DURATION_S = 10 * 366 * 86_400.0
# Of fewer windows, an index of stability is mostly noise; all of them wait in memory, some values of each.
DRIFT_WINDOWS = 100, 20_000
FALSE_PER_WEEK = 1e-3, 1e6

_Need = Callable[[bool, list[str | int], str, str], None]


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How samples become one input of the net.

    Scalar signals are resampled by last value on a grid of `rate_hz` source-time steps, and `length` steps make a
    window; a new one starts every `stride` steps. With `waveform`, each signal is an array tag of `length` values
    and one notification fills one window.
    """

    length: int
    stride: int = 1
    rate_hz: float = 1.0
    waveform: bool = False
    normalise: Literal["gateway", "window"] | None = None
    min_quality: float = 0.8


class Signal(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A name that every site wires to one of its own tags, and the unit that the net expects."""

    name: str
    unit: str = "1"


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is learnt: a class index (`classes` names them) or a number (`range` scales it, in `unit`)."""

    name: str
    unit: str = "1"
    classes: tuple[str, ...] = ()
    range: tuple[float, float] | None = None


class Alarm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a score becomes an alarm: a number above or below, or classes by name.

    Of an anomaly: an error above what this gateway's own normal windows have so many times a week
    (`false_per_week`; `models.alarm`), or above a quantile of theirs.
    """

    above: float | None = None
    below: float | None = None
    classes: tuple[str, ...] = ()
    false_per_week: float = 1.0
    quantile: float | None = None


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a signal has drifted: its PSI (`models.drift`) over the newest `windows` windows is `above` this."""

    above: float = 0.25
    windows: int = 1000


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The local training of one round. `min_windows` good windows are needed before a gateway takes part.

    `proximal`: pulls the training of a round towards the global model. `tune`: passes from the running mean of the
    global models, whose result is sent to nobody. `alone`: also train a net that only ever saw this gateway's data.
    What scores is all of them together, as far as the holdout lets the gateway trust each. `resume`: prefixes of
    parameters at which a gateway goes on from its own last values where these lose less on its holdout than the global
    model's; what they learn is sent all the same.
    """

    epochs: int = 1
    tune: int = 16
    proximal: float = 0.0
    batch: int = 64
    lr: float = 1e-3
    min_windows: int = 64
    max_windows: int = 20_000
    holdout: float = 0.2
    alone: bool = True
    resume: tuple[str, ...] = ("head",)


# Of more, most of what is kept is small, and a sparse coding is none any more.
MOST_KEPT = 0.5
_DOWN_WIDE, _DOWN_NARROW, _NARROWING = 0.1, 0.065, 6
_VOTE_S = 60.0
_EVERY_S = 86_400.0


class Round(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the federation runs the task: `every` from one opening to the next, at most `deadline` per round.

    `every` None is a day, and no time in an asynchronous federation, where a round is open for `every` at least.
    `keep` is the share of values that a sparse update keeps; None: steered by the holdouts (`broker.rate`).
    `weigh`: what an update counts for in the mean: its windows, or these times the share of good values in them.
    `early`: so long after an opening, a gateway whose signals have drifted may have the next round opened.
    `vote`: how long the next round waits for votes on a new model; a gateway is against one that is worse by more
    than `tolerance` on its own holdout.
    """

    strategy: str = "fedavg"
    mode: Literal["sync", "async"] = "sync"
    buffer: int | None = None
    min_gateways: int = 1
    deadline: str = "2h"
    every: str | None = None
    early: str | None = None
    rounds: int | None = None
    codec: Literal["sparse", "int2", "int4", "int8", "float32", "ring"] = "sparse"
    keep: float | None = None
    momentum: float = 0.7
    weigh: Literal["samples", "quality"] = "samples"
    downlink: Literal["sparse", "float32"] = "sparse"
    vote: str | None = None
    tolerance: float = 0.2

    def weight(self, samples: int, quality: int) -> int:
        """What an update of so many windows counts for; `quality` is the share of their good values, in millionths."""
        return max(1, samples * quality // 1_000_000) if self.weigh == "quality" else samples

    @property
    def vote_s(self) -> float:
        """Seconds; 0 where nobody votes, as in an asynchronous federation, which waits for nobody."""
        if self.vote is None:
            return 0.0 if self.mode == "async" else _VOTE_S
        return seconds(self.vote)

    @property
    def bits(self) -> int:
        """The coding: 0 sparse, 1 a ring's (`models.ringcode`), else bits per value."""
        return {"sparse": 0, "int2": 2, "int4": 4, "int8": 8, "float32": 32, "ring": 1}[self.codec]

    def down_in(self, version: int) -> float | None:
        """Share of values that the step to `version` (1, 2, …) changes: wide first, then narrow; None: all of them."""
        narrowing = min(max(version - 1, 0), _NARROWING) / _NARROWING
        return _DOWN_WIDE * (_DOWN_NARROW / _DOWN_WIDE) ** narrowing if self.downlink == "sparse" else None

    @property
    def full(self) -> int | None:
        """How many updates close an asynchronous round; None for a synchronous one."""
        return None if self.mode == "sync" else self.buffer or self.min_gateways

    @property
    def deadline_s(self) -> float:
        """Seconds."""
        return seconds(self.deadline)

    @property
    def every_s(self) -> float:
        """Seconds."""
        if self.every is None:
            return 0.0 if self.mode == "async" else _EVERY_S
        return seconds(self.every)

    @property
    def early_s(self) -> float | None:
        """Seconds; None where no gateway may ask for a round."""
        return None if self.early is None else seconds(self.early)


class Privacy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the task demands of the sum and of each gateway's noise."""

    secure_aggregation: bool = False


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One task; docs/reference.md has each key."""

    name: str
    kind: Literal["anomaly", "classification", "regression"]
    net: str
    window: Window
    signal: tuple[Signal, ...]
    personal: tuple[str, ...] = ()
    target: Target | None = None
    alarm: Alarm = Alarm()
    drift: Drift = Drift()
    training: Training = Training()
    round: Round = Round()
    privacy: Privacy = Privacy()

    @property
    def channels(self) -> int:
        """C of the net's input (B, C, T)."""
        return len(self.signal)

    @property
    def input_shape(self) -> tuple[int, int]:
        """(C, T)."""
        return self.channels, self.window.length

    @property
    def outputs(self) -> int:
        """Values the net gives per window: classes, one number, or the whole window again (C * T)."""
        if self.kind == "anomaly":
            return self.channels * self.window.length
        return len(self.target.classes) if self.kind == "classification" and self.target else 1

    @property
    def normalise(self) -> Literal["gateway", "window"]:
        """Whose mean and deviation scale the input: the gateway's, or (waveforms) each window's own."""
        return self.window.normalise or ("window" if self.window.waveform else "gateway")


def net_names() -> list[str]:
    """List the nets there are, by file name."""
    folder = Path(__file__).parent / "nets"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def parse_task(text: str, name: str = "task.toml", *, written: str | None = None) -> Task:
    """Parse and check a task; UserError with file, line, key and remedy.

    Lines are those of the text that a person has `written`, where the task is that one with something put in.
    """
    if len(text) > MAX_TASK_BYTES:
        raise UserError(name, 0, "", f"larger than {MAX_TASK_BYTES} bytes", "a task is a short text")
    file = TomlFile(name, text)
    file.text = text if written is None else written
    task = file.convert(Task)
    _check(file, task)
    return task


def load_task(path: Path) -> tuple[Task, str]:
    """Read `task.toml`; return the task and its text, which is what gets published."""
    file = read_toml(path)
    return parse_task(file.text, file.name), file.text


def task_digest(text: str) -> bytes:
    """SHA-256 of the published text: what a plan and a manifest name a task by (32 bytes)."""
    return hashlib.sha256(text.encode()).digest()


def _check(file: TomlFile, task: Task) -> None:
    def need(ok: bool, path: list[str | int], problem: str, remedy: str) -> None:  # noqa: FBT001
        if not ok:
            raise file.error(path, problem, remedy)

    level = f"{task.name!r} can't be a topic level"
    need(_is_name(task.name), ["name"], level, "use A-Z a-z 0-9 _ - (at most 64)")
    need(task.net in net_names(), ["net"], f"no net {task.net!r}", f"write one of: {', '.join(net_names())}")
    need(bool(task.signal), ["signal"], "no signal", "add a [[signal]] table with a name and a unit")
    seen: set[str] = set()
    for i, signal in enumerate(task.signal):
        twice = f"{signal.name!r} is named twice"
        need(signal.name not in seen, ["signal", i, "name"], twice, "give each its own")
        seen.add(signal.name)
    _check_alarm(need, task.alarm)
    need(task.drift.above > 0, ["drift", "above"], "out of range", "write a number above 0, such as 0.25")
    few, many = DRIFT_WINDOWS
    need(few <= task.drift.windows <= many, ["drift", "windows"], "out of range", f"write {few} to {many}")
    _check_window(need, task.window, task.channels)
    _check_target(need, task)
    _check_net(need, task)
    sums = "sums in the clear are all there is yet; write false"
    need(not task.privacy.secure_aggregation, ["privacy", "secure_aggregation"], "is not available", sums)
    _check_training(need, task.training)
    _check_round(file, need, task.round)


def _check_alarm(need: _Need, alarm: Alarm) -> None:
    rare, often = FALSE_PER_WEEK
    week = f"write {rare:g} to {often:g}"
    need(rare <= alarm.false_per_week <= often, ["alarm", "false_per_week"], "out of range", week)
    part = alarm.quantile is None or 0 < alarm.quantile < 1
    need(part, ["alarm", "quantile"], "out of range", "write a part, such as 0.99")


def _check_window(need: _Need, w: Window, channels: int) -> None:
    need(1 <= w.length <= 65_536, ["window", "length"], "out of range", "write 1 to 65536")  # noqa: PLR2004
    need(1 <= w.stride <= MAX_STRIDE, ["window", "stride"], "out of range", f"write 1 to {MAX_STRIDE}")
    large = f"{w.length * channels} values in a window"
    few = f"length * signals may be {MAX_WINDOW_VALUES} at most"
    need(w.length * channels <= MAX_WINDOW_VALUES, ["window", "length"], large, few)
    need(0 < w.rate_hz <= MAX_RATE_HZ, ["window", "rate_hz"], "out of range", "rows per second, above 0, at most 1e6")
    need(0 <= w.min_quality <= 1, ["window", "min_quality"], "out of range", "write 0.0 to 1.0")


def _check_target(need: _Need, task: Task) -> None:
    if task.kind == "anomaly":
        need(task.target is None, ["target"], "an anomaly task has no target", "remove it, or change kind")
    else:
        need(task.target is not None, ["target"], "missing", "add [target] with the name of what is learnt")
    if task.kind == "classification" and task.target:
        many = 2 <= len(task.target.classes) <= 1000  # noqa: PLR2004
        need(many, ["target", "classes"], "needs two classes or more", 'write classes = ["ok", "worn"]')
        for name in task.alarm.classes:
            known = name in task.target.classes
            need(known, ["alarm", "classes"], f"no class {name!r}", "use a name of target.classes")
    if task.target and task.target.range:
        low, high = task.target.range
        need(low < high, ["target", "range"], "is empty", "write [lowest, highest]")


def _check_net(need: _Need, task: Task) -> None:
    rebuilds, length = task.net == "autoencoder", task.window.length
    need(not rebuilds or task.kind == "anomaly", ["net"], "autoencoder learns no target", "write tcn, mlp or cnn2d")
    square = task.net != "cnn2d" or math.isqrt(length) ** 2 == length
    need(square, ["window", "length"], f"{length} values are no square picture", "write a square, such as 4096")
    need(rebuilds or task.kind != "anomaly", ["net"], "gives no reconstruction", "write autoencoder")


def _check_training(need: _Need, t: Training) -> None:
    need(0 < t.holdout < 1, ["training", "holdout"], "out of range", "write a part, such as 0.2")
    need(1 <= t.epochs <= MAX_EPOCHS, ["training", "epochs"], "out of range", f"write 1 to {MAX_EPOCHS}")
    need(0 <= t.proximal <= MAX_PROXIMAL, ["training", "proximal"], "out of range", "write 0.0 (none) to 100")
    need(0 <= t.tune <= MAX_EPOCHS, ["training", "tune"], "out of range", f"write 0 to {MAX_EPOCHS}")
    need(1 <= t.batch <= MAX_BATCH, ["training", "batch"], "out of range", f"write 1 to {MAX_BATCH}")
    need(0 < t.lr <= 1, ["training", "lr"], "out of range", "write a number above 0, at most 1")
    need(1 <= t.min_windows <= t.max_windows, ["training", "min_windows"], "out of range", "1 to max_windows")


def _check_round(file: TomlFile, need: _Need, r: Round) -> None:
    need(r.min_gateways >= 1, ["round", "min_gateways"], "out of range", "write 1 or more")
    need(r.keep is None or 0 < r.keep <= MOST_KEPT, ["round", "keep"], "out of range", "write 0.001 to 0.5")
    wait = r.mode == "async" or r.buffer is None
    need(wait, ["round", "buffer"], "a synchronous round waits for everybody", 'write mode = "async", or leave it out')
    own = r.codec != "ring" or r.weigh == "samples"
    need(own, ["round", "weigh"], "in a ring gateways weigh themselves", 'write weigh = "samples", or another codec')
    step = r.codec != "ring" or r.mode == "sync"
    need(step, ["round", "codec"], "sums in a ring are of one round", 'write mode = "sync", or another codec')
    few = r.buffer is not None and r.buffer < r.min_gateways
    need(not few, ["round", "buffer"], "less than min_gateways", f"write {r.min_gateways} or more")
    need(0 <= r.momentum < 1, ["round", "momentum"], "out of range", "write 0.0 to 0.99")
    need(r.rounds is None or r.rounds >= 1, ["round", "rounds"], "out of range", "write 1 or more, or leave it out")
    durations = {"deadline": r.deadline, "every": r.every or "0s", "early": r.early or "0s", "vote": r.vote or "0s"}
    for key, text in durations.items():
        try:
            duration = seconds(text)
        except ValueError as error:
            raise file.error(["round", key], str(error), 'write "90s", "2h", "7d" or "2w"') from None
        need(duration <= MAX_DURATION_S, ["round", key], "out of range", "write ten years at most")
    need(0 <= r.tolerance <= 1, ["round", "tolerance"], "out of range", "write 0.0 to 1.0")
    step = r.mode == "sync" or not r.vote_s
    need(step, ["round", "vote"], "an asynchronous federation waits for no vote", 'write "0s", or leave it out')
    soon = r.early_s is None or (r.mode == "sync" and r.early_s < r.every_s)
    need(soon, ["round", "early"], "no earlier than the next round anyway", "write less than every, or leave it out")


def _is_name(text: str) -> bool:
    return 0 < len(text) <= 64 and all(c.isascii() and (c.isalnum() or c in "_-") for c in text)  # noqa: PLR2004
