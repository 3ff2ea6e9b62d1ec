"""vggedge export: one Keras model in, one bundle out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vggedge.cli import output
from vggedge.data import ImageSet, open_images
from vggedge.model import ModelCard, read_card, read_model
from vggedge_export.pipeline import ExportConfig, ExportResult, export
from vggedge_export.verification import LabelledImages
from vggedge_runtime.bundle import check_replaceable
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.tensorrt_api import load_tensorrt

NAME = "export"


def command(
    model: Annotated[Path, typer.Argument(help="MODEL.keras, as written by vggedge train or by Keras.")],
    calibration: Annotated[str, typer.Option(help="DATA whose images set the INT8 ranges.")],
    bundle: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle; an older bundle is replaced.")],
    evaluation: Annotated[
        str | None,
        typer.Option(help="DATA to prove the graphs on, best never seen in training. [default: rest of --calibration]"),
    ] = None,
    precision: Annotated[str, typer.Option(help="Graphs to make, comma-separated.")] = "fp32,fp16,int8",
    calibration_images: Annotated[int, typer.Option(min=1, help="How many images to calibrate on.")] = 200,
    evaluation_images: Annotated[int, typer.Option(min=1, help="How many images, at most, to prove on.")] = 2000,
    engine: Annotated[bool, typer.Option("--engine/--no-engine", help="Build TensorRT engines, too.")] = True,
    json: output.JsonFlag = False,
) -> None:
    """Convert MODEL.keras to a bundle: FP32, FP16 and INT8 graphs, engines, and the proof of each."""
    config = ExportConfig(
        precisions=tuple(part.strip() for part in precision.split(",") if part.strip()),
        engine="auto" if engine else "none",
    )
    # All that can be refused is refused before TensorFlow loads.
    check_replaceable(bundle)
    card = read_card(model)
    sources = _open_sources(calibration, evaluation, card.image) if card else None
    if engine:
        load_tensorrt()
    # TensorFlow's oneDNN allocator never gives memory back: 0.8 GB more for the full VGG-16 until the end.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with output.progress(quiet=json) as advance:
        advance(0, 1, "loading the model")
        network, _ = read_model(model)
        advance(1, 1, "loading the model")
        spec = card.image if card else _spec_from_input(network.inputs[0].shape)
        sources = sources or _open_sources(calibration, evaluation, spec)
        labels = _labels(card, sources[0].labels, network.outputs[0].shape[-1], json)
        chosen, held_out = _divide(*sources, calibration_images, evaluation_images)
        sets = _load(chosen, "calibration", advance), _load(held_out, "evaluation", advance)
        holder = [network]  # export then has the only reference, and frees the weights when it can
        del network
        result = export(
            holder.pop,
            bundle,
            image=spec,
            labels=labels,
            calibration=sets[0],
            evaluation=sets[1],
            config=config,
            progress=advance,
        )
    if json:
        output.print_json(result)
    else:
        _print_tables(result)


def _spec_from_input(shape: tuple[int | None, ...]) -> ImageSpec:
    if len(shape) != 4 or shape[1] is None or shape[2] is None:
        raise UsageError(f"the model's input is {shape}; export needs images, with a fixed height and width.")
    return ImageSpec(height=shape[1], width=shape[2])


def _open_sources(calibration: str, evaluation: str | None, spec: ImageSpec) -> tuple[ImageSet, ImageSet | None]:
    source = open_images(calibration, spec)
    if evaluation is None:
        return source, None
    proof = open_images(evaluation, spec)
    if proof.labels != source.labels:
        raise UsageError(
            f"--evaluation has the classes {', '.join(proof.labels)}, --calibration has "
            f"{', '.join(source.labels)}; both need the same."
        )
    return source, proof


def _divide(
    source: ImageSet, proof: ImageSet | None, calibration_images: int, evaluation_images: int
) -> tuple[ImageSet, ImageSet]:
    """(images to calibrate on, images to prove on): no image is in both unless the user named it twice."""
    if proof is None:
        proof, chosen = source.split(min(0.5, calibration_images / len(source)), seed=0)
    else:
        chosen = _take(source, calibration_images)
    return chosen, _take(proof, evaluation_images)


def _take(images: ImageSet, count: int) -> ImageSet:
    """``count`` images spread evenly over the classes, chosen by a fixed seed."""
    return images if len(images) <= count else images.split(count / len(images), seed=0)[1]


def _load(images: ImageSet, what: str, advance: output.Advance) -> LabelledImages:
    pixels = []
    for index in range(len(images)):
        pixels.append(images.read_one(index))
        advance(index + 1, len(images), f"reading {what} images")
    return LabelledImages(images.name, np.stack(pixels), images.targets)


def _labels(card: ModelCard | None, found: tuple[str, ...], classes: int, quiet: bool) -> tuple[str, ...]:
    """The model's labels; for a model without any, the data's, and that is said."""
    if card is None:
        if len(found) != classes:
            raise UsageError(
                f"the model has {classes} classes and no labels file, and the data has {len(found)} classes. "
                "Write MODEL.labels.txt and MODEL.image.json beside the model, or use data with its classes."
            )
        if not quiet:
            output.print_note("no labels file beside the model: labels are the data's class names, images stretched")
        return found
    if found != card.labels:
        raise UsageError(
            f"the model was trained on the classes {', '.join(card.labels)}, the data has {', '.join(found)}. "
            "Rename the sub-folders to the model's classes."
        )
    return card.labels


def _print_tables(result: ExportResult) -> None:
    manifest = result.manifest
    rows: list[list[object]] = [["keras", "measured", "", "", result.keras_accuracy, ""]]
    for name, graph in manifest.graphs.items():
        proof = graph.evidence
        size = manifest.files[graph.file].size_bytes
        rows.append(
            [
                name,
                f"{proof.obtained}, against {proof.against}",
                f"{proof.max_abs_difference:.1e}",
                f"{100 * proof.agreement.share:.2f} %",
                proof.accuracy,
                format_bytes(size),
            ]
        )
    fp32 = manifest.graphs["fp32"]
    columns = ["graph", "how", "max difference", "agreement", "accuracy [95 %]", "size"]
    output.print_table(f"Proof on {manifest.data['evaluation']}", columns, rows)
    before, after = (sum(counts.values()) for counts in (result.converted_op_counts, fp32.op_counts))
    output.print_line(
        f"Graph: {before} nodes from tf2onnx, {after} after the passes. Emulated: a twin of the graph that rounds "
        "every result to FP16.\n"
    )
    if result.engines:
        columns = ["engine", "product", "for compute capability", "size", "built in"]
        output.print_table(
            "Engines",
            columns,
            [
                [
                    e.key.graph,
                    f"{e.key.product} {e.key.version}",
                    ", ".join(e.key.devices),
                    format_bytes(e.size_bytes),
                    f"{e.build_seconds:.1f} s",
                ]
                for e in result.engines
            ],
        )
        output.print_line("Engines were built, not run: their speed is not measured here.")
    output.print_line(f"Bundle: {result.bundle}")


def format_bytes(size: int) -> str:
    """``1234567`` as ``1.23 MB``, decimal as files are sold."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
