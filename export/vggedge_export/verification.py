"""Proof of a conversion step: the same images through both sides, compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vggedge_export.conversion import only_output
from vggedge_export.graph import INPUT
from vggedge_export.grey import grey_pixels
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.errors import ConversionError, DataError, ModelError
from vggedge_runtime.evidence import Comparison, Obtained
from vggedge_runtime.paired import build_class_changes, build_paired_change, find_flips
from vggedge_runtime.preprocess import Normalization, Pixels
from vggedge_runtime.progress import Advance
from vggedge_runtime.statistics import build_proportion

if TYPE_CHECKING:
    import keras

Scores = NDArray[np.float32]
"""float32 (n, classes), rows sum to 1."""

PARITY_LIMIT = 1e-4
"""Largest difference of a probability between Keras and its FP32 graph at which export goes on. Both compute
in FP32 and differ in the order of sums only, about 1e-7; a wrong layout, head or constant gives above 1e-2."""

_SHOWN_FLIPS = 50  # in the manifest; a broken graph would flip thousands


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory with their classes.

    Attributes:
        name: how the user named them.
        images: uint8 (n, height, width, 3).
        targets: int64 (n,).
    """

    name: str
    images: Pixels
    targets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.images) == 0 or len(self.images) != len(self.targets):
            raise DataError(
                f"{self.name}: {len(self.images)} images with {len(self.targets)} classes; needed is one class an "
                "image and at least one image."
            )


@dataclass(frozen=True)
class Images:
    """The images of an export, by what they are for. None should be in two.

    Attributes:
        calibration: set INT8 ranges and show what leaves FP16's range.
        evaluation: prove the graphs.
        selection: choose among calibrators and plans; None where nothing is to be chosen.
    """

    calibration: LabelledImages
    evaluation: LabelledImages
    selection: LabelledImages | None = None

    def by_use(self) -> dict[str, LabelledImages]:
        """All there are, by what they are for."""
        named = {"calibration": self.calibration, "selection": self.selection, "evaluation": self.evaluation}
        return {use: data for use, data in named.items() if data is not None}


def keras_scores(model: keras.Model, normalization: Normalization | None, images: Pixels, progress: Advance) -> Scores:
    """What the Keras model itself answers, batch by batch, at inference: (n, units), not completed to probabilities.

    It gets grey where it takes one channel, and normalised pixels in its own order of channels if it needs them so.
    """
    is_grey = model.inputs[0].shape[-1] == 1

    def run(batch: Pixels) -> Any:
        pixels: NDArray[np.float32] = (grey_pixels(batch) if is_grey else batch).astype(np.float32)
        if normalization is not None:
            mean, std = (np.array(part, np.float32) for part in (normalization.mean, normalization.std))
            pixels = (pixels - mean[:1]) / std[:1] if is_grey else (pixels - mean) / std
            if normalization.order == "bgr":
                pixels = pixels[..., ::-1]
        return only_output(model(pixels, training=False))

    return _in_batches(run, images, "asking Keras", progress)


def graph_scores(graph: Path, images: Pixels, what: str, progress: Advance) -> Scores:
    """What an ONNX graph answers in ONNX Runtime on the CPU."""
    session = open_ort_session(graph)
    return _in_batches(lambda batch: session.run(None, {INPUT: batch})[0], images, what, progress)


def check_alone(graph: Path, images: Pixels) -> None:
    """Raise ModelError unless an image gets alone the answer that it gets beside another one.

    A device asks for one image at a time. A model that looks across its batch, as one that subtracts the batch's mean,
    answers otherwise there, and every comparison on batches would pass. The other image is the first one's negative:
    it always differs, even where there is one image only, or where images are so large that each is a batch.
    """
    session = open_ort_session(graph)
    pair = np.stack([images[0], 255 - images[0]])
    together, alone = (session.run(None, {INPUT: batch})[0][0] for batch in (pair, pair[:1]))
    off = float(np.abs(alone - together).max())
    if off > PARITY_LIMIT:
        raise ModelError(
            f"an image alone gets other probabilities than among others, by {off:.3g}: a layer mixes the images of a "
            "batch. Replace what computes over axis 0, as a mean over the batch, by something that each image has."
        )


def compare_scores(
    reference: Scores,
    candidate: Scores,
    targets: NDArray[np.int64],
    *,
    labels: Sequence[str],
    against: str,
    obtained: Obtained,
) -> Comparison:
    """Compare two sets of answers to the same images; all arrays have n rows, ``labels`` name the columns.

    Raises:
        ConversionError: answers of either side are not finite.
    """
    if not np.isfinite(reference).all():  # every comparison with NaN would pass
        rows = int((~np.isfinite(reference)).any(axis=1).sum())
        raise ConversionError(
            f"{rows} of {len(reference)} answers of {against} are NaN or infinite. The model itself is broken there: "
            "look for weights that are not finite."
        )
    if not np.isfinite(candidate).all():
        rows = int((~np.isfinite(candidate)).any(axis=1).sum())
        raise ConversionError(
            f"{rows} of {len(candidate)} answers are NaN or infinite where {against} is finite: a layer leaves the "
            "range of the type. Export without that precision (--precision)."
        )
    n = len(reference)
    wanted, found = reference.argmax(1), candidate.argmax(1)
    return Comparison(
        against=against,
        obtained=obtained,
        images=n,
        max_abs_difference=float(np.abs(reference - candidate).max()),
        agreement=build_proportion(int((wanted == found).sum()), n),
        accuracy=build_proportion(int((found == targets).sum()), n),
        change=build_paired_change(wanted == targets, found == targets),
        classes=build_class_changes(reference, candidate, targets, labels),
        flips=find_flips(reference, candidate, targets, _SHOWN_FLIPS),
    )


def divergence(reference: Scores, candidate: Scores) -> float:
    """Mean Kullback-Leibler divergence of ``candidate`` from ``reference``, nats an image; both (n, classes).

    It tells two candidates apart on images where both keep the class, which accuracy and agreement do not. A
    probability below 1e-7, where FP32 softmax ends to have digits, counts as that. FP32 answers sum to 1 within some
    1e-7 only, and plain sums of p log(p / q) would be as far off, or below 0; with - p + q they are neither.
    """
    p, q = (np.maximum(each.astype(np.float64), 1e-7) for each in (reference, candidate))
    return float((p * np.log(p / q) - p + q).sum(axis=1).mean())


def check_parity(comparison: Comparison) -> None:
    """Raise ConversionError if the FP32 graph does not compute what Keras computes."""
    check_equal(comparison.max_abs_difference, "the FP32 graph", "Keras", comparison.images)


def check_equal(difference: float, what: str, reference: str, images: int) -> None:
    """Raise ConversionError if two ways to compute the same in FP32 differ by more than their rounding."""
    if difference > PARITY_LIMIT:
        raise ConversionError(
            f"{what} differs from {reference} by {difference:.3g} in a probability, on "
            f"{images} images; allowed is {PARITY_LIMIT:g}. Nothing was written. Either the model magnifies "
            "rounding, as untrained and diverged ones do (check its accuracy in Keras), or the conversion has a "
            "defect: then please report the model's layers."
        )


def batch_for(images: Pixels) -> int:
    """Images at a time: bounds the activations of a full VGG to some 100 MB, whatever the image size."""
    pixels = int(images.shape[1] * images.shape[2])
    return max(1, min(128, (1 << 17) // pixels))


def spread_rows(length: int, count: int) -> NDArray[np.int64]:
    """``count`` of ``length`` rows, or all, evenly spread: a folder's images come class by class."""
    kept = min(count, length)
    return np.arange(kept, dtype=np.int64) * length // kept


def _in_batches(run: Callable[[Pixels], Any], images: Pixels, what: str, progress: Advance) -> Scores:
    size, parts = batch_for(images), []
    for start in range(0, len(images), size):
        parts.append(np.asarray(run(images[start : start + size]), dtype=np.float32))
        progress(min(start + size, len(images)), len(images), what)
    return np.concatenate(parts)
