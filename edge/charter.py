"""The federation's charter as this gateway holds it, and this site's word on it.

The word is a line that a person wrote: `[policy] charter` in gateway.toml, the SHA-256 of the charter's file. The
charter itself comes over MQTT and lies in the state folder as `charter.toml`, for people to read.
"""

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from broker import messages as m
from broker import stick
from broker.charter import ACCEPTANCE, CHARTER, Acceptance, CharterText, Named, parse_charter
from broker.link import Inbound
from broker.topics import Accepted
from models.errors import LocalError, PeerError, UserError

if TYPE_CHECKING:
    from edge.shop import Shop

log = logging.getLogger(__name__)

FILE = "charter.toml"
# Keys of the state, all of the federation that gave the charter.
_HELD, _SINCE, SAID = "charter/held", "charter/since", "charter/said"
_MOST_ENVELOPE = 64 * 1024
_RETRY_S = 5.0


class CharterKeeper:
    """Keeps `shop.charter`, and says this gateway's word on it. `changed` is called when another charter is here.

    `hear` takes the newest, by the time that the aggregator signed; `run` stores it, as often as it takes. What is held
    is always on the disk, so that a stop in between costs nothing: it is heard again.
    """

    def __init__(self, shop: "Shop", changed: Callable[[], None]) -> None:
        """Take up what an earlier run stored; before the event loop."""
        self._shop, self._changed = shop, changed
        self._topic = Accepted(shop.config.path).topic
        self._heard: tuple[Named | None, int] = None, int(shop.state.get(_SINCE) or -1)
        self._news, self._saying = asyncio.Event(), asyncio.Lock()
        self._said = shop.state.get(SAID) or b""
        held = shop.state.get(_HELD)
        shop.charter = parse_charter(held.decode(), FILE) if held else None

    def hear(self, inbound: Inbound) -> None:
        """Take the charter in force, where it is newer than what was heard before; PeerError."""
        if not inbound.payload:
            return  # unsigned: nobody can take a charter away so
        if len(inbound.payload) > _MOST_ENVELOPE:
            raise PeerError("size", f"a charter of {len(inbound.payload)} bytes, at most {_MOST_ENVELOPE}")
        said = m.open_envelope(inbound.payload, inbound.topic, self._shop.federation_key, CharterText)
        try:
            named = parse_charter(said.text, FILE) if said.text else None
        except UserError as error:
            raise PeerError("charter", str(error)) from error
        if said.time_ms > self._heard[1]:
            self._heard = named, said.time_ms
            self._news.set()

    async def run(self) -> None:
        """Say this site's word, without a broker too: it may go by file. Then keep what is heard, until cancelled."""
        await self.say()
        while True:
            await self._news.wait()
            self._news.clear()
            if not await self._keep(*self._heard):
                await asyncio.sleep(_RETRY_S)
                self._news.set()

    async def _keep(self, named: Named | None, time_ms: int) -> bool:
        """Store what was heard; of another charter than the one that is held, say what this site says of it.

        Return False where the disk refused.
        """
        held = self._shop.charter
        since = partial(self._shop.state.put, _SINCE, str(time_ms).encode())
        try:
            if (named and named.digest) == (held and held.digest):
                await self._shop.state.commit(since)
                return True
            await self._store(named, since)
        except (LocalError, OSError) as error:
            log.error("the charter can't be stored: %s", error)
            return False
        await self.say()  # first: of who has not accepted it, the aggregator takes no update
        self._changed()
        return True

    async def _store(self, named: Named | None, since: Callable[[], None]) -> None:
        """Hold another charter, once it is on the disk, for people too; LocalError, OSError."""
        state, text = self._shop.state, (named.text if named else "").encode()
        body: dict[str, object] = {
            "digest": named.digest.hex() if named else "", "title": named.charter.title if named else "",
        }  # fmt: skip

        def work() -> None:
            since()
            state.put(_HELD, text)
            state.record(CHARTER, body)

        await asyncio.to_thread(stick.put, self._shop.folder / FILE, text)
        await state.commit(work)  # last: what is held is not stored again
        self._shop.charter = named
        log.warning("charter of the federation: %s %s", body["digest"] or "none", body["title"])

    async def say(self) -> None:
        """Publish this site's word, once the ledger has it; the same bytes until it changes."""
        shop = self._shop
        async with self._saying:
            digest = accepted(shop)
            said = m.peek(self._said, Acceptance) if self._said else Acceptance(m.VERSION, b"", 0)
            if digest != said.digest:
                # Later than the last word, whatever the clock says: the aggregator goes by the latest.
                word = Acceptance(m.VERSION, digest, max(int(time.time() * 1000), said.time_ms + 1))
                envelope = shop.signer.seal(word, self._topic)
                title = shop.charter.charter.title if shop.charter and digest else ""
                body: dict[str, object] = {
                    "charter": digest.hex(), "title": title, "digest": hashlib.sha256(envelope).hexdigest(),
                    "message_bytes": len(envelope), "reason": "" if digest else "no charter is accepted any more",
                }  # fmt: skip

                def work() -> None:
                    shop.state.put(SAID, envelope)
                    shop.state.record(ACCEPTANCE, body)

                try:
                    await shop.state.commit(work)
                except LocalError as error:
                    log.error("the charter's acceptance can't be stored: %s", error)
                    return
                self._said = envelope
        self.repeat()

    def repeat(self) -> None:
        """Say it again: the aggregator may not have heard it."""
        if self._said:
            self._shop.publish(self._topic, self._said, retain=True)

    def status(self) -> dict[str, object] | None:
        """The charter that is held, and whether it is accepted; plain JSON types."""
        held = self._shop.charter
        if held is None:
            return None
        said = bool(accepted(self._shop))
        return {
            "digest": held.digest.hex(), "title": held.charter.title, "accepted": said,
            "file": str(self._shop.folder / FILE), "policy": self._shop.config.policy.charter or "",
        }  # fmt: skip


def accepted(shop: "Shop") -> bytes:
    """The SHA-256 of the charter that is held and that gateway.toml accepts; empty for none."""
    held = shop.charter
    return held.digest if held and held.digest.hex() == shop.config.policy.charter else b""


def under_charter(shop: "Shop") -> dict[str, object]:
    """What an update's ledger entry says of the charter that it leaves under; nothing without one."""
    held, digest = shop.charter, accepted(shop)
    return {"charter": digest.hex(), "title": held.charter.title} if held and digest else {}
