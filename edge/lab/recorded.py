"""A file of recorded data, read and checked in one place for all that play it or learn from it.

An .npz of x_train, y_train, client_train, x_test, y_test, client_test; x (N, C, T) windows, (N, F) rows or
(N, C, H, W) pictures, y (N,) numbers, or classes counted from 0, `client` (N,) the plant of each sample. Where they
are there: client_names, feature_names, and group_train, the run, machine or segment that a sample belongs to.
"""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.roster import MAX_GATEWAYS
from models.errors import UserError

_NEEDED = ("x_train", "y_train", "client_train", "x_test", "y_test", "client_test")
_OPTIONAL = ("client_names", "feature_names", "group_train")
_DIMENSIONS = (2, 3, 4)
# What NumPy and zipfile raise for a file that is another one, cut off, damaged, or holds Python objects.
_BROKEN = (OSError, ValueError, TypeError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)

Arrays = dict[str, NDArray[Any]]


def read_recorded(path: Path) -> Arrays:
    """Return the arrays of a file by name, the optional ones where it has them; UserError says what is wrong."""
    key, found = "", Arrays()
    try:
        with np.load(path, allow_pickle=False) as file:
            if missing := set(_NEEDED) - set(file.files):
                remedy = "give a .npz with x, y and client of train and test"
                raise UserError(str(path), 0, min(missing), "missing", remedy)
            for key in (*_NEEDED, *_OPTIONAL):
                if key in file.files:
                    found[key] = file[key]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(str(path), 0, "", "no such file", "check the path of --data") from error
    except _BROKEN as error:
        remedy = "give a whole .npz of numbers, with x_train, y_train, client_train"
        raise UserError(str(path), 0, key, "can't be read as a recorded set", remedy) from error
    for part in ("train", "test"):
        _check(path, found, part)
    return found


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
    elif x.shape[1:] != like[1:]:
        problem = f"is {x.shape}, and x_train is {like}"
    if problem:
        raise UserError(str(path), 0, key, problem, "give numbers: (N, C, T) windows, (N, F) rows, alike in both parts")


def _check_clients(path: Path, key: str, client: NDArray[Any], names: NDArray[Any] | None) -> None:
    if client.dtype.kind not in "iu":
        problem = f"plants of type {client.dtype}"
        raise UserError(str(path), 0, key, problem, "number the plants from 0; client_names may name them")
    most = MAX_GATEWAYS if names is None else names.size
    strange = client[(client < 0) | (client >= most)]
    if strange.size:
        problem = f"{strange.size} samples of plants that are none, such as {strange[0]}"
        remedy = f"number the plants from 0 to {most - 1}" + ("" if names is None else ", as client_names has them")
        raise UserError(str(path), 0, key, problem, remedy)
