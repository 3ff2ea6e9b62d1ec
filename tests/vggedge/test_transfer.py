from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge.architecture import VggSpec, get_spec
from vggedge.data.base import ImageSet
from vggedge.model import ModelCard, build_vgg, read_model, write_model
from vggedge.training import AugmentationConfig, Start, TrainConfig, TrainResult, open_network, read_start, train
from vggedge.training.transfer import build_image_spec, build_transfer_spec
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec, scale_image

pytest.importorskip("keras")

BASE = get_spec("vgg9-compact", input=(32, 32, 3), classes=3)
CONFIG = TrainConfig(epochs=2, batch_size=8, validation_share=0.25, seed=4)


def image_set(classes: int = 2, side: int = 32) -> ImageSet:
    targets = np.arange(32, dtype=np.int64) % classes

    def read_one(index: int) -> Any:
        image = np.random.default_rng(index).integers(0, 128, (side, side, 3), dtype=np.uint8)
        image[..., targets[index]] += 120
        return image

    labels = tuple("abcdef"[:classes])
    return ImageSet("colours", labels, targets, read_one, lambda i, s: scale_image(Image.fromarray(read_one(i)), s))


def weights(model: Any) -> dict[str, list[Any]]:
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights}


def same_layers(first: Any, second: Any) -> set[str]:
    """Names of the layers whose weights are equal in both."""
    one, two = weights(first), weights(second)
    return {
        name
        for name in one.keys() & two.keys()
        if [each.shape for each in one[name]] == [each.shape for each in two[name]]
        and all(np.array_equal(a, b) for a, b in zip(one[name], two[name], strict=True))
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.keras"
    found = train(BASE, image_set(3), CONFIG)
    write_model(
        found.model, path, ModelCard(labels=("a", "b", "c"), image=ImageSpec(height=32, width=32, kernel="bicubic"))
    )
    return path


def transfer(base: Path, frozen_stages: int | None = None, side: int = 32, **choices: Any) -> tuple[Start, TrainResult]:
    spec, start = open_network(
        transfer=base, frozen_stages=frozen_stages, input=None if side == 32 else (side, side, 3), **choices
    )
    assert start is not None
    return start, train(msgspec.structs.replace(spec, classes=2), image_set(side=side), CONFIG, start=start)


def stages(spec: VggSpec, *numbers: int) -> set[str]:
    return {layer.name for layer in spec.layers() if layer.stage in numbers and layer.kind in ("conv", "batch_norm")}


@pytest.mark.parametrize(("frozen", "kept"), [(None, (1, 2, 3, 4, 5)), (2, (1, 2)), (0, ())])
def test_frozen_stages_keep_their_weights_and_statistics(base: Path, frozen: int | None, kept: tuple[int, ...]) -> None:
    start, found = transfer(base, frozen)
    assert same_layers(start.model, found.model) == stages(BASE, *kept)
    origin = found.history.origin
    assert origin is not None
    assert set(origin.layers) == stages(BASE, 1, 2, 3, 4, 5)
    assert (origin.kind, origin.model, origin.frozen_stages) == (
        "transfer",
        "base.keras",
        5 if frozen is None else frozen,
    )
    assert found.model.output_shape == (None, 2)


def test_the_result_can_be_trained_on_with_fewer_frozen_stages(base: Path, tmp_path: Path) -> None:
    _, first = transfer(base)
    assert all(layer.trainable for layer in first.model.layers)
    card = ModelCard(labels=("a", "b"), image=ImageSpec(height=32, width=32))
    write_model(first.model, tmp_path / "first.keras", card)
    again, _ = read_model(tmp_path / "first.keras")
    assert all(layer.trainable for layer in again.layers)
    start, second = transfer(tmp_path / "first.keras", 3)
    assert same_layers(start.model, second.model) == stages(BASE, 1, 2, 3)


def test_the_head_and_the_size_can_be_others(base: Path) -> None:
    _, found = transfer(base, head="gap", side=48)
    assert found.model.input_shape == (None, 48, 48, 3)
    assert (found.history.spec.head, found.history.spec.dense) == ("gap", ())
    assert "fc1" not in weights(found.model)


def test_the_spec_of_a_transfer() -> None:
    caffe = msgspec.structs.replace(BASE, pixels="caffe", normalization="every")
    assert build_transfer_spec(caffe) == caffe
    pooled = build_transfer_spec(caffe, head="gap", dropout=0.1, input=(64, 64, 3))
    assert (pooled.head, pooled.dense, pooled.dropout, pooled.input) == ("gap", (), 0.1, (64, 64, 3))
    assert (pooled.pixels, pooled.normalization, pooled.widths) == ("caffe", "every", BASE.widths)
    assert build_transfer_spec(pooled, head="dense").dense == (256, 256)
    strange = msgspec.structs.replace(pooled, name="vgg")
    with pytest.raises(UsageError, match="no variant with these stages"):
        build_transfer_spec(strange, head="dense")
    with pytest.raises(UsageError, match="head is 'mlp'; known are dense, gap"):
        build_transfer_spec(caffe, head="mlp")


def test_images_are_read_as_for_the_base(base: Path) -> None:
    spec, start = open_network(transfer=base, input=(48, 40, 3))
    assert build_image_spec(spec, start, CONFIG) == ImageSpec(height=48, width=40, kernel="bicubic")
    jitter = msgspec.structs.replace(CONFIG, augmentation=AugmentationConfig(scale=(64, 80)))
    assert build_image_spec(spec, start, jitter) == ImageSpec(
        height=48, width=40, kernel="bicubic", resize="crop", scale=72
    )
    assert build_image_spec(spec, None, CONFIG) == ImageSpec(height=48, width=40)


def test_a_base_that_is_shown_centres_of_larger_images_hands_that_on(base: Path) -> None:
    spec, start = open_network(transfer=base, input=(64, 64, 3))
    assert start is not None
    wide = replace(start, image=ImageSpec(height=32, width=32, resize="crop", scale=37))  # 256 at 224
    assert build_image_spec(spec, wide, CONFIG) == ImageSpec(height=64, width=64, resize="crop", scale=74)
    same = msgspec.structs.replace(spec, input=(32, 32, 3))
    assert build_image_spec(same, wide, CONFIG).scale == 37


def test_a_deeper_network_grows_from_a_shallower_one(base: Path) -> None:
    spec, start = open_network(variant="vgg16-compact", initial=base, input=(32, 32, 3))
    assert start is not None
    model = build_vgg(spec, 0)
    fresh = weights(model)
    origin = start.copy_into(model, spec)
    # vgg9 has one convolution in stages 1 to 4 and two in stage 5; classes differ, so predictions stays fresh.
    shared = {f"block{stage}_conv1" for stage in range(1, 6)} | {"block5_conv2", "fc1", "fc2"}
    assert set(origin.layers) == shared | {"block1_bn1", "block2_bn1"} == same_layers(start.model, model)
    assert all(layer.trainable for layer in model.layers)
    for name in ("block1_conv2", "block5_conv3", "predictions"):
        np.testing.assert_array_equal(weights(model)[name][0], fresh[name][0])
    found = train(msgspec.structs.replace(spec, classes=2), image_set(), CONFIG, start=start)
    assert found.history.origin == origin


def test_pixels_are_normalised_as_the_start_has_it(base: Path, tmp_path: Path) -> None:
    caffe = msgspec.structs.replace(BASE, pixels="caffe")
    card = ModelCard(labels=("a", "b", "c"), image=ImageSpec(height=32, width=32))
    write_model(build_vgg(caffe, 0), tmp_path / "caffe.keras", card)
    spec, start = open_network(variant="vgg11-compact", initial=tmp_path / "caffe.keras")
    assert spec.pixels == "caffe"
    assert start is not None
    other = msgspec.structs.replace(spec, pixels="symmetric")
    with pytest.raises(ModelError, match=r"caffe\.keras: its pixels are caffe, those of the new network symmetric"):
        start.copy_into(build_vgg(other, 0), other)


def test_a_start_that_fits_nowhere_is_refused_before_images_are_read(base: Path) -> None:
    _, start = open_network(variant="vgg16-compact", initial=base, input=(32, 32, 3))
    wide = get_spec("vgg16-compact", input=(32, 32, 3), classes=2, width=2)
    read: list[int] = []
    data = image_set()
    watched = ImageSet(
        "watched", data.labels, data.targets, lambda i: read.append(i) or data.read_one(i), data.read_scaled
    )
    with pytest.raises(ModelError, match=r"base\.keras: none of its layers .* widths are \(4, 8, 16, 32, 32\)"):
        train(wide, watched, CONFIG, start=start)
    assert len(read) == 1


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"widths": (4, 8, 16, 32, 64)},
            r"block5_conv1 has .* \(3, 3, 32, 32\), \(32,\); needed are \(3, 3, 32, 64\), ",
        ),
        ({"stages": ((3,), (3,), (3, 3), (3, 3), (3, 3))}, "it has no layer block3_conv2 with weights; needed are "),
        ({"stages": ((3,), (3,), (3,), (1,), (3, 3))}, r"block4_conv1 has weights of shapes \(3, 3, 16, 32\)"),
        ({"normalization": "every"}, r"it has no layer block3_bn1 with weights; needed are \(16,\), \(16,\), "),
    ],
)
def test_a_base_that_fits_only_partly_is_refused(base: Path, choices: dict[str, Any], message: str) -> None:
    start = read_start(base, "transfer", 5)
    spec = msgspec.structs.replace(BASE, **choices)
    model = build_vgg(spec, 0)
    fresh = weights(model)
    with pytest.raises(ModelError, match=rf"base\.keras: .*{message}"):
        start.copy_into(model, spec)
    assert all(np.array_equal(a, b) for name in fresh for a, b in zip(fresh[name], weights(model)[name], strict=True))
    assert all(layer.trainable for layer in model.layers)


def test_growing_freezes_nothing(base: Path, tmp_path: Path) -> None:
    start = read_start(base, "initial")
    with pytest.raises(UsageError, match="frozen_stages is 2 and kind initial; only transfer freezes"):
        replace(start, frozen_stages=2)
    with pytest.raises(UsageError, match="only transfer freezes"):
        read_start(tmp_path / "none.keras", "initial", 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"frozen_stages": 2}, "name it with --transfer"),
        ({"transfer": Path("b.keras"), "variant": "vgg16"}, "--model vgg16: with --transfer the base decides"),
        ({"transfer": Path("b.keras"), "normalization": "none"}, "--normalization none: with --transfer"),
        ({"transfer": Path("b.keras"), "initial": Path("s.keras")}, "--initial s.keras: with --transfer"),
        ({"transfer": Path("b.keras"), "frozen_stages": 6}, "freeze is 6; a VGG has 5 stages"),
        ({"transfer": Path("b.keras"), "head": "mlp"}, "head is 'mlp'"),
        ({"variant": "vgg61"}, "Did you mean"),
    ],
)
def test_choices_that_exclude_each_other_are_refused_before_a_file_is_read(
    choices: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        open_network(**choices)


def test_a_file_that_is_missing_or_no_vgg_is_named(tmp_path: Path) -> None:
    import keras

    with pytest.raises(ModelError, match=r"none\.keras: no such file"):
        open_network(transfer=tmp_path / "none.keras")
    inputs = keras.Input((32, 32, 3))
    other = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs)), name="mlp")
    other.save(tmp_path / "mlp.keras")
    with pytest.raises(ModelError, match="mlp: not a VGG of this family"):
        open_network(transfer=tmp_path / "mlp.keras")
