"""Recorded data as the plants of a fleet. The layout of a file is that of `edge.lab.recorded`."""

import tomllib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge.dataset import Dataset
from edge.lab.plc import DataLayout, data_layout
from edge.lab.recorded import Arrays, read_recorded
from models.alarm import WEEK_S
from models.errors import UserError
from models.scale import Scale
from models.spec import Task
from models.tomlfile import TomlFile

_RARE = 0.1
# Windows of one stretch of time resemble each other, so those without a group are held out by stretches; rows are not.
_STRETCH = 20
# Of a signal with fewer values than this share, a person should hear.
_FEW = 0.5
# So many names at the most in a remark.
_NAMED = 5
# Labels that count from 0 to less than this are likely to be classes.
_CLASSES = 20
_NO_LABELS = np.empty(0, np.float32)
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
        names = ", ".join(f'"class-{i}"' for i in range(max(layout.classes, int(high) + 1, 2)))
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


def check_fit(task: Task, file: TomlFile, data: Path) -> None:
    """Refuse a task whose signals or window are not the data's; UserError with the line of the task's file."""
    layout = data_layout(data, pictures=True)
    if len(_columns(task, layout, read_recorded(data))) != task.channels:
        problem = f"{task.channels} signals, and the data has {layout.channels} channels"
        raise file.error(["signal", 0], problem, f"leave [[signal]] out, or name of these: {', '.join(layout.names)}")
    if task.window.length != layout.length:
        problem = f"{task.window.length} steps, and the data has {layout.length}"
        raise file.error(["window", "length"], problem, f"write {layout.length}, or leave [window] out")


def _columns(task: Task, layout: DataLayout, found: Arrays) -> list[int]:
    """Return the channel of each signal: by name where the data has them all, else all channels in their order."""
    places = {name: i for i, name in enumerate(layout.names)}
    given = found.get("feature_names")
    if given is not None and given.shape == (layout.channels,):
        places |= {str(name): i for i, name in enumerate(given)}
    mine = [places.get(signal.name, layout.channels) for signal in task.signal]
    return mine if max(mine) < layout.channels else list(range(layout.channels))


def load_sites(task: Task, data: Path) -> list[Site]:
    """Read every plant of a file that has something to train on; UserError if none has, or labels are no classes."""
    layout = data_layout(data, pictures=True)
    found = read_recorded(data)
    groups = np.unique(found["group_train"], return_inverse=True)[1] if "group_train" in found else None
    channels = _columns(task, layout, found)
    x_train, y_train = _windows(found["x_train"], layout)[:, channels], found["y_train"].astype(np.float32)
    x_test, y_test = _windows(found["x_test"], layout)[:, channels], found["y_test"].astype(np.float32)
    _check_labels(task, data, found)
    # What an anomaly's net learns needs no label.
    known = np.isfinite(y_train) | (task.kind == "anomaly")
    sites = []
    for i, name in enumerate(layout.clients):
        mine = (found["client_train"] == i) & known
        tests = (found["client_test"] == i) & np.isfinite(y_test)
        x, y = x_train[mine], y_train[mine]
        if not len(x):
            continue
        held = carve(y, None if groups is None else groups[mine], task)
        train, holdout = _dataset(task, x[~held], y[~held]), _dataset(task, x[held], y[held])
        test = Dataset(x_test[tests], y_test[tests])
        sites.append(Site(name, train, holdout, test, Scale.learn(task, train.x, train.y)))
    if not sites:
        raise UserError(str(data), 0, "y_train", "no sample has a label, only NaN", 'give some, or kind = "anomaly"')
    return sites


def _check_labels(task: Task, data: Path, found: Arrays) -> None:
    for part in ("y_train", "y_test"):
        labels = np.unique(found[part].astype(np.float64))
        labels = labels[np.isfinite(labels)]
        strange = [y for y in labels if not (0 <= y < task.outputs and y == int(y))]
        if task.kind == "classification" and strange:
            problem = f"label {strange[0]:g} is none of the {task.outputs} classes"
            raise UserError(str(data), 0, part, problem, f"number the classes from 0 to {task.outputs - 1}")


def remarks(task: Task, data: Path, sites: list[Site]) -> Iterator[str]:
    """Say what a person should know of the data before believing any figure; a line each."""
    layout, found = data_layout(data, pictures=True), read_recorded(data)
    given = found.get("feature_names")
    if given is not None and given.shape != (layout.channels,):
        yield f"feature_names has {given.size} names for {layout.channels} channels: they are not used"
    places = {*layout.names, *map(str, () if given is None else given)}
    if strange := [signal.name for signal in task.signal if signal.name not in places]:
        yield f"signals are the data's channels in their order: it has none called {strange[0]!r}"
    # Plants may be numbered with gaps; one that has a name was meant to be there.
    meant = {*found["client_train"].tolist(), *found["client_test"].tolist()}
    named = "client_names" in found
    yield from _of_plants([name for i, name in enumerate(layout.clients) if named or i in meant], sites)
    yield from _of_samples(task, sites)
    if task.kind != "anomaly" and (unknown := float(np.mean(~np.isfinite(found["y_train"].astype(np.float64))))):
        yield f"{unknown:.1%} of the samples to train on have no label, and are left out"
    labels = np.unique(np.concatenate([site.train.y for site in sites if site.train.y is not None] or [_NO_LABELS]))
    if task.kind == "regression" and 1 < labels.size <= _CLASSES and np.array_equal(labels, np.arange(labels.size)):
        text = f"labels are whole numbers, 0 to {labels.size - 1}, and estimated as numbers"
        yield f'{text}; of classes, write kind = "classification" into the task'
    yield from _of_signals(task, sites)
    if task.kind == "classification" and task.target:
        told = {int(y) for site in sites if site.train.y is not None for y in np.unique(site.train.y)}
        if none := [name for i, name in enumerate(task.target.classes) if i not in told]:
            first = "; classes are numbered from 0" if 0 not in told else ""
            yield f"no plant has a sample to train on of: {', '.join(none)}{first}"


def _of_plants(clients: Iterable[str], sites: list[Site]) -> Iterator[str]:
    if len(sites) == 1:
        yield "one plant: there is nobody to learn with"
    if absent := [name for name in clients if name not in {site.name for site in sites}]:
        yield f"left out, without a sample to train on: {', '.join(absent)}"
    if untested := [site.name for site in sites if not len(site.test)]:
        yield f"without a test, and so in no mean: {', '.join(untested)}"
    if blind := [site.name for site in sites if not len(site.holdout)]:
        yield f"with too few samples for a holdout, and so without a choice: {', '.join(blind)}"


def _of_samples(task: Task, sites: list[Site]) -> Iterator[str]:
    """Say of which plants the figures rest on few samples, or on those of one class."""
    least = task.training.min_windows
    if few := [f"{site.name} ({len(site.train)})" for site in sites if len(site.train) < least]:
        yield f"fewer than min_windows = {least} samples to train on, for which a gateway would wait: {_listed(few)}"
    if task.kind != "classification":
        return
    for what, parts in (
        ("trains on", [(site.name, site.train) for site in sites]),
        ("is tested on", [(site.name, site.test) for site in sites]),
    ):
        if one := [name for name, part in parts if part.y is not None and np.unique(part.y).size == 1]:
            yield f"{what} one class alone, which is easily right: {_listed(one)}"


def _of_signals(task: Task, sites: list[Site]) -> Iterator[str]:
    """Say which signals have few values, and which none, or always the same one, at a plant where others' move."""
    values = [np.moveaxis(site.train.x, 1, 0).reshape(len(task.signal), -1) for site in sites]
    seen = np.array([np.isfinite(one).mean(1) for one in values])  # (plants, signals)
    stuck = np.array(
        [[row[np.isfinite(row)].size > 0 and np.ptp(row[np.isfinite(row)]) == 0 for row in v] for v in values]
    )
    whole = np.average(seen, axis=0, weights=[one.shape[1] for one in values])
    for k, signal in enumerate(task.signal):
        if whole[k] < _FEW:
            yield f"signal {signal.name}: {whole[k]:.0%} of its values are numbers"
    has = seen > 0
    odd = stuck & (stuck.sum(0) < _FEW * has.sum(0))
    for which, text in ((~has & has.any(0), "without a value"), (odd, "always the same, though not at most others")):
        if places := [f"{task.signal[k].name} at {sites[i].name}" for i, k in np.argwhere(which)]:
            yield f"{text}: {_listed(places)}"


def _listed(names: list[str]) -> str:
    """Write the first few of many."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


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
