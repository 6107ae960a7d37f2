"""Which part of a net a smaller gateway has: the first channels of each hidden layer, inputs and outputs whole.

Nested slices (HeteroFL: Diao et al. 2021, arXiv:2010.01264; FjORD: Horvath et al. 2021, arXiv:2102.13451): a narrow
slice lies within every wider one. A net of width w computes what the whole net computes whose other channels are all
zero (`models/nets/_narrow.py` says how its norms do), so whole weights that are zero outside the slice score alike.
Found from shapes alone, by gateway and aggregator alike. No torch.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.codec import Sparse
from models.delta import Layout, Vector
from models.spec import Task

WIDTHS = 0.25, 0.5, 0.75, 1.0
# Nets whose `build` takes a width; `tests/test_width.py` holds each to the slice that is found here.
NETS = "autoencoder", "cnn2d", "mlp", "tcn"
Places = NDArray[np.int64]


class Part(NamedTuple):
    """A vector of `size` values of which a narrow gateway has some: `values`, at `places`."""

    size: int
    places: Places
    values: Vector | Sparse


@lru_cache(maxsize=16)
def narrow(layout: Layout, width: float) -> tuple[Layout, Places]:
    """Return the layout of the net of `width`, and where its values lie in the whole vector (n,), rising.

    Arrays stand in the order of their layers, outputs first in their shapes: axis 0 is what a layer gives, axis 1 what
    it takes, others a kernel. What the first layer takes and the last gives stays whole. A layer that takes k times
    what the one before gives (a mean and a maximum of each channel) has k slices. ValueError for a width that is none.
    """
    if width not in WIDTHS:
        raise ValueError(f"width is one of {', '.join(f'{w:g}' for w in WIDTHS)}")
    if width == 1:
        return layout, np.arange(layout.size)  # whatever the net
    weights = [i for i, shape in enumerate(layout.shapes) if len(shape) > 1]
    first, last = (weights[0], weights[-1]) if weights else (0, 0)
    shapes, places, given = [], [], 0
    for i, shape in enumerate(layout.shapes):
        axes = [np.arange(n) for n in shape]
        if i < last and axes:
            axes[0] = axes[0][: math.ceil(width * shape[0])]
        if len(shape) > 1 and i > first:
            kept = math.ceil(width * given)
            axes[1] = (np.arange(0, shape[1], given)[:, None] + np.arange(kept)).ravel()
        inside = np.arange(layout.offsets[i], layout.offsets[i + 1]).reshape(shape)[np.ix_(*axes)]
        shapes.append(inside.shape)
        places.append(inside.ravel())
        given = shape[0] if shape else given
    found = np.concatenate(places)
    found.setflags(write=False)
    return Layout(layout.names, tuple(shapes), layout.integers), found


def widen(layout: Layout, width: float, vector: Vector) -> Vector:
    """Lay a narrow vector into a whole one (layout.size,) of zeros: the weights that score as the narrow net does."""
    whole = np.zeros(layout.size, np.float32)
    whole[narrow(layout, width)[1]] = vector
    return whole


def cut(layout: Layout, width: float, whole: Vector) -> Vector:
    """Return whole weights (layout.size,) with zeros outside the part of `width`: what such a gateway holds of them."""
    return whole if width == 1 else widen(layout, width, whole[narrow(layout, width)[1]])


def slices(task: Task, layout: Layout) -> dict[float, Places]:
    """Where a narrow gateway's shared values lie among all that are shared, by width; empty for a net of one width."""
    if task.net not in NETS:
        return {}
    shared = layout.mask(task.personal)
    number = np.cumsum(shared) - 1
    inside = {width: narrow(layout, width)[1] for width in WIDTHS[:-1]}
    return {width: number[places[shared[places]]] for width, places in inside.items()}


def unfit(task: Task, width: float) -> str:
    """Say why a gateway of this width can't take part in a task; empty if it can."""
    if width == 1:
        return ""
    if task.net not in NETS:
        return f"net {task.net} has no narrow form, so width {width:g} can't train it"
    if task.round.codec == "ring":
        return f"a ring adds updates of one size, so width {width:g} can't take part"
    return ""
