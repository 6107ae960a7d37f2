"""The first run of a graph from a peer, in a child with a memory limit, and what follows when something ends that run.

What a graph itself does, it does at every try. A run that was ended from outside may be this machine's fault, whose
memory or time was short, or of the graph after all: it is tried again, ever more seldom, and never given up, because
nobody may be there to start a gateway anew.
"""

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from edge.handback import Model
from models.errors import LocalError, PeerError

# Between two tries of one graph, whoever asks, twice as long each time; less than who asks waits at first.
_SHORTEST_S, _LONGEST_S = 2.0, 3600.0
_PROBE_S = 120.0
# By the kernel when memory runs out, and by whoever ends a service; what a graph itself does ends by other signals.
_KILLED = -signal.SIGKILL, -signal.SIGTERM


class EndedError(LocalError):
    """The first run of a graph did not end by itself, perhaps through no fault of the graph."""


class _Ended(NamedTuple):
    """What ended a graph's last run, how many were ended, and until when (s, of the clock) none is tried."""

    tries: int = 0
    until_s: float = 0.0
    error: str = ""


class Prober:
    """First runs, of which those that were ended are counted; `folder` is for their file, `clock` gives seconds."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = folder / "probe.npz"
        self._clock = clock
        # Of all tasks: memory may be short, and the file is one.
        self._one = asyncio.Lock()
        self._ended: dict[bytes, _Ended] = {}

    async def run(self, model: Model) -> None:
        """Run a new graph; EndedError where to try again may help, PeerError("graph") says why it is refused."""
        async with self._one:
            await self._run(model)

    async def _run(self, model: Model) -> None:
        digest = model.terms.graph.digest
        before = self._ended.get(digest, _Ended())
        if before.tries and self._clock() < before.until_s:
            raise EndedError(before.error)
        try:
            await probe(model, self._file)
        except EndedError as error:
            tries = before.tries + 1
            wait_s = min(_SHORTEST_S * 2 ** min(before.tries, 32), _LONGEST_S)
            text = f"{error}; try {tries}, and it is tried again, ever more seldom, in the end once an hour"
            self._ended[digest] = _Ended(tries, self._clock() + wait_s, text)
            raise EndedError(text) from None
        self._ended.pop(digest, None)


async def probe(model: Model, file: Path) -> None:
    """Run a graph once; PeerError("graph") says why it is refused, EndedError by what the run was ended.

    `file` is for the child to read, and gone at the end; of a run that was cut off, the next one takes its place.
    """
    try:
        await asyncio.to_thread(_write, model, file)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "models.graphcheck", str(file),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            _, errors = await asyncio.wait_for(child.communicate(), _PROBE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
    except TimeoutError:
        # The child's own limit is on processor time, half as long: it had to wait for this machine.
        raise EndedError(f"the graph's first run took longer than {_PROBE_S:.0f} s") from None
    finally:
        file.unlink(missing_ok=True)  # noqa: ASYNC240 - of a cancelled run, too, which may wait for nothing
    if child.returncode in _KILLED:
        name = signal.Signals(-child.returncode).name
        raise EndedError(f"the graph's first run was ended from outside, by {name}")
    if child.returncode:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        raise PeerError("graph", last or f"its first run ended with {child.returncode}")


def _write(model: Model, file: Path) -> None:
    wire = np.frombuffer(model.layout.to_json().encode(), np.uint8)
    shape = np.array([*model.task.input_shape, model.task.outputs])
    np.savez(file, graph=np.frombuffer(model.graph, np.uint8), layout=wire, shape=shape)
