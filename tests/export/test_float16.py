from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_export.calibration import Calibration
from vggedge_export.engine import EngineConfig, build_engine
from vggedge_export.float16 import HEADROOM, float16_graph, overflowing_nodes, rounding_twin
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8, INT8_RTX, QuantizationRecipe, quantized_graph
from vggedge_runtime.errors import ConversionError
from vggedge_runtime.progress import ignore_progress
from vggedge_runtime.tensorrt_api import load_tensorrt

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
    scales = {"c1": 255.0 / 127, "c2": 100.0 / 127}
    twin = rounding_twin(quantized_graph(float16_graph(graph), INT8_RTX, scales))
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


# --- nodes that would leave FP16's range


@pytest.fixture
def scan(tmp_path: Path) -> Callable[[Graph, np.ndarray], dict[str, float]]:
    """``scan(graph, images)`` -> the nodes to keep in FP32, as export finds them."""

    def run(graph: Graph, images: np.ndarray) -> dict[str, float]:
        calibration = Calibration(images, 4, tmp_path / "probe.onnx", ignore_progress)
        return overflowing_nodes(graph, calibration.measure(graph, [], with_histograms=False).largest)

    return run


def casts_of(graph: Graph) -> list[tuple[str, str, int]]:
    """(what is cast, what comes of it, type) of all casts but that of the pixels."""
    found = [(node.input[0], node.output[0], node.attribute[0].i) for node in graph.nodes if node.op_type == "Cast"]
    return [cast for cast in found if cast[0] != "images"]


def check_types(graph: Graph, wide: Collection[str]) -> None:
    """ONNX takes the graph, and every ``wide`` node and nothing else but the tail computes in FP32."""
    graph.check()
    types = types_of(graph)
    for node in graph.nodes:
        if node.op_type not in {"Cast", "Softmax", "Reshape"}:
            assert types[node.output[0]] == (FLOAT if node.name in wide else FLOAT16), node.name
            for name in node.input:
                wanted = np.float32 if node.name in wide else np.float16
                assert name not in graph.weights or graph.weights[name].dtype == wanted, name


def test_a_layer_that_overflows_is_seen_named_and_kept_in_float32(
    scan: Callable[..., dict[str, float]], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = pointwise(np.float32([[1000], [-500]]), np.float32([[1e-3, 1e-3], [0, 5e-4]]))
    images = np.uint8([255, 200, 3]).reshape(3, 1, 1, 1)
    (exact,) = run_graph(graph, images=images)
    (narrow,) = run_graph(rounding_twin(float16_graph(graph)), images=images)
    assert np.isinf(narrow[:2]).any(axis=1).all()  # 255 * 1000 and 200 * 1000
    assert np.isfinite(narrow[2]).all()

    wide = scan(graph, images)
    assert wide == {"c1": 255_000, "r2": 255_000, "c2": 255_000}
    kept = float16_graph(graph, wide)
    check_types(kept, wide)
    (answers,) = run_graph(rounding_twin(kept), images=images)
    np.testing.assert_allclose(answers, exact, rtol=2**-10)


def test_a_range_that_fits_changes_nothing(scan: Callable[..., dict[str, float]]) -> None:
    graph = pointwise(draw(4, 3), draw(2, 4), softmax=True)
    wide = scan(graph, RNG.integers(0, 256, (9, 1, 1, 3), dtype=np.uint8))
    assert wide == {}
    assert float16_graph(graph, wide).to_bytes() == float16_graph(graph).to_bytes()


def test_tensors_are_given_a_headroom_of_two() -> None:
    assert HEADROOM == 2
    graph = pointwise(np.float32([[1]]), np.float32([[1]]))
    assert overflowing_nodes(graph, {"c1": 65504 / 2, "t": 255.0}) == {}
    beyond = 65504 / 2 + 1
    assert overflowing_nodes(graph, {"c1": beyond, "t": 255.0}) == {"c1": beyond, "r2": beyond}


def test_an_image_twice_as_bright_as_those_of_the_scan_still_fits(
    scan: Callable[..., dict[str, float]], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = pointwise(np.float32([[256]]), np.float32([[1e-2]]))
    images = np.full((1, 1, 1, 1), 127, np.uint8)
    assert scan(graph, images) == {}
    (answers,) = run_graph(rounding_twin(float16_graph(graph)), images=2 * images)
    np.testing.assert_allclose(answers, [[650.24]], rtol=2**-9)


def test_what_reads_a_large_tensor_is_kept_as_well_as_what_gives_it() -> None:
    """A reader in FP16 would get infinity from the cast before it."""
    graph = pointwise(draw(4, 3), draw(2, 4), draw(2, 2), softmax=True)
    assert list(overflowing_nodes(graph, {"r2": 4e4})) == ["r2", "c2"]


@pytest.mark.parametrize(("most", "is_wide"), [(np.inf, False), (6.0, False), (3.4e38, True)])
def test_an_infinite_constant_is_infinite_in_float16_as_well(
    most: float, is_wide: bool, run_graph: Callable[..., list[np.ndarray]]
) -> None:
    """As the upper end of a Clip that has none; no manifest could hold it as a magnitude."""
    graph = pointwise(draw(4, 3, scale=0.01), draw(2, 4), softmax=True)
    position = next(index for index, node in enumerate(graph.nodes) if node.name == "r2")
    graph.nodes[position] = make_node("Clip", ["c1", "least", "most"], "r2")
    graph.weights |= {"least": np.array(0, np.float32), "most": np.array(most, np.float32)}
    graph.check()
    wide = overflowing_nodes(graph, {})
    assert list(wide) == (["r2"] if is_wide else [])
    half = float16_graph(graph, wide)
    check_types(half, wide)
    images = RNG.integers(0, 256, (4, 1, 1, 3), dtype=np.uint8)
    (exact,) = run_graph(graph, images=images)
    np.testing.assert_allclose(run_graph(rounding_twin(half), images=images)[0], exact, atol=1e-2)


def test_beside_an_infinite_constant_a_large_one_still_counts() -> None:
    graph = pointwise(np.float32([[1]]), np.float32([[1]]))
    graph.weights["c2/kernel"] = np.float32([-np.inf, 7e4]).reshape(2, 1, 1, 1)
    assert overflowing_nodes(graph, {}) == {"c2": 7e4}
    with pytest.raises(ConversionError, match="c2/kernel"):
        float16_graph(graph)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_beyond_float16_keeps_its_layer_in_float32(
    sign: int, run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = pointwise(np.float32([[1e-4], [2e-4]]), np.float32([[sign * 65600, 1], [1, 1]]), np.float32([[1e-3, 1]]))
    wide = overflowing_nodes(graph, {"c1": 0.05})
    assert wide == {"c2": 65600}
    half = float16_graph(graph, wide)
    check_types(half, wide)
    images = np.uint8([255, 1]).reshape(2, 1, 1, 1)
    (exact,) = run_graph(graph, images=images)
    np.testing.assert_allclose(run_graph(rounding_twin(half), images=images)[0], exact, rtol=1e-2)


def test_weights_have_no_headroom_and_a_bias_counts() -> None:
    graph = pointwise(np.float32([[65504]]), np.float32([[1]]), biases={2: np.float32([-65600])})
    assert overflowing_nodes(graph, {}) == {"c2": 65600}
    graph.weights["c1/kernel"] = np.full((1, 1, 1, 1), np.nan, np.float32)
    assert "c1" in overflowing_nodes(graph, {})


def test_two_wide_nodes_in_a_row_have_no_cast_between_them() -> None:
    graph = pointwise(draw(4, 3), draw(4, 4), draw(2, 4), softmax=True)
    half = float16_graph(graph, {"c1", "r2", "c2"})
    check_types(half, {"c1", "r2", "c2"})
    assert [node.op_type for node in half.nodes] == [
        "Cast", "Transpose", "Cast", "Conv", "Relu", "Conv", "Cast", "Relu", "Conv", "Flatten", "Cast", "Softmax",
    ]  # fmt: skip
    assert casts_of(half) == [("t", "c1/fp32", FLOAT), ("c2", "r3/from_fp32", FLOAT16), ("flat", "last/fp32", FLOAT)]


def test_logits_that_overflow_go_to_the_softmax_as_they_are(
    scan: Callable[..., dict[str, float]], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = pointwise(np.float32([[1], [0.5]]), np.float32([[400, 0], [400, 1e-2]]), softmax=True)
    images = np.uint8([255, 100]).reshape(2, 1, 1, 1)
    assert np.isnan(run_graph(rounding_twin(float16_graph(graph)), images=images)[0]).any()  # inf - inf
    wide = scan(graph, images)
    assert list(wide) == ["c2", "flat", "last"]
    half = float16_graph(graph, wide)
    assert casts_of(half) == [("r2", "c2/fp32", FLOAT)]
    (exact,) = run_graph(graph, images=images)
    assert 0.5 < exact.max() < 0.9
    np.testing.assert_allclose(run_graph(rounding_twin(half), images=images)[0], exact, rtol=1e-2)


@pytest.mark.parametrize("wide", [{"c1", "last"}, {"c1", "flat", "last"}, {"last"}], ids=sorted)
def test_a_wide_end_without_a_softmax_is_not_cast_again(wide: set[str]) -> None:
    graph = pointwise(draw(4, 3))
    half = float16_graph(graph, wide)
    half.check()
    assert half.nodes[-1].name == "last"
    assert types_of(half)["probabilities"] == FLOAT
    assert sum(code == FLOAT for *_, code in casts_of(half)) == (1 if "flat" in wide or len(wide) == 1 else 2)


# --- branches


def branches() -> Graph:
    """``c1`` -> relu ``r`` -> convolutions ``a`` and ``b`` -> sum ``s`` -> convolution ``c2`` -> logits -> softmax."""
    graph = pointwise(draw(4, 3, scale=0.01), draw(3, 4), softmax=True)
    by_name = {node.name: node for node in graph.nodes}
    by_name["r2"].name = "r"
    by_name["c2"].input[0] = "s"
    position = graph.index(by_name["c2"])
    graph.nodes[position:position] = [
        make_node("Conv", ["r2", "a/kernel"], "a"),
        make_node("Conv", ["r2", "b/kernel"], "b"),
        make_node("Add", ["a", "b"], "s"),
    ]
    graph.weights |= {f"{name}/kernel": draw(4, 4)[:, :, None, None] for name in "ab"}
    graph.check()
    return graph


@pytest.mark.parametrize(
    "wide",
    [set(names) for count in range(7) for names in itertools.combinations(["c1", "r", "a", "b", "s", "c2"], count)],
    ids=lambda names: "+".join(sorted(names)) or "none",
)
def test_any_choice_of_wide_nodes_is_a_valid_graph_with_one_cast_a_tensor_that_crosses(
    wide: set[str], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = branches()
    before = graph.to_bytes()
    half = float16_graph(graph, wide)
    check_types(half, wide)
    still_wide = wide | {"last"}
    makers = {name: node.name for node in graph.nodes for name in node.output}
    crossing = {
        (name, node.name in still_wide)
        for node in graph.nodes
        for name in node.input
        if name in makers and name != "images" and (makers[name] in still_wide) != (node.name in still_wide)
    }
    assert sorted((name, code == FLOAT) for name, _, code in casts_of(half)) == sorted(crossing)
    assert graph.to_bytes() == before

    twin = rounding_twin(half)
    twin.check()
    images = np.random.default_rng(1).integers(0, 256, (16, 1, 1, 3), dtype=np.uint8)
    (exact,) = run_graph(graph, images=images)
    (answers,) = run_graph(twin, images=images)
    assert np.abs(answers - exact).max() < 1e-2
    np.testing.assert_allclose(run_graph(half, images=images)[0], exact, atol=1e-2)


def test_a_wide_node_that_two_others_read_is_cast_once() -> None:
    half = float16_graph(branches(), {"r"})
    assert casts_of(half)[:2] == [("c1", "r/fp32", FLOAT), ("r2", "a/from_fp32", FLOAT16)]
    assert {node.name: node.input[0] for node in half.nodes if node.name in "ab"} == {
        "a": "a/from_fp32",
        "b": "a/from_fp32",
    }


def test_a_wide_sum_of_two_narrow_tensors_has_a_cast_for_each() -> None:
    half = float16_graph(branches(), {"s"})
    half.check()
    assert casts_of(half)[:2] == [("a", "s/fp32", FLOAT), ("b", "s/fp32_2", FLOAT)]
    assert next(list(node.input) for node in half.nodes if node.name == "s") == ["s/fp32", "s/fp32_2"]


def test_a_narrow_sum_of_two_wide_tensors_has_a_cast_for_each() -> None:
    half = float16_graph(branches(), {"a", "b"})
    half.check()
    assert casts_of(half)[1:3] == [("a", "s/from_fp32", FLOAT16), ("b", "s/from_fp32_2", FLOAT16)]


def test_a_sum_that_overflows_keeps_its_branches_apart(
    scan: Callable[..., dict[str, float]], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    """Two branches that fit and whose sum does not: what a residual network does."""
    graph = branches()
    for name, factor in (("c1", 1.0), ("a", 120.0), ("b", 110.0), ("c2", 1e-5)):
        shape = graph.weights[f"{name}/kernel"].shape
        graph.weights[f"{name}/kernel"] = np.broadcast_to(np.eye(*shape[:2], dtype=np.float32)[:, :, None, None], shape)
        graph.weights[f"{name}/kernel"] = graph.weights[f"{name}/kernel"] * np.float32(factor)
    images = np.uint8([[255, 20, 90], [3, 2, 1]]).reshape(2, 1, 1, 3)
    wide = scan(graph, images)
    assert wide == {"s": 58_650, "c2": 58_650}
    half = float16_graph(graph, wide)
    check_types(half, wide)
    (exact,) = run_graph(graph, images=images)
    np.testing.assert_allclose(run_graph(rounding_twin(half), images=images)[0], exact, rtol=1e-2)


# --- weights that two layers read


def shared_kernel() -> Graph:
    graph = pointwise(draw(3, 3), draw(3, 3), draw(2, 3), softmax=True)
    next(node for node in graph.nodes if node.name == "c2").input[1] = "c1/kernel"
    graph.drop_unused()
    graph.layer_of["c1/kernel"] = "c1"
    return graph


@pytest.mark.parametrize(("wide", "narrow"), [("c1", "c2"), ("c2", "c1")])
def test_a_weight_of_a_wide_and_a_narrow_layer_is_there_in_both_types(wide: str, narrow: str) -> None:
    graph = shared_kernel()
    half = float16_graph(graph, {wide})
    check_types(half, {wide})
    kernels = {node.name: node.input[1] for node in half.nodes if node.op_type == "Conv"}
    assert kernels[narrow] == "c1/kernel"
    assert kernels[wide] != "c1/kernel"
    assert half.layer_of[kernels[wide]] == "c1"
    np.testing.assert_array_equal(half.weights[kernels[wide]], graph.weights["c1/kernel"])
    np.testing.assert_array_equal(half.weights["c1/kernel"], graph.weights["c1/kernel"].astype(np.float16))
    assert graph.weights["c1/kernel"].dtype == np.float32


def test_a_weight_of_two_wide_layers_is_there_once() -> None:
    half = float16_graph(shared_kernel(), {"c1", "c2"})
    check_types(half, {"c1", "c2"})
    assert sorted(half.weights) == ["c1/kernel", "c3/kernel"]


def test_a_weight_of_two_layers_that_is_too_large_keeps_both() -> None:
    graph = shared_kernel()
    graph.weights["c1/kernel"][0, 0] = 7e4
    assert overflowing_nodes(graph, {}) == pytest.approx({"c1": 7e4, "c2": 7e4})
    with pytest.raises(ConversionError, match="c1/kernel"):
        float16_graph(graph, {"c1"})


# --- what is no float


@pytest.mark.parametrize("wide", [set(), {"flat"}, {"flat", "again"}, {"c1"}], ids=sorted)
def test_integers_stay_as_they_are_whatever_is_wide(wide: set[str]) -> None:
    graph = pointwise(draw(4, 3), softmax=True)
    graph.weights["to"] = np.array([0, -1], np.int64)
    graph.nodes[3:4] = [make_node("Reshape", ["c1", "to"], "again"), make_node("Reshape", ["again", "to"], "flat")]
    graph.check()
    half = float16_graph(graph, wide)
    half.check()
    integers = {name: array for name, array in half.weights.items() if array.dtype.kind == "i"}
    assert list(integers) == ["to"]
    assert integers["to"] is graph.weights["to"]


def test_a_shape_that_is_computed_is_not_cast() -> None:
    graph = pointwise(draw(4, 3), softmax=True)
    position = next(index for index, node in enumerate(graph.nodes) if node.name == "flat")
    graph.weights |= {"first": np.array([0], np.int64), "rest": np.array([-1], np.int64)}
    graph.nodes[position : position + 1] = [
        make_node("Shape", ["c1"], "shape"),
        make_node("Gather", ["shape", "first"], "n"),
        make_node("Concat", ["n", "rest"], "to", axis=0),
        make_node("Reshape", ["c1", "to"], "flat"),
    ]
    graph.check()
    half = float16_graph(graph, {"c1", "shape", "n", "to"})
    half.check()
    assert casts_of(half) == [("t", "c1/fp32", FLOAT), ("c1", "flat/from_fp32", FLOAT16), ("flat", "last/fp32", FLOAT)]


# --- names


def test_a_cast_takes_no_name_that_is_taken(run_graph: Callable[..., list[np.ndarray]]) -> None:
    graph = pointwise(draw(4, 3, scale=0.01), draw(4, 4), draw(2, 4), softmax=True)
    for old, new in (("r2", "c2/fp32"), ("r3", "c3/from_fp32"), ("c3", "last/fp32")):
        node = next(node for node in graph.nodes if node.name == old)
        node.name = new
        graph.rename_tensor(old, new)
    graph.check()
    wide = {"c2", "c3/from_fp32"}
    half = float16_graph(graph, wide)
    check_types(half, wide)
    images = RNG.integers(0, 256, (4, 1, 1, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        run_graph(rounding_twin(half), images=images)[0], run_graph(graph, images=images)[0], atol=1e-2
    )


def test_the_twin_rounds_what_is_cast_down_behind_a_wide_node_and_nothing_in_it() -> None:
    half = float16_graph(pointwise(draw(4, 3), draw(4, 4), draw(2, 4), softmax=True), {"c2"})
    twin = rounding_twin(half)
    twin.check()
    rounded = {node.input[0] for node in twin.nodes if node.op_type == "Cast" and node.attribute[0].i == FLOAT16}
    assert {name.removesuffix("/exact") for name in rounded} == {"pixels", "t", "c1", "r2", "r3/from_fp32", "r3", "c3",
                                                                 "flat"}  # fmt: skip


# --- INT8 and TensorRT on top


@pytest.mark.parametrize("recipe", [INT8, INT8_RTX], ids=["per channel", "per tensor"])
def test_an_int8_layer_between_wide_and_narrow_ones_has_scales_of_its_own_type(
    recipe: QuantizationRecipe, scan: Callable[..., dict[str, float]], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = pointwise(np.float32([[1], [0.5]]), draw(4, 2, scale=400), draw(4, 4, scale=1e-4), draw(2, 4), softmax=True)
    images = RNG.integers(1, 256, (32, 1, 1, 1), dtype=np.uint8)
    wide = scan(graph, images)
    assert list(wide) == ["c2", "r3", "c3"]
    largest = {"c1": 255.0, "c2": 255.0, "c3": wide["r3"]}
    scales = {name: magnitude / 127 for name, magnitude in largest.items()}
    mixed = quantized_graph(float16_graph(graph, wide), recipe, scales)
    mixed.check()
    types_of(mixed)
    dtypes = {name: mixed.weights[f"{name}/input_scale"].dtype for name in scales}
    assert dtypes == {"c1": np.float16, "c2": np.float32, "c3": np.float32}
    assert {name: mixed.weights[f"{name}/kernel_scale"].dtype for name in scales} == dtypes
    (exact,) = run_graph(graph, images=images)
    (answers,) = run_graph(rounding_twin(mixed), images=images)
    assert np.abs(answers - exact).max() < 0.1


def wide_vgg() -> tuple[Graph, set[str]]:
    """A convolution and a dense layer in FP32 among others in FP16, for 8x8 images."""
    nodes = [
        make_node("Cast", ["images"], "pixels", to=FLOAT),
        make_node("Transpose", ["pixels"], "t", perm=[0, 3, 1, 2]),
        make_node("Conv", ["t", "c1/kernel"], "c1", pads=[1, 1, 1, 1]),
        make_node("Relu", ["c1"], "c1/relu"),
        make_node("Conv", ["c1/relu", "c2/kernel"], "c2", pads=[1, 1, 1, 1]),
        make_node("Relu", ["c2"], "c2/relu"),
        make_node("MaxPool", ["c2/relu"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        make_node("Flatten", ["pool"], "flat"),
        make_node("Gemm", ["flat", "fc/kernel"], "fc", transB=1),
        make_node("Softmax", ["fc"], "probabilities", "fc/softmax"),
    ]
    weights = {"c1/kernel": draw(8, 3, 3, 3), "c2/kernel": draw(8, 8, 3, 3), "fc/kernel": draw(4, 128)}
    values = [value_info("images", np.uint8, ["N", 8, 8, 3])], [value_info("probabilities", np.float32, ["N", 4])]
    return Graph(nodes, weights, *values), {"c2", "c2/relu", "fc"}


@pytest.mark.parametrize("quantized", [False, True], ids=["fp16", "int8-rtx"])
def test_tensorrt_rtx_builds_a_graph_with_wide_layers(quantized: bool, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph, wide = wide_vgg()
    half = float16_graph(graph, wide)
    if quantized:
        half = quantized_graph(half, INT8_RTX, {"c1": 2.0, "c2": 8.0})
    half.write(tmp_path / "graph.onnx")
    plan = build_engine(load_tensorrt("tensorrt_rtx"), tmp_path / "graph.onnx", (8, 8, 3), EngineConfig((1, 1, 1)))
    assert plan.nbytes > 1000
