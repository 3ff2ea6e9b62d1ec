"""``vggedge import-weights``: weights that others trained in, MODEL.keras with its labels and image spec out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vggedge.analysis import analyse
from vggedge.architecture import HEADS, SpecPixels, parse_input
from vggedge.cli.output import JsonFlag, print_json, print_note, print_table, progress
from vggedge.model import check_output, write_model
from vggedge.weights import ImportConfig, ImportedModel, import_weights, read_labels
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec

NAME = "import-weights"

_PIXELS = {
    "caffe": "minus ImageNet's means (caffe)",
    "imagenet": "ImageNet mean and deviation (imagenet)",
}
"""What the network's first layer makes of RGB pixels from 0 to 255, for people."""


class ImportAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What ``vggedge import-weights --json`` prints.

    Attributes:
        model: the written ``.keras`` file.
        source: where the weights come from.
        format: what kind of file that is.
        variant: a name that ``vggedge models`` lists.
        normalization: one of vggedge.architecture.NORMALIZATIONS.
        input: (height, width, 3), pixels.
        image: how images become the input.
        classes: outputs.
        labels: class names in their order.
        parameters: stored numbers.
        pixels: what the first layer makes of RGB pixels from 0 to 255, a key of vggedge.architecture.PIXELS.
        head: ``dense`` or ``gap``.
        is_head_trained: False where the head is new and random.
        files: all that was written.
    """

    model: str
    source: str
    format: str
    variant: str
    normalization: str
    input: tuple[int, int, int]
    image: ImageSpec
    classes: int
    labels: tuple[str, ...]
    parameters: int
    pixels: SpecPixels
    head: str
    is_head_trained: bool
    files: tuple[str, ...]


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE|imagenet",
            help="A .keras, .weights.h5 or .h5 file of keras.applications' VGG16 or VGG19, a .safetensors state dict "
            "of a VGG from torchvision, or imagenet: Keras's own weights, downloaded.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.keras", help="The file to write.")],
    model: Annotated[str | None, typer.Option("--model", help="With imagenet: vgg16 (default) or vgg19.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="HxW",
            help="Input size in pixels, instead of that of the weights. A trained head allows no other; torchvision's "
            "pools other sizes to 7x7, which this network does not.",
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option("--labels", metavar="FILE", help="Class names, one a line; numbers without it.")
    ] = None,
    no_top: Annotated[
        bool, typer.Option("--no-top", help="Leave the dense layers out and put an untrained head on.")
    ] = False,
    classes: Annotated[int | None, typer.Option("--classes", help="Outputs of the untrained head.")] = None,
    head: Annotated[
        str | None, typer.Option("--head", help=f"The untrained head: {' or '.join(HEADS)}; gap without it.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Take over VGG weights from keras.applications or torchvision."""
    check_output(output)
    if Path(source).resolve() == output.resolve():
        raise UsageError(f"{source}: it would be replaced by its own import. Give --output another name.")
    config = ImportConfig(
        model=model,
        input=None if size is None else parse_input(size),
        top=not no_top,
        classes=classes,
        labels=None if labels is None else read_labels(labels),
        head=head,
    )
    with progress() as advance:
        found = import_weights(source, config, advance=advance)
        advance(0, 1, "writing")
        files = write_model(found.model, output, found.card)
        advance(1, 1, "writing")
    _print_notes(found, output)
    answer = _build_answer(found, source, files)
    if json:
        print_json(answer)
    else:
        _print_answer(answer)


def _build_answer(found: ImportedModel, source: str, files: list[Path]) -> ImportAnswer:
    return ImportAnswer(
        model=str(files[0]),
        source=source,
        format=found.format,
        variant=found.spec.name,
        normalization=found.spec.normalization,
        input=found.spec.input,
        image=found.card.image,
        classes=found.spec.classes,
        labels=found.card.labels,
        parameters=analyse(found.spec).parameters,
        pixels=found.spec.pixels,
        head=found.spec.head,
        is_head_trained=found.is_head_trained,
        files=tuple(map(str, files)),
    )


def _print_notes(found: ImportedModel, output: Path) -> None:
    if not found.has_names:
        print_note(f"the labels are the numbers 0 to {found.spec.classes - 1}; --labels FILE gives names.")
    if not found.is_head_trained:
        print_note(f"the head is untrained and answers at random: vggedge train DATA --transfer {output} gives it one.")


def _print_answer(answer: ImportAnswer) -> None:
    rows = [
        ("variant", answer.variant),
        ("normalization", answer.normalization),
        ("weights from", answer.format),
        ("input", "x".join(map(str, answer.input))),
        ("images", answer.image.describe()),
        ("classes", answer.classes),
        ("parameters", f"{answer.parameters:,}"),
        ("pixels", _PIXELS[answer.pixels]),
        ("head", f"{answer.head}, {'trained' if answer.is_head_trained else 'UNTRAINED'}"),
        *(("written", file) for file in answer.files),
    ]
    print_table("", (answer.model, ""), rows)
