from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8_RTX, quantized_graph
from vggedge_runtime.errors import ConversionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
    return (RNG.normal(size=shape) * scale).astype(np.float32)


def pointwise(*kernels: np.ndarray, biases: dict[int, np.ndarray] | None = None, softmax: bool = False) -> Graph:
    """``images`` (N, 1, 1, channels) -> Cast -> 1x1 convolutions with relus between them [-> softmax]."""
    channels = kernels[0].shape[1]
    nodes = [
        make_node("Cast", ["images"], "pixels", to=FLOAT),
        make_node("Transpose", ["pixels"], "t", perm=[0, 3, 1, 2]),
    ]
    weights, last = {}, "t"
    for number, kernel in enumerate(kernels, start=1):
        if number > 1:
            nodes.append(make_node("Relu", [last], f"r{number}"))
            last = f"r{number}"
        inputs = [last, f"c{number}/kernel"]
        weights[inputs[1]] = kernel[:, :, None, None]
        if number in (biases or {}):
            inputs.append(f"c{number}/bias")
            weights[inputs[2]] = (biases or {})[number]
        nodes.append(make_node("Conv", inputs, f"c{number}"))
        last = f"c{number}"
    nodes.append(make_node("Flatten", [last], "flat"))
    nodes.append(make_node("Softmax" if softmax else "Identity", ["flat"], "probabilities", "last"))
    inputs = [value_info("images", np.uint8, ["N", 1, 1, channels])]
    graph = Graph(nodes, weights, inputs, [value_info("probabilities", np.float32, ["N", len(kernels[-1])])])
    graph.check()
    return graph


def types_of(graph: Graph) -> dict[str, int]:
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph.to_bytes()), strict_mode=True)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def test_everything_between_the_input_and_the_softmax_is_float16() -> None:
    graph = pointwise(draw(4, 3), draw(2, 4), softmax=True)
    half = float16_graph(graph)
    assert [node.op_type for node in half.nodes] == [
        "Cast", "Transpose", "Conv", "Relu", "Conv", "Flatten", "Cast", "Softmax",
    ]  # fmt: skip
    types = types_of(half)
    assert types.pop("images") == onnx.TensorProto.UINT8
    assert [name for name, code in types.items() if code == FLOAT] == ["last/fp32", "probabilities"]
    assert {name for name, code in types.items() if code == FLOAT16} == {"pixels", "t", "c1", "r2", "c2", "flat"}
    assert {array.dtype for array in half.weights.values()} == {np.dtype(np.float16)}


def test_without_a_softmax_the_output_is_cast_to_float32() -> None:
    half = float16_graph(pointwise(draw(4, 3)))
    assert [node.op_type for node in half.nodes[-2:]] == ["Identity", "Cast"]
    assert types_of(half)["probabilities"] == FLOAT


def test_the_original_and_integer_constants_stay_as_they_were() -> None:
    graph = pointwise(draw(4, 3), draw(2, 4), softmax=True)
    graph.weights["to"] = np.array([0, -1], np.int64)
    graph.nodes[5] = make_node("Reshape", ["c2", "to"], "flat")
    before = [node.SerializeToString() for node in graph.nodes]
    half = float16_graph(graph)
    assert half.weights["to"].dtype == np.int64
    assert [node.SerializeToString() for node in graph.nodes] == before
    assert graph.weights["c1/kernel"].dtype == np.float32


def test_a_real_vgg_casts_to_a_valid_graph_with_only_one_more_cast(convert_vgg: Callable[..., Any]) -> None:
    clean = convert_vgg("vgg16-compact").clean
    half = float16_graph(clean)
    half.check()
    assert half.op_counts() == clean.op_counts() | {"Cast": 2}
    types = types_of(half)
    assert {types[node.output[0]] for node in half.nodes[:-2]} == {FLOAT16}


# --- the rounding twin


def emulate(images: np.ndarray, kernels: list[np.ndarray], bias: np.ndarray) -> np.ndarray:
    """The chain of ``pointwise`` with a bias on the first layer: sums in float32, results in float16."""
    x = images.reshape(len(images), -1).astype(np.float16)
    for number, kernel in enumerate(kernels):
        total = x.astype(np.float32) @ kernel.astype(np.float16).astype(np.float32).T
        if number == 0:
            total = total + bias.astype(np.float16).astype(np.float32)
        x = total.astype(np.float16)
        if number < len(kernels) - 1:
            x = np.maximum(x, np.float16(0))
    return x.astype(np.float32)


def test_the_twin_rounds_where_numpy_float16_rounds(run_graph: Callable[..., list[np.ndarray]]) -> None:
    kernels, bias = [draw(8, 3, scale=0.1), draw(8, 8), draw(5, 8)], draw(8)
    graph = pointwise(*kernels, biases={1: bias})
    images = RNG.integers(0, 256, (64, 1, 1, 3), dtype=np.uint8)
    wanted = emulate(images, kernels, bias)
    (answers,) = run_graph(rounding_twin(float16_graph(graph)), images=images)
    # The order of a sum may move a result across one rounding boundary: a float16 step is 2**-10 of the value.
    np.testing.assert_allclose(answers, wanted, rtol=2**-10, atol=2**-10 * np.abs(wanted).max())
    assert (answers == wanted).mean() > 0.9
    (exact,) = run_graph(graph, images=images)
    assert (exact == wanted).mean() < 0.1
    assert set(np.unique(answers.astype(np.float16).astype(np.float32) - answers)) == {0.0}


def test_the_twin_has_no_float16_weight_and_one_rounding_after_every_float16_result() -> None:
    half = float16_graph(pointwise(draw(4, 3), draw(2, 4), softmax=True))
    twin = rounding_twin(half)
    assert {array.dtype for array in twin.weights.values()} == {np.dtype(np.float32)}
    types = types_of(twin)
    rounded = [name for name, code in types.items() if code == FLOAT16]
    assert sorted(rounded) == sorted(f"{name}/fp16" for name in ("pixels", "t", "c1", "r2", "c2", "flat"))
    assert all(types[name] == FLOAT for name in ("pixels", "t", "c1", "r2", "c2", "flat", "last/fp32"))
    assert half.weights["c1/kernel"].dtype == np.float16


def test_a_float32_graph_is_its_own_twin() -> None:
    graph = pointwise(draw(4, 3), softmax=True)
    twin = rounding_twin(graph)
    assert [node.SerializeToString() for node in twin.nodes] == [node.SerializeToString() for node in graph.nodes]


def test_int8_steps_are_not_rounded_to_float16_and_what_they_become_is() -> None:
    graph = pointwise(draw(4, 3), draw(2, 4), draw(2, 2), softmax=True)
    magnitudes = {"t": 255.0, "r2": 100.0}
    twin = rounding_twin(quantized_graph(float16_graph(graph), INT8_RTX, magnitudes))
    twin.check()
    rounded = {node.output[0] for node in twin.nodes if node.op_type == "Cast" and node.output[0].endswith("/fp16")}
    assert {"c1/input_dequantized/fp16", "c1/kernel_dequantized/fp16", "c1/fp16", "c3/fp16"} <= rounded
    assert not any("int8" in name for name in rounded)
    assert twin.weights["c1/kernel_int8"].dtype == np.int8


def test_overflow_shows_in_the_twin_though_not_in_onnx_runtimes_float16(
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    """Why the twin exists: 300 * 1000 is beyond FP16, and ONNX Runtime on a CPU never notices."""
    graph = pointwise(np.float32([[1000]]), np.float32([[1e-3]]))
    half, images = float16_graph(graph), np.full((1, 1, 1, 1), 255, np.uint8)
    np.testing.assert_allclose(run_graph(half, images=images)[0], 255, rtol=1e-2)
    np.testing.assert_array_equal(run_graph(rounding_twin(half), images=images)[0], np.inf)
    images[:] = 65  # 65,000 fits
    np.testing.assert_allclose(run_graph(rounding_twin(half), images=images)[0], 65, rtol=1e-2)


def test_loss_of_small_values_shows_in_the_twin(run_graph: Callable[..., list[np.ndarray]]) -> None:
    graph = pointwise(np.float32([[1e-5]]), np.float32([[1e-3]]), np.float32([[6e4]]))
    images = np.full((1, 1, 1, 1), 1, np.uint8)
    np.testing.assert_allclose(run_graph(graph, images=images)[0], 6e-4, rtol=1e-5)
    np.testing.assert_array_equal(run_graph(rounding_twin(float16_graph(graph)), images=images)[0], 0)


# --- weights and pixels


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_beyond_float16_is_refused_by_name(sign: int) -> None:
    graph = pointwise(draw(4, 3), draw(2, 4), softmax=True)
    graph.weights["c2/kernel"][1, 2] = sign * 65600
    with pytest.raises(ConversionError, match=r"c2/kernel: a weight is 6\.56e\+04, and FP16 ends at 65504"):
        float16_graph(graph)


def test_the_largest_float16_weight_is_kept() -> None:
    graph = pointwise(np.float32([[65504, -65504]]))
    assert float16_graph(graph).weights["c1/kernel"].ravel().tolist() == [65504, -65504]


def test_a_weight_that_is_no_number_is_refused_by_name() -> None:
    graph = pointwise(np.float32([[1, np.nan]]))
    with pytest.raises(ConversionError, match="c1/kernel"):
        float16_graph(graph)


def test_all_256_pixel_values_go_through_cast_and_rescaling_exactly(
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    nodes = [
        make_node("Cast", ["images"], "pixels", to=FLOAT),
        make_node("Mul", ["pixels", "scale"], "scaled"),
        make_node("Add", ["scaled", "offset"], "probabilities"),
    ]
    weights = {"scale": np.array(1 / 128, np.float32), "offset": np.array(-1, np.float32)}
    inputs = [value_info("images", np.uint8, ["N", 2, 2, 64])]
    graph = Graph(nodes, weights, inputs, [value_info("probabilities", np.float32, ["N", 2, 2, 64])])
    images = np.arange(256, dtype=np.uint8).reshape(1, 2, 2, 64)
    wanted = (images.astype(np.float64) - 128) / 128
    half = float16_graph(graph)
    np.testing.assert_array_equal(run_graph(half, images=images)[0], wanted)
    np.testing.assert_array_equal(run_graph(rounding_twin(half), images=images)[0], wanted)
