"""``vggedge train``: images in, MODEL.keras with its labels, image spec and history out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from vggedge.architecture import NORMALIZATIONS, get_spec, parse_input
from vggedge.cli.output import JsonFlag, print_json, print_note, print_skipped, print_table, progress
from vggedge.data import open_images
from vggedge.model import ModelCard, check_output, write_model
from vggedge.training import EpochFigures, History, TrainConfig, train, write_history
from vggedge_runtime.preprocess import ImageSpec

NAME = "train"

_DEFAULTS = TrainConfig()


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
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A folder with a sub-folder for each class, or fingers[:N][@SEED]."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.keras", help="The file to write.")],
    model: Annotated[str, typer.Option("--model", help="A variant that vggedge models lists.")] = "vgg16-compact",
    size: Annotated[
        str | None,
        typer.Option("--size", metavar="HxW", help="Input size in pixels, instead of the variant's."),
    ] = None,
    normalization: Annotated[
        str | None, typer.Option("--normalization", help=f"One of: {', '.join(NORMALIZATIONS)}.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", help="Share from 0 to 1, instead of the variant's.")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="At most so many.")] = _DEFAULTS.epochs,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images a step.")] = _DEFAULTS.batch_size,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", help="Of Adam, at the start.")
    ] = _DEFAULTS.learning_rate,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of every class that is held back.")
    ] = _DEFAULTS.validation_share,
    patience: Annotated[
        int, typer.Option("--patience", help="Epochs without a better validation loss; 0 never stops early.")
    ] = _DEFAULTS.patience,
    seed: Annotated[int, typer.Option("--seed", help="Of split, weights, order and dropout.")] = _DEFAULTS.seed,
    json: JsonFlag = False,
) -> None:
    """Train a VGG on images."""
    check_output(output)
    shape = None if size is None else parse_input(size)
    spec = get_spec(model, input=shape, normalization=normalization, dropout=dropout)
    config = TrainConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation_share=validation,
        patience=patience,
        seed=seed,
    )
    image = ImageSpec(height=spec.input[0], width=spec.input[1])
    images = open_images(data, image)
    print_skipped(images.skipped)
    card = ModelCard(labels=images.labels, image=image)
    spec = msgspec.structs.replace(spec, classes=len(images.labels))
    with progress() as advance:
        result = train(spec, images, config, advance=advance, on_epoch=lambda each: _note(each, epochs))
    files = write_model(result.model, output, card)
    files.append(write_history(result.history, output))
    answer = TrainAnswer(
        model=str(output),
        labels=images.labels,
        files=tuple(str(file) for file in files),
        history=result.history,
    )
    if json:
        print_json(answer)
    else:
        _print_answer(answer)


def _note(figures: EpochFigures, epochs: int) -> None:
    print_note(
        f"epoch {figures.epoch}/{epochs}  loss {figures.loss:.4f}  accuracy {figures.accuracy:.2%}  "
        f"val_loss {figures.val_loss:.4f}  val_accuracy {figures.val_accuracy:.2%}  {figures.seconds:.1f} s"
    )


def _print_answer(answer: TrainAnswer) -> None:
    history = answer.history
    rows = [
        ("variant", history.spec.name),
        ("images", f"{history.training_images:,} to learn from, {history.validation_images:,} held back"),
        ("classes", " ".join(answer.labels) if len(answer.labels) <= 10 else len(answer.labels)),
        ("epochs run", f"{len(history.epochs)} of {history.config.epochs}"),
        ("weights of epoch", history.best_epoch),
        ("its validation accuracy", f"{history.best.val_accuracy:.2%}"),
        ("its validation loss", f"{history.best.val_loss:.4f}"),
        ("seconds", f"{history.seconds:.1f}"),
        *(("written", file) for file in answer.files),
    ]
    print_table("", (answer.model, ""), rows)
