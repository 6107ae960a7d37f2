"""torch -> ONNX graph, once per net, without its weights.

Every weight becomes an external initializer of its layout name, and a session is built by handing the weights over in
memory (ONNX Runtime `SessionOptions.add_external_initializers`). They are replaced before the graph is optimised;
`add_initializer` replaces them after, so constants folded from a weight (a GroupNorm's scale) keep their old value.
"""

import argparse
import io
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from models.delta import Layout, Vector
from models.fit import arrays_of, build_net, load_vector
from models.graph import LOCATION, OPSET, make_session
from models.graphcheck import check_graph, golden_input, with_golden
from models.spec import Task, load_task

_TOLERANCE = 1e-4


def export(task: Task, seed: int) -> tuple[bytes, Layout, Vector]:
    """Make the net; return its ONNX graph without weights, its layout, and first weights drawn from `seed`.

    Raises ArithmeticError when ONNX Runtime and torch disagree on the same input by more than 1e-4.
    """
    torch.manual_seed(seed)
    net = build_net(task).eval()
    layout = Layout.of(arrays_of(net))
    vector = layout.join(arrays_of(net))
    # Traced with weights that are all different: the exporter merges parameters of equal value into one.
    traced = vector + np.random.default_rng(seed).normal(0, 0.05, vector.size).astype(np.float32)
    load_vector(net, layout, traced)
    example = torch.randn(2, *task.input_shape)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated; its successor brings onnxscript and renames the weights.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean")  # GroupNorm looks at the shape
        torch.onnx.export(
            net,
            (example,),
            buffer,  # type: ignore[arg-type]
            input_names=["x"],
            output_names=["y"],
            opset_version=OPSET,
            dynamo=False,
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
            do_constant_folding=False,
        )
    graph = _strip(buffer.getvalue(), layout)
    check_graph(graph, layout)
    weights, window = golden_input(layout, task.input_shape)
    graph = with_golden(graph, _outputs(net, layout, weights, torch.from_numpy(window)))
    _check_parity(net, graph, layout, vector, example)
    return graph, layout, vector


def _strip(model: bytes, layout: Layout) -> bytes:
    """Turn the initializers that the layout names into external ones."""
    proto = onnx.load_from_string(model)
    proto.producer_name, proto.producer_version = "tundish", ""
    found = set()
    for tensor in proto.graph.initializer:
        if tensor.name not in layout.names:
            continue
        found.add(tensor.name)
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", LOCATION), ("offset", "0"), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
    missing = set(layout.names) - found
    if missing:
        raise ValueError(f"the exporter lost {sorted(missing)}")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data


def _check_parity(net: torch.nn.Module, graph: bytes, layout: Layout, vector: Vector, x: torch.Tensor) -> None:
    """Compare both runtimes, on weights that are not the ones the graph was traced with."""
    session = make_session(graph, layout, vector, threads=1)
    expected = _outputs(net, layout, vector, x)
    got = session.run(None, {"x": x.numpy()})[0]
    gap = float(np.abs(got - expected).max())
    if not gap <= _TOLERANCE * max(1.0, float(np.abs(expected).max())):
        raise ArithmeticError(f"ONNX Runtime {onnxruntime.__version__} and torch differ by {gap:g}")


def _outputs(net: torch.nn.Module, layout: Layout, vector: Vector, x: torch.Tensor) -> NDArray[np.float32]:
    load_vector(net, layout, vector)
    with torch.no_grad():
        found: NDArray[np.float32] = net(x).numpy()
    return found


def main() -> int:
    """Write `--out` (npz: graph, vector, layout as JSON) for `--task`; the aggregator runs this as a child."""
    parser = argparse.ArgumentParser(prog="python -m models.export", description=main.__doc__)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    task, _ = load_task(args.task)
    graph, layout, vector = export(task, args.seed)
    wire = np.frombuffer(layout.to_json().encode(), np.uint8)
    np.savez(args.out, graph=np.frombuffer(graph, np.uint8), vector=vector, layout=wire)
    return 0


if __name__ == "__main__":
    sys.exit(main())
