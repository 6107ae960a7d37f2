"""The first run of a graph from a peer, in a child with a memory limit, and what follows when something ends that run.

What a graph itself does, it does at every try. A run that was ended from outside may be this machine's fault, whose
memory or time was short, or of the graph after all: it is tried again, but not for ever.
"""

import asyncio
import contextlib
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from edge.handback import Model
from models.errors import LocalError, PeerError

# Of one graph, from one start of the gateway to the next.
MOST_TRIES = 5
_PROBE_S = 120.0
# By the kernel when memory runs out, and by whoever ends a service; what a graph itself does ends by other signals.
_KILLED = -signal.SIGKILL, -signal.SIGTERM


class EndedError(LocalError):
    """The first run of a graph did not end by itself, perhaps through no fault of the graph."""


class Prober:
    """First runs, of which those that were ended are counted; `folder` is for their files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended = Counter[bytes]()

    async def run(self, model: Model) -> None:
        """Run a new graph; EndedError where to try again may help, PeerError("graph") says why it is refused."""
        digest = model.terms.graph.digest
        if self._ended[digest] >= MOST_TRIES:
            raise PeerError("graph", f"its first run was ended {MOST_TRIES} times; restart the gateway to try it again")
        try:
            await probe(model, self._folder)
        except EndedError as error:
            self._ended[digest] += 1
            if self._ended[digest] < MOST_TRIES:
                raise EndedError(f"{error}; try {self._ended[digest]} of {MOST_TRIES}") from None
            remedy = "see what else needs memory or time here, and restart the gateway to try it again"
            raise PeerError("graph", f"{error}, at each of {MOST_TRIES} tries; {remedy}") from None


async def probe(model: Model, folder: Path) -> None:
    """Run a graph once; PeerError("graph") says why it is refused, EndedError by what the run was ended."""
    path = await asyncio.to_thread(_write, model, folder)
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "models.graphcheck", str(path),
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
        path.unlink(missing_ok=True)
    if child.returncode in _KILLED:
        name = signal.Signals(-child.returncode).name
        raise EndedError(f"the graph's first run was ended from outside, by {name}")
    if child.returncode:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2][-200:]
        raise PeerError("graph", last or f"its first run ended with {child.returncode}")


def _write(model: Model, folder: Path) -> Path:
    wire = np.frombuffer(model.layout.to_json().encode(), np.uint8)
    shape = np.array([*model.task.input_shape, model.task.outputs])
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz", delete=False) as file:
        np.savez(file, graph=np.frombuffer(model.graph, np.uint8), layout=wire, shape=shape)
    return Path(file.name)
