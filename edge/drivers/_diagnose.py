"""What the drivers' `diagnose` share: a driver runs for a while as in the gateway, and tells how it went."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from broker.diagnose import Step, fail, note, ok
from edge.drivers import registry
from edge.tags import Driver, Quality, Sample, Source

CONNECT_S = 15.0
VALUES_S = 10.0
_SHOWN = 20
_SKEW_S = 2.0


async def listen(source: Source, *, patient: bool = False) -> AsyncIterator[Step]:
    """Run the source's driver until every tag has said something, ten seconds at most.

    `patient` is for sources that send when they like: there a tag that is silent is no failure.
    """
    latest: dict[str, Sample] = {}

    def take(samples: list[Sample], /) -> None:
        # The first good value of a tag stays.
        latest.update((s.tag, s) for s in samples if s.tag not in latest or latest[s.tag].quality is not Quality.GOOD)

    driver: Driver = registry.load(source.driver).Driver(source, take)
    health = driver.health
    work = asyncio.create_task(driver.run())
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                while not health.connects and not health.error:  # noqa: ASYNC110 - a driver sets no event
                    await asyncio.sleep(0.05)
        if not health.connects:
            yield fail("connect", health.error or f"no answer within {CONNECT_S:g} s; check that it is on")
            return
        yield ok("connect", f"reads from {source.url}")
        begin = time.monotonic()
        while time.monotonic() - begin < VALUES_S and not _settled(source, driver, latest):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        for step in _findings(source, driver, latest, patient=patient):
            yield step
    finally:
        work.cancel()
        await asyncio.wait([work])


def _settled(source: Source, driver: Driver, latest: dict[str, Sample]) -> bool:
    apart = driver.health.quarantined
    return all(tag.ref in apart or (tag.ref in latest and _good(latest[tag.ref])) for tag in source.tags)


def _good(sample: Sample) -> bool:
    return sample.quality is Quality.GOOD


def _findings(source: Source, driver: Driver, latest: dict[str, Sample], *, patient: bool) -> list[Step]:
    """What the driver says of itself, then what is wrong with tags, then the first good value."""
    health = driver.health
    steps = [note("note", text) for text in health.notes.values()]
    if health.error:
        steps.append((note if health.connected else fail)("connect", health.error))
    if (skew := health.clock_skew_s) is not None:
        side = "ahead of" if skew > 0 else "behind"
        text = f"the source's clock is {abs(skew):.1f} s {side} this gateway's"
        steps.append(fail("clock", f"{text}; set both by NTP") if abs(skew) > _SKEW_S else ok("clock", text))
    bad = [fail("tag", f"{ref}: {why}") for ref, why in health.quarantined.items()]
    for tag in source.tags:
        sample = latest.get(tag.ref)
        if tag.ref in health.quarantined or (sample and _good(sample)):
            continue
        if sample:
            text = f"{tag.ref}: the source says {sample.quality.name.lower()}; check {tag.address} there"
            bad.append(fail("tag", text))
        else:
            text = f"{tag.ref}: nothing came within {VALUES_S:g} s; check {tag.address}, and that something sends it"
            bad.append((note if patient else fail)("tag", text))
    steps += bad[:_SHOWN]
    if len(bad) > _SHOWN:
        steps.append(fail("tag", f"and {len(bad) - _SHOWN} tags more; mend these first"))
    good = [sample for tag in source.tags if (sample := latest.get(tag.ref)) and _good(sample)]
    if good:
        first = good[0]
        shown = f"{first.value:g}" if isinstance(first.value, float) else f"{len(first.value)} values"
        age = time.time() - first.time_ns / 1e9
        steps.append(ok("value", f"{len(good)} of {len(source.tags)} tags; {first.tag} = {shown}, {age:.1f} s old"))
    return steps
