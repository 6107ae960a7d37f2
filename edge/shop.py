"""What all tasks of a gateway share."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from broker.messages import Signer
from edge.config import Config
from edge.ring import Samples
from edge.store import State
from edge.tags import Sample, Scan

_MOST_SCANS = 256  # sets of tags that were read together


class Latest:
    """Every tag's last sample: one that seldom changes has said its value long before a task is there."""

    def __init__(self) -> None:
        self._samples: dict[str, Sample] = {}
        self._scans: dict[tuple[str, ...], Scan] = {}

    def take(self, batch: Sequence[Sample]) -> None:
        """Remember a batch; of tags that are read together, the whole cycle."""
        if isinstance(batch, Scan):
            self._scans[batch.refs] = batch
            if len(self._scans) > _MOST_SCANS:
                self._unpack()
        else:
            self._samples.update((sample.tag, sample) for sample in batch)

    def forget(self, ref: str) -> None:
        """A tag of this name means something else from now on."""
        self._unpack()
        self._samples.pop(ref, None)

    def samples(self) -> list[Sample]:
        """Return what is known, oldest first."""
        self._unpack()
        return sorted(self._samples.values(), key=_time)

    def _unpack(self) -> None:
        for scan in sorted(self._scans.values(), key=_time):
            for sample in scan:
                known = self._samples.get(sample.tag)
                if known is None or known.time_ns <= sample.time_ns:
                    self._samples[sample.tag] = sample
        self._scans.clear()


def _time(one: Sample | Scan) -> int:
    return one.time_ns


@dataclass
class Shop:
    """Configuration, stores, key and link. `publish` returns False when the broker is away."""

    config: Config
    folder: Path
    state: State
    samples: Samples
    signer: Signer
    publish: Callable[..., bool]
    subscribe: Callable[..., object]
    unsubscribe: Callable[..., object]
    refused: Counter[str] = field(default_factory=Counter)
    latest: Latest = field(default_factory=Latest)
    federation: str = ""
    federation_key: bytes = b""
