"""What benchmarks/precision.py computes by itself: the hardened model, and whether a bar is met."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge_runtime.bundle import GraphRecord
from vggedge_runtime.evidence import Comparison
from vggedge_runtime.paired import build_paired_change
from vggedge_runtime.preprocess import ImageSpec
from vggedge_runtime.statistics import build_proportion

pytest.importorskip("keras")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("precision")


def row(script: Any, subject: str, graph: str, *, lost: int, gained: int, same: int, n: int = 10_000) -> Any:
    reference, candidate = np.ones(n, dtype=bool), np.ones(n, dtype=bool)
    candidate[:lost] = False
    reference[lost : lost + gained] = False
    evidence = Comparison(
        against="fp32",
        obtained="measured",
        images=n,
        max_abs_difference=0.1,
        agreement=build_proportion(same, n),
        accuracy=build_proportion(int(candidate.sum()), n),
        change=build_paired_change(reference, candidate),
    )
    record = GraphRecord(file="x", precision="int8", made_for=(), op_counts={}, evidence=evidence)
    return script.Row(subject=subject, graph=graph, record=record)


@pytest.mark.parametrize(
    ("subject", "graph", "lost", "same", "wanted"),
    [
        ("fingers", "int8", 20, 9980, "met"),  # 0.2 points
        ("fingers", "int8", 45, 9955, "met, not surely"),  # 0.45, and the interval ends at 0.58
        ("fingers", "int8", 60, 9940, "missed"),
        ("fingers", "int8", 20, 9849, "missed"),  # it keeps the class on too few
        ("fingers", "int8-rtx", 20, 9849, "met"),  # of which no agreement is asked
        ("fingers", "fp16", 5, 9995, "met"),
        ("fingers", "fp16", 20, 9980, "missed"),
        ("fingers", "fp32", 20, 9980, ""),
        ("hardened", "int8", 20, 9980, ""),
    ],
)
def test_a_bar_is_met_by_the_estimate_and_surely_by_the_interval(
    subject: str, graph: str, lost: int, same: int, wanted: str, script: Any
) -> None:
    found = row(script, subject, graph, lost=lost, gained=0, same=same)
    assert script.verdict(found) == wanted
    assert script.describe(found)[-1] == wanted


def test_a_hardened_model_answers_as_before_and_its_channels_are_apart(script: Any, tmp_path: Path) -> None:
    from vggedge.architecture import get_spec
    from vggedge.model import ModelCard, build_vgg, read_model, write_model

    plain = build_vgg(get_spec("vgg16-compact"), seed=1)
    labels = tuple("abcdef")
    write_model(plain, tmp_path / "plain.keras", ModelCard(labels=labels, image=ImageSpec(height=64, width=64)))
    script.harden(tmp_path / "plain.keras", tmp_path / "hard.keras")
    hard, card = read_model(tmp_path / "hard.keras")
    assert card.labels == labels
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3)).astype(np.float32)
    answers = [np.asarray(model(images, training=False)) for model in (plain, hard)]
    np.testing.assert_allclose(answers[1], answers[0], atol=1e-5)
    for name in script.HARDENED:
        before, after = (np.abs(model.get_layer(name).get_weights()[0]) for model in (plain, hard))
        np.testing.assert_allclose(after[..., ::8], 100 * before[..., ::8], rtol=1e-6)
        np.testing.assert_array_equal(after[..., 1:8], before[..., 1:8])
