from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge.analysis import analyse
from vggedge.architecture import get_spec
from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.layers import layer_macs, layer_outputs, layer_records, signal_to_noise
from vggedge_export.quantization import INT8, INT8_RTX, quantized_graph
from vggedge_runtime.errors import ConversionError
from vggedge_runtime.evidence import LayerRecord

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FLOAT = onnx.TensorProto.FLOAT
IMAGES = np.random.default_rng(1).integers(0, 256, (5, 4, 5, 3), dtype=np.uint8)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def net() -> Graph:
    """images (N, 4, 5, 3) -> Conv 3x3 -> Relu -> Flatten -> Gemm -> Softmax, between them -1 and 1."""
    nodes = [
        make_node("Cast", ["images"], "pixels", to=FLOAT),
        make_node("Transpose", ["pixels"], "t", perm=[0, 3, 1, 2]),
        make_node("Mul", ["t", "factor"], "scaled"),
        make_node("Conv", ["scaled", "conv/kernel", "conv/bias"], "conv"),
        make_node("Relu", ["conv"], "conv/relu"),
        make_node("Flatten", ["conv/relu"], "flat"),
        make_node("Gemm", ["flat", "fc/kernel"], "fc", transB=1),
        make_node("Softmax", ["fc"], "probabilities", "fc/softmax"),
    ]
    weights = {"factor": np.array(1 / 255, np.float32), "conv/kernel": draw(6, 3, 3, 3), "conv/bias": draw(6, seed=1)}
    weights["fc/kernel"] = draw(4, 36, seed=2)
    values = [value_info("images", np.uint8, ["N", 4, 5, 3])], [value_info("probabilities", np.float32, ["N", 4])]
    graph = Graph(nodes, weights, *values)
    graph.check()
    return graph


# --- multiply-accumulates


def one_layer(op: str, kernel: tuple[int, ...], source: list, result: list, **attributes: Any) -> Graph:
    """``op`` alone, with weights of the shape ``kernel``, from a tensor of the shape ``source`` to ``result``."""
    values = [value_info("x", np.float32, source)], [value_info("y", np.float32, result)]
    graph = Graph([make_node(op, ["x", "w"], "y", "layer", **attributes)], {"w": draw(*kernel)}, *values)
    graph.check()
    return graph


@pytest.mark.parametrize(
    ("op", "kernel", "source", "result", "attributes", "wanted"),
    [
        ("Conv", (8, 3, 3, 3), ["N", 3, 6, 7], ["N", 8, 6, 7], {"pads": [1, 1, 1, 1]}, 8 * 3 * 9 * 42),
        ("Conv", (8, 3, 3, 3), ["N", 3, 7, 7], ["N", 8, 3, 3], {"strides": [2, 2]}, 8 * 3 * 9 * 9),
        ("Conv", (8, 3, 3, 3), ["N", 3, 7, 7], ["N", 8, 3, 3], {"dilations": [2, 2]}, 8 * 3 * 9 * 9),
        ("Conv", (8, 1, 3, 3), ["N", 4, 5, 5], ["N", 8, 3, 3], {"group": 4}, 8 * 9 * 9),
        ("Conv", (4, 1, 3, 3), ["N", 4, 5, 5], ["N", 4, 3, 3], {"group": 4}, 4 * 9 * 9),
        ("Conv", (8, 3, 5), ["N", 3, 9], ["N", 8, 5], {}, 8 * 3 * 5 * 5),
        ("ConvTranspose", (3, 8, 2, 2), ["N", 3, 4, 5], ["N", 8, 8, 10], {"strides": [2, 2]}, 3 * 8 * 4 * 20),
        ("ConvTranspose", (4, 2, 3, 3), ["N", 4, 5, 5], ["N", 4, 7, 7], {"group": 2}, 4 * 2 * 9 * 25),
        ("Gemm", (10, 7), ["N", 7], ["N", 10], {"transB": 1}, 70),
        ("Gemm", (7, 10), ["N", 7], ["N", 10], {}, 70),
        ("MatMul", (7, 10), ["N", 7], ["N", 10], {}, 70),
        ("MatMul", (7, 10), ["N", 12, 7], ["N", 12, 10], {}, 12 * 70),
        ("MatMul", (7, 10), ["N", 3, 4, 7], ["N", 3, 4, 10], {}, 12 * 70),
        ("MatMul", (3, 7, 10), ["N", 3, 4, 7], ["N", 3, 4, 10], {}, 3 * 4 * 70),  # a matrix for each of three heads
        ("MatMul", (7,), ["N", 12, 7], ["N", 12], {}, 12 * 7),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_macs_of_one_layer(op: str, kernel: tuple, source: list, result: list, attributes: dict, wanted: int) -> None:
    found = layer_macs(one_layer(op, kernel, source, result, **attributes))
    assert found == {"layer": wanted}
    assert type(found["layer"]) is int


def test_a_batch_of_a_fixed_size_counts_one_image() -> None:
    graph = one_layer("Conv", (8, 3, 3, 3), [16, 3, 6, 7], [16, 8, 6, 7], pads=[1, 1, 1, 1])
    assert layer_macs(graph) == {"layer": 8 * 3 * 9 * 42}


def test_what_computes_its_kernel_and_what_has_none_is_no_layer() -> None:
    graph = net()
    graph.nodes.insert(3, make_node("Mul", ["conv/kernel", "factor"], "computed"))
    graph.nodes[4].input[1] = "computed"
    graph.check()
    assert layer_macs(graph) == {"fc": 144}


@pytest.mark.parametrize("name", ["vgg9-compact", "vgg16-compact", "vgg16-1x1-compact"])
def test_macs_of_the_family_are_those_of_the_analysis(name: str, convert_vgg: Callable[..., Any]) -> None:
    rows = analyse(get_spec(name, input=(32, 32, 3), classes=5)).layers
    wanted = {row.name: row.macs for row in rows if row.macs}
    clean = convert_vgg(name).clean
    assert layer_macs(clean) == wanted
    assert list(layer_macs(clean)) == list(wanted)
    assert layer_macs(float16_graph(clean)) == wanted


# --- outputs


def test_outputs_are_numpys_and_in_the_order_of_images_and_layers(tmp_path: Path) -> None:
    graph = net()
    found = layer_outputs(graph, IMAGES, tmp_path / "probe.onnx")
    assert [(name, array.shape, array.dtype) for name, array in found.items()] == [
        ("conv", (5, 6, 2, 3), np.float32),
        ("fc", (5, 4), np.float32),
    ]
    x = (IMAGES / 255).transpose(0, 3, 1, 2)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    conv = np.einsum("nchwij,ocij->nohw", windows, graph.weights["conv/kernel"].astype(np.float64))
    conv += graph.weights["conv/bias"][:, None, None]
    np.testing.assert_allclose(found["conv"], conv, rtol=1e-4, atol=1e-5)
    fc = np.maximum(conv, 0).reshape(5, -1) @ graph.weights["fc/kernel"].T.astype(np.float64)
    np.testing.assert_allclose(found["fc"], fc, rtol=1e-4, atol=1e-4)


def test_asking_for_outputs_changes_neither_the_graph_nor_the_folder(tmp_path: Path) -> None:
    graph = net()
    before = graph.to_bytes()
    layer_outputs(graph, IMAGES, tmp_path / "probe.onnx")
    assert graph.to_bytes() == before
    assert list(tmp_path.iterdir()) == []


def test_the_layer_that_is_the_output_of_the_graph_is_left_out(tmp_path: Path) -> None:
    graph = net()
    del graph.nodes[-1]
    graph.rename_tensor("fc", "probabilities")
    assert list(layer_outputs(graph, IMAGES, tmp_path / "probe.onnx")) == ["conv"]
    graph = one_layer("Gemm", (10, 7), ["N", 7], ["N", 10], transB=1)
    assert layer_outputs(graph, IMAGES, tmp_path / "probe.onnx") == {}


def test_a_twins_layers_give_what_is_rounded(tmp_path: Path) -> None:
    """What stands before the rounding would make an FP16 layer look better than it is."""
    found = layer_outputs(rounding_twin(float16_graph(net())), IMAGES, tmp_path / "probe.onnx")
    assert list(found) == ["conv", "fc"]
    for array in found.values():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, array.astype(np.float16).astype(np.float32))


def test_a_twins_wide_layer_gives_what_is_not_rounded(tmp_path: Path) -> None:
    found = layer_outputs(rounding_twin(float16_graph(net(), {"conv"})), IMAGES, tmp_path / "probe.onnx")
    assert (found["conv"] != found["conv"].astype(np.float16)).mean() > 0.9


def test_rounding_alone_costs_a_layer_with_weights_of_few_bits_some_70_db(tmp_path: Path) -> None:
    """A step of FP16 is 2**-11 to 2**-10 of the value: 20 log10(2**11.5 * sqrt(12)) is 80 dB, less what came before."""
    graph = net()
    graph.weights["factor"] = np.array(1 / 128, np.float32)
    for name in ("conv/kernel", "conv/bias"):
        graph.weights[name] = (np.round(graph.weights[name] * 64) / 64).astype(np.float32)
    plain = layer_outputs(graph, IMAGES, tmp_path / "probe.onnx")
    twin = layer_outputs(rounding_twin(float16_graph(graph)), IMAGES, tmp_path / "probe.onnx")
    ratio = signal_to_noise(plain, twin)["conv"]
    assert ratio is not None
    assert 70 < ratio < 85


# --- signal to noise


@pytest.mark.parametrize(("noise", "wanted"), [(1.0, 20.0), (0.1, 40.0), (10.0, 0.0), (100.0, -20.0)])
def test_ratios_are_decibels_of_power(noise: float, wanted: float) -> None:
    signal = np.full((3, 4), 10, np.float32)
    found = signal_to_noise({"a": signal}, {"a": signal + np.float32(noise)})
    assert found == {"a": pytest.approx(wanted, abs=1e-4)}


def test_power_is_summed_over_all_values() -> None:
    signal, other = np.float32([[3, 0], [0, 4]]), np.float32([[3, 1], [2, 4]])
    assert signal_to_noise({"a": signal}, {"a": other})["a"] == pytest.approx(10 * math.log10(25 / 5))


def test_no_difference_has_no_ratio() -> None:
    signal = draw(3, 4)
    assert signal_to_noise({"a": signal}, {"a": signal.copy()}) == {"a": None}


def test_layers_that_one_side_lacks_are_left_out() -> None:
    signal = draw(3, 4)
    assert list(signal_to_noise({"a": signal, "b": signal, "c": signal}, {"b": 2 * signal, "d": signal})) == ["b"]
    assert signal_to_noise({"a": signal}, {"a": draw(3, 5)}) == {}


def test_large_values_do_not_overflow_the_power() -> None:
    signal = np.full((2, 2), 1e30, np.float32)
    assert signal_to_noise({"a": signal}, {"a": signal * np.float32(1.5)})["a"] == pytest.approx(6.02, abs=0.01)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_layer_that_is_not_finite_is_named(bad: float) -> None:
    signal = draw(3, 4)
    broken = signal.copy()
    broken[1, 2] = bad
    with pytest.raises(ConversionError, match=r"^conv2: gives NaN or infinity on an evaluation image"):
        signal_to_noise({"conv1": signal, "conv2": signal}, {"conv1": signal, "conv2": broken})


def test_an_evaluation_image_that_overflows_where_no_calibration_image_did_is_told_by_its_layer(
    tmp_path: Path,
) -> None:
    graph = net()
    graph.weights["conv/bias"] = np.full(6, 6e4, np.float32)
    graph.weights["conv/kernel"] = np.full((6, 3, 3, 3), 1e3, np.float32)
    plain = layer_outputs(graph, IMAGES, tmp_path / "probe.onnx")
    twin = layer_outputs(rounding_twin(float16_graph(graph)), IMAGES, tmp_path / "probe.onnx")
    with pytest.raises(ConversionError, match=r"^conv: gives NaN or infinity"):
        signal_to_noise(plain, twin)


# --- records


def records(graph: Graph, **options: Any) -> tuple[LayerRecord, ...]:
    settings: dict[str, Any] = {"largest": {}, "scales": {}, "snr_db": {}} | options
    return layer_records(graph, layer_macs(net()), **settings)


def test_a_record_holds_what_is_known_of_a_layer() -> None:
    found = records(
        quantized_graph(net(), INT8, {"conv": 2 / 127}),
        largest={"conv": 7.5, "conv/relu": 7.0, "fc": 3.0},
        scales={"conv": 2 / 127},
        snr_db={"conv": 31.5, "fc": None},
    )
    assert found == (
        LayerRecord(
            name="conv",
            op="Conv",
            precision="int8",
            macs=6 * 27 * 6,
            largest_output=7.5,
            int8_magnitude=pytest.approx(2.0),
            snr_db=31.5,
        ),
        LayerRecord(name="fc", op="Gemm", precision="fp32", macs=144, largest_output=3.0),
    )


def test_what_was_not_measured_is_none() -> None:
    assert records(net()) == (
        LayerRecord(name="conv", op="Conv", precision="fp32", macs=972),
        LayerRecord(name="fc", op="Gemm", precision="fp32", macs=144),
    )


@pytest.mark.parametrize(
    ("graph", "wanted"),
    [
        (net(), ["fp32", "fp32"]),
        (float16_graph(net()), ["fp16", "fp16"]),
        (float16_graph(net(), {"conv"}), ["fp32", "fp16"]),
        (quantized_graph(net(), INT8, {"conv": 1.0}), ["int8", "fp32"]),
        (quantized_graph(float16_graph(net()), INT8_RTX, {"conv": 1.0}), ["int8", "fp16"]),
        (quantized_graph(float16_graph(net(), {"conv", "fc"}), INT8_RTX, {"conv": 1.0}), ["int8", "fp32"]),
    ],
    ids=["fp32", "fp16", "wide", "int8", "int8-rtx", "wide int8-rtx"],
)
def test_the_precision_is_that_of_the_graph_as_it_is_shipped(graph: Graph, wanted: list[str]) -> None:
    assert [record.precision for record in records(graph)] == wanted


def test_a_layer_that_computes_its_kernel_has_no_record() -> None:
    graph = net()
    graph.nodes.insert(3, make_node("Mul", ["conv/kernel", "factor"], "computed"))
    graph.nodes[4].input[1] = "computed"
    found = layer_records(graph, layer_macs(graph), largest={}, scales={}, snr_db={})
    assert [record.name for record in found] == ["fc"]
