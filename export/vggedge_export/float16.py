"""FP16 as a cast graph, and the rounding twin that shows on a CPU what FP16 does to the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.completion import SHAPE_OPS
from vggedge_export.graph import Graph, Weight, attribute, make_node, nodes_of
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError

if TYPE_CHECKING:
    import onnx

_LARGEST = float(np.finfo(np.float16).max)  # 65504
_WITH_WEIGHTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
_LOG_SIGMOID = frozenset({"Neg", "Softplus"})  # completion.py; exp(12) alone leaves FP16's range


def float16_graph(graph: Graph) -> Graph:
    """Cast an FP32 graph to FP16: weights and activations; a softmax at the end stays in FP32.

    The uint8 input is cast straight to FP16, which holds every value from 0 to 255 exactly. The output stays
    float32: the exponentials of a softmax leave FP16's range from logits of 11 on.

    Raises:
        ConversionError: a weight is too large for FP16; the message names its layer.
    """
    onnx = require("onnx", "export")
    twin = graph.copy()
    kept = {name for node in nodes_of(twin, "Resize") for name in node.input[1:3]}  # which ONNX wants in FP32
    for name, array in twin.weights.items():
        twin.weights[name] = array if name in kept else _float16_weight(twin, name, array)
    for cast in nodes_of(twin, "Cast"):
        if attribute(cast, "to") == onnx.TensorProto.FLOAT:
            _set_cast_type(cast, onnx.TensorProto.FLOAT16)
    for fill in nodes_of(twin, "ConstantOfShape"):
        _set_fill_type(fill)
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
        for place, result in enumerate(node.output):
            if result not in half:
                continue
            exact, narrow = f"{result}/exact", f"{result}/fp16"
            node.output[place] = exact
            rounded.append(make_node("Cast", [exact], narrow, to=onnx.TensorProto.FLOAT16))
            rounded.append(make_node("Cast", [narrow], result, f"{result}/fp32", to=onnx.TensorProto.FLOAT))
    twin.nodes = rounded
    return twin


def _float16_weight(graph: Graph, name: str, array: Weight) -> Weight:
    if array.dtype != np.float32:
        return array
    largest = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))  # no copy, as abs() would be
    if not largest <= _LARGEST:  # NaN too
        is_weight = any(node.op_type in _WITH_WEIGHTS for node in graph.consumers(name))
        what, cure = ("weight", ", or retrain with weight decay") if is_weight else ("constant", "")
        raise ConversionError(
            f"{name}: a {what} is {largest:.4g}, and FP16 ends at {_LARGEST:.0f}. Export with --precision fp32{cure}."
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
    types = graph.element_types()
    results = [name for node in graph.nodes for name in node.output]
    unknown = [name for name in results if name and name not in types]
    if unknown:
        raise ConversionError(
            f"{unknown[0]}: ONNX's inference does not tell its type, so FP16 cannot be emulated there. Export with "
            "--precision fp32."
        )
    return {name for name in results if types.get(name) == onnx.TensorProto.FLOAT16}


def _set_fill_type(fill: onnx.NodeProto) -> None:
    """Let a ConstantOfShape that gives float32, as it does when it says nothing, give float16."""
    onnx = require("onnx", "export")
    given = attribute(fill, "value", None)
    value = np.zeros(1, np.float32) if given is None else onnx.numpy_helper.to_array(given)
    if value.dtype == np.float32:
        del fill.attribute[:]  # it has no other
        narrow = onnx.numpy_helper.from_array(value.astype(np.float16))
        fill.attribute.append(onnx.helper.make_attribute("value", narrow))


def _set_cast_type(cast: object, code: int) -> None:
    for entry in cast.attribute:  # type: ignore[attr-defined]
        if entry.name == "to":
            entry.i = code
