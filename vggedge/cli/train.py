"""``vggedge train``: images in, MODEL.keras with its labels, image spec, history and learning curves out."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import typer

from vggedge.architecture import NORMALIZATIONS, STAGES, VggSpec, parse_input
from vggedge.cli.output import JsonFlag, print_json, print_note, print_skipped, print_table, progress
from vggedge.data import ImageSet, open_images
from vggedge.model import ModelCard, check_output, write_model
from vggedge.training import (
    AugmentationConfig,
    EpochFigures,
    History,
    Origin,
    Start,
    TrainConfig,
    TrainResult,
    build_image_spec,
    get_config,
    open_network,
    train,
    write_history,
)
from vggedge.training.checkpoint import check_checkpoint, checkpoint_path
from vggedge.training.config import RECIPES
from vggedge.training.curves import write_curves
from vggedge.training.transfer import DEFAULT_VARIANT
from vggedge_runtime.errors import MissingDependency, UsageError

NAME = "train"

_network = partial(typer.Option, rich_help_panel="The network")
_start = partial(typer.Option, rich_help_panel="What it begins with")
_recipe = partial(typer.Option, rich_help_panel="Training (what is not given is the recipe's)")
_augmentation = partial(
    typer.Option, rich_help_panel="Augmentation of training images (what is not given is the recipe's)"
)

DataArgument: TypeAlias = Annotated[
    str,
    typer.Argument(metavar="DATA", help="A folder with a sub-folder a class, FILE.h5, fingers:N@SEED or keras:NAME."),
]
ScaleOption: TypeAlias = Annotated[
    str | None,
    _augmentation(
        metavar="S|SMIN,SMAX|none",
        help="Resize until the shorter side has S pixels, or drawn so many, and cut the input size out anywhere. "
        "Little above the input size where the subject fills the picture.",
    ),
]
ColourShiftOption: TypeAlias = Annotated[
    bool | None, _augmentation("--colour-shift/--no-colour-shift", help="Along the colours in which images differ.")
]


class TrainAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What ``vggedge train --json`` prints.

    Attributes:
        model: the written ``.keras`` file.
        labels: class names in the order of the outputs.
        files: all that was written.
        history: how the model came about.
    """

    model: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    history: History


def command(
    context: typer.Context,
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.keras", help="The file to write.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the same command that was stopped.")] = False,
    json: JsonFlag = False,
    model: Annotated[str | None, _network(help=f"One that vggedge models lists (default: {DEFAULT_VARIANT}).")] = None,
    size: Annotated[str | None, _network(metavar="HxW", help="Input size in pixels, if another than its own.")] = None,
    normalization: Annotated[str | None, _network(help=f"One of: {', '.join(NORMALIZATIONS)}.")] = None,
    dropout: Annotated[float | None, _network(help="Share from 0 to 1, if another than its own.")] = None,
    width: Annotated[float | None, _network(help="Multiplies its channels and hidden dense units.")] = None,
    head: Annotated[str | None, _network(help="dense layers, or gap: global average pooling.")] = None,
    transfer: Annotated[Path | None, _start(metavar="BASE.keras", help="Takes its stages; the head is new.")] = None,
    freeze: Annotated[int | None, _start(help="So many of its stages are not trained (default: 5, all).")] = None,
    initial: Annotated[Path | None, _start(metavar="SHALLOW.keras", help="Takes the layers that fit.")] = None,
    initialization: Annotated[str | None, _start(help="How the others are drawn: auto, he, glorot or paper.")] = None,
    recipe: Annotated[str, _recipe(help=f"{' or '.join(RECIPES)} (arXiv 1409.1556).")] = RECIPES[0],
    epochs: Annotated[int | None, _recipe(help="At most so many.")] = None,
    batch_size: Annotated[int | None, _recipe(help="Images a step.")] = None,
    optimizer: Annotated[str | None, _recipe(help="adam or sgd.")] = None,
    learning_rate: Annotated[float | None, _recipe(help="At its highest.")] = None,
    momentum: Annotated[float | None, _recipe(help="Of sgd.")] = None,
    weight_decay: Annotated[float | None, _recipe(help="Share of each kernel that is added to its gradient.")] = None,
    schedule: Annotated[str | None, _recipe(help="Of the learning rate: cosine, constant or plateau.")] = None,
    plateau_patience: Annotated[int | None, _recipe(help="Epochs without gain until plateau acts.")] = None,
    patience: Annotated[int | None, _recipe(help="Epochs without gain until the others stop; 0: never.")] = None,
    validation_share: Annotated[float | None, _recipe("--validation", help="Held back, of every class.")] = None,
    seed: Annotated[int | None, _recipe(help="Of split, weights, order, augmentation and dropout.")] = None,
    scale: ScaleOption = None,
    flip: Annotated[bool | None, _augmentation("--flip/--no-flip", help="Mirror half of them, at random.")] = None,
    colour_shift: ColourShiftOption = None,
) -> None:
    """Train a VGG on images."""
    _check_kept(check_output(output), transfer=transfer, initial=initial)
    check_checkpoint(checkpoint_path(output), resume=resume)
    choices = {name: context.params[name] for name in TrainConfig.__struct_fields__ if name in context.params}
    choices |= {"scale": scale, "flip": flip, "colour_shift": colour_shift}
    get_config(recipe, (1, 1, 3), **choices)  # what is wrong at any size is said before a base loads TensorFlow
    spec, start = open_network(
        variant=model,
        transfer=transfer,
        initial=initial,
        frozen_stages=freeze,
        input=None if size is None else parse_input(size),
        normalization=normalization,
        dropout=dropout,
        width=width,
        head=head,
    )
    config = get_config(recipe, spec.input, **choices)
    image = build_image_spec(spec, start, config)
    config = config.with_kernel(image.kernel)
    images = open_images(data, image)
    print_skipped(images.skipped)
    spec = msgspec.structs.replace(spec, classes=len(images.labels))
    result = _train(spec, images, config, start, checkpoint_path(output), resume)
    answer = _write(result, output, ModelCard(labels=images.labels, image=image))
    if json:
        print_json(answer)
    else:
        _print_answer(answer)


def print_epoch(epochs: int, figures: EpochFigures) -> None:
    """Tell the figures of an epoch, of so many ``epochs``, as it ends."""
    print_note(
        f"epoch {figures.epoch}/{epochs}  loss {figures.loss:.4f}  accuracy {figures.accuracy:.2%}  "
        f"val_loss {figures.val_loss:.4f}  val_accuracy {figures.val_accuracy:.2%}  "
        f"rate {figures.learning_rate:.2g}  {figures.seconds:.1f} s"
    )


def _check_kept(output: Path, **bases: Path | None) -> None:
    for option, base in bases.items():
        if base is not None and base.resolve() == output.resolve():
            raise UsageError(f"--{option} {base}: it would be replaced by its own result. Give --output another name.")


def _train(
    spec: VggSpec, images: ImageSet, config: TrainConfig, start: Start | None, checkpoint: Path, resume: bool
) -> TrainResult:
    try:
        with progress() as advance:
            return train(
                spec,
                images,
                config,
                start=start,
                checkpoint=checkpoint,
                resume=resume,
                advance=advance,
                on_epoch=partial(print_epoch, config.epochs),
            )
    except KeyboardInterrupt:
        if checkpoint.exists():
            print_note(f"{checkpoint} has all epochs that were finished; the same command with --resume goes on there.")
        raise


def _write(result: TrainResult, output: Path, card: ModelCard) -> TrainAnswer:
    """Write everything; the checkpoint goes when the model is safe."""
    files = write_model(result.model, output, card)
    files.append(write_history(result.history, output))
    checkpoint_path(output).unlink(missing_ok=True)
    try:
        files.append(write_curves(result.history, output))
    except MissingDependency as error:
        print_note(f"no learning curves: {error}")
    return TrainAnswer(
        model=str(output), labels=card.labels, files=tuple(str(file) for file in files), history=result.history
    )


def _print_answer(answer: TrainAnswer) -> None:
    history, config = answer.history, answer.history.config
    rows = [
        ("variant", history.spec.name),
        ("images", f"{history.training_images:,} to learn from, {history.validation_images:,} held back"),
        ("classes", " ".join(answer.labels) if len(answer.labels) <= 10 else len(answer.labels)),
        ("optimizer", f"{config.optimizer}, rate {config.learning_rate:g}, {config.schedule}"),
        *_describe_augmentation(config.augmentation),
        *_describe_origin(history.origin),
        ("epochs run", f"{len(history.epochs)} of {config.epochs}"),
        ("weights of epoch", history.best_epoch),
        ("its validation accuracy", f"{history.best.val_accuracy:.2%}"),
        ("its validation loss", f"{history.best.val_loss:.4f}"),
        ("seconds", f"{history.seconds:.1f}"),
        *(("written", file) for file in answer.files),
    ]
    print_table("", (answer.model, ""), rows)


def _describe_augmentation(config: AugmentationConfig) -> list[tuple[str, str]]:
    parts = []
    if config.scale is not None:
        parts.append("scale " + " to ".join(str(each) for each in dict.fromkeys(config.scale)))
    if config.flip:
        parts.append("flip")
    if config.colour_shift:
        parts.append("colour shift")
    return [("augmentation", ", ".join(parts))] if parts else []


def _describe_origin(origin: Origin | None) -> list[tuple[str, str]]:
    if origin is None:
        return []
    frozen = f"; {origin.frozen_stages} of {STAGES} stages frozen" if origin.kind == "transfer" else ""
    layers = f"{len(origin.layers)} layers, {origin.layers[0]} to {origin.layers[-1]}"
    return [("begins with", f"{origin.model}: {layers}{frozen}")]
