"""Mixed precision and its gate on a network that is hard for INT8, and what FP16 cannot hold."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vggedge_export import engine as engines
from vggedge_export import precision
from vggedge_export.calibration import METHODS, Activations, Calibration
from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import Graph, read_graph
from vggedge_export.pipeline import ExportConfig, ExportResult, export
from vggedge_export.precision import GraphMaker, PrecisionConfig
from vggedge_export.quantization import INT8, input_scales, quantized_graph, quantized_layers
from vggedge_export.verification import Images, LabelledImages, compare_scores, divergence, graph_scores
from vggedge_runtime.bundle import Bundle
from vggedge_runtime.dependencies import is_installed
from vggedge_runtime.errors import ConversionError, GateError, MissingDependency, ModelError, UsageError
from vggedge_runtime.paired import Verdict
from vggedge_runtime.preprocess import ImageSpec, Pixels
from vggedge_runtime.progress import ignore_progress
from vggedge_runtime.session import Session
from vggedge_runtime.tensorrt_api import load_tensorrt

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")
layers = keras.layers

SIDE = 24
IMAGE = ImageSpec(height=SIDE, width=SIDE)
LABELS = tuple("abcde")
FULL_INT8 = ("conv1", "conv2", "conv3", "fc1")
MACS = {
    "conv1": 24 * 24 * 3 * 3 * 3 * 8,
    "conv2": 12 * 12 * 3 * 3 * 8 * 12,
    "conv3": 6 * 6 * 3 * 3 * 12 * 16,
    "fc1": 16 * 32,
    "top": 32 * 5,
}
BUDGET = 4.0
Run = Callable[..., list[np.ndarray]]


def draw(seed: int, count: int) -> Pixels:
    """Coloured waves: pictures on which small networks answer all classes."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:SIDE, :SIDE] / SIDE
    turns, phases = rng.uniform(1, 5, (count, 2, 1, 1)), rng.uniform(0, 6, (count, 1, 1, 3))
    wave = np.sin(2 * np.pi * (turns[:, 0] * across + turns[:, 1] * down)[..., None] + phases)
    base = rng.uniform(60, 190, (count, 1, 1, 3))
    return np.clip(base + 50 * wave + rng.normal(0, 8, (count, SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def network(factor: float) -> Any:
    """Three convolutions and two dense layers, two channels of the first ``factor`` times too large.

    The second layer divides them again, so that every factor gives the same answers; one INT8 scale for all eight
    channels does not hold them, and equalisation does not reach over the average in between.
    """
    rng = np.random.default_rng(4)
    inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Rescaling(1 / 128, offset=-1)(inputs)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="conv1")(x)
    x = layers.AveragePooling2D(2, name="pool1")(x)
    x = layers.Conv2D(12, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2, name="pool2")(x)
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv3")(x)
    x = layers.GlobalAveragePooling2D(name="pool3")(x)
    x = layers.Dense(32, activation="relu", name="fc1")(x)
    model = keras.Model(inputs, layers.Dense(5, "softmax", name="top")(x), name="hard")
    for layer in model.layers:
        if layer.weights:
            shape = layer.kernel.shape
            kernel = rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
            layer.set_weights([kernel, rng.normal(0, 0.1, shape[-1])])
    features = np.asarray(keras.Model(inputs, model.get_layer("fc1").output)(draw(99, 500).astype(np.float32)))
    kernel = rng.normal(0, 1, (32, 5))
    kernel *= 4 / ((features - features.mean(0)) @ kernel).std()
    model.get_layer("top").set_weights([kernel, -features.mean(0) @ kernel])  # all classes are answered
    first, second = model.get_layer("conv1"), model.get_layer("conv2")
    kernel, bias = first.get_weights()
    kernel[..., :2] *= factor
    bias[:2] *= factor
    first.set_weights([kernel, bias])
    kernel, bias = second.get_weights()
    kernel[:, :, :2] /= factor
    second.set_weights([kernel, bias])
    return model


@pytest.fixture(scope="module")
def hard() -> Any:
    return network(100.0)


def labelled(model: Any, name: str, images: Pixels) -> LabelledImages:
    """Images whose classes are what the model answers: it is right on all."""
    answers = np.asarray(model(images.astype(np.float32), training=False))
    return LabelledImages(name, images, answers.argmax(1).astype(np.int64))


@pytest.fixture(scope="module")
def images(hard: Any) -> Images:
    return Images(
        calibration=labelled(hard, "calibration", draw(0, 100)),
        evaluation=labelled(hard, "evaluation", draw(1, 400)),
        selection=labelled(hard, "selection", draw(2, 400)),
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calibrations")


Exported = tuple[Path, ExportResult]


def run_export(model: Any, path: Path, images: Images, **options: Any) -> Exported:
    given = {"image": IMAGE, "labels": LABELS, "images": images, **options}
    config = ExportConfig(engine="none", **given.pop("config", {}))
    return path, export(model, path, config=config, **given)


@pytest.fixture(scope="module")
def plain(hard: Any, images: Images, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exported without a limit."""
    return run_export(hard, tmp_path_factory.mktemp("plain") / "b", images, cache=cache)


@pytest.fixture(scope="module")
def limited(hard: Any, images: Images, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Exported with a limit."""
    path = tmp_path_factory.mktemp("limited") / "b"
    return run_export(hard, path, images, cache=cache, config={"max_drop": BUDGET})


@pytest.fixture(scope="module")
def fp32(plain: Exported) -> Graph:
    return read_graph(plain[0] / "graphs/model.fp32.onnx")


@pytest.fixture
def make(fp32: Graph, images: Images, cache: Path, tmp_path: Path) -> Callable[..., GraphMaker]:
    """``make(options...)`` makes all graphs from the FP32 one, without Keras; gives the maker."""

    def run(graph: Graph = fp32, given: Images = images, ranges: dict | None = None, **options: Any) -> GraphMaker:
        folder = tmp_path / f"made{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        graph.write(folder / "reference.onnx")
        reference = graph_scores(folder / "reference.onnx", given.evaluation.images, "", ignore_progress)
        maker = GraphMaker(folder, graph, LABELS, given, PrecisionConfig(**options), ranges, cache)
        maker.make_all(reference)
        return maker

    return run


# --- a network that is hard for INT8


def test_without_a_limit_int8_loses_very_much(plain: Exported) -> None:
    graphs = plain[1].manifest.graphs
    assert list(graphs) == ["fp32", "fp16", "int8", "int8-rtx"]
    change = {name: graph.evidence.change for name, graph in graphs.items()}
    assert abs(change["fp16"].points) < 1
    assert change["int8"].points < -30
    assert change["int8-rtx"].points < -30
    assert all(graph.plan is None for graph in graphs.values())
    assert plain[1].manifest.gate is None


def test_with_a_limit_mixed_graphs_take_the_place_of_both_and_keep_it(limited: Exported) -> None:
    manifest = limited[1].manifest
    assert list(manifest.graphs) == ["fp32", "fp16", "mixed", "mixed-rtx"]
    assert manifest.gate is not None
    assert (manifest.gate.max_drop, manifest.gate.accept_undecided) == (BUDGET, False)
    assert list(manifest.gate.verdicts) == ["fp16", "mixed", "mixed-rtx"]
    for name, verdict in manifest.gate.verdicts.items():
        assert verdict.decision == "pass"
        assert verdict.drop == -manifest.graphs[name].evidence.change.points
        assert verdict.drop <= verdict.drop_high <= BUDGET
    assert manifest.data["selection"].images == 400


def test_the_plan_leaves_the_layers_in_float_that_the_large_channels_spoil(limited: Exported) -> None:
    """Weight scales for each channel hold the first layer; one for all of them does not."""
    plans = {name: limited[1].manifest.graphs[name].plan for name in ("mixed", "mixed-rtx")}
    assert "conv2" in plans["mixed"].chosen.float_layers
    assert not {"conv1", "conv3"} & set(plans["mixed"].chosen.float_layers)
    assert {"conv1", "conv2"} <= set(plans["mixed-rtx"].chosen.float_layers)
    assert "conv3" not in plans["mixed-rtx"].chosen.float_layers
    for plan in plans.values():
        assert plan.total_macs == sum(MACS.values())
        share = sum(MACS[layer] for layer in FULL_INT8 if layer not in plan.chosen.float_layers) / plan.total_macs
        assert plan.chosen.int8_share == pytest.approx(share)
        assert plan.chosen.int8_share > 0.19
        assert plan.chosen.fits
        assert {each.layer for each in plan.sensitivities} == set(FULL_INT8)
        assert plan.sensitivities[0].layer == "conv2"
        assert plan.tried[0].float_layers == ()
        assert plan.tried[0].change.points < -30
        assert "400 selection images" in plan.rule


@pytest.mark.parametrize("name", ["mixed", "mixed-rtx"])
def test_a_mixed_file_has_q_and_dq_on_the_layers_of_its_plan_only(name: str, limited: Exported) -> None:
    path, result = limited
    record = result.manifest.graphs[name]
    in_int8 = set(FULL_INT8) - set(record.plan.chosen.float_layers)
    graph = read_graph(path / record.file)
    assert graph.op_counts()["QuantizeLinear"] == len(in_int8)
    assert graph.op_counts()["DequantizeLinear"] == 2 * len(in_int8)
    kernels = {node.name: node for node in graph.nodes if node.op_type in ("Conv", "Gemm")}
    assert list(kernels) == list(MACS)
    for layer, node in kernels.items():
        makers = [graph.producer(node.input[place]) for place in (0, 1)]
        dequantized = [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]
        assert dequantized == [layer in in_int8] * 2
        if layer not in in_int8:
            assert graph.weights[node.input[1]].dtype == np.float16
    assert {each.name: each.precision for each in record.layers} == {
        layer: "int8" if layer in in_int8 else "fp16" for layer in MACS
    }
    assert {each.name for each in record.layers if each.int8_magnitude is not None} == in_int8
    per_channel = graph.weights["conv3/kernel_scale"].shape
    assert per_channel == ((16,) if name == "mixed" else ())


@pytest.mark.parametrize(
    ("which", "name"),
    [
        *(("plain", name) for name in ("fp32", "fp16", "int8", "int8-rtx")),
        *(("limited", name) for name in ("fp16", "mixed", "mixed-rtx")),
    ],
)
def test_evidence_can_be_had_again_from_the_files(
    which: str, name: str, request: pytest.FixtureRequest, images: Images, hard: Any, run_graph: Run
) -> None:
    path, result = request.getfixturevalue(which)
    record = result.manifest.graphs[name]
    assert record.evidence.obtained == ("measured" if name in ("fp32", "int8") else "emulated")
    pixels, targets = images.evaluation.images, images.evaluation.targets
    graph = read_graph(path / record.file)
    (found,) = run_graph(graph if record.evidence.obtained == "measured" else rounding_twin(graph), images=pixels)
    if name == "fp32":
        reference = np.asarray(hard(pixels.astype(np.float32), training=False))
    else:
        (reference,) = run_graph(read_graph(path / "graphs/model.fp32.onnx"), images=pixels)
    again = compare_scores(
        reference, found, targets, labels=LABELS, against=record.evidence.against, obtained=record.evidence.obtained
    )
    assert again.change == record.evidence.change
    assert again.classes == record.evidence.classes
    assert (again.accuracy, again.agreement) == (record.evidence.accuracy, record.evidence.agreement)
    assert again.max_abs_difference == pytest.approx(record.evidence.max_abs_difference, abs=1e-4)


def test_a_session_opens_on_a_mixed_graph_where_int8_is_asked_for(limited: Exported, images: Images) -> None:
    with Session.open(limited[0], backend="ort", precision="int8") as session:
        assert session.graph == "mixed"
        found = session.predict(images.evaluation.images)
    assert (found.argmax(1) == images.evaluation.targets).mean() > 0.97


def test_every_layer_says_what_it_costs_and_what_it_loses(plain: Exported, limited: Exported) -> None:
    for _, result in (plain, limited):
        for record in result.manifest.graphs.values():
            assert {each.name: each.macs for each in record.layers} == MACS
    graphs = plain[1].manifest.graphs
    noise = {name: {each.name: each.snr_db for each in graphs[name].layers} for name in graphs}
    assert set(noise["fp32"].values()) == {None}
    for layer in MACS:
        assert 50 < noise["fp16"][layer] < 90
        assert noise["int8"][layer] < noise["fp16"][layer] - 15
    assert noise["int8"]["conv1"] > 40 > 10 > noise["int8"]["conv2"]  # there the small channels are gone
    mixed = {each.name: each.snr_db for each in limited[1].manifest.graphs["mixed"].layers}
    assert mixed["conv2"] > noise["int8"]["conv2"] + 30
    largest = {each.name: each.largest_output for each in graphs["int8"].layers}
    assert largest == {each.name: each.largest_output for each in graphs["fp16"].layers}
    assert largest["conv1"] > 100  # of the channels 100 times too large
    assert {each.largest_output for each in graphs["fp32"].layers} == {None}


def test_the_manifest_covers_a_plot_of_every_plan(plain: Exported, limited: Exported) -> None:
    path, result = limited
    plots = {name for name in result.manifest.files if name.startswith("plans/")}
    assert plots == {"plans/mixed.png", "plans/mixed-rtx.png"}
    for name in plots:
        with Image.open(Bundle.open(path).verified_path(name)) as picture:
            assert picture.size == (840, 540)
    assert not (plain[0] / "plans").exists()


def test_the_fp32_graph_is_measured_once_for_all_that_come_from_it(
    make: Callable[..., GraphMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Graph] = []
    measure = Calibration.measure

    def spy(self: Calibration, graph: Graph, *arguments: Any, **options: Any) -> Any:
        asked.append(graph)
        return measure(self, graph, *arguments, **options)

    monkeypatch.setattr(Calibration, "measure", spy)
    maker = make(calibrator="max")
    assert len(asked) == 2  # and the equalised one
    assert asked[0] is maker.graph


def test_noise_is_measured_on_images_spread_over_all_that_prove(
    make: Callable[..., GraphMaker], images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones of a folder are all of its first class."""
    asked: list[Pixels] = []
    layer_outputs = precision.layer_outputs

    def spy(graph: Graph, some: Pixels, scratch: Path) -> Any:
        asked.append(some)
        return layer_outputs(graph, some, scratch)

    monkeypatch.setattr(precision, "layer_outputs", spy)
    make(precisions=("fp16",))
    assert len(asked) == 2  # the FP32 graph and the twin
    for some in asked:
        np.testing.assert_array_equal(some, images.evaluation.images[np.arange(256) * 400 // 256])


@pytest.mark.skipif(not is_installed("tensorrt_rtx"), reason="TensorRT-RTX is not installed")
def test_rtx_builds_the_mixed_graph_made_for_it_and_runs_the_plans_layers_in_int8(
    limited: Exported, tmp_path: Path
) -> None:
    shutil.copytree(limited[0], tmp_path / "b")
    manifest = limited[1].manifest
    api = load_tensorrt("tensorrt_rtx")
    assert engines.graphs_for(api.product, list(manifest.graphs)) == ["fp32", "fp16", "mixed-rtx"]
    built = engines.build_into(tmp_path / "b", api, "mixed-rtx", engines.EngineConfig())
    assert built.audit is not None
    in_int8 = [each.name for each in manifest.graphs["mixed-rtx"].layers if each.precision == "int8"]
    assert list(built.audit.int8) == [name for name in in_int8 if name.startswith("conv")]


# --- the gate


TAKEN = "output"
"""The calibrator that the graphs of ``plain`` came out with."""


def no_worse(plain: Exported, images: Images, run_graph: Run) -> LabelledImages:
    """Selection images that show nothing: INT8, calibrated by TAKEN, answers all of them as FP32 does."""
    taken = plain[1].manifest.graphs["int8"].calibration
    assert taken is not None
    assert (taken.method, taken.equalized) == (TAKEN, False)
    pixels, targets = images.selection.images, images.selection.targets
    right = np.ones(len(targets), dtype=bool)
    for name in ("int8", "int8-rtx"):
        graph = read_graph(plain[0] / f"graphs/model.{name}.onnx")
        right &= run_graph(graph, images=pixels)[0].argmax(1) == targets
    assert right.sum() > 90
    return LabelledImages("easy", pixels[right], targets[right])


@pytest.fixture
def old(plain: Exported, tmp_path: Path) -> Path:
    """A bundle that is in the place of a new one."""
    path = tmp_path / "bundle"
    shutil.copytree(plain[0], path)
    return path


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_plan_that_looks_good_on_the_selection_images_and_is_not_fails_the_gate(
    plain: Exported, hard: Any, images: Images, cache: Path, old: Path, run_graph: Run
) -> None:
    easy = replace(images, selection=no_worse(plain, images, run_graph))
    before = content(old.parent)
    with pytest.raises(GateError) as raised:
        run_export(hard, old, easy, cache=cache, config={"max_drop": BUDGET, "calibrator": TAKEN})
    said = str(raised.value)
    assert raised.value.exit_code == 3
    assert said.startswith("int8: loses 4")
    assert "with 95 % confidence; allowed are 4.00. Nothing was written. Allow more (--max-drop)" in said
    assert "vggedge finetune" in said
    assert content(old.parent) == before


def test_nothing_is_advised_for_fp16_that_would_help_int8_only(
    make: Callable[..., GraphMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Verdict(decision="fail", max_drop=1, drop=5, drop_low=3, drop_high=7, images_needed=None)
    monkeypatch.setattr(precision, "judge_drop", lambda change, max_drop: failed)
    with pytest.raises(GateError, match=r"^fp16: loses 5\.00 points, at least 3\.00") as raised:
        make(precisions=("fp16",), max_drop=1.0)
    assert "finetune" not in str(raised.value)
    assert "--precision" in str(raised.value)


def test_too_few_images_to_tell_leave_the_old_bundle_in_place(
    plain: Exported, hard: Any, images: Images, cache: Path, old: Path, run_graph: Run
) -> None:
    """They would do for a graph that loses nothing: INT8 loses 43.25 points on them."""
    easy = replace(images, selection=no_worse(plain, images, run_graph))
    before = content(old.parent)
    config = {"max_drop": 45.0, "precisions": ("int8",), "calibrator": TAKEN}
    with pytest.raises(GateError) as raised:
        run_export(hard, old, easy, cache=cache, config=config)
    said = str(raised.value)
    assert said.startswith("int8: not enough images to decide: the loss is between 3")
    assert "points, allowed are 45.00; about" in said
    for advice in ("prove on more images (--evaluation, --evaluation-images)", "--max-drop", "--accept-undecided"):
        assert advice in said
    assert content(old.parent) == before


def test_more_images_are_not_advised_where_no_number_of_them_would_decide(
    plain: Exported, make: Callable[..., GraphMaker], images: Images, run_graph: Run
) -> None:
    """The drop is just the limit."""
    easy = replace(images, selection=no_worse(plain, images, run_graph))
    drop = -plain[1].manifest.graphs["int8"].evidence.change.points
    with pytest.raises(GateError, match=r"^int8: not enough .* no practicable number of images would decide") as raised:
        make(given=easy, precisions=("int8",), calibrator=TAKEN, max_drop=drop)
    assert "more images" not in str(raised.value)
    assert "--max-drop" in str(raised.value)
    assert "--accept-undecided" in str(raised.value)


def test_accepting_what_is_undecided_lets_it_through_and_the_manifest_says_so(
    hard: Any, images: Images, cache: Path, tmp_path: Path
) -> None:
    few = replace(images, evaluation=labelled(hard, "few", draw(5, 30)))
    config = {"max_drop": BUDGET, "precisions": ("fp16",), "accept_undecided": True}
    path, _ = run_export(hard, tmp_path / "b", few, cache=cache, config=config)
    gate = Bundle.open(path).manifest.gate
    assert gate is not None
    assert gate.accept_undecided
    verdict = gate.verdicts["fp16"]
    assert (verdict.decision, verdict.drop) == ("undecided", 0.0)
    assert verdict.images_needed is not None
    assert 30 < verdict.images_needed < 100


def test_what_fails_is_not_let_through_as_undecided(
    plain: Exported, make: Callable[..., GraphMaker], images: Images, run_graph: Run
) -> None:
    easy = replace(images, selection=no_worse(plain, images, run_graph))
    with pytest.raises(GateError, match=r"^int8: loses 4"):
        make(given=easy, max_drop=BUDGET, accept_undecided=True, precisions=("int8",), calibrator=TAKEN)


def test_an_int8_graph_that_keeps_the_limit_is_no_mixed_one(make: Callable[..., GraphMaker]) -> None:
    maker = make(max_drop=60.0, precisions=("int8",), calibrator="entropy")
    assert list(maker.records) == ["fp32", "int8", "int8-rtx"]
    for name in ("int8", "int8-rtx"):
        plan = maker.records[name].plan
        assert plan is not None
        assert (plan.chosen.float_layers, len(plan.tried)) == ((), 1)
        assert (maker.folder / f"plans/{name}.png").is_file()
    assert maker.gate is not None
    assert {verdict.decision for verdict in maker.gate.verdicts.values()} == {"pass"}


# --- ranges


def magnitudes(maker: GraphMaker, name: str) -> dict[str, float]:
    return {each.name: each.int8_magnitude for each in maker.records[name].layers if each.int8_magnitude is not None}


@pytest.mark.parametrize("method", METHODS)
def test_a_named_calibrator_sets_the_ranges(
    method: str, make: Callable[..., GraphMaker], fp32: Graph, images: Images, tmp_path: Path
) -> None:
    only_fp32 = replace(images, selection=None)  # nothing is to be chosen
    maker = make(given=only_fp32, precisions=("int8",), calibrator=method)
    for name in ("int8", "int8-rtx"):
        record = maker.records[name].calibration
        assert record is not None
        assert (record.method, record.candidates) == (method, ())
        assert record.equalized == (name == "int8-rtx")
        assert (record.equalization_difference is None) == (name == "int8")
    calibration = Calibration(images.calibration.images, 8, tmp_path / "probe.onnx", ignore_progress)
    inputs = {layer.name: layer.input[0] for layer in quantized_layers(fp32, INT8)}
    found = calibration.measure(fp32, list(inputs.values()), with_histograms=True)
    wanted = {layer: found.magnitude(tensor, method) for layer, tensor in inputs.items()}
    wanted["conv1"] = 127 / 128  # whole pixels fall onto the steps of 1/128
    assert magnitudes(maker, "int8") == pytest.approx(wanted)
    graph = read_graph(maker.folder / "graphs/model.int8.onnx")
    for layer, magnitude in wanted.items():
        assert graph.weights[f"{layer}/input_scale"] == pytest.approx(magnitude / 127)


@pytest.fixture(scope="module")
def uneven(fp32: Graph) -> Graph:
    """``hard`` with its two large channels where equalisation reaches them: behind the second convolution."""
    graph = fp32.copy()
    graph.weights = {name: array.copy() for name, array in fp32.weights.items()}
    for layer, reader, factor in (("conv1", "conv2", 0.01), ("conv2", "conv3", 100.0)):
        graph.weights[f"{layer}/kernel"][:2] *= factor
        graph.weights[f"{layer}/bias"][:2] *= factor
        graph.weights[f"{reader}/kernel"][:, :2] /= factor
    return graph


def calibrate(graph: Graph, images: Images, tmp_path: Path) -> Activations:
    tensors = [layer.input[0] for layer in quantized_layers(graph, INT8)]
    calibration = Calibration(images.calibration.images, 100, tmp_path / "probe.onnx", ignore_progress)
    return calibration.measure(graph, tensors, with_histograms=True)


@pytest.mark.parametrize("is_uneven", [False, True])
def test_auto_takes_the_calibrator_and_the_equalisation_of_least_divergence_on_the_selection_images(
    is_uneven: bool,
    make: Callable[..., GraphMaker],
    request: pytest.FixtureRequest,
    images: Images,
    run_graph: Run,
    tmp_path: Path,
) -> None:
    graph = request.getfixturevalue("uneven" if is_uneven else "fp32")
    maker = make(graph=graph, precisions=("int8",))
    record = maker.records["int8"].calibration
    assert record is not None
    wanted = [(method, is_even) for is_even in (False, True) for method in METHODS]
    assert [(each.method, each.equalized) for each in record.candidates] == wanted
    best = min(record.candidates, key=lambda each: each.divergence)
    assert (record.method, record.equalized) == (best.method, best.equalized)
    assert record.equalized == is_uneven
    assert max(each.divergence for each in record.candidates) > 1.2 * best.divergence

    (reference,) = run_graph(graph, images=images.selection.images)
    bases = {False: graph, True: equalized_graph(graph)}
    found = {is_even: calibrate(base, images, tmp_path) for is_even, base in bases.items()}
    for each in record.candidates:
        base, activations = bases[each.equalized], found[each.equalized]
        ranges = {x.name: activations.magnitude(x.input[0], each.method) for x in quantized_layers(base, INT8)}
        int8 = quantized_graph(base, INT8, input_scales(base, INT8, ranges))
        (answers,) = run_graph(int8, images=images.selection.images)
        assert each.divergence == pytest.approx(divergence(reference, answers), rel=1e-3)
        assert each.agreement.count == (answers.argmax(1) == reference.argmax(1)).sum()
        if each == best:
            ranges["conv1"] = 127 / 128
            assert magnitudes(maker, "int8") == pytest.approx(ranges)
            made = read_graph(maker.folder / maker.records["int8"].file)
            np.testing.assert_array_equal(made.weights["conv3/kernel_int8"], int8.weights["conv3/kernel_int8"])


def test_equalisation_is_proved_where_it_is_done(make: Callable[..., GraphMaker], uneven: Graph) -> None:
    maker = make(graph=uneven, precisions=("int8",))
    for name in ("int8", "int8-rtx"):
        record = maker.records[name].calibration
        assert record is not None
        assert record.equalized
        assert record.equalization_difference is not None
        assert 0 < record.equalization_difference < 1e-4
    rtx = maker.records["int8-rtx"].calibration
    assert rtx is not None
    assert [(each.method, each.equalized) for each in rtx.candidates] == [(method, True) for method in METHODS]
    assert not (maker.folder / "equalized.onnx").exists()


@pytest.mark.parametrize("calibrator", ["auto", "max"])
def test_an_equalisation_that_changes_the_answers_is_a_defect(
    calibrator: str, make: Callable[..., GraphMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(graph: Graph) -> Graph:
        even = equalized_graph(graph)
        even.weights["conv3/kernel"] = even.weights["conv3/kernel"] * np.float32(1.5)
        return even

    monkeypatch.setattr(precision, "equalized_graph", broken)
    said = r"^the equalised graph differs from the FP32 graph by .* on 400 images; .*\. Nothing was written\."
    with pytest.raises(ConversionError, match=said):
        make(precisions=("int8",), calibrator=calibrator)


def test_where_equalisation_changes_nothing_the_plain_graph_is_taken(
    make: Callable[..., GraphMaker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "equalized_graph", Graph.copy)
    record = make(precisions=("int8",)).records["int8"].calibration
    assert record is not None
    plain, even = record.candidates[: len(METHODS)], record.candidates[len(METHODS) :]
    assert [each.divergence for each in plain] == [each.divergence for each in even]
    assert (record.equalized, record.equalization_difference) == (False, None)


@pytest.mark.parametrize("calibrator", ["max", "auto"])
def test_trained_ranges_are_taken_as_they_are_for_int8_only(calibrator: str, make: Callable[..., GraphMaker]) -> None:
    ranges = {"conv1": 9.0, "conv2": 250.0, "conv3": 5.5, "fc1": 2.25, "top": 1.0}
    maker = make(ranges=ranges, precisions=("int8",), calibrator=calibrator)
    trained = maker.records["int8"].calibration
    assert trained is not None
    assert (trained.method, trained.candidates) == ("trained", ())
    assert (trained.equalized, trained.equalization_difference) == (False, None)
    assert magnitudes(maker, "int8") == pytest.approx({"conv1": 127 / 128, "conv2": 250.0, "conv3": 5.5, "fc1": 2.25})
    assert maker.records["int8-rtx"].calibration.method in METHODS  # its weights are others, and so its activations
    assert magnitudes(maker, "int8-rtx")["conv3"] != pytest.approx(5.5)


def test_trained_ranges_that_lack_a_layer_are_refused(make: Callable[..., GraphMaker]) -> None:
    with pytest.raises(ModelError, match=r"ranges have none for conv3, fc1\. .* belong to another model"):
        make(ranges={"conv1": 1.0, "conv2": 2.0}, precisions=("int8",), calibrator="max")


@pytest.mark.parametrize(
    ("options", "in_int8"),
    [
        ({}, ["conv1", "conv2", "conv3", "fc1"]),
        ({"quantize_first": False}, ["conv2", "conv3", "fc1"]),
        ({"quantize_last": True}, ["conv1", "conv2", "conv3", "fc1", "top"]),
        ({"quantize_first": False, "quantize_last": True}, ["conv2", "conv3", "fc1", "top"]),
    ],
)
def test_the_first_and_the_last_layer_are_quantised_on_request(
    options: dict[str, bool], in_int8: list[str], make: Callable[..., GraphMaker]
) -> None:
    maker = make(precisions=("int8",), calibrator="max", **options)
    for name in ("int8", "int8-rtx"):
        record = maker.records[name]
        assert record.op_counts["QuantizeLinear"] == len(in_int8)
        assert [each.name for each in record.layers if each.precision == "int8"] == in_int8


# --- what FP16 cannot hold


@pytest.fixture(scope="module")
def wide(hard: Any, images: Images, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The same network with channels 30,000 times too large: activations beyond 65504, weights within."""
    path = tmp_path_factory.mktemp("wide") / "b"
    return run_export(network(30_000.0), path, images, config={"calibrator": "max"})


def test_a_layer_that_leaves_fp16s_range_stays_in_fp32_and_is_named(
    wide: Exported, images: Images, run_graph: Run
) -> None:
    path, result = wide
    graph = read_graph(path / "graphs/model.fp32.onnx")
    assert max(float(np.abs(array).max()) for array in graph.weights.values()) < 65504
    kept = result.manifest.graphs["fp16"].kept_fp32
    assert list(kept) == ["conv1", "pool1", "conv2"]
    largest = next(each.largest_output for each in result.manifest.graphs["fp16"].layers if each.name == "conv1")
    assert kept["conv1"] == largest > 65504 / 2
    types = {each.name: each.precision for each in result.manifest.graphs["fp16"].layers}
    assert types == {"conv1": "fp32", "conv2": "fp32", "conv3": "fp16", "fc1": "fp16", "top": "fp16"}
    with np.errstate(all="ignore"):
        (without,) = run_graph(rounding_twin(float16_graph(graph)), images=images.evaluation.images)
    assert not np.isfinite(without).all()


def test_evidence_of_a_graph_with_layers_in_fp32_agrees_with_its_file(
    wide: Exported, images: Images, run_graph: Run
) -> None:
    path, result = wide
    (reference,) = run_graph(read_graph(path / "graphs/model.fp32.onnx"), images=images.evaluation.images)
    for name in ("fp16", "int8-rtx"):
        record = result.manifest.graphs[name]
        (found,) = run_graph(rounding_twin(read_graph(path / record.file)), images=images.evaluation.images)
        assert record.evidence.accuracy.count == (found.argmax(1) == images.evaluation.targets).sum()
        assert record.evidence.max_abs_difference == pytest.approx(np.abs(found - reference).max(), abs=1e-4)
    assert result.manifest.graphs["fp16"].evidence.accuracy.count >= 399
    assert set(result.manifest.graphs["int8-rtx"].kept_fp32) >= {"conv1", "conv2"}
    assert result.manifest.graphs["int8"].kept_fp32 == {}
    for record in result.manifest.graphs.values():
        assert record.fp32_scales == {}  # too large is not too small


def test_a_layer_whose_scale_fp16_cannot_hold_keeps_it_in_fp32_and_is_recorded_apart(
    make: Callable[..., GraphMaker], fp32: Graph
) -> None:
    """Equalisation does not reach over the average between conv3 and fc1."""
    graph = fp32.copy()
    graph.weights = {name: array.copy() for name, array in fp32.weights.items()}
    for name, factor in (("conv3/kernel", 1e-3), ("conv3/bias", 1e-3), ("fc1/kernel", 1e3)):
        graph.weights[name] *= np.float32(factor)
    maker = make(graph=graph, precisions=("fp16", "int8"), calibrator="max")
    records = maker.records
    assert records["fp16"].fp32_scales == records["int8"].fp32_scales == {}
    record = records["int8-rtx"]
    magnitude = next(each.int8_magnitude for each in record.layers if each.name == "fc1")
    assert record.kept_fp32 == {}
    assert record.fp32_scales == pytest.approx({"fc1": magnitude})
    assert 0 < record.fp32_scales["fc1"] < 127 * 2.0**-14
    made = read_graph(maker.folder / record.file)
    types = {layer: made.weights[f"{layer}/input_scale"].dtype for layer in FULL_INT8}
    assert types == dict.fromkeys(FULL_INT8, np.float16) | {"fc1": np.float32}
    assert {each.name: each.precision for each in record.layers if each.name != "top"} == dict.fromkeys(
        FULL_INT8, "int8"
    )


def test_a_layer_that_overflows_only_on_evaluation_images_is_refused_by_name(
    wide: Exported, make: Callable[..., GraphMaker], hard: Any, images: Images
) -> None:
    """Calibrated on grey, on which the first convolution gives its bias only."""
    grey = LabelledImages("grey", np.full((4, SIDE, SIDE, 3), 128, np.uint8), np.zeros(4, np.int64))
    with pytest.raises(ConversionError, match=r"^conv1: gives NaN or infinity on an evaluation image"):
        make(read_graph(wide[0] / "graphs/model.fp32.onnx"), replace(images, calibration=grey), precisions=("fp16",))


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrator": "median"}, "calibrator is 'median'; known: auto, max, percentile, entropy, mse, output"),
        ({"max_drop": -0.1}, r"\(--max-drop\) is -0.1; needed are above 0 to 100 points"),
        ({"max_drop": 0.0}, r"\(--max-drop\) is 0; .* No number of images shows a loss of nothing"),
        ({"max_drop": 101.0}, r"\(--max-drop\) is 101"),
        ({"max_drop": float("nan")}, r"\(--max-drop\) is nan"),
        ({"accept_undecided": True}, "--accept-undecided without --max-drop"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrecisionConfig(**options)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"calibrator": "max"}, False),
        ({"calibrator": "max", "max_drop": 1.0}, True),
        ({"precisions": ("fp32", "fp16"), "max_drop": 1.0}, False),
        ({"precisions": ("fp16",)}, False),
    ],
)
def test_selection_images_are_needed_where_something_is_chosen(
    options: dict[str, Any], needed: bool, images: Images, tmp_path: Path
) -> None:
    assert PrecisionConfig(**options).needs_selection == needed

    def untouchable() -> Any:
        raise AssertionError("the model was asked for before the request was checked")

    expected: Any = UsageError if needed else AssertionError
    with pytest.raises(expected, match="there are no selection images" if needed else "asked for before"):
        run_export(untouchable, tmp_path / "b", replace(images, selection=None), config=options)
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_missed_before_the_search_that_it_is_to_draw(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouchable() -> Any:
        raise AssertionError("the model was asked for before the request was checked")

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"matplotlib .*vggedge\[export\]"):
        run_export(untouchable, tmp_path / "b", images, config={"max_drop": 1.0})
    with pytest.raises(AssertionError):
        run_export(untouchable, tmp_path / "b", images)
