"""The drivers of a gateway, each running in a job of its own until its source is stopped."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from edge.drivers import registry
from edge.tags import Driver, Health, Sink, Source

log = logging.getLogger(__name__)

_RESTART_S = 5.0


class Sources:
    """Who reads what. `drivers` holds the running driver of each source, by name."""

    def __init__(self, pki: Path, sink: Sink) -> None:
        self.drivers: dict[str, Driver] = {}
        self._pki, self._sink = str(pki), sink
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._counted: dict[str, Health] = {}

    def start(self, source: Source) -> None:
        """Read a source from now on."""
        source = msgspec.structs.replace(source, pki=self._pki)
        self._jobs[source.name] = asyncio.create_task(self._drive(source))

    async def stop(self, names: Iterable[str]) -> dict[str, Health]:
        """Read some sources no more; returns what is left to say of each, when their connections are closed.

        What was counted of them goes on, should they be started again: what was lost before a reload stays lost.
        """
        running = [name for name in names if name in self._jobs]
        health = {name: self.drivers[name].health for name in running if name in self.drivers}
        jobs = [self._jobs.pop(name) for name in running]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, return_exceptions=True)
        for one in health.values():
            one.error = "the gateway reads it no more"
        self._counted |= health
        return health

    async def _drive(self, source: Source) -> None:
        """Keep one driver running; one that ends by a mistake of ours is logged whole and started again."""
        try:
            while True:
                driver: Driver = registry.load(source.driver).Driver(source, self._sink)
                self.drivers[source.name] = driver
                if before := self._counted.pop(source.name, None):
                    driver.health.go_on(before)
                work = asyncio.create_task(driver.run())
                try:
                    await asyncio.wait([work])
                finally:
                    work.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([work])
                error = None if work.cancelled() else work.exception()
                self._counted[source.name] = driver.health
                text = "driver of %s ended, which it should not; it is started again"
                log.critical(text, source.name, exc_info=error)
                await asyncio.sleep(_RESTART_S)
        finally:
            self.drivers.pop(source.name, None)
