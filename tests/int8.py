"""Say what graphs in 8 bits would cost: a window's time in them, as a ratio to float32, for the nets of recorded sets.

    python -m tests.int8 --data DIR [--only SET,SET]

Quantised by ONNX Runtime, statically (QDQ, per channel; what it is calibrated on moves no time) and dynamically; one
window on one thread, the median of 2,000 runs, in one process. Nothing in the product uses it.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static

from edge.lab.sites import complete_task
from models.export import export
from models.spec import parse_task

TASKS = Path(__file__).parent / "tasks"
_RUNS = 2_000
_WARM = 200


class _Windows(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        self._rows: Iterator[NDArray[np.float32]] = iter(rng.normal(size=(64, 1, *shape)).astype(np.float32))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Give one window (1, C, T) of noise."""
        row = next(self._rows, None)
        return None if row is None else {"x": row}


def microseconds(file: Path, shape: tuple[int, ...]) -> float:
    """How long one window takes, at the median."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    x = np.zeros((1, *shape), np.float32)
    spent = []
    for _ in range(_WARM + _RUNS):
        start = time.perf_counter()
        session.run(None, {"x": x})
        spent.append(time.perf_counter() - start)
    return float(np.median(spent[_WARM:])) * 1e6


def compare(name: str, data: Path, folder: Path) -> str:
    """One line of the table."""
    task = parse_task(complete_task((TASKS / f"{name}.toml").read_text(), data), name)
    graph, layout, vector = export(task, 0)
    model, weights = onnx.load_from_string(graph), layout.split(vector)
    for one in model.graph.initializer:
        if one.name in weights:
            one.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weights[one.name]), one.name))
    whole, static, dynamic = (folder / f"{name}-{kind}.onnx" for kind in ("whole", "static", "dynamic"))
    onnx.save(model, whole)
    quantize_static(whole, static, _Windows(task.input_shape), per_channel=True, weight_type=QuantType.QInt8)
    quantize_dynamic(whole, dynamic, weight_type=QuantType.QUInt8)
    base, *eight = (microseconds(file, task.input_shape) for file in (whole, static, dynamic))
    ratios = " | ".join(f"{one / base:.2f}" for one in eight)
    return f"| {name} | {task.net} | {layout.size:,} | {base:.0f} | {ratios} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    only = set(filter(None, args.only.split(",")))
    sys.stdout.write("| set | net | parameters | float32, µs a window | int8 static | int8 dynamic |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        for task in sorted(TASKS.glob("*.toml")):
            data = args.data / task.stem / f"{task.stem}.npz"
            if data.exists() and (not only or task.stem in only):
                sys.stdout.write(f"{compare(task.stem, data, Path(folder))}\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
