"""Sums in a ring: exact, whatever masks they wear, and nothing a peer sends is taken for something else."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker import aggregate, mask
from broker.aggregate import dump_state, load_state, next_model
from models import ringcode, sparse
from models.delta import Layout, Vector
from models.errors import PeerError
from models.ringcode import Ring
from models.spec import parse_task

TASK = """
name = "t"
kind = "regression"
net = "mlp"
[window]
length = 1
[[signal]]
name = "a"
[target]
name = "y"
[round]
codec = "ring"
"""


def ring(count: int = 500, sent: int = 300, gateways: int = 5, levels: int = 7, samples: int = 0) -> Ring:
    places = np.sort(np.random.default_rng(1).choice(count, sent, replace=False))
    return Ring(levels, gateways, count, ringcode.step_for(0.01, levels), samples, 9, places)


def vectors(many: int, count: int = 500, spread: float = 0.01) -> list[Vector]:
    return [np.random.default_rng(i).normal(0, spread, count).astype(np.float32) for i in range(many)]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 400), gateways=st.integers(1, 60), levels=st.integers(1, 15), seed=st.integers(0, 99),
    spread=st.floats(1e-6, 1e3),
)  # fmt: skip
def test_masked_sums_are_the_sums(count: int, gateways: int, levels: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    shared = ring(count, int(rng.integers(1, count + 1)), gateways, levels)
    coded = [ringcode.encode(v, shared, 1) for v in vectors(gateways, count, spread)]
    numbers = [ringcode.unpack(one.data, shared) for one in coded]
    assert all(one.max() <= levels for one in numbers)
    # Masks that cancel: what the aggregator of a secure sum would see.
    masks = rng.integers(0, 2**shared.bits, (gateways, shared.size), dtype=np.uint32)
    masks[-1] = -masks[:-1].sum(0, dtype=np.uint32)
    seen = [(one + mask) & np.uint32(2**shared.bits - 1) for one, mask in zip(numbers, masks, strict=True)]
    total = np.stack(seen).sum(0, dtype=np.uint32)
    plain = np.sum(numbers, axis=0, dtype=np.uint32)
    assert np.array_equal(total & np.uint32(2**shared.bits - 1), plain)
    values, _ = ringcode.decode(total, shared, gateways)
    said = np.sum([one.decoded[shared.places] for one in coded], axis=0)
    assert np.allclose(values, said, rtol=1e-3, atol=1e-4 * shared.step * gateways)


def test_the_ring_is_the_smallest_that_holds_the_sum() -> None:
    for gateways, levels in ((1, 1), (3, 7), (5, 3), (10, 7), (100, 15)):
        bits = ringcode.bits_for(gateways, levels)
        assert 2 ** (bits - 1) <= gateways * levels < 2**bits


@pytest.mark.parametrize(("levels", "lost"), [(1, 0.363), (2, 0.190), (3, 0.119), (7, 0.0374), (15, 0.0115)])
def test_so_many_levels_lose_what_max_says(levels: int, lost: float) -> None:
    """Max 1960, table II: mean square error of a uniform quantizer, of a normal distribution."""
    shared = ring(64_000, 64_000, levels=levels)
    vector = vectors(1, 64_000)[0]
    error = vector - ringcode.encode(vector, shared, 1).decoded
    assert (error**2).sum() / (vector**2).sum() == pytest.approx(lost, rel=0.03)


def test_by_hand() -> None:
    """The docstring's formats: one block, seed 1, whose signs are the first 64 bits of SHAKE-256."""
    shared = Ring(3, 2, 4, 1.0, 0, 1, np.array([1, 2]))
    mask_ = sparse.encode(np.array([0, 1, 1, 0], np.int16))
    assert shared.data == bytes.fromhex("5452010302000000040000000000803f0000000001000000") + mask_
    assert shared.bits == 3
    vector = np.array([9, 8, -4, 9], np.float32)
    signs = np.unpackbits(np.frombuffer(hashlib.shake_256(b"\1\0\0\0").digest(8), np.uint8)).astype(int) * 2 - 1
    # Walsh and Hadamard of (8 s0, -4 s1, 0, …): 1/8 of their sum and difference, in turns.
    turned = [(8 * signs[0] + (-4 if j % 2 == 0 else 4) * signs[1]) / 8 for j in range(64)]
    numbers = [int(np.clip(np.rint(t + 1.5), 0, 3)) for t in turned]
    larger = 2 * np.log2(np.sqrt((64 + 16) / 2) / (1 / 0.9957))
    told = round(larger) + 12
    numbers += [told // 8 + (i < told % 8) for i in range(8)]
    bits = "".join(f"{n:03b}" for n in numbers)
    payload = int(bits, 2).to_bytes(27, "big")
    expected = b"TU\x01\x03" + hashlib.sha256(shared.data).digest()[:8] + payload
    assert ringcode.encode(vector, shared, 1).data == expected


def test_what_is_not_sent_waits_and_nothing_is_lost() -> None:
    shared, residual, sent = ring(), np.zeros(500, np.float32), np.zeros(500)
    for vector in vectors(20):
        encoded = ringcode.encode(vector + residual, shared, 1)
        residual = vector + residual - encoded.decoded
        sent += encoded.decoded
    assert np.allclose(sent + residual, np.sum(vectors(20), axis=0), atol=1e-5)
    left = np.ones(500, np.bool_)
    left[shared.places] = False
    assert not sent[left].any()


def test_a_gateway_counts_by_its_samples() -> None:
    shared = ring(samples=100)
    vector = vectors(1)[0]
    for samples in (50, 100, 200):
        numbers = ringcode.unpack(ringcode.encode(vector, shared, samples).data, shared)
        values, larger = ringcode.decode(numbers, shared, 1)
        part = values / shared.weight(samples)
        assert np.corrcoef(part, vector[shared.places])[0, 1] > 0.9
        assert larger == pytest.approx(np.log2(samples / 100), abs=0.3)


def test_a_ring_of_a_peer_cut_or_flipped() -> None:
    data = ring().data
    assert Ring.from_bytes(data, 500).data == data
    for end in range(len(data)):
        with pytest.raises(PeerError):
            Ring.from_bytes(data[:end], 500)
    with pytest.raises(PeerError):
        Ring.from_bytes(data + b"\0", 500)
    with pytest.raises(PeerError, match="the layout has"):
        Ring.from_bytes(data, 501)
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            other = Ring.from_bytes(bytes(bad), 500)
        except PeerError:
            continue
        # Another ring, then, and a whole one: what is made for it is not taken for ours.
        assert 1 <= other.places.size <= 500
        assert np.isfinite(ringcode.encode(vectors(1)[0], other, 3).decoded).all()
        with pytest.raises(PeerError):
            ringcode.unpack(ringcode.encode(vectors(1)[0], other, 3).data, ring())


@pytest.mark.parametrize(
    "bad",
    [
        {"levels": 0}, {"levels": 16}, {"gateways": 0}, {"gateways": 10_001}, {"step": 0.0}, {"step": float("nan")},
        {"step": float("inf")}, {"step": -1.0}, {"step": 1e38}, {"places": np.zeros(0, np.int64)},
    ],
)  # fmt: skip
def test_rings_that_are_none(bad: dict[str, float]) -> None:
    with pytest.raises(PeerError, match="ring"):
        Ring.from_bytes(replace(ring(), **bad).data, 500)  # type: ignore[arg-type]


def test_an_update_cut_grown_or_flipped() -> None:
    shared = ring(gateways=4, levels=7)
    data = ringcode.encode(vectors(1)[0], shared, 1).data
    for end in range(len(data)):
        with pytest.raises(PeerError, match="codec"):
            ringcode.unpack(data[:end], shared)
    with pytest.raises(PeerError, match="codec"):
        ringcode.unpack(data + b"\0", shared)
    for bit in range(8 * ringcode.HEADER_UPDATE.size):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError, match="codec"):
            ringcode.unpack(bytes(bad), shared)


def test_senders_refuse_what_is_not_a_number() -> None:
    for bad in (np.nan, np.inf):
        vector = vectors(1)[0]
        vector[499] = bad
        with pytest.raises(ValueError, match="NaN"):
            ringcode.encode(vector, ring(), 1)
    with pytest.raises(ValueError, match="shape"):
        ringcode.encode(vectors(1)[0][:-1], ring(), 1)
    assert np.isfinite(ringcode.encode(np.zeros(500, np.float32), ring(), 1).decoded).all()


LAYOUT = Layout(("a.weight", "a.bias", "head.weight"), ((40, 16), (40,), (3, 40)))


def test_the_aggregator_sends_on_what_the_sums_say() -> None:
    """Two rows change, at every gateway alike: they are what is sent, all else takes its turn, and the mean arrives."""
    task = parse_task(TASK, "t")
    change = np.zeros((40, 16), np.float32)
    change[[3, 17]] = np.random.default_rng(0).normal(0, 0.02, (2, 16))
    moved = np.concatenate([change.ravel(), np.zeros(160, np.float32)])
    base, state, residuals = np.zeros(800, np.float32), b"", np.zeros((4, 800), np.float32)
    ages = []
    for _ in range(40):
        shared = mask.ring_for(task, LAYOUT, load_state(state))
        assert shared.data == mask.ring_for(task, LAYOUT, load_state(state)).data
        payloads = []
        for i in range(4):
            encoded = ringcode.encode(moved + residuals[i], shared, 100)
            residuals[i] += moved - encoded.decoded
            payloads.append((encoded.data, 100, 0))
        every = np.ones(800, np.bool_)
        state, base = next_model("fedavg", state, base, every, iter(payloads), momentum=0.7, ring=shared)
        assert len(payloads[0][0]) < 4 * 800 / 20
        ages.append(load_state(state)["ring_age"])
    assert ages[-1].max() < 40
    hot = np.flatnonzero(moved)
    assert ages[-1][hot].mean() < 2 < ages[-1].mean()
    assert np.allclose(base[hot], 40 * moved[hot], atol=0.1)
    assert np.abs(base + residuals.mean(0) - 40 * moved).max() < 1e-4
    assert load_state(state)["ring_known"].tolist()[1:] == [100, 4, 40]


def test_more_gateways_than_the_ring_has_room_for_make_more_sums() -> None:
    shared = ring(gateways=2)
    coded = [ringcode.encode(v, shared, 1) for v in vectors(7)]
    payloads = [(one.data, 1, 0) for one in coded]
    _, vector = next_model(
        "fedavg", b"", np.zeros(500, np.float32), np.ones(500, np.bool_), iter(payloads), momentum=0.0, ring=shared
    )
    assert np.allclose(vector, np.mean([one.decoded for one in coded], axis=0), atol=1e-5)


def test_personal_values_have_no_part_in_a_ring() -> None:
    task = parse_task(TASK.replace('net = "mlp"', 'net = "mlp"\npersonal = ["a"]'), "t")
    assert mask.ring_for(task, LAYOUT, {}).count == 120


def test_a_round_without_updates_changes_no_ring() -> None:
    with pytest.raises(ValueError, match="no update"):
        next_model("fedavg", b"", np.zeros(500, np.float32), np.ones(500, np.bool_), iter([]), momentum=0, ring=ring())
    assert aggregate.load_state(dump_state({})) == {}
