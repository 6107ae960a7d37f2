"""Recorded data as a fleet of plants, and the processes that train on it. Workers alone reach torch.

The layout of a file is that of `edge.lab.recorded`.
"""

import os
import tomllib
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
from edge.lab.plc import DataLayout, data_layout
from edge.lab.recorded import read_recorded
from models.alarm import WEEK_S
from models.delta import Layout, Vector
from models.errors import UserError
from models.scale import Scale
from models.spec import Task, parse_task

ALL = -1
_RARE = 0.1
# Windows of one stretch of time resemble each other, so those without a group are held out by stretches; rows are not.
_STRETCH = 20
_NETS = {"rows": "mlp", "series": "tcn", "waveform": "tcn", "picture": "cnn2d"}


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
    layout = data_layout(data, pictures=True)
    y = read_recorded(data)["y_train"]
    y = y[np.isfinite(y)]
    low, high = (float(y.min()), float(y.max())) if y.size else (0.0, 0.0)
    kind = "anomaly" if low == high else "regression" if layout.target == "Double" else "classification"
    head, tail, said = "", "", _said(text)
    kind = said.get("kind", kind)
    if "kind" not in said:
        head += f'kind = "{kind}"\n'
    if "net" not in said:
        head += f'net = "{"autoencoder" if kind == "anomaly" else _NETS[layout.kind]}"\n'
    if "window" not in said:
        # A long waveform of one channel is normalised by itself: its level is the machine's, its shape the fault's.
        # So is a picture: its level is the lamp's.
        wave = "true" if layout.kind in {"waveform", "picture"} else "false"
        tail += f"\n[window]\nlength = {layout.length}\nwaveform = {wave}\n"
    if "signal" not in said:
        tail += "".join(f'\n[[signal]]\nname = "{name}"\nunit = ""\n' for name in layout.names)
    if "target" not in said and kind == "classification":
        names = ", ".join(f'"class-{i}"' for i in range(max(layout.classes, 2)))
        tail += f'\n[target]\nname = "target"\nclasses = [{names}]\n'
    if "target" not in said and kind == "regression":
        span = f"range = [{low}, {high}]\n" if low < high else ""
        tail += f'\n[target]\nname = "target"\n{span}'
    return head + text + tail


def _said(text: str) -> dict[str, Any]:
    """The keys that a task file has; what is wrong with it is said when it is parsed whole."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def load_sites(task: Task, data: Path) -> list[Site]:
    """Read every plant of a file that has something to train on; UserError if none has, or labels are no classes."""
    layout = data_layout(data, pictures=True)
    found = read_recorded(data)
    groups = np.unique(found["group_train"], return_inverse=True)[1] if "group_train" in found else None
    x_train, y_train = _windows(found["x_train"], layout), found["y_train"].astype(np.float32)
    x_test, y_test = _windows(found["x_test"], layout), found["y_test"].astype(np.float32)
    outputs = task.outputs if task.kind == "classification" else None
    for part, labels in (("y_train", y_train), ("y_test", y_test)):
        if outputs and not set(np.unique(labels)) <= set(range(outputs)):
            problem = f"labels that are none of the {outputs} classes"
            raise UserError(str(data), 0, part, problem, "number the classes from 0")
    sites = []
    for i, name in enumerate(layout.clients):
        mine = (found["client_train"] == i) & np.isfinite(y_train)
        tests = (found["client_test"] == i) & np.isfinite(y_test)
        x, y = x_train[mine], y_train[mine]
        if not len(x):
            continue
        held = carve(y, None if groups is None else groups[mine], task)
        train, holdout = _dataset(task, x[~held], y[~held]), _dataset(task, x[held], y[held])
        test = Dataset(x_test[tests], y_test[tests])
        sites.append(Site(name, train, holdout, test, Scale.learn(task, train.x, train.y)))
    if not sites:
        raise UserError(str(data), 0, "client_train", "no plant has anything to train on", "number the plants from 0")
    return sites


def _windows(x: NDArray[Any], layout: DataLayout) -> NDArray[np.float32]:
    """Make float32 windows (N, C, T) with NaN where a value is none; pictures that are not square get a margin."""
    if x.ndim == 4:  # noqa: PLR2004 - (N, C, H, W)
        side = max(x.shape[2:])
        margins = [(0, side - n) for n in x.shape[2:]]
        x = np.pad(x, [(0, 0), (0, 0), *margins], mode="edge")
    windows = x.reshape(len(x), layout.channels, layout.length).astype(np.float32)
    return np.where(np.isfinite(windows), windows, np.float32(np.nan))


def carve(y: NDArray[np.float32], groups: NDArray[Any] | None, task: Task) -> NDArray[np.bool_]:
    """Choose the holdout (N,) of a plant: whole groups, or stretches of time where there are none; of every class.

    Of each class it takes no more than its share, and never the last sample, so that a rare class is learnt rather
    than measured. The same for every seed. A plant whose groups are too few or too large is parted by stretches.
    """
    share = task.training.holdout
    classes = y.astype(np.int64) if task.kind == "classification" else np.zeros(len(y), np.int64)
    if groups is not None:
        held = _take(np.unique(groups, return_inverse=True)[1], classes, share)
        if held.sum() >= share * len(y) / 2:
            return held
    stretches, count = np.empty(len(y), np.int64), 0
    for label in np.unique(classes):
        rows = np.flatnonzero(classes == label)
        size = _STRETCH if task.window.length > 1 else 1
        pieces = -(-len(rows) // max(1, min(size, round(share * len(rows)))))
        stretches[rows] = count + np.arange(len(rows)) * pieces // len(rows)
        count += pieces
    return _take(stretches, classes, share)


def _take(groups: NDArray[np.int64], classes: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Take groups (numbered from 0) in an order of their own until each class has given its share."""
    held = np.zeros(len(groups), np.bool_)
    left = {int(c): min(round(share * n), n - 1) for c, n in zip(*np.unique(classes, return_counts=True), strict=True)}
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    for number in sorted(range(len(members)), key=lambda n: zlib.crc32(b"%d" % n)):
        gives = zip(*np.unique(classes[members[number]], return_counts=True), strict=True)
        counts = {int(c): int(n) for c, n in gives}
        if all(n <= left[c] for c, n in counts.items()):
            held[members[number]] = True
            left |= {c: left[c] - n for c, n in counts.items()}
    return held


def _dataset(task: Task, x: NDArray[np.float32], y: NDArray[np.float32]) -> Dataset:
    often = WEEK_S * task.window.rate_hz / task.window.stride
    return Dataset(x, None if task.kind == "anomaly" else y, often)


def metric_of(task: Task, sites: Iterable[Site]) -> str:
    """Name the metric: AUROC for anomaly, RMSE for numbers; of two classes AUPRC where one is rare, AUROC of pictures.

    For all other classes it is accuracy.
    """
    if task.kind == "anomaly":
        return "auroc"
    if task.kind == "regression":
        return "rmse"
    labels = np.concatenate([site.train.y for site in sites if site.train.y is not None])
    if task.outputs == 2 and labels.mean() < _RARE:  # noqa: PLR2004
        return "auprc"
    return "auroc" if task.outputs == 2 and task.net == "cnn2d" else "accuracy"  # noqa: PLR2004


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

    set_threads(1)
    _WORK.update(task=parse_task(text), layout=Layout.from_wire(wire), scaled=scaled)


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
