from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from vggedge_export.audit import KernelNode, NetworkFacts, audit_layers, build_audit, check_audit
from vggedge_export.engine import BuiltEngine, EngineConfig, build_audited_engine, build_engine
from vggedge_export.float16 import float16_graph
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8, INT8_RTX, QuantizationRecipe, quantized_graph, quantized_layers
from vggedge_runtime.engine_layers import EngineAudit, EngineLayer
from vggedge_runtime.errors import EngineError
from vggedge_runtime.tensorrt_api import TensorRtApi, load_tensorrt

# --- the parser, on what TensorRT-RTX 1.7.1 prints


def tensor(name: str, shape: str, kind: str) -> str:
    return (
        f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1], StrideOrder: [0], Datatype: {kind}, "
        "Format: (NHWC) Channel major format }"
    )


HEAD = (
    "Name: __myl_CastTranMulAddMulMinMaxRounCastConc_myl0_0, LayerType: kgen, "
    f"Inputs: [ {tensor('images', '1,64,64,3', 'UInt8')}], "
    f"Constants: [ {tensor('__mye1', '1,1,1,1', 'Half')}, {tensor('__mye2_myl0', '1,1,64,64', 'Int8')}], "
    f"Outputs: [ {tensor('padded', '1,4,64,64', 'Int8')}], "
    "TacticName: __myl_CastTranMulAddMulMinMaxRounCastConc_0x20399d95, StreamId: 0, "
    "Metadata: [ONNX Layer: block1_conv1/input_int8]\x1f[ONNX Layer: block1_conv1]\x1f[ONNX Layer: head/cast]"
)
CONVOLUTION = (
    "Name: block1_conv1_U101_myl0_1, LayerType: correlation, "
    f"Inputs: [ {tensor('padded', '1,4,64,64', 'Int8')}], "
    f"Constants: [ {tensor('k', '4,4,3,3', 'Int8')}, {tensor('a', '1,4,1,1', 'Float')}, "
    f"{tensor('b', '1,4,1,1', 'Float')}], "
    f"Outputs: [ {tensor('__myln_k_arg__bb1_3_myl0', '1,4,64,64', 'Half')}], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: block1_conv1]\x1f"
    "[ONNX Layer: block1_conv1/input_dequantized]\x1f[ONNX Layer: block1_conv1/relu]"
)
REQUANTISE = (
    "Name: __myl_MulMinMaxRounCast_myl0_2, LayerType: kgen, "
    f"Inputs: [ {tensor('__myln_k_arg__bb1_3_myl0', '1,4,64,64', 'Half')}], "
    f"Constants: [ {tensor('lit', '1', 'Half')}], "
    f"Outputs: [ {tensor('q', '1,4,64,64', 'Int8')}], "
    "TacticName: __myl_MulMinMaxRounCast_0xbc7d, StreamId: 0, Metadata: [ONNX Layer: fc1/input_int8]"
)
POOL = (
    "Name: __mye3227_pooling_myl0_3, LayerType: maxpool, "
    f"Inputs: [ {tensor('q', '1,4,64,64', 'Int8')}], Constants: [], "
    f"Outputs: [ {tensor('p', '1,4,32,32', 'Int8')}], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: block1_pool]"
)
DENSE = (
    "Name: fc1_myl0_4, LayerType: gemm, "
    f"Inputs: [ {tensor('p', '1,4096', 'Int8')}], Constants: [ {tensor('w', '4096,8', 'Int8')}], "
    f"Outputs: [ {tensor('d', '1,8', 'Half')}], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: fc1]\x1f[ONNX Layer: fc1/input_dequantized]"
)
DENSE_GENERATED = (
    "Name: __myl_AddReluReshMulSum_myl0_5, LayerType: kgen, "
    f"Inputs: [ {tensor('d', '1,8', 'Half')}], "
    f"Constants: [ {tensor('predictions/kernel_constantHalf_myl0', '8,6', 'Half')}, {tensor('b', '1,8', 'Half')}], "
    f"Outputs: [ {tensor('l', '1,6', 'Half')}], TacticName: __myl_AddReluReshMulSum_0x83, StreamId: 0, "
    "Metadata: [ONNX Layer: fc1]\x1f[ONNX Layer: fc1/relu]\x1f[ONNX Layer: predictions]"
)
EXPONENTIALS = (
    "Name: __myl_AddCastMaxrSubExp_myl0_6, LayerType: kgen, "
    f"Inputs: [ {tensor('l', '1,6', 'Half')}], Constants: [ {tensor('b', '1,6', 'Half')}], "
    f"Outputs: [ {tensor('e', '1,6', 'Float')}], TacticName: __myl_AddCastMaxrSubExp_0xb6, StreamId: 0, "
    "Metadata: [ONNX Layer: predictions]\x1f[ONNX Layer: softmax/fp32]\x1f[ONNX Layer: softmax]"
)
DIVISION = (
    "Name: __myl_SlicSlicAddDiv_myl0_7, LayerType: kgen, "
    f"Inputs: [ {tensor('e', '1,6', 'Float')}, {tensor('e', '1,6', 'Float')}], Constants: [], "
    f"Outputs: [ {tensor('probabilities', '1,6', 'Float')}], TacticName: __myl_SlicSlicAddDiv_0x7e, StreamId: 0, "
    "Metadata: [ONNX Layer: softmax]"
)
TABLE = (HEAD, CONVOLUTION, REQUANTISE, POOL, DENSE, DENSE_GENERATED, EXPONENTIALS, DIVISION)
LOG = (
    "Engine generation completed in 0.05 seconds.",
    "Layers:\n" + "\n".join(TABLE) + "\n\nI/O Tensors:\n Name: images, IOMode: Input, DataType: UInt8",
    "Adding 1 engine(s) to plan file.",
)
FACTS = NetworkFacts(
    kernels=(
        KernelNode("block1_conv1", is_convolution=True, is_quantized=True, weights=108),
        KernelNode("fc1", is_convolution=False, is_quantized=True, weights=32768),
        KernelNode("predictions", is_convolution=False, is_quantized=False, weights=48),
    ),
    float32=frozenset({"softmax/fp32", "softmax"}),
    quantizing=frozenset({"block1_conv1/input_int8", "fc1/input_int8", "weights/int8"}),  # the last ahead of time
    has_float16=True,
    outputs=frozenset({"probabilities"}),
)


def test_rows_are_read_with_their_types_and_nodes() -> None:
    rows = audit_layers(LOG)
    assert [row.layer.kind for row in rows] == [
        *("kgen", "correlation", "kgen", "maxpool", "gemm", "kgen", "kgen", "kgen"),
    ]
    assert rows[1].layer == EngineLayer(
        name="block1_conv1_U101_myl0_1",
        kind="correlation",
        inputs=("Int8",),
        weights=("Int8",),  # not the Float scale and bias, one value a channel
        outputs=("Half",),
        nodes=("block1_conv1", "block1_conv1/input_dequantized", "block1_conv1/relu"),
    )
    assert (rows[1].constant_sizes, rows[1].results) == ((144,), ("__myln_k_arg__bb1_3_myl0",))
    assert (rows[3].layer.inputs, rows[3].layer.weights, rows[3].layer.nodes) == (("Int8",), (), ("block1_pool",))
    assert rows[7].layer.inputs == ("Float",)  # read twice, told once


def test_the_table_may_come_in_one_message_or_in_many() -> None:
    assert audit_layers(["before", "Layers:", *TABLE, "", "Name: images, IOMode: Input"]) == audit_layers(LOG)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Engine generation completed"],
        ["Layers:\n"],
        ["Layer(Reformat): r, Tactic: 0x3, images -> x"],
        [CONVOLUTION],
    ],
    ids=["nothing", "no table", "empty", "another table", "a row outside a table"],
)
def test_without_the_table_there_are_no_rows(lines: list[str]) -> None:
    assert audit_layers(lines) == ()


def test_a_row_in_another_form_is_an_error_and_not_overlooked() -> None:
    with pytest.raises(EngineError, match=r"cannot be read: 'Name: x, Kind: conv'.*1\.7\.1"):
        audit_layers(["Layers:\nName: x, Kind: conv"])


def test_a_row_without_constants_and_metadata_is_read() -> None:
    bare = POOL.replace("Constants: [], ", "").split(", Metadata: ")[0]
    layer = audit_layers(["Layers:", POOL])[0].layer
    assert audit_layers(["Layers:", bare])[0].layer == msgspec.structs.replace(layer, nodes=())


def test_a_name_of_ours_may_hold_what_separates_names() -> None:
    odd = CONVOLUTION.replace("block1_conv1/relu]", "a, b [0]: c/relu]")
    assert audit_layers(["Layers:", odd])[0].layer.nodes[-1] == "a, b [0]: c/relu"


# --- what the rows amount to


def test_the_summary_counts_kernels_and_where_they_stand() -> None:
    audit = build_audit(audit_layers(LOG), FACTS)
    assert (len(audit.layers), audit.convolutions, audit.dense) == (8, 1, 2)
    assert (audit.int8, audit.not_int8, audit.untold) == (("block1_conv1", "fc1"), (), ())
    # The head, the requantisation and two of the softmax. The generated dense layer is none: it computes predictions.
    assert audit.extra_kernels == 4
    assert audit.extra_after == {"block1_conv1": 1, "fc1": 0, "predictions": 2}
    assert (audit.quantizations, audit.float_pools) == (2, 0)
    assert (audit.float32_kernels, audit.unasked_float32) == (1, ())  # the exponentials, which the graph wants so
    check_audit(audit, FACTS)


def test_a_convolution_in_two_rows_is_counted_once() -> None:
    again = CONVOLUTION.replace("block1_conv1_U101_myl0_1", "block1_conv1_U102_myl0_2")
    audit = build_audit(audit_layers(["Layers:", HEAD, CONVOLUTION, again, *TABLE[2:]]), FACTS)
    assert audit.int8 == ("block1_conv1", "fc1")
    assert (audit.extra_kernels, audit.extra_after["block1_conv1"]) == (5, 2)  # its second row is one too many


def test_a_float32_result_in_an_fp16_graph_is_told() -> None:
    wide = CONVOLUTION.replace("Datatype: Half", "Datatype: Float")
    rows = audit_layers(["Layers:", HEAD, wide, *TABLE[2:]])
    audit = build_audit(rows, FACTS)
    assert (audit.float32_kernels, audit.unasked_float32) == (2, ("block1_conv1_U101_myl0_1",))
    in_float32 = build_audit(rows, replace(FACTS, has_float16=False))
    assert in_float32 == msgspec.structs.replace(audit, unasked_float32=())


def test_a_pool_in_float_counts_in_an_int8_graph_only() -> None:
    wide = POOL.replace("Datatype: Int8", "Datatype: Half")
    rows = audit_layers(["Layers:", *TABLE[:3], wide, *TABLE[4:]])
    assert build_audit(rows, FACTS).float_pools == 1
    plain = replace(FACTS, kernels=tuple(replace(node, is_quantized=False) for node in FACTS.kernels))
    assert build_audit(rows, plain).float_pools == 0


def test_a_shape_that_the_host_computes_is_no_kernel() -> None:
    call = (
        "Name: __mye722_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , "
        "StreamId: 0, Metadata: "
    )
    audit = build_audit(audit_layers(["Layers:", call, *TABLE]), FACTS)
    assert (len(audit.layers), audit.extra_kernels) == (9, 4)


@pytest.mark.parametrize(
    ("shape", "told"),
    [("1,4,64,64", "Half with weights of Int8"), ("4,4,3,3", "Int8 with weights of Half")],
    ids=["input", "weights"],
)
def test_a_quantised_convolution_that_does_not_read_int8_is_refused_by_name(shape: str, told: str) -> None:
    was = f"Dimensions: [{shape}], Strides: [1], StrideOrder: [0], Datatype: Int8"
    row = CONVOLUTION.replace(was, was.replace("Int8", "Half"))
    assert row != CONVOLUTION
    audit = build_audit(audit_layers(["Layers:", HEAD, row, *TABLE[2:]]), FACTS)
    assert (audit.int8, audit.not_int8) == (("fc1",), ("block1_conv1",))
    with pytest.raises(EngineError, match=rf"quantises block1_conv1, .*\(block1_conv1 reads {told}\).*Q/DQ"):
        check_audit(audit, FACTS)


def test_a_dense_layer_that_does_not_read_int8_is_told_and_allowed() -> None:
    row = DENSE.replace("Datatype: Int8", "Datatype: Half")
    audit = build_audit(audit_layers(["Layers:", *TABLE[:4], row, *TABLE[5:]]), FACTS)
    assert audit.not_int8 == ("fc1",)
    check_audit(audit, FACTS)


def test_a_layer_of_which_the_table_does_not_tell_is_neither_right_nor_wrong() -> None:
    silent = CONVOLUTION[: CONVOLUTION.index("Metadata: ")] + "Metadata: "
    audit = build_audit(audit_layers(["Layers:", HEAD, silent, *TABLE[2:]]), FACTS)
    assert (audit.int8, audit.not_int8, audit.untold) == (("fc1",), (), ("block1_conv1",))
    check_audit(audit, FACTS)


# --- real builds


@pytest.fixture(scope="module")
def rtx() -> TensorRtApi:
    pytest.importorskip("onnx")
    pytest.importorskip("tensorrt_rtx")
    return load_tensorrt("tensorrt_rtx")


def small_vgg() -> Graph:
    """Two stages as in a VGG, and two dense layers, for images of 16x16."""
    rng = np.random.default_rng(0)
    nodes = [
        make_node("Cast", ["images"], "head/cast", to=1),
        make_node("Transpose", ["head/cast"], "head/transpose", perm=[0, 3, 1, 2]),
        make_node("Mul", ["head/transpose", "head/value"], "head/scale"),
    ]
    weights = {"head/value": np.array(1 / 128, np.float32)}
    last, channels = "head/scale", 3
    for stage, count in ((1, 2), (2, 1)):
        for number in range(1, count + 1):
            name = f"block{stage}_conv{number}"
            weights[f"{name}/kernel"] = rng.normal(0, 0.2, (8 * stage, channels, 3, 3)).astype(np.float32)
            weights[f"{name}/bias"] = rng.normal(0, 0.2, 8 * stage).astype(np.float32)
            inputs = [last, f"{name}/kernel", f"{name}/bias"]
            nodes += [make_node("Conv", inputs, name, pads=[1, 1, 1, 1]), make_node("Relu", [name], f"{name}/relu")]
            last, channels = f"{name}/relu", 8 * stage
        nodes.append(make_node("MaxPool", [last], f"block{stage}_pool", kernel_shape=[2, 2], strides=[2, 2]))
        last = f"block{stage}_pool"
    nodes.append(make_node("Flatten", [last], "flatten"))
    for name, size, source in (("fc1", (32, 256), "flatten"), ("predictions", (5, 32), "fc1/relu")):
        weights[f"{name}/kernel"] = rng.normal(0, 0.2, size).astype(np.float32)
        weights[f"{name}/bias"] = rng.normal(0, 0.2, size[0]).astype(np.float32)
        nodes.append(make_node("Gemm", [source, f"{name}/kernel", f"{name}/bias"], name, transB=1))
        if name == "fc1":
            nodes.append(make_node("Relu", [name], "fc1/relu"))
    nodes.append(make_node("Softmax", ["predictions"], "probabilities"))
    images, answers = (
        value_info("images", np.uint8, ["N", 16, 16, 3]),
        value_info("probabilities", np.float32, ["N", 5]),
    )
    return Graph(nodes, weights, [images], [answers])


def quantised(graph: Graph, recipe: QuantizationRecipe) -> Graph:
    return quantized_graph(graph, recipe, {layer.name: 4 / 127 for layer in quantized_layers(graph, recipe)})


def add_pair(graph: Graph, tensor: str) -> Graph:
    """Quantise ``tensor`` once more, with a scale of its own, for everything that reads it."""
    result = graph.copy()
    source = result.producer(tensor)
    assert source is not None
    dtype = result.weights["block1_conv1/kernel_scale"].dtype
    result.weights |= {"more/scale": np.array(0.05, dtype), "more/zero_point": np.array(0, np.int8)}
    result.read_from(tensor, "more/dequantized")
    position = result.index(source) + 1
    result.nodes[position:position] = [
        make_node("QuantizeLinear", [tensor, "more/scale", "more/zero_point"], "more/int8"),
        make_node("DequantizeLinear", ["more/int8", "more/scale", "more/zero_point"], "more/dequantized"),
    ]
    return result


GRAPHS: dict[str, Callable[[], Graph]] = {
    "fp32": small_vgg,
    "fp16": lambda: float16_graph(small_vgg()),
    "int8": lambda: quantised(small_vgg(), INT8),
    "int8-rtx": lambda: quantised(float16_graph(small_vgg()), INT8_RTX),
}
KERNELS = ("block1_conv1", "block1_conv2", "block2_conv1", "fc1", "predictions")


@pytest.fixture(scope="module")
def build(rtx: TensorRtApi, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BuiltEngine]:
    folder = tmp_path_factory.mktemp("graphs")

    def run(graph: Graph, batches: tuple[int, int, int] = (1, 1, 1), api: TensorRtApi = rtx) -> BuiltEngine:
        graph.write(folder / "graph.onnx")
        return build_audited_engine(api, folder / "graph.onnx", (16, 16, 3), EngineConfig(batches))

    return run


def audited(built: BuiltEngine) -> EngineAudit:
    assert built.audit is not None
    return built.audit


@pytest.mark.parametrize("batches", [(1, 1, 1), (1, 4, 8)], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", list(GRAPHS))
def test_every_kind_of_graph_is_audited(name: str, batches: tuple, build: Callable[..., BuiltEngine]) -> None:
    audit = audited(build(GRAPHS[name](), batches))
    assert (audit.convolutions, audit.dense) == (3, 2)
    assert tuple(audit.extra_after) == KERNELS  # every one has a row of its own
    quantises = name.startswith("int8")
    assert audit.int8 == (KERNELS[:4] if quantises else ())
    assert (audit.not_int8, audit.untold, audit.unasked_float32) == ((), (), ())
    assert (audit.quantizations, audit.float_pools) == (4 if quantises else 0, 0)
    # FP32 and FP16 fuse bias and relu into the convolution; INT8 needs one more kernel for each, to quantise.
    assert [audit.extra_after[kernel] for kernel in KERNELS[:2]] == ([1, 1] if quantises else [0, 0])
    wanted = {
        "fp32": {("Float",)},
        "fp16": {("Half",)},
        "int8": {("Int8",)},
        "int8-rtx": {("Int8",)},
    }
    assert {layer.inputs for layer in audit.layers if layer.kind in {"correlation", "maxpool"}} == wanted[name]
    if name in {"fp16", "int8-rtx"}:  # the last dense layer with its cast at most, and the exponentials
        assert 1 <= audit.float32_kernels <= 2
    else:
        assert audit.float32_kernels >= 5


@pytest.mark.parametrize("name", ["int8", "int8-rtx"])
def test_a_second_pair_behind_a_pool_costs_a_kernel(name: str, build: Callable[..., BuiltEngine]) -> None:
    good, bad = (audited(build(graph)) for graph in (GRAPHS[name](), add_pair(GRAPHS[name](), "block1_pool")))
    assert bad.extra_kernels == good.extra_kernels + 1
    assert (good.extra_after["block1_conv2"], bad.extra_after["block1_conv2"]) == (1, 2)
    assert bad.quantizations == good.quantizations + 1
    assert bad.int8 == good.int8


@pytest.mark.parametrize("name", ["int8", "int8-rtx"])
@pytest.mark.parametrize(
    ("place", "float_pools"), [("block1_conv1", 0), ("block2_conv1/relu", 1)], ids=["before relu", "before last pool"]
)
def test_a_second_pair_that_hides_in_a_longer_kernel_is_found_too(
    place: str, float_pools: int, name: str, build: Callable[..., BuiltEngine]
) -> None:
    good, bad = (audited(build(graph)) for graph in (GRAPHS[name](), add_pair(GRAPHS[name](), place)))
    assert bad.extra_kernels == good.extra_kernels  # which is why the kernels alone do not tell
    assert bad.quantizations == good.quantizations + 1
    assert (good.float_pools, bad.float_pools) == (0, float_pools)


def test_a_product_of_two_activations_is_no_dense_layer(build: Callable[..., BuiltEngine]) -> None:
    graph = small_vgg()
    softmax = graph.nodes.pop()
    graph.nodes += [
        make_node("Transpose", ["fc1/relu"], "turned", perm=[1, 0]),
        make_node("MatMul", ["fc1/relu", "turned"], "gram"),
        make_node("ReduceMean", ["gram"], "mean", keepdims=1),
        make_node("Add", ["predictions", "mean"], "moved"),
        softmax,
    ]
    softmax.input[0] = "moved"
    audit = audited(build(graph, (2, 2, 2)))
    assert (audit.dense, tuple(audit.extra_after)) == (2, KERNELS)


def test_a_convolution_of_one_place_is_a_dense_layer(build: Callable[..., BuiltEngine]) -> None:
    """Squeeze-and-excitation: TensorRT-RTX computes such small ones in float, in a generated kernel."""
    graph = small_vgg()
    position = next(i for i, node in enumerate(graph.nodes) if node.name == "block2_conv1")
    source = graph.nodes[position].input[0]
    graph.nodes[position:position] = [
        make_node("GlobalAveragePool", [source], "squeeze"),
        make_node("Conv", ["squeeze", "down/kernel"], "down"),
        make_node("Relu", ["down"], "down/relu"),
        make_node("Conv", ["down/relu", "up/kernel"], "up"),
        make_node("Sigmoid", ["up"], "gate"),
        make_node("Mul", [source, "gate"], "excited"),
    ]
    next(node for node in graph.nodes if node.name == "block2_conv1").input[0] = "excited"
    draw = np.random.default_rng(1).normal
    graph.weights |= {
        "down/kernel": draw(size=(4, 8, 1, 1)).astype(np.float32),
        "up/kernel": draw(size=(8, 4, 1, 1)).astype(np.float32),
    }
    audit = audited(build(quantised(graph, INT8)))
    assert (audit.convolutions, audit.dense) == (3, 4)
    assert {"down", "up"} & set(audit.not_int8)  # told, and no reason to refuse the engine
    assert set(KERNELS[:4]) <= set(audit.int8)


def test_a_device_without_int8_is_refused_by_the_name_of_the_layer(
    rtx: TensorRtApi, build: Callable[..., BuiltEngine]
) -> None:
    turing = TensorRtApi(rtx.product, rtx.version, rtx.module, True, ("7.5",))
    with pytest.raises(
        EngineError, match=r"quantises block1_conv1, block1_conv2, block2_conv1, .*block1_conv1 reads Half"
    ):
        build(GRAPHS["int8-rtx"](), api=turing)
    assert audited(build(GRAPHS["fp16"](), api=turing)).int8 == ()  # which runs there


def test_the_plan_is_to_the_byte_what_it_is_without_the_audit(
    rtx: TensorRtApi, build: Callable[..., BuiltEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    graph = GRAPHS["int8-rtx"]()
    plan = bytes(build(graph).plan)
    monkeypatch.setattr("vggedge_export.engine._audit", lambda *arguments: None)
    built = build(graph)
    assert built.audit is None
    assert bytes(built.plan) == plan
    graph.write(tmp_path / "graph.onnx")
    assert bytes(build_engine(rtx, tmp_path / "graph.onnx", (16, 16, 3), EngineConfig())) == plan
