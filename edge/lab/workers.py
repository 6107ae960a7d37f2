"""The processes that train in a simulation, on all cores. They alone reach torch."""

import os
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge.lab.sites import Site
from models.delta import Layout, Vector
from models.spec import parse_task

ALL = -1


class Workers:
    """A pool of processes that train; results do not depend on how many there are."""

    def __init__(self, text: str, layout: Layout, sites: list[Site]) -> None:
        task = parse_task(text)
        scaled = [
            (s.scale.inputs(task, s.train.x), None if s.train.y is None else s.scale.targets(task, s.train.y))
            for s in sites
        ]
        context = get_context("forkserver")
        context.set_forkserver_preload(["models.fit"])  # torch is imported once, whatever the workers
        arguments = text, layout.to_wire(), scaled
        self._pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, _prepare, arguments)

    def fit(self, site: int, base: Vector, seed: int, **much: float) -> Future[tuple[Vector, int]]:
        """Train on one plant's data (ALL: everybody's) from `base`; gives the new weights and the steps taken.

        `much` is `steps` or `epochs`, instead of the task's, `proximal` and `width`.
        """
        return self._pool.submit(_fit, site, base, seed, much)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


_WORK: dict[str, Any] = {}


def _prepare(text: str, wire: Any, scaled: list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]) -> None:
    from models.fit import set_threads  # noqa: PLC0415 - in a worker

    Thread(target=_end_with_parent, daemon=True).start()
    set_threads(1)
    _WORK.update(task=parse_task(text), layout=Layout.from_wire(wire), scaled=scaled)


def _end_with_parent() -> None:
    """A pool's worker waits for work for ever, also of a process that was killed."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _fit(site: int, base: Vector, seed: int, much: dict[str, Any]) -> tuple[Vector, int]:
    from models.fit import fit  # noqa: PLC0415 - in a worker

    scaled = _WORK["scaled"]
    if site == ALL:
        x = np.concatenate([one for one, _ in scaled])
        y = None if scaled[0][1] is None else np.concatenate([one for _, one in scaled])
    else:
        x, y = scaled[site]
    fitted = fit(_WORK["task"], _WORK["layout"], base, x, y, seed=seed, **much)
    return fitted.vector, fitted.steps
