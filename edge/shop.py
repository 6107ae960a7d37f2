"""What all tasks of a gateway share."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from broker.charter import Named
from broker.messages import Signer
from broker.roster import Roster
from broker.round import FOREVER_MS
from edge.clauses import Clauses, Headcount
from edge.config import Config
from edge.events import MayTrain, PolicyChanged
from edge.hours import holds, opens
from edge.probe import Prober
from edge.releases import Releases
from edge.ring import Samples
from edge.store import State
from edge.tags import Quality, Sample, Scan
from models.errors import PeerError

log = logging.getLogger(__name__)

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

    def value(self, ref: str) -> float:
        """Return a tag's newest number; NaN where there is none, or it is not good."""
        known = [scan[scan.refs.index(ref)] for scan in self._scans.values() if ref in scan.refs]
        if ref in self._samples:
            known.append(self._samples[ref])
        newest = max(known, key=_time, default=None)
        if newest is None or newest.quality is not Quality.GOOD or not isinstance(newest.value, float):
            return math.nan
        return newest.value

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
    releases: Releases = field(init=False)
    prober: Prober = field(init=False)
    federation: str = ""
    federation_key: bytes = b""
    charter: Named | None = None
    roster: Roster | None = None

    def __post_init__(self) -> None:
        self.releases = Releases(self.state, self.folder / "releases", str(self.config.path))
        self.prober = Prober(self.folder)

    def refuse(self, error: PeerError, what: str) -> None:
        """Count and log a peer's bytes that were refused; nothing stops because of them."""
        self.refused[error.reason] += 1
        log.warning("%s refused: %s", what, error)

    def rules(self, task: str) -> PolicyChanged:
        """What binds this gateway in a task: its policy, the charter that is held, how many the roster has."""
        held, roster = self.charter, self.roster
        clauses = Clauses(held.digest, held.charter, task, self.config.path.enterprise) if held else None
        return PolicyChanged(
            self.config.policy, clauses, Headcount(roster.time_ms, roster.gateways) if roster else None
        )

    def may_train(self) -> MayTrain:
        """Say whether training may start now, by `train_when`, and when at the earliest if not."""
        text, rule, now = self.config.training.train_when, self.config.training.rule, datetime.now().astimezone()
        if text is None or rule is None or holds(rule, now, self.latest.value):
            return MayTrain()
        earliest = opens(rule, now)
        return MayTrain(text, FOREVER_MS if earliest is None else int(earliest.timestamp() * 1000))
