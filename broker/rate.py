"""How much of a sparse update travels: steered by what the gateways' own holdouts say of the model. Pure.

Each update reports the mean loss that its round's base model has on the gateway's holdout. While the loss falls, or
stays level within its noise, less is enough, and the share narrows; where it rises, too much waits in the residuals,
and the share widens, to what it began with at the most: a loss that rises on at that has other reasons. A small net
needs a larger share, since each of its values counts for more.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from broker.messages import MAX_PAYLOAD

NARROWER, WIDER = 0.8, 1.5
LEAST, MOST = 0.01, 0.35
# So many values at the least, whatever the net's size: updates of less than a kilobyte (docs/learning.md has them).
_FEWEST = 600
_FIRST = 2.5  # floors wide is the first round
# A loss this much higher is level, however well the gateways agree.
_LEVEL = 0.01
# A loss above this says no more than that the model is no good; a sum of squares of it stays finite.
_WORST = 1e6
# Of an update, beside its values: the codec's header, the message's other fields and the envelope.
AROUND = 1024
# Bytes of one kept value in a sparse coding, at the most: a gap of up to 26 bits, a sign, and its magnitude's planes.
KEPT = 4

Losses = Mapping[str, tuple[float, int]]


def floor_of(count: int) -> float:
    """The least share that an update of `count` values may keep."""
    return min(MOST, max(LEAST, _FEWEST / count))


@dataclass(frozen=True)
class Rate:
    """The share `keep` of the next round; `usual` is each gateway's running mean loss, by path."""

    keep: float
    floor: float
    ceiling: float
    usual: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def first(cls, count: int) -> "Rate":
        """Begin with the first round of a task that shares `count` values; at most what fits into a message."""
        floor = floor_of(count)
        keep = max(floor, min(_FIRST * floor, MOST, (MAX_PAYLOAD - AROUND) / (KEPT * count)))
        return cls(keep, floor, keep)

    def after(self, losses: Losses) -> "Rate":
        """Go on after a round: `losses` is path -> (mean loss of the base on that holdout, samples).

        Each gateway is compared with itself, by samples; the noise is the standard error of those differences. Where
        nobody was heard before, nothing is known, and the share stays.
        """
        heard = {path: (min(max(loss, 0.0), _WORST), n) for path, (loss, n) in losses.items() if math.isfinite(loss)}
        mean = {path: (self.usual.get(path, loss) + loss) / 2 for path, (loss, _) in heard.items()}
        both = [
            (loss - self.usual[path], self.usual[path], n) for path, (loss, n) in heard.items() if path in self.usual
        ]
        keep = self.keep
        if both:
            weight = sum(n for *_, n in both)
            rise = sum(n * change for change, _, n in both) / weight
            level = _LEVEL * sum(n * was for _, was, n in both) / weight
            if len(both) > 1:
                spread = sum((n / weight * (change - rise)) ** 2 for change, _, n in both)
                level = max(level, math.sqrt(spread * len(both) / (len(both) - 1)))
            keep *= NARROWER if rise <= level else WIDER
        return replace(self, keep=min(max(keep, self.floor), self.ceiling), usual={**self.usual, **mean})


def replay(count: int, rounds: Iterable[Losses]) -> Rate:
    """Return the rate after all rounds so far: what an aggregator knows again after a restart."""
    rate = Rate.first(count)
    for losses in rounds:
        rate = rate.after(losses)
    return rate
