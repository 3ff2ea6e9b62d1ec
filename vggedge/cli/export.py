"""vggedge export: one Keras model in, one bundle out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from vggedge.architecture import PIXELS
from vggedge.cli import output
from vggedge.data import ImageSet
from vggedge.data.selection import divide, open_pair
from vggedge.model import ModelCard, read_card, read_model
from vggedge_export.conversion import check_exportable, class_count, normalizing_layer
from vggedge_export.pipeline import ExportConfig, ExportResult, export
from vggedge_export.verification import LabelledImages
from vggedge_runtime.bundle import check_replaceable
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec, Normalization, Pixels
from vggedge_runtime.progress import Advance
from vggedge_runtime.tensorrt_api import load_tensorrt

NAME = "export"

_PIXELS: dict[str, Normalization | None] = {
    "raw": None,
    "0..1": Normalization(mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)),
    "-1..1": Normalization(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
    "imagenet": PIXELS["imagenet"],
    # preprocess_input of keras.applications' VGG and ResNet turns the channels round, too
    "caffe": msgspec.structs.replace(PIXELS["caffe"], order="bgr"),
}
"""--pixels: what is done to pixels from 0 to 255 before the network."""


def command(
    model: Annotated[Path, typer.Argument(help="MODEL.keras, as written by vggedge train or by Keras.")],
    calibration: Annotated[str, typer.Option(help="DATA whose images set the INT8 ranges.")],
    bundle: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle; an older bundle is replaced.")],
    evaluation: Annotated[
        str | None,
        typer.Option(
            help="DATA to prove the graphs on, best never seen in training; the rest of --calibration if left out."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="Graphs to make, comma-separated.")] = "fp32,fp16,int8",
    calibration_images: Annotated[int, typer.Option(min=1, help="How many images to calibrate on.")] = 200,
    evaluation_images: Annotated[int, typer.Option(min=1, help="How many images, at most, to prove on.")] = 2000,
    engine: Annotated[bool, typer.Option("--engine/--no-engine", help="Build TensorRT engines, too.")] = True,
    pixels: Annotated[
        str | None, typer.Option(help=f"What the network takes, if it does not say: {', '.join(_PIXELS)}.")
    ] = None,
    json: output.JsonFlag = False,
) -> None:
    """Convert MODEL.keras to a bundle: FP32, FP16 and INT8 graphs, engines, and the proof of each."""
    config = ExportConfig(
        precisions=tuple(part.strip() for part in precision.split(",") if part.strip()),
        engine="auto" if engine else "none",
    )
    # What can be refused without TensorFlow is refused before it loads.
    if pixels is not None and pixels not in _PIXELS:
        raise UsageError(f"--pixels is {pixels!r}; known: {', '.join(_PIXELS)}.")
    check_replaceable(bundle)
    card = read_card(model)
    if card is not None and pixels is not None:
        raise UsageError(f"{model}: the image spec beside it says how its pixels are normalised; leave --pixels out.")
    sources = open_pair(calibration, evaluation, card.image) if card else None
    if engine:
        load_tensorrt()
    # TensorFlow's oneDNN allocator never gives memory back: 0.8 GB more for the full VGG-16 until the end.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    with output.progress(quiet=json) as advance:
        advance(0, 1, "loading the model")
        network, _ = read_model(model)
        advance(1, 1, "loading the model")
        spec = card.image if card else _spec_of(network, pixels)
        sources = sources or open_pair(calibration, evaluation, spec)
        for each in filter(None, sources):
            output.print_skipped(each.skipped)
        labels = _labels(card, sources[0].labels, class_count(network), json)
        chosen, held_out = divide(*sources, calibration_images, evaluation_images)
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


def _spec_of(network: Any, pixels: str | None) -> ImageSpec:
    """Image spec of a model that came without one: its input's size, and what the user says of its pixels.

    Guessing would be worse than asking: a model trained on x/255 and fed 0 to 255 answers, wrongly.
    """
    normalization = _PIXELS[pixels] if pixels is not None else None
    check_exportable(network, normalization)
    if normalizing_layer(network) is None and pixels is None:
        raise UsageError(
            "the model has no Rescaling or Normalization layer and no image spec beside it, so nothing says what its "
            f"pixels were divided by in training. Say it with --pixels: {', '.join(_PIXELS)}."
        )
    _, height, width, _ = network.inputs[0].shape
    return ImageSpec(height=height, width=width, normalization=normalization)


def _load(images: ImageSet, what: str, advance: Advance) -> LabelledImages:
    pixels: Pixels | None = None
    for index in range(len(images)):
        image = images.read_one(index)
        if pixels is None:
            pixels = np.empty((len(images), *image.shape), np.uint8)
        pixels[index] = image
        advance(index + 1, len(images), f"reading {what} images")
    if pixels is None:
        raise UsageError(f"{images.name}: no images for {what}.")
    return LabelledImages(images.name, pixels, images.targets)


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
    rows: list[list[object]] = [["keras", "measured", "", "", manifest.keras_accuracy, ""]]
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
                output.format_bytes(size),
            ]
        )
    fp32 = manifest.graphs["fp32"]
    columns = ["graph", "how", "max difference", "agreement", "accuracy [95 %]", "size"]
    output.print_table(f"Proof on {manifest.data['evaluation']}", columns, rows)
    folded = next(step.nodes_after for step in manifest.passes if step.name == "fold_constants")
    for words in manifest.adaptations:
        output.print_line(f"Adapted: {words}.")
    output.print_line(
        f"Graph: {folded} nodes once the weights are folded, {sum(fp32.op_counts.values())} after all passes. "
        "Emulated: a twin of the graph that rounds every result to FP16.\n"
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
                    output.format_bytes(e.size_bytes),
                    f"{e.build_seconds:.1f} s",
                ]
                for e in result.engines
            ],
        )
        output.print_line("Engines were built, not run: their speed is not measured here.")
    output.print_line(f"Bundle: {result.bundle}")
