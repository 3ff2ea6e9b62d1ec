"""FP16 as a cast graph, and the rounding twin that shows on a CPU what FP16 does to the answers."""

from __future__ import annotations

import numpy as np

from vggedge_export.completion import SHAPE_OPS
from vggedge_export.graph import Graph, Weight, attribute, make_node, nodes_of
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError

_LARGEST = float(np.finfo(np.float16).max)  # 65504
_LOG_SIGMOID = frozenset({"Neg", "Softplus"})  # completion.py; exp(12) alone leaves FP16's range


def float16_graph(graph: Graph) -> Graph:
    """Cast an FP32 graph to FP16: weights and activations; the softmax stays in FP32.

    The uint8 input is cast straight to FP16, which holds every value from 0 to 255 exactly. The output stays
    float32: the exponentials of a softmax leave FP16's range from logits of 11 on.

    Raises:
        ConversionError: a weight is too large for FP16; the message names its layer.
    """
    onnx = require("onnx", "export")
    twin = graph.copy()
    for name, array in twin.weights.items():
        twin.weights[name] = _float16_weight(name, array)
    for cast in nodes_of(twin, "Cast"):
        if attribute(cast, "to") == onnx.TensorProto.FLOAT:
            _set_cast_type(cast, onnx.TensorProto.FLOAT16)
    _keep_tail_in_float32(twin)
    return twin


def rounding_twin(graph: Graph) -> Graph:
    """The same graph in FP32 with every FP16 result rounded to FP16 where the FP16 graph would.

    ONNX Runtime computes FP16 graphs in FP32 on a CPU and drops the casts between the layers, so that what
    it answers says nothing about FP16. Here each FP16 tensor is a float32 tensor that went through
    Cast(float16) and Cast(float32); overflow becomes infinity as on the device. What stays different is the
    order and the width of the sums inside one kernel (TensorRT sums FP16 products in FP32 or FP16).
    """
    onnx = require("onnx", "export")
    half = _float16_tensors(graph)
    twin = graph.copy()
    for name, array in twin.weights.items():
        if array.dtype == np.float16:
            twin.weights[name] = array.astype(np.float32)
    rounded = []
    for node in twin.nodes:
        rounded.append(node)
        if node.op_type == "Cast" and attribute(node, "to") == onnx.TensorProto.FLOAT16:
            _set_cast_type(node, onnx.TensorProto.FLOAT)
        result = node.output[0]
        if result in half:
            exact, narrow = f"{result}/exact", f"{result}/fp16"
            node.output[0] = exact
            rounded.append(make_node("Cast", [exact], narrow, to=onnx.TensorProto.FLOAT16))
            rounded.append(make_node("Cast", [narrow], result, f"{result}/fp32", to=onnx.TensorProto.FLOAT))
    twin.nodes = rounded
    return twin


def _float16_weight(name: str, array: Weight) -> Weight:
    if array.dtype != np.float32:
        return array
    largest = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))  # no copy, as abs() would be
    if not largest <= _LARGEST:  # NaN too
        raise ConversionError(
            f"{name}: a weight is {largest:.4g}, and FP16 ends at {_LARGEST:.0f}. Export without fp16, or retrain "
            "with weight decay so that the layer's weights shrink."
        )
    return array.astype(np.float16)


def _keep_tail_in_float32(graph: Graph) -> None:
    """Cast to FP32 before the softmax and what makes logits of sigmoids for it; without a softmax, cast the output."""
    onnx = require("onnx", "export")
    first = last = next(node for node in graph.nodes if graph.is_output(node.output[0]))
    while first.op_type in SHAPE_OPS and (above := graph.producer(first.input[0])) is not None:
        first = above
    to_float = {"to": onnx.TensorProto.FLOAT}
    if first.op_type == "Softmax":
        while (above := graph.producer(first.input[0])) is not None and above.op_type in _LOG_SIGMOID:
            first = above
        wide = f"{first.name}/fp32"
        graph.nodes.insert(graph.index(first), make_node("Cast", [first.input[0]], wide, **to_float))
        first.input[0] = wide
    else:
        result, narrow = last.output[0], f"{last.name}/fp16"
        last.output[0] = narrow
        graph.nodes.append(make_node("Cast", [narrow], result, f"{last.name}/cast", **to_float))


def _float16_tensors(graph: Graph) -> set[str]:
    """Tensors that are float16 when the graph runs as it stands."""
    onnx = require("onnx", "export")
    half = {name for name, array in graph.weights.items() if array.dtype == np.float16}
    found: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "Cast":
            is_half = attribute(node, "to") == onnx.TensorProto.FLOAT16
        elif node.op_type == "QuantizeLinear":
            is_half = False  # int8, whatever its scale's type
        elif node.op_type == "DequantizeLinear":
            is_half = node.input[1] in half  # the scale's type decides
        else:
            is_half = any(name in half or name in found for name in node.input)
        if is_half:
            found.add(node.output[0])
    return found


def _set_cast_type(cast: object, code: int) -> None:
    for entry in cast.attribute:  # type: ignore[attr-defined]
        if entry.name == "to":
            entry.i = code
