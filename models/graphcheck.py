"""What an ONNX graph from a peer may be: a plain net over exactly the layout's weights, and nothing else.

Run as `python -m models.graphcheck FILE`, it checks the file (npz: graph, layout as JSON, shape as C, T, outputs) in a
process of its own under a memory limit, and scores a full batch of zeros: 66 bytes of ONNX can ask for 6 GB. A graph
may say what it gives on a golden input with golden weights, as torch computed it where it was exported; then it must
give the same here, on this processor and by this ONNX Runtime.
"""

import json
import resource
import sys

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from models.delta import Layout, Vector
from models.errors import PeerError
from models.graph import LOCATION, MAX_GRAPH_BYTES, batch_of, make_session

MAX_NODES = 2_000
MAX_CONSTANT_BYTES = 64 * 1024
MEMORY_LIMIT = 2 << 30
CPU_LIMIT_S = 60
# What the nets of models/nets export to. No control flow, no functions, nothing that makes large tensors of small.
OPERATORS = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Concat", "Constant", "Conv", "Div", "Flatten", "Gather",
    "Gemm", "GlobalAveragePool", "Identity", "InstanceNormalization", "LayerNormalization", "MatMul", "MaxPool", "Mul",
    "Pow", "ReduceMax", "ReduceMean", "Relu", "Reshape", "Shape", "Sigmoid", "Slice", "Sqrt", "Squeeze", "Sub", "Tanh",
    "Transpose", "Unsqueeze",
})  # fmt: skip
_STANDARD = ("", "ai.onnx")
# The graph's metadata of that name: a JSON list of the first outputs.
_GOLDEN = "tundish-golden"
_MOST_GOLDEN, _GOLDEN_GAP = 16, 1e-3


def check_graph(graph: bytes, layout: Layout) -> None:
    """Refuse (PeerError "graph") a peer's graph that is not a plain net over exactly the layout's weights."""
    if len(graph) > MAX_GRAPH_BYTES:
        raise PeerError("graph", f"{len(graph)} bytes, at most {MAX_GRAPH_BYTES}")
    try:
        model = onnx.load_from_string(graph)
    except (DecodeError, ValueError, TypeError) as error:
        raise PeerError("graph", f"not an ONNX model: {type(error).__name__}") from error
    if model.functions or any(o.domain not in _STANDARD for o in model.opset_import):
        raise PeerError("graph", "has functions or operators of its own")
    if len(model.graph.node) > MAX_NODES:
        raise PeerError("graph", f"{len(model.graph.node)} nodes, at most {MAX_NODES}")
    if model.graph.sparse_initializer:
        raise PeerError("graph", "has sparse initializers")
    for node in model.graph.node:
        _check_node(node)
    _check_weights(model, layout)


def _check_node(node: onnx.NodeProto) -> None:
    if node.domain not in _STANDARD or node.op_type not in OPERATORS:
        raise PeerError("graph", f"operator {node.op_type[:40]!r} is not on the list")
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs:
            raise PeerError("graph", f"{node.op_type} holds a graph of its own")
        if attribute.tensors or attribute.sparse_tensors or attribute.HasField("sparse_tensor"):
            raise PeerError("graph", f"{node.op_type} holds a kind of constant that no net needs")
        if attribute.t.external_data or attribute.t.ByteSize() > MAX_CONSTANT_BYTES:
            raise PeerError("graph", f"{node.op_type} holds a large or external constant")


def _check_weights(model: onnx.ModelProto, layout: Layout) -> None:
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            if tensor.ByteSize() > MAX_CONSTANT_BYTES:
                raise PeerError("graph", f"initializer {tensor.name[:40]!r} is too large to be a constant")
            continue
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if places != [LOCATION]:
            raise PeerError("graph", f"initializer {tensor.name[:40]!r} names a file")
        if shapes.pop(tensor.name, None) != tuple(tensor.dims) or tensor.data_type != onnx.TensorProto.FLOAT:
            raise PeerError("graph", f"initializer {tensor.name[:40]!r} is not in the layout with that shape")
    if shapes:
        raise PeerError("graph", f"has no weight for {sorted(shapes)[:3]}")


def golden_input(layout: Layout, shape: tuple[int, int]) -> tuple[Vector, NDArray[np.float32]]:
    """Weights (layout.size,) and one window (1, C, T) that are the same everywhere; small, and all different."""
    weights = 0.1 * np.sin(np.arange(1, layout.size + 1, dtype=np.float64))
    window = np.cos(np.arange(1, shape[0] * shape[1] + 1, dtype=np.float64))
    return weights.astype(np.float32), window.astype(np.float32).reshape(1, *shape)


def with_golden(graph: bytes, outputs: NDArray[np.float32]) -> bytes:
    """Let a graph say its first outputs (1, outputs) on `golden_input`."""
    model = onnx.load_from_string(graph)
    values = [round(float(value), 6) for value in outputs.ravel()[:_MOST_GOLDEN]]
    model.metadata_props.add(key=_GOLDEN, value=json.dumps(values))
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _check_golden(graph: bytes, layout: Layout, shape: tuple[int, int, int]) -> None:
    said = [one.value for one in onnx.load_from_string(graph).metadata_props if one.key == _GOLDEN]
    if not said:
        return  # of a version that had none
    try:
        wanted = np.array(json.loads(said[0]), np.float64)
    except (ValueError, TypeError, RecursionError) as error:
        raise PeerError("graph", "its golden outputs are no numbers") from error
    if wanted.shape != (min(shape[2], _MOST_GOLDEN),):
        raise PeerError("graph", f"its golden outputs are {wanted.shape}, of {shape[2]}")
    weights, window = golden_input(layout, shape[:2])
    session = make_session(graph, layout, weights, threads=1)
    gap = float(np.abs(session.run(None, {"x": window})[0].ravel()[: wanted.size] - wanted).max())
    if not gap <= _GOLDEN_GAP * max(1.0, float(np.abs(wanted).max())):
        raise PeerError("graph", f"differs by {gap:.3g} on its golden input")


def first_run(graph: bytes, layout: Layout, shape: tuple[int, int, int]) -> None:
    """Check a graph, then score a full batch of zeros with it; `shape` is (C, T, outputs)."""
    check_graph(graph, layout)
    session = make_session(graph, layout, np.zeros(layout.size, np.float32), threads=1)
    many = batch_of(*shape[:2])
    out = session.run(None, {"x": np.zeros((many, *shape[:2]), np.float32)})
    if len(out) != 1 or out[0].shape != (many, shape[2]):
        due = f"for {many} windows of {shape[2]} outputs"
        raise PeerError("graph", f"gives {[list(o.shape) for o in out][:3]} {due}")
    _check_golden(graph, layout, shape)


def main() -> int:
    """Check the file named on the command line; 0, or 1 with the reason as the last line on standard error."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    # By SIGXCPU: what is killed was killed from outside.
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S + 1))
    with np.load(sys.argv[1], allow_pickle=False) as z:
        graph, layout, shape = z["graph"].tobytes(), z["layout"].tobytes(), z["shape"].tolist()
    try:
        first_run(graph, Layout.from_json(layout), (shape[0], shape[1], shape[2]))
    except PeerError as error:
        print(error.detail, file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
