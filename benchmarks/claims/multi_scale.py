"""Training and testing at several scales gain where the size of objects varies: scale jitter, and answers averaged.

python benchmarks/claims/multi_scale.py [--quick] [--output DIR]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from reporting import Part, Study, Table, build_figure, judge, run
from trials import (
    ACCURACY_COLUMNS,
    QUICK,
    SEEDS,
    SIDE,
    TEST_SEED,
    Budget,
    Trial,
    accuracy_cells,
    build_trial,
    compare,
    describe_training,
    draw_accuracies,
    find_right,
    iterate_trials,
    record_trials,
    train_fresh,
)

from vggedge.architecture import get_spec
from vggedge.cli.output import print_note
from vggedge.data import ImageSet
from vggedge.data.fingers import LABELS, draw_hand
from vggedge.evaluation import Protocol
from vggedge.training import AugmentationConfig, TrainConfig
from vggedge_runtime.preprocess import Pixels, scale_image

NAME = "multi_scale"
NETWORK = "vgg16-compact"
BUDGET = Budget(images=3000, epochs=10, seeds=SEEDS[:5])
ZOOM = (0.5, 1.0)
"""Side of the hand's picture as a share of the whole picture's, drawn log-uniformly."""
LARGEST = 96  # pixels: all pictures are drawn at this size and scaled down from it
_STREAM = 5  # keeps the zooms apart from other draws of the same seed and image


@dataclasses.dataclass(frozen=True)
class Setting:
    """Scales of one training and its tests, as in the paper's tables 3 and 4; pixels.

    Attributes:
        train: bounds of S.
        single: the one Q: S where it is fixed, else the middle.
        several: the Q whose answers are averaged.
    """

    train: tuple[int, int]
    single: int
    several: tuple[int, int, int]


JITTER = "S in [64, 96]"
SETTINGS = {
    "S = 72": Setting((72, 72), 72, (64, 72, 80)),
    "S = 80": Setting((80, 80), 80, (72, 80, 88)),
    JITTER: Setting((64, 96), 80, (64, 80, 96)),
}


def measure(quick: bool) -> Study:
    """Train with each setting and every seed, test each with one Q and with several, and judge."""
    budget = QUICK if quick else BUDGET
    data, test = open_zoomed(budget.images, 0), open_zoomed(budget.test_images, TEST_SEED)
    spec = get_spec(NETWORK, normalization="none")
    single: dict[str, list[Trial]] = {name: [] for name in SETTINGS}
    several: dict[str, list[Trial]] = {name: [] for name in SETTINGS}
    for name, seed in iterate_trials(SETTINGS, budget.seeds):
        setting = SETTINGS[name]
        config = build_config(budget, setting, seed)
        result = train_fresh(spec, show_at(data, setting.single), config)
        for group, scales in ((single, (setting.single,)), (several, setting.several)):
            group[name].append(build_trial(name, seed, result, find_right(result.model, test, Protocol(scales=scales))))
    return Study(
        name=NAME,
        claim="Training and testing at several scales gain where object size varies",
        source="Simonyan & Zisserman 2014, arXiv 1409.1556, sections 4.1 and 4.2, tables 3 and 4",
        parts=tuple(judge_scales(single, several)),
        table=_build_table(single, several),
        protocol={
            "network": f"{NETWORK} at 64x64, no normalisation, as in the paper",
            "data": f"hands of `fingers`, each shrunk to {ZOOM[0]:g} to {ZOOM[1]:g} of its picture (log-uniform, its "
            "own factor) before a background that continues its edges",
            **describe_training(TrainConfig(epochs=budget.epochs, initialization="he"), data, test, budget.seeds),
            "scales": "training: the shorter side becomes S, 64x64 are cut out anywhere; test: it becomes Q, the "
            "centre is cut out, probabilities over several Q are averaged; each epoch is judged at the one Q",
        },
        measurements={"one Q": record_trials(single), "several Q": record_trials(several)},
        figure=draw(single, several),
    )


def build_config(budget: Budget, setting: Setting, seed: int) -> TrainConfig:
    """The same for all settings but for the scale."""
    augmentation = AugmentationConfig(scale=setting.train)
    return TrainConfig(epochs=budget.epochs, patience=0, initialization="he", seed=seed, augmentation=augmentation)


def open_zoomed(count: int, seed: int) -> ImageSet:
    """``count`` hands of ``seed`` whose sizes vary, drawn once and held in memory."""
    print_note(f"drawing {count} hands of seed {seed} ...")
    pictures = np.stack([draw_zoomed(seed, index) for index in range(count)])

    def read_scaled(index: int, side: int) -> Pixels:
        return scale_image(Image.fromarray(pictures[index]), side)

    targets = np.arange(count, dtype=np.int64) % len(LABELS)
    return ImageSet(
        name=f"{count} hands of varying size, drawn from seed {seed}",
        labels=LABELS,
        targets=targets,
        read_one=lambda index: read_scaled(index, SIDE),
        read_scaled=read_scaled,
    )


def draw_zoomed(seed: int, index: int) -> NDArray[np.uint8]:
    """A hand of ``fingers`` at its own size, (LARGEST, LARGEST, 3)."""
    zoom = np.exp(np.random.default_rng([seed, index, _STREAM]).uniform(*np.log(ZOOM)))
    hand = np.asarray(draw_hand(seed, index, size=round(LARGEST * zoom)))
    before = (LARGEST - len(hand)) // 2
    after = LARGEST - len(hand) - before
    return np.pad(hand, ((before, after), (before, after), (0, 0)), mode="edge")


def show_at(data: ImageSet, scale: int) -> ImageSet:
    """The same images, of which the network is shown the centre at one Q."""
    protocol = Protocol(scales=(scale,))
    return dataclasses.replace(data, read_one=lambda index: next(protocol.views_of(data, index, SIDE, SIDE)))


def judge_scales(single: dict[str, list[Trial]], several: dict[str, list[Trial]]) -> list[Part]:
    """Jitter against the better fixed scale, several Q against one."""
    fixed = max((name for name in SETTINGS if name != JITTER), key=lambda name: _mean(single[name]))
    training = compare(single[JITTER], single[fixed])
    testing = compare(several[JITTER], single[JITTER])
    return [
        Part(
            statement="scale jitter in training is better than a fixed scale, tested at one Q",
            rule="supported if the 95 % interval of the gain over the better fixed scale lies above 0, contradicted "
            "if below",
            figures=f"{JITTER} - {fixed}: {training} points",
            verdict=judge(training.low, training.high),
        ),
        Part(
            statement="averaging answers over several Q is better than one Q, for the network trained with jitter",
            rule="supported if the 95 % interval of the gain lies above 0, contradicted if below",
            figures=f"several - one: {testing} points",
            verdict=judge(testing.low, testing.high),
        ),
    ]


def _mean(trials: list[Trial]) -> float:
    return float(np.mean([each.accuracy for each in trials]))


def _build_table(single: dict[str, list[Trial]], several: dict[str, list[Trial]]) -> Table:
    rows = []
    for name, setting in SETTINGS.items():
        one, more = f"Q = {setting.single}", f"Q = {', '.join(map(str, setting.several))}"
        rows += [
            (f"{name}; {one}", *accuracy_cells(single[name]), "-"),
            (f"{name}; {more}", *accuracy_cells(several[name]), str(compare(several[name], single[name]))),
        ]
    columns = ("training; test", *ACCURACY_COLUMNS, "several over one Q [95 %]")
    return Table(columns=columns, rows=tuple(rows))


def draw(single: dict[str, list[Trial]], several: dict[str, list[Trial]]) -> Any:
    """Accuracy by training and test."""
    figure = build_figure(8.5, 4.8, "Do several scales help where the size of objects varies?")
    axes = figure.subplots()
    groups = {}
    for name in SETTINGS:
        groups[f"{name}\none Q"] = single[name]
        groups[f"{name}\nseveral Q"] = several[name]
    draw_accuracies(axes, groups)
    axes.set_xlabel("scale of training (S) and test (Q): shorter side of the picture, pixels")
    return figure


if __name__ == "__main__":
    run(NAME, measure)
