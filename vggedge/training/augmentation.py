"""Training images drawn anew in each epoch: scaled, cut, flipped, shifted in colour. uint8 RGB in and out.

What is drawn depends on (seed, epoch, number of the image) alone: neither on the order of reading, nor on what
stays in memory, nor on where training was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vggedge.data.base import ImageSet
from vggedge.training.config import AugmentationConfig
from vggedge_runtime.preprocess import Pixels, scale_image
from vggedge_runtime.progress import Advance

ReadOne: TypeAlias = Callable[[int], Pixels]

_STREAM = 1  # keeps these draws apart from those of other parts with the same seed
_COLOUR_IMAGES = 256  # enough for nine covariances
_COLOUR_SIDE = 64  # pixels; about so many rows and columns of an image are looked at
_READ_STEP = 32  # images between two reports


def hold_images(count: int, read: ReadOne, memory_bytes: int, report: Advance, what: str) -> tuple[ReadOne, int]:
    """Read images 0 to ``count - 1`` once and keep as many as ``memory_bytes`` allow.

    Returns:
        What reads an image from memory, or as ``read`` where it is not kept; and the bytes that are left.
    """
    held: list[Pixels] = []
    left = memory_bytes
    for index in range(count if left else 0):
        image = read(index)
        if image.nbytes > left:
            report(index, index, what)
            break
        held.append(image)
        left -= image.nbytes
        if (index + 1) % _READ_STEP == 0 or index + 1 == count:
            report(index + 1, count, what)
    return (lambda index: held[index] if index < len(held) else read(index)), left


def read_largest(data: ImageSet, config: AugmentationConfig) -> ReadOne:
    """What the Augmenter starts from: the images at the upper bound of their scale, or as the network takes them.

    Every smaller scale is made from that one, so that an image need not be decoded again for each.
    """
    if config.scale is None:
        return data.read_one
    side = config.scale[1]
    return lambda index: data.read_scaled(index, side)


class Augmenter:
    """Draws training images.

    Args:
        read: from the number of an image to itself, as read_largest has it.
        config: what is drawn.
        input: (height, width, 3) of the network.
        seed: of all that is drawn.
        colours: what measure_colours returns; not needed where colours are not shifted.
    """

    def __init__(
        self,
        read: ReadOne,
        config: AugmentationConfig,
        input: tuple[int, int, int],
        seed: int,
        colours: NDArray[np.float64] | None = None,
    ) -> None:
        self._read, self._config, self._seed, self._colours = read, config, seed, colours
        self._height, self._width = input[:2]

    def read(self, epoch: int, index: int) -> Pixels:
        """Image ``index`` as epoch ``epoch`` shows it: (height, width, 3) uint8."""
        image = self._read(index)
        if self._config == AugmentationConfig():
            return image
        generator = np.random.default_rng([self._seed, epoch, index, _STREAM])
        if self._config.scale is not None:
            image = self._cut(generator, image, *self._config.scale)
        if self._config.flip and generator.random() < 0.5:
            image = image[:, ::-1]
        if self._config.colour_shift and self._colours is not None:
            shift = self._colours @ generator.normal(0, self._config.colour_shift, 3)
            image = np.clip(np.rint(image + shift.astype(np.float32)), 0, 255).astype(np.uint8)
        return image

    def _cut(self, generator: np.random.Generator, image: Pixels, low: int, high: int) -> Pixels:
        scaled = scale_image(Image.fromarray(image), int(generator.integers(low, high + 1)), self._config.kernel)
        top, left = (
            int(generator.integers(has - needs + 1))
            for has, needs in zip(scaled.shape[:2], (self._height, self._width), strict=True)
        )
        return scaled[top : top + self._height, left : left + self._width]


def measure_colours(count: int, read: ReadOne, report: Advance) -> NDArray[np.float64]:
    """Principal components of RGB values, each times its eigenvalue: the columns of a (3, 3) array, in pixel units.

    Of at most 256 of the ``count`` images, evenly spaced. Eigenvalues are of pixels from 0 to 1: in units of 0 to 255
    they would be 65,025 times as large and shift every image to black or white.
    """
    chosen = np.unique(np.linspace(0, count - 1, min(count, _COLOUR_IMAGES)).round().astype(int))
    total, products, pixels = np.zeros(3), np.zeros((3, 3)), 0
    for number, index in enumerate(chosen, start=1):
        image = read(int(index))
        step = max(1, min(image.shape[:2]) // _COLOUR_SIDE)
        values = image[::step, ::step].reshape(-1, 3) / 255
        total += values.sum(axis=0)
        products += values.T @ values
        pixels += len(values)
        if number % _READ_STEP == 0 or number == len(chosen):
            report(number, len(chosen), "measuring colours")
    mean = total / pixels
    eigenvalues, components = np.linalg.eigh(products / pixels - np.outer(mean, mean))
    return np.asarray(components * np.maximum(eigenvalues, 0) * 255)
