"""From a round's counted updates to the next model: finds the strategy by its file name and runs it.

A strategy is one file in `broker/strategies`, with a function
`aggregate(state, updates, *, momentum) -> (state, delta)`: pure, streaming, its state a dict of float64 arrays. An
update's delta is a vector, what a sparse coding keeps of one (`codec.Sparse`), or what a narrow gateway has of one
(`width.Part`).
"""

import importlib
import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker import mask
from broker.strategies._mean import State
from models import codec, ringcode, sparse
from models.delta import Vector
from models.ringcode import Ring
from models.spec import Task
from models.tomlfile import TomlFile
from models.width import Part, Places

Strategy = Callable[..., tuple[State, Vector]]

# Machine code for the sums of so many updates saves, round by round, more than it costs to compile.
MANY = 100
_coder = sparse.NUMPY


def strategy_names() -> list[str]:
    """List the strategies there are, by file name."""
    folder = Path(__file__).parent / "strategies"
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def check_strategy(task: Task, place: str, text: str) -> None:
    """Refuse a task whose strategy is none; UserError with the line of its text."""
    if task.round.strategy not in strategy_names():
        remedy = f"write one of: {', '.join(strategy_names())}"
        raise TomlFile(place, text).error(["round", "strategy"], f"no strategy {task.round.strategy!r}", remedy)


def strategy(name: str) -> Strategy:
    """Return the function of one strategy; KeyError if there is no such file."""
    if name not in strategy_names():
        raise KeyError(name)
    function: Strategy = importlib.import_module(f"broker.strategies.{name}").aggregate
    return function


def next_model(
    name: str,
    state: bytes,
    base: Vector,
    shared: NDArray[np.bool_],
    payloads: Iterator[tuple[bytes, int, int]],
    *,
    momentum: float,
    age: float = 0.0,
    ring: Ring | None = None,
    slices: Mapping[float, Places] = MappingProxyType({}),
) -> tuple[bytes, Vector]:
    """Run a strategy over codec payloads, one at a time; return its new state and the full new weights (n,).

    Each payload comes with its samples and with how many rounds late it is; `age` is the mean of these. What is late
    counts 1/sqrt(1 + rounds) (FedBuff: Nguyen et al. 2022, arXiv:2106.06639), and since updates that are late act like
    a momentum themselves (Mitliagkas et al. 2016, arXiv:1605.09774), the server's falls as 1/(1 + age).

    With a `ring`, payloads are its updates, and what counts is their sum in the ring. What waits at the gateways acts
    like a momentum, so the server has none.

    Payloads of fewer values are narrow gateways': `slices` says which values those are (`width.slices`). What nobody
    has who sent one stays as it is, the strategy's momentum included.

    The deltas cover the True positions of `shared` (n,); the rest of `base` (n,) stays as it is. ValueError if the
    new weights hold a NaN or an infinity.
    """
    count = int(shared.sum())
    kept = load_state(state)
    if ring:
        mean, samples, rings = _summed(payloads, ring, kept)
        new_state, delta = strategy(name)(kept, iter([(mean, samples)]), momentum=0.0)
        new_state = {**new_state, **rings}
    else:
        had = np.zeros(count, np.bool_)
        updates = ((_placed(payload, late, had, slices), n) for payload, n, late in payloads)
        new_state, delta = strategy(name)(kept, updates, momentum=momentum / (1 + age))
        delta = np.where(had, delta, np.float32(0))
    vector = base.copy()
    vector[shared] += delta
    if not np.isfinite(vector).all():
        raise ValueError("the new weights hold a NaN or an infinity")
    return dump_state(new_state), vector


def _summed(payloads: Iterator[tuple[bytes, int, int]], ring: Ring, state: State) -> tuple[codec.Sparse, int, State]:
    """Add updates in the ring; return their mean, its samples, and the ring's new state.

    Where there are more than the ring has room for, sums are made of so many at a time.
    """
    values = np.zeros(ring.places.size)
    larger = weight = 0.0
    gateways = samples = 0
    while group := list(islice(payloads, ring.gateways)):
        total = np.zeros(ring.size, np.uint32)
        for payload, n, _ in group:
            total += ringcode.unpack(payload, ring)
            samples, weight = samples + n, weight + ring.weight(n)
        sums, more = ringcode.decode(total, ring, len(group))
        values, larger, gateways = values + sums, larger + more * len(group), gateways + len(group)
    if not gateways:
        raise ValueError("no update to average")
    mean = ringcode.spread_out((values / weight).astype(np.float32), ring)
    return mean, samples, mask.after(state, ring, mean, larger / gateways, gateways, samples)


def _placed(
    payload: bytes, late: int, had: NDArray[np.bool_], slices: Mapping[float, Places]
) -> Vector | codec.Sparse | Part:
    """Decode one update, and mark which values (n,) its gateway has."""
    declared = codec.declared(payload)
    places = next((one for one in slices.values() if one.size == declared), None)
    if declared == had.size or places is None:
        had[:] = True
        return _discounted(codec.decode_sparse(payload, had.size, _coder), late)
    had[places] = True
    return Part(had.size, places, _discounted(codec.decode_sparse(payload, declared, _coder), late))


def _discounted(delta: Vector | codec.Sparse, late: int) -> Vector | codec.Sparse:
    if not late:
        return delta
    share = np.float32(1 / np.sqrt(1 + late))
    return delta._replace(values=delta.values * share) if isinstance(delta, codec.Sparse) else delta * share


def hasten() -> None:
    """Decode sparse updates by machine code from now on, where numba is installed; compiles for some seconds."""
    global _coder  # noqa: PLW0603 - one coder for the process, as one module would be
    if importlib.util.find_spec("numba") is not None:
        _coder = importlib.import_module("models.sparse_jit").MACHINE


def dump_state(state: State) -> bytes:
    """Write a strategy's state as an npz archive (no pickle); b"" when it is empty."""
    if not state:
        return b""
    out = io.BytesIO()
    # No allow_pickle, which NumPy 2.0 takes for one more array; arrays of numbers are never pickled.
    arrays: dict[str, Any] = dict(state)
    np.savez(out, **arrays)
    return out.getvalue()


def load_state(blob: bytes) -> State:
    """Inverse of `dump_state`."""
    if not blob:
        return {}
    with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
