"""A file of recorded data, read and checked in one place for all that play it or learn from it.

An .npz of x_train, y_train, client_train, x_test, y_test, client_test; x (N, C, T) windows, (N, F) rows or
(N, C, H, W) pictures, y (N,) numbers, or classes counted from 0, NaN where nobody knows, `client` (N,) the plant of
each sample. Where they are there: client_names, feature_names (C or F of them), and group_train, the run, machine or
segment that a sample belongs to.
"""

import os
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.roster import MAX_GATEWAYS
from models.errors import UserError

_NEEDED = ("x_train", "y_train", "client_train", "x_test", "y_test", "client_test")
_OPTIONAL = ("client_names", "feature_names", "group_train")
_DIMENSIONS = (2, 3, 4)
_SHAPES = "give numbers: (N, C, T) windows, (N, F) rows or (N, C, H, W) pictures, alike in both parts"
# What NumPy and zipfile raise for a file that is another one, cut off, damaged, or holds Python objects.
_BROKEN = (OSError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)

# Of a machine's memory, what a file may take; the windows made of it take as much again.
_MEMORY = 0.25

Arrays = dict[str, NDArray[Any]]


def read_recorded(path: Path) -> Arrays:
    """Return the arrays of a file by name, the optional ones where it has them; UserError says what is wrong."""
    key, found = "", Arrays()
    if path.is_dir():
        raise UserError(str(path), 0, "", "is a folder", "name a .npz file in it")
    try:
        _check_size(path)
        with np.load(path, allow_pickle=False) as file:
            if missing := set(_NEEDED) - set(file.files):
                remedy = "give a .npz with x, y and client of train and test"
                raise UserError(str(path), 0, min(missing), "missing", remedy)
            for key in (*_NEEDED, *_OPTIONAL):
                if key in file.files:
                    found[key] = file[key]
    except FileNotFoundError as error:
        raise UserError(str(path), 0, "", "no such file", "check the path of --data") from error
    except _BROKEN as error:
        remedy = "give a whole .npz of numbers, with x_train, y_train, client_train"
        raise UserError(str(path), 0, key, "can't be read as a recorded set", remedy) from error
    for part in ("train", "test"):
        _check(path, found, part)
    _check_names(path, found)
    return found


def _check_size(path: Path) -> None:
    """Refuse what would fill this machine's memory, before any of it is unpacked."""
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory * _MEMORY:
        problem = f"{size / 1e9:,.1f} GB unpacked, and this machine has {memory / 1e9:,.1f} GB of memory"
        raise UserError(str(path), 0, "", problem, "give fewer samples")


def _check_names(path: Path, found: Arrays) -> None:
    if "client_names" in found:
        name, many = Counter(map(str, found["client_names"].ravel())).most_common(1)[0]
        if many > 1:
            raise UserError(str(path), 0, "client_names", f"{name!r} is named {many} times", "name each plant once")


def _check(path: Path, found: Arrays, part: str) -> None:
    x, y, client = (found[f"{what}_{part}"] for what in ("x", "y", "client"))
    _check_windows(path, f"x_{part}", x, found["x_train"].shape)
    rows = [(f"y_{part}", y), (f"client_{part}", client)]
    rows += [("group_train", found["group_train"])] if part == "train" and "group_train" in found else []
    for key, one in rows:
        if one.shape != (len(x),):
            remedy = "give one value for each sample"
            raise UserError(str(path), 0, key, f"is {one.shape}, and x_{part} has {len(x)} samples", remedy)
    if y.dtype.kind not in "fiub":
        problem, remedy = f"labels of type {y.dtype}", "number the classes from 0, or give what is measured"
        raise UserError(str(path), 0, f"y_{part}", problem, remedy)
    _check_clients(path, f"client_{part}", client, found.get("client_names"))


def _check_windows(path: Path, key: str, x: NDArray[Any], like: tuple[int, ...]) -> None:
    problem = ""
    if x.dtype.kind not in "fiub":
        problem = f"values of type {x.dtype}"
    elif x.ndim not in _DIMENSIONS:
        problem = f"is {x.shape}"
    elif not x.size:
        problem = f"is {x.shape}: nothing is in it"
    elif x.dtype.kind == "f" and not np.isfinite(x).any():
        problem = "holds no number, only NaN"
    elif x.shape[1:] != like[1:]:
        problem = f"is {x.shape}, and x_train is {like}"
    if problem:
        raise UserError(str(path), 0, key, problem, _SHAPES)


def _check_clients(path: Path, key: str, client: NDArray[Any], names: NDArray[Any] | None) -> None:
    if client.dtype.kind not in "iu":
        problem = f"plants of type {client.dtype}"
        raise UserError(str(path), 0, key, problem, "number the plants from 0; client_names may name them")
    most = MAX_GATEWAYS if names is None else names.size
    strange = client[(client < 0) | (client >= most)]
    if not strange.size:
        return
    if names is not None and strange.min() >= 0:
        problem, remedy = f"names {most} plants, and {key} has plant {strange.max()}", "name every plant, from 0 on"
        raise UserError(str(path), 0, "client_names", problem, remedy)
    problem = f"{strange.size} samples of plants that are none, such as {strange[0]}"
    raise UserError(str(path), 0, key, problem, f"number the plants from 0 to {most - 1}")
