"""This gateway's birth: it is there, with these keys and tasks, and with these releases of the federation's models."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from broker import messages as m
from broker.topics import Status
from edge import SOFTWARE
from edge.shop import Shop
from models.errors import LocalError

log = logging.getLogger(__name__)

_AGAIN_S = 5.0
Said = tuple[tuple[str, ...], tuple[m.Installed, ...]]


class Herald:
    """Says the birth at each connection, and again when another release is installed; `then` follows each."""

    def __init__(
        self,
        shop: Shop,
        session: int,
        agreement_key: bytes,
        installed: Callable[[], tuple[m.Installed, ...]],
        then: Callable[[], Awaitable[None]],
    ) -> None:
        self._shop, self._session, self._agreement_key = shop, session, agreement_key
        self._installed, self._then = installed, then
        self._said: Said | None = None
        self._announcing: asyncio.Future[None] | None = None
        self._again = 0.0
        self._noted: Said | None = None

    def tick(self) -> None:
        """Say it again where it says another release than what is here, or could not be said."""
        if self._announcing is None or not self._announcing.done() or time.monotonic() < self._again:
            return
        if self._said is None or self._said[1] != self._installed():
            self.announce()

    def announce(self) -> None:
        """Say it."""
        self._said = None
        self._announcing = asyncio.ensure_future(self._try())

    async def _try(self) -> None:
        said = tuple(self._shop.config.tasks), self._installed()
        try:
            await self._announce(said)
        except LocalError as error:
            self._again = time.monotonic() + _AGAIN_S
            log.error("the birth can't be said yet: %s", error)
        else:
            self._said = said

    async def _announce(self, said: Said) -> None:
        """Say who is here, once the ledger has it; at later connections the same is said again."""
        tasks, installed = said
        now_ms, topic = int(time.time() * 1000), Status(self._shop.config.path).topic
        key = self._shop.signer.public_key
        birth = m.Birth(m.VERSION, self._session, now_ms, key, SOFTWARE, tasks, self._agreement_key, installed)
        envelope = self._shop.signer.seal(birth, topic)

        def work() -> None:
            if said != self._noted:
                body: dict[str, object] = {"session": self._session, "software": SOFTWARE, "tasks": list(tasks)}
                body |= {"installed": msgspec.to_builtins(installed)} if installed else {}
                self._shop.state.record("birth", {**body, "message_bytes": len(envelope)})
                self._noted = said

        await self._shop.state.commit(work)
        self._shop.publish(topic, envelope, retain=True)
        await self._then()
