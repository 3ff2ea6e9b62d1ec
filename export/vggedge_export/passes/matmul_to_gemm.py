"""MatMul and Add of a bias become one Gemm with weights as (out, in).

That is the form ONNX Runtime, OpenVINO and TensorRT know as a fully connected layer, and per-channel INT8
scales lie on axis 0, as for a convolution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.graph import Graph, make_node, nodes_of

if TYPE_CHECKING:
    import onnx


def run(graph: Graph) -> int:
    """Rewrite every MatMul of a 2-d tensor with constant weights, with or without its bias."""
    changes = 0
    shapes = graph.shapes()
    for matmul in nodes_of(graph, "MatMul"):
        data, kernel = matmul.input
        if kernel not in graph.weights or graph.weights[kernel].ndim != 2 or len(shapes.get(data, ())) != 2:
            continue
        # a view; a second layer may read the original
        turned = graph.derive(kernel, f"{kernel}_t", graph.weights[kernel].T)
        inputs, last = [data, turned], matmul
        add = graph.only_consumer(matmul.output[0])
        bias = _bias_of(graph, add, graph.weights[turned].shape[0]) if add is not None else None
        if add is not None and bias is not None:
            inputs.append(bias)
            last = add
            graph.nodes = [node for node in graph.nodes if node is not matmul]
        graph.nodes[graph.index(last)] = make_node("Gemm", inputs, last.output[0], matmul.name, transB=1)
        changes += 1
    return changes


def _bias_of(graph: Graph, add: onnx.NodeProto, units: int) -> str | None:
    """Name of the bias if ``add`` adds a constant (units,) vector, else None."""
    if add.op_type != "Add":
        return None
    names = [name for name in add.input if name in graph.weights]
    return names[0] if len(names) == 1 and np.shape(graph.weights[names[0]]) == (units,) else None
