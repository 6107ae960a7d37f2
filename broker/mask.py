"""Which values the next round of a ring coding sends, from what the sums of the rounds before said. Pure.

A value that is not sent waits, and what waits grows with the square root of the rounds; so the values go whose energy a
round, times the rounds since they last went, is largest. The energy is that of the sums that were published: a quarter
a value's own, three quarters its row's and its column's (as in Adafactor: Shazeer and Stern 2018, arXiv:1804.04235),
since a value that was seen once says little. How far the step must change, the gateways tell in their sums.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from models.codec import Sparse
from models.delta import Layout
from models.ringcode import MOST_GATEWAYS, MOST_LEVELS, Ring, bits_for, step_for
from models.spec import Task

State = Mapping[str, NDArray[np.float64]]
Array = NDArray[np.float64]

# Bits that an update takes for each value of the net.
BITS = 0.85
_LEVELS = 7  # at the least
_BLOCK = 64
# Of one number, in the ring of as many gateways as there may be.
MOST_BITS = bits_for(MOST_GATEWAYS, _LEVELS)
# Before anybody told: in a round of Adam, a weight moves by some steps of the learning rate.
_FIRST = 3.0
_NEWEST, _OWN = 0.75, 0.25
_QUIET = 0.01  # of the mean: no value is forgotten
_LEAST, _MOST = 1e-12, 1e6
_KEYS = ("ring_energy", "ring_age", "ring_known")


def ring_for(task: Task, layout: Layout, state: State) -> Ring:
    """Make the ring of the next round of a task from its state; the same each time."""
    shared, keep = layout.mask(task.personal), task.round.keep
    placed = zip(layout.shapes, layout.offsets, layout.offsets[1:], strict=False)
    shapes = [shape for shape, start, end in placed if shared[start:end].any()]
    count = int(shared.sum())
    unknown = np.array([_FIRST * task.training.lr, 0, max(2, task.round.min_gateways), 0])
    spread, samples, gateways, number = state.get("ring_known", unknown).tolist()
    bits = bits_for(int(gateways), _LEVELS)
    levels = min(MOST_LEVELS, (2**bits - 1) // int(gateways))
    share = BITS / bits if keep is None else keep
    sent = min(count, max(1, int(share * count) // _BLOCK) * _BLOCK)
    score = np.ones(count)
    if "ring_energy" in state:
        score = _energy(state["ring_energy"], shapes) * state["ring_age"]
    # What scores alike takes turns.
    turn = np.random.Generator(np.random.Philox(int(number))).permutation(count)
    places = np.sort(np.lexsort((turn, -score))[:sent])
    step = step_for(spread, levels)
    return Ring(levels, int(gateways), count, step, int(samples), int(number) % 2**32, places)


def after(state: State, ring: Ring, mean: Sparse, larger: float, gateways: int, samples: int) -> State:
    """Return the ring's part of the state after a round: its mean, what gateways told, and how many they were."""
    energy = state.get("ring_energy", np.full(ring.count, -1.0)).copy()
    age = state.get("ring_age", np.ones(ring.count)) + 1
    rate, before = np.square(mean.values, dtype=np.float64) / (age[ring.places] - 1), energy[ring.places]
    energy[ring.places] = np.where(before < 0, rate, (1 - _NEWEST) * before + _NEWEST * rate)
    age[ring.places] = 1
    number = state["ring_known"][3] + 1 if "ring_known" in state else 1
    spread = float(np.clip(ring.spread * 2**larger, _LEAST, _MOST))
    most = min(gateways, MOST_GATEWAYS)
    return dict(zip(_KEYS, (energy, age, np.array([spread, samples / gateways, most, number])), strict=True))


def part(state: State) -> State:
    """Return what of a task's state is the ring's."""
    return {key: state[key] for key in _KEYS if key in state}


def _energy(seen: Array, shapes: Sequence[tuple[int, ...]]) -> Array:
    """Energy a round of each value (n,), from that of those that were seen (-1: not yet)."""
    usual, out, start = float(seen[seen >= 0].mean()), np.empty(seen.size), 0
    for shape in shapes:
        end = start + int(np.prod(shape))
        own = seen[start:end]
        mean = float(own[own >= 0].mean()) if (own >= 0).any() else usual
        table = np.where(own < 0, mean, own).reshape(shape[0] if len(shape) > 1 else 1, -1)
        common = np.outer(table.mean(1), table.mean(0)).ravel() / max(mean, np.finfo(np.float64).tiny)
        if len(shape) < 2:  # noqa: PLR2004 - a bias has no rows
            common = np.full(own.size, mean)
        out[start:end] = np.where(own < 0, common, _OWN * own + (1 - _OWN) * common)
        start = end
    least: Array = np.maximum(out, _QUIET * out.mean())
    return least
