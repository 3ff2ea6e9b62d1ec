"""FP16 as a cast graph, and the rounding twin that shows on a CPU what FP16 does to the answers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.completion import SHAPE_OPS
from vggedge_export.graph import Graph, Weight, attribute, make_node, nodes_of
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError

if TYPE_CHECKING:
    import onnx

_LARGEST = float(np.finfo(np.float16).max)  # 65504

EXACT = "/exact"
"""Behind a tensor's name in a rounding twin: its values before they are rounded."""

HEADROOM = 2.0
"""How much larger than on any calibration image a tensor may become before FP16 turns it into infinity."""

_WITH_WEIGHTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization"})
_LOG_SIGMOID = frozenset({"Neg", "Softplus"})  # completion.py; exp(12) alone leaves FP16's range


def overflowing_nodes(graph: Graph, largest: Mapping[str, float]) -> dict[str, float]:
    """Nodes of an FP32 graph that would leave FP16's range, and the largest magnitude that each meets.

    A node is one of them if a float tensor that it reads or gives, or a weight of it, is too large. Tensors are given
    some headroom, because calibration images are a sample; weights are known exactly.

    Args:
        graph: FP32 graph.
        largest: largest magnitude of its float tensors over the calibration images (calibration.py).
    """
    limit = _LARGEST / HEADROOM
    weights = {name: _magnitude(array) for name, array in graph.weights.items() if array.dtype == np.float32}
    found = {}
    for node in graph.nodes:
        met = [largest.get(name, 0.0) for name in (*node.input, *node.output)]
        constants = [weights[name] for name in node.input if name in weights]
        if max(met) > limit or not all(each <= _LARGEST for each in constants):  # NaN too
            found[node.name] = max([*met, *constants])
    return found


def float16_graph(graph: Graph, wide: Collection[str] = ()) -> Graph:
    """Cast an FP32 graph to FP16: weights and activations; a softmax at the end stays in FP32.

    The uint8 input is cast straight to FP16, which holds every value from 0 to 255 exactly. The output stays
    float32: the exponentials of a softmax leave FP16's range from logits of 11 on.

    Args:
        graph: FP32 graph; not changed.
        wide: names of nodes that stay in FP32 (``overflowing_nodes``), with casts around them.

    Raises:
        ConversionError: a weight of a node that is not ``wide`` is too large for FP16; the message names its layer.
    """
    onnx = require("onnx", "export")
    twin = graph.copy()
    floats = _tensors_of_type(twin, onnx.TensorProto.FLOAT)
    kept = {name for node in nodes_of(twin, "Resize") for name in node.input[1:3]}  # which ONNX wants in FP32
    _give_wide_nodes_weights_of_their_own(twin, wide)
    kept |= {name for node in twin.nodes if node.name in wide for name in node.input if name in twin.weights}
    for name, array in twin.weights.items():
        twin.weights[name] = array if name in kept else _float16_weight(twin, name, array)
    for node in twin.nodes:
        if node.name in wide:
            continue
        if node.op_type == "Cast" and attribute(node, "to") == onnx.TensorProto.FLOAT:
            _set_cast_type(node, onnx.TensorProto.FLOAT16)
        elif node.op_type == "ConstantOfShape":
            _set_fill_type(node)
    still_wide = set(wide) | _keep_tail_in_float32(twin, wide)
    _cast_between(twin, floats, still_wide)
    return twin


def _give_wide_nodes_weights_of_their_own(graph: Graph, wide: Collection[str]) -> None:
    """Let a wide node read a copy of a weight that another node reads in FP16."""
    for node in graph.nodes:
        for place, name in enumerate(node.input):
            if node.name not in wide or name not in graph.weights or graph.weights[name].dtype != np.float32:
                continue
            if any(reader.name not in wide for reader in graph.consumers(name)):
                node.input[place] = graph.derive(name, f"{name}_fp32", graph.weights[name])


def _cast_between(graph: Graph, floats: set[str], wide: set[str]) -> None:
    """Cast what FP16 nodes give and ``wide`` ones read to FP32, and the other way round; once a tensor and type."""
    onnx = require("onnx", "export")
    makers = {name: node for node in graph.nodes for name in node.output}
    cast: dict[tuple[str, bool], str] = {}
    for node in list(graph.nodes):
        is_wide = node.name in wide
        for place, name in enumerate(node.input):
            if name not in floats or name not in makers or (makers[name].name in wide) == is_wide:
                continue
            if (name, is_wide) not in cast:
                # Not ".../fp16": that is the rounding twin's.
                result = graph.free_name(f"{node.name}/{'fp32' if is_wide else 'from_fp32'}")
                code = onnx.TensorProto.FLOAT if is_wide else onnx.TensorProto.FLOAT16
                graph.nodes.insert(graph.index(node), make_node("Cast", [name], result, to=code))
                cast[name, is_wide] = result
            node.input[place] = cast[name, is_wide]


def has_float16(graph: Graph) -> bool:
    """Whether any tensor of ``graph`` is FP16; its weights need not be, where all layers with weights stay in FP32."""
    return require("onnx", "export").TensorProto.FLOAT16 in graph.element_types().values()


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
            exact, narrow = f"{result}{EXACT}", f"{result}/fp16"
            node.output[place] = exact
            rounded.append(make_node("Cast", [exact], narrow, to=onnx.TensorProto.FLOAT16))
            rounded.append(make_node("Cast", [narrow], result, f"{result}/fp32", to=onnx.TensorProto.FLOAT))
    twin.nodes = rounded
    return twin


def _float16_weight(graph: Graph, name: str, array: Weight) -> Weight:
    if array.dtype != np.float32:
        return array
    largest = _magnitude(array)
    if not largest <= _LARGEST:  # NaN too
        is_weight = any(node.op_type in _WITH_WEIGHTS for node in graph.consumers(name))
        what, cure = ("weight", ", or retrain with weight decay") if is_weight else ("constant", "")
        raise ConversionError(
            f"{name}: a {what} is {largest:.4g}, and FP16 ends at {_LARGEST:.0f}. Export with --precision fp32{cure}."
        )
    return array.astype(np.float16)


def _keep_tail_in_float32(graph: Graph, wide: Collection[str]) -> set[str]:
    """Names of the softmax and of what makes logits of sigmoids for it; without a softmax, cast an FP16 output."""
    first = last = next(node for node in graph.nodes if graph.is_output(node.output[0]))
    tail = {last.name}
    while first.op_type in SHAPE_OPS and (above := graph.producer(first.input[0])) is not None:
        first = above
        tail.add(first.name)
    if first.op_type != "Softmax":
        if last.name in wide:
            return set()
        onnx = require("onnx", "export")
        result, narrow = last.output[0], f"{last.name}/fp16"
        last.output[0] = narrow
        graph.nodes.append(make_node("Cast", [narrow], result, f"{last.name}/cast", to=onnx.TensorProto.FLOAT))
        return set()
    while (above := graph.producer(first.input[0])) is not None and above.op_type in _LOG_SIGMOID:
        first = above
        tail.add(first.name)
    return tail


def _magnitude(array: Weight) -> float:
    """The largest one; NaN if there is any. Infinities do not count: FP16 has them, too."""
    largest = max(float(array.max(initial=0.0)), -float(array.min(initial=0.0)))  # no copy, as abs() would be
    return _magnitude(array[np.isfinite(array)]) if math.isinf(largest) else largest


def _float16_tensors(graph: Graph) -> set[str]:
    """Tensors that are float16 when the graph runs as it stands."""
    return _tensors_of_type(graph, require("onnx", "export").TensorProto.FLOAT16)


def _tensors_of_type(graph: Graph, code: int) -> set[str]:
    types = graph.element_types()
    results = [name for node in graph.nodes for name in node.output]
    unknown = [name for name in results if name and name not in types]
    if unknown:
        raise ConversionError(
            f"{unknown[0]}: ONNX's inference does not tell its type, so FP16 cannot be made or emulated there. Export "
            "with --precision fp32."
        )
    return {name for name in results if types.get(name) == code}


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
