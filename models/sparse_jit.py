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
# How many zeros a byte begins with.
_ZEROS = np.array([8 - value.bit_length() for value in range(256)], np.int64)
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
    """Read the places of k members into `out`; the bit behind them, -1 if the stream is no such one."""
    parameters = at
    at += _R_BITS * ((k + _CHUNK - 1) // _CHUNK)
    if at > size:
        return -1
    low = at
    for c in range(0, k, _CHUNK):
        at += _field(data, parameters + c // _CHUNK * _R_BITS, _R_BITS) * min(_CHUNK, k - c)
    if at > size:
        return -1
    # Byte by byte: where the next one is, and how many zeros lie between it and the last.
    byte, first, last, i = np.int64(data[at >> 3]) & (0xFF >> (at & 7)), at & ~7, at - 1, 0
    while i < k:
        if byte:
            zeros = _ZEROS[byte]
            out[i] = first + zeros - last - 1
            last = first + zeros
            byte &= 0x7F >> zeros
            i += 1
        else:
            first += _BYTE
            if first >= size:
                return -1
            byte = np.int64(data[first >> 3])
    at = last + 1
    place = -1
    for c in range(0, k, _CHUNK):
        r = _field(data, parameters + c // _CHUNK * _R_BITS, _R_BITS)
        for i in range(c, min(c + _CHUNK, k)):
            place += 1 + ((out[i] << r) | _field(data, low, r))
            low += r
            out[i] = place
    return at if place < parent else -1


@numba.njit
def _decode(data, size, count):  # type: ignore[no-untyped-def]
    at, k = _members(data, size, 0, count)
    places, values = np.empty(max(k, 0), np.int64), np.ones(max(k, 0), np.int16)
    if k > 0:
        at = _plane(data, size, at, k, count, places)
    if k < 0 or at < 0 or at + k > size:
        return False, places, values
    signs = at
    at += k
    # Which of the members have a magnitude above m, and their places among those above m - 1.
    above, found, n, m = np.arange(k), np.empty(k, np.int64), k, 1
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
    return True, places, values


@numba.njit
def _add(total, places, values, weight):  # type: ignore[no-untyped-def]
    for i in range(len(places)):
        total[places[i]] += np.float64(values[i]) * weight


MACHINE = sparse.Coder(decode, _add)
# Compiled here, not while a round waits.
_add(np.zeros(1), *decode(sparse.encode(np.ones(1, np.int16)), 1)[:1], np.zeros(1, np.float32), 1.0)
