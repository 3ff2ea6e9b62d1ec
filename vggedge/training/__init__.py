"""Train a spec on a set of images: seeded, watched, and stopped when it learns nothing more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import vggedge
from vggedge.architecture import VggSpec
from vggedge.data.base import ImageSet
from vggedge.model import build_vgg, import_keras
from vggedge.training.augmentation import Augmenter, hold_images, measure_colours, read_largest
from vggedge.training.checkpoint import Checkpoint, Run, check_checkpoint, fingerprint
from vggedge.training.config import AugmentationConfig, TrainConfig, get_config
from vggedge.training.fitting import OnEpoch, Shown, fit
from vggedge.training.history import EpochFigures, History, Origin, write_history
from vggedge.training.optimization import best_epoch
from vggedge.training.transfer import Start, build_image_spec, build_transfer_spec, open_network, read_start
from vggedge_runtime.dependencies import version_of
from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.progress import Advance, ignore_progress

if TYPE_CHECKING:
    import keras

__all__ = [
    "AugmentationConfig",
    "EpochFigures",
    "History",
    "OnEpoch",
    "Origin",
    "Start",
    "TrainConfig",
    "TrainResult",
    "build_image_spec",
    "build_transfer_spec",
    "get_config",
    "open_network",
    "read_start",
    "train",
    "write_history",
]


@dataclass(frozen=True)
class TrainResult:
    """A trained model, with the weights of its best epoch and no optimizer, and how it came about."""

    model: keras.Model
    history: History


def train(
    spec: VggSpec,
    data: ImageSet,
    config: TrainConfig,
    *,
    start: Start | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    advance: Advance | None = None,
    on_epoch: OnEpoch | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> TrainResult:
    """Train a network of ``spec`` on ``data``, part of which is held back for validation.

    Writes nothing but the checkpoint. Seeds the global random numbers of Python, NumPy and TensorFlow; the same seed
    gives the same model on the same machine and versions, on a GPU only nearly.

    Args:
        spec: the network; its classes and input are those of ``data``.
        data: labelled images of (height, width, 3) uint8, at least two of every class.
        config: how to train.
        start: where first weights come from; None draws all of them. All layers of the result are trainable again.
        checkpoint: file to write after each epoch; for the caller to remove once the result is safe.
        resume: go on from ``checkpoint``; the result is that of a training that was never stopped.
        advance: told about reading, loading and training.
        on_epoch: told the figures of each epoch as it ends, after its checkpoint was written.
        callbacks: passed on to Keras; their ``model`` shares its layers with the result.

    Raises:
        UsageError: the spec has another number of classes than the data, the scale is below its size, or the
            checkpoint is missing, of another training, or in the way.
        DataError: images of another size than the spec's, unreadable ones, or fewer than two of a class.
        ModelError: the loss became infinite or not a number, or ``start`` or the checkpoint does not fit.
        MissingDependency: TensorFlow or Keras is not installed.
    """
    report = advance or ignore_progress
    started = time.perf_counter()
    config.augmentation.check_size(spec.input)
    _check_data(spec, data)
    training, validation = data.split(config.validation_share, config.seed)
    # A start that does not fit is refused before hours of reading; without one TensorFlow is not needed yet.
    model, origin = (None, None) if start is None else _build(spec, config, start, report)
    kept = None
    if checkpoint is not None:
        run = Run(spec=spec, config=config, data=fingerprint(data), origin=origin)
        kept = _open_checkpoint(checkpoint, run, resume)
    shown, judged = _open_images(spec, training, validation, config, report)
    if model is None:
        model, _ = _build(spec, config, None, report)
    epochs = fit(model, shown, judged, config, report=report, on_epoch=on_epoch, callbacks=callbacks, checkpoint=kept)
    history = History(
        spec=spec,
        config=config,
        data=data.name,
        training_images=len(training),
        validation_images=len(validation),
        epochs=epochs,
        best_epoch=best_epoch(epochs),
        seconds=time.perf_counter() - started + (kept.earlier_seconds if kept else 0),
        versions=_versions(),
        origin=origin,
    )
    return TrainResult(model=model, history=history)


def _build(
    spec: VggSpec, config: TrainConfig, start: Start | None, report: Advance
) -> tuple[keras.Model, Origin | None]:
    """A fresh network, or one with the weights of ``start``, and where those came from."""
    report(0, 1, "loading TensorFlow")
    keras = import_keras()
    report(1, 1, "loading TensorFlow")
    keras.utils.set_random_seed(config.seed)
    model = build_vgg(spec, config.seed, config.initialization)
    return model, None if start is None else start.copy_into(model, spec)


def _open_checkpoint(path: Path, run: Run, resume: bool) -> Checkpoint:
    check_checkpoint(path, resume=resume)
    kept = Checkpoint(path, run)
    if resume:
        kept.read_figures()
    return kept


def _versions() -> dict[str, str | None]:
    return {
        "vggedge": vggedge.__version__,
        "keras": import_keras().__version__,
        "tensorflow": version_of("tensorflow", "tensorflow-cpu"),
    }


def _check_data(spec: VggSpec, data: ImageSet) -> None:
    if spec.classes != len(data.labels):
        raise UsageError(
            f"{data.name}: {len(data.labels)} classes, and the spec has {spec.classes}. "
            f"Use get_spec({spec.name!r}, classes={len(data.labels)})."
        )
    if len(data) == 0:
        raise DataError(f"{data.name}: no images; training needs at least 2 of every class.")
    shape = data.read_one(0).shape
    if shape != spec.input:
        raise DataError(
            f"{data.name}: images of {shape}, and the spec takes {spec.input}. Open the data with an "
            "ImageSpec of the spec's height and width."
        )


def _open_images(
    spec: VggSpec, training: ImageSet, validation: ImageSet, config: TrainConfig, report: Advance
) -> tuple[Shown, Shown]:
    """The images to learn from, augmented, and those to judge by, never augmented; in memory as far as they fit."""
    augmentation, count = config.augmentation, len(training)
    largest = read_largest(training, augmentation)
    read, left = hold_images(count, largest, config.memory_bytes, report, "reading training images")
    judge, _ = hold_images(len(validation), validation.read_one, left, report, "reading validation images")
    colours = measure_colours(count, read, report) if augmentation.colour_shift else None
    augmenter = Augmenter(read, augmentation, spec.input, config.seed, colours)
    return Shown(augmenter.read, training.targets), Shown(lambda _, index: judge(index), validation.targets)
