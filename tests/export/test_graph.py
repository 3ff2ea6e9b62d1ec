from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vggedge_export.graph import Graph, attribute, graph_from_model, make_node, read_graph, value_info
from vggedge_runtime.errors import ConversionError

onnx = pytest.importorskip("onnx")


def chain() -> Graph:
    """X (N, 4) -> Mul scale -> Add shift -> Relu -> y, with one branch that nobody reads."""
    return Graph(
        nodes=[
            make_node("Mul", ["x", "scale"], "scaled"),
            make_node("Add", ["scaled", "shift"], "shifted"),
            make_node("Abs", ["scaled"], "unread"),
            make_node("Relu", ["shifted"], "y"),
        ],
        weights={
            "scale": np.array(2.0, np.float32),
            "shift": np.arange(4, dtype=np.float32),
            "forgotten": np.ones(3, np.float32),
        },
        inputs=[value_info("x", np.float32, ["N", 4])],
        outputs=[value_info("y", np.float32, ["N", 4])],
        layer_of={"shift": "fc1"},
    )


def state(graph: Graph) -> tuple:
    """Everything a graph says, as plain values."""
    values = [value.SerializeToString() for value in (*graph.inputs, *graph.outputs)]
    nodes = [node.SerializeToString() for node in graph.nodes]
    return nodes, values, {k: v.tolist() for k, v in graph.weights.items()}, dict(graph.layer_of), graph.opset


WEIGHTS = {
    "float32 matrix": np.linspace(-3, 3, 15, dtype=np.float32).reshape(3, 5),
    "float16 kernel": np.linspace(-1, 1, 54, dtype=np.float16).reshape(2, 3, 3, 3),
    "int8 extremes": np.array([-128, -1, 0, 127], np.int8),
    "uint8": np.array([0, 255], np.uint8),
    "int64 shape": np.array([-1, 2**40], np.int64),
    "bool": np.array([True, False]),
    "float64": np.array([np.pi]),
    "0-d float32": np.array(1 / 128, np.float32),
    "0-d float16": np.array(0.25, np.float16),
    "0-d int8": np.array(-7, np.int8),
    "empty": np.zeros((0, 3), np.float32),
    "transposed view": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "strided view": np.arange(12, dtype=np.int64)[::2],
    "infinite": np.array([np.inf, -np.inf, np.nan], np.float32),
}


@pytest.mark.parametrize("array", WEIGHTS.values(), ids=WEIGHTS)
def test_a_written_weight_is_read_by_onnx_with_the_same_type_shape_and_bytes(array: np.ndarray) -> None:
    graph = Graph(
        [make_node("Identity", ["weight"], "y")],
        {"weight": array},
        [],
        [value_info("y", array.dtype, array.shape)],
    )
    (tensor,) = onnx.load_from_string(graph.to_bytes()).graph.initializer
    read = onnx.numpy_helper.to_array(tensor)
    assert tensor.name == "weight"
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()


def test_written_bytes_parse_to_the_same_nodes_values_and_header() -> None:
    graph = chain()
    model = onnx.load_from_string(graph.to_bytes())
    onnx.checker.check_model(model, full_check=True)
    assert [node.SerializeToString() for node in model.graph.node] == [n.SerializeToString() for n in graph.nodes]
    assert list(model.graph.input) == graph.inputs
    assert list(model.graph.output) == graph.outputs
    assert [tensor.name for tensor in model.graph.initializer] == ["scale", "shift", "forgotten"]
    assert (model.ir_version, model.producer_name, model.graph.name) == (9, "vggedge", "vgg")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]


def test_a_graph_without_weights_is_written_too() -> None:
    graph = Graph(
        [make_node("Relu", ["x"], "y")],
        {},
        [value_info("x", np.float32, [2])],
        [value_info("y", np.float32, [2])],
    )
    assert len(onnx.load_from_string(graph.to_bytes()).graph.initializer) == 0


# 2**7, 2**14 and 2**21 bytes are where the length field of a protobuf message grows by one byte.
@pytest.mark.parametrize("size", [1, 126, 127, 128, 129, 2**14 - 30, 2**14, 2**21 - 40, 2**21, 3_000_001])
def test_every_length_of_weight_is_framed_correctly(size: int) -> None:
    array = np.random.default_rng(size).integers(-128, 128, size, dtype=np.int8)
    graph = Graph(
        [make_node("Identity", ["w"], "y")],
        {"w": array, "after": np.float32([1, 2])},
        [],
        [value_info("y", np.int8, [size])],
    )
    first, second = onnx.load_from_string(graph.to_bytes()).graph.initializer
    assert first.raw_data == array.tobytes()
    assert onnx.numpy_helper.to_array(second).tolist() == [1, 2]


def test_write_and_to_bytes_agree_and_read_graph_gives_the_same_graph_back(tmp_path: Path) -> None:
    graph, path = chain(), tmp_path / "graph.onnx"
    graph.write(path)
    assert path.read_bytes() == graph.to_bytes()
    read = read_graph(path)
    read.layer_of = graph.layer_of  # not in the file
    assert state(read) == state(graph)


def test_the_hash_is_that_of_the_file(tmp_path: Path) -> None:
    graph, path = chain(), tmp_path / "graph.onnx"
    graph.weights |= WEIGHTS
    graph.write(path)
    assert graph.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert graph.sha256() == hashlib.sha256(graph.to_bytes()).hexdigest()


def test_equal_graphs_have_equal_hashes() -> None:
    graph = chain()
    graph.layer_of["scale"] = "elsewhere"  # not in the file
    assert graph.sha256() == graph.copy().sha256() == chain().sha256()


@pytest.mark.parametrize(
    "change",
    [
        lambda graph: graph.weights.update(scale=np.nextafter(graph.weights["scale"], np.float32(9))),
        lambda graph: graph.weights.update(other=np.float32(1)),
        lambda graph: graph.weights.update(scale=graph.weights["scale"].reshape(1, *graph.weights["scale"].shape)),
        lambda graph: setattr(graph.nodes[0], "name", "other"),
        lambda graph: graph.nodes.append(make_node("Relu", [graph.nodes[0].output[0]], "other")),
        lambda graph: setattr(graph, "opset", 19),
        lambda graph: setattr(graph.inputs[0], "name", "other"),
    ],
    ids=["bit", "weight", "shape", "name", "node", "opset", "input"],
)
def test_the_hash_is_another_for_anything_else(change: Callable[[Graph], object]) -> None:
    graph = chain()
    before = graph.sha256()
    change(graph)
    assert graph.sha256() != before


@pytest.mark.parametrize(
    ("attributes", "value"),
    [
        ({"value_float": 2.5}, np.float32(2.5)),
        ({"value_floats": [1.0, 2.5]}, np.float32([1, 2.5])),
        ({"value_int": 7}, np.int64(7)),
        ({"value_ints": [1, -2]}, np.int64([1, -2])),
    ],
)
def test_constant_nodes_of_every_form_become_weights(attributes: dict, value: np.ndarray) -> None:
    node = onnx.helper.make_node("Constant", [], ["c"], **attributes)
    identity = onnx.helper.make_node("Identity", ["c"], ["y"])
    out = value_info("y", value.dtype, value.shape)
    proto = onnx.helper.make_model(onnx.helper.make_graph([node, identity], "g", [], [out]))
    graph = graph_from_model(proto)
    assert graph.op_counts() == {"Identity": 1}
    assert graph.weights["c"].dtype == value.dtype
    np.testing.assert_array_equal(graph.weights["c"], value)


def test_constant_tensors_become_weights_and_the_opset_is_kept() -> None:
    array = np.float32([[1, 2]])
    node = onnx.helper.make_node("Constant", [], ["c"], value=onnx.numpy_helper.from_array(array))
    identity = onnx.helper.make_node("Identity", ["c"], ["y"])
    proto = onnx.helper.make_model(
        onnx.helper.make_graph([node, identity], "g", [], [value_info("y", np.float32, [1, 2])]),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
    )
    graph = graph_from_model(proto)
    assert graph.opset == 17
    np.testing.assert_array_equal(graph.weights["c"], array)


def test_initializers_that_are_listed_as_inputs_are_no_inputs() -> None:
    weight = onnx.numpy_helper.from_array(np.float32([3]), "w")
    values = [value_info("x", np.float32, [1]), value_info("w", np.float32, [1])]
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["x", "w"], ["y"])],
            "g",
            values,
            [value_info("y", np.float32, [1])],
            [weight],
        )
    )
    assert [value.name for value in graph_from_model(proto).inputs] == ["x"]


def test_taking_a_model_apart_does_not_tie_the_graph_to_it() -> None:
    proto = onnx.load_from_string(chain().to_bytes())
    graph = graph_from_model(proto)
    graph.nodes[0].input[0] = "other"
    graph.rename_tensor("x", "other")
    assert proto.graph.node[0].input[0] == "x"
    assert proto.graph.input[0].name == "x"


def break_order(graph: Graph) -> None:
    graph.nodes.reverse()


def break_name(graph: Graph) -> None:
    graph.nodes[0].input[0] = "nowhere"


def break_uniqueness(graph: Graph) -> None:
    graph.nodes[2].output[0] = "scaled"


def break_op(graph: Graph) -> None:
    graph.nodes[0].op_type = "Multiply"


def break_shape(graph: Graph) -> None:
    graph.weights["shift"] = np.zeros(5, np.float32)


def break_type(graph: Graph) -> None:
    graph.weights["shift"] = np.zeros(4, np.float16)


@pytest.mark.parametrize(
    "damage", [break_order, break_name, break_uniqueness, break_op, break_shape, break_type], ids=lambda d: d.__name__
)
def test_a_broken_graph_is_neither_checked_nor_written(damage: object, tmp_path: Path) -> None:
    graph = chain()
    graph.check()
    damage(graph)  # type: ignore[operator]
    with pytest.raises(ConversionError, match=r"(?s)not valid ONNX.*defect in vggedge"):
        graph.check()
    with pytest.raises(ConversionError, match="not valid ONNX"):
        graph.write(tmp_path / "graph.onnx")


def test_shapes_keep_the_dynamic_batch_by_name_through_conv_pool_and_reshape() -> None:
    graph = Graph(
        nodes=[
            make_node("Conv", ["x", "k"], "conv", pads=[1, 1, 1, 1]),
            make_node("MaxPool", ["conv"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
            make_node("Reshape", ["pool", "to"], "flat"),
            make_node("MatMul", ["flat", "w"], "y"),
        ],
        weights={
            "k": np.zeros((5, 3, 3, 3), np.float32),
            "to": np.array([0, -1], np.int64),
            "w": np.zeros((60, 2), np.float32),
        },
        inputs=[value_info("x", np.float32, ["N", 3, 8, 6])],
        outputs=[value_info("y", np.float32, ["N", 2])],
    )
    shapes = graph.shapes()
    assert shapes["conv"] == ("N", 5, 8, 6)
    assert shapes["pool"] == ("N", 5, 4, 3)
    assert shapes["flat"] == ("N", 60)
    assert shapes["y"] == ("N", 2)
    assert shapes["k"] == (5, 3, 3, 3)
    assert shapes["x"] == ("N", 3, 8, 6)


def test_shapes_of_a_static_graph_are_numbers() -> None:
    graph = chain()
    graph.inputs = [value_info("x", np.float32, [2, 4])]
    assert graph.shapes()["shifted"] == (2, 4)


def test_op_counts_are_most_frequent_first() -> None:
    graph = chain()
    graph.nodes.append(make_node("Relu", ["y"], "z"))
    assert next(iter(graph.op_counts().items())) == ("Relu", 2)
    assert graph.op_counts() == {"Relu": 2, "Mul": 1, "Add": 1, "Abs": 1}


def test_producer_and_consumers_are_found() -> None:
    graph = chain()
    assert graph.producer("scaled") is graph.nodes[0]
    assert graph.producer("x") is None
    assert graph.producer("shift") is None
    assert [node.op_type for node in graph.consumers("scaled")] == ["Add", "Abs"]
    assert graph.only_consumer("scaled") is None
    assert graph.only_consumer("shifted") is graph.nodes[3]
    assert graph.only_consumer("y") is None


def test_an_output_that_is_read_as_well_has_no_only_consumer() -> None:
    graph = chain()
    graph.outputs.append(value_info("shifted", np.float32, ["N", 4]))
    assert graph.only_consumer("shifted") is None


@pytest.mark.parametrize(
    ("old", "reads", "writes"),
    [("scaled", [("Add", 0), ("Abs", 0)], [("Mul", 0)]), ("shift", [("Add", 1)], []), ("x", [("Mul", 0)], [])],
)
def test_renaming_reaches_every_reader_writer_value_and_weight(old: str, reads: list, writes: list) -> None:
    graph = chain()
    weight = graph.weights.get(old)
    graph.rename_tensor(old, "new")
    by_op = {node.op_type: node for node in graph.nodes}
    assert all(by_op[op].input[at] == "new" for op, at in reads)
    assert all(by_op[op].output[at] == "new" for op, at in writes)
    graph.check()
    assert old not in graph.weights
    if weight is not None:
        assert graph.weights["new"] is weight
        assert graph.layer_of == {"new": "fc1"}


def test_renaming_an_output_renames_the_declared_value() -> None:
    graph = chain()
    graph.rename_tensor("y", "probabilities")
    assert graph.outputs[0].name == "probabilities"
    graph.check()


def test_removing_an_inner_node_connects_its_readers_to_its_input(run_graph: object) -> None:
    graph = chain()
    graph.remove(graph.nodes[1])
    graph.check()
    x = np.float32([[-1, 0, 1, 2]])
    np.testing.assert_array_equal(run_graph(graph, x=x)[0], [[0, 0, 2, 4]])


def test_removing_the_last_node_keeps_the_output_name(run_graph: object) -> None:
    graph = chain()
    graph.remove(graph.nodes[3])
    graph.check()
    assert [value.name for value in graph.outputs] == ["y"]
    x = np.float32([[-1, 0, 1, 2]])
    np.testing.assert_array_equal(run_graph(graph, x=x)[0], [[-2, 1, 4, 7]])


def test_drop_unused_removes_dead_branches_and_weights_only() -> None:
    graph = chain()
    graph.drop_unused()
    assert graph.op_counts() == {"Mul": 1, "Add": 1, "Relu": 1}
    assert set(graph.weights) == {"scale", "shift"}
    before = state(graph)
    graph.drop_unused()
    assert state(graph) == before


def test_new_names_are_not_taken_by_weights_or_tensors() -> None:
    graph = chain()
    first = graph.new_name("scale")
    graph.weights[first] = np.zeros(1, np.float32)
    second = graph.new_name("scale")
    graph.nodes.append(make_node("Relu", ["x"], second))
    assert len({"scale", first, second, graph.new_name("scale")}) == 4


def rename_everything(graph: Graph) -> None:
    for name in ("x", "y", "scaled", "shift", "scale"):
        graph.rename_tensor(name, f"new_{name}")


def rewire(graph: Graph) -> None:
    graph.remove(graph.nodes[1])
    graph.nodes[0].name = "renamed"
    graph.nodes.append(make_node("Relu", ["y"], "z"))


def reweigh(graph: Graph) -> None:
    graph.weights["scale"] = np.array(3.0, np.float32)
    graph.weights["more"] = np.array(3.0, np.float32)
    graph.layer_of["scale"] = "fc2"
    graph.drop_unused()


def redeclare(graph: Graph) -> None:
    graph.inputs.append(value_info("more", np.float32, [1]))
    graph.outputs.pop()
    graph.opset = 7


@pytest.mark.parametrize("change", [rename_everything, rewire, reweigh, redeclare], ids=lambda c: c.__name__)
def test_changing_a_copy_leaves_the_original_as_it_was(change: object) -> None:
    graph = chain()
    before = state(graph)
    twin = graph.copy()
    assert state(twin) == before
    change(twin)  # type: ignore[operator]
    assert state(twin) != before
    assert state(graph) == before


def test_a_copy_shares_the_weights() -> None:
    graph = chain()
    assert graph.copy().weights["shift"] is graph.weights["shift"]


def test_attributes_are_read_and_have_a_default() -> None:
    node = make_node("Transpose", ["x"], "y", "t", perm=[0, 2, 1])
    assert (node.name, attribute(node, "perm"), attribute(node, "other", 3)) == ("t", [0, 2, 1], 3)
    assert make_node("Relu", ["x"], "y").name == "y"


def test_what_is_derived_from_a_weight_belongs_to_its_layer() -> None:
    graph = Graph([], {"k": np.ones(2), "k_t_0": np.ones(1), "loose": np.ones(1)}, [], [], layer_of={"k": "conv1"})
    first, second = (graph.derive("k", "k_t", np.full(3, value)) for value in (1, 2))
    alone = graph.derive("loose", "k_t", np.zeros(1))
    assert len({"k_t_0", first, second, alone}) == 4
    assert graph.weights[second].tolist() == [2, 2, 2]
    assert graph.layer_of == {"k": "conv1", first: "conv1", second: "conv1"}
