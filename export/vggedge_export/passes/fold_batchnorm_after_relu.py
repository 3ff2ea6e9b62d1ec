"""BatchNormalization behind a relu goes into the convolution before it: y = s relu(x) + t = max(s x + t, t) for s >= 0.

So the convolution's kernel and bias take s and t, as where no relu stands between, and the relu becomes a maximum with
one constant a channel. The tensor y itself stays what it was: the zeros of the next convolution's padding, a max-pool
and the INT8 range are untouched, and no division by a small s makes anything large. For s < 0 the channel is computed
with its sign turned, max(-s x - t, -t), and the next layer's weights turn it back.

Not in the table of passes: where this gains anything is measured by benchmarks/batchnorm_fold.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vggedge_export.graph import Graph, attribute, make_node, nodes_of

if TYPE_CHECKING:
    import onnx

_SIGN_PASSES = frozenset({"Flatten", "Dropout", "Identity"})  # what a turned sign passes; a max-pool does not


def run(graph: Graph) -> int:
    """Fold every BatchNormalization behind layer -> Relu where nobody reads the tensors between.

    Left alone are those with a negative scale whose sign the next layer cannot turn back: behind a max-pool, before a
    grouped convolution, or where more than one node reads the result.
    """
    changes = 0
    for norm in nodes_of(graph, "BatchNormalization"):
        relu = _sole_producer(graph, norm.input[0], "Relu")
        layer = _sole_producer(graph, relu.input[0], "Conv", "Gemm") if relu is not None else None
        if relu is None or layer is None or not _is_plain(graph, layer, norm):
            continue
        scale, shift = _affine(graph, norm)
        sign = np.where(scale < 0, -1.0, 1.0)
        if (sign < 0).any():
            following = _next_layer(graph, norm)
            if following is None:
                continue
            _turn_inputs(graph, following, sign)
        _fold(graph, layer, np.abs(scale), sign * shift)
        _replace_relu(graph, relu, norm, layer, sign * shift)
        changes += 1
    return changes


def _sole_producer(graph: Graph, tensor: str, *ops: str) -> onnx.NodeProto | None:
    """The node of type ``ops`` that makes ``tensor``, where one node alone reads that."""
    node = graph.producer(tensor)
    found = node is not None and node.op_type in ops and graph.only_consumer(tensor) is not None
    return node if found else None


def _is_plain(graph: Graph, layer: onnx.NodeProto, norm: onnx.NodeProto) -> bool:
    """Whether all that changes is FP32 constants, one value a channel, and finite when changed."""
    names = (*layer.input[1:], *norm.input[1:])
    if any(name not in graph.weights or graph.weights[name].dtype != np.float32 for name in names):
        return False
    if layer.op_type == "Gemm" and not _is_dense(layer):
        return False
    scale, shift = _affine(graph, norm)
    if len(layer.input) > 2 and graph.weights[layer.input[2]].shape != scale.shape:
        return False  # a Gemm's may be one number for all
    largest = max(float(np.abs(graph.weights[name]).max(initial=0.0)) for name in layer.input[1:])
    return bool(np.all(np.abs(scale) * largest + np.abs(shift) < np.finfo(np.float32).max))  # False for NaN, too


def _is_dense(gemm: onnx.NodeProto) -> bool:
    """Whether a Gemm is x W' + b."""
    wanted = {"transA": 0, "transB": 1, "alpha": 1.0, "beta": 1.0}
    return all(attribute(gemm, name, 0 if name.startswith("trans") else 1.0) == value for name, value in wanted.items())


def _affine(graph: Graph, norm: onnx.NodeProto) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(s, t) of y = s x + t, a channel each, in float64: one rounding to float32 at the end."""
    gamma, beta, mean, variance = (graph.weights[name].astype(np.float64) for name in norm.input[1:])
    scale = gamma / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    return scale, beta - mean * scale


def _next_layer(graph: Graph, norm: onnx.NodeProto) -> onnx.NodeProto | None:
    """The layer that can turn signs back: it alone reads the result, and its weights are constants of its own."""
    node = graph.only_consumer(norm.output[0])
    while node is not None and node.op_type in _SIGN_PASSES:
        node = graph.only_consumer(node.output[0])
    if node is None or node.op_type not in {"Conv", "Gemm"} or node.input[1] not in graph.weights:
        return None
    if len(graph.consumers(node.input[1])) != 1 or attribute(node, "group", 1) != 1:
        return None
    return node if node.op_type == "Conv" or _is_dense(node) else None


def _turn_inputs(graph: Graph, layer: onnx.NodeProto, sign: NDArray[np.float64]) -> None:
    kernel = graph.weights[layer.input[1]]
    channels = kernel.reshape(len(kernel), len(sign), -1)  # behind a Flatten a channel is a run of columns
    graph.weights[layer.input[1]] = (channels * sign.astype(np.float32)[:, None]).reshape(kernel.shape)


def _fold(graph: Graph, layer: onnx.NodeProto, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> None:
    kernel = graph.weights[layer.input[1]].astype(np.float64)
    bias = graph.weights[layer.input[2]].astype(np.float64) if len(layer.input) > 2 else np.zeros(len(scale))
    parts = {
        "kernel": (kernel * scale.reshape(-1, *(1,) * (kernel.ndim - 1))).astype(np.float32),
        "bias": (bias * scale + shift).astype(np.float32),
    }
    for place, (role, array) in enumerate(parts.items(), start=1):
        old = layer.input[place] if place < len(layer.input) else None
        if old is not None and len(graph.consumers(old)) == 1:
            graph.weights[old] = array  # keeps its name, by which its layer is known
            continue
        new = graph.derive(old or layer.input[1], f"{layer.name}/{role}", array)
        layer.input[:] = [*layer.input[:place], new, *layer.input[place + 1 :]]


def _replace_relu(
    graph: Graph, relu: onnx.NodeProto, norm: onnx.NodeProto, layer: onnx.NodeProto, floor: NDArray[np.float64]
) -> None:
    places = graph.weights[layer.input[1]].ndim - 2 if layer.op_type == "Conv" else 0
    constant = floor.astype(np.float32).reshape(1, -1, *(1,) * places)
    name = graph.derive(norm.input[1], f"{norm.name}/floor", constant)
    graph.nodes[graph.index(norm)] = make_node("Max", [relu.input[0], name], norm.output[0], norm.name)
    del graph.nodes[graph.index(relu)]
