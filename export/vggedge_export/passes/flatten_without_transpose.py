"""Flatten channels first, and permute the rows of the dense layer behind it instead of the tensor.

Keras flattens (h, w, c), so tf2onnx puts a Transpose before the flatten and computes the new shape with
Shape, Gather, Slice and Concat on every inference. Permuting the weights once gives the same numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from vggedge_export.graph import Graph, attribute, make_node, nodes_of

if TYPE_CHECKING:
    import onnx

_TO_CHANNELS_LAST = [0, 2, 3, 1]
_ELEMENTWISE = frozenset({"Relu", "Sigmoid", "Tanh", "Dropout", "Identity"})


def run(graph: Graph) -> int:
    """Rewrite every [Transpose ->] Reshape that flattens (N, C, H, W) into ``Flatten``."""
    changes = 0
    shapes = graph.shapes()
    for reshape in nodes_of(graph, "Reshape"):
        turned = graph.producer(reshape.input[0])
        is_turned = turned is not None and turned.op_type == "Transpose"
        source = turned.input[0] if turned is not None and is_turned else reshape.input[0]
        shape = shapes.get(source, ())
        is_image = len(shape) == 4 and all(isinstance(size, int) and size for size in shape[1:])
        if not is_image or len(shapes.get(reshape.output[0], ())) != 2:
            continue
        channels, height, width = (int(size) for size in shape[1:])
        dense = _dense_behind(graph, reshape)
        if dense is None or len(graph.weights[dense.input[1]]) != channels * height * width:
            continue
        if is_turned:
            if attribute(turned, "perm") != _TO_CHANNELS_LAST:
                continue
            _permute_rows(graph, dense, channels)
        flat = make_node("Flatten", [source], reshape.output[0], reshape.name, axis=1)
        graph.nodes[graph.index(reshape)] = flat
        changes += 1
    return changes


def _dense_behind(graph: Graph, reshape: onnx.NodeProto) -> onnx.NodeProto | None:
    """The MatMul with constant weights that alone reads the flattened tensor, past elementwise ops."""
    node = graph.only_consumer(reshape.output[0])
    while node is not None and node.op_type in _ELEMENTWISE:
        node = graph.only_consumer(node.output[0])
    is_dense = node is not None and node.op_type == "MatMul" and node.input[1] in graph.weights
    return node if is_dense else None


def _permute_rows(graph: Graph, dense: onnx.NodeProto, channels: int) -> None:
    old = dense.input[1]
    weights = graph.weights[old]  # rows in the order (h, w, c)
    places = math.prod(weights.shape[:1]) // channels
    rows = weights.reshape(places, channels, -1).transpose(1, 0, 2)  # (c, h*w, out)
    dense.input[1] = graph.derive(old, f"{old}_chw", rows.reshape(weights.shape))
