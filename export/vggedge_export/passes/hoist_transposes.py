"""Move every Transpose up against the flow: pairs cancel, and one is left, right after the head's Cast.

Keras works channels last, TensorRT and ONNX Runtime channels first. A Transpose that survives between two
layers is a kernel of its own on every inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.graph import Graph, attribute, clone, make_node, nodes_of

if TYPE_CHECKING:
    import onnx

_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Clip", "Max", "Min"})


def run(graph: Graph) -> int:
    """Hoist and cancel until nothing moves; returns the number of moves."""
    moves = 0
    while _move_one(graph):
        moves += 1
    return moves


def _move_one(graph: Graph) -> bool:
    return any(_cancel(graph, node) or _hoist(graph, node) for node in nodes_of(graph, "Transpose"))


def _cancel(graph: Graph, node: onnx.NodeProto) -> bool:
    """Transpose after Transpose: one of both, or none if they undo each other."""
    before = graph.producer(node.input[0])
    if before is None or before.op_type != "Transpose":
        return False
    first, second = attribute(before, "perm"), attribute(node, "perm")
    combined = [first[axis] for axis in second]
    source = before.input[0]
    if combined != sorted(combined):
        merged = make_node("Transpose", [source], node.output[0], node.name, perm=combined)
        graph.nodes[graph.index(node)] = merged
    elif graph.is_output(node.output[0]):
        return False
    else:
        graph.read_from(node.output[0], source)
    graph.drop_unused()
    return True


def _hoist(graph: Graph, node: onnx.NodeProto) -> bool:
    """``Transpose(f(x, c))`` becomes ``f(Transpose(x), Transpose(c))`` for an elementwise f and constants c."""
    above = graph.producer(node.input[0])
    if above is None or above.op_type not in _ELEMENTWISE or len(graph.consumers(above.output[0])) != 1:
        return False
    moving = [name for name in above.input if name and name not in graph.weights]
    perm = attribute(node, "perm")
    if len(moving) != 1 or any(graph.weights[n].ndim > len(perm) for n in above.input if n in graph.weights):
        return False
    turned = graph.new_name(f"{moving[0]}_nchw")
    inputs = [turned if n == moving[0] else _transposed(graph, n, perm) for n in above.input]
    lifted = make_node("Transpose", [moving[0]], turned, node.name, perm=perm)
    lower: onnx.NodeProto = clone(above)
    lower.input[:] = inputs
    lower.output[:] = [node.output[0]]
    position = graph.index(above)
    graph.nodes = [other for other in graph.nodes if other is not above and other is not node]
    graph.nodes[position:position] = [lifted, lower]
    return True


def _transposed(graph: Graph, name: str, perm: list[int]) -> str:
    """Name of the constant in the new layout; what has one element broadcasts in every layout."""
    if not name or graph.weights[name].size == 1:
        return name
    array = graph.weights[name]
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    twin = graph.new_name(f"{name}_nchw")
    graph.weights[twin] = np.transpose(full, perm)
    if name in graph.layer_of:
        graph.layer_of[twin] = graph.layer_of[name]
    return twin
