"""Raise the opset to 20 exactly: nothing but the number may change.

onnx.version_converter would do it too, on a serialized copy of the whole model (0.5 GB for VGG-16). VGG needs
no rewriting, and that is checked here op by op instead of assumed.
"""

from __future__ import annotations

from vggedge_export.graph import OPSET, Graph
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError

# Ops whose schema changed between 18 and 20, and why that changes nothing for the nodes we meet.
_SAME_MEANING = {
    "Cast": "19 adds float8 and `saturate`, which concerns float8 only",
    "Constant": "19 adds float8 types",
    "Identity": "19 adds float8 types",
    "Reshape": "19 adds float8 types",
    "Shape": "19 adds float8 types",
    "Size": "19 adds float8 types",
    "Equal": "19 adds strings",
    "If": "19 adds float8 types",
    "Loop": "19 adds float8 types",
    "Pad": "19 adds the mode `wrap`",
    "AveragePool": "19 adds dilations, 1 by default",
    "QuantizeLinear": "19 adds float8 and FP16 scales",
    "DequantizeLinear": "19 adds float8 and FP16 scales",
    "ReduceMax": "20 adds bool",
    "ReduceMin": "20 adds bool",
    "ConstantOfShape": "20 adds float8 types",
    "Resize": "19 adds a coordinate mode",
    "IsNaN": "20 adds float8 types",
    "IsInf": "20 adds float8 types",
}


def run(graph: Graph) -> int:
    """Raise ``graph.opset`` to OPSET.

    Raises:
        ConversionError: the opset is newer already, or an op is unknown or changed its meaning on the way.
    """
    if graph.opset == OPSET:
        return 0
    onnx = require("onnx", "export")
    if graph.opset > OPSET:
        raise ConversionError(
            f"the graph has opset {graph.opset}; vggedge writes {OPSET}, the newest that TensorRT 10.3 parses."
        )
    for op, layer in {node.op_type: node.name for node in graph.nodes}.items():
        try:
            old, new = onnx.defs.get_schema(op, graph.opset), onnx.defs.get_schema(op, OPSET)
        except onnx.defs.SchemaError as error:
            raise ConversionError(f"{layer}: op {op} is none of ONNX's own. Replace the layer.") from error
        if old.since_version != new.since_version and op not in _SAME_MEANING:
            raise ConversionError(
                f"{layer}: op {op} changed between opset {graph.opset} and {OPSET}, and no exact upgrade of it is "
                "known here. Replace the layer."
            )
    graph.opset = OPSET
    return 1
