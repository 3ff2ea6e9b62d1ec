"""Cross-layer equalisation: make weights fit one scale a tensor without changing what the network computes.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section
4.1 (arXiv 1906.04721). relu(s x) = s relu(x) for s > 0, so channel c of a layer may be divided by s_c if the
next layer multiplies it again; s_c is chosen so that both layers' channels span the same range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vggedge_export.graph import Graph, nodes_of

if TYPE_CHECKING:
    import onnx

_HOMOGENEOUS = frozenset({"Relu", "MaxPool", "Flatten", "Dropout", "Identity"})
_SWEEPS = 20  # ranges settle along the chain; the paper iterates to convergence, which comes well before


def equalized_graph(graph: Graph) -> Graph:
    """A graph that computes the same with channel ranges evened out between neighbouring layers."""
    twin = graph.copy()
    pairs = [(first, second) for first in nodes_of(twin, "Conv", "Gemm") if (second := _next_layer(twin, first))]
    for name in {layer.input[1] for pair in pairs for layer in pair}:
        twin.weights[name] = twin.weights[name].astype(np.float64)
    for _ in range(_SWEEPS):
        for first, second in pairs:
            _equalize(twin, first, second)
    for name, array in twin.weights.items():
        if array.dtype == np.float64:
            twin.weights[name] = array.astype(np.float32)
    return twin


def _next_layer(graph: Graph, layer: onnx.NodeProto) -> onnx.NodeProto | None:
    """The convolution or dense layer behind ``layer`` with nothing between them that scaling does not pass."""
    node = graph.only_consumer(layer.output[0])
    while node is not None and node.op_type in _HOMOGENEOUS:
        node = graph.only_consumer(node.output[0])
    return node if node is not None and node.op_type in {"Conv", "Gemm"} else None


def _equalize(graph: Graph, first: onnx.NodeProto, second: onnx.NodeProto) -> None:
    kernel, following = graph.weights[first.input[1]], graph.weights[second.input[1]]
    channels = len(kernel)
    # Behind a Flatten each channel is a run of neighbouring columns: (out, channels, places).
    columns = following.reshape(len(following), channels, -1)
    scale = _balance(np.abs(kernel.reshape(channels, -1)).max(axis=1), np.abs(columns).max(axis=(0, 2)))
    graph.weights[first.input[1]] = kernel / scale.reshape(-1, *(1,) * (kernel.ndim - 1))
    if len(first.input) > 2:
        graph.weights[first.input[2]] = graph.weights[first.input[2]].astype(np.float64) / scale
    graph.weights[second.input[1]] = (columns * scale[:, None]).reshape(following.shape)


def _balance(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """S with before / s = after * s = sqrt(before * after); 1 for a channel that is dead on either side."""
    alive = (before > 0) & (after > 0)
    return np.where(alive, np.sqrt(np.divide(before, after, out=np.ones_like(before), where=alive)), 1.0)
