"""The byte format of a delta: exact where it says so, bounded where it does not, and never a crash."""

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from models import codec, sparse
from models.delta import Vector
from models.errors import PeerError

VECTOR = np.array([0, 1, -1, 0.5, -0.25, 3, -3, 0.125], np.float32)
# Bytes may differ between zstd versions; what they decode to may not.
VECTORS = {
    # By hand: 4 of 8 (0100), r 0 (0000), gaps 1 0 2 0 (01 1 001 1), signs + - + - (0101); of these 2 above 1 (010),
    # r 0 (0000), gaps 2 0 (001 1); none above 2 (00). The step is a hair below 2.
    0: (
        "5444010008000000f0ffff3f4066a80c",
        [0.0, 1.9999980926513672, -1.9999980926513672, 0.0, 0.0, 3.9999961853027344, -3.9999961853027344, 0.0],
    ),
    2: ("54440102080000000000404028b52ffd20021100000034", [0.0, 0.0, 0.0, 0.0, 0.0, 3.0, -3.0, 0.0]),
    4: (
        "5444010408000000b76ddb3e28b52ffd2004210000201e7f09",
        [0.0, 0.8571428656578064, -0.8571428656578064, 0.4285714328289032, -0.4285714328289032, 3.0, -3.0, 0.0],
    ),
    8: (
        "54440108080000000683c13c28b52ffd2008410000002ad615f57f8105",
        [
            0.0,
            0.9921259880065918,
            -0.9921259880065918,
            0.4960629940032959,
            -0.25984251499176025,
            3.0,
            -3.0,
            0.11811023950576782,
        ],
    ),
    32: (
        "54440120080000000000803f28b52ffd2020b50000800080800080404000003fbf3fbe40c03e0100081002",
        [0.0, 1.0, -1.0, 0.5, -0.25, 3.0, -3.0, 0.125],
    ),
}
# A frame of 13 bytes whose header declares 2^40 bytes.
TERABYTE = bytes.fromhex("28b52ffd e0 0000000000010000".replace(" ", ""))

# A step below float32's normal numbers is coarse by itself, so such values only have to be finite (last test).
values = st.floats(-1e6, 1e6, width=32).map(lambda v: v if abs(v) > 1e-30 else 0.0)
vectors = hnp.arrays(np.float32, st.integers(1, 300), elements=values)


def frame(bits: int, count: int, step: float, body: bytes) -> bytes:
    return codec.HEADER.pack(codec.MAGIC, codec.VERSION, bits, count, step) + body


def decode_or_none(data: bytes, count: int) -> Vector | None:
    """None for what is refused; anything but a PeerError fails the test."""
    try:
        return codec.decode(data, count)
    except PeerError:
        return None


@pytest.mark.parametrize("bits", codec.BITS)
@given(vector=vectors)
@settings(max_examples=60, deadline=None)
def test_receivers_decode_what_the_sender_says(bits: int, vector: Vector) -> None:
    encoded = codec.encode(vector, bits)
    decoded = codec.decode(encoded.data, vector.size)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, encoded.decoded)
    if bits == 32:
        assert np.array_equal(decoded, vector)
    elif bits in (4, 8):
        step = codec.HEADER.unpack_from(encoded.data)[4]
        assert np.abs(decoded - vector).max() <= step * 0.501 + 1e-6 * np.abs(vector).max()


@pytest.mark.parametrize("bits", list(VECTORS))
def test_vectors(bits: int) -> None:
    data, values = VECTORS[bits]
    assert codec.decode(bytes.fromhex(data), len(values)).tolist() == values
    encoded = codec.encode(VECTOR, bits, 0.5 if bits == codec.SPARSE else 1.0)
    assert encoded.decoded.tolist() == values
    if bits == codec.SPARSE:  # no zstd in it: the bytes are promised too
        assert encoded.data.hex() == data


@pytest.mark.parametrize("bits", codec.BITS)
def test_truncated_at_every_byte(bits: int) -> None:
    data = codec.encode(np.random.default_rng(1).normal(size=200).astype(np.float32), bits).data
    for end in range(len(data)):
        with pytest.raises(PeerError, match="codec"):
            codec.decode(data[:end], 200)
    with pytest.raises(PeerError, match="codec"):
        codec.decode(data + b"\0", 200)


@pytest.mark.parametrize("keep", [0.05, 0.5])
def test_a_small_sparse_stream_cut_or_flipped_anywhere(keep: float) -> None:
    """Every cut is refused; every flipped bit is refused or gives finite values of the due shape, dense and sparse."""
    vector = np.random.default_rng(4).standard_t(3, 120).astype(np.float32)
    data = codec.encode(vector, codec.SPARSE, keep).data
    for end in range(len(data)):
        assert decode_or_none(data[:end], 120) is None
    for position in range(len(data) * 8):
        bad = bytearray(data)
        bad[position // 8] ^= 1 << position % 8
        try:
            found = codec.decode_sparse(bytes(bad), 120)
        except PeerError:
            continue
        assert isinstance(found, codec.Sparse)
        assert found.size == 120
        assert np.isfinite(found.values).all()
        assert (np.diff(found.places) > 0).all()
        assert found.places.size == 0 or (found.places[0] >= 0 and found.places[-1] < 120)
        assert np.array_equal(found.dense(), codec.decode(bytes(bad), 120))


@pytest.mark.parametrize("bits", codec.BITS)
def test_flipped_bits_are_refused_or_give_finite_values(bits: int) -> None:
    data = codec.encode(np.random.default_rng(2).normal(size=60).astype(np.float32), bits).data
    for position in range(len(data) * 8):
        bad = bytearray(data)
        bad[position // 8] ^= 1 << position % 8
        vector = decode_or_none(bytes(bad), 60)
        assert vector is None or (vector.shape == (60,) and np.isfinite(vector).all())


@settings(max_examples=300)
@given(st.binary(max_size=100), st.integers(1, 100))
def test_any_bytes(data: bytes, count: int) -> None:
    for body in (
        data,
        frame(0, count, 1.0, data),
        frame(8, count, 1.0, data),
        frame(8, count, 1.0, b"\x28\xb5\x2f\xfd" + data),
    ):
        vector = decode_or_none(body, count)
        assert vector is None or vector.shape == (count,)


@pytest.mark.parametrize(
    "step",
    [0.0, -1.0, float("nan"), float("inf"), float(np.finfo(np.float32).max)],
    ids=["0", "-", "nan", "inf", "max"],
)
def test_steps_no_encoder_writes(step: float) -> None:
    with pytest.raises(PeerError, match="step"):
        codec.decode(frame(8, 4, step, codec.deflate(b"\1\2\3\4")), 4)


@pytest.mark.parametrize(
    ("bits", "count", "raw"),
    [
        (8, 2, b"\x80\0"),  # the most negative code
        (4, 2, b"\x08"),
        (2, 4, b"\x02"),
        (4, 1, b"\x10"),  # padding that is not zero
        (32, 1, struct.pack("<f", float("nan"))),
        (32, 1, struct.pack("<f", float("inf"))),
    ],
)
def test_codes_no_encoder_writes(bits: int, count: int, raw: bytes) -> None:
    with pytest.raises(PeerError, match="codec"):
        codec.decode(frame(bits, count, 1.0, codec.deflate(raw)), count)


@pytest.mark.parametrize("bits", [1, 3, 16, 64, 255])
def test_unknown_widths(bits: int) -> None:
    with pytest.raises(PeerError, match="coding"):
        codec.decode(frame(bits, 4, 1.0, b""), 4)


def decoded(data: bytes, count: int) -> NDArray[np.int16]:
    """The whole vector (count,) that a stream says."""
    places, values = sparse.decode(data, count)
    q = np.zeros(count, np.int16)
    q[places] = values
    return q


@given(
    q=hnp.arrays(np.int16, st.integers(1, 700), elements=st.integers(-3, 3) | st.integers(-255, 255) | st.just(0)),
    share=st.sampled_from([0.01, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_the_sparse_stream_is_exact(q: NDArray[np.int16], share: float, seed: int) -> None:
    q[np.random.default_rng(seed).random(q.size) > share] = 0
    data = sparse.encode(q)
    assert np.array_equal(decoded(data, q.size), q)
    for bad in (data[:-1], data + b"\0"):
        with pytest.raises(PeerError, match="codec"):
            decoded(bad, q.size)


# The docstring of models/sparse.py, by hand: 2 members of 8 (0010), r 0 (0000), gaps 1 and 2 (01 001), signs (0 1);
# one of them above 1 (01), r 0 (0000), gap 1 (01); none of that above 2 (0).
def test_the_sparse_stream_bit_by_bit() -> None:
    bits = "0010" + "0000" + "01" + "001" + "01" + "01" + "0000" + "01" + "0"
    data = int(bits.ljust(24, "0"), 2).to_bytes(3, "big")
    q = np.array([0, 1, 0, 0, -2, 0, 0, 0], np.int16)
    assert sparse.encode(q) == data
    assert decoded(data, 8).tolist() == q.tolist()


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ("1111", "15 members of 8"),
        ("0001" + "0000" + "000000001", "a place beyond the 8"),
        ("0001" + "1111" + "111111111111111" + "1", "a place beyond the 8"),
        ("0001" + "0000", "the bits end early"),
        ("0001" + "0000" + "00000000", "the bits end early"),
        ("0001" + "0000" + "1" + "0" + ("1" + "0000" + "1") * 255, "a magnitude above 255"),
        ("0000" + "0001", "something follows the last plane"),
    ],
)
def test_streams_no_encoder_writes(bits: str, says: str) -> None:
    size = -(-len(bits) // 8)
    with pytest.raises(PeerError, match=says):
        decoded(int(bits.ljust(8 * size, "0"), 2).to_bytes(size, "big"), 8)


def test_where_all_are_to_be_kept_the_largest_sets_the_step() -> None:
    vector = np.random.default_rng(6).normal(size=400).astype(np.float32)
    encoded = codec.encode(vector, codec.SPARSE, 1.0)
    assert np.abs(vector - encoded.decoded).max() <= 0.501 * np.abs(vector).max() / sparse.MOST


@pytest.mark.parametrize("keep", [0.001, 0.02, 0.5])
def test_a_sparse_update_keeps_the_largest_values(keep: float) -> None:
    vector = np.random.default_rng(5).normal(size=40_000).astype(np.float32)
    encoded = codec.encode(vector, codec.SPARSE, keep)
    kept = encoded.decoded != 0
    assert abs(int(kept.sum()) - round(keep * vector.size)) <= 1
    assert np.abs(vector[kept]).min() >= np.abs(vector[~kept]).max(initial=0)
    step = codec.HEADER.unpack_from(encoded.data)[4]
    assert np.abs(vector - encoded.decoded)[kept].max() <= 0.501 * step
    # Within a tenth of the entropy of places, signs and magnitudes that are drawn independently.
    counts = np.unique(np.rint(encoded.decoded / step), return_counts=True)[1] / vector.size
    entropy = -float((counts * np.log2(counts)).sum()) * vector.size / 8
    assert len(encoded.data) < 1.1 * entropy + 32


def test_fields_at_every_bit_of_a_byte() -> None:
    """Gaps that fill a Rice code of 15 bits, behind 0 to 7 bits of others."""
    count = 1_000_000
    for lead in range(8):
        q = np.zeros(count, np.int16)
        q[np.arange(lead)] = 1
        q[np.arange(1, 31) * 32_767 + lead] = -1
        assert np.array_equal(decoded(sparse.encode(q), count), q)


def test_a_stream_of_many_planes_with_a_long_tail_is_refused() -> None:
    """255 planes of one member each, and two million ones behind them: what is there is looked through once."""
    width = (50_000).bit_length()
    head = np.concatenate([_bits(1, width), _bits(0, 4), [1], [0], *[[1, 0, 0, 0, 0, 1]] * 254])
    data = np.packbits(np.concatenate([head, np.ones(2_000_000, np.uint8)]).astype(np.uint8)).tobytes()
    with pytest.raises(PeerError, match="codec"):
        decoded(data, 50_000)


def _bits(value: int, width: int) -> list[int]:
    return [value >> place & 1 for place in range(width - 1, -1, -1)]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be"):
        codec.encode(VECTOR, codec.SPARSE, keep)


def test_the_layout_decides_the_count() -> None:
    data = codec.encode(VECTOR, 8).data
    for count in (7, 9, 0):
        with pytest.raises(PeerError, match="values, the layout has"):
            codec.decode(data, count)


def bombs() -> list[bytes]:
    plain = zstandard.ZstdCompressor(level=19).compress(bytes(200_000_000))
    stream = zstandard.ZstdCompressor(level=19, write_content_size=False).compressobj()
    silent = stream.compress(bytes(200_000_000)) + stream.flush()
    return [TERABYTE, TERABYTE + bytes(50), plain, silent, codec.deflate(b"\1\2\3\4") * 2]


def test_bombs_cost_no_memory() -> None:
    assert len(TERABYTE) == 13
    assert zstandard.get_frame_parameters(TERABYTE).content_size == 2**40
    made = bombs()
    for bomb in made:
        tracemalloc.start()
        with pytest.raises(PeerError, match="codec"):
            codec.inflate(bomb, 4)
        with pytest.raises(PeerError, match="codec"):
            codec.decode(frame(8, 4, 1.0, bomb), 4)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("bits", [codec.SPARSE, 2, 4, 8])
def test_error_feedback_loses_nothing(bits: int) -> None:
    """What was decoded in all plus what is still held back is what was meant, and the rest stays bounded."""
    random = np.random.default_rng(3)
    mean = random.normal(size=400).astype(np.float32)
    meant, sent, residual = np.zeros(400), np.zeros(400), np.zeros(400, np.float32)
    held = []
    for _ in range(200):
        delta = mean + random.normal(scale=0.1, size=400).astype(np.float32)
        encoded = codec.encode(delta + residual, bits, keep=0.1)
        residual = delta + residual - encoded.decoded
        meant += delta
        sent += encoded.decoded
        held.append(float(np.abs(residual).max()))
    assert np.allclose(meant, sent + residual, atol=1e-2)
    assert max(held[100:]) < 2 * max(held[:100])


@given(vector=hnp.arrays(np.float32, 40, elements=st.floats(-1, 1, width=32)), where=st.integers(0, 39))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_senders_refuse_what_is_not_a_number(bad: float, vector: Vector, where: int) -> None:
    vector[where] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        codec.encode(vector, 8)


def test_zero_and_tiny_vectors() -> None:
    for bits in codec.BITS:
        assert not codec.encode(np.zeros(5, np.float32), bits).decoded.any()
        tiny = np.full(3, np.finfo(np.float32).smallest_subnormal, np.float32)
        assert np.isfinite(codec.decode(codec.encode(tiny, bits).data, 3)).all()


def test_machine_code_decodes_what_numpy_does_and_refuses_what_it_refuses() -> None:
    from models import sparse_jit  # noqa: PLC0415 - compiles for some seconds

    random = np.random.default_rng(0)

    def both(data: bytes, count: int) -> None:
        fine, places, values = sparse_jit._decode(np.frombuffer(data + bytes(4), np.uint8), 8 * len(data), count)
        try:
            expected = sparse.decode(data, count)
        except PeerError:
            assert not fine
            with pytest.raises(PeerError):
                sparse_jit.decode(data, count)
        else:
            assert fine
            np.testing.assert_array_equal(places, expected[0])
            np.testing.assert_array_equal(values, expected[1])

    for _ in range(200):
        count = int(random.integers(1, 3000))
        large = np.clip(np.rint(random.standard_cauchy(count) * 2), -sparse.MOST, sparse.MOST)
        data = sparse.encode(np.where(random.random(count) < random.random() / 2, large, 0).astype(np.int16))
        both(data, count)
        for _ in range(8):
            flipped = bytearray(data)
            flipped[random.integers(len(data))] ^= 1 << random.integers(8)
            both(bytes(flipped), count)
        both(data[: random.integers(len(data))], count)
        both(data + b"\0", count)
        both(random.bytes(int(random.integers(1, 60))), count)
    total, same = np.zeros(count), np.zeros(count)
    places, values = sparse.decode(data, count)
    for coder, into in ((sparse.NUMPY, total), (sparse_jit.MACHINE, same)):
        coder.add(into, places, (values * np.float32(0.3)), 7.0)
    np.testing.assert_array_equal(total, same)
