"""Entropy coder for vectors of small integers, nearly all zero: bits and numpy, nothing else.

One bit stream, most significant bit first, padded with zero bits to a byte. It holds planes: plane 0 says which of the
`count` values are not zero, plane m (1, 2, …) which of those in plane m-1 have a magnitude above m. A plane of a parent
with n members is

    k       bit_length(n) bits: how many of them it holds; 0 ends the stream
    r       4 bits for each 64 members: the Rice parameter of these
    low     r bits for each member: the low bits of the gap to the member before
    high    for each member, the rest of the gap in unary: that many zeros, then a one
    sign    plane 0 alone: a bit for each member, 1 for negative

A gap counts the parent's members skipped. A plane with as many members as its parent is still written out. There are
at most 255 planes: larger magnitudes are the caller's to cut.

Rice and Plaunt 1971, "Adaptive variable-length coding for efficient compression of spacecraft television data"; planes
of magnitudes as in JPEG 2000's bit-plane coding (ISO/IEC 15444-1, annex D). A gap code is within a few percent of the
entropy of independent places, and a parameter for each 64 members follows a density that changes along the vector.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.errors import PeerError

Integers = NDArray[np.int16]
Places = NDArray[np.int64]
Bits = NDArray[np.uint8]

Sums = NDArray[np.float64]

MOST = 255
CHUNK = 64
R_BITS = 4
_R_MOST = 2**R_BITS - 1
_FEW = 32


class Coder(NamedTuple):
    """How streams are decoded, and what they hold is added up: here, or by machine code (`models.sparse_jit`)."""

    decode: Callable[[bytes, int], tuple[Places, Integers]]
    add: Callable[[Sums, Places, NDArray[np.float32], float], None]


def encode(q: Integers) -> bytes:
    """Code a vector (n,) of integers within ±MOST."""
    magnitude = np.abs(q)
    places = np.flatnonzero(magnitude)
    parts = _plane(places, q.size)
    parts.append((q[places] < 0).astype(np.uint8))
    level = magnitude[places]
    for m in range(1, MOST + 1):
        if not level.size:
            break
        places = np.flatnonzero(level > m)
        parts += _plane(places, level.size)
        level = level[places]
    return np.packbits(np.concatenate(parts)).tobytes()


def decode(data: bytes, count: int) -> tuple[Places, Integers]:
    """Inverse of `encode`: where those of `count` values are that are not zero, rising, and what they are.

    PeerError("codec") unless the bytes are exactly such a stream.
    """
    stream = _Stream(data)
    places = stream.plane(count)
    negative = stream.take(places.size)
    values = np.ones(places.size, np.int16)
    inner = np.arange(places.size)
    for _ in range(1, MOST + 1):
        if not inner.size:
            break
        inner = inner[stream.plane(inner.size)]
        values[inner] += 1
    if inner.size:
        raise PeerError("codec", f"a magnitude above {MOST}")
    stream.end()
    values *= 1 - 2 * negative.view(np.int8)
    return places, values


def add(total: Sums, places: Places, values: NDArray[np.float32], weight: float) -> None:
    """Add values (k,) times a weight to a sum (n,), each at its place."""
    np.add.at(total, places, np.multiply(values, weight, dtype=np.float64))


NUMPY = Coder(decode, add)


def _plane(places: NDArray[np.int64], parent: int) -> list[Bits]:
    """Write one plane as arrays of bits."""
    k = places.size
    parts = [_field(np.array([k]), parent.bit_length())]
    if not k:
        return parts
    gaps = np.diff(places, prepend=-1) - 1
    rs = np.arange(_R_MOST + 1)[:, None]
    # What each parameter would cost each chunk, in bits.
    cost = np.add.reduceat((gaps >> rs) + rs, np.arange(0, k, CHUNK), axis=1)
    chosen = cost.argmin(0)
    r = np.repeat(chosen, CHUNK)[:k]
    ends = np.cumsum((gaps >> r) + 1)
    high = np.zeros(int(ends[-1]), np.uint8)
    high[ends - 1] = 1
    return [*parts, _field(chosen, R_BITS), _low_bits(gaps, r), high]


def _field(values: NDArray[np.int64], width: int) -> Bits:
    """Each value in `width` bits: (len(values) * width,)."""
    return ((values[:, None] >> np.arange(width - 1, -1, -1)) & 1).astype(np.uint8).ravel()


def _low_bits(gaps: NDArray[np.int64], r: NDArray[np.int64]) -> Bits:
    """The r low bits of each gap, one after the other."""
    out = np.zeros(int(r.sum()), np.uint8)
    starts = np.cumsum(r) - r
    for b in range(int(r.max(initial=0))):
        some = r > b
        out[starts[some] + b] = (gaps[some] >> (r[some] - 1 - b)) & 1
    return out


class _Stream:
    """A peer's bits, read from the front; every read is bounded by what is there."""

    def __init__(self, data: bytes) -> None:
        bits = np.unpackbits(np.frombuffer(data, np.uint8))
        self.bits = bits.view(np.bool_)
        self.at = 0
        self.ones = np.flatnonzero(self.bits)
        # For each byte, it and the three after it: a field of up to 15 bits lies in them wherever it begins.
        self.words = np.ndarray(len(data), ">u4", data + bytes(3), strides=(1,)).astype(np.uint32)
        # The same bits as digits: Python reads single fields faster from a string than numpy from an array.
        self.text = (bits + ord("0")).tobytes()

    def _skip(self, count: int) -> int:
        """Move on by `count` bits; return where they begin."""
        if count > self.bits.size - self.at:
            raise PeerError("codec", "the bits end early")
        self.at += count
        return self.at - count

    def take(self, count: int) -> NDArray[np.bool_]:
        start = self._skip(count)
        return self.bits[start : self.at]

    def end(self) -> None:
        rest = self.bits[self.at :]
        if rest.size >= 8 or rest.any():  # noqa: PLR2004 - a byte
            raise PeerError("codec", "something follows the last plane")

    def _field(self, width: int) -> int:
        start = self._skip(width)
        return int(self.text[start : self.at], 2)

    def plane(self, parent: int) -> Places:
        """Read one plane: the places of its members in its parent, rising."""
        k = self._field(parent.bit_length())
        if k > parent:
            raise PeerError("codec", f"{k} members of {parent}")
        start = self._skip(R_BITS * -(-k // CHUNK))
        parameters = [int(self.text[i : i + R_BITS], 2) for i in range(start, self.at, R_BITS)]
        places = self._few(k, parameters[0]) if 0 < k <= _FEW else self._many(k, parameters)
        if k and places[-1] >= parent:
            raise PeerError("codec", f"a place beyond the {parent} that there are")
        return places

    def _few(self, k: int, r: int) -> Places:
        """Read a plane's gaps one by one: for a handful, numpy's calls cost more than its loops save."""
        low, place, places = self._skip(k * r), -1, []
        for i in range(k):
            one = self.text.find(b"1", self.at)
            if one < 0:
                raise PeerError("codec", "the bits end early")
            rest = int(self.text[low + i * r : low + (i + 1) * r], 2) if r else 0
            place += 1 + ((one - self.at) << r | rest)
            places.append(place)
            self.at = one + 1
        return np.array(places, np.int64)

    def _many(self, k: int, parameters: list[int]) -> Places:
        if not k:
            return np.zeros(0, np.int64)
        r = np.array(parameters).repeat(CHUNK)[:k]
        ends = r.cumsum()
        starts = self._skip(int(ends[-1])) + ends - r
        # Where r is 0 nothing is read, even of a word behind the end.
        low = self.words.take(starts >> 3, mode="clip") >> (32 - r - (starts & 7)) & ((1 << r) - 1)
        first = int(self.ones.searchsorted(self.at))
        ones = self.ones[first : first + k]
        if ones.size < k:
            raise PeerError("codec", "the bits end early")
        gaps = np.empty(k, np.int64)
        gaps[0] = ones[0] - self.at
        np.subtract(ones[1:], ones[:-1] + 1, out=gaps[1:])
        self.at = int(ones[-1]) + 1
        gaps <<= r
        gaps += low
        gaps += 1
        places: Places = gaps.cumsum() - 1
        return places
