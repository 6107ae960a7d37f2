"""What came by file: taken from the state's folder and delivered as MQTT would, with the same checks."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from broker import stick
from broker.link import Inbound
from broker.topics import Chunk, parse
from models.errors import PeerError, UserError

log = logging.getLogger(__name__)


class Stick:
    """In the event loop. A model's pieces wait for whoever fetches them, as a broker's retained messages do."""

    def __init__(self, state: Path, subscribe: Callable[..., object], deliver: Callable[[Inbound], None]) -> None:
        self._state, self._subscribe, self._deliver = state, subscribe, deliver
        self._pieces: dict[str, bytes] = {}
        self._taken = set[Path]()

    def subscribe(self, *topics: str) -> None:
        """Ask the broker for topics, and deliver what is here of them."""
        self._subscribe(*topics)
        for topic in topics:
            if topic in self._pieces:
                asyncio.get_running_loop().call_soon(self._hand, topic, self._pieces[topic])

    async def tick(self, *, busy: bool) -> None:
        """Take the files that wait. Unless something is still being fetched, the pieces before are not needed more."""
        if not busy:
            self._pieces.clear()
        for path, messages in await asyncio.to_thread(self._read):
            self._pieces |= {topic: payload for topic, payload in messages if _is_piece(topic)}
            for topic, payload in messages:
                if topic not in self._pieces:
                    self._hand(topic, payload)
            log.info("%s: %d messages taken", path, len(messages))

    def _read(self) -> list[tuple[Path, stick.Messages]]:
        """Read the files that wait, once each; the disk may take its time."""
        found = list[tuple[Path, stick.Messages]]()
        for path in stick.waiting(self._state):
            if path in self._taken:
                continue
            self._taken.add(path)  # also where it can't be deleted
            try:
                found.append((path, stick.read(path)))
                path.unlink()
            except (UserError, OSError) as error:
                log.error("%s", error)
        return found

    def _hand(self, topic: str, payload: bytes) -> None:
        self._deliver(Inbound(topic, payload, retain=True, qos=1, mid=0))


def _is_piece(topic: str) -> bool:
    try:
        return isinstance(parse(topic), Chunk)
    except PeerError:
        return False  # told when it is delivered
