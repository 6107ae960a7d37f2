"""Pure: what came in since the last look, as columns for the store."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from edge.blocks import MOST_VALUES, columns_of
from edge.history import LAST_NS, in_order
from edge.tags import Sample, Scan
from edge.window import Columns

# A tag with so many values in one flush needs no journal.
DENSE = 1024


class Part(NamedTuple):
    """Columns of one tag, or of many scalar tags one after the other, `each` samples of each, by source time."""

    refs: tuple[str, ...]
    each: int
    columns: Columns

    def of(self, place: int) -> Columns:
        """Return one tag's columns."""
        rows = slice(place * self.each, (place + 1) * self.each)
        return self.columns[0][rows], self.columns[1][rows], self.columns[2][rows]


def parts_of(batches: Sequence[Sequence[Sample]]) -> tuple[list[Part], int]:
    """Turn batches into parts of at most MOST_VALUES values (or one sample); also count samples without a usable time.

    Scans of the same tags become one table. Where a tag is in other batches too (a cut, a tag refused), its scans are
    samples like any, in the order they came.
    """
    groups: dict[tuple[str, ...], list[Scan]] = defaultdict(list)
    others: set[str] = set()
    for batch in batches:
        if isinstance(batch, Scan):
            groups[batch.refs].append(batch)
        else:
            others.update(sample.tag for sample in batch)
    seen = Counter(others)
    for refs in groups:
        seen.update(refs)
    tables = {
        refs: scans
        for refs, scans in groups.items()
        if len(refs) <= MOST_VALUES and all(seen[ref] == 1 for ref in refs)
    }
    by_tag: dict[tuple[str, int], list[Sample]] = defaultdict(list)
    lost = 0
    for batch in batches:
        if isinstance(batch, Scan) and batch.refs in tables:
            continue
        for sample in batch:
            tag, time_ns, value, _quality = sample
            if 0 <= time_ns <= LAST_NS:
                by_tag[tag, 0 if isinstance(value, float) else len(value)].append(sample)
            else:
                lost += 1
    parts = [part for (tag, width), samples in by_tag.items() for part in _of_tag(tag, width, samples)]
    for refs, scans in tables.items():
        good = [one for one in scans if 0 <= one.time_ns <= LAST_NS]
        lost += len(refs) * (len(scans) - len(good))
        parts += _of_scans(refs, sorted(good, key=lambda one: one.time_ns))
    return parts, lost


def _of_tag(tag: str, width: int, samples: list[Sample]) -> Iterator[Part]:
    most = max(1, MOST_VALUES // max(1, width))
    for start in range(0, len(samples), most):
        columns = columns_of(samples[start : start + most], width)
        # Sources are ordered among themselves only.
        if (columns[0][1:] < columns[0][:-1]).any():
            columns = in_order(columns)
        yield Part((tag,), len(columns[0]), columns)


def _of_scans(refs: tuple[str, ...], scans: list[Scan]) -> Iterator[Part]:
    most = min(DENSE - 1, MOST_VALUES // len(refs))
    for start in range(0, len(scans), most):
        some = scans[start : start + most]
        times = np.tile(np.array([one.time_ns for one in some], np.int64), len(refs))
        values = np.stack([one.values for one in some], axis=1).ravel()
        yield Part(refs, len(some), (times, values, np.stack([one.quality for one in some], axis=1).ravel()))
