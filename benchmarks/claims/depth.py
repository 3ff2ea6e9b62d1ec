"""Deeper is better up to a point: the compact networks with 9 to 19 weight layers.

python benchmarks/claims/depth.py [--quick] [--output DIR]
"""

from __future__ import annotations

from typing import Any

from reporting import Part, Study, Table, build_figure, judge, run
from trials import (
    ACCURACY_COLUMNS,
    SEEDS,
    Budget,
    Difference,
    Trial,
    accuracy_cells,
    compare,
    draw_accuracies,
    record_trials,
    run_contest,
)

from vggedge.analysis import analyse
from vggedge.architecture import get_spec

NAME = "depth"
SHALLOWEST, PAPERS_BEST, DEEPEST = "vgg9", "vgg16", "vgg19"
VARIANTS = (SHALLOWEST, "vgg11", "vgg13", PAPERS_BEST, DEEPEST)
BUDGET = Budget(images=3000, epochs=6, seeds=SEEDS)
JOINT_CONFIDENCE = 1 - 0.05 / (len(VARIANTS) - 1)
"""Bonferroni: with so many comparisons against the shallowest, 95 % hold for all of them together."""
NO_GAIN = 1.0
"""Percentage points; a gain that is surely smaller counts as none."""


def measure(quick: bool) -> Study:
    """Train all depths with all seeds and judge."""
    specs = {name: get_spec(f"{name}-compact", normalization="none") for name in VARIANTS}
    groups, protocol = run_contest(specs, BUDGET, quick=quick)
    return Study(
        name=NAME,
        claim="Deeper is better, up to a point, at these widths",
        source="Simonyan & Zisserman 2014, arXiv 1409.1556, section 4.1 and table 3",
        parts=tuple(judge_depth(groups)),
        table=_build_table(groups),
        protocol={
            "networks": "compact variants at 64x64 (channels 4-8-16-32-32, dense 256-256, dropout 0.3), no "
            "normalisation, as in the paper",
            **protocol,
        },
        measurements=record_trials(groups),
        figure=draw(groups),
    )


def gains(groups: dict[str, list[Trial]]) -> dict[str, Difference]:
    """What each deeper variant has over the shallowest."""
    return {name: compare(groups[name], groups[SHALLOWEST], JOINT_CONFIDENCE) for name in VARIANTS[1:]}


def judge_depth(groups: dict[str, list[Trial]]) -> list[Part]:
    """Whether depth gains anything, and whether the last three layers do."""
    found = gains(groups)
    best = max(found.values(), key=lambda each: each.mean)
    last = compare(groups[DEEPEST], groups[PAPERS_BEST])
    is_worse = all(each.high < 0 for each in found.values())
    saturation = judge(-last.high, -last.low, margin=-NO_GAIN)
    return [
        Part(
            statement=f"some network deeper than {SHALLOWEST} is better",
            rule=f"supported if a deeper one's gain over {SHALLOWEST} has its interval above 0, at "
            f"{100 * JOINT_CONFIDENCE:.2f} % each, so that 95 % hold for all four; contradicted if all lie below 0",
            figures=f"{best.first} has the highest mean, {best} points over {SHALLOWEST}",
            verdict="supported" if best.low > 0 else "contradicted here" if is_worse else "not shown here",
        ),
        Part(
            statement=f"the point is reached at {PAPERS_BEST}: {DEEPEST} is no better",
            rule=f"supported if the 95 % interval of {DEEPEST} - {PAPERS_BEST} lies below +{NO_GAIN:g} point, "
            "contradicted if it lies above",
            figures=f"{DEEPEST} - {PAPERS_BEST}: {last} points",
            verdict=saturation,
        ),
    ]


def _build_table(groups: dict[str, list[Trial]]) -> Table:
    found = gains(groups)
    rows = []
    for name, trials in groups.items():
        figures = analyse(get_spec(f"{name}-compact", normalization="none"))
        gain = str(found[name]) if name in found else "-"
        shallower = VARIANTS[VARIANTS.index(name) - 1]
        step = "-" if name == SHALLOWEST else str(compare(trials, groups[shallower]))
        rows.append((name, f"{figures.parameters:,}", *accuracy_cells(trials), gain, step))
    gained = f"over {SHALLOWEST} [{100 * JOINT_CONFIDENCE:.2f} %]"
    columns = ("network", "parameters", *ACCURACY_COLUMNS, gained, "over the one before [95 %]")
    return Table(columns=columns, rows=tuple(rows))


def draw(groups: dict[str, list[Trial]]) -> Any:
    """Accuracy by depth."""
    figure = build_figure(8, 4.5, "Is a deeper compact VGG better?")
    axes = figure.subplots()
    draw_accuracies(axes, groups)
    axes.set_xlabel("network (its number is that of its weight layers)")
    return figure


if __name__ == "__main__":
    run(NAME, measure)
