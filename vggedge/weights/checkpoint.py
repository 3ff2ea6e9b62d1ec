"""Weights as a file has them: layers in order, their arrays in the form in which Keras keeps them."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from vggedge.architecture import SpecPixels
from vggedge_runtime.errors import ModelError

Kind: TypeAlias = Literal["conv", "dense", "batch_norm"]
Float32: TypeAlias = NDArray[np.float32]

SOURCES = "keras.applications' VGG16 or VGG19, or torchvision's VGG"
"""Whose weights can be imported; what an error message needs."""


class LayerWeights(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """The arrays of one layer.

    Attributes:
        name: what the file calls it.
        kind: what it does.
        arrays: float32 and finite; of a convolution: kernel (height, width, in, out) and bias (out,); of a dense
            layer: kernel (in, out) and bias; of a batch_norm: gamma, beta, mean and variance, each (channels,).
        role: name of the layer of our network that it has to be, as far as the file tells; None where only the
            order of the layers does.
    """

    name: str
    kind: Kind
    arrays: tuple[Float32, ...]
    role: str | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of each array."""
        return tuple(array.shape for array in self.arrays)


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A network's weights, read from somewhere.

    Attributes:
        source: the file or name, for messages.
        format: what kind of file it is, for people.
        pixels: what the weights were trained on, a key of PIXELS; the first kernel takes its channels as RGB.
        layers: every layer with weights, in the order in which an image meets them.
        input: (height, width) in pixels that the source names; None where it names none.
    """

    source: str
    format: str
    pixels: SpecPixels
    layers: tuple[LayerWeights, ...]
    input: tuple[int, int] | None = None

    @property
    def has_top(self) -> bool:
        """Whether there are dense layers behind the convolutions."""
        return any(layer.kind == "dense" for layer in self.layers)


def to_float32(array: NDArray[Any], name: str) -> Float32:
    """Check the numbers of the array called ``name`` and give them as float32.

    Raises:
        ModelError: they are no floating-point numbers, or not all of them are finite as float32.
    """
    if array.dtype.kind != "f":
        raise ModelError(
            f"{name}: its numbers are {array.dtype}; needed are float32, float64 or float16. "
            "Quantised weights cannot be imported: take those from before the quantisation."
        )
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
        found = array.astype(np.float32, copy=False)
    broken = found.size - int(np.count_nonzero(np.isfinite(found)))
    if broken:
        raise ModelError(
            f"{name}: {broken:,} of its {found.size:,} weights are NaN or infinite; needed are finite numbers. "
            "The training diverged or the file is damaged: take an earlier or fresh copy."
        )
    return found
