"""Image sets whose pictures are decoded already: arrays of pixels, in memory or in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vggedge.data.base import ImageSet
from vggedge_runtime.preprocess import ImageSpec, Pixels, fit_image, scale_image

Part: TypeAlias = Literal["train", "test"]

PARTS: tuple[Part, ...] = ("train", "test")
"""What public data sets are divided into; the first is meant where none is named."""


def build_array_set(
    name: str,
    labels: tuple[str, ...],
    targets: NDArray[np.int64],
    read_pixels: Callable[[int], NDArray[np.uint8]],
    spec: ImageSpec,
) -> ImageSet:
    """Wrap arrays as an image set that resizes as every other one does.

    Args:
        name: for messages and manifests.
        labels: class names.
        targets: class of every image, int64 (n,).
        read_pixels: from 0..n-1 to uint8 pixels of (height, width, 3) RGB, or grey of (height, width) or
            (height, width, 1), which becomes RGB.
        spec: the size that images are read at.
    """

    def read_picture(index: int) -> Image.Image:
        pixels = read_pixels(index)
        if pixels.shape[2:] == (1,):
            pixels = pixels[:, :, 0]
        return Image.fromarray(pixels).convert("RGB")

    def read_one(index: int) -> Pixels:
        return fit_image(read_picture(index), spec)

    def read_scaled(index: int, side: int) -> Pixels:
        return scale_image(read_picture(index), side, spec.kernel)

    return ImageSet(name=name, labels=labels, targets=targets, read_one=read_one, read_scaled=read_scaled)
