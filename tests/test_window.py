"""Windows: the live half and the stored half must agree on every sample sequence, and never span what they must not."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge.stored import stored_windows
from edge.tags import Quality, Sample, Scan
from edge.window import Columns, Condition, Win, Windower, Wiring, parse_gate
from models.spec import Window

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND
GOOD, UNCERTAIN, BAD = Quality.GOOD, Quality.UNCERTAIN, Quality.BAD


def sample(tag: str, at: float, value: Any = 1.0, quality: Quality = GOOD) -> Sample:
    return Sample(tag, START + round(at * SECOND), value, quality)


def wiring(*signals: str, length: int = 3, stride: int = 1, waveform: bool = False, **more: Any) -> Wiring:
    return Wiring(Window(length=length, stride=stride, waveform=waveform), signals or ("a/x",), **more)


def columns(samples: list[Sample]) -> dict[str, Columns]:
    """What the store gives back of those samples: by tag, in source time, waveforms without their notices."""
    out: dict[str, Columns] = {}
    values: NDArray[np.floating]
    for tag in {s.tag for s in samples}:
        mine = sorted((s for s in samples if s.tag == tag), key=lambda s: s.time_ns)
        arrays = [s for s in mine if not isinstance(s.value, float) and len(s.value)]
        mine = arrays or [s for s in mine if isinstance(s.value, float)]
        if mine:
            times = np.array([s.time_ns for s in mine], np.int64)
            values = np.array([s.value for s in mine]).astype(np.float32 if arrays else np.float64)
            out[tag] = times, values, np.array([s.quality for s in mine], np.int8)
    return out


def same(left: list[Win], right: list[Win]) -> None:
    assert [w.end_ns for w in left] == [w.end_ns for w in right]
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        assert a.x.dtype == b.x.dtype == np.float32
        np.testing.assert_array_equal(
            [a.quality, a.active, a.segment, a.label], [b.quality, b.active, b.segment, b.label]
        )


def second(end: Win) -> float:
    return (end.end_ns - START) / SECOND


# -- live is stored ----------------------------------------------------------------------------------------------------

SIGNALS = ("a/x", "b/y", "a/z")
LAG_S = 5


@st.composite
def plants(draw: st.DrawFn) -> tuple[Wiring, list[list[Sample]]]:
    """Three signals, target, gate and segment on two sources; each source in its own time order, batches as they come.

    Whole sources lag by less than LAG_S, and a pause of all of them is shorter than two windows.
    """
    made = Wiring(
        Window(
            length=draw(st.integers(1, 4)), stride=draw(st.integers(1, 6)), rate_hz=draw(st.sampled_from([1.0, 2.0]))
        ),
        SIGNALS[: draw(st.integers(1, 3))],
        target="b/label",
        gate=parse_gate("a/run == 1 and b/y >= 0"),
        segment="b/part",
    )
    tick = made.step_ns // 2
    at, feeds = START + draw(st.integers(0, made.step_ns)), dict[str, list[Sample]](a=[], b=[])
    for _ in range(draw(st.integers(0, 40))):
        tag = draw(st.sampled_from(made.tags))
        quality = draw(st.sampled_from([GOOD, GOOD, GOOD, UNCERTAIN, BAD]))
        number = draw(st.sampled_from([0.0, 1.0])) if tag in {"a/run", "b/part"} else float(draw(st.integers(-1, 9)))
        feeds[tag[0]].append(Sample(tag, at, math.nan if quality is BAD else number, quality))
        at += draw(st.sampled_from([0, 0, 1, tick, tick, 2 * tick, 4 * tick]))
    # Deliver: batches of one source, never so far ahead of the other that its samples come later than the lag.
    batches = []
    while feeds["a"] or feeds["b"]:
        first = min(feed[0].time_ns for feed in feeds.values() if feed)
        source = draw(
            st.sampled_from([s for s, feed in feeds.items() if feed and feed[0].time_ns < first + LAG_S * SECOND])
        )
        ready = [s for s in feeds[source] if s.time_ns < first + LAG_S * SECOND]
        count = draw(st.integers(1, len(ready)))
        batches.append(feeds[source][:count])
        del feeds[source][:count]
    return made, batches


@given(plants())
@settings(max_examples=150, deadline=None)
def test_live_windows_are_the_stored_windows(plant: tuple[Wiring, list[list[Sample]]]) -> None:
    made, batches = plant
    live, got = Windower(made, LAG_S * SECOND), list[Win]()
    for batch in batches:
        got += live.feed(batch)
    stored = list(stored_windows(made, columns([s for b in batches for s in b if s.tag in made.tags])))
    same(got, [w for w in stored if w.end_ns < live.closed_ns])
    got += live.advance((LAG_S + 1) * SECOND)
    same(got[: len(stored)], stored)
    assert live.late == 0


@given(
    st.lists(st.tuples(st.sampled_from([0.25, 0.5, 1.0, 3.0, 40.0]), st.sampled_from([GOOD, GOOD, BAD])), max_size=60),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 7),
)
@settings(max_examples=200, deadline=None)
def test_one_source_agrees_over_any_pause(
    steps: list[tuple[float, Quality]], length: int, stride: int, batch: int
) -> None:
    made, at, samples = wiring(length=length, stride=stride), 0.0, list[Sample]()
    for number, (step, quality) in enumerate(steps):
        at += step
        samples.append(sample("a/x", at, float(number), quality))
    live, got = Windower(made), list[Win]()
    for start in range(0, len(samples), batch):
        got += live.feed(samples[start : start + batch])
    same(got, list(stored_windows(made, columns(samples))))
    # A pause longer than two windows is in none of them.
    gaps = [(a.time_ns, b.time_ns) for a, b in pairwise(samples) if b.time_ns - a.time_ns > (2 * length + 3) * SECOND]
    for window in got:
        begin = window.end_ns - (length - 1) * SECOND
        assert not [1 for a, b in gaps if begin <= a + SECOND and window.end_ns >= b]


@st.composite
def snapshots(draw: st.DrawFn) -> list[list[Sample]]:
    """Waveforms of two sources with their target and segment, stamped alike; some missing, some Bad."""
    feeds, batches = dict[str, list[Sample]](a=[], b=[]), list[list[Sample]]()
    for at in range(draw(st.integers(0, 8))):
        row = [sample("a/part", at, float(draw(st.integers(0, 1)))), sample("b/label", at, float(at))]
        for tag in ("a/w", "b/v"):
            quality = draw(st.sampled_from([GOOD, GOOD, GOOD, UNCERTAIN, BAD]))
            width = 0 if quality is BAD else 4
            row.append(sample(tag, at, np.arange(at, at + width, dtype=np.float32), quality))
        for one in draw(st.permutations(row)):
            if draw(st.integers(0, 5)):
                feeds[one.tag[0]].append(one)
    for source, start in draw(st.permutations([(s, i) for s in feeds for i in range(0, len(feeds[s]), 3)])):
        batches.append(feeds[source][start : start + 3])
    # Each source in its own order.
    order = {s: iter([feeds[s][i : i + 3] for i in range(0, len(feeds[s]), 3)]) for s in feeds}
    return [next(order[batch[0].tag[0]]) for batch in batches]


@given(snapshots())
@settings(max_examples=100, deadline=None)
def test_live_waveforms_are_the_stored_waveforms(batches: list[list[Sample]]) -> None:
    made = wiring("a/w", "b/v", length=4, waveform=True, target="b/label", segment="a/part")
    live, got = Windower(made, 100 * SECOND), list[Win]()
    for batch in batches:
        got += live.feed(batch)
    got += live.advance(101 * SECOND)
    same(got, list(stored_windows(made, columns([s for b in batches for s in b]))))


# -- what a window is --------------------------------------------------------------------------------------------------


def ramp(count: int, tag: str = "a/x", first: int = 0) -> list[Sample]:
    return [sample(tag, at, float(at)) for at in range(first, first + count)]


@pytest.mark.parametrize("waveform", [False, True])
def test_values_come_in_the_tasks_units_live_and_stored(*, waveform: bool) -> None:
    """300 K is 26.85 degC; the gate stays in the tag's own unit."""
    units: dict[str, Any] = {"gains": (1.0, 10.0, 0.01), "offsets": (-273.15, 0.0, 0.0)}
    gate = parse_gate("a/run > 99")
    made = wiring("a/x", "a/y", length=2, waveform=waveform, target="a/t", gate=gate, **units)
    value = {"a/x": 300.0, "a/y": 1.5, "a/t": 50.0, "a/run": 100.0}
    samples = [sample(tag, at, v) for at in range(4) for tag, v in value.items()]
    if waveform:
        wave = {tag: np.array([value[tag]] * 2, np.float32) for tag in ("a/x", "a/y")}
        samples = [s._replace(value=wave[s.tag]) if s.tag in wave else s for s in samples]
        samples.sort(key=lambda s: (s.time_ns, not isinstance(s.value, float)))
    live = Windower(made).feed(samples)
    same(live, list(stored_windows(made, columns(samples)))[: len(live)])
    np.testing.assert_allclose(live[-1].x, np.array([[26.85, 26.85], [15, 15]], np.float32), rtol=1e-6)
    assert live[-1].label == pytest.approx(0.5)
    assert live[-1].active


def test_a_value_out_of_its_tags_range_is_masked() -> None:
    made = wiring("a/x", ranges=((0.0, 5.0),), gains=(2.0,), offsets=(0.0,))
    samples = [sample("a/x", at, value) for at, value in enumerate([1.0, -0.1, 5.0, 5.1])]
    (window,) = list(stored_windows(made, columns(samples)))
    np.testing.assert_array_equal(window.x, np.array([[2, np.nan, 10]], np.float32))
    same(Windower(made).feed(samples), [window])


def test_a_row_holds_the_last_value_of_each_signal() -> None:
    live = Windower(wiring("a/x", "a/y"))
    got = live.feed([sample("a/y", 0, 7.0), *ramp(4), sample("a/x", 3.5, 9.0), sample("a/x", 4.1, 5.0)])
    assert [second(w) for w in got] == [2, 3, 4]
    assert got[0].x.tolist() == [[0, 1, 2], [7, 7, 7]]
    assert got[2].x.tolist() == [[2, 3, 9], [7, 7, 7]]
    assert math.isnan(got[0].label)
    assert math.isnan(got[0].segment)
    assert got[0].active


@pytest.mark.parametrize(
    ("stride", "ends"), [(1, [2, 3, 4, 5, 6, 7, 8]), (2, [2, 4, 6, 8]), (3, [2, 5, 8]), (5, [2, 7])]
)
def test_a_new_window_starts_every_stride(stride: int, ends: list[int]) -> None:
    assert [second(w) for w in Windower(wiring(stride=stride)).feed(ramp(10))] == ends
    assert [second(w) for w in stored_windows(wiring(stride=stride), columns(ramp(10)))] == ends


def test_many_rows_pass_through_one_small_buffer() -> None:
    got = list(stored_windows(wiring(length=5), columns(ramp(10_000))))
    assert len(got) == 10_000 - 5
    assert got[-1].x.tolist() == [[9994, 9995, 9996, 9997, 9998]]
    same(Windower(wiring(length=5)).feed(ramp(10_000)), got)


def test_no_window_spans_a_change_of_segment() -> None:
    made = wiring("a/x", segment="a/part")
    samples = sorted([*ramp(12), *(sample("a/part", at, float(at // 4)) for at in range(12))], key=lambda s: s.time_ns)
    got = Windower(made).feed(samples)
    assert [(w.segment, w.x[0].tolist()) for w in got] == [
        (0, [0, 1, 2]), (0, [1, 2, 3]), (1, [4, 5, 6]), (1, [5, 6, 7]), (2, [8, 9, 10]),
    ]  # fmt: skip


def test_a_segment_that_is_bad_for_a_moment_is_no_change() -> None:
    made = wiring("a/x", segment="a/part")
    samples = ramp(6)
    samples[1:1] = [sample("a/part", 0, 5.0), sample("a/part", 0.5, math.nan, BAD)]
    samples[-1:-1] = [sample("a/part", 3.5, 5.0)]
    got = Windower(made).feed(samples)
    assert [(second(w), w.segment) for w in got] == [(2, 5), (3, 5), (4, 5)]


@pytest.mark.parametrize("quality", [BAD, UNCERTAIN])
def test_what_is_not_good_is_masked(quality: Quality) -> None:
    samples = [sample("a/x", 0, 1.0), sample("a/x", 1, 8.0, quality), sample("a/x", 2, 3.0), sample("a/x", 2.5, 3.0)]
    (window,) = Windower(wiring()).feed(samples)
    assert window.x[0, [0, 2]].tolist() == [1, 3]
    assert math.isnan(window.x[0, 1])
    assert window.quality == pytest.approx(2 / 3)


def test_the_gate_holds_all_through_or_not_at_all() -> None:
    made = wiring("a/x", gate=parse_gate("a/run == 1 and a/speed > 99.5"))
    speeds = [sample("a/speed", at, v) for at, v in [(0, 100.0), (6, 99.0), (10, 100.0)]]
    runs = [sample("a/run", 0, 1.0), sample("a/run", 14, 1.0, UNCERTAIN)]
    samples = sorted([*ramp(18), *speeds, *runs], key=lambda s: s.time_ns)
    got = {second(w): w.active for w in Windower(made).feed(samples)}
    assert {at for at, active in got.items() if active} == {2, 3, 4, 5, 12, 13}
    assert len(got) == 15


@pytest.mark.parametrize(
    ("text", "compare", "number"),
    [
        ("p/R==1", "==", 1),
        ("p/R != 0", "!=", 0),
        ("p/R >= -2.5", ">=", -2.5),
        ("p/R <= 3", "<=", 3),
        (" p/R < 4 ", "<", 4),
    ],
)
def test_gates(text: str, compare: str, number: float) -> None:
    assert parse_gate(text) == (Condition("p/R", compare, number),)


@pytest.mark.parametrize(
    "text", ["", "p/R", "p/R = 1", "p/R == on", "p/R == 1 or p/S == 2", "p/R == 1 and", "and", "1 == p/R ="]
)
def test_no_gates(text: str) -> None:
    with pytest.raises(ValueError, match="is no comparison"):
        parse_gate(text)


def test_the_label_is_the_target_at_the_end() -> None:
    made = wiring("a/x", target="a/t")
    samples = sorted(
        [*ramp(6), sample("a/t", 0, 1.0), sample("a/t", 4, 2.0), sample("a/t", 5, 3.0, BAD)], key=lambda s: s.time_ns
    )
    live = Windower(made)
    got = [*live.feed(samples), *live.advance(4 * SECOND)]
    assert [w.label for w in got[:3]] == [1, 1, 2]
    assert math.isnan(got[3].label)


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_quiet_source_is_waited_for_as_long_as_the_lag() -> None:
    live = Windower(wiring("a/x", "b/y"), 2 * SECOND)
    assert live.feed([sample("b/y", 0, 5.0), *ramp(2)]) == []
    got = live.feed(ramp(4, first=2))
    assert [second(w) for w in got] == [2]
    assert got[0].x.tolist() == [[0, 1, 2], [5, 5, 5]]
    got = live.feed([sample("b/y", 3.5, 6.0)])
    assert [(second(w), w.x[1].tolist()) for w in got] == [(3, [5, 5, 5])]
    assert live.late == 0


def test_a_source_that_has_not_spoken_yet_is_waited_for_too() -> None:
    live = Windower(wiring("a/x", "b/y"), 2 * SECOND)
    assert live.feed(ramp(3)) == []
    got = live.feed([sample("b/y", 0, 5.0), sample("b/y", 2.5, 6.0), *ramp(3, first=3)])
    assert got[0].x.tolist() == [[0, 1, 2], [5, 5, 5]]
    assert live.late == 0


def test_what_comes_later_than_the_lag_is_counted_and_holds_from_then_on() -> None:
    live = Windower(wiring("a/x", "b/y"), 2 * SECOND)
    live.feed(ramp(10))
    got = live.feed([sample("b/y", 1, 5.0), sample("b/y", 2, 6.0), sample("b/y", 9.5, 7.0)])
    assert live.late == 2
    assert [second(w) for w in got] == [7, 8]
    assert np.isnan(got[0].x[1, :2]).all()
    assert got[1].x[1].tolist()[1:] == [6, 6]


def test_nothing_heard_means_the_values_hold() -> None:
    live = Windower(wiring(), 2 * SECOND)
    assert live.advance(100 * SECOND) == []
    assert [second(w) for w in live.feed(ramp(4))] == [2]
    assert live.advance(SECOND) == []
    got = live.advance(7 * SECOND)
    assert [(second(w), w.x[0, -1]) for w in got] == [(at, 3) for at in (3, 4, 5, 6, 7)]
    assert live.advance(7 * SECOND) == []
    assert [second(w) for w in live.advance(8 * SECOND)] == [8]
    assert [(second(w), w.x[0].tolist()) for w in live.feed(ramp(1, first=10))] == [(9, [3, 3, 3])]


def test_years_at_once_are_little_work() -> None:
    """A jump of ten years is 300 million rows; a window begins anew after it instead."""
    ten_years = 10 * 365 * 86_400
    live = Windower(wiring(segment="b/part"), 2 * SECOND)
    assert [second(w) for w in live.feed([*ramp(4), *ramp(1, first=ten_years)])] == [2, 3]
    assert [second(w) for w in live.advance(10 * ten_years * SECOND)] == [ten_years]
    assert live.feed(ramp(1, first=5 * ten_years)) == []
    assert [second(w) for w in live.feed(ramp(6, first=12 * ten_years))] == [12 * ten_years + 2]
    samples = [*ramp(5), *ramp(4, first=ten_years)]
    assert [second(w) for w in stored_windows(wiring(), columns(samples))] == [2, 3, 4, ten_years + 2]
    assert [second(w) for w in Windower(wiring()).feed(samples)] == [2, 3, 4, ten_years + 2]


def test_a_clock_that_is_set_back_holds_nothing_up() -> None:
    live = Windower(wiring("a/x", "a/y"), 2 * SECOND)
    live.feed([sample("a/y", 0, 5.0), *ramp(10, first=3600)])
    got = [w for at in range(500) for w in live.feed([sample("a/x", at, float(at))])]
    assert live.restarts == 1
    assert live.late < 10
    assert len(live._pending) <= 1
    first = round(second(got[0]))
    assert first < 13
    assert [second(w) for w in got] == list(range(first, 499))
    assert got[-1].x.tolist() == [[496, 497, 498], [5, 5, 5]]


def test_one_wrong_stamp_in_the_future_holds_nothing_up() -> None:
    live = Windower(wiring("a/x", "a/y"), 2 * SECOND)
    live.feed(ramp(5))
    live.feed([sample("a/y", 10**9, 5.0)])
    got = [w for at in range(5, 500) for w in live.feed([sample("a/x", at, float(at))])]
    assert got[-1].x[0].tolist() == [496, 497, 498]
    assert len(live._pending) <= 1


def test_a_fast_clock_that_is_set_back_and_the_tag_that_is_silent_meanwhile() -> None:
    year = 365 * 86_400
    live = Windower(wiring("a/x", "b/y"), 2 * SECOND)
    live.feed([s for at in range(20) for s in (sample("a/x", year + at / 4), sample("b/y", at / 4, 7.0))])
    got = [w for at in range(5, 25) for w in live.feed([sample("a/x", at, float(at)), sample("b/y", at, 8.0)])]
    assert live.restarts == 1
    assert got[-1].x.tolist() == [[21, 22, 23], [8, 8, 8]]
    assert second(got[0]) < 16


def test_old_values_that_a_source_tells_again_are_no_new_time() -> None:
    tags = [f"a/t{i}" for i in range(100)]
    live = Windower(wiring("a/x", *tags), 2 * SECOND)
    live.feed([*(sample(tag, 0, 1.0) for tag in tags), *ramp(10, first=3600)])
    live.feed([sample(tag, 0, 2.0) for tag in tags])
    got = live.feed(ramp(5, first=3610))
    assert live.restarts == 0
    assert live.late == 100
    assert got[-1].x[:2].tolist() == [[3611, 3612, 3613], [2, 2, 2]]


# -- waveforms ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_goes_with_the_scalars_of_its_instant() -> None:
    made = wiring("a/w", length=4, waveform=True, target="a/t", segment="a/part", gate=parse_gate("a/run == 1"))
    live = Windower(made)
    wave = np.arange(4, dtype=np.float32)
    got = live.feed([
        sample("a/w", 0, wave), sample("a/t", 0, 3.0), sample("a/run", 0, 1.0), sample("a/part", 0, 8.0),
        sample("a/w", 1, wave + 1), sample("a/run", 1, 0.0), sample("a/t", 1, 4.0),
        sample("a/w", 2, np.empty(0, np.float32), BAD),
        sample("a/w", 3, wave, UNCERTAIN), sample("a/part", 4, 9.0),
    ])  # fmt: skip
    assert [(second(w), w.label, w.segment, w.active, w.quality) for w in got] == [
        (0, 3, 8, True, 1),
        (1, 4, 8, False, 1),
    ]
    assert got[1].x.tolist() == [[1, 2, 3, 4]]


def test_two_waveforms_make_a_window_only_of_one_instant() -> None:
    live = Windower(wiring("a/w", "a/v", length=2, waveform=True))
    wave = np.ones(2, np.float32)
    got = live.feed([
        sample("a/w", 0, wave), sample("a/w", 1, 2 * wave), sample("a/v", 1, 3 * wave),
        sample("a/v", 2, 4 * wave), sample("a/w", 3, 5 * wave), sample("a/v", 3, 6 * wave), sample("a/v", 9, wave),
    ])  # fmt: skip
    assert [(second(w), w.x[:, 0].tolist()) for w in got] == [(1, [2, 3]), (3, [5, 6])]


def test_a_scan_is_its_samples() -> None:
    made = wiring("a/x", "a/y", length=4, target="a/z")
    refs = ("a/other", *made.tags, "a/more")
    together, alone = Windower(made), Windower(made)
    found, expected = list[Win](), list[Win]()
    for i in (0, 1, 2, 5, 4, 7, 9, 12, 40, 41, 45, 50, 51, 52):
        quality = np.roll(np.array([2, 2, 1, 2, 0], np.int8), i)
        values = np.where(quality == 2, np.arange(5) * 10.0 + i, np.nan)
        scan = Scan(refs, START + i * SECOND // 2, values, quality)
        found += together.feed(scan)
        expected += alone.feed(list(scan))
    assert len(found) > 3
    same(found, expected)
    assert (together.late, together.restarts) == (alone.late, alone.restarts)
    assert together.late
