from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from vggedge.architecture import get_spec
from vggedge.data import open_images
from vggedge.data.base import ImageSet
from vggedge.model import ModelCard, build_vgg, read_model, read_ranges, write_model
from vggedge.training import TrainConfig, train
from vggedge.training import quantization_aware as qat
from vggedge.training.finetuning import FinetuneHistory, default_config, finetune, write_finetune_history
from vggedge.training.quantization_aware import fake_quantize, fake_quantized, measure_magnitudes, measure_ranges
from vggedge_export import quantization
from vggedge_export.conversion import graph_from_keras
from vggedge_export.graph import Graph, value_info
from vggedge_export.passes import apply_passes
from vggedge_export.quantization import INT8, input_scales, int8_steps, quantized_graph, quantized_layers
from vggedge_runtime.backends.ort import open_ort_session
from vggedge_runtime.errors import DataError, ModelError, UsageError
from vggedge_runtime.preprocess import ImageSpec, Normalization, scale_image

keras: Any = pytest.importorskip("keras")
tf: Any = pytest.importorskip("tensorflow")
pytest.importorskip("tf2onnx")
layers = keras.layers

SIDE = 32
PIXELS = np.random.default_rng(11).integers(0, 256, (64, SIDE, SIDE, 3), dtype=np.uint8)


def convert(model: Any, normalization: Normalization | None = None) -> Graph:
    graph = graph_from_keras(model, normalization)
    apply_passes(graph)
    return graph


def exported_int8(model: Any, ranges: Mapping[str, float]) -> Graph:
    """The INT8 graph that export makes of ``model`` with these ranges: the one place here that knows its signature."""
    graph = convert(model)
    return quantized_graph(graph, INT8, input_scales(graph, INT8, ranges))


def run_graph(graph: Graph, images: Any) -> Any:
    session = open_ort_session(graph.to_bytes(), threads=1)
    return np.concatenate([session.run(None, {"images": images[i : i + 100]})[0] for i in range(0, len(images), 100)])


def ask(model: Any, images: Any) -> Any:
    parts = [images[i : i + 100].astype(np.float32) for i in range(0, len(images), 100)]
    return np.concatenate([np.asarray(model(part, training=False)) for part in parts])


def image_set(images: Any = PIXELS, labels: tuple[str, ...] = ("a", "b", "c"), targets: Any = None) -> ImageSet:
    targets = np.arange(len(images)) % len(labels) if targets is None else targets
    return ImageSet(
        "noise", labels, targets, lambda i: images[i], lambda i, side: scale_image(Image.fromarray(images[i]), side)
    )


def randomise(model: Any) -> Any:
    """No bias, statistic or factor is left at a value that hides a mistake; some factors are below 0."""
    rng = np.random.default_rng(5)
    for variable in model.variables:
        role = variable.path.rpartition("/")[2]
        if role in {"bias", "beta", "moving_mean"}:
            variable.assign(rng.normal(0, 0.3, variable.shape))
        elif role == "moving_variance":
            variable.assign(rng.uniform(0.5, 2, variable.shape))
        elif role == "gamma":
            variable.assign(rng.uniform(0.5, 2, variable.shape) * rng.choice([-1, 1, 1], variable.shape))
    return model


def vgg(name: str = "vgg9-compact", normalization: str | None = None, head: str | None = None) -> Any:
    spec = get_spec(name, input=(SIDE, SIDE, 3), classes=3, normalization=normalization, head=head)
    return randomise(build_vgg(spec, seed=2))


def make_hard(model: Any, pairs: list[tuple[str, str]], factor: float = 100, channels: int = 2) -> None:
    """Some channels of a layer times ``factor``, the next layer's weights for them divided: in float32 all the same.

    In INT8 these channels take all the steps of the range that the layer's channels share.
    """
    for first, second in pairs:
        one, two = model.get_layer(first), model.get_layer(second)
        (kernel, bias), (after, offset) = one.get_weights(), two.get_weights()
        chosen = np.random.default_rng(0).permutation(kernel.shape[-1])[:channels]
        kernel[..., chosen] *= factor
        bias[chosen] *= factor
        after[..., chosen, :] /= factor
        one.set_weights([kernel, bias])
        two.set_weights([after, offset])


# --- the grid


def test_the_facts_of_the_grid_are_exports() -> None:
    assert qat.STEPS == quantization._STEPS
    assert quantization._SMALLEST_SCALE[np.dtype(np.float32)] == qat.SMALLEST_SCALE
    assert np.float32(qat.EXACT_RANGE / qat.STEPS) == 1 / 128


@pytest.mark.parametrize("least", [-128, -127])
def test_values_are_rounded_half_to_even_and_clipped(least: int) -> None:
    values = np.float32([-1000, -64.25, -64, -63.5, -1.25, -0.75, -0.25, 0, 0.25, 0.75, 1.25, 63.5, 63.75, 64])
    found = np.asarray(fake_quantize(tf.constant(values), np.float32(0.5), least))
    np.testing.assert_array_equal(found, np.clip(np.round(values / 0.5), least, 127) * np.float32(0.5))
    assert found.tolist()[3:10] == [-63.5, -1, -1, 0, 0, 0, 1]  # 2.5 and 1.5 steps become 2, half a step becomes none


def test_the_gradient_passes_the_rounding_and_stops_where_a_value_is_clipped() -> None:
    values = tf.constant([-65.0, -64.25, -64.0, 0.3, 63.7, 63.75, 64.0])
    with tf.GradientTape() as tape:
        tape.watch(values)
        total = tf.reduce_sum(fake_quantize(values, np.float32(0.5), -128) * tf.range(1.0, 8.0))
    # -128.5 steps and 127.4 steps round to a step that is there: half to even, and down.
    assert np.asarray(tape.gradient(total, values)).tolist() == [0, 2, 3, 4, 5, 0, 0]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: layers.Conv2D(6, 3), (8, 8, 3)),
        (lambda: layers.Conv2D(6, 3, groups=3), (8, 8, 3)),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (8, 8, 3)),
        (lambda: layers.Dense(6), (5,)),
    ],
    ids=["conv", "grouped", "depthwise", "dense"],
)
def test_kernels_are_rounded_to_the_steps_that_export_stores(layer: Any, shape: tuple[int, ...]) -> None:
    model = keras.Sequential([keras.Input(shape), layer()])
    own = model.layers[0]
    spread = np.geomspace(0.01, 5, 6).reshape(shape[-1] if "depthwise" in own.name else 1, -1)
    own.kernel.assign(np.asarray(own.kernel) * spread)
    own.kernel.assign(np.where(np.arange(6).reshape(spread.shape) == 1, 0, np.asarray(own.kernel)))  # a channel of 0
    plain = np.asarray(own.kernel)
    with fake_quantized(model, {own.name: 1.0}):
        found = np.asarray(own.kernel)
    outputs_first = plain.reshape(-1, 6).T if "depthwise" not in own.name else plain.reshape(9, 6).T
    steps, scale = int8_steps(np.ascontiguousarray(outputs_first), per_channel=True)
    np.testing.assert_array_equal(found.reshape(plain.shape).reshape(-1, 6).T, steps * scale[:, None])
    assert np.abs(found - plain).max() > 1e-3
    np.testing.assert_array_equal(np.asarray(own.kernel), plain)


# --- which layers


def exported_layers(model: Any, normalization: Normalization | None = None) -> list[str]:
    return [node.name for node in quantized_layers(convert(model, normalization), INT8)]


@pytest.mark.parametrize(
    ("name", "normalization", "head"),
    [
        ("vgg9-compact", "none", None),
        ("vgg11-compact", "first", "gap"),
        ("vgg11-lrn-compact", None, None),
        ("vgg16-1x1-compact", "every", None),
        ("vgg16-compact", None, None),
        ("vgg13-compact", "two-stages", None),
    ],
)
def test_layers_and_ranges_are_those_of_export_on_the_family(name: str, normalization: Any, head: Any) -> None:
    model = vgg(name, normalization, head)
    ranges = measure_magnitudes(model, image_set())
    graph = convert(model)
    wanted = quantized_layers(graph, INT8)
    assert list(ranges) == [node.name for node in wanted]
    assert "predictions" not in ranges
    probe = graph.copy()
    probe.outputs = [value_info(node.input[0], np.float32, ["N", *("chw"[: 3 if node.op_type == "Conv" else 1])])
                     for node in wanted]  # fmt: skip
    probe.drop_unused()
    tensors = open_ort_session(probe.to_bytes(), threads=1).run(None, {"images": PIXELS})
    largest = {node.name: float(np.abs(found).max()) for node, found in zip(wanted, tensors, strict=True)}
    assert largest.pop("block1_conv1") == 1
    assert ranges["block1_conv1"] == 127 / 128
    assert largest == pytest.approx({key: ranges[key] for key in largest}, rel=1e-4)
    assert input_scales(graph, INT8, ranges)["block1_conv1"] == 1 / 128


def nested() -> Any:
    block = keras.Sequential([layers.Conv2D(4, 3, name="inner"), layers.BatchNormalization(), layers.ReLU()])
    branch = keras.Input((30, 30, 4))
    second = keras.Model(branch, layers.LeakyReLU()(layers.Conv2D(4, 3, strides=2, name="second")(branch)))
    inputs = keras.Input((SIDE, SIDE, 3))
    x = block(layers.Rescaling(1 / 128, offset=-1)(inputs))
    x = layers.GlobalAveragePooling2D()(second(x))
    return keras.Model(inputs, layers.Softmax()(layers.Dense(3, name="logits")(x)))


def mobile() -> Any:
    return keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3)),
            layers.Rescaling(1 / 127.5, offset=-1),
            layers.ZeroPadding2D(1),
            layers.Conv2D(4, 3, strides=2, activation="relu", name="stem"),
            layers.DepthwiseConv2D(3, padding="same", activation="relu", name="depthwise"),
            layers.Conv2D(8, 1, groups=2, name="grouped"),
            layers.Conv2DTranspose(4, 2, strides=2, activation="relu", name="up"),
            layers.Flatten(),
            layers.Dense(3, activation="softmax", name="logits"),
        ]
    )


def branches() -> Any:
    inputs = keras.Input((SIDE, SIDE, 3))
    x = layers.Conv2D(4, 3, strides=4, name="stem")(inputs * (1 / 128) - 1)
    tokens = layers.Dense(5, name="on_tokens")(layers.Reshape((64, 4))(x))
    left = layers.Dense(3, name="left")(layers.Flatten()(tokens))
    right = layers.Dense(3, name="right")(layers.Dropout(0.5)(layers.Flatten()(x)))
    return keras.Model(inputs, layers.Softmax()(layers.Add()([left, right])))


@pytest.mark.parametrize(
    ("build", "wanted"),
    [(nested, ["inner", "second"]), (mobile, ["stem", "depthwise", "grouped"]), (branches, ["stem", "on_tokens"])],
)
def test_layers_of_other_models_are_those_of_export(build: Callable[[], Any], wanted: list[str]) -> None:
    model = build()
    assert list(measure_ranges(model, image_set())) == wanted == exported_layers(model)


def test_padding_hides_no_exact_head_and_other_heads_are_measured() -> None:
    def build(scale: float) -> Any:
        head = [keras.Input((SIDE, SIDE, 3)), layers.Rescaling(scale, offset=-1), layers.ZeroPadding2D(1)]
        return keras.Sequential(
            [*head, layers.Conv2D(2, 3, name="c"), layers.Flatten(), layers.Dense(3, activation="softmax")]
        )

    for scale, wanted in ((1 / 128, 127 / 128), (1 / 100, 1.55)):
        ranges = measure_magnitudes(build(scale), image_set())
        assert ranges["c"] == pytest.approx(wanted, rel=1e-6)
        graph = convert(build(scale))
        assert input_scales(graph, INT8, ranges)["c"] == pytest.approx(wanted / 127, rel=1e-6)


def test_a_layer_that_is_used_twice_has_the_range_of_its_larger_input() -> None:
    inputs = keras.Input((SIDE, SIDE, 3))
    twice = layers.Conv2D(3, 1, name="twice")
    x = twice(layers.ReLU()(twice(layers.Rescaling(1 / 255)(inputs))))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(x)))
    twice.set_weights([np.full((1, 1, 3, 3), 2, np.float32), np.zeros(3, np.float32)])
    white = np.full((2, SIDE, SIDE, 3), 255, np.uint8)
    assert measure_magnitudes(model, image_set(white)) == {"twice": pytest.approx(6)}


def scale_weights(name: str, factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.get_layer(name).set_weights([weight * factor for weight in model.get_layer(name).get_weights()])

    return change


def activate(name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.layers[-1].activation = keras.activations.get(name)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scale_weights("block2_conv1", 1e38), "'block3_conv1' is not finite on 64 calibration images"),
        (scale_weights("block2_conv1", 0), "'block3_conv1' is always 0 on 64 calibration images"),
        (activate("linear"), "are no probabilities"),
        (activate("sigmoid"), "needed is a softmax"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = vgg(normalization="none")
    change(model)
    with pytest.raises(ModelError, match=message):
        measure_ranges(model, image_set())


def test_nothing_to_quantise_and_two_of_one_name_are_refused() -> None:
    inputs = keras.Input((SIDE, SIDE, 3))
    model = keras.Model(inputs, layers.Dense(3, activation="softmax")(layers.Flatten()(inputs)))
    with pytest.raises(ModelError, match="this model has none; there is nothing to tune"):
        measure_ranges(model, image_set())
    first = keras.Sequential([keras.Input((SIDE, SIDE, 3)), layers.Conv2D(3, 3, name="same")])
    second = keras.Sequential([keras.Input((30, 30, 3)), layers.Conv2D(3, 3, name="same")])
    x = layers.Flatten()(second(first(inputs)))
    with pytest.raises(ModelError, match="two of its layers are called 'same'"):
        measure_ranges(keras.Model(inputs, layers.Dense(3, activation="softmax")(x)), image_set())


def test_the_range_is_that_with_the_least_error_of_the_layers_output() -> None:
    """One channel 300 times as large as the others takes no more of the steps than it is worth to the layer."""
    plain, hard = vgg(normalization="none"), vgg(normalization="none")
    make_hard(hard, [("block3_conv1", "block4_conv1")], factor=300, channels=1)
    magnitudes, ranges = measure_magnitudes(hard, image_set()), measure_ranges(hard, image_set())
    assert magnitudes["block4_conv1"] > 20 * measure_magnitudes(plain, image_set())["block4_conv1"]
    assert ranges["block4_conv1"] < magnitudes["block4_conv1"] / 4
    assert ranges["block1_conv1"] == qat.EXACT_RANGE
    assert list(ranges) == list(magnitudes)
    assert all(ranges[name] <= magnitudes[name] for name in ranges)
    layer = hard.get_layer("block4_conv1")
    inputs = tf.constant(ask(keras.Model(hard.inputs[0], hard.get_layer("block3_pool").output), PIXELS))
    exact = np.asarray(layer(inputs))

    def error(part: float) -> float:
        scale = np.float32(magnitudes["block4_conv1"] * part / 127)
        return float(((np.asarray(layer(fake_quantize(inputs, scale, -128))) - exact) ** 2).sum())

    parts = [2 ** (-half_octaves / 2) for half_octaves in range(11)]
    assert ranges["block4_conv1"] == pytest.approx(magnitudes["block4_conv1"] * min(parts, key=error))


# --- what it computes


def sharpen(model: Any) -> Any:
    """Logits of an untrained model spread out: else all answers are near a third, or one class has them all."""
    features = keras.Model(model.inputs[0], model.layers[-2].output)
    found = ask(features, PIXELS)
    kernel, _ = model.layers[-1].get_weights()
    logits = found @ kernel
    model.layers[-1].set_weights([kernel * (2 / logits.std(axis=0)), -logits.mean(axis=0) * (2 / logits.std(axis=0))])
    return model


@pytest.mark.parametrize("normalization", ["none", "first-of-two-stages", "every", "lrn"])
def test_a_fake_quantised_model_answers_as_the_exported_graph(normalization: str) -> None:
    model = sharpen(vgg(normalization=normalization))
    ranges = measure_ranges(model, image_set())
    ranges["block3_conv1"] *= 0.5  # so that something is clipped
    exact = ask(model, PIXELS)
    with fake_quantized(model, ranges):
        found = ask(model, PIXELS)
    wanted = run_graph(exported_int8(model, ranges), PIXELS)
    off = np.abs(found - wanted).max(axis=1)
    # Sums in another order put a value on the border of two steps to the other side now and then.
    assert np.median(off) < 2e-3
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.95
    assert np.abs(found - wanted).mean() < np.abs(found - exact).mean() / 10
    np.testing.assert_array_equal(ask(model, PIXELS), exact)


def test_rounding_the_kernel_before_batch_norm_is_folded_rounds_the_folded_one() -> None:
    """Scales of output channels commute with the fold, factors below 0 included; only float32 rounding is left."""
    model = vgg(normalization="every")
    ranges = measure_ranges(model, image_set())
    graph = exported_int8(model, ranges)
    convolutions = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    assert len(convolutions) == 6
    for layer in convolutions:
        norm = model.get_layer(layer.name.replace("conv", "bn"))
        factor = np.asarray(norm.gamma) / np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
        assert (factor < 0).any()
        with fake_quantized(model, ranges):
            unfolded = np.asarray(layer.kernel)
        node = next(node for node in graph.nodes if node.name == layer.name)
        restored = next(each for each in graph.nodes if node.input[1] in each.output)
        steps, scale = (graph.weights[name] for name in restored.input[:2])
        # Each weight in steps: whole numbers on both sides, and the same ones.
        found = unfolded.transpose(3, 2, 0, 1) * (factor / scale)[:, None, None, None]
        assert (np.abs(found - steps) > 1e-3).mean() < 1e-3
        assert np.abs(steps).max(axis=(1, 2, 3)).tolist() == [127] * len(steps)


def test_the_layers_are_what_they_were_even_after_an_error() -> None:
    model = vgg()
    before = ask(model, PIXELS)
    classes = [type(layer) for layer in model.layers]
    ranges = measure_ranges(model, image_set())
    within: list[Any] = []

    def stop() -> None:
        with fake_quantized(model, ranges):
            within.extend(type(layer) for layer in model.layers)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert [was is now for was, now in zip(classes, within, strict=True)].count(False) == len(ranges)
    assert [type(layer) for layer in model.layers] == classes
    np.testing.assert_array_equal(ask(model, PIXELS), before)


# --- tuning


def warm_and_cold(count: int = 96) -> ImageSet:
    targets = np.arange(count, dtype=np.int64) % 2
    images = np.random.default_rng(0).integers(0, 128, (count, SIDE, SIDE, 3), dtype=np.uint8)
    images[targets == 0, ..., 0] += 90
    images[targets == 1, ..., 2] += 90
    return image_set(images, ("warm", "cold"), targets)


CONFIG = default_config(batch_size=8, validation_share=0.25, seed=5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained two-class model with both kinds of BatchNorm."""
    spec = get_spec("vgg9-compact", input=(SIDE, SIDE, 3), classes=2, normalization="two-stages", dropout=0.2)
    found = train(spec, warm_and_cold(), TrainConfig(epochs=2, batch_size=8, validation_share=0.25, seed=5))
    path = tmp_path_factory.mktemp("base") / "base.keras"
    write_model(found.model, path, ModelCard(labels=("warm", "cold"), image=ImageSpec(height=SIDE, width=SIDE)))
    return path


def test_tuning_changes_weights_and_nothing_else(base: Path, tmp_path: Path) -> None:
    model, card = read_model(base)
    make_hard(model, [("block3_conv1", "block4_conv1"), ("fc1", "fc2")], factor=1000)
    model.get_layer("fc1").trainable = False
    before = {layer.name: layer.get_weights() for layer in model.layers}
    told: dict[str, None] = {}
    history = finetune(
        model,
        warm_and_cold(),
        CONFIG,
        base="base.keras",
        calibration_images=20,
        advance=lambda done, total, what: told.update({what: None}),
    )
    reading = ["reading training images", "reading validation images"]
    assert list(told) == ["calibrating", "choosing ranges", *reading, "evaluating", "training"]
    assert (history.training_images, history.validation_images, history.calibration_images) == (72, 24, 20)
    assert history.after.loss < history.before.loss
    assert history.float32.loss < history.before.loss
    assert [each.epoch for each in history.epochs] == [1, 2, 3]
    changed = {
        layer.name
        for layer in model.layers
        for old, new in zip(before[layer.name], layer.get_weights(), strict=True)
        if not np.array_equal(old, new)
    }
    convolutions = {layer.name for layer in model.layers if isinstance(layer, layers.Conv2D)}
    assert changed == {*convolutions, "fc2", "predictions"}  # no BatchNorm, and not what was frozen
    assert {layer.name for layer in model.layers if not layer.trainable} == {"fc1"}

    assert card is not None
    path = tmp_path / "tuned.keras"
    write_model(model, path, card, ranges=history.ranges)
    assert write_finetune_history(history, path) == tmp_path / "tuned.history.json"
    again, _ = read_model(path)
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in model.layers]
    assert read_ranges(path) == history.ranges
    stored = msgspec.json.decode((tmp_path / "tuned.history.json").read_bytes(), type=FinetuneHistory)
    assert stored == history
    # The figures are those of the grid that export is going to use.
    _, held = warm_and_cold().split(CONFIG.validation_share, CONFIG.seed)
    answers = run_graph(exported_int8(again, history.ranges), held.read())
    loss = -np.log(answers[np.arange(len(held)), held.targets]).mean()
    assert loss == pytest.approx(history.after.loss, rel=0.02)


def test_where_no_epoch_helps_the_base_keeps_its_weights(base: Path) -> None:
    model, _ = read_model(base)
    before = model.get_weights()
    config = msgspec.structs.replace(CONFIG, epochs=1, learning_rate=0.3)
    history = finetune(model, warm_and_cold(), config, base="base.keras")
    assert history.best_epoch == 0
    assert history.after == history.before
    assert history.epochs[0].val_loss > history.before.loss
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_seed_makes_the_weights(base: Path) -> None:
    first, second = read_model(base)[0], read_model(base)[0]
    config = msgspec.structs.replace(CONFIG, epochs=1, learning_rate=1e-4)
    histories = [finetune(model, warm_and_cold(48), config, base="b") for model in (first, second)]
    assert histories[0].ranges == histories[1].ranges
    for mine, other in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_pixels_are_normalised_where_the_model_does_not_do_it(base: Path) -> None:
    """The same network without its Rescaling, and with the image spec in its place, is judged the same."""
    model, _ = read_model(base)
    body = keras.Sequential([keras.Input((SIDE, SIDE, 3)), *model.layers[2:]])
    config = msgspec.structs.replace(CONFIG, epochs=1)
    outside = Normalization(mean=(128, 128, 128), std=(128, 128, 128), order="bgr")
    swapped = image_set(warm_and_cold().read()[..., ::-1], ("warm", "cold"), warm_and_cold().targets)
    history = finetune(body, swapped, config, base="b", normalization=outside)
    assert history.ranges["block1_conv1"] != qat.EXACT_RANGE  # measured, as export does for what it normalises itself
    wanted = finetune(read_model(base)[0], warm_and_cold(), config, base="b")
    assert history.float32.loss == pytest.approx(wanted.float32.loss, rel=1e-4)
    assert history.epochs[0].loss == pytest.approx(wanted.epochs[0].loss, rel=0.2)


def test_wrong_data_is_refused_before_anything_is_read(base: Path) -> None:
    model, _ = read_model(base)
    data = warm_and_cold(8)
    with pytest.raises(DataError, match=r"images of \(16, 16, 3\), and the model takes \(32, 32, 3\)"):
        finetune(model, image_set(np.zeros((4, 16, 16, 3), np.uint8), ("a", "b")), CONFIG, base="b")
    with pytest.raises(DataError, match="3 classes, and the model has 2 outputs"):
        finetune(model, image_set(), CONFIG, base="b")
    with pytest.raises(DataError, match="no images"):
        finetune(model, data.subset(np.array([], np.int64)), CONFIG, base="b")
    with pytest.raises(UsageError, match="calibration images are 0"):
        finetune(model, data, CONFIG, base="b", calibration_images=0)


def test_a_stopped_tuning_leaves_a_model_of_plain_layers(base: Path) -> None:
    model, _ = read_model(base)
    classes = [type(layer) for layer in model.layers]

    def advance(done: int, total: int, what: str) -> None:
        if what == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, warm_and_cold(), CONFIG, base="b", advance=advance)
    assert [type(layer) for layer in model.layers] == classes
    assert all(layer.trainable for layer in model.layers)


def test_what_is_not_given_is_the_default() -> None:
    wanted = TrainConfig(epochs=3, learning_rate=5e-4, patience=0, seed=3)
    assert default_config(epochs=None, seed=3) == wanted
    assert default_config(epochs=5).epochs == 5


# --- the proof


@pytest.mark.slow
def test_a_model_that_int8_ruins_is_mended_and_its_graph_is_what_was_trained() -> None:
    image = ImageSpec(height=64, width=64)
    data, unseen = open_images("fingers:5000@0", image), open_images("fingers:1000@1", image)
    model = train(get_spec("vgg16-compact"), data, TrainConfig(epochs=6)).model
    pairs = [(f"block{stage}_conv1", f"block{stage}_conv2") for stage in (3, 4, 5)]
    make_hard(model, [*pairs, ("fc1", "fc2")])
    images = unseen.read()

    def accuracy(answers: Any) -> float:
        return float((answers.argmax(axis=1) == unseen.targets).mean())

    calibrated = measure_magnitudes(model, data.take(200, 0))
    before = {
        "fp32": accuracy(run_graph(convert(model), images)),
        "int8": accuracy(run_graph(exported_int8(model, calibrated), images)),
    }
    assert before["fp32"] > 0.9
    assert before["int8"] < before["fp32"] - 0.1

    history = finetune(model, data, default_config(), base="hard")
    answers = run_graph(exported_int8(model, history.ranges), images)
    assert accuracy(answers) > before["fp32"] - 0.02
    with fake_quantized(model, history.ranges):
        trained = ask(model, images)
    assert (trained.argmax(1) == answers.argmax(1)).mean() >= 0.995
    assert np.abs(trained - answers).mean() < 1e-3
    assert np.quantile(np.abs(trained - answers).max(axis=1), 0.99) < 0.02
