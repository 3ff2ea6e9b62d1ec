"""Every pass on graphs of a few nodes: the same numbers before and after, the right ops, and what it leaves alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_export import passes
from vggedge_export.graph import Graph, attribute, make_node, value_info
from vggedge_export.passes import (
    NOT_APPLIED,
    PASSES,
    Pass,
    affine_to_batchnorm,
    apply_passes,
    flatten_without_transpose,
    fold_batchnorm,
    fold_bias,
    fold_channel_order,
    fold_constants,
    fold_padding,
    hoist_transposes,
    matmul_to_gemm,
    name_layers,
    raise_opset,
    rewrite_erfc,
)
from vggedge_runtime.errors import ConversionError

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)
NCHW, NHWC = [0, 3, 1, 2], [0, 2, 3, 1]  # perms to that layout
BATCHES = (1, 3, 8)
# Sizes are all different, so that a swapped axis cannot go unseen.
CHANNELS, HEIGHT, WIDTH, UNITS = 3, 4, 5, 7
FEATURES = CHANNELS * HEIGHT * WIDTH


def draw(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def build(
    nodes: list[Any],
    weights: dict[str, np.ndarray] | None = None,
    shape: tuple[int, ...] = (HEIGHT, WIDTH, CHANNELS),
    outputs: dict[str, tuple] | None = None,
    **more: Any,
) -> Graph:
    """A graph from ``x`` (N, *shape) to ``y``, both float32; the shape of an output is free unless given."""
    graph = Graph(nodes, dict(weights or {}), [value_info("x", np.float32, ["N", *shape])], [], **more)
    for name, size in (outputs or {"y": ("N", "a", "b", "c")}).items():
        graph.outputs.append(value_info(name, np.float32, list(size)))
    graph.check()
    return graph


FLAT = {"y": ("N", "units")}


@pytest.fixture
def same(run_graph: Callable[..., list[np.ndarray]]) -> Callable[..., int]:
    """``same(graph, run)``: apply a pass, prove that the numbers stay, return the number of changes."""

    def prove(graph: Graph, run: Callable[[Graph], int], rtol: float = 1e-5) -> int:
        size = [d.dim_value for d in graph.inputs[0].type.tensor_type.shape.dim][1:]
        inputs = [draw(n, *size) for n in BATCHES]
        before = [run_graph(graph, x=x) for x in inputs]
        changes = run(graph)
        graph.drop_unused()
        for x, wanted in zip(inputs, before, strict=True):
            for a, b in zip(wanted, run_graph(graph, x=x), strict=True):
                # A sum that cancels keeps the rounding errors of its summands.
                np.testing.assert_allclose(b, a, rtol=rtol, atol=1e-5 * max(1.0, float(np.abs(a).max()) / 10))
        return changes

    return prove


def untouched(graph: Graph, run: Callable[[Graph], int]) -> bool:
    """Whether the pass reports nothing and changes nothing."""
    nodes = [node.SerializeToString() for node in graph.nodes]
    weights = {name: id(array) for name, array in graph.weights.items()}
    changes = run(graph)
    return (
        changes == 0
        and [node.SerializeToString() for node in graph.nodes] == nodes
        and {name: id(array) for name, array in graph.weights.items()} == weights
    )


# --- the table


def test_the_table_names_every_file_once_and_runs_that_files_function() -> None:
    files = {path.stem for path in Path(passes.__file__).parent.glob("*.py")} - {"__init__"}
    names = [step.name for step in (*PASSES, *NOT_APPLIED)]
    assert len(set(names)) == len(names)
    assert set(names) == files
    assert [step.run.__module__.rpartition(".")[2] for step in (*PASSES, *NOT_APPLIED)] == names
    assert all(step.why for step in (*PASSES, *NOT_APPLIED))


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("raise_opset", "fold_constants"),
        ("fold_constants", "hoist_transposes"),
        ("hoist_transposes", "affine_to_batchnorm"),
        ("affine_to_batchnorm", "fold_batchnorm"),
        ("hoist_transposes", "flatten_without_transpose"),
        ("flatten_without_transpose", "matmul_to_gemm"),
        ("matmul_to_gemm", "name_layers"),
    ],
)
def test_a_pass_runs_after_what_it_needs(earlier: str, later: str) -> None:
    names = [step.name for step in PASSES]
    assert names.index(earlier) < names.index(later)


def test_records_say_what_each_pass_changed_and_what_was_left() -> None:
    graph = build([make_node("Relu", ["x"], "y"), make_node("Abs", ["x"], "unread")])
    records = apply_passes(graph, (Pass("none", lambda g: 0, ""), Pass("some", lambda g: 5, "")))
    assert [(r.name, r.changes, r.nodes_before, r.nodes_after) for r in records] == [
        ("none", 0, 2, 1),
        ("some", 5, 1, 1),
    ]


# --- raise_opset


def test_the_opset_rises_to_20_and_nothing_else_changes(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Conv", ["x", "k"], "c"),
        make_node("Reshape", ["c", "to"], "r"),
        make_node("Identity", ["r"], "y"),
    ]
    weights = {"k": draw(2, CHANNELS, 3, 3), "to": np.array([0, -1], np.int64)}
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), FLAT, opset=18)
    ops = graph.op_counts()
    assert same(graph, raise_opset.run) == 1
    assert (graph.opset, graph.op_counts()) == (20, ops)
    assert same(graph, raise_opset.run) == 0


def test_a_newer_opset_is_refused() -> None:
    graph = build([make_node("Relu", ["x"], "y")], opset=21)
    with pytest.raises(ConversionError, match="opset 21; vggedge writes 20"):
        raise_opset.run(graph)
    assert graph.opset == 21


def test_an_op_that_changed_on_the_way_is_refused_by_name() -> None:
    graph = build([make_node("Relu", ["x"], "y")], opset=18)
    graph.nodes.append(make_node("GridSample", ["y", "x"], "z"))  # opset 20 renamed its modes
    with pytest.raises(ConversionError, match="op GridSample changed between opset 18 and 20"):
        raise_opset.run(graph)
    assert graph.opset == 18


def test_an_op_that_onnx_does_not_know_is_refused_by_name() -> None:
    graph = build([make_node("Relu", ["x"], "y")], opset=18)
    graph.nodes[0].op_type = "NvidiaSpecial"
    with pytest.raises(ConversionError, match="NvidiaSpecial"):
        raise_opset.run(graph)


# --- fold_constants


def test_arithmetic_of_weights_is_folded_and_keeps_their_layer(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["kernel"], "turned", perm=[3, 2, 0, 1]),
        make_node("Reshape", ["bias", "four"], "wide"),
        make_node("Squeeze", ["wide", "axes"], "narrow"),
        make_node("Conv", ["x", "turned", "narrow"], "y"),
    ]
    weights = {
        "kernel": draw(3, 2, CHANNELS, 6),
        "bias": draw(6),
        "four": np.array([1, 6, 1, 1], np.int64),
        "axes": np.array([0, 2, 3], np.int64),
    }
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), layer_of={"kernel": "conv1", "bias": "conv1"})
    assert same(graph, fold_constants.run) == 3
    assert graph.op_counts() == {"Conv": 1}
    assert set(graph.weights) == {"turned", "narrow"}
    assert graph.weights["turned"].shape == (6, CHANNELS, 3, 2)
    assert graph.weights["turned"].dtype == np.float32
    np.testing.assert_array_equal(graph.weights["narrow"], weights["bias"])
    assert (graph.layer_of["turned"], graph.layer_of["narrow"]) == ("conv1", "conv1")


def test_the_inner_arithmetic_of_a_batchnorm_folds_to_scale_and_shift(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Add", ["variance", "epsilon"], "v"),
        make_node("Sqrt", ["v"], "s"),
        make_node("Reciprocal", ["s"], "r"),
        make_node("Mul", ["r", "gamma"], "scale"),
        make_node("Mul", ["mean", "scale"], "m"),
        make_node("Sub", ["beta", "m"], "shift"),
        make_node("Mul", ["x", "scale"], "scaled"),
        make_node("Add", ["scaled", "shift"], "y"),
    ]
    weights = {name: draw(CHANNELS) for name in ("gamma", "mean", "beta")}
    weights |= {"variance": np.float32([0.5, 1, 2]), "epsilon": np.array(1e-3, np.float32)}
    graph = build(nodes, weights)
    assert same(graph, fold_constants.run) == 6
    assert graph.op_counts() == {"Mul": 1, "Add": 1}
    scale = weights["gamma"] / np.sqrt(weights["variance"] + 1e-3)
    np.testing.assert_allclose(graph.weights["scale"], scale, rtol=1e-6)
    np.testing.assert_allclose(graph.weights["shift"], weights["beta"] - weights["mean"] * scale, rtol=1e-5)


def test_nodes_with_several_results_and_left_out_inputs_are_folded(same: Callable[..., int]) -> None:
    split = make_node("Split", ["both"], "first", axis=0, num_outputs=2)
    split.output.append("second")
    nodes = [
        split,
        make_node("Squeeze", ["first"], "low"),
        make_node("Squeeze", ["second"], "high"),
        make_node("Clip", ["low", "", "high"], "least"),
        make_node("Clip", ["x", "", "high"], "clipped"),
        make_node("Add", ["clipped", "least"], "y"),
    ]
    graph = build(nodes, {"both": np.float32([-0.5, 0.25])})
    assert same(graph, fold_constants.run) == 4
    assert graph.op_counts() == {"Clip": 1, "Add": 1}
    assert float(graph.weights["least"]) == -0.5


def test_what_reads_the_input_or_nothing_at_all_is_not_folded() -> None:
    nodes = [make_node("RandomNormal", [], "noise", shape=[1]), make_node("Add", ["x", "noise"], "y")]
    assert untouched(build(nodes), fold_constants.run)


# --- hoist_transposes


def test_a_pair_that_cancels_goes_away(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["x"], "a", perm=NCHW),
        make_node("Conv", ["a", "k"], "b"),
        make_node("Transpose", ["b"], "c", perm=NHWC),
        make_node("Transpose", ["c"], "d", perm=NCHW),
        make_node("Relu", ["d"], "y"),
    ]
    graph = build(nodes, {"k": draw(6, CHANNELS, 3, 3)})
    assert same(graph, hoist_transposes.run) == 1
    assert graph.op_counts() == {"Transpose": 1, "Conv": 1, "Relu": 1}


def test_two_that_do_not_cancel_become_one(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["x"], "a", perm=[0, 2, 3, 1]),
        make_node("Transpose", ["a"], "y", perm=[0, 2, 1, 3]),
    ]
    graph = build(nodes)
    assert same(graph, hoist_transposes.run) == 1
    assert [attribute(node, "perm") for node in graph.nodes] == [[0, 3, 2, 1]]


CONSTANTS = {
    "0-d": np.array(1.5, np.float32),
    "one element": np.float32([1.5]),
    "last axis": draw(CHANNELS),
    "full rank": draw(1, 1, 1, CHANNELS),
    "rank 2": draw(WIDTH, CHANNELS),
    "everywhere": draw(1, HEIGHT, WIDTH, CHANNELS),
}


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize("first", [True, False], ids=["data first", "constant first"])
@pytest.mark.parametrize("constant", CONSTANTS.values(), ids=CONSTANTS)
def test_a_transpose_moves_up_across_a_constant(
    op: str, first: bool, constant: np.ndarray, same: Callable[..., int]
) -> None:
    constant = np.abs(constant) + 0.5 if op == "Div" else constant
    inputs = ["relu", "c"] if first else ["c", "relu"]
    if op == "Div" and not first:  # a divisor of zero is no test
        inputs = ["shifted", "c"]
    nodes = [
        make_node("Relu", ["x"], "relu"),
        make_node("Add", ["relu", "one"], "shifted"),
        make_node(op, inputs, "b"),
        make_node("Transpose", ["b"], "t", perm=NCHW),
        make_node("Relu", ["t"], "y"),
    ]
    graph = build(nodes, {"c": constant, "one": np.array(1.0, np.float32)})
    graph.drop_unused()
    before = graph.op_counts()
    assert same(graph, hoist_transposes.run) >= 2
    assert graph.op_counts() == before
    assert graph.nodes[0].op_type == "Transpose"
    assert graph.nodes[0].input[0] == "x"


def test_a_transpose_moves_up_across_clip_with_a_left_out_limit(same: Callable[..., int]) -> None:
    nodes = [make_node("Clip", ["x", "", "most"], "a"), make_node("Transpose", ["a"], "y", perm=NCHW)]
    graph = build(nodes, {"most": np.array(0.3, np.float32)})
    assert same(graph, hoist_transposes.run) == 1
    assert [node.op_type for node in graph.nodes] == ["Transpose", "Clip"]
    assert list(graph.nodes[1].input)[1:] == ["", "most"]


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("axes", [[1, 2], [-2, -3], [3], [1, 2, 3], [0, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("between", [[], ["Relu"], ["Mul", "Add", "Relu"]], ids="-".join)
def test_a_reduction_absorbs_the_transpose_above_it(
    op: str, axes: list[int], between: list[str], same: Callable[..., int]
) -> None:
    nodes = [
        make_node("Transpose", ["x"], "a", perm=NCHW),
        make_node("Conv", ["a", "k"], "b"),
        make_node("Transpose", ["b"], "t0", perm=NHWC),
        *(make_node(o, [f"t{i}", "c"][: 1 + (o != "Relu")], f"t{i + 1}") for i, o in enumerate(between)),
        make_node(op, [f"t{len(between)}", "axes"], "y", keepdims=0),
    ]
    weights = {"k": draw(6, CHANNELS, 3, 3), "c": draw(6), "axes": np.array(axes)}
    graph = build(nodes, weights, outputs={"y": ("N", "b", "c")[: 4 - len(axes)]})
    graph.drop_unused()
    assert same(graph, hoist_transposes.run) >= 1
    assert graph.op_counts()["Transpose"] == 1
    assert graph.op_counts()[op] == 1


def reduction(op: str = "Transpose", axes: tuple[int, ...] | None = (1, 2), keepdims: int = 0) -> Graph:
    """(n, h, w, c) -> Transpose to (n, c, h, w), or a Conv -> Relu -> ReduceMean."""
    nodes = [
        make_node("Transpose", ["x"], "t", perm=NCHW) if op == "Transpose" else make_node("Conv", ["x", "k"], "t"),
        make_node("Relu", ["t"], "r"),
        make_node("ReduceMean", ["r"] if axes is None else ["r", "axes"], "y", keepdims=keepdims),
    ]
    rank = 0 if axes is None else 4 if keepdims else 4 - len(axes)
    weights = {"axes": np.array(axes or (), np.int64), "k": draw(2, HEIGHT, 1, 1)}
    return build(nodes, weights, outputs={"y": ("N", "b", "c", "d")[:rank]})


REDUCTIONS = {
    "the result would be in another layout": lambda: reduction(keepdims=1),
    "(n, c, w) would be (n, w, c)": lambda: reduction(axes=(2,)),
    "axes left out": lambda: reduction(axes=None),
    "no transpose above": lambda: reduction("Conv"),
}


@pytest.mark.parametrize("make", REDUCTIONS.values(), ids=REDUCTIONS)
def test_other_reductions_are_left_alone(make: Callable[[], Graph]) -> None:
    graph = make()
    before, transposes = graph.nodes[-1].SerializeToString(), graph.op_counts().get("Transpose", 0)
    hoist_transposes.run(graph)  # the Transpose itself may move
    assert graph.op_counts().get("Transpose", 0) == transposes
    kept = [node.op_type for node in graph.nodes]
    assert kept[-1] == "ReduceMean"
    assert list(graph.nodes[-1].input)[1:] == (["axes"] if b"axes" in before else [])


def test_a_reduction_reads_past_a_transpose_that_another_needs(same: Callable[..., int]) -> None:
    graph = reduction()
    graph.nodes[0] = make_node("Transpose", ["x"], "t", perm=NHWC)
    graph.nodes.append(make_node("Abs", ["t"], "z"))
    graph.outputs.append(value_info("z", np.float32, ["a", "b", "c", "d"]))
    assert same(graph, hoist_transposes.run) > 0
    assert graph.op_counts()["Transpose"] == 1
    assert next(node for node in graph.nodes if node.op_type == "Relu").input[0] == "x"


def test_a_reduction_over_computed_axes_is_left_alone() -> None:
    graph = reduction()
    graph.weights["zero"] = np.array(0)
    graph.nodes.insert(2, make_node("Add", ["axes", "zero"], "computed"))
    graph.nodes[3].input[1] = "computed"
    assert untouched(graph, hoist_transposes.run)


def test_hoisting_keeps_the_constants_layer() -> None:
    nodes = [make_node("Mul", ["x", "c"], "a"), make_node("Transpose", ["a"], "y", perm=NCHW)]
    graph = build(nodes, {"c": draw(CHANNELS)}, layer_of={"c": "bn1"})
    hoist_transposes.run(graph)
    mul = graph.nodes[1]
    assert graph.weights[mul.input[1]].shape == (1, CHANNELS, 1, 1)
    assert graph.layer_of[mul.input[1]] == "bn1"


def test_a_chain_of_head_conv_and_tail_ends_with_one_transpose_in_front(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Mul", ["x", "s"], "scaled"),
        make_node("Transpose", ["scaled"], "t1", perm=NCHW),
        make_node("Conv", ["t1", "k"], "c1", pads=[1, 1, 1, 1]),
        make_node("Transpose", ["c1"], "t2", perm=NHWC),
        make_node("Relu", ["t2"], "r"),
        make_node("Mul", ["r", "gamma"], "m"),
        make_node("Add", ["m", "beta"], "a"),
        make_node("Transpose", ["a"], "t3", perm=NCHW),
        make_node("MaxPool", ["t3"], "y", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    weights = {"s": np.array(0.5, np.float32), "k": draw(6, CHANNELS, 3, 3), "gamma": draw(6), "beta": draw(6)}
    graph = build(nodes, weights)
    same(graph, hoist_transposes.run)
    ops = [node.op_type for node in graph.nodes]
    assert ops == ["Transpose", "Mul", "Conv", "Relu", "Mul", "Add", "MaxPool"]


def test_a_tensor_with_a_second_reader_keeps_its_layout(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Relu", ["x"], "a"),
        make_node("Transpose", ["a"], "y", perm=NCHW),
        make_node("Abs", ["a"], "z"),
    ]
    graph = build(nodes, outputs={"y": ("N", "a", "b", "c"), "z": ("N", "d", "e", "f")})
    assert untouched(graph, hoist_transposes.run)


def test_a_cancelled_transpose_stays_for_its_second_reader(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["x"], "a", perm=NCHW),
        make_node("Transpose", ["a"], "b", perm=NHWC),
        make_node("Relu", ["b"], "y"),
        make_node("Abs", ["a"], "z"),
    ]
    graph = build(nodes, outputs={"y": ("N", "a", "b", "c"), "z": ("N", "d", "e", "f")})
    assert same(graph, hoist_transposes.run) == 1
    assert graph.op_counts() == {"Transpose": 1, "Relu": 1, "Abs": 1}


def test_an_identity_pair_that_makes_the_output_stays(same: Callable[..., int]) -> None:
    nodes = [make_node("Transpose", ["x"], "a", perm=NCHW), make_node("Transpose", ["a"], "y", perm=NHWC)]
    assert same(build(nodes), hoist_transposes.run) == 0


def test_a_sum_of_two_tensors_keeps_its_layout(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Abs", ["x"], "a"),
        make_node("Neg", ["x"], "b"),
        make_node("Add", ["a", "b"], "c"),
        make_node("Transpose", ["c"], "y", perm=NCHW),
    ]
    assert untouched(build(nodes), hoist_transposes.run)


@pytest.mark.parametrize("op", ["Softmax", "LRN"])
def test_ops_that_look_along_an_axis_are_not_crossed(op: str) -> None:
    options = {"axis": -1} if op == "Softmax" else {"size": 3}
    nodes = [make_node(op, ["x"], "a", **options), make_node("Transpose", ["a"], "y", perm=NCHW)]
    assert untouched(build(nodes), hoist_transposes.run)


# --- affine_to_batchnorm


def affine(inputs: tuple[list[str], list[str]] = (["r", "c"], ["m", "s"]), **weights: np.ndarray) -> Graph:
    nodes = [make_node("Relu", ["x"], "r"), make_node("Mul", inputs[0], "m"), make_node("Add", inputs[1], "y")]
    weights = {"c": draw(1, CHANNELS, 1, 1), "s": draw(1, CHANNELS, 1, 1)} | weights
    return build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), layer_of={"c": "bn1"})


@pytest.mark.parametrize(
    "inputs", [(["r", "c"], ["m", "s"]), (["c", "r"], ["s", "m"])], ids=["constants last", "constants first"]
)
@pytest.mark.parametrize("shape", [(1, CHANNELS, 1, 1), (CHANNELS, 1, 1)], ids=["rank 4", "rank 3"])
def test_mul_and_add_a_channel_become_one_batchnorm_to_the_last_bit(
    inputs: tuple, shape: tuple, run_graph: Callable[..., list[np.ndarray]], same: Callable[..., int]
) -> None:
    graph = affine(inputs, c=draw(*shape))
    x = draw(2, CHANNELS, HEIGHT, WIDTH)
    (before,) = run_graph(graph, x=x)
    assert same(graph, affine_to_batchnorm.run) == 1
    assert graph.op_counts() == {"Relu": 1, "BatchNormalization": 1}
    np.testing.assert_allclose(run_graph(graph, x=x)[0], before, rtol=3e-7, atol=1e-7)
    norm = graph.nodes[1]
    assert attribute(norm, "epsilon") == 0
    assert graph.layer_of[norm.input[1]] == "bn1"


ONE = np.array(2.0, np.float32)


@pytest.mark.parametrize(
    "weights",
    [
        {"c": ONE},
        {"s": ONE},
        {"c": np.float32([2.0])},
        {"c": draw(WIDTH)},
        {"s": draw(1, 1, HEIGHT, 1)},
        {"s": draw(1, CHANNELS, HEIGHT, WIDTH)},
    ],
    ids=["scalar scale", "scalar shift", "one element", "along the width", "along the height", "everywhere"],
)
def test_constants_that_are_not_one_a_channel_are_left_alone(weights: dict) -> None:
    assert untouched(affine(**weights), affine_to_batchnorm.run)


@pytest.mark.parametrize("head", ["Transpose", "Cast", "input"])
def test_the_images_own_normalisation_is_left_alone(head: str) -> None:
    first = {
        "Transpose": make_node("Transpose", ["x"], "r", perm=[0, 1, 3, 2]),
        "Cast": make_node("Cast", ["x"], "r", to=1),
        "input": make_node("Identity", ["x"], "unread"),
    }[head]
    source = "x" if head == "input" else "r"
    nodes = [first, make_node("Mul", [source, "c"], "m"), make_node("Add", ["m", "s"], "y")]
    weights = {"c": draw(1, CHANNELS, 1, 1), "s": draw(1, CHANNELS, 1, 1)}
    assert untouched(build(nodes, weights, (CHANNELS, HEIGHT, WIDTH)), affine_to_batchnorm.run)


def test_a_batchnorm_on_the_rescaled_image_is_still_one(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["x"], "t", perm=NCHW),
        make_node("Mul", ["t", "half"], "a"),
        make_node("Add", ["a", "half"], "b"),
        make_node("Mul", ["b", "c"], "m"),
        make_node("Add", ["m", "s"], "y"),
    ]
    weights = {"half": np.array(0.5, np.float32), "c": draw(1, CHANNELS, 1, 1), "s": draw(1, CHANNELS, 1, 1)}
    graph = build(nodes, weights)
    assert same(graph, affine_to_batchnorm.run) == 1
    assert [node.op_type for node in graph.nodes] == ["Transpose", "Mul", "Add", "BatchNormalization"]


def test_a_product_that_somebody_else_reads_is_left_alone() -> None:
    graph = affine()
    graph.outputs.append(value_info("m", np.float32, ["N", CHANNELS, HEIGHT, WIDTH]))
    assert untouched(graph, affine_to_batchnorm.run)


def test_add_before_mul_and_a_sum_of_two_tensors_are_left_alone() -> None:
    turned = affine()
    turned.nodes[1].op_type, turned.nodes[2].op_type = "Add", "Mul"
    assert untouched(turned, affine_to_batchnorm.run)
    assert untouched(affine((["r", "c"], ["m", "r"])), affine_to_batchnorm.run)


# --- fold_batchnorm


def normed(conv_inputs: tuple[str, ...] = ("x", "k", "b"), between: str | None = None, **options: Any) -> Graph:
    """Conv [-> between] -> BatchNormalization -> Conv with padding."""
    after = "c" if between is None else "r"
    nodes = [make_node("Conv", list(conv_inputs), "c", pads=[1, 1, 1, 1])]
    nodes += [] if between is None else [make_node(between, ["c"], "r")]
    nodes += [
        make_node("BatchNormalization", [after, "scale", "shift", "mean", "variance"], "n", **options),
        make_node("Conv", ["n", "k2"], "y", pads=[1, 1, 1, 1]),
    ]
    weights = {"k": draw(6, CHANNELS, 3, 3), "b": draw(6), "k2": draw(2, 6, 3, 3)}
    weights |= {"scale": draw(6), "shift": draw(6), "mean": draw(6), "variance": np.float32([1e-3, 0.1, 1, 2, 9, 100])}
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), layer_of={"k": "conv1", "scale": "bn1"})
    graph.drop_unused()
    return graph


@pytest.mark.parametrize("inputs", [("x", "k", "b"), ("x", "k")], ids=["bias", "no bias"])
@pytest.mark.parametrize("options", [{}, {"epsilon": 1e-3}, {"epsilon": 0.0}], ids=["default", "1e-3", "0"])
def test_a_batchnorm_after_a_convolution_goes_into_its_weights(
    inputs: tuple, options: dict, same: Callable[..., int]
) -> None:
    graph = normed(inputs, **options)
    kernel, scale, variance = graph.weights["k"], graph.weights["scale"], graph.weights["variance"].astype(np.float64)
    assert same(graph, fold_batchnorm.run, rtol=1e-4) == 1
    assert graph.op_counts() == {"Conv": 2}
    conv = graph.nodes[0]
    factor = scale / np.sqrt(variance + options.get("epsilon", 1e-5))
    np.testing.assert_allclose(graph.weights[conv.input[1]], kernel * factor[:, None, None, None], rtol=1e-6)
    assert graph.layer_of[conv.input[1]] == "conv1"
    assert {graph.weights[name].dtype for name in conv.input[1:]} == {np.dtype(np.float32)}


def test_a_batchnorm_after_a_relu_does_not_fold_into_either_neighbour(same: Callable[..., int]) -> None:
    graph = normed(between="Relu")
    assert untouched(graph, fold_batchnorm.run)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH)])
def test_a_batchnorm_at_the_input_stays(shape: tuple) -> None:
    nodes = [make_node("BatchNormalization", ["x", "s", "s", "s", "v"], "n"), make_node("Conv", ["n", "k"], "y")]
    weights = {"s": draw(CHANNELS), "v": np.ones(CHANNELS, np.float32), "k": draw(2, CHANNELS, 3, 3)}
    assert untouched(build(nodes, weights, (CHANNELS, *shape)), fold_batchnorm.run)


def test_a_convolution_with_a_second_reader_keeps_its_weights() -> None:
    graph = normed()
    graph.outputs.append(value_info("c", np.float32, ["N", 6, HEIGHT, WIDTH]))
    assert untouched(graph, fold_batchnorm.run)
    graph = normed()
    graph.nodes.append(make_node("Relu", ["c"], "z"))
    graph.outputs.append(value_info("z", np.float32, ["N", 6, HEIGHT, WIDTH]))
    assert untouched(graph, fold_batchnorm.run)


def test_a_kernel_that_two_convolutions_share_folds_into_one_of_them_only(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Conv", ["x", "k"], "c1"),
        make_node("BatchNormalization", ["c1", "scale", "shift", "mean", "variance"], "n"),
        make_node("Conv", ["x", "k"], "c2"),
        make_node("Add", ["n", "c2"], "y"),
    ]
    weights = {"k": draw(6, CHANNELS, 3, 3), "variance": np.ones(6, np.float32)}
    weights |= {name: draw(6) for name in ("scale", "shift", "mean")}
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH))
    assert same(graph, fold_batchnorm.run) == 1
    assert graph.op_counts() == {"Conv": 2, "Add": 1}


def test_two_batchnorms_in_a_row_fold_one_after_the_other(same: Callable[..., int]) -> None:
    graph = normed()
    second = make_node("BatchNormalization", ["n", "shift", "scale", "scale", "one"], "n2")
    graph.weights["one"] = np.ones(6, np.float32)
    graph.nodes.insert(2, second)
    graph.nodes[3].input[0] = "n2"
    assert same(graph, fold_batchnorm.run, rtol=1e-4) == 2
    assert graph.op_counts() == {"Conv": 2}


# --- flatten_without_transpose


def flat(
    perm: list[int] | None = NHWC,
    to: tuple[int, ...] = (-1, FEATURES),
    rows: int = FEATURES,
    between: tuple[str, ...] = (),
    outputs: dict | None = None,
) -> Graph:
    """(N, C, H, W) [-> Transpose] -> Reshape [-> between] -> MatMul."""
    nodes = [make_node("Relu", ["x"], "r")]
    nodes += [] if perm is None else [make_node("Transpose", ["r"], "t", perm=perm)]
    nodes += [make_node("Reshape", ["r" if perm is None else "t", "to"], "f")]
    last = "f"
    for op in between:
        nodes.append(make_node(op, [last], f"{last}_{op}"))
        last = f"{last}_{op}"
    nodes += [make_node("MatMul", [last, "w"], "y")]
    weights = {"to": np.array(to, np.int64), "w": draw(rows, UNITS)}
    return build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), outputs or FLAT, layer_of={"w": "fc1"})


@pytest.mark.parametrize("to", [(-1, FEATURES), (0, -1), (0, FEATURES)])
@pytest.mark.parametrize("between", [(), ("Relu",), ("Relu", "Identity")], ids=str)
def test_a_channels_last_flatten_becomes_flatten_with_permuted_rows(
    to: tuple, between: tuple, same: Callable[..., int]
) -> None:
    graph = flat(to=to, between=between)
    rows = graph.weights["w"]
    assert same(graph, flatten_without_transpose.run) == 1
    counts = graph.op_counts()
    assert (counts["Flatten"], counts.get("Transpose"), counts.get("Reshape")) == (1, None, None)
    kernel = graph.nodes[-1].input[1]
    wanted = rows.reshape(HEIGHT, WIDTH, CHANNELS, UNITS).transpose(2, 0, 1, 3).reshape(FEATURES, UNITS)
    np.testing.assert_array_equal(graph.weights[kernel], wanted)
    assert graph.layer_of[kernel] == "fc1"


def test_a_channels_first_flatten_keeps_its_rows(same: Callable[..., int]) -> None:
    graph = flat(perm=None)
    rows = graph.weights["w"]
    assert same(graph, flatten_without_transpose.run) == 1
    assert graph.op_counts() == {"Relu": 1, "Flatten": 1, "MatMul": 1}
    assert graph.weights["w"] is rows


def test_a_transpose_that_something_else_reads_stays_for_it(same: Callable[..., int]) -> None:
    graph = flat()
    graph.nodes.append(make_node("Abs", ["t"], "z"))
    graph.outputs.append(value_info("z", np.float32, ["N", HEIGHT, WIDTH, CHANNELS]))
    assert same(graph, flatten_without_transpose.run) == 1
    assert graph.op_counts() == {"Relu": 1, "Transpose": 1, "Flatten": 1, "MatMul": 1, "Abs": 1}


@pytest.mark.parametrize(
    ("options", "outputs"),
    [
        ({"to": (-1, CHANNELS), "rows": CHANNELS}, {"y": ("M", UNITS)}),
        ({"to": (-1, WIDTH * CHANNELS), "rows": WIDTH * CHANNELS}, {"y": ("M", UNITS)}),
        ({"to": (0, HEIGHT * WIDTH, CHANNELS), "rows": CHANNELS}, {"y": ("N", "P", UNITS)}),
        ({"to": (0, 1, FEATURES)}, {"y": ("N", 1, UNITS)}),
        ({"perm": None, "to": (-1, 1, FEATURES)}, {"y": ("N", 1, UNITS)}),
        ({"perm": [0, 3, 2, 1]}, FLAT),
        ({"between": ("Softmax",)}, FLAT),
    ],
    ids=[
        "dense for each pixel",
        "dense for each row",
        "pixels as a sequence",
        "an extra axis",
        "an extra axis, channels first",
        "another perm",
        "softmax over the features",
    ],
)
def test_a_reshape_that_is_no_plain_flatten_is_left_alone(options: dict, outputs: dict) -> None:
    assert untouched(flat(**options, outputs=outputs), flatten_without_transpose.run)


def test_a_flatten_that_is_read_twice_or_by_no_dense_layer_is_left_alone() -> None:
    graph = flat()
    graph.nodes.append(make_node("Abs", ["f"], "z"))
    graph.outputs.append(value_info("z", np.float32, ["N", FEATURES]))
    assert untouched(graph, flatten_without_transpose.run)
    alone = flat()
    alone.nodes[-1].op_type = "Add"
    alone.weights["w"] = draw(FEATURES)
    assert untouched(alone, flatten_without_transpose.run)


def test_a_flatten_of_an_image_of_unknown_size_is_left_alone() -> None:
    graph = flat(to=(0, -1))
    graph.inputs = [value_info("x", np.float32, ["N", CHANNELS, "height", WIDTH])]
    graph.check()
    assert untouched(graph, flatten_without_transpose.run)


def test_two_dense_layers_with_one_kernel_are_permuted_apart(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["x"], "t", perm=NHWC),
        make_node("Reshape", ["t", "to"], "f1"),
        make_node("Reshape", ["x", "to"], "f2"),
        make_node("MatMul", ["f1", "w"], "a"),
        make_node("MatMul", ["f2", "w"], "b"),
        make_node("Add", ["a", "b"], "y"),
    ]
    weights = {"to": np.array([-1, FEATURES], np.int64), "w": draw(FEATURES, UNITS)}
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), FLAT)
    assert same(graph, flatten_without_transpose.run) == 2
    assert graph.op_counts() == {"Flatten": 2, "MatMul": 2, "Add": 1}


# --- matmul_to_gemm


def dense(
    kernel: np.ndarray | None = None, bias: np.ndarray | None = None, add: list[str] | None = None, **options: Any
) -> Graph:
    nodes = [make_node("MatMul", ["x", "w"], "m"), make_node("Add", add or ["m", "b"], "y")]
    weights = {"w": draw(5, UNITS) if kernel is None else kernel, "b": draw(UNITS) if bias is None else bias}
    options = {"shape": (5,), "outputs": FLAT, "layer_of": {"w": "fc1"}} | options
    return build(nodes, weights, **options)


@pytest.mark.parametrize("add", [["m", "b"], ["b", "m"]], ids=["bias last", "bias first"])
def test_matmul_and_bias_become_one_gemm_with_out_in_weights(add: list, same: Callable[..., int]) -> None:
    graph = dense(add=add)
    kernel = graph.weights["w"]
    assert same(graph, matmul_to_gemm.run) == 1
    assert graph.op_counts() == {"Gemm": 1}
    gemm = graph.nodes[0]
    assert attribute(gemm, "transB") == 1
    np.testing.assert_array_equal(graph.weights[gemm.input[1]], kernel.T)
    assert gemm.input[2] == "b"
    assert graph.layer_of[gemm.input[1]] == "fc1"
    assert len(graph.weights) == 2


def test_matmul_without_bias_becomes_a_gemm_of_two_inputs(same: Callable[..., int]) -> None:
    graph = build([make_node("MatMul", ["x", "w"], "y")], {"w": draw(5, UNITS)}, (5,), FLAT)
    assert same(graph, matmul_to_gemm.run) == 1
    assert [(node.op_type, len(node.input)) for node in graph.nodes] == [("Gemm", 2)]


@pytest.mark.parametrize(
    "bias", [np.array(2.0, np.float32), np.float32([2]), draw(1, UNITS)], ids=["0-d", "one element", "a row"]
)
def test_what_is_no_bias_vector_stays_an_add(bias: np.ndarray, same: Callable[..., int]) -> None:
    graph = dense(bias=bias)
    assert same(graph, matmul_to_gemm.run) == 1
    assert graph.op_counts() == {"Gemm": 1, "Add": 1}


def test_a_product_with_a_second_reader_keeps_its_add(same: Callable[..., int]) -> None:
    graph = dense(outputs=FLAT | {"m": ("N", UNITS)})
    assert same(graph, matmul_to_gemm.run) == 1
    assert graph.op_counts() == {"Gemm": 1, "Add": 1}


def test_a_product_of_three_axes_is_left_alone() -> None:
    graph = dense(shape=(6, 5), outputs={"y": ("N", 6, UNITS)})
    assert untouched(graph, matmul_to_gemm.run)


def test_stacked_kernels_are_left_alone() -> None:
    nodes = [make_node("MatMul", ["x", "w"], "y")]
    graph = build(nodes, {"w": draw(2, 5, UNITS)}, (5,), {"y": (2, "N", UNITS)})
    assert untouched(graph, matmul_to_gemm.run)


def test_a_product_of_two_tensors_or_with_the_weights_first_is_left_alone() -> None:
    both = build(
        [make_node("Transpose", ["x"], "t", perm=[1, 0]), make_node("MatMul", ["x", "t"], "y")],
        shape=(5,),
        outputs={"y": ("N", "N")},
    )
    assert untouched(both, matmul_to_gemm.run)
    first = build([make_node("MatMul", ["w", "x"], "y")], {"w": draw(UNITS, 1)}, (5,), {"y": (UNITS, 5)})
    assert untouched(first, matmul_to_gemm.run)


@pytest.mark.parametrize("units", [5, UNITS], ids=["square", "not square"])
def test_a_kernel_that_two_dense_layers_share_serves_both(units: int, same: Callable[..., int]) -> None:
    """A square one would not even be invalid when it is read the wrong way round."""
    nodes = [
        make_node("Abs", ["x"], "other"),
        make_node("MatMul", ["x", "w"], "a"),
        make_node("MatMul", ["other", "w"], "b"),
        make_node("Relu", ["a"], "ra"),
        make_node("Add", ["ra", "b"], "y"),
    ]
    graph = build(nodes, {"w": draw(5, units)}, (5,), FLAT, layer_of={"w": "fc1"})
    assert same(graph, lambda g: matmul_to_gemm.run(g) + 100 * name_layers.run(g)) % 100 == 2
    assert graph.op_counts() == {"Gemm": 2, "Abs": 1, "Relu": 1, "Add": 1}


# --- name_layers


def named(first: str = "conv1", last: str = "predictions") -> Graph:
    nodes = [
        make_node("Cast", ["images"], "t0", "whatever", to=1),
        make_node("Transpose", ["t0"], "t1", perm=NCHW),
        make_node("Mul", ["t1", "w0"], "t2"),
        make_node("Add", ["t2", "w1"], "t3"),
        make_node("Conv", ["t3", "w2", "w3"], "t4", "x/y/z"),
        make_node("Relu", ["t4"], "t5"),
        make_node("MaxPool", ["t5"], "t6", "pool1/MaxPool2d", kernel_shape=[2, 2], strides=[2, 2]),
        make_node("Flatten", ["t6"], "t7", "flatten/Reshape"),
        make_node("Gemm", ["t7", "w4", "w5"], "t8", transB=1),
        make_node("Softmax", ["t8"], "probabilities"),
    ]
    weights = {"w0": np.array(1 / 128, np.float32), "w1": np.array(-1, np.float32)}
    weights |= {"w2": draw(6, CHANNELS, 1, 1), "w3": draw(6), "w4": draw(UNITS, 24), "w5": draw(UNITS)}
    inputs = [value_info("images", np.uint8, ["N", HEIGHT, WIDTH, CHANNELS])]
    outputs = [value_info("probabilities", np.float32, ["N", UNITS])]
    graph = Graph(nodes, weights, inputs, outputs, layer_of={"w2": first, "w3": first, "w4": last, "w5": last})
    graph.check()
    return graph


NAMES = [
    "head/cast",
    "head/transpose",
    "head/scale",
    "head/offset",
    "conv1",
    "conv1/relu",
    "pool1",
    "flatten",
    "predictions",
    "predictions/softmax",
]


def test_nodes_tensors_and_weights_carry_their_layers_names() -> None:
    graph = named()
    assert name_layers.run(graph) == 10
    graph.check()
    assert [node.name for node in graph.nodes] == NAMES
    assert [node.output[0] for node in graph.nodes] == [*NAMES[:-1], "probabilities"]
    assert set(graph.weights) == {
        "head/scale/value",
        "head/offset/value",
        "conv1/kernel",
        "conv1/bias",
        "predictions/kernel",
        "predictions/bias",
    }
    assert name_layers.run(graph) == 0


@pytest.mark.parametrize(
    ("first", "last"), [("images", "predictions"), ("conv1", "probabilities"), ("probabilities", "images")]
)
def test_a_layer_may_be_called_like_the_graphs_input_or_output(
    first: str, last: str, run_graph: Callable[..., list[np.ndarray]]
) -> None:
    graph = named(first, last)
    images = RNG.integers(0, 256, (3, HEIGHT, WIDTH, CHANNELS), dtype=np.uint8)
    (before,) = run_graph(graph, images=images)
    name_layers.run(graph)
    assert [graph.nodes[4].name, graph.nodes[8].name] == [first, last]
    assert [graph.inputs[0].name, graph.outputs[0].name] == ["images", "probabilities"]
    np.testing.assert_array_equal(run_graph(graph, images=images)[0], before)


def test_a_layer_that_is_used_twice_gets_numbers_and_keeps_its_shared_weights(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Conv", ["x", "k", "b"], "c1"),
        make_node("Relu", ["c1"], "r1"),
        make_node("Conv", ["r1", "k", "b"], "c2"),
        make_node("Relu", ["c2"], "y"),
    ]
    weights = {"k": draw(CHANNELS, CHANNELS, 1, 1), "b": draw(CHANNELS)}
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), layer_of={"k": "twice", "b": "twice"})
    same(graph, name_layers.run)
    assert [node.name for node in graph.nodes] == ["twice", "twice/relu", "twice_2", "twice/relu_2"]
    assert len({node.output[0] for node in graph.nodes}) == 4


def test_a_number_that_is_part_of_another_layers_name_is_not_given_twice(same: Callable[..., int]) -> None:
    nodes = [make_node("Conv", [a, k], b) for a, k, b in [("x", "k", "a"), ("a", "k", "b"), ("b", "other", "y")]]
    weights = {"k": draw(CHANNELS, CHANNELS, 1, 1), "other": draw(2, CHANNELS, 1, 1)}
    graph = build(nodes, weights, (CHANNELS, HEIGHT, WIDTH), layer_of={"k": "conv", "other": "conv_2"})
    same(graph, name_layers.run)
    assert [node.name for node in graph.nodes] == ["conv", "conv_2", "conv_2_2"]


# --- hoist_transposes across what has two inputs or two readers


def test_residual_blocks_lose_all_their_transposes(same: Callable[..., int]) -> None:
    """Conv, back to NHWC, Add of the block's input, Relu, which the next convolution and the next Add read."""
    nodes = [make_node("Transpose", ["x"], "x_nchw", perm=NCHW), make_node("Conv", ["x_nchw", "k0"], "c0")]
    nodes += [make_node("Transpose", ["c0"], "t0", perm=NHWC), make_node("Relu", ["t0"], "r0")]
    for n in (1, 2):
        before = f"r{n - 1}"
        nodes += [
            make_node("Transpose", [before], f"u{n}", perm=NCHW),
            make_node("Conv", [f"u{n}", f"k{n}"], f"c{n}"),
            make_node("Transpose", [f"c{n}"], f"t{n}", perm=NHWC),
            make_node("Add", [before, f"t{n}"], f"s{n}"),
            make_node("Relu", [f"s{n}"], f"r{n}"),
        ]
    nodes.append(make_node("ReduceMean", ["r2", "axes"], "y", keepdims=0))
    weights = {"k0": draw(6, CHANNELS, 1, 1), "k1": draw(6, 6, 1, 1), "k2": draw(6, 6, 1, 1), "axes": np.array([1, 2])}
    graph = build(nodes, weights, outputs=FLAT)
    assert same(graph, hoist_transposes.run) > 0
    assert graph.op_counts() == {"Conv": 3, "Relu": 3, "Add": 2, "Transpose": 1, "ReduceMean": 1}
    assert graph.nodes[0].op_type == "Transpose"


@pytest.mark.parametrize(
    ("op", "inputs", "options"),
    [
        ("Concat", ["a", "b"], {"axis": 3}),
        ("Concat", ["a", "b"], {"axis": -3}),
        ("Pad", ["a", "pads"], {}),
        ("Pad", ["a", "pads", "value"], {}),
        ("ReduceMean", ["a", "places"], {"keepdims": 1}),
        ("Mul", ["a", "b"], {}),
        ("Sub", ["k", "a"], {}),
    ],
)
def test_a_transpose_moves_across(op: str, inputs: list[str], options: dict, same: Callable[..., int]) -> None:
    nodes = [make_node("Transpose", ["x"], "t", perm=NCHW), make_node("Conv", ["t", "kernel"], "c")]
    nodes += [make_node("Transpose", ["c"], "a", perm=NHWC)]
    if "b" in inputs:
        nodes += [make_node("Abs", ["c"], "d"), make_node("Transpose", ["d"], "b", perm=NHWC)]
    nodes += [make_node(op, inputs, "f", **options), make_node("Transpose", ["f"], "y", perm=NCHW)]
    weights = {
        "kernel": draw(6, CHANNELS, 1, 1),
        "pads": np.array([0, 1, 2, 3, 0, 4, 0, 0]),
        "value": np.array(0.5, np.float32),
        "places": np.array([1, -2]),
        "k": draw(WIDTH, 6),
    }
    graph = build(nodes, weights)
    graph.drop_unused()
    assert same(graph, hoist_transposes.run) > 0
    assert graph.op_counts()["Transpose"] == 1
    assert graph.nodes[-1].op_type == op


def test_reshapes_that_only_move_one_channel_or_one_pixel_go_with_the_transposes(same: Callable[..., int]) -> None:
    nodes = [
        make_node("Transpose", ["x"], "t", perm=NCHW),
        make_node("Conv", ["t", "one"], "c"),
        make_node("Reshape", ["c", "last"], "l"),  # (N, 1, h, w) -> (N, h, w, 1)
        make_node("Relu", ["l"], "r"),
        make_node("Reshape", ["r", "first"], "f"),
        make_node("Conv", ["f", "more"], "y"),
    ]
    weights = {
        "one": draw(1, CHANNELS, 1, 1),
        "more": draw(2, 1, 1, 1),
        "last": np.array([-1, HEIGHT, WIDTH, 1]),
        "first": np.array([-1, 1, HEIGHT, WIDTH]),
    }
    graph = build(nodes, weights)
    assert same(graph, hoist_transposes.run) > 0
    assert [node.op_type for node in graph.nodes] == ["Transpose", "Conv", "Relu", "Conv"]


# --- fold_channel_order


def swap(op: str, order: tuple[int, ...] = (2, 1, 0), axis: int = 3) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Nodes from ``x`` to ``b``, its channels in another order, as a Gather or as a Concat of slices."""
    if op == "Gather":
        return [make_node("Gather", ["x", "order"], "b", axis=axis)], {"order": np.array(order)}
    weights = {f"at{n}": np.array([n]) for n in range(CHANNELS + 1)} | {"axis": np.array([axis])}
    slices = [make_node("Slice", ["x", f"at{n}", f"at{n + 1}", "axis"], f"s{i}") for i, n in enumerate(order)]
    return [*slices, make_node("Concat", [node.output[0] for node in slices], "b", axis=axis)], weights


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
@pytest.mark.parametrize("op", ["Gather", "Concat"])
def test_an_order_of_channels_goes_into_the_kernel(op: str, order: tuple[int, ...], same: Callable[..., int]) -> None:
    nodes, weights = swap(op, order)
    nodes += [
        make_node("Sub", ["b", "mean"], "s"),
        make_node("Mul", ["s", "half"], "m"),
        make_node("Transpose", ["m"], "t", perm=NCHW),
        make_node("Add", ["t", "offset"], "o"),
        make_node("Pad", ["o", "pads"], "p"),
        make_node("Conv", ["p", "k"], "y"),
    ]
    weights |= {"mean": draw(CHANNELS), "half": np.array(0.5, np.float32), "offset": draw(1, CHANNELS, 1, 1)}
    weights |= {"k": draw(7, CHANNELS, 2, 2), "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1])}
    graph = build(nodes, weights)
    assert same(graph, fold_channel_order.run) == 1
    assert [node.op_type for node in graph.nodes] == ["Sub", "Mul", "Transpose", "Add", "Pad", "Conv"]


def order_case(change: str) -> Graph:
    nodes, weights = swap("Gather")
    nodes += [make_node("Transpose", ["b"], "t", perm=NCHW), make_node("Conv", ["t", "k"], "y")]
    weights["k"] = draw(6, CHANNELS, 1, 1)
    outputs: dict[str, tuple] = {"y": ("N", "a", "b", "c")}
    if change == "another reader":
        nodes.append(make_node("Abs", ["b"], "z"))
        outputs["z"] = ("N", "d", "e", "f")
    if change == "a depthwise convolution":
        nodes[-1], weights["k"] = make_node("Conv", ["t", "k"], "y", group=CHANNELS), draw(6, 1, 1, 1)
    if change == "not all channels":
        weights["order"], weights["k"] = np.array([1, 0]), draw(6, 2, 1, 1)
    if change == "one of them twice":
        weights["order"] = np.array([2, 1, 1])
    if change == "another axis":
        nodes[0], weights["order"] = make_node("Gather", ["x", "order"], "b", axis=1), np.array([3, 1, 0, 2])
    if change == "channels are mixed":
        nodes[1:1] = [make_node("Softmax", ["b"], "mixed", axis=3)]
        nodes[2].input[0] = "mixed"
    if change == "padded channels":
        nodes[2:2] = [make_node("Pad", ["t", "pads"], "p")]
        nodes[-1].input[0] = "p"
        weights["pads"], weights["k"] = np.array([0, 1, 0, 0, 0, 0, 0, 0]), draw(6, CHANNELS + 1, 1, 1)
    return build(nodes, weights, outputs=outputs)


ORDER_CASES = (
    "another reader", "a depthwise convolution", "not all channels", "one of them twice", "another axis",
    "channels are mixed", "padded channels",
)  # fmt: skip


@pytest.mark.parametrize("change", ORDER_CASES)
def test_an_order_that_cannot_be_folded_stays(change: str) -> None:
    assert untouched(order_case(change), fold_channel_order.run)


# --- fold_bias


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (6, 1, 1), (1, 1, 1, 1), ()])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 3])
def test_a_constant_a_channel_becomes_the_bias(
    shape: tuple[int, ...], bias: bool, group: int, same: Callable[..., int]
) -> None:
    weights = {"k": draw(6, CHANNELS // group, 1, 1), "b": draw(6), "c": draw(*shape)}
    nodes = [make_node("Transpose", ["x"], "t", perm=NCHW)]
    nodes += [make_node("Conv", ["t", "k", "b"] if bias else ["t", "k"], "conv", group=group)]
    graph = build([*nodes, make_node("Add", ["c", "conv"], "y")], weights)
    assert same(graph, fold_bias.run) == 1
    assert [node.op_type for node in graph.nodes] == ["Transpose", "Conv"]
    assert graph.weights[graph.nodes[-1].input[2]].shape == (6,)


@pytest.mark.parametrize("shape", [(1, 1, HEIGHT, WIDTH), (WIDTH,), (1, 6, HEIGHT, 1), (1, 1, 1, 1, 1)])
def test_another_constant_stays_an_add(shape: tuple[int, ...]) -> None:
    nodes = [make_node("Transpose", ["x"], "t", perm=NCHW), make_node("Conv", ["t", "k"], "conv")]
    nodes.append(make_node("Add", ["conv", "c"], "y"))
    outputs = {"y": ("N", "a", "b", "c", "d")[: max(4, len(shape))]}
    graph = build(nodes, {"k": draw(6, CHANNELS, 1, 1), "c": draw(*shape)}, outputs=outputs)
    assert untouched(graph, fold_bias.run)


def test_a_convolution_with_another_reader_keeps_its_bias() -> None:
    nodes = [make_node("Transpose", ["x"], "t", perm=NCHW), make_node("Conv", ["t", "k"], "conv")]
    nodes += [make_node("Add", ["conv", "c"], "y"), make_node("Relu", ["conv"], "z")]
    outputs = {"y": ("N", "a", "b", "c"), "z": ("N", "d", "e", "f")}
    weights = {"k": draw(6, CHANNELS, 1, 1), "c": draw(1, 6, 1, 1)}
    assert untouched(build(nodes, weights, outputs=outputs), fold_bias.run)


# --- fold_padding


@pytest.mark.parametrize("options", [{}, {"pads": [1, 0, 2, 1]}, {"auto_pad": "VALID"}, {"strides": [2, 2]}])
def test_zeros_around_an_image_become_the_convolutions_padding(options: dict, same: Callable[..., int]) -> None:
    nodes = [make_node("Transpose", ["x"], "t", perm=NCHW), make_node("Pad", ["t", "pads", "zero"], "p")]
    nodes.append(make_node("Conv", ["p", "k"], "y", **options))
    weights = {"k": draw(6, CHANNELS, 3, 2), "pads": np.array([0, 0, 1, 2, 0, 0, 3, 0]), "zero": np.float32([0])}
    graph = build(nodes, weights)
    assert same(graph, fold_padding.run) == 1
    assert [node.op_type for node in graph.nodes] == ["Transpose", "Conv"]
    own = options.get("pads", [0] * 4)
    assert attribute(graph.nodes[-1], "pads") == [own[0] + 1, own[1] + 2, own[2] + 3, own[3]]


@pytest.mark.parametrize(
    ("pads", "value", "pad_options", "conv_options"),
    [
        ([0, 1, 1, 1, 0, 0, 0, 0], 0.0, {}, {}),  # channels
        ([0, 0, 1, 1, 0, 0, 0, -1], 0.0, {}, {}),  # cut off
        ([0, 0, 1, 1, 0, 0, 0, 0], 0.5, {}, {}),
        ([0, 0, 1, 1, 0, 0, 0, 0], 0.0, {"mode": "reflect"}, {}),
        ([0, 0, 1, 1, 0, 0, 0, 0], 0.0, {}, {"auto_pad": "SAME_UPPER"}),
    ],
)
def test_other_padding_stays(pads: list[int], value: float, pad_options: dict, conv_options: dict) -> None:
    nodes = [make_node("Transpose", ["x"], "t", perm=NCHW), make_node("Pad", ["t", "pads", "v"], "p", **pad_options)]
    nodes.append(make_node("Conv", ["p", "k"], "y", **conv_options))
    weights = {"k": draw(6, CHANNELS + pads[1], 2, 2), "pads": np.array(pads), "v": np.array(value, np.float32)}
    assert untouched(build(nodes, weights), fold_padding.run)


# --- rewrite_erfc


def test_erfc_is_written_with_what_onnx_has(run_graph: Callable[..., list[np.ndarray]]) -> None:
    values = np.linspace(-5, 5, 60, dtype=np.float32).reshape(1, HEIGHT, WIDTH, CHANNELS)
    graph = build([make_node("Identity", ["x"], "y")])
    graph.nodes = [make_node("Erfc", ["x"], "y", "layer/Erfc")]
    assert rewrite_erfc.run(graph) == 1
    graph.check()
    wanted = [math.erfc(value) for value in values.ravel()]
    np.testing.assert_allclose(run_graph(graph, x=values)[0].ravel(), wanted, rtol=0, atol=3e-7)
    assert [node.name for node in graph.nodes] == ["layer/Erf", "layer/Erfc"]
    assert untouched(graph, rewrite_erfc.run)
