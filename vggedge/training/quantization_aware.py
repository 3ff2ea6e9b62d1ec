"""Fine-tuning on the INT8 grid: for the network that loses accuracy when it is quantised as it is.

Every convolution and dense layer that export quantises computes with its input and its kernel rounded to INT8 steps,
as the exported graph will (Jacob et al. 2018, arXiv 1712.05877, section 3), and the gradient passes the rounding as if
it were not there (the straight-through estimator; Bengio et al. 2013, arXiv 1308.3432). The weights that are tuned
stay float32, and the model stays a plain Keras model: nothing of this is written into its file.

Input ranges are set on calibration images before tuning, and stay. BatchNorm keeps its statistics, gamma and beta: one
straight behind a convolution is folded into the kernel by export, and scales that belong to output channels commute
with that, so that rounding the unfolded kernel rounds the folded one. Kernels in other layers (SeparableConv2D, Conv1D,
attention) compute as they are: they have no range here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vggedge.data.base import ImageSet
from vggedge.evaluation import SUM_TOLERANCE
from vggedge.model import import_keras
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ModelError
from vggedge_runtime.preprocess import Normalization
from vggedge_runtime.progress import Advance, ignore_progress

if TYPE_CHECKING:
    import keras

STEPS = 127
"""INT8 steps of the largest magnitude. Weights use -127..127, activations -128..127; both have zero point 0."""

SMALLEST_SCALE = 2.0**-64
"""Of a kernel's channel of zeros: far below any weight, and above 0."""

EXACT_RANGE = STEPS / 128
"""Range of what Rescaling(1/128, offset=-1) makes of pixels: the step is then 1/128, and no pixel is rounded."""

_PARTS: NDArray[np.float64] = 2.0 ** (-np.arange(11) / 2)  # down to a 32nd
_BATCH_PIXELS = 1 << 17  # of one calibration step: bounds the activations of a full VGG to some 100 MB
_KERNEL_OPS = frozenset(
    {"Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2", "MatMul",
     "BatchMatMulV2", "Einsum"}
)  # fmt: skip
"""TensorFlow's operations that become ONNX's Conv, ConvTranspose, Gemm or MatMul."""


def fake_quantize(values: Any, scale: Any, least: int) -> Any:
    """``values`` rounded to the INT8 steps ``least`` to 127 of ``scale``, half to even, as ONNX's Q and DQ compute it.

    The gradient is passed on where nothing was clipped, and is 0 where something was.

    Args:
        values: float32 tensor.
        scale: of one step; one number, or one a channel of the last axis. Gets no gradient.
        least: -128 or -127.
    """
    tf = require("tensorflow", "train")

    def quantize(values: Any) -> tuple[Any, Callable[[Any], Any]]:
        steps = tf.round(values / scale)
        clipped = tf.clip_by_value(steps, least, STEPS)
        return clipped * scale, lambda upstream: tf.where(steps == clipped, upstream, 0.0)

    return tf.custom_gradient(quantize)(values)


@contextmanager
def fake_quantized(model: keras.Model, ranges: Mapping[str, float]) -> Iterator[None]:
    """Within the block the layers named in ``ranges`` compute on the INT8 grid; the model's variables are the same.

    Call the model itself, or a new keras.Model of its inputs and outputs: what Keras compiled before, as by
    ``predict``, goes on without. Do not save it within the block.

    Args:
        model: any Keras model.
        ranges: by the name of a layer, the magnitude of its input that is 127 steps.
    """
    layers = {layer.name: layer for layer in layers_within(model)}
    classes = {layers[name]: _quantized_class(type(layers[name]), np.float32(ranges[name] / STEPS)) for name in ranges}
    with _exchanged_classes(classes):
        yield


def measure_ranges(
    model: keras.Model,
    images: ImageSet,
    normalization: Normalization | None = None,
    progress: Advance = ignore_progress,
) -> dict[str, float]:
    """Find the layers that export quantises, and for the input of each the magnitude that is to be 127 steps.

    Of the largest magnitude over ``images`` and its parts by half octaves, it is the one with which the layer's own
    output is least off, in squares: a smaller one clips more and rounds finer. A few channels that are far above the
    others then do not take all the steps: what they mean to the layer counts, not how large they are. EXACT_RANGE
    where the layer sees the image through Rescaling(1/128, offset=-1).

    Args:
        model: gives probabilities.
        images: calibration images; they are gone through twice.
        normalization: of pixels, where the model does not normalise them itself.
        progress: told the number of images done.

    Raises:
        ModelError: as measure_magnitudes.
    """
    magnitudes = measure_magnitudes(model, images, normalization, progress)
    tf = require("tensorflow", "train")
    layers = {layer.name: layer for layer in layers_within(model) if layer.name in magnitudes}
    errors: list[tuple[str, Any]] = []
    classes = {layer: _erring_class(type(layer), magnitudes[name], errors) for name, layer in layers.items()}

    def infer(pixels: Any) -> dict[str, Any]:
        model(normalize(pixels, normalization), training=False)
        return {name: tf.add_n([each for key, each in errors if key == name]) for name in layers}

    with _exchanged_classes(classes):
        traced = _traced(infer, model)
    totals = dict.fromkeys(layers, np.zeros(len(_PARTS)))
    for pixels in _batches(images, model, "choosing ranges", progress):
        for name, found in traced(pixels).items():
            totals[name] = totals[name] + np.asarray(found, np.float64)
    best = {name: magnitudes[name] * float(_PARTS[total.argmin()]) for name, total in totals.items()}
    return {name: EXACT_RANGE if value == EXACT_RANGE else best[name] for name, value in magnitudes.items()}


def measure_magnitudes(
    model: keras.Model,
    images: ImageSet,
    normalization: Normalization | None = None,
    progress: Advance = ignore_progress,
) -> dict[str, float]:
    """Find the layers that export quantises, and the largest magnitude of each one's input over ``images``.

    EXACT_RANGE where a layer sees the image through Rescaling(1/128, offset=-1). Arguments as of measure_ranges.

    Raises:
        ModelError: there is no such layer, two have one name, an input is not finite or always 0, or what the model
            gives is no probabilities.
    """
    calls, traced = _trace(model, normalization)
    _check_names(model, calls)
    maxima = np.zeros(len(calls))
    for pixels in _batches(images, model, "calibrating", progress):
        largest, answers = (np.asarray(each, np.float64) for each in traced(pixels))
        maxima = np.where(np.isfinite(largest), np.maximum(maxima, largest), np.nan)
        _check_probabilities(model, answers)
    ranges: dict[str, float] = {}
    for call, value in zip(calls, maxima.tolist(), strict=True):
        name = call.layer.name
        if not 0 < value < np.inf:
            found = "always 0" if value == 0 else "not finite"
            raise ModelError(
                f"{model.name}: the input of its layer {name!r} is {found} on {len(images)} calibration images, so it "
                "has no INT8 range. Check the model's accuracy on these images first."
            )
        ranges[name] = max(ranges.get(name, 0), EXACT_RANGE if call.is_exact else value)  # of all its uses
    return ranges


def _batches(images: ImageSet, model: keras.Model, what: str, progress: Advance) -> Iterator[Any]:
    """float32 pixels, some images at a time."""
    tf = require("tensorflow", "train")
    height, width = model.inputs[0].shape[1:3]
    size = max(1, min(128, _BATCH_PIXELS // (height * width)))
    for start in range(0, len(images), size):
        indices = range(start, min(start + size, len(images)))
        yield tf.constant(images.read(indices).astype(np.float32))
        progress(indices.stop, len(images), what)


def _traced(infer: Callable[[Any], Any], model: keras.Model) -> Any:
    """``infer`` as a TensorFlow graph for batches of any size."""
    tf = require("tensorflow", "train")
    spec = tf.TensorSpec((None, *model.inputs[0].shape[1:]), tf.float32)
    return tf.function(infer, autograph=False).get_concrete_function(spec)


def layers_within(model: Any) -> Iterator[Any]:
    """Layers of ``model`` in order, each nested model replaced by its own."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from layers_within(layer)
        else:
            yield layer


@dataclass(frozen=True, eq=False)
class _Call:
    """One use of a layer in a traced model, with the TensorFlow tensors that go in and come out."""

    layer: Any
    inputs: Any
    outputs: Any
    is_exact: bool = False


def _trace(model: keras.Model, normalization: Normalization | None) -> tuple[list[_Call], Any]:
    """The calls that export quantises, and a function from pixels to (largest magnitude of each input, answers).

    They are looked for in TensorFlow's graph, which no nesting hides, as export looks for them in ONNX's.
    """
    keras, tf = import_keras(), require("tensorflow", "train")
    kinds = (*_kernel_classes(), keras.layers.Rescaling)
    layers = [layer for layer in layers_within(model) if isinstance(layer, kinds)]
    seen: list[_Call] = []
    calls: list[_Call] = []

    def infer(images: Any) -> tuple[Any, Any]:
        answers = keras.tree.flatten(model(normalize(images, normalization), training=False))[0]
        calls.extend(_quantized_calls(images, seen))
        return tf.stack([_largest(call.inputs) for call in calls]) if calls else tf.zeros(0), answers

    with _exchanged_classes({layer: _recording_class(type(layer), seen) for layer in layers}):
        return calls, _traced(infer, model)


def _quantized_calls(images: Any, seen: list[_Call]) -> list[_Call]:
    """The calls that export quantises: those that a convolution or dense layer follows further down."""
    kernels = [call for call in seen if isinstance(call.layer, _kernel_classes())]
    # The inputs of the calls, too: Keras compiles grouped convolutions, and their operation has another type then.
    followed = {call.inputs.name for call in kernels}
    for operation in reversed(images.graph.get_operations()):
        if operation.type in _KERNEL_OPS or not followed.isdisjoint(each.name for each in operation.outputs):
            followed.update(each.name for each in operation.inputs)
    exact = {call.outputs.name for call in seen if call not in kernels and _is_exact(call, images)}
    return [
        replace(call, is_exact=_without_padding(call.inputs).name in exact)
        for call in kernels
        if call.outputs.name in followed
    ]


def _is_exact(call: _Call, images: Any) -> bool:
    """Whether a call of Rescaling maps whole pixels onto INT8 steps."""
    scale, offset = np.asarray(call.layer.scale), np.asarray(call.layer.offset)
    return call.inputs is images and scale.size == offset.size == 1 and scale == 1 / 128 and offset == -1


def _without_padding(tensor: Any) -> Any:
    while tensor.op.type in ("Pad", "Identity"):
        tensor = tensor.op.inputs[0]
    return tensor


def _largest(tensor: Any) -> Any:
    """Largest magnitude, NaN if any value is not finite, which a maximum alone may pass over."""
    tf = require("tensorflow", "train")
    is_finite = tf.reduce_all(tf.math.is_finite(tensor))
    return tf.where(is_finite, tf.reduce_max(tf.abs(tensor)), tf.constant(np.nan, tensor.dtype))


def _kernel_classes() -> tuple[Any, ...]:
    layers = import_keras().layers
    return layers.Conv2D, layers.DepthwiseConv2D, layers.Dense


def _recording_class(base: Any, seen: list[_Call]) -> Any:
    class Recording(base):  # type: ignore[misc]
        def call(self, inputs: Any, **options: Any) -> Any:
            outputs = super().call(inputs, **options)
            seen.append(_Call(self, inputs, outputs))
            return outputs

    return Recording


def _erring_class(base: Any, largest: float, errors: list[tuple[str, Any]]) -> Any:
    """A layer that adds to ``errors`` how far off its output is, in squares, for each part of the range."""
    tf = require("tensorflow", "train")
    scales = [np.float32(largest * part / STEPS) for part in _PARTS]

    class Erring(base):  # type: ignore[misc]
        def call(self, inputs: Any, **options: Any) -> Any:
            outputs = super().call(inputs, **options)
            rounded = [super(Erring, self).call(fake_quantize(inputs, scale, -STEPS - 1)) for scale in scales]
            errors.append((self.name, tf.stack([tf.reduce_sum((each - outputs) ** 2) for each in rounded])))
            return outputs

    return Erring


def _quantized_class(base: Any, scale: np.float32) -> Any:
    tf = require("tensorflow", "train")
    # (height, width, in, multiplier) has two axes of output channels; all others have one, the last.
    is_depthwise = issubclass(base, import_keras().layers.DepthwiseConv2D)
    quantize = tf.autograph.experimental.do_not_convert(fake_quantize)  # which has nothing to convert, and imports

    class FakeQuantized(base):  # type: ignore[misc]
        @property
        def kernel(self) -> Any:
            # Most classes of Keras have the kernel as a property, DepthwiseConv2D as an attribute.
            kernel = tf.convert_to_tensor(vars(self)["kernel"] if is_depthwise else super().kernel)
            axes = list(range(2 if is_depthwise else len(kernel.shape) - 1))
            extent = tf.reduce_max(tf.abs(kernel), axis=axes, keepdims=True)
            return quantize(kernel, tf.stop_gradient(tf.maximum(extent / STEPS, SMALLEST_SCALE)), -STEPS)

        def call(self, inputs: Any, **options: Any) -> Any:
            return super().call(quantize(inputs, scale, -STEPS - 1), **options)

    return FakeQuantized


@contextmanager
def _exchanged_classes(classes: Mapping[Any, Any]) -> Iterator[None]:
    """Within the block each of these layers has the class given: a subclass of its own that computes otherwise.

    So the layers keep their variables and places in every model, which a copy of the model would have to rebuild.
    """
    own = {layer: type(layer) for layer in classes}
    try:
        for layer, exchanged in classes.items():
            layer.__class__ = exchanged
        yield
    finally:
        for layer, each in own.items():
            layer.__class__ = each


def normalize(pixels: Any, normalization: Normalization | None) -> Any:
    """What ``normalization`` makes of a float tensor of RGB pixels from 0 to 255."""
    if normalization is None:
        return pixels
    mean, std = (np.array(part, np.float32) for part in (normalization.mean, normalization.std))
    normalized = (pixels - mean) / std
    return normalized[..., ::-1] if normalization.order == "bgr" else normalized


def _check_names(model: keras.Model, calls: list[_Call]) -> None:
    if not calls:
        raise ModelError(
            f"{model.name}: INT8 quantises a convolution or dense layer before the last one, and this model has none; "
            "there is nothing to tune."
        )
    owners: dict[str, Any] = {}
    for layer in (each for each in layers_within(model) if any(each is call.layer for call in calls)):
        if owners.setdefault(layer.name, layer) is not layer:
            raise ModelError(
                f"{model.name}: two of its layers are called {layer.name!r}; ranges go by name. Rename one of them "
                "and write the model again."
            )


def _check_probabilities(model: keras.Model, answers: Any) -> None:
    if not (np.isfinite(answers).all() and answers.min() >= 0 and abs(answers.sum(axis=1) - 1).max() <= SUM_TOLERANCE):
        raise ModelError(
            f"{model.name}: its outputs on calibration images are no probabilities of one class each; needed is a "
            "softmax, as it is tuned with cross-entropy. Add one behind the model and write it again."
        )
