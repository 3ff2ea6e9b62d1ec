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
_REDUCTIONS = ("ReduceMean", "ReduceMax")  # global pooling, as tf2onnx writes it


def run(graph: Graph) -> int:
    """Hoist and cancel until nothing moves; returns the number of moves."""
    moves = sum(_reduce_other_axes(graph, node) for node in nodes_of(graph, *_REDUCTIONS))
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


def _reduce_other_axes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Put the opposite Transpose before a reduction that one leads to, and reduce the axes that this moves to.

    Both then meet on the way up and cancel. With keepdims the result would be in the new layout; that is left alone.
    """
    turned = _transpose_above(graph, node)
    if turned is None or attribute(node, "keepdims", 1) or len(node.input) < 2 or node.input[1] not in graph.weights:
        return False
    perm = attribute(turned, "perm")
    axes = {int(axis) % len(perm) for axis in graph.weights[node.input[1]]}
    kept = [place for axis, place in enumerate(perm) if axis not in axes]
    if not axes or kept != sorted(kept):
        return False
    back = graph.new_name(f"{node.input[0]}_back")
    opposite = make_node("Transpose", [node.input[0]], back, perm=list(np.argsort(perm)))
    graph.nodes.insert(graph.index(node), opposite)
    moved = np.array(sorted(perm[axis] for axis in axes), np.int64)
    node.input[:] = [back, graph.derive(node.input[1], f"{node.input[1]}_moved", moved)]
    return True


def _transpose_above(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Transpose that leads to ``node`` through nothing but what one can be hoisted across."""
    while True:
        data = [name for name in node.input if name and name not in graph.weights]
        above = graph.producer(data[0]) if len(data) == 1 else None
        if above is None or graph.only_consumer(above.output[0]) is None:
            return None
        if above.op_type == "Transpose":
            return above
        if above.op_type not in _ELEMENTWISE:
            return None
        node = above


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
    return graph.derive(name, f"{name}_nchw", np.transpose(full, perm))
