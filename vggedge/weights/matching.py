"""Find the variant that a checkpoint belongs to, and check every shape against it. No TensorFlow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import msgspec

from vggedge.architecture import SMALLEST_INPUT, SPECS, STAGES, Head, LayerSpec, VggSpec
from vggedge.weights.checkpoint import SOURCES, Checkpoint, LayerWeights
from vggedge_runtime.errors import ModelError, UsageError

_DEFAULT_INPUT = (224, 224)
_DENSE_LAYERS = 3
_VARIANTS = {
    tuple(itertools.chain(*spec.stages)): spec
    for spec in SPECS.values()
    if spec.normalization == "none"  # the paper's own; the compact ones and A-LRN share their kernels
}


class FreshHead(msgspec.Struct, frozen=True, kw_only=True):
    """A head without training, for a checkpoint that has none or whose own is not wanted.

    Attributes:
        classes: outputs.
        head: ``gap`` or ``dense``, as in VggSpec.
    """

    classes: int
    head: Head = "gap"


def match_spec(
    checkpoint: Checkpoint, *, size: tuple[int, int] | None = None, fresh: FreshHead | None = None
) -> VggSpec:
    """The spec of the network that the checkpoint's weights make up.

    Widths, dense units and classes are the checkpoint's; with ``fresh`` its dense layers do not count.

    Args:
        checkpoint: weights.
        size: (height, width) of the input, pixels; None takes the checkpoint's or, for a trained head, the square
            that its first dense layer needs.
        fresh: the head to put on instead of a trained one.

    Raises:
        ModelError: no variant has these layers and shapes; the message names the layer.
        UsageError: ``size`` does not fit the head.
    """
    convolutions = [layer for layer in checkpoint.layers if layer.kind == "conv"]
    kernels = tuple(layer.shapes[0][0] for layer in convolutions)
    variant = _VARIANTS.get(kernels)
    if variant is None:
        known = ", ".join(f"{spec.name} {len(each)}" for each, spec in _VARIANTS.items())
        raise ModelError(
            f"{checkpoint.source}: {len(kernels)} convolutions with kernels of {sorted(set(kernels))} pixels; no "
            f"variant has these. Needed are the weights of {SOURCES}. Convolutions of the variants: {known}."
        )
    firsts = itertools.accumulate(map(len, variant.stages[:-1]), initial=0)
    widths = tuple(convolutions[first].shapes[0][-1] for first in firsts)
    has_norms = any(layer.kind == "batch_norm" for layer in checkpoint.layers)
    if fresh:
        dense = variant.dense if fresh.head == "dense" else ()
        height, width = size or checkpoint.input or _DEFAULT_INPUT
    else:
        dense = _head_units(checkpoint)
        height, width = _find_input(checkpoint, widths[-1], size)
    spec = msgspec.structs.replace(
        variant,
        widths=widths,
        dense=dense if fresh else dense[:-1],
        classes=fresh.classes if fresh else dense[-1],
        input=(height, width, 3),
        normalization="every" if has_norms else "none",
        head=fresh.head if fresh else "dense",
        pixels=checkpoint.pixels,
    )
    name_layers(spec, checkpoint, has_head=fresh is None)
    return spec


def name_layers(spec: VggSpec, checkpoint: Checkpoint, *, has_head: bool = True) -> dict[str, LayerWeights]:
    """The checkpoint's layers by the names that the layers of ``spec`` have.

    Args:
        spec: of match_spec.
        checkpoint: weights.
        has_head: whether the dense layers are taken from the checkpoint too.

    Raises:
        ModelError: a layer is missing, left over, in another place or of another shape; the message names it.
    """
    found = [layer for layer in checkpoint.layers if has_head or layer.kind != "dense"]
    needed = [(layer, shapes) for layer, shapes in _needed_shapes(spec) if has_head or layer.stage]
    named: dict[str, LayerWeights] = {}
    for have, want in itertools.zip_longest(found, needed):
        if have is None or want is None:
            wrong = f"layer {want[0].name} is missing" if want else f"layer {have.name} is one too many"
            raise ModelError(
                f"{checkpoint.source}: {wrong} for {spec.name} with normalization "
                f"{spec.normalization!r}. Needed are the weights of {SOURCES}."
            )
        layer, shapes = want
        if have.kind != layer.kind or have.role not in (None, layer.name):
            raise ModelError(
                f"{checkpoint.source}: layer {have.name} stands where {spec.name} has {layer.name}. "
                f"Needed are the weights of {SOURCES}, in their order."
            )
        if have.shapes != shapes:
            raise ModelError(
                f"{checkpoint.source}: layer {have.name} has arrays of shapes {_text(have.shapes)}; needed for "
                f"{layer.name} of {spec.name} are {_text(shapes)}."
            )
        named[layer.name] = have
    return named


def _needed_shapes(spec: VggSpec) -> Iterator[tuple[LayerSpec, tuple[tuple[int, ...], ...]]]:
    """Every layer with weights and the shapes of its arrays, in Keras's order."""
    height, width, channels = spec.input
    for layer in spec.layers():
        if layer.kind == "conv":
            yield layer, ((layer.kernel, layer.kernel, channels, layer.units), (layer.units,))
            channels = layer.units
        elif layer.kind == "batch_norm":
            yield layer, ((channels,),) * 4
        elif layer.kind == "flatten":
            channels *= (height // 2**STAGES) * (width // 2**STAGES)
        elif layer.kind == "dense":
            yield layer, ((channels, layer.units), (layer.units,))
            channels = layer.units


def _head_units(checkpoint: Checkpoint) -> tuple[int, ...]:
    units = tuple(layer.shapes[0][-1] for layer in checkpoint.layers if layer.kind == "dense")
    if len(units) != _DENSE_LAYERS:
        raise ModelError(
            f"{checkpoint.source}: its head has {len(units)} dense layers, {SOURCES} {_DENSE_LAYERS}. "
            "Add --no-top to import the convolutions alone."
        )
    return units


def _find_input(checkpoint: Checkpoint, channels: int, size: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) for the first dense layer, which takes every pixel of the last stage times its channels."""
    first = next(layer for layer in checkpoint.layers if layer.kind == "dense")
    inputs = first.shapes[0][0]
    side = math.isqrt(inputs // channels)
    wanted = checkpoint.input or (side * SMALLEST_INPUT, side * SMALLEST_INPUT)
    height, width = size or wanted
    cells = (height // SMALLEST_INPUT, width // SMALLEST_INPUT)
    # A source that names its input fixes rows and columns; else any rectangle of that many pixels may be meant.
    is_named = checkpoint.input is not None
    if is_named and cells != (wanted[0] // SMALLEST_INPUT, wanted[1] // SMALLEST_INPUT):
        raise UsageError(
            f"{checkpoint.source}: input {height}x{width} leaves {cells[0]}x{cells[1]} pixels after the last stage; "
            f"the trained head was made for {wanted[0]}x{wanted[1]}. Leave --input out, or add --no-top."
        )
    if cells[0] * cells[1] * channels != inputs:
        raise UsageError(
            f"{checkpoint.source}: input {height}x{width} gives {cells[0] * cells[1] * channels} values to layer "
            f"{first.name}, which takes {inputs}, {inputs / channels:g} pixels of {channels} channels. "
            "Say with --input HEIGHTxWIDTH what it was trained on, or add --no-top."
        )
    return height, width


def _text(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)
