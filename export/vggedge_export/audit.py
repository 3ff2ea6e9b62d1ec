"""Fusion audit: what TensorRT-RTX made of the graph, read from the layer table that its builder logs.

TensorRT-RTX builds without a GPU, but runs nothing there; whether the convolutions of an INT8 graph read INT8,
and how many kernels stand between them, is in the table that the builder prints at verbose severity with detailed
profiling verbosity. Its form is documented nowhere: this is what version 1.7.1 prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import EngineError

_PART = re.compile(r", (LayerType|Inputs|Constants|Outputs|TacticName|StreamId|Metadata): ?")
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\], .*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[ONNX Layer: |$)")  # the unit separator stands between two
_GENERATED = "kgen"
_POOLS = frozenset({"maxpool", "avgpool", "pooling"})


@dataclass(frozen=True)
class LayerTableRow:
    """One row of the table.

    Attributes:
        layer: what of it is kept.
        constant_sizes: numbers of elements of its constants of two or more dimensions.
        results: names of the tensors that it writes.
    """

    layer: EngineLayer
    constant_sizes: tuple[int, ...]
    results: tuple[str, ...]


@dataclass(frozen=True)
class KernelNode:
    """A convolution or dense layer of the network that was built.

    Attributes:
        name: of its ONNX node.
        is_convolution: else it is dense, as is a convolution whose result is one place (in squeeze-and-excitation).
        is_quantized: whether both its input and its weights are dequantised INT8.
        weights: number of elements of its kernel.
    """

    name: str
    is_convolution: bool
    is_quantized: bool
    weights: int


@dataclass(frozen=True)
class NetworkFacts:
    """What an audit has to know of the graph.

    Attributes:
        kernels: its convolutions and dense layers, in order.
        float32: names of nodes with a Float32 result.
        quantizing: names of nodes that quantise.
        has_float16: whether any node gives FP16.
        outputs: names of the network's outputs.
    """

    kernels: tuple[KernelNode, ...]
    float32: frozenset[str]
    quantizing: frozenset[str]
    has_float16: bool
    outputs: frozenset[str]


def audit_layers(lines: Iterable[str]) -> tuple[LayerTableRow, ...]:
    """Rows of the layer table in a builder's log; none where it printed no table, or another than TensorRT-RTX's.

    Args:
        lines: messages of one build; the table may be one message or many.

    Raises:
        EngineError: a row of the table cannot be read; the product prints it differently than 1.7.1 does.
    """
    rows: list[LayerTableRow] = []
    in_table = False
    for line in "\n".join(lines).split("\n"):
        if in_table and line.startswith("Name: "):
            rows.append(_read_row(line))
        else:
            in_table = line.strip() == "Layers:"
    return tuple(rows)


def _read_row(line: str) -> LayerTableRow:
    name, *found = _PART.split(line.removeprefix("Name: "))
    parts = dict(zip(found[::2], found[1::2], strict=True))
    if not {"LayerType", "Inputs", "Outputs"} <= parts.keys():
        raise EngineError(
            f"the builder's layer table has a row that cannot be read: {line[:120]!r}. It is known as TensorRT-RTX "
            "1.7.1 prints it; install that version, or report the row."
        )
    inputs, constants, outputs = (
        list(_TENSOR.finditer(parts.get(part, ""))) for part in ("Inputs", "Constants", "Outputs")
    )
    shapes = [tuple(map(int, filter(None, each["shape"].split(",")))) for each in constants]
    matrices = [(each, shape) for each, shape in zip(constants, shapes, strict=True) if _is_matrix(shape)]
    layer = EngineLayer(
        name=name,
        kind=parts["LayerType"],
        inputs=_types(inputs),
        weights=_types([each for each, _ in matrices]),
        outputs=_types(outputs),
        nodes=tuple(dict.fromkeys(_NODE.findall(parts.get("Metadata", "")))),
    )
    sizes = tuple(math.prod(shape) for _, shape in matrices)
    return LayerTableRow(layer, sizes, tuple(each["name"] for each in outputs))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a constant is more than one value a channel."""
    return sum(size != 1 for size in shape) > 1


def _types(tensors: Sequence[re.Match[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(each["type"] for each in tensors))


def network_facts(trt: Any, network: Any) -> NetworkFacts:
    """Read from a parsed network what an audit has to know; unlike the ONNX file it is in memory already."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    made_by = {tensor.name: layer for layer in layers for tensor in _outputs(layer)}
    found = [_kernel_node(trt, layer, made_by) for layer in layers]
    types = [(_node_name(layer), tensor.dtype) for layer in layers for tensor in _outputs(layer)]
    return NetworkFacts(
        kernels=tuple(node for node in found if node is not None),
        float32=frozenset(name for name, dtype in types if dtype == trt.float32),
        quantizing=frozenset(_node_name(layer) for layer in layers if layer.type == trt.LayerType.QUANTIZE),
        has_float16=any(dtype == trt.float16 for _, dtype in types),
        outputs=frozenset(network.get_output(index).name for index in range(network.num_outputs)),
    )


def _kernel_node(trt: Any, layer: Any, made_by: dict[str, Any]) -> KernelNode | None:
    """What a layer is if it is a convolution or a product with a constant."""
    convolves = layer.type == trt.LayerType.CONVOLUTION
    if not convolves and (layer.type != trt.LayerType.MATRIX_MULTIPLY or not _has_weights(trt, layer, made_by)):
        return None
    sources = [made_by.get(layer.get_input(index).name) for index in range(min(2, layer.num_inputs))]
    dequantized = [each is not None and each.type == trt.LayerType.DEQUANTIZE for each in sources]
    return KernelNode(
        name=_node_name(layer),
        is_convolution=convolves and math.prod(tuple(layer.get_output(0).shape)[2:]) != 1,
        is_quantized=len(dequantized) == 2 and all(dequantized),
        weights=_kernel_size(trt, layer) if convolves else math.prod(layer.get_input(1).shape),
    )


def _outputs(layer: Any) -> list[Any]:
    return [layer.get_output(index) for index in range(layer.num_outputs)]


def _node_name(layer: Any) -> str:
    """Name of the ONNX node that a layer comes from; the parser adds layers of its own, with names of its own."""
    found = _NODE.findall(layer.metadata)
    return found[0] if found else str(layer.name)


def _has_weights(trt: Any, layer: Any, made_by: dict[str, Any]) -> bool:
    """Whether the second operand of a product is a constant, dequantised or not."""
    source = made_by.get(layer.get_input(1).name)
    passing = (trt.LayerType.DEQUANTIZE, trt.LayerType.SHUFFLE, trt.LayerType.CAST)
    while source is not None and source.type in passing:
        source = made_by.get(source.get_input(0).name)
    return source is not None and source.type == trt.LayerType.CONSTANT


def _kernel_size(trt: Any, layer: Any) -> int:
    channels = layer.get_input(0).shape[1]
    layer.__class__ = trt.IConvolutionLayer  # how the Python API casts a layer to its own class
    return int(layer.num_output_maps * channels // layer.num_groups * math.prod(layer.kernel_size_nd))


def build_audit(rows: Sequence[LayerTableRow], facts: NetworkFacts) -> EngineAudit:
    """Bring the rows of the table and the graph together."""
    owners = _owners(rows, facts.kernels)
    row_of = {name: rows[index].layer for index, name in owners.items()}
    quantized = [node.name for node in facts.kernels if node.is_quantized]
    extra = [index for index, row in enumerate(rows) if index not in owners and _is_extra(row.layer)]
    pools = [row.layer for row in rows if row.layer.kind in _POOLS]
    wide = [row for row in rows if "Float" in row.layer.outputs and not facts.outputs.intersection(row.results)]
    return EngineAudit(
        layers=tuple(row.layer for row in rows),
        convolutions=sum(node.is_convolution for node in facts.kernels),
        dense=sum(not node.is_convolution for node in facts.kernels),
        int8=tuple(node.name for node in facts.kernels if node.name in row_of and _reads_int8(row_of[node.name])),
        not_int8=tuple(name for name in quantized if name in row_of and not _reads_int8(row_of[name])),
        untold=tuple(name for name in quantized if name not in row_of),
        extra_kernels=len(extra),
        extra_after=_count_behind(owners, extra),
        quantizations=len(facts.quantizing.intersection(name for row in rows for name in row.layer.nodes)),
        float_pools=sum(pool.inputs[:1] != ("Int8",) for pool in pools) if quantized else 0,
        float32_kernels=len(wide),
        unasked_float32=tuple(
            row.layer.name for row in wide if facts.has_float16 and not facts.float32.intersection(row.layer.nodes)
        ),
    )


def check_audit(audit: EngineAudit, facts: NetworkFacts) -> None:
    """Raise EngineError, naming the layers, where a quantised convolution does not read INT8.

    A dense layer may: at batch 1 it is bound by memory, and the builder then chooses as it likes.
    """
    convolutions = {node.name for node in facts.kernels if node.is_convolution}
    wrong = [name for name in audit.not_int8 if name in convolutions]
    if wrong:
        rows = [row for row in audit.layers if wrong[0] in row.nodes and row.kind != _GENERATED]
        reads = ", ".join(f"{'/'.join(row.inputs)} with weights of {'/'.join(row.weights)}" for row in rows)
        raise EngineError(
            f"the graph quantises {', '.join(wrong)}, and the engine does not run that in INT8 ({wrong[0]} reads "
            f"{reads or 'it in a generated kernel'}). Quantise its input and its "
            "weights by one Q/DQ pair each, build for compute capability 8.0 or later, or leave it in FP16."
        )


def _is_extra(layer: EngineLayer) -> bool:
    """Whether a row that computes no convolution and no dense layer is a kernel; a shape_call writes nothing."""
    return layer.kind not in _POOLS and bool(layer.outputs)


def _owners(rows: Sequence[LayerTableRow], kernels: Sequence[KernelNode]) -> dict[int, str]:
    """Index of a row -> the convolution or dense layer that it computes.

    A row that is no generated kernel computes the one that it names. A generated kernel names every node that it
    has a part of (a bias, the padding of an input), and computes one whose whole kernel is among its constants.
    """
    sizes = {node.name: node.weights for node in kernels}
    owners: dict[int, str] = {}
    for generated in (False, True):
        for index, row in enumerate(rows):
            if (row.layer.kind == _GENERATED) is not generated or row.layer.kind in _POOLS:
                continue
            for name in row.layer.nodes:
                is_whole = not generated or sizes.get(name) in row.constant_sizes
                if name in sizes and is_whole and name not in owners.values():
                    owners[index] = name
                    break
    return owners


def _count_behind(owners: dict[int, str], extra: Sequence[int]) -> dict[str, int]:
    """How many of the rows ``extra`` stand behind each owned row and before the next."""
    counts = {owners[index]: 0 for index in sorted(owners)}
    for index in extra:
        before = [each for each in owners if each < index]
        if before:
            counts[owners[max(before)]] += 1
    return counts


def _reads_int8(layer: EngineLayer) -> bool:
    return layer.inputs[:1] == ("Int8",) and layer.weights[:1] == ("Int8",)
