"""Pictures of what export found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vggedge_runtime.dependencies import require
from vggedge_runtime.evidence import PlanPoint, PrecisionPlan


def write_plan_plot(plan: PrecisionPlan, name: str, path: Path) -> None:
    """Write accuracy against share of INT8 work as a PNG: single layers, plans tried, budget, and the plan taken.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    require("matplotlib", "export")  # the message names it, not a module of it
    figure_class = require("matplotlib.figure", "export").Figure  # no pyplot: no global state, no display
    figure = figure_class(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    single = [(100 * each.macs / plan.total_macs, each.change.points) for each in plan.sensitivities]
    axes.axhspan(-plan.max_drop, 0, color="#2a9d8f", alpha=0.12, label=f"budget, {plan.max_drop:g} points")
    axes.plot(*zip(*single, strict=True), "o", color="#9aa5b1", markersize=4, label="one layer alone in INT8")
    tried = sorted(plan.tried, key=lambda point: point.int8_share)
    for fits, colour, label in ((True, "#2a9d8f", "plan, loss within budget"), (False, "#c1440e", "plan, loss not")):
        _errorbar(axes, [point for point in tried if point.fits == fits], colour, label)
    chosen = plan.chosen
    axes.plot([100 * chosen.int8_share], [chosen.change.points], "*", color="#14213d", markersize=13, label="taken")
    axes.axhline(0, color="#14213d", linewidth=0.8)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("multiply-accumulates in INT8, % of all")
    axes.set_ylabel(f"change of accuracy against FP32, points (n = {plan.images:,})")
    axes.set_title(f"{name}: {100 * chosen.int8_share:.1f} % of the work in INT8, {_count(chosen)}")
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=120)


def _errorbar(axes: Any, points: list[PlanPoint], colour: str, label: str) -> None:
    """Plans with the 95 % intervals of their change."""
    if not points:
        return
    middle = [point.change.points for point in points]
    below = [max(0.0, point.change.points - point.change.low) for point in points]
    above = [max(0.0, point.change.high - point.change.points) for point in points]
    axes.errorbar(
        [100 * point.int8_share for point in points],
        middle,
        yerr=[below, above],
        fmt="o",
        color=colour,
        markersize=5,
        capsize=2,
        linewidth=1,
        label=label,
    )


def _count(point: PlanPoint) -> str:
    layers = len(point.float_layers)
    return "every layer that can be" if not layers else f"{layers} layer{'s' if layers > 1 else ''} in float"
