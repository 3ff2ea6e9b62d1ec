"""vggedge export: one Keras model in, one bundle out."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import msgspec
import typer

from vggedge.architecture import PIXELS
from vggedge.cli import output
from vggedge.cli.export_tables import print_export
from vggedge.cli.reading import read_labelled
from vggedge.data import ImageSet
from vggedge.data.selection import divide, open_pair
from vggedge.model import ModelCard, read_card, read_model, read_ranges
from vggedge_export.building import choose_builder
from vggedge_export.calibration import METHODS, cache_folder
from vggedge_export.choosing import AUTO, CALIBRATOR_IMAGES
from vggedge_export.conversion import check_exportable, class_count, normalizing_layer
from vggedge_export.pipeline import ExportConfig, export
from vggedge_export.verification import Images
from vggedge_runtime.bundle import check_replaceable
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec, Normalization
from vggedge_runtime.progress import Advance

NAME = "export"

_PLAN_PIXELS = 1 << 25
"""Of all images that a plan is searched on, which answer some thirty times: 8,192 images at 64x64, 668 at 224."""

_accuracy = partial(typer.Option, rich_help_panel="Accuracy")
_images = partial(typer.Option, rich_help_panel="Images")

_PIXELS: dict[str, Normalization | None] = {
    "raw": None,
    "0..1": Normalization(mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)),
    "-1..1": Normalization(mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5)),
    "imagenet": PIXELS["imagenet"],
    # preprocess_input of keras.applications' VGG and ResNet turns the channels round, too
    "caffe": msgspec.structs.replace(PIXELS["caffe"], order="bgr"),
}
"""--pixels: what is done to pixels from 0 to 255 before the network."""

_Model: TypeAlias = Annotated[Path, typer.Argument(help="MODEL.keras, as written by vggedge train or by Keras.")]
_Calibration: TypeAlias = Annotated[str, typer.Option(help="DATA whose images set the INT8 ranges.")]
_Bundle: TypeAlias = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of the bundle; an older bundle is replaced.")
]
_Evaluation: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="DATA to prove the graphs on, best never seen in training; the rest of --calibration if left out."
    ),
]
_Precision: TypeAlias = Annotated[str, typer.Option(help="Graphs to make, comma-separated.")]
_MaxDrop: TypeAlias = Annotated[
    float | None,
    _accuracy(
        metavar="POINTS",
        help="What a graph may lose against fp32. INT8 graphs that lose more keep layers in float; what still "
        "loses more, or cannot be told from it, is not exported (exit code 3).",
    ),
]
_AcceptUndecided: TypeAlias = Annotated[
    bool, _accuracy("--accept-undecided", help="Export, too, what the images are too few to decide on.")
]
_Calibrator: TypeAlias = Annotated[
    str, _accuracy(help=f"How INT8 ranges are set: {AUTO} compares {', '.join(METHODS)}, or one of them.")
]
_Int8First: TypeAlias = Annotated[
    bool, _accuracy("--int8-first/--no-int8-first", help="The first convolution in INT8, too.")
]
_Int8Last: TypeAlias = Annotated[
    bool, _accuracy("--int8-last/--no-int8-last", help="The layer that makes the logits in INT8, too.")
]
_CalibrationImages: TypeAlias = Annotated[
    int, _images(min=1, help="How many set the INT8 ranges, at most; as many of each class.")
]
_SelectionImages: TypeAlias = Annotated[
    int | None,
    _images(
        min=1,
        help="How many images of --calibration choose the calibrator and the layers in INT8, at most (default: "
        f"{CALIBRATOR_IMAGES}; with --max-drop 2000 / POINTS, fewer where images are large).",
    ),
]
_EvaluationImages: TypeAlias = Annotated[int, _images(min=1, help="How many prove, at most.")]
_Seed: TypeAlias = Annotated[int, _images(min=0, help="Of the choice of all these images.")]
_Cache: TypeAlias = Annotated[bool, _images("--cache/--no-cache", help="Keep calibrations in the user's cache folder.")]
_Engine: TypeAlias = Annotated[bool, typer.Option("--engine/--no-engine", help="Build TensorRT engines, too.")]
_PixelsOption: TypeAlias = Annotated[
    str | None, typer.Option(help=f"What the network takes, if it does not say: {', '.join(_PIXELS)}.")
]


def command(
    model: _Model,
    calibration: _Calibration,
    bundle: _Bundle,
    evaluation: _Evaluation = None,
    precision: _Precision = "fp32,fp16,int8",
    max_drop: _MaxDrop = None,
    accept_undecided: _AcceptUndecided = False,
    calibrator: _Calibrator = AUTO,
    int8_first: _Int8First = True,
    int8_last: _Int8Last = False,
    calibration_images: _CalibrationImages = 200,
    selection_images: _SelectionImages = None,
    evaluation_images: _EvaluationImages = 2000,
    seed: _Seed = 0,
    cache: _Cache = True,
    engine: _Engine = True,
    pixels: _PixelsOption = None,
    json: output.JsonFlag = False,
) -> None:
    """Convert MODEL.keras to a bundle: FP32, FP16 and INT8 graphs, engines, and the proof of each."""
    config = ExportConfig(
        precisions=tuple(part.strip() for part in precision.split(",") if part.strip()),
        calibrator=calibrator,
        quantize_first=int8_first,
        quantize_last=int8_last,
        max_drop=max_drop,
        accept_undecided=accept_undecided,
        engine="auto" if engine else "none",
    )
    # What can be refused without TensorFlow is refused before it loads.
    _check_selection(config, selection_images)
    counts = partial(_Counts, calibration_images, evaluation_images, seed)
    if pixels is not None and pixels not in _PIXELS:
        raise UsageError(f"--pixels is {pixels!r}; known: {', '.join(_PIXELS)}.")
    check_replaceable(bundle)
    card = read_card(model)
    if card is not None and pixels is not None:
        raise UsageError(f"{model}: the image spec beside it says how its pixels are normalised; leave --pixels out.")
    ranges = read_ranges(model)
    sources = open_pair(calibration, evaluation, card.image) if card else None
    if engine:
        choose_builder()
    with output.progress(quiet=json) as advance:
        holder = [_load_model(model, advance)]
        spec = card.image if card else _spec_of(holder[0], pixels)
        sources = sources or open_pair(calibration, evaluation, spec)
        result = export(
            holder.pop,  # export then has the only reference, and frees the weights when it can
            bundle,
            image=spec,
            labels=_labels(card, sources[0].labels, class_count(holder[0]), json),
            images=_read_images(sources, counts(_selection_images(config, selection_images, spec)), advance),
            ranges=ranges,
            cache=cache_folder() if cache else None,
            config=config,
            progress=advance,
        )
    output.print_json(result) if json else print_export(result)


@dataclass(frozen=True)
class _Counts:
    """How many images are for what, at most, and the seed of their choice."""

    calibration: int
    evaluation: int
    seed: int
    selection: int


def _load_model(path: Path, advance: Advance) -> Any:
    # TensorFlow's oneDNN allocator never gives memory back: 0.8 GB more for the full VGG-16 until the end.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    advance(0, 1, "loading the model")
    network, _ = read_model(path)
    advance(1, 1, "loading the model")
    return network


def _read_images(sources: tuple[ImageSet, ImageSet | None], counts: _Counts, advance: Advance) -> Images:
    for each in filter(None, sources):
        output.print_skipped(each.skipped)
    divided = divide(
        *sources,
        calibration_images=counts.calibration,
        selection_images=counts.selection,
        evaluation_images=counts.evaluation,
        seed=counts.seed,
    )
    return Images(
        calibration=read_labelled(divided.calibration, "calibration images", advance),
        selection=read_labelled(divided.selection, "selection images", advance) if divided.selection else None,
        evaluation=read_labelled(divided.evaluation, "evaluation images", advance),
    )


def _check_selection(config: ExportConfig, asked: int | None) -> None:
    if asked is not None and not config.needs_selection:
        raise UsageError(
            f"--selection-images is {asked}, and nothing is to be chosen: that takes INT8 and either --calibrator "
            f"{AUTO} or a --max-drop. Leave the option out, or ask for one of these."
        )


def _selection_images(config: ExportConfig, asked: int | None, spec: ImageSpec) -> int:
    """How many images are to choose on; 0 where nothing is to be chosen.

    A plan needs the more, the smaller the loss that is to be told from chance: at 2000 / POINTS images a plan that
    changes six answers of a thousand and loses nothing in truth is recognised as such nine times of ten.
    """
    if asked is not None or not config.needs_selection:
        return asked or 0
    if config.max_drop is None:
        return CALIBRATOR_IMAGES
    return max(CALIBRATOR_IMAGES, min(round(2000 / config.max_drop), _PLAN_PIXELS // (spec.height * spec.width)))


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
