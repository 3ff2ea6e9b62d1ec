"""INT8 as explicit Q/DQ nodes, placed as TensorRT fuses them.

One Quantize-Dequantize pair on the input of every quantised convolution and dense layer, one Dequantize on
its int8 weights, nothing else: nothing between a layer and its relu, nothing around pooling, flatten or
softmax. TensorRT moves each pair up through relu and pooling, and these then run in INT8 by themselves.
Source: NVIDIA, "Working with Quantized Types", explicit quantization; checked against built engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vggedge_export.graph import INPUT, Graph, make_node, nodes_of
from vggedge_runtime.errors import ConversionError, ModelError

if TYPE_CHECKING:
    import onnx

_STEPS = 127  # symmetric: -127..127, zero point 0, the only one that TensorRT takes on a GPU
_SMALLEST_SCALE = {
    np.dtype(np.float16): float(np.finfo(np.float16).smallest_normal),  # below it an FP16 scale loses its digits
    np.dtype(np.float32): 2.0**-64,  # far below any weight, and its product with another scale is still a number
}
"""What a channel of zeros gets, too: a scale has to be above 0."""


@dataclass(frozen=True)
class QuantizationRecipe:
    """Where a graph's scales lie.

    Attributes:
        per_channel: one weight scale an output channel (TensorRT), or one a tensor (TensorRT-RTX, whose
            kernels otherwise give their results back in FP32).
        quantize_first: the first convolution, the most sensitive layer, too.
        quantize_last: the layer that makes the logits too.
    """

    per_channel: bool
    quantize_first: bool = True
    quantize_last: bool = False


_KERNELS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_SHAPES = frozenset({"Shape", "Size"})
_SHAPED_BY_INPUT = frozenset({"Expand", "Reshape", "Tile"})

INT8 = QuantizationRecipe(per_channel=True)
INT8_RTX = QuantizationRecipe(per_channel=False)


def quantized_layers(graph: Graph, recipe: QuantizationRecipe) -> list[onnx.NodeProto]:
    """Nodes that ``recipe`` quantises, in order.

    Left are layers that compute their own kernel, which then has no INT8 weights, and those that do not see the image,
    as the first step of an unrolled LSTM on its state of zeros. The last are all that no other kernel follows.
    """
    seeing = _tensors_of_image(graph)
    layers = [
        node for node in nodes_of(graph, "Conv", "Gemm") if node.input[1] in graph.weights and node.input[0] in seeing
    ]
    layers = layers if recipe.quantize_first else layers[1:]
    if recipe.quantize_last:
        return layers
    followed = _followed_by_kernel(graph)
    return [node for node in layers if node.output[0] in followed]


def _tensors_of_image(graph: Graph) -> set[str]:
    """Tensors whose values depend on the image, and not on its shape alone."""
    found = {INPUT}
    for node in graph.nodes:
        # The shape to which something is made says nothing of the image.
        values = node.input[:1] if node.op_type in _SHAPED_BY_INPUT else node.input
        if node.op_type not in _SHAPES and found.intersection(values):
            found.update(node.output)
    return found


def _followed_by_kernel(graph: Graph) -> set[str]:
    """Tensors on which a convolution or dense layer further down depends."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.op_type in _KERNELS or found.intersection(node.output):
            found.update(node.input)
    return found


def check_quantizable(graph: Graph, recipe: QuantizationRecipe) -> None:
    """Raise ModelError where ``recipe`` finds nothing to quantise: an INT8 graph would be the FP32 one."""
    if not quantized_layers(graph, recipe):
        found = ", ".join(node.name for node in nodes_of(graph, "Conv", "Gemm")) or "none"
        raise ModelError(
            f"no layer to quantise: INT8 needs a convolution or dense layer before the last one, and of these the "
            f"model has: {found}. Export with --precision fp32,fp16."
        )


def input_scales(graph: Graph, recipe: QuantizationRecipe, magnitudes: Mapping[str, float]) -> dict[str, float]:
    """Scale of every quantised layer's input, by the layer's name.

    Args:
        graph: FP32 graph, before any cast: the exact scale of its head is recognised there.
        recipe: what to quantise.
        magnitudes: for each of these layers the input magnitude that INT8 step 127 is to stand for.
    """
    scales = {layer.name: magnitudes[layer.name] / _STEPS for layer in quantized_layers(graph, recipe)}
    exact = exact_input_scale(graph)
    return {name: exact.get(name, scale) for name, scale in scales.items()}


def underflowing_layers(graph: Graph, scales: Mapping[str, float]) -> dict[str, float]:
    """Layers whose INT8 scale would fall below FP16's smallest normal number, with the magnitude that it belongs to.

    In FP16 such a scale loses its digits; the layer has to stay in FP32. Equalisation can bring one about.

    Args:
        graph: FP32 graph.
        scales: of the inputs of layers that are to be INT8, by name.
    """
    smallest = _STEPS * _SMALLEST_SCALE[np.dtype(np.float16)]
    found = {}
    for layer in nodes_of(graph, "Conv", "Gemm"):
        if layer.name not in scales:
            continue
        kernel = graph.weights[layer.input[1]]
        magnitudes = (_STEPS * scales[layer.name], max(float(kernel.max()), -float(kernel.min())))
        if min(magnitudes) < smallest:
            found[layer.name] = min(magnitudes)
    return found


def exact_input_scale(graph: Graph) -> dict[str, float]:
    """Scale of the input of all layers that read the head, by name, where it maps pixels onto INT8 steps exactly.

    Rescaling(1/128, offset=-1) makes pixel p into (p - 128) / 128. At scale 1/128 that is the int8 value
    p - 128, from -128 to 127: nothing is rounded and nothing is clipped. It has to be whole pixels, of the image
    or its grey, that are mapped so. Else there is none.
    """
    head = next(nodes_of(graph, "Conv", "Gemm")).input[0]
    scaled = _without_constant(graph, head, "Add", -1.0)
    pixels = _without_constant(graph, scaled, "Mul", 1 / 128) if scaled is not None else None
    if pixels is None or not _are_whole(graph, pixels):
        return {}
    return {layer.name: 1 / 128 for layer in nodes_of(graph, "Conv", "Gemm") if layer.input[0] == head}


def _are_whole(graph: Graph, tensor: str) -> bool:
    """Whether ``tensor`` is integers, cast to float and at most moved."""
    node = graph.producer(tensor)
    while node is not None and node.op_type in {"Transpose", "Reshape"}:
        node = graph.producer(node.input[0])
    return node is not None and node.op_type == "Cast"  # the graph casts from integers only, in its head


def _without_constant(graph: Graph, tensor: str, op: str, constant: float) -> str | None:
    """What ``tensor`` was before ``op`` with that one number, which may be either operand; None if it is not so."""
    node = graph.producer(tensor)
    if node is None or node.op_type != op:
        return None
    for data, name in (tuple(node.input), tuple(node.input)[::-1]):
        array = graph.weights.get(name)
        if array is not None and array.size == 1 and float(array.reshape(())) == constant:
            return str(data)
    return None


def quantized_graph(graph: Graph, recipe: QuantizationRecipe, scales: Mapping[str, float]) -> Graph:
    """Insert the Q/DQ nodes of ``recipe``.

    Args:
        graph: FP32 or FP16 graph with (out, in, ...) weights; not changed. Scales take the type of the
            weights, so that what is dequantised has the type of its surroundings.
        recipe: what to quantise.
        scales: of the layers' inputs, by name (``input_scales``). A layer that is not among them stays in float:
            that is how a precision plan is carried out.

    Raises:
        ConversionError: a scale is of no layer that ``recipe`` quantises; ignored, it would leave one in float.
    """
    twin = graph.copy()
    layers = quantized_layers(twin, recipe)
    if unknown := sorted(set(scales) - {layer.name for layer in layers}):
        raise ConversionError(
            f"INT8 scales for {', '.join(unknown)}, and the layers to quantise are "
            f"{', '.join(layer.name for layer in layers) or 'none'}. This is a defect in vggedge."
        )
    for layer in layers:
        if layer.name not in scales:
            continue
        data, kernel = layer.input[0], layer.input[1]
        dtype = twin.weights[kernel].dtype
        scale = dtype.type(max(scales[layer.name], _SMALLEST_SCALE[dtype]))
        layer.input[0] = _quantize_activation(twin, layer, data, scale)
        layer.input[1] = _quantize_weights(twin, layer, kernel, recipe.per_channel)
    twin.drop_unused()
    return twin


def _quantize_activation(graph: Graph, layer: onnx.NodeProto, data: str, scale: np.floating) -> str:
    """Put Q -> DQ between ``data`` and ``layer``; returns the dequantised tensor's name."""
    names = {role: f"{layer.name}/input_{role}" for role in ("scale", "zero_point", "int8", "dequantized")}
    graph.weights[names["scale"]] = np.array(scale)
    graph.weights[names["zero_point"]] = np.array(0, np.int8)
    parameters = [names["scale"], names["zero_point"]]
    position = graph.index(layer)
    graph.nodes[position:position] = [
        make_node("QuantizeLinear", [data, *parameters], names["int8"]),
        make_node("DequantizeLinear", [names["int8"], *parameters], names["dequantized"]),
    ]
    return names["dequantized"]


def _quantize_weights(graph: Graph, layer: onnx.NodeProto, kernel: str, per_channel: bool) -> str:
    """Replace ``kernel`` by int8 steps and a DQ; returns the dequantised tensor's name."""
    names = {role: f"{kernel}_{role}" for role in ("int8", "scale", "zero_point", "dequantized")}
    if names["int8"] in graph.weights:  # a layer that is used twice
        return names["dequantized"]
    steps, scale = int8_steps(graph.weights[kernel], per_channel)
    graph.weights[names["int8"]] = steps
    graph.weights[names["scale"]] = scale
    graph.weights[names["zero_point"]] = np.zeros(scale.shape, np.int8)
    inputs = [names["int8"], names["scale"], names["zero_point"]]
    graph.nodes.insert(graph.index(layer), make_node("DequantizeLinear", inputs, names["dequantized"], axis=0))
    return names["dequantized"]


def int8_steps(weights: NDArray[np.floating], per_channel: bool) -> tuple[NDArray[np.int8], NDArray[np.floating]]:
    """Round ``weights`` (out, in, ...) to int8 steps: (steps, scale of shape () or (out,)).

    The scale is rounded to the weights' own type first, and the steps are counted in the rounded one.
    """
    rows = weights.reshape(len(weights), -1)
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1)).astype(np.float32)  # no copy, as abs() would be
    extent = largest if per_channel else largest.max()
    scale = np.maximum(extent / _STEPS, _SMALLEST_SCALE[weights.dtype]).astype(weights.dtype)
    divisors = np.broadcast_to(scale.astype(np.float32), len(rows))
    steps = np.empty(rows.shape, np.int8)
    for index, row in enumerate(rows):  # row by row: fc1 of VGG-16 would need 1.2 GB of scratch at once
        steps[index] = np.clip(np.rint(row.astype(np.float32) / divisors[index]), -_STEPS, _STEPS)
    return steps.reshape(weights.shape), scale
