"""Which drivers there are: one file beside this one each, found by its name."""

import importlib
from pathlib import Path
from types import ModuleType


def driver_names() -> list[str]:
    """Return the names that `driver = "…"` may take, sorted: a protocol is there when its file is.

    This file and those whose name begins with an underscore are no drivers.
    """
    stems = (path.stem for path in Path(__file__).parent.glob("*.py"))
    return sorted(stem for stem in stems if stem != "registry" and not stem.startswith("_"))


def load(name: str) -> ModuleType:
    """Import one driver's module: its class `Driver` and its `OPTIONS`, a dict from option name to type.

    KeyError if there is none of that name: the caller knows who wrote it, and where.
    """
    if name not in driver_names():
        raise KeyError(name)
    return importlib.import_module(f"edge.drivers.{name}")
