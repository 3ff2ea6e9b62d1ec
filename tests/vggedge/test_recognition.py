from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge.architecture import NORMALIZATIONS, PIXELS, SPECS, VggSpec, get_spec
from vggedge.model import build_vgg
from vggedge.recognition import _needed_settings, recognize_spec
from vggedge_runtime.errors import ModelError

keras = pytest.importorskip("keras")

COMPACT = [name for name in SPECS if name.endswith("-compact")]


@pytest.mark.parametrize("name", COMPACT)
def test_every_variant_is_recognized(name: str) -> None:
    spec = get_spec(name, input=(32, 32, 3))
    assert recognize_spec(build_vgg(spec)) == spec


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("head", ["dense", "gap"])
def test_every_normalization_and_head(normalization: str, head: str) -> None:
    spec = get_spec("vgg13-compact", input=(32, 64, 3), normalization=normalization, head=head, classes=3)
    found = recognize_spec(build_vgg(spec))
    assert found == spec


@pytest.mark.parametrize("pixels", list(PIXELS))
def test_every_kind_of_pixels(pixels: str) -> None:
    spec = msgspec.structs.replace(get_spec("vgg9-compact", input=(32, 32, 3)), pixels=pixels)
    model = build_vgg(spec)
    assert recognize_spec(model) == spec
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.float32)
    found = keras.Model(model.input, model.get_layer("rescaling").output)(images).numpy()
    wanted = (images - np.array(PIXELS[spec.pixels].mean)) / np.array(PIXELS[spec.pixels].std)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_a_width_and_no_dropout() -> None:
    spec = get_spec("vgg16-compact", width=0.5, dropout=0.0)
    assert spec.widths == (2, 4, 8, 16, 16)
    assert spec.dense == (128, 128)
    assert recognize_spec(build_vgg(spec)) == spec


def sequential(*layers: object) -> object:
    return keras.Sequential([keras.Input((32, 32, 3)), *layers])


def test_other_models_are_refused_by_the_layer_that_shows_it() -> None:
    flat = [keras.layers.Flatten(), keras.layers.Dense(2)]
    with pytest.raises(ModelError, match="no layer block1_conv1 to block5_conv1"):
        recognize_spec(sequential(*flat))
    good = build_vgg(get_spec("vgg9-compact", input=(32, 32, 3)))
    extra = keras.Model(good.inputs, keras.layers.Dense(2, name="mine")(good.output))
    with pytest.raises(ModelError, match="its layer 'mine' is not expected there"):
        recognize_spec(extra)
    other = keras.models.clone_model(
        good,
        clone_function=lambda layer: (
            keras.layers.Rescaling(1 / 255, name="rescaling")
            if layer.name == "rescaling"
            else layer.__class__.from_config(layer.get_config())
        ),
    )
    with pytest.raises(ModelError, match="'rescaling' computes pixel"):
        recognize_spec(other)
    cut = keras.Model(good.inputs, good.get_layer("fc2").output)
    with pytest.raises(ModelError, match="missing at its end"):
        recognize_spec(cut)


SPEC = get_spec("vgg9-compact", input=(32, 32, 3), classes=3)
SPLIT = msgspec.structs.replace(SPEC, normalization="every")
POOLED = get_spec("vgg9-compact", input=(32, 32, 3), classes=3, head="gap")


Change = Callable[[Any, Any], Any]
"""Takes a layer and its input, gives the output that takes the layer's place."""


def rebuild(spec: VggSpec, changes: dict[str, Change]) -> Any:
    """The network of ``spec`` with the layers of these names changed."""
    inputs = value = keras.Input(spec.input)
    for each in build_vgg(spec).layers[1:]:
        layer = type(each).from_config(each.get_config())
        value = changes[layer.name](layer, value) if layer.name in changes else layer(value)
    return keras.Model(inputs, value, name="mine")


def set_to(**settings: Any) -> Change:
    return lambda layer, value: type(layer).from_config({**layer.get_config(), **settings})(value)


def replaced_by(made: type, **settings: Any) -> Change:
    return lambda layer, value: made(**settings, name=layer.name)(value)


def copy_layers(spec: VggSpec) -> list[Any]:
    return [type(each).from_config(each.get_config()) for each in build_vgg(spec).layers[1:]]


@pytest.mark.parametrize(
    ("spec", "name", "settings", "message"),
    [
        (SPEC, "block3_conv1", {"activation": "tanh"}, "activation 'tanh'; needed is 'relu'"),
        (SPEC, "block3_conv1", {"activation": "linear"}, "activation 'linear'; needed is 'relu'"),
        (SPLIT, "block3_conv1", {"activation": "relu"}, "activation 'relu'; needed is 'linear'"),
        (SPLIT, "block3_relu1", {"activation": "elu"}, "activation 'elu'; needed is 'relu'"),
        (SPEC, "block5_conv2", {"padding": "valid", "kernel_size": 1}, "padding 'valid'; needed is 'same'"),
        (SPEC, "block2_conv1", {"dilation_rate": 2}, "dilation_rate (2, 2); needed is (1, 1)"),
        (SPEC, "block2_conv1", {"groups": 2}, "groups 2; needed is 1"),
        (SPEC, "block2_conv1", {"use_bias": False}, "use_bias False; needed is True"),
        (SPEC, "block2_conv1", {"kernel_size": (3, 5)}, "kernel_size (3, 5); needed is (3, 3)"),
        (SPEC, "block5_conv2", {"filters": 7}, "filters 7; needed is 32"),
        (SPEC, "block1_bn1", {"epsilon": 1e-5}, "epsilon 1e-05; needed is 0.001"),
        (SPEC, "block1_bn1", {"center": False}, "center False; needed is True"),
        (SPEC, "block1_pool", {"strides": 1}, "strides (1, 1); needed is (2, 2)"),
        (SPEC, "block1_pool", {"pool_size": 3, "padding": "same"}, "pool_size (3, 3); needed is (2, 2)"),
        (SPEC, "flatten", {"data_format": "channels_first"}, "data_format 'channels_first'; needed is 'channels_last'"),
        (POOLED, "avg_pool", {"keepdims": True}, "keepdims True; needed is False"),
        (SPEC, "fc1", {"activation": "gelu"}, "activation 'gelu'; needed is 'relu'"),
        (SPEC, "fc2", {"use_bias": False}, "use_bias False; needed is True"),
        (SPEC, "fc2_dropout", {"rate": 0.5}, "rate 0.5; needed is 0.3"),
        (SPEC, "fc2_dropout", {"rate": 0.0}, "rate 0; needed is a rate above 0, or no such layer"),
        (SPEC, "predictions", {"activation": "sigmoid"}, "activation 'sigmoid'; needed is 'softmax'"),
        (SPEC, "predictions", {"activation": "linear"}, "activation 'linear'; needed is 'softmax'"),
    ],
)
def test_a_layer_that_computes_something_else_is_named(
    spec: VggSpec, name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=re.escape(f"its layer {name!r} has {message}. Needed is a model that")):
        recognize_spec(rebuild(spec, {name: set_to(**settings)}))


def test_a_stride_is_named() -> None:
    spec = get_spec("vgg9-compact", input=(64, 64, 3))
    with pytest.raises(ModelError, match=r"'block2_conv1' has strides \(2, 2\); needed is \(1, 1\)"):
        recognize_spec(rebuild(spec, {"block2_conv1": set_to(strides=2)}))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("block1_bn1", {"momentum": 0.5, "axis": 3, "trainable": False}),
        ("block1_bn1", {"epsilon": float(np.float32(1e-3))}),
        ("fc1", {"kernel_regularizer": "l2", "kernel_initializer": "ones"}),
    ],
)
def test_what_does_not_change_the_answers_may_be_anything(name: str, settings: dict[str, Any]) -> None:
    assert recognize_spec(rebuild(SPEC, {name: set_to(**settings)})) == SPEC


def test_a_sequential_model_is_a_chain() -> None:
    assert recognize_spec(sequential(*copy_layers(SPEC))) == SPEC


def test_layers_that_another_model_calls_too() -> None:
    model = build_vgg(SPEC)
    model.get_layer("fc2")(keras.Input((256,)))
    assert recognize_spec(model) == SPEC


def test_scores_are_taken_where_the_caller_asks_for_them() -> None:
    assert recognize_spec(rebuild(SPEC, {"predictions": set_to(activation="linear")}), scores=True) == SPEC
    assert recognize_spec(build_vgg(SPEC), scores=True) == SPEC
    with pytest.raises(ModelError, match="activation 'sigmoid'; needed is 'softmax'"):
        recognize_spec(rebuild(SPEC, {"predictions": set_to(activation="sigmoid")}), scores=True)


@pytest.mark.parametrize(
    ("name", "change", "found", "needed"),
    [
        ("rescaling", replaced_by(keras.layers.Identity), "Identity", "Rescaling"),
        ("block1_bn1", replaced_by(keras.layers.LayerNormalization), "LayerNormalization", "BatchNormalization"),
        ("block1_pool", replaced_by(keras.layers.AveragePooling2D, pool_size=2), "AveragePooling2D", "MaxPooling2D"),
        ("flatten", replaced_by(keras.layers.GlobalMaxPooling2D), "GlobalMaxPooling2D", "Flatten"),
        ("fc1_dropout", replaced_by(keras.layers.GaussianNoise, stddev=0.3), "GaussianNoise", "Dropout"),
        ("block2_conv1", replaced_by(keras.layers.Dense, units=8), "Dense", "Conv2D"),
    ],
)
def test_a_layer_of_another_class_is_named(name: str, change: Change, found: str, needed: str) -> None:
    with pytest.raises(ModelError, match=f"its layer '{name}' is of class {found}; needed is {needed}"):
        recognize_spec(rebuild(SPEC, {name: change}))


def test_a_convolution_in_place_of_a_dense_layer_is_named() -> None:
    convolution = replaced_by(keras.layers.Conv2D, filters=3, kernel_size=1, activation="softmax")
    model = rebuild(POOLED, {"avg_pool": set_to(keepdims=True), "predictions": convolution})
    with pytest.raises(ModelError, match="its layer 'predictions' is of class Conv2D; needed is Dense"):
        recognize_spec(model)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fc2", lambda layer, value: layer(value + 1), "it computes 'add.*'; needed are the layers alone"),
        ("fc2", lambda layer, value: layer(layer(value)), "'fc2' takes the output of 'fc1_dropout' and 'fc2'"),
        ("predictions", lambda layer, value: layer(value) * 2, "it computes 'multiply.*'; needed are the layers alone"),
        ("fc2_dropout", lambda layer, value: layer(value, training=True), "'fc2_dropout' is called with training=True"),
        ("block1_bn1", lambda layer, value: layer(value, training=True), "'block1_bn1' is called with training=True"),
    ],
)
def test_layers_connected_otherwise_than_in_a_chain(name: str, change: Change, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        recognize_spec(rebuild(SPEC, {name: change}))


def test_a_layer_that_is_passed_by() -> None:
    spec = msgspec.structs.replace(SPEC, dropout=0.0, dense=(8, 8))
    before: list[Any] = []

    def keep(layer: Any, value: Any) -> Any:
        before.append(layer(value))
        return before[0]

    def add_later(layer: Any, value: Any) -> Any:
        return layer(keras.ops.add(value, before[0]))

    with pytest.raises(ModelError, match=r"it computes 'add.*'; needed are the layers alone"):
        recognize_spec(rebuild(spec, {"fc1": keep, "predictions": add_later}))


def test_inputs_and_outputs_that_no_spec_has() -> None:
    with pytest.raises(ModelError, match=r"its input is \(None, None, 3\); needed are a fixed height and width"):
        recognize_spec(keras.Sequential([keras.Input((None, None, 3)), *copy_layers(POOLED)]))
    with pytest.raises(ModelError, match=r"its input is not known; needed is a model that begins with keras\.Input"):
        recognize_spec(keras.Sequential(copy_layers(POOLED)))
    with pytest.raises(ModelError, match="input 32x32x1; images are RGB"):
        recognize_spec(keras.Sequential([keras.Input((32, 32, 1)), *copy_layers(POOLED)]))
    body = build_vgg(POOLED)
    with pytest.raises(ModelError, match=r"it has 1 input\(s\) and 2 output\(s\); needed is one of each"):
        recognize_spec(keras.Model(body.inputs, [body.output, body.get_layer("block5_pool").output]))


@pytest.mark.parametrize("spec", [SPEC, SPLIT, POOLED], ids=["dense", "every", "gap"])
def test_every_setting_of_a_layer_is_checked_or_known_not_to_matter(spec: VggSpec) -> None:
    """A new Keras brings new settings: each belongs into one of the two lists."""
    harmless = {
        *("name", "trainable", "dtype", "seed", "momentum", "synchronized"),
        *("renorm", "renorm_clipping", "renorm_momentum"),  # of training alone, as momentum
        *("scale", "offset", "units"),  # these tell the spec
    }
    for layer, built in zip(spec.layers(), build_vgg(spec).layers[1:], strict=True):
        settings = {
            name for name in built.get_config() if not re.search("_(initializer|regularizer|constraint)$", name)
        }
        checked = set(_needed_settings(spec, layer, scores=False))
        assert settings - harmless - checked == set(), layer.name
