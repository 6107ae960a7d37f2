"""Recorded data as a fleet of plants, and the processes that train on it. Workers alone reach torch.

The layout of a file: x_train, y_train, client_train, x_test, y_test, client_test; x (N, C, T) windows or (N, F) rows,
`client` the plant of each sample, and group_train (optional) the run, machine or segment that a sample belongs to.
"""

import os
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edge.dataset import Dataset
from edge.lab.plc import data_layout
from models.delta import Layout, Vector
from models.errors import UserError
from models.scale import Scale
from models.spec import Task, parse_task

ALL = -1
_RARE = 0.1


@dataclass(frozen=True)
class Site:
    """One plant: what it trains on, what it judges models by, its fixed test, and its own normalisation."""

    name: str
    train: Dataset
    holdout: Dataset
    test: Dataset
    scale: Scale


def complete_task(text: str, data: Path) -> str:
    """Fill in what a task file leaves to the data: kind, net, signals, window and target."""
    layout = data_layout(data)
    with np.load(data, allow_pickle=False) as z:
        low, high = float(z["y_train"].min()), float(z["y_train"].max())
    kind = "anomaly" if low == high else "regression" if layout.target == "Double" else "classification"
    head, tail = "", ""
    if "kind =" not in text:
        head += f'kind = "{kind}"\n'
    if "net =" not in text:
        head += f'net = "{"autoencoder" if kind == "anomaly" else "mlp" if layout.kind == "rows" else "tcn"}"\n'
    if "[window]" not in text:
        # A long waveform of one channel is normalised by itself: its level is the machine's, its shape the fault's.
        wave = "true" if layout.kind == "waveform" else "false"
        tail += f"\n[window]\nlength = {layout.length}\nwaveform = {wave}\n"
    if "[[signal]]" not in text:
        tail += "".join(f'\n[[signal]]\nname = "{name}"\nunit = ""\n' for name in layout.names)
    if "[target]" not in text and kind == "classification":
        names = ", ".join(f'"class-{i}"' for i in range(layout.classes))
        tail += f'\n[target]\nname = "target"\nclasses = [{names}]\n'
    if "[target]" not in text and kind == "regression":
        tail += f'\n[target]\nname = "target"\nrange = [{low}, {high}]\n'
    return head + text + tail


def load_sites(task: Task, data: Path) -> list[Site]:
    """Read every plant of a file; UserError if one has nothing to train on."""
    layout = data_layout(data)
    with np.load(data, allow_pickle=False) as z:
        found = {key: z[key] for key in z.files if z[key].dtype.kind in "fiub"}
    shape = (-1, layout.channels, layout.length)
    sites = []
    for i, name in enumerate(layout.clients):
        mine, tests = found["client_train"] == i, found["client_test"] == i
        x, y = found["x_train"][mine].reshape(shape).astype(np.float32), found["y_train"][mine].astype(np.float32)
        groups = found["group_train"][mine] if "group_train" in found else np.arange(len(x))
        held = _held(groups, task.training.holdout)
        train, holdout = _dataset(task, x[~held], y[~held]), _dataset(task, x[held], y[held])
        if not len(train):
            raise UserError(str(data), 0, "client_train", f"plant {name} has nothing to train on", "leave it out")
        test = Dataset(found["x_test"][tests].reshape(shape).astype(np.float32), found["y_test"][tests])
        sites.append(Site(name, train, holdout, test, Scale.learn(task, train.x, train.y)))
    return sites


def _held(groups: NDArray[Any], share: float) -> NDArray[np.bool_]:
    """Choose the holdout by whole groups, the same for every seed; a plant of few groups is parted by samples."""
    names = np.unique(groups)
    if len(names) < 2 / max(share, 1e-9):
        groups = np.arange(len(groups))
        names = np.unique(groups)
    chosen = [name for name in names if zlib.crc32(str(name).encode()) % 1000 < share * 1000]
    return np.isin(groups, chosen)


def _dataset(task: Task, x: NDArray[np.float32], y: NDArray[np.float32]) -> Dataset:
    return Dataset(x, None if task.kind == "anomaly" else y)


def metric_of(task: Task, sites: Iterable[Site]) -> str:
    """Name the metric: AUROC for anomaly, RMSE for numbers, AUPRC where one class of two is rare, else accuracy."""
    if task.kind == "anomaly":
        return "auroc"
    if task.kind == "regression":
        return "rmse"
    labels = np.concatenate([site.train.y for site in sites if site.train.y is not None])
    return "auprc" if task.outputs == 2 and labels.mean() < _RARE else "accuracy"  # noqa: PLR2004


class Workers:
    """A pool of processes that train; results do not depend on how many there are."""

    def __init__(self, text: str, layout: Layout, sites: list[Site]) -> None:
        task = parse_task(text)
        scaled = [
            (s.scale.inputs(task, s.train.x), None if s.train.y is None else s.scale.targets(task, s.train.y))
            for s in sites
        ]
        self._pool = ProcessPoolExecutor(
            len(os.sched_getaffinity(0)), get_context("spawn"), _prepare, (text, layout.to_wire(), scaled)
        )

    def fit(self, site: int, base: Vector, seed: int, steps: int | None = None) -> Future[tuple[Vector, int]]:
        """Train on one plant's data (ALL: everybody's) from `base`; gives the new weights and the steps taken."""
        return self._pool.submit(_fit, site, base, seed, steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


_WORK: dict[str, Any] = {}


def _prepare(text: str, wire: Any, scaled: list[tuple[NDArray[np.float32], NDArray[np.float32] | None]]) -> None:
    from models.fit import set_threads  # noqa: PLC0415 - in a worker

    set_threads(1)
    _WORK.update(task=parse_task(text), layout=Layout.from_wire(wire), scaled=scaled)


def _fit(site: int, base: Vector, seed: int, steps: int | None) -> tuple[Vector, int]:
    from models.fit import fit  # noqa: PLC0415 - in a worker

    scaled = _WORK["scaled"]
    if site == ALL:
        x = np.concatenate([one for one, _ in scaled])
        y = None if scaled[0][1] is None else np.concatenate([one for _, one in scaled])
    else:
        x, y = scaled[site]
    fitted = fit(_WORK["task"], _WORK["layout"], base, x, y, seed=seed, steps=steps)
    return fitted.vector, fitted.steps
