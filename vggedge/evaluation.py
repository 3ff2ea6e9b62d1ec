"""How well a network answers labelled images: as it is deployed, or tested as the VGG paper tests.

The paper's protocols are those of Simonyan & Zisserman 2014, arXiv 1409.1556, sections 3.2 and 4.1 to 4.3: an image is
scaled until its shorter side has Q pixels, one or several Q; the network sees crops of it or, in its fully
convolutional form, all of it; the mirror image is asked, too. The probabilities of all these views are averaged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge.data.base import ImageSet
from vggedge.dense import dense_model
from vggedge_runtime.errors import DataError, ModelError, UsageError
from vggedge_runtime.preprocess import LARGEST_SCALE, Normalization, Pixels
from vggedge_runtime.progress import Advance, ignore_progress
from vggedge_runtime.statistics import ClassFigures, Proportion, build_class_figures, build_proportion

if TYPE_CHECKING:
    import keras

Predict: TypeAlias = Callable[[Pixels], NDArray[np.float32]]
"""From uint8 (n, height, width, 3) RGB to float32 probabilities (n, classes); Session.predict is one."""

SUM_TOLERANCE = 1e-3
"""How far a row of probabilities may be from a sum of 1. FP16 rounds each by 2**-11 of itself at worst; scores
that never went through a softmax are off by far more."""

_SMALLEST_PROBABILITY = 1e-7  # in the cross-entropy: Keras's epsilon, so that its loss and this figure agree
_BATCH_PIXELS = 1 << 18  # of one call of predict: bounds the first activations of a full VGG to some 100 MB
_HELD_PIXELS = 1 << 22  # of the views that wait for their call: 13 MB, and enough images to find equal sizes among


class Protocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which views of an image the network answers; their probabilities are averaged.

    Attributes:
        scales: Q of the paper: lengths of the image's shorter side, pixels, from which views are taken. Empty: the
            one view that a device would see, ``ImageSet.read_one``.
        crops: views of the network's size in a regular grid of so many rows and columns; 1 is the centre.
        flip: every view's mirror image, too. Wrong where left and right make a difference to the class.
        dense: the whole scaled image is one view; the network has to take any size (see build_predict).
            Without scales, Q is the longer side of the network's input. Best are multiples of 32 (see dense.py).
    """

    scales: tuple[int, ...] = ()
    crops: int = 1
    flip: bool = False
    dense: bool = False

    def __post_init__(self) -> None:
        if not all(1 <= scale <= LARGEST_SCALE for scale in self.scales) or len(set(self.scales)) < len(self.scales):
            raise UsageError(f"scales are {self.scales}; needed are different lengths of 1 to {LARGEST_SCALE} pixels.")
        if self.crops < 1:
            raise UsageError(f"crops is {self.crops}; needed is the side of a grid, at least 1.")
        if self.crops > 1 and self.dense:
            raise UsageError(
                f"a grid of {self.crops}x{self.crops} crops and dense evaluation exclude each other: dense takes the "
                "whole image. Leave one of them out."
            )
        if self.crops > 1 and not self.scales:
            raise UsageError(
                f"a grid of {self.crops}x{self.crops} crops needs scales to crop from; the image as deployed has "
                "no more than the network's size. Name at least one scale above that."
            )

    @property
    def views(self) -> int:
        """How many views of an image the network answers."""
        return max(1, len(self.scales)) * self.crops**2 * (2 if self.flip else 1)

    def check_size(self, height: int, width: int) -> None:
        """Raise UsageError unless every scaled image holds the network's input of ``height`` x ``width`` pixels."""
        # The longer side, though an image may lie as the input does: what fits must not depend on the image.
        small = [str(scale) for scale in self.scales if scale < max(height, width)]
        if small:
            raise UsageError(
                f"scale {', '.join(small)}: an image whose shorter side has so many pixels is smaller than the "
                f"network's input of {height}x{width}. Use scales of at least {max(height, width)}."
            )

    def describe(self, height: int, width: int) -> str:
        """The protocol in words, for a network whose input has ``height`` x ``width`` pixels."""
        size = f"{height}x{width}"
        if self.dense:
            taken = "the whole image, dense"
        elif not self.scales:
            taken = f"as deployed, {size} pixels"
        else:
            taken = f"{self.crops}x{self.crops} crops of {size}" if self.crops > 1 else f"centre crop of {size}"
        scales = ", ".join(map(str, self._scales_for(height, width)))
        parts = [*([f"Q = {scales}"] if scales else []), taken, *(["mirrored, too"] if self.flip else [])]
        return f"{'; '.join(parts)}; {self.views} view{'s' if self.views > 1 else ''} an image"

    def views_of(self, images: ImageSet, index: int, height: int, width: int) -> Iterator[Pixels]:
        """The views of one image, uint8 (h, w, 3): ``height`` x ``width`` pixels each, unless dense."""
        scales = self._scales_for(height, width)
        wholes = (images.read_scaled(index, scale) for scale in scales) if scales else (images.read_one(index),)
        for whole in wholes:
            for view in (whole,) if self.dense else _crop_grid(whole, height, width, self.crops):
                yield view
                if self.flip:
                    yield view[:, ::-1]

    def _scales_for(self, height: int, width: int) -> tuple[int, ...]:
        return self.scales or ((max(height, width),) if self.dense else ())


AS_DEPLOYED = Protocol()
"""One view: what a device would see."""


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """How a network answered the images of a set.

    Attributes:
        data: name of the set.
        n: its images.
        protocol: the views they were answered by,
        description: and the same in words.
        accuracy: images whose most probable class is the true one.
        top5_accuracy: images whose true class is among the five most probable; None for up to five classes.
        balanced_accuracy: mean recall of the classes that have images, 0 to 1.
        cross_entropy: mean of -log(probability of the true class), nats; probabilities below 1e-7 count as that.
        labels: class names, in the order of the matrix.
        confusion: images by true class (rows) and answered class (columns).
        classes: recall, precision and F1 of each class.
        seconds: for reading and answering all images.
    """

    data: str
    n: int
    protocol: Protocol
    description: str
    accuracy: Proportion
    top5_accuracy: Proportion | None
    balanced_accuracy: float
    cross_entropy: float
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[ClassFigures, ...]
    seconds: float


class Confusion(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of wrong answer.

    Attributes:
        true: what the images show.
        answered: what the network said.
        images: how many.
        share: of all images of the true class, 0 to 1.
    """

    true: str
    answered: str
    images: int
    share: float


def evaluate(
    predict: Predict, images: ImageSet, protocol: Protocol = AS_DEPLOYED, progress: Advance = ignore_progress
) -> Evaluation:
    """Ask the network about every image and compare with the true classes.

    Args:
        predict: the network; for a dense protocol it has to take images of any size.
        images: with the network's classes in the network's order.
        protocol: the views of an image that are averaged.
        progress: told after every call of ``predict``.

    Raises:
        UsageError: a scale is smaller than the network's input.
        DataError: there are no images, or one cannot be read.
        ModelError: the answers are no probabilities of these classes.
    """
    started = time.perf_counter()
    height, width = _size_of(images)
    classes = len(images.labels)
    confusion = np.zeros((classes, classes), np.int64)
    among_five, loss, done = 0, 0.0, 0
    for probabilities in iterate_answers(predict, images, protocol, progress):
        true = images.targets[done : done + len(probabilities)]
        done += len(probabilities)
        of_true = probabilities[np.arange(len(true)), true]
        np.add.at(confusion, (true, probabilities.argmax(axis=1)), 1)
        among_five += int((_places(probabilities, true) < 5).sum())
        loss -= float(np.log(np.maximum(of_true, _SMALLEST_PROBABILITY)).sum())
    figures = build_class_figures(confusion, images.labels)
    return Evaluation(
        data=images.name,
        n=done,
        protocol=protocol,
        description=protocol.describe(height, width),
        accuracy=build_proportion(int(np.trace(confusion)), done),
        top5_accuracy=build_proportion(among_five, done) if classes > 5 else None,
        balanced_accuracy=float(np.mean([each.recall for each in figures if each.recall is not None])),
        cross_entropy=loss / done,
        labels=images.labels,
        confusion=tuple(map(tuple, confusion.tolist())),
        classes=figures,
        seconds=time.perf_counter() - started,
    )


def iterate_answers(
    predict: Predict, images: ImageSet, protocol: Protocol = AS_DEPLOYED, progress: Advance = ignore_progress
) -> Iterator[NDArray[np.float64]]:
    """Answer all images in order, some at a time: (k, classes) probabilities, averaged over the views of each image.

    What is in memory at once does not grow with the number of images. Arguments and errors as in ``evaluate``.
    """
    height, width = _size_of(images)
    protocol.check_size(height, width)
    held: list[list[Pixels]] = []
    pixels = 0
    progress(0, len(images), "evaluating")
    for index in range(len(images)):
        held.append(list(protocol.views_of(images, index, height, width)))
        pixels += sum(view.shape[0] * view.shape[1] for view in held[-1])
        if pixels >= _HELD_PIXELS or index == len(images) - 1:
            before = index + 1 - len(held)

            def report(answered: int, before: int = before) -> None:
                progress(before + answered // protocol.views, len(images), "evaluating")

            yield _average_answers(predict, held, len(images.labels), report)
            held, pixels = [], 0


def build_predict(model: keras.Model, *, dense: bool = False, normalization: Normalization | None = None) -> Predict:
    """What ``evaluate`` asks, from a Keras model.

    Args:
        model: takes RGB pixels from 0 to 255, or what ``normalization`` makes of them; gives probabilities.
        dense: answer with its fully convolutional form, which takes images of any size.
        normalization: where the model does not normalise itself.

    Raises:
        ModelError: ``dense``, and the model is no VGG of this family.
    """
    network = dense_model(model) if dense else model

    def predict(images: Pixels) -> NDArray[np.float32]:
        pixels: NDArray[np.float32] = images.astype(np.float32)
        if normalization is not None:
            mean, std = (np.array(part, np.float32) for part in (normalization.mean, normalization.std))
            pixels = (pixels - mean) / std
            if normalization.order == "bgr":
                pixels = pixels[..., ::-1]
        return np.asarray(network.predict_on_batch(pixels), np.float32)

    return predict


def worst_classes(evaluation: Evaluation, count: int) -> list[ClassFigures]:
    """The ``count`` classes of lowest recall, of equal ones that with more images first; those without images last."""

    def rank(figures: ClassFigures) -> tuple[float, int]:
        return (2.0 if figures.recall is None else figures.recall, -figures.images)

    return sorted(evaluation.classes, key=rank)[:count]


def frequent_confusions(evaluation: Evaluation, count: int) -> list[Confusion]:
    """The ``count`` wrong answers that were given most often, the most frequent first; fewer if there are fewer."""
    matrix = np.array(evaluation.confusion)
    images = matrix.sum(axis=1)
    np.fill_diagonal(matrix, 0)
    found = []
    for place in np.argsort(-matrix, axis=None, kind="stable")[:count]:
        true, answered = divmod(int(place), len(matrix))
        times = int(matrix[true, answered])
        if times:
            labels = evaluation.labels
            share = times / int(images[true])
            found.append(Confusion(true=labels[true], answered=labels[answered], images=times, share=share))
    return found


def _size_of(images: ImageSet) -> tuple[int, int]:
    """(height, width) of the network's input: what ``read_one`` gives."""
    if len(images) == 0:
        raise DataError(f"{images.name}: there are no images in it; needed is at least 1.")
    height, width, _ = images.read_one(0).shape
    return height, width


def _crop_grid(image: Pixels, height: int, width: int, crops: int) -> Iterator[Pixels]:
    """Crops in ``crops`` rows and columns, from edge to edge; a single one is the centre. Row by row."""
    for top in _offsets(image.shape[0] - height, crops):
        for left in _offsets(image.shape[1] - width, crops):
            # A copy: a view would keep the whole scaled image alive for as long as it waits.
            yield image[top : top + height, left : left + width].copy()


def _offsets(room: int, count: int) -> list[int]:
    return [round(room * step / (count - 1)) for step in range(count)] if count > 1 else [room // 2]


def _average_answers(
    predict: Predict, held: list[list[Pixels]], classes: int, report: Callable[[int], None]
) -> NDArray[np.float64]:
    """Mean probabilities of each image over its views, (len(held), classes); views of one size are asked together."""
    sizes: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
    for number, views in enumerate(held):
        for view in views:
            sizes.setdefault(view.shape, []).append((number, view))
    total = np.zeros((len(held), classes))
    answered = 0
    for shape, members in sizes.items():
        step = max(1, _BATCH_PIXELS // (shape[0] * shape[1]))
        for start in range(0, len(members), step):
            numbers, batch = zip(*members[start : start + step], strict=True)
            found = predict(np.stack(batch))
            _check_answers(found, len(batch), classes)
            np.add.at(total, list(numbers), found)
            answered += len(batch)
            report(answered)
    return total / len(held[0])


def _check_answers(found: NDArray[np.float32], n: int, classes: int) -> None:
    """Raise ModelError unless ``found`` holds ``n`` rows of probabilities of ``classes`` classes."""
    if found.shape != (n, classes):
        raise ModelError(
            f"the network answers {n} images with an array of {found.shape}; needed is {(n, classes)}, one "
            "probability for each class of the data. Use data with the network's classes."
        )
    if not np.isfinite(found).all():
        raise ModelError("the network's answers hold NaN or infinity: look for weights that are not finite.")
    sums = found.sum(axis=1, dtype=np.float64)
    worst = int(np.abs(sums - 1).argmax())
    if found.min() < 0 or abs(sums[worst] - 1) > SUM_TOLERANCE:
        raise ModelError(
            f"the network's answers are no probabilities: the smallest is {found.min():.3g} and one image's sum is "
            f"{sums[worst]:.4g}; needed are at least 0 and a sum of 1. Sigmoids and logits are made into probabilities "
            "by vggedge export: evaluate its bundle."
        )


def _places(probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many classes come before the true one, (n,); of equal ones the first does, as in argmax."""
    of_true = np.take_along_axis(probabilities, true[:, np.newaxis], axis=1)
    is_earlier = np.arange(probabilities.shape[1]) < true[:, np.newaxis]
    return np.asarray(((probabilities > of_true) | ((probabilities == of_true) & is_earlier)).sum(axis=1))
