from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vggedge_export.graph import Graph, make_node, value_info
from vggedge_export.verification import (
    PARITY_LIMIT,
    Images,
    LabelledImages,
    batch_for,
    check_parity,
    compare_scores,
    divergence,
    graph_scores,
    keras_scores,
)
from vggedge_runtime.errors import ConversionError, DataError
from vggedge_runtime.paired import ClassChange, Flip
from vggedge_runtime.preprocess import Normalization
from vggedge_runtime.statistics import build_proportion

REFERENCE = np.float32([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
CANDIDATE = np.float32([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
TARGETS = np.array([0, 1, 0, 2])


def compare(reference: np.ndarray = REFERENCE, candidate: np.ndarray = CANDIDATE, **options: Any) -> Any:
    settings = {"targets": TARGETS, "labels": ("a", "b", "c"), "against": "keras", "obtained": "measured"} | options
    return compare_scores(reference, candidate, settings.pop("targets"), **settings)


def test_a_comparison_counts_agreement_accuracy_and_the_largest_difference() -> None:
    found = compare(against="fp32", obtained="emulated")
    assert (found.against, found.obtained, found.images) == ("fp32", "emulated", 4)
    assert found.max_abs_difference == pytest.approx(0.2, abs=1e-6)
    assert found.agreement == build_proportion(3, 4)  # all but the third
    assert found.accuracy == build_proportion(3, 4)  # of the candidate: all but the last
    assert type(found.max_abs_difference) is float


def test_the_difference_is_largest_in_magnitude_whatever_its_sign() -> None:
    assert compare(CANDIDATE, REFERENCE).max_abs_difference == pytest.approx(0.2, abs=1e-6)


def test_equal_answers_differ_by_nothing() -> None:
    found = compare(REFERENCE, REFERENCE, targets=np.array([0, 1, 2, 0]))
    assert (found.max_abs_difference, found.agreement.share, found.accuracy.share) == (0.0, 1.0, 1.0)


def test_a_comparison_tells_image_by_image_what_was_lost_and_gained() -> None:
    found = compare()
    assert found.change is not None
    assert (found.change.n, found.change.lost, found.change.gained, found.change.points) == (4, 0, 1, 25.0)
    back = compare(CANDIDATE, REFERENCE)
    assert back.change is not None
    assert (back.change.lost, back.change.gained, back.change.points) == (1, 0, -25.0)


def test_a_comparison_tells_it_by_class_in_the_order_of_the_labels() -> None:
    assert compare(labels=("cat", "dog", "owl")).classes == (
        ClassChange(label="cat", images=2, reference_right=1, candidate_right=2, lost=0, gained=1),
        ClassChange(label="dog", images=1, reference_right=1, candidate_right=1, lost=0, gained=0),
        ClassChange(label="owl", images=1, reference_right=0, candidate_right=0, lost=0, gained=0),
    )


def test_a_comparison_names_the_images_whose_answer_changed() -> None:
    margins = {"reference_margin": pytest.approx(0.1), "candidate_margin": pytest.approx(0.25)}
    assert compare().flips == (Flip(image=2, true=0, reference=2, candidate=0, **margins),)
    assert compare(REFERENCE, REFERENCE).flips == ()


def test_a_comparison_lists_50_flips_the_surest_first_and_counts_all() -> None:
    sure = np.linspace(0.51, 0.99, 60, dtype=np.float32)
    reference = np.stack([sure, 1 - sure], axis=1)
    found = compare(reference, reference[:, ::-1], targets=np.zeros(60, np.int64), labels=("a", "b"))
    assert [flip.image for flip in found.flips] == list(range(59, 9, -1))
    assert found.agreement == build_proportion(0, 60)
    assert found.change is not None
    assert found.change.lost == 60


def test_labels_and_answers_have_to_belong_together() -> None:
    with pytest.raises(DataError, match="4 images, 2 classes"):
        compare(labels=("a", "b"))
    with pytest.raises(DataError, match="true classes run from 0 to 3"):
        compare(targets=np.array([0, 1, 2, 3]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_answers_that_are_not_finite_are_refused_with_their_number(bad: float) -> None:
    broken = CANDIDATE.copy()
    broken[[0, 2], 1] = bad
    broken[2, 0] = bad
    with pytest.raises(ConversionError, match=r"^2 of 4 answers are NaN or infinite where fp32 is finite"):
        compare(REFERENCE, broken, against="fp32")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reference_that_is_not_finite_is_the_models_fault(bad: float) -> None:
    broken = REFERENCE.copy()
    broken[1, 2] = bad
    for candidate in (CANDIDATE, broken):
        with pytest.raises(ConversionError, match=r"^1 of 4 answers of keras are NaN or infinite"):
            compare(broken, candidate)


# --- divergence


def test_equal_answers_do_not_diverge() -> None:
    assert divergence(REFERENCE, REFERENCE) == 0
    certain = np.float32([[1, 0], [0, 1]])
    assert divergence(certain, certain) == 0


def test_divergence_is_the_mean_over_images_in_nats() -> None:
    reference = np.float32([[0.5, 0.5], [0.25, 0.75]])
    candidate = np.float32([[0.25, 0.75], [0.25, 0.75]])
    one = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert divergence(reference, candidate) == pytest.approx(one / 2, abs=1e-12)
    assert divergence(reference[:1], candidate[:1]) == pytest.approx(one, abs=1e-12)
    assert type(divergence(reference, candidate)) is float


def test_divergence_is_of_the_candidate_from_the_reference() -> None:
    reference, candidate = np.float32([[0.5, 0.5]]), np.float32([[0.875, 0.125]])
    assert divergence(reference, candidate) == pytest.approx(0.5 * np.log(0.5 / 0.875) + 0.5 * np.log(4))
    assert divergence(candidate, reference) == pytest.approx(0.875 * np.log(0.875 / 0.5) + 0.125 * np.log(0.25))


def test_a_probability_of_zero_costs_much_and_not_infinitely_much() -> None:
    reference, candidate = np.float32([[1, 0]]), np.float32([[0, 1]])
    assert divergence(reference, candidate) == pytest.approx(np.log(1e7), rel=1e-6)
    assert divergence(np.float32([[1, 1e-9]]), np.float32([[1, 0]])) == 0  # both below FP32's digits


def test_divergence_tells_candidates_apart_that_keep_every_class() -> None:
    """Differences that float32 sums would lose: what the calibrators are compared by."""
    reference = np.float32([[0.9, 0.1]] * 100)
    near, far = (reference + np.float32([[-each, each]]) for each in (1e-4, 2e-4))
    assert 0 < divergence(reference, near) < divergence(reference, far) < 1e-6
    assert divergence(reference, far) / divergence(reference, near) == pytest.approx(4, rel=0.01)  # a square


def test_divergence_is_never_negative_though_float32_answers_sum_to_one_only_nearly() -> None:
    scores = np.random.default_rng(0).normal(0, 3, (500, 6))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True)).astype(np.float32)
    reference = powers / powers.sum(axis=1, keepdims=True)
    for factor in (np.float32(1 - 2**-23), np.float32(1 + 2**-22)):
        assert 0 <= divergence(reference, reference * factor) < 1e-12


# --- parity and images


@pytest.mark.parametrize(("difference", "passes"), [(0.0, True), (0.99e-4, True), (1.01e-4, False), (0.5, False)])
def test_parity_ends_at_1e_4(difference: float, passes: bool) -> None:
    assert PARITY_LIMIT == 1e-4
    candidate = REFERENCE.copy()
    candidate[1, 1] -= np.float32(difference)
    comparison = compare(REFERENCE, candidate)
    if passes:
        check_parity(comparison)
    else:
        with pytest.raises(ConversionError, match=r"differs from Keras by .*on 4 images; allowed is 0.0001"):
            check_parity(comparison)


@pytest.mark.parametrize(
    ("size", "batch"),
    [
        ((1, 1), 128),
        ((32, 32), 128),
        ((64, 64), 32),
        ((64, 128), 16),
        ((224, 224), 2),
        ((362, 363), 1),
        ((4000, 3000), 1),
    ],
)
def test_a_batch_holds_some_131_thousand_pixels(size: tuple[int, int], batch: int) -> None:
    assert batch_for(np.broadcast_to(np.uint8(0), (1000, *size, 3))) == batch


@pytest.mark.parametrize(("images", "targets"), [(0, 0), (3, 2), (2, 3), (1, 0)])
def test_images_without_a_class_each_are_refused(images: int, targets: int) -> None:
    with pytest.raises(DataError, match=f"^holiday: {images} images with {targets} classes"):
        LabelledImages("holiday", np.zeros((images, 4, 4, 3), np.uint8), np.zeros(targets, np.int64))


def test_images_with_a_class_each_are_taken() -> None:
    assert LabelledImages("a", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)).name == "a"


def test_images_are_listed_by_their_use_as_far_as_there_are() -> None:
    first, second, third = (
        LabelledImages(name, np.zeros((1, 4, 4, 3), np.uint8), np.zeros(1, np.int64)) for name in "abc"
    )
    assert list(Images(first, second, third).by_use()) == ["calibration", "selection", "evaluation"]
    assert [data.name for data in Images(first, second, third).by_use().values()] == ["a", "c", "b"]
    assert list(Images(first, second).by_use()) == ["calibration", "evaluation"]


# --- asking both sides


@pytest.fixture
def images() -> np.ndarray:
    """70 images of 64x64, which is three batches of at most 32."""
    return np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)


def test_a_graphs_answers_come_batch_by_batch_and_in_order(images: np.ndarray, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    nodes = [
        make_node("Cast", ["images"], "f", to=1),
        make_node("ReduceMean", ["f", "axes"], "probabilities", keepdims=0),
    ]
    graph = Graph(
        nodes,
        {"axes": np.array([1, 2])},
        [value_info("images", np.uint8, ["N", 64, 64, 3])],
        [value_info("probabilities", np.float32, ["N", 3])],
    )
    graph.write(tmp_path / "graph.onnx")
    seen: list[tuple] = []
    found = graph_scores(tmp_path / "graph.onnx", images, "fp16", lambda *told: seen.append(told))
    np.testing.assert_allclose(found, images.mean(axis=(1, 2)), rtol=1e-5)
    assert (found.dtype, found.shape) == (np.float32, (70, 3))
    assert seen == [(32, 70, "fp16"), (64, 70, "fp16"), (70, 70, "fp16")]


@pytest.mark.parametrize(
    "normalization",
    [
        None,
        Normalization(mean=(1.0, 20.0, 100.0), std=(2.0, 3.0, 5.0)),
        Normalization(mean=(1.0, 20.0, 100.0), std=(2.0, 3.0, 5.0), order="bgr"),
    ],
)
def test_keras_is_asked_at_inference_with_pixels_normalised_as_the_spec_says(
    normalization: Normalization | None, images: np.ndarray
) -> None:
    class Mean:
        """Stands for a model: the mean of each channel, and how it was called."""

        calls: list[tuple]
        inputs = (SimpleNamespace(shape=(None, 64, 64, 3)),)

        def __init__(self) -> None:
            self.calls = []

        def __call__(self, pixels: np.ndarray, training: bool) -> np.ndarray:
            self.calls.append((len(pixels), pixels.dtype, training))
            return pixels.mean(axis=(1, 2), dtype=np.float64)

    model = Mean()
    told: list[tuple] = []
    progress: Callable[..., None] = lambda *what: told.append(what)  # noqa: E731
    found = keras_scores(model, normalization, images, progress)
    pixels = images.astype(np.float64)
    wanted = pixels if normalization is None else (pixels - normalization.mean) / normalization.std
    wanted = wanted.mean(axis=(1, 2))
    wanted = wanted[:, ::-1] if normalization is not None and normalization.order == "bgr" else wanted
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert model.calls == [(n, np.float32, False) for n in (32, 32, 6)]
    assert [what for *_, what in told] == ["asking Keras"] * 3
