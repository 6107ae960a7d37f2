"""This gateway's certificate is renewed when two thirds of its life are over, while everything else goes on.

It was enrolled by a token, so it knows where to ask; one that was enrolled by files is renewed by files. A failure is
told, and tried again a day later: a third of 90 days holds thirty tries.
"""

import asyncio
import logging
import time
from datetime import UTC, datetime

from edge.identity import Issued, make_own_request, take_up, tls_files
from edge.shop import Shop
from models.errors import PeerError, TundishError

log = logging.getLogger(__name__)

_LOOK_S = 60.0
_AGAIN_MS = 24 * 3600 * 1000


def renews_ms(issued: Issued) -> int | None:
    """When two thirds of a certificate's life are over (ms since 1970 UTC); None if it is renewed by file alone."""
    return issued.until_ms - (issued.until_ms - issued.from_ms) // 3 if issued.url else None


class Renewal:
    """Looks every minute whether it is time. `problem` says why the last try failed, "" while all is well."""

    def __init__(self, shop: Shop) -> None:
        """Read what is stored; before the event loop."""
        self.problem = ""
        self._shop, self._issued = shop, Issued.stored(shop.state)
        if self._issued:
            self._issued.check(str(shop.config.path), shop.folder)
        self._next_ms = renews_ms(self._issued) if self._issued else None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look(int(time.time() * 1000))
            await asyncio.sleep(_LOOK_S)

    async def look(self, now_ms: int) -> None:
        """Renew if it is time; after a failure, the next try is a day later."""
        if self._issued is None or self._next_ms is None or now_ms < self._next_ms:
            return
        self._next_ms = now_ms + _AGAIN_MS
        state = self._shop.state
        try:
            # What leaves the site is in the ledger before.
            said = {"path": str(self._shop.config.path), "public_key": self._shop.signer.public_key.hex()}
            await state.commit(lambda: state.record("request-made", {**said}))
            issued = await asyncio.to_thread(self._renew, self._issued.url)
            await state.commit(lambda: issued.keep(state))
        except TundishError as error:
            self._failed(str(error))
        except Exception as error:
            # Whatever it was, it must not be the last try.
            log.exception("renewal")
            self._failed(f"{type(error).__name__}: {error}")
        else:
            self._issued, self.problem = issued, ""
            self._next_ms = renews_ms(issued)
            day = datetime.fromtimestamp(issued.until_ms / 1000, UTC).date()
            log.info("this gateway's certificate is renewed, until %s", day)

    def _renew(self, url: str) -> Issued:
        """Ask for a new certificate and put it beside the key (in a thread); TundishError."""
        from edge.enrol import renew  # noqa: PLC0415 - X.509 is for enrolment alone

        shop, files = self._shop, tls_files(self._shop.folder)
        answer = renew(url, shop.signer, make_own_request(shop.config, shop.signer, shop.folder), files)
        if answer.path != str(shop.config.path) or answer.public_key != shop.federation_key:
            raise PeerError("admission", f"{url} answers for another gateway, or another federation")
        if answer.authority != files[0].read_bytes():
            raise PeerError("authority", f"{url} answers with another authority; enrol this gateway again")
        return take_up(url, answer, url, shop.folder)

    def _failed(self, why: str) -> None:
        self.problem = f"the certificate is not renewed, the next try is in a day: {why}"
        log.error("%s", self.problem)

    def status(self) -> dict[str, object] | None:
        """How the certificate is; plain JSON types, None where none was issued."""
        if self._issued is None:
            return None
        return {"until_ms": self._issued.until_ms, "renews_ms": renews_ms(self._issued), "problem": self.problem}
