"""The calibrator that looks behind the layer, beside plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vggedge_export.calibration import OUTPUT_ERROR, Activations, Calibration
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.output_error import FRACTIONS, best_magnitudes, output_error_probe
from vggedge_export.quantization import INT8, input_scales, quantized_graph, quantized_layers
from vggedge_export.verification import divergence
from vggedge_runtime.progress import ignore_progress

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Run = Callable[..., list[np.ndarray]]

RNG = np.random.default_rng(0)
# A few values are far above the others: neither the largest range nor the smallest is the best one.
PLANES = (RNG.normal(size=(6, 4, 5, 6)) ** 5).astype(np.float32)
KERNEL = RNG.normal(size=(3, 4, 3, 2)).astype(np.float32)
DEPTHWISE = RNG.normal(size=(4, 1, 3, 3)).astype(np.float32)
DENSE = RNG.normal(size=(7, 120)).astype(np.float32)
PLANES[:, 1] *= 20
KERNEL[:, 1] /= 100
LARGEST = float(np.abs(PLANES).max())


def graph_of(nodes: list, **weights: np.ndarray) -> Graph:
    """From ``x``, float32 (n, 4, 5, 6), on."""
    inputs = [value_info("x", np.float32, ["N", 4, 5, 6])]
    axes = "abcd"[: weights["k"].ndim]
    outputs = [value_info(nodes[-1].output[0], np.float32, axes)]
    return Graph([make_node("Identity", ["x"], "t"), *nodes], weights, inputs, outputs)


def errors(values: np.ndarray, largest: float) -> list[np.ndarray]:
    """Rounding and clipping errors of ``values`` in INT8, one array for each of FRACTIONS."""
    found = []
    for fraction in FRACTIONS:
        scale = np.float32(largest * fraction / 127)
        found.append(np.clip(np.rint(values / scale), -128, 127) * np.float64(scale) - values)
    return found


def convolve(
    x: np.ndarray, kernel: np.ndarray, strides: tuple[int, int], pads: tuple[int, int, int, int]
) -> np.ndarray:
    """ONNX's convolution; as many groups as the kernel's second axis asks for."""
    top, left, bottom, right = pads
    x = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1]]
    groups = x.shape[1] // kernel.shape[1]
    parts = zip(np.split(windows, groups, axis=1), np.split(kernel.astype(np.float64), groups), strict=True)
    return np.concatenate([np.einsum("nchwij,ocij->nohw", part, own) for part, own in parts], axis=1)


def probed(graph: Graph, run_graph: Run, x: np.ndarray = PLANES, **largest: float) -> list[np.ndarray]:
    probe = output_error_probe(graph, largest)
    probe.drop_unused()
    probe.check()
    return run_graph(probe, x=x)


def conv(name: str, kernel: str, strides: tuple[int, int] = (1, 1), pads: tuple = (0, 0, 0, 0), **more: int) -> object:
    return make_node("Conv", ["t", kernel, "bias"], name, strides=list(strides), pads=list(pads), **more)


BIAS = {"bias": np.float32([100, -200, 300])}
"""Large, as it must not count."""


# --- sums of squared errors


def test_eleven_ranges_are_tried_in_half_octaves_from_all_to_a_32nd() -> None:
    np.testing.assert_allclose(FRACTIONS, [2 ** (-k / 2) for k in range(11)])
    assert (FRACTIONS[0], FRACTIONS[-1]) == (1, 1 / 32)


@pytest.mark.parametrize(
    ("strides", "pads"),
    [((1, 1), (0, 0, 0, 0)), ((2, 1), (0, 0, 0, 0)), ((2, 3), (1, 0, 1, 1)), ((1, 1), (1, 1, 0, 0))],
)
def test_behind_a_convolution(strides: tuple, pads: tuple, run_graph: Run) -> None:
    (found,) = probed(graph_of([conv("c", "k", strides, pads)], k=KERNEL, **BIAS), run_graph, t=LARGEST)
    wanted = [np.square(convolve(error, KERNEL, strides, pads)).sum() for error in errors(PLANES, LARGEST)]
    assert found.shape == (11,)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert 0 < np.argmin(wanted) < 10  # no matter of the ends


def test_behind_a_depthwise_convolution(run_graph: Run) -> None:
    node = make_node("Conv", ["t", "k"], "c", group=4)
    (found,) = probed(graph_of([node], k=DEPTHWISE), run_graph, t=LARGEST)
    wanted = [np.square(convolve(error, DEPTHWISE, (1, 1), (0,) * 4)).sum() for error in errors(PLANES, LARGEST)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("transposed", [0, 1])
def test_behind_a_dense_layer(transposed: int, run_graph: Run) -> None:
    kernel = DENSE if transposed else np.ascontiguousarray(DENSE.T)
    nodes = [
        make_node("Flatten", ["t"], "flat"),
        make_node("Gemm", ["flat", "k", "bias"], "g", transB=transposed, alpha=0.5, beta=3.0),
    ]
    bias = np.full(7, 1e3, np.float32)
    (found,) = probed(graph_of(nodes, k=kernel, bias=bias), run_graph, flat=LARGEST)
    flat = PLANES.reshape(len(PLANES), -1)
    wanted = [np.square(0.5 * error @ DENSE.T.astype(np.float64)).sum() for error in errors(flat, LARGEST)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_all_layers_that_read_a_tensor_count_and_nothing_else_does(run_graph: Run) -> None:
    """Not a pooling layer, nor a convolution whose kernel is computed, nor one that has the tensor as its kernel."""
    nodes = [
        conv("c1", "k"),
        conv("c2", "k2", (2, 2)),
        make_node("MaxPool", ["t"], "pool", kernel_shape=[2, 2]),
        make_node("Mul", ["k", "two"], "computed"),
        make_node("Conv", ["t", "computed"], "c3"),
        make_node("Conv", ["k3", "t"], "c4"),
    ]
    weights = {"k": KERNEL, "k2": KERNEL[:, ::-1].copy(), "k3": np.ones((1, 4, 5, 6), np.float32)}
    graph = graph_of(nodes, two=np.float32(2).reshape(1), **weights, **BIAS)
    (found,) = probed(graph, run_graph, t=LARGEST)
    wanted = [
        np.square(convolve(error, KERNEL, (1, 1), (0,) * 4)).sum()
        + np.square(convolve(error, weights["k2"], (2, 2), (0,) * 4)).sum()
        for error in errors(PLANES, LARGEST)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_several_tensors_answer_in_their_order_and_the_graph_is_not_changed(run_graph: Run) -> None:
    nodes = [conv("c", "k"), make_node("Relu", ["c"], "r"), make_node("Conv", ["r", "k2"], "d")]
    graph = graph_of(nodes, k=KERNEL, k2=np.ones((1, 3, 1, 1), np.float32), **BIAS)
    before = graph.to_bytes()
    both = probed(graph, run_graph, r=900.0, t=LARGEST)
    np.testing.assert_array_equal(both[0], probed(graph, run_graph, r=900.0)[0])
    np.testing.assert_array_equal(both[1], probed(graph, run_graph, t=LARGEST)[0])
    assert (both[0] != both[1]).all()
    assert graph.to_bytes() == before


# --- what is taken


def test_the_least_sum_over_all_batches_is_taken() -> None:
    first, second = np.full((2, 11), 9.0), np.full((2, 11), 9.0)
    first[0, 2], first[0, 4], second[0, 4] = 1, 2, 2  # 10 against 4
    first[1, 10] = 8
    found = best_magnitudes({"a": 64.0, "b": 32.0}, [list(first), list(second)])
    assert found == {"a": 16.0, "b": 1.0}


def test_of_equal_sums_the_greatest_range_is_taken() -> None:
    assert best_magnitudes({"a": 5.0, "b": 3.0}, [[np.zeros(11), np.ones(11)]]) == {"a": 5.0, "b": 3.0}


def test_batches_add_up_to_the_whole_up_to_rounding(run_graph: Run) -> None:
    graph = graph_of([conv("c", "k")], k=KERNEL, **BIAS)
    whole = probed(graph, run_graph, t=LARGEST)
    parts = [probed(graph, run_graph, PLANES[rows], t=LARGEST) for rows in (slice(1), slice(1, 5), slice(5, None))]
    np.testing.assert_allclose(sum(part[0].astype(np.float64) for part in parts), whole[0], rtol=1e-5)
    assert best_magnitudes({"t": LARGEST}, parts) == best_magnitudes({"t": LARGEST}, [whole])


# --- what it is good for


CHANNELS, CLASSES = 128, 6


def uneven(factor: float, divisor: float) -> Graph:
    """Two 1x1 convolutions, two channels between them ``factor`` times too large, and divided behind."""
    rng = np.random.default_rng(1)
    first = rng.normal(0, 1, (CHANNELS, 3, 1, 1)).astype(np.float32)
    second = rng.normal(0, 0.2, (CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
    first[:2] *= factor
    second[:, :2] /= divisor
    nodes = [
        make_node("Cast", ["images"], "pixels", to=onnx.TensorProto.FLOAT),
        make_node("Mul", ["pixels", "step"], "scaled"),
        make_node("Transpose", ["scaled"], "planes", perm=[0, 3, 1, 2]),
        make_node("Conv", ["planes", "one/kernel"], "one/conv", name="one"),
        make_node("Relu", ["one/conv"], "one/relu"),
        make_node("Conv", ["one/relu", "two/kernel"], "two/conv", name="two"),
        make_node("Relu", ["two/conv"], "two/relu"),
        make_node("Flatten", ["two/relu"], "flat"),
        make_node("Gemm", ["flat", "top/kernel"], "logits", name="top", transB=1),
        make_node("Softmax", ["logits"], "probabilities", axis=-1),
    ]
    weights = {
        "step": np.float32(1 / 100).reshape(1),
        "one/kernel": first,
        "two/kernel": second,
        "top/kernel": rng.normal(0, 0.1, (CLASSES, 4 * CHANNELS)).astype(np.float32),
    }
    inputs = [value_info("images", np.uint8, ["N", 2, 2, 3])]
    return Graph(nodes, weights, inputs, [value_info("probabilities", np.float32, ["N", CLASSES])])


def measured(graph: Graph, tmp_path: Path) -> Activations:
    images = np.random.default_rng(2).integers(0, 256, (100, 2, 2, 3), dtype=np.uint8)
    tensors = [layer.input[0] for layer in quantized_layers(graph, INT8)]
    calibration = Calibration(images, 32, tmp_path / "probe.onnx", ignore_progress)
    return calibration.measure(graph, tensors, with_histograms=True)


@pytest.mark.parametrize(("divisor", "clipped", "better"), [(100, 5, 5), (1000, 30, 100)])
def test_large_channels_that_meet_small_weights_are_clipped_and_int8_answers_much_better(
    divisor: float, clipped: float, better: float, run_graph: Run, tmp_path: Path
) -> None:
    """Seen: a range of 1/5.7 and 1/32, and a ninth and a 280th of the divergence; of 300 answers 276 and 296 the same
    instead of 242.
    """
    graph = uneven(100, divisor)
    found = measured(graph, tmp_path)
    assert found.magnitude("one/relu", OUTPUT_ERROR) <= found.largest["one/relu"] / clipped
    images = np.random.default_rng(3).integers(0, 256, (300, 2, 2, 3), dtype=np.uint8)
    (reference,) = run_graph(graph, images=images)
    harm = {}
    for method in ("max", OUTPUT_ERROR):
        ranges = {layer.name: found.magnitude(layer.input[0], method) for layer in quantized_layers(graph, INT8)}
        (answers,) = run_graph(quantized_graph(graph, INT8, input_scales(graph, INT8, ranges)), images=images)
        harm[method] = divergence(reference, answers)
    assert harm[OUTPUT_ERROR] < harm["max"] / better


def test_channels_alike_keep_nearly_all_of_their_range(tmp_path: Path) -> None:
    found = measured(uneven(1, 1), tmp_path)
    assert found.magnitude("one/relu", OUTPUT_ERROR) >= found.largest["one/relu"] / 2
