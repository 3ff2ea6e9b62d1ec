from __future__ import annotations

import msgspec
import numpy as np
import pytest

from vggedge.architecture import NORMALIZATIONS, PIXELS, SPECS, get_spec
from vggedge.model import build_vgg
from vggedge.recognition import recognize_spec
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
