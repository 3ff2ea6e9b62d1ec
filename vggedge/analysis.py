"""What a spec costs, by arithmetic: parameters, multiplications, receptive field, memory. No TensorFlow."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

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


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What the layers of one kind hold and cost of a spec.

    Attributes:
        what: ``convolutions``, ``dense layers`` or ``normalization``.
        layers: how many.
        parameters: stored numbers.
        parameter_share: of the spec's parameters, 0 to 1.
        macs: multiply-accumulates.
        mac_share: of the spec's multiply-accumulates, 0 to 1.
    """

    what: str
    layers: int
    parameters: int
    parameter_share: float
    macs: int
    mac_share: float


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """A stack of 3x3 convolutions beside the one convolution that sees as much (paper, section 2.3).

    Both go from ``channels`` to ``channels``, as every stack of a VGG does but for its very first layer; biases are
    left out. At equal sizes of the maps the multiply-accumulates relate as the weights do.

    Attributes:
        stage: 1 to 5.
        convolutions: 3x3, one behind the other.
        window: side of the square of the stage's pixels that one value behind them sees; also the kernel of the one.
        channels: in and out.
        weights: of the stack.
        single_weights: of the one convolution.
        saved: share of ``single_weights`` that the stack does without, 0 to 1.
    """

    stage: int
    convolutions: int
    window: int
    channels: int
    weights: int
    single_weights: int
    saved: float


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
        shares: what convolutions, dense layers and normalization hold and cost.
        stacks: every stage's stack of 3x3 convolutions, where it has at least two in a row.
    """

    spec: VggSpec
    layers: tuple[LayerFigures, ...]
    weight_layers: int
    parameters: int
    macs: int
    receptive_field: int
    peak_activation_bytes: int
    shares: tuple[Share, ...]
    stacks: tuple[Stack, ...]


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
        shares=_shares(rows),
        stacks=tuple(_stacks(spec)),
    )


def _shares(rows: list[LayerFigures]) -> tuple[Share, ...]:
    kinds: dict[str, tuple[LayerKind, ...]] = {
        "convolutions": ("conv",),
        "dense layers": ("dense",),
        "normalization": ("batch_norm", "lrn"),
    }
    all_parameters, all_macs = sum(row.parameters for row in rows), sum(row.macs for row in rows)
    found = []
    for what, of_kind in kinds.items():
        members = [row for row in rows if row.kind in of_kind]
        parameters, macs = sum(row.parameters for row in members), sum(row.macs for row in members)
        share = Share(
            what=what,
            layers=len(members),
            parameters=parameters,
            parameter_share=parameters / all_parameters,
            macs=macs,
            mac_share=macs / all_macs,
        )
        found.append(share)
    return tuple(found)


def _stacks(spec: VggSpec) -> Iterator[Stack]:
    for stage, (kernels, channels) in enumerate(zip(spec.stages, spec.widths, strict=True), start=1):
        runs = [len(list(run)) for kernel, run in itertools.groupby(kernels) if kernel == 3]
        count = max(runs, default=0)
        if count < 2:
            continue
        window = 1 + count * (3 - 1)  # each convolution adds a pixel on either side
        weights, single = count * 3**2 * channels**2, window**2 * channels**2
        yield Stack(
            stage=stage,
            convolutions=count,
            window=window,
            channels=channels,
            weights=weights,
            single_weights=single,
            saved=1 - weights / single,
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
