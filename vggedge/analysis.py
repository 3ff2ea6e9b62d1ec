"""What a spec costs, by arithmetic: parameters, multiplications, receptive field, memory. No TensorFlow."""

from __future__ import annotations

import math

import msgspec

from vggedge.architecture import LayerKind, LayerSpec, VggSpec

_IN_PLACE: frozenset[LayerKind] = frozenset({"rescaling", "batch_norm", "relu", "flatten", "dropout"})
"""Layers that map each value on its own (or do nothing), so their output can lie where their input was."""


class LayerFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One layer in numbers, for one image.

    Attributes:
        name: Keras's name of the layer.
        kind: what it does.
        output: shape without the batch axis.
        parameters: stored numbers, as Keras counts them: a BatchNorm has four for each channel.
        macs: multiply-accumulates of the matrix products; half the FLOPs. Only convolutions and dense
            layers have any here, which is how the literature counts.
        receptive_field: side of the square of input pixels that one output value depends on, before it
            is cut off at the image's edge; None from the head's first layer on, which sees everything.
        activation_bytes: size of the output.
    """

    name: str
    kind: LayerKind
    output: tuple[int, ...]
    parameters: int
    macs: int
    receptive_field: int | None
    activation_bytes: int


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """A spec in numbers, for one image.

    Attributes:
        spec: what was analysed.
        layers: every layer, in order.
        weight_layers: convolutions and dense layers.
        parameters: of all layers.
        macs: of all layers.
        receptive_field: pixels, after the last convolution; the pooling behind it adds 16 more.
        peak_activation_bytes: largest sum of one layer's input and output, where layers that map each
            value on its own work in place. The least that running layer by layer needs; an engine
            that fuses or tiles layers can do with less, training keeps everything and needs far more.
    """

    spec: VggSpec
    layers: tuple[LayerFigures, ...]
    weight_layers: int
    parameters: int
    macs: int
    receptive_field: int
    peak_activation_bytes: int


def analyse(spec: VggSpec, *, bytes_per_value: int = 4) -> Analysis:
    """Compute the figures of ``spec`` at its own input size.

    Args:
        spec: the network.
        bytes_per_value: of an activation: 4 for float32, 2 for float16, 1 for int8.
    """
    shape: tuple[int, ...] = spec.input
    field, jump = 1, 1  # input pixels that a value sees, and between two neighbouring values
    is_dense = False
    last_field = peak = 0
    rows: list[LayerFigures] = []
    for layer in spec.layers():
        before, shape = shape, _output_shape(layer, shape)
        field += max(layer.kernel - 1, 0) * jump
        if layer.kind == "pool":
            jump *= layer.kernel
        elif layer.kind == "conv":
            last_field = field
        is_dense = is_dense or layer.kind in ("dense", "average_pool")
        size = math.prod(shape) * bytes_per_value
        working = size if layer.kind in _IN_PLACE else size + math.prod(before) * bytes_per_value
        peak = max(peak, working)
        rows.append(
            LayerFigures(
                name=layer.name,
                kind=layer.kind,
                output=shape,
                parameters=_count_parameters(layer, before),
                macs=_count_macs(layer, before, shape),
                receptive_field=None if is_dense else field,
                activation_bytes=size,
            )
        )
    return Analysis(
        spec=spec,
        layers=tuple(rows),
        weight_layers=spec.weight_layers,
        parameters=sum(row.parameters for row in rows),
        macs=sum(row.macs for row in rows),
        receptive_field=last_field,
        peak_activation_bytes=peak,
    )


def _output_shape(layer: LayerSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    if layer.kind == "conv":  # padded, so that height and width stay
        return (*shape[:2], layer.units)
    if layer.kind == "pool":  # an odd last row or column is dropped, as Keras does
        return (shape[0] // layer.kernel, shape[1] // layer.kernel, shape[2])
    if layer.kind == "flatten":
        return (math.prod(shape),)
    if layer.kind == "average_pool":
        return shape[-1:]
    return (layer.units,) if layer.kind == "dense" else shape


def _count_parameters(layer: LayerSpec, before: tuple[int, ...]) -> int:
    if layer.kind in ("conv", "dense"):
        return (layer.kernel**2 if layer.kind == "conv" else 1) * before[-1] * layer.units + layer.units
    return 4 * before[-1] if layer.kind == "batch_norm" else 0  # gamma, beta, moving mean and variance


def _count_macs(layer: LayerSpec, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    if layer.kind == "conv":
        return math.prod(after) * layer.kernel**2 * before[-1]
    return before[-1] * layer.units if layer.kind == "dense" else 0
