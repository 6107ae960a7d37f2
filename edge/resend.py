"""When an update that has no receipt is sent again: at once after a connection, then less and less often."""

import time
from collections.abc import Container

from broker.link import Link
from broker.topics import GatewayPath, Uplink
from edge.store import State

_EVERY_S = (5.0, 60.0)
_SOON_S = 0.2


class Resender:
    """Sends what waits in the outbox; in the event loop."""

    def __init__(self, state: State, link: Link, path: GatewayPath) -> None:
        self._state, self._link, self._path = state, link, path
        self._at, self._every_s = 0.0, _EVERY_S[0]

    def hurry(self) -> None:
        """Somebody is there again who may answer."""
        self._at, self._every_s = time.monotonic() + _SOON_S, _EVERY_S[0]

    def tick(self, tasks: Container[str]) -> None:
        """Send what is due of these tasks."""
        now = time.monotonic()
        if not self._link.connected or now < self._at:
            return
        waiting = self._state.waiting
        if waiting and self._at:
            for out in waiting:
                if out.task in tasks:
                    self._link.publish(Uplink(self._path, out.task, "update").topic, out.envelope)
            self._every_s = min(2 * self._every_s, _EVERY_S[1])
        self._at = now + self._every_s
