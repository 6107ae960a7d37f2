"""The weight container: named float32 arrays laid end to end in one flat vector.

A `Layout` names the arrays and their shapes, in order; a flat vector of `layout.size` float32 values is then a set of
weights, or a delta (weights minus base): the same container for both. Integer buffers (BatchNorm's step counters)
are named in the layout, so that two nets that differ there do not match, but they are counters of one machine: they
have no meaningful average, so they are not part of the vector and never travel.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from models.errors import PeerError

Vector = NDArray[np.float32]
Wire = tuple[tuple[str, tuple[int, ...] | None], ...]

MAX_PARAMETERS = 50_000_000
MAX_ENTRIES = 4_096
MAX_DIMENSIONS = 8
MAX_NAME = 256


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the float arrays, in vector order, and the names of integer buffers."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    integers: tuple[str, ...] = ()

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each array in the vector, and the end of the last (len(names) + 1 values)."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        return tuple(ends)

    @property
    def size(self) -> int:
        """Number of float32 values in the vector."""
        return self.offsets[-1]

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Views of the vector by name, each in its shape."""
        if vector.shape != (self.size,):
            raise ValueError(f"vector has shape {vector.shape}, the layout wants ({self.size},)")
        return {
            name: vector[start:end].reshape(shape)
            for name, shape, start, end in zip(self.names, self.shapes, self.offsets, self.offsets[1:], strict=False)
        }

    def join(self, arrays: Mapping[str, NDArray[np.generic]]) -> Vector:
        """Copy named arrays into a new flat vector; names and shapes must be the layout's."""
        out = np.empty(self.size, np.float32)
        for name, view in self.split(out).items():
            if name not in arrays or arrays[name].shape != view.shape:
                raise ValueError(f"{name}: missing, or not of shape {view.shape}")
            view[...] = arrays[name]
        return out

    def mask(self, personal: Sequence[str]) -> NDArray[np.bool_]:
        """Boolean vector (size,): True where a value is shared, False where `personal` prefixes keep it here."""
        out = np.ones(self.size, np.bool_)
        for name, start, end in zip(self.names, self.offsets, self.offsets[1:], strict=False):
            if any(_below(name, p) for p in personal):
                out[start:end] = False
        return out

    def unknown(self, prefixes: Sequence[str]) -> list[str]:
        """List the prefixes below which there is nothing."""
        return [p for p in prefixes if not any(_below(name, p) for name in self.names)]

    def to_wire(self) -> Wire:
        """Plain values for a message, inverse of `from_wire`: (name, shape) of each array, (name, None) of integers."""
        return (*zip(self.names, self.shapes, strict=True), *((name, None) for name in self.integers))

    @classmethod
    def from_wire(cls, entries: Sequence[tuple[str, tuple[int, ...] | None]]) -> "Layout":
        """Check a peer's layout before anything is allocated; PeerError("layout") when it is out of bounds."""
        if not 0 < len(entries) <= MAX_ENTRIES:
            raise PeerError("layout", f"{len(entries)} arrays")
        total, names = 0, set()
        for name, shape in entries:
            if not 0 < len(name) <= MAX_NAME or name in names:
                raise PeerError("layout", f"array name {name[:40]!r} is empty, long or used twice")
            names.add(name)
            if shape is None:
                continue
            if len(shape) > MAX_DIMENSIONS or any(not 0 < d <= MAX_PARAMETERS for d in shape):
                raise PeerError("layout", f"{name}: shape {list(shape)[:9]}")
            total += math.prod(shape)
            if total > MAX_PARAMETERS:
                raise PeerError("layout", f"more than {MAX_PARAMETERS} parameters")
        floats = [(n, tuple(s)) for n, s in entries if s is not None]
        if not floats:
            raise PeerError("layout", "no float array")
        return cls(
            names=tuple(n for n, _ in floats),
            shapes=tuple(s for _, s in floats),
            integers=tuple(n for n, s in entries if s is None),
        )

    def to_json(self) -> str:
        """Write it as files and the journal hold it: the JSON of `to_wire`."""
        return json.dumps(self.to_wire())

    @classmethod
    def from_json(cls, text: str | bytes) -> "Layout":
        """Inverse of `to_json`; PeerError("layout") for anything else."""
        try:
            entries = msgspec.json.decode(text, type=Wire)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise PeerError("layout", f"not the JSON of a layout: {error}"[:300]) from error
        return cls.from_wire(entries)

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.generic]]) -> "Layout":
        """Make the layout of named arrays (a torch state_dict as numpy), in their order."""
        floats = {n: a for n, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
        return cls(
            names=tuple(floats),
            shapes=tuple(a.shape for a in floats.values()),
            integers=tuple(n for n in arrays if n not in floats),
        )


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def weights_digest(vector: Vector) -> bytes:
    """SHA-256 of the values as little-endian float32, in layout order (32 bytes)."""
    return hashlib.sha256(vector.astype("<f4").tobytes()).digest()


def read_export(path: Path) -> tuple[bytes, Layout, Vector]:
    """Read what `models.export` wrote: graph, layout and first weights.

    OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile or PeerError for anything else.
    """
    with np.load(path, allow_pickle=False) as arrays:
        layout = Layout.from_json(arrays["layout"].tobytes())
        return arrays["graph"].tobytes(), layout, arrays["vector"].astype(np.float32)
