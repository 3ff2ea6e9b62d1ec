from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge_export.equalization import equalized_graph
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.passes import PASSES
from vggedge_export.passes.fold_batchnorm_after_relu import run

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SCALES = np.float32([0.5, 2.0, 1.0, 0.1])


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def chain(
    scale: np.ndarray = SCALES,
    shift: np.ndarray | None = None,
    *,
    bias: bool = True,
    pool: bool = False,
    dense: bool = False,
    group: int = 1,
) -> Graph:
    """Conv(3 -> 4) -> Relu -> BN -> [MaxPool] -> padded Conv(4 -> 5), or -> Flatten -> Gemm; images of 4x6."""
    weights = {"k1": draw(4, 3, 3, 3), "b1": draw(4, seed=1), "s": np.float32(scale)}
    weights |= {"h": draw(4, seed=2) if shift is None else np.float32(shift), "m": draw(4, seed=3)}
    weights["v"] = np.random.default_rng(4).uniform(0.5, 2, 4).astype(np.float32)
    nodes = [
        make_node("Conv", ["x", "k1", "b1"] if bias else ["x", "k1"], "conv1", pads=[1, 1, 1, 1]),
        make_node("Relu", ["conv1"], "relu1"),
        make_node("BatchNormalization", ["relu1", "s", "h", "m", "v"], "bn1", epsilon=1e-3),
    ]
    last, size = "bn1", (4, 6)
    if pool:
        nodes.append(make_node("MaxPool", [last], "pool", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0]))
        last, size = "pool", (2, 3)
    if dense:
        weights |= {"k2": draw(5, 4 * size[0] * size[1], seed=5), "b2": draw(5, seed=6)}
        nodes += [make_node("Flatten", [last], "flat"), make_node("Gemm", ["flat", "k2", "b2"], "y", "fc1", transB=1)]
    else:
        outputs = 5 if group == 1 else 4
        weights |= {"k2": draw(outputs, 4 // group, 3, 3, seed=5), "b2": draw(outputs, seed=6)}
        nodes.append(make_node("Conv", [last, "k2", "b2"], "y", "conv2", pads=[1, 1, 1, 1], group=group))
    shape: list = ["N", 5] if dense else ["N", 5 if group == 1 else 4, *size]
    graph = Graph(nodes, weights, [value_info("x", np.float32, ["N", 3, 4, 6])], [value_info("y", np.float32, shape)])
    graph.drop_unused()
    return graph


@pytest.fixture
def same(run_graph: Callable[..., list[np.ndarray]]) -> Callable[..., None]:
    """Both graphs answer alike everywhere, borders included."""

    def prove(before: Graph, after: Graph, tolerance: float = 1e-5) -> None:
        x = 3 * draw(7, 3, 4, 6, seed=8)
        wanted, found = (run_graph(graph, x=x)[0] for graph in (before, after))
        assert found.shape == wanted.shape
        assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()

    return prove


def folded(graph: Graph) -> Graph:
    """A copy with its BatchNormalization folded, which is checked."""
    twin = graph.copy()
    assert run(twin) == 1
    twin.drop_unused()
    twin.check()
    counts = twin.op_counts()
    assert (counts.get("BatchNormalization", 0), counts.get("Relu", 0), counts["Max"]) == (0, 0, 1)
    return twin


def left_alone(graph: Graph) -> None:
    before = graph.to_bytes()
    assert run(graph) == 0
    assert graph.to_bytes() == before


# --- what it computes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dense", [False, True], ids=["conv", "dense"])
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_a_positive_scale_changes_no_answer(pool: bool, dense: bool, bias: bool, same: Callable[..., None]) -> None:
    graph = chain(pool=pool, dense=dense, bias=bias)
    twin = folded(graph)
    same(graph, twin)
    assert np.array_equal(twin.weights["k2"], graph.weights["k2"])  # the next layer is not touched at all


@pytest.mark.parametrize("dense", [False, True], ids=["conv", "dense"])
@pytest.mark.parametrize("scale", [[-0.5, 2, -1, 0.1], [-1, -2, -3, -0.1]], ids=["mixed", "all negative"])
def test_a_negative_scale_is_turned_back_by_the_next_layer(
    scale: list[float], dense: bool, same: Callable[..., None]
) -> None:
    graph = chain(np.float32(scale), dense=dense)
    same(graph, folded(graph))


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e-3, 1e3])
@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_a_scale_near_zero_beside_a_shift_costs_no_digits(pool: bool, size: float, same: Callable[..., None]) -> None:
    graph = chain(np.float32([size, 1, 1, 1]), np.float32([5, 0, -3, 1]), pool=pool)
    same(graph, folded(graph))


def test_the_tensor_itself_stays_what_it_was(run_graph: Callable[..., list[np.ndarray]]) -> None:
    """So that its INT8 range does: no channel is divided by its scale."""
    graph = chain(np.float32([1e-4, 2, 1, 0.1]))
    for each in (graph, twin := folded(graph)):
        each.outputs = [value_info("bn1", np.float32, ["N", 4, 4, 6])]
        each.drop_unused()
    x = draw(7, 3, 4, 6, seed=8)
    np.testing.assert_allclose(run_graph(twin, x=x)[0], run_graph(graph, x=x)[0], rtol=0, atol=1e-5)


def test_the_borders_see_zeros_and_not_the_shift(run_graph: Callable[..., list[np.ndarray]]) -> None:
    """A kernel that looks at its left neighbour only gives the bias alone in the first column."""
    graph = chain(shift=np.float32([3, 3, 3, 3]))
    graph.weights["k2"][...] = 0
    graph.weights["k2"][:, :, 1, 0] = 1
    answer = run_graph(folded(graph), x=draw(2, 3, 4, 6))[0]
    np.testing.assert_allclose(answer[:, :, :, 0], np.broadcast_to(graph.weights["b2"][:, None], (2, 5, 4)), atol=1e-6)
    assert np.abs(answer[:, :, :, 1] - graph.weights["b2"][:, None]).min() > 1


def dense_chain(**attributes: Any) -> Graph:
    """Gemm(6 -> 4) -> Relu -> BN -> Gemm(4 -> 5), the first with these attributes."""
    nodes = [
        make_node("Gemm", ["x", "k1", "b1"], "fc1", **({"transB": 1} | attributes)),
        make_node("Relu", ["fc1"], "relu1"),
        make_node("BatchNormalization", ["relu1", "s", "h", "m", "v"], "bn1"),
        make_node("Gemm", ["bn1", "k2"], "y", "fc2", transB=1),
    ]
    shape = (4, 6) if attributes.get("transB", 1) else (6, 4)
    weights = {"k1": draw(*shape), "b1": draw(4, seed=1), "s": np.float32([1, -2, 0.5, 1]), "h": draw(4, seed=2)}
    weights |= {"m": draw(4, seed=3), "v": np.ones(4, np.float32), "k2": draw(5, 4, seed=4)}
    return Graph(nodes, weights, [value_info("x", np.float32, ["N", 6])], [value_info("y", np.float32, ["N", 5])])


def test_a_dense_layer_with_batchnorm_behind_its_relu_is_folded(run_graph: Callable[..., list[np.ndarray]]) -> None:
    graph = dense_chain()
    x = draw(7, 6, seed=9)
    np.testing.assert_allclose(run_graph(folded(graph), x=x)[0], run_graph(graph, x=x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}, {"transB": 0}], ids=str)
def test_a_dense_layer_of_another_form_stays(attributes: dict) -> None:
    left_alone(dense_chain(**attributes))


def test_a_dense_bias_that_is_one_number_for_all_stays() -> None:
    graph = dense_chain()
    graph.weights["b1"] = np.float32([0.5])
    left_alone(graph)


def test_a_sign_is_not_turned_in_weights_that_another_layer_reads() -> None:
    graph = chain(np.float32([-1, 1, 1, 1]))
    graph.nodes.append(make_node("Identity", ["k2"], "seen"))
    graph.outputs.append(value_info("seen", np.float32, [5, 4, 3, 3]))
    left_alone(graph)


def test_names_of_layers_weights_and_tensors_stay() -> None:
    twin = folded(chain())
    assert [node.name for node in twin.nodes] == ["conv1", "bn1", "conv2"]
    assert list(twin.nodes[0].input) == ["x", "k1", "b1"]
    assert list(twin.nodes[1].output) == ["bn1"]
    assert twin.weights[twin.nodes[1].input[1]].shape == (1, 4, 1, 1)


def test_the_original_graphs_weights_are_not_changed() -> None:
    graph = chain(np.float32([-1, 2, 1, 1]))
    before = graph.to_bytes()
    run(graph.copy())
    assert graph.to_bytes() == before


def test_weights_that_another_layer_reads_too_are_left_to_it(same: Callable[..., None]) -> None:
    graph = chain()
    graph.nodes += [
        make_node("Conv", ["x", "k1", "b1"], "other", pads=[1, 1, 1, 1]),
        make_node("ReduceMean", ["other"], "mean", keepdims=0),
        make_node("Add", ["y", "mean"], "sum"),
    ]
    graph.outputs = [value_info("sum", np.float32, ["N", 5, 4, 6])]
    twin = folded(graph)
    same(graph, twin)
    assert np.array_equal(twin.weights["k1"], graph.weights["k1"])


def test_a_positive_scale_is_folded_whatever_reads_the_result(same: Callable[..., None]) -> None:
    graph = chain()
    graph.nodes += [make_node("ReduceMean", ["bn1"], "mean", keepdims=0), make_node("Add", ["y", "mean"], "sum")]
    graph.outputs = [value_info("sum", np.float32, ["N", 5, 4, 6])]
    same(graph, folded(graph))
    same(chain(group=2), folded(chain(group=2)))


# --- what it leaves alone


@pytest.mark.parametrize(
    "build",
    [
        lambda: chain(np.float32([-1, 1, 1, 1]), pool=True),
        lambda: chain(np.float32([-1, 1, 1, 1]), pool=True, dense=True),
        lambda: chain(np.float32([-1, 1, 1, 1]), group=2),
        lambda: chain(np.float32([np.nan, 1, 1, 1])),
        lambda: chain(np.float32([2e38, 1, 1, 1])),
    ],
    ids=["negative before pool", "negative before pool, dense", "negative before groups", "nan", "kernel too large"],
)
def test_what_cannot_be_folded_stays(build: Callable[[], Graph]) -> None:
    left_alone(build())


@pytest.mark.parametrize("tensor", ["conv1", "relu1"])
def test_a_tensor_that_somebody_else_reads_stays(tensor: str) -> None:
    graph = chain()
    graph.nodes += [make_node("ReduceMean", [tensor], "mean", keepdims=0), make_node("Add", ["y", "mean"], "sum")]
    graph.outputs = [value_info("sum", np.float32, ["N", 5, 4, 6])]
    left_alone(graph)


@pytest.mark.parametrize("tensor", ["conv1", "relu1"])
def test_a_tensor_that_is_an_answer_stays(tensor: str) -> None:
    graph = chain()
    graph.outputs.append(value_info(tensor, np.float32, ["N", 4, 4, 6]))
    left_alone(graph)


def test_a_negative_scale_with_two_readers_stays() -> None:
    graph = chain(np.float32([-1, 1, 1, 1]))
    graph.nodes += [make_node("ReduceMean", ["bn1"], "mean", keepdims=0), make_node("Add", ["y", "mean"], "sum")]
    graph.outputs = [value_info("sum", np.float32, ["N", 5, 4, 6])]
    left_alone(graph)


@pytest.mark.parametrize("weight", ["k1", "b1", "s", "h", "m", "v"])
def test_what_is_computed_or_of_another_type_stays(weight: str) -> None:
    graph = chain()
    array = graph.weights[weight]
    graph.weights["source"] = graph.weights.pop(weight)
    graph.nodes.insert(0, make_node("Identity", ["source"], weight))
    left_alone(graph)
    assert array.dtype == np.float32
    half = chain()
    half.weights[weight] = half.weights[weight].astype(np.float16)
    assert run(half) == 0


@pytest.mark.parametrize("op", ["Sigmoid", "LeakyRelu", "Identity"])
def test_another_activation_stays(op: str) -> None:
    graph = chain()
    graph.nodes[1] = make_node(op, ["conv1"], "relu1")
    left_alone(graph)


def test_it_is_no_part_of_the_passes_for_all_graphs() -> None:
    assert all(step.run is not run for step in PASSES)


# --- real ones


@pytest.mark.parametrize(("normalization", "count"), [("first", 1), ("first-of-two-stages", 2), ("two-stages", 4)])
@pytest.mark.parametrize("equalize", [False, True], ids=["", "equalised"])
def test_a_real_vgg_answers_the_same(
    normalization: str,
    count: int,
    equalize: bool,
    convert_vgg: Callable[..., Any],
    pictures: np.ndarray,
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    converted = convert_vgg("vgg16-compact", normalization)
    twin = converted.clean.copy()
    assert run(twin) == count
    twin.drop_unused()
    if equalize:
        before, twin = twin, equalized_graph(twin)
        assert not np.array_equal(before.weights["block1_conv1/kernel"], twin.weights["block1_conv1/kernel"])
    assert twin.op_counts()["Max"] == count
    assert "BatchNormalization" not in twin.op_counts()
    assert set(before_and_after(converted.clean)) <= set(before_and_after(twin))
    # The converted graph ends in a softmax; the logits are what goes into it.
    softmax = next(node for node in twin.nodes if node.op_type == "Softmax")
    for graph in (clean := converted.clean.copy(), twin):
        graph.outputs = [value_info(softmax.input[0], np.float32, ["N", 5])]
        graph.drop_unused()
    wanted, found = (run_graph(graph, images=pictures)[0] for graph in (clean, twin))
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert np.abs(found - converted.logits).max() <= 2e-5 * np.abs(converted.logits).max()


def before_and_after(graph: Graph) -> list[str]:
    """Names of the convolutions, dense layers and their weights: by these reports and sensitivity know them."""
    layers = [node for node in graph.nodes if node.op_type in {"Conv", "Gemm"}]
    return [name for node in layers for name in (node.name, *node.input[1:])]
