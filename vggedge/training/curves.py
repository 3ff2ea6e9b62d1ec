"""The learning curves of a training as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from vggedge.model import CURVES_SUFFIX
from vggedge.training.history import History, write_whole
from vggedge_runtime.dependencies import require

_TRAINING, _VALIDATION, _BEST = "#7f8fa6", "#c0392b", "#2c3e50"


def write_curves(history: History, model_path: Path) -> Path:
    """Write ``MODEL.curves.png`` beside ``MODEL.keras``: loss, accuracy and learning rate of each epoch.

    Raises:
        MissingDependency: matplotlib is not installed.
        ModelError: the disk refused.
    """
    figure = build_curves(history)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return write_whole(model_path.with_suffix(CURVES_SUFFIX), content.getvalue())


def build_curves(history: History) -> Any:
    """The same as a matplotlib Figure, of its Agg canvas and without pyplot's global state."""
    figures = require("matplotlib.figure", "train")
    canvases = require("matplotlib.backends.backend_agg", "train")
    figure = figures.Figure(figsize=(8, 8.5), layout="constrained")
    canvases.FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1.4))
    best = history.best
    figure.suptitle(
        f"{history.spec.name} on {history.data}: epoch {best.epoch} of {len(history.epochs)} is kept, "
        f"validation accuracy {best.val_accuracy:.2%}, loss {best.val_loss:.4f}",
        fontsize=10,
        wrap=True,
    )
    _draw_pair(loss, history, "loss", "cross-entropy, nats")
    _draw_pair(accuracy, history, "accuracy", "accuracy, %", factor=100)
    numbers = [each.epoch for each in history.epochs]
    rate.plot(numbers, [each.learning_rate for each in history.epochs], color=_BEST, marker=".")
    rate.set_ylabel("learning rate")
    rate.set_yscale("log")
    rate.set_xlabel("epoch")
    rate.set_xlim(0.5, len(numbers) + 0.5)
    rate.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, accuracy, rate):
        axes.grid(alpha=0.3)
        axes.axvline(best.epoch, color=_BEST, linestyle=":", linewidth=1)
    return figure


def _draw_pair(axes: Any, history: History, name: str, label: str, factor: float = 1) -> None:
    """One measure of training and validation images against the epoch, with the best epoch marked."""
    numbers = [each.epoch for each in history.epochs]
    for prefix, what, colour in (("", "training", _TRAINING), ("val_", "validation", _VALIDATION)):
        values = [factor * getattr(each, prefix + name) for each in history.epochs]
        axes.plot(numbers, values, color=colour, marker=".", label=what)
    value = factor * getattr(history.best, f"val_{name}")
    axes.plot(history.best_epoch, value, "o", color=_BEST, markersize=9, fillstyle="none", label="kept")
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.08 * axes.dataLim.ymax)  # from 0: a flat curve has to look flat
    axes.legend()
