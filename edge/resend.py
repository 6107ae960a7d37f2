"""What is said again: an update that has no receipt, at once after a connection, then less and less often.

And everything, by a new connection, where the broker does not let this gateway speak: it may have been told meanwhile.
"""

import time
from collections.abc import Container

from broker.link import Link
from broker.messages import Receipt, Signer
from broker.topics import GatewayPath, Status, Uplink
from edge.store import State

_EVERY_S = (5.0, 60.0)
_SOON_S = 0.2
_ANEW_S = 60.0


class Resender:
    """Sends what waits in the outbox; in the event loop."""

    def __init__(self, state: State, link: Link, path: GatewayPath) -> None:
        self._state, self._link, self._path = state, link, path
        self._at, self._every_s = 0.0, _EVERY_S[0]
        self._anew = 0.0

    def hurry(self) -> None:
        """Somebody is there again who may answer."""
        self._at, self._every_s = time.monotonic() + _SOON_S, _EVERY_S[0]

    def tick(self, tasks: Container[str]) -> None:
        """Send what is due of these tasks."""
        now = time.monotonic()
        if Status(self._path).topic not in self._link.refused:
            self._anew = now + _ANEW_S
        elif now >= self._anew:
            self._link.renew("the broker may have been told meanwhile who this gateway is")
        if not self._link.connected or now < self._at:
            return
        waiting = self._state.waiting
        if waiting and self._at:
            for out in waiting:
                if out.task in tasks:
                    self._link.publish(Uplink(self._path, out.task, "update").topic, out.envelope)
            self._every_s = min(2 * self._every_s, _EVERY_S[1])
        self._at = now + self._every_s


async def settle(state: State, signer: Signer, task: str, receipt: Receipt) -> bool:
    """Let the outbox go of what the aggregator has answered for; False if it held no such update."""
    body: dict[str, object] = {"task": task, "round": receipt.round, "digest": receipt.digest.hex()}
    body |= {"outcome": receipt.outcome, "detail": receipt.detail}

    def work() -> bool:
        if not state.settle(receipt.digest):
            return False
        state.record("receipt", body)
        state.checkpoint(signer)
        return True

    return await state.commit(work)
