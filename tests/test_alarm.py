"""Where an anomaly's alarm begins: as rare as asked for, on errors whose tail is known, and on runs of windows."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from edge.dataset import split
from edge.window import Win
from models.alarm import LEAST, events, threshold
from models.spec import parse_task

Errors = NDArray[np.float64]
TAILS: dict[str, Callable[[np.random.Generator, int], Errors]] = {
    "exponential": lambda random, n: random.exponential(size=n),
    "lognormal": lambda random, n: random.lognormal(sigma=0.5, size=n),
    "chi-square": lambda random, n: random.chisquare(8, n),
    "Pareto": lambda random, n: random.pareto(4, n),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize(("windows", "chance"), [(2000, 1e-2), (2000, 1e-4), (500, 1e-3)])
def test_what_is_asked_for_is_about_what_comes(name: str, windows: int, chance: float) -> None:
    random = np.random.default_rng(0)
    many = TAILS[name](random, 1_000_000)
    found = [float((many > threshold(TAILS[name](random, windows), chance)).mean()) for _ in range(40)]
    assert chance / 5 < float(np.median(found)) < chance * 4


def test_a_rarer_alarm_begins_higher_and_beyond_what_was_ever_seen() -> None:
    errors = np.random.default_rng(1).exponential(size=1000)
    found = [threshold(errors, chance) for chance in (0.5, 0.1, 1e-2, 1e-3, 1e-5, 1e-8)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(np.median(errors))
    assert found[-1] > errors.max()


def test_a_run_of_windows_that_share_rows_is_one_alarm() -> None:
    random = np.random.default_rng(2)

    def smooth(count: int) -> Errors:
        return np.convolve(random.exponential(size=count + 19), np.full(20, 1 / 20), "valid")

    many = smooth(1_000_000)
    found = [events(many > threshold(smooth(2000), 1e-3)) / len(many) for _ in range(20)]
    assert 2e-4 < float(np.median(found)) < 4e-3
    assert events(np.array([True, True, False, True])) == 2
    assert events(np.zeros(3, np.bool_)) == 0


@pytest.mark.parametrize("errors", [np.zeros(50), np.full(50, 0.3), np.array([0.1]), np.linspace(0, 1, 12)])
def test_few_errors_or_all_the_same_give_a_threshold_that_they_do_not_pass(errors: Errors) -> None:
    found = threshold(errors, 1e-6)
    assert found >= max(float(errors.max()), LEAST)


def test_a_dataset_says_how_many_windows_a_week_has() -> None:
    task = parse_task(
        'name = "a"\nkind = "anomaly"\nnet = "autoencoder"\n[window]\nlength = 2\n[[signal]]\nname = "s"\n'
    )
    x = np.zeros((1, 2), np.float32)
    # Every ten seconds, with a pause of a day between.
    ends = [*range(0, 400, 10), *range(86_400, 86_800, 10)]
    train, holdout = split(task, [Win(end * 10**9, x, 1.0, active=True, segment=np.nan, label=np.nan) for end in ends])
    assert len(train)
    assert train.per_week == holdout.per_week == pytest.approx(60_480)
    assert split(task, [])[0].per_week > 0
