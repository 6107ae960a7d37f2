"""The session that an ONNX graph without weights and a flat vector make together. No torch, no onnx."""

import numpy as np
import onnxruntime as ort

from models.delta import Layout, Vector

OPSET = 17
MAX_GRAPH_BYTES = 4 * 1024 * 1024
# Windows, and values in them, that one run takes at most; a graph's first run is of that many too.
_MAX_BATCH, _MAX_VALUES = 256, 1_000_000
# Where an external initializer says that it lives. It is no file: the weights come from memory.
LOCATION = "tundish-weights"


def batch_of(channels: int, length: int) -> int:
    """How many windows (C, T) one run may take."""
    return max(1, min(_MAX_BATCH, _MAX_VALUES // (channels * length)))


def make_session(
    graph: bytes, layout: Layout, vector: Vector, *, threads: int, provider: str = "CPUExecutionProvider"
) -> ort.InferenceSession:
    """Build a session from a checked graph and weights (layout.size,), about 2 ms for a compact net.

    `threads` is explicit and the threads do not spin, so that a gateway's other work keeps its cores. The vector is
    copied: ONNX Runtime reads it for as long as the session lives.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    views = layout.split(np.array(vector, np.float32, copy=True))
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(view)) for view in views.values()]
    options.add_external_initializers(list(views), values)
    return ort.InferenceSession(graph, options, providers=[provider])
