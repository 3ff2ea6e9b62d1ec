"""The whole export: what is written, what is proved, and what is left behind when a step fails."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge_export import calibration, choosing, golden, pipeline, precision
from vggedge_export.graph import Graph, read_graph
from vggedge_export.passes import PASSES
from vggedge_export.pipeline import ExportConfig, ExportResult, export
from vggedge_export.verification import Images, LabelledImages
from vggedge_runtime import tensorrt_api
from vggedge_runtime.bundle import Bundle, hash_file
from vggedge_runtime.dependencies import is_installed
from vggedge_runtime.engine_cache import list_engines, read_engine
from vggedge_runtime.errors import (
    BundleError,
    ConversionError,
    DataError,
    GateError,
    MissingDependency,
    ModelError,
    UsageError,
)
from vggedge_runtime.graphs import GRAPHS
from vggedge_runtime.preprocess import ImageSpec, Normalization
from vggedge_runtime.session import Session
from vggedge_runtime.statistics import build_proportion

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")

IMAGE = ImageSpec(height=32, width=32)
LABELS = ("ant", "bee", "cat", "dog", "Ünïcode 5")
NAME = "vgg9-compact"
MADE = ["fp32", "fp16", "int8", "int8-rtx"]
"""The graphs of an export without a limit; mixed ones stand in for INT8 graphs only where there is one."""
ENGINE = "tensorrt_rtx" if is_installed("tensorrt_rtx") else "none"


@pytest.fixture(scope="module")
def model(convert_vgg: Callable[..., Any]) -> Any:
    return convert_vgg(NAME).model


def draw(model: Any, name: str, count: int, seed: int) -> LabelledImages:
    """Pictures; the target is what the model answers, but for the first five of them."""
    rng = np.random.default_rng(seed)
    images = (rng.random((count, 1, 1, 3)) * 200 + rng.integers(0, 56, (count, 32, 32, 3))).astype(np.uint8)
    targets = np.asarray(model(images.astype(np.float32), training=False)).argmax(1).astype(np.int64)
    targets[:5] = (targets[:5] + 1) % len(LABELS)
    return LabelledImages(name, images, targets)


@pytest.fixture(scope="module")
def scenes(model: Any) -> LabelledImages:
    return draw(model, "scenes:24", 24, seed=11)


@pytest.fixture(scope="module")
def settings(model: Any, scenes: LabelledImages, pictures: np.ndarray) -> dict[str, Any]:
    calibration = LabelledImages("holiday", np.concatenate([scenes.images, pictures]), np.zeros(32, np.int64))
    selection = draw(model, "voted", 20, seed=12)
    return {"image": IMAGE, "labels": LABELS, "images": Images(calibration, scenes, selection)}


@pytest.fixture(scope="module")
def told() -> list[tuple]:
    return []


@pytest.fixture(scope="module")
def whole(
    model: Any, settings: dict[str, Any], told: list[tuple], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ExportResult]:
    """One export with everything that can be made here."""
    path = tmp_path_factory.mktemp("whole") / "hands"
    result = export(
        model,
        path,
        **settings,
        config=ExportConfig(engine=ENGINE, batches=(1, 2, 4)),
        progress=lambda *what: told.append(what),
    )
    return path, result


@pytest.fixture
def quick(convert_vgg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """tf2onnx answers from memory; the model has been converted before."""
    raw = convert_vgg(NAME).raw
    monkeypatch.setattr(pipeline, "graph_from_keras", lambda model, normalization: raw.copy())


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below ``folder``, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


# --- what is written


GRAPH_FILES = {f"graphs/model.{name}.onnx" for name in MADE}
GOLDEN_FILES = {"golden/inputs.npy"} | {f"golden/outputs.{name}.npy" for name in MADE}
COVERED = {"labels.txt"} | GRAPH_FILES | GOLDEN_FILES


def test_a_bundle_holds_exactly_the_files_of_its_design(whole: tuple[Path, ExportResult]) -> None:
    path, result = whole
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    expected = COVERED | {"manifest.json"}
    for record in result.engines:
        expected |= {f"engines/{record.key.fingerprint}/{name}" for name in (record.file, "engine.json")}
    assert files == expected
    assert [file.name for file in path.parent.iterdir()] == ["hands"]


def test_the_manifest_covers_every_file_but_engines_with_its_hash_and_size(whole: tuple[Path, ExportResult]) -> None:
    path, result = whole
    manifest = Bundle.open(path).manifest
    assert manifest == result.manifest
    assert set(manifest.files) == COVERED
    for name, record in manifest.files.items():
        assert (record.sha256, record.size_bytes) == (hash_file(path / name), (path / name).stat().st_size)


def test_the_manifest_says_what_was_exported_from_what(
    whole: tuple[Path, ExportResult], model: Any, convert_vgg: Callable[..., Any]
) -> None:
    path, result = whole
    manifest = result.manifest
    assert (manifest.name, manifest.parameters) == ("vgg9_compact", model.count_params())
    assert (manifest.image, manifest.labels) == (IMAGE, LABELS)
    assert (path / "labels.txt").read_text(encoding="utf-8").splitlines() == list(LABELS)
    assert {use: str(each) for use, each in manifest.data.items()} == {
        "calibration": "holiday, 32 images",
        "selection": "voted, 20 images",
        "evaluation": "scenes:24, 24 images",
    }
    assert {use: each.seen for use, each in manifest.data.items()} == {
        "calibration": 0,
        "selection": 0,
        "evaluation": 24,  # the ranges were set with them, too
    }
    assert manifest.gate is None
    assert datetime.fromisoformat(manifest.created).utcoffset().total_seconds() == 0
    assert {"keras", "tensorflow", "tf2onnx", "onnx", "onnxruntime", "numpy"} <= set(manifest.tools)
    assert [step.name for step in manifest.passes] == [step.name for step in PASSES]
    raw, clean = convert_vgg(NAME).raw, convert_vgg(NAME).clean
    assert manifest.passes[0].nodes_before == len(raw.nodes)
    assert manifest.passes[-1].nodes_after == len(clean.nodes)
    assert result.converted_op_counts == raw.op_counts()
    assert result.bundle == str(path)


def test_the_graphs_have_their_types_and_op_counts(
    whole: tuple[Path, ExportResult], convert_vgg: Callable[..., Any]
) -> None:
    path, result = whole
    graphs = {name: read_graph(path / record.file) for name, record in result.manifest.graphs.items()}
    assert list(graphs) == MADE
    for name, record in result.manifest.graphs.items():
        assert record.op_counts == graphs[name].op_counts()
        assert (record.precision, record.made_for) == (GRAPHS[name].precision, GRAPHS[name].made_for)
        assert graphs[name].inputs[0].type.tensor_type.shape.dim[0].dim_param == "N"
    types = {name: {str(array.dtype) for array in graph.weights.values()} for name, graph in graphs.items()}
    assert types == {
        "fp32": {"float32"},
        "fp16": {"float16"},
        "int8": {"float32", "int8"},
        "int8-rtx": {"float16", "int8"},
    }
    assert graphs["fp32"].to_bytes() == convert_vgg(NAME).clean.to_bytes()
    layers = 8  # nine, without the one that makes the logits
    for name in ("int8", "int8-rtx"):
        assert result.manifest.graphs[name].op_counts["QuantizeLinear"] == layers
        assert result.manifest.graphs[name].op_counts["DequantizeLinear"] == 2 * layers
    shapes = {name: graphs[name].weights["fc1/kernel_scale"].shape for name in ("int8", "int8-rtx")}
    assert shapes == {"int8": (256,), "int8-rtx": ()}


def test_the_evidence_says_against_what_how_and_how_well(whole: tuple[Path, ExportResult]) -> None:
    _, result = whole
    evidence = {name: record.evidence for name, record in result.manifest.graphs.items()}
    assert {name: (e.against, e.obtained, e.images) for name, e in evidence.items()} == {
        "fp32": ("keras", "measured", 24),
        "fp16": ("fp32", "emulated", 24),
        "int8": ("fp32", "measured", 24),
        "int8-rtx": ("fp32", "emulated", 24),
    }
    assert result.manifest.keras_accuracy == build_proportion(19, 24)
    assert evidence["fp32"].accuracy == build_proportion(19, 24)
    assert evidence["fp32"].agreement == build_proportion(24, 24)
    assert evidence["fp32"].max_abs_difference < 1e-5
    assert 1e-6 < evidence["fp16"].max_abs_difference < 1e-2
    assert evidence["fp16"].max_abs_difference < evidence["int8"].max_abs_difference < 0.1
    assert all(e.agreement.share > 0.9 for e in evidence.values())


@pytest.mark.parametrize("name", MADE)
def test_evidence_can_be_had_again_from_the_files(
    name: str, whole: tuple[Path, ExportResult], scenes: LabelledImages, run_graph: Callable[..., list[np.ndarray]]
) -> None:
    path, result = whole
    record = result.manifest.graphs[name]
    if record.evidence.obtained == "emulated":
        graph = precision.rounding_twin(read_graph(path / record.file))
    else:
        graph = read_graph(path / record.file)
    (answers,) = run_graph(graph, images=scenes.images)
    (reference,) = run_graph(read_graph(path / "graphs/model.fp32.onnx"), images=scenes.images)
    right = int((answers.argmax(1) == scenes.targets).sum())
    assert record.evidence.accuracy == build_proportion(right, 24)
    if name != "fp32":
        assert record.evidence.max_abs_difference == pytest.approx(np.abs(answers - reference).max(), abs=1e-4)


def test_every_graphs_layers_cost_what_the_analysis_of_the_model_says(whole: tuple[Path, ExportResult]) -> None:
    from vggedge.analysis import analyse
    from vggedge.architecture import get_spec

    figures = analyse(get_spec(NAME, input=(32, 32, 3), classes=5)).layers
    wanted = {layer.name: layer.macs for layer in figures if layer.kind in ("conv", "dense")}
    assert len(wanted) == 9
    for record in whole[1].manifest.graphs.values():
        assert {layer.name: layer.macs for layer in record.layers} == wanted


def test_evaluation_images_that_had_a_part_in_the_making_are_counted() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 2, 3, 3), dtype=np.uint8)

    def some(*rows: int) -> LabelledImages:
        return LabelledImages("some", pixels[list(rows)], np.zeros(len(rows), np.int64))

    def seen(calibration: LabelledImages, evaluation: LabelledImages, selection: LabelledImages | None) -> int:
        records = pipeline._records(Images(calibration, evaluation, selection))
        assert {record.seen for use, record in records.items() if use != "evaluation"} == {0}
        return records["evaluation"].seen

    assert seen(some(0, 1, 2), some(3, 4), some(5, 6)) == 0
    assert seen(some(0, 1, 2), some(2, 3, 4, 5), some(5, 6)) == 2  # one of each
    assert seen(some(0, 1, 2), some(2, 2, 3), some(2)) == 2  # twice evaluated, and in both others
    assert seen(some(3, 3), some(3, 4), None) == 1
    nearly = some(0)
    nearly.images[0, 1, 2, 2] ^= 1
    assert seen(some(0), nearly, None) == 0


# --- golden answers


@pytest.mark.parametrize("graph", MADE)
def test_golden_answers_are_what_a_session_answers(
    graph: str, whole: tuple[Path, ExportResult], scenes: LabelledImages
) -> None:
    path, result = whole
    golden = result.manifest.golden
    images, wanted = np.load(path / golden.inputs), np.load(path / golden.outputs[graph])
    assert (images.dtype, images.shape) == (np.uint8, (4, 32, 32, 3))
    assert all(any(np.array_equal(image, scene) for scene in scenes.images) for image in images)
    assert (wanted.dtype, wanted.shape) == (np.float32, (4, 5))
    np.testing.assert_allclose(wanted.sum(axis=1), 1, rtol=1e-3)
    with Session.open(path, backend="ort", precision=graph) as session:
        assert session.labels == LABELS
        found = session.predict(images)
        # ONNX Runtime does not round to FP16, as the golden answers are; the others it computes as export did.
        tolerance = GRAPHS[graph].golden_tolerance if "16" in graph or "rtx" in graph else 1e-5
        assert np.abs(found - wanted).max() <= tolerance
        # One image alone gets the answer that it gets among others.
        np.testing.assert_allclose(session.predict(images[1]), found[1:2], atol=1e-5)


# --- engines


@pytest.mark.skipif(ENGINE == "none", reason="TensorRT-RTX is not installed")
def test_engines_are_built_for_the_graphs_of_the_product(whole: tuple[Path, ExportResult]) -> None:
    path, result = whole
    assert [record.key.graph for record in result.engines] == ["fp32", "fp16", "int8-rtx"]
    for record in result.engines:
        assert record.key.batches == (1, 2, 4)
        assert record.key.graph_sha256 == result.manifest.files[f"graphs/model.{record.key.graph}.onnx"].sha256
        assert len(read_engine(path, record.key)) == record.size_bytes > 0
    assert len(list_engines(path)) == 3


def test_without_engines_nothing_of_tensorrt_is_looked_for(
    quick: None, model: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(product: str) -> Any:
        raise AssertionError("no engine was asked for")

    monkeypatch.setattr(pipeline.building, "choose_builder", load)
    result = export(model, tmp_path / "b", **settings, config=ExportConfig(engine="none"))
    files = {str(file.relative_to(tmp_path / "b")) for file in (tmp_path / "b").rglob("*") if file.is_file()}
    assert files == COVERED | {"manifest.json"}
    assert result.engines == ()


@pytest.mark.parametrize(
    ("precisions", "graphs"),
    [
        (("fp32",), ["fp32"]),
        (("fp16",), ["fp32", "fp16"]),
        (("int8",), ["fp32", "int8", "int8-rtx"]),
        (("int8", "fp16", "int8"), ["fp32", "fp16", "int8", "int8-rtx"]),
    ],
)
def test_fp32_and_the_precisions_asked_for_are_made(
    precisions: tuple, graphs: list[str], quick: None, model: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    config = ExportConfig(precisions=precisions, engine="none", calibrator="max")
    assert list(config.graphs) == graphs
    manifest = export(model, tmp_path / "b", **settings, config=config).manifest
    assert list(manifest.graphs) == list(manifest.golden.outputs) == graphs
    assert sorted(file.name for file in (tmp_path / "b/graphs").iterdir()) == sorted(
        f"model.{name}.onnx" for name in graphs
    )


def test_progress_is_told_step_by_step(whole: tuple[Path, ExportResult], told: list[tuple]) -> None:
    steps = list(dict.fromkeys(what for *_, what in told))
    expected = ["asking Keras", "converting", "proving fp32", "calibrating", "counting activations"]
    expected += ["comparing INT8 ranges", "proving fp16", "comparing calibrators", "asking fp32"]
    expected += ["proving equalisation", "proving int8", "proving int8-rtx"]
    expected += [] if ENGINE == "none" else [f"building {ENGINE} engines"]
    assert steps == expected
    ends = {(1, 1), (3, 3), (5, 5), (20, 20), (24, 24), (32, 32), (300, 300)}  # three engines, in hundredths
    for step in steps:
        assert [(done, total) for done, total, what in told if what == step][-1] in ends
    assert all(0 <= done <= total for done, total, _ in told)


# --- the model


def test_a_model_that_only_a_function_holds_is_freed_before_the_graphs_are_proved(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    from vggedge.architecture import get_spec
    from vggedge.model import build_vgg

    references: list[weakref.ref] = []
    alive: dict[str, bool] = {}

    def make() -> Any:
        fresh = build_vgg(get_spec(NAME, input=(32, 32, 3), classes=5), seed=1)
        references.append(weakref.ref(fresh))
        return fresh

    def progress(done: int, total: int, what: str) -> None:
        alive.setdefault(what, references[0]() is not None)

    export(
        make, tmp_path / "b", **settings, config=ExportConfig(precisions=("fp32",), engine="none"), progress=progress
    )
    assert alive == {"asking Keras": True, "converting": True, "proving fp32": False}
    assert len(references) == 1


def test_a_model_that_the_caller_holds_is_not_changed(
    model: Any, whole: tuple[Path, ExportResult], scenes: LabelledImages
) -> None:
    answers = np.asarray(model(scenes.images.astype(np.float32), training=False))
    assert (answers.argmax(1) == scenes.targets).sum() == 19


def test_the_specs_normalisation_reaches_the_bundle_and_its_answers(tmp_path: Path) -> None:
    spec = ImageSpec(height=8, width=6, normalization=Normalization(mean=(120.0, 110.0, 100.0), std=(60.0, 55.0, 50.0)))
    layers = keras.layers
    draw = keras.initializers.RandomNormal(seed=1)
    inputs = keras.Input((8, 6, 3))
    outputs = layers.Flatten()(layers.Conv2D(4, 3, activation="relu", kernel_initializer=draw)(inputs))
    plain = keras.Model(inputs, layers.Dense(2, "softmax", kernel_initializer=draw)(outputs))
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 6, 3), dtype=np.uint8)
    data = LabelledImages("noise", images, np.zeros(6, np.int64))
    export(
        plain,
        tmp_path / "b",
        image=spec,
        labels=("a", "b"),
        images=Images(data, data, data),
        config=ExportConfig(engine="none"),
    )
    pixels = (images - np.float32(spec.normalization.mean)) / np.float32(spec.normalization.std)
    wanted = np.asarray(plain(pixels, training=False))
    with Session.open(tmp_path / "b", backend="ort") as session:
        assert session.image_spec == spec
        np.testing.assert_allclose(session.predict(images), wanted, atol=1e-5)


# --- what fails leaves nothing


STAGES = [
    "keras_scores",
    "graph_from_keras",
    "apply_passes",
    "Graph.write",
    "precision.graph_scores",
    "precision.check_parity",
    "precision.float16_graph",
    "precision.rounding_twin",
    "precision.Calibration.measure",
    "precision.layer_outputs",
    "precision.quantized_graph",
    "precision.equalized_graph",
    "precision.check_equal",
    "calibration.best_magnitudes",
    "precision.compare_scores",
    "precision.Chooser.choose_scales",
    "choosing.graph_scores",
    "golden.choose_golden",
    "golden.np.save",
    "bundles.write_manifest",
    "building.build_engines",
    "bundles._swap",
]


OWNERS: dict[str, Any] = {"Graph": Graph, "precision": precision, "choosing": choosing, "golden": golden}
OWNERS["calibration"] = calibration


@pytest.fixture(scope="module")
def old(whole: tuple[Path, ExportResult]) -> Path:
    return whole[0]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_at_any_stage_leaves_the_old_bundle_byte_for_byte(
    stage: str,
    error: type[BaseException],
    old: Path,
    quick: None,
    model: Any,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "hands"
    shutil.copytree(old, path)
    before = snapshot(tmp_path)

    def fail(*arguments: Any, **options: Any) -> None:
        raise error("halfway")

    monkeypatch.setattr(pipeline.building, "choose_builder", lambda product: product)
    monkeypatch.setattr(pipeline.building, "check_builder", lambda product: None)
    *owners, name = stage.split(".")
    target: Any = pipeline
    for owner in owners:
        target = OWNERS.get(owner) or getattr(target, owner)
    if stage == "bundles._swap":
        monkeypatch.setattr(pipeline.building, "build_engines", lambda *_, **__: SimpleNamespace(engines=()))
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(error, match="halfway"):
        export(model, path, **settings, config=ExportConfig(engine="tensorrt_rtx"))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_without_an_old_bundle_leaves_nothing(
    error: type[BaseException],
    quick: None,
    model: Any,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*arguments: Any) -> None:
        assert any(tmp_path.iterdir())  # the staging folder
        raise error("halfway")

    monkeypatch.setattr(pipeline.bundles, "write_manifest", fail)
    with pytest.raises(error):
        export(model, tmp_path / "b", **settings, config=ExportConfig(engine="none"))
    assert list(tmp_path.iterdir()) == []


def test_a_second_export_replaces_the_bundle_as_a_whole(
    old: Path, quick: None, model: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "hands"
    shutil.copytree(old, path)
    (path / "graphs/stray.onnx").write_bytes(b"left over")
    export(model, path, **settings, config=ExportConfig(precisions=("fp32",), engine="none"))
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == [
        "golden/inputs.npy",
        "golden/outputs.fp32.npy",
        "graphs/model.fp32.onnx",
        "labels.txt",
        "manifest.json",
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["hands"]


# --- what is refused


def untouchable() -> Any:
    raise AssertionError("the model was asked for before the request was checked")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_bundle_is_not_replaced_and_the_model_not_even_loaded(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("thesis")
    else:
        path.mkdir()
        (path / "thesis.txt").write_text("thesis")
    before = snapshot(tmp_path)
    with pytest.raises(BundleError, match="precious: exists and is no bundle"):
        export(untouchable, path, **settings, config=ExportConfig(engine="none"))
    assert snapshot(tmp_path) == before


def test_a_missing_tensorrt_is_told_before_the_model_is_loaded(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_api, "installed_products", lambda: ())
    with pytest.raises(MissingDependency, match="--no-engine"):
        export(untouchable, tmp_path / "b", **settings, config=ExportConfig(engine="auto"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precisions", [("fp32", "fp16"), ("int8",)])
@pytest.mark.parametrize(("max_drop", "few", "enough"), [(4.0, 64, 65), (20.0, 10, 11)])
def test_too_few_evaluation_images_for_the_limit_are_told_before_the_model_is_loaded(
    max_drop: float, few: int, enough: int, precisions: tuple, settings: dict[str, Any], tmp_path: Path
) -> None:
    """z^2 (1 - limit) / limit of them are needed, and even the graph that changes nothing needs them."""
    assert enough == np.ceil(1.6449**2 * (100 - max_drop) / max_drop)

    def attempt(count: int, **options: Any) -> None:
        many = LabelledImages("many", np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int64))
        config = ExportConfig(engine="none", precisions=precisions, max_drop=max_drop, **options)
        given = settings | {"images": replace(settings["images"], evaluation=many)}
        export(untouchable, tmp_path / "b", **given, config=config)

    with pytest.raises(GateError) as raised:
        attempt(few)
    said = str(raised.value)
    assert said.startswith(f"{few} evaluation images are too few for a limit of {max_drop:g} points (--max-drop): even")
    assert f"Needed are at least {enough}." in said
    for advice in ("--evaluation-images", "allow more", "--accept-undecided"):
        assert advice in said
    assert raised.value.exit_code == 3
    with pytest.raises(AssertionError, match="the model was asked for"):
        attempt(enough)
    with pytest.raises(AssertionError, match="the model was asked for"):
        attempt(few, accept_undecided=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precisions": ("fp8",)}, "precisions are .*fp8.*; known: fp32, fp16, int8"),
        ({"precisions": ()}, "known: fp32"),
        ({"batches": (4, 2, 1)}, "1 <= smallest"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportConfig(**options)


def with_images(data: LabelledImages, *size: int) -> LabelledImages:
    return LabelledImages(data.name, np.zeros((len(data.images), *size), np.uint8), data.targets)


def with_target(data: LabelledImages, target: int) -> LabelledImages:
    targets = data.targets.copy()
    targets[3] = target
    return LabelledImages(data.name, data.images, targets)


def changed(use: str, change: Callable[..., LabelledImages], *arguments: int) -> Callable[[dict], dict]:
    """From settings to the part of them that is another where the images for one use were changed."""
    return lambda s: {"images": replace(s["images"], **{use: change(getattr(s["images"], use), *arguments)})}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: {"labels": LABELS[:4]}, ModelError, "has 5 classes, and 4 labels came: ant, bee, cat, dog"),
        (lambda s: {"labels": (*LABELS, "eel")}, ModelError, "has 5 classes, and 6 labels"),
        (
            lambda s: {"image": ImageSpec(height=64, width=32)},
            ModelError,
            r"takes images of \(32, 32, 3\), the image spec says \(64, 32, 3\)",
        ),
        (
            lambda s: {"image": msgspec.structs.replace(IMAGE, normalization=Normalization((0, 0, 0), (1, 1, 1)))},
            ModelError,
            "'rescaling' normalises the image, and so would the image spec",
        ),
        (
            changed("calibration", with_images, 16, 32, 3),
            DataError,
            r"holiday: images of \(16, 32, 3\), needed is \(32, 32, 3\)",
        ),
        (changed("evaluation", with_images, 32, 32), DataError, r"scenes:24: images of \(32, 32\)"),
        (changed("selection", with_images, 32, 16, 3), DataError, r"voted: images of \(32, 16, 3\)"),
        (changed("evaluation", with_target, 5), DataError, "scenes:24: class number 5; .* 5 classes"),
        (changed("calibration", with_target, 9), DataError, "holiday: class number 9"),
        (changed("selection", with_target, 7), DataError, "voted: class number 7"),
        (changed("evaluation", with_target, -1), DataError, "scenes:24: class number -1"),
    ],
)
def test_labels_sizes_and_targets_that_do_not_fit_are_refused(
    change: Callable[[dict], dict],
    error: type[Exception],
    message: str,
    model: Any,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        export(model, tmp_path / "b", **(settings | change(settings)), config=ExportConfig(engine="none"))
    assert list(tmp_path.iterdir()) == []


def test_a_pass_that_changes_the_numbers_is_found_and_nothing_is_written(
    quick: None, model: Any, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = pipeline.apply_passes

    def broken(graph: Graph) -> Any:
        records = apply(graph)
        graph.weights["block2_conv1/kernel"] = graph.weights["block2_conv1/kernel"][:, :, ::-1]
        return records

    monkeypatch.setattr(pipeline, "apply_passes", broken)
    with pytest.raises(ConversionError, match=r"differs from Keras by .* on 24 images"):
        export(model, tmp_path / "b", **settings, config=ExportConfig(engine="none"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_added_to_a_model_is_in_the_manifest_and_proved(settings: dict[str, Any], tmp_path: Path) -> None:
    def made(units: int, activation: str | None) -> Any:
        inputs = keras.Input((32, 32, 3))
        outputs = keras.layers.Rescaling(1 / 128, offset=-1)(inputs)
        outputs = keras.layers.Conv2D(4, 5, strides=4, activation="relu", name="conv")(outputs)
        outputs = keras.layers.Dense(units, activation, name="top")(keras.layers.Flatten()(outputs))
        return keras.Model(inputs, outputs)

    config = ExportConfig(engine="none", precisions=("fp32", "int8"))
    logits = made(5, None)
    manifest = export(logits, tmp_path / "b", **settings, config=config).manifest
    assert manifest.adaptations == ("output: softmax added, the model gives logits",)
    assert manifest.graphs["fp32"].evidence.max_abs_difference < 1e-6
    with Session.open(tmp_path / "b", precision="fp32") as session:
        found = session.predict(settings["images"].evaluation.images)
    pixels = settings["images"].evaluation.images.astype(np.float32)
    np.testing.assert_allclose(found, keras.ops.softmax(logits(pixels)), rtol=0, atol=1e-6)

    pair = made(1, "sigmoid")
    used = settings["images"].by_use().items()
    images = Images(**{use: LabelledImages("two", each.images, each.targets % 2) for use, each in used})
    manifest = export(pair, tmp_path / "b", image=IMAGE, labels=("no", "yes"), images=images, config=config).manifest
    assert manifest.adaptations == ("output: one unit became two classes, [1 - p, p], p being the unit's sigmoid",)
    says_yes = np.asarray(pair(pixels))[:, 0] > 0.5
    assert manifest.keras_accuracy.count == (says_yes == images.evaluation.targets).sum()
    with pytest.raises(ModelError, match="has 2 classes, and 1 labels came: yes"):
        export(pair, tmp_path / "b", image=IMAGE, labels=("yes",), images=images, config=config)

    with pytest.raises(ModelError, match="ends in the layer 'top', whose Relu leaves scores"):
        export(made(5, "relu"), tmp_path / "c", **settings, config=config)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_without_a_layer_to_quantise_int8_is_refused_and_the_rest_is_made(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    inputs = keras.Input((32, 32, 3))
    flat = keras.layers.Flatten()(keras.layers.Rescaling(1 / 128, offset=-1)(inputs))
    linear = keras.Model(inputs, keras.layers.Dense(5, "softmax", name="only")(flat))
    with pytest.raises(ModelError, match=r"no layer to quantise.*has: only\..*--precision fp32,fp16"):
        export(linear, tmp_path / "b", **settings, config=ExportConfig(engine="none"))
    assert not list(tmp_path.iterdir())
    export(linear, tmp_path / "b", **settings, config=ExportConfig(engine="none", precisions=("fp32", "fp16")))
    assert set(Bundle.open(tmp_path / "b").manifest.graphs) == {"fp32", "fp16"}


def test_a_depthwise_model_is_exported_in_all_precisions(
    settings: dict[str, Any], randomise: Callable[..., None], tmp_path: Path
) -> None:
    inputs = keras.Input((32, 32, 3))
    outputs = keras.layers.Rescaling(1 / 128, offset=-1)(inputs)
    outputs = keras.layers.Conv2D(8, 3, activation="relu", name="conv")(outputs)
    outputs = keras.layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(outputs)
    outputs = keras.layers.Conv2D(6, 1, activation="relu", name="pointwise")(outputs)
    outputs = keras.layers.GlobalAveragePooling2D(name="pool")(outputs)
    model = keras.Model(inputs, keras.layers.Dense(5, "softmax", name="top")(outputs))
    randomise(model)
    manifest = export(model, tmp_path / "b", **settings, config=ExportConfig(engine="none")).manifest
    assert list(manifest.graphs) == MADE
    for name, record in manifest.graphs.items():
        assert record.op_counts["Transpose"] == 1
        assert record.evidence.max_abs_difference < (1e-5 if name == "fp32" else 0.05)
    graph = read_graph(tmp_path / "b" / manifest.graphs["int8"].file)
    assert graph.weights["depthwise/kernel_scale"].shape == (8,)


def test_a_model_with_weights_that_are_no_numbers_is_refused(
    model: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    broken = keras.models.clone_model(model)
    bias = np.zeros(5, np.float32)
    bias[2] = np.nan
    broken.get_layer("predictions").bias.assign(bias)
    with pytest.raises(ConversionError, match="24 of 24 answers of keras are NaN or infinite"):
        export(broken, tmp_path / "b", **settings, config=ExportConfig(engine="none"))
    assert list(tmp_path.iterdir()) == []
