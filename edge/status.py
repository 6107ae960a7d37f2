"""What a gateway says of itself in status.json: written by the agent, read by whoever asks how it is."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from broker.database import forbidden
from edge.tags import Driver, Health

log = logging.getLogger(__name__)

_FILE = "status.json"
_FRESH_S = 10.0  # a status that is older is of a gateway that ended


def sources_status(drivers: dict[str, Driver], tags: dict[str, dict[str, dict[str, object]]]) -> dict[str, object]:
    """Return how the sources and their tags are; plain JSON types."""
    return {name: asdict(driver.health) | {"tags": tags.get(name, {})} for name, driver in list(drivers.items())}


def health_message(health: Health, tags: dict[str, dict[str, object]]) -> bytes:
    """Make the `_health` message of a source with its tags."""
    return json.dumps(asdict(health) | {"timestamp_ms": int(time.time() * 1000), "tags": tags}).encode()


def write_status(folder: Path, snapshot: dict[str, object]) -> None:
    """Replace status.json in one rename, so that a reader never sees half of it."""
    text = json.dumps(snapshot, default=str)
    try:
        (folder / "status.tmp").write_text(text)
        (folder / "status.tmp").rename(folder / _FILE)
    except OSError as error:
        log.error("status.json can't be written: %s", error)


def read_status(folder: Path) -> dict[str, Any] | None:
    """What the gateway with its state in a folder said of itself last; None if it never ran.

    LocalError where this user may not read that.
    """
    try:
        status: dict[str, Any] = json.loads((folder / _FILE).read_text())
    except PermissionError as error:
        raise forbidden(folder, error) from error
    except (OSError, ValueError):
        return None
    return status


def is_alive(status: dict[str, Any]) -> bool:
    """Whether that was said by a gateway that still runs."""
    return bool(status["running"]) and time.time() - status["time_ms"] / 1000 < _FRESH_S
