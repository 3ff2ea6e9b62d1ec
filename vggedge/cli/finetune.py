"""``vggedge finetune``: a trained model in, the same model tuned for INT8 out, with the ranges that export takes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from vggedge.cli.output import JsonFlag, print_json, print_line, print_note, print_table, progress
from vggedge.cli.reading import open_labelled
from vggedge.cli.train import DataArgument, print_epoch
from vggedge.data import ImageSet
from vggedge.model import ModelCard, check_output, read_card, read_model, write_model
from vggedge.training import TrainConfig
from vggedge.training.finetuning import (
    FinetuneHistory,
    Judgement,
    default_config,
    finetune,
    write_finetune_history,
)
from vggedge_export.conversion import check_exportable
from vggedge_runtime.errors import ModelError, UsageError

NAME = "finetune"

_DEFAULT = default_config()
_tuning = partial(typer.Option, rich_help_panel="Fine-tuning")


class FinetuneAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What ``vggedge finetune --json`` prints.

    Attributes:
        model: the written ``.keras`` file.
        labels: class names in the order of the outputs.
        files: all that was written.
        history: how the model came about.
    """

    model: str
    labels: tuple[str, ...]
    files: tuple[str, ...]
    history: FinetuneHistory


def command(
    base: Annotated[Path, typer.Argument(metavar="BASE.keras", help="A trained model, its labels and image spec.")],
    data: DataArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="MODEL.keras", help="The file to write.")],
    json: JsonFlag = False,
    epochs: Annotated[int, _tuning(help="Passes over the images.")] = _DEFAULT.epochs,
    learning_rate: Annotated[float, _tuning(help="Of adam, at its highest.")] = _DEFAULT.learning_rate,
    batch_size: Annotated[int, _tuning(help="Images a step.")] = _DEFAULT.batch_size,
    validation_share: Annotated[
        float, _tuning("--validation", help="Held back, of every class.")
    ] = _DEFAULT.validation_share,
    calibration_images: Annotated[int, _tuning(help="Training images that set the ranges of activations.")] = 200,
    seed: Annotated[int, _tuning(help="Of split, calibration, order and dropout; best that of training.")] = 0,
) -> None:
    """Tune a trained model for INT8, where it loses accuracy when export quantises it as it is."""
    if base.resolve() == check_output(output).resolve():
        raise UsageError(f"{base}: it would be replaced by its own result. Give --output another name.")
    if calibration_images < 1:
        raise UsageError(f"--calibration-images is {calibration_images}; needed is at least 1.")
    config = default_config(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        validation_share=validation_share,
        seed=seed,
    )
    card = read_card(base)
    if card is None:
        raise ModelError(
            f"{base}: neither labels nor image spec are beside it; needed are {base.stem}.labels.txt, a class a line, "
            f"and {base.stem}.image.json."
        )
    images = open_labelled(data, card.image, card.labels, "the network")
    history, model = _finetune(base, card, images, config, calibration_images)
    files = write_model(model, output, card, ranges=history.ranges)
    files.append(write_finetune_history(history, output))
    answer = FinetuneAnswer(
        model=str(output), labels=card.labels, files=tuple(str(file) for file in files), history=history
    )
    if json:
        print_json(answer)
    else:
        _print_answer(answer)


def _finetune(
    base: Path, card: ModelCard, images: ImageSet, config: TrainConfig, calibration_images: int
) -> tuple[FinetuneHistory, Any]:
    """How it went, and the tuned model."""
    with progress() as advance:
        advance(0, 1, "loading the model")
        model, _ = read_model(base)
        check_exportable(model, card.image.normalization)  # what export refuses is not worth the tuning
        advance(1, 1, "loading the model")
        history = finetune(
            model,
            images,
            config,
            base=base.name,
            calibration_images=calibration_images,
            normalization=card.image.normalization,
            advance=advance,
            on_epoch=partial(print_epoch, config.epochs),
        )
    if history.best_epoch == 0:
        print_note(
            "no epoch had a lower validation loss than the base quantised as it is: the weights are the base's. "
            "Try a lower --learning-rate, or export the base itself."
        )
    return history, model


def _print_answer(answer: FinetuneAnswer) -> None:
    history, config = answer.history, answer.history.config
    rows = [
        ("base", history.base),
        ("images", f"{history.training_images:,} to learn from, {history.validation_images:,} held back"),
        ("quantised layers", len(history.ranges)),
        ("ranges from", f"{history.calibration_images:,} images"),
        ("optimizer", f"{config.optimizer}, rate {config.learning_rate:g}, {config.schedule}"),
        ("epochs run", f"{len(history.epochs)} of {config.epochs}"),
        ("weights of epoch", history.best_epoch or "none: the base's"),
        ("validation, base in float32", _describe(history.float32)),
        ("validation, base in INT8", _describe(history.before)),
        ("validation, tuned in INT8 (chose the epoch)", _describe(history.after)),
        ("validation, tuned in float32", _describe(history.tuned_float32)),
        ("seconds", f"{history.seconds:.1f}"),
        *(("written", file) for file in answer.files),
    ]
    print_table("", (answer.model, ""), rows)
    print_line(
        "It was tuned on the INT8 grid: take its graph int8, and fp32, fp16 and int8-rtx from the base, where that is "
        "better in float32."
    )


def _describe(judgement: Judgement) -> str:
    return f"{judgement.accuracy:.2%}, loss {judgement.loss:.4f}"
