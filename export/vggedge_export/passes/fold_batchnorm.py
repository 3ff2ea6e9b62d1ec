"""BatchNormalization straight after a convolution goes into its weights (Ioffe & Szegedy 2015, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vggedge_export.graph import Graph, attribute, nodes_of

if TYPE_CHECKING:
    import onnx


def run(graph: Graph) -> int:
    """Fold every BatchNormalization whose input is a convolution that nobody else reads.

    One after a relu stays: it does not commute with the relu, and the zero padding of the next convolution
    is not the zero of the shifted tensor.
    """
    changes = 0
    for norm in nodes_of(graph, "BatchNormalization"):
        conv = graph.producer(norm.input[0])
        if conv is None or conv.op_type != "Conv" or graph.only_consumer(conv.output[0]) is None:
            continue
        if any(name not in graph.weights for name in (*conv.input[1:], *norm.input[1:])):
            continue
        _fold(graph, conv, norm)
        changes += 1
    return changes


def _fold(graph: Graph, conv: onnx.NodeProto, norm: onnx.NodeProto) -> None:
    # float64: one rounding to float32 at the end instead of four on the way
    scale, shift, mean, variance = (graph.weights[name].astype(np.float64) for name in norm.input[1:])
    factor = scale / np.sqrt(variance + attribute(norm, "epsilon", 1e-5))
    kernel_name = conv.input[1]
    kernel = graph.weights[kernel_name].astype(np.float64)  # (out, in, kh, kw)
    bias = graph.weights[conv.input[2]].astype(np.float64) if len(conv.input) > 2 else np.zeros(len(factor))

    folded = {
        "folded": (kernel * factor[:, None, None, None]).astype(np.float32),
        "bias": ((bias - mean) * factor + shift).astype(np.float32),
    }
    names = [graph.derive(kernel_name, f"{kernel_name}_{role}", array) for role, array in folded.items()]
    conv.input[:] = [conv.input[0], *names]
    graph.remove(norm)
