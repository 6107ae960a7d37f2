"""Releases while the aggregator runs: what the online key signs stays fresh, what `broker release` made goes out."""

import json
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from broker.channels import CHANNELS
from broker.config import ReleaseTable
from broker.downlink import Downlink, Offer
from broker.job import Job
from broker.journal import Journal, ReleaseRow
from broker.messages import WEIGHTS
from broker.publish import put_model
from models.errors import UserError

log = logging.getLogger(__name__)

# Releases of a channel whose weights stay retained: who fetches the one before may end that.
_RETAINED = 2
_LOOK_MS = 3_600_000


def releases_of(journal: Journal, downlink: Downlink, table: ReleaseTable | None) -> "Releasing | None":
    """Releases where federation.toml has `[release]`; UserError where it has no more."""
    if table is not None:
        return Releasing(journal, downlink, table)
    metadata = journal.metadata()
    if "timestamp" in metadata:
        problem = "missing, but models were released, and gateways score with these alone"
        try:
            remedy = f"put it back as it was: {_before(metadata)}"
        except (KeyError, TypeError, ValueError):
            remedy = f"put it back; what it was is damaged in {journal.path}"
        raise UserError("federation.toml", 0, "release", problem, remedy)
    return None


def _before(metadata: Mapping[str, bytes]) -> str:
    """The lines of `[release]` that made the metadata."""
    targets = json.loads(metadata["targets"])["signed"]["delegations"]
    canary, stable = ({role["name"]: role for role in targets["roles"]}[name] for name in ("canary", "stable"))
    keys = [targets["keys"][one]["keyval"]["public"] for one in stable["keyids"]]
    paths = [glob.removeprefix("canary/").removesuffix("/*") for glob in canary["paths"]]
    table = {"keys": sorted(keys), "threshold": stable["threshold"], "canary": paths}
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items())


class Releasing:
    """The releases of a federation that has `[release]`; `put` after each connection, `refresh` now and then."""

    def __init__(self, journal: Journal, downlink: Downlink, table: ReleaseTable) -> None:
        self._journal, self._downlink, self._table = journal, downlink, table
        self._looked_ms = 0
        self._said: tuple[dict[str, bytes], dict[str, list[ReleaseRow]]] = {}, {}

    def _stored(self, jobs: Iterable[str]) -> tuple[dict[str, bytes], dict[str, list[ReleaseRow]]]:
        return self._journal.metadata(), {name: self._journal.releases(name) for name in jobs}

    def refresh(self, jobs: Mapping[str, Job]) -> None:
        """Publish what another process has released, or signed; nothing where it wrote something else."""
        if self._stored(jobs) != self._said:
            self.put(jobs)

    def put(self, jobs: Mapping[str, Job]) -> None:
        """Publish metadata and models, retained."""
        self._said = files, released = self._stored(jobs)
        if "timestamp" not in files:
            return  # nobody has released anything yet
        for name, job in jobs.items():
            rows = released[name]
            for channel in CHANNELS:
                version = next((row.version for row in rows if row.channel == channel), None)
                model = None if version is None else self._journal.model(name, version)
                if model is not None:
                    self._downlink.put_release(name, job.row, model, channel)
            put_model(self._downlink, self._journal, job, new=True, retained=self.retained(name))  # now `released`
            self._clear(job)
        self._downlink.put_metadata(files)

    def _clear(self, job: Job) -> None:
        """Clear the weights of earlier releases, each time anew: a broker may come back with those that it had."""
        name, newest = job.task.name, job.model.version
        kept = self.retained(name)
        for version in (newest, newest - 1):
            if offer := Offer.of(self._journal, name, version):
                kept |= offer.objects().keys()
        sizes = self._journal.released_bytes(name)
        gone = {(version, WEIGHTS): size for version, size in sizes.items() if (version, WEIGHTS) not in kept}
        self._downlink.clear(name, gone)

    def status(self, task: str) -> dict[str, dict[str, Any]]:
        """Channel -> release and version that it has, and whether its gateways go by it: by the higher release."""
        newest = {row.channel: row for row in reversed(self._journal.releases(task))}
        return {
            channel: {
                "release": row.release,
                "version": row.version,
                "in_force": channel == "stable" or row.release == max(one.release for one in newest.values()),
            }
            for channel, row in newest.items()
        }

    def retained(self, task: str) -> set[tuple[int, str]]:
        """Which objects of a task's models must stay, as (version, name)."""
        rows = self._journal.releases(task)
        newest = [[row for row in rows if row.channel == channel][:_RETAINED] for channel in CHANNELS]
        return {(row.version, WEIGHTS) for some in newest for row in some}

    def freshen(self, jobs: Mapping[str, Job], now_ms: int) -> None:
        """Sign anew what ages, once an hour; outside of a transaction."""
        if now_ms - self._looked_ms < _LOOK_MS or "timestamp" not in self._journal.metadata():
            return
        from broker.release import Repository  # noqa: PLC0415 - TUF is for federations that release

        self._looked_ms = now_ms
        with self._journal.transaction():  # the key too is read in it: another process may replace it
            changed = Repository(self._journal, self._table, now_ms).freshen()
        if changed:
            log.info("metadata of releases signed anew")
            self.put(jobs)
