"""Which images calibrate and which prove: never the same ones, unless the user named them twice."""

from __future__ import annotations

from dataclasses import replace

from vggedge.data import ImageSet, open_images
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec


def open_pair(calibration: str, evaluation: str | None, spec: ImageSpec) -> tuple[ImageSet, ImageSet | None]:
    """Open calibration and evaluation DATA; the second is None where none was named.

    Raises:
        UsageError: they have different classes.
        DataError: one of them cannot be read.
    """
    source = open_images(calibration, spec)
    if evaluation is None:
        return source, None
    proof = open_images(evaluation, spec)
    if proof.labels != source.labels:
        raise UsageError(
            f"the evaluation images have the classes {', '.join(proof.labels)}, the calibration images have "
            f"{', '.join(source.labels)}; both need the same."
        )
    return source, proof


def divide(
    source: ImageSet, proof: ImageSet | None, calibration_images: int, evaluation_images: int
) -> tuple[ImageSet, ImageSet]:
    """(images to calibrate on, images to prove on), at most so many of each, by a fixed seed.

    Without ``proof`` the images that are not calibrated on prove, and the set's name says so: training may well
    have seen them, and an accuracy on them is then no promise.
    """
    if proof is not None:
        return source.take(calibration_images, seed=0), proof.take(evaluation_images, seed=0)
    rest, chosen = source.split(min(0.5, calibration_images / len(source)), seed=0)
    rest = replace(rest, name=f"the rest of {source.name}, which training may have seen")
    return chosen.take(calibration_images, seed=0), rest.take(evaluation_images, seed=0)
