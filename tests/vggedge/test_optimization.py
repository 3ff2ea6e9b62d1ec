from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vggedge.training.config import TrainConfig
from vggedge.training.history import EpochFigures
from vggedge.training.optimization import best_epoch, build_optimizer, is_over, plateau_rate

PLATEAU = TrainConfig(epochs=99, schedule="plateau", learning_rate=0.1, plateau_patience=2)


def figures(accuracies: list[float], losses: list[float] | None = None) -> list[EpochFigures]:
    return [
        EpochFigures(
            epoch=number,
            loss=1,
            accuracy=0.5,
            val_loss=1 if losses is None else losses[number - 1],
            val_accuracy=accuracy,
            learning_rate=0.1,
            seconds=1,
        )
        for number, accuracy in enumerate(accuracies, start=1)
    ]


@pytest.mark.parametrize(
    ("accuracies", "rate", "ends"),
    [
        ([0.2], 0.1, False),
        ([0.2, 0.2], 0.1, False),
        ([0.2, 0.2, 0.2], 0.01, False),
        ([0.2, 0.2, 0.3, 0.3], 0.1, False),
        ([0.2, 0.2, 0.2, 0.3, 0.3], 0.01, False),
        ([0.2, 0.1, 0.1, 0.15, 0.15], 0.001, False),
        ([0.2] * 7, 0.0001, False),
        ([0.2] * 8, 0.0001, False),
        ([0.2] * 9, None, True),
    ],
)
def test_plateau_divides_by_ten_three_times_and_then_ends(
    accuracies: list[float], rate: float | None, ends: bool
) -> None:
    epochs = figures(accuracies)
    assert is_over(epochs, PLATEAU) == ends
    if rate is not None:
        assert plateau_rate(epochs, PLATEAU) == pytest.approx(rate)


def test_the_other_schedules_end_by_the_validation_loss() -> None:
    config = TrainConfig(epochs=9, patience=2)
    assert not is_over([], config)
    assert not is_over(figures([0.1] * 3, [1.0, 0.9, 0.9]), config)
    assert is_over(figures([0.1] * 4, [1.0, 0.9, 0.9, 1.1]), config)
    assert not is_over(figures([0.1] * 4, [1.0, 0.9, 0.9, 0.8]), config)
    assert is_over(figures([0.1] * 9, [9.0 - number for number in range(9)]), config)
    assert not is_over(figures([0.1] * 8, [1.0 + number for number in range(8)]), TrainConfig(epochs=9, patience=0))
    assert best_epoch(figures([0.1] * 3, [1.0, 0.9, 0.9])) == 2


def updated(config: TrainConfig, steps: int, gradient: float, name: str = "kernel") -> float:
    """A weight of 1 after ``steps`` steps with the same gradient."""
    keras: Any = pytest.importorskip("keras")
    variable = keras.Variable(np.ones(1, np.float32), name=name)
    optimizer = build_optimizer(config, 10)
    for _ in range(steps):
        optimizer.apply([keras.ops.full((1,), gradient)], [variable])
    return float(np.asarray(variable)[0])


def test_weight_decay_goes_through_momentum_and_spares_biases() -> None:
    config = TrainConfig(optimizer="sgd", momentum=0.9, weight_decay=0.5, learning_rate=0.1, schedule="constant")
    weight, velocity = 1.0, 0.0
    for _ in range(3):  # v <- 0.9 v - 0.1 (g + 0.5 w); w <- w + v
        velocity = 0.9 * velocity - 0.1 * (0.2 + 0.5 * weight)
        weight += velocity
    assert updated(config, 3, 0.2) == pytest.approx(weight, abs=1e-6)
    plain = 1 - 0.02 * (1 + 1.9 + 2.71)
    assert updated(config, 3, 0.2, name="bias") == pytest.approx(plain, abs=1e-6)
    assert updated(config, 3, 0.2, name="gamma") == pytest.approx(plain, abs=1e-6)


def test_weight_decay_of_adam_is_part_of_the_gradient_too() -> None:
    config = TrainConfig(weight_decay=0.5, learning_rate=0.1, schedule="constant")
    # Adam's first step is the rate times the gradient's sign: with -0.2 + 0.5 * 1 it goes down, without it up.
    assert updated(config, 1, -0.2) == pytest.approx(0.9, abs=1e-4)
    assert updated(config, 1, -0.2, name="bias") == pytest.approx(1.1, abs=1e-4)


def test_no_weight_decay_is_keras_own_optimizer() -> None:
    keras: Any = pytest.importorskip("keras")
    assert type(build_optimizer(TrainConfig(), 10)) is keras.optimizers.Adam
    sgd = build_optimizer(TrainConfig(optimizer="sgd", momentum=0.8), 10)
    assert type(sgd) is keras.optimizers.SGD
    assert sgd.momentum == 0.8


def test_cosine_rises_and_falls() -> None:
    pytest.importorskip("keras")
    schedule = build_optimizer(TrainConfig(epochs=10, learning_rate=1.0), steps=10)._learning_rate
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[10]) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-6)
