from __future__ import annotations

import importlib.util
import re
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vggedge.model import read_model, write_model
from vggedge.recognition import recognize_spec
from vggedge.weights import ImportConfig, ImportedModel, import_weights, read_checkpoint, read_labels
from vggedge.weights.checkpoint import Checkpoint, LayerWeights
from vggedge.weights.matching import match_spec
from vggedge_runtime.errors import ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec

keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")
safetensors = pytest.importorskip("safetensors.numpy")

GOLDEN = Path(__file__).parent / "golden_torchvision"
WIDTHS = (4, 6, 8, 10, 10)
STAGES = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def build_applications(
    model: str = "vgg16", *, top: bool = True, size: tuple[int, int] = (32, 32), units: int = 12, classes: int = 5
) -> Any:
    """keras.applications' network, layer for layer, with few channels."""
    layers = keras.layers
    inputs = outputs = keras.Input((*size, 3))
    for stage, (count, width) in enumerate(zip(STAGES[model], WIDTHS, strict=True), start=1):
        for number in range(1, count + 1):
            name = f"block{stage}_conv{number}"
            outputs = layers.Conv2D(width, (3, 3), activation="relu", padding="same", name=name)(outputs)
        outputs = layers.MaxPooling2D((2, 2), strides=(2, 2), name=f"block{stage}_pool")(outputs)
    if top:
        outputs = layers.Flatten(name="flatten")(outputs)
        outputs = layers.Dense(units, activation="relu", name="fc1")(outputs)
        outputs = layers.Dense(units, activation="relu", name="fc2")(outputs)
        outputs = layers.Dense(classes, activation="softmax", name="predictions")(outputs)
    network = keras.Model(inputs, outputs, name=model)
    randomise(network)
    return network


def randomise(network: Any) -> None:
    """Kernels that keep the size of what goes through them, and biases that are not zero."""
    draw = np.random.default_rng(3)
    for layer in network.layers:
        if layer.get_weights():
            kernel, bias = layer.get_weights()
            spread = np.sqrt(2 / np.prod(kernel.shape[:-1]))
            # The first layer takes pixels of up to 150; answers are to be neither all alike nor 0 and 1.
            spread *= 1 / 70 if layer.name == "block1_conv1" else 1
            random = draw.normal(0, spread, kernel.shape), draw.normal(0, 0.1, bias.shape)
            layer.set_weights([each.astype(np.float32) for each in random])


def random_images(size: tuple[int, int] = (32, 32), count: int = 3) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, *size, 3)).astype(np.float32)


def caffe_answers(network: Any, images: np.ndarray) -> np.ndarray:
    return np.asarray(network(keras.applications.vgg16.preprocess_input(images.copy())))


def save(network: Any, path: Path) -> Path:
    if path.name.endswith(".weights.h5"):
        network.save_weights(path)
    else:
        network.save(path)
    return path


def write_legacy(network: Any, path: Path) -> Path:
    """The layout of the files that keras.applications distributes, written by Keras 1."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = np.array([layer.name for layer in network.layers], "S")
        for layer in network.layers:
            group = file.create_group(layer.name)
            arrays = layer.get_weights()
            names = [f"{layer.name}_{number}_1:0" for number in range(len(arrays))]
            group.attrs["weight_names"] = np.array(names, "S")
            for name, array in zip(names, arrays, strict=True):
                group[name] = array
    return path


def golden_image() -> np.ndarray:
    """(1, 224, 224, 3), the image that torch was shown."""
    place = importlib.util.spec_from_file_location("golden_image", GOLDEN / "image.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    return np.asarray(module.build_image()[None], np.float32)


def logits(model: Any, images: np.ndarray) -> np.ndarray:
    before = keras.Model(model.input, model.get_layer("fc2").output)(images).numpy()
    kernel, bias = model.get_layer("predictions").get_weights()
    return before @ kernel + bias


# Parity


@pytest.mark.parametrize("model", ["VGG16", "VGG19"])
def test_keras_applications_with_top(model: str, tmp_path: Path) -> None:
    theirs = getattr(keras.applications, model)(weights=None, input_shape=(32, 32, 3), classes=10)
    randomise(theirs)
    found = import_weights(str(save(theirs, tmp_path / "theirs.keras")))
    assert (found.spec.name, found.spec.input, found.spec.classes) == (model.lower(), (32, 32, 3), 10)
    assert (found.spec.pixels, found.is_head_trained, found.has_names) == ("caffe", True, False)
    images = random_images()
    wanted = caffe_answers(theirs, images)
    assert 0.15 < wanted.max() < 0.99
    np.testing.assert_allclose(found.model(images), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", ["VGG16", "VGG19"])
def test_keras_applications_without_top(model: str, tmp_path: Path) -> None:
    theirs = getattr(keras.applications, model)(weights=None, include_top=False, input_shape=(32, 64, 3))
    randomise(theirs)
    file = save(theirs, tmp_path / "theirs.weights.h5")
    found = import_weights(str(file), ImportConfig(classes=4, input=(32, 64, 3)))
    assert (found.spec.head, found.spec.dense, found.is_head_trained) == ("gap", (), False)
    ours = keras.Model(found.model.input, found.model.get_layer("block5_pool").output)
    images = random_images((32, 64))
    wanted = caffe_answers(theirs, images)
    assert 1 < wanted.max() < 10
    np.testing.assert_allclose(ours(images), wanted, atol=1e-5 * wanted.max(), rtol=0)


@pytest.mark.slow
def test_the_whole_vgg16_at_224(tmp_path: Path) -> None:
    theirs = keras.applications.VGG16(weights=None)
    randomise(theirs)
    images = random_images((224, 224), 1)
    wanted = caffe_answers(theirs, images)
    file = save(theirs, tmp_path / "theirs.keras")
    del theirs
    found = import_weights(str(file))
    assert found.model.count_params() == 138_357_544
    assert recognize_spec(found.model) == found.spec
    np.testing.assert_allclose(found.model(images), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "variant", "normalization"),
    [("vgg11", "vgg11", "none"), ("vgg11_bn", "vgg11", "every"), ("vgg16", "vgg16", "none")],
)
def test_torchvision(name: str, variant: str, normalization: str) -> None:
    found = import_weights(str(GOLDEN / f"{name}.safetensors"))
    spec = found.spec
    assert (spec.name, spec.normalization, spec.pixels) == (variant, normalization, "imagenet")
    assert (spec.widths, spec.dense, spec.classes, spec.input) == ((2, 3, 4, 5, 5), (7, 7), 5, (224, 224, 3))
    wanted_logits, wanted = np.load(GOLDEN / f"{name}.npy")
    image = golden_image()
    np.testing.assert_allclose(found.model(image)[0], wanted, atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits(found.model, image)[0], wanted_logits, rtol=1e-5)


# Formats


def test_every_keras_format_gives_the_same_model(tmp_path: Path) -> None:
    theirs = build_applications("vgg19", size=(64, 64))
    files = [save(theirs, tmp_path / name) for name in ("m.keras", "m.weights.h5", "m.h5")]
    files.append(write_legacy(theirs, tmp_path / "legacy.h5"))
    images = random_images((64, 64))
    wanted = caffe_answers(theirs, images)
    for file in files:
        found = import_weights(str(file))
        assert (found.spec.name, found.spec.input) == ("vgg19", (64, 64, 3)), file.name
        np.testing.assert_allclose(found.model(images), wanted, atol=1e-5, rtol=0, err_msg=file.name)


def test_layers_are_ordered_by_number_where_the_file_has_no_names(tmp_path: Path) -> None:
    """Early versions of Keras 3 kept no names; conv2d_10 comes after conv2d_9, not after conv2d_1."""
    theirs = build_applications()
    file = save(theirs, tmp_path / "m.weights.h5")
    with h5py.File(file, "r+") as stored:
        for layer in stored["layers"].values():
            del layer["vars"].attrs["name"]
    assert {layer.role for layer in read_checkpoint(file).layers} == {None}
    images = random_images()
    found = import_weights(str(file))
    np.testing.assert_allclose(found.model(images), caffe_answers(theirs, images), atol=1e-5, rtol=0)


def test_a_written_import_is_read_and_recognized(tmp_path: Path) -> None:
    found = import_weights(str(GOLDEN / "vgg11_bn.safetensors"), ImportConfig(labels=("a", "b", "c", "d", "e")))
    write_model(found.model, tmp_path / "m.keras", found.card)
    model, card = read_model(tmp_path / "m.keras")
    assert card is not None
    assert card.labels == ("a", "b", "c", "d", "e")
    assert card.image == ImageSpec(height=224, width=224, resize="crop")
    assert recognize_spec(model).normalization == "every"
    image = golden_image()
    np.testing.assert_array_equal(model(image), found.model(image))


def change_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], Any], name: str = "vgg11_bn") -> str:
    """A copy of a golden state dict with a change."""
    tensors = safetensors.load_file(GOLDEN / f"{name}.safetensors")
    change(tensors)
    safetensors.save_file(tensors, path)
    return str(path)


def test_float16_is_cast_and_bfloat16_refused(tmp_path: Path) -> None:
    def halve(tensors: dict[str, np.ndarray]) -> None:
        tensors.update({key: value.astype(np.float16) for key, value in tensors.items() if value.dtype == np.float32})

    half = import_weights(change_tensors(tmp_path / "half.safetensors", halve, "vgg16"))
    _, wanted = np.load(GOLDEN / "vgg16.npy")
    np.testing.assert_allclose(half.model(golden_image())[0], wanted, atol=5e-3)

    header = b'{"features.0.weight":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},'
    header += b'"features.0.bias":{"dtype":"BF16","shape":[1],"data_offsets":[2,4]}}'
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelError, match=r"features\.0\.weight is BF16.*\.float\(\)"):
        read_checkpoint(tmp_path / "b.safetensors")


# A head of its own


@pytest.mark.parametrize(("head", "dense"), [(None, ()), ("gap", ()), ("dense", (4096, 4096))])
def test_no_top_puts_a_new_head_on(head: str | None, dense: tuple[int, ...], tmp_path: Path) -> None:
    file = save(build_applications(), tmp_path / "m.keras")
    found = import_weights(str(file), ImportConfig(top=False, classes=3, head=head))
    assert (found.spec.dense, found.spec.classes, found.is_head_trained) == (dense, 3, False)
    assert found.spec.input == (32, 32, 3)
    assert found.card.labels == ("0", "1", "2")
    again = import_weights(str(file), ImportConfig(top=False, classes=3, head=head))
    np.testing.assert_array_equal(found.model(random_images()), again.model(random_images()))


def test_another_head_is_no_obstacle_to_no_top(tmp_path: Path) -> None:
    body = build_applications(top=False)
    outputs = keras.layers.GlobalAveragePooling2D()(body.output)
    outputs = keras.layers.BatchNormalization()(outputs)
    theirs = keras.Model(body.input, keras.layers.Dense(2, activation="softmax", name="mine")(outputs))
    for name in ("m.keras", "m.h5"):
        file = str(save(theirs, tmp_path / name))
        with pytest.raises(ModelError, match="--no-top"):
            import_weights(file)
        found = import_weights(file, ImportConfig(top=False, labels=("cat", "dog"), input=(64, 32, 3)))
        assert (found.spec.input, found.card.labels, found.has_names) == ((64, 32, 3), ("cat", "dog"), True)


@pytest.mark.parametrize("name", ["m.weights.h5", "legacy.h5"])
@pytest.mark.parametrize("layer", ["batch_normalization", "rescaling"])
def test_weights_alone_do_not_say_where_a_strange_layer_belongs(layer: str, name: str, tmp_path: Path) -> None:
    """A BatchNorm between the convolutions, or other pixels, would be left out without a word."""
    strange = keras.layers.Rescaling(2.0) if layer == "rescaling" else keras.layers.BatchNormalization()
    inputs = keras.Input((32, 32, 3))
    body = build_applications(top=False).layers[1:]
    outputs = strange(inputs)
    for each in body:
        outputs = each(outputs)
    write = write_legacy if name == "legacy.h5" else save
    file = str(write(keras.Model(inputs, outputs), tmp_path / name))
    with pytest.raises(ModelError, match=rf"there is a layer {layer}.*model\.save\(\)"):
        import_weights(file, ImportConfig(top=False, classes=2))


def test_torchvision_without_top_at_any_size() -> None:
    found = import_weights(str(GOLDEN / "vgg11_bn.safetensors"), ImportConfig(top=False, classes=2, input=(96, 64, 3)))
    assert (found.spec.input, found.spec.normalization, found.spec.head) == ((96, 64, 3), "every", "gap")


def test_without_top_the_input_is_224(tmp_path: Path) -> None:
    file = write_legacy(build_applications(top=False), tmp_path / "notop.h5")
    assert import_weights(str(file), ImportConfig(classes=2)).spec.input == (224, 224, 3)


# Sizes


def test_a_rectangle_is_said_by_the_model_or_the_user(tmp_path: Path) -> None:
    theirs = build_applications(size=(64, 96))
    named = str(save(theirs, tmp_path / "m.keras"))
    unnamed = str(save(theirs, tmp_path / "m.weights.h5"))
    assert import_weights(named).spec.input == (64, 96, 3)
    assert import_weights(unnamed, ImportConfig(input=(64, 96, 3))).spec.input == (64, 96, 3)
    with pytest.raises(UsageError, match="input 64x64 gives 40 values to layer fc1, which takes 60"):
        import_weights(unnamed)
    with pytest.raises(UsageError, match=r"input 96x64 leaves 3x2 pixels.*made for 64x96"):
        import_weights(named, ImportConfig(input=(96, 64, 3)))


def test_torchvision_with_top_keeps_its_7x7() -> None:
    checkpoint = read_checkpoint(GOLDEN / "vgg11.safetensors")
    assert match_spec(checkpoint, size=(240, 255)).input == (240, 255, 3)
    for size in ((256, 224), (32, 32 * 49)):
        with pytest.raises(UsageError, match=r"leaves .* made for 224x224"):
            match_spec(checkpoint, size=size)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.4.weight": np.zeros((3, 9, 3, 3), np.float32)},
         r"layer features\.4 .*3x3x9x3 and 3; needed for block2_conv1 of vgg11 are 3x3x2x3 and 3"),
        ({"features.0.weight": np.zeros((2, 1, 3, 3), np.float32)}, r"features\.0 .*3x3x1x2 and 2; .* are 3x3x3x2 and"),
        ({"features.0.weight": np.full((2, 3, 3, 3), np.nan, np.float32)}, r"features\.0\.weight: 54 of its 54 .* NaN"),
        ({"features.0.weight": np.zeros((2, 3, 3, 3), np.int8)}, "is I8"),
        ({"features.1.running_var": np.array([1, -1], np.float32)}, r"features\.1 .*smallest -1"),
        ({"features.1.running_var": None}, r"features\.1 has \['bias', 'running_mean', 'weight'\]"),
        ({"features.0.bias": None}, r"features\.0 has \['weight'\]; needed are \['bias', 'weight'\]"),
        ({"classifier.0.weight": np.zeros((7, 99), np.float32)}, r"\(7, 99\); needed is \(units, 245\)"),
        ({"classifier.6.weight": None, "classifier.6.bias": None}, "head has 2 dense layers"),
        ({"head.fc.weight": np.zeros((2, 2), np.float32)}, r"array 'head\.fc\.weight'.*--no-top"),
        ({"features.27.weight": np.ones(5, np.float32)}, r"features\.27 has"),
        ({"features.40.weight": np.ones((5, 5, 3, 3), np.float32), "features.40.bias": np.ones(5, np.float32)},
         r"features\.40 is not where a VGG has it; needed is a convolution at 28 or 29"),
        ({"features.29.weight": np.ones((5, 5, 3, 3), np.float32), "features.29.bias": np.ones(5, np.float32)},
         "9 convolutions"),
    ],
)  # fmt: skip
def test_a_wrong_state_dict(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    def apply(tensors: dict[str, np.ndarray]) -> None:
        for key, value in change.items():
            if value is None:
                del tensors[key]
            else:
                tensors[key] = value

    with pytest.raises(ModelError, match=message):
        import_weights(change_tensors(tmp_path / "m.safetensors", apply))


def edit(file: Path, change: Callable[[Any], None]) -> str:
    with h5py.File(file, "r+") as stored:
        change(stored)
    return str(file)


def test_wrong_keras_weights(tmp_path: Path) -> None:
    theirs = build_applications()

    def refused(change: Callable[[Any], None], message: str) -> None:
        with pytest.raises(ModelError, match=message):
            import_weights(edit(write_legacy(theirs, tmp_path / "m.h5"), change))

    def break_number(stored: Any) -> None:
        stored["block3_conv2"]["block3_conv2_0_1:0"][0, 0, 0, 0] = np.inf

    def swap(stored: Any) -> None:
        names = list(stored.attrs["layer_names"])
        first, second = names.index(b"block3_conv2"), names.index(b"block3_conv3")
        names[first], names[second] = names[second], names[first]
        stored.attrs["layer_names"] = names

    def drop_bias(stored: Any) -> None:
        stored["fc2"].attrs["weight_names"] = [b"fc2_0_1:0"]

    def shorten(stored: Any) -> None:
        del stored["fc2"]["fc2_1_1:0"]
        stored["fc2"]["fc2_1_1:0"] = np.zeros(3, np.float32)

    def forget(stored: Any) -> None:
        del stored["block2_conv1"]

    refused(break_number, "block3_conv2: 1 of its 576 weights are NaN or infinite")
    refused(swap, "layer block3_conv3 stands where vgg16 has block3_conv2")
    refused(drop_bias, r"a layer fc2 with arrays of shapes \[\(12, 12\)\]")
    refused(shorten, "layer fc2 has arrays of shapes 12x12 and 3; needed for fc2 of vgg16 are 12x12 and 12")
    refused(forget, "cannot be read as Keras weights")
    refused(lambda stored: stored.attrs.__delitem__("layer_names"), "no convolution at its top level")


def test_a_keras_model_that_computes_something_else(tmp_path: Path) -> None:
    def refused(network: Any, message: str) -> None:
        with pytest.raises(ModelError, match=message):
            import_weights(str(save(network, tmp_path / "m.keras")))

    def rebuild(name: str, **settings: Any) -> Any:
        return keras.models.clone_model(
            build_applications(),
            clone_function=lambda layer: type(layer).from_config(
                {**layer.get_config(), **(settings if layer.name == name else {})}
            ),
        )

    refused(rebuild("block2_conv2", activation="elu"), "layer block2_conv2 has activation 'elu'; needed is 'relu'")
    refused(rebuild("block2_conv2", dilation_rate=2), r"block2_conv2 has dilation_rate \[2, 2\]")
    refused(rebuild("predictions", activation="sigmoid"), "predictions has activation 'sigmoid'; needed is 'softmax'")
    body = build_applications(top=False)
    scaled = keras.Input((32, 32, 3))
    refused(
        keras.Model(scaled, body(keras.layers.Rescaling(1 / 255)(scaled))), "it has Rescaling .* Conv2D 'block1_conv1'"
    )
    nested = keras.Sequential([keras.Input((32, 32, 3)), body, keras.layers.Flatten(), keras.layers.Dense(2)])
    for name in ("m.weights.h5", "m.h5"):
        with pytest.raises(ModelError, match=r"Functional 'vgg16' where|get_layer\('vgg16'\)"):
            import_weights(str(save(nested, tmp_path / name)))


def test_our_own_model_needs_no_import(tmp_path: Path) -> None:
    found = import_weights(str(GOLDEN / "vgg11.safetensors"))
    write_model(found.model, tmp_path / "m.keras", found.card)
    with pytest.raises(ModelError, match="it has Rescaling 'rescaling'"):
        import_weights(str(tmp_path / "m.keras"))


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    def refused(name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_checkpoint(tmp_path / name)

    keras_file = save(build_applications(), tmp_path / "m.keras").read_bytes()
    hdf5 = write_legacy(build_applications(), tmp_path / "m.h5").read_bytes()
    tensors = (GOLDEN / "vgg11.safetensors").read_bytes()
    refused("cut.keras", keras_file[:-100], "no known format, or cut short")
    middle = len(keras_file) // 2
    refused("bit.keras", keras_file[:middle] + b"\xff\0\xff" + keras_file[middle + 3 :], "weights.h5 is damaged")
    refused("cut.h5", hdf5[: len(hdf5) // 2], "cannot be read as Keras weights")
    refused("cut.safetensors", tensors[:-4], "not a whole safetensors file")
    refused("text.safetensors", b"hello, world", "not a whole safetensors file")
    refused("empty.h5", b"", "0 bytes of no known format")
    refused("notes.txt", b"hello", "needed is a .keras")
    with pytest.raises(ModelError, match="no such file"):
        read_checkpoint(tmp_path / "missing.h5")
    with pytest.raises(ModelError, match="is a folder"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["vgg.pth", "vgg.bin", "vgg"])
def test_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    with pytest.raises(ModelError) as caught:
        read_checkpoint(file)
    *_, first, second = str(caught.value).splitlines()
    assert first == "import torch, safetensors.torch"
    target = str(tmp_path / "vgg.safetensors")
    assert second == f"safetensors.torch.save_file(torch.load({str(file)!r}, weights_only=True), {target!r})"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"classes": 3}, "trained head.*--no-top"),
        ({"head": "gap"}, "trained head.*--no-top"),
        ({"labels": ("a", "b")}, "2 labels for 5 classes"),
        ({"model": "vgg19"}, "--model vgg19 is for 'imagenet'"),
        ({"top": False}, "--classes N or --labels FILE"),
        ({"top": False, "classes": 2, "input": (16, 16, 3)}, "at least 32x32"),
    ],
)
def test_choices_that_do_not_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        import_weights(str(GOLDEN / "vgg11.safetensors"), ImportConfig(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head": "mlp"}, "known are dense, gap"),
        ({"model": "vgg13"}, "known are vgg16, vgg19"),
        ({"input": (64, 64, 1)}, "take RGB"),
        ({"classes": 1}, "at least 2"),
        ({"classes": 3, "labels": ("a", "b")}, "2 labels for 3 classes"),
    ],
)
def test_choices_that_no_weights_fit(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ImportConfig(**config)


def test_labels(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_bytes(b"\xef\xbb\xbfcat\r\ngro\xc3\x9fer Hund\r\n")
    assert read_labels(file) == ("cat", "großer Hund")
    for content, message in (
        (b"", "is empty"),
        (b"a\nb\na\n", "'a' stands there more"),
        (b"\xff\xfe", "cannot be read"),
    ):
        file.write_bytes(content)
        with pytest.raises(UsageError, match=message):
            read_labels(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(tmp_path / "missing.txt")


# imagenet


def offer(monkeypatch: pytest.MonkeyPatch, model: str) -> Any:
    """Let keras.applications hand out a small network with 1000 classes instead of a download."""
    network = build_applications(model, classes=1000)
    asked: list[dict[str, Any]] = []

    def build(**options: Any) -> Any:
        asked.append(options)
        sys.stdout.write("Downloading\n")  # as Keras does, on stdout
        return network

    def decode(answers: np.ndarray, top: int) -> list[list[tuple[str, str, float]]]:
        names = ["crane" if place in (134, 517) else f"thing{place}" for place in answers.argmax(axis=1)]
        return [[(f"n{place:08d}", name, 1.0)] for place, name in enumerate(names)]

    monkeypatch.setattr(keras.applications, model.upper(), build)
    monkeypatch.setattr(keras.applications.vgg16, "decode_predictions", decode)
    return network, asked


@pytest.mark.parametrize("model", [None, "vgg19"])
def test_imagenet(model: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = model or "vgg16"
    network, asked = offer(monkeypatch, name)
    found: ImportedModel = import_weights("imagenet", ImportConfig(model=model))
    assert asked == [{"weights": "imagenet", "include_top": True}]
    assert (found.spec.name, found.has_names, found.format) == (name, True, "keras.applications")
    labels = found.card.labels
    assert (labels[0], labels[134], labels[517]) == ("thing0", "crane n00000134", "crane n00000517")
    assert len(set(labels)) == 1000
    images = random_images()
    np.testing.assert_allclose(found.model(images), caffe_answers(network, images), atol=1e-5, rtol=0)
    assert capsys.readouterr().out == ""


def test_imagenet_without_top(monkeypatch: pytest.MonkeyPatch) -> None:
    _, asked = offer(monkeypatch, "vgg16")
    found = import_weights("imagenet", ImportConfig(top=False, classes=2))
    assert asked == [{"weights": "imagenet", "include_top": False}]
    assert (found.spec.classes, found.card.labels) == (2, ("0", "1"))


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> Any:
        raise Exception("URL fetch failure on https://example.org: None -- unreachable")

    monkeypatch.setattr(keras.applications, "VGG16", fail)
    with pytest.raises(ModelError, match=r"weights of vgg16 could not be fetched.*unreachable.*fetch the \.h5 file"):
        import_weights("imagenet")


def test_shapes_are_checked_before_tensorflow_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggedge.weights.import_keras", lambda: pytest.fail("loaded"))
    with pytest.raises(UsageError):
        import_weights(str(GOLDEN / "vgg11.safetensors"), ImportConfig(input=(64, 64, 3)))


def test_a_layer_that_is_missing() -> None:
    checkpoint = read_checkpoint(GOLDEN / "vgg11_bn.safetensors")
    norms = [layer for layer in checkpoint.layers if layer.kind == "batch_norm"]

    def without(left_out: LayerWeights) -> Checkpoint:
        layers = tuple(layer for layer in checkpoint.layers if layer is not left_out)
        return Checkpoint(source="it", format="f", pixels="imagenet", layers=layers, input=checkpoint.input)

    with pytest.raises(ModelError, match=re.escape("layer features.4 stands where vgg11 has block1_bn1")):
        match_spec(without(norms[0]))
