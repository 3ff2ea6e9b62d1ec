"""export(): Keras model in, bundle out; every step followed by its proof."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from vggedge_export import building
from vggedge_export.completion import complete_graph, complete_scores
from vggedge_export.conversion import check_exportable, class_count, graph_from_keras
from vggedge_export.engine_config import EngineConfig
from vggedge_export.golden import write_golden
from vggedge_export.graph import Graph
from vggedge_export.grey import GREY_IN_WORDS
from vggedge_export.passes import apply_passes
from vggedge_export.precision import GraphMaker, PrecisionConfig
from vggedge_export.quantization import check_quantizable
from vggedge_export.verification import Images, LabelledImages, Scores, keras_scores
from vggedge_runtime import bundle as bundles
from vggedge_runtime.bundle import DataRecord, Manifest, PassRecord
from vggedge_runtime.dependencies import require
from vggedge_runtime.device import tool_versions
from vggedge_runtime.engine_cache import EngineRecord
from vggedge_runtime.errors import DataError, GateError, ModelError, UsageError
from vggedge_runtime.paired import build_paired_change, judge_drop
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.progress import Advance, ignore_progress
from vggedge_runtime.statistics import build_proportion

if TYPE_CHECKING:
    import keras


class ExportConfig(PrecisionConfig, frozen=True, kw_only=True):
    """Choices of one export.

    Attributes:
        engine: TensorRT product to build engines with: ``auto``, ``none``, ``tensorrt`` or ``tensorrt_rtx``.
        batches: smallest, best and largest batch of the engines; the graphs take any batch.
    """

    engine: str = "auto"
    batches: tuple[int, int, int] = (1, 1, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        EngineConfig(self.batches)


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
    images: Images,
    ranges: Mapping[str, float] | None = None,
    cache: Path | None = None,
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
        images: what to calibrate, choose and prove on; the proof is best made on images that the model never saw.
        ranges: input magnitudes by layer that quantisation-aware training fixed; the graph ``int8`` takes them
            instead of calibrating.
        cache: folder that keeps calibrations, by the hashes of graph and images; None keeps none.
        config: precisions and engines; all of them by default.
        progress: told what goes on.

    Raises:
        GateError: a graph loses more accuracy than ``config.max_drop``, or the images are too few to tell.
        VggedgeError: any step that cannot be done. Nothing is written then, and an older bundle stays as it is.
    """
    config = config or ExportConfig()
    if config.needs_selection and images.selection is None:
        raise UsageError(
            "there are no selection images, and a calibrator or plan is to be chosen by how INT8 answers. Give some "
            "that neither calibrate nor prove, or name a calibrator and set no limit (--max-drop)."
        )
    if config.has_plan:
        require("matplotlib", "export")  # it is to draw the plan, and would be missed after the search only
    bundles.check_replaceable(path)
    builder = None if config.engine == "none" else building.choose_builder(config.engine)
    if builder is not None:
        building.check_builder(builder)
    _check_decidable(len(images.evaluation.images), config)
    inputs = _Inputs(image, labels, images, ranges, cache)
    with bundles.write_bundle(path) as staging:
        manifest, converted_op_counts = _make_graphs(staging, model, inputs, config, progress)
        (staging / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        bundles.write_manifest(staging, manifest)
        built = _build_engines(staging, builder, config, progress)
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
    images: Images
    ranges: Mapping[str, float] | None
    cache: Path | None


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
        check_quantizable(converted.graph, config.recipe("int8"))
    maker = GraphMaker(
        staging, converted.graph, inputs.labels, inputs.images, config, inputs.ranges, inputs.cache, progress
    )
    records = maker.make_all(converted.scores)
    evaluation = inputs.images.evaluation
    right = int((converted.scores.argmax(1) == evaluation.targets).sum())
    manifest = Manifest(
        format_version=bundles.FORMAT_VERSION,
        name=converted.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        parameters=converted.parameters,
        image=inputs.image,
        labels=inputs.labels,
        graphs=records,
        golden=write_golden(staging, maker.answers, evaluation),
        passes=tuple(converted.passes),
        keras_accuracy=build_proportion(right, len(converted.scores)),
        data=_records(inputs.images),
        tools=tool_versions("vggedge", "keras", "tensorflow", "tf2onnx", "onnx", "onnxruntime", "numpy"),
        files={},
        adaptations=converted.adaptations,
        gate=maker.gate,
    )
    return manifest, converted.op_counts


def _convert(model: keras.Model | Callable[[], keras.Model], inputs: _Inputs, progress: Advance) -> _Converted:
    """Ask Keras for the reference answers, take its weights into a graph, clean that, and let go of Keras."""
    loaded: keras.Model = model if hasattr(model, "layers") else model()
    _check_inputs(loaded, inputs)
    scores = keras_scores(loaded, inputs.image.normalization, inputs.images.evaluation.images, progress)
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
    folder: Path, builder: str | None, config: ExportConfig, progress: Advance
) -> tuple[EngineRecord, ...]:
    if builder is None:
        return ()
    graphs = building.choose_graphs(bundles.Bundle.open(folder), builder, None)
    result = building.build_engines(folder, builder, graphs, EngineConfig(config.batches), progress=progress)
    return tuple(each.record for each in result.engines)


def _check_inputs(model: keras.Model, inputs: _Inputs) -> None:
    check_exportable(model, inputs.image.normalization)
    size, classes, labels = tuple(model.inputs[0].shape[1:]), class_count(model), inputs.labels
    if size[:2] != inputs.image.shape[:2]:
        raise ModelError(
            f"{model.name} takes images of {size}, the image spec says {inputs.image.shape}; make them agree."
        )
    if len(labels) != classes:
        raise ModelError(f"{model.name} has {classes} classes, and {len(labels)} labels came: {', '.join(labels)}.")
    for data in inputs.images.by_use().values():
        if data.images.shape[1:] != inputs.image.shape:
            raise DataError(f"{data.name}: images of {data.images.shape[1:]}, needed is {inputs.image.shape}.")
        for target in (int(data.targets.min()), int(data.targets.max())):
            if not 0 <= target < classes:
                raise DataError(f"{data.name}: class number {target}; the model has {classes} classes, from 0 on.")


def _check_decidable(n: int, config: ExportConfig) -> None:
    """Raise GateError, before hours of work, where even a graph that changed no answer could not be let through."""
    if config.max_drop is None or config.accept_undecided:
        return
    same = np.ones(n, dtype=bool)
    verdict = judge_drop(build_paired_change(same, same), config.max_drop)
    if verdict.decision != "pass":
        needed = f" Needed are at least {verdict.images_needed:,}." if verdict.images_needed else ""
        raise GateError(
            f"{n} evaluation images are too few for a limit of {config.max_drop:g} points (--max-drop): even a graph "
            f"that changes no answer could lose {verdict.drop_high:.2f} points.{needed} Name more (--evaluation, "
            "--evaluation-images), allow more, or add --accept-undecided."
        )


def _records(images: Images) -> dict[str, DataRecord]:
    made_with = {digest for use, data in images.by_use().items() if use != "evaluation" for digest in _digests(data)}
    return {
        use: DataRecord(
            name=data.name,
            images=len(data.images),
            sha256=hashlib.sha256(data.images.data).hexdigest(),
            seen=sum(digest in made_with for digest in _digests(data)) if use == "evaluation" else 0,
        )
        for use, data in images.by_use().items()
    }


def _digests(data: LabelledImages) -> list[bytes]:
    return [hashlib.sha256(image.data).digest() for image in data.images]
