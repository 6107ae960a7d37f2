"""Decodes `models.sparse` as machine code, for an aggregator that adds up many updates; needs numba (`tundish[fast]`).

Importing it compiles for some seconds and takes about 100 MB, so gateways never do. Nothing is cached on disk: numba
would read it back with pickle.
"""

import numba
import numpy as np

from models import sparse
from models.sparse import Integers, Places

# A read of three bytes stays within them wherever it begins.
_PADDING = bytes(4)
_BYTE = 8
# How many ones a byte has, and where: from its most significant bit on, and then whatever fills the row.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_ONES = _BITS.sum(1, dtype=np.int64)
_WHERE = np.argsort(1 - _BITS.astype(np.int64), axis=1, kind="stable")
_CHUNK, _R_BITS, _MOST = sparse.CHUNK, sparse.R_BITS, sparse.MOST


def decode(data: bytes, count: int) -> tuple[Places, Integers]:
    """Decode as `models.sparse.decode` does; what is no such stream is left to that, which says why: PeerError."""
    padded = np.frombuffer(data + _PADDING, np.uint8)
    fine, places, values = _decode(padded, 8 * len(data), count)
    return (places, values) if fine else sparse.decode(data, count)


@numba.njit(inline="always")
def _field(data, at, width):  # type: ignore[no-untyped-def]
    """Give the number in `width` bits, 0 to 17, from bit `at` on."""
    # Unsigned, or each read would be looked at for a negative place.
    b = np.uint64(at) >> np.uint64(3)
    three = np.int64(data[b]) << 16 | np.int64(data[b + np.uint64(1)]) << 8 | np.int64(data[b + np.uint64(2)])
    return (three >> (24 - (at & 7) - width)) & ((1 << width) - 1)


@numba.njit
def _members(data, size, at, parent):  # type: ignore[no-untyped-def]
    """Read how many members a plane has: the bit behind that, and their number, -1 if there can't be so many."""
    width = 0
    while parent >> width:
        width += 1
    if at + width > size:
        return at, -1
    k = 0
    for i in range(width):
        k = 2 * k + _field(data, at + i, 1)
    at += width
    # A member takes a bit at least, so no more memory is taken than the stream has bits.
    return at, k if k <= parent and k <= size - at else -1


@numba.njit
def _plane(data, size, at, k, parent, out):  # type: ignore[no-untyped-def]
    """Read the places of k > 0 members into `out` (k + 8,); the bit behind them, -1 if the stream is no such one."""
    parameters = at
    at += _R_BITS * ((k + _CHUNK - 1) // _CHUNK)
    if at > size:
        return -1
    low = at
    for c in range(0, k, _CHUNK):
        at += _field(data, parameters + c // _CHUNK * _R_BITS, _R_BITS) * min(_CHUNK, k - c)
    if at > size:
        return -1
    # Byte by byte: all eight places are written, and as many are kept as it has ones, so that no branch is guessed.
    byte, first, i = np.int64(data[at >> 3]) & (0xFF >> (at & 7)), at & ~7, 0
    while True:
        for b in range(_BYTE):
            out[i + b] = first + _WHERE[byte, b]
        i += _ONES[byte]
        if i >= k:
            break
        first += _BYTE
        if first >= size:
            return -1
        byte = np.int64(data[first >> 3])
    last, at = at - 1, out[k - 1] + 1
    place = -1
    for c in range(0, k, _CHUNK):
        r = _field(data, parameters + c // _CHUNK * _R_BITS, _R_BITS)
        for i in range(c, min(c + _CHUNK, k)):
            one = out[i]
            place += 1 + ((one - last - 1) << r | _field(data, low, r))
            last = one
            low += r
            out[i] = place
    return at if place < parent else -1


@numba.njit
def _decode(data, size, count):  # type: ignore[no-untyped-def]
    at, k = _members(data, size, 0, count)
    # A plane is written by the byte, so beyond its last place.
    places, values = np.empty(max(k, 0) + _BYTE, np.int64), np.ones(max(k, 0), np.int16)
    if k > 0:
        at = _plane(data, size, at, k, count, places)
    if k < 0 or at < 0 or at + k > size:
        return False, places, values
    signs = at
    at += k
    # Which of the members have a magnitude above m, and their places among those above m - 1.
    above, found, n, m = np.arange(k), np.empty(k + _BYTE, np.int64), k, 1
    while n > 0 and m <= _MOST:
        parent = n
        at, n = _members(data, size, at, parent)
        if n > 0:
            at = _plane(data, size, at, n, parent, found)
        if n < 0 or at < 0:
            return False, places, values
        for i in range(n):
            above[i] = above[found[i]]
            values[above[i]] += 1
        m += 1
    if n > 0 or size - at >= _BYTE or _field(data, at, size - at):
        return False, places, values
    for i in range(k):
        values[i] *= 1 - 2 * _field(data, signs + i, 1)
    return True, places[:k], values


@numba.njit
def _add(total, places, values, weight):  # type: ignore[no-untyped-def]
    for i in range(len(places)):
        total[places[i]] += np.float64(values[i]) * weight


MACHINE = sparse.Coder(decode, _add)
# Compiled here, not while a round waits.
_add(np.zeros(1), *decode(sparse.encode(np.ones(1, np.int16)), 1)[:1], np.zeros(1, np.float32), 1.0)
