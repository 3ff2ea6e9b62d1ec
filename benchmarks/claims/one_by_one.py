"""A 1x1 convolution in place of the third 3x3 helps less than the 3x3: the paper's configurations B, C and D.

python benchmarks/claims/one_by_one.py [--quick] [--output DIR]
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

from vggedge.analysis import analyse
from vggedge.architecture import get_spec

NAME = "one_by_one"
WITHOUT, ONE_BY_ONE, THREE_BY_THREE = "vgg13", "vgg16-1x1", "vgg16"
VARIANTS = (WITHOUT, ONE_BY_ONE, THREE_BY_THREE)
PAPERS_LETTERS = dict(zip(VARIANTS, "BCD", strict=True))
BUDGET = Budget(images=3000, epochs=6, seeds=SEEDS)
RULE = "supported if the 95 % interval of the difference lies above 0, contradicted if it lies below"


def measure(quick: bool) -> Study:
    """Train B, C and D with all seeds and judge."""
    specs = {name: get_spec(f"{name}-compact", normalization="none") for name in VARIANTS}
    groups, protocol = run_contest(specs, BUDGET, quick=quick)
    return Study(
        name=NAME,
        claim="A 1x1 in place of the third 3x3 helps less than a 3x3",
        source="Simonyan & Zisserman 2014, arXiv 1409.1556, section 4.1 and table 3: B, C and D",
        parts=tuple(judge_kernels(groups)),
        table=_build_table(groups),
        protocol={
            "networks": "compact variants at 64x64 (channels 4-8-16-32-32, dense 256-256, dropout 0.3), no "
            "normalisation, as in the paper",
            **protocol,
        },
        measurements=record_trials(groups),
        figure=draw(groups),
    )


def judge_kernels(groups: dict[str, list[Trial]]) -> list[Part]:
    """D over C, and C over B."""
    window = compare(groups[THREE_BY_THREE], groups[ONE_BY_ONE])
    depth = compare(groups[ONE_BY_ONE], groups[WITHOUT])
    return [
        Part(
            statement="a third 3x3 is better than a 1x1 there (D over C)",
            rule=RULE,
            figures=f"{THREE_BY_THREE} - {ONE_BY_ONE}: {window} points",
            verdict=judge(window.low, window.high),
        ),
        Part(
            statement="a 1x1 there is better than nothing (C over B)",
            rule=RULE,
            figures=f"{ONE_BY_ONE} - {WITHOUT}: {depth} points",
            verdict=judge(depth.low, depth.high),
        ),
    ]


def _build_table(groups: dict[str, list[Trial]]) -> Table:
    rows = []
    for name, trials in groups.items():
        figures = analyse(get_spec(f"{name}-compact", normalization="none"))
        gain = "-" if name == WITHOUT else str(compare(trials, groups[WITHOUT]))
        label = f"{PAPERS_LETTERS[name]}, {name}"
        rows.append((label, f"{figures.parameters:,}", *accuracy_cells(trials), gain))
    columns = ("network", "parameters", *ACCURACY_COLUMNS, f"over {WITHOUT} [95 %]")
    return Table(columns=columns, rows=tuple(rows))


def draw(groups: dict[str, list[Trial]]) -> Any:
    """Accuracy of B, C and D."""
    figure = build_figure(7, 4.5, "Is the third convolution's window of 3x3 worth having?")
    axes = figure.subplots()
    draw_accuracies(axes, groups)
    names = (f"{WITHOUT} (B)\nno third", f"{ONE_BY_ONE} (C)\nthird is 1x1", f"{THREE_BY_THREE} (D)\nthird is 3x3")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("convolution in stages 3, 4 and 5")
    return figure


if __name__ == "__main__":
    run(NAME, measure)
