from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from vggedge.architecture import VggSpec, get_spec
from vggedge.dense import dense_model
from vggedge.model import build_vgg
from vggedge_runtime.errors import ModelError

keras = pytest.importorskip("keras")

TOLERANCE = 1e-5


def build(spec: VggSpec) -> Any:
    """A network whose biases and BatchNorm figures are not the ones that a layer would have without its weights."""
    model = build_vgg(spec, seed=5)
    generator = np.random.default_rng(6)
    for layer in model.layers:
        low, high = (0.5, 1.5) if "_bn" in layer.name else (-0.05, 0.05)
        # Kernels stay: they are drawn for activations of a sane size.
        values = [
            value if value.ndim > 1 else generator.uniform(low, high, value.shape) for value in layer.get_weights()
        ]
        layer.set_weights(values)
    return model


def draw(count: int, height: int, width: int) -> np.ndarray:
    """Noise, in a colour of its own for each image."""
    generator = np.random.default_rng(7)
    colours = generator.uniform(0, 1, (count, 1, 1, 3))
    return (colours * generator.integers(0, 256, (count, height, width, 3))).astype(np.float32)


def ask(model: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(model(images, training=False))


@pytest.mark.parametrize("head", ["dense", "gap"])
@pytest.mark.parametrize("normalization", ["none", "first-of-two-stages", "every", "lrn"])
@pytest.mark.parametrize("size", [(64, 64), (64, 96), (40, 70)])
def test_it_answers_images_of_the_networks_size_as_the_network_does(
    size: tuple[int, int], normalization: str, head: str
) -> None:
    spec = get_spec("vgg9-compact", input=(*size, 3), normalization=normalization, head=head)
    model, images = build(spec), draw(5, *size)
    wanted = ask(model, images)
    assert wanted.std(axis=0).max() > 1e-3  # networks that answer everything alike would agree, too
    np.testing.assert_allclose(ask(dense_model(model), images), wanted, atol=TOLERANCE)


@pytest.mark.parametrize("pixels", ["caffe", "imagenet"])
def test_other_pixels_a_pooled_head_with_hidden_layers_and_no_dropout(pixels: str) -> None:
    spec = get_spec("vgg11-compact", input=(32, 64, 3), dropout=0.0, head="gap", classes=3)
    spec = msgspec.structs.replace(spec, pixels=pixels, dense=(16, 8))
    model, images = build(spec), draw(4, 32, 64)
    np.testing.assert_allclose(ask(dense_model(model), images), ask(model, images), atol=TOLERANCE)


def test_a_larger_image_is_answered_with_the_mean_score_of_all_places() -> None:
    """The network's own dense layers, in NumPy, at each of the 2x3 places of a 96x128 image."""
    spec = get_spec("vgg9-compact", input=(64, 64, 3))
    model = build(spec)
    large = build_vgg(get_spec("vgg9-compact", input=(96, 128, 3)))
    features = keras.Model(large.input, large.get_layer("block5_pool").output)
    for layer in features.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights())
    images = draw(2, 96, 128)
    found = ask(features, images)
    assert found.shape == (2, 3, 4, 32)

    places = []
    for top in range(2):
        for left in range(3):
            values = found[:, top : top + 2, left : left + 2].reshape(2, -1)
            for name in ("fc1", "fc2", "predictions"):
                kernel, bias = model.get_layer(name).get_weights()
                values = values @ kernel + bias
                if name != "predictions":
                    values = np.maximum(values, 0)
            places.append(values)
    scores = np.mean(places, axis=0)
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    wanted = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(ask(dense_model(model), images), wanted, atol=TOLERANCE)
    assert np.ptp(places, axis=0).max() > 1e-3


def test_a_pooled_head_pools_the_whole_map() -> None:
    model = build(get_spec("vgg9-compact", input=(32, 32, 3), head="gap"))
    large = build_vgg(get_spec("vgg9-compact", input=(96, 64, 3), head="gap"))
    large.set_weights(model.get_weights())
    images = draw(2, 96, 64)
    np.testing.assert_allclose(ask(dense_model(model), images), ask(large, images), atol=TOLERANCE)


def test_the_model_stays_as_it_is() -> None:
    model, images = build(get_spec("vgg9-compact", input=(32, 32, 3))), draw(2, 32, 32)
    before, names = ask(model, images), [layer.name for layer in model.layers]
    dense = dense_model(model)
    assert dense.count_params() == model.count_params()
    dense.set_weights([0 * value for value in dense.get_weights()])
    np.testing.assert_array_equal(ask(model, images), before)
    assert [layer.name for layer in model.layers] == names


def test_scores_without_a_softmax_stay_scores() -> None:
    """As in a network that was built for a loss on logits: what ``model`` leaves out is not added in silence."""
    model = build(get_spec("vgg9-compact", input=(32, 32, 3)))
    model.get_layer("predictions").activation = keras.activations.linear
    scores = keras.models.clone_model(model)
    scores.set_weights(model.get_weights())
    images = draw(3, 32, 32)
    wanted = ask(scores, images)
    assert np.abs(wanted.sum(axis=1) - 1).max() > 0.01
    np.testing.assert_allclose(ask(dense_model(scores), images), wanted, atol=TOLERANCE)


def test_another_network_is_refused() -> None:
    model = keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(ModelError, match="not a VGG of this family"):
        dense_model(model)


@pytest.mark.slow
def test_the_full_vgg16() -> None:
    model, images = build_vgg(get_spec("vgg16"), seed=1), draw(1, 224, 224)
    dense = dense_model(model)
    assert dense.get_layer("fc1").kernel.shape == (7, 7, 512, 4096)
    np.testing.assert_allclose(ask(dense, images), ask(model, images), atol=TOLERANCE)
