"""What the aggregator last said of itself, in a file of its state folder."""

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from broker.database import LOCK_FILE

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"


def is_running(state: Path) -> bool:
    """Whether an aggregator, or a gateway, holds this folder now: its lock goes with its process, however that ends.

    PermissionError where this user may not know.
    """
    try:
        with (state / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        raise
    except OSError:
        pass  # there is none
    return False


def read_status(state: Path) -> dict[str, Any] | None:
    """What the aggregator last said of itself; None where it never said anything. OSError."""
    try:
        said: dict[str, Any] = json.loads((state / STATUS_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return said


def write_status(state: Path, status: Mapping[str, Any]) -> None:
    """Replace the file, so that a reader sees the old one or the new one; what can't be written is logged."""
    path = state / STATUS_FILE
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(status, indent=1), encoding="utf-8")
        os.replace(part, path)  # noqa: PTH105 - says that it is atomic
    except OSError as error:
        log.warning("no status file: %s: %s", path, error.strerror)
