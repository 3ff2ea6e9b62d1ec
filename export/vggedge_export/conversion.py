"""Keras to ONNX. The only file that knows tf2onnx.

The weights are made *arguments* of the traced function and joined to the graph afterwards. TensorFlow then
never bakes them into a constant graph: tf2onnx.convert.from_keras needs more than 24 GB for the full VGG-16,
this way the whole export stays under 4 GB, and every weight is known by the layer it came from.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vggedge_export.graph import INPUT, OUTPUT, Graph, attribute, graph_from_model, value_info
from vggedge_export.grey import insert_grey
from vggedge_export.passes.rewrite_erfc import REWRITTEN
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError, ModelError
from vggedge_runtime.preprocess import Normalization

if TYPE_CHECKING:
    import keras

_ARITHMETIC = frozenset({"Add", "Subtract", "Multiply", "Divide", "TrueDivide"})
"""Classes of keras.ops that normalise pixels."""

_TF2ONNX_OPSET = 18  # the newest tf2onnx 1.17 writes; the first pass raises it


def graph_from_keras(model: keras.Model, normalization: Normalization | None = None) -> Graph:
    """Trace ``model`` for inference into a Graph: ``images`` uint8 (N, H, W, 3) in, the model's own output out.

    The graph is tf2onnx's own: weights on long paths, many transposes. The passes clean it.

    Args:
        model: takes float32 pixels from 0 to 255, or what ``normalization`` makes of them, RGB or grey.
        normalization: put into the head of the graph; None where the model normalises by itself.

    Raises:
        ModelError: as check_exportable.
        ConversionError: tf2onnx failed; its own message is included.
    """
    check_exportable(model, normalization)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tf = require("tensorflow", "train")
    tf2onnx = require("tf2onnx", "export")
    logging.getLogger("tf2onnx").setLevel(logging.CRITICAL)  # it logs tracebacks; what matters is raised here

    trainable, fixed = list(model.trainable_variables), list(model.non_trainable_variables)
    # Numbered: TensorFlow rewrites names it does not like, and layers of nested models may share a path.
    variables = {f"weight_{index}": variable for index, variable in enumerate(trainable + fixed)}
    specs = [tf.TensorSpec([None, *model.inputs[0].shape[1:]], tf.uint8, name=INPUT)]
    specs += [tf.TensorSpec(v.shape, v.dtype, name=name) for name, v in variables.items()]

    def infer(images: Any, *weights: Any) -> Any:
        split = len(trainable)
        pixels = tf.cast(images, tf.float32)
        if normalization is not None:
            mean, std = (
                np.array(each, np.float32)[: images.shape[-1]] for each in (normalization.mean, normalization.std)
            )
            pixels = (pixels - mean) / std
            if normalization.order == "bgr":
                pixels = tf.gather(pixels, [2, 1, 0], axis=-1)
        outputs, _ = model.stateless_call(list(weights[:split]), list(weights[split:]), pixels, training=False)
        return tf.identity(only_output(outputs), name=OUTPUT)

    was_eager = tf.config.functions_run_eagerly()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tf2onnx's own use of deprecated NumPy and TensorFlow names
            # Keras compiles grouped convolutions with XLA, as functions of their own, which tf2onnx does not open.
            tf.config.run_functions_eagerly(True)  # so they are written out in the trace
            traced = tf.function(infer, input_signature=specs, autograph=False)  # no Python control flow
            proto, _ = tf2onnx.convert.from_function(traced, input_signature=specs, opset=_TF2ONNX_OPSET)
            captures = traced.get_concrete_function().graph.captures  # the trace that was just converted
    except Exception as error:  # tf2onnx raises whatever its handlers happen to raise
        raise ConversionError(
            f"tf2onnx could not convert {model.name!r}: {error}. Check that every layer is one that ONNX has."
        ) from error
    finally:
        tf.config.run_functions_eagerly(was_eager)
    graph = graph_from_model(proto)
    _join_weights(graph, variables, {inside.name: outside for outside, inside in captures})
    graph.rename_tensor(graph.outputs[0].name, OUTPUT)
    graph.inputs = [value_info(INPUT, np.uint8, ["N", *model.inputs[0].shape[1:]])]
    graph.outputs = [value_info(OUTPUT, np.float32, ["N", model.outputs[0].shape[-1]])]
    _name_by_layer(graph, [layer.name for layer in _layers_within(model)])
    _check_operations(graph)
    if model.inputs[0].shape[-1] == 1:
        insert_grey(graph)
    return graph


def only_output(outputs: Any) -> Any:
    """The one tensor that a model gives, which may be named: ``{"scores": tensor}``."""
    return require("keras", "train").tree.flatten(outputs)[0]


def class_count(model: keras.Model) -> int:
    """Classes that the output tells apart: one a unit, and two for one unit, which is the second's score."""
    units = int(model.outputs[0].shape[-1])
    return 2 if units == 1 else units


def check_exportable(model: keras.Model, normalization: Normalization | None) -> None:
    """Raise ModelError unless the model maps one image to class scores in float32, and pixels are normalised once.

    The image has a fixed size and 1 or 3 channels, the last axis; the scores are (None, units). What the scores
    are is looked at later (completion.py): only the graph tells.
    """
    if not getattr(model, "inputs", None):
        raise ModelError(
            f"{model.name}: it has no defined inputs yet; export needs the image's size. Begin the model with "
            "keras.Input((height, width, 3)), or wrap it: keras.Model(inputs, model(inputs))."
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        names = ", ".join(tensor.name for tensor in model.inputs), ", ".join(map(_layer_of, model.outputs))
        raise ModelError(
            f"{model.name}: {len(model.inputs)} inputs ({names[0]}) and {len(model.outputs)} outputs ({names[1]}); "
            "export needs one image input and one output of class scores. Wrap the part to be exported in a "
            "keras.Model of its own."
        )
    _check_input(model)
    _check_layers(model)
    inside = normalizing_layer(model)
    if inside is not None and normalization is not None:
        raise ModelError(
            f"{model.name}: its layer {inside!r} normalises the image, and so would the image spec. "
            "Remove `normalization` from the image spec, or leave --pixels out; doing both gives wrong answers."
        )
    if normalization is not None and model.inputs[0].shape[3] == 1:
        _check_grey(model, normalization)
    scores = tuple(model.outputs[0].shape)
    if len(scores) != 2 or not scores[1]:
        raise ModelError(
            f"{model.name}: its output, of the layer {_layer_of(model.outputs[0])!r}, is {scores}; needed is (None, "
            "classes), one score a class. A map of scores is no classification of the image: end the model with "
            "GlobalAveragePooling2D or Flatten and a Dense layer of one unit a class."
        )


def _check_input(model: keras.Model) -> None:
    """Raise ModelError unless the input is (None, height, width, 3 or 1)."""
    size, name = tuple(model.inputs[0].shape), model.inputs[0].name
    needed = "needed is (None, height, width, 3) or (None, height, width, 1)"
    if len(size) != 4:
        reason = f"which is no image; {needed}"
    elif size[1] in (1, 3) and size[3] not in (1, 3):
        reason = f"channels first; {needed}, channels last. Build the model with data_format='channels_last'"
    elif size[3] not in (1, 3):
        reason = f"and pixels have {size[3]} channels there; {needed}: RGB or grey"
    elif size[0] is not None:
        reason = f"which fixes the batch to {size[0]}; {needed}. Build it with keras.Input({size[1:]})"
    elif None in size[1:]:
        reason = (
            f"which leaves the size open; {needed} of fixed size. Build it with keras.Input((height, width, {size[3]}))"
        )
    else:
        return
    raise ModelError(f"{model.name}: its input {name!r} is {size}, {reason}.")


def _check_layers(model: keras.Model) -> None:
    """Raise ModelError at a layer of another float type, from which no proof could start, or with channels first."""
    for layer in _layers_within(model):
        if "float" in layer.compute_dtype and layer.compute_dtype != "float32":
            raise ModelError(
                f"{model.name}: its layer {layer.name!r} computes in {layer.compute_dtype}; needed is float32, from "
                'which export makes FP16 and INT8 itself. Call keras.config.set_dtype_policy("float32"), build the '
                "same model again and give it this one's weights: new.set_weights(old.get_weights())."
            )
        if getattr(layer, "data_format", None) == "channels_first":
            raise ModelError(
                f"{model.name}: its layer {layer.name!r} has data_format='channels_first'; needed is 'channels_last', "
                "which TensorFlow computes on every machine; export makes channels-first graphs of it by itself. "
                "Build the model again with it: the weights are the same, but for a Dense layer behind a Flatten."
            )


def _check_grey(model: keras.Model, normalization: Normalization) -> None:
    """Raise ModelError where one grey channel would be normalised by three different numbers."""
    if normalization.order == "bgr" or len({*zip(normalization.mean, normalization.std, strict=True)}) > 1:
        raise ModelError(
            f"{model.name}: its input {model.inputs[0].name!r} has one channel, and the image spec normalises three "
            f"differently ({normalization}). Give all three the same mean and std, in RGB order."
        )


def _layer_of(tensor: Any) -> str:
    """Name of the layer that computes an output of a Keras model."""
    return str(tensor._keras_history.operation.name)


def _check_operations(graph: Graph) -> None:
    """Raise ConversionError at an operation that tf2onnx passed on as TensorFlow's own, or that holds a loop."""
    onnx = require("onnx", "export")
    for node in graph.nodes:
        layer = node.name.rpartition("/")[0] or node.name
        if any(entry.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for entry in node.attribute):
            raise ConversionError(
                f"the layer {layer!r} became an ONNX {node.op_type} with a graph of its own inside, which engines for "
                "the edge run badly and vggedge does not follow. Build a recurrent layer with unroll=True, or "
                "replace it."
            )
        if any(pad < 0 for pad in attribute(node, "pads", [])):
            raise ConversionError(
                f"the layer {layer!r} became a {node.op_type} with negative padding, which ONNX does not have: tf2onnx "
                "cannot write its output_padding. Build it without, and crop or pad behind it."
            )
        if node.op_type not in REWRITTEN and not onnx.defs.has(node.op_type):
            raise ConversionError(
                f"the layer {layer!r} computes TensorFlow's {node.op_type}, which ONNX does not have. Replace the "
                "layer by one made of operations that ONNX has."
            )


def normalizing_layer(model: keras.Model) -> str | None:
    """Name of what first normalises pixels before any convolution or dense layer, else None.

    That is a Rescaling or Normalization layer, or arithmetic written as operations, as preprocess_input of
    keras.applications leaves it in a model. Nested models are looked through. Behind the first kernel they work on
    features, not on the image.
    """
    keras_layers = require("keras", "train").layers
    for layer in _operations_within(model):
        is_layer = isinstance(layer, (keras_layers.Rescaling, keras_layers.Normalization))
        if is_layer or (not hasattr(layer, "weights") and type(layer).__name__ in _ARITHMETIC):
            return str(layer.name)
        if not hasattr(layer, "weights"):
            continue
        if any("kernel" in weight.name for weight in layer.weights):
            return None
    return None


def _operations_within(model: Any) -> Iterator[Any]:
    """Layers of ``model`` as _layers_within has them, and the operations of keras.ops between them, in order."""
    for operation in getattr(model, "operations", None) or model.layers:
        if hasattr(operation, "layers"):
            yield from _operations_within(operation)
        else:
            yield operation


def _layers_within(model: Any) -> Iterator[Any]:
    """Layers of ``model`` in order, each nested model (or keras.layers.Pipeline) replaced by its own."""
    for layer in model.layers:
        if hasattr(layer, "layers"):
            yield from _layers_within(layer)
        else:
            yield layer


def _join_weights(graph: Graph, variables: dict[str, Any], constants: dict[str, Any]) -> None:
    """Give every weight argument that the graph still reads its value, and remember whose it is.

    ``constants`` are tensors that a layer holds outside its variables, as Normalization does; they have no owner.
    """
    owners = _owning_layers([variable.path for variable in variables.values()])
    for value in graph.inputs:
        if value.name in variables:
            graph.weights[value.name] = np.asarray(variables[value.name])
            graph.layer_of[value.name] = owners[variables[value.name].path]
        elif value.name != INPUT:
            graph.weights[value.name] = np.asarray(constants[value.name])
    graph.drop_unused()


def _owning_layers(paths: list[str]) -> dict[str, str]:
    """Layer of every variable: ``model/conv1/kernel`` -> ``conv1``, or ``model/conv1`` where two share a name."""
    layers = {path: path.rpartition("/")[0] for path in paths}
    shared = Counter(layer.rpartition("/")[2] for layer in set(layers.values()))
    short = {layer: layer.rpartition("/")[2] for layer in layers.values()}
    return {path: short[layer] if shared[short[layer]] == 1 else layer for path, layer in layers.items()}


def _name_by_layer(graph: Graph, layers: list[str]) -> None:
    """Name nodes after the layer in whose scope TensorFlow made them: ``block1_pool_1/MaxPool2d`` -> ``block1_pool``.

    A nested model's name stands before its layer's, and TensorFlow numbers a scope that it has seen before, as Keras
    numbers layers: ``pool_1`` is ``pool`` or ``pool_1``, whichever no scope before it was. Layers with weights are
    named from those instead (passes/name_layers.py), so a guess here can only touch layers without any.
    """
    known, found = set(layers), dict[str, str]()
    for node in graph.nodes:
        scope, _, operation = node.name.rpartition("/")
        if scope not in found:
            parts = (guess for part in scope.split("/") for guess in (re.sub(r"_\d+$", "", part), part))
            guesses = [guess for guess in parts if guess in known]
            fresh = [guess for guess in guesses if guess not in found.values()]
            found[scope] = next(iter(fresh + guesses), scope)
        if scope:
            node.name = f"{found[scope]}/{operation}"
