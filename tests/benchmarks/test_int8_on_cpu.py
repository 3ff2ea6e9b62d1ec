"""INT8 on a CPU: readings compute what they should, the rewriting changes no answer, a rule judges the bar."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_export.graph import Graph, make_node, nodes_of, value_info
from vggedge_runtime.backends import openvino_steps
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.bundle import DataRecord
from vggedge_runtime.preprocess import ImageSpec

openvino = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
IMAGES = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
TOLERANCE = 2e-4  # of a probability: sums in another order, with no step of the layers behind rounded otherwise


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a module of the folder, as its scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def pair(data: str, name: str, zero_point: str = "zero") -> list[Any]:
    """Q -> DQ on ``data``; gives ``NAME/values``."""
    parameters = [f"{name}/scale", zero_point]
    return [
        make_node("QuantizeLinear", [data, *parameters], f"{name}/steps"),
        make_node("DequantizeLinear", [f"{name}/steps", *parameters], f"{name}/values"),
    ]


def int8_net(activation: str = "Relu", zero_point: str = "zero") -> Graph:
    """Head, then conv to 64, relu and pool, conv to 4, relu, pool and flatten, and a dense layer, all quantised.

    The scales are such that a good part of the activations lies beyond 127 steps.
    """
    rng = np.random.default_rng(0)
    nodes = [
        make_node("Cast", ["images"], "pixels", to=onnx.TensorProto.FLOAT),
        make_node("Transpose", ["pixels"], "channels", perm=[0, 3, 1, 2]),
        make_node("Mul", ["channels", "factor"], "scaled"),
        make_node("Add", ["scaled", "offset"], "head"),
    ]
    weights: dict[str, Any] = {
        "factor": np.float32(1 / 128),
        "offset": np.float32(-1),
        "zero": np.int8(0),
        "three": np.int8(3),
    }
    last = "head"
    layers = (("a", (64, 3, 3, 3), 1 / 128), ("b", (4, 64, 3, 3), 0.004), ("c", (5, 16), 0.003))
    for name, shape, scale in layers:
        steps = rng.integers(-127, 128, shape, dtype=np.int8)
        weights |= {f"{name}/scale": np.float32(scale), f"{name}/kernel_steps": steps}
        weights |= {f"{name}/kernel_scale": np.float32(0.01 / np.sqrt(steps[0].size))}
        weights |= {f"{name}/bias": rng.normal(0, 0.05, shape[0]).astype(np.float32)}
        nodes += pair(last, name, "zero" if name == "a" else zero_point)
        kernel = [f"{name}/kernel_steps", f"{name}/kernel_scale", "zero"]
        nodes.append(make_node("DequantizeLinear", kernel, f"{name}/kernel"))
        inputs = [f"{name}/values", f"{name}/kernel", f"{name}/bias"]
        if name == "c":
            nodes.append(make_node("Gemm", inputs, "c", transB=1))
            break
        nodes.append(make_node("Conv", inputs, name, pads=[1, 1, 1, 1]))
        nodes.append(make_node(activation, [name], f"{name}/relu"))
        nodes.append(make_node("MaxPool", [f"{name}/relu"], f"{name}/pool", kernel_shape=[2, 2], strides=[2, 2]))
        last = f"{name}/pool"
        if name == "b":
            nodes.append(make_node("Flatten", [last], "flat"))
            last = "flat"
    nodes.append(make_node("Softmax", ["c"], "probabilities"))
    values = [value_info("images", np.uint8, ["N", 8, 8, 3])], [value_info("probabilities", np.float32, ["N", 5])]
    graph = Graph(nodes, {name: np.array(weight) for name, weight in weights.items()}, *values)
    graph.check()
    return graph


def ort_answers(graph: Graph) -> np.ndarray:
    return open_ort_session(graph.to_bytes(), threads=1).run(None, {"images": IMAGES})[0]


def openvino_model(graph: Graph) -> Any:
    return openvino.Core().read_model(graph.to_bytes())


def openvino_answers(model: Any) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled({0: image[None]})[0].copy() for image in IMAGES])


# --- readings


def test_pairs_before_pooling_round_the_same_values(load: Any) -> None:
    graph = load("int8_peers").before_pooling(int8_net())
    graph.check()
    assert [node.input[0] for node in nodes_of(graph, "QuantizeLinear")] == ["head", "a/relu", "b/relu"]
    assert graph.op_counts() == int8_net().op_counts()
    np.testing.assert_array_equal(ort_answers(graph), ort_answers(int8_net()))


def test_unsigned_steps_come_behind_relus_only_and_are_twice_as_fine(load: Any) -> None:
    graph = load("int8_peers").as_unsigned(int8_net())
    pairs = {node.output[0]: node.input[1:] for node in nodes_of(graph, "QuantizeLinear")}
    types = {name: graph.weights[zero_point].dtype for name, (_, zero_point) in pairs.items()}
    assert types == {"a/steps": np.int8, "b/steps": np.uint8, "c/steps": np.uint8}
    scales = {name: graph.weights[scale] for name, (scale, _) in pairs.items()}
    assert scales == pytest.approx({"a/steps": 1 / 128, "b/steps": 0.004 * 127 / 255, "c/steps": 0.003 * 127 / 255})
    # They reach as far as the signed ones, and round other values.
    assert 0 < np.abs(ort_answers(graph) - ort_answers(int8_net())).max() < 0.02


def test_the_image_can_be_the_first_steps(load: Any) -> None:
    graph = load("int8_peers").image_as_steps(int8_net())
    graph.check()
    assert {"Cast", "Mul", "Add"}.isdisjoint(graph.op_counts())
    np.testing.assert_array_equal(ort_answers(graph), ort_answers(int8_net()))


# --- what is rewritten at load


def test_rewriting_keeps_the_answers_and_moves_pairs_where_pooling_is_wide() -> None:
    model = openvino_model(int8_net())
    plain = openvino_answers(openvino_model(int8_net()))
    assert openvino_steps.use_unsigned_steps(model) == 2
    lows, above = [], []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            lows.append(float(node.input_value(1).get_node().get_data().item()))
            clamp = node.input_value(0).get_node()
            above.append(clamp.input_value(0).get_node().get_type_name() if lows[-1] == 0 else clamp.get_type_name())
    assert lows == [-1.0, 0.0, 0.0]
    assert above == ["Add", "Relu", "Reshape"]  # 64 channels before the first pooling, 4 before the second
    np.testing.assert_allclose(openvino_answers(model), plain, atol=TOLERANCE)
    assert openvino_steps.use_unsigned_steps(model) == 0


def test_without_the_clamp_the_answers_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = openvino_model(int8_net())
    monkeypatch.setattr(openvino_steps, "_STEPS", 255)
    openvino_steps.use_unsigned_steps(model)
    assert np.abs(openvino_answers(model) - openvino_answers(openvino_model(int8_net()))).max() > 50 * TOLERANCE


@pytest.mark.parametrize(
    "graph", [lambda: int8_net("Tanh"), lambda: int8_net(zero_point="three")], ids=["no relu", "zero point 3"]
)
def test_what_is_no_signed_pair_behind_a_relu_is_left_alone(graph: Any) -> None:
    assert openvino_steps.use_unsigned_steps(openvino_model(graph())) == 0


def test_a_pair_does_not_move_above_what_others_read() -> None:
    graph = int8_net()
    graph.outputs.append(value_info("a/pool", np.float32, ["N", 64, 4, 4]))
    model = openvino_model(graph)
    assert openvino_steps.use_unsigned_steps(model) == 2
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    session = open_ort_session(graph.to_bytes(), threads=1)
    pooled = session.run(["a/pool"], {"images": IMAGES[:1]})[0]
    assert pooled.max() > 127 * 0.004  # so that a pair above would show
    np.testing.assert_allclose(compiled({0: IMAGES[:1]})[1], pooled, rtol=1e-5, atol=1e-6)


# --- measurement and verdict


def row(load: Any, peer: str, low: float, high: float, in_bar: bool = True) -> Any:
    figures = {"latency_ms": 1.0, "fastest_ms": 0.9, "ratio": (low + high) / 2, "low": low, "high": high}
    figures |= {"agreement": 1.0, "max_abs_difference": 0.01, "int8_convolutions": "13 of 13", "turns_ms": [1.0]}
    return load("int8_on_cpu").Row(network="net", threads=1, peer=peer, in_bar=in_bar, **figures)


def test_the_interval_and_the_peers_of_the_bar_decide(load: Any) -> None:
    judge = load("int8_on_cpu").judge
    level, slow = row(load, "a", 0.95, 1.05), row(load, "b", 1.06, 1.1)
    unsure = row(load, "c", 0.9, 1.2)
    assert judge([level, row(load, "fp32", 1.4, 1.6, in_bar=False)]) == "met"
    assert judge([level, unsure]) == "not resolved: 1.05 [0.90, 1.20] of c"
    assert judge([level, slow, unsure]) == "missed: 1.08 [1.06, 1.10] of b"


def test_the_interval_is_of_the_median(load: Any) -> None:
    median_interval = load("int8_on_cpu").median_interval
    assert median_interval(np.full(9, 0.8)) == (0.8, 0.8, 0.8)
    median, low, high = median_interval(np.array([0.9] * 12 + [1.0] * 13 + [50.0]))
    assert (median, low, high) == (1.0, 0.9, 1.0)  # an outlier does not move it


def test_the_command_measures_judges_and_writes(
    load: Any, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {
        name: DataRecord(name=f"fingers:6@{seed}", images=6, sha256="0" * 64)
        for seed, name in enumerate(("calibration", "evaluation"))
    }
    tiny(
        tmp_path / "bundle",
        ("fp32", "int8"),
        model=int8_net().to_bytes(),
        change=lambda manifest: msgspec.structs.replace(manifest, data=data, image=ImageSpec(height=8, width=8)),
    )
    module, found, page = load("int8_on_cpu"), tmp_path / "found.json", tmp_path / "page.md"
    monkeypatch.setattr(load("int8_peers"), "is_installed", lambda _: False)  # LiteRT's converter takes 10 s
    arguments = ["net.keras", tmp_path / "bundle", "--json", found, "--markdown", page, "--threads", "1"]
    arguments += ["--rounds", "3", "--seconds", "0.01"]
    monkeypatch.setattr("sys.argv", ["int8_on_cpu.py", *map(str, arguments)])
    module.main()
    rows = json.loads(found.read_bytes())["rows"]
    peers = ["ours", "int8 as it is", *load("int8_peers").READINGS, "fp32"]
    assert [each["peer"] for each in rows] == peers
    assert [each["in_bar"] for each in rows] == [False, *[True] * 5, False]
    assert rows[0]["ratio"] == 1
    assert all(each["ratio"] > 0 and len(each["turns_ms"]) == 3 for each in rows)
    assert [each["int8_convolutions"] for each in rows[:2]] == ["2 of 2", "2 of 2"]
    assert all(each["agreement"] == 1 for each in rows)
    assert all(peer in page.read_text() for peer in peers)
    printed = capsys.readouterr()
    assert "LiteRT is left out" in printed.err
    assert "net, 1 thread(s): " in printed.out
