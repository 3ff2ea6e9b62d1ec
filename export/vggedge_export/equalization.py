"""Cross-layer equalisation: make weights fit one scale a tensor without changing what the network computes.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section
4.1 (arXiv 1906.04721). relu(s x) = s relu(x) for s > 0, so channel c of a layer may be divided by s_c if the
next layer multiplies it again; s_c is chosen so that both layers' channels span the same range. A maximum with one
constant f a channel, which is what a folded BatchNormalization leaves of its relu, is passed in the same way:
max(s x, s f) = s max(x, f).

The paper warns ("Absorbing high biases") that a small s_c makes a bias high, and with it the one range that all
activations share. Here a bias counts as part of its channel's range, so that s_c stays ordinary where a kernel is
next to nothing and its bias is not. A fixed limit on s_c would not do: it would stop the equalisation of channels
that are truly far apart, and still let a bias grow up to that limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vggedge_export.graph import Graph, attribute, nodes_of

if TYPE_CHECKING:
    import onnx

_HOMOGENEOUS = frozenset({"Relu", "MaxPool", "Flatten", "Dropout", "Identity"})
_TINY = 1e-30  # keeps a layer of zeros from dividing by zero
_SWEEPS = 20  # ranges settle along the chain; the paper iterates to convergence, which comes well before


@dataclass(frozen=True)
class _Pair:
    """Two neighbouring layers.

    Attributes:
        first: whose output channels are scaled.
        second: whose input channels are scaled back.
        floors: constants of the Max nodes between them (passes/fold_batchnorm_after_relu.py), which scale as a bias.
    """

    first: onnx.NodeProto
    second: onnx.NodeProto
    floors: tuple[str, ...]


def equalized_graph(graph: Graph) -> Graph:
    """A graph that computes the same with channel ranges evened out between neighbouring layers.

    The sweeps run on each layer's table of largest weights, (out, in); the weights are scaled once at the end.
    """
    twin = graph.copy()
    layers = [node for node in nodes_of(twin, "Conv", "Gemm") if node.input[1] in twin.weights]
    ranges = {layer.name: _channel_ranges(twin, layer) for layer in layers}
    found = [pair for layer in layers if (pair := _find_pair(twin, layer)) is not None]
    pairs = [pair for pair in found if _are_their_own(twin, pair)]
    scales = {pair.first.name: np.ones(len(ranges[pair.first.name])) for pair in pairs}
    constants = {pair.first.name: _constant_shares(twin, pair) for pair in pairs}
    for _ in range(_SWEEPS):
        for first, second in ((pair.first, pair.second) for pair in pairs):
            before, after = ranges[first.name], _grouped(ranges[second.name], len(ranges[first.name]))
            shares, gains = (part / scales[first.name] for part in constants[first.name])
            kernels = before.max(axis=1)
            biases = shares * (kernels.max() / max(gains.max(), _TINY))  # in units of the kernel's range
            step = _balance(np.maximum(kernels, biases), after.max(axis=(0, 2)))
            before /= step[:, None]
            after *= step[:, None]  # a view: the second layer's own table changes
            scales[first.name] *= step
    for pair in pairs:
        _apply(twin, pair, scales[pair.first.name])
    return twin


def _channel_ranges(graph: Graph, layer: onnx.NodeProto) -> NDArray[np.float64]:
    """Largest magnitude of the weights between every output and input channel: (out, in)."""
    kernel = graph.weights[layer.input[1]]
    places = kernel.reshape(*kernel.shape[:2], -1)
    largest: NDArray[np.float64] = np.maximum(places.max(axis=2), -places.min(axis=2)).astype(np.float64)
    return largest


def _constant_shares(graph: Graph, pair: _Pair) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What every output channel gives without and with its input: (constant, root of the kernel's sum of squares).

    The constant is the magnitude of the bias, or of a floor where that is more. The second is the spread of the
    channel's results for inputs of spread 1, which activations have roughly; nothing finer is needed to tell an
    ordinary bias from one that would set the range for all.
    """
    kernel = graph.weights[pair.first.input[1]]
    rows = kernel.reshape(len(kernel), -1)
    gains = np.sqrt(np.einsum("ij,ij->i", rows, rows).astype(np.float64))  # no copy of the weights
    constants = np.zeros(len(kernel))
    for name in (*pair.first.input[2:], *pair.floors):
        constants = np.maximum(constants, np.abs(graph.weights[name].reshape(-1)))
    return constants, gains


def _grouped(columns: NDArray[np.floating], channels: int) -> NDArray[np.floating]:
    """(out, in, ...) as (out, channels, places): behind a Flatten a channel is a run of neighbouring columns."""
    return columns.reshape(len(columns), channels, -1)


def _find_pair(graph: Graph, layer: onnx.NodeProto) -> _Pair | None:
    """``layer`` and the next one, where nothing stands between them that scaling does not pass.

    None where either is a grouped convolution: its kernel has fewer input channels than its input. None, too, where
    the next one computes its kernel.
    """
    floors: list[str] = []
    node = graph.only_consumer(layer.output[0])
    while node is not None:
        if (floor := _floor(graph, node, layer)) is not None:
            floors.append(floor)
        elif node.op_type not in _HOMOGENEOUS:
            break
        node = graph.only_consumer(node.output[0])
    if node is None or node.op_type not in {"Conv", "Gemm"} or node.input[1] not in graph.weights:
        return None
    is_grouped = any(attribute(each, "group", 1) != 1 for each in (layer, node))
    return None if is_grouped else _Pair(layer, node, tuple(floors))


def _floor(graph: Graph, node: onnx.NodeProto, layer: onnx.NodeProto) -> str | None:
    """The constant of a Max with one value for each of the layer's channels; None where ``node`` is no such Max."""
    constants = [name for name in node.input if name in graph.weights]
    if node.op_type != "Max" or len(node.input) != 2 or len(constants) != 1:
        return None
    kernel = graph.weights[layer.input[1]]
    shape = (1, len(kernel), *(1,) * (kernel.ndim - 2))
    return constants[0] if graph.weights[constants[0]].shape == shape else None


def _are_their_own(graph: Graph, pair: _Pair) -> bool:
    """Whether no other layer reads the weights that would be scaled."""
    return all(len(graph.consumers(name)) == 1 for name in (*pair.first.input[1:], pair.second.input[1], *pair.floors))


def _apply(graph: Graph, pair: _Pair, scale: NDArray[np.float64]) -> None:
    """Divide the output channels of the first by ``scale``, multiply the input channels of the second by it."""
    factor = scale.astype(np.float32)
    for name in (*pair.first.input[1:], *pair.floors):
        array = graph.weights[name]
        channels = 1 if name in pair.floors else 0
        graph.weights[name] = array / factor.reshape(*(1,) * channels, -1, *(1,) * (array.ndim - channels - 1))
    following = graph.weights[pair.second.input[1]]
    scaled = _grouped(following, len(factor)) * factor[:, None]
    graph.weights[pair.second.input[1]] = scaled.reshape(following.shape)


def _balance(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """S with before / s = after * s = sqrt(before * after); 1 for a channel that is dead on either side."""
    alive = (before > 0) & (after > 0)
    return np.where(alive, np.sqrt(np.divide(before, after, out=np.ones_like(before), where=alive)), 1.0)
