"""From version to version: both sides make the same sums, and what waits is never lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import CHUNK_BYTES
from broker.steps import apply, step_towards
from models.delta import Vector
from models.errors import PeerError

SIZE = 500
SHARED = np.arange(SIZE) % 5 > 0


def random(seed: int) -> Vector:
    return np.random.default_rng(seed).normal(size=SIZE).astype(np.float32)


@given(st.lists(st.sampled_from([0.01, 0.1, 0.5, None]), min_size=1, max_size=12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_gateways_have_the_same_weights_and_all_arrives_in_the_end(keeps: list[float | None], seed: int) -> None:
    first = published = there = random(seed)
    meant, residual = np.zeros(SIZE), None
    for number, keep in enumerate(keeps):
        learnt = random(1000 * seed + number) * SHARED
        meant += learnt
        step = step_towards(published + learnt, published, residual, SHARED, keep)
        assert (step.payload is None) == (keep is None)
        there = step.vector if step.payload is None else apply(step.payload, there, SHARED)
        assert there.tobytes() == step.vector.tobytes()
        published, residual = step.vector, step.residual
        assert np.array_equal(published[~SHARED], first[~SHARED])
        waiting = np.zeros(SIZE)
        waiting[SHARED] = residual
        assert np.allclose(published + waiting, first + meant, atol=1e-4)
        if keep is None:
            assert not waiting.any()


def test_a_payload_of_other_positions_is_refused() -> None:
    step = step_towards(random(1) * SHARED, np.zeros(SIZE, np.float32), None, SHARED, 0.1)
    assert step.payload
    before = random(2)
    for bad in (b"", step.payload[:-1], step.payload + b"\0"):
        with pytest.raises(PeerError, match="codec"):
            apply(bad, before, SHARED)
    with pytest.raises(PeerError, match="values, the layout has"):
        apply(step.payload, before, np.ones(SIZE, np.bool_))


def test_weights_that_are_no_numbers_are_not_published() -> None:
    huge = np.full(SIZE, 3e38, np.float32)
    for residual, goal in ((None, np.full(SIZE, np.inf, np.float32)), (huge[SHARED], huge)):
        with pytest.raises(ValueError, match="NaN or an infinity"), np.errstate(over="ignore", invalid="ignore"):
            step_towards(goal, np.zeros(SIZE, np.float32), residual, SHARED, 0.1)


def test_a_step_that_no_message_holds_goes_down_whole() -> None:
    goal = np.random.default_rng(4).normal(size=900_000).astype(np.float32)
    before, shared = np.zeros_like(goal), np.ones(goal.size, np.bool_)
    step = step_towards(goal, before, None, shared, 0.5)
    assert step.payload is None
    assert np.array_equal(step.vector, goal)
    small = step_towards(goal, before, None, shared, 0.05)
    assert small.payload
    assert len(small.payload) < CHUNK_BYTES
