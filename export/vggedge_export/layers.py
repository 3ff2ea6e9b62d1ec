"""What the convolutions and dense layers of a graph cost, compute in, and lose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from vggedge_export.float16 import EXACT
from vggedge_export.graph import INPUT, Graph, nodes_of, value_info
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.errors import ConversionError
from vggedge_runtime.evidence import LayerRecord
from vggedge_runtime.preprocess import Pixels

if TYPE_CHECKING:
    import onnx

_KERNELS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def layer_macs(graph: Graph) -> dict[str, int]:
    """Multiply-accumulates for one image of every convolution and dense layer with weights, by name, in order.

    A layer whose size ONNX's shape inference does not tell counts its weights once.
    """
    shapes = graph.shapes()
    return {
        node.name: _macs(node, graph.weights[node.input[1]].shape, shapes)
        for node in nodes_of(graph, *_KERNELS)
        if node.input[1] in graph.weights
    }


def layer_outputs(graph: Graph, images: Pixels, scratch: Path) -> dict[str, NDArray[np.float32]]:
    """What every convolution and dense layer gives for ``images``, by name; all at once, so of few images.

    Args:
        graph: FP32 graph or rounding twin, whose layers give what is rounded; not changed.
        images: uint8 (n, h, w, 3).
        scratch: file to write a probing graph to; removed again.
    """
    results = {node.name: _result(graph, node) for node in nodes_of(graph, *_KERNELS)}
    shapes = graph.shapes()
    known = {name: tensor for name, tensor in results.items() if tensor in shapes and not graph.is_output(tensor)}
    if not known:
        return {}
    probe = graph.copy()
    probe.outputs = [value_info(tensor, np.float32, shapes[tensor]) for tensor in known.values()]
    probe.drop_unused()
    probe.write(scratch)
    session = open_ort_session(scratch)
    scratch.unlink()
    answers = [session.run(None, {INPUT: image[np.newaxis]}) for image in images]
    return {name: np.concatenate(parts) for name, parts in zip(known, zip(*answers, strict=True), strict=True)}


def signal_to_noise(
    reference: Mapping[str, NDArray[np.float32]], found: Mapping[str, NDArray[np.float32]]
) -> dict[str, float | None]:
    """Signal-to-noise ratio of every layer that both have, decibels; None where there is no difference at all.

    Raises:
        ConversionError: a layer gives NaN or infinity, and so has no such ratio.
    """
    ratios: dict[str, float | None] = {}
    for name, wanted in reference.items():
        if name not in found or found[name].shape != wanted.shape:
            continue
        signal = float(np.square(wanted, dtype=np.float64).sum())
        if not (np.isfinite(wanted).all() and np.isfinite(found[name]).all()):
            raise ConversionError(
                f"{name}: gives NaN or infinity on an evaluation image. It leaves the range of its type there, and did "
                "so on no calibration image: calibrate on images like that, or leave the precision out (--precision)."
            )
        noise = float(np.square(wanted - found[name], dtype=np.float64).sum())
        ratios[name] = 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None
    return ratios


def layer_records(
    graph: Graph,
    macs: Mapping[str, int],
    *,
    largest: Mapping[str, float],
    scales: Mapping[str, float],
    snr_db: Mapping[str, float | None],
) -> tuple[LayerRecord, ...]:
    """One record a layer of ``graph``.

    Args:
        graph: as it is shipped.
        macs: ``layer_macs`` of the float graph that it came from.
        largest: of the float graph's tensors (calibration.py).
        scales: of the inputs of layers in INT8, by layer.
        snr_db: by layer.
    """
    return tuple(
        LayerRecord(
            name=node.name,
            op=node.op_type,
            precision=_precision(graph, node),
            macs=macs[node.name],
            largest_output=largest.get(node.output[0]),
            int8_magnitude=127 * scales[node.name] if node.name in scales else None,
            snr_db=snr_db.get(node.name),
        )
        for node in nodes_of(graph, *_KERNELS)
        if node.name in macs
    )


def _precision(graph: Graph, node: onnx.NodeProto) -> Literal["fp32", "fp16", "int8"]:
    kernel = graph.weights.get(node.input[1])
    if kernel is None:  # behind a DequantizeLinear
        return "int8"
    return "fp16" if kernel.dtype == np.float16 else "fp32"


def _result(graph: Graph, node: onnx.NodeProto) -> str:
    """The tensor that ``node`` gives; in a rounding twin it is rounded by nodes of its own."""
    result = str(node.output[0])
    rounded = result.removesuffix(EXACT)
    return rounded if graph.producer(rounded) is not None else result


def _macs(node: onnx.NodeProto, kernel: tuple[int, ...], shapes: Mapping[str, tuple[int | str, ...]]) -> int:
    """For one image. Each weight is used at every place of a convolution's map, and once in a dense layer."""
    if node.op_type == "MatMul" and node.output[0] in shapes:
        return kernel[-2:][0] * _known(shapes[node.output[0]][1:])  # (in, out) or (in,), whatever lies before
    places = shapes.get(node.input[0] if node.op_type == "ConvTranspose" else node.output[0], ())[2:]
    return math.prod(kernel) * (1 if node.op_type == "MatMul" else _known(places))


def _known(axes: tuple[int | str, ...]) -> int:
    return math.prod(size for size in axes if isinstance(size, int) and size > 0)
