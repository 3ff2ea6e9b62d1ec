"""The calibrator that looks behind the layer: which INT8 range of an input leaves the layer's own output least off.

The methods of calibrators.py weigh all values of a tensor alike. A layer does not: channels of large values may meet
small weights, and then it pays to clip them and to keep digits for the others. What an error in the input does to
the output is linear, so it is the layer without its bias, applied to the difference between rounded and exact input.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vggedge_export.graph import Graph, clone, make_node, value_info

FRACTIONS = tuple(2.0 ** (-step / 2) for step in range(11))
"""Of the largest magnitude: what is tried, from all of it down to 1/32 in half octaves."""

_STEPS = 127


def output_error_probe(graph: Graph, largest: Mapping[str, float]) -> Graph:
    """A graph that gives for every tensor the sums of squared errors behind the layers that read it, (fractions,).

    The errors of all fractions go through a layer as one batch: ONNX Runtime packs the weights of every node anew, and
    a dozen copies of fc1 of VGG-16 would take 5 GB.

    Args:
        graph: FP32 graph; not changed.
        largest: largest magnitude of each tensor to be probed; convolutions and dense layers with weights read it.
    """
    probe = graph.copy()
    probe.outputs = []
    probe.weights["calibration/zero_point"] = np.array(0, np.int8)
    probe.weights["calibration/axis"] = np.array([1], np.int64)
    probe.weights["calibration/rows"] = np.array([len(FRACTIONS), -1], np.int64)
    for tensor, magnitude in largest.items():
        errors = []
        for number, fraction in enumerate(FRACTIONS):
            stem = f"{tensor}/calibration_{number}"
            probe.weights[f"{stem}_scale"] = np.array(magnitude * fraction / _STEPS, np.float32)
            parameters = [f"{stem}_scale", "calibration/zero_point"]
            errors.append(f"{stem}_error")
            probe.nodes += [
                make_node("QuantizeLinear", [tensor, *parameters], f"{stem}_steps"),
                make_node("DequantizeLinear", [f"{stem}_steps", *parameters], f"{stem}_rounded"),
                make_node("Sub", [f"{stem}_rounded", tensor], errors[-1]),
            ]
        probe.nodes.append(make_node("Concat", errors, f"{tensor}/calibration_errors", axis=0))
        readers = [node for node in graph.consumers(tensor) if _is_layer(graph, node, tensor)]
        probe.nodes += list(_errors_behind(tensor, readers))
        probe.outputs.append(value_info(f"{tensor}/calibration_sum", np.float32, [len(FRACTIONS)]))
    return probe


def best_magnitudes(largest: Mapping[str, float], answers: Iterable[Sequence[Any]]) -> dict[str, float]:
    """For every tensor the magnitude of least error, of equal ones the greatest, from the answers to all batches."""
    total = np.zeros((len(largest), len(FRACTIONS)))
    for answer in answers:
        total += np.array(answer, dtype=np.float64)
    return {
        tensor: magnitude * FRACTIONS[int(row.argmin())]
        for (tensor, magnitude), row in zip(largest.items(), total, strict=True)
    }


def _is_layer(graph: Graph, node: Any, tensor: str) -> bool:
    return node.op_type in ("Conv", "Gemm") and node.input[0] == tensor and node.input[1] in graph.weights


def _errors_behind(tensor: str, readers: Sequence[Any]) -> Iterable[Any]:
    """Nodes from the errors of ``tensor`` to their sums of squares behind all ``readers``."""
    sums = []
    for place, reader in enumerate(readers):
        stem = f"{tensor}/calibration_output_{place}"
        layer = clone(reader)
        layer.name = layer.output[0] = stem
        layer.input[:] = [f"{tensor}/calibration_errors", reader.input[1]]  # no bias: it is in both
        sums.append(f"{stem}_sum")
        yield layer
        yield make_node("Reshape", [stem, "calibration/rows"], f"{stem}_rows")
        yield make_node("ReduceSumSquare", [f"{stem}_rows", "calibration/axis"], sums[-1], keepdims=0)
    yield make_node("Sum", sums, f"{tensor}/calibration_sum")
