"""What came by file: taken from the state's folder and delivered as MQTT would, with the same checks."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from broker import stick
from broker.link import Inbound
from broker.topics import Chunk, parse
from edge.store import State
from models.errors import LocalError, PeerError

log = logging.getLogger(__name__)

_AT_ONCE = 64


class Stick:
    """In the event loop. A model's pieces wait for whoever fetches them, as a broker's retained messages do."""

    def __init__(
        self, folder: Path, state: State, subscribe: Callable[..., object], deliver: Callable[[Inbound], None]
    ) -> None:
        self._inbox, self._state, self._subscribe, self._deliver = stick.Inbox(folder), state, subscribe, deliver
        self._pieces: dict[str, bytes] = {}
        self._taken: dict[Path, stick.Messages] = {}

    def subscribe(self, *topics: str) -> None:
        """Ask the broker for topics, and deliver what is here of them."""
        self._subscribe(*topics)
        for topic in topics:
            if topic in self._pieces:
                asyncio.get_running_loop().call_soon(self._hand, topic, self._pieces[topic])

    async def tick(self, *, busy: bool) -> None:
        """Take the next file that waits. Once nothing is being fetched any more, those before are not needed.

        Until then they stay, so that a gateway that is stopped meanwhile takes them again.
        """
        if not busy:
            self._pieces.clear()
            for path, taken in self._taken.items():
                await self._note(taken)
                await asyncio.to_thread(self._inbox.delete, path)
            self._taken.clear()
        found = await asyncio.to_thread(self._inbox.next)
        if found is None:
            return
        path, messages = found
        self._taken[path] = messages
        self._pieces |= {topic: payload for topic, payload in messages if _is_piece(topic)}
        for i, (topic, payload) in enumerate(messages):
            if payload and topic not in self._pieces:  # an empty one says whose file it is, which `import` looked at
                self._hand(topic, payload)
            if i % _AT_ONCE == _AT_ONCE - 1:
                await asyncio.sleep(0)  # a score doesn't wait for a file
        log.info("%s: %d messages taken", path, len(messages))

    async def _note(self, messages: stick.Messages) -> None:
        """Let the ledger say that a file was taken, by which `tundish edge import` knows one that comes again."""
        digest = await asyncio.to_thread(stick.digest, messages)
        body: dict[str, object] = {"sha256": digest, "messages": len(messages)}
        try:
            await self._state.commit(lambda: self._state.record("imported", body))
        except LocalError as error:
            log.error("that a file was taken can't be stored: %s", error)

    def _hand(self, topic: str, payload: bytes) -> None:
        self._deliver(Inbound(topic, payload, retain=True, qos=1, mid=0))


def _is_piece(topic: str) -> bool:
    try:
        return isinstance(parse(topic), Chunk)
    except PeerError:
        return False  # told when it is delivered
