"""What federation is measured against: each plant alone, and all data in one place. Run as a child, reaches torch.

`python -m edge.lab.baseline JOB OUT`: same net, same first weights, the data that the gateways stored, and as many
optimiser steps as the federation made: a plant alone as many as its gateway, all data together as many as all of
them. Each plant scales with its own normalisation, and every model is judged on each plant's own held-out test.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge.dataset import Dataset
from edge.infer import Scorer
from edge.lab.figures import Comparison, Plant
from edge.memory import Memory
from edge.store import State
from edge.trainer import stored_dataset
from models.delta import Layout, Vector
from models.errors import LocalError
from models.evaluate import auroc
from models.fit import fit, set_threads
from models.scale import Scale
from models.spec import Task, parse_task


def _load(plant: Plant, task: Task) -> tuple[Dataset, Dataset, Scale]:
    train, _ = stored_dataset(task, plant.job)
    with np.load(plant.test, allow_pickle=False) as z:
        test = Dataset(z["x"], z["y"].astype(np.float32))
    state = State(Path(plant.job.store))
    scale = Memory(state, task.name).scale()
    state.close()
    if scale is None:
        raise LocalError(f"{plant.name} has not trained")
    return train, test, scale


def _worth(scorer: Scorer, test: Dataset) -> float:
    """The task's metric; for anomaly the AUROC of the error against the labels that only the test has."""
    if scorer.task.kind != "anomaly" or test.y is None:
        return scorer.metric(test)
    inputs = np.nan_to_num(scorer.scale.inputs(scorer.task, test.x)).reshape(len(test), -1)
    return auroc(test.y, ((scorer.outputs(test.x) - inputs) ** 2).mean(1))


def compare(c: Comparison) -> dict[str, object]:
    """Train the baselines and judge everything: metrics per plant, and of the global model version by version."""
    job = c.plants[0].job
    task, layout = parse_task(job.task_text), Layout.from_wire(job.layout)
    plants = [_load(plant, task) for plant in c.plants]
    with np.load(c.models, allow_pickle=False) as z:
        graph, versions, vectors = z["graph"].tobytes(), z["versions"].tolist(), z["vectors"]

    def judge(vector: Vector) -> list[float]:
        scorers = [Scorer.build(task, 0, graph, layout, vector, scale) for _, _, scale in plants]
        return [_worth(scorer, test) for scorer, (_, test, _) in zip(scorers, plants, strict=True)]

    def learn(x: list[NDArray[np.float32]], y: list[NDArray[np.float32]], steps: int) -> Vector:
        inputs = np.concatenate(x)
        targets = np.concatenate(y) if y else None
        return fit(task, layout, vectors[0], inputs, targets, seed=c.seed, steps=steps).vector

    inputs = [scale.inputs(task, train.x) for train, _, scale in plants]
    targets = [scale.targets(task, train.y) for train, _, scale in plants if train.y is not None]
    set_threads(1)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        whole = pool.submit(learn, inputs, targets, sum(plant.steps for plant in c.plants))
        jobs = [pool.submit(learn, [x], targets[i : i + 1], c.plants[i].steps) for i, x in enumerate(inputs)]
        alone, together = [job.result() for job in jobs], whole.result()
    curve = [judge(vector) for vector in vectors]
    return {
        "windows": [len(train) for train, _, _ in plants],
        "test_windows": [len(test) for _, test, _ in plants],
        "silo": [judge(vector)[i] for i, vector in enumerate(alone)],
        "centralised": judge(together),
        "curve": [{"version": v, "metric": m} for v, m in zip(versions, curve, strict=True)],
        "federated": curve[-1],
    }


def main() -> int:
    """Read the comparison, write the figures."""
    comparison = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Comparison)
    Path(sys.argv[2]).write_bytes(msgspec.json.encode(compare(comparison)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
