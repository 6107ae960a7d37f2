"""When training may start: hours and comparisons, what a mistake says, and the value of a tag."""

import math
import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from edge.hours import holds, opens, parse_rule
from edge.shop import Latest
from edge.tags import Quality, Sample, Scan

# A Friday.
FRIDAY = datetime(2026, 11, 20, tzinfo=UTC)


def at(day: int, clock: str) -> datetime:
    """So many days after that Friday, at a time of day."""
    hours, minutes = map(int, clock.split(":"))
    return FRIDAY + timedelta(days=day, hours=hours, minutes=minutes)


def nothing(_ref: str) -> float:
    return math.nan


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("Sat 06:00-14:00", [(1, "06:00"), (1, "13:59")], [(1, "05:59"), (1, "14:00"), (0, "07:00"), (2, "07:00")]),
        ("Sat,Sun", [(1, "00:00"), (2, "23:59")], [(0, "23:59"), (3, "00:00")]),
        ("22:00-06:00", [(0, "22:00"), (0, "05:59"), (4, "00:00")], [(0, "06:00"), (0, "21:59")]),
        # The night of a Friday ends on Saturday; that of a Sunday is none of these.
        ("Mon-Fri 22:00-06:00", [(0, "23:00"), (1, "05:59"), (3, "22:00")], [(1, "22:00"), (3, "05:00"), (1, "06:00")]),
        ("Sat-Mon 00:00-24:00", [(1, "00:00"), (2, "12:00"), (3, "23:59")], [(0, "12:00"), (4, "00:00")]),
        ("Fri 1:00-2:00 or Sun 3:00-4:00", [(0, "01:30"), (2, "03:30")], [(0, "03:30"), (2, "01:30")]),
        ("Fri-Sun and 12:00-13:00", [(0, "12:30"), (2, "12:30")], [(3, "12:30"), (1, "13:00")]),
    ],
)
def test_hours(text: str, inside: list[tuple[int, str]], outside: list[tuple[int, str]]) -> None:
    rule = parse_rule(text)
    assert [holds(rule, at(*one), nothing) for one in inside] == [True] * len(inside)
    assert [holds(rule, at(*one), nothing) for one in outside] == [False] * len(outside)


def test_comparisons_hold_by_the_newest_good_value() -> None:
    rule = parse_rule("plc1/Running == 0 and plc1/Speed < 1.5 or Sun")
    values = {"plc1/Running": 0.0, "plc1/Speed": 1.0}
    assert holds(rule, at(0, "12:00"), values.__getitem__)
    for tag, value in (("plc1/Running", 1.0), ("plc1/Speed", 1.5), ("plc1/Speed", math.nan)):
        assert not holds(rule, at(0, "12:00"), (values | {tag: value}).__getitem__)
    assert holds(rule, at(2, "12:00"), nothing)
    assert not holds(parse_rule("plc1/Running != 1"), at(0, "12:00"), nothing)


@pytest.mark.parametrize(
    ("text", "now", "then"),
    [
        ("Sat 06:00-14:00", (0, "12:00"), (1, "06:00")),
        ("Sat 06:00-14:00", (1, "07:00"), (1, "07:00")),
        ("Sat 06:00-14:00", (1, "14:00"), (8, "06:00")),
        ("22:00-06:00 or Sun", (0, "08:00"), (0, "22:00")),
        # A machine may stand still at any time.
        ("plc1/Running == 0 or Sun", (0, "08:00"), (0, "08:00")),
        ("plc1/Running == 0 and Sun", (0, "08:00"), (2, "00:00")),
        ("Fri and 22:00-06:00", (0, "10:00"), (0, "22:00")),
        ("Sat and Sun", (0, "10:00"), None),
    ],
)
def test_the_earliest_time_as_far_as_hours_go(text: str, now: tuple[int, str], then: tuple[int, str] | None) -> None:
    assert opens(parse_rule(text), at(*now)) == (None if then is None else at(*then))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Samstag 06:00-14:00", "'Samstag 06:00-14:00' is neither hours nor a comparison"),
        ("Sat 06:00", "'Sat 06:00' is neither hours nor a comparison"),
        ("", "'' is neither hours nor a comparison"),
        ("Sat or", "'Sat or' is neither hours nor a comparison"),
        ("Sat 25:00-26:00", "'25:00' is no time of a day"),
        ("06:00-06:00", "'06:00-06:00' is no time at all"),
        ("24:00-06:00", "'24:00-06:00' is no time at all"),
        ("Sat and plc1/Running", "'plc1/Running' is neither hours nor a comparison"),
    ],
)
def test_what_is_no_rule(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        parse_rule(text)


def test_a_tags_newest_value() -> None:
    latest, good = Latest(), Quality.GOOD
    assert math.isnan(latest.value("plc/a"))
    latest.take([Sample("plc/a", 5, 1.0, good)])
    assert latest.value("plc/a") == 1
    refs = ("plc/a", "plc/b")
    latest.take(Scan(refs, 6, np.array([2.0, np.nan]), np.array([good, Quality.BAD], np.int8)))
    assert latest.value("plc/a") == 2
    assert math.isnan(latest.value("plc/b"))
    latest.take([Sample("plc/a", 7, 3.0, Quality.BAD)])
    assert math.isnan(latest.value("plc/a"))
    latest.take([Sample("plc/w", 7, np.zeros(4, np.float32), good)])
    assert math.isnan(latest.value("plc/w"))
