"""What a gateway says of itself in status.json, for `tundish edge status` and whoever else reads the file."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path

from edge.runner import Runner
from edge.tags import Driver, Health

log = logging.getLogger(__name__)

STATUS_FILE = "status.json"


def task_status(runner: Runner) -> dict[str, object]:
    """Return how one task is; plain JSON types."""
    plan, answer, live = runner.participant.plan, runner.participant.answer, runner.live
    return {
        "state": runner.participant.state.name.lower(),
        "round": plan.round if plan else None,
        "answer": f"{answer.verdict}: {answer.reason}".rstrip(": ") if answer else "",
        "model": runner.model.manifest.version if runner.model else None,
        "scoring_model": live.scorer.version if live and live.scorer else None,
        "scoring_kind": live.scorer.kind if live and live.scorer else None,
        "last_model": runner.kept,
        "problem": runner.problem,
        "last": live.last if live else {},
        **(asdict(live.stats) if live else {}),
    }


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
        (folder / "status.tmp").rename(folder / STATUS_FILE)
    except OSError as error:
        log.error("status.json can't be written: %s", error)
