"""A delta as integers of a ring, so that vectors of many gateways can be added by who sees none of them alone.

What all gateways of a round share is its `Ring`: which values are sent, the step, and how large the ring is. None of it
depends on what a single gateway learnt. Each gateway gathers those values, turns them by a shared rotation that gives
all of them the same spread, rounds them to `levels` + 1 levels a step apart, and sends the levels' numbers. Up to
`gateways` such vectors add up modulo 2^bits without an overflow, and a mask that is uniform in the ring hides each.
What is not sent, or rounded away, waits at the gateway (error feedback, as in `codec`).

A ring as bytes, version 1 (little endian), as a plan carries it:

    offset  size  field
    0       2     magic "TR"
    2       1     version, 1
    3       1     levels: the largest number that a gateway sends, 1 to 15
    4       4     gateways: how many may be in a sum, 1 or more
    8       4     count: values in the vector
    12      4     step, float32: finite and above 0
    16      4     samples: of a gateway that counts once; 0 where all do
    20      4     seed of the rotation
    24      …     stream of models/sparse.py: `count` values, 1 where one is sent, else 0; at least one is sent

An update, version 1; bits is the bit length of gateways * levels:

    0       2     magic "TU"
    2       1     version, 1
    3       1     bits
    4       8     the first bytes of the SHA-256 of the ring
    12      …     numbers of `bits` bits, most significant bit first; as many as fill whole bytes

Numbers: those of the values, padded with zeros to blocks of 64, then TOLD more whose sum tells how much larger a
gateway's values are than the ring's step expects, 2 * log2 of it, plus TOLD * levels // 2.

A value is weighted by samples / `samples` before all else; value i goes to place i // blocks of block i mod blocks;
signs are the bits of SHAKE-256 (FIPS 202) of the seed, block by block, 1 for plus; then Walsh and Hadamard's transform,
orthonormal. A number is round(value / step + levels / 2), cut to 0 to levels.

Rotation before coarse levels: Suresh et al. 2017, arXiv:1611.00429. Sums in a ring: Bonawitz et al. 2017, "Practical
secure aggregation for privacy-preserving machine learning". Steps: Max 1960, "Quantizing for minimum distortion".
"""

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from models import sparse
from models.codec import Encoded, Sparse
from models.delta import MAX_PARAMETERS, Vector
from models.errors import PeerError

MAGIC, MAGIC_UPDATE, VERSION = b"TR", b"TU", 1
HEADER, HEADER_UPDATE = struct.Struct("<2sBBIIfII"), struct.Struct("<2sBB8s")
# How a plan names this coding among those of `codec`.
RING = 1
TOLD = 8
MOST_LEVELS, MOST_GATEWAYS = 15, 10_000
_BLOCK = 64
# The step of so many levels and one that loses the least of a normal distribution, in standard deviations.
_STEPS = (
    1.596, 1.224, 0.9957, 0.843, 0.7334, 0.6508, 0.586, 0.5338, 0.4908, 0.4546, 0.4238, 0.397, 0.3739, 0.3534, 0.3352,
)  # fmt: skip

Numbers = NDArray[np.uint32]


@dataclass(frozen=True)
class Ring:
    """What all gateways of a round share, as above; `places` (sent,) rising, of the vector's `count`."""

    levels: int
    gateways: int
    count: int
    step: float
    samples: int
    seed: int
    places: sparse.Places

    @classmethod
    def from_bytes(cls, data: bytes, count: int) -> "Ring":
        """Read a peer's ring for vectors of `count` values; PeerError("ring") unless it is exactly that."""
        if len(data) < HEADER.size:
            raise PeerError("ring", f"{len(data)} bytes are shorter than the header")
        magic, version, levels, gateways, declared, step, samples, seed = HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION:
            raise PeerError("ring", f"not a ring of version {VERSION}")
        if not 1 <= levels <= MOST_LEVELS or not 1 <= gateways <= MOST_GATEWAYS:
            raise PeerError("ring", f"{levels} levels, {gateways} gateways")
        if declared != count or not 0 < count <= MAX_PARAMETERS:
            raise PeerError("ring", f"{declared} values, the layout has {count}")
        if not 0 < step <= float(np.finfo(np.float32).max) / (MOST_LEVELS * MOST_GATEWAYS * _BLOCK):
            raise PeerError("ring", f"step {step}")
        places, ones = sparse.decode(data[HEADER.size :], count)
        if not places.size or (ones != 1).any():
            raise PeerError("ring", "not a mask, or an empty one")
        return cls(levels, gateways, count, step, samples, seed, places)

    @cached_property
    def data(self) -> bytes:
        """Inverse of `from_bytes`."""
        mask = np.zeros(self.count, np.int16)
        mask[self.places] = 1
        numbers = self.levels, self.gateways, self.count, self.step, self.samples, self.seed
        return HEADER.pack(MAGIC, VERSION, *numbers) + sparse.encode(mask)

    @cached_property
    def digest(self) -> bytes:
        """Eight bytes that tell it from others."""
        return hashlib.sha256(self.data).digest()[:8]

    @property
    def bits(self) -> int:
        """The ring's size: numbers are added modulo 2^bits."""
        return bits_for(self.gateways, self.levels)

    @property
    def blocks(self) -> int:
        """How many blocks of 64 the values make."""
        return -(-self.places.size // _BLOCK)

    @property
    def size(self) -> int:
        """How many numbers an update holds."""
        return _BLOCK * self.blocks + TOLD

    @property
    def spread(self) -> float:
        """The root mean square of values that the step fits best."""
        return self.step / step_for(1.0, self.levels)

    @cached_property
    def signs(self) -> Vector:
        """Plus and minus one, (blocks, 64)."""
        digest = hashlib.shake_256(self.seed.to_bytes(4, "little")).digest(_BLOCK // 8 * self.blocks)
        return np.unpackbits(np.frombuffer(digest, np.uint8)).reshape(-1, _BLOCK) * np.float32(2) - np.float32(1)

    def weight(self, samples: int) -> float:
        """How many times a gateway of so many samples counts."""
        return samples / self.samples if self.samples else 1.0


def bits_for(gateways: int, levels: int) -> int:
    """Return the bits of the smallest ring in which sums of so many gateways do not overflow."""
    return (gateways * levels).bit_length()


def step_for(spread: float, levels: int) -> float:
    """Return the best step for values of this spread (root mean square), as the header carries it."""
    return float(np.float32(max(spread * _STEPS[levels - 1], float(np.finfo(np.float32).tiny))))


def encode(vector: Vector, ring: Ring, samples: int) -> Encoded:
    """Code a gateway's vector (count,); ValueError if it holds a NaN or an infinity.

    `decoded` is its part in the mean: what the numbers say, unweighted.
    """
    if vector.shape != (ring.count,):
        raise ValueError(f"a vector of shape {vector.shape}, the ring has {ring.count} values")
    weight = np.float32(ring.weight(samples))
    values = vector[ring.places].astype(np.float32) * weight
    if not np.isfinite(vector).all() or not np.isfinite(values).all():
        raise ValueError("the vector holds a NaN or an infinity")
    laid = np.zeros((_BLOCK, ring.blocks), np.float32)
    laid.ravel()[: values.size] = values
    turned = turn(laid.T * ring.signs).ravel()
    numbers = np.clip(np.rint(turned / ring.step + ring.levels / 2), 0, ring.levels).astype(np.uint32)
    spread = float(np.sqrt(np.square(values, dtype=np.float64).mean()))
    larger = 2 * np.log2(max(spread, float(np.finfo(np.float32).tiny)) / ring.spread)
    told = int(np.clip(np.rint(larger) + _level(ring), 0, TOLD * ring.levels))
    tail = (told // TOLD + (np.arange(TOLD) < told % TOLD)).astype(np.uint32)
    numbers = np.concatenate([numbers, tail])
    head = HEADER_UPDATE.pack(MAGIC_UPDATE, VERSION, ring.bits, ring.digest)
    decoded = spread_out(decode(numbers, ring, 1)[0] / weight, ring)
    return Encoded(head + pack(numbers, ring.bits), decoded.dense())


def unpack(data: bytes, ring: Ring) -> Numbers:
    """Bytes of a peer to the numbers (ring.size,) to add; PeerError("codec") unless they are exactly that.

    A number may be anything in the ring: a mask makes it so.
    """
    bits, head = ring.bits, HEADER_UPDATE.size
    if len(data) != head + ring.size * bits // 8:
        raise PeerError("codec", f"{len(data)} bytes, the ring's updates have {head + ring.size * bits // 8}")
    magic, version, declared, digest = HEADER_UPDATE.unpack_from(data)
    if magic != MAGIC_UPDATE or version != VERSION or declared != bits:
        raise PeerError("codec", f"not a ring's update of version {VERSION}")
    if digest != ring.digest:
        raise PeerError("codec", "made for another ring")
    numbers = np.zeros(ring.size, np.uint32)
    for digit in np.unpackbits(np.frombuffer(data, np.uint8, offset=head)).reshape(ring.size, bits).T:
        numbers = numbers << np.uint32(1) | digit
    return numbers


def pack(numbers: Numbers, bits: int) -> bytes:
    """Inverse of what `unpack` does after the header."""
    digits = numbers[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint32) & np.uint32(1)
    return np.packbits(digits.astype(np.uint8)).tobytes()


def decode(total: Numbers, ring: Ring, gateways: int) -> tuple[Vector, float]:
    """From the sum of `gateways` vectors modulo 2^bits to the sum of what they sent (sent,), and how much larger.

    That is the mean over gateways of log2(their spread / the ring's).
    """
    signed = (total & np.uint32(2**ring.bits - 1)).astype(np.float32)
    turned = (signed[:-TOLD] - np.float32(gateways * ring.levels / 2)) * np.float32(ring.step)
    values = (turn(turned.reshape(-1, _BLOCK)) * ring.signs).T.ravel()[: ring.places.size]
    larger = (float(signed[-TOLD:].sum()) / gateways - _level(ring)) / 2
    return values, larger


def spread_out(values: Vector, ring: Ring) -> Sparse:
    """Values (sent,) where they belong."""
    return Sparse(ring.count, ring.places, np.ascontiguousarray(values, np.float32))


def _level(ring: Ring) -> int:
    """What is told where nothing is larger or smaller."""
    return TOLD * ring.levels // 2


def turn(blocks: Vector) -> Vector:
    """Walsh and Hadamard's transform of each row (rows, a power of two), orthonormal: its own inverse."""
    out, half, size = blocks, 1, blocks.shape[1]
    while half < size:
        pairs = out.reshape(len(blocks), -1, 2, half)
        out = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(blocks.shape)
        half *= 2
    return out / np.float32(np.sqrt(size))
