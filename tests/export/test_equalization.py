from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge_export.equalization import equalized_graph
from vggedge_export.graph import Graph, make_node, value_info

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def uneven(channels: int) -> np.ndarray:
    """Factors between neighbouring channels from 1 to 100, in no order."""
    return np.random.default_rng(9).permutation(np.geomspace(0.1, 10, channels)).astype(np.float32)


def chain(between: str | None = "Relu", bias: bool = True, flat: bool = False) -> Graph:
    """Conv(3 -> 6) -> between -> Conv(6 -> 5), or -> MaxPool -> Flatten -> Gemm(6 * 2 * 3 -> 5); channels 100x apart.

    The first layer's channels are scaled by ``uneven`` and the second's inputs by its inverse.
    """
    scale = uneven(6)
    weights = {"k1": draw(6, 3, 3, 3) * scale[:, None, None, None], "b1": draw(6, seed=1) * scale}
    nodes = [make_node("Conv", ["x", "k1", "b1"] if bias else ["x", "k1"], "conv1", pads=[1, 1, 1, 1])]
    last = "conv1"
    if between == "BatchNormalization":
        weights |= {"s": draw(6, seed=5), "h": draw(6, seed=6), "v": np.ones(6, np.float32)}
        nodes.append(make_node(between, [last, "s", "h", "h", "v"], "between"))
        last = "between"
    elif between == "Max":
        weights["floor"] = (0.5 * draw(6, seed=7) * scale).reshape(1, 6, 1, 1)
        nodes.append(make_node("Max", ["floor", last], "between"))
        last = "between"
    elif between is not None:
        nodes.append(make_node(between, [last], "between", **({"size": 3} if between == "LRN" else {})))
        last = "between"
    if flat:
        nodes += [
            make_node("MaxPool", [last], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            make_node("Flatten", ["pool"], "flat"),
            make_node("Gemm", ["flat", "k2", "b2"], "fc1", transB=1),
            make_node("Relu", ["fc1"], "r2"),
            make_node("Gemm", ["r2", "k3"], "y", "fc2", transB=1),
        ]
        kernel = draw(5, 6, 6, seed=2) / scale[:, None]
        weights |= {"k2": kernel.reshape(5, 36), "b2": draw(5, seed=3), "k3": draw(4, 5, seed=4)}
        shape: list = ["N", 4]
    else:
        nodes.append(make_node("Conv", [last, "k2", "b2"], "y", "conv2", pads=[1, 1, 1, 1]))
        weights |= {"k2": draw(5, 6, 3, 3, seed=2) / scale[:, None, None], "b2": draw(5, seed=3)}
        shape = ["N", 5, 4, 6]
    graph = Graph(nodes, weights, [value_info("x", np.float32, ["N", 3, 4, 6])], [value_info("y", np.float32, shape)])
    graph.drop_unused()
    graph.check()
    return graph


def spread(kernel: np.ndarray, axis: int, channels: int) -> float:
    """Largest over smallest range of the channels of a kernel."""
    moved = np.abs(np.moveaxis(kernel.reshape(len(kernel), channels, -1) if axis == 1 else kernel, axis, 0))
    ranges = moved.reshape(channels, -1).max(axis=1)
    return float(ranges.max() / ranges.min())


@pytest.fixture
def same(run_graph: Callable[..., list[np.ndarray]]) -> Callable[..., None]:
    def prove(graph: Graph, twin: Graph) -> None:
        x = draw(3, 3, 4, 6, seed=8)
        wanted, found = (run_graph(each, x=x)[0] for each in (graph, twin))
        assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
        assert found.dtype == np.float32

    return prove


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("between", ["Relu", None, "Identity", "Max"])
def test_the_function_stays_and_channel_ranges_even_out(
    between: str | None, bias: bool, same: Callable[..., None]
) -> None:
    graph = chain(between, bias)
    twin = equalized_graph(graph)
    same(graph, twin)
    assert spread(graph.weights["k1"], 0, 6) > 50
    assert spread(graph.weights["k2"], 1, 6) > 50
    # sqrt(range1 * range2) of one channel: the 100 times of both sides cancel.
    assert spread(twin.weights["k1"], 0, 6) < 3
    assert spread(twin.weights["k2"], 1, 6) < 3


def test_both_sides_of_a_channel_end_with_the_papers_range() -> None:
    graph = chain()
    twin = equalized_graph(graph)
    before = [np.abs(graph.weights["k1"]).max(axis=(1, 2, 3)), np.abs(graph.weights["k2"]).max(axis=(0, 2, 3))]
    after = [np.abs(twin.weights["k1"]).max(axis=(1, 2, 3)), np.abs(twin.weights["k2"]).max(axis=(0, 2, 3))]
    wanted = np.sqrt(before[0] * before[1])
    np.testing.assert_allclose(after[0], wanted, rtol=1e-5)
    np.testing.assert_allclose(after[1], wanted, rtol=1e-5)
    factor = before[0] / wanted
    np.testing.assert_allclose(twin.weights["b1"], graph.weights["b1"] / factor, rtol=1e-5)
    np.testing.assert_array_equal(twin.weights["b2"], graph.weights["b2"])


@pytest.mark.parametrize("largest", [1.0, -1.0], ids=["positive", "negative"])
def test_the_magnitude_counts_whatever_its_sign(largest: float) -> None:
    graph = chain()
    graph.weights["k1"][2, 1, 0, 2] = 1000 * largest
    before = np.abs(graph.weights["k2"][:, 2]).max()
    twin = equalized_graph(graph)
    assert np.abs(twin.weights["k1"][2]).max() == pytest.approx(np.sqrt(1000 * before), rel=1e-5)


def test_scales_pass_pooling_and_flatten_to_the_dense_layer(same: Callable[..., None]) -> None:
    graph = chain(flat=True)
    twin = equalized_graph(graph)
    same(graph, twin)
    assert spread(graph.weights["k2"], 1, 6) > 50
    assert spread(twin.weights["k1"], 0, 6) < 4
    assert spread(twin.weights["k2"], 1, 6) < 4
    # Every one of the six places of a channel has the same factor.
    factor = (twin.weights["k2"] / graph.weights["k2"])[0].reshape(6, 6)
    assert factor.shape == (6, 6)
    in_channel = twin.weights["k2"].reshape(5, 6, 6) / graph.weights["k2"].reshape(5, 6, 6)
    by_dense_row = in_channel / in_channel[:, :1, :1]
    np.testing.assert_allclose(by_dense_row, np.broadcast_to(by_dense_row[:1, :, :1], by_dense_row.shape), rtol=1e-5)


def test_a_chain_settles_so_that_another_run_changes_nothing() -> None:
    once = equalized_graph(chain(flat=True))
    twice = equalized_graph(once)
    for name in ("k1", "k2", "k3", "b1", "b2"):
        np.testing.assert_allclose(twice.weights[name], once.weights[name], rtol=1e-4)


@pytest.mark.parametrize("between", ["BatchNormalization", "LRN", "Sigmoid", "Tanh", "Softmax"])
def test_what_does_not_commute_with_a_scale_stops_it(between: str) -> None:
    graph = chain(between)
    twin = equalized_graph(graph)
    assert all(np.array_equal(twin.weights[name], graph.weights[name]) for name in graph.weights)


def test_a_tensor_with_a_second_reader_or_that_is_an_output_stops_it() -> None:
    graph = chain()
    graph.nodes.append(make_node("Abs", ["between"], "z"))
    graph.outputs.append(value_info("z", np.float32, ["N", 6, 4, 6]))
    shown = chain()
    shown.outputs.append(value_info("conv1", np.float32, ["N", 6, 4, 6]))
    for each in (graph, shown):
        twin = equalized_graph(each)
        assert all(np.array_equal(twin.weights[name], each.weights[name]) for name in each.weights)


@pytest.mark.parametrize(("kernel", "index"), [("k1", np.s_[2]), ("k2", np.s_[:, 2])], ids=["before", "behind"])
def test_a_dead_channel_is_left_as_it_is(kernel: str, index: Any, same: Callable[..., None]) -> None:
    graph = chain()
    graph.weights[kernel][index] = 0
    graph.weights["b1"][2] = 0
    twin = equalized_graph(graph)
    same(graph, twin)
    assert all(np.isfinite(array).all() for array in twin.weights.values())
    np.testing.assert_array_equal(twin.weights["k1"][2], graph.weights["k1"][2])
    np.testing.assert_array_equal(twin.weights["k2"][:, 2], graph.weights["k2"][:, 2])
    assert not np.array_equal(twin.weights["k1"][3], graph.weights["k1"][3])


def headroom(graph: Graph, tensor: str, run_graph: Callable[..., list[np.ndarray]]) -> float:
    """How much of one common range the middle channel leaves unused: the tensor's magnitude over that channel's.

    What INT8 with one scale a tensor loses; no uniform factor changes it.
    """
    probe = graph.copy()
    probe.outputs = [value_info(tensor, np.float32, ["N", "c", "h", "w"])]
    probe.drop_unused()
    magnitudes = np.abs(run_graph(probe, x=draw(3, 3, 4, 6, seed=8))[0]).max(axis=(0, 2, 3))
    return float(magnitudes.max() / np.median(magnitudes))


@pytest.mark.parametrize("louder", [1.0, 0.01, 100.0], ids=lambda factor: f"next layer x{factor}")
@pytest.mark.parametrize("kernel", [1e-2, 1e-3, 1e-7, 1e-12, 0.0])
@pytest.mark.parametrize("bias", [0.5, -0.5, 3.0])
def test_a_bias_on_next_to_no_kernel_does_not_set_the_range_for_all(
    kernel: float, bias: float, louder: float, same: Callable[..., None], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = chain()
    for name in ("k1", "b1"):
        graph.weights[name] = (graph.weights[name].T / uneven(6)).T
    graph.weights["k1"][0] *= kernel
    graph.weights["b1"][0] = bias
    graph.weights["k2"] = draw(5, 6, 3, 3, seed=2) * np.float32(louder)
    twin = equalized_graph(graph)
    same(graph, twin)
    assert headroom(twin, "conv1", run_graph) < 2 * headroom(graph, "conv1", run_graph)


def test_ordinary_biases_do_not_keep_channels_apart(run_graph: Callable[..., list[np.ndarray]]) -> None:
    """100 times between the kernels, and biases that do not follow them."""
    graph = chain()
    graph.weights["b1"] = draw(6, seed=1) * np.float32(0.1)
    twin = equalized_graph(graph)
    assert spread(twin.weights["k1"], 0, 6) < 3
    assert spread(twin.weights["k2"], 1, 6) < 3
    assert headroom(twin, "conv1", run_graph) < headroom(graph, "conv1", run_graph)


def test_a_floor_is_scaled_as_the_channel_it_belongs_to() -> None:
    graph = chain("Max")
    twin = equalized_graph(graph)
    kernels = [np.abs(each.weights["k1"]).max(axis=(1, 2, 3)) for each in (graph, twin)]
    factor = kernels[0] / kernels[1]
    np.testing.assert_allclose(
        twin.weights["floor"].reshape(-1), graph.weights["floor"].reshape(-1) / factor, rtol=1e-5
    )
    assert factor.max() > 5 * factor.min()


def test_a_floor_on_next_to_no_kernel_does_not_set_the_range_for_all(
    same: Callable[..., None], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    """A channel of small kernel and ordinary floor: scaled by its kernel alone, the floor would tower over all."""
    graph = chain("Max")
    for name in ("k1", "b1"):
        graph.weights[name] = (graph.weights[name].T / uneven(6)).T
    graph.weights["k1"][0] *= 1e-6
    graph.weights["b1"][0] = 0
    graph.weights["floor"] = np.full((1, 6, 1, 1), 0.5, np.float32)
    graph.weights["k2"] = draw(5, 6, 3, 3, seed=2)
    twin = equalized_graph(graph)
    same(graph, twin)
    assert headroom(twin, "between", run_graph) < 2 * headroom(graph, "between", run_graph)


@pytest.mark.parametrize(
    "shape", [(), (1, 6, 4, 6), (1, 1, 1, 6)], ids=["one number", "a value a place", "a value a column"]
)
def test_a_maximum_that_is_no_floor_a_channel_stops_the_scales(shape: tuple, same: Callable[..., None]) -> None:
    graph = chain("Max")
    graph.weights["floor"] = np.asarray(draw(*shape, seed=7), np.float32)
    twin = equalized_graph(graph)
    same(graph, twin)
    assert all(np.array_equal(twin.weights[name], graph.weights[name]) for name in graph.weights)


@pytest.mark.parametrize("floor", [[], ["floor"]], ids=["", "and a floor"])
def test_a_maximum_of_two_activations_stops_the_scales(floor: list[str]) -> None:
    graph = chain("Max")
    position = next(i for i, node in enumerate(graph.nodes) if node.name == "between")
    graph.nodes[position].input[:] = ["conv1", "other", *floor]
    graph.nodes.insert(position, make_node("Conv", ["x", "k1", "b1"], "other", pads=[1, 1, 1, 1]))
    graph.weights |= {"k3": graph.weights["k1"] + 1, "b3": graph.weights["b1"]}
    graph.nodes[position].input[:] = ["x", "k3", "b3"]
    graph.drop_unused()
    twin = equalized_graph(graph)
    assert all(np.array_equal(twin.weights[name], graph.weights[name]) for name in graph.weights)


def test_a_floor_that_another_node_reads_too_is_not_scaled(same: Callable[..., None]) -> None:
    graph = chain("Max")
    graph.nodes.append(make_node("Identity", ["floor"], "seen"))
    graph.outputs.append(value_info("seen", np.float32, [1, 6, 1, 1]))
    twin = equalized_graph(graph)
    same(graph, twin)
    assert np.array_equal(twin.weights["k1"], graph.weights["k1"])


@pytest.mark.parametrize("grouped", ["conv1", "conv2"])
def test_grouped_convolutions_are_left_alone(grouped: str, same: Callable[..., None]) -> None:
    graph = chain()
    node = next(node for node in graph.nodes if node.name == grouped)
    node.attribute.add(name="group", i=3, type=2)
    kernel = node.input[1]
    graph.weights[kernel] = draw(6 if grouped == "conv1" else 9, 1 if grouped == "conv1" else 2, 3, 3)
    if grouped == "conv2":
        graph.weights["b2"] = draw(9)
        graph.outputs = [value_info("y", np.float32, ["N", 9, 4, 6])]
    twin = equalized_graph(graph)
    same(graph, twin)
    assert all(np.array_equal(twin.weights[name], graph.weights[name]) for name in graph.weights)


@pytest.mark.parametrize("shared", ["k1", "b1"], ids=["kernel", "bias"])
def test_weights_that_another_layer_reads_too_are_not_scaled(shared: str, same: Callable[..., None]) -> None:
    graph = chain(flat=False)
    weights = ["x", "k1", "b1"] if shared == "k1" else ["x", "k3", "b1"]
    graph.weights["k3"] = draw(6, 3, 3, 3, seed=4)
    graph.nodes += [
        make_node("Conv", weights, "other", pads=[1, 1, 1, 1]),
        make_node("ReduceMean", ["other"], "mean", keepdims=1),
        make_node("Add", ["y", "mean"], "sum"),
    ]
    graph.outputs = [value_info("sum", np.float32, ["N", 5, 4, 6])]
    graph.drop_unused()
    twin = equalized_graph(graph)
    same(graph, twin)
    assert set(twin.weights) == set(graph.weights)


def test_a_layer_that_is_used_twice_keeps_its_function(same: Callable[..., None]) -> None:
    nodes = [
        make_node("Conv", ["x", "k", "b"], "a", pads=[1, 1, 1, 1]),
        make_node("Relu", ["a"], "ra"),
        make_node("Conv", ["ra", "k", "b"], "c", pads=[1, 1, 1, 1]),
        make_node("Relu", ["c"], "rc"),
        make_node("Conv", ["rc", "last"], "y", pads=[1, 1, 1, 1]),
    ]
    weights = {"k": draw(3, 3, 3, 3) * np.float32([0.1, 1, 10])[:, None, None, None], "b": draw(3)}
    weights["last"] = draw(5, 3, 3, 3, seed=2)
    values = [value_info("x", np.float32, ["N", 3, 4, 6])], [value_info("y", np.float32, ["N", 5, 4, 6])]
    graph = Graph(nodes, weights, *values)
    same(graph, equalized_graph(graph))


def test_the_original_graph_is_not_changed() -> None:
    graph = chain(flat=True)
    before = graph.to_bytes()
    equalized_graph(graph)
    assert graph.to_bytes() == before


@pytest.mark.parametrize("normalization", ["none", "first-of-two-stages", "every", "lrn"])
def test_a_real_vgg_answers_the_same(
    normalization: str,
    convert_vgg: Callable[..., Any],
    pictures: np.ndarray,
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    clean = convert_vgg("vgg16-compact", normalization).clean
    twin = equalized_graph(clean)
    assert twin.op_counts() == clean.op_counts()
    assert not np.array_equal(twin.weights["block3_conv2/kernel"], clean.weights["block3_conv2/kernel"])
    wanted, found = (run_graph(graph, images=pictures)[0] for graph in (clean, twin))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
