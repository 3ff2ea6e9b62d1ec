"""A Pad with zeros before a convolution becomes the convolution's own padding.

Keras's ZeroPadding2D, before every convolution with stride 2 in MobileNet, ResNet and EfficientNet, would be a kernel
of its own on every inference, and stand between a convolution and the Q/DQ pair of its input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vggedge_export.graph import Graph, attribute, nodes_of
from vggedge_runtime.dependencies import require

if TYPE_CHECKING:
    import onnx


def run(graph: Graph) -> int:
    """Fold every Pad of height and width with zeros that one convolution alone reads."""
    helper = require("onnx", "export").helper
    changes = 0
    for pad in nodes_of(graph, "Pad"):
        conv = graph.only_consumer(pad.output[0])
        if conv is None or conv.op_type != "Conv" or conv.input[0] != pad.output[0] or not _is_zeros(graph, pad):
            continue
        pads = graph.weights[pad.input[1]].reshape(2, -1)  # (begin, end) of every axis
        if attribute(conv, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID") or pads[:, :2].any() or pads.min() < 0:
            continue
        own = attribute(conv, "pads", [0] * (pads.size - 4))
        summed = [int(mine) + int(more) for mine, more in zip(own, pads[:, 2:].reshape(-1), strict=True)]
        kept = [entry for entry in conv.attribute if entry.name not in ("pads", "auto_pad")]
        del conv.attribute[:]
        conv.attribute.extend([*kept, helper.make_attribute("pads", summed)])
        graph.remove(pad)
        changes += 1
    return changes


def _is_zeros(graph: Graph, pad: onnx.NodeProto) -> bool:
    """Whether ``pad`` adds zeros, by constants that say how many for every axis."""
    if attribute(pad, "mode", b"constant") != b"constant" or pad.input[1] not in graph.weights:
        return False
    if len(pad.input) > 3 and pad.input[3]:
        return False
    value = pad.input[2] if len(pad.input) > 2 else ""
    return not value or (value in graph.weights and not graph.weights[value].any())
