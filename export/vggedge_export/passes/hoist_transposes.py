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

_ELEMENTWISE = frozenset(
    {
        "Add", "Sub", "Mul", "Div", "Max", "Min", "Relu", "LeakyRelu", "Elu", "Selu", "Sigmoid", "Tanh", "Clip",
        "Erf", "Exp", "Neg", "Softplus", "Softsign",
    }
)  # fmt: skip
_REDUCTIONS = ("ReduceMean", "ReduceMax")  # global pooling, as tf2onnx writes it
_PASSED = _ELEMENTWISE | {*_REDUCTIONS, "Pad", "Concat"}
_TO_FIRST, _TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def run(graph: Graph) -> int:
    """Hoist and cancel until nothing moves; returns the number of moves."""
    shapes = graph.shapes()
    moves = sum(_name_the_move(graph, node, shapes) for node in nodes_of(graph, "Reshape"))
    ranks = {name: len(shape) for name, shape in shapes.items()}
    for _ in range(2):  # again at the end, for what has other readers lets no Transpose through before
        moves += sum(_reduce_other_axes(graph, node) for node in nodes_of(graph, *_REDUCTIONS))
        while _move_one(graph, ranks):
            moves += 1
    return moves + _drop_idle_reshapes(graph)


def _move_one(graph: Graph, ranks: dict[str, int]) -> bool:
    return any(
        _cancel(graph, node) or _join_reshape(graph, node) or _hoist(graph, node, ranks)
        for node in nodes_of(graph, "Transpose")
    )


def _name_the_move(graph: Graph, node: onnx.NodeProto, shapes: dict[str, tuple[int | str, ...]]) -> bool:
    """Write a Reshape that is the layout change of one channel, or of one pixel, as the Transpose it came from."""
    before, after = shapes.get(node.input[0], ()), shapes.get(node.output[0], ())
    if len(before) != 4 or len(after) != 4 or not all(isinstance(size, int) and size for size in before[1:]):
        return False
    for perm, channels, places in ((_TO_FIRST, before[3], before[1:3]), (_TO_LAST, before[1], before[2:])):
        if after[1:] == tuple(before[axis] for axis in perm[1:]) and (channels == 1 or places == (1, 1)):
            graph.nodes[graph.index(node)] = make_node(
                "Transpose", [node.input[0]], node.output[0], node.name, perm=perm
            )
            return True
    return False


def _drop_idle_reshapes(graph: Graph) -> int:
    """Remove each Reshape to the shape that its input has now: one pixel's layout change, once the others met."""
    shapes = graph.shapes()
    idle = [
        node
        for node in nodes_of(graph, "Reshape")
        if len(shape := shapes.get(node.input[0], ())) == 4
        and all(isinstance(size, int) and size for size in shape[1:])
        and shapes.get(node.output[0], ())[1:] == shape[1:]
        and not graph.is_output(node.output[0])
    ]
    for node in idle:
        graph.remove(node)
    return len(idle)


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


def _join_reshape(graph: Graph, node: onnx.NodeProto) -> bool:
    """Transpose after a Reshape to one pixel, (N, 1, 1, C), which may as well give (N, C, 1, 1) right away."""
    before, perm = graph.producer(node.input[0]), attribute(node, "perm")
    if before is None or before.op_type != "Reshape" or graph.only_consumer(node.input[0]) is None:
        return False
    shape = graph.weights.get(before.input[1], np.zeros(0, np.int64))
    if len(shape) != len(perm) or perm[0] != 0 or (shape[1:] != 1).sum() > 1:
        return False
    turned = graph.derive(before.input[1], f"{before.input[1]}_nchw", shape[perm])
    graph.nodes[graph.index(node)] = make_node("Reshape", [before.input[0], turned], node.output[0], before.name)
    graph.drop_unused()
    return True


def _reduce_other_axes(graph: Graph, node: onnx.NodeProto) -> bool:
    """Put the opposite Transpose before a reduction that one leads to, and reduce the axes that this moves to.

    Both then meet on the way up and cancel. With keepdims the result would be in the new layout; there the Transpose
    behind it is hoisted across the reduction instead.
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
    """A Transpose that leads to ``node``, and past it to ``node`` alone, through what one can be hoisted across."""
    for name in node.input:
        above = graph.producer(name)
        if above is not None and above.op_type == "Transpose":
            return above
        if above is not None and above.op_type in _ELEMENTWISE and graph.only_consumer(name) is not None:
            found = _transpose_above(graph, above)
            if found is not None:
                return found
    return None


def _meets_transpose(graph: Graph, tensor: str) -> bool:
    """Whether a Transpose of ``tensor`` would find another one on its way up."""
    waiting, seen = [tensor], set[str]()
    while waiting:
        name = waiting.pop()
        above = graph.producer(name)
        if name in seen or above is None:
            continue
        if above.op_type == "Transpose":
            return True
        seen.add(name)
        waiting.extend(above.input if above.op_type in _PASSED else ())
    return False


def _hoist(graph: Graph, node: onnx.NodeProto, ranks: dict[str, int]) -> bool:
    """``Transpose(f(x, c))`` becomes ``f(Transpose(x), Transpose(c))`` for a fitting f and constants c.

    Where others read f(x, c) too, as in a residual network, all that turn it the same way read the new f; the rest
    gets it through the opposite Transpose, which meets another one further down. Channels last does not move: it
    belongs before the flatten (flatten_without_transpose.py), and moving both ways would never end.
    """
    above, perm = graph.producer(node.input[0]), attribute(node, "perm")
    if above is None or perm == _TO_LAST or graph.is_output(above.output[0]):
        return False
    readers = graph.consumers(above.output[0])
    alike = [each for each in readers if each.op_type == "Transpose" and attribute(each, "perm") == perm]
    if len(alike) < len(readers) and perm != _TO_FIRST:
        return False
    moving = list(dict.fromkeys(name for name in above.input if name and name not in graph.weights))
    if not moving or any(ranks.get(name) != len(perm) for name in moving):
        return False
    is_chain = len(alike) == len(readers) == len(moving) == 1
    if not is_chain and not all(_meets_transpose(graph, name) for name in moving):
        return False  # more would come of it than go
    lower = _in_new_layout(graph, above, perm)
    if lower is None:
        return False
    turned = {name: graph.new_name(f"{name}_nchw") for name in moving}
    result = node.output[0]
    lower.input[:] = [turned.get(name, name) for name in lower.input]
    lower.output[:] = [result]
    lifted = [make_node("Transpose", [name], turned[name], perm=perm) for name in moving]
    opposite = make_node("Transpose", [result], above.output[0], perm=list(np.argsort(perm)))
    position = graph.index(above)
    gone = [above, *alike]
    kept = [other for other in graph.nodes[position:] if all(other is not each for each in gone)]
    graph.nodes[position:] = [*lifted, lower, *([opposite] if len(alike) < len(readers) else []), *kept]
    for each in alike:
        graph.read_from(each.output[0], result)
    ranks.update(dict.fromkeys([result, *turned.values()], len(perm)))
    return True


def _in_new_layout(graph: Graph, node: onnx.NodeProto, perm: list[int]) -> onnx.NodeProto | None:
    """A copy of ``node`` whose constants and attributes fit inputs in the new layout; None if it cannot have one."""
    lower: onnx.NodeProto = clone(node)
    constants = {index: name for index, name in enumerate(node.input) if name in graph.weights}
    if node.op_type in _ELEMENTWISE:
        if any(graph.weights[name].ndim > len(perm) for name in constants.values()):
            return None
        for index, name in constants.items():
            lower.input[index] = _transposed(graph, name, perm)
    elif node.op_type in _REDUCTIONS and 1 in constants and attribute(node, "keepdims", 1):
        axes = {int(axis) % len(perm) for axis in graph.weights[node.input[1]]}
        moved = np.array([place for place, axis in enumerate(perm) if axis in axes], np.int64)
        lower.input[1] = graph.derive(node.input[1], f"{node.input[1]}_moved", moved)
    elif node.op_type == "Pad" and 1 in constants and len(node.input) < 4:
        pads = graph.weights[node.input[1]].reshape(2, -1)[:, perm].reshape(-1)
        lower.input[1] = graph.derive(node.input[1], f"{node.input[1]}_nchw", pads)
    elif node.op_type == "Concat" and not constants:
        axis = next(entry for entry in lower.attribute if entry.name == "axis")
        axis.i = perm.index(axis.i % len(perm))
    else:
        return None
    return lower


def _transposed(graph: Graph, name: str, perm: list[int]) -> str:
    """Name of the constant in the new layout; what has one element broadcasts in every layout."""
    if not name or graph.weights[name].size == 1:
        return name
    array = graph.weights[name]
    full = array.reshape((1,) * (len(perm) - array.ndim) + array.shape)
    return graph.derive(name, f"{name}_nchw", np.transpose(full, perm))
