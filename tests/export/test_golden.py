"""Which images become golden ones, and what is written of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vggedge_export.golden import choose_golden, write_golden
from vggedge_export.verification import LabelledImages
from vggedge_runtime.graphs import GRAPHS


def scores(*tops: float) -> np.ndarray:
    """Answers over three classes whose first has these probabilities."""
    return np.float32([[top, (1 - top) / 2, (1 - top) / 2] for top in tops])


def test_golden_images_are_clear_ones_of_different_classes() -> None:
    answers = {"fp32": scores(0.5, 0.9, 1.0, 0.89, 0.82, 0.7)}
    assert choose_golden(answers, np.array([0, 0, 1, 0, 2, 2])) == [1, 4, 2, 3]


@pytest.mark.parametrize("name", [name for name in GRAPHS if name != "fp32"])
def test_golden_images_are_not_those_on_which_a_graph_is_near_its_tolerance(name: str) -> None:
    fp32 = scores(0.9, 0.9, 0.6, 0.7, 0.8, 0.85)
    other = fp32.copy()
    other[:2, 0] -= 0.51 * GRAPHS[name].golden_tolerance
    other[2:, 0] -= 0.49 * GRAPHS[name].golden_tolerance
    assert set(choose_golden({"fp32": fp32, name: other}, np.zeros(6, np.int64))) == {2, 3, 4, 5}


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_there_are_one_to_four_golden_images_and_none_twice(n: int) -> None:
    rows = choose_golden({"fp32": scores(*np.linspace(0.4, 0.99, n))}, np.arange(n) % 3)
    assert len(rows) == len(set(rows)) == min(n, 4)


def test_what_is_written_is_the_chosen_images_and_every_graphs_answers_to_them(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), dtype=np.uint8)
    fp32 = scores(0.5, 0.9, 1.0, 0.89, 0.82, 0.7)
    answers = {"fp32": fp32, "mixed-rtx": fp32[:, ::-1] * np.float32(0.01) + fp32 * np.float32(0.99)}
    data = LabelledImages("six", images, np.array([0, 0, 1, 0, 2, 2]))
    record = write_golden(tmp_path, answers, data)
    assert record.inputs == "golden/inputs.npy"
    assert record.outputs == {name: f"golden/outputs.{name}.npy" for name in answers}
    rows = [1, 4, 2, 3]
    np.testing.assert_array_equal(np.load(tmp_path / record.inputs), images[rows])
    for name, file in record.outputs.items():
        np.testing.assert_array_equal(np.load(tmp_path / file), answers[name][rows])
