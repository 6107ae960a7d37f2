"""One suite over every strategy there is: what a mean must be, whatever else a rule does."""

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.aggregate import dump_state, load_state, next_model, strategy, strategy_names
from broker.strategies._mean import State
from models import codec
from models.delta import Vector

NAMES = strategy_names()
updates_strategy = st.lists(
    st.tuples(st.lists(st.floats(-10, 10, width=32), min_size=3, max_size=3), st.integers(1, 10_000)),
    min_size=1,
    max_size=8,
)


def as_updates(rows: list[tuple[list[float], int]]) -> list[tuple[Vector, int]]:
    return [(np.array(values, np.float32), samples) for values, samples in rows]


def test_there_is_one() -> None:
    assert "fedavg" in NAMES
    with pytest.raises(KeyError):
        strategy("../fedavg")


@pytest.mark.parametrize("name", NAMES)
@given(rows=updates_strategy, data=st.data())
def test_order_does_not_matter(name: str, rows: list[tuple[list[float], int]], data: st.DataObject) -> None:
    updates = as_updates(rows)
    mixed = data.draw(st.permutations(updates))
    _, one = strategy(name)({}, iter(updates), momentum=0.0)
    _, other = strategy(name)({}, iter(mixed), momentum=0.0)
    assert np.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(row=updates_strategy.map(lambda rows: rows[:1]))
def test_one_gateway_gives_the_direction(name: str, row: list[tuple[list[float], int]]) -> None:
    ((delta, samples),) = as_updates(row)
    state, out = strategy(name)({}, iter([(delta, samples)]), momentum=0.0)
    assert out.dtype == np.float32
    assert out.shape == delta.shape
    large = np.abs(delta) > 1e-6
    assert np.array_equal(np.sign(out[large]), np.sign(delta[large]))
    kept = load_state(dump_state(state))
    assert kept.keys() == state.keys()
    assert all(np.array_equal(kept[key], state[key]) for key in kept)


@given(row=updates_strategy.map(lambda rows: rows[:1]))
def test_fedavg_of_one_gateway_is_its_delta(row: list[tuple[list[float], int]]) -> None:
    ((delta, samples),) = as_updates(row)
    state, out = strategy("fedavg")({}, iter([(delta, samples)]), momentum=0.0)
    assert np.array_equal(out, delta)
    assert dict(state) == {}


def test_fedadam_is_adam_on_the_means() -> None:
    """By hand, beta 1 of 0.9 and beta 2 of 0.99: a steady delta moves by the rate, whatever its size."""
    state: State = {}
    for _ in range(5):
        state, out = strategy("fedadam")(state, iter(as_updates([([4, -0.5, 0], 7)])), momentum=0.9)
        assert np.allclose(out, [0.01 * 4 / 4.001, -0.01 * 0.5 / 0.501, 0])
    state, out = strategy("fedadam")(state, iter(as_updates([([-4, -0.5, 0], 7)])), momentum=0.9)
    first = (0.9 * 4 * (1 - 0.9**5) - 0.1 * 4) / (1 - 0.9**6)
    assert out[0] == pytest.approx(0.01 * first / 4.001)


def test_fedavg_weights_by_samples() -> None:
    updates = as_updates([([0, 0, 1], 100), ([4, 0, 1], 300)])
    _, out = strategy("fedavg")({}, iter(updates), momentum=0.0)
    assert out.tolist() == [3.0, 0.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_a_sparse_delta_counts_as_the_vector_that_it_is(name: str) -> None:
    rows = [np.where(np.arange(400) % 7 == i, 0.5 - i, 0).astype(np.float32) for i in range(3)]
    payloads = [codec.encode(row, codec.SPARSE, 0.2).data for row in rows]
    sparse = [(codec.decode_sparse(data, 400), i + 1) for i, data in enumerate(payloads)]
    dense = [(codec.decode(data, 400), i + 1) for i, data in enumerate(payloads)]
    assert all(isinstance(delta, codec.Sparse) for delta, _ in sparse)
    _, out = strategy(name)({}, iter(sparse), momentum=0.0)
    assert np.array_equal(out, strategy(name)({}, iter(dense), momentum=0.0)[1])
    assert out.any()


def test_fedavg_momentum_is_kept_in_the_state() -> None:
    state: State = {}
    velocity = np.zeros(3)
    for i in range(4):
        delta = np.array([1, i, -i], np.float32)
        velocity = 0.5 * velocity + delta
        state, out = strategy("fedavg")(state, iter([(delta, 7)]), momentum=0.5)
        state = load_state(dump_state(state))
        assert np.allclose(out, velocity)


@pytest.mark.parametrize("name", NAMES)
def test_no_update_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no update"):
        strategy(name)({}, iter([]), momentum=0.0)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_gateways(name: str) -> None:
    size = 50_000

    def many(count: int) -> Iterator[tuple[Vector, int]]:
        for i in range(count):
            yield np.full(size, i, np.float32), 1

    peaks = []
    for count in (3, 200):
        tracemalloc.start()
        strategy(name)({}, many(count), momentum=0.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + size * 4


@settings(max_examples=20)
@given(st.lists(st.booleans(), min_size=4, max_size=20).filter(any))
def test_next_model_leaves_personal_values_alone(shared: list[bool]) -> None:
    mask = np.array(shared)
    base = np.arange(mask.size, dtype=np.float32)
    payload = codec.encode(np.full(mask.sum(), 2, np.float32), 32).data
    state, vector = next_model("fedavg", b"", base, mask, iter([(payload, 5, 0), (payload, 1, 0)]), momentum=0.0)
    assert state == b""
    assert np.array_equal(vector, base + np.where(mask, 2, 0))


def test_what_is_late_counts_less_and_so_does_momentum() -> None:
    base, mask = np.zeros(2, np.float32), np.ones(2, np.bool_)
    sparse = codec.encode(np.array([0, 2], np.float32), codec.SPARSE, 0.5)
    exact = codec.encode(np.array([4, 0], np.float32), codec.EXACT)
    updates = [(exact.data, 1, 3), (sparse.data, 1, 8)]
    state, vector = next_model("fedavg", b"", base, mask, iter(updates), momentum=0.8)
    assert np.allclose(vector, [4 / 2 / 2, sparse.decoded[1] / 3 / 2])
    none = codec.encode(np.zeros(2, np.float32), codec.EXACT).data
    _, on = next_model("fedavg", state, base, mask, iter([(none, 1, 3)]), momentum=0.8, age=3.0)
    assert np.allclose(on, 0.8 / 4 * vector)


def test_next_model_refuses_an_overflow() -> None:
    base = np.full(2, 3e38, np.float32)
    payload = codec.encode(base, 32).data
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="infinity"):
        next_model("fedavg", b"", base, np.ones(2, np.bool_), iter([(payload, 1, 0)]), momentum=0.0)
