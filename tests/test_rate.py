"""The share that a sparse update keeps, steered by the losses on the gateways' holdouts."""

import math

from hypothesis import given
from hypothesis import strategies as st

from broker.messages import MAX_PAYLOAD
from broker.rate import AROUND, KEPT, LEAST, MOST, NARROWER, WIDER, Losses, Rate, floor_of, replay

ONE = {"a": (1.0, 100), "b": (2.0, 300)}
losses = st.dictionaries(st.sampled_from("abcd"), st.tuples(st.floats(), st.integers(1, 2**40)))
counts = st.integers(1, 10_000_000)


def times(share: float, all_: Losses = ONE) -> Losses:
    return {path: (loss * share, samples) for path, (loss, samples) in all_.items()}


@given(counts, st.lists(losses, max_size=8))
def test_whatever_is_reported_the_share_stays_within_its_bounds(count: int, rounds: list[Losses]) -> None:
    rate = replay(count, rounds)
    assert LEAST <= rate.floor <= rate.keep <= rate.ceiling <= MOST
    assert rate.keep == rate.floor or rate.keep * KEPT * count + AROUND <= MAX_PAYLOAD * (1 + 1e-9)
    assert all(math.isfinite(loss) for loss in rate.usual.values())


@given(counts, st.lists(losses, max_size=8), st.integers(0, 8))
def test_a_restart_changes_nothing(count: int, rounds: list[Losses], crash_at: int) -> None:
    before = replay(count, rounds[:crash_at])
    for one in rounds[crash_at:]:
        before = before.after(one)
    assert before == replay(count, rounds)


@given(counts, st.permutations(list(ONE.items())))
def test_the_order_of_the_gateways_does_not_matter(count: int, items: list[tuple[str, tuple[float, int]]]) -> None:
    start = Rate.first(count).after(ONE)
    assert start.after(times(1.2, dict(items))).keep == start.after(times(1.2)).keep


def test_it_narrows_while_the_loss_falls_and_widens_when_it_rises() -> None:
    first = Rate.first(40_000)
    start = first.after(ONE)
    assert start.keep == first.keep  # nothing to compare with yet
    better = start.after(times(0.9))
    assert better.keep == start.keep * NARROWER
    assert start.after(times(1.005)).keep == start.keep * NARROWER  # level
    worse = better.after(times(0.8)).after(times(1.3))
    assert worse.keep == better.keep * NARROWER * WIDER
    assert worse.after(times(1.6)).keep == first.keep  # no wider than it began
    assert worse.after({}).keep == worse.keep
    assert worse.after({"c": (9.0, 5)}).keep == worse.keep  # nobody that was heard before


def test_a_slow_rise_does_not_stay_unseen() -> None:
    narrow = replay(100_000, [times(0.9**i) for i in range(5)])
    rate = narrow
    kept = [(rate := rate.after(times(0.9**4 * 1.01**i))).keep for i in range(1, 30)]
    assert kept[-1] > narrow.keep
    assert max(kept) <= narrow.ceiling


def test_what_the_gateways_disagree_on_is_noise() -> None:
    start = Rate.first(40_000).after({"a": (1.0, 100), "b": (1.0, 100), "c": (1.0, 100)})
    mixed = start.after({"a": (1.5, 100), "b": (0.8, 100), "c": (0.8, 100)})
    assert mixed.keep == start.keep * NARROWER
    # The same rise of the mean, everywhere alike.
    assert start.after(dict.fromkeys("abc", (1.1 / 3 + 2 / 3, 100))).keep == start.keep == start.ceiling


def test_a_small_net_keeps_more() -> None:
    assert floor_of(1_500) == MOST
    assert floor_of(5_000) == 0.12
    assert floor_of(30_000) == 0.02
    assert floor_of(60_000) == LEAST
    assert floor_of(100_000) == LEAST
    shares = [Rate.first(count).keep for count in (9_000, 20_000, 30_000, 55_000, 1_000_000)]
    assert shares == sorted(shares, reverse=True)
