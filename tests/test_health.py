"""Per-tag health from the columns that the store writes: rates, gaps, stuck and silent tags, bad shares, ranges."""

from typing import Any

import numpy as np
import pytest

from edge.flush import Part
from edge.health import MOST_SHOWN, Table, Watch
from edge.tags import NO_BOUND, Quality, Tag
from edge.window import Columns

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
GOOD, BAD = Quality.GOOD, Quality.BAD


def columns(first_s: int, values: list[float], quality: Quality = GOOD) -> Columns:
    times = np.array([START + (first_s + i) * SECOND for i in range(len(values))], np.int64)
    return times, np.array(values), np.full(len(values), quality, np.int8)


class One:
    """A table of one tag."""

    def __init__(self, low: float, high: float) -> None:
        self.table = Table([low], [high])

    def take(self, flush: Columns) -> None:
        times, values, quality = flush
        self.table.take(np.array([0]), (times[None], values[None], quality[None]), 1)

    def word(self, now_ns: int) -> str:
        return self.table.word(0, now_ns)

    def snapshot(self, now_ns: int) -> dict[str, Any]:
        return self.table.snapshot(0, now_ns)


def fed(*flushes: Columns, low: float = -NO_BOUND, high: float = NO_BOUND) -> One:
    one = One(low, high)
    for flush in flushes:
        one.take(flush)
    return one


def at(second: float) -> int:
    return START + round(second * SECOND)


def moving(first_s: int, count: int) -> Columns:
    return columns(first_s, [float(i % 7) for i in range(first_s, first_s + count)])


def test_a_tag_that_moves_once_a_second_is_well() -> None:
    one = fed(*(moving(i, 5) for i in range(0, 100, 5)))
    assert one.snapshot(at(100)) == {
        "value": 1.0,
        "samples": 100,
        "rate_hz": 1.0,
        "bad_ratio": 0.0,
        "out_of_range": 0,
        "gaps": 0,
        "age_s": 1.0,
        "unchanged_s": 0.0,
        "word": "",
    }


def test_a_tag_that_says_the_same_for_too_long_is_stuck_and_a_constant_is_not() -> None:
    stuck = fed(*(moving(i, 5) for i in range(0, 100, 5)), columns(100, [3.0] * 40))
    assert stuck.word(at(140)) == "stuck"
    assert stuck.snapshot(at(140))["unchanged_s"] == pytest.approx(39, abs=1)
    stuck.take(moving(140, 5))
    assert stuck.word(at(145)) == ""
    assert fed(columns(0, [3.0] * 500)).word(at(500)) == ""


def test_a_tag_that_says_nothing_any_more_is_silent_and_a_pause_is_a_gap() -> None:
    one = fed(*(moving(i, 5) for i in range(0, 100, 5)))
    assert one.word(at(120)) == ""
    assert one.word(at(140)) == "silent"
    one.take(moving(200, 5))
    assert one.table.gaps[0] == 1
    assert one.word(at(205)) == ""


def test_bad_values_are_a_share_and_outliers_a_count() -> None:
    one = fed(columns(0, [float("nan")] * 30, BAD))
    assert one.word(at(30)) == "bad"
    assert one.table.bad[0] == 30
    one = fed(columns(0, [1.0, -5.0, 99.0, 2.0]), low=0, high=10)
    assert one.table.out_of_range[0] == 2


def test_a_clock_that_was_wrong_leaves_no_word_behind() -> None:
    one = fed(*(moving(i, 5) for i in range(0, 50, 5)), moving(10**8, 5), moving(50, 5))
    assert (one.word(at(55)), one.snapshot(at(55))["age_s"]) == ("", 1.0)
    assert one.word(at(120)) == "silent"


def test_waveforms_have_a_rate_and_no_values() -> None:
    times, _, quality = columns(0, [0.0] * 3)
    one = fed((times, np.zeros((3, 16), np.float32), quality))
    assert one.snapshot(at(3))["rate_hz"] == 1.0
    assert one.snapshot(at(3))["unchanged_s"] is None


def test_only_a_bounded_number_is_shown_and_the_unwell_are_among_them() -> None:
    tags = {f"p/t{i}": Tag(source="p", name=f"t{i}", address="x") for i in range(MOST_SHOWN + 50)}
    watch = Watch(tags)
    for ref in tags:
        watch.take(Part((ref,), 1, columns(0, [1.0])))
    watch.take(Part(("p/unknown",), 1, columns(0, [1.0])))
    last = list(tags)[-1]
    watch.take(Part((last,), 99, columns(1, [float("nan")] * 99, BAD)))
    for _ in range(50):
        watch.take(Part((last,), 99, columns(1, [float("nan")] * 99, BAD)))
    shown = watch.snapshot("p", at(2))
    assert len(shown) == MOST_SHOWN
    assert shown[tags[last].name]["word"] == "bad"
    assert watch.snapshot("q", at(2)) == {}


def test_tags_read_together_are_each_as_well_as_one_alone() -> None:
    refs = ("p/a", "p/b", "p/c")
    tags = {ref: Tag(source="p", name=ref[2:], address="x", low=0, high=3) for ref in refs}
    together, alone = Watch(tags), Watch(tags)
    for start in range(0, 60, 5):
        table = [columns(start, [float((i + k) % 7) for i in range(5)]) for k in range(len(refs))]
        times, values, quality = (np.concatenate(column) for column in zip(*table, strict=True))
        together.take(Part(refs, 5, (times, values, quality)))
        for ref, one in zip(refs, table, strict=True):
            alone.take(Part((ref,), 5, one))
    shown = together.snapshot("p", at(60))
    assert shown == alone.snapshot("p", at(60))
    assert [shown[name]["samples"] for name in "abc"] == [60, 60, 60]
    assert all(shown[name]["out_of_range"] for name in "abc")


def test_a_waveform_that_was_bad_for_a_moment_costs_nothing() -> None:
    watch = Watch({"p/w": Tag(source="p", name="w", address="x", width=4)})
    times, _, quality = columns(0, [0.0] * 3)
    watch.take(Part(("p/w",), 3, (times, np.zeros((3, 4), np.float32), quality)))
    watch.take(Part(("p/w",), 1, columns(3, [float("nan")], BAD)))
    times, _, quality = columns(4, [0.0] * 2)
    watch.take(Part(("p/w",), 2, (times, np.zeros((2, 4), np.float32), quality)))
    shown = watch.snapshot("p", at(6))["w"]
    assert (shown["samples"], shown["rate_hz"]) == (6, 1.0)
