"""The training child: `python -m edge.trainer`. The one module of the gateway that reaches torch.

A line on standard input names a folder: it reads job.json and base.npy there, makes the windows from the stored
samples, trains, writes result.npz in one rename, and answers on standard output. It ends with its standard input.
Killed at any time, it leaves nothing behind that anybody would read.
"""

import sys
from pathlib import Path

import msgspec
import numpy as np

from edge.dataset import MAX_HOLDOUT, Dataset, split
from edge.feedback import corrected
from edge.history import SampleReader
from edge.stored import stored_windows
from edge.train import DIVERGED, DONE, NOT_ENOUGH, Job, Result, lower_priority, write_result
from models.delta import Layout, Vector
from models.drift import Reference
from models.scale import Scale
from models.spec import Task, parse_task

MAX_SAMPLES = 5_000_000


def main() -> int:
    """Run the jobs whose folders come on standard input, a line each; answer each with a code and a sentence."""
    for line in sys.stdin:
        code, text = run(Path(line.rstrip("\n")))
        print(code, text, flush=True)  # noqa: T201 - the answer
    return 0


def run(folder: Path) -> tuple[int, str]:
    """Run one job; return its code, and what there is to say of it."""
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    lower_priority(job)
    task = parse_task(job.task_text)
    train, holdout = stored_dataset(task, job)
    if len(train) < task.training.min_windows:
        return NOT_ENOUGH, f"{len(train)} good windows are stored, training wants {task.training.min_windows}"
    scale = Scale.learn(task, train.x, train.y)
    y = None if train.y is None else scale.targets(task, train.y)
    base = np.load(folder / "base.npy", allow_pickle=False)

    from models.fit import first_weights, fit, set_threads  # noqa: PLC0415 - torch's 270 MB, once there is something to train on

    set_threads(job.threads)
    layout, x, own = Layout.from_wire(job.layout), scale.inputs(task, train.x), None
    try:
        fitted = fit(task, layout, base, x, y, seed=job.seed, proximal=task.training.proximal, width=job.width)
        tuned = fitted.vector
        if task.training.tune:
            average = _kept(folder, "average")
            start = tuned if average is None else np.where(layout.mask(job.own), average, tuned)
            tuned = fit(task, layout, start, x, y, seed=job.seed, epochs=task.training.tune, width=job.width).vector
        if task.training.alone:
            before = _kept(folder, "own")
            alone = first_weights(task, layout, job.seed)
            if before is not None:
                # What was outside a narrower part is zero, which would never learn.
                alone = np.where(before == 0, alone, before)
            own = fit(task, layout, alone, x, y, seed=job.seed + 1, width=job.width).vector
    except FloatingPointError as error:
        return DIVERGED, str(error)
    write_result(
        folder,
        Result(
            fitted.vector,
            len(train),
            fitted.steps,
            fitted.loss,
            fitted.seconds,
            fitted.device,
            scale,
            Reference.learn(task, train.x),
            holdout,
            tuned,
            own,
            float(np.isfinite(train.x).mean()),
        ),
    )
    return DONE, f"{fitted.steps} steps"


def _kept(folder: Path, name: str) -> Vector | None:
    """Weights that lie beside the job, if they do."""
    path = folder / f"{name}.npy"
    return np.load(path, allow_pickle=False) if path.exists() else None


def stored_dataset(task: Task, job: Job) -> tuple[Dataset, Dataset]:
    """Make the training windows and the holdout from the newest of what is stored.

    The stretch read is bounded by `max_windows`, four times over for pauses, so a full ring never fills the memory.
    """
    reader = SampleReader(Path(job.store))
    most = 4 * (task.training.max_windows + MAX_HOLDOUT)
    since = 0 if task.window.waveform else most * task.window.stride * job.wiring.step_ns
    first = reader.newest_ns(job.wiring.tags) - since if since else 0
    limits = {
        ref: most if task.window.waveform and ref in job.wiring.signals else MAX_SAMPLES for ref in job.wiring.tags
    }
    stored = ((ref, reader.columns(ref, first, limits[ref])) for ref in job.wiring.tags)
    columns = {ref: column for ref, column in stored if column is not None}
    reader.close()
    return split(task, corrected(stored_windows(job.wiring, columns), job.corrections))


if __name__ == "__main__":
    sys.exit(main())
