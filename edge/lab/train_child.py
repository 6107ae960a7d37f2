"""A training that goes on until it is stopped, at a training child's priority: `… edge.lab.train_child MODEL TASK`."""

import sys
from itertools import count
from pathlib import Path

import numpy as np

from edge.train import Job, lower_priority
from edge.window import Wiring
from models.delta import read_export
from models.spec import parse_task

_WINDOWS = 2_000


def main() -> None:
    """Train on noise, round after round; says `training` once the first one is under way."""
    text = Path(sys.argv[2]).read_text()
    task = parse_task(text)
    _, layout, vector = read_export(Path(sys.argv[1]))
    wiring = Wiring(task.window, tuple(signal.name for signal in task.signal))
    lower_priority(
        Job(
            task_text=text, wiring=wiring, layout=layout.to_wire(), store="", seed=0, threads=1, nice=19,
            memory=1 << 40, cpu_seconds=3600,
        )
    )  # fmt: skip

    from models.fit import fit, set_threads  # noqa: PLC0415 - torch, after the priority is lowered

    set_threads(1)
    random = np.random.default_rng(0)
    x = random.normal(size=(_WINDOWS, *task.input_shape)).astype(np.float32)
    y = random.integers(task.outputs, size=_WINDOWS).astype(np.float32)
    for seed in count():
        vector = fit(task, layout, vector, x, y, seed=seed, steps=20).vector
        if not seed:
            print("training", flush=True)


if __name__ == "__main__":
    main()
