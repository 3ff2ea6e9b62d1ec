"""Keras's training loop with what it lacks here: its batches, its watchman, and the errors of both."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from vggedge.model import import_keras
from vggedge.training.checkpoint import Checkpoint
from vggedge.training.config import TrainConfig
from vggedge.training.history import EpochFigures
from vggedge.training.optimization import best_epoch, build_optimizer, is_over, plateau_rate
from vggedge_runtime.errors import ModelError
from vggedge_runtime.preprocess import Pixels
from vggedge_runtime.progress import Advance

if TYPE_CHECKING:
    import keras

OnEpoch: TypeAlias = Callable[[EpochFigures], None]
"""Called with the figures of each epoch as it ends."""


@dataclass(frozen=True)
class Shown:
    """Images as a network is shown them.

    Attributes:
        read: gives an image of an epoch, counted from 0, by its number: (height, width, 3) uint8.
        targets: class of every image, int64 (n,).
    """

    read: Callable[[int, int], Pixels]
    targets: NDArray[np.int64]


def fit(
    model: keras.Model,
    training: Shown,
    validation: Shown,
    config: TrainConfig,
    *,
    report: Advance,
    on_epoch: OnEpoch | None,
    callbacks: Sequence[Any],
    checkpoint: Checkpoint | None,
) -> tuple[EpochFigures, ...]:
    """Fit ``model`` and leave it with the weights of its best epoch, all trainable; gives the figures of every epoch.

    Goes on after the epochs that ``checkpoint`` has.
    """
    keras = import_keras()
    batches = batches_class()(training, config.batch_size, config.seed)
    judged = batches_class()(validation, config.batch_size, None)
    # A second model on the same layers carries the optimizer, which would triple the written file.
    learner = keras.Model(model.inputs, model.outputs)
    learner.compile(
        optimizer=build_optimizer(config, len(batches)),
        loss=keras.losses.SparseCategoricalCrossentropy(),
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=False,  # compiling a network this small on a CPU takes longer than training an epoch
    )
    monitor = monitor_class()(config, batches, report, on_epoch, checkpoint)
    if checkpoint is not None and checkpoint.epochs:
        learner.optimizer.build(learner.trainable_variables)
        monitor.epochs = list(checkpoint.epochs)
        monitor.best_weights = checkpoint.restore(learner)
    # Keras's shuffle would move whole batches only, and draw from Python's global generator.
    options = {"initial_epoch": len(monitor.epochs), "epochs": config.epochs, "shuffle": False, "verbose": 0}
    try:
        if not is_over(monitor.epochs, config):
            learner.fit(batches, validation_data=judged, callbacks=[*callbacks, monitor], **options)
    except Exception as error:
        # TensorFlow wraps what a generator raises into an error of its own, with a traceback as its text.
        failure = batches.failure or judged.failure
        if failure is None:
            raise
        raise failure from error
    model.set_weights(monitor.best_weights)
    for layer in model.layers:
        layer.trainable = True  # whoever trains on may freeze other stages
    return tuple(monitor.epochs)


@functools.cache
def batches_class() -> Any:
    """The class of what Keras takes its batches from."""
    keras = import_keras()

    class Batches(keras.utils.PyDataset):  # type: ignore[misc,name-defined]
        """Batches as Keras takes them: uint8 images and their targets.

        Args:
            shown: what they are made of.
            batch_size: images for each step.
            seed: of the order; None keeps the images' own.

        Attributes:
            failure: what reading raised, if it did.
        """

        def __init__(self, shown: Shown, batch_size: int, seed: int | None) -> None:
            super().__init__()
            self.failure: Exception | None = None
            self._shown, self._batch_size, self._seed = shown, batch_size, seed
            self.start_epoch(0)

        def __len__(self) -> int:
            return math.ceil(len(self._shown.targets) / self._batch_size)

        def __getitem__(self, index: int) -> tuple[Pixels, NDArray[np.int64]]:
            chosen = self._order[index * self._batch_size :][: self._batch_size]
            try:
                return np.stack([self._shown.read(self._epoch, int(i)) for i in chosen]), self._shown.targets[chosen]
            except Exception as error:
                self.failure = error
                raise

        def start_epoch(self, epoch: int) -> None:
            """Go to ``epoch``, counted from 0; its order follows from the seed, wherever training began."""
            count = len(self._shown.targets)
            self._epoch = epoch
            self._order: NDArray[np.int64] = np.arange(count)
            if self._seed is not None:
                generator = np.random.default_rng(self._seed)
                # The first order is left out as it always was: models trained before can be trained again.
                for _ in range(epoch + 2):
                    self._order = generator.permutation(count)

    return Batches


@functools.cache
def monitor_class() -> Any:
    """The class of the callback that watches training."""
    keras = import_keras()

    class Monitor(keras.callbacks.Callback):  # type: ignore[misc,name-defined]
        """Reports, refuses a loss that is no number, sets the rate, keeps the best weights and stops in time."""

        def __init__(
            self,
            config: TrainConfig,
            batches: Any,
            report: Advance,
            on_epoch: OnEpoch | None,
            checkpoint: Checkpoint | None,
        ) -> None:
            super().__init__()
            self.epochs: list[EpochFigures] = []
            self.best_weights: list[Any] = []
            self._config, self._batches, self._report, self._on_epoch = config, batches, report, on_epoch
            self._checkpoint = checkpoint
            self._started = 0.0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self._batches.start_epoch(epoch)
            self._started = time.perf_counter()

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            where = f"epoch {len(self.epochs) + 1}, batch {batch + 1}"
            _check_finite(logs["loss"], self._config, where, self._checkpoint)
            steps = len(self._batches)
            self._report(len(self.epochs) * steps + batch + 1, self._config.epochs * steps, "training")

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            _check_finite(logs["val_loss"], self._config, f"epoch {epoch + 1}, validation", self._checkpoint)
            figures = EpochFigures(
                epoch=epoch + 1,
                **{name: float(logs[name]) for name in ("loss", "accuracy", "val_loss", "val_accuracy")},
                learning_rate=_last_rate(self.model.optimizer),
                seconds=time.perf_counter() - self._started,
            )
            self.epochs.append(figures)
            if best_epoch(self.epochs) == figures.epoch:
                self.best_weights = self.model.get_weights()
            if is_over(self.epochs, self._config):
                self.model.stop_training = True
            elif self._config.schedule == "plateau":
                self.model.optimizer.learning_rate = plateau_rate(self.epochs, self._config)
            if self._checkpoint is not None:
                self._checkpoint.write(self.model, self.epochs, self.best_weights)
            if self._on_epoch is not None:
                self._on_epoch(figures)

    return Monitor


def _last_rate(optimizer: Any) -> float:
    """The learning rate of the last step; the optimizer's own attribute is that of the step to come."""
    schedule = optimizer._learning_rate
    rate = float(schedule(optimizer.iterations - 1) if callable(schedule) else optimizer.learning_rate)
    return float(f"{rate:.6g}")  # float32 has no more digits


def _check_finite(loss: float, config: TrainConfig, where: str, checkpoint: Checkpoint | None) -> None:
    if math.isfinite(loss):
        return
    rate = config.learning_rate
    kept = ""
    if checkpoint is not None and checkpoint.path.exists():
        kept = f" {checkpoint.path} has the epochs before; delete it to train anew."
    raise ModelError(
        f"training diverged: the loss is {loss} in {where}. Lower the learning rate (it is {rate:g}; try "
        f"{rate / 10:g}), or choose a normalization other than none.{kept}"
    )
