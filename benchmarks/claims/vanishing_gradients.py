"""Without BatchNorm early gradients vanish and training stalls: the compact VGG-16 with each placement of it.

python benchmarks/claims/vanishing_gradients.py [--quick] [--output DIR]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reporting import COLOURS, MARKERS, Part, Study, Table, Verdict, build_figure, run
from trials import (
    ACCURACY_COLUMNS,
    QUICK,
    SEEDS,
    Budget,
    Trial,
    accuracy_cells,
    build_trial,
    compare,
    describe_training,
    find_right,
    iterate_trials,
    open_pair,
    record_trials,
    train_fresh,
)

from vggedge.architecture import get_spec
from vggedge.data import ImageSet
from vggedge.model import Initialization, import_keras
from vggedge.training import TrainConfig
from vggedge_runtime.dependencies import require

NAME = "vanishing_gradients"
NETWORK = "vgg16-compact"
NONE, CURE = "none", "first"
PLACEMENTS = (NONE, CURE, "first-of-two-stages", "two-stages", "every")
INITIALIZATIONS: tuple[Initialization, ...] = ("glorot", "he")
BUDGET = Budget(images=2400, epochs=8, seeds=SEEDS[:5])
PROBE_IMAGES = 120
FIRST, LAST = "block1_conv1", "block5_conv3"
STALLED = 0.25
"""Test accuracy; chance is 1/6."""
VANISHING = 0.5
"""Share of the gradient norm with BatchNorm."""
_FLOOR = 1e-8  # where the plot shows a gradient that is exactly 0


@dataclass(frozen=True)
class Watched:
    """A trial and its gradients.

    Attributes:
        trial: one training.
        layers: names of the layers with kernels, in order.
        norms: (epochs + 1, layers) L2 norms of the kernels' gradients before the first step and after each epoch.
    """

    trial: Trial
    layers: tuple[str, ...]
    norms: NDArray[np.float64]

    def norm(self, layer: str, moment: int) -> float:
        """Of one layer: moment 0 is before the first step, -1 at the end."""
        return float(self.norms[moment, self.layers.index(layer)])


Found = dict[str, dict[str, list[Watched]]]
"""By initialisation, then by placement, then by seed."""


def measure(quick: bool) -> Study:
    """Train every placement with every initialisation and seed, watching the gradients, and judge."""
    budget = QUICK if quick else BUDGET
    data, test = open_pair(budget)
    found: Found = {}
    for initialization in INITIALIZATIONS[:1] if quick else INITIALIZATIONS:
        groups: dict[str, list[Watched]] = {name: [] for name in PLACEMENTS}
        for name, seed in iterate_trials((NONE, CURE) if quick else PLACEMENTS, budget.seeds):
            config = TrainConfig(epochs=budget.epochs, patience=0, initialization=initialization, seed=seed)
            groups[name].append(watch(name, data, test, config))
        found[initialization] = {name: group for name, group in groups.items() if group}
    return Study(
        name=NAME,
        claim="Without BatchNorm early gradients vanish and training stalls; BatchNorm after the first convolution "
        "cures it",
        source="the reason given for the BatchNorm in the compact VGG-16; of the full networks Simonyan & Zisserman "
        "2014, arXiv 1409.1556, section 3.1, say that a bad initialisation can stall them",
        parts=tuple(
            part
            for name, groups in found.items()
            for part in (*judge_gradients(name, groups), judge_stalls(name, groups))
        ),
        table=_build_table(found),
        protocol={
            "network": f"{NETWORK} at 64x64, BatchNorm placed as the table says (vggedge.architecture.VggSpec)",
            "initialisations": "glorot: Glorot-uniform, Keras's default; he: He-normal, vggedge's "
            "where there is no BatchNorm",
            "gradients": f"L2 norm of the gradient of each kernel, of the mean loss of the first {PROBE_IMAGES} "
            "training images, BatchNorm and dropout as in training, before the first step and after each epoch",
            **describe_training(config, data, test, budget.seeds, initialization="the table's"),
        },
        measurements=[
            {
                "initialization": initialization,
                "trials": record_trials({name: [each.trial for each in group]}),
                "layers": group[0].layers,
                "gradient_norms": [[[float(f"{norm:.3g}") for norm in row] for row in each.norms] for each in group],
            }
            for initialization, groups in found.items()
            for name, group in groups.items()
        ],
        figure=draw(found),
    )


def watch(placement: str, data: ImageSet, test: ImageSet, config: TrainConfig) -> Watched:
    """Train one network and keep its gradients."""
    watcher = gradient_watch_class()(data.read(range(min(PROBE_IMAGES, len(data)))), data.targets[:PROBE_IMAGES])
    result = train_fresh(get_spec(NETWORK, normalization=placement), data, config, [watcher])
    trial = build_trial(placement, config.seed, result, find_right(result.model, test))
    return Watched(trial, watcher.layers, np.array(watcher.norms))


@functools.cache
def gradient_watch_class() -> Any:
    """The class of the callback that measures gradients and changes nothing."""
    keras, tensorflow = import_keras(), require("tensorflow", "train")

    class GradientWatch(keras.callbacks.Callback):  # type: ignore[misc,name-defined]
        """Norms of the kernels' gradients on fixed images, before the first step and after each epoch."""

        def __init__(self, images: NDArray[np.uint8], targets: NDArray[np.int64]) -> None:
            super().__init__()
            self.layers: tuple[str, ...] = ()
            self.norms: list[list[float]] = []
            self._images, self._targets = images.astype(np.float32), targets

        def on_train_begin(self, logs: Any = None) -> None:
            self._measure()

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self._measure()

        def _measure(self) -> None:
            trainable = self.model.trainable_variables
            values = [tensorflow.identity(each) for each in trainable]
            others = [tensorflow.identity(each) for each in self.model.non_trainable_variables]
            with tensorflow.GradientTape() as tape:
                tape.watch(values)
                # Without side effects: moving averages and the dropout's random numbers stay as training left them.
                answers, _ = self.model.stateless_call(values, others, [self._images], training=True)
                loss = keras.losses.SparseCategoricalCrossentropy()(self._targets, answers)
            gradients = tape.gradient(loss, values)
            kernels = [index for index, each in enumerate(trainable) if each.name == "kernel"]
            self.layers = tuple(trainable[index].path.split("/")[-2] for index in kernels)
            self.norms.append([float(tensorflow.norm(gradients[index])) for index in kernels])

    return GradientWatch


def judge_gradients(initialization: str, groups: dict[str, list[Watched]]) -> list[Part]:
    """Whether the first gradient is small where nothing is normalised, and small beside a late layer's."""

    def compare_starts(measure: Callable[[Watched], float], statement: str, what: str) -> Part:
        pairs = zip(groups[NONE], groups[CURE], strict=True)
        ratios = [measure(none) / measure(cure) for none, cure in pairs]
        small = [each < VANISHING for each in ratios]
        return Part(
            statement=f"{initialization} initialisation: {statement}",
            rule=f"supported if {what}, before the first step, is below {VANISHING:g} of what it is with BatchNorm "
            "after the first convolution in every seed, contradicted if in none",
            figures=f"{_median(ratios):.2g} of it, median of {len(ratios)} seeds ({min(ratios):.2g} to "
            f"{max(ratios):.2g})",
            verdict="supported" if all(small) else "not shown here" if any(small) else "contradicted here",
        )

    return [
        compare_starts(
            lambda each: each.norm(FIRST, 0),
            f"without BatchNorm the gradient of {FIRST} is smaller",
            f"the norm of the gradient of {FIRST}",
        ),
        compare_starts(
            lambda each: each.norm(FIRST, 0) / each.norm(LAST, 0),
            f"early gradients vanish more than late ones: that of {FIRST} is smaller beside that of {LAST}, too",
            f"that norm divided by that of {LAST}",
        ),
    ]


def judge_stalls(initialization: str, groups: dict[str, list[Watched]]) -> Part:
    """Whether the network without BatchNorm stays at chance and the one with it does not."""
    trials = {name: [each.trial for each in groups[name]] for name in (NONE, CURE)}
    stalled = {name: sum(each.accuracy < STALLED for each in group) for name, group in trials.items()}
    verdict: Verdict = "not shown here"
    if stalled[NONE] == 0:
        verdict = "contradicted here"
    elif 2 * stalled[NONE] >= len(trials[NONE]) and stalled[CURE] == 0:
        verdict = "supported"
    return Part(
        statement=f"{initialization} initialisation: training stalls without BatchNorm, and BatchNorm after the first "
        "convolution cures it",
        rule=f"a seed stalls if it ends below {100 * STALLED:.0f} % (chance: 16.7 %); supported if at least half of "
        "the seeds stall without and none with it, contradicted if none stalls without",
        figures=f"{stalled[NONE]} of {len(trials[NONE])} seeds stall without, {stalled[CURE]} with; "
        f"{CURE} - {NONE}: {compare(trials[CURE], trials[NONE])} points",
        verdict=verdict,
    )


def _build_table(found: Found) -> Table:
    rows = []
    for initialization, groups in found.items():
        none = [each.trial for each in groups[NONE]]
        for placement, group in groups.items():
            trials = [each.trial for each in group]
            ratio = _median([each.norm(FIRST, 0) / each.norm(LAST, 0) for each in group])
            row = (
                f"{initialization}, {placement}",
                *accuracy_cells(trials),
                "-" if placement == NONE else str(compare(trials, none)),
                f"{_median([each.norm(FIRST, 0) for each in group]):.1e}",
                f"{_median([each.norm(FIRST, -1) for each in group]):.1e}",
                f"{ratio:.2g}",
            )
            rows.append(row)
    columns = (
        *("initialisation, BatchNorm", *ACCURACY_COLUMNS, "over none [95 %]"),
        *(f"gradient of {FIRST} before the first step", "at the end", f"{FIRST} / {LAST} before the first step"),
    )
    return Table(columns=columns, rows=tuple(rows))


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def draw(found: Found) -> Any:
    """Gradients by layer, gradients over time and accuracy; a row for each initialisation."""
    figure = build_figure(13, 1.2 + 3.4 * len(found), f"Do the gradients of {NETWORK} vanish without BatchNorm?")
    grid = figure.subplots(len(found), 3, squeeze=False, width_ratios=(5, 4, 3))
    for (initialization, groups), row in zip(found.items(), grid, strict=True):
        for place, (placement, group) in enumerate(groups.items()):
            norms = np.maximum([each.norms for each in group], _FLOOR)
            first = norms[:, :, group[0].layers.index(FIRST)]
            style = {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 5, "label": placement}
            row[0].plot(np.median(norms[:, 0], axis=0), **style)
            row[1].plot(np.median(first, axis=0), **style)
            row[1].plot(first.T, color=COLOURS[place], linewidth=0.7, alpha=0.6)
            percents = [100 * each.trial.accuracy for each in group]
            beside = place + np.linspace(-0.15, 0.15, len(percents))
            row[2].plot(percents, beside, MARKERS[place], color=COLOURS[place], markersize=5)
        layers = groups[NONE][0].layers
        row[0].set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
        row[0].set_title(f"{initialization}: every layer, before the first step", fontsize=10)
        row[1].set_title(f"{initialization}: {FIRST} over time (thin: seeds)", fontsize=10)
        row[1].set_xlabel("epochs trained")
        row[1].xaxis.get_major_locator().set_params(integer=True)
        for axes in row[:2]:
            axes.set_yscale("log")
            axes.set_ylabel("gradient's L2 norm")
            axes.grid(alpha=0.3)
        row[1].set_ylabel(f"gradient's L2 norm (0 is drawn at {_FLOOR:.0e})")
        row[1].set_ylim(bottom=_FLOOR / 2)
        row[2].axvline(100 / 6, color="grey", linestyle=":")
        row[2].set_title(f"{initialization}: every seed (dotted: chance)", fontsize=10)
        row[2].set_xlabel("test accuracy, %")
        row[2].set_xlim(0, 102)
        row[2].set_yticks(range(len(groups)), list(groups), fontsize=8)
        row[2].invert_yaxis()
    grid[-1][1].legend(title="BatchNorm (median of the seeds)", fontsize=8, title_fontsize=8, loc="lower left")
    return figure


if __name__ == "__main__":
    run(NAME, measure)
