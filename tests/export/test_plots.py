"""The picture of a plan shows the numbers of the plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vggedge_export import plots
from vggedge_export.plots import write_plan_plot
from vggedge_runtime.errors import MissingDependency
from vggedge_runtime.evidence import PlanPoint, PrecisionPlan, Sensitivity
from vggedge_runtime.paired import PairedChange

figures: Any = pytest.importorskip("matplotlib.figure")


def change(lost: int, low: float, high: float) -> PairedChange:
    return PairedChange(n=1000, lost=lost, gained=0, p_value=0.5, low=low, high=high)


def point(share: float, lost: int, *in_float: str, fits: bool = True) -> PlanPoint:
    middle = -lost / 10
    return PlanPoint(
        float_layers=in_float, int8_share=share, change=change(lost, middle - 0.5, middle + 0.3), fits=fits
    )


TRIED = (point(0.9, 80, fits=False), point(0.7, 30, "a", fits=False), point(0.4, 5, "a", "b"), point(0.6, 7, "b"))


def plan(*tried: PlanPoint, chosen: int = -1, max_drop: float = 1.0) -> PrecisionPlan:
    return PrecisionPlan(
        max_drop=max_drop,
        images=1000,
        total_macs=200,
        chosen=tried[chosen],
        sensitivities=(
            Sensitivity(layer="a", macs=40, divergence=0.1, change=change(60, -7, -5)),
            Sensitivity(layer="b", macs=60, divergence=0.1, change=change(20, -3, -1)),
        ),
        tried=tried,
        rule="a rule",
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    made: list[Any] = []

    def figure(**options: Any) -> Any:
        made.append(figures.Figure(**options))
        return made[-1]

    monkeypatch.setattr(plots, "require", lambda module, extra: SimpleNamespace(Figure=figure))
    return made


def series(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Points by the label in the legend."""
    lines = {line.get_label(): line for line in axes.lines}
    lines |= {box.get_label(): box.lines[0] for box in axes.containers}
    return {
        label: [(pytest.approx(x), pytest.approx(y)) for x, y in zip(*line.get_data(), strict=True)]
        for label, line in lines.items()
        if not label.startswith("_")
    }


def test_every_plan_and_layer_is_a_point_at_its_share_and_change(drawn: list[Any], tmp_path: Path) -> None:
    write_plan_plot(plan(*TRIED), "mixed", tmp_path / "plan.png")
    (axes,) = drawn[0].axes
    assert series(axes) == {
        "one layer alone in INT8": [(20, -6), (30, -2)],
        "plan, loss within budget": [(40, -0.5), (60, -0.7)],
        "plan, loss not": [(70, -3), (90, -8)],
        "taken": [(60, -0.7)],
    }
    bars = {box.get_label(): box.lines[2][0].get_segments() for box in axes.containers}
    assert [tuple(end[1] for end in segment) for segment in bars["plan, loss not"]] == [
        pytest.approx((-3.5, -2.7)),
        pytest.approx((-8.5, -7.7)),
    ]
    assert axes.get_title() == "mixed: 60.0 % of the work in INT8, 1 layer in float"
    assert "n = 1,000" in axes.get_ylabel()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert set(labels) == {"budget, 1 points", *series(axes)}


@pytest.mark.parametrize(("max_drop", "span"), [(1.0, (-1.0, 0.0)), (2.5, (-2.5, 0.0))])
def test_the_budget_is_a_band(max_drop: float, span: tuple[float, float], drawn: list[Any], tmp_path: Path) -> None:
    write_plan_plot(plan(*TRIED, max_drop=max_drop), "mixed", tmp_path / "plan.png")
    (band,) = [patch for patch in drawn[0].axes[0].patches if patch.get_label().startswith("budget")]
    assert (band.get_y(), band.get_y() + band.get_height()) == span


@pytest.mark.parametrize(
    ("tried", "words"),
    [
        ([point(0.9, 0)], "every layer that can be"),
        ([point(0.4, 5, "a", "b")], "2 layers in float"),
    ],
)
def test_a_plan_that_fits_at_once_has_no_points_beyond_the_budget(
    tried: list[PlanPoint], words: str, drawn: list[Any], tmp_path: Path
) -> None:
    write_plan_plot(plan(*tried), "int8", tmp_path / "plan.png")
    (axes,) = drawn[0].axes
    assert "plan, loss not" not in series(axes)
    assert axes.get_title().endswith(f"in INT8, {words}")


def test_an_interval_that_does_not_hold_its_own_middle_is_drawn_all_the_same(tmp_path: Path) -> None:
    """A bootstrap's percentiles may; an error bar of negative length raises."""
    odd = PlanPoint(float_layers=(), int8_share=0.5, change=change(10, -0.9, -0.8), fits=True)
    write_plan_plot(plan(odd), "int8", tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.size == (840, 540)


def test_no_global_state_of_matplotlib_is_touched(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2]); import test_plots as t;"
        "t.write_plan_plot(t.plan(*t.TRIED), 'mixed', pathlib.Path(sys.argv[1]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    target = tmp_path / "plan.png"
    done = subprocess.run(
        [sys.executable, "-c", code, str(target), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert target.is_file()


def test_matplotlib_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"matplotlib .*pip install 'vggedge\[export\]'"):
        write_plan_plot(plan(*TRIED), "mixed", tmp_path / "plan.png")
    assert list(tmp_path.iterdir()) == []
