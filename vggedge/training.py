"""Train a spec on a set of images: seeded, watched, and stopped when it learns nothing more."""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

import vggedge
from vggedge.architecture import VggSpec
from vggedge.data.base import ImageSet
from vggedge.model import build_vgg, import_keras
from vggedge_runtime.dependencies import version_of
from vggedge_runtime.errors import DataError, ModelError, UsageError
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import Advance, ignore_progress

if TYPE_CHECKING:
    import keras

HISTORY_SUFFIX = ".history.json"

OnEpoch: TypeAlias = Callable[["EpochFigures"], None]
"""Called with the figures of each epoch as it ends."""

_READ_STEP = 32  # images between two reports


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train.

    Attributes:
        epochs: at most so many passes over the images.
        batch_size: images for each step.
        learning_rate: of Adam (Kingma & Ba 2014, arXiv 1412.6980), at its highest.
        schedule: ``cosine`` rises from a tenth over the first tenth of all steps, then falls to 0 at the end of
            ``epochs`` (Loshchilov & Hutter 2016, arXiv 1608.03983, without restarts); ``constant`` stays.
        validation_share: of every class, held back to judge each epoch.
        patience: epochs without a better validation loss before training stops; 0 never stops early.
        seed: of the split, the weights, the order of the images and the dropout.
        memory_bytes: images that take no more than this as uint8 are kept in memory, others are read
            again in every epoch.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    validation_share: float = 0.1
    patience: int = 5
    seed: int = 0
    memory_bytes: int = 2**30

    def __post_init__(self) -> None:
        for name, is_right, needed in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("learning_rate", 0 < self.learning_rate < math.inf, "a finite number above 0"),
            ("schedule", self.schedule in ("cosine", "constant"), "cosine or constant"),
            ("validation_share", 0 < self.validation_share < 1, "a share above 0 and below 1, such as 0.1"),
            ("patience", self.patience >= 0, "at least 0, which never stops early"),
            ("seed", 0 <= self.seed < 2**32, "from 0 to 4294967295"),
            ("memory_bytes", self.memory_bytes >= 0, "at least 0"),
        ):
            if not is_right:
                raise UsageError(f"{name} is {getattr(self, name)}; needed is {needed}.")


class EpochFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One epoch. Losses are mean cross-entropies in nats, accuracies shares.

    ``loss`` and ``accuracy`` are means over the epoch, with dropout and while the weights changed;
    ``val_loss`` and ``val_accuracy`` are of the weights at its end.
    """

    epoch: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


class History(msgspec.Struct, frozen=True, kw_only=True):
    """How a model came about: what ``MODEL.history.json`` holds.

    Attributes:
        spec: the network.
        config: how it was trained.
        data: name of the image set.
        training_images: images it learnt from.
        validation_images: images that judged it, of the same set.
        epochs: figures of every epoch that was run.
        best_epoch: the epoch, counted from 1, whose weights the model has: least validation loss.
        seconds: in all, with reading the images and loading TensorFlow.
        versions: of vggedge, keras and tensorflow.
    """

    spec: VggSpec
    config: TrainConfig
    data: str
    training_images: int
    validation_images: int
    epochs: tuple[EpochFigures, ...]
    best_epoch: int
    seconds: float
    versions: dict[str, str | None]

    @property
    def best(self) -> EpochFigures:
        """The epoch whose weights the model has."""
        return self.epochs[self.best_epoch - 1]


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
    advance: Advance | None = None,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train a fresh network of ``spec`` on ``data``, part of which is held back for validation.

    Writes nothing. Seeds the global random numbers of Python, NumPy and TensorFlow; the same seed gives
    the same model on the same machine and versions, on a GPU only nearly.

    Args:
        spec: the network; its classes and input are those of ``data``.
        data: labelled images of (height, width, 3) uint8, at least two of every class.
        config: how to train.
        advance: told about reading, loading and training.
        on_epoch: told the figures of each epoch as it ends.

    Raises:
        UsageError: the spec has another number of classes than the data.
        DataError: images of another size than the spec's, unreadable ones, or fewer than two of a class.
        ModelError: the loss became infinite or not a number.
        MissingDependency: TensorFlow or Keras is not installed.
    """
    report = advance or ignore_progress
    started = time.perf_counter()
    _check_data(spec, data)
    training, validation = data.split(config.validation_share, config.seed)
    if len(data) * math.prod(spec.input) <= config.memory_bytes:
        training = _hold_images(training, spec, report, "reading training images")
        validation = _hold_images(validation, spec, report, "reading validation images")

    report(0, 1, "loading TensorFlow")
    keras = import_keras()
    report(1, 1, "loading TensorFlow")
    keras.utils.set_random_seed(config.seed)
    model = build_vgg(spec, config.seed)
    epochs, best_epoch = _fit(model, training, validation, config, report, on_epoch)
    history = History(
        spec=spec,
        config=config,
        data=data.name,
        training_images=len(training),
        validation_images=len(validation),
        epochs=epochs,
        best_epoch=best_epoch,
        seconds=time.perf_counter() - started,
        versions={
            "vggedge": vggedge.__version__,
            "keras": keras.__version__,
            "tensorflow": version_of("tensorflow", "tensorflow-cpu"),
        },
    )
    return TrainResult(model=model, history=history)


def write_history(history: History, model_path: Path) -> Path:
    """Write ``MODEL.history.json`` beside ``MODEL.keras``, complete or not at all; returns its path.

    Raises:
        ModelError: the disk refused.
    """
    path = model_path.with_suffix(HISTORY_SUFFIX)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
            written = Path(folder) / path.name
            written.write_bytes(msgspec.json.format(msgspec.json.encode(history), indent=2) + b"\n")
            return written.replace(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error}). Check space and permissions.") from error


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


def _hold_images(data: ImageSet, spec: VggSpec, report: Advance, what: str) -> ImageSet:
    """Read every image once, and give the same set from memory: uint8, a quarter of what floats take."""
    images: Pixels = np.empty((len(data), *spec.input), dtype=np.uint8)
    for index in range(len(data)):
        images[index] = data.read_one(index)
        if (index + 1) % _READ_STEP == 0 or index + 1 == len(data):
            report(index + 1, len(data), what)
    return replace(data, read_one=lambda i: images[i])


def _fit(
    model: keras.Model,
    training: ImageSet,
    validation: ImageSet,
    config: TrainConfig,
    report: Advance,
    on_epoch: OnEpoch | None,
) -> tuple[tuple[EpochFigures, ...], int]:
    """Fit ``model`` and leave it with the best weights: (figures of every epoch, number of the best)."""
    keras = import_keras()
    batches = _batches_class()(training, config.batch_size, config.seed)
    judged = _batches_class()(validation, config.batch_size, None)
    monitor = _monitor_class()(config, len(batches), report, on_epoch)
    # A second model on the same layers carries the optimizer, which would triple the written file.
    learner = keras.Model(model.inputs, model.outputs)
    learner.compile(
        optimizer=keras.optimizers.Adam(_build_schedule(keras, config, len(batches))),
        loss=keras.losses.SparseCategoricalCrossentropy(),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=False,  # compiling a network this small on a CPU takes longer than training an epoch
    )
    # Keras's shuffle would move whole batches only, and draw from Python's global generator.
    options = {"epochs": config.epochs, "shuffle": False, "verbose": 0}
    try:
        learner.fit(batches, validation_data=judged, callbacks=[monitor], **options)
    except Exception as error:
        # TensorFlow wraps what a generator raises into an error of its own, with a traceback as its text.
        failure = batches.failure or judged.failure
        if failure is None:
            raise
        raise failure from error
    learner.set_weights(monitor.best_weights)
    return tuple(monitor.epochs), monitor.best_epoch


def _build_schedule(keras: Any, config: TrainConfig, steps: int) -> Any:
    if config.schedule == "constant":
        return config.learning_rate
    total = config.epochs * steps
    rise = max(1, total // 10)
    return keras.optimizers.schedules.CosineDecay(
        config.learning_rate / 10,
        decay_steps=max(1, total - rise),
        warmup_target=config.learning_rate,
        warmup_steps=rise,
    )


@functools.cache
def _batches_class() -> Any:
    keras = import_keras()

    class Batches(keras.utils.PyDataset):  # type: ignore[misc,name-defined]
        """Batches of an image set as Keras takes them: uint8 images and their targets.

        Attributes:
            failure: what the image set raised, if it did.
        """

        def __init__(self, data: ImageSet, batch_size: int, seed: int | None) -> None:
            super().__init__()
            self.failure: Exception | None = None
            self._data = data
            self._batch_size = batch_size
            self._generator = None if seed is None else np.random.default_rng(seed)
            self._order: NDArray[np.int64] = np.arange(len(data))
            self.on_epoch_end()

        def __len__(self) -> int:
            return math.ceil(len(self._data) / self._batch_size)

        def __getitem__(self, index: int) -> tuple[Pixels, NDArray[np.int64]]:
            chosen = self._order[index * self._batch_size :][: self._batch_size]
            try:
                return self._data.read(chosen), self._data.targets[chosen]
            except Exception as error:
                self.failure = error
                raise

        def on_epoch_end(self) -> None:
            if self._generator is not None:
                self._order = self._generator.permutation(len(self._data))

    return Batches


@functools.cache
def _monitor_class() -> Any:
    keras = import_keras()

    class Monitor(keras.callbacks.Callback):  # type: ignore[misc,name-defined]
        """Reports, refuses a loss that is no number, keeps the best weights and stops in time."""

        def __init__(
            self,
            config: TrainConfig,
            steps: int,
            report: Advance,
            on_epoch: OnEpoch | None,
        ) -> None:
            super().__init__()
            self.epochs: list[EpochFigures] = []
            self.best_epoch = 0
            self.best_weights: list[Any] = []
            self._config, self._steps, self._report, self._on_epoch = config, steps, report, on_epoch
            self._started = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._started = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self._check_finite(logs["loss"], f"batch {batch + 1}")
            done = len(self.epochs) * self._steps + batch + 1
            self._report(done, self._config.epochs * self._steps, "training")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._check_finite(logs["val_loss"], "validation")
            figures = EpochFigures(
                epoch=epoch + 1,
                **{name: float(logs[name]) for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
                seconds=time.perf_counter() - self._started,
            )
            self.epochs.append(figures)
            if not self.best_epoch or figures.val_loss < self.epochs[self.best_epoch - 1].val_loss:
                self.best_epoch = figures.epoch
                self.best_weights = self.model.get_weights()
            elif 0 < self._config.patience <= figures.epoch - self.best_epoch:
                self.model.stop_training = True
            if self._on_epoch is not None:
                self._on_epoch(figures)

        def _check_finite(self, loss: float, where: str) -> None:
            if not math.isfinite(loss):
                rate = self._config.learning_rate
                raise ModelError(
                    f"training diverged: the loss is {loss} in epoch {len(self.epochs) + 1}, {where}. Lower "
                    f"the learning rate (it is {rate:g}; try {rate / 10:g}), or choose a normalization other "
                    "than none."
                )

    return Monitor
