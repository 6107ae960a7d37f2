"""Pure: when training may start, as `[training] train_when` says it: while the line stands still, at the weekend.

    plc1/Running == 0
    Sat 06:00-14:00 or Sun
    Mon-Fri 22:00-06:00 and plc1/Running == 0 or Sat,Sun

Alternatives are joined by `or`, what must hold together by `and`. A comparison is with a tag's newest value, and does
not hold while that is not good. Hours are on the gateway's own clock, in its time zone; those that pass midnight belong
to the day on which they begin, and without days to all of them.
"""

import math
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import NamedTuple

from edge.window import OPERATORS, Condition, parse_gate

_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_DAY = "|".join(_DAYS)
_HOURS = re.compile(
    rf"(?P<days>(?:{_DAY})(?:-(?:{_DAY}))?(?:,(?:{_DAY})(?:-(?:{_DAY}))?)*)?"
    r"(?:(?:^|\s+)(?P<from>[012]?\d:[0-5]\d)-(?P<to>[012]?\d:[0-5]\d))?"
)
_DAY_MINUTES = 24 * 60


class Hours(NamedTuple):
    """So many `minutes` from `start`, in minutes after midnight, on some days (0 is Monday)."""

    days: frozenset[int]
    start: int
    minutes: int

    def begins(self, day: datetime) -> datetime | None:
        """When they begin on a day, given its midnight; None if they do not."""
        return day + timedelta(minutes=self.start) if day.weekday() in self.days else None

    def hold(self, now: datetime) -> bool:
        """Whether a time lies in them."""
        today = now.replace(hour=0, minute=0, second=0, microsecond=0)
        begun = (self.begins(day) for day in (today, today - timedelta(days=1)))
        return any(at is not None and at <= now < at + timedelta(minutes=self.minutes) for at in begun)


# Alternatives, and of each what must hold together.
Rule = tuple[tuple[Hours | Condition, ...], ...]


def parse_rule(text: str) -> Rule:
    """Parse what `train_when` says; ValueError says what is wrong."""
    return tuple(
        tuple(_term(term.strip()) for term in re.split(r"\s+and\s+", part)) for part in re.split(r"\s+or\s+", text)
    )


def _term(text: str) -> Hours | Condition:
    match = _HOURS.fullmatch(text)
    if not text or match is None:
        try:
            return parse_gate(text)[0]
        except ValueError:
            raise ValueError(f"{text!r} is neither hours nor a comparison") from None
    days = frozenset(range(7)) if match["days"] is None else _days(match["days"])
    if match["from"] is None:
        return Hours(days, 0, _DAY_MINUTES)
    start, end = _minutes(match["from"]), _minutes(match["to"])
    if start in {_DAY_MINUTES, end}:
        raise ValueError(f"{text!r} is no time at all")
    return Hours(days, start, (end - start) % _DAY_MINUTES or _DAY_MINUTES)


def _days(text: str) -> frozenset[int]:
    out = set[int]()
    for part in text.split(","):
        first, _, last = part.partition("-")
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        out |= {(begin + i) % 7 for i in range((end - begin) % 7 + 1)}
    return frozenset(out)


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    found = 60 * int(hours) + int(minutes)
    if found > _DAY_MINUTES:
        raise ValueError(f"{text!r} is no time of a day")
    return found


def holds(rule: Rule, now: datetime, value: Callable[[str], float]) -> bool:
    """Whether training may start at a local time; `value` gives a tag's newest value, NaN where it is not good."""
    return any(all(_holds(term, now, value) for term in terms) for terms in rule)


def _holds(term: Hours | Condition, now: datetime, value: Callable[[str], float]) -> bool:
    if isinstance(term, Hours):
        return term.hold(now)
    known = value(term.tag)
    return not math.isnan(known) and OPERATORS[term.compare](known, term.number)


def opens(rule: Rule, now: datetime) -> datetime | None:
    """The earliest local time, `now` or later, at which training may start as far as the hours go; None for never."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    days = [midnight + timedelta(days=i) for i in range(8)]
    found = list[datetime]()
    for terms in rule:
        hours = [term for term in terms if isinstance(term, Hours)]
        begins = [at for one in hours for day in days if (at := one.begins(day)) is not None and at > now]
        found += [at for at in (now, *begins) if all(one.hold(at) for one in hours)]
    return min(found, default=None)
