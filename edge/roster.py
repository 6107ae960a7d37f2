"""The federation's roster as this gateway holds it: how many are in, and whether this gateway is one of them."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from broker import messages as m
from broker.link import Inbound
from broker.roster import ROSTER, Collector, Roster, RosterPart
from models.errors import LocalError

if TYPE_CHECKING:
    from edge.shop import Shop

log = logging.getLogger(__name__)

# Keys of the state, of the federation that gave the roster, and of that which this gateway was taken out by.
_HELD, _OUT = "roster/held", "roster/out"


class RosterKeeper:
    """Keeps `shop.roster`. `changed` is called when another one is here.

    `status` says how many are in, and whether this gateway is (plain JSON types); None where no roster has come. Where
    it was in an earlier one, `out_ms` is the time of the first without it.
    """

    def __init__(self, shop: "Shop", changed: Callable[[], None]) -> None:
        """Take up what an earlier run stored; before the event loop."""
        self._shop, self._changed = shop, changed
        self._storing: asyncio.Task[None] | None = None
        held = shop.state.get(_HELD)
        self.status: dict[str, object] | None = None
        self._out_ms = int.from_bytes(shop.state.get(_OUT) or b"", "big")
        self._take(msgspec.msgpack.decode(held, type=Roster) if held else None)
        self._parts = Collector(shop.roster.time_ms if shop.roster else -1)

    def hear(self, part: int, inbound: Inbound) -> None:
        """Take a part of a roster; once all of a newer one are here, it holds at once. PeerError."""
        if not inbound.payload:
            return  # unsigned: nobody can take a roster away so
        said = m.open_envelope(inbound.payload, inbound.topic, self._shop.federation_key, RosterPart)
        if (roster := self._parts.take(part, said)) is None:
            return
        self._take(roster)
        log.info("roster of the federation: %d gateways of %d enterprises", roster.gateways, roster.enterprises)
        self._storing = asyncio.get_running_loop().create_task(self._store(roster, self._storing))
        self._changed()

    async def _store(self, roster: Roster, before: asyncio.Task[None] | None) -> None:
        """Keep it over a restart. Where the disk can't, it comes again with the next connection."""
        if before:
            await asyncio.wait([before])
        body: dict[str, object] = {"digest": roster.digest.hex(), "time_ms": roster.time_ms}
        body |= {"gateways": roster.gateways, "enterprises": roster.enterprises}
        out = self._out_ms.to_bytes(8, "big")

        def work() -> None:
            self._shop.state.put(_HELD, msgspec.msgpack.encode(roster))
            self._shop.state.put(_OUT, out)
            self._shop.state.record(ROSTER, body)

        try:
            await self._shop.state.commit(work)
        except LocalError as error:
            log.error("the roster can't be stored: %s", error)

    def _take(self, roster: Roster | None) -> None:
        self._shop.roster = roster
        if roster is None:
            return
        known = roster.has(self._shop.config.path.enterprise, self._shop.signer.public_key)
        was = bool(self.status and self.status["has_this"])
        self._out_ms = 0 if known else self._out_ms or (roster.time_ms if was else 0)
        if was and not known:
            log.warning("this gateway was taken out of the federation, by the roster of %d", roster.time_ms)
        self.status = {
            "digest": roster.digest.hex(), "time_ms": roster.time_ms, "gateways": roster.gateways,
            "enterprises": roster.enterprises, "has_this": known, "out_ms": self._out_ms or None,
        }  # fmt: skip
