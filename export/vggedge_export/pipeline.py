"""export(): Keras model in, bundle out; every step followed by its proof."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge_export import engine as engines
from vggedge_export.calibration import largest_magnitudes
from vggedge_export.completion import complete_graph, complete_scores
from vggedge_export.conversion import check_exportable, class_count, graph_from_keras
from vggedge_export.engine import EngineConfig
from vggedge_export.equalization import equalized_graph
from vggedge_export.float16 import float16_graph, rounding_twin
from vggedge_export.graph import Graph
from vggedge_export.grey import GREY_IN_WORDS
from vggedge_export.passes import apply_passes
from vggedge_export.quantization import (
    INT8,
    INT8_RTX,
    QuantizationRecipe,
    check_quantizable,
    quantized_graph,
    quantized_layers,
)
from vggedge_export.verification import (
    LabelledImages,
    Scores,
    batch_for,
    check_alone,
    check_parity,
    compare_scores,
    graph_scores,
    keras_scores,
)
from vggedge_runtime import bundle as bundles
from vggedge_runtime.bundle import DataRecord, GoldenRecord, GraphRecord, Manifest, PassRecord
from vggedge_runtime.device import tool_versions
from vggedge_runtime.engine_cache import EngineRecord
from vggedge_runtime.errors import DataError, ModelError, UsageError
from vggedge_runtime.graphs import GRAPHS, PRECISIONS, graphs_of
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.progress import Advance, ignore_progress
from vggedge_runtime.statistics import build_proportion
from vggedge_runtime.tensorrt_api import TensorRtApi, load_tensorrt

if TYPE_CHECKING:
    import keras

_GOLDEN_IMAGES = 4


class ExportConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Choices of one export.

    Attributes:
        precisions: of fp32, fp16, int8; fp32 is always made, the others come from it.
        engine: TensorRT product to build engines with: ``auto``, ``none``, ``tensorrt`` or ``tensorrt_rtx``.
        batches: smallest, best and largest batch of the engines; the graphs take any batch.
    """

    precisions: tuple[str, ...] = PRECISIONS
    engine: str = "auto"
    batches: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        unknown = [name for name in self.precisions if name not in PRECISIONS]
        if unknown or not self.precisions:
            raise UsageError(f"precisions are {self.precisions}; known: {', '.join(PRECISIONS)}.")
        EngineConfig(self.batches)

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graphs to make, fp32 first."""
        return tuple(g for p in PRECISIONS if p == "fp32" or p in self.precisions for g in graphs_of(p))


class ExportResult(msgspec.Struct, frozen=True, kw_only=True):
    """What export made.

    Attributes:
        bundle: the folder.
        manifest: the bundle's manifest, with the evidence of every graph.
        engines: those built.
        converted_op_counts: op counts before the passes.
    """

    bundle: str
    manifest: Manifest
    engines: tuple[EngineRecord, ...]
    converted_op_counts: dict[str, int]


def export(
    model: keras.Model | Callable[[], keras.Model],
    path: Path,
    *,
    image: ImageSpec,
    labels: tuple[str, ...],
    calibration: LabelledImages,
    evaluation: LabelledImages,
    config: ExportConfig | None = None,
    progress: Advance = ignore_progress,
) -> ExportResult:
    """Convert ``model`` to a bundle at ``path``, with proof.

    Args:
        model: a Keras model, or a function that gives one. What only the function holds is freed as soon as its
            weights are in the graph; with TF_ENABLE_ONEDNN_OPTS=0 set before TensorFlow is imported, as the command
            line does, that keeps the full VGG-16 under 4 GB.
        path: folder to write; replaced as a whole if it is a bundle already, and only at the very end.
        image: how images become the input; goes into the bundle.
        labels: class names in the order of the output.
        calibration: images that set the INT8 ranges.
        evaluation: labelled images that the proof is made on; best ones that the model never saw.
        config: precisions and engines; all of them by default.
        progress: told what goes on.

    Raises:
        VggedgeError: any step that cannot be done; nothing is written then.
    """
    config = config or ExportConfig()
    bundles.check_replaceable(path)
    api = None if config.engine == "none" else load_tensorrt(config.engine)
    if api is not None:
        engines.check_buildable(api)
    inputs = _Inputs(image, labels, calibration, evaluation)
    with bundles.write_bundle(path) as staging:
        manifest, converted_op_counts = _make_graphs(staging, model, inputs, config, progress)
        (staging / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        bundles.write_manifest(staging, manifest)
        built = _build_engines(staging, api, config, progress)
        manifest = bundles.Bundle.open(staging).manifest
    return ExportResult(
        bundle=str(path),
        manifest=manifest,
        engines=built,
        converted_op_counts=converted_op_counts,
    )


@dataclass(frozen=True)
class _Inputs:
    """What an export is about, besides the model."""

    image: ImageSpec
    labels: tuple[str, ...]
    calibration: LabelledImages
    evaluation: LabelledImages


@dataclass(frozen=True)
class _Converted:
    """A model as a clean graph, and what is known of it once Keras is gone."""

    name: str
    parameters: int
    scores: Scores
    graph: Graph
    op_counts: dict[str, int]
    passes: list[PassRecord]
    adaptations: tuple[str, ...]


def _make_graphs(
    staging: Path,
    model: keras.Model | Callable[[], keras.Model],
    inputs: _Inputs,
    config: ExportConfig,
    progress: Advance,
) -> tuple[Manifest, dict[str, int]]:
    """Make, write and prove all graphs: (the manifest without its files, op counts before the passes).

    Nothing that is returned holds weights: the engines' build needs the memory.
    """
    converted = _convert(model, inputs, progress)
    if "int8" in config.precisions:
        check_quantizable(converted.graph, INT8)
    maker = _GraphMaker(staging, converted.graph, inputs.calibration, inputs.evaluation, progress)
    evidence = maker.make_all(config.graphs, converted.scores)
    right = int((converted.scores.argmax(1) == inputs.evaluation.targets).sum())
    manifest = Manifest(
        format_version=bundles.FORMAT_VERSION,
        name=converted.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parameters=converted.parameters,
        image=inputs.image,
        labels=inputs.labels,
        graphs=evidence,
        golden=maker.write_golden(),
        passes=tuple(converted.passes),
        keras_accuracy=build_proportion(right, len(converted.scores)),
        data={"calibration": _record(inputs.calibration), "evaluation": _record(inputs.evaluation)},
        tools=tool_versions("vggedge", "keras", "tensorflow", "tf2onnx", "onnx", "onnxruntime", "numpy"),
        files={},
        adaptations=converted.adaptations,
    )
    return manifest, converted.op_counts


@dataclass
class _GraphMaker:
    """Makes each graph, writes it, proves it, and keeps its answers to the golden images."""

    folder: Path
    graph: Graph
    calibration: LabelledImages
    evaluation: LabelledImages
    progress: Advance

    def __post_init__(self) -> None:
        self.answers: dict[str, Scores] = {}

    def make_all(self, names: tuple[str, ...], reference: Scores) -> dict[str, GraphRecord]:
        """Make the graphs ``names``, fp32 first; ``reference`` is what Keras answers."""
        recipes: dict[str, Callable[[], Graph]] = {
            "fp32": lambda: self.graph,
            "fp16": lambda: float16_graph(self.graph),
            "int8": lambda: quantized_graph(self.graph, INT8, self._calibrate(self.graph, INT8)),
            "int8-rtx": self._make_int8_rtx,
        }
        (self.folder / "graphs").mkdir()
        records: dict[str, GraphRecord] = {}
        against = "keras"
        for name in names:
            scores, records[name] = self._make(name, recipes[name](), reference, against)
            if name == "fp32":
                check_parity(records[name].evidence)
                reference, against = scores, "fp32"
        return records

    def write_golden(self) -> GoldenRecord:
        """Write the golden images and every graph's answers to them."""
        folder = self.folder / "golden"
        folder.mkdir()
        rows = choose_golden(self.answers, self.evaluation.targets)
        np.save(folder / "inputs.npy", self.evaluation.images[rows])
        for name, scores in self.answers.items():
            np.save(folder / f"outputs.{name}.npy", scores[rows])
        outputs = {name: f"golden/outputs.{name}.npy" for name in self.answers}
        return GoldenRecord(inputs="golden/inputs.npy", outputs=outputs)

    def _make(self, name: str, graph: Graph, reference: Scores, against: str) -> tuple[Scores, GraphRecord]:
        file = f"graphs/model.{name}.onnx"
        graph.write(self.folder / file)
        counts, has_fp16 = graph.op_counts(), any(array.dtype == np.float16 for array in graph.weights.values())
        runnable = self.folder / file
        if has_fp16:
            runnable = self.folder / "twin.onnx"
            rounding_twin(graph).write(runnable)
        del graph  # ONNX Runtime is about to hold the weights once more
        scores = graph_scores(runnable, self.evaluation.images, name, self.progress)
        if name == "fp32":
            check_alone(runnable, self.evaluation.images)
        if has_fp16:
            runnable.unlink()
        self.answers[name] = scores
        obtained: Literal["measured", "emulated"] = "emulated" if has_fp16 else "measured"
        targets = self.evaluation.targets
        record = GraphRecord(
            file=file,
            precision=GRAPHS[name].precision,
            made_for=GRAPHS[name].made_for,
            op_counts=counts,
            evidence=compare_scores(reference, scores, targets, against=against, obtained=obtained),
        )
        return scores, record

    def _make_int8_rtx(self) -> Graph:
        """Ranges come from the FP32 graph after equalisation, types from its FP16 cast."""
        even = equalized_graph(self.graph)
        magnitudes = self._calibrate(even, INT8_RTX)
        even = float16_graph(even)  # lets the FP32 weights go
        return quantized_graph(even, INT8_RTX, magnitudes)

    def _calibrate(self, graph: Graph, recipe: QuantizationRecipe) -> dict[str, float]:
        tensors = [layer.input[0] for layer in quantized_layers(graph, recipe)]
        images, scratch = self.calibration.images, self.folder / "calibration.onnx"
        return largest_magnitudes(
            graph, tensors, images, batch=batch_for(images), scratch=scratch, progress=self.progress
        )


def _convert(model: keras.Model | Callable[[], keras.Model], inputs: _Inputs, progress: Advance) -> _Converted:
    """Ask Keras for the reference answers, take its weights into a graph, clean that, and let go of Keras."""
    loaded: keras.Model = model if hasattr(model, "layers") else model()
    _check_inputs(loaded, inputs)
    scores = keras_scores(loaded, inputs.image.normalization, inputs.evaluation.images, progress)
    progress(0, 1, "converting")
    graph = graph_from_keras(loaded, inputs.image.normalization)
    name, parameters, is_grey = loaded.name, loaded.count_params(), loaded.inputs[0].shape[-1] == 1
    del loaded
    gc.collect()  # a Keras model is full of cycles
    counts = graph.op_counts()
    records = apply_passes(graph)
    completion = complete_graph(graph, scores)
    progress(1, 1, "converting")
    adaptations = (GREY_IN_WORDS if is_grey else None, completion.words)
    return _Converted(
        name=name,
        parameters=parameters,
        scores=complete_scores(scores, completion),
        graph=graph,
        op_counts=counts,
        passes=records,
        adaptations=tuple(each for each in adaptations if each is not None),
    )


def _build_engines(
    folder: Path, api: TensorRtApi | None, config: ExportConfig, progress: Advance
) -> tuple[EngineRecord, ...]:
    if api is None:
        return ()
    wanted = engines.graphs_for(api.product, list(config.graphs))
    records = []
    for index, name in enumerate(wanted):
        progress(index, len(wanted), f"building {api.product} engines")
        records.append(engines.build_into(folder, api, name, EngineConfig(config.batches)))
    progress(len(wanted), len(wanted), f"building {api.product} engines")
    return tuple(records)


def choose_golden(answers: dict[str, Scores], targets: NDArray[np.int64]) -> list[int]:
    """Rows of up to four golden images, of different classes as far as there are.

    A golden image has to show wrong arithmetic and to overlook other rounding. So it is one on which all graphs
    agree well within their tolerances, and among those one whose top class has a probability near 0.9: at 1.0000
    an answer hides large errors, near a tie it flips on small ones.
    """
    calm = np.ones(len(targets), dtype=bool)
    for name, scores in answers.items():
        off = np.abs(scores - answers["fp32"]).max(axis=1)
        calm &= off <= GRAPHS[name].golden_tolerance / 2
    unease = np.abs(answers["fp32"].max(axis=1) - 0.9) + np.where(calm, 0.0, 1.0)
    order = [int(row) for row in np.argsort(unease, kind="stable")]
    first_of_class = list({int(targets[row]): row for row in reversed(order)}.values())[::-1]
    chosen = sorted(first_of_class, key=lambda row: unease[row]) + order
    return list(dict.fromkeys(chosen))[:_GOLDEN_IMAGES]


def _check_inputs(model: keras.Model, inputs: _Inputs) -> None:
    check_exportable(model, inputs.image.normalization)
    size, classes, labels = tuple(model.inputs[0].shape[1:]), class_count(model), inputs.labels
    if size[:2] != inputs.image.shape[:2]:
        raise ModelError(
            f"{model.name} takes images of {size}, the image spec says {inputs.image.shape}; make them agree."
        )
    if len(labels) != classes:
        raise ModelError(f"{model.name} has {classes} classes, and {len(labels)} labels came: {', '.join(labels)}.")
    for data in (inputs.calibration, inputs.evaluation):
        if data.images.shape[1:] != inputs.image.shape:
            raise DataError(f"{data.name}: images of {data.images.shape[1:]}, needed is {inputs.image.shape}.")
        for target in (int(data.targets.min()), int(data.targets.max())):
            if not 0 <= target < classes:
                raise DataError(f"{data.name}: class number {target}; the model has {classes} classes, from 0 on.")


def _record(data: LabelledImages) -> DataRecord:
    return DataRecord(name=data.name, images=len(data.images), sha256=hashlib.sha256(data.images.data).hexdigest())
