"""Golden images: what a session runs when it opens, to refuse a machine or backend that answers wrongly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vggedge_export.verification import LabelledImages, Scores
from vggedge_runtime.bundle import GoldenRecord
from vggedge_runtime.graphs import GRAPHS

_GOLDEN_IMAGES = 4


def write_golden(folder: Path, answers: dict[str, Scores], evaluation: LabelledImages) -> GoldenRecord:
    """Write the golden images and every graph's answers to them into ``golden`` in the bundle at ``folder``."""
    (folder / "golden").mkdir()
    rows = choose_golden(answers, evaluation.targets)
    np.save(folder / "golden/inputs.npy", evaluation.images[rows])
    outputs = {name: f"golden/outputs.{name}.npy" for name in answers}
    for name, file in outputs.items():
        np.save(folder / file, answers[name][rows])
    return GoldenRecord(inputs="golden/inputs.npy", outputs=outputs)


def choose_golden(answers: dict[str, Scores], targets: NDArray[np.int64]) -> list[int]:
    """Rows of up to four golden images, of different classes as far as there are.

    A golden image has to show wrong arithmetic and to overlook other rounding. So it is one on which all graphs
    agree well within their tolerances, and among those one whose top class has a probability near 0.9: at 1.0000
    an answer hides large errors, near a tie it flips on small ones.
    """
    calm = np.ones(len(targets), dtype=bool)
    for name, scores in answers.items():
        off = np.abs(scores - answers["fp32"]).max(axis=1)
        calm &= off <= GRAPHS[name].golden_tolerance / 2
    unease = np.abs(answers["fp32"].max(axis=1) - 0.9) + np.where(calm, 0.0, 1.0)
    order = [int(row) for row in np.argsort(unease, kind="stable")]
    first_of_class = list({int(targets[row]): row for row in reversed(order)}.values())[::-1]
    chosen = sorted(first_of_class, key=lambda row: unease[row]) + order
    return list(dict.fromkeys(chosen))[:_GOLDEN_IMAGES]
