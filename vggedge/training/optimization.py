"""How weights change: the optimizer with the paper's weight decay, and the learning rate over time."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vggedge.model import import_keras
from vggedge.training.config import TrainConfig
from vggedge.training.history import EpochFigures

PLATEAU_FACTOR = 10.0
PLATEAU_DROPS = 3
"""The paper's section 3.1: the rate is divided by 10, and was three times in all."""


def build_optimizer(config: TrainConfig, steps: int) -> Any:
    """The Keras optimizer of ``config`` for epochs of ``steps`` steps."""
    rate = _build_schedule(config, steps)
    if config.optimizer == "sgd":
        options = {"learning_rate": rate, "momentum": config.momentum}
    else:
        options = {"learning_rate": rate}
    if not config.weight_decay:
        return getattr(import_keras().optimizers, _CLASSES[config.optimizer])(**options)
    return _decaying_class(config.optimizer)(config.weight_decay, **options)


def best_epoch(epochs: Sequence[EpochFigures]) -> int:
    """The epoch, counted from 1, with the least validation loss; the first of equals."""
    return min(epochs, key=lambda each: each.val_loss).epoch


def is_over(epochs: Sequence[EpochFigures], config: TrainConfig) -> bool:
    """Whether training ends after these epochs.

    This and plateau_rate follow from the figures alone, so that a resumed training decides the same.
    """
    if not epochs or len(epochs) >= config.epochs:
        return bool(epochs)
    if config.schedule == "plateau":
        return _count_drops(epochs, config) > PLATEAU_DROPS
    return 0 < config.patience <= len(epochs) - best_epoch(epochs)


def plateau_rate(epochs: Sequence[EpochFigures], config: TrainConfig) -> float:
    """The learning rate with which ``plateau`` goes on after these epochs."""
    return config.learning_rate / PLATEAU_FACTOR ** _count_drops(epochs, config)


def _count_drops(epochs: Sequence[EpochFigures], config: TrainConfig) -> int:
    """How many times validation accuracy has not improved for ``plateau_patience`` epochs in a row."""
    best, waited, drops = -1.0, 0, 0
    for each in epochs:
        waited = 0 if each.val_accuracy > best else waited + 1
        best = max(best, each.val_accuracy)
        if waited == config.plateau_patience:
            drops, waited = drops + 1, 0
    return drops


_CLASSES = {"adam": "Adam", "sgd": "SGD"}


@functools.cache
def _decaying_class(optimizer: str) -> Any:
    base: Any = getattr(import_keras().optimizers, _CLASSES[optimizer])

    class Decaying(base):  # type: ignore[misc]
        """Adds a share of each kernel to its gradient before momentum or moments are taken.

        Keras's own ``weight_decay`` is the decoupled kind, and a ``kernel_regularizer`` would be part of every
        reported loss and of the written model.
        """

        def __init__(self, share: float, **options: Any) -> None:
            super().__init__(**options)
            self._share = share

        def apply(self, grads: Any, trainable_variables: Any = None) -> None:
            variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
            decayed = [
                gradient if gradient is None or variable.name != "kernel" else gradient + self._share * variable
                for gradient, variable in zip(grads, variables, strict=True)
            ]
            super().apply(decayed, variables)

    return Decaying


def _build_schedule(config: TrainConfig, steps: int) -> Any:
    if config.schedule != "cosine":
        return config.learning_rate  # plateau sets it between epochs
    total = config.epochs * steps
    rise = max(1, total // 10)
    return import_keras().optimizers.schedules.CosineDecay(
        config.learning_rate / 10,
        decay_steps=max(1, total - rise),
        warmup_target=config.learning_rate,
        warmup_steps=rise,
    )
