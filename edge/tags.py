"""What comes in from a plant: Tag, Sample, Quality, and the contract between a driver and the agent."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, NamedTuple, Protocol, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

NO_BOUND = 1e308  # of a tag's range; infinity does not pass through JSON


class Quality(IntEnum):
    """Of one sample, as OPC UA's severity bits mean it (OPC UA Part 8): only GOOD is trained on."""

    BAD = 0
    UNCERTAIN = 1
    GOOD = 2


class Tag(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a tags CSV. `ref` ("plc1/Spindle.Temp") is its name everywhere else.

    value = raw * scale + offset, in `unit`; outside of `low` to `high` it is counted, and masked in windows.
    `sampling_ms` 0 leaves the rate to the source. `deadband` is in `unit`, `deadband_percent` of the tag's EURange at
    the source (OPC UA Part 8); one of them is 0. `width` is the length of a waveform (`float32[1024]`), 0 for a
    scalar. `file` and `line` say where it was written.
    """

    source: str
    name: str
    address: str
    type: str = ""
    unit: str = ""
    scale: float = 1.0
    offset: float = 0.0
    deadband: float = 0.0
    deadband_percent: float = 0.0
    sampling_ms: int = 0
    description: str = ""
    low: float = -NO_BOUND
    high: float = NO_BOUND
    width: int = 0
    file: str = ""
    line: int = 0

    @property
    def ref(self) -> str:
        """`source/name`."""
        return f"{self.source}/{self.name}"


Value = float | NDArray[np.float32]


class Sample(NamedTuple):
    """One value of one tag. `time_ns` is the source's timestamp, nanoseconds since 1970 UTC.

    `value` is a float, or float32 (T,) for a waveform; for BAD it is NaN (or empty) and means nothing.
    """

    tag: str
    time_ns: int
    value: Value
    quality: Quality


class Scan(Sequence[Sample]):
    """Samples of scalar tags of one source, read together, as columns: what a polled device gives in one cycle.

    A batch like any other; who looks at the columns instead pays for the cycle, not for each value. `refs` (N) is one
    and the same tuple from cycle to cycle. values (N,) float64 hold NaN where quality (N,) int8 is not GOOD.
    """

    __slots__ = ("quality", "refs", "time_ns", "values")

    def __init__(
        self, refs: tuple[str, ...], time_ns: int, values: NDArray[np.float64], quality: NDArray[np.int8]
    ) -> None:
        self.refs, self.time_ns, self.values, self.quality = refs, time_ns, values, quality

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, place: int) -> Sample: ...
    @overload
    def __getitem__(self, place: slice) -> list[Sample]: ...
    def __getitem__(self, place: int | slice) -> Sample | list[Sample]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        return Sample(self.refs[place], self.time_ns, float(self.values[place]), Quality(int(self.quality[place])))


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """One `[[source]]` of gateway.toml with its tags. `options` holds the keys that one driver alone knows.

    `pki` is the folder of certificates in the gateway's state; empty where nothing will be connected. `folder` is that
    file's, from which relative paths in it are meant.
    """

    name: str
    driver: str
    url: str
    tags: tuple[Tag, ...]
    options: dict[str, object] = {}
    pki: str = ""
    folder: str = ""

    def meaning(self, tag: Tag) -> str:
        """What makes a tag's stored values what they are; a new URL does not, for a machine that moved is the same."""
        device = [self.options.get(key) for key in ("device_id", "address_base")]
        row = (self.driver, *device, tag.address, tag.type, tag.unit, tag.scale, tag.offset, tag.width)
        return hashlib.blake2b(repr(row).encode(), digest_size=8).hexdigest()


@dataclass
class Health:
    """What a driver says of itself, live: read by status, doctor and tests; written by the driver alone.

    `overflows` counts values with which the source says that its queue lost some before them; `gaps` the times after
    which nobody can say what came in between (a server that restarted, or kept too little). `quarantined` maps a tag's
    ref to why it is retried apart from the others; `notes` says by subject where the source gives less than was
    asked for; `error` is the last failure in one line with its remedy, empty while all is well.
    """

    connected: bool = False
    connects: int = 0
    samples: int = 0
    bad: int = 0
    overflows: int = 0
    gaps: int = 0
    error: str = ""
    quarantined: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    clock_skew_s: float | None = None

    def go_on(self, before: "Health") -> None:
        """Count on from where another driver of the same source ended."""
        for name in ("connects", "samples", "bad", "overflows", "gaps"):
            setattr(self, name, getattr(self, name) + getattr(before, name))


class Sink(Protocol):
    """Where a driver puts what it reads. Called in the event loop; it never blocks and never raises."""

    def __call__(self, samples: Sequence[Sample], /) -> None:
        """Take a batch, oldest first."""


class Driver(Protocol):
    """One protocol. A driver is one file in edge/drivers/ whose class is named `Driver`; it only ever reads.

    Contract, held by tests/test_drivers.py for every file there:
    - `run()` goes on until cancelled: it connects, reads, and after any cut connects again by itself with backoff
      (0.2 s doubling to 10 s); errors of its library end at its boundary, in `health.error`.
    - On a cut it delivers one BAD sample per tag, at once, stamped with the source's clock as far as its last sample
      tells; before a first sample nothing is known, and nothing is said. A tag that the source refuses is BAD,
      quarantined and retried with backoff (1 s to 60 s) while the others run.
    - Values pass scale and offset; strings become CRC-32 of their UTF-8 (segments compare equality only) where the
      tag's type is `string`; booleans become 0 and 1. A tag whose type does not go with what is read (a text, an array)
      is quarantined with what to write.
    - Cancelling `run()` closes the connection and returns within two seconds.
    """

    schemes: ClassVar[tuple[str, ...]]
    health: Health

    def __init__(self, source: Source, sink: Sink) -> None:
        """Take the source as configured; raise UserError for an address or option that can't be meant."""

    async def run(self) -> None:
        """Read until cancelled."""


async def sleep_backoff(attempt: int, first_s: float = 0.2, most_s: float = 10.0) -> None:
    """Wait before a next try: `first_s` doubled per attempt, `most_s` at most.

    What is read after a cut waits for the next try, so that the most is what a long cut costs beyond itself; a
    connection every ten seconds is no load for a PLC.
    """
    await asyncio.sleep(min(most_s, first_s * 2 ** min(attempt, 20)))
