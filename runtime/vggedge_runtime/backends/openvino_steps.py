"""What OpenVINO is told about the int8 graph when it loads it: behind a relu no step is negative.

The graph is written for TensorRT, which takes signed steps only. On x86 OpenVINO keeps activations as uint8, and
signed steps become uint8 with zero point 128, for which every convolution has to correct.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vggedge_runtime.dependencies import require

_STEPS = 127  # of the int8 graph: -127..127
_POOL_CHANNELS = 64  # oneDNN pools uint8 64 channels at a time; with fewer it is slower than pooling in FP32


def use_unsigned_steps(model: Any) -> int:
    """Count the steps behind each relu from 0 and not from -128; changes ``model``, not what it computes.

    A clamp at 127 steps followed by uint8 steps from 0 gives the values of the signed pair. Where pooling has
    channels enough the pair moves before it, which changes no value either, as both keep order: then the
    convolution writes, and the pooling reads, 8 bits. What is not surely such a pair is left alone.

    Args:
        model: an ``openvino.Model`` as ``read_model`` gives it, not yet compiled.

    Returns:
        The number of pairs changed.
    """
    changed = 0
    for quantize in [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]:
        multiply = _end_of_pair(quantize)
        movers, source = _movers_above_pair(quantize)
        if multiply is None or source.get_node().get_type_name() != "Relu":
            continue
        scale = _constant(multiply.input_value(1))
        low = _constant(quantize.input_value(3))  # the lowest step: -128 if they are signed
        if scale is None or low != -128.0:
            continue
        readers = list(multiply.output(0).get_target_inputs())
        if _is_better_above(movers, source):
            result = quantize.input_value(0)
            movers[-1].input(0).replace_source_output(_unsigned_pair(source, scale))
        else:
            result = _unsigned_pair(quantize.input_value(0), scale)
        for reader in readers:
            reader.replace_source_output(result)
        changed += 1
    model.validate_nodes_and_infer_types()
    return changed


def _unsigned_pair(values: Any, scale: float) -> Any:
    """Clamp to 0..127 steps, then a FakeQuantize over 0..255 steps of the same size."""
    openvino, ops = require("openvino", "openvino"), require("openvino.opset13", "openvino")
    dtype = values.get_element_type().to_dtype()
    low, high = (ops.constant(np.array(each, dtype), openvino.Type(dtype)) for each in (0, 255 * scale))
    clamped = ops.clamp(values, 0.0, _STEPS * scale)
    return ops.fake_quantize(clamped, low, high, low, high, 256).output(0)


def _end_of_pair(quantize: Any) -> Any:
    """The Multiply that ends the pair (int8 cast, cast back, scale); None if it is another, or others read within."""
    node = quantize
    while node.get_type_name() != "Multiply":
        readers = list(node.output(0).get_target_inputs())
        if len(readers) != 1 or readers[0].get_node().get_type_name() not in {"Convert", "Subtract", "Multiply"}:
            return None
        node = readers[0].get_node()
        if node.get_type_name() == "Subtract" and _constant(node.input_value(1)) != 0.0:
            return None
    return node


def _movers_above_pair(quantize: Any) -> tuple[list[Any], Any]:
    """(The max-poolings and reshapes above the pair, last first; the output above them)."""
    movers, source = [], quantize.input_value(0)
    while source.get_node().get_type_name() in {"MaxPool", "Reshape"}:
        movers.append(source.get_node())
        source = movers[-1].input_value(0)
    return movers, source


def _is_better_above(movers: list[Any], source: Any) -> bool:
    """Whether the pair should move above a pooling: it has the channels, and nothing else reads what lies between."""
    if not any(node.get_type_name() == "MaxPool" for node in movers):
        return False
    channels = source.get_partial_shape()[1]
    alone = all(len(node.output(0).get_target_inputs()) == 1 for node in movers)
    return alone and channels.is_static and int(channels.get_length()) >= _POOL_CHANNELS


def _constant(output: Any) -> float | None:
    """The one number that a constant is, seen through a cast; None if it is not a constant of one number."""
    node = output.get_node()
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    one = node.get_type_name() == "Constant" and node.get_data().size == 1
    return float(node.get_data().reshape(())) if one else None
