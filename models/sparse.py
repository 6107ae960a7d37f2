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

import numpy as np
from numpy.typing import NDArray

from models.errors import PeerError

Integers = NDArray[np.int16]
Bits = NDArray[np.uint8]

MOST = 255
_CHUNK = 64
_R_BITS = 4
_R_MOST = 2**_R_BITS - 1


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


def decode(data: bytes, count: int) -> Integers:
    """Inverse of `encode`: (count,); PeerError("codec") unless the bytes are exactly such a stream."""
    stream = _Stream(np.unpackbits(np.frombuffer(data, np.uint8)))
    q = np.zeros(count, np.int16)
    places = stream.plane(count)
    negative = stream.take(places.size).astype(np.bool_)
    q[places] = 1
    inner = places
    for _ in range(1, MOST + 1):
        if not inner.size:
            break
        inner = inner[stream.plane(inner.size)]
        q[inner] += 1
    if inner.size:
        raise PeerError("codec", f"a magnitude above {MOST}")
    q[places[negative]] *= -1
    stream.end()
    return q


def _plane(places: NDArray[np.int64], parent: int) -> list[Bits]:
    """Write one plane as arrays of bits."""
    k = places.size
    parts = [_field(np.array([k]), parent.bit_length())]
    if not k:
        return parts
    gaps = np.diff(places, prepend=-1) - 1
    rs = np.arange(_R_MOST + 1)[:, None]
    # What each parameter would cost each chunk, in bits.
    cost = np.add.reduceat((gaps >> rs) + rs, np.arange(0, k, _CHUNK), axis=1)
    chosen = cost.argmin(0)
    r = np.repeat(chosen, _CHUNK)[:k]
    ends = np.cumsum((gaps >> r) + 1)
    high = np.zeros(int(ends[-1]), np.uint8)
    high[ends - 1] = 1
    return [*parts, _field(chosen, _R_BITS), _low_bits(gaps, r), high]


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

    def __init__(self, bits: Bits) -> None:
        self.bits, self.at = bits, 0
        self.ones = np.flatnonzero(bits)

    def take(self, count: int) -> Bits:
        if count > self.bits.size - self.at:
            raise PeerError("codec", "the bits end early")
        self.at += count
        return self.bits[self.at - count : self.at]

    def end(self) -> None:
        rest = self.bits[self.at :]
        if rest.size >= 8 or rest.any():  # noqa: PLR2004 - a byte
            raise PeerError("codec", "something follows the last plane")

    def plane(self, parent: int) -> NDArray[np.int64]:
        """Read one plane: the places of its members in its parent."""
        width = parent.bit_length()
        k = int(self.take(width) @ (1 << np.arange(width - 1, -1, -1)))
        if k > parent:
            raise PeerError("codec", f"{k} members of {parent}")
        if not k:
            return np.zeros(0, np.int64)
        chunks = -(-k // _CHUNK)
        parameters = self.take(chunks * _R_BITS).reshape(chunks, _R_BITS) @ (1 << np.arange(_R_BITS - 1, -1, -1))
        r = np.repeat(parameters, _CHUNK)[:k]
        low = self._low(r)
        first = int(np.searchsorted(self.ones, self.at))
        ones = self.ones[first : first + k] - self.at
        if ones.size < k:
            raise PeerError("codec", "the bits end early")
        self.at += int(ones[-1]) + 1
        gaps = ((np.diff(ones, prepend=-1) - 1) << r) + low
        places = np.cumsum(gaps + 1) - 1
        if places[-1] >= parent:
            raise PeerError("codec", f"a place beyond the {parent} that there are")
        return places

    def _low(self, r: NDArray[np.int64]) -> NDArray[np.int64]:
        bits = self.take(int(r.sum())).astype(np.int64)
        starts = np.cumsum(r) - r
        low = np.zeros(r.size, np.int64)
        for b in range(int(r.max())):
            some = r > b
            low[some] = low[some] << 1 | bits[starts[some] + b]
        return low
