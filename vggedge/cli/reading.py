"""How the commands open and read labelled images."""

from __future__ import annotations

import numpy as np

from vggedge.cli import output
from vggedge.data import ImageSet, open_images
from vggedge_export.verification import LabelledImages
from vggedge_runtime.errors import UsageError
from vggedge_runtime.preprocess import ImageSpec, Pixels
from vggedge_runtime.progress import Advance


def open_labelled(data: str, spec: ImageSpec, labels: tuple[str, ...] | None, who: str) -> ImageSet:
    """Open DATA, say what is skipped, and check that its classes are ``labels``; None: whatever they are.

    Raises:
        UsageError: the classes are others than those that ``who`` ("the network", "the bundle") answers with.
        DataError: DATA cannot be read.
    """
    found = open_images(data, spec)
    output.print_skipped(found.skipped)
    if labels is not None and found.labels != labels:
        raise UsageError(
            f"{who} was trained on the classes {', '.join(labels)}, the data has {', '.join(found.labels)}. Rename the "
            f"sub-folders to the classes of {who}."
        )
    return found


def read_labelled(images: ImageSet, what: str, advance: Advance) -> LabelledImages:
    """All pixels in memory, once; ``what`` tells the user what is read."""
    pixels: Pixels | None = None
    for index in range(len(images)):
        image = images.read_one(index)
        if pixels is None:
            pixels = np.empty((len(images), *image.shape), np.uint8)
        pixels[index] = image
        advance(index + 1, len(images), f"reading {what}")
    if pixels is None:
        raise UsageError(f"{images.name}: no images.")
    return LabelledImages(images.name, pixels, images.targets)
