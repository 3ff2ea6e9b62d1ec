"""Grey of RGB, for models of one channel: in the graph, and apart from it for the reference answers.

Both are Pillow's convert("L"), which is what such models were fed in training (keras.utils.load_img with
color_mode="grayscale"): the luma of ITU-R BT.601, 0.299 R + 0.587 G + 0.114 B, in 16-bit fixed point.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vggedge_export.graph import INPUT, Graph, make_node, value_info
from vggedge_runtime.dependencies import require
from vggedge_runtime.preprocess import Pixels

GREY_IN_WORDS = (
    "input: grey made of RGB, as Pillow's convert('L') does (0.299 R + 0.587 G + 0.114 B); the model takes one channel"
)

_SHARES = (19595, 38470, 7471)  # of 65536, Pillow's; they sum to it, so that grey stays what it is
_ONE = 65536


def insert_grey(graph: Graph) -> None:
    """Let a graph of ``images`` (N, H, W, 1) take (N, H, W, 3) and make grey of it.

    In int32, so that the levels are the same, and whole, in every precision: an FP16 sum of 255 * 0.587 and its
    like is off by up to 0.2, and INT8 scales of 1/128 count on whole levels.
    """
    onnx = require("onnx", "export")
    _, height, width = (d.dim_value for d in graph.inputs[0].type.tensor_type.shape.dim[:3])
    graph.read_from(INPUT, "head/grey")
    graph.inputs = [value_info(INPUT, np.uint8, ["N", height, width, 3])]
    constants = {"shares": _SHARES, "axis": (3,), "half": _ONE // 2, "one": _ONE}
    for name, value in constants.items():
        graph.weights[f"head/{name}"] = np.array(value, np.int64 if name == "axis" else np.int32)
    graph.nodes[:0] = [
        make_node("Cast", [INPUT], "head/whole", to=onnx.TensorProto.INT32),
        make_node("Mul", ["head/whole", "head/shares"], "head/grey_scale"),
        make_node("ReduceSum", ["head/grey_scale", "head/axis"], "head/grey_sum", keepdims=1),
        make_node("Add", ["head/grey_sum", "head/half"], "head/grey_offset"),
        make_node("Div", ["head/grey_offset", "head/one"], "head/grey"),
    ]


def grey_pixels(images: Pixels) -> NDArray[np.uint8]:
    """Pillow's grey of uint8 (n, h, w, 3) images, as (n, h, w, 1): what the graph's own is compared with."""
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., np.newaxis]
