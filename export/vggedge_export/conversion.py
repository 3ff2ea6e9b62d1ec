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

from vggedge_export.graph import INPUT, OUTPUT, Graph, graph_from_model, value_info
from vggedge_runtime.dependencies import require
from vggedge_runtime.errors import ConversionError, ModelError
from vggedge_runtime.preprocess import Normalization

if TYPE_CHECKING:
    import keras

_TF2ONNX_OPSET = 18  # the newest tf2onnx 1.17 writes; the first pass raises it


def graph_from_keras(model: keras.Model, normalization: Normalization | None = None) -> Graph:
    """Trace ``model`` for inference into a Graph: ``images`` uint8 (N, H, W, 3) in, ``probabilities`` out.

    The graph is tf2onnx's own: weights on long paths, many transposes. The passes clean it.

    Args:
        model: takes float32 pixels from 0 to 255, or what ``normalization`` makes of them.
        normalization: put into the head of the graph; None where the model normalises by itself.

    Raises:
        ModelError: both the model and ``normalization`` normalise, or the model has not one image input of fixed
            size and one output of class scores.
        ConversionError: tf2onnx failed; its own message is included.
    """
    check_exportable(model, normalization)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    tf = require("tensorflow", "train")
    tf2onnx = require("tf2onnx", "export")
    logging.getLogger("tf2onnx").setLevel(logging.ERROR)

    trainable, fixed = list(model.trainable_variables), list(model.non_trainable_variables)
    # Numbered: TensorFlow rewrites names it does not like, and layers of nested models may share a path.
    variables = {f"weight_{index}": variable for index, variable in enumerate(trainable + fixed)}
    specs = [tf.TensorSpec([None, *model.inputs[0].shape[1:]], tf.uint8, name=INPUT)]
    specs += [tf.TensorSpec(v.shape, v.dtype, name=name) for name, v in variables.items()]

    def infer(images: Any, *weights: Any) -> Any:
        split = len(trainable)
        pixels = tf.cast(images, tf.float32)
        if normalization is not None:
            pixels = (pixels - np.array(normalization.mean, np.float32)) / np.array(normalization.std, np.float32)
        outputs, _ = model.stateless_call(list(weights[:split]), list(weights[split:]), pixels, training=False)
        return tf.identity(outputs, name=OUTPUT)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tf2onnx's own use of deprecated NumPy and TensorFlow names
            traced = tf.function(infer, input_signature=specs)
            proto, _ = tf2onnx.convert.from_function(traced, input_signature=specs, opset=_TF2ONNX_OPSET)
            captures = traced.get_concrete_function().graph.captures  # the trace that was just converted
    except Exception as error:  # tf2onnx raises whatever its handlers happen to raise
        raise ConversionError(
            f"tf2onnx could not convert {model.name!r}: {error}. Check that every layer is one that ONNX has."
        ) from error
    graph = graph_from_model(proto)
    _join_weights(graph, variables, {inside.name: outside for outside, inside in captures})
    graph.rename_tensor(graph.outputs[0].name, OUTPUT)
    graph.inputs = [value_info(INPUT, np.uint8, ["N", *model.inputs[0].shape[1:]])]
    graph.outputs = [value_info(OUTPUT, np.float32, ["N", model.outputs[0].shape[-1]])]
    _name_by_layer(graph, [layer.name for layer in _layers_within(model)])
    return graph


def check_exportable(model: keras.Model, normalization: Normalization | None) -> None:
    """Raise ModelError unless the model maps one RGB image of fixed size to class scores and normalises once."""
    if not hasattr(model, "inputs"):
        raise ModelError(
            f"{model.name}: it has no defined inputs yet; export needs the image's size. Begin the model with "
            "keras.Input((height, width, 3)), or wrap it: keras.Model(inputs, model(inputs))."
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ModelError(
            f"{model.name}: {len(model.inputs)} inputs and {len(model.outputs)} outputs; export needs one image "
            "input and one output of class scores. Wrap the part to be exported in a keras.Model of its own."
        )
    size, scores = tuple(model.inputs[0].shape), tuple(model.outputs[0].shape)
    if len(size) != 4 or None in size[1:] or size[3] != 3:
        raise ModelError(
            f"{model.name}: its input is {size}; needed is (None, height, width, 3), channels last and of fixed "
            "size. Rebuild the model with keras.Input((height, width, 3))."
        )
    _check_float32(model)
    inside = normalizing_layer(model)
    if inside is not None and normalization is not None:
        raise ModelError(
            f"{model.name}: its layer {inside!r} normalises the image, and so would the image spec. "
            "Remove `normalization` from the image spec; doing both gives wrong answers."
        )
    if len(scores) != 2 or not scores[1] or scores[1] < 2:
        raise ModelError(
            f"{model.name}: its output is {scores}; needed is (None, classes) with at least 2 classes. "
            "End the model with a Dense layer of one unit a class and a softmax."
        )


def _check_float32(model: keras.Model) -> None:
    """Raise ModelError where a layer computes in another float type: the FP32 graph is what all proof starts from."""
    for layer in _layers_within(model):
        if "float" in layer.compute_dtype and layer.compute_dtype != "float32":
            raise ModelError(
                f"{model.name}: its layer {layer.name!r} computes in {layer.compute_dtype}; needed is float32, from "
                'which export makes FP16 and INT8 itself. Call keras.config.set_dtype_policy("float32"), build the '
                "same model again and give it this one's weights: new.set_weights(old.get_weights())."
            )


def normalizing_layer(model: keras.Model) -> str | None:
    """Name of the first Rescaling or Normalization layer before any convolution or dense layer, else None.

    Nested models are looked through. Behind the first kernel such a layer works on features, not on the image.
    """
    keras_layers = require("keras", "train").layers
    for layer in _layers_within(model):
        if isinstance(layer, (keras_layers.Rescaling, keras_layers.Normalization)):
            return str(layer.name)
        if any("kernel" in weight.name for weight in layer.weights):
            return None
    return None


def check_probabilities(graph: Graph) -> None:
    """Raise ModelError unless the graph ends in a softmax: its output is called ``probabilities`` and must be."""
    last = graph.producer(OUTPUT)
    if last is None or last.op_type != "Softmax":
        found = "its input" if last is None else f"{last.name} ({last.op_type})"
        raise ModelError(
            f"the model ends in {found}, not in a softmax, so its output is no probability of each class. "
            "Add keras.layers.Softmax() behind the last layer, or give that layer activation='softmax'."
        )


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
