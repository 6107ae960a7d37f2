"""One window scored on two machines: `write FOLDER` makes a model here, `score FOLDER` runs it there and compares.

`write` needs torch. `score` needs what a gateway has, and nothing of this repository but the installed program; where
torch is installed too, it also trains for one epoch.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from pathlib import Path

import numpy as np

from edge.infer import Scorer
from models.delta import Layout
from models.scale import Scale
from models.spec import load_task

STACK = ("asyncua", "pymodbus", "paho.mqtt.client", "onnxruntime", "cryptography", "cwt", "zstandard", "edge.agent")
TOLERANCE = 1e-3
TASK = """name = "arm64-probe"
kind = "classification"
net = "tcn"

[window]
length = 64

[[signal]]
name = "vibration"
unit = "g"

[[signal]]
name = "temperature"
unit = "degC"

[target]
name = "condition"
classes = ["healthy", "worn"]
"""


def write(folder: Path) -> None:
    from models.export import export  # noqa: PLC0415 - torch

    (folder / "task.toml").write_text(TASK)
    task, _ = load_task(folder / "task.toml")
    graph, layout, vector = export(task, seed=1)
    (folder / "graph.onnx").write_bytes(graph)
    (folder / "layout.json").write_text(json.dumps(layout.to_wire()))
    window = np.random.default_rng(1).normal(0, 1, task.input_shape).astype(np.float32)
    np.savez(folder / "probe.npz", vector=vector, window=window)
    score, verdict, _ = scorer(folder).score(window)
    (folder / "expected.json").write_text(json.dumps({"score": score, "verdict": verdict}))


def layout_of(folder: Path) -> Layout:
    entries = json.loads((folder / "layout.json").read_text())
    return Layout.from_wire([(name, None if shape is None else tuple(shape)) for name, shape in entries])


def scorer(folder: Path) -> Scorer:
    task, _ = load_task(folder / "task.toml")
    layout = layout_of(folder)
    with np.load(folder / "probe.npz", allow_pickle=False) as z:
        vector = z["vector"]
    scale = Scale((0.0,) * task.channels, (1.0,) * task.channels)
    return Scorer.build(task, 1, (folder / "graph.onnx").read_bytes(), layout, vector, scale)


def score(folder: Path) -> int:
    for name in STACK:
        importlib.import_module(name)
    expected = json.loads((folder / "expected.json").read_text())
    with np.load(folder / "probe.npz", allow_pickle=False) as z:
        window = z["window"]
    found, verdict, _ = scorer(folder).score(window)
    same = verdict == expected["verdict"] and abs(found - expected["score"]) < TOLERANCE
    said = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "imported": STACK,
        "score": found,
        "verdict": verdict,
        "expected": expected,
        "same": same,
        "trained": train(folder) if importlib.util.find_spec("torch") else None,
    }
    print(json.dumps(said))  # noqa: T201
    return 0 if same else 1


def train(folder: Path) -> dict[str, object]:
    import torch  # noqa: PLC0415 - only where it is installed

    from models.fit import fit  # noqa: PLC0415

    task, _ = load_task(folder / "task.toml")
    layout = layout_of(folder)
    with np.load(folder / "probe.npz", allow_pickle=False) as z:
        vector = z["vector"]
    y = np.arange(64, dtype=np.float32) % 2
    x = np.random.default_rng(2).normal(0, 1, (64, *task.input_shape)).astype(np.float32) + y[:, None, None]
    fitted = fit(task, layout, vector, x, y, seed=1)
    moved = float(np.abs(fitted.vector - vector).max())
    return {"torch": torch.__version__, "steps": fitted.steps, "loss": float(fitted.loss), "largest_step": moved}


if __name__ == "__main__":
    place = Path(sys.argv[2])
    if sys.argv[1] == "write":
        write(place)
    else:
        sys.exit(score(place))
