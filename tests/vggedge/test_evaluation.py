from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from vggedge import evaluation
from vggedge.architecture import get_spec
from vggedge.data import open_images
from vggedge.data.base import ImageSet
from vggedge.evaluation import (
    AS_DEPLOYED,
    Protocol,
    build_predict,
    evaluate,
    frequent_confusions,
    iterate_answers,
    worst_classes,
)
from vggedge.model import build_vgg, import_keras
from vggedge_runtime.errors import DataError, ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec, Normalization, Pixels
from vggedge_runtime.statistics import build_class_figures, build_proportion

HEIGHT, WIDTH = 4, 6


def make_set(targets: list[int], classes: int = 3, aspect: Callable[[int], float] = lambda index: 1.0) -> ImageSet:
    """Image i holds i in its blue channel, and in red and green the row and column, when it is read scaled."""

    def read_one(index: int) -> Pixels:
        return np.full((HEIGHT, WIDTH, 3), index, np.uint8)

    def read_scaled(index: int, side: int) -> Pixels:
        rows, columns = np.indices((side, round(side * aspect(index))))
        return np.stack([rows, columns, np.full_like(rows, index)], axis=2).astype(np.uint8)

    names = tuple(f"c{number}" for number in range(classes))
    return ImageSet("made", names, np.array(targets, np.int64), read_one, read_scaled)


def answer_from(table: np.ndarray) -> Callable[[Pixels], np.ndarray]:
    """Answers image i with row i of ``table``."""
    return lambda images: np.float32(table)[images[:, 0, 0, 2]]


class Recorder:
    """Keeps every batch; answers with the brightest channel of the first pixel."""

    def __init__(self) -> None:
        self.batches: list[Pixels] = []

    def __call__(self, images: Pixels) -> np.ndarray:
        self.batches.append(images)
        corner = images[:, 0, 0].astype(np.float32) + 1
        return corner / corner.sum(axis=1, keepdims=True)

    @property
    def views(self) -> list[Pixels]:
        return [view for batch in self.batches for view in batch]


class TestFigures:
    """Six images of three classes; what comes out was computed by hand."""

    TABLE = np.array(
        [
            [0.5, 0.25, 0.25],  # 0, right
            [0.25, 0.5, 0.25],  # 0, called 1
            [0.25, 0.5, 0.25],  # 1, right
            [0.5, 0.25, 0.25],  # 1, called 0
            [0.25, 0.5, 0.25],  # 1, right
            [0.5, 0.5, 0.0],  # 2: impossible, said the network
        ]
    )
    TARGETS = (0, 0, 1, 1, 1, 2)

    @pytest.fixture
    def result(self) -> evaluation.Evaluation:
        return evaluate(answer_from(self.TABLE), make_set(list(self.TARGETS)))

    def test_of_all_images(self, result: evaluation.Evaluation) -> None:
        assert (result.data, result.n, result.labels) == ("made", 6, ("c0", "c1", "c2"))
        assert result.accuracy == build_proportion(3, 6)
        assert result.top5_accuracy is None
        assert result.confusion == ((1, 1, 0), (1, 2, 0), (1, 0, 0))
        assert result.balanced_accuracy == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
        wanted = (3 * math.log(2) + 2 * math.log(4) + math.log(1e7)) / 6
        assert result.cross_entropy == pytest.approx(wanted, rel=1e-6)
        assert result.seconds > 0

    def test_of_each_class(self, result: evaluation.Evaluation) -> None:
        first, second, third = result.classes
        assert (first.label, first.images, first.answered) == ("c0", 2, 3)
        assert (first.recall, first.precision, first.f1) == pytest.approx((1 / 2, 1 / 3, 2 / 5))
        assert (second.recall, second.precision, second.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
        assert (third.images, third.answered, third.recall, third.precision, third.f1) == (1, 0, 0.0, None, 0.0)

    def test_a_class_that_nobody_saw_or_named_has_no_figures(self) -> None:
        figures = build_class_figures(np.array([[2, 0, 1], [0, 0, 0], [0, 0, 0]]), ("a", "b", "c"))
        assert [(each.recall, each.precision, each.f1) for each in figures] == [
            (2 / 3, 1.0, 0.8),
            (None, None, None),
            (None, 0.0, 0.0),
        ]

    def test_a_class_without_images_does_not_weigh_on_the_balance(self) -> None:
        table = np.array([[0.6, 0.4, 0.0], [0.6, 0.4, 0.0]])
        assert evaluate(answer_from(table), make_set([0, 1])).balanced_accuracy == 0.5

    def test_top_five(self) -> None:
        """Of equal probabilities the first class counts as the more probable, as in argmax."""
        ranked = np.array([0.3, 0.2, 0.15, 0.12, 0.09, 0.08, 0.06])
        table = np.stack([ranked, ranked, ranked, np.full(7, 1 / 7), np.full(7, 1 / 7), np.full(7, 1 / 7)])
        result = evaluate(answer_from(table), make_set([0, 4, 5, 0, 4, 5], classes=7))
        assert result.top5_accuracy == build_proportion(4, 6)
        assert result.accuracy == build_proportion(2, 6)

    def test_the_worst_classes_and_the_most_frequent_confusions(self, result: evaluation.Evaluation) -> None:
        assert [each.label for each in worst_classes(result, 2)] == ["c2", "c0"]
        confusions = [(each.true, each.answered, each.images) for each in frequent_confusions(result, 10)]
        assert confusions == [("c0", "c1", 1), ("c1", "c0", 1), ("c2", "c0", 1)]
        assert [each.share for each in frequent_confusions(result, 2)] == pytest.approx([1 / 2, 1 / 3])

    def test_classes_without_images_are_not_the_worst(self) -> None:
        table = np.eye(3)[[0, 2, 2]]
        result = evaluate(answer_from(table), make_set([0, 2, 2]))
        assert [each.label for each in worst_classes(result, 3)] == ["c2", "c0", "c1"]
        assert frequent_confusions(result, 5) == []


class TestProtocol:
    @pytest.mark.parametrize(
        ("protocol", "views", "words"),
        [
            (AS_DEPLOYED, 1, "as deployed, 4x6 pixels; 1 view an image"),
            (Protocol(flip=True), 2, "as deployed, 4x6 pixels; mirrored, too; 2 views an image"),
            (Protocol(scales=(8,)), 1, "Q = 8; centre crop of 4x6; 1 view an image"),
            # Section 3.2 of the paper: 150 crops over 3 scales.
            (
                Protocol(scales=(8, 9, 10), crops=5, flip=True),
                150,
                "Q = 8, 9, 10; 5x5 crops of 4x6; mirrored, too; 150 views an image",
            ),
            (Protocol(scales=(8, 9), dense=True), 2, "Q = 8, 9; the whole image, dense; 2 views an image"),
            (Protocol(dense=True), 1, "Q = 6; the whole image, dense; 1 view an image"),
        ],
    )
    def test_it_says_what_it_does(self, protocol: Protocol, views: int, words: str) -> None:
        assert protocol.views == views
        assert protocol.describe(HEIGHT, WIDTH) == words
        recorder = Recorder()
        evaluate(recorder, make_set([0, 1]), protocol)
        assert len(recorder.views) == 2 * views

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scales": (0,)}, "scales are"),
            ({"scales": (64, 99_999)}, "different lengths of 1 to 8192 pixels"),
            ({"scales": (64, -1)}, "different lengths of 1 to 8192 pixels"),
            ({"scales": (64, 64)}, "different lengths"),
            ({"crops": 0, "scales": (64,)}, "crops is 0"),
            ({"crops": 3}, "needs scales to crop from"),
            ({"crops": 3, "scales": (64,), "dense": True}, "exclude each other"),
        ],
    )
    def test_contradictions(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Protocol(**options)

    @pytest.mark.parametrize("dense", [True, False])
    def test_a_scale_below_the_network(self, dense: bool) -> None:
        """Whatever the shape of the images: a portrait would not hold an input that lies on its side."""
        recorder = Recorder()
        with pytest.raises(UsageError, match=r"scale 4, 5: .* input of 4x6\. Use scales of at least 6"):
            evaluate(recorder, make_set([0]), Protocol(scales=(4, 5, 6), dense=dense))
        assert recorder.batches == []


class TestViews:
    def test_as_deployed(self) -> None:
        recorder = Recorder()
        images = make_set([0, 1])
        evaluate(recorder, images)
        np.testing.assert_array_equal(recorder.views, [images.read_one(0), images.read_one(1)])

    @pytest.mark.parametrize(
        ("side", "crops", "corners"),
        [
            (6, 1, {(1, 0)}),  # (row, column) of each crop's first pixel; crops are 4x6
            (10, 1, {(3, 2)}),
            (10, 2, {(0, 0), (0, 4), (6, 0), (6, 4)}),
            (10, 3, {(row, column) for row in (0, 3, 6) for column in (0, 2, 4)}),
        ],
    )
    def test_crops_lie_in_a_regular_grid(self, side: int, crops: int, corners: set[tuple[int, int]]) -> None:
        recorder = Recorder()
        evaluate(recorder, make_set([0]), Protocol(scales=(side,), crops=crops))
        assert {view.shape for view in recorder.views} == {(HEIGHT, WIDTH, 3)}
        assert {(int(view[0, 0, 0]), int(view[0, 0, 1])) for view in recorder.views} == corners
        assert len(recorder.views) == crops**2

    def test_the_mirror_image(self) -> None:
        recorder = Recorder()
        evaluate(recorder, make_set([0]), Protocol(scales=(8,), flip=True))
        view, mirrored = recorder.views
        np.testing.assert_array_equal(mirrored, view[:, ::-1])
        assert (view[0, 0, 1], mirrored[0, 0, 1]) == (1, 6)

    def test_dense_shows_the_whole_image(self) -> None:
        recorder = Recorder()
        evaluate(recorder, make_set([0], aspect=lambda index: 1.5), Protocol(scales=(8, 12), dense=True))
        assert [view.shape for view in recorder.views] == [(8, 12, 3), (12, 18, 3)]

    def test_the_answer_is_the_mean_over_the_views(self) -> None:
        """Crop corners 0 and 6 by 0 and 4, answered by the Recorder's rule."""
        corners = np.array([[row, column, 0] for row in (0, 6) for column in (0, 4)]) + 1.0
        wanted = (corners / corners.sum(axis=1, keepdims=True)).mean(axis=0)
        (found,) = iterate_answers(Recorder(), make_set([0]), Protocol(scales=(10,), crops=2))
        np.testing.assert_allclose(found, [wanted], rtol=1e-6)

    def test_images_of_many_sizes_keep_their_answers(self) -> None:
        images = make_set(list(range(3)) * 5, aspect=lambda index: 1 + (index % 4) / 2)
        table = np.random.default_rng(0).dirichlet(np.ones(3), 15)
        recorder = Recorder()

        def predict(batch: Pixels) -> np.ndarray:
            recorder(batch)
            return answer_from(table)(batch)

        (found,) = iterate_answers(predict, images, Protocol(scales=(8, 10), dense=True))
        np.testing.assert_allclose(found, table, rtol=1e-6)
        assert len(recorder.batches) == 8  # 2 scales, 4 aspects: images of one size are asked together


class TestMemory:
    @pytest.fixture
    def images(self) -> ImageSet:
        return make_set([index % 3 for index in range(50)])

    def test_a_crop_does_not_hold_the_whole_image(self, images: ImageSet) -> None:
        protocol = Protocol(scales=(64,), crops=2)
        for view in protocol.views_of(images, 0, HEIGHT, WIDTH):
            assert view.base is None

    def test_few_images_at_a_time(self, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
        """24 pixels a view: 5 a call, and 10 views wait at most."""
        monkeypatch.setattr(evaluation, "_BATCH_PIXELS", 5 * HEIGHT * WIDTH)
        monkeypatch.setattr(evaluation, "_HELD_PIXELS", 10 * HEIGHT * WIDTH)
        table = np.random.default_rng(0).dirichlet(np.ones(3), 50)
        read: list[int] = []
        counted = replace(images, read_one=lambda index: (read.append(index), images.read_one(index))[1])
        waiting: list[int] = []

        def predict(batch: Pixels) -> np.ndarray:
            assert len(batch) <= 5
            waiting.append(len(set(read)))
            return answer_from(table)(batch)

        found = list(iterate_answers(predict, counted, Protocol(flip=True)))
        assert [len(each) for each in found] == [5] * 10
        np.testing.assert_allclose(np.concatenate(found), table, rtol=1e-6)
        assert waiting == [5 * (call // 2 + 1) for call in range(20)]

    def test_the_figures_do_not_depend_on_it(self, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
        predict = answer_from(np.random.default_rng(0).dirichlet(np.ones(3), 50))
        whole = evaluate(predict, images)
        monkeypatch.setattr(evaluation, "_HELD_PIXELS", 7 * HEIGHT * WIDTH)
        parts = evaluate(predict, images)
        assert parts.confusion == whole.confusion
        assert parts.cross_entropy == pytest.approx(whole.cross_entropy)

    def test_progress_goes_up_to_the_number_of_images(self, images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(evaluation, "_BATCH_PIXELS", 3 * HEIGHT * WIDTH)
        monkeypatch.setattr(evaluation, "_HELD_PIXELS", 20 * HEIGHT * WIDTH)
        told: list[tuple[int, int]] = []
        evaluate(Recorder(), images, Protocol(flip=True), lambda done, total, what: told.append((done, total)))
        assert (told[0], told[-1]) == ((0, 50), (50, 50))
        assert told == sorted(told)
        assert len(told) > 30


class TestBadAnswers:
    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ([2.0, -1.0, 0.0], "the smallest is -1"),
            ([0.5, 0.5, 0.01], r"sum is 1\.01; needed"),
            ([0.2, 0.2, 0.2], r"sum is 0\.6;"),
            ([0.5, math.nan, 0.5], "NaN"),
            ([math.inf, 0.0, 0.0], "NaN or infinity"),
            ([0.5, 0.5], r"array of \(2, 2\); needed is \(2, 3\)"),
        ],
    )
    def test_no_probabilities(self, row: list[float], message: str) -> None:
        good = [1.0, 0.0, 0.0][: len(row)]
        with pytest.raises(ModelError, match=message):
            evaluate(answer_from(np.array([good, row])), make_set([0, 1]))

    def test_rounding_is_none(self) -> None:
        table = np.array([[0.5, 0.3, 0.2005]])
        assert evaluate(answer_from(table), make_set([0])).accuracy == build_proportion(1, 1)


def test_no_images() -> None:
    with pytest.raises(DataError, match="made: there are no images"):
        evaluate(Recorder(), make_set([]))


def test_an_unreadable_image_ends_it() -> None:
    def read(index: int) -> Pixels:
        if index == 1:
            raise DataError("b.png: the image cannot be decoded")
        return np.zeros((HEIGHT, WIDTH, 3), np.uint8)

    with pytest.raises(DataError, match=r"b\.png"):
        evaluate(Recorder(), replace(make_set([0, 1, 2]), read_one=read))


@pytest.fixture
def keras() -> Any:
    pytest.importorskip("keras")
    return import_keras()


class TestKeras:
    @pytest.mark.parametrize("order", ["rgb", "bgr"])
    def test_normalization(self, keras: Any, order: str) -> None:
        inputs = keras.Input((2, 2, 3))
        scores = keras.layers.GlobalAveragePooling2D()(inputs)
        model = keras.Model(inputs, keras.layers.Softmax()(scores))
        normalization = Normalization(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0), order=order)  # type: ignore[arg-type]
        images = np.full((1, 2, 2, 3), (12, 24, 40), np.uint8)
        wanted = np.exp([1.0, 1.0, 2.0]) / np.exp([1.0, 1.0, 2.0]).sum()
        found = build_predict(model, normalization=normalization)(images)
        np.testing.assert_allclose(found[0], wanted if order == "rgb" else wanted[::-1], rtol=1e-5)

    def test_all_protocols_on_one_network(self, keras: Any) -> None:
        """At the network's own size, the centre crop and dense evaluation are what the device does."""
        model = build_vgg(get_spec("vgg9-compact"), seed=2)
        images = open_images("fingers:24", ImageSpec(height=64, width=64))
        predict, dense = build_predict(model), build_predict(model, dense=True)
        (deployed,) = iterate_answers(predict, images)
        np.testing.assert_allclose(deployed, model(images.read().astype(np.float32), training=False), atol=1e-6)
        for ask, protocol in (
            (predict, Protocol(scales=(64,))),
            (predict, Protocol(scales=(64,), crops=2)),
            (dense, Protocol(dense=True)),
        ):
            (found,) = iterate_answers(ask, images, protocol)
            np.testing.assert_allclose(found, deployed, atol=1e-5)
        several = evaluate(dense, images, Protocol(scales=(64, 96), flip=True, dense=True))
        assert several.n == sum(map(sum, several.confusion)) == 24
        assert abs(several.cross_entropy - evaluate(predict, images).cross_entropy) > 1e-4
