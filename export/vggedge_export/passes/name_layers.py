"""Name nodes, tensors and weights after their Keras layers: ``block3_conv2``, ``block3_conv2/relu``, ``fc1/kernel``.

Reports, calibration, engines and profilers quote these names; an engineer finds their own layer in them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from vggedge_export.graph import INPUT, OUTPUT, Graph

if TYPE_CHECKING:
    import onnx

_WEIGHT_ROLES = {
    "Conv": ("kernel", "bias"),
    "Gemm": ("kernel", "bias"),
    "MatMul": ("kernel",),
    "BatchNormalization": ("scale", "shift", "mean", "variance"),
}
_HEAD_ROLES = {
    "Cast": "cast",
    "Transpose": "transpose",
    "Mul": "scale",
    "Div": "scale",
    "Add": "offset",
    "Sub": "offset",
}
_ROLES_OF_FOLLOWERS = frozenset({"Relu", "Softmax", "Sigmoid", "Tanh", "Clip", "Identity", "Add", "Mul", "Sub", "Div"})


def run(graph: Graph) -> int:
    """Rename everything; returns the number of nodes that got a new name."""
    taken: set[str] = set()
    with_weights = {_owner(graph, node) for node in graph.nodes}
    layer: str | None = None  # until the first one: the head of the graph
    changes = 0
    for node in graph.nodes:
        owner = _owner(graph, node)
        before, layer = layer, owner or _layer_without_weights(node) or layer
        is_follower = (
            node.op_type in _ROLES_OF_FOLLOWERS or layer in with_weights or (layer == before and layer in taken)
        )
        if layer is None and node.name.startswith("head/grey"):
            wanted = node.name
        elif layer is None:
            wanted = f"head/{_HEAD_ROLES.get(node.op_type, node.op_type.lower())}"
        else:
            wanted = layer if owner or not is_follower else f"{layer}/{_role(node)}"
        wanted = _free_name(wanted, taken)
        taken.add(wanted)
        changes += node.name != wanted
        _rename(graph, node, wanted)
    return changes


def _free_name(wanted: str, taken: set[str]) -> str:
    """``wanted``, numbered from 2 where a layer is used twice or two ops have one role."""
    numbered = (f"{wanted}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([wanted], numbered) if name not in taken)


def _role(node: onnx.NodeProto) -> str:
    return str(node.op_type).lower()


def _owner(graph: Graph, node: onnx.NodeProto) -> str | None:
    """The layer whose weights the node reads."""
    return next((graph.layer_of[name] for name in node.input if name in graph.layer_of), None)


def _layer_without_weights(node: onnx.NodeProto) -> str | None:
    """The layer in the node's scope, for ops that are layers by themselves (pooling, flatten, LRN)."""
    is_grey = node.name.startswith("head/grey")  # grey.py
    if is_grey or node.op_type in _ROLES_OF_FOLLOWERS or node.op_type in {"Cast", "Transpose"}:
        return None
    return str(node.name).partition("/")[0] or None


def _rename(graph: Graph, node: onnx.NodeProto, name: str) -> None:
    node.name = name
    if not graph.is_output(node.output[0]):
        # A layer may be called like the graph's input or output; its tensor may not.
        graph.rename_tensor(node.output[0], f"{name}/result" if name in (INPUT, OUTPUT) else name)
    weights = [entry for entry in node.input if entry in graph.weights]
    roles = _WEIGHT_ROLES.get(node.op_type, ("value",))
    for index, old in enumerate(weights):
        role = roles[index] if index < len(roles) else f"value{index}"
        new = f"{name}/{role}"
        if old not in (INPUT, OUTPUT) and new not in graph.weights and len(graph.consumers(old)) == 1:
            graph.rename_tensor(old, new)
