"""Which tag is likely which signal of a task. Pure: names, descriptions, units, shapes, last values -> ranked guesses.

A guess is a guess: it says why, and an engineer accepts it or not. What can't be (a unit that does not convert, a
waveform for a scalar) is never proposed. Names are compared by their words, the rare ones counting most (as in inverse
document frequency), and the tags are dealt out one to a signal so that the sum of all scores is highest (the assignment
problem; Kuhn 1955, by shortest augmenting paths).
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from numpy.typing import NDArray

from edge.tags import Quality, Sample, Tag
from edge.units import SAME, UnitError, conversion
from models.spec import Signal, Target, Task

LEAST = 0.4  # below it a guess is none
_LEVEL = 0.05  # scores that differ by less tell nothing apart
_NAME, _UNIT = 0.75, 0.25  # what names and units count of a score
_DESCRIBED = 0.9  # of a word that stands in the description alone
_ALIKE = 0.8  # ratio from which two words are one, mistyped
_SHORTENED = 3  # letters from which a word may be the beginning of another
_EXTRA = 0.04  # taken off for each word of the tag that the signal does not have, up to
_MOST_EXTRA = 0.16
_OTHER = 0.25  # taken off for a word that makes it another thing: a set value, a limit
_UNWELL = 0.1  # taken off where the value that was read speaks against it
_CANDIDATES = 30  # of each signal that the assignment looks at

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
# What people shorten -> one word for it.
_WORDS = {
    short: word
    for word, shorts in {
        "temperature": "temp tmp tempr t",
        "vibration": "vib vibr vibe",
        "acceleration": "acc accel",
        "speed": "spd rpm velocity vel revs n",
        "current": "cur curr amps amp amperage i",
        "voltage": "volt volts vlt u",
        "power": "pwr pow kw",
        "pressure": "press prs pres p",
        "position": "pos posn",
        "torque": "trq tq torq",
        "force": "frc",
        "flow": "flw",
        "level": "lvl lev",
        "frequency": "freq frq hz",
        "humidity": "hum humid rh",
        "setpoint": "sp set setp setpt target",
        "actual": "act pv",
        "bearing": "brg bear",
        "spindle": "spdl spn spndl",
        "motor": "mot mtr",
        "hydraulic": "hyd hydr",
        "coolant": "cool clnt",
        "envelope": "env",
        "percent": "pct",
        "minimum": "min",
        "maximum": "max",
        "average": "avg mean",
        "command": "cmd",
        "counter": "cnt count",
        "left": "lh",
        "right": "rh",
    }.items()
    for short in shorts.split()
}
_OTHER_THING = {"setpoint", "minimum", "maximum", "limit", "alarm", "warning", "command", "simulated", "spare", "old"}
# Units that people put into names; the unit column says it better.
_UNITS = {"c", "degc", "f", "degf", "a", "v", "percent", "mm", "bar", "psi", "g", "s", "nm", "kn", "w"}


@dataclass(frozen=True)
class Guess:
    """One tag for one signal: its score, 0 to 1, and the reasons in few words."""

    signal: str
    tag: Tag
    score: float
    reasons: tuple[str, ...]


@dataclass
class Proposal:
    """What is proposed: for each signal its guess (None: nothing likely), its runners-up, and what was left out why."""

    guesses: dict[str, Guess | None] = field(default_factory=dict)
    ranked: dict[str, list[Guess]] = field(default_factory=dict)
    excluded: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def rival(self, name: str) -> Guess | None:
        """Return the tag that is as likely as the one proposed for a signal, which a person has to tell apart."""
        mine = self.guesses[name]
        others = (guess for guess in self.ranked[name] if mine and guess.tag != mine.tag)
        return next((guess for guess in others if mine and guess.score > mine.score - _LEVEL), None)


def propose(task: Task, tags: Sequence[Tag], values: Mapping[str, Sample], top: int = 3) -> Proposal:
    """Guess a tag for every signal of the task, and for its target; `values` are last samples by ref."""
    wanted: list[Signal | Target] = [*task.signal, *([task.target] if task.target else [])]
    spelled = [(words(tag.name), words(tag.description)) for tag in tags]
    counts = Counter(word for name, described in spelled for word in {*name, *described})
    rarity = {word: math.log(1 + len(tags) / count) for word, count in counts.items()}
    out, rows = Proposal(), []
    for signal in wanted:
        guesses, out.excluded[signal.name] = [], []
        for tag, (name, described) in zip(tags, spelled, strict=True):
            if reason := _impossible(task, signal, tag):
                out.excluded[signal.name].append((tag.ref, reason))
            else:
                guesses.append(_guess(signal, tag, name, described, rarity, values.get(tag.ref)))
        guesses.sort(key=lambda guess: (-guess.score, guess.tag.ref))
        rows.append(guesses[:_CANDIDATES])
    for signal, row, chosen in zip(wanted, rows, _deal(rows), strict=True):
        out.guesses[signal.name] = chosen
        out.ranked[signal.name] = [guess for guess in row if guess.score >= LEAST][:top]
    return out


def words(text: str) -> list[str]:
    """Split a name as people write them (`SpindleTemp_01`, `spindle.temp-1`) into words, shortened ones written out."""
    found = [part.lower() for part in _WORD.findall(text)]
    long = [_WORDS.get(part, part).lstrip("0") or "0" for part in found]
    kept = [word for word in dict.fromkeys(long) if word not in _UNITS]
    return kept or long


def _impossible(task: Task, signal: Signal | Target, tag: Tag) -> str:
    """Say why a tag can't be wired; nothing if it can. The same as what `edge.wiring` refuses."""
    target = isinstance(signal, Target)
    waves = task.window.waveform and not target
    if waves != bool(tag.width) or (waves and tag.width != task.window.length):
        return f"{tag.type or 'a scalar'}, not {f'float32[{task.window.length}]' if waves else 'a scalar'}"
    wanted = _wanted_unit(signal)
    return _converted(tag.unit, wanted)[1] if tag.unit and wanted else ""


@cache
def _converted(given: str, wanted: str) -> tuple[bool, str]:
    """Whether two units are the same, and why one can't become the other."""
    try:
        return conversion(given, wanted) == SAME, ""
    except UnitError as error:
        return False, str(error)


def _wanted_unit(signal: Signal | Target) -> str:
    """Return the unit; classes and counts have none, whatever the tag's column says."""
    bare = isinstance(signal, Target) and (signal.classes or signal.unit == "1")
    return "" if bare else signal.unit


def _guess(
    signal: Signal | Target, tag: Tag, name: list[str], described: list[str], rarity: Mapping[str, float],
    sample: Sample | None,
) -> Guess:  # fmt: skip
    likeness, reasons = _alike(words(signal.name), name, described, rarity)
    unit, said = _unit(_wanted_unit(signal), tag.unit)
    score = _NAME * likeness + _UNIT * unit * (likeness > 0)
    others = sorted(_OTHER_THING & set(name) - set(words(signal.name)))
    if others:
        score -= _OTHER
        reasons.append(f"but {others[0]}")
    reasons.append(said)
    if sample is not None:
        against, now = _against(signal, sample)
        score -= _UNWELL * against
        reasons.append(now)
    return Guess(signal.name, tag, round(max(0.0, score), 3), tuple(reasons))


def _alike(
    wanted: list[str], name: list[str], described: list[str], rarity: Mapping[str, float]
) -> tuple[float, list[str]]:
    """Return how much of a signal's words a tag has (0 to 1, the rare ones counting most), and which."""
    most = max(rarity.values(), default=1.0)
    total = have = 0.0
    reasons, used = [], set[str]()
    for word in wanted:
        best, likeness, where = "", 0.0, 1.0
        for candidates, worth in ((name, 1.0), (described, _DESCRIBED)):
            for other in candidates:
                if (alike := _ratio(word, other) * worth) > likeness:
                    best, likeness, where = other, alike, worth
        weight = rarity.get(best, most) if likeness else most
        total += weight
        have += weight * likeness
        if likeness:
            used.add(best)
            reasons.append(f"{word} {'=' if best == word else '~'} {best}{'' if where == 1.0 else ' (description)'}")
    extra = min(_MOST_EXTRA, _EXTRA * sum(word not in used for word in name))
    return max(0.0, have / total - extra) if have else 0.0, reasons


@cache
def _ratio(word: str, other: str) -> float:
    """Likeness of two words, 0 to 1: the same, the beginning of one another, or mistyped."""
    if word == other:
        return 1.0
    if word.isdigit() or other.isdigit():
        return 0.0
    short, long = sorted((word, other), key=len)
    if len(short) >= _SHORTENED and long.startswith(short):
        return _ALIKE
    ratio = difflib.SequenceMatcher(None, word, other).ratio()
    return ratio * _ALIKE if ratio >= _ALIKE else 0.0


def _unit(wanted: str, given: str) -> tuple[float, str]:
    if not wanted:
        return 1.0, "any unit"
    if not given:
        return 0.4, f"no unit, taken to be in {wanted}"
    if _converted(given, wanted)[0]:
        return 1.0, given
    return 0.9, f"{given} to {wanted}"


def _against(signal: Signal | Target, sample: Sample) -> tuple[bool, str]:
    """Whether the value that was read speaks against a tag, and what it was."""
    if sample.quality is not Quality.GOOD:
        return True, f"now {sample.quality.name.lower()}"
    if not isinstance(sample.value, float):
        return False, f"now {len(sample.value)} values"
    outside = False
    if isinstance(signal, Target) and signal.classes:
        outside = not (sample.value.is_integer() and 0 <= sample.value < len(signal.classes))
    elif isinstance(signal, Target) and signal.range:
        outside = not signal.range[0] <= sample.value <= signal.range[1]
    return outside, f"now {sample.value:g}{', which the task does not expect' if outside else ''}"


def _deal(rows: Sequence[Sequence[Guess]]) -> list[Guess | None]:
    """Give every row one of its guesses so that no tag is given twice and the sum of the scores is highest."""
    refs = sorted({guess.tag.ref for row in rows for guess in row})
    place = {ref: number for number, ref in enumerate(refs)}
    # A column of its own for each row stands for none.
    cost = np.full((len(rows), len(refs) + len(rows)), 2.0)
    cost[:, len(refs) :] = 1.0 - LEAST
    for number, row in enumerate(rows):
        for guess in row:
            cost[number, place[guess.tag.ref]] = 1.0 - guess.score
    out: list[Guess | None] = []
    for row, column in zip(rows, assign(cost), strict=True):
        found: Iterable[Guess] = (guess for guess in row if column < len(refs) and guess.tag.ref == refs[column])
        out.append(next((guess for guess in found if guess.score >= LEAST), None))
    return out


def assign(cost: NDArray[np.float64]) -> list[int]:
    """Return a column for each row of `cost` (N, M), N <= M, no column twice, of the lowest sum."""
    rows, columns = cost.shape
    of_row, of_column = np.zeros(rows), np.zeros(columns + 1)
    owner = np.full(columns + 1, -1)  # the row that has a column; the last column is where a search starts
    for row in range(rows):
        owner[columns] = row
        least, before = np.full(columns, np.inf), np.full(columns, columns)
        seen = np.zeros(columns + 1, bool)
        here = columns
        while owner[here] >= 0:
            seen[here] = True
            current = owner[here]
            reduced = cost[current] - of_row[current] - of_column[:columns]
            better = ~seen[:columns] & (reduced < least)
            least[better], before[better] = reduced[better], here
            there = int(np.argmin(np.where(seen[:columns], np.inf, least)))
            step = least[there]
            of_row[owner[seen]] += step
            of_column[seen] -= step
            least[~seen[:columns]] -= step
            here = there
        while here != columns:
            owner[here] = owner[before[here]]
            here = int(before[here])
        owner[columns] = -1
    out = [0] * rows
    for column in range(columns):
        if owner[column] >= 0:
            out[owner[column]] = column
    return out
