"""From a Keras model back to its spec: which VGG it is, told by its layers alone.

Transfer, weight import and dense evaluation need the spec of a model that somebody hands them; no file beside
the model has to be trusted for it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vggedge.architecture import NORMALIZATIONS, PIXELS, SPECS, STAGES, SpecPixels, VggSpec
from vggedge_runtime.errors import ModelError, UsageError

if TYPE_CHECKING:
    import keras

_CONVOLUTION = re.compile(r"block([1-5])_conv(\d+)")
_DENSE = re.compile(r"fc\d+")
_NEEDED = "Needed is a model that vggedge train or vggedge import-weights wrote, or one with the same layers."


def recognize_spec(model: keras.Model) -> VggSpec:
    """The spec from which ``build_vgg`` makes a network with the layers of ``model``.

    Its name is that of the variant with these kernels, the compact one where the widths are nearer to those.

    Raises:
        ModelError: it is none of the family; the message names the layer that shows it.
    """
    layers = {layer.name: layer for layer in model.layers if type(layer).__name__ != "InputLayer"}
    try:
        candidates = [spec for spec in _candidates(model, layers) if _names(spec) == list(layers)]
    except (UsageError, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{model.name}: not a VGG of this family ({error}). {_NEEDED}") from error
    if not candidates:
        raise ModelError(f"{model.name}: not a VGG of this family; {_first_strange(model, layers)}. {_NEEDED}")
    return candidates[0]


def _candidates(model: keras.Model, layers: dict[str, Any]) -> Iterator[VggSpec]:
    """Specs with the sizes found in ``layers``, one for each normalization; most have other layers than the model."""
    kernels: list[list[int]] = [[] for _ in range(STAGES)]
    widths = [0] * STAGES
    for name, layer in layers.items():
        match = _CONVOLUTION.fullmatch(name)
        if match:
            stage = int(match[1]) - 1
            kernels[stage].append(int(layer.kernel_size[0]))
            widths[stage] = int(layer.filters)
    if not all(kernels):
        return
    stages = tuple(map(tuple, kernels))
    dropouts = [layer.rate for name, layer in layers.items() if name.endswith("_dropout")]
    for normalization in NORMALIZATIONS:
        yield VggSpec(
            name=_variant(stages, tuple(widths), normalization),
            stages=stages,
            widths=tuple(widths),
            dense=tuple(int(layer.units) for name, layer in layers.items() if _DENSE.fullmatch(name)),
            input=tuple(model.input_shape[1:]),
            classes=int(model.output_shape[-1]),
            normalization=normalization,  # type: ignore[arg-type]  # NORMALIZATIONS is the type's own list
            dropout=float(dropouts[0]) if dropouts else 0.0,
            head="gap" if "avg_pool" in layers else "dense",
            pixels=_pixels(layers.get("rescaling")),
        )


def _names(spec: VggSpec) -> list[str]:
    return [layer.name for layer in spec.layers()]


def _variant(stages: tuple[tuple[int, ...], ...], widths: tuple[int, ...], normalization: str) -> str:
    """Name of the variant with these kernels whose widths are nearest, by the ratio of their sums."""
    same = [spec for spec in SPECS.values() if spec.stages == stages]
    same.sort(key=lambda spec: ((spec.normalization == "lrn") != (normalization == "lrn"), _ratio(spec.widths, widths)))
    return same[0].name if same else "vgg"


def _ratio(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    return abs(float(np.log(sum(first) / sum(second))))


def _pixels(rescaling: Any) -> SpecPixels:
    """Which of PIXELS the Rescaling layer computes."""
    if rescaling is None:
        raise ValueError("it has no Rescaling layer called 'rescaling'")
    for name, wanted in PIXELS.items():
        scale, mean = 1 / np.array(wanted.std), np.array(wanted.mean)
        has_scale, has_offset = np.asarray(rescaling.scale, float), np.asarray(rescaling.offset, float)
        if np.allclose(has_scale, scale, rtol=1e-5) and np.allclose(has_offset, -mean * scale, rtol=1e-5):
            return name
    raise ValueError(
        f"its layer {rescaling.name!r} computes pixel * {rescaling.scale} + {rescaling.offset}, "
        f"which is none of {', '.join(PIXELS)}"
    )


def _first_strange(model: keras.Model, layers: dict[str, Any]) -> str:
    """The first layer that no spec has at its place."""
    lists = [_names(spec) for spec in _candidates(model, layers)]
    if not lists:
        return f"no layer block1_conv1 to block{STAGES}_conv1 in each stage"
    found = list(layers)
    # The candidate that agrees longest tells the most.
    place = max(_shared_length(found, each) for each in lists)
    if place == len(found):
        return "layers are missing at its end"
    return f"its layer {found[place]!r} is not expected there"


def _shared_length(first: list[str], second: list[str]) -> int:
    """How many items the two lists have in common from the start."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return sum(1 for _ in same)
