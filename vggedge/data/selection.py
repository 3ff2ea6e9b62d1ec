"""Which images calibrate, which choose and which prove: never the same ones, unless the user named them twice."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vggedge.data import ImageSet, open_images
from vggedge_runtime.errors import DataError, UsageError
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


@dataclass(frozen=True)
class Division:
    """Images by what they are for; no image is in two, unless the user named it twice.

    Attributes:
        calibration: set INT8 ranges: of every class equally many, as far as its share goes.
        selection: choose among calibrators and plans; None where nothing is to be chosen.
        evaluation: prove.
    """

    calibration: ImageSet
    selection: ImageSet | None
    evaluation: ImageSet


def divide(
    source: ImageSet,
    proof: ImageSet | None,
    *,
    calibration_images: int,
    selection_images: int,
    evaluation_images: int,
    seed: int = 0,
) -> Division:
    """Share ``source`` out, at most so many images for each purpose; none has a greater share than the others.

    That holds for the calibration set's share of each class, too: it takes of all equally many, and a rare class would
    otherwise calibrate whole and be proved on no image.

    With ``proof`` that proves, else what is left of ``source`` does, and the set's name says so: training may well
    have seen it, and an accuracy on it is then no promise. 0 ``selection_images`` are none.

    Raises:
        DataError: ``source`` has fewer images than there are purposes.
    """
    purposes = 1 + (selection_images > 0) + (proof is None)
    if len(source) < purposes:
        raise DataError(
            f"{source.name}: {len(source)} image(s), and {purposes} sets are made of them, to calibrate, to choose a "
            "calibrator and to prove. Add images, name others with --evaluation, or name a --calibrator."
        )
    chosen, rest = source.draw(min(calibration_images, len(source) // purposes), seed, balanced=True, parts=purposes)
    selection = None
    if selection_images:
        room = len(rest) if proof is not None else len(rest) // 2
        selection, rest = rest.draw(min(selection_images, room), seed)
    if proof is None:
        proof = replace(rest, name=f"the rest of {source.name}, which training may have seen")
    return Division(chosen, selection, proof.take(evaluation_images, seed))
