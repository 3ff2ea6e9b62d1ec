"""Fine-tune a trained model on the INT8 grid, watched as training is; where no epoch helps the base's weights stay.

What is tuned is the network on that grid, where ranges clip: in float32, in FP16 or with other ranges the same weights
may do worse than the base.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import vggedge
from vggedge.data.base import ImageSet
from vggedge.evaluation import build_predict, evaluate
from vggedge.model import HISTORY_SUFFIX, import_keras
from vggedge.training.augmentation import hold_images
from vggedge.training.config import TrainConfig
from vggedge.training.fitting import OnEpoch, Shown, fit
from vggedge.training.history import EpochFigures, write_whole
from vggedge.training.optimization import best_epoch
from vggedge.training.quantization_aware import fake_quantized, measure_ranges, normalize
from vggedge_runtime.dependencies import version_of
from vggedge_runtime.errors import DataError, UsageError
from vggedge_runtime.preprocess import Normalization
from vggedge_runtime.progress import Advance, ignore_progress

if TYPE_CHECKING:
    import keras


def default_config(**changes: Any) -> TrainConfig:
    """How to fine-tune where nothing else is said, with what is not None in place of its own values."""
    given = {name: value for name, value in changes.items() if value is not None}
    return TrainConfig(**{"epochs": 3, "learning_rate": 5e-4, "patience": 0, **given})


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """How a network answers the images held back: accuracy as a share, loss as mean cross-entropy in nats."""

    accuracy: float
    loss: float


class FinetuneHistory(msgspec.Struct, frozen=True, kw_only=True):
    """How a fine-tuned model came about: what its ``MODEL.history.json`` holds.

    Attributes:
        base: file of the model that was tuned.
        config: how it was tuned; what concerns fresh weights or augmentation is not used.
        data: name of the image set.
        training_images: images it learnt from.
        validation_images: images that judged it, of the same set.
        calibration_images: of the training images, those that set the ranges.
        ranges: by layer, the magnitude of its input that is 127 INT8 steps.
        float32: the base on the images held back, as it came.
        before: the same quantised, before tuning.
        epochs: figures of every epoch, all quantised.
        tuned_float32: the model that was kept, in float32, on the images held back: what the graphs fp32, fp16 and
            int8-rtx are made of. They do not have the clipping of the INT8 grid that it was tuned on.
        best_epoch: the epoch, counted from 1, whose weights the model has; 0 if none had a lower validation loss than
            the quantised base, whose weights it then keeps.
        seconds: in all, without loading TensorFlow.
        versions: of vggedge, keras and tensorflow.
    """

    base: str
    config: TrainConfig
    data: str
    training_images: int
    validation_images: int
    calibration_images: int
    ranges: dict[str, float]
    float32: Judgement
    before: Judgement
    epochs: tuple[EpochFigures, ...]
    best_epoch: int
    tuned_float32: Judgement
    seconds: float
    versions: dict[str, str | None]

    @property
    def after(self) -> Judgement:
        """The model that was kept, quantised, on the images held back."""
        if self.best_epoch == 0:
            return self.before
        best = self.epochs[self.best_epoch - 1]
        return Judgement(accuracy=best.val_accuracy, loss=best.val_loss)


def write_finetune_history(history: FinetuneHistory, model_path: Path) -> Path:
    """Write ``MODEL.history.json`` beside ``MODEL.keras``, complete or not at all; returns its path.

    Raises:
        ModelError: the disk refused.
    """
    content = msgspec.json.format(msgspec.json.encode(history), indent=2) + b"\n"
    return write_whole(model_path.with_suffix(HISTORY_SUFFIX), content)


def finetune(
    model: keras.Model,
    data: ImageSet,
    config: TrainConfig,
    *,
    base: str,
    calibration_images: int = 200,
    normalization: Normalization | None = None,
    advance: Advance = ignore_progress,
    on_epoch: OnEpoch | None = None,
) -> FinetuneHistory:
    """Tune the weights of ``model``, in place, for INT8; part of ``data`` is held back to judge each epoch.

    With the seed and data that trained the model the images held back are those that were held back then. Seeds the
    global random numbers of Python, NumPy and TensorFlow.

    Args:
        model: a trained classifier that gives probabilities; what is trainable in it is the same afterwards.
        data: labelled images of the model's input size, in the model's order of classes.
        config: how to tune; ``initialization`` and ``augmentation`` have no effect.
        base: name of the model, for the history.
        calibration_images: training images that set the ranges, of every class its share.
        normalization: of pixels, where the model does not normalise them itself.
        advance: told about calibrating, reading and training.
        on_epoch: told the figures of each epoch as it ends.

    Raises:
        UsageError: ``calibration_images`` is below 1.
        DataError: images of another size, unreadable ones, or fewer than two of a class.
        ModelError: INT8 quantises nothing of the model, it gives no probabilities, or the loss became no finite number.
    """
    started = time.perf_counter()
    _check(model, data, calibration_images)
    training, validation = data.split(config.validation_share, config.seed)
    calibration = training.take(calibration_images, config.seed)
    import_keras().utils.set_random_seed(config.seed)
    ranges = measure_ranges(model, calibration, normalization, advance)
    shown, judged, validation = _open_images(training, validation, config, advance)
    float32 = _judge(model, validation, normalization, advance)
    original = model.get_weights()
    with fake_quantized(model, ranges), _frozen_statistics(model):
        before = _judge(model, validation, normalization, advance)
        network = _normalized(model, normalization)
        epochs = fit(network, shown, judged, config, report=advance, on_epoch=on_epoch, callbacks=(), checkpoint=None)
    best_epoch = _keep_best(model, epochs, before, original)
    return FinetuneHistory(
        base=base,
        config=config,
        data=data.name,
        training_images=len(training),
        validation_images=len(validation),
        calibration_images=len(calibration),
        ranges=ranges,
        float32=float32,
        before=before,
        epochs=epochs,
        best_epoch=best_epoch,
        tuned_float32=_judge(model, validation, normalization, advance),
        seconds=time.perf_counter() - started,
        versions=_versions(),
    )


def _open_images(
    training: ImageSet, validation: ImageSet, config: TrainConfig, report: Advance
) -> tuple[Shown, Shown, ImageSet]:
    """What to learn from and what to judge by, in memory as far as it fits; the latter also as a set of images."""
    read, left = hold_images(len(training), training.read_one, config.memory_bytes, report, "reading training images")
    judge, _ = hold_images(len(validation), validation.read_one, left, report, "reading validation images")
    shown = Shown(lambda _, index: read(index), training.targets)
    return shown, Shown(lambda _, index: judge(index), validation.targets), replace(validation, read_one=judge)


def _keep_best(model: keras.Model, epochs: Sequence[EpochFigures], before: Judgement, original: Any) -> int:
    """The epoch whose weights ``model``, which has those of the best one, keeps: 0 where it gets the original ones."""
    best = best_epoch(epochs)
    if epochs[best - 1].val_loss < before.loss:
        return best
    model.set_weights(original)
    return 0


def _versions() -> dict[str, str | None]:
    return {
        "vggedge": vggedge.__version__,
        "keras": import_keras().__version__,
        "tensorflow": version_of("tensorflow", "tensorflow-cpu"),
    }


@contextmanager
def _frozen_statistics(model: keras.Model) -> Iterator[None]:
    """Within the block BatchNorm stays as it is; afterwards every layer is as trainable as it was before."""
    norm = import_keras().layers.BatchNormalization
    # Models before their layers: what is said of a model is said of all its layers.
    trainable = {layer: layer.trainable for layer in _with_nested_models(model)}
    try:
        for layer in trainable:
            if isinstance(layer, norm):
                layer.trainable = False
        yield
    finally:
        for layer, was in trainable.items():
            layer.trainable = was


def _with_nested_models(model: Any) -> Iterator[Any]:
    yield model
    for layer in getattr(model, "layers", ()):
        yield from _with_nested_models(layer)


def _normalized(model: keras.Model, normalization: Normalization | None) -> keras.Model:
    """A model that takes pixels and shares all layers with ``model``."""
    if normalization is None:
        return model
    keras = import_keras()
    pixels = keras.Input(model.inputs[0].shape[1:])
    return keras.Model(pixels, model(normalize(pixels, normalization)))


def _judge(model: keras.Model, images: ImageSet, normalization: Normalization | None, progress: Advance) -> Judgement:
    # A model of its own: Keras would go on with the function that it compiled for another grid.
    fresh = import_keras().Model(model.inputs[0], model.outputs[0])
    found = evaluate(build_predict(fresh, normalization=normalization), images, progress=progress)
    return Judgement(accuracy=found.accuracy.share, loss=found.cross_entropy)


def _check(model: keras.Model, data: ImageSet, calibration_images: int) -> None:
    if calibration_images < 1:
        raise UsageError(f"calibration images are {calibration_images}; needed is at least 1.")
    if len(data) == 0:
        raise DataError(f"{data.name}: no images; fine-tuning needs at least 2 of every class.")
    found, needed = data.read_one(0).shape, tuple(model.inputs[0].shape[1:])
    if found != needed:
        raise DataError(f"{data.name}: images of {found}, and the model takes {needed}. Fine-tuning needs both equal.")
    if model.outputs[0].shape[-1] != len(data.labels):
        raise DataError(
            f"{data.name}: {len(data.labels)} classes, and the model has {model.outputs[0].shape[-1]} outputs; needed "
            "is one output a class."
        )
