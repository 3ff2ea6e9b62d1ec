"""Add of one value a channel straight after a convolution becomes its bias.

tf2onnx leaves it behind depthwise convolutions and those that it gave their padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.graph import Graph, nodes_of

if TYPE_CHECKING:
    import onnx


def run(graph: Graph) -> int:
    """Fold every such Add whose convolution has no other reader."""
    changes = 0
    for add in nodes_of(graph, "Add"):
        constants = [name for name in add.input if name in graph.weights]
        moving = [name for name in add.input if name not in graph.weights]
        conv = graph.producer(moving[0]) if len(moving) == len(constants) == 1 else None
        if conv is None or conv.op_type != "Conv" or graph.only_consumer(conv.output[0]) is None:
            continue
        bias = _per_channel(graph, constants[0], conv)
        if bias is None:
            continue
        if len(conv.input) > 2:
            bias = bias + graph.weights[conv.input[2]]
        conv.input[:] = [*conv.input[:2], graph.derive(constants[0], f"{constants[0]}_bias", bias)]
        conv.output[:] = add.output
        del graph.nodes[graph.index(add)]
        changes += 1
    return changes


def _per_channel(graph: Graph, constant: str, conv: onnx.NodeProto) -> np.ndarray | None:
    """The constant as (channels,), or None where it differs from place to place."""
    array = graph.weights[constant]
    if conv.input[1] not in graph.weights or (len(conv.input) > 2 and conv.input[2] not in graph.weights):
        return None
    kernel = graph.weights[conv.input[1]]
    shape = (1,) * (kernel.ndim - array.ndim) + array.shape
    if len(shape) != kernel.ndim or any(size != 1 for axis, size in enumerate(shape) if axis != 1):
        return None
    return np.broadcast_to(array.reshape(-1), (len(kernel),)).copy() if shape[1] in (1, len(kernel)) else None
