"""Hears what operators say of windows: checked against what was scored, and stored; one after the other."""

import asyncio
import logging
from collections import deque

from edge.feedback import Correction, parse, resolve
from edge.handback import Model
from edge.history import SampleReader
from edge.memory import Memory
from edge.shop import Shop
from models.errors import PeerError
from models.spec import Task

log = logging.getLogger(__name__)


# Messages that may wait: a person says a few a minute.
_MOST_WAITING = 32


class Ear:
    """The messages of one task. What comes faster than it can be checked is refused."""

    def __init__(self, shop: Shop, memory: Memory) -> None:
        self._shop, self._memory = shop, memory
        self._waiting: deque[tuple[Model | None, bytes]] = deque()
        self._busy = False

    def take(self, model: Model | None, payload: bytes) -> bool:
        """Let a message wait; whether somebody must call `drain`."""
        if len(self._waiting) >= _MOST_WAITING:
            self._shop.refused["feedback-flood"] += 1
            return False
        self._waiting.append((model, payload))
        return not self._busy

    async def drain(self) -> None:
        """Check what waits, until nothing does."""
        self._busy = True
        try:
            while self._waiting:
                await asyncio.to_thread(self._shop.samples.flush)
                for _ in range(len(self._waiting)):
                    await _hear(self._shop, self._memory, *self._waiting.popleft())
        finally:
            self._busy = False


async def _hear(shop: Shop, memory: Memory, model: Model | None, payload: bytes) -> None:
    """Check a message and store its correction, with a line in the ledger; count one that can't be used."""
    try:
        if model is None:
            raise PeerError("window", "nothing was scored yet")  # noqa: TRY301 - counted below, as all others
        task, said = model.task, parse(payload)
        scored = await asyncio.to_thread(_scored, shop, task, said.window_end_ms)
        label = resolve(task, said, scored)
    except PeerError as error:
        shop.refused[error.reason] += 1
        log.warning("%s: feedback refused: %s", memory.task, error)
        return
    body: dict[str, object] = {
        "task": task.name, "window_end_ms": said.window_end_ms, "verdict": said.verdict, "scored": scored,
        "label": label,
    }  # fmt: skip

    def work() -> None:
        known = memory.corrections()
        before = known.get(said.window_end_ms)
        if before and before.timestamp_ms >= said.timestamp_ms:
            return  # a message that came twice, or late
        known[said.window_end_ms] = Correction(said.timestamp_ms, label)
        memory.keep_corrections(known)
        shop.state.record("feedback", body)

    await shop.state.commit(work)


def _scored(shop: Shop, task: Task, end_ms: int) -> str:
    """The verdict on a window of this task; PeerError `window` if there is none."""
    reader = SampleReader(shop.folder)
    try:
        found = reader.verdict(task.name, end_ms * 1_000_000, (end_ms + 1) * 1_000_000)
    finally:
        reader.close()
    if found is None:
        raise PeerError("window", f"no window of {task.name} that ended at {end_ms} ms was scored")
    return found
