"""What a gateway says of itself in status.json: written by the agent, read by whoever asks how it is."""

import json
import logging
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from broker.database import forbidden
from broker.status import is_running
from edge.tags import Driver, Health

log = logging.getLogger(__name__)

_FILE = "status.json"


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


def taken_out(status: dict[str, Any]) -> str:
    """Say since when the federation's roster is without this gateway, which was in it; empty if it is not."""
    out_ms = (status.get("roster") or {}).get("out_ms")
    if not out_ms:
        return ""
    since = f"{datetime.fromtimestamp(out_ms / 1000, UTC):%Y-%m-%d %H:%M:%S UTC}"
    return f"no more in the federation's roster since that of {since}: taken out, or unknown to an older state"


def is_alive(folder: Path) -> bool:
    """Whether a gateway holds that folder now: its lock goes with its process. LocalError where this user can't see."""
    try:
        return is_running(folder)
    except PermissionError as error:
        raise forbidden(folder, error) from error
