"""Real Keras models through tf2onnx and all passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vggedge.architecture import NORMALIZATIONS, SPECS
from vggedge_export.conversion import check_exportable, graph_from_keras, normalizing_layer
from vggedge_export.graph import Graph, value_info
from vggedge_export.passes import apply_passes
from vggedge_runtime.errors import ConversionError, ModelError
from vggedge_runtime.preprocess import Normalization

keras: Any = pytest.importorskip("keras")
pytest.importorskip("tf2onnx")
pytest.importorskip("onnxruntime")

layers = keras.layers
IMAGENET = Normalization(mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
COMPACT = [name for name in SPECS if name.endswith("-compact")]
VARIANTS = [(name, None) for name in COMPACT] + [("vgg16-compact", normalization) for normalization in NORMALIZATIONS]
every_variant = pytest.mark.parametrize(("name", "normalization"), VARIANTS, ids=str)

# What ONNX Runtime and TensorRT would have to compute on every inference, and what a VGG does not need.
UNWANTED = {"Shape", "Gather", "Slice", "Reshape", "Concat", "MatMul", "Squeeze", "Unsqueeze", "Identity", "Pad"}


@pytest.fixture(scope="session")
def clean(randomise: Callable[..., None]) -> Callable[..., Graph]:
    """``clean(model, normalization)``: randomised, converted, and through all passes."""

    def run(model: Any, normalization: Normalization | None = None) -> Graph:
        randomise(model)
        graph = graph_from_keras(model, normalization)
        apply_passes(graph)
        return graph

    return run


def small(*body: Any, head: tuple = (), size: tuple = (12, 10, 3)) -> Any:
    """Input -> head -> body -> Flatten -> Dense(3, softmax); the pixels 0 to 255 do not saturate the softmax."""
    inputs = keras.Input(size, name="photo")
    outputs = inputs
    for layer in (*head, *body, layers.Flatten(name="flatten")):
        outputs = layer(outputs)
    near_zero = keras.initializers.RandomNormal(stddev=1e-3, seed=1)
    return keras.Model(inputs, layers.Dense(3, "softmax", kernel_initializer=near_zero, name="top")(outputs))


def conv(name: str = "conv1", filters: int = 4, **options: Any) -> Any:
    return layers.Conv2D(filters, 3, kernel_initializer=keras.initializers.HeNormal(seed=2), name=name, **options)


def images_for(model: Any, n: int = 5) -> np.ndarray:
    size = model.inputs[0].shape[1:]
    return np.random.default_rng(5).integers(0, 256, (n, *size), dtype=np.uint8)


@every_variant
def test_the_graph_answers_what_keras_answers(
    name: str,
    normalization: str | None,
    convert_vgg: Callable[..., Any],
    pictures: np.ndarray,
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    found = convert_vgg(name, normalization)
    wanted = np.asarray(found.model(pictures.astype(np.float32), training=False))
    assert 0.02 < wanted.std() < 0.4  # neither uniform nor saturated, or the next lines say little
    (answers,) = run_graph(found.clean, images=pictures)
    np.testing.assert_allclose(answers, wanted, rtol=0, atol=1e-5)
    logits = found.clean.copy()
    logits.outputs = [value_info("predictions", np.float32, ["N", 5])]
    logits.drop_unused()
    (raw,) = run_graph(logits, images=pictures)
    assert np.abs(raw - found.logits).max() < 1e-4 * np.abs(found.logits).max()


@pytest.mark.parametrize("normalization", ["first-of-two-stages", "every", "lrn"])
def test_the_answer_to_an_image_does_not_depend_on_its_batch(
    normalization: str,
    convert_vgg: Callable[..., Any],
    pictures: np.ndarray,
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    graph = convert_vgg("vgg16-compact", normalization).clean
    (eight,) = run_graph(graph, images=pictures)
    assert eight.shape == (8, 5)
    for n in (1, 3):
        (few,) = run_graph(graph, images=pictures[:n])
        np.testing.assert_allclose(few, eight[:n], rtol=0, atol=1e-6)


@every_variant
def test_one_transpose_is_left_behind_the_cast_and_no_shape_arithmetic(
    name: str, normalization: str | None, convert_vgg: Callable[..., Any]
) -> None:
    graph = convert_vgg(name, normalization).clean
    ops = [node.op_type for node in graph.nodes]
    assert ops[:4] == ["Cast", "Transpose", "Mul", "Add"]
    assert ops.count("Transpose") == 1
    assert ops.count("Cast") == 1
    assert not UNWANTED.intersection(ops)
    assert ops[-1] == "Softmax"
    assert graph.opset == 20


@every_variant
def test_nodes_and_weights_carry_keras_layer_names(
    name: str, normalization: str | None, convert_vgg: Callable[..., Any]
) -> None:
    found = convert_vgg(name, normalization)
    kinds = {layer.name: type(layer).__name__ for layer in found.model.layers}
    is_folded = normalization == "every"
    expected: list[tuple[str, str]] = []
    for layer, kind in kinds.items():
        following = {"Conv2D": "Conv", "Dense": "Gemm", "MaxPooling2D": "MaxPool", "Flatten": "Flatten"}
        following |= {"LocalResponseNorm": "LRN"} | ({} if is_folded else {"BatchNormalization": "BatchNormalization"})
        if kind in following:
            expected.append((layer, following[kind]))
    named = [(node.name, node.op_type) for node in found.clean.nodes]
    assert [pair for pair in named if "/" not in pair[0]] == expected
    relus = [node for node in found.clean.nodes if node.op_type == "Relu"]
    convs = [node for node in found.clean.nodes if node.op_type in {"Conv", "Gemm"}][:-1]
    assert [relu.name for relu in relus] == [f"{layer.name}/relu" for layer in convs]
    for layer in (*convs, found.clean.nodes[-2]):
        assert list(layer.input)[1:] == [f"{layer.name}/kernel", f"{layer.name}/bias"]
        assert layer.output[0] == layer.name


BEFORE = {
    "Transpose": 18, "Relu": 15, "Reshape": 14, "Squeeze": 13, "Conv": 13, "Add": 8, "Mul": 7, "MaxPool": 5,
    "MatMul": 3, "Sqrt": 2, "Reciprocal": 2, "Sub": 2, "Cast": 1, "Softmax": 1,
}  # fmt: skip
AFTER = {
    "Relu": 15, "Conv": 13, "MaxPool": 5, "Gemm": 3, "BatchNormalization": 2, "Cast": 1, "Transpose": 1, "Mul": 1,
    "Add": 1, "Flatten": 1, "Softmax": 1,
}  # fmt: skip


def test_the_op_counts_of_the_compact_vgg16_before_and_after_the_passes(convert_vgg: Callable[..., Any]) -> None:
    found = convert_vgg("vgg16-compact")
    assert found.raw.op_counts() == BEFORE
    assert found.clean.op_counts() == AFTER


def test_batchnorm_before_the_relu_disappears_and_after_it_stays(convert_vgg: Callable[..., Any]) -> None:
    counts = {n: convert_vgg("vgg16-compact", n).clean.op_counts() for n in NORMALIZATIONS}
    norms = {name: count.get("BatchNormalization", 0) for name, count in counts.items()}
    assert norms == {"none": 0, "first": 1, "first-of-two-stages": 2, "two-stages": 4, "every": 0, "lrn": 0}
    assert counts["lrn"]["LRN"] == 1


def test_input_and_output_are_the_contract(convert_vgg: Callable[..., Any]) -> None:
    found = convert_vgg("vgg16-compact")
    for graph in (found.raw, found.clean):
        assert graph.inputs == [value_info("images", np.uint8, ["N", 32, 32, 3])]
        assert graph.outputs == [value_info("probabilities", np.float32, ["N", 5])]
    assert {array.dtype for array in found.clean.weights.values()} == {np.dtype(np.float32)}


def test_weights_are_the_models_own_in_onnx_order(convert_vgg: Callable[..., Any]) -> None:
    found = convert_vgg("vgg16-compact")
    kernel, bias = found.model.get_layer("block3_conv2").get_weights()
    np.testing.assert_array_equal(found.clean.weights["block3_conv2/kernel"], kernel.transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(found.clean.weights["block3_conv2/bias"], bias)
    np.testing.assert_array_equal(found.clean.weights["fc2/kernel"], found.model.get_layer("fc2").get_weights()[0].T)


# --- normalisation


def test_the_image_specs_normalisation_in_the_head_is_numpys(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(conv(activation="relu", padding="same"), layers.MaxPooling2D(name="pool1"))
    graph = clean(model, IMAGENET)
    images = images_for(model)
    pixels = (images.astype(np.float32) - np.float32(IMAGENET.mean)) / np.float32(IMAGENET.std)
    wanted = np.asarray(model(pixels, training=False))
    assert np.abs(wanted - np.asarray(model(images.astype(np.float32), training=False))).max() > 1e-2
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-6)
    assert [node.name for node in graph.nodes][:4] == ["head/cast", "head/transpose", "head/offset", "head/scale"]
    assert "BatchNormalization" not in graph.op_counts()


HEADS = {
    "Rescaling(1/128, -1)": lambda: layers.Rescaling(1 / 128, offset=-1),
    "Rescaling(1/255)": lambda: layers.Rescaling(1 / 255),
    "Rescaling a channel": lambda: layers.Rescaling([0.01, 0.02, 0.03], offset=[-1.0, -2.0, -3.0]),
    "Normalization": lambda: layers.Normalization(mean=IMAGENET.mean, variance=[s * s for s in IMAGENET.std]),
    "BatchNormalization": lambda: layers.BatchNormalization(name="bn0"),
    "nothing": None,
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_a_model_may_have_keeps_its_numbers(
    head: Any, clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(conv(activation="relu"), head=() if head is None else (head(),))
    graph = clean(model)
    images = images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    assert [node.op_type for node in graph.nodes][:2] == ["Cast", "Transpose"]


def test_a_normalization_layer_that_was_adapted_keeps_its_numbers(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    head = layers.Normalization()
    rng = np.random.default_rng(1)
    head.adapt(rng.integers(0, 200, (4, 12, 10, 3)).astype(np.float32))
    model = small(conv(activation="relu"), head=(head,))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["Rescaling(1/255)", "Normalization"])
def test_normalising_twice_is_refused(head: str) -> None:
    model = small(conv(), head=(HEADS[head](),))
    name = model.layers[1].name
    with pytest.raises(ModelError, match=f"its layer '{name}' normalises the image, and so would the image spec"):
        graph_from_keras(model, IMAGENET)
    check_exportable(model, None)


def rescaling() -> Any:
    return layers.Rescaling(1 / 255, name="scaled")


def augmented() -> tuple[Any, ...]:
    return layers.RandomFlip(), layers.RandomRotation(0.1), layers.RandomZoom(0.1), rescaling()


NORMALISING: dict[str, tuple[Callable[[], Any], str | None]] = {
    "first": (lambda: small(conv(), head=(rescaling(),)), "scaled"),
    "after augmentation": (lambda: small(conv(), head=augmented()), "scaled"),
    "in a nested model": (lambda: small(conv(), head=(keras.Sequential([rescaling()]),)), "scaled"),
    "two models deep": (
        lambda: small(conv(), head=(keras.Sequential([keras.Sequential(augmented())]),)),
        "scaled",
    ),
    "in a pipeline": (lambda: small(conv(), head=(layers.Pipeline([rescaling()]),)), "scaled"),
    "sequential": (
        lambda: keras.Sequential([keras.Input((8, 8, 3)), *augmented(), layers.Flatten(), layers.Dense(3)]),
        "scaled",
    ),
    "before a separable convolution": (lambda: small(layers.SeparableConv2D(4, 3), head=(rescaling(),)), "scaled"),
    "behind a convolution": (lambda: small(conv(), rescaling()), None),
    "behind a depthwise convolution": (lambda: small(layers.DepthwiseConv2D(3), rescaling()), None),
    "behind a nested convolution": (lambda: small(keras.Sequential([conv()]), rescaling()), None),
    "nowhere": (lambda: small(conv()), None),
}


@pytest.mark.parametrize(("make", "name"), NORMALISING.values(), ids=NORMALISING)
def test_the_normalising_layer_is_found_wherever_it_is(make: Callable[[], Any], name: str | None) -> None:
    model = make()
    assert normalizing_layer(model) == name
    if name is None:
        check_exportable(model, IMAGENET)
    else:
        with pytest.raises(ModelError, match=f"its layer '{name}' normalises"):
            check_exportable(model, IMAGENET)


# --- models that are not of this project

MODELS = {
    "leaky relu and a softmax layer": lambda: small(conv(), layers.LeakyReLU(), conv("conv2")),
    "average pooling": lambda: small(conv(activation="relu"), layers.AveragePooling2D(2)),
    "depthwise": lambda: small(layers.DepthwiseConv2D(3, activation="relu"), conv()),
    "strides": lambda: small(conv(strides=2, padding="same", activation="relu")),
    "global pooling": lambda: small(conv(activation="relu"), layers.GlobalAveragePooling2D()),
    "dense for each pixel": lambda: small(conv(activation="relu"), layers.Dense(5, "relu")),
    "batchnorm on features": lambda: small(conv(), layers.Flatten(name="first"), layers.BatchNormalization()),
    "dropout": lambda: small(conv(), layers.Dropout(0.5), layers.SpatialDropout2D(0.5)),
    "an inner model": lambda: small(keras.Sequential([keras.Input((12, 10, 3)), conv(), layers.MaxPooling2D()])),
    "sigmoid and tanh": lambda: small(conv(activation="sigmoid"), conv("conv2", activation="tanh")),
    "no bias": lambda: small(conv(use_bias=False), layers.BatchNormalization(), layers.ReLU()),
    "batchnorm without scale": lambda: small(conv(), layers.BatchNormalization(scale=False, center=False)),
    "one filter": lambda: small(conv(filters=1), layers.BatchNormalization(), layers.ReLU(), conv("conv2")),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_other_models_keep_their_numbers_too(
    make: Callable[[], Any], clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = make()
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    assert wanted.std(axis=0).max() > 1e-4
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("kind", ["Average", "Max"])
def test_global_pooling_leaves_one_transpose(
    kind: str, keepdims: bool, clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    pool = getattr(layers, f"Global{kind}Pooling2D")(keepdims=keepdims)
    model = small(conv(activation="relu"), conv("conv2", 5, activation="relu"), pool)
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-6)
    assert graph.op_counts()["Transpose"] == 1


def test_layers_that_are_used_twice_keep_their_numbers(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    """With as many inputs as outputs, weights read the wrong way round would not even be invalid."""
    inputs = keras.Input((8, 8, 3))
    twice = conv("twice", 3, padding="same", activation="relu")
    square = layers.Dense(6, "relu", name="square", kernel_initializer=keras.initializers.HeNormal(seed=3))
    outputs = layers.Rescaling(1 / 128, offset=-1)(inputs)
    outputs = layers.Flatten()(twice(twice(outputs)))
    outputs = square(square(layers.Dense(6, kernel_initializer=keras.initializers.HeNormal(seed=4))(outputs)))
    model = keras.Model(inputs, layers.Dense(3, "softmax", name="top")(outputs))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    assert graph.op_counts()["Gemm"] == 4
    assert {"twice", "twice_2", "square", "square_2"} <= {node.name for node in graph.nodes}


@pytest.mark.parametrize("name", ["images", "probabilities", "head"])
def test_a_layer_may_have_a_name_of_the_graph(
    name: str, clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    inputs = keras.Input((8, 8, 3))
    outputs = layers.Flatten()(conv(name)(layers.Rescaling(1 / 128, offset=-1)(inputs)))
    model = keras.Model(
        inputs, layers.Dense(3, "softmax", name="probabilities" if name == "images" else "top")(outputs)
    )
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


CAFFE = Normalization(mean=(123.68, 116.779, 103.939), std=(1.0, 2.0, 4.0), order="bgr")
BGR: dict[str, Callable[[], Any]] = {
    "conv": lambda: small(conv(activation="relu")),
    "padded conv": lambda: small(layers.ZeroPadding2D(2), conv(strides=2, padding="same", activation="relu")),
    "normalised again": lambda: small(layers.BatchNormalization(), conv(activation="relu")),
}


def in_bgr(model: Any, images: np.ndarray) -> np.ndarray:
    pixels = (images.astype(np.float32) - np.float32(CAFFE.mean)) / np.float32(CAFFE.std)
    return np.asarray(model(pixels[..., ::-1], training=False))


@pytest.mark.parametrize("make", BGR.values(), ids=BGR)
def test_bgr_costs_nothing_in_front_of_a_convolution(
    make: Callable[[], Any], clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = make()
    graph, images = clean(model, CAFFE), images_for(model)
    wanted = in_bgr(model, images)
    assert np.abs(wanted - in_bgr(model, images[..., ::-1])).max() > 1e-2  # the order matters
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    assert [node.op_type for node in graph.nodes][:4] == ["Cast", "Transpose", "Sub", "Mul"]
    assert not {"Gather", "Slice", "Concat"}.intersection(graph.op_counts())


def test_bgr_in_front_of_anything_else_stays_a_node(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(layers.DepthwiseConv2D(3), conv())
    graph, images = clean(model, CAFFE), images_for(model)
    np.testing.assert_allclose(run_graph(graph, images=images)[0], in_bgr(model, images), rtol=0, atol=1e-5)
    assert graph.op_counts()["Gather"] == 1


def test_preprocess_input_inside_the_model_costs_nothing_either(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    inputs = keras.Input((12, 10, 3))
    outputs = conv(activation="relu")(keras.applications.vgg16.preprocess_input(inputs))
    near_zero = keras.initializers.RandomNormal(stddev=1e-3, seed=1)
    top = layers.Dense(3, "softmax", kernel_initializer=near_zero, name="top")
    model = keras.Model(inputs, top(layers.Flatten(name="flat")(outputs)))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    assert [node.op_type for node in graph.nodes] == [
        "Cast",
        "Transpose",
        "Add",
        "Conv",
        "Relu",
        "Flatten",
        "Gemm",
        "Softmax",
    ]


def residual(inputs: Any, filters: int, **options: Any) -> Any:
    """A block of MobileNetV2: expand, depthwise, project, each with its BatchNorm; and the input added."""
    outputs = layers.BatchNormalization()(layers.Conv2D(6, 1, use_bias=False)(inputs))
    outputs = layers.ZeroPadding2D(((0, 1), (0, 1)))(layers.ReLU(6.0)(outputs))
    outputs = layers.DepthwiseConv2D(2, use_bias=False, **options)(outputs)
    outputs = layers.ReLU(6.0)(layers.BatchNormalization()(outputs))
    outputs = layers.BatchNormalization()(layers.Conv2D(filters, 1, use_bias=False)(outputs))
    return layers.Add()([inputs, outputs]) if inputs.shape == outputs.shape else outputs


def squeezed(inputs: Any) -> Any:
    """Squeeze-and-excitation with swish, as in EfficientNet."""
    channels = inputs.shape[-1]
    squeeze = layers.Reshape((1, 1, channels))(layers.GlobalAveragePooling2D()(inputs))
    squeeze = layers.Conv2D(channels, 1, activation="sigmoid")(layers.Conv2D(2, 1, activation="swish")(squeeze))
    return layers.Multiply()([inputs, squeeze])


def backbone(*blocks: Callable[[Any], Any]) -> Callable[[], Any]:
    """A nested model behind augmentation, as transfer learning makes it."""

    def make() -> Any:
        inside = keras.Input((12, 10, 3))
        outputs = layers.Conv2D(4, 3, padding="same", activation="relu", name="stem")(inside)
        for block in blocks:
            outputs = block(outputs)
        inner = keras.Model(inside, outputs, name="backbone")
        augmentation = keras.Sequential([layers.RandomFlip(), layers.RandomRotation(0.1)], name="augmentation")
        inputs = keras.Input((12, 10, 3))
        outputs = inner(layers.Rescaling(1 / 128, offset=-1)(augmentation(inputs)))
        outputs = layers.Dropout(0.2)(layers.GlobalAveragePooling2D(name="gap")(outputs))
        return keras.Model(inputs, layers.Dense(3, "softmax", name="top")(outputs))

    return make


BACKBONES = {
    "residual": (backbone(lambda x: residual(x, 4), lambda x: residual(x, 4), lambda x: residual(x, 5, strides=2)), {}),
    "squeeze and excitation": (backbone(squeezed, lambda x: residual(x, 4), squeezed), {"Reshape": 2}),
    "dense": (
        backbone(*[lambda x: layers.Concatenate()([x, layers.Conv2D(3, 3, padding="same", activation="relu")(x)])] * 2),
        {"Concat": 2},
    ),
    "grouped": (backbone(lambda x: layers.Conv2D(6, 3, groups=2, padding="same", activation="gelu")(x)), {"Erf": 1}),
}


@pytest.mark.parametrize(("make", "counts"), BACKBONES.values(), ids=BACKBONES)
def test_backbones_keep_their_numbers_and_one_transpose(
    make: Callable[[], Any],
    counts: dict[str, int],
    clean: Callable[..., Graph],
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    keras.utils.set_random_seed(5)  # some draws answer all images nearly alike
    model = make()
    graph, images = clean(model), images_for(model)
    assert normalizing_layer(model) == model.layers[2].name
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    assert wanted.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    found = graph.op_counts()
    assert found["Transpose"] == 1
    assert not {"BatchNormalization", "Pad"}.intersection(found)
    assert {op: found.get(op, 0) for op in counts} == counts
    named = {node.name: node.op_type for node in graph.nodes}
    assert (named["stem"], named["stem/relu"], named["top"], named["gap"]) == ("Conv", "Relu", "Gemm", "ReduceMean")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "transposes", "options"),
    [("MobileNetV2", 1, {"alpha": 0.35}), ("ResNet50", 1, {}), ("EfficientNetB0", 2, {}), ("DenseNet121", 1, {})],
)
def test_backbones_of_keras_applications(
    name: str,
    transposes: int,
    options: dict[str, Any],
    randomise: Callable[..., None],
    run_graph: Callable[..., list[np.ndarray]],
) -> None:
    keras.utils.set_random_seed(5)  # or a rare draw answers one class alike for all
    inner = getattr(keras.applications, name)(include_top=False, weights=None, input_shape=(64, 64, 3), **options)
    inputs = keras.Input((64, 64, 3))
    features = layers.GlobalAveragePooling2D()(inner(layers.Rescaling(1 / 128, offset=-1)(inputs)))
    top = layers.Dense(3, "softmax", name="top")
    model = keras.Model(inputs, top(features))
    randomise(model)
    images = images_for(model, 8)
    pixels, backbone = images.astype(np.float32), keras.Model(inputs, features)
    for layer in inner.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    backbone(pixels, training=True)  # takes these pictures' statistics: without, all images give the same features
    found = np.asarray(backbone(pixels, training=False))
    kernel = np.random.default_rng(1).normal(size=top.kernel.shape)
    kernel /= (found @ kernel).std(axis=0)
    top.set_weights([kernel, -found.mean(axis=0) @ kernel])  # neither uniform nor saturated
    graph = graph_from_keras(model)
    apply_passes(graph)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    assert wanted.std(axis=0).min() > 0.1
    # Untrained and this deep, they magnify every rounding: FP16 moves the answers by 0.1.
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=5e-4)
    assert graph.op_counts()["Transpose"] == transposes


# --- names


def block(name: str) -> Any:
    inside = [conv("conv", activation="relu"), layers.MaxPooling2D(name=f"{name}_pool"), layers.LeakyReLU(name="leaky")]
    return keras.Sequential(inside, name=name)


def test_a_sequential_models_own_name_is_in_no_node(clean: Callable[..., Graph]) -> None:
    body = [rescaling(), conv(activation="relu"), layers.MaxPooling2D(name="pool1"), layers.Flatten(name="flat")]
    graph = clean(keras.Sequential([keras.Input((12, 12, 3)), *body, layers.Dense(3, "softmax", name="top")]))
    behind_head = [node.name for node in graph.nodes if not node.name.startswith("head/")]
    assert behind_head == ["conv1", "conv1/relu", "pool1", "flat", "top", "top/softmax"]
    assert {"conv1/kernel", "conv1/bias", "top/kernel"} <= set(graph.weights)


def test_nested_layers_are_named_by_their_own_name_unless_two_share_it(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    model = small(block("first"), block("second"), conv("alone", padding="same"), size=(20, 20, 3))
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)
    names = [node.name for node in graph.nodes if node.op_type != "Relu" and not node.name.startswith("head/")]
    assert names == [
        *("first/conv", "first_pool", "leaky", "second/conv", "second_pool", "leaky_2"),
        *("alone", "flatten", "top", "top/softmax"),
    ]


def test_numbered_layers_keep_their_numbers(clean: Callable[..., Graph]) -> None:
    """Keras and TensorFlow both number by ``_1``."""
    pools = [layers.MaxPooling2D(name=name) for name in ("pool", "pool_1", "pool_2")]
    graph = clean(small(*pools, size=(16, 16, 3)))
    assert [node.name for node in graph.nodes if node.op_type == "MaxPool"] == ["pool", "pool_1", "pool_2"]


# --- what cannot be exported


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_a_model_that_does_not_compute_in_float32_is_refused_with_its_cure(policy: str) -> None:
    def body() -> tuple[Any, ...]:
        return conv(), keras.Sequential([layers.Conv2D(2, 1, name="inner", dtype=policy)])

    with pytest.raises(ModelError, match=r"'inner' computes in b?float16.*set_dtype_policy\(\"float32\"\)"):
        check_exportable(small(*body()), None)
    keras.config.set_dtype_policy(policy)
    try:
        whole = small(conv())
    finally:
        keras.config.set_dtype_policy("float32")
    with pytest.raises(ModelError, match="needed is float32"):
        check_exportable(whole, None)
    again = small(conv())
    again.set_weights(whole.get_weights())
    check_exportable(again, None)


def two_inputs() -> Any:
    a, b = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    return keras.Model([a, b], layers.Dense(3, name="top")(layers.Flatten()(layers.Add()([a, b]))))


def two_outputs() -> Any:
    inputs = keras.Input((8, 8, 3), name="photo")
    flat = layers.Flatten()(inputs)
    return keras.Model(inputs, [layers.Dense(3, name="three")(flat), layers.Dense(2, name="two")(flat)])


def of_size(*size: int | None) -> Any:
    inputs = keras.Input(size, name="photo")
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D()(layers.Activation("relu")(inputs))))


def segmenter() -> Any:
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Conv2D(3, 1, name="map")(inputs))


def of_features() -> Any:
    inputs = keras.Input((8,), name="photo")
    return keras.Model(inputs, layers.Dense(3)(inputs))


def with_channels_first() -> Any:
    inputs = keras.Input((8, 8, 3))
    turned = layers.GlobalMaxPooling2D(data_format="channels_first", name="turned")(layers.Permute((3, 1, 2))(inputs))
    return keras.Model(inputs, layers.Dense(3)(turned))


def unbuilt() -> Any:
    return keras.Sequential([layers.Flatten(), layers.Dense(3)], name="unbuilt")


class Subclassed(keras.Model):
    def call(self, inputs: Any) -> Any:
        return inputs


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (two_inputs, r"2 inputs \(left, right\) and 1 outputs \(top\); export needs one image input"),
        (two_outputs, r"1 inputs \(photo\) and 2 outputs \(three, two\)"),
        (lambda: of_size(None, None, 3), r"its input 'photo' is \(None, None, None, 3\), which leaves the size open"),
        (lambda: of_size(8, None, 1), r"its input 'photo' is \(None, 8, None, 1\).*Input\(\(height, width, 1\)\)"),
        (lambda: of_size(8, 8, 2), r"its input 'photo' is \(None, 8, 8, 2\), .* have 2 channels.*RGB or grey"),
        (lambda: of_size(8, 8, 4), r"its input 'photo' is \(None, 8, 8, 4\), .* have 4 channels"),
        (
            lambda: of_size(3, 8, 8),
            r"its input 'photo' is \(None, 3, 8, 8\), channels first; needed is .*, channels last",
        ),
        (with_channels_first, r"its layer 'turned' has data_format='channels_first'; needed is 'channels_last'"),
        (of_features, r"its input 'photo' is \(None, 8\), which is no image"),
        (segmenter, r"its output, of the layer 'map', is \(None, 8, 8, 3\).*A map of scores is no classification"),
        (unbuilt, "unbuilt: .*no defined inputs"),
        (Subclassed, "subclassed: .*no defined inputs"),
    ],
)
def test_a_model_that_is_no_image_classifier_is_refused(make: Callable[[], Any], message: str) -> None:
    model = make()
    with pytest.raises(ModelError, match=f"(?s){message}"):
        check_exportable(model, None)
    with pytest.raises(ModelError):
        graph_from_keras(model)


class Strange(layers.Layer):
    """Computes what TensorFlow has and ONNX does not."""

    def call(self, inputs: Any) -> Any:
        import tensorflow as tf

        ratio = tf.sigmoid(inputs)
        return tf.raw_ops.Betainc(a=ratio + 1, b=ratio + 2, x=ratio)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(conv(), Strange(name="strange")), "the layer 'strange' computes TensorFlow's Betainc"),
        (
            lambda: small(layers.Reshape((12, 30)), layers.LSTM(3, name="memory")),
            r"'memory' became an ONNX \w+ with a graph of its own.*unroll=True",
        ),
    ],
)
def test_a_layer_that_onnx_does_not_have_is_told_by_its_name(
    make: Callable[[], Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make()
    with pytest.raises(ConversionError, match=f"(?s){message}"):
        graph_from_keras(model)
    shown = "".join(capfd.readouterr())
    assert "Traceback" not in shown
    assert "not supported" not in shown


def test_attention_and_an_unrolled_lstm_keep_their_numbers(
    clean: Callable[..., Graph], run_graph: Callable[..., list[np.ndarray]]
) -> None:
    inputs = keras.Input((8, 8, 3))
    rows = layers.Reshape((8, 24))(layers.Rescaling(1 / 128, offset=-1)(inputs))
    rows = layers.LayerNormalization()(rows + layers.MultiHeadAttention(2, 4, name="mix")(rows, rows))
    outputs = layers.Dense(3, "softmax", name="top")(layers.LSTM(4, unroll=True, name="memory")(rows))
    model = keras.Model(inputs, outputs)
    graph, images = clean(model), images_for(model)
    wanted = np.asarray(model(images.astype(np.float32), training=False))
    np.testing.assert_allclose(run_graph(graph, images=images)[0], wanted, rtol=0, atol=1e-5)


def test_what_tf2onnx_cannot_convert_is_told_with_its_reason() -> None:
    class Broken(layers.Layer):
        def call(self, inputs: Any) -> Any:
            if keras.backend.backend() == "tensorflow" and not isinstance(inputs, keras.KerasTensor):
                raise ValueError("this layer has no graph")
            return inputs

        def compute_output_shape(self, shape: Any) -> Any:
            return shape

    with pytest.raises(ConversionError, match=r"(?s)could not convert '.*this layer has no graph"):
        graph_from_keras(small(conv(), Broken()))
