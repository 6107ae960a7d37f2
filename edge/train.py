"""The gateway's half of training that stays resident: start the child, watch its memory, take its result. No torch."""

import asyncio
import contextlib
import ctypes
import logging
import math
import os
import resource
import shutil
import signal
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edge.config import Config
from edge.dataset import Dataset
from edge.feedback import Correction
from edge.window import Wiring
from models.delta import Layout, Vector
from models.drift import Reference
from models.errors import LocalError
from models.scale import Scale

log = logging.getLogger(__name__)

DONE, NOT_ENOUGH, DIVERGED = 0, 3, 4
_POLL_S = 0.25
_LINGER_S = 20.0
_PIECE = 4096
_PR_SET_PDEATHSIG = 1
_RESULT = "result.npz"


class NotEnoughError(LocalError):
    """There are too few good windows to train on; more data is all that is missing. `count` are there."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        number = text.partition(" ")[0]
        self.count = int(number) if number.isdecimal() else 0


class TrainingError(LocalError):
    """The child failed, was killed, or went over a cap; the text says which."""


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the child is told. `layout` is `Layout.to_wire()`; the base weights lie beside it as base.npy.

    own.npy, where it lies there too, is the net that has only seen this gateway's data, as the last training left it;
    average.npy the running mean of the global models, from which the tuned model starts.
    `corrections` are what operators said of windows, by the windows' ends in ms; `own` are prefixes below which
    the base has this gateway's own values, and `width` is the part that is trained.
    """

    task_text: str
    wiring: Wiring
    layout: tuple[tuple[str, tuple[int, ...] | None], ...]
    store: str
    seed: int
    threads: int
    nice: int
    memory: int
    cpu_seconds: int
    corrections: dict[int, Correction] = {}
    own: tuple[str, ...] = ()
    width: float = 1


@dataclass(frozen=True)
class Result:
    """What the child learnt: weights (layout.size,), the windows and optimiser steps it took, scale and holdout.

    `quality` is the share of the windows' values that were good.
    `reference` is what drift is measured against.
    `tuned` (layout.size,) is the mean of the global models after further passes, sent to nobody; `own` the net that
    learns alone, None where the task wants none.
    """

    vector: Vector
    samples: int
    steps: int
    loss: float
    seconds: float
    device: str
    scale: Scale
    reference: Reference
    holdout: Dataset
    tuned: Vector
    own: Vector | None = None
    quality: float = 1.0


def job_for(
    config: Config,
    folder: Path,
    text: str,
    wiring: Wiring,
    layout: Layout,
    round_: int,
    said: dict[int, Correction],
    *,
    own: tuple[str, ...] = (),
    width: float = 1,
) -> Job:
    """Make the job of a round: this gateway's caps, a seed that is its own, and what operators said of windows."""
    caps = config.training
    return Job(
        task_text=text,
        wiring=wiring,
        layout=layout.to_wire(),
        store=str(folder),
        seed=zlib.crc32(f"{config.path} {round_}".encode()),
        threads=caps.threads,
        nice=caps.nice,
        memory=config.training_memory,
        cpu_seconds=caps.cpu_seconds,
        corrections=said,
        own=own,
        width=width,
    )


def lower_priority(job: Job) -> None:
    """In the child: the caps of the job, and first in line for the kernel's out-of-memory killer."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(max(0, job.nice - os.nice(0)))
    used = resource.getrusage(resource.RUSAGE_SELF)
    most = math.ceil(used.ru_utime + used.ru_stime) + job.cpu_seconds
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


class Trainer:
    """The training child of one task: it starts with a job, and stays a while for the next.

    Half of a short training is Python starting and importing torch; where round follows round, that is paid once. A
    child that has failed, or passed a cap, is never used again.
    """

    def __init__(self) -> None:
        self._child: asyncio.subprocess.Process | None = None
        self._errors: asyncio.Task[str] | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._busy = asyncio.Lock()

    async def train(
        self, job: Job, base: Vector, folder: Path, own: Vector | None = None, average: Vector | None = None
    ) -> Result:
        """Run one training in the child and return its result.

        Raises NotEnoughError or TrainingError. Cancelling kills the child. `folder` is the job's own and is removed.
        `own` and `average` are what Job says of those files.
        """
        async with self._busy:  # one that is being killed has its folder until it is gone
            return await self._train(job, folder, {"base": base, "own": own, "average": average})

    async def _train(self, job: Job, folder: Path, vectors: dict[str, Vector | None]) -> Result:
        if self._leaving:
            self._leaving.cancel()
        try:
            size = await asyncio.to_thread(_prepare, job, folder, vectors)
            await self._run(job, folder)
            result = await asyncio.to_thread(_read, folder / _RESULT, size)
        except NotEnoughError:
            self._linger()
            raise
        except BaseException:
            await self.stop()
            raise
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        self._linger()
        return result

    async def stop(self) -> None:
        """Kill the child, if there is one."""
        child, self._child = self._child, None
        if self._leaving:
            self._leaving.cancel()
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    def _linger(self) -> None:
        """Let the child end in a while: it does when its standard input closes."""
        child = self._child
        if child is not None and child.stdin is not None:
            self._leaving = asyncio.get_running_loop().call_later(_LINGER_S, child.stdin.close)

    async def _run(self, job: Job, folder: Path) -> None:
        child = await self._ready(job)
        if child.stdin is None or child.stdout is None:
            raise TrainingError("the training process has no pipes")
        # A child that has died meanwhile says nothing; its exit code and last words do.
        with contextlib.suppress(ConnectionError):
            child.stdin.write(f"{folder}\n".encode())
            await child.stdin.drain()
        answer = asyncio.ensure_future(child.stdout.readline())
        try:
            over = await _watch(child, answer, job.memory)
            said = (await answer).decode(errors="replace").strip()
        finally:
            answer.cancel()
        if over:
            cap = job.memory >> 20
            raise TrainingError(f"went over its memory cap ({over >> 20} of {cap} MiB); raise training.memory")
        word, _, text = said.partition(" ")
        if not word and self._errors is not None:
            code, last = await child.wait(), await self._errors
            raise TrainingError(f"the training process ended with {code}: {last or 'it said nothing'}")
        if word == str(NOT_ENOUGH):
            raise NotEnoughError(text)
        if word != str(DONE):
            raise TrainingError(text)

    async def _ready(self, job: Job) -> asyncio.subprocess.Process:
        """Return the child that is there, or start one."""
        child = self._child
        if child is not None and child.returncode is None and child.stdin and not child.stdin.is_closing():
            return child
        await self.stop()
        threads = str(job.threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONSAFEPATH": "1"}
        pipe = asyncio.subprocess.PIPE
        self._child = child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "edge.trainer", env=environment, stdin=pipe, stdout=pipe, stderr=pipe
        )
        self._errors = asyncio.create_task(_tail(child))
        return child


def _prepare(job: Job, folder: Path, vectors: dict[str, Vector | None]) -> int:
    """Write what the child reads; vectors of another layout than the base's are left out. Returns its size."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    (folder / "job.json").write_bytes(msgspec.json.encode(job))
    size = 0
    for name, vector in vectors.items():
        if vector is not None and vector.size == (size := size or vector.size):
            np.save(folder / f"{name}.npy", vector, allow_pickle=False)
    return size


async def _tail(child: asyncio.subprocess.Process) -> str:
    """Read all that the child writes to standard error, and keep the last line."""
    kept = b""
    while child.stderr is not None and (more := await child.stderr.read(_PIECE)):
        kept = (kept + more)[-_PIECE:]
    return kept.decode(errors="replace").strip().rpartition("\n")[2][-300:]


async def _watch(child: asyncio.subprocess.Process, answer: asyncio.Future[bytes], memory: int) -> int:
    """Kill the child when its resident memory passes the cap; return that memory, 0 when it answered or ended."""
    while not answer.done():
        resident = resident_bytes(child.pid)
        if resident > memory:
            child.kill()
            return resident
        await asyncio.wait([answer], timeout=_POLL_S)
    return 0


def resident_bytes(pid: int) -> int:
    """Resident memory of a process (proc(5) statm); 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def write_result(folder: Path, result: Result) -> None:
    """In the child: write everything, then rename, so that the parent sees all of it or nothing."""
    y = np.empty(0, np.float32) if result.holdout.y is None else result.holdout.y
    numbers = np.array([result.samples, result.steps, result.loss, result.seconds, result.quality])
    with (folder / "partial").open("wb") as file:
        np.savez(
            file, vector=result.vector, numbers=numbers, device=np.array(result.device),
            scale=np.frombuffer(result.scale.to_json(), np.uint8),
            reference=np.frombuffer(result.reference.to_json(), np.uint8), holdout_x=result.holdout.x, holdout_y=y,
            per_week=np.array(result.holdout.per_week),
            tuned=result.tuned, own=np.empty(0, np.float32) if result.own is None else result.own,
        )  # fmt: skip
    (folder / "partial").rename(folder / _RESULT)


def _read(path: Path, size: int) -> Result:
    with np.load(path, allow_pickle=False) as z:
        samples, steps, loss, took, quality = z["numbers"].tolist()
        y = z["holdout_y"] if len(z["holdout_y"]) or not len(z["holdout_x"]) else None
        holdout = Dataset(z["holdout_x"], y, float(z["per_week"]))
        scale = Scale.from_json(z["scale"].tobytes())
        own = z["own"] if z["own"].size else None
        reference = Reference.from_json(z["reference"].tobytes())
        what = int(samples), int(steps), loss, took, str(z["device"]), scale, reference, holdout
        result = Result(z["vector"], *what, z["tuned"], own, quality)
    learnt = [result.vector, result.tuned, *([] if own is None else [own])]
    if any(vector.shape != (size,) or not np.isfinite(vector).all() for vector in learnt):
        raise TrainingError("the training process gave weights of another shape, or not finite")
    return result
