"""What is chosen by how INT8 answers: on which images, against what, and that it is what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_export import choosing
from vggedge_export.calibration import METHODS, Activations, Calibration
from vggedge_export.choosing import CALIBRATOR_IMAGES, Chooser
from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.quantization import INT8, quantized_layers
from vggedge_export.verification import LabelledImages, Scores, divergence, graph_scores, spread_rows
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import ignore_progress

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLASSES = 6
MACS = {"one": 4 * 4 * 3 * 8, "two": 4 * 4 * 8 * 8, "three": 4 * 4 * 8 * 8, "top": 4 * 4 * 8 * CLASSES}


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Three 1x1 convolutions and a dense layer on 4x4 images; ``two`` sums numbers that nearly cancel."""
    rng = np.random.default_rng(1)
    nodes = [
        make_node("Cast", ["images"], "pixels", to=onnx.TensorProto.FLOAT),
        make_node("Mul", ["pixels", "step"], "scaled"),
        make_node("Transpose", ["scaled"], "planes", perm=[0, 3, 1, 2]),
        make_node("Conv", ["planes", "one/kernel"], "one/conv", name="one"),
        make_node("Relu", ["one/conv"], "one/relu"),
        make_node("Conv", ["one/relu", "two/kernel"], "two/conv", name="two"),
        make_node("Relu", ["two/conv"], "two/relu"),
        make_node("Conv", ["two/relu", "three/kernel"], "three/conv", name="three"),
        make_node("Relu", ["three/conv"], "three/relu"),
        make_node("Flatten", ["three/relu"], "flat"),
        make_node("Gemm", ["flat", "top/kernel"], "logits", name="top", transB=1),
        make_node("Softmax", ["logits"], "probabilities", axis=-1),
    ]
    weights = {
        "step": np.float32(1 / 100).reshape(1),
        "one/kernel": rng.normal(0, 1, (8, 3, 1, 1)).astype(np.float32),
        "two/kernel": rng.normal(0, 0.5, (8, 8, 1, 1)).astype(np.float32),
        "three/kernel": rng.normal(0, 0.5, (8, 8, 1, 1)).astype(np.float32),
        "top/kernel": rng.normal(0, 0.15, (CLASSES, 128)).astype(np.float32),
    }
    weights["two/kernel"][:, 0] *= 40
    weights["one/kernel"][0] /= 4
    inputs = [value_info("images", np.uint8, ["N", 4, 4, 3])]
    return Graph(nodes, weights, inputs, [value_info("probabilities", np.float32, ["N", CLASSES])])


@pytest.fixture(scope="module")
def selection() -> LabelledImages:
    """600 images class by class, as a folder's come; the first pixel tells the class."""
    images = np.random.default_rng(2).integers(0, 256, (600, 4, 4, 3), dtype=np.uint8)
    targets = np.repeat(np.arange(CLASSES), 100)
    images[:, 0, 0, 0] = 40 * targets
    return LabelledImages("class by class", images, targets)


@pytest.fixture
def found(graph: Graph, tmp_path: Path) -> Activations:
    images = np.random.default_rng(3).integers(0, 256, (50, 4, 4, 3), dtype=np.uint8)
    tensors = [layer.input[0] for layer in quantized_layers(graph, INT8)]
    return Calibration(images, 32, tmp_path / "probe.onnx", ignore_progress).measure(
        graph, tensors, with_histograms=True
    )


@pytest.fixture
def chooser(graph: Graph, selection: LabelledImages, tmp_path: Path) -> Chooser:
    graph.write(tmp_path / "fp32.onnx")

    def ask(images: Pixels) -> Scores:
        return graph_scores(tmp_path / "fp32.onnx", images, "", ignore_progress)

    return Chooser(tmp_path, ask, selection, "auto", ignore_progress)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Graph, Pixels, Scores]]:
    """Every graph that is tried, the images it gets and what it answers."""
    seen: list[tuple[Graph, Pixels, Scores]] = []
    write = Graph.write
    last: list[Graph] = []

    def writing(self: Graph, path: Path) -> None:
        last[:] = [self]
        write(self, path)

    def run(path: Path, images: Pixels, *arguments: Any) -> Scores:
        scores = graph_scores(path, images, *arguments)
        seen.append((last[0], images, scores))
        return scores

    monkeypatch.setattr(Graph, "write", writing)
    monkeypatch.setattr(choosing, "graph_scores", run)
    return seen


# --- rows


@pytest.mark.parametrize(
    ("length", "count", "rows"),
    [(10, 3, [0, 3, 6]), (10, 4, [0, 2, 5, 7]), (5, 5, [0, 1, 2, 3, 4]), (3, 9, [0, 1, 2]), (7, 1, [0])],
)
def test_rows_are_evenly_spread(length: int, count: int, rows: list[int]) -> None:
    assert spread_rows(length, count).tolist() == rows


def test_of_images_in_the_order_of_their_classes_every_class_has_its_share() -> None:
    targets = np.repeat(np.arange(10), 200)
    np.testing.assert_array_equal(np.bincount(targets[spread_rows(2000, 500)]), [50] * 10)


# --- calibrators


def test_calibrators_are_compared_on_images_of_all_classes(
    chooser: Chooser, graph: Graph, found: Activations, answered: list[tuple[Graph, Pixels, Scores]]
) -> None:
    chooser.choose_scales(graph, INT8, found, None)
    assert len(answered) == len(METHODS)
    for _, images, _ in answered:
        assert len(images) == CALIBRATOR_IMAGES
        counts = np.bincount(images[:, 0, 0, 0] // 40, minlength=CLASSES)
        assert counts.min() >= 83
        assert counts.max() <= 84


def test_each_calibrator_is_compared_with_what_fp32_answers_to_the_same_images(
    chooser: Chooser, graph: Graph, found: Activations, answered: list[tuple[Graph, Pixels, Scores]]
) -> None:
    scales, record = chooser.choose_scales(graph, INT8, found, None)
    assert [each.method for each in record.candidates] == list(METHODS)
    for each, (tried, images, scores) in zip(record.candidates, answered, strict=True):
        wanted = chooser.ask_float(images)
        assert each.divergence == pytest.approx(divergence(wanted, scores))
        assert each.divergence > 0
        assert (each.agreement.count, each.agreement.n) == (int((wanted.argmax(1) == scores.argmax(1)).sum()), 500)
        assert tried.weights["two/input_scale"] == pytest.approx(found.magnitude("one/relu", each.method) / 127)
    best = min(record.candidates, key=lambda each: each.divergence)
    assert record.method == best.method
    assert scales == {
        layer.name: found.magnitude(layer.input[0], best.method) / 127 for layer in quantized_layers(graph, INT8)
    }


def test_where_calibrators_are_equal_the_first_is_taken(
    chooser: Chooser, graph: Graph, found: Activations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "graph_scores", lambda path, images, *rest: chooser.ask_float(images))
    _, record = chooser.choose_scales(graph, INT8, found, None)
    assert {each.divergence for each in record.candidates} == {0.0}
    assert record.method == METHODS[0]


def test_fp32_is_asked_once_and_nothing_that_was_tried_stays(
    chooser: Chooser, graph: Graph, found: Activations, tmp_path: Path
) -> None:
    asked: list[int] = []
    ask = chooser.ask_float

    def count(images: Pixels) -> Scores:
        asked.append(len(images))
        return ask(images)

    chooser.ask_float = count
    scales, _ = chooser.choose_scales(graph, INT8, found, None)
    chooser.find_plan(graph, INT8, scales, MACS, 50.0)
    assert asked == [600]
    assert [path.name for path in tmp_path.iterdir()] == ["fp32.onnx"]


@pytest.mark.parametrize("method", METHODS)
def test_a_named_calibrator_needs_no_images_to_choose_on(
    method: str, chooser: Chooser, graph: Graph, found: Activations
) -> None:
    scales, record = replace(chooser, images=None, calibrator=method).choose_scales(graph, INT8, found, None)
    assert (record.method, record.candidates) == (method, ())
    assert scales["two"] == found.magnitude("one/relu", method) / 127


def test_without_images_nothing_can_be_chosen(chooser: Chooser, graph: Graph, found: Activations) -> None:
    blind = replace(chooser, images=None)
    choices: list[Callable[[], object]] = [
        lambda: blind.choose_scales(graph, INT8, found, None),
        lambda: blind.find_plan(graph, INT8, {"one": 1.0}, MACS, 1.0),
    ]
    for choose in choices:
        with pytest.raises(UsageError, match="there are no selection images"):
            choose()


# --- trained ranges


def test_trained_ranges_come_before_every_calibrator(
    chooser: Chooser, graph: Graph, found: Activations, answered: list[tuple[Graph, Pixels, Scores]]
) -> None:
    scales, record = chooser.choose_scales(graph, INT8, found, {"one": 2.0, "two": 3.0, "three": 4.0, "top": 9.0})
    assert scales == {"one": 2 / 127, "two": 3 / 127, "three": 4 / 127}
    assert (record.method, record.candidates) == ("trained", ())
    assert answered == []


def test_trained_ranges_without_a_layer_are_refused(chooser: Chooser, graph: Graph, found: Activations) -> None:
    with pytest.raises(
        ModelError, match=r"have none for two, three\. Leave --int8-last out, .* Else the ranges belong to another"
    ):
        chooser.choose_scales(graph, INT8, found, {"one": 2.0})


# --- plans


def test_a_plan_is_measured_on_all_images_with_the_layers_it_names(
    chooser: Chooser, graph: Graph, found: Activations, answered: list[tuple[Graph, Pixels, Scores]]
) -> None:
    scales, _ = replace(chooser, calibrator="max").choose_scales(graph, INT8, found, None)
    plan = chooser.find_plan(graph, INT8, scales, MACS, 40.0)
    assert {each.layer for each in plan.sensitivities} == {"one", "two", "three"}
    assert plan.total_macs == sum(MACS.values())
    in_int8 = [
        {node.name for node in tried.nodes if node.op_type == "Conv" and node.input[1] not in tried.weights}
        for tried, _, _ in answered
    ]
    assert in_int8 == [{"one"}, {"two"}, {"three"}, {"one", "two", "three"}]
    assert {len(images) for _, images, _ in answered} == {600}
    assert plan.chosen.int8_share == pytest.approx(1 - MACS["top"] / sum(MACS.values()))
    reference = chooser.ask_float(answered[0][1])
    targets = np.repeat(np.arange(CLASSES), 100)
    right = [scores.argmax(1) == targets for scores in (reference, answered[-1][2])]
    assert plan.chosen.change.lost == (right[0] & ~right[1]).sum()
    assert plan.chosen.change.gained == (right[1] & ~right[0]).sum()
