"""Trainings that are compared: the same images, budget and seeds for all; differences with their intervals."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from reporting import COLOURS

from vggedge.architecture import VggSpec
from vggedge.cli.output import print_note
from vggedge.data import ImageSet, open_images
from vggedge.evaluation import AS_DEPLOYED, Protocol, build_predict, iterate_answers
from vggedge.model import import_keras
from vggedge.training import TrainConfig, TrainResult, train
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.statistics import build_proportion

SIDE = 64
SEEDS = tuple(range(10, 16))
"""Of the trainings. None was used while budgets were chosen."""

TEST_SEED = 9
"""Of the drawing of all test images; training images are of seed 0, and seeds share no image."""


@dataclass(frozen=True)
class Budget:
    """What every variant of a study gets alike.

    Attributes:
        images: to train on, a tenth of which judges each epoch.
        epochs: passes over them; no training stops earlier.
        seeds: of the trainings.
        test_images: of another seed.
    """

    images: int
    epochs: int
    seeds: tuple[int, ...]
    test_images: int = 2000


QUICK = Budget(images=120, epochs=1, seeds=(0, 1), test_images=60)


@dataclass(frozen=True)
class Trial:
    """One training of one variant.

    Attributes:
        variant: its name.
        seed: of weights, order of the images and dropout.
        right: which test images it answers rightly, (n,).
        epochs: as trained, and
        best_epoch: the one whose weights answered.
    """

    variant: str
    seed: int
    right: NDArray[np.bool_]
    epochs: int
    best_epoch: int

    @property
    def accuracy(self) -> float:
        """Share of the test images, 0 to 1."""
        return float(self.right.mean())


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Accuracy of one variant minus that of another, in percentage points.

    Attributes:
        first: the variant.
        second: what is taken off.
        mean: over the seeds.
        low: lower end of the interval, and
        high: upper end.
        confidence: of the interval, 0 to 1.
        by_seed: the differences that it comes from.
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    confidence: float
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def open_held(data: str) -> ImageSet:
    """Open DATA at 64x64 with all its images drawn once and held in memory, for the many trainings to come."""
    source = open_images(data, ImageSpec(height=SIDE, width=SIDE))
    print_note(f"drawing {source.name} ...")
    images = source.read()
    return dataclasses.replace(source, read_one=images.__getitem__)


def open_pair(budget: Budget) -> tuple[ImageSet, ImageSet]:
    """(images to train on, images to test with), both held in memory; they share none."""
    return open_held(f"fingers:{budget.images}@0"), open_held(f"fingers:{budget.test_images}@{TEST_SEED}")


def train_fresh(spec: VggSpec, data: ImageSet, config: TrainConfig, callbacks: Sequence[Any] = ()) -> TrainResult:
    """Train after Keras has forgotten the networks before, which would otherwise pile up in memory."""
    import_keras().backend.clear_session()
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # it warns of every new network as of a mistake
    return train(spec, data, config, callbacks=callbacks)


def find_right(model: Any, test: ImageSet, protocol: Protocol = AS_DEPLOYED) -> NDArray[np.bool_]:
    """Which images of ``test`` the model answers rightly, (n,)."""
    answers = np.concatenate(list(iterate_answers(build_predict(model), test, protocol)))
    return np.asarray(answers.argmax(axis=1) == test.targets)


def iterate_trials(variants: Iterable[str], seeds: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Every variant with every seed, seed by seed, said on stderr as its turn comes."""
    pairs = [(name, seed) for seed in seeds for name in variants]
    for number, (name, seed) in enumerate(pairs, start=1):
        print_note(f"training {number} of {len(pairs)}: {name}, seed {seed} ...")
        yield name, seed


def run_contest(
    specs: dict[str, VggSpec], budget: Budget, *, quick: bool
) -> tuple[dict[str, list[Trial]], dict[str, str]]:
    """Train every spec with every seed on the same images; gives the trials of each, by seed, and the protocol."""
    budget = QUICK if quick else budget
    data, test = open_pair(budget)
    config = TrainConfig(epochs=budget.epochs, patience=0, initialization="he")
    groups: dict[str, list[Trial]] = {name: [] for name in specs}
    for name, seed in iterate_trials(specs, budget.seeds):
        result = train_fresh(specs[name], data, msgspec.structs.replace(config, seed=seed))
        groups[name].append(build_trial(name, seed, result, find_right(result.model, test)))
    return groups, describe_training(config, data, test, budget.seeds)


def build_trial(name: str, seed: int, result: TrainResult, right: NDArray[np.bool_]) -> Trial:
    """What is kept of a training, said on stderr."""
    history = result.history
    print_note(f"  {100 * right.mean():.1f} % of the test images in {history.seconds:.0f} s")
    return Trial(name, seed, right, len(history.epochs), history.best_epoch)


def compare(first: Sequence[Trial], second: Sequence[Trial], confidence: float = 0.95) -> Difference:
    """Difference of two variants over the same seeds and test images.

    The interval is Student's over the differences of each seed, widened by the test images' own sampling error
    (of the differences averaged over the seeds), whose squares add up. The second part holds some of the first, so
    that the interval is rather too wide than too narrow.
    """
    if [each.seed for each in first] != [each.seed for each in second] or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} trials; needed are at least 2 each, of the same seeds.")
    differences = 100 * (_stack(first) - _stack(second))
    by_seed = differences.mean(axis=1)
    of_seeds = by_seed.var(ddof=1) / len(by_seed)
    of_images = differences.mean(axis=0).var(ddof=1) / differences.shape[1]
    half = student_quantile((1 + confidence) / 2, len(by_seed) - 1) * float(np.sqrt(of_seeds + of_images))
    mean = float(by_seed.mean())
    return Difference(
        first=first[0].variant,
        second=second[0].variant,
        mean=mean,
        low=mean - half,
        high=mean + half,
        confidence=confidence,
        by_seed=tuple(by_seed.tolist()),
    )


def _stack(trials: Sequence[Trial]) -> NDArray[np.float64]:
    return np.stack([each.right for each in trials]).astype(np.float64)


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t for ``share`` from 0.5 to below 1; ``t = sqrt(freedom) * tan(angle)`` bounds the tail."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate(([0.0], np.cumsum(density[1:] + density[:-1])))
    angle = np.interp(2 * share - 1, area / area[-1], angles)
    return float(np.sqrt(freedom) * np.tan(angle))


ACCURACY_COLUMNS = ("test accuracy: mean (lowest to highest seed)", "n: seeds x images")


def accuracy_cells(trials: Sequence[Trial]) -> tuple[str, str]:
    """What stands in ACCURACY_COLUMNS; percent."""
    percents = [100 * each.accuracy for each in trials]
    accuracy = f"{np.mean(percents):.1f} % ({min(percents):.1f} to {max(percents):.1f})"
    return accuracy, f"{len(trials)} x {len(trials[0].right):,}"


def record_trials(groups: dict[str, list[Trial]]) -> list[dict[str, Any]]:
    """Trials as plain data: counts with their 95 % Wilson interval."""
    return [
        {
            "variant": each.variant,
            "seed": each.seed,
            "test": build_proportion(int(each.right.sum()), len(each.right)),
            "epochs": each.epochs,
            "best_epoch": each.best_epoch,
        }
        for trials in groups.values()
        for each in trials
    ]


def describe_training(
    config: TrainConfig, data: ImageSet, test: ImageSet, seeds: Sequence[int], *, initialization: str | None = None
) -> dict[str, str]:
    """Protocol of trials: what all variants have in common; ``initialization`` says it where the config does not."""
    return {
        "training": f"{data.name}, of which {100 * config.validation_share:.0f} % judge each epoch; {config.epochs} "
        f"epochs, batch {config.batch_size}, {config.optimizer}, learning rate {config.learning_rate:g}, "
        f"{config.schedule} schedule, {initialization or config.initialization} initialisation; the epoch with the "
        "least validation loss is kept",
        "test": f"{test.name} (n = {len(test):,}), the same for all, never seen in training",
        "seeds": f"{', '.join(map(str, seeds))}: of weights, split, order of images and dropout",
        "intervals": "Student's t over the seeds' paired differences, with the sampling error of the test images",
    }


def draw_accuracies(axes: Any, groups: dict[str, list[Trial]]) -> None:
    """A dot for each seed and a bar at their mean, for each variant."""
    for place, trials in enumerate(groups.values()):
        percents = [100 * each.accuracy for each in trials]
        spread = np.linspace(-0.12, 0.12, len(percents)) if len(percents) > 1 else [0.0]
        axes.plot(place + np.asarray(spread), percents, "o", color=COLOURS[0], alpha=0.75, zorder=3)
        axes.hlines(np.mean(percents), place - 0.3, place + 0.3, color=COLOURS[1], linewidth=2.5)
    axes.plot([], [], "o", color=COLOURS[0], label="one seed")
    axes.plot([], [], "-", color=COLOURS[1], linewidth=2.5, label="mean of the seeds")
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel(f"test accuracy, % (n = {len(next(iter(groups.values()))[0].right):,})")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
