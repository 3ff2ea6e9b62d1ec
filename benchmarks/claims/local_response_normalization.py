"""Local response normalisation buys little: vgg11 without any, with LRN and with BatchNorm after the first convolution.

python benchmarks/claims/local_response_normalization.py [--quick] [--output DIR]
"""

from __future__ import annotations

from typing import Any

from reporting import Part, Study, Table, build_figure, judge, run
from trials import (
    ACCURACY_COLUMNS,
    SEEDS,
    Budget,
    Trial,
    accuracy_cells,
    compare,
    draw_accuracies,
    record_trials,
    run_contest,
)

from vggedge.architecture import get_spec

NAME = "local_response_normalization"
NONE, LRN, BATCH_NORM = "none", "lrn", "first"
VARIANTS = (NONE, LRN, BATCH_NORM)
BUDGET = Budget(images=3000, epochs=6, seeds=SEEDS)
LITTLE = 2.0
"""Percentage points: gains surely below this are little. The paper's table 3 has a loss of 0.1."""
LEARNT = 0.5
"""Test accuracy. Of networks that answer at random, none is better, and that says nothing about LRN."""


def measure(quick: bool) -> Study:
    """Train the three with all seeds and judge."""
    specs = {name: get_spec("vgg11-compact", normalization=name) for name in VARIANTS}
    groups, protocol = run_contest(specs, BUDGET, quick=quick)
    return Study(
        name=NAME,
        claim="Local response normalisation buys little",
        source="Simonyan & Zisserman 2014, arXiv 1409.1556, section 4.1 and table 3: A and A-LRN",
        parts=(judge_lrn(groups),),
        table=_build_table(groups),
        protocol={
            "networks": "vgg11-compact at 64x64 (channels 4-8-16-32-32, dense 256-256); none: no normalisation; lrn: "
            "after the first convolution's relu (n = 5, k = 2, alpha = 1e-4, beta = 0.75), A-LRN of the paper; "
            "first: BatchNorm at the same place",
            **protocol,
        },
        measurements=record_trials(groups),
        figure=draw(groups),
    )


def judge_lrn(groups: dict[str, list[Trial]]) -> Part:
    """LRN against none."""
    gain, other = compare(groups[LRN], groups[NONE]), compare(groups[BATCH_NORM], groups[NONE])
    has_learnt = all(each.accuracy > LEARNT for each in groups[NONE])
    return Part(
        statement=f"LRN gains less than {LITTLE:g} points",
        rule=f"supported if the 95 % interval of lrn - none lies below +{LITTLE:g} points, contradicted if above; only "
        f"where every seed of none learns, above {100 * LEARNT:.0f} %",
        figures=f"lrn - none: {gain} points; for comparison BatchNorm there: {other}",
        verdict=judge(-gain.high, -gain.low, margin=-LITTLE) if has_learnt else "not shown here",
    )


def _build_table(groups: dict[str, list[Trial]]) -> Table:
    rows = []
    for name, trials in groups.items():
        gain = "-" if name == NONE else str(compare(trials, groups[NONE]))
        rows.append((name, *accuracy_cells(trials), gain))
    columns = ("normalisation", *ACCURACY_COLUMNS, f"over {NONE} [95 %]")
    return Table(columns=columns, rows=tuple(rows))


def draw(groups: dict[str, list[Trial]]) -> Any:
    """Accuracy by normalisation."""
    figure = build_figure(7, 4.5, "What does local response normalisation buy vgg11-compact?")
    axes = figure.subplots()
    draw_accuracies(axes, groups)
    names = ("none", "LRN after\nthe first convolution", "BatchNorm after\nthe first convolution")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("normalisation")
    return figure


if __name__ == "__main__":
    run(NAME, measure)
