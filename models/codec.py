"""Delta <-> bytes.

Byte format, version 1 (little endian):

    offset  size  field
    0       2     magic "TD"
    2       1     version, 1
    3       1     coding: 0 sparse; else bits per value before compression: 2, 4, 8, or 32 (float32, exact)
    4       4     count: values in the vector, unsigned
    8       4     step, float32: finite and above 0; 1 when the values are exact
    12      …     sparse: the stream of models/sparse.py; else one zstd frame; nothing after it

But for exact ones, value = q * step. The frame holds `q` as signed integers in two's complement, packed from the low
bits up (four, two or one a byte), the last byte padded with zero bits; |q| <= 2^(bits-1) - 1, so the most negative
code is refused. For 32 bits it holds the float32 values as four byte planes (all lowest bytes first), which zstd
packs better; each value must be finite.

Error feedback: `encode` also returns what the bytes decode to, so a sender keeps `residual = vector - decoded` and
adds it to its next vector (Seide et al. 2014, 1-bit SGD; Karimireddy et al. 2019, arXiv:1901.09847).

The sparse coding keeps the largest values alone: with t the magnitude of the k-th largest, k = keep * count, the step
is 2t, so what is below t rounds to nothing and waits in the residual. Step and error feedback after Strom 2015,
"Scalable distributed DNN training using commodity GPU cloud computing"; the rest is in the residual, not lost.

Not promised: bytes for the same vector may differ between zstd versions; the decoded values do not.
"""

import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from models import sparse
from models.delta import MAX_PARAMETERS, Vector
from models.errors import PeerError

MAGIC = b"TD"
VERSION = 1
HEADER = struct.Struct("<2sBBIf")
SPARSE = 0
BITS = (SPARSE, 2, 4, 8, 32)
EXACT = 32
_LEVEL = 19
# A frame may ask its reader for a window of this many bytes at most.
_WINDOW_LOG_MAX = 27
_PIECE = 128
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Encoded:
    """Bytes to send, and the float32 vector that every receiver will decode from them."""

    data: bytes
    decoded: Vector


class Sparse(NamedTuple):
    """A vector of `size` values by those that are not zero: `places` rising, `values` as float32."""

    size: int
    places: sparse.Places
    values: Vector
    coder: sparse.Coder = sparse.NUMPY

    def add_to(self, total: sparse.Sums, weight: float) -> None:
        """Add the vector times a weight to a sum (size,)."""
        self.coder.add(total, self.places, self.values, weight)

    def dense(self) -> Vector:
        """The vector (size,)."""
        vector = np.zeros(self.size, np.float32)
        vector[self.places] = self.values
        return vector


def encode(vector: Vector, bits: int = 8, keep: float = 1.0) -> Encoded:
    """Quantise and compress a flat float32 vector; ValueError if it holds a NaN or an infinity.

    `keep` is the share of values that a sparse coding, or one of 2 bits, keeps: above 0 to 1.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}")
    if vector.ndim != 1 or not 0 < vector.size <= MAX_PARAMETERS:
        raise ValueError("a codec takes a flat vector of 1 to 50 million values")
    if not np.isfinite(vector).all():
        raise ValueError("the vector holds a NaN or an infinity")
    vector = np.ascontiguousarray(vector, np.float32)
    if bits == SPARSE:
        return _encode_sparse(vector, keep)
    if bits == EXACT:
        step, decoded = 1.0, vector.copy()
        raw = vector.view(np.uint8).reshape(-1, 4).T.tobytes()
    else:
        top = 2 ** (bits - 1) - 1
        largest = float(np.abs(vector).max()) / top
        step = _float32(_kept_step(np.abs(vector), keep) if bits == 2 and keep < 1 else largest)  # noqa: PLR2004
        q = np.clip(np.rint(vector / step), -top, top).astype(np.int8)
        decoded = q * np.float32(step)
        raw = _pack(q, bits)
    header = HEADER.pack(MAGIC, VERSION, bits, vector.size, step)
    return Encoded(header + zstandard.ZstdCompressor(level=_LEVEL).compress(raw), decoded)


def decode(data: bytes, count: int) -> Vector:
    """Bytes from a peer to the float32 vector (count,); PeerError("codec") unless they are exactly that."""
    decoded = decode_sparse(data, count)
    return decoded.dense() if isinstance(decoded, Sparse) else decoded


def declared(data: bytes) -> int:
    """Return how many values a payload says that it has; PeerError("codec") without a whole header."""
    if len(data) < HEADER.size:
        raise PeerError("codec", f"{len(data)} bytes are shorter than the header")
    count: int = HEADER.unpack_from(data)[3]
    return count


def decode_sparse(data: bytes, count: int, coder: sparse.Coder = sparse.NUMPY) -> Sparse | Vector:
    """Decode as `decode` does, but leave a sparse coding as it is: two values in a hundred are sooner added.

    `count` is what the receiver's own layout says; no memory is taken for any other number. `coder` decodes the stream
    and adds up what it holds.
    """
    if len(data) < HEADER.size:
        raise PeerError("codec", f"{len(data)} bytes are shorter than the header")
    magic, version, bits, declared, step = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise PeerError("codec", f"not a delta of version {VERSION}")
    if bits not in BITS:
        raise PeerError("codec", f"coding {bits}")
    if declared != count or not 0 < count <= MAX_PARAMETERS:
        raise PeerError("codec", f"{declared} values, the layout has {count}")
    top = sparse.MOST if bits == SPARSE else 2 ** (bits - 1) - 1
    if not 0 < step <= _LARGEST / top or (bits == EXACT and step != 1):
        raise PeerError("codec", f"step {step}")
    if bits == SPARSE:
        places, q = coder.decode(data[HEADER.size :], count)
        return Sparse(count, places, q * np.float32(step), coder)
    raw = inflate(data[HEADER.size :], -(-count * bits // 8))
    if bits == EXACT:
        planes = np.frombuffer(raw, np.uint8).reshape(4, count)
        vector = np.ascontiguousarray(planes.T).view(np.float32).reshape(count)
        if not np.isfinite(vector).all():
            raise PeerError("codec", "a NaN or an infinity")
        return vector
    return _unpack(raw, bits, count) * np.float32(step)


def inflate(frame: bytes, size: int) -> bytes:
    """Decompress one zstd frame that must hold exactly `size` bytes; whatever the frame itself declares is a claim.

    The stream is read with a bound, so a frame that declares a terabyte costs nothing (python-zstandard #332).
    """
    window = max(10, min(_WINDOW_LOG_MAX, (max(size, 1) - 1).bit_length() + 1))
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if parameters.content_size not in (size, zstandard.CONTENTSIZE_UNKNOWN):
            raise PeerError("codec", f"the frame declares {parameters.content_size} bytes, {size} are due")
        stream = zstandard.ZstdDecompressor(max_window_size=1 << window).decompressobj()
        out = bytearray()
        # Fed in small pieces: one of them expands to 4 MiB at the worst before the bound is checked again.
        for start in range(0, len(frame), _PIECE):
            out += stream.decompress(frame[start : start + _PIECE])
            if len(out) > size:
                raise PeerError("codec", f"the frame holds more than the {size} bytes due")
    except zstandard.ZstdError as error:
        raise PeerError("codec", f"zstd: {error}") from error
    if len(out) != size or not stream.eof or stream.unused_data:
        raise PeerError("codec", f"the frame holds {len(out)} of {size} bytes, or something follows it")
    return bytes(out)


def deflate(raw: bytes) -> bytes:
    """Compress bytes into one frame that `inflate` takes."""
    return zstandard.ZstdCompressor(level=_LEVEL).compress(raw)


def _kept_step(magnitude: Vector, keep: float) -> float:
    """Return the step at which the largest `keep` of the values, and no others, round to something."""
    if not 0 < keep <= 1:
        raise ValueError("keep must be above 0, and 1 at most")
    k = max(1, round(keep * magnitude.size))
    # Where fewer than k are not zero, all of those are kept.
    smallest = float(np.partition(magnitude, -k)[-k]) or float(magnitude[magnitude > 0].min(initial=1))
    # A hair below twice the smallest kept value, or rint would round that one half to even: to nothing.
    return 2 * smallest * (1 - 2**-20)


def _encode_sparse(vector: Vector, keep: float) -> Encoded:
    magnitude = np.abs(vector)
    # No value is cut: where all are to be kept, the largest sets the step.
    step = _float32(max(_kept_step(magnitude, keep), float(magnitude.max()) / sparse.MOST))
    q = np.clip(np.rint(vector / step), -sparse.MOST, sparse.MOST).astype(np.int16)
    header = HEADER.pack(MAGIC, VERSION, SPARSE, vector.size, step)
    return Encoded(header + sparse.encode(q), q * np.float32(step))


def _float32(step: float) -> float:
    """Round-trip a step as the header carries it, so that sender and receiver multiply by the same number."""
    return max(float(np.float32(step)), float(np.finfo(np.float32).tiny))


def _pack(q: NDArray[np.int8], bits: int) -> bytes:
    per = 8 // bits
    padded = np.zeros(-(-q.size // per) * per, np.uint8)
    padded[: q.size] = q.view(np.uint8) & (2**bits - 1)
    out = np.zeros(padded.size // per, np.uint8)
    for i in range(per):
        out |= padded[i::per] << np.uint8(i * bits)
    return out.tobytes()


def _unpack(raw: bytes, bits: int, count: int) -> NDArray[np.int8]:
    per, top = 8 // bits, 2 ** (bits - 1)
    packed = np.frombuffer(raw, np.uint8)
    codes = np.empty(packed.size * per, np.int8)
    for i in range(per):
        field = (packed >> np.uint8(i * bits)) & np.uint8(2**bits - 1)
        codes[i::per] = (field.astype(np.int16) ^ top) - top
    if codes[count:].any() or (codes[:count] == -top).any():
        raise PeerError("codec", "padding or a code that no encoder writes")
    return codes[:count]
