"""What a loaded engine says of its layers, brought into the form of the audit, and what must be true of them.

TensorRT's engine inspector gives JSON. Its keys differ: up to 10.x a tensor has one text, "Format/Datatype", which
is a type ("Half") or a sentence with one in it ("Row major linear FP32"); 11 has "Format" and "DataType"
(NVIDIA, Migrating IEngineInspector Usage from TensorRT 10.x to 11.x). A layer of a convolution has its "Weights".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from vggedge_export.audit import LayerTableRow, NetworkFacts, check_audit
from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import EngineError
from vggedge_runtime.tensorrt_api import TensorRtApi, shared_logger

_NAMES = {
    "int8": "Int8",
    "uint8": "UInt8",
    "half": "Half",
    "fp16": "Half",
    "float": "Float",
    "fp32": "Float",
    "int32": "Int32",
    "int64": "Int64",
    "bool": "Bool",
    "bf16": "BFloat16",
    "bfloat16": "BFloat16",
    "fp8": "FP8",
}
"""Spellings of types, lowered -> the builder's word."""

_TYPE = re.compile(rf"\b(?:{'|'.join(_NAMES)})\b", re.IGNORECASE)
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f]|\s*\[ONNX Layer: |$)")  # a separator stands between two
_COMPUTES = re.compile(r"conv|gemm|correlation|matri|fusion|fully", re.IGNORECASE)
_MOVES_NOTHING = frozenset({"NoOp", "Constant", "Shape", "shape_call", "Signal", "Wait"})


def inspect_plan(api: TensorRtApi, plan: memoryview, facts: NetworkFacts) -> tuple[LayerTableRow, ...]:
    """Load a plan, which takes the GPU it was built for, and ask it for its layers.

    Args:
        api: the product that built it.
        plan: built with detailed profiling verbosity.
        facts: of its network.

    Returns:
        A row a layer, in order; none where the product has no inspector, or tells the layers' names only.

    Raises:
        EngineError: the product does not load what it has built.
    """
    trt: Any = api.module
    logger = shared_logger(api)
    logger.lines.clear()
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        said = "; ".join(text for severity, text in logger.lines if severity in {"ERROR", "INTERNAL_ERROR"})
        raise EngineError(
            f"{api.product} {api.version} does not load the engine that it has just built: "
            f"{said or 'it does not say why'}."
        )
    if not hasattr(engine, "create_engine_inspector"):
        return ()
    inspector = engine.create_engine_inspector()
    return read_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON), facts)


def read_layers(text: str, facts: NetworkFacts) -> tuple[LayerTableRow, ...]:
    """Rows of the inspector's JSON; none where it has the layers' names only.

    Raises:
        EngineError: it is not what is known of TensorRT 10 and 11.
    """
    try:
        layers = json.loads(text)["Layers"]
        if all(isinstance(layer, str) for layer in layers):
            return ()
        kernels = {node.name for node in facts.kernels}
        return tuple(_read_layer(layer, kernels) for layer in layers if layer["LayerType"] not in _MOVES_NOTHING)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(
            f"the engine inspector tells the layers in a form that is not known ({type(error).__name__}: {error}): "
            f"{text[:200]!r}. Known are those of TensorRT 10.3 and 11; report it with the version."
        ) from error


def _read_layer(layer: dict[str, Any], kernels: set[str]) -> LayerTableRow:
    kind, inputs, outputs = layer["LayerType"], _types(layer["Inputs"]), _types(layer["Outputs"])
    weights, sizes = _read_weights(layer, inputs)
    names = tuple(dict.fromkeys(_NODE.findall(layer.get("Metadata", ""))))
    if not weights:  # a copy into another format goes by the name of the convolution that it is for
        names = tuple(name for name in names if name not in kernels)
    row = EngineLayer(
        name=layer["Name"],
        kind="pooling" if "pool" in kind.lower() else kind,
        inputs=inputs,
        weights=weights,
        outputs=outputs,
        nodes=names,
    )
    return LayerTableRow(row, sizes, tuple(each["Name"] for each in layer["Outputs"]))


def _read_weights(layer: dict[str, Any], inputs: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(types, numbers of elements) of a layer's constants of two or more dimensions."""
    told = layer.get("Weights")
    if isinstance(told, dict) and told.get("Count"):
        return (_type_in(str(told["Type"])),), (int(told["Count"]),)
    constants = [each for each in layer.get("Constants", ()) if _is_matrix(each["Dimensions"])]
    if constants:
        return _types(constants), tuple(math.prod(each["Dimensions"]) for each in constants)
    # Not told; a kernel that multiplies takes both of one type.
    return (inputs[:1] if _COMPUTES.search(layer["LayerType"]) else ()), ()


def _is_matrix(shape: Sequence[int]) -> bool:
    return sum(size != 1 for size in shape) > 1


def _types(tensors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    found = (
        next(str(each[key]) for key in ("DataType", "Datatype", "Format/Datatype") if key in each) for each in tensors
    )
    return tuple(dict.fromkeys(_type_in(text) for text in found))


def _type_in(text: str) -> str:
    """The type that a text names; a text that names none stays as it is, and is then no type that is asked for."""
    found = _TYPE.search(text)
    return _NAMES[found.group().lower()] if found else text


def check_precision(audit: EngineAudit, facts: NetworkFacts) -> None:
    """Raise EngineError where an engine does not compute its convolutions in the precision of the graph.

    A quantised one has to read Int8 (check_audit); one of an FP16 graph that is not kept in FP32 on purpose must not
    read Float32.
    """
    check_audit(audit, facts)
    if not facts.has_float16:
        return
    asked = {node.name for node in facts.kernels if node.is_convolution and not node.is_quantized} - facts.float32
    wrong = {
        name: layer
        for layer in audit.layers
        for name in asked.intersection(layer.nodes)
        if layer.weights and layer.inputs[:1] == ("Float",)
    }
    if wrong:
        name, layer = next(iter(wrong.items()))
        raise EngineError(
            f"the graph has {', '.join(sorted(wrong))} in FP16, and the engine does not compute that in FP16 ({name} "
            f"reads {'/'.join(layer.inputs)} with weights of {'/'.join(layer.weights)}). Export the bundle again, and "
            "report the layer if it stays so: a strongly typed engine may not choose."
        )
