"""A task's model at a start of the aggregator: version 0 of a new one, and the newest of a known one, signed anew.

Version 0 is made by a child process, because making a net needs torch and the aggregator does not.

The child `python -m models.export --task FILE --out FILE.npz --seed N` writes `graph` (uint8, ONNX without weights),
`vector` (float32, the first weights) and `layout` (uint8, `Layout.to_json()`).
"""

import asyncio
import contextlib
import hashlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from broker.config import TaskFile
from broker.job import check_prefixes
from broker.journal import Journal, ModelRow, TaskRow
from models import codec
from models.delta import Layout, Vector, read_export, weights_digest
from models.errors import LocalError, PeerError
from models.spec import Task, parse_task, task_digest
from models.tomlfile import TomlFile

_TIMEOUT_S = 600
# What a net's layout follows from: a task that differs here has another model.
_SHAPE = ("kind", "net", "window", "signal", "personal", "target")


async def ensure_model(journal: Journal, file: TaskFile, now_ms: int) -> None:
    """Make and store version 0 of a new task; of a known one, store its changed text, and sign its newest model anew.

    Each start says it under a later time: of a journal that was restored, gateways know a newer one. UserError when the
    change would need another model; LocalError when the child fails.
    """
    stored = journal.task(file.task.name)
    if stored is None:
        graph, vector, layout = await _export(file)
        with journal.transaction():
            put_first_model(journal, file.task, file.text, graph=graph, vector=vector, layout=layout, now_ms=now_ms)
        return
    if stored.text != file.text:
        before, layout = parse_task(stored.text, str(file.path)), Layout.from_json(stored.layout)
        check_prefixes(file.task, layout, str(file.path), file.text)  # a typo is no other model
        # A prefix that the net does not have keeps nothing back, and may go.
        same = {"personal"} if np.array_equal(layout.mask(before.personal), layout.mask(file.task.personal)) else set()
        for key in _SHAPE:
            if key not in same and getattr(before, key) != getattr(file.task, key):
                problem = f"changed since the model of task {file.task.name!r} was made"
                was = f", with {json.dumps(before.personal)}" if key == "personal" else ""
                place = TomlFile(str(file.path), file.text)
                raise place.error([key], f"{problem}{was}", "undo it, or give the task a new name")
        with journal.transaction():
            journal.put_task(file.task.name, stored._replace(text=file.text))
            journal.note(now_ms, "task", {"task": file.task.name, "digest": task_digest(file.text).hex()})
    if newest := journal.model(file.task.name):
        with journal.transaction():
            journal.sign_model(file.task.name, newest.version, max(now_ms, newest.signed_ms + 1))


def put_first_model(
    journal: Journal, task: Task, text: str, *, graph: bytes, vector: Vector, layout: Layout, now_ms: int
) -> None:
    """Store a task with its version 0; `vector` is (layout.size,) float32, `graph` ONNX bytes without weights.

    Belongs inside a transaction.
    """
    digest, weights = weights_digest(vector), codec.encode(vector, codec.EXACT).data
    journal.put_task(task.name, task_row(text, graph, layout))
    journal.put_model(task.name, ModelRow(0, 0, weights, digest, 0, 0, now_ms, signed_ms=now_ms))
    journal.note(now_ms, "model", {"task": task.name, "version": 0, "digest": digest.hex(), "round": 0})


def task_row(text: str, graph: bytes, layout: Layout) -> TaskRow:
    """Make what the journal holds of a task; `graph` is ONNX bytes without weights."""
    return TaskRow(text, layout.to_json(), codec.deflate(graph), len(graph), hashlib.sha256(graph).digest())


async def _export(file: TaskFile) -> tuple[bytes, Vector, Layout]:
    # A task file gives the same first weights everywhere.
    seed = int.from_bytes(task_digest(file.text)[:4], "big")
    with tempfile.TemporaryDirectory(prefix="tundish-") as folder:
        out = Path(folder, "model.npz")
        command = [sys.executable, "-P", "-m", "models.export", "--task", str(file.path), "--out", str(out)]
        child = await asyncio.create_subprocess_exec(
            *command, "--seed", str(seed), stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        try:
            _, stderr = await asyncio.wait_for(child.communicate(), _TIMEOUT_S)
        except TimeoutError:
            raise LocalError(f"{file.path}: no first model in {_TIMEOUT_S} s; is this machine overloaded?") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
        if child.returncode != 0:
            lines = stderr.decode(errors="replace").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {child.returncode}"
            raise LocalError(f"{file.path}: no first model: {reason}; is tundish[train] installed on this machine?")
        try:
            graph, layout, vector = read_export(out)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, PeerError) as error:
            raise LocalError(f"{file.path}: models.export wrote no model: {error}") from error
        return graph, vector, layout
