"""Which federation this gateway believes: configured, pinned by an earlier run, or the first one seen."""

import asyncio
import contextlib
import logging
from functools import partial

from broker import messages as m
from broker.link import Inbound
from edge.shop import Shop
from models.errors import LocalError, PeerError

log = logging.getLogger(__name__)


class Trust:
    """Keeps `shop.federation` and its key. `problem` says why what an aggregator says is not believed, or not kept."""

    def __init__(self, shop: Shop) -> None:
        """Take up the federation that was configured, or pinned by an earlier run; before the event loop."""
        self.problem = ""
        self._shop, self._session = shop, 0
        self._pinning: asyncio.Task[None] | None = None
        pinned, wanted = shop.state.pinned(), shop.config.federation
        if pinned is not None and (not wanted.key or pinned[1].hex() == wanted.key):
            shop.federation, shop.federation_key = pinned
        elif wanted.name and wanted.key:
            key = bytes.fromhex(wanted.key)
            self._believe(wanted.name, key, "configured")
            with shop.state.transaction():
                shop.state.pin(wanted.name, key, "configured")
            shop.releases.load()

    def first_seen(self, federation: str, inbound: Inbound) -> None:
        """Pin the first federation whose birth verifies, unless another key is configured; PeerError."""
        key = _own_key(inbound)
        wanted = self._shop.config.federation.key
        if wanted and key.hex() != wanted:
            raise PeerError("signature", f"federation {federation} has another key than the configured one")
        self._believe(federation, key, "first seen")
        self._pinning = asyncio.get_running_loop().create_task(self._pin(federation, key))

    def birth(self, inbound: Inbound) -> bool:
        """Hear the birth or death of the pinned federation's aggregator; True if it began anew, PeerError."""
        try:
            said = m.open_envelope(inbound.payload, inbound.topic, self._shop.federation_key, m.FederationBirth)
        except PeerError as error:
            if error.reason == "signature":
                with contextlib.suppress(PeerError):  # noise
                    self._replaced(_own_key(inbound))
            raise
        self.problem = ""
        if said.state != "up" or said.session <= self._session:
            return False
        self._session = said.session
        return True

    def _believe(self, federation: str, key: bytes, how: str) -> None:
        self._shop.federation, self._shop.federation_key = federation, key
        log.warning("federation %s is trusted from now on, by key %s (%s)", federation, key.hex(), how)

    async def _pin(self, federation: str, key: bytes) -> None:
        """Keep the first federation seen. Where the disk can't, it is trusted until a restart."""
        try:
            await self._shop.state.commit(partial(self._shop.state.pin, federation, key, "first seen"))
        except LocalError as error:
            self.problem = f"federation {federation} is not pinned: {error}"
            log.error("%s", self.problem)

    def _replaced(self, key: bytes) -> None:
        self.problem = (
            f"federation {self._shop.federation} now signs with key {key.hex()}, "
            f"trusted is {self._shop.federation_key.hex()}; "
            "if the aggregator was replaced, write name and key under [federation]"
        )


def _own_key(inbound: Inbound) -> bytes:
    """The key that a birth names, with which it must verify: PeerError tells noise from an aggregator."""
    key = m.peek(inbound.payload, m.FederationBirth).public_key
    m.open_envelope(inbound.payload, inbound.topic, key, m.FederationBirth)
    return key
