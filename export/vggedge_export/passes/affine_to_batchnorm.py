"""Mul and Add with one value a channel become one BatchNormalization.

TensorFlow computes an inference-time BatchNorm as two broadcasts. As one BatchNormalization node it keeps
its layer's name, TensorRT reads it as one Scale layer, and ONNX Runtime keeps its blocked layout across it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.graph import Graph, make_node, nodes_of

if TYPE_CHECKING:
    import onnx


def run(graph: Graph) -> int:
    """Rewrite every per-channel Mul -> Add on (N, C, H, W) tensors; the image's normalisation is left alone."""
    changes = 0
    for mul in nodes_of(graph, "Mul"):
        add = graph.only_consumer(mul.output[0])
        if add is None or add.op_type != "Add":
            continue
        data, scale = _split(graph, mul)
        _, shift = _split(graph, add)
        if data is None or scale is None or shift is None or _is_head(graph, data):
            continue
        _rewrite(graph, mul, add, data, scale, shift)
        changes += 1
    return changes


def _split(graph: Graph, node: onnx.NodeProto) -> tuple[str | None, str | None]:
    """(data, per-channel constant) of a commutative node; None where it is not of that form."""
    constants = [name for name in node.input if name in graph.weights]
    data = [name for name in node.input if name not in graph.weights]
    if len(constants) != 1 or len(data) != 1:
        return None, None
    shape = (1,) * (4 - graph.weights[constants[0]].ndim) + graph.weights[constants[0]].shape
    per_channel = len(shape) == 4 and shape[0] == shape[2] == shape[3] == 1 and shape[1] > 1
    return data[0], constants[0] if per_channel else None


def _is_head(graph: Graph, data: str) -> bool:
    source = graph.producer(data)
    return source is None or source.op_type in {"Transpose", "Cast"}


def _rewrite(graph: Graph, mul: onnx.NodeProto, add: onnx.NodeProto, data: str, scale: str, shift: str) -> None:
    channels = graph.weights[scale].size
    parts = {
        "scale": graph.weights[scale].reshape(channels),
        "shift": graph.weights[shift].reshape(channels),
        # Mean 0, variance 1 and epsilon 0 leave the arithmetic what it was, to the last bit.
        "mean": np.zeros(channels, np.float32),
        "variance": np.ones(channels, np.float32),
    }
    names = [graph.derive(scale, f"{add.output[0]}_{role}", array) for role, array in parts.items()]
    merged = make_node("BatchNormalization", [data, *names], add.output[0], mul.name, epsilon=0.0)
    graph.nodes[graph.index(add)] = merged
    graph.nodes = [node for node in graph.nodes if node is not mul]
